#include "attention/attention.h"
#include "common/cpu_features.h"

extern "C" {
int cvmk_attention_forward_base(const cvmk::attention::Params*);
int cvmk_attention_backward_base(const cvmk::attention::Params*);
int cvmk_attention_bias_grad_base(const cvmk::attention::Params*);
#if defined(CVMK_HAVE_ISA_LEVELS)
int cvmk_attention_forward_avx2(const cvmk::attention::Params*);
int cvmk_attention_backward_avx2(const cvmk::attention::Params*);
int cvmk_attention_bias_grad_avx2(const cvmk::attention::Params*);
int cvmk_attention_forward_avx512(const cvmk::attention::Params*);
int cvmk_attention_backward_avx512(const cvmk::attention::Params*);
int cvmk_attention_bias_grad_avx512(const cvmk::attention::Params*);
int cvmk_attention_forward_amx(const cvmk::attention::Params*);
int cvmk_attention_backward_amx(const cvmk::attention::Params*);
int cvmk_attention_bias_grad_amx(const cvmk::attention::Params*);
#endif
}

namespace cvmk::attention {
namespace {

struct Functions {
  int (*forward)(const Params*);
  int (*backward)(const Params*);
  int (*bias_grad)(const Params*);
};

Functions functions(const Params& params) {
#if defined(CVMK_HAVE_ISA_LEVELS)
  switch (dispatch_level()) {
    case IsaLevel::kAmx:
      if (params.dtype == kBFloat16) return {cvmk_attention_forward_amx, cvmk_attention_backward_amx, cvmk_attention_bias_grad_amx};
      [[fallthrough]];
    case IsaLevel::kAvx512: return {cvmk_attention_forward_avx512, cvmk_attention_backward_avx512, cvmk_attention_bias_grad_avx512};
    case IsaLevel::kAvx2: return {cvmk_attention_forward_avx2, cvmk_attention_backward_avx2, cvmk_attention_bias_grad_avx2};
    default: break;
  }
#else
  static_cast<void>(params);
#endif
  return {cvmk_attention_forward_base, cvmk_attention_backward_base, cvmk_attention_bias_grad_base};
}

}  // namespace

int forward(const Params& params) { return functions(params).forward(&params); }

int backward(const Params& params) {
  const Functions f = functions(params);
  const int status = params.dq.data != nullptr || params.dk.data != nullptr || params.dv_.data != nullptr ? f.backward(&params) : kDone;
  if (status != kDone || params.bias.grad == nullptr) return status;
  return f.bias_grad(&params);
}

}  // namespace cvmk::attention
