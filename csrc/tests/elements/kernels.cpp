#include "common/elements.h"
#include "tests/elements/params.h"

#define CVMK_QUOTED_AS_IS(name) #name
#define CVMK_QUOTED(name) CVMK_QUOTED_AS_IS(name)

namespace cvmk::elements_test {
namespace {

using elements::kLanes;

void copy(void* to, Dtype to_type, const void* from, Dtype from_type, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = static_cast<int>(least(kLanes, n - i));
    elements::store_n(to, to_type, i, elements::load_n(from, from_type, i, count), count);
  }
}

void copy_singly(float* to, const void* from, Dtype type, int64_t n) {
  elements::with_type(type, [&](auto known) {
    for (int64_t i = 0; i < n; ++i) to[i] = elements::load_one<decltype(known)::value>(elements::at(from, type, i));
  });
}

template <Dtype kType>
void stream_as(void* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) elements::stream<kType>(elements::at(to, kType, i), simd::load(from + i));
  elements::finish_streams();
}
void stream(void* to, Dtype type, const float* from, int64_t n) {
  if (type == kFloat32) return stream_as<kFloat32>(to, from, n);
  type == kBFloat16 ? stream_as<kBFloat16>(to, from, n) : stream_as<kFloat16>(to, from, n);
}

}  // namespace
}  // namespace cvmk::elements_test

CVMK_KERNELS(elements_test) = {CVMK_QUOTED(CVMK_LEVEL), elements::kLanes, elements::to_floats, elements::from_floats, cvmk::elements_test::copy,
                               cvmk::elements_test::copy_singly, cvmk::elements_test::stream};
