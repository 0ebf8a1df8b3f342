// Runs CUDA-like kernels on the CPU: one fiber for each thread of a block, blocks one after another.
//
// A fiber runs until its next barrier or shuffle, in an order that the launch chooses (0 forward, 1 backward, 2 random), so
// that a missing barrier changes the result in one of them. Lock-step of a warp is not modelled. Barriers that not all
// threads reach, and shuffles without all lanes of a warp, end the launch with a message instead of a hang.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))

namespace emulate {

struct Dim { unsigned x, y, z; };
constexpr size_t kStack = 64 * 1024, kSlot = 24;

struct Copy { unsigned char* to; const void* from; unsigned group; };
struct Fiber { jmp_buf at; ucontext_t start; bool made = false, done = false; Dim thread; unsigned lane, warp, group = 0; std::vector<Copy> copies; };
struct Warp {
  unsigned generation = 0, waiting = 0, alive = 0, size = 0;
  unsigned char slot[2][64][kSlot];
  float reduced[2][64], product[2][256];
  unsigned exchanged[2] = {}, reduced_at[2][64] = {}, product_at[2] = {};
};

// The fibers of one OS thread; those of earlier launches are used again, since making one costs system calls.
struct Machine {
  std::vector<Fiber*> fibers;
  std::vector<char*> stacks;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  std::vector<unsigned char> shared;
  jmp_buf home;
  unsigned n = 0, current = 0, alive = 0, waiting = 0, generation = 0, order_of_threads = 0;
  unsigned long steps = 0, random = 0;
  Dim block, block_dim, grid_dim;
  void (*body)(void*) = nullptr;
  void* arg = nullptr;
  const char* fault = nullptr;

  void grow(unsigned n_threads) {
    while (fibers.size() < n_threads) {
      fibers.push_back(new Fiber);
      stacks.push_back((char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    }
  }
  ~Machine() {
    for (auto* stack : stacks) munmap(stack, kStack);
    for (auto* fiber : fibers) delete fiber;
  }
};

inline thread_local Machine owned;
// Found without a call, and set by each launch.
inline thread_local __attribute__((tls_model("initial-exec"))) Machine* current_machine = nullptr;
#define MPL_MACHINE (*emulate::current_machine)

inline void pause() {
  Machine& m = MPL_MACHINE;
  if (_setjmp(m.fibers[m.current]->at) == 0) _longjmp(m.home, 1);
}

inline void fiber_main() {
  for (;;) {
    MPL_MACHINE.body(MPL_MACHINE.arg);
    MPL_MACHINE.fibers[MPL_MACHINE.current]->done = true;
    pause();
  }
}

inline void resume(unsigned i) {
  Machine& m = MPL_MACHINE;
  m.current = i;
  if (_setjmp(m.home)) return;
  Fiber& f = *m.fibers[i];
  if (f.made) _longjmp(f.at, 1);
  f.made = true;
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = m.stacks[i];
  f.start.uc_stack.ss_size = kStack;
  f.start.uc_link = nullptr;
  makecontext(&f.start, fiber_main, 0);
  setcontext(&f.start);
}

// Thread `k` of this round.
inline unsigned pick(unsigned k, unsigned order) {
  Machine& m = MPL_MACHINE;
  if (order == 1) return m.n - 1 - k;
  if (order == 0) return k;
  if (k == 0)
    for (unsigned i = m.n; i > 1; i--) {
      m.random = m.random * 6364136223846793005ul + 1442695040888963407ul;
      std::swap(m.order[i - 1], m.order[(m.random >> 33) % i]);
    }
  return m.order[k];
}

inline bool run_block(unsigned order) {
  Machine& m = MPL_MACHINE;
  for (auto& w : m.warps) w.waiting = 0, w.alive = w.size;
  for (unsigned i = 0; i < m.n; i++) m.fibers[i]->done = false, m.fibers[i]->copies.clear();
  m.alive = m.n;
  m.waiting = 0;
  while (m.alive) {
    const unsigned long before = m.steps;
    for (unsigned k = 0; k < m.n; k++) {
      const unsigned i = pick(k, order);
      if (m.fibers[i]->done) continue;
      resume(i);
      if (m.fault) return false;
      if (!m.fibers[i]->done) continue;
      if (!m.fibers[i]->copies.empty()) { m.fault = "a thread ends before its copies"; return false; }
      m.steps++, m.alive--, m.warps[m.fibers[i]->warp].alive--;
      if (m.waiting && m.waiting == m.alive) m.waiting = 0, m.generation++;
    }
    if (m.alive && m.steps == before) {
      m.fault = "a barrier or shuffle that not all threads reach";
      return false;
    }
  }
  return true;
}

inline void block_barrier() {
  Machine& m = MPL_MACHINE;
  const unsigned generation = m.generation;
  m.steps++;
  if (++m.waiting == m.alive) m.waiting = 0, m.generation++;
  while (m.generation == generation) pause();
}

// Puts a value into this lane's slot and returns the slots of the warp once all lanes have.
template <class T> inline unsigned char (*exchange(T value))[kSlot] {
  static_assert(sizeof(T) <= kSlot, "one slot");
  Machine& m = MPL_MACHINE;
  Fiber& f = *m.fibers[m.current];
  Warp& w = m.warps[f.warp];
  if (w.alive != MPL_WARP) { m.fault = "a shuffle in a warp that has lost lanes"; pause(); }
  const unsigned generation = w.generation;
  // Two sets of slots: the next exchange may begin before all have read this one's.
  auto* slots = w.slot[generation & 1];
  memcpy(slots[f.lane], &value, sizeof value);
  m.steps++;
  if (++w.waiting == w.alive) w.waiting = 0, w.exchanged[generation & 1] = ++w.generation;
  while (w.generation == generation) pause();
  return slots;
}

template <class T> inline T shuffle(T value, unsigned from) {
  T result;
  memcpy(&result, exchange(value)[from % MPL_WARP], sizeof result);
  return result;
}

inline unsigned lane() { return MPL_MACHINE.fibers[MPL_MACHINE.current]->lane; }

// The butterfly that GPUs run: one exchange instead of five or six, and worked out by the first lane that gets here.
template <int W, class F> inline float reduce(float value, F f) {
  auto* slots = exchange(value);
  const Fiber& fiber = *MPL_MACHINE.fibers[MPL_MACHINE.current];
  Warp& w = MPL_MACHINE.warps[fiber.warp];
  const unsigned set = slots == w.slot[1], group = fiber.lane / W;
  if (w.reduced_at[set][group] != w.exchanged[set]) {
    float v[W];
    for (int i = 0; i < W; i++) memcpy(&v[i], slots[group * W + i], 4);
    for (int m = W / 2; m > 0; m /= 2)
      for (int i = 0; i < m; i++) v[i] = f(v[i], v[i ^ m]);
    w.reduced[set][group] = v[0];
    w.reduced_at[set][group] = w.exchanged[set];
  }
  return w.reduced[set][group];
}

// A product of the whole warp, up to 16 x 16 numbers, from the slots of an exchange: worked out by the first lane that gets here.
template <class F> inline const float* product(unsigned char (*slots)[kSlot], F f) {
  Warp& w = MPL_MACHINE.warps[MPL_MACHINE.fibers[MPL_MACHINE.current]->warp];
  const unsigned set = slots == w.slot[1];
  if (w.product_at[set] != w.exchanged[set]) f(w.product[set]), w.product_at[set] = w.exchanged[set];
  return w.product[set];
}

// A copy of 16 bytes that may be done at any time until its thread waits for it: at once in order 0, else at the latest, and then
// what was there before is gone at once.
inline void copy_later(unsigned char* to, const void* from) {
  Machine& m = MPL_MACHINE;
  Fiber& f = *m.fibers[m.current];
  f.copies.push_back({to, from, f.group});
  if (m.order_of_threads) memset(to, 0xFD, 16);
  else memcpy(to, from, 16);
}
inline void commit_copies() { MPL_MACHINE.fibers[MPL_MACHINE.current]->group++; }
// Waits for all groups but the last n.
inline void finish_copies(unsigned n) {
  Machine& m = MPL_MACHINE;
  Fiber& f = *m.fibers[m.current];
  auto open = f.copies.begin();
  for (; open != f.copies.end() && open->group + n < f.group; open++)
    if (m.order_of_threads) memcpy(open->to, open->from, 16);
  f.copies.erase(f.copies.begin(), open);
}

// -- launching

template <class T> constexpr char code() {
  using U = std::remove_cv_t<T>;
  if (std::is_same_v<U, float>) return 'f';
  if (std::is_same_v<U, double>) return 'd';
  if (std::is_same_v<U, int>) return 'i';
  if (std::is_same_v<U, long long>) return 'l';
  if (std::is_same_v<U, unsigned char>) return 'B';
  if (std::is_same_v<U, unsigned short>) return 'H';
  return '?';
}
template <class T> void describe(std::vector<char>& out) {
  if constexpr (std::is_pointer_v<T>) out.push_back('*'), out.push_back(code<std::remove_pointer_t<T>>());
  else out.push_back(code<T>());
}
template <class... A> int signature(void (*)(A...), char* out, int size) {
  std::vector<char> text;
  (describe<A>(text), ...);
  text.push_back(0);
  if ((int)text.size() > size) return 1;
  memcpy(out, text.data(), text.size());
  return 0;
}
template <class... A, size_t... I> void call(void (*kernel)(A...), void** a, std::index_sequence<I...>) {
  kernel(*(std::remove_const_t<A>*)a[I]...);
}

// `how`: grid x y z, block x y z, order, seed.
template <class... A> const char* launch(void (*kernel)(A...), const unsigned* how, size_t shared, void** args) {
  struct Call { void (*kernel)(A...); void** args; } c{kernel, args};
  current_machine = &owned;
  Machine& m = MPL_MACHINE;
  m.grid_dim = {how[0], how[1], how[2]};
  m.block_dim = {how[3], how[4], how[5]};
  m.n = how[3] * how[4] * how[5];
  m.random = how[7];
  m.order_of_threads = how[6];
  m.grow(m.n);
  m.warps.assign((m.n + MPL_WARP - 1) / MPL_WARP, Warp{});
  m.order.resize(m.n);
  m.shared.resize(shared + 64);
  for (unsigned i = 0; i < m.n; i++) {
    m.order[i] = i;
    Fiber& f = *m.fibers[i];
    f.thread = {i % how[3], i / how[3] % how[4], i / (how[3] * how[4])};
    f.lane = i % MPL_WARP, f.warp = i / MPL_WARP;
    m.warps[f.warp].size++;
  }
  m.body = [](void* p) { call(((Call*)p)->kernel, ((Call*)p)->args, std::index_sequence_for<A...>{}); };
  m.arg = &c;
  m.fault = nullptr;
  for (unsigned z = 0; z < how[2]; z++)
    for (unsigned y = 0; y < how[1]; y++)
      for (unsigned x = 0; x < how[0]; x++) {
        m.block = {x, y, z};
        memset(m.shared.data(), 0xCD, m.shared.size());
        if (run_block(how[6])) continue;
        // What hangs in a kernel cannot be used again.
        for (unsigned i = 0; i < m.n; i++) m.fibers[i]->made = false;
        return m.fault;
      }
  return nullptr;
}

}  // namespace emulate

#define threadIdx (MPL_MACHINE.fibers[MPL_MACHINE.current]->thread)
#define blockIdx (MPL_MACHINE.block)
#define blockDim (MPL_MACHINE.block_dim)
#define gridDim (MPL_MACHINE.grid_dim)
#define __syncthreads() emulate::block_barrier()
#define __threadfence() ((void)0)
#define __syncwarp() ((void)emulate::exchange(0))
#define MPL_SHFL_XOR(v, m) emulate::shuffle((v), emulate::lane() ^ (unsigned)(m))
#define MPL_SHFL(v, from) emulate::shuffle((v), (unsigned)(from))
#define MPL_DYN_SHARED(T, name) T* name = (T*)(((uintptr_t)MPL_MACHINE.shared.data() + 15) & ~(uintptr_t)15)
#define MPL_EXPORT(name)                                                                                  \
  extern "C" const char* name##__launch(const unsigned* how, size_t shared, void** args) {                \
    return emulate::launch(name, how, shared, args);                                                      \
  }                                                                                                       \
  extern "C" int name##__signature(char* out, int size) { return emulate::signature(name, out, size); }

// One fiber at a time: no other thread can come between.
template <class T> inline T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
