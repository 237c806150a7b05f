// Lanes are channels; a vector of them walks through all runs, its state in registers or the first cache. Threads share the channels.
#pragma once
#include "common/activations.h"
#include "common/lanes.h"
#include "recurrent/params.h"
#include "scan/lanes.inl"

namespace cvmk::recurrent {
namespace {

constexpr int64_t kAlone = 1 << 14;  // numbers of rows times channels below which other threads are not worth waking

CVMK_INLINE F load(const float* p, All) { return simd::load(p); }
CVMK_INLINE F load(const float* p, First lanes) { return simd::load_n(p, lanes.count); }
CVMK_INLINE void store(float* p, F v, All) { simd::store(p, v); }
CVMK_INLINE void store(float* p, F v, First lanes) { simd::store_n(p, v, lanes.count); }

static_assert(kBlock % kLanes == 0, "a vector of channels stands in one block");

// Where number 0 of the channels from c on stands, in blocks of `pitch` numbers; the next one is kBlock further on.
CVMK_INLINE int64_t place(int64_t c, int64_t pitch) { return c / kBlock * pitch * kBlock + c % kBlock; }
template <int count>
CVMK_INLINE void read(const float* blocks, int64_t c, F* to) {
  for (int n = 0; n < count; ++n) to[n] = simd::load(blocks + place(c, count) + n * kBlock);
}

// The state of the channels from c on, `count` numbers each: before a run, and behind it.
template <int count>
CVMK_INLINE void begin(const Pass& p, const Run& run, int64_t c, F* state) {
  for (int n = 0; n < count; ++n) state[n] = run.from == nullptr ? F{} : simd::load(run.from + place(c, p.pitch) + (p.state + n) * kBlock);
}
template <int count>
CVMK_INLINE void end(const Pass& p, const Run& run, int64_t c, const F* state) {
  for (int n = 0; run.to != nullptr && n < count; ++n) simd::store(run.to + place(c, p.pitch) + (p.state + n) * kBlock, state[n]);
}

// body(c, lanes) for the vectors of channels, as work of `cost` numbers a row and channel.
template <typename Body>
CVMK_INLINE void each_block(const Pass& p, int64_t cost, const Team& team, const Body& body) {
  const int64_t width = p.rows * p.channels * cost < kAlone ? 1 : team.size;
  team.share(width, pieces(p.channels, kLanes), [&](int64_t first, int64_t last, int) {
    const unsigned mode = scan::flush_subnormals();
    const int64_t start = first * kLanes;
    each_vector(least(p.channels, last * kLanes) - start, [&](int64_t i, auto lanes) { body(start + i, lanes); });
    scan::restore_subnormals(mode);
  });
}

// body(row) for the rows of a run in the order of the pass.
template <typename Body>
CVMK_INLINE void each_row(const Pass& p, const Run& run, const Body& body) {
  if (p.reverse) {
    for (int64_t row = run.first + run.rows - 1; row >= run.first; --row) body(row);
  } else {
    for (int64_t row = run.first; row < run.first + run.rows; ++row) body(row);
  }
}

template <typename Params>
int64_t no_scratch(const Params&, const Team&) {
  return 0;
}

}  // namespace
}  // namespace cvmk::recurrent
