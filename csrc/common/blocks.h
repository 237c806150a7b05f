// Large blocks of memory that are used again: fresh pages cost as much as a kernel that writes them once.
#pragma once

#include <cstddef>

namespace cvmk {

// A block of `bytes` or more on pages of 2 MiB where the system has them, uninitialised. Null data: no block.
struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// From the blocks that are kept, or new. Throws std::bad_alloc.
Block take_block(std::size_t bytes);

// Gives it back, from any thread. Of blocks given back up to `kept_limit()` bytes are kept; all but the youngest 32 MiB the system may take
// whenever it wants their pages (MADV_FREE), so that they are in nobody's way.
void give_block(Block block) noexcept;

// The environment variable CVMK_KEPT_MIB in bytes, 512 MiB without it; 0 keeps nothing. Read at the first call.
std::size_t kept_limit() noexcept;

// Of all the blocks that are kept, and of what is held beside them.
std::size_t kept_bytes() noexcept;

// Bytes that are kept elsewhere under the same limit (common/scratch.h). False where that would be too many; else `let_go` must follow.
bool hold(std::size_t bytes) noexcept;
void let_go(std::size_t bytes) noexcept;

}  // namespace cvmk
