// Decode attention over KIVI's codes, one query token per sequence, grouped query heads.
// Reference: reference/kivi.py, decode_attention; it also says where the bits lie and why.
//
//   logit_t = scale (sum_d (q_d s_d) c_td + sum_d q_d m_d),    output_c = sum_t (p_t s_tg) c_tc + sum_t p_t m_tg
//
// kivi_attention_kernel: keys and values of 2 or 4 bits each, any groups of 32, 64 or 128.
//   Grid      (splits, kv_heads, batch): the blocks of a KV head share its tiles; the last to finish merges and writes
//             (kvb/splits.cuh).  With more query heads than HEADS (9 to 16 at D = 256, where registers hold 8) a KV
//             head has two rows of blocks, and its codes are read twice.
//   Block     8 warps, each with its own tiles of 32 tokens, which lie within one group of keys.
//   Pipeline  Each warp has a ring of tiles in shared memory filled by cp.async, one being read.  A tile of every array
//             is contiguous in memory.
//   Operands  One AND takes a field of a word of codes and leaves a pair of fp16 c 2^(place - 24), subnormal and exact.
//             The mma takes subnormal operands at full speed: with the bit of 2.0 set in all of them it is no faster.
//   Keys      mma.m16n8k16 with codes as A, 16 tokens by 16 channels, and q s as B, 16 channels by 8 heads.  The lane
//             (g, t) = (lane / 4, lane % 4) has a quarter of the row of token g.  q, divided by a power of two that
//             leaves |q| < 1 and by 2^place, stands ready in fp16; one multiplication per two channels and head makes
//             q s, which cannot overflow.  The minima are a token more, the same in all 16 rows of A, with q as B.
//   Softmax   Online, base 2, in the layout of the sums: (token, two heads) per lane.  Weights become fp16 and are
//             transposed, 8 by 8, in one instruction.
//   Values    O^T = V^T P^T by mma.m16n8k16: codes as A, 16 channels by 16 tokens, p s as B, 16 tokens by 8 heads.  The
//             lane (g, t) has an eighth of the rows of the tokens of t; one byte permutation puts the halves of two
//             tokens into a register.  The minima of a token's groups are rows of one more A, the total is another:
//             ones.  So the total is that of the rounded weights.
//   Tokens    Which token is which row of a product is free.  Of eight tokens, row 2 t is token t and row 2 t + 1 token
//             7 - t; with that and the places of `KiviRow`, no load from shared memory meets a bank twice.
//   Range     p s must fit fp16.  The reference (subtracted exponent) is raised where a weight reaches 2^12, to leave
//             2^8; scales of values of 16 and more lower both by as much as they exceed 2^3.
//   Bytes     D (key_bits + value_bits) / 8 + 4 D (1 / key group + 1 / value group) per token and KV head: 96 at
//             D = 128, 2 + 2 bits, groups of 32.
//   Counts    Warp instructions per tile of 32 tokens at D = 128, 2 + 2 bits, groups of 32, up to 8 heads, by hand:
//             keys 72 to make operands, 16 multiplications, 24 mma, 12 loads; softmax 45; values 72 operands, 24 + 16
//             permutations and multiplications, 18 mma, 24 loads; copies 30: 350 in all, of them 200 on the half-rate
//             integer pipe.  131072 tokens x 8 KV heads are 248 tiles per multiprocessor (132), 3072 bytes each: at 3
//             TB/s and 1.75 GHz 238 cycles of memory for a tile, 146 of issue slots at 2.4 a cycle.
//   Tried     H100, 32:8 heads, 131072 tokens, 2 + 2 bits, us with the L2 flushed by writing; in brackets the splits.
//             Scales and minima copied as what others may want again, so that lines of the flush make room for them:
//               57.7 (16), 68.5 (33)                             a ring of two tiles 57.2, of four 58.8 (16)
//               two blocks of 123 registers on a multiprocessor 57.7 (16), 62.7 (33), with a ring of two 57.1, 59.8
//               12 warps 61.5, 16 warps 61.5, 16 with a ring of two 60.0 (16)
//             Neither warps nor registers matter: it is bound by memory.  As what is read once, like the codes: 52.3
//             instead of 60.5 by the benchmark, 76.9 instead of 87.0 at 4 + 4 bits; 47.2 where the flush reads, as
//             before.  Rings that begin at lines of shared memory (this version): 48.6, and 72.2 at 4 + 4 bits; 158
//             instead of 174 at 32:32.  Each further 1024 tokens of 8 KV heads cost 0.29 us, 2.7 TB/s.
#pragma once
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/kivi_codes.cuh"
#include "kvb/splits.cuh"

namespace kvb {

constexpr int kKiviWarps = 8;
constexpr float kKiviSlack = 12.f;   // log2 of what no weight reaches: 2^12 times a scale below 2^4 fits fp16
constexpr float kKiviRoom = 4.f;     // a raised reference leaves the largest weight so far below (in log2)

// Token that is row r of every eight.
__device__ __forceinline__ int kivi_token(int r) { return r % 2 ? 7 - r / 2 : r / 2; }

// The rows of codes of a tile in shared memory.  Chunks of 16 bytes change places within a row so that neither the
// quarters of the rows of a key product nor the eighths of those of a value product meet in a bank.
template <int D, int BITS>
struct KiviRow {
  static constexpr int BYTES = D * BITS / 8, CHUNKS = BYTES / 16, TILE_BYTES = kKiviTile * BYTES;
  static constexpr int FIELDS = kKiviFields<BITS>;

  static __device__ __forceinline__ int place(int row, int byte) {
    const int flip = CHUNKS == 4 ? row & 2 : CHUNKS == 8 ? (row & 1) * 3 ^ (row & 2) * 2 : 0;
    return row * BYTES + ((byte / 16) ^ flip) * 16 + byte % 16;
  }
};

// COUNT words of shared memory from byte `at` on.  Eight of them are two chunks that stand side by side, in one order
// or the other.
template <int COUNT>
__device__ __forceinline__ void load_words(u32 (&words)[COUNT], const char* from, int at) {
  if constexpr (COUNT == 1) {
    words[0] = *reinterpret_cast<const u32*>(from + at);
  } else if constexpr (COUNT == 2) {
    const uint2 pair = *reinterpret_cast<const uint2*>(from + at);
    words[0] = pair.x, words[1] = pair.y;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from + (at ^ 4 * i));
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  }
}

// A tile in shared memory: codes, scales and minima of keys, then of values, whose scales may be fewer.
template <int D, int KEY_BITS, int VALUE_BITS>
struct KiviTileLayout {
  static constexpr int KEY_SCALES = KiviRow<D, KEY_BITS>::TILE_BYTES, KEY_MINIMA = KEY_SCALES + 2 * D;
  static constexpr int VALUES = KEY_MINIMA + 2 * D, VALUE_SCALES = VALUES + KiviRow<D, VALUE_BITS>::TILE_BYTES;
  static constexpr int VALUE_MINIMA = VALUE_SCALES + 2 * D, BYTES = VALUE_MINIMA + 2 * D;
  static constexpr int RING = kKiviWarps * 3 * BYTES <= 200 * 1024 ? 3 : 2;   // tiles
  static_assert(BYTES % kSharedLine == 0 && VALUES % kSharedLine == 0, "copies of whole lines");
};

__device__ __forceinline__ u32 multiply_pair(u32 x, u32 y) {
  const __half2 product = __hmul2(*reinterpret_cast<__half2*>(&x), *reinterpret_cast<__half2*>(&y));
  return *reinterpret_cast<const u32*>(&product);
}
__device__ __forceinline__ u32 component(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// query : (batch, kv_heads * all_heads, D), type 0 float, 1 fp16, 2 bf16    output : likewise, of output_type
// *_codes : (batch, kv_heads, tokens, D bits / 32)
// key_scale, key_minimum : (batch, kv_heads, tokens / key_group, D)
// value_scale, value_minimum : (batch, kv_heads, tokens, D / value_group)
// strides in elements, of codes and of scales, which minima share; every head begins at a multiple of 16 bytes
// lengths : (batch,) or null for `tokens`, a multiple of 32
// lse : (batch, kv_heads * all_heads) or null                               scale_log2 = softmax scale * log2(e)
// partial_output, partial_statistics, tickets : kvb/splits.cuh
template <int D, int HEADS, int KEY_BITS, int VALUE_BITS>
__global__ void __launch_bounds__(32 * kKiviWarps, 1) kivi_attention_kernel(
    const void* __restrict__ query, int query_type, const u32* __restrict__ key_codes,
    const __half* __restrict__ key_scale, const __half* __restrict__ key_minimum, u64 key_batch_stride,
    u64 key_head_stride, u64 key_scale_batch_stride, u64 key_scale_head_stride, int key_group,
    const u32* __restrict__ value_codes, const __half* __restrict__ value_scale,
    const __half* __restrict__ value_minimum, u64 value_batch_stride, u64 value_head_stride,
    u64 value_scale_batch_stride, u64 value_scale_head_stride, int value_group, const int* __restrict__ lengths,
    void* output, int output_type, float* lse, float* partial_output, float2* partial_statistics, u32* tickets,
    int tokens, int all_heads, float scale_log2) {
  static_assert(D == 64 || D == 128 || D == 256, "rows divide evenly among the lanes");
  static_assert(HEADS == 8 || HEADS == 16, "columns of the mma tiles");
  using Layout = KiviTileLayout<D, KEY_BITS, VALUE_BITS>;
  using KeyRow = KiviRow<D, KEY_BITS>;
  using ValueRow = KiviRow<D, VALUE_BITS>;
  constexpr int HALVES = HEADS / 8, U = D / 32, STEPS = D / 16, N = D / 32, THREADS = 32 * kKiviWarps;
  constexpr int RING = Layout::RING;
  constexpr bool HOLDS_QUERY = D * HALVES <= 128;   // in registers

  const int parts = (all_heads + HEADS - 1) / HEADS, part = blockIdx.y % parts;   // of the KV head's query heads
  const int split = blockIdx.x, kv_head = blockIdx.y / parts, b = blockIdx.z;
  const int splits = gridDim.x, kv_heads = gridDim.y / parts, group = min(all_heads - part * HEADS, HEADS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int length = lengths ? min(max(lengths[b], 0), tokens) : tokens;
  const int tiles = (length + kKiviTile - 1) / kKiviTile;
  const int active = active_splits(tiles, kKiviWarps, splits);
  if (split >= active) return;
  const u64 pair = static_cast<u64>(b) * kv_heads + kv_head, row = pair * all_heads + part * HEADS;

  KVB_DYNAMIC_SHARED(char, shared);
  uint4* staged_query = reinterpret_cast<uint4*>(shared);                        // (STEPS, HALVES, 32): B operands
  float* query_unit = reinterpret_cast<float*>(staged_query + STEPS * HALVES * 32);   // (HEADS,)
  char* rings = reinterpret_cast<char*>(query_unit) + whole_lines(4 * HEADS);
  char* const ring = rings + warp * RING * Layout::BYTES;
  // The same for the copies, in a register of each lane: where a uniform register holds a part of the shared address,
  // ptxas 13.0 may write cp.async with a cache hint in a form that the GPU refuses; tests/test_compile.py looks for it.
  char* const filled = reinterpret_cast<char*>(pinned(reinterpret_cast<u64>(ring)));

  // The query first: behind the copies of the tiles it would wait for all of them.
  constexpr int PER_WARP = HEADS / kKiviWarps;
  float v[PER_WARP][N];
#pragma unroll
  for (int i = 0; i < PER_WARP; ++i)
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int h = warp + i * kKiviWarps;
      v[i][e] = h < group ? load_float(query, query_type, (row + h) * D + lane * N + e) : 0.f;
    }

  // ---- copies ----
  const u64 policy = read_once_policy();
  const int stride = pinned(active * kKiviWarps);
  int tile = split * kKiviWarps + warp, next = tile;   // of the warp: read, copied
  const int group_tiles = key_group / kKiviTile, value_groups = D / value_group, group_shift = value_group / 64;
  auto bytes_of = [&](const void* x, int size, u64 batch_stride, u64 head_stride) {
    return static_cast<const char*>(x) + (b * batch_stride + kv_head * head_stride) * size;
  };
  const char* keys = bytes_of(key_codes, 4, key_batch_stride, key_head_stride) + 16 * lane;
  const char* values = bytes_of(value_codes, 4, value_batch_stride, value_head_stride) + 16 * lane;
  // Scales and minima: half a warp copies the former, the other half the latter, or all of it both.
  constexpr bool WHOLE_WARP = D == 256;
  const int chunk = 16 * (WHOLE_WARP ? lane : lane % 16), copies_minima = !WHOLE_WARP && lane >= 16;
  const char* key_scales = bytes_of(key_scale, 2, key_scale_batch_stride, key_scale_head_stride) + chunk;
  const char* key_minima = bytes_of(key_minimum, 2, key_scale_batch_stride, key_scale_head_stride) + chunk;
  const char* value_scales = bytes_of(value_scale, 2, value_scale_batch_stride, value_scale_head_stride) + chunk;
  const char* value_minima = bytes_of(value_minimum, 2, value_scale_batch_stride, value_scale_head_stride) + chunk;
  if (copies_minima) key_scales = key_minima, value_scales = value_minima;
  const int key_chunk_place = pinned(Layout::KEY_SCALES + copies_minima * 2 * D + chunk);
  const int value_chunk_place = pinned(Layout::VALUE_SCALES + copies_minima * 2 * D + chunk);
  const bool copies_keys = chunk < 2 * D, copies_values = chunk < 2 * kKiviTile * value_groups;
  const int key_place = pinned(KeyRow::place(16 * lane / KeyRow::BYTES, 16 * lane % KeyRow::BYTES));
  const int value_place =
      pinned(Layout::VALUES + ValueRow::place(16 * lane / ValueRow::BYTES, 16 * lane % ValueRow::BYTES));
  auto copy_next = [&](char* to) {
    if (next < tiles) {
      const char* from = keys + static_cast<u64>(next) * KeyRow::TILE_BYTES;
#pragma unroll
      for (int i = 0; i < KeyRow::TILE_BYTES; i += 512) cp_async_16_once(to + key_place + i, from + i, 16, policy);
      from = values + static_cast<u64>(next) * ValueRow::TILE_BYTES;
#pragma unroll
      for (int i = 0; i < ValueRow::TILE_BYTES; i += 512)
        cp_async_16_once(to + value_place + i, from + i, 16, policy);
      const u64 key_offset = static_cast<u64>(next / group_tiles) * (2 * D);
      const u64 value_offset = static_cast<u64>(next) * (2 * kKiviTile * value_groups);
      // Other tiles may want the scales of keys, too: neighbouring warps do, at the same time.
      if (copies_keys) cp_async_16_once(to + key_chunk_place, key_scales + key_offset, 16, policy);
      if (copies_values) cp_async_16_once(to + value_chunk_place, value_scales + value_offset, 16, policy);
      if constexpr (WHOLE_WARP) {
        cp_async_16_once(to + key_chunk_place + 2 * D, key_minima + key_offset, 16, policy);
        if (copies_values) cp_async_16_once(to + value_chunk_place + 2 * D, value_minima + value_offset, 16, policy);
      }
    }
    next += stride;
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < RING - 1; ++i) copy_next(filled + i * Layout::BYTES);

  // ---- the query: two operands of every pair of channels, a warp per head ----
#pragma unroll
  for (int i = 0; i < PER_WARP; ++i) {
    const int h = warp + i * kKiviWarps;
    float largest = 0.f;
#pragma unroll
    for (int e = 0; e < N; ++e) largest = fmaxf(largest, fabsf(v[i][e]));
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    // unit 2^(e + 1) for a largest one in [2^e, 2^(e+1)).  A query below 1e-30 counts as zero, with any unit.
    const u32 exponent = min(max(__float_as_uint(largest) >> 23, 3u), 252u);
    float unit = __uint_as_float((exponent + 1) << 23) * scale_log2;
    const bool zero = largest < 1e-30f || unit == 0.f;
    const float inverse = zero ? 0.f : __uint_as_float((253 - exponent) << 23);
    if (zero) unit = 1.f;
    __half* operands = reinterpret_cast<__half*>(staged_query);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      // Channel 32 u + 8 t' + 4 i' + 2 v' + h': lane t' of the product, step 2 u + i', register v', half h'.
      const int d = lane * N + e, u = d / 32, first = d / 4 % 2, pair_of = d / 2 % 2;
      const int field = (2 * (u + first * U) + pair_of) % KeyRow::FIELDS;
      const int step = 2 * u + first, of = h % 8 * 4 + d % 32 / 8;
      __half* to = operands + ((step * HALVES + h / 8) * 32 + of) * 8 + 2 * pair_of + d % 2;
      const float z = v[i][e] * inverse;
      to[0] = __float2half_rn(z * __uint_as_float((127 - kivi_place<KEY_BITS>(field)) << 23));
      to[4] = __float2half_rn(z);
    }
    if (lane == 0) query_unit[h] = unit;
  }
  __syncthreads();

  const uint4* own_query = staged_query + pinned(lane);
  uint4 held_query[HOLDS_QUERY ? STEPS * HALVES : 1];   // x, y: q / 2^place of v = 0, 1;  z, w: q
  if constexpr (HOLDS_QUERY)
#pragma unroll
    for (int i = 0; i < STEPS * HALVES; ++i) held_query[i] = own_query[i * 32];
  auto query_operands = [&](int step, int half) {
    if constexpr (HOLDS_QUERY) return held_query[step * HALVES + half];
    else return own_query[(step * HALVES + half) * 32];
  };

  // Of heads 2 t and 2 t + 1 (+ 8): logit = unit (2^24 sum of codes + sum of minima).
  float unit[HALVES][2], reference[HALVES][2];
  float o[2 * U][HALVES][4] = {};       // [2 u + h]: channels 32 u + 4 g + h (+ 2 for [2], [3]) over 2^(24 - place)
  float least[HALVES][4] = {};          // [0], [1]: sums of minima of group g; [2], [3]: totals
#pragma unroll
  for (int half = 0; half < HALVES; ++half)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      unit[half][e] = query_unit[8 * half + 2 * t + e];
      reference[half][e] = kNoReference;
    }

  constexpr int KEY_WORDS = D * KEY_BITS / 128, VALUE_WORDS = D == 64 && VALUE_BITS == 2 ? 1 : D * VALUE_BITS / 256;
  const int key_at = KeyRow::place(kivi_token(g), 4 * KEY_WORDS * t);
  // An eighth of 64 channels of 2 bits is half of the fields of a word.
  constexpr bool HALF_WORD = D == 64 && VALUE_BITS == 2;
  const int eighth = HALF_WORD ? g / 2 * 4 : 4 * VALUE_WORDS * g;
  const int value_at[2] = {Layout::VALUES + ValueRow::place(t, eighth),
                           Layout::VALUES + ValueRow::place(7 - t, eighth)};
  const u32 lower_halves = HALF_WORD && g % 2 ? 0x5511u : 0x5410u;
  const u32 upper_halves = HALF_WORD && g % 2 ? 0x7733u : 0x7632u;
  const int minimum_of = 2 * min(g, value_groups - 1);   // byte in a row of minima: the row of A that this lane has

  int read = 0, freed = (RING - 1) * Layout::BYTES;   // in the ring: the tile that is read, the one before it
  for (; tile < tiles; tile += stride) {
    cp_async_wait<RING - 2>();
    __syncwarp();   // every lane's copies have landed, and every lane has read the slot that is filled now
    char* current = ring + read;
    copy_next(filled + freed);

    const int count = length - tile * kKiviTile;
    if (count < kKiviTile) {   // what stands beyond the sequence may be anything: weights of 0 must meet numbers
      for (int i = count * value_groups + lane; i < kKiviTile * value_groups; i += 32) {
        reinterpret_cast<u16*>(current + Layout::VALUE_SCALES)[i] = 0;
        reinterpret_cast<u16*>(current + Layout::VALUE_MINIMA)[i] = 0;
      }
      __syncwarp();
    }

    // ---- logits ----
    float product[2][HALVES][4] = {}, offset[HALVES][4] = {};   // of 16 tokens each; of the minima, all rows the same
    {
      u32 words[4][KEY_WORDS];   // of tokens kivi_token(g) + 8 j
#pragma unroll
      for (int j = 0; j < 4; ++j) load_words(words[j], current + 8 * j * KeyRow::BYTES, key_at);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const uint4 s = *reinterpret_cast<const uint4*>(current + Layout::KEY_SCALES + 64 * u + 16 * t);
        const uint4 m = *reinterpret_cast<const uint4*>(current + Layout::KEY_MINIMA + 64 * u + 16 * t);
#pragma unroll
        for (int first = 0; first < 2; ++first) {
          const u32 low[2] = {component(m, 2 * first), component(m, 2 * first + 1)};
          const int n = 2 * (u + first * U), word = n / KeyRow::FIELDS, field = n % KeyRow::FIELDS;
          u32 a[2][4];
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[j][i] = kivi_operand<KEY_BITS>(words[2 * j + i % 2][word], field + i / 2);
#pragma unroll
          for (int half = 0; half < HALVES; ++half) {
            const uint4 q = query_operands(2 * u + first, half);
            const u32 scaled[2] = {multiply_pair(q.x, component(s, 2 * first)),
                                   multiply_pair(q.y, component(s, 2 * first + 1))};
            mma_m16n8k16<__half>(product[0][half], a[0], scaled);
            mma_m16n8k16<__half>(product[1][half], a[1], scaled);
            mma_m16n8k16<__half>(offset[half], {low[0], low[0], low[1], low[1]}, {q.z, q.w});
          }
        }
      }
    }
    if (count < kKiviTile) {   // slots beyond the sequence get the logit -inf
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (16 * j + 8 * (i / 2) + kivi_token(g) >= count)
              product[j][half][i] = unit[half][i % 2] < 0.f ? infinity() : -infinity();
    }

    // ---- weights ----
    u32 p[4][HALVES];   // [j]: of token kivi_token(g) + 8 j
    auto weigh = [&]() {   // returns whether a weight is 2^kKiviSlack or more, or NaN
      u32 large = 0;
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        float coded[2], constant[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          coded[e] = unit[half][e] * 16777216.f;
          constant[e] = fmaf(unit[half][e], offset[half][e], -reference[half][e]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* x = product[j / 2][half] + j % 2 * 2;
          p[j][half] = pack_pair<__half>(exp2_approx(fmaf(x[0], coded[0], constant[0])),
                                         exp2_approx(fmaf(x[1], coded[1], constant[1])));
          large |= p[j][half] + 0x14001400u;   // fp16 from 2^12 on: the sum carries into the sign bit
        }
      }
      return (large & 0x80008000u) != 0;
    };
    // The tile's scales of values, a share for each lane.
    constexpr int SHARE = D / 64;   // words
    u32 shares[SHARE] = {};
    if (4 * SHARE * lane < 2 * kKiviTile * value_groups)
      load_words(shares, current + Layout::VALUE_SCALES, 4 * SHARE * lane);
    u32 wide = 0;
#pragma unroll
    for (int i = 0; i < SHARE; ++i) wide |= shares[i] + 0x34003400u;   // from 2^4 on
    if (__any_sync(0xffffffffu, weigh() || (wide & 0x80008000u))) {
      float widest = 8.f;
#pragma unroll
      for (int i = 0; i < SHARE; ++i) {
        const float2 s = unpack_pair<__half>(shares[i]);
        widest = fmaxf(widest, fmaxf(s.x, s.y));
      }
#pragma unroll
      for (int distance = 16; distance; distance /= 2)
        widest = fmaxf(widest, __shfl_xor_sync(0xffffffffu, widest, distance));
      const float slack = kKiviSlack + 130 - static_cast<float>(min(__float_as_uint(widest) >> 23, 142u));
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float largest = -infinity();
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = e; i < 4; i += 2)
              largest = fmaxf(largest, fmaf(product[j][half][i], unit[half][e] * 16777216.f,
                                            unit[half][e] * offset[half][e]));
#pragma unroll
          for (int distance = 4; distance < 32; distance *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
          const float next_reference =
              largest >= reference[half][e] + slack ? largest - (slack - kKiviRoom) : reference[half][e];
          const float shrink = exp2_approx(reference[half][e] - next_reference);
          reference[half][e] = next_reference;
          least[half][e] *= shrink;
          least[half][e + 2] *= shrink;
#pragma unroll
          for (int m = 0; m < 2 * U; ++m) {
            o[m][half][e] *= shrink;
            o[m][half][e + 2] *= shrink;
          }
        }
      weigh();
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < HALVES; ++half) p[j][half] = transpose_8x8(p[j][half]);

    // ---- values ----
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      // Tokens t, 7 - t, 8 + t and 15 - t of these sixteen are the columns 2t, 2t + 1, 2t + 8 and 2t + 9.
      const char* eights[2] = {current + 16 * step * ValueRow::BYTES, current + (16 * step + 8) * ValueRow::BYTES};
      u32 s[2][U], m[2];   // pairs of scales by 32 channels, and of minima of this lane's row
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int row_bytes = 2 * value_groups, first = 16 * step + 8 * k + t, second = 16 * step + 8 * k + 7 - t;
        const char* scale_rows = current + Layout::VALUE_SCALES;
        const char* minimum_rows = current + Layout::VALUE_MINIMA + minimum_of;
        auto half_at = [](const char* x) { return static_cast<u32>(*reinterpret_cast<const u16*>(x)); };
        if (value_group == 32) {
          u32 one[U / 2], other[U / 2];
          load_words(one, scale_rows, first * 2 * U);
          load_words(other, scale_rows, second * 2 * U);
#pragma unroll
          for (int u = 0; u < U; ++u) s[k][u] = permute_bytes(one[u / 2], other[u / 2], u % 2 ? 0x7632u : 0x5410u);
        } else {
#pragma unroll
          for (int u = 0; u < U; ++u) {
            const int at = 2 * (u >> group_shift);
            s[k][u] = half_at(scale_rows + first * row_bytes + at)
                      | half_at(scale_rows + second * row_bytes + at) << 16;
          }
        }
        m[k] = half_at(minimum_rows + first * row_bytes) | half_at(minimum_rows + second * row_bytes) << 16;
      }
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
        mma_m16n8k16<__half>(least[half], {m[0], 0x3c003c00u, m[1], 0x3c003c00u},
                             {p[2 * step][half], p[2 * step + 1][half]});
      u32 words[2][2][VALUE_WORDS];
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) load_words(words[k][i], eights[k], value_at[i]);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int word = 2 * u / ValueRow::FIELDS, field = 2 * u % ValueRow::FIELDS;
        u32 scaled[HALVES][2];
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
          for (int k = 0; k < 2; ++k) scaled[half][k] = multiply_pair(p[2 * step + k][half], s[k][u]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          u32 a[4];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const u32 both = permute_bytes(words[k][0][word], words[k][1][word], h ? upper_halves : lower_halves);
            a[2 * k] = kivi_operand<VALUE_BITS>(both, field);
            a[2 * k + 1] = kivi_operand<VALUE_BITS>(both, field + 1);
          }
#pragma unroll
          for (int half = 0; half < HALVES; ++half) mma_m16n8k16<__half>(o[2 * u + h][half], a, scaled[half]);
        }
      }
    }
    freed = read;
    read = read == (RING - 1) * Layout::BYTES ? 0 : read + Layout::BYTES;
  }

  // ---- one copy of the partial output per warp, over the rings ----
  // No copy is under way: beyond the last tile none starts.
  __syncthreads();
  float* copies = reinterpret_cast<float*>(rings);                                          // (warps, HEADS, D)
  float2* statistics = reinterpret_cast<float2*>(copies + kKiviWarps * HEADS * D);          // (warps, HEADS)
#pragma unroll
  for (int half = 0; half < HALVES; ++half)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int h = warp * HEADS + 8 * half + 2 * t + e;
      if (g == 0) statistics[h] = make_float2(reference[half][e], least[half][e + 2]);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const float minimum = __shfl_sync(0xffffffffu, least[half][e], 4 * (u >> group_shift) + t);
        const int field = 2 * u % ValueRow::FIELDS;
        const float first = __uint_as_float((127 + 24 - kivi_place<VALUE_BITS>(field)) << 23);
        const float second = __uint_as_float((127 + 24 - kivi_place<VALUE_BITS>(field + 1)) << 23);
        *reinterpret_cast<float4*>(copies + h * D + 32 * u + 4 * g) =
            make_float4(fmaf(o[2 * u][half][e], first, minimum), fmaf(o[2 * u + 1][half][e], first, minimum),
                        fmaf(o[2 * u][half][e + 2], second, minimum), fmaf(o[2 * u + 1][half][e + 2], second, minimum));
      }
    }
  const DecodeTarget target = {lse ? lse + row : nullptr, nullptr, partial_output + row * splits * D,
                               partial_statistics + row * splits, tickets + pair * parts + part};
  finish_split<D, kKiviWarps, HEADS, THREADS>(copies, statistics, rings, target, group, split, splits, active,
                                              [&](int index, const float4& x) {
                                                store_float(output, output_type, row * D + index, x.x);
                                                store_float(output, output_type, row * D + index + 1, x.y);
                                                store_float(output, output_type, row * D + index + 2, x.z);
                                                store_float(output, output_type, row * D + index + 3, x.w);
                                              });
}

}  // namespace kvb
