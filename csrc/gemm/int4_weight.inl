// The packed weight of int4_linear: where things stand, and its values as floats or as tiles, through tables of an output's sixteen values.
#pragma once
#include "gemm/common.inl"
#include "gemm/int4_rows.inl"

namespace cvmk::gemm {
namespace {

constexpr int64_t kBlock = 128;  // inputs of an output that stand together in the packed weight: 64 bytes

inline int64_t blocks_of(const Int4Linear& p) { return up(p.linear.inputs, kBlock) / kBlock; }

// The words of output 16 panel + n of the weight from a block of inputs on; 512 words further is the next block.
inline const uint16_t* words_of(const Int4Linear& p, int64_t panel, int n, int64_t block) {
  return p.weight + ((panel * blocks_of(p) + block) * kPanel + n) * (kBlock / 4);
}

// Where the scale (and zero) of output 16 panel + n and group 0 stands; 16 further is the next group.
inline int64_t group_at(const Int4Linear& p, int64_t panel, int n) { return panel * (p.linear.inputs / p.group) * kPanel + n; }

CVMK_INLINE F ramp() {
  F v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// -- as floats -----------------------------------------------------------------------------------------------------------------------
typedef uint16_t W __attribute__((vector_size(kLanes * 2)));

// Inputs [128 block, 128 block + count) of one output as floats, count at most 128 and a multiple of 32.
inline void dequantise(const Int4Linear& p, int64_t panel, int n, int64_t block, int64_t count, float* to) {
  const uint16_t* words = words_of(p, panel, n, block);
  const int64_t groups = group_at(p, panel, n);
  float scale = 0.0f, zero = 8.0f;
#if defined(__AVX512F__)
  F table = F{};
#endif
  for (int64_t k = 0; k < count; k += 32) {
    const int j = static_cast<int>(k / 32);
    if (k == 0 || (block * kBlock + k) % p.group == 0) {
      const int64_t at = groups + (block * kBlock + k) / p.group * kPanel;
      scale = p.linear.scales[at];
      if (p.zeros) zero = static_cast<float>(p.zeros[at]);
#if defined(__AVX512F__)
      table = (ramp() - zero) * scale;
#endif
    }
    for (int i = 0; i < 32; i += kLanes) {
      W w;
      memcpy(&w, words + i, sizeof w);
      const simd::U q = __builtin_convertvector(w, simd::U) >> (4 * j);
#if defined(__AVX512F__)
      simd::store(to + k + i, simd::bits<F>(_mm512_permutexvar_ps(simd::bits<__m512i>(q), simd::bits<__m512>(table))));
#else
      simd::store(to + k + i, (__builtin_convertvector(simd::bits<I>(q & 15u), F) - zero) * scale);
#endif
    }
  }
}

// -- as tiles ------------------------------------------------------------------------------------------------------------------------
#if CVMK_GEMM_TILES
constexpr int64_t kBlockTiles = kBlock / kTileInputs;
constexpr int64_t kAhead = 2;  // blocks that the packed weight is fetched ahead

// The values of two outputs' nibbles in bfloat16, each table twice, for the fifth bit of an index is the next nibble's.
template <bool kZeros>
CVMK_INLINE void tables(const float* scales, const uint8_t* zeros, __m512i* first, __m512i* second) {
  const __m512 shifted = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  __m512 a = shifted, b = shifted;
  if (kZeros) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    a = _mm512_sub_ps(codes, _mm512_set1_ps(static_cast<float>(zeros[0])));
    b = _mm512_sub_ps(codes, _mm512_set1_ps(static_cast<float>(zeros[1])));
  }
  a = _mm512_mul_ps(a, _mm512_set1_ps(scales[0]));
  b = _mm512_mul_ps(b, _mm512_set1_ps(scales[1]));
  const __m512i both = simd::bits<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  *first = _mm512_shuffle_i64x2(both, both, 0x44);
  *second = _mm512_shuffle_i64x2(both, both, 0xEE);
}

// A block of a panel as tiles [kBlockTiles][16 outputs][32 inputs]; the inputs behind the last one are whatever. `groups` are those of the
// block, of kGroup tiles each: scales and zeros at groups[i] + output.
template <bool kZeros, int kGroup>
inline void dequantise_block(const uint16_t* words, const float* scales, const uint8_t* zeros, const int64_t* groups, char* to) {
  for (int n = 0; n < kPanel; n += 2, words += kBlock / 2, to += 2 * kStep) {
    _mm_prefetch(reinterpret_cast<const char*>(words) + kAhead * kTile, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(words) + kAhead * kTile + kStep, _MM_HINT_T0);
    const __m512i w0 = _mm512_loadu_si512(words), w1 = _mm512_loadu_si512(words + kBlock / 4);
    __m512i t0, t1;
#pragma GCC unroll 4
    for (int j = 0; j < kBlockTiles; ++j) {
      if (j % kGroup == 0) tables<kZeros>(scales + groups[j / kGroup] + n, kZeros ? zeros + groups[j / kGroup] + n : nullptr, &t0, &t1);
      const unsigned shift = static_cast<unsigned>(4 * j);
      const __m512i q0 = j == 0 ? w0 : _mm512_srli_epi16(w0, shift), q1 = j == 0 ? w1 : _mm512_srli_epi16(w1, shift);
      _mm512_store_si512(to + j * kTile, _mm512_permutexvar_epi16(q0, t0));
      _mm512_store_si512(to + j * kTile + kStep, _mm512_permutexvar_epi16(q1, t1));
    }
  }
}

template <bool kZeros>
inline void dequantise_with(const Int4Linear& p, int64_t panel, int64_t block, char* to) {
  const uint16_t* words = words_of(p, panel, 0, block);
  const int64_t each = kBlock / p.group, all = p.linear.inputs / p.group;
  int64_t groups[kBlockTiles];
  for (int64_t i = 0; i < each; ++i) groups[i] = (panel * all + least(block * each + i, all - 1)) * kPanel;
  if (each == 1) return dequantise_block<kZeros, 4>(words, p.linear.scales, p.zeros, groups, to);
  if (each == 2) return dequantise_block<kZeros, 2>(words, p.linear.scales, p.zeros, groups, to);
  dequantise_block<kZeros, 1>(words, p.linear.scales, p.zeros, groups, to);
}

inline void dequantise_any(const Int4Linear& p, int64_t panel, int64_t block, char* to) {
  if (p.zeros) dequantise_with<true>(p, panel, block, to);
  else dequantise_with<false>(p, panel, block, to);
}
#endif

}  // namespace
}  // namespace cvmk::gemm
