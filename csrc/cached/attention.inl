// Scores and sums are float32 products on vector registers; a row's arithmetic is the same however many rows share its keys.
#pragma once
#include "cached/bytes.inl"
#include "cached/pairs.inl"
#include "cached/weigh.inl"
#include "common/float_product.inl"

namespace cvmk::cached {
namespace {

// Of a thread: scores and sums of a block of rows, and a head's keys.
CVMK_INLINE int64_t thread_bytes(const Attention& p) {
  if (p.dtype != kFloat32) return p.dtype == kInt8 ? byte_bytes(p) : pair_bytes(p);
  const int64_t width = up(p.d, kColumns), scores = score_width(p.longest);
  return up((kRows * (scores + width) + p.d * scores) * 4, 64);
}

// Where the block of keys of position j begins, and its place there: element i of the d stands i * kColumns behind it.
CVMK_INLINE int64_t key_at(int64_t d, int64_t j) { return j / kColumns * d * kColumns + j % kColumns; }

// Scores of one row, several heads side by side: their sums, each in order of k from 0, are chains that do not wait for each other.
template <int kHeads>
CVMK_INLINE void one_row_scores(const Attention& p, const Item& item, int64_t head, float* const* scores) {
  const int64_t group = p.heads / p.kv_heads;
  const float* q[kHeads];
  const float* keys[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    q[h] = item.q + (head + h) * p.d;
    keys[h] = static_cast<const float*>(item.cache.keys) + (head + h) / group * up(p.d, 2) * item.cache.capacity;
  }
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    int64_t at[kVectors];
    for (int v = 0; v < kVectors; ++v) at[v] = key_at(p.d, j + v * kLanes);
    F sum[kHeads][kVectors] = {};
    for (int64_t i = 0; i < p.d; ++i)
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const F one = simd::set(q[h][i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[h][v] += one * simd::load(keys[h] + at[v] + i * kColumns);
      }
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < kVectors; ++v) simd::store(scores[h] + j + v * kLanes, sum[h][v]);
  };
  int64_t j = 0;
  for (; item.length - j > kLanes; j += 2 * kLanes) columns(j, Count<2>{});
  if (j < item.length) columns(j, Count<1>{});
}

template <int kHeads>
CVMK_INLINE void one_row_values(const Attention& p, const Item& item, int64_t head, const float* const* scores, const float* inverse) {
  const int64_t width = up(p.d, kColumns), group = p.heads / p.kv_heads;
  const auto columns = [&](int64_t j, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const float* values[kHeads];
    for (int h = 0; h < kHeads; ++h) values[h] = static_cast<const float*>(item.cache.values) + (head + h) / group * width * item.cache.capacity + j;
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
  one_row_scores<kHeads>(p, item, head, scores);
  for (int h = 0; h < kHeads; ++h) inverse[h] = weigh_row(scores[h], item.length, p.scale);
  for (int h = 0; h < kHeads && item.map != nullptr; ++h)
    for (int64_t i = 0; i < item.length; ++i) item.map[i] += scores[h][i] * inverse[h] / static_cast<float>(p.heads);
  one_row_values<kHeads>(p, item, head, scores, inverse);
}

// A head of an item whose rows are several, its keys turned as a whole: [d][lds]; values [length][width].
struct Head {
  int64_t head, lds, width;
  const float *keys, *values;
};

inline Head head_of(const Attention& p, const Item& item, int64_t head, float* memory) {
  const int64_t kv = head / (p.heads / p.kv_heads), width = up(p.d, kColumns), lds = score_width(item.length);
  const float* keys = static_cast<const float*>(item.cache.keys) + kv * up(p.d, 2) * item.cache.capacity;
  for (int64_t j = 0; j < lds; j += kLanes)
    for (int64_t i = 0; i < p.d; ++i) simd::store(memory + i * lds + j, simd::load(keys + key_at(p.d, j) + i * kColumns));
  return {head, lds, width, memory, static_cast<const float*>(item.cache.values) + kv * width * item.cache.capacity};
}

inline void attend_block(const Attention& p, const Item& item, const Head& h, int64_t first, int64_t rows, float* scores, float* sums) {
  const int64_t length = item.length;
  const product::Left q{item.q + first * item.q_stride + h.head * p.d, item.q_stride, 1, p.d, 0};
  product::multiply(rows, up(length, kLanes), p.d, q, {h.keys, product::kPanel, h.lds}, scores, h.lds, false);
  float inverse[kRows];
  for (int64_t r = 0; r < rows; ++r) inverse[r] = weigh_row(scores + r * h.lds, length, p.scale);
  if (item.map != nullptr)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < length; ++i) item.map[(first + r) * length + i] += scores[r * h.lds + i] * inverse[r] / static_cast<float>(p.heads);
  product::multiply(rows, h.width, length, {scores, h.lds, 1, length, 0}, {h.values, product::kPanel, h.width}, sums, h.width, false);
  for (int64_t r = 0; r < rows; ++r) {
    float* out = item.out + (first + r) * item.out_stride + h.head * p.d;
    for (int64_t i = 0; i < p.d; i += kLanes) {
      const int left = static_cast<int>(least(kLanes, p.d - i));
      simd::store_n(out + i, simd::load(sums + r * h.width + i) * inverse[r], left);
    }
  }
}

inline void attend_item(const Attention& p, const Item& item, float* memory) {
  if (item.length == 0) {
    for (int64_t r = 0; r < item.rows; ++r) memset(item.out + r * item.out_stride, 0, static_cast<size_t>(p.heads * p.d) * sizeof(float));
    return;
  }
  if (item.map != nullptr) memset(item.map, 0, static_cast<size_t>(item.rows * item.length) * sizeof(float));
  if (item.rows == 1) {
    int64_t head = 0;
    for (; head + 4 <= p.heads; head += 4) one_row<4>(p, item, head, memory);
    for (; head < p.heads; ++head) one_row<1>(p, item, head, memory);
    return;
  }
  float *scores = memory, *sums = scores + kRows * score_width(item.length), *expanded = sums + kRows * up(p.d, kColumns);
  for (int64_t head = 0; head < p.heads; ++head) {
    const Head h = head_of(p, item, head, expanded);
    for (int64_t first = 0; first < item.rows; first += kRows) attend_block(p, item, h, first, least(kRows, item.rows - first), scores, sums);
  }
}

int64_t attention_scratch(const Attention& p, const Team& team) { return thread_bytes(p) * team.size; }

void run_attention(const Attention& p, char* scratch, const Team& team) {
  const auto one = [&](int64_t index, int thread) {
    char* memory = scratch + thread * thread_bytes(p);
    if (p.dtype == kFloat32) attend_item(p, p.items[index], reinterpret_cast<float*>(memory));
    else if (p.dtype == kInt8) attend_bytes(p, p.items[index], memory);
    else attend_pairs(p, p.items[index], index + team.size < p.count && p.items[index + team.size].rows > 0 ? p.items + index + team.size : nullptr, memory);
  };
  if (p.count * p.longest * p.heads * p.d < kGrain) {
    for (int64_t i = 0; i < p.count; ++i) one(i, 0);
    return;
  }
  team.each(p.count, one);
}

int64_t append_scratch(const Append&, const Team&) { return 0; }

void run_append(const Append& p, char*, const Team&) {
  if (p.dtype != kFloat32) return p.dtype == kInt8 ? append_bytes(p) : append_pairs(p);
  const int64_t width = up(p.d, kColumns);
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const float *from = p.keys + r * p.stride + h * p.d, *value = p.values + r * p.stride + h * p.d;
      float* keys = static_cast<float*>(p.cache.keys) + h * up(p.d, 2) * p.cache.capacity + key_at(p.d, p.first + r);
      float* values = static_cast<float*>(p.cache.values) + (h * p.cache.capacity + p.first + r) * width;
      for (int64_t i = 0; i < p.d; ++i) keys[i * kColumns] = from[i];
      memcpy(values, value, static_cast<size_t>(p.d) * sizeof(float));
      for (int64_t i = p.d; i < width; ++i) values[i] = 0.0f;
    }
}

int64_t copy_scratch(const Copy&, const Team&) { return 0; }

void run_copy(const Copy& p, char*, const Team&) {
  if (p.last <= p.first) return;
  const int64_t size = size_of(p.dtype), width = up(p.d, kColumns), beside = p.dtype == kFloat32 ? 1 : p.dtype == kInt8 ? 4 : 2;
  const int64_t deep = up(p.d, beside);
  const int64_t block = p.first / kColumns * kColumns, end = up(p.last, kColumns), first = p.first / beside * beside, head = up(p.d, most(beside, int64_t{2}));
  const auto part = [&](const void* from, void* to, int64_t from_first, int64_t to_first, int64_t count) {
    memcpy(static_cast<char*>(to) + to_first * size, static_cast<const char*>(from) + from_first * size, static_cast<size_t>(count * size));
  };
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    part(p.from.keys, p.to.keys, h * head * p.from.capacity + block * deep, h * head * p.to.capacity + block * deep, (end - block) * deep);
    part(p.from.values, p.to.values, (h * p.from.capacity + first) * width, (h * p.to.capacity + first) * width, (up(p.last, beside) - first) * width);
    for (int64_t which = h; p.dtype == kInt8 && which < 2 * p.kv_heads; which += p.kv_heads)
      memcpy(p.to.scales + which * p.to.capacity + p.first, p.from.scales + which * p.from.capacity + p.first, static_cast<size_t>(p.last - p.first) * sizeof(float));
  }
}

}  // namespace
}  // namespace cvmk::cached
