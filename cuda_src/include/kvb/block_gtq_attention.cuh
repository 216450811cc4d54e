// Decode attention over keys of Block-GTQ and values in bit planes, one query token per sequence, grouped query heads.
// Reference: reference/block_gtq.py, decode_attention.
//
//   output_h = R_v^T ( sum_t softmax_t(scale sum_g s^k_tg <R_g q_hg, c^k_tg>) s^v_t c^v_t )
//
// block_gtq_attention_kernel: keys of any allocation, values of 1 to 4 bits, in one launch.
//   Grid      (splits, kv_heads, batch): the blocks of a KV head share its tiles; the last to finish merges, rotates
//             the result back and writes it (kvb/splits.cuh).  With more query heads than HEADS (9 to 16 at D = 256) a
//             KV head has two rows of blocks, and its codes are read twice.
//   Block     16 warps, each with its own tiles of 32 tokens; 8 at D = 256 or with more than 8 query heads.
//   Pipeline  Each warp has a ring of two or three tiles in shared memory filled by cp.async, one being read.  A tile
//             of every array is contiguous in memory.
//   Start     The query, permuted and multiplied by the R_g of its groups (a few KB, not D^2), then by a power of two,
//             becomes fp16.  That happens before all but one tile of the ring are asked for: behind them the matrices
//             would wait.
//   Keys      mma.m16n8k16 with the query as A, 16 heads by 16 coordinates, and codes as B, 16 coordinates by 8 tokens.
//             Segments are multiplied by chunks: two neighbours of a group up to 5 bits, one where none is left over.
//             Lane (g, t) = (lane / 4, lane % 4) has the tokens g + 8 j; of one segment coordinates 4t .. 4t + 3, of
//             two eight of segment t / 2: half of the nibbles of one word of each plane, both octets.  One byte
//             permutation puts those of two tokens into a word, of which a shift and a mask give eight selectors;
//             tables of the high and of the low bytes of fp16 centroids make operands of them.  Tables have 8 entries:
//             with the sign up to 3 bits, magnitudes of 4 bits, two of them magnitudes of 5 bits; 6 to 8 bits look up
//             every centroid in shared memory.  The chunks of a head stand in runs of equal work, so that each kind is
//             a loop of its own, without a switch; where runs end is read by shuffles, by which the compiler knows that
//             nothing diverges.  The scalars of a group, float, turned into one row of 32 tokens per group, multiply
//             the sums of each chunk, whose first product begins from the zero register.
//   Softmax, values   As in kvb/plane_attention.cuh, from which they are.
//   Bytes     Keys: D bits / 8 + 2 scalars (padding aside); values: D bits / 8 + 2, per token and KV head, once: 108 at
//             D = 128, 3 + 3 bits, five groups.
//   Counts    Warp instructions per tile of 32 tokens at D = 128, up to 8 heads, values of 3 bits, keys whose segments
//             have 5, 4, 4, 3, 3, 2, 2 and 1 bits (SASS for sm_90): chunks 520 (of two segments 77 for 1 bit, 101 for
//             2, 103 for 3, 141 for 4, 191 for 5; of one 53, 73, 74, 97 and 122, and 209 or more beyond), the loops
//             around them 45, start of a tile 70, copies 64, weights 65, values 296: 1060 in all, some 620 of them on
//             the half-rate integer pipe.  At 132 multiprocessors and 1.75 GHz, 128K tokens x 8 KV heads: 38 us of
//             issue slots, 44 us of the integer pipe, 38 us of memory at 3 TB/s.
//   Tried     H100, D = 128, 3 + 3 bits, fp16 scalars, us with L2 flushed:    32:8 128K  16:2 128K  32:8 32K  32:8 4K
//               two blocks of 8 warps on a multiprocessor, tiles prepared in
//               80 instructions more                                             103.1       52.2      42.3     17.5
//               two blocks of 8 warps                                            101.2       51.7
//               one block of 16 warps, a switch per segment, 1414 instructions    93.6       42.9      38.5     21.3
//               chunks in runs                                                    84.5       40.4      36.2     20.8
//               selectors shifted by multiplications, off the pipe of PRMT        84.4
//               rings, and what they hold, at lines of shared memory
//               (this version)                                                    83.4       39.4      35.4     21.2
//             Before the last, with the L2 flushed by reading, it was 82.5 at 32:8, 128K: bound by instructions, not by
//             memory.  By ncu 56 % of the issue slots were used and 58 % of the integer pipe, by four warps per
//             scheduler: of their time 21 % waited for results of fixed latency, 19 for the scheduler, 16 for the
//             integer pipe, 6 each for shared memory and dispatch.  A bit per run that has chunks, tested instead of
//             where it ends, takes more instructions; so does loading the next chunk's record ahead, 16 per tile.
#pragma once
#include "kvb/block_gtq_plan.cuh"
#include "kvb/plane_attention.cuh"
#include "kvb/rows.cuh"

namespace kvb {

constexpr int kWideCentroids = 448;   // of a head, fp16, positive and negative ones: 64 of 6 bits, 128 of 7, 256 of 8

// What the inner loop knows of chunk i, and the fold of segment i.  Offsets in bytes.  Runs, in this order: chunks of
// two segments of 1, 2, .. 5 bits, chunks of one of 1, 2, .. 5 and of 6 to 8 bits.
struct __align__(16) ChunkRecord {
  // Of lanes with t / 2 = 0 and 1: the word of signs and how far it is rotated left; the same of the top plane.
  int4 lane[2];
  i32 query, scalars, pair, middle;   // A operands; in the scratch of a warp; words of pairs 0 and 1
  i32 upper, levels;                  // of 6 to 8 bits: word of pair 2; where centroids begin, plus the number of bits
  u32 ends;                           // one after the last chunk of the runs 4 i .. 4 i + 3, a byte each
  i32 unused;
  // As a ValueTable.  1 and 3 bits: entries 4 sigma + m.  2 bits: 2 sigma + m, and, for the second of two products,
  // 4 sigma + 2 m with any bit 0.  4 and 5 bits: m, 0-7 and 8-15.
  uint4 table[2];
  int4 fold;   // first coordinate and size of the segment's group, where R_g^T begins; in a chunk of two 2, the second
};             // one 3, else 0

// The keys of a tile in shared memory, as lane (g, t) reads them.
struct KeyTile {
  const char* signs;     // of token g; those of tokens g + 8, ... are 8 rows further on
  const char* rows;      // of magnitudes: of token g; those of tokens g + 8, ... are `stride` bytes further on
  int stride;
  int flip;              // chunks of 16 bytes stand in another order in some rows: exclusive or of an offset
  u32 halves;            // selector of PRMT: the lane's 16 bits of a word of each of two tokens
  int upper;             // t / 2: of two segments, the lane has coordinates of this one; of one, of this octet

  __device__ __forceinline__ u32 both(const char* first, const char* second) const {
    return permute_bytes(*reinterpret_cast<const u32*>(first), *reinterpret_cast<const u32*>(second), halves);
  }
  // words[u]: of tokens g + 16 u and g + 16 u + 8
  __device__ __forceinline__ void load(u32 (&words)[2], int at) const {
    const char* row = rows + (at ^ flip);
#pragma unroll
    for (int u = 0; u < 2; ++u) words[u] = both(row + 2 * u * stride, row + (2 * u + 1) * stride);
  }
  template <int D>
  __device__ __forceinline__ void load_signs(u32 (&words)[2], int at) const {
#pragma unroll
    for (int u = 0; u < 2; ++u) words[u] = both(signs + at + 2 * u * D, signs + at + (2 * u + 1) * D);
  }
};

__device__ __forceinline__ u32 rotate_left(u32 x, int n) { return __funnelshift_l(x, x, n); }
// Bits of x where the mask has ones, of y elsewhere.
__device__ __forceinline__ u32 choose(u32 mask, u32 x, u32 y) { return (x & mask) | (y & ~mask); }

// sum[j] += query . codes of tokens 8 j .. 8 j + 7, of a chunk of SEGMENTS segments of BITS bits; 6 stands for 6 to 8.
// query : the lane's part of the chunk's first A operand
template <int D, int BITS, int SEGMENTS>
__device__ __forceinline__ void multiply_chunk(float (&sum)[4][4], const uint4* query, const KeyTile& keys,
                                               const ChunkRecord& record, const char* centroids) {
  // Of two segments, a lane has half of the nibbles of one: both octets, one for each product.
  const int4 own = record.lane[keys.upper];
  const int second = SEGMENTS == 2 ? 4 * keys.upper : 0, pair_place = SEGMENTS == 2 ? 0 : 2 * keys.upper;
  const int bits = BITS == 6 ? record.levels & 15 : BITS;
  u32 signs[2], pairs[2], middle[2], upper[2] = {}, tops[2] = {};
  keys.load_signs<D>(signs, own.x);
  if constexpr (BITS >= 3) keys.load(pairs, record.pair + second);
  if constexpr (BITS >= 5) keys.load(middle, record.middle + second);
  if (bits >= 7) keys.load(upper, record.upper);
  if (bits % 2 == 0) keys.load(tops, own.z);
  u32 rotated[2], rotated_top[2];   // 2 bits only
  if constexpr (BITS == 2) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      rotated[u] = rotate_left(signs[u], own.y);
      rotated_top[u] = rotate_left(tops[u], own.w) & 0x33333333u;
    }
  }
#pragma unroll
  for (int i = 0; i < SEGMENTS; ++i) {
    const uint4 operand = query[i * 32];
    const u32 a[4] = {operand.x, operand.y, operand.z, operand.w};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      // Nibbles 0-3: of the first token, 4-7: of the second.
      u32 b[2][2], n = 0, negative = 0, top = 0;
      if constexpr (BITS == 2) {   // both octets of a code from words with both their bits: the tables differ
        n = choose(0x22222222u << i, rotated[u], rotated_top[u]);
      } else {
        const u32 sign = rotate_left(signs[u], own.y - i);
        if constexpr (BITS <= 3) n = sign & 0x44444444u;
        else negative = BITS == 6 ? sign & 0x11111111u : sign;
        if constexpr (BITS % 2 == 0) top = rotate_left(tops[u], own.w - i) & (BITS == 4 ? 0x44444444u : 0x11111111u);
        if constexpr (BITS >= 3) n |= pairs[u] >> (pair_place + 2 * i) & 0x33333333u;
      }
      if constexpr (BITS <= 5) {
        const uint4 table = record.table[BITS == 2 ? i : 0], upper_table = record.table[1];
        u32 in_upper = 0;
        if constexpr (BITS == 4) n |= top;
        if constexpr (BITS == 5) {
          n |= rotate_left(middle[u], 34 - 2 * i - pair_place) & 0x44444444u;
          in_upper = middle[u] >> (pair_place + 2 * i + 1);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          u32 high = permute_bytes(table.x, table.y, n >> (16 * k));
          u32 low = BITS == 1 ? table.z : permute_bytes(table.z, table.w, n >> (16 * k));
          if constexpr (BITS == 5) {
            // Here and for the sign, bit 0 of a nibble alone matters: others choose a byte like it, or its top bit.
            const u32 mask = permute_bytes(0xff00ff00u, 0xff00ff00u, in_upper >> (16 * k));
            high = choose(mask, permute_bytes(upper_table.x, upper_table.y, n >> (16 * k)), high);
            low = choose(mask, permute_bytes(upper_table.z, upper_table.w, n >> (16 * k)), low);
          }
          if constexpr (BITS >= 4)
            high ^= permute_bytes(0x80008000u, 0x80008000u, negative >> (16 * k)) & 0x80808080u;
          b[k][0] = permute_bytes(low, high, 0x5140u);
          b[k][1] = permute_bytes(low, high, 0x7362u);
        }
      } else {
        // Codes as bytes: magnitude bits 0 to 3, then the others, then the sign; of even nibbles and of odd ones.
        n |= (middle[u] >> pair_place & 0x33333333u) << 2;
        const u32 rest =
            (upper[u] >> pair_place & 0x33333333u) | top << (bits == 8 ? 2 : 0) | negative << (bits - 5);
        const u32 even = (n & 0x0f0f0f0fu) | (rest & 0x0f0f0f0fu) << 4;
        const u32 odds = (n >> 4 & 0x0f0f0f0fu) | (rest & 0xf0f0f0f0u);
        const char* levels = centroids + (record.levels & ~15);
        auto look_up = [&](u32 codes, int e) {
          return static_cast<u32>(*reinterpret_cast<const u16*>(levels + 2 * permute_bytes(codes, 0, 0x4440u + e)));
        };
#pragma unroll
        for (int e = 0; e < 4; ++e) b[e / 2][e % 2] = permute_bytes(look_up(even, e), look_up(odds, e), 0x5410u);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) mma_m16n8k16<__half>(sum[2 * u + k], a, b[k]);
    }
  }
}

// product[j][half][e] += the products of head g + 8 half and token 8 j + 2t + e, of the chunks from `chunk` on: the run
// of BITS and SEGMENTS.
// query : A operands of the lane      scalars : (groups, tokens) float, from token 2t on
template <int D, int BITS, int SEGMENTS, int HALVES>
__device__ __forceinline__ void multiply_run(float (&product)[4][HALVES][2], int& chunk, const u32 (&ends)[3],
                                             const ChunkRecord* records, const char* query, const char* scalars,
                                             const KeyTile& keys, const char* centroids) {
  constexpr int RUN = (SEGMENTS == 2 ? 0 : 5) + BITS - 1;
  const int end = ends[RUN / 4] >> RUN % 4 * 8 & 255;
#pragma unroll 1
  for (; chunk < end; ++chunk) {
    const ChunkRecord& record = records[chunk];
    float sum[4][4] = {};
    multiply_chunk<D, BITS, SEGMENTS>(sum, reinterpret_cast<const uint4*>(query + record.query), keys, record,
                                      centroids);
    const float2* factors = reinterpret_cast<const float2*>(scalars + record.scalars);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 s = factors[4 * j];
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        product[j][half][0] = fmaf(s.x, sum[j][2 * half], product[j][half][0]);
        product[j][half][1] = fmaf(s.y, sum[j][2 * half + 1], product[j][half][1]);
      }
    }
  }
}

// The keys of one (sequence, KV head), from its first token on, and how a tile of them gets to shared memory: signs,
// magnitudes, scalars.
template <int D>
struct KeyRowsInMemory {
  static constexpr int SIGN_BYTES = kPlaneTile * D / 8;
  const char *sign, *magnitude, *scalar;
  int magnitude_bytes, scalar_bytes;       // of a tile

  // Which bits of the number of a chunk of 16 bytes are changed by those three above it, so that rows of 32 or 64 bytes
  // meet no bank twice where lanes read one word of eight rows, and those of 128 bytes no more than twice.
  static __device__ __forceinline__ int flip(int words, int chunk) {
    return words >= 8 && !(words & (words - 1)) ? chunk >> 3 & (words == 8 ? 1 : 3) : 0;
  }
  __device__ __forceinline__ bool aligned() const {
    return (reinterpret_cast<u64>(sign) | reinterpret_cast<u64>(magnitude) | reinterpret_cast<u64>(scalar)) % 16 == 0;
  }
  static __device__ __forceinline__ const char* chunk(const char* all, int tile, int bytes, int lane) {
    return all + (static_cast<u64>(static_cast<u32>(tile)) * static_cast<u32>(bytes) + 16 * lane);
  }
  // places : of the lane's chunk of signs, of magnitudes and of scalars
  __device__ __forceinline__ void copy_whole(char* to, int tile, const int3& places, int lane, u64 policy) const {
    const char* signs = chunk(sign, tile, SIGN_BYTES, lane);
    const char* magnitudes = chunk(magnitude, tile, magnitude_bytes, lane);
    const char* scalars = chunk(scalar, tile, scalar_bytes, lane);
    if (SIGN_BYTES >= 512 || 16 * lane < SIGN_BYTES)
#pragma unroll
      for (int i = 0; i < SIGN_BYTES; i += 512) cp_async_16_once(to + places.x + i, signs + i, 16, policy);
    const int left = magnitude_bytes - 16 * lane;
    if (left > 0) cp_async_16_once(to + places.y, magnitudes, 16, policy);
    if (left > 512) cp_async_16_once(to + places.y + 512, magnitudes + 512, 16, policy);
    if (16 * lane < scalar_bytes) cp_async_16_once(to + places.z, scalars, 16, policy);
  }
  // The magnitudes from 1024 bytes on.
  __device__ __forceinline__ void copy_rest(char* to, int tile, int place, int lane, u64 policy) const {
#pragma unroll 1
    for (int i = 1024; i < magnitude_bytes - 16 * lane; i += 512)
      cp_async_16_once(to + place + i, chunk(magnitude, tile, magnitude_bytes, lane) + i, 16, policy);
  }
  // Of the first `count` rows of a tile; the others become zero.
  __device__ __forceinline__ void copy_part(char* to, int tile, int count, int lane) const {
    auto copy = [&](char* rows, const char* all, int bytes, bool flipped) {
      const char* from = all + static_cast<u64>(tile) * bytes;
#pragma unroll 1
      for (int at = lane; at < bytes; at += 32) {
        const int place = flipped ? at ^ flip(bytes / (4 * kPlaneTile), at / 16) * 16 : at;
        rows[place] = at < count * (bytes / kPlaneTile) ? from[at] : char(0);
      }
    };
    copy(to, sign, SIGN_BYTES, false);
    copy(to + SIGN_BYTES, magnitude, magnitude_bytes, true);
    copy(to + SIGN_BYTES + magnitude_bytes, scalar, scalar_bytes, false);
  }
};

// Of a block, one on each multiprocessor.
template <int D, int HEADS>
constexpr int kBlockGtqWarps = D <= 128 && HEADS == 8 ? 16 : 8;

// query : (batch, kv_heads * all_heads, D), type 0 float, 1 fp16, 2 bf16    output : likewise, of output_type
// order, rotations, exponents, plan_stride : as for block_gtq_encode_kernel
// records : (heads, D / 16)      centroids : (heads, kWideCentroids)
// sign, magnitude, and halves or bytes : keys, (batch, kv_heads, tokens, D / 32, magnitude_words, scalars), strides in
//         tokens
// value_* : planes and scales of the values, the signs of their rotation and their ValueTable as for
//         turboquant_attention_kernel
// key_mean : (kv_heads, D) float per key_mean_batch_stride, or null: lse += scale <q, key_mean>
// lengths : (batch,) or null for `tokens`      lse : (batch, kv_heads * all_heads) or null
// scale_log2 = scale log2(e)                   partial_output, partial_statistics, tickets : kvb/splits.cuh
// ring : tiles of a warp in shared memory, 2 or 3
template <int D, int HEADS, int VALUE_BITS>
__global__ void __launch_bounds__(32 * kBlockGtqWarps<D, HEADS>, 1) block_gtq_attention_kernel(
    const void* __restrict__ query, int query_type, const i32* __restrict__ order,
    const ChunkRecord* __restrict__ records, const __half* __restrict__ centroids,
    const float* __restrict__ rotations, const i32* __restrict__ exponents, int plan_stride,
    const u32* __restrict__ sign,
    const u32* __restrict__ magnitude, const __half* __restrict__ halves, const u8* __restrict__ bytes,
    u64 batch_stride, u64 head_stride, int magnitude_words, int scalars, const u32* __restrict__ value_sign,
    const u32* __restrict__ value_mag2, const u32* __restrict__ value_mag1, const __half* __restrict__ value_scale,
    u64 value_batch_stride, u64 value_head_stride, const float* __restrict__ value_signs, int value_rounds,
    float value_remaining_scale, u32 value_high_low, u32 value_high_high, u32 value_low_low, u32 value_low_high,
    const float* __restrict__ key_mean, u64 key_mean_batch_stride, const int* __restrict__ lengths, void* output,
    int output_type, float* lse, float* partial_output, float2* partial_statistics, u32* tickets, int tokens,
    int all_heads, float scale_log2, int ring) {
  static_assert(D == 64 || D == 128 || D == 256, "octets of a token divide evenly among the lanes");
  static_assert(HEADS == 8 || HEADS == 16, "rows of the mma tile");
  constexpr int HALVES = HEADS / 8, N = D / 32, GROUPS = kPlaneTile / 8, WARPS = kBlockGtqWarps<D, HEADS>;
  constexpr int THREADS = 32 * WARPS, SHARES = THREADS / D, OWN = HEADS / SHARES, LOADS = HEADS * D / THREADS;

  const int parts = (all_heads + HEADS - 1) / HEADS, part = blockIdx.y % parts;   // of the KV head's query heads
  const int split = blockIdx.x, kv_head = blockIdx.y / parts, b = blockIdx.z;
  const int splits = gridDim.x, kv_heads = gridDim.y / parts, group = min(all_heads - part * HEADS, HEADS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int length = lengths ? min(max(lengths[b], 0), tokens) : tokens;
  const int tiles = (length + kPlaneTile - 1) / kPlaneTile;
  const int active = active_splits(tiles, WARPS, splits);
  if (split >= active) return;
  const u64 pair = static_cast<u64>(b) * kv_heads + kv_head, row = pair * all_heads + part * HEADS;
  const int plan = b * plan_stride + kv_head;

  KVB_DYNAMIC_SHARED(char, shared);
  float* query_unit = reinterpret_cast<float*>(shared);                                  // (HEADS,)
  float* lse_offset = query_unit + HEADS;                                                // (HEADS,)
  ChunkRecord* staged_records = reinterpret_cast<ChunkRecord*>(shared + whole_lines(8 * HEADS));   // (D / 16,)
  char* const staged_centroids =                                                         // (kWideCentroids,) fp16
      reinterpret_cast<char*>(staged_records) + whole_lines(D / 16 * sizeof(ChunkRecord));
  uint4* staged_query = reinterpret_cast<uint4*>(staged_centroids + 2 * kWideCentroids);   // (D / 16, 32): A operands
  i32* staged_order = reinterpret_cast<i32*>(staged_query + 2 * D);                      // (D,)
  float* staged_signs = reinterpret_cast<float*>(staged_order + D);                      // (value rounds, D)
  float* scratch = staged_signs + kPlaneRounds * D;   // (warps, groups, tokens): scalars; before that, the query
  char* rings = reinterpret_cast<char*>(scratch + WARPS * kMostGroups * kPlaneTile);
  static_assert(HEADS * D <= WARPS * kMostGroups * kPlaneTile, "the query fits");

  // ---- the first loads, and the first tile ----
  float raw[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; ++i) {
    const int at = threadIdx.x + i * THREADS;
    raw[i] = at / D < group ? load_float(query, query_type, row * D + at) : 0.f;
  }
  const int own = threadIdx.x % D, share = threadIdx.x / D;   // coordinate in rate order, and heads, to fold
  const i32 own_order = order[plan * D + own];
  const ChunkRecord* own_records = records + plan * (D / 16);
  const int4 fold = own_records[own / 16].fold;
  const int in_chunk = own_records[lane * N / 16].fold.w, second = in_chunk % 2, paired = in_chunk / 2;
  constexpr int RECORD_CHUNKS = D / 16 * static_cast<int>(sizeof(ChunkRecord)) / 16;
  if (threadIdx.x < RECORD_CHUNKS)
    cp_async_16(reinterpret_cast<uint4*>(staged_records) + threadIdx.x,
                reinterpret_cast<const uint4*>(own_records) + threadIdx.x);
  if (threadIdx.x < kWideCentroids / 8)
    cp_async_16(staged_centroids + 16 * threadIdx.x, centroids + plan * kWideCentroids + 8 * threadIdx.x);
  for (int i = threadIdx.x; i < D / 4 * value_rounds; i += THREADS)
    cp_async_16(staged_signs + 4 * i, value_signs + 4 * i);
  cp_async_commit();

  using ValueCopy = SideCopy<D, VALUE_BITS>;
  const u64 first_key = b * batch_stride + kv_head * head_stride;
  const int scalar_size = halves ? 2 : 1;
  // In shared memory: every lane would hold these addresses throughout, for what takes few instructions per tile.
  KVB_SHARED(KeyRowsInMemory<D>, rows);
  KVB_SHARED(PlaneSide, values);
  const int magnitude_bytes = 4 * kPlaneTile * magnitude_words, scalar_bytes = kPlaneTile * scalars * scalar_size;
  if (threadIdx.x == 0) {
    rows = {reinterpret_cast<const char*>(sign + first_key * (D / 32)),
            reinterpret_cast<const char*>(magnitude + first_key * magnitude_words),
            (halves ? reinterpret_cast<const char*>(halves) : reinterpret_cast<const char*>(bytes)) +
                first_key * (scalars * scalar_size),
            magnitude_bytes, scalar_bytes};
    values = plane_side<D>(value_sign, value_mag2, value_mag1, value_scale,
                           b * value_batch_stride + kv_head * value_head_stride);
  }
  __syncthreads();
  const int scalars_at = KeyRowsInMemory<D>::SIGN_BYTES + magnitude_bytes;
  const int scalar_room = whole_lines(scalar_bytes), key_bytes = scalars_at + scalar_room;
  const int tile_bytes = key_bytes + kPlaneTileBytes<D, VALUE_BITS>;
  const int own_ring = warp * ring * tile_bytes;   // in the rings
  // The same for the copies, in a register of each lane: kvb/plane_attention.cuh says why.
  char* const filled = reinterpret_cast<char*>(pinned(reinterpret_cast<u64>(rings + own_ring)));
  const u64 policy = read_once_policy();
  const int stride = pinned(active * WARPS);
  int tile = split * WARPS + warp, next = tile;   // of the warp: read, copied
  const int3 key_places = {
      pinned(16 * lane), pinned(rows.SIGN_BYTES + 16 * (lane ^ rows.flip(magnitude_words, lane))),
      pinned(scalars_at + 16 * lane)};
  const int single_place = pinned(key_bytes + PlaneCopy<D, D / 8>::place(16 * lane));
  const int pair_place = pinned(key_bytes + PlaneCopy<D, D / 4>::place(16 * lane));
  const int scales_place = pinned(key_bytes + kPlaneScales<D, VALUE_BITS> + 16 * lane);
  const int whole_tiles = pinned(rows.aligned() && ValueCopy::aligned(values) ? length / kPlaneTile : 0);
  auto copy_next = [&](char* to) {
    if (next < whole_tiles) {
      // Every address before the first copy, and no branch among them: ptxas 13.0 puts three instructions that do
      // nothing before each of them that stands alone.
      const KeyRowsInMemory<D> keys = rows;
      const PlaneSide side = values;
      const ValueCopy value_copy = ValueCopy::from(side, next, lane);
      const char* scales = keys.chunk(reinterpret_cast<const char*>(side.scale), next, 2 * kPlaneTile, lane);
      if (lane < 4) cp_async_16_once(to + scales_place, scales, 16, policy);
      keys.copy_whole(to, next, key_places, lane, policy);
      value_copy.whole(to, single_place, pair_place, lane, policy);
      keys.copy_rest(to, next, key_places.y, lane, policy);
    } else if (next < tiles) {
      const int count = min(length - next * kPlaneTile, kPlaneTile);
      rows.copy_part(to, next, count, lane);
      ValueCopy::part(to + key_bytes, values, next, count, lane);
    }
    next += stride;
    cp_async_commit();
  };
  copy_next(filled);

  // ---- the query: permuted, rotated by groups ----
#pragma unroll
  for (int i = 0; i < LOADS; ++i) {
    const int at = threadIdx.x + i * THREADS;
    scratch[at % D * HEADS + at / D] = raw[i];
  }
  if (threadIdx.x < D) staged_order[own] = own_order;
  __syncthreads();
  constexpr int BATCH = 16;   // loads of a matrix under way; sizes are multiples of it
  float folded[OWN] = {};
  const int start = fold.x, size = fold.y;
  const float* column = rotations + fold.z + (own - start);
#pragma unroll 1
  for (int first = 0; first < size; first += BATCH) {
    float r[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) r[i] = column[(first + i) * size];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const float* from = scratch + staged_order[start + first + i] * HEADS + share * OWN;
      if constexpr (OWN == 1) folded[0] = fmaf(r[i], *from, folded[0]);
      else
#pragma unroll
        for (int h = 0; h < OWN; h += 2) {
          const float2 x = *reinterpret_cast<const float2*>(from + h);
          folded[h] = fmaf(r[i], x.x, folded[h]);
          folded[h + 1] = fmaf(r[i], x.y, folded[h + 1]);
        }
    }
  }
#pragma unroll 1
  for (int i = 1; i < ring - 1; ++i) copy_next(filled + i * tile_bytes);
  for (int h = warp; h < HEADS; h += WARPS) {
    float dot = 0.f;
    if (key_mean && lse) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const int d = lane * N + e;
        dot = fmaf(scratch[d * HEADS + h], key_mean[b * key_mean_batch_stride + kv_head * D + d], dot);
      }
#pragma unroll
      for (int distance = 16; distance; distance /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, distance);
    }
    if (lane == 0) lse_offset[h] = dot * scale_log2 * 0.693147180559945309f;
  }
  __syncthreads();   // everybody has read the query
#pragma unroll
  for (int h = 0; h < OWN; ++h) scratch[(share * OWN + h) * D + own] = folded[h];
  __syncthreads();
  for (int h = warp; h < HEADS; h += WARPS) {
    float v[N], largest = 0.f, multiplier, undo;
    bool finite = true;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      v[e] = scratch[h * D + lane * N + e];
      largest = fmaxf(largest, fabsf(v[e]));
      finite = finite && fabsf(v[e]) < infinity();
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    finite = __all_sync(0xffffffffu, finite);
    power_of_two(largest, multiplier, undo);
    // A query below 1e-30 counts as zero, with any unit; one that holds NaN or Inf has none, and makes every logit NaN.
    float unit = undo * scale_log2;
    const bool zero = largest < 1e-30f || unit == 0.f;
    if (zero) unit = 1.f;
    // What lane (g, t') multiplies stands in columns 2t', 2t' + 1, 2t' + 8, 2t' + 9 of A: a[0] and a[2] of rows 0-7,
    // a[1] and a[3] of rows 8-15, which are zero for up to 8 heads.  Of one segment these are coordinates 4t' .. 4t' +
    // 3; of two, four of octet i of segment t' / 2 in operand i.
    __half* operands = reinterpret_cast<__half*>(staged_query);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int j = lane * N + e, octet = j % 16 / 8;
      const int operand = j / 16 + (paired ? octet - second : 0), upper = paired ? second : octet;
      __half* to = operands + (operand * 32 + h % 8 * 4 + 2 * upper + j % 8 / 4) * 8 + j % 4 / 2 * 4 + j % 2;
      to[h / 8 * 2] = from_float<__half>(finite && !zero ? v[e] * multiplier : 0.f);
      if (HALVES == 1) to[2] = from_float<__half>(0.f);
    }
    if (lane == 0) query_unit[h] = finite ? unit : not_a_number();
  }
  if (ring == 3) cp_async_wait<2>();
  else cp_async_wait<1>();
  __syncthreads();   // the query is there, and the plan

  const ValueTable value_table = {value_high_low, value_high_high, value_low_low, value_low_high};
  float unit[HALVES];   // logit = unit * sum_g s_g sum_j q_j c_j
#pragma unroll
  for (int half = 0; half < HALVES; ++half) unit[half] = query_unit[8 * half + g];
  PlaneSums<D, HALVES> state;
  state.clear();

  const int value_octet = g * (D / 64), exponent = exponents[plan];
  const auto first_place = OctetPlace<D, VALUE_BITS, D / 64>::of(plane_row<D>(2 * t), value_octet);
  const auto second_place = OctetPlace<D, VALUE_BITS, D / 64>::of(plane_row<D>(2 * t + 1), value_octet);
  const uint4* own_query = staged_query + pinned(lane);
  float* own_scratch = scratch + warp * (kMostGroups * kPlaneTile);
  KeyTile keys;
  keys.flip = 16 * KeyRowsInMemory<D>::flip(magnitude_words, g * magnitude_words / 4);
  keys.stride = 32 * magnitude_words;
  keys.halves = t % 2 ? 0x7632u : 0x5410u;
  keys.upper = t / 2;
  // The lane's bytes of keys, from the values on that follow them.
  const int sign_place = pinned(g * (D / 8) - key_bytes);
  const int row_place = pinned(KeyRowsInMemory<D>::SIGN_BYTES + g * 4 * magnitude_words - key_bytes);
  const int scalar_place = pinned(lane * scalars * scalar_size - scalar_room);
  // In the rings: the values of the tile that is read; in the ring: the tile before it.
  int read = own_ring + key_bytes, freed = (ring - 1) * tile_bytes;
  for (; tile < tiles; tile += stride) {
    if (ring == 3) cp_async_wait<1>();
    else cp_async_wait<0>();
    __syncwarp();   // every lane's copies have landed, and every lane has read the slot that is filled now
    const char* current = rings + read;
    copy_next(filled + freed);

    // ---- logits ----
    {
      const char* from = current + scalar_place;
      float* to = own_scratch + lane;
      if (halves) {   // as many as there can be: what follows the scalars, of this tile, too, is never used
        __half s[kMostGroups];
#pragma unroll
        for (int i = 0; i < kMostGroups; ++i) s[i] = reinterpret_cast<const __half*>(from)[i];
#pragma unroll
        for (int i = 0; i < kMostGroups; ++i) to[i * kPlaneTile] = to_float(s[i]);
      } else {
#pragma unroll 1
        for (int i = 0; i < scalars; ++i)
          to[i * kPlaneTile] = scalar_of_byte(reinterpret_cast<const u8*>(from)[i], exponent);
      }
    }
    __syncwarp();
    keys.rows = current + row_place;
    keys.signs = current + sign_place;
    float product[GROUPS][HALVES][2] = {};
    const char *lane_query = reinterpret_cast<const char*>(own_query),
               *lane_scalars = reinterpret_cast<const char*>(own_scratch + 2 * t);
    u32 ends[3];   // the same in all lanes, but from one of them: then branches are known not to diverge
#pragma unroll
    for (int i = 0; i < 3; ++i) ends[i] = __shfl_sync(0xffffffffu, staged_records[i].ends, 0);
    int chunk = 0;
#define KVB_RUN(BITS, SEGMENTS)                                                                             \
  multiply_run<D, BITS, SEGMENTS>(product, chunk, ends, staged_records, lane_query, lane_scalars, keys,     \
                                  staged_centroids)
    KVB_RUN(1, 2);
    KVB_RUN(2, 2);
    KVB_RUN(3, 2);
    KVB_RUN(4, 2);
    KVB_RUN(5, 2);
    KVB_RUN(1, 1);
    KVB_RUN(2, 1);
    KVB_RUN(3, 1);
    KVB_RUN(4, 1);
    KVB_RUN(5, 1);
    KVB_RUN(6, 1);
#undef KVB_RUN
    const __half2* value_scales = reinterpret_cast<const __half2*>(current + kPlaneScales<D, VALUE_BITS>) + t;
    __half2 scale[GROUPS];
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) scale[j] = value_scales[4 * j];
    if ((tile + 1) * kPlaneTile > length) {   // slots beyond the sequence get the logit -inf
#pragma unroll
      for (int j = 0; j < GROUPS; ++j)
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (tile * kPlaneTile + 8 * j + 2 * t + e >= length)
              product[j][half][e] = unit[half] < 0.f ? infinity() : -infinity();
    }

    u32 p[HALVES][GROUPS];
    state.weigh(p, scale, [&](int j, int half, int e, float x) { return fmaf(product[j][half][e], unit[half], x); }, t);

    // ---- values ----
    add_values<D, HALVES, VALUE_BITS>(state.o, current, first_place, second_place, p, value_table,
                                      value_octet % 4);
    freed = freed == (ring - 1) * tile_bytes ? 0 : freed + tile_bytes;
    read = freed == (ring - 1) * tile_bytes ? read - freed : read + tile_bytes;
  }
  const DecodeTarget target = {lse ? lse + row : nullptr, key_mean ? lse_offset : nullptr,
                               partial_output + row * splits * D, partial_statistics + row * splits,
                               tickets + pair * parts + part};
  finish_planes<D, HEADS, WARPS>(state, rings, target, group, split, splits, active, staged_signs, value_rounds,
                          value_remaining_scale, output, output_type, row);
}

}  // namespace kvb
