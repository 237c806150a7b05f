// Elements of every type at every level of this machine, against conversions of one number; and the table that finds a level's kernels.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/cpu_features.h"
#include "common/simd.h"
#include "scan/params.h"
#include "tests/check.h"
#include "tests/elements/params.h"

namespace {

using namespace cvmk;
using elements_test::Kernels;

static_assert(dtype_of_dlpack(2, 32, 1) == kFloat32 && dtype_of_dlpack(4, 16, 1) == kBFloat16 && dtype_of_dlpack(2, 16, 1) == kFloat16);
static_assert(dtype_of_dlpack(2, 64, 1) == kFloat64 && dtype_of_dlpack(0, 32, 1) == kInt32 && dtype_of_dlpack(0, 64, 1) == kInt64);
static_assert(dtype_of_dlpack(0, 8, 1) == kInt8 && dtype_of_dlpack(1, 8, 1) == kUint8 && dtype_of_dlpack(0, 16, 1) == kInt16);
static_assert(dtype_of_dlpack(5, 64, 1) == kNoDtype && dtype_of_dlpack(2, 32, 4) == kNoDtype && dtype_of_dlpack(1, 16, 1) == kNoDtype);
static_assert(size_of(kFloat32) == 4 && size_of(kBFloat16) == 2 && size_of(kFloat16) == 2 && size_of(kFloat64) == 8 && size_of(kInt64) == 8);
static_assert(size_of(kInt32) == 4 && size_of(kInt8) == 1 && size_of(kUint8) == 1 && size_of(kInt16) == 2);
static_assert(least(3, 5) == 3 && most(3, 5) == 5 && pieces(10, 4) == 3 && pieces(0, 4) == 0 && up(10, 4) == 12 && up(8, 4) == 8);

constexpr unsigned char kGuard = 0xA5;

float as_float(const unsigned char* p, Dtype type) {
  if (type == kFloat64) {
    double x;
    std::memcpy(&x, p, 8);
    return static_cast<float>(x);
  }
  if (type == kFloat32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  std::uint16_t word;
  std::memcpy(&word, p, 2);
  return type == kBFloat16 ? simd::bits<float>(static_cast<std::uint32_t>(word) << 16) : simd::half_to_float(word);
}

// The nearest number of the type, halves to even; `flushed`: subnormal numbers are 0 on their way to bfloat16.
float rounded(float x, Dtype type, bool flushed) {
  if (type == kFloat16) return simd::half_to_float(simd::float_to_half(x));
  if (type != kBFloat16 || std::isnan(x)) return x;
  if (flushed && std::fabs(x) < std::numeric_limits<float>::min()) return std::copysign(0.0f, x);
  const auto u = simd::bits<std::uint32_t>(x);
  return simd::bits<float>((u + 0x7FFFu + ((u >> 16) & 1u)) & 0xFFFF0000u);
}

bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || simd::bits<std::uint32_t>(a) == simd::bits<std::uint32_t>(b); }

std::vector<float> numbers(std::size_t count) {
  std::vector<float> found = {0.0f, -0.0f, 1.0f, -2.5f, 65504.0f, 65519.9f, 65520.0f, 3.3e38f, -3.4028235e38f, 1e-40f, -1e-45f, 6e-8f, 2.9e-8f, 1.00390625f, 1.01171875f,
                              std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), std::nanf("")};
  std::mt19937 generator(5);
  while (found.size() < count) {
    const float x = simd::bits<float>(static_cast<std::uint32_t>(generator()));
    found.push_back(found.size() % 2 == 0 ? x : std::fmod(x, 8.0f));
  }
  found.resize(count);
  return found;
}

void check_level(const Kernels& k, IsaLevel level) {
  const bool flushed = level == IsaLevel::kAmx;
  for (const Dtype type : {kFloat32, kBFloat16, kFloat16, kFloat64}) {
    const std::size_t size = static_cast<std::size_t>(size_of(type));
    bool good = true;
    for (std::size_t n = 0; n < 70; ++n) {
      const std::vector<float> from = numbers(n);
      std::vector<unsigned char> raw(n * size + 8, kGuard);
      k.from_floats(raw.data(), type, from.data(), 0.5f, static_cast<int64_t>(n));
      for (std::size_t i = 0; i < n; ++i) good &= same(as_float(raw.data() + i * size, type), rounded(from[i] * 0.5f, type, flushed));
      for (std::size_t i = n * size; i < raw.size(); ++i) good &= raw[i] == kGuard;
      const std::size_t padded = (n + 15) / 16 * 16 + 16;
      std::vector<float> back(padded, -1.0f), singly(n);
      k.to_floats(back.data(), raw.data(), type, static_cast<int64_t>(n), static_cast<int64_t>(padded));
      k.copy_singly(singly.data(), raw.data(), type, static_cast<int64_t>(n));
      for (std::size_t i = 0; i < n; ++i) good &= same(back[i], as_float(raw.data() + i * size, type)) && same(singly[i], back[i]);
      for (std::size_t i = n; i < padded; ++i) good &= simd::bits<std::uint32_t>(back[i]) == 0;
    }
    CHECK(good);
    std::vector<float> nothing(32, 1.0f);
    k.to_floats(nothing.data(), nullptr, type, 17, 32);
    CHECK(nothing == std::vector<float>(32, 0.0f));
  }
}

// From every type to every other, memory behind the last element as it was.
void check_copies(const Kernels& k, IsaLevel level) {
  const bool flushed = level == IsaLevel::kAmx;
  for (const Dtype from_type : {kFloat32, kBFloat16, kFloat16, kFloat64})
    for (const Dtype to_type : {kFloat32, kBFloat16, kFloat16, kFloat64}) {
      bool good = true;
      const std::size_t from_size = static_cast<std::size_t>(size_of(from_type)), to_size = static_cast<std::size_t>(size_of(to_type));
      for (const std::size_t n : {std::size_t{1}, std::size_t{7}, std::size_t{16}, std::size_t{45}}) {
        const std::vector<float> values = numbers(n);
        std::vector<unsigned char> from(n * from_size), to(n * to_size + 3, kGuard);
        k.from_floats(from.data(), from_type, values.data(), 1.0f, static_cast<int64_t>(n));
        k.copy(to.data(), to_type, from.data(), from_type, static_cast<int64_t>(n));
        for (std::size_t i = 0; i < n; ++i)
          good &= same(as_float(to.data() + i * to_size, to_type), rounded(as_float(from.data() + i * from_size, from_type), to_type, flushed));
        for (std::size_t i = n * to_size; i < to.size(); ++i) good &= to[i] == kGuard;
      }
      CHECK(good);
    }
}

// All 65,536 words of both narrow types.
void check_words(const Kernels& k) {
  std::vector<std::uint16_t> words(1 << 16);
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = static_cast<std::uint16_t>(i);
  std::vector<float> found(words.size());
  for (const Dtype type : {kBFloat16, kFloat16}) {
    k.to_floats(found.data(), words.data(), type, static_cast<int64_t>(words.size()), static_cast<int64_t>(words.size()));
    bool good = true;
    for (std::size_t i = 0; i < words.size(); ++i) good &= same(found[i], as_float(reinterpret_cast<const unsigned char*>(&words[i]), type));
    CHECK(good);
  }
}

void check_streams(const Kernels& k, IsaLevel level) {
  alignas(64) unsigned char to[64 * 4 + 64];
  const std::vector<float> from = numbers(64);
  for (const Dtype type : {kFloat32, kBFloat16, kFloat16}) {
    std::memset(to, kGuard, sizeof to);
    k.stream(to, type, from.data(), 64);
    bool good = true;
    const auto size = static_cast<std::size_t>(size_of(type));
    for (std::size_t i = 0; i < 64; ++i) good &= same(as_float(to + i * size, type), rounded(from[i], type, level == IsaLevel::kAmx));
    for (std::size_t i = 64 * size; i < sizeof to; ++i) good &= to[i] == kGuard;
    CHECK(good);
  }
}

void check_table() {
  const IsaLevel most_of_all = level_of(cpu_features());
  const bool several = std::strcmp(elements_test::kernels(IsaLevel::kAmx).level, "base") != 0;  // false where the compiler has one level only
  for (int i = 0; i < 4; ++i) {
    const auto level = static_cast<IsaLevel>(i);
    CHECK(std::string(elements_test::kernels(level).level) == (several ? level_name(level) : "base"));
  }
  // The scan has no amx level.
  CHECK(&scan::kernels(IsaLevel::kAmx) == &scan::kernels(IsaLevel::kAvx512));
  CHECK(several == (&scan::kernels(IsaLevel::kAvx512) != &scan::kernels(IsaLevel::kBase)));
  testing::at_every_level([] { CHECK(&elements_test::kernels() == &elements_test::kernels(dispatch_level())); });
  if (several && std::getenv("CVMK_CPU_ISA") == nullptr) {
    CHECK(&elements_test::kernels() == &elements_test::kernels(most_of_all));
    setenv("CVMK_CPU_ISA", "base", 1);
    CHECK(std::string(elements_test::kernels().level) == "base");
    unsetenv("CVMK_CPU_ISA");
  }
}

}  // namespace

int main() {
  check_table();
  for (int i = 0; i <= static_cast<int>(level_of(cpu_features())); ++i) {
    const auto level = static_cast<IsaLevel>(i);
    const Kernels& k = elements_test::kernels(level);
    if (std::string(k.level) != level_name(level)) continue;
    CHECK(k.lanes == (level >= IsaLevel::kAvx512 ? 16 : level == IsaLevel::kAvx2 ? 8 : 4));
    check_level(k, level);
    check_copies(k, level);
    check_words(k);
    check_streams(k, level);
  }
  return testing::check_result();
}
