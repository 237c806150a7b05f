// CHECK(condition): count and report a failure, and go on. A test program returns check_result().
#pragma once

#include <cstdio>

namespace cvmk::testing {

inline int failures = 0;

inline void check(bool good, const char* text, const char* file, int line) {
  if (good) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
}

inline int check_result() {
  if (failures > 0) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures > 0 ? 1 : 0;
}

}  // namespace cvmk::testing

#define CHECK(condition) ::cvmk::testing::check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
