// Scratch memory of a call, and a kernel's run in it.
#pragma once

#include <cstdint>

#include "common/blocks.h"
#include "common/kernel.h"

namespace cvmk {

// `bytes` of uninitialised memory that begin on a cache line, from blocks that are used again (common/blocks.h): fresh pages cost more than a
// small kernel. Up to 1 MiB comes from a block that the calling thread keeps for itself, so that a call of a microsecond takes no lock; what
// threads keep counts against CVMK_KEPT_MIB as blocks do. Throws std::bad_alloc. Belongs to the thread that made it.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const noexcept { return static_cast<char*>(block_.data); }

 private:
  Block block_;
  enum class From { kNowhere, kThread, kBlocks } from_ = From::kNowhere;
};

// For a caller without memory of its own.
template <typename Params>
void run(const Kernel<Params>& kernel, const Params& p, const Team& team) {
  const Scratch scratch(kernel.scratch_bytes(p, team));
  kernel.run(p, scratch.data(), team);
}

}  // namespace cvmk
