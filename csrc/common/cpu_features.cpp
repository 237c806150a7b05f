#include "common/cpu_features.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define CVMK_X86 1
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace cvmk {
namespace {

#ifdef CVMK_X86

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf cpuid(unsigned leaf, unsigned subleaf) {
  CpuidLeaf r;
  // __get_cpuid_count checks the highest leaf and leaves the zeros where the leaf does not exist.
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool bit(unsigned word, int index) { return ((word >> index) & 1u) != 0; }

// Which register states the operating system saves (XCR0).
std::uint64_t saved_states() {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux gives a process the AMX tile data state only on request; other systems have no such request.
bool amx_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures f;
  const CpuidLeaf one = cpuid(1, 0);
  const bool has_xgetbv = bit(one.ecx, 27);
  if (!has_xgetbv) return f;
  const std::uint64_t states = saved_states();
  const bool saves_ymm = (states & 0x6) == 0x6;
  const bool saves_zmm = (states & 0xe6) == 0xe6;
  const bool saves_tiles = (states & 0x60000) == 0x60000;
  const CpuidLeaf seven = cpuid(7, 0);
  const CpuidLeaf seven_one = seven.eax >= 1 ? cpuid(7, 1) : CpuidLeaf{};

  f.avx = saves_ymm && bit(one.ecx, 28);
  f.fma = f.avx && bit(one.ecx, 12);
  f.f16c = f.avx && bit(one.ecx, 29);
  f.avx2 = f.avx && bit(seven.ebx, 5);
  f.bmi2 = bit(seven.ebx, 8);
  f.avx_vnni = f.avx2 && bit(seven_one.eax, 4);
  f.avx512f = saves_zmm && bit(seven.ebx, 16);
  f.avx512dq = f.avx512f && bit(seven.ebx, 17);
  f.avx512bw = f.avx512f && bit(seven.ebx, 30);
  f.avx512vl = f.avx512f && bit(seven.ebx, 31);
  f.avx512_vnni = f.avx512f && bit(seven.ecx, 11);
  f.avx512_bf16 = f.avx512f && bit(seven_one.eax, 5);
  f.avx512_fp16 = f.avx512f && bit(seven.edx, 23);
  f.amx_tile = saves_tiles && bit(seven.edx, 24) && amx_permitted();
  f.amx_int8 = f.amx_tile && bit(seven.edx, 25);
  f.amx_bf16 = f.amx_tile && bit(seven.edx, 22);
  if (emulates_amx()) f.amx_tile = f.amx_int8 = f.amx_bf16 = f.avx512_vnni && f.avx512_bf16;
  return f;
}

#else

CpuFeatures detect() { return {}; }

#endif

// In the order of the struct.
constexpr std::pair<const char*, bool CpuFeatures::*> kFeatures[] = {
    {"avx", &CpuFeatures::avx},
    {"avx2", &CpuFeatures::avx2},
    {"fma", &CpuFeatures::fma},
    {"f16c", &CpuFeatures::f16c},
    {"bmi2", &CpuFeatures::bmi2},
    {"avx_vnni", &CpuFeatures::avx_vnni},
    {"avx512f", &CpuFeatures::avx512f},
    {"avx512bw", &CpuFeatures::avx512bw},
    {"avx512dq", &CpuFeatures::avx512dq},
    {"avx512vl", &CpuFeatures::avx512vl},
    {"avx512_vnni", &CpuFeatures::avx512_vnni},
    {"avx512_bf16", &CpuFeatures::avx512_bf16},
    {"avx512_fp16", &CpuFeatures::avx512_fp16},
    {"amx_tile", &CpuFeatures::amx_tile},
    {"amx_int8", &CpuFeatures::amx_int8},
    {"amx_bf16", &CpuFeatures::amx_bf16},
};

constexpr const char* kLevelNames[] = {"base", "avx2", "avx512", "amx"};

IsaLevel parse_level(const std::string& name, const std::string& cap) {
  for (int i = 0; i < 4; ++i) {
    if (name == kLevelNames[i]) return static_cast<IsaLevel>(i);
  }
  throw std::invalid_argument("CVMK_CPU_ISA is '" + cap + "': set it to base, avx2, avx512 or amx, or unset it");
}

bool CpuFeatures::*parse_feature(const std::string& name, const std::string& cap) {
  std::string known;
  for (const auto& [feature, member] : kFeatures) {
    if (name == feature) return member;
    known += known.empty() ? feature : std::string(", ") + feature;
  }
  throw std::invalid_argument("CVMK_CPU_ISA is '" + cap + "', where '" + name + "' is no feature that can be taken away; these are " + known);
}

}  // namespace

bool emulates_amx() {
#if defined(CVMK_EMULATE_AMX)
  return true;
#else
  return false;
#endif
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::vector<std::pair<std::string, bool>> cpu_feature_list(const CpuFeatures& features) {
  std::vector<std::pair<std::string, bool>> list;
  for (const auto& [name, member] : kFeatures) list.emplace_back(name, features.*member);
  return list;
}

IsaLevel level_of(const CpuFeatures& f) {
  if (!(f.avx2 && f.fma && f.f16c && f.bmi2)) return IsaLevel::kBase;
  if (!(f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl)) return IsaLevel::kAvx2;
  if (!(f.avx512_vnni && f.avx512_bf16 && f.amx_tile && f.amx_int8 && f.amx_bf16)) return IsaLevel::kAvx512;
  return IsaLevel::kAmx;
}

const char* level_name(IsaLevel level) { return kLevelNames[static_cast<int>(level)]; }

Dispatch capped(const CpuFeatures& features, const std::string& cap) {
  const std::size_t end = cap.find('-');
  const IsaLevel most = parse_level(cap.substr(0, end), cap);
  Dispatch result{most, features};
  for (std::size_t at = end; at != std::string::npos;) {
    const std::size_t next = cap.find('-', at + 1);
    result.features.*parse_feature(cap.substr(at + 1, next - at - 1), cap) = false;
    at = next;
  }
  result.level = std::min(most, level_of(result.features));
  return result;
}

Dispatch dispatch() {
  const char* cap = std::getenv("CVMK_CPU_ISA");
  if (cap == nullptr || *cap == '\0') return {level_of(cpu_features()), cpu_features()};
  return capped(cpu_features(), cap);
}

IsaLevel dispatch_level() { return dispatch().level; }

}  // namespace cvmk
