// linear_kd_loss in bfloat16 on the AMX tiles. Logits exist a block of kColumns x kRowBlock at a time, transposed: an entry of the
// vocabulary is a row, and the lanes of a vector are the rows of the batch. Three sweeps over the vocabulary for a chunk of rows, each of
// which makes the logits anew (which is cheaper than keeping them): sums; for the divergences of a mixture, theirs; gradients.
//
//   logits^T [v, row] = W H^T         left W as it lies in memory, right H turned into pairs
//   dW [v, d]        += G^T H         left G^T as it is made, right H in pairs of rows; the chunks of rows in their order
//   dH [row, d]       = sum G W       left G, turned in registers, right W in pairs of rows; a partial sum a group of blocks, then the
//                                     groups in their order
// A tile is 16 rows of 64 bytes: 16 x 32 numbers of a left operand, 16 pairs x 16 columns of a right one.

#include "common/threads.h"
#include "distill/gradients.inl"
#include "distill/linear_plan.h"

namespace {
namespace distill {

typedef uint16_t Half;
constexpr int64_t kTile = 512;  // numbers of a tile

struct __attribute__((aligned(64))) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
const TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Tiles of an operand: steps in numbers from tile to tile along the sum and across it, and the bytes between a tile's rows.
struct Tiles {
  const Half* data;
  int64_t along, across, row_bytes;
};

// c [m, n] (+)= a b; m and n multiples of 32, `depth` steps of 32.
__attribute__((noinline)) void multiply(int64_t m, int64_t n, int64_t depth, const Tiles& a, const Tiles& b, float* c, int64_t stride, bool add) {
  const int64_t bytes = stride * 4;
  for (int64_t j = 0; j < n; j += 32) {
    for (int64_t i = 0; i < m; i += 32) {
      float* to = c + i * stride + j;
      const Half *left = a.data + i / 16 * a.across, *right = b.data + j / 16 * b.across;
      if (add) {
        const float* next = i + 32 < m ? to + 32 * stride : c + j + 32;  // sums that lie in memory are fetched while a tile is multiplied
        for (int64_t r = 0; r < 32; ++r) {
          __builtin_prefetch(next + r * stride);
          __builtin_prefetch(next + r * stride + 16);
        }
        _tile_loadd(0, to, bytes);
        _tile_loadd(1, to + 16, bytes);
        _tile_loadd(2, to + 16 * stride, bytes);
        _tile_loadd(3, to + 16 * stride + 16, bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < depth; ++k, left += a.along, right += b.along) {
        _tile_loadd(6, right, b.row_bytes);
        _tile_loadd(4, left, a.row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + b.across, b.row_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + a.across, a.row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, bytes);
      _tile_stored(1, to + 16, bytes);
      _tile_stored(2, to + 16 * stride, bytes);
      _tile_stored(3, to + 16 * stride + 16, bytes);
    }
  }
}

// -- packing ------------------------------------------------------------------------------------------------------------------------------
CVMK_INLINE __m512i load_pairs(const Half* row, int64_t i, int64_t width) {  // 32 numbers from i on, zeros behind the width
  if (row == nullptr || i >= width) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi16(width - i >= 32 ? ~0u : (1u << (width - i)) - 1u, row + i);
}

// Rows and columns of a 16 x 16 block of 32-bit words change places.
CVMK_INLINE void turn(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
  }
}

// 16 rows to [width / 32] tiles of a right operand whose columns they are.
CVMK_INLINE void pack_turned(const Half* const* rows, int64_t width, int64_t padded, Half* to) {
  for (int64_t i = 0; i < padded; i += 32, to += kTile) {
    __m512i x[16];
    for (int r = 0; r < 16; ++r) x[r] = load_pairs(rows[r], i, width);
    turn(x);
    for (int r = 0; r < 16; ++r) _mm512_storeu_si512(to + r * 32, x[r]);
  }
}

// 32 rows to [width / 16] tiles of a right operand along whose sum they are.
CVMK_INLINE void pack_pairs(const Half* const* rows, int64_t width, int64_t padded, Half* to) {
  for (int r = 0; r < 16; ++r) {
    Half* tile = to + r * 32;
    for (int64_t i = 0; i < padded; i += 32, tile += 2 * kTile) {
      const __m512i x = load_pairs(rows[2 * r], i, width), y = load_pairs(rows[2 * r + 1], i, width);
      const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);  // of every 8 columns the first and the last 4
      const __m512i first = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
      const __m512i last = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
      _mm512_storeu_si512(tile, first);
      _mm512_storeu_si512(tile + kTile, last);
    }
  }
}

// -- one thread's view of a sweep ---------------------------------------------------------------------------------------------------------
struct Own {
  Half *student_block, *teacher_block, *weight_pairs, *g_turned, *g_tiles;
  float *s, *t, *d_weight, *student_bias, *teacher_bias;
};

CVMK_INLINE Own own_scratch(const LinearPass& pass, const LinearPlan& plan) {
  char* p = pass.scratch + plan.shared + threads::index() * plan.own;
  const int64_t wide = plan.width > plan.teacher_width ? plan.width : plan.teacher_width;
  const auto take = [&p](int64_t bytes) {
    char* here = p;
    p += (bytes + 63) / 64 * 64;
    return here;
  };
  Own own;
  own.student_block = reinterpret_cast<Half*>(take(kColumns * wide * 2));
  own.teacher_block = reinterpret_cast<Half*>(take(kColumns * wide * 2));
  own.weight_pairs = reinterpret_cast<Half*>(take(kColumns * plan.width * 2));
  own.g_turned = reinterpret_cast<Half*>(take(kColumns * (plan.chunk + kSkew) * 2));
  own.g_tiles = reinterpret_cast<Half*>(take(kColumns * plan.chunk * 2));
  own.s = reinterpret_cast<float*>(take(kPart * kRowBlock * 4));
  own.t = reinterpret_cast<float*>(take(kPart * kRowBlock * 4));
  own.d_weight = reinterpret_cast<float*>(take(kColumns * plan.width * 4));
  own.student_bias = reinterpret_cast<float*>(take(kColumns * 4));
  own.teacher_bias = reinterpret_cast<float*>(take(kColumns * 4));
  return own;
}

// A block of `columns` weights (rows of W) as a left operand: in place, or padded with zeros to whole tiles.
CVMK_INLINE Tiles weight_block(const Layer& layer, int64_t padded, int64_t first, int64_t columns, Half* scratch) {
  const Half* data = layer.weight + first * layer.weight_stride;
  if (columns % 32 == 0 && layer.width == padded) return {data, 32, 16 * layer.weight_stride, layer.weight_stride * 2};
  for (int64_t v = 0; v < round_up(columns, 32); ++v)
    for (int64_t i = 0; i < padded; i += 32) _mm512_storeu_si512(scratch + v * padded + i, load_pairs(v < columns ? data + v * layer.weight_stride : nullptr, i, layer.width));
  return {scratch, 32, 16 * padded, padded * 2};
}

CVMK_INLINE void bias_block(const Layer& layer, int64_t first, int64_t columns, float* to) {
  for (int64_t v = 0; v < columns; ++v) to[v] = layer.bias == nullptr ? 0.0f : simd::bits<float>(static_cast<uint32_t>(layer.bias[first + v]) << 16);
}

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
  CVMK_INLINE float* sum(int64_t group, int kind) const { return sums + (group * 8 + kind) * plan.chunk; }
  CVMK_INLINE float* value(int kind) const { return values + kind * plan.chunk; }
};

CVMK_INLINE F row_vector(const float* p) { return simd::load(p); }

// A part of a block: its logits without their biases are in own.s and own.t, [columns][kRowBlock].
struct Piece {
  int64_t at, columns;  // first entry, from the block's first, and how many
};

// Adds a piece to the sums of 16 rows (csrc/distill/losses.inl has them for a row at a time).
template <int kTemperature, int kKind>
CVMK_INLINE void add_columns(const Chunk& chunk, int64_t group, int64_t row, const Own& own, int64_t lane, const Piece& piece, float inverse) {
  const float *bias = own.student_bias + piece.at, *t_bias = own.teacher_bias + piece.at;
  const auto sum = [&](int kind) { return chunk.sum(group, kind) + row; };
  const float *s = own.s + lane, *t = own.t + lane;
  F max_s = row_vector(sum(kTopS)), max_t = row_vector(sum(kTopT));
  const F old_s = max_s, old_t = max_t;
  for (int64_t v = 0; v < piece.columns; ++v) {
    max_s = simd::max(simd::load(s + v * kRowBlock) + bias[v], max_s);
    if (kKind != kNoTeacher) max_t = simd::max(simd::load(t + v * kRowBlock) + t_bias[v], max_t);
  }
  F one{}, at_t{}, teacher{}, cross{};
  for (int64_t v = 0; v < piece.columns; ++v) {
    const F z = simd::load(s + v * kRowBlock) + bias[v];
    const F a = z - max_s;
    const F e = exp_below(kTemperature == kAtOne ? a : a * inverse);
    at_t += e;
    if (kTemperature == kAtTwo) one += e * e;
    if (kTemperature == kAtAny) one += exp_below(a);
    if (kKind == kNoTeacher) continue;
    const F w = simd::load(t + v * kRowBlock) + t_bias[v];
    const F b = w - max_t;
    const F p = exp_below(kTemperature == kAtOne ? b : b * inverse);
    teacher += p;
    if (kKind == kForward) cross += p * zero_where(p == F{}, w - z);
    if (kKind == kReverse) cross += e * zero_where(e == F{}, z - w);
  }
  const F fall_s = exp_below((old_s - max_s) * inverse), fall_t = exp_below((old_t - max_t) * inverse);
  const auto add = [&](int kind, F factor, F more) { simd::store(sum(kind), zero_where(factor == F{}, row_vector(sum(kind)) * factor) + more); };
  add(kAtTSum, fall_s, at_t);
  add(kAtOneSum, exp_below(old_s - max_s), kTemperature == kAtOne ? at_t : one);
  simd::store(sum(kTopS), max_s);
  if (kKind == kNoTeacher) return;
  add(kTeacherSum, fall_t, teacher);
  if (kKind != kOther) add(kCross, kKind == kForward ? fall_t : fall_s, cross);
  simd::store(sum(kTopT), max_t);
}

// For label smoothing: the sum and number of the logits that are not -inf.
CVMK_INLINE void add_present(const Chunk& chunk, int64_t group, int64_t row, const Own& own, int64_t lane, const Piece& piece) {
  const float* bias = own.student_bias + piece.at;
  F total = row_vector(chunk.sum(group, kLogits) + row), count = row_vector(chunk.sum(group, kPresent) + row), part{};
  const F low = simd::set(-__builtin_inff());
  for (int64_t v = 0; v < piece.columns; ++v) {
    const F z = simd::load(own.s + lane + v * kRowBlock) + bias[v];
    const I absent = z == low;
    part += zero_where(absent, z);
    count += zero_where(absent, simd::set(1.0f));
  }
  simd::store(chunk.sum(group, kLogits) + row, total + part);
  simd::store(chunk.sum(group, kPresent) + row, count);
}

// Adds a block to the sums of a mixture's divergence, kept in kAtOneSum and kAtTSum.
template <int kDivergence>
CVMK_INLINE void add_mixture(const Chunk& chunk, int64_t group, int64_t row, const Own& own, int64_t lane, const Piece& piece, float inverse) {
  const float *bias = own.student_bias + piece.at, *t_bias = own.teacher_bias + piece.at;
  const float weight = chunk.pass.terms.mixture;
  const F lse_q = row_vector(chunk.value(kLseQ) + row), lse_p = row_vector(chunk.value(kLseP) + row);
  F a{}, b{};
  for (int64_t v = 0; v < piece.columns; ++v) {
    const F log_q = (simd::load(own.s + lane + v * kRowBlock) + bias[v]) * inverse - lse_q;
    const F log_p = (simd::load(own.t + lane + v * kRowBlock) + t_bias[v]) * inverse - lse_p;
    F x, y;
    mixture_terms<kDivergence>(log_q, log_p, weight, x, y);
    a += x;
    b += y;
  }
  float *first = chunk.sum(group, kAtOneSum) + row, *second = chunk.sum(group, kAtTSum) + row;
  simd::store(first, row_vector(first) + a);
  simd::store(second, row_vector(second) + b);
}

// The gradient of a piece and 16 rows: G^T [column][row of the chunk], and G in tiles [row / 16][column / 32].
template <int kTemperature, int kDivergence, bool kKd, bool kCe>
CVMK_INLINE void piece_gradient(const Chunk& chunk, int64_t row, const Own& own, int64_t lane, int64_t first, const Piece& piece, float* d_bias) {
  const float *bias = own.student_bias + piece.at, *t_bias = own.teacher_bias + piece.at;
  const int64_t columns = piece.columns;
  const auto value = [&](int kind) { return row_vector(chunk.value(kind) + row); };
  struct {
    F kd_scale, reduction;
    float mixture;
  } const w{value(kKdScale), value(kReduction), chunk.pass.terms.mixture};
  const float inverse = 1.0f / chunk.pass.terms.temperature;
  const F lse_q = value(kLseQ), lse_p = value(kLseP), lse = value(kLse), ce_scale = value(kCeScale), ce_square = value(kSquare), shared = value(kShared);
  const F at_target = ce_scale * (1.0f - chunk.pass.terms.smoothing);
  const bool smooth = chunk.pass.terms.smoothing > 0;
  const F low = simd::set(-__builtin_inff());
  I target;
  memcpy(&target, chunk.target + row, sizeof target);
  const auto gradient = [&](int64_t v) __attribute__((always_inline)) {
    const F z = simd::load(own.s + lane + v * kRowBlock) + bias[v];
    F grad{};
    if (kKd) {
      const F log_q = z * inverse - lse_q, log_p = (simd::load(own.t + lane + v * kRowBlock) + t_bias[v]) * inverse - lse_p;
      const F q = exp_below(log_q), p = exp_below(log_p);
      grad = divergence_gradient<kDivergence>(w, log_q, log_p, q, p);
      if (kCe && kTemperature == kAtOne) grad += q * ce_scale;
      if (kCe && kTemperature == kAtTwo) grad += q * q * ce_square;
    }
    if (kCe) {
      if (!kKd || kTemperature == kAtAny) grad += exp_below(z - lse) * ce_scale;
      if (smooth) grad -= zero_where(z == low, shared);
      grad -= zero_where(target != simd::seti(static_cast<int>(first + piece.at + v)), at_target);
    }
    return grad;
  };
  const int64_t stride = chunk.plan.chunk + kSkew;
  Half* tile = own.g_tiles + (row / 16 * (kColumns / 32) + piece.at / 32) * kTile;
  Half* turned = own.g_turned + piece.at * stride + row;
  for (int64_t v = 0; v < columns; v += 32, tile += kTile) {
    __m512i words[16];
    for (int k = 0; k < 16; ++k) {
      const int64_t c = v + 2 * k;
      const F even = c < columns ? gradient(c) : F{}, odd = c + 1 < columns ? gradient(c + 1) : F{};
      if (d_bias != nullptr) {
        if (c < columns) d_bias[piece.at + c] += simd::sum(even);
        if (c + 1 < columns) d_bias[piece.at + c + 1] += simd::sum(odd);
      }
      const __m256i e = simd::bits<__m256i>(_mm512_cvtneps_pbh(simd::bits<__m512>(even))), o = simd::bits<__m256i>(_mm512_cvtneps_pbh(simd::bits<__m512>(odd)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(turned + c * stride), e);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(turned + (c + 1) * stride), o);
      words[k] = _mm512_or_si512(_mm512_cvtepu16_epi32(e), _mm512_slli_epi32(_mm512_cvtepu16_epi32(o), 16));
    }
    turn(words);
    for (int k = 0; k < 16; ++k) _mm512_storeu_si512(tile + k * 32, words[k]);
  }
}

// Fetches a share of the weights of the block behind `first` to the second-level cache: step `step` of `steps`.
CVMK_INLINE void fetch_next(const Layer& layer, int64_t vocabulary, int64_t first, int64_t step, int64_t steps) {
  const int64_t share = (kColumns + steps - 1) / steps, begin = first + kColumns + step * share;
  for (int64_t v = begin; v < begin + share && v < first + 2 * kColumns && v < vocabulary; ++v)
    for (int64_t i = 0; i < layer.width; i += 32) __builtin_prefetch(layer.weight + v * layer.weight_stride + i, 0, 2);
}

// body(row, piece) with the logits of kRowBlock rows and a piece of the block in own.s and own.t.
template <typename Body>
CVMK_INLINE void each_piece(const Chunk& chunk, int64_t first, int64_t columns, const Tiles& student, const Tiles& teacher, bool with_teacher, const Own& own, const Body& body) {
  const int64_t width = chunk.plan.width, wide = chunk.plan.teacher_width;
  const auto from = [](const Tiles& tiles, int64_t at) { return Tiles{tiles.data + at / 16 * tiles.across, tiles.along, tiles.across, tiles.row_bytes}; };
  for (int64_t row = 0; row < chunk.padded; row += kRowBlock) {
    fetch_next(chunk.pass.student, chunk.pass.vocabulary, first, row / kRowBlock, chunk.padded / kRowBlock);
    if (with_teacher) fetch_next(chunk.pass.teacher, chunk.pass.vocabulary, first, row / kRowBlock, chunk.padded / kRowBlock);
    for (int64_t at = 0; at < columns; at += kPart) {
      const Piece piece{at, at + kPart < columns ? kPart : columns - at};
      const int64_t m = round_up(piece.columns, 32);
      multiply(m, kRowBlock, width / 32, from(student, at), {chunk.turned + row * width, kTile, 16 * width, 64}, own.s, kRowBlock, false);
      if (with_teacher) multiply(m, kRowBlock, wide / 32, from(teacher, at), {chunk.teacher + row * wide, kTile, 16 * wide, 64}, own.t, kRowBlock, false);
      body(row, piece);
    }
  }
}

// body(own, group, first, columns, student, teacher) for every block of the vocabulary; a group's blocks in their order, in one thread.
template <typename Body>
CVMK_INLINE void each_block(const Chunk& chunk, bool with_teacher, const Body& body) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  threads::each(plan.groups, [&](int64_t group) {
    _tile_loadconfig(&kTileConfig);
    const Own own = own_scratch(pass, plan);
    for (int64_t block = group * plan.per_group; block < (group + 1) * plan.per_group && block < plan.blocks; ++block) {
      const int64_t first = block * kColumns, columns = first + kColumns < pass.vocabulary ? kColumns : pass.vocabulary - first;
      const Tiles student = weight_block(pass.student, plan.width, first, columns, own.student_block);
      bias_block(pass.student, first, columns, own.student_bias);
      Tiles teacher = student;
      if (with_teacher) {
        teacher = weight_block(pass.teacher, plan.teacher_width, first, columns, own.teacher_block);
        bias_block(pass.teacher, first, columns, own.teacher_bias);
      }
      body(own, group, first, columns, student, teacher);
    }
    _tile_release();
  });
}

template <int kTemperature, int kKind>
__attribute__((noinline)) void sweep_sums(const Chunk& chunk) {
  const bool smooth = chunk.pass.terms.smoothing > 0;
  const float inverse = 1.0f / chunk.pass.terms.temperature;
  each_block(chunk, kKind != kNoTeacher, [&](const Own& own, int64_t group, int64_t first, int64_t columns, const Tiles& student, const Tiles& teacher) {
    each_piece(chunk, first, columns, student, teacher, kKind != kNoTeacher, own, [&](int64_t row, const Piece& piece) __attribute__((always_inline)) {
      for (int64_t lane = 0; lane < kRowBlock; lane += kLanes) {
        add_columns<kTemperature, kKind>(chunk, group, row + lane, own, lane, piece, inverse);
        if (smooth) add_present(chunk, group, row + lane, own, lane, piece);
      }
    });
  });
}

template <int kDivergence>
__attribute__((noinline)) void sweep_mixture(const Chunk& chunk) {
  const float inverse = 1.0f / chunk.pass.terms.temperature;
  each_block(chunk, true, [&](const Own& own, int64_t group, int64_t first, int64_t columns, const Tiles& student, const Tiles& teacher) {
    each_piece(chunk, first, columns, student, teacher, true, own, [&](int64_t row, const Piece& piece) __attribute__((always_inline)) {
      for (int64_t lane = 0; lane < kRowBlock; lane += kLanes) add_mixture<kDivergence>(chunk, group, row + lane, own, lane, piece, inverse);
    });
  });
}

// d_weight of a block: straight to its place where the tiles fit, else by way of scratch.
CVMK_INLINE void add_weight_gradient(const Chunk& chunk, const Own& own, int64_t first, int64_t columns) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  const int64_t stride = plan.chunk + kSkew;
  const Tiles left{own.g_turned, 32, 16 * stride, stride * 2}, right{chunk.pairs, kTile * (plan.width / 16), kTile, 64};
  float* to = pass.d_weight + first * pass.student.width;
  if (columns % 32 == 0 && pass.student.width == plan.width) return multiply(columns, plan.width, chunk.padded / 32, left, right, to, plan.width, !chunk.first);
  multiply(round_up(columns, 32), plan.width, chunk.padded / 32, left, right, own.d_weight, plan.width, false);
  for (int64_t v = 0; v < columns; ++v)
    for (int64_t d = 0; d < pass.student.width; ++d) {
      float* p = to + v * pass.student.width + d;
      *p = (chunk.first ? 0.0f : *p) + own.d_weight[v * plan.width + d];
    }
}

template <int kTemperature, int kDivergence, bool kKd, bool kCe>
__attribute__((noinline)) void sweep_gradients(const Chunk& chunk) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  each_block(chunk, kKd, [&](const Own& own, int64_t group, int64_t first, int64_t columns, const Tiles& student, const Tiles& teacher) {
    float* d_bias = pass.d_bias == nullptr ? nullptr : pass.d_bias + first;
    if (d_bias != nullptr && chunk.first) memset(d_bias, 0, static_cast<size_t>(columns) * 4);
    each_piece(chunk, first, columns, student, teacher, kKd, own, [&](int64_t row, const Piece& piece) __attribute__((always_inline)) {
      for (int64_t lane = 0; lane < kRowBlock; lane += kLanes)
        piece_gradient<kTemperature, kDivergence, kKd, kCe>(chunk, row + lane, own, lane, first, piece, d_bias);
    });
    if (pass.d_weight != nullptr) add_weight_gradient(chunk, own, first, columns);
    if (pass.d_hidden == nullptr) return;
    for (int64_t v = 0; v < columns; v += 32) {
      const Half* rows[32];
      for (int r = 0; r < 32; ++r) rows[r] = v + r < columns ? pass.student.weight + (first + v + r) * pass.student.weight_stride : nullptr;
      pack_pairs(rows, pass.student.width, plan.width, own.weight_pairs + v * plan.width);
    }
    multiply(chunk.padded, plan.width, round_up(columns, 32) / 32, {own.g_tiles, kTile, kColumns / 32 * kTile, 64},
             {own.weight_pairs, kTile * (plan.width / 16), kTile, 64}, chunk.partial + group * plan.chunk * plan.width, plan.width, first != group * plan.per_group * kColumns);
  });
}

// -- a chunk of rows ------------------------------------------------------------------------------------------------------------------------
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
    pack_pairs(rows, pass.student.width, plan.width, chunk.pairs + row * plan.width);
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
CVMK_INLINE void finish_rows(const Chunk& chunk, bool with_teacher, bool mixture) {
  const LinearPass& pass = chunk.pass;
  threads::each(chunk.padded / 32, [&](int64_t part) {
    for (int64_t row = part * 32; row < part * 32 + 32; ++row) {
      const bool there = row < chunk.count;
      const int64_t i = there ? chunk.index[row] : 0;
      RowResult result = result_of(pass.terms, gathered(chunk, row), with_teacher, there ? target_logit(pass.student, i, pass.target[i]) : 0.0f);
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
  if (!mixture) return;
  clear_sums(chunk, false);
  if (pass.terms.divergence == kJs) sweep_mixture<kJs>(chunk);
  else if (pass.terms.divergence == kSkewKl) sweep_mixture<kSkewKl>(chunk);
  else sweep_mixture<kSkewReverseKl>(chunk);
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

CVMK_INLINE void write_hidden_gradient(const Chunk& chunk) {
  const LinearPass& pass = chunk.pass;
  const LinearPlan& plan = chunk.plan;
  threads::each((chunk.count + 15) / 16, [&](int64_t part) {
    for (int64_t row = part * 16; row < part * 16 + 16 && row < chunk.count; ++row) {
      float* to = pass.d_hidden + chunk.index[row] * pass.student.width;
      vectors(0, pass.student.width, [&](int64_t i, int n, auto kind) __attribute__((always_inline)) {
        F total{};
        for (int64_t group = 0; group < plan.groups; ++group) total += simd::load(chunk.partial + (group * plan.chunk + row) * plan.width + i);
        Floats{to}.store(i, n, total, kind);
      });
    }
  });
}

CVMK_INLINE void chunk_sums(const Chunk& chunk, bool with_teacher) {
  const Terms& terms = chunk.pass.terms;
  if (!with_teacher) return sweep_sums<kAtOne, kNoTeacher>(chunk);
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

CVMK_INLINE void chunk_gradients(const Chunk& chunk) {
  const LinearPass& pass = chunk.pass;
  if (!pass.with_kd) return sweep_gradients<kAtOne, kForwardKl, false, true>(chunk);
  if (pass.with_ce) return chunk_gradients_with<true>(chunk);
  chunk_gradients_with<false>(chunk);
}

void linear(const LinearPass& pass) {
  const LinearPlan plan = linear_plan(pass);
  const bool with_teacher = pass.teacher.hidden != nullptr;
  const bool mixture = with_teacher && pass.terms.divergence != kForwardKl && pass.terms.divergence != kReverseKl;
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
    chunk_sums(chunk, with_teacher);
    finish_rows(chunk, with_teacher, mixture);
    if (!gradient) continue;
    chunk_gradients(chunk);
    if (pass.d_hidden != nullptr) write_hidden_gradient(chunk);
  }
}

}  // namespace distill
}  // namespace
