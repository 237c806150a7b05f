#include "distill/linear_amx.inl"
#include "distill/rows.inl"

extern "C" {
void cvmk_distill_losses_amx(const cvmk::distill::LossPass* pass) { distill::losses(*pass); }
void cvmk_distill_gradients_amx(const cvmk::distill::GradientPass* pass) { distill::gradients(*pass); }
void cvmk_distill_scale_amx(const cvmk::distill::ScalePass* pass) { distill::scale(*pass); }
void cvmk_distill_linear_amx(const cvmk::distill::LinearPass* pass) { distill::linear(*pass); }
}
