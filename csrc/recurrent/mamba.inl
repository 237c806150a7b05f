#pragma once
#include "recurrent/passes.inl"

namespace cvmk::recurrent {
namespace {

template <typename Lanes>
CVMK_INLINE void conv_block(const Conv& p, int64_t c, Lanes lanes) {
  F weight[kTaps];
  read<kTaps>(p.weight, c, weight);
  const F bias = load(p.bias + c, lanes);
  for (int64_t i = 0; i < p.pass.count; ++i) {
    const Run& run = p.pass.runs[i];
    F before[kTaps - 1];
    begin<kTaps - 1>(p.pass, run, c, before);
    each_row(p.pass, run, [&](int64_t row) {
      const F x = load(p.x.data + row * p.x.stride + c, lanes);
      F y = bias;
      for (int k = 0; k < kTaps; ++k) y += weight[k] * (k < kTaps - 1 ? before[k] : x);
      for (int k = 0; k < kTaps - 2; ++k) before[k] = before[k + 1];
      before[kTaps - 2] = x;
      store(p.out + row * p.out_stride + c, activations::silu(y), lanes);
    });
    end<kTaps - 1>(p.pass, run, c, before);
  }
}

void run_conv(const Conv& p, char*, const Team& team) {
  each_block(p.pass, 1, team, [&](int64_t c, auto lanes) { conv_block(p, c, lanes); });
}

template <typename Lanes>
CVMK_INLINE void scan_block(const Scan& p, int64_t c, Lanes lanes) {
  F A[kStates];
  read<kStates>(p.A, c, A);
  const F D = load(p.D + c, lanes);
  for (int64_t i = 0; i < p.pass.count; ++i) {
    const Run& run = p.pass.runs[i];
    F state[kStates];
    begin<kStates>(p.pass, run, c, state);
    each_row(p.pass, run, [&](int64_t row) {
      const F u = load(p.u.data + row * p.u.stride + c, lanes), z = load(p.z.data + row * p.z.stride + c, lanes);
      const F step = scan::softplus(load(p.delta.data + row * p.delta.stride + c, lanes)), rate = scan::times_log2e(step), drive = step * u;
      const float *B = p.B.data + row * p.B.stride, *C = p.C.data + row * p.C.stride;
      F sums[2] = {D * u, F{}};  // two, for their chains to overlap
      for (int n = 0; n < kStates; ++n) {
        const F added = drive * B[n];
        state[n] = scan::exp2(rate * A[n]) * state[n] + added;
        sums[n % 2] += state[n] * C[n];
      }
      store(p.out + row * p.out_stride + c, (sums[0] + sums[1]) * (z * scan::sigmoid(z)), lanes);
    });
    end<kStates>(p.pass, run, c, state);
  }
}

void run_scan(const Scan& p, char*, const Team& team) {
  each_block(p.pass, kStates, team, [&](int64_t c, auto lanes) { scan_block(p, c, lanes); });
}

}  // namespace
}  // namespace cvmk::recurrent
