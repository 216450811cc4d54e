// Kernels with one planted fault each, and the same without it: tests/test_emulator.py and tests/test_sanitizers.py
// show that the emulator and the sanitizers find them.
#include "kvb/device.cuh"

namespace kvb {

// ---- order of threads -----------------------------------------------------------------------------------------------

// out[t] = x[t - 1], cyclic, one block of 128 threads.  Without the barrier a thread may read its neighbour's word
// before the neighbour has written it.
template <bool BARRIER>
__global__ void __launch_bounds__(128) rotate_kernel(const int* x, int* out) {
  KVB_SHARED(int, s, [128]);
  const int t = threadIdx.x;
  s[t] = x[t];
  if (BARRIER) __syncthreads();
  out[t] = s[(t + 127) % 128];
}

// The same inside a warp, through __syncwarp.
template <bool SYNC>
__global__ void __launch_bounds__(32) rotate_warp_kernel(const int* x, int* out) {
  KVB_SHARED(int, s, [32]);
  const int t = threadIdx.x;
  s[t] = x[t];
  if (SYNC) __syncwarp();
  out[t] = s[(t + 31) % 32];
}

// out[t] = (t ^ 2) + (t ^ 1), one warp.  The shuffle makes the lanes meet but orders no memory.  No schedule of the
// emulator shows the missing __syncwarp, because the emulated lanes do meet; ThreadSanitizer does.
__global__ void __launch_bounds__(32) shuffle_is_no_fence_kernel(int* out) {
  KVB_SHARED(int, s, [32]);
  const int t = threadIdx.x;
  s[t] = t;
  const int other = __shfl_xor_sync(0xffffffffu, t, 1);
  out[t] = s[t ^ 2] + other;
}

// Thread t writes out[0] and out[1 + t]: a race on global memory, all with different values.
__global__ void __launch_bounds__(32) global_race_kernel(int* out) {
  out[0] = threadIdx.x;
  out[1 + threadIdx.x] = threadIdx.x;
}

// out = x through shared memory, 4 floats per thread in two groups of one copy each.  Only a wait for all groups,
// after a commit, is enough for both.
template <bool COMMIT, bool WAIT, int PENDING>
__global__ void __launch_bounds__(64) copy_kernel(const float* x, float* out) {
  KVB_SHARED(float, s, [2][256]);
  const int t = threadIdx.x;
  cp_async_16(&s[0][4 * t], x + 4 * t);
  if (COMMIT) cp_async_commit();
  cp_async_16(&s[1][4 * t], x + 256 + 4 * t);
  if (COMMIT) cp_async_commit();
  if (WAIT) cp_async_wait<PENDING>();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = s[0][4 * t + i];
  for (int i = 0; i < 4; ++i) out[256 + 4 * t + i] = s[1][4 * t + i];
}

// A thread reads what its neighbour's copy brought: its own wait does not cover that, a barrier is missing.
template <bool BARRIER>
__global__ void __launch_bounds__(64) copy_for_neighbour_kernel(const int* x, int* out) {
  KVB_SHARED(int, s, [256]);
  const int t = threadIdx.x;
  cp_async_16(&s[4 * t], x + 4 * t);
  cp_async_commit();
  cp_async_wait<0>();
  if (BARRIER) __syncthreads();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = s[(4 * t + 4) % 256 + i];
}

// order[block] = how many blocks came before: nothing that a kernel may rely on.
__global__ void __launch_bounds__(32) block_order_kernel(int* counter, int* order) {
  if (threadIdx.x == 0) order[blockIdx.x] = atomicAdd(counter, 1);
}

// Half of the block takes another barrier: undefined in CUDA.
__global__ void __launch_bounds__(64) two_barriers_kernel(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

// ---- warp collectives -----------------------------------------------------------------------------------------------

// Thread 0 leaves before a shuffle that asks for its value.
__global__ void __launch_bounds__(32) early_exit_kernel(int* out) {
  if (threadIdx.x == 0) return;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0);
}

// Lanes of `members` shuffle with the mask `mask`, reading lane `source`.
__global__ void __launch_bounds__(32) shuffle_members_kernel(int* out, u32 members, u32 mask, int source) {
  if (members >> threadIdx.x & 1) out[threadIdx.x] = __shfl_sync(mask, static_cast<int>(threadIdx.x), source);
}

// Lane 0 waits in a shuffle for lanes that wait at the block barrier.
__global__ void __launch_bounds__(32) stuck_kernel(int* out) {
  int v = threadIdx.x;
  if (v == 0) v = __shfl_sync(0xffffffffu, v, 1);
  else
    __syncthreads();
  out[threadIdx.x] = v;
}

// The lanes of one mask meet in two different collectives.
__global__ void __launch_bounds__(32) two_collectives_kernel(int* out) {
  const int t = threadIdx.x;
  if (t < 16) out[t] = __shfl_sync(0xffffffffu, t, 0);
  else
    out[t] = int(__ballot_sync(0xffffffffu, 1));
}

// The tensor core wants all 32 lanes.
__global__ void __launch_bounds__(32) half_a_warp_mma_kernel(float* out) {
  float d[4] = {};
  const u32 a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) mma_m16n8k16<__half>(d, a, b);
  out[threadIdx.x] = d[0];
}

// ---- bounds ---------------------------------------------------------------------------------------------------------

// Thread 5 of block 1 reads in[index] or writes out[index].
template <class T>
__global__ void __launch_bounds__(32) global_access_kernel(const T* in, T* out, long long index, int write) {
  if (blockIdx.x != 1 || threadIdx.x != 5) return;
  if (write) out[index] = T(1);
  else
    out[0] = in[index];
}

// Thread 5 of block 1 reads or writes shared word `index`, past a static array of 32 words or a dynamic one.
__global__ void __launch_bounds__(32) shared_access_kernel(int* out, int index, int write, int dynamic) {
  KVB_SHARED(int, tile, [32]);
  KVB_DYNAMIC_SHARED(int, buffer);
  int* words = dynamic ? buffer : tile;
  words[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (blockIdx.x != 1 || threadIdx.x != 5) return;
  if (write) words[index] = 1;
  else
    out[0] = words[index];
}


template <int BYTES>
__global__ void __launch_bounds__(32) big_frame_kernel(int* out) {
  volatile u8 frame[BYTES];
  for (int i = 0; i < BYTES; i += 64) frame[i] = u8(i);
  out[threadIdx.x] = frame[64 * threadIdx.x];
}

template <int BYTES>
__global__ void __launch_bounds__(32) static_shared_kernel(int* out) {
  KVB_SHARED(u8, block, [BYTES]);
  block[threadIdx.x] = 1;
  out[threadIdx.x] = block[threadIdx.x];
}

__global__ void __launch_bounds__(32) divide_kernel(int* out, int divisor) { out[threadIdx.x] = 7 / divisor; }

// ---- addresses that PTX refuses -------------------------------------------------------------------------------------

// which: 0 cp_async_16 to a misaligned shared address, 1 from a misaligned global one, 2 to global memory,
// 3 ldmatrix of a misaligned row, 4 of global memory, 5 load_once misaligned, 6 store_once misaligned, 7 store_once to
// shared memory, 8 prefetch_l2 of it, 9 cp_async_16_once with what is no policy
__global__ void __launch_bounds__(32) bad_address_kernel(u32* global, int which) {
  KVB_SHARED(u32, s, [32]);
  u32 r[4] = {};
  if (which == 0) cp_async_16(s + 1, global);
  if (which == 1) cp_async_16(s, global + 1);
  if (which == 2) cp_async_16(global, global);
  if (which == 3) ldmatrix_x4(r, s + 1);
  if (which == 4) ldmatrix_x4(r, global);
  if (which == 5) r[0] = load_once(reinterpret_cast<const uint4*>(global + 1)).x;
  if (which == 6) store_once(reinterpret_cast<uint2*>(global + 1), make_uint2(1, 1));
  if (which == 7) store_once(s, 1u);
  if (which == 8) prefetch_l2(s);
  if (which == 9) cp_async_16_once(s, global, 16, 0);
  global[threadIdx.x] = r[0];
}

// ---- memory that nobody has written ---------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(32) unwritten_shared_kernel(T* out) {
  KVB_SHARED(T, s, [32]);
  KVB_DYNAMIC_SHARED(T, buffer);
  const int t = threadIdx.x;
  out[(blockIdx.x * 2 + 0) * 32 + t] = s[t];
  out[(blockIdx.x * 2 + 1) * 32 + t] = buffer[t];
  s[t] = buffer[t] = T(1.f);   // must be gone when the next block starts
}

// ---- blocks that wait for each other --------------------------------------------------------------------------------

// out[b] = the sum of x, of which block b has shown its word to the others, and words of its own; shared memory and
// registers outlive the wait.  Without it a block may read what another has yet to write.  Blocks below `absent` take
// no ticket.
template <bool WAIT>
__global__ void __launch_bounds__(64) share_kernel(const int* x, int* shown, u32* tickets, int* out, int absent) {
  KVB_SHARED(int, own, [64]);
  const int t = threadIdx.x, b = blockIdx.x, blocks = gridDim.x;
  own[t] = 1000 * b + t;
  if (t == 0) shown[b] = x[b];
  __syncthreads();
  if (t == 0 && b >= absent) {
    take_ticket(tickets);
    if (WAIT) wait_for_tickets(tickets, blocks);
  }
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < blocks; ++i) sum += shown[i];
  out[b * 64 + t] = sum + own[(t + 1) % 64];
}

// out[b] = the sum of x and of twice x, which block b has told the others: a word, and a pair with what it wrote before.
// Blocks below `absent` tell nothing.
__global__ void __launch_bounds__(64)
    tell_kernel(const int* x, u64* words, WordPair* pairs, int* written, u64* out, int absent) {
  const int t = threadIdx.x, b = blockIdx.x, blocks = gridDim.x;
  written[b * 64 + t] = x[b] + t;
  __syncthreads();
  if (t == 0 && b >= absent) {
    publish(words + b, x[b]);
    publish(pairs + b, {static_cast<u64>(2 * x[b]), 1});
  }
  u64 sum = 0;
  for (int i = t; i < blocks; i += 64) {
    sum += wait_for_published(words + i);
    const WordPair pair = wait_for_published(pairs + i);
    sum += pair.first * pair.second + written[i * 64 + t] - x[i] - t;
  }
  atomicAdd(out + b, sum);
}

}  // namespace kvb

KVB_EXPORT(32, kvb::rotate_kernel<false>)
KVB_EXPORT(32, kvb::rotate_kernel<true>)
KVB_EXPORT(32, kvb::rotate_warp_kernel<false>)
KVB_EXPORT(32, kvb::rotate_warp_kernel<true>)
KVB_EXPORT(32, kvb::shuffle_is_no_fence_kernel)
KVB_EXPORT(32, kvb::global_race_kernel)
KVB_EXPORT(32, kvb::copy_kernel<true, true, 0>)
KVB_EXPORT(32, kvb::copy_kernel<true, true, 1>)
KVB_EXPORT(32, kvb::copy_kernel<true, false, 0>)
KVB_EXPORT(32, kvb::copy_kernel<false, true, 0>)
KVB_EXPORT(32, kvb::copy_for_neighbour_kernel<false>)
KVB_EXPORT(32, kvb::copy_for_neighbour_kernel<true>)
KVB_EXPORT(32, kvb::block_order_kernel)
KVB_EXPORT(32, kvb::two_barriers_kernel)
KVB_EXPORT(32, kvb::early_exit_kernel)
KVB_EXPORT(32, kvb::shuffle_members_kernel)
KVB_EXPORT(32, kvb::stuck_kernel)
KVB_EXPORT(32, kvb::two_collectives_kernel)
KVB_EXPORT(32, kvb::half_a_warp_mma_kernel)
KVB_EXPORT(32, kvb::global_access_kernel<int>)
KVB_EXPORT(32, kvb::shared_access_kernel)
KVB_EXPORT(32, kvb::global_access_kernel<unsigned char>)
KVB_EXPORT(32, kvb::big_frame_kernel<32768>)
KVB_EXPORT(32, kvb::big_frame_kernel<80000>)
KVB_EXPORT(32, kvb::big_frame_kernel<500000>)
KVB_EXPORT(32, kvb::static_shared_kernel<49152>)
KVB_EXPORT(32, kvb::static_shared_kernel<49153>)
KVB_EXPORT(32, kvb::divide_kernel)
KVB_EXPORT(32, kvb::bad_address_kernel)
KVB_EXPORT(32, kvb::unwritten_shared_kernel<float>)
KVB_EXPORT(32, kvb::unwritten_shared_kernel<double>)
KVB_EXPORT(32, kvb::unwritten_shared_kernel<__half>)
KVB_EXPORT(32, kvb::unwritten_shared_kernel<__nv_bfloat16>)
KVB_EXPORT(32, kvb::unwritten_shared_kernel<int>)
KVB_EXPORT(64, kvb::share_kernel<false>)
KVB_EXPORT(64, kvb::share_kernel<true>)
KVB_EXPORT(64, kvb::tell_kernel)
