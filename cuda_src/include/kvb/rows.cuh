// Rows of vectors that are encoded one by one: where they lie, and how they are brought into the range of float.
#pragma once
#include "kvb/convert.cuh"

namespace kvb {

// Whether numbers of this type have squares beyond the range of float.
template <class T>
constexpr bool kHasWideRange = true;
template <>
constexpr bool kHasWideRange<__half> = false;

// Where row r of (batch, kv_heads, tokens) lies.  Fewer than 2^32 rows: codes of more would not fit any memory.
struct RowPlace {
  u32 batch, head, token;
};
__device__ __forceinline__ RowPlace place_of(u32 row, int kv_heads, int tokens) {
  const u32 pair = row / tokens;
  return {pair / kv_heads, pair % kv_heads, row % tokens};
}

// multiplier * x has its largest coordinate in [2, 4), and undo * multiplier = 1.  A largest one below 2^-125 counts as
// far smaller than it is, and one that is Inf or NaN gives a multiplier of 0.
__device__ __forceinline__ void power_of_two(float largest, float& multiplier, float& undo) {
  const u32 exponent = max(__float_as_uint(largest) >> 23, 1u);
  multiplier = __uint_as_float((255 - exponent) << 23);
  undo = __uint_as_float((exponent - 1) << 23);
}

}  // namespace kvb
