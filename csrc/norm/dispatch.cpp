#include "common/levels.h"
#include "norm/params.h"

CVMK_LEVELS(norm)
