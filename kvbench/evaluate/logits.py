"""`kvbench eval --task logits`: one preset on one captured layer, decoding as a model does, against exact attention.

All tokens before the first evaluated query are the prompt.  A metric is a mean over queries and query heads; a query at
position p sees the tokens 0..p and nothing else.  What is compared:

    logit_mae     |scaled logit on the keys as the cache holds them - exact logit|, mean over all tokens seen
    kl            KL(softmax of the exact logits || softmax of the others), nats
    top10         share of the 10 heaviest tokens that are among the 10 heaviest of the others
    output_error  ||output - exact|| / ||exact||, over all queries: what `KVCache.attend` answers
    budget        tokens attended / tokens seen                    these three for presets that select tokens;
    mass          exact softmax weight of the attended tokens      1 for those that attend to all
    recall        share of the budget's heaviest tokens that are attended
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax

from kvbench import arrays
from kvbench.evaluate.capture import Capture
from kvbench.evaluate.specs import Spec

TOP = 10


def measure(capture: Capture, spec: Spec, queries: int = 64, device: str = "cpu",
            progress: Callable[[str], None] = lambda line: None) -> dict:
    """Metrics, and bits_per_element and nbytes of the cache with all tokens; `queries`: at most so many are evaluated.

    They are spread over the later half of the last run of consecutive query positions; the queries of its earlier half
    are given with the prompt, for methods that look at the prompt's queries.
    """
    known, asked = rows_of(capture.positions, queries)
    _, kv_heads, _, head_dim = capture.keys.shape
    q_heads = capture.queries.shape[1]
    tokens = int(capture.positions[asked[-1]]) + 1
    cache = spec.build(batch=1, kv_heads=kv_heads, q_heads=q_heads, head_dim=head_dim, capacity=tokens, device=device,
                       dtype="float16")
    keys, values = (arrays.upload(np.ascontiguousarray(x[:, :, :tokens]), device)
                    for x in (capture.keys, capture.values))

    def queries_at(rows):
        return arrays.upload(np.ascontiguousarray(capture.queries[:, :, rows]), device)

    first = int(capture.positions[asked[0]])
    cache.append(keys.narrow(2, 0, first), values.narrow(2, 0, first), q=queries_at(known) if len(known) else None)
    steps = []
    for number, row in enumerate(asked, 1):
        progress(f"query {number} of {len(asked)}")
        seen = int(capture.positions[row]) + 1
        held = len(cache)
        cache.append(keys.narrow(2, held, seen), values.narrow(2, held, seen), q=queries_at([row]))
        query = np.ascontiguousarray(capture.queries[:, :, row])
        output = arrays.borrow(cache.attend(arrays.upload(query, device)), "output").to_host()
        steps.append((query[0].astype(np.float64), seen, output[0].astype(np.float64),
                      _attended(cache, seen, q_heads)))

    changed = cache.stored()[0].astype(np.float64)
    original, weights_of = capture.keys[0].astype(np.float64), capture.values[0].astype(np.float64)
    sums = dict.fromkeys(("logit_mae", "kl", "top10", "budget", "mass", "recall"), 0.0)
    difference = norm = 0.0
    for query, seen, output, attended in steps:
        store = slice(min(cache.sinks, seen), cache.sinks + int(cache.tail.encoded(max(seen - cache.sinks, 0))))
        held = original[:, :seen].copy()
        held[:, store] = changed[:, store]
        exact, other = (_logits(query, x) for x in (original[:, :seen], held))
        log_exact = log_softmax(exact, axis=1)
        weights = np.exp(log_exact)
        expected = np.concatenate(np.split(weights, kv_heads) @ weights_of[:, :seen])
        difference += np.sum((output - expected) ** 2)
        norm += np.sum(expected**2)
        sums["logit_mae"] += np.abs(other - exact).mean()
        sums["kl"] += (weights * (log_exact - log_softmax(other, axis=1))).sum(axis=1).mean()
        sums["top10"] += _overlap(exact, other, min(TOP, seen))
        sums["budget"] += attended.mean()
        sums["mass"] += (weights * attended).sum(axis=1).mean()
        sums["recall"] += np.mean([_share_of_heaviest(w, a) for w, a in zip(weights, attended)])
    metrics = {name: float(total / len(steps)) for name, total in sums.items()}
    metrics["output_error"] = float(np.sqrt(difference / norm)) if norm else 0.0
    return {"metrics": metrics, "bits_per_element": cache.bits_per_element, "nbytes": cache.nbytes_used,
            "tokens": tokens}


def rows_of(positions: np.ndarray, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows whose queries the prompt brings, rows that are evaluated), of the last run of consecutive positions."""
    breaks = np.flatnonzero(np.diff(positions) != 1)
    run = np.arange(breaks[-1] + 1 if len(breaks) else 0, len(positions))
    run = run[positions[run] > 0]                   # something must be in the cache before the first query
    if not len(run):
        raise ValueError("capture: expected a query at a later position than 0")
    known, later = run[:len(run) // 2], run[len(run) // 2:]
    return known, later[np.unique(np.linspace(0, len(later) - 1, min(queries, len(later))).astype(int))]


def _logits(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[q_heads, head_dim], [kv_heads, tokens, head_dim] -> [q_heads, tokens]."""
    heads = np.stack(np.split(query, len(keys)))
    return np.concatenate(heads @ keys.swapaxes(1, 2)) * query.shape[1] ** -0.5


def _attended(cache, seen: int, q_heads: int) -> np.ndarray:
    """[q_heads, seen] bool: the tokens that the last `attend` used."""
    chosen = np.ones((q_heads, seen), bool)
    if cache.index is None:
        return chosen
    start = min(cache.sinks, seen)
    stop = start + int(cache.tail.encoded(max(seen - cache.sinks, 0)))
    chosen[:, start:stop] = False
    if stop > start:
        indices, counts = (arrays.borrow(x, "selection").to_host()[0]
                           for x in (cache.last_selection.indices, cache.last_selection.counts))
        group = q_heads // len(counts)              # a selection is per query head or per KV head
        for head, (slots, count) in enumerate(zip(indices, counts)):
            chosen[head * group:(head + 1) * group, start + slots[:count]] = True
    return chosen


def _overlap(exact: np.ndarray, other: np.ndarray, count: int) -> float:
    best = [np.argpartition(-x, count - 1, axis=1)[:, :count] for x in (exact, other)]
    return float(np.mean([len(np.intersect1d(a, b)) / count for a, b in zip(*best)]))


def _share_of_heaviest(weights: np.ndarray, attended: np.ndarray) -> float:
    count = int(attended.sum())
    if count in (0, len(weights)):
        return 1.0
    return float(attended[np.argpartition(-weights, count - 1)[:count]].mean())
