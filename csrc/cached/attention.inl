// Scores and sums are float32 products on vector registers; a row's arithmetic is the same however many rows share its keys.
#pragma once
#include "cached/params.h"
#include "common/float_product.inl"

namespace cvmk::cached {
namespace {

using simd::F;
using simd::I;
using simd::kLanes;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

constexpr int64_t kRows = 24;     // of a block
constexpr int64_t kGrain = 1 << 15;  // multiplications below which the calling thread does the work

CVMK_INLINE int64_t score_width(int64_t longest) { return up(longest, kColumns); }

CVMK_INLINE int64_t thread_bytes(const Attention& p) { return up(kRows * (score_width(p.longest) + up(p.d, kColumns)) * 4, 64); }

// The lanes before the n-th.
CVMK_INLINE I before(int64_t n) {
  I lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes < static_cast<int32_t>(n);
}

// Scores to weights that sum to the result, whose inverse is returned; zeros up to a whole vector.
inline float weigh_row(float* s, int64_t length, float scale) {
  F high = simd::set(-__builtin_inff());
  int64_t i = 0;
  for (; i < length; i += kLanes) {
    F v = simd::load(s + i);
    if (length - i < kLanes) v = simd::select(before(length - i), v, high);
    high = v > high ? v : high;
  }
  const float maximum = simd::max_lanes(high);
  F sum{};
  for (i = 0; i < length; i += kLanes) {
    F v = simd::falling_exp((simd::load(s + i) - maximum) * scale);
    if (length - i < kLanes) v = simd::first_lanes(v, static_cast<int>(length - i));
    sum += v;
    simd::store(s + i, v);
  }
  return 1.0f / simd::sum_lanes(sum);
}

// The same products for one row, several heads side by side: their sums, each in order of k from 0, are chains that do not wait for each other.
template <int kHeads>
CVMK_INLINE void one_row_scores(const Attention& p, const Item& item, int64_t head, int64_t length, float* const* scores) {
  const int64_t capacity = item.cache.capacity, group = p.heads / p.kv_heads;
  const float *q[kHeads], *keys[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    q[h] = item.q + (head + h) * p.d;
    keys[h] = item.cache.keys + (head + h) / group * p.d * capacity;
  }
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    F sum[kHeads][kVectors] = {};
    for (int64_t i = 0; i < p.d; ++i)
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const F one = simd::set(q[h][i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[h][v] += one * simd::load(keys[h] + i * capacity + j + v * kLanes);
      }
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < kVectors; ++v) simd::store(scores[h] + j + v * kLanes, sum[h][v]);
  };
  int64_t j = 0;
  for (; length - j > kLanes; j += 2 * kLanes) columns(j, Count<2>{});
  if (j < length) columns(j, Count<1>{});
}

template <int kHeads>
CVMK_INLINE void one_row_values(const Attention& p, const Item& item, int64_t head, const float* const* scores, const float* inverse) {
  const int64_t width = up(p.d, kColumns), group = p.heads / p.kv_heads;
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const float* values[kHeads];
    for (int h = 0; h < kHeads; ++h) values[h] = item.cache.values + (head + h) / group * width * item.cache.capacity + j;
    F sum[kHeads][kVectors] = {};
    for (int64_t i = 0; i < item.length; ++i)
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const F one = simd::set(scores[h][i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[h][v] += one * simd::load(values[h] + i * width + v * kLanes);
      }
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < kVectors; ++v) {
        const int left = static_cast<int>(most(0, least(kLanes, p.d - j - v * kLanes)));
        simd::store_n(item.out + (head + h) * p.d + j + v * kLanes, sum[h][v] * inverse[h], left);
      }
  };
  int64_t j = 0;
  for (; width - j >= 2 * kLanes; j += 2 * kLanes) columns(j, Count<2>{});
  for (; j < width; j += kLanes) columns(j, Count<1>{});
}

template <int kHeads>
inline void one_row(const Attention& p, const Item& item, int64_t head, float* memory) {
  const int64_t lds = score_width(item.length);
  float *scores[kHeads], inverse[kHeads];
  for (int h = 0; h < kHeads; ++h) scores[h] = memory + h * lds;
  one_row_scores<kHeads>(p, item, head, item.length, scores);
  for (int h = 0; h < kHeads; ++h) inverse[h] = weigh_row(scores[h], item.length, p.scale);
  for (int h = 0; h < kHeads && item.map != nullptr; ++h)
    for (int64_t i = 0; i < item.length; ++i) item.map[i] += scores[h][i] * inverse[h] / static_cast<float>(p.heads);
  one_row_values<kHeads>(p, item, head, scores, inverse);
}

inline void attend_block(const Attention& p, const Item& item, int64_t head, int64_t first, int64_t rows, float* scores, float* sums) {
  const int64_t kv = head / (p.heads / p.kv_heads), width = up(p.d, kColumns), length = item.length, lds = score_width(length);
  const product::Left q{item.q + first * item.q_stride + head * p.d, item.q_stride, 1, p.d, 0};
  const product::Right keys{item.cache.keys + kv * p.d * item.cache.capacity, product::kPanel, item.cache.capacity};
  product::multiply(rows, up(length, kLanes), p.d, q, keys, scores, lds, false);
  float inverse[kRows];
  for (int64_t r = 0; r < rows; ++r) inverse[r] = weigh_row(scores + r * lds, length, p.scale);
  if (item.map != nullptr)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < length; ++i) item.map[(first + r) * length + i] += scores[r * lds + i] * inverse[r] / static_cast<float>(p.heads);
  const product::Left weights{scores, lds, 1, length, 0};
  const product::Right values{item.cache.values + kv * width * item.cache.capacity, product::kPanel, width};
  product::multiply(rows, width, length, weights, values, sums, width, false);
  for (int64_t r = 0; r < rows; ++r) {
    float* out = item.out + (first + r) * item.out_stride + head * p.d;
    for (int64_t i = 0; i < p.d; i += kLanes) {
      const int left = static_cast<int>(least(kLanes, p.d - i));
      simd::store_n(out + i, simd::load(sums + r * width + i) * inverse[r], left);
    }
  }
}

inline void attend_item(const Attention& p, const Item& item, float* scores, float* sums) {
  if (item.length == 0) {
    for (int64_t r = 0; r < item.rows; ++r) memset(item.out + r * item.out_stride, 0, static_cast<size_t>(p.heads * p.d) * sizeof(float));
    return;
  }
  if (item.map != nullptr) memset(item.map, 0, static_cast<size_t>(item.rows * item.length) * sizeof(float));
  if (item.rows == 1) {
    int64_t head = 0;
    for (; head + 4 <= p.heads; head += 4) one_row<4>(p, item, head, scores);
    for (; head < p.heads; ++head) one_row<1>(p, item, head, scores);
    return;
  }
  for (int64_t first = 0; first < item.rows; first += kRows)
    for (int64_t head = 0; head < p.heads; ++head) attend_block(p, item, head, first, least(kRows, item.rows - first), scores, sums);
}

int64_t attention_scratch(const Attention& p, const Team& team) { return thread_bytes(p) * team.size; }

void run_attention(const Attention& p, char* scratch, const Team& team) {
  const auto one = [&](int64_t index, int thread) {
    float* scores = reinterpret_cast<float*>(scratch + thread * thread_bytes(p));
    attend_item(p, p.items[index], scores, scores + kRows * score_width(p.longest));
  };
  if (p.count * p.longest * p.heads * p.d < kGrain) {
    for (int64_t i = 0; i < p.count; ++i) one(i, 0);
    return;
  }
  team.each(p.count, one);
}

int64_t append_scratch(const Append&, const Team&) { return 0; }

void run_append(const Append& p, char*, const Team&) {
  const int64_t width = up(p.d, kColumns);
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    float* keys = p.cache.keys + h * p.d * p.cache.capacity + p.first;
    for (int64_t r = 0; r < p.rows; ++r) {
      const float* from = p.keys + r * p.stride + h * p.d;
      for (int64_t i = 0; i < p.d; ++i) keys[i * p.cache.capacity + r] = from[i];
      float* to = p.cache.values + (h * p.cache.capacity + p.first + r) * width;
      memcpy(to, p.values + r * p.stride + h * p.d, static_cast<size_t>(p.d) * sizeof(float));
      for (int64_t i = p.d; i < width; ++i) to[i] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace cvmk::cached
