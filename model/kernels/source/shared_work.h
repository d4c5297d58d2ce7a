// Work in pieces that the threads of XLA's pool take one by one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

namespace gemma {

// What a thread is to do, and what it does after that: a piece or nothing.
struct Turn {
  std::int64_t piece;
  std::int64_t following;  // -1 for nothing
  std::int64_t thread;     // 0 is the one that shares out
};

// Calls work(turn) for every piece in [0, pieces), on this thread and on up to threads - 1 others.
// A thread takes the next piece before it begins one, so that it knows what to ask memory for.
//
// This thread takes pieces too and waits only for pieces that another one has begun: if the pool is
// busy, even with threads that wait like this one, the work gets done here. A thread of the pool that
// comes when nothing is left touches nothing but the counters, which it owns a share of.
template <typename Pool, typename Work>
void share_work(Pool& pool, std::int64_t threads, std::int64_t pieces, const Work& work) {
  if (threads <= 1 || pieces <= 1) {
    for (std::int64_t piece = 0; piece < pieces; ++piece)
      work(Turn{piece, piece + 1 < pieces ? piece + 1 : -1, 0});
    return;
  }
  struct Counters {
    std::atomic<std::int64_t> next{0};
    std::atomic<std::int64_t> finished{0};
    std::mutex mutex;
    std::condition_variable all_finished;
  };
  auto counters = std::make_shared<Counters>();
  auto take_pieces = [counters, pieces, &work](std::int64_t thread) {
    const auto take = [&] { return counters->next.fetch_add(1, std::memory_order_relaxed); };
    for (std::int64_t piece = take(), following; piece < pieces; piece = following) {
      following = take();
      work(Turn{piece, following < pieces ? following : -1, thread});
      if (counters->finished.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) {
        std::lock_guard<std::mutex> lock(counters->mutex);
        counters->all_finished.notify_one();
      }
    }
  };
  const std::int64_t helpers = threads - 1 < pieces - 1 ? threads - 1 : pieces - 1;
  for (std::int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([take_pieces, i] { take_pieces(i + 1); });
  }
  take_pieces(0);
  // The last piece is nearly always a matter of microseconds: look a while before sleeping.
  for (int look = 0; look < 2000; ++look) {
    if (counters->finished.load(std::memory_order_acquire) == pieces) return;
  }
  std::unique_lock<std::mutex> lock(counters->mutex);
  counters->all_finished.wait(
      lock, [&] { return counters->finished.load(std::memory_order_acquire) == pieces; });
}

}  // namespace gemma
