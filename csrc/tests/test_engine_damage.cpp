// Models whose tensors are damaged at random, in memory of exactly their size: each is a BadModel with a sentence, or one that searches to its end. What is read
// beyond a tensor is found by AddressSanitizer, and so is what is misread by UndefinedBehaviorSanitizer. Deterministic; CVMK_DAMAGED_MODELS says how many.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "common/elements.h"
#include "engine/engine.h"
#include "tests/check.h"
#include "tests/random_models.h"

namespace {

using namespace cvmk;
using namespace cvmk::engine;
using testing::Random;
using testing::Weights;
using testing::config_of;
using testing::recurrent_config_of;

constexpr Dtype kDtypes[] = {kFloat32, kBFloat16, kFloat64, kFloat16};
constexpr std::int64_t kSizes[] = {0, 1, 2, 31, 32, 33, 48, 64, 96, 301, 302, 4096};

// Tensors in memory of their own, which ends with them.
class Tensors {
 public:
  explicit Tensors(const RawTensors& sound) {
    for (const auto& [name, tensor] : sound) put(name, tensor.shape, tensor.dtype, static_cast<const char*>(tensor.data), 0);
  }

  const RawTensors& tensors() const { return tensors_; }
  std::size_t size() const { return tensors_.size(); }
  RawTensors::iterator at(int index) { return std::next(tensors_.begin(), index); }
  void erase(int index) { tensors_.erase(at(index)); }

  // `data` is as many bytes as shape and dtype say; `shift` elements stand before, so that the tensor is aligned for its elements only.
  void put(const std::string& name, const std::vector<std::int64_t>& shape, Dtype dtype, const char* data, int shift) {
    const std::int64_t bytes = bytes_of(shape, dtype), before = shift * size_of(dtype);
    memory_.push_back(std::make_unique<char[]>(static_cast<std::size_t>(bytes + before)));
    if (bytes > 0) std::memcpy(memory_.back().get() + before, data, static_cast<std::size_t>(bytes));
    tensors_[name] = {memory_.back().get() + before, dtype, shape};
  }

  static std::int64_t bytes_of(const std::vector<std::int64_t>& shape, Dtype dtype) {
    std::int64_t bytes = size_of(dtype);
    for (const std::int64_t size : shape) bytes *= size;
    return bytes;
  }

 private:
  std::vector<std::unique_ptr<char[]>> memory_;
  RawTensors tensors_;
};

// The same values in another dtype, of which bfloat16 keeps the upper halves.
std::vector<char> converted(const RawTensor& from, Dtype dtype) {
  std::vector<char> found(static_cast<std::size_t>(Tensors::bytes_of(from.shape, dtype)));
  const std::size_t size = static_cast<std::size_t>(size_of(dtype));
  for (std::size_t i = 0; i < found.size() / size; ++i) {
    const float x = elements::load_one(from.data, from.dtype, static_cast<std::int64_t>(i));
    const double wide = static_cast<double>(x);
    const char* bytes = dtype == kFloat64 ? reinterpret_cast<const char*>(&wide) : reinterpret_cast<const char*>(&x) + (dtype == kBFloat16 ? 2 : 0);
    std::memcpy(found.data() + i * size, bytes, size);
  }
  return found;
}

void damage(Tensors& tensors, Random& random) {
  const int index = random.below(static_cast<int>(tensors.size()));
  const std::string name = tensors.at(index)->first;
  const RawTensor tensor = tensors.at(index)->second;
  const int shift = random.below(2) * random.below(8);
  std::vector<std::int64_t> shape = tensor.shape;
  switch (random.below(8)) {
    case 0: {  // stored otherwise, which is sound
      const Dtype dtype = kDtypes[random.below(3)];
      return tensors.put(name, shape, dtype, converted(tensor, dtype).data(), shift);
    }
    case 1: {  // bits of another dtype
      std::vector<char> bits(static_cast<std::size_t>(Tensors::bytes_of(shape, kFloat64)));
      for (char& byte : bits) byte = static_cast<char>(random.bits());
      return tensors.put(name, shape, kDtypes[random.below(4)], bits.data(), shift);
    }
    case 2: {  // a few bits turned
      std::vector<char> bytes(static_cast<const char*>(tensor.data), static_cast<const char*>(tensor.data) + Tensors::bytes_of(shape, tensor.dtype));
      for (int n = random.below(4); n >= 0 && !bytes.empty(); --n) bytes[static_cast<std::size_t>(random.bits() % bytes.size())] ^= static_cast<char>(1 << random.below(8));
      return tensors.put(name, shape, tensor.dtype, bytes.data(), shift);
    }
    case 3: return tensors.erase(index);
    case 4: {  // under another name
      tensors.put(tensors.at(random.below(static_cast<int>(tensors.size())))->first, shape, tensor.dtype, static_cast<const char*>(tensor.data), shift);
      return;
    }
    case 5: return tensors.put(name + std::to_string(random.below(3)), shape, tensor.dtype, static_cast<const char*>(tensor.data), shift);
    case 6: std::reverse(shape.begin(), shape.end()); break;
    default:
      if (random.below(3) == 0) shape.push_back(kSizes[random.below(3)]);
      else if (random.below(3) == 0 && !shape.empty()) shape.pop_back();
      else if (!shape.empty()) shape[static_cast<std::size_t>(random.below(static_cast<int>(shape.size())))] = kSizes[random.below(12)];
  }
  const std::vector<char> zeros(static_cast<std::size_t>(Tensors::bytes_of(shape, tensor.dtype)));
  tensors.put(name, shape, tensor.dtype, zeros.data(), shift);
}

// Whether the model is refused; one that is not translates.
bool refused(const Config& c, const RawTensors& tensors, Compute compute, Random& random) {
  try {
    Engine engine(c, tensors, compute, 1, Budget{});
    Request r;
    for (int n = random.below(6); n > 0; --n) r.source.push_back(4 + random.below(static_cast<int>(c.vocabulary) - 4));
    r.limit = 6;
    r.options.beam_size = r.options.n_best = 1 + random.below(3);
    r.options.alignments = random.below(2) == 0;
    if (random.below(3) == 0) r.shortlist = {3, 7, 8, 9, 100, 300};
    const std::vector<std::vector<Hypothesis>> found = engine.search({r});
    for (const Hypothesis& h : found[0])
      for (const std::int32_t piece : h.pieces) CHECK(piece > 3 && piece < c.vocabulary);
    return false;
  } catch (const BadModel& error) {
    const std::string text = error.what();
    CHECK(!text.empty() && text.size() < 400 && text.find('\n') == std::string::npos);
    return true;
  }
}

}  // namespace

int main() {
  const char* given = std::getenv("CVMK_DAMAGED_MODELS");
  const int count = given == nullptr ? 300 : std::atoi(given);
  Random random;
  int refusals = 0;
  for (int i = 0; i < count; ++i) {
    const Config c = i % 4 < 2 ? config_of(i % 2 == 1) : recurrent_config_of(i % 2 == 1);
    const Weights weights(c);
    Tensors tensors(weights.tensors);
    for (int n = random.below(3); n >= 0; --n) damage(tensors, random);
    refusals += refused(c, tensors.tensors(), static_cast<Compute>(random.below(4)), random);
  }
  CHECK(refusals > count / 4 && refusals < count);
  return cvmk::testing::check_result();
}
