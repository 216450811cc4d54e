// TurboQuant: vectors to codes in bit planes and back, and logits on the codes.
// Reference: reference/turboquant.py; where a bit lies: reference/planes.py.
//
// turboquant_encode_kernel: rotate, normalise, code, pack, in one pass.
//   Work     A lane has a whole row in registers (kvb/row_tiles.cuh).  A warp, which is a block, takes 32 (16) rows, a
//            tile, at a time and walks over the rows with a grid stride.
//   Loads    Whole rows, by cp.async into a tile of shared memory.  Once the tile stands in registers, the next one is
//            fetched into the same memory while this one is worked on.
//   Norm     |y| of the rotated vector, not scaled: remaining_scale cancels in z = sqrt(D) y / |y|, and the boundaries
//            are multiplied by |y| / sqrt(D) instead of the coordinates by its inverse.  A power of two per row brings
//            the largest coordinate near 1 beforehand where squares might leave the range of float (not for float16
//            without a mean).  NaN or Inf anywhere make |y| NaN or Inf: no other test is needed.
//   Codes    A decision is the sign of a difference, and one funnel shift appends that bit to a word.  An interval,
//            t_i < |v| < t_k, is one decision too: the sign of ||v| - (t_i + t_k)/2| - (t_k - t_i)/2.  So magnitudes
//            come out as a Gray code, with 1, 2 and 4 decisions for 2, 3 and 4 bits; exclusive ors of whole words turn
//            it into binary numbers.  5 to 8 bits search the boundaries in shared memory, which is slow.
//   Scale    "nc" needs |c|^2 only, a sum over counts of magnitudes: population counts of the words.  "mse" and
//            "unbiased" take the path of 5 to 8 bits, which looks every centroid up.
//   Bytes    D * sizeof(T) read and D bits / 8 + 2 written per row, once: 2448 per 8 rows of 128, fp16, 3 bits.
//   Counts   Instructions of a warp per tile of 32 rows of 128, fp16, 3 bits, three rounds, "nc", in the machine code
//            for sm_90: loads 146 (128 of them conversions), copies of the next tile 136, rotation 3 * 1000 (768 FADD,
//            129 FFMA, 63 FMUL, 32 LDS), norm 159, codes and counts 881 (384 SHF, 386 FFMA), places, scale and stores
//            175: 4500, 1125 per 8 rows, 281 issue cycles of an SM.  Memory takes 183 for them at 3 TB/s on 132 SMs at
//            1.7 GHz: bound by issue slots, at 65 % of that bandwidth at most.  The rotation alone takes 187; with four
//            lanes a row, as in rotation.cu, it would take 240.
//   Measured H100, 32K tokens x 8 heads of 128, fp16, 3 bits: 70 us, 38 % of the bandwidth of a copy; 2.6 instructions
//            a cycle of 4.  Warps wait for instructions 15 % of their time (the hot code is 45 KB, and each of the 12
//            warps is somewhere else in it), and 15 % for tiles, one of which is under way per warp.  One token x 8
//            heads: 8.9 us in a graph, 15.6 with cold caches.
//
// turboquant_decode_kernel: the same in reverse; the codes are looked up in a table of 16 centroids in shared memory,
//   one bank each (256 entries for more than 4 bits), and the result leaves through the tile in whole rows.
//
// turboquant_logits_kernel: a lane per token, sums of all query heads of the group in registers.
//
// turboquant_prepare_kernel, turboquant_convert_kernel: what surrounds a dense (Haar) rotation.
#include "kvb/convert.cuh"
#include "kvb/device.cuh"
#include "kvb/hadamard.cuh"
#include "kvb/plane_attention.cuh"
#include "kvb/row_tiles.cuh"

namespace kvb {

// Blocks, of one warp each, that share a multiprocessor: registers allow 12 of 168 or 8 of 255.
template <int D>
constexpr int kEncodeBlocks = D == 256 ? 8 : 12;
template <int D>
constexpr int kDecodeBlocks = D == 64 ? 12 : 8;
constexpr int kMostRounds = 8, kMostMagnitudes = 128, kMostQueries = 16;

// The planes of (batch, kv_heads, tokens); null where the bits lack one.
template <class Word>
struct PlanePointers {
  Word *sign, *mag2[3], *mag1;
};
using CodePlanes = PlanePointers<u32>;
using ConstCodePlanes = PlanePointers<const u32>;

// ---- encode ---------------------------------------------------------------------------------------------------------

// A decision on a = |v|: the sign bit of its value is set where a > t.
struct Boundary {
  float t;
  __device__ __forceinline__ float operator()(float a) const { return t - a; }
};
// The same where low < a < high.
struct Interval {
  float middle, half;
  __device__ __forceinline__ float operator()(float a) const { return fabsf(a - middle) - half; }
};
__device__ __forceinline__ Interval between(float low, float high) {
  return {0.5f * (low + high), 0.5f * (high - low)};
}

// The mag2 words of two magnitude bits of 32 coordinates: [0] of s = 0, 1 and [1] of s = 2, 3 (reference/planes.py).
__device__ __forceinline__ void interleave_bits(u32 low, u32 high, u32& first, u32& second) {
  first = (low & 0x11111111u) | (low & 0x22222222u) << 1 | (high & 0x11111111u) << 1 | (high & 0x22222222u) << 2;
  second = (low & 0x44444444u) >> 2 | (low & 0x88888888u) >> 1 | (high & 0x44444444u) >> 1 | (high & 0x88888888u);
}

// Codes of 1 to 4 bits, at most 4 decisions per coordinate: stores the planes of the row if it is `present`, and
// returns |c|^2.
//   boundaries, magnitudes   in units of z = v / unit          keep   ~0, or 0 for a row whose codes are 0
template <int BITS, int D>
__device__ __forceinline__ float store_codes(const float (&v)[RowTile<D>::OCTETS][8], float unit, u32 keep,
                                             const float* boundaries, const float* magnitudes, const CodePlanes& to,
                                             u64 token, int part, bool present) {
  constexpr int LANES = RowTile<D>::LANES, WORDS = RowTile<D>::WORDS, SUBSETS = 1 << (BITS - 1);
  Boundary outer = {0.f};
  Interval second = {0.f, 0.f}, inner = {0.f, 0.f}, last = {0.f, 0.f};
  if constexpr (BITS >= 2) outer = {boundaries[SUBSETS / 2 - 1] * unit};
  if constexpr (BITS >= 3)
    second = between(boundaries[SUBSETS / 4 - 1] * unit, boundaries[SUBSETS * 3 / 4 - 1] * unit);
  if constexpr (BITS >= 4) {
    inner = between(boundaries[0] * unit, boundaries[2] * unit);
    last = between(boundaries[4] * unit, boundaries[6] * unit);
  }
  // counts[S]: coordinates whose magnitude has all bits of the set S.
  int counts[SUBSETS] = {};
  u32 signs[WORDS], pairs[2 * WORDS], tops[WORDS];
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    u32 negative = 0, gray[3] = {};
#pragma unroll
    for (int e = 7; e >= 0; --e)
#pragma unroll
      for (int i = 4 / LANES - 1; i >= 0; --i) {
        const float x = v[w * (4 / LANES) + i][e], a = fabsf(x);
        append_sign(negative, x, LANES);
        if constexpr (BITS >= 2) append_sign(gray[0], outer(a), LANES);
        if constexpr (BITS >= 3) append_sign(gray[1], second(a), LANES);
        if constexpr (BITS >= 4) append_sign(gray[2], fminf(inner(a), last(a)), LANES);
      }
    signs[w] = whole_word<LANES>(negative & keep, part);
    u32 x[3] = {};   // x[k]: bit k of the magnitudes
#pragma unroll
    for (int k = BITS - 2; k >= 0; --k) {
      const u32 bit = whole_word<LANES>(gray[BITS - 2 - k] & keep, part);
      x[k] = k == BITS - 2 ? bit : bit ^ x[k + 1];
    }
#pragma unroll
    for (int set = 1; set < SUBSETS; ++set) {
      u32 all = 0xffffffffu;
#pragma unroll
      for (int k = 0; k < BITS - 1; ++k)
        if (set >> k & 1) all &= x[k];
      counts[set] += __popc(all);
    }
    if constexpr (BITS >= 3) interleave_bits(x[0], x[1], pairs[2 * w], pairs[2 * w + 1]);
    if constexpr (BITS % 2 == 0) tops[w] = x[BITS - 2];
  }
  if (present && part == 0) {
    store_row(to.sign + token * WORDS, signs);
    if constexpr (BITS % 2 == 0) store_row(to.mag1 + token * WORDS, tops);
  }
  if constexpr (BITS >= 3)
    if (present && part == LANES - 1) store_row(to.mag2[0] + token * (2 * WORDS), pairs);

  // |c|^2 as a sum over sets: the square of a magnitude is the sum of `weight` over the subsets of its bits.
  float weight[SUBSETS], energy = 0.f;
#pragma unroll
  for (int m = 0; m < SUBSETS; ++m) weight[m] = magnitudes[m] * magnitudes[m];
#pragma unroll
  for (int bit = 1; bit < SUBSETS; bit *= 2)
#pragma unroll
    for (int set = 0; set < SUBSETS; ++set)
      if (set & bit) weight[set] -= weight[set ^ bit];
#pragma unroll
  for (int set = 0; set < SUBSETS; ++set)
    energy = fmaf(static_cast<float>(set ? counts[set] : D), weight[set], energy);
  return energy;
}

// Codes of any number of bits by binary search: stores the planes of the row if it is `present`, and returns
// (sum |z| c, |c|^2).  Four searches at a time, a loop over the bits: slower, but as small as the above.
template <int D>
__device__ __forceinline__ float2 search_codes(const float (&v)[RowTile<D>::OCTETS][8], int bits, float inverse_unit,
                                               u32 keep, const float* boundaries, const float* magnitudes,
                                               const CodePlanes& to, u64 token, int part, bool present) {
  constexpr int LANES = RowTile<D>::LANES, WORDS = RowTile<D>::WORDS;
  float inner = 0.f, energy = 0.f;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    u32 sign = 0, top = 0, pairs[3][2] = {};
#pragma unroll
    for (int i = 0; i < 4 / LANES; ++i) {
      const int s = i * LANES + part;
      u32 negative = 0, low = 0, high = 0;   // nibble e: the sign, bits 0 to 3 and bits 4 to 6 of the magnitude
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        float z[4];
        int m[4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) z[k] = fabsf(v[w * (4 / LANES) + i][e + k]) * inverse_unit;
#pragma unroll 1
        for (int step = (1 << (bits - 1)) >> 1; step; step >>= 1)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (z[k] > boundaries[m[k] + step - 1]) m[k] += step;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float c = magnitudes[m[k]];
          inner = fmaf(z[k], c, inner);
          energy = fmaf(c, c, energy);
          if (v[w * (4 / LANES) + i][e + k] < 0.f) negative |= 1u << (4 * (e + k));
          low |= static_cast<u32>(m[k] & 15) << (4 * (e + k));
          high |= static_cast<u32>(m[k] >> 4) << (4 * (e + k));
        }
      }
      sign |= negative << s;
      top |= ((bits < 6 ? low >> (bits - 2 & 3) : high >> (bits - 6)) & 0x11111111u) << s;
      const int half = LANES == 1 ? i / 2 : i;   // s >> 1
      pairs[0][half] |= (low & 0x33333333u) << (2 * (s & 1));
      pairs[1][half] |= (low >> 2 & 0x33333333u) << (2 * (s & 1));
      pairs[2][half] |= (high & 0x33333333u) << (2 * (s & 1));
    }
    // The bits stand in their places already: part 0.
    auto store = [&](u32* plane, u64 index, u32 word) {
      word = whole_word<LANES>(word & keep, 0);
      if (present && part == 0) plane[index] = word;
    };
    store(to.sign, token * WORDS + w, sign);
    if (bits % 2 == 0) store(to.mag1, token * WORDS + w, top);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 3; ++i)
        if (bits >= 3 + 2 * i) store(to.mag2[i], (token * WORDS + w) * 2 + half, pairs[i][half]);
  }
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    inner += __shfl_xor_sync(0xffffffffu, inner, distance);
    energy += __shfl_xor_sync(0xffffffffu, energy, distance);
  }
  return make_float2(inner, energy);
}

// x : (batch, kv_heads, tokens, D), rows contiguous and at multiples of 16 bytes, strides in elements
// signs : (rounds, D), +-2^-floor(log2(D)/2); rounds 0: x is rotated already
// mean : (kv_heads, D) every mean_batch_stride elements, subtracted from x, or null
// factors : (batch, kv_heads, tokens), multiply the scales, or null
// codebook : (2, 128) boundaries, magnitudes            scale_mode : 0 nc, 1 plain, 2 mse, 3 unbiased
// sign, mag2, mag1 : (batch, kv_heads, tokens, words) with strides in tokens, null where the bits lack a plane
// scale : (batch, kv_heads, tokens), the same strides   rows = batch * kv_heads * tokens
template <class T, int D>
__global__ void __launch_bounds__(32, kEncodeBlocks<D>)
    turboquant_encode_kernel(const T* __restrict__ x, u64 x_batch_stride, u64 x_head_stride, u64 x_token_stride,
                             const float* __restrict__ signs, int rounds, float remaining_scale,
                             const float* __restrict__ mean, u64 mean_batch_stride, const float* __restrict__ factors,
                             const float* __restrict__ codebook, int bits, int scale_mode, u32* sign, u32* mag2_0,
                             u32* mag2_1, u32* mag2_2, u32* mag1, __half* scale, u64 batch_stride, u64 head_stride,
                             int kv_heads, int tokens, u32 rows) {
  static_assert(D == 64 || D == 128 || D == 256, "a row divides into lanes of at most 128 coordinates");
  using Tile = RowTile<D>;
  constexpr int LANES = Tile::LANES, OCTETS = Tile::OCTETS;
  constexpr float ROOT = D == 64 ? 0.125f : D == 128 ? 0.08838834764831845f : 0.0625f;   // D^(-1/2)
  KVB_SHARED(float, staged_signs, [kMostRounds * D]);
  KVB_SHARED(float, boundaries, [kMostMagnitudes]);
  KVB_SHARED(float, magnitudes, [kMostMagnitudes]);
  KVB_DYNAMIC_SHARED(char, tile);
  for (int i = threadIdx.x; i < rounds * D; i += blockDim.x) staged_signs[i] = signs[i];
  for (int i = threadIdx.x; i < kMostMagnitudes; i += blockDim.x) {
    boundaries[i] = codebook[i];
    magnitudes[i] = codebook[kMostMagnitudes + i];
  }
  __syncthreads();

  const int lane = threadIdx.x, part = lane % LANES;
  const CodePlanes planes = {sign, {mag2_0, mag2_1, mag2_2}, mag1};
  const char* own_row = tile + lane / LANES * kRowPitch<T, D>;
  const Vectors<T> vectors = {x, x_batch_stride, x_head_stride, x_token_stride, kv_heads, tokens, rows};
  const u32 stride = gridDim.x * Tile::ROWS;

  u32 first = blockIdx.x * Tile::ROWS;
  if (first >= rows) return;   // whole warps, and no barrier follows
  copy_rows<D>(tile, vectors, first, lane);
  for (bool more = true; more; first += stride) {
    cp_async_wait<0>();
    __syncwarp();   // the copies of every lane have landed
    float v[OCTETS][8];
    read_row<D, T>(v, own_row, part);
    __syncwarp();   // every lane has read its row
    more = rows - first > stride;
    if (more) copy_rows<D>(tile, vectors, first + stride, lane);
    // A row beyond the last one counts as the last, and is not stored.
    auto own_place = [&]() { return place_of(min(first + lane / LANES, rows - 1), kv_heads, tokens); };
    if (mean) {
      const RowPlace place = own_place();
      subtract_mean<LANES>(v, mean + place.batch * mean_batch_stride + place.head * D + part * 8);
    }
    float undo = 1.f;
    if (kHasWideRange<T> || mean) undo = bring_near_one<LANES>(v);

    hadamard_rounds<LANES, true>(v, staged_signs, rounds, part, 0);

    float squares[4] = {};
#pragma unroll
    for (int c = 0; c < OCTETS; ++c)
#pragma unroll
      for (int e = 0; e < 8; ++e) squares[e % 4] = fmaf(v[c][e], v[c][e], squares[e % 4]);
    const float square = sum_of_lanes<LANES>((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const bool finite = square < infinity();         // not for NaN either
    const bool coded = finite && square > 0.f;
    const float unit = ROOT * sqrtf(square);         // v = unit * z
    const u32 keep = coded ? 0xffffffffu : 0u;

    const RowPlace place = own_place();
    const u32 row = first + lane / LANES;
    const bool present = row < rows;
    const u64 token = place.batch * batch_stride + place.head * head_stride + place.token;
    float factor = 1.f;                              // of the scale mode
    if (bits <= 4 && scale_mode < 2) {
      float energy;
      switch (bits) {
        case 1: energy = store_codes<1, D>(v, unit, keep, boundaries, magnitudes, planes, token, part, present); break;
        case 2: energy = store_codes<2, D>(v, unit, keep, boundaries, magnitudes, planes, token, part, present); break;
        case 3: energy = store_codes<3, D>(v, unit, keep, boundaries, magnitudes, planes, token, part, present); break;
        default: energy = store_codes<4, D>(v, unit, keep, boundaries, magnitudes, planes, token, part, present);
      }
      if (scale_mode == 0) factor = sqrtf(D / energy);
    } else {
      const float2 sums = search_codes<D>(v, bits, coded ? 1.f / unit : 0.f, keep, boundaries, magnitudes, planes,
                                          token, part, present);
      if (scale_mode == 0) factor = sqrtf(D / sums.y);
      if (scale_mode == 2) factor = sums.x / sums.y;
      if (scale_mode == 3) factor = D / sums.x;
    }
    if (present && part == 0) {
      if (factors) undo *= factors[row];
      const float s = coded ? unit * factor * remaining_scale * undo : 0.f;
      scale[token] = __float2half_rn(finite ? fminf(s, 65504.f) : __int_as_float(0x7fc00000));
    }
  }
}

// (x - mean) times a power of two that brings the largest coordinate of a row near 1: what a dense rotation takes.
// x, mean : as above, but for any head_dim and alignment       y : (rows, head_dim)       undo : (rows,), the inverse
template <class T>
__global__ void __launch_bounds__(256)
    turboquant_prepare_kernel(const T* __restrict__ x, u64 x_batch_stride, u64 x_head_stride, u64 x_token_stride,
                              const float* __restrict__ mean, u64 mean_batch_stride, float* y, float* undo,
                              int kv_heads, int tokens, int head_dim, u32 rows) {
  const int lane = threadIdx.x % 32;
  for (u32 row = blockIdx.x * 8 + threadIdx.x / 32; row < rows; row += gridDim.x * 8) {
    const RowPlace place = place_of(row, kv_heads, tokens);
    const T* from = x + place.batch * x_batch_stride + place.head * x_head_stride + place.token * x_token_stride;
    const float* own_mean = mean ? mean + place.batch * mean_batch_stride + place.head * head_dim : nullptr;
    auto centred = [&](int d) { return to_float(from[d]) - (own_mean ? own_mean[d] : 0.f); };
    float largest = 0.f, multiplier, inverse;
    for (int d = lane; d < head_dim; d += 32) largest = fmaxf(largest, fabsf(centred(d)));
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    power_of_two(largest, multiplier, inverse);
    for (int d = lane; d < head_dim; d += 32) y[static_cast<u64>(row) * head_dim + d] = centred(d) * multiplier;
    if (lane == 0) undo[row] = inverse;
  }
}

template <class From, class To>
__global__ void __launch_bounds__(256) turboquant_convert_kernel(const From* __restrict__ x, To* y, u64 size) {
  for (u64 i = static_cast<u64>(blockIdx.x) * 256 + threadIdx.x; i < size; i += static_cast<u64>(gridDim.x) * 256)
    y[i] = from_float<To>(to_float(x[i]));
}

// ---- decode ---------------------------------------------------------------------------------------------------------

// The codes of 32 coordinates of one token: a word of each plane, two of mag2 planes; 0 where the bits lack a plane.
struct CodeWords {
  u32 sign, top, pairs[3][2];
};
__device__ __forceinline__ CodeWords load_codes(const ConstCodePlanes& from, u64 word, int bits) {
  CodeWords words = {from.sign[word], bits % 2 ? 0u : from.mag1[word]};
#pragma unroll
  for (int i = 0; i < 3; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) words.pairs[i][half] = bits >= 3 + 2 * i ? from.mag2[i][2 * word + half] : 0u;
  return words;
}

// The codes of the eight coordinates of octet s, half = s >> 1: nibble p of `low` is 8 sigma + (m & 7), that of `high`
// m >> 3.
struct OctetCodes {
  u32 low, high;
};
__device__ __forceinline__ OctetCodes octet_codes(const CodeWords& words, int half, int s, int bits) {
  const int odd = 2 * (s & 1);
  const u32 top = words.top >> s & 0x11111111u;
  OctetCodes codes = {(words.sign >> s & 0x11111111u) << 3 | (words.pairs[0][half] >> odd & 0x33333333u), 0u};
  if (bits <= 4) {
    codes.low |= top << (bits == 4 ? 2 : 0);
  } else {
    const u32 middle = words.pairs[1][half] >> odd;
    codes.low |= (middle & 0x11111111u) << 2;
    codes.high = (middle >> 1 & 0x11111111u) | (words.pairs[2][half] >> odd & 0x33333333u) << 1
                 | top << (bits == 8 ? 3 : 1);
  }
  return codes;
}

// table[low + 16 high] = +-magnitude, for the nibbles above.
constexpr int kCodes = 256;
__device__ __forceinline__ void stage_centroids(float* table, const float* codebook, int bits) {
  for (int i = threadIdx.x; i < kCodes; i += blockDim.x) {
    const int m = (i & 7) | i >> 4 << 3;
    const float c = m < 1 << (bits - 1) ? codebook[kMostMagnitudes + m] : 0.f;
    table[i] = i & 8 ? -c : c;
  }
}
__device__ __forceinline__ void look_up(float (&c)[8], const OctetCodes& codes, const float* table, int bits) {
  // Offsets in bytes: the nibble, four times.
  auto offset = [](u32 nibbles, int e) { return (e ? nibbles >> (4 * e - 2) : nibbles << 2) & 0x3cu; };
  const char* bytes = reinterpret_cast<const char*>(table);
  if (bits <= 4) {
#pragma unroll
    for (int e = 0; e < 8; ++e) c[e] = *reinterpret_cast<const float*>(bytes + offset(codes.low, e));
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      c[e] = *reinterpret_cast<const float*>(bytes + offset(codes.low, e) + 16 * offset(codes.high, e));
  }
}

// Planes, scale, codebook, signs : as for encode; rounds 0: y stays rotated        y : (rows, D), at a multiple of 16
template <class T, int D>
__global__ void __launch_bounds__(32, kDecodeBlocks<D>)
    turboquant_decode_kernel(const u32* __restrict__ sign, const u32* __restrict__ mag2_0,
                             const u32* __restrict__ mag2_1, const u32* __restrict__ mag2_2,
                             const u32* __restrict__ mag1, const __half* __restrict__ scale, u64 batch_stride,
                             u64 head_stride, const float* __restrict__ codebook, int bits,
                             const float* __restrict__ signs, int rounds, float remaining_scale, T* y, int kv_heads,
                             int tokens, u32 rows) {
  using Tile = RowTile<D>;
  constexpr int LANES = Tile::LANES, OCTETS = Tile::OCTETS, WORDS = Tile::WORDS, PITCH = kRowPitch<T, D>;
  KVB_SHARED(float, staged_signs, [kMostRounds * D]);
  KVB_SHARED(float, table, [kCodes]);
  KVB_DYNAMIC_SHARED(char, tile);
  for (int i = threadIdx.x; i < rounds * D; i += blockDim.x) staged_signs[i] = signs[i];
  stage_centroids(table, codebook, bits);
  __syncthreads();

  const int lane = threadIdx.x, part = lane % LANES;
  const ConstCodePlanes planes = {sign, {mag2_0, mag2_1, mag2_2}, mag1};
  char* own_row = tile + lane / LANES * PITCH;
  const u32 stride = gridDim.x * Tile::ROWS;
  for (u32 first = blockIdx.x * Tile::ROWS;;) {
    if (first >= rows) break;
    const u32 row = first + lane / LANES;
    const RowPlace place = place_of(row < rows ? row : 0, kv_heads, tokens);
    const u64 token = place.batch * batch_stride + place.head * head_stride + place.token;
    float v[OCTETS][8];
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      const CodeWords words = load_codes(planes, token * WORDS + w, bits);
#pragma unroll
      for (int i = 0; i < 4 / LANES; ++i) {
        const int s = i * LANES + part, half = LANES == 1 ? i / 2 : i;
        look_up(v[w * (4 / LANES) + i], octet_codes(words, half, s, bits), table, bits);
      }
    }
    hadamard_rounds<LANES>(v, staged_signs, rounds, part, 1);
    const float s = __half2float(scale[token]) * remaining_scale;
#pragma unroll
    for (int c = 0; c < OCTETS; ++c) {
      constexpr int WIDTH = kChunk<T>;
#pragma unroll
      for (int e = 0; e < 8; ++e) v[c][e] *= s;
#pragma unroll
      for (int k = 0; k < 8; k += WIDTH)
        *reinterpret_cast<uint4*>(own_row + ((c * LANES + part) * 8 + k) * sizeof(T)) = pack_chunk<T>(v[c] + k);
    }
    __syncwarp();   // the tile is complete
    constexpr int CHUNKS = D * static_cast<int>(sizeof(T)) / 16;   // of a row
    uint4* to = reinterpret_cast<uint4*>(y + static_cast<u64>(first) * D);
#pragma unroll 4
    for (int i = lane; i < Tile::ROWS * CHUNKS; i += 32)
      if (first + i / CHUNKS < rows)
        store_once(to + i, *reinterpret_cast<const uint4*>(tile + i / CHUNKS * PITCH + i % CHUNKS * 16));
    __syncwarp();   // and has been stored
    if (rows - first <= stride) break;
    first += stride;
  }
}

// ---- logits ---------------------------------------------------------------------------------------------------------

// out[b, kv_head * group + h, t] = softmax_scale s_t <R q_h, c_t>
// query : (batch, kv_heads * group, D), type 0 float, 1 fp16, 2 bf16        out : (batch, kv_heads * group, tokens)
// Grid (blocks, kv_heads, batch); group <= 16.  Other arguments as for decode; rounds 0: the query is rotated already.
template <int D>
__global__ void __launch_bounds__(256, 3)
    turboquant_logits_kernel(const void* __restrict__ query, int query_type, const u32* __restrict__ sign,
                             const u32* __restrict__ mag2_0, const u32* __restrict__ mag2_1,
                             const u32* __restrict__ mag2_2, const u32* __restrict__ mag1,
                             const __half* __restrict__ scale, u64 batch_stride, u64 head_stride,
                             const float* __restrict__ codebook, int bits, const float* __restrict__ signs, int rounds,
                             float remaining_scale, float softmax_scale, float* out, int tokens, int group) {
  constexpr int WORDS = D / 32, LANES = 4, OCTETS = D / 8 / LANES, ROWS_PER_WARP = 32 / LANES;
  KVB_SHARED(float, staged_signs, [kMostRounds * D]);
  KVB_SHARED(float, table, [kCodes]);
  KVB_SHARED(float, rotated, [kMostQueries * D]);
  for (int i = threadIdx.x; i < rounds * D; i += blockDim.x) staged_signs[i] = signs[i];
  stage_centroids(table, codebook, bits);
  __syncthreads();

  const u64 pair = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES;
  if (warp * ROWS_PER_WARP < group) {   // four lanes rotate a query head
    const int h = warp * ROWS_PER_WARP + lane / LANES;
    float v[OCTETS][8];
#pragma unroll
    for (int c = 0; c < OCTETS; ++c)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        v[c][e] = h < group ? load_float(query, query_type, (pair * group + h) * D + (c * LANES + part) * 8 + e) : 0.f;
    hadamard_rounds<LANES>(v, staged_signs, rounds, part, 0);
    if (h < group)
#pragma unroll
      for (int c = 0; c < OCTETS; ++c)
#pragma unroll
        for (int e = 0; e < 8; ++e) rotated[h * D + (c * LANES + part) * 8 + e] = v[c][e] * remaining_scale;
  }
  __syncthreads();

  const ConstCodePlanes planes = {sign, {mag2_0, mag2_1, mag2_2}, mag1};
  for (int t = blockIdx.x * 256 + threadIdx.x; t < tokens; t += gridDim.x * 256) {
    const u64 token = blockIdx.z * batch_stride + blockIdx.y * head_stride + t;
    float sums[kMostQueries] = {};
#pragma unroll 1
    for (int w = 0; w < WORDS; ++w) {
      const CodeWords words = load_codes(planes, token * WORDS + w, bits);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        float c[8];
        look_up(c, octet_codes(words, s / 2, s, bits), table, bits);
        const float* q = rotated + w * 32 + s * 8;
#pragma unroll
        for (int h = 0; h < kMostQueries; ++h)
          if (h < group)
#pragma unroll
            for (int e = 0; e < 8; ++e) sums[h] = fmaf(q[h * D + e], c[e], sums[h]);
      }
    }
    const float factor = __half2float(scale[token]) * softmax_scale;
#pragma unroll
    for (int h = 0; h < kMostQueries; ++h)
      if (h < group) out[(pair * group + h) * tokens + t] = sums[h] * factor;
  }
}

}  // namespace kvb

#define KVB_EXPORT_TYPE(T)                                                          \
  KVB_EXPORT(168, kvb::turboquant_encode_kernel<T, 64>)                             \
  KVB_EXPORT(168, kvb::turboquant_encode_kernel<T, 128>)                            \
  KVB_EXPORT(255, kvb::turboquant_encode_kernel<T, 256>)                            \
  KVB_EXPORT(168, kvb::turboquant_decode_kernel<T, 64>)                             \
  KVB_EXPORT(255, kvb::turboquant_decode_kernel<T, 128>)                            \
  KVB_EXPORT(255, kvb::turboquant_decode_kernel<T, 256>)                            \
  KVB_EXPORT(40, kvb::turboquant_prepare_kernel<T>)                                 \
  KVB_EXPORT(32, kvb::turboquant_convert_kernel<T, float>)
KVB_EXPORT_TYPE(float)
KVB_EXPORT_TYPE(__half)
KVB_EXPORT_TYPE(__nv_bfloat16)
KVB_EXPORT(32, kvb::turboquant_convert_kernel<float, __half>)
KVB_EXPORT(32, kvb::turboquant_convert_kernel<float, __nv_bfloat16>)
KVB_EXPORT(128, kvb::turboquant_logits_kernel<64>)
KVB_EXPORT(128, kvb::turboquant_logits_kernel<128>)
KVB_EXPORT(128, kvb::turboquant_logits_kernel<256>)

#define KVB_EXPORT_ATTENTION(D, HEADS, REGISTERS)                 \
  KVB_EXPORT_KEY_BITS(D, HEADS, 1, REGISTERS)                     \
  KVB_EXPORT_KEY_BITS(D, HEADS, 2, REGISTERS)                     \
  KVB_EXPORT_KEY_BITS(D, HEADS, 3, REGISTERS)                     \
  KVB_EXPORT_KEY_BITS(D, HEADS, 4, REGISTERS)
#define KVB_EXPORT_KEY_BITS(D, HEADS, KEY_BITS, REGISTERS)                                         \
  KVB_EXPORT(REGISTERS, kvb::turboquant_attention_kernel<D, HEADS, KEY_BITS, 1>)                   \
  KVB_EXPORT(REGISTERS, kvb::turboquant_attention_kernel<D, HEADS, KEY_BITS, 2>)                   \
  KVB_EXPORT(REGISTERS, kvb::turboquant_attention_kernel<D, HEADS, KEY_BITS, 3>)                   \
  KVB_EXPORT(REGISTERS, kvb::turboquant_attention_kernel<D, HEADS, KEY_BITS, 4>)
KVB_EXPORT_ATTENTION(64, 8, 208)
KVB_EXPORT_ATTENTION(64, 16, 248)
KVB_EXPORT_ATTENTION(128, 8, 224)
KVB_EXPORT_ATTENTION(128, 16, 255)
KVB_EXPORT_ATTENTION(256, 8, 255)
