// Picks the level of the scan's kernels. The amx level runs those of avx512: a scan has no matrix products.
#include "common/cpu_features.h"
#include "scan/params.h"

#define CVMK_DECLARE(level)                                              \
  int cvmk_scan_forward_##level(const cvmk::scan::ScanForward*);         \
  int cvmk_scan_backward_##level(const cvmk::scan::ScanBackward*);       \
  int cvmk_scan_update_##level(const cvmk::scan::Update*);
#if defined(CVMK_HAVE_ISA_LEVELS)
#define CVMK_PICK(name, argument)                                        \
  const IsaLevel level = dispatch_level();                               \
  if (level >= IsaLevel::kAvx512) return cvmk_scan_##name##_avx512(&argument); \
  if (level >= IsaLevel::kAvx2) return cvmk_scan_##name##_avx2(&argument);     \
  return cvmk_scan_##name##_base(&argument);
#else
#define CVMK_PICK(name, argument) return cvmk_scan_##name##_base(&argument);
#endif

extern "C" {
CVMK_DECLARE(base)
#if defined(CVMK_HAVE_ISA_LEVELS)
CVMK_DECLARE(avx2)
CVMK_DECLARE(avx512)
#endif
}

namespace cvmk::scan {

int forward(const ScanForward& arguments) { CVMK_PICK(forward, arguments) }
int backward(const ScanBackward& arguments) { CVMK_PICK(backward, arguments) }
int update(const Update& arguments) { CVMK_PICK(update, arguments) }

}  // namespace cvmk::scan
