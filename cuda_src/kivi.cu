// KIVI: vectors to integers in small groups and back, logits on the integers, decode attention.
// Reference: reference/kivi.py; where a bit lies: there, and kvb/kivi_codes.cuh.
//
// kivi_encode_keys_kernel: one pass, groups of 32, 64 or 128 tokens of one channel.
//   Work     A block takes 128 tokens of all channels, as many as the largest group; a warp 32 of them (D = 256: 16).
//            The warps of a group exchange its extremes in shared memory.  A lane has 16 channels, four quads (kvb/
//            kivi_codes.cuh), of up to 8 of the tokens: its codes of a token are one word of 2 bits, or two of 4 bits,
//            and no bit comes from another lane.
//   Loads    All tokens of a lane at once, 8 bytes (fp32: 16) a quad; the quads of a row fill its sectors together.
//   Codes    round(clamp((x - m) / s)) without a division: the halves between integers times s, (k + 1/2) s, are exact
//            in fp32, so x - m, rounded to fp32, lies on the same side of them as the rounded quotient does of k + 1/2.
//            bits comparisons find the code; a tie goes to the even one.  NaN is never above anything.
//   Bytes    2 D per token (fp16) read, D bits / 8 + 4 D / group written, once: 352 at D = 128, 2 bits, groups of 32.
//   Counts   By hand, per number: half a conversion, a subtraction, 2 comparisons with their thresholds, 2 insertions,
//            3 of minimum and maximum, 3 of s and m, 2 of moves: 15 instructions of a lane for 2 bits, 20 for 4.
//            3.3e7 numbers (32768 tokens x 8 heads of 128) are 29 us of issue slots on 132 multiprocessors at 1.75 GHz,
//            2.4 warp instructions a cycle; memory takes 27 us at 3 TB/s; measured 38.9.
//
// kivi_encode_values_kernel: the same with groups of 32, 64 or 128 channels of one token.  A warp takes 4 times 512 / D
//   tokens.
//   Groups   Extremes are exchanged by shuffles, least and greatest as one pair of fp16, so that each lane ends with
//            one group; it works out what codes the group and hands it to the lanes that share it.
//   Codes    Of 2 bits: x - m, rounded to fp32, grows with x, so that there is a least fp16 with the code 1, with 2,
//            with 3, found once per group; then three comparisons of pairs and three operations code two numbers.
//   Counts   By hand, per 16 numbers of a lane, 2 bits: 16 to leave out Inf, 24 for extremes, 14 to exchange them, 65
//            for s, m and thresholds, 8 shuffles, 60 for codes, 30 for places: 220.
//   Tried    32768 tokens x 8 heads on an H100: comparisons with m and s in fp32, every lane working out all its
//            groups, 57.7 us; this version 43.1.
//
// kivi_decode_kernel: the same in reverse; s c + m is one fused multiplication and addition: s c is exact.
//
// kivi_logits_kernel: a lane per token, sums of all query heads of the group in registers.
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/kivi_attention.cuh"
#include "kvb/kivi_codes.cuh"
#include "kvb/rows.cuh"

namespace kvb {

constexpr int kKiviBlockWarps = 4;   // of encoders and decoder
constexpr int kValueSteps = 4;       // rows that a lane of the value encoder has under way
constexpr int kMostQueries = 16;

// How a warp holds rows: LANES lanes share one, ROWS rows at a time; lane l of a row has the quads 4 l ... 4 l + 3.
template <int D>
struct KiviLanes {
  static constexpr int LANES = D / 16, ROWS = 32 / LANES, U = D / 32;
  // Quads j and j + GROUPS of a lane are of the same 32 channels, as those of lanes a multiple of APART from it.
  static constexpr int GROUPS = U < 4 ? U : 4, APART = U > 4 ? U / 4 : 1;
};
// Tokens of a lane of the key encoder; its warps, which have 128 tokens in all; its blocks that share a multiprocessor,
// as many as registers allow.
template <int D>
struct KeyTile {
  static constexpr int TOKENS = D == 64 ? 4 : 8, WARP_TOKENS = TOKENS * KiviLanes<D>::ROWS, WARPS = 128 / WARP_TOKENS;
  static constexpr int BLOCKS = D == 64 ? 3 : D == 128 ? 2 : 1;
};
// Four channels as two pairs of fp16.
struct Quad {
  u32 pair[2];
};

template <class T>
constexpr bool kHasFloat16 = false;
template <>
constexpr bool kHasFloat16<__half> = true;

// Finite numbers saturate; NaN and Inf stay.
__device__ __forceinline__ float saturated(float x) {
  return fabsf(x) < infinity() ? fminf(fmaxf(x, -65504.f), 65504.f) : x;
}
// Four channels of x, as fp16.
template <class T>
__device__ __forceinline__ Quad load_quad(const T* x) {
  const uint2 both = load_once(reinterpret_cast<const uint2*>(x));
  if constexpr (kHasFloat16<T>) return {{both.x, both.y}};
  const float2 first = unpack_pair<__nv_bfloat16>(both.x), second = unpack_pair<__nv_bfloat16>(both.y);
  return {{pack_pair<__half>(saturated(first.x), saturated(first.y)),
           pack_pair<__half>(saturated(second.x), saturated(second.y))}};
}
template <>
__device__ __forceinline__ Quad load_quad<float>(const float* x) {
  const float4 all = *reinterpret_cast<const float4*>(x);
  return {{pack_pair<__half>(saturated(all.x), saturated(all.y)),
           pack_pair<__half>(saturated(all.z), saturated(all.w))}};
}
// The quads of lane l in COUNT rows; row(i) is where row i begins, in elements.
template <class T, int D, int COUNT, class Row>
__device__ __forceinline__ void load_rows(Quad (&values)[COUNT][4], const void* x, int l, const Row& row) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const T* from = static_cast<const T*>(x) + row(i);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[i][j] = load_quad<T>(from + kivi_channel<D>(4 * l + j));
    if (sizeof(T) == 4 && i % 2) __syncwarp();   // numbers of 32 bits: not more at a time than registers hold
  }
}
template <int D, int COUNT, class Row>
__device__ __forceinline__ void load_rows(Quad (&values)[COUNT][4], const void* x, int type, int l, const Row& row) {
  if (type == 0) load_rows<float, D>(values, x, l, row);
  else if (type == 1) load_rows<__half, D>(values, x, l, row);
  else load_rows<__nv_bfloat16, D>(values, x, l, row);
}

// Least and greatest of pairs of fp16, which leave NaN out; NaN without a number.
__device__ __forceinline__ u32 least_pair(u32 x, u32 y) {
  const __half2 least = __hmin2(*reinterpret_cast<__half2*>(&x), *reinterpret_cast<__half2*>(&y));
  return *reinterpret_cast<const u32*>(&least);
}
__device__ __forceinline__ u32 greatest_pair(u32 x, u32 y) {
  const __half2 greatest = __hmax2(*reinterpret_cast<__half2*>(&x), *reinterpret_cast<__half2*>(&y));
  return *reinterpret_cast<const u32*>(&greatest);
}
// Inf becomes NaN: x + 0 x.
__device__ __forceinline__ u32 finite_pair(u32 x) {
  const __half2 pair = *reinterpret_cast<__half2*>(&x), sum = __hadd2(__hmul2(pair, __float2half2_rn(0.f)), pair);
  return *reinterpret_cast<const u32*>(&sum);
}
constexpr u32 kNoPair = 0x7fff7fffu;   // NaN

// m and s of a group, which is nothing but NaN where `low` is; a zero is +0.
struct KiviGroup {
  float minimum, scale;
};
template <int BITS>
__device__ __forceinline__ KiviGroup group_of(float low, float high) {
  if (!(low <= high)) return {0.f, 0.f};
  // The quotient by qmax, correctly rounded: Markstein's correction of a product with the rounded inverse.  (Tried for
  // every fp32 of four binades.  A division calls a subroutine for what does not occur here, and spills registers.)
  constexpr float QMAX = (1 << BITS) - 1, INVERSE = 1.f / QMAX;
  const float x = high - low, quotient = x * INVERSE;
  const __half scale = __float2half_rn(fmaf(fmaf(-quotient, QMAX, x), INVERSE, quotient));
  return {low + 0.f, __half2float(scale) + 0.f};
}

// The code of x, `low` bits up.  step : s, or NaN for s = 0
template <int BITS>
__device__ __forceinline__ u32 code_of(float x, float minimum, float step, int low) {
  const float above = x - minimum;
  float base = 0.f;   // of the code so far, times s
  u32 code = 0;
#pragma unroll
  for (int bit = BITS - 1; bit >= 0; --bit) {
    const float threshold = fmaf(static_cast<float>(1 << bit) - 0.5f, step, base);
    const bool taken = bit ? above >= threshold : above > threshold;   // k + 1/2 goes to the even one
    if (taken) {
      code |= 1u << (low + bit);
      base = fmaf(static_cast<float>(1 << bit), step, base);
    }
  }
  return code;
}
__device__ __forceinline__ float step_of(float scale) { return scale > 0.f ? scale : infinity() - infinity(); }

// Stores the words of a lane's 16 numbers of one row.
template <int WORDS>
__device__ __forceinline__ void store_lane_words(u32* row, int l, const u32 (&words)[WORDS]) {
  if constexpr (WORDS == 1) row[l] = words[0];
  else *reinterpret_cast<uint2*>(row + 2 * l) = make_uint2(words[0], words[1]);
}

// ---- encode ---------------------------------------------------------------------------------------------------------

// Quad by quad, from the last one on, in a loop that is not unrolled: then few s and m are held at a time, and the code
// is short.  The quads move up in their registers meanwhile, and so do the fields in their words.
template <int BITS, int D>
__device__ __forceinline__ void encode_key_tile(Quad (&x)[KeyTile<D>::TOKENS][4], Quad (&low)[4], Quad (&high)[4],
                                                u32* codes, __half* scale, __half* minimum, int l, int r) {
  constexpr int TOKENS = KeyTile<D>::TOKENS, WORDS = BITS / 2;
  u32 words[TOKENS][WORDS] = {};
#pragma unroll 1
  for (int j = 3; j >= 0; --j) {
    if (WORDS == 2 && j == 1)   // the second word is complete
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) words[i][WORDS - 1] = words[i][0], words[i][0] = 0;
    u32 scales[2], minima[2];
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) words[i][0] <<= 2 * BITS;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const float2 from = unpack_pair<__half>(low[3].pair[v]), to = unpack_pair<__half>(high[3].pair[v]);
      const KiviGroup first = group_of<BITS>(from.x, to.x), second = group_of<BITS>(from.y, to.y);
      scales[v] = pack_pair<__half>(first.scale, second.scale);
      minima[v] = pack_pair<__half>(first.minimum, second.minimum);
      const float first_step = step_of(first.scale), second_step = step_of(second.scale);
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) {
        const float2 pair = unpack_pair<__half>(x[i][3].pair[v]);
        words[i][0] |= code_of<BITS>(pair.x, first.minimum, first_step, BITS * v) |
                       code_of<BITS>(pair.y, second.minimum, second_step, BITS * v + 16);
      }
    }
    const int channel = kivi_channel<D>(4 * l + j);
    if (scale && r == 0) *reinterpret_cast<uint2*>(scale + channel) = make_uint2(scales[0], scales[1]);
    if (minimum && r == 1) *reinterpret_cast<uint2*>(minimum + channel) = make_uint2(minima[0], minima[1]);
#pragma unroll
    for (int k = 3; k > 0; --k) {
      low[k] = low[k - 1], high[k] = high[k - 1];
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) x[i][k] = x[i][k - 1];
    }
  }
#pragma unroll
  for (int i = 0; i < TOKENS; ++i)
    store_lane_words(codes + (i * KiviLanes<D>::ROWS + r) * (D * BITS / 32), l, words[i]);
}

// x : (batch, kv_heads, tokens, D) of type 0 float, 1 fp16, 2 bf16; rows contiguous and at multiples of 16 bytes,
//     strides in elements; tokens in whole groups
// codes : (batch, kv_heads, tokens, D bits / 32)
// scale, minimum : (batch, kv_heads, tokens / group, D), with the same strides
// bits : 2 or 4        group : 32, 64 or 128        rows = batch * kv_heads * tokens
template <int D>
__global__ void __launch_bounds__(32 * KeyTile<D>::WARPS, KeyTile<D>::BLOCKS)
    kivi_encode_keys_kernel(const void* __restrict__ x, int type, u64 x_batch_stride, u64 x_head_stride,
                            u64 x_token_stride, u32* codes, __half* scale, __half* minimum, u64 batch_stride,
                            u64 head_stride, u64 scale_batch_stride, u64 scale_head_stride, int bits, int group,
                            int kv_heads, int tokens, u32 rows) {
  using Lanes = KiviLanes<D>;
  using Tile = KeyTile<D>;
  constexpr int TOKENS = Tile::TOKENS;
  KVB_SHARED(u32, extremes, [2][Tile::WARPS][D / 2]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, l = lane % Lanes::LANES, r = lane / Lanes::LANES;
  const u32 first = (blockIdx.x * Tile::WARPS + warp) * Tile::WARP_TOKENS;
  const bool present = first < rows;
  const RowPlace place = place_of(present ? first : 0, kv_heads, tokens);
  const u64 source = place.batch * x_batch_stride + place.head * x_head_stride + place.token * x_token_stride;

  Quad values[TOKENS][4], low[4], high[4];
  load_rows<D>(values, x, type, l, [&](int i) { return source + (i * Lanes::ROWS + r) * x_token_stride; });
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      u32 least = kNoPair, greatest = kNoPair;
#pragma unroll
      for (int i = 0; i < TOKENS; ++i) {
        const u32 pair = finite_pair(values[i][j].pair[v]);
        least = least_pair(least, pair);
        greatest = greatest_pair(greatest, pair);
      }
#pragma unroll
      for (int distance = Lanes::LANES; distance < 32; distance *= 2) {
        least = least_pair(least, __shfl_xor_sync(0xffffffffu, least, distance));
        greatest = greatest_pair(greatest, __shfl_xor_sync(0xffffffffu, greatest, distance));
      }
      low[j].pair[v] = least;
      high[j].pair[v] = greatest;
    }
  const int sharing = group / Tile::WARP_TOKENS;   // warps of a group
  if (sharing > 1) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int v = 0; v < 2; ++v)
        if (r == 0) {
          extremes[0][warp][8 * l + 2 * j + v] = low[j].pair[v];
          extremes[1][warp][8 * l + 2 * j + v] = high[j].pair[v];
        }
    __syncthreads();
    const int begin = warp / sharing * sharing;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int v = 0; v < 2; ++v)
        for (int other = begin; other < begin + sharing; ++other) {
          low[j].pair[v] = least_pair(low[j].pair[v], extremes[0][other][8 * l + 2 * j + v]);
          high[j].pair[v] = greatest_pair(high[j].pair[v], extremes[1][other][8 * l + 2 * j + v]);
        }
  }
  if (!present) return;
  const u64 group_row = place.batch * scale_batch_stride + place.head * scale_head_stride +
                        static_cast<u64>(place.token / group) * D;
  const bool stores = warp % sharing == 0;   // the first warp of a group stores its scales
  codes += place.batch * batch_stride + place.head * head_stride + static_cast<u64>(place.token) * (D * bits / 32);
  __half *const scales = stores ? scale + group_row : nullptr, *const minima = stores ? minimum + group_row : nullptr;
  if (bits == 2) encode_key_tile<2, D>(values, low, high, codes, scales, minima, l, r);
  else encode_key_tile<4, D>(values, low, high, codes, scales, minima, l, r);
}

// The least fp16 whose distance from `minimum`, rounded to fp32, is `distance` or more (strict: is more).  The last bit
// of `distance` is 0, so what lies half way between it and its neighbour is rounded to it.  NaN for NaN.
__device__ __forceinline__ u32 least_at(float minimum, float distance, bool strict) {
  const float neighbour = __uint_as_float(__float_as_uint(distance) + (strict ? 1u : ~0u));
  const float sum = minimum + distance, part = sum - minimum;
  const float rest = (minimum - (sum - part)) + (distance - part);   // sum + rest is exact (Knuth)
  const float beyond = rest + 0.5f * (neighbour - distance);         // of `sum`, where what is asked for begins
  const __half least = __float2half_ru(sum);
  const u32 bits = __half_as_ushort(least);
  const bool next = __half2float(least) == sum && (strict ? beyond >= 0.f : beyond > 0.f);
  return !next ? bits : bits & 0x8000u ? bits - 1 : bits + 1;
}

// What tells the codes of a group of values from each other, in words that one lane works out and others get.
//   2 bits   the three least fp16 with the codes 1, 2 and 3: three comparisons of pairs code two numbers
//   4 bits   m and s
template <int BITS>
struct ValueCoder {
  static constexpr int WORDS = BITS == 2 ? 2 : 1;
  u32 words[WORDS];

  __device__ __forceinline__ void set(const KiviGroup& group) {
    const float m = group.minimum, s = step_of(group.scale);
    if constexpr (BITS == 2) {   // a tie goes to the even code
      words[0] = least_at(m, 0.5f * s, true) | least_at(m, 1.5f * s, false) << 16;
      words[1] = least_at(m, 2.5f * s, true);
    } else {
      words[0] = pack_pair<__half>(m, s);
    }
  }
  // The codes of two numbers, `low` bits up in each half of a word.
  __device__ __forceinline__ u32 codes(u32 pair, int low) const {
    if constexpr (BITS == 2) {
      auto reached = [&](u32 word, u32 selector) {
        const u32 both = permute_bytes(word, 0, selector);
        return __hge2_mask(*reinterpret_cast<const __half2*>(&pair), *reinterpret_cast<const __half2*>(&both));
      };
      const u32 one = reached(words[0], 0x1010u), two = reached(words[0], 0x3232u), three = reached(words[1], 0x1010u);
      return (((one & ~two) | three) & 0x00010001u << low) | (two & 0x00020002u << low);
    } else {
      const float2 x = unpack_pair<__half>(pair), group = unpack_pair<__half>(words[0]);
      return code_of<BITS>(x.x, group.x, group.y, low) | code_of<BITS>(x.y, group.x, group.y, low + 16);
    }
  }
};

// The codes of a lane's 16 numbers of one row; all lanes of a warp together.
// own : the group that the lane works out for those that share it        present : whether there is such a row
template <int BITS, int D>
__device__ __forceinline__ void encode_value_row(const Quad (&x)[4], const KiviGroup& own, bool present, u32* codes,
                                                 int lane) {
  using Lanes = KiviLanes<D>;
  constexpr int FIELDS = kKiviFields<BITS>;
  const int l = lane % Lanes::LANES;
  ValueCoder<BITS> worked_out, coders[Lanes::GROUPS];
  worked_out.set(own);
#pragma unroll
  for (int a = 0; a < Lanes::GROUPS; ++a)
#pragma unroll
    for (int w = 0; w < ValueCoder<BITS>::WORDS; ++w)
      coders[a].words[w] =
          __shfl_sync(0xffffffffu, worked_out.words[w], lane - l + a * Lanes::APART + l % Lanes::APART);
  if (!present) return;
  u32 words[8 / FIELDS] = {};
#pragma unroll
  for (int n = 0; n < 8; ++n)   // pair n % 2 of quad n / 2
    words[n / FIELDS] |= coders[n / 2 % Lanes::GROUPS].codes(x[n / 2].pair[n % 2], BITS * (n % FIELDS));
  store_lane_words(codes, l, words);
}

// As for keys, but scale, minimum : (batch, kv_heads, tokens, D / group), any number of tokens.
template <int D>
__global__ void __launch_bounds__(32 * kKiviBlockWarps)
    kivi_encode_values_kernel(const void* __restrict__ x, int type, u64 x_batch_stride, u64 x_head_stride,
                              u64 x_token_stride, u32* codes, __half* scale, __half* minimum, u64 batch_stride,
                              u64 head_stride, u64 scale_batch_stride, u64 scale_head_stride, int bits, int group,
                              int kv_heads, int tokens, u32 rows) {
  using Lanes = KiviLanes<D>;
  constexpr int GROUPS = Lanes::GROUPS, APART = Lanes::APART;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, l = lane % Lanes::LANES, r = lane / Lanes::LANES;
  const u32 first = (blockIdx.x * kKiviBlockWarps + warp) * (kValueSteps * Lanes::ROWS) + r;
  Quad values[kValueSteps][4];
  load_rows<D>(values, x, type, l, [&](int i) {
    const RowPlace place = place_of(min(first + i * Lanes::ROWS, rows - 1), kv_heads, tokens);   // the last again
    return place.batch * x_batch_stride + place.head * x_head_stride + place.token * x_token_stride;
  });
#pragma unroll
  for (int i = 0; i < kValueSteps; ++i) {
    u32 extremes[GROUPS];   // (least, -greatest) of 32 channels
#pragma unroll
    for (int a = 0; a < GROUPS; ++a) {
      u32 least = kNoPair, greatest = kNoPair;
#pragma unroll
      for (int j = a; j < 4; j += GROUPS)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const u32 pair = finite_pair(values[i][j].pair[v]);
          least = least_pair(least, pair);
          greatest = greatest_pair(greatest, pair);
        }
      greatest ^= 0x80008000u;
      extremes[a] = least_pair(permute_bytes(least, greatest, 0x5410u), permute_bytes(least, greatest, 0x7632u));
    }
    // Each exchange halves the groups that a lane keeps; in the end it has one, over all lanes.
#pragma unroll
    for (int distance = APART; distance < Lanes::LANES; distance *= 2) {
      const int kept = GROUPS * APART / (2 * distance);
      if (kept == 0) extremes[0] = least_pair(extremes[0], __shfl_xor_sync(0xffffffffu, extremes[0], distance));
#pragma unroll
      for (int k = 0; k < kept; ++k) {
        const u32 even = extremes[2 * k], odd = extremes[2 * k + 1];
        extremes[k] = least_pair(l & distance ? odd : even,
                                 __shfl_xor_sync(0xffffffffu, l & distance ? even : odd, distance));
      }
    }
    for (int parts = 2, distance = APART; parts <= group / 32; parts *= 2, distance *= 2)   // larger groups
      extremes[0] = least_pair(extremes[0], __shfl_xor_sync(0xffffffffu, extremes[0], distance));
    const float2 both = unpack_pair<__half>(extremes[0]);
    const KiviGroup own = bits == 2 ? group_of<2>(both.x, -both.y) : group_of<4>(both.x, -both.y);

    const u32 row = first + i * Lanes::ROWS;
    const bool present = row < rows;
    const RowPlace place = place_of(present ? row : rows - 1, kv_heads, tokens);
    const int a = l / APART % GROUPS, u = 4 * l % Lanes::U + a;   // 32 channels u
    if (present && l < APART * GROUPS && u % (group / 32) == 0) {
      const u64 at = place.batch * scale_batch_stride + place.head * scale_head_stride +
                     static_cast<u64>(place.token) * (D / group) + u / (group / 32);
      scale[at] = __float2half_rn(own.scale);
      minimum[at] = __float2half_rn(own.minimum);
    }
    u32* to = codes + place.batch * batch_stride + place.head * head_stride +
              static_cast<u64>(place.token) * (D * bits / 32);
    if (bits == 2) encode_value_row<2, D>(values[i], own, present, to, lane);
    else encode_value_row<4, D>(values[i], own, present, to, lane);
  }
}

// ---- decode ---------------------------------------------------------------------------------------------------------

// s and m of channels `channel` ... + 3 of a token, four numbers each: of keys one each, of values one for all.
struct QuadGroups {
  float4 scale, minimum;
};
__device__ __forceinline__ QuadGroups quad_groups(const __half* scale, const __half* minimum, int channel, int group,
                                                  bool per_channel) {
  auto four = [&](const __half* x) {
    if (!per_channel) {
      const float one = __half2float(x[channel / group]);
      return make_float4(one, one, one, one);
    }
    const uint2 both = *reinterpret_cast<const uint2*>(x + channel);
    const float2 first = unpack_pair<__half>(both.x), second = unpack_pair<__half>(both.y);
    return make_float4(first.x, first.y, second.x, second.y);
  };
  return {four(scale), four(minimum)};
}
// s c + m of quad k, whose word of the row is `word`.
__device__ __forceinline__ float4 decoded_quad(u32 word, int k, int bits, const QuadGroups& groups) {
  const int low = bits * (2 * k % (16 / bits));
  const u32 mask = (1u << bits) - 1;
  auto code = [&](int at) { return static_cast<float>(word >> at & mask); };
  return make_float4(fmaf(groups.scale.x, code(low), groups.minimum.x),
                     fmaf(groups.scale.y, code(low + 16), groups.minimum.y),
                     fmaf(groups.scale.z, code(low + bits), groups.minimum.z),
                     fmaf(groups.scale.w, code(low + bits + 16), groups.minimum.w));
}

// y : (rows, D) of type 0 float, 1 fp16, 2 bf16, at a multiple of 16 bytes        per_channel : keys, not values
template <int D>
__global__ void __launch_bounds__(32 * kKiviBlockWarps)
    kivi_decode_kernel(const u32* __restrict__ codes, const __half* __restrict__ scale,
                       const __half* __restrict__ minimum, u64 batch_stride, u64 head_stride, u64 scale_batch_stride,
                       u64 scale_head_stride, int bits, int group, int per_channel, void* y, int type, int kv_heads,
                       int tokens, u32 rows) {
  using Lanes = KiviLanes<D>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, l = lane % Lanes::LANES;
  const u32 stride = gridDim.x * kKiviBlockWarps * Lanes::ROWS;
  u32 row = (blockIdx.x * kKiviBlockWarps + warp) * Lanes::ROWS + lane / Lanes::LANES;
  while (row < rows) {
    const RowPlace place = place_of(row, kv_heads, tokens);
    const u32* from = codes + place.batch * batch_stride + place.head * head_stride +
                      static_cast<u64>(place.token) * (D * bits / 32);
    const u64 group_row = per_channel ? static_cast<u64>(place.token / group) * D
                                      : static_cast<u64>(place.token) * (D / group);
    const u64 at = place.batch * scale_batch_stride + place.head * scale_head_stride + group_row;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int k = 4 * l + j, channel = kivi_channel<D>(k);
      const float4 x = decoded_quad(from[2 * k * bits / 16], k, bits,
                                    quad_groups(scale + at, minimum + at, channel, group, per_channel));
      const u64 to = static_cast<u64>(row) * D + channel;
      if (type == 0) {
        *reinterpret_cast<float4*>(static_cast<float*>(y) + to) = x;
      } else {
        const uint2 packed = type == 1 ? make_uint2(pack_pair<__half>(x.x, x.y), pack_pair<__half>(x.z, x.w))
                                       : make_uint2(pack_pair<__nv_bfloat16>(x.x, x.y),
                                                    pack_pair<__nv_bfloat16>(x.z, x.w));
        *reinterpret_cast<uint2*>(static_cast<u16*>(y) + to) = packed;
      }
    }
    if (rows - row <= stride) break;
    row += stride;
  }
}

// ---- logits ---------------------------------------------------------------------------------------------------------

// out[b, kv_head * heads + h, t] = softmax_scale <q_h, s c_t + m>
// query : (batch, kv_heads * heads, D), type 0 float, 1 fp16, 2 bf16        out : (batch, kv_heads * heads, tokens)
// Grid (blocks, kv_heads, batch); heads <= 16.  Other arguments as for decode, of keys.
template <int D>
__global__ void __launch_bounds__(256, 2)
    kivi_logits_kernel(const void* __restrict__ query, int query_type, const u32* __restrict__ codes,
                       const __half* __restrict__ scale, const __half* __restrict__ minimum, u64 batch_stride,
                       u64 head_stride, u64 scale_batch_stride, u64 scale_head_stride, int bits, int group,
                       float softmax_scale, float* out, int tokens, int heads) {
  KVB_SHARED(float, queries, [kMostQueries * D]);
  const u64 pair = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  for (int i = threadIdx.x; i < heads * D; i += 256)
    queries[i] = load_float(query, query_type, pair * heads * D + i) * softmax_scale;
  __syncthreads();
  for (int t = blockIdx.x * 256 + threadIdx.x; t < tokens; t += gridDim.x * 256) {
    const u32* from = codes + blockIdx.z * batch_stride + blockIdx.y * head_stride +
                      static_cast<u64>(t) * (D * bits / 32);
    const u64 at = blockIdx.z * scale_batch_stride + blockIdx.y * scale_head_stride + static_cast<u64>(t / group) * D;
    float sums[kMostQueries] = {};
#pragma unroll 1
    for (int k = 0; k < D / 4; ++k) {
      const int channel = kivi_channel<D>(k);
      const float4 x = decoded_quad(from[2 * k * bits / 16], k, bits,
                                    quad_groups(scale + at, minimum + at, channel, group, true));
#pragma unroll
      for (int h = 0; h < kMostQueries; ++h)
        if (h < heads) {
          const float4 q = *reinterpret_cast<const float4*>(queries + h * D + channel);
          sums[h] = fmaf(q.x, x.x, fmaf(q.y, x.y, fmaf(q.z, x.z, fmaf(q.w, x.w, sums[h]))));
        }
    }
#pragma unroll
    for (int h = 0; h < kMostQueries; ++h)
      if (h < heads) out[(pair * heads + h) * tokens + t] = sums[h];
  }
}

}  // namespace kvb

#define KVB_EXPORT_CODES(D, REGISTERS)                    \
  KVB_EXPORT(REGISTERS, kvb::kivi_encode_keys_kernel<D>)  \
  KVB_EXPORT(128, kvb::kivi_encode_values_kernel<D>)      \
  KVB_EXPORT(64, kvb::kivi_decode_kernel<D>)              \
  KVB_EXPORT(128, kvb::kivi_logits_kernel<D>)
KVB_EXPORT_CODES(64, 168)
KVB_EXPORT_CODES(128, 255)
KVB_EXPORT_CODES(256, 255)

#define KVB_EXPORT_ATTENTION(D, HEADS, REGISTERS)                        \
  KVB_EXPORT(REGISTERS, kvb::kivi_attention_kernel<D, HEADS, 2, 2>)      \
  KVB_EXPORT(REGISTERS, kvb::kivi_attention_kernel<D, HEADS, 2, 4>)      \
  KVB_EXPORT(REGISTERS, kvb::kivi_attention_kernel<D, HEADS, 4, 2>)      \
  KVB_EXPORT(REGISTERS, kvb::kivi_attention_kernel<D, HEADS, 4, 4>)
KVB_EXPORT_ATTENTION(64, 8, 255)
KVB_EXPORT_ATTENTION(64, 16, 255)
KVB_EXPORT_ATTENTION(128, 8, 255)
KVB_EXPORT_ATTENTION(128, 16, 255)
KVB_EXPORT_ATTENTION(256, 8, 255)
