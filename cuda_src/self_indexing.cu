// Self-Indexing: keys to signs and 2-bit magnitudes, scores by look-up of signs, attention to what they select.
// Reference: reference/self_indexing.py, which says where the bits of a code lie, and why.
//
// self_indexing_score_kernel
//   Computes  score[t] = sum_g L[g, code[t, g]] for one table (the mean query of a KV head) or up to four (single
//             heads) from one read of the signs; each block makes the tables of query and codebook for itself.
//   Work      Grid (splits, kv_heads * parts, batch); a block has consecutive tokens, a lane two of them at a time
//             (one at D = 256 with four tables); the words of its next ones are under way meanwhile, 32 KB a
//             multiprocessor at D = 128, those of the first while the tables are made.
//   Tables    [group][code][table] in shared memory.  All lanes look the same group up, whose 16 entries are in 16
//             banks (of four tables: in 64 words, two passes of 32): no two different ones meet.  Centroids are copied
//             asynchronously while the query is summed.
//   Bytes     D / 8 read and 4 written per token and table: at D = 128 20 bytes, 21 MB for 8 heads of 128K tokens,
//             7.1 us at 2.97 TB/s.
//   Counts    Per 8 groups of a token: 2 shifts, 2 LOP3, 8 PRMT, 8 LDS, 8 FADD: 28 instructions, 112 at D = 128, and
//             13 for loop, load and store: 125 a warp, of 32 tokens, in the machine code for sm_90.  8 heads of 128K
//             tokens are 4.1 M warp instructions, 31 K a multiprocessor: 7,800 cycles at four a cycle; its 7,944 LDS
//             take as many cycles, 4.6 us at 1.7 GHz, and 48 operations of the integer pipe a warp 6,000.
//   Before    Offsets by shifts and masks: the compiler added the place of the group by a third operation, three where
//             PRMT, whose result it knows nothing of, leaves it to LDS; one token a lane and one under way: 17.0 us at
//             128K tokens on an H100 with a cold cache, 11.9 with a warm one; now 13.7 and 8.6.
//   Tried     Words as the first to leave the L2 cache: 14.4 and 9.6 us.  Eight tokens a lane under way, in shared
//             memory: 15.6 and 9.4, as the first to leave 15.1 and 10.0.
//   Excluded  Positions of tokens that stay exact are overwritten by -inf at the end, by the block that has them.
//
// self_indexing_tables_kernel: the tables alone.
//
// self_indexing_top_k_kernel
//   Computes  the k tokens of a KV head with the largest scores, in one launch: a block has the scores of its tokens in
//             shared memory, and nothing of them is written but those that it lists (kvb/top_k.cuh).
//   Work      Grid (parts, kv_heads, batch), 512 threads, one block to a multiprocessor; a lane has 512 / D tokens at a
//             time and as many under way: 32 KB a multiprocessor, as above.
//   Bytes     D / 8 per token: at D = 128 16.8 MB for 8 heads of 128K tokens, 5.5 us at 3.05 TB/s.
//   Counts    125 instructions of look-up and 15 to count a score by bins, per 32 tokens of 128: 5.1 us of issue slots
//             for these 8 heads at 1.97 GHz, and 5.6 measured for the loop.  Of 18.1 by ncu, 96 tokens chosen, 2 pass
//             until blocks run, 1.8 until query and codebook have come from memory, 3 until a part has listed its own,
//             and the rest is the last block's.
//   Before    Scores in memory, a histogram of them, and a collection: 10.6, 5.0 and 16.8 us; with 4 launches a step of
//             a cache with 128K tokens took 41.3 us on an H100 with a cold cache.  Top-k of scores in memory in one
//             launch, the merge by digits: 36.2; scores and Top-k in one: 35.3; the merge by the same code as parts:
//             31.7; its lists counted by four lanes an entry: 30.5; attention that begins early: 29.0; fewer shuffles
//             at its end, and positions asked for with their number: 28.1; signs and query asked for
//             before the length is known, and two barriers fewer: 27.1.
//
// self_indexing_encode_kernel
//   Work      D / 8 lanes share a token, 8 channels each: one load of 16 bytes for 16-bit keys.  mu and 1 / alpha of
//             its channels stay in the registers of a lane.  Four lanes share a group of 32 channels and find its range
//             by two shuffles; lanes with the same place in their group put their fields of a code word together, by
//             two more for each of two words (one word, one shuffle at D = 64).
//   Codes     (a - m) / s is compared with 1/2, 3/2 and 5/2 without the division, exactly (claim "operands").  A
//             comparison is the sign of a difference, and one funnel shift appends that bit to a word.
//   Bytes     D sizeof(T) read and D / 2 written per token: 320 at D = 128, fp16.
//   Counts    275 instructions a warp for 2 tokens of 128, fp16, in the machine code for sm_90, some 125 of them on the
//             integer pipe, which takes two cycles for each.  8 heads of 32K tokens: 273 K a multiprocessor, 68 K
//             cycles at four a cycle, 40 us at 1.7 GHz, where the bytes take 28: bound by issue slots.
//   Before    Codes by comparisons and selections, 325 instructions, some 180 of them on the integer pipe: 58.6 us for
//             8 heads of 32K tokens on an H100 with a cold cache; now 51.6, and 47.5 with a warm one.
//
// self_indexing_attention_kernel
//   Computes  one softmax over listed tokens, dequantised, and over exact ones (sinks and tail), for up to HEADS query
//             heads of a KV head: 8, 4 and 2 for D = 64, 128 and 256.  A larger group takes several blocks, which read
//             the same tokens (from L2, most of them).
//   Early     The launch may begin while the kernel that selects still runs: what does not hang on the selection, the
//             query and the exact rows of a block's first tile, is made ready meanwhile.
//   Work      The first entries are exact, the others listed.  A tile is 32 entries, one for each 8 lanes of the
//             block's 8 warps.  Lane g of 8 has channels 32 u + 4 g ... + 3 of its token for all u: of codes the words
//             that reference/kivi.py gives it, of signs a nibble of every word.
//   Logits    alpha is folded into a second copy of the query, in shared memory; 8 lanes add up by three shuffles.
//   Softmax   Online, base 2, for every 8 lanes on their own; the reference is raised to 8 above a logit above it.
//   Bytes     D/8 + D/4 + D/8 of keys, D BITS/8 + D/8 of values per listed token, in sectors of 32 bytes 224 at D = 128
//             and 2 bits; 4 D per exact token in 16 bits.
//   Counts    Per 4 listed tokens, D = 128, 2 bits, 4 heads, a warp: 16 loads, 160 to dequantise, 16 LDS, 64 FFMA and
//             12 shuffles for logits, 64 FFMA for outputs, some 60 for softmax: 400.  10K tokens (7.5 % of 128K) x 8
//             heads: 8.2 M, 15 us at 2.4 a cycle and multiprocessor; the 160 of the smallest budget are bound by
//             latency.
//   Before    Entries asked for after the query was ready, exact rows by 32 channels, one load waiting for the other,
//             their values after the softmax: 9.3 us by ncu with 96 listed and 192 exact tokens.  Sums of four tokens
//             by two shuffles of every output: 9.4 us; each lane handing half of them on, and then a quarter: 9.0.
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/splits.cuh"
#include "kvb/top_k.cuh"

namespace kvb {

constexpr int kCodes = 16, kSelfIndexingThreads = 256, kSelfIndexingWarps = kSelfIndexingThreads / 32;
// Blocks that share a multiprocessor: registers allow them.
template <int TABLES>
constexpr int kScoreBlocks = TABLES == 1 ? 4 : 3;
// Tokens of a lane at a time, and as many under way, likewise.
template <int D, int TABLES>
constexpr int kScoreTokens = D == 256 && TABLES == 4 ? 1 : 2;

// ---- scores ---------------------------------------------------------------------------------------------------------

// The words of `count` consecutive u32, aligned to all of them or to 16 bytes.
template <int COUNT>
__device__ __forceinline__ void load_words(u32 (&words)[COUNT], const u32* from) {
  static_assert(COUNT == 1 || COUNT == 2 || COUNT % 4 == 0, "whole loads");
  if constexpr (COUNT == 1) {
    words[0] = load_once(from);
  } else if constexpr (COUNT == 2) {
    const uint2 pair = load_once(reinterpret_cast<const uint2*>(from));
    words[0] = pair.x, words[1] = pair.y;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const uint4 four = load_once(reinterpret_cast<const uint4*>(from + i));
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  }
}

// x[0] + x[stride] + ... + x[(count - 1) stride]; four loads are under way at a time.
template <class T>
__device__ __forceinline__ float sum_of_rows(const T* x, int stride, int count) {
  float total = 0.f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) total += to_float(x[i * stride]);
  return total;
}

// table (D / 4, 16, TABLES) <- <codebook (D / 4, 16, 4), q>, q (TABLES, D) <- factor * the sum of `shared` query rows
// each.  Rows from `rows` on count as zeros.  Calls meanwhile() while centroids are on their way.  Ends with a barrier.
template <int D, int TABLES, int THREADS, class Meanwhile>
__device__ __forceinline__ void stage_tables(float* table, float* q, const void* __restrict__ query, int query_type,
                                             u64 first_row, int rows, int shared,
                                             const float* __restrict__ codebook, float factor,
                                             const Meanwhile& meanwhile) {
  constexpr int ENTRIES = D / 4 * kCodes;
  KVB_SHARED(float4, centroids, [ENTRIES]);   // on their way while the query is summed
#pragma unroll
  for (int i = 0; i < ENTRIES; i += THREADS)
    if (ENTRIES % THREADS == 0 || i + threadIdx.x < ENTRIES)
      cp_async_16(centroids + i + threadIdx.x, codebook + (i + threadIdx.x) * 4);
  cp_async_commit();
  meanwhile();
  for (int i = threadIdx.x; i < TABLES * D; i += THREADS) {
    const int first = i / D * shared, count = min(first + shared, rows) - first;
    const u64 from = (first_row + first) * D + i % D;
    const float total = query_type == 0   ? sum_of_rows(static_cast<const float*>(query) + from, D, count)
                        : query_type == 1 ? sum_of_rows(static_cast<const __half*>(query) + from, D, count)
                                          : sum_of_rows(static_cast<const __nv_bfloat16*>(query) + from, D, count);
    q[i] = total * factor;
  }
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ENTRIES; i += THREADS) {
    const int entry = i + threadIdx.x;
    if (ENTRIES % THREADS != 0 && entry >= ENTRIES) break;
    const float4 centroid = centroids[entry];
#pragma unroll
    for (int k = 0; k < TABLES; ++k) {
      const float4 part = *reinterpret_cast<const float4*>(q + k * D + entry / kCodes * 4);
      table[entry * TABLES + k] =
          fmaf(centroid.w, part.w, fmaf(centroid.z, part.z, fmaf(centroid.y, part.y, centroid.x * part.x)));
    }
  }
  __syncthreads();
}

// query : (batch, kv_heads * group, D), type 0 float, 1 fp16, 2 bf16      codebook : (batch, kv_heads, D / 4, 16, 4)
// tables : (batch, kv_heads * own, D / 4, 16)                             factor = scale * own / group
template <int D>
__global__ void __launch_bounds__(kSelfIndexingThreads)
    self_indexing_tables_kernel(const void* __restrict__ query, int query_type, const float* __restrict__ codebook,
                                float* __restrict__ tables, int group, int own, float factor) {
  constexpr int ENTRIES = D / 4 * kCodes;
  KVB_SHARED(float, table, [ENTRIES]);
  KVB_SHARED(float, q, [D]);
  const int shared = group / own, kv_heads = gridDim.x / own;
  const u64 row = static_cast<u64>(blockIdx.y) * gridDim.x + blockIdx.x;
  const u64 pair = static_cast<u64>(blockIdx.y) * kv_heads + blockIdx.x / own;
  stage_tables<D, 1, kSelfIndexingThreads>(table, q, query, query_type, row * shared, shared, shared,
                                           codebook + pair * ENTRIES * 4, factor, [] {});
  for (int i = threadIdx.x; i < ENTRIES; i += kSelfIndexingThreads) tables[row * ENTRIES + i] = table[i];
}

// sum[a][0][k] + sum[a][1][k] += what the tables have for all groups of a token, whose signs are words[a].
// entries : shared (groups, 16, TABLES) float
template <int TOKENS, int WORDS, int TABLES>
__device__ __forceinline__ void look_up(float (&sum)[TOKENS][2][TABLES], const u32 (&words)[TOKENS][WORDS],
                                        const char* entries) {
#pragma unroll
  for (int w = 0; w < WORDS; ++w)
#pragma unroll
    for (int a = 0; a < TOKENS; ++a) {
      // Byte offsets of the entries of four even and four odd groups.
      const u32 word = words[a][w];
      const u32 even = TABLES == 1 ? word << 2 & 0x3c3c3c3cu : word << 4 & 0xf0f0f0f0u;
      const u32 odd = TABLES == 1 ? word >> 2 & 0x3c3c3c3cu : word & 0xf0f0f0f0u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const char* entry = entries + (8 * w + 2 * i) * (kCodes * TABLES * 4);
        const char* low = entry + permute_bytes(even, 0, 0x4440 + i);      // byte i
        const char* high = entry + kCodes * TABLES * 4 + permute_bytes(odd, 0, 0x4440 + i);
        if constexpr (TABLES == 1) {
          sum[a][0][0] += *reinterpret_cast<const float*>(low);
          sum[a][1][0] += *reinterpret_cast<const float*>(high);
        } else {
          const float4 x = *reinterpret_cast<const float4*>(low), y = *reinterpret_cast<const float4*>(high);
          sum[a][0][0] += x.x, sum[a][0][1] += x.y, sum[a][0][2] += x.z, sum[a][0][3] += x.w;
          sum[a][1][0] += y.x, sum[a][1][1] += y.y, sum[a][1][2] += y.z, sum[a][1][3] += y.w;
        }
      }
    }
}

// sign : (batch, kv_heads, tokens, D / 32), strides in tokens       lengths : (batch,) or null for `tokens`
// excluded : (batch, kv_heads, positions) or null                   scores : (batch, kv_heads * own, tokens)
// Other arguments as above.
template <int D, int TABLES>
__global__ void __launch_bounds__(kSelfIndexingThreads, kScoreBlocks<TABLES>)
    self_indexing_score_kernel(const void* __restrict__ query, int query_type, const u32* __restrict__ sign,
                               u64 batch_stride, u64 head_stride, const float* __restrict__ codebook,
                               const int* __restrict__ lengths, const int* __restrict__ excluded, int positions,
                               float* scores, int tokens, int group, int own, float factor) {
  static_assert(TABLES == 1 || TABLES == 4, "entries of 4 or 16 bytes");
  constexpr int WORDS = D / 32, ENTRIES = D / 4 * kCodes, TOKENS = kScoreTokens<D, TABLES>;
  KVB_SHARED(float, table, [ENTRIES * TABLES]);
  KVB_SHARED(float, q, [TABLES * D]);

  const int parts = (own + TABLES - 1) / TABLES, part = blockIdx.y % parts;   // of the tables of the KV head
  const int kv_head = blockIdx.y / parts, kv_heads = gridDim.y / parts, b = blockIdx.z;
  const int used = min(TABLES, own - part * TABLES), shared = group / own;
  const u64 pair = static_cast<u64>(b) * kv_heads + kv_head;
  const int length = lengths ? min(max(lengths[b], 0), tokens) : tokens;
  const int rounds = (tokens + gridDim.x * kSelfIndexingThreads - 1) / (gridDim.x * kSelfIndexingThreads);
  const int first = blockIdx.x * rounds * kSelfIndexingThreads;
  const int last = min(first + rounds * kSelfIndexingThreads, tokens);
  if (first >= tokens) return;

  const u32* rows = sign + (b * batch_stride + kv_head * head_stride) * WORDS;
  u32 words[TOKENS][WORDS] = {}, next[TOKENS][WORDS] = {};
  auto load = [&](u32(&to)[TOKENS][WORDS], int token) {
#pragma unroll
    for (int i = 0; i < TOKENS; ++i)
      if (token + i * kSelfIndexingThreads < last)   // the length is not known yet
        load_words(to[i], rows + static_cast<u64>(token + i * kSelfIndexingThreads) * WORDS);
  };
  int t = first + threadIdx.x;
  load(words, t);
  const int row = part * TABLES * shared;   // of the query heads of the KV head
  stage_tables<D, TABLES, kSelfIndexingThreads>(table, q, query, query_type, pair * group + row, used * shared, shared,
                                                codebook + pair * ENTRIES * 4, factor, [] {});

  float* out = scores + (pair * own + part * TABLES) * tokens;
  const char* entries = reinterpret_cast<const char*>(table);
  for (; t < last; t += TOKENS * kSelfIndexingThreads) {
    load(next, t + TOKENS * kSelfIndexingThreads);
    float sum[TOKENS][2][TABLES] = {};
    look_up(sum, words, entries);
#pragma unroll
    for (int a = 0; a < TOKENS; ++a) {
      const int token = t + a * kSelfIndexingThreads;
#pragma unroll
      for (int k = 0; k < TABLES; ++k)
        if (k < used && token < last)
          out[static_cast<u64>(k) * tokens + token] = token < length ? sum[a][0][k] + sum[a][1][k] : -infinity();
#pragma unroll
      for (int w = 0; w < WORDS; ++w) words[a][w] = next[a][w];
    }
  }
  if (!excluded) return;
  __syncthreads();   // the scores of the block's tokens are written
  for (int i = threadIdx.x; i < positions * used; i += kSelfIndexingThreads) {
    const int position = excluded[pair * positions + i % positions];
    if (position >= first && position < last)
      out[static_cast<u64>(i / positions) * tokens + position] = -infinity();
  }
}

// The k tokens with the largest scores, of the mean query of a KV head: scores and Top-k (kvb/top_k.cuh) in one launch.
// span : tokens of a block, a multiple of 32       tickets ... room : there; a row is a KV head
// Other arguments as above.
template <int D>
__global__ void __launch_bounds__(selection::kThreads, 1)
    self_indexing_top_k_kernel(const void* __restrict__ query, int query_type, const u32* __restrict__ sign,
                               u64 batch_stride, u64 head_stride, const float* __restrict__ codebook,
                               const int* __restrict__ lengths, int tokens, int group, float factor, int span,
                               u32* tickets, selection::TopKPart* parts, selection::Entry* entries, int* indices,
                               int* counts, float* mass, int k, int capacity, int places, int room) {
  using namespace selection;
  constexpr int WORDS = D / 32, ENTRIES = D / 4 * kCodes, TOKENS = 512 / D;
  KVB_SHARED(float, q, [D]);
  KVB_SHARED(float, table, [ENTRIES]);
  KVB_DYNAMIC_SHARED(char, shared);
  TopKMemory& memory = *reinterpret_cast<TopKMemory*>(shared);
  float* const logits = reinterpret_cast<float*>(shared + sizeof(TopKMemory));   // (span,)
  const int b = blockIdx.z, kv_head = blockIdx.y, kv_heads = gridDim.y;
  const u64 pair = static_cast<u64>(b) * kv_heads + kv_head;
  const int length = lengths ? min(max(lengths[b], 0), tokens) : tokens;
  const int first = blockIdx.x * span, size = max(min(span, length - first), 0), stored = min(span, tokens - first);

  const u32* rows = sign + (b * batch_stride + kv_head * head_stride + first) * WORDS;
  u32 words[TOKENS][WORDS] = {}, next[TOKENS][WORDS] = {};
  auto load = [&](u32(&to)[TOKENS][WORDS], int at) {
#pragma unroll
    for (int i = 0; i < TOKENS; ++i)
      if (at + i * kThreads < stored) load_words(to[i], rows + static_cast<u64>(at + i * kThreads) * WORDS);
  };
  int at = threadIdx.x;
  load(words, at);   // of the store, whose length is not known yet
  let_next_start();
  stage_tables<D, 1, kThreads>(table, q, query, query_type, pair * group, group, group, codebook + pair * ENTRIES * 4,
                               factor, [&] { start_top_k(memory); });
  TopKCounts found;
#pragma unroll 1
  for (; at < size; at += TOKENS * kThreads) {
    load(next, at + TOKENS * kThreads);
    float sum[TOKENS][2][1] = {};
    look_up(sum, words, reinterpret_cast<const char*>(table));
#pragma unroll
    for (int a = 0; a < TOKENS; ++a) {
      if (at + a * kThreads < size) found.add(memory, logits, at + a * kThreads, sum[a][0][0] + sum[a][1][0]);
#pragma unroll
      for (int w = 0; w < WORDS; ++w) words[a][w] = next[a][w];
    }
  }
  choose_top_k(memory, found, {logits, nullptr, first, size},
               {tickets, parts, entries, indices, counts, mass, k, capacity, places, room, tokens});
}

// ---- encode ---------------------------------------------------------------------------------------------------------

// x : (batch, kv_heads, tokens, D), strides in elements               mean, channel_scale : (batch, kv_heads, D)
// sign (.., D / 32), codes (.., D / 16), scale, minimum (.., D / 32) of (batch, kv_heads, tokens), strides in tokens
template <class T, int D>
__global__ void __launch_bounds__(kSelfIndexingThreads)
    self_indexing_encode_kernel(const T* __restrict__ x, u64 x_batch_stride, u64 x_head_stride, u64 x_token_stride,
                                const float* __restrict__ mean, const float* __restrict__ channel_scale, u32* sign,
                                u32* codes, __half* scale, __half* minimum, u64 batch_stride, u64 head_stride,
                                int tokens) {
  static_assert(D == 64 || D == 128 || D == 256, "8 channels a lane, and a token within a warp");
  constexpr int LANES = D / 8, PER_WARP = 32 / LANES, CHUNKS = 8 / kChunk<T>, GROUPS = D / 32;
  const int kv_head = blockIdx.y, b = blockIdx.z, kv_heads = gridDim.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, j = lane % LANES;   // channels 8 j ... 8 j + 7
  const int u = j / 4, quarter = j % 4;                                           // of group u
  const u64 pair = static_cast<u64>(b) * kv_heads + kv_head;
  float minus_mu[8], inverse[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    minus_mu[e] = 0.f - mean[pair * D + 8 * j + e];   // never -0, so neither is x - mu
    inverse[e] = __fdiv_rn(1.f, channel_scale[pair * D + 8 * j + e]);
  }
  const T* keys = x + b * x_batch_stride + kv_head * x_head_stride + 8 * j;
  const u64 place = b * batch_stride + kv_head * head_stride;
  u8* const sign_bytes = reinterpret_cast<u8*>(sign);

  const int step_tokens = gridDim.x * kSelfIndexingWarps * PER_WARP;
  int t = (blockIdx.x * kSelfIndexingWarps + warp) * PER_WARP + lane / LANES;
  uint4 chunk[CHUNKS], next[CHUNKS];
  auto load = [&](uint4(&to)[CHUNKS], int token) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      to[c] = token < tokens ? load_once(reinterpret_cast<const uint4*>(keys + token * x_token_stride + c * kChunk<T>))
                             : make_uint4(0, 0, 0, 0);
  };
  load(chunk, t);
  for (; t - lane / LANES < tokens; t += step_tokens) {   // the whole warp: lanes of one token need each other
    load(next, t + step_tokens);
    float a[8];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) unpack_chunk<T>(chunk[c], a + c * kChunk<T>);
    float zero = 0.f;                                     // NaN if a channel is not finite
    u32 negative = 0;
#pragma unroll
    for (int e = 7; e >= 0; --e) {
      const float centred = a[e] + minus_mu[e];
      zero = fmaf(centred, 0.f, zero);
      negative = __funnelshift_l(__float_as_uint(centred), negative, 1);
      a[e] = fminf(fabsf(centred) * inverse[e], 65504.f);
    }
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const float2 rounded = unpack_pair<__half>(pack_pair<__half>(a[e], a[e + 1]));
      a[e] = rounded.x, a[e + 1] = rounded.y;
    }
    u32 others = __ballot_sync(0xffffffffu, zero != 0.f);
    if (others) {
      if constexpr (LANES < 32) others = others >> lane / LANES * LANES & ((1u << LANES) - 1);
#pragma unroll
      for (int e = 0; e < 8; ++e) a[e] = others ? 0.f : a[e];
    }
    float low = a[0], high = a[0];
#pragma unroll
    for (int e = 1; e < 8; ++e) low = fminf(low, a[e]), high = fmaxf(high, a[e]);
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      low = fminf(low, __shfl_xor_sync(0xffffffffu, low, distance));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, distance));
    }
    const __half stored = __float2half_rn(__fdiv_rn(high - low, 3.f));
    const float s = __half2float(stored);
    const float unit = s > 0.f ? s : infinity();
    const float first = 0.5f * unit, second = 1.5f * unit, third = 2.5f * unit;
    u32 fields[2];   // of channels 4 k ... 4 k + 3: the even ones, and from bit 16 on the odd ones
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      u32 above = 0, below = 0, far_above = 0;            // sign bits at bits 1, 3, 17 and 19, and others between them
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = i == 0 ? 3 : i == 1 ? 1 : i == 2 ? 2 : 0, step = i == 1 ? 14 : 2;
        const float y = a[4 * k + e] - low;
        above = __funnelshift_l(__float_as_uint(first - y), above, step);
        below = __funnelshift_l(__float_as_uint(y - second), below, step);
        far_above = __funnelshift_l(__float_as_uint(third - y), far_above, step);
      }
      // 0, 1, 2 or 3 of the three: the second tells the upper bit, their parity the lower one.
      fields[k] = (~below & 0x000a000au) | (above ^ ~below ^ far_above) >> 1 & 0x00050005u;
    }
    const u64 row = place + t;
    const bool present = t < tokens;
    if constexpr (D == 64) {
      u32 word = fields[0] << 4 * u | fields[1] << (4 * u + 8);
      word |= __shfl_xor_sync(0xffffffffu, word, 4);
      if (present && u == 0) codes[row * (D / 16) + quarter] = word;
    } else {
      u32 word[2] = {fields[0] << 4 * (u % 4), fields[1] << 4 * (u % 4)};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        word[k] |= __shfl_xor_sync(0xffffffffu, word[k], 4);
        word[k] |= __shfl_xor_sync(0xffffffffu, word[k], 8);
      }
      if (present && u % 4 == 0) {
        constexpr int APART = D / 128;   // words from one eighth of the channels to the next
        u32* to = codes + row * (D / 16) + 2 * APART * quarter + u / 4;
        to[0] = word[0];
        to[APART] = word[1];
      }
    }
    if (present) {
      sign_bytes[row * (D / 8) + j] = static_cast<u8>(others ? 0 : ~negative);
      if (quarter == 0) {
        scale[row * GROUPS + u] = stored;
        minimum[row * GROUPS + u] = __float2half_rn(low);
      }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) chunk[c] = next[c];
  }
}

// ---- attention ------------------------------------------------------------------------------------------------------

// The code words of one of 8 lanes, of rows of D numbers of BITS bits (reference/kivi.py): field m = 2 u + v of the
// lane has channels 32 u + 4 g + 2 v in its lower half and + 1 in its upper half.
template <int D, int BITS>
struct LaneCodes {
  static constexpr int FIELDS = 16 / BITS, WORDS = D * BITS >= 256 ? D * BITS / 256 : 1, ROW = D * BITS / 32;
  u32 words[WORDS];
  __device__ __forceinline__ void load(const u32* codes, u64 token, int g) {
    if constexpr (D * BITS >= 256) {
      load_words(words, codes + token * ROW + g * WORDS);
    } else {   // two lanes share a word
      load_words(words, codes + token * ROW + g / 2);
      words[0] >>= g % 2 * 8;
    }
  }
  // Channel 32 u + 4 g + e as a number.
  __device__ __forceinline__ float operator()(int u, int e) const {
    const int m = 2 * u + e / 2;
    const u32 code = words[m / FIELDS] >> (BITS * (m % FIELDS) + e % 2 * 16) & ((1u << BITS) - 1);
    return __uint_as_float(0x4b000000u | code) - 8388608.f;
  }
};

// The D / 32 scales of a token, or its minima.
template <int D>
struct GroupHalves {
  u32 words[D / 64];
  __device__ __forceinline__ void load(const __half* from, u64 token) {
    load_words(words, reinterpret_cast<const u32*>(from) + token * (D / 64));
  }
  __device__ __forceinline__ float operator[](int u) const {
    const float2 pair = unpack_pair<__half>(words[u / 2]);
    return u % 2 ? pair.y : pair.x;
  }
};

// Channels 32 u + 4 g ... + 3 of an exact row, for a lane g of 8: as they are in memory, so that all loads are under
// way before the first is waited for.
template <int D>
struct ExactRow {
  uint4 words[D / 32];
  // type 0 float, 1 fp16, 2 bf16; four channels are aligned to all of them
  __device__ __forceinline__ void load(const void* x, int type, u64 index) {
    if (type == 0) {
#pragma unroll
      for (int u = 0; u < D / 32; ++u)
        words[u] = *reinterpret_cast<const uint4*>(static_cast<const float*>(x) + index + 32 * u);
    } else {
#pragma unroll
      for (int u = 0; u < D / 32; ++u) {
        const uint2 four = *reinterpret_cast<const uint2*>(static_cast<const u16*>(x) + index + 32 * u);
        words[u].x = four.x, words[u].y = four.y;
      }
    }
  }
  __device__ __forceinline__ float4 operator()(int u, int type) const {
    const uint4& four = words[u];
    if (type == 0)
      return make_float4(__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                         __uint_as_float(four.w));
    const float2 low = type == 1 ? unpack_pair<__half>(four.x) : unpack_pair<__nv_bfloat16>(four.x);
    const float2 high = type == 1 ? unpack_pair<__half>(four.y) : unpack_pair<__nv_bfloat16>(four.y);
    return make_float4(low.x, low.y, high.x, high.y);
  }
};

template <int D>
constexpr int kSparseHeads = 512 / D;   // query heads of a block: their outputs are 64 registers of a lane
constexpr float kSparseGap = 8.f;

// query : (batch, kv_heads * group, D), of query_type; exact keys and values too     output : likewise, of output_type
// sign, codes, scale, minimum : keys, as above; value_* : values of BITS bits, likewise; strides in tokens
// channel_scale, mean : (batch, kv_heads, D), mean may be null
// indices : (batch, kv_heads, slots), strides in elements, and counts : (batch, kv_heads), or null: all tokens; the
//   kernel before may write them, so no load of them may move in front of wait_for_earlier: neither is __restrict__
// lengths : (batch,) or null for `tokens`
// exact_keys, exact_values : (batch, kv_heads, exact, D), strides in elements; exact_lengths : (batch,) or null
// lse : (batch, kv_heads * group) or null     scale_log2 = softmax scale * log2(e)
// partial_output, partial_statistics, tickets : kvb/splits.cuh
template <int D, int BITS>
__global__ void __launch_bounds__(kSelfIndexingThreads, 1) self_indexing_attention_kernel(
    const void* __restrict__ query, int query_type, const u32* __restrict__ sign, const u32* __restrict__ codes,
    const __half* __restrict__ scale, const __half* __restrict__ minimum, u64 key_batch_stride, u64 key_head_stride,
    const u32* __restrict__ value_codes, const __half* __restrict__ value_scale,
    const __half* __restrict__ value_minimum, u64 value_batch_stride, u64 value_head_stride,
    const float* __restrict__ channel_scale, const float* __restrict__ mean, const int* indices,
    u64 index_batch_stride, u64 index_head_stride, const int* counts, int slots,
    const int* __restrict__ lengths, int tokens,
    const void* __restrict__ exact_keys, u64 exact_key_batch_stride, u64 exact_key_head_stride,
    u64 exact_key_token_stride, const void* __restrict__ exact_values, u64 exact_value_batch_stride,
    u64 exact_value_head_stride, u64 exact_value_token_stride, const int* __restrict__ exact_lengths, int exact,
    void* output, int output_type, float* lse, float* partial_output, float2* partial_statistics, u32* tickets,
    int all_heads, float scale_log2) {
  static_assert(BITS == 2 || BITS == 4, "fields of values");
  constexpr int HEADS = kSparseHeads<D>, U = D / 32, WARPS = kSelfIndexingWarps, TILE = 4 * WARPS;
  const int parts = (all_heads + HEADS - 1) / HEADS, part = blockIdx.y % parts;   // of the KV head's query heads
  const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y / parts, kv_heads = gridDim.y / parts;
  const int b = blockIdx.z, group = min(all_heads - part * HEADS, HEADS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane % 8;
  const u64 pair = static_cast<u64>(b) * kv_heads + kv_head, row = pair * all_heads + part * HEADS;
  const int length = lengths ? min(max(lengths[b], 0), tokens) : tokens;
  const int exact_count = exact_lengths ? min(max(exact_lengths[b], 0), exact) : exact;

  const int* list = indices ? indices + b * index_batch_stride + kv_head * index_head_stride : nullptr;
  const u64 key_place = b * key_batch_stride + kv_head * key_head_stride;
  const u64 value_place = b * value_batch_stride + kv_head * value_head_stride;
  const u64 exact_key_place = b * exact_key_batch_stride + kv_head * exact_key_head_stride + 4 * g;
  const u64 exact_value_place = b * exact_value_batch_stride + kv_head * exact_value_head_stride + 4 * g;
  // What a lane has of its entry of a tile.
  bool listed, present;
  u32 signs[U];
  LaneCodes<D, 2> words;
  LaneCodes<D, BITS> value_words;
  GroupHalves<D> step, low, value_step, value_low;
  ExactRow<D> exact_key, exact_value;
  auto load_exact = [&](int tile) {
    const int entry = tile * TILE + warp * 4 + lane / 8;
    listed = entry >= exact_count;
    present = !listed;
    if (present) {
      exact_key.load(exact_keys, query_type, exact_key_place + entry * exact_key_token_stride);
      exact_value.load(exact_values, query_type, exact_value_place + entry * exact_value_token_stride);
    }
  };
  // Position of the listed token: asked for before it is known whether there is one.
  auto listed_token = [&](int tile) {
    const int slot = tile * TILE + warp * 4 + lane / 8 - exact_count;
    return list && slot >= 0 && slot < slots ? list[slot] : slot;
  };
  auto load_listed = [&](int tile, int token, int entries) {
    const bool known = listed && tile * TILE + warp * 4 + lane / 8 < entries && token >= 0 && token < length;
    if (!known) return;
    present = true;
    load_words(signs, sign + (key_place + token) * U);
    words.load(codes, key_place + token, g);
    step.load(scale, key_place + token);
    low.load(minimum, key_place + token);
    value_words.load(value_codes, value_place + token, g);
    value_step.load(value_scale, value_place + token);
    value_low.load(value_minimum, value_place + token);
  };
  load_exact(split);

  KVB_DYNAMIC_SHARED(float, shared);
  float* plain = shared;                              // (HEADS, D): scale_log2 q
  float* folded = plain + HEADS * D;                  // (HEADS, D): scale_log2 q alpha
  float* offset = folded + HEADS * D;                 // (HEADS,): scale_log2 <q, mean>
  float* copies = offset + 8;                         // (WARPS, HEADS, D)
  for (int i = threadIdx.x; i < HEADS * D; i += kSelfIndexingThreads) {
    const float q = i / D < group ? scale_log2 * load_float(query, query_type, row * D + i) : 0.f;
    plain[i] = q;
    folded[i] = q * channel_scale[pair * D + i % D];
  }
  __syncthreads();
  for (int h = warp; h < HEADS; h += WARPS) {
    float sum = 0.f;
    if (mean)
      for (int d = lane; d < D; d += 32) sum = fmaf(plain[h * D + d], mean[pair * D + d], sum);
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) offset[h] = sum;
  }
  wait_for_earlier();   // those that select
  const int first_token = listed_token(split);
  const int count = counts ? min(max(counts[pair], 0), slots) : length, entries = exact_count + count;
  const int tiles = (entries + TILE - 1) / TILE, active = active_splits(tiles, 1, splits);
  if (split >= active) return;
  load_listed(split, first_token, entries);
  __syncthreads();

  float o[HEADS][U][4] = {}, reference[HEADS], total[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) reference[h] = kNoReference, total[h] = 0.f;

  for (int tile = split;;) {
    float x[U][4] = {};
    if (present && listed) {
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float magnitude = fmaf(step[u], words(u, e), low[u]);
          x[u][e] = signs[u] >> (4 * g + e) & 1 ? magnitude : -magnitude;
        }
    } else if (present) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const float4 four = exact_key(u, query_type);
        x[u][0] = four.x, x[u][1] = four.y, x[u][2] = four.z, x[u][3] = four.w;
      }
    }

    const float* q = (listed ? folded : plain) + 4 * g;
    float p[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float logit = 0.f;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const float4 part = *reinterpret_cast<const float4*>(q + h * D + 32 * u);
        logit = fmaf(part.x, x[u][0], logit);
        logit = fmaf(part.y, x[u][1], logit);
        logit = fmaf(part.z, x[u][2], logit);
        logit = fmaf(part.w, x[u][3], logit);
      }
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2)
        logit += __shfl_xor_sync(0xffffffffu, logit, distance);
      p[h] = present ? logit + (listed ? offset[h] : 0.f) : -infinity();
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      if (p[h] > reference[h]) {
        const float factor = exp2_approx(reference[h] - (p[h] + kSparseGap));
        reference[h] = p[h] + kSparseGap;
        total[h] *= factor;
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[h][u][e] *= factor;
      }
      p[h] = exp2_approx(p[h] - reference[h]);
      total[h] += p[h];
    }

#pragma unroll
    for (int u = 0; u < U; ++u) {
      float v[4] = {};
      if (present && listed) {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = fmaf(value_step[u], value_words(u, e), value_low[u]);
      } else if (present) {
        const float4 four = exact_value(u, query_type);
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
      }
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[h][u][e] = fmaf(p[h], v[e], o[h][u][e]);
    }
    tile += active;
    if (tile >= tiles) break;
    load_exact(tile);
    load_listed(tile, listed_token(tile), entries);
  }

  // ---- the four tokens of a warp become one copy ----
  float2* statistics = reinterpret_cast<float2*>(copies + WARPS * HEADS * D);   // (WARPS, HEADS)
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    float largest = fmaxf(reference[h], __shfl_xor_sync(0xffffffffu, reference[h], 8));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 16));
    const float weight = exp2_approx(reference[h] - largest);
    float sum = total[h] * weight;
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[h][u][e] *= weight;
    if (lane == 0) statistics[warp * HEADS + h] = make_float2(largest, sum);
  }
  // Each of two lanes hands the other a half and adds up its own; then likewise a quarter: 3/8 of the shuffles that
  // sums in every lane would take.
  constexpr int ROWS = HEADS * U;   // of four channels
  const bool odd = lane & 8, upper = lane & 16;
  float half[ROWS / 2][4];
#pragma unroll
  for (int i = 0; i < ROWS / 2; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float a = o[i / U][i % U][e], b = o[(i + ROWS / 2) / U][(i + ROWS / 2) % U][e];
      half[i][e] = (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 8);
    }
#pragma unroll
  for (int i = 0; i < ROWS / 4; ++i) {
    float sum[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float a = half[i][e], b = half[i + ROWS / 4][e];
      sum[e] = (upper ? b : a) + __shfl_xor_sync(0xffffffffu, upper ? a : b, 16);
    }
    const int own = i + (odd ? ROWS / 2 : 0) + (upper ? ROWS / 4 : 0);
    *reinterpret_cast<float4*>(copies + (warp * HEADS + own / U) * D + 32 * (own % U) + 4 * g) =
        make_float4(sum[0], sum[1], sum[2], sum[3]);
  }
  const DecodeTarget target = {lse ? lse + row : nullptr, nullptr, partial_output + row * splits * D,
                               partial_statistics + row * splits, tickets + pair * parts + part};
  finish_split<D, WARPS, HEADS, kSelfIndexingThreads>(
      copies, statistics, copies, target, group, split, splits, active, [&](int index, const float4& x) {
        store_float(output, output_type, row * D + index, x.x);
        store_float(output, output_type, row * D + index + 1, x.y);
        store_float(output, output_type, row * D + index + 2, x.z);
        store_float(output, output_type, row * D + index + 3, x.w);
      });
}

}  // namespace kvb

#define KVB_EXPORT_SIZE(D, ATTENTION)                                \
  KVB_EXPORT(48, kvb::self_indexing_tables_kernel<D>)                \
  KVB_EXPORT(64, kvb::self_indexing_score_kernel<D, 1>)              \
  KVB_EXPORT(80, kvb::self_indexing_score_kernel<D, 4>)              \
  KVB_EXPORT(128, kvb::self_indexing_top_k_kernel<D>)                \
  KVB_EXPORT(72, kvb::self_indexing_encode_kernel<__half, D>)        \
  KVB_EXPORT(72, kvb::self_indexing_encode_kernel<__nv_bfloat16, D>) \
  KVB_EXPORT(72, kvb::self_indexing_encode_kernel<float, D>)         \
  KVB_EXPORT(ATTENTION, kvb::self_indexing_attention_kernel<D, 2>)   \
  KVB_EXPORT(ATTENTION, kvb::self_indexing_attention_kernel<D, 4>)
KVB_EXPORT_SIZE(64, 216)
KVB_EXPORT_SIZE(128, 216)
KVB_EXPORT_SIZE(256, 255)
