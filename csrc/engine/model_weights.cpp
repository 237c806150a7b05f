// A model's weights by their names in a folder.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "engine/model.h"

namespace cvmk::engine {
namespace {

// Whether matrices are multiplied by rows that are quantised.
bool quantises_rows(const RawTensors& tensors, Compute compute, const std::set<std::string>& tokens) {
  const auto stored = [](const auto& named) { return named.second.dtype == kInt8; };
  return compute == Compute::kInt8 || compute == Compute::kInt4 || !tokens.empty() || std::any_of(tensors.begin(), tensors.end(), stored);
}

}  // namespace

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
  const auto mixer = [](const std::vector<Mixer>& mixers, std::int64_t i) { return mixers.empty() ? Mixer::kAttention : mixers[static_cast<std::size_t>(i) % mixers.size()]; };
  for (std::int64_t i = 0; i < config.encoder_layers; ++i) encoder_.push_back(block(weights, "encoder.blocks." + std::to_string(i), mixer(config.encoder_mixers, i), false));
  for (std::int64_t i = 0; i < config.decoder_layers; ++i) decoder_.push_back(block(weights, "decoder.blocks." + std::to_string(i), mixer(config.decoder_mixers, i), true));
  encoder_norm_ = norm(weights, "encoder.norm");
  decoder_norm_ = norm(weights, "decoder.norm");
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

Linear Model::linear(const Weights& weights, const std::string& name, std::int64_t outputs, std::int64_t inputs, bool with_bias, gemm::Activation activation) {
  const RawTensor* bias = with_bias ? &find(weights, name + ".bias", {outputs}) : nullptr;
  const std::string weight = name + ".weight";
  const Linear found = is_stored(weights, weight) ? Linear(stored(weights, weight, name, outputs, inputs), bias, activation)
                                                  : Linear(find(weights, weight, {outputs, inputs}), bias, weights.compute, activation);
  weight_bytes_ += found.bytes();
  return found;
}

Model::Norm Model::norm(const Weights& weights, const std::string& name) {
  Norm found{read_vector(find(weights, name + ".weight", {config_.d_model})), {}};
  if (!config_.rms) found.bias = read_vector(find(weights, name + ".bias", {config_.d_model}));
  return found;
}

std::unique_ptr<RecurrentMixer> Model::recurrent(const Weights& weights, const std::string& name, Mixer mixer, bool causal) {
  const auto layer = [&](const std::string& part, std::int64_t outputs, std::int64_t inputs, bool bias) { return linear(weights, name + part, outputs, inputs, bias); };
  const auto floats = [&](const std::string& part, const std::vector<std::int64_t>& shape) {
    const RawTensor& tensor = find(weights, name + part, shape);
    const std::int64_t columns = std::accumulate(shape.begin() + 1, shape.end(), std::int64_t{1}, std::multiplies<>());
    return read_vector({tensor.data, tensor.dtype, {shape[0] * columns}});
  };
  return make_mixer(mixer, {config_.d_model, config_.bias, causal, layer, floats});
}

Model::Block Model::block(const Weights& weights, const std::string& name, Mixer mixer, bool decoder) {
  const std::int64_t d = config_.d_model, kv = config_.kv_heads * head_size();
  const auto layer = [&](const std::string& part, std::int64_t outputs, std::int64_t inputs) { return linear(weights, name + part, outputs, inputs, config_.bias); };
  Block b;
  b.mixer_norm = norm(weights, name + ".mixer_norm");
  b.ffn_norm = norm(weights, name + ".ffn_norm");
  if (mixer == Mixer::kAttention) {
    b.qkv = layer(".mixer.qkv", d + 2 * kv, d);
    b.out = layer(".mixer.out", d, d);
  } else {
    b.recurrent = recurrent(weights, name + ".mixer.", mixer, decoder || config_.causal_encoder);
  }
  if (decoder) {
    b.cross_norm = norm(weights, name + ".cross_norm");
    b.cross_query = layer(".cross.query", d, d);
    b.cross_key_value = layer(".cross.key_value", 2 * kv, d);
    b.cross_out = layer(".cross.out", d, d);
  }
  b.inner = linear(weights, name + ".ffn.inner", config_.activation == gemm::kSwiglu ? 2 * config_.ffn : config_.ffn, d, config_.bias, config_.activation);
  b.outer = layer(".ffn.outer", d, config_.ffn);
  return b;
}

}  // namespace cvmk::engine
