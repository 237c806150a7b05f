// Forward pass of the selective scan: one item of work is W channels of one row of the batch, over the whole length.
//
// Lanes are channels. Decay and state of one (channel, state) pair are a lane of a register that walks through a chunk of 64 steps; kStates
// states go together, so that their chains of multiply-adds overlap; what depends on step and u alone lies in the first-level cache, B and C are
// broadcast from memory. Nothing is summed across lanes. Lanes = states was the alternative: it needs a sum across the lanes for every output
// (3 instructions a vector of decays) and wastes lanes where the number of states is no multiple of W.

#include "scan/spans.inl"

namespace cvmk::scan {
namespace {

#if defined(__AVX512F__)
constexpr int kStates = 4;  // of 32 registers: 4 states, 4 rows of A, 8 constants
#else
constexpr int kStates = 2;
#endif

struct ForwardScratch {
  float *u, *rate, *drive, *y;  // [kChunk][W]; rate is step times log2(e), drive step times u
  float *x, *A;                 // [states][W]
  float *B, *C;                 // [states][kChunk], or constant [states][W]

  CVMK_INLINE ForwardScratch(const Scan& s, Arena* a) {
    u = a->take<float>(kChunk * W);
    rate = a->take<float>(kChunk * W);
    drive = a->take<float>(kChunk * W);
    y = a->take<float>(kChunk * W);
    x = a->take<float>(s.states * W);
    A = a->take<float>(s.states * W);
    B = a->take<float>(s.states * kChunk);
    C = a->take<float>(s.states * kChunk);
  }
};

// Steps [begin, end) of the chunk for the states [n, n + kCount).
template <int kCount, bool kConstantB, bool kConstantC>
CVMK_INLINE void advance(const ForwardScratch& k, int64_t n, int begin, int end) {
  F x[kCount], A[kCount], B[kCount], C[kCount];
  for (int j = 0; j < kCount; ++j) {
    x[j] = simd::load(k.x + (n + j) * W);
    A[j] = simd::load(k.A + (n + j) * W);
    if (kConstantB) B[j] = simd::load(k.B + (n + j) * W);
    if (kConstantC) C[j] = simd::load(k.C + (n + j) * W);
  }
  for (int t = begin; t < end; ++t) {
    const F rate = simd::load(k.rate + t * W), drive = simd::load(k.drive + t * W);
    F y = simd::load(k.y + t * W);
    for (int j = 0; j < kCount; ++j) {
      const F added = drive * (kConstantB ? B[j] : simd::set(k.B[(n + j) * kChunk + t]));
      x[j] = exp2(rate * A[j]) * x[j] + added;
      y += x[j] * (kConstantC ? C[j] : simd::set(k.C[(n + j) * kChunk + t]));
    }
    simd::store(k.y + t * W, y);
  }
  for (int j = 0; j < kCount; ++j) simd::store(k.x + (n + j) * W, x[j]);
}

template <bool kConstantB, bool kConstantC>
inline __attribute__((noinline)) void advance_all(const ForwardScratch& k, int64_t states, int begin, int end) {
  int64_t n = 0;
  for (; n + kStates <= states; n += kStates) advance<kStates, kConstantB, kConstantC>(k, n, begin, end);
  for (; n < states; ++n) advance<1, kConstantB, kConstantC>(k, n, begin, end);
}

// `loaded`: B and C of the only chunk are there, from another block of the group.
CVMK_INLINE void forward_block(const ScanForward& p, const Spans& spans, const Block& b, const ForwardScratch& k, bool loaded) {
  const Scan& s = p.scan;
  load_states(s, s.A, b.channel, b.lanes, k.A);
  if (s.B.constant != nullptr) load_states(s, s.B.constant, b.channel, b.lanes, k.B);
  if (s.C.constant != nullptr) load_states(s, s.C.constant, b.channel, b.lanes, k.C);
  const F bias = load_channels(s.bias, b, 0.0f), D = load_channels(s.D, b, 0.0f);
  const auto run = s.B.constant != nullptr ? (s.C.constant != nullptr ? advance_all<true, true> : advance_all<true, false>)
                                           : (s.C.constant != nullptr ? advance_all<false, true> : advance_all<false, false>);
  // Packed sequences bring their initial states in where they begin.
  load_states(s, s.cu_seqlens == nullptr ? s.initial : nullptr, b.batch * s.channels + b.channel, b.lanes, k.x);
  for (int64_t c = 0; c < spans.chunks; ++c) {
    const Extent e = extent(s, c);
    if (p.kept != nullptr) store_states(s, p.kept, (b.batch * spans.chunks + c) * s.channels + b.channel, b.lanes, k.x);
    load_steps(s, s.u, b, e, k.u);
    load_steps(s, s.delta, b, e, k.rate);
    if (s.B.constant == nullptr && !loaded) load_weights(s, s.B, b.batch, b.group, e, k.B);
    if (s.C.constant == nullptr && !loaded) load_weights(s, s.C, b.batch, b.group, e, k.C);
    for (int t = 0; t < e.steps; ++t) {
      const F u = simd::load(k.u + t * W), raw = simd::load(k.rate + t * W) + bias;
      const F step = s.softplus ? softplus(raw) : raw;
      simd::store(k.rate + t * W, times_log2e(step));
      simd::store(k.drive + t * W, step * u);
      simd::store(k.y + t * W, s.D == nullptr ? F{} : D * u);
    }
    if (s.z.data != nullptr) {  // the gate, in the place of u
      load_steps(s, s.z, b, e, k.u);
      for (int t = 0; t < e.steps; ++t) {
        const F z = simd::load(k.u + t * W);
        simd::store(k.u + t * W, z * sigmoid(z));
      }
    }
    for (int64_t i = spans.starts[c]; i < spans.starts[c + 1]; ++i) {
      const Span& span = spans.spans[i];
      const int64_t sequence = span.sequence < 0 ? b.batch : span.sequence, row = sequence * s.channels + b.channel;
      if (span.first && span.sequence >= 0) load_states(s, s.initial, row, b.lanes, k.x);
      run(k, s.states, static_cast<int>(span.begin - c * kChunk), static_cast<int>(span.end - c * kChunk));
      if (span.final) store_states(s, p.last, row, b.lanes, k.x);
    }
    if (s.z.data != nullptr)
      for (int t = 0; t < e.steps; ++t) simd::store(k.y + t * W, simd::load(k.y + t * W) * simd::load(k.u + t * W));
    store_steps(s, p.out, s.u.dtype, b, e, k.y);
  }
}

// The memory of a pass: the spans, and a part for each thread. An item is one block, or of short sequences up to four of a group, which share the
// group's B and C, where the threads have enough to do all the same.
struct ForwardPlan {
  int64_t blocks, run, runs, items, each;  // blocks of a group, of an item; items of a group, of all
  Spans spans;
  char* own;
  CVMK_INLINE ForwardPlan(const Scan& s, const Team& team, Arena* a) {
    blocks = blocks_of_group(s);
    run = chunk_count(s) > 1 ? 1 : most(1, least(4, s.batch * s.groups * blocks / (4 * team.size)));
    runs = pieces(blocks, run);
    items = s.length == 0 ? 0 : s.batch * s.groups * runs;
    Arena one;
    ForwardScratch(s, &one);
    each = one.used;
    spans = take_spans(s, a);
    own = a->take<char>(least(items, team.size) * each);
  }
};

inline __attribute__((unused)) int64_t forward_scratch(const ScanForward& p, const Team& team) {
  Arena count;
  ForwardPlan(p.scan, team, &count);
  return count.used;
}

inline __attribute__((unused)) void run_forward(const ScanForward& p, char* scratch, const Team& team) {
  const Scan& s = p.scan;
  pass_empty(s, s.initial, p.last);
  Arena arena{scratch};
  const ForwardPlan plan(s, team, &arena);
  if (plan.items == 0) return;
  fill_spans(s, &plan.spans);
  team.each(plan.items, [&](int64_t item, int thread) {
    const unsigned mode = flush_subnormals();
    Arena own{plan.own + thread * plan.each};
    const ForwardScratch k(s, &own);
    const int64_t first = item % plan.runs * plan.run, group = item / plan.runs % s.groups, batch = item / plan.runs / s.groups;
    for (int64_t i = first; i < least(plan.blocks, first + plan.run); ++i) forward_block(p, plan.spans, block_at(s, batch, group, i), k, i > first);
    restore_subnormals(mode);
  });
}

}  // namespace
}  // namespace cvmk::scan
