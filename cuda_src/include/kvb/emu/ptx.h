// CPU bodies of the PTX wrappers that kvb/device.cuh declares and describes.
#pragma once
#include "kvb/emu/machine.h"

namespace kvb {
namespace emu {

// 16-bit float to float32 by table: the conversions of cuda_fp16.h are exact but slow on a CPU.
template <class T>
struct FloatTable {
  float value[65536];
  KVB_EMU_OWN FloatTable() {
    for (u32 bits = 0; bits < 65536; ++bits) {
      u16 half = u16(bits);
      T x;
      __builtin_memcpy(static_cast<void*>(&x), &half, 2);
      value[bits] = float(x);
    }
  }
};
template <class T>
inline const FloatTable<T> float_table;

struct MmaOperands {
  u32 a[4], b[2], d[4];
};
static_assert(sizeof(MmaOperands) <= sizeof(Lane::in), "a lane's operands fit its slot");

KVB_EMU_OWN inline void need_whole_warp(const Warp& warp, u32 members) {
  if (members == ~0u) return;
  const Lane& lane = blame(warp, __builtin_ctz(members));
  fail("%s at line %d needs all 32 lanes, has %08x", lane.what, lane.line, members);
}

// Sums in double and rounds once.  Tensor cores sum in another order and truncate: compare with a tolerance.
template <class T>
KVB_EMU_OWN void combine_mma_m16n8k16(Warp& warp, u32 members) {
  need_whole_warp(warp, members);
  double a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    MmaOperands in;
    __builtin_memcpy(&in, warp.lane[lane].in, sizeof in);
    const int g = lane >> 2, t = lane & 3;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[g + 8 * (i & 1)][2 * t + half + 8 * (i >> 1)] = float_table<T>.value[in.a[i] >> (16 * half) & 0xFFFF];
      for (int i = 0; i < 2; ++i) b[2 * t + half + 8 * i][g] = float_table<T>.value[in.b[i] >> (16 * half) & 0xFFFF];
    }
    for (int i = 0; i < 4; ++i) {
      float value;
      __builtin_memcpy(&value, &in.d[i], 4);
      d[g + 8 * (i >> 1)][2 * t + (i & 1)] = value;
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane) {
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = float(d[(lane >> 2) + 8 * (i >> 1)][2 * (lane & 3) + (i & 1)]);
    __builtin_memcpy(warp.lane[lane].out, sum, sizeof sum);
  }
}

template <class B>
KVB_EMU_OWN void combine_mma_m16n8k32(Warp& warp, u32 members) {
  need_whole_warp(warp, members);
  int a[16][32], b[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    MmaOperands in;
    __builtin_memcpy(&in, warp.lane[lane].in, sizeof in);
    const int g = lane >> 2, t = lane & 3;
    for (int byte = 0; byte < 4; ++byte) {
      for (int i = 0; i < 4; ++i)
        a[g + 8 * (i & 1)][4 * t + byte + 16 * (i >> 1)] = static_cast<i8>(in.a[i] >> (8 * byte));
      for (int i = 0; i < 2; ++i) b[4 * t + byte + 16 * i][g] = static_cast<B>(in.b[i] >> (8 * byte));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    MmaOperands in;
    __builtin_memcpy(&in, warp.lane[lane].in, sizeof in);
    for (int i = 0; i < 4; ++i)   // unsigned: wraps around
      for (int k = 0; k < 32; ++k) in.d[i] += u32(a[(lane >> 2) + 8 * (i >> 1)][k] * b[k][2 * (lane & 3) + (i & 1)]);
    __builtin_memcpy(warp.lane[lane].out, in.d, sizeof in.d);
  }
}

template <class D>
KVB_EMU_OWN void mma(D (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Combine combine, const char* what, int line) {
  Lane& me = my_lane();
  MmaOperands in;
  for (int i = 0; i < 4; ++i) in.a[i] = a[i];
  for (int i = 0; i < 2; ++i) in.b[i] = b[i];
  __builtin_memcpy(in.d, d, sizeof in.d);
  __builtin_memcpy(me.in, &in, sizeof in);
  collective(~0u, combine, what, line);
  __builtin_memcpy(d, me.out, sizeof d);
}

// Lane 8 j + r has left row r of matrix j.
KVB_EMU_OWN inline void combine_ldmatrix_x4(Warp& warp, u32 members) {
  need_whole_warp(warp, members);
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < 4; ++j)
      __builtin_memcpy(warp.lane[lane].out + 4 * j, warp.lane[8 * j + lane / 4].in + 4 * (lane % 4), 4);
}
KVB_EMU_OWN inline void combine_ldmatrix_x4_trans(Warp& warp, u32 members) {
  need_whole_warp(warp, members);
  for (int lane = 0; lane < 32; ++lane)
    for (int j = 0; j < 4; ++j)
      for (int half = 0; half < 2; ++half)
        __builtin_memcpy(warp.lane[lane].out + 4 * j + 2 * half,
                         warp.lane[8 * j + 2 * (lane % 4) + half].in + 2 * (lane / 4), 2);
}

// Lane (g, t) has left two elements of row g, and gets two of column g.
KVB_EMU_OWN inline void combine_transpose_8x8(Warp& warp, u32 members) {
  need_whole_warp(warp, members);
  for (int lane = 0; lane < 32; ++lane)
    for (int half = 0; half < 2; ++half) {
      const int row = 2 * (lane % 4) + half, column = lane / 4;
      __builtin_memcpy(warp.lane[lane].out + 2 * half, warp.lane[4 * row + column / 2].in + 2 * (column % 2), 2);
    }
}

KVB_EMU_OWN inline void check_alignment(const void* p, size_t bytes, const char* what, int line) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("%s at line %d: %p is not %zu-byte aligned", what, line, p, bytes);
}
KVB_EMU_OWN inline void check_shared(const void* p, const char* what, int line) {
  if (!in_shared(p)) fail("%s at line %d: %p is not shared memory", what, line, p);
  check_alignment(p, 16, what, line);
}
KVB_EMU_OWN inline void check_global(const void* p, size_t bytes, const char* what, int line) {
  if (in_shared(p)) fail("%s at line %d: %p is shared memory, global expected", what, line, p);
  check_alignment(p, bytes, what, line);
}

// The kernel's own accesses, so that ThreadSanitizer sees them: no KVB_EMU_OWN.
inline void copy_16(void* to, const void* from) { *static_cast<uint4*>(to) = *static_cast<const uint4*>(from); }
inline void perform(const Copy& copy) {
  if (copy.bytes == 16) return copy_16(copy.to, copy.from);
  u8 chunk[16] = {};
  for (u32 i = 0; i < copy.bytes; ++i) chunk[i] = static_cast<const u8*>(copy.from)[i];
  copy_16(copy.to, chunk);
}
// Performs the copies of all groups up to this one.
KVB_EMU_OWN inline void land(u32 newest_group) {
  Fiber& fiber = *machine.current;
  u32 kept = 0;
  for (u32 i = 0; i < fiber.copy_count; ++i) {
    const Copy copy = fiber.copies[i];
    if (int(newest_group - copy.group) < 0) fiber.copies[kept++] = copy;
    else perform(copy);
  }
  fiber.copy_count = kept;
}

KVB_EMU_OWN inline void ldmatrix_x4(u32 (&r)[4], const void* shared_row, Combine combine, const char* what, int line) {
  check_shared(shared_row, what, line);
  Lane& me = my_lane();
  copy_16(me.in, shared_row);
  collective(~0u, combine, what, line);
  __builtin_memcpy(r, me.out, 16);
}

}  // namespace emu

template <class T>
KVB_EMU_OWN void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int line = __builtin_LINE()) {
  static_assert(std::is_same<T, __half>::value || std::is_same<T, __nv_bfloat16>::value, "16-bit float inputs");
  emu::mma(d, a, b, emu::combine_mma_m16n8k16<T>, "mma_m16n8k16", line);
}
template <class B>
KVB_EMU_OWN void mma_m16n8k32(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], int line = __builtin_LINE()) {
  static_assert(std::is_same<B, i8>::value || std::is_same<B, u8>::value, "8-bit integers");
  emu::mma(d, a, b, emu::combine_mma_m16n8k32<B>, "mma_m16n8k32", line);
}

KVB_EMU_OWN inline u32 transpose_8x8(u32 x, int line = __builtin_LINE()) {
  emu::Lane& me = emu::my_lane();
  __builtin_memcpy(me.in, &x, 4);
  emu::collective(~0u, emu::combine_transpose_8x8, "transpose_8x8", line);
  __builtin_memcpy(&x, me.out, 4);
  return x;
}
KVB_EMU_OWN inline void ldmatrix_x4(u32 (&r)[4], const void* shared_row, int line = __builtin_LINE()) {
  emu::ldmatrix_x4(r, shared_row, emu::combine_ldmatrix_x4, "ldmatrix_x4", line);
}
KVB_EMU_OWN inline void ldmatrix_x4_trans(u32 (&r)[4], const void* shared_row, int line = __builtin_LINE()) {
  emu::ldmatrix_x4(r, shared_row, emu::combine_ldmatrix_x4_trans, "ldmatrix_x4_trans", line);
}

// A copy lands when its group is waited for; under a random schedule some land at once.  Both are legal, so a kernel
// that forgets to wait reads the 0xFF poison in one of them.
KVB_EMU_OWN inline void copy_async_16(void* shared, const void* global, u32 bytes, int line) {
  emu::check_shared(shared, "cp_async_16", line);
  if (bytes > 16) emu::fail("cp_async_16 at line %d: %d bytes, expected 0 to 16", line, int(bytes));
  if (bytes) emu::check_global(global, 16, "cp_async_16", line);
  emu::Fiber& fiber = *emu::machine.current;
  const emu::Copy copy{shared, global, fiber.group, bytes};
  if (emu::machine.random && emu::random_bits(1)) {
    emu::perform(copy);
  } else {
    if (fiber.copy_count == emu::kMaxCopies)
      emu::fail("cp_async_16 at line %d: more than %u copies under way", line, emu::kMaxCopies);
    fiber.copies[fiber.copy_count++] = copy;
  }
}
KVB_EMU_OWN inline void cp_async_16(void* shared, const void* global, bool valid = true, int line = __builtin_LINE()) {
  copy_async_16(shared, global, valid ? 16 : 0, line);
}
// Caches are not emulated: a policy is a number, and data that is read once is copied like any other.
inline u64 read_once_policy() { return 1; }
inline u64 plain_policy() { return 2; }
KVB_EMU_OWN inline void cp_async_16_once(void* shared, const void* global, int bytes, u64 policy,
                                         int line = __builtin_LINE()) {
  if (policy != read_once_policy() && policy != plain_policy())
    emu::fail("cp_async_16_once at line %d: not a policy", line);
  copy_async_16(shared, global, u32(bytes), line);
}
KVB_EMU_OWN inline void cp_async_commit() { ++emu::machine.current->group; }
template <int Pending>
KVB_EMU_OWN void cp_async_wait() {
  emu::land(emu::machine.current->group - 1 - Pending);
}

// Only one thread runs at a time, and sees all that others have written; ThreadSanitizer is told what a GPU promises.
KVB_EMU_OWN inline u32 take_ticket(u32* counter) {
  KVB_EMU_TSAN(__tsan_release(counter));
  const u32 taken = atomicAdd(counter, 1u);
  KVB_EMU_TSAN(__tsan_acquire(counter));
  return taken;
}
KVB_EMU_OWN inline u32 wait_for_tickets(const u32* counter, u32 tickets, int line = __builtin_LINE()) {
  emu::wait_for_blocks([=]() KVB_EMU_OWN { return *static_cast<const volatile u32*>(counter) >= tickets; },
                       "wait_for_tickets", line);
  KVB_EMU_TSAN(__tsan_acquire(const_cast<u32*>(counter)));
  return *counter;
}

KVB_EMU_OWN inline u32 load_relaxed(const u32* place) { return *static_cast<const volatile u32*>(place); }

struct alignas(16) WordPair {
  u64 first, second;
};
KVB_EMU_OWN inline void publish(u64* place, u64 word) {
  KVB_EMU_TSAN(__tsan_release(place));
  *static_cast<volatile u64*>(place) = word;
}
KVB_EMU_OWN inline void publish(WordPair* place, WordPair words) {
  publish(&place->first, words.first);
  publish(&place->second, words.second);
}
KVB_EMU_OWN inline u64 wait_for_published(const u64* place, int line = __builtin_LINE()) {
  emu::wait_for_blocks([=]() KVB_EMU_OWN { return *static_cast<const volatile u64*>(place) != 0; },
                       "wait_for_published", line);
  KVB_EMU_TSAN(__tsan_acquire(const_cast<u64*>(place)));
  return *place;
}
KVB_EMU_OWN inline WordPair wait_for_published(const WordPair* place, int line = __builtin_LINE()) {
  const u64 first = wait_for_published(&place->first, line);
  return {first, wait_for_published(&place->second, line)};
}

inline u32 permute_bytes(u32 x, u32 y, u32 selector) {
  const u64 bytes = static_cast<u64>(y) << 32 | x;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 nibble = selector >> (4 * i) & 15, byte = static_cast<u8>(bytes >> (8 * (nibble & 7)));
    result |= (nibble < 8 ? byte : byte & 128 ? 255u : 0u) << (8 * i);
  }
  return result;
}

// Within an ulp or so, where the GPU is within 2 ulp; .ftz as on the GPU, whatever the launch asks for.
inline float exp2_approx(float x) {
  float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;   // NaN stays NaN
}

inline uint4 load_once(const uint4* p, int line = __builtin_LINE()) {
  emu::check_global(p, 16, "load_once", line);
  return *p;
}
inline uint2 load_once(const uint2* p, int line = __builtin_LINE()) {
  emu::check_global(p, 8, "load_once", line);
  return *p;
}
inline u32 load_once(const u32* p, int line = __builtin_LINE()) {
  emu::check_global(p, 4, "load_once", line);
  return *p;
}
inline void prefetch_l2(const void* p, int line = __builtin_LINE()) { emu::check_global(p, 1, "prefetch_l2", line); }
inline void store_once(uint4* p, uint4 v, int line = __builtin_LINE()) {
  emu::check_global(p, 16, "store_once", line);
  *p = v;
}
inline void store_once(uint2* p, uint2 v, int line = __builtin_LINE()) {
  emu::check_global(p, 8, "store_once", line);
  *p = v;
}
inline void store_once(u32* p, u32 v, int line = __builtin_LINE()) {
  emu::check_global(p, 4, "store_once", line);
  *p = v;
}

}  // namespace kvb
