// In place of the header of the CUDA toolkit where kernels run on the CPU.
#pragma once
#include "on_cpu.h"
