#include "cached/params.h"
#include "common/levels.h"

CVMK_LEVELS(cached)
