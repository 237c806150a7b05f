#include "sketch/sketch.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace cvmk::sketch {
namespace {

constexpr std::size_t kBlock = 64;  // ids hashed at a time, ahead of the table look-ups
constexpr std::uint64_t kFirstSlots = 16;
constexpr std::uint64_t kIndexBits = 0xffffffffu;
constexpr std::uint64_t kFreed = ~std::uint64_t{0};  // the count of an entry that is on the free list

// The part of the hash kept in a slot: its low 32 bits, which hold the place where the search begins. (Retained hashes are small
// numbers in hash mode, so the highest bits would say nothing.)
std::uint64_t tag_of(std::uint64_t hash) { return hash << 32; }

void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

}  // namespace

Sketch::Sketch(std::uint64_t capacity, Priority priority, std::uint64_t seed) : capacity_(capacity), mode_(priority), keys_(seed) {
  if (capacity == 0 || capacity > kMaxCapacity) throw std::invalid_argument("the capacity of a sketch must be from 1 to 2^31");
  clear();
}

void Sketch::clear() {
  entries_.clear();
  items_.clear();
  free_.clear();
  slots_.assign(kFirstSlots, 0);
  mask_ = kFirstSlots - 1;
  size_ = 0;
  candidates_.clear();
  has_floor_ = false;
}

void Sketch::add(const std::uint64_t* ids, std::size_t n) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::uint64_t hashes[kBlock];
  for (std::size_t begin = 0; begin < n; begin += kBlock) {
    const std::size_t block = std::min(kBlock, n - begin);
    const std::uint64_t* block_ids = ids + begin;
    for (std::size_t i = 0; i < block; ++i) hashes[i] = hash_id(keys_, block_ids[i]);
    if (mode_ == Priority::kHash) {
      for (std::size_t i = 0; i < block; ++i) {
        if (hashes[i] <= limit_) step_hash(block_ids[i], hashes[i]);
      }
    } else {
      for (std::size_t i = 0; i < block; ++i) prefetch(&slots_[hashes[i] & mask_]);
      for (std::size_t i = 0; i < block; ++i) step_random(block_ids[i], hashes[i], draw_at(keys_, seen_ + i));
    }
    seen_ += block;
  }
}

void Sketch::add_items(const Bytes* items, std::size_t n) {
  const std::lock_guard<std::mutex> lock(mutex_);
  holds_bytes_ = holds_bytes_ || n > 0;
  for (std::size_t i = 0; i < n; ++i) step_bytes(items[i]);
}

void Sketch::add_packed(const unsigned char* data, const std::int64_t* offsets, std::size_t n) {
  const std::lock_guard<std::mutex> lock(mutex_);
  holds_bytes_ = holds_bytes_ || n > 0;
  for (std::size_t i = 0; i < n; ++i) step_bytes({data + offsets[i], static_cast<std::size_t>(offsets[i + 1] - offsets[i])});
}

void Sketch::step_bytes(Bytes item) {
  const std::uint64_t id = fingerprint(keys_, item.data, item.size);
  const std::uint64_t hash = hash_id(keys_, id);
  std::uint32_t index = kNone;
  if (mode_ == Priority::kRandom) {
    index = step_random(id, hash, draw_at(keys_, seen_));
  } else if (hash <= limit_) {
    index = step_hash(id, hash);
  }
  ++seen_;
  if (index == kNone) return;
  if (items_.size() < entries_.size()) items_.resize(entries_.size());
  items_[index].assign(reinterpret_cast<const char*>(item.data), item.size);
}

// Algorithm D, steps D3 to D5. A draw for an element already in the buffer moves it: it is taken out, so the buffer has room.
// Returns the index of a new entry, or kNone.
std::uint32_t Sketch::step_random(std::uint64_t id, std::uint64_t hash, std::uint64_t draw) {
  const std::uint32_t index = find(id, hash);
  if (index != kNone) {
    if (draw > limit_) {
      remove(index, hash);
    } else {
      entries_[index].priority = draw;
      note(draw, id);
    }
    return kNone;
  }
  return draw > limit_ ? kNone : admit({id, draw, 0}, hash);
}

std::uint32_t Sketch::step_hash(std::uint64_t id, std::uint64_t hash) {
  const std::uint32_t index = find(id, hash);
  if (index == kNone) return admit({id, hash, 1}, hash);
  ++entries_[index].count;
  return kNone;
}

// Put in an element that is not there and whose priority is below the threshold; into a full buffer only in place of the largest.
std::uint32_t Sketch::admit(const Entry& entry, std::uint64_t hash) {
  if (size_ < capacity_) return insert(entry, hash);
  const std::uint32_t last = largest();
  const Entry out = entries_[last];
  if (entry.priority > out.priority) {
    limit_ = entry.priority - 1;
    return kNone;
  }
  limit_ = out.priority == 0 ? 0 : out.priority - 1;
  remove(last, hash_of(out));
  return insert(entry, hash);
}

std::uint64_t Sketch::hash_of(const Entry& entry) const { return mode_ == Priority::kHash ? entry.priority : hash_id(keys_, entry.id); }

std::uint32_t Sketch::find(std::uint64_t id, std::uint64_t hash) const {
  const std::uint64_t tag = tag_of(hash);
  for (std::uint64_t slot = hash & mask_;; slot = (slot + 1) & mask_) {
    const std::uint64_t value = slots_[slot];
    if (value == 0) return kNone;
    if ((value & ~kIndexBits) != tag) continue;
    const auto index = static_cast<std::uint32_t>((value & kIndexBits) - 1);
    if (entries_[index].id == id) return index;
  }
}

std::uint32_t Sketch::insert(const Entry& entry, std::uint64_t hash) {
  if (2 * (size_ + 1) > slots_.size()) grow();
  std::uint32_t index;
  if (free_.empty()) {
    index = static_cast<std::uint32_t>(entries_.size());
    entries_.push_back(entry);
  } else {
    index = free_.back();
    free_.pop_back();
    entries_[index] = entry;
  }
  place(tag_of(hash) | (std::uint64_t{index} + 1));
  ++size_;
  note(entry.priority, entry.id);
  return index;
}

void Sketch::place(std::uint64_t value) {
  std::uint64_t slot = (value >> 32) & mask_;
  while (slots_[slot] != 0) slot = (slot + 1) & mask_;
  slots_[slot] = value;
}

void Sketch::grow() {
  std::vector<std::uint64_t> old(2 * slots_.size(), 0);
  old.swap(slots_);
  mask_ = slots_.size() - 1;
  for (const std::uint64_t value : old) {
    if (value != 0) place(value);
  }
}

void Sketch::remove(std::uint32_t index, std::uint64_t hash) {
  std::uint64_t slot = hash & mask_;
  while ((slots_[slot] & kIndexBits) != std::uint64_t{index} + 1) slot = (slot + 1) & mask_;
  forget(slot);
  entries_[index].count = kFreed;
  free_.push_back(index);
  --size_;
}

// Empty a slot and move later ones of the run back, so that no search ends early.
void Sketch::forget(std::uint64_t slot) {
  std::uint64_t hole = slot;
  for (std::uint64_t next = (hole + 1) & mask_; slots_[next] != 0; next = (next + 1) & mask_) {
    const std::uint64_t home = (slots_[next] >> 32) & mask_;
    if (((next - home) & mask_) >= ((next - hole) & mask_)) {
      slots_[hole] = slots_[next];
      hole = next;
    }
  }
  slots_[hole] = 0;
}

void Sketch::note(std::uint64_t priority, std::uint64_t id) {
  if (!has_floor_ || priority < floor_) return;
  if (candidates_.size() > size_ + 64) {  // mostly stale: find them again when one is needed
    candidates_.clear();
    has_floor_ = false;
    return;
  }
  candidates_.push_back({priority, id});
  std::push_heap(candidates_.begin(), candidates_.end());
}

// The index of the entry with the largest (priority, id); the buffer is not empty.
std::uint32_t Sketch::largest() {
  for (;;) {
    if (candidates_.empty()) collect_candidates();
    const Candidate top = candidates_.front();
    const std::uint32_t index = find(top.id, mode_ == Priority::kHash ? top.priority : hash_id(keys_, top.id));
    if (index != kNone && entries_[index].priority == top.priority) return index;
    std::pop_heap(candidates_.begin(), candidates_.end());
    candidates_.pop_back();
  }
}

// Take the entries in the highest eighth of [0, limit] as candidates; all of them where none is there.
void Sketch::collect_candidates() {
  has_floor_ = true;
  for (floor_ = limit_ - limit_ / 8;; floor_ = 0) {
    for (const Entry& entry : entries_) {
      if (entry.priority >= floor_ && entry.count != kFreed) candidates_.push_back({entry.priority, entry.id});
    }
    if (!candidates_.empty()) break;
  }
  std::make_heap(candidates_.begin(), candidates_.end());
}

void Sketch::merge(const State& other) {
  const std::lock_guard<std::mutex> lock(mutex_);
  limit_ = std::min(limit_, other.limit);
  for (std::uint32_t index = 0; index < entries_.size(); ++index) {
    const Entry& entry = entries_[index];
    if (entry.count != kFreed && entry.priority > limit_) remove(index, entry.priority);
  }
  for (std::size_t i = 0; i < other.ids.size(); ++i) {
    const std::uint64_t hash = other.priorities[i];
    if (hash > limit_) continue;
    std::uint32_t index = find(other.ids[i], hash);
    if (index != kNone) {
      entries_[index].count += other.counts[i];
      continue;
    }
    index = admit({other.ids[i], hash, other.counts[i]}, hash);
    if (index == kNone || !other.holds_bytes) continue;
    if (items_.size() < entries_.size()) items_.resize(entries_.size());
    items_[index] = other.items[i];
  }
  seen_ += other.seen;
  holds_bytes_ = holds_bytes_ || other.holds_bytes;
}

std::size_t Sketch::size() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return size_;
}

std::uint64_t Sketch::seen() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return seen_;
}

std::uint64_t Sketch::limit() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return limit_;
}

State Sketch::state() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::uint32_t> order;
  order.reserve(size_);
  for (std::uint32_t index = 0; index < entries_.size(); ++index) {
    if (entries_[index].count != kFreed) order.push_back(index);
  }
  std::sort(order.begin(), order.end(), [this](std::uint32_t a, std::uint32_t b) {
    return std::make_pair(entries_[a].priority, entries_[a].id) < std::make_pair(entries_[b].priority, entries_[b].id);
  });
  State state;
  state.seen = seen_;
  state.limit = limit_;
  state.holds_bytes = holds_bytes_;
  for (const std::uint32_t index : order) {
    state.ids.push_back(entries_[index].id);
    state.priorities.push_back(entries_[index].priority);
    state.counts.push_back(entries_[index].count);
    if (holds_bytes_) state.items.push_back(items_[index]);
  }
  return state;
}

void Sketch::restore(const State& state) {
  const std::size_t n = state.ids.size();
  const bool equal_lengths = state.priorities.size() == n && state.counts.size() == n && state.items.size() == (state.holds_bytes ? n : 0);
  if (!equal_lengths || n > capacity_) throw std::invalid_argument("the state holds arrays of different lengths or more items than the capacity");
  for (std::size_t i = 0; i < n; ++i) {
    if (state.counts[i] > std::min(state.seen, kFreed - 1)) throw std::invalid_argument("the state counts more occurrences of an item than came");
    const bool hash_differs = mode_ == Priority::kHash && state.priorities[i] != hash_id(keys_, state.ids[i]);
    if (state.priorities[i] > state.limit || hash_differs) throw std::invalid_argument("the state holds a priority that this seed and threshold cannot give");
  }
  std::vector<std::uint64_t> sorted = state.ids;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) throw std::invalid_argument("the state holds an id twice");
  const std::lock_guard<std::mutex> lock(mutex_);
  clear();
  seen_ = state.seen;
  limit_ = state.limit;
  holds_bytes_ = state.holds_bytes;
  for (std::size_t i = 0; i < n; ++i) {
    insert({state.ids[i], state.priorities[i], state.counts[i]}, hash_id(keys_, state.ids[i]));
  }
  items_ = state.items;
}

}  // namespace cvmk::sketch
