// CHECK(condition): count and report a failure, and go on. A test program returns check_result().
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/cpu_features.h"

namespace cvmk::testing {

inline int failures = 0;

inline void check(bool good, const char* text, const char* file, int line) {
  if (good) return;
  ++failures;
  const char* cap = std::getenv("CVMK_CPU_ISA");
  std::fprintf(stderr, "%s:%d: failed: %s%s%s\n", file, line, text, cap == nullptr ? "" : " at ", cap == nullptr ? "" : cap);
}

inline int check_result() {
  if (failures > 0) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures > 0 ? 1 : 0;
}

// The values of CVMK_CPU_ISA that differ on this machine: every level that it has, and AVX-512 as the first processors had it.
inline std::vector<std::string> caps() {
  std::vector<std::string> found;
  for (int level = 0; level <= static_cast<int>(level_of(cpu_features())); ++level) found.push_back(level_name(static_cast<IsaLevel>(level)));
  if (found.size() > 2) found.push_back("avx512-avx512_vnni-avx512_bf16-avx512_fp16");
  return found;
}

// body() under each of these caps, or only under that of the environment.
template <typename Body>
void at_every_level(const Body& body) {
  if (std::getenv("CVMK_CPU_ISA") != nullptr) return body();
  for (const std::string& cap : caps()) {
    setenv("CVMK_CPU_ISA", cap.c_str(), 1);
    body();
  }
  unsetenv("CVMK_CPU_ISA");
}

}  // namespace cvmk::testing

#define CHECK(condition) ::cvmk::testing::check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
