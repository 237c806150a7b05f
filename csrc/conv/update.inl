// One step: lanes are channels.
#pragma once
#include "conv/rows.inl"

namespace cvmk::conv {
namespace {

int64_t update_scratch(const Update&, const Team&) { return 0; }

// The channels [c, c + count) of sequence b.
template <Dtype kState>
inline void update_channels(const Update& p, int64_t b, int64_t c, int count) {
  const int64_t front = p.width - 1, at = b * p.dim + c;
  char* const states = elements::at(p.state.data, kState, at * front);
  const F x = elements::load_n(p.x.data, p.x.dtype, at, count);
  F y = p.bias == nullptr ? F{} : simd::load_n(p.bias + c, count);
  for (int64_t k = 0; k < p.width; ++k) {
    float weight[kLanes] = {}, input[kLanes] = {};
    for (int i = 0; i < count; ++i) {
      weight[i] = p.weight[(c + i) * p.width + k];
      if (k < front) input[i] = elements::load_one<kState>(elements::at(states, kState, i * front + k));
    }
    y += simd::load(weight) * (k < front ? simd::load(input) : x);
  }
  constexpr int64_t size = size_of(kState);
  char taken[kLanes * 8];
  elements::store<kState>(taken, x);
  for (int i = 0; i < count && front > 0; ++i) {
    char* const row = states + i * front * size;
    for (int64_t k = 1; k < front; ++k) memcpy(row + (k - 1) * size, row + k * size, static_cast<size_t>(size));
    memcpy(row + (front - 1) * size, taken + i * size, static_cast<size_t>(size));
  }
  if (p.silu) y = activations::silu(y);
  elements::store_n(p.y.data, p.y.dtype, at, y, count);
}

void run_update(const Update& p, char*, const Team& team) {
  const int64_t blocks = pieces(p.dim, kLanes);
  const Dtype type = p.state.dtype;
  const auto update = type == kFloat32 ? update_channels<kFloat32> : type == kBFloat16 ? update_channels<kBFloat16> : update_channels<kFloat16>;
  team.share(threads_for(p.batch, p.batch * p.dim, team), p.batch * blocks, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t c = i % blocks * kLanes;
      update(p, i / blocks, c, static_cast<int>(least(kLanes, p.dim - c)));
    }
  });
}

}  // namespace
}  // namespace cvmk::conv
