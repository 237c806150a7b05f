// Binds the engine: a model made of named arrays, requests in, events out. Python decides nothing here; cvmk/inference/native_engine.py does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/candidates.h"
#include "engine/engine.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace cvmk;
using namespace cvmk::engine;

Dtype dtype_named(const std::string& name) {
  for (const Dtype dtype : {kFloat32, kBFloat16, kFloat16, kFloat64, kInt8, kUint8, kInt32})
    if (name == name_of(dtype)) return dtype;
  throw BadModel("has weights in " + name + ", which no weight is stored in: restore it or save the model again");
}

template <typename T>
T pick(const std::string& name, const char* key, const std::vector<std::pair<const char*, T>>& known) {
  for (const auto& one : known)
    if (name == one.first) return one.second;
  throw BadModel(std::string(key) + " is " + name + ", which the native engine does not have");
}

Config read_config(const py::dict& from) {
  const auto whole = [&](const char* key) { return from[key].cast<std::int64_t>(); };
  const auto mixers = [&](const char* key) {
    std::vector<Mixer> found;
    for (const auto& name : from[key].cast<std::vector<std::string>>())
      found.push_back(pick<Mixer>(name, key, {{"attention", Mixer::kAttention}, {"ssru", Mixer::kSsru}, {"mamba", Mixer::kMamba}}));
    return found;
  };
  Config c{};
  c.encoder_mixers = mixers("encoder_mixers");
  c.decoder_mixers = mixers("decoder_mixers");
  c.d_model = whole("d_model");
  c.ffn = whole("ffn");
  c.heads = whole("heads");
  c.kv_heads = whole("kv_heads");
  c.encoder_layers = whole("encoder_layers");
  c.decoder_layers = whole("decoder_layers");
  c.max_length = whole("max_length");
  c.vocabulary = whole("vocab_size");
  c.rms = from["norm"].cast<std::string>() == "rmsnorm";
  c.bias = from["bias"].cast<bool>();
  c.tied = from["tie_embeddings"].cast<bool>();
  c.causal_encoder = from["encoder_direction"].cast<std::string>() == "causal";
  c.byte_caches = from["kv_cache"].cast<std::string>() == "int8";
  c.norm_epsilon = from["norm_eps"].cast<float>();
  c.rotary_base = from["rotary_base"].cast<double>();
  c.positions = pick<Positions>(from["positions"].cast<std::string>(), "positions",
                                {{"sinusoidal", Positions::kSinusoidal}, {"rotary", Positions::kRotary}, {"none", Positions::kNone}});
  c.activation = pick<gemm::Activation>(from["activation"].cast<std::string>(), "activation",
                                        {{"relu", gemm::kRelu}, {"gelu", gemm::kGelu}, {"silu", gemm::kSilu}, {"swiglu", gemm::kSwiglu}});
  return c;
}

// The arrays stay alive with the engine.
struct PythonEngine {
  py::dict weights;
  std::unique_ptr<Engine> engine;
};

PythonEngine make(const py::dict& config, const py::dict& weights, const std::string& compute, int threads, std::int64_t budget, const std::set<std::string>& tokens) {
  RawTensors tensors;
  for (const auto& [name, value] : weights) {
    const auto [dtype, buffer, shape] = value.cast<std::tuple<std::string, py::object, std::vector<std::int64_t>>>();
    Py_buffer view;
    if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();  // what is not contiguous
    RawTensor tensor{view.buf, dtype_named(dtype), shape};
    const std::int64_t bytes = view.len, size = std::accumulate(shape.begin(), shape.end(), size_of(tensor.dtype), std::multiplies<>());
    PyBuffer_Release(&view);  // `weights` keeps what it belongs to
    if (bytes != size) throw BadModel("has " + std::to_string(bytes) + " bytes for " + name.cast<std::string>() + ", whose shape asks for " + std::to_string(size));
    tensors.emplace(name.cast<std::string>(), std::move(tensor));
  }
  const Config read = read_config(config);
  const Compute type = pick<Compute>(compute, "compute_type", {{"float32", Compute::kFloat32}, {"bfloat16", Compute::kBFloat16}, {"int8", Compute::kInt8}, {"int4", Compute::kInt4}});
  PythonEngine made{weights, nullptr};
  {
    const py::gil_scoped_release release;
    made.engine = std::make_unique<Engine>(read, tensors, type, threads, Budget{budget, 512}, tokens);
  }
  return made;
}

// Arrays of int32, which stay alive with it.
Candidates make_candidates(const py::buffer& starts, const py::buffer& targets, const py::buffer& frequent, std::int64_t vocabulary) {
  const auto read = [](const py::buffer& from) {
    const py::buffer_info array = from.request();
    if (array.ndim != 1 || array.itemsize != 4 || (array.size > 1 && array.strides[0] != 4)) throw BadModel("a shortlist is made of contiguous arrays of int32");
    return std::make_pair(static_cast<const std::int32_t*>(array.ptr), static_cast<std::int64_t>(array.size));
  };
  const auto [first, count] = read(starts);
  if (count != vocabulary + 1) throw BadModel("the shortlist belongs to another vocabulary: make it again");
  const auto [ids, id_count] = read(targets);
  const auto [common, common_count] = read(frequent);
  return Candidates(first, ids, id_count, common, common_count, vocabulary);
}

Request read_request(const py::tuple& from) {
  Request r;
  r.source = from[0].cast<std::vector<std::int32_t>>();
  r.prefix = from[1].cast<std::vector<std::int32_t>>();
  r.limit = from[2].cast<std::int64_t>();
  r.options = from[3].cast<const Options&>();
  if (!from[4].is_none()) r.shortlist = from[4].cast<const Candidates&>().of(r.source, r.prefix);
  if (!from[5].is_none()) {
    r.growing = GrowingSource::lease(from[5].cast<std::shared_ptr<GrowingSource>>());
    if (r.growing == nullptr) throw std::runtime_error("the session has a request that has not ended: wait for it, or cancel it");
  }
  return r;
}

Options read_options(const py::dict& options) {
  Options o;
  o.beam_size = options["beam_size"].cast<std::int64_t>();
  o.n_best = options["n_best"].cast<std::int64_t>();
  o.no_repeat_ngram = options["no_repeat_ngram"].cast<std::int64_t>();
  o.min_length = options["min_length"].cast<std::int64_t>();
  o.length_penalty = options["length_penalty"].cast<double>();
  o.repetition_penalty = options["repetition_penalty"].cast<float>();
  o.patience = options["patience"].cast<double>();
  o.temperature = options["temperature"].cast<double>();
  o.top_k = options["top_k"].cast<std::int64_t>();
  o.top_p = options["top_p"].cast<double>();
  o.seed = options["seed"].cast<std::uint64_t>();
  o.prefix_bias = options["prefix_bias"].cast<double>();
  o.suppressed = options["suppressed"].cast<std::vector<std::int32_t>>();
  o.alignments = options["alignments"].cast<bool>();
  o.scores = options["scores"].cast<bool>();
  return o;
}

py::list to_python(const std::vector<Hypothesis>& hypotheses) {
  py::list found;
  for (const Hypothesis& h : hypotheses) {
    py::tuple scores(h.scores.size());
    for (std::size_t i = 0; i < h.scores.size(); ++i) scores[i] = py::float_(static_cast<double>(h.scores[i]));
    found.append(py::make_tuple(h.pieces, h.score, std::move(scores), h.alignment));
  }
  return found;
}

py::list to_python(const std::vector<Event>& events) {
  py::list found;
  for (const Event& e : events) found.append(py::make_tuple(e.id, static_cast<int>(e.kind), to_python(e.hypotheses)));
  return found;
}

// A search without the interpreter's lock, which looks for signals now and then.
std::vector<std::vector<Hypothesis>> search(Engine& engine, std::vector<Request> requests) {
  double looked = Scheduler::now();
  const auto interrupted = [&looked] {
    const double now = Scheduler::now();
    if (now < looked + 0.05) return false;
    looked = now;
    const py::gil_scoped_acquire lock;
    return PyErr_CheckSignals() != 0;
  };
  try {
    const py::gil_scoped_release release;
    return engine.search(std::move(requests), interrupted);
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

}  // namespace

void bind_engine(py::module_& m) {
  py::register_exception<BadModel>(m, "BadModel", PyExc_ValueError);
  py::class_<Options>(m, "SearchOptions", "cvmk.inference.SearchOptions, read once").def(py::init(&read_options));
  py::class_<Candidates>(m, "Candidates", "cvmk.inference.shortlist.Shortlist for requests")
      .def(py::init(&make_candidates), "starts"_a, "targets"_a, "frequent"_a, "vocabulary"_a, py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
      .def("of", &Candidates::of, "source"_a, "prefix"_a);
  py::class_<GrowingSource, std::shared_ptr<GrowingSource>>(m, "GrowingSource", "What an engine keeps of a source that grows")
      .def_property_readonly("kept", &GrowingSource::kept, "positions of the last source that had been encoded before");
  py::class_<PythonEngine>(m, "Engine", "An encoder-decoder that translates piece ids; see cvmk/inference/native_engine.py")
      .def(py::init(&make), "config"_a, "weights"_a, "compute_type"_a, "threads"_a, "budget"_a,
           "tokens"_a = std::set<std::string>())
      .def("submit",
           [](PythonEngine& e, std::int64_t id, const py::tuple& request, bool partial, double timeout) {
             e.engine->submit(id, read_request(request), partial, timeout);
           })
      .def("cancel", [](PythonEngine& e, std::int64_t id) { return e.engine->cancel(id); }, py::call_guard<py::gil_scoped_release>())
      .def("step",
           [](PythonEngine& e) {
             std::vector<Event> events;
             {
               const py::gil_scoped_release release;
               events = e.engine->step();
             }
             return to_python(events);
           })
      .def("search",
           [](PythonEngine& e, const py::sequence& sources, const py::sequence& prefixes, const std::vector<std::int64_t>& limits, const Options& options, const Candidates* shortlist) {
             std::vector<Request> read;
             for (std::size_t i = 0; i < limits.size(); ++i) {
               Request r;
               r.source = sources[i].cast<std::vector<std::int32_t>>();
               if (py::len(prefixes) > 0) r.prefix = prefixes[i].cast<std::vector<std::int32_t>>();
               if (shortlist != nullptr) r.shortlist = shortlist->of(r.source, r.prefix);
               r.limit = limits[i];
               r.options = options;
               read.push_back(std::move(r));
             }
             py::list all;
             for (const auto& one : search(*e.engine, std::move(read))) all.append(to_python(one));
             return all;
           })
      .def("open_source", [](PythonEngine& e, std::int64_t longest) { return e.engine->open_source(longest); }, py::keep_alive<0, 1>())
      .def("source_bytes", [](const PythonEngine& e, std::int64_t longest) { return Memory::rounded(GrowingSource::bytes(e.engine->model(), longest)); })
      .def("search_one",
           [](PythonEngine& e, const py::tuple& request) {
             std::vector<Request> read{read_request(request)};
             return to_python(search(*e.engine, std::move(read))[0]);
           })
      .def_property_readonly("threads", [](const PythonEngine& e) { return e.engine->threads(); })
      .def_property_readonly("weight_bytes", [](const PythonEngine& e) { return e.engine->model().weight_bytes(); })
      .def("held_bytes", [](PythonEngine& e) { return e.engine->held_bytes(); })
      .def("request_bytes", [](const PythonEngine& e, const py::tuple& request) { return Memory::rounded(Sequence::bytes(e.engine->model(), read_request(request))); });
}
