// CUDA intrinsics on the emulated machine.  Only what kernels use is here: an unknown one must fail to compile.
// Left out on purpose: __activemask (promises nothing), the old shuffles without _sync, clock().
#pragma once
#include <math.h>

#include "kvb/emu/machine.h"

// ---- barriers -------------------------------------------------------------------------------------------------------
// The default argument records the caller's line, for the reports.
inline void __syncthreads(int line = __builtin_LINE()) { kvb::emu::block_barrier(false, "__syncthreads", line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return kvb::emu::block_barrier(predicate != 0, "__syncthreads_count", line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return kvb::emu::block_barrier(predicate != 0, "__syncthreads_or", line) > 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return kvb::emu::block_barrier(predicate == 0, "__syncthreads_and", line) == 0;
}
inline void __threadfence_block() {}   // one OS thread: program order is memory order
inline void __threadfence() {}

// ---- warp: only __syncwarp orders memory, shuffles and votes do not (the ThreadSanitizer build checks it) -----------
namespace kvb::emu {

KVB_EMU_OWN inline void combine_syncwarp([[maybe_unused]] Warp& warp, [[maybe_unused]] u32 members) {
  KVB_EMU_TSAN(++warp_order(warp.lane[__builtin_ctz(members)].mask).phase);
}
KVB_EMU_OWN inline void combine_ballot(Warp& warp, u32 members) {
  u32 votes = 0;
  for (u32 rest = members; rest; rest &= rest - 1)
    if (warp.lane[__builtin_ctz(rest)].in[0]) votes |= rest & -rest;
  for (u32 rest = members; rest; rest &= rest - 1) __builtin_memcpy(warp.lane[__builtin_ctz(rest)].out, &votes, 4);
}
template <bool kLargest>
KVB_EMU_OWN void combine_reduce(Warp& warp, u32 members) {
  u32 result = 0;
  for (u32 rest = members; rest; rest &= rest - 1) {
    u32 value;
    __builtin_memcpy(&value, warp.lane[__builtin_ctz(rest)].in, 4);
    result = !kLargest ? result + value : value > result ? value : result;
  }
  for (u32 rest = members; rest; rest &= rest - 1) __builtin_memcpy(warp.lane[__builtin_ctz(rest)].out, &result, 4);
}
template <class T>
KVB_EMU_OWN void combine_shuffle(Warp& warp, u32 members) {
  for (u32 rest = members; rest; rest &= rest - 1) {
    int reader = __builtin_ctz(rest);
    Lane& to = warp.lane[reader];
    if (!(members >> to.argument & 1))
      fail("%s at line %d: lane %d reads lane %d, which is not in the mask or has exited", blame(warp, reader).what,
           to.line, reader, to.argument);
    __builtin_memcpy(to.out, warp.lane[to.argument].in, sizeof(T));
  }
}
template <class T>
KVB_EMU_OWN T shuffle(u32 mask, T value, int source, const char* what, int line) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "shuffles move up to 8 bytes");
  Lane& me = my_lane();
  __builtin_memcpy(me.in, &value, sizeof(T));
  me.argument = source;
  collective(mask, combine_shuffle<T>, what, line);
  __builtin_memcpy(&value, me.out, sizeof(T));
  return value;
}
KVB_EMU_OWN inline u32 ballot(u32 mask, bool vote, const char* what, int line) {
  Lane& me = my_lane();
  me.in[0] = vote;
  collective(mask, combine_ballot, what, line);
  u32 votes;
  __builtin_memcpy(&votes, me.out, 4);
  return votes;
}
template <bool kLargest>
KVB_EMU_OWN u32 reduce(u32 mask, u32 value, const char* what, int line) {
  Lane& me = my_lane();
  __builtin_memcpy(me.in, &value, 4);
  collective(mask, combine_reduce<kLargest>, what, line);
  __builtin_memcpy(&value, me.out, 4);
  return value;
}
KVB_EMU_OWN inline int lane_id() { return int(machine.current->lane); }

}  // namespace kvb::emu

KVB_EMU_OWN inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  KVB_EMU_TSAN(auto& o = kvb::emu::warp_order(mask); char* order = &o.order[o.phase & 1]; __tsan_release(order));
  kvb::emu::collective(mask, kvb::emu::combine_syncwarp, "__syncwarp", line);
  KVB_EMU_TSAN(__tsan_acquire(order));
}
// The source lane follows the PTX rules for segments of `width` lanes; outside the segment a lane reads itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  int lane = kvb::emu::lane_id();
  return kvb::emu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync", line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  int lane = kvb::emu::lane_id(), source = lane - int(delta);
  return kvb::emu::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, "__shfl_up_sync", line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  int lane = kvb::emu::lane_id(), source = lane + int(delta);
  return kvb::emu::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, "__shfl_down_sync", line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, int line = __builtin_LINE()) {
  int lane = kvb::emu::lane_id(), source = lane ^ lane_mask;
  return kvb::emu::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, "__shfl_xor_sync", line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return kvb::emu::ballot(mask, predicate != 0, "__ballot_sync", line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return kvb::emu::ballot(mask, predicate != 0, "__any_sync", line) != 0;
}
// Of u32 alone; a GPU of compute capability 8.0 or more has them.
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  return kvb::emu::reduce<false>(mask, value, "__reduce_add_sync", line);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  return kvb::emu::reduce<true>(mask, value, "__reduce_max_sync", line);
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return kvb::emu::ballot(mask, predicate == 0, "__all_sync", line) == 0;
}

// ---- atomics: fibers are not pre-empted, so plain updates are atomic; other threads may run before one --------------
namespace kvb::emu {
template <class T, class F>
KVB_EMU_OWN T atomic_update(T* p, F next) {
  maybe_yield();
  T old = *p;
  *p = next(old);
  return old;
}
template <class T>
using Same = std::common_type_t<T>;   // so that atomicAdd(float*, 1) deduces T from the pointer only
}  // namespace kvb::emu
#define KVB_EMU_ATOMIC(name, expression)                                                        \
  template <class T>                                                                            \
  KVB_EMU_OWN T name(T* p, kvb::emu::Same<T> v) {                                               \
    return kvb::emu::atomic_update(p, [v](T old) KVB_EMU_OWN -> T { return expression; });      \
  }
KVB_EMU_ATOMIC(atomicAdd, old + v)
KVB_EMU_ATOMIC(atomicSub, old - v)
KVB_EMU_ATOMIC(atomicMin, v < old ? v : old)
KVB_EMU_ATOMIC(atomicMax, v > old ? v : old)
KVB_EMU_ATOMIC(atomicAnd, old & v)
KVB_EMU_ATOMIC(atomicOr, old | v)
KVB_EMU_ATOMIC(atomicXor, old ^ v)
KVB_EMU_ATOMIC(atomicExch, ((void)old, v))
#undef KVB_EMU_ATOMIC
template <class T>
KVB_EMU_OWN T atomicCAS(T* p, kvb::emu::Same<T> compare, kvb::emu::Same<T> v) {
  return kvb::emu::atomic_update(p, [=](T old) KVB_EMU_OWN -> T { return old == compare ? v : old; });
}

// ---- memory ---------------------------------------------------------------------------------------------------------
// Which caches they use is not modelled.
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }

// ---- integers and bits ----------------------------------------------------------------------------------------------
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
// Three bits of a nibble select a byte; the fourth, which PTX prmt takes as "repeat the sign", is ignored.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned long long bytes = (static_cast<unsigned long long>(y) << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned byte = unsigned(bytes >> (8 * (selector >> (4 * i) & 7))) & 255;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned count) {
  return unsigned(((static_cast<unsigned long long>(high) << 32) | low) >> (count & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned count) {
  return unsigned((((static_cast<unsigned long long>(high) << 32) | low) << (count & 31)) >> 32);
}
inline int __dp4a(int a, int b, int c) {   // wraps around
  unsigned sum = unsigned(c);
  for (int i = 0; i < 4; ++i)
    sum += unsigned(static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i)));
  return int(sum);
}
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return b > a ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return b > a ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return b > a ? b : a; }

// ---- float: each rounds once, which needs -ffp-contract=off ---------------------------------------------------------
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }   // the GPU's is approximate (2 ulp)
inline float __saturatef(float a) { return a >= 1.0f ? 1.0f : a > 0.0f ? a : 0.0f; }   // NaN becomes 0
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
namespace kvb::emu {
// cvt.*.s32.f32: NaN becomes 0, values out of range the nearest limit.
inline int to_int(float rounded) {
  if (rounded != rounded) return 0;
  return rounded >= 0x1p31f ? 0x7fffffff : rounded < -0x1p31f ? -0x7fffffff - 1 : int(rounded);
}
}  // namespace kvb::emu
inline unsigned __float2uint_rn(float a) {   // cvt.rni.u32.f32: NaN becomes 0, values out of range the nearest limit
  const float rounded = nearbyintf(a);
  return !(rounded > 0.f) ? 0u : rounded >= 0x1p32f ? 0xffffffffu : unsigned(rounded);
}
inline int __float2int_rn(float a) { return kvb::emu::to_int(nearbyintf(a)); }
inline int __float2int_rz(float a) { return kvb::emu::to_int(truncf(a)); }
inline int __float2int_rd(float a) { return kvb::emu::to_int(floorf(a)); }
inline int __float2int_ru(float a) { return kvb::emu::to_int(ceilf(a)); }
inline unsigned __float_as_uint(float a) {
  unsigned bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float a;
  __builtin_memcpy(&a, &bits, 4);
  return a;
}
inline int __float_as_int(float a) { return int(__float_as_uint(a)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

// cuda_fp16.h and cuda_bf16.h bring conversions, operators, minima and maxima for the host; their fused forms, roots
// and exponentials exist on the device only.
