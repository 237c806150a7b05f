// Random numbers for the native tests, memory that is full of NaN, and the comparison with float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace cvmk::testing {

using Floats = std::vector<float>;

struct Random {
  std::uint64_t state = 1;
  std::uint64_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
  }
  template <typename T>
  T below(T n) {
    return static_cast<T>(bits() % static_cast<std::uint64_t>(n));
  }
  // In [-1/2, 1/2).
  float real() { return static_cast<float>(bits()) * 0x1.0p-31f - 0.5f; }
};

// Of the whole program: every call draws other numbers.
inline std::mt19937 generator(7);

inline Floats normal(std::int64_t count) {
  std::normal_distribution<float> draw;
  Floats values(static_cast<std::size_t>(count));
  for (float& value : values) value = draw(generator);
  return values;
}

inline Floats poisoned(std::int64_t count) { return Floats(static_cast<std::size_t>(count), std::numeric_limits<float>::quiet_NaN()); }

inline bool near(const Floats& found, const std::vector<double>& wanted, double tolerance) {
  for (std::size_t i = 0; i < found.size(); ++i)
    if (!(std::fabs(static_cast<double>(found[i]) - wanted[i]) <= tolerance * (1.0 + std::fabs(wanted[i])))) return false;
  return found.size() == wanted.size();
}

}  // namespace cvmk::testing
