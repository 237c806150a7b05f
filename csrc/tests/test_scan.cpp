// The scan's kernels at every level against loops in double precision, with memory of exactly the size that they may touch.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "common/scratch.h"
#include "scan/lanes.inl"
#include "scan/params.h"
#include "tests/check.h"

namespace {

using cvmk::scan::ScanBackward;
using cvmk::scan::ScanForward;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::mt19937 generator(7);

Floats normal(std::int64_t count, float scale = 1.0f, float shift = 0.0f) {
  std::normal_distribution<float> draw;
  Floats values(static_cast<std::size_t>(count));
  for (float& value : values) value = draw(generator) * scale + shift;
  return values;
}

bool near(const Floats& found, const Doubles& wanted, double tolerance) {
  double largest = 1.0;
  for (const double value : wanted) largest = std::max(largest, std::fabs(value));
  for (std::size_t i = 0; i < found.size(); ++i)
    if (!(std::fabs(static_cast<double>(found[i]) - wanted[i]) <= tolerance * largest)) return false;
  return found.size() == wanted.size();
}

// One problem: inputs, and what the kernels and the loops make of them.
struct Case {
  std::int64_t batch, channels, length, states, groups;
  bool reverse;
  std::vector<std::int64_t> cu;  // empty: not packed
  Floats u, delta, z, B, C, A, D, bias, initial, grad_out, grad_last;

  Case(std::int64_t batch_, std::int64_t channels_, std::int64_t length_, std::int64_t states_, std::int64_t groups_, bool reverse_, std::vector<std::int64_t> cu_)
      : batch(batch_), channels(channels_), length(length_), states(states_), groups(groups_), reverse(reverse_), cu(std::move(cu_)) {
    const std::int64_t steps = batch * channels * length;
    u = normal(steps);
    delta = normal(steps, 1.0f, -2.0f);
    z = normal(steps);
    grad_out = normal(steps);
    B = normal(batch * groups * states * length);
    C = normal(batch * groups * states * length);
    A = normal(channels * states);
    for (float& a : A) a = -std::fabs(a) * 4.0f;
    D = normal(channels);
    bias = normal(channels);
    initial = normal(sequences() * channels * states);
    grad_last = normal(sequences() * channels * states);
  }

  std::int64_t sequences() const { return cu.empty() ? batch : static_cast<std::int64_t>(cu.size()) - 1; }

  cvmk::scan::Scan arguments() {
    cvmk::scan::Scan s{};
    s.batch = batch, s.channels = channels, s.length = length, s.states = states, s.groups = groups;
    s.softplus = 1, s.reverse = reverse ? 1 : 0;
    const auto view = [&](Floats& values) { return cvmk::scan::View{values.data(), cvmk::kFloat32, channels * length, length, 1}; };
    s.u = view(u), s.delta = view(delta), s.z = view(z);
    const auto weights = [&](Floats& values) {
      return cvmk::scan::Weights{{values.data(), cvmk::kFloat32, groups * states * length, length, 1}, states * length, nullptr};
    };
    s.B = weights(B), s.C = weights(C);
    s.A = A.data(), s.D = D.data(), s.bias = bias.data(), s.initial = initial.data();
    if (!cu.empty()) s.cu_seqlens = cu.data(), s.cu_dtype = cvmk::kInt64, s.sequences = sequences();
    return s;
  }
};

struct Results {
  Doubles out, last, du, ddelta, dz, dB, dC, dA, dD, dbias, dinitial;
};

// The formulas of cvmk/ops/selective_scan.py, one channel and one sequence after the other.
Results loops(const Case& p) {
  Results r;
  const auto zeros = [](const Floats& like) { return Doubles(like.size(), 0.0); };
  r.out = zeros(p.u), r.last = zeros(p.initial), r.du = zeros(p.u), r.ddelta = zeros(p.u), r.dz = zeros(p.u), r.dB = zeros(p.B), r.dC = zeros(p.C);
  r.dA = zeros(p.A), r.dD = zeros(p.D), r.dbias = zeros(p.bias), r.dinitial = zeros(p.initial);
  for (std::int64_t q = 0; q < p.sequences(); ++q) {
    const std::int64_t b = p.cu.empty() ? q : 0, begin = p.cu.empty() ? 0 : p.cu[static_cast<std::size_t>(q)];
    const std::int64_t end = p.cu.empty() ? p.length : p.cu[static_cast<std::size_t>(q) + 1], steps = end - begin;
    for (std::int64_t d = 0; d < p.channels; ++d) {
      const auto time = [&](std::int64_t i) { return p.reverse ? end - 1 - i : begin + i; };
      const auto at = [&](std::int64_t i) { return static_cast<std::size_t>((b * p.channels + d) * p.length + time(i)); };
      const auto weight = [&](std::int64_t n, std::int64_t i) {
        return static_cast<std::size_t>(((b * p.groups + d / (p.channels / p.groups)) * p.states + n) * p.length + time(i));
      };
      const std::size_t ud = static_cast<std::size_t>(d), row = static_cast<std::size_t>((q * p.channels + d) * p.states);
      Doubles step(static_cast<std::size_t>(steps)), y(step), from_input(step), from_decay(step);
      std::vector<Doubles> x(static_cast<std::size_t>(p.states), Doubles(static_cast<std::size_t>(steps) + 1));
      for (std::int64_t i = 0; i < steps; ++i) {
        const std::size_t k = static_cast<std::size_t>(i);
        step[k] = std::log1p(std::exp(static_cast<double>(p.delta[at(i)]) + p.bias[ud]));
        y[k] = static_cast<double>(p.D[ud]) * p.u[at(i)];
      }
      const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
      for (std::int64_t n = 0; n < p.states; ++n) {
        const std::size_t un = static_cast<std::size_t>(n), a = ud * static_cast<std::size_t>(p.states) + un;
        Doubles& state = x[un];
        state[0] = p.initial[row + un];
        for (std::int64_t i = 0; i < steps; ++i) {
          const std::size_t k = static_cast<std::size_t>(i);
          state[k + 1] = std::exp(step[k] * p.A[a]) * state[k] + step[k] * p.u[at(i)] * p.B[weight(n, i)];
          y[k] += state[k + 1] * p.C[weight(n, i)];
        }
        r.last[row + un] = state[static_cast<std::size_t>(steps)];
        double carry = p.grad_last[row + un];
        for (std::int64_t i = steps - 1; i >= 0; --i) {
          const std::size_t k = static_cast<std::size_t>(i);
          const double z = p.z[at(i)], dy = p.grad_out[at(i)] * z * sigmoid(z), h = dy * p.C[weight(n, i)] + carry;
          r.dC[weight(n, i)] += dy * state[k + 1];
          r.dB[weight(n, i)] += h * step[k] * p.u[at(i)];
          from_input[k] += h * p.B[weight(n, i)];
          carry = h * std::exp(step[k] * p.A[a]);
          from_decay[k] += carry * state[k] * p.A[a];
          r.dA[a] += carry * state[k] * step[k];
        }
        r.dinitial[row + un] = carry;
      }
      for (std::int64_t i = 0; i < steps; ++i) {
        const std::size_t k = static_cast<std::size_t>(i);
        const double z = p.z[at(i)], gate = sigmoid(z), g = p.grad_out[at(i)], dy = g * z * gate;
        r.out[at(i)] = y[k] * z * gate;
        r.dz[at(i)] = g * y[k] * gate * (1.0 + z * (1.0 - gate));
        r.du[at(i)] = from_input[k] * step[k] + p.D[ud] * dy;
        r.ddelta[at(i)] = (from_input[k] * p.u[at(i)] + from_decay[k]) * sigmoid(static_cast<double>(p.delta[at(i)]) + p.bias[ud]);
        r.dD[ud] += dy * p.u[at(i)];
        r.dbias[ud] += r.ddelta[at(i)];
      }
    }
  }
  return r;
}

// [count][rows][columns] with rows and columns exchanged.
Floats turned(const Floats& values, std::int64_t count, std::int64_t rows, std::int64_t columns) {
  Floats out(values.size());
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < columns; ++c)
        out[static_cast<std::size_t>((i * columns + c) * rows + r)] = values[static_cast<std::size_t>((i * rows + r) * columns + c)];
  return out;
}

// The same bits with channels last: f and g are the passes that were run with time last.
void check_channels_last(Case p, ScanForward f, ScanBackward g, const std::vector<const Floats*>& steps, const std::vector<const Floats*>& weights,
                         const std::vector<const Floats*>& rest) {
  const std::int64_t channels = p.channels, length = p.length, inner = p.groups * p.states;
  const auto by_step = [&](const Floats& x) { return turned(x, p.batch, channels, length); };
  const auto by_weight = [&](const Floats& x) { return turned(x, p.batch, inner, length); };
  Floats u = by_step(p.u), delta = by_step(p.delta), z = by_step(p.z), grad_out = by_step(p.grad_out), B = by_weight(p.B), C = by_weight(p.C);
  const auto view = [&](Floats& values) { return cvmk::scan::View{values.data(), cvmk::kFloat32, channels * length, 1, channels}; };
  const auto weight = [&](Floats& values) { return cvmk::scan::Weights{{values.data(), cvmk::kFloat32, inner * length, 1, inner}, p.states, nullptr}; };
  f.scan.channels_last = 1, f.scan.u = view(u), f.scan.delta = view(delta), f.scan.z = view(z), f.scan.B = weight(B), f.scan.C = weight(C);
  g.scan = f.scan, g.grad_out = view(grad_out);
  const float nan = std::nanf("");
  std::vector<Floats> found;
  for (const auto* group : {&steps, &weights, &rest})
    for (const Floats* like : *group) found.emplace_back(like->size(), nan);
  f.out = found[0].data(), g.du = found[1].data(), g.ddelta = found[2].data(), g.dz = found[3].data(), g.dB = found[4].data(), g.dC = found[5].data();
  f.last = found[6].data(), g.dA = found[7].data(), g.dD = found[8].data(), g.dbias = found[9].data(), g.dinitial = found[10].data();
  cvmk::run(cvmk::scan::kernels().forward, f, cvmk::openmp_team());
  cvmk::run(cvmk::scan::kernels().backward, g, cvmk::openmp_team());
  for (std::size_t i = 0; i < 4; ++i) CHECK(found[i] == by_step(*steps[i]));
  for (std::size_t i = 0; i < 2; ++i) CHECK(found[4 + i] == by_weight(*weights[i]));
  for (std::size_t i = 0; i < 5; ++i) CHECK(found[6 + i] == *rest[i]);
}

void check_case(Case p) {
  const float nan = std::nanf("");
  const auto poisoned = [&](const Floats& like) { return Floats(like.size(), nan); };
  const std::int64_t chunks = (p.length + cvmk::scan::kChunk - 1) / cvmk::scan::kChunk;
  ScanForward f{};
  f.scan = p.arguments();
  Floats out = poisoned(p.u), last = poisoned(p.initial), kept(static_cast<std::size_t>(p.batch * chunks * p.channels * p.states), nan);
  f.out = out.data(), f.last = last.data(), f.kept = kept.data();
  cvmk::run(cvmk::scan::kernels().forward, f, cvmk::openmp_team());
  ScanBackward g{};
  g.scan = p.arguments();
  g.grad_out = {p.grad_out.data(), cvmk::kFloat32, p.channels * p.length, p.length, 1};
  g.grad_last = p.grad_last.data(), g.kept = kept.data();
  Floats du = poisoned(p.u), ddelta = du, dz = du, dB = poisoned(p.B), dC = dB, dA = poisoned(p.A), dD = poisoned(p.D), dbias = dD, dinitial = poisoned(p.initial);
  g.du = du.data(), g.ddelta = ddelta.data(), g.dz = dz.data(), g.dB = dB.data(), g.dC = dC.data();
  g.dA = dA.data(), g.dD = dD.data(), g.dbias = dbias.data(), g.dinitial = dinitial.data();
  cvmk::run(cvmk::scan::kernels().backward, g, cvmk::openmp_team());
  const Results want = loops(p);
  CHECK(near(out, want.out, 1e-6) && near(last, want.last, 1e-6));
  CHECK(near(du, want.du, 2e-6) && near(ddelta, want.ddelta, 2e-6) && near(dz, want.dz, 2e-6));
  CHECK(near(dB, want.dB, 2e-6) && near(dC, want.dC, 2e-6));
  CHECK(near(dA, want.dA, 2e-6) && near(dD, want.dD, 2e-6) && near(dbias, want.dbias, 2e-6) && near(dinitial, want.dinitial, 2e-6));
  check_channels_last(p, f, g, {&out, &du, &ddelta, &dz}, {&dB, &dC}, {&last, &dA, &dD, &dbias, &dinitial});
}

void check_functions() {
  namespace scan = cvmk::scan;
  using scan::W;
  float in[W], exponential[W], plus[W], gate[W];
  double worst = 0.0, worst_plus = 0.0, worst_gate = 0.0;
  for (float x = -125.0f; x < 127.0f; x += 0.0137f) {
    for (int i = 0; i < W; ++i) in[i] = x + 0.003f * static_cast<float>(i);
    simd::store(exponential, scan::exp2(simd::load(in)));
    simd::store(plus, scan::softplus(simd::load(in)));
    simd::store(gate, scan::sigmoid(simd::load(in)));
    for (int i = 0; i < W; ++i) {
      const double v = in[i];
      worst = std::max(worst, std::fabs(exponential[i] / std::exp2(v) - 1.0));
      if (v > -80.0) worst_plus = std::max(worst_plus, std::fabs(plus[i] / (v > 30.0 ? v : std::log1p(std::exp(v))) - 1.0));
      if (v > -80.0) worst_gate = std::max(worst_gate, std::fabs(gate[i] * (1.0 + std::exp(-v)) - 1.0));
    }
  }
  CHECK(worst < 1.2e-7 && worst_plus < 4e-7 && worst_gate < 4e-7);

  simd::F m[W];
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) m[i][j] = static_cast<float>(i * W + j);
  const simd::F sums = scan::row_sums(m);
  scan::transpose(m);
  for (int i = 0; i < W; ++i) {
    CHECK(sums[i] == static_cast<float>(i * W * W + W * (W - 1) / 2));
    for (int j = 0; j < W; ++j) CHECK(m[i][j] == static_cast<float>(j * W + i));
  }
}

}  // namespace

int main() {
  check_functions();
  cvmk::testing::at_every_level([] {
    for (const bool reverse : {false, true}) {
      for (const std::int64_t length : {0, 1, 63, 64, 65, 150}) check_case(Case(2, 6, length, 3, 2, reverse, {}));
      check_case(Case(1, 37, 30, 5, 1, reverse, {}));
      check_case(Case(66, 3, 5, 2, 1, reverse, {}));
      check_case(Case(1, 9, 140, 4, 3, reverse, {0, 0, 5, 64, 70, 70, 140, 140}));
      check_case(Case(0, 4, 9, 2, 1, reverse, {}));
    }
  });
  return cvmk::testing::check_result();
}
