// bfloat16 on the tiles; other dtypes use the functions of AVX-512.
#include "attention/amx_gradient.inl"
#include "attention/bias_grad.inl"
#include "attention/short_amx.inl"

extern "C" int cvmk_attention_forward_amx(const cvmk::attention::Params* p) { return forward<AmxEngine, ShortAmx>(*p); }
extern "C" int cvmk_attention_backward_amx(const cvmk::attention::Params* p) { return backward<AmxGradient, AmxGradient::Short>(*p); }
extern "C" int cvmk_attention_bias_grad_amx(const cvmk::attention::Params* p) { return bias_grad<AmxGradient>(*p); }
