#include "distill/distill.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/cpu_features.h"

#define CVMK_DISTILL_LEVEL(level)                                            \
  void cvmk_distill_losses_##level(const cvmk::distill::LossPass* pass); \
  void cvmk_distill_gradients_##level(const cvmk::distill::GradientPass* pass); \
  void cvmk_distill_scale_##level(const cvmk::distill::ScalePass* pass); \
  void cvmk_distill_linear_##level(const cvmk::distill::LinearPass* pass); \
  int64_t cvmk_distill_linear_scratch_##level(const cvmk::distill::LinearPass* pass);
extern "C" {
CVMK_DISTILL_LEVEL(base)
#if defined(CVMK_HAVE_ISA_LEVELS)
CVMK_DISTILL_LEVEL(avx2)
CVMK_DISTILL_LEVEL(avx512)
CVMK_DISTILL_LEVEL(amx)
#endif
}
#undef CVMK_DISTILL_LEVEL

namespace cvmk::distill {

#if defined(CVMK_HAVE_ISA_LEVELS)
#define CVMK_PICK(name)                                                       \
  const IsaLevel level = dispatch_level();                                    \
  if (level >= IsaLevel::kAmx) return cvmk_distill_##name##_amx(&pass);       \
  if (level >= IsaLevel::kAvx512) return cvmk_distill_##name##_avx512(&pass); \
  if (level >= IsaLevel::kAvx2) return cvmk_distill_##name##_avx2(&pass);     \
  return cvmk_distill_##name##_base(&pass)
#else
#define CVMK_PICK(name) return cvmk_distill_##name##_base(&pass)
#endif

void losses(const LossPass& pass) { CVMK_PICK(losses); }
void gradients(const GradientPass& pass) { CVMK_PICK(gradients); }
void scale(const ScalePass& pass) { CVMK_PICK(scale); }
void linear(const LinearPass& pass) { CVMK_PICK(linear); }
int64_t linear_scratch(const LinearPass& pass) { CVMK_PICK(linear_scratch); }

#undef CVMK_PICK

void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Blocks of 32 MiB and more are mappings of their own; smaller ones may lie in the heap, whose pages are not ours to mark.
  if (bytes < (int64_t{32} << 20)) return;
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  if (last > first) static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#endif
}

}  // namespace cvmk::distill
