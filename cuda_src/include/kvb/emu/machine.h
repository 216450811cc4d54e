// The emulated machine: one block of CUDA threads at a time, each thread a fiber of one OS thread.  The blocks of a
// cooperative launch take turns: one gives way to the next where all of its threads wait for other blocks.
//
// What it checks: index arithmetic, packing, tails, barriers, warp collectives, memory bounds, use of shared memory
// before it is written, missing waits on asynchronous copies.  What it does not: memory ordering between blocks (but
// ThreadSanitizer does, in a cooperative launch), occupancy, bank conflicts, rounding inside tensor cores, anything
// about speed.
//
// A fiber gives up the CPU only where a CUDA thread waits for others.  With seed 0 the lowest ready thread runs next;
// any other seed picks at random, so that a missing barrier changes the result.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "kvb/emu/fiber.h"
#include "kvb/emu/guard.h"
#include "kvb/export.h"

// NVIDIA's own type headers compile with g++ and bring __half, __nv_bfloat16, float4, dim3, ...
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// These must not compile: they would silently become one variable per process.
#define __shared__ use_the_macro_KVB_SHARED_instead_of_
#define __constant__ use_a_constexpr_array_or_an_argument_instead_of_

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace kvb::emu {

constexpr u32 kMaxThreads = 1024, kMaxSharedVariables = 32, kMaxCopies = 256;
constexpr u32 kCooperativeThreads = 4 * kMaxThreads;    // of all blocks: ThreadSanitizer knows at most 8128 fibers
constexpr size_t kSharedBytes = 227 * 1024, kStaticSharedBytes = 48 * 1024;   // limits of sm_90
constexpr size_t kDynamicSlot = 256 * 1024, kStaticSlot = 64 * 1024;          // address space, with room for the guards
constexpr size_t kSharedSpace = kDynamicSlot + kMaxSharedVariables * kStaticSlot;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif

struct Warp;
using Combine = void (*)(Warp&, u32 members);

struct Lane {                      // one lane's part in a warp collective
  alignas(16) Byte in[48];
  alignas(16) Byte out[16];
  int argument;                    // shuffle: source lane
  u32 mask;
  Combine combine;
  const char* what;                // the call, for reports
  int line;
};
struct Warp {
  Lane lane[32];
  u32 ready, alive, in_collective, at_barrier;   // bit per lane
  u32 waiting_for_blocks;                        // the same
  // Addresses that name orderings to ThreadSanitizer: of the block's barriers (those of its first warp) and, one entry
  // per mask, of __syncwarp.  Barriers alternate between two, or a thread that wakes late would seem ordered after one
  // that has already reached the next barrier.
  char barrier_order[2];
  struct Order {
    u32 mask, phase;
    char order[2];
  } order[8];
};
struct Copy {                      // a cp.async that has been issued and has not landed
  void* to;
  const void* from;
  u32 group;
  u32 bytes;                       // of 16; the others become zero
};
struct Fiber {
  Context context;
  uint3 thread;
  u32 warp, lane;
  const char* waits_in;
  int line;                        // of the call it waits in
  Copy copies[kMaxCopies];
  u32 copy_count, group;
};
struct SharedVariable {
  const void* key;                 // address of the kernel's static key; nullptr: dynamic shared memory
  const char* name;
  Guarded memory;
};

// What belongs to one block; the blocks of a cooperative launch take turns in the machine with theirs.
struct BlockState {
  u32 slot;                        // in what the blocks of a launch share: fibers, warps, stacks, address space
  Fiber* fiber;                    // of each of its threads
  Warp* warp;
  u32 ready_warps, exited;
  // block barrier
  u32 barrier_arrived, barrier_phase;
  int barrier_line, barrier_votes, barrier_result;
  // shared memory: address space for the dynamic part, then one slot for each static variable in order of first use
  Byte* shared_space;
  SharedVariable dynamic_shared;
  SharedVariable shared_variable[kMaxSharedVariables];
  u32 shared_variables;
  size_t static_shared_bytes;
};

struct Machine : BlockState {
  Context scheduler;
  Context* switched_from;          // by the latest switch
  Fiber* current;
  const ExportedKernel* kernel;
  void** values;                   // of its arguments
  u32 threads;                     // of a block
  // cooperative launches: how often a thread has begun or ended to wait for other blocks
  bool cooperative;
  u64 steps;
  // schedule
  u64 random_state;
  bool random;
  char error[1024];
  char start_order, exit_order;    // addresses that name orderings to ThreadSanitizer
};
// One machine per library, not thread-safe: callers keep the GIL (or a lock) during a launch.  Build libraries with
// -fvisibility=hidden, or the loader merges the machines of all of them (GNU unique symbols).
inline Machine machine;
inline Fiber fibers[kCooperativeThreads];   // most are never touched, and take no memory
inline Warp warps[kCooperativeThreads];     // as many as there are blocks of one thread

// ---- switching and failing ------------------------------------------------------------------------------------------
KVB_EMU_OWN inline void to_scheduler() {
  machine.switched_from = &machine.current->context;
  switch_context(machine.current->context, machine.scheduler);
}
KVB_EMU_OWN inline void to_fiber(Context& from, Fiber& fiber) {
  machine.switched_from = &from;
  machine.current = &fiber;
  threadIdx = fiber.thread;
  switch_context(from, fiber.context);
}

// "kvb::some_kernel<128>: block (0,0,0) thread (5,0,0): ..."; without a thread where the whole block is at fault.
KVB_EMU_OWN inline void set_error(bool name_thread, const char* format, va_list arguments) {
  char* const end = machine.error + sizeof machine.error;
  char* at = machine.error;
  at += std::snprintf(at, size_t(end - at), "%.400s: block (%u,%u,%u)", machine.kernel->name.c_str(), blockIdx.x,
                      blockIdx.y, blockIdx.z);
  if (name_thread)
    at += std::snprintf(at, size_t(end - at), " thread (%u,%u,%u)", threadIdx.x, threadIdx.y, threadIdx.z);
  at += std::snprintf(at, size_t(end - at), ": ");
  std::vsnprintf(at, size_t(end - at), format, arguments);
}
__attribute__((format(printf, 1, 2))) KVB_EMU_OWN inline void fail_block(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  set_error(false, format, arguments);
  va_end(arguments);
}
// Ends the launch from inside a fiber.  The fibers are abandoned, not unwound: kernels own nothing.
[[noreturn]] __attribute__((format(printf, 1, 2))) KVB_EMU_OWN inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  set_error(true, format, arguments);
  va_end(arguments);
  KVB_EMU_TSAN(__tsan_release(&machine.exit_order));
  to_scheduler();
  std::abort();   // never resumed
}

// ---- random choices -------------------------------------------------------------------------------------------------
KVB_EMU_OWN inline u32 random_bits(u32 count) {   // xorshift64*, by Marsaglia and Vigna
  machine.random_state ^= machine.random_state >> 12;
  machine.random_state ^= machine.random_state << 25;
  machine.random_state ^= machine.random_state >> 27;
  return u32((machine.random_state * 0x2545F4914F6CDD1Dull) >> (64 - count));
}
KVB_EMU_OWN inline u32 pick(u32 set) {            // one member of a non-empty bit set
  if (!machine.random) return u32(__builtin_ctz(set));
  u32 k = random_bits(5);
  u32 rotated = (set >> k) | (set << ((32 - k) & 31));
  return (u32(__builtin_ctz(rotated)) + k) & 31;
}

// ---- waiting and waking ---------------------------------------------------------------------------------------------
KVB_EMU_OWN inline void wake(u32 warp, u32 lanes) {
  if (!lanes) return;
  machine.warp[warp].ready |= lanes;
  machine.ready_warps |= 1u << warp;
}
// Takes the next ready thread of the schedule; there must be one.
KVB_EMU_OWN inline Fiber& next_ready() {
  const u32 w = pick(machine.ready_warps), lane = pick(machine.warp[w].ready);
  machine.warp[w].ready &= ~(1u << lane);
  if (!machine.warp[w].ready) machine.ready_warps &= ~(1u << w);
  return machine.fiber[w * 32 + lane];
}
// Runs other threads until this one is ready and its turn comes.
KVB_EMU_OWN inline void wait(const char* what, int line) {
  Fiber& me = *machine.current;
  me.waits_in = what;
  me.line = line;
  if (!machine.ready_warps) return to_scheduler();   // the block has ended or is stuck
  Fiber& next = next_ready();
  if (&next != &me) to_fiber(me.context, next);
}
// Lets other threads run first; under a random schedule only, so that in-order runs stay fast.
KVB_EMU_OWN inline void maybe_yield() {
  if (!machine.random || random_bits(2)) return;
  wake(machine.current->warp, 1u << machine.current->lane);
  wait("yield", 0);
}

// Lets other blocks run until ready().
template <class Ready>
KVB_EMU_OWN inline void wait_for_blocks(const Ready& ready, const char* what, int line) {
  ++machine.steps;
  while (!ready()) {
    if (!machine.cooperative)
      fail("%s at line %d waits for other blocks in a launch that is not cooperative", what, line);
    machine.warp[machine.current->warp].waiting_for_blocks |= 1u << machine.current->lane;
    wait(what, line);
  }
  ++machine.steps;
}

// ---- block barrier: counts arrivals; threads that have exited no longer count ---------------------------------------
KVB_EMU_OWN inline void try_release_barrier() {
  if (!machine.barrier_arrived || machine.barrier_arrived + machine.exited < machine.threads) return;
  machine.barrier_arrived = 0;
  ++machine.barrier_phase;
  machine.barrier_result = machine.barrier_votes;
  machine.barrier_votes = 0;
  for (u32 w = 0; w * 32 < machine.threads; ++w) {
    wake(w, machine.warp[w].at_barrier);
    machine.warp[w].at_barrier = 0;
  }
}
// Returns the number of threads with a true `vote`.
KVB_EMU_OWN inline int block_barrier(bool vote, const char* what, int line) {
  KVB_EMU_TSAN(char* order = &machine.warp->barrier_order[machine.barrier_phase & 1]; __tsan_release(order));
  // CUDA wants all threads of a block at the same barrier, not just at some barrier.
  if (machine.barrier_arrived && machine.barrier_line != line)
    fail("%s at line %d while other threads wait at the barrier of line %d", what, line, machine.barrier_line);
  machine.barrier_line = line;
  machine.barrier_votes += vote;
  ++machine.barrier_arrived;
  machine.warp[machine.current->warp].at_barrier |= 1u << machine.current->lane;
  try_release_barrier();   // the last to arrive queues up with the rest
  wait(what, line);
  KVB_EMU_TSAN(__tsan_acquire(order));
  return machine.barrier_result;
}

// ---- warp collectives: the last lane of the mask to arrive computes the results of all lanes ------------------------
KVB_EMU_OWN inline void try_combine(u32 w, u32 mask) {
  Warp& warp = machine.warp[w];
  u32 members = mask & warp.alive;
  if (!members || (warp.in_collective & members) != members) return;
  Combine combine = warp.lane[__builtin_ctz(members)].combine;
  for (u32 rest = members; rest; rest &= rest - 1) {
    const Lane& lane = warp.lane[__builtin_ctz(rest)];
    if (lane.mask != mask || lane.combine != combine) return;   // ends as a reported deadlock
  }
  combine(warp, members);
  warp.in_collective &= ~members;
  wake(w, members);
}
KVB_EMU_OWN inline Lane& my_lane() { return machine.warp[machine.current->warp].lane[machine.current->lane]; }
KVB_EMU_OWN inline void collective(u32 mask, Combine combine, const char* what, int line) {
  u32 me = 1u << machine.current->lane;
  if (!(mask & me)) fail("%s at line %d: mask %08x lacks the calling lane", what, line, mask);
  Lane& lane = my_lane();
  lane.mask = mask;
  lane.combine = combine;
  lane.what = what;
  lane.line = line;
  machine.warp[machine.current->warp].in_collective |= me;
  try_combine(machine.current->warp, mask);
  wait(what, line);
}

// For combine functions, which run in whichever lane arrives last: the lane at fault, which the report then names.
KVB_EMU_OWN inline const Lane& blame(const Warp& warp, int lane) {
  threadIdx = machine.fiber[(&warp - machine.warp) * 32 + lane].thread;
  return warp.lane[lane];
}

// Orders of __syncwarp, one per mask in use; an eighth mask and later ones share the last entry.
KVB_EMU_OWN inline Warp::Order& warp_order(u32 mask) {
  Warp::Order* order = machine.warp[machine.current->warp].order;
  for (int i = 0; i < 7 && order->mask && order->mask != mask; ++i) ++order;
  order->mask = mask;
  return *order;
}

// ---- shared memory --------------------------------------------------------------------------------------------------
// Every block starts with 0xFF bytes: NaN in f64, f32, f16, bf16 and fp8, -1 in integers.
KVB_EMU_OWN inline void poison(const Guarded& memory) {
  size_t i = 0;
  for (; i + 8 <= memory.size; i += 8) *reinterpret_cast<volatile u64*>(memory.data + i) = ~u64(0);
  for (; i < memory.size; ++i) *const_cast<volatile Byte*>(memory.data + i) = 0xFF;
}
KVB_EMU_OWN inline void* dynamic_shared() { return machine.dynamic_shared.memory.data; }

KVB_EMU_OWN inline void* static_shared(const void* key, const char* name, size_t size, size_t alignment) {
  for (u32 i = 0; i < machine.shared_variables; ++i)
    if (machine.shared_variable[i].key == key) return machine.shared_variable[i].memory.data;
  if (alignment > 16) fail("shared variable %s wants %zu-byte alignment, at most 16 is provided", name, alignment);
  if (machine.shared_variables == kMaxSharedVariables) fail("more than %u shared variables", kMaxSharedVariables);
  machine.static_shared_bytes += size;
  size_t dynamic = machine.dynamic_shared.memory.size;
  if (machine.static_shared_bytes > kStaticSharedBytes || machine.static_shared_bytes + dynamic > kSharedBytes)
    fail("shared memory exhausted by %s: %zu bytes static (limit %zu), %zu dynamic (limit of the sum %zu)", name,
         machine.static_shared_bytes, kStaticSharedBytes, dynamic, kSharedBytes);
  SharedVariable& variable = machine.shared_variable[machine.shared_variables];
  variable.key = key;
  variable.name = name;
  Byte* slot = machine.shared_space + kDynamicSlot + machine.shared_variables * kStaticSlot;
  if (!variable.memory.open(slot, kStaticSlot, size)) fail("no memory for shared variable %s", name);
  ++machine.shared_variables;
  poison(variable.memory);
  return variable.memory.data;
}
template <class T>
KVB_EMU_OWN T& shared_variable(const void* key, const char* name) {
  static_assert(std::is_trivially_default_constructible<T>::value, "shared variables have no constructors");
  return *static_cast<T*>(static_shared(key, name, sizeof(T), alignof(T)));
}
KVB_EMU_OWN inline bool in_shared(const void* p) {
  auto* byte = static_cast<const Byte*>(p);
  return byte >= machine.shared_space && byte < machine.shared_space + kSharedSpace;
}

}  // namespace kvb::emu
