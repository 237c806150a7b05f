// The kernels of the scan for one instruction-set level.
#include "scan/update.inl"

CVMK_KERNELS(scan) = {{forward_scratch, run_forward}, {backward_scratch, run_backward}, {update_scratch, run_update}};
