// Loops on one thread, on OpenMP's, and on a pool of the caller's: every item once, none before what it waits for, threads within their number.
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "common/kernel.h"
#include "common/team.h"
#include "tests/check.h"

namespace {

using cvmk::Team;

// A pool as an engine could have one; it gives one thread less than it is asked for, as OpenMP may.
struct Pool {
  std::mutex mutex;
  std::condition_variable all_here;
  int width = 0, waiting = 0, round = 0;

  static void fork(void* self, int width, Team::Body body, void* context) {
    Pool& pool = *static_cast<Pool*>(self);
    const int given = width > 2 ? width - 1 : width;
    pool.width = given;
    std::vector<std::thread> threads;
    for (int thread = 1; thread < given; ++thread) threads.emplace_back(body, context, thread, given);
    body(context, 0, given);
    for (std::thread& thread : threads) thread.join();
  }
  static void barrier(void* self) {
    Pool& pool = *static_cast<Pool*>(self);
    std::unique_lock<std::mutex> lock(pool.mutex);
    const int mine = pool.round;
    if (++pool.waiting == pool.width) {
      pool.waiting = 0;
      ++pool.round;
      pool.all_here.notify_all();
    } else {
      pool.all_here.wait(lock, [&] { return pool.round != mine; });
    }
  }
  Team team(int size) { return {size, fork, barrier, this}; }
};

void check_each(const Team& team) {
  for (const std::int64_t count : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> done(static_cast<std::size_t>(count));
    std::atomic<bool> within{true};
    team.each(count, [&](std::int64_t i, int thread) {
      ++done[static_cast<std::size_t>(i)];
      if (thread < 0 || thread >= team.size || thread >= count) within = false;
    });
    bool once = true;
    for (const auto& times : done) once &= times == 1;
    CHECK(once && within);
  }
}

void check_share(const Team& team) {
  for (const std::int64_t count : {0, 1, 5, 100})
    for (const std::int64_t width : {1, 2, 100}) {
      std::vector<int> done(static_cast<std::size_t>(count));
      std::atomic<int> parts{0};
      team.share(width, count, [&](std::int64_t first, std::int64_t last, int) {
        ++parts;
        for (std::int64_t i = first; i < last; ++i) ++done[static_cast<std::size_t>(i)];
      });
      CHECK(done == std::vector<int>(static_cast<std::size_t>(count), 1));
      CHECK(parts >= 1 && parts <= width && parts <= team.size);
    }
}

void check_two_loops(const Team& team) {
  for (const std::int64_t first : {0, 1, 50})
    for (const std::int64_t second : {0, 3, 200}) {
      std::atomic<std::int64_t> before{0}, after{0};
      std::atomic<int> entered{0}, left{0};
      std::atomic<bool> ordered{true};
      team.two_loops(
          8, first, [&](std::int64_t) { ++before; }, second, [&] { ++entered; },
          [&](std::int64_t, int) {
            ++after;
            if (before != first) ordered = false;
          },
          [&] { ++left; });
      CHECK(before == first && after == second && ordered);
      CHECK(entered == left && entered >= 1 && entered <= team.size);
    }
}

// A result must not depend on the threads: each has memory of its own, found by its number.
void check_scratch(const Team& team) {
  const std::int64_t items = 64, size = 100;
  cvmk::Arena count;
  count.take<float>(1);
  CHECK(count.used == 64 && count.take<double>(9) == nullptr && count.used == 192);
  std::vector<std::int64_t> memory(static_cast<std::size_t>(team.size * size)), sums(static_cast<std::size_t>(items));
  team.each(items, [&](std::int64_t item, int thread) {
    std::int64_t* own = memory.data() + thread * size;
    for (std::int64_t i = 0; i < size; ++i) own[i] = item * i;
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < size; ++i) sum += own[i];
    sums[static_cast<std::size_t>(item)] = sum;
  });
  bool good = true;
  for (std::int64_t i = 0; i < items; ++i) good &= sums[static_cast<std::size_t>(i)] == i * size * (size - 1) / 2;
  CHECK(good);
}

}  // namespace

int main() {
  Pool pool;
  for (const Team& team : {Team{}, cvmk::openmp_team(), pool.team(2), pool.team(5)}) {
    check_each(team);
    check_share(team);
    check_two_loops(team);
    check_scratch(team);
  }
  std::vector<std::int64_t> order;
  Team{}.each(5, [&](std::int64_t i, int) { order.push_back(i); });
  CHECK((order == std::vector<std::int64_t>{0, 1, 2, 3, 4}));
  // Within a loop of OpenMP there is no other: its items run on the thread that they are called on.
  const Team outer = cvmk::openmp_team();
  std::atomic<int> most{0};
  outer.each(4, [&](std::int64_t, int) {
    const int size = cvmk::openmp_team().size;
    if (outer.size > 1 && size > most) most = size;
  });
  CHECK(most <= 1);
  return cvmk::testing::check_result();
}
