// Picks the level of the quantised linears.
#include "common/cpu_features.h"
#include "gemm/params.h"

using cvmk::gemm::Int4Linear;
using cvmk::gemm::Int8Linear;

extern "C" {
int cvmk_int8_linear_base(const Int8Linear*);
int cvmk_int4_linear_base(const Int4Linear*);
#if defined(CVMK_HAVE_ISA_LEVELS)
int cvmk_int8_linear_avx2(const Int8Linear*);
int cvmk_int8_linear_avx512(const Int8Linear*);
int cvmk_int8_linear_amx(const Int8Linear*);
int cvmk_int4_linear_avx2(const Int4Linear*);
int cvmk_int4_linear_avx512(const Int4Linear*);
int cvmk_int4_linear_amx(const Int4Linear*);
#endif
}

namespace cvmk::gemm {

int int8_linear(Int8Linear p) {
  p.vnni = 0;
#if defined(CVMK_HAVE_ISA_LEVELS)
  const IsaLevel level = dispatch_level();
  p.vnni = level >= IsaLevel::kAvx512 && cpu_features().avx512_vnni;
  if (level == IsaLevel::kAmx) return cvmk_int8_linear_amx(&p);
  if (level == IsaLevel::kAvx512) return cvmk_int8_linear_avx512(&p);
  if (level == IsaLevel::kAvx2) return cvmk_int8_linear_avx2(&p);
#endif
  return cvmk_int8_linear_base(&p);
}

int int4_linear(const Int4Linear& p) {
#if defined(CVMK_HAVE_ISA_LEVELS)
  const IsaLevel level = dispatch_level();
  if (level == IsaLevel::kAmx) return cvmk_int4_linear_amx(&p);
  if (level == IsaLevel::kAvx512) return cvmk_int4_linear_avx512(&p);
  if (level == IsaLevel::kAvx2) return cvmk_int4_linear_avx2(&p);
#endif
  return cvmk_int4_linear_base(&p);
}

}  // namespace cvmk::gemm
