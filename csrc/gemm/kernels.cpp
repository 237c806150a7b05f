// The linear layers for one instruction-set level.
#include "gemm/byte_rows.inl"
#include "gemm/float_linear.inl"
#include "gemm/int4.inl"
#include "gemm/int4_bytes.inl"
#include "gemm/int8.inl"

CVMK_KERNELS(gemm) = {{int8_scratch, run_int8}, {int4_scratch, run_int4}, {float_scratch, run_float}, {bytes_scratch, run_bytes}, {byte_rows_scratch, run_byte_rows}};
