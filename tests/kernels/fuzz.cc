// Random shapes through every instruction set of this processor, compared with plain C++ to the bit.
//
//     fuzz SHAPES SEED           compares them
//     fuzz beyond SET LAYOUT     reads one number too far, which must end it
//
// Built with sanitizers. They see what the compiler reads, and not what a masked load does; so half
// the buffers end where a block of malloc ends, and half where a page begins that none may touch.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "instruction_sets.h"

namespace {

using gemma::AttentionPart;
using gemma::BFloat16;
using gemma::InstructionSet;
using gemma::Part;

constexpr std::int64_t kMost = std::int64_t{1} << 17;  // bytes of the largest buffer

// A buffer that nothing can be read behind. Before it lies what would show in a result.
class Buffer {
 public:
  // With a page, one that is kept for the next buffer; else of malloc, some places into its block.
  Buffer(std::int64_t bytes, std::int64_t before, char* page) : is_malloc_(page == nullptr) {
    if (is_malloc_) {
      base_ = static_cast<char*>(std::malloc(static_cast<std::size_t>(before + bytes)));
      data_ = base_ + before;
    } else {
      if (bytes + before > kMost) std::abort();
      data_ = page - bytes;
      base_ = data_ - before;
    }
    std::memset(base_, 0xff, static_cast<std::size_t>(before + bytes));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (is_malloc_) std::free(base_);
  }
  template <typename Number>
  Number* of() const {
    return reinterpret_cast<Number*>(data_);
  }

 private:
  bool is_malloc_;
  char* base_;
  char* data_;
};

// The address of a page that may not be touched, behind `kMost` bytes that may.
char* untouchable() {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t most = static_cast<std::size_t>(kMost);
  void* all = mmap(nullptr, most + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(static_cast<char*>(all) + most, page, PROT_NONE) != 0) {
    std::perror("mmap");
    std::exit(2);
  }
  return static_cast<char*>(all) + most;
}

std::vector<const InstructionSet*> available() {
  std::vector<const InstructionSet*> sets;
  for (const InstructionSet* set : {&gemma::kAvx512, &gemma::kAvx2, &gemma::kNeon}) {
    if (set->is_available()) sets.push_back(set);
  }
  return sets;
}

class Fuzz {
 public:
  explicit Fuzz(std::uint64_t seed) : random_(seed) {
    for (char*& page : pages_) page = untouchable();
  }

  // One product of each kind of weight, and one attention.
  bool agrees() {
    use_pages_ = up_to(1) == 1;
    return product_agrees<float>() && product_agrees<BFloat16>() && attention_agrees();
  }

 private:
  std::int64_t up_to(std::int64_t most) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(most + 1));
  }

  // Small ones, large ones, zeros of both signs and, now and then, below the normal numbers.
  float number() {
    const float unit = static_cast<float>(up_to(2000000) - 1000000) * 1e-6f;
    const std::int64_t kind = up_to(63);
    return kind == 0 ? 0.0f : kind == 1 ? -0.0f : kind == 2 ? unit * 1e-39f : kind == 3 ? unit * 1e6f : unit;
  }

  void fill(float* begin, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) begin[i] = number();
  }

  void fill(BFloat16* begin, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = number();
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      begin[i].bits = static_cast<std::uint16_t>(bits >> 16);
    }
  }

  template <typename Number>
  Buffer buffer(std::int64_t count, int place) {
    const std::int64_t size = sizeof(Number);
    return Buffer(count * size, up_to(17) * size, use_pages_ ? pages_[place] : nullptr);
  }

  template <typename Weight>
  bool product_agrees() {
    const std::int64_t rows = 1 + up_to(31), in_width = up_to(200), out_width = 1 + up_to(40);
    const std::int64_t begin = up_to(out_width), end = begin + up_to(out_width - begin);
    const Buffer x = buffer<float>(rows * in_width, 0);
    const Buffer weight = buffer<Weight>(out_width * in_width, 1);
    fill(x.of<float>(), rows * in_width);
    fill(weight.of<Weight>(), out_width * in_width);
    // What is no output of the part must stay as it is.
    const Buffer expected = buffer<float>(rows * out_width, 2);
    multiply(gemma::kPlain, {x.of<float>(), weight.of<Weight>(), expected.of<float>(), rows,
                             in_width, out_width, begin, end});
    for (const InstructionSet* set : available()) {
      const Buffer y = buffer<float>(rows * out_width, 3);
      multiply(*set, Part<Weight>{x.of<float>(), weight.of<Weight>(), y.of<float>(), rows, in_width,
                                  out_width, begin, end});
      if (!is_equal(expected, y, rows * out_width)) {
        std::printf("%s: %d bytes a weight, %ld rows, in %ld, out %ld, part %ld to %ld\n", set->name,
                    int{sizeof(Weight)}, long(rows), long(in_width), long(out_width), long(begin),
                    long(end));
        return false;
      }
    }
    return true;
  }

  bool attention_agrees() {
    const std::int64_t heads = 1 + up_to(up_to(3) == 0 ? 31 : 5), head_dim = up_to(150);
    const std::int64_t num_positions = 1 + up_to(60), last = up_to(4 * num_positions);
    const std::int64_t most = last + 1 < num_positions ? last + 1 : num_positions;
    const std::int64_t count = 1 + up_to(most - 1);
    const float cap = up_to(2) == 0 ? 2.0f : 0.0f;
    const Buffer query = buffer<float>(heads * head_dim, 0);
    const Buffer keys = buffer<float>(num_positions * head_dim, 1);
    const Buffer values = buffer<float>(num_positions * head_dim, 2);
    fill(query.of<float>(), heads * head_dim);
    fill(keys.of<float>(), num_positions * head_dim);
    fill(values.of<float>(), num_positions * head_dim);
    const Buffer expected = buffer<float>(heads * head_dim, 3);
    const auto attend = [&](const InstructionSet& set, const Buffer& context) {
      const Buffer weights = buffer<float>(heads * count, 4);
      set.attend(AttentionPart{query.of<float>(), keys.of<float>(), values.of<float>(),
                               context.of<float>(), weights.of<float>(), heads, head_dim,
                               num_positions, last - count + 1, last, cap});
    };
    attend(gemma::kPlain, expected);
    for (const InstructionSet* set : available()) {
      const Buffer context = buffer<float>(heads * head_dim, 5);
      attend(*set, context);
      if (!is_equal(expected, context, heads * head_dim)) {
        std::printf("%s: attention, %ld heads of %ld, %ld positions, %ld keys to %ld, cap %g\n",
                    set->name, long(heads), long(head_dim), long(num_positions), long(count),
                    long(last), double(cap));
        return false;
      }
    }
    return true;
  }

  static void multiply(const InstructionSet& set, const Part<float>& part) {
    set.multiply_float32(part);
  }
  static void multiply(const InstructionSet& set, const Part<BFloat16>& part) {
    set.multiply_bfloat16(part);
  }

  static bool is_equal(const Buffer& a, const Buffer& b, std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
    return std::memcmp(a.of<float>(), b.of<float>(), bytes) == 0;
  }

  std::mt19937_64 random_;
  bool use_pages_ = false;
  char* pages_[6];
};

// A matrix of one row that is one number shorter than said. With whole lanes malloc's end is met,
// and with a few numbers of the last lanes the page.
int read_beyond(const char* name, const char* layout) {
  const bool is_page = std::strcmp(layout, "page") == 0;
  const std::int64_t width = is_page ? 17 : 16;
  char* page = is_page ? untouchable() : nullptr;
  const Buffer x(width * 4, 0, nullptr), weight((width - 1) * 4, 0, page), y(4, 0, nullptr);
  for (const InstructionSet* set :
       {&gemma::kAvx512, &gemma::kAvx2, &gemma::kNeon, &gemma::kPlain}) {
    if (std::strcmp(set->name, name) == 0 && set->is_available())
      set->multiply_float32({x.of<float>(), weight.of<float>(), y.of<float>(), 1, width, 1, 0, 1});
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count == 4 && std::strcmp(words[1], "beyond") == 0) return read_beyond(words[2], words[3]);
  if (count != 3) return 2;
  Fuzz fuzz(std::strtoull(words[2], nullptr, 10));
  const long shapes = std::strtol(words[1], nullptr, 10);
  for (long shape = 0; shape < shapes; ++shape) {
    if (!fuzz.agrees()) return 1;
  }
  std::printf("%ld shapes", shapes);
  for (const InstructionSet* set : available()) std::printf(" %s", set->name);
  std::printf("\n");
  return 0;
}
