// Caches in bfloat16: a score is a sum of products of pairs of d, a result one of pairs of positions, in float32. Every row and head is a chain of its own, so
// its bits are the same whatever stands beside it.
#pragma once
#include "cached/weigh.inl"
#include "common/elements.h"
#include "common/pairs.h"

namespace cvmk::cached {
namespace {

constexpr int kBeside = 4;  // chains that do not wait for each other

// sum += the pairs of the lanes of `cache` times the pair `word`.
template <bool kPairs>
CVMK_INLINE F dot2(F sum, I cache, uint32_t word) {
  const I both = simd::seti(static_cast<int32_t>(word));
#if defined(__AVX512F__)
  if (kPairs) return pairs::dot2(sum, simd::bits<__m512i>(cache), simd::bits<__m512i>(both));
#endif
  constexpr int32_t kHigh = static_cast<int32_t>(0xFFFF0000u);
  sum += simd::bits<F>(cache & kHigh) * simd::bits<F>(both & kHigh);
  return sum + simd::bits<F>(cache << 16) * simd::bits<F>(both << 16);
}

CVMK_INLINE I load_words(const uint32_t* p) {
  I v;
  memcpy(&v, p, sizeof v);
  return v;
}
CVMK_INLINE uint32_t word_at(const uint16_t* p, int64_t i) {
  uint32_t word;
  memcpy(&word, p + 2 * i, sizeof word);
  return word;
}

// To the nearest bfloat16; the instruction takes subnormal numbers for 0, as vdpbf16ps does.
template <bool kPairs>
CVMK_INLINE simd::H narrow(F x) {
#if defined(__AVX512F__)
  if (kPairs) return simd::bits<simd::H>(pairs::narrow(x));
#endif
  return elements::round_bf16(x);
}

// n floats as bfloat16, zeros up to a whole vector.
template <bool kPairs>
CVMK_INLINE void round_row(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; i += kLanes) simd::store_h(to + i, narrow<kPairs>(simd::load_n(from + i, static_cast<int>(least(kLanes, n - i)))));
}

// What one row and head needs, and its memory.
struct Chain {
  const uint32_t *keys, *values;
  const uint32_t *next_keys, *next_values;  // of the chain that comes after it, asked for while this one is computed: caches come from far away
  float *scores, *out, *map;
  uint16_t *q, *weights;
};

CVMK_INLINE int64_t chain_bytes(int64_t longest, int64_t d) { return up(score_width(longest) * 6 + up(d, kColumns) * 2, 64); }
CVMK_INLINE int64_t pair_bytes(const Attention& p) { return kBeside * chain_bytes(p.longest, p.d); }

// Scores of kVectors vectors of positions from j on.
template <bool kPairs, int kChains, int kVectors>
CVMK_INLINE void columns_of_scores(const Attention& p, const Chain* chains, int64_t j, F (&sum)[kChains][kVectors]) {
  const int64_t deep = pieces(p.d, 2);
  int64_t at[kVectors];
  for (int v = 0; v < kVectors; ++v) at[v] = (j + v * kLanes) / kColumns * deep * kColumns + (j + v * kLanes) % kColumns;
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[c][v] = F{};
  for (int64_t i = 0; i < deep; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const uint32_t word = word_at(chains[c].q, i);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sum[c][v] = dot2<kPairs>(sum[c][v], load_words(chains[c].keys + at[v] + i * kColumns), word);
        __builtin_prefetch(chains[c].next_keys + at[v] + i * kColumns);
      }
    }
}

// Chains of kVectors vectors of positions at most: the scores stay in registers.
template <bool kPairs, int kChains, int kVectors>
CVMK_INLINE void short_weights(const Attention& p, const Chain* chains, int64_t length, float* inverse) {
  F s[kChains][kVectors];
  columns_of_scores<kPairs>(p, chains, 0, s);
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c) inverse[c] = weigh(s[c], length, p.scale);
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      simd::store_h(chains[c].weights + v * kLanes, narrow<kPairs>(s[c][v]));
      if (chains[c].map != nullptr) simd::store(chains[c].scores + v * kLanes, s[c][v]);
    }
}

template <bool kPairs, int kChains>
CVMK_INLINE void long_weights(const Attention& p, const Chain* chains, int64_t length, float* inverse) {
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    F sum[kChains][kVectors];
    columns_of_scores<kPairs>(p, chains, j, sum);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) simd::store(chains[c].scores + j + v * kLanes, sum[c][v]);
  };
  int64_t j = 0;
  for (; length - j > kLanes; j += 2 * kLanes) columns(j, Count<2>{});
  if (j < length) columns(j, Count<1>{});
  for (int c = 0; c < kChains; ++c) inverse[c] = weigh_row(chains[c].scores, length, p.scale);
  for (int c = 0; c < kChains; ++c) round_row<kPairs>(chains[c].scores, length, chains[c].weights);
}

template <bool kPairs, int kChains>
CVMK_INLINE void chain_values(const Attention& p, const Chain* chains, int64_t length, const float* inverse) {
  const int64_t width = up(p.d, kColumns);
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    F sum[kChains][kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[c][v] = F{};
    for (int64_t i = 0; i < pieces(length, 2); ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const uint32_t word = word_at(chains[c].weights, i);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          sum[c][v] = dot2<kPairs>(sum[c][v], load_words(chains[c].values + i * width + j + v * kLanes), word);
          __builtin_prefetch(chains[c].next_values + i * width + j + v * kLanes);
        }
      }
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) simd::store_n(chains[c].out + j + v * kLanes, sum[c][v] * inverse[c], static_cast<int>(most(0, least(kLanes, p.d - j - v * kLanes))));
  };
  int64_t j = 0;
  for (; width - j >= 2 * kLanes; j += 2 * kLanes) columns(j, Count<2>{});
  for (; j < width; j += kLanes) columns(j, Count<1>{});
}

template <bool kPairs, int kChains>
inline void attend_chains(const Attention& p, const Chain* chains, int64_t length) {
  float inverse[kChains];
  if (length <= kLanes) short_weights<kPairs, kChains, 1>(p, chains, length, inverse);
  else if (length <= 2 * kLanes) short_weights<kPairs, kChains, 2>(p, chains, length, inverse);
  else long_weights<kPairs, kChains>(p, chains, length, inverse);
  for (int c = 0; c < kChains; ++c) {
    for (int64_t i = 0; chains[c].map != nullptr && i < length; ++i) chains[c].map[i] += chains[c].scores[i] * inverse[c] / static_cast<float>(p.heads);
  }
  chain_values<kPairs, kChains>(p, chains, length, inverse);
}

CVMK_INLINE const uint32_t* keys_of(const Attention& p, const Item& item, int64_t head) {
  return static_cast<const uint32_t*>(item.cache.keys) + head / (p.heads / p.kv_heads) * pieces(p.d, 2) * item.cache.capacity;
}
CVMK_INLINE const uint32_t* values_of(const Attention& p, const Item& item, int64_t head) {
  return static_cast<const uint32_t*>(item.cache.values) + head / (p.heads / p.kv_heads) * (item.cache.capacity / 2) * up(p.d, kColumns);
}

// `after`: the item that the thread will probably compute next; null where there is none.
template <bool kPairs>
inline void attend_pairs_as(const Attention& p, const Item& item, const Item* after, char* memory) {
  const int64_t each = chain_bytes(p.longest, p.d), count = item.rows * p.heads;
  for (int64_t first = 0; first < count; first += kBeside) {
    Chain chains[kBeside];
    const int64_t n = least(kBeside, count - first);
    for (int64_t c = 0; c < n; ++c) {
      const int64_t head = (first + c) / item.rows, row = (first + c) % item.rows, then = first + c + kBeside;
      Chain& chain = chains[c];
      chain.keys = keys_of(p, item, head);
      chain.values = values_of(p, item, head);
      const Item& next = then < count || after == nullptr ? item : *after;
      const int64_t next_head = then < count ? then / item.rows : after == nullptr ? head : least(c / after->rows, p.heads - 1);
      chain.next_keys = keys_of(p, next, next_head);
      chain.next_values = values_of(p, next, next_head);
      chain.out = item.out + row * item.out_stride + head * p.d;
      chain.map = item.map == nullptr ? nullptr : item.map + row * item.length;
      chain.scores = reinterpret_cast<float*>(memory + c * each);
      chain.weights = reinterpret_cast<uint16_t*>(chain.scores + score_width(p.longest));
      chain.q = chain.weights + score_width(p.longest);
      round_row<kPairs>(item.q + row * item.q_stride + head * p.d, p.d, chain.q);
    }
    if (n == kBeside) attend_chains<kPairs, kBeside>(p, chains, item.length);
    else
      for (int64_t c = 0; c < n; ++c) attend_chains<kPairs, 1>(p, chains + c, item.length);
  }
}

inline void attend_pairs(const Attention& p, const Item& item, const Item* after, char* memory) {
  if (item.length == 0) {
    for (int64_t r = 0; r < item.rows; ++r) memset(item.out + r * item.out_stride, 0, static_cast<size_t>(p.heads * p.d) * sizeof(float));
    return;
  }
  if (item.map != nullptr) memset(item.map, 0, static_cast<size_t>(item.rows * item.length) * sizeof(float));
#if defined(__AVX512F__)
  if (p.pairs) return attend_pairs_as<true>(p, item, after, memory);
#endif
  attend_pairs_as<false>(p, item, after, memory);
}

template <bool kPairs>
inline void append_pairs_as(const Append& p) {
  const int64_t width = up(p.d, kColumns), deep = pieces(p.d, 2);
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t position = p.first + r, block = position / kColumns * deep * kColumns + position % kColumns;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const float *from = p.keys + r * p.stride + h * p.d, *value = p.values + r * p.stride + h * p.d;
      uint32_t* keys = static_cast<uint32_t*>(p.cache.keys) + h * deep * p.cache.capacity + block;
      uint32_t* values = static_cast<uint32_t*>(p.cache.values) + (h * (p.cache.capacity / 2) + position / 2) * width;
      for (int64_t i = 0; i < width; i += kLanes) {
        const int left = static_cast<int>(most(0, least(kLanes, p.d - i)));
        uint16_t words[kLanes];
        simd::store_h(words, narrow<kPairs>(simd::load_n(from + i, left)));
        for (int k = 0; k < (left + 1) / 2; ++k) keys[(i / 2 + k) * kColumns] = word_at(words, k);
        const I shown = __builtin_convertvector(narrow<kPairs>(simd::load_n(value + i, left)), I);
        const I both = position % 2 == 0 ? shown : ((load_words(values + i) & 0xFFFF) | (shown << 16));
        memcpy(values + i, &both, sizeof both);
      }
    }
  }
}

inline void append_pairs(const Append& p) {
#if defined(__AVX512F__)
  if (p.pairs) return append_pairs_as<true>(p);
#endif
  append_pairs_as<false>(p);
}

}  // namespace
}  // namespace cvmk::cached
