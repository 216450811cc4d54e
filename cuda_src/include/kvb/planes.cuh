// Bit planes as operands of tensor cores: from the planes of a tile of tokens (reference/planes.py) to integers and
// fp16 centroids in registers.
//
// An octet is eight coordinates 8 q .. 8 q + 7 (p = 0..7) of one token.  Of its words, in the notation of
// reference/planes.py, w = q / 4 and s = q % 4:
//   sign, mag1   word q / 4, bit 4 p + s            mag2   word q / 2, bits 4 p + 2 (q % 2) and the next
// A shift and a mask give eight fields, one per nibble: selectors of PRMT, which looks up four bytes at a time in a
// table of eight bytes that two registers hold.  A table has one entry per code of up to three bits, 4 sigma + m
// (sigma the sign bit, m the magnitude index); for four bits it has the eight magnitudes, and the sign is applied to
// what comes out.
#pragma once
#include "kvb/device.cuh"

namespace kvb {

constexpr int kPlaneTile = 32;   // tokens

// A tile of one side (keys or values) in shared memory, in bytes: where its scales begin, behind the planes, and all.
template <int D, int BITS>
constexpr int kPlaneScales = kPlaneTile * D / 8 * BITS;
template <int D, int BITS>
constexpr int kPlaneTileBytes = whole_lines(kPlaneScales<D, BITS> + 2 * kPlaneTile);

// Rows (tokens) of a tile stand in shared memory in another order where that avoids bank conflicts: lanes that read the
// same word of the tokens 0, 2, 4, 6 of eight must hit rows that differ modulo 4.
template <int D>
__device__ __forceinline__ int plane_row(int token) {
  return D >= 128 ? token ^ (token >> 2 & 1) : token;
}

// ---- words of an octet run ------------------------------------------------------------------------------------------

// The words of `OCTETS` consecutive octets of one token, from octet q on (q a multiple of OCTETS).
template <int OCTETS, int BITS>
struct PlaneWords {
  static constexpr int SINGLE = (OCTETS + 3) / 4, DOUBLE = (OCTETS + 1) / 2;
  u32 sign[SINGLE], mag1[SINGLE], mag2[DOUBLE];   // those that the bits have; the others are never read
};

template <int N>
__device__ __forceinline__ void load_words(u32 (&words)[N], const char* from) {
  static_assert(N == 1 || N == 2 || N == 4, "one access");
  if constexpr (N == 1) {
    words[0] = *reinterpret_cast<const u32*>(from);
  } else if constexpr (N == 2) {
    const uint2 pair = *reinterpret_cast<const uint2*>(from);
    words[0] = pair.x, words[1] = pair.y;
  } else {
    const uint4 quad = *reinterpret_cast<const uint4*>(from);
    words[0] = quad.x, words[1] = quad.y, words[2] = quad.z, words[3] = quad.w;
  }
}

// Where a lane finds its words in a tile in shared memory, in bytes: octets q .. q + OCTETS - 1 of one row's token.
// Rows that are whole eights further on lie at constant distances.
template <int D, int BITS, int OCTETS>
struct OctetPlace {
  static constexpr int SINGLE_BYTES = D / 8, DOUBLE_BYTES = D / 4;   // of a token
  int single, pair;

  static __device__ __forceinline__ OctetPlace of(int row, int q) {
    return {pinned(row * SINGLE_BYTES + q / 4 * 4), BITS >= 3 ? pinned(row * DOUBLE_BYTES + q / 2 * 4) : 0};
  }
  // The words of the token 8 * eights rows further on.
  __device__ __forceinline__ PlaneWords<OCTETS, BITS> load(const char* tile, int eights) const {
    PlaneWords<OCTETS, BITS> words;
    load_words(words.sign, tile + single + eights * 8 * SINGLE_BYTES);
    if constexpr (BITS >= 3)
      load_words(words.mag2, tile + pair + kPlaneTile * SINGLE_BYTES + eights * 8 * DOUBLE_BYTES);
    if constexpr (BITS % 2 == 0)
      load_words(words.mag1, tile + single + kPlaneTile * SINGLE_BYTES * (BITS - 1) + eights * 8 * SINGLE_BYTES);
    return words;
  }
};

// The planes of two tokens interleaved by bytes, so that 16 bits hold two nibbles of each:
//   low:  bytes first 0, second 0, first 1, second 1 (p = 0..3)      high: bytes 2 and 3 (p = 4..7)
template <int OCTETS, int BITS>
__device__ __forceinline__ void interleave(const PlaneWords<OCTETS, BITS>& first,
                                           const PlaneWords<OCTETS, BITS>& second,
                                           PlaneWords<OCTETS, BITS> (&both)[2]) {
  using Words = PlaneWords<OCTETS, BITS>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32 bytes = half ? 0x7362 : 0x5140;
#pragma unroll
    for (int i = 0; i < Words::SINGLE; ++i) {
      both[half].sign[i] = permute_bytes(first.sign[i], second.sign[i], bytes);
      if constexpr (BITS % 2 == 0) both[half].mag1[i] = permute_bytes(first.mag1[i], second.mag1[i], bytes);
    }
    if constexpr (BITS >= 3)
#pragma unroll
      for (int i = 0; i < Words::DOUBLE; ++i) both[half].mag2[i] = permute_bytes(first.mag2[i], second.mag2[i], bytes);
  }
}

// ---- selectors ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shifted(u32 word, int left) {
  return left >= 0 ? word << left : word >> -left;
}

// Selectors of the eight coordinates of one octet in nibbles: octet i of the run, which begins at octet q; phase is
// q % 4, known to be 0 where OCTETS >= 4.
//   table      index in the table: 4 sigma + m, or for four bits m alone
//   negative   four bits only: sigma in bit 0 of the nibbles
struct Selectors {
  u32 table, negative;
};
template <int OCTETS, int BITS>
__device__ __forceinline__ Selectors select_octet(const PlaneWords<OCTETS, BITS>& words, int i, int phase) {
  const u32 single = words.sign[i / 4];
  Selectors n = {0, 0};
  // Where a run begins inside a word, only the lane knows the amounts: one funnel shift.
  if constexpr (BITS == 4) {
    n.negative = (OCTETS >= 4 ? single >> (i % 4) : single >> (phase + i % 4)) & 0x11111111u;
  } else {
    n.table = (OCTETS >= 4 ? shifted(single, 2 - i % 4) : __funnelshift_l(single, single, 34 - phase - i % 4)) &
              0x44444444u;
  }
  if constexpr (BITS >= 3) {
    const u32 pairs = words.mag2[i / 2];
    n.table |= (OCTETS >= 2 ? pairs >> (2 * (i % 2)) : pairs >> (2 * (phase & 1))) & 0x33333333u;
  }
  if constexpr (BITS % 2 == 0) {
    constexpr int TO = BITS == 4 ? 2 : 0;
    const u32 top = words.mag1[i / 4];
    n.table |= (OCTETS >= 4 ? shifted(top, TO - i % 4) : __funnelshift_l(top, top, 32 + TO - phase - i % 4)) &
               (0x11111111u << TO);
  }
  return n;
}

// ---- keys: integers -------------------------------------------------------------------------------------------------

// Entries x stand for unit * (x + 1/2), so that the negative of a centroid is the complement of its entry.  Up to three
// bits: int8, one entry per code.  Four bits: the magnitudes, 0 to 255; with the sign these are integers of nine bits,
// in two's complement: a byte, and -256 where the sign is set.
struct KeyTable {
  u32 low, high;   // entries 0-3, 4-7
};

// sum += a . x for the eight coordinates of an octet of each token: byte [0] of p = 0..3, [1] of p = 4..7.
// Four bits: the byte in `sum`, -1 where the sign is set in `negative`; the product is sum + 256 negative.
template <int BITS, int HALVES>
__device__ __forceinline__ void multiply_octet(int (&sum)[HALVES][4], int (&negative)[HALVES][4],
                                               const uint4 (&a)[HALVES], const Selectors& n, const KeyTable& table) {
  u32 x[2] = {permute_bytes(table.low, table.high, n.table), permute_bytes(table.low, table.high, n.table >> 16)};
  if constexpr (BITS == 4) {
    const u32 mask[2] = {permute_bytes(0x0000ff00u, 0, n.negative), permute_bytes(0x0000ff00u, 0, n.negative >> 16)};
    x[0] ^= mask[0];
    x[1] ^= mask[1];
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      mma_m16n8k32<u8>(sum[half], {a[half].x, a[half].y, a[half].z, a[half].w}, x);
      mma_m16n8k32<i8>(negative[half], {a[half].x, a[half].y, a[half].z, a[half].w}, mask);
    }
  } else {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
      mma_m16n8k32<i8>(sum[half], {a[half].x, a[half].y, a[half].z, a[half].w}, x);
  }
}

// ---- values: fp16 ---------------------------------------------------------------------------------------------------

// Tables of the high and of the low bytes of fp16 centroids.
struct ValueTable {
  u32 high_low, high_high, low_low, low_high;   // high bytes of entries 0-3 and 4-7, low bytes likewise
};

// Of one octet of two tokens interleaved (`half` of `interleave`), the fp16 centroids: even = (first, second token) of
// the even coordinate p, odd = of p + 1; [0]: the lower two of the four p of this half, [1]: the upper two.
template <int BITS>
__device__ __forceinline__ void value_operands(u32 (&even)[2], u32 (&odd)[2], const Selectors& n,
                                               const ValueTable& table) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 selector = n.table >> (16 * i);
    u32 high = permute_bytes(table.high_low, table.high_high, selector);
    const u32 low = permute_bytes(table.low_low, table.low_high, selector);
    if constexpr (BITS == 4) high ^= permute_bytes(0x00008000u, 0, n.negative >> (16 * i));
    even[i] = permute_bytes(low, high, 0x6240);
    odd[i] = permute_bytes(low, high, 0x7351);
  }
}

}  // namespace kvb
