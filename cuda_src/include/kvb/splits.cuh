// The end of every split decode kernel: combine the warps of a block, store one partial result per split, and let the
// last block to finish merge the splits.  The one place where partial results of a launch are merged.
//
// A partial result of one query head over some tokens is (reference, total, output) in base 2:
//   total = sum_t 2^(logit_t - reference),   output = sum_t 2^(logit_t - reference) v_t,
//   logit in units of log2(e) scale <q, k>.
// Any finite reference is right; one near the largest logit keeps the numbers in range.  Partial results merge by
// M = max reference_i, w_i = 2^(reference_i - M): output = sum w_i output_i / sum w_i total_i
// (arXiv 1805.02867, section 3.1).
#pragma once
#include "kvb/convert.cuh"
#include "kvb/device.cuh"

namespace kvb {

// The reference of a warp that has seen no token: finite, so that differences are not NaN.
constexpr float kNoReference = -3.402823466e38f;

// Blocks that share a sequence of `tiles` tiles: all `splits` of the grid, or fewer for a short one, so that each has
// `tiles_per_block` to start with.  The blocks beyond have nothing to do and nobody waits for them.
//
// Tiles are dealt out in turns, warp w of split s taking tiles (i active + s) warps + w for i = 0, 1, ...: the blocks
// sweep the memory side by side.  Handing them out on demand instead balances multiprocessors, which get unequal shares
// of the memory bandwidth (with fixed shares the first is done after 140 us, the last after 195), but not one byte more
// per second arrives in all (206 instead of 202 us), and results would vary from run to run.
__device__ __forceinline__ int active_splits(int tiles, int tiles_per_block, int splits) {
  return min(splits, max((tiles + tiles_per_block - 1) / tiles_per_block, 1));
}

// Where the results of one (sequence, KV head) go, but for the output itself.
struct DecodeTarget {
  float* lse;               // (rows,) natural log-sum-exp, or null
  const float* lse_offset;  // (rows,), added to lse, or null
  float* partial_output;    // (rows, splits, D)
  float2* partial_statistics;   // (rows, splits): reference, total
  u32* ticket;              // counts the splits that have stored their part; zero before and after every launch
  // The result of an earlier launch over other tokens, (rows, D) and (rows,) natural log-sum-exp, which is merged with
  // this one's where that is stored; or null.
  const float* earlier_output;
  const float* earlier_lse;
};

// Stores four numbers of the output in its storage type.
template <class T>
struct StoreOutput {
  void* output;   // (rows, D) T, or float if output_float32
  int output_float32;
  __device__ __forceinline__ void operator()(int index, const float4& x) const {
    if (output_float32) {
      *reinterpret_cast<float4*>(static_cast<float*>(output) + index) = x;
    } else {
      T* out = static_cast<T*>(output) + index;
      out[0] = from_float<T>(x.x);
      out[1] = from_float<T>(x.y);
      out[2] = from_float<T>(x.z);
      out[3] = from_float<T>(x.w);
    }
  }
};

// reference + log2(total), in natural units; -inf for no tokens.
__device__ __forceinline__ float natural_lse(float reference, float total) {
  return total == 0.f ? -infinity() : (reference + log2f(total)) * 0.693147180559945309f;
}
__device__ __forceinline__ void store_lse(const DecodeTarget& target, int h, float reference, float total) {
  if (target.lse) target.lse[h] = natural_lse(reference, total) + (target.lse_offset ? target.lse_offset[h] : 0.f);
}
// 1 / total, and 0 for no tokens, so that an empty sequence gives zeros; NaN stays NaN.
__device__ __forceinline__ float inverse_total(float total) { return total == 0.f ? 0.f : 1.f / total; }

__device__ __forceinline__ void add_scaled(float4& sum, float weight, const float4& x) {
  sum.x = fmaf(weight, x.x, sum.x);
  sum.y = fmaf(weight, x.y, sum.y);
  sum.z = fmaf(weight, x.z, sum.z);
  sum.w = fmaf(weight, x.w, sum.w);
}
__device__ __forceinline__ float4 scaled(float weight, const float4& x) {
  return make_float4(weight * x.x, weight * x.y, weight * x.z, weight * x.w);
}

// (reference, total, sum) += (other_reference, other_total, other_sum), with the larger reference.
__device__ __forceinline__ void add_part(float& reference, float& total, float4& sum, float other_reference,
                                         float other_total, const float4& other_sum) {
  const float largest = fmaxf(reference, other_reference);
  const float weight = exp2_approx(reference - largest), other_weight = exp2_approx(other_reference - largest);
  reference = largest;
  total = fmaf(other_weight, other_total, weight * total);
  sum = scaled(weight, sum);
  add_scaled(sum, other_weight, other_sum);
}

// Stores the numbers d .. d + 3 of row h, merged with those of an earlier launch.
template <int D, class Store>
__device__ __forceinline__ void store_merged(const DecodeTarget& target, const Store& store, int h, int d,
                                             float reference, float total, float4 sum) {
  if (target.earlier_lse) {
    const float earlier = target.earlier_lse[h] * 1.44269504088896341f;
    if (earlier != -infinity())   // else it has seen no token
      add_part(reference, total, sum, earlier, 1.f,
               *reinterpret_cast<const float4*>(target.earlier_output + static_cast<u64>(h) * D + d));
  }
  store(h * D + d, scaled(inverse_total(total), sum));
  if (d == 0) store_lse(target, h, reference, total);
}

// Called by all THREADS threads of a block once its tokens are done.
//   copies      shared (COPIES, HEADS, D): partial outputs, one copy per warp that took its own tokens
//   statistics  shared (COPIES, HEADS): their reference and total
//   scratch     shared, 24 * THREADS bytes that hold nothing any more (may be `copies`)
//   store       (index, float4): receives the numbers index .. index + 3 of the output (rows, D)
//   BATCH       splits of which a thread of the last block loads outputs at a time
// Returns, for the whole block, whether this block had the last word and called `store`.
template <int D, int COPIES, int HEADS, int THREADS, int BATCH = 8, class Store>
__device__ __forceinline__ bool finish_split(const float* copies, const float2* statistics, void* scratch,
                                             const DecodeTarget& target, int group, int split, int splits, int active,
                                             const Store& store) {
  constexpr int QUADS = D / 4;   // float4s of a row
  __syncthreads();               // copies and statistics are complete
  for (int i = threadIdx.x; i < group * QUADS; i += THREADS) {
    const int h = i / QUADS, d = i % QUADS * 4;
    float reference = kNoReference, total = 0.f;
#pragma unroll
    for (int c = 0; c < COPIES; ++c) reference = fmaxf(reference, statistics[c * HEADS + h].x);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int c = 0; c < COPIES; ++c) {
      const float2 own = statistics[c * HEADS + h];
      const float weight = exp2_approx(own.x - reference);
      total = fmaf(weight, own.y, total);
      add_scaled(sum, weight, *reinterpret_cast<const float4*>(copies + (c * HEADS + h) * D + d));
    }
    if (active == 1) {
      store_merged<D>(target, store, h, d, reference, total, sum);
    } else {
      *reinterpret_cast<float4*>(target.partial_output + (static_cast<u64>(h) * splits + split) * D + d) = sum;
      if (d == 0) target.partial_statistics[h * splits + split] = make_float2(reference, total);
    }
  }
  if (active == 1) return true;

  // The last block to arrive merges: it sees what the others stored before they took their tickets.
  KVB_SHARED(int, is_last);
  __syncthreads();   // the block has stored its part
  if (threadIdx.x == 0) {
    is_last = take_ticket(target.ticket) == static_cast<u32>(active) - 1;
    if (is_last) *target.ticket = 0;   // ready for the next launch
  }
  __syncthreads();
  if (!is_last) return false;

  // With few outputs, `shares` threads merge different splits of the same four, so that many loads are in flight; each
  // loads statistics and outputs together: one wait for memory, not two.
  float4* sums = static_cast<float4*>(scratch);                       // (THREADS,)
  float2* totals = reinterpret_cast<float2*>(sums + THREADS);         // (THREADS,): reference, total
  const int quads = group * QUADS, shares = max(THREADS / quads, 1);
  for (int first = 0; first < quads; first += THREADS) {   // one pass unless shares == 1
    const int i = shares > 1 ? threadIdx.x % quads : first + threadIdx.x, share = shares > 1 ? threadIdx.x / quads : 0;
    const bool present = i < quads && share < shares;
    const int h = i / QUADS, d = i % QUADS * 4;
    float reference = kNoReference, total = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    if (present) {
      const float2* statistic_of = target.partial_statistics + h * splits;
      const float* output_of = target.partial_output + static_cast<u64>(h) * splits * D + d;
      for (int s = share; s < active; s += BATCH * shares) {
        float2 statistic[BATCH];
        float4 part[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
          const int other = s + k * shares;
          statistic[k] = make_float2(kNoReference, 0.f);
          part[k] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (other < active) {
            statistic[k] = __ldcg(statistic_of + other);
            part[k] = __ldcg(reinterpret_cast<const float4*>(output_of + static_cast<u64>(other) * D));
          }
        }
        float largest = reference;
#pragma unroll
        for (int k = 0; k < BATCH; ++k) largest = fmaxf(largest, statistic[k].x);
        const float rescale = exp2_approx(reference - largest);
        reference = largest;
        total *= rescale;
        sum = scaled(rescale, sum);
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
          const float weight = exp2_approx(statistic[k].x - largest);
          total = fmaf(weight, statistic[k].y, total);
          add_scaled(sum, weight, part[k]);
        }
      }
    }
    if (shares > 1) {
      sums[threadIdx.x] = sum;
      totals[threadIdx.x] = make_float2(reference, total);
      __syncthreads();
      if (share == 0)
#pragma unroll 1
        for (int k = 1; k < shares; ++k) {
          const float2 other = totals[threadIdx.x + k * quads];
          add_part(reference, total, sum, other.x, other.y, sums[threadIdx.x + k * quads]);
        }
    }
    if (share == 0 && present) store_merged<D>(target, store, h, d, reference, total, sum);
  }
  return true;
}

}  // namespace kvb
