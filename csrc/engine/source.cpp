#include "engine/source.h"

#include <algorithm>

namespace cvmk::engine {

std::int64_t GrowingSource::bytes(const Model& model, std::int64_t longest) {
  const std::int64_t capacity = Model::capacity_of(longest);
  return model.cross_bytes(capacity) + (model.config().causal_encoder ? model.encoder_bytes(capacity) : 0);
}

GrowingSource::GrowingSource(const Model& model, Memory& memory, std::int64_t longest)
    : model_(model), longest_(longest), block_(memory, bytes(model, longest)) {
  const std::int64_t capacity = Model::capacity_of(longest);
  cross_ = model.cross_caches(block_.data(), capacity);
  if (model.config().causal_encoder) encoder_ = model.encoder_caches(block_.data() + model.cross_bytes(capacity), capacity);
}

std::shared_ptr<GrowingSource> GrowingSource::lease(const std::shared_ptr<GrowingSource>& source) {
  if (source->busy_.exchange(true)) return nullptr;
  return {source.get(), [source](GrowingSource* leased) { leased->busy_ = false; }};
}

Model::Source GrowingSource::update(const std::vector<std::int32_t>& ids) {
  std::size_t same = 0;
  while (same < ids.size() && same < ids_.size() && ids[same] == ids_[same]) ++same;
  const bool causal = model_.config().causal_encoder, all = same == ids.size() && same == ids_.size();
  kept_ = static_cast<std::int64_t>(same);
  // What a bidirectional encoder says of a position depends on all that follow; the same source is the same for any.
  if (!causal && !all) kept_ = 0;
  // A state stands at few positions: behind whole spans, and before the last position of what was encoded. The new last position is to be passed again.
  if (causal && !all && model_.encoder_has_states()) {
    const std::int64_t reached = std::min(kept_, static_cast<std::int64_t>(ids.size()) - 1), last = static_cast<std::int64_t>(ids_.size()) - 1;
    kept_ = std::max<std::int64_t>(reached / Model::kSpan * Model::kSpan, last <= reached ? last : 0);
  }
  ids_ = ids;
  return {ids_.data(), static_cast<std::int64_t>(ids_.size()), &cross_, causal ? &encoder_ : nullptr, kept_};
}

}  // namespace cvmk::engine
