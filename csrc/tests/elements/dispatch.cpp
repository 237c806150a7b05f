#include "common/levels.h"
#include "tests/elements/params.h"

CVMK_LEVELS(elements_test)
