// Exact decode attention over fp16, bf16 and fp32 caches, one query token per sequence, grouped query heads.
// Reference: reference/attention.py.  What a block does: kvb/exact_attention.cuh.
//
// attention_decode_kernel (fp16, bf16; tensor cores)
//   Computes  output_h = sum_t softmax_t(scale <q_h, k_t>) v_t  for all query heads h of a KV head
//             from one read of its cache.
//   Grid      (splits, kv_heads, batch): the blocks of a KV head share its tiles; the last to finish
//             merges (kvb/splits.cuh).
//   Block     8 warps, each with its own tiles of 16 tokens.  A tile is two units, its keys and its values.
//   Pipeline  Each warp has a ring of three units in shared memory filled by cp.async, two of them in flight.  A warp
//             copies whole rows, 512 contiguous bytes an instruction.  In shared memory the 16-byte chunks of each
//             128-byte line are swizzled: chunk c of row r stands at c ^ (r % 8).
//   Keys      S = Q K^T by mma.m16n8k16 with Q as A (query heads are rows) and K as B.  Lane (g, t) =
//             (lane / 4, lane % 4) reads chunk [32 s + 8 t, + 8) of one token: that is a B operand if the order of the
//             head dimensions inside the product is permuted, and any order is right as long as Q has the same.
//   Values    O^T = V^T P^T with V^T as A.  S comes out with (head, two tokens) per lane, exactly the B operand P^T.
//             Lane (g, t) reads [64 s + 8 g, + 8) of four tokens; two PRMT per word pair tokens up.
//   Tokens    Which row of the tile is which column of S is free, too: row_of() is chosen so that with the swizzle
//             neither the reads of keys nor those of values have bank conflicts.
//   Softmax   Online, base 2, reference (subtracted exponent) 8 below the largest logit seen, raised only when a logit
//             exceeds it by 12: p < 4096 fits fp16, and tokens down to 2^-32 of the largest still count.  The total
//             sums the rounded p.
//   Earlier   The result of an earlier launch over other tokens, packed ones say, is merged where this one's is stored:
//             no third launch, each of which costs 2 to 4 us.
//   Bytes     2 * D * 2 per token and KV head, once.  In flight per block: 8 warps * 8 KiB = 64 KiB at D = 128; 3 TB/s
//             at 800 ns need 18 KiB per multiprocessor.
//   Counts    Per 16 tokens at D = 128, 8 heads: 16 cp.async, 16 LDS.128, 24 mma, 32 PRMT, about 40 for softmax: 130
//             warp instructions for 8 KiB; 3 TB/s would be 50 G instructions/s of the 900 G that the chip issues:
//             memory bound.
//   Tried     H100, fp16, D = 128, us with L2 flushed; in brackets cuDNN through torch SDPA in the same run.
//                                                             32:8 128K    32:8 32K   16:2 128K  16:2 32K   32:32 128K
//               lanes copy just the chunks they read:
//                 no barrier, but segments of 64 bytes        266 (192)    83 (63)    90 (63)    40 (26)    990 (708)
//               whole rows, padded by 32 bytes                215          69         75         35         799
//               + fetches of 128 bytes into L2                207          67         73         33         762
//               + one block per multiprocessor                205          65         70         30         782
//               + fewer units in flight, evict first          202          59         61         25         769
//               tiles dealt out on demand instead             206          60         63         26         788
//               bulk copies with an mbarrier, a row each      210          68         73         34         770
//               swizzled, queries in shared memory            201 (192)    59 (63)    61 (63)    25 (26)    764 (707)
//               + units begin at lines of shared memory       194          57         61                    720
//               + evict first up to 256 MB (this version)     188 (192)    58 (63)    62 (63)    26 (26)    705 (707)
//             Before the last two, a static variable of 16 bytes moved the ring off the 128-byte lines of shared
//             memory, and each line that arrived took two of them: 742 us, 752 by writing, against 690 and 702.  By 64
//             bytes it is 703.  Nothing else mattered: an empty loop of the same copies took as long.  Bulk copies of
//             32 KB, a unit of all eight warps, take 694, no less.
//             Without evict first: 60.4 at 32:8 32K, 64.3 at 16:2 128K; with it 194 at 32:8 128K.  Where the flush of
//             the L2 reads instead of writing, both are the same, 177 at 32:8 128K and 690 at 32:32.
//             The query, and the first entries of lists, are asked for early: over the 2 % of a decode step of rabitq
//             it was 11.6 instead of 12.6 us by ncu.
//
// attention_sparse_kernel: the same over listed tokens alone, with one list per KV head or per query head.
//   Leading   slots of the cache, those of exact sinks and tail, may stand behind every list: all that a sparse
//             cache attends to is one launch, without a second one for them and a third that merges.
//   Rows      A lane loads one of the 16 positions of a tile, two tiles ahead; copies take them by shuffles.  Whole
//             rows of 2 * D bytes, so that segments of 128 bytes or more are read, and nothing of any other row.
//   Bytes     2 * D * 2 per listed token and list, and 4 for its position.
//
// attention_decode_simple_kernel, attention_sparse_simple_kernel (fp32; also the plainly readable version): a warp per
//   query head, logits one token per lane.
// attention_merge_kernel: partial results of different launches (exact part, packed part, other devices) into one.
#include "kvb/exact_attention.cuh"

namespace kvb {

// The same result for a float cache, without tensor cores; group <= 16.
template <int D, class Tokens>
__device__ __forceinline__ void attend_simple(const DecodeArguments<float>& arguments, const Tokens& tokens,
                                              int kv_head) {
  static_assert(D % 32 == 0, "lanes share a row");
  constexpr int TILE = 32, WARPS = 8, MAX_GROUP = 16, HEADS_PER_WARP = MAX_GROUP / WARPS, PITCH = D + 1;
  const int split = blockIdx.x, b = blockIdx.z, splits = gridDim.x, group = arguments.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int length = tokens.count;
  const int tiles = (length + TILE - 1) / TILE, active = active_splits(tiles, 1, splits);
  if (split >= active) return;
  const float scale_log2 = arguments.scale_log2;

  KVB_DYNAMIC_SHARED(float, shared);
  float* queries = shared;                    // (group, D)
  float* tile = shared + MAX_GROUP * D;       // (TILE, PITCH): keys, then values; the pitch keeps columns free of bank
                                              // conflicts
  const u64 pair = static_cast<u64>(b) * gridDim.y + blockIdx.y, row = pair * group;
  const float* keys = arguments.keys + b * arguments.key_batch_stride + kv_head * arguments.key_head_stride;
  const float* values = arguments.values + b * arguments.value_batch_stride + kv_head * arguments.value_head_stride;
  for (int i = threadIdx.x; i < group * D; i += 256) queries[i] = arguments.query[row * D + i];

  auto stage = [&](const float* from, u64 token_stride, int first) {
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * D; i += 256) {
      const int token = tokens.token(first + i / D);
      tile[i / D * PITCH + i % D] = token >= 0 ? from[token * token_stride + i % D] : 0.f;
    }
    __syncthreads();
  };
  float o[HEADS_PER_WARP][D / 32] = {}, reference[HEADS_PER_WARP], total[HEADS_PER_WARP], p[HEADS_PER_WARP];
#pragma unroll
  for (int i = 0; i < HEADS_PER_WARP; ++i) reference[i] = kNoReference, total[i] = 0.f;
  for (int first = split * TILE; first < length; first += active * TILE) {
    stage(keys, arguments.key_token_stride, first);
    const bool is_token = tokens.token(first + lane) >= 0;
#pragma unroll
    for (int i = 0; i < HEADS_PER_WARP; ++i) {
      const int h = warp + i * WARPS;
      if (h >= group) break;   // the same for the whole warp
      float logit = 0.f;       // of token first + lane
#pragma unroll 8
      for (int d = 0; d < D; ++d) logit = fmaf(queries[h * D + d], tile[lane * PITCH + d], logit);
      logit = is_token ? logit * scale_log2 : -infinity();
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
    stage(values, arguments.value_token_stride, first);
#pragma unroll
    for (int i = 0; i < HEADS_PER_WARP; ++i) {
      if (warp + i * WARPS >= group) break;
#pragma unroll 4
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
  const StoreOutput<float> store = {static_cast<float*>(arguments.output) + row * D, arguments.output_float32};
  finish_split<D, 1, MAX_GROUP, 256>(copies, statistics, shared, target_of(arguments, pair, D), group, split, splits,
                                     active, store);
}

// lengths : (batch,) or null for `tokens`; the other arguments as in DecodeArguments.
// indices : (batch, lists, slots) with strides in elements        counts : (batch, lists)
// leading : (batch,) or null, slots in front of every list, of the first `first`; indices and lengths count from there
#define KVB_DECODE_PARAMETERS(T)                                                                                    \
  const T *__restrict__ query, const T *__restrict__ keys, const T *__restrict__ values,                            \
      const int *__restrict__ lengths, void *output, float *lse, float *partial_output, float2 *partial_statistics, \
      u32 *tickets, const float *__restrict__ earlier_output, const float *__restrict__ earlier_lse,                \
      u64 key_batch_stride, u64 key_head_stride, u64 key_token_stride, u64 value_batch_stride,                      \
      u64 value_head_stride, u64 value_token_stride, int tokens, int group, float scale_log2, int output_float32
#define KVB_LIST_PARAMETERS                                                                                   \
  const int *__restrict__ indices, const int *__restrict__ counts, u64 index_batch_stride, u64 index_list_stride, \
      int slots, int lists_per_head, const int *__restrict__ leading, int first
#define KVB_DECODE_ARGUMENTS                                                                                     \
  query, keys, values, output, lse, partial_output, partial_statistics, tickets, earlier_output, earlier_lse,       \
      key_batch_stride, key_head_stride, key_token_stride, value_batch_stride, value_head_stride,                   \
      value_token_stride, group, scale_log2, output_float32
#define KVB_LISTED_TOKENS                                                                                     \
  ListedTokens(lengths, blockIdx.z, tokens, indices, counts, index_batch_stride, index_list_stride, slots, blockIdx.y, \
               gridDim.y, leading, first)

template <class T, int D, int HEADS>
__global__ void __launch_bounds__(32 * kDecodeWarps, kResidentBlocks<D, HEADS>)
    attention_decode_kernel(KVB_DECODE_PARAMETERS(T)) {
  KVB_DYNAMIC_SHARED(uint4, shared);
  attend<T, D, HEADS, kDecodeWarps>({KVB_DECODE_ARGUMENTS}, EveryToken(lengths, blockIdx.z, tokens), blockIdx.y, shared,
                                   nullptr, thread_place());
}
template <class T, int D, int HEADS>
__global__ void __launch_bounds__(32 * kDecodeWarps, kResidentBlocks<D, HEADS>)
    attention_sparse_kernel(KVB_DECODE_PARAMETERS(T), KVB_LIST_PARAMETERS) {
  KVB_DYNAMIC_SHARED(uint4, shared);
  attend<T, D, HEADS, kDecodeWarps>({KVB_DECODE_ARGUMENTS}, KVB_LISTED_TOKENS, blockIdx.y / lists_per_head, shared,
                                   nullptr, thread_place());
}
template <int D>
__global__ void __launch_bounds__(256, 2) attention_decode_simple_kernel(KVB_DECODE_PARAMETERS(float)) {
  attend_simple<D>({KVB_DECODE_ARGUMENTS}, EveryToken(lengths, blockIdx.z, tokens), blockIdx.y);
}
template <int D>
__global__ void __launch_bounds__(256, 2)
    attention_sparse_simple_kernel(KVB_DECODE_PARAMETERS(float), KVB_LIST_PARAMETERS) {
  attend_simple<D>({KVB_DECODE_ARGUMENTS}, KVB_LISTED_TOKENS, blockIdx.y / lists_per_head);
}

// output[row] = sum_i 2^(lse_i - lse) outputs[i, row],  lse[row] = log sum_i exp(lse_i)
// outputs : (parts, rows, head_dim) In      lses : (parts, rows) natural
// output : (rows, head_dim) Out             lse : (rows,) or null
template <class In, class Out>
__global__ void __launch_bounds__(256)
    attention_merge_kernel(const In* __restrict__ outputs, const float* __restrict__ lses, Out* __restrict__ output,
                           float* __restrict__ lse, int parts, u64 rows, int head_dim) {
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
  KVB_EXPORT(128, kvb::attention_decode_kernel<T, 64, 16>)    \
  KVB_EXPORT(128, kvb::attention_decode_kernel<T, 128, 8>)    \
  KVB_EXPORT(168, kvb::attention_decode_kernel<T, 128, 16>)   \
  KVB_EXPORT(168, kvb::attention_decode_kernel<T, 256, 8>)    \
  KVB_EXPORT(232, kvb::attention_decode_kernel<T, 256, 16>)
#define KVB_EXPORT_SPARSE(T)                                  \
  KVB_EXPORT(128, kvb::attention_sparse_kernel<T, 64, 8>)     \
  KVB_EXPORT(128, kvb::attention_sparse_kernel<T, 64, 16>)    \
  KVB_EXPORT(128, kvb::attention_sparse_kernel<T, 128, 8>)    \
  KVB_EXPORT(184, kvb::attention_sparse_kernel<T, 128, 16>)   \
  KVB_EXPORT(184, kvb::attention_sparse_kernel<T, 256, 8>)    \
  KVB_EXPORT(240, kvb::attention_sparse_kernel<T, 256, 16>)
KVB_EXPORT_DECODE(__half)
KVB_EXPORT_SPARSE(__half)
KVB_EXPORT_SPARSE(__nv_bfloat16)
KVB_EXPORT_DECODE(__nv_bfloat16)
KVB_EXPORT(128, kvb::attention_decode_simple_kernel<64>)
KVB_EXPORT(128, kvb::attention_decode_simple_kernel<128>)
KVB_EXPORT(128, kvb::attention_decode_simple_kernel<256>)
KVB_EXPORT(128, kvb::attention_sparse_simple_kernel<64>)
KVB_EXPORT(128, kvb::attention_sparse_simple_kernel<128>)
KVB_EXPORT(128, kvb::attention_sparse_simple_kernel<256>)

#define KVB_EXPORT_MERGE(In)                                      \
  KVB_EXPORT(40, kvb::attention_merge_kernel<In, float>)          \
  KVB_EXPORT(40, kvb::attention_merge_kernel<In, __half>)         \
  KVB_EXPORT(40, kvb::attention_merge_kernel<In, __nv_bfloat16>)
KVB_EXPORT_MERGE(float)
KVB_EXPORT_MERGE(__half)
KVB_EXPORT_MERGE(__nv_bfloat16)
