// Tiles of rows for encoders and decoders, one warp each: every lane has a whole row in registers (of more than 128
// coordinates, half of one), so that rotations need no shuffles (one level of them), and a word of a plane is made by
// one lane (two).  Rows come from global memory through a tile of shared memory, whose rows are padded so that lanes,
// which read one 16-byte chunk of their own row each, hit different banks.
#pragma once
#include "kvb/rows.cuh"

namespace kvb {

// LANES lanes share a row; v[c][e] of lane l is coordinate 8 (c LANES + l) + e.
template <int D>
struct RowTile {
  static constexpr int LANES = D > 128 ? D / 128 : 1, ROWS = 32 / LANES;
  static constexpr int OCTETS = D / 8 / LANES;           // of a lane
  static constexpr int WORDS = D / 32;                   // of the sign plane, per row
};
// Bytes from one row of a tile in shared memory to the next.
template <class T, int D>
constexpr int kRowPitch = D * static_cast<int>(sizeof(T)) + 16 * RowTile<D>::LANES;

// Vectors (batch, kv_heads, tokens, D), rows contiguous and at multiples of 16 bytes, strides in elements.
template <class T>
struct Vectors {
  const T* x;
  u64 batch_stride, head_stride, token_stride;
  int kv_heads, tokens;
  u32 rows;                                              // batch * kv_heads * tokens
};

// Begins to copy the rows first, ..., as many of a tile as there are: one group of asynchronous copies.
template <int D, class T>
__device__ __forceinline__ void copy_rows(char* tile, const Vectors<T>& vectors, u32 first, u32 lane) {
  constexpr int LANES = RowTile<D>::LANES, ROWS = RowTile<D>::ROWS, PITCH = kRowPitch<T, D>;
  constexpr int CHUNKS = D * static_cast<int>(sizeof(T)) / 16;                  // of a row
  constexpr int LANES_PER_ROW = CHUNKS < 32 ? CHUNKS : 32, ROWS_AT_ONCE = 32 / LANES_PER_ROW;
  const u64 pitch = vectors.token_stride * sizeof(T);
  const u32 start = lane / LANES_PER_ROW, column = lane % LANES_PER_ROW * 16;
  char* to = tile + start * PITCH + column;
  const RowPlace place = place_of(first, vectors.kv_heads, vectors.tokens);
  auto address = [&](const RowPlace& at) {
    return reinterpret_cast<u64>(vectors.x + at.batch * vectors.batch_stride + at.head * vectors.head_stride)
           + at.token * pitch;
  };
  if (first + ROWS <= vectors.rows && place.token + ROWS <= static_cast<u32>(vectors.tokens)) {   // tokens of one head
    u64 from = address(place) + start * pitch + column;
#pragma unroll 4
    for (int i = 0; i < ROWS; i += ROWS_AT_ONCE, from += ROWS_AT_ONCE * pitch)
#pragma unroll
      for (int c = 0; c < CHUNKS; c += 32)
        cp_async_16(to + i * PITCH + c * 16, reinterpret_cast<const char*>(from) + c * 16);
  } else {
    const u32 row = first + lane / LANES;
    const u64 own = address(place_of(row < vectors.rows ? row : first, vectors.kv_heads, vectors.tokens));
#pragma unroll 1
    for (int i = 0; i < ROWS; i += ROWS_AT_ONCE) {
      const u64 from = __shfl_sync(0xffffffffu, own, (i + start) * LANES) + column;
#pragma unroll
      for (int c = 0; c < CHUNKS; c += 32)
        cp_async_16(to + i * PITCH + c * 16, reinterpret_cast<const char*>(from) + c * 16,
                    first + i + start < vectors.rows);
    }
  }
  cp_async_commit();
}

// A lane's part of its row, which begins at `row`, of a tile that has landed.
template <int D, class T>
__device__ __forceinline__ void read_row(float (&v)[RowTile<D>::OCTETS][8], const char* row, int part) {
  constexpr int LANES = RowTile<D>::LANES, WIDTH = kChunk<T>;
#pragma unroll
  for (int c = 0; c < RowTile<D>::OCTETS; ++c)
#pragma unroll
    for (int k = 0; k < 8; k += WIDTH)
      unpack_chunk<T>(*reinterpret_cast<const uint4*>(row + ((c * LANES + part) * 8 + k) * sizeof(T)), v[c] + k);
}

// v -= a row of means, of which `mean` is the lane's first coordinate.
template <int LANES, int OCTETS>
__device__ __forceinline__ void subtract_mean(float (&v)[OCTETS][8], const float* mean) {
#pragma unroll
  for (int c = 0; c < OCTETS; ++c)
#pragma unroll
    for (int e = 0; e < 8; ++e) v[c][e] -= mean[c * LANES * 8 + e];
}

// Brings the largest coordinate of a row near 1, zeros to +0, and returns the power of two that undoes it.
template <int LANES, int OCTETS>
__device__ __forceinline__ float bring_near_one(float (&v)[OCTETS][8]) {
  float largest = 0.f, multiplier, undo;
#pragma unroll
  for (int c = 0; c < OCTETS; ++c)
#pragma unroll
    for (int e = 0; e < 8; ++e) largest = fmaxf(largest, fabsf(v[c][e]));
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  power_of_two(largest, multiplier, undo);
#pragma unroll
  for (int c = 0; c < OCTETS; ++c)
#pragma unroll
    for (int e = 0; e < 8; ++e) v[c][e] = fmaf(v[c][e], multiplier, 0.f);   // -0 + 0 is 0
  return undo;
}

// Sum over the LANES lanes that share a row.
template <int LANES>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Appends the sign bit of x at the low end of a word, `step` bits from the one before.
__device__ __forceinline__ void append_sign(u32& word, float x, int step) {
  word = __funnelshift_l(__float_as_uint(x), word << (step - 1), 1);
}

// Word `mine` of a plane, of which each of the LANES lanes that share the row has made the bits with s % LANES = part,
// and left them at s - part.
template <int LANES>
__device__ __forceinline__ u32 whole_word(u32 mine, int part) {
  if constexpr (LANES == 1) return mine;
  mine <<= part;
  return mine | __shfl_xor_sync(0xffffffffu, mine, 1);
}

// Stores the words of one row of a plane, by 16 bytes where its rows begin at multiples of that.
template <int N>
__device__ __forceinline__ void store_row(u32* to, const u32 (&words)[N]) {
  if constexpr (N >= 4) {
    if (reinterpret_cast<u64>(to) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 4)
        *reinterpret_cast<uint4*>(to + i) = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = words[i];
}

}  // namespace kvb
