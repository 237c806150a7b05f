// What the processor and the operating system offer, and the level that kernels are dispatched to.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace cvmk {

// Every level includes the ones before it. A kernel compiled for a level may use exactly what the comment says.
enum class IsaLevel {
  kBase = 0,    // what the compiler targets by default (x86-64: SSE2)
  kAvx2 = 1,    // AVX2, FMA, F16C, BMI2
  kAvx512 = 2,  // AVX-512 F, BW, DQ, VL
  kAmx = 3,     // AVX-512 VNNI and BF16, AMX tile, int8, bf16, with the permission of the kernel for tile data
};

// Instruction sets that both the processor has and the operating system saves. All false where the processor is not x86.
struct CpuFeatures {
  bool avx = false;
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool bmi2 = false;
  bool avx_vnni = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512dq = false;
  bool avx512vl = false;
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
  bool avx512_fp16 = false;
  bool amx_tile = false;
  bool amx_int8 = false;
  bool amx_bf16 = false;
};

// Whether this is a build for tests whose AMX kernels compute with AVX-512 (CVMK_EMULATE_AMX=ON); its AMX features say no more than that.
bool emulates_amx();

// Detected once. Asks the kernel for the AMX permission of this process where the processor has AMX.
const CpuFeatures& cpu_features();

// The features by name, in the order of the struct.
std::vector<std::pair<std::string, bool>> cpu_feature_list(const CpuFeatures& features);

// The highest level that these features allow.
IsaLevel level_of(const CpuFeatures& features);

const char* level_name(IsaLevel level);

// What kernels may use: the highest level, and the features for the paths within a level that need more than it promises.
struct Dispatch {
  IsaLevel level = IsaLevel::kBase;
  CpuFeatures features;
};

// `features` capped by a value of CVMK_CPU_ISA: a level, then any number of "-" and the name of a feature that is taken away, as in
// "avx512-avx512_vnni-avx512_bf16". What is taken away can only lower the level. Throws std::invalid_argument that names the accepted values.
Dispatch capped(const CpuFeatures& features, const std::string& cap);

// The detected features, capped by the environment variable CVMK_CPU_ISA, which is read at every call. Throws as `capped` does.
Dispatch dispatch();

// dispatch().level, for kernels that look no further.
IsaLevel dispatch_level();

}  // namespace cvmk
