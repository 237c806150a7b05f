// Memory of sequences: fresh pages cost more than short sentences, so what one gives back the next takes.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

namespace cvmk::engine {

class Memory {
 public:
  // Keeps at most `kept` bytes that nobody uses.
  explicit Memory(std::int64_t kept = std::int64_t{1} << 28) : limit_(kept) {}
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // What `take` really takes for so many bytes.
  static std::int64_t rounded(std::int64_t bytes);
  // Uninitialised, on a cache line. Throws std::bad_alloc.
  void* take(std::int64_t bytes);
  void give(void* data, std::int64_t bytes) noexcept;
  // Bytes that are in use.
  std::int64_t used();

 private:
  const std::int64_t limit_;
  std::mutex mutex_;
  std::multimap<std::int64_t, void*> free_;
  std::int64_t kept_ = 0, used_ = 0;
};

}  // namespace cvmk::engine
