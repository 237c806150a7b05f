#include "engine/mixers.h"

#include <cmath>

#include "common/kernel.h"
#include "common/scratch.h"

namespace cvmk::engine {
namespace {

using recurrent::Pass;
using recurrent::kBlock;
using recurrent::kStates;
using recurrent::kTaps;

// As cvmk/nn/mixers/ssru.py.
class Ssru : public RecurrentMixer {
 public:
  explicit Ssru(const MixerWeights& w) : width_(w.d_model), causal_(w.causal), gate_(w.linear("gate", width_, width_, true)), value_(w.linear("value", width_, width_, false)) {}

  std::int64_t state_size() const override { return up(width_, kBlock); }
  std::int64_t memory(std::int64_t rows) const override {
    Arena count;
    Buffers(count, rows * width_);
    return count.used;
  }

  void run(const MixerRows& r, char* memory, const Team& team) const override {
    Arena arena{memory};
    const Buffers b(arena, r.rows * width_);
    gate_(r.x, r.rows, b.gates, team);
    value_(r.x, r.rows, b.values, team);
    const std::int64_t half = causal_ ? width_ : width_ / 2;
    for (std::int64_t c = 0; c < width_; c += half) {
      const Pass pass{r.runs.data(), static_cast<std::int64_t>(r.runs.size()), r.rows, half, 0, 1, c > 0};
      cvmk::run(recurrent::kernels().ssru, recurrent::Ssru{pass, {b.gates + c, width_}, {b.values + c, width_}, r.out + c, width_}, team);
    }
  }

 private:
  struct Buffers {
    float *gates, *values;
    Buffers(Arena& arena, std::int64_t count) : gates(arena.take<float>(count)), values(arena.take<float>(count)) {}
  };

  std::int64_t width_;
  bool causal_;
  Linear gate_, value_;
};

// [channels, numbers] in blocks of channels (recurrent/params.h).
std::vector<float> blocks(const std::vector<float>& matrix, std::int64_t numbers) {
  const std::int64_t channels = static_cast<std::int64_t>(matrix.size()) / numbers;
  std::vector<float> found(static_cast<std::size_t>(up(channels, kBlock) * numbers));
  for (std::int64_t c = 0; c < channels; ++c)
    for (std::int64_t n = 0; n < numbers; ++n) found[static_cast<std::size_t>((c / kBlock * numbers + n) * kBlock + c % kBlock)] = matrix[static_cast<std::size_t>(c * numbers + n)];
  return found;
}

// As cvmk/nn/mixers/mamba.py: a direction, `width` wide, has 2 width channels.
class SelectiveSpace {
 public:
  SelectiveSpace(const MixerWeights& w, const std::string& name, std::int64_t width)
      : channels_(2 * width), rank_(pieces(w.d_model, 16)), in_(w.linear(name + ".in_proj", 2 * channels_, w.d_model, w.bias)),
        scan_(w.linear(name + ".scan_proj", rank_ + 2 * kStates, channels_, false)), step_(w.linear(name + ".step_proj", channels_, rank_, true)),
        taps_(blocks(w.floats(name + ".conv.weight", {channels_, kTaps}), kTaps)), bias_(w.floats(name + ".conv.bias", {channels_})),
        A_(w.floats(name + ".A_log", {channels_, kStates})), D_(w.floats(name + ".D", {channels_})) {
    for (float& a : A_) a = -std::exp(a);
    A_ = blocks(A_, kStates);
  }

  std::int64_t channels() const { return channels_; }
  std::int64_t state_size() const { return kPitch * up(channels_, kBlock); }

  struct Buffers {
    float *uz, *u, *selected, *delta;
    Buffers(Arena& arena, const SelectiveSpace& s, std::int64_t rows)
        : uz(arena.take<float>(rows * 2 * s.channels_)), u(arena.take<float>(rows * s.channels_)), selected(arena.take<float>(rows * s.scan_.outputs())),
          delta(arena.take<float>(rows * s.channels_)) {}
  };

  // out: rows `stride` numbers apart.
  void run(const MixerRows& r, bool reverse, const Buffers& b, float* out, std::int64_t stride, const Team& team) const {
    Pass pass{r.runs.data(), static_cast<std::int64_t>(r.runs.size()), r.rows, channels_, 0, kPitch, reverse};
    in_(r.x, r.rows, b.uz, team);
    cvmk::run(recurrent::kernels().conv, recurrent::Conv{pass, {b.uz, 2 * channels_}, taps_.data(), bias_.data(), b.u, channels_}, team);
    scan_(b.u, r.rows, b.selected, team);
    step_(b.selected, r.rows, b.delta, team, scan_.outputs());
    pass.state = kTaps - 1;
    const float* B = b.selected + rank_;
    const recurrent::Scan scan{pass, {b.u, channels_}, {b.delta, channels_}, {b.uz + channels_, 2 * channels_}, {B, scan_.outputs()}, {B + kStates, scan_.outputs()},
                               A_.data(), D_.data(), out, stride};
    cvmk::run(recurrent::kernels().scan, scan, team);
  }

 private:
  static constexpr std::int64_t kPitch = kTaps - 1 + kStates;
  std::int64_t channels_, rank_;
  Linear in_, scan_, step_;
  std::vector<float> taps_, bias_, A_, D_;
};

class Mamba : public RecurrentMixer {
 public:
  explicit Mamba(const MixerWeights& w) {
    directions_.emplace_back(w, "forwards", w.causal ? w.d_model : w.d_model / 2);
    if (!w.causal) directions_.emplace_back(w, "backwards", w.d_model / 2);
    out_ = w.linear("out", w.d_model, channels(), w.bias);
  }

  std::int64_t state_size() const override { return directions_[0].state_size(); }
  std::int64_t memory(std::int64_t rows) const override {
    Arena count;
    plan(count, rows);
    return count.used;
  }

  void run(const MixerRows& r, char* memory, const Team& team) const override {
    Arena arena{memory};
    const auto [mixed, buffers] = plan(arena, r.rows);
    float* out = mixed;
    for (std::size_t i = 0; i < directions_.size(); out += directions_[i++].channels()) directions_[i].run(r, i > 0, buffers, out, channels(), team);
    out_(mixed, r.rows, r.out, team);
  }

 private:
  // Of both directions: the inputs of `out`.
  std::int64_t channels() const { return directions_[0].channels() * static_cast<std::int64_t>(directions_.size()); }
  std::pair<float*, SelectiveSpace::Buffers> plan(Arena& arena, std::int64_t rows) const {
    float* mixed = arena.take<float>(rows * channels());
    return {mixed, SelectiveSpace::Buffers(arena, directions_[0], rows)};
  }

  std::vector<SelectiveSpace> directions_;
  Linear out_;
};

}  // namespace

std::unique_ptr<RecurrentMixer> make_mixer(Mixer mixer, const MixerWeights& weights) {
  if (!weights.causal && weights.d_model % 2 != 0) throw BadModel("has model.d_model " + std::to_string(weights.d_model) + " in config.json, and two directions need an even one: restore it");
  if (mixer == Mixer::kMamba) return std::make_unique<Mamba>(weights);
  return std::make_unique<Ssru>(weights);
}

}  // namespace cvmk::engine
