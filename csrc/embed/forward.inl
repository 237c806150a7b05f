// A row is looked up, scaled, moved by its position and dropped in one pass.
#pragma once
#include "common/dropout.h"
#include "common/lanes.h"
#include "embed/params.h"

namespace cvmk::embed {
namespace {

constexpr int64_t kFewElements = 1 << 14;  // below, other threads are not worth waking

template <Dtype kType>
inline void look_up(const Forward& p, const uint32_t* columns, int64_t row) {
  const Lookup& l = p.lookup;
  const int64_t from = integer_at(l.ids, l.ids_dtype, row) * l.n, to = row * l.n;
  const int64_t position = p.positions.data == nullptr ? 0 : row % p.positions_rows * l.n;
  const uint32_t hash = l.dropout_limit != 0 ? row_hash(l.dropout_key, 0, row) : 0;
  each_vector(l.n, [&](int64_t i, auto lanes) {
    F x = get<kType>(p.weight, from + i, lanes) * l.scale;
    if (p.positions.data != nullptr) x += get<kType>(p.positions, position + i, lanes);
    if (l.dropout_limit != 0) x = simd::select(kept(columns + i, hash, l.dropout_limit), x * l.keep_factor, F{});
    put<kType>(p.out, to + i, x, lanes);
  });
}

typedef void (*LookUp)(const Forward&, const uint32_t*, int64_t);

inline LookUp look_up_for(const Forward& p) {
  const bool one_type = p.positions.data == nullptr || p.positions.dtype == p.weight.dtype;
  if (one_type && p.weight.dtype == kFloat32) return look_up<kFloat32>;
  return one_type && p.weight.dtype == kBFloat16 ? look_up<kBFloat16> : look_up<kNoDtype>;
}

int64_t forward_scratch(const Forward& p, const Team&) {
  return p.lookup.dropout_limit != 0 ? up(p.lookup.n, kLanes) * static_cast<int64_t>(sizeof(uint32_t)) : 0;
}

void run_forward(const Forward& p, char* scratch, const Team& team) {
  const Lookup& l = p.lookup;
  auto* columns = reinterpret_cast<uint32_t*>(scratch);
  if (l.dropout_limit != 0) column_hashes(l.dropout_key, 0, up(l.n, kLanes), columns);
  const LookUp one = look_up_for(p);
  team.share(l.rows * l.n < kFewElements ? 1 : team.size, l.rows, [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; ++row) one(p, columns, row);
  });
}

}  // namespace
}  // namespace cvmk::embed
