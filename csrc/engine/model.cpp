#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/scratch.h"
#include "norm/params.h"

namespace cvmk::engine {

char* Workspace::get(std::int64_t bytes) {
  if (static_cast<std::size_t>(bytes) > block_.bytes) {
    give_block(block_);
    block_ = Block{};
    block_ = take_block(static_cast<std::size_t>(bytes + bytes / 4));
  }
  return static_cast<char*>(block_.data);
}

// -- caches -------------------------------------------------------------------------------------------------------------------------
bool Model::has_states(const Stack& stack) {
  return std::any_of(stack.begin(), stack.end(), [](const Block& block) { return block.recurrent != nullptr; });
}

std::int64_t Model::bytes(const Stack& stack, std::int64_t capacity, std::int64_t states, Dtype dtype) const {
  std::int64_t found = 0;
  for (const Block& block : stack) found += block.recurrent == nullptr ? layer_bytes(capacity, dtype) : states * state_bytes(block);
  return found;
}

Caches Model::cross_caches(char* memory, std::int64_t capacity) const {
  Caches found;
  for (std::int64_t i = 0; i < config_.decoder_layers; ++i, memory += layer_bytes(capacity, cache_dtype())) found.layers.push_back(cache(memory, capacity, cache_dtype()));
  return found;
}

Caches Model::caches(const Stack& stack, char* memory, std::int64_t capacity, std::int64_t states, Dtype dtype) const {
  Caches found;
  const bool some = has_states(stack);
  for (const Block& block : stack) {
    const bool attends = block.recurrent == nullptr;
    found.layers.push_back(attends ? cache(memory, capacity, dtype) : cached::Cache{});
    if (some) found.states.push_back(attends ? nullptr : reinterpret_cast<float*>(memory));
    memory += attends ? layer_bytes(capacity, dtype) : states * state_bytes(block);
  }
  return found;
}

void Model::copy(const Caches& from, const Caches& to, std::int64_t first, std::int64_t last) const {
  for (std::size_t layer = 0; layer < decoder_.size(); ++layer) {
    const RecurrentMixer* const recurrent = decoder_[layer].recurrent.get();
    if (recurrent != nullptr) std::memcpy(to.states[layer], from.states[layer], static_cast<std::size_t>(recurrent->state_size()) * sizeof(float));
    else cached::kernels().copy.run({from.layers[layer], to.layers[layer], first, last, config_.kv_heads, head_size(), cache_dtype()}, nullptr, Team{});
  }
}

// -- parts of a layer ---------------------------------------------------------------------------------------------------------------
void Model::embed(const Table& table, std::int32_t id, std::int64_t position, float* x) const {
  const std::int64_t d = config_.d_model;
  const float scale = static_cast<float>(std::sqrt(static_cast<double>(d)));
  if (table.floats.data != nullptr) read_row(table.floats, id, x);
  else read_row(table.stored, id, x);
  const float* added = config_.positions == Positions::kSinusoidal ? table_.data() + position * d : nullptr;
  for (std::int64_t i = 0; i < d; ++i) x[i] = x[i] * scale + (added == nullptr ? 0.0f : added[i]);
}

void Model::residual(float* x, const float* branch, const Norm& norm, std::int64_t rows, float* out, const Team& team) const {
  const norm::Residual p{x, branch, out, norm.weight.data(), norm.bias.empty() ? nullptr : norm.bias.data(), rows, config_.d_model, config_.norm_epsilon, config_.rms};
  norm::kernels().residual.run(p, nullptr, team);
}

// Heads side by side: the pairs (x_i, x_{i + D/2}) of each turned by the angle of their position (Su et al. 2021).
void Model::rotate(float* x, std::int64_t heads, std::int64_t position) const {
  const std::int64_t half = head_size() / 2;
  const float *cosines = table_.data() + position * half, *sines = cosines + config_.max_length * half;
  for (std::int64_t h = 0; h < heads; ++h, x += 2 * half)
    for (std::int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      x[i] = a * cosines[i] - b * sines[i];
      x[half + i] = b * cosines[i] + a * sines[i];
    }
}

void Model::attend(const std::vector<cached::Item>& items, std::int64_t longest, Dtype dtype, const Team& team) const {
  cached::Attention p{items.data(), static_cast<std::int64_t>(items.size()), config_.heads, config_.kv_heads, head_size(), longest,
                            static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_size()))), dtype};
  const cached::Kernels& kernels = cached::kernels_for(p);
  cvmk::run(kernels.attention, p, team);
}

// What a stack of layers works in: rows of the residual stream, its norm, a branch, and the widest thing between; a recurrent mixer's memory.
struct Model::Buffers {
  std::int64_t rows;
  float *x, *normed, *branch, *wide;
  char* own;
  std::vector<cached::Item> items;  // of an attention, and
  std::vector<recurrent::Run> runs;  // of a recurrence: one layer's after the other's

  Buffers(Arena& arena, const Config& c, const Stack& stack, std::int64_t count) : rows(count) {
    const std::int64_t qkv = c.d_model + 2 * c.kv_heads * (c.d_model / c.heads);
    x = arena.take<float>(rows * c.d_model);
    normed = arena.take<float>(rows * c.d_model);
    branch = arena.take<float>(rows * c.d_model);
    wide = arena.take<float>(rows * std::max(std::max(qkv, 2 * qkv - 2 * c.d_model), c.ffn));
    std::int64_t most = 0;
    for (const Block& block : stack)
      if (block.recurrent != nullptr) most = std::max(most, block.recurrent->memory(rows));
    own = arena.take<char>(most);
  }
};

// Keys and values to their caches; the kernel is looked up once.
struct Model::Append {
  cached::Append call;
  const cached::Kernels& kernels;

  Append(const Model& m, Dtype dtype) : call{nullptr, nullptr, 0, 0, 0, m.config_.kv_heads, m.head_size(), {}, dtype}, kernels(cached::kernels_for(call)) {}
  void operator()(const float* keys, const float* values, std::int64_t stride, std::int64_t rows, std::int64_t first, const cached::Cache& cache) const {
    cached::Append p = call;
    p.keys = keys;
    p.values = values;
    p.stride = stride;
    p.rows = rows;
    p.first = first;
    p.cache = cache;
    kernels.append.run(p, nullptr, Team{});
  }
};

void Model::feed_forward(const Block& block, Buffers& b, const Norm& following, const Team& team) const {
  block.inner(b.normed, b.rows, b.wide, team);
  block.outer(b.wide, b.rows, b.branch, team);
  residual(b.x, b.branch, following, b.rows, b.normed, team);
}

// A recurrent mixer: rows from state to state, those of a sequence in rising positions.
void Model::mix(const Block& block, std::size_t layer, const std::vector<Piece>& pieces, const std::vector<const Caches*>& kept, Buffers& b, const Team& team) const {
  b.runs.clear();
  for (const Piece& piece : pieces) {
    const auto state = [&](std::int64_t number) { return number < 0 ? nullptr : kept[piece.sequence]->states[layer] + number * (state_bytes(block) / 4); };
    b.runs.push_back({piece.first, piece.rows, state(piece.from), state(piece.to)});
  }
  block.recurrent->run({b.normed, b.branch, b.rows, b.runs}, b.own, team);
}

// -- encoder ------------------------------------------------------------------------------------------------------------------------
void Model::attend_sources(const Block& block, std::size_t layer, const std::vector<Source>& sources, const std::vector<cached::Cache>& own, std::int64_t longest, const Append& append, Buffers& b, const Team& team) const {
  const std::int64_t d = config_.d_model, kv = config_.kv_heads * head_size(), width = d + 2 * kv;
  std::vector<cached::Item>& items = b.items;
  items.clear();
  block.qkv(b.normed, b.rows, b.wide, team);
  std::int64_t first = 0;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const std::int64_t start = sources[i].first, length = sources[i].length - start;
    const cached::Cache& cache = sources[i].encoder == nullptr ? own[i] : sources[i].encoder->layers[layer];
    float* qkv = b.wide + first * width;
    for (std::int64_t t = 0; config_.positions == Positions::kRotary && t < length; ++t) rotate(qkv + t * width, config_.heads + config_.kv_heads, start + t);
    if (length == 0) continue;  // all of it is there
    append(qkv + d, qkv + d + kv, width, length, start, cache);
    if (config_.causal_encoder)
      for (std::int64_t t = 0; t < length; ++t) items.push_back({qkv + t * width, b.normed + (first + t) * d, 1, width, d, cache, start + t + 1, nullptr});
    else
      items.push_back({qkv, b.normed + first * d, length, width, d, cache, length, nullptr});
    first += length;
  }
  attend(items, longest, encoder_dtype_, team);
  block.out(b.normed, b.rows, b.branch, team);
}

namespace {

// The states of a source that grows, as model.h tells: number 0 stands before its last position, number n behind n spans.
std::int64_t state_at(std::int64_t position, std::int64_t length) { return position % Model::kSpan == 0 ? position / Model::kSpan : position == length - 1 ? 0 : -1; }

}  // namespace

std::vector<Model::Piece> Model::pieces_of(const std::vector<Source>& sources) {
  std::vector<Piece> found;
  std::int64_t row = 0;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const Source& s = sources[i];
    for (std::int64_t at = s.first, next = 0; at < s.length; at = next) {
      next = s.length;
      if (s.encoder != nullptr) next = std::min(next, at < s.length - 1 ? std::min((at / kSpan + 1) * kSpan, s.length - 1) : next);
      const std::int64_t from = at == 0 ? -1 : at % kSpan == 0 ? at / kSpan : 0;
      found.push_back({i, row, next - at, from, s.encoder == nullptr ? -1 : state_at(next, s.length)});
      row += next - at;
    }
  }
  return found;
}

void Model::encode(const std::vector<Source>& sources, Workspace& workspace, const Team& team) const {
  const std::int64_t d = config_.d_model, kv = config_.kv_heads * head_size();
  const bool attends = std::any_of(encoder_.begin(), encoder_.end(), [](const Block& block) { return block.recurrent == nullptr; });
  std::int64_t rows = 0, longest = 0, keys = 0;
  for (const Source& s : sources) {
    rows += s.length - s.first;
    longest = std::max(longest, s.length);
    if (s.encoder == nullptr && attends) keys += layer_bytes(capacity_of(s.length), encoder_dtype_);
  }
  if (rows == 0) return;
  Arena count;
  Buffers(count, config_, encoder_, rows);
  count.take<char>(keys);
  Arena arena{workspace.get(count.used)};
  Buffers b(arena, config_, encoder_, rows);
  char* memory = arena.take<char>(keys);
  std::vector<cached::Cache> own;
  for (const Source& s : sources) {
    const std::int64_t capacity = capacity_of(s.length);
    own.push_back(cache(memory, capacity, encoder_dtype_));
    if (s.encoder == nullptr && attends) memory += layer_bytes(capacity, encoder_dtype_);
  }
  std::vector<const Caches*> kept;
  for (const Source& s : sources) kept.push_back(s.encoder);
  const std::vector<Piece> pieces = encoder_has_states() ? pieces_of(sources) : std::vector<Piece>{};
  float* x = b.x;
  for (const Source& s : sources)
    for (std::int64_t i = s.first; i < s.length; ++i, x += d) embed(source_table_, s.ids[i], i, x);
  residual(b.x, nullptr, encoder_.empty() ? encoder_norm_ : encoder_[0].mixer_norm, rows, b.normed, team);
  const Append append(*this, encoder_dtype_), append_cross(*this, cache_dtype());
  for (std::size_t layer = 0; layer < encoder_.size(); ++layer) {
    const Block& block = encoder_[layer];
    if (block.recurrent != nullptr) mix(block, layer, pieces, kept, b, team);
    else attend_sources(block, layer, sources, own, longest, append, b, team);
    residual(b.x, b.branch, block.ffn_norm, rows, b.normed, team);
    feed_forward(block, b, layer + 1 < encoder_.size() ? encoder_[layer + 1].mixer_norm : encoder_norm_, team);
  }
  for (std::size_t layer = 0; layer < decoder_.size(); ++layer) {
    decoder_[layer].cross_key_value(b.normed, rows, b.wide, team);
    std::int64_t first = 0;
    for (const Source& s : sources) {
      const float* from = b.wide + first * 2 * kv;
      append_cross(from, from + kv, 2 * kv, s.length - s.first, s.first, s.caches->layers[layer]);
      first += s.length - s.first;
    }
  }
}

// -- decoder ------------------------------------------------------------------------------------------------------------------------
void Model::attend_own(const Block& block, std::size_t layer, const std::vector<StepRow>& rows, std::int64_t longest, const Append& append, Buffers& b, const Team& team) const {
  const std::int64_t d = config_.d_model, kv = config_.kv_heads * head_size(), width = d + 2 * kv;
  std::vector<cached::Item>& items = b.items;
  items.clear();
  block.qkv(b.normed, b.rows, b.wide, team);
  for (std::int64_t r = 0; r < b.rows; ++r) {
    const StepRow& row = rows[static_cast<std::size_t>(r)];
    float* qkv = b.wide + r * width;
    if (config_.positions == Positions::kRotary) rotate(qkv, config_.heads + config_.kv_heads, row.position);
    const cached::Cache& cache = row.own->layers[layer];
    append(qkv + d, qkv + d + kv, width, 1, row.position, cache);
    items.push_back({qkv, b.normed + r * d, 1, width, d, cache, row.position + 1, nullptr});
  }
  attend(items, longest, cache_dtype(), team);
  block.out(b.normed, b.rows, b.branch, team);
}

void Model::attend_cross(const Block& block, std::size_t layer, const std::vector<StepRow>& rows, std::int64_t longest, Buffers& b, const Team& team) const {
  const std::int64_t d = config_.d_model;
  const bool last = layer + 1 == decoder_.size();
  std::vector<cached::Item>& items = b.items;
  items.clear();
  block.cross_query(b.normed, b.rows, b.wide, team);
  for (std::int64_t r = 0; r < b.rows; ++r) {
    const StepRow& row = rows[static_cast<std::size_t>(r)];
    // Neighbours of one sentence read its keys together.
    if (!items.empty() && row.map == nullptr && items.back().map == nullptr && items.back().cache.keys == row.source->layers[layer].keys) ++items.back().rows;
    else items.push_back({b.wide + r * d, b.normed + r * d, 1, d, d, row.source->layers[layer], row.source_length, last ? row.map : nullptr});
  }
  attend(items, longest, cache_dtype(), team);
  block.cross_out(b.normed, b.rows, b.branch, team);
}

void Model::step(const std::vector<StepRow>& rows, std::vector<StepResult>& results, Workspace& workspace, const Team& team) const {
  const std::int64_t d = config_.d_model, count = static_cast<std::int64_t>(rows.size());
  results.resize(rows.size());
  if (count == 0) return;
  Arena needed;
  Buffers(needed, config_, decoder_, count);
  Arena arena{workspace.get(needed.used)};
  Buffers b(arena, config_, decoder_, count);
  std::int64_t longest = 0, longest_source = 0;
  for (std::int64_t r = 0; r < count; ++r) {
    const StepRow& row = rows[static_cast<std::size_t>(r)];
    embed(target_table_, row.token, row.position, b.x + r * d);
    longest = std::max(longest, row.position + 1);
    longest_source = std::max(longest_source, row.source_length);
  }
  std::vector<Piece> pieces;
  std::vector<const Caches*> kept;
  for (std::int64_t r = 0; has_states(decoder_) && r < count; ++r) {
    const StepRow& row = rows[static_cast<std::size_t>(r)];
    if (!kept.empty() && kept.back() == row.own) {
      ++pieces.back().rows;
      continue;
    }
    pieces.push_back({kept.size(), r, 1, row.position == 0 ? -1 : 0, 0});
    kept.push_back(row.own);
  }
  residual(b.x, nullptr, decoder_.empty() ? decoder_norm_ : decoder_[0].mixer_norm, count, b.normed, team);
  const Append append(*this, cache_dtype());
  b.items.reserve(rows.size());
  for (std::size_t layer = 0; layer < decoder_.size(); ++layer) {
    const Block& block = decoder_[layer];
    if (block.recurrent != nullptr) mix(block, layer, pieces, kept, b, team);
    else attend_own(block, layer, rows, longest, append, b, team);
    residual(b.x, b.branch, block.cross_norm, count, b.normed, team);
    attend_cross(block, layer, rows, longest_source, b, team);
    residual(b.x, b.branch, block.ffn_norm, count, b.normed, team);
    feed_forward(block, b, layer + 1 == decoder_.size() ? decoder_norm_ : decoder_[layer + 1].mixer_norm, team);
  }
  project(rows, b.normed, results, team);
}

}  // namespace cvmk::engine
