// The first k tokens of each row, in one launch: a block has the logits of a part of a row in shared memory and lists
// its own first k, the last block of a list (of the rows of a KV head) finds those of all among the listed ones.
//
//   Parts     Each block counts its logits by bins of width 1/64, modulo kRing, as they come, adds bins up from its
//             largest logit downwards until there are k, and lists whole bins: some more than k, as many as share a
//             bin.  Where these are more than a list holds, it searches for its k-th logit, digit by digit.
//   Merge     The last block takes what the parts have listed as one more part, and lists the first k of that.  The few
//             that are left are ranked, and sorted by position, by counting: all compared with all.
//   Code      that runs but once comes from memory: 2200 instructions that only the last block ran, a search by digits
//             of all lists and bits that were turned into positions, took 10 us, half of them waiting for instructions.
//             So the merge runs those that the block has at hand, and what is rare is not unrolled.
//   Order     Entries stand in a list as they come; neither what is chosen nor its mass depends on it.
#pragma once
#include "kvb/selection.cuh"

namespace kvb::selection {

// What a part leaves for the last block.
struct alignas(16) TopKPart {
  float mass, largest;               // of its candidates in units of the largest one's; the largest logit
  u32 candidates, listed;
};
static_assert(sizeof(TopKPart) == 16, "no more than PartSums has");

constexpr int kMerged = 1024;        // tokens that the last block lists, and k, at most

// Shared memory of a block, besides its logits.
struct TopKMemory {
  union {
    u32 bins[kRing + 4];             // numbers of logits, and of what is no candidate; then digits, or bits
    struct {
      Entry listed[kMerged];
      u64 chosen[kMerged];           // ranks
    } merge;
  };
  float warp_masses[kWarps];
  u32 warp_counts[kWarps];
  Search search;
  u32 largest, smallest;             // order keys of the largest logit, and of the smallest, inverted
  u32 last_bin, upto;                // bins below the top that are listed, kBins: all; logits up to there
  u32 listed, unused;
};
static_assert(sizeof(TopKMemory) == 32992, "TOP_K_BYTES of kvbench/ops/selection.py");

// Makes the memory ready, after the next barrier.
__device__ __forceinline__ void start_top_k(TopKMemory& memory) {
#pragma unroll 1
  for (u32 i = threadIdx.x; i < sizeof(memory.bins) / 16; i += kThreads)
    reinterpret_cast<uint4*>(memory.bins)[i] = {0, 0, 0, 0};
  if (threadIdx.x == 0) {
    memory.largest = memory.smallest = memory.listed = 0;
    memory.last_bin = kBins;
  }
}

// What a thread knows of the logits that it has added.
struct TopKCounts {
  float largest = -kLargestFinite, smallest = kLargestFinite;
  // Logit y of the part, to logits[at]; what is not finite is no candidate.
  __device__ __forceinline__ void add(TopKMemory& memory, float* logits, int at, float y) {
    const bool usable = is_finite(y);
    const float own = usable ? y : __uint_as_float(0x7fffffffu);
    logits[at] = own;
    largest = fmaxf(largest, own);   // passes over what is not a number
    smallest = fminf(smallest, own);
    atomicAdd(&memory.bins[usable ? bin_of(own) & (kRing - 1) : kRing], 1u);   // without a branch logits overlap
  }
};

// The logits that a block has in shared memory, or NaN.
struct PartLogits {
  float* logits;       // (size,), and room up to a multiple of four
  const int* tokens;   // (size,), or null: they are first, first + 1, ...
  int first, size;
  __device__ __forceinline__ int token(int at) const { return tokens ? tokens[at] : first + at; }
  template <class Visit>
  __device__ __forceinline__ void visit(const Visit& f) const {   // for find_last
#pragma unroll 1
    for (int at = threadIdx.x; at < size; at += kThreads)
      if (is_finite(logits[at])) f(0, rank_of(order_key(logits[at]), token(at)), 0u);
  }
};

// About exp(y - heaviest); 0 for NaN, whatever heaviest is.
__device__ __forceinline__ float relative_mass(float y, float heaviest) {
  return exp2_approx(fmaxf((y - heaviest) * 1.44269504f, -1000.f));
}

// Lists the first k of the candidates, or somewhat more, in entries (capacity,), k <= capacity: memory.listed of them.
// Returns how many candidates there are; memory.warp_masses add up to their mass, in units of the largest one's.
// `counts` has been given every logit since start_top_k.  Ends with a barrier.
__device__ __forceinline__ u32 list_first(TopKMemory& memory, const TopKCounts& counts, const PartLogits& part, int k,
                                          u32 capacity, Entry* entries) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const logits = part.logits;
  if (threadIdx.x < (0u - static_cast<u32>(part.size)) % 4)
    logits[part.size + threadIdx.x] = __uint_as_float(0x7fffffffu);
  const u32 largest_order = warp_max(order_key(counts.largest)), smallest_order = warp_max(~order_key(counts.smallest));
  if (lane == 0) {
    atomicMax(&memory.largest, largest_order);
    atomicMax(&memory.smallest, smallest_order);
  }
  __syncthreads();
  const u32 candidates = static_cast<u32>(part.size) - memory.bins[kRing], want = min(static_cast<u32>(k), candidates);
  const float heaviest = from_order_key(memory.largest);
  const u32 top = static_cast<u32>(bin_of(heaviest));
  if (candidates && top - static_cast<u32>(bin_of(from_order_key(~memory.smallest))) >= kRing) {
    // Logits share a bin, kRing apart: then only those count that are near the largest.
#pragma unroll 1
    for (u32 i = threadIdx.x; i < kRing; i += kThreads) memory.bins[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < part.size; at += kThreads) {
      const u32 bin = static_cast<u32>(bin_of(logits[at]));
      if (is_finite(logits[at]) && top - bin < kBins) atomicAdd(&memory.bins[bin % kRing], 1u);
    }
    __syncthreads();
  }
  constexpr int PER_THREAD = kBins / kThreads;
  const u32 below = threadIdx.x * PER_THREAD;
  u32 own[PER_THREAD], upto = 0;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) upto += own[j] = memory.bins[(top - below - j) % kRing];
  const u32 own_count = upto;
  upto = warp_prefix(upto);
  if (lane == 31) memory.warp_counts[warp] = upto;
  __syncthreads();
  const u32 before = warp_prefix<kWarps>(lane < kWarps ? memory.warp_counts[lane] : 0u);
  const u32 others = __shfl_sync(0xffffffffu, before, (warp + 31) % 32);
  if (warp) upto += others;
  if (upto >= want && upto - own_count < want) {   // one thread, or none
    u32 last = PER_THREAD - 1;
#pragma unroll
    for (u32 j = PER_THREAD - 1; j > 0; --j)
      if (upto - own[j] >= want) upto -= own[j], last = j - 1;
      else break;
    memory.last_bin = below + last;
    memory.upto = upto;
  }
  __syncthreads();
  const u32 last_bin = memory.last_bin;
  const bool too_many = (last_bin == kBins ? candidates : memory.upto) > capacity;
  // The lower end of the last bin, which is not empty: exact, since logits of 2^18 and above are multiples of a bin.
  // The bin of the least integer holds all that lies below, too.
  const int bin = static_cast<int>(top - last_bin);
  const float end = last_bin == kBins || bin == -0x7fffffff - 1 ? -kLargestFinite
                                                                : static_cast<float>(bin) / kBinsPerUnit;
  if (too_many) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 3 * kDigits; i += kThreads) memory.bins[i] = 0;
    Search& search = memory.search;
    if (threadIdx.x == 0) {
      // Where subnormal numbers count as zero, it stands for them, too.
      constexpr u32 SUBNORMAL = 0x00800000u;
      const u32 zero = order_key(0.f), least = ~memory.smallest;
      search.enough = {0x7fffffffffffffffll, static_cast<int>(want), static_cast<int>(want)};
      search.low = rank_of(memory.largest + (memory.largest == zero ? SUBNORMAL : 0u), 0);
      search.high = rank_of(least - (least == zero ? SUBNORMAL : 0u), -1);
      search.mass = 0;
      search.count = 0;
      search.shift = digit_shift(search.low, search.high);
      search.state = kSearching;
    }
    find_last<kAnyBetween>(&memory.search, 0, 1, memory.bins, part);
  }
  const u64 last = memory.search.high;
  float mass = 0.f;
  constexpr int AT_ONCE = 4;           // quads of a lane
#pragma unroll 1
  for (int base = warp * 128; base < part.size; base += AT_ONCE * kThreads * 4) {
    u32 chosen = 0;
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = base + i * kThreads * 4 + lane * 4;
      if (at >= part.size) break;
      const float4 four = *reinterpret_cast<const float4*>(logits + at);
      const float y[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        mass += relative_mass(y[j], heaviest);
        chosen |= y[j] >= end ? 1u << (4 * i + j) : 0u;
      }
    }
    auto place_of_lowest = [&](u32 bits) {
      const int bit = __ffs(static_cast<int>(bits)) - 1;
      return base + bit / 4 * kThreads * 4 + lane * 4 + bit % 4;
    };
    if (too_many)
#pragma unroll 1
      for (u32 left = chosen; left; left &= left - 1) {
        const int at = place_of_lowest(left);
        if (rank_of(order_key(logits[at]), part.token(at)) > last) chosen &= ~(left & (0u - left));
      }
    const u32 count = __popc(chosen), places = warp_prefix(count);
    u32 place = lane == 31 && places ? atomicAdd(&memory.listed, places) : 0u;
    place = __shfl_sync(0xffffffffu, place, 31) + places - count;
#pragma unroll 1
    for (; chosen; chosen &= chosen - 1) {
      const int at = place_of_lowest(chosen);
      entries[place++] = {order_key(logits[at]), part.token(at)};
    }
  }
  mass = warp_sum(mass);
  if (lane == 0) memory.warp_masses[warp] = mass;
  __syncthreads();
  return candidates;
}

// ---- the last block ------------------------------------------------------------------------------------------------

__device__ __forceinline__ TopKPart read_part(const TopKPart* part) {   // which another block has written
  const uint4 words = __ldcg(reinterpret_cast<const uint4*>(part));
  return {__uint_as_float(words.x), __uint_as_float(words.y), words.z, words.w};
}

// Of the candidates of a row, whose parts the lanes of a warp have.
struct RowTotals {
  u32 candidates;
  float largest, mass;   // in units of the largest one's
  __device__ __forceinline__ explicit RowTotals(const TopKPart& part) {
    candidates = warp_sum(part.candidates);
    largest = from_order_key(warp_max(part.candidates ? order_key(part.largest) : 0u));
    mass = warp_sum(part.candidates ? part.mass * relative_mass(part.largest, largest) : 0.f);
  }
  // The share of a mass in the same units.
  __device__ __forceinline__ float share(float reached, int k) const {
    return candidates <= static_cast<u32>(k) ? 1.f : fminf(reached / mass, 1.f);
  }
};

// Adds what the parts of a row have listed, as one part.
// own_part : of the lane, of at most 32       entries : (parts, room)       tokens : shared, theirs
__device__ __forceinline__ void gather_parts(TopKMemory& memory, TopKCounts& counts, PartLogits& part, int* tokens,
                                             const TopKPart& own_part, const Entry* entries, int parts, int room) {
  const int threads = kThreads / parts, list = static_cast<int>(threadIdx.x) / threads, own = min(list, parts - 1);
  const int rank = static_cast<int>(threadIdx.x) % threads;
  const u64* from = reinterpret_cast<const u64*>(entries + static_cast<u64>(own) * room);
  constexpr int HELD = 4;   // asked for before it is known whether they are there
  u64 held[HELD];
#pragma unroll
  for (int i = 0; i < HELD; ++i) held[i] = __ldcg(from + min(rank + i * threads, room - 1));
  start_top_k(memory);
  __syncthreads();
  const int upto = static_cast<int>(warp_prefix(own_part.listed));
  const int total = __shfl_sync(0xffffffffu, upto, 31), own_upto = __shfl_sync(0xffffffffu, upto, own);
  const int listed = static_cast<int>(__shfl_sync(0xffffffffu, own_part.listed, own)), first = own_upto - listed;
  auto add = [&](int at, u64 entry) {
    tokens[first + at] = static_cast<int>(entry >> 32);
    counts.add(memory, part.logits, first + at, from_order_key(static_cast<u32>(entry)));
  };
  if (list < parts) {
#pragma unroll
    for (int i = 0; i < HELD; ++i)
      if (rank + i * threads < listed) add(rank + i * threads, held[i]);
#pragma unroll 1
    for (int at = rank + HELD * threads; at < listed; at += threads) add(at, __ldcg(from + at));
  }
  part.tokens = tokens;
  part.size = total;
}

// Where the first k of all rows go; a row is a blockIdx.y and .z, a part of it a blockIdx.x, of at most 32.
struct TopKTarget {
  u32* tickets;       // (rows,), zero before and after
  TopKPart* parts;    // (rows, parts)
  Entry* entries;     // (rows, parts, room), room >= capacity
  int* indices;       // (rows, tokens), ascending
  int* counts;        // (rows,)
  float* mass;        // (rows,): of the candidates', the share of the chosen
  int k, capacity, places, room, tokens;   // 1 <= k <= capacity, kMerged;  parts * capacity <= places
};

// Ends a kernel whose blocks have the logits of parts of rows in shared memory and have added them to `counts`.
// There is room for `places` logits, and as many tokens behind them: a multiple of four.
__device__ __forceinline__ void choose_top_k(TopKMemory& memory, TopKCounts counts, PartLogits part,
                                             const TopKTarget& target) {
  const u32 row = blockIdx.z * gridDim.y + blockIdx.y;
  const int parts = gridDim.x, k = target.k, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  TopKPart* const row_parts = target.parts + static_cast<u64>(row) * parts;
  Entry* const entries = target.entries + static_cast<u64>(row) * parts * target.room;
  int* const positions = target.indices + static_cast<u64>(row) * target.tokens;
  TopKPart read;
#pragma unroll 1
  for (bool merged = false;; merged = true) {
    const u32 capacity = merged ? kMerged : static_cast<u32>(target.capacity);
    Entry* const list = merged ? memory.merge.listed : entries + static_cast<u64>(blockIdx.x) * target.room;
    const u32 candidates = list_first(memory, counts, part, k, capacity, list);
    if (merged) break;
    if (warp == 0) {
      const float mass = warp_sum(lane < kWarps ? memory.warp_masses[lane] : 0.f);
      if (lane == 0)
        row_parts[blockIdx.x] = {mass, from_order_key(memory.largest), candidates, memory.listed};
    }
    if (!is_last_block(target.tickets + row, parts)) return;
    read = {0.f, 0.f, 0, 0};
    if (lane < parts) read = read_part(row_parts + lane);
    counts = TopKCounts();
    gather_parts(memory, counts, part, reinterpret_cast<int*>(part.logits + target.places), read, entries, parts,
                 target.room);
  }
  auto sum_of_four = [](int x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  };
  const RowTotals totals(read);
  const int listed = static_cast<int>(memory.listed), want = min(k, static_cast<int>(totals.candidates));
  // All are compared with all, by four lanes an entry.
  const int quarter = threadIdx.x % 4, first = threadIdx.x / 4;
#pragma unroll 1
  for (int i = first; i - first < listed; i += kThreads / 4) {   // whole warps
    const Entry own = memory.merge.listed[min(i, listed - 1)];
    const u64 rank = rank_of(own.key, own.token);
    int better = 0;
#pragma unroll 4
    for (int j = quarter; j < listed; j += 4)
      better += rank_of(memory.merge.listed[j].key, memory.merge.listed[j].token) < rank;
    better = sum_of_four(better);
    if (quarter == 0 && i < listed && better < want) memory.merge.chosen[better] = rank;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = first; i - first < want; i += kThreads / 4) {
    const u32 token = static_cast<u32>(memory.merge.chosen[min(i, want - 1)]);
    int before = 0;
#pragma unroll 4
    for (int j = quarter; j < want; j += 4) before += static_cast<u32>(memory.merge.chosen[j]) < token;
    before = sum_of_four(before);
    if (quarter == 0 && i < want) positions[before] = static_cast<int>(token);
  }
  if (warp == kWarps - 1) {   // which has no entry if they are few
    float reached = 0.f;
#pragma unroll 1
    for (int i = lane; i < want; i += 32)
      reached += relative_mass(from_order_key(~static_cast<u32>(memory.merge.chosen[i] >> 32)), totals.largest);
    reached = warp_sum(reached);
    if (lane == 0) {
      target.counts[row] = want;
      target.mass[row] = totals.share(reached, k);
    }
  }
}

}  // namespace kvb::selection
