// One kernel source for CUDA (NVRTC), HIP (hipRTC) and the CPU (g++, emulate.h).
//
// The compiler is told MPL_WARP, the lanes of a warp: 32, or 64 on AMD's CDNA. No header of the toolkits is needed.
#pragma once
#ifndef MPL_WARP
#error "define MPL_WARP"
#endif
#if defined(MPL_EMULATE)
#include "emulate.h"
#elif defined(__HIP__) || defined(__HIPCC_RTC__)
#define MPL_HIP
#endif

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define MPL_INLINE static __device__ __forceinline__

#ifndef MPL_EMULATE
#define MPL_EXPORT(name)
#define MPL_DYN_SHARED(T, name)                          \
  extern __shared__ __align__(16) unsigned char smem_[]; \
  T* name = (T*)smem_
#ifdef MPL_HIP
#ifndef __align__
#define __align__(n) __attribute__((aligned(n)))
#endif
#define MPL_SHFL_XOR(v, m) __shfl_xor((v), (m), MPL_WARP)
#define MPL_SHFL(v, from) __shfl((v), (from), MPL_WARP)
// Lanes go in step; the compiler may only not move what they write and read across it.
#undef __syncwarp
#define __syncwarp()                                       \
  do {                                                     \
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront"); \
    __builtin_amdgcn_wave_barrier();                       \
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront"); \
  } while (0)
#else
#define MPL_SHFL_XOR(v, m) __shfl_xor_sync(0xffffffffu, (v), (m))
#define MPL_SHFL(v, from) __shfl_sync(0xffffffffu, (v), (from))
#endif
#endif

// -- bits and numbers

union Bits { float f; u32 u; };
MPL_INLINE float as_float(u32 u) { Bits b; b.u = u; return b.f; }
MPL_INLINE u32 as_bits(float f) { Bits b; b.f = f; return b.u; }

#define MPL_INF as_float(0x7F800000u)

MPL_INLINE float half_to_float(u16 h) {
#if defined(MPL_EMULATE)
  const u32 sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return as_float(sign | 0x7F800000u | fraction << 13);
  if (exponent) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
  return as_float(sign | as_bits((float)fraction * 5.9604644775390625e-8f));
#elif defined(MPL_HIP)
  union { u16 u; _Float16 h; } b; b.u = h; return (float)b.h;
#else
  float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f;
#endif
}

// To nearest, ties to even.
MPL_INLINE u16 float_to_half(float f) {
#if defined(MPL_EMULATE)
  const u32 bits = as_bits(f), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return (u16)(sign | 0x7E00u);
  if (size >= 0x477FF000u) return (u16)(sign | 0x7C00u);
  // Adding 1/2 shifts a subnormal's bits to where the hardware rounds them.
  if (size < 0x38800000u) return (u16)(sign | (as_bits(as_float(size) + 0.5f) - 0x3F000000u));
  return (u16)(sign | (size - 0x38000000u + 0xFFFu + (size >> 13 & 1)) >> 13);
#elif defined(MPL_HIP)
  union { u16 u; _Float16 h; } b; b.h = (_Float16)f; return b.u;
#else
  u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h;
#endif
}

MPL_INLINE float bf16_to_float(u16 h) { return as_float((u32)h << 16); }
MPL_INLINE u16 float_to_bf16(float f) {
  const u32 bits = as_bits(f);
  return (u16)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

// c plus the products of four pairs of signed bytes.
MPL_INLINE int dot4(int a, int b, int c) {
#if defined(MPL_HIP) && (defined(__gfx1100__) || defined(__gfx1101__) || defined(__gfx1102__) || defined(__gfx1103__) || \
                         defined(__gfx1150__) || defined(__gfx1151__) || defined(__gfx1152__) || defined(__gfx1153__) || \
                         defined(__gfx1200__) || defined(__gfx1201__))
  return __builtin_amdgcn_sudot4(true, a, true, b, c, false);
#elif defined(MPL_HIP) && (defined(__gfx906__) || defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx940__) || \
                           defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__) || defined(__gfx1011__) || \
                           defined(__gfx1012__) || defined(__gfx1030__) || defined(__gfx1031__) || defined(__gfx1032__) || \
                           defined(__gfx1033__) || defined(__gfx1034__) || defined(__gfx1035__) || defined(__gfx1036__))
  return __builtin_amdgcn_sdot4(a, b, c, false);
#elif defined(MPL_HIP) || defined(MPL_EMULATE)
  for (int i = 0; i < 32; i += 8) c += (int)(i8)(a >> i) * (int)(i8)(b >> i);
  return c;
#else
  return __dp4a(a, b, c);
#endif
}

// Sixteen bytes, read and written as a whole.
#if defined(MPL_HIP)
// Of structs that are copied as a whole clang makes memory.
typedef u32 Piece __attribute__((ext_vector_type(4)));
#else
struct __align__(16) Piece { u32 x, y, z, w; };
#endif
MPL_INLINE Piece piece_of(u32 x, u32 y, u32 z, u32 w) {
  Piece q;
  q.x = x, q.y = y, q.z = z, q.w = w;
  return q;
}
MPL_INLINE u32 word_of(Piece q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }

// -- copies of 16 bytes to shared memory, which go on while the thread does other things (PTX ISA, "cp.async"). Those started
// since the last `commit_copies` are a group; wait_for_copies<N> returns when all groups of this thread but the last N are there,
// and without N when all copies are: for this thread, others need a barrier too.
#if defined(MPL_EMULATE)
#define MPL_ASYNC (MPL_WARP == 32)
#elif defined(MPL_HIP) || !defined(__CUDA_ARCH__)
#define MPL_ASYNC 0
#else
#define MPL_ASYNC (__CUDA_ARCH__ >= 800)
#endif

// A place in shared memory, counted in bytes.
#if defined(MPL_EMULATE) || !MPL_ASYNC
typedef u8* SharedAt;
MPL_INLINE SharedAt shared_at(u8* p) { return p; }
#else
typedef u32 SharedAt;
MPL_INLINE SharedAt shared_at(u8* p) {
  u64 at; asm("cvta.to.shared.u64 %0, %1;" : "=l"(at) : "l"(p)); return (u32)at;
}
#endif

#if MPL_ASYNC
MPL_INLINE void copy_16(SharedAt to, const void* from) {
#if defined(MPL_EMULATE)
  emulate::copy_later(to, from);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
#endif
}
// The same, or zeros.
MPL_INLINE void copy_16(SharedAt to, const void* from, bool zeros) {
#if defined(MPL_EMULATE)
  static const u8 nothing[16] = {};
  emulate::copy_later(to, zeros ? nothing : from);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(zeros ? 0 : 16) : "memory");
#endif
}
MPL_INLINE void commit_copies() {
#if defined(MPL_EMULATE)
  emulate::commit_copies();
#else
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
template <int N> MPL_INLINE void wait_for_copies() {
#if defined(MPL_EMULATE)
  emulate::finish_copies(N);
#else
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
#endif
}
MPL_INLINE void wait_for_copies() {
#if defined(MPL_EMULATE)
  emulate::commit_copies();
  emulate::finish_copies(0);
#else
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}
#endif

// For each byte of v, 0 to 7, that byte of the table `high:low`.
MPL_INLINE u32 pick_of_8(u32 low, u32 high, u32 v) {
#if defined(MPL_HIP)
  return __builtin_amdgcn_perm(high, low, v);
#elif defined(MPL_EMULATE)
  const u64 table = (u64)high << 32 | low;
  u32 out = 0;
  for (int i = 0; i < 32; i += 8) out |= (u32)(table >> 8 * (v >> i & 7) & 255) << i;
  return out;
#else
  v = (v | v >> 4) & 0x00FF00FFu;
  return __byte_perm(low, high, (v | v >> 8) & 0xFFFFu);
#endif
}

// -- reductions; all lanes get the result. W lanes that lie next to each other work together.

#ifdef MPL_EMULATE
template <int W> MPL_INLINE float lanes_sum(float v) { return emulate::reduce<W>(v, [](float a, float b) { return a + b; }); }
template <int W> MPL_INLINE float lanes_max(float v) { return emulate::reduce<W>(v, [](float a, float b) { return fmaxf(a, b); }); }
#else
template <int W> MPL_INLINE float lanes_sum(float v) {
#pragma unroll
  for (int m = W / 2; m > 0; m /= 2) v += MPL_SHFL_XOR(v, m);
  return v;
}
template <int W> MPL_INLINE float lanes_max(float v) {
#pragma unroll
  for (int m = W / 2; m > 0; m /= 2) v = fmaxf(v, MPL_SHFL_XOR(v, m));
  return v;
}
#endif

// Over a block of whole warps; `scratch` has a float for each warp, and may be used again after it.
MPL_INLINE float block_max(float v, float* scratch) {
  const int lane = threadIdx.x % MPL_WARP, warp = threadIdx.x / MPL_WARP, n_warps = blockDim.x / MPL_WARP;
  v = lanes_max<MPL_WARP>(v);
  if (n_warps == 1) return v;
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  for (int i = 0; i < n_warps; i++) v = fmaxf(v, scratch[i]);
  __syncthreads();
  return v;
}

MPL_INLINE float block_sum(float v, float* scratch) {
  const int lane = threadIdx.x % MPL_WARP, warp = threadIdx.x / MPL_WARP, n_warps = blockDim.x / MPL_WARP;
  v = lanes_sum<MPL_WARP>(v);
  if (n_warps == 1) return v;
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = 0.f;
  for (int i = 0; i < n_warps; i++) v += scratch[i];
  __syncthreads();
  return v;
}

// -- blocks of threads that finish what others have begun

// What another block has written before it came to `is_last_block`.
MPL_INLINE float fresh(const float* p) {
#if defined(MPL_EMULATE)
  return *p;
#elif defined(MPL_HIP)
  return __hip_atomic_load(p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#else
  float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p)); return v;
#endif
}

// Whether this block of threads is the last of n that come here with a counter, which is 0 before and after that (CUDA C++
// Programming Guide, "Memory Fence Functions"). All its threads come.
MPL_INLINE bool is_last_block(int* counter, int n) {
  __shared__ int before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    before = atomicAdd(counter, 1);
    if (before == n - 1) *counter = 0;
  }
  __syncthreads();
  if (before != n - 1) return false;
  __threadfence();
  return true;
}

// -- words

// 32 of 64 bits, from bit 0 <= shift < 32 on.
MPL_INLINE u32 shift_pair(u32 low, u32 high, int shift) {
#if defined(MPL_HIP)
  return __builtin_amdgcn_alignbit(high, low, shift);
#elif defined(MPL_EMULATE)
  return (u32)(((u64)high << 32 | low) >> shift);
#else
  return __funnelshift_r(low, high, shift);
#endif
}

// A number that the compiler keeps, where it would rather work it out again each time.
#if defined(MPL_HIP) || defined(MPL_EMULATE)
#define MPL_KEEP(x)
#define MPL_KEEP_POINTER(x)
#else
#define MPL_KEEP(x) asm volatile("" : "+r"(x))
#define MPL_KEEP_POINTER(x) asm volatile("" : "+l"(x))
#endif
