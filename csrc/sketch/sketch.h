// A sample of the distinct elements of a stream, and an estimate of how many there are.
//
// Random priorities: Knuth's Algorithm D ("The CVM Algorithm for Estimating Distinct Elements in Streams", 2023).
// Hash priorities: bottom-k by a salted hash (KMV, theta sketch), by the same steps with u = hash(a).
// An element is in the buffer only if its priority u is below the threshold p; the estimate is size / p, with E = F0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "sketch/hash.h"

namespace cvmk::sketch {

constexpr std::uint64_t kMaxCapacity = std::uint64_t{1} << 31;

enum class Priority { kRandom, kHash };

// All that a sketch knows, in canonical order (by priority, then id): equal streams give equal states.
struct State {
  std::uint64_t seen = 0;                    // occurrences so far; the position of the next random draw
  std::uint64_t limit = ~std::uint64_t{0};   // the largest priority still admitted: p = (limit + 1) / 2^64
  bool holds_bytes = false;                  // fed by byte strings; ids are then their fingerprints
  std::vector<std::uint64_t> ids, priorities, counts;
  std::vector<std::string> items;            // the byte strings, empty unless holds_bytes
};

struct Bytes {
  const unsigned char* data;
  std::size_t size;
};

// Every public function takes the lock of the sketch, so that several threads may feed one.
class Sketch {
 public:
  Sketch(std::uint64_t capacity, Priority priority, std::uint64_t seed);

  void add(const std::uint64_t* ids, std::size_t n);

  void add_items(const Bytes* items, std::size_t n);

  // n byte strings in one buffer: item i is data[offsets[i], offsets[i + 1]). The caller has checked the offsets.
  void add_packed(const unsigned char* data, const std::int64_t* offsets, std::size_t n);

  // The sketch becomes that of both streams. Hash priorities only, same seed, other.capacity >= capacity: checked by the caller.
  void merge(const State& other);

  std::uint64_t capacity() const { return capacity_; }
  std::size_t size() const;
  std::uint64_t seen() const;
  std::uint64_t limit() const;

  State state() const;
  // Throws std::invalid_argument where the state cannot be one of this sketch.
  void restore(const State& state);

 private:
  struct Entry {
    std::uint64_t id, priority, count;
  };
  struct Candidate {
    std::uint64_t priority, id;
    bool operator<(const Candidate& o) const { return priority != o.priority ? priority < o.priority : id < o.id; }
  };
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};

  void step_bytes(Bytes item);
  std::uint32_t find(std::uint64_t id, std::uint64_t hash) const;
  std::uint32_t step_random(std::uint64_t id, std::uint64_t hash, std::uint64_t draw);
  std::uint32_t step_hash(std::uint64_t id, std::uint64_t hash);
  std::uint32_t admit(const Entry& entry, std::uint64_t hash);
  std::uint32_t insert(const Entry& entry, std::uint64_t hash);
  void remove(std::uint32_t index, std::uint64_t hash);
  void forget(std::uint64_t slot);
  void grow();
  void place(std::uint64_t slot_value);
  void note(std::uint64_t priority, std::uint64_t id);
  std::uint32_t largest();
  void collect_candidates();
  void clear();
  std::uint64_t hash_of(const Entry& entry) const;

  const std::uint64_t capacity_;
  const Priority mode_;
  const Keys keys_;
  mutable std::mutex mutex_;

  std::uint64_t seen_ = 0;
  std::uint64_t limit_ = ~std::uint64_t{0};
  bool holds_bytes_ = false;

  // The buffer: entries at stable indices, freed ones listed; found by open addressing with linear probing, at most half full.
  // A slot holds the low 32 bits of the hash above index + 1; 0 is empty.
  std::vector<Entry> entries_;
  std::vector<std::string> items_;
  std::vector<std::uint32_t> free_;
  std::vector<std::uint64_t> slots_;
  std::uint64_t mask_ = 0;
  std::size_t size_ = 0;

  // Finds the largest priority without a heap of all entries. Invariant: an entry (priority >= floor_) has a candidate equal to it.
  // Candidates whose entry left or changed stay until they reach the top. has_floor_ is false: no candidates are kept.
  std::vector<Candidate> candidates_;
  std::uint64_t floor_ = 0;
  bool has_floor_ = false;
};

}  // namespace cvmk::sketch
