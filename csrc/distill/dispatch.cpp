#include "common/levels.h"
#include "distill/params.h"

CVMK_LEVELS(distill)
