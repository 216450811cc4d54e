// Quest: least and largest keys of pages, and upper bounds of the logits of a page.
// Reference: reference/quest.py.
//
// quest_encode_kernel: one thread has one 16-byte chunk of the channels of one page and walks over its tokens.
//   Bytes    page D sizeof(T) read and 2 D sizeof(T) written per page, once.
//   Counts   Per element a conversion, an addition (-0 becomes +0), a minimum and a maximum: 3.5 issue slots for 2
//            bytes of float16, 57 issue cycles of an SM per KiB, which memory takes 76 for at 3 TB/s on 132 SMs at 1.7
//            GHz.
//
// quest_score_kernel: <q+, M> + <q-, m> for all query heads of a group from one read of the pages.
//   Work     D sizeof(T) / 16 lanes, at most 32, share a page, so a warp takes 512 bytes of `low` and of `high` at a
//            time and walks over the pages with a grid stride.  q+ and q- stand in shared memory, in the order in which
//            lanes read them; four query heads (two at D = 256) are met at once, so that their shuffles overlap.
//   Bytes    2 D sizeof(T) read per page and KV head, 4 written per page, or per token, and query head: at 8 KV heads
//            of 128, 128K tokens and pages of 16 33.6 MB, 11.2 us at 3 TB/s.
//   Counts   Instructions of a warp per two pages of 128, float16, 4 query heads: 8 loads and addresses, 16
//            conversions, 64 multiply-adds, 16 loads of the query, 32 for the sums of lanes, 20 to store: 160; 40000
//            per SM for the case above, 5.8 us at 4 a cycle and 1.7 GHz.
//   Tried    That case on an H100 with a cold cache, and a warm one: query heads one after another, with conflicts of
//            banks 32.0 and 28.2 us; the next pages on their way meanwhile 36.7 and 32.9; bounds as the first to leave
//            the L2 cache 31.9 and 28.3; this version 28.4 and 24.8.
#include "kvb/convert.cuh"
#include "kvb/device.cuh"

namespace kvb {

// keys : (batch, kv_heads, tokens, D), rows contiguous and at multiples of 16 bytes, strides in elements
// lengths : (batch), or null        low, high : (batch, kv_heads, pages, D), likewise, one set of strides
// units = batch * kv_heads * pages * D sizeof(T) / 16
template <class T, int D>
__global__ void __launch_bounds__(256, 4)
    quest_encode_kernel(const T* __restrict__ keys, u64 key_batch_stride, u64 key_head_stride, u64 key_token_stride,
                        const int* __restrict__ lengths, T* low, T* high, u64 batch_stride, u64 head_stride,
                        u64 page_stride, int kv_heads, int tokens, int pages, int page, u64 units) {
  constexpr int WIDTH = kChunk<T>, CHUNKS = D / WIDTH;
  for (u64 unit = blockIdx.x * u64(256) + threadIdx.x; unit < units; unit += gridDim.x * u64(256)) {
    const u64 row = unit / CHUNKS;
    const u32 chunk = unit % CHUNKS * WIDTH, pair = row / pages, number = row % pages;
    const u32 batch = pair / kv_heads, head = pair % kv_heads;
    const u32 length = lengths ? min(max(lengths[batch], 0), tokens) : tokens;
    const u64 start = static_cast<u64>(number) * page;
    const u32 count = start < length ? min(static_cast<u32>(page), static_cast<u32>(length - start)) : 0;
    const T* from = keys + batch * key_batch_stride + head * key_head_stride + start * key_token_stride + chunk;
    float least[WIDTH], largest[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      least[e] = infinity();
      largest[e] = -infinity();
    }
#pragma unroll 4
    for (u32 t = 0; t < count; ++t, from += key_token_stride) {
      float x[WIDTH];
      unpack_chunk<T>(load_once(reinterpret_cast<const uint4*>(from)), x);
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {   // fminf and fmaxf ignore NaN
        least[e] = fminf(least[e], x[e] + 0.f);
        largest[e] = fmaxf(largest[e], x[e] + 0.f);
      }
    }
#pragma unroll
    for (int e = 0; e < WIDTH; ++e)
      if (least[e] > largest[e]) least[e] = largest[e] = __int_as_float(0x7fc00000);   // not one number
    const u64 to = batch * batch_stride + head * head_stride + number * page_stride + chunk;
    *reinterpret_cast<uint4*>(low + to) = pack_chunk<T>(least);
    *reinterpret_cast<uint4*>(high + to) = pack_chunk<T>(largest);
  }
}

constexpr int kMostQueries = 16;

// out[b, kv_head * group + h, slot] = scale U of its page, -inf from lengths[b] on
// query : (batch, kv_heads * group, D), type 0 float, 1 fp16, 2 bf16
// low, high : as for encode        lengths : (batch), or null
// out : (batch, kv_heads * group, slots); `wide` slots of a page, 1 or `page`
// Grid (blocks, kv_heads, batch); group <= 16.
template <class T, int D>
__global__ void __launch_bounds__(256)
    quest_score_kernel(const void* __restrict__ query, int query_type, const T* __restrict__ low,
                       const T* __restrict__ high, u64 batch_stride, u64 head_stride, u64 page_stride,
                       const int* __restrict__ lengths, float scale, float* out, int slots, int wide, int page,
                       int pages, int group) {
  constexpr int WIDTH = kChunk<T>, LANES = D / WIDTH < 32 ? D / WIDTH : 32, CHUNKS = D / WIDTH / LANES;
  constexpr int PAGES = 32 / LANES;   // of a warp at a time
  constexpr int QUADS = WIDTH / 4;                          // of a chunk
  constexpr int AT_ONCE = D == 256 ? 2 / CHUNKS : 4;        // query heads whose sums overlap
  // (heads, chunks, quads, lanes): neighbouring lanes read neighbouring quads
  KVB_SHARED(float4, positive, [kMostQueries * D / 4]);
  KVB_SHARED(float4, negative, [kMostQueries * D / 4]);
  const u64 pair = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  for (int i = threadIdx.x; i < group * D; i += 256) {
    const float q = load_float(query, query_type, pair * group * D + i);
    const int d = i % D, of_lane = d / WIDTH % LANES, quad = d / (WIDTH * LANES) * QUADS + d % WIDTH / 4;
    const int to = i - d + (quad * LANES + of_lane) * 4 + d % 4;
    reinterpret_cast<float*>(positive)[to] = q < 0.f ? 0.f : q;   // NaN stays
    reinterpret_cast<float*>(negative)[to] = q < 0.f ? q : 0.f;
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, part = lane % LANES;
  const u64 most = static_cast<u64>(pages) * page;
  const u64 length = lengths ? min(static_cast<long long>(max(lengths[blockIdx.z], 0)), static_cast<long long>(most))
                             : most;
  const u64 base = blockIdx.z * batch_stride + blockIdx.y * head_stride;
  const u32 stride = gridDim.x * 8 * PAGES;
  // The same rounds for all lanes: shuffles see whole warps.
  for (u32 first = (blockIdx.x * 8 + threadIdx.x / 32) * PAGES; first < static_cast<u32>(pages); first += stride) {
    const u32 number = first + lane / LANES;
    const bool present = number < static_cast<u32>(pages) && static_cast<u64>(number) * page < length;
    float least[CHUNKS][WIDTH], largest[CHUNKS][WIDTH];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const u64 at = base + number * page_stride + (c * LANES + part) * WIDTH;
      const uint4 nothing = make_uint4(0, 0, 0, 0);
      unpack_chunk<T>(present ? load_once(reinterpret_cast<const uint4*>(low + at)) : nothing, least[c]);
      unpack_chunk<T>(present ? load_once(reinterpret_cast<const uint4*>(high + at)) : nothing, largest[c]);
    }
    for (int h = 0; h < group; h += AT_ONCE) {
      float bound[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        float sums[2] = {};
#pragma unroll
        for (int v = 0; v < CHUNKS * QUADS; ++v) {
          const int i = (min(h + k, group - 1) * CHUNKS * QUADS + v) * LANES + part;
          const float(&most_of)[WIDTH] = largest[v / QUADS];
          const float(&least_of)[WIDTH] = least[v / QUADS];
          const int e = v % QUADS * 4;
          const float4 up = positive[i], down = negative[i];
          sums[0] = fmaf(up.x, most_of[e], sums[0]);
          sums[0] = fmaf(up.y, most_of[e + 1], sums[0]);
          sums[0] = fmaf(up.z, most_of[e + 2], sums[0]);
          sums[0] = fmaf(up.w, most_of[e + 3], sums[0]);
          sums[1] = fmaf(down.x, least_of[e], sums[1]);
          sums[1] = fmaf(down.y, least_of[e + 1], sums[1]);
          sums[1] = fmaf(down.z, least_of[e + 2], sums[1]);
          sums[1] = fmaf(down.w, least_of[e + 3], sums[1]);
        }
        bound[k] = sums[0] + sums[1];
      }
#pragma unroll
      for (int distance = 1; distance < LANES; distance *= 2)
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) bound[k] += __shfl_xor_sync(0xffffffffu, bound[k], distance);
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) {
        if (h + k >= group) break;
        float* to = out + (pair * group + h + k) * slots;
        for (int i = part; i < wide; i += LANES) {
          const u64 slot = static_cast<u64>(number) * wide + i;
          if (slot < static_cast<u64>(slots))
            to[slot] = present && (wide == 1 || slot < length) ? bound[k] * scale : -infinity();
        }
      }
    }
  }
}

}  // namespace kvb

#define KVB_EXPORT_SIZES(T)                               \
  KVB_EXPORT(64, kvb::quest_encode_kernel<T, 64>)         \
  KVB_EXPORT(64, kvb::quest_encode_kernel<T, 128>)        \
  KVB_EXPORT(64, kvb::quest_encode_kernel<T, 256>)        \
  KVB_EXPORT(96, kvb::quest_score_kernel<T, 64>)          \
  KVB_EXPORT(96, kvb::quest_score_kernel<T, 128>)         \
  KVB_EXPORT(96, kvb::quest_score_kernel<T, 256>)
KVB_EXPORT_SIZES(float)
KVB_EXPORT_SIZES(__half)
KVB_EXPORT_SIZES(__nv_bfloat16)
