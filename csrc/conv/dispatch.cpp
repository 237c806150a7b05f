#include "common/levels.h"
#include "conv/params.h"

CVMK_LEVELS(conv)
