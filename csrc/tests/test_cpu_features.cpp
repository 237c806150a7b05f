// The feature table against the compiler's own detection and against Linux's, and the cap of the dispatch level.
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/cpu_features.h"
#include "tests/check.h"

namespace {

using namespace cvmk;

void levels_include_the_lower_ones() {
  CpuFeatures f;
  CHECK(level_of(f) == IsaLevel::kBase);
  f.avx512f = f.avx512bw = f.avx512dq = f.avx512vl = true;
  CHECK(level_of(f) == IsaLevel::kBase);  // AVX-512 alone is no level
  f.avx2 = f.fma = f.f16c = f.bmi2 = true;
  CHECK(level_of(f) == IsaLevel::kAvx512);
  f.avx512_vnni = f.avx512_bf16 = f.amx_tile = f.amx_int8 = f.amx_bf16 = true;
  CHECK(level_of(f) == IsaLevel::kAmx);
  f.amx_tile = false;
  CHECK(level_of(f) == IsaLevel::kAvx512);
  f.avx512vl = false;
  CHECK(level_of(f) == IsaLevel::kAvx2);
}

void names_are_read_back() {
  for (const IsaLevel level : {IsaLevel::kBase, IsaLevel::kAvx2, IsaLevel::kAvx512, IsaLevel::kAmx}) CHECK(parse_level(level_name(level)) == level);
  for (const char* wrong : {"", "AVX2", "sse", "avx2 "}) {
    bool refused = false;
    try {
      parse_level(wrong);
    } catch (const std::invalid_argument& error) {
      refused = std::string(error.what()).find("base, avx2, avx512 or amx") != std::string::npos;
    }
    CHECK(refused);
  }
}

void cap_lowers_and_never_raises() {
  const IsaLevel detected = level_of(cpu_features());
  for (const IsaLevel cap : {IsaLevel::kBase, IsaLevel::kAvx2, IsaLevel::kAvx512, IsaLevel::kAmx}) {
    setenv("CVMK_CPU_ISA", level_name(cap), 1);
    CHECK(dispatch_level() == (cap < detected ? cap : detected));
  }
  setenv("CVMK_CPU_ISA", "", 1);
  CHECK(dispatch_level() == detected);
  unsetenv("CVMK_CPU_ISA");
  CHECK(dispatch_level() == detected);
}

#if defined(__x86_64__) && defined(__GNUC__)
void agrees_with_the_compiler() {
  const CpuFeatures& f = cpu_features();
  CHECK(f.avx == (__builtin_cpu_supports("avx") != 0));
  CHECK(f.avx2 == (__builtin_cpu_supports("avx2") != 0));
  CHECK(f.fma == (__builtin_cpu_supports("fma") != 0));
  CHECK(f.bmi2 == (__builtin_cpu_supports("bmi2") != 0));
  CHECK(f.avx512f == (__builtin_cpu_supports("avx512f") != 0));
  CHECK(f.avx512bw == (__builtin_cpu_supports("avx512bw") != 0));
  CHECK(f.avx512dq == (__builtin_cpu_supports("avx512dq") != 0));
  CHECK(f.avx512vl == (__builtin_cpu_supports("avx512vl") != 0));
  CHECK(f.avx512_vnni == (__builtin_cpu_supports("avx512vnni") != 0));
  CHECK(f.avx512_bf16 == (__builtin_cpu_supports("avx512bf16") != 0));
}

// The flags of /proc/cpuinfo, where there are any: f16c, avx_vnni, fp16 and AMX are not among the compiler's names.
void agrees_with_linux() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("flags", 0) != 0) continue;
    const std::string flags = line.substr(line.find(':') + 1) + " ";
    for (const auto& [name, present] : cpu_feature_list(cpu_features())) {
      const bool shown = flags.find(" " + name + " ") != std::string::npos;
      const bool needs_permission = name.rfind("amx", 0) == 0;  // may be refused to a process that the processor would serve
      if (needs_permission ? present && !shown : present != shown) std::fprintf(stderr, "%s\n", name.c_str());
      CHECK(needs_permission ? shown || !present : present == shown);
    }
    return;
  }
}
#endif

}  // namespace

int main() {
  levels_include_the_lower_ones();
  names_are_read_back();
  cap_lowers_and_never_raises();
#if defined(__x86_64__) && defined(__GNUC__)
  agrees_with_the_compiler();
  agrees_with_linux();
#endif
  return cvmk::testing::check_result();
}
