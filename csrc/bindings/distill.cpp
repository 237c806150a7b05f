// Bindings of the distillation losses: addresses, sizes and strides in, nothing of torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

#include "distill/distill.h"

namespace py = pybind11;

namespace {

using namespace cvmk::distill;

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::uintptr_t address(const float& x) { return reinterpret_cast<std::uintptr_t>(&x); }

// Targets as the kernels take them: -1 where a row does not count. Throws std::invalid_argument for one outside of the vocabulary.
struct Targets {
  std::unique_ptr<std::int64_t[]> values;
  std::int64_t count = 0;  // rows that count

  Targets(std::uintptr_t address, bool wide, std::int64_t rows, std::int64_t vocabulary, std::int64_t ignore_index)
      : values(new std::int64_t[static_cast<std::size_t>(rows)]) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t y = wide ? pointer<const std::int64_t>(address)[i] : pointer<const std::int32_t>(address)[i];
      const bool valid = y != ignore_index;
      if (valid && (y < 0 || y >= vocabulary))
        throw std::invalid_argument("target holds " + std::to_string(y) + ", which is neither in the vocabulary 0.." + std::to_string(vocabulary - 1) +
                                    " nor ignore_index (" + std::to_string(ignore_index) + ")");
      values[static_cast<std::size_t>(i)] = valid ? y : -1;
      count += valid ? 1 : 0;
    }
  }
};

// The sum over the rows in their order, in double precision.
double sum(const float* values, std::int64_t n) {
  double total = 0;
  for (std::int64_t i = 0; i < n; ++i) total += static_cast<double>(values[i]);
  return total;
}

// What the sum over the rows is divided by.
double divisor_of(std::uintptr_t normalizer, std::int64_t valid) {
  return normalizer != 0 ? static_cast<double>(*pointer<const float>(normalizer)) : static_cast<double>(valid > 1 ? valid : 1);
}

// Loss, T^2 D, CE and the normaliser from the losses of the rows; a part of weight 0 is left out of the loss, for it may be infinite.
void write_totals(const float* kd_rows, const float* ce_rows, std::int64_t rows, std::int64_t valid, std::uintptr_t normalizer, float temperature, double alpha,
                  std::uintptr_t loss, std::uintptr_t kd, std::uintptr_t ce, std::uintptr_t count) {
  const double divisor = divisor_of(normalizer, valid);
  const double t = static_cast<double>(temperature);
  const double kd_total = t * t * sum(kd_rows, rows) / divisor, ce_total = sum(ce_rows, rows) / divisor;
  *pointer<float>(kd) = static_cast<float>(kd_total);
  *pointer<float>(ce) = static_cast<float>(ce_total);
  *pointer<float>(count) = static_cast<float>(divisor);
  const double total = alpha == 0 ? ce_total : alpha == 1 ? kd_total : alpha * kd_total + (1 - alpha) * ce_total;
  *pointer<float>(loss) = static_cast<float>(total);
}

struct Scales {
  float kd = 0, ce = 0;
  bool with_kd = false, with_ce = false;
};

// What a row's divergence slope and cross-entropy gradient are multiplied by. An address of 0: no such gradient.
Scales scales_of(std::uintptr_t g_loss, std::uintptr_t g_kd, std::uintptr_t g_ce, std::uintptr_t count, bool has_teacher, double alpha, float temperature) {
  Scales scales;
  const auto read = [](std::uintptr_t address) { return address == 0 ? 0.0 : static_cast<double>(*pointer<const float>(address)); };
  const double divisor = read(count);
  scales.with_kd = has_teacher && ((g_loss != 0 && alpha != 0) || g_kd != 0);
  scales.with_ce = (g_loss != 0 && alpha != 1) || g_ce != 0;
  if (scales.with_kd) scales.kd = static_cast<float>(static_cast<double>(temperature) * ((alpha != 0 ? alpha * read(g_loss) : 0.0) + read(g_kd)) / divisor);
  if (scales.with_ce) scales.ce = static_cast<float>(((alpha != 1 ? (1 - alpha) * read(g_loss) : 0.0) + read(g_ce)) / divisor);
  return scales;
}

Rows rows_in(const Logits& student, const Logits& teacher, const Targets& targets, std::int64_t rows, std::int64_t vocabulary, std::uintptr_t stats, const Terms& terms) {
  return {student, teacher, targets.values.get(), rows, vocabulary, pointer<float>(stats), terms};
}

// Losses, statistics and, with an address for it, the gradient of the loss by itself. Its rows may be the student's.
void kd_loss(std::uintptr_t student, std::int64_t student_stride, int student_type, std::uintptr_t teacher, std::int64_t teacher_stride, int teacher_type,
             std::uintptr_t target, bool wide_target, std::int64_t rows, std::int64_t vocabulary, std::int64_t ignore_index, float temperature, double alpha,
             int divergence, float mixture, float smoothing, std::uintptr_t normalizer, std::uintptr_t stats, std::uintptr_t loss, std::uintptr_t kd,
             std::uintptr_t ce, std::uintptr_t count, std::uintptr_t gradient, std::int64_t gradient_stride) {
  const py::gil_scoped_release release;
  const Targets targets(target, wide_target, rows, vocabulary, ignore_index);
  const std::unique_ptr<float[]> values(new float[static_cast<std::size_t>(2 * rows)]);
  float* const kd_rows = values.get();
  float* const ce_rows = kd_rows + rows;
  const Rows in = rows_in({pointer<const void>(student), student_stride, student_type}, {pointer<const void>(teacher), teacher_stride, teacher_type}, targets, rows,
                          vocabulary, stats, {temperature, divergence, mixture, smoothing});
  if (gradient == 0) {
    losses({in, kd_rows, ce_rows});
  } else {
    const float one = 1, divisor = static_cast<float>(divisor_of(normalizer, targets.count));
    const Scales scales = scales_of(address(one), 0, 0, address(divisor), teacher != 0, alpha, temperature);
    gradients({in, scales.kd, scales.ce, scales.with_kd, scales.with_ce, pointer<void>(gradient), gradient_stride, kd_rows, ce_rows});
  }
  write_totals(kd_rows, ce_rows, rows, targets.count, normalizer, temperature, alpha, loss, kd, ce, count);
}

void kd_loss_gradient(std::uintptr_t student, std::int64_t student_stride, int student_type, std::uintptr_t teacher, std::int64_t teacher_stride,
                      int teacher_type, std::uintptr_t target, bool wide_target, std::int64_t rows, std::int64_t vocabulary, std::int64_t ignore_index,
                      float temperature, double alpha, int divergence, float mixture, float smoothing, std::uintptr_t stats, std::uintptr_t count,
                      std::uintptr_t g_loss, std::uintptr_t g_kd, std::uintptr_t g_ce, std::uintptr_t gradient) {
  const py::gil_scoped_release release;
  const Targets targets(target, wide_target, rows, vocabulary, ignore_index);
  const Scales scales = scales_of(g_loss, g_kd, g_ce, count, teacher != 0, alpha, temperature);
  const Rows in = rows_in({pointer<const void>(student), student_stride, student_type}, {pointer<const void>(teacher), teacher_stride, teacher_type}, targets, rows,
                          vocabulary, stats, {temperature, divergence, mixture, smoothing});
  gradients({in, scales.kd, scales.ce, scales.with_kd, scales.with_ce, pointer<void>(gradient), vocabulary, nullptr, nullptr});
}

// hidden, weight, bias: addresses; width, hidden_stride, weight_stride, type.
using LayerArguments = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, int>;

Layer layer_of(const LayerArguments& x) {
  return {pointer<const void>(std::get<0>(x)), pointer<const void>(std::get<1>(x)), pointer<const void>(std::get<2>(x)),
          std::get<3>(x), std::get<4>(x), std::get<5>(x), std::get<6>(x)};
}

constexpr std::size_t kScratchAlignment = 4096;
struct FreeScratch {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{kScratchAlignment}); }
};
struct Block {
  std::unique_ptr<char, FreeScratch> data;
  std::size_t bytes = 0;
};

// Scratch that stays for the next call, up to kKept bytes: the pages of fresh memory would cost as much as the products.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : lock_(mutex_, std::try_to_lock) {
    Block& block = lock_.owns_lock() ? kept_ : own_;
    if (block.bytes < bytes) {
      block.data.reset();
      block.data.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{kScratchAlignment})));
      advise_large_pages(block.data.get(), static_cast<std::int64_t>(bytes));
      block.bytes = bytes;
    }
    data_ = block.data.get();
  }
  ~Scratch() {
    if (lock_.owns_lock() && kept_.bytes > kKept) kept_ = Block{};
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  static constexpr std::size_t kKept = std::size_t{64} << 20;
  static inline std::mutex mutex_;
  static inline Block kept_;
  std::unique_lock<std::mutex> lock_;
  Block own_;
  char* data_;
};

// The losses, and with the scales given the gradients. Rows that do not count get zeros in stats and d_hidden.
void linear_kd_loss(const LayerArguments& student, const LayerArguments& teacher, std::uintptr_t target, bool wide_target, std::int64_t rows,
                    std::int64_t vocabulary, std::int64_t ignore_index, float temperature, double alpha, int divergence, float mixture, float smoothing,
                    std::uintptr_t normalizer, std::uintptr_t g_loss, std::uintptr_t g_kd, std::uintptr_t g_ce, std::uintptr_t divisor, std::uintptr_t stats,
                    std::uintptr_t loss, std::uintptr_t kd, std::uintptr_t ce, std::uintptr_t count, std::uintptr_t d_hidden, std::uintptr_t d_weight,
                    std::uintptr_t d_bias) {
  const py::gil_scoped_release release;
  const Targets targets(target, wide_target, rows, vocabulary, ignore_index);
  const auto n = static_cast<std::size_t>(rows);
  const std::unique_ptr<float[]> values(new float[2 * n]());
  const std::unique_ptr<std::int64_t[]> index(new std::int64_t[n]);
  LinearPass pass{};
  pass.student = layer_of(student);
  pass.teacher = layer_of(teacher);
  pass.index = index.get();
  pass.target = targets.values.get();
  for (std::int64_t i = 0; i < rows; ++i)
    if (pass.target[i] >= 0) index[static_cast<std::size_t>(pass.count++)] = i;
  pass.rows = rows;
  pass.vocabulary = vocabulary;
  pass.terms = {temperature, divergence, mixture, smoothing};
  const Scales scales = scales_of(g_loss, g_kd, g_ce, divisor, pass.teacher.hidden != nullptr, alpha, temperature);
  pass.with_kd = scales.with_kd;
  pass.with_ce = scales.with_ce;
  pass.kd_scale = scales.kd;
  pass.ce_scale = scales.ce;
  pass.stats = pointer<float>(stats);
  pass.kd = values.get();
  pass.ce = values.get() + n;
  pass.d_hidden = pointer<float>(d_hidden);
  pass.d_weight = pointer<float>(d_weight);
  pass.d_bias = pointer<float>(d_bias);
  const std::int64_t width = pass.student.width;
  if (pass.count < rows) {
    std::memset(pass.stats, 0, 5 * n * sizeof(float));
    if (d_hidden != 0) std::memset(pass.d_hidden, 0, n * static_cast<std::size_t>(width) * sizeof(float));
  }
  if (pass.count == 0 || !(pass.with_kd || pass.with_ce)) {
    if (d_hidden != 0) std::memset(pass.d_hidden, 0, n * static_cast<std::size_t>(width) * sizeof(float));
    if (d_weight != 0) std::memset(pass.d_weight, 0, static_cast<std::size_t>(vocabulary * width) * sizeof(float));
    if (d_bias != 0) std::memset(pass.d_bias, 0, static_cast<std::size_t>(vocabulary) * sizeof(float));
  }
  if (d_weight != 0) advise_large_pages(pass.d_weight, vocabulary * width * 4);
  if (pass.count > 0) {
    const Scratch scratch(static_cast<std::size_t>(linear_scratch(pass)));
    pass.scratch = scratch.data();
    linear(pass);
  }
  if (loss != 0) write_totals(pass.kd, pass.ce, rows, pass.count, normalizer, temperature, alpha, loss, kd, ce, count);
}

void scaled(std::uintptr_t from, std::int64_t count, std::uintptr_t factor, std::uintptr_t to, int type) {
  const py::gil_scoped_release release;
  advise_large_pages(pointer<void>(to), count * (type == kFloat32 ? 4 : 2));
  scale({pointer<const float>(from), pointer<void>(to), type, count, *pointer<const float>(factor)});
}

}  // namespace

void bind_distill(py::module_& m) {
  m.def("linear_kd_loss", &linear_kd_loss, "Losses, statistics and gradients from hidden states");
  m.def("scaled", &scaled, "Numbers times a factor, in another type");
  m.def("kd_loss", &kd_loss, "Losses and statistics of rows of logits");
  m.def("kd_loss_gradient", &kd_loss_gradient, "Gradient of rows of logits");
}
