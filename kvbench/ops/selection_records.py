"""Selection in the registry: problems, bytes, and what it means for a selection to agree with the reference.

Operators: kvbench/ops/selection.py.
"""
from __future__ import annotations

import math

import numpy as np
from scipy import special

from kvbench.ops.dispatch import EPSILON, relative_error
from kvbench.ops.selection import BACKENDS, select_top_k, select_top_p
from kvbench.reference import selection as reference
from kvbench.registry import Kernel, Traffic, register
from kvbench.scores import Scores

AXES = {"tokens": (131072, 32768, 4096), "percent": (2, 10, 5), "kv_heads": (8, 2, 32), "group": (4, 8, 1),
        "batch": (1, 16)}
BENCHMARK_P = 0.85


def _top_p(scores, p, *, kv_heads=None, sinks=0, recent=0, **options):
    """`reference.top_p`, united over the group if kv_heads is given."""
    made = reference.top_p(scores, p, sinks=sinks, recent=recent, **options)
    return made if kv_heads is None else reference.union(made, kv_heads)


def _top_k(scores, k, *, kv_heads=None, sinks=0, recent=0, **options):
    """`reference.top_k`, united over the group if kv_heads is given."""
    made = reference.top_k(scores, k, sinks=sinks, recent=recent, **options)
    return made if kv_heads is None else reference.union(made, kv_heads)


def spread(percent: int) -> float:
    """Standard deviation tau of normal logits of which Top-p of BENCHMARK_P takes about that share.

    Of N(0, tau^2), weights exp tilt to N(tau^2, tau^2): the mass above theta is Phi(tau - theta / tau), the share of
    tokens there Phi(-theta / tau), so tau = Phi^-1(p) - Phi^-1(share).
    """
    return max(special.ndtri(BENCHMARK_P) - special.ndtri(min(percent, 80) / 100), 0.1)


def _scores(problem, rng):
    shape = (problem["batch"], problem["kv_heads"] * problem["group"], problem["tokens"])
    return Scores((spread(problem["percent"]) * rng.standard_normal(shape, dtype=np.float32)).astype(np.float32))


def _top_p_inputs(problem, rng):
    return {"scores": _scores(problem, rng), "p": BENCHMARK_P, "kv_heads": problem["kv_heads"]}


def _top_k_inputs(problem, rng):
    k = max(problem["tokens"] * min(problem["percent"], 100) // 100, 1)
    return {"scores": _scores(problem, rng), "k": k, "kv_heads": problem["kv_heads"]}


def listed(problem) -> int:
    """Tokens on the lists of all KV heads, of what independent query heads would choose."""
    chosen = problem["tokens"] * (1 - (1 - min(problem["percent"], 100) / 100) ** problem["group"])
    return problem["batch"] * problem["kv_heads"] * max(round(chosen), 1)


def list_bytes(problem) -> int:
    """A list per KV head, and counts and masses."""
    return 4 * (listed(problem) + problem["batch"] * problem["kv_heads"] * (1 + problem["group"]))


def _traffic(problem):
    """Logits once."""
    rows = problem["batch"] * problem["kv_heads"] * problem["group"]
    return Traffic(4 * rows * problem["tokens"], list_bytes(problem))


# ---- agreement -------------------------------------------------------------------------------------------------------

# Masses differ by how exp is computed: in float32, exp of a difference x from the largest logit is off by |x| times the
# rounding of x, and by that of a few operations.  Masses of |x| > 22 are zero in integers.
MASS_ERROR = (22 + 16) * EPSILON["float32"] / 2


def _agreement(inputs, expected, actual):
    """A selection is right if it lies between those for a target that is lower and one that is higher by the error of
    the masses; its order has no tolerance, but for "shrink", whose keys hang on means.  Where masses do not decide, as
    in Top-k, the two are the same.  What the reference made is held to the same rule.
    """
    scores, rule = inputs["scores"], {name: value for name, value in inputs.items() if name not in ("scores", "p", "k")}
    share, least, most = _target(inputs)
    batch, q_heads, tokens = scores.logits.shape
    lengths = rule.get("lengths")
    lengths = np.full(batch, tokens) if lengths is None else lengths
    start, stop = reference.middle(lengths, *(rule.get(name, default) for name, default in
                                              (("sinks", 0), ("recent", 0), ("block", 1))))
    lists = rule.get("kv_heads") or q_heads
    group = q_heads // lists
    sure, possible = np.zeros((2, batch, lists, tokens), bool)
    low, high = np.ones((2, batch, q_heads))
    calibrated = "shift" if rule.get("calibrated") is True else rule.get("calibrated", False)
    for b, h in np.ndindex(batch, q_heads):
        t = np.arange(lengths[b])
        inside = (t >= start[b]) & (t < stop[b]) & np.isfinite(scores.logits[b, h, : lengths[b]])
        bounds = _bounds(scores.logits[b, h], scores.sigma[b, h] if calibrated else None, t[inside],
                         t[(t < start[b]) | (t >= stop[b])], share, least, most,
                         rule.get("normalise") == "global", calibrated)
        if bounds is not None:
            sure[b, h // group, bounds[0]], possible[b, h // group, bounds[1]] = True, True
            low[b, h], high[b, h] = bounds[2:]
    for made in (expected, actual):
        compare_lists(made, sure, possible, low, high)


def _target(inputs):
    if "k" in inputs:
        return 0, inputs["k"], inputs["k"]
    return reference.share(inputs["p"]), inputs.get("min_tokens", 1), inputs.get("max_tokens")


def _bounds(logits, sigma, candidates, always, share, least, most, total, calibrated):
    """(tokens that must be chosen, tokens that may be, least and largest share of the mass) of one query head."""
    order_by, weigh_by = reference._corrected(logits, sigma, candidates, calibrated)
    usable = np.isfinite(order_by) & np.isfinite(weigh_by)
    candidates, order_by, weigh_by = candidates[usable], order_by[usable], weigh_by[usable].astype(np.float64)
    if len(candidates) == 0:
        return None
    always = always[np.isfinite(logits[always])] if total else always[:0]
    largest = max(weigh_by.max(), logits[always].astype(np.float64).max(initial=-np.inf))
    weights, outside = np.exp(weigh_by - largest), np.exp(logits[always].astype(np.float64) - largest).sum()
    everything = outside + weights.sum()
    # Each integer is off by half a unit of 2^-31 besides.
    error = MASS_ERROR * everything + (len(candidates) + len(always) + 1) * 2.0**-31
    order, count = reference.ranking(order_by), len(candidates)
    most = count if most is None else min(most, count)
    reached = outside + np.concatenate([[0.0], np.cumsum(weights[order])])
    target = share / 2**reference.SHARE_BITS * everything

    def prefix(goal):
        if share >= 2**reference.SHARE_BITS:
            return most
        return int(min(max(np.searchsorted(reached, goal), min(least, count)), most))

    ends = prefix(target - error), prefix(target + error)
    if calibrated == "shift":
        chosen, shares = [], []
        for n in ends:
            threshold = order_by[order[n - 1]] if n else np.inf
            passing = int((logits[candidates] >= threshold).sum())
            taken = reference.ranking(logits[candidates])[:min(max(passing, min(least, count)), most) if n else 0]
            if n and len(taken) < passing:
                threshold = logits[candidates[taken[-1]]] if len(taken) else np.inf
            chosen.append(candidates[taken])
            shares.append(outside + weights[order_by >= threshold].sum())
    elif calibrated == "shrink":
        slack = EPSILON["float32"] * np.abs(order_by.astype(np.float64)) + 1e-12 * np.abs(weigh_by).max()
        firm = order_by - 2 * slack > order_by[order[ends[0] - 1]] if ends[0] else np.zeros(count, bool)
        loose = order_by + 2 * slack >= order_by[order[ends[1] - 1]] if ends[1] else np.zeros(count, bool)
        chosen = candidates[firm], candidates[loose]
        shares = outside + weights[firm].sum(), outside + weights[loose].sum()
    else:
        chosen, shares = [candidates[order[:n]] for n in ends], [reached[n] for n in ends]
    return *chosen, (shares[0] - error) / everything, (shares[1] + error) / everything


def compare_lists(made, sure, possible, low, high, sizes=None):
    """AssertionError unless a Selection has all that is `sure`, nothing that is not `possible` (booleans [batch, lists,
    tokens]), masses from low to high [batch, q_heads], and lists of `sizes` [batch, lists] if they are known."""
    indices, counts, mass = (np.asarray(x) for x in (made.indices, made.counts, made.mass))
    if (indices.shape, counts.shape, mass.shape) != (sure.shape, sure.shape[:2], low.shape):
        raise AssertionError(f"shapes {indices.shape}, {counts.shape}, {mass.shape}; expected {sure.shape}, "
                             f"{sure.shape[:2]}, {low.shape}")
    for b, i in np.ndindex(counts.shape):
        if not 0 <= counts[b, i] <= sure.shape[2] or sizes is not None and counts[b, i] != sizes[b, i]:
            raise AssertionError(f"list {b, i}: {counts[b, i]} tokens of {sure.shape[2]}")
        listed = indices[b, i, : counts[b, i]].astype(np.int64)
        if np.any(np.diff(listed) <= 0) or listed.size and not (listed[0] >= 0 and listed[-1] < sure.shape[2]):
            raise AssertionError(f"list {b, i}: positions do not ascend within 0 .. {sure.shape[2] - 1}")
        mask = np.zeros(sure.shape[2], bool)
        mask[listed] = True
        missing, extra = np.flatnonzero(sure[b, i] & ~mask), np.flatnonzero(mask & ~possible[b, i])
        if missing.size or extra.size:
            raise AssertionError(f"list {b, i}: {missing.size} tokens are missing, such as {missing[:3]}, "
                                 f"{extra.size} should not be there, such as {extra[:3]}")
    rounding = EPSILON["float32"] * np.maximum(np.abs(high), 1)
    held = (mass >= low - rounding) & (mass <= high + rounding)
    if not held.all():
        first = tuple(np.argwhere(~held)[0])
        raise AssertionError(f"mass {first}: {mass[first]!r}, expected {low[first]!r} to {high[first]!r}")


def _error(inputs, expected, actual):
    error = relative_error(expected.mass, actual.mass)
    return error if math.isfinite(error) else 0.0


for name, operator, function, inputs, source in (
        ("select_top_p", select_top_p, _top_p, _top_p_inputs,
         "arXiv 2502.02770, Top-p pruning; arXiv 2606.31519, by proxy scores"),
        ("select_top_k", select_top_k, _top_k, _top_k_inputs, "arXiv 2406.10774, Top-k of estimates")):
    register(Kernel(name=f"selection.{name}", reference=function, operator=operator, backends=BACKENDS, axes=AXES,
                    inputs=inputs, traffic=_traffic, agreement=_agreement, error=_error, source=source))
