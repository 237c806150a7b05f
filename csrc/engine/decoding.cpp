#include "engine/decoding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace cvmk::engine {
namespace {

constexpr std::int32_t kBegin = 2, kEnd = 3;
constexpr double kNothing = -std::numeric_limits<double>::infinity();

double final_score(double total, std::int64_t pieces, double length_penalty) { return total / std::pow(static_cast<double>(pieces + 1), length_penalty); }

// Numbers in [0, 1) of a seed, a stream and a step: SplitMix64 (Steele, Lea & Flood 2014).
double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step) {
  std::uint64_t x = seed;
  for (const std::uint64_t part : {stream, step}) {
    x += 0x9E3779B97F4A7C15u + part;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
  }
  return static_cast<double>(x >> 11) * 0x1.0p-53;
}

}  // namespace

std::int64_t Sequence::bytes(const Model& model, const Request& request) {
  const std::int64_t source = Model::capacity_of(static_cast<std::int64_t>(request.source.size()) + 1), own = Model::capacity_of(request.limit + 1);
  return (request.growing == nullptr ? model.cross_bytes(source) : 0) + request.options.beam_size * model.own_bytes(own);
}

Sequence::Sequence(const Model& model, Memory& memory, Request request)
    : model_(model), request_(std::move(request)), source_(request_.source),
      shortlist_(request_.shortlist.empty() ? nullptr : new Shortlist{request_.shortlist, model.output().rows(request_.shortlist)}),
      block_(memory, bytes(model, request_)) {
  source_.push_back(kEnd);
  const std::int64_t source = Model::capacity_of(static_cast<std::int64_t>(source_.size())), own = Model::capacity_of(request_.limit + 1);
  char* next = block_.data();
  if (request_.growing == nullptr) {
    encoded_ = model.cross_caches(next, source);
    next += model.cross_bytes(source);
  } else {
    encoded_ = request_.growing->encoded();
  }
  for (std::int64_t slot = 0; slot < request_.options.beam_size; ++slot, next += model.own_bytes(own)) slots_.push_back(model.own_caches(next, own));
  fed_.assign(slots_.size(), -1);
  nodes_.push_back({-1, kBegin, 0.0f, 0, nullptr});
  Live first{};
  first.agrees = biased();
  live_.push_back(first);
}

Model::Source Sequence::source() {
  if (request_.growing != nullptr) return request_.growing->update(source_);
  return {source_.data(), static_cast<std::int64_t>(source_.size()), &encoded_};
}

std::vector<std::int32_t> Sequence::pieces_of(std::int32_t node) const {
  std::vector<std::int32_t> found(static_cast<std::size_t>(nodes_[static_cast<std::size_t>(node)].depth));
  for (std::size_t i = found.size(); i > 0; --i, node = nodes_[static_cast<std::size_t>(node)].parent) found[i - 1] = nodes_[static_cast<std::size_t>(node)].token;
  return found;
}

std::int32_t Sequence::add_node(std::int32_t parent, std::int32_t token, float score, const std::shared_ptr<std::vector<float>>& map) {
  nodes_.push_back({parent, token, score, nodes_[static_cast<std::size_t>(parent)].depth + 1, map});
  return static_cast<std::int32_t>(nodes_.size() - 1);
}

// -- what is asked ------------------------------------------------------------------------------------------------------------------
// Which ids the repetition penalty changes, and which may not come next.
void Sequence::rules(Live& live) {
  const Options& o = request_.options;
  live.said.clear();
  live.forbidden.clear();
  const std::int64_t length = nodes_[static_cast<std::size_t>(live.node)].depth;
  const bool no_end = length < std::min(o.min_length, request_.limit);
  if (no_end) live.forbidden.push_back(kEnd);
  live.forbidden.insert(live.forbidden.end(), o.suppressed.begin(), o.suppressed.end());
  if (o.repetition_penalty == 1.0f && o.no_repeat_ngram == 0) return;
  const std::vector<std::int32_t> pieces = pieces_of(live.node);
  if (o.repetition_penalty != 1.0f) {
    live.said = pieces;
    std::sort(live.said.begin(), live.said.end());
    live.said.erase(std::unique(live.said.begin(), live.said.end()), live.said.end());
  }
  if (o.no_repeat_ngram == 0 || o.no_repeat_ngram > length) return;
  const auto context = pieces.end() - (o.no_repeat_ngram - 1);
  for (auto at = pieces.begin(); at + o.no_repeat_ngram <= pieces.end(); ++at)
    if (std::equal(context, pieces.end(), at)) live.forbidden.push_back(*(at + o.no_repeat_ngram - 1));
  std::sort(live.forbidden.begin(), live.forbidden.end());
  live.forbidden.erase(std::unique(live.forbidden.begin(), live.forbidden.end()), live.forbidden.end());
}

void Sequence::ask(std::vector<StepRow>& rows) {
  const Options& o = request_.options;
  const std::int64_t source_length = static_cast<std::int64_t>(source_.size());
  const std::size_t first = rows.size();
  for (Live& live : live_) {
    const bool forced = !begun_ && hard_prefix() > 0;
    if (forced) {
      // The prefix at once: each piece asks for the logit of the next one.
      for (std::int64_t i = 0; i < hard_prefix(); ++i) {
        const std::int32_t next = request_.prefix[static_cast<std::size_t>(i)];
        StepRow row{nodes_.back().token, i, &slots_[0], &encoded_, source_length, weighed() ? next : -1, 0, weighed(), nullptr, 0, 1.0f, nullptr, 0, shortlist_.get(), nullptr, nullptr};
        live.node = add_node(live.node, next, 0.0f, nullptr);
        if (o.alignments) {
          nodes_.back().map = std::make_shared<std::vector<float>>(static_cast<std::size_t>(source_length));
          row.map = nodes_.back().map->data();
        }
        rows.push_back(row);
      }
    }
    rules(live);
    const Node& node = nodes_[static_cast<std::size_t>(live.node)];
    const bool full = node.depth >= request_.limit;
    StepRow row{node.token, node.depth, &slots_[static_cast<std::size_t>(live.slot)], &encoded_, source_length, -1, 0, weighed(), live.said.data(),
                static_cast<std::int64_t>(live.said.size()), o.repetition_penalty, live.forbidden.data(), static_cast<std::int64_t>(live.forbidden.size()), shortlist_.get(), nullptr, nullptr};
    if (full) row.wanted = weighed() ? kEnd : -1;
    else if (live.agrees && node.depth < static_cast<std::int64_t>(request_.prefix.size())) row.wanted = request_.prefix[static_cast<std::size_t>(node.depth)];
    if (!full && o.temperature == 0.0) row.k = o.beam_size == 1 ? 1 : std::min(2 * o.beam_size, model_.config().vocabulary);
    if (!full && o.temperature > 0.0) {
      live.logits.resize(static_cast<std::size_t>(model_.config().vocabulary));
      row.logits = live.logits.data();
    }
    if (o.alignments) {
      live.map = std::make_shared<std::vector<float>>(static_cast<std::size_t>(source_length));
      row.map = live.map->data();
    }
    fed_[static_cast<std::size_t>(live.slot)] = live.node;
    rows.push_back(row);
  }
  // The repetition penalty of the prefix's rows: what stands before each of them.
  if (!begun_ && hard_prefix() > 0 && o.repetition_penalty != 1.0f) {
    prefix_said_.assign(static_cast<std::size_t>(hard_prefix()), {});
    for (std::int64_t i = 1; i < hard_prefix(); ++i) {
      std::vector<std::int32_t>& said = prefix_said_[static_cast<std::size_t>(i)];
      said.assign(request_.prefix.begin(), request_.prefix.begin() + i);
      std::sort(said.begin(), said.end());
      said.erase(std::unique(said.begin(), said.end()), said.end());
      StepRow& row = rows[first + static_cast<std::size_t>(i)];
      row.said = said.data();
      row.said_count = static_cast<std::int64_t>(said.size());
      row.penalty = o.repetition_penalty;
    }
  }
}

// -- what comes of it ---------------------------------------------------------------------------------------------------------------
void Sequence::advance(const StepResult* results) {
  if (!begun_) {
    begun_ = true;
    read_prefix(results, hard_prefix());
    results += hard_prefix();
    // A sample begins as one hypothesis too, and its streams part here.
    while (request_.options.temperature > 0.0 && static_cast<std::int64_t>(live_.size()) < request_.options.beam_size) {
      Live another = live_[0];
      another.slot = another.stream = live_.size();
      copy(0, live_[0].node, another.slot);
      live_.push_back(another);
    }
    if (live_.size() > 1) {
      std::vector<StepResult> same(live_.size(), *results);
      return sample(same.data());
    }
  }
  if (request_.options.temperature > 0.0) sample(results);
  else if (weighed()) search(results);
  else follow(*results);
}

void Sequence::read_prefix(const StepResult* results, std::int64_t count) {
  std::int32_t node = live_[0].node;
  for (std::int64_t i = count - 1; i >= 0; --i, node = nodes_[static_cast<std::size_t>(node)].parent) {
    const float score = results[i].wanted - static_cast<float>(results[i].normaliser);
    nodes_[static_cast<std::size_t>(node)].score = score;
    live_[0].total += static_cast<double>(score);
  }
}

void Sequence::collect(std::int64_t parent, const StepResult& result, std::vector<Candidate>& candidates) const {
  const Live& live = live_[static_cast<std::size_t>(parent)];
  const float normaliser = static_cast<float>(result.normaliser);
  const Node& node = nodes_[static_cast<std::size_t>(live.node)];
  if (node.depth >= request_.limit) {
    const float score = result.wanted - normaliser;
    candidates.push_back({live.total + static_cast<double>(score), parent, kEnd, score});
    return;
  }
  if (live.agrees && node.depth < static_cast<std::int64_t>(request_.prefix.size())) return collect_biased(parent, result, candidates);
  for (std::size_t i = 0; i < result.ids.size(); ++i) {
    const float score = result.values[i] - normaliser;
    candidates.push_back({live.total + static_cast<double>(score), parent, result.ids[i], score});
  }
}

// p' = (1 - beta) p + beta [the piece is the prefix's] (Arivazhagan et al. 2020).
void Sequence::collect_biased(std::int64_t parent, const StepResult& result, std::vector<Candidate>& candidates) const {
  const Live& live = live_[static_cast<std::size_t>(parent)];
  const double bias = request_.options.prefix_bias, normaliser = result.normaliser;
  const std::int32_t wanted = request_.prefix[static_cast<std::size_t>(nodes_[static_cast<std::size_t>(live.node)].depth)];
  const auto add = [&](std::int32_t token, double p) {
    const float score = static_cast<float>(std::log(p));
    if (p > 0.0 || p != p) candidates.push_back({live.total + static_cast<double>(score), parent, token, score});
  };
  add(wanted, (1.0 - bias) * std::exp(static_cast<double>(result.wanted) - normaliser) + bias);
  for (std::size_t i = 0; i < result.ids.size(); ++i)
    if (result.ids[i] != wanted) add(result.ids[i], (1.0 - bias) * std::exp(static_cast<double>(result.values[i]) - normaliser));
}

void Sequence::finish(double total, std::int32_t node, float end) {
  if (std::isfinite(total)) found_.push_back({final_score(total, nodes_[static_cast<std::size_t>(node)].depth, request_.options.length_penalty), node, end});
}

// The piece with the largest logit. The end is not asked for at the limit: only its score could be said.
void Sequence::follow(const StepResult& result) {
  const Live& live = live_[0];
  const bool full = nodes_[static_cast<std::size_t>(live.node)].depth >= request_.limit;  // of a prefix
  done_ = full || result.ids.empty() || result.ids[0] == kEnd || !std::isfinite(result.values[0]);
  if (full || (!result.ids.empty() && result.ids[0] == kEnd)) finish(0.0, live.node, 0.0f);
  if (done_) return;
  Live child{};
  child.node = add_node(live.node, result.ids[0], 0.0f, live.map);
  child.slot = live.slot;
  done_ = nodes_[static_cast<std::size_t>(child.node)].depth >= request_.limit;
  if (done_) finish(0.0, child.node, 0.0f);
  live_[0] = std::move(child);
}

void Sequence::search(const StepResult* results) {
  const std::int64_t beam = request_.options.beam_size, length = nodes_[static_cast<std::size_t>(live_[0].node)].depth;
  std::vector<Candidate> candidates;
  for (std::size_t i = 0; i < live_.size(); ++i) collect(static_cast<std::int64_t>(i), results[i], candidates);
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), [](const Candidate& c) { return !(c.total > kNothing && c.total < -kNothing); }), candidates.end());
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.total != b.total ? a.total > b.total : a.parent != b.parent ? a.parent < b.parent : a.token < b.token;
  });
  std::vector<Candidate> chosen;
  for (std::size_t i = 0; i < candidates.size() && i < static_cast<std::size_t>(2 * beam); ++i) {
    const Candidate& c = candidates[i];
    if (c.token != kEnd) {
      if (static_cast<std::int64_t>(chosen.size()) < beam) chosen.push_back(c);
    } else if (static_cast<std::int64_t>(i) < beam) {
      finish(c.total, live_[static_cast<std::size_t>(c.parent)].node, c.score);
    }
  }
  done_ = chosen.empty() || is_done(chosen[0].total, length);
  if (!done_) survive(chosen);
}

bool Sequence::is_done(double best, std::int64_t length) const {
  const Options& o = request_.options;
  if (static_cast<double>(found_.size()) >= static_cast<double>(o.beam_size) * o.patience || length >= request_.limit) return true;
  if (static_cast<std::int64_t>(found_.size()) < o.n_best) return false;
  std::vector<double> scores;
  for (const Found& f : found_) scores.push_back(f.score);
  std::nth_element(scores.begin(), scores.begin() + (o.n_best - 1), scores.end(), std::greater<double>());
  return scores[static_cast<std::size_t>(o.n_best - 1)] >= final_score(best, request_.limit, o.length_penalty);
}

// The chosen continuations become the living hypotheses, the best first. One child of each parent goes on in its caches; others get a copy in
// the caches of parents without children, so that nothing is overwritten that is still to be read.
void Sequence::survive(const std::vector<Candidate>& chosen) {
  std::vector<Live> next;
  std::vector<bool> taken(slots_.size(), false), inherited(live_.size(), false);
  for (const Candidate& c : chosen) taken[static_cast<std::size_t>(live_[static_cast<std::size_t>(c.parent)].slot)] = true;
  std::size_t free = 0;
  for (const Candidate& c : chosen) {
    const Live& parent = live_[static_cast<std::size_t>(c.parent)];
    Live child{};
    child.total = c.total;
    child.node = add_node(parent.node, c.token, c.score, parent.map);
    const std::int64_t depth = nodes_[static_cast<std::size_t>(parent.node)].depth;
    child.agrees = parent.agrees && depth < static_cast<std::int64_t>(request_.prefix.size()) && request_.prefix[static_cast<std::size_t>(depth)] == c.token;
    child.slot = parent.slot;
    if (inherited[static_cast<std::size_t>(c.parent)]) {
      while (taken[free]) ++free;
      child.slot = static_cast<std::int64_t>(free++);
      copy(parent.slot, parent.node, child.slot);
    }
    inherited[static_cast<std::size_t>(c.parent)] = true;
    next.push_back(std::move(child));
  }
  live_ = std::move(next);
}

// The caches of a slot whose last position is from_node's into another one; what both have in common stands there already.
void Sequence::copy(std::int64_t from, std::int32_t from_node, std::int64_t to) {
  std::int32_t a = from_node, b = fed_[static_cast<std::size_t>(to)];
  const auto depth = [&](std::int32_t node) { return nodes_[static_cast<std::size_t>(node)].depth; };
  const std::int64_t last = depth(a) + 1;
  std::int64_t first = 0;
  if (b >= 0) {
    while (a != b) (depth(a) > depth(b) ? a : b) = nodes_[static_cast<std::size_t>(depth(a) > depth(b) ? a : b)].parent;
    first = depth(a) + 1;
  }
  model_.copy(slots_[static_cast<std::size_t>(from)], slots_[static_cast<std::size_t>(to)], first, last);
  fed_[static_cast<std::size_t>(to)] = from_node;
}

// -- sampling -----------------------------------------------------------------------------------------------------------------------
// Each hypothesis draws its next piece from its own stream: temperature, then the top_k largest, then the fewest that have top_p of the mass (Holtzman
// et al. 2020). Scores stay the model's.
void Sequence::sample(const StepResult* results) {
  const Options& o = request_.options;
  std::vector<Live> next;
  for (std::size_t i = 0; i < live_.size(); ++i) {
    Live& live = live_[i];
    const StepResult& result = results[i];
    const float normaliser = static_cast<float>(result.normaliser);
    const std::int64_t depth = nodes_[static_cast<std::size_t>(live.node)].depth;
    std::int32_t token = kEnd;
    float score = result.wanted - normaliser;
    if (depth < request_.limit) {
      std::vector<float>& logits = live.logits.empty() ? live_[0].logits : live.logits;
      token = draw(logits, live, uniform(o.seed, live.stream, static_cast<std::uint64_t>(depth)));
      score = token < 0 ? normaliser : logits[static_cast<std::size_t>(token)] - normaliser;
    }
    const double total = live.total + static_cast<double>(score);
    if (token < 0 || !std::isfinite(total)) continue;
    if (token == kEnd) {
      finish(total, live.node, score);
      continue;
    }
    Live child{};
    child.total = total;
    child.node = add_node(live.node, token, score, live.map);
    child.slot = live.slot;
    child.stream = live.stream;
    next.push_back(std::move(child));
  }
  live_ = std::move(next);
  done_ = live_.empty();
}

// The id at the place u of the distribution, ids in falling order of probability; -1 where there is none.
std::int32_t Sequence::draw(const std::vector<float>& logits, const Live& live, double u) const {
  const Options& o = request_.options;
  std::vector<std::int32_t> ids;
  ids.reserve(logits.size());
  auto forbidden = live.forbidden.begin();
  float top = -__builtin_inff();
  for (std::int32_t id = kEnd; id < static_cast<std::int32_t>(logits.size()); ++id) {
    while (forbidden != live.forbidden.end() && *forbidden < id) ++forbidden;
    const float logit = logits[static_cast<std::size_t>(id)];
    if ((forbidden != live.forbidden.end() && *forbidden == id) || !(logit > -__builtin_inff())) continue;
    ids.push_back(id);
    top = std::max(top, logit);
  }
  if (ids.empty() || !std::isfinite(top)) return -1;
  const auto larger = [&](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  if (o.top_k > 0 && o.top_k < static_cast<std::int64_t>(ids.size())) {
    std::nth_element(ids.begin(), ids.begin() + o.top_k, ids.end(), larger);
    ids.resize(static_cast<std::size_t>(o.top_k));
  }
  std::sort(ids.begin(), ids.end(), larger);
  std::vector<double> mass(ids.size());
  double sum = 0.0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    sum += std::exp((static_cast<double>(logits[static_cast<std::size_t>(ids[i])]) - static_cast<double>(top)) / o.temperature);
    mass[i] = sum;
  }
  std::size_t count = ids.size();
  if (o.top_p < 1.0) {
    count = static_cast<std::size_t>(std::lower_bound(mass.begin(), mass.end(), o.top_p * sum) - mass.begin()) + 1;
    count = std::min(count, ids.size());
  }
  const std::size_t at = static_cast<std::size_t>(std::upper_bound(mass.begin(), mass.begin() + static_cast<std::ptrdiff_t>(count), u * mass[count - 1]) - mass.begin());
  return ids[std::min(at, count - 1)];
}

// -- results ------------------------------------------------------------------------------------------------------------------------
std::vector<std::int32_t> Sequence::partial() const { return live_.empty() ? std::vector<std::int32_t>{} : pieces_of(live_[0].node); }

std::vector<Hypothesis> Sequence::hypotheses() const {
  std::vector<Hypothesis> found;
  const auto add = [&](std::int32_t node, double score, const float* end) {
    Hypothesis h;
    h.score = score;
    h.pieces = pieces_of(node);
    h.scores.resize(h.pieces.size());
    const std::size_t width = source_.size();
    if (request_.options.alignments) h.alignment.resize(h.pieces.size() * width);
    for (std::size_t i = h.pieces.size(); i > 0; --i) {
      const Node& n = nodes_[static_cast<std::size_t>(node)];
      h.scores[i - 1] = n.score;
      if (request_.options.alignments && n.map != nullptr) std::copy(n.map->begin(), n.map->end(), h.alignment.begin() + static_cast<std::ptrdiff_t>((i - 1) * width));
      node = n.parent;
    }
    if (end != nullptr) h.scores.push_back(*end);
    found.push_back(std::move(h));
  };
  for (const Found& f : found_) add(f.node, f.score, &f.end);
  if (!done_)
    for (const Live& live : live_) add(live.node, final_score(live.total, nodes_[static_cast<std::size_t>(live.node)].depth, request_.options.length_penalty), nullptr);
  std::sort(found.begin(), found.end(), [](const Hypothesis& a, const Hypothesis& b) { return a.score != b.score ? a.score > b.score : a.pieces < b.pieces; });
  if (found.size() > static_cast<std::size_t>(request_.options.n_best)) found.resize(static_cast<std::size_t>(request_.options.n_best));
  for (Hypothesis& h : found)
    if (!request_.options.scores) {
      h.score = std::numeric_limits<double>::quiet_NaN();
      h.scores.clear();
    }
  return found;
}

}  // namespace cvmk::engine
