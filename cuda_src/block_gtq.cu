// Block-GTQ: keys to codes with another number of bits for every tile of coordinates, and logits on the codes.
// Reference: reference/block_gtq.py (layout of a row, too); where a bit lies in a word: reference/planes.py.
//
// One kernel serves every allocation: what differs between KV heads lies in tables in memory (`Tables` of
// kvbench/cpu/block_gtq.py), and is the same for all threads of a block.  A group is a whole number of segments of 16
// coordinates, so that its mag2 words are its own, and what it shares with others of a sign or mag1 word are whole
// octets.
//
// block_gtq_encode_kernel: permute, rotate by groups, normalise, code, pack.
//   Work     A warp takes 32 tokens of one head at a time, with a grid stride; the warps of a block (four, two at
//            D = 256) share codebooks only.
//   Rows     stand in shared memory in rate order, in fp16.  Rows of fp16 at multiples of 16 bytes come in chunks of
//            eight numbers, all of a warp's loads at once, and every number goes to its place; others number by number.
//   Rotation mma.m16n8k16 with tokens as rows of A and 256 R_g^T as B, in two parts of fp16, which the host has put
//            into the order of the operands: high and low part leave 2^-22 of a number.  PARTS = 1: numbers of 16 bits,
//            without a mean, are one part of A, fp16 as it is, bfloat16 times a power of two per token and group, where
//            only numbers below 2^-15 of the largest lose bits.  PARTS = 2: what that leaves of float32, or of the
//            difference from the mean, times that power of two, is a second part; low times low is left out.  Sums are
//            float32: codes agree with those of float32 arithmetic wherever that is sure of them.
//   Norm     From the parts of A, not from the sums.
//   Codes    Lane (g, t) = (lane / 4, lane % 4) has coordinates 2t and 2t + 1 of an octet, for tokens g + 8 q: four
//            coordinates of a segment of 16 for each of them, which are byte t of every word of the planes.  So a lane
//            stores bytes, of nobody else's.  Up to 3 bits: comparisons with decisions times the norm; more: binary
//            search of the decisions in shared memory.
//   Results  leave through shared memory, whole rows.  Those of tokens with NaN or Inf are cleared there.
//   Bytes    D sizeof(T) read (with PARTS = 2 or bfloat16 twice, once from a cache), and the row of codes and scalars
//            written, once.
//   Counts   Warp instructions per 32 tokens at D = 128, fp16, segments of 5, 4, 4, 3, 3, 2, 2 and 1 bits (SASS for
//            sm_90): start 330, rows 455, norms 310, products 600, codes 1710 (of a segment: 47 for 1 bit, 115 for 2,
//            193 for 3, 322 for 4, 403 for 5), bytes 800, groups 1350, rows out 130: 5700 in all.  32K tokens x 8 heads
//            on 132 multiprocessors at 1.75 GHz: 51 us of issue slots, 28 us of memory at 3 TB/s.
//   Tried    H100, 32K tokens x 8 heads of 128, fp16, us with L2 flushed: a block for every 128 tokens, operands of the
//            rotation loaded when they are multiplied 90.4; tables staged once per block, operands of the first octet
//            loaded ahead (this version) 90.0.  Of the time of its warps (ncu) 13 % goes to storing rows by single
//            numbers, which meet in banks, 7 to waiting for rows, 7 for operands of the second octet, 5 for the plan.
//
// block_gtq_decode_kernel: the same in reverse, in float32; lane l of each warp has token l.  Numbers go to their
//   places one by one, each lane to its own row: it is there to be complete, attention does not decode.
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

constexpr int kDecodeWarps = 4, kDecodeTokens = 32, kDecodePitch = kDecodeTokens + 1;
constexpr int kEncodeTokens = 32;   // of a warp
template <int D>
constexpr int kEncodeWarps = D == 256 ? 2 : 4;
template <class T, int PARTS>
constexpr int kResidentEncodeWarps = PARTS == 2 ? 8 : kHasWideRange<T> ? 12 : 16;   // on a multiprocessor
constexpr float kRotationScale = 256.f;   // of the parts of rotations in fp16

// y[e] += sum_i matrix[i, e] factor x[i] for eight neighbouring columns of a square matrix of that size, whose rows
// begin at multiples of 16 bytes.  x : every kDecodePitch elements
__device__ __forceinline__ void multiply_octet(float (&y)[8], const float* x, const float* matrix, int size,
                                               float factor) {
  for (int i = 0; i < size; ++i) {
    const float v = x[i * kDecodePitch] * factor;
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

// s in float16, at most 65504, or as a byte: 16 steps per octave around 2^exponent, 0 for 0 and 255 for NaN.
__device__ __forceinline__ u16 stored_scalar(float s, bool in_half, int exponent) {
  if (in_half) {
    const __half stored = from_float<__half>(s > 65504.f ? 65504.f : s);
    return *reinterpret_cast<const u16*>(&stored);
  }
  const float relative = rintf(16.f * (log2f(s) - static_cast<float>(exponent))) + 128.f;
  return static_cast<u16>(s > 0.f && relative >= 1.f ? fminf(relative, 254.f) : 0.f);
}

// A lane codes four coordinates of a segment and token at a time: c = 2 e + s is nibble 2 t + e of octet s.  They fill
// byte t of a word: bits 4 e + s of it, or where a plane has two bits, 2 c and the next.
__device__ __forceinline__ constexpr int bit_place(int c) { return c / 2 * 4 + c % 2; }

// What the codes of a segment are made of, of four tokens of a lane.
struct CodeBytes {
  u32 sign[4], pairs[3][4], top[4];   // the planes that the bits have
};

// Codes of y, [tokens 0 and 1, tokens 2 and 3][octet], numbers as mma_m16n8k16 gives them, which are unit z, inverse =
// 1 / unit; inner += |y| c and energy += c c.  BITS = 6 stands for 6 to 8.
// decisions : shared (128,) of the group's codebook, followed by its magnitudes
template <int BITS>
__device__ __forceinline__ CodeBytes code_segment(const float (&y)[2][2][4], const float (&unit)[4],
                                                  const float (&inverse)[4], const float* decisions, int bits,
                                                  float (&inner)[4], float (&energy)[4]) {
  CodeBytes codes = {};
  const float* levels = decisions + kMostBoundaries;
  int m[4][4] = {};
  if constexpr (BITS >= 4) {   // binary search
    auto halve = [&](int step) {
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (fabsf(y[q / 2][c % 2][q % 2 * 2 + c / 2]) * inverse[q] > decisions[m[q][c] + step - 1]) m[q][c] += step;
    };
    if constexpr (BITS == 6)
#pragma unroll 1
      for (int step = 1 << (bits - 2); step > 8; step >>= 1) halve(step);
    if constexpr (BITS >= 5) halve(8);
    halve(4);
    halve(2);
    halve(1);
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    u32 packed = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float v = y[q / 2][c % 2][q % 2 * 2 + c / 2], size = fabsf(v);
      float level;
      codes.sign[q] |= __float_as_uint(v) >> (31 - bit_place(c)) & 1u << bit_place(c);
      if constexpr (BITS == 1) {
        level = levels[0];
      } else if constexpr (BITS == 2) {
        const bool up = size > decisions[0] * unit[q];
        level = up ? levels[1] : levels[0];
        if (up) codes.top[q] |= 1u << bit_place(c);
      } else if constexpr (BITS == 3) {
        const float low = decisions[0] * unit[q], middle = decisions[1] * unit[q], high = decisions[2] * unit[q];
        const bool upper = size > middle, odd = size > (upper ? high : low);
        const float if_odd = upper ? levels[3] : levels[1], if_even = upper ? levels[2] : levels[0];
        level = odd ? if_odd : if_even;
        if (upper) codes.pairs[0][q] |= 2u << (2 * c);
        if (odd) codes.pairs[0][q] |= 1u << (2 * c);
      } else {
        level = levels[m[q][c]];
        packed |= static_cast<u32>(m[q][c]) << (8 * c);
      }
      inner[q] = fmaf(size, level, inner[q]);
      energy[q] = fmaf(level, level, energy[q]);
    }
    if constexpr (BITS >= 4) {
      // Fields of two bits, one per byte, or of one bit, to their places in one byte.
#pragma unroll
      for (int i = 0; i < (BITS == 4 ? 1 : 3); ++i)
        codes.pairs[i][q] = (packed >> (2 * i) & 0x03030303u) * 0x01041040u >> 24;
      codes.top[q] = (packed >> (bits - 2) & 0x01010101u) * 0x01021020u >> 24;
    }
  }
  return codes;
}

template <class Word>
__device__ __forceinline__ void store_rows(Word* to, const Word* from, int size, int lane) {
#pragma unroll 4
  for (int i = lane; i < size; i += 32) to[i] = from[i];
}

// x : (batch, kv_heads, tokens, D), rows contiguous, strides in elements
// mean : (kv_heads, D) every mean_batch_stride elements, subtracted from x, or null (as it must be for PARTS = 1)
// order : (heads, D); groups : (heads, scalars); segments : (heads, D / 16): of head h of sequence b in row
//         b plan_stride + h; plan_stride is 0 where all sequences share one plan, else kv_heads
// rotations : B operands of R_g, (size / 16 of y, size / 16 of z, 2 octets of y, 32) times four words: of the high part
//         of kRotationScale R_g in fp16, and of what it leaves; behind the last 256 words more
// boundaries : (books, 128)     centroids : (books, 256)
// exponents : (heads,), of scalars of one byte             scale_mode : 0 nc, 1 plain, 2 mse, 3 unbiased
// sign, magnitude, and halves or bytes : (batch, kv_heads, tokens, D / 32, magnitude_words, scalars), strides in tokens
// Grid (blocks of a head, kv_heads, batch), block 32 kEncodeWarps
template <class T, int D, int PARTS>
__global__ void __launch_bounds__(kEncodeWarps<D> * 32, kResidentEncodeWarps<T, PARTS> / kEncodeWarps<D>)
    block_gtq_encode_kernel(const T* __restrict__ x, u64 x_batch_stride, u64 x_head_stride, u64 x_token_stride,
                            const float* __restrict__ mean, u64 mean_batch_stride, const i32* __restrict__ order,
                            const i32* __restrict__ groups, const i32* __restrict__ segments,
                            const u32* __restrict__ rotations, const float* __restrict__ boundaries,
                            const float* __restrict__ centroids, const i32* __restrict__ exponents, int plan_stride,
                            int scale_mode, u32* sign, u32* magnitude, __half* halves, u8* bytes, u64 batch_stride,
                            u64 head_stride, int magnitude_words, int scalars, int tokens) {
  constexpr int WARPS = kEncodeWarps<D>, THREADS = 32 * WARPS, SIGN_WORDS = D / 32, SEGMENTS = D / 16;
  constexpr int PITCH = D + 8, PART = kEncodeTokens * PITCH;   // halves
  constexpr bool SCALES = kHasWideRange<T> || PARTS == 2;      // by a power of two for every group
  KVB_SHARED(float, books, [kMostGroups][2][kMostBoundaries]);   // decisions, magnitudes
  KVB_SHARED(u16, places, [D]);                                  // of coordinates in rate order
  KVB_SHARED(u16, coordinates, [D]);                             // at these places
  KVB_SHARED(float, largest_of, [SCALES ? THREADS * (SEGMENTS + 1) : 1]);
  KVB_DYNAMIC_SHARED(char, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y, b = blockIdx.z, plan = b * plan_stride + head;
  const KeyGroup* own_groups = reinterpret_cast<const KeyGroup*>(groups) + plan * scalars;
  const KeySegment* own_segments = reinterpret_cast<const KeySegment*>(segments) + plan * SEGMENTS;
  for (int i = warp; i < scalars; i += WARPS) {
    const KeyGroup group = own_groups[i];
    const int magnitudes = group.size > 0 ? 1 << (group.bits - 1) : 0;   // a group may be there for its place alone
    for (int m = lane; m < magnitudes; m += 32) {
      books[i][0][m] = boundaries[group.book * kMostBoundaries + m];
      books[i][1][m] = centroids[group.book * kMostCodes + m];
    }
  }
  for (int i = threadIdx.x; i < D; i += THREADS) {
    coordinates[i] = static_cast<u16>(order[plan * D + i]);
    places[coordinates[i]] = static_cast<u16>(i);
  }
  __syncthreads();

  // What follows is one warp's own.
  const int row_words = SIGN_WORDS + magnitude_words;
  char* own = shared + warp * (2 * PARTS * PART + kEncodeTokens * (4 * row_words + 2 * kMostGroups));
  __half* operands = reinterpret_cast<__half*>(own);                     // (parts, tokens, pitch)
  u32* sign_rows = reinterpret_cast<u32*>(operands + PARTS * PART);      // (tokens, D / 32)
  u32* magnitude_rows = sign_rows + kEncodeTokens * SIGN_WORDS;          // (tokens, words)
  u16* scalar_rows = reinterpret_cast<u16*>(magnitude_rows + kEncodeTokens * magnitude_words);   // (tokens, scalars)
  float* own_largest = largest_of + warp * (SCALES ? 32 * (SEGMENTS + 1) : 0);   // (tokens, segments), padded

#pragma unroll 1
  for (int first = (blockIdx.x * WARPS + warp) * kEncodeTokens; first < tokens;
       first += gridDim.x * WARPS * kEncodeTokens) {
    const int count = min(tokens - first, kEncodeTokens);
    for (int i = lane; i < kEncodeTokens * magnitude_words; i += 32) magnitude_rows[i] = 0;

    // ---- rows, in rate order, as A operands ----
    constexpr int PAIRS = D / 64;   // of neighbouring coordinates, per lane
    int from[PAIRS][2];
    float centre[PAIRS][2];
#pragma unroll
    for (int i = 0; i < PAIRS; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        from[i][e] = coordinates[64 * i + 2 * lane + e];
        centre[i][e] = PARTS == 2 && mean ? -0.25f * mean[b * mean_batch_stride + head * D + from[i][e]] : 0.f;
      }
    const T* rows = x + b * x_batch_stride + head * x_head_stride + first * x_token_stride;
    // A quarter of x - mean, which cannot overflow.
    auto centred = [&](int token, int i, int e) {
      return fmaf(0.25f, to_float(rows[token * x_token_stride + from[i][e]]), centre[i][e]);
    };
    if constexpr (SCALES) {
#pragma unroll 4
      for (int token = 0; token < count; ++token)
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
          float largest = fmaxf(fabsf(centred(token, i, 0)), fabsf(centred(token, i, 1)));
#pragma unroll
          for (int distance = 4; distance; distance /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
          if (lane % 8 == 0) own_largest[token * (SEGMENTS + 1) + 4 * i + lane / 8] = largest;
        }
      __syncwarp();
      if (lane < count)
        for (int i = 0; i < scalars; ++i) {
          const KeyGroup group = own_groups[i];
          float largest = 0.f;
          float* of_group = own_largest + lane * (SEGMENTS + 1) + group.start / 16;
          for (int k = 0; k < group.size / 16; ++k) largest = fmaxf(largest, of_group[k]);
          for (int k = 0; k < group.size / 16; ++k) of_group[k] = largest;
        }
      __syncwarp();
    }
    const u64 alignment = reinterpret_cast<u64>(rows) | sizeof(T) * x_token_stride;
    if (!SCALES && alignment % 16 == 0) {   // chunks of eight coordinates, each of them to its place
      constexpr int LANES = D / 8;          // per row
      constexpr int ROWS = 32 / LANES;      // at a time
      const int own_row = lane / LANES;
      u16* to[8];
#pragma unroll
      for (int e = 0; e < 8; ++e)
        to[e] = reinterpret_cast<u16*>(operands) + own_row * PITCH + places[lane % LANES * 8 + e];
      const T* chunks = rows + own_row * x_token_stride + lane % LANES * 8;
#pragma unroll 16
      for (int token = 0; token < kEncodeTokens; token += ROWS) {
        uint4 chunk = make_uint4(0, 0, 0, 0);
        if (token + own_row < count) chunk = load_once(reinterpret_cast<const uint4*>(chunks + token * x_token_stride));
        const u32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e][token * PITCH] = static_cast<u16>(words[e / 2] >> (16 * (e % 2)));
      }
    } else {
#pragma unroll 4
      for (int token = 0; token < kEncodeTokens; ++token)
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
          float multiplier = 4.f, undo, v[2] = {}, rest[2] = {};
          if (SCALES && token < count)
            power_of_two(own_largest[token * (SEGMENTS + 1) + 4 * i + lane / 8], multiplier, undo);
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (token < count) {
              v[e] = centred(token, i, e) * multiplier;
              rest[e] = v[e] - to_float(from_float<__half>(v[e]));
            }
          u32* to = reinterpret_cast<u32*>(operands + token * PITCH + 64 * i) + lane;
          *to = pack_pair<__half>(v[0], v[1]);
          if constexpr (PARTS == 2) to[PART / 2] = pack_pair<__half>(rest[0], rest[1]);
        }
    }
    __syncwarp();

    // ---- groups ----
    // The lane's tokens are g, g + 8, g + 16, g + 24; its coordinates of an octet 2 t and 2 t + 1.
    const __half* own_rows = operands + (lane / 8 % 2 * 8 + lane % 8) * PITCH + lane / 16 * 8;
    u8* own_signs = reinterpret_cast<u8*>(sign_rows) + g * (4 * SIGN_WORDS) + t;
    u8* own_magnitudes = reinterpret_cast<u8*>(magnitude_rows) + g * (4 * magnitude_words) + t;
    u32 signs[4] = {}, tops[4] = {};   // bytes of a word of which the first half is known
    bool finite = true;                // of token g + 8 t
    for (int i = 0; i < scalars; ++i) {
      const KeyGroup group = own_groups[i];
      float s = 0.f;
      if (group.size > 0) {   // the same for the whole block
        const int steps = group.size / 16, bits = group.bits;
        const __half* group_rows = own_rows + group.start;
        float unit[4] = {}, inverse[4], inner[4] = {}, energy[4] = {};   // of y = unit z
        // B operands of two octets; those of the first are under way while the product before is made, of whatever
        // comes behind the last one, too.
        const uint4* next = reinterpret_cast<const uint4*>(rotations + group.rotation) + lane;
        uint4 ahead = next[0];
#pragma unroll 1
        for (int k = 0; k < steps; ++k)
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            u32 a[4], rest[4];
            ldmatrix_x4(a, group_rows + 16 * u * PITCH + 16 * k);
            if constexpr (PARTS == 2) ldmatrix_x4(rest, group_rows + 16 * u * PITCH + 16 * k + PART);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              float2 v = unpack_pair<__half>(a[r]);
              if constexpr (PARTS == 2) {
                const float2 more = unpack_pair<__half>(rest[r]);
                v.x += more.x;
                v.y += more.y;
              }
              unit[2 * u + r % 2] = fmaf(v.x, v.x, fmaf(v.y, v.y, unit[2 * u + r % 2]));
            }
          }
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          unit[q] += __shfl_xor_sync(0xffffffffu, unit[q], 1);
          unit[q] += __shfl_xor_sync(0xffffffffu, unit[q], 2);
          unit[q] *= group.inverse_size;
          if (q == t) finite = finite && unit[q] < infinity();   // not for NaN either
          inverse[q] = unit[q] > 0.f ? rsqrtf(unit[q]) : 0.f;
          unit[q] *= inverse[q] * kRotationScale;
          inverse[q] *= 1.f / kRotationScale;
        }

#pragma unroll 1
        for (int step = 0; step < steps; ++step) {   // 16 coordinates, two octets
          float y[2][2][4] = {};   // [tokens][octet]
#pragma unroll 1
          for (int k = 0; k < steps; ++k) {
            const uint4 r[2] = {ahead, next[32]};
            next += 64;
            ahead = next[0];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
              u32 a[4], rest[4];
              ldmatrix_x4(a, group_rows + 16 * u * PITCH + 16 * k);
              if constexpr (PARTS == 2) ldmatrix_x4(rest, group_rows + 16 * u * PITCH + 16 * k + PART);
#pragma unroll
              for (int octet = 0; octet < 2; ++octet) {
                mma_m16n8k16<__half>(y[u][octet], a, {r[octet].x, r[octet].y});
                mma_m16n8k16<__half>(y[u][octet], a, {r[octet].z, r[octet].w});
                if constexpr (PARTS == 2) mma_m16n8k16<__half>(y[u][octet], rest, {r[octet].x, r[octet].y});
              }
            }
          }
          const float* book = books[i][0];
          CodeBytes codes;
          switch (bits) {
            case 1: codes = code_segment<1>(y, unit, inverse, book, bits, inner, energy); break;
            case 2: codes = code_segment<2>(y, unit, inverse, book, bits, inner, energy); break;
            case 3: codes = code_segment<3>(y, unit, inverse, book, bits, inner, energy); break;
            case 4: codes = code_segment<4>(y, unit, inverse, book, bits, inner, energy); break;
            case 5: codes = code_segment<5>(y, unit, inverse, book, bits, inner, energy); break;
            default: codes = code_segment<6>(y, unit, inverse, book, bits, inner, energy);
          }
          const int k = group.start / 16 + step;
          const KeySegment segment = own_segments[k];
          // Byte t of every word of a row is this lane's.
          auto store_bytes = [&](u8* to, int row_bytes, const u32(&from)[4]) {
#pragma unroll
            for (int q = 0; q < 4; ++q) to[8 * q * row_bytes] = static_cast<u8>(from[q]);
          };
#pragma unroll
          for (int q = 0; q < 4; ++q) signs[q] = k % 2 ? signs[q] | codes.sign[q] << 2 : codes.sign[q];
          if (k % 2) store_bytes(own_signs + 4 * (k / 2), 4 * SIGN_WORDS, signs);
#pragma unroll
          for (int pair = 0; pair < 3; ++pair)
            if (bits >= 3 + 2 * pair)
              store_bytes(own_magnitudes + 4 * segment.pairs[pair], 4 * magnitude_words, codes.pairs[pair]);
          if (bits % 2 == 0) {
#pragma unroll
            for (int q = 0; q < 4; ++q) tops[q] = segment.top_half ? tops[q] | codes.top[q] << 2 : codes.top[q];
            store_bytes(own_magnitudes + 4 * segment.top, 4 * magnitude_words, tops);
          }
        }
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
          for (int distance = 1; distance < 4; distance *= 2) {
            inner[q] += __shfl_xor_sync(0xffffffffu, inner[q], distance);
            energy[q] += __shfl_xor_sync(0xffffffffu, energy[q], distance);
          }
        auto own_of = [&](const float (&of)[4]) { return t < 2 ? (t ? of[1] : of[0]) : t == 2 ? of[2] : of[3]; };
        const float own_unit = own_of(unit) * (1.f / kRotationScale);
        if (own_unit > 0.f)
          s = own_unit * scale_factor(scale_mode, own_of(inner) * own_of(inverse) * group.inverse_size,
                                      own_of(energy) * group.inverse_size);
        if (SCALES && g + 8 * t < count) {
          float multiplier, undo;
          power_of_two(own_largest[(g + 8 * t) * (SEGMENTS + 1) + group.start / 16], multiplier, undo);
          s *= undo * 4.f;
        }
      }
      const u16 stored = stored_scalar(s, halves != nullptr, exponents[plan]);
      if (halves) scalar_rows[(g + 8 * t) * scalars + i] = stored;
      else reinterpret_cast<u8*>(scalar_rows)[(g + 8 * t) * scalars + i] = static_cast<u8>(stored);
    }

    // ---- whole rows; of tokens with NaN or Inf, zeros and NaN ----
    __syncwarp();
    for (int row = 0, bad = ~__ballot_sync(0xffffffffu, finite); bad; ++row)   // bit 4 g + t: of token g + 8 t
      if (const int bit = 1 << (row % 8 * 4 + row / 8); bad & bit) {
        bad &= ~bit;
        if (lane < SIGN_WORDS) sign_rows[row * SIGN_WORDS + lane] = 0;
        for (int i = lane; i < magnitude_words; i += 32) magnitude_rows[row * magnitude_words + i] = 0;
        if (lane < scalars) {
          if (halves) scalar_rows[row * scalars + lane] = 0x7fff;
          else reinterpret_cast<u8*>(scalar_rows)[row * scalars + lane] = 255;
        }
      }
    __syncwarp();
    const u64 token = b * batch_stride + head * head_stride + first;
    store_rows(sign + token * SIGN_WORDS, sign_rows, count * SIGN_WORDS, lane);
    store_rows(magnitude + token * magnitude_words, magnitude_rows, count * magnitude_words, lane);
    if (halves) store_rows(reinterpret_cast<u16*>(halves) + token * scalars, scalar_rows, count * scalars, lane);
    else store_rows(bytes + token * scalars, reinterpret_cast<const u8*>(scalar_rows), count * scalars, lane);
    __syncwarp();   // the rows have been read
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
__global__ void __launch_bounds__(kDecodeWarps * 32, 4)
    block_gtq_decode_kernel(const u32* __restrict__ sign, const u32* __restrict__ magnitude,
                            const __half* __restrict__ halves, const u8* __restrict__ bytes, u64 batch_stride,
                            u64 head_stride, int magnitude_words, int scalars, const i32* __restrict__ order,
                            const i32* __restrict__ groups, const i32* __restrict__ segments,
                            const float* __restrict__ rotations, const float* __restrict__ centroids,
                            const i32* __restrict__ exponents, int plan_stride, T* out, int tokens) {
  KVB_DYNAMIC_SHARED(float, columns);   // (D, pitch): the centroids, a token a column
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.x * kDecodeTokens, count = min(tokens - first, kDecodeTokens);
  const int head = blockIdx.y, b = blockIdx.z, plan = b * plan_stride + head;
  const u64 token = b * batch_stride + head * head_stride + first + min(lane, count - 1);   // one that is there
  const KeyRows keys = {sign, magnitude, halves, bytes, magnitude_words, scalars, exponents[plan]};
  for (int k = warp; k < D / 16; k += kDecodeWarps) {
    const KeySegment segment = reinterpret_cast<const KeySegment*>(segments)[plan * (D / 16) + k];
    const SegmentWords words = segment_words<D>(keys, segment, token, k);
    const float* levels = centroids + segment.book * kMostCodes;
#pragma unroll 4
    for (int j = 0; j < 16; ++j) columns[(16 * k + j) * kDecodePitch + lane] = levels[words.code(segment.bits, j)];
  }
  __syncthreads();
  T* to = out + ((static_cast<u64>(b) * gridDim.y + head) * tokens + first + lane) * D;
  for (int g = 0; g < scalars; ++g) {
    const KeyGroup group = reinterpret_cast<const KeyGroup*>(groups)[plan * scalars + g];
    if (group.size == 0) break;
    const float s = load_scalar(halves, bytes, token * scalars + g, keys.exponent);
    const float* own = columns + group.start * kDecodePitch + lane;
    for (int octet = warp; octet < group.size / 8; octet += kDecodeWarps) {
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
  KVB_EXPORT(192, kvb::block_gtq_encode_kernel<float, D, 2>)            \
  KVB_EXPORT(128, kvb::block_gtq_encode_kernel<__half, D, 1>)           \
  KVB_EXPORT(192, kvb::block_gtq_encode_kernel<__half, D, 2>)           \
  KVB_EXPORT(168, kvb::block_gtq_encode_kernel<__nv_bfloat16, D, 1>)    \
  KVB_EXPORT(192, kvb::block_gtq_encode_kernel<__nv_bfloat16, D, 2>)    \
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
KVB_EXPORT_ATTENTION(64, 8, 128)
KVB_EXPORT_ATTENTION(64, 16, 224)
KVB_EXPORT_ATTENTION(128, 8, 128)
KVB_EXPORT_ATTENTION(128, 16, 232)
KVB_EXPORT_ATTENTION(256, 8, 240)
