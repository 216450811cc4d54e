// Randomised Hadamard rounds on rows that stand in registers: R = H_rounds ... H_1, H_r = D^(-1/2) H diag(signs_r).
// Reference: reference/rotation.py.
//
// LANES neighbouring lanes share a row.  v[c][e] of lane l is the coordinate (c * LANES + l) * WIDTH + e, so the bits
// of a coordinate are, from the lowest: position in the chunk, lane, chunk number.  Butterflies run at distances 1, 2,
// 4, ... (the order of the reference, on which equal bits on all backends depend): inside a chunk and between chunks
// they stay in registers, only those between lanes need shuffles.
#pragma once
#include "kvb/device.cuh"

namespace kvb {

// y[k] = sum_j (-1)^popcount(j & k) v[j], unnormalised.  All lanes of the warp take part.
template <int LANES, int CHUNKS, int WIDTH>
__device__ __forceinline__ void walsh_hadamard(float (&v)[CHUNKS][WIDTH], int lane) {
#pragma unroll
  for (int distance = 1; distance < WIDTH; distance *= 2)
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int e = 0; e < WIDTH; ++e)
        if (!(e & distance)) {
          const float low = v[c][e], high = v[c][e + distance];
          v[c][e] = low + high;
          v[c][e + distance] = low - high;
        }
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    // The upper lane of a pair computes other - own, which is own * -1 + other, exactly.
    const float sign = lane & distance ? -1.f : 1.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int e = 0; e < WIDTH; ++e)
        v[c][e] = fmaf(v[c][e], sign, __shfl_xor_sync(0xffffffffu, v[c][e], distance));
  }
#pragma unroll
  for (int distance = 1; distance < CHUNKS; distance *= 2)
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      if (!(c & distance))
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
          const float low = v[c][e], high = v[c + distance][e];
          v[c][e] = low + high;
          v[c + distance][e] = low - high;
        }
}

// All rounds, but for the factor `remaining_scale` at the end.
//   signs     (rounds, D) in shared memory, +-2^-floor(log2(D)/2), exact in float
//   inverse   != 0 applies R^T: transform, then signs, last round first
//   NO_NEGATIVE_ZERO   (not inverse) zeros come out as +0 if there is a round.  low + high and low - high are -0 only
//                      if low is; so if coordinate 0 is not -0 at the start of a round, then after the butterflies at
//                      distances 1, 2, 4, ... neither are the first 2, 4, 8, ... coordinates.
template <int LANES, bool NO_NEGATIVE_ZERO = false, int CHUNKS, int WIDTH>
__device__ __forceinline__ void hadamard_rounds(float (&v)[CHUNKS][WIDTH], const float* signs, int rounds, int lane,
                                                int inverse) {
  constexpr int D = LANES * CHUNKS * WIDTH;
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
    const float* round_signs = signs + (inverse ? rounds - 1 - r : r) * D + lane * WIDTH;
    if (!inverse) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) v[c][e] *= round_signs[c * LANES * WIDTH + e];
      if constexpr (NO_NEGATIVE_ZERO) v[0][0] += 0.f;
    }
    walsh_hadamard<LANES>(v, lane);
    if (inverse) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) v[c][e] *= round_signs[c * LANES * WIDTH + e];
    }
  }
}

}  // namespace kvb
