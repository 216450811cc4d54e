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
    const float inside = static_cast<float>(prefix), sign = surely ? -1.f : 1.f;
    const float reached = outside + fmaxf(fmaf(sign, rounded, inside * (surely ? 1.f : WIDEST)), 0.f);
    const float missing = fmaxf(fmaf(-sign, others, rest * (surely ? WIDEST : 1.f)), 0.f);
    const bool heavy = taken * reached * (surely ? 1.f : SLACK) >= left * missing * (surely ? SLACK : 1.f);
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
template <int C, bool kByLogit, int kAtOnce = C == kPlain ? 4 : 1>   // tokens; registers are scarce
struct RowTokens {
  const Row<C>& row;
  int head;
  float heaviest;
  template <class Visit>
  __device__ __forceinline__ void for_candidates(const Visit& f) const {   // f(token, key, weight)
#pragma unroll kAtOnce
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
// By key: the lists, or if they do not decide a row.
struct ListedOrRowTokens {
  const PartList& list;
  const SelectionArguments& arguments;
  u64 first_row;
  const Bracket* brackets;
  int searched;                        // query head of the row, or -1
  template <class Visit>
  __device__ __forceinline__ void visit(const Visit& f) const {
    if (searched < 0) {
      ListedTokens<kPlain>{list, arguments, first_row, brackets[list.head].largest_weight}.visit(f);
    } else {
      const Row<kPlain> row(arguments, first_row + searched, blockIdx.z);
      RowTokens<kPlain, false, 1>{row, searched, brackets[searched].largest_weight}.visit(f);
    }
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
// A block counts the logits of its part by bins as they come, tells the others its largest ones, adds its bins to those
// of the row in global memory, and waits for the others.  A warp finds the bracket of each query head in the bins of
// the row; the others, which need the largest logits alone, sum the exact masses of all candidates of the part
// meanwhile.  Then the block sums what lies above a bracket, lists what lies in it, and waits again.  Then each finds
// the last token of all prefixes, which all that all have listed decides; tells the blocks of later parts how many
// tokens of its own are chosen; and writes those.  Where a list does not decide, all write their logits, wait a third
// time, and search the whole row.
//
// What runs once or never is kept short: with attention behind it a kernel has more instructions than their cache
// holds, and loops that were unrolled without need cost a decode step 2 to 3 us.

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
// largest : its largest logit, as an order key, and one more than its candidates
// bins    : 1, published when those of the row have its logits
// lists   : published when its list is complete: the mass of its candidates and one more than are listed, and the mass
//           and one more than the number of those above
struct alignas(32) TopPPart {
  u64 largest, bins;
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
  u32 largest[HEADS], smallest[HEADS];   // order keys of the largest logit, and of the smallest, inverted
  u32 listed[HEADS];
  u32 chosen[kTopPSpan / 32];        // tokens that are chosen, by any query head: a bit each
  u32 odd;                           // whether there are logits that are not finite
  u32 unused[3];
};
static_assert(sizeof(TopPMemory<4>) == 68160, "TOP_P_BYTES of kvbench/ops/selection.py");

// Makes the memory ready, after the next barrier.
template <int HEADS>
__device__ __forceinline__ void start_top_p(TopPMemory<HEADS>& memory) {
#pragma unroll 1
  for (u32 i = threadIdx.x; i < sizeof(memory.bins) / 16; i += kThreads)
    reinterpret_cast<uint4*>(memory.bins)[i] = {0, 0, 0, 0};
  if (threadIdx.x < HEADS)
    memory.largest[threadIdx.x] = memory.smallest[threadIdx.x] = memory.listed[threadIdx.x] = 0;
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

// What the parts of a row have said of their largest logits; the warp calls it and waits for them.
struct RowBounds {
  u32 candidates, largest_key;       // a candidate's order key
  u64 of_part;                       // what part `lane` has said, or 0
  __device__ __forceinline__ explicit RowBounds(const TopPPart* parts) {
    const u32 lane = threadIdx.x % 32;
    of_part = lane < gridDim.x ? wait_for_published(&parts[lane].largest) : 0;
    candidates = warp_sum(candidates_of_part());
    largest_key = warp_max(candidates_of_part() ? static_cast<u32>(of_part) : 0u);
  }
  __device__ __forceinline__ u32 candidates_of_part() const {
    return of_part ? static_cast<u32>(of_part >> 32) - 1 : 0;
  }
  __device__ __forceinline__ float largest() const { return candidates ? from_order_key(largest_key) : 0.f; }
  __device__ __forceinline__ u32 top() const { return static_cast<u32>(bin_of(largest())); }
  // Whether parts have largest logits so far apart that their bins may share places.
  __device__ __forceinline__ bool mixed() const {
    return __any_sync(0xffffffffu, candidates_of_part() &&
                                       top() - static_cast<u32>(bin_of(from_order_key(static_cast<u32>(of_part)))) >=
                                           kRing - kBins - 8);
  }
};

// Waits until the bins of a row are complete, and finds its bracket; the warp calls it.
// staged : shared (kStagedBins,), at a multiple of 16 bytes
constexpr int kStagedBins = 32 * (kBins / 32 + 4);   // lanes read whole quads from different banks
__device__ __forceinline__ Bracket find_bracket_of_row(const u32* row_bins, const TopPPart* parts,
                                                       const PrefixRule& rule, u32* staged) {
  constexpr int PER_LANE = kBins / 32, QUADS = PER_LANE / 4, PITCH = QUADS + 1;
  static_assert(QUADS == 16, "half a warp has the quads of a lane");
  const int lane = threadIdx.x % 32, place = lane % 16;
  const RowBounds bounds(parts);
  const float largest = bounds.largest();
  const u32 top = bounds.top();
  const bool mixed = bounds.mixed();
  if (lane < static_cast<int>(gridDim.x)) wait_for_published(&parts[lane].bins);
  __syncwarp();
  uint4* const quads = reinterpret_cast<uint4*>(staged);
#pragma unroll 4
  for (int i = 0; i < QUADS; ++i) {    // quad i * 32 + lane below the one of the largest logit
    const u32 below = i * 32 + lane;
    cp_async_16(quads + below + below / QUADS,
                reinterpret_cast<const uint4*>(row_bins) + (top / 4 - below) % (kRing / 4));
  }
  cp_async_commit();
  auto lower_end = [&](int below) {    // of a bin, less the largest logit
    return (static_cast<float>(static_cast<int>(top)) - static_cast<float>(below)) / kBinsPerUnit - largest;
  };
  auto first_below = [&](int of_lane) { return of_lane * PER_LANE - (3 - static_cast<int>(top % 4)); };   // the top
  constexpr float STEP = 0.98449644f;   // exp(-1/64)
  u32 own_count = 0;
  float sum = 0.f;                     // Horner's rule, from the lowest bin up: in units of the highest bin's mass
  cp_async_wait<0>();
  __syncwarp();
#pragma unroll 4
  for (int i = QUADS - 1; i >= 0; --i) {
    const uint4 loaded = quads[lane * PITCH + i];
    const u32 four[4] = {loaded.w, loaded.z, loaded.y, loaded.x};
#pragma unroll
    for (int j = 3; j >= 0; --j) {
      const u32 count = j == 3 || first_below(lane) + 4 * i + j >= 0 ? four[j] : 0;
      own_count += count;
      sum = fmaf(sum, STEP, static_cast<float>(count));
    }
  }
  const u64 own_mass =
      static_cast<u64>(sum * (exp2_approx(lower_end(first_below(lane)) * 1.44269504f) * 2147483648.f));
  const u32 count_upto = warp_prefix(own_count);
  const u64 mass_upto = warp_prefix(own_mass), everything = __shfl_sync(0xffffffffu, mass_upto, 31);
  const PrefixEstimate<kPlain> enough = {everything, 0.f, rule.share, static_cast<int>(bounds.candidates), rule.least,
                                         rule.most};
  // Both sums grow: the first lane where they may, or surely do, suffice.  Half a warp looks for each of the bins, four
  // for a lane.
  const u32 may = __ballot_sync(0xffffffffu, enough(mass_upto, count_upto, false));
  const u32 must = __ballot_sync(0xffffffffu, enough(mass_upto, count_upto, true));
  const bool surely = lane >= 16;
  const u32 votes = surely ? must : may;
  const int source = max(__ffs(static_cast<int>(votes)) - 1, 0), below = first_below(source) + 4 * place;
  u32 size = 0;
  u64 prefix = 0;
  u32 sizes[4];
  u64 prefixes[4];
  const uint4 loaded = quads[source * PITCH + place];
  const u32 four[4] = {loaded.w, loaded.z, loaded.y, loaded.x};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const u32 count = below + j >= 0 ? four[j] : 0;
    sizes[j] = size += count;
    prefixes[j] = prefix += PrefixEstimate<kPlain>::mass_of_bin(count, lower_end(below + j));
  }
#pragma unroll
  for (int distance = 1; distance < 16; distance *= 2) {
    const u32 count = __shfl_up_sync(0xffffffffu, size, distance, 16);
    const u64 mass = __shfl_up_sync(0xffffffffu, prefix, distance, 16);
    if (place >= distance) size += count, prefix += mass;
  }
  size += __shfl_sync(0xffffffffu, count_upto - own_count, source) - sizes[3];     // before these four
  prefix += __shfl_sync(0xffffffffu, mass_upto - own_mass, source) - prefixes[3];
  int end = below + 3;
#pragma unroll
  for (int j = 2; j >= 0; --j) end = enough(prefix + prefixes[j], size + sizes[j], surely) ? below + j : end;
  const bool here = place == 15 || enough(prefix + prefixes[3], size + sizes[3], surely);
  const u32 ends = __ballot_sync(0xffffffffu, here) >> (lane & 16) & 0xffff;
  end = __shfl_sync(0xffffffffu, end, (lane & 16) + __ffs(static_cast<int>(ends)) - 1);
  end = enough(0, 0, surely) ? -1 : votes ? max(end, 0) : kBins;
  const int both[2] = {__shfl_sync(0xffffffffu, end, 0), __shfl_sync(0xffffffffu, end, 16)};
  Bracket bracket = {largest, largest, 0.f, 0.f, static_cast<int>(bounds.candidates), 0, {}};
  set_bounds(bracket, both, static_cast<int>(top), kBins - 4);
  const float infinity = __uint_as_float(0x7f800000u);
  if (mixed) bracket.high = infinity, bracket.low = -kLargestFinite;
  if (bounds.candidates == 0) bracket.high = infinity, bracket.low = kLargestFinite;
  return bracket;
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
  constexpr int WORDS = kTopPSpan / 32;
  u32* const staged = &memory.bins[0][0];     // when those of the rows have them: (HEADS, kStagedBins)
  u32* const digits = staged + HEADS * kStagedBins;
  u32* const words_above = digits + HEADS * 3 * kDigits;   // (HEADS, WORDS): tokens above the bracket, a bit each
  static_assert(HEADS * (kStagedBins + 3 * kDigits + WORDS) <= sizeof(memory.bins) / sizeof(u32), "there is room");
#pragma unroll 1
  for (int h = 0; h < group; ++h)      // up to a whole unit
#pragma unroll 1
    for (int at = size + static_cast<int>(threadIdx.x); at < (size + kTopPUnit - 1) / kTopPUnit * kTopPUnit;
         at += kThreads)
      part.of(h)[at] = __uint_as_float(0x7fffffffu);
  __syncthreads();
  auto candidates_of = [&](int h) { return static_cast<u32>(size) - memory.bins[h][kPartRing]; };
  auto top_of = [&](int h) { return static_cast<u32>(bin_of(from_order_key(memory.largest[h]))); };
  auto is_mixed = [&](int h) {         // logits share a bin, kPartRing apart
    return candidates_of(h) &&
           top_of(h) - static_cast<u32>(bin_of(from_order_key(~memory.smallest[h]))) >= kPartRing;
  };
  constexpr int THREADS = kThreads / HEADS;
  const int own_head = threadIdx.x / THREADS, rank = threadIdx.x % THREADS;
  // Some count again: where there are logits that are not finite, those that are; then, where logits share a bin, those
  // near the largest alone.
#pragma unroll 1
  for (int near = 0; near < 2; ++near) {
    if (near ? !__syncthreads_or(own_head < group && is_mixed(own_head)) : !memory.odd) continue;
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      if (near && !is_mixed(h)) continue;
#pragma unroll 1
      for (u32 i = threadIdx.x; i < kPartRing; i += kThreads) memory.bins[h][i] = 0;
      if (!near && threadIdx.x == 0) memory.largest[h] = memory.smallest[h] = 0;
      __syncthreads();
      const u32 top = top_of(h);
      TopPCounts counts;
#pragma unroll 1
      for (int at = threadIdx.x; at < size; at += kThreads) {
        const float y = part.of(h)[at];
        if (!near || (is_finite(y) && top - static_cast<u32>(bin_of(y)) < kBins))
          counts.add_finite(memory, part, h, at);
      }
      __syncwarp();
      if (!near) counts.reduce(memory, h, lane == 0, 1);
    }
    __syncthreads();
  }
  u64 told = 0;
  if (own_head < group) {
    const u32 candidates = candidates_of(own_head), top = top_of(own_head);
    u32* const own_bins = row_bins + static_cast<u64>(own_head) * kRing;
    told = static_cast<u64>(candidates + 1) << 32 | memory.largest[own_head];
    if (rank == 0) atomicExch(&row_parts[own_head * parts + blockIdx.x].largest, told);   // goes first, and alone
#pragma unroll 4
    for (u32 i = 0; i < (candidates ? kBins : 0u); i += THREADS) {   // all: a bound by the smallest takes 0.4 us more
      const u32 bin = top - i - rank, count = memory.bins[own_head][bin % kPartRing];
      if (count) atomicAdd(own_bins + bin % kRing, count);
    }
  }
  __syncthreads();
  if (told && rank == 0) publish(&row_parts[own_head * parts + blockIdx.x].bins, 1);
#pragma unroll 1
  for (int i = threadIdx.x; i < group * 3 * kDigits; i += kThreads) digits[i] = 0;

  // ---- a warp finds the bracket of each head, and meanwhile the others sum the masses of all candidates ----
  constexpr int SUMMING = kWarps / HEADS - 1;   // warps, for each head
  if (warp < HEADS) {
    if (warp < group) {
      const Bracket bracket = find_bracket_of_row(row_bins + static_cast<u64>(warp) * kRing, row_parts + warp * parts,
                                                  target.rule, staged + warp * kStagedBins);
      if (lane == 0) memory.brackets[warp] = bracket;
    }
  } else if (const int h = (warp - HEADS) / SUMMING; h < group) {
    const float largest = RowBounds(row_parts + h * parts).largest();
    u64 inside = 0;
#pragma unroll 1
    for (int unit = (warp - HEADS) % SUMMING * kTopPUnit; unit < size; unit += SUMMING * kTopPUnit)
#pragma unroll
      for (int i = 0; i < kTopPUnit / 128; ++i) {
        const float4 four = reinterpret_cast<const float4*>(part.of(h) + unit)[i * 32 + lane];
        inside += static_cast<u64>(mass_of(four.x, largest)) + mass_of(four.y, largest);
        inside += static_cast<u64>(mass_of(four.z, largest)) + mass_of(four.w, largest);
      }
    inside = warp_sum(inside);
    if (lane == 0) memory.inside[warp] = inside;
  }
  __syncthreads();

  constexpr int WARPS = kWarps / HEADS;   // that have a query head
  const int head = warp / WARPS;
  u64 above = 0;
  u32 count_above = 0;
  if (head < group) {
    const Bracket bracket = memory.brackets[head];
    Entry* entries = target.entries + ((first_row + head) * parts + blockIdx.x) * target.capacity;
    u32* const own_words = words_above + head * WORDS;
#pragma unroll 1
    for (int unit = warp % WARPS * kTopPUnit; unit < size; unit += WARPS * kTopPUnit) {
      static_assert(kTopPUnit == 256, "a lane has eight tokens, whose bits are a byte");
      // Its second four come first in every second four lanes: eight lanes read different banks.
      const int swapped = lane >> 2 & 1;
      const float4* own_logits = reinterpret_cast<const float4*>(part.of(head) + unit) + lane * 2;
      const float4 one = own_logits[swapped], other = own_logits[swapped ^ 1];
      const float y[8] = {one.x, one.y, one.z, one.w, other.x, other.y, other.z, other.w};
      u32 bits = 0;                    // in the bracket or above
#pragma unroll
      for (int i = 0; i < 8; ++i)      // what is no number passes no comparison
        if (y[i] >= bracket.low) bits |= 1u << i;
      reinterpret_cast<u8*>(own_words + unit / 32)[lane] = static_cast<u8>(swapped ? bits >> 4 | bits << 4 : bits);
    }
    __syncwarp();
    // Words of the same units, a lane each: above the bracket, and what is in it.
#pragma unroll 1
    for (int unit = warp % WARPS; unit * kTopPUnit < size; unit += 4 * WARPS) {
      const int first = (unit + lane / 8 * WARPS) * kTopPUnit + lane % 8 * 32;
      const float* own_logits = part.of(head) + first;
      u32 listed = first < size ? own_words[first / 32] : 0, upper = 0;
#pragma unroll 1
      for (u32 rest = listed; rest; rest &= rest - 1) {
        const float y = own_logits[__ffs(static_cast<int>(rest)) - 1];
        if (!(y >= bracket.high)) continue;
        upper |= rest & (0 - rest);
        above += mass_of(y, bracket.largest_weight);
      }
      if (first < size) own_words[first / 32] = upper;
      count_above += __popc(upper);
      listed ^= upper;
      const u32 count = __popc(listed), upto = warp_prefix(count);
      u32 place = lane == 31 ? atomicAdd(&memory.listed[head], upto) : 0u;
      place = __shfl_sync(0xffffffffu, place, 31) + upto - count;
#pragma unroll 1
      for (; listed && place < static_cast<u32>(target.capacity); listed &= listed - 1, ++place) {
        const int at = __ffs(static_cast<int>(listed)) - 1;
        entries[place] = {order_key(own_logits[at]), part.first + first + at};
      }
    }
  }
  above = warp_sum(above);
  count_above = warp_sum(count_above);
  if (lane == 0) {
    memory.above[warp] = above;
    memory.count_above[warp] = count_above;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < group) {
    const int h = threadIdx.x;
    WordPair told = {static_cast<u64>(memory.listed[h] + 1) << kMassBits, 1ull << kMassBits};
#pragma unroll
    for (int i = 0; i < SUMMING; ++i) told.first += memory.inside[HEADS + h * SUMMING + i];
#pragma unroll
    for (int i = 0; i < WARPS; ++i)
      told.second += memory.above[h * WARPS + i] + (static_cast<u64>(memory.count_above[h * WARPS + i]) << kMassBits);
    publish(&row_parts[h * parts + blockIdx.x].lists, told);
  }
  __syncwarp();                        // what is published goes first
  u32 surely_chosen = 0;
  if (static_cast<int>(threadIdx.x) * 32 < size)
#pragma unroll 1
    for (int h = 0; h < group; ++h) surely_chosen |= words_above[h * WORDS + threadIdx.x];
  memory.chosen[threadIdx.x] = surely_chosen;
  fetch(surely_chosen);
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
#pragma unroll 1
  for (int i = from + static_cast<int>(threadIdx.x); i < min(from + share, group * kRing / 4); i += kThreads)
    reinterpret_cast<uint4*>(row_bins)[i] = {0, 0, 0, 0};
  Search* const searches = prefixes.searches;
  bool rare = false;                   // lists do not decide
#pragma unroll 1
  for (int searched = -1;;) {          // the lists; then the rows of query heads that they leave open
    find_last<kAnyBetween>(searches, max(searched, 0), searched < 0 ? group : searched + 1, digits,
                           ListedOrRowTokens{list, target.arguments, first_row, memory.brackets, searched});
    if (searched < 0) {
#pragma unroll 1
      for (int h = 0; h < group; ++h)
        rare |= searches[h].state == kFailed ||
                (searches[h].state == kNothing && memory.brackets[h].is_bounded_above());
      if (!rare) break;
#pragma unroll 1
      for (int h = 0; h < group; ++h)
#pragma unroll 1
        for (int at = threadIdx.x; at < size; at += kThreads)
          target.logits[(first_row + h) * target.arguments.tokens + part.first + at] = part.of(h)[at];
      __syncthreads();
      if (threadIdx.x == 0 && take_ticket(&rendezvous.written) != parts - 1)
        wait_for_tickets(&rendezvous.written, parts);
      __syncthreads();
    }
    do ++searched;
    while (searched < group && searches[searched].state != kFailed);
    if (searched >= group) break;
    start_search_of_row(searches[searched]);
  }
  const int words = (size + 31) / 32;
  if (!rare) {
    if (list.part == static_cast<int>(blockIdx.x) && searches[list.head].state == kFound)
      list.visit([&](u32 key, int t) {
        if (rank_of(key, t) <= searches[list.head].high)
          atomicOr(&memory.chosen[(t - part.first) / 32], 1u << (t % 32));
      });
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < words * 32; at += kThreads) {
      bool is_chosen = false;
#pragma unroll 1
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
#pragma unroll 1
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
