#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/scratch.h"
#include "norm/params.h"

namespace cvmk::engine {
namespace {

constexpr std::int32_t kLastNever = 2;  // padding, unknown, beginning: never said (cvmk/text/tokenizers/base.py)
constexpr std::int64_t kLogits = 1 << 15;  // numbers of a piece of logits: what a first-level cache and a half hold
constexpr std::int64_t kSummed = 8 * Linear::kRange;  // ids whose exponentials are summed at once, however many rows there are: the sum's bits depend on it

}  // namespace

char* Workspace::get(std::int64_t bytes) {
  if (static_cast<std::size_t>(bytes) > block_.bytes) {
    give_block(block_);
    block_ = Block{};
    block_ = take_block(static_cast<std::size_t>(bytes + bytes / 4));
  }
  return static_cast<char*>(block_.data);
}

// -- weights ------------------------------------------------------------------------------------------------------------------------
const RawTensor& Model::find(const Weights& weights, const std::string& name, const std::vector<std::int64_t>& shape, Dtype dtype) {
  found_.insert(name);
  const auto found = weights.tensors.find(name);
  if (found == weights.tensors.end()) throw BadModel("lacks the tensor " + name + ": it does not belong to config.json; restore both");
  const auto text = [](const std::vector<std::int64_t>& sizes) {
    std::string s = "[";
    for (std::size_t i = 0; i < sizes.size(); ++i) s += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
    return s + "]";
  };
  if (found->second.shape != shape) throw BadModel("has " + name + " of shape " + text(found->second.shape) + " where config.json asks for " + text(shape) + ": restore both");
  const Dtype own = found->second.dtype;
  const bool floating = own == kFloat32 || own == kBFloat16 || own == kFloat16 || own == kFloat64;
  if (dtype == kNoDtype ? !floating : own != dtype)
    throw BadModel("has " + name + " in " + name_of(own) + " where config.json asks for " + (dtype == kNoDtype ? "a floating type" : name_of(dtype)) + ": restore both");
  if (floating) check_finite(name, found->second);
  return found->second;
}

StoredWeight Model::stored(const Weights& weights, const std::string& name, const std::string& smooth, std::int64_t outputs, std::int64_t inputs) {
  const auto has = [&](const std::string& other) { return weights.tensors.count(other) != 0; };
  const bool eight = weights.tensors.at(name + ".values").dtype == kInt8;
  StoredWeight w{};
  w.tokens = weights.tokens.count(name) != 0;
  w.values = find(weights, name + ".values", {outputs, eight ? inputs : inputs / 2}, eight ? kInt8 : kUint8);
  if (has(smooth)) w.smooth = find(weights, smooth, {inputs}, kFloat32);
  if (eight) {
    w.scales = find(weights, name + ".scales", {outputs}, kFloat32);
    check_values(w, name);
    return w;
  }
  const auto scales = weights.tensors.find(name + ".scales");
  const std::int64_t groups = scales != weights.tensors.end() && scales->second.shape.size() == 2 ? scales->second.shape[1] : 1;
  w.scales = find(weights, name + ".scales", {outputs, groups}, kFloat32);
  if (has(name + ".zeros")) w.zeros = find(weights, name + ".zeros", {outputs, groups}, kUint8);
  if (has(name + ".order")) w.order = find(weights, name + ".order", {inputs}, kInt32);
  if (groups < 1 || inputs % groups != 0 || inputs / groups % 32 != 0 || (w.tokens && (w.zeros.data != nullptr || w.order.data != nullptr)))
    throw BadModel("has 4-bit values in " + name + " whose groups or zeros the native engine does not have: restore it or save the model again");
  check_values(w, name);
  return w;
}

Model::Table Model::table(const Weights& weights, const std::string& name) {
  const std::int64_t d = config_.d_model;
  if (is_stored(weights, name)) return {{}, stored(weights, name, "", config_.vocabulary, d)};
  return {find(weights, name, {config_.vocabulary, d}), {}};
}

Model::Model(const Config& config, const RawTensors& tensors, Compute compute, const std::set<std::string>& tokens) : config_(config) {
  const Weights weights{tensors, compute, tokens};
  const std::int64_t d = config.d_model;
  source_table_ = table(weights, "embeddings.source");
  target_table_ = config.tied ? source_table_ : table(weights, "embeddings.target");
  const Table output = config.tied ? source_table_ : table(weights, "embeddings.output");
  output_ = output.floats.data != nullptr ? Linear(output.floats, nullptr, compute, gemm::kNone) : Linear(output.stored, nullptr, gemm::kNone);
  weight_bytes_ += output_.bytes();
  for (std::int64_t i = 0; i < config.encoder_layers; ++i) encoder_.push_back(block(weights, "encoder.blocks." + std::to_string(i), false));
  for (std::int64_t i = 0; i < config.decoder_layers; ++i) decoder_.push_back(block(weights, "decoder.blocks." + std::to_string(i), true));
  const auto norm = [&](const std::string& name) {
    Norm found{read_vector(find(weights, name + ".weight", {d})), {}};
    if (!config.rms) found.bias = read_vector(find(weights, name + ".bias", {d}));
    return found;
  };
  encoder_norm_ = norm("encoder.norm");
  decoder_norm_ = norm("decoder.norm");
  for (const auto& [name, tensor] : tensors)
    if (found_.count(name) == 0) throw BadModel("has the unknown tensor " + name + ": it does not belong to config.json; restore both");
  found_.clear();
  const std::int64_t width = config.positions == Positions::kRotary ? head_size() / 2 : d, length = config.max_length;
  if (config.positions == Positions::kSinusoidal) {
    table_.resize(static_cast<std::size_t>(length * d));
    for (std::int64_t p = 0; p < length; ++p)
      for (std::int64_t i = 0; i < d; ++i) {
        const double angle = static_cast<double>(p) * std::exp(static_cast<double>(i / 2 * 2) * (-std::log(10000.0) / static_cast<double>(d)));
        table_[static_cast<std::size_t>(p * d + i)] = static_cast<float>(i % 2 == 0 ? std::sin(angle) : std::cos(angle));
      }
  } else if (config.positions == Positions::kRotary) {
    table_.resize(static_cast<std::size_t>(2 * length * width));
    for (std::int64_t p = 0; p < length; ++p)
      for (std::int64_t i = 0; i < width; ++i) {
        const double frequency = std::exp(static_cast<double>(2 * i) * (-std::log(config.rotary_base) / static_cast<double>(head_size())));
        table_[static_cast<std::size_t>(p * width + i)] = static_cast<float>(std::cos(static_cast<double>(p) * frequency));
        table_[static_cast<std::size_t>((length + p) * width + i)] = static_cast<float>(std::sin(static_cast<double>(p) * frequency));
      }
  }
}

Linear Model::linear(const Weights& weights, const std::string& name, std::int64_t outputs, std::int64_t inputs, gemm::Activation activation) {
  const RawTensor* bias = config_.bias ? &find(weights, name + ".bias", {outputs}) : nullptr;
  const std::string weight = name + ".weight";
  const Linear found = is_stored(weights, weight) ? Linear(stored(weights, weight, name + ".smooth_scale", outputs, inputs), bias, activation)
                                                  : Linear(find(weights, weight, {outputs, inputs}), bias, weights.compute, activation);
  weight_bytes_ += found.bytes();
  return found;
}

Model::Block Model::block(const Weights& weights, const std::string& name, bool decoder) {
  const std::int64_t d = config_.d_model, kv = config_.kv_heads * head_size();
  const auto norm = [&](const std::string& part) {
    Norm found{read_vector(find(weights, name + part + ".weight", {d})), {}};
    if (!config_.rms) found.bias = read_vector(find(weights, name + part + ".bias", {d}));
    return found;
  };
  const auto layer = [&](const std::string& part, std::int64_t outputs, std::int64_t inputs, gemm::Activation activation = gemm::kNone) {
    return linear(weights, name + part, outputs, inputs, activation);
  };
  Block b;
  b.mixer_norm = norm(".mixer_norm");
  b.ffn_norm = norm(".ffn_norm");
  b.qkv = layer(".mixer.qkv", d + 2 * kv, d);
  b.out = layer(".mixer.out", d, d);
  if (decoder) {
    b.cross_norm = norm(".cross_norm");
    b.cross_query = layer(".cross.query", d, d);
    b.cross_key_value = layer(".cross.key_value", 2 * kv, d);
    b.cross_out = layer(".cross.out", d, d);
  }
  b.inner = layer(".ffn.inner", config_.activation == gemm::kSwiglu ? 2 * config_.ffn : config_.ffn, d, config_.activation);
  b.outer = layer(".ffn.outer", d, config_.ffn);
  return b;
}

// -- caches -------------------------------------------------------------------------------------------------------------------------
// Not a multiple of many cache lines: rows of turned keys would fall on each other in the first cache.
std::int64_t Model::capacity_of(std::int64_t length) {
  const std::int64_t capacity = up(std::max<std::int64_t>(length, 1), cached::kColumns);
  return capacity % 128 == 0 ? capacity + cached::kColumns : capacity;
}

Caches Model::caches(float* memory, std::int64_t capacity, std::int64_t layers) const {
  Caches found;
  for (std::int64_t i = 0; i < layers; ++i) {
    found.layers.push_back({memory, memory + cached::keys_size(config_.kv_heads, head_size(), capacity), capacity});
    memory += layer_size(capacity);
  }
  return found;
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

void Model::attend(const std::vector<cached::Item>& items, std::int64_t longest, const Team& team) const {
  const cached::Attention p{items.data(), static_cast<std::int64_t>(items.size()), config_.heads, config_.kv_heads, head_size(), longest,
                            static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_size())))};
  cvmk::run(cached::kernels().attention, p, team);
}

// What a stack of layers works in: rows of the residual stream, its norm, a branch, and the widest thing between.
struct Model::Buffers {
  std::int64_t rows;
  float *x, *normed, *branch, *wide;

  Buffers(Arena& arena, const Config& c, std::int64_t count) : rows(count) {
    const std::int64_t qkv = c.d_model + 2 * c.kv_heads * (c.d_model / c.heads);
    x = arena.take<float>(rows * c.d_model);
    normed = arena.take<float>(rows * c.d_model);
    branch = arena.take<float>(rows * c.d_model);
    wide = arena.take<float>(rows * std::max(std::max(qkv, 2 * qkv - 2 * c.d_model), c.ffn));
  }
};

void Model::feed_forward(const Block& block, Buffers& b, const Norm& following, const Team& team) const {
  block.inner(b.normed, b.rows, b.wide, team);
  block.outer(b.wide, b.rows, b.branch, team);
  residual(b.x, b.branch, following, b.rows, b.normed, team);
}

// -- encoder ------------------------------------------------------------------------------------------------------------------------
void Model::encode(const std::vector<Source>& sources, Workspace& workspace, const Team& team) const {
  const std::int64_t d = config_.d_model, kv = config_.kv_heads * head_size(), width = d + 2 * kv;
  std::int64_t rows = 0, longest = 0, keys = 0;
  for (const Source& s : sources) {
    rows += s.length - s.first;
    longest = std::max(longest, s.length);
    if (s.encoder == nullptr) keys += layer_size(capacity_of(s.length));
  }
  if (rows == 0) return;
  Arena count;
  Buffers(count, config_, rows);
  count.take<float>(keys);
  Arena arena{workspace.get(count.used)};
  Buffers b(arena, config_, rows);
  float* memory = arena.take<float>(keys);
  std::vector<cached::Cache> own;
  for (const Source& s : sources) {
    const std::int64_t capacity = capacity_of(s.length);
    own.push_back({memory, memory + cached::keys_size(config_.kv_heads, head_size(), capacity), capacity});
    if (s.encoder == nullptr) memory += layer_size(capacity);
  }
  float* x = b.x;
  for (const Source& s : sources)
    for (std::int64_t i = s.first; i < s.length; ++i, x += d) embed(source_table_, s.ids[i], i, x);
  residual(b.x, nullptr, encoder_.empty() ? encoder_norm_ : encoder_[0].mixer_norm, rows, b.normed, team);
  std::vector<cached::Item> items;
  for (std::size_t layer = 0; layer < encoder_.size(); ++layer) {
    const Block& block = encoder_[layer];
    block.qkv(b.normed, rows, b.wide, team);
    items.clear();
    std::int64_t first = 0;
    for (std::size_t i = 0; i < sources.size(); ++i) {
      const std::int64_t start = sources[i].first, length = sources[i].length - start;
      const cached::Cache& cache = sources[i].encoder == nullptr ? own[i] : sources[i].encoder->layers[layer];
      float* qkv = b.wide + first * width;
      for (std::int64_t t = 0; config_.positions == Positions::kRotary && t < length; ++t) rotate(qkv + t * width, config_.heads + config_.kv_heads, start + t);
      cached::kernels().append.run({qkv + d, qkv + d + kv, width, length, start, config_.kv_heads, head_size(), cache}, nullptr, team);
      if (config_.causal_encoder)
        for (std::int64_t t = 0; t < length; ++t) items.push_back({qkv + t * width, b.normed + (first + t) * d, 1, width, d, cache, start + t + 1, nullptr});
      else
        items.push_back({qkv, b.normed + first * d, length, width, d, cache, length, nullptr});
      first += length;
    }
    attend(items, longest, team);
    block.out(b.normed, rows, b.branch, team);
    residual(b.x, b.branch, block.ffn_norm, rows, b.normed, team);
    feed_forward(block, b, layer + 1 < encoder_.size() ? encoder_[layer + 1].mixer_norm : encoder_norm_, team);
  }
  for (std::size_t layer = 0; layer < decoder_.size(); ++layer) {
    decoder_[layer].cross_key_value(b.normed, rows, b.wide, team);
    std::int64_t first = 0;
    for (const Source& s : sources) {
      const float* from = b.wide + first * 2 * kv;
      cached::kernels().append.run({from, from + kv, 2 * kv, s.length - s.first, s.first, config_.kv_heads, head_size(), s.caches->layers[layer]}, nullptr, team);
      first += s.length - s.first;
    }
  }
}

// -- decoder ------------------------------------------------------------------------------------------------------------------------
void Model::step(const std::vector<StepRow>& rows, std::vector<StepResult>& results, Workspace& workspace, const Team& team) const {
  const std::int64_t d = config_.d_model, kv = config_.kv_heads * head_size(), width = d + 2 * kv, count = static_cast<std::int64_t>(rows.size());
  results.resize(rows.size());
  if (count == 0) return;
  const std::int64_t columns = std::min(up(config_.vocabulary, Linear::kRange), std::max(kSummed, kLogits / count / kSummed * kSummed));
  Arena needed;
  Buffers(needed, config_, count);
  needed.take<float>(count * columns);
  Arena arena{workspace.get(needed.used)};
  Buffers b(arena, config_, count);
  float* logits = arena.take<float>(count * columns);
  std::int64_t longest = 0, longest_source = 0;
  for (std::int64_t r = 0; r < count; ++r) {
    const StepRow& row = rows[static_cast<std::size_t>(r)];
    embed(target_table_, row.token, row.position, b.x + r * d);
    longest = std::max(longest, row.position + 1);
    longest_source = std::max(longest_source, row.source_length);
  }
  residual(b.x, nullptr, decoder_.empty() ? decoder_norm_ : decoder_[0].mixer_norm, count, b.normed, team);
  std::vector<cached::Item> items;
  items.reserve(rows.size());
  for (std::size_t layer = 0; layer < decoder_.size(); ++layer) {
    const Block& block = decoder_[layer];
    const bool last = layer + 1 == decoder_.size();
    block.qkv(b.normed, count, b.wide, team);
    items.clear();
    for (std::int64_t r = 0; r < count; ++r) {
      const StepRow& row = rows[static_cast<std::size_t>(r)];
      float* qkv = b.wide + r * width;
      if (config_.positions == Positions::kRotary) rotate(qkv, config_.heads + config_.kv_heads, row.position);
      const cached::Cache& cache = row.own->layers[layer];
      cached::kernels().append.run({qkv + d, qkv + d + kv, width, 1, row.position, config_.kv_heads, head_size(), cache}, nullptr, team);
      items.push_back({qkv, b.normed + r * d, 1, width, d, cache, row.position + 1, nullptr});
    }
    attend(items, longest, team);
    block.out(b.normed, count, b.branch, team);
    residual(b.x, b.branch, block.cross_norm, count, b.normed, team);
    block.cross_query(b.normed, count, b.wide, team);
    items.clear();
    for (std::int64_t r = 0; r < count; ++r) {
      const StepRow& row = rows[static_cast<std::size_t>(r)];
      // Neighbours of one sentence read its keys together.
      if (!items.empty() && row.map == nullptr && items.back().map == nullptr && items.back().cache.keys == row.source->layers[layer].keys) ++items.back().rows;
      else items.push_back({b.wide + r * d, b.normed + r * d, 1, d, d, row.source->layers[layer], row.source_length, last ? row.map : nullptr});
    }
    attend(items, longest_source, team);
    block.cross_out(b.normed, count, b.branch, team);
    residual(b.x, b.branch, block.ffn_norm, count, b.normed, team);
    feed_forward(block, b, last ? decoder_norm_ : decoder_[layer + 1].mixer_norm, team);
  }
  project(rows, b.normed, results, logits, columns, team);
}

// Neighbours that have the same shortlist, or none, together.
void Model::project(const std::vector<StepRow>& rows, const float* features, std::vector<StepResult>& results, float* logits, std::int64_t width, const Team& team) const {
  const std::int64_t count = static_cast<std::int64_t>(rows.size());
  for (std::int64_t first = 0, end = 0; first < count; first = end) {
    const Shortlist* list = rows[static_cast<std::size_t>(first)].shortlist;
    while (end < count && rows[static_cast<std::size_t>(end)].shortlist == list) ++end;
    const float* own = features + first * config_.d_model;
    if (list == nullptr) project_all(rows.data() + first, end - first, own, results.data() + first, logits, width, team);
    else project_listed(rows.data() + first, end - first, own, results.data() + first, team);
  }
}

namespace {

// Room for what a row asks for.
vocabulary::Row state_of(const StepRow& row, StepResult& result) {
  result.wanted = row.wanted >= 0 ? -__builtin_inff() : 0.0f;
  result.values.resize(static_cast<std::size_t>(row.k));
  result.ids.resize(static_cast<std::size_t>(row.k));
  return {-__builtin_inff(), 0.0, row.k, 0, result.values.data(), result.ids.data()};
}

void finish(const vocabulary::Row& state, StepResult& result) {
  const double shift = std::isfinite(state.maximum) ? static_cast<double>(state.maximum) : 0.0;
  result.normaliser = shift + std::log(state.sum);
  result.values.resize(static_cast<std::size_t>(state.count));
  result.ids.resize(static_cast<std::size_t>(state.count));
}

float penalised(float logit, float penalty) { return logit > 0.0f ? logit / penalty : logit * penalty; }

}  // namespace

// Logits, `width` columns at a time, into what is asked of each row.
void Model::project_all(const StepRow* rows, std::int64_t count, const float* features, StepResult* results, float* logits, std::int64_t width, const Team& team) const {
  std::vector<vocabulary::Row> states;
  std::vector<std::int64_t> said(static_cast<std::size_t>(count), 0), offsets(1, 0);
  std::vector<std::int32_t> forbidden;
  for (std::int64_t r = 0; r < count; ++r) {
    forbidden.insert(forbidden.end(), rows[r].forbidden, rows[r].forbidden + rows[r].forbidden_count);
    offsets.push_back(static_cast<std::int64_t>(forbidden.size()));
    states.push_back(state_of(rows[r], results[r]));
  }
  for (std::int64_t first = 0; first < config_.vocabulary; first += width) {
    const std::int64_t n = std::min(width, config_.vocabulary - first);
    output_.range(features, count, first, n, logits, team);
    for (std::int64_t r = 0; r < count; ++r) {
      const StepRow& row = rows[r];
      float* own = logits + r * n;
      for (std::int64_t id = first; id <= std::min<std::int64_t>(kLastNever, first + n - 1); ++id) own[id - first] = -__builtin_inff();
      for (std::int64_t& s = said[static_cast<std::size_t>(r)]; s < row.said_count && row.said[s] < first + n; ++s) {
        float& logit = own[row.said[s] - first];
        logit = penalised(logit, row.penalty);
      }
      if (row.logits != nullptr) std::memcpy(row.logits + first, own, static_cast<std::size_t>(n) * sizeof(float));
      if (row.wanted >= first && row.wanted < first + n) results[r].wanted = own[row.wanted - first];
    }
    for (std::int64_t at = 0; at < n; at += kSummed) {
      const vocabulary::Piece piece{logits + at, count, std::min(kSummed, n - at), n, first + at, states.data(), forbidden.empty() ? nullptr : forbidden.data(), offsets.data()};
      vocabulary::kernels().top_k.run(piece, nullptr, team);
    }
  }
  for (std::int64_t r = 0; r < count; ++r) finish(states[static_cast<std::size_t>(r)], results[r]);
}

// The same over a shortlist, whose places stand for the ids until the end.
void Model::project_listed(const StepRow* rows, std::int64_t count, const float* features, StepResult* results, const Team& team) const {
  const Shortlist& list = *rows[0].shortlist;
  const std::int64_t n = static_cast<std::int64_t>(list.ids.size());
  const auto place = [&](std::int32_t id) {
    const auto found = std::lower_bound(list.ids.begin(), list.ids.end(), id);
    return found != list.ids.end() && *found == id ? found - list.ids.begin() : std::ptrdiff_t{-1};
  };
  const Scratch scratch(count * n * 4);
  float* logits = reinterpret_cast<float*>(scratch.data());
  std::vector<vocabulary::Row> states;
  std::vector<std::int64_t> offsets(1, 0);
  std::vector<std::int32_t> forbidden;
  list.output.range(features, count, 0, n, logits, team);
  for (std::int64_t r = 0; r < count; ++r) {
    const StepRow& row = rows[r];
    float* own = logits + r * n;
    for (std::int64_t s = 0; s < row.said_count; ++s)
      if (const std::ptrdiff_t at = place(row.said[s]); at >= 0) own[at] = penalised(own[at], row.penalty);
    for (std::int64_t f = 0; f < row.forbidden_count; ++f)
      if (const std::ptrdiff_t at = place(row.forbidden[f]); at >= 0) forbidden.push_back(static_cast<std::int32_t>(at));
    offsets.push_back(static_cast<std::int64_t>(forbidden.size()));
    states.push_back(state_of(row, results[r]));
    if (const std::ptrdiff_t at = place(row.wanted); at >= 0) results[r].wanted = own[at];
    if (row.logits != nullptr) {
      std::fill_n(row.logits, config_.vocabulary, -__builtin_inff());
      for (std::int64_t i = 0; i < n; ++i) row.logits[list.ids[static_cast<std::size_t>(i)]] = own[i];
    }
  }
  for (std::int64_t at = 0; at < n; at += kSummed) {
    const vocabulary::Piece piece{logits + at, count, std::min(kSummed, n - at), n, at, states.data(), forbidden.empty() ? nullptr : forbidden.data(), offsets.data()};
    vocabulary::kernels().top_k.run(piece, nullptr, team);
  }
  for (std::int64_t r = 0; r < count; ++r) {
    finish(states[static_cast<std::size_t>(r)], results[r]);
    for (std::int32_t& id : results[r].ids) id = list.ids[static_cast<std::size_t>(id)];
  }
}

}  // namespace cvmk::engine
