// The emulated AMX instructions against plain loops written after Intel's manual, and what each refuses. Built with CVMK_EMULATE_AMX=ON only.
#include <sys/wait.h>
#include <unistd.h>

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/amx.h"

namespace {

using cvmk::testing::check_result;

std::mt19937 random_bits(1);

struct Config : TileConfig {
  Config() : TileConfig{1, 0, {}, {}, {}} {}
  Config& tile(int index, int rows_of_it, int bytes_of_it) {
    rows[index] = static_cast<uint8_t>(rows_of_it);
    row_bytes[index] = static_cast<uint16_t>(bytes_of_it);
    return *this;
  }
};

// Sums in tile 0 [m][n], operands in 1 [m][k] and 2 [k][n].
Config product_config(int m, int k, int n) { return Config().tile(0, m, 4 * n).tile(1, m, 4 * k).tile(2, k, 4 * n); }

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

float from_bf16(uint16_t half) {
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return flushed(x);
}

struct Operands {
  int m, k, n;
  std::vector<uint8_t> a, b;  // [m][k][4], [k][n][4]
  std::vector<uint32_t> c;    // [m][n]

  Operands(int m_, int k_, int n_) : m(m_), k(k_), n(n_), a(static_cast<size_t>(4 * m * k)), b(static_cast<size_t>(4 * k * n)), c(static_cast<size_t>(m * n)) {
    for (uint8_t& x : a) x = static_cast<uint8_t>(random_bits());
    for (uint8_t& x : b) x = static_cast<uint8_t>(random_bits());
    for (uint32_t& x : c) x = static_cast<uint32_t>(random_bits());
  }
  uint8_t a_byte(int i, int j, int part) const { return a[static_cast<size_t>(4 * (i * k + j) + part)]; }
  uint8_t b_byte(int j, int l, int part) const { return b[static_cast<size_t>(4 * (j * n + l) + part)]; }
  static uint16_t half_of(const std::vector<uint8_t>& from, int index) {
    uint16_t half;
    std::memcpy(&half, from.data() + 2 * index, sizeof half);
    return half;
  }
  uint16_t a_half(int i, int j, int part) const { return half_of(a, 2 * (i * k + j) + part); }
  uint16_t b_half(int j, int l, int part) const { return half_of(b, 2 * (j * n + l) + part); }
  float sum(int i, int l) const {
    float x;
    std::memcpy(&x, &c[static_cast<size_t>(i * n + l)], sizeof x);
    return x;
  }

  // bfloat16 numbers and sums of about 1, with zeros, denormal numbers and large ones among them.
  void make_floats() {
    const auto draw = [] {
      const uint32_t bits = static_cast<uint32_t>(random_bits());
      if (bits % 16 == 0) return static_cast<uint16_t>(bits >> 16 & 0x80FFu);               // zero or denormal
      if (bits % 16 == 1) return static_cast<uint16_t>((bits >> 16 & 0x807Fu) | 0x1000u);   // products below the least normal number
      return static_cast<uint16_t>((bits >> 16 & 0x83FFu) | 0x3C00u);
    };
    for (std::vector<uint8_t>* v : {&a, &b})
      for (size_t i = 0; i < v->size(); i += 2) {
        const uint16_t half = draw();
        std::memcpy(v->data() + i, &half, sizeof half);
      }
    for (uint32_t& x : c) x = static_cast<uint32_t>(draw()) << 16;
  }

  // The product by the instruction that `dot` is; sums before it in c, padded memory around them.
  template <typename Dot>
  std::vector<uint32_t> multiplied(const Dot& dot) const {
    constexpr size_t kStride = 96;
    std::vector<uint8_t> sums(kStride * 18, 0xA5);
    for (int i = 0; i < m; ++i) std::memcpy(&sums[kStride * static_cast<size_t>(i + 1)], &c[static_cast<size_t>(i * n)], static_cast<size_t>(4 * n));
    const std::vector<uint8_t> before = sums;
    const Config config = product_config(m, k, n);
    _tile_loadconfig(&config);
    _tile_loadd(0, sums.data() + kStride, static_cast<int64_t>(kStride));
    _tile_loadd(1, a.data(), 4 * k);
    _tile_stream_loadd(2, b.data(), 4 * n);
    dot();
    _tile_stored(0, sums.data() + kStride, static_cast<int64_t>(kStride));
    _tile_release();
    std::vector<uint32_t> found(c.size());
    bool untouched = true;
    for (size_t r = 0; r < 18; ++r)
      for (size_t x = 0; x < kStride; ++x) {
        const bool inside = r >= 1 && r <= static_cast<size_t>(m) && x < static_cast<size_t>(4 * n);
        untouched = untouched && (inside || sums[r * kStride + x] == before[r * kStride + x]);
      }
    CHECK(untouched);
    for (int i = 0; i < m; ++i) std::memcpy(&found[static_cast<size_t>(i * n)], &sums[kStride * static_cast<size_t>(i + 1)], static_cast<size_t>(4 * n));
    return found;
  }
};

template <typename Body>
void over_shapes(const Body& body) {
  for (const int m : {1, 5, 16})
    for (const int k : {1, 7, 16})
      for (const int n : {1, 9, 16}) body(Operands(m, k, n));
}

// Even and odd numbers are summed up each for themselves.
float bf16_sum(const Operands& o, int i, int l) {
  float part[2] = {0.0f, 0.0f};
  for (int j = 0; j < o.k; ++j)
    for (int p = 0; p < 2; ++p) part[p] = flushed(std::fma(from_bf16(o.a_half(i, j, p)), from_bf16(o.b_half(j, l, p)), part[p]));
  return flushed(flushed(o.sum(i, l)) + flushed(part[0] + part[1]));
}

void products_of_bfloat16() {
  over_shapes([](Operands o) {
    o.make_floats();
    const std::vector<uint32_t> found = o.multiplied([] { _tile_dpbf16ps(0, 1, 2); });
    bool same = true;
    for (int i = 0; i < o.m; ++i)
      for (int l = 0; l < o.n; ++l) {
        const float wanted = bf16_sum(o, i, l);
        same = same && std::memcmp(&wanted, &found[static_cast<size_t>(i * o.n + l)], 4) == 0;
      }
    CHECK(same);
  });
}

// What the thread has set counts for nothing, and stays.
void rounding_is_the_instruction_s_own() {
  Operands o(16, 16, 16);
  o.make_floats();
  const auto dot = [] { _tile_dpbf16ps(0, 1, 2); };
  const std::vector<uint32_t> wanted = o.multiplied(dot);
  const unsigned kept = _mm_getcsr();
  for (const unsigned mode : {0x3F80u, 0x5F80u, 0x7FC0u, 0x9F80u}) {
    _mm_setcsr(mode);
    const std::vector<uint32_t> found = o.multiplied(dot);
    CHECK((_mm_getcsr() & ~0x3Fu) == (mode & ~0x3Fu));
    _mm_setcsr(kept);
    CHECK(found == wanted);
  }
}

int byte_as(uint8_t x, bool is_signed) { return is_signed ? static_cast<int8_t>(x) : x; }

template <typename Dot>
void products_of_bytes(bool signed_a, bool signed_b, const Dot& dot) {
  over_shapes([&](const Operands& o) {
    const std::vector<uint32_t> found = o.multiplied(dot);
    bool same = true;
    for (int i = 0; i < o.m; ++i)
      for (int l = 0; l < o.n; ++l) {
        uint32_t sum = o.c[static_cast<size_t>(i * o.n + l)];
        for (int j = 0; j < o.k; ++j)
          for (int p = 0; p < 4; ++p) sum += static_cast<uint32_t>(byte_as(o.a_byte(i, j, p), signed_a) * byte_as(o.b_byte(j, l, p), signed_b));
        same = same && found[static_cast<size_t>(i * o.n + l)] == sum;
      }
    CHECK(same);
  });
}

void a_configuration_clears_all_tiles() {
  const std::vector<uint8_t> ones(1024, 1);
  std::vector<uint8_t> out(1024, 7);
  configure_tiles(Config().tile(3, 16, 64));
  _tile_loadd(3, ones.data(), 64);
  _tile_stored(3, out.data(), 64);
  CHECK(out == ones);
  _tile_zero(3);
  _tile_stored(3, out.data(), 64);
  CHECK(out == std::vector<uint8_t>(1024, 0));
  _tile_loadd(3, ones.data(), 64);
  configure_tiles(Config().tile(3, 16, 64));
  out.assign(1024, 7);
  _tile_stored(3, out.data(), 64);
  CHECK(out == std::vector<uint8_t>(1024, 0));
  TileConfig stored;
  _tile_storeconfig(&stored);
  const Config wanted = Config().tile(3, 16, 64);
  CHECK(std::memcmp(&stored, &wanted, 64) == 0);
  _tile_release();
  _tile_storeconfig(&stored);
  CHECK(std::memcmp(&stored, std::vector<uint8_t>(64, 0).data(), 64) == 0);
}

// The process of its own that runs `body` is ended by a sentence with these words.
template <typename Body>
void is_refused(const char* words, const Body& body) {
  int ends[2];
  if (pipe(ends) != 0) return CHECK(!"pipe");
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char part[256];
  for (ssize_t n = 0; (n = read(ends[0], part, sizeof part)) > 0;) said.append(part, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool refused = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT && said.find(words) != std::string::npos;
  if (!refused) std::fprintf(stderr, "wanted: %s; said: %s\n", words, said.c_str());
  CHECK(refused);
}

void wrong_uses_end_the_process() {
  static char memory[1024];
  is_refused("TILELOADD: tiles are not configured", [] { _tile_loadd(0, memory, 64); });
  is_refused("TILEZERO: tiles are not configured", [] {
    configure_tiles(kWholeTiles);
    _tile_release();
    _tile_zero(0);
  });
  is_refused("TILEZERO: tiles are not configured", [] {  // another thread's configuration is not this one's
    configure_tiles(kWholeTiles);
    std::thread([] { _tile_zero(0); }).join();
  });
  is_refused("TILESTORED: this tile is not configured", [] {
    configure_tiles(Config().tile(1, 16, 64));
    _tile_stored(0, memory, 64);
  });
  const auto product = [](const Config& config) {
    return [config] {
      configure_tiles(config);
      _tile_dpbf16ps(0, 1, 2);
    };
  };
  is_refused("sums and left operand differ in rows", product(product_config(4, 4, 4).tile(1, 5, 16)));
  is_refused("sums and right operand differ in bytes", product(product_config(4, 4, 4).tile(2, 4, 20)));
  is_refused("columns of the left operand are not the rows", product(product_config(4, 4, 4).tile(1, 4, 20)));
  is_refused("no multiple of four", product(product_config(4, 4, 4).tile(1, 4, 15)));
  is_refused("not distinct", [] {
    configure_tiles(kWholeTiles);
    _tile_dpbssd(0, 1, 1);
  });
  const auto configured = [](int byte, uint8_t value) {
    return [byte, value] {
      TileConfig config = kWholeTiles;
      reinterpret_cast<uint8_t*>(&config)[byte] = value;
      configure_tiles(config);
    };
  };
  is_refused("palette", configured(0, 2));
  is_refused("start row", configured(1, 16));
  is_refused("reserved", configured(9, 1));
  is_refused("larger than 16 rows of 64 bytes", configured(16, 65));
  is_refused("larger than 16 rows of 64 bytes", configured(48, 17));
  is_refused("rows without bytes", configured(16, 0));
  is_refused("above 7", configured(56, 1));
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) return std::puts("skipped: no AVX-512 with VNNI and BF16"), 0;
  products_of_bfloat16();
  rounding_is_the_instruction_s_own();
  products_of_bytes(true, true, [] { _tile_dpbssd(0, 1, 2); });
  products_of_bytes(true, false, [] { _tile_dpbsud(0, 1, 2); });
  products_of_bytes(false, true, [] { _tile_dpbusd(0, 1, 2); });
  products_of_bytes(false, false, [] { _tile_dpbuud(0, 1, 2); });
  a_configuration_clears_all_tiles();
  wrong_uses_end_the_process();
  return check_result();
}
