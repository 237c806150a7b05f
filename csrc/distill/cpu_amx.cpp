#include "distill/linear_float.inl"
#include "distill/linear_tiles.inl"
#include "distill/linear_sweeps.inl"
#include "distill/rows.inl"

extern "C" {
void cvmk_distill_losses_amx(const cvmk::distill::LossPass* pass) { distill::losses(*pass); }
void cvmk_distill_gradients_amx(const cvmk::distill::GradientPass* pass) { distill::gradients(*pass); }
void cvmk_distill_scale_amx(const cvmk::distill::ScalePass* pass) { distill::scale(*pass); }
void cvmk_distill_linear_amx(const cvmk::distill::LinearPass* pass) {
  if (distill::TileEngine::takes(*pass)) return distill::linear_with<distill::TileEngine>(*pass);
  distill::linear_with<distill::FloatEngine>(*pass);
}
int64_t cvmk_distill_linear_scratch_amx(const cvmk::distill::LinearPass* pass) {
  if (distill::TileEngine::takes(*pass)) return distill::linear_plan<distill::TileEngine>(*pass).total();
  return distill::linear_plan<distill::FloatEngine>(*pass).total();
}
}
