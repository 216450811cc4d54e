// Exact decode attention over fp16, bf16 and fp32 caches, one query token per sequence, grouped query heads.
// Reference: reference/attention.py.
//
// attention_decode_kernel (fp16, bf16; tensor cores)
//   Computes  output_h = sum_t softmax_t(scale <q_h, k_t>) v_t  for all query heads h of a KV head from one read of its cache.
//   Grid      (splits, kv_heads, batch): a block takes a contiguous range of tokens of one KV head; kvb/splits.cuh merges.
//   Block     8 warps; warp w takes tiles w, w+8, ... of 16 tokens.  A tile is two units, its keys and its values.
//   Pipeline  Each warp has a ring of units in shared memory filled by cp.async, all but one in flight.  A lane copies just the
//             16-byte chunks that it will itself read, into [chunk][lane] order: no barrier, no bank conflict, no transpose.
//   Keys      S = Q K^T by mma.m16n8k16 with Q as A (query heads are rows) and K as B.  Lane (g, t) = (lane / 4, lane % 4)
//             reads chunk [32 s + 8 t, + 8) of token g: that is a B operand if the order of the head dimensions inside the
//             product is permuted, and any order is right as long as Q has the same.
//   Values    O^T = V^T P^T with V^T as A.  S comes out with (head, two tokens) per lane, exactly the B operand P^T.  Lane
//             (g, t) reads [64 h + 8 g, + 8) of tokens 2t, 2t+1, 2t+8, 2t+9; two PRMT per word pair tokens up.
//   Softmax   Online, base 2, reference (subtracted exponent) 8 below the largest logit seen, raised only when a logit exceeds
//             it by 12: p < 4096 fits fp16, and tokens down to 2^-32 of the largest still count.  The total sums the rounded p.
//   Bytes     2 * D * 2 per token and KV head, once.  In flight per SM: 16 warps * 8 KiB = 128 KiB, against about 2.2 MB / 132 =
//             17 KiB that 3 TB/s needs at 700 ns.
//   Counts    Per 16 tokens at D = 128, 8 heads: 16 cp.async, 16 LDS.128, 24 mma, 32 PRMT, about 40 for softmax: 130 warp
//             instructions for 8 KiB; 3 TB/s would be 50 G instructions/s of the 900 G that the chip issues: memory bound.
//
// attention_decode_simple_kernel (fp32; also the plainly readable version): a warp per query head, logits one token per lane.
// attention_merge_kernel: partial results of different launches (exact part, packed part, other devices) into one.
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/splits.cuh"

namespace kvb {

constexpr int kTile = 16;           // tokens of a tile
constexpr int kDecodeWarps = 8;
constexpr float kReferenceGap = 8.f, kReferenceSlack = 12.f;

// Blocks that share an SM, and units in a warp's ring: 192 KiB of shared memory per SM in either case.
template <int D, int HEADS>
constexpr int kResidentBlocks = D == 256 || HEADS == 16 ? 1 : 2;
template <int D, int HEADS>
constexpr int kRingUnits = 24 * 1024 / kResidentBlocks<D, HEADS> / (kTile * D * 2);

// query : (batch, kv_heads * group, D)         keys, values : (batch, kv_heads, tokens, D) with strides in elements, rows of D contiguous
// lengths : (batch,) or null for `tokens`      output : (batch, kv_heads * group, D) T, or float if output_float32
// lse : (batch, kv_heads * group) or null      partial_output : (batch, kv_heads * group, splits, D)
// partial_statistics : (batch, kv_heads * group, splits)      tickets : (batch, kv_heads), zero
// scale_log2 = softmax scale * log2(e)         HEADS = 8 or 16 >= group
template <class T, int D, int HEADS>
__global__ void __launch_bounds__(32 * kDecodeWarps, kResidentBlocks<D, HEADS>)
    attention_decode_kernel(const T* __restrict__ query, const T* __restrict__ keys, const T* __restrict__ values,
                            const int* __restrict__ lengths, void* output, float* lse, float* partial_output,
                            float2* partial_statistics, u32* tickets, u64 key_batch_stride, u64 key_head_stride,
                            u64 key_token_stride, u64 value_batch_stride, u64 value_head_stride, u64 value_token_stride,
                            int tokens, int group, float scale_log2, int output_float32) {
  static_assert(D == 64 || D == 128 || D == 256, "chunks of a row divide evenly among the lanes");
  static_assert(HEADS == 8 || HEADS == 16, "rows of the mma tile");
  static_assert(sizeof(T) == 2, "16-bit tensor core operands");
  constexpr int UNITS = kRingUnits<D, HEADS>, HALVES = HEADS / 8;
  constexpr int KEY_STEPS = D / 32;      // 16-byte chunks of a token's key per lane
  constexpr int VALUE_STEPS = D / 64;    // 16-byte chunks of a token's value per lane
  constexpr int CHUNKS = D / 16;         // chunks of a unit per lane: 2 tokens * KEY_STEPS = 4 tokens * VALUE_STEPS
  static_assert(UNITS >= 3, "keys and values of a tile, and one more in flight");

  const int split = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
  const int splits = gridDim.x, kv_heads = gridDim.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int length = lengths ? min(max(lengths[b], 0), tokens) : tokens;
  const SplitRange range((length + kTile - 1) / kTile, kDecodeWarps, split, splits);
  if (split >= range.active) return;

  KVB_DYNAMIC_SHARED(uint4, shared);
  uint4* ring = shared + warp * UNITS * CHUNKS * 32 + lane;   // ring[(unit * CHUNKS + chunk) * 32]
  const T* head_keys = keys + b * key_batch_stride + kv_head * key_head_stride;
  const T* head_values = values + b * value_batch_stride + kv_head * value_head_stride;
  const int my_tiles = max((range.last - range.first - warp + kDecodeWarps - 1) / kDecodeWarps, 0);

  // Tokens beyond the length are not read: their copies are zero-filled.
  auto copy_keys = [&](int i, int slot) {
    if (i >= my_tiles) return;
    const int first = (range.first + warp + i * kDecodeWarps) * kTile;
    uint4* to = ring + slot * CHUNKS * 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int token = first + 8 * j + g;
      const T* row = head_keys + token * key_token_stride + 8 * t;
#pragma unroll
      for (int s = 0; s < KEY_STEPS; ++s) cp_async_16(to + (j * KEY_STEPS + s) * 32, row + 32 * s, token < length);
    }
  };
  auto copy_values = [&](int i, int slot) {
    if (i >= my_tiles) return;
    const int first = (range.first + warp + i * kDecodeWarps) * kTile;
    uint4* to = ring + slot * CHUNKS * 32;
#pragma unroll
    for (int j = 0; j < 4; ++j) {   // tokens 2t, 2t+1, 2t+8, 2t+9
      const int token = first + 2 * t + (j & 1) + 8 * (j >> 1);
      const T* row = head_values + token * value_token_stride + 8 * g;
#pragma unroll
      for (int s = 0; s < VALUE_STEPS; ++s) cp_async_16(to + (j * VALUE_STEPS + s) * 32, row + 64 * s, token < length);
    }
  };
  auto copy_unit = [&](int unit, int slot) { unit & 1 ? copy_values(unit >> 1, slot) : copy_keys(unit >> 1, slot); };

#pragma unroll
  for (int unit = 0; unit < UNITS - 1; ++unit) {
    copy_unit(unit, unit);
    cp_async_commit();
  }

  // A operand of S: query head g (and g + 8) as rows; its chunk s holds two k-steps of 16.
  uint4 q[KEY_STEPS][HALVES];
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const int h = g + 8 * half;
    const T* row = query + (static_cast<u64>(b * kv_heads + kv_head) * group + h) * D + 8 * t;
#pragma unroll
    for (int s = 0; s < KEY_STEPS; ++s)
      q[s][half] = h < group ? *reinterpret_cast<const uint4*>(row + 32 * s) : make_uint4(0, 0, 0, 0);
  }

  float o[4 * VALUE_STEPS][HALVES][4] = {};   // o[4 s + w]: dims 64 s + 8 g + 2 w (+ 1 for [2], [3]), heads 2t, 2t+1
  float reference[HALVES], total[HALVES];     // of head g (+ 8), the same in the four lanes of g
#pragma unroll
  for (int half = 0; half < HALVES; ++half) reference[half] = kNoReference, total[half] = 0.f;

  int read_slot = 0, write_slot = UNITS - 1;
  auto advance = [](int& slot) { slot = slot + 1 == UNITS ? 0 : slot + 1; };
  for (int i = 0; i < my_tiles; ++i) {
    // ---- keys: logits of 16 tokens ----
    cp_async_wait<UNITS - 2>();
    copy_unit(2 * i + UNITS - 1, write_slot);
    cp_async_commit();
    advance(write_slot);
    const uint4* unit = ring + read_slot * CHUNKS * 32;
    advance(read_slot);
    float logits[2][4] = {};   // logits[j]: head g tokens 8 j + 2t, + 1; then head g + 8
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int s = 0; s < KEY_STEPS; ++s) {
        const uint4 k = unit[(j * KEY_STEPS + s) * 32];
        const uint4 upper = HALVES == 2 ? q[s][HALVES - 1] : make_uint4(0, 0, 0, 0);
        mma_m16n8k16<T>(logits[j], {q[s][0].x, upper.x, q[s][0].y, upper.y}, {k.x, k.y});
        mma_m16n8k16<T>(logits[j], {q[s][0].z, upper.z, q[s][0].w, upper.w}, {k.z, k.w});
      }
    }
    const int first = (range.first + warp + i * kDecodeWarps) * kTile;
    float largest[HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      largest[half] = -infinity();
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& logit = logits[j][2 * half + e];
          logit *= scale_log2;
          if (first + 8 * j + 2 * t + e >= length) logit = -infinity();
          largest[half] = fmaxf(largest[half], logit);
        }
    }
    bool raise = false;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) raise |= largest[half] > reference[half] + kReferenceSlack;
    if (__any_sync(0xffffffffu, raise)) {
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 1));
        largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 2));
        const bool raised = largest[half] > reference[half] + kReferenceSlack;
        const float next = raised ? largest[half] - kReferenceGap : reference[half];
        const float factor = exp2_approx(reference[half] - next);
        reference[half] = next;
        total[half] *= factor;
        // The accumulators hold heads 2t and 2t+1, whose factors are in the lanes with g = 2t and 2t+1.
        const float even = __shfl_sync(0xffffffffu, factor, 8 * t), odd = __shfl_sync(0xffffffffu, factor, 8 * t + 4);
#pragma unroll
        for (int m = 0; m < 4 * VALUE_STEPS; ++m) {
          o[m][half][0] *= even;
          o[m][half][1] *= odd;
          o[m][half][2] *= even;
          o[m][half][3] *= odd;
        }
      }
    }
    u32 p[HALVES][2];
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        p[half][j] = pack_pair<T>(exp2_approx(logits[j][2 * half] - reference[half]),
                                  exp2_approx(logits[j][2 * half + 1] - reference[half]));
        const float2 rounded = unpack_pair<T>(p[half][j]);   // numerator and denominator see the same weights
        total[half] += rounded.x + rounded.y;
      }

    // ---- values ----
    cp_async_wait<UNITS - 2>();
    copy_unit(2 * i + UNITS, write_slot);
    cp_async_commit();
    advance(write_slot);
    unit = ring + read_slot * CHUNKS * 32;
    advance(read_slot);
#pragma unroll
    for (int s = 0; s < VALUE_STEPS; ++s) {
      uint4 v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = unit[(j * VALUE_STEPS + s) * 32];
      const u32 words[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w}, {v[1].x, v[1].y, v[1].z, v[1].w},
                               {v[2].x, v[2].y, v[2].z, v[2].w}, {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const u32 a[4] = {__byte_perm(words[0][w], words[1][w], 0x5410), __byte_perm(words[0][w], words[1][w], 0x7632),
                          __byte_perm(words[2][w], words[3][w], 0x5410), __byte_perm(words[2][w], words[3][w], 0x7632)};
#pragma unroll
        for (int half = 0; half < HALVES; ++half) mma_m16n8k16<T>(o[4 * s + w][half], a, {p[half][0], p[half][1]});
      }
    }
  }
  cp_async_wait<0>();

  // ---- one copy of the partial output per warp, over the rings ----
  __syncthreads();
  float* copies = reinterpret_cast<float*>(shared);                                            // (warps, HEADS, D)
  float2* statistics = reinterpret_cast<float2*>(copies + kDecodeWarps * HEADS * D);           // (warps, HEADS)
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    if (t == 0) statistics[warp * HEADS + 8 * half + g] = make_float2(reference[half], total[half]);
    float* even = copies + (warp * HEADS + 8 * half + 2 * t) * D;   // head 2t; head 2t+1 is one row on
#pragma unroll
    for (int s = 0; s < VALUE_STEPS; ++s)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float(&x)[4] = o[4 * s + w][half];
        const int d = 64 * s + 8 * g + 2 * w;
        *reinterpret_cast<float2*>(even + d) = make_float2(x[0], x[2]);
        *reinterpret_cast<float2*>(even + D + d) = make_float2(x[1], x[3]);
      }
  }
  const u64 pair = static_cast<u64>(b) * kv_heads + kv_head, row = pair * group;
  const DecodeTarget target = {static_cast<char*>(output) + row * D * (output_float32 ? sizeof(float) : sizeof(T)),
                               lse ? lse + row : nullptr, partial_output + row * splits * D,
                               partial_statistics + row * splits, tickets + pair, output_float32};
  finish_split<T, D, kDecodeWarps, HEADS, 32 * kDecodeWarps>(copies, statistics, shared, target, group, split, splits,
                                                             range.active);
}

// The same result for a float cache, without tensor cores.  Arguments as above; group <= 16.
template <int D>
__global__ void __launch_bounds__(256, 2)
    attention_decode_simple_kernel(const float* __restrict__ query, const float* __restrict__ keys,
                                   const float* __restrict__ values, const int* __restrict__ lengths, void* output,
                                   float* lse, float* partial_output, float2* partial_statistics, u32* tickets,
                                   u64 key_batch_stride, u64 key_head_stride, u64 key_token_stride, u64 value_batch_stride,
                                   u64 value_head_stride, u64 value_token_stride, int tokens, int group, float scale_log2,
                                   int output_float32) {
  static_assert(D % 32 == 0, "lanes share a row");
  constexpr int TILE = 32, WARPS = 8, MAX_GROUP = 16, HEADS_PER_WARP = MAX_GROUP / WARPS, PITCH = D + 1;
  const int split = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
  const int splits = gridDim.x, kv_heads = gridDim.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int length = lengths ? min(max(lengths[b], 0), tokens) : tokens;
  const SplitRange range((length + TILE - 1) / TILE, 1, split, splits);
  if (split >= range.active) return;

  KVB_DYNAMIC_SHARED(float, shared);
  float* queries = shared;                    // (group, D)
  float* tile = shared + MAX_GROUP * D;       // (TILE, PITCH): keys, then values; the pitch keeps columns free of bank conflicts
  const u64 pair = static_cast<u64>(b) * kv_heads + kv_head, row = pair * group;
  for (int i = threadIdx.x; i < group * D; i += 256) queries[i] = query[row * D + i];

  auto stage = [&](const float* from, u64 token_stride, int first) {
    for (int i = threadIdx.x; i < TILE * D; i += 256) {
      const int token = first + i / D;
      tile[i / D * PITCH + i % D] = token < length ? from[token * token_stride + i % D] : 0.f;
    }
    __syncthreads();
  };
  float o[HEADS_PER_WARP][D / 32] = {}, reference[HEADS_PER_WARP], total[HEADS_PER_WARP], p[HEADS_PER_WARP];
#pragma unroll
  for (int i = 0; i < HEADS_PER_WARP; ++i) reference[i] = kNoReference, total[i] = 0.f;
  for (int block_tile = range.first; block_tile < range.last; ++block_tile) {
    const int first = block_tile * TILE;
    stage(keys + b * key_batch_stride + kv_head * key_head_stride, key_token_stride, first);
#pragma unroll
    for (int i = 0; i < HEADS_PER_WARP; ++i) {
      const int h = warp + i * WARPS;
      if (h >= group) break;   // the same for the whole warp
      float logit = 0.f;       // of token first + lane
      for (int d = 0; d < D; ++d) logit = fmaf(queries[h * D + d], tile[lane * PITCH + d], logit);
      logit = first + lane < length ? logit * scale_log2 : -infinity();
      float next = fmaxf(reference[i], logit);
#pragma unroll
      for (int distance = 16; distance; distance /= 2) next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, distance));
      const float factor = exp2f(reference[i] - next);
      reference[i] = next;
      p[i] = exp2f(logit - next);
      total[i] = fmaf(total[i], factor, p[i]);
#pragma unroll
      for (int c = 0; c < D / 32; ++c) o[i][c] *= factor;
    }
    __syncthreads();   // the keys have been read
    stage(values + b * value_batch_stride + kv_head * value_head_stride, value_token_stride, first);
#pragma unroll
    for (int i = 0; i < HEADS_PER_WARP; ++i) {
      if (warp + i * WARPS >= group) break;
      for (int token = 0; token < TILE; ++token) {
        const float weight = __shfl_sync(0xffffffffu, p[i], token);
#pragma unroll
        for (int c = 0; c < D / 32; ++c) o[i][c] = fmaf(weight, tile[token * PITCH + 32 * c + lane], o[i][c]);
      }
    }
    __syncthreads();   // the values have been read
  }
  float* copies = tile;                                                              // (1, MAX_GROUP, D)
  float2* statistics = reinterpret_cast<float2*>(tile + MAX_GROUP * D);              // (1, MAX_GROUP)
#pragma unroll
  for (int i = 0; i < HEADS_PER_WARP; ++i) {
    const int h = warp + i * WARPS;
    if (h >= group) break;
#pragma unroll
    for (int distance = 16; distance; distance /= 2) total[i] += __shfl_xor_sync(0xffffffffu, total[i], distance);
    if (lane == 0) statistics[h] = make_float2(reference[i], total[i]);
#pragma unroll
    for (int c = 0; c < D / 32; ++c) copies[h * D + 32 * c + lane] = o[i][c];
  }
  const DecodeTarget target = {static_cast<float*>(output) + row * D, lse ? lse + row : nullptr,
                               partial_output + row * splits * D, partial_statistics + row * splits, tickets + pair,
                               output_float32};
  finish_split<float, D, 1, MAX_GROUP, 256>(copies, statistics, shared, target, group, split, splits, range.active);
}

// output[row] = sum_i 2^(lse_i - lse) outputs[i, row],  lse[row] = log sum_i exp(lse_i)
// outputs : (parts, rows, head_dim) In      lses : (parts, rows) natural      output : (rows, head_dim) Out      lse : (rows,) or null
template <class In, class Out>
__global__ void __launch_bounds__(256) attention_merge_kernel(const In* __restrict__ outputs, const float* __restrict__ lses,
                                                              Out* __restrict__ output, float* __restrict__ lse, int parts,
                                                              u64 rows, int head_dim) {
  const u64 row = blockIdx.x;
  float largest = -infinity(), total = 0.f;
  for (int i = 0; i < parts; ++i) largest = fmaxf(largest, lses[i * rows + row]);
  const float shift = largest == -infinity() ? 0.f : largest;   // all parts empty: weights 0, not NaN
  for (int i = 0; i < parts; ++i) total += expf(lses[i * rows + row] - shift);
  const float inverse = inverse_total(total);
  for (int d = threadIdx.x; d < head_dim; d += 256) {
    float sum = 0.f;
    for (int i = 0; i < parts; ++i) {
      const float weight = expf(lses[i * rows + row] - shift) * inverse;
      if (weight != 0.f) sum = fmaf(weight, to_float(outputs[(i * rows + row) * head_dim + d]), sum);
    }
    output[row * head_dim + d] = from_float<Out>(sum);
  }
  if (threadIdx.x == 0 && lse) lse[row] = total == 0.f ? -infinity() : shift + logf(total);
}

}  // namespace kvb

#define KVB_EXPORT_DECODE(T)                                  \
  KVB_EXPORT(128, kvb::attention_decode_kernel<T, 64, 8>)     \
  KVB_EXPORT(255, kvb::attention_decode_kernel<T, 64, 16>)    \
  KVB_EXPORT(128, kvb::attention_decode_kernel<T, 128, 8>)    \
  KVB_EXPORT(255, kvb::attention_decode_kernel<T, 128, 16>)   \
  KVB_EXPORT(255, kvb::attention_decode_kernel<T, 256, 8>)    \
  KVB_EXPORT(255, kvb::attention_decode_kernel<T, 256, 16>)
KVB_EXPORT_DECODE(__half)
KVB_EXPORT_DECODE(__nv_bfloat16)
KVB_EXPORT(128, kvb::attention_decode_simple_kernel<64>)
KVB_EXPORT(128, kvb::attention_decode_simple_kernel<128>)
KVB_EXPORT(128, kvb::attention_decode_simple_kernel<256>)

#define KVB_EXPORT_MERGE(In)                                      \
  KVB_EXPORT(64, kvb::attention_merge_kernel<In, float>)          \
  KVB_EXPORT(64, kvb::attention_merge_kernel<In, __half>)         \
  KVB_EXPORT(64, kvb::attention_merge_kernel<In, __nv_bfloat16>)
KVB_EXPORT_MERGE(float)
KVB_EXPORT_MERGE(__half)
KVB_EXPORT_MERGE(__nv_bfloat16)
