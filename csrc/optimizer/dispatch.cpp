#include "common/levels.h"
#include "optimizer/params.h"

CVMK_LEVELS(optimizer)
