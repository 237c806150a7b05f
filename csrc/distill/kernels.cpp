// The kernels of the distillation losses for one instruction-set level.
#include "distill/linear_float.inl"
#include "distill/linear_sweeps.inl"
#include "distill/rows.inl"
#if defined(__AVX512F__)
#include "distill/linear_tiles.inl"
#if defined(__AMX_TILE__)
#include "distill/amx_tiles.inl"
#else
#include "distill/pair_tiles.inl"
#endif
#endif

namespace cvmk::distill {
namespace {

#if defined(__AMX_TILE__)
typedef TileProducts<AmxTiles> Lowered;
CVMK_INLINE bool takes(const LinearPass& pass) { return Lowered::takes(pass); }
#elif defined(__AVX512F__)
typedef TileProducts<PairTiles> Lowered;
CVMK_INLINE bool takes(const LinearPass& pass) { return pass.pairs && Lowered::takes(pass); }
#endif

int64_t linear_scratch(const LinearPass& pass, const Team& team) {
#if defined(__AVX512F__)
  if (takes(pass)) return linear_scratch_with<Lowered>(pass, team);
#endif
  return linear_scratch_with<FloatProducts>(pass, team);
}

void run_linear(const LinearPass& pass, char* scratch, const Team& team) {
#if defined(__AVX512F__)
  if (takes(pass)) return linear_with<Lowered>(pass, scratch, team);
#endif
  linear_with<FloatProducts>(pass, scratch, team);
}

}  // namespace
}  // namespace cvmk::distill

CVMK_KERNELS(distill) = {{losses_scratch, run_losses}, {gradients_scratch, run_gradients}, {scale_scratch, run_scale}, {linear_scratch, run_linear}};
