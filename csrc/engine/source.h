// A source that grows, for the requests of one session, one after the other: a causal encoder keeps what it has encoded of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/memory.h"
#include "engine/model.h"

namespace cvmk::engine {

class GrowingSource {
 public:
  // Room for `longest` positions, the end sign included. Throws std::bad_alloc. The model and the memory outlive it.
  GrowingSource(const Model& model, Memory& memory, std::int64_t longest);
  GrowingSource(const GrowingSource&) = delete;
  GrowingSource& operator=(const GrowingSource&) = delete;

  static std::int64_t bytes(const Model& model, std::int64_t longest);
  std::int64_t longest() const { return longest_; }
  // How many positions of the last source had been encoded before.
  std::int64_t kept() const { return kept_; }

  // The source is now `ids`, with the end sign: what `encode` has to do for it. The ids must stay until the next call.
  Model::Source update(const std::vector<std::int32_t>& ids);
  const Caches& encoded() const { return cross_; }

  // Nothing of it counts as encoded.
  void forget() { ids_.clear(); }

  // For one request at a time, given back with the last copy; null where another one has it.
  static std::shared_ptr<GrowingSource> lease(const std::shared_ptr<GrowingSource>& source);

 private:
  const Model& model_;
  const std::int64_t longest_;
  Held block_;
  Caches encoder_, cross_;
  std::vector<std::int32_t> ids_;
  std::int64_t kept_ = 0;
  std::atomic<bool> busy_{false};
};

}  // namespace cvmk::engine
