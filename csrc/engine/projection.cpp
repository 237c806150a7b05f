// The output layer of a step: products that become each row's best ids and sums, without a row of logits.
#include <algorithm>

#include "common/scratch.h"
#include "engine/model.h"

namespace cvmk::engine {
namespace {

constexpr std::int64_t kNever = 3;        // padding, unknown, beginning: never said (cvmk/text/tokenizers/base.py)
constexpr std::int64_t kAlone = 1 << 18;  // multiplications below which the calling thread does the work

}  // namespace

// Neighbours that have the same shortlist, or none, together.
void Model::project(const std::vector<StepRow>& rows, const float* features, std::vector<StepResult>& results, const Team& team) const {
  const std::int64_t count = static_cast<std::int64_t>(rows.size());
  const auto asks = [&](std::int64_t r) {
    const StepRow& row = rows[static_cast<std::size_t>(r)];
    return row.k > 0 || row.sum || row.wanted >= 0 || row.logits != nullptr;
  };
  for (std::int64_t first = 0, end = 0; first < count; first = end) {
    const Shortlist* list = rows[static_cast<std::size_t>(first)].shortlist;
    while (end < count && rows[static_cast<std::size_t>(end)].shortlist == list && asks(end) == asks(first)) ++end;
    if (!asks(first)) continue;
    project(rows.data() + first, end - first, features + first * config_.d_model, list, results.data() + first, team);
  }
}

namespace {

// What is asked of rows, in places of a list of ids.
struct Asked {
  std::vector<vocabulary::Row> rows;
  std::vector<std::vector<std::int32_t>> places;
  std::vector<std::vector<float>> logits;

  Asked(const StepRow* from, std::int64_t count, const Shortlist* list) {
    for (std::int64_t r = 0; r < count; ++r) {
      const StepRow& row = from[r];
      rows.push_back({row.k, row.sum, row.wanted, row.logits, row.said, row.said_count, row.penalty, row.forbidden, row.forbidden_count,
                      row.wanted < 0 && row.logits == nullptr && row.said_count == 0 && row.forbidden_count == 0});
      if (list == nullptr) continue;
      vocabulary::Row& asked = rows.back();
      asked.wanted = place(*list, row.wanted);
      if (row.logits != nullptr) asked.logits = logits.emplace_back(list->ids.size()).data();
      translate(*list, asked.said, asked.said_count);
      translate(*list, asked.forbidden, asked.forbidden_count);
    }
  }

  static std::int32_t place(const Shortlist& list, std::int32_t id) {
    const auto found = std::lower_bound(list.ids.begin(), list.ids.end(), id);
    return found != list.ids.end() && *found == id ? static_cast<std::int32_t>(found - list.ids.begin()) : -1;
  }
  void translate(const Shortlist& list, const std::int32_t*& ids, std::int64_t& count) {
    if (count == 0) return;
    std::vector<std::int32_t>& found = places.emplace_back();
    for (std::int64_t i = 0; i < count; ++i)
      if (const std::int32_t at = place(list, ids[i]); at >= 0) found.push_back(at);
    ids = found.data();
    count = static_cast<std::int64_t>(found.size());
  }
};

// What the threads of a projection write to: the first one's best ids go to the results themselves.
struct Findings {
  std::vector<vocabulary::Part> parts;
  std::vector<vocabulary::Best> best;

  Findings(Arena& arena, const Asked& asked, StepResult* results, std::int64_t threads, std::int64_t segments, std::int64_t never) {
    const std::int64_t count = static_cast<std::int64_t>(asked.rows.size());
    float *shifts = arena.take<float>(count * segments), *sums = arena.take<float>(count * segments), *wanted = arena.take<float>(count);
    best.resize(static_cast<std::size_t>(threads * count));
    for (std::int64_t t = 0; t < threads; ++t) {
      vocabulary::Best* own = best.data() + t * count;
      for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t k = asked.rows[static_cast<std::size_t>(r)].k;
        if (t == 0) {
          results[r].values.resize(static_cast<std::size_t>(k));
          results[r].ids.resize(static_cast<std::size_t>(k));
        }
        own[r] = {0, t == 0 ? results[r].values.data() : arena.take<float>(k), t == 0 ? results[r].ids.data() : arena.take<std::int32_t>(k)};
      }
      parts.push_back({asked.rows.data(), own, arena.take<vocabulary::Lanes>(count), shifts, sums, wanted, 0, 0, segments, never});
    }
  }
};

}  // namespace

void Model::project(const StepRow* rows, std::int64_t count, const float* features, const Shortlist* list, StepResult* results, const Team& team) const {
  const Linear& layer = list == nullptr ? output_ : list->output;
  const std::int64_t n = layer.outputs(), segments = pieces(n, vocabulary::kSegment);
  const std::int64_t threads = count * n * config_.d_model <= kAlone ? 1 : std::min<std::int64_t>(team.size, segments);
  const Asked asked(rows, count, list);
  const auto plan = [&](Arena& arena) { return Findings(arena, asked, results, threads, segments, list == nullptr ? kNever : 0); };
  Arena needed;
  needed.take<char>(layer.prepared_bytes(count));
  plan(needed);
  const Scratch scratch(needed.used);
  Arena arena{scratch.data()};
  const Linear::Prepared prepared = layer.prepare(features, count, arena.take<char>(layer.prepared_bytes(count)));
  Findings found = plan(arena);
  std::fill_n(found.parts[0].wanted, count, -__builtin_inff());
  const vocabulary::Kernels& kernels = vocabulary::kernels();
  team.share(threads, segments, [&](std::int64_t first, std::int64_t last, int thread) {
    vocabulary::Part& part = found.parts[static_cast<std::size_t>(thread)];
    part.first = first * vocabulary::kSegment;
    part.n = std::min(n, last * vocabulary::kSegment) - part.first;
    if (part.n > 0) layer.range(prepared, part.first, part.n, {kernels.take, &part});
  });
  for (std::int64_t r = 0; r < count; ++r) {
    StepResult& result = results[r];
    const vocabulary::Row& row = asked.rows[static_cast<std::size_t>(r)];
    kernels.merge(row, found.parts.data(), threads, r);
    const auto kept = static_cast<std::size_t>(found.best[static_cast<std::size_t>(r)].count);
    result.values.resize(kept);
    result.ids.resize(kept);
    result.wanted = rows[r].wanted >= 0 ? found.parts[0].wanted[r] : 0.0f;
    result.normaliser = row.sum ? kernels.normaliser(found.parts[0].shifts + r * segments, found.parts[0].sums + r * segments, segments) : 0.0;
    if (list == nullptr) continue;
    for (std::int32_t& id : result.ids) id = list->ids[static_cast<std::size_t>(id)];
    if (rows[r].logits == nullptr) continue;
    std::fill_n(rows[r].logits, config_.vocabulary, -__builtin_inff());
    for (std::size_t i = 0; i < list->ids.size(); ++i) rows[r].logits[list->ids[i]] = row.logits[i];
  }
}

}  // namespace cvmk::engine
