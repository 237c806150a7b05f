#include "common/levels.h"
#include "recurrent/params.h"

CVMK_LEVELS(recurrent)
