#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/scratch.h"
#include "norm/params.h"

namespace cvmk::engine {
namespace {

// Whether matrices are multiplied by rows that are quantised.
bool quantises_rows(const RawTensors& tensors, Compute compute, const std::set<std::string>& tokens) {
  const auto stored = [](const auto& named) { return named.second.dtype == kInt8; };
  return compute == Compute::kInt8 || compute == Compute::kInt4 || !tokens.empty() || std::any_of(tensors.begin(), tensors.end(), stored);
}

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

StoredWeight Model::stored(const Weights& weights, const std::string& name, const std::string& layer, std::int64_t outputs, std::int64_t inputs) {
  const auto has = [&](const std::string& other) { return weights.tensors.count(other) != 0; };
  const bool eight = weights.tensors.at(name + ".values").dtype == kInt8;
  StoredWeight w{};
  w.tokens = weights.tokens.count(name) != 0;
  w.values = find(weights, name + ".values", {outputs, eight ? inputs : inputs / 2}, eight ? kInt8 : kUint8);
  if (has(layer + ".smooth_scale")) w.smooth = find(weights, layer + ".smooth_scale", {inputs}, kFloat32);
  if (has(layer + ".input_range")) w.range = find(weights, layer + ".input_range", {1}, kFloat32);
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
  if (is_stored(weights, name)) return {{}, stored(weights, name, name, config_.vocabulary, d)};
  return {find(weights, name, {config_.vocabulary, d}), {}};
}

Model::Model(const Config& config, const RawTensors& tensors, Compute compute, const std::set<std::string>& tokens)
    : config_(config), encoder_dtype_(quantises_rows(tensors, compute, tokens) ? kBFloat16 : kFloat32) {
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
  const Linear found = is_stored(weights, weight) ? Linear(stored(weights, weight, name, outputs, inputs), bias, activation)
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
Caches Model::caches(char* memory, std::int64_t capacity, std::int64_t layers, Dtype dtype) const {
  Caches found;
  for (std::int64_t i = 0; i < layers; ++i, memory += layer_bytes(capacity, dtype)) found.layers.push_back(cache(memory, capacity, dtype));
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

void Model::attend(const std::vector<cached::Item>& items, std::int64_t longest, Dtype dtype, const Team& team) const {
  cached::Attention p{items.data(), static_cast<std::int64_t>(items.size()), config_.heads, config_.kv_heads, head_size(), longest,
                            static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_size()))), dtype};
  const cached::Kernels& kernels = cached::kernels_for(p);
  cvmk::run(kernels.attention, p, team);
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

// -- encoder ------------------------------------------------------------------------------------------------------------------------
void Model::encode(const std::vector<Source>& sources, Workspace& workspace, const Team& team) const {
  const std::int64_t d = config_.d_model, kv = config_.kv_heads * head_size(), width = d + 2 * kv;
  std::int64_t rows = 0, longest = 0, keys = 0;
  for (const Source& s : sources) {
    rows += s.length - s.first;
    longest = std::max(longest, s.length);
    if (s.encoder == nullptr) keys += layer_bytes(capacity_of(s.length), encoder_dtype_);
  }
  if (rows == 0) return;
  Arena count;
  Buffers(count, config_, rows);
  count.take<char>(keys);
  Arena arena{workspace.get(count.used)};
  Buffers b(arena, config_, rows);
  char* memory = arena.take<char>(keys);
  std::vector<cached::Cache> own;
  for (const Source& s : sources) {
    const std::int64_t capacity = capacity_of(s.length);
    own.push_back(cache(memory, capacity, encoder_dtype_));
    if (s.encoder == nullptr) memory += layer_bytes(capacity, encoder_dtype_);
  }
  float* x = b.x;
  for (const Source& s : sources)
    for (std::int64_t i = s.first; i < s.length; ++i, x += d) embed(source_table_, s.ids[i], i, x);
  residual(b.x, nullptr, encoder_.empty() ? encoder_norm_ : encoder_[0].mixer_norm, rows, b.normed, team);
  const Append append(*this, encoder_dtype_), append_cross(*this, cache_dtype());
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
      append(qkv + d, qkv + d + kv, width, length, start, cache);
      if (config_.causal_encoder)
        for (std::int64_t t = 0; t < length; ++t) items.push_back({qkv + t * width, b.normed + (first + t) * d, 1, width, d, cache, start + t + 1, nullptr});
      else
        items.push_back({qkv, b.normed + first * d, length, width, d, cache, length, nullptr});
      first += length;
    }
    attend(items, longest, encoder_dtype_, team);
    block.out(b.normed, rows, b.branch, team);
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
void Model::step(const std::vector<StepRow>& rows, std::vector<StepResult>& results, Workspace& workspace, const Team& team) const {
  const std::int64_t d = config_.d_model, kv = config_.kv_heads * head_size(), width = d + 2 * kv, count = static_cast<std::int64_t>(rows.size());
  results.resize(rows.size());
  if (count == 0) return;
  Arena needed;
  Buffers(needed, config_, count);
  Arena arena{workspace.get(needed.used)};
  Buffers b(arena, config_, count);
  std::int64_t longest = 0, longest_source = 0;
  for (std::int64_t r = 0; r < count; ++r) {
    const StepRow& row = rows[static_cast<std::size_t>(r)];
    embed(target_table_, row.token, row.position, b.x + r * d);
    longest = std::max(longest, row.position + 1);
    longest_source = std::max(longest_source, row.source_length);
  }
  residual(b.x, nullptr, decoder_.empty() ? decoder_norm_ : decoder_[0].mixer_norm, count, b.normed, team);
  const Append append(*this, cache_dtype());
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
      append(qkv + d, qkv + d + kv, width, 1, row.position, cache);
      items.push_back({qkv, b.normed + r * d, 1, width, d, cache, row.position + 1, nullptr});
    }
    attend(items, longest, cache_dtype(), team);
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
    attend(items, longest_source, cache_dtype(), team);
    block.cross_out(b.normed, count, b.branch, team);
    residual(b.x, b.branch, block.ffn_norm, count, b.normed, team);
    feed_forward(block, b, last ? decoder_norm_ : decoder_[layer + 1].mixer_norm, team);
  }
  project(rows, b.normed, results, team);
}

}  // namespace cvmk::engine
