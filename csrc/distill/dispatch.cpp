#include "distill/distill.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/cpu_features.h"
#include "common/threads.h"
#include "distill/linear_plan.h"

#define CVMK_DISTILL_LEVEL(level)                                            \
  void cvmk_distill_losses_##level(const cvmk::distill::LossPass* pass); \
  void cvmk_distill_gradients_##level(const cvmk::distill::GradientPass* pass); \
  void cvmk_distill_scale_##level(const cvmk::distill::ScalePass* pass);
extern "C" {
CVMK_DISTILL_LEVEL(base)
#if defined(CVMK_HAVE_ISA_LEVELS)
CVMK_DISTILL_LEVEL(avx2)
CVMK_DISTILL_LEVEL(avx512)
CVMK_DISTILL_LEVEL(amx)
void cvmk_distill_linear_amx(const cvmk::distill::LinearPass* pass);
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
  cvmk_distill_##name##_base(&pass)
#else
#define CVMK_PICK(name) cvmk_distill_##name##_base(&pass)
#endif

void losses(const LossPass& pass) { CVMK_PICK(losses); }
void gradients(const GradientPass& pass) { CVMK_PICK(gradients); }
void scale(const ScalePass& pass) { CVMK_PICK(scale); }

#undef CVMK_PICK

#if defined(CVMK_HAVE_ISA_LEVELS)
bool has_linear() { return dispatch_level() >= IsaLevel::kAmx; }
void linear(const LinearPass& pass) { cvmk_distill_linear_amx(&pass); }
#else
bool has_linear() { return false; }
void linear(const LinearPass&) {}
#endif

int64_t linear_scratch(const LinearPass& pass) {
  const LinearPlan plan = linear_plan(pass);
  return plan.shared + threads::limit() * plan.own;
}

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
