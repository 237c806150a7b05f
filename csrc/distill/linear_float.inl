// Products of linear_kd_loss in float32 on vector registers, of operands of any type. Where a chunk of enough rows fits, its logits are made
// once and kept for the sweeps behind the first; the gradient of logits takes their place.
//
//   logits^T [v, row] = W H^T         left W in panels of columns, right H turned, in panels of rows
//   dW [v, d]        += G^T H         left G^T as it lies, right H in panels of columns; kSub rows after kSub rows, the chunks in their order
//   dH [row, d]       = sum G W       left G^T read across, right the same panels of W; a partial sum a group of blocks, then the groups in
//                                     their order
//
// What stays in a core's second-level cache: a block's weights, its weight gradient, and the logits of kSub rows.
#pragma once

#include "common/float_product.inl"
#include "distill/linear_columns.inl"

namespace cvmk::distill {
namespace {

struct FloatProducts {
  typedef float Element;
  static constexpr int64_t kPanel = product::kPanel, kColumns = 252, kUnit = product::kRows, kRowBlock = 3 * kPanel, kSub = 192, kRowStep = kLanes, kStep = kLanes;
  static constexpr int64_t kForms = 1, kGradients = 0, kLogitRows = kSub, kTeacherRows = kRowBlock;
  static constexpr int64_t kKeptBytes = int64_t{32} << 20;
  static constexpr int64_t kPart = 128, kRowPart = kSub / 2;  // of a sum: such a part of a right panel stays in the first-level cache
  typedef Chunk<FloatProducts> Rows;
  typedef Own<FloatProducts> Mine;
  static_assert(kSub % kRowBlock == 0 && kPart % kPanel == 0 && kColumns % kUnit == 0, "blocks are whole");

  CVMK_INLINE static void begin() {}
  CVMK_INLINE static void end() {}
  CVMK_INLINE static int64_t stride(const Columns& logits) { return logits.stride; }
  CVMK_INLINE static int64_t place(int64_t r, int64_t i, int64_t, int64_t room) { return r * room + i; }

  // A row of `width` numbers to its place in panels of `rows` rows, zeros up to `padded`.
  CVMK_INLINE static void pack_row(const Any& row, int64_t width, int64_t padded, int64_t rows, float* to) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      float* place = to + i / kPanel * rows * kPanel + i % kPanel;
      simd::store(place, i + kLanes <= width ? row.load(i, kLanes, Whole{}) : row.load(i, static_cast<int>(width - i), Part{}));
    }
  }

  CVMK_INLINE static void pack_block(const Layer& layer, int64_t padded, const Block& block, float* to) {
    for (int64_t v = 0; v < block.columns; ++v) pack_row(weight_row(layer, block.first + v), layer.width, padded, kColumns, to + v * kPanel);
  }
  CVMK_INLINE static void pack_block_pairs(const Layer&, int64_t, const Block&, float*) {}

  // Row r to a column of its panel; zeros where there is no such row.
  CVMK_INLINE static void turn_row(const Rows& chunk, const Layer& layer, int64_t padded, int64_t r, float* panels) {
    float* to = panels + r / kPanel * kPanel * padded + r % kPanel;
    const Any row = r < chunk.count ? hidden_row(layer, chunk.index[r]) : Any{};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const int n = r >= chunk.count || i >= layer.width ? 0 : static_cast<int>(least(layer.width - i, kLanes));
      const F x = n == 0 ? F{} : row.load(i, n, Part{});
      for (int lane = 0; lane < kLanes; ++lane, to += kPanel) *to = x[lane];
    }
  }

  // Hidden states turned into panels of rows, for the logits, and in panels of columns, kSub rows after kSub rows, for the weight's gradient.
  CVMK_INLINE static void pack_rows(const Rows& chunk, int64_t row) {
    const LinearPlan& plan = chunk.plan;
    const Layer& student = chunk.pass.student;
    for (int64_t r = row; r < row + 32 && r < chunk.padded; ++r) {
      turn_row(chunk, student, plan.width, r, chunk.turned);
      if (plan.teacher_width > 0) turn_row(chunk, chunk.pass.teacher, plan.teacher_width, r, chunk.teacher);
      float* to = chunk.pairs + r / kSub * kSub * plan.room + r % kSub * kPanel;
      if (r < chunk.count) pack_row(hidden_row(student, chunk.index[r]), student.width, plan.width, kSub, to);
      else for (int64_t i = 0; i < plan.width; i += kLanes) simd::store(to + i / kPanel * kSub * kPanel + i % kPanel, F{});
    }
  }

  CVMK_INLINE static void logits(const Rows& chunk, const Block& block, const float* weight, const float* hidden, int64_t width, int64_t rows, float* to) {
    product::multiply_parts(block.columns, rows, width, kPart, {weight, kPanel, 1, kPanel, kColumns * kPanel}, {hidden, kPanel * width, kPanel}, to,
                            chunk.plan.row_block, false);
  }

  // Work for the rows [begin, end), a vector of rows after the other, whose logits are made or are there already.
  template <typename Work>
  CVMK_INLINE static void each_rows(const Rows& chunk, const Mine& own, const Block& block, bool with_teacher, bool found, int64_t begin, int64_t end) {
    const LinearPlan& plan = chunk.plan;
    for (int64_t row = begin; row < end; row += plan.row_block) {
      const Columns at = columns_of(chunk, own, block, row);
      const int64_t rows = least(plan.row_block, end - row);
      if (!found) {
        logits(chunk, block, own.student_block, chunk.turned + row * plan.width, plan.width, rows, at.s);
        if (with_teacher) logits(chunk, block, own.teacher_block, chunk.teacher + row * plan.teacher_width, plan.teacher_width, rows, at.t);
      }
      for (int64_t lane = 0; lane < rows; lane += kLanes) {
        Work work(chunk, block, own, Columns{at.s + lane, at.t + lane, at.stride}, row + lane);
        for (int64_t u = 0; u < Work::units(block); ++u) work.unit(u);
        work.finish();
      }
    }
  }

  // The gradient of a vector of rows takes the place of the student's logits.
  CVMK_INLINE static int64_t gradient_units(const Block& block) { return block.columns; }
  template <typename Work>
  CVMK_INLINE static void put_gradient(Work& work, int64_t v) {
    simd::store(work.logits.s + v * work.logits.stride, work.entry(v));
  }

  // What the rows [sub, sub + rows) add to a block's weight gradient, and the block to theirs.
  CVMK_INLINE static void add_weight_gradient(const Rows& chunk, const Mine& own, const Block& block, int64_t sub, int64_t rows) {
    const LinearPlan& plan = chunk.plan;
    const int64_t row_block = plan.row_block;
    product::multiply_parts(block.columns, plan.width, rows, kRowPart, {student_logits(chunk, own, block, sub), row_block, 1, row_block, kColumns * row_block},
                            {chunk.pairs + sub * plan.room, kSub * kPanel, kPanel}, own.d_weight, plan.room, sub > 0);
  }

  CVMK_INLINE static void add_hidden_gradient(const Rows& chunk, const Mine& own, const Block& block, int64_t sub, int64_t rows) {
    const LinearPlan& plan = chunk.plan;
    for (int64_t row = sub; row < sub + rows; row += plan.row_block)
      product::multiply_parts(least(plan.row_block, sub + rows - row), plan.width, block.columns, kPart,
                              {student_logits(chunk, own, block, row), 1, plan.row_block, kColumns, 0}, {own.student_block, kColumns * kPanel, kPanel},
                              chunk.partial + (block.group * plan.chunk + row) * plan.room, plan.room, !block.opens);
  }
};

}  // namespace
}  // namespace cvmk::distill
