// Host side of the emulator: launches a grid on guarded copies of its arrays.  Blocks run one after another, those of
// a cooperative launch in turns.  Included by the modules and programs that launch kernels, not by kernels.
#pragma once
#include <signal.h>
#include <ucontext.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvb/device.cuh"
#include "kvb/export.h"

namespace kvb::emu {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  const ExportedKernel* kernel;
  dim3 grid, block;
  size_t dynamic_shared = 0;
  u64 seed = 0;         // 0: in order; else the schedule
  bool flush = false;   // subnormals count as zero, as CuPy makes NVRTC do (doubles too: x86 cannot tell them apart)
  bool cooperative = false;   // blocks may wait for each other
};

// One argument of a launch: a scalar's bytes, an array in caller's memory, or (neither) a null pointer.
struct Argument {
  std::string scalar;
  Byte* array = nullptr;
  size_t size = 0;
  bool read_only = false;
};

// ---- guarded copies of the arrays -----------------------------------------------------------------------------------
// Arrays that overlap share one copy, so that a kernel sees them overlap as on the GPU.
class GuardedArrays {
 public:
  explicit GuardedArrays(const std::vector<Argument>& arguments) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const Argument& argument = arguments[i];
      if (argument.array) copies_.push_back({argument.array, argument.size, argument.read_only, {i}, {}});
    }
    std::sort(copies_.begin(), copies_.end(), [](const auto& a, const auto& b) { return a.source < b.source; });
    merge_overlapping();
    if (copies_.empty()) return;
    space_size_ = kGap;
    for (const ArrayCopy& copy : copies_) space_size_ += Guarded::slot_size(copy.size, kGap);
    space_ = reserve(space_size_);
    if (!space_) throw Error("no address space for guarded copies of the arguments");
    Byte* slot = space_;
    for (ArrayCopy& copy : copies_) {
      const size_t slot_size = Guarded::slot_size(copy.size, kGap);
      if (!copy.memory.open(slot, slot_size, copy.size, reinterpret_cast<uintptr_t>(copy.source) % 16))
        throw Error("no memory for guarded copies of the arguments");
      std::memcpy(copy.memory.data, copy.source, copy.size);
      if (copy.read_only) copy.memory.make_read_only();
      slot += slot_size;
    }
  }
  ~GuardedArrays() {
    for (ArrayCopy& copy : copies_) copy.memory.close();
    if (space_) munmap(space_, space_size_);
  }
  GuardedArrays(const GuardedArrays&) = delete;
  GuardedArrays& operator=(const GuardedArrays&) = delete;

  // Where the kernel finds an array of the caller's.
  Byte* copy_of(const Argument& argument) const {
    for (const ArrayCopy& copy : copies_)
      if (argument.array >= copy.source && argument.array + argument.size <= copy.source + copy.size)
        return copy.memory.data + (argument.array - copy.source);
    return nullptr;
  }
  void copy_back() const {
    for (const ArrayCopy& copy : copies_)
      if (!copy.read_only) std::memcpy(copy.source, copy.memory.data, copy.size);
  }
  // "byte 516 of argument 2 (512 bytes, read-only)" if the address lies in or around an array, else "".
  std::string describe(const Byte* address) const {
    if (address < space_ || address >= space_ + space_size_) return "";
    const ArrayCopy* nearest = &copies_.front();
    for (const ArrayCopy& copy : copies_)
      if (copy.memory.distance(address) < nearest->memory.distance(address)) nearest = &copy;
    return nearest->describe(address);
  }
  // The same for the first overwritten byte around an array, or "".
  std::string describe_damage() const {
    for (const ArrayCopy& copy : copies_)
      if (const Byte* p = copy.memory.damaged()) return copy.describe(p);
    return "";
  }

 private:
  static constexpr size_t kGap = 16 << 20;   // inaccessible bytes around each array: only far strays can miss them

  struct ArrayCopy {
    Byte* source;
    size_t size;
    bool read_only;
    std::vector<size_t> arguments;   // their positions
    Guarded memory;

    std::string describe(const Byte* address) const {
      std::string text = "byte " + std::to_string(address - memory.data) + " of argument";
      for (size_t i = 0; i < arguments.size(); ++i) text += (i ? "/" : " ") + std::to_string(arguments[i]);
      return text + " (" + std::to_string(size) + " bytes" + (read_only ? ", read-only)" : ")");
    }
  };

  void merge_overlapping() {
    std::vector<ArrayCopy> merged;
    for (ArrayCopy& copy : copies_) {
      if (merged.empty() || copy.source >= merged.back().source + merged.back().size) {
        merged.push_back(std::move(copy));
        continue;
      }
      ArrayCopy& last = merged.back();
      last.size = std::max(last.size, size_t(copy.source - last.source) + copy.size);
      last.read_only = last.read_only && copy.read_only;
      last.arguments.push_back(copy.arguments.front());
    }
    copies_ = std::move(merged);
  }

  std::vector<ArrayCopy> copies_;
  Byte* space_ = nullptr;
  size_t space_size_ = 0;
};

// "byte 512 of tile (512 bytes of shared memory)"
inline std::string describe(const SharedVariable& variable, const Byte* address) {
  return "byte " + std::to_string(address - variable.memory.data) + " of " + variable.name + " (" +
         std::to_string(variable.memory.size) + " bytes of shared memory)";
}
// The same for the variable nearest to the address, or "" for an address elsewhere.
inline std::string describe_shared(const Byte* address) {
  if (!in_shared(address)) return "";
  const SharedVariable* nearest = &machine.dynamic_shared;
  for (u32 i = 0; i < machine.shared_variables; ++i)
    if (machine.shared_variable[i].memory.distance(address) < nearest->memory.distance(address))
      nearest = &machine.shared_variable[i];
  return describe(*nearest, address);
}

// ---- faults ---------------------------------------------------------------------------------------------------------
// Turns SIGSEGV, SIGBUS and SIGFPE inside a fiber into the launch's error.  Sanitizer builds leave the signals to the
// sanitizer, whose report names the line.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
struct FaultHandler {
  explicit FaultHandler(const GuardedArrays&) {}
};
#else
class FaultHandler {
 public:
  explicit FaultHandler(const GuardedArrays& arrays) {
    arrays_ = &arrays;
    thread_ = pthread_self();
    static Byte stack[64 * 1024];   // its own stack: the fault may be a stack overrun
    stack_t alternative{};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = handle;
    // SA_NODEFER: the handler never returns, so a blocked signal would stay blocked.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < kSignals; ++i) sigaction(signals_[i], &action, &old_action_[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < kSignals; ++i) sigaction(signals_[i], &old_action_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  // Runs in the middle of the kernel's own code, never of the allocator's: it may build strings.
  static void handle(int signal, siginfo_t* info, void* context) {
    if (!pthread_equal(thread_, pthread_self())) {   // another thread's fault: it recurs under the old handler
      for (int i = 0; i < kSignals; ++i)
        if (signals_[i] == signal) sigaction(signal, &old_action_[i], nullptr);
      return;
    }
    if (signal == SIGFPE) fail("integer division by zero or overflow");
    const auto* address = static_cast<const Byte*>(info->si_addr);
    const char* access = access_kind(context);
    std::string place = arrays_->describe(address);
    if (place.empty()) place = describe_shared(address);
    if (!place.empty()) fail("%s %s", access, place.c_str());
    const auto* stack = static_cast<const Byte*>(machine.current->context.stack);
    if (address < stack && address >= stack - page_size()) fail("overran its stack of %zu bytes", kStack);
    if (info->si_code == SI_KERNEL)   // x86 gives no address
      fail("misaligned vector access, or access to an address that cannot exist");
    if (address < reinterpret_cast<const Byte*>(4096)) fail("%s address %p: null pointer", access, info->si_addr);
    fail("%s address %p, which belongs to no argument", access, info->si_addr);
  }
  static const char* access_kind([[maybe_unused]] void* context) {
#if defined(__x86_64__)
    return static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2 ? "write to" : "read of";
#else
    return "access to";
#endif
  }

  static constexpr int kSignals = 3;
  static constexpr int signals_[kSignals] = {SIGSEGV, SIGBUS, SIGFPE};
  static inline struct sigaction old_action_[kSignals];
  static inline stack_t old_stack_;
  static inline pthread_t thread_;
  static inline const GuardedArrays* arrays_ = nullptr;
};
#endif

// ---- one block ------------------------------------------------------------------------------------------------------
KVB_EMU_OWN inline void fiber_entry() {
  entered_from(*machine.switched_from);
  KVB_EMU_TSAN(__tsan_acquire(&machine.start_order));
  machine.kernel->invoke(machine.values);
  KVB_EMU_TSAN(__tsan_release(&machine.exit_order));
  Warp& warp = machine.warp[machine.current->warp];
  ++machine.exited;
  warp.alive &= ~(1u << machine.current->lane);
  try_release_barrier();
  for (u32 rest = warp.in_collective; rest; rest &= rest - 1)   // collectives wait for live lanes only
    try_combine(machine.current->warp, warp.lane[__builtin_ctz(rest)].mask);
  wait("exit", 0);
  std::abort();   // never resumed
}

KVB_EMU_OWN inline void report_deadlock(const char* what = "threads wait") {
  std::string waiting;
  const Fiber* last = nullptr;
  for (u32 i = 0; i < machine.threads && waiting.size() < 400; ++i) {
    const Fiber& fiber = machine.fiber[i];
    if (!(machine.warp[fiber.warp].alive >> fiber.lane & 1)) continue;
    if (last && last->waits_in == fiber.waits_in && last->line == fiber.line) continue;   // first of each run
    waiting += (last ? ", " : "") + std::string("from thread (") + std::to_string(fiber.thread.x) + "," +
               std::to_string(fiber.thread.y) + "," + std::to_string(fiber.thread.z) + ") in " + fiber.waits_in +
               " at line " + std::to_string(fiber.line);
    last = &fiber;
  }
  fail_block("deadlock: %s %s", what, waiting.c_str());
}

// Fibers get stacks of one size with an inaccessible page below each; where frames begin differs from stack to stack,
// or all of them would compete for the same cache sets.
struct Stacks {
  Byte* space;
  u32 ready;

  static size_t stride() { return page_size() + kStack; }
  char* of(u32 thread) {
    if (!space && !(space = reserve(kCooperativeThreads * stride()))) throw Error("no address space for fiber stacks");
    for (; ready <= thread; ++ready)
      if (mprotect(space + ready * stride() + page_size(), kStack, PROT_READ | PROT_WRITE))
        throw Error("no memory for fiber stacks");
    return reinterpret_cast<char*>(space + thread * stride() + page_size());
  }
  // Gives back what one block cannot need: a process may have 65530 mappings, of which each stack takes two.
  void shrink() {
    if (ready <= kMaxThreads) return;
    Byte* const begin = space + kMaxThreads * stride();
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (mmap(begin, (ready - kMaxThreads) * stride(), PROT_NONE, flags, -1, 0) != MAP_FAILED) ready = kMaxThreads;
  }
};
inline Stacks stacks;

KVB_EMU_OWN inline void start_threads() {
  const u32 first = machine.slot * machine.threads;
  machine.fiber = fibers + first;
  machine.warp = warps + machine.slot * ((machine.threads + 31) / 32);
  machine.exited = machine.barrier_arrived = machine.ready_warps = 0;
  machine.barrier_votes = 0;
  for (u32 w = 0; w * 32 < machine.threads; ++w) {
    const u32 count = machine.threads - w * 32;
    Warp& warp = machine.warp[w];
    warp.alive = count >= 32 ? ~0u : (1u << count) - 1;
    warp.ready = warp.in_collective = warp.at_barrier = warp.waiting_for_blocks = 0;
    wake(w, warp.alive);
  }
  for (u32 i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fiber[i];
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.warp = i / 32;
    fiber.lane = i % 32;
    fiber.copy_count = fiber.group = 0;
    make_context(fiber.context, stacks.of(first + i), kStack - i % 13 * 320, fiber_entry);
  }
}

KVB_EMU_OWN inline void begin_block() {
  poison(machine.dynamic_shared.memory);
  for (u32 i = 0; i < machine.shared_variables; ++i) poison(machine.shared_variable[i].memory);
  start_threads();
  KVB_EMU_TSAN(__tsan_release(&machine.start_order));
}

// Comes back when no thread is ready, or one has failed.
KVB_EMU_OWN inline void run_threads() {
  to_fiber(machine.scheduler, next_ready());
  // Races between blocks that run one after another are not reported.
  KVB_EMU_TSAN(__tsan_acquire(&machine.exit_order));
}

KVB_EMU_OWN inline void end_block(const GuardedArrays& arrays) {
  std::string damage = arrays.describe_damage();
  for (u32 i = 0; i <= machine.shared_variables && damage.empty(); ++i) {
    const SharedVariable& variable = i ? machine.shared_variable[i - 1] : machine.dynamic_shared;
    if (const Byte* p = variable.memory.damaged()) damage = describe(variable, p);
  }
  if (!damage.empty()) fail_block("wrote to %s", damage.c_str());
}

KVB_EMU_OWN inline void run_block(const GuardedArrays& arrays) {
  begin_block();
  run_threads();
  if (machine.error[0]) return;
  if (machine.exited < machine.threads) return report_deadlock();
  end_block(arrays);
}

// Subnormal results become zero and subnormal operands count as zero while it lives.
class FlushScope {
 public:
#if defined(__SSE2__)
  explicit FlushScope(bool flush) : control_(_mm_getcsr()) {
    if (flush) _mm_setcsr(control_ | 0x8040);
  }
  ~FlushScope() { _mm_setcsr(control_); }

 private:
  const u32 control_;
#else
  explicit FlushScope(bool flush) {
    if (flush) throw Error("flushing of subnormals is emulated on x86-64 only");
  }
#endif
};

// ---- launch ---------------------------------------------------------------------------------------------------------
inline void check(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const u64 threads = u64(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    throw Error(launch.kernel->name + ": a block has 1 to 1024 threads, z at most 64");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    throw Error(launch.kernel->name + ": a grid has 1 to (2147483647, 65535, 65535) blocks");
  if (launch.dynamic_shared > kSharedBytes)
    throw Error(launch.kernel->name + ": shared memory exhausted: " + std::to_string(launch.dynamic_shared) +
                " bytes dynamic, limit " + std::to_string(kSharedBytes));
  const u64 blocks = u64(grid.x) * grid.y * grid.z;
  if (launch.cooperative && blocks > kCooperativeThreads / threads)
    throw Error(launch.kernel->name + ": a cooperative launch has at most " + std::to_string(kCooperativeThreads) +
                " threads, got " + std::to_string(blocks) + " blocks of " + std::to_string(threads));
}

// Address space for the shared memory of each block that runs.
inline Byte* shared_space_of(u32 slot) {
  static std::vector<Byte*> spaces;
  while (spaces.size() <= slot) {
    spaces.push_back(reserve(kSharedSpace));
    if (!spaces.back()) throw Error("no address space for shared memory");
  }
  return spaces[slot];
}
inline void open_shared_memory(size_t dynamic_bytes) {
  machine.shared_space = shared_space_of(machine.slot);
  machine.shared_variables = 0;
  machine.static_shared_bytes = 0;
  machine.dynamic_shared.name = "dynamic shared memory";
  if (!machine.dynamic_shared.memory.open(machine.shared_space, kDynamicSlot, dynamic_bytes))
    throw Error("no memory for shared memory");
}
inline void close_shared_memory() {
  machine.dynamic_shared.memory.close();
  for (u32 i = 0; i < machine.shared_variables; ++i) machine.shared_variable[i].memory.close();
}

// The blocks of a cooperative launch, each with what the machine holds while it runs.
struct CooperativeBlocks {
  struct Block {
    uint3 index;
    BlockState state;
    bool ended;
  };
  std::vector<Block> blocks;

  KVB_EMU_OWN static void resume(const Block& block) {
    static_cast<BlockState&>(machine) = block.state;
    blockIdx = block.index;
  }
  ~CooperativeBlocks() {
    for (const Block& block : blocks) {
      if (block.ended) continue;
      resume(block);
      close_shared_memory();
    }
    stacks.shrink();
  }
};

// Runs the threads of the machine's block until each has exited or waits; whether all have exited.
KVB_EMU_OWN inline bool run_turn(const GuardedArrays& arrays) {
  for (u32 w = 0; w * 32 < machine.threads; ++w) {
    wake(w, machine.warp[w].waiting_for_blocks);
    machine.warp[w].waiting_for_blocks = 0;
  }
  run_threads();
  if (machine.error[0]) return false;
  if (machine.exited == machine.threads) {
    end_block(arrays);
    return true;
  }
  bool waits = false;
  for (u32 w = 0; w * 32 < machine.threads; ++w) waits |= machine.warp[w].waiting_for_blocks != 0;
  if (!waits) report_deadlock();
  return false;
}

// Runs all blocks in turns.
template <class Index>
KVB_EMU_OWN inline void run_cooperative_grid(const Launch& launch, const GuardedArrays& arrays, u32 count,
                                             const Index& index) {
  CooperativeBlocks all;
  // All begin before the first runs: ThreadSanitizer must not see the end of one ordered before the start of another.
  for (u32 i = 0; i < count; ++i) {
    machine.slot = i;
    open_shared_memory(launch.dynamic_shared);
    all.blocks.push_back({index(i), machine, false});
    begin_block();
    all.blocks.back().state = machine;
  }
  for (u32 left = count; left;) {
    const u64 steps = machine.steps;
    const u32 before = left;
    for (auto& block : all.blocks) {
      if (block.ended) continue;
      CooperativeBlocks::resume(block);
      block.ended = run_turn(arrays);
      block.state = machine;
      if (block.ended) {
        close_shared_memory();
        --left;
      }
      if (machine.error[0]) return;
    }
    if (left == before && machine.steps == steps) return report_deadlock("blocks wait for each other,");
  }
}

KVB_EMU_OWN inline void run_grid(const Launch& launch, const GuardedArrays& arrays) {
  const u64 blocks = u64(launch.grid.x) * launch.grid.y * launch.grid.z;
  machine.random = launch.seed != 0;
  machine.random_state = launch.seed * 0x9E3779B97F4A7C15ull;   // odd factor: not zero, and small seeds differ at once
  machine.error[0] = 0;
  gridDim = launch.grid;
  blockDim = launch.block;
  machine.threads = launch.block.x * launch.block.y * launch.block.z;
  KVB_EMU_TSAN(machine.scheduler.tsan_fiber = __tsan_get_current_fiber());
  // Blocks may run in any order: a random schedule starts anywhere and walks backwards or forwards.
  const u64 start = machine.random ? random_bits(31) % blocks : 0;
  const bool backwards = machine.random && random_bits(1);
  const FlushScope flush(launch.flush);
  const FaultHandler faults(arrays);
  const auto index = [&](u64 i) KVB_EMU_OWN -> uint3 {
    const u64 b = (start + (backwards ? blocks - i : i)) % blocks;
    return {u32(b % launch.grid.x), u32(b / launch.grid.x % launch.grid.y),
            u32(b / (u64(launch.grid.x) * launch.grid.y))};
  };
  machine.cooperative = launch.cooperative;
  if (launch.cooperative) return run_cooperative_grid(launch, arrays, u32(blocks), index);
  machine.slot = 0;
  open_shared_memory(launch.dynamic_shared);
  for (u64 i = 0; i < blocks && !machine.error[0]; ++i) {
    blockIdx = index(i);
    run_block(arrays);
  }
  close_shared_memory();
}

// Runs the grid to its end.  Throws Error, naming kernel, block and thread, at the first fault; the caller's arrays are
// then unchanged.
inline void run(const Launch& launch, const std::vector<Argument>& arguments) {
  check(launch);
  GuardedArrays arrays(arguments);
  std::vector<Byte*> pointers(arguments.size());
  std::vector<void*> values(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Argument& argument = arguments[i];
    pointers[i] = argument.array ? arrays.copy_of(argument) : nullptr;
    values[i] = argument.scalar.empty() ? static_cast<void*>(&pointers[i]) : const_cast<char*>(argument.scalar.data());
  }
  machine.kernel = launch.kernel;
  machine.values = values.data();
  run_grid(launch, arrays);
  if (machine.error[0]) throw Error(machine.error);
  arrays.copy_back();
}

}  // namespace kvb::emu
