// How linear_kd_loss divides its work: constants and sizes that depend on the problem's shape only, never on the number of threads.
#pragma once

#include "distill/params.h"

namespace cvmk {
namespace distill {

// The vocabulary is taken in blocks of kColumns entries, whose weights stay in the second-level cache while all rows of a chunk pass by:
// kRowBlock rows for their logits, kSub rows for the products with their gradient. The blocks of a vocabulary belong to at most kGroups
// groups, each the work of one thread at a time and with a partial sum of the hidden states' gradient of its own.
constexpr int64_t kColumns = 512, kRowBlock = 32, kSub = 512, kGroups = 8;

struct LinearPlan {
  int64_t chunk;                     // rows of a chunk, a multiple of 32
  int64_t blocks, groups, per_group; // blocks of the vocabulary, groups of blocks, blocks of a group
  int64_t width, teacher_width;      // rounded up to 32
  int64_t shared, own;               // bytes that all threads share, and bytes of one thread
  int64_t partial_at, sums_at, values_at, turned_at, pairs_at, teacher_at, target_at;  // places in the shared bytes
};

namespace {  // internal linkage: the lambda below would otherwise be a weak symbol in files of several instruction sets

inline __attribute__((always_inline)) int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline __attribute__((always_inline)) LinearPlan linear_plan(const LinearPass& pass) {
  LinearPlan plan;
  plan.width = round_up(pass.student.width, 32);
  plan.teacher_width = pass.teacher.hidden == nullptr ? 0 : round_up(pass.teacher.width, 32);
  const int64_t rows = 1048576 / plan.width / 32 * 32;  // 32 MiB for the partial sums
  plan.chunk = rows < 64 ? 64 : rows > 2048 ? 2048 : rows;
  if (plan.chunk > round_up(pass.count, 32)) plan.chunk = round_up(pass.count, 32);
  plan.blocks = (pass.vocabulary + kColumns - 1) / kColumns;
  plan.per_group = (plan.blocks + kGroups - 1) / kGroups;
  plan.groups = (plan.blocks + plan.per_group - 1) / plan.per_group;
  int64_t at = 0;
  const auto place = [&at](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 64);
    return here;
  };
  plan.partial_at = place(pass.d_hidden == nullptr ? 0 : plan.groups * plan.chunk * plan.width * 4);
  plan.sums_at = place(plan.groups * 8 * plan.chunk * 4);
  plan.values_at = place(8 * plan.chunk * 4);
  plan.turned_at = place(plan.chunk * plan.width * 2);
  plan.pairs_at = place(round_up(plan.chunk, kSub) * plan.width * 2);
  plan.teacher_at = place(plan.chunk * plan.teacher_width * 2);
  plan.target_at = place(plan.chunk * 4);
  plan.shared = at;
  // Weights of both sides, the student's in pairs too, their gradient, gradients of logits twice, logits and biases of both sides.
  plan.own = round_up(kColumns * (plan.width * (2 + 2 + 4) + plan.teacher_width * 2 + 2 * kSub * 2 + 2 * kRowBlock * 4 + 2 * 4), 4096);
  return plan;
}

}  // namespace

}  // namespace distill
}  // namespace cvmk
