// int8_linear: rows are quantised once, multiplied exactly into int32, and finished while a tile of sums is hot.
#include "gemm/common.inl"
#include "gemm/tiles.inl"

namespace {

constexpr int64_t kRoundBytes = 1 << 20;  // quantised rows that stand at one time
constexpr float kSmallest = 7.888609052210118e-31f;  // 2^-100, the floor of a row's largest magnitude
constexpr int kVectors = kPanel / kLanes;

// -- rows --------------------------------------------------------------------------------------------------------------------------
// The nearest integers, halves to even. The product before it must be rounded by itself, so no multiply-add may be formed here.
CVMK_INLINE I nearest(F x) {
#if defined(__AVX512F__)
  return simd::bits<I>(_mm512_cvtps_epi32(simd::bits<__m512>(x)));
#elif defined(__AVX2__)
  return simd::bits<I>(_mm256_cvtps_epi32(simd::bits<__m256>(x)));
#else
  __asm__("" : "+x"(x));
  return __builtin_convertvector(simd::round(x), I);
#endif
}

CVMK_INLINE I larger(I a, I b) {
#if defined(__AVX512F__)
  return simd::bits<I>(_mm512_max_epi32(simd::bits<__m512i>(a), simd::bits<__m512i>(b)));
#else
  return a > b ? a : b;
#endif
}

#if defined(__AVX512F__)
// The magnitude's bits of the largest of `inputs` 16-bit numbers, widened to those of a float; NaN counts as the largest.
template <int kType>
inline int32_t largest_half(const uint16_t* x, int64_t inputs) {
  const __m512i mask = _mm512_set1_epi16(0x7FFF);
  __m512i a = _mm512_setzero_si512(), b = a;
  int64_t k = 0;
  for (; k + 64 <= inputs; k += 64) {
    a = _mm512_max_epu16(a, _mm512_and_si512(_mm512_loadu_si512(x + k), mask));
    b = _mm512_max_epu16(b, _mm512_and_si512(_mm512_loadu_si512(x + k + 32), mask));
  }
  for (; k < inputs; k += 32) {
    const __mmask32 some = inputs - k >= 32 ? 0xFFFFFFFFu : (1u << (inputs - k)) - 1u;
    a = _mm512_max_epu16(a, _mm512_and_si512(_mm512_maskz_loadu_epi16(some, x + k), mask));
  }
  a = _mm512_max_epu16(a, b);
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i flipped = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));  // the least of the complements
  const uint32_t bits = ~static_cast<uint32_t>(_mm_extract_epi16(flipped, 0)) & 0x7FFFu;
  if (kType == kBfloat16) return static_cast<int32_t>(bits << 16);
  return simd::bits<int32_t>(simd::half_to_float(static_cast<uint16_t>(bits)));
}

// quantise_chunk for 64 bfloat16 numbers: even and odd ones apart, for both are floats in place.
CVMK_INLINE void quantise_chunk_bf16(const uint16_t* x, float step, uint8_t flip, uint8_t* to) {
  __m512i words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i both = _mm512_loadu_si512(x + 32 * i);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
    const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(even, _mm512_set1_ps(step))), high = _mm512_cvtps_epi32(_mm512_mul_ps(odd, _mm512_set1_ps(step)));
    words[i] = _mm512_mask_blend_epi16(0xAAAAAAAAu, low, _mm512_slli_epi32(high, 16));
  }
  const __m512i bytes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi16(words[0], words[1]));
  _mm512_storeu_si512(to, _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(flip))));
}
#endif

// 64 inputs of a row times `step`, rounded, as signed bytes (plus 128 where `flip` is 0x80).
template <int kType>
CVMK_INLINE void quantise_chunk(const void* x, const float* inverse, int64_t k, int64_t left, float step, uint8_t flip, uint8_t* to) {
  I q[kStep / kLanes];
  for (int i = 0; i < kStep / kLanes; ++i) {
    const int64_t rest = left - i * kLanes;
    const int n = rest >= kLanes ? kLanes : rest > 0 ? static_cast<int>(rest) : 0;
    F u = load_some<kType>(x, k + i * kLanes, n);
    if (inverse) u *= simd::load(inverse + k + i * kLanes);
    u *= step;
    q[i] = nearest(u);
  }
#if defined(__AVX512F__)
  const __m512i low = _mm512_packs_epi32(simd::bits<__m512i>(q[0]), simd::bits<__m512i>(q[1]));
  const __m512i high = _mm512_packs_epi32(simd::bits<__m512i>(q[2]), simd::bits<__m512i>(q[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
  _mm512_storeu_si512(to, _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(flip))));
#else
  typedef int8_t B __attribute__((vector_size(kLanes)));
  for (int i = 0; i < kStep / kLanes; ++i) {
    const B b = __builtin_convertvector(q[i], B) ^ static_cast<int8_t>(flip);
    memcpy(to + i * kLanes, &b, sizeof b);
  }
#endif
}

// The bits of the largest magnitude of a row, which order as the magnitudes do; NaN counts as the largest.
template <int kType>
inline int32_t largest_bits(const void* x, const float* inverse, int64_t inputs) {
#if defined(__AVX512F__)
  if (kType != kFloat32 && !inverse) return largest_half<kType>(static_cast<const uint16_t*>(x), inputs);
#endif
  I most[2] = {I{}, I{}};
  int64_t k = 0;
  for (; k + 2 * kLanes <= inputs; k += 2 * kLanes)
    for (int j = 0; j < 2; ++j) {
      F u = load_as<kType>(x, k + j * kLanes);
      if (inverse) u *= simd::load(inverse + k + j * kLanes);
      most[j] = larger(most[j], simd::bits<I>(simd::abs(u)));
    }
  for (; k < inputs; k += kLanes) {
    const int n = static_cast<int>(least(kLanes, inputs - k));
    F u = load_some<kType>(x, k, n);
    if (inverse) u *= simd::load(inverse + k);
    most[0] = larger(most[0], simd::bits<I>(simd::abs(u)));
  }
  most[0] = larger(most[0], most[1]);
  int32_t lanes[kLanes], bits = 0;
  memcpy(lanes, &most[0], sizeof lanes);
  for (int i = 0; i < kLanes; ++i) bits = lanes[i] > bits ? lanes[i] : bits;
  return bits;
}

// A row as bytes: chunk c of 64 inputs at to + c * chunk_stride, zeros behind the last input. Returns a / 127, NaN where the row is not finite.
template <int kType>
inline float quantise_row(const void* x, const float* inverse, int64_t inputs, uint8_t flip, uint8_t* to, int64_t chunk_stride) {
  const int32_t bits = largest_bits<kType>(x, inverse, inputs);
  const bool finite = bits < 0x7F800000;
  const float found = finite ? simd::bits<float>(bits) : 1.0f, largest = found > kSmallest ? found : kSmallest, step = 127.0f / largest;
  int64_t k = 0;
  for (; k + kStep <= inputs; k += kStep, to += chunk_stride) {
#if defined(__AVX512F__)
    if (kType == kBfloat16 && !inverse) {
      quantise_chunk_bf16(static_cast<const uint16_t*>(x) + k, step, flip, to);
      continue;
    }
#endif
    quantise_chunk<kType>(x, inverse, k, kStep, step, flip, to);
  }
  if (k < inputs) quantise_chunk<kType>(x, inverse, k, inputs - k, step, flip, to);
  return finite ? largest / 127.0f : __builtin_nanf("");
}

inline float quantise(const Int8Linear& p, const float* inverse, int64_t row, uint8_t flip, uint8_t* to, int64_t chunk_stride) {
  const Linear& l = p.linear;
  const char* x = static_cast<const char*>(l.x) + row * l.x_stride * element_bytes(l.x_dtype);
  if (l.x_dtype == kFloat32) return quantise_row<kFloat32>(x, inverse, l.inputs, flip, to, chunk_stride);
  if (l.x_dtype == kBfloat16) return quantise_row<kBfloat16>(x, inverse, l.inputs, flip, to, chunk_stride);
  return quantise_row<kFloat16>(x, inverse, l.inputs, flip, to, chunk_stride);
}

inline void invert(const Int8Linear& p, float* inverse, int64_t padded) {
  const int64_t inputs = p.linear.inputs;
  for (int64_t k = 0; k < padded; k += kLanes) {
    const int64_t left = inputs - k;
    const int n = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
    simd::store(inverse + k, 1.0f / load_any(p.smooth_scale, p.smooth_dtype, k, n));
  }
  for (int64_t k = inputs; k < padded; ++k) inverse[k] = 1.0f;
}

// -- products on vectors -----------------------------------------------------------------------------------------------------------
// sums[lane] += the four products of the bytes of a's and b's word there. a is unsigned (value + 128) for kVnni, else signed; none is -128.
template <bool kVnni>
CVMK_INLINE I dot4(I sum, I a, I b) {
#if defined(__AVX512VNNI__)
  if (kVnni) return simd::bits<I>(_mm512_dpbusd_epi32(simd::bits<__m512i>(sum), simd::bits<__m512i>(a), simd::bits<__m512i>(b)));
#elif defined(__AVX512F__)
  if (kVnni) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
#endif
#if defined(__AVX512F__)
  const __m512i x = simd::bits<__m512i>(a), w = simd::bits<__m512i>(b);
  const __m512i signed_w = _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(x), _mm512_setzero_si512(), w);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(x), signed_w);  // at most 2 * 127 * 127: no saturation
  return sum + simd::bits<I>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  const __m256i x = simd::bits<__m256i>(a), w = simd::bits<__m256i>(b);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));  // at most 2 * 127 * 127: no saturation
  return sum + simd::bits<I>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  // Shifts bring byte j of every word into its sign; arithmetic ones extend it.
  for (int j = 0; j < 4; ++j) sum += ((a << (24 - 8 * j)) >> 24) * ((b << (24 - 8 * j)) >> 24);
  return sum;
#endif
}

template <bool kVnni, int kRows, int kPanels>
inline void vector_block(const uint8_t* a, int64_t padded, const int8_t* const* b, const int32_t* const* start, int32_t* sums, int64_t stride) {
  I sum[kRows][kPanels * kVectors];
  for (int p = 0; p < kPanels; ++p)
    for (int v = 0; v < kVectors; ++v) {
      I first{};
      if (kVnni) memcpy(&first, start[p] + v * kLanes, sizeof first);
      for (int r = 0; r < kRows; ++r) sum[r][p * kVectors + v] = first;
    }
  for (int64_t k = 0; k < padded; k += 4) {
    I w[kPanels * kVectors];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) memcpy(&w[p * kVectors + v], b[p] + k * kPanel + v * kLanes * 4, sizeof(I));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t word;
      memcpy(&word, a + r * padded + k, 4);
      const I x = simd::seti(word);
#pragma GCC unroll 16
      for (int p = 0; p < kPanels * kVectors; ++p) sum[r][p] = dot4<kVnni>(sum[r][p], x, w[p]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVectors; ++v) memcpy(sums + r * stride + p * kPanel + v * kLanes, &sum[r][p * kVectors + v], sizeof(I));
}

#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockPanels = 4;
#elif defined(__AVX2__)
constexpr int kBlockRows = 2, kBlockPanels = 2;
#else
constexpr int kBlockRows = 1, kBlockPanels = 1;
#endif

template <bool kVnni, int kPanels>
inline int vector_rows(int64_t rows, const uint8_t* a, int64_t padded, const int8_t* const* b, const int32_t* const* start, int32_t* sums, int64_t stride) {
  if constexpr (kBlockRows >= 6) {
    if (rows >= 6) return vector_block<kVnni, 6, kPanels>(a, padded, b, start, sums, stride), 6;
    if (rows >= 4) return vector_block<kVnni, 4, kPanels>(a, padded, b, start, sums, stride), 4;
  }
  if constexpr (kBlockRows >= 2)
    if (rows >= 2) return vector_block<kVnni, 2, kPanels>(a, padded, b, start, sums, stride), 2;
  return vector_block<kVnni, 1, kPanels>(a, padded, b, start, sums, stride), 1;
}

// Rows [0, rows) of bytes times the item's panels: sums [rows][stride].
template <bool kVnni>
inline void vector_product(const Int8Linear& p, const Item& item, const uint8_t* a, int64_t padded, int64_t rows, int32_t* sums, int64_t stride) {
  const int64_t panels = up(p.linear.outputs, kPanel) / kPanel;
  const int32_t* starts = reinterpret_cast<const int32_t*>(p.weight + panels * kPanel * padded);
  int done = 0;
  while (done < item.count) {
    const int left = item.count - done;
    const int width = left >= 4 && kBlockPanels >= 4 ? 4 : left >= 2 && kBlockPanels >= 2 ? 2 : 1;
    const int8_t* b[4];
    const int32_t* start[4];
    for (int i = 0; i < width; ++i) {
      b[i] = p.weight + item.panels[done + i] * kPanel * padded;
      start[i] = starts + item.panels[done + i] * kPanel;
    }
    for (int64_t r = 0; r < rows;) {
      const uint8_t* from = a + r * padded;
      int32_t* to = sums + r * stride + done * kPanel;
      if constexpr (kBlockPanels >= 4)
        if (width == 4) {
          r += vector_rows<kVnni, 4>(rows - r, from, padded, b, start, to, stride);
          continue;
        }
      if constexpr (kBlockPanels >= 2)
        if (width == 2) {
          r += vector_rows<kVnni, 2>(rows - r, from, padded, b, start, to, stride);
          continue;
        }
      r += vector_rows<kVnni, 1>(rows - r, from, padded, b, start, to, stride);
    }
    done += width;
  }
}

// -- the whole -----------------------------------------------------------------------------------------------------------------------
constexpr int64_t kSumRows = 256;  // rows of sums that stand at one time where a pass over them takes a part of the inputs

template <bool kVnni>
inline void vector_item(const Int8Linear& p, const Item& item, const uint8_t* a, int64_t padded, const float* scales, int64_t row, int64_t rows, int32_t* sums) {
  const int64_t stride = item.count * kPanel;
  for (int64_t r = 0; r < rows; r += 24) {
    const int64_t n = least(24, rows - r);
    vector_product<kVnni>(p, item, a + r * padded, padded, n, sums, stride);
    finish(p.linear, item, sums, stride, scales + r, row + r, n);
  }
}

#if CVMK_GEMM_TILES
inline void tiled_item(const Int8Linear& p, const Item& item, const uint8_t* a, int64_t steps, const float* scales, int64_t row, int64_t rows, int32_t* sums) {
  const bool whole = rows <= 32 || steps <= kStepsInL1;  // then a tile of sums is finished at once
  const auto panels = [&](int first, int n, int64_t step, int64_t, const char** b) {
    for (int i = 0; i < n; ++i) b[i] = reinterpret_cast<const char*>(p.weight) + (item.panels[first + i] * steps + step) * kTile;
  };
  const auto before = [&](int64_t r, int64_t n) { expect(p.linear, item, row + r, n); };
  const auto done = [&](int64_t r, int64_t n, const int32_t* found) { finish(p.linear, item, found, item.count * kPanel, scales + r, row + r, n); };
  tile_item<false>(reinterpret_cast<const char*>(a), steps, rows, item.count, sums, whole ? 32 : kSumRows, whole ? steps : kStepsInL1, panels, before, done);
}
#endif

// Below so many multiplications the work is done in the calling thread.
constexpr int64_t kAlone = 1 << 18;

template <bool kVnni>
inline int int8_linear_as(const Int8Linear& p) {
  const Linear& l = p.linear;
  const int64_t padded = up(l.inputs, kStep), columns = out_columns(l);
  const bool tiles = CVMK_GEMM_TILES && l.rows > (kVnni ? 4 : 0);
  const int64_t round = least(up(l.rows, 32), kRoundBytes / padded / 32 * 32 > 32 ? kRoundBytes / padded / 32 * 32 : 32);
  const int threads = l.rows * l.inputs * l.outputs <= kAlone ? 1 : threads::limit();
  const int64_t sums_each = up((tiles ? kSumRows : 24) * kMostPanels * kPanel, 16);
  Scratch scratch{static_cast<char*>(l.scratch(round * padded + up(round, 16) * 4 + (p.smooth_scale ? padded * 4 : 0) + threads * sums_each * 4 + 256))};
  if (!scratch.next) return 1;
  uint8_t* a = scratch.take<uint8_t>(round * padded);
  float* row_scales = scratch.take<float>(round);
  int32_t* all_sums = scratch.take<int32_t>(threads * sums_each);
  float* inverse = nullptr;
  if (p.smooth_scale) invert(p, inverse = scratch.take<float>(padded), padded);

  const bool gated = l.activation == kSwiglu;
  const int width = gated ? 2 : 4;
  const uint8_t flip = kVnni && !tiles ? 0x80 : 0;
  const int64_t items = up(columns, width * kPanel) / (width * kPanel);
  for (int64_t start = 0; start < l.rows; start += round) {
    const int64_t rows = least(round, l.rows - start);
    const auto quantise_one = [&](int64_t r) {
      uint8_t* to = tiles ? a + r / kPanel * kPanel * padded + r % kPanel * kStep : a + r * padded;
      row_scales[r] = quantise(p, inverse, start + r, flip, to, tiles ? kPanel * kStep : kStep);
    };
    int64_t shared = rows;
    if (rows * padded <= 8192) {  // sooner done than shared out
      for (int64_t r = 0; r < rows; ++r) quantise_one(r);
      shared = 0;
    }
    const auto enter = [&] {
#if CVMK_GEMM_TILES
      if (tiles) configure_tiles(rows);
#endif
    };
    const auto leave = [&] {
#if CVMK_GEMM_TILES
      if (tiles) _tile_release();
#endif
    };
    const auto one_item = [&](int64_t i, int thread) {
      const Item item = item_of(l, i * width * kPanel, width);
      int32_t* sums = all_sums + thread * sums_each;
#if CVMK_GEMM_TILES
      if (tiles) return tiled_item(p, item, a, padded / kStep, row_scales, start, rows, sums);
#endif
      vector_item<kVnni>(p, item, a, padded, row_scales, start, rows, sums);
    };
    two_loops(threads, shared, quantise_one, items, enter, one_item, leave);
  }
  return 0;
}

inline int int8_linear_level(const Int8Linear& p) {
#if defined(__AVX512F__)
  if (p.vnni) return int8_linear_as<true>(p);
#endif
  return int8_linear_as<false>(p);
}

}  // namespace
