// Caches in bytes: integers are widened to float32 as they are read, so that only keys and values are rounded and products and sums are float32's. Every row and
// head is a chain of its own, so its bits are the same whatever stands beside it.
#pragma once
#include "cached/weigh.inl"

namespace cvmk::cached {
namespace {

constexpr int kByteChains = 4;  // that do not wait for each other

typedef int8_t Bytes __attribute__((vector_size(kLanes)));

CVMK_INLINE F widen(const int8_t* p) {
  Bytes v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, I), F);
}

// What one row and head needs, and its memory.
struct ByteChain {
  const float* q;
  const int8_t *keys, *values;
  const float *key_scales, *value_scales;
  float *scores, *out, *map;
};

CVMK_INLINE int64_t byte_chain_bytes(int64_t longest) { return up(score_width(longest) * 4, 64); }
CVMK_INLINE int64_t byte_bytes(const Attention& p) { return kByteChains * byte_chain_bytes(p.longest); }

template <int kChains>
CVMK_INLINE void byte_scores(const Attention& p, const ByteChain* chains, int64_t length) {
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    int64_t at[kVectors];
    for (int v = 0; v < kVectors; ++v) at[v] = (j + v * kLanes) / kColumns * p.d * kColumns + (j + v * kLanes) % kColumns;
    F sum[kChains][kVectors] = {};
    for (int64_t i = 0; i < p.d; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const F one = simd::set(chains[c].q[i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[c][v] += one * widen(chains[c].keys + at[v] + i * kColumns);
      }
    for (int c = 0; c < kChains; ++c)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t k = j + v * kLanes;
        simd::store(chains[c].scores + k, sum[c][v] * simd::load(chains[c].key_scales + k));
      }
  };
  int64_t j = 0;
  for (; length - j > kLanes; j += 2 * kLanes) columns(j, Count<2>{});
  if (j < length) columns(j, Count<1>{});
}

template <int kChains>
CVMK_INLINE void byte_values(const Attention& p, const ByteChain* chains, int64_t length, const float* inverse) {
  const int64_t width = up(p.d, kColumns);
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    F sum[kChains][kVectors] = {};
    for (int64_t i = 0; i < length; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const F one = simd::set(chains[c].scores[i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[c][v] += one * widen(chains[c].values + i * width + j + v * kLanes);
      }
    for (int c = 0; c < kChains; ++c)
      for (int v = 0; v < kVectors; ++v)
        simd::store_n(chains[c].out + j + v * kLanes, sum[c][v] * inverse[c], static_cast<int>(most(0, least(kLanes, p.d - j - v * kLanes))));
  };
  int64_t j = 0;
  for (; width - j >= 2 * kLanes; j += 2 * kLanes) columns(j, Count<2>{});
  for (; j < width; j += kLanes) columns(j, Count<1>{});
}

template <int kChains>
inline void attend_byte_chains(const Attention& p, const ByteChain* chains, int64_t length) {
  float inverse[kChains];
  byte_scores<kChains>(p, chains, length);
  for (int c = 0; c < kChains; ++c) inverse[c] = weigh_row(chains[c].scores, length, p.scale);
  for (int c = 0; c < kChains; ++c) {
    float* scores = chains[c].scores;
    for (int64_t i = 0; chains[c].map != nullptr && i < length; ++i) chains[c].map[i] += scores[i] * inverse[c] / static_cast<float>(p.heads);
    for (int64_t i = 0; i < length; i += kLanes) simd::store(scores + i, simd::load(scores + i) * simd::load(chains[c].value_scales + i));
  }
  byte_values<kChains>(p, chains, length, inverse);
}

inline void attend_bytes(const Attention& p, const Item& item, char* memory) {
  if (item.length == 0) {
    for (int64_t r = 0; r < item.rows; ++r) memset(item.out + r * item.out_stride, 0, static_cast<size_t>(p.heads * p.d) * sizeof(float));
    return;
  }
  if (item.map != nullptr) memset(item.map, 0, static_cast<size_t>(item.rows * item.length) * sizeof(float));
  const int64_t group = p.heads / p.kv_heads, count = item.rows * p.heads, capacity = item.cache.capacity;
  for (int64_t first = 0; first < count; first += kByteChains) {
    ByteChain chains[kByteChains];
    const int64_t n = least(kByteChains, count - first);
    for (int64_t c = 0; c < n; ++c) {
      const int64_t head = (first + c) / item.rows, row = (first + c) % item.rows, kv = head / group;
      ByteChain& chain = chains[c];
      chain.q = item.q + row * item.q_stride + head * p.d;
      chain.keys = static_cast<const int8_t*>(item.cache.keys) + kv * up(p.d, 2) * capacity;
      chain.values = static_cast<const int8_t*>(item.cache.values) + kv * capacity * up(p.d, kColumns);
      chain.key_scales = item.cache.scales + kv * capacity;
      chain.value_scales = chain.key_scales + p.kv_heads * capacity;
      chain.scores = reinterpret_cast<float*>(memory + c * byte_chain_bytes(p.longest));
      chain.out = item.out + row * item.out_stride + head * p.d;
      chain.map = item.map == nullptr ? nullptr : item.map + row * item.length;
    }
    if (n == kByteChains) attend_byte_chains<kByteChains>(p, chains, item.length);
    else
      for (int64_t c = 0; c < n; ++c) attend_byte_chains<1>(p, chains + c, item.length);
  }
}

// d numbers times 127 over their largest magnitude, rounded, `step` bytes apart, and the scale that undoes it: `rounded_rows` of cvmk/ops/quantize.py. Where
// they are not finite the scale is NaN.
inline float round_bytes(const float* x, int64_t d, int8_t* to, int64_t step) {
  F largest{};
  int finite = 1;
  for (int64_t i = 0; i < d; i += kLanes) {
    const F v = simd::abs(simd::load_n(x + i, static_cast<int>(least(kLanes, d - i))));
    largest = simd::max(v, largest);
    const I good = v < __builtin_inff();
    for (int k = 0; k < kLanes; ++k) finite &= good[k] != 0;
  }
  const float found = simd::max_lanes(largest), a = found > 0x1p-100f ? found : 0x1p-100f, inverse = 127.0f / a;
  for (int64_t i = 0; i < d; i += kLanes) {
    const int left = static_cast<int>(least(kLanes, d - i));
    const F scaled = simd::load_n(x + i, left) * inverse, bounded = simd::round(simd::min(simd::max(scaled, simd::set(-127.0f)), simd::set(127.0f)));
    const I whole = finite ? __builtin_convertvector(bounded, I) : I{};
    for (int k = 0; k < left; ++k) to[(i + k) * step] = static_cast<int8_t>(whole[k]);
  }
  return finite ? a / 127.0f : __builtin_nanf("");
}

inline void append_bytes(const Append& p) {
  const int64_t width = up(p.d, kColumns), capacity = p.cache.capacity;
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const int64_t position = p.first + r, from = r * p.stride + h * p.d;
      int8_t* keys = static_cast<int8_t*>(p.cache.keys) + h * up(p.d, 2) * capacity + position / kColumns * p.d * kColumns + position % kColumns;
      int8_t* values = static_cast<int8_t*>(p.cache.values) + (h * capacity + position) * width;
      float* scales = p.cache.scales + h * capacity + position;
      scales[0] = round_bytes(p.keys + from, p.d, keys, kColumns);
      scales[p.kv_heads * capacity] = round_bytes(p.values + from, p.d, values, 1);
      memset(values + p.d, 0, static_cast<size_t>(width - p.d));
    }
}

}  // namespace
}  // namespace cvmk::cached
