// Collectives of the ranks of one host, through memory that all of them have mapped.
//
// Work goes in pieces. A piece of an allreduce has one phase if it is small (each rank puts its numbers into its slot,
// and all add up all slots), two if it is large (each rank adds up its share of all slots, and all collect the shares).
// A rank announces the end of a phase by counting its `posted` up; nobody ever counts down, so there is nothing to reset.
//
// Slots are used in turn, two for each rank. That is enough: who fills a slot again has finished the piece in between,
// for which every rank had to post, and ranks post only after they have done with the piece before.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace mpillama {

constexpr size_t kLine = 128;  // what processors fetch at once: pairs of cache lines

struct alignas(kLine) Cell {
  std::atomic<uint32_t> posted;
  std::atomic<uint32_t> sleepers;  // ranks that wait for `posted` in the kernel
  std::atomic<uint64_t> what[2];   // what the rank takes the piece in each slot for
};

// Called every now and then by a rank that waits, with the ranks that it waits for; gives up by throwing.
using Watch = std::function<void(const std::vector<int>& late, bool differs)>;

class Segment {
 public:
  // `memory` is zero when the first rank gets to it. A slot holds `capacity` bytes, a multiple of kLine.
  Segment(unsigned char* memory, int rank, int size, size_t capacity, int spins);
  static size_t bytes(int size, size_t capacity) { return size * sizeof(Cell) + (2 * size_t(size) + 2) * capacity; }

  int rank() const { return rank_; }
  int size() const { return size_; }
  size_t capacity() const { return capacity_; }

  // Replaces x by the sum over the ranks, added up in the order of ranks.
  template <class T>
  void allreduce(T* x, size_t n, size_t direct, const Watch& watch);

  // An allreduce with something in between: adds up this rank's share of a piece, the range [begin, end), if it is one
  // of the first `n_carriers` ranks. Then `spread` makes whatever has become of the shares everybody's x.
  template <class T>
  T* reduce(const T* x, size_t n, int n_carriers, const Watch& watch);
  template <class T>
  void spread(T* x, size_t n, int n_carriers, const Watch& watch);
  static size_t begin(size_t n, int n_carriers, int carrier);

  // Joins rows: `out` has n_rows rows of sum(widths) bytes, x has n_rows rows of widths[rank].
  void allgather(const unsigned char* x, size_t n_rows, const std::vector<size_t>& widths, unsigned char* out,
                 const Watch& watch);

 private:
  void start(uint64_t what);
  void post();
  void wait(int peer, const Watch& watch);
  bool has_posted(int peer) const;
  unsigned char* slot(int peer) const { return slots_ + (2 * size_t(peer) + turn_) * capacity_; }
  unsigned char* shares() const { return slots_ + (2 * size_t(size_) + turn_) * capacity_; }

  Cell* cells_;
  unsigned char* slots_;
  const int rank_, size_;
  const size_t capacity_;
  const int spins_;
  uint32_t phase_ = 0;
  int turn_ = 0;
  uint64_t what_ = 0;
};

}  // namespace mpillama
