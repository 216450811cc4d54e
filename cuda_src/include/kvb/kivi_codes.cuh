// Where the bits of a KIVI code lie: reference/kivi.py draws it.  What kernels know of it, with U = D / 32:
//
//   field n = 2 (u + g U) + v of half h is channel 32 u + 4 g + 2 v + h,      word n / F, field n % F,   F = 16 / bits.
//
// So quad k = g U + u, channels 32 u + 4 g ... + 3 of a token, is the fields 2 k and 2 k + 1: consecutive quads lie in
// consecutive fields, and 4 quads fill a word of 2 bits or two words of 4 bits.
#pragma once
#include "kvb/device.cuh"

namespace kvb {

constexpr int kKiviTile = 32;   // tokens

template <int BITS>
constexpr int kKiviFields = 16 / BITS;   // of a half

// A field as a pair of fp16: by how much the word is shifted first, so that the field ends by bit 10 of its half; where
// it then stands; and the operand, c 2^(place - 24), subnormal and exact.
template <int BITS>
__device__ constexpr int kivi_shift(int field) { return BITS * (field + 1) <= 10 ? 0 : 8; }
template <int BITS>
__device__ constexpr int kivi_place(int field) { return BITS * field - kivi_shift<BITS>(field); }
template <int BITS>
__device__ __forceinline__ u32 kivi_operand(u32 word, int field) {
  return word >> kivi_shift<BITS>(field) & ((1u << BITS) - 1) * 0x00010001u << kivi_place<BITS>(field);
}

// First channel of quad k.
template <int D>
__device__ __forceinline__ int kivi_channel(int k) { return k % (D / 32) * 32 + k / (D / 32) * 4; }

}  // namespace kvb
