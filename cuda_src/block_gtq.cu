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
//            D = 256) share the plan of the head and its tables only, one array that the host has made.
//   Rows     stand in shared memory in rate order, in fp16.  The two coordinates of a RoPE block are neighbours there:
//            one word.  Rows of fp16 at multiples of 16 bytes come in chunks of eight numbers, two to a lane, which
//            have eight blocks between them, all of a warp's loads at once; every word goes to its place.  Those of the
//            next tile are fetched to L2 meanwhile.  Other rows come number by number, and all of them where RoPE turns
//            another number of coordinates than a multiple of 16.
//   Rotation mma.m16n8k16 with tokens as rows of A and 256 R_g^T as B, in two parts of fp16, which the host has put
//            into the order of the operands: high and low part leave 2^-22 of a number.  PARTS = 1: numbers of 16 bits,
//            without a mean, are one part of A, fp16 as it is, bfloat16 times a power of two per token and group, where
//            only numbers below 2^-15 of the largest lose bits.  PARTS = 2: what that leaves of float32, or of the
//            difference from the mean, times that power of two, is a second part; low times low is left out.  Sums are
//            float32: codes agree with those of float32 arithmetic wherever that is sure of them.
//   Norm     From the parts of A, not from the sums: A times itself, of which the diagonal counts (with PARTS = 2
//            without the square of the second part, 2^-22 of the sum).
//   Codes    Lane (g, t) = (lane / 4, lane % 4) has coordinates 2t and 2t + 1 of an octet, for tokens g + 8 q: four
//            coordinates of a segment of 16 for each of them, which are byte t of every word of the planes.  A lane
//            makes the bytes of its four tokens in one word; two shuffles give it the whole word of token g + 8 t.
//            Up to 3 bits: signs of differences from decisions times the norm, appended by funnel shifts, 3 bits as a
//            Gray code.  More: |z| is rounded to a cell of a table, which has at most one decision, and one comparison
//            is left; a second table gives the square of the magnitude, and its bits where planes want them.
//   Scalar   Squares of up to 3 bits are looked up by the byte of four codes.  "mse" and "unbiased" take the magnitudes
//            from the finished words again, some 210 instructions a segment more.
//   Results  leave through shared memory, whole rows.  Those of tokens with NaN or Inf are cleared there.
//   Bytes    D sizeof(T) read (with PARTS = 2 or bfloat16 twice, once from a cache), and the row of codes and scalars
//            written, once.
//   Counts   Warp instructions per 32 tokens at D = 128, fp16, segments of 5, 4, 4, 3, 3, 2, 2 and 1 bits (SASS for
//            sm_90): start and rows 310, norms 440, products 390, codes 1250 (of a segment, words stored: 30 for 1 bit,
//            95 for 2, 144 for 3, 212 for 4, 204 for 5, 230 for 6), signs 150, groups 410, rows out 115: 3070 in all.
//            32K tokens x 8 heads on 132 multiprocessors at 1.75 GHz: 27 us of issue slots, 28 us of memory at 3 TB/s.
//            Words of rows meet in banks: 183 passes of shared memory for 64 stores.
//   Before   Single numbers of rows stored (266 passes for 128 stores), norms of unpacked numbers, codes by selections
//            and binary search, bytes stored, plan read from memory: 5700 instructions, 90.0 us on an H100 for 32K
//            tokens x 8 heads of 128, fp16, with L2 flushed, 51 us of them issue slots.  Of the time of its warps (ncu)
//            13 % went to storing rows, 7 to waiting for rows, 7 for operands of the second octet, 5 for the plan.  Now
//            70.6 us, and 59.8 with a warm cache.
//   Tried    Operands of the rotation loaded before the product before: nothing then (90.4 us without), and 16 moves
//            for each product here.  Norms inside the first product's loop: no fewer instructions, since later products
//            pass them by predicates.
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
template <class T, int D, int PARTS>   // on a multiprocessor
constexpr int kResidentEncodeWarps = PARTS == 2 || D == 256 ? 8 : kHasWideRange<T> ? 12 : 16;
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

// The plan of a KV head as encode takes it, of 16 byte chunks: this, and behind it tables that its groups name by their
// first word (kvbench/ops/block_gtq_launch.py).
struct EncodeGroup {
  i32 start, size, bits, rotation;
  float inverse_size;
  i32 levels;   // (2^(bits-1),) magnitudes m
  i32 search;   // 2 bits: the decision; 3 bits: the middle one, half the sum and half the difference of the others
                // more: (cells + 1, 2): the decision of a cell over the range, or Inf, and the number of those before
  i32 sums;     // 2 and 3 bits: (64 or 256,) of squares of four magnitudes, by the byte that they make
                // more: (2^(bits-1), 2): the square of magnitude m, and the 2-bit fields of m, one per byte
};
template <int D>
struct EncodePlan {
  EncodeGroup groups[kMostGroups];
  KeySegment segments[D / 16];
  u16 places[D], coordinates[D];   // of coordinates in rate order, and those at these places
  i32 exponent, nothing[3];
};

// Cells are equally wide, from 0 to the range; the last one goes on.  None has two decisions (tests/test_block_gtq.py).
__device__ __forceinline__ constexpr int cell_count(int bits) { return bits == 4 ? 32 : bits == 8 ? 512 : 1 << bits; }
__device__ __forceinline__ constexpr float inverse_range(int bits) { return bits == 8 ? 0.125f : 0.25f; }

// A lane codes four coordinates of a segment and token at a time: c = 2 e + s is nibble 2 t + e of octet s.  They fill
// byte t of a word: bits 4 e + s of it, or where a plane has two bits, 2 c and the next.
__device__ __forceinline__ constexpr int bit_place(int c) { return c / 2 * 4 + c % 2; }

// What the codes of a segment are made of: bytes, as those of words, of the four tokens of a lane.
struct CodeBytes {
  u32 sign, pairs[3], top;   // the planes that the bits have; of sign and top, the other bits hold anything
};

// Appends the sign bit of x, and `bits` - 1 more of it.
__device__ __forceinline__ void append(u32& word, float x, int bits) {
  word = __funnelshift_l(__float_as_uint(x), word, bits);
}

// Codes of y, [tokens 0 and 1, tokens 2 and 3][octet], numbers as mma_m16n8k16 gives them; energy += c c.
// measure : up to 3 bits, what is 1 in units of z; else its inverse over the range of cells     BITS = 6 : 6 to 8
// tables : shared, what follows the plan
template <int BITS>
__device__ __forceinline__ CodeBytes code_segment(const float (&y)[2][2][4], const float (&measure)[4],
                                                  const EncodeGroup& group, const float* tables, float (&energy)[4]) {
  CodeBytes codes = {};
  u32 fields[4] = {};
  const int bits = BITS == 6 ? group.bits : BITS;
  const float *levels = tables + group.levels, *search = tables + group.search, *sums = tables + group.sums;
  const uint2* marks = reinterpret_cast<const uint2*>(sums);
  // From 2 to 4, numbers are whole multiples of 2^-22: 2 + i 2^-22 is i, and its bits times 8 where cell i begins.
  const float count = static_cast<float>(cell_count(bits)) * 0x1p-22f;
  auto cell_at = [&](float x) {
    const u32 offset = __float_as_uint(fmaf(x, count, 2.f)) << 3;
    return *reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(search) + offset);
  };
#pragma unroll
  for (int q = 3; q >= 0; --q) {
    float decisions[3] = {};
#pragma unroll
    for (int i = 0; i < 3; ++i)
      if (BITS == 3 || (BITS == 2 && i == 0)) decisions[i] = search[i] * measure[q];
#pragma unroll
    for (int c = 3; c >= 0; --c) {
      const float v = y[q / 2][c % 2][q % 2 * 2 + c / 2], size = fabsf(v);
      const int bits_to_next = c % 2 || q + c == 0 ? 1 : 3;   // in a byte with gaps
      append(codes.sign, v, bits_to_next);
      if constexpr (BITS == 2) append(codes.top, decisions[0] - size, bits_to_next);
      if constexpr (BITS == 3) {   // a Gray code
        append(codes.pairs[0], decisions[0] - size, 1);
        append(codes.pairs[0], fabsf(size - decisions[1]) - decisions[2], 1);
      }
      if constexpr (BITS >= 4) {
        const float x = __saturatef(size * measure[q]);
        const uint2 cell = cell_at(x);
        const uint2 mark = marks[cell.y + (__float_as_uint(__uint_as_float(cell.x) - x) >> 31)];
        energy[q] += __uint_as_float(mark.x);
        fields[q] = (fields[q] << 2) + mark.y;
      }
    }
  }
  if constexpr (BITS == 3) codes.pairs[0] ^= codes.pairs[0] >> 1 & 0x55555555u;
  if constexpr (BITS <= 3) {
    const u32 index = BITS == 3 ? codes.pairs[0] : codes.top & 0x33333333u;
    const float all = 4.f * levels[0] * levels[0];
#pragma unroll
    for (int q = 0; q < 4; ++q) energy[q] += BITS == 1 ? all : sums[index >> (8 * q) & 255u];
  } else {
    // Byte p of `fields` belongs to plane p: the pairs, then the top.
    u32 planes[4] = {};
#pragma unroll
    for (int p = 0; p < (BITS == 6 ? 4 : 2); p += 2) {
      const u32 selector = p ? 0x7362 : 0x5140;
      const u32 first = permute_bytes(fields[0], fields[1], selector);
      const u32 second = permute_bytes(fields[2], fields[3], selector);
      planes[p] = permute_bytes(first, second, 0x5410);
      planes[p + 1] = permute_bytes(first, second, 0x7632);
    }
#pragma unroll
    for (int p = 0; p < 3; ++p) codes.pairs[p] = planes[p];
    const u32 top = BITS == 4 ? planes[1] : bits == 6 ? planes[2] : planes[3];
    codes.top = (top & 0x11111111u) | (top >> 1 & 0x22222222u);
  }
  return codes;
}

// inner += |y| c, of the magnitudes of such codes.
__device__ __forceinline__ void add_inner(float (&inner)[4], const float (&y)[2][2][4], const CodeBytes& codes,
                                          const float* levels, int bits) {
#pragma unroll
  for (int q = 0; q < 4; ++q)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      u32 m = 0;
#pragma unroll
      for (int p = 0; p < 3; ++p)
        if (bits >= 3 + 2 * p) m |= (codes.pairs[p] >> (8 * q + 2 * c) & 3u) << (2 * p);
      if (bits % 2 == 0) m |= (codes.top >> (8 * q + bit_place(c)) & 1u) << (bits - 2);
      inner[q] = fmaf(fabsf(y[q / 2][c % 2][q % 2 * 2 + c / 2]), levels[m], inner[q]);
    }
}

// Lane t of four: v[t], summed over the four.
__device__ __forceinline__ float own_sum(const float (&v)[4], int t) {
  const bool upper = t / 2, odd = t % 2;
  float half[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    half[i] = (upper ? v[2 + i] : v[i]) + __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[2 + i], 2);
  return (odd ? half[1] : half[0]) + __shfl_xor_sync(0xffffffffu, odd ? half[0] : half[1], 1);
}

// Lane t of four: bytes t of their words, that of lane 0 first.
__device__ __forceinline__ u32 own_word(u32 bytes, int t) {
  bytes = permute_bytes(bytes, __shfl_xor_sync(0xffffffffu, bytes, 1), t % 2 ? 0x3715 : 0x6240);
  return permute_bytes(bytes, __shfl_xor_sync(0xffffffffu, bytes, 2), t / 2 ? 0x3276 : 0x5410);
}

// from : shared, 16-byte aligned
template <class Word>
__device__ __forceinline__ void store_rows(Word* to, const Word* from, int size, int lane) {
  const int bytes = size * static_cast<int>(sizeof(Word));
  if ((reinterpret_cast<u64>(to) | bytes) % 16 == 0) {
#pragma unroll 1
    for (int i = lane; i < bytes / 16; i += 32)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
#pragma unroll 1
    for (int i = lane; i < size; i += 32) to[i] = from[i];
  }
}

// x : (batch, kv_heads, tokens, D), rows contiguous, strides in elements
// mean : (kv_heads, D) every mean_batch_stride elements, subtracted from x, or null (as it must be for PARTS = 1)
// plans : (heads, plan_chunks), an EncodePlan and its tables each: of head h of sequence b in row b plan_stride + h;
//         plan_stride is 0 where all sequences share one plan, else kv_heads
// rotations : B operands of R_g, (size / 16 of y, size / 16 of z, 2 octets of y, 32) times four words: of the high part
//         of kRotationScale R_g in fp16, and of what it leaves
// rotary : coordinates i < rotary / 2 and i + rotary / 2 are a block, the others are one with their neighbours; in rate
//          order the two of a block stand together        scale_mode : 0 nc, 1 plain, 2 mse, 3 unbiased
// sign, magnitude, and halves or bytes : (batch, kv_heads, tokens, D / 32, magnitude_words, scalars), strides in tokens
// Grid (blocks of a head, kv_heads, batch), block 32 kEncodeWarps
template <class T, int D, int PARTS>
__global__ void __launch_bounds__(kEncodeWarps<D> * 32, kResidentEncodeWarps<T, D, PARTS> / kEncodeWarps<D>)
    block_gtq_encode_kernel(const T* __restrict__ x, u64 x_batch_stride, u64 x_head_stride, u64 x_token_stride,
                            const float* __restrict__ mean, u64 mean_batch_stride, const uint4* __restrict__ plans,
                            int plan_chunks, int plan_stride, const u32* __restrict__ rotations, int rotary,
                            int scale_mode, u32* sign, u32* magnitude, __half* halves, u8* bytes,
                            u64 batch_stride, u64 head_stride, int magnitude_words, int scalars, int tokens) {
  constexpr int WARPS = kEncodeWarps<D>, THREADS = 32 * WARPS, SIGN_WORDS = D / 32, SEGMENTS = D / 16;
  constexpr int PITCH = D + 8, PART = kEncodeTokens * PITCH;   // halves
  constexpr bool SCALES = kHasWideRange<T> || PARTS == 2;      // by a power of two for every group
  KVB_SHARED(float, largest_of, [SCALES ? THREADS * (SEGMENTS + 1) : 1]);
  KVB_DYNAMIC_SHARED(uint4, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.y, b = blockIdx.z;
  const uint4* own_plan = plans + static_cast<u64>(b * plan_stride + head) * plan_chunks;
#pragma unroll 4
  for (int i = threadIdx.x; i < plan_chunks; i += THREADS) shared[i] = own_plan[i];
  __syncthreads();
  const EncodePlan<D>& plan = *reinterpret_cast<const EncodePlan<D>*>(shared);
  const float* tables = reinterpret_cast<const float*>(&plan + 1);

  // What follows is one warp's own.
  const int row_words = SIGN_WORDS + magnitude_words;
  char* own = reinterpret_cast<char*>(shared + plan_chunks) +
              warp * (2 * PARTS * PART + kEncodeTokens * (4 * row_words + 2 * kMostGroups));
  __half* operands = reinterpret_cast<__half*>(own);                     // (parts, tokens, pitch)
  u32* sign_rows = reinterpret_cast<u32*>(operands + PARTS * PART);      // (tokens, D / 32)
  u32* magnitude_rows = sign_rows + kEncodeTokens * SIGN_WORDS;          // (tokens, words)
  u16* scalar_rows = reinterpret_cast<u16*>(magnitude_rows + kEncodeTokens * magnitude_words);   // (tokens, scalars)
  float* own_largest = largest_of + warp * (SCALES ? 32 * (SEGMENTS + 1) : 0);   // (tokens, segments), padded

  for (int i = lane; i < kEncodeTokens * magnitude_words; i += 32) magnitude_rows[i] = 0;   // some words stay so
  u32* own_sign_row = sign_rows + (g + 8 * t) * SIGN_WORDS;
  u32* own_magnitude_row = magnitude_rows + (g + 8 * t) * magnitude_words;
  const T* head_rows = x + b * x_batch_stride + head * x_head_stride;
  const bool in_chunks =
      !SCALES && (reinterpret_cast<u64>(head_rows) | sizeof(T) * x_token_stride) % 16 == 0 && rotary % 16 == 0;

#pragma unroll 1
  for (int first = (blockIdx.x * WARPS + warp) * kEncodeTokens; first < tokens;
       first += gridDim.x * WARPS * kEncodeTokens) {
    const int count = min(tokens - first, kEncodeTokens);

    // ---- rows, in rate order, as A operands ----
    const T* rows = head_rows + first * x_token_stride;
    if (in_chunks) {   // two of eight coordinates, which are eight blocks: a word for each to its place
      constexpr int LANES = D / 16, ROWS = 32 / LANES;   // of a row, at a time
      const int own_row = lane / LANES, part = lane % LANES;
      const bool apart = part < rotary / 16;   // the other coordinate of a block is in the other chunk
      const int low = apart ? 8 * part : 16 * part, high = low + (apart ? rotary / 2 : 8);
      const u32 selectors[2] = {apart ? 0x5410u : 0x3210u, apart ? 0x7632u : 0x7654u};
      u32* to[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          to[i][e] = reinterpret_cast<u32*>(operands + own_row * PITCH +
                                            plan.places[(apart ? low + e : e ? high : low) + 2 * i]);
      const T *from_low = rows + own_row * x_token_stride + low, *from_high = from_low + high - low;
#pragma unroll 8
      for (int token = 0; token < kEncodeTokens; token += ROWS) {
        uint4 chunk[2] = {};
        if (token + own_row < count) {
          chunk[0] = load_once(reinterpret_cast<const uint4*>(from_low));
          chunk[1] = load_once(reinterpret_cast<const uint4*>(from_high));
        }
        from_low += ROWS * x_token_stride;
        from_high += ROWS * x_token_stride;
        const u32 words[2][4] = {{chunk[0].x, chunk[0].y, chunk[0].z, chunk[0].w},
                                 {chunk[1].x, chunk[1].y, chunk[1].z, chunk[1].w}};
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            to[i][e][token * PITCH / 2] = permute_bytes(words[0][i], words[1][i], selectors[e]);
      }
      // The rows of the next tile, one to a lane, are on their way to L2 while this one is coded.
      const int later = first + gridDim.x * WARPS * kEncodeTokens + lane;
      if (later < tokens)
#pragma unroll
        for (int i = 0; i < D; i += 64) prefetch_l2(head_rows + later * x_token_stride + i);
    } else {
      constexpr int PAIRS = D / 64;   // of neighbouring coordinates, per lane
      int from[PAIRS][2];
      float centre[PAIRS][2];
#pragma unroll
      for (int i = 0; i < PAIRS; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          from[i][e] = plan.coordinates[64 * i + 2 * lane + e];
          centre[i][e] = PARTS == 2 && mean ? -0.25f * mean[b * mean_batch_stride + head * D + from[i][e]] : 0.f;
        }
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
            const EncodeGroup& group = plan.groups[i];
            float largest = 0.f;
            float* of_group = own_largest + lane * (SEGMENTS + 1) + group.start / 16;
            for (int k = 0; k < group.size / 16; ++k) largest = fmaxf(largest, of_group[k]);
            for (int k = 0; k < group.size / 16; ++k) of_group[k] = largest;
          }
        __syncwarp();
      }
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
    // The lane codes tokens g, g + 8, g + 16, g + 24, coordinates 2 t and 2 t + 1 of an octet; words and scalars of
    // token g + 8 t are its own.
    const __half* own_rows = operands + (lane / 8 % 2 * 8 + lane % 8) * PITCH + lane / 16 * 8;
    u32 signs = 0, tops = 0;   // bytes of words of which the first half is known
    int open_top = -1;         // the place of such a word
    bool finite = true;
    for (int i = 0; i < scalars; ++i) {
      const EncodeGroup& group = plan.groups[i];
      float s = 0.f;
      if (group.size > 0) {   // the same for the whole block
        const int first_segment = group.start >> 4, steps = group.size >> 4, bits = group.bits;
        const __half* group_rows = own_rows + group.start;
        float measure[4], own_unit = 0.f, own_inverse = 0.f;   // of y = unit z
        float inner[4] = {}, energy[4] = {};
        {   // norms: lane (g, g / 2) has products of tokens with themselves
          float products[2][2][4] = {};   // [tokens][with half of them]
#pragma unroll 1
          for (int k = 0; k < steps; ++k)
#pragma unroll
            for (int u = 0; u < 2; ++u) {
              u32 a[4], rest[4];
              ldmatrix_x4(a, group_rows + 16 * u * PITCH + 16 * k);
              if constexpr (PARTS == 2) ldmatrix_x4(rest, group_rows + 16 * u * PITCH + 16 * k + PART);
#pragma unroll
              for (int half = 0; half < 2; ++half) {   // rows of A are columns of B
                mma_m16n8k16<__half>(products[u][half], a, {a[half], a[2 + half]});
                if constexpr (PARTS == 2) {
                  mma_m16n8k16<__half>(products[u][half], a, {rest[half], rest[2 + half]});
                  mma_m16n8k16<__half>(products[u][half], rest, {a[half], a[2 + half]});
                }
              }
            }
          float squares[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const float* of = products[q / 2][q % 2] + q % 2 * 2;
            squares[q] = __shfl_sync(0xffffffffu, g % 2 ? of[1] : of[0], lane / 4 * 4 + lane / 8);
          }
          const float own =
              (t / 2 ? t % 2 ? squares[3] : squares[2] : t % 2 ? squares[1] : squares[0]) * group.inverse_size;
          finite = finite && own < infinity();   // not for NaN either
          own_inverse = own > 0.f ? rsqrtf(own) : 0.f;
          own_unit = own * own_inverse;
          own_inverse *= 1.f / kRotationScale;
          const float own_measure = bits <= 3 ? own_unit * kRotationScale : own_inverse * inverse_range(bits);
#pragma unroll
          for (int q = 0; q < 4; ++q) measure[q] = __shfl_sync(0xffffffffu, own_measure, lane / 4 * 4 + q);
        }

        const uint4* next = reinterpret_cast<const uint4*>(rotations + group.rotation) + lane;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {   // 16 coordinates, two octets
          float y[2][2][4] = {};                     // [tokens][octet]
#pragma unroll 1
          for (int k = 0; k < steps; ++k) {
            const uint4 r[2] = {next[0], next[32]};
            next += 64;
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
          const int at = first_segment + step;
          const KeySegment& segment = plan.segments[at];
          CodeBytes codes = {};
          // The first half of a word's bits has places 0 and 1 of every four.
          auto joined = [](u32 former, u32 latter) { return (former & 0x33333333u) | (latter << 2 & 0xccccccccu); };
          auto store_pairs = [&](int p) { own_magnitude_row[segment.pairs[p]] = own_word(codes.pairs[p], t); };
          auto store_top = [&] {
            if (segment.top_half) own_magnitude_row[segment.top] = own_word(joined(tops, codes.top), t);
            open_top = segment.top_half ? -1 : segment.top;
            tops = codes.top;
          };
          switch (bits) {
            case 1: codes = code_segment<1>(y, measure, group, tables, energy); break;
            case 2:
              codes = code_segment<2>(y, measure, group, tables, energy);
              store_top();
              break;
            case 3:
              codes = code_segment<3>(y, measure, group, tables, energy);
              store_pairs(0);
              break;
            case 4:
              codes = code_segment<4>(y, measure, group, tables, energy);
              store_pairs(0);
              store_top();
              break;
            case 5:
              codes = code_segment<5>(y, measure, group, tables, energy);
              store_pairs(0);
              store_pairs(1);
              break;
            default:
              codes = code_segment<6>(y, measure, group, tables, energy);
              store_pairs(0);
              store_pairs(1);
              if (bits >= 7) store_pairs(2);
              if (bits % 2 == 0) store_top();
          }
          if (at & 1) own_sign_row[at >> 1] = own_word(joined(signs, codes.sign), t);
          signs = codes.sign;
          if (scale_mode >= 2) add_inner(inner, y, codes, tables + group.levels, bits);
        }
        const float square = own_sum(energy, t) * group.inverse_size;
        const float product = scale_mode >= 2 ? own_sum(inner, t) * own_inverse * group.inverse_size : 0.f;
        if (own_unit > 0.f) s = own_unit * scale_factor(scale_mode, product, square);
        if (SCALES && g + 8 * t < count) {
          float multiplier, undo;
          power_of_two(own_largest[(g + 8 * t) * (SEGMENTS + 1) + group.start / 16], multiplier, undo);
          s *= undo * 4.f;
        }
      }
      const u16 stored = stored_scalar(s, halves != nullptr, plan.exponent);
      if (halves) scalar_rows[(g + 8 * t) * scalars + i] = stored;
      else reinterpret_cast<u8*>(scalar_rows)[(g + 8 * t) * scalars + i] = static_cast<u8>(stored);
    }
    if (open_top >= 0) own_magnitude_row[open_top] = own_word(tops & 0x33333333u, t);

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

#define KVB_EXPORT_BLOCK_GTQ(D, REGISTERS)                              \
  KVB_EXPORT(192, kvb::block_gtq_encode_kernel<float, D, 2>)            \
  KVB_EXPORT(REGISTERS, kvb::block_gtq_encode_kernel<__half, D, 1>)     \
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
KVB_EXPORT_BLOCK_GTQ(64, 128)
KVB_EXPORT_BLOCK_GTQ(128, 128)
KVB_EXPORT_BLOCK_GTQ(256, 200)

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
