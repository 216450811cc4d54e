// One small kernel for each intrinsic and PTX wrapper: tests/test_emulator.py compares them with definitions of its
// own, in the emulator and, where there is one, on a GPU.
#include "kvb/device.cuh"

namespace kvb {

// out[i] = EXPRESSION of a = x[i], b = y[i], c = z[i]
#define KVB_MAP(NAME, A, B, C, OUT, ...)                                                              \
  __global__ void __launch_bounds__(64) NAME##_kernel(const A* x, const B* y, const C* z, OUT* out, int n) { \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                                              \
    if (i >= n) return;                                                                               \
    [[maybe_unused]] const A a = x[i];                                                                \
    [[maybe_unused]] const B b = y[i];                                                                \
    [[maybe_unused]] const C c = z[i];                                                                \
    out[i] = __VA_ARGS__;                                                                             \
  }
#define KVB_MAPS(MAP)                                                                    \
  MAP(popc, u32, u32, u32, i32, __popc(a))                                               \
  MAP(popcll, u64, u32, u32, i32, __popcll(a))                                           \
  MAP(clz, u32, u32, u32, i32, __clz(int(a)))                                            \
  MAP(ffs, u32, u32, u32, i32, __ffs(int(a)))                                            \
  MAP(brev, u32, u32, u32, u32, __brev(a))                                               \
  MAP(byte_perm, u32, u32, u32, u32, __byte_perm(a, b, c))                               \
  MAP(permute_bytes, u32, u32, u32, u32, permute_bytes(a, b, c))                         \
  MAP(funnelshift_l, u32, u32, u32, u32, __funnelshift_l(a, b, c))                       \
  MAP(funnelshift_r, u32, u32, u32, u32, __funnelshift_r(a, b, c))                       \
  MAP(dp4a, i32, i32, i32, i32, __dp4a(a, b, c))                                         \
  MAP(min_int, i32, i32, u32, i32, min(a, b))                                            \
  MAP(max_int, i32, i32, u32, i32, max(a, b))                                            \
  MAP(min_unsigned, u32, u32, u32, u32, min(a, b))                                       \
  MAP(max_unsigned, u32, u32, u32, u32, max(a, b))                                       \
  MAP(min_long, i64, i64, u32, i64, min(a, b))                                           \
  MAP(max_long, i64, i64, u32, i64, max(a, b))                                           \
  MAP(fmul_rn, float, float, float, float, __fmul_rn(a, b))                              \
  MAP(fadd_rn, float, float, float, float, __fadd_rn(a, b))                              \
  MAP(fsub_rn, float, float, float, float, __fsub_rn(a, b))                              \
  MAP(fdiv_rn, float, float, float, float, __fdiv_rn(a, b))                              \
  MAP(fsqrt_rn, float, float, float, float, __fsqrt_rn(a))                               \
  MAP(frcp_rn, float, float, float, float, __frcp_rn(a))                                 \
  MAP(fmaf_rn, float, float, float, float, __fmaf_rn(a, b, c))                           \
  MAP(fmaf, float, float, float, float, fmaf(a, b, c))                                   \
  MAP(saturatef, float, float, float, float, __saturatef(a))                             \
  MAP(rsqrtf, float, float, float, float, rsqrtf(a))                                     \
  MAP(exp2_approx, float, float, float, float, exp2_approx(a))                           \
  MAP(fmaxf, float, float, float, float, fmaxf(a, b) + 0.f)                              \
  MAP(fminf, float, float, float, float, fminf(a, b) + 0.f)                              \
  MAP(fabsf, float, float, float, float, fabsf(a))                                       \
  MAP(isnan, float, float, float, i32, isnan(a) ? 1 : 0)                                 \
  MAP(float2uint_rn, float, float, float, u32, __float2uint_rn(a))                       \
  MAP(float2int_rn, float, float, float, i32, __float2int_rn(a))                         \
  MAP(float2int_rz, float, float, float, i32, __float2int_rz(a))                         \
  MAP(float2int_rd, float, float, float, i32, __float2int_rd(a))                         \
  MAP(float2int_ru, float, float, float, i32, __float2int_ru(a))                         \
  MAP(int2float_rn, i32, u32, u32, float, __int2float_rn(a))                             \
  MAP(uint2float_rn, u32, u32, u32, float, __uint2float_rn(a))                           \
  MAP(float_as_uint, float, float, float, u32, __float_as_uint(a))                       \
  MAP(uint_as_float, u32, u32, u32, float, __uint_as_float(a))                           \
  MAP(float_as_int, float, float, float, i32, __float_as_int(a))                         \
  MAP(int_as_float, i32, u32, u32, float, __int_as_float(a))                             \
  MAP(float2half_rn, float, float, float, __half, __float2half_rn(a))                    \
  MAP(half2float, __half, u32, u32, float, __half2float(a))                              \
  MAP(float2bfloat16_rn, float, float, float, __nv_bfloat16, __float2bfloat16_rn(a))     \
  MAP(bfloat162float, __nv_bfloat16, u32, u32, float, __bfloat162float(a))               \
  MAP(float22half2_rn, float2, u32, u32, __half2, __float22half2_rn(a))                  \
  MAP(half22float2, __half2, u32, u32, float2, __half22float2(a))                        \
  MAP(float22bfloat162_rn, float2, u32, u32, __nv_bfloat162, __float22bfloat162_rn(a))   \
  MAP(bfloat1622float2, __nv_bfloat162, u32, u32, float2, __bfloat1622float2(a))         \
  MAP(ldg, u32, u32, u32, u32, __ldg(x + i))                                             \
  MAP(ldcg, u32, u32, u32, u32, __ldcg(x + i))                                           \
  MAP(load_once_4, uint4, u32, u32, uint4, load_once(x + i))                             \
  MAP(load_once_2, uint2, u32, u32, uint2, load_once(x + i))                             \
  MAP(load_once_1, u32, u32, u32, u32, load_once(x + i))

using i64 = long long;
KVB_MAPS(KVB_MAP)

__global__ void __launch_bounds__(64) store_once_kernel(uint4* four, uint2* two, u32* one) {
  const u32 t = threadIdx.x;
  store_once(four + t, make_uint4(4 * t, 4 * t + 1, 4 * t + 2, 4 * t + 3));
  store_once(two + t, make_uint2(2 * t, 2 * t + 1));
  store_once(one + t, t);
}

// ---- the grid -------------------------------------------------------------------------------------------------------

// out[linear index over blocks and threads] = position; visits[linear index] counts how often it ran
__global__ void __launch_bounds__(1024) positions_kernel(int* out, int* visits) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int i = block * threads + threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int position[6] = {int(blockIdx.x),  int(blockIdx.y),  int(blockIdx.z),
                           int(threadIdx.x), int(threadIdx.y), int(threadIdx.z)};
  for (int k = 0; k < 6; ++k) out[6 * i + k] = position[k];
  atomicAdd(visits + i, 1);
}

// The last block to finish sums what the others have left; `counter` starts at 0.
__global__ void __launch_bounds__(32) last_block_kernel(int* partial, int* counter, int* sum) {
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    if (atomicAdd(counter, 1) == int(gridDim.x) - 1) {
      int total = 0;
      for (u32 b = 0; b < gridDim.x; ++b) total += partial[b];
      *sum = total;
    }
  }
}

// ---- barriers -------------------------------------------------------------------------------------------------------

// out[t] = {count, or, and} of the predicates
__global__ void __launch_bounds__(1024) votes_kernel(const int* predicate, int* out) {
  const int t = threadIdx.x;
  out[3 * t] = __syncthreads_count(predicate[t]);
  out[3 * t + 1] = __syncthreads_or(predicate[t]) != 0;
  out[3 * t + 2] = __syncthreads_and(predicate[t]) != 0;
}

// Threads from `stay` on leave; the others go on to meet at barriers.  out[t] = sum over the others
__global__ void __launch_bounds__(1024) barrier_after_exit_kernel(int* out, int stay) {
  KVB_SHARED(int, total);
  const int t = threadIdx.x;
  if (t == 0) total = 0;
  __syncthreads();
  if (t >= stay) return;
  atomicAdd(&total, t);
  __syncthreads();
  out[t] = total;
}

// ---- warp collectives -----------------------------------------------------------------------------------------------

// kind: 0 __shfl_sync, 1 _up, 2 _down, 3 _xor; lanes outside the mask keep -1
template <class T>
__global__ void __launch_bounds__(32) shuffle_kernel(const T* x, T* out, u32 mask, int kind, int argument, int width) {
  const int lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  if (kind == 0) out[lane] = __shfl_sync(mask, x[lane], argument, width);
  if (kind == 1) out[lane] = __shfl_up_sync(mask, x[lane], argument, width);
  if (kind == 2) out[lane] = __shfl_down_sync(mask, x[lane], argument, width);
  if (kind == 3) out[lane] = __shfl_xor_sync(mask, x[lane], argument, width);
}

__global__ void __launch_bounds__(32) reduce_kernel(const u32* x, u32* out, u32 mask) {
  const int lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  out[2 * lane] = __reduce_add_sync(mask, x[lane]);
  out[2 * lane + 1] = __reduce_max_sync(mask, x[lane]);
}

// out[lane] = {ballot, any, all} of the predicates of the lanes in the mask
__global__ void __launch_bounds__(32) warp_votes_kernel(const int* predicate, u32* out, u32 mask) {
  const int lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  out[3 * lane] = __ballot_sync(mask, predicate[lane]);
  out[3 * lane + 1] = __any_sync(mask, predicate[lane]) != 0;
  out[3 * lane + 2] = __all_sync(mask, predicate[lane]) != 0;
}

// ---- atomics --------------------------------------------------------------------------------------------------------

// Every thread applies the operation to *target with its own value; before[t] = what it found there.
// operation: 0 add, 1 sub, 2 min, 3 max, 4 and, 5 or, 6 xor, 7 exchange, 8 add by compare and swap
template <class T>
__global__ void __launch_bounds__(1024) atomic_kernel(T* target, const T* value, T* before, int operation) {
  const int t = threadIdx.x;
  const T v = value[t];
  if (operation == 0) before[t] = atomicAdd(target, v);
  if (operation == 1) before[t] = atomicSub(target, v);
  if (operation == 2) before[t] = atomicMin(target, v);
  if (operation == 3) before[t] = atomicMax(target, v);
  if (operation == 4) before[t] = atomicAnd(target, v);
  if (operation == 5) before[t] = atomicOr(target, v);
  if (operation == 6) before[t] = atomicXor(target, v);
  if (operation == 7) before[t] = atomicExch(target, v);
  if (operation == 8) {
    T expected = *target, found;
    while ((found = atomicCAS(target, expected, T(expected + v))) != expected) expected = found;
    before[t] = found;
  }
}
__global__ void __launch_bounds__(1024) atomic_add_kernel(float* target, const float* value, float* before) {
  before[threadIdx.x] = atomicAdd(target, value[threadIdx.x]);
}
__global__ void __launch_bounds__(1024) atomic_add_long_kernel(u64* target, const u64* value, u64* before) {
  before[threadIdx.x] = atomicAdd(target, value[threadIdx.x]);
}

// ---- tensor cores and asynchronous copies ---------------------------------------------------------------------------

// One warp; a : (32, 4), b : (32, 2), d : (32, 4), the fragments lane by lane
template <class T>
__global__ void __launch_bounds__(32) mma_k16_kernel(const u32* a, const u32* b, float* d) {
  const int lane = threadIdx.x;
  u32 fragment_a[4], fragment_b[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) sum[i] = d[4 * lane + i];
  mma_m16n8k16<T>(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sum[i];
}
template <class B>
__global__ void __launch_bounds__(32) mma_k32_kernel(const u32* a, const u32* b, int* d) {
  const int lane = threadIdx.x;
  u32 fragment_a[4], fragment_b[2];
  int sum[4];
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) sum[i] = d[4 * lane + i];
  mma_m16n8k32<B>(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sum[i];
}

// One warp; matrices : (4, 8, 8) u16 whose rows stand in shared memory in the order of `rows`; out : (32, 4)
template <bool TRANSPOSED>
__global__ void __launch_bounds__(32) ldmatrix_kernel(const u16* matrices, const int* rows, u32* out) {
  KVB_SHARED(u16, s, [32][8]);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) s[rows[lane]][i] = matrices[8 * lane + i];
  __syncwarp();
  u32 r[4];
  if (TRANSPOSED) ldmatrix_x4_trans(r, s[rows[lane]]);
  else
    ldmatrix_x4(r, s[rows[lane]]);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

// One warp; out = x transposed, both as lanes hold an 8x8 matrix of u16
__global__ void __launch_bounds__(32) transpose_8x8_kernel(const u32* x, u32* out) {
  out[threadIdx.x] = transpose_8x8(x[threadIdx.x]);
}

// out = x, four ints a thread, in a ring of two stages; chunks from `present` on are replaced by zeros, not read, but that
// ONCE reads t % 5 ints of chunk `present`
template <bool ONCE>
__global__ void __launch_bounds__(32) ring_kernel(const int* x, int* out, int chunks, int present) {
  KVB_SHARED(int, stage, [2][128]);
  const int t = threadIdx.x;
  for (int c = 0; c <= chunks; ++c) {
    int* to = &stage[c % 2][4 * t];
    const int* from = x + 128 * c + 4 * t;
    if (c < chunks && ONCE) cp_async_16_once(to, from, c < present ? 16 : c == present ? 4 * (t % 5) : 0, c % 2 ? plain_policy() : read_once_policy());
    if (c < chunks && !ONCE) cp_async_16(to, from, c < present);
    cp_async_commit();
    if (c == 0) continue;
    cp_async_wait<1>();
    for (int i = 0; i < 4; ++i) out[128 * (c - 1) + 4 * t + i] = stage[(c - 1) % 2][4 * t + i];
  }
}

}  // namespace kvb

#define KVB_EXPORT_MAP(NAME, A, B, C, OUT, ...) KVB_EXPORT(64, kvb::NAME##_kernel)
KVB_MAPS(KVB_EXPORT_MAP)
KVB_EXPORT(64, kvb::store_once_kernel)
KVB_EXPORT(64, kvb::positions_kernel)
KVB_EXPORT(64, kvb::last_block_kernel)
KVB_EXPORT(64, kvb::votes_kernel)
KVB_EXPORT(64, kvb::barrier_after_exit_kernel)
KVB_EXPORT(64, kvb::shuffle_kernel<int>)
KVB_EXPORT(64, kvb::shuffle_kernel<float>)
KVB_EXPORT(64, kvb::shuffle_kernel<double>)
KVB_EXPORT(64, kvb::shuffle_kernel<unsigned long long>)
KVB_EXPORT(64, kvb::warp_votes_kernel)
KVB_EXPORT(64, kvb::reduce_kernel)
KVB_EXPORT(64, kvb::atomic_kernel<int>)
KVB_EXPORT(64, kvb::atomic_kernel<unsigned int>)
KVB_EXPORT(64, kvb::atomic_add_kernel)
KVB_EXPORT(64, kvb::atomic_add_long_kernel)
KVB_EXPORT(64, kvb::mma_k16_kernel<__half>)
KVB_EXPORT(64, kvb::mma_k16_kernel<__nv_bfloat16>)
KVB_EXPORT(64, kvb::mma_k32_kernel<kvb::i8>)
KVB_EXPORT(64, kvb::mma_k32_kernel<kvb::u8>)
KVB_EXPORT(64, kvb::ldmatrix_kernel<false>)
KVB_EXPORT(64, kvb::ldmatrix_kernel<true>)
KVB_EXPORT(64, kvb::transpose_8x8_kernel)
KVB_EXPORT(64, kvb::ring_kernel<false>)
KVB_EXPORT(64, kvb::ring_kernel<true>)
