#include "engine/memory.h"

#include <iterator>
#include <new>

#include "common/sizes.h"

namespace cvmk::engine {
namespace {

constexpr std::align_val_t kLine{64};

}  // namespace

Memory::~Memory() {
  for (const auto& [bytes, data] : free_) ::operator delete(data, kLine);
}

// To an eighth of the power of two below, so that sentences of like length share blocks.
std::int64_t Memory::rounded(std::int64_t bytes) {
  std::int64_t step = 4096;
  while (step * 16 <= bytes) step *= 2;
  return up(most(bytes, 1), step);
}

void* Memory::take(std::int64_t bytes) {
  bytes = rounded(bytes);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ += bytes;
    most_used_ = most(most_used_, used_);
    const auto found = free_.find(bytes);
    if (found != free_.end()) {
      void* data = found->second;
      free_.erase(found);
      kept_ -= bytes;
      return data;
    }
  }
  try {
    return ::operator new(static_cast<std::size_t>(bytes), kLine);
  } catch (const std::bad_alloc&) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= bytes;
    throw;
  }
}

void Memory::give(void* data, std::int64_t bytes) noexcept {
  bytes = rounded(bytes);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= bytes;
    const std::int64_t limit = most(least_, most_used_);
    while (kept_ + bytes > limit && !free_.empty()) {
      const auto last = std::prev(free_.end());
      if (last->first == bytes) break;
      ::operator delete(last->second, kLine);
      kept_ -= last->first;
      free_.erase(last);
    }
    if (kept_ + bytes <= limit) {
      try {
        free_.emplace(bytes, data);
        kept_ += bytes;
        return;
      } catch (const std::bad_alloc&) {
      }
    }
  }
  ::operator delete(data, kLine);
}

std::int64_t Memory::kept() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return kept_;
}

std::int64_t Memory::used() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return used_;
}

}  // namespace cvmk::engine
