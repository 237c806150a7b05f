// A model's lexical shortlist: the pieces that each piece of a source may become (cvmk/inference/shortlist.py says how it is learnt).
#pragma once

#include <cstdint>
#include <vector>

namespace cvmk::engine {

class Candidates {
 public:
  // Targets of source id s: targets[starts[s]] up to targets[starts[s + 1]], and `frequent` for all. The arrays must outlive this. Raises BadModel where they are
  // none of so many ids.
  Candidates(const std::int32_t* starts, const std::int32_t* targets, std::int64_t target_count, const std::int32_t* frequent, std::int64_t frequent_count,
             std::int64_t vocabulary);

  // The ids that a translation of `source` may say, rising, with the end and those of the prefix; all of them are ids of the vocabulary.
  std::vector<std::int32_t> of(const std::vector<std::int32_t>& source, const std::vector<std::int32_t>& prefix) const;

 private:
  const std::int32_t *starts_, *targets_, *frequent_;
  std::int64_t frequent_count_, vocabulary_;
};

}  // namespace cvmk::engine
