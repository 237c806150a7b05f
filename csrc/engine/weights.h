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

// A tensor in memory that outlives the model, aligned for its elements: a mapped file.
struct RawTensor {
  const void* data;
  Dtype dtype;
  std::vector<std::int64_t> shape;
};
typedef std::map<std::string, RawTensor> RawTensors;

// A quantised weight [outputs, inputs] in memory, canonical as cvmk/ops/quantize.py has it: int8 or, two a byte, 4-bit values and their float32 scales.
// What a weight does not have has no data.
struct StoredWeight {
  RawTensor values, scales, zeros, order;
  RawTensor smooth;  // float32 [inputs]: the rows of x are divided by it
  RawTensor range;   // float32 [1]: the magnitude that 127 stands for in all rows of x; without it each row's largest
  bool tokens;       // whether 4-bit values meet rows of x that are quantised to bytes; then there are neither zeros nor an order
  std::int64_t bits() const { return values.dtype == kInt8 ? 8 : 4; }
  std::int64_t outputs() const { return values.shape[0]; }
  std::int64_t inputs() const { return values.shape[1] * (bits() == 8 ? 1 : 2); }
};

// How weights are stored and multiplied: float32; bfloat16 weights with float32 sums; int8 weights scaled by rows and 4-bit weights scaled
// by groups, both times rows of x that are quantised to bytes; 4-bit weights times x as it is. Biases, norms and embeddings stay what they are.
enum class Compute { kFloat32, kBFloat16, kInt8, kInt4, kInt4Floats };

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
  // A weight as it is stored, bit for bit.
  Linear(const StoredWeight& weight, const RawTensor* bias, gemm::Activation activation);

  std::int64_t outputs() const { return outputs_; }
  std::int64_t inputs() const { return inputs_; }
  std::int64_t out_columns() const { return activation_ == gemm::kSwiglu ? outputs_ / 2 : outputs_; }
  std::int64_t bytes() const { return bytes_; }

  // The layer of these outputs only, in their order; without activation.
  Linear rows(const std::vector<std::int32_t>& outputs) const;
  // x [rows, inputs] -> out [rows, out_columns()], contiguous; the rows of x are `stride` numbers apart, 0 for contiguous ones.
  void operator()(const float* x, std::int64_t rows, float* out, const Team& team, std::int64_t stride = 0) const;
  // Rows of x [rows, inputs] as several calls of `range` multiply them: quantised once, in `memory` of prepared_bytes(rows).
  struct Prepared {
    const float* x;
    std::int64_t rows;
    gemm::ByteRows bytes;
  };
  std::int64_t prepared_bytes(std::int64_t rows) const;
  Prepared prepare(const float* x, std::int64_t rows, char* memory) const;
  // The outputs [first, first + count) only, without activation, into `sink`; `first` is a multiple of gemm::kFloatPanel.
  void range(const Prepared& prepared, std::int64_t first, std::int64_t count, const gemm::Sink& sink) const;

 private:
  bool prepares() const { return (compute_ == Compute::kInt8 && smooth_.empty()) || compute_ == Compute::kInt4; }
  void range_of_int4(const Prepared& prepared, std::int64_t first, std::int64_t count, const gemm::Sink& sink) const;
  gemm::Linear call(const float* x, std::int64_t rows, float* out) const;
  void run(const gemm::Linear& linear, std::int64_t first, const gemm::ByteRows* prepared, const Team& team) const;
  void pack_floats(const RawTensor& weight, Dtype dtype);
  void pack_int8(const RawTensor& weight);
  void pack_int8(const std::int8_t* values, const float* scales);
  void pack_int4(const RawTensor& weight);
  void pack_int4_floats(const StoredWeight& weight);
  // Bytes of an output's 4-bit values in the layout of Int4Linear.
  std::int64_t block_bytes() const { return (inputs_ + 127) / 128 * gemm::kStep; }
  // Room for 4-bit values and scales by groups, in the layout of Int4Bytes.
  void room_for_int4();
  void put_int4(std::int64_t n, std::int64_t k, unsigned code);
  void put_scale(std::int64_t n, std::int64_t group, float scale);

  Compute compute_ = Compute::kFloat32;
  gemm::Activation activation_ = gemm::kNone;
  std::int64_t outputs_ = 0, inputs_ = 0, group_ = 0, bytes_ = 0;
  std::shared_ptr<Storage> values_, scales_, zeros_;
  std::vector<float> bias_, smooth_;
  float range_ = 0;
  std::vector<std::int32_t> order_;
};

// Raises BadModel, with what is wrong, where a number is not finite.
void check_finite(const std::string& name, const RawTensor& tensor);
// Raises BadModel where a number is none that such a weight has: the value -128, a zero above 15, an order that is no permutation.
void check_values(const StoredWeight& weight, const std::string& name);
// A row as float32.
void read_row(const RawTensor& matrix, std::int64_t row, float* to);
void read_row(const StoredWeight& matrix, std::int64_t row, float* to);
std::vector<float> read_vector(const RawTensor& tensor);

}  // namespace cvmk::engine
