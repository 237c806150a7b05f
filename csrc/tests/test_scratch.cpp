// Scratch memory: apart where it is held at once, the same again afterwards, and never more kept than CVMK_KEPT_MIB (the environment sets it to 0
// in one of the runs).
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "common/blocks.h"
#include "common/scratch.h"
#include "tests/check.h"

namespace {

using cvmk::Scratch;

constexpr std::int64_t kMib = std::int64_t{1} << 20;

bool on_a_line(const char* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; }

void check_sizes() {
  for (const std::int64_t bytes : {std::int64_t{1}, std::int64_t{64}, std::int64_t{65536}, std::int64_t{65537}, kMib, kMib + 1, 5 * kMib}) {
    const Scratch scratch(bytes);
    CHECK(scratch.data() != nullptr && on_a_line(scratch.data()));
    std::memset(scratch.data(), 7, static_cast<std::size_t>(bytes));
  }
  CHECK(Scratch(0).data() == nullptr);
}

void check_apart() {
  const Scratch outer(1000);
  std::memset(outer.data(), 1, 1000);
  {
    const Scratch inner(1000), third(100);  // the thread's own block is taken
    std::memset(inner.data(), 2, 1000);
    std::memset(third.data(), 3, 100);
    CHECK(inner.data() != outer.data() && inner.data() != third.data());
  }
  bool whole = true;
  for (int i = 0; i < 1000; ++i) whole &= outer.data()[i] == 1;
  CHECK(whole);
}

void check_kept() {
  const bool keeps = cvmk::kept_limit() > 0;
  char* const small = Scratch(3000).data();
  const std::size_t before = cvmk::kept_bytes();
  CHECK(keeps == (before > 0));
  if (keeps) CHECK(Scratch(2000).data() == small && cvmk::kept_bytes() == before);
  std::size_t within = 0;
  std::thread([&] {
    { const Scratch scratch(3000); }
    within = cvmk::kept_bytes();
  }).join();
  CHECK(within <= cvmk::kept_limit());
  CHECK(cvmk::kept_bytes() == before);  // what the thread kept went with it
  if (keeps) CHECK(within == before + (std::size_t{64} << 10));
  { const Scratch large(5 * kMib); }
  CHECK(cvmk::kept_bytes() <= cvmk::kept_limit());
  if (keeps) CHECK(cvmk::kept_bytes() >= static_cast<std::size_t>(5 * kMib));
}

void check_threads() {
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (std::size_t number = 0; number < 4; ++number)
    threads.emplace_back([&wrong, number] {
      for (int i = 0; i < 200; ++i) {
        const std::int64_t bytes = (i % 5 == 0 ? 2 * kMib : 1000) + i;
        const Scratch scratch(bytes);
        std::memset(scratch.data(), static_cast<int>(number) + 1, static_cast<std::size_t>(bytes));
        if (scratch.data()[bytes - 1] != static_cast<char>(number + 1) || scratch.data()[0] != static_cast<char>(number + 1)) ++wrong[number];
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4));
}

struct Numbers {
  std::int64_t count;
  std::int64_t* sum;
};
std::int64_t bytes_of(const Numbers& p, const cvmk::Team&) { return p.count * 8; }
void add_up(const Numbers& p, char* scratch, const cvmk::Team& team) {
  auto* const numbers = reinterpret_cast<std::int64_t*>(scratch);
  team.each(p.count, [&](std::int64_t i, int) { numbers[i] = i; });
  *p.sum = 0;
  for (std::int64_t i = 0; i < p.count; ++i) *p.sum += numbers[i];
}

void check_run() {
  std::int64_t sum = 0;
  const cvmk::Kernel<Numbers> kernel = {bytes_of, add_up};
  for (const cvmk::Team& team : {cvmk::Team{}, cvmk::openmp_team()}) {
    cvmk::run(kernel, Numbers{1000, &sum}, team);
    CHECK(sum == 499500);
  }
  bool thrown = false;
  try {
    cvmk::run(kernel, Numbers{std::int64_t{1} << 57, &sum}, cvmk::Team{});
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  CHECK(thrown);
}

}  // namespace

int main() {
  check_sizes();
  check_apart();
  check_kept();
  check_threads();
  check_run();
  return cvmk::testing::check_result();
}
