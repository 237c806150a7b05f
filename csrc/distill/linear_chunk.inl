// What linear_kd_loss keeps for a chunk of rows and for a thread, and the statistics of the rows from their sums. E is the kind of product:
// TileProducts or FloatProducts.
#pragma once

#include "distill/gradients.inl"
#include "distill/linear_plan.inl"

namespace cvmk::distill {
namespace {

// Per row of a chunk, [kind][chunk]: what the gradient needs besides the logits, in vectors of rows.
enum Value { kLse, kLseQ, kLseP, kReduction, kKdScale, kCeScale, kSquare, kShared };
// Per group and row of a chunk, [group][kind][chunk].
enum Sum { kTopS, kTopT, kAtOneSum, kAtTSum, kTeacherSum, kCross, kLogits, kPresent };

template <typename E>
struct Chunk {
  typedef typename E::Element Element;
  const LinearPass& pass;
  const LinearPlan& plan;
  const Team& team;
  char* scratch;
  const int64_t* index;  // of its rows
  int64_t count, padded;
  bool first;
  float *partial, *sums, *values;
  Element *turned, *pairs, *teacher;
  int32_t* target;  // [padded], -1 behind the rows
  float* kept;      // logits of student and teacher, [side][block][row block][kColumns][row_block]
  CVMK_INLINE bool with_teacher() const { return plan.teacher_width > 0; }
  CVMK_INLINE float* sum(int64_t group, int kind) const { return sums + (group * 8 + kind) * plan.chunk; }
  CVMK_INLINE float* value(int kind) const { return values + kind * plan.chunk; }
};

template <typename E>
Chunk<E> chunk_of(const LinearPass& pass, const LinearPlan& plan, char* at, const Team& team, int64_t begin) {
  typedef typename E::Element Element;
  const int64_t count = least(plan.chunk, pass.count - begin);
  return {pass,
          plan,
          team,
          at,
          pass.index + begin,
          count,
          up(count, E::kRowStep),
          begin == 0,
          reinterpret_cast<float*>(at + plan.partial_at),
          reinterpret_cast<float*>(at + plan.sums_at),
          reinterpret_cast<float*>(at + plan.values_at),
          reinterpret_cast<Element*>(at + plan.turned_at),
          reinterpret_cast<Element*>(at + plan.pairs_at),
          reinterpret_cast<Element*>(at + plan.teacher_at),
          reinterpret_cast<int32_t*>(at + plan.target_at),
          reinterpret_cast<float*>(at + plan.kept_at)};
}

// One thread's scratch for a block of the vocabulary: the weights as left operands and the student's as right ones, their gradient, biases,
// logits without the biases, [kColumns][row_block], and the gradient of kSub rows as two left operands where it is not in place of the logits.
template <typename E>
struct Own {
  typename E::Element *student_block, *teacher_block, *weight_pairs, *g_turned, *g_tiles;
  float *d_weight, *s, *t, *student_bias, *teacher_bias;
};

template <typename E>
CVMK_INLINE Own<E> own_scratch(const Chunk<E>& chunk, int thread) {
  const LinearPlan& plan = chunk.plan;
  char* p = chunk.scratch + plan.shared + thread * plan.own;
  const auto take = [&p](auto*& to, int64_t count) {
    to = reinterpret_cast<decltype(to + 0)>(p);
    p += E::kColumns * count * static_cast<int64_t>(sizeof *to);
  };
  Own<E> own;
  take(own.student_block, plan.room);
  take(own.teacher_block, plan.teacher_room);
  take(own.weight_pairs, (E::kForms - 1) * plan.room);
  take(own.g_turned, E::kGradients / 2 * E::kSub);
  take(own.g_tiles, E::kGradients / 2 * E::kSub);
  take(own.d_weight, plan.room);
  take(own.s, E::kLogitRows);
  take(own.t, E::kTeacherRows);
  take(own.student_bias, 1);
  take(own.teacher_bias, 1);
  return own;
}

// A block of the vocabulary.
struct Block {
  int64_t number, group, first, columns;
  bool opens;  // the first of its group
  CVMK_INLINE int64_t padded() const { return up(columns, 32); }
};

template <typename E>
CVMK_INLINE Block block_of(const LinearPass& pass, const LinearPlan& plan, int64_t number, int64_t group, bool opens) {
  const int64_t units = (pass.vocabulary + E::kUnit - 1) / E::kUnit;
  const int64_t first = number * units / plan.blocks * E::kUnit, end = least((number + 1) * units / plan.blocks * E::kUnit, pass.vocabulary);
  return {number, group, first, end - first, opens};
}

// Logits of some rows, a vector of rows every `stride` floats: entry v of the vocabulary is at s + v * stride.
struct Columns {
  float *s, *t;
  int64_t stride;
};

template <typename E>
CVMK_INLINE Columns columns_of(const Chunk<E>& chunk, const Own<E>& own, const Block& block, int64_t row) {
  const LinearPlan& plan = chunk.plan;
  if (!plan.kept) return {own.s + row % E::kLogitRows * E::kColumns, own.t + row % E::kTeacherRows * E::kColumns, plan.row_block};
  float* s = chunk.kept + (block.number * plan.chunk + row) * E::kColumns;
  return {s, s + plan.blocks * plan.chunk * E::kColumns, plan.row_block};
}
template <typename E>
CVMK_INLINE float* student_logits(const Chunk<E>& chunk, const Own<E>& own, const Block& block, int64_t row) {
  return columns_of(chunk, own, block, row).s;
}

CVMK_INLINE Any row_of_any(const Layer& layer, const void* data, int64_t stride, int64_t i) { return row_of<Any>({data, stride, layer.dtype, layer.lowered}, i); }
CVMK_INLINE Any weight_row(const Layer& layer, int64_t v) { return row_of_any(layer, layer.weight, layer.weight_stride, v); }
CVMK_INLINE Any hidden_row(const Layer& layer, int64_t i) { return row_of_any(layer, layer.hidden, layer.hidden_stride, i); }
CVMK_INLINE float bias_of(const Layer& layer, int64_t v) { return layer.bias == nullptr ? 0.0f : entry(row_of_any(layer, layer.bias, 0, 0), v); }

template <typename E>
CVMK_INLINE void pack_targets(const Chunk<E>& chunk, int64_t row) {
  for (int64_t r = row; r < row + 32 && r < chunk.padded; ++r)
    chunk.target[r] = r < chunk.count ? static_cast<int32_t>(chunk.pass.target[chunk.index[r]]) : -1;
}

template <typename E>
CVMK_INLINE void clear_sums(const Chunk<E>& chunk, bool tops) {
  for (int64_t group = 0; group < chunk.plan.groups; ++group)
    for (int kind = tops ? 0 : 2; kind < (tops ? 8 : 4); ++kind)
      for (int64_t row = 0; row < chunk.padded; ++row) chunk.sum(group, kind)[row] = kind <= kTopT ? -FLT_MAX : 0.0f;
}

// A row's sums over the groups, in their order.
template <typename E>
CVMK_INLINE Sums gathered(const Chunk<E>& chunk, int64_t row) {
  Sums all;
  const double inverse = 1.0 / static_cast<double>(chunk.pass.terms.temperature);
  const bool reverse = chunk.pass.terms.divergence == kReverseKl;
  for (int64_t group = 0; group < chunk.plan.groups; ++group) {
    const float s = chunk.sum(group, kTopS)[row], t = chunk.sum(group, kTopT)[row];
    all.top_s = s > all.top_s ? s : all.top_s;
    all.top_t = t > all.top_t ? t : all.top_t;
  }
  for (int64_t group = 0; group < chunk.plan.groups; ++group) {
    const double fall_s = static_cast<double>(chunk.sum(group, kTopS)[row]) - static_cast<double>(all.top_s);
    const double fall_t = static_cast<double>(chunk.sum(group, kTopT)[row]) - static_cast<double>(all.top_t);
    const auto add = [&](double& sum, int kind, double factor) { sum += factor == 0 ? 0 : static_cast<double>(chunk.sum(group, kind)[row]) * factor; };
    add(all.at_one, kAtOneSum, ::exp(fall_s));
    add(all.at_t, kAtTSum, ::exp(fall_s * inverse));
    add(all.teacher, kTeacherSum, ::exp(fall_t * inverse));
    add(all.cross, kCross, ::exp((reverse ? fall_s : fall_t) * inverse));
    add(all.logits, kLogits, 1);
    add(all.count, kPresent, 1);
  }
  return all;
}

// The target's logit, from the vectors themselves: sum of products in float32.
CVMK_INLINE float target_logit(const Layer& layer, int64_t row, int64_t y) {
  F total{};
  const Any h = hidden_row(layer, row), w = weight_row(layer, y);
  vectors(0, layer.width, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) { total += h.load(i, n, kind) * w.load(i, n, kind); });
  return simd::sum(total) + bias_of(layer, y);
}

// Sums of the chunk's rows to losses and statistics, and what the gradient needs of them.
template <typename E>
CVMK_INLINE void finish_rows(const Chunk<E>& chunk) {
  const LinearPass& pass = chunk.pass;
  chunk.team.each(pieces(chunk.padded, 32), [&](int64_t part, int) {
    for (int64_t row = part * 32; row < part * 32 + 32 && row < chunk.padded; ++row) {
      const bool there = row < chunk.count;
      const int64_t i = there ? chunk.index[row] : 0;
      RowResult result = result_of(pass.terms, gathered(chunk, row), chunk.with_teacher(), there ? target_logit(pass.student, i, pass.target[i]) : 0.0f);
      const float lse = static_cast<float>(result.lse), lse_q = static_cast<float>(result.lse_q), ce_scale = there ? pass.ce_scale : 0.0f;
      chunk.value(kLse)[row] = lse;
      chunk.value(kLseQ)[row] = lse_q;
      chunk.value(kLseP)[row] = static_cast<float>(result.lse_p);
      chunk.value(kReduction)[row] = static_cast<float>(result.reduction);
      chunk.value(kKdScale)[row] = there ? pass.kd_scale : 0.0f;
      chunk.value(kCeScale)[row] = ce_scale;
      chunk.value(kSquare)[row] = ce_scale * static_cast<float>(::exp(2.0 * static_cast<double>(lse_q) - static_cast<double>(lse)));
      chunk.value(kShared)[row] = pass.terms.smoothing > 0 ? ce_scale * (pass.terms.smoothing / static_cast<float>(result.count)) : 0.0f;
      if (there) write_result(result, pass.stats + i, pass.rows, pass.kd + i, pass.ce + i);
    }
  });
}

// The divergence of a mixture and its reduction, from the second sweep's sums.
template <typename E>
CVMK_INLINE void finish_mixture(const Chunk<E>& chunk) {
  const LinearPass& pass = chunk.pass;
  for (int64_t row = 0; row < chunk.count; ++row) {
    double first = 0, second = 0, value = 0, reduction = 0;
    for (int64_t group = 0; group < chunk.plan.groups; ++group) {
      first += static_cast<double>(chunk.sum(group, kAtOneSum)[row]);
      second += static_cast<double>(chunk.sum(group, kAtTSum)[row]);
    }
    mixture_value(pass.terms, first, second, value, reduction);
    const int64_t i = chunk.index[row];
    chunk.value(kReduction)[row] = pass.stats[3 * pass.rows + i] = static_cast<float>(reduction);
    pass.kd[i] = static_cast<float>(value);
  }
}

// The hidden states' gradient: the groups' partial sums in their order.
template <typename E>
CVMK_INLINE void write_hidden_gradient(const Chunk<E>& chunk) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  chunk.team.each(pieces(chunk.count, 16), [&](int64_t part, int) {
    for (int64_t row = part * 16; row < part * 16 + 16 && row < chunk.count; ++row) {
      float* to = pass.d_hidden + chunk.index[row] * pass.student.width;
      vectors(0, pass.student.width, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
        F total{};
        for (int64_t group = 0; group < plan.groups; ++group) total += simd::load(chunk.partial + group * plan.chunk * plan.room + E::place(row, i, plan.chunk, plan.room));
        Floats{to}.store(i, n, total, kind);
      });
    }
  });
}

}  // namespace
}  // namespace cvmk::distill
