// Exact decode attention over fp16, bf16 and fp32 caches, one query token per sequence, grouped query heads.
// Reference: reference/attention.py.
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
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/splits.cuh"

namespace kvb {

constexpr int kTile = 16;           // tokens of a tile
constexpr int kDecodeWarps = 8;
constexpr float kReferenceGap = 8.f, kReferenceSlack = 12.f;

template <int D, int HEADS>
constexpr int kResidentBlocks = D == 256 || (D == 128 && HEADS == 16) ? 1 : 2;   // per SM
constexpr int kRingUnits = 3;   // one is read while two are in flight
// A cache of up to so many bytes is the first to leave the L2 cache: fewer dirty lines of other data then have to be
// written back to make room, 3 us less on an H100 at 64 and 128 MB.  A larger one loses by it, 5 us at 512 MB.
constexpr u64 kEvictFirstBytes = 256u << 20;

// The row of the tile that is token 2t + e of the j-th group of 8 columns.  Lanes that read at the same time differ in
// bit 2 of the row for keys (e = 0, 1; four chunks each) and in bits 1 and 2 for values (t = 0..3; two chunks each).
__device__ __forceinline__ int row_of(int t, int e, int j) { return 2 * (t ^ 2 * e) + e + 8 * j; }

// Which tokens the blocks of one (sequence, list) attend to.  `count` positions, of which position i is token(i).
struct EveryToken {
  static constexpr bool kListed = false;
  int count;
  __device__ __forceinline__ EveryToken(const int* lengths, int b, int tokens)
      : count(lengths ? min(max(lengths[b], 0), tokens) : tokens) {}
  __device__ __forceinline__ int token(int i) const { return i < count ? i : -1; }
};

// The slots of the list, which counts from slot `first`, then the first `leading`.  Entries outside the sequence are no
// token: -1.  An entry is asked for before it is known whether the list is that long: three loads would else wait for
// each other, counts, entries and rows.
struct ListedTokens {
  static constexpr bool kListed = true;
  int first, count, length;
  int listed, slots;   // entries: present, that there is memory for
  const int* list;
  __device__ __forceinline__ ListedTokens(const int* lengths, int b, int tokens, const int* indices, const int* counts,
                                          u64 batch_stride, u64 list_stride, int slots, int list_id, int lists,
                                          const int* leading_counts, int first)
      : first(first),
        length(lengths ? min(max(lengths[b], 0), tokens - first) : tokens - first),
        listed(min(max(counts[b * lists + list_id], 0), slots)),
        slots(slots),
        list(indices + b * batch_stride + list_id * list_stride) {
    count = listed + (leading_counts ? min(max(leading_counts[b], 0), first) : 0);
  }
  __device__ __forceinline__ int entry(int i) const { return i < slots ? __ldg(list + i) : -1; }
  // Of position i, with entry(i).
  __device__ __forceinline__ int token(int i, int entry) const {
    if (i >= listed) return i < count ? i - listed : -1;
    return static_cast<u32>(entry) < static_cast<u32>(length) ? first + entry : -1;
  }
  __device__ __forceinline__ int token(int i) const { return token(i, entry(i)); }
};

// The arguments that all decode kernels share.
// query : (batch, lists * group, D)            the query heads of each list
// keys, values : (batch, kv_heads, tokens, D) with strides in elements, rows of D contiguous
// tickets : (batch, lists), zero               output : (batch, lists * group, D) T, or float if output_float32
// lse : (batch, lists * group) or null         partial_output : (batch, lists * group, splits, D)
// partial_statistics : (batch, lists * group, splits)
// earlier_output : (batch, lists * group, D), earlier_lse : (batch, lists * group): merged with the result, or null
// scale_log2 = softmax scale * log2(e)         HEADS = 8 or 16 >= group
// Every token: lists = kv_heads.  Listed tokens: list i belongs to KV head i / lists_per_head.
template <class T>
struct DecodeArguments {
  const T* query;
  const T* keys;
  const T* values;
  void* output;
  float* lse;
  float* partial_output;
  float2* partial_statistics;
  u32* tickets;
  const float* earlier_output;
  const float* earlier_lse;
  u64 key_batch_stride, key_head_stride, key_token_stride, value_batch_stride, value_head_stride, value_token_stride;
  int group;
  float scale_log2;
  int output_float32;
};

template <class T>
__device__ __forceinline__ DecodeTarget target_of(const DecodeArguments<T>& arguments, u64 pair, int head_dim) {
  const u64 row = pair * arguments.group, splits = gridDim.x;
  return {arguments.lse ? arguments.lse + row : nullptr, nullptr, arguments.partial_output + row * splits * head_dim,
          arguments.partial_statistics + row * splits, arguments.tickets + pair,
          arguments.earlier_lse ? arguments.earlier_output + row * head_dim : nullptr,
          arguments.earlier_lse ? arguments.earlier_lse + row : nullptr};
}

template <class T, int D, int HEADS, class Tokens>
__device__ __forceinline__ void attend(const DecodeArguments<T>& arguments, const Tokens& tokens, int kv_head) {
  static_assert(D == 64 || D == 128 || D == 256, "chunks of a row divide evenly among the lanes");
  static_assert(HEADS == 8 || HEADS == 16, "rows of the mma tile");
  static_assert(sizeof(T) == 2, "16-bit tensor core operands");
  constexpr int HALVES = HEADS / 8;
  constexpr int KEY_STEPS = D / 32;      // 16-byte chunks of a token's key per lane
  constexpr int VALUE_STEPS = D / 64;    // 16-byte chunks of a token's value per lane
  constexpr int ROW = D / 8, UNIT = kTile * ROW;   // in chunks

  const int split = blockIdx.x, b = blockIdx.z, splits = gridDim.x, group = arguments.group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int tile = split * kDecodeWarps + warp, entry = 0;
  if constexpr (Tokens::kListed) entry = tokens.entry(tile * kTile + lane % kTile);
  const int length = tokens.count, tiles = (length + kTile - 1) / kTile;
  const int active = active_splits(tiles, kDecodeWarps, splits);
  if (split >= active) return;
  const u64 pair = static_cast<u64>(b) * gridDim.y + blockIdx.y, row = pair * group;

  KVB_DYNAMIC_SHARED(uint4, shared);
  uint4* ring = shared + warp * kRingUnits * UNIT;
  const T* query = arguments.query;
  const T* head_keys = arguments.keys + b * arguments.key_batch_stride + kv_head * arguments.key_head_stride;
  const T* head_values = arguments.values + b * arguments.value_batch_stride + kv_head * arguments.value_head_stride;
  const u64 key_token_stride = arguments.key_token_stride, value_token_stride = arguments.value_token_stride;
  const float scale_log2 = arguments.scale_log2;
  const u64 all_bytes = static_cast<u64>(length) * (4 * D) * gridDim.y * gridDim.z;
  const u64 policy = !Tokens::kListed && all_bytes > kEvictFirstBytes ? plain_policy() : read_once_policy();

  // A operand of S: query head g (and g + 8) as rows, in fragment order; chunk s holds two k-steps of 16.  It stays in
  // shared memory, read again for every tile, so that the accumulators have the registers.
  uint4* staged_query = shared + kDecodeWarps * kRingUnits * UNIT;   // (KEY_STEPS, HALVES, 32)
  constexpr int QUERY_CHUNKS = KEY_STEPS * HALVES, QUERY_LOADS = (QUERY_CHUNKS + kDecodeWarps - 1) / kDecodeWarps;
  uint4 raw_query[QUERY_LOADS];
#pragma unroll
  for (int i = 0; i < QUERY_LOADS; ++i) {
    const int chunk = warp + i * kDecodeWarps, h = g + 8 * (chunk % HALVES);
    raw_query[i] = chunk < QUERY_CHUNKS && h < group
        ? *reinterpret_cast<const uint4*>(query + (row + h) * D + 32 * (chunk / HALVES) + 8 * t)
        : make_uint4(0, 0, 0, 0);
  }

  // Listed tokens: lane i % 16 holds position i of the tile that is copied next, and of the one behind it.
  const int tile_step = active * kDecodeWarps;
  auto listed = [&](int tile) { return tile < tiles ? tokens.token(tile * kTile + lane % kTile) : -1; };
  int token = 0, token_ahead = 0;
  u32 present = 0, present_next = 0;   // which rows of the tile are tokens

  // Copies the 16 rows of a tile.  What is no token is not read: its rows are zero-filled.
  auto copy_rows = [&](const T* from, u64 token_stride, int tile, int slot) {
    if (tile < tiles) {
      constexpr int ROWS = 32 / ROW;   // a warp copies this many rows at a time
      const int row = lane / ROW, chunk = lane % ROW, first = tile * kTile + row;
      uint4* to = ring + slot * UNIT + row * ROW;
      if constexpr (Tokens::kListed) {
#pragma unroll
        for (int r = 0; r < kTile; r += ROWS) {
          const int source = __shfl_sync(0xffffffffu, token, row + r);
          cp_async_16_once(to + r * ROW + (chunk ^ (row + r) % 8), from + max(source, 0) * token_stride + chunk * 8,
                           source >= 0 ? 16 : 0, policy);
        }
      } else {
        const T* source = from + first * token_stride + chunk * 8;
#pragma unroll
        for (int r = 0; r < kTile; r += ROWS)
          cp_async_16_once(to + r * ROW + (chunk ^ (row + r) % 8), source + r * token_stride,
                           first + r < length ? 16 : 0, policy);
      }
    }
    cp_async_commit();
  };
  if constexpr (Tokens::kListed) {
    token = tile < tiles ? tokens.token(tile * kTile + lane % kTile, entry) : -1;
    token_ahead = listed(tile + tile_step);
    present = __ballot_sync(0xffffffffu, token >= 0);
  }
  copy_rows(head_keys, key_token_stride, tile, 0);
  copy_rows(head_values, value_token_stride, tile, 1);
#pragma unroll
  for (int i = 0; i < QUERY_LOADS; ++i)
    if (warp + i * kDecodeWarps < QUERY_CHUNKS) staged_query[(warp + i * kDecodeWarps) * 32 + lane] = raw_query[i];
  __syncthreads();

  float o[4 * VALUE_STEPS][HALVES][4] = {};   // o[4 s + w]: dims 64 s + 8 g + 2 w (+ 1 for [2], [3]), heads 2t, 2t+1
  float reference[HALVES], total[HALVES];     // of head g (+ 8), the same in the four lanes of g
#pragma unroll
  for (int half = 0; half < HALVES; ++half) reference[half] = kNoReference, total[half] = 0.f;

  const int key_row = row_of(g / 2, g % 2, 0);
  int slot = 0;   // of the unit that is read next; the one before it is free
  auto next_unit = [&](const T* from, u64 token_stride, int next) {
    cp_async_wait<1>();
    __syncwarp();   // every lane's copies have landed, and every lane has read the slot that is filled now
    const uint4* unit = ring + slot * UNIT;
    copy_rows(from, token_stride, next, slot == 0 ? kRingUnits - 1 : slot - 1);
    slot = slot + 1 == kRingUnits ? 0 : slot + 1;
    return unit;
  };
  for (int next; tile < tiles; tile = next) {
    next = tile + tile_step;
    if constexpr (Tokens::kListed) {
      token = token_ahead;
      token_ahead = listed(next + tile_step);
      present_next = __ballot_sync(0xffffffffu, token >= 0);
    }

    // ---- keys: logits of 16 tokens ----
    const uint4* unit = next_unit(head_keys, key_token_stride, next) + key_row * ROW;
    const uint4* q = staged_query + lane;
    float logits[2][4] = {};   // logits[j]: head g, tokens row_of(t, 0, j) and row_of(t, 1, j); then head g + 8
#pragma unroll
    for (int s = 0; s < KEY_STEPS; ++s) {
      const uint4 lower = q[s * HALVES * 32];
      const uint4 upper = HALVES == 2 ? q[(s * HALVES + HALVES - 1) * 32] : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint4 k = unit[8 * j * ROW + 8 * (s / 2) + ((4 * (s % 2) + t) ^ key_row % 8)];
        mma_m16n8k16<T>(logits[j], {lower.x, upper.x, lower.y, upper.y}, {k.x, k.y});
        mma_m16n8k16<T>(logits[j], {lower.z, upper.z, lower.w, upper.w}, {k.z, k.w});
      }
    }
    const int first = tile * kTile;
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
          if (Tokens::kListed ? !(present >> row_of(t, e, j) & 1) : first + row_of(t, e, j) >= length)
            logit = -infinity();
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
    unit = next_unit(head_values, value_token_stride, next);
#pragma unroll
    for (int s = 0; s < VALUE_STEPS; ++s) {
      uint4 v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int value_row = row_of(t, j % 2, j / 2);
        v[j] = unit[value_row * ROW + 8 * s + (g ^ value_row % 8)];
      }
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
    present = present_next;
  }

  // ---- one copy of the partial output per warp, over the rings ----
  // No copy is under way: beyond the last tile none starts.
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
  const StoreOutput<T> store = {
      static_cast<char*>(arguments.output) + row * D * (arguments.output_float32 ? sizeof(float) : sizeof(T)),
      arguments.output_float32};
  finish_split<D, kDecodeWarps, HEADS, 32 * kDecodeWarps>(copies, statistics, shared, target_of(arguments, pair, D),
                                                          group, split, splits, active, store);
}

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
  attend<T, D, HEADS>({KVB_DECODE_ARGUMENTS}, EveryToken(lengths, blockIdx.z, tokens), blockIdx.y);
}
template <class T, int D, int HEADS>
__global__ void __launch_bounds__(32 * kDecodeWarps, kResidentBlocks<D, HEADS>)
    attention_sparse_kernel(KVB_DECODE_PARAMETERS(T), KVB_LIST_PARAMETERS) {
  attend<T, D, HEADS>({KVB_DECODE_ARGUMENTS}, KVB_LISTED_TOKENS, blockIdx.y / lists_per_head);
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
