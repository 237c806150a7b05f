#include "engine/pool.h"

#include <unistd.h>

#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cvmk::engine {
namespace {

constexpr int kSpins = 4000;  // some 50 microseconds
constexpr unsigned long long kPart = 0xFFFFull;

inline int next_of(unsigned long long claim) { return static_cast<int>(claim & kPart); }
inline int parts_in(unsigned long long claim) { return static_cast<int>(claim >> 16 & kPart); }

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

Pool::Pool(int threads) : threads_(threads), bed_(new Bed) {}

Pool::~Pool() {
  if (!workers_.empty() && getpid() != process_) {  // a copy by fork, which has no threads but its caller's
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(bed_->mutex);
    stopping_ = true;
  }
  bed_->wake.notify_all();
  for (std::thread& worker : workers_) worker.join();
  delete bed_;
}

void Pool::run(int parts, Team::Body body, void* context) {
  if (parts <= 1 || threads_ <= 1) {
    for (int part = 0; part < parts; ++part) body(context, part, parts);
    return;
  }
  if (workers_.empty()) {
    process_ = getpid();
    try {
      for (int i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error&) {
      threads_ = static_cast<int>(workers_.size()) + 1;
    }
  }
  const unsigned long long number = ((claims_.load(std::memory_order_relaxed) >> 32) + 1) & 0xFFFFFFFFull;
  body_.store(body, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  left_.store(parts, std::memory_order_relaxed);
  claims_.store(number << 32 | static_cast<unsigned long long>(parts) << 16, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) {
    const std::lock_guard<std::mutex> lock(bed_->mutex);
    bed_->wake.notify_all();
  }
  parts_of(number);
  for (int spins = 0; left_.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpins) pause();
    else std::this_thread::yield();
  }
}

// Parts of the call of this number, as long as there are any that nobody has taken.
void Pool::parts_of(unsigned long long number) {
  for (;;) {
    unsigned long long claim = claims_.load(std::memory_order_acquire);
    const Team::Body body = body_.load(std::memory_order_relaxed);
    void* const context = context_.load(std::memory_order_relaxed);
    if (claim >> 32 != number || next_of(claim) >= parts_in(claim)) return;
    // Where the claim succeeds, what was read belongs to this call: it cannot end before the part that is claimed here is done.
    if (!claims_.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel)) continue;
    body(context, next_of(claim), parts_in(claim));
    left_.fetch_sub(1, std::memory_order_release);
  }
}

void Pool::work(int) {
  unsigned long long seen = 0;
  for (;;) {
    int spins = 0;
    while (claims_.load(std::memory_order_acquire) >> 32 == seen && !stopping_.load(std::memory_order_relaxed)) {
      if (++spins < kSpins) {
        pause();
        continue;
      }
      std::unique_lock<std::mutex> lock(bed_->mutex);
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      bed_->wake.wait(lock, [&] { return claims_.load(std::memory_order_seq_cst) >> 32 != seen || stopping_.load(); });
      sleeping_.fetch_sub(1, std::memory_order_relaxed);
      break;
    }
    if (stopping_.load()) return;
    seen = claims_.load(std::memory_order_acquire) >> 32;
    parts_of(seen);
  }
}

Team Pool::team() {
  Team team;
  team.size = size();
  team.fork = [](void* pool, int width, Team::Body body, void* context) { static_cast<Pool*>(pool)->run(width, body, context); };
  team.barrier = nullptr;
  team.pool = this;
  return team;
}

}  // namespace cvmk::engine
