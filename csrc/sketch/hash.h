// The hash and the random draws of the sketch. cvmk/ops/reference/sketch.py states the same functions in Python, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cvmk::sketch {

constexpr std::uint64_t kGamma = 0x9E3779B97F4A7C15ull;

// The finalizer of splitmix64 (Steele, Lea, Flood 2014; constants of Stafford's variant 13); a bijection.
inline std::uint64_t mix64(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Five keys from one seed: two salt the hash of ids, one starts the random draws, two salt the fingerprint of byte strings.
struct Keys {
  explicit Keys(std::uint64_t seed)
      : id_xor(mix64(seed + 1 * kGamma)),
        id_add(mix64(seed + 2 * kGamma)),
        draw(mix64(seed + 3 * kGamma)),
        bytes_start(mix64(seed + 4 * kGamma)),
        bytes_xor(mix64(seed + 5 * kGamma)) {}
  std::uint64_t id_xor, id_add, draw, bytes_start, bytes_xor;
};

// A salted hash of an id; a bijection, so two ids never share one.
inline std::uint64_t hash_id(const Keys& keys, std::uint64_t id) { return mix64((id ^ keys.id_xor) * kGamma + keys.id_add); }

// The draw for the n-th occurrence in the stream, n = 0, 1, ...: splitmix64 by position.
inline std::uint64_t draw_at(const Keys& keys, std::uint64_t n) { return mix64(keys.draw + n * kGamma); }

inline std::uint64_t load4(const unsigned char* p) {
  return std::uint64_t{p[0]} | std::uint64_t{p[1]} << 8 | std::uint64_t{p[2]} << 16 | std::uint64_t{p[3]} << 24;
}

inline std::uint64_t load8(const unsigned char* p) {
  return std::uint64_t{p[0]} | std::uint64_t{p[1]} << 8 | std::uint64_t{p[2]} << 16 | std::uint64_t{p[3]} << 24 | std::uint64_t{p[4]} << 32 |
         std::uint64_t{p[5]} << 40 | std::uint64_t{p[6]} << 48 | std::uint64_t{p[7]} << 56;
}

// The first n (1 <= n <= 8) bytes as a little-endian word, zeros above. Reads nothing behind them.
inline std::uint64_t load_partial(const unsigned char* p, std::size_t n) {
  if (n == 8) return load8(p);
  if (n >= 4) return load4(p) | (load4(p + n - 4) >> (8 * (8 - n))) << 32;
  return std::uint64_t{p[0]} | std::uint64_t{p[n / 2]} << (8 * (n / 2)) | std::uint64_t{p[n - 1]} << (8 * (n - 1));
}

// High word xor low word of the 128-bit product.
inline std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
#ifdef __SIZEOF_INT128__
  __extension__ typedef unsigned __int128 Wide;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
#else
  const std::uint64_t a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
  const std::uint64_t low = a0 * b0, middle = a1 * b0 + (low >> 32), cross = a0 * b1 + (middle & 0xffffffffu);
  return (a1 * b1 + (middle >> 32) + (cross >> 32)) ^ (cross << 32 | (low & 0xffffffffu));
#endif
}

// A salted 64-bit fingerprint of a byte string: blocks of two little-endian words, the last one filled with zeros,
// chained through fold and mix64 from a start that holds the length.
inline std::uint64_t fingerprint(const Keys& keys, const unsigned char* p, std::size_t size) {
  std::uint64_t h = keys.bytes_start ^ size;
  for (; size > 16; size -= 16, p += 16) h = mix64(fold(load8(p) ^ keys.bytes_xor, load8(p + 8) ^ h));
  if (size == 0) return h;
  const std::uint64_t first = load_partial(p, size < 8 ? size : 8);
  const std::uint64_t second = size > 8 ? load_partial(p + 8, size - 8) : 0;
  return mix64(fold(first ^ keys.bytes_xor, second ^ h));
}

}  // namespace cvmk::sketch
