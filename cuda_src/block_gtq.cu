// Block-GTQ: keys to codes with another number of bits for every tile of coordinates, and logits on the codes.
// Reference: reference/block_gtq.py (layout of a row, too); where a bit lies in a word: reference/planes.py.
//
// One kernel serves every allocation: what differs between KV heads lies in tables in memory (`Tables` of
// kvbench/cpu/block_gtq.py), and is the same for all threads of a block.  A group is a whole number of segments of 16
// coordinates, so that its mag2 words are its own, and what it shares with others of a sign or mag1 word are whole
// octets.
//
// block_gtq_encode_kernel: permute, rotate by groups, normalise, code, pack.
//   Work     A block of four warps takes 32 tokens of one head; lane l of each warp has token l.  The vectors stand in
//            shared memory, one coordinate a row, in rate order.  A warp makes whole octets: eight sums of products
//            with rows of R_g, which all lanes read at one address, then eight codes, one per nibble.
//   Codes    Binary search of the boundaries, as many steps as a magnitude has bits.
//   Words    Warps put their octets into words in shared memory by OR, whose order does not matter; sums over warps are
//            added in the order of the warps: the result does not depend on which runs first.
//   Bytes    D sizeof(T) read, and the row of codes and scalars written, once.
//   Counts   D_g multiply-adds per coordinate of a group: the rotation is bound by arithmetic, not by memory.
//
// block_gtq_decode_kernel: the same in reverse.  Numbers go to their places one by one, each lane to its own row: it is
//   there to be complete, attention does not decode.
//
// block_gtq_fold_kernel: the query, permuted and rotated by a dense matrix, times the scale of the logits.
//
// block_gtq_logits_kernel: a thread per token, sums of all query heads of a KV head in registers, each code looked up
//   once; the scalar of a group multiplies its finished sums.
//
// block_gtq_attention_kernel: decode attention on tensor cores, for values of 1 to 4 bits: kvb/block_gtq_attention.cuh.
//
// block_gtq_attention_simple_kernel: decode attention for values of 5 to 8 bits: logits as above, then softmax and
//   values, in one launch.
//   Work     Blocks of 256 threads take tiles of 256 tokens of one KV head, for all of its query heads (group <= 16).
//            Logits: a thread per token, base 2.  Online softmax: one reference per head and block.  Values: a thread
//            per coordinate, 256 / D tokens at a time, weights from shared memory.  The query is folded, and the result
//            rotated back, by dense matrices in the same launch; kvb/splits.cuh merges the blocks.
//   Bytes    Every code and scalar of keys and values is read once per KV head, as whole rows: keys 32 rows to a warp,
//            values one row to D threads.
//   Counts   Per token and KV head at D = 128: some 10 instructions per coordinate and thread to take a key's code
//            apart and look it up, as many for a value's, and a multiply-add per query head for each: bound by
//            arithmetic in float32, not by memory.  Tensor cores are not used.
#include "kvb/block_gtq_attention.cuh"
#include "kvb/block_gtq_plan.cuh"
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/rows.cuh"
#include "kvb/splits.cuh"

namespace kvb {

constexpr int kEncodeWarps = 4, kEncodeTokens = 32, kEncodePitch = kEncodeTokens + 1;

// y[e] += sum_i matrix[i, e] factor x[i] for eight neighbouring columns of a square matrix of that size, whose rows
// begin at multiples of 16 bytes.  x : every kEncodePitch elements
__device__ __forceinline__ void multiply_octet(float (&y)[8], const float* x, const float* matrix, int size,
                                               float factor) {
  for (int i = 0; i < size; ++i) {
    const float v = x[i * kEncodePitch] * factor;
    const float4 low = *reinterpret_cast<const float4*>(matrix + i * size);
    const float4 high = *reinterpret_cast<const float4*>(matrix + i * size + 4);
    const float r[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] = fmaf(r[e], v, y[e]);
  }
}

// ---- encode ---------------------------------------------------------------------------------------------------------

// The scalar of a group over |y| / sqrt(size), w = <z, c> / size and e = <c, c> / size.
__device__ __forceinline__ float scale_factor(int mode, float w, float e) {
  if (mode == 1) return 1.f;
  const float root = rsqrtf(mode == 3 ? w : e);
  return mode == 0 ? root : mode == 2 ? w * root * root : root * root;
}

// Stores s in float16, at most 65504, or as a byte: 16 steps per octave around 2^exponent, 0 for 0 and 255 for NaN.
__device__ __forceinline__ void store_scalar(float s, __half* halves, u8* bytes, u64 index, int exponent) {
  if (halves) {
    halves[index] = from_float<__half>(s > 65504.f ? 65504.f : s);
    return;
  }
  int code = 255;
  if (s == s) {
    const float relative = rintf(16.f * (log2f(s) - static_cast<float>(exponent))) + 128.f;
    code = s > 0.f && relative >= 1.f ? static_cast<int>(fminf(relative, 254.f)) : 0;
  }
  bytes[index] = static_cast<u8>(code);
}

// x : (batch, kv_heads, tokens, D), rows contiguous, strides in elements
// mean : (kv_heads, D) every mean_batch_stride elements, subtracted from x, or null
// order : (heads, D); groups : (heads, scalars); segments : (heads, D / 16): of head h of sequence b in row
//         b plan_stride + h; plan_stride is 0 where all sequences share one plan, else kv_heads
// rotations : R_g^T row by row, at multiples of 16 bytes        boundaries : (books, 128)     centroids : (books, 256)
// exponents : (heads,), of scalars of one byte             scale_mode : 0 nc, 1 plain, 2 mse, 3 unbiased
// sign, magnitude, and halves or bytes : (batch, kv_heads, tokens, D / 32, magnitude_words, scalars), strides in tokens
// Grid (ceil(tokens / 32), kv_heads, batch), block 128
template <class T, int D>
__global__ void __launch_bounds__(kEncodeWarps * 32, 4)
    block_gtq_encode_kernel(const T* __restrict__ x, u64 x_batch_stride, u64 x_head_stride, u64 x_token_stride,
                            const float* __restrict__ mean, u64 mean_batch_stride, const i32* __restrict__ order,
                            const i32* __restrict__ groups, const i32* __restrict__ segments,
                            const float* __restrict__ rotations, const float* __restrict__ boundaries,
                            const float* __restrict__ centroids, const i32* __restrict__ exponents, int plan_stride,
                            int scale_mode, u32* sign, u32* magnitude, __half* halves, u8* bytes, u64 batch_stride,
                            u64 head_stride, int magnitude_words, int scalars, int tokens) {
  constexpr int THREADS = kEncodeWarps * 32, SIGN_WORDS = D / 32;
  KVB_DYNAMIC_SHARED(float, columns);                                      // (D, pitch), a token a column
  u32* words = reinterpret_cast<u32*>(columns + D * kEncodePitch);         // (sign and magnitude words, pitch)
  KVB_SHARED(float, parts, [4][kEncodeWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.x * kEncodeTokens, count = min(tokens - first, kEncodeTokens);
  const int head = blockIdx.y, b = blockIdx.z;
  const int plan = b * plan_stride + head;
  const u64 token = b * batch_stride + head * head_stride + first;

  // A quarter of x - mean, which cannot overflow.
  for (int i = threadIdx.x; i < (SIGN_WORDS + magnitude_words) * kEncodePitch; i += THREADS) words[i] = 0;
  for (int t = warp; t < kEncodeTokens; t += kEncodeWarps) {
    const T* row = x + b * x_batch_stride + head * x_head_stride + (first + t) * x_token_stride;
    for (int d = lane; d < D; d += 32) {
      const int at = order[plan * D + d];
      float v = t < count ? 0.25f * to_float(row[at]) : 0.f;
      if (mean) v = fmaf(-0.25f, mean[b * mean_batch_stride + head * D + at], v);
      columns[d * kEncodePitch + t] = v;
    }
  }
  __syncthreads();
  bool finite = true;
  for (int d = warp; d < D; d += kEncodeWarps) finite = finite && fabsf(columns[d * kEncodePitch + lane]) < infinity();
  parts[0][warp][lane] = finite ? 0.f : 1.f;
  __syncthreads();
  finite = parts[0][0][lane] + parts[0][1][lane] + parts[0][2][lane] + parts[0][3][lane] == 0.f;
  const u32 keep = finite ? 0xffffffffu : 0u;
  __syncthreads();

  for (int g = 0; g < scalars; ++g) {
    const KeyGroup group = reinterpret_cast<const KeyGroup*>(groups)[plan * scalars + g];
    float s = 0.f;
    if (group.size > 0) {   // the same for the whole block
      const float* own = columns + group.start * kEncodePitch + lane;
      float largest = 0.f, multiplier, undo, square = 0.f, inner = 0.f, energy = 0.f;
      for (int i = warp; i < group.size; i += kEncodeWarps) largest = fmaxf(largest, fabsf(own[i * kEncodePitch]));
      parts[0][warp][lane] = largest;
      __syncthreads();
      for (int other = 0; other < kEncodeWarps; ++other) largest = fmaxf(largest, parts[0][other][lane]);
      power_of_two(largest, multiplier, undo);
      for (int i = warp; i < group.size; i += kEncodeWarps) {
        const float v = own[i * kEncodePitch] * multiplier;
        square = fmaf(v, v, square);
      }
      parts[1][warp][lane] = square;
      __syncthreads();
      square = parts[1][0][lane] + parts[1][1][lane] + parts[1][2][lane] + parts[1][3][lane];
      square *= group.inverse_size;
      const float inverse = square > 0.f ? rsqrtf(square) : 0.f, unit = square * inverse;
      const float* decisions = boundaries + group.book * kMostBoundaries;
      const float* levels = centroids + group.book * kMostCodes;
      for (int octet = warp; octet < group.size / 8; octet += kEncodeWarps) {
        float y[8] = {};
        multiply_octet(y, own, rotations + group.rotation + 8 * octet, group.size, multiplier);
        u32 negative = 0, bits_0_to_3 = 0, bits_4_to_6 = 0;   // nibble e: the sign, and the magnitude
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float z = fabsf(y[e]) * inverse;
          int m = 0;
          for (int step = (1 << (group.bits - 1)) >> 1; step; step >>= 1)
            if (z > decisions[m + step - 1]) m += step;
          const float c = levels[m];
          inner = fmaf(z, c, inner);
          energy = fmaf(c, c, energy);
          if (y[e] < 0.f && inverse > 0.f) negative |= 1u << (4 * e);
          bits_0_to_3 |= static_cast<u32>(m & 15) << (4 * e);
          bits_4_to_6 |= static_cast<u32>(m >> 4) << (4 * e);
        }
        const int j = group.start + 8 * octet, s_of_octet = j / 8 % 4;
        const KeySegment segment = reinterpret_cast<const KeySegment*>(segments)[plan * (D / 16) + j / 16];
        atomicOr(words + j / 32 * kEncodePitch + lane, (negative & keep) << s_of_octet);
        u32* row_of_magnitudes = words + SIGN_WORDS * kEncodePitch + lane;
        const u32 fields[3] = {bits_0_to_3, bits_0_to_3 >> 2, bits_4_to_6};
#pragma unroll
        for (int pair = 0; pair < 3; ++pair)
          if (group.bits >= 3 + 2 * pair)
            atomicOr(row_of_magnitudes + segment.pairs[pair] * kEncodePitch,
                     (fields[pair] & keep & 0x33333333u) << (2 * (s_of_octet & 1)));
        if (group.bits % 2 == 0) {
          const u32 top = group.bits < 6 ? bits_0_to_3 >> (group.bits - 2 & 3) : bits_4_to_6 >> (group.bits - 6 & 3);
          atomicOr(row_of_magnitudes + segment.top * kEncodePitch,
                   (top & keep & 0x11111111u) << (2 * segment.top_half + (s_of_octet & 1)));
        }
      }
      parts[2][warp][lane] = inner;
      parts[3][warp][lane] = energy;
      __syncthreads();
      inner = (parts[2][0][lane] + parts[2][1][lane] + parts[2][2][lane] + parts[2][3][lane]) * group.inverse_size;
      energy = (parts[3][0][lane] + parts[3][1][lane] + parts[3][2][lane] + parts[3][3][lane]) * group.inverse_size;
      if (unit > 0.f) s = unit * scale_factor(scale_mode, inner, energy) * undo * 4.f;
    }
    if (warp == 0 && lane < count)
      store_scalar(finite ? s : not_a_number(), halves, bytes, (token + lane) * scalars + g, exponents[plan]);
    __syncthreads();
  }

  for (int t = warp; t < count; t += kEncodeWarps) {
    if (lane < SIGN_WORDS) sign[(token + t) * SIGN_WORDS + lane] = words[lane * kEncodePitch + t];
    for (int i = lane; i < magnitude_words; i += 32)
      magnitude[(token + t) * magnitude_words + i] = words[(SIGN_WORDS + i) * kEncodePitch + t];
  }
}

// ---- decode ---------------------------------------------------------------------------------------------------------

// The keys of one (sequence, KV head), from its first token on, and where its plan is.
struct KeyRows {
  const u32 *sign, *magnitude;
  const __half* halves;   // scalars: one of the two
  const u8* bytes;
  int magnitude_words, scalars, exponent;
};

// The words of segment k of one token, each with the octets s = 0, 1 of the segment at bits 4 p + s.
struct SegmentWords {
  u32 signs, pairs[3], top;

  // Of coordinate j = 8 s + p, 0 to 15: the sign above the magnitude.
  __device__ __forceinline__ u32 code(int bits, int j) const {
    const int place = 4 * (j & 7), s = j >> 3;
    u32 code = (signs >> (place + s) & 1u) << (bits - 1);
#pragma unroll
    for (int i = 0; i < 3; ++i) code |= (pairs[i] >> (place + 2 * s) & 3u) << (2 * i);
    if (bits % 2 == 0) code |= (top >> (place + s) & 1u) << (bits - 2);
    return code;
  }
};
template <int D>
__device__ __forceinline__ SegmentWords segment_words(const KeyRows& keys, const KeySegment& segment, u64 token,
                                                      int k) {
  const u32* row = keys.magnitude + token * keys.magnitude_words;
  SegmentWords words = {keys.sign[token * (D / 32) + k / 2] >> (2 * (k & 1)), {0, 0, 0}, 0};
#pragma unroll
  for (int i = 0; i < 3; ++i)
    if (segment.bits >= 3 + 2 * i) words.pairs[i] = row[segment.pairs[i]];
  if (segment.bits % 2 == 0) words.top = row[segment.top] >> (2 * segment.top_half);
  return words;
}

// out : (batch, kv_heads, tokens, D), contiguous       rotations : R_g row by row, at multiples of 16 bytes
// Other arguments, grid and block as for encode
template <class T, int D>
__global__ void __launch_bounds__(kEncodeWarps * 32, 4)
    block_gtq_decode_kernel(const u32* __restrict__ sign, const u32* __restrict__ magnitude,
                            const __half* __restrict__ halves, const u8* __restrict__ bytes, u64 batch_stride,
                            u64 head_stride, int magnitude_words, int scalars, const i32* __restrict__ order,
                            const i32* __restrict__ groups, const i32* __restrict__ segments,
                            const float* __restrict__ rotations, const float* __restrict__ centroids,
                            const i32* __restrict__ exponents, int plan_stride, T* out, int tokens) {
  KVB_DYNAMIC_SHARED(float, columns);   // (D, pitch): the centroids, a token a column
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.x * kEncodeTokens, count = min(tokens - first, kEncodeTokens);
  const int head = blockIdx.y, b = blockIdx.z, plan = b * plan_stride + head;
  const u64 token = b * batch_stride + head * head_stride + first + min(lane, count - 1);   // one that is there
  const KeyRows keys = {sign, magnitude, halves, bytes, magnitude_words, scalars, exponents[plan]};
  for (int k = warp; k < D / 16; k += kEncodeWarps) {
    const KeySegment segment = reinterpret_cast<const KeySegment*>(segments)[plan * (D / 16) + k];
    const SegmentWords words = segment_words<D>(keys, segment, token, k);
    const float* levels = centroids + segment.book * kMostCodes;
#pragma unroll 4
    for (int j = 0; j < 16; ++j) columns[(16 * k + j) * kEncodePitch + lane] = levels[words.code(segment.bits, j)];
  }
  __syncthreads();
  T* to = out + ((static_cast<u64>(b) * gridDim.y + head) * tokens + first + lane) * D;
  for (int g = 0; g < scalars; ++g) {
    const KeyGroup group = reinterpret_cast<const KeyGroup*>(groups)[plan * scalars + g];
    if (group.size == 0) break;
    const float s = load_scalar(halves, bytes, token * scalars + g, keys.exponent);
    const float* own = columns + group.start * kEncodePitch + lane;
    for (int octet = warp; octet < group.size / 8; octet += kEncodeWarps) {
      float y[8] = {};
      multiply_octet(y, own, rotations + group.rotation + 8 * octet, group.size, 1.f);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (lane < count) to[order[plan * D + group.start + 8 * octet + e]] = from_float<T>(s * y[e]);
    }
  }
}

// ---- logits ---------------------------------------------------------------------------------------------------------

// folded[b, h, j] = scale sum_i query[b, h, i] matrices[b plan_stride + KV head, i, j]
// query : (batch, q_heads, D); query_type : 0 float, 1 fp16, 2 bf16     matrices : (heads, D, D)
// Grid (q_heads, batch), block D
template <int D>
__global__ void __launch_bounds__(D)
    block_gtq_fold_kernel(const void* __restrict__ query, int query_type, const float* __restrict__ matrices,
                          int plan_stride, float scale, float* folded, int group) {
  KVB_SHARED(float, staged, [D]);
  const int j = threadIdx.x;
  const u64 row = static_cast<u64>(blockIdx.y) * gridDim.x + blockIdx.x;
  const u64 plan = blockIdx.y * plan_stride + blockIdx.x / group;
  staged[j] = load_float(query, query_type, row * D + j);
  __syncthreads();
  const float* column = matrices + plan * (D * D) + j;
  float sum = 0.f;
  for (int i = 0; i < D; ++i) sum = fmaf(staged[i], column[i * D], sum);
  folded[row * D + j] = scale * sum;
}

// Segments of a plan, and the codebook of every group: positive codes first, then negative ones.  256 threads.
template <int D>
__device__ __forceinline__ void stage_plan(KeySegment (&own)[D / 16], float (&tables)[kMostGroups][kMostCodes],
                                           const i32* segments, const float* centroids, int plan) {
  for (int i = threadIdx.x; i < D / 16; i += 256)
    own[i] = reinterpret_cast<const KeySegment*>(segments)[plan * (D / 16) + i];
  __syncthreads();
  for (int k = 0; k < D / 16; ++k)
    if (k == 0 || own[k].group != own[k - 1].group)   // as many threads as a table has entries
      tables[own[k].group][threadIdx.x] = centroids[own[k].book * kMostCodes + threadIdx.x];
  __syncthreads();
}

// total[h] = sum_g s_g <queries_hg, c_g> of one token.
template <int D, int HEADS>
__device__ __forceinline__ void token_logits(float (&total)[HEADS], const KeyRows& keys, u64 token,
                                             const float (&queries)[D][HEADS], const KeySegment (&own)[D / 16],
                                             const float (&tables)[kMostGroups][kMostCodes]) {
  float sum[HEADS] = {};
#pragma unroll
  for (int h = 0; h < HEADS; ++h) total[h] = 0.f;
#pragma unroll 1
  for (int k = 0; k < D / 16; ++k) {
    const KeySegment segment = own[k];
    const SegmentWords words = segment_words<D>(keys, segment, token, k);
    const float* table = tables[segment.group];
#pragma unroll 4
    for (int j = 0; j < 16; ++j) {
      const float c = table[words.code(segment.bits, j)];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) sum[h] = fmaf(queries[16 * k + j][h], c, sum[h]);
    }
    if (k + 1 == D / 16 || own[k + 1].group != segment.group) {   // the last one of its group
      const float s = load_scalar(keys.halves, keys.bytes, token * keys.scalars + segment.group, keys.exponent);
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        total[h] = fmaf(s, sum[h], total[h]);
        sum[h] = 0.f;
      }
    }
  }
}

// out[b, h, t] = sum_g s_tg <folded_hg, c_tg>
// folded : (batch, kv_heads, group, D), group <= HEADS     out : (batch, kv_heads * group, tokens)
// Other arguments as for encode.  Grid (blocks, kv_heads, batch), block 256
template <int D, int HEADS>
__global__ void __launch_bounds__(256)
    block_gtq_logits_kernel(const float* __restrict__ folded, const u32* __restrict__ sign,
                            const u32* __restrict__ magnitude, const __half* __restrict__ halves,
                            const u8* __restrict__ bytes, u64 batch_stride, u64 head_stride, int magnitude_words,
                            int scalars, const i32* __restrict__ segments, const float* __restrict__ centroids,
                            const i32* __restrict__ exponents, int plan_stride, float* out, int tokens, int group) {
  KVB_SHARED(float, queries, [D][HEADS]);
  KVB_SHARED(float, tables, [kMostGroups][kMostCodes]);
  KVB_SHARED(KeySegment, own, [D / 16]);
  const u64 pair = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const int plan = blockIdx.z * plan_stride + blockIdx.y;
  for (int i = threadIdx.x; i < D * HEADS; i += 256)
    queries[i / HEADS][i % HEADS] = i % HEADS < group ? folded[(pair * group + i % HEADS) * D + i / HEADS] : 0.f;
  stage_plan<D>(own, tables, segments, centroids, plan);

  const u64 start = blockIdx.z * batch_stride + blockIdx.y * head_stride;
  const KeyRows keys = {sign, magnitude, halves, bytes, magnitude_words, scalars, exponents[plan]};
  for (int t = blockIdx.x * 256 + threadIdx.x; t < tokens; t += gridDim.x * 256) {
    float total[HEADS];
    token_logits<D, HEADS>(total, keys, start + t, queries, own, tables);
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
      if (h < group) out[(pair * group + h) * tokens + t] = total[h];
  }
}

// ---- decode attention -----------------------------------------------------------------------------------------------

// put(h, j, sum_i from[h, i] matrix[i, j]) for all heads and coordinates.  from : shared (HEADS, D); 256 threads, of
// which 256 / D share the heads of one j.
template <int D, int HEADS, class Put>
__device__ __forceinline__ void multiply_rows(const float* from, const float* matrix, const Put& put) {
  constexpr int SHARES = 256 / D, OWN = HEADS / SHARES;
  static_assert(HEADS % SHARES == 0, "every share has as many heads");
  const int j = threadIdx.x % D, share = threadIdx.x / D;
  float sum[OWN] = {};
#pragma unroll 1
  for (int i = 0; i < D; ++i) {
    const float m = matrix[i * D + j];
#pragma unroll
    for (int k = 0; k < OWN; ++k)
      sum[k] = fmaf(from[(share + SHARES * k) * D + i], m, sum[k]);
  }
#pragma unroll
  for (int k = 0; k < OWN; ++k) put(share + SHARES * k, j, sum[k]);
}

// output_h = R_v^T sum_t softmax_t(scale <q_h, k_hat_t>) s_t c_t : one decode step over coded keys and values, the
// latter TurboQuant codes of 1 to 8 bits.
// query : (batch, kv_heads * group, D), query_type 0 float, 1 fp16, 2 bf16, group <= HEADS; output : likewise
// matrices : as for fold; value_matrix : (D, D), R_v         value_centroids : (256,), positive codes, then negative
// value_* : planes and scales of (batch, kv_heads, tokens), strides in tokens, null where the bits lack a plane
// key_mean : (kv_heads, D) every key_mean_batch_stride elements, or null: lse += scale <q, key_mean>
// lengths : (batch,) or null for `tokens`      lse : (batch, kv_heads * group) or null
// scale_log2 = scale log2(e)                   partial_output, partial_statistics, tickets : kvb/splits.cuh
// Grid (splits, kv_heads, batch), block 256; other arguments as for encode
template <int D, int HEADS>
__global__ void __launch_bounds__(256, 1)
    block_gtq_attention_simple_kernel(
        const void* __restrict__ query, int query_type, const float* __restrict__ matrices, int plan_stride,
        const u32* __restrict__ sign, const u32* __restrict__ magnitude, const __half* __restrict__ halves,
        const u8* __restrict__ bytes, u64 batch_stride, u64 head_stride, int magnitude_words, int scalars,
        const i32* __restrict__ segments, const float* __restrict__ centroids, const i32* __restrict__ exponents,
        const u32* __restrict__ value_sign, const u32* __restrict__ value_mag2_0,
        const u32* __restrict__ value_mag2_1, const u32* __restrict__ value_mag2_2,
        const u32* __restrict__ value_mag1, const __half* __restrict__ value_scale, u64 value_batch_stride,
        u64 value_head_stride, const float* __restrict__ value_centroids, int value_bits,
        const float* __restrict__ value_matrix, const float* __restrict__ key_mean, u64 key_mean_batch_stride,
        const int* __restrict__ lengths, void* output, int output_type, float* lse, float* partial_output,
        float2* partial_statistics, u32* tickets, int tokens, int group, float scale_log2) {
  constexpr int SHARES = 256 / D, WARPS = 8;
  KVB_SHARED(float, queries, [D][HEADS]);               // at the end: the rows that are rotated back
  KVB_SHARED(float, tables, [kMostGroups][kMostCodes]); // at the end: scratch of finish_split
  KVB_SHARED(float, value_table, [kMostCodes]);
  KVB_SHARED(KeySegment, own, [D / 16]);
  KVB_SHARED(float, weights, [256][HEADS]);             // at first the query, at the end the partial outputs
  KVB_SHARED(float, largest_of, [WARPS][HEADS]);
  KVB_SHARED(float, reference, [HEADS]);
  KVB_SHARED(float, shrink, [HEADS]);
  KVB_SHARED(float, lse_offset, [HEADS]);
  KVB_SHARED(float2, statistics, [SHARES][HEADS]);
  const int split = blockIdx.x, head = blockIdx.y, b = blockIdx.z, splits = gridDim.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, plan = b * plan_stride + head;
  const int length = lengths ? min(max(lengths[b], 0), tokens) : tokens;
  const int tiles = (length + 255) / 256, active = active_splits(tiles, 1, splits);
  if (split >= active) return;
  const u64 pair = static_cast<u64>(b) * gridDim.y + head, row = pair * group;

  float* raw = &weights[0][0];
  for (int i = threadIdx.x; i < HEADS * D; i += 256)
    raw[i] = i / D < group ? load_float(query, query_type, row * D + i) : 0.f;
  value_table[threadIdx.x] = value_centroids[threadIdx.x];
  if (threadIdx.x < HEADS) reference[threadIdx.x] = kNoReference;
  stage_plan<D>(own, tables, segments, centroids, plan);
  multiply_rows<D, HEADS>(raw, matrices + static_cast<u64>(plan) * (D * D),
                          [&](int h, int j, float x) { queries[j][h] = scale_log2 * x; });
  if (threadIdx.x < HEADS) {
    float dot = 0.f;
    if (key_mean && lse)
      for (int d = 0; d < D; ++d)
        dot = fmaf(raw[threadIdx.x * D + d], key_mean[b * key_mean_batch_stride + head * D + d], dot);
    lse_offset[threadIdx.x] = dot * scale_log2 * 0.693147180559945309f;
  }
  __syncthreads();

  const KeyRows keys = {sign, magnitude, halves, bytes, magnitude_words, scalars, exponents[plan]};
  const u64 first_key = b * batch_stride + head * head_stride;
  const u64 first_value = b * value_batch_stride + head * value_head_stride;
  const int j = threadIdx.x % D, share = threadIdx.x / D, place = 4 * (j & 7), s_of_j = j / 8 % 4;
  float sum[HEADS] = {}, total[HEADS] = {};   // of coordinate j, over the tokens of the share; of the thread's tokens
  for (int tile = split; tile < tiles; tile += active) {
    const int count = min(length - tile * 256, 256);
    const bool present = threadIdx.x < count;
    float logit[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) logit[h] = -infinity();
    if (present) token_logits<D, HEADS>(logit, keys, first_key + tile * u64(256) + threadIdx.x, queries, own, tables);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float largest = logit[h];
#pragma unroll
      for (int distance = 16; distance; distance /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      if (lane == 0) largest_of[warp][h] = largest;
    }
    __syncthreads();
    if (threadIdx.x < HEADS) {
      float next = reference[threadIdx.x];
#pragma unroll
      for (int w = 0; w < WARPS; ++w) next = fmaxf(next, largest_of[w][threadIdx.x]);
      shrink[threadIdx.x] = exp2_approx(reference[threadIdx.x] - next);
      reference[threadIdx.x] = next;
    }
    __syncthreads();
    const float s = present ? to_float(value_scale[first_value + tile * u64(256) + threadIdx.x]) : 0.f;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      const float p = present ? exp2_approx(logit[h] - reference[h]) : 0.f;
      total[h] = fmaf(total[h], shrink[h], p);
      sum[h] *= shrink[h];
      weights[threadIdx.x][h] = p * s;
    }
    __syncthreads();
#pragma unroll 1
    for (int t = share; t < count; t += SHARES) {
      const u64 token = first_value + tile * u64(256) + t;
      const u64 word = token * (D / 32) + j / 32, pair_word = token * (D / 16) + j / 16;
      u32 code = (value_sign[word] >> (place + s_of_j) & 1u) << (value_bits - 1);
      if (value_bits >= 3) code |= value_mag2_0[pair_word] >> (place + 2 * (s_of_j & 1)) & 3u;
      if (value_bits >= 5) code |= (value_mag2_1[pair_word] >> (place + 2 * (s_of_j & 1)) & 3u) << 2;
      if (value_bits >= 7) code |= (value_mag2_2[pair_word] >> (place + 2 * (s_of_j & 1)) & 3u) << 4;
      if (value_bits % 2 == 0) code |= (value_mag1[word] >> (place + s_of_j) & 1u) << (value_bits - 2);
      const float c = value_table[code];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) sum[h] = fmaf(weights[t][h], c, sum[h]);
    }
    __syncthreads();   // before the weights of the next tile
  }

  // ---- the partial result of the block: one copy per share of the tokens ----
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    float all = total[h];
#pragma unroll
    for (int distance = 16; distance; distance /= 2) all += __shfl_xor_sync(0xffffffffu, all, distance);
    if (lane == 0) largest_of[warp][h] = all;
  }
  __syncthreads();
  float* copies = &weights[0][0];   // (SHARES, HEADS, D)
#pragma unroll
  for (int h = 0; h < HEADS; ++h) copies[(share * HEADS + h) * D + j] = sum[h];
  if (threadIdx.x < HEADS) {
    float all = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all += largest_of[w][threadIdx.x];
#pragma unroll
    for (int k = 0; k < SHARES; ++k)
      statistics[k][threadIdx.x] = make_float2(reference[threadIdx.x], k ? 0.f : all);
  }
  float* rows = &queries[0][0];     // (HEADS, D)
  for (int i = threadIdx.x; i < HEADS * D; i += 256) rows[i] = 0.f;
  const DecodeTarget target = {lse ? lse + row : nullptr, key_mean ? lse_offset : nullptr,
                               partial_output + row * splits * D, partial_statistics + row * splits, tickets + pair};
  const bool finished = finish_split<D, SHARES, HEADS, 256>(
      copies, &statistics[0][0], &tables[0][0], target, group, split, splits, active,
      [&](int index, const float4& x) { *reinterpret_cast<float4*>(rows + index) = x; });
  if (!finished) return;
  __syncthreads();
  multiply_rows<D, HEADS>(rows, value_matrix, [&](int h, int d, float x) {
    if (h >= group) return;
    const u64 at = (row + h) * D + d;
    if (output_type == 0) static_cast<float*>(output)[at] = x;
    else if (output_type == 1)
      static_cast<__half*>(output)[at] = from_float<__half>(x);
    else
      static_cast<__nv_bfloat16*>(output)[at] = from_float<__nv_bfloat16>(x);
  });
}

}  // namespace kvb

#define KVB_EXPORT_BLOCK_GTQ(D)                                         \
  KVB_EXPORT(128, kvb::block_gtq_encode_kernel<float, D>)               \
  KVB_EXPORT(128, kvb::block_gtq_encode_kernel<__half, D>)              \
  KVB_EXPORT(128, kvb::block_gtq_encode_kernel<__nv_bfloat16, D>)       \
  KVB_EXPORT(128, kvb::block_gtq_decode_kernel<float, D>)               \
  KVB_EXPORT(128, kvb::block_gtq_decode_kernel<__half, D>)              \
  KVB_EXPORT(128, kvb::block_gtq_decode_kernel<__nv_bfloat16, D>)       \
  KVB_EXPORT(48, kvb::block_gtq_fold_kernel<D>)                         \
  KVB_EXPORT(64, kvb::block_gtq_logits_kernel<D, 4>)                    \
  KVB_EXPORT(96, kvb::block_gtq_logits_kernel<D, 16>)                   \
  KVB_EXPORT(168, kvb::block_gtq_attention_simple_kernel<D, 4>)         \
  KVB_EXPORT(224, kvb::block_gtq_attention_simple_kernel<D, 16>)
KVB_EXPORT_BLOCK_GTQ(64)
KVB_EXPORT_BLOCK_GTQ(128)
KVB_EXPORT_BLOCK_GTQ(256)

#define KVB_EXPORT_ATTENTION(D, HEADS, REGISTERS)                               \
  KVB_EXPORT(REGISTERS, kvb::block_gtq_attention_kernel<D, HEADS, 1>)           \
  KVB_EXPORT(REGISTERS, kvb::block_gtq_attention_kernel<D, HEADS, 2>)           \
  KVB_EXPORT(REGISTERS, kvb::block_gtq_attention_kernel<D, HEADS, 3>)           \
  KVB_EXPORT(REGISTERS, kvb::block_gtq_attention_kernel<D, HEADS, 4>)
KVB_EXPORT_ATTENTION(64, 8, 168)
KVB_EXPORT_ATTENTION(64, 16, 224)
KVB_EXPORT_ATTENTION(128, 8, 184)
KVB_EXPORT_ATTENTION(128, 16, 232)
KVB_EXPORT_ATTENTION(256, 8, 240)
