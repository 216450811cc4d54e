"""Selection: which tokens are attended, by their proxy logits: Top-p and Top-k, with sinks and a recent window.

Per query head and sequence of T tokens, the always kept set is A = [0, sinks) and [n, T), with

    n = sinks + block floor(max(0, T - sinks - recent) / block),

and the candidates are M = [sinks, n), without tokens whose logit is not finite.  Candidates are ordered by (logit
descending, token index ascending).  Top-k takes the first k.  Top-p takes the shortest prefix whose mass reaches the
target, the crossing token included, where w_t = exp(logit_t - max):

    middle   sum_prefix w >= p sum_M w                          needs proxy logits alone; default
    global   sum_A w + sum_prefix w >= p (sum_A w + sum_M w)    needs exact logits on A; p is then the total mass

Sources: Top-p pruning, Twilight, arXiv 2502.02770; proxy Top-p, RaBitQCache, arXiv 2606.31519.

**Exactness.**  A set must not depend on the order of sums.  So masses are integers, W_t = rint(2^31 exp(logit_t -
max)), p is ceil(65536 p) / 65536, and the target ceil(p Z) with Z = sum W.  Rounding p up, and not to nearest, keeps
"mass >= p" true for every p.  By exp, a selection keeps at least p - tokens 2^-31 of the mass.

**Nominal p is not the mass achieved.**  Let proxy logits be y_t = s_t + N(0, sigma_t^2) with s_t exact.  Exp inflates
noise, and the top of a noisy ranking is picked partly for its noise.  For s_t ~ N(mu, tau^2) and many tokens, Top-p on
y achieves the true mass Phi(Phi^-1(p) - sigma^2 / sqrt(tau^2 + sigma^2)).  `calibrated` corrects that from sigma_t:

    False      order y, weight exp(y)                             the published rule
    "shrink"   order z = mu + l (y - mu) + l sigma^2 / 2, weight exp(z), with l = tau^2 / (tau^2 + sigma^2) and
               tau^2 = max(var y - mean sigma^2, 0): exp(z) = E[exp(s) | y] under a normal prior of s
    "shift"    a threshold theta, the y - sigma^2 of the crossing token in that order with weights exp(y - sigma^2 / 2);
               then every token with y >= theta.  No prior: for a fixed theta, token by token,
               E exp(y - sigma^2 / 2) 1[y - sigma^2 >= theta] = E exp(s) 1[y >= theta]     (exponential tilting)

`calibrated=True` is "shift".

Both lean on a model of the noise.  `fitted_p` does not: it asks the prompt's last queries, whose exact logits are
known, for the nominal p at which a rule achieves the true mass that is wanted, and trusts that the next queries are
like them.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import special

from . import attention
from .claim import Claim, bound, expectation, identity, weakest

NORMALISE = ("middle", "global")
CALIBRATIONS = (False, "shrink", "shift")
ONE = 2**31                        # the integer mass of the largest logit
SHARE_BITS = 16                    # of p


@dataclass(frozen=True, eq=False)
class Scores:
    """Proxy logits of all tokens, scale included.

    logits   [batch, q_heads, tokens] float32, not finite for what must not be selected
    sigma    same shape, the standard deviation of logits - exact logits as the index predicts it, or None
    """

    logits: np.ndarray
    sigma: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Selection:
    """The tokens chosen from the candidates; those that are always kept are not listed.

    indices   [batch, heads, tokens] int32, ascending, -1 from counts on; per query head, or per KV head after `union`
    counts    [batch, heads] int32
    mass      [batch, q_heads] float32: the share of the proxy mass (see `top_p`) that was reached; 1 without candidates
    """

    indices: np.ndarray
    counts: np.ndarray
    mass: np.ndarray


def middle(lengths, sinks: int, recent: int, block: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(start, stop) [batch] of the candidates M; [0, start) and [stop, length) are always kept.

    Tokens leave the recent window in blocks: stop - start is a multiple of `block`, and recent to recent + block - 1
    tokens, or all there are, follow it.
    """
    for name, value, least in (("sinks", sinks, 0), ("recent", recent, 0), ("block", block, 1)):
        _check_count(name, value, least)
    lengths = np.asarray(lengths)
    start = np.minimum(sinks, lengths)
    return start, start + block * (np.maximum(lengths - sinks - recent, 0) // block)


def top_p(scores: Scores, p: float, *, lengths=None, sinks: int = 0, recent: int = 0, block: int = 1,
          min_tokens: int = 1, max_tokens: int | None = None, normalise: str = "middle",
          calibrated: bool | str = False) -> Selection:
    """The shortest prefix of the candidates whose mass reaches p, with at least min_tokens and at most max_tokens.

    scores     : logits [batch, q_heads, tokens]; with sigma if calibrated
    p          : 0 < p <= 1; 1 takes every candidate        lengths : [batch] int, default all tokens
    normalise  : "middle" or "global", see the head of this module        calibrated : False, "shrink", "shift" or True

    `mass` is what is compared with p: the share of the candidates' mass, or of all mass for "global".  In "shift" it is
    the estimate of the true mass.  Ties belong to the lower index; ceil(65536 p) / 65536 stands for p.
    """
    if not 0 < p <= 1:
        raise ValueError(f"selection: p: expected 0 < p <= 1, got {p!r}")
    if normalise not in NORMALISE:
        raise ValueError(f"selection: normalise: expected one of {', '.join(NORMALISE)}, got {normalise!r}")
    calibrated = "shift" if calibrated is True else calibrated
    if calibrated not in CALIBRATIONS:
        raise ValueError(f"selection: calibrated: expected True, False, 'shrink' or 'shift', got {calibrated!r}")
    _check_count("min_tokens", min_tokens, 0)
    if max_tokens is not None:
        _check_count("max_tokens", max_tokens, min_tokens)
    return _select(scores, lengths, (sinks, recent, block), partial(
        _row_top_p, share=share(p), least=min_tokens, most=max_tokens, total=normalise == "global",
        calibrated=calibrated), calibrated)


def top_k(scores: Scores, k: int, *, lengths=None, sinks: int = 0, recent: int = 0, block: int = 1) -> Selection:
    """The first k candidates, or all of them.  Arguments as in `top_p`; `mass` is their share of the candidates'."""
    _check_count("k", k, 0)
    return _select(scores, lengths, (sinks, recent, block), partial(
        _row_top_p, share=0, least=k, most=k, total=False, calibrated=False))


def achieved(selection: Selection, exact, *, lengths=None, sinks: int = 0, recent: int = 0,
             block: int = 1) -> np.ndarray:
    """The true mass of a selection: the share [batch, heads] of sum_M exp(exact) that it holds; 1 without candidates.

    exact : [batch, heads, tokens], the logits of which scores are estimates        others as they made the selection
    """
    weights = true_weights(exact, lengths=lengths, sinks=sinks, recent=recent, block=block)
    return listed_weight(selection, weights)


def true_weights(exact, *, lengths=None, sinks: int = 0, recent: int = 0, block: int = 1) -> np.ndarray:
    """[batch, heads, tokens] float64: exp(exact) over its sum over M, and 0 outside M."""
    exact = np.asarray(exact).astype(np.float64)
    batch, heads, tokens = exact.shape
    start, stop = middle(_lengths(lengths, batch, tokens), sinks, recent, block)
    weights = np.zeros(exact.shape)
    for b in range(batch):
        if stop[b] > start[b]:
            weights[b, :, start[b] : stop[b]] = special.softmax(exact[b, :, start[b] : stop[b]], axis=-1)
    return weights


def listed_weight(selection: Selection, weights) -> np.ndarray:
    """[batch, heads]: the sum of the weights [batch, heads, tokens] that are listed; 1 where all of them are 0."""
    shares = np.ones(selection.counts.shape)
    for row in np.ndindex(shares.shape):
        if weights[row].any():
            shares[row] = weights[row][selection.indices[row][: selection.counts[row]]].sum()
    return shares


def fitted_p(scores: Scores, exact, p: float, *, lengths=None, sinks: int = 0, recent: int = 0, block: int = 1,
             **options) -> float:
    """The least multiple of 2^-16 at which Top-p achieves the true mass p on average over these queries and heads.

    scores, exact : [queries, q_heads, tokens], proxy and exact logits of a prompt's last queries; lengths : [queries]
    options       : of `top_p`

    A larger p selects more tokens, so the mean of what is achieved grows with it and bisection finds where it passes p.
    1 if even all candidates of finite score hold less.
    """
    window = dict(lengths=lengths, sinks=sinks, recent=recent, block=block)
    low, high, weights = 1, 2**SHARE_BITS, true_weights(exact, **window)
    while low < high:
        tried = (low + high) // 2
        made = top_p(scores, tried / 2**SHARE_BITS, **window, **options)
        if listed_weight(made, weights).mean() >= p:
            high = tried
        else:
            low = tried + 1
    return low / 2**SHARE_BITS


def union(selection: Selection, kv_heads: int) -> Selection:
    """One list per KV head: the union over its query heads, each of which attends to all of it.

    `mass` stays that of the lists per query head; that of the union is not less.
    """
    batch, q_heads, tokens = selection.indices.shape
    if kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"selection: kv_heads: expected a divisor of {q_heads} query heads, got {kv_heads!r}")
    mask = _mask(selection, tokens).reshape(batch, kv_heads, q_heads // kv_heads, tokens).any(axis=2)
    return Selection(*_lists(mask), selection.mass)


def kept(selection: Selection, *, lengths=None, sinks: int = 0, recent: int = 0, block: int = 1) -> np.ndarray:
    """[batch, heads, tokens] bool: the selection and what is always kept, with the arguments that made it."""
    batch, _, tokens = selection.indices.shape
    lengths = _lengths(lengths, batch, tokens)
    start, stop = (x[:, None, None] for x in middle(lengths, sinks, recent, block))
    t = np.arange(tokens)
    return _mask(selection, tokens) | (t < start) | (t >= stop) & (t < lengths[:, None, None])


def attend(query, keys, values, mask, *, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """Exact attention over the kept tokens alone, with renormalised weights: (output, lse) as `attention.decode`.

    query : [batch, q_heads, head_dim]        keys, values : [batch, kv_heads, tokens, head_dim]
    mask  : [batch, q_heads or kv_heads, tokens] bool; what it leaves out is not read
    """
    (batch, q_heads, head_dim), kv_heads = np.shape(query), np.shape(keys)[1]
    mask = np.repeat(mask, q_heads // np.shape(mask)[1], axis=1)
    output, lse = np.zeros((batch, q_heads, head_dim)), np.full((batch, q_heads), -np.inf)
    for b, h in np.ndindex(batch, q_heads):
        g = h // (q_heads // kv_heads)
        part = keys[b : b + 1, g : g + 1, mask[b, h]], values[b : b + 1, g : g + 1, mask[b, h]]
        (output[b, h],), (lse[b, h],) = (x[0] for x in attention.decode(query[b : b + 1, h : h + 1], *part,
                                                                        scale=scale))
    return output, lse


# --- The rule, on one row --------------------------------------------------------------------------------------------


def share(p: float) -> int:
    """ceil(65536 p): the least multiple of 2^-16 that is at least p.  p 2^16 is exact in floating point."""
    return int(np.ceil(float(p) * 2**SHARE_BITS))


def masses(logits, largest) -> np.ndarray:
    """W = rint(2^31 exp(logit - largest)) uint64, a function of the float32 numbers alone; at most 2^31 each."""
    difference = np.asarray(logits).astype(np.float64) - np.float64(largest)
    return np.rint(ONE * np.exp(difference)).astype(np.uint64)


def target_mass(share: int, total: int) -> int:
    """ceil(share total / 65536); in 64 bits share (total >> 16) + ((share (total & 65535) + 65535) >> 16)."""
    return share * (total >> SHARE_BITS) + ((share * (total & (2**SHARE_BITS - 1)) + 2**SHARE_BITS - 1) >> SHARE_BITS)


def ranking(logits) -> np.ndarray:
    """Positions by (logit descending, index ascending); both zeros are equal."""
    return np.argsort(-np.asarray(logits), kind="stable")


def prefix_length(ordered, target: int, least: int, most: int) -> int:
    """The least n with least <= n <= most and sum of the first n masses >= target; most if there is none."""
    reached = int(np.searchsorted(np.cumsum(ordered, dtype=np.uint64), np.uint64(target))) + 1 if target > 0 else 0
    return min(max(reached, least), most, len(ordered))


def _row_top_p(logits, sigma, candidates, always, *, share, least, most, total, calibrated):
    """(chosen token indices, mass) of one row."""
    order_by, weigh_by = _corrected(logits, sigma, candidates, calibrated)
    usable = np.isfinite(order_by) & np.isfinite(weigh_by)
    candidates, order_by, weigh_by = candidates[usable], order_by[usable], weigh_by[usable]
    always = always[np.isfinite(logits[always])] if total else always[:0]
    if len(candidates) == 0:
        return candidates, 1.0
    most = len(candidates) if most is None else most
    largest = max(weigh_by.max(), logits[always].max(initial=-np.inf))
    weights, outside = masses(weigh_by, largest), int(masses(logits[always], largest).sum())
    everything = outside + int(weights.sum())
    order = ranking(order_by)
    # p = 1 takes every candidate, those of integer mass 0 too, which no target asks for.
    n = min(len(order), most) if share >= 2**SHARE_BITS else prefix_length(
        weights[order], target_mass(share, everything) - outside, least, most)
    if calibrated != "shift":
        return candidates[order[:n]], _ratio(outside + int(weights[order[:n]].sum()), everything)
    if n == 0:
        return candidates[:0], _ratio(outside, everything)
    threshold, proxy = order_by[order[n - 1]], logits[candidates]
    passing = int((proxy >= threshold).sum())
    chosen = ranking(proxy)[: min(max(passing, least), most)]
    if len(chosen) < passing:                                            # max_tokens is a higher threshold
        threshold = proxy[chosen[-1]]
    reached = weights[order_by >= threshold].sum()
    return candidates[chosen], _ratio(outside + int(reached), everything)


def _corrected(logits, sigma, candidates, calibrated):
    """(what orders the candidates, the logarithm of their weights), float32; not finite for what is left out."""
    y = logits[candidates]
    if not calibrated:
        return y, y
    noise = np.where(np.isfinite(y), sigma[candidates], np.float32(np.nan))
    with np.errstate(over="ignore", invalid="ignore"):
        square = noise * noise                                           # float32, each operation rounded on its own
        if calibrated == "shift":
            return y - square, y - np.float32(0.5) * square
        usable, square = np.isfinite(y) & np.isfinite(noise), square.astype(np.float64)
        if not usable.any():
            return noise, noise
        exact = y.astype(np.float64)
        mean = exact[usable].mean()
        prior = max(exact[usable].var() - square[usable].mean(), 0.0)
        keep = np.where(square == 0, 1.0, prior / np.where(prior + square == 0, 1.0, prior + square))
        z = (mean + keep * (exact - mean) + keep * square / 2).astype(np.float32)
    return z, z


# --- The threshold without a sort, as kernels find it -----------------------------------------------------------------


def order_key(logits) -> np.ndarray:
    """uint32 that sort as the float32 logits do: +0 for -0, all bits flipped if negative, else the top bit set."""
    bits = (np.asarray(logits, np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


def radix_threshold(keys, weights, target: int, least: int, most: int) -> tuple[int, int]:
    """(key, ties): the prefix is all keys above `key` and the first `ties` tokens, by index, that equal it.

    keys : [n] uint32 of `order_key`        weights : [n] uint64 of `masses`
    target, least, most : as for `prefix_length`

    Four digits of eight bits from the top: histograms of counts and masses over the tokens that match the digits found
    so far, then a scan of the bins downwards to the one where the condition becomes true.  Both sums grow along the
    order, so it becomes true once.
    """
    least, most = min(least, len(keys)), min(most, len(keys))
    if most == 0 or target <= 0 and least == 0:
        return 2**32, 0                                                  # above every key: nothing is chosen
    prefix, mass, count = 0, 0, 0                                        # of the tokens above the bins that match
    for shift in (24, 16, 8, 0):
        inside = keys.astype(np.uint64) >> np.uint64(shift + 8) == np.uint64(prefix)
        digits = (keys[inside] >> np.uint32(shift) & np.uint32(255)).astype(np.int64)
        counts, sums = np.bincount(digits, minlength=256), np.zeros(256, np.uint64)
        np.add.at(sums, digits, weights[inside])
        for digit in range(255, -1, -1):
            more_mass, more = mass + int(sums[digit]), count + int(counts[digit])
            if more_mass >= target and more >= least or more >= most:
                break
            mass, count = more_mass, more
        prefix = prefix << 8 | digit
    equal = keys == prefix
    weight, remaining = int(weights[equal][0]), int(equal.sum())
    short = target - mass
    ties = 0 if short <= 0 else remaining if weight == 0 else -(-short // weight)
    return prefix, int(np.clip(max(ties, least - count), 1, min(remaining, most - count)))


# --- Rows ------------------------------------------------------------------------------------------------------------


def _select(scores, lengths, window, choose, calibrated=False):
    logits = np.asarray(scores.logits)
    if logits.ndim != 3 or logits.dtype.kind not in "fV":
        raise ValueError(f"selection: logits: expected floating point [batch, q_heads, tokens], got {logits.dtype} "
                         f"{list(logits.shape)}")
    sigma = None
    if calibrated:
        if scores.sigma is None:
            raise ValueError("selection: sigma: expected the noise of the scores for a calibrated selection, got None")
        sigma = np.asarray(scores.sigma)
        if sigma.shape != logits.shape:
            raise ValueError(f"selection: sigma: expected the shape of logits, {list(logits.shape)}, "
                             f"got {list(sigma.shape)}")
        sigma = sigma.astype(np.float32)
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32)
    batch, heads, tokens = logits.shape
    lengths = _lengths(lengths, batch, tokens)
    start, stop = middle(lengths, *window)
    mask, mass = np.zeros(logits.shape, bool), np.zeros((batch, heads), np.float32)
    for b, h in np.ndindex(batch, heads):
        inside = np.arange(start[b], stop[b])
        inside = inside[np.isfinite(logits[b, h, inside])]
        always = np.concatenate([np.arange(start[b]), np.arange(stop[b], lengths[b])])
        chosen, mass[b, h] = choose(logits[b, h], None if sigma is None else sigma[b, h], inside, always)
        mask[b, h, chosen] = True
    return Selection(*_lists(mask), mass)


def _lists(mask):
    """(indices ascending, padded with -1, counts), int32."""
    tokens = mask.shape[-1]
    indices = np.sort(np.where(mask, np.arange(tokens), tokens), axis=-1)
    return np.where(indices == tokens, -1, indices).astype(np.int32), mask.sum(axis=-1).astype(np.int32)


def _mask(selection, tokens):
    mask = np.zeros((*selection.counts.shape, tokens), bool)
    for row in np.ndindex(selection.counts.shape):
        mask[row][selection.indices[row][: selection.counts[row]]] = True
    return mask


def _lengths(lengths, batch, tokens):
    if lengths is None:
        return np.full(batch, tokens)
    lengths = np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.dtype.kind not in "iu" or np.any((lengths < 0) | (lengths > tokens)):
        raise ValueError(f"selection: lengths: expected integers [{batch}] from 0 to {tokens}, got {lengths.dtype} "
                         f"{lengths.tolist()}")
    return lengths.astype(np.int64)


def _ratio(part, whole):
    return part / whole if whole else 1.0


def _check_count(name, value, least):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"selection: {name}: expected an integer of at least {least}, got {value!r}")


# --- Claims ----------------------------------------------------------------------------------------------------------

_PLAIN = {"sinks": 0, "recent": 0}


def _rows(rng):
    """One row of logits: spread, flat, with ties, with numbers that are not finite, with an early or late largest."""
    tokens = int(rng.choice([1, 2, 7, 40, 300]))
    y = rng.standard_normal(tokens) * rng.choice([0.0, 1e-3, 1.0, 5.0, 40.0])
    if rng.random() < 0.5:
        y = np.rint(y)                                                   # ties
    if rng.random() < 0.3:
        y[rng.random(tokens) < 0.3] = rng.choice([np.nan, np.inf, -np.inf])
    if rng.random() < 0.3:
        y = np.copysign(0.0, y)                                          # zeros of both signs
    return y.astype(np.float32)


def _problem(rng):
    """(scores of [1, 2, tokens], options of top_p, the bounds of M)."""
    y = np.stack([_rows(rng)] * 2)[None]
    y[0, 1] = y[0, 1, ::-1]
    tokens = y.shape[-1]
    options = {"p": float(rng.choice([1e-6, 0.3, 0.65, 0.85, 0.99, 0.9999999, 1.0])),
               "lengths": rng.integers(0, tokens + 1, 1) if rng.random() < 0.5 else np.array([tokens]),
               "sinks": int(rng.choice([0, 1, 4])), "recent": int(rng.choice([0, 3])),
               "block": int(rng.choice([1, 8])), "min_tokens": int(rng.choice([0, 1, 5])),
               "normalise": str(rng.choice(NORMALISE))}
    if rng.random() < 0.3:
        options["max_tokens"] = options["min_tokens"] + int(rng.integers(0, 9))
    sigma = np.abs(rng.standard_normal(y.shape)).astype(np.float32) * np.float32(rng.choice([0.0, 0.3, 1.0]))
    return Scores(y, sigma), options


def _expected_rows(scores, options):
    """(row index, its logits as Python numbers, M, A): M and A from their definition, one token at a time."""
    length, sinks, recent, block = (int(options["lengths"][0]), *(options[n] for n in ("sinks", "recent", "block")))
    n = sinks + block * (max(0, length - sinks - recent) // block)
    for h in range(scores.logits.shape[1]):
        y = scores.logits[0, h].astype(float).tolist()
        finite = [t for t in range(length) if np.isfinite(y[t])]
        yield h, y, [t for t in finite if sinks <= t < n], [t for t in finite if not sinks <= t < n]


def _whole_masses(y, inside):
    largest = max((y[t] for t in inside), default=0.0)
    return {t: int(np.rint(2.0**31 * np.exp(y[t] - largest))) for t in inside}


def _chosen(selection, h):
    return selection.indices[0, h, : selection.counts[0, h]].tolist()


def _reaches(rng, samples):
    """Shortfall of the target in integers, where max_tokens allows it; Python integers do not overflow.

    Every other row is flat, of 16 tokens, and p barely above a multiple of 1/16: what rounding p down would miss.
    """
    shortfall = []
    for case in range(samples):
        scores, options = _problem(rng)
        options.pop("max_tokens", None)
        if case % 2:
            scores = Scores(np.zeros((1, 1, 16), np.float32))
            options = {"p": int(rng.integers(0, 16)) / 16 + 2.0**-20, "lengths": np.array([16]), "sinks": 0,
                       "recent": 0, "block": 1, "normalise": "middle"}
        selection, p = top_p(scores, **options), options["p"]
        for h, y, inside, outside in _expected_rows(scores, options):
            outside = outside if options["normalise"] == "global" else []
            w = _whole_masses(y, inside + outside)
            have = sum(w[t] for t in _chosen(selection, h)) + sum(w[t] for t in outside)
            numerator, denominator = p.as_integer_ratio()
            shortfall.append(float(bool(inside) and have * denominator < numerator * sum(w.values())))
    return identity(shortfall, samples=samples)


def _minimal(rng, samples):
    """Without its last token in the order, a selection is below the target, or was at min_tokens."""
    excess = []
    for _ in range(samples):
        scores, options = _problem(rng)
        selection, q = top_p(scores, **options), share(options["p"])
        for h, y, inside, outside in _expected_rows(scores, options):
            outside = outside if options["normalise"] == "global" else []
            w, chosen = _whole_masses(y, inside + outside), _chosen(selection, h)
            if q == 2**SHARE_BITS or len(chosen) <= min(options["min_tokens"], len(inside)):
                continue
            last = max(chosen, key=lambda t: (-y[t], t))
            have = sum(w[t] for t in chosen if t != last) + sum(w[t] for t in outside)
            excess.append(float(have * 2**SHARE_BITS >= q * sum(w.values())))
    return identity(excess or [0.0], samples=samples)


def _order(rng, samples):
    """No candidate left out comes before one that was chosen, by comparison of pairs; A is never listed."""
    wrong = []
    for case in range(samples):
        scores, options = _problem(rng)
        k = int(rng.integers(0, 12))
        window = {name: options[name] for name in ("lengths", "sinks", "recent", "block")}
        selection = top_p(scores, **options) if case % 2 else top_k(scores, k, **window)
        for h, y, inside, _ in _expected_rows(scores, options):
            chosen = _chosen(selection, h)
            rank = {t: (-y[t], t) for t in inside}
            left = [rank[t] for t in inside if t not in set(chosen)]
            wrong.append(float(not set(chosen) <= set(inside) or chosen != sorted(chosen)
                               or bool(left and chosen) and max(rank[t] for t in chosen) > min(left)))
            if case % 2 == 0:
                wrong.append(len(chosen) - min(k, len(inside)))
            else:
                most = options.get("max_tokens", len(inside))
                wrong.append(float(not min(options["min_tokens"], len(inside)) <= len(chosen) <= most))
    return identity(wrong, samples=samples)


def _radix(rng, samples):
    wrong = []
    for _ in range(samples):
        y = _rows(rng)
        y = y[np.isfinite(y)]
        if len(y) == 0:
            continue
        weights, least = masses(y, y.max()), int(rng.choice([0, 1, 5]))
        most = len(y) if rng.random() < 0.5 else least + int(rng.integers(0, 9))
        target = target_mass(share(rng.choice([1e-6, 0.5, 0.85, 1.0])), int(weights.sum())) * int(rng.integers(0, 2))
        key, ties = radix_threshold(order_key(y), weights, target, least, most)
        equal = np.flatnonzero(order_key(y) == key)[:ties]
        by_radix = {*np.flatnonzero(order_key(y) > key).tolist(), *equal.tolist()}
        order = ranking(y)
        by_sort = set(order[: prefix_length(weights[order], target, least, most)].tolist())
        wrong.append(float(by_radix != by_sort))
    return identity(wrong, samples=samples)


def _order_keys(rng, samples):
    y = rng.integers(0, 2**32, 4 * samples, dtype=np.uint32).view(np.float32)
    y, edges = y[np.isfinite(y)], np.float32([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    one = np.concatenate([y, np.repeat(edges, 6)])
    other = np.concatenate([rng.permutation(y), np.tile(edges, 6)])
    keys, others = (order_key(x).astype(np.int64) for x in (one, other))
    return identity(np.sign(keys - others) - np.sign(one.astype(float) - other.astype(float)), samples=len(one))


def _real_mass(rng, samples):
    shortfall, allowance = [], []
    for case in range(samples):
        scores, options = _problem(rng)
        options.update(normalise="middle", max_tokens=None)
        if case % 2:
            scores = Scores(rng.standard_normal((1, 1, 100)))
            options.update(lengths=np.array([100]), p=0.85)
        selection = top_p(scores, **options)
        for h, y, inside, _ in _expected_rows(scores, options):
            if inside:
                weight = {t: np.exp(y[t] - max(y[t] for t in inside)) for t in inside}
                have = sum(weight[t] for t in _chosen(selection, h)) / sum(weight.values())
                shortfall.append(options["p"] - have)
                allowance.append(len(inside) * 2.0**-31 + 1e-13)
    return bound(shortfall, allowance, samples=samples)


def _constant(rng, samples):
    """Logits and constants are multiples of 1/8: nothing is rounded."""
    differences = []
    for case in range(samples):
        scores, options = _problem(rng)
        options.update(calibrated=(False, "shift")[case % 2])
        with np.errstate(invalid="ignore"):
            y, sigma = np.rint(8 * scores.logits) / 8, np.rint(4 * scores.sigma) / 4
        one, other = (top_p(Scores(y + np.float32(c), sigma), **options) for c in (0.0, rng.integers(-400, 400) / 8))
        differences += [np.sum(one.indices != other.indices), np.abs(one.mass - other.mass).max()]
    return identity(differences, samples=samples)


def _no_noise(rng, samples):
    differences = []
    for _ in range(samples):
        scores, options = _problem(rng)
        scores = Scores(np.clip(scores.logits, -60, 60), scores.sigma * 0)
        plain = top_p(scores, **options)
        for calibrated in ("shrink", "shift"):
            other = top_p(scores, calibrated=calibrated, **options)
            # "shift" takes all tokens that tie with the crossing one.
            missing = _mask(plain, y := scores.logits.shape[-1]) & ~_mask(other, y)
            extra = _mask(other, y) & ~_mask(plain, y)
            if calibrated == "shift":
                last = np.where(_mask(plain, y), scores.logits, np.inf).min(axis=-1, keepdims=True)
                extra &= scores.logits != last
            differences += [missing.sum(), extra.sum()]
    return identity(differences, samples=samples)


def _union(rng, samples):
    wrong = []
    for _ in range(samples):
        scores, options = _problem(rng)
        selection = top_p(scores, **options)
        one, tokens = union(selection, 1), scores.logits.shape[-1]
        wrong.append(np.sum(_mask(one, tokens)[:, 0] != _mask(selection, tokens).any(axis=1)))
    return identity(wrong)


def _pruning(rng, samples):
    """|o - o_kept| <= (1 - m) max |v_s - v_t| with the true mass m of what is kept, from selections on noisy logits."""
    distance, limit = [], []
    for _ in range(samples):
        tokens, group = int(rng.integers(2, 60)), int(rng.integers(1, 4))
        query = rng.standard_normal((1, group, 8)) * rng.choice([0.3, 2.0])
        keys, values = rng.standard_normal((2, 1, 1, tokens, 8))
        exact = np.einsum("bhd,bgtd->bht", query, keys) * 8**-0.5
        sigma = np.full(exact.shape, 0.5)
        window = {"sinks": int(rng.integers(0, 3)), "recent": int(rng.integers(0, 5))}
        chosen = top_p(Scores(exact + 0.5 * rng.standard_normal(exact.shape), sigma), 0.7, **window,
                       calibrated=CALIBRATIONS[rng.integers(3)])
        mask = kept(union(chosen, 1) if rng.random() < 0.3 else chosen, **window)
        (some, part), (full, whole) = attend(query, keys, values, mask), attention.decode(query, keys, values)
        diameter = np.linalg.norm(values[0, 0, :, None] - values[0, 0], axis=-1).max()
        weights = np.where(mask, special.softmax(exact, axis=-1), 0.0).sum(axis=-1)
        distance.append(np.linalg.norm(full - some, axis=-1)[0] - (1 - weights[0]) * diameter)
        distance.append(np.abs(part - whole - np.log(weights))[0] * diameter)           # lse is that of the kept mass
        limit += [np.full(group, 1e-12 * diameter)] * 2
    return bound(np.concatenate(distance), np.concatenate(limit), samples=samples)


# Gaussian logits: s ~ N(0, tau^2), y = s + N(0, sigma^2).  With v = tau^2 + sigma^2 and many tokens, weights exp(y)
# tilt the law of y to N(v, v), so that p = Phi((v - theta) / sqrt(v)); weights exp(s) tilt it to N(tau^2, v), so the
# true mass of y >= theta is Phi((tau^2 - theta) / sqrt(v)) = Phi(Phi^-1(p) - sigma^2 / sqrt(v)).  Of N tokens the share
# differs from its limit by a relative exp(tau^2) / N and the like: _FINITE allows for it.

_TAU, _SIGMA, _TOKENS, _FINITE = 1.25, 1.0, 2000, 0.01


def gaussian_mass(p: float, tau: float, sigma: float) -> float:
    """The true mass that Top-p on proxy logits achieves for normal logits: Phi(Phi^-1(p) - sigma^2 / sqrt(v))."""
    return float(special.ndtr(special.ndtri(p) - sigma**2 / np.hypot(tau, sigma)))


def _achieved(rng, samples, p, calibrated, sigma):
    """The true mass [samples] of the selection.  sigma may differ from token to token."""
    exact = rng.standard_normal((1, samples, _TOKENS)) * _TAU
    sigma = np.broadcast_to(sigma, exact.shape)
    noisy = exact + sigma * rng.standard_normal(exact.shape)
    chosen = top_p(Scores(noisy, sigma), p, calibrated=calibrated, **_PLAIN)
    return np.where(_mask(chosen, _TOKENS), special.softmax(exact, axis=-1), 0.0).sum(axis=-1)[0]


def _plain_calibration(rng, samples):
    return weakest({f"p {p}": expectation(_achieved(rng, samples, p, False, _SIGMA),
                                          gaussian_mass(p, _TAU, _SIGMA), allowance=_FINITE) for p in (0.65, 0.85)})


def _calibrated(rng, samples, calibrated):
    cases = {f"p {p}": expectation(_achieved(rng, samples, p, calibrated, _SIGMA), p, allowance=_FINITE)
             for p in (0.65, 0.85)}
    uneven = rng.uniform(0.2, 1.4, _TOKENS)
    cases["p 0.85, uneven sigma"] = expectation(_achieved(rng, samples, 0.85, calibrated, uneven), 0.85,
                                                allowance=_FINITE)
    return weakest(cases)


def _noisy_rows(rng, queries):
    """(scores, exact) [queries, 2, 400]: normal, with noise of which sigma knows too little."""
    exact = _TAU * rng.standard_normal((queries, 2, 400))
    return Scores(exact + _SIGMA * rng.standard_normal(exact.shape), np.full(exact.shape, 0.7 * _SIGMA)), exact


def _fitted(rng, samples):
    """The mean of what is achieved reaches p, and with 2^-16 less it does not."""
    wrong = []
    for case in range(samples):
        scores, exact = _noisy_rows(rng, 2)
        calibrated, p = CALIBRATIONS[case % 3], float(rng.uniform(0.3, 0.99))
        q = fitted_p(scores, exact, p, calibrated=calibrated, **_PLAIN)
        wrong.append(achieved(top_p(scores, q, calibrated=calibrated, **_PLAIN), exact, **_PLAIN).mean() < p)
        if q > 2.0**-SHARE_BITS:
            less = top_p(scores, q - 2.0**-SHARE_BITS, calibrated=calibrated, **_PLAIN)
            wrong.append(achieved(less, exact, **_PLAIN).mean() >= p)
    return identity(np.array(wrong, float), samples=samples)


def _fitted_to_others(rng, samples):
    """64 queries fit p within about 0.01, as 64 * 2 masses whose spread is 0.1 allow."""
    fitted, masses_of_others = fitted_p(*_noisy_rows(rng, 64), 0.85, **_PLAIN), []
    for _ in range(0, samples, 100):
        scores, exact = _noisy_rows(rng, 100)
        made = top_p(scores, fitted, **_PLAIN)
        masses_of_others.append(achieved(made, exact, **_PLAIN).mean(axis=1))
    return expectation(np.concatenate(masses_of_others), 0.85, allowance=6 * 0.01)


def _tilting(rng, samples):
    """The two sides of the identity over noise alone, their difference summed over tokens of one row; any logits."""
    exact = 2 * np.random.default_rng(5).standard_t(4, 40)
    exact, cases = exact - exact.max(), {}
    sigma = np.random.default_rng(6).uniform(0.2, 1.0, 40)
    noisy = (exact + sigma * rng.standard_normal((samples, 40))).astype(np.float32)
    order_by, weigh_by = _corrected(noisy, np.broadcast_to(sigma.astype(np.float32), noisy.shape), ..., "shift")
    for theta in (-4.0, -1.5, 0.0):
        estimate = np.where(order_by >= theta, np.exp(weigh_by.astype(np.float64)), 0.0).sum(axis=-1)
        true = np.where(noisy >= theta, np.exp(exact), 0.0).sum(axis=-1)
        cases[f"threshold {theta}"] = expectation(estimate - true, 0.0, allowance=1e-5)          # float32 of weights
    return weakest(cases)


CLAIMS = (
    Claim("mass reached", "the integer mass of the selection, and of A for global, is at least p of the total, for "
          "every p in floating point", "definition; p is rounded up to a multiple of 2^-16", "identity", _reaches,
          samples=400),
    Claim("minimal", "without its last token the selection is below the target, unless min_tokens asks for it",
          "definition; the crossing token is included", "identity", _minimal, samples=400),
    Claim("order", "no candidate left out has a larger logit, or an equal one and a lower index, than one chosen; "
          "indices ascend; counts obey k, min_tokens and max_tokens; what is always kept is not listed",
          "definition", "identity", _order, samples=400),
    Claim("radix descent", "four 8-bit digits with histograms of counts and masses find the prefix that the sort finds",
          "derived at radix_threshold: both conditions are monotone along the order", "identity", _radix, samples=400),
    Claim("order of keys", "order_key(a) < order_key(b) if and only if a < b, for all finite float32",
          "textbook: sign-magnitude to unsigned", "identity", _order_keys, samples=2000),
    Claim("real mass", "by exp and not by integers, the selection keeps at least p - tokens 2^-31",
          "derived: each mass is off by 2^-32, and the largest is 1", "bound", _real_mass, samples=200),
    Claim("constant", "a constant added to all logits changes neither the selection nor its mass",
          "textbook: softmax is invariant to a constant", "identity", _constant, samples=200),
    Claim("no noise", "with sigma 0 the corrections change nothing, but that shift takes all that tie with the last",
          "definition", "identity", _no_noise, samples=200),
    Claim("union", "the list of a KV head holds what any of its query heads chose, and nothing else", "definition",
          "identity", _union, samples=100),
    Claim("pruning bound",
          "|o - o_kept| <= (1 - m) max_(s,t) |v_s - v_t|, m the true mass of what is kept; lse falls by -log m",
          "derived in reference/attention.py; Twilight arXiv 2502.02770", "bound", _pruning, samples=200),
    Claim("nominal p against achieved mass",
          "for logits N(0, tau^2) with noise N(0, sigma^2), Top-p achieves Phi(Phi^-1(p) - sigma^2 / sqrt(tau^2 + "
          "sigma^2)) < p", "derived in reference/selection.py", "expectation", _plain_calibration),
    Claim("shrink is calibrated", "for logits N(0, tau^2), shrink achieves p, with equal and unequal sigma",
          "derived: E[exp(s) | y] under the prior", "expectation", partial(_calibrated, calibrated="shrink")),
    Claim("shift is calibrated", "for logits N(0, tau^2), shift achieves p, with equal and unequal sigma",
          "derived: exponential tilting", "expectation", partial(_calibrated, calibrated="shift")),
    Claim("fitted p", "on the queries that it was fitted to, the true mass is at least the p that is wanted, and with "
          "2^-16 less it is not", "definition; what is achieved grows with p", "identity", _fitted, samples=30),
    Claim("fitted p holds for other queries", "on new rows of the same law the fitted p "
          "achieves what is wanted", "derived in reference/selection.py: a mean of many queries",
          "expectation", _fitted_to_others, samples=1000),
    Claim("shift identity",
          "E sum exp(y - sigma^2 / 2) 1[y - sigma^2 >= theta] = E sum exp(s) 1[y >= theta] for y = s + N(0, sigma^2)",
          "derived: exponential tilting", "expectation", _tilting, samples=20000),
)
