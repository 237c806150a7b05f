// Causal convolutions for one instruction-set level.
#include "conv/backward.inl"
#include "conv/forward.inl"
#include "conv/steps.inl"
#include "conv/update.inl"

namespace cvmk::conv {
namespace {

int64_t either_forward_scratch(const Forward& p, const Team& team) { return p.shape.channels_last ? forward_steps_scratch(p) : forward_scratch(p, team); }
void run_either_forward(const Forward& p, char* scratch, const Team& team) {
  if (p.shape.channels_last) run_forward_steps(p, scratch, team);
  else run_forward(p, scratch, team);
}

int64_t either_backward_scratch(const Backward& p, const Team& team) {
  if (!p.shape.channels_last) return backward_scratch(p, team);
  Arena count;
  BackwardSteps(p, team, &count);
  return count.used;
}
void run_either_backward(const Backward& p, char* scratch, const Team& team) {
  if (p.shape.channels_last) run_backward_steps(p, scratch, team);
  else run_backward(p, scratch, team);
}

}  // namespace
}  // namespace cvmk::conv

CVMK_KERNELS(conv) = {{either_forward_scratch, run_either_forward}, {either_backward_scratch, run_either_backward}, {update_scratch, run_update}};
