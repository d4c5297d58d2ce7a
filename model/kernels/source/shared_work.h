// Work in pieces that the threads of XLA's pool take one by one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

namespace gemma {

// Calls work(piece) for every piece in [0, pieces), on this thread and on up to threads - 1 others.
//
// This thread takes pieces too and waits only for pieces that another one has begun: if the pool is
// busy, even with threads that wait like this one, the work gets done here. A thread of the pool that
// comes when nothing is left touches nothing but the counters, which it owns a share of.
template <typename Pool, typename Work>
void share_work(Pool& pool, std::int64_t threads, std::int64_t pieces, const Work& work) {
  if (threads <= 1 || pieces <= 1) {
    for (std::int64_t piece = 0; piece < pieces; ++piece) work(piece);
    return;
  }
  struct Counters {
    std::atomic<std::int64_t> next{0};
    std::atomic<std::int64_t> finished{0};
    std::mutex mutex;
    std::condition_variable all_finished;
  };
  auto counters = std::make_shared<Counters>();
  auto take_pieces = [counters, pieces, &work] {
    for (;;) {
      const std::int64_t piece = counters->next.fetch_add(1, std::memory_order_relaxed);
      if (piece >= pieces) return;
      work(piece);
      if (counters->finished.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) {
        std::lock_guard<std::mutex> lock(counters->mutex);
        counters->all_finished.notify_one();
      }
    }
  };
  const std::int64_t helpers = threads - 1 < pieces - 1 ? threads - 1 : pieces - 1;
  for (std::int64_t i = 0; i < helpers; ++i) {
    auto others = take_pieces;
    pool.Schedule(std::move(others));
  }
  take_pieces();
  // The last piece is nearly always a matter of microseconds: look a while before sleeping.
  for (int look = 0; look < 2000; ++look) {
    if (counters->finished.load(std::memory_order_acquire) == pieces) return;
  }
  std::unique_lock<std::mutex> lock(counters->mutex);
  counters->all_finished.wait(
      lock, [&] { return counters->finished.load(std::memory_order_acquire) == pieces; });
}

}  // namespace gemma
