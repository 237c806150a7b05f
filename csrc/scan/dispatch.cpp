#include "common/levels.h"
#include "scan/params.h"

CVMK_LEVELS(scan)
