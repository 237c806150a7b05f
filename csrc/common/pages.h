// Pages of 2 MiB: a hint to the system that costs nothing where it is not obeyed.
#pragma once

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cvmk {

constexpr int64_t kLargePage = int64_t{2} << 20;

// Asks for large pages behind memory that nobody has written yet: fewer page faults. Only whole pages within it are marked, and nothing below
// 32 MiB: what is smaller may lie in the heap, whose pages are not ours to mark.
inline void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < (int64_t{32} << 20)) return;
  constexpr uintptr_t kPage = static_cast<uintptr_t>(kLargePage);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (last > first) static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#endif
}

}  // namespace cvmk
