#include "common/levels.h"
#include "embed/params.h"

CVMK_LEVELS(embed)
