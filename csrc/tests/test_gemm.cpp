// The quantised linears against loops over single numbers, at every level that this processor has.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/cpu_features.h"
#include "common/scratch.h"
#include "gemm/params.h"
#include "tests/check.h"
#include "tests/random.h"

namespace {

using namespace cvmk;
using namespace cvmk::gemm;

using cvmk::testing::Random;

std::size_t padded(int n, int to) { return static_cast<std::size_t>((n + to - 1) / to * to); }

// Small whole numbers: every sum is exact in float32, so the results must be equal.
Linear linear_of(const std::vector<float>& x, std::vector<float>& out, const std::vector<float>& scales, int m, int k, int n) {
  Linear l{};
  l.x = x.data();
  l.x_stride = k;
  l.out = out.data();
  l.scales = scales.data();
  l.rows = m;
  l.inputs = k;
  l.outputs = n;
  return l;
}

// Sums are exact. `within`: by a range of 127 that inputs go beyond, in a call and by rows that are quantised before it, and a row with a NaN gives NaN.
void int8_is_exact(int m, int k, int n, bool within = false) {
  Random random;
  const std::size_t steps = padded(k, kStep), panels = padded(n, kPanel);
  std::vector<float> x(static_cast<std::size_t>(m) * static_cast<std::size_t>(k)), out(static_cast<std::size_t>(m * n), -1.0f), scales(panels + kPanel, 0.0f);
  std::vector<int> w(static_cast<std::size_t>(n * k));
  for (float& v : x) v = static_cast<float>(random.below(255) - 127);
  for (int r = 0; r < m && !within; ++r) x[static_cast<std::size_t>(r * k)] = 127;  // so the step is 1
  for (std::size_t i = 0; i < x.size() && within; ++i)
    if (random.below(4) == 0) x[i] *= static_cast<float>(1 + random.below(1 << 20));
  const int broken = within ? m / 2 : m;
  if (broken < m) x[static_cast<std::size_t>(broken * k + k - 1)] = m % 2 ? __builtin_nanf("") : -__builtin_inff();
  for (int& v : w) v = random.below(255) - 127;
  for (int i = 0; i < n; ++i) scales[static_cast<std::size_t>(i)] = 1.0f;
  std::vector<std::int8_t> packed(panels * steps + panels * 4, 0);
  for (int i = 0; i < n; ++i) {
    std::int32_t sum = 0;
    for (int j = 0; j < k; ++j) {
      const int value = w[static_cast<std::size_t>(i * k + j)];
      sum += value;
      packed[static_cast<std::size_t>(i / 16 * 16) * steps + static_cast<std::size_t>(j / 4 * 64 + i % 16 * 4 + j % 4)] = static_cast<std::int8_t>(value);
    }
    sum *= -128;
    std::memcpy(packed.data() + panels * steps + static_cast<std::size_t>(i) * 4, &sum, 4);
  }
  Int8Linear p{};
  p.linear = linear_of(x, out, scales, m, k, n);
  p.weight = packed.data();
  p.range = within ? 127.0f : 0.0f;
  cvmk::run(kernels_for(p).int8, p, cvmk::openmp_team());
  bool equal = true;
  if (within) {
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(byte_rows_size(m, k)));
    std::vector<float> row_scales(static_cast<std::size_t>(m)), again(out.size(), -1.0f);
    ByteRows rows{x.data(), m, k, 0, bytes.data(), row_scales.data(), nullptr, false, 127.0f};
    const auto& before = kernels_for(rows).byte_rows;
    cvmk::run(before, rows, cvmk::Team{});
    p.prepared = &rows;
    p.linear.out = again.data();
    cvmk::run(kernels_for(p).int8, p, cvmk::openmp_team());
    equal = std::memcmp(out.data(), again.data(), out.size() * 4) == 0;
  }
  for (int r = 0; r < m; ++r)
    for (int c = 0; c < n; ++c) {
      std::int64_t sum = 0;
      const float found = out[static_cast<std::size_t>(r * n + c)];
      if (r == broken) {
        equal = equal && found != found;
        continue;
      }
      for (int j = 0; j < k; ++j) sum += static_cast<std::int64_t>(std::clamp(x[static_cast<std::size_t>(r * k + j)], -127.0f, 127.0f)) * w[static_cast<std::size_t>(c * k + j)];
      equal = equal && found == static_cast<float>(sum);
    }
  CHECK(equal);
}

std::uint16_t nearest_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// With `formats` groups have zero points and the inputs stand in reverse order.
void int4_is_exact(int m, int k, int n, int group, bool bfloat16, bool formats) {
  Random random;
  const std::size_t blocks = padded(k, 128) / 128, panels = padded(n, kPanel), groups = static_cast<std::size_t>(k / group);
  std::vector<float> x(static_cast<std::size_t>(m * k)), out(static_cast<std::size_t>(m * n), -1.0f), scales(panels * groups, 0.0f);
  std::vector<std::uint16_t> halves(x.size());
  std::vector<int> q(static_cast<std::size_t>(n * k));
  std::vector<std::uint16_t> packed(panels * blocks * 32, 0);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(random.below(17) - 8);
    std::uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    halves[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  for (int& v : q) v = random.below(16);
  for (int i = 0; i < n; ++i) {
    for (std::size_t g = 0; g < groups; ++g) scales[(static_cast<std::size_t>(i / 16) * groups + g) * 16 + static_cast<std::size_t>(i % 16)] = static_cast<float>(1 << g % 3);
    for (int j = 0; j < k; ++j) {
      const std::size_t word = ((static_cast<std::size_t>(i / 16) * blocks + static_cast<std::size_t>(j / 128)) * 16 + static_cast<std::size_t>(i % 16)) * 32 + static_cast<std::size_t>(j % 32);
      packed[word] = static_cast<std::uint16_t>(packed[word] | q[static_cast<std::size_t>(i * k + j)] << 4 * (j % 128 / 32));
    }
  }
  Int4Linear p{};
  p.linear = linear_of(x, out, scales, m, k, n);
  std::vector<std::uint16_t> rounded(out.size());
  if (bfloat16) {
    p.linear.x = halves.data();
    p.linear.out = rounded.data();
    p.linear.x_dtype = p.linear.out_dtype = kBFloat16;
  }
  p.weight = packed.data();
  p.group = group;
  std::vector<std::uint8_t> zeros(panels * groups, 8);
  std::vector<std::int32_t> order(static_cast<std::size_t>(k));
  for (int j = 0; j < k; ++j) order[static_cast<std::size_t>(j)] = formats ? k - 1 - j : j;
  if (formats) {
    for (std::uint8_t& zero : zeros) zero = static_cast<std::uint8_t>(random.below(16));
    p.zeros = zeros.data();
    p.order = order.data();
  }
  const auto zero_of = [&](int output, int input) {
    return zeros[(static_cast<std::size_t>(output / 16) * groups + static_cast<std::size_t>(input / group)) * 16 + static_cast<std::size_t>(output % 16)];
  };
  cvmk::run(kernels().int4, p, cvmk::openmp_team());
  bool equal = true;
  for (int r = 0; r < m; ++r)
    for (int c = 0; c < n; ++c) {
      double sum = 0;
      for (int j = 0; j < k; ++j) {
        const double input = static_cast<double>(x[static_cast<std::size_t>(r * k + order[static_cast<std::size_t>(j)])]);
        sum += input * (q[static_cast<std::size_t>(c * k + j)] - zero_of(c, j)) * (1 << j / group % 3);
      }
      const std::size_t at = static_cast<std::size_t>(r * n + c);
      equal = equal && (bfloat16 ? rounded[at] == nearest_bfloat16(static_cast<float>(sum)) : static_cast<double>(out[at]) == sum);
    }
  CHECK(equal);
}

// Rows of whole bytes, whole weights and scales that are powers of two: every sum is exact.
void int4_bytes_are_exact(int m, int k, int n, int group) {
  Random random;
  const std::size_t panels = padded(n, kPanel) / kPanel, groups = static_cast<std::size_t>(k / group), steps = static_cast<std::size_t>(k / 8);
  std::vector<float> x(static_cast<std::size_t>(m * k)), out(static_cast<std::size_t>(m * n), -1.0f), scales(panels * groups * kPanel, 0.0f);
  std::vector<int> w(static_cast<std::size_t>(n * k));
  std::vector<std::uint8_t> packed(panels * steps * kStep, 0);
  for (float& v : x) v = static_cast<float>(random.below(255) - 127);
  for (int r = 0; r < m; ++r) x[static_cast<std::size_t>(r * k)] = 127;  // so the step is 1
  for (int i = 0; i < n; ++i) {
    const std::size_t panel = static_cast<std::size_t>(i / kPanel), lane = static_cast<std::size_t>(i % kPanel);
    for (std::size_t g = 0; g < groups; ++g) scales[(panel * groups + g) * kPanel + lane] = static_cast<float>(1 << random.below(3));
    for (int j = 0; j < k; ++j) {
      const int value = random.below(16);
      w[static_cast<std::size_t>(i * k + j)] = value - 8;
      packed[(panel * steps + static_cast<std::size_t>(j / 8)) * kStep + lane * 4 + static_cast<std::size_t>(j % 4)] |= static_cast<std::uint8_t>(value << (j % 8 / 4 * 4));
    }
  }
  Int4Bytes p{};
  p.linear = linear_of(x, out, scales, m, k, n);
  p.weight = packed.data();
  p.group = group;
  cvmk::run(kernels_for(p).int4_bytes, p, cvmk::openmp_team());
  bool equal = true;
  for (int r = 0; r < m; ++r)
    for (int c = 0; c < n; ++c) {
      double sum = 0.0;
      for (int j = 0; j < k; ++j) {
        const std::size_t scale = (static_cast<std::size_t>(c / kPanel) * groups + static_cast<std::size_t>(j / group)) * kPanel + static_cast<std::size_t>(c % kPanel);
        sum += static_cast<double>(x[static_cast<std::size_t>(r * k + j)]) * w[static_cast<std::size_t>(c * k + j)] * static_cast<double>(scales[scale]);
      }
      equal = equal && static_cast<double>(out[static_cast<std::size_t>(r * n + c)]) == sum;
    }
  CHECK(equal);
}

// Small whole numbers, exact in bfloat16 too; gated halves fill panels of their own.
void floats_are_exact(int m, int k, int n, Dtype dtype, Activation activation) {
  Random random;
  const int parts = activation == kSwiglu ? 2 : 1, columns = n / parts;
  const std::size_t panels = padded(columns, kFloatPanel) / kFloatPanel, depth = static_cast<std::size_t>(k);
  std::vector<float> x(static_cast<std::size_t>(m * k)), out(static_cast<std::size_t>(m * columns), -1.0f), bias(static_cast<std::size_t>(n)), w(static_cast<std::size_t>(n * k));
  std::vector<float> wide(panels * static_cast<std::size_t>(parts) * depth * kFloatPanel, 0.0f);
  std::vector<std::uint16_t> narrow(wide.size(), 0);
  for (auto* numbers : {&x, &bias, &w})
    for (float& v : *numbers) v = static_cast<float>(random.below(17) - 8);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < k; ++j) {
      const std::size_t panel = static_cast<std::size_t>(i / columns) * panels + static_cast<std::size_t>(i % columns) / kFloatPanel;
      const std::size_t at = (panel * depth + static_cast<std::size_t>(j)) * kFloatPanel + static_cast<std::size_t>(i % columns) % kFloatPanel;
      wide[at] = w[static_cast<std::size_t>(i * k + j)];
      std::uint32_t bits;
      std::memcpy(&bits, &wide[at], 4);
      narrow[at] = static_cast<std::uint16_t>(bits >> 16);
    }
  FloatLinear p{};
  p.linear = linear_of(x, out, bias, m, k, n);
  p.linear.scales = nullptr;
  p.linear.bias = bias.data();
  p.linear.activation = activation;
  p.weight = dtype == kFloat32 ? static_cast<const void*>(wide.data()) : narrow.data();
  p.weight_dtype = dtype;
  cvmk::run(kernels().floats, p, cvmk::openmp_team());
  bool close = true;
  for (int r = 0; r < m; ++r)
    for (int c = 0; c < columns; ++c) {
      double sum[2] = {0.0, 0.0};
      for (int part = 0; part < parts; ++part) {
        const std::size_t row = static_cast<std::size_t>(part * columns + c);
        sum[part] = static_cast<double>(bias[row]);
        for (std::size_t j = 0; j < depth; ++j) sum[part] += static_cast<double>(x[static_cast<std::size_t>(r) * depth + j]) * static_cast<double>(w[row * depth + j]);
      }
      const double expected = activation == kSwiglu ? sum[0] / (1.0 + std::exp(-sum[0])) * sum[1] : activation == kRelu ? std::max(sum[0], 0.0) : sum[0];
      const double found = static_cast<double>(out[static_cast<std::size_t>(r * columns + c)]);
      close = close && (activation == kSwiglu ? std::fabs(found - expected) <= 1e-5 * std::fabs(expected) + 1e-6 : found == expected);
    }
  CHECK(close);
}

}  // namespace

int main() {
  cvmk::testing::at_every_level([] {
    for (const auto& shape : {std::vector<int>{1, 1, 1}, {1, 65, 17}, {3, 130, 70}, {5, 64, 16}, {17, 200, 33}, {40, 1100, 48}, {70, 600, 100}, {300, 640, 40}}) {
      int8_is_exact(shape[0], shape[1], shape[2]);
      int8_is_exact(shape[0], shape[1], shape[2], true);
    }
    for (const auto& shape : {std::vector<int>{1, 32, 1, 32}, {1, 160, 17, 32}, {2, 128, 70, 64}, {16, 384, 33, 128}, {17, 96, 16, 32}, {40, 1152, 48, 64}, {70, 640, 100, 128}, {150, 256, 300, 64}, {530, 544, 33, 32}})
      for (const bool bfloat16 : {false, true})
        for (const bool formats : {false, true}) int4_is_exact(shape[0], shape[1], shape[2], shape[3], bfloat16, formats);
    for (const auto& shape : {std::vector<int>{1, 16, 1, 16}, {1, 160, 17, 32}, {2, 128, 70, 64}, {5, 384, 33, 128}, {30, 96, 100, 16}, {70, 640, 130, 128}}) int4_bytes_are_exact(shape[0], shape[1], shape[2], shape[3]);
    for (const auto& shape : {std::vector<int>{1, 1, 2}, {1, 65, 18}, {3, 130, 70}, {7, 64, 256}, {60, 300, 200}})
      for (const Dtype dtype : {kFloat32, kBFloat16})
        for (const Activation activation : {kNone, kRelu, kSwiglu}) floats_are_exact(shape[0], shape[1], shape[2], dtype, activation);
  });
  return cvmk::testing::check_result();
}
