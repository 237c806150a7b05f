// An encoder-decoder: sources to caches of keys and values, and steps of rows of the decoder, whose layers have caches or states of a fixed size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "cached/params.h"
#include "engine/mixers.h"
#include "vocabulary/params.h"

namespace cvmk::engine {

enum class Positions { kSinusoidal, kRotary, kNone };

struct Config {
  std::vector<Mixer> encoder_mixers, decoder_mixers;  // of the layers, repeated to fill them; empty: attention
  std::int64_t d_model, ffn, heads, kv_heads, encoder_layers, decoder_layers, max_length, vocabulary;
  bool rms, bias, tied, causal_encoder, byte_caches;
  float norm_epsilon;
  double rotary_base;
  Positions positions;
  gemm::Activation activation;
};

// Memory of a thread that grows to what its largest call needed.
class Workspace {
 public:
  ~Workspace() { give_block(block_); }
  // `bytes` that begin on a cache line; what was there before is gone.
  char* get(std::int64_t bytes);
  std::int64_t bytes() const { return static_cast<std::int64_t>(block_.bytes); }

 private:
  Block block_;
};

// What the layers keep of one sequence: keys and values, or, where the mixer has such, a state.
struct Caches {
  std::vector<cached::Cache> layers;
  std::vector<float*> states;  // null where the layer has keys and values; empty where all layers have
};

// The only ids that a sentence may say, rising, the end among them, and their output layer.
struct Shortlist {
  std::vector<std::int32_t> ids;
  Linear output;
};

// One token of a hypothesis in a step. Rows of one hypothesis that come together stand together, in rising positions.
struct StepRow {
  std::int32_t token;
  std::int64_t position;
  const Caches* own;        // of the positions before; this position's are written by the step
  const Caches* source;     // of cross-attention
  std::int64_t source_length;
  std::int32_t wanted;      // an id whose logit is asked for; -1: none
  std::int64_t k;           // how many of the best ids; 0: none
  bool sum;                 // whether the normaliser is asked for
  // What happens to the row's logits first.
  const std::int32_t* said;  // rising ids whose logits the repetition penalty changes
  std::int64_t said_count;
  float penalty;
  const std::int32_t* forbidden;  // rising ids that count in the sum and may not be chosen
  std::int64_t forbidden_count;
  const Shortlist* shortlist;  // null: every id may be said
  float* logits;  // null, or [vocabulary]: the row itself, after the penalty
  float* map;     // null, or [source_length]: the weights of the last cross-attention, their mean over the heads
};

// What a step says of a row.
struct StepResult {
  float wanted;       // the logit; 0 where none was asked for
  double normaliser;  // log of the sum of the exponentials; 0 where it was not asked for
  std::vector<float> values;  // the k largest that may be chosen, falling; in any order where k is above vocabulary::kSorted
  std::vector<std::int32_t> ids;
};

class Model {
 public:
  // A weight that is stored quantised has tensors name + ".values", ".scales" and perhaps ".zeros" and ".order", whatever `compute` says of the others; the
  // 4-bit ones that `tokens` names are multiplied with rows that are quantised to bytes. What the values say is the caller's to check (cvmk/formats/stored.py).
  // Raises BadModel where a tensor is missing or of another shape.
  Model(const Config& config, const RawTensors& tensors, Compute compute, const std::set<std::string>& tokens = {});

  const Config& config() const { return config_; }
  std::int64_t weight_bytes() const { return weight_bytes_; }
  const Linear& output() const { return output_; }
  std::int64_t head_size() const { return config_.d_model / config_.heads; }

  // Of what the decoder reads: int8 where the model says so, else as the encoder's.
  Dtype cache_dtype() const { return config_.byte_caches ? kInt8 : encoder_dtype_; }
  // Bytes of what a sequence of `capacity` positions needs: of a source for the cross-attention of all decoder layers, of a hypothesis for these layers
  // themselves, of a source that grows for the encoder. capacity_of rounds a length up.
  static std::int64_t capacity_of(std::int64_t length) { return up(std::max<std::int64_t>(length, 1), cached::kColumns); }
  std::int64_t cross_bytes(std::int64_t capacity) const { return config_.decoder_layers * layer_bytes(capacity, cache_dtype()); }
  std::int64_t own_bytes(std::int64_t capacity) const { return bytes(decoder_, capacity, 1, cache_dtype()); }
  std::int64_t encoder_bytes(std::int64_t capacity) const { return bytes(encoder_, capacity, states_of(capacity), encoder_dtype_); }
  // They, in memory of these sizes.
  Caches cross_caches(char* memory, std::int64_t capacity) const;
  Caches own_caches(char* memory, std::int64_t capacity) const { return caches(decoder_, memory, capacity, 1, cache_dtype()); }
  Caches encoder_caches(char* memory, std::int64_t capacity) const { return caches(encoder_, memory, capacity, states_of(capacity), encoder_dtype_); }
  // A hypothesis that has taken `last` positions over another one, with which it has the first `first` in common.
  void copy(const Caches& from, const Caches& to, std::int64_t first, std::int64_t last) const;

  // A state cannot go back. That of a causal encoder is kept behind every kSpan positions of a source, and before its last one, the end sign; from there it
  // goes on when the source changes.
  static constexpr std::int64_t kSpan = 32;
  bool encoder_has_states() const { return has_states(encoder_); }

  // Sources (ids with the end sign), each to the caches of the decoder's cross-attention. Where `encoder` is given, the encoder keeps its own keys, values and
  // states there, and the positions before `first`, which are there already, are not encoded again; the encoder must be causal, else first is 0. An encoder
  // with states goes on from multiples of kSpan and from the last position of the source that was encoded there before.
  struct Source {
    const std::int32_t* ids;
    std::int64_t length;
    const Caches* caches;
    const Caches* encoder = nullptr;
    std::int64_t first = 0;
  };
  void encode(const std::vector<Source>& sources, Workspace& workspace, const Team& team) const;

  // `results` gets one entry a row.
  void step(const std::vector<StepRow>& rows, std::vector<StepResult>& results, Workspace& workspace, const Team& team) const;

 private:
  struct Norm {
    std::vector<float> weight, bias;
  };
  struct Block {
    Norm mixer_norm, cross_norm, ffn_norm;
    Linear qkv, out, cross_query, cross_key_value, cross_out, inner, outer;
    std::unique_ptr<RecurrentMixer> recurrent;  // null: attention, by qkv and out
  };
  struct Buffers;
  struct Append;
  typedef std::vector<Block> Stack;
  // What is known of the runs of a stack before its layers are: rows of a sequence, and where in its states they begin and end; -1: nowhere.
  struct Piece {
    std::size_t sequence;
    std::int64_t first, rows, from, to;
  };

  std::int64_t layer_bytes(std::int64_t capacity, Dtype dtype) const { return cached::cache_bytes(config_.kv_heads, head_size(), capacity, dtype); }
  cached::Cache cache(char* memory, std::int64_t capacity, Dtype dtype) const { return cached::cache_in(memory, config_.kv_heads, head_size(), capacity, dtype); }
  static bool has_states(const Stack& stack);
  static std::int64_t state_bytes(const Block& block) { return up(block.recurrent->state_size() * 4, 64); }
  static std::int64_t states_of(std::int64_t capacity) { return 1 + capacity / kSpan; }  // the first is the one before the end sign
  // `states`: how many each layer keeps of a sequence.
  std::int64_t bytes(const Stack& stack, std::int64_t capacity, std::int64_t states, Dtype dtype) const;
  Caches caches(const Stack& stack, char* memory, std::int64_t capacity, std::int64_t states, Dtype dtype) const;

  // A matrix of embeddings: floats, or stored values.
  struct Table {
    RawTensor floats;
    StoredWeight stored;
  };
  struct Weights {
    const RawTensors& tensors;
    Compute compute;
    const std::set<std::string>& tokens;
  };

  const RawTensor& find(const Weights& weights, const std::string& name, const std::vector<std::int64_t>& shape, Dtype dtype = kNoDtype);
  bool is_stored(const Weights& weights, const std::string& name) const { return weights.tensors.count(name + ".values") != 0; }
  // `layer` is the name before those of its smoothing scale and input range.
  StoredWeight stored(const Weights& weights, const std::string& name, const std::string& layer, std::int64_t outputs, std::int64_t inputs);
  Table table(const Weights& weights, const std::string& name);
  Norm norm(const Weights& weights, const std::string& name);
  Block block(const Weights& weights, const std::string& name, Mixer mixer, bool decoder);
  Linear linear(const Weights& weights, const std::string& name, std::int64_t outputs, std::int64_t inputs, bool bias, gemm::Activation activation = gemm::kNone);
  std::unique_ptr<RecurrentMixer> recurrent(const Weights& weights, const std::string& name, Mixer mixer, bool causal);
  void embed(const Table& table, std::int32_t id, std::int64_t position, float* x) const;
  void residual(float* x, const float* branch, const Norm& norm, std::int64_t rows, float* out, const Team& team) const;
  void rotate(float* x, std::int64_t heads, std::int64_t position) const;
  void feed_forward(const Block& block, Buffers& b, const Norm& following, const Team& team) const;
  static std::vector<Piece> pieces_of(const std::vector<Source>& sources);
  void mix(const Block& block, std::size_t layer, const std::vector<Piece>& pieces, const std::vector<const Caches*>& kept, Buffers& b, const Team& team) const;
  void attend_sources(const Block& block, std::size_t layer, const std::vector<Source>& sources, const std::vector<cached::Cache>& own, std::int64_t longest, const Append& append,
                      Buffers& b, const Team& team) const;
  void attend_own(const Block& block, std::size_t layer, const std::vector<StepRow>& rows, std::int64_t longest, const Append& append, Buffers& b, const Team& team) const;
  void attend_cross(const Block& block, std::size_t layer, const std::vector<StepRow>& rows, std::int64_t longest, Buffers& b, const Team& team) const;
  void attend(const std::vector<cached::Item>& items, std::int64_t longest, Dtype dtype, const Team& team) const;
  void project(const std::vector<StepRow>& rows, const float* features, std::vector<StepResult>& results, const Team& team) const;
  void project(const StepRow* rows, std::int64_t count, const float* features, const Shortlist* list, StepResult* results, const Team& team) const;

  Config config_;
  Dtype encoder_dtype_;  // of the encoder's keys and values: bfloat16 where activations are quantised, else float32
  std::set<std::string> found_;  // while it is made: the tensors that it has asked for
  Table source_table_, target_table_;
  Stack encoder_, decoder_;
  Norm encoder_norm_, decoder_norm_;
  Linear output_;
  std::vector<float> table_;  // positions: [max_length, d_model], or cosines and sines [2, max_length, head_size / 2]
  std::int64_t weight_bytes_ = 0;
};

}  // namespace cvmk::engine
