// Memory of sequences: fresh pages cost more than short sentences, so what one gives back the next takes.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

namespace cvmk::engine {

class Memory {
 public:
  // Keeps what nobody uses for those who come: at most `least` bytes, or as many as were in use at once. Other sizes than are asked for now go first, the largest.
  explicit Memory(std::int64_t least = std::int64_t{1} << 24) : least_(least) {}
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // What `take` really takes for so many bytes.
  static std::int64_t rounded(std::int64_t bytes);
  // Uninitialised, on a cache line. Throws std::bad_alloc.
  void* take(std::int64_t bytes);
  void give(void* data, std::int64_t bytes) noexcept;
  // Bytes that are in use; that are kept.
  std::int64_t used();
  std::int64_t kept();

 private:
  const std::int64_t least_;
  std::mutex mutex_;
  std::multimap<std::int64_t, void*> free_;
  std::int64_t kept_ = 0, used_ = 0, most_used_ = 0;
};

// A block of it, for as long as this lives. Throws std::bad_alloc; the memory outlives it.
class Held {
 public:
  Held(Memory& memory, std::int64_t bytes) : memory_(memory), bytes_(bytes), data_(static_cast<char*>(memory.take(bytes))) {}
  ~Held() { memory_.give(data_, bytes_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  char* data() const { return data_; }

 private:
  Memory& memory_;
  const std::int64_t bytes_;
  char* const data_;
};

}  // namespace cvmk::engine
