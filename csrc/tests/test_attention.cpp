// Attention at every level: one causal head against a loop in double, and a buffer that is poisoned first.
#include <cmath>
#include <vector>

#include "attention/params.h"
#include "common/scratch.h"
#include "tests/check.h"

namespace {

using namespace cvmk;
using namespace cvmk::attention;

constexpr std::int64_t kRows = 70, kKeys = 150, kWidth = 20, kHeads = 2;

float value(std::int64_t i) { return static_cast<float>((i * 7919) % 2001) / 1000.0f - 1.0f; }

std::vector<double> by_loops(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v, std::int64_t head, std::int64_t row) {
  const std::int64_t visible = row + kKeys - kRows + 1;
  std::vector<double> p(static_cast<std::size_t>(visible)), out(kWidth);
  double total = 0;
  for (std::int64_t j = 0; j < visible; ++j) {
    double s = 0;
    for (std::int64_t i = 0; i < kWidth; ++i) s += static_cast<double>(q[static_cast<std::size_t>((head * kRows + row) * kWidth + i)]) * k[static_cast<std::size_t>(j * kWidth + i)];
    total += p[static_cast<std::size_t>(j)] = std::exp(0.5 * s);
  }
  for (std::int64_t j = 0; j < visible; ++j)
    for (std::int64_t i = 0; i < kWidth; ++i) out[static_cast<std::size_t>(i)] += p[static_cast<std::size_t>(j)] / total * v[static_cast<std::size_t>(j * kWidth + i)];
  return out;
}

void agrees_with_loops(const Team& team) {
  std::vector<float> q(kHeads * kRows * kWidth), k(kKeys * kWidth), v(kKeys * kWidth), out(q.size(), NAN), lse(kHeads * kRows, NAN);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = value(static_cast<std::int64_t>(i));
  for (std::size_t i = 0; i < k.size(); ++i) {
    k[i] = value(static_cast<std::int64_t>(i) * 3 + 1);
    v[i] = value(static_cast<std::int64_t>(i) * 5 + 2);
  }
  Params p{};
  p.dtype = kFloat32;
  p.batch = 1;
  p.heads = kHeads;
  p.kv_heads = 1;
  p.rows = kRows;
  p.keys = kKeys;
  p.d = p.dv = kWidth;
  p.sequences = -1;
  p.q = Matrix{q.data(), 0, kRows * kWidth, kWidth};
  p.k = Matrix{k.data(), 0, 0, kWidth};
  p.v = Matrix{v.data(), 0, 0, kWidth};
  p.out = Matrix{out.data(), 0, kRows * kWidth, kWidth};
  p.lse = Matrix{lse.data(), 0, kRows, 1};
  p.window_left = -1;
  p.scale = 0.5f;
  p.keep_factor = 1.0f;
  run(kernels(p.dtype).forward, p, team);
  for (std::int64_t head = 0; head < kHeads; ++head)
    for (std::int64_t row = 0; row < kRows; ++row) {
      const std::vector<double> want = by_loops(q, k, v, head, row);
      for (std::int64_t i = 0; i < kWidth; ++i)
        CHECK(std::abs(out[static_cast<std::size_t>((head * kRows + row) * kWidth + i)] - want[static_cast<std::size_t>(i)]) < 2e-6);
    }

  std::vector<float> dq(q.size(), NAN), dk(k.size(), NAN), dv(v.size(), NAN);
  p.grad_out = p.out;
  p.dq = Matrix{dq.data(), 0, kRows * kWidth, kWidth};
  p.dk = Matrix{dk.data(), 0, 0, kWidth};
  p.dv_ = Matrix{dv.data(), 0, 0, kWidth};
  run(kernels(p.dtype).backward, p, team);
  // The values' gradients sum to the output's, for probabilities sum to 1.
  double given = 0, found = 0;
  for (const float x : out) given += x;
  for (const float x : dv) found += x;
  CHECK(std::abs(given - found) < 1e-3);
  for (const float x : dq) CHECK(std::isfinite(x));
  for (const float x : dk) CHECK(std::isfinite(x));
}

// -- rows that a bias moves out of float32's reach ----------------------------------------------------------------------------------
// Causal attention of one head with `bias` added to the scores of odd rows, and its gradients by the loops of the formulas.
struct Loops {
  std::vector<double> out, lse, dq, dk, dv, dbias;

  Loops(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v, const std::vector<float>& g, const std::vector<float>& bias)
      : out(kRows * kWidth), lse(kRows), dq(kRows * kWidth), dk(kKeys * kWidth), dv(kKeys * kWidth), dbias(kRows * kKeys) {
    for (std::size_t r = 0; r < kRows; ++r) {
      const std::size_t visible = r + kKeys - kRows + 1;
      std::vector<double> p(visible), dp(visible);
      double top = -INFINITY, total = 0, delta = 0;
      for (std::size_t j = 0; j < visible; ++j) {
        p[j] = bias[r * kKeys + j];
        for (std::size_t i = 0; i < kWidth; ++i) p[j] += 0.5 * static_cast<double>(q[r * kWidth + i]) * k[j * kWidth + i];
        for (std::size_t i = 0; i < kWidth; ++i) dp[j] += static_cast<double>(g[r * kWidth + i]) * v[j * kWidth + i];
        top = std::fmax(top, p[j]);
      }
      for (double& x : p) total += x = std::exp(x - top);
      lse[r] = top + std::log(total);
      for (std::size_t j = 0; j < visible; ++j) delta += dp[j] * (p[j] /= total);
      for (std::size_t j = 0; j < visible; ++j) {
        const double ds = dbias[r * kKeys + j] = p[j] * (dp[j] - delta);
        for (std::size_t i = 0; i < kWidth; ++i) {
          out[r * kWidth + i] += p[j] * v[j * kWidth + i];
          dq[r * kWidth + i] += 0.5 * ds * k[j * kWidth + i];
          dk[j * kWidth + i] += 0.5 * ds * q[r * kWidth + i];
          dv[j * kWidth + i] += p[j] * g[r * kWidth + i];
        }
      }
    }
  }
};

void agree(const std::vector<float>& found, const std::vector<double>& want) {
  for (std::size_t i = 0; i < found.size(); ++i) CHECK(std::abs(found[i] - want[i]) <= 1e-5 + 1e-6 * std::abs(want[i]));
}

void biased_rows_agree_with_loops(const Team& team, float shift) {
  std::vector<float> q(kRows * kWidth), k(kKeys * kWidth), v(k.size()), g(q.size()), bias(kRows * kKeys);
  std::vector<float> out(q.size(), NAN), lse(kRows, NAN), dq(q.size(), NAN), dk(k.size(), NAN), dv(k.size(), NAN), dbias(bias.size(), NAN);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = value(static_cast<std::int64_t>(i)), g[i] = value(static_cast<std::int64_t>(i) * 11 + 3);
  for (std::size_t i = 0; i < k.size(); ++i) k[i] = value(static_cast<std::int64_t>(i) * 3 + 1), v[i] = value(static_cast<std::int64_t>(i) * 5 + 2);
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = i / kKeys % 2 == 0 ? value(static_cast<std::int64_t>(i) * 13) : shift;
  Params p{};
  p.dtype = kFloat32;
  p.batch = p.heads = p.kv_heads = 1;
  p.rows = kRows;
  p.keys = kKeys;
  p.d = p.dv = kWidth;
  p.sequences = -1;
  p.q = Matrix{q.data(), 0, 0, kWidth};
  p.k = Matrix{k.data(), 0, 0, kWidth};
  p.v = Matrix{v.data(), 0, 0, kWidth};
  p.out = Matrix{out.data(), 0, 0, kWidth};
  p.lse = Matrix{lse.data(), 0, kRows, 1};
  p.bias = Bias{bias.data(), nullptr, kFloat32, {0, 0, kKeys, 1}, {1, 1, kRows, kKeys}};
  p.window_left = -1;
  p.scale = 0.5f;
  p.keep_factor = 1.0f;
  run(kernels(p.dtype).forward, p, team);
  p.grad_out = Matrix{g.data(), 0, 0, kWidth};
  p.dq = Matrix{dq.data(), 0, 0, kWidth};
  p.dk = Matrix{dk.data(), 0, 0, kWidth};
  p.dv_ = Matrix{dv.data(), 0, 0, kWidth};
  p.bias.grad = dbias.data();
  run(kernels(p.dtype).backward, p, team);
  const Loops want(q, k, v, g, bias);
  agree(out, want.out);
  agree(lse, want.lse);
  agree(dq, want.dq);
  agree(dk, want.dk);
  agree(dv, want.dv);
  agree(dbias, want.dbias);
}

}  // namespace

int main() {
  testing::at_every_level([] {
    agrees_with_loops(Team{});
    agrees_with_loops(openmp_team());
    for (const float shift : {0.0f, -1e4f, -1e9f, -3.4e38f, 3.4e38f}) biased_rows_agree_with_loops(openmp_team(), shift);
  });
  return cvmk::testing::check_result();
}
