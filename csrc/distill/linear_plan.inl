// How linear_kd_loss divides its work: sizes that depend on the problem's shape and the kind of product only, never on the number of threads.
//
// The vocabulary is taken in blocks of at most E::kColumns entries, all of about the same size, whose weights stay in the second-level cache while all rows of a chunk pass by:
// a block of rows for their logits, E::kSub rows for the products with their gradient. The blocks of a vocabulary belong to at most kGroups
// groups of as many blocks, each the work of one thread at a time and with a partial sum of the hidden states' gradient of its own.
#pragma once

#include "distill/params.h"

namespace cvmk::distill {
namespace {

constexpr int64_t kGroups = 8;
constexpr int64_t kPartialBytes = int64_t{32} << 20;
constexpr int64_t kFewestKept = 96;  // rows: fewer would read the weights and their gradient too often


struct LinearPlan {
  int64_t chunk;                         // rows of a chunk
  int64_t row_block;                     // rows whose logits are made at one time
  bool gradient, mixture;                // sweeps behind the first
  bool kept;                             // whether they find the logits of the first
  int64_t blocks, groups;                // blocks of the vocabulary, a multiple of the groups of blocks
  int64_t width, teacher_width;          // rounded up to what products are made of
  int64_t room, teacher_room;            // the same of packed operands
  int64_t shared, own;                   // bytes that all threads share, and bytes of one thread
  int64_t partial_at, sums_at, values_at, turned_at, pairs_at, teacher_at, target_at, kept_at;  // places in the shared bytes
  CVMK_INLINE int64_t total(const Team& team) const { return shared + least(team.size, groups) * own; }
};

// Rows of a chunk: as many as the partial sums have bytes for, and the logits where they are kept.
template <typename E>
inline void divide_rows(const LinearPass& pass, LinearPlan& plan) {
  const int64_t fit = E::kKeptBytes / ((plan.teacher_width > 0 ? 8 : 4) * plan.blocks * E::kColumns);
  plan.kept = (plan.gradient || plan.mixture) && fit >= kFewestKept;
  int64_t rows = (plan.kept ? kPartialBytes / 4 : kPartialBytes) / (kGroups * 4 * plan.room);
  rows = rows < 64 ? 64 : least(rows, 2048);
  if (plan.kept) rows = least(rows, fit);
  const int64_t step = rows < E::kRowBlock ? E::kRowStep : E::kRowBlock;
  plan.chunk = least(rows / step * step, up(pass.count, pass.count < E::kRowBlock ? E::kRowStep : E::kRowBlock));
  plan.row_block = least(plan.chunk, E::kRowBlock);
}

template <typename E>
inline LinearPlan linear_plan(const LinearPass& pass) {
  constexpr int64_t kElement = sizeof(typename E::Element);
  LinearPlan plan{};
  const bool teacher = pass.teacher.hidden != nullptr;
  plan.width = up(pass.student.width, E::kStep);
  plan.room = up(pass.student.width, E::kPanel);
  plan.teacher_width = teacher ? up(pass.teacher.width, E::kStep) : 0;
  plan.teacher_room = teacher ? up(pass.teacher.width, E::kPanel) : 0;
  plan.gradient = (pass.d_hidden != nullptr || pass.d_weight != nullptr || pass.d_bias != nullptr) && (pass.with_kd || pass.with_ce);
  plan.mixture = teacher && pass.terms.divergence != kForwardKl && pass.terms.divergence != kReverseKl;
  plan.blocks = (pass.vocabulary + E::kColumns - 1) / E::kColumns;
  plan.groups = least(plan.blocks, kGroups);
  plan.blocks = up(plan.blocks, plan.groups);
  divide_rows<E>(pass, plan);
  int64_t at = 0;
  const auto place = [&at](int64_t bytes) {
    const int64_t here = at;
    at += up(bytes, 64);
    return here;
  };
  const int64_t rows = up(plan.chunk, E::kPanel);
  plan.partial_at = place(pass.d_hidden == nullptr ? 0 : plan.groups * plan.chunk * plan.room * 4);
  plan.sums_at = place(plan.groups * 8 * plan.chunk * 4);
  plan.values_at = place(8 * plan.chunk * 4);
  plan.turned_at = place(rows * plan.width * kElement);
  plan.pairs_at = place(up(plan.chunk, E::kSub) * plan.room * kElement);
  plan.teacher_at = place(rows * plan.teacher_width * kElement);
  plan.target_at = place(plan.chunk * 4);
  plan.kept_at = place(plan.kept ? (teacher ? 2 : 1) * plan.blocks * E::kColumns * plan.chunk * 4 : 0);
  plan.shared = up(at, 4096);
  plan.own = up(E::kColumns * (E::kForms * plan.room * kElement + plan.room * 4 + plan.teacher_room * kElement + E::kGradients * E::kSub * kElement +
                                     (E::kLogitRows + E::kTeacherRows) * 4 + 2 * 4),
                      4096);
  return plan;
}

}  // namespace
}  // namespace cvmk::distill
