#include "distill/rows.inl"

extern "C" {
void cvmk_distill_losses_avx512(const cvmk::distill::LossPass* pass) { distill::losses(*pass); }
void cvmk_distill_gradients_avx512(const cvmk::distill::GradientPass* pass) { distill::gradients(*pass); }
void cvmk_distill_scale_avx512(const cvmk::distill::ScalePass* pass) { distill::scale(*pass); }
}
