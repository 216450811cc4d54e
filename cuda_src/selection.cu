// Which tokens are attended: the prefix, in the order (logit descending, token ascending), whose mass reaches a target
// or which has a given length; as ascending lists, one per query head or one per KV head, the union of its query heads.
// Reference: reference/selection.py.
//
//   candidates    tokens [start, stop) of a sequence, from its length, `sinks`, `recent` and `block`, whose logits are
//                 finite.  Each has a key, by which it is ordered, and a mass W = 2^31 exp(weight - largest), rounded:
//                    plain    key = weight = logit
//                    shrink   key = weight = mean + keep (logit - mean) + keep sigma^2 / 2
//                    shift    key = logit - sigma^2, weight = logit - sigma^2 / 2; chosen are then all tokens whose
//                             logit is not below the last key
//   no sort, no   sums are those of integers, so the result does not depend on the order in which blocks arrive.  Equal
//   float sums    logits have equal masses, on every machine: exp is a polynomial of rounded float32 operations.
//                 (Those of selection_top_k_kernel, where no mass decides, are float sums in a fixed order.)
//
// selection_moments_kernel   ("shrink" only) mean and variance of the candidates, in double, per part
// selection_histogram_kernel per part of a row: largest key and weight, and how many keys share each bin of width 1/64.
//                            Bins are those of the key itself, counted modulo 8192, so the largest need not be known
//                            first; the 2048 that end with it are kept.  Where keys are further apart than 8192 bins,
//                            128 in units of the logit, the part is counted a second time.
// selection_collect_kernel   Each block adds up the bins of its row.  Masses of a bin are known within exp(1/64), so
//                            they bracket the key at which the prefix ends: it is among some hundred tokens.  The block
//                            sums exact masses of its part, sets bits for tokens above the bracket, lists those inside.
//                            The last block of a list (of the query heads of a KV head) finds the last token of each
//                            prefix among the listed ones, digit by digit of (key, token), all query heads at once,
//                            and by comparing all with all where few are left, since equal keys share all digits but
//                            the last; sets their bits and turns bits into positions (kvb/top_p.cuh).
//                            The bracket is but a hint: where the exact sums contradict it, or more tokens fall into it
//                            than a list holds, the last block searches the whole row.
//
// selection_top_k_kernel     Top-k of a few, of a list per row, in one launch: kvb/top_k.cuh.
//
//   Grid      (parts of a row, query heads, batch), 512 threads, one block to a multiprocessor; a block takes `span`
//             tokens.  "The last block continues" needs no waiting: whoever takes the last ticket sees what the others
//             wrote.
//   Bytes     4 per token and query head in each of two passes (8 with sigma), the second mostly from L2; 1/8 for bits,
//             8 per listed token, and 8 KB of bins per part, which every block of the row reads.
//   Counts    Per token and query head 10 instructions and an addition to shared memory for the histogram, 21 for the
//             collection: at 32 heads of 128K tokens 4.2 M * 32 / 32 = 4.2 M warp instructions, 5 us of the 900 G/s
//             that an H100 issues.
//   Latency   is the rest, of a block of the collection 10.3 us in all (samples of ncu, 32 heads of 128K tokens): 1.6
//             until loads are under way, 2.6 for the bracket, 4.3 for the tokens, 1.6 for sums and ticket; and 5 to 6
//             for the last block, 2.4 until it has what the others wrote, 1.1 for the search, 2.5 for positions.  So
//             what it needs from memory it asks for at once; reductions are unrolled or single instructions; barriers
//             are few.
//   Loads     Four of 16 bytes per thread are under way while four are worked on, 32 KB per multiprocessor.  Neither
//             kernel branches on a token: the four of a load overlap.
//   Shared    Additions are of 32 bits: those of 64 would be loops of compare and swap.
//   Tried     On an H100, 32 heads of 128K tokens, 2 % chosen, caches flushed and not: three passes, with a list
//             reserved in global memory by each warp and a search of each head by one warp: 126 and 109 us.  The two
//             passes above, but unrolled throughout, with branches on tokens and a load for each bin and part: 47 and
//             36 us.  Loops for all that is done once, to wait less for instructions, and keys 32 units apart counted a
//             second time: 43 and 34.5.  This version: 37 and 28.6.
//             Launches that overlap (griddepcontrol), all of a decode step of rabitq: 61.0 us instead of 57.6, since
//             blocks that begin early share the multiprocessors that are free first; the collection and attention
//             alone, with a multiprocessor for each block: 58.5.
//             Top-k in one launch of more tokens, or of query heads that share a list, whose parts' lists find no room
//             in shared memory and are searched by digits: 45 us for 655 of 32K tokens instead of 25, and Quest's step
//             of 1024 tokens, many of them equal, 133 instead of 70.
//   Memory    is left as it was found: what must be zero before a launch is zero after it.
#include "kvb/device.cuh"
#include "kvb/selection.cuh"
#include "kvb/top_k.cuh"
#include "kvb/top_p.cuh"

namespace kvb {

using namespace selection;

// Of a part of a row, for the collection.
struct PartBounds {
  u32 largest_key, largest_weight;   // order keys; 0: no candidate
  u32 candidates;                    // and kInfinite, if a logit is +infinity
  float outside;                     // mass of what is always kept, relative to largest_weight, about
};
constexpr u32 kInfinite = 1u << 31;
static_assert(sizeof(PartBounds) == 16, "BOUNDS_WORDS of kvbench/ops/selection.py");

#define KVB_SELECTION_PARAMETERS                                                                                \
  const float *__restrict__ logits, const float *__restrict__ sigma, const int *__restrict__ lengths,           \
      int tokens, int span, int quads, int sinks, int recent, int block


// The tokens [begin, end) of the block's part, in tiles of 128 quads tokens, one per warp at a time.
// kAtOnce : quads that are loaded together, while those before them are worked on
template <int C, int kAtOnce>
struct Tiles {
  const Row<C>& row;
  int first, begin, end, quads;
  bool aligned;

  __device__ __forceinline__ Tiles(const Row<C>& row, int span, int quads) : row(row), quads(quads) {
    first = static_cast<int>(blockIdx.x) * span;
    begin = max(first, row.start);
    end = min(first + span, row.stop);
    aligned = (reinterpret_cast<u64>(row.logits) | (C == kPlain ? 0 : reinterpret_cast<u64>(row.sigma))) % 16 == 0;
  }
  // values[i] = source[t + 128 i .. t + 128 i + 3], not a number outside [begin, end).
  __device__ __forceinline__ void load(float (&values)[kAtOnce][4], const float* source, int tile, int from) const {
    const int t = tile + from * 128 + static_cast<int>(threadIdx.x % 32) * 4;
    if (aligned && tile >= begin && tile + 128 * quads <= end) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (from + i < quads) {
          const float4 loaded = *reinterpret_cast<const float4*>(source + t + i * 128);
          values[i][0] = loaded.x, values[i][1] = loaded.y, values[i][2] = loaded.z, values[i][3] = loaded.w;
        }
      return;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (from + i < quads)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = t + i * 128 + j;
          values[i][j] = at >= begin && at < end ? source[at] : __uint_as_float(0x7fffffffu);
        }
  }
  // Calls prepare(), which the whole block does, when the first loads are under way; it returns whether what is
  // infinite is to be no number, too.  Then visit(i, j, y, noise) for token tile + 128 (from + i) + 4 lane + j, with y
  // not a number outside the range, and done(tile, from, last) after those that were loaded together.
  template <class Prepare, class Visit, class Done>
  __device__ __forceinline__ void visit(const Prepare& prepare, const Visit& visit, const Done& done) const {
    float y[kAtOnce][4], next_y[kAtOnce][4];
    float noise[C == kPlain ? 1 : kAtOnce][4], next_noise[C == kPlain ? 1 : kAtOnce][4];
    int tile = first + static_cast<int>(threadIdx.x / 32) * 128 * quads, from = 0;   // that y is of, after `started`
    bool started = false, only_finite = false;
#pragma unroll 1
    for (int next_tile = tile, next_from = 0;;) {
      if (next_tile < end) {
        load(next_y, row.logits, next_tile, next_from);
        if constexpr (C != kPlain) load(next_noise, row.sigma, next_tile, next_from);
      }
      if (!started) {
        only_finite = prepare();
        started = true;
      } else {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (from + i < quads) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (only_finite && !is_finite(y[i][j])) y[i][j] = __uint_as_float(0x7fffffffu);
              visit(i, j, y[i][j], C == kPlain ? 0.f : noise[C == kPlain ? 0 : i][j]);
            }
          }
        done(tile, from, next_from == 0);
      }
      if (next_tile >= end) return;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          y[i][j] = next_y[i][j];
          if constexpr (C != kPlain) noise[i][j] = next_noise[i][j];
        }
      tile = next_tile, from = next_from, next_from += kAtOnce;
      if (next_from >= quads) next_from = 0, next_tile += kWarps * 128 * quads;
    }
  }
};

// Calls visit(y) for the tokens of the block's part that are always kept.
template <int C, class Visit>
__device__ __forceinline__ void for_always_kept(const Row<C>& row, int span, const Visit& visit) {
  const int first = static_cast<int>(blockIdx.x) * span, last = min(first + span, row.length);
  for (int t = first + static_cast<int>(threadIdx.x); t < min(last, row.start); t += kThreads) visit(row.logits[t]);
  for (int t = max(first, row.stop) + static_cast<int>(threadIdx.x); t < last; t += kThreads) visit(row.logits[t]);
}

// moments : (batch, q_heads, parts, 4), written: count, mean, sum of squared distances from it, sum of sigma^2
__global__ void __launch_bounds__(kThreads, 2)
    selection_moments_kernel(KVB_SELECTION_PARAMETERS, double* moments) {
  KVB_SHARED(double, scratch, [kWarps]);
  const u64 row_id = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const Row<kShrink> row({logits, sigma, lengths, nullptr, tokens, span, quads, sinks, recent, block}, row_id,
                         blockIdx.z);
  const int first = static_cast<int>(blockIdx.x) * span, begin = max(first, row.start);
  const int end = min(first + span, row.stop);
  double count = 0., sum = 0., noises = 0., squares = 0.;
#pragma unroll 4
  for (int t = begin + static_cast<int>(threadIdx.x); t < end; t += kThreads) {
    const float y = row.logits[t], noise = row.sigma[t];
    if (!is_finite(y) || !is_finite(noise)) continue;
    count += 1.;
    sum += y;
    noises += __fmul_rn(noise, noise);
  }
  count = block_sum(count, scratch);
  sum = block_sum(sum, scratch);
  noises = block_sum(noises, scratch);
  const double mean = count == 0. ? 0. : sum / count;
#pragma unroll 4
  for (int t = begin + static_cast<int>(threadIdx.x); t < end; t += kThreads) {
    if (!is_finite(row.logits[t]) || !is_finite(row.sigma[t])) continue;
    const double apart = row.logits[t] - mean;
    squares += apart * apart;
  }
  squares = block_sum(squares, scratch);
  if (threadIdx.x == 0) {
    double* part = moments + (row_id * gridDim.x + blockIdx.x) * 4;
    part[0] = count;
    part[1] = mean;
    part[2] = squares;
    part[3] = noises;
  }
}

// bounds : (batch, q_heads, parts)        counts, masses : (batch, q_heads, parts, kBins), masses for shift alone, and
// both only where the part has candidates        total : whether the mass of what is always kept counts, too
template <int C>
__global__ void __launch_bounds__(kThreads, 1)
    selection_histogram_kernel(KVB_SELECTION_PARAMETERS, const double* __restrict__ moments, PartBounds* bounds,
                               u32* counts, float* masses, int total) {
  constexpr int RING = C == kShift ? kBins : kRing;
  KVB_SHARED(u32, bins, [C == kShift ? 3 : 1][RING + 4]);   // and what is no candidate
  KVB_SHARED(u32, reduced, [4]);   // largest order keys of key, -key and weight; candidates
  KVB_SHARED(u64, sums, [kWarps]);
  const u64 row_id = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y, part = row_id * gridDim.x + blockIdx.x;
  const Row<C> row({logits, sigma, lengths, moments, tokens, span, quads, sinks, recent, block}, row_id, blockIdx.z);
  const Tiles<C, C == kPlain ? 4 : 2> tiles(row, span, quads);
  auto zero_bins = [&] {
    for (u32 i = threadIdx.x; i < sizeof(bins) / 16; i += kThreads) reinterpret_cast<uint4*>(bins)[i] = {0, 0, 0, 0};
  };
  float largest = -kLargestFinite, smallest = kLargestFinite, heaviest = -kLargestFinite;
  u32 count = 0;
  tiles.visit(
      [&] {
        zero_bins();
        if (threadIdx.x < 4) reduced[threadIdx.x] = 0;
        __syncthreads();
        return false;
      },
      [&](int, int, float y, float noise) {
        float key, weight;
        const bool usable = row.correct(y, noise, key, weight);
        count += usable;
        // Without a branch tokens overlap.  fmaxf and fminf pass over what is not a number.
        const float own = usable ? key : __uint_as_float(0x7fffffffu);
        largest = fmaxf(largest, C == kPlain ? y : own);   // plain: infinite, if any is
        smallest = fminf(smallest, own);
        if (C == kShift && usable) heaviest = fmaxf(heaviest, weight);
        if (C != kShift) atomicAdd(&bins[0][usable ? bin_of(own) & (RING - 1) : RING], 1u);
      },
      [](int, int, bool) {});
  const bool infinite = __syncthreads_or(largest > kLargestFinite);
  if (infinite) {
    largest = -kLargestFinite;
    for (int t = tiles.begin + static_cast<int>(threadIdx.x); t < tiles.end; t += kThreads)
      if (is_finite(row.logits[t])) largest = fmaxf(largest, row.logits[t]), smallest = fminf(smallest, row.logits[t]);
  }
  const bool any = smallest < kLargestFinite || largest > -kLargestFinite;   // not of this thread's tiles, if infinite
  if (C != kShift) heaviest = largest;
  bool kept = false;
  if (total)
    for_always_kept(row, span, [&](float y) {
      if (is_finite(y)) heaviest = fmaxf(heaviest, y), kept = true;
    });
  const u32 largest_order = warp_max(any ? order_key(largest) : 0u);
  const u32 smallest_order = warp_max(any ? ~order_key(smallest) : 0u);
  const u32 heaviest_order = warp_max(any || kept ? order_key(heaviest) : 0u);
  count = warp_sum(count);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&reduced[0], largest_order);
    atomicMax(&reduced[1], smallest_order);
    atomicMax(&reduced[2], heaviest_order);
    atomicAdd(&reduced[3], count);
  }
  __syncthreads();
  heaviest = from_order_key(reduced[2]);
  if (reduced[3]) {
    // Keys that share a bin, RING bins apart: then only those count that are near the largest.  With "shift", masses
    // must wait for the largest weight anyway.
    const u32 top = static_cast<u32>(bin_of(from_order_key(reduced[0])));
    if (C == kShift || top - static_cast<u32>(bin_of(from_order_key(~reduced[1]))) >= RING) {
      zero_bins();
      __syncthreads();
#pragma unroll 4
      for (int t = tiles.begin + static_cast<int>(threadIdx.x); t < tiles.end; t += kThreads) {
        float key, weight;
        const bool usable = row.candidate(t, key, weight);
        const u32 bin = usable ? static_cast<u32>(bin_of(key)) : 0;
        if (!usable || top - bin >= kBins) continue;
        atomicAdd(&bins[0][bin % RING], 1u);
        if constexpr (C == kShift) add_mass(&bins[1][bin % RING], &bins[2][bin % RING], mass_of(weight, heaviest));
      }
      __syncthreads();
    }
#pragma unroll
    for (u32 i = threadIdx.x; i < kBins; i += kThreads) {   // of those that end with the largest key's, modulo kBins
      counts[part * kBins + i] = bins[0][(top - (top - i) % kBins) % RING];
      if constexpr (C == kShift)
        masses[part * kBins + i] = static_cast<float>(static_cast<u64>(bins[2][i]) << 32 | bins[1][i]);
    }
  }
  u64 outside = 0;
  if (total) {
    for_always_kept(row, span, [&](float y) {
      if (is_finite(y)) outside += mass_of(y, heaviest);
    });
    outside = block_sum(outside, sums);
  }
  if (threadIdx.x == 0)
    bounds[part] = {reduced[0], reduced[2], reduced[3] | (infinite ? kInfinite : 0u), static_cast<float>(outside)};
}

// The bracket, from the histograms of the parts of a row, at most 32: a lane each.  The block calls it; what it has
// written to shared memory before is seen by all of it afterwards, if there are candidates.
template <int C>
__device__ __forceinline__ Bracket find_bracket(const PartBounds* bounds, const u32* counts, const float* masses,
                                                u32 share, int least, int most, bool total) {
  constexpr int PER_THREAD = kBins / kThreads, GROUPS = kBins / PER_THREAD;
  static_assert(PER_THREAD == 4, "a load of 16 bytes");
  KVB_SHARED(uint4, row_counts, [GROUPS]);
  KVB_SHARED(float, row_masses, [C == kShift ? kBins : 1]);
  KVB_SHARED(u32, count_sums, [kWarps]);
  KVB_SHARED(u64, mass_sums, [kWarps]);
  KVB_SHARED(int, ends, [2]);   // the first bin up to which the prefix may be long enough, and surely is
  const int parts = gridDim.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own_bin = static_cast<int>(threadIdx.x) * PER_THREAD;
  constexpr int AT_ONCE = 8;   // parts; their loads are under way together
  PartBounds own = {0, 0, 0, 0.f};
  if (lane < parts) own = bounds[lane];
  uint4 loaded[AT_ONCE];
  auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (first + i < parts) loaded[i] = *reinterpret_cast<const uint4*>(counts + (first + i) * kBins + own_bin);
  };
  load(0);
  const u32 largest_order = warp_max(own.largest_key), heaviest_order = warp_max(own.largest_weight);
  const u32 infinite = __any_sync(0xffffffffu, own.candidates & kInfinite);
  own.candidates &= ~kInfinite;
  const int candidates = static_cast<int>(warp_sum(own.candidates));
  const float infinity = __uint_as_float(0x7f800000u);
  if (candidates == 0)
    return {0.f, heaviest_order ? from_order_key(heaviest_order) : 0.f, kLargestFinite, infinity, 0, infinite, {}};
  Bracket bracket = {from_order_key(largest_order), from_order_key(heaviest_order), 0.f, 0.f, candidates, infinite, {}};
  constexpr float LOG2_E = 1.44269504f;
  float scale = 0.f, outside = 0.f;
  if (total || C == kShift) {
    if (own.largest_weight)
      scale = exp2_approx((from_order_key(own.largest_weight) - bracket.largest_weight) * LOG2_E);
    outside = warp_sum(own.outside * scale);
  }
  const u32 top = static_cast<u32>(bin_of(bracket.largest_key));
  // A part's bins reach from its own largest key downwards.
  const u32 gap = own.candidates ? top - static_cast<u32>(bin_of(from_order_key(own.largest_key))) : 0xffffffffu;
  auto bound = [&](int below) {   // of a bin, from below; exact up to 2^18
    return (static_cast<float>(static_cast<int>(top)) - static_cast<float>(below)) / kBinsPerUnit;
  };
  u32 count[PER_THREAD] = {};
  float sums[PER_THREAD] = {};
#pragma unroll 1
  for (int first = 0;;) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (first + i < parts) {
        const u32 part_gap = __shfl_sync(0xffffffffu, gap, first + i);
        const float part_scale = C == kShift ? __shfl_sync(0xffffffffu, scale, first + i) : 0.f;
        const u32 part_counts[PER_THREAD] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
          const bool counts_here = ((top - own_bin - j) & (kBins - 1)) >= part_gap;
          count[j] += counts_here ? part_counts[j] : 0;
          if (C == kShift && counts_here) sums[j] += masses[(first + i) * kBins + own_bin + j] * part_scale;
        }
      }
    first += AT_ONCE;
    if (first >= parts) break;
    load(first);
  }
  row_counts[threadIdx.x] = {count[0], count[1], count[2], count[3]};
  if constexpr (C == kShift)
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) row_masses[own_bin + j] = sums[j];
  if (threadIdx.x < 2) ends[threadIdx.x] = kBins;
  __syncthreads();

  // From the largest key downwards, by whole groups of bins; those of the first that lie above it are the lowest, which
  // weigh e^-32 at most, and are left out.
  const int from = (static_cast<int>(top / PER_THREAD) - static_cast<int>(threadIdx.x)) & (GROUPS - 1);
  const uint4 own_group = row_counts[from];
  const u32 group_counts[PER_THREAD] = {own_group.w, own_group.z, own_group.y, own_group.x};
  const int first_below = own_bin - (PER_THREAD - 1 - static_cast<int>(top % PER_THREAD));   // bins below the top
  u64 mass[PER_THREAD], own_mass = 0;
  u32 own_count = 0;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const int below = first_below + j;
    const float lowest = bound(below) - bracket.largest_weight;
    count[j] = below >= 0 ? group_counts[j] : 0;
    mass[j] = C == kShift ? (below >= 0 ? static_cast<u64>(row_masses[C == kShift ? from * PER_THREAD + 3 - j : 0]) : 0)
                          : PrefixEstimate<C>::mass_of_bin(count[j], lowest);
    own_count += count[j];
    own_mass += mass[j];
  }
  u32 count_upto = warp_prefix(own_count);
  u64 mass_upto = warp_prefix(own_mass);
  if (lane == 31) count_sums[warp] = count_upto, mass_sums[warp] = mass_upto;
  __syncthreads();
  {
    const u32 counts_upto = warp_prefix<kWarps>(lane < kWarps ? count_sums[lane] : 0u);
    const u64 masses_upto = warp_prefix<kWarps>(lane < kWarps ? mass_sums[lane] : u64(0));
    const u32 count_before = __shfl_sync(0xffffffffu, counts_upto, (warp + 31) % 32);
    const u64 mass_before = __shfl_sync(0xffffffffu, masses_upto, (warp + 31) % 32);
    if (warp > 0) count_upto += count_before, mass_upto += mass_before;
    own_mass = __shfl_sync(0xffffffffu, masses_upto, kWarps - 1);
  }
  const u64 everything = own_mass;
  const PrefixEstimate<C> enough = {everything, outside, share, candidates, least, most};
#pragma unroll
  for (int surely = 0; surely < 2; ++surely) {   // both sums grow
    if (threadIdx.x == 0 && enough(0, 0, surely)) atomicMin(&ends[surely], -1);
    const u32 votes = __ballot_sync(0xffffffffu, enough(mass_upto, count_upto, surely));
    if (lane != __ffs(static_cast<int>(votes)) - 1) continue;
    u64 prefix = mass_upto;
    u32 size = count_upto;
    int bin = first_below + PER_THREAD - 1;
#pragma unroll
    for (int j = PER_THREAD - 1; j > 0; --j) {
      prefix -= mass[j];
      size -= count[j];
      if (enough(prefix, size, surely)) bin = first_below + j - 1;
    }
    atomicMin(&ends[surely], max(bin, 0));
  }
  __syncthreads();
  set_bounds(bracket, ends, static_cast<int>(top), kBins - PER_THREAD);
  return bracket;
}

// Transposes 8x8 nibbles: lane 8 g + r gives nibbles i = 0 .. 7 and receives nibble r of the lanes 8 g + i.
__device__ __forceinline__ u32 transpose_nibbles(u32 x) {
  const u32 lane = threadIdx.x;
  u32 other = __shfl_xor_sync(0xffffffffu, x, 4);
  x = lane & 4 ? (x & 0xffff0000u) | other >> 16 : (x & 0x0000ffffu) | other << 16;
  other = __shfl_xor_sync(0xffffffffu, x, 2);
  x = lane & 2 ? (x & 0xff00ff00u) | (other >> 8 & 0x00ff00ffu) : (x & 0x00ff00ffu) | (other & 0x00ff00ffu) << 8;
  other = __shfl_xor_sync(0xffffffffu, x, 1);
  return lane & 1 ? (x & 0xf0f0f0f0u) | (other >> 4 & 0x0f0f0f0fu) : (x & 0x0f0f0f0fu) | (other & 0x0f0f0f0fu) << 4;
}

// bounds, counts, masses : from selection_histogram_kernel        tickets : (batch, lists), zero
// brackets : (batch, q_heads)        sums : (batch, q_heads, parts)
// masks : (batch, q_heads, mask_words): tokens above the bracket, a bit each; mask_words is a multiple of 4
// entries : (batch, q_heads, parts, capacity)
// indices : (batch, lists, tokens), ascending     out_counts : (batch, lists)     mass : (batch, q_heads)
// share : of the mass, in units of 2^-16        group : query heads of a list, at most kMaxGroup
// bounded : whether the number of tokens is, from above
template <int C>
__global__ void __launch_bounds__(kThreads, 1)
    selection_collect_kernel(KVB_SELECTION_PARAMETERS, const double* __restrict__ moments,
                             const PartBounds* __restrict__ bounds, const u32* __restrict__ counts,
                             const float* __restrict__ masses, u32* tickets, Bracket* brackets, PartSums* sums,
                             u32* masks, Entry* entries, int* indices, int* out_counts, float* mass, u32 share,
                             int least, int most, int total, int mask_words, int capacity, int group, int bounded) {
  KVB_SHARED(u32, listed, [1]);
  KVB_SHARED(u64, warp_sums, [3][kWarps]);
  const u64 row_id = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const SelectionArguments arguments = {logits, sigma, lengths, moments, tokens, span, quads, sinks, recent, block};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, parts = gridDim.x;
  {
    const u64 part = row_id * parts + blockIdx.x;
    const Row<C> row(arguments, row_id, blockIdx.z);
    const Tiles<C, C == kPlain ? 4 : 2> tiles(row, span, quads);
    Bracket bracket;
    u32* words = masks + row_id * mask_words;
    Entry* own_entries = entries + part * capacity;
    u64 mass_inside = 0, mass_above = 0;
    u32 above = 0, count_above = 0;   // above: of the whole tile
    u32 now_above = 0, now_inside = 0;   // of the tokens that were loaded together
    tiles.visit(
        [&] {
          if (threadIdx.x == 0) *listed = 0;
          bracket = find_bracket<C>(bounds + row_id * parts, counts + row_id * parts * kBins,
                                    masses + row_id * parts * kBins, share, least, most, total);
          if (blockIdx.x == 0 && threadIdx.x == 0) brackets[row_id] = bracket;
          return C == kPlain && bracket.infinite;
        },
        [&](int i, int j, float y, float noise) {
          float key, weight;
          const u32 bit = 1u << (4 * i + j);
          if (C == kPlain) {   // what is no number has no mass and passes no comparison
            key = weight = y;
          } else if (!row.correct(y, noise, key, weight)) {
            return;
          }
          const u32 own = mass_of(weight, bracket.largest_weight);
          mass_inside += own;
          if (key >= bracket.high) {
            mass_above += own;
            if (C == kShift) ++count_above;
            else now_above |= bit;
          }
          if (key >= bracket.low) now_inside |= bit;
          if (C == kShift) {   // what decides in the end is the logit
            if (key >= bracket.high) now_inside &= ~bit;
            if (y >= bracket.high) now_above |= bit;
            else if (y >= bracket.low) now_inside |= bit;
          }
        },
        [&](int tile, int from, bool last) {
          if (C != kShift) now_inside &= ~now_above, count_above += static_cast<u32>(__popc(now_above));
          for (; now_inside; now_inside &= now_inside - 1) {
            const int bit = __ffs(static_cast<int>(now_inside)) - 1;
            const int t = tile + (from + bit / 4) * 128 + lane * 4 + bit % 4;
            float key, weight;
            row.candidate(t, key, weight);
            const u32 at = atomicAdd(listed, 1u);
            if (at < static_cast<u32>(capacity)) own_entries[at] = {order_key(key), t};
          }
          above |= now_above << (4 * from);
          now_above = 0;
          if (!last) return;
          const u32 word = transpose_nibbles(above);
          const int t = tile + lane % 8 * 128 + lane / 8 * 32;
          if (lane % 8 < quads && t < tiles.end) words[t / 32] = word;
          above = 0;
        });
    // Words of the part in front of the first candidate are those of tiles, too; a part without candidates has none.
    u64 outside = 0;
    if (total) {
      for_always_kept(row, span, [&](float y) {
        if (is_finite(y)) outside += mass_of(y, bracket.largest_weight);
      });
      outside = block_sum(outside, warp_sums[0]);
    }
    mass_inside = warp_sum(mass_inside);
    mass_above = warp_sum(mass_above);
    count_above = warp_sum(count_above);
    if (lane == 0) {
      warp_sums[0][warp] = mass_inside;
      warp_sums[1][warp] = mass_above;
      warp_sums[2][warp] = count_above;
    }
    __syncthreads();
    if (warp == 0) {
      const u64 inside_sum = warp_sum(lane < kWarps ? warp_sums[0][lane] : u64(0));
      const u64 above_sum = warp_sum(lane < kWarps ? warp_sums[1][lane] : u64(0));
      const u32 count_sum = warp_sum(lane < kWarps ? static_cast<u32>(warp_sums[2][lane]) : 0u);
      if (lane == 0) sums[part] = {inside_sum, above_sum, outside, count_sum, *listed};
    }
  }
  const u32 list_id = (blockIdx.z * gridDim.y + blockIdx.y) / static_cast<u32>(group);
  if (!is_last_block(tickets + list_id, gridDim.x * group)) return;
  KVB_DYNAMIC_SHARED(u32, digits);   // (group, 3, kDigits)
  finish_lists<C>(arguments, {brackets, sums, masks, entries, indices, out_counts, mass, mask_words, capacity},
                  {share, least, most, bounded}, list_id, group, digits);
}


// The first k of each query head, in one launch, a list each (kvb/top_k.cuh, where other arguments are named).
// quads : not looked at
__global__ void __launch_bounds__(kThreads, 1)
    selection_top_k_kernel(KVB_SELECTION_PARAMETERS, u32* tickets, TopKPart* parts, Entry* entries, int* indices,
                           int* out_counts, float* mass, int k, int capacity, int places, int room) {
  KVB_DYNAMIC_SHARED(char, shared);
  TopKMemory& memory = *reinterpret_cast<TopKMemory*>(shared);
  float* const part_logits = reinterpret_cast<float*>(shared + sizeof(TopKMemory));   // (span,)
  const u64 row_id = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const Row<kPlain> row({logits, nullptr, lengths, nullptr, tokens, span, quads, sinks, recent, block}, row_id,
                        blockIdx.z);
  const int first = static_cast<int>(blockIdx.x) * span, size = max(min(span, row.stop - first), 0);
  const bool aligned = reinterpret_cast<u64>(row.logits) % 16 == 0;
  // Four tokens at a time, four times at once, and as many under way meanwhile.
  constexpr int AT_ONCE = 4, STEP = AT_ONCE * 4 * kThreads;
  float y[AT_ONCE][4], next[AT_ONCE][4];
  auto load = [&](int from) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = from + i * 4 * kThreads, t = first + at;
      if (aligned && t >= row.start && at + 4 <= size) {
        const float4 four = *reinterpret_cast<const float4*>(row.logits + t);
        next[i][0] = four.x, next[i][1] = four.y, next[i][2] = four.z, next[i][3] = four.w;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          next[i][j] = t + j >= row.start && at + j < size ? row.logits[t + j] : __uint_as_float(0x7fffffffu);
      }
    }
  };
  TopKCounts counts;
  load(4 * static_cast<int>(threadIdx.x));
  let_next_start();
  start_top_k(memory);
  __syncthreads();
#pragma unroll 1
  for (int from = 4 * static_cast<int>(threadIdx.x); from < size; from += STEP) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) y[i][j] = next[i][j];
    load(from + STEP);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = from + i * 4 * kThreads + j;
        if (at < size) counts.add(memory, part_logits, at, y[i][j]);
      }
  }
  choose_top_k(memory, counts, {part_logits, nullptr, first, size},
               {tickets, parts, entries, indices, out_counts, mass, k, capacity, places, room, tokens});
}

}  // namespace kvb

#define KVB_EXPORT_SELECTION(C)                        \
  KVB_EXPORT(96, kvb::selection_histogram_kernel<C>)   \
  KVB_EXPORT(128, kvb::selection_collect_kernel<C>)
KVB_EXPORT_SELECTION(0)
KVB_EXPORT_SELECTION(1)
KVB_EXPORT_SELECTION(2)
KVB_EXPORT(128, kvb::selection_top_k_kernel)
KVB_EXPORT(64, kvb::selection_moments_kernel)
