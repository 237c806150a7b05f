// The distillation-loss kernels at the level of this processor.
#pragma once

#include "distill/params.h"

namespace cvmk::distill {

void losses(const LossPass& pass);
void gradients(const GradientPass& pass);
void scale(const ScalePass& pass);

void linear(const LinearPass& pass);
// Bytes of scratch that `linear` needs on as many threads as it may use now.
int64_t linear_scratch(const LinearPass& pass);

// Asks for large pages behind a big buffer that nobody has written yet: fewer page faults. A hint without effect on what is read.
void advise_large_pages(void* data, int64_t bytes);

}  // namespace cvmk::distill
