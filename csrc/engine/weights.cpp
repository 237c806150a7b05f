#include "engine/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/elements.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "gemm/pack.h"

namespace cvmk::engine {
namespace {

constexpr float kSmallestScale = 1.17549435e-38f;  // as cvmk/ops/quantize.py has it

void as_floats(const void* from, Dtype dtype, std::int64_t first, std::int64_t count, float* to) {
  if (dtype == kFloat32) {
    std::memcpy(to, static_cast<const float*>(from) + first, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) to[i] = elements::load_one(from, dtype, first + i);
}

// The largest group of 4-bit weights that divides the inputs; 0: none does.
std::int64_t group_of(std::int64_t inputs) {
  for (const std::int64_t group : {128, 64, 32, 16})
    if (inputs % group == 0) return group;
  return 0;
}

// `steps` units, `stride` bytes from each other in both.
template <int bytes>
void copy_units(const char* source, char* target, std::int64_t steps, std::int64_t stride) {
  for (std::int64_t s = 0; s < steps; ++s, source += stride, target += stride) std::memcpy(target, source, bytes);
}

// The largest magnitude; NaN where there is one.
float largest(const float* x, std::int64_t n) {
  float found = 0.0f;
  for (std::int64_t i = 0; i < n; ++i) {
    if (x[i] != x[i]) return x[i];
    found = std::max(found, std::fabs(x[i]));
  }
  return found;
}

}  // namespace

void check_finite(const std::string& name, const RawTensor& tensor) {
  std::int64_t count = 1;
  for (const std::int64_t size : tensor.shape) count *= size;
  float part[1024];
  for (std::int64_t at = 0; at < count; at += 1024) {
    const std::int64_t n = std::min<std::int64_t>(1024, count - at);
    as_floats(tensor.data, tensor.dtype, at, n, part);
    float sum = 0.0f;
    for (std::int64_t i = 0; i < n; ++i) sum += part[i] * 0.0f;  // NaN for what is not finite
    if (sum != 0.0f) throw BadModel("has values in " + name + " that are no finite numbers: the training diverged or the file is damaged; use another checkpoint");
  }
}

void check_values(const StoredWeight& weight, const std::string& name) {
  const auto refuse = [&](const std::string& what) { throw BadModel("has in " + name + " " + what + ": restore it or quantise the model again"); };
  const std::int64_t inputs = weight.inputs();
  if (weight.bits() == 8) {
    const auto* smooth = static_cast<const float*>(weight.smooth.data);
    if (smooth != nullptr && !std::all_of(smooth, smooth + inputs, [](float s) { return s > 0.0f; })) refuse("a smoothing scale that is not positive");
    const auto* range = static_cast<const float*>(weight.range.data);
    if (range != nullptr && !(*range > 0.0f)) refuse("an input range that is not positive");
    const auto* values = static_cast<const std::int8_t*>(weight.values.data);
    if (std::count(values, values + weight.outputs() * inputs, std::int8_t{-128}) != 0) refuse("the value -128 where values lie within -127 ... 127");
    return;
  }
  const auto* zeros = static_cast<const std::uint8_t*>(weight.zeros.data);
  const std::int64_t groups = weight.outputs() * weight.scales.shape[1];
  if (zeros != nullptr && std::any_of(zeros, zeros + groups, [](std::uint8_t zero) { return zero > 15; })) refuse("a zero above 15");
  const auto* order = static_cast<const std::int32_t*>(weight.order.data);
  if (order == nullptr) return;
  std::vector<bool> seen(static_cast<std::size_t>(inputs));
  for (std::int64_t k = 0; k < inputs; ++k) {
    if (order[k] < 0 || order[k] >= inputs || seen[static_cast<std::size_t>(order[k])]) refuse("an order that is no permutation of its inputs");
    seen[static_cast<std::size_t>(order[k])] = true;
  }
}

void read_row(const RawTensor& matrix, std::int64_t row, float* to) { as_floats(matrix.data, matrix.dtype, row * matrix.shape[1], matrix.shape[1], to); }

// As QuantizedWeight.dequantize: (value - zero) * scale in float32.
void read_row(const StoredWeight& matrix, std::int64_t row, float* to) {
  const std::int64_t inputs = matrix.inputs();
  const float* scales = static_cast<const float*>(matrix.scales.data);
  if (matrix.bits() == 8) {
    const std::int8_t* values = static_cast<const std::int8_t*>(matrix.values.data) + row * inputs;
    for (std::int64_t k = 0; k < inputs; ++k) to[k] = static_cast<float>(values[k]) * scales[row];
    return;
  }
  const std::int64_t groups = matrix.scales.shape[1], group = inputs / groups;
  const auto* values = static_cast<const std::uint8_t*>(matrix.values.data) + row * (inputs / 2);
  const auto* zeros = static_cast<const std::uint8_t*>(matrix.zeros.data);
  const auto* order = static_cast<const std::int32_t*>(matrix.order.data);
  for (std::int64_t k = 0; k < inputs; ++k) {
    const std::int64_t g = row * groups + k / group;
    const int code = values[k / 2] >> (k % 2 * 4) & 15, zero = zeros == nullptr ? 8 : zeros[g];
    to[order == nullptr ? k : order[k]] = static_cast<float>(code - zero) * scales[g];
  }
}

std::vector<float> read_vector(const RawTensor& tensor) {
  std::vector<float> found(static_cast<std::size_t>(tensor.shape[0]));
  as_floats(tensor.data, tensor.dtype, 0, tensor.shape[0], found.data());
  return found;
}

Linear::Linear(const RawTensor& weight, const RawTensor* bias, Compute compute, gemm::Activation activation)
    : compute_(compute), activation_(activation), outputs_(weight.shape[0]), inputs_(weight.shape[1]) {
  if (bias != nullptr) bias_ = read_vector(*bias);
  if (compute_ == Compute::kInt4 && (group_ = group_of(inputs_)) == 0) compute_ = Compute::kInt8;
  switch (compute_) {
    case Compute::kFloat32: pack_floats(weight, kFloat32); break;
    case Compute::kBFloat16: pack_floats(weight, kBFloat16); break;
    case Compute::kInt8: pack_int8(weight); break;
    case Compute::kInt4: pack_int4(weight); break;
    case Compute::kInt4Floats: throw std::logic_error("4-bit weights times floats are made of stored weights");
  }
}

Linear::Linear(const StoredWeight& weight, const RawTensor* bias, gemm::Activation activation)
    : compute_(weight.bits() == 8 ? Compute::kInt8 : weight.tokens ? Compute::kInt4 : Compute::kInt4Floats),
      activation_(activation), outputs_(weight.outputs()), inputs_(weight.inputs()) {
  if (bias != nullptr) bias_ = read_vector(*bias);
  if (weight.smooth.data != nullptr) smooth_ = read_vector(weight.smooth);
  if (weight.range.data != nullptr) range_ = *static_cast<const float*>(weight.range.data);
  const float* scales = static_cast<const float*>(weight.scales.data);
  if (compute_ == Compute::kInt8) {
    pack_int8(static_cast<const std::int8_t*>(weight.values.data), scales);
    return;
  }
  const std::int64_t groups = weight.scales.shape[1];
  group_ = inputs_ / groups;
  if (compute_ == Compute::kInt4Floats) {
    pack_int4_floats(weight);
    return;
  }
  room_for_int4();
  const auto* values = static_cast<const std::uint8_t*>(weight.values.data);
  for (std::int64_t n = 0; n < outputs_; ++n) {
    for (std::int64_t g = 0; g < groups; ++g) put_scale(n, g, scales[n * groups + g]);
    for (std::int64_t k = 0; k < inputs_; ++k) put_int4(n, k, values[n * (inputs_ / 2) + k / 2] >> (k % 2 * 4) & 15u);
  }
}

void Linear::pack_floats(const RawTensor& weight, Dtype dtype) {
  const std::int64_t parts = activation_ == gemm::kSwiglu ? 2 : 1, rows = outputs_ / parts, panels = pieces(rows, gemm::kFloatPanel);
  const std::int64_t count = parts * panels * inputs_ * gemm::kFloatPanel;
  bytes_ = count * size_of(dtype);
  values_ = std::make_shared<Storage>(static_cast<std::size_t>(bytes_));
  std::memset(values_->as<char>(), 0, static_cast<std::size_t>(bytes_));
  std::vector<float> row(static_cast<std::size_t>(inputs_));
  for (std::int64_t n = 0; n < outputs_; ++n) {
    read_row(weight, n, row.data());
    const std::int64_t own = n % rows, panel = n / rows * panels + own / gemm::kFloatPanel;
    const std::int64_t at = panel * inputs_ * gemm::kFloatPanel + own % gemm::kFloatPanel;
    for (std::int64_t k = 0; k < inputs_; ++k) {
      const float x = row[static_cast<std::size_t>(k)];
      if (dtype == kFloat32) values_->as<float>()[at + k * gemm::kFloatPanel] = x;
      else elements::store_n<kBFloat16>(values_->as<std::uint16_t>() + at + k * gemm::kFloatPanel, simd::set(x), 1);
    }
  }
}

// As ops.quantize_int8: scale = largest / 127, value = round_half_even(w / scale).
void Linear::pack_int8(const RawTensor& weight) {
  std::vector<std::int8_t> values(static_cast<std::size_t>(outputs_ * inputs_));
  std::vector<float> scales(static_cast<std::size_t>(outputs_)), row(static_cast<std::size_t>(inputs_));
  for (std::int64_t n = 0; n < outputs_; ++n) {
    read_row(weight, n, row.data());
    const float top = largest(row.data(), inputs_), scale = top != top ? top : std::max(top / 127.0f, kSmallestScale);
    scales[static_cast<std::size_t>(n)] = scale;
    for (std::int64_t k = 0; k < inputs_; ++k) {
      const float q = std::nearbyint(row[static_cast<std::size_t>(k)] / scale);
      values[static_cast<std::size_t>(n * inputs_ + k)] = q != q ? std::int8_t{0} : static_cast<std::int8_t>(std::min(127.0f, std::max(-127.0f, q)));
    }
  }
  pack_int8(values.data(), scales.data());
}

void Linear::pack_int8(const std::int8_t* values, const float* scales) {
  const gemm::PackedSizes sizes = gemm::packed_int8_sizes(outputs_, inputs_);
  bytes_ = sizes.values + sizes.scales * 4;
  values_ = std::make_shared<Storage>(static_cast<std::size_t>(sizes.values));
  scales_ = std::make_shared<Storage>(static_cast<std::size_t>(sizes.scales) * sizeof(float));
  gemm::pack_int8(values, scales, outputs_, inputs_, values_->as<std::int8_t>(), scales_->as<float>());
}

// As ops.quantize_int4 (symmetric): scale = largest / 7.5 of a group, value = round_half_even(w / scale) + 8.
void Linear::pack_int4(const RawTensor& weight) {
  room_for_int4();
  std::vector<float> row(static_cast<std::size_t>(inputs_));
  for (std::int64_t n = 0; n < outputs_; ++n) {
    read_row(weight, n, row.data());
    for (std::int64_t g = 0; g < inputs_ / group_; ++g) {
      const float top = largest(row.data() + g * group_, group_), scale = top == 0.0f ? 1.0f : std::max(top / 7.5f, kSmallestScale);
      put_scale(n, g, scale);
      for (std::int64_t k = g * group_; k < (g + 1) * group_; ++k) {
        const float q = std::nearbyint(row[static_cast<std::size_t>(k)] / scale) + 8.0f;
        put_int4(n, k, static_cast<unsigned>(std::min(15.0f, std::max(0.0f, q))));
      }
    }
  }
}

void Linear::room_for_int4() {
  const std::int64_t panels = pieces(outputs_, gemm::kPanel), values = panels * (inputs_ / 8) * gemm::kStep, scales = panels * (inputs_ / group_) * gemm::kPanel;
  bytes_ = values + scales * 4;
  values_ = std::make_shared<Storage>(static_cast<std::size_t>(values));
  scales_ = std::make_shared<Storage>(static_cast<std::size_t>(scales) * sizeof(float));
  std::fill_n(values_->as<std::uint8_t>(), values, std::uint8_t{0});
  std::fill_n(scales_->as<float>(), scales, 0.0f);
}

void Linear::put_int4(std::int64_t n, std::int64_t k, unsigned code) {
  const std::int64_t panel = n / gemm::kPanel, lane = n % gemm::kPanel;
  values_->as<std::uint8_t>()[(panel * (inputs_ / 8) + k / 8) * gemm::kStep + lane * 4 + k % 4] |= static_cast<std::uint8_t>(code << (k % 8 / 4 * 4));
}

void Linear::put_scale(std::int64_t n, std::int64_t group, float scale) {
  scales_->as<float>()[(n / gemm::kPanel * (inputs_ / group_) + group) * gemm::kPanel + n % gemm::kPanel] = scale;
}

void Linear::pack_int4_floats(const StoredWeight& weight) {
  const std::int64_t groups = inputs_ / group_;
  const gemm::PackedSizes sizes = gemm::packed_int4_sizes(outputs_, inputs_, groups);
  const auto* zeros = static_cast<const std::uint8_t*>(weight.zeros.data);
  bytes_ = sizes.values + sizes.scales * 4 + (zeros == nullptr ? 0 : sizes.zeros);
  values_ = std::make_shared<Storage>(static_cast<std::size_t>(sizes.values));
  scales_ = std::make_shared<Storage>(static_cast<std::size_t>(sizes.scales) * sizeof(float));
  if (zeros != nullptr) zeros_ = std::make_shared<Storage>(static_cast<std::size_t>(sizes.zeros));
  gemm::pack_int4(static_cast<const std::uint8_t*>(weight.values.data), static_cast<const float*>(weight.scales.data), zeros, outputs_, inputs_, groups,
                  values_->as<std::uint8_t>(), scales_->as<float>(), zeros == nullptr ? nullptr : zeros_->as<std::uint8_t>());
  const auto* order = static_cast<const std::int32_t*>(weight.order.data);
  if (order != nullptr) order_.assign(order, order + inputs_);
}

Linear Linear::rows(const std::vector<std::int32_t>& outputs) const {
  Linear found;
  const std::int64_t count = static_cast<std::int64_t>(outputs.size());
  found.compute_ = compute_;
  found.outputs_ = count;
  found.inputs_ = inputs_;
  found.group_ = group_;
  found.smooth_ = smooth_;
  found.range_ = range_;
  found.order_ = order_;
  for (const std::int32_t n : outputs)
    if (!bias_.empty()) found.bias_.push_back(bias_[static_cast<std::size_t>(n)]);
  // A panel's units of `bytes` stand side by side, one of each of its `width` outputs, `steps` times.
  const auto gather = [&](const Storage& from, Storage& to, std::int64_t width, std::int64_t steps, std::int64_t bytes) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t n = outputs[static_cast<std::size_t>(i)];
      const char* source = from.as<char>() + (n / width * steps * width + n % width) * bytes;
      char* target = to.as<char>() + (i / width * steps * width + i % width) * bytes;
      if (bytes == 4) copy_units<4>(source, target, steps, width * 4);
      else if (bytes == 2) copy_units<2>(source, target, steps, width * 2);
      else if (bytes == 1) copy_units<1>(source, target, steps, width);
      else copy_units<gemm::kStep>(source, target, steps, width * gemm::kStep);
    }
  };
  const auto room = [](std::int64_t bytes) {
    auto storage = std::make_shared<Storage>(static_cast<std::size_t>(bytes));
    std::memset(storage->as<char>(), 0, static_cast<std::size_t>(bytes));
    return storage;
  };
  const std::int64_t panels = pieces(count, gemm::kPanel);
  switch (compute_) {
    case Compute::kFloat32:
    case Compute::kBFloat16: {
      const std::int64_t size = size_of(compute_ == Compute::kFloat32 ? kFloat32 : kBFloat16);
      found.bytes_ = up(count, gemm::kFloatPanel) * inputs_ * size;
      found.values_ = room(found.bytes_);
      gather(*values_, *found.values_, gemm::kFloatPanel, inputs_, size);
      break;
    }
    case Compute::kInt8: {
      const std::int64_t padded = up(inputs_, gemm::kStep);
      const gemm::PackedSizes sizes = gemm::packed_int8_sizes(count, inputs_);
      found.bytes_ = sizes.values + sizes.scales * 4;
      found.values_ = room(sizes.values);
      found.scales_ = room(sizes.scales * 4);
      gather(*values_, *found.values_, gemm::kPanel, padded / 4, 4);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t n = outputs[static_cast<std::size_t>(i)];
        found.scales_->as<float>()[i] = scales_->as<float>()[n];
        std::memcpy(found.values_->as<char>() + panels * gemm::kPanel * padded + i * 4, values_->as<char>() + up(outputs_, gemm::kPanel) * padded + n * 4, 4);
      }
      break;
    }
    case Compute::kInt4:
      found.bytes_ = panels * (inputs_ / 8 * gemm::kStep + inputs_ / group_ * gemm::kPanel * 4);
      found.values_ = room(panels * inputs_ / 8 * gemm::kStep);
      found.scales_ = room(panels * inputs_ / group_ * gemm::kPanel * 4);
      gather(*values_, *found.values_, gemm::kPanel, inputs_ / 8, 4);
      gather(*scales_, *found.scales_, gemm::kPanel, inputs_ / group_, 4);
      break;
    case Compute::kInt4Floats: {
      const std::int64_t groups = inputs_ / group_;
      const gemm::PackedSizes sizes = gemm::packed_int4_sizes(count, inputs_, groups);
      found.bytes_ = sizes.values + sizes.scales * 4 + (zeros_ == nullptr ? 0 : sizes.zeros);
      found.values_ = room(sizes.values);
      found.scales_ = room(sizes.scales * 4);
      gather(*values_, *found.values_, gemm::kPanel, block_bytes() / gemm::kStep, gemm::kStep);
      gather(*scales_, *found.scales_, gemm::kPanel, groups, 4);
      if (zeros_ != nullptr) gather(*zeros_, *(found.zeros_ = room(sizes.zeros)), gemm::kPanel, groups, 1);
      break;
    }
  }
  return found;
}

gemm::Linear Linear::call(const float* x, std::int64_t rows, float* out) const {
  gemm::Linear l{};
  l.x = x;
  l.x_stride = inputs_;
  l.out = out;
  l.bias = bias_.empty() ? nullptr : bias_.data();
  l.rows = rows;
  l.inputs = inputs_;
  l.outputs = outputs_;
  l.x_dtype = l.out_dtype = l.bias_dtype = kFloat32;
  l.activation = activation_;
  return l;
}

void Linear::operator()(const float* x, std::int64_t rows, float* out, const Team& team, std::int64_t stride) const {
  gemm::Linear l = call(x, rows, out);
  if (stride != 0) l.x_stride = stride;
  run(l, 0, nullptr, team);
}

std::int64_t Linear::prepared_bytes(std::int64_t rows) const {
  if (!prepares()) return 0;
  return up(gemm::byte_rows_size(rows, inputs_), 64) + up(rows * 4, 64) + (group_ == 0 ? 0 : rows * (inputs_ / group_) * 4);
}

Linear::Prepared Linear::prepare(const float* x, std::int64_t rows, char* memory) const {
  Prepared prepared{x, rows, {}};
  if (!prepares()) return prepared;
  Arena arena{memory};
  gemm::ByteRows& bytes = prepared.bytes;
  bytes.x = x;
  bytes.rows = rows;
  bytes.inputs = inputs_;
  bytes.range = range_;
  bytes.group = compute_ == Compute::kInt4 ? group_ : 0;
  bytes.bytes = arena.take<std::uint8_t>(gemm::byte_rows_size(rows, inputs_));
  bytes.scales = arena.take<float>(rows);
  bytes.sums = bytes.group == 0 ? nullptr : arena.take<std::int32_t>(rows * (inputs_ / group_));
  const auto& kernel = gemm::kernels_for(bytes).byte_rows;
  kernel.run(bytes, nullptr, Team{});
  return prepared;
}

void Linear::range(const Prepared& prepared, std::int64_t first, std::int64_t count, const gemm::Sink& sink) const {
  if (compute_ == Compute::kInt4Floats) return range_of_int4(prepared, first, count, sink);
  gemm::Linear l = call(prepared.x, prepared.rows, nullptr);
  l.outputs = count;
  l.activation = gemm::kNone;
  l.sink = &sink;
  if (l.bias != nullptr) l.bias = static_cast<const float*>(l.bias) + first;
  run(l, first, prepared.bytes.bytes == nullptr ? nullptr : &prepared.bytes, Team{});
}

// By way of memory: that kernel takes no sink.
void Linear::range_of_int4(const Prepared& prepared, std::int64_t first, std::int64_t count, const gemm::Sink& sink) const {
  constexpr std::int64_t kColumns = 8 * gemm::kPartColumns;
  const Scratch scratch((prepared.rows * kColumns + gemm::kPartColumns) * 4);
  float* const out = reinterpret_cast<float*>(scratch.data());
  for (std::int64_t at = 0; at < count; at += kColumns) {
    const std::int64_t n = std::min(kColumns, count - at);
    gemm::Linear l = call(prepared.x, prepared.rows, out);
    l.outputs = n;
    l.activation = gemm::kNone;
    if (l.bias != nullptr) l.bias = static_cast<const float*>(l.bias) + first + at;
    run(l, first + at, nullptr, Team{});
    l.bias = nullptr;  // it is in the products
    for (std::int64_t column = 0; column < n; column += gemm::kPartColumns)
      sink.take(sink.context, {&l, 0, prepared.rows, at + column, std::min<std::int64_t>(gemm::kPartColumns, n - column), out + column, n, nullptr});
  }
}

void Linear::run(const gemm::Linear& linear, std::int64_t first, const gemm::ByteRows* prepared, const Team& team) const {
  switch (compute_) {
    case Compute::kFloat32:
    case Compute::kBFloat16: {
      const Dtype dtype = compute_ == Compute::kFloat32 ? kFloat32 : kBFloat16;
      const gemm::FloatLinear p{linear, values_->as<char>() + first * inputs_ * size_of(dtype), dtype};
      return cvmk::run(gemm::kernels().floats, p, team);
    }
    case Compute::kInt8: {
      gemm::Int8Linear p{};
      const std::int64_t padded = up(inputs_, gemm::kStep);
      p.linear = linear;
      p.linear.scales = scales_->as<float>() + first;
      p.prepared = prepared;
      p.weight = values_->as<std::int8_t>() + first * padded;
      p.smooth_scale = smooth_.empty() ? nullptr : smooth_.data();
      p.smooth_dtype = kFloat32;
      p.range = range_;
      p.sums = reinterpret_cast<const std::int32_t*>(values_->as<std::int8_t>() + up(outputs_, gemm::kPanel) * padded) + first;
      const auto& kernel = gemm::kernels_for(p).int8;
      return cvmk::run(kernel, p, team);
    }
    case Compute::kInt4: {
      gemm::Int4Bytes p{};
      p.linear = linear;
      p.linear.scales = scales_->as<float>() + first * (inputs_ / group_);
      p.weight = values_->as<std::uint8_t>() + first / gemm::kPanel * (inputs_ / 8) * gemm::kStep;
      p.group = group_;
      p.prepared = prepared;
      const auto& kernel = gemm::kernels_for(p).int4_bytes;
      return cvmk::run(kernel, p, team);
    }
    case Compute::kInt4Floats: {
      gemm::Int4Linear p{};
      const std::int64_t groups = inputs_ / group_;
      p.linear = linear;
      p.linear.scales = scales_->as<float>() + first * groups;
      p.weight = reinterpret_cast<const std::uint16_t*>(values_->as<char>() + first * block_bytes());
      p.zeros = zeros_ == nullptr ? nullptr : zeros_->as<std::uint8_t>() + first * groups;
      p.order = order_.empty() ? nullptr : order_.data();
      p.group = group_;
      return cvmk::run(gemm::kernels().int4, p, team);
    }
  }
}

}  // namespace cvmk::engine
