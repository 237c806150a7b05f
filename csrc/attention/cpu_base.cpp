#include "attention/bias_grad.inl"
#include "attention/float_gradient.inl"
#include "attention/short_float_gradient.inl"

extern "C" int cvmk_attention_forward_base(const cvmk::attention::Params* p) { return forward<FloatEngine, ShortFloat>(*p); }
extern "C" int cvmk_attention_backward_base(const cvmk::attention::Params* p) { return backward<FloatGradient, ShortFloatGradient>(*p); }
extern "C" int cvmk_attention_bias_grad_base(const cvmk::attention::Params* p) { return bias_grad<FloatGradient>(*p); }
