#include "common/levels.h"
#include "vocabulary/params.h"

CVMK_LEVELS(vocabulary)
