// The order of tokens by their logits, masses of logits, and the search for the last token of a prefix: what kernels
// that select tokens have in common.  Blocks of kThreads threads.  Reference: reference/selection.py.
#pragma once
#include "kvb/device.cuh"

namespace kvb::selection {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 2048, kRing = 8192;         // of a row, from its largest key downwards; that are counted
constexpr float kBinsPerUnit = 64.f;              // a power of two: the bounds of a bin are exact
constexpr int kDigits = 256;                      // of the search among listed tokens
constexpr u32 kFew = 32;                          // that are compared with one another instead
constexpr float kLargestFinite = 3.402823466e38f;

struct alignas(8) Entry {            // a listed token
  u32 key;
  int token;
};

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= kLargestFinite; }

// Sorts as finite numbers do, both zeros alike; never 0.
__device__ __forceinline__ u32 order_key(float x) {
  const u32 bits = __float_as_uint(x) == 0x80000000u ? 0u : __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_order_key(u32 key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}
// Ascends in the order of tokens: key descending, token ascending.
__device__ __forceinline__ u64 rank_of(u32 key, int token) {
  return static_cast<u64>(~key) << 32 | static_cast<u32>(token);
}

// 2^31 exp(weight - largest), rounded to an integer, for finite weights; relative error below 2^-21 where the result is
// large.  0 for what is not a number.
__device__ __forceinline__ u32 mass_of(float weight, float largest) {
  const float x = fmaxf(__fsub_rn(weight, largest), -80.f);                         // <= 0; below -23 the mass is 0
  // Adding 1.5 2^23 rounds to an integer, which is then in the low bits: a conversion would be slower.
  const float shifted = __fmaf_rn(x, 1.44269502f, 12582912.f);
  const float f = __fmaf_rn(x, 1.44269502f, -__fsub_rn(shifted, 12582912.f));
  constexpr float ONE = 2147483648.f;
  float p = 0.00132647506f * ONE;                                                   // 2^(31 + f), |f| <= 1/2
  p = __fmaf_rn(p, f, 0.00967151299f * ONE);
  p = __fmaf_rn(p, f, 0.0555073358f * ONE);
  p = __fmaf_rn(p, f, 0.240222424f * ONE);
  p = __fmaf_rn(p, f, 0.693147004f * ONE);
  p = __fmaf_rn(p, f, ONE);
  return __float2uint_rn(__uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23)));
}

// Grows with the key.
__device__ __forceinline__ int bin_of(float key) { return __float2int_rd(__fmul_rn(key, kBinsPerUnit)); }

// Adds to a sum of 64 bits in two words of shared memory, where an addition of 64 bits would be a loop.
__device__ __forceinline__ void add_mass(u32* low, u32* high, u32 mass) {
  const u32 before = atomicAdd(low, mass);
  if (before + mass < before) atomicAdd(high, 1u);
}

__device__ __forceinline__ u32 warp_max(u32 x) { return __reduce_max_sync(0xffffffffu, x); }
__device__ __forceinline__ u32 warp_sum(u32 x) { return __reduce_add_sync(0xffffffffu, x); }
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}
// Inclusive, over `kLanes` lanes; those beyond have sums of no meaning.
template <int kLanes = 32, class T>
__device__ __forceinline__ T warp_prefix(T x) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const T below = __shfl_up_sync(0xffffffffu, x, distance);
    if (threadIdx.x % 32 >= static_cast<u32>(distance)) x += below;
  }
  return x;
}
// Sum over the block, for every thread.  `scratch` : shared (kWarps,), free again after the call.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  const T sum = warp_sum(threadIdx.x % 32 < kWarps ? scratch[threadIdx.x % 32] : T(0));
  __syncthreads();
  return sum;
}
// Whether this block is the last of `blocks` to get here; it then sees what the others have written.  What any but its
// first warp has written lies before a barrier.
__device__ __forceinline__ bool is_last_block(u32* ticket, u32 blocks) {
  KVB_SHARED(int, is_last);
  if (threadIdx.x == 0) {
    is_last = take_ticket(ticket) == blocks - 1;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  return is_last;
}

// Whether the sums over a prefix are enough.
struct Enough {
  long long target;
  int least, most;
  __device__ __forceinline__ bool operator()(u64 mass, u32 count) const {
    return (static_cast<long long>(mass) >= target && static_cast<int>(count) >= least) ||
           static_cast<int>(count) >= most;
  }
};

// Of one query head: ranks in [low, high] whose prefix may be the first to be enough.
struct Search {
  Enough enough;
  u64 low, high;         // kFound: all ranks up to `high` are chosen
  u64 mass;              // of the candidates below `low`; kFound: of all that are chosen
  u32 count;
  int shift;             // of the digit
  int state;
};
enum SearchState { kSearching, kComparing, kFound, kNothing, kFailed };   // kComparing: at most kFew are left
enum LastRank {
  kAnyBetween,   // found is a rank that separates the last token that is chosen from the next of these
  kItsKey,       // found has the last token's key
  kEveryTie      // the same, and all tokens with that key are chosen
};

__device__ __forceinline__ int digit_shift(u64 low, u64 high) {
  const u64 range = high - low;
  const int upper = static_cast<int>(range >> 32);
  const int bits = upper ? 64 - __clz(upper) : 32 - __clz(static_cast<int>(static_cast<u32>(range)));
  return max(bits - 8, 0);
}

// Where a digit is counted: so the lanes of a warp, with eight neighbouring digits each, read different banks.
__device__ __forceinline__ int digit_place(int digit) { return digit % 8 * 32 + digit / 8; }
static_assert(kDigits == 8 * 32, "eight digits per lane");

// One step of a search: the first digit at which the sums up to and with it are enough.  The warp calls it.
// counts, lows, highs : (kDigits,)
template <LastRank kLast>
__device__ __forceinline__ void find_digit(const u32* counts, const u32* lows, const u32* highs, Search& search) {
  constexpr int PER_LANE = kDigits / 32;
  const int lane = threadIdx.x % 32;
  u32 own_count = 0;
  u64 own_mass = 0;
  auto mass_at = [&](int place) { return static_cast<u64>(highs[place]) << 32 | lows[place]; };
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    own_count += counts[i * 32 + lane];
    own_mass += mass_at(i * 32 + lane);
  }
  const Enough enough = search.enough;
  u32 count = search.count + warp_prefix(own_count);
  u64 mass = search.mass + warp_prefix(own_mass);
  __syncwarp();   // all have read the search
  // Both sums grow: the first lane that is enough has the digit; its eight are then those of as many lanes.
  const int source = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, enough(mass, count)))) - 1;
  if (source < 0) {
    if (lane == 0) search.state = kFailed;
    return;
  }
  const int place = lane % PER_LANE * 32 + source;
  const u32 digit_count = counts[place];
  const u64 digit_mass = mass_at(place);
  count = __shfl_sync(0xffffffffu, count - own_count, source) + warp_prefix<PER_LANE>(digit_count);
  mass = __shfl_sync(0xffffffffu, mass - own_mass, source) + warp_prefix<PER_LANE>(digit_mass);
  const int first = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, enough(mass, count)))) - 1;   // one of those
  if (lane != first) return;
  const int digit = source * PER_LANE + first;
  const u64 low = search.low + (static_cast<u64>(digit) << search.shift), others = (1ull << search.shift) - 1;
  const u64 high = search.high - low < others ? search.high : low + others;   // a sum may overflow
  search.low = low;
  search.high = high;
  search.count = count - digit_count;
  search.mass = mass - digit_mass;
  search.shift = digit_shift(low, high);
  if (digit_count <= kFew) search.state = kComparing;
  const bool one_key = low >> 32 == high >> 32, one_token = digit_count == 1 || low == high;
  if (kLast == kEveryTie ? one_key : one_token && (kLast == kAnyBetween || one_key)) {
    search.state = kFound;
    search.mass = mass;
    if (kLast == kEveryTie) search.high |= 0xffffffffu;
  }
}

// The tokens that are left of a search, in the place of its digits.
struct Few {
  u32 count, unused;
  u64 ranks[kFew];
  u32 masses[kFew];
};
static_assert(sizeof(Few) <= 3 * kDigits * sizeof(u32) && alignof(Few) <= 16, "there is room");

// The end of a search: the first of the few at which sums over it and those before it are enough.  The warp calls it.
template <LastRank kLast>
__device__ __forceinline__ void find_among(const Few& few, Search& search) {
  const u32 lane = threadIdx.x % 32, listed = few.count;
  const u64 own_rank = lane < listed ? few.ranks[lane] : ~0ull;
  u64 mass = search.mass;
  u32 count = search.count;
#pragma unroll 1
  for (u32 i = 0; i < listed; ++i) {
    if (few.ranks[i] > own_rank) continue;
    mass += few.masses[i];
    ++count;
  }
  const bool is_enough = lane < listed && search.enough(mass, count);
  __syncwarp();   // all have read the search
  // Both sums grow with the rank: of those that are enough, the one that counts fewest.
  const u32 fewest = ~warp_max(is_enough ? ~count : 0u);
  if (fewest == 0xffffffffu) {
    if (lane == 0) search.state = kFailed;
  } else if (is_enough && count == fewest) {   // equal ranks: the same values
    search.high = kLast == kEveryTie ? own_rank | 0xffffffffu : own_rank;
    search.mass = mass;
    search.state = kFound;
  }
}

// Ends the searches [first, last) that are kSearching.  each.visit(f) calls f(head, rank, mass) for this thread's share
// of their tokens.  digits : shared (last - first, 3, kDigits), zero before and after
template <LastRank kLast, class Each>
__device__ __forceinline__ void find_last(Search* searches, int first, int last, u32* digits, const Each& each) {
  const int lane = threadIdx.x % 32, head = first + static_cast<int>(threadIdx.x / 32);
  auto open = [&] { return head < last && searches[head].state <= kComparing; };
  while (__syncthreads_or(open())) {
    each.visit([&](int h, u64 rank, u32 mass) {
      const Search& search = searches[h];
      if (search.state > kComparing || rank < search.low || rank > search.high) return;
      u32* own = digits + (h - first) * 3 * kDigits;
      if (search.state == kComparing) {
        Few& few = *reinterpret_cast<Few*>(own);
        const u32 place = atomicAdd(&few.count, 1u);
        few.ranks[place] = rank;
        few.masses[place] = mass;
        return;
      }
      u32* digit = own + digit_place(static_cast<int>((rank - search.low) >> search.shift));
      atomicAdd(digit, 1u);
      if (mass) add_mass(digit + kDigits, digit + 2 * kDigits, mass);
    });
    __syncthreads();
    if (open()) {
      u32* own = digits + (head - first) * 3 * kDigits;
      if (searches[head].state == kComparing) find_among<kLast>(*reinterpret_cast<Few*>(own), searches[head]);
      else find_digit<kLast>(own, own + kDigits, own + 2 * kDigits, searches[head]);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 3 * kDigits; i += 128)
        *reinterpret_cast<uint4*>(own + i + 4 * lane) = {0, 0, 0, 0};
    }
  }
}

}  // namespace kvb::selection
