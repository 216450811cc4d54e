// RaBitQ index: signs of rotated keys, queries in integers, and the logits that these estimate.
// Reference: reference/rabitq.py; where a bit lies: reference/planes.py.
//
// rabitq_encode_kernel: rotate, sign, r = |y|^2 / |y|_1 and a = <c_q, k~>, in one pass.
//   Work     A lane has a whole row in registers (kvb/row_tiles.cuh).  A warp, which is a block, takes 32 (16) rows, a
//            tile, at a time and walks over the rows with a grid stride.
//   Loads    Whole rows, by cp.async into a tile of shared memory.  Once the tile stands in registers, the next one is
//            fetched into the same memory while this one is worked on.
//   Norm     The rotated vector is not scaled: signs do not see remaining_scale, and r takes it once.  A power of two
//            per row brings the largest coordinate near 1 beforehand where squares might leave the range of float (not
//            for float16 without a mean).  NaN or Inf anywhere make |y|^2 NaN or Inf: no other test is needed.
//   Bytes    D sizeof(T) read and D / 8 + 2 written per row, once: 2192 per 8 rows of 128, fp16.
//   Counts   Instructions of a warp per 32 rows of 128, fp16, three rounds, no means, in the machine code for sm_90:
//            loads 150 (128 of them conversions), copies of the next tile 126, rotation 3 * 1000, sums and signs 384,
//            places, words and stores 140: 3800, 950 per 8 rows, 238 issue cycles of an SM.  Memory takes 163 for them
//            at 3 TB/s on 132 SMs at 1.7 GHz: bound by issue slots, at 69 % of that bandwidth at most.
//   Before   Four lanes shared a row, two levels of the rotation and the words by shuffles: 1300 instructions per 8
//            rows, 62.8 us for 32K tokens x 8 heads of 128, fp16, on an H100 with a cold cache, 3.1 instructions a
//            cycle of 4; now 49.7.  What tensor cores would take for a rotation (halves of float to tf32 operands) is
//            no fewer instructions, and other bits than those of turboquant.
//
// rabitq_quantize_kernel: the integers of queries, for those who want them alone; a warp has a query.
//
// rabitq_score_kernel: the same, once per block, and then logits of all query heads of a group from one read of the
//   code.
//   Operands A word of signs becomes operands of mma_m16n8k32 by masks: bits s = 0 ... 3 of every byte of the word, and
//            of the word shifted right by 4, stand for 2^s, and the query's integers of those coordinates are
//            multiplied by 8 / 2^s beforehand.  Nine operations for 32 coordinates, shared by all query heads, where a
//            shift to bit 0 would take fifteen.  So that 8 times an integer fits a byte, integers are digits from -8 to
//            15: one of a query of 4 bits, and two, 16 high + low, of one of 8.
//   Columns  Two per query head: (u, 1) for 4 bits, because D u + v needs <S, 1> as well, (low, high) for 8.  A lane of
//            the result holds both columns of one head.  Sums begin at 4 sum(digits), and products are -8 digits where
//            the key is negative: they end as 4 <S, digits>, exact.
//   Work     A warp takes 64 tokens (32 for D = 256) at a time and walks over the tokens with a grid stride; the codes
//            of the next ones are on their way to registers meanwhile.  Row g of a product is token g, lane t of its
//            four has word t (D = 64: half of word t % 2; D = 256: words t and t + 4): codes are read in whole lines of
//            128 bytes, without shared memory.
//   Bytes    D / 8 + 2 read per token and KV head, 4 written per token and query head: at 8 KV heads of 128 with 4
//            query heads each and 128K tokens 18.9 and 16.8 MB, 12 us at 3 TB/s; what is written may stay in the L2
//            cache.
//   Counts   Instructions of a warp per 64 tokens of 128, 4 query heads, in the machine code for sm_90: 72 for
//            operands, 16 products, 16 loads, 8 * 8 for results, 16 to store, 40 for addresses and what is carried
//            over: 224. There are 124 times 64 tokens per SM: 28000 instructions, 7000 issue cycles, 4.1 us at 1.7 GHz.
//            Rounding the query comes before that, 770 instructions once per block, a warp per query head.
//   Latency  Signs, query and means are asked for at once, and before anything that depends on a length: 1.4 us until
//            they are there instead of 2.4.  While the query is rounded the codes of all steps come to the L2 cache.
//            With a cold cache the kernel takes 20.5 us, 21.4 without that (a decode step of 32K tokens in three
//            launches 37.1 and 38.6); some 5 of them are lines of the flush on their way to memory.  With a warm one
//            11.2.
//   Tried    Codes as the first to leave the L2 cache: no less.  Three steps under way in shared memory: 0.4 us more,
//            and 1.1 with a warm cache; as the first to leave 0.7 less, and 1.6 more, with a warm one.  Fetching ahead
//            before the query is asked for: 22.0 us.
//   Paths    Tiles that are whole and need neither offset nor sigma are loaded from addresses that differ by constants,
//            and stored without questions; the others take the long way.
//
// rabitq_top_p_kernel: the same, but logits stay in shared memory, and Top-p of each query head follows in the same
//   launch (kvb/top_p.cuh), for up to four query heads a KV head.
//   Bytes    The 18.9 MB of codes, 8 MB of bins of the rows at most, in the L2 cache, and what is listed.
//   Counts   Instructions of a warp per 64 tokens of 128, 4 query heads: 300 for logits and bins, 114 for exact masses,
//            45 for bits.  128 multiprocessors, of 8192 tokens each, 59000: 14700 issue cycles, 8.4 us at 1.7 GHz.
//   Latency  On an H100, times of a block's steps in us, of 128K tokens (and 32K): until the query is there 1.4, and
//            rounded 1.2; for the logits 8.2 (2.5), which memory bounds; until bins are on their way 2.0 (1.8); until
//            those of all blocks have come and brackets are found 4.7 (4.0), masses meanwhile; for sums above them and
//            lists 2.4 (1.2), until these are told 1.1 (1.2), and those of all blocks are ready for the search 2.7
//            (1.9); for it 1.7; until it is known how many tokens are chosen 1.4: 27 (18.8).  Much of what is done but
//            once is waiting for instructions.
//   Tried    For all, a decode step of 128K tokens, 2 %.  A last block that searches and writes all positions, tickets
//            instead of published words: 52.4 us, 72.6 with 10 %.  For a token near the threshold, a loop of the lane's
//            own: 2 us for each; a ballot and an addition to shared memory for every 32 tokens with one: 0.5 us more.
//            A branch on heads or on whole tiles in the loop of logits: 1.8 more.  Every lane with votes looking for
//            the bin of a bracket among its own: 1.3 more.  Codes to the L2 cache while the query is rounded: 0.9 more;
//            two steps ahead in the loop: 1.0 more.  Bins of a part no further than its smallest logit: 0.4 more, for
//            the longer code.  Attention in a launch that begins early: no less, at 32K tokens 0.6.  Masses when the
//            brackets are known, and bits by a ballot for every 32 tokens: 2.1 more (10 %: 2.5, 32K tokens: 0.1); lists
//            for every 256 tokens: 0.6 more.  Eight query heads, and up to 64 parts, before brackets and masses were
//            found at the same time: 47.3 us at 16:2 heads where three launches take 42.4, 43.7 at 64:8 and 32K tokens
//            instead of 40.7.
//
// rabitq_attention_kernel: the same, and attention to what is chosen (kvb/exact_attention.cuh), for fp16 and bf16.
//   Work     A block attends to the tokens that are chosen of its own part, which it lists in shared memory, and to a
//            share of the exact slots in front; the blocks of a list merge as splits do.  Its last warps, the first to
//            have no tile, write the positions for the caller.  Where a part may have half as many again as the mean,
//            and 64, which all know from what was published for the search, blocks wait until all positions are written
//            and take equal shares.
//   Rows     Keys of tokens above the brackets come to the L2 cache while the last ones are searched, values of all
//            that are chosen while they are listed.  The rings of 16 warps take the place of the logits.
//   Latency  On an H100, in us, of 128K tokens (and 32K): as above until the part's tokens are counted, until they are
//            listed 0.3, for the tiles 3.2 (2.4), to merge warps 1.4 (1.2), until the last block knows that it is 0.7,
//            and for it 1.8; 4 of a step are between the call and the first or after the last instruction.  Before its
//            code was short a step took 2.5 us less than with two launches, and 1.2 less where blocks take equal
//            shares.
//   Code     It is more than an instruction cache holds, and what never runs costs time, too: without the code for
//            logits that are not finite or share bins, for offsets, and for lists that are too short, all of which was
//            taken away for a test, a step took 4.6 us (4.0) less when loops in it were unrolled, and 2.0 (2.0) less
//            when they no longer were.
//            Where caches hold the instructions of other kernels it takes longer than benchmarks say, which repeat one
//            call: 43 us (34) if exact attention ran before data was written over the caches, 46 (37) if KIVI's did,
//            too, instead of 38 (29); exact attention takes no longer then.
//   Tried    For a decode step of 128K tokens, 2 %, and (32K, 5 %).  No rows fetched ahead: 1.2 us (1.1) more; values
//            with the keys: 1.7 (1.9); both while tokens are listed: 0.6 (1.0); whole rows by bulk copies to the L2
//            cache: up to 0.9 more (1.5), with 10 % 0.3 less.  Rows copied without the hint that they are read once:
//            0.9, and 5 with 10 %.  Positions written when the copies are on their way: the counts of other parts come
//            3.8 us later.  Registers spilled, 48 bytes: 1.3.  Rows fetched before a part's sums are published: 0.5
//            (0.9). Codes to the L2 cache while the query is rounded: no less, with 10 % 0.6 to 2 more.  A launch that
//            is not cooperative: no less.  In the last block places for eight parts a thread where there are four: 0.9
//            (1.3).
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/exact_attention.cuh"
#include "kvb/hadamard.cuh"
#include "kvb/row_tiles.cuh"
#include "kvb/top_p.cuh"

namespace kvb {

constexpr int kMostRounds = 8;

// Signs of a rotation to shared memory, asynchronously.
template <int D>
__device__ __forceinline__ void stage_signs(float* staged, const float* signs, int rounds) {
  for (int i = threadIdx.x; i < rounds * D / 4; i += blockDim.x)
    cp_async_16(staged + 4 * i, signs + 4 * i);
  cp_async_commit();
}

// ---- keys -----------------------------------------------------------------------------------------------------------

// Blocks, of one warp each, that share a multiprocessor: registers allow them.
template <int D>
constexpr int kEncodeBlocks = D == 64 ? 18 : D == 128 ? 12 : 8;

__device__ __forceinline__ __half saturated_half(float x, bool finite) {
  return __float2half_rn(finite ? fminf(fmaxf(x, -65504.f), 65504.f) : __int_as_float(0x7fc00000));
}

// keys : (batch, kv_heads, tokens, D), rows contiguous and at multiples of 16 bytes, strides in elements
// key_mean, query_mean : (kv_heads, D) every mean_batch_stride elements, or null
// signs : (rounds, D), +-2^-floor(log2(D)/2); rounds 0: keys and query_mean are rotated already
// factors : (batch, kv_heads, tokens), by which keys were divided, or null
// sign : (batch, kv_heads, tokens, D / 32) with strides in tokens        rescale, offset : no words; offset or null
// rows = batch * kv_heads * tokens
template <class T, int D>
__global__ void __launch_bounds__(32, kEncodeBlocks<D>)
    rabitq_encode_kernel(const T* __restrict__ keys, u64 key_batch_stride, u64 key_head_stride, u64 key_token_stride,
                         const float* __restrict__ key_mean, u64 key_mean_stride,
                         const float* __restrict__ query_mean, u64 query_mean_stride,
                         const float* __restrict__ signs, int rounds, float remaining_scale,
                         const float* __restrict__ factors, u32* sign, __half* rescale, __half* offset,
                         u64 batch_stride, u64 head_stride, int kv_heads, int tokens, u32 rows) {
  static_assert(D == 64 || D == 128 || D == 256, "a row divides into lanes of at most 128 coordinates");
  using Tile = RowTile<D>;
  constexpr int LANES = Tile::LANES, OCTETS = Tile::OCTETS, WORDS = Tile::WORDS;
  KVB_SHARED(float, staged_signs, [kMostRounds * D]);
  KVB_DYNAMIC_SHARED(char, tile);
  const int lane = threadIdx.x, part = lane % LANES;
  const char* own_row = tile + lane / LANES * kRowPitch<T, D>;
  const Vectors<T> vectors = {keys, key_batch_stride, key_head_stride, key_token_stride, kv_heads, tokens, rows};
  const u32 stride = gridDim.x * Tile::ROWS;
  u32 first = blockIdx.x * Tile::ROWS;
  if (first >= rows) return;
  copy_rows<D>(tile, vectors, first, lane);
  stage_signs<D>(staged_signs, signs, rounds);

  for (bool more = true; more; first += stride) {
    cp_async_wait<0>();
    __syncwarp();   // the copies, and the signs, of every lane are there
    float v[OCTETS][8];
    read_row<D, T>(v, own_row, part);
    __syncwarp();   // every lane has read its row
    more = rows - first > stride;
    if (more) copy_rows<D>(tile, vectors, first + stride, lane);
    // A row beyond the last one counts as the last, and is not stored.
    auto own_place = [&]() { return place_of(min(first + lane / LANES, rows - 1), kv_heads, tokens); };
    if (key_mean) {
      const RowPlace place = own_place();
      subtract_mean<LANES>(v, key_mean + place.batch * key_mean_stride + place.head * D + part * 8);
    }
    // No -0 either, which is not negative but of a dense rotation, whose rows are float; a Hadamard one gives none.
    float undo = kHasWideRange<T> || key_mean ? bring_near_one<LANES>(v) : 1.f, product = 0.f;
    if (query_mean) {
      const RowPlace place = own_place();
      const float* mean = query_mean + place.batch * query_mean_stride + place.head * D + part * 8;
#pragma unroll
      for (int c = 0; c < OCTETS; ++c)
#pragma unroll
        for (int e = 0; e < 8; ++e) product = fmaf(mean[c * LANES * 8 + e], v[c][e], product);
      product = sum_of_lanes<LANES>(product);
    }

    hadamard_rounds<LANES, true>(v, staged_signs, rounds, part, 0);

    float squares[4] = {}, sums[4] = {};
#pragma unroll
    for (int c = 0; c < OCTETS; ++c)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        squares[e % 4] = fmaf(v[c][e], v[c][e], squares[e % 4]);
        sums[e % 4] += fabsf(v[c][e]);
      }
    const float square = sum_of_lanes<LANES>((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const float sum = sum_of_lanes<LANES>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const bool finite = square < infinity();         // not for NaN either
    const bool coded = finite && square > 0.f;
    u32 words[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      // Bit 4 p + s is coordinate 8 s + p: a lane's octets are s = part, part + LANES, ...
      u32 word = 0;
#pragma unroll
      for (int p = 7; p >= 0; --p)
#pragma unroll
        for (int i = 4 / LANES - 1; i >= 0; --i) append_sign(word, v[w * (4 / LANES) + i][p], LANES);
      word = whole_word<LANES>(word, part);
      words[w] = coded ? word : 0u;
    }
    const RowPlace place = own_place();
    const u32 row = first + lane / LANES;
    const u64 token = place.batch * batch_stride + place.head * head_stride + place.token;
    if (row < rows && part == 0) {
      store_row(sign + token * WORDS, words);
      if (factors) undo *= factors[row];
      rescale[token] = saturated_half(coded ? square / sum * remaining_scale * undo : 0.f, finite);
      if (offset) offset[token] = saturated_half(product * undo, finite);
    }
  }
}

// ---- queries --------------------------------------------------------------------------------------------------------

// How a query is rounded, and what the random number of its coordinate i is made of: counter + i of its row.
struct Rounding {
  int bits, random;
  u32 seed, counter;
};

// A uniform multiple of 2^-24 in [0, 1): lowbias32, a public hash by C. Wellons.
__device__ __forceinline__ float dither(const Rounding& rounding, u32 i) {
  u32 x = rounding.seed + 0x9E3779B9u * (rounding.counter + i);
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return static_cast<float>((x ^ x >> 16) >> 8) * 5.9604644775390625e-8f;
}

// Where a query comes from.
//   query    (batch, q_heads, D), type 0 float, 1 fp16, 2 bf16
//   rotated  R q, likewise but float, and mean R c_q, where a dense matrix has rotated them; else null
//   mean     c_q of this KV head, or null        key_mean   c_k of it, or null
struct QuerySource {
  const void* query;
  int type;
  const float *rotated, *mean, *key_mean;
};

// D / 32 coordinates of a query, centred, and what they add to its scalars.
template <int D>
struct QueryShare {
  float v[1][D / 32], square, constant;

  // Zeros if row `row` is not `present`.
  __device__ __forceinline__ QueryShare(const QuerySource& from, u64 row, bool present, int lane)
      : v{}, square(0.f), constant(0.f) {
    constexpr int N = D / 32;
    const int first = lane * N;
    float raw[N] = {}, key_mean[N] = {}, mean[N] = {};
    if (!present) return;
    if (from.key_mean) load_floats(key_mean, from.key_mean, 0, first);
    if (from.mean) load_floats(mean, from.mean, 0, first);
    if (from.rotated) load_floats(v[0], from.rotated, 0, row * D + first);
    load_floats(raw, from.query, from.type, row * D + first);   // converts, and so waits: last
#pragma unroll
    for (int e = 0; e < N; ++e) {
      constant = fmaf(raw[e], key_mean[e], constant);
      v[0][e] = (from.rotated ? v[0][e] : raw[e]) - mean[e];
      square = fmaf(v[0][e], v[0][e], square);
    }
  }
};

struct QueryScalars {
  float step, low;          // NaN for a query that is not finite
  float square, constant;   // |q - c_q|^2 and <q, c_k>
};

// A warp rounds a query: codes[e] is that of coordinate D / 32 lane + e, and its random number rounding.counter plus
// `at` plus e.  Float arithmetic as in the reference.
// signs : (rounds, D) in shared memory        rounds : 0 for what is rotated already
template <int D>
__device__ __forceinline__ QueryScalars round_query(int (&codes)[D / 32], QueryShare<D>& share, const float* signs,
                                                    int rounds, float remaining_scale, u32 at, int lane,
                                                    const Rounding& rounding) {
  constexpr int N = D / 32;
  float(&v)[1][N] = share.v;
  float &square = share.square, &constant = share.constant;
  hadamard_rounds<32>(v, signs, rounds, lane, 0);
  float low = infinity(), high = -infinity();
  int usable = 1;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    v[0][e] = __fmul_rn(v[0][e], remaining_scale);
    low = fminf(low, v[0][e]);
    high = fmaxf(high, v[0][e]);
    usable &= fabsf(v[0][e]) < infinity();
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    low = fminf(low, __shfl_xor_sync(0xffffffffu, low, distance));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, distance));
    square += __shfl_xor_sync(0xffffffffu, square, distance);
    constant += __shfl_xor_sync(0xffffffffu, constant, distance);
  }
  const bool wide = rounding.bits == 8;
  const float step = wide ? __fdiv_rn(fmaxf(high, -low), 127.f) : __fdiv_rn(__fsub_rn(high, low), 15.f);
  float inverse = __fdiv_rn(15.f, __fsub_rn(high, low));
  if (!(inverse < infinity())) inverse = 0.f;       // equal coordinates, or nearly so: all codes are 0
  usable = __all_sync(0xffffffffu, usable) && step < infinity();
  // v / step, rounded correctly, from the rounded inverse and the remainder of a first quotient (Markstein).
  const float reciprocal = __fdiv_rn(1.f, step);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float quotient = __fmul_rn(v[0][e], reciprocal);
    const float t = wide ? fmaf(fmaf(-quotient, step, v[0][e]), reciprocal, quotient)
                         : __fmul_rn(__fsub_rn(v[0][e], low), inverse);
    v[0][e] = usable && fabsf(t) < infinity() ? t : 0.f;
  }
  if (rounding.random)
#pragma unroll
    for (int e = 0; e < N; ++e)   // floor, by rounding down to a whole number
      v[0][e] = static_cast<float>(
          __float2int_rd(__fadd_rn(v[0][e], dither(rounding, at + e))));
#pragma unroll
  for (int e = 0; e < N; ++e) codes[e] = min(max(__float2int_rn(v[0][e]), wide ? -127 : 0), wide ? 127 : 15);
  const float nan = __int_as_float(0x7fc00000);
  return {usable ? step : nan, usable ? (wide ? 0.f : low) : nan, square, constant};
}

// codes : (batch, q_heads, D) bytes        step, low : (batch, q_heads)        Grid (kv_heads, batch), 128 threads
template <int D>
__global__ void __launch_bounds__(128)
    rabitq_quantize_kernel(const void* __restrict__ query, int query_type, const float* __restrict__ rotated,
                           const float* __restrict__ query_mean, u64 query_mean_stride,
                           const float* __restrict__ signs, int rounds, float remaining_scale, int bits, int random,
                           u32 seed, u32 counter, u8* codes, float* step, float* low, int group) {
  KVB_SHARED(float, staged_signs, [kMostRounds * D]);
  stage_signs<D>(staged_signs, signs, rounds);
  cp_async_wait<0>();
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const float* mean = query_mean ? query_mean + blockIdx.y * query_mean_stride + blockIdx.x * D : nullptr;
  for (int h = threadIdx.x / 32; h < group; h += 4) {
    const u64 row = (static_cast<u64>(blockIdx.y) * gridDim.x + blockIdx.x) * group + h;
    int made[D / 32];
    QueryShare<D> share({query, query_type, rotated, mean, nullptr}, row, true, lane);
    const QueryScalars scalars =
        round_query<D>(made, share, staged_signs, rounds, remaining_scale,
                       static_cast<u32>(row * D + lane * (D / 32)), lane, {bits, random, seed, counter});
#pragma unroll
    for (int e = 0; e < D / 32; ++e) codes[row * D + lane * (D / 32) + e] = static_cast<u8>(made[e]);
    if (lane == 0) {
      step[row] = scalars.step;
      low[row] = scalars.low;
    }
  }
}

// ---- scores ---------------------------------------------------------------------------------------------------------

// How the four lanes that share a token divide its code into quarters of 16 coordinates, D / 64 for each lane: a
// quarter has bits 4 p + s, p even (`odd` 0) or odd, of one word.  Quarter c of lane t is of word t, D = 64: t % 2,
// D = 256: of words t and t + 4.
template <int D>
__device__ __forceinline__ int quarter_lane(int word, int odd) { return D == 64 ? word + 2 * odd : word % 4; }
template <int D>
__device__ __forceinline__ int quarter_number(int word, int odd) { return D == 64 ? 0 : word / 4 * 2 + odd; }

// What a block keeps of its query heads, of which four make a tile.
template <int D, int TILES>
struct StagedQueries {
  i8 operands[TILES][D / 32][2][32][4];             // bytes of b[i] of product k of a tile, by lane
  int sums[TILES * 4][2];                           // 4 sum(digits)
  float step[TILES * 4], low[TILES * 4];            // scale / 4 times those of the query
  float constant[TILES * 4], kappa[TILES * 4];
};

// What makes logits of the query heads of a KV head of a sequence.
struct ScoreSource {
  QuerySource query;
  const float* signs;        // (rounds, D)
  int rounds;
  float remaining_scale;
  Rounding rounding;
  float scale, noise;        // noise is (1 - E alpha^2) / (D - 1)
  const u32* sign;           // (..., D / 32)
  const __half *rescale, *offset;   // offset may be null
  u64 base;                  // token, in these, of the first one of the sequence and KV head
  u64 pair;                  // sequence and KV head
  int group;
};

// Tokens that a warp takes at a time.
template <int D>
constexpr int kTokensAtOnce = D == 256 ? 32 : 64;

// Logits of the tokens first, first + 1, ... first + kTokensAtOnce - 1 and every `stride` further on, up to `end`, by a
// warp of the WARPS of a block, all of which call it.  Codes of tokens from `length` on are not read.
// prepare() is called when the first codes are under way, a barrier before the first result.  These are handed out as
//   whole(n, at, more, values)    of head 4 n + lane % 4, where there is none, too, and tokens at + more + lane / 4 and
//                                 8 further on, if no offset and no sigma is wanted; `more` is a constant
//   single(n, token, value, present, factor)   of others: factor is r; not `present` from `length` on
// kApart : whole tiles have a loop of their own, without a branch, for which there must be registers
// kFetchAhead : codes of later steps are brought to the L2 cache while the query is rounded
template <int D, int TILES, int WARPS, bool kApart, bool kFetchAhead, class Prepare, class Whole, class Single>
__device__ __forceinline__ void for_logits(const ScoreSource& source, u32 first, u32 stride, u32 length, u32 end,
                                           bool wants_sigma, StagedQueries<D, TILES>& staged, const Prepare& prepare,
                                           const Whole& whole, const Single& single) {
  constexpr int WORDS = D / 32, QUARTERS = D / 64, PARTS = D == 256 ? 2 : 1;    // words of a token that a lane loads
  constexpr int TOKENS = kTokensAtOnce<D>, UNITS = TOKENS / 16;                 // products at a time
  KVB_SHARED(float, staged_signs, [kMostRounds * D]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, group = source.group;

  u32 code[UNITS][2][PARTS];
  __half r[UNITS][2];
  auto load = [&](u32 first) {
    const u32 left = length - first;                 // at least 1
    const u32* own_code = source.sign + (source.base + first) * WORDS + (D == 64 ? t % 2 : t);
    const __half* own_r = source.rescale + source.base + first;
    auto load_unit = [&](int u, int half, u32 token) {
#pragma unroll
      for (int i = 0; i < PARTS; ++i) code[u][half][i] = load_once(own_code + token * WORDS + i * 4);
      r[u][half] = own_r[token];
    };
    if (left >= TOKENS) {                            // addresses that differ by constants
      own_code += g * WORDS;
      own_r += g;
#pragma unroll
      for (int u = 0; u < 2 * UNITS; ++u) load_unit(u / 2, u % 2, u * 8);
    } else {                                         // the last token stands for those that are not there
#pragma unroll
      for (int u = 0; u < 2 * UNITS; ++u) load_unit(u / 2, u % 2, min(static_cast<u32>(u * 8 + g), left - 1));
    }
  };
  // What does not depend on the length first: both are on their way at the same time.
  stage_signs<D>(staged_signs, source.signs, source.rounds);
  QueryShare<D> share(source.query, source.pair * group + warp, warp < group, lane);
  if (first < length) load(first);   // on its way while the query is rounded
  prepare();
  cp_async_wait<0>();
  __syncthreads();
  const Rounding& rounding = source.rounding;
  if (kFetchAhead) {   // all other codes of this warp, while the query is rounded
    constexpr u32 LINES = TOKENS * WORDS * 4 / kSharedLine, PER_LINE = TOKENS / LINES;   // of a step; tokens
    const u32 own = lane % LINES * PER_LINE;
    for (u32 at = first + (1 + lane / LINES) * stride; at < length; at += 32 / LINES * stride) {
      if (own == 0) prefetch_l2(source.rescale + source.base + at);
      if (at + own < length) prefetch_l2(source.sign + (source.base + at + own) * WORDS);
    }
  }
  for (int h = warp; h < TILES * 4; h += WARPS) {    // a warp rounds a query head, or zeros
    if (h >= WARPS) share = QueryShare<D>(source.query, source.pair * group + h, h < group, lane);
    int codes[D / 32], total[2] = {};
    const QueryScalars scalars =
        round_query<D>(codes, share, staged_signs, source.rounds, source.remaining_scale,
                       static_cast<u32>((source.pair * group + h) * D + lane * (D / 32)), lane, rounding);
#pragma unroll
    for (int e = 0; e < D / 32; ++e) {
      // Coordinate 8 s + p of a word: product 2 c + s / 2 has it in operand s % 2, as digit times -8 / 2^s.
      const int d = lane * (D / 32) + e, word = d / 32, s = d / 8 % 4, p = d % 8;
      const int k = 2 * quarter_number<D>(word, p % 2) + s / 2;
      const int digits[2] = {rounding.bits == 8 ? codes[e] & 15 : codes[e], rounding.bits == 8 ? codes[e] >> 4 : 1};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int owner = (h % 4 * 2 + i) * 4 + quarter_lane<D>(word, p % 2);
        staged.operands[h / 4][k][s % 2][owner][p / 2] = static_cast<i8>(-digits[i] * (8 >> s));
        total[i] += digits[i];
      }
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) total[i] += __shfl_xor_sync(0xffffffffu, total[i], distance);
    if (lane == 0) {
      staged.sums[h][0] = 4 * total[0];
      staged.sums[h][1] = 4 * total[1];
      staged.step[h] = 0.25f * source.scale * scalars.step;
      staged.low[h] = 0.25f * source.scale * scalars.low;
      staged.constant[h] = source.scale * scalars.constant;
      if (wants_sigma) {
        const float rest = scalars.step * scalars.step / (rounding.random ? 6.f : 12.f);
        staged.kappa[h] = fabsf(source.scale) * __fsqrt_rn(D * fmaf(source.noise, scalars.square, rest));
      }
    }
  }
  __syncthreads();

  u32 b[TILES][2 * QUARTERS][2];
  int sums[TILES][2];
  float step[TILES], low[TILES], constant[TILES];
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
#pragma unroll
    for (int k = 0; k < 2 * QUARTERS; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i) b[n][k][i] = *reinterpret_cast<const u32*>(staged.operands[n][k][i][lane]);
    const int own = n * 4 + t;                       // of the result
    sums[n][0] = staged.sums[own][0];
    sums[n][1] = staged.sums[own][1];
    step[n] = staged.step[own];
    low[n] = staged.low[own];
    constant[n] = staged.constant[own];
  }
  const int high_weight = rounding.bits == 8 ? 16 : 0;

  u32 own[UNITS][2][PARTS];
  __half2 factors[UNITS];                            // two to a register
  auto take = [&] {
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < PARTS; ++i) own[u][half][i] = code[u][half][i];
      factors[u] = __halves2half2(r[u][0], r[u][1]);
    }
    if (first + stride < length) load(first + stride);
  };
  auto results = [&](int u, float (&factor)[2], float (&result)[TILES][2]) {
    int sum[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] = sums[n][i % 2];
#pragma unroll
    for (int c = 0; c < QUARTERS; ++c) {
      u32 x[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        x[half] = own[u][half][D == 256 ? c / 2 : 0] >> 4 * (D == 64 ? t / 2 : c % 2);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const u32 mask = 0x01010101u << 2 * m;
        const u32 a[4] = {x[0] & mask, x[1] & mask, x[0] & mask << 1, x[1] & mask << 1};
#pragma unroll
        for (int n = 0; n < TILES; ++n) mma_m16n8k32<i8>(sum[n], a, b[n][2 * c + m]);
      }
    }
    const float2 both = __half22float2(factors[u]);
    factor[0] = both.x, factor[1] = both.y;
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int digit = sum[n][2 * half], other = sum[n][2 * half + 1];
        const float z = fmaf(step[n], static_cast<float>(digit + high_weight * other),
                             low[n] * static_cast<float>(other));
        result[n][half] = fmaf(factor[half], z, constant[n]);
      }
  };
  float factor[2], result[TILES][2];
  if (kApart && !source.offset && !wants_sigma)
    for (; first + TOKENS <= length; first += stride) {
      take();
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
        results(u, factor, result);
#pragma unroll
        for (int n = 0; n < TILES; ++n) whole(n, first, u * 16, result[n]);
      }
    }
  for (; first < end; first += stride) {
    take();
    const bool plain = !kApart && first + TOKENS <= length && !source.offset && !wants_sigma;
    constexpr bool SHORT = kApart && !kFetchAhead;   // where more follows, code counts
    constexpr int AT_ONCE = SHORT ? 1 : UNITS;
#pragma unroll AT_ONCE
    for (int u = 0; u < UNITS; ++u) {
      results(SHORT ? 0 : u, factor, result);
      if (plain) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) whole(n, first, u * 16, result[n]);
        continue;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 token = first + u * 16 + half * 8 + g;
        if (token >= end) continue;
        const bool present = token < length;
        const float offset = source.offset && present ? __half2float(source.offset[source.base + token]) : 0.f;
#pragma unroll
        for (int n = 0; n < TILES; ++n)   // the same bits in every kernel
          single(n, token, fmaf(source.scale, offset, result[n][half]), present, factor[half]);
      }
      if (SHORT)                                     // the next unit takes the place of the first
#pragma unroll
        for (int next = 1; next < UNITS; ++next) {
          factors[next - 1] = factors[next];
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < PARTS; ++i) own[next - 1][half][i] = own[next][half][i];
        }
    }
  }
}

// The arguments that both kernels share.
// query, rotated, means, signs : as above; `noise` is (1 - E alpha^2) / (D - 1)
// sign, rescale, offset : as for encode        lengths : (batch), or null
#define KVB_RABITQ_SCORE_PARAMETERS                                                                                    \
  const void *__restrict__ query, int query_type, const float *__restrict__ rotated,                                  \
      const float *__restrict__ key_mean, u64 key_mean_stride, const float *__restrict__ query_mean,                  \
      u64 query_mean_stride, const float *__restrict__ signs, int rounds, float remaining_scale, int bits, int random, \
      u32 seed, u32 counter, float scale, float noise, const u32 *__restrict__ sign,                                  \
      const __half *__restrict__ rescale, const __half *__restrict__ offset, u64 batch_stride, u64 head_stride,       \
      const int *__restrict__ lengths, int tokens, int group
// Of the block's sequence, blockIdx.z, and KV head, blockIdx.y.
#define KVB_RABITQ_SCORE_SOURCE(D)                                                                                  \
  score_source<D>({query, query_type, rotated, query_mean, key_mean}, query_mean_stride, key_mean_stride, signs,     \
                  rounds, remaining_scale, {bits, random, seed, counter}, scale, noise, sign, rescale, offset,       \
                  blockIdx.z * batch_stride + blockIdx.y * head_stride, group)
template <int D>
__device__ __forceinline__ ScoreSource score_source(QuerySource query, u64 query_mean_stride, u64 key_mean_stride,
                                                    const float* signs, int rounds, float remaining_scale,
                                                    const Rounding& rounding, float scale, float noise,
                                                    const u32* sign, const __half* rescale, const __half* offset,
                                                    u64 base, int group) {
  if (query.mean) query.mean += blockIdx.z * query_mean_stride + blockIdx.y * D;
  if (query.key_mean) query.key_mean += blockIdx.z * key_mean_stride + blockIdx.y * D;
  return {query, signs, rounds, remaining_scale, rounding, scale, noise, sign, rescale, offset, base,
          static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y, group};
}

// logits[b, kv_head * group + h, t] = scale (r_t (step_h <S_t, codes_h> + low_h <S_t, 1>) + a_t + <q_h, c_k>), -inf
// from lengths[b] on; sigma likewise r_t kappa_h, and 0.
// logits, sigma : (batch, kv_heads * group, tokens); sigma may be null
// Grid (blocks, kv_heads, batch); TILES * 4 >= group.
template <int D, int TILES>
__global__ void __launch_bounds__(256, TILES == 1 ? 3 : TILES < 4 ? 2 : 1)
    rabitq_score_kernel(KVB_RABITQ_SCORE_PARAMETERS, float* logits, float* sigma) {
  using Staged = StagedQueries<D, TILES>;
  KVB_SHARED(Staged, staged);
  constexpr int WARPS = 8, TOKENS = kTokensAtOnce<D>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const u32 length = lengths ? min(max(lengths[blockIdx.z], 0), tokens) : tokens;
  const ScoreSource source = KVB_RABITQ_SCORE_SOURCE(D);
  const u64 row = source.pair * group + t;           // of head t of the first tile
  float* own_logits = logits + row * tokens + g;
  for_logits<D, TILES, WARPS, TILES == 1, true>(
      source, (blockIdx.x * WARPS + warp) * TOKENS, gridDim.x * WARPS * TOKENS, length, tokens, sigma != nullptr,
      staged, [] {},
      [&](int n, u32 at, int more, const float (&values)[2]) {
        if (n * 4 + t < group)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            own_logits[static_cast<u64>(n * 4) * tokens + at + more + half * 8] = values[half];
      },
      [&](int n, u32 token, float value, bool present, float factor) {
        if (n * 4 + t >= group) return;
        own_logits[static_cast<u64>(n * 4) * tokens + token - g] = present ? value : -infinity();
        if (sigma)
          sigma[(row + n * 4) * tokens + token] = present ? factor * staged.kappa[n * 4 + t] : 0.f;
      });
}

// Which tokens have a share of the mass of these logits, for each query head, and the union of the query heads of a KV
// head: scores and Top-p (kvb/top_p.cuh, where other arguments are named) in one launch, whose blocks wait for others.
// span : tokens of a block, a multiple of kTopPUnit        logits : (batch, q_heads, tokens), written if all are needed
// Grid (parts, kv_heads, batch), cooperative; 4 >= group.
#define KVB_RABITQ_TOP_P_PARAMETERS                                                                                  \
  KVB_RABITQ_SCORE_PARAMETERS, int span, float *logits, selection::Rendezvous *rendezvous, u32 *row_bins,           \
      selection::TopPPart *parts, selection::Entry *entries, int *indices, int *out_counts, float *mass, u32 share, \
      int least, int most, int capacity
#define KVB_RABITQ_TOP_P_TARGET                                                                                     \
  {{logits, nullptr, lengths, nullptr, tokens, span, 0, 0, 0, 1}, logits, rendezvous, row_bins, parts, entries,      \
   indices, out_counts, mass, {share, least, most, 0}, capacity}
constexpr int kTopPHeads = 4;

// The block's part of a sequence.        shared : the dynamic memory of choose_by_logits
__device__ __forceinline__ selection::PartRows part_of_block(char* shared, int span, const int* lengths, int tokens) {
  return {reinterpret_cast<float*>(shared + sizeof(selection::TopPMemory<kTopPHeads>)), span,
          static_cast<int>(blockIdx.x) * span, lengths ? min(max(lengths[blockIdx.z], 0), tokens) : tokens};
}
template <int D, class Fetch>
__device__ __forceinline__ selection::PartChoice choose_by_logits(const ScoreSource& source, char* shared,
                                                                  const selection::PartRows& part,
                                                                  const selection::TopPTarget& target,
                                                                  const Fetch& fetch) {
  using namespace selection;
  using Staged = StagedQueries<D, 1>;
  KVB_SHARED(Staged, staged);
  constexpr int TOKENS = kTokensAtOnce<D>;
  auto& memory = *reinterpret_cast<TopPMemory<kTopPHeads>*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  TopPCounts counts;
  for_logits<D, 1, kWarps, true, false>(
      source, part.first + warp * TOKENS, kWarps * TOKENS, part.end(), part.end(), false, staged,
      [&] { start_top_p(memory); },
      [&](int, u32 at, int more, const float (&values)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          counts.add(memory, part, t, static_cast<int>(at - part.first) + more + half * 8 + g, values[half]);
      },
      [&](int, u32 token, float value, bool, float) {
        counts.add(memory, part, t, static_cast<int>(token - part.first), value);
      });
  // Of the eight lanes that have the logits of a head.
  counts.reduce(memory, t, g == 0, 4);
  return choose_top_p<kTopPHeads>(memory, part, source.group, target, fetch);
}

template <int D>
__global__ void __launch_bounds__(selection::kThreads, 1) rabitq_top_p_kernel(KVB_RABITQ_TOP_P_PARAMETERS) {
  KVB_DYNAMIC_SHARED(char, shared);
  const selection::PartRows part = part_of_block(shared, span, lengths, tokens);
  const selection::TopPTarget target = KVB_RABITQ_TOP_P_TARGET;
  const selection::PartChoice choice =
      choose_by_logits<D>(KVB_RABITQ_SCORE_SOURCE(D), shared, part, target, [](u32) {});
  write_positions(target, part, choice);
  leave_top_p(target, group);
}

// The same, and attention to the tokens that are chosen (kvb/exact_attention.cuh) and to the first `leading` slots.
// keys, values : (batch, kv_heads, slots, D) T, as the query; token 0 of the index is slot `first`
// leading : (batch), or null        the others : DecodeArguments; scale_log2 is scale log2(e), output_float32: not T
template <class T, int D>
__global__ void __launch_bounds__(selection::kThreads, 1)
    rabitq_attention_kernel(KVB_RABITQ_TOP_P_PARAMETERS, const T* __restrict__ keys, const T* __restrict__ values,
                            u64 key_batch_stride, u64 key_head_stride, u64 key_token_stride, u64 value_batch_stride,
                            u64 value_head_stride, u64 value_token_stride, const int* __restrict__ leading, int first,
                            void* output, float* lse, float* partial_output, float2* partial_statistics, u32* tickets,
                            float scale_log2, int output_float32) {
  using namespace selection;
  using Queries = QueryOperands<T, D, 8, kWarps>;
  static_assert(kTopPHeads <= 8, "query heads of an operand");
  static_assert(kRingBytes<T, D, kWarps> >= sizeof(TopPMemory<kTopPHeads>), "the list lies where logits were");
  KVB_DYNAMIC_SHARED(char, queries);
  char* const shared = queries + Queries::BYTES;   // of the selection, then of attention, and then its list
  int* const listed = reinterpret_cast<int*>(shared + kRingBytes<T, D, kWarps>);
  const PartRows part = part_of_block(shared, span, lengths, tokens);
  const TopPTarget target = KVB_RABITQ_TOP_P_TARGET;
  const ScoreSource source = KVB_RABITQ_SCORE_SOURCE(D);
  const T* const typed_query = static_cast<const T*>(query);
  Queries::stage(reinterpret_cast<uint4*>(queries), typed_query + source.pair * group * D, group);
  auto fetch = [&](const T* rows, u64 batch_stride, u64 head_stride, u64 token_stride, int position) {
    const T* row = rows + blockIdx.z * batch_stride + blockIdx.y * head_stride + (first + position) * token_stride;
#pragma unroll
    for (int i = 0; i < D; i += kSharedLine / static_cast<int>(sizeof(T))) prefetch_l2(row + i);
  };
  const PartChoice choice = choose_by_logits<D>(source, shared, part, target, [&](u32 bits) {
    for_bits(bits, part, [&](int position) {
      fetch(keys, key_batch_stride, key_head_stride, key_token_stride, position);
    });
  });

  // ---- the tokens of this block ----
  const int parts_of_list = gridDim.x, in_front = leading ? min(max(leading[blockIdx.z], 0), first) : 0;
  auto share_of = [&](u64 all, int part) { return static_cast<int>(all * part / parts_of_list); };
  constexpr int PLACING = 4;         // warps that write positions: the first to have no tile
  const u32 told = choice.even ? ask_chosen(target) : 0u;
  int* next = listed + choice.rank;
  for_bits(choice.bits, part, [&](int position) {
    if (choice.even) *next++ = position;
    fetch(values, value_batch_stride, value_head_stride, value_token_stride, position);
  });
  OwnTokens own;
  if (choice.even) {                 // those of its part, and a share of the leading ones
    const int slot = share_of(in_front, blockIdx.x), of_part = static_cast<int>(choice.of_part);
    own = {listed, first, of_part, slot, of_part + share_of(in_front, blockIdx.x + 1) - slot};
    __syncthreads();
    if (threadIdx.x >= kThreads - 32 * PLACING)
      write_positions(target, told, of_part, [&](int* positions) {
#pragma unroll 1
        for (int i = threadIdx.x - (kThreads - 32 * PLACING); i < of_part; i += 32 * PLACING) positions[i] = listed[i];
      });
  } else {                           // a share of all, which other blocks may have written
    const u32 list_id = blockIdx.z * gridDim.y + blockIdx.y;
    u32* const placed = &rendezvous[list_id].placed;
    write_positions(target, part, choice);
    __syncthreads();
    if (threadIdx.x == 0 && take_ticket(placed) != gridDim.x - 1) wait_for_tickets(placed, gridDim.x);
    __syncthreads();
    const int chosen = static_cast<int>(warp_sum(wait_for_chosen(target, ask_chosen(target))));
    const u64 all = static_cast<u64>(chosen) + in_front;
    const int from = share_of(all, blockIdx.x), share_size = share_of(all, blockIdx.x + 1) - from;
    const int of_list = min(max(chosen - from, 0), share_size);
    const int* positions = indices + static_cast<u64>(list_id) * tokens + from;
    own = {positions, first, of_list, max(from - chosen, 0), share_size};
    if (of_list <= static_cast<int>(kEvenMost)) {
      for (int i = threadIdx.x; i < of_list; i += kThreads) listed[i] = __ldcg(positions + i);
      own.list = listed;
      __syncthreads();
    }
  }
  // What indices were read before is read again: registers are scarce from here on.
  const ThreadPlace place = thread_place_again();
  const bool is_last = attend<T, D, 8, kWarps>(
      {typed_query, keys, values, output, lse, partial_output, partial_statistics, tickets, nullptr, nullptr,
       key_batch_stride, key_head_stride, key_token_stride, value_batch_stride, value_head_stride, value_token_stride,
       group, scale_log2, output_float32},
      own, place.y, reinterpret_cast<uint4*>(shared), reinterpret_cast<const uint4*>(queries), place);
  if (is_last && place.thread < 32) clear_top_p(target, group, place);
}

}  // namespace kvb

#define KVB_EXPORT_TYPE(T)                                \
  KVB_EXPORT(112, kvb::rabitq_encode_kernel<T, 64>)       \
  KVB_EXPORT(168, kvb::rabitq_encode_kernel<T, 128>)      \
  KVB_EXPORT(255, kvb::rabitq_encode_kernel<T, 256>)
KVB_EXPORT_TYPE(float)
KVB_EXPORT_TYPE(__half)
KVB_EXPORT_TYPE(__nv_bfloat16)
#define KVB_EXPORT_ATTENTION(T)                           \
  KVB_EXPORT(128, kvb::rabitq_attention_kernel<T, 64>)    \
  KVB_EXPORT(128, kvb::rabitq_attention_kernel<T, 128>)
KVB_EXPORT_ATTENTION(__half)
KVB_EXPORT_ATTENTION(__nv_bfloat16)
#define KVB_EXPORT_SIZE(D, ONE, TWO, FOUR)                \
  KVB_EXPORT(128, kvb::rabitq_top_p_kernel<D>)            \
  KVB_EXPORT(64, kvb::rabitq_quantize_kernel<D>)          \
  KVB_EXPORT(ONE, kvb::rabitq_score_kernel<D, 1>)         \
  KVB_EXPORT(TWO, kvb::rabitq_score_kernel<D, 2>)         \
  KVB_EXPORT(FOUR, kvb::rabitq_score_kernel<D, 4>)
KVB_EXPORT_SIZE(64, 80, 128, 168)
KVB_EXPORT_SIZE(128, 80, 128, 184)
KVB_EXPORT_SIZE(256, 80, 128, 216)
