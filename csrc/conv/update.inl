// One step: lanes are channels.
#pragma once
#include "conv/rows.inl"

namespace cvmk::conv {
namespace {

int64_t update_scratch(const Update&, const Team&) { return 0; }

// The channels [c, c + count) of sequence b.
inline void update_channels(const Update& p, int64_t b, int64_t c, int count) {
  const int64_t front = p.width - 1, at = b * p.dim + c;
  const F x = elements::load_n(p.x.data, p.x.dtype, at, count);
  F y = p.bias == nullptr ? F{} : simd::load_n(p.bias + c, count);
  for (int64_t k = 0; k < p.width; ++k) {
    float weight[kLanes] = {}, input[kLanes] = {};
    for (int i = 0; i < count; ++i) {
      weight[i] = p.weight[(c + i) * p.width + k];
      if (k < front) input[i] = elements::load_one(p.state.data, p.state.dtype, (at + i) * front + k);
    }
    y += simd::load(weight) * (k < front ? simd::load(input) : x);
  }
  const int64_t size = size_of(p.state.dtype);
  float taken[kLanes];
  simd::store(taken, x);
  for (int i = 0; i < count && front > 0; ++i) {
    char* const row = elements::at(p.state.data, p.state.dtype, (at + i) * front);
    memmove(row, row + size, static_cast<size_t>((front - 1) * size));
    elements::store_n(p.state.data, p.state.dtype, (at + i) * front + front - 1, simd::set(taken[i]), 1);
  }
  if (p.silu) y = activations::silu(y);
  elements::store_n(p.y.data, p.y.dtype, at, y, count);
}

void run_update(const Update& p, char*, const Team& team) {
  const int64_t blocks = pieces(p.dim, kLanes);
  team.share(threads_for(p.batch, p.batch * p.dim, team), p.batch * blocks, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t c = i % blocks * kLanes;
      update_channels(p, i / blocks, c, static_cast<int>(least(kLanes, p.dim - c)));
    }
  });
}

}  // namespace
}  // namespace cvmk::conv
