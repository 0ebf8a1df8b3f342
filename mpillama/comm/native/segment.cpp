#include "segment.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace mpillama {

namespace {

constexpr int kYields = 16;
constexpr long kNap = 50'000'000;  // nanoseconds between two looks of the watch

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  // "yield" does nothing on most servers' cores; this takes about as long as x86's pause.
  asm volatile("isb" ::: "memory");
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  const timespec nap{0, kNap};
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &nap, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }

template <class T>
void add(T* __restrict out, const T* __restrict x, size_t n) {
  for (size_t i = 0; i < n; i++) out[i] += x[i];
}

template <class T>
void add2(T* __restrict out, const T* __restrict a, const T* __restrict b, size_t n) {
  for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

// out = slots[0] + slots[1] + ..., one after the other; in strips that stay in the nearest cache.
template <class T>
void add_all(T* out, const T* const* slots, int n_slots, size_t n) {
  constexpr size_t kStrip = 2048;
  for (size_t i = 0; i < n; i += kStrip) {
    const size_t m = std::min(kStrip, n - i);
    if (n_slots == 1) {
      std::memmove(out + i, slots[0] + i, m * sizeof(T));
      continue;
    }
    add2(out + i, slots[0] + i, slots[1] + i, m);
    for (int s = 2; s < n_slots; s++) add(out + i, slots[s] + i, m);
  }
}

enum Kind : uint64_t { kAllreduce = 1, kReduce = 2, kAllgather = 3 };
uint64_t label(Kind kind, size_t n) { return uint64_t(kind) << 60 | n; }

}  // namespace

Segment::Segment(unsigned char* memory, int rank, int size, size_t capacity, int spins)
    : cells_(reinterpret_cast<Cell*>(memory)),
      slots_(memory + size * sizeof(Cell)),
      rank_(rank),
      size_(size),
      capacity_(capacity),
      spins_(spins) {
  static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4, "a futex");
}

size_t Segment::begin(size_t n, int n_carriers, int carrier) {
  // Shares end on whole lines, so that no two ranks write the same one.
  const size_t lines = (n * 4 + kLine - 1) / kLine;
  return std::min(n, lines * size_t(carrier) / size_t(n_carriers) * (kLine / 4));
}

void Segment::start(uint64_t what) {
  turn_ ^= 1;
  what_ = what;
  cells_[rank_].what[turn_].store(what, std::memory_order_relaxed);
}

void Segment::post() {
  Cell& mine = cells_[rank_];
  mine.posted.store(++phase_);
  // Both in the one total order of such operations: either we see the sleeper, or it sees our phase.
  if (mine.sleepers.load()) wake_all(mine.posted);
}

bool Segment::has_posted(int peer) const {
  // In the order of `post`: who goes to sleep after it has said so must see a phase that was posted before.
  return int32_t(cells_[peer].posted.load() - phase_) >= 0;
}

void Segment::wait(int peer, const Watch& watch) {
  Cell& cell = cells_[peer];
  int spins = 0;
  while (!has_posted(peer)) {
    if (++spins <= spins_) {
      relax();
    } else if (spins <= spins_ + kYields) {
      sched_yield();
    } else {
      const uint32_t seen = cell.posted.load();
      cell.sleepers.fetch_add(1);
      if (!has_posted(peer)) sleep_while(cell.posted, seen);
      cell.sleepers.fetch_sub(1);
      std::vector<int> late;
      if (has_posted(peer)) break;
      for (int other = 0; other < size_; other++)
        if (!has_posted(other)) late.push_back(other);
      if (!late.empty()) watch(late, false);
    }
  }
  if (cell.what[turn_].load(std::memory_order_relaxed) != what_) watch({peer}, true);
}

template <class T>
void Segment::allreduce(T* x, size_t n, size_t direct, const Watch& watch) {
  const size_t per_piece = capacity_ / sizeof(T);
  std::vector<const T*> all(size_);
  for (size_t at = 0; at < n; at += per_piece) {
    const size_t m = std::min(per_piece, n - at);
    T* const out = x + at;
    if (m * sizeof(T) > direct) {
      reduce(out, m, size_, watch);
      spread(out, m, size_, watch);
      continue;
    }
    start(label(kAllreduce, n * sizeof(T)));
    std::memcpy(slot(rank_), out, m * sizeof(T));
    post();
    for (int peer = 0; peer < size_; peer++) {
      all[peer] = reinterpret_cast<const T*>(slot(peer));
      wait(peer, watch);
    }
    add_all(out, all.data(), size_, m);
  }
}

template <class T>
T* Segment::reduce(const T* x, size_t n, int n_carriers, const Watch& watch) {
  start(label(kReduce, n * sizeof(T)));
  std::memcpy(slot(rank_), x, n * sizeof(T));
  post();
  for (int peer = 0; peer < size_; peer++) wait(peer, watch);
  T* const share = reinterpret_cast<T*>(shares());
  if (rank_ >= n_carriers) return share;
  const size_t first = begin(n, n_carriers, rank_), last = begin(n, n_carriers, rank_ + 1);
  std::vector<const T*> all(size_);
  for (int peer = 0; peer < size_; peer++) all[peer] = reinterpret_cast<const T*>(slot(peer)) + first;
  add_all(share + first, all.data(), size_, last - first);
  return share + first;
}

template <class T>
void Segment::spread(T* x, size_t n, int n_carriers, const Watch& watch) {
  post();
  const T* const share = reinterpret_cast<const T*>(shares());
  for (int i = 0; i < n_carriers; i++) {
    // Beginning with one's own share, and not all with the same one.
    const int carrier = (rank_ + i) % n_carriers;
    wait(carrier, watch);
    const size_t first = begin(n, n_carriers, carrier), last = begin(n, n_carriers, carrier + 1);
    std::memcpy(x + first, share + first, (last - first) * sizeof(T));
  }
}

void Segment::allgather(const unsigned char* x, size_t n_rows, const std::vector<size_t>& widths, unsigned char* out,
                        const Watch& watch) {
  size_t row = 0, widest = 0;
  std::vector<size_t> column;
  for (size_t width : widths) {
    column.push_back(row);
    row += width;
    widest = std::max(widest, width);
  }
  // Each rank's rows as one string of bytes, of which [from, to) is in its slot.
  for (size_t from = 0; from < n_rows * widest; from += capacity_) {
    start(label(kAllgather, n_rows * row));
    const size_t mine = n_rows * widths[rank_];
    if (from < mine) std::memcpy(slot(rank_), x + from, std::min(capacity_, mine - from));
    post();
    for (int i = 0; i < size_; i++) {
      const int peer = (rank_ + i) % size_;
      wait(peer, watch);
      const size_t width = widths[peer], to = std::min(n_rows * width, from + capacity_);
      const unsigned char* source = slot(peer);
      for (size_t at = from; at < to;) {
        const size_t in_row = at % width, m = std::min(width - in_row, to - at);
        std::memcpy(out + at / width * row + column[peer] + in_row, source, m);
        source += m;
        at += m;
      }
    }
  }
}

template void Segment::allreduce(float*, size_t, size_t, const Watch&);
template void Segment::allreduce(double*, size_t, size_t, const Watch&);
template float* Segment::reduce(const float*, size_t, int, const Watch&);
template double* Segment::reduce(const double*, size_t, int, const Watch&);
template void Segment::spread(float*, size_t, int, const Watch&);
template void Segment::spread(double*, size_t, int, const Watch&);

}  // namespace mpillama
