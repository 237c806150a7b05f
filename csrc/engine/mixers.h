// Mixers whose state has a fixed size, between the norm before them and the residual sum behind.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/weights.h"
#include "recurrent/params.h"

namespace cvmk::engine {

enum class Mixer { kAttention, kSsru, kMamba };

// A mixer's weights by their names in it.
struct MixerWeights {
  std::int64_t d_model;
  bool bias;    // model.bias
  bool causal;  // else the second half of the mixer goes from the end to the beginning
  std::function<Linear(const std::string& name, std::int64_t outputs, std::int64_t inputs, bool bias)> linear;
  std::function<std::vector<float>(const std::string& name, const std::vector<std::int64_t>& shape)> floats;
};

// Rows of some sequences, sequence by sequence.
struct MixerRows {
  const float* x;  // [rows, d_model]
  float* out;      // [rows, d_model]
  std::int64_t rows;
  const std::vector<recurrent::Run>& runs;
};

class RecurrentMixer {
 public:
  virtual ~RecurrentMixer() = default;
  // Numbers of the state of one sequence; a new one is zeros.
  virtual std::int64_t state_size() const = 0;
  // Bytes that `run` works in.
  virtual std::int64_t memory(std::int64_t rows) const = 0;
  virtual void run(const MixerRows& rows, char* memory, const Team& team) const = 0;
};

// Raises BadModel where the width does not fit. `mixer` is not attention.
std::unique_ptr<RecurrentMixer> make_mixer(Mixer mixer, const MixerWeights& weights);

}  // namespace cvmk::engine
