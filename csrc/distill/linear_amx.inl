// linear_kd_loss in bfloat16 on the AMX tiles. Logits exist a block of kColumns x kRowBlock at a time, transposed: an entry of the
// vocabulary is a row, and the lanes of a vector are the rows of the batch. Three sweeps over the vocabulary for a chunk of rows, each of
// which makes the logits anew (which is cheaper than keeping them): sums; for the divergences of a mixture, theirs; gradients.
//
//   logits^T [v, row] = W H^T         left W, right H turned into pairs
//   dW [v, d]        += G^T H         left G^T, right H in pairs of rows; kSub rows after kSub rows, the chunks in their order
//   dH [row, d]       = sum G W       left G, turned in registers, right W in pairs of rows; a partial sum a group of blocks, then the
//                                     groups in their order
//
// What stays in a core's second-level cache: a block's weights in three forms, its weight gradient, and the gradient of kSub x kColumns
// logits twice; hidden states and the hidden states' gradient pass by.

#include "distill/linear_columns.inl"

namespace {
namespace distill {

CVMK_INLINE void pack_block(const Layer& layer, int64_t padded, const Block& block, Half* to, float* bias) {
  for (int64_t v = 0; v < block.padded(); v += 16) {
    const Half* rows[16];
    for (int r = 0; r < 16; ++r) rows[r] = v + r < block.columns ? layer.weight + (block.first + v + r) * layer.weight_stride : nullptr;
    pack_left(rows, layer.width, padded, to + v * padded);
  }
  for (int64_t v = 0; v < block.columns; ++v)
    bias[v] = layer.bias == nullptr ? 0.0f : simd::bits<float>(static_cast<uint32_t>(layer.bias[block.first + v]) << 16);
}

CVMK_INLINE void pack_block_pairs(const Layer& layer, int64_t padded, const Block& block, Half* to) {
  for (int64_t v = 0; v < block.padded(); v += 32) {
    const Half* rows[32];
    for (int r = 0; r < 32; ++r) rows[r] = v + r < block.columns ? layer.weight + (block.first + v + r) * layer.weight_stride : nullptr;
    pack_pairs(rows, layer.width, padded, to + v / 32 * kTile, kColumns / 32 * kTile);
  }
}

// body(own, block) for every block of the vocabulary, whose weights and biases are in `own`; a group's blocks in their order, in one thread.
template <typename Body>
CVMK_INLINE void each_block(const Chunk& chunk, bool with_teacher, const Body& body) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  threads::each(plan.groups, [&](int64_t group) {
    _tile_loadconfig(&kTileConfig);
    const Own own = own_scratch(pass, plan);
    for (int64_t number = group * plan.per_group; number < (group + 1) * plan.per_group && number < plan.blocks; ++number) {
      const int64_t first = number * kColumns, left = pass.vocabulary - first;
      const Block block{group, first, left < kColumns ? left : kColumns, number == group * plan.per_group};
      pack_block(pass.student, plan.width, block, own.student_block, own.student_bias);
      if (with_teacher) pack_block(pass.teacher, plan.teacher_width, block, own.teacher_block, own.teacher_bias);
      body(own, block);
    }
    _tile_release();
  });
}

// The logits of a block and kRowBlock rows; the hidden states of the next rows are fetched meanwhile.
CVMK_INLINE void block_logits(const Half* weight, const Half* hidden, int64_t width, const Block& block, float* logits) {
  multiply(block.padded(), kRowBlock, width / 32, {weight, kTile, 16 * width}, {hidden, kTile, 16 * width}, logits, 0, false,
           fetch_of(hidden + kRowBlock * width, kRowBlock * width, block.padded(), width / 32));
}

// body(row) for the rows [begin, end), 16 at a time, with the logits of kRowBlock rows in own.s and own.t: those of 16 from `lane` on.
template <typename Body>
CVMK_INLINE void each_rows(const Chunk& chunk, const Own& own, const Block& block, bool with_teacher, int64_t begin, int64_t end, const Body& body) {
  const int64_t width = chunk.plan.width, wide = chunk.plan.teacher_width;
  for (int64_t row = begin; row < end; row += kRowBlock) {
    block_logits(own.student_block, chunk.turned + row * width, width, block, own.s);
    if (with_teacher) block_logits(own.teacher_block, chunk.teacher + row * wide, wide, block, own.t);
    for (int64_t lane = 0; lane < kRowBlock; lane += kLanes) body(row + lane, lane);
  }
}

template <int kTemperature, int kKind>
__attribute__((noinline)) void sweep_sums(const Chunk& chunk) {
  const bool smooth = chunk.pass.terms.smoothing > 0;
  const float inverse = 1.0f / chunk.pass.terms.temperature;
  each_block(chunk, kKind != kNoTeacher, [&](const Own& own, const Block& block) {
    each_rows(chunk, own, block, kKind != kNoTeacher, 0, chunk.padded, [&](int64_t row, int64_t lane) __attribute__((always_inline)) {
      if (block.opens || !add_columns<kTemperature, kKind, false>(chunk, block, row, own, lane, inverse))
        add_columns<kTemperature, kKind, true>(chunk, block, row, own, lane, inverse);
      if (smooth) add_present(chunk, block, row, own, lane);
    });
  });
}

template <int kDivergence>
__attribute__((noinline)) void sweep_mixture(const Chunk& chunk) {
  const float inverse = 1.0f / chunk.pass.terms.temperature;
  each_block(chunk, true, [&](const Own& own, const Block& block) {
    each_rows(chunk, own, block, true, 0, chunk.padded,
              [&](int64_t row, int64_t lane) __attribute__((always_inline)) { add_mixture<kDivergence>(chunk, block, row, own, lane, inverse); });
  });
}

// What the rows [sub, sub + rows) add to a block's weight gradient, and the block to theirs.
CVMK_INLINE void add_weight_gradient(const Chunk& chunk, const Own& own, const Block& block, int64_t sub, int64_t rows) {
  constexpr int64_t kStep = kSub / 32 * kTile;
  const Half* pairs = chunk.pairs + sub * chunk.plan.width;
  multiply(block.padded(), chunk.plan.width, rows / 32, {own.g_turned, kTile, kStep}, {pairs, kTile, kStep}, own.d_weight, kColumns * 32, sub > 0,
           fetch_of(pairs + 2 * kStep, 2 * kStep, block.padded(), rows / 32));
}

CVMK_INLINE void add_hidden_gradient(const Chunk& chunk, const Own& own, const Block& block, int64_t sub, int64_t rows) {
  constexpr int64_t kStep = kColumns / 32 * kTile;
  const LinearPlan& plan = chunk.plan;
  multiply(rows, plan.width, block.padded() / 32, {own.g_tiles, kTile, kStep}, {own.weight_pairs, kTile, kStep},
           chunk.partial + block.group * plan.chunk * plan.width + sub * 32, plan.chunk * 32, !block.opens,
           fetch_of(own.weight_pairs + 2 * kStep, 2 * kStep, rows, block.padded() / 32));
}

// A block's weight gradient to its place, past the caches where nothing is added to what lies there.
CVMK_INLINE void write_weight_gradient(const Chunk& chunk, const Own& own, const Block& block) {
  const int64_t width = chunk.pass.student.width;
  float* to = chunk.pass.d_weight + block.first * width;
  const bool streamed = chunk.first && width % kLanes == 0 && reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(float)) == 0;
  for (int64_t v = 0; v < block.columns; ++v, to += width) {
    const Floats out{to, streamed};
    vectors(0, width, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
      const F found = simd::load(own.d_weight + (i / 32 * kColumns + v) * 32 + i % 32);
      out.store(i, n, chunk.first ? found : found + out.load(i, n, kind), kind);
    });
  }
  finish_streams();
}

template <int kTemperature, int kDivergence, bool kKd, bool kCe>
__attribute__((noinline)) void sweep_gradients(const Chunk& chunk) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  each_block(chunk, kKd, [&](const Own& own, const Block& block) {
    float* d_bias = pass.d_bias == nullptr ? nullptr : pass.d_bias + block.first;
    if (d_bias != nullptr && chunk.first) memset(d_bias, 0, static_cast<size_t>(block.columns) * 4);
    if (pass.d_hidden != nullptr) pack_block_pairs(pass.student, plan.width, block, own.weight_pairs);
    for (int64_t sub = 0; sub < chunk.padded; sub += kSub) {
      const int64_t rows = sub + kSub < chunk.padded ? kSub : chunk.padded - sub;
      each_rows(chunk, own, block, kKd, sub, sub + rows, [&](int64_t row, int64_t lane) __attribute__((always_inline)) {
        block_gradient<kTemperature, kDivergence, kKd, kCe>(chunk, block, row, own, lane, d_bias);
      });
      if (pass.d_weight != nullptr) add_weight_gradient(chunk, own, block, sub, rows);
      if (pass.d_hidden != nullptr) add_hidden_gradient(chunk, own, block, sub, rows);
    }
    if (pass.d_weight != nullptr) write_weight_gradient(chunk, own, block);
  });
}

// -- a chunk of rows ------------------------------------------------------------------------------------------------------------------------
CVMK_INLINE void chunk_sums(const Chunk& chunk) {
  const Terms& terms = chunk.pass.terms;
  if (!chunk.with_teacher()) return sweep_sums<kAtOne, kNoTeacher>(chunk);
  if (terms.divergence == kReverseKl) return sweep_sums<kAtAny, kReverse>(chunk);
  if (terms.divergence != kForwardKl) return sweep_sums<kAtAny, kOther>(chunk);
  if (terms.temperature == 1.0f) return sweep_sums<kAtOne, kForward>(chunk);
  if (terms.temperature == 2.0f) return sweep_sums<kAtTwo, kForward>(chunk);
  sweep_sums<kAtAny, kForward>(chunk);
}

template <bool kCe>
CVMK_INLINE void chunk_gradients_with(const Chunk& chunk) {
  const Terms& terms = chunk.pass.terms;
  switch (terms.divergence) {
    case kReverseKl: return sweep_gradients<kAtAny, kReverseKl, true, kCe>(chunk);
    case kJs: return sweep_gradients<kAtAny, kJs, true, kCe>(chunk);
    case kSkewKl: return sweep_gradients<kAtAny, kSkewKl, true, kCe>(chunk);
    case kSkewReverseKl: return sweep_gradients<kAtAny, kSkewReverseKl, true, kCe>(chunk);
    default: break;
  }
  if (terms.temperature == 1.0f) return sweep_gradients<kAtOne, kForwardKl, true, kCe>(chunk);
  if (terms.temperature == 2.0f) return sweep_gradients<kAtTwo, kForwardKl, true, kCe>(chunk);
  sweep_gradients<kAtAny, kForwardKl, true, kCe>(chunk);
}

CVMK_INLINE void chunk_mixture(const Chunk& chunk) {
  clear_sums(chunk, false);
  if (chunk.pass.terms.divergence == kJs) sweep_mixture<kJs>(chunk);
  else if (chunk.pass.terms.divergence == kSkewKl) sweep_mixture<kSkewKl>(chunk);
  else sweep_mixture<kSkewReverseKl>(chunk);
  finish_mixture(chunk);
}

CVMK_INLINE void chunk_gradients(const Chunk& chunk) {
  const LinearPass& pass = chunk.pass;
  if (!pass.with_kd) return sweep_gradients<kAtOne, kForwardKl, false, true>(chunk);
  if (pass.with_ce) return chunk_gradients_with<true>(chunk);
  chunk_gradients_with<false>(chunk);
}

void linear(const LinearPass& pass) {
  const LinearPlan plan = linear_plan(pass);
  const bool mixture = pass.teacher.hidden != nullptr && pass.terms.divergence != kForwardKl && pass.terms.divergence != kReverseKl;
  const bool gradient = (pass.d_hidden != nullptr || pass.d_weight != nullptr || pass.d_bias != nullptr) && (pass.with_kd || pass.with_ce);
  const auto place = [&](int64_t at) { return pass.scratch + at; };
  for (int64_t begin = 0; begin < pass.count; begin += plan.chunk) {
    const int64_t count = begin + plan.chunk < pass.count ? plan.chunk : pass.count - begin;
    const Chunk chunk{pass,
                      plan,
                      pass.index + begin,
                      count,
                      round_up(count, 32),
                      begin == 0,
                      reinterpret_cast<float*>(place(plan.partial_at)),
                      reinterpret_cast<float*>(place(plan.sums_at)),
                      reinterpret_cast<float*>(place(plan.values_at)),
                      reinterpret_cast<Half*>(place(plan.turned_at)),
                      reinterpret_cast<Half*>(place(plan.pairs_at)),
                      reinterpret_cast<Half*>(place(plan.teacher_at)),
                      reinterpret_cast<int32_t*>(place(plan.target_at))};
    pack_rows(chunk);
    clear_sums(chunk, true);
    chunk_sums(chunk);
    finish_rows(chunk);
    if (mixture) chunk_mixture(chunk);
    if (!gradient) continue;
    chunk_gradients(chunk);
    if (pass.d_hidden != nullptr) write_hidden_gradient(chunk);
  }
}

}  // namespace distill
}  // namespace
