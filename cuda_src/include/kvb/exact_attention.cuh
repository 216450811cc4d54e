// Attention of query heads to tokens of a cache of fp16 or bf16, by tensor cores: what a block does of it, as described
// in cuda_src/attention.cu.  Reference: reference/attention.py.
#pragma once
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
  static constexpr bool kListed = false, kOwn = false;
  int count;
  __device__ __forceinline__ EveryToken(const int* lengths, int b, int tokens)
      : count(lengths ? min(max(lengths[b], 0), tokens) : tokens) {}
  __device__ __forceinline__ int token(int i) const { return i < count ? i : -1; }
};

// The slots of the list, which counts from slot `first`, then the first `leading`.  Entries outside the sequence are no
// token: -1.  An entry is asked for before it is known whether the list is that long: three loads would else wait for
// each other, counts, entries and rows.
struct ListedTokens {
  static constexpr bool kListed = true, kOwn = false;
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

// Tokens of this block alone, of which there are none beyond `count`: the `listed` slots of a list in shared or global
// memory, which count from slot `first`, then those from `slot` on.
struct OwnTokens {
  static constexpr bool kListed = true, kOwn = true;
  const int* list;
  int first, listed, slot, count;
  __device__ __forceinline__ int entry(int i) const { return i < listed ? list[i] : -1; }
  __device__ __forceinline__ int token(int i, int entry) const {
    return i < listed ? first + entry : i < count ? slot + i - listed : -1;
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

// Query heads as operands of S: head g (and g + 8) as rows, in fragment order; chunk s holds two k-steps of 16.  They
// stay in shared memory, (D / 32, HEADS / 8, 32), and are read again for every tile: accumulators have the registers.
// query : (group, D), of a list
template <class T, int D, int HEADS, int WARPS>
struct QueryOperands {
  static constexpr int HALVES = HEADS / 8, CHUNKS = D / 32 * HALVES, LOADS = (CHUNKS + WARPS - 1) / WARPS;
  static constexpr int BYTES = CHUNKS * 32 * 16;
  uint4 raw[LOADS];

  // Begins to load them, and stores them.
  __device__ __forceinline__ void load(const T* query, int group) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int chunk = warp + i * WARPS, h = g + 8 * (chunk % HALVES);
      raw[i] = chunk < CHUNKS && h < group
          ? *reinterpret_cast<const uint4*>(query + h * D + 32 * (chunk / HALVES) + 8 * t)
          : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void store(uint4* staged) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (warp + i * WARPS < CHUNKS) staged[(warp + i * WARPS) * 32 + lane] = raw[i];
  }
  // Both, asynchronously.
  static __device__ __forceinline__ void stage(uint4* staged, const T* query, int group) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int chunk = warp; chunk < CHUNKS; chunk += WARPS) {
      const int h = lane / 4 + 8 * (chunk % HALVES);
      cp_async_16(staged + chunk * 32 + lane,
                  query + min(h, group - 1) * D + 32 * (chunk / HALVES) + 8 * (lane % 4), h < group);
    }
  }
};
// Bytes of shared memory: rings of tiles, and the queries.
template <class T, int D, int WARPS>
constexpr int kRingBytes = WARPS * kRingUnits * kTile * D * static_cast<int>(sizeof(T));

// Attention of a block to its tokens, and the merge with other blocks'.  Returns, for the whole block, whether it was
// the last of its list to get there.
// shared : kRingBytes, and the queries, or what the merge needs, if that is more
// staged : the queries, if they lie elsewhere and are there; OwnTokens alone        place : of this thread
template <class T, int D, int HEADS, int WARPS, class Tokens>
__device__ __forceinline__ bool attend(const DecodeArguments<T>& arguments, const Tokens& tokens, int kv_head,
                                       uint4* shared, const uint4* staged, const ThreadPlace& place) {
  static_assert(D == 64 || D == 128 || D == 256, "chunks of a row divide evenly among the lanes");
  static_assert(HEADS == 8 || HEADS == 16, "rows of the mma tile");
  static_assert(sizeof(T) == 2, "16-bit tensor core operands");
  constexpr int HALVES = HEADS / 8;
  constexpr int KEY_STEPS = D / 32;      // 16-byte chunks of a token's key per lane
  constexpr int VALUE_STEPS = D / 64;    // 16-byte chunks of a token's value per lane
  constexpr int ROW = D / 8, UNIT = kTile * ROW;   // in chunks

  const int split = place.x, b = place.z, splits = gridDim.x, group = arguments.group;
  const int warp = place.thread / 32, lane = place.thread % 32, g = lane / 4, t = lane % 4;
  int tile = Tokens::kOwn ? warp : split * WARPS + warp, entry = 0;
  if constexpr (Tokens::kListed) entry = tokens.entry(tile * kTile + lane % kTile);
  const int length = tokens.count, tiles = (length + kTile - 1) / kTile;
  const int active = Tokens::kOwn ? splits : active_splits(tiles, WARPS, splits);
  if (split >= active) return false;
  const u32 pair = place.z * gridDim.y + place.y;
  const u64 row = static_cast<u64>(pair) * group;

  uint4* ring = shared + warp * kRingUnits * UNIT;
  // The same for the copies, in a register of each lane: where a uniform register holds a part of the shared address,
  // ptxas 13.0 may write cp.async with a cache hint in a form that the GPU refuses; tests/test_compile.py looks for it.
  const int filled = Tokens::kOwn ? pinned(warp * kRingUnits * UNIT) : warp * kRingUnits * UNIT;
  const T* head_keys = arguments.keys + b * arguments.key_batch_stride + kv_head * arguments.key_head_stride;
  const T* head_values = arguments.values + b * arguments.value_batch_stride + kv_head * arguments.value_head_stride;
  const u64 key_token_stride = arguments.key_token_stride, value_token_stride = arguments.value_token_stride;
  const float scale_log2 = arguments.scale_log2;
  const u64 all_bytes = static_cast<u64>(length) * (4 * D) * gridDim.y * gridDim.z;
  const u64 policy = !Tokens::kListed && all_bytes > kEvictFirstBytes ? plain_policy() : read_once_policy();

  using Operands = QueryOperands<T, D, HEADS, WARPS>;
  uint4* const queries = shared + WARPS * kRingUnits * UNIT;
  const uint4* const staged_query = Tokens::kOwn ? staged : queries;
  Operands operands;
  if constexpr (!Tokens::kOwn) operands.load(arguments.query + row * D, group);

  // Listed tokens: lane i % 16 holds position i of the tile that is copied next, and of the one behind it.
  const int tile_step = Tokens::kOwn ? WARPS : active * WARPS;
  auto listed = [&](int tile) { return tile < tiles ? tokens.token(tile * kTile + lane % kTile) : -1; };
  int token = 0, token_ahead = 0;
  u32 present = 0, present_next = 0;   // which rows of the tile are tokens

  // Copies the 16 rows of a tile.  What is no token is not read: its rows are zero-filled.
  auto copy_rows = [&](const T* from, u64 token_stride, int tile, int slot) {
    if (tile < tiles) {
      constexpr int ROWS = 32 / ROW;   // a warp copies this many rows at a time
      const int row = lane / ROW, chunk = lane % ROW, first = tile * kTile + row;
      uint4* to = shared + filled + slot * UNIT + row * ROW;
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
    if (!Tokens::kOwn) token_ahead = listed(tile + tile_step);
    present = __ballot_sync(0xffffffffu, token >= 0);
  }
  copy_rows(head_keys, key_token_stride, tile, 0);
  copy_rows(head_values, value_token_stride, tile, 1);
  if constexpr (!Tokens::kOwn) {
    operands.store(queries);
    __syncthreads();
  }

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
      token = Tokens::kOwn ? listed(next) : token_ahead;
      if (!Tokens::kOwn) token_ahead = listed(next + tile_step);
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
          const int position = row_of(t, e, j);
          if (Tokens::kListed ? !(present >> position & 1) : first + position >= length)
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
  float2* statistics = reinterpret_cast<float2*>(copies + WARPS * HEADS * D);           // (warps, HEADS)
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    if (t == 0) statistics[warp * HEADS + 8 * half + g] = make_float2(reference[half], total[half]);
    if (8 * half + 2 * t >= group) continue;
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
  // Of 16 splits, for up to four query heads of 128, each of four threads has four.
  constexpr int BATCH = Tokens::kOwn ? 4 : 8;
  return finish_split<D, WARPS, HEADS, 32 * WARPS, BATCH>(copies, statistics, shared, target_of(arguments, pair, D),
                                                          group, split, splits, active, store);
}

}  // namespace kvb
