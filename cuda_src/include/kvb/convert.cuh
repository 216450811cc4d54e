// Conversions between the storage types (float, __half, __nv_bfloat16) and float, alone, in pairs and
// in 16-byte chunks.
#pragma once
#include "kvb/device.cuh"

namespace kvb {

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }   // NVRTC has no <cmath>

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Round to nearest even; fp16 overflows to infinity, as NumPy's conversion does.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Element `index` of an array whose type is known when the kernel runs: 0 float, 1 __half, 2 __nv_bfloat16.
__device__ __forceinline__ float load_float(const void* x, int type, u64 index) {
  if (type == 0) return static_cast<const float*>(x)[index];
  if (type == 1) return to_float(static_cast<const __half*>(x)[index]);
  return to_float(static_cast<const __nv_bfloat16*>(x)[index]);
}
// The same of N elements from `index` on.
template <int N>
__device__ __forceinline__ void load_floats(float (&v)[N], const void* x, int type, u64 index) {
  if (type == 0) {
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = static_cast<const float*>(x)[index + e];
  } else if (type == 1) {
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = to_float(static_cast<const __half*>(x)[index + e]);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = to_float(static_cast<const __nv_bfloat16*>(x)[index + e]);
  }
}
__device__ __forceinline__ void store_float(void* x, int type, u64 index, float value) {
  if (type == 0) static_cast<float*>(x)[index] = value;
  else if (type == 1)
    static_cast<__half*>(x)[index] = from_float<__half>(value);
  else
    static_cast<__nv_bfloat16*>(x)[index] = from_float<__nv_bfloat16>(value);
}

// Two 16-bit values in one word, the first in the low half.
template <class T>
__device__ __forceinline__ u32 pack_pair(float first, float second);
template <>
__device__ __forceinline__ u32 pack_pair<__half>(float first, float second) {
  __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<u32*>(&pair);
}
template <>
__device__ __forceinline__ u32 pack_pair<__nv_bfloat16>(float first, float second) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<u32*>(&pair);
}
template <class T>
__device__ __forceinline__ float2 unpack_pair(u32 word);
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(u32 word) {
  return __half22float2(*reinterpret_cast<__half2*>(&word));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(u32 word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

// A chunk is 16 bytes, the widest access of one lane: 4 floats or 8 halves.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ void unpack_chunk(const uint4& chunk, float* x) {
  const u32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 pair = unpack_pair<T>(words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}
template <>
__device__ __forceinline__ void unpack_chunk<float>(const uint4& chunk, float* x) {
  x[0] = __uint_as_float(chunk.x);
  x[1] = __uint_as_float(chunk.y);
  x[2] = __uint_as_float(chunk.z);
  x[3] = __uint_as_float(chunk.w);
}

template <class T>
__device__ __forceinline__ uint4 pack_chunk(const float* x) {
  return make_uint4(pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]),
                    pack_pair<T>(x[4], x[5]), pack_pair<T>(x[6], x[7]));
}
template <>
__device__ __forceinline__ uint4 pack_chunk<float>(const float* x) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}

}  // namespace kvb
