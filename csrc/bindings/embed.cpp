// Binds embeddings and the gradient of their matrix.
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "bindings/call.h"
#include "bindings/elements_arguments.h"
#include "embed/params.h"

namespace {

using namespace cvmk::embed;
using cvmk::bindings::Arguments;
using cvmk::bindings::elements;
using cvmk::bindings::Tensor;

// The place of an id that the matrix has no row for, or -1: memory is never read or written by an id that was not looked at.
std::int64_t wrong_id(const Lookup& l) {
  for (std::int64_t i = 0; i < l.rows; ++i) {
    const std::int64_t id = cvmk::integer_at(l.ids, l.ids_dtype, i);
    if (id < 0 || id >= l.vocabulary) return i;
  }
  return -1;
}

// The fields of `Call` in cvmk/ops/embed.py, in their order.
void read_call(Arguments in, Forward& p) {
  const Tensor ids = in.tensor("ids"), weight = in.tensor("weight"), positions = in.optional("positions");
  in.next();  // dropout_seed
  Lookup& l = p.lookup;
  l.scale = in.number();
  in.next();  // dropout_p
  in.finish();
  weight.expect(2, "weight");
  l.ids_dtype = in.counting(ids, "ids");
  l.ids = ids.data();
  l.rows = cvmk::bindings::count_of(ids);
  l.vocabulary = weight.size(0);
  l.n = weight.size(1);
  if (!ids.is_contiguous()) throw std::invalid_argument(in.about("ids") + "must have no gaps");
  if (l.rows > std::numeric_limits<std::int32_t>::max()) throw std::invalid_argument(in.about("ids") + "are more than 2^31 - 1: split them");
  p.weight = elements(in, weight, l.vocabulary * l.n, "weight");
  p.positions_rows = positions ? cvmk::bindings::count_of(positions) / l.n : 1;
  p.positions = elements(in, positions, p.positions_rows * l.n, "positions");
}

void read_dropout(Arguments& in, Lookup& l) {
  l.keep_factor = in.number();
  l.dropout_key = static_cast<std::uint32_t>(in.integer());
  l.dropout_limit = static_cast<std::uint32_t>(in.integer());
}

// -1, or the place of an id that the matrix has no row for: nothing was written then.
std::int64_t forward(Arguments& in) {
  Forward p{};
  read_call(in.fields(), p);
  p.out = elements(in, in.tensor("out"), p.lookup.rows * p.lookup.n, "out");
  read_dropout(in, p.lookup);
  const std::int64_t wrong = wrong_id(p.lookup);
  if (wrong < 0) cvmk::bindings::run(kernels().forward, in, p);
  return wrong;
}

std::int64_t backward(Arguments& in) {
  Forward call{};
  read_call(in.fields(), call);
  Backward p{};
  p.grad = elements(in, in.tensor("grad_out"), call.lookup.rows * call.lookup.n, "grad_out");
  p.dweight = elements(in, in.tensor("dweight"), call.lookup.vocabulary * call.lookup.n, "dweight");
  read_dropout(in, call.lookup);
  p.lookup = call.lookup;
  const std::int64_t wrong = wrong_id(p.lookup);
  if (wrong < 0) cvmk::bindings::run(kernels().backward, in, p);
  return wrong;
}

}  // namespace

void bind_embed(pybind11::module_& m) {
  using cvmk::bindings::add;
  add<&forward>(m, "embed_forward", "embed", "a Call of cvmk.ops.embed, out, 1 / (1 - dropout_p), dropout key and limit; returns -1, or the place of a wrong id");
  add<&backward>(m, "embed_backward", "embed", "a Call, the gradient of out, that of weight to write, the dropout as forwards; returns as forwards");
}
