// The plan of a KV head as kernels of Block-GTQ find it in memory, and the scalars of groups.
// What writes it: kvbench/ops/block_gtq_launch.py.
#pragma once
#include "kvb/convert.cuh"
#include "kvb/device.cuh"

namespace kvb {

constexpr int kMostGroups = 8, kMostCodes = 256;

// Rows of the tables.
struct KeyGroup {
  i32 start, size, bits, book, rotation;
  float inverse_size;
};
struct KeySegment {
  i32 bits, group, book, pairs[3], top, top_half;   // words of the row of magnitudes, and the half of the last one
};

__device__ __forceinline__ float not_a_number() { return infinity() - infinity(); }

// A scalar of one byte: 16 steps per octave around 2^exponent, 0 for 0 and 255 for NaN.
__device__ __forceinline__ float scalar_of_byte(int code, int exponent) {
  if (code == 0 || code == 255) return code ? not_a_number() : 0.f;
  return exp2f(0.0625f * static_cast<float>(code - 128) + static_cast<float>(exponent));
}
__device__ __forceinline__ float load_scalar(const __half* halves, const u8* bytes, u64 index, int exponent) {
  return halves ? to_float(halves[index]) : scalar_of_byte(bytes[index], exponent);
}

}  // namespace kvb
