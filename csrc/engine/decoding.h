// The search for a sentence's translation: which rows it needs of the next step, and what it makes of their results.
//
// The rules are those of cvmk/inference/decoding.py and processors.py, where each is described; every one looks at one sentence alone.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/memory.h"
#include "engine/source.h"

namespace cvmk::engine {

// cvmk/inference/options.py says what each means.
struct Options {
  std::int64_t beam_size = 1, n_best = 1, no_repeat_ngram = 0, min_length = 1, top_k = 0;
  double length_penalty = 1.0, patience = 1.0, temperature = 0.0, top_p = 1.0, prefix_bias = 0.0;
  float repetition_penalty = 1.0f;
  std::uint64_t seed = 0;
  std::vector<std::int32_t> suppressed;  // rising
  bool alignments = false, scores = true;
};

struct Request {
  std::vector<std::int32_t> source;  // without the end sign
  std::vector<std::int32_t> prefix;
  std::vector<std::int32_t> shortlist;  // rising ids, the end among them; empty: every id may be said
  std::int64_t limit = 0;  // the most pieces of a translation, at least as many as the prefix has where that is binding
  Options options;
  std::shared_ptr<GrowingSource> growing;  // or null: leased for this request
};

struct Hypothesis {
  std::vector<std::int32_t> pieces;
  std::vector<float> scores;      // log p of each piece and, last, of the end, if it ended; none where Options::scores is false
  std::vector<float> alignment;   // [pieces, source and end sign], where asked for
  double score = 0.0;             // NaN where Options::scores is false
};

class Sequence {
 public:
  Sequence(const Model& model, Memory& memory, Request request);
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  // Bytes that a sequence of this request holds, its caches.
  static std::int64_t bytes(const Model& model, const Request& request);

  // What is to be encoded before the first step.
  Model::Source source();
  bool done() const { return done_; }
  // The rows of the next step: those that follow `rows` are its own until `advance`.
  void ask(std::vector<StepRow>& rows);
  // `results` are those of the rows that it asked for.
  void advance(const StepResult* results);
  // What was found, the best first; the living hypotheses where `done` is false. Empty where the model's numbers are not finite.
  std::vector<Hypothesis> hypotheses() const;
  // The pieces of the best hypothesis that lives.
  std::vector<std::int32_t> partial() const;

 private:
  // One piece of a hypothesis; hypotheses that begin alike share nodes. Node 0 is the beginning.
  struct Node {
    std::int32_t parent, token;
    float score;
    std::int64_t depth;
    std::shared_ptr<std::vector<float>> map;
  };
  struct Live {
    double total;
    std::int32_t node;
    std::int64_t slot;     // of its caches
    bool agrees;           // whether all its pieces are those of the prefix that biases it
    std::uint64_t stream;  // of its random numbers
    std::vector<std::int32_t> said, forbidden;
    std::vector<float> logits;  // of sampling: the whole row
    std::shared_ptr<std::vector<float>> map;
  };
  struct Found {
    double score;
    std::int32_t node;
    float end;
  };
  struct Candidate {
    double total;
    std::int64_t parent;
    std::int32_t token;
    float score;
  };

  // Whether probabilities are computed: the most probable piece is the one with the largest logit.
  bool weighed() const { return request_.options.scores || request_.options.beam_size > 1 || request_.options.temperature > 0.0 || biased(); }
  bool biased() const { return request_.options.prefix_bias > 0.0; }
  std::int64_t hard_prefix() const { return biased() ? 0 : static_cast<std::int64_t>(request_.prefix.size()); }
  std::vector<std::int32_t> pieces_of(std::int32_t node) const;
  void rules(Live& live);
  void read_prefix(const StepResult* results, std::int64_t count);
  void collect(std::int64_t parent, const StepResult& result, std::vector<Candidate>& candidates) const;
  void collect_biased(std::int64_t parent, const StepResult& result, std::vector<Candidate>& candidates) const;
  void sample(const StepResult* results);
  std::int32_t draw(const std::vector<float>& logits, const Live& live, double u) const;
  void search(const StepResult* results);
  void follow(const StepResult& result);
  void survive(const std::vector<Candidate>& chosen);
  void copy(std::int64_t from, std::int32_t from_node, std::int64_t to);
  bool is_done(double best, std::int64_t length) const;
  std::int32_t add_node(std::int32_t parent, std::int32_t token, float score, const std::shared_ptr<std::vector<float>>& map);
  void finish(double total, std::int32_t node, float end);

  const Model& model_;
  Request request_;
  std::vector<std::int32_t> source_;
  std::unique_ptr<Shortlist> shortlist_;
  Held block_;
  Caches encoded_;
  std::vector<Caches> slots_;
  std::vector<std::int32_t> fed_;  // the node that each slot's last position belongs to; -1: there is none
  std::vector<Node> nodes_;
  std::vector<Live> live_;
  std::vector<Found> found_;
  std::vector<std::vector<std::int32_t>> prefix_said_;
  bool begun_ = false, done_ = false;
};

}  // namespace cvmk::engine
