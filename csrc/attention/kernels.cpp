// The kernels of attention for one instruction-set level; the amx level computes bfloat16 on the tiles.
#include "attention/bias_grad.inl"
#include "attention/forward.inl"
#if defined(__AMX_TILE__)
#include "attention/amx_gradient.inl"
#include "attention/few_keys_amx.inl"

CVMK_KERNELS(attention) = {
    {forward_scratch<AmxProducts, FewAmx>, run_forward<AmxProducts, FewAmx>},
    {backward_scratch<AmxGradient, AmxGradient::Few>, run_backward<AmxGradient, AmxGradient::Few>},
};
#else
#include "attention/few_keys_float_gradient.inl"
#include "attention/float_gradient.inl"

CVMK_KERNELS(attention) = {
    {forward_scratch<FloatProducts, FewFloat>, run_forward<FloatProducts, FewFloat>},
    {backward_scratch<FloatGradient, FewFloatGradient>, run_backward<FloatGradient, FewFloatGradient>},
};
#endif
