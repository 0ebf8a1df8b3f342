// Threads that wait for short pieces of work. The caller is thread 0.
//
// Not to be included by files compiled for one instruction set: the linker keeps one copy of each inline function, and
// that must not be one which needs AVX512.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "level.h"
#include "pages.h"

namespace mpillama {

// Grow-only memory for temporaries, aligned to a cache line.
class Scratch {
 public:
  // At least `bytes`, which stay valid until the next call; what was there before is lost.
  void* get(size_t bytes) {
    if (bytes > size_) {
      pages_.reset();
      size_ = 0;
      const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      pages_.reset(new Pages(size));
      size_ = size;
    }
    return pages_ ? pages_->data() : nullptr;
  }

 private:
  std::unique_ptr<Pages> pages_;
  size_t size_ = 0;
};


class Pool {
 public:
  // Thread i is pinned to cores[i % size]; an empty list pins nothing. The calling thread is pinned as thread 0.
  Pool(int n_threads, std::vector<int> cores, Level level);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return n_threads_; }
  Level level() const { return level_; }

  // Temporaries of whole calls; used only by the one call that runs (see `lock`).
  Scratch& scratch(int i) { return scratch_[i]; }

  // Held by a call from start to end, so that callers on several Python threads take turns.
  class Turn {
   public:
    explicit Turn(Pool& pool) : pool_(pool), lock_(pool.calls_), began_(Clock::now()) {}
    ~Turn() {
      const auto passed = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - began_);
      pool_.busy_ns_.fetch_add(uint64_t(passed.count()), std::memory_order_relaxed);
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    using Clock = std::chrono::steady_clock;
    Pool& pool_;
    std::unique_lock<std::mutex> lock_;
    const Clock::time_point began_;
  };
  Turn lock() { return Turn(*this); }

  // Nanoseconds of all turns so far.
  uint64_t busy_ns() const { return busy_ns_.load(std::memory_order_relaxed); }

  // Calls f(thread) once on every thread and waits for all. f must not throw.
  template <class F>
  void run(F&& f) {
    if (n_threads_ == 1) {
      f(0);
      return;
    }
    using Function = std::remove_reference_t<F>;
    work_ = [](void* context, int thread) { (*static_cast<Function*>(context))(thread); };
    context_ = const_cast<void*>(static_cast<const void*>(&f));
    start();
    f(0);
    wait();
  }

  // Calls f(begin, end) for ranges of at most `grain` that cover [0, n), on whichever thread is free.
  template <class F>
  void parallel_for(size_t n, size_t grain, F&& f) {
    grain = std::max<size_t>(1, grain);
    if (n_threads_ == 1 || n <= grain) {
      for (size_t i = 0; i < n; i += grain) f(i, std::min(n, i + grain));
      return;
    }
    std::atomic<size_t> next{0};
    run([&](int) {
      for (size_t i; (i = next.fetch_add(grain, std::memory_order_relaxed)) < n;) f(i, std::min(n, i + grain));
    });
  }

  // The same for ranges that become smaller: half of a fair share of what is left, at least `least` and at most `most`. Few
  // beginnings, and little to wait for at the end.
  template <class F>
  void parallel_for_shrinking(size_t n, size_t least, size_t most, F&& f) {
    const size_t divisor = 2 * size_t(n_threads_);
    least = std::max<size_t>(1, least);
    std::atomic<size_t> next{0};
    const auto work = [&](int) {
      for (size_t begin = next.load(std::memory_order_relaxed); begin < n;) {
        const size_t end = std::min(n, begin + std::max(least, std::min(most, (n - begin) / divisor)));
        if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        f(begin, end);
        begin = next.load(std::memory_order_relaxed);
      }
    };
    if (n_threads_ == 1 || n <= least) {
      work(0);
    } else {
      run(work);
    }
  }

 private:
  void start();
  void wait();
  void loop(int thread);

  const int n_threads_;
  const Level level_;
  std::vector<int> cores_;
  std::mutex calls_;
  std::atomic<uint64_t> busy_ns_{0};
  Scratch scratch_[4];

  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  bool stop_ = false;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace mpillama
