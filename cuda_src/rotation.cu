// Rotation of rows by randomised Hadamard rounds, y = x R^T, and by a dense orthogonal matrix.
// Reference: reference/rotation.py.
//
// rotation_hadamard_kernel: R = H_rounds ... H_1 with H_r = D^(-1/2) H diag(signs_r), one pass over memory.
//   Work    Four lanes share a row, a warp takes eight rows at a time and walks over the rows with a grid stride.
//   Layout  Lane l of the four holds the 16-byte chunks l, l+4, l+8, ... of its row (kvb/hadamard.cuh): the butterflies
//           stay in registers but for those at the distances of the two lane bits.
//   Bytes   Each row is read once and written once.
//   Counts  Per fp16 row of 128 and round: 7 * 128 additions, 2 * 128 / 32 warp shuffles a row.  Per 8 rows and warp,
//           three rounds: about 670 FADD, 190 SHFL (one per cycle and SM), 50 FMUL, 64 conversions, 40 loads and
//           stores: 260 issue cycles of an SM, while the 4 KiB they move take 305 cycles at 3 TB/s on 132 SMs at
//           1.7 GHz.  Two lanes a row would halve the shuffles and double the registers; sixteen lanes would make it
//           shuffle bound.
//   Scale   Signs arrive as +-2^-floor(log2(D)/2), exact in float; what is left of D^(-rounds/2) is one multiplication
//           at the end.  So results are the same bits on every backend, and intermediate values cannot overflow before
//           the result.
//
// rotation_dense_kernel: any orthogonal matrix (Haar), D multiply-adds per element: compute bound,
//   for comparison and theory.
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/hadamard.cuh"

namespace kvb {

// x, y : (rows, D) T, may be the same array        signs : (rounds, D) float, +-2^-floor(log2(D)/2), rounds <= 8
// remaining_scale = D^(-rounds/2) / 2^(-rounds floor(log2(D)/2))
// inverse != 0 applies R^T: transform, then signs, last round first
template <class T, int D>
__global__ void __launch_bounds__(256)
    rotation_hadamard_kernel(const T* x, T* y, const float* __restrict__ signs, u64 rows, int rounds,
                             float remaining_scale, int inverse) {
  static_assert(D == 64 || D == 128 || D == 256, "four lanes hold a row in registers");
  constexpr int LANES = 4, WIDTH = kChunk<T>, CHUNKS = D / (LANES * WIDTH), ROWS_PER_WARP = 32 / LANES;
  KVB_SHARED(float, staged_signs, [8 * D]);
  for (int i = threadIdx.x; i < rounds * D; i += 256) staged_signs[i] = signs[i];
  __syncthreads();

  const int lane = threadIdx.x % LANES;
  const u64 warp = blockIdx.x * u64(8) + threadIdx.x / 32;
  const u64 stride = gridDim.x * u64(8) * ROWS_PER_WARP;
  // The same rounds for all lanes: shuffles see whole warps.
  for (u64 first = warp * ROWS_PER_WARP; first < rows; first += stride) {
    const u64 row = first + threadIdx.x % 32 / LANES;
    const bool present = row < rows;
    float v[CHUNKS][WIDTH];   // v[c][e] = row[(c * LANES + lane) * WIDTH + e]
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      uint4 chunk = make_uint4(0, 0, 0, 0);
      if (present) chunk = *reinterpret_cast<const uint4*>(x + row * D + (c * LANES + lane) * WIDTH);
      unpack_chunk<T>(chunk, v[c]);
    }
    hadamard_rounds<LANES>(v, staged_signs, rounds, lane, inverse);
    if (present) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) v[c][e] = __fmul_rn(v[c][e], remaining_scale);
        store_once(reinterpret_cast<uint4*>(y + row * D + (c * LANES + lane) * WIDTH), pack_chunk<T>(v[c]));
      }
    }
  }
}

// y[row, j] = sum_k matrix[k, j] x[row, k]
// x, y : (rows, D) T, may be the same array        matrix : (D, D) float, R^T to rotate, R to rotate back
template <class T, int D>
__global__ void __launch_bounds__(D)
    rotation_dense_kernel(const T* x, T* y, const float* __restrict__ matrix, u64 rows) {
  static_assert(D >= 32 && D <= 1024 && D % 32 == 0, "one thread a column, whole warps");
  constexpr int ROWS = 8;   // each matrix element that a thread loads serves this many rows
  KVB_SHARED(float, staged, [ROWS][D]);
  const int j = threadIdx.x;
  for (u64 first = u64(blockIdx.x) * ROWS; first < rows; first += u64(gridDim.x) * ROWS) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) staged[r][j] = first + r < rows ? to_float(x[(first + r) * D + j]) : 0.f;
    __syncthreads();
    float sum[ROWS] = {};
    for (int k = 0; k < D; ++k) {
      const float m = matrix[k * D + j];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) sum[r] = fmaf(m, staged[r][k], sum[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (first + r < rows) y[(first + r) * D + j] = from_float<T>(sum[r]);
    __syncthreads();   // everyone has read the staged rows before the next ones replace them
  }
}

}  // namespace kvb

#define KVB_EXPORT_ROTATION(T, D)                             \
  KVB_EXPORT(128, kvb::rotation_hadamard_kernel<T, D>)        \
  KVB_EXPORT(64, kvb::rotation_dense_kernel<T, D>)
#define KVB_EXPORT_ROTATIONS(T) KVB_EXPORT_ROTATION(T, 64) KVB_EXPORT_ROTATION(T, 128) KVB_EXPORT_ROTATION(T, 256)
KVB_EXPORT_ROTATIONS(float)
KVB_EXPORT_ROTATIONS(__half)
KVB_EXPORT_ROTATIONS(__nv_bfloat16)
