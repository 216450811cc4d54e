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
//
// selection_moments_kernel   ("shrink" only) mean and variance of the candidates, in double, per block
// selection_bounds_kernel    largest key and largest weight of each query head
// selection_histogram_kernel counts and masses in 1024 bins of equal width in the key, from the largest key down to 22
//                            below it, where masses vanish.  The last block of a query head finds the bin in which the
//                            prefix ends.
// selection_collect_kernel   bits for the tokens above that bin, a list of the few inside it.  The last block of a list
//                            (of the query heads of a KV head) finds the key at which the prefix ends by radix descent,
//                            a warp per query head, and turns bits into positions.
//
//   Grid      (blocks of a row, query heads, batch), 512 threads; a block takes `span` tokens.  "The last block
//             continues" needs no waiting: whoever takes the last ticket sees what the others wrote.
//   Bytes     4 per token and query head in each of three passes (8 with sigma), the later two mostly from L2; 1/4 for
//             the bits, and 4 per listed token.
//   Counts    Per token and query head about 10 instructions for bounds, 30 for the histogram, 20 for the collection:
//             at 32 heads of 128K tokens 4.2 M * 60 / 32 = 8 M warp instructions, 9 us of the 900 G/s that an H100
//             issues.
//   Memory    is left as it was found: what must be zero before a launch is zero after it.
#include "kvb/device.cuh"

namespace kvb {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 1024;
constexpr float kBinsPerUnit = 46.f;              // 1024 / 46 > ln 2^32: masses of the last bin are 0
constexpr int kDigits = 256;                      // of the radix descent
constexpr int kNoBin = -1;                        // nothing is chosen
constexpr u32 kShareOne = 1u << 16;
enum Calibration { kPlain, kShrink, kShift };

// Of one query head.  Zero between launches: all that is added to or maximised.
struct RowState {
  u64 outside;           // mass of what is always kept
  u64 everything;        // and of the candidates
  u64 mass_before;       // of the bins above the crossing one
  long long target;      // of the candidates' mass
  u32 largest_key, largest_weight;   // order keys
  u32 ticket, list_ticket;
  u32 listed;            // tokens of the crossing bin
  int crossing, count_before, least, most;
  u32 unused[3];
};
static_assert(sizeof(RowState) == 80, "STATE_WORDS of kvbench/ops/selection.py");

struct Entry {           // a token of the crossing bin
  u32 key, mass;
  int token;
};

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Sorts as finite numbers do, both zeros alike; never 0.
__device__ __forceinline__ u32 order_key(float x) {
  const u32 bits = __float_as_uint(x) == 0x80000000u ? 0u : __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_order_key(u32 key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// 2^31 exp(weight - largest), rounded to an integer; relative error below 2^-21 where the result is large.
__device__ __forceinline__ u32 mass_of(float weight, float largest) {
  const float x = __fsub_rn(weight, largest);                                       // <= 0
  if (x < -23.f) return 0;
  const int n = __float2int_rn(__fmul_rn(x, 1.44269504f));
  float f = __fmaf_rn(x, 1.44269502f, -__int2float_rn(n));                          // log2(e) in two parts
  f = __fmaf_rn(x, 1.92596299e-8f, f);
  float p = 1.5403530e-4f;                                                          // Taylor series of 2^f, |f| <= 1/2
  p = __fmaf_rn(p, f, 1.3333558e-3f);
  p = __fmaf_rn(p, f, 9.6181291e-3f);
  p = __fmaf_rn(p, f, 5.5504109e-2f);
  p = __fmaf_rn(p, f, 2.4022651e-1f);
  p = __fmaf_rn(p, f, 6.9314718e-1f);
  p = __fmaf_rn(p, f, 1.f);
  return __float2uint_rn(__fmul_rn(p, __uint_as_float(static_cast<u32>(127 + 31 + n) << 23)));
}

// Falls as the key grows, and is the same for equal keys.
__device__ __forceinline__ int bin_of(float key, float largest) {
  return min(__float2int_rd(__fmul_rn(fmaxf(__fsub_rn(largest, key), 0.f), kBinsPerUnit)), kBins - 1);
}

// The arguments that all kernels share.
// logits, sigma : (batch, q_heads, tokens), sigma null if plain      lengths : (batch,) or null for `tokens`
// state : (batch, q_heads)                 moments : (batch, q_heads, blocks, 4), or null unless shrink
// span : tokens of a block, a multiple of 32
struct SelectionArguments {
  const float* logits;
  const float* sigma;
  const int* lengths;
  RowState* state;
  const double* moments;
  int tokens, span, sinks, recent, block;
};
#define KVB_SELECTION_PARAMETERS                                                                                \
  const float *__restrict__ logits, const float *__restrict__ sigma, const int *__restrict__ lengths,           \
      RowState *state, int tokens, int span, int sinks, int recent, int block

// One query head of a sequence.
template <int C>
struct Row {
  const float* logits;
  const float* sigma;
  int length, start, stop;
  double mean, prior;   // shrink

  __device__ __forceinline__ Row(const SelectionArguments& a, u64 row, int b)
      : logits(a.logits + row * a.tokens), sigma(C == kPlain ? nullptr : a.sigma + row * a.tokens) {
    length = a.lengths ? min(max(a.lengths[b], 0), a.tokens) : a.tokens;
    start = min(a.sinks, length);
    const long long middle = static_cast<long long>(length) - a.sinks - a.recent;
    stop = start + (middle > 0 ? static_cast<int>(middle / a.block) * a.block : 0);
    if (C == kShrink && a.moments) {   // parts of the row in their order: count, mean, sum of squares about it, sigma^2
      double count = 0., squares = 0., noise = 0.;
      mean = 0.;
      for (u32 i = 0; i < gridDim.x; ++i) {
        const double* part = a.moments + (row * gridDim.x + i) * 4;
        if (part[0] == 0.) continue;
        const double both = count + part[0], apart = part[1] - mean;
        squares += part[2] + apart * apart * (count * part[0] / both);
        mean += apart * (part[0] / both);
        noise += part[3];
        count = both;
      }
      prior = count == 0. ? 0. : fmax(squares / count - noise / count, 0.);
    }
  }
  __device__ __forceinline__ bool always(int t) const { return t < start || t >= stop; }   // t < length
  // Whether token t of [start, stop) is a candidate; its key and weight.
  __device__ __forceinline__ bool candidate(int t, float& key, float& weight) const {
    const float y = logits[t];
    if (C == kPlain) {
      key = weight = y;
      return is_finite(y);
    }
    const float noise = sigma[t], square = __fmul_rn(noise, noise);
    if (C == kShift) {
      key = __fsub_rn(y, square);
      weight = __fsub_rn(y, __fmul_rn(0.5f, square));
      return is_finite(y) && is_finite(key) && is_finite(weight);
    }
    if (!is_finite(y) || !is_finite(noise)) return false;
    const double wide = square, keep = square == 0.f ? 1. : prior / (prior + wide);
    key = weight = static_cast<float>(mean + keep * (y - mean) + keep * wide / 2.);
    return is_finite(key);
  }
};

// Calls visit(t, in_range) for the block's tokens below the row's length, all lanes of a warp together.
template <class Visit>
__device__ __forceinline__ void for_tokens(int span, int length, const Visit& visit) {
  const int first = blockIdx.x * span, last = min(first + span, length);
#pragma unroll 4
  for (int t = first + static_cast<int>(threadIdx.x); t - static_cast<int>(threadIdx.x % 32) < last; t += kThreads)
    visit(t, t < last);
}

__device__ __forceinline__ u32 warp_max(u32 x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_prefix(T x) {   // inclusive
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
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
  T sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += scratch[i];
  __syncthreads();
  return sum;
}
// Sum over the threads before this one; `total` that over all.
template <class T>
__device__ __forceinline__ T block_prefix(T x, T* scratch, T& total) {
  const T inclusive = warp_prefix(x);
  if (threadIdx.x % 32 == 31) scratch[threadIdx.x / 32] = inclusive;
  __syncthreads();
  T before = 0;
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < static_cast<int>(threadIdx.x / 32)) before += scratch[i];
    total += scratch[i];
  }
  __syncthreads();
  return before + inclusive - x;
}

// Whether this block is the last of `blocks` to get here; it then sees what the others have written.
__device__ __forceinline__ bool is_last_block(u32* ticket, u32 blocks) {
  KVB_SHARED(int, is_last);
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = take_ticket(ticket) == blocks - 1;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  return is_last;
}

// moments : (batch, q_heads, blocks, 4), written: count, mean, sum of squared distances from it, sum of sigma^2
__global__ void __launch_bounds__(kThreads, 2)
    selection_moments_kernel(KVB_SELECTION_PARAMETERS, double* moments) {
  KVB_SHARED(double, scratch, [kWarps]);
  const u64 row_id = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const Row<kShrink> row({logits, sigma, lengths, state, nullptr, tokens, span, sinks, recent, block}, row_id,
                         blockIdx.z);
  double count = 0., sum = 0., noise = 0., squares = 0.;
  for_tokens(span, row.length, [&](int t, bool in_range) {
    if (!in_range || row.always(t) || !is_finite(row.logits[t]) || !is_finite(row.sigma[t])) return;
    count += 1.;
    sum += row.logits[t];
    noise += __fmul_rn(row.sigma[t], row.sigma[t]);
  });
  count = block_sum(count, scratch);
  sum = block_sum(sum, scratch);
  noise = block_sum(noise, scratch);
  const double mean = count == 0. ? 0. : sum / count;
  for_tokens(span, row.length, [&](int t, bool in_range) {
    if (!in_range || row.always(t) || !is_finite(row.logits[t]) || !is_finite(row.sigma[t])) return;
    const double apart = row.logits[t] - mean;
    squares += apart * apart;
  });
  squares = block_sum(squares, scratch);
  if (threadIdx.x == 0) {
    double* part = moments + (row_id * gridDim.x + blockIdx.x) * 4;
    part[0] = count;
    part[1] = mean;
    part[2] = squares;
    part[3] = noise;
  }
}

// total : whether the mass of what is always kept counts, too
template <int C>
__global__ void __launch_bounds__(kThreads, 1)
    selection_bounds_kernel(KVB_SELECTION_PARAMETERS, const double* __restrict__ moments, int total) {
  KVB_SHARED(u32, largest, [2]);
  const u64 row_id = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const Row<C> row({logits, sigma, lengths, state, moments, tokens, span, sinks, recent, block}, row_id, blockIdx.z);
  if (threadIdx.x < 2) largest[threadIdx.x] = 0;
  __syncthreads();
  u32 largest_key = 0, largest_weight = 0;   // below every order key
  for_tokens(span, row.length, [&](int t, bool in_range) {
    if (!in_range) return;
    float key, weight;
    if (!row.always(t)) {
      if (!row.candidate(t, key, weight)) return;
      largest_key = max(largest_key, order_key(key));
      largest_weight = max(largest_weight, order_key(weight));
    } else if (total && is_finite(row.logits[t])) {
      largest_weight = max(largest_weight, order_key(row.logits[t]));
    }
  });
  largest_key = warp_max(largest_key);
  largest_weight = warp_max(largest_weight);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&largest[0], largest_key);
    atomicMax(&largest[1], largest_weight);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (largest[0]) atomicMax(&state[row_id].largest_key, largest[0]);
    if (largest[1]) atomicMax(&state[row_id].largest_weight, largest[1]);
  }
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

// counts, masses : (batch, q_heads, kBins), zero        share : of the mass, in units of 2^-16
template <int C>
__global__ void __launch_bounds__(kThreads, 2)
    selection_histogram_kernel(KVB_SELECTION_PARAMETERS, const double* __restrict__ moments, u32* counts, u64* masses,
                               u32 share, int least, int most, int total) {
  // Masses in two halves: 64-bit additions to shared memory would be loops.  65536 tokens of 16 bits fit.
  KVB_SHARED(u32, bins, [3][kBins]);
  KVB_SHARED(u64, sums, [kWarps]);
  KVB_SHARED(u32, count_sums, [kWarps]);
  const u64 row_id = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const Row<C> row({logits, sigma, lengths, state, moments, tokens, span, sinks, recent, block}, row_id, blockIdx.z);
  RowState& own = state[row_id];
  const float largest_key = from_order_key(own.largest_key), largest_weight = from_order_key(own.largest_weight);
  const int first = blockIdx.x * span;
  if (first < row.length && own.largest_key) {   // there are candidates
    for (int i = threadIdx.x; i < 3 * kBins; i += kThreads) bins[i / kBins][i % kBins] = 0;
    __syncthreads();
    u64 outside = 0;
    for_tokens(span, row.length, [&](int t, bool in_range) {
      if (!in_range) return;
      float key, weight;
      if (!row.always(t)) {
        if (!row.candidate(t, key, weight)) return;
        const int bin = bin_of(key, largest_key);
        const u32 mass = mass_of(weight, largest_weight);
        atomicAdd(&bins[0][bin], 1u);
        if (mass & 0xffff) atomicAdd(&bins[1][bin], mass & 0xffff);
        if (mass >> 16) atomicAdd(&bins[2][bin], mass >> 16);
      } else if (total && is_finite(row.logits[t])) {
        outside += mass_of(row.logits[t], largest_weight);
      }
    });
    if (total) {
      outside = block_sum(outside, sums);
      if (threadIdx.x == 0 && outside) atomicAdd(&own.outside, outside);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads)
      if (bins[0][i]) {
        atomicAdd(counts + row_id * kBins + i, bins[0][i]);
        const u64 mass = (static_cast<u64>(bins[2][i]) << 16) + bins[1][i];
        if (mass) atomicAdd(masses + row_id * kBins + i, mass);
      }
  }
  if (!is_last_block(&own.ticket, gridDim.x)) return;

  constexpr int PER_THREAD = kBins / kThreads;
  u32 count[PER_THREAD];
  u64 mass[PER_THREAD], own_mass = 0;
  u32 own_count = 0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const u64 at = row_id * kBins + threadIdx.x * PER_THREAD + i;
    count[i] = __ldcg(counts + at);
    mass[i] = __ldcg(masses + at);
    counts[at] = 0;
    masses[at] = 0;
    own_count += count[i];
    own_mass += mass[i];
  }
  u32 usable;
  u64 candidates;
  u32 count_before = block_prefix(own_count, count_sums, usable);
  u64 mass_before = block_prefix(own_mass, sums, candidates);
  const u64 outside = total ? __ldcg(&own.outside) : 0, everything = outside + candidates;
  least = min(least, static_cast<int>(usable));
  most = min(most, static_cast<int>(usable));
  // ceil(share everything / 65536) without overflow
  long long target = static_cast<long long>(share * (everything >> 16) +
                                            ((share * (everything & 0xffff) + 0xffff) >> 16)) -
                     static_cast<long long>(outside);
  if (share >= kShareOne) target = 0x7fffffffffffffffll;   // what has no mass, too
  const Enough reached = {target, least, most};
  if (threadIdx.x == 0) {
    own.everything = everything;
    own.target = target;
    own.least = least;
    own.most = most;
    if (reached(0, 0)) own.crossing = kNoBin;
  }
  bool before = reached(mass_before, count_before);
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const bool now = reached(mass_before + mass[i], count_before + count[i]);
    if (now && !before) {   // one bin of the row
      own.crossing = threadIdx.x * PER_THREAD + i;
      own.count_before = static_cast<int>(count_before);
      own.mass_before = mass_before;
    }
    before = now;
    mass_before += mass[i];
    count_before += count[i];
  }
}

// Chosen are the tokens above `key`, and those equal to it up to token `last`.
struct Threshold {
  u32 key;
  int last;
  u64 mass;       // of all candidates that are chosen
  u64 with_ties;  // and of all others with that key
};
constexpr int kEveryTie = 0x7fffffff;
constexpr u32 kAboveAll = 0xffffffffu;   // no order key of a finite number

struct OneWarp {
  static constexpr int kSize = 32;
  __device__ static int rank() { return threadIdx.x % 32; }
  __device__ static void sync() { __syncwarp(); }
};
struct WholeBlock {
  static constexpr int kSize = kThreads;
  __device__ static int rank() { return threadIdx.x; }
  __device__ static void sync() { __syncthreads(); }
};

// The first of 256 bins, in the order of `bin(i)`, at which `reached` holds for the sums up to and with it.
// The sums before it are added to mass and count.  The first warp of the group calls it.
__device__ __forceinline__ int find_digit(const u32* counts, const u64* masses, bool descending, u64& mass, u32& count,
                                          const Enough& reached) {
  constexpr int PER_LANE = kDigits / 32;
  const int lane = threadIdx.x % 32;
  auto bin = [&](int i) { return descending ? kDigits - 1 - (lane * PER_LANE + i) : lane * PER_LANE + i; };
  u32 own_count = 0;
  u64 own_mass = 0;
  for (int i = 0; i < PER_LANE; ++i) {
    own_count += counts[bin(i)];
    own_mass += masses[bin(i)];
  }
  u32 now_count = count + warp_prefix(own_count) - own_count;
  u64 now_mass = mass + warp_prefix(own_mass) - own_mass;
  int found = -1;
  u32 found_count = 0;
  u64 found_mass = 0;
  bool before = false;
  for (int i = 0; i < PER_LANE; ++i) {
    const u32 next_count = now_count + counts[bin(i)];
    const u64 next_mass = now_mass + masses[bin(i)];
    const bool now = reached(next_mass, next_count);
    if (now && !before) found = bin(i), found_count = now_count, found_mass = now_mass;
    before = now;
    now_count = next_count;
    now_mass = next_mass;
  }
  // Both sums grow: the first lane that found a bin has the right one.
  const int source = __ffs(__ballot_sync(0xffffffffu, found >= 0)) - 1;
  mass = __shfl_sync(0xffffffffu, found_mass, source);
  count = __shfl_sync(0xffffffffu, found_count, source);
  return __shfl_sync(0xffffffffu, found, source);
}

// Three sets of tokens: visit<Group>(f) calls f(key, mass, token) for this thread's share of them.
struct ListedEntries {          // what the blocks listed of the crossing bin
  const u32* entries;
  int count;
  template <class Group, class Visit>
  __device__ __forceinline__ void visit(const Visit& f) const {
    for (int i = Group::rank(); i < count; i += Group::kSize)
      f(__ldcg(entries + 3 * i), __ldcg(entries + 3 * i + 1), static_cast<int>(__ldcg(entries + 3 * i + 2)));
  }
};
template <int C>
struct TokensOfBin {            // the same from the whole row
  const Row<C>& row;
  float largest_key, largest_weight;
  int bin;
  template <class Group, class Visit>
  __device__ __forceinline__ void visit(const Visit& f) const {
    for (int t = row.start + Group::rank(); t < row.stop; t += Group::kSize) {
      float key, weight;
      if (row.candidate(t, key, weight) && bin_of(key, largest_key) == bin)
        f(order_key(key), mass_of(weight, largest_weight), t);
    }
  }
};
template <int C>
struct CandidatesByLogit {      // all, without mass
  const Row<C>& row;
  template <class Group, class Visit>
  __device__ __forceinline__ void visit(const Visit& f) const {
    for (int t = row.start + Group::rank(); t < row.stop; t += Group::kSize) {
      float key, weight;
      if (row.candidate(t, key, weight)) f(order_key(row.logits[t]), 0u, t);
    }
  }
};

// The Threshold in a set of tokens; the tokens before them have sums mass and count.  All of the group return the same.
// counts : shared (kDigits,)        masses : shared (kDigits + 2,)        found : shared
template <class Group, class Each>
__device__ __forceinline__ Threshold descend(const Each& each, long long target, int least, int most, u64 mass,
                                             u32 count, u32* counts, u64* masses, int* found) {
  auto zero = [&] {
    Group::sync();
    for (int i = Group::rank(); i < kDigits; i += Group::kSize) counts[i] = 0, masses[i] = 0;
    Group::sync();
  };
  u64* sums = masses + kDigits;   // (2,), of what the first warp finds
  auto find = [&](bool descending, const Enough& reached) {
    Group::sync();
    if (Group::rank() < 32) {
      const int digit = find_digit(counts, masses, descending, mass, count, reached);
      if (Group::rank() == 0) *found = digit, sums[0] = mass, sums[1] = count;
    }
    Group::sync();
    mass = sums[0];
    count = static_cast<u32>(sums[1]);
    return *found;
  };
  u32 prefix = 0;
  int digit = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    zero();
    each.template visit<Group>([&](u32 key, u32 weight, int) {
      if ((static_cast<u64>(key) >> (shift + 8)) != prefix) return;
      atomicAdd(&counts[key >> shift & 255], 1u);
      atomicAdd(&masses[key >> shift & 255], static_cast<u64>(weight));
    });
    digit = find(true, {target, least, most});
    prefix = prefix << 8 | static_cast<u32>(digit);
  }
  // All that are left share the key: the lower tokens, as many as are needed.
  const int remaining = static_cast<int>(counts[digit]);
  const long long weight = static_cast<long long>(masses[digit] / counts[digit]);
  const long long shortfall = target - static_cast<long long>(mass);
  long long ties = shortfall <= 0 ? 0 : weight == 0 ? remaining : (shortfall - 1) / weight + 1;
  ties = min(ties, static_cast<long long>(remaining));
  ties = max(max(ties, static_cast<long long>(least - static_cast<int>(count))), 1ll);
  const int chosen = min(static_cast<int>(ties), min(remaining, most - static_cast<int>(count)));
  Threshold threshold = {prefix, kEveryTie, mass + static_cast<u64>(weight) * static_cast<u64>(chosen),
                         mass + masses[digit]};
  if (chosen < remaining) {   // the same descent by token
    u32 token_prefix = 0;
    mass = 0;
    count = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      zero();
      each.template visit<Group>([&](u32 key, u32, int token) {
        if (key == threshold.key && (static_cast<u64>(token) >> (shift + 8)) == token_prefix)
          atomicAdd(&counts[static_cast<u32>(token) >> shift & 255], 1u);
      });
      digit = find(false, {0, chosen, chosen});
      token_prefix = token_prefix << 8 | static_cast<u32>(digit);
    }
    threshold.last = static_cast<int>(token_prefix);
  }
  Group::sync();   // the shared arrays are free again
  return threshold;
}

// masks : (batch, q_heads, 2, mask_words): tokens that are chosen, and tokens that may be, a bit each
// entries : (batch, q_heads, capacity)     indices : (batch, lists, tokens), ascending     out_counts : (batch, lists)
// mass : (batch, q_heads)                  group : query heads of a list, at most 16
// bounded : whether the number of tokens is, from above
template <int C>
__global__ void __launch_bounds__(kThreads, 1)
    selection_collect_kernel(KVB_SELECTION_PARAMETERS, const double* __restrict__ moments, u32* masks, u32* entries,
                             int* indices, int* out_counts, float* mass, int mask_words, int capacity, int group,
                             int bounded) {
  constexpr int MAX_GROUP = 16;
  const u64 row_id = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
  const SelectionArguments arguments = {logits, sigma, lengths, state, moments, tokens, span, sinks, recent, block};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int start, stop;
  {
    const Row<C> row(arguments, row_id, blockIdx.z);
    start = row.start, stop = row.stop;
    const int crossing = state[row_id].crossing;
    const float largest_key = from_order_key(state[row_id].largest_key);
    const float largest_weight = from_order_key(state[row_id].largest_weight);
    u32* row_masks = masks + row_id * 2 * mask_words;
    Entry* row_entries = reinterpret_cast<Entry*>(entries) + row_id * capacity;
    for_tokens(span, row.length, [&](int t, bool in_range) {
      float key = 0.f, weight = 0.f;
      const bool usable = in_range && !row.always(t) && crossing != kNoBin && row.candidate(t, key, weight);
      const int bin = usable ? bin_of(key, largest_key) : kBins;
      // What decides in the end is the logit: with "shift" it is not the key.
      const int last_bin = C == kShift && usable ? bin_of(row.logits[t], largest_key) : bin;
      const u32 above = __ballot_sync(0xffffffffu, usable && last_bin < crossing);
      const u32 maybe = __ballot_sync(0xffffffffu, usable && last_bin == crossing);
      const u32 inside = __ballot_sync(0xffffffffu, usable && bin == crossing);
      if (lane == 0) {
        row_masks[t / 32] = above;
        row_masks[mask_words + t / 32] = maybe;
      }
      if (inside == 0) return;
      u32 at = 0;
      if (lane == 0) at = atomicAdd(&state[row_id].listed, static_cast<u32>(__popc(inside)));
      at = __shfl_sync(0xffffffffu, at, 0) + static_cast<u32>(__popc(inside & ((1u << lane) - 1)));
      if ((inside >> lane & 1) && at < static_cast<u32>(capacity))
        row_entries[at] = {order_key(key), mass_of(weight, largest_weight), t};
    });
  }
  const u64 list_id = row_id / group, first_row = list_id * group;
  if (!is_last_block(&state[first_row].list_ticket, gridDim.x * group)) return;

  // ---- the threshold of each query head ----
  KVB_DYNAMIC_SHARED(u64, shared);   // (min(group, kWarps), kDigits + 2) masses, then as many counts
  KVB_SHARED(Threshold, thresholds, [MAX_GROUP]);
  KVB_SHARED(int, digits, [kWarps]);
  KVB_SHARED(int, sums, [kWarps]);
  const int parts = min(group, kWarps);
  auto masses_of = [&](int i) { return shared + i * (kDigits + 2); };
  auto counts_of = [&](int i) { return reinterpret_cast<u32*>(shared + parts * (kDigits + 2)) + i * kDigits; };
  for (int h = warp; h < group; h += kWarps) {
    const RowState& own = state[first_row + h];
    const int listed = static_cast<int>(__ldcg(&own.listed));
    Threshold threshold = {kAboveAll, -1, 0, 0};
    if (own.crossing != kNoBin && listed <= capacity) {
      const ListedEntries each = {entries + (first_row + h) * capacity * 3, listed};
      threshold = descend<OneWarp>(each, own.target, own.least, own.most, own.mass_before,
                                   static_cast<u32>(own.count_before), counts_of(warp), masses_of(warp), digits + warp);
    }
    if (lane == 0) thresholds[h] = threshold;
  }
  __syncthreads();
  for (int h = 0; h < group; ++h) {
    const RowState& own = state[first_row + h];
    if (own.crossing == kNoBin) continue;
    const Row<C> row(arguments, first_row + h, blockIdx.z);
    const float largest_key = from_order_key(own.largest_key), largest_weight = from_order_key(own.largest_weight);
    if (static_cast<int>(__ldcg(&own.listed)) > capacity) {   // too many to list: search the row again
      const TokensOfBin<C> each = {row, largest_key, largest_weight, own.crossing};
      const Threshold threshold =
          descend<WholeBlock>(each, own.target, own.least, own.most, own.mass_before,
                              static_cast<u32>(own.count_before), counts_of(0), masses_of(0), digits);
      if (threadIdx.x == 0) thresholds[h] = threshold;
      __syncthreads();
    }
    if (C == kShift) {
      // All tokens whose logit reaches the key of the crossing one; if they are too many, the first `most` by logit.
      Threshold threshold = {thresholds[h].key, kEveryTie, thresholds[h].with_ties, 0};
      int passing = 0;
      if (bounded)
        for (int t = row.start + static_cast<int>(threadIdx.x); t < row.stop; t += kThreads) {
          float key, weight;
          passing += row.candidate(t, key, weight) && order_key(row.logits[t]) >= threshold.key;
        }
      if (block_sum(passing, sums) > own.most) {
        threshold = descend<WholeBlock>(CandidatesByLogit<C>{row}, 0, own.most, own.most, 0, 0, counts_of(0),
                                        masses_of(0), digits);
        threshold.last = min(threshold.last, kEveryTie - 1);   // tells that the threshold was raised
        u64 reached = 0;
        for (int t = row.start + static_cast<int>(threadIdx.x); t < row.stop; t += kThreads) {
          float key, weight;
          if (row.candidate(t, key, weight) && order_key(key) >= threshold.key)
            reached += mass_of(weight, largest_weight);
        }
        threshold.mass = block_sum(reached, masses_of(0));
      }
      if (threadIdx.x == 0) thresholds[h] = threshold;
      __syncthreads();
    }
  }
  if (static_cast<int>(threadIdx.x) < group) {
    RowState& own = state[first_row + threadIdx.x];
    const u64 outside = __ldcg(&own.outside), reached = thresholds[threadIdx.x].mass + outside;
    const bool any = own.largest_key && own.everything;
    mass[first_row + threadIdx.x] =
        any ? static_cast<float>(static_cast<double>(reached) / static_cast<double>(own.everything)) : 1.f;
  }

  // ---- bits to positions ----
  constexpr int WORDS = 4;   // neighbouring ones of a thread
  const int words = (stop + 31) / 32;
  int* list = indices + list_id * tokens;
  int written = 0;
  for (int first = 0; first < words; first += kThreads * WORDS) {
    u32 chosen[WORDS] = {};
    int count = 0;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const int word = first + static_cast<int>(threadIdx.x) * WORDS + i;
      if (word < words)
        for (int h = 0; h < group; ++h) {
          if (state[first_row + h].crossing == kNoBin) continue;
          const u32* row_masks = masks + (first_row + h) * 2 * mask_words + word;
          u32 bits = __ldcg(row_masks);
          u32 maybe = __ldcg(row_masks + mask_words);
          if (C == kShift && thresholds[h].last != kEveryTie) maybe |= bits, bits = 0;   // was raised above the bin
          if (maybe) {
            const Row<C> row(arguments, first_row + h, blockIdx.z);
            for (; maybe; maybe &= maybe - 1) {
              const int t = word * 32 + __ffs(static_cast<int>(maybe)) - 1;
              float key, weight;
              row.candidate(t, key, weight);
              const u32 order = order_key(C == kShift ? row.logits[t] : key);
              if (order > thresholds[h].key || (order == thresholds[h].key && t <= thresholds[h].last))
                bits |= 1u << (t % 32);
            }
          }
          chosen[i] |= bits;
        }
      count += __popc(chosen[i]);
    }
    int total;
    int at = written + block_prefix(count, sums, total);
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      for (u32 bits = chosen[i]; bits; bits &= bits - 1)
        list[at++] = (first + static_cast<int>(threadIdx.x) * WORDS + i) * 32 + __ffs(static_cast<int>(bits)) - 1;
    written += total;
  }
  if (threadIdx.x == 0) out_counts[list_id] = written;

  // ---- ready for the next launch ----
  if (static_cast<int>(threadIdx.x) < group) {
    RowState& own = state[first_row + threadIdx.x];
    own.outside = 0;
    own.largest_key = 0;
    own.largest_weight = 0;
    own.listed = 0;
  }
}

}  // namespace kvb

#define KVB_EXPORT_SELECTION(C)                               \
  KVB_EXPORT(80, kvb::selection_bounds_kernel<C>)             \
  KVB_EXPORT(64, kvb::selection_histogram_kernel<C>)          \
  KVB_EXPORT(128, kvb::selection_collect_kernel<C>)
KVB_EXPORT_SELECTION(0)
KVB_EXPORT_SELECTION(1)
KVB_EXPORT_SELECTION(2)
KVB_EXPORT(64, kvb::selection_moments_kernel)
