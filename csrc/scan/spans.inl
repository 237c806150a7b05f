// Where packed sequences lie within the chunks of time, and what the two passes of the scan share.

#include "scan/lanes.inl"

namespace cvmk::scan {
namespace {

// A run of steps within one chunk that belongs to one sequence, in the order of the scan. sequence < 0: the row of the batch.
struct Span {
  int64_t begin, end, sequence;  // positions from the start of the scan
  bool first, final;             // whether the sequence begins or ends here
};

// Spans by chunk: those of chunk c are [starts[c], starts[c + 1]).
struct Spans {
  Span* spans;
  int64_t* starts;
  int64_t chunks;
};

CVMK_INLINE int64_t chunk_count(const Scan& s) { return (s.length + kChunk - 1) / kChunk; }
CVMK_INLINE int64_t sequence_count(const Scan& s) { return s.cu_seqlens == nullptr ? s.batch : s.sequences; }

// Where sequence i begins. A cu_seqlens that does not rise from 0 to length gives some division of the length, never a place outside.
CVMK_INLINE int64_t boundary(const Scan& s, int64_t i) {
  if (i >= s.sequences) return s.length;
  const int64_t read = integer_at(s.cu_seqlens, s.cu_dtype, i), at = read < 0 || i == 0 ? 0 : read;
  return at < s.length ? at : s.length;
}

CVMK_INLINE Spans take_spans(const Scan& s, Arena* a) {
  const int64_t chunks = chunk_count(s), packed = s.cu_seqlens == nullptr ? 1 : s.sequences;
  Spans spans;
  spans.spans = a->take<Span>(chunks + packed + 1);
  spans.starts = a->take<int64_t>(chunks + 1);
  spans.chunks = chunks;
  return spans;
}
inline __attribute__((unused)) void fill_spans(const Scan& s, const Spans* out) {
  const int64_t packed = s.cu_seqlens == nullptr ? 1 : s.sequences;
  int64_t count = 0, chunk = 0, at = 0;
  out->starts[0] = 0;
  for (int64_t k = 0; k < packed && at < s.length; ++k) {
    const int64_t i = s.reverse ? packed - 1 - k : k;
    int64_t end = s.length;
    if (s.cu_seqlens != nullptr && k < packed - 1) end = s.reverse ? s.length - boundary(s, i) : boundary(s, i + 1);
    for (const int64_t begin = at; at < end;) {
      const int64_t limit = (chunk + 1) * kChunk, stop = end < limit ? end : limit;
      out->spans[count++] = {at, stop, s.cu_seqlens == nullptr ? -1 : i, at == begin, stop == end};
      at = stop;
      if (at == limit || at == s.length) out->starts[++chunk] = count;
    }
  }
}

// For what runs over no step: the last state of an empty sequence is its initial state, and their gradients are one another's.
inline __attribute__((unused)) void pass_empty(const Scan& s, const float* from, float* to) {
  const int64_t size = s.channels * s.states;
  for (int64_t i = 0; to != nullptr && i < sequence_count(s); ++i) {
    if (s.length > 0 && (s.cu_seqlens == nullptr || boundary(s, i) < boundary(s, i + 1))) continue;
    if (from == nullptr) fill(to + i * size, size, 0.0f);
    else memcpy(to + i * size, from + i * size, static_cast<size_t>(size) * 4);
  }
}

// W channels of one group: where they are, and how a chunk of time is read and written for them.
struct Block {
  int64_t batch, group, channel;
  int lanes;
};

// The chunk's place in memory: its steps are [time, time + steps), to be taken from the end where the scan is reversed.
struct Extent {
  int64_t time;
  int steps;
};
CVMK_INLINE Extent extent(const Scan& s, int64_t chunk) {
  const int64_t begin = chunk * kChunk, left = s.length - begin;
  const int steps = static_cast<int>(left < kChunk ? left : kChunk);
  return {s.reverse ? s.length - begin - steps : begin, steps};
}

CVMK_INLINE void load_steps(const Scan& s, const View& view, const Block& b, const Extent& e, float* tile) {
  if (view.data == nullptr) fill(tile, static_cast<int64_t>(e.steps) * W, 0.0f);
  else load_tile(plane(view, b.batch, b.channel, e.time), b.lanes, e.steps, s.reverse != 0, tile);
}
// To [batch, channels, length] without gaps, or channels last.
CVMK_INLINE void store_steps(const Scan& s, void* data, Dtype dtype, const Block& b, const Extent& e, const float* tile) {
  const int64_t row = s.channels_last ? 1 : s.length, column = s.channels_last ? s.channels : 1;
  const int64_t at = b.batch * s.channels * s.length + b.channel * row + e.time * column;
  const Plane to{elements::at(data, dtype, at), dtype, row, column};
  store_tile(to, b.lanes, e.steps, s.reverse != 0, tile);
}
// B or C of one chunk as [states][kChunk].
CVMK_INLINE void load_weights(const Scan& s, const Weights& w, int64_t batch, int64_t group, const Extent& e, float* out) {
  Plane from = plane(w.varying, batch, 0, e.time);
  from.data = elements::at(from.data, from.dtype, group * w.group);
  load_rows(from, s.states, e.steps, s.reverse != 0, out, kChunk);
}

// Small float32 tensors of channels: [channels] as a vector, [channels, states] as [states][W].
CVMK_INLINE F load_channels(const float* data, const Block& b, float missing) {
  return data == nullptr ? simd::set(missing) : simd::load_n(data + b.channel, b.lanes);
}
CVMK_INLINE void load_states(const Scan& s, const float* data, int64_t row, int lanes, float* out) {
  if (data == nullptr) fill(out, s.states * W, 0.0f);
  else load_tile(plane(data + row * s.states, s.states), lanes, static_cast<int>(s.states), false, out);
}
CVMK_INLINE void store_states(const Scan& s, float* data, int64_t row, int lanes, const float* values) {
  store_tile(plane(data + row * s.states, s.states), lanes, static_cast<int>(s.states), false, values);
}

CVMK_INLINE int64_t blocks_of_group(const Scan& s) { return (s.channels / s.groups + W - 1) / W; }
CVMK_INLINE Block block_at(const Scan& s, int64_t batch, int64_t group, int64_t block) {
  const int64_t width = s.channels / s.groups, left = width - block * W;
  return {batch, group, group * width + block * W, static_cast<int>(left < W ? left : W)};
}

}  // namespace
}  // namespace cvmk::scan
