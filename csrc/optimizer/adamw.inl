// AdamW in one pass: the gradient is read once, weight and moments once and written once.
#pragma once

#include "common/simd.h"
#include "optimizer/params.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace cvmk::optimizer {
namespace {

using simd::F;
using simd::kLanes;

constexpr int64_t kItem = int64_t{1} << 14;  // elements that a thread takes at one time

CVMK_INLINE F root_of(F x) {
#if defined(__AVX512F__)
  return simd::bits<F>(_mm512_sqrt_ps(simd::bits<__m512>(x)));
#elif defined(__AVX__)
  return simd::bits<F>(_mm256_sqrt_ps(simd::bits<__m256>(x)));
#elif defined(__SSE2__)
  return simd::bits<F>(_mm_sqrt_ps(simd::bits<__m128>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

struct Element {
  F weight, first, second;
};

CVMK_INLINE Element stepped(const AdamW& p, F weight, F first, F second, F gradient) {
  const F g = gradient * p.scale;
  const F m = p.beta1 * first + p.rest1 * g, v = p.beta2 * second + p.rest2 * g * g;
  return {p.keep * weight - p.rate * m / (root_of(v) * p.root + p.epsilon), m, v};
}

int64_t adamw_scratch(const AdamW&, const Team&) { return 0; }

void run_adamw(const AdamW& p, char*, const Team& team) {
  team.each(pieces(p.count, kItem), [&](int64_t item, int) {
    const int64_t end = least((item + 1) * kItem, p.count);
    int64_t i = item * kItem;
    for (; i + kLanes <= end; i += kLanes) {
      const Element x = stepped(p, simd::load(p.weight + i), simd::load(p.first + i), simd::load(p.second + i), simd::load(p.gradient + i));
      simd::store(p.weight + i, x.weight);
      simd::store(p.first + i, x.first);
      simd::store(p.second + i, x.second);
    }
    if (i == end) return;
    const int rest = static_cast<int>(end - i);
    const auto some = [&](const float* from) { return simd::load_n(from + i, rest); };
    const Element x = stepped(p, some(p.weight), some(p.first), some(p.second), some(p.gradient));
    simd::store_n(p.weight + i, x.weight, rest);
    simd::store_n(p.first + i, x.first, rest);
    simd::store_n(p.second + i, x.second, rest);
  });
}

}  // namespace
}  // namespace cvmk::optimizer
