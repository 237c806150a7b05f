// What linear_kd_loss keeps for a chunk of rows and for a thread, and the statistics of the rows from their sums.
#pragma once

#include "common/threads.h"
#include "distill/amx_tiles.inl"
#include "distill/gradients.inl"
#include "distill/linear_plan.h"

namespace {
namespace distill {

// Per row of a chunk, [kind][chunk]: what the gradient needs besides the logits, in vectors of rows.
enum Value { kLse, kLseQ, kLseP, kReduction, kKdScale, kCeScale, kSquare, kShared };
// Per group and row of a chunk, [group][kind][chunk].
enum Sum { kTopS, kTopT, kAtOneSum, kAtTSum, kTeacherSum, kCross, kLogits, kPresent };

struct Chunk {
  const LinearPass& pass;
  const LinearPlan& plan;
  const int64_t* index;  // of its rows
  int64_t count, padded;
  bool first;
  float *partial, *sums, *values;
  Half *turned, *pairs, *teacher;
  int32_t* target;  // [padded], -1 behind the rows
  CVMK_INLINE bool with_teacher() const { return plan.teacher_width > 0; }
  CVMK_INLINE float* sum(int64_t group, int kind) const { return sums + (group * 8 + kind) * plan.chunk; }
  CVMK_INLINE float* value(int kind) const { return values + kind * plan.chunk; }
};

// One thread's scratch for a block of the vocabulary: the weights as left operands and the student's in pairs, their gradient, biases, the
// logits of kRowBlock rows without the biases, [kColumns][kRowBlock], and the gradient of kSub rows as two left operands.
struct Own {
  Half *student_block, *teacher_block, *weight_pairs, *g_turned, *g_tiles;
  float *d_weight, *s, *t, *student_bias, *teacher_bias;
};

CVMK_INLINE Own own_scratch(const LinearPass& pass, const LinearPlan& plan) {
  char* p = pass.scratch + plan.shared + threads::index() * plan.own;
  const auto take = [&p](int64_t bytes) {
    char* here = p;
    p += round_up(bytes, 64);
    return here;
  };
  Own own;
  own.student_block = reinterpret_cast<Half*>(take(kColumns * plan.width * 2));
  own.teacher_block = reinterpret_cast<Half*>(take(kColumns * plan.teacher_width * 2));
  own.weight_pairs = reinterpret_cast<Half*>(take(kColumns * plan.width * 2));
  own.g_turned = reinterpret_cast<Half*>(take(kColumns * kSub * 2));
  own.g_tiles = reinterpret_cast<Half*>(take(kColumns * kSub * 2));
  own.d_weight = reinterpret_cast<float*>(take(kColumns * plan.width * 4));
  own.s = reinterpret_cast<float*>(take(kColumns * kRowBlock * 4));
  own.t = reinterpret_cast<float*>(take(kColumns * kRowBlock * 4));
  own.student_bias = reinterpret_cast<float*>(take(kColumns * 4));
  own.teacher_bias = reinterpret_cast<float*>(take(kColumns * 4));
  return own;
}

// A block of the vocabulary.
struct Block {
  int64_t group, first, columns;
  bool opens;  // the first of its group
  CVMK_INLINE int64_t padded() const { return round_up(columns, 32); }
};

// Hidden states as right operands: turned, for the logits, and in pairs, a group of kSub rows after the other, for the weight's gradient.
CVMK_INLINE void pack_rows(const Chunk& chunk) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  threads::each(chunk.padded / 32, [&](int64_t part) {
    const int64_t row = part * 32;
    const Half *rows[32], *teacher[32];
    for (int r = 0; r < 32; ++r) {
      const bool there = row + r < chunk.count;
      rows[r] = there ? pass.student.hidden + chunk.index[row + r] * pass.student.hidden_stride : nullptr;
      teacher[r] = there && plan.teacher_width > 0 ? pass.teacher.hidden + chunk.index[row + r] * pass.teacher.hidden_stride : nullptr;
      chunk.target[row + r] = there ? static_cast<int32_t>(pass.target[chunk.index[row + r]]) : -1;
    }
    for (int half = 0; half < 2; ++half) {
      pack_turned(rows + 16 * half, pass.student.width, plan.width, chunk.turned + (row + 16 * half) * plan.width);
      if (plan.teacher_width > 0) pack_turned(teacher + 16 * half, pass.teacher.width, plan.teacher_width, chunk.teacher + (row + 16 * half) * plan.teacher_width);
    }
    pack_pairs(rows, pass.student.width, plan.width, chunk.pairs + row / kSub * kSub * plan.width + row % kSub / 32 * kTile, kSub / 32 * kTile);
  });
}

CVMK_INLINE void clear_sums(const Chunk& chunk, bool tops) {
  for (int64_t group = 0; group < chunk.plan.groups; ++group)
    for (int kind = tops ? 0 : 2; kind < (tops ? 8 : 4); ++kind)
      for (int64_t row = 0; row < chunk.padded; ++row) chunk.sum(group, kind)[row] = kind <= kTopT ? -FLT_MAX : 0.0f;
}

// A row's sums over the groups, in their order.
CVMK_INLINE Sums gathered(const Chunk& chunk, int64_t row) {
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
  const BFloats h{const_cast<Half*>(layer.hidden + row * layer.hidden_stride)}, w{const_cast<Half*>(layer.weight + y * layer.weight_stride)};
  vectors(0, layer.width, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) { total += h.load(i, n, kind) * w.load(i, n, kind); });
  const float bias = layer.bias == nullptr ? 0.0f : simd::bits<float>(static_cast<uint32_t>(layer.bias[y]) << 16);
  return simd::sum(total) + bias;
}

// Sums of the chunk's rows to losses and statistics, and what the gradient needs of them.
CVMK_INLINE void finish_rows(const Chunk& chunk) {
  const LinearPass& pass = chunk.pass;
  threads::each(chunk.padded / 32, [&](int64_t part) {
    for (int64_t row = part * 32; row < part * 32 + 32; ++row) {
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
CVMK_INLINE void finish_mixture(const Chunk& chunk) {
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
CVMK_INLINE void write_hidden_gradient(const Chunk& chunk) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  threads::each((chunk.count + 15) / 16, [&](int64_t part) {
    for (int64_t row = part * 16; row < part * 16 + 16 && row < chunk.count; ++row) {
      float* to = pass.d_hidden + chunk.index[row] * pass.student.width;
      vectors(0, pass.student.width, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
        F total{};
        for (int64_t group = 0; group < plan.groups; ++group) total += simd::load(chunk.partial + group * plan.chunk * plan.width + (i / 32 * plan.chunk + row) * 32 + i % 32);
        Floats{to}.store(i, n, total, kind);
      });
    }
  });
}

}  // namespace distill
}  // namespace
