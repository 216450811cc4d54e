// Decode attention over keys and values in bit planes, one query token per sequence, grouped query heads.
// Reference: reference/turboquant.py, decode_attention.  Layout of the planes: reference/planes.py.
//
//   output_h = R_v^T ( sum_t softmax_t(scale s^k_t <R_k q_h, c^k_t>) s^v_t c^v_t )
//
// turboquant_attention_kernel: keys and values of 1 to 4 bits each.
//   Grid      (splits, kv_heads, batch): the blocks of a KV head share its tiles; the last to finish merges, rotates
//             the result back and writes it (kvb/splits.cuh).  With more query heads than HEADS (9 to 16 at D = 256,
//             where registers hold 8) a KV head has two rows of blocks, and its codes are read twice.
//   Block     8 warps, each with its own tiles of 32 tokens.
//   Pipeline  Each warp has a ring of three tiles in shared memory filled by cp.async, one being read.  A tile of a
//             plane is contiguous in memory.
//   Start     The query is asked for before the tiles: behind them it would wait for all of them.  While the first
//             tiles arrive, a warp per query head rotates it (registers and shuffles) and rounds it to 15 bits,
//             z = q' / delta, as two int8 rows: z = 128 hi + lo.
//   Keys      Logits by mma.m16n8k32.s8 with the query as A: rows 0-7 are the hi parts of eight heads, rows 8-15 the
//             lo parts, so integers give the product of the rounded query and the table exactly.  Lane (g, t) =
//             (lane / 4, lane % 4) looks up the coordinates [D/4 t, + D/4) of token g: the order of the coordinates
//             inside the product is free as long as the query has the same.
//   Values    O^T = V^T P^T by mma.m16n8k16.f16 with V^T as A.  Logits come out as (head, two tokens) per lane, exactly
//             the B operand.  Lane (g, t) looks up the coordinates [D/8 g, + D/8) of four tokens.
//   Softmax   Online, base 2.  The weights of the product, w = p s^v, are what must fit fp16: the reference (subtracted
//             exponent) stays 8 below the largest log2(w) and is raised when one exceeds it by 15.  The total sums p.
//   Bytes     D (key_bits + value_bits) / 8 + 4 per token and KV head, once: 100 at D = 128, 3 + 3 bits.
//   Counts    Per tile of 32 tokens at D = 128, 3 + 3 bits (SASS): 600 warp instructions, of them 176 PRMT, 70 LOP3, 70
//             shifts on the half-rate integer pipe; 16 IMMA, 16 HMMA.  315 of the 600 belong to the values: a look-up
//             gives the high or the low bytes of four centroids, and as many PRMT put them together.  At 132
//             multiprocessors and 1.75 GHz, 128K tokens x 8 KV heads: 21 us of issue slots, 26 us of the integer
//             pipe, 35 us of memory at 3 TB/s.
//   Tried     H100, D = 128, 3 + 3 bits, us with L2 flushed (by writing); best number of splits each time.
//                                                              32:8 128K  16:2 128K  32:32 128K  32:8 32K  32:8 4K
//               every copy clamped to the length                    64.6       31.0       201.1      27.4      15.1
//               whole tiles copied without clamps                   62.2       30.1       194.3      26.7      14.8
//               + a ring of two tiles instead of three              57.5       28.2       185.4      25.0      14.7
//               + query before tiles, lane addresses in
//                 registers, fp16 overflow instead of a maximum     56.8       27.5       184.4      24.9      14.4
//               shifts as multiplications (IMAD.HI)                 56.7       27.8       180.2                14.5
//               10, 12, 16 warps in a block                         58-61      28-30      182-196             16-17
//               one block per multiprocessor, 150 registers         58.1       27.4       189.0                14.4
//               + merge with one wait for memory                    56.7       29.8       185.0      23.4      13.3
//               the copies alone, nothing computed                  52.7                  173.1                13.1
//               4 + 4 bits: two blocks of 128 registers / one       82.8       36.1       278.6                15.6
//                                                                   71.3       35.5       237.6      28.8      14.0
//               + rings begin at lines of shared memory, and values
//                 in them (this version), 3 + 3 bits                52.9       28.8       169.1
//                                         2 + 2 bits                49.6       27.3       161.7
//                                         4 + 4 bits                68.7       34.0       231.5
//             Before the last, 16 bytes of a static variable moved every line that arrived onto two lines of shared
//             memory: that was what the copies alone took.  What was left then: of 13.3 us at 4K tokens, 4.0 are the
//             launch, 2.3 the first tile on its way, 0.7 the query, 2.7 one tile, 2.4 to store and merge, 0.5 to rotate
//             back.  With 2 + 2 bits and 4 + 4 bits arithmetic is the limit, not memory.  66 splits (16:2) are merged
//             eight at a time, each waiting for the one before.
#pragma once
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/planes.cuh"
#include "kvb/splits.cuh"

namespace kvb {

constexpr int kPlaneWarps = 8;
constexpr int kPlaneRing = 3;                 // tiles of a warp's ring
constexpr int kPlaneRounds = 8;               // most rounds of a rotation
constexpr float kPlaneGap = 8.f, kPlaneSlack = 15.f;
constexpr float kSmallestValueScale = 9.5367431640625e-7f;   // 2^-20: below it, a value's scale no longer lowers the
                                                             // reference, so that p stays finite for zero values too
constexpr int kQueryLevels = 16256;           // 127 * 128: |z| at most

// ---- copies ---------------------------------------------------------------------------------------------------------

// One side of the cache from the first token of one (sequence, KV head) on.
struct PlaneSide {
  const u32 *sign, *mag2, *mag1;   // those that the bits have
  const __half* scale;
};
template <int D>
__device__ __forceinline__ PlaneSide plane_side(const u32* sign, const u32* mag2, const u32* mag1, const __half* scale,
                                                u64 first_token) {
  return {sign + first_token * (D / 32), mag2 + first_token * (D / 16), mag1 + first_token * (D / 32),
          scale + first_token};
}

// A tile of one plane is contiguous in memory: 32 rows of ROW_BYTES.  Lane l copies bytes [16 l, + 16) of every 512.
template <int D, int ROW_BYTES>
struct PlaneCopy {
  static constexpr int BYTES = kPlaneTile * ROW_BYTES;

  // Where byte `at` of a tile stands in shared memory.
  static __device__ __forceinline__ int place(int at) {
    return ROW_BYTES >= 16 ? plane_row<D>(at / ROW_BYTES) * ROW_BYTES + at % ROW_BYTES : at;
  }
  // Of a whole tile, with rows that begin at multiples of 16 bytes.  to : place(16 lane) in the plane's part of the
  // tile in shared memory; from : the lane's first bytes in memory
  static __device__ __forceinline__ void whole(char* to, const char* from, int lane, u64 policy) {
    if (BYTES >= 512 || 16 * lane < BYTES)
#pragma unroll
      for (int i = 0; i < BYTES; i += 512) cp_async_16_once(to + i, from + i, 16, policy);
  }
  // Of the first `tokens` rows of a tile, wherever they begin; the others become zero.  Two bytes at a time.
  static __device__ __forceinline__ void part(char* to, const void* rows, int tile, int tokens, int lane) {
    const char* from = static_cast<const char*>(rows) + static_cast<u64>(tile) * BYTES;
#pragma unroll 1
    for (int at = 2 * lane; at < BYTES; at += 64)
      *reinterpret_cast<u16*>(to + place(at)) =
          at < tokens * ROW_BYTES ? *reinterpret_cast<const u16*>(from + at) : u16(0);
  }
};

// The planes of one side on their way to shared memory, tile after tile, `stride` tiles apart.
template <int D, int BITS>
struct SideCopy {
  using Single = PlaneCopy<D, D / 8>;
  using Double = PlaneCopy<D, D / 4>;
  const char *sign, *mag2, *mag1;   // of this lane in the next tile

  static __device__ __forceinline__ bool aligned(const PlaneSide& side) {
    u64 bits = reinterpret_cast<u64>(side.sign) | reinterpret_cast<u64>(side.scale);
    if (BITS >= 3) bits |= reinterpret_cast<u64>(side.mag2);
    if (BITS % 2 == 0) bits |= reinterpret_cast<u64>(side.mag1);
    return bits % 16 == 0;
  }
  static __device__ __forceinline__ SideCopy from(const PlaneSide& side, int tile, int lane) {
    auto at = [&](const u32* rows, int bytes) {
      return reinterpret_cast<const char*>(rows) + static_cast<u64>(tile) * bytes + 16 * lane;
    };
    return {at(side.sign, Single::BYTES), BITS >= 3 ? at(side.mag2, Double::BYTES) : nullptr,
            BITS % 2 == 0 ? at(side.mag1, Single::BYTES) : nullptr};
  }
  __device__ __forceinline__ void advance(int stride) {
    sign += stride * Single::BYTES;
    if (BITS >= 3) mag2 += stride * Double::BYTES;
    if (BITS % 2 == 0) mag1 += stride * Single::BYTES;
  }
  // All but the scales.  single, pair : PlaneCopy::place(16 lane) of the two kinds of planes
  __device__ __forceinline__ void whole(char* to, int single, int pair, int lane, u64 policy) const {
    Single::whole(to + single, sign, lane, policy);
    if constexpr (BITS >= 3) Double::whole(to + pair + Single::BYTES, mag2, lane, policy);
    if constexpr (BITS % 2 == 0) Single::whole(to + single + (BITS - 1) * Single::BYTES, mag1, lane, policy);
  }
  static __device__ __forceinline__ void part(char* to, const PlaneSide& side, int tile, int tokens, int lane) {
    Single::part(to, side.sign, tile, tokens, lane);
    if constexpr (BITS >= 3) Double::part(to + Single::BYTES, side.mag2, tile, tokens, lane);
    if constexpr (BITS % 2 == 0) Single::part(to + (BITS - 1) * Single::BYTES, side.mag1, tile, tokens, lane);
    PlaneCopy<D, 2>::part(to + BITS * Single::BYTES, side.scale, tile, tokens, lane);
  }
};

// ---- rotation of a row by a warp ------------------------------------------------------------------------------------

// Lane l holds the coordinates [l D/32, + D/32).  Butterflies at distances 1, 2, 4, ..., as on every backend.
template <int D>
__device__ __forceinline__ void warp_walsh_hadamard(float (&v)[D / 32], int lane) {
  constexpr int N = D / 32;
#pragma unroll
  for (int distance = 1; distance < N; distance *= 2)
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (!(e & distance)) {
        const float low = v[e], high = v[e + distance];
        v[e] = low + high;
        v[e + distance] = low - high;
      }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float sign = lane & distance ? -1.f : 1.f;
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = fmaf(v[e], sign, __shfl_xor_sync(0xffffffffu, v[e], distance));
  }
}

// ---- keys -----------------------------------------------------------------------------------------------------------

// sums[j] = the products of token column 8 j + .. with the staged query: hi parts of head g in [0] and [1], lo parts in
// [2] and [3].
template <int D, int HALVES, int BITS>
__device__ __forceinline__ void key_products(int (&sums)[kPlaneTile / 8][HALVES][4], const char* tile,
                                             const OctetPlace<D, BITS, D / 32>& place, const uint4* staged_query,
                                             const KeyTable& table, int phase) {
  constexpr int OCTETS = D / 32, GROUPS = kPlaneTile / 8;
  constexpr int AT_ONCE = BITS == 4 && D * HALVES == 512 ? 1 : GROUPS;   // as many as registers hold
#pragma unroll
  for (int first = 0; first < GROUPS; first += AT_ONCE) {
    PlaneWords<OCTETS, BITS> words[AT_ONCE];
    int negative[AT_ONCE][HALVES][4] = {};   // four bits only
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      words[j] = place.load(tile, first + j);
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[first + j][half][i] = 0;
    }
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet) {
      uint4 a[HALVES];
#pragma unroll
      for (int half = 0; half < HALVES; ++half) a[half] = staged_query[(octet * HALVES + half) * 32];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
        multiply_octet<BITS, HALVES>(sums[first + j], negative[j], a, select_octet(words[j], octet, phase), table);
    }
    if constexpr (BITS == 4) {
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[first + j][half][i] += 256 * negative[j][half][i];
    }
  }
}

// ---- values ---------------------------------------------------------------------------------------------------------

// o[4 i + r]: coordinates D/8 g + 8 i + 2 r (+ 1 for [2], [3]) of heads 2t, 2t + 1 += the weighted values of a tile.
template <int D, int HALVES, int BITS>
__device__ __forceinline__ void add_values(float (&o)[D / 16][HALVES][4], const char* tile,
                                           const OctetPlace<D, BITS, D / 64>& first,
                                           const OctetPlace<D, BITS, D / 64>& second,
                                           const u32 (&p)[HALVES][kPlaneTile / 8], const ValueTable& table, int phase) {
  constexpr int OCTETS = D / 64;
#pragma unroll
  for (int u = 0; u < kPlaneTile / 16; ++u) {
    // Tokens 2t, 2t + 1 of each eight: columns k and k + 1 of the product; then the next eight, k + 8 and k + 9.
    PlaneWords<OCTETS, BITS> both[2][2];   // [eight][half of the bytes]
#pragma unroll
    for (int k = 0; k < 2; ++k) interleave(first.load(tile, 2 * u + k), second.load(tile, 2 * u + k), both[k]);
#pragma unroll
    for (int octet = 0; octet < OCTETS; ++octet)
#pragma unroll
      for (int half_bytes = 0; half_bytes < 2; ++half_bytes) {
        u32 even[2][2], odd[2][2];   // [eight][which two coordinates]
#pragma unroll
        for (int k = 0; k < 2; ++k)
          value_operands<BITS>(even[k], odd[k], select_octet(both[k][half_bytes], octet, phase), table);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int half = 0; half < HALVES; ++half)
            mma_m16n8k16<__half>(o[4 * octet + 2 * half_bytes + r][half],
                                 {even[0][r], odd[0][r], even[1][r], odd[1][r]}, {p[half][2 * u], p[half][2 * u + 1]});
      }
  }
}

// At least log2(scale), at most 1 more; the smallest for zero and NaN.
__device__ __forceinline__ float exponent(float scale) {
  return static_cast<float>(static_cast<int>(__float_as_uint(fmaxf(scale, kSmallestValueScale)) >> 23) - 126);
}

// ---- softmax and output ---------------------------------------------------------------------------------------------

// What a warp has summed up over its tokens.
template <int D, int HALVES>
struct PlaneSums {
  static constexpr int GROUPS = kPlaneTile / 8;
  float o[D / 16][HALVES][4];                 // as in add_values
  float reference[HALVES], total[HALVES];     // of head g (+ 8), the same in the four lanes of g

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      reference[half] = kNoReference, total[half] = 0.f;
#pragma unroll
      for (int m = 0; m < D / 16; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][half][i] = 0.f;
    }
  }

  // p = 2^(logit - reference) times the value's scale, of tokens 8 j + 2t and 8 j + 2t + 1 in p[half][j], B operands of
  // add_values; the totals grow.  logit(j, half, e, x): the logit of head g + 8 half and token 8 j + 2t + e, plus x
  template <class Logit>
  __device__ __forceinline__ void weigh(u32 (&p)[HALVES][GROUPS], const __half2 (&scale)[GROUPS], const Logit& logit,
                                        int t) {
    float sum[HALVES];
    auto weights = [&]() {   // returns whether a weight is 2^kPlaneSlack or more, or NaN
      u32 large = 0;
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        sum[half] = 0.f;
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          const float2 s = __half22float2(scale[j]);
          const float first = exp2_approx(logit(j, half, 0, -reference[half]));
          const float second = exp2_approx(logit(j, half, 1, -reference[half]));
          sum[half] += first + second;
          p[half][j] = pack_pair<__half>(first * s.x, second * s.y);
          // fp16 from 2^15 on has ones in the upper four bits of its exponent: the sum carries into the sign bit.
          large |= p[half][j] + 0x08000800u;
        }
      }
      return (large & 0x80008000u) != 0;
    };
    if (__any_sync(0xffffffffu, weights())) {
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        float largest = -infinity();   // of log2 of the weights, up to 1 too much
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          const float2 s = __half22float2(scale[j]);
          largest = fmaxf(largest, fmaxf(logit(j, half, 0, exponent(s.x)), logit(j, half, 1, exponent(s.y))));
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        const bool raised = largest >= reference[half] + kPlaneSlack;
        const float next = raised ? largest - kPlaneGap : reference[half];
        const float shrink = exp2_approx(reference[half] - next);
        reference[half] = next;
        total[half] *= shrink;
        // The accumulators hold heads 2t and 2t+1, whose factors are in the lanes with g = 2t and 2t+1.
        const float even = __shfl_sync(0xffffffffu, shrink, 8 * t), odd = __shfl_sync(0xffffffffu, shrink, 8 * t + 4);
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
          o[m][half][0] *= even;
          o[m][half][1] *= odd;
          o[m][half][2] *= even;
          o[m][half][3] *= odd;
        }
      }
      weights();
    }
#pragma unroll
    for (int half = 0; half < HALVES; ++half) total[half] += sum[half];
  }

  // The warp's partial output and its statistics, where finish_split finds them.
  __device__ __forceinline__ void store(float* copies, float2* statistics, int warp, int lane) {
    constexpr int HEADS = 8 * HALVES;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
      if (t == 0) statistics[warp * HEADS + 8 * half + g] = make_float2(reference[half], total[half]);
      float* even = copies + (warp * HEADS + 8 * half + 2 * t) * D;   // head 2t; head 2t+1 is one row on
#pragma unroll
      for (int m = 0; m < D / 16; ++m) {
        const float(&x)[4] = o[m][half];
        const int d = D / 8 * g + 2 * m;
        *reinterpret_cast<float2*>(even + d) = make_float2(x[0], x[2]);
        *reinterpret_cast<float2*>(even + D + d) = make_float2(x[1], x[3]);
      }
    }
  }
};

// The end of the kernel: one copy of the partial output per warp, over the rings, in which no copy is under way any
// more; the block that merges the splits rotates the result back and writes it, a warp per head.
// target : with everything of the block's query heads        signs : shared (rounds, D), of the values' rotation
// output : of output_type, from row `row` on
template <int D, int HEADS, int WARPS>
__device__ __forceinline__ void finish_planes(PlaneSums<D, HEADS / 8>& sums, char* rings, const DecodeTarget& target,
                                              int group, int split, int splits, int active, const float* signs,
                                              int rounds, float remaining_scale, void* output, int output_type,
                                              u64 row) {
  constexpr int N = D / 32, THREADS = 32 * WARPS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
  float* copies = reinterpret_cast<float*>(rings);                                          // (warps, HEADS, D)
  float2* statistics = reinterpret_cast<float2*>(copies + WARPS * HEADS * D);         // (warps, HEADS)
  float* rows = reinterpret_cast<float*>(statistics + WARPS * HEADS);                 // (HEADS, D)
  sums.store(copies, statistics, warp, lane);
  const bool finished = finish_split<D, WARPS, HEADS, THREADS>(
      copies, statistics, rings, target, group, split, splits, active,
      [&](int index, const float4& x) { *reinterpret_cast<float4*>(rows + index) = x; });
  if (!finished) return;

  __syncthreads();
  for (int h = warp; h < group; h += WARPS) {
    float v[N];
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = rows[h * D + lane * N + e];
#pragma unroll 1
    for (int r = rounds - 1; r >= 0; --r) {
      warp_walsh_hadamard<D>(v, lane);
#pragma unroll
      for (int e = 0; e < N; ++e) v[e] *= signs[r * D + lane * N + e];
    }
#pragma unroll
    for (int e = 0; e < N; ++e)
      store_float(output, output_type, (row + h) * D + lane * N + e, v[e] * remaining_scale);
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// query : (batch, kv_heads * all_heads, D), type 0 float, 1 fp16, 2 bf16    output : likewise, of output_type
// planes (batch, kv_heads, tokens, words), scales (batch, kv_heads, tokens) : strides in tokens
// *_signs : (rounds, D) +-2^-k, rounds <= 8; 0 rounds: nothing is rotated   *_remaining_scale : factor at the end
// key_table_*, value_* : KeyTable and ValueTable of kvb/planes.cuh          lengths : (batch,) or null for `tokens`
// key_mean : (kv_heads, D) float per key_mean_batch_stride, or null: lse += scale <q, key_mean>
// lse : (batch, kv_heads * all_heads) or null                               scale_log2 = softmax scale * log2(e)
// partial_output, partial_statistics, tickets : kvb/splits.cuh
template <int D, int HEADS, int KEY_BITS, int VALUE_BITS>
__global__ void __launch_bounds__(32 * kPlaneWarps, 1) turboquant_attention_kernel(
    const void* __restrict__ query, int query_type, const u32* __restrict__ key_sign, const u32* __restrict__ key_mag2,
    const u32* __restrict__ key_mag1, const __half* __restrict__ key_scale, u64 key_batch_stride, u64 key_head_stride,
    const u32* __restrict__ value_sign, const u32* __restrict__ value_mag2,
    const u32* __restrict__ value_mag1, const __half* __restrict__ value_scale, u64 value_batch_stride,
    u64 value_head_stride, const float* __restrict__ key_signs, int key_rounds,
    float key_remaining_scale, const float* __restrict__ value_signs, int value_rounds, float value_remaining_scale,
    u32 key_table_low, u32 key_table_high, float key_unit, u32 value_high_low, u32 value_high_high, u32 value_low_low,
    u32 value_low_high, const float* __restrict__ key_mean, u64 key_mean_batch_stride, const int* __restrict__ lengths,
    void* output, int output_type, float* lse, float* partial_output, float2* partial_statistics, u32* tickets,
    int tokens, int all_heads, float scale_log2) {
  static_assert(D == 64 || D == 128 || D == 256, "octets of a token divide evenly among the lanes");
  static_assert(HEADS == 8 || HEADS == 16, "rows of the mma tile");
  constexpr int HALVES = HEADS / 8, OCTETS = D / 32, N = D / 32, GROUPS = kPlaneTile / 8;
  constexpr int THREADS = 32 * kPlaneWarps;

  const int parts = (all_heads + HEADS - 1) / HEADS, part = blockIdx.y % parts;   // of the KV head's query heads
  const int split = blockIdx.x, kv_head = blockIdx.y / parts, b = blockIdx.z;
  const int splits = gridDim.x, kv_heads = gridDim.y / parts, group = min(all_heads - part * HEADS, HEADS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int length = lengths ? min(max(lengths[b], 0), tokens) : tokens;
  const int tiles = (length + kPlaneTile - 1) / kPlaneTile;
  const int active = active_splits(tiles, kPlaneWarps, splits);
  if (split >= active) return;
  const u64 pair = static_cast<u64>(b) * kv_heads + kv_head, row = pair * all_heads + part * HEADS;

  KVB_DYNAMIC_SHARED(char, shared);
  float* query_unit = reinterpret_cast<float*>(shared);                       // (HEADS,): delta * key_unit of a head
  float* query_offset = query_unit + HEADS;                                   // (HEADS,): sum_j z_j / 2
  float* lse_offset = query_offset + HEADS;                                   // (HEADS,)
  uint4* staged_query = reinterpret_cast<uint4*>(shared + whole_lines(12 * HEADS));   // (OCTETS, HALVES, 32)
  float* staged_signs = reinterpret_cast<float*>(staged_query + OCTETS * HALVES * 32);   // (key and value rounds, D)
  char* rings = reinterpret_cast<char*>(staged_signs + 2 * kPlaneRounds * D);
  constexpr int KEY_BYTES = kPlaneTileBytes<D, KEY_BITS>, TILE_BYTES = KEY_BYTES + kPlaneTileBytes<D, VALUE_BITS>;
  char* const ring = rings + warp * kPlaneRing * TILE_BYTES;
  // The same for the copies, in a register of each lane: where a uniform register holds a part of the shared address,
  // ptxas 13.0 may write cp.async with a cache hint in a form that the GPU refuses; tests/test_compile.py looks for it.
  char* const filled = reinterpret_cast<char*>(pinned(reinterpret_cast<u64>(ring)));

  const PlaneSide keys = plane_side<D>(key_sign, key_mag2, key_mag1, key_scale,
                                       b * key_batch_stride + kv_head * key_head_stride);
  const PlaneSide values = plane_side<D>(value_sign, value_mag2, value_mag1, value_scale,
                                         b * value_batch_stride + kv_head * value_head_stride);

  // The query first: behind the copies of the tiles it would wait for all of them.
  constexpr int PER_WARP = (HEADS + kPlaneWarps - 1) / kPlaneWarps;
  float v[PER_WARP][N];
#pragma unroll
  for (int i = 0; i < PER_WARP; ++i)
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int h = warp + i * kPlaneWarps;
      v[i][e] = h < group ? load_float(query, query_type, (row + h) * D + lane * N + e) : 0.f;
    }
  for (int i = threadIdx.x; i < D / 4 * (key_rounds + value_rounds); i += THREADS) {
    const int from = i - D / 4 * key_rounds;
    cp_async_16(staged_signs + 4 * i, from < 0 ? key_signs + 4 * i : value_signs + 4 * from);
  }
  cp_async_commit();

  const u64 policy = read_once_policy();
  using KeyCopy = SideCopy<D, KEY_BITS>;
  using ValueCopy = SideCopy<D, VALUE_BITS>;
  const int stride = pinned(active * kPlaneWarps);
  int tile = split * kPlaneWarps + warp, next = tile;   // of the warp: read, copied
  KeyCopy key_copy = KeyCopy::from(keys, tile, lane);
  ValueCopy value_copy = ValueCopy::from(values, tile, lane);
  const int single_place = pinned(PlaneCopy<D, D / 8>::place(16 * lane));
  const int pair_place = pinned(PlaneCopy<D, D / 4>::place(16 * lane));
  // The scales of a whole tile: four lanes copy those of the keys, four those of the values.
  const char* scales = reinterpret_cast<const char*>(lane < 4 ? keys.scale : values.scale) +
                       static_cast<u64>(tile) * (2 * kPlaneTile) + lane % 4 * 16;
  const int scales_place = pinned((lane < 4 ? kPlaneScales<D, KEY_BITS> : KEY_BYTES + kPlaneScales<D, VALUE_BITS>) +
                                  lane % 4 * 16);
  const int whole_tiles = pinned(KeyCopy::aligned(keys) && ValueCopy::aligned(values) ? length / kPlaneTile : 0);
  auto copy_next = [&](char* to) {
    if (next < whole_tiles) {
      key_copy.whole(to, single_place, pair_place, lane, policy);
      value_copy.whole(to + KEY_BYTES, single_place, pair_place, lane, policy);
      if (lane < 8) cp_async_16_once(to + scales_place, scales, 16, policy);
      key_copy.advance(stride);
      value_copy.advance(stride);
      scales += stride * (2 * kPlaneTile);
    } else if (next < tiles) {
      const int count = min(length - next * kPlaneTile, kPlaneTile);
      KeyCopy::part(to, keys, next, count, lane);
      ValueCopy::part(to + KEY_BYTES, values, next, count, lane);
    }
    next += stride;
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kPlaneRing - 1; ++i) copy_next(filled + i * TILE_BYTES);

  // ---- the query: rotated, rounded to 15 bits, as A operands; a warp per head ----
  cp_async_wait<kPlaneRing - 1>();
  __syncthreads();   // the signs have landed
#pragma unroll
  for (int i = 0; i < PER_WARP; ++i) {
    const int h = warp + i * kPlaneWarps;
    if (HEADS % kPlaneWarps && h >= HEADS) break;
    float largest = 0.f, dot = 0.f;
    if (h < group) {   // the same for the whole warp
      if (key_mean && lse) {
#pragma unroll
        for (int e = 0; e < N; ++e)
          dot = fmaf(v[i][e], key_mean[b * key_mean_batch_stride + kv_head * D + lane * N + e], dot);
#pragma unroll
        for (int distance = 16; distance; distance /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, distance);
      }
#pragma unroll 1
      for (int r = 0; r < key_rounds; ++r) {
#pragma unroll
        for (int e = 0; e < N; ++e) v[i][e] *= staged_signs[r * D + lane * N + e];
        warp_walsh_hadamard<D>(v[i], lane);
      }
#pragma unroll
      for (int e = 0; e < N; ++e) largest = fmaxf(largest, fabsf(v[i][e]));
#pragma unroll
      for (int distance = 16; distance; distance /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    }
    // A query below 1e-30 counts as zero, with any unit; one that holds NaN or Inf has none, and makes every logit NaN.
    float own_unit = largest / kQueryLevels * key_remaining_scale * scale_log2 * key_unit;
    const bool zero = largest < 1e-30f || own_unit == 0.f;
    const float inverse = zero ? 0.f : kQueryLevels / largest;
    if (zero) own_unit = 1.f;
    bool finite = true;
#pragma unroll
    for (int e = 0; e < N; ++e) finite = finite && fabsf(v[i][e]) < infinity();
    finite = __all_sync(0xffffffffu, finite);
    int sum = 0;
    // Coordinates [D/4 t, + D/4) belong to lane t of the product: octet k of them is k-step k, its first four bytes
    // a[0] and a[1] (hi, lo), the others a[2] and a[3].
    char* operands = reinterpret_cast<char*>(staged_query);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int z = finite ? __float2int_rn(v[i][e] * inverse) : 0, high = (z + 64) >> 7, low = z - 128 * high;
      sum += z;
      const int j = lane * N + e, step = j % (D / 4) / 8, of = h % 8 * 4 + j / (D / 4), p = j % 8;
      char* to = operands + ((step * HALVES + h / 8) * 32 + of) * 16 + p / 4 * 8 + p % 4;
      to[0] = static_cast<char>(high);
      to[4] = static_cast<char>(low);
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) {
      query_unit[h] = finite ? own_unit : infinity() - infinity();
      query_offset[h] = 0.5f * static_cast<float>(sum);
      lse_offset[h] = dot * scale_log2 * 0.693147180559945309f;
    }
  }
  __syncthreads();

  const KeyTable key_table = {key_table_low, key_table_high};
  const ValueTable value_table = {value_high_low, value_high_high, value_low_low, value_low_high};
  float unit[HALVES], offset[HALVES];   // logit = unit * s * (128 hi + lo + offset)
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    unit[half] = query_unit[8 * half + g];
    offset[half] = query_offset[8 * half + g];
  }
  PlaneSums<D, HALVES> state;
  state.clear();

  const int key_octet = t * OCTETS, value_octet = g * (D / 64);
  const auto key_place = OctetPlace<D, KEY_BITS, OCTETS>::of(plane_row<D>(g), key_octet);
  const auto first_place = OctetPlace<D, VALUE_BITS, D / 64>::of(plane_row<D>(2 * t), value_octet);
  const auto second_place = OctetPlace<D, VALUE_BITS, D / 64>::of(plane_row<D>(2 * t + 1), value_octet);
  const uint4* own_query = staged_query + pinned(lane);
  int read = 0, freed = (kPlaneRing - 1) * TILE_BYTES;   // in the ring: the tile that is read, the one before it
  for (; tile < tiles; tile += stride) {
    cp_async_wait<kPlaneRing - 2>();
    __syncwarp();   // every lane's copies have landed, and every lane has read the slot that is filled now
    const char* current = ring + read;
    copy_next(filled + freed);

    // ---- logits ----
    int sums[GROUPS][HALVES][4];
    key_products<D, HALVES, KEY_BITS>(sums, current, key_place, own_query, key_table, key_octet % 4);
    const __half2* key_scales = reinterpret_cast<const __half2*>(current + kPlaneScales<D, KEY_BITS>) + t;
    const __half2* value_scales =
        reinterpret_cast<const __half2*>(current + KEY_BYTES + kPlaneScales<D, VALUE_BITS>) + t;
    float product[GROUPS][HALVES][2];   // of the rounded query and the key's codes
    float2 factor[GROUPS];              // the key's scale
    __half2 scale[GROUPS];              // the value's scale
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      factor[j] = __half22float2(key_scales[4 * j]);
      scale[j] = value_scales[4 * j];
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const int(&sum)[4] = sums[j][half];
        product[j][half][0] = static_cast<float>(128 * sum[0] + sum[2]) + offset[half];
        product[j][half][1] = static_cast<float>(128 * sum[1] + sum[3]) + offset[half];
      }
    }
    if ((tile + 1) * kPlaneTile > length) {   // slots beyond the sequence, all zero, get the logit -inf
#pragma unroll
      for (int j = 0; j < GROUPS; ++j)
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (tile * kPlaneTile + 8 * j + 2 * t + e >= length) {
              product[j][half][e] = unit[half] < 0.f ? infinity() : -infinity();
              (e ? factor[j].y : factor[j].x) = 1.f;
            }
    }

    u32 p[HALVES][GROUPS];
    state.weigh(p, scale, [&](int j, int half, int e, float x) {
      return fmaf(product[j][half][e], unit[half] * (e ? factor[j].y : factor[j].x), x);
    }, t);
    // ---- values ----
    add_values<D, HALVES, VALUE_BITS>(state.o, current + KEY_BYTES, first_place, second_place, p, value_table,
                                      value_octet % 4);
    freed = read;
    read = read == (kPlaneRing - 1) * TILE_BYTES ? 0 : read + TILE_BYTES;
  }

  const DecodeTarget target = {lse ? lse + row : nullptr, key_mean ? lse_offset : nullptr,
                               partial_output + row * splits * D, partial_statistics + row * splits,
                               tickets + pair * parts + part};
  finish_planes<D, HEADS, kPlaneWarps>(state, rings, target, group, split, splits, active,
                                       staged_signs + key_rounds * D, value_rounds, value_remaining_scale, output,
                                       output_type, row);
}

}  // namespace kvb
