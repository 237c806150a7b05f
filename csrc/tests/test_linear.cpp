// The linear layer and its gradients against loops over single numbers, at every level that this processor has.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/cpu_features.h"
#include "common/scratch.h"
#include "linear/params.h"
#include "tests/check.h"

namespace {

using namespace cvmk;
using namespace cvmk::linear;

typedef std::vector<float> Floats;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// Small whole numbers: every sum is exact in float32 and every operand in bfloat16, so the results must be equal.
Floats numbers(std::int64_t count, unsigned seed, int range = 7) {
  Floats found(at(count));
  for (float& x : found) {
    seed = seed * 1664525u + 1013904223u;
    x = static_cast<float>(static_cast<int>(seed >> 16) % range - range / 2);
  }
  return found;
}

struct Layer {
  std::int64_t m, k, n;
  Activation activation;
  std::int64_t halves = activation == kSwiglu ? 2 : 1, columns = n / halves;
  Floats x = numbers(m * k, 1), w = numbers(n * k, 2, 5), b = numbers(n, 3);
  Floats out = Floats(at(m * columns), NAN), grad = numbers(m * columns, 4, 5), dx = Floats(at(m * k), NAN), dw = Floats(at(n * k), NAN), db = Floats(at(n), NAN);
  std::vector<char> kept = std::vector<char>(at(m * n * 4), 0x7f);

  void run(bool lowered, bool all, const Team& team) {
    // The operands are float32 and rounded to bfloat16 where they are lowered; results in float32, so that nothing else is rounded.
    Forward f{};
    f.linear = {m, k, n, activation, {x.data(), k, kFloat32, lowered ? kBFloat16 : kFloat32}, {w.data(), k, kFloat32, lowered ? kBFloat16 : kFloat32},
                b.data(), kFloat32, kept.data(), kFloat32, 1.0f, 0, 0, false};
    f.out = out.data();
    const Kernels& kernels = kernels_for(f.linear);
    f.linear.pairs = lowered && dispatch_level() >= IsaLevel::kAvx512 && dispatch().features.avx512_bf16;
    cvmk::run(kernels.forward, f, team);
    Backward r{};
    r.linear = f.linear;
    r.grad = grad.data();
    r.grad_stride = columns;
    if (all) r.dx = {dx.data(), kFloat32};
    r.d_weight = {dw.data(), kFloat32};
    r.d_bias = {db.data(), kFloat32};
    cvmk::run(kernels.backward, r, team);
  }

  float pre(std::int64_t i, std::int64_t j) const {
    float sum = b[at(j)];
    for (std::int64_t c = 0; c < k; ++c) sum += x[at(i * k + c)] * w[at(j * k + c)];
    return sum;
  }

  bool results_hold() const {
    bool holds = true;
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < columns; ++j) {
        const float y = pre(i, j), silu = y / (1.0f + std::exp(-y)), got = out[at(i * columns + j)];
        const float want = activation == kRelu ? std::fmax(y, 0.0f) : activation == kSwiglu ? silu * pre(i, columns + j) : y;
        holds = holds && (activation == kSwiglu ? std::fabs(got - want) <= 1e-5f * (1.0f + std::fabs(want)) : got == want);
      }
    return holds;
  }

  // Of layers whose gradient is exact.
  bool gradients_hold(bool all) const {
    Floats g(at(m * n)), want_x(at(m * k)), want_w(at(n * k)), want_b(at(n));
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        g[at(i * n + j)] = activation == kRelu && pre(i, j) <= 0 ? 0.0f : grad[at(i * n + j)];
        want_b[at(j)] += g[at(i * n + j)];
        for (std::int64_t c = 0; c < k; ++c) {
          want_x[at(i * k + c)] += g[at(i * n + j)] * w[at(j * k + c)];
          want_w[at(j * k + c)] += g[at(i * n + j)] * x[at(i * k + c)];
        }
      }
    return want_b == db && want_w == dw && (!all || want_x == dx);
  }
};

void layers_are_exact() {
  const std::int64_t shapes[][3] = {{1, 1, 2}, {3, 5, 6}, {17, 33, 34}, {65, 64, 128}, {70, 130, 66}, {64, 200, 64}, {1100, 40, 34}};  // the last one: chunks of rows
  for (const auto& s : shapes)
    for (const bool lowered : {false, true})
      for (const Activation activation : {kNone, kRelu, kSwiglu})
        for (const bool alone : {false, true}) {
          Layer layer{s[0], s[1], s[2], activation};
          layer.run(lowered, alone, alone ? Team{} : openmp_team());
          CHECK(layer.results_hold());
          CHECK(activation == kSwiglu || layer.gradients_hold(alone));
        }
}

void no_rows_have_no_gradient() {
  Layer layer{0, 5, 6, kNone};
  layer.run(true, true, openmp_team());
  CHECK(layer.dw == Floats(30, 0.0f) && layer.db == Floats(6, 0.0f));
}

// Dropout: the backward pass drops what the forward pass dropped.
void gradients_are_dropped_alike() {
  Layer layer{40, 8, 48, kNone};
  Forward f{};
  const Floats ones(at(48 * 8), 1.0f);
  const Floats x(at(40 * 8), 1.0f);
  f.linear = {40, 8, 48, kNone, {x.data(), 8, kFloat32, kFloat32}, {ones.data(), 8, kFloat32, kFloat32}, nullptr, kFloat32, nullptr, kFloat32, 2.0f, 12345u, 1u << 31, false};
  f.out = layer.out.data();
  const Kernels& kernels = kernels_for(f.linear);
  cvmk::run(kernels.forward, f, openmp_team());
  Backward r{};
  r.linear = f.linear;
  const Floats grad(at(40 * 48), 1.0f);
  r.grad = grad.data();
  r.grad_stride = 48;
  r.d_bias = {layer.db.data(), kFloat32};
  cvmk::run(kernels.backward, r, openmp_team());
  int zeros = 0;
  for (std::int64_t j = 0; j < 48; ++j) {
    float sum = 0;
    for (std::int64_t i = 0; i < 40; ++i) {
      const float y = layer.out[at(i * 48 + j)];
      CHECK(y == 0.0f || y == 16.0f);
      zeros += y == 0.0f;
      sum += y / 8;
    }
    CHECK(sum == layer.db[at(j)]);
  }
  CHECK(zeros > 800 && zeros < 1120);
}

}  // namespace

int main() {
  cvmk::testing::at_every_level([] {
    layers_are_exact();
    no_rows_have_no_gradient();
    gradients_are_dropped_alike();
  });
  return cvmk::testing::check_result();
}
