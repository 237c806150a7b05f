// One step of the selective scan: state = exp(step A) state + step x B, y = sum_n C state, in one pass over the state.
//
// A row is one channel of one head. Lanes are states (as they lie in memory); W rows go together, so that the sums over the states of all of
// them take one transposing addition, and step size, skip connection and gate are computed for W rows at once.

#include "scan/backward.inl"

namespace cvmk::scan {
namespace {

constexpr int64_t kRowsOfItem = 128;

struct UpdateScratch {
  float *B, *C;  // [states] of the current group
  CVMK_INLINE UpdateScratch(const Update& p, Arena* a) : B(a->take<float>(p.states)), C(a->take<float>(p.states)) {}
};

// The places of W rows (those behind the last repeat it).
struct Rows {
  int64_t batch, first;
  int count;
  int64_t head[W], row[W];
};

CVMK_INLINE F gather(const Update::Input& from, const Rows& at, bool contiguous) {
  if (from.data == nullptr) return F{};
  if (contiguous) return elements::load_n(from.data, from.dtype, at.batch * from.batch + at.first, at.count);
  F v{};
  for (int i = 0; i < at.count; ++i) v[i] = elements::load_one(from.data, from.dtype, at.batch * from.batch + at.head[i] * from.head + at.row[i] * from.row);
  return v;
}
CVMK_INLINE bool is_flat(const Update& p, const Update::Input& from) {
  return (p.dim == 1 || from.row == 1) && (p.heads == 1 || from.head == p.dim);
}

template <Dtype kType>
CVMK_INLINE F read_states(const char* p, int64_t stride, int n) {
  constexpr int64_t size = size_of(kType);
  if (stride == 1) return n == W ? elements::load<kType>(p) : elements::load_n<kType>(p, n);
  F v{};
  for (int i = 0; i < n; ++i) v[i] = elements::load_one<kType>(p + i * stride * size);
  return v;
}
template <Dtype kType>
CVMK_INLINE void write_states(char* p, int64_t stride, F v, int n) {
  constexpr int64_t size = size_of(kType);
  if (stride == 1) {
    if (n == W) elements::store<kType>(p, v);
    else elements::store_n<kType>(p, v, n);
    return;
  }
  char packed[W * 4];
  elements::store<kType>(packed, v);
  for (int i = 0; i < n; ++i) memcpy(p + i * stride * size, packed + i * size, static_cast<size_t>(size));
}

template <Dtype kStateType>
inline __attribute__((noinline)) void update_rows(const Update& p, int64_t batch, int64_t first, int64_t last, const UpdateScratch& k) {
  const int64_t heads_of_group = p.heads / p.groups;
  const bool tied = p.A_column == 0, flat_x = is_flat(p, p.x), flat_dt = is_flat(p, p.dt), flat_z = is_flat(p, p.z), flat_D = is_flat(p, p.D);
  const bool flat_bias = is_flat(p, p.bias);
  int64_t group_end = 0;  // the head at which the next group begins
  Rows at;
  at.batch = batch;
  int64_t head = first / p.dim, row = first % p.dim;
  for (at.first = first; at.first < last; at.first += W) {
    at.count = static_cast<int>(last - at.first < W ? last - at.first : W);
    for (int i = 0; i < at.count; ++i) {
      at.head[i] = head;
      at.row[i] = row;
      if (++row == p.dim) row = 0, ++head;
    }
    const F x = gather(p.x, at, flat_x), raw = gather(p.dt, at, flat_dt) + gather(p.bias, at, flat_bias);
    const F step = p.softplus ? softplus(raw) : raw, drive = step * x, rate = times_log2e(step);
    F decay{};
    if (tied) {  // one A for all states of a row: one exponential for it
      for (int i = 0; i < at.count; ++i) decay[i] = static_cast<const float*>(p.A)[at.head[i] * p.A_head + at.row[i] * p.A_row];
      decay = exp2(rate * decay);
    }
    float rates[W], drives[W], decays[W];
    simd::store(rates, rate);
    simd::store(drives, drive);
    simd::store(decays, decay);
    F products[W];
    for (int i = 0; i < W; ++i) {
      products[i] = F{};
      if (i >= at.count) continue;
      if (at.head[i] >= group_end) {
        const int64_t group = at.head[i] / heads_of_group;
        group_end = (group + 1) * heads_of_group;
        load_rows(plane(p.B, batch, group, 0), 1, static_cast<int>(p.states), false, k.B, 0);
        load_rows(plane(p.C, batch, group, 0), 1, static_cast<int>(p.states), false, k.C, 0);
      }
      char* state = elements::at(p.state, kStateType, batch * p.state_batch + at.head[i] * p.state_head + at.row[i] * p.state_row);
      const char* A = elements::at(p.A, kFloat32, at.head[i] * p.A_head + at.row[i] * p.A_row);
      for (int64_t n = 0; n < p.states; n += W) {
        const int count = static_cast<int>(p.states - n < W ? p.states - n : W);
        char* here = elements::at(state, kStateType, n * p.state_column);
        const F a = tied ? simd::set(decays[i]) : exp2(simd::set(rates[i]) * read_states<kFloat32>(elements::at(A, kFloat32, n * p.A_column), p.A_column, count));
        const F added = simd::set(drives[i]) * simd::load_n(k.B + n, count);
        const F next = a * read_states<kStateType>(here, p.state_column, count) + added;
        write_states<kStateType>(here, p.state_column, next, count);
        products[i] += next * simd::load_n(k.C + n, count);
      }
    }
    F y = row_sums(products);
    if (p.D.data != nullptr) y += gather(p.D, at, flat_D) * x;
    if (p.z.data != nullptr) {
      const F z = gather(p.z, at, flat_z);
      y *= z * sigmoid(z);
    }
    elements::store_n(p.out, p.x.dtype, batch * p.heads * p.dim + at.first, y, at.count);
  }
}

CVMK_INLINE int64_t items_of_row(const Update& p) { return pieces(p.heads * p.dim, kRowsOfItem); }
CVMK_INLINE int64_t bytes_each(const Update& p) {
  Arena one;
  UpdateScratch(p, &one);
  return one.used;
}

inline __attribute__((unused)) int64_t update_scratch(const Update& p, const Team& team) { return least(p.batch * items_of_row(p), team.size) * bytes_each(p); }

inline __attribute__((unused)) void run_update(const Update& p, char* scratch, const Team& team) {
  const int64_t rows = p.heads * p.dim, items = items_of_row(p), each = bytes_each(p);
  const auto run = p.state_dtype == kFloat32 ? update_rows<kFloat32> : p.state_dtype == kBFloat16 ? update_rows<kBFloat16> : update_rows<kFloat16>;
  team.each(p.batch * items, [&](int64_t item, int thread) {
    const unsigned mode = flush_subnormals();
    Arena own{scratch + thread * each};
    const UpdateScratch k(p, &own);
    const int64_t first = item % items * kRowsOfItem;
    run(p, item / items, first, least(rows, first + kRowsOfItem), k);
    restore_subnormals(mode);
  });
}

}  // namespace
}  // namespace cvmk::scan
