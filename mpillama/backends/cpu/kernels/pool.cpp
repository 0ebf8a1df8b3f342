#include "pool.h"

#include <chrono>
#include <stdexcept>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace mpillama {
namespace {

// Longer than what lies between two regions of a step, short enough to cost nothing when nobody asks for more.
constexpr std::chrono::microseconds spin_time{2000};
constexpr int pauses_between_looks_at_the_clock = 64;

void pause() {
#if MPILLAMA_X86
  __builtin_ia32_pause();
#elif MPILLAMA_ARM
  // "yield" does nothing on most servers' cores; this takes about as long as x86's pause.
  __asm__ volatile("isb");
#endif
}

void pin(const std::vector<int>& cores, int thread) {
#if defined(__linux__)
  if (cores.empty()) return;
  cpu_set_t* set = CPU_ALLOC(CPU_SETSIZE * 8);
  const size_t bytes = CPU_ALLOC_SIZE(CPU_SETSIZE * 8);
  CPU_ZERO_S(bytes, set);
  CPU_SET_S(cores[size_t(thread) % cores.size()], bytes, set);
  // A core that the process may not use leaves the thread where it was: slower at worst.
  pthread_setaffinity_np(pthread_self(), bytes, set);
  CPU_FREE(set);
#else
  (void)cores, (void)thread;
#endif
}

}  // namespace

Pool::Pool(int n_threads, std::vector<int> cores, Level level)
    : n_threads_(n_threads), level_(level), cores_(std::move(cores)) {
  if (n_threads < 1 || n_threads > 4096) throw std::invalid_argument("the number of threads is out of range");
  threads_.reserve(size_t(n_threads) - 1);
  for (int i = 1; i < n_threads; i++) threads_.emplace_back([this, i] { loop(i); });
  pin(cores_, 0);
}

Pool::~Pool() {
  stop_ = true;
  start();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::start() {
  done_.store(0, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst)) {
    std::lock_guard<std::mutex> guard(sleep_);
    wake_.notify_all();
  }
}

void Pool::wait() {
  // Where there are fewer cores than threads, the one that is waited for may need this core.
  for (int i = 1; done_.load(std::memory_order_acquire) != n_threads_ - 1; i++) {
    pause();
    if (i % 1024 == 0) std::this_thread::yield();
  }
}

void Pool::loop(int thread) {
  using clock = std::chrono::steady_clock;
  pin(cores_, thread);
  uint32_t seen = 0;
  for (;;) {
    clock::time_point since = clock::now();
    for (int i = 1; epoch_.load(std::memory_order_acquire) == seen; i++) {
      pause();
      if (i % pauses_between_looks_at_the_clock) continue;
      if (clock::now() - since < spin_time) {
        std::this_thread::yield();
        continue;
      }
      std::unique_lock<std::mutex> guard(sleep_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(guard, [&] { return epoch_.load(std::memory_order_seq_cst) != seen; });
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
    seen++;
    if (stop_) return;
    work_(context_, thread);
    done_.fetch_add(1, std::memory_order_release);
  }
}

}  // namespace mpillama
