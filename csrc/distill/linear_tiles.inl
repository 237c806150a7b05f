// Products of linear_kd_loss in bfloat16, of operands that lie as tiles; Unit multiplies them: AMX (amx_tiles.inl), or vector registers (pair_tiles.inl).
// Logits exist a block of kColumns x kRowBlock at a time; where Unit says so and they fit, those of a chunk are kept for the sweeps behind the first. While
// AMX tiles multiply, the vector units do the exponentials of the rows before.
//
//   logits^T [v, row] = W H^T         left W, right H turned into pairs
//   dW [v, d]        += G^T H         left G^T, right H in pairs of rows; kSub rows after kSub rows, the chunks in their order
//   dH [row, d]       = sum G W       left G, turned in registers, right W in pairs of rows; a partial sum a group of blocks, then the
//                                     groups in their order
//
// What stays in a core's second-level cache: a block's weights in three forms, its weight gradient, and the gradient of kSub x kColumns
// logits twice; hidden states and the hidden states' gradient pass by.
#pragma once

#include "distill/linear_columns.inl"
#include "distill/tiles.inl"

namespace cvmk::distill {
namespace {

template <typename Unit>
struct TileProducts {
  typedef Half Element;
  static constexpr int64_t kColumns = Unit::kColumns, kUnit = 32, kRowBlock = 32, kSub = Unit::kSub, kRowStep = 32, kStep = 32, kPanel = 32;
  static constexpr int64_t kForms = 2, kGradients = 2, kLogitRows = 2 * kRowBlock, kTeacherRows = 2 * kRowBlock;
  static constexpr int64_t kKeptBytes = Unit::kKeptBytes;
  typedef Chunk<TileProducts> Rows;
  typedef Own<TileProducts> Mine;

  static bool takes(const LinearPass& pass) {
    const Layer &student = pass.student, &teacher = pass.teacher;
    const bool same = teacher.hidden == nullptr || (teacher.dtype == student.dtype && teacher.lowered == student.lowered);
    return (student.dtype == kBFloat16 || student.lowered) && same;
  }
  CVMK_INLINE static void begin() { Unit::begin(); }
  CVMK_INLINE static void end() { Unit::end(); }
  CVMK_INLINE static int64_t stride(const Columns&) { return kRowBlock; }
  // Where element i of row r of a result of `rows` rows is.
  CVMK_INLINE static int64_t place(int64_t r, int64_t i, int64_t rows, int64_t) { return (i / 32 * rows + r) * 32 + i % 32; }

  template <bool kLowered>
  CVMK_INLINE static const void* row_at(const void* rows, int64_t stride, int64_t i) {
    return static_cast<const char*>(rows) + i * stride * (kLowered ? 4 : 2);
  }

  template <bool kLowered>
  CVMK_INLINE static void pack_block_from(const Layer& layer, int64_t padded, const Block& block, Half* to) {
    for (int64_t v = 0; v < block.padded(); v += 16) {
      const void* rows[16];
      for (int r = 0; r < 16; ++r) rows[r] = v + r < block.columns ? row_at<kLowered>(layer.weight, layer.weight_stride, block.first + v + r) : nullptr;
      pack_left<kLowered>(rows, layer.width, padded, to + v * padded);
    }
  }
  CVMK_INLINE static void pack_block(const Layer& layer, int64_t padded, const Block& block, Half* to) {
    if (layer.lowered) pack_block_from<true>(layer, padded, block, to);
    else pack_block_from<false>(layer, padded, block, to);
  }

  template <bool kLowered>
  CVMK_INLINE static void pack_block_pairs_from(const Layer& layer, int64_t padded, const Block& block, Half* to) {
    for (int64_t v = 0; v < block.padded(); v += 32) {
      const void* rows[32];
      for (int r = 0; r < 32; ++r) rows[r] = v + r < block.columns ? row_at<kLowered>(layer.weight, layer.weight_stride, block.first + v + r) : nullptr;
      pack_pairs<kLowered>(rows, layer.width, padded, to + v / 32 * kTile, kColumns / 32 * kTile);
    }
  }
  CVMK_INLINE static void pack_block_pairs(const Layer& layer, int64_t padded, const Block& block, Half* to) {
    if (layer.lowered) pack_block_pairs_from<true>(layer, padded, block, to);
    else pack_block_pairs_from<false>(layer, padded, block, to);
  }

  // Hidden states as right operands: turned, for the logits, and in pairs, a group of kSub rows after the other, for the weight's gradient.
  template <bool kLowered>
  CVMK_INLINE static void pack_rows_from(const Rows& chunk, int64_t row) {
    const Layer &student = chunk.pass.student, &teacher = chunk.pass.teacher;
    const int64_t width = chunk.plan.width, wide = chunk.plan.teacher_width;
    const void *rows[32], *others[32];
    for (int r = 0; r < 32; ++r) {
      const bool there = row + r < chunk.count;
      rows[r] = there ? row_at<kLowered>(student.hidden, student.hidden_stride, chunk.index[row + r]) : nullptr;
      others[r] = there && wide > 0 ? row_at<kLowered>(teacher.hidden, teacher.hidden_stride, chunk.index[row + r]) : nullptr;
    }
    for (int side = 0; side < 32; side += 16) {
      pack_turned<kLowered>(rows + side, student.width, width, chunk.turned + (row + side) * width);
      if (wide > 0) pack_turned<kLowered>(others + side, teacher.width, wide, chunk.teacher + (row + side) * wide);
    }
    pack_pairs<kLowered>(rows, student.width, width, chunk.pairs + row / kSub * kSub * width + row % kSub / 32 * kTile, kSub / 32 * kTile);
  }
  CVMK_INLINE static void pack_rows(const Rows& chunk, int64_t row) {
    if (chunk.pass.student.lowered) pack_rows_from<true>(chunk, row);
    else pack_rows_from<false>(chunk, row);
  }

  // The logits of a block and kRowBlock rows; aside() in every step, and the hidden states of the next rows are fetched meanwhile.
  template <typename Aside>
  CVMK_INLINE static void logits(const Block& block, const Half* weight, const Half* hidden, int64_t width, float* to, Aside& aside) {
    Unit::beside(block.padded(), kRowBlock, width / 32, {weight, kTile, 16 * width}, {hidden, kTile, 16 * width}, to, 0, false,
                    fetch_of(hidden + kRowBlock * width, kRowBlock * width, block.padded(), width / 32), false, aside);
  }

  // The Work of kRowBlock rows, its units spread evenly over `steps` calls.
  template <typename Work>
  struct Aside {
    Work low, high;
    int64_t units, steps, next = 0, credit = 0;

    CVMK_INLINE Aside(const Rows& chunk, const Block& block, const Mine& own, int64_t row, const Columns& at, int64_t all)
        : low(chunk, block, own, at, row), high(chunk, block, own, Columns{at.s + kLanes, at.t + kLanes, at.stride}, row + kLanes), units(2 * Work::units(block)), steps(all) {}
    CVMK_INLINE void unit() {
      if (next % 2 == 0) low.unit(next / 2);
      else high.unit(next / 2);
      ++next;
    }
    CVMK_INLINE void operator()() {
      for (credit += units; credit >= steps; credit -= steps) unit();
    }
    CVMK_INLINE void finish() {
      while (next < units) unit();
      low.finish();
      high.finish();
    }
  };

  // Work for the rows [begin, end), while the tiles make the logits of the rows behind.
  template <typename Work>
  CVMK_INLINE static void each_rows(const Rows& chunk, const Mine& own, const Block& block, bool with_teacher, bool found, int64_t begin, int64_t end) {
    const LinearPlan& plan = chunk.plan;
    const int64_t width = plan.width, wide = with_teacher ? plan.teacher_width : 0;
    const auto make = [&](int64_t row, auto& aside) __attribute__((always_inline)) {
      const Columns to = columns_of(chunk, own, block, row);
      logits(block, own.student_block, chunk.turned + row * width, width, to.s, aside);
      if (with_teacher) logits(block, own.teacher_block, chunk.teacher + row * wide, wide, to.t, aside);
    };
    Nothing nothing;
    if (!found) make(begin, nothing);
    for (int64_t row = begin; row < end; row += kRowBlock) {
      Aside<Work> aside(chunk, block, own, row, columns_of(chunk, own, block, row), block.padded() / 32 * ((width + wide) / 32));
      if (row + kRowBlock < end && !found) make(row + kRowBlock, aside);
      aside.finish();
    }
  }

  // Two entries of the gradient of a vector of rows: to tiles [row / 16][column / 32], which are turned when they are full, and to tiles of
  // the other orientation, [column / 16][row / 32].
  CVMK_INLINE static int64_t gradient_units(const Block& block) { return block.padded() / 2; }
  template <typename Work>
  CVMK_INLINE static void put_gradient(Work& work, int64_t u) {
    const int64_t c = 2 * u, row = work.row % kSub, columns = work.block.columns;
    const F even = c < columns ? work.entry(c) : F{}, odd = c + 1 < columns ? work.entry(c + 1) : F{};
    const __m256i e = lowered16(even), o = lowered16(odd);
    Half* turned = work.own.g_turned + row / 32 * kTile + row % 32 + c / 16 * (kSub / 32) * kTile + c % 16 * 32;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(turned), e);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(turned + 32), o);
    Half* tile = work.own.g_tiles + (row / 16 * (kColumns / 32) + u / 16) * kTile;
    _mm512_storeu_si512(tile + u % 16 * 32, _mm512_or_si512(_mm512_cvtepu16_epi32(e), _mm512_slli_epi32(_mm512_cvtepu16_epi32(o), 16)));
    if (u % 16 != 15) return;
    __m512i words[16];
    for (int k = 0; k < 16; ++k) words[k] = _mm512_loadu_si512(tile + k * 32);
    transpose16(words);
    for (int k = 0; k < 16; ++k) _mm512_storeu_si512(tile + k * 32, words[k]);
  }

  // What the rows [sub, sub + rows) add to a block's weight gradient, and the block to theirs.
  CVMK_INLINE static void add_weight_gradient(const Rows& chunk, const Mine& own, const Block& block, int64_t sub, int64_t rows) {
    constexpr int64_t kAcross = kSub / 32 * kTile;
    const Half* pairs = chunk.pairs + sub * chunk.plan.width;
    Unit::product(block.padded(), chunk.plan.width, rows / 32, {own.g_turned, kTile, kAcross}, {pairs, kTile, kAcross}, own.d_weight, kColumns * 32, sub > 0,
             fetch_of(pairs + 2 * kAcross, 2 * kAcross, block.padded(), rows / 32), true);
  }

  CVMK_INLINE static void add_hidden_gradient(const Rows& chunk, const Mine& own, const Block& block, int64_t sub, int64_t rows) {
    constexpr int64_t kAcross = kColumns / 32 * kTile;
    const LinearPlan& plan = chunk.plan;
    Unit::product(rows, plan.width, block.padded() / 32, {own.g_tiles, kTile, kAcross}, {own.weight_pairs, kTile, kAcross},
             chunk.partial + block.group * plan.chunk * plan.width + sub * 32, plan.chunk * 32, !block.opens,
             fetch_of(own.weight_pairs + 2 * kAcross, 2 * kAcross, rows, block.padded() / 32), true);
  }
};

}  // namespace
}  // namespace cvmk::distill
