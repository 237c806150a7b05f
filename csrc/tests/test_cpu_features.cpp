// The feature table against the compiler's own detection and against Linux's, and the cap of what kernels use.
#include <cstdio>
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

CpuFeatures everything() {
  CpuFeatures f;
  f.avx2 = f.fma = f.f16c = f.bmi2 = f.avx512f = f.avx512bw = f.avx512dq = f.avx512vl = true;
  f.avx512_vnni = f.avx512_bf16 = f.amx_tile = f.amx_int8 = f.amx_bf16 = true;
  return f;
}

void cap_lowers_and_never_raises() {
  for (const IsaLevel cap : {IsaLevel::kBase, IsaLevel::kAvx2, IsaLevel::kAvx512, IsaLevel::kAmx}) {
    CHECK(capped(everything(), level_name(cap)).level == cap);
    CHECK(capped(CpuFeatures{}, level_name(cap)).level == IsaLevel::kBase);
  }
}

void features_are_taken_away() {
  const Dispatch first = capped(everything(), "avx512-avx512_vnni-avx512_bf16");
  CHECK(first.level == IsaLevel::kAvx512 && !first.features.avx512_vnni && !first.features.avx512_bf16 && first.features.amx_tile);
  CHECK(capped(everything(), "avx512").features.avx512_vnni);
  CHECK(capped(everything(), "amx-amx_bf16").level == IsaLevel::kAvx512);
  CHECK(capped(everything(), "amx-avx512vl-avx512vl").level == IsaLevel::kAvx2);
  CHECK(capped(everything(), "amx-fma").level == IsaLevel::kBase);
  CHECK(capped(everything(), "avx2-avx512_vnni").level == IsaLevel::kAvx2);
}

void wrong_caps_are_refused(const char* wrong, const char* words) {
  std::string said;
  try {
    capped(everything(), wrong);
  } catch (const std::invalid_argument& error) {
    said = error.what();
  }
  CHECK(said.find(words) != std::string::npos && said.find(wrong) != std::string::npos);
}

void environment_is_read_at_every_call() {
  const IsaLevel detected = level_of(cpu_features());
  for (const std::string& cap : testing::caps()) {
    setenv("CVMK_CPU_ISA", cap.c_str(), 1);
    CHECK(dispatch_level() == capped(cpu_features(), cap).level);
  }
  setenv("CVMK_CPU_ISA", "", 1);
  CHECK(dispatch_level() == detected && cpu_feature_list(dispatch().features) == cpu_feature_list(cpu_features()));
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

// The flags of /proc/cpuinfo, where there are any: f16c, avx_vnni, fp16 and AMX are not among the compiler's names. What is emulated is not asked.
void agrees_with_linux() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("flags", 0) != 0) continue;
    const std::string flags = line.substr(line.find(':') + 1) + " ";
    for (const auto& [name, present] : cpu_feature_list(cpu_features())) {
      const bool shown = flags.find(" " + name + " ") != std::string::npos;
      const bool needs_permission = name.rfind("amx", 0) == 0;  // may be refused to a process that the processor would serve
      if (needs_permission && emulates_amx()) continue;
      if (needs_permission ? present && !shown : present != shown) std::fprintf(stderr, "%s\n", name.c_str());
      CHECK(needs_permission ? shown || !present : present == shown);
    }
    return;
  }
}
#endif

void emulated_amx_needs_what_it_computes_with() {
  const CpuFeatures& f = cpu_features();
  if (!emulates_amx()) return;
  CHECK(f.amx_tile == (f.avx512_vnni && f.avx512_bf16) && f.amx_int8 == f.amx_tile && f.amx_bf16 == f.amx_tile);
}

}  // namespace

// With an argument, the operating system's own list is not asked: an emulator shows that of the machine it runs on.
int main(int count, char**) {
  levels_include_the_lower_ones();
  cap_lowers_and_never_raises();
  features_are_taken_away();
  for (const char* wrong : {"", "AVX2", "sse", "avx2 ", "avx2 -fma", "-fma"}) wrong_caps_are_refused(wrong, "base, avx2, avx512 or amx");
  for (const char* wrong : {"avx512-vnni", "avx512-", "avx512-avx512_vnni-"}) wrong_caps_are_refused(wrong, "avx512_vnni, avx512_bf16");
  environment_is_read_at_every_call();
  emulated_amx_needs_what_it_computes_with();
#if defined(__x86_64__) && defined(__GNUC__)
  agrees_with_the_compiler();
  if (count == 1) agrees_with_linux();
#endif
  std::printf("level %s\n", level_name(dispatch_level()));
  return cvmk::testing::check_result();
}
