#pragma once
#include "recurrent/passes.inl"

namespace cvmk::recurrent {
namespace {

template <typename Lanes>
CVMK_INLINE void ssru_block(const Ssru& p, int64_t c, Lanes lanes) {
  for (int64_t i = 0; i < p.pass.count; ++i) {
    const Run& run = p.pass.runs[i];
    F cell;
    begin<1>(p.pass, run, c, &cell);
    each_row(p.pass, run, [&](int64_t row) {
      const F gate = load(p.gates.data + row * p.gates.stride + c, lanes), value = load(p.values.data + row * p.values.stride + c, lanes);
      // Of sigmoid(g) and sigmoid(-g) each is exact, however small the other is: what remains of a state is the product of many.
      const F e = simd::exp(-simd::abs(gate)), large = 1.0f / (1.0f + e), small = e * large;
      const F kept = gate < 0.0f ? small : large, added = (gate < 0.0f ? large : small) * value;
      cell = kept * cell + added;
      store(p.out + row * p.out_stride + c, activations::relu(cell), lanes);
    });
    end<1>(p.pass, run, c, &cell);
  }
}

void run_ssru(const Ssru& p, char*, const Team& team) {
  each_block(p.pass, 1, team, [&](int64_t c, auto lanes) { ssru_block(p, c, lanes); });
}

}  // namespace
}  // namespace cvmk::recurrent
