// Caches in bytes. Queries and weights are 15-bit integers in two bytes, high and low, so that hardly anything but keys and values is rounded: both bytes are
// multiplied with the cache's exactly in int32, and the sums put together in float32. Every row and head is a chain of its own, so its bits are the same
// whatever stands beside it.
#pragma once
#include "cached/weigh.inl"
#include "common/quads.h"

namespace cvmk::cached {
namespace {

using quads::dot4;

constexpr int kByteChains = 4;          // that do not wait for each other
constexpr float kSteps = 127.0f * 128;  // of the largest magnitude: 128 times a high byte of at most 127
constexpr int32_t kOffsets = -0x7F7F7F80;  // 128 in each byte

typedef int8_t B __attribute__((vector_size(kLanes)));

// What one row and head needs, and its memory: words of four bytes each of the query and the weights, the high ones and then the low ones.
struct ByteChain {
  const int8_t *keys, *values;
  const float *key_scales, *value_scales;
  int32_t *q, *weights;
  float *scores, *out, *map, q_scale, weight_scale;
  int64_t q_sum[2];  // 128 times the sums of the query's bytes
};

CVMK_INLINE int64_t byte_chain_bytes(int64_t longest, int64_t d) { return up(score_width(longest) * 6 + up(d, kColumns) * 2, 64); }
CVMK_INLINE int64_t byte_bytes(const Attention& p) { return kByteChains * byte_chain_bytes(p.longest, p.d); }

// The largest magnitude of n numbers; NaN where one is not finite.
inline float largest_of(const float* x, int64_t n) {
  F largest{};
  I good = ~I{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const F v = simd::abs(simd::load_n(x + i, static_cast<int>(least(kLanes, n - i))));
    largest = simd::max(v, largest);
    good &= v < __builtin_inff();
  }
  for (int i = 0; i < kLanes; ++i)
    if (!good[i]) return __builtin_nanf("");
  return simd::max_lanes(largest);
}

CVMK_INLINE void store_bytes(int8_t* to, I v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(simd::bits<__m512i>(v)));
#else
  const B b = __builtin_convertvector(v, B);
  memcpy(to, &b, sizeof b);
#endif
}

// n numbers as `high` * 128 + `low` times the scale that is returned, zeros up to a multiple of kColumns: low bytes of -64 to 64, or, of numbers that are not
// negative, 0 to 127. The scale is NaN, and the bytes 0, where the numbers are not finite.
template <bool kNegative>
inline float split_bytes(const float* x, int64_t n, int32_t* words) {
  int8_t *high = reinterpret_cast<int8_t*>(words), *low = high + up(n, kColumns);
  const float largest = largest_of(x, n);
  if (!(largest >= 0x1p-100f)) {
    memset(high, 0, static_cast<size_t>(2 * up(n, kColumns)));
    return largest < 1.0f ? 0.0f : largest;
  }
  const float step = kSteps / largest;
  const F end = simd::set(kSteps);
  for (int64_t i = 0; i < up(n, kColumns); i += kLanes) {
    const F v = simd::load_n(x + i, static_cast<int>(most(0, least(kLanes, n - i)))) * step, whole = simd::round(simd::min(simd::max(v, -end), end));
    const F upper = kNegative ? simd::round(whole * (1.0f / 128)) : __builtin_convertvector(__builtin_convertvector(whole * (1.0f / 128), I), F);
    store_bytes(high + i, __builtin_convertvector(upper, I));
    store_bytes(low + i, __builtin_convertvector(whole - upper * 128.0f, I));
  }
  return largest / kSteps;
}

CVMK_INLINE I load_quads(const int8_t* p) {
  I v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <bool kVnni, int kChains>
CVMK_INLINE void byte_scores(const Attention& p, const ByteChain* chains, int64_t length) {
  const int64_t deep = pieces(p.d, 4), low = up(p.d, kColumns) / 4;
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    int64_t at[kVectors];
    for (int v = 0; v < kVectors; ++v) at[v] = ((j + v * kLanes) / kColumns * deep * kColumns + (j + v * kLanes) % kColumns) * 4;
    I sum[kChains][kVectors][2] = {};
    for (int64_t i = 0; i < deep; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const I q[2] = {simd::seti(chains[c].q[i]), simd::seti(chains[c].q[low + i])};
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const I keys = load_quads(chains[c].keys + at[v] + i * kColumns * 4);  // plus 128
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) sum[c][v][half] = dot4<kVnni>(sum[c][v][half], kVnni ? keys : keys ^ kOffsets, q[half]);
        }
      }
    for (int c = 0; c < kChains; ++c)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t k = j + v * kLanes;
        F parts[2];
        for (int half = 0; half < 2; ++half) parts[half] = __builtin_convertvector(kVnni ? sum[c][v][half] - static_cast<int32_t>(chains[c].q_sum[half]) : sum[c][v][half], F);
        simd::store(chains[c].scores + k, (parts[0] * 128.0f + parts[1]) * (simd::load(chains[c].key_scales + k) * chains[c].q_scale));
      }
  };
  int64_t j = 0;
  for (; length - j > kLanes; j += 2 * kLanes) columns(j, Count<2>{});
  if (j < length) columns(j, Count<1>{});
}

template <bool kVnni, int kChains>
CVMK_INLINE void byte_values(const Attention& p, const ByteChain* chains, int64_t length) {
  const int64_t width = up(p.d, kColumns), groups = pieces(length, 4), low = up(length, kColumns) / 4;
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    I sum[kChains][kVectors][2] = {};
    for (int64_t i = 0; i < groups; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const I weights[2] = {simd::seti(chains[c].weights[i]), simd::seti(chains[c].weights[low + i])};
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const I values = load_quads(chains[c].values + (i * width + j + v * kLanes) * 4);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) sum[c][v][half] = dot4<kVnni>(sum[c][v][half], weights[half], values);
        }
      }
    for (int c = 0; c < kChains; ++c)
      for (int v = 0; v < kVectors; ++v) {
        const F found = __builtin_convertvector(sum[c][v][0], F) * 128.0f + __builtin_convertvector(sum[c][v][1], F);
        simd::store_n(chains[c].out + j + v * kLanes, found * chains[c].weight_scale, static_cast<int>(most(0, least(kLanes, p.d - j - v * kLanes))));
      }
  };
  int64_t j = 0;
  for (; width - j >= 2 * kLanes; j += 2 * kLanes) columns(j, Count<2>{});
  for (; j < width; j += kLanes) columns(j, Count<1>{});
}

template <bool kVnni, int kChains>
inline void attend_byte_chains(const Attention& p, ByteChain* chains, int64_t length) {
  byte_scores<kVnni, kChains>(p, chains, length);
  for (int c = 0; c < kChains; ++c) {
    ByteChain& chain = chains[c];
    const float inverse = weigh_row(chain.scores, length, p.scale);
    for (int64_t i = 0; chain.map != nullptr && i < length; ++i) chain.map[i] += chain.scores[i] * inverse / static_cast<float>(p.heads);
    for (int64_t i = 0; i < length; i += kLanes) simd::store(chain.scores + i, simd::load(chain.scores + i) * simd::load(chain.value_scales + i));
    chain.weight_scale = split_bytes<false>(chain.scores, length, chain.weights) * inverse;
  }
  byte_values<kVnni, kChains>(p, chains, length);
}

template <bool kVnni>
inline void attend_bytes_as(const Attention& p, const Item& item, char* memory) {
  const int64_t group = p.heads / p.kv_heads, each = byte_chain_bytes(p.longest, p.d), count = item.rows * p.heads, capacity = item.cache.capacity;
  for (int64_t first = 0; first < count; first += kByteChains) {
    ByteChain chains[kByteChains];
    const int64_t n = least(kByteChains, count - first);
    for (int64_t c = 0; c < n; ++c) {
      const int64_t head = (first + c) / item.rows, row = (first + c) % item.rows, kv = head / group;
      ByteChain& chain = chains[c];
      chain.keys = static_cast<const int8_t*>(item.cache.keys) + kv * up(p.d, 4) * capacity;
      chain.values = static_cast<const int8_t*>(item.cache.values) + kv * capacity * up(p.d, kColumns);
      chain.key_scales = item.cache.scales + kv * capacity;
      chain.value_scales = chain.key_scales + p.kv_heads * capacity;
      chain.scores = reinterpret_cast<float*>(memory + c * each);
      chain.weights = reinterpret_cast<int32_t*>(chain.scores + score_width(p.longest));
      chain.q = chain.weights + score_width(p.longest) / 2;
      chain.out = item.out + row * item.out_stride + head * p.d;
      chain.map = item.map == nullptr ? nullptr : item.map + row * item.length;
      chain.q_scale = split_bytes<true>(item.q + row * item.q_stride + head * p.d, p.d, chain.q);
      const int8_t* bytes = reinterpret_cast<const int8_t*>(chain.q);
      for (int half = 0; half < 2; ++half) {
        chain.q_sum[half] = 0;
        for (int64_t i = 0; i < p.d; ++i) chain.q_sum[half] += 128 * bytes[half * up(p.d, kColumns) + i];
      }
    }
    if (n == kByteChains) attend_byte_chains<kVnni, kByteChains>(p, chains, item.length);
    else
      for (int64_t c = 0; c < n; ++c) attend_byte_chains<kVnni, 1>(p, chains + c, item.length);
  }
}

inline void attend_bytes(const Attention& p, const Item& item, char* memory) {
  if (item.length == 0) {
    for (int64_t r = 0; r < item.rows; ++r) memset(item.out + r * item.out_stride, 0, static_cast<size_t>(p.heads * p.d) * sizeof(float));
    return;
  }
  if (item.map != nullptr) memset(item.map, 0, static_cast<size_t>(item.rows * item.length) * sizeof(float));
#if defined(__AVX512F__)
  if (p.vnni) return attend_bytes_as<true>(p, item, memory);
#endif
  attend_bytes_as<false>(p, item, memory);
}

// d numbers in 255 steps of their largest magnitude, plus 128 where `flip` is 0x80, byte i at place(i); the scale of a step is returned. The rule is that of
// `rounded_rows`, cvmk/ops/quantize.py. Where the numbers are not finite the scale is NaN.
template <typename Place>
inline float round_bytes(const float* x, int64_t d, uint8_t flip, const Place& place) {
  const float largest = largest_of(x, d), a = largest > 0x1p-100f ? largest : 0x1p-100f, step = 127.0f / a;
  const F end = simd::set(127.0f);
  for (int64_t i = 0; i < d; i += kLanes) {
    const int left = static_cast<int>(least(kLanes, d - i));
    const F scaled = largest == largest ? simd::load_n(x + i, left) * step : F{};
    int8_t found[kLanes];
    store_bytes(found, __builtin_convertvector(simd::round(simd::min(simd::max(scaled, -end), end)), I));
    for (int k = 0; k < left; ++k) *place(i + k) = static_cast<int8_t>(found[k] ^ flip);
  }
  return largest == largest ? a / 127.0f : largest;
}

inline void append_bytes(const Append& p) {
  const int64_t width = up(p.d, kColumns), capacity = p.cache.capacity;
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const int64_t position = p.first + r, from = r * p.stride + h * p.d;
      int8_t* keys = static_cast<int8_t*>(p.cache.keys) + h * up(p.d, 4) * capacity + (position / kColumns * pieces(p.d, 4) * kColumns + position % kColumns) * 4;
      int8_t* values = static_cast<int8_t*>(p.cache.values) + (h * capacity + position / 4 * 4) * width + position % 4;
      float* scales = p.cache.scales + h * capacity + position;
      scales[0] = round_bytes(p.keys + from, p.d, 0x80, [&](int64_t i) { return keys + i / 4 * kColumns * 4 + i % 4; });
      scales[p.kv_heads * capacity] = round_bytes(p.values + from, p.d, 0, [&](int64_t i) { return values + i * 4; });
    }
}

}  // namespace
}  // namespace cvmk::cached
