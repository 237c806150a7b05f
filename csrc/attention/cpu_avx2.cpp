#include "attention/bias_grad.inl"
#include "attention/float_gradient.inl"
#include "attention/short_float_gradient.inl"

extern "C" int cvmk_attention_forward_avx2(const cvmk::attention::Params* p) { return forward<FloatEngine, ShortFloat>(*p); }
extern "C" int cvmk_attention_backward_avx2(const cvmk::attention::Params* p) { return backward<FloatGradient, ShortFloatGradient>(*p); }
extern "C" int cvmk_attention_bias_grad_avx2(const cvmk::attention::Params* p) { return bias_grad<FloatGradient>(*p); }
