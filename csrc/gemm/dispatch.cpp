// Picks the level of the quantised linears.
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

constexpr int64_t kLargePage = 1 << 21;

// Kept from call to call, for fresh pages cost more than a small product.
void* scratch(int64_t bytes) {
  static thread_local std::unique_ptr<void, Free> held;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    const int64_t page = bytes > kLargePage / 2 ? kLargePage : 4096, wanted = (bytes + page - 1) / page * page;
    held.reset();
    held.reset(std::aligned_alloc(static_cast<std::size_t>(page), static_cast<std::size_t>(wanted)));
    size = held ? wanted : 0;
#if defined(__linux__)
    if (held && page == kLargePage) madvise(held.get(), static_cast<std::size_t>(wanted), MADV_HUGEPAGE);
#endif
  }
  return held.get();
}

}  // namespace

int int8_linear(Int8Linear p) {
  p.vnni = 0;
  p.linear.scratch = scratch;
#if defined(CVMK_HAVE_ISA_LEVELS)
  const auto [level, features] = dispatch();
  p.vnni = level >= IsaLevel::kAvx512 && features.avx512_vnni;
  if (level == IsaLevel::kAmx) return cvmk_int8_linear_amx(&p);
  if (level == IsaLevel::kAvx512) return cvmk_int8_linear_avx512(&p);
  if (level == IsaLevel::kAvx2) return cvmk_int8_linear_avx2(&p);
#endif
  return cvmk_int8_linear_base(&p);
}

int int4_linear(Int4Linear p) {
  p.linear.scratch = scratch;
#if defined(CVMK_HAVE_ISA_LEVELS)
  const IsaLevel level = dispatch_level();
  if (level == IsaLevel::kAmx) return cvmk_int4_linear_amx(&p);
  if (level == IsaLevel::kAvx512) return cvmk_int4_linear_avx512(&p);
  if (level == IsaLevel::kAvx2) return cvmk_int4_linear_avx2(&p);
#endif
  return cvmk_int4_linear_base(&p);
}

}  // namespace cvmk::gemm
