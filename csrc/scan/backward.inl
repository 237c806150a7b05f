// Backward pass of the selective scan. An item of work is up to kBlocks blocks of W channels of one group, for some rows of the batch.
//
// Chunks are taken from the last to the first. Within one, for each block and kStates states: the states and decays of the chunk are computed
// again from the state before it and kept (64 KB at 16 states, in the second-level cache), then the adjoint recurrence runs back over them:
//
//     h = C dy + carry,  carry = a h,  w = carry x_before,  and the sums of cvmk/ops/selective_scan.py
//
// dB and dC are sums over channels: products are added up lane by lane over the blocks of an item ([states][kChunk][W]), then across the lanes
// once a chunk, and the items' sums in a second pass. dA, dD, d bias and the gradients of constant B and C are summed over time within a lane,
// then over the parts of the batch. All orders depend on the sizes alone: the number of channels for dB and dC, that of rows for the others.

#include "scan/forward.inl"

namespace cvmk::scan {
namespace {

constexpr int64_t kMostBlocks = 4;      // blocks of an item: the sums across lanes are shared by so many
constexpr int64_t kFewSums = 1 << 15;    // numbers to be added up that are not worth another thread
constexpr int64_t kSumsOfItem = 1024;    // sums that a thread makes at a time
constexpr int64_t kMostBatchParts = 64;  // parts of the batch whose sums over time are kept apart

// Offsets of the sums over batch and time within one part: dA, dD, d bias, constant dB, constant dC; each of [channels, ...].
struct Sums {
  int64_t A, D, bias, B, C, size;
  CVMK_INLINE explicit Sums(const Scan& s) {
    const int64_t square = s.channels * s.states;
    A = 0;
    D = square;
    bias = D + s.channels;
    B = bias + s.channels;
    C = B + (s.B.constant != nullptr ? square : 0);
    size = C + (s.C.constant != nullptr ? square : 0);
  }
};

// How the work is cut; a function of the sizes alone.
struct Cut {
  int64_t blocks;       // of W channels in a group
  int64_t per_item;     // blocks of an item
  int64_t items;        // in a group
  int64_t batch_parts;  // each of rows_of_part rows but for the last
  int64_t rows_of_part;
  explicit CVMK_INLINE Cut(const Scan& s) {
    blocks = blocks_of_group(s);
    per_item = most(1, least(blocks / 8, kMostBlocks));  // whatever the batch: a row's dB and dC must not hang on it
    items = (blocks + per_item - 1) / per_item;
    rows_of_part = (s.batch + kMostBatchParts - 1) / kMostBatchParts;
    batch_parts = rows_of_part == 0 ? 0 : (s.batch + rows_of_part - 1) / rows_of_part;
  }
};

struct BackwardScratch {
  float *u, *step, *rate, *drive, *g, *dy, *slope, *y, *z, *gate;  // [kChunk][W]; rate and drive as forward, slope is the derivative of softplus
  float *du, *dstep;                                 // [kChunk][W]: sum_n h B, sum_n w A
  float *decays, *before;                            // [kChunk][kStates][W], the second with one step more
  float *entry, *A;                                  // [states][W]
  float *B, *C;                                      // [states][kChunk], or constant [states][W]
  float *dB, *dC;                                    // [states][pitch][W], sums of the item in one chunk
  int64_t pitch;                                     // steps of a chunk, and odd: of a power of 2, a step of all states is one set of the first-level cache
  float* carry;                                      // [kMostBlocks][states][W]
  float *dA, *dD, *dbias, *constant_dB, *constant_dC;  // [kMostBlocks][states][W] or [kMostBlocks][W], sums of the item

  CVMK_INLINE BackwardScratch(const Scan& s, Arena* a) {
    const int64_t tile = kChunk * W, square = s.states * W;
    pitch = least(s.length, kChunk) | 1;
    u = a->take<float>(tile);
    step = a->take<float>(tile);
    rate = a->take<float>(tile);
    drive = a->take<float>(tile);
    g = a->take<float>(tile);
    dy = a->take<float>(tile);
    slope = a->take<float>(tile);
    y = a->take<float>(tile);
    z = a->take<float>(tile);
    gate = a->take<float>(tile);
    du = a->take<float>(tile);
    dstep = a->take<float>(tile);
    decays = a->take<float>(tile * kStates);
    before = a->take<float>((kChunk + 1) * W * kStates);
    entry = a->take<float>(square);
    A = a->take<float>(square);
    B = a->take<float>(s.states * kChunk);
    C = a->take<float>(s.states * kChunk);
    dB = a->take<float>(s.B.constant != nullptr ? 0 : s.states * pitch * W);
    dC = a->take<float>(s.C.constant != nullptr ? 0 : s.states * pitch * W);
    carry = a->take<float>(square * kMostBlocks);
    dA = a->take<float>(square * kMostBlocks);
    dD = a->take<float>(W * kMostBlocks);
    dbias = a->take<float>(W * kMostBlocks);
    constant_dB = a->take<float>(square * kMostBlocks);
    constant_dC = a->take<float>(square * kMostBlocks);
  }
};

// The parts of the scratch of one block that an inner loop needs.
struct Inner {
  const float *rate, *drive, *dy, *A, *B, *C, *entry;
  float *y, *du, *dstep, *decays, *before, *dB, *dC, *carry, *dA, *constant_dB, *constant_dC;
  int64_t pitch;
};

template <int kCount, bool kConstantB, bool kConstantC, bool kOutput>
CVMK_INLINE void retreat(const Inner& k, int64_t n, int begin, int end) {
  F x[kCount], A[kCount], B[kCount], C[kCount];
  for (int j = 0; j < kCount; ++j) {
    x[j] = simd::load(k.entry + (n + j) * W);
    A[j] = simd::load(k.A + (n + j) * W);
    if (kConstantB) B[j] = simd::load(k.B + (n + j) * W);
    if (kConstantC) C[j] = simd::load(k.C + (n + j) * W);
  }
  for (int t = begin; t < end; ++t) {
    const F rate = simd::load(k.rate + t * W), drive = simd::load(k.drive + t * W);
    F y = kOutput ? simd::load(k.y + t * W) : F{};
    for (int j = 0; j < kCount; ++j) {
      simd::store(k.before + (t * kCount + j) * W, x[j]);
      const F decay = exp2(rate * A[j]);
      simd::store(k.decays + (t * kCount + j) * W, decay);
      const F added = drive * (kConstantB ? B[j] : simd::set(k.B[(n + j) * kChunk + t]));
      x[j] = decay * x[j] + added;
      if (kOutput) y += x[j] * (kConstantC ? C[j] : simd::set(k.C[(n + j) * kChunk + t]));
    }
    if (kOutput) simd::store(k.y + t * W, y);
  }
  F carry[kCount], dA[kCount], dB[kCount], dC[kCount];
  for (int j = 0; j < kCount; ++j) {
    carry[j] = simd::load(k.carry + (n + j) * W);
    dA[j] = dB[j] = dC[j] = F{};
  }
  for (int t = end - 1; t >= begin; --t) {
    const F rate = simd::load(k.rate + t * W), drive = simd::load(k.drive + t * W), dy = simd::load(k.dy + t * W);
    F du = simd::load(k.du + t * W), dstep = simd::load(k.dstep + t * W);
    for (int j = 0; j < kCount; ++j) {
      const int64_t at = ((n + j) * k.pitch + t) * W;
      const F h = dy * (kConstantC ? C[j] : simd::set(k.C[(n + j) * kChunk + t])) + carry[j];
      if (kConstantC) dC[j] += dy * x[j];
      else simd::store(k.dC + at, simd::load(k.dC + at) + dy * x[j]);
      if (kConstantB) dB[j] += drive * h;
      else simd::store(k.dB + at, simd::load(k.dB + at) + drive * h);
      du += h * (kConstantB ? B[j] : simd::set(k.B[(n + j) * kChunk + t]));
      carry[j] = h * simd::load(k.decays + (t * kCount + j) * W);
      x[j] = simd::load(k.before + (t * kCount + j) * W);
      const F w = carry[j] * x[j];
      dstep += w * A[j];
      dA[j] += w * rate;
    }
    simd::store(k.du + t * W, du);
    simd::store(k.dstep + t * W, dstep);
  }
  for (int j = 0; j < kCount; ++j) {
    const int64_t at = (n + j) * W;
    simd::store(k.carry + at, carry[j]);
    simd::store(k.dA + at, simd::load(k.dA + at) + dA[j] * kLn2);
    if (kConstantB) simd::store(k.constant_dB + at, simd::load(k.constant_dB + at) + dB[j]);
    if (kConstantC) simd::store(k.constant_dC + at, simd::load(k.constant_dC + at) + dC[j]);
  }
}

template <bool kConstantB, bool kConstantC, bool kOutput>
inline __attribute__((noinline)) void retreat_all(const Inner& k, int64_t states, int begin, int end) {
  int64_t n = 0;
  for (; n + kStates <= states; n += kStates) retreat<kStates, kConstantB, kConstantC, kOutput>(k, n, begin, end);
  for (; n < states; ++n) retreat<1, kConstantB, kConstantC, kOutput>(k, n, begin, end);
}
typedef void (*RetreatAll)(const Inner&, int64_t, int, int);
template <bool kOutput>
CVMK_INLINE RetreatAll choose_retreat(const Scan& s) {
  if (s.B.constant != nullptr) return s.C.constant != nullptr ? retreat_all<true, true, kOutput> : retreat_all<true, false, kOutput>;
  return s.C.constant != nullptr ? retreat_all<false, true, kOutput> : retreat_all<false, false, kOutput>;
}

// Load one chunk of one block and compute what its inner loops read.
CVMK_INLINE void enter_chunk(const ScanBackward& p, const Block& b, const Extent& e, const BackwardScratch& k, F bias, F D) {
  const Scan& s = p.scan;
  load_steps(s, s.u, b, e, k.u);
  load_steps(s, s.delta, b, e, k.step);
  load_steps(s, p.grad_out, b, e, k.g);
  if (s.z.data != nullptr) load_steps(s, s.z, b, e, k.z);
  for (int t = 0; t < e.steps; ++t) {
    const F u = simd::load(k.u + t * W), raw = simd::load(k.step + t * W) + bias, g = simd::load(k.g + t * W);
    F step = raw;
    if (s.softplus) {
      const F x = simd::exp(-simd::abs(raw));
      step = softplus_of(raw, x);
      simd::store(k.slope + t * W, sigmoid_of(raw, x));
    }
    simd::store(k.step + t * W, step);
    simd::store(k.rate + t * W, times_log2e(step));
    simd::store(k.drive + t * W, step * u);
    simd::store(k.du + t * W, F{});
    simd::store(k.dstep + t * W, F{});
    simd::store(k.y + t * W, D * u);
    if (s.z.data != nullptr) {
      const F z = simd::load(k.z + t * W), gate = sigmoid(z);
      simd::store(k.gate + t * W, gate);
      simd::store(k.dy + t * W, g * (z * gate));
    } else {
      simd::store(k.dy + t * W, g);
    }
  }
}

// Turn the sums over the states into the gradients of this chunk's steps and write them.
CVMK_INLINE void leave_chunk(const ScanBackward& p, const Block& b, const Extent& e, const BackwardScratch& k, int64_t m, F D) {
  const Scan& s = p.scan;
  F dD{}, dbias{};
  for (int t = 0; t < e.steps; ++t) {
    const F u = simd::load(k.u + t * W), dy = simd::load(k.dy + t * W), from_input = simd::load(k.du + t * W);
    F ddelta = from_input * u + simd::load(k.dstep + t * W);
    if (s.softplus) ddelta *= simd::load(k.slope + t * W);
    F du = from_input * simd::load(k.step + t * W);
    if (s.D != nullptr) du += D * dy;
    dD += dy * u;
    dbias += ddelta;
    simd::store(k.du + t * W, du);
    simd::store(k.dstep + t * W, ddelta);
  }
  simd::store(k.dD + m * W, simd::load(k.dD + m * W) + dD);
  simd::store(k.dbias + m * W, simd::load(k.dbias + m * W) + dbias);
  if (p.du != nullptr) store_steps(s, p.du, s.u.dtype, b, e, k.du);
  if (p.ddelta != nullptr) store_steps(s, p.ddelta, s.delta.dtype, b, e, k.dstep);
  if (p.dz != nullptr) {
    for (int t = 0; t < e.steps; ++t) {
      const F z = simd::load(k.z + t * W), gate = simd::load(k.gate + t * W);
      simd::store(k.y + t * W, simd::load(k.g + t * W) * simd::load(k.y + t * W) * gate * (1.0f + z * (1.0f - gate)));
    }
    store_steps(s, p.dz, s.z.dtype, b, e, k.y);
  }
}

CVMK_INLINE void retreat_block(const ScanBackward& p, const Spans& spans, int64_t c, const Block& b, const BackwardScratch& k, int64_t m, RetreatAll run) {
  const Scan& s = p.scan;
  const int64_t square = s.states * W;
  const F bias = load_channels(s.bias, b, 0.0f), D = load_channels(s.D, b, 0.0f);
  load_states(s, s.A, b.channel, b.lanes, k.A);
  if (s.B.constant != nullptr) load_states(s, s.B.constant, b.channel, b.lanes, k.B);
  if (s.C.constant != nullptr) load_states(s, s.C.constant, b.channel, b.lanes, k.C);
  const Inner inner{k.rate, k.drive, k.dy, k.A, k.B, k.C, k.entry, k.y, k.du, k.dstep, k.decays, k.before, k.dB, k.dC,
                    k.carry + m * square, k.dA + m * square, k.constant_dB + m * square, k.constant_dC + m * square, k.pitch};
  const Extent e = extent(s, c);
  enter_chunk(p, b, e, k, bias, D);
  for (int64_t i = spans.starts[c + 1] - 1; i >= spans.starts[c]; --i) {
    const Span& span = spans.spans[i];
    const int64_t row = (span.sequence < 0 ? b.batch : span.sequence) * s.channels + b.channel;
    if (span.final) load_states(s, p.grad_last, row, b.lanes, inner.carry);
    if (span.first) load_states(s, s.initial, row, b.lanes, k.entry);
    else load_states(s, p.kept, (b.batch * spans.chunks + c) * s.channels + b.channel, b.lanes, k.entry);
    run(inner, s.states, static_cast<int>(span.begin - c * kChunk), static_cast<int>(span.end - c * kChunk));
    if (span.first && p.dinitial != nullptr) store_states(s, p.dinitial, row, b.lanes, inner.carry);
  }
  leave_chunk(p, b, e, k, m, D);
}

// `count` sums over the lanes of vectors that lie `stride` floats apart.
CVMK_INLINE F lane_sums(const float* from, int64_t stride, int count) {
  F v[W];
  for (int i = 0; i < W; ++i) v[i] = i < count ? simd::load(from + i * stride) : F{};
  return row_sums(v);
}

// The sums over an item's channels, [states][length] at `to`, or [length][states] where channels are last.
inline __attribute__((noinline)) void store_lane_sums(const Scan& s, const Extent& e, const float* sums, int64_t pitch, float* to) {
  if (s.channels_last) {
    for (int t = 0; t < e.steps; ++t) {
      float* const row = to + (s.reverse ? e.time + e.steps - 1 - t : e.time + t) * s.states;
      for (int64_t n = 0; n < s.states; n += W) {
        const int count = static_cast<int>(least(W, s.states - n));
        simd::store_n(row + n, lane_sums(sums + (n * pitch + t) * W, pitch * W, count), count);
      }
    }
    return;
  }
  for (int64_t n = 0; n < s.states; ++n) {
    for (int t = 0; t < e.steps; t += W) {
      const int count = e.steps - t < W ? e.steps - t : W;
      const F total = lane_sums(sums + (n * pitch + t) * W, W, count);
      float* row = to + n * s.length + e.time;
      if (!s.reverse) simd::store_n(row + t, total, count);
      else
        for (int i = 0; i < count; ++i) row[e.steps - 1 - t - i] = total[i];
    }
  }
}

struct Parts {
  float *dB, *dC;  // [batch, groups, items, states, length], or of each item [length, states] where channels are last; or null
  float* sums;     // [batch_parts, Sums::size]
};

CVMK_INLINE void backward_item(const ScanBackward& p, const Spans& spans, const Cut& cut, int64_t part, int64_t group, int64_t item, const BackwardScratch& k,
                               const Parts& parts) {
  const Scan& s = p.scan;
  const int64_t square = s.states * W, first = item * cut.per_item;
  const int64_t count = cut.blocks - first < cut.per_item ? cut.blocks - first : cut.per_item;
  const RetreatAll run = p.dz != nullptr ? choose_retreat<true>(s) : choose_retreat<false>(s);
  fill(k.dA, count * square, 0.0f);
  fill(k.dD, count * W, 0.0f);
  fill(k.dbias, count * W, 0.0f);
  fill(k.constant_dB, count * square, 0.0f);
  fill(k.constant_dC, count * square, 0.0f);
  const int64_t from = part * cut.rows_of_part, to = from + cut.rows_of_part < s.batch ? from + cut.rows_of_part : s.batch;
  for (int64_t batch = from; batch < to; ++batch) {
    for (int64_t c = spans.chunks - 1; c >= 0; --c) {
      const Extent e = extent(s, c);
      const int64_t place = ((batch * s.groups + group) * cut.items + item) * s.states * s.length;
      if (s.B.constant == nullptr) {
        load_weights(s, s.B, batch, group, e, k.B);
        fill(k.dB, s.states * k.pitch * W, 0.0f);
      }
      if (s.C.constant == nullptr) {
        load_weights(s, s.C, batch, group, e, k.C);
        fill(k.dC, s.states * k.pitch * W, 0.0f);
      }
      for (int64_t m = 0; m < count; ++m) retreat_block(p, spans, c, block_at(s, batch, group, first + m), k, m, run);
      if (parts.dB != nullptr) store_lane_sums(s, e, k.dB, k.pitch, parts.dB + place);
      if (parts.dC != nullptr) store_lane_sums(s, e, k.dC, k.pitch, parts.dC + place);
    }
  }
  const Sums sums(s);
  float* out = parts.sums + part * sums.size;
  for (int64_t m = 0; m < count; ++m) {
    const Block b = block_at(s, 0, group, first + m);
    store_states(s, out + sums.A, b.channel, b.lanes, k.dA + m * square);
    simd::store_n(out + sums.D + b.channel, simd::load(k.dD + m * W), b.lanes);
    simd::store_n(out + sums.bias + b.channel, simd::load(k.dbias + m * W), b.lanes);
    if (s.B.constant != nullptr) store_states(s, out + sums.B, b.channel, b.lanes, k.constant_dB + m * square);
    if (s.C.constant != nullptr) store_states(s, out + sums.C, b.channel, b.lanes, k.constant_dC + m * square);
  }
}

// The parts of the batch added up, one after the other, in double precision.
inline void add_parts(const float* parts, int64_t count, int64_t pitch, int64_t size, float* out) {
  constexpr int64_t kAtOnce = 64;
  for (int64_t first = 0; first < size; first += kAtOnce) {
    const int64_t some = least(kAtOnce, size - first);
    double totals[kAtOnce] = {};
    for (int64_t part = 0; part < count; ++part)
      for (int64_t i = 0; i < some; ++i) totals[i] += static_cast<double>(parts[part * pitch + first + i]);
    for (int64_t i = 0; i < some; ++i) out[first + i] = static_cast<float>(totals[i]);
  }
}

// One row [length] (channels last: [states]) of dB or dC from the sums of the items of its group.
template <Dtype kType>
CVMK_INLINE void add_items_as(const float* parts, int64_t items, int64_t pitch, int64_t length, void* out) {
  for (int64_t t = 0; t < length; t += W) {
    const int n = static_cast<int>(length - t < W ? length - t : W);
    F total = simd::load_n(parts + t, n);
    for (int64_t item = 1; item < items; ++item) total += simd::load_n(parts + item * pitch + t, n);
    elements::store_n<kType>(elements::at(out, kType, t), total, n);
  }
}
CVMK_INLINE void add_items(const Scan& s, const Cut& cut, const float* parts, void* out, Dtype dtype, int64_t row) {
  const int64_t pitch = s.states * s.length, rows = s.channels_last ? s.length : s.states, width = s.channels_last ? s.states : s.length;
  const int64_t of_group = row / rows, at = row % rows;
  const float* from = parts + (of_group * cut.items * rows + at) * width;
  // Channels last: [batch, length, group, state].
  const int64_t place = s.channels_last ? (of_group / s.groups * s.length + at) * s.groups + of_group % s.groups : row;
  void* to = elements::at(out, dtype, place * width);
  if (dtype == kFloat32) add_items_as<kFloat32>(from, cut.items, pitch, width, to);
  else if (dtype == kBFloat16) add_items_as<kBFloat16>(from, cut.items, pitch, width, to);
  else add_items_as<kFloat16>(from, cut.items, pitch, width, to);
}

// The memory of a pass: the spans, what the items leave for the sums at the end, and a part for each thread.
struct BackwardPlan {
  Cut cut;
  Sums sums;
  int64_t items, each;
  Spans spans;
  Parts parts;
  char* own;
  CVMK_INLINE BackwardPlan(const ScanBackward& p, const Team& team, Arena* a) : cut(p.scan), sums(p.scan) {
    const Scan& s = p.scan;
    const int64_t entries = s.batch * s.groups * s.states * cut.items * s.length;
    items = s.length == 0 ? 0 : cut.batch_parts * s.groups * cut.items;
    Arena one;
    BackwardScratch(s, &one);
    each = one.used;
    spans = take_spans(s, a);
    parts.dB = p.dB != nullptr && s.B.constant == nullptr ? a->take<float>(entries) : nullptr;
    parts.dC = p.dC != nullptr && s.C.constant == nullptr ? a->take<float>(entries) : nullptr;
    parts.sums = a->take<float>(cut.batch_parts * sums.size);
    own = a->take<char>(least(items, team.size) * each);
  }
};

inline __attribute__((unused)) int64_t backward_scratch(const ScanBackward& p, const Team& team) {
  Arena count;
  BackwardPlan(p, team, &count);
  return count.used;
}

// dB and dC (unless they are constant), then the sums over batch and time.
CVMK_INLINE void finish_backward(const ScanBackward& p, const BackwardPlan& plan, const Team& team) {
  const Scan& s = p.scan;
  const int64_t rows = s.batch * s.groups * (s.channels_last ? s.length : s.states);
  for (int which = 0; which < 2; ++which) {
    const float* from = which == 0 ? plan.parts.dB : plan.parts.dC;
    if (from == nullptr) continue;
    team.each(pieces(rows, 16), [&](int64_t some, int) {
      for (int64_t row = some * 16; row < least(rows, some * 16 + 16); ++row)
        add_items(s, plan.cut, from, which == 0 ? p.dB : p.dC, which == 0 ? s.B.varying.dtype : s.C.varying.dtype, row);
    });
  }
  const int64_t square = s.channels * s.states, count = plan.cut.batch_parts, pitch = plan.sums.size;
  const float* sums = plan.parts.sums;
  const auto add = [&](int64_t offset, int64_t size, float* out) {
    if (out == nullptr) return;
    const int64_t each = count * size < kFewSums ? most(1, size) : kSumsOfItem;
    team.each(pieces(size, each), [&](int64_t item, int) {
      const int64_t first = item * each;
      add_parts(sums + offset + first, count, pitch, least(each, size - first), out + first);
    });
  };
  add(plan.sums.A, square, p.dA);
  add(plan.sums.D, s.channels, p.dD);
  add(plan.sums.bias, s.channels, p.dbias);
  if (s.B.constant != nullptr) add(plan.sums.B, square, static_cast<float*>(p.dB));
  if (s.C.constant != nullptr) add(plan.sums.C, square, static_cast<float*>(p.dC));
}

inline __attribute__((unused)) void run_backward(const ScanBackward& p, char* scratch, const Team& team) {
  const Scan& s = p.scan;
  pass_empty(s, p.grad_last, p.dinitial);
  Arena arena{scratch};
  const BackwardPlan plan(p, team, &arena);
  fill_spans(s, &plan.spans);
  if (s.length == 0) fill(plan.parts.sums, plan.cut.batch_parts * plan.sums.size, 0.0f);
  team.each(plan.items, [&](int64_t item, int thread) {
    const unsigned mode = flush_subnormals();
    Arena own{plan.own + thread * plan.each};
    const BackwardScratch k(s, &own);
    const int64_t items = plan.cut.items;
    backward_item(p, plan.spans, plan.cut, item / items / s.groups, item / items % s.groups, item % items, k, plan.parts);
    restore_subnormals(mode);
  });
  finish_backward(p, plan, team);
}

}  // namespace
}  // namespace cvmk::scan
