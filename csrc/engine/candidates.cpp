#include "engine/candidates.h"

#include "common/sizes.h"
#include "engine/weights.h"

namespace cvmk::engine {
namespace {

constexpr std::int32_t kEnd = 3;

}  // namespace

Candidates::Candidates(const std::int32_t* starts, const std::int32_t* targets, std::int64_t target_count, const std::int32_t* frequent, std::int64_t frequent_count,
                       std::int64_t vocabulary)
    : starts_(starts), targets_(targets), frequent_(frequent), frequent_count_(frequent_count), vocabulary_(vocabulary) {
  bool sound = starts[0] == 0 && starts[vocabulary] == target_count;
  for (std::int64_t s = 0; s < vocabulary; ++s) sound = sound && starts[s] <= starts[s + 1];
  const auto known = [&](std::int32_t id) { return id >= kEnd && id < vocabulary; };
  for (std::int64_t i = 0; sound && i < target_count; ++i) sound = known(targets[i]);
  for (std::int64_t i = 0; sound && i < frequent_count; ++i) sound = known(frequent[i]);
  if (!sound) throw BadModel("the shortlist belongs to another vocabulary: make it again");
}

std::vector<std::int32_t> Candidates::of(const std::vector<std::int32_t>& source, const std::vector<std::int32_t>& prefix) const {
  std::vector<std::uint64_t> there(static_cast<std::size_t>(pieces(vocabulary_, 64)));
  const auto add = [&](std::int32_t id) {
    if (id >= 0 && id < vocabulary_) there[static_cast<std::size_t>(id) / 64] |= std::uint64_t{1} << (id % 64);
  };
  add(kEnd);
  for (std::int64_t i = 0; i < frequent_count_; ++i) add(frequent_[i]);
  for (const std::int32_t id : prefix) add(id);
  for (const std::int32_t s : source)
    if (s >= 0 && s < vocabulary_)
      for (std::int32_t i = starts_[s]; i < starts_[s + 1]; ++i) add(targets_[i]);
  std::vector<std::int32_t> found;
  for (std::size_t word = 0; word < there.size(); ++word)
    for (std::uint64_t bits = there[word]; bits != 0; bits &= bits - 1) found.push_back(static_cast<std::int32_t>(word * 64) + __builtin_ctzll(bits));
  return found;
}

}  // namespace cvmk::engine
