#include "common/blocks.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "common/pages.h"

namespace cvmk {
namespace {

constexpr std::size_t kPage = kLargePage;
constexpr std::size_t kMost = 16;                       // blocks that are kept
constexpr std::size_t kOurs = std::size_t{32} << 20;    // bytes of the youngest ones that are not offered to the system

#if defined(__linux__)
// The mapping is larger by a page than the block, for the system aligns to small pages only; what is over is unmapped at once.
void* map(std::size_t bytes) {
  void* const whole = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(whole);
  const std::size_t skip = (kPage - reinterpret_cast<std::size_t>(begin) % kPage) % kPage;
  if (skip > 0) munmap(begin, skip);
  munmap(begin + skip + bytes, kPage - skip);
  static_cast<void>(madvise(begin + skip, bytes, MADV_HUGEPAGE));
  return begin + skip;
}

void unmap(Block block) noexcept { munmap(block.data, block.bytes); }

// Says whether the system may now take the pages.
bool offer(Block block) noexcept { return madvise(block.data, block.bytes, MADV_FREE) == 0; }
#else
void* map(std::size_t bytes) { return ::operator new(bytes, std::align_val_t{kPage}); }
void unmap(Block block) noexcept { ::operator delete(block.data, std::align_val_t{kPage}); }
bool offer(Block) noexcept { return false; }
#endif

// Never destroyed: blocks come back after the library's other static objects are gone.
struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;  // the oldest first
  std::size_t bytes = 0, offered = 0;  // of all; and how many blocks, of the oldest ones, the system may take

  Kept() { blocks.reserve(kMost + 1); }
  Block remove(std::size_t i) {
    const Block block = blocks[i];
    blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(i));
    bytes -= block.bytes;
    offered -= i < offered;
    return block;
  }
  // Offers the oldest blocks beyond kOurs bytes. To offer a small one costs more time than its fresh pages, for all threads are told.
  void offer_old() {
    std::size_t ours = 0, first = blocks.size();
    while (first > offered && ours + blocks[first - 1].bytes <= kOurs) ours += blocks[--first].bytes;
    while (offered < first) {
      if (offer(blocks[offered])) {
        ++offered;
      } else {
        unmap(remove(offered));
        --first;
      }
    }
  }
};

Kept& kept() {
  static Kept& all = *new Kept;
  return all;
}

// The lock is held for a fraction of a microsecond and only ever tried, so that a process forked while another thread held it goes on without
// kept blocks.
class Lock {
 public:
  explicit Lock(std::mutex& mutex) : lock_(mutex, std::try_to_lock) {
    for (int i = 0; i < 64 && !lock_.owns_lock(); ++i) static_cast<void>(lock_.try_lock());
  }
  explicit operator bool() const { return lock_.owns_lock(); }

 private:
  std::unique_lock<std::mutex> lock_;
};

std::atomic<std::size_t> held{0};

}  // namespace

std::size_t kept_limit() noexcept {
  static const std::size_t limit = [] {
    const char* const text = std::getenv("CVMK_KEPT_MIB");
    return (text == nullptr || *text == 0 ? std::size_t{512} : static_cast<std::size_t>(std::strtoull(text, nullptr, 10))) << 20;
  }();
  return limit;
}

std::size_t kept_bytes() noexcept {
  Kept& all = kept();
  const Lock lock(all.mutex);
  return held + (lock ? all.bytes : 0);
}

bool hold(std::size_t bytes) noexcept {
  if (held.fetch_add(bytes) + bytes <= kept_limit()) return true;
  held -= bytes;
  return false;
}

void let_go(std::size_t bytes) noexcept { held -= bytes; }

Block take_block(std::size_t bytes) {
  const std::size_t whole = (bytes + kPage - 1) / kPage * kPage;
  Kept& all = kept();
  if (const Lock lock(all.mutex); lock) {
    // The smallest one that fits, unless it is more than twice as large; of equal ones the last to come back.
    std::size_t best = all.blocks.size();
    for (std::size_t i = 0; i < all.blocks.size(); ++i) {
      const std::size_t size = all.blocks[i].bytes;
      if (size >= whole && size / 2 <= whole && (best == all.blocks.size() || size <= all.blocks[best].bytes)) best = i;
    }
    if (best < all.blocks.size()) return all.remove(best);
  }
  return {map(whole), whole};
}

void give_block(Block block) noexcept {
  if (block.data == nullptr) return;
  if (block.bytes > kept_limit()) return unmap(block);
  Kept& all = kept();
  Block gone[kMost + 1];
  std::size_t count = 0;
  {
    const Lock lock(all.mutex);
    if (!lock) return unmap(block);
    all.blocks.push_back(block);
    all.bytes += block.bytes;
    while (!all.blocks.empty() && (all.bytes + held > kept_limit() || all.blocks.size() > kMost)) gone[count++] = all.remove(0);
    all.offer_old();
  }
  for (std::size_t i = 0; i < count; ++i) unmap(gone[i]);
}

}  // namespace cvmk
