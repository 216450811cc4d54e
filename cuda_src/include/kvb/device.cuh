// The one header that every kernel file includes.  It makes the same text valid for three compilers:
//   NVRTC (through CuPy, at run time), nvcc (ahead of time, -DKVB_NATIVE), g++ (-DKVB_EMULATE: one fiber per thread).
// PTX stands here alone, each wrapper with a CPU body in kvb/emu/ptx.h and a test in tests/test_emulator.py.
// No host header may be included on the device side: NVRTC has none of them.
#pragma once

#if !defined(KVB_EMULATE)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace kvb {
// NVRTC has no <cstdint>; CUDA's 64-bit atomics want `unsigned long long`, which uint64_t is not on Linux.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i32 = int;
}  // namespace kvb

#if defined(KVB_EMULATE)
#include "kvb/emu/machine.h"
#include "kvb/emu/intrinsics.h"
#include "kvb/emu/ptx.h"
#endif

// ---- shared memory --------------------------------------------------------------------------------------------------
// KVB_SHARED(float, tile, [32][33])   a static array, 16-byte aligned;   KVB_SHARED(int, counter)   a static scalar
// KVB_DYNAMIC_SHARED(float, buffer)   the block's dynamic shared memory as a float*
// On a GPU it begins at a multiple of kSharedLine bytes, whatever static variables there are.  Asynchronous copies want
// whole lines: 16 bytes further on, a kernel that does nothing but copy was 6 % slower on an H100.
#if defined(KVB_EMULATE)
#define KVB_SHARED(type, name, ...)  \
  static char kvb_key_of_##name;     \
  auto& name = ::kvb::emu::shared_variable<type __VA_ARGS__>(&kvb_key_of_##name, #name)
#define KVB_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::kvb::emu::dynamic_shared())
#else
#define KVB_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define KVB_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char kvb_dynamic_shared_[]; \
  type* name = reinterpret_cast<type*>(kvb_dynamic_shared_)
#endif

namespace kvb {

// A kernel that is launched `early` (kvbench/loaders.py) may begin when all blocks of the one before it in its stream
// have called let_next_start(), or have ended.  Until all its threads have called wait_for_earlier() it reads nothing
// that the one before it writes, and writes nothing.  Where kernels cannot begin early both do nothing.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr int kSharedLine = 128;
// The bytes that `bytes` take of whole lines.
__device__ __forceinline__ constexpr int whole_lines(int bytes) {
  return (bytes + kSharedLine - 1) / kSharedLine * kSharedLine;
}

// x, kept in a register: a shuffle is not computed a second time, as cheap arithmetic is when registers are scarce.
// The whole warp calls it.
template <class T>
__device__ __forceinline__ T pinned(T x) {
  return __shfl_sync(0xffffffffu, x, threadIdx.x % 32);
}

// threadIdx.x and blockIdx.
struct ThreadPlace {
  u32 thread, x, y, z;
};
__device__ __forceinline__ ThreadPlace thread_place() { return {threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z}; }
// The same, read again: what was computed from them before need not be kept in registers for it.
__device__ __forceinline__ ThreadPlace thread_place_again() {
  ThreadPlace place = thread_place();
#if !defined(KVB_EMULATE)
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(place.thread));
  asm volatile("mov.u32 %0, %ctaid.x;" : "=r"(place.x));
  asm volatile("mov.u32 %0, %ctaid.y;" : "=r"(place.y));
  asm volatile("mov.u32 %0, %ctaid.z;" : "=r"(place.z));
#endif
  return place;
}
}  // namespace kvb

// ---- the list of kernel instances -----------------------------------------------------------------------------------
// KVB_EXPORT(registers, kvb::some_kernel<float, 128>) at the end of a .cu file, outside namespaces.  `registers` is the
// tested limit per thread.  nvcc and g++ register the instance with the module they build; NVRTC is asked for single
// instances by name and needs no list.
#if defined(KVB_EMULATE) || defined(KVB_NATIVE)
#include "kvb/export.h"
#define KVB_EXPORT_JOIN_(a, b) a##b
#define KVB_EXPORT_NAME_(counter) KVB_EXPORT_JOIN_(kvb_exported_, counter)
#define KVB_EXPORT(registers, ...) \
  static ::kvb::ExportedKernel KVB_EXPORT_NAME_(__COUNTER__)(#__VA_ARGS__, registers, &__VA_ARGS__);
#else
#define KVB_EXPORT(registers, ...)
#endif

// ---- PTX wrappers ---------------------------------------------------------------------------------------------------
#if !defined(KVB_EMULATE)
namespace kvb {

// d[16x8] += a[16x16] b[16x8] on one warp: T inputs (__half or __nv_bfloat16), float32 sums.  Fragments as in the PTX
// ISA, with g = lane / 4 and t = lane % 4:
//   a[i]: row g + 8 (i & 1), columns 2t, 2t + 1 (+ 8 for i >= 2)      b[i]: rows 2t, 2t + 1 (+ 8 for i = 1), column g
//   d[i]: row g + 8 (i >> 1), column 2t + (i & 1)
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[16x8] += a[16x32] b[32x8] on one warp: int8 a, B (i8 or u8) b, int32 sums that wrap around.
//   a[i]: row g + 8 (i & 1), columns 4t .. 4t + 3 (+ 16 for i >= 2)
//   b[i]: rows 4t .. 4t + 3 (+ 16 for i = 1), column g
template <class B>
__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k32<i8>(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k32<u8>(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8x8 matrices of 16-bit elements from shared memory: lane 8 j + r passes the 16-byte aligned address of
// row r of matrix j; r[j] receives the elements 2t and 2t + 1 of row g of matrix j (of its transpose for _trans).
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<u32>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<u32>(__cvta_generic_to_shared(shared_row)))
               : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements held by the warp: lane (g, t) = (lane / 4, lane % 4) gives elements 2t
// and 2t + 1 of row g, and receives elements 2t and 2t + 1 of column g.
__device__ __forceinline__ u32 transpose_8x8(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Asynchronous copy of 16 bytes from global to shared memory, both addresses 16-byte aligned.  Not `valid`: the 16
// bytes of shared memory become zero and global memory is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// The same for data that is read once: 128 bytes are fetched from memory at a time, and the policy tells when it leaves
// the L2 cache: first, or like other data.  Only the first `bytes` (0 to 16) are read; the others become zero.
__device__ __forceinline__ u64 read_once_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ u64 plain_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void cp_async_16_once(void* shared, const void* global, int bytes, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most `Pending` of this thread's newest groups are still under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Byte i of the result is byte (nibble i of selector) & 7 of the eight bytes of x (0-3) and y (4-7); where bit 3 of the
// nibble is set, eight copies of that byte's top bit.  One instruction, where __byte_perm may need a second to clear
// bit 3.
__device__ __forceinline__ u32 permute_bytes(u32 x, u32 y, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(selector));
  return d;
}

// Adds one to *counter and returns what it was.  What this thread has written before (and, through a barrier before,
// its block) is seen by whoever takes a later ticket; this thread (and its block, through a barrier after) sees what
// those with earlier tickets had written.
__device__ __forceinline__ u32 take_ticket(u32* counter) {
  u32 taken;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(taken) : "l"(counter) : "memory");
  return taken;
}
// Waits until so many tickets have been taken, and returns how many have; what their takers wrote before is seen then.
// For cooperative launches (kvbench/loaders.py), whose blocks are all on the GPU at the same time: those of another
// launch may wait forever.
__device__ __forceinline__ u32 wait_for_tickets(const u32* counter, u32 tickets) {
  u32 taken;
  do {
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(taken) : "l"(counter) : "memory");
  } while (taken < tickets);
  return taken;
}

// What others may have stored, without waiting for it: neither it nor what they wrote before need be seen.
__device__ __forceinline__ u32 load_relaxed(const u32* place) {
  u32 word;
  asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(word) : "l"(place) : "memory");
  return word;
}

// Stores words other than 0 for those who wait for them: they see what this thread has written before (and, through a
// barrier before, its block).
struct alignas(16) WordPair {
  u64 first, second;
};
__device__ __forceinline__ void publish(u64* place, u64 word) {
  asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(place), "l"(word) : "memory");
}
__device__ __forceinline__ void publish(WordPair* place, WordPair words) {
  asm volatile("st.release.gpu.v2.u64 [%0], {%1, %2};" ::"l"(place), "l"(words.first), "l"(words.second) : "memory");
}
// Waits until they have been published, and returns them.  For cooperative launches, too.
__device__ __forceinline__ u64 wait_for_published(const u64* place) {
  u64 word;
  do {
    asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(word) : "l"(place) : "memory");
  } while (word == 0);
  return word;
}
__device__ __forceinline__ WordPair wait_for_published(const WordPair* place) {
  WordPair words;
  do {   // one of them may be seen first
    asm volatile("ld.acquire.gpu.v2.u64 {%0, %1}, [%2];" : "=l"(words.first), "=l"(words.second) : "l"(place)
                 : "memory");
  } while (words.first == 0 || words.second == 0);
  return words;
}

// 2^x within 2 ulp; subnormal arguments and results count as zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Loads of data that nobody writes during the kernel and that are used once: they leave the L1 cache to others.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_once(const uint2* p) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ u32 load_once(const u32* p) {
  u32 v;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// Fetches the line of 128 bytes that p points into from memory to the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Stores of results that this kernel does not read again: first to leave the caches.
__device__ __forceinline__ void store_once(uint4* p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_once(uint2* p, uint2 v) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_once(u32* p, u32 v) {
  asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

}  // namespace kvb
#endif
