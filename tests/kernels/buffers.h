// Buffers behind which nothing can be read without being noticed.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace gemma {

inline constexpr std::int64_t kMost = std::int64_t{1} << 17;  // bytes of the largest buffer

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
inline char* untouchable() {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t most = static_cast<std::size_t>(kMost);
  void* all = mmap(nullptr, most + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(static_cast<char*>(all) + most, page, PROT_NONE) != 0) {
    std::perror("mmap");
    std::exit(2);
  }
  return static_cast<char*>(all) + most;
}

}  // namespace gemma
