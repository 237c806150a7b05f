// Models of random weights for the engine's tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/model.h"
#include "tests/random.h"

namespace cvmk::testing {

using namespace cvmk::engine;

struct Weights {
  std::vector<std::unique_ptr<std::vector<float>>> memory;
  RawTensors tensors;
  Random random;

  void add(const std::string& name, std::vector<std::int64_t> shape, float scale, float shift = 0.0f) {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    memory.push_back(std::make_unique<std::vector<float>>(static_cast<std::size_t>(count)));
    for (float& x : *memory.back()) x = shift + scale * random.real();
    tensors[name] = {memory.back()->data(), kFloat32, std::move(shape)};
  }
  void layer(const std::string& name, std::int64_t outputs, std::int64_t inputs, bool bias) {
    add(name + ".weight", {outputs, inputs}, 4.0f / std::sqrt(static_cast<float>(inputs)));
    if (bias) add(name + ".bias", {outputs}, 0.5f);
  }
  void norm(const std::string& name, const Config& c) {
    add(name + ".weight", {c.d_model}, 0.5f, 1.0f);
    if (!c.rms) add(name + ".bias", {c.d_model}, 0.5f);
  }

  // Of one direction of a mixer of Mamba, or of the whole.
  void space(const std::string& name, const Config& c, std::int64_t channels) {
    const std::int64_t rank = (c.d_model + 15) / 16;
    layer(name + ".in_proj", 2 * channels, c.d_model, c.bias);
    add(name + ".conv.weight", {channels, recurrent::kTaps}, 2.0f);
    add(name + ".conv.bias", {channels}, 0.5f);
    add(name + ".scan_proj.weight", {rank + 2 * recurrent::kStates, channels}, 0.5f);
    layer(name + ".step_proj", channels, rank, true);
    add(name + ".A_log", {channels, recurrent::kStates}, 3.0f);
    add(name + ".D", {channels}, 1.0f);
  }
  void mixer(const std::string& name, const Config& c, Mixer mixer, bool causal) {
    const std::int64_t d = c.d_model;
    if (mixer == Mixer::kSsru) {
      layer(name + ".gate", d, d, true);
      layer(name + ".value", d, d, false);
    } else if (mixer == Mixer::kMamba) {
      space(name + ".forwards", c, causal ? 2 * d : d);
      if (!causal) space(name + ".backwards", c, d);
      layer(name + ".out", d, 2 * d, c.bias);
    } else {
      layer(name + ".qkv", d + 2 * c.kv_heads * (d / c.heads), d, c.bias);
      layer(name + ".out", d, d, c.bias);
    }
  }

  explicit Weights(const Config& c) {
    const std::int64_t kv = c.kv_heads * (c.d_model / c.heads), inner = c.activation == gemm::kSwiglu ? 2 * c.ffn : c.ffn;
    add("embeddings.source", {c.vocabulary, c.d_model}, 2.0f);
    if (!c.tied) {
      add("embeddings.target", {c.vocabulary, c.d_model}, 2.0f);
      add("embeddings.output", {c.vocabulary, c.d_model}, 2.0f);
    }
    for (const bool decoder : {false, true}) {
      const std::string side = decoder ? "decoder" : "encoder";
      for (std::int64_t i = 0; i < (decoder ? c.decoder_layers : c.encoder_layers); ++i) {
        const std::string name = side + ".blocks." + std::to_string(i);
        for (const char* part : {".mixer_norm", ".ffn_norm"}) norm(name + part, c);
        const std::vector<Mixer>& mixers = decoder ? c.decoder_mixers : c.encoder_mixers;
        mixer(name + ".mixer", c, mixers.empty() ? Mixer::kAttention : mixers[static_cast<std::size_t>(i) % mixers.size()], decoder || c.causal_encoder);
        layer(name + ".ffn.inner", inner, c.d_model, c.bias);
        layer(name + ".ffn.outer", c.d_model, c.ffn, c.bias);
        if (!decoder) continue;
        norm(name + ".cross_norm", c);
        layer(name + ".cross.query", c.d_model, c.d_model, c.bias);
        layer(name + ".cross.key_value", 2 * kv, c.d_model, c.bias);
        layer(name + ".cross.out", c.d_model, c.d_model, c.bias);
      }
      norm(side + ".norm", c);
    }
  }
};

inline Config config_of(bool other) {
  Config c{};
  c.d_model = 32;
  c.ffn = other ? 40 : 64;
  c.heads = 4;
  c.kv_heads = other ? 2 : 4;
  c.encoder_layers = c.decoder_layers = 2;
  c.max_length = 48;
  c.vocabulary = 301;
  c.rms = c.causal_encoder = other;
  c.bias = c.tied = !other;
  c.norm_epsilon = 1e-5f;
  c.rotary_base = 1e4;
  c.positions = other ? Positions::kRotary : Positions::kSinusoidal;
  c.activation = other ? gemm::kSwiglu : gemm::kRelu;
  return c;
}

// The same with recurrent mixers: hybrids of all of them, causal or in two directions.
inline Config recurrent_config_of(bool other) {
  Config c = config_of(other);
  c.encoder_layers = c.decoder_layers = 3;
  c.byte_caches = other;
  c.encoder_mixers = other ? std::vector{Mixer::kMamba, Mixer::kSsru, Mixer::kAttention} : std::vector{Mixer::kSsru, Mixer::kMamba};
  c.decoder_mixers = other ? std::vector{Mixer::kSsru} : std::vector{Mixer::kMamba, Mixer::kAttention, Mixer::kSsru};
  return c;
}

}  // namespace cvmk::testing
