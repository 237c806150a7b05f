// A model's weights: read from named tensors where they are, packed once for the kernels, then only read, by any number of threads.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/blocks.h"
#include "common/dtype.h"
#include "common/team.h"
#include "gemm/params.h"

namespace cvmk::engine {

// What the caller gave is no model; the message is a sentence.
struct BadModel : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A tensor in memory that outlives the model: a mapped file.
struct RawTensor {
  const void* data;
  Dtype dtype;  // a floating type
  std::vector<std::int64_t> shape;
};
typedef std::map<std::string, RawTensor> RawTensors;

// How weights are stored and multiplied: float32; bfloat16 weights with float32 sums; int8 weights scaled by rows and 4-bit weights scaled
// by groups, both times rows of x that are quantised to bytes. Biases, norms and embeddings stay what they are.
enum class Compute { kFloat32, kBFloat16, kInt8, kInt4 };

// Memory for packed weights; what is small shares its pages with others: a block has 2 MiB at least.
class Storage {
 public:
  explicit Storage(std::size_t bytes) : small_(bytes <= kSmall) {
    if (small_) block_.data = ::operator new(bytes, kLine);
    else block_ = take_block(bytes);
  }
  ~Storage() {
    if (small_) ::operator delete(block_.data, kLine);
    else give_block(block_);
  }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(block_.data);
  }

 private:
  static constexpr std::size_t kSmall = std::size_t{1} << 20;
  static constexpr std::align_val_t kLine{64};
  bool small_;
  Block block_;
};

// activation(x W^T + b) for a few rows, float32 in and out.
class Linear {
 public:
  Linear() = default;
  // weight [outputs, inputs], bias [outputs] or null.
  Linear(const RawTensor& weight, const RawTensor* bias, Compute compute, gemm::Activation activation);

  std::int64_t outputs() const { return outputs_; }
  std::int64_t inputs() const { return inputs_; }
  std::int64_t out_columns() const { return activation_ == gemm::kSwiglu ? outputs_ / 2 : outputs_; }
  std::int64_t bytes() const { return bytes_; }

  // The layer of these outputs only, in their order; without activation.
  Linear rows(const std::vector<std::int32_t>& outputs) const;
  // x [rows, inputs] -> out [rows, out_columns()], both contiguous.
  void operator()(const float* x, std::int64_t rows, float* out, const Team& team) const;
  // The outputs [first, first + count) only, without activation; `first` is a multiple of kRange. out [rows, count].
  static constexpr std::int64_t kRange = 64;
  void range(const float* x, std::int64_t rows, std::int64_t first, std::int64_t count, float* out, const Team& team) const;

 private:
  gemm::Linear call(const float* x, std::int64_t rows, float* out) const;
  void run(const gemm::Linear& linear, std::int64_t first, const Team& team) const;
  void pack_floats(const RawTensor& weight, Dtype dtype);
  void pack_int8(const RawTensor& weight);
  void pack_int4(const RawTensor& weight);

  Compute compute_ = Compute::kFloat32;
  gemm::Activation activation_ = gemm::kNone;
  std::int64_t outputs_ = 0, inputs_ = 0, group_ = 0, bytes_ = 0;
  std::shared_ptr<Storage> values_, scales_;
  std::vector<float> bias_;
};

// Raises BadModel, with what is wrong, where a number is not finite.
void check_finite(const std::string& name, const RawTensor& tensor);
// A row as float32.
void read_row(const RawTensor& matrix, std::int64_t row, float* to);
std::vector<float> read_vector(const RawTensor& tensor);

}  // namespace cvmk::engine
