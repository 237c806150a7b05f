#include "gemm/pack.h"

#include <cstring>

#include "common/sizes.h"
#include "gemm/params.h"

namespace cvmk::gemm {
namespace {

constexpr int64_t kQuad = 4;              // inputs of an operand of vpdpbusd
constexpr int64_t kBlock = 128;           // inputs of a block of 4-bit weights
constexpr int64_t kWords = kBlock / 4;    // its words of 16 bits an output

// Where the quad of inputs that begins at k of output n stands among the packed int8 values.
int64_t quad_at(int64_t n, int64_t k, int64_t padded) { return n / kPanel * kPanel * padded + k / kQuad * kPanel * kQuad + n % kPanel * kQuad; }

// The word of output n that holds the inputs i, 32 + i, 64 + i and 96 + i of a block.
int64_t word_at(int64_t n, int64_t block, int64_t i, int64_t blocks) { return ((n / kPanel * blocks + block) * kPanel + n % kPanel) * kWords + i; }

uint32_t nibble(const uint8_t* row, int64_t k) { return row[k / 2] >> (k % 2 * 4) & 15u; }

// [outputs, groups] to [panels][groups][16] or back; what stands for no output is 0.
template <typename T>
void turn_groups(const T* from, int64_t outputs, int64_t groups, T* to, bool back) {
  for (int64_t n = 0; n < (back ? outputs : up(outputs, kPanel)); ++n)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t packed = (n / kPanel * groups + g) * kPanel + n % kPanel, plain = n * groups + g;
      if (back) to[plain] = from[packed];
      else to[packed] = n < outputs ? from[plain] : T{};
    }
}

}  // namespace

PackedSizes packed_int8_sizes(int64_t outputs, int64_t inputs) {
  const int64_t rows = up(outputs, kPanel);
  return {rows * up(inputs, kStep) + rows * static_cast<int64_t>(sizeof(int32_t)), rows + kPanel, 0};
}

PackedSizes packed_int4_sizes(int64_t outputs, int64_t inputs, int64_t groups) {
  const int64_t rows = up(outputs, kPanel);
  return {rows * up(inputs, kBlock) / 2, rows * groups, rows * groups};
}

void pack_int8(const int8_t* values, const float* scales, int64_t outputs, int64_t inputs, int8_t* to_values, float* to_scales) {
  const int64_t padded = up(inputs, kStep), rows = up(outputs, kPanel);
  std::memset(to_values, 0, static_cast<std::size_t>(packed_int8_sizes(outputs, inputs).values));
  for (int64_t n = 0; n < outputs; ++n, values += inputs) {
    int32_t sum = 0;
    for (int64_t k = 0; k < inputs; ++k) sum += values[k];
    for (int64_t k = 0; k < inputs; k += kQuad)
      std::memcpy(to_values + quad_at(n, k, padded), values + k, static_cast<std::size_t>(least(kQuad, inputs - k)));
    sum *= -128;
    std::memcpy(to_values + rows * padded + n * static_cast<int64_t>(sizeof sum), &sum, sizeof sum);
  }
  for (int64_t n = 0; n < rows + kPanel; ++n) to_scales[n] = n < outputs ? scales[n] : 0.0f;
}

void unpack_int8(const int8_t* values, const float* scales, int64_t outputs, int64_t inputs, int8_t* to_values, float* to_scales) {
  const int64_t padded = up(inputs, kStep);
  for (int64_t n = 0; n < outputs; ++n, to_values += inputs) {
    for (int64_t k = 0; k < inputs; k += kQuad)
      std::memcpy(to_values + k, values + quad_at(n, k, padded), static_cast<std::size_t>(least(kQuad, inputs - k)));
    to_scales[n] = scales[n];
  }
}

void pack_int4(const uint8_t* values, const float* scales, const uint8_t* zeros, int64_t outputs, int64_t inputs, int64_t groups, uint8_t* to_values,
               float* to_scales, uint8_t* to_zeros) {
  const int64_t blocks = pieces(inputs, kBlock);
  for (int64_t n = 0; n < up(outputs, kPanel); ++n)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = 0; i < kWords; ++i) {
        uint32_t word = 0;
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t k = block * kBlock + kWords * j + i;
          if (n < outputs && k < inputs) word |= nibble(values + n * (inputs / 2), k) << (4 * j);
        }
        uint8_t* const to = to_values + 2 * word_at(n, block, i, blocks);
        to[0] = static_cast<uint8_t>(word & 255u);
        to[1] = static_cast<uint8_t>(word >> 8);
      }
  turn_groups(scales, outputs, groups, to_scales, false);
  if (zeros != nullptr) turn_groups(zeros, outputs, groups, to_zeros, false);
}

void unpack_int4(const uint8_t* values, const float* scales, const uint8_t* zeros, int64_t outputs, int64_t inputs, int64_t groups, uint8_t* to_values,
                 float* to_scales, uint8_t* to_zeros) {
  const int64_t blocks = pieces(inputs, kBlock);
  const auto code = [&](int64_t n, int64_t k) {
    const int64_t j = k % kBlock / kWords;
    return values[2 * word_at(n, k / kBlock, k % kWords, blocks) + j / 2] >> (j % 2 * 4) & 15;
  };
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t k = 0; k < inputs; k += 2) to_values[n * (inputs / 2) + k / 2] = static_cast<uint8_t>(code(n, k) | code(n, k + 1) << 4);
  turn_groups(scales, outputs, groups, to_scales, true);
  if (zeros != nullptr) turn_groups(zeros, outputs, groups, to_zeros, true);
}

}  // namespace cvmk::gemm
