"""Exact decode attention over a key-value cache, and the merge of partial results by log-sum-exp.

For query head h of KV head g = h // group, with tokens t < length:

    logit_t = scale <q_h, k_t>,   lse = log sum_t exp(logit_t),   output = sum_t exp(logit_t - lse) v_t.

Partial results over disjoint sets of tokens merge exactly (Milakov and Gimelshein, arXiv 1805.02867, section 3.1;
Flash-Decoding): lse = log sum_i exp(lse_i), output = sum_i exp(lse_i - lse) output_i.
"""
from __future__ import annotations

from functools import partial

import numpy as np
from scipy import special

from .claim import Claim, Evidence, bound, identity, weakest


def decode(query, keys, values, *, lengths=None, scale=None, earlier=None, return_lse=True):
    """One decode step of softmax attention with grouped query heads.

    query   : [batch, q_heads, head_dim]
    keys    : [batch, kv_heads, tokens, head_dim]        values : same shape
    lengths : [batch] int, tokens of each sequence (default: all); slots from there on are not read
    scale   : factor of the logits (default head_dim ** -0.5)
    earlier : (output, lse) of other tokens, to be merged with these

    Returns (output [batch, q_heads, head_dim], lse [batch, q_heads]), float64, natural logarithm; the output alone
    without `return_lse`.  An empty sequence gives output 0 and lse -inf.
    """
    query, keys, values = (np.asarray(x).astype(np.float64) for x in (query, keys, values))
    batch, q_heads, head_dim = query.shape
    _, kv_heads, tokens, _ = keys.shape
    group = q_heads // kv_heads
    scale = head_dim**-0.5 if scale is None else float(scale)
    lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)

    output = np.zeros((batch, q_heads, head_dim))
    lse = np.full((batch, q_heads), -np.inf)
    for b in range(batch):
        n = int(lengths[b])
        if n == 0:
            continue
        for g in range(kv_heads):
            heads = slice(g * group, (g + 1) * group)
            logits = scale * (query[b, heads] @ keys[b, g, :n].T)          # [group, n]
            largest = logits.max(axis=-1, keepdims=True)
            weights = np.exp(logits - largest)
            total = weights.sum(axis=-1, keepdims=True)
            output[b, heads] = (weights / total) @ values[b, g, :n]
            lse[b, heads] = (largest + np.log(total))[:, 0]
    if earlier is not None:
        output, lse = merge(*(np.stack([np.asarray(x).astype(np.float64) for x in pair])
                              for pair in zip(earlier, (output, lse))))
    return (output, lse) if return_lse else output


def sparse_attention(query, keys, values, indices, counts, *, lengths=None, first=0, leading=None, scale=None,
                     return_lse=True):
    """`decode` over listed tokens alone; no other slot is read.

    indices : [batch, lists, slots] int, lists = kv_heads or q_heads; entries outside 0 .. length - 1 are left out
    counts  : [batch, lists] int, entries of each list        other arguments and results as in `decode`
    first   : slot of token 0: indices and lengths count from there
    leading : [batch] int, how many of the `first` slots in front are attended in any case (default: none)
    """
    (batch, q_heads, head_dim), (_, kv_heads, tokens, _), lists = np.shape(query), np.shape(keys), np.shape(counts)[1]
    group = q_heads // lists
    lengths = np.full(batch, tokens - first) if lengths is None else np.asarray(lengths)
    leading = np.zeros(batch, int) if leading is None else np.asarray(leading)
    output, lse = np.zeros((batch, q_heads, head_dim)), np.full((batch, q_heads), -np.inf)
    for b, i in np.ndindex(batch, lists):
        g, heads, one = i // (lists // kv_heads), slice(i * group, (i + 1) * group), slice(b, b + 1)
        listed = np.asarray(indices)[b, i, : counts[b, i]]
        listed = listed[(listed >= 0) & (listed < lengths[b])]
        listed = np.concatenate([np.arange(leading[b]), first + listed])
        (output[b, heads],), (lse[b, heads],) = decode(query[one, heads], keys[one, g : g + 1, listed],
                                                       values[one, g : g + 1, listed], scale=scale)
    return (output, lse) if return_lse else output


def merge(outputs, lses) -> tuple[np.ndarray, np.ndarray]:
    """Merge partial results over disjoint sets of tokens: output = sum_i exp(lse_i - lse) output_i.

    outputs : [parts, batch, q_heads, head_dim]        lses : [parts, batch, q_heads], -inf for an empty part

    Returns (output [batch, q_heads, head_dim], lse [batch, q_heads]), float64.  All parts empty: output 0, lse -inf.
    What an empty part holds in `outputs` is not read into the result.
    """
    outputs, lses = np.asarray(outputs).astype(np.float64), np.asarray(lses).astype(np.float64)
    largest = lses.max(axis=0)                                             # [batch, q_heads]
    shift = np.where(np.isneginf(largest), 0.0, largest)                   # -inf - -inf would be NaN
    weights = np.exp(lses - shift)                                         # 0 for an empty part
    total = weights.sum(axis=0)
    weights = weights / np.where(total == 0, 1.0, total)
    output = np.where(weights[..., None] == 0, 0.0, weights[..., None] * outputs).sum(axis=0)
    with np.errstate(divide="ignore"):
        return output, shift + np.log(total)


# --- Claims ---------------------------------------------------------------------------------------------------------


def _problem(rng):
    """(query, keys, values, lengths): small, ragged, grouped; softmax from flat to nearly one-hot; outliers in both."""
    batch, kv_heads, group = (int(rng.integers(1, 4)) for _ in range(3))
    tokens, head_dim = int(rng.integers(1, 41)), int(rng.choice([2, 8, 64]))
    query = rng.standard_normal((batch, kv_heads * group, head_dim)) * rng.choice([0.0, 0.3, 1.0, 10.0])
    keys = rng.standard_normal((batch, kv_heads, tokens, head_dim))
    values = rng.standard_normal((batch, kv_heads, tokens, head_dim))
    keys[..., rng.integers(head_dim)] += 10                           # a channel: what centring removes
    values[:, :, rng.integers(tokens)] *= 100                         # a token
    return query, keys, values, rng.integers(0, tokens + 1, batch)


def _rounding(query, keys):
    """Relative error of a float64 softmax weight, and absolute error of lse, rounded up by two.

    A logit is scale times a sum of head_dim products; Cauchy and Schwarz bound it and its error.  That error and the
    one of exp(logit - largest) are relative errors of the weight; a sum over tokens adds one rounding per token.
    """
    tokens, head_dim = keys.shape[-2:]
    norms = np.linalg.norm(query, axis=-1).max() * np.linalg.norm(keys, axis=-1).max()
    return 2.0**-52 * ((head_dim + 4) * head_dim**-0.5 * norms + tokens + 8)


def _largest(values):
    return np.linalg.norm(values, axis=-1).max()


def _difference(actual, expected):
    """Worst absolute difference, where two equal infinities do not differ, and NaN does from everything."""
    same = actual == expected
    return np.abs(np.where(same, 0.0, actual) - np.where(same, 0.0, expected)).max()


def _compare(actual, expected, query, keys, values):
    """[(difference, allowance)] of two float64 results (output, lse).

    The relative error of the weights counts in the numerator and in the denominator of each of the two outputs.
    """
    error = _rounding(query, keys)
    allowances = 4 * error * _largest(values), 2 * error
    return [(_difference(*pair), allowance) for pair, allowance in zip(zip(actual, expected), allowances)]


def _agreement(rng, samples, compare) -> Evidence:
    """identity over `samples` problems of what `compare(rng, query, keys, values, lengths)` lists."""
    pairs = [pair for _ in range(samples) for pair in compare(rng, *_problem(rng))]
    return identity(*np.transpose(pairs), samples=samples)


def _per_query_head(x, query):
    """[batch, kv_heads, ...] repeated to [batch, q_heads, ...]: head h takes KV head h // group."""
    return np.repeat(x, query.shape[1] // x.shape[1], axis=1)


def _softmax(rng, query, keys, values, lengths):
    logits = query.shape[-1] ** -0.5 * np.einsum("bhd,bhtd->bht", query, _per_query_head(keys, query))
    weights = special.softmax(logits, axis=-1)
    expected = np.einsum("bht,bhtd->bhd", weights, _per_query_head(values, query)), special.logsumexp(logits, axis=-1)
    # A scale is a factor of the query: another one must give the same for a query divided by it.
    scale = float(rng.choice([query.shape[-1] ** -0.5, 0.01, 3.0]))
    actual = decode(query * (query.shape[-1] ** -0.5 / scale), keys, values, scale=scale)
    return [pair for result in (decode(query, keys, values), actual)
            for pair in _compare(result, expected, query, keys, values)]


def _split(rng, query, keys, values, lengths):
    """Partial results of up to six token ranges, some of them empty; what an empty part holds is made NaN."""
    tokens = keys.shape[2]
    cuts = [0, *sorted(rng.integers(0, tokens + 1, rng.integers(0, 6))), tokens]
    outputs, lses = [], []
    for start, stop in zip(cuts, cuts[1:]):
        inside = np.clip(lengths - start, 0, stop - start)
        output, lse = decode(query, keys[:, :, start:stop], values[:, :, start:stop], lengths=inside)
        outputs.append(np.where(np.isneginf(lse)[..., None], np.nan, output))
        lses.append(lse)
    return np.stack(outputs), np.stack(lses)


def _split_and_merge(rng, query, keys, values, lengths):
    merged = merge(*_split(rng, query, keys, values, lengths))
    return _compare(merged, decode(query, keys, values, lengths=lengths), query, keys, values)


def _merge_in_any_order(rng, query, keys, values, lengths):
    outputs, lses = _split(rng, query, keys, values, lengths)
    order, cut = rng.permutation(len(lses)), int(rng.integers(1, len(lses) + 1))
    halves = [merge(outputs[part], lses[part]) for part in (order[:cut], order[cut:]) if len(part)]
    nested = merge(*map(np.stack, zip(*halves)))
    return _compare(nested, merge(outputs, lses), query, keys, values)


def _permutation(rng, query, keys, values, lengths):
    order = rng.permutation(keys.shape[2])
    shuffled = decode(query, keys[:, :, order], values[:, :, order])
    return _compare(shuffled, decode(query, keys, values), query, keys, values)


def _key_shift(rng, query, keys, values, lengths):
    output, lse = decode(query, keys, values, lengths=lengths)
    centre = keys.mean(axis=2, keepdims=True) * rng.choice([1.0, -3.0])              # [batch, kv_heads, 1, head_dim]
    constant = query.shape[-1] ** -0.5 * np.einsum("bhd,bhd->bh", query, _per_query_head(centre[:, :, 0], query))
    rounded = np.concatenate([keys, keys - centre, centre], axis=2)
    shifted = decode(query, keys - centre, values, lengths=lengths)
    return _compare(shifted, (output, lse - constant), query, rounded, values)


def _ragged(rng, query, keys, values, lengths):
    unread = (np.arange(keys.shape[2]) >= lengths[:, None])[:, None, :, None]        # [batch, 1, tokens, 1]
    output, lse = decode(query, np.where(unread, np.nan, keys), np.where(unread, np.inf, values), lengths=lengths)
    pairs = []
    for b, n in enumerate(lengths):
        actual = output[b : b + 1], lse[b : b + 1]
        if n == 0:
            pairs += [(_difference(actual[0], 0.0), 0.0), (_difference(actual[1], -np.inf), 0.0)]
        else:
            alone = decode(query[b : b + 1], keys[b : b + 1, :, :n], values[b : b + 1, :, :n])
            pairs += _compare(actual, alone, query, keys, values)
    return pairs


def _grouped_heads(rng, query, keys, values, lengths):
    output, lse = decode(query, keys, values, lengths=lengths)
    pairs = []
    for h in range(query.shape[1]):
        g = h // (query.shape[1] // keys.shape[1])
        alone = decode(query[:, h : h + 1], keys[:, g : g + 1], values[:, g : g + 1], lengths=lengths)
        pairs += _compare((output[:, h : h + 1], lse[:, h : h + 1]), alone, query, keys, values)
    return pairs


def _convexity(rng, samples):
    excess, allowance = [], []
    for _ in range(samples):
        query, keys, values, _ = _problem(rng)
        output, _ = decode(query, keys, values)
        highest, lowest = (_per_query_head(extreme, query) for extreme in (values.max(axis=2), values.min(axis=2)))
        excess.append(np.maximum(output - highest, lowest - output).max())
        allowance.append(2.0**-52 * (keys.shape[2] + 2) * np.abs(values).max())      # weights sum to 1 but for rounding
    return bound(excess, allowance)


def _dropped(rng):
    """One head that attends to all of at least two tokens, and to a part of them.

    Returns the outputs [head_dim] over all, kept and dropped tokens, the dropped mass, the values of the kept and of
    the dropped tokens, the rounding error of a distance, and whether values are u for the kept and -u for the dropped
    tokens, where the bound is attained.  The dropped tokens have the largest logits, or the smallest, or any.
    """
    query, keys, values = np.zeros((1, 1, 1)), np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1))
    while keys.shape[2] < 2:
        query, keys, values, _ = _problem(rng)
        query, keys, values = query[:1, :1], keys[:1, :1], values[:1, :1]
    tokens = keys.shape[2]
    rising = (keys[0, 0] @ query[0, 0]).argsort()
    order = (rising, rising[::-1], rng.permutation(tokens))[rng.integers(3)]
    kept, dropped = np.split(order, [rng.integers(1, tokens)])
    opposite = bool(rng.random() < 0.25)
    if opposite:
        values = np.broadcast_to(values[:, :, :1], values.shape).copy()
        values[:, :, dropped] *= -1
    (full, lse), (some, _), (rest, lost) = (decode(query, keys[:, :, part], values[:, :, part])
                                            for part in (order, kept, dropped))
    delta = float(np.exp(lost - lse)[0, 0])
    rounding = 8 * _rounding(query, keys) * _largest(values) * query.shape[-1] ** 0.5      # three outputs and the mass
    kept, dropped = values[0, 0, kept], values[0, 0, dropped]
    return full[0, 0], some[0, 0], rest[0, 0], delta, kept, dropped, rounding, opposite


def _dropped_mass_identity(rng, samples):
    """With p_t the softmax weights and delta the sum of the dropped ones, the output is the mixture

        o = sum_kept p_t v_t + sum_dropped p_t v_t = (1 - delta) o_kept + delta o_dropped,

    because the renormalised weights of either part are p_t over its mass.  Hence
    o - o_kept = delta (o_dropped - o_kept).
    """
    pairs = []
    for _ in range(samples):
        full, some, rest, delta, _, _, rounding, _ = _dropped(rng)
        pairs.append((np.linalg.norm(full - some - delta * (rest - some)), rounding))
    return identity(*np.transpose(pairs))


def _dropped_mass_bound(rng, samples):
    """By the identity, |o - o_kept| = delta |o_dropped - o_kept|.  Both outputs lie in the convex hull of the values,
    so their distance is at most its diameter max_(s,t) |v_s - v_t|, and that is at most 2 max_t |v_t|.
    """
    distances, limits, gaps = [], [], []
    for _ in range(samples):
        full, some, _, delta, kept, dropped, rounding, opposite = _dropped(rng)
        values = np.concatenate([kept, dropped])
        diameter = np.linalg.norm(values[:, None] - values[None], axis=-1).max()
        distances.append(np.linalg.norm(full - some))
        limits.append([delta * diameter + rounding, 2 * delta * _largest(values) + rounding])
        if opposite:
            gaps.append((distances[-1] - 2 * delta * _largest(values), rounding))
    return weakest({"bound": bound(np.array(distances)[:, None], limits, samples=samples),
                    "attained": identity(*np.transpose(gaps))})


def _unnormalised_bound(rng, samples):
    """Without renormalising, o - (1 - delta) o_kept = delta o_dropped, and |o_dropped| <= max |v_t|."""
    pairs = []
    for _ in range(samples):
        full, some, _, delta, _, dropped, rounding, _ = _dropped(rng)
        pairs.append((np.linalg.norm(full - (1 - delta) * some), delta * _largest(dropped) + rounding))
    return bound(*np.transpose(pairs))


CLAIMS = (
    Claim("softmax and log-sum-exp",
          "output = sum_t softmax(scale q.k)_t v_t and lse = log sum_t exp(scale q.k_t), as SciPy computes them; "
          "scale is head_dim^(-1/2) unless given",
          "definition", "identity", partial(_agreement, compare=_softmax), samples=200),
    Claim("split and merge",
          "any split of the tokens into ranges, empty ones included, merges to the unsplit output and lse",
          "Milakov and Gimelshein arXiv 1805.02867, section 3.1", "identity",
          partial(_agreement, compare=_split_and_merge), samples=300),
    Claim("merge in any order",
          "merge is commutative and associative: parts in any order and nesting give the same output and lse",
          "Milakov and Gimelshein arXiv 1805.02867, section 3.1", "identity",
          partial(_agreement, compare=_merge_in_any_order), samples=300),
    Claim("permutation", "output and lse do not depend on the order of the tokens",
          "definition", "identity", partial(_agreement, compare=_permutation), samples=200),
    Claim("key shift",
          "k_t -> k_t - c for all t leaves the output as it is and lowers lse by scale q.c: centring keys is free",
          "textbook: softmax is invariant to a constant", "identity",
          partial(_agreement, compare=_key_shift), samples=200),
    Claim("ragged lengths",
          "a sequence of length n gives what its first n tokens give alone, whatever the slots beyond hold; "
          "n = 0 gives output 0 and lse -inf",
          "definition", "identity", partial(_agreement, compare=_ragged), samples=200),
    Claim("grouped heads", "query head h gives what it gives alone on KV head h // group",
          "definition", "identity", partial(_agreement, compare=_grouped_heads), samples=100),
    Claim("convexity", "min_t v_t <= output <= max_t v_t in every coordinate",
          "textbook: softmax weights make a convex combination", "bound", _convexity, samples=200),
    Claim("dropped mass identity",
          "attending to the kept tokens alone, with renormalised weights, gives o_kept with "
          "o - o_kept = delta (o_dropped - o_kept), delta the softmax mass of the dropped tokens",
          "derived in reference/attention.py", "identity", _dropped_mass_identity, samples=300),
    Claim("dropped mass bound",
          "|o - o_kept| <= delta max_(s,t) |v_s - v_t| <= 2 delta max_t |v_t|, with equality when the kept tokens have "
          "value u and the dropped ones -u",
          "derived in reference/attention.py", "bound", _dropped_mass_bound, samples=300),
    Claim("dropped mass, not renormalised", "|o - (1 - delta) o_kept| <= delta max |v_t| over the dropped tokens",
          "Twilight arXiv 2502.02770, error bound of top-p pruning", "bound", _unnormalised_bound, samples=300),
)
