#include "distill/rows.inl"

extern "C" {
void cvmk_distill_losses_base(const cvmk::distill::LossPass* pass) { distill::losses(*pass); }
void cvmk_distill_gradients_base(const cvmk::distill::GradientPass* pass) { distill::gradients(*pass); }
void cvmk_distill_scale_base(const cvmk::distill::ScalePass* pass) { distill::scale(*pass); }
}
