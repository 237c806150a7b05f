#include "common/scratch.h"

#include <new>

namespace cvmk {
namespace {

constexpr std::size_t kLeast = std::size_t{64} << 10;
constexpr std::size_t kMost = std::size_t{1} << 20;  // of a thread's own block
constexpr std::align_val_t kAlignment{4096};

// The block of the calling thread; `busy` while a Scratch of it lives.
struct Own {
  Block block;
  bool busy = false;

  ~Own() { drop(); }
  void drop() noexcept {
    if (block.data == nullptr) return;
    ::operator delete(block.data, kAlignment);
    let_go(block.bytes);
    block = {};
  }
  // Makes the block hold so many bytes; false where no more may be kept.
  bool grow(std::size_t bytes) {
    std::size_t size = kLeast;
    while (size < bytes) size *= 2;
    drop();
    if (!hold(size)) return false;
    void* const data = ::operator new(size, kAlignment, std::nothrow);
    if (data == nullptr) {
      let_go(size);
      throw std::bad_alloc();
    }
    block = {data, size};
    return true;
  }
};

thread_local Own own;

}  // namespace

Scratch::Scratch(std::int64_t bytes) {
  if (bytes <= 0) return;
  const auto wanted = static_cast<std::size_t>(bytes);
  if (wanted <= kMost) {
    Own& mine = own;
    if (!mine.busy && (mine.block.bytes >= wanted || mine.grow(wanted))) {
      mine.busy = true;
      block_ = mine.block;
      from_ = From::kThread;
      return;
    }
  }
  block_ = take_block(wanted);
  from_ = From::kBlocks;
}

Scratch::~Scratch() {
  if (from_ == From::kThread) own.busy = false;
  else if (from_ == From::kBlocks) give_block(block_);
}

}  // namespace cvmk
