#include "engine/scheduler.h"

#include <algorithm>
#include <chrono>
#include <new>

namespace cvmk::engine {
namespace {

constexpr std::int64_t kShardRows = 4;  // fewer rows are faster in one thread: they share the weights that it reads

}  // namespace

Scheduler::Scheduler(const Model& model, Memory& memory, int shards, Budget budget) : model_(model), memory_(memory), budget_(budget) {
  for (int i = 0; i < shards; ++i) shards_.push_back(std::make_unique<Shard>());
}

double Scheduler::now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void Scheduler::submit(std::int64_t id, Request request, bool partial, double deadline) {
  auto entry = std::make_shared<Entry>();
  entry->id = id;
  entry->cost = (static_cast<std::int64_t>(request.source.size()) + 1) * request.options.beam_size;
  entry->request = std::move(request);
  entry->partial = partial;
  entry->deadline = deadline;
  entry->end.emplace_back();
  const std::lock_guard<std::mutex> lock(mutex_);
  waiting_.push_back(entry);
  try {
    entries_[id] = std::move(entry);
  } catch (const std::bad_alloc&) {
    waiting_.pop_back();
    throw;
  }
}

bool Scheduler::cancel(std::int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find(id);
  if (found == entries_.end()) {
    // It may have ended in a step whose events nobody has taken: then they are taken back.
    const std::size_t before = events_.size();
    events_.remove_if([id](const Event& event) { return event.id == id; });
    return events_.size() < before;
  }
  found->second->cancelled = true;
  const auto at = std::find(waiting_.begin(), waiting_.end(), found->second);
  if (at != waiting_.end()) waiting_.erase(at);
  entries_.erase(found);
  events_.remove_if([id](const Event& event) { return event.id == id; });
  return true;
}

void Scheduler::abandon() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [id, entry] : entries_) entry->cancelled = true;
  entries_.clear();
  waiting_.clear();
  events_.clear();
}

int Scheduler::wanted_shards() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::int64_t rows = running_;
  for (const EntryPointer& entry : waiting_) rows += entry->request.options.beam_size;
  std::int64_t sequences = static_cast<std::int64_t>(waiting_.size());
  int running = 0;
  for (std::size_t i = 0; i < shards_.size(); ++i) {
    sequences += static_cast<std::int64_t>(shards_[i]->running.size());
    if (!shards_[i]->running.empty()) running = static_cast<int>(i) + 1;
  }
  return std::max(running, static_cast<int>(std::min({static_cast<std::int64_t>(shards_.size()), sequences, pieces(rows, kShardRows)})));
}

std::int64_t Scheduler::workspace_bytes() const {
  std::int64_t found = 0;
  for (const auto& shard : shards_) found += shard->workspace.bytes();
  return found;
}

// A request's end was given its place when it was submitted: that needs no memory. Whoever calls holds the mutex.
void Scheduler::tell_end(Entry& entry, Event::Kind kind, std::vector<Hypothesis> hypotheses) {
  if (entry.cancelled) return;
  entry.end.front() = {entry.id, kind, std::move(hypotheses)};
  events_.splice(events_.end(), entry.end);
  entries_.erase(entry.id);
}

void Scheduler::tell_partial(const Entry& entry, Hypothesis partial) {
  std::vector<Hypothesis> found;
  found.push_back(std::move(partial));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!entry.cancelled) events_.push_back({entry.id, Event::kPartial, std::move(found)});
}

std::vector<Event> Scheduler::take_events() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Event> found;
  found.reserve(events_.size());
  for (Event& event : events_) found.push_back(std::move(event));
  events_.clear();
  return found;
}

// Those that waited too long.
void Scheduler::expire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const double time = now();
  const auto kept = std::stable_partition(waiting_.begin(), waiting_.end(), [&](const EntryPointer& entry) { return entry->deadline == 0.0 || time < entry->deadline; });
  for (auto at = kept; at != waiting_.end(); ++at) tell_end(**at, Event::kExpired, {});
  waiting_.erase(kept, waiting_.end());
}

// A fair part of those who wait, as far as the budgets go, is put behind those who run; at least one where nothing runs. Where memory fails, all wait on.
void Scheduler::admit(Shard& shard) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (waiting_.empty()) return;
  const std::size_t before = shard.running.size();
  shard.running.reserve(before + waiting_.size());
  std::int64_t rows = running_, encoded = 0, own = 0;
  for (const EntryPointer& entry : waiting_) rows += entry->request.options.beam_size;
  for (const EntryPointer& entry : shard.running) own += entry->request.options.beam_size;
  const std::int64_t shards = std::max<std::int64_t>(1, std::min(static_cast<std::int64_t>(shards_.size()), pieces(rows, kShardRows)));
  const std::int64_t fair = pieces(rows, shards);
  while (!waiting_.empty()) {
    const EntryPointer& next = waiting_.front();
    const std::int64_t length = static_cast<std::int64_t>(next->request.source.size()) + 1;
    if (running_ > 0 && cost_ + next->cost > budget_.running) break;
    if (!shard.running.empty() && own + next->request.options.beam_size > fair) break;
    if (shard.running.size() > before && encoded + length > budget_.encoded) break;
    encoded += length;
    own += next->request.options.beam_size;
    cost_ += next->cost;
    running_ += next->request.options.beam_size;
    shard.running.push_back(next);
    waiting_.pop_front();
  }
}

void Scheduler::begin(Shard& shard, const Team& team) {
  std::size_t kept = shard.running.size();
  admit(shard);
  if (shard.running.size() == kept) return;
  std::vector<Model::Source> sources;
  sources.reserve(shard.running.size() - kept);
  for (std::size_t i = kept; i < shard.running.size(); ++i) {
    const EntryPointer entry = shard.running[i];
    try {
      entry->sequence = std::make_unique<Sequence>(model_, memory_, entry->request);
      sources.push_back(entry->sequence->source());
    } catch (const std::bad_alloc&) {
      drop(*entry, Event::kFailed);
      continue;
    }
    shard.running[kept++] = entry;
  }
  shard.running.resize(kept);
  model_.encode(sources, shard.workspace, team);
}

// Needs no memory but for the hypotheses of one that has finished; without it the request has failed.
void Scheduler::drop(Entry& entry, Event::Kind kind) {
  std::vector<Hypothesis> found;
  try {
    if (entry.sequence != nullptr && kind != Event::kFailed) found = entry.sequence->hypotheses();
  } catch (const std::bad_alloc&) {
    kind = Event::kFailed;
    found.clear();
  }
  entry.sequence.reset();
  if (entry.request.growing != nullptr && kind == Event::kFailed) entry.request.growing->forget();
  entry.request.growing.reset();
  const std::lock_guard<std::mutex> lock(mutex_);
  cost_ -= entry.cost;
  running_ -= entry.request.options.beam_size;
  tell_end(entry, kind, std::move(found));
}

// Those that were cancelled, are too late, or are done.
void Scheduler::leave(Shard& shard) {
  const auto gone = [&](const EntryPointer& entry) {
    if (entry->sequence->done() || entry->cancelled) return drop(*entry, Event::kFinished), true;
    if (entry->deadline > 0.0 && now() >= entry->deadline) return drop(*entry, Event::kExpired), true;
    return false;
  };
  shard.running.erase(std::remove_if(shard.running.begin(), shard.running.end(), gone), shard.running.end());
}

// What those say so far who want to hear it; where memory fails, the next step tells it.
void Scheduler::show(Shard& shard) {
  try {
    for (const EntryPointer& entry : shard.running)
      if (entry->partial && !entry->sequence->done()) {
        Hypothesis partial;
        partial.pieces = entry->sequence->partial();
        tell_partial(*entry, std::move(partial));
      }
  } catch (const std::bad_alloc&) {
  }
}

bool Scheduler::step(int number, const Team& team) {
  Shard& shard = *shards_[static_cast<std::size_t>(number)];
  leave(shard);
  if (number == 0) expire();
  try {
    begin(shard, team);
    if (shard.running.empty()) return false;
    shard.rows.clear();
    shard.first.clear();
    for (const EntryPointer& entry : shard.running) {
      shard.first.push_back(shard.rows.size());
      entry->sequence->ask(shard.rows);
    }
    model_.step(shard.rows, shard.results, shard.workspace, team);
    for (std::size_t i = 0; i < shard.running.size(); ++i) shard.running[i]->sequence->advance(shard.results.data() + shard.first[i]);
  } catch (const std::bad_alloc&) {
    for (const EntryPointer& entry : shard.running) drop(*entry, Event::kFailed);
    shard.running.clear();
    return true;
  }
  show(shard);
  leave(shard);
  return true;
}

}  // namespace cvmk::engine
