// The kernels of the scan for one instruction-set level: CVMK_LEVEL is a part of the exported names.

#include "scan/update.inl"

#define CVMK_JOIN2(a, b) a##b
#define CVMK_JOIN(a, b) CVMK_JOIN2(a, b)

extern "C" {
int CVMK_JOIN(cvmk_scan_forward_, CVMK_LEVEL)(const cvmk::scan::ScanForward* p) { return scan::run_forward(*p); }
int CVMK_JOIN(cvmk_scan_backward_, CVMK_LEVEL)(const cvmk::scan::ScanBackward* p) { return scan::run_backward(*p); }
int CVMK_JOIN(cvmk_scan_update_, CVMK_LEVEL)(const cvmk::scan::Update* p) { return scan::run_update(*p); }
}
