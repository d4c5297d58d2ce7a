// Work in pieces on threads that come late, are busy, or share out work themselves. Built with the
// thread sanitizer.
//
//     shared_work          ends with 0 if every piece was done once before its call came back
//     shared_work faulty   has two threads change one number, which must end it
#include <chrono>
#include <cstdio>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "shared_work.h"

namespace {

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_ending_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  template <typename Task>
  void Schedule(Task&& task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.emplace_back(std::forward<Task>(task));
    }
    changed_.notify_one();
  }

 private:
  void run() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return is_ending_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool is_ending_ = false;
  std::vector<std::thread> threads_;
};

// Every piece adds one to a number of its own, which is no atomic and lies in this frame: a piece
// that is done twice, or by a thread that comes after the return, is a race or a wrong number.
bool is_done_once(Pool& pool, std::int64_t threads, std::int64_t pieces, bool is_slow) {
  std::vector<int> done(static_cast<std::size_t>(pieces), 0);
  gemma::share_work(pool, threads, pieces, [&](const gemma::Turn& turn) {
    if (is_slow) std::this_thread::sleep_for(std::chrono::microseconds(200));
    done[static_cast<std::size_t>(turn.piece)] += 1;
  });
  for (int times : done) {
    if (times != 1) return false;
  }
  return true;
}

}  // namespace

int main(int count, char**) {
  Pool pool(3);
  if (count > 1) {
    int number = 0;
    gemma::share_work(pool, 4, 64, [&](const gemma::Turn&) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      number += 1;
    });
    return 0;
  }
  long failures = 0, calls = 0;
  for (std::int64_t pieces = 0; pieces < 40; ++pieces) {
    for (std::int64_t threads : {0, 1, 2, 4, 100}) {
      for (bool is_slow : {false, true}) {
        // More often where nothing is waited for, as there threads come late.
        for (int i = 0; i < (is_slow ? 1 : 20); ++i, ++calls)
          failures += !is_done_once(pool, threads, pieces, is_slow);
      }
    }
  }
  // Every thread of the pool waits for pieces, which none but itself may be free to do.
  std::vector<int> inner(12, 0);
  gemma::share_work(pool, 4, 12, [&](const gemma::Turn& turn) {
    inner[static_cast<std::size_t>(turn.piece)] = is_done_once(pool, 4, 30, true);
  });
  for (int is_right : inner) failures += !is_right;
  std::printf("%ld calls\n", calls + 12);
  return failures == 0 ? 0 : 1;
}
