// linear_kd_loss a chunk of rows at a time. Logits exist a block of the vocabulary and some rows at a time, transposed: an entry of the
// vocabulary is a row, and the lanes of a vector are the rows of the batch. Three sweeps over the vocabulary for a chunk of rows: sums; for
// the divergences of a mixture, theirs; gradients. The products are those of E.
#pragma once

#include "distill/linear_columns.inl"

namespace cvmk::distill {
namespace {

// body(own, block) for every block of the vocabulary, whose biases are in `own`; a group's blocks in their order, in one thread.
template <typename E, typename Body>
CVMK_INLINE void each_block(const Chunk<E>& chunk, bool with_teacher, const Body& body) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  chunk.team.each(plan.groups, [&](int64_t group, int thread) {
    E::begin();
    const Own<E> own = own_scratch<E>(chunk, thread);
    const int64_t each = plan.blocks / plan.groups;
    for (int64_t number = group * each; number < (group + 1) * each; ++number) {
      const Block block = block_of<E>(pass, plan, number, group, number == group * each);
      const int64_t first = block.first;
      for (int64_t v = 0; v < block.columns; ++v) {
        own.student_bias[v] = bias_of(pass.student, first + v);
        if (with_teacher) own.teacher_bias[v] = bias_of(pass.teacher, first + v);
      }
      body(own, block);
    }
    E::end();
  });
}

template <typename E>
CVMK_INLINE void pack_weights(const Chunk<E>& chunk, const Own<E>& own, const Block& block, bool student, bool teacher) {
  if (student) E::pack_block(chunk.pass.student, chunk.plan.width, block, own.student_block);
  if (teacher) E::pack_block(chunk.pass.teacher, chunk.plan.teacher_width, block, own.teacher_block);
}

template <int kTemperature, int kKind, typename E>
__attribute__((noinline)) void sweep_sums(const Chunk<E>& chunk) {
  constexpr bool kTeacher = kKind != kNoTeacher;
  each_block(chunk, kTeacher, [&](const Own<E>& own, const Block& block) {
    pack_weights(chunk, own, block, true, kTeacher);
    E::template each_rows<SumsWork<kTemperature, kKind, E>>(chunk, own, block, kTeacher, false, 0, chunk.padded);
  });
}

template <int kDivergence, typename E>
__attribute__((noinline)) void sweep_mixture(const Chunk<E>& chunk) {
  const bool found = chunk.plan.kept;
  each_block(chunk, true, [&](const Own<E>& own, const Block& block) {
    pack_weights(chunk, own, block, !found, !found);
    E::template each_rows<MixtureWork<kDivergence, E>>(chunk, own, block, true, found, 0, chunk.padded);
  });
}

// A block's weight gradient to its place, past the caches where nothing is added to what lies there.
template <typename E>
CVMK_INLINE void write_weight_gradient(const Chunk<E>& chunk, const Own<E>& own, const Block& block) {
  const int64_t width = chunk.pass.student.width;
  float* to = chunk.pass.d_weight + block.first * width;
  const bool streamed = chunk.first && width % kLanes == 0 && reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(float)) == 0;
  for (int64_t v = 0; v < block.columns; ++v, to += width) {
    const Floats out{to, streamed};
    vectors(0, width, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
      const F found = simd::load(own.d_weight + E::place(v, i, E::kColumns, chunk.plan.room));
      out.store(i, n, chunk.first ? found : found + out.load(i, n, kind), kind);
    });
  }
  elements::finish_streams();
}

template <int kTemperature, int kDivergence, bool kKd, bool kCe, typename E>
__attribute__((noinline)) void sweep_gradients(const Chunk<E>& chunk) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  each_block(chunk, kKd, [&](const Own<E>& own, const Block& block) {
    if (pass.d_bias != nullptr && chunk.first) memset(pass.d_bias + block.first, 0, static_cast<size_t>(block.columns) * 4);
    pack_weights(chunk, own, block, !plan.kept || pass.d_hidden != nullptr, kKd && !plan.kept);
    if (pass.d_hidden != nullptr) E::pack_block_pairs(pass.student, plan.width, block, own.weight_pairs);
    for (int64_t sub = 0; sub < chunk.padded; sub += E::kSub) {
      const int64_t rows = least(chunk.padded - sub, E::kSub);
      E::template each_rows<GradientWork<kTemperature, kDivergence, kKd, kCe, E>>(chunk, own, block, kKd, plan.kept, sub, sub + rows);
      if (pass.d_weight != nullptr) E::add_weight_gradient(chunk, own, block, sub, rows);
      if (pass.d_hidden != nullptr) E::add_hidden_gradient(chunk, own, block, sub, rows);
    }
    if (pass.d_weight != nullptr) write_weight_gradient(chunk, own, block);
  });
}

// -- a chunk of rows ------------------------------------------------------------------------------------------------------------------------
template <typename E>
CVMK_INLINE void chunk_sums(const Chunk<E>& chunk) {
  const Terms& terms = chunk.pass.terms;
  if (!chunk.with_teacher()) return sweep_sums<kAtOne, kNoTeacher>(chunk);
  if (terms.divergence == kReverseKl) return sweep_sums<kAtAny, kReverse>(chunk);
  if (terms.divergence != kForwardKl) return sweep_sums<kAtAny, kOther>(chunk);
  if (terms.temperature == 1.0f) return sweep_sums<kAtOne, kForward>(chunk);
  if (terms.temperature == 2.0f) return sweep_sums<kAtTwo, kForward>(chunk);
  sweep_sums<kAtAny, kForward>(chunk);
}

template <bool kCe, typename E>
CVMK_INLINE void chunk_gradients_with(const Chunk<E>& chunk) {
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

template <typename E>
CVMK_INLINE void chunk_mixture(const Chunk<E>& chunk) {
  clear_sums(chunk, false);
  if (chunk.pass.terms.divergence == kJs) sweep_mixture<kJs>(chunk);
  else if (chunk.pass.terms.divergence == kSkewKl) sweep_mixture<kSkewKl>(chunk);
  else sweep_mixture<kSkewReverseKl>(chunk);
  finish_mixture(chunk);
}

template <typename E>
CVMK_INLINE void chunk_gradients(const Chunk<E>& chunk) {
  const LinearPass& pass = chunk.pass;
  if (!pass.with_kd) return sweep_gradients<kAtOne, kForwardKl, false, true>(chunk);
  if (pass.with_ce) return chunk_gradients_with<true>(chunk);
  chunk_gradients_with<false>(chunk);
}

template <typename E>
int64_t linear_scratch_with(const LinearPass& pass, const Team& team) {
  return linear_plan<E>(pass).total(team);
}

template <typename E>
void linear_with(const LinearPass& pass, char* scratch, const Team& team) {
  const LinearPlan plan = linear_plan<E>(pass);
  for (int64_t begin = 0; begin < pass.count; begin += plan.chunk) {
    const Chunk<E> chunk = chunk_of<E>(pass, plan, scratch, team, begin);
    team.each(pieces(chunk.padded, 32), [&](int64_t part, int) {
      pack_targets(chunk, 32 * part);
      E::pack_rows(chunk, 32 * part);
    });
    clear_sums(chunk, true);
    chunk_sums(chunk);
    finish_rows(chunk);
    if (plan.mixture) chunk_mixture(chunk);
    if (!plan.gradient) continue;
    chunk_gradients(chunk);
    if (pass.d_hidden != nullptr) write_hidden_gradient(chunk);
  }
}

}  // namespace
}  // namespace cvmk::distill
