#include "gemm/int8.inl"
#include "gemm/int4.inl"

extern "C" int cvmk_int8_linear_avx2(const cvmk::gemm::Int8Linear* p) { return int8_linear_level(*p); }
extern "C" int cvmk_int4_linear_avx2(const cvmk::gemm::Int4Linear* p) { return int4_linear_level(*p); }
