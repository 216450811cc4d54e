// The shortest prefix of each query head whose mass reaches a target: where it ends, within bins of width 1/64, and the
// last block of a list, which finds the last token and turns what was chosen into ascending positions.
// Reference: reference/selection.py.  What calls it: cuda_src/selection.cu, and the Top-p of cuda_src/rabitq.cu.
#pragma once
#include "kvb/selection.cuh"

namespace kvb::selection {

constexpr int kMaxGroup = kWarps;                 // query heads of a list: a warp each
constexpr int kChunk = 4096;                      // words of 32 tokens that are turned into positions at a time
constexpr u32 kShareOne = 1u << 16;

enum Calibration { kPlain, kShrink, kShift };

// Of a part of a row, for the last block.
struct PartSums {
  u64 candidates, above, outside;    // masses; above: the bracket
  u32 count_above, listed;
};
static_assert(sizeof(PartSums) == 32, "SUMS_WORDS of kvbench/ops/selection.py");

// Where the prefix of a query head ends: the last key is in [low, high).
struct Bracket {
  float largest_key, largest_weight;
  float low, high;                   // low is finite
  int candidates;
  u32 infinite;                      // whether a logit is +infinity
  int unused[2];
  __device__ __forceinline__ bool is_bounded_above() const { return high <= kLargestFinite; }
};
static_assert(sizeof(Bracket) == 32, "BRACKET_WORDS of kvbench/ops/selection.py");

// The arguments that all kernels share.
// logits, sigma : (batch, q_heads, tokens), sigma null if plain      lengths : (batch,) or null for `tokens`
// moments : (batch, q_heads, parts, 4), or null unless shrink
// span : tokens of a part, a multiple of 32        quads : groups of four tokens that a lane takes of a tile, at most 8
struct SelectionArguments {
  const float* logits;
  const float* sigma;
  const int* lengths;
  const double* moments;
  int tokens, span, quads, sinks, recent, block;
};
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
    const int middle = max(length - start - min(a.recent, length), 0);
    stop = start + (a.block == 1 ? middle : middle / a.block * a.block);
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
  // Whether a token of [start, stop) with this logit and noise is a candidate; its key and weight.
  __device__ __forceinline__ bool correct(float y, float noise, float& key, float& weight) const {
    if (C == kPlain) {
      key = weight = y;
      return is_finite(y);
    }
    const float square = __fmul_rn(noise, noise);
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
  __device__ __forceinline__ bool candidate(int t, float& key, float& weight) const {
    return correct(logits[t], C == kPlain ? 0.f : sigma[t], key, weight);
  }
  // The number that decides in the end.
  __device__ __forceinline__ float deciding(int t, float key) const { return C == kShift ? logits[t] : key; }
};

// ---- where a prefix ends, about -------------------------------------------------------------------------------------

// Whether a prefix of whole bins is long enough; masses of a bin are known within exp(1/64).
template <int C>
struct PrefixEstimate {
  u64 everything;        // mass of all candidates, from below
  float outside;         // and of what is always kept, about
  u32 share;
  int candidates, least, most;

  // Mass of so many keys in a bin, of which `lowest` is the lower end less the largest weight; not with "shift".
  static __device__ __forceinline__ u64 mass_of_bin(u32 count, float lowest) {
    return count * static_cast<u64>(__float2uint_rn(exp2_approx(fminf(lowest, 0.f) * 1.44269504f) * 2147483648.f));
  }
  // Whether `outside + prefix >= share (outside + prefix + rest)`, or may be.
  __device__ __forceinline__ bool operator()(u64 prefix, u32 size, bool surely) const {
    // What the masses of keys are times these at most; and each is rounded, here and there, to an integer.
    constexpr float WIDEST = C == kShift ? 1.001f : 1.0158f, SLACK = 1.0001f;
    const float taken = static_cast<float>(kShareOne - min(share, kShareOne)), left = static_cast<float>(share);
    const float rest = static_cast<float>(everything - prefix);
    const float rounded = 2.f * static_cast<float>(size), others = 2.f * static_cast<float>(candidates - size);
    const float inside = static_cast<float>(prefix);
    const bool heavy = surely ? taken * (outside + fmaxf(inside - rounded, 0.f)) >=
                                    left * (rest * WIDEST + others) * SLACK
                              : taken * (outside + inside * WIDEST + rounded) * SLACK >=
                                    left * fmaxf(rest - others, 0.f);
    return (heavy && share < kShareOne && static_cast<int>(size) >= min(least, candidates)) ||
           static_cast<int>(size) >= min(most, candidates);
  }
};

// The ends of a bracket: the key at which a prefix may end first lies in bin ends[0], the one at which it surely has
// ended in ends[1], counted from the bin `top` of the largest key downwards; -1: before it, kBins: in none.
// deepest : bins that were counted in any case
__device__ __forceinline__ void set_bounds(Bracket& bracket, const int* ends, int top, int deepest) {
  auto bound = [&](int below) {   // of a bin, from below; exact up to 2^18
    return (static_cast<float>(top) - static_cast<float>(below)) / kBinsPerUnit;
  };
  const float infinity = __uint_as_float(0x7f800000u);
  bracket.high = ends[0] <= 0 ? infinity : bound(min(ends[0] - 1, deepest));
  bracket.low = ends[1] < 0 ? infinity : ends[1] == kBins ? -kLargestFinite : bound(ends[1]);
  bracket.low = fminf(bracket.low, kLargestFinite);
}

// ---- the last block of a list ---------------------------------------------------------------------------------------

// The list of a part, of which this thread has every `threads`-th entry.
struct PartList {
  const Entry* entries;
  static constexpr int HELD = 4;
  Entry held[HELD];   // its first ones
  int head, part, length, rank, threads;

  // Lists of the parts of `group` rows, to all threads of the block; listed(i) is how many tokens part i of all has.
  template <class Listed>
  __device__ __forceinline__ PartList(const Entry* all, u64 first_row, int group, int parts, int capacity,
                                      const Listed& listed) {
    threads = kThreads / (group * parts);
    rank = static_cast<int>(threadIdx.x) % threads;
    const int list = static_cast<int>(threadIdx.x) / threads, own = list < group * parts ? list : 0;
    head = own / parts;
    part = own % parts;
    const u64 place = first_row * parts + own;
    const u32 known = listed(place);
    entries = all + place * capacity;
#pragma unroll
    for (int i = 0; i < HELD; ++i)     // whether they are there is not known yet
      held[i] = load(min(rank + i * threads, capacity - 1));
    length = list < group * parts ? static_cast<int>(min(known, static_cast<u32>(capacity))) : 0;
  }
  __device__ __forceinline__ Entry load(int at) const {
    const u64 entry = __ldcg(reinterpret_cast<const u64*>(entries + at));
    return {static_cast<u32>(entry), static_cast<int>(entry >> 32)};
  }
  template <class Visit>
  __device__ __forceinline__ void visit(const Visit& f) const {   // f(key, token)
    Entry some[HELD] = {held[0], held[1], held[2], held[3]};
#pragma unroll 1
    for (int at = rank; at < length;) {
#pragma unroll 1
      for (int i = 0; i < HELD && at < length; ++i, at += threads) {
        const Entry entry = i == 0 ? some[0] : i == 1 ? some[1] : i == 2 ? some[2] : some[3];
        f(entry.key, entry.token);
      }
      if (at < length)
#pragma unroll
        for (int i = 0; i < HELD; ++i) some[i] = load(min(at + i * threads, length - 1));
    }
  }
};
// Two sets of tokens for find_last, by key or by logit.
template <int C>
struct ListedTokens {
  const PartList& list;
  const SelectionArguments& arguments;
  u64 row_id;
  float heaviest;
  template <class Visit>
  __device__ __forceinline__ void visit(const Visit& f) const {
    if (C == kShift) {
      const Row<C> row(arguments, row_id, blockIdx.z);
      list.visit([&](u32 key, int t) {
        float same, weight;
        row.candidate(t, same, weight);
        f(list.head, rank_of(key, 0), mass_of(weight, heaviest));
      });
    } else {
      list.visit([&](u32 key, int t) { f(list.head, rank_of(key, t), mass_of(from_order_key(key), heaviest)); });
    }
  }
};
template <int C, bool kByLogit>
struct RowTokens {
  const Row<C>& row;
  int head;
  float heaviest;
  template <class Visit>
  __device__ __forceinline__ void for_candidates(const Visit& f) const {   // f(token, key, weight)
    constexpr int AT_ONCE = C == kPlain ? 4 : 1;   // registers are scarce
#pragma unroll AT_ONCE
    for (int t = row.start + static_cast<int>(threadIdx.x); t < row.stop; t += kThreads) {
      float key, weight;
      if (row.candidate(t, key, weight)) f(t, key, weight);
    }
  }
  template <class Visit>
  __device__ __forceinline__ void visit(const Visit& f) const {
    for_candidates([&](int t, float key, float weight) {
      if (kByLogit) f(head, rank_of(order_key(row.logits[t]), t), 0u);
      else f(head, rank_of(order_key(key), C == kShift ? 0 : t), mass_of(weight, heaviest));
    });
  }
};

// What the parts of rows have left, and where lists go.
struct PrefixLists {
  Bracket* brackets;         // (batch, q_heads)
  PartSums* sums;            // (batch, q_heads, parts)
  u32* masks;                // (batch, q_heads, mask_words): tokens above the bracket, a bit each
  Entry* entries;            // (batch, q_heads, parts, capacity)
  int* indices;              // (batch, lists, tokens), ascending
  int* counts;               // (batch, lists)
  float* mass;               // (batch, q_heads)
  int mask_words, capacity;  // mask_words is a multiple of 4
};
// share : of the mass, in units of 2^-16        least, most : tokens        bounded : whether `most` is meant
struct PrefixRule {
  u32 share;
  int least, most, bounded;
};

// What a block knows of the prefixes of the query heads of a list.
struct Prefixes {
  Search searches[kMaxGroup];
  u64 outside[kMaxGroup], everything[kMaxGroup];   // masses: of what is always kept, and of all
};

// Begins the search of a prefix among the listed tokens of all parts of its row; the warp calls it.
// own : of the part of this lane, zeros if there is none        capacity : of the list of a part
__device__ __forceinline__ void start_search(Prefixes& prefixes, int head, const Bracket& bracket, const PartSums& own,
                                             const PrefixRule& rule, int capacity) {
  const bool overflow = __any_sync(0xffffffffu, own.listed > static_cast<u32>(capacity));
  const u64 outside = warp_sum(own.outside), everything = warp_sum(own.candidates) + outside;
  const u64 mass_above = warp_sum(own.above);
  const u32 count_above = warp_sum(own.count_above);
  if (threadIdx.x % 32 != 0) return;
  // ceil(share everything / 65536) without overflow
  long long target = static_cast<long long>(rule.share * (everything >> 16) +
                                            ((rule.share * (everything & 0xffff) + 0xffff) >> 16)) -
                     static_cast<long long>(outside);
  if (rule.share >= kShareOne) target = 0x7fffffffffffffffll;   // what has no mass, too
  Search& search = prefixes.searches[head];
  search.enough = {target, min(rule.least, bracket.candidates), min(rule.most, bracket.candidates)};
  search.mass = mass_above;
  search.count = count_above;
  search.state = kSearching;
  // Among the listed keys; where subnormal numbers count as zero, it stands for them, too.
  constexpr u32 SUBNORMAL = 0x00800000u;
  const u32 largest = order_key(bracket.largest_key) + (bracket.largest_key == 0.f ? SUBNORMAL : 0u);
  search.low = rank_of(bracket.is_bounded_above() ? order_key(bracket.high) - 1 : largest, 0);
  search.high = rank_of(order_key(bracket.low) - (bracket.low == 0.f ? SUBNORMAL : 0u), -1);
  search.shift = digit_shift(search.low, search.high);
  if (search.enough(0, 0)) {
    search.state = kNothing;
    search.mass = 0;
  } else if (overflow || search.enough(mass_above, count_above) || search.low > search.high) {
    search.state = kFailed;
  }
  prefixes.outside[head] = outside;
  prefixes.everything[head] = everything;
}
// Begins it among all tokens of the row; the block calls it.
__device__ __forceinline__ void start_search_of_row(Search& search) {
  __syncthreads();
  if (threadIdx.x == 0) {
    search.low = rank_of(order_key(kLargestFinite), 0);
    search.high = rank_of(order_key(-kLargestFinite), -1);
    search.mass = 0;
    search.count = 0;
    search.shift = digit_shift(search.low, search.high);
    search.state = kSearching;
  }
  __syncthreads();
}
__device__ __forceinline__ float share_reached(const Prefixes& prefixes, int head, const Bracket& bracket) {
  const u64 reached = prefixes.searches[head].mass + prefixes.outside[head], everything = prefixes.everything[head];
  return bracket.candidates && everything ? __fdiv_rn(static_cast<float>(reached), static_cast<float>(everything))
                                          : 1.f;
}
// Of part `part` of all.
__device__ __forceinline__ PartSums load_sums(const PartSums* sums, u64 part) {
  const u64* from = reinterpret_cast<const u64*>(sums + part);
  const u64 both = __ldcg(from + 3);
  return {__ldcg(from), __ldcg(from + 1), __ldcg(from + 2), static_cast<u32>(both), static_cast<u32>(both >> 32)};
}

// Called by all of the block that has seen what the parts of `group` rows, at most kMaxGroup, have left.
// digits : shared (group, 3, kDigits)
template <int C>
__device__ __forceinline__ void finish_lists(const SelectionArguments& arguments, const PrefixLists& lists,
                                             const PrefixRule& rule, u32 list_id, int group, u32* digits) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, parts = gridDim.x;
  const int mask_words = lists.mask_words, capacity = lists.capacity;
  u32* const masks = lists.masks;
  const u64 first_row = list_id * static_cast<u64>(group);
  KVB_SHARED(u32, chosen, [kChunk]);
  KVB_SHARED(Prefixes, prefixes);
  KVB_SHARED(Bracket, own_brackets, [kMaxGroup]);
  KVB_SHARED(int, rewrite, [kMaxGroup]);   // whether the bits of a query head have to be set anew
  KVB_SHARED(int, int_sums, [kWarps]);
  KVB_SHARED(u64, sums_of_warps, [kWarps]);
  Search* const searches = prefixes.searches;
  const int words = (Row<kPlain>(arguments, first_row, blockIdx.z).stop + 31) / 32;   // of all rows of a list
  auto load_words = [&](int from) {   // into `chosen`, the union of the query heads
    for (int i = static_cast<int>(threadIdx.x) * 4; i < min(kChunk, words - from); i += kThreads * 4) {
      uint4 bits = {0, 0, 0, 0};
#pragma unroll 4
      for (int h = 0; h < group; ++h) {
        const uint4 more = __ldcg(reinterpret_cast<const uint4*>(masks + (first_row + h) * mask_words + from + i));
        bits.x |= more.x, bits.y |= more.y, bits.z |= more.z, bits.w |= more.w;
      }
      *reinterpret_cast<uint4*>(chosen + i) = bits;
    }
  };
  // What is needed from memory, asked for at once.
  const PartList list(lists.entries, first_row, group, parts, capacity,
                      [&](u64 part) { return __ldcg(&lists.sums[part].listed); });
  const u64 own_row = first_row + min(warp, group - 1);
  const u32 bracket_word = lane < 8 ? __ldcg(reinterpret_cast<const u32*>(lists.brackets + own_row) + lane) : 0;
  PartSums own = {0, 0, 0, 0, 0};
  if (lane < parts) own = load_sums(lists.sums, own_row * parts + lane);
  for (int i = threadIdx.x; i < group * 3 * kDigits; i += kThreads) digits[i] = 0;
  load_words(0);
  if (warp < group) {
    if (lane < 8) reinterpret_cast<u32*>(own_brackets + warp)[lane] = bracket_word;
    __syncwarp();
    const Bracket& bracket = own_brackets[warp];
    start_search(prefixes, warp, bracket, own, rule, capacity);
    if (lane == 0) rewrite[warp] = searches[warp].state == kNothing && bracket.is_bounded_above();
  }
  __syncthreads();

  constexpr LastRank LAST = C == kShift ? kEveryTie : kAnyBetween;
  find_last<LAST>(searches, 0, group, digits,
                  ListedTokens<C>{list, arguments, first_row + list.head, own_brackets[list.head].largest_weight});

  // What is rare: a search of the whole row; and with "shift" one by the logit.
  bool anew = false;   // whether bits were written since they were loaded
  for (int h = 0; h < group; ++h) {
    Search& search = searches[h];
    if (search.state != kFailed && !rewrite[h] && !(C == kShift && rule.bounded)) continue;
    const Row<C> row(arguments, first_row + h, blockIdx.z);
    const Bracket& bracket = own_brackets[h];
    u32* row_words = masks + (first_row + h) * mask_words;
    const RowTokens<C, false> row_tokens = {row, h, bracket.largest_weight};
    auto whole_row = [&] {
      start_search_of_row(search);
      if (threadIdx.x == 0) rewrite[h] = 1;   // before a barrier of the search
    };
    if (search.state == kFailed) {
      whole_row();
      find_last<LAST>(searches, h, h + 1, digits, row_tokens);
    }
    if (C == kShift && rule.bounded && search.state == kFound) {
      // All tokens whose logit reaches the key of the crossing one; if they are too many, the first `most` by logit.
      int passing = 0;
      row_tokens.for_candidates([&](int t, float, float) {
        passing += rank_of(order_key(row.logits[t]), t) <= search.high;
      });
      if (block_sum(passing, int_sums) > search.enough.most) {
        whole_row();
        if (threadIdx.x == 0) search.enough = {0, search.enough.most, search.enough.most};
        find_last<kItsKey>(searches, h, h + 1, digits, RowTokens<C, true>{row, h, 0.f});
        u64 reached = 0;
        row_tokens.for_candidates([&](int, float key, float weight) {
          if (rank_of(order_key(key), 0) <= search.high) reached += mass_of(weight, bracket.largest_weight);
        });
        reached = block_sum(reached, sums_of_warps);
        if (threadIdx.x == 0) search.mass = reached;
      }
    }
    __syncthreads();
    if (!rewrite[h]) continue;
    anew = true;
#pragma unroll 1
    for (int t = static_cast<int>(threadIdx.x); t < words * 32; t += kThreads) {
      float key, weight;
      const bool usable = t >= row.start && t < row.stop && row.candidate(t, key, weight);
      const u32 bits = __ballot_sync(0xffffffffu, usable && search.state == kFound &&
                                                      rank_of(order_key(row.deciding(t, key)), t) <= search.high);
      if (lane == 0) row_words[t / 32] = bits;
    }
  }
  // ---- bits to positions ----
  int* positions = lists.indices + static_cast<u64>(list_id) * arguments.tokens;
  int written = 0;
  for (int from = 0; from < words; from += kChunk) {
    if (from || anew) {
      __syncthreads();
      load_words(from);
      __syncthreads();
    }
    if (searches[list.head].state == kFound && !rewrite[list.head])
      list.visit([&](u32 key, int t) {
        if (C == kShift) key = order_key(arguments.logits[(first_row + list.head) * arguments.tokens + t]);
        if (rank_of(key, t) <= searches[list.head].high && t / 32 >= from && t / 32 < from + kChunk)
          atomicOr(&chosen[t / 32 - from], 1u << (t % 32));
      });
    __syncthreads();
    // Each warp takes neighbouring words, a row of 32 at a time, so that its stores are neighbours, too.
    const int size = min(kChunk, words - from), rows = (size + kThreads - 1) / kThreads;
    auto word_of = [&](int i) {
      const int word = (warp * rows + i) * 32 + lane;
      return word < size ? chosen[word] : 0u;
    };
    u32 count = 0;
#pragma unroll 4
    for (int i = 0; i < rows; ++i) count += __popc(word_of(i));
    count = warp_sum(count);
    if (lane == 0) int_sums[warp] = static_cast<int>(count);
    __syncthreads();
    const int before = warp_prefix<kWarps>(lane < kWarps ? int_sums[lane] : 0);
    int at = written + __shfl_sync(0xffffffffu, before, warp) - static_cast<int>(count);
    written += __shfl_sync(0xffffffffu, before, kWarps - 1);
#pragma unroll 1
    for (int i = 0; i < rows; i += 2) {
      u32 bits[2] = {word_of(i), i + 1 < rows ? word_of(i + 1) : 0u};
      const u32 own = static_cast<u32>(__popc(bits[0]) | __popc(bits[1]) << 16), upto = warp_prefix(own);
      const u32 both = __shfl_sync(0xffffffffu, upto, 31), place = upto - own;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int first = (from + (warp * rows + i + j) * 32 + lane) * 32 - 1;
        int* next = positions + (at + static_cast<int>(j ? (both & 0xffff) + (place >> 16) : place & 0xffff));
#pragma unroll 1
        for (u32 left = bits[j]; left; left &= left - 1) *next++ = first + __ffs(static_cast<int>(left));
      }
      at += static_cast<int>((both & 0xffff) + (both >> 16));
    }
  }
  if (threadIdx.x == 0) lists.counts[list_id] = written;
  if (static_cast<int>(threadIdx.x) < group)
    lists.mass[first_row + threadIdx.x] = share_reached(prefixes, threadIdx.x, own_brackets[threadIdx.x]);
}

// ---- one launch, whose blocks have the logits of all query heads of a KV head in shared memory ----------------------
//
// A block counts the logits of its part by bins as they come, adds its bins to those of the row in global memory, and
// waits for the others.  Each finds the brackets of all query heads in the bins of the rows, sums exact masses of its
// part, lists what lies in a bracket, and waits again.  Then each finds the last token of all prefixes, which all that
// all have listed decides; tells the blocks of later parts how many tokens of its own are chosen; and writes those.
// Where a list does not decide, all write their logits, wait a third time, and search the whole row.

constexpr int kPartRing = 4096;      // bins of a part: logits further apart than 64 are counted a second time
constexpr int kTopPUnit = 256;       // tokens that a warp takes at a time
constexpr int kTopPSpan = 32 * kThreads;   // of a part, at most

// By which the blocks of a list wait for each other; zero before and after.
struct alignas(128) Rendezvous {
  u32 written, placed, left;         // tickets of blocks that are so far
  u32 unused[29];
  u32 chosen[32];                    // by part: one more than the tokens that are chosen of it, when that is known
};
static_assert(sizeof(Rendezvous) == 256, "RENDEZVOUS_WORDS of kvbench/ops/selection.py");

// What a block tells the others of its part of a row; zero before and after.
// bins  : published when those of the row have its logits: its largest one, as an order key, and one more than its
//         candidates
// lists : published when its list is complete: the mass of its candidates and one more than are listed, and the mass
//         and one more than the number of those above
struct alignas(32) TopPPart {
  u64 bins, unused;
  WordPair lists;
};
constexpr int kMassBits = 46;
constexpr u64 kMassMask = (1ull << kMassBits) - 1;
static_assert(kTopPSpan <= 1 << 14, "whose masses of at most 2^31 each fit");
static_assert(sizeof(TopPPart) == 32, "TOP_P_PART_WORDS of kvbench/ops/selection.py");

// The logits of a part of each row, in shared memory; what is not finite becomes NaN.
struct PartRows {
  float* logits;                     // (HEADS, pitch()), the last of which may be no query heads
  int span;                          // tokens of a part, a multiple of kTopPUnit
  int first, length;                 // token; of the row
  __device__ __forceinline__ int end() const { return min(first + span, length); }
  __device__ __forceinline__ int size() const { return max(end() - first, 0); }
  __device__ __forceinline__ int pitch() const { return span + 8; }   // four heads of eight tokens: 32 banks
  __device__ __forceinline__ float* of(int head) const { return logits + head * pitch(); }
};

// Shared memory of a block, besides its logits.
template <int HEADS>
struct TopPMemory {
  u32 bins[HEADS][kPartRing + 4];    // numbers of logits, and of what is no candidate; then digits
  u64 inside[kWarps], above[kWarps];   // masses, by warp
  u32 count_above[kWarps];
  Bracket brackets[HEADS];
  int ends[HEADS][2];                // the first bin up to which the prefix may be long enough, and surely is
  u32 largest[HEADS], smallest[HEADS];   // order keys of the largest logit, and of the smallest, inverted
  u32 listed[HEADS];
  u32 chosen[kTopPSpan / 32];        // tokens that are chosen, by any query head: a bit each
  u32 odd;                           // whether there are logits that are not finite
  u32 unused[3];
};
static_assert(sizeof(TopPMemory<4>) == 68192, "TOP_P_BYTES of kvbench/ops/selection.py");

// Makes the memory ready, after the next barrier.
template <int HEADS>
__device__ __forceinline__ void start_top_p(TopPMemory<HEADS>& memory) {
#pragma unroll 1
  for (u32 i = threadIdx.x; i < sizeof(memory.bins) / 16; i += kThreads)
    reinterpret_cast<uint4*>(memory.bins)[i] = {0, 0, 0, 0};
  memory.chosen[threadIdx.x] = 0;
  if (threadIdx.x < HEADS) {
    memory.largest[threadIdx.x] = memory.smallest[threadIdx.x] = memory.listed[threadIdx.x] = 0;
    memory.ends[threadIdx.x][0] = memory.ends[threadIdx.x][1] = kBins;
  }
  if (threadIdx.x == 0) memory.odd = 0;
}

// What a thread knows of the logits of a head that it has added.
struct TopPCounts {
  float largest = -kLargestFinite, smallest = kLargestFinite;
  float odd = 0.f;                   // NaN: there are logits that are not finite
  // Logit y of token part.first + at.
  template <int HEADS>
  __device__ __forceinline__ void add(TopPMemory<HEADS>& memory, const PartRows& part, int head, int at, float y) {
    part.of(head)[at] = y;
    largest = fmaxf(largest, y);
    smallest = fminf(smallest, y);
    odd = fmaf(y, 0.f, odd);
    atomicAdd(&memory.bins[head][bin_of(y) & (kPartRing - 1)], 1u);
  }
  // Of a part with logits that are not finite, again.
  template <int HEADS>
  __device__ __forceinline__ void add_finite(TopPMemory<HEADS>& memory, const PartRows& part, int head, int at) {
    float& y = part.of(head)[at];
    if (is_finite(y)) {
      add(memory, part, head, at, y);
    } else {
      y = __uint_as_float(0x7fffffffu);
      atomicAdd(&memory.bins[head][kPartRing], 1u);
    }
  }
  // The lanes whose numbers differ by multiples of `apart` have added logits of the same head; one of them `tells`.
  template <int HEADS>
  __device__ __forceinline__ void reduce(TopPMemory<HEADS>& memory, int head, bool tells, int apart) {
    u32 largest_order = order_key(largest), smallest_order = ~order_key(smallest);
    for (int distance = apart; distance < 32; distance *= 2) {
      largest_order = max(largest_order, __shfl_xor_sync(0xffffffffu, largest_order, distance));
      smallest_order = max(smallest_order, __shfl_xor_sync(0xffffffffu, smallest_order, distance));
    }
    if (odd != 0.f) memory.odd = 1;
    if (!tells) return;
    atomicMax(&memory.largest[head], largest_order);
    atomicMax(&memory.smallest[head], smallest_order);
  }
};

// Scratch, and where lists go; a row is a query head.
struct TopPTarget {
  SelectionArguments arguments;
  float* logits;                     // those of the arguments
  Rendezvous* rendezvous;            // (lists,)
  u32* row_bins;                     // (rows, kRing), zero before and after
  TopPPart* parts;                   // (rows, parts)
  Entry* entries;                    // (rows, parts, capacity)
  int* indices;                      // (lists, tokens), ascending
  int* counts;                       // (lists,)
  float* mass;                       // (rows,)
  PrefixRule rule;
  int capacity;
};

// Waits until the bins of all rows of a list are complete, and finds the brackets of its query heads, to
// memory.brackets: the block calls it, and a barrier comes before they are read.  HEADS divide its threads.
// spare : shared (HEADS, kBins)
template <int HEADS>
__device__ __forceinline__ void find_brackets(TopPMemory<HEADS>& memory, const u32* row_bins, const TopPPart* parts,
                                              int group, const PrefixRule& rule, u32* spare) {
  constexpr int THREADS = kThreads / HEADS, PER_THREAD = kBins / THREADS, QUADS = PER_THREAD / 4, WARPS = THREADS / 32;
  static_assert(THREADS % 32 == 0 && PER_THREAD % 4 == 0 && PER_THREAD <= 32, "whole warps have a head");
  const int head = threadIdx.x / THREADS, rank = threadIdx.x % THREADS, lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32, count_of_parts = gridDim.x;
  u64 own_part = 0;
  if (head < group && lane < count_of_parts) own_part = wait_for_published(&parts[head * count_of_parts + lane].bins);
  __syncwarp();
  const u32 part_largest = static_cast<u32>(own_part);
  const u32 part_candidates = own_part ? static_cast<u32>(own_part >> 32) - 1 : 0;
  const int candidates = static_cast<int>(warp_sum(part_candidates));
  const u32 largest_order = warp_max(part_candidates ? part_largest : 0u);
  const float largest = candidates ? from_order_key(largest_order) : 0.f;
  const u32 top = static_cast<u32>(bin_of(largest));
  // Parts whose largest logits are so far apart that their bins may share places.
  const bool mixed = __any_sync(0xffffffffu, part_candidates &&
                                                 top - static_cast<u32>(bin_of(from_order_key(part_largest))) >=
                                                     kRing - kBins - 8);
  uint4 loaded[QUADS];
#pragma unroll
  for (int i = 0; i < QUADS; ++i) {
    loaded[i] = {0, 0, 0, 0};
    if (head < group)
      loaded[i] = __ldcg(reinterpret_cast<const uint4*>(row_bins + static_cast<u64>(head) * kRing) +
                         (top / 4 - rank * QUADS - i) % (kRing / 4));
  }
  auto lower_end = [&](int below) {    // of a bin, less the largest logit
    return (static_cast<float>(static_cast<int>(top)) - static_cast<float>(below)) / kBinsPerUnit - largest;
  };
  const int first_below = rank * PER_THREAD - (3 - static_cast<int>(top % 4));   // bins below the top
  constexpr float STEP = 0.98449644f;   // exp(-1/64)
  u32 own_count = 0;
  float sum = 0.f;                     // Horner's rule, from the lowest bin up: in units of the highest bin's mass
#pragma unroll
  for (int i = QUADS - 1; i >= 0; --i) {
    const u32 four[4] = {loaded[i].w, loaded[i].z, loaded[i].y, loaded[i].x};
#pragma unroll
    for (int j = 3; j >= 0; --j) {
      const u32 count = i > 0 || j == 3 || first_below + j >= 0 ? four[j] : 0;
      own_count += count;
      sum = fmaf(sum, STEP, static_cast<float>(count));
    }
  }
  const u64 own_mass = static_cast<u64>(sum * (exp2_approx(lower_end(first_below) * 1.44269504f) * 2147483648.f));
  u32 count_upto = warp_prefix(own_count);
  u64 mass_upto = warp_prefix(own_mass), everything = 0;
  if (lane == 31) {
    memory.count_above[warp] = count_upto;
    memory.above[warp] = mass_upto;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    const bool before = i < warp % WARPS;
    count_upto += before ? memory.count_above[head * WARPS + i] : 0;
    mass_upto += before ? memory.above[head * WARPS + i] : 0;
    everything += memory.above[head * WARPS + i];
  }
  const PrefixEstimate<kPlain> enough = {everything, 0.f, rule.share, candidates, rule.least, rule.most};
  const u32 count_before = count_upto - own_count;
  const u64 mass_before = mass_upto - own_mass;
  u32 votes[2];
#pragma unroll
  for (int surely = 0; surely < 2; ++surely) {   // both sums grow: one thread of a head at most has where they suffice
    const bool before = enough(mass_before, count_before, surely);
    votes[surely] = __ballot_sync(0xffffffffu, !before && enough(mass_upto, count_upto, surely));
    if (rank == 0 && before) memory.ends[head][surely] = -1;
  }
  if (votes[0] | votes[1]) {           // its bins are those of the lanes of half a warp
    static_assert(PER_THREAD == 16, "half a warp");
    if ((votes[0] | votes[1]) >> lane & 1)
#pragma unroll
      for (int i = 0; i < QUADS; ++i)
        reinterpret_cast<uint4*>(spare)[threadIdx.x * QUADS + i] = {loaded[i].w, loaded[i].z, loaded[i].y, loaded[i].x};
    __syncwarp();
    const bool surely = lane >= 16;
    const int place = lane % 16, source = max(__ffs(static_cast<int>(surely ? votes[1] : votes[0])) - 1, 0);
    const int below = __shfl_sync(0xffffffffu, first_below, source) + place;
    u32 size = below >= 0 ? spare[(warp * 32 + source) * PER_THREAD + place] : 0;
    u64 prefix = PrefixEstimate<kPlain>::mass_of_bin(size, lower_end(below));
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      const u32 count = __shfl_up_sync(0xffffffffu, size, distance, 16);
      const u64 mass = __shfl_up_sync(0xffffffffu, prefix, distance, 16);
      if (place >= distance) size += count, prefix += mass;
    }
    size += __shfl_sync(0xffffffffu, count_before, source);
    prefix += __shfl_sync(0xffffffffu, mass_before, source);
    const u32 ends = __ballot_sync(0xffffffffu, place == 15 || enough(prefix, size, surely)) >> (lane & 16);
    if (place == 0 && (surely ? votes[1] : votes[0]))
      memory.ends[head][surely] = max(below + __ffs(static_cast<int>(ends & 0xffff)) - 1, 0);
  }
  __syncthreads();
  if (rank == 0) {
    Bracket bracket = {largest, largest, 0.f, 0.f, candidates, 0, {}};
    set_bounds(bracket, memory.ends[head], static_cast<int>(top), kBins - 4);
    const float infinity = __uint_as_float(0x7f800000u);
    if (mixed) bracket.high = infinity, bracket.low = -kLargestFinite;
    if (candidates == 0) bracket.high = infinity, bracket.low = kLargestFinite;
    memory.brackets[head] = bracket;
  }
}

// Of the tokens of a part, which are chosen.
struct PartChoice {
  u32 bits;                          // of the 32 from part.first + 32 threadIdx.x on
  u32 rank;                          // of the first of these among those of the part
  u32 of_part;                       // how many are chosen of it
  bool even;                         // whether no part has many more than others, nor more than kEvenMost
};
constexpr u32 kEvenMost = 4096;
// Calls f(position) for tokens whose bits these are.
template <class Visit>
__device__ __forceinline__ void for_bits(u32 bits, const PartRows& part, const Visit& f) {
  const int before = part.first + static_cast<int>(threadIdx.x) * 32 - 1;
#pragma unroll 1
  for (; bits; bits &= bits - 1) f(before + __ffs(static_cast<int>(bits)));
}

// What a cooperative kernel does whose blocks have the logits of parts of the rows of a list in shared memory and have
// added them to the bins.  Grid (parts, lists of a sequence, batch), of at most 32 parts of at most kTopPSpan tokens; a
// list is of `group` rows.  The memory may be used for other things behind the next barrier.
// fetch(bits) : what a thread may do while others list tokens, with those that are chosen in any case
template <int HEADS, class Fetch>
__device__ __forceinline__ PartChoice choose_top_p(TopPMemory<HEADS>& memory, const PartRows& part, int group,
                                                   const TopPTarget& target, const Fetch& fetch) {
  const u32 list_id = blockIdx.z * gridDim.y + blockIdx.y, parts = gridDim.x;
  const u64 first_row = static_cast<u64>(list_id) * group;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = part.size();
  KVB_SHARED(Prefixes, prefixes);
  KVB_SHARED(u32, part_most, [HEADS][32]);
  Rendezvous& rendezvous = target.rendezvous[list_id];
  u32* const row_bins = target.row_bins + first_row * kRing;
  TopPPart* const row_parts = target.parts + first_row * parts;
  u32* const spare = &memory.bins[0][0];     // when those of the rows have them
  u32* const digits = spare + HEADS * kBins;
  static_assert(HEADS * (kBins + 3 * kDigits) <= sizeof(memory.bins) / sizeof(u32), "there is room for both");
  for (int h = 0; h < group; ++h)      // up to a whole unit
    for (int at = size + static_cast<int>(threadIdx.x); at < (size + kTopPUnit - 1) / kTopPUnit * kTopPUnit;
         at += kThreads)
      part.of(h)[at] = __uint_as_float(0x7fffffffu);
  __syncthreads();
  if (memory.odd) {
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      for (u32 i = threadIdx.x; i < kPartRing; i += kThreads) memory.bins[h][i] = 0;
      if (threadIdx.x == 0) memory.largest[h] = memory.smallest[h] = 0;
      __syncthreads();
      TopPCounts counts;
      for (int at = threadIdx.x; at < size; at += kThreads) counts.add_finite(memory, part, h, at);
      __syncwarp();
      counts.reduce(memory, h, lane == 0, 1);
    }
    __syncthreads();
  }
  auto candidates_of = [&](int h) { return static_cast<u32>(size) - memory.bins[h][kPartRing]; };
  auto top_of = [&](int h) { return static_cast<u32>(bin_of(from_order_key(memory.largest[h]))); };
  auto is_mixed = [&](int h) {         // logits share a bin, kPartRing apart
    return candidates_of(h) &&
           top_of(h) - static_cast<u32>(bin_of(from_order_key(~memory.smallest[h]))) >= kPartRing;
  };
  constexpr int THREADS = kThreads / HEADS;
  const int own_head = threadIdx.x / THREADS, rank = threadIdx.x % THREADS;
  if (__syncthreads_or(own_head < group && is_mixed(own_head))) {   // then only those count that are near the largest
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      if (!is_mixed(h)) continue;
      for (u32 i = threadIdx.x; i < kPartRing; i += kThreads) memory.bins[h][i] = 0;
      __syncthreads();
      for (int at = threadIdx.x; at < size; at += kThreads) {
        const float y = part.of(h)[at];
        const u32 bin = static_cast<u32>(bin_of(y));
        if (is_finite(y) && top_of(h) - bin < kBins) atomicAdd(&memory.bins[h][bin % kPartRing], 1u);
      }
    }
    __syncthreads();
  }
  u64 told = 0;
  if (own_head < group) {
    const u32 candidates = candidates_of(own_head), top = top_of(own_head);
    u32* const own_bins = row_bins + static_cast<u64>(own_head) * kRing;
#pragma unroll 4
    for (u32 i = 0; i < (candidates ? kBins : 0u); i += THREADS) {   // all: a bound by the smallest takes 0.4 us more
      const u32 bin = top - i - rank, count = memory.bins[own_head][bin % kPartRing];
      if (count) atomicAdd(own_bins + bin % kRing, count);
    }
    told = static_cast<u64>(candidates + 1) << 32 | memory.largest[own_head];
  }
  __syncthreads();
  if (told && rank == 0) publish(&row_parts[own_head * parts + blockIdx.x].bins, told);
  for (int i = threadIdx.x; i < group * 3 * kDigits; i += kThreads) digits[i] = 0;
  find_brackets(memory, row_bins, row_parts, group, target.rule, spare);
  __syncthreads();

  constexpr int WARPS = kWarps / HEADS;   // that have a query head
  const int head = warp / WARPS;
  u64 inside = 0, above = 0;
  u32 count_above = 0;
  if (head < group) {
    const Bracket bracket = memory.brackets[head];
    Entry* entries = target.entries + ((first_row + head) * parts + blockIdx.x) * target.capacity;
#pragma unroll 1
    for (int unit = warp % WARPS * kTopPUnit; unit < size; unit += WARPS * kTopPUnit) {
      constexpr int EACH = kTopPUnit / 32;
      const float* own_logits = part.of(head) + unit + lane;
      float y[EACH];
      u32 listed = 0, own_word = 0;
#pragma unroll
      for (int i = 0; i < EACH; ++i) y[i] = own_logits[i * 32];
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const u32 own = mass_of(y[i], bracket.largest_weight);
        const bool is_above = y[i] >= bracket.high;   // what is no number passes no comparison
        inside += own;
        above += is_above ? own : 0;
        listed |= y[i] >= bracket.low && !is_above ? 1u << i : 0;
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const u32 word = __ballot_sync(0xffffffffu, y[i] >= bracket.high);
        own_word = lane == i ? word : own_word;
      }
      count_above += __popc(own_word);
      if (own_word) atomicOr(&memory.chosen[unit / 32 + lane], own_word);
      u32 lanes = __ballot_sync(0xffffffffu, listed);
      if (!lanes) continue;
      // Few have any: one after the other, and of each the first lanes take a token; a loop of each lane's own takes
      // 2 us per token.
      const u32 all = warp_sum(static_cast<u32>(__popc(listed)));
      u32 place = lane == 0 ? atomicAdd(&memory.listed[head], all) : 0u;
      place = __shfl_sync(0xffffffffu, place, 0);
#pragma unroll 1
      for (; lanes; lanes &= lanes - 1) {
        const int source = __ffs(static_cast<int>(lanes)) - 1;
        const u32 bits = __shfl_sync(0xffffffffu, listed, source);
        const u32 own_place = place + __popc(bits & ((1u << lane) - 1));
        place += __popc(bits);
        if (!(bits >> lane & 1) || own_place >= static_cast<u32>(target.capacity)) continue;
        const int at = unit + lane * 32 + source;
        entries[own_place] = {order_key(part.of(head)[at]), part.first + at};
      }
    }
  }
  inside = warp_sum(inside);
  above = warp_sum(above);
  count_above = warp_sum(count_above);
  if (lane == 0) {
    memory.inside[warp] = inside;
    memory.above[warp] = above;
    memory.count_above[warp] = count_above;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < group) {
    const int h = threadIdx.x;
    WordPair told = {static_cast<u64>(memory.listed[h] + 1) << kMassBits, 1ull << kMassBits};
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
      told.first += memory.inside[h * WARPS + i];
      told.second += memory.above[h * WARPS + i] + (static_cast<u64>(memory.count_above[h * WARPS + i]) << kMassBits);
    }
    publish(&row_parts[h * parts + blockIdx.x].lists, told);
  }
  __syncwarp();                        // what is published goes first
  fetch(memory.chosen[threadIdx.x]);
  __syncwarp();

  // ---- where the prefixes end: the same for every block of the list ----
  const PartList list(target.entries, first_row, group, parts, target.capacity, [&](u64 i) {
    return static_cast<u32>(wait_for_published(&target.parts[i].lists.first) >> kMassBits) - 1;
  });
  if (warp < group) {
    PartSums sums = {0, 0, 0, 0, 0};
    if (lane < static_cast<int>(parts)) {
      const WordPair told = wait_for_published(&row_parts[warp * parts + lane].lists);
      sums = {told.first & kMassMask, told.second & kMassMask, 0, static_cast<u32>(told.second >> kMassBits) - 1,
              static_cast<u32>(told.first >> kMassBits) - 1};
    }
    part_most[warp][lane] = sums.count_above + sums.listed;
    start_search(prefixes, warp, memory.brackets[warp], sums, target.rule, target.capacity);
  }
  __syncthreads();
  const int share = (group * kRing / 4 + parts - 1) / parts, from = blockIdx.x * share;   // all have read the bins
  for (int i = from + static_cast<int>(threadIdx.x); i < min(from + share, group * kRing / 4); i += kThreads)
    reinterpret_cast<uint4*>(row_bins)[i] = {0, 0, 0, 0};
  Search* const searches = prefixes.searches;
  find_last<kAnyBetween>(searches, 0, group, digits,
                         ListedTokens<kPlain>{list, target.arguments, first_row + list.head,
                                              memory.brackets[list.head].largest_weight});
  bool rare = false;
  for (int h = 0; h < group; ++h)
    rare |= searches[h].state == kFailed || (searches[h].state == kNothing && memory.brackets[h].is_bounded_above());
  const int words = (size + 31) / 32;
  if (!rare) {
    if (list.part == static_cast<int>(blockIdx.x) && searches[list.head].state == kFound)
      list.visit([&](u32 key, int t) {
        if (rank_of(key, t) <= searches[list.head].high)
          atomicOr(&memory.chosen[(t - part.first) / 32], 1u << (t % 32));
      });
  } else {
    for (int h = 0; h < group; ++h)
      for (int at = threadIdx.x; at < size; at += kThreads)
        target.logits[(first_row + h) * target.arguments.tokens + part.first + at] = part.of(h)[at];
    __syncthreads();
    if (threadIdx.x == 0 && take_ticket(&rendezvous.written) != parts - 1) wait_for_tickets(&rendezvous.written, parts);
    __syncthreads();
    for (int h = 0; h < group; ++h) {
      if (searches[h].state != kFailed) continue;
      const Row<kPlain> row(target.arguments, first_row + h, blockIdx.z);
      start_search_of_row(searches[h]);
      find_last<kAnyBetween>(searches, h, h + 1, digits,
                             RowTokens<kPlain, false>{row, h, memory.brackets[h].largest_weight});
    }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < words * 32; at += kThreads) {
      bool is_chosen = false;
      for (int h = 0; h < group; ++h) {
        const float y = at < size ? part.of(h)[at] : __uint_as_float(0x7fffffffu);
        is_chosen |= is_finite(y) && searches[h].state == kFound &&
                     rank_of(order_key(y), part.first + at) <= searches[h].high;
      }
      const u32 bits = __ballot_sync(0xffffffffu, is_chosen);
      if (lane == 0) memory.chosen[at / 32] = bits;
    }
  }
  __syncthreads();

  // ---- how many are chosen ----
  u32 most = 0;                        // tokens of part `lane` that may be, counted for each query head
  for (int h = 0; h < group; ++h) most += part_most[h][lane];
  const u32 largest = warp_max(most), all = warp_sum(most);
  const u32 bits = memory.chosen[threadIdx.x], own = __popc(bits), upto = warp_prefix(own);
  if (lane == 31) memory.count_above[warp] = upto;
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < group)
    target.mass[first_row + threadIdx.x] = share_reached(prefixes, threadIdx.x, memory.brackets[threadIdx.x]);
  __syncthreads();
  const u32 warps_upto = warp_prefix<kWarps>(lane < kWarps ? memory.count_above[lane] : 0u);
  const u32 of_part = __shfl_sync(0xffffffffu, warps_upto, kWarps - 1);
  const u32 of_warp = __shfl_sync(0xffffffffu, warps_upto, warp) - memory.count_above[warp];
  if (threadIdx.x == 0) atomicExch(&rendezvous.chosen[blockIdx.x], of_part + 1);
  return {bits, of_warp + upto - own, of_part, !rare && largest <= kEvenMost && largest <= 64 + all / parts * 3 / 2};
}

// One more than the tokens that are chosen of part `lane`; 0: that is not known yet.
__device__ __forceinline__ u32 ask_chosen(const TopPTarget& target) {
  const u32 lane = threadIdx.x % 32;
  return lane < gridDim.x ? load_relaxed(&target.rendezvous[blockIdx.z * gridDim.y + blockIdx.y].chosen[lane]) : 1;
}
// The tokens, after ask_chosen.
__device__ __forceinline__ u32 wait_for_chosen(const TopPTarget& target, u32 told) {
  const Rendezvous& rendezvous = target.rendezvous[blockIdx.z * gridDim.y + blockIdx.y];
  return (told ? told : wait_for_tickets(&rendezvous.chosen[threadIdx.x % 32], 1)) - 1;
}
// Warps write the positions of the part, by write(where those begin), and the last one, at the end of the list, its
// count.        told : of ask_chosen
template <class Write>
__device__ __forceinline__ void write_positions(const TopPTarget& target, u32 told, u32 of_part, const Write& write) {
  const u32 list_id = blockIdx.z * gridDim.y + blockIdx.y, lane = threadIdx.x % 32;
  const u32 before = warp_sum(lane < blockIdx.x ? wait_for_chosen(target, told) : 0u);
  write(target.indices + static_cast<u64>(list_id) * target.arguments.tokens + before);
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == kThreads - 1)
    target.counts[list_id] = static_cast<int>(before + of_part);
}
__device__ __forceinline__ void write_positions(const TopPTarget& target, const PartRows& part,
                                                const PartChoice& choice) {
  write_positions(target, ask_chosen(target), choice.of_part, [&](int* positions) {
    int* next = positions + choice.rank;
    for_bits(choice.bits, part, [&](int position) { *next++ = position; });
  });
}

// A warp makes what blocks have told each other zero again, when all of a list have read it.
__device__ __forceinline__ void clear_top_p(const TopPTarget& target, int group, const ThreadPlace& place) {
  const u32 list_id = place.z * gridDim.y + place.y, lane = place.thread % 32, parts = gridDim.x;
  Rendezvous& rendezvous = target.rendezvous[list_id];
  TopPPart* const row_parts = target.parts + static_cast<u64>(list_id) * group * parts;
  for (u32 i = lane; i < group * parts; i += 32) row_parts[i] = {0, 0, {0, 0}};
  if (lane < parts) rendezvous.chosen[lane] = 0;
  if (lane == 0) rendezvous.written = rendezvous.placed = rendezvous.left = 0;
}
// The last block of a list that calls it does so.
__device__ __forceinline__ void leave_top_p(const TopPTarget& target, int group) {
  u32* const left = &target.rendezvous[blockIdx.z * gridDim.y + blockIdx.y].left;
  __syncthreads();                     // all of the block have read it
  if (threadIdx.x >= 32) return;
  const u32 taken = __shfl_sync(0xffffffffu, threadIdx.x == 0 ? take_ticket(left) : 0u, 0);
  if (taken == gridDim.x - 1) clear_top_p(target, group, thread_place());
}

}  // namespace kvb::selection
