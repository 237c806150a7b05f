#include "distill/linear_float.inl"
#include "distill/linear_sweeps.inl"
#include "distill/rows.inl"

extern "C" {
void cvmk_distill_losses_base(const cvmk::distill::LossPass* pass) { distill::losses(*pass); }
void cvmk_distill_gradients_base(const cvmk::distill::GradientPass* pass) { distill::gradients(*pass); }
void cvmk_distill_scale_base(const cvmk::distill::ScalePass* pass) { distill::scale(*pass); }
void cvmk_distill_linear_base(const cvmk::distill::LinearPass* pass) { distill::linear_with<distill::FloatEngine>(*pass); }
int64_t cvmk_distill_linear_scratch_base(const cvmk::distill::LinearPass* pass) { return distill::linear_plan<distill::FloatEngine>(*pass).total(); }
}
