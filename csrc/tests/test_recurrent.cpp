// Recurrences at every level against loops in double precision; in pieces they give the bits of the whole, forwards and backwards, on any number of threads.
#include "recurrent/params.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "common/scratch.h"
#include "engine/pool.h"
#include "tests/check.h"
#include "tests/random.h"

namespace {

using namespace cvmk::recurrent;
using cvmk::Team;
using cvmk::testing::Floats;
using cvmk::testing::near;
using cvmk::testing::normal;
using cvmk::testing::poisoned;
using Doubles = std::vector<double>;

constexpr double kNear = 5e-6;

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }
double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// Number n of channel c, in blocks of `pitch` numbers.
std::size_t place(std::int64_t n, std::int64_t c, std::int64_t pitch) { return size((c / kBlock * pitch + n) * kBlock + c % kBlock); }
std::int64_t blocks_size(std::int64_t channels, std::int64_t pitch) { return cvmk::up(channels, kBlock) * pitch; }

// A sequence of some rows of a matrix, in the order of the recurrence.
std::vector<std::int64_t> order(std::int64_t first, std::int64_t rows, bool reverse) {
  std::vector<std::int64_t> found;
  for (std::int64_t t = 0; t < rows; ++t) found.push_back(first + (reverse ? rows - 1 - t : t));
  return found;
}

// One recurrence: its inputs, how it is called, and what it is.
struct SsruCase {
  static constexpr std::int64_t kNumbers = 1;
  std::int64_t channels, stride;
  Floats inputs;
  SsruCase(std::int64_t rows, std::int64_t c) : channels(c), stride(2 * c + 3), inputs(normal(rows * stride)) {
    for (float& x : inputs) x *= 4.0f;
    inputs[0] = 200.0f, inputs[size(stride)] = -200.0f;
  }
  void run(const Pass& pass, float* out, const Team& team) {
    cvmk::run(kernels().ssru, Ssru{pass, {inputs.data(), stride}, {inputs.data() + channels, stride}, out, channels + 1}, team);
  }
  void step(std::int64_t row, std::int64_t c, double* state, double& out) const {
    const double f = sigmoid(inputs[size(row * stride + c)]), value = inputs[size(row * stride + channels + c)];
    *state = f * *state + sigmoid(-static_cast<double>(inputs[size(row * stride + c)])) * value;
    out = std::max(*state, 0.0);
  }
};

struct ConvCase {
  static constexpr std::int64_t kNumbers = kTaps - 1;
  std::int64_t channels, stride;
  Floats inputs, weight, bias;
  ConvCase(std::int64_t rows, std::int64_t c) : channels(c), stride(c + 2), inputs(normal(rows * stride)), weight(normal(blocks_size(c, kTaps))), bias(normal(c)) {}
  void run(const Pass& pass, float* out, const Team& team) {
    cvmk::run(kernels().conv, Conv{pass, {inputs.data(), stride}, weight.data(), bias.data(), out, channels + 1}, team);
  }
  void step(std::int64_t row, std::int64_t c, double* state, double& out) const {
    const double x = inputs[size(row * stride + c)];
    double y = bias[size(c)];
    for (std::int64_t k = 0; k < kTaps; ++k) y += static_cast<double>(weight[place(k, c, kTaps)]) * (k < kTaps - 1 ? state[k] : x);
    state[0] = state[1], state[1] = state[2], state[2] = x;
    out = y * sigmoid(y);
  }
};

struct ScanCase {
  static constexpr std::int64_t kNumbers = kStates;
  std::int64_t channels, stride;
  Floats inputs, A, D;
  ScanCase(std::int64_t rows, std::int64_t c) : channels(c), stride(3 * c + 2 * kStates), inputs(normal(rows * stride)), A(normal(blocks_size(c, kStates))), D(normal(c)) {
    for (float& a : A) a = -std::exp(a);
  }
  void run(const Pass& pass, float* out, const Team& team) {
    const float* x = inputs.data();
    cvmk::run(kernels().scan, Scan{pass, {x, stride}, {x + channels, stride}, {x + 2 * channels, stride}, {x + 3 * channels, stride}, {x + 3 * channels + kStates, stride},
                                   A.data(), D.data(), out, channels + 1}, team);
  }
  void step(std::int64_t row, std::int64_t c, double* state, double& out) const {
    const float* x = inputs.data() + row * stride;
    const double u = x[c], z = x[2 * channels + c], delta = std::log1p(std::exp(static_cast<double>(x[channels + c])));
    double y = static_cast<double>(D[size(c)]) * u;
    for (std::int64_t n = 0; n < kStates; ++n) {
      state[n] = std::exp(delta * static_cast<double>(A[place(n, c, kStates)])) * state[n] + delta * u * static_cast<double>(x[3 * channels + n]);
      y += state[n] * static_cast<double>(x[3 * channels + kStates + n]);
    }
    out = y * z * sigmoid(z);
  }
};

template <typename Case>
void check_case(std::int64_t channels, const std::vector<std::int64_t>& lengths, bool reverse, const Team& team) {
  std::int64_t rows = 0;
  for (const std::int64_t length : lengths) rows += length;
  Case recurrence(rows, channels);
  // Every second sequence begins with a state; states stand behind and before other numbers, which are nobody's to touch.
  const std::int64_t offset = 2, pitch = offset + Case::kNumbers + 1, numbers = blocks_size(channels, pitch), count = static_cast<std::int64_t>(lengths.size());
  const Floats before = normal(count * numbers);
  Floats after = poisoned(count * numbers), pieces_after = before, out = poisoned(rows * (channels + 1)), pieces_out = out;
  std::vector<Run> runs, pieces;
  std::int64_t first = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t length = lengths[size(i)], at = i * numbers;
    const float* from = i % 2 == 0 ? nullptr : before.data() + at;
    runs.push_back({first, length, from, after.data() + at});
    const std::int64_t half = length / 2, start = reverse ? first + length - half : first;
    pieces.push_back({start, half, i % 2 == 0 ? nullptr : pieces_after.data() + at, pieces_after.data() + at});
    pieces.push_back({reverse ? first : first + half, length - half, pieces_after.data() + at, pieces_after.data() + at});
    first += length;
  }
  const Pass whole{runs.data(), count, rows, channels, offset, pitch, reverse};
  recurrence.run(whole, out.data(), team);
  recurrence.run({pieces.data(), 2 * count, rows, channels, offset, pitch, reverse}, pieces_out.data(), Team{});

  bool same = true, untouched = true;
  Doubles wanted, wanted_after;
  Floats found, found_after;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t at = i * numbers;
    for (std::int64_t c = 0; c < channels; ++c) {
      double state[kStates] = {};
      for (std::int64_t n = 0; n < Case::kNumbers && i % 2 != 0; ++n) state[n] = before[size(at) + place(offset + n, c, pitch)];
      for (const std::int64_t row : order(runs[size(i)].first, lengths[size(i)], reverse)) {
        double y = 0.0;
        recurrence.step(row, c, state, y);
        wanted.push_back(y);
        found.push_back(out[size(row * (channels + 1) + c)]);
        same = same && found.back() == pieces_out[size(row * (channels + 1) + c)];
      }
      for (std::int64_t n = 0; n < Case::kNumbers; ++n) {
        wanted_after.push_back(state[n]);
        found_after.push_back(after[size(at) + place(offset + n, c, pitch)]);
        same = same && found_after.back() == pieces_after[size(at) + place(offset + n, c, pitch)];
      }
    }
    for (const std::int64_t n : {std::int64_t{0}, offset - 1, pitch - 1})
      for (std::int64_t c = 0; c < channels; ++c) untouched = untouched && std::isnan(after[size(at) + place(n, c, pitch)]);
  }
  for (std::int64_t row = 0; row < rows; ++row) untouched = untouched && std::isnan(out[size(row * (channels + 1) + channels)]);
  CHECK(same);
  CHECK(untouched);
  CHECK(near(found, wanted, kNear));
  CHECK(near(found_after, wanted_after, kNear));
}

}  // namespace

int main() {
  cvmk::engine::Pool pool(3);
  cvmk::testing::at_every_level([&] {
    for (const std::int64_t channels : {1, 7, 16, 50})
      for (const bool reverse : {false, true}) {
        check_case<SsruCase>(channels, {1, 2, 9, 1, 33}, reverse, Team{});
        check_case<ConvCase>(channels, {1, 2, 9, 1, 33}, reverse, Team{});
        check_case<ScanCase>(channels, {1, 2, 9, 1, 33}, reverse, Team{});
      }
    check_case<SsruCase>(200, {40, 60}, true, pool.team());
    check_case<ConvCase>(200, {40, 60}, false, pool.team());
    check_case<ScanCase>(100, {40, 60}, false, pool.team());
  });
  return cvmk::testing::check_result();
}
