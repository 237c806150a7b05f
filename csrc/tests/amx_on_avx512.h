// AMX tiles in AVX-512, so that tests run the AMX kernels on processors without AMX. Included by a compiler option before everything else
// (CVMK_EMULATE_AMX=ON), it puts functions over eight tiles of each thread in place of the intrinsics of <immintrin.h>.
//
// Semantics are those of Intel's manual (Software Developer's Manual, volume 2, LDTILECFG to TILEZERO). What the processor answers with an exception
// ends the process here with a sentence on standard error: a tile that is not configured, operands that do not fit, a wrong configuration.
// A difference: tiles belong to a thread and a source file, so a file cannot use tiles that another one has configured.
#pragma once

#if defined(__AMX_TILE__)

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VNNI__)
#error "the emulation of AMX needs AVX-512 F, BW and VNNI"
#endif

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {
namespace amx_on_avx512 {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

struct Tile {
  int rows, bytes;  // bytes of a row; both 0 where the tile is not configured
  alignas(64) unsigned char data[kRows][kBytes];  // what is behind the rows and bytes in use reaches nothing that is in use
};

struct Processor {
  bool configured;
  alignas(64) unsigned char config[64];
  Tile tiles[kTiles];
};

thread_local Processor processor;

[[noreturn]] inline void fail(const char* instruction, const char* why) {
  fprintf(stderr, "AMX emulation: %s: %s\n", instruction, why);
  abort();
}

inline Tile& tile_of(const char* instruction, int index) {
  Tile& t = processor.tiles[index];
  if (!processor.configured) fail(instruction, "tiles are not configured");
  if (t.rows == 0) fail(instruction, "this tile is not configured");
  return t;
}

inline void clear(Tile& t) { memset(t.data, 0, sizeof t.data); }

__attribute__((noinline, unused)) void release() {
  processor.configured = false;
  memset(processor.config, 0, sizeof processor.config);
  for (Tile& t : processor.tiles) {
    t.rows = t.bytes = 0;
    clear(t);
  }
}

// The 64 bytes: palette, start row, 14 reserved, 16 words of bytes a row, 16 bytes of rows; tiles 8 to 15 do not exist.
__attribute__((noinline, unused)) void load_config(const void* from) {
  const char* const name = "LDTILECFG";
  unsigned char config[64];
  uint16_t bytes[16];
  memcpy(config, from, sizeof config);
  memcpy(bytes, config + 16, sizeof bytes);
  release();
  if (config[0] == 0) return;
  if (config[0] != 1) fail(name, "the palette is neither 0 nor 1");
  if (config[1] >= kRows) fail(name, "the start row is above 15");
  for (int i = 2; i < 16; ++i)
    if (config[i] != 0) fail(name, "a reserved byte is not zero");
  for (int i = 0; i < 16; ++i) {
    const int rows = config[48 + i];
    if (i >= kTiles) {
      if (rows != 0 || bytes[i] != 0) fail(name, "a tile above 7 has a size");
      continue;
    }
    if (rows > kRows || bytes[i] > kBytes) fail(name, "a tile is larger than 16 rows of 64 bytes");
    if ((rows == 0) != (bytes[i] == 0)) fail(name, "a tile has rows without bytes or bytes without rows");
    processor.tiles[i].rows = rows;
    processor.tiles[i].bytes = bytes[i];
  }
  memcpy(processor.config, config, sizeof config);
  processor.configured = true;
}

__attribute__((noinline, unused)) void store_config(void* to) { memcpy(to, processor.config, sizeof processor.config); }

__attribute__((noinline, unused)) void zero(int index) { clear(tile_of("TILEZERO", index)); }

// Copies read and write what the processor would and no byte more, so that an address sanitizer judges the kernel.
__attribute__((noinline, unused)) void load(int index, const void* from, int64_t stride) {
  Tile& t = tile_of("TILELOADD", index);
  const char* row = static_cast<const char*>(from);
  for (int r = 0; r < t.rows; ++r, row += stride) {
    if (t.bytes == kBytes) memcpy(t.data[r], row, kBytes);
    else memcpy(t.data[r], row, static_cast<size_t>(t.bytes));
  }
}

__attribute__((noinline, unused)) void store(int index, void* to, int64_t stride) {
  const Tile& t = tile_of("TILESTORED", index);
  char* row = static_cast<char*>(to);
  for (int r = 0; r < t.rows; ++r, row += stride) {
    if (t.bytes == kBytes) memcpy(row, t.data[r], kBytes);
    else memcpy(row, t.data[r], static_cast<size_t>(t.bytes));
  }
}

// The three tiles of a product: sums [m][n] of 4 bytes, a [m][k] and b [k][n] of 4 bytes, each two bfloat16 or four integers along k.
struct Product {
  Tile& sums;
  const Tile &a, &b;

  Product(const char* name, int c, int left, int right) : sums(tile_of(name, c)), a(tile_of(name, left)), b(tile_of(name, right)) {
    if (c == left || c == right || left == right) fail(name, "the three tiles are not distinct");
    if (sums.bytes % 4 != 0 || a.bytes % 4 != 0 || b.bytes % 4 != 0) fail(name, "a row is no multiple of four bytes");
    if (sums.rows != a.rows) fail(name, "sums and left operand differ in rows");
    if (sums.bytes != b.bytes) fail(name, "sums and right operand differ in bytes a row");
    if (a.bytes / 4 != b.rows) fail(name, "columns of the left operand are not the rows of the right one");
  }

  int depth() const { return b.rows; }
  __m512i right(int k) const { return _mm512_load_si512(b.data[k]); }
  __m512i left(int m, int k) const {  // in every lane
    int32_t four;
    memcpy(&four, a.data[m] + 4 * k, sizeof four);
    return _mm512_set1_epi32(four);
  }
  __m512i sum(int m) const { return _mm512_load_si512(sums.data[m]); }
  void set_sum(int m, __m512i value) const { _mm512_store_si512(sums.data[m], value); }
};

// Products of tiles round to nearest even, take denormal numbers for zero and give none, whatever the thread has set. Operands are read from
// `processor` and sums written to it while this lives; the assembly may change it, so no arithmetic moves out.
class OwnRounding {
 public:
  OwnRounding() {
    const uint32_t wanted = 0x9FC0;  // all exceptions masked, FTZ, DAZ
    asm volatile("stmxcsr %0" : "=m"(kept_) : "r"(&processor) : "memory");
    asm volatile("ldmxcsr %0" : : "m"(wanted), "r"(&processor) : "memory");
  }
  ~OwnRounding() { asm volatile("ldmxcsr %0" : : "m"(kept_), "r"(&processor) : "memory"); }
  OwnRounding(const OwnRounding&) = delete;
  OwnRounding& operator=(const OwnRounding&) = delete;

 private:
  uint32_t kept_;
};

// TDPBF16PS: for each sum, the products of the even and of the odd numbers are summed up along k each for itself by fused multiply-adds
// from zero on, the two are added, and what comes out is added to the sum.
__attribute__((noinline, unused)) void dot_bf16(int c, int left, int right) {
  const Product p("TDPBF16PS", c, left, right);
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  alignas(64) float even[kRows][16], odd[kRows][16];
  const OwnRounding rounding;
  for (int k = 0; k < p.depth(); ++k) {
    _mm512_store_si512(even[k], _mm512_slli_epi32(p.right(k), 16));
    _mm512_store_si512(odd[k], _mm512_and_si512(p.right(k), high));
  }
  for (int m = 0; m < p.sums.rows; ++m) {
    __m512 low_sum = _mm512_setzero_ps(), high_sum = _mm512_setzero_ps();
    for (int k = 0; k < p.depth(); ++k) {
      const __m512i pair = p.left(m, k);
      low_sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), _mm512_load_ps(even[k]), low_sum);
      high_sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, high)), _mm512_load_ps(odd[k]), high_sum);
    }
    const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(p.sum(m)), _mm512_add_ps(low_sum, high_sum));
    p.set_sum(m, _mm512_castps_si512(sum));
  }
}

// The even or the odd bytes of each word, extended to 16 bits.
template <bool kSigned>
inline __m512i even_bytes(__m512i x) {
  return kSigned ? _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8) : _mm512_and_si512(x, _mm512_set1_epi16(0xFF));
}
template <bool kSigned>
inline __m512i odd_bytes(__m512i x) {
  return kSigned ? _mm512_srai_epi16(x, 8) : _mm512_srli_epi16(x, 8);
}

// TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD: four products of bytes a sum and k, exact, modulo 2^32.
template <bool kSignedA, bool kSignedB>
__attribute__((noinline, unused)) void dot_bytes(int c, int left, int right) {
  const Product p("TDPBxxD", c, left, right);
  for (int m = 0; m < p.sums.rows; ++m) {
    __m512i sum = p.sum(m);
    for (int k = 0; k < p.depth(); ++k) {
      const __m512i a = p.left(m, k), b = p.right(k);
      sum = _mm512_dpwssd_epi32(sum, even_bytes<kSignedA>(a), even_bytes<kSignedB>(b));
      sum = _mm512_dpwssd_epi32(sum, odd_bytes<kSignedA>(a), odd_bytes<kSignedB>(b));
    }
    p.set_sum(m, sum);
  }
}

// The numbers of tiles are part of an instruction: constants from 0 to 7.
template <int kIndex>
constexpr int tile() {
  static_assert(kIndex >= 0 && kIndex < kTiles, "there are eight tiles");
  return kIndex;
}

}  // namespace amx_on_avx512
}  // namespace

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud

#define CVMK_TILE(index) (amx_on_avx512::tile<(index)>())
#define _tile_loadconfig(config) amx_on_avx512::load_config(config)
#define _tile_storeconfig(config) amx_on_avx512::store_config(config)
#define _tile_release() amx_on_avx512::release()
#define _tile_zero(t) amx_on_avx512::zero(CVMK_TILE(t))
#define _tile_loadd(t, from, stride) amx_on_avx512::load(CVMK_TILE(t), from, stride)
#define _tile_stream_loadd(t, from, stride) amx_on_avx512::load(CVMK_TILE(t), from, stride)
#define _tile_stored(t, to, stride) amx_on_avx512::store(CVMK_TILE(t), to, stride)
#define _tile_dpbf16ps(c, a, b) amx_on_avx512::dot_bf16(CVMK_TILE(c), CVMK_TILE(a), CVMK_TILE(b))
#define _tile_dpbssd(c, a, b) amx_on_avx512::dot_bytes<true, true>(CVMK_TILE(c), CVMK_TILE(a), CVMK_TILE(b))
#define _tile_dpbsud(c, a, b) amx_on_avx512::dot_bytes<true, false>(CVMK_TILE(c), CVMK_TILE(a), CVMK_TILE(b))
#define _tile_dpbusd(c, a, b) amx_on_avx512::dot_bytes<false, true>(CVMK_TILE(c), CVMK_TILE(a), CVMK_TILE(b))
#define _tile_dpbuud(c, a, b) amx_on_avx512::dot_bytes<false, false>(CVMK_TILE(c), CVMK_TILE(a), CVMK_TILE(b))

#endif
