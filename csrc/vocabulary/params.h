// Rows of logits as the output layer makes them, part by part, into what is asked of each: its largest ones, and the logarithm of the sum of the exponentials.
// A logit is written to memory only where somebody asks for the row itself.
#pragma once

#include <stdint.h>

#include "common/kernel.h"
#include "gemm/params.h"

namespace cvmk::vocabulary {

constexpr int64_t kSorted = 64;    // the most that are kept in order; more are kept as a heap
constexpr int64_t kSegment = 512;  // ids whose exponentials are summed together, whichever thread does it
constexpr int kMostLanes = 16;

// What is asked of a row. Ids are places among the logits.
struct Row {
  int64_t k;     // how many of the largest that may be chosen
  bool sum;      // whether of the sum
  int32_t wanted;  // an id whose logit is asked for; -1: none
  float* logits;   // null, or where the whole row goes
  // First, logits of these (rising) are divided by the penalty where they are positive and multiplied where negative (Keskar et al. 2019).
  const int32_t* said;
  int64_t said_count;
  float penalty;
  const int32_t* forbidden;  // rising; these count in the sum and may not be chosen
  int64_t forbidden_count;
  bool plain;  // whether none of wanted, logits, said and forbidden is there
};

// What a thread has found of a row. Before its first part: count 0.
struct Best {
  int64_t count;  // how many of `values` and `ids` are filled
  float* values;  // [k] falling, equal ones by id; in any order where k is above kSorted
  int32_t* ids;   // [k]
};

// A thread's lanes of a row: of the sum over a segment.
struct alignas(64) Lanes {
  float shift[kMostLanes], sum[kMostLanes];
};

// What a thread makes of its ids, [first, first + n), whole segments but for the last one: the context of a gemm::Sink.
struct Part {
  const Row* rows;
  Best* best;
  Lanes* lanes;          // one a row
  float *shifts, *sums;  // [rows, segments] of each segment: a number near its largest logit, and the sum of exp(logit - that)
  float* wanted;         // [rows]
  int64_t first, n, segments;
  int64_t never;         // ids below this are never said: their logits are -inf
};

struct Kernels {
  void (*take)(void* part, const gemm::Part& products);
  // What `parts` threads found of a row, each in `best`, into the first of them.
  void (*merge)(const Row& row, const Part* parts, int64_t count, int64_t r);
  // log(sum(exp)) over the segments of a row.
  double (*normaliser)(const float* shifts, const float* sums, int64_t segments);
};
const Kernels& kernels(IsaLevel level);
const Kernels& kernels();

}  // namespace cvmk::vocabulary
