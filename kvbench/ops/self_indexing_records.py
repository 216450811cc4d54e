"""Self-Indexing in the registry: problems, bytes, and what it means for a result to agree with the reference.

Operators: kvbench/ops/self_indexing.py.
"""
from __future__ import annotations

import numpy as np

from kvbench.ops.attention import decode_tolerance
from kvbench.ops.dispatch import EPSILON, SMALLEST_NORMAL, assert_close, random_normal, relative_error
from kvbench.ops.selection_records import MASS_ERROR, compare_lists
from kvbench.ops.self_indexing import (BACKENDS, HOST_BACKENDS, build_codebook, build_tables, encode, score,
                                       select_top_k, sparse_attention_packed)
from kvbench.reference import kivi
from kvbench.reference import self_indexing as reference
from kvbench.reference.self_indexing import CODES, GROUP, SUBVECTOR, Encoded
from kvbench.registry import Kernel, Traffic, register

_SIZES = {"tokens": (32768, 4096, 131072, 1), "head_dim": (128, 64, 256), "kv_heads": (8, 2, 32)}
_DTYPES = ("float16", "bfloat16", "float32")
KEY_AXES = {**_SIZES, "batch": (1, 16), "dtype": _DTYPES}
QUERY_AXES = {"head_dim": (128, 64, 256), "kv_heads": (8, 2, 32), "group": (4, 8, 1), "batch": (1, 16),
              "tables": ("mean", "each"), "dtype": _DTYPES}
SCORE_AXES = {**_SIZES, **QUERY_AXES}
SELECT_AXES = {"selected": (96, 160), **{axis: sizes for axis, sizes in SCORE_AXES.items() if axis != "tables"}}
ATTENTION_AXES = {**_SIZES, "group": (4, 8, 1), "batch": (1, 16), "selected": (96, 2394, 9766), "exact": (192, 64),
                  "value_bits": (2, 4), "dtype": _DTYPES}
_SOURCE = "arXiv 2603.14224"


def _vectors(problem):
    return problem["batch"] * problem["kv_heads"] * problem["tokens"]


def _size(problem):
    return 4 if problem["dtype"] == "float32" else 2


def _shape(problem, *more):
    return (problem["batch"], problem["kv_heads"], *more)


def _random_keys(problem, rng):
    return random_normal(rng, _shape(problem, problem["tokens"], problem["head_dim"]), problem["dtype"])


def _random_query(problem, rng):
    return random_normal(rng, (problem["batch"], problem["kv_heads"] * problem["group"], problem["head_dim"]),
                         problem["dtype"])


def _random_mean(problem, rng):
    return random_normal(rng, _shape(problem, problem["head_dim"]), "float32") / np.float32(4)


def _random_scale(problem, rng):
    """About the largest of normal numbers."""
    return 4 + random_normal(rng, _shape(problem, problem["head_dim"]), "float32") / np.float32(16)


def _random_words(problem, rng, words):
    return rng.integers(0, 2**32, _shape(problem, problem["tokens"], words), dtype=np.uint32)


def _random_codebook(problem, rng):
    return random_normal(rng, _shape(problem, problem["head_dim"] // SUBVECTOR, CODES, SUBVECTOR), "float32")


def _random_values(problem, rng, bits):
    """Any codes, with scales and minima near those of normal numbers."""
    return _random_rows(problem, rng, bits, 4 / (2**bits - 1), -2, 1 / 16)


def _random_magnitudes(problem, rng):
    """Likewise, of 2 bits and divided by 4."""
    return _random_rows(problem, rng, 2, 0.2, 0.06, 1 / 128)


def _random_rows(problem, rng, bits, scale, minimum, spread):
    shape = _shape(problem, problem["tokens"], problem["head_dim"] // GROUP)
    parameters = [(centre + np.float32(spread) * random_normal(rng, shape, "float32")).astype(np.float16)
                  for centre in (scale, minimum)]
    return kivi.Values(_random_words(problem, rng, problem["head_dim"] * bits // 32), *parameters, bits, GROUP)


def _encode_inputs(problem, rng):
    return {"x": _random_keys(problem, rng), "mean": _random_mean(problem, rng),
            "channel_scale": _random_scale(problem, rng)}


def _encode_traffic(problem):
    fixed = 2 * problem["batch"] * problem["kv_heads"] * problem["head_dim"] * 4
    return Traffic(_vectors(problem) * problem["head_dim"] * _size(problem) + fixed,
                   _vectors(problem) * problem["head_dim"] // 2)


def _codebook_inputs(problem, rng):
    return {"keys": _random_keys(problem, rng), "mean": _random_mean(problem, rng)}


def _codebook_bytes(problem):
    return problem["batch"] * problem["kv_heads"] * problem["head_dim"] * CODES * 4


def _codebook_traffic(problem):
    mean = problem["batch"] * problem["kv_heads"] * problem["head_dim"] * 4
    return Traffic(_vectors(problem) * problem["head_dim"] * _size(problem) + mean, _codebook_bytes(problem))


def _tables_inputs(problem, rng):
    return {"query": _random_query(problem, rng), "codebook": _random_codebook(problem, rng),
            "heads": problem["tables"]}


def _query_bytes(problem):
    return problem["batch"] * problem["kv_heads"] * problem["group"] * problem["head_dim"] * _size(problem)


def _tables_of(problem):
    return problem["batch"] * problem["kv_heads"] * (1 if problem["tables"] == "mean" else problem["group"])


def _tables_traffic(problem):
    return Traffic(_query_bytes(problem) + _codebook_bytes(problem),
                   _tables_of(problem) * problem["head_dim"] // SUBVECTOR * CODES * 4)


def _score_inputs(problem, rng):
    return {**_tables_inputs(problem, rng), "sign": _random_words(problem, rng, problem["head_dim"] // 32)}


def _score_traffic(problem):
    return Traffic(_query_bytes(problem) + _codebook_bytes(problem) + _vectors(problem) * problem["head_dim"] // 8,
                   _tables_of(problem) * problem["tokens"] * 4)


def _select_inputs(problem, rng):
    inputs = _score_inputs(problem | {"tables": "mean"}, rng)
    del inputs["heads"]
    return {**inputs, "k": _chosen(problem)}


def _select_traffic(problem):
    """No score is written."""
    read = _score_traffic(problem | {"tables": "mean"}).bytes_read
    return Traffic(read, 4 * problem["batch"] * problem["kv_heads"] * (_chosen(problem) + 2))


def _chosen(problem):
    """Not all of a few."""
    return max(min(problem["selected"], problem["tokens"] // 2), 1)


def _selected(problem):
    return min(problem["selected"], problem["tokens"])


def _attention_inputs(problem, rng):
    """Every tokens / selected-th token, as any selection would scatter them."""
    keys = Encoded(_random_words(problem, rng, problem["head_dim"] // 32), _random_magnitudes(problem, rng))
    selected = _selected(problem)
    indices = np.broadcast_to(np.arange(selected) * problem["tokens"] // selected, _shape(problem, selected))
    exact = _shape(problem, problem["exact"], problem["head_dim"])
    return {"query": _random_query(problem, rng), "keys": keys,
            "values": _random_values(problem, rng, problem["value_bits"]),
            "channel_scale": _random_scale(problem, rng), "indices": np.ascontiguousarray(indices, np.int32),
            "counts": np.full(_shape(problem), selected, np.int32), "mean": _random_mean(problem, rng),
            "exact_keys": random_normal(rng, exact, problem["dtype"]),
            "exact_values": random_normal(rng, exact, problem["dtype"]), "return_lse": True}


def _attention_traffic(problem):
    """What the store holds of tokens that are not selected need not move."""
    heads, head_dim = problem["batch"] * problem["kv_heads"], problem["head_dim"]
    token = head_dim * (5 + problem["value_bits"]) // 8
    exact = 2 * problem["exact"] * head_dim * _size(problem)
    fixed = 8 * head_dim + 4
    return Traffic(heads * (_selected(problem) * (token + 4) + exact + fixed) + _query_bytes(problem),
                   _query_bytes(problem) + heads * problem["group"] * 4)


# Agreement.  Sums of n float32 terms, one after another, are off by at most n EPSILON / 2 times the sum of their
# absolute values.


def _encode_agreement(inputs, expected, actual):
    """Bit for bit.  A sign may differ where a subnormal float32 counts as zero; the magnitude of such a channel rounds
    to 0 in float16 (reference/self_indexing.py)."""
    with np.errstate(all="ignore"):
        x = np.asarray(inputs["x"]).astype(np.float32)
        mean = np.asarray(inputs["mean"])[:, :, None]
        parts = np.broadcast_arrays(x, mean, x - mean)
    tiny = np.any([(part != 0) & (np.abs(part) < 2 * SMALLEST_NORMAL) for part in parts], axis=0)
    wrong = (reference.unpack_signs(actual.sign) != reference.unpack_signs(expected.sign)) & ~tiny
    for name, differs in (("sign", wrong), *((name, np.asarray(array).view(np.uint8) != one.view(np.uint8))
                                             for (name, one), array in zip(expected.magnitude.arrays().items(),
                                                                           actual.magnitude.arrays().values()))):
        if differs.any():
            raise AssertionError(f"{name}: {int(differs.sum())} of {differs.size} differ, the first at "
                                 f"{np.argwhere(differs)[0].tolist()}")


def _codebook_agreement(inputs, expected, actual):
    """float64 means, in any order, rounded to float32 on both sides."""
    keys = np.asarray(inputs["keys"]).astype(np.float64)
    tokens = keys.shape[2]
    finite = np.where(np.isfinite(keys), np.abs(keys), 0).max(axis=(2, 3), initial=0)
    largest = finite + np.abs(np.asarray(inputs["mean"], np.float64)).max(axis=-1)
    order = tokens * 2.0**-52 * largest[:, :, None, None, None]
    assert_close(expected, actual, "float32", order + EPSILON["float32"] / 2 * np.abs(expected) + SMALLEST_NORMAL,
                 "codebook")


def _absolute_tables(inputs):
    """sum |C_i| |q_i| of every entry, with the mean of |q_h| for the mean query."""
    query, codebook = np.asarray(inputs["query"]).astype(np.float64), np.asarray(inputs["codebook"])
    return reference.build_tables(np.abs(query), np.abs(codebook), heads=inputs.get("heads", "mean"),
                                  scale=abs(inputs.get("scale", 1.0)))


def _table_error(inputs):
    """Relative to sum |C_i| |q_i|: the sum over heads, its factor, four products and their sum."""
    group = np.shape(inputs["query"])[1] // np.shape(inputs["codebook"])[1]
    return (group + SUBVECTOR + 4) * EPSILON["float32"] / 2


def _tables_agreement(inputs, expected, actual):
    assert_close(expected, actual, "float32", _table_error(inputs) * _absolute_tables(inputs) + 8 * SMALLEST_NORMAL,
                 "tables")


def _score_error(inputs):
    """[batch, kv_heads or q_heads, tokens]: errors of the tables, and of a sum of D / 4 entries."""
    tables, code = _absolute_tables(inputs), reference.codes(np.asarray(inputs["sign"]))
    groups, own = tables.shape[2], tables.shape[1] // code.shape[1]
    absolute = np.zeros((*tables.shape[:2], code.shape[2]))
    for b, h in np.ndindex(tables.shape[:2]):
        absolute[b, h] = tables[b, h][np.arange(groups), code[b, h // own]].sum(axis=-1)
    return (_table_error(inputs) + groups * EPSILON["float32"] / 2) * absolute + 8 * groups * SMALLEST_NORMAL


def _score_agreement(inputs, expected, actual):
    assert_close(expected, actual, "float32", _score_error(inputs), "scores")


def _select_agreement(inputs, expected, actual):
    """What is chosen lies between the first k by scores that are off as far as they may be, to either side."""
    scores = reference.score(**{name: value for name, value in inputs.items() if name != "k"})
    errors, k = _score_error(inputs), inputs["k"]
    sure, possible = np.zeros((2, *scores.shape), bool)
    low, high = np.ones((2, *scores.shape[:2]))
    for b, h in np.ndindex(scores.shape[:2]):
        candidates = np.flatnonzero(np.isfinite(scores[b, h]))
        y, error, chosen = scores[b, h, candidates], errors[b, h, candidates], min(k, len(candidates))
        # Above the next one's upper bound a token must be chosen; below the last one's lower bound it must not.
        upper, lower = np.sort(y + error)[::-1], np.sort(y - error)[::-1]
        sure[b, h, candidates] = (y - error > upper[chosen]) if chosen < len(y) else True
        possible[b, h, candidates] = (y + error >= lower[chosen - 1]) if chosen else False
        if 0 < chosen < len(y):
            weights = np.exp(y - y.max())
            share = np.sort(weights)[::-1][:chosen].sum() / weights.sum()
            off = np.expm1(4 * error.max()) + MASS_ERROR + (len(y) + 1) * 2.0**-31 / share
            low[b, h], high[b, h] = share * (1 - off), share * (1 + off)
        elif chosen == 0 < len(y):
            low[b, h] = high[b, h] = 0
    for made in (expected, actual):
        compare_lists(made, sure, possible, low, high, np.minimum(k, np.isfinite(scores).sum(axis=-1)))
        _check_ties(np.asarray(inputs["sign"]), np.asarray(made.indices), np.asarray(made.counts))


def _check_ties(sign, indices, counts):
    """Tokens with the same signs have the same score, on any machine: the first of them go first."""
    for b, h in np.ndindex(counts.shape):
        chosen = np.zeros(sign.shape[2], bool)
        chosen[indices[b, h, : counts[b, h]]] = True
        code = np.unique(sign[b, h], axis=0, return_inverse=True)[1].reshape(-1)
        order = np.argsort(code, kind="stable")
        skipped = (code[order[:-1]] == code[order[1:]]) & ~chosen[order[:-1]] & chosen[order[1:]]
        if skipped.any():
            later = order[1:][skipped][0]
            raise AssertionError(f"list {b, h}: token {later} is chosen, but not an earlier one with the same signs")


def _attention_agreement(inputs, expected, actual):
    """As exact attention in float32 with keys [k_hat', mu] or [k, 0] for a query [q, q]: those are the products that
    are added up, with room for the rounding of alpha q and of a_hat.  A value is rounded relative to s c + |m|."""
    query = np.asarray(inputs["query"]).astype(np.float64)
    batch, q_heads, head_dim = query.shape
    keys, values = inputs["keys"], inputs["values"]
    kv_heads, tokens = keys.sign.shape[1:3]
    group, scale = q_heads // kv_heads, inputs.get("scale")
    scale = head_dim**-0.5 if scale is None else scale
    with np.errstate(invalid="ignore"):
        held = reference.decode(keys, inputs["channel_scale"])
        sizes = kivi._per_number(values, values.scale) * kivi.unpack(values.codes, values.bits) + np.abs(
            kivi._per_number(values, values.minimum))
    mean = np.zeros((batch, kv_heads, head_dim)) if inputs.get("mean") is None else inputs["mean"]
    lengths = np.full(batch, tokens) if inputs.get("lengths") is None else np.clip(inputs["lengths"], 0, tokens)
    stored = np.asarray(actual[0]).dtype.name
    for b, h in np.ndindex(batch, kv_heads):
        chosen = np.arange(tokens)
        if inputs.get("indices") is not None:
            chosen = inputs["indices"][b, h, : max(int(inputs["counts"][b, h]), 0)]
        chosen = chosen[(chosen >= 0) & (chosen < lengths[b])]
        own_keys = np.concatenate([held[b, h, chosen], np.broadcast_to(mean[b, h], (len(chosen), head_dim))], axis=1)
        own_values = sizes[b, h, chosen]
        if inputs.get("exact_keys") is not None:
            exact = [np.asarray(inputs[name])[b, h].astype(np.float64) for name in ("exact_keys", "exact_values")]
            number = len(exact[0]) if inputs.get("exact_lengths") is None else int(
                np.clip(inputs["exact_lengths"][b], 0, len(exact[0])))
            own_keys = np.concatenate([own_keys, np.pad(exact[0][:number], [(0, 0), (0, head_dim)])])
            own_values = np.concatenate([own_values, exact[1][:number]])
        heads = slice(h * group, (h + 1) * group)
        twice = np.concatenate([query[b : b + 1, heads]] * 2, axis=2)
        own_values = np.pad(own_values, [(0, 0), (0, head_dim)])
        output, lse = decode_tolerance(twice, own_keys[None, None], own_values[None, None], None, scale, "float32")
        assert_close(expected[0][b, heads], np.asarray(actual[0])[b, heads], stored, output[0, :, :head_dim], "output")
        assert_close(expected[1][b, heads], np.asarray(actual[1])[b, heads], "float32", lse[0], "log-sum-exp")


def _encode_error(inputs, expected, actual):
    scale = inputs["channel_scale"]
    return relative_error(reference.decode(expected, scale), reference.decode(actual, scale))


def _first_error(inputs, expected, actual):
    return relative_error(expected[0], actual[0])


def _finite_error(inputs, expected, actual):
    finite = np.isfinite(expected)
    return relative_error(np.where(finite, expected, 0), np.where(finite, actual, 0))


register(Kernel(
    name="self_indexing.encode", reference=reference.encode, operator=encode, backends=BACKENDS, axes=KEY_AXES,
    inputs=_encode_inputs, traffic=_encode_traffic, agreement=_encode_agreement, error=_encode_error, source=_SOURCE))
register(Kernel(
    name="self_indexing.build_codebook", reference=reference.build_codebook, operator=build_codebook,
    backends=HOST_BACKENDS, axes=KEY_AXES, inputs=_codebook_inputs, traffic=_codebook_traffic,
    agreement=_codebook_agreement, error=lambda inputs, expected, actual: relative_error(expected, actual),
    source=_SOURCE))
register(Kernel(
    name="self_indexing.build_tables", reference=reference.build_tables, operator=build_tables, backends=BACKENDS,
    axes=QUERY_AXES, inputs=_tables_inputs, traffic=_tables_traffic, agreement=_tables_agreement,
    error=lambda inputs, expected, actual: relative_error(expected, actual), source=_SOURCE))
register(Kernel(
    name="self_indexing.score", reference=reference.score, operator=score, backends=BACKENDS, axes=SCORE_AXES,
    inputs=_score_inputs, traffic=_score_traffic, agreement=_score_agreement, error=_finite_error, source=_SOURCE))
register(Kernel(
    name="self_indexing.select_top_k", reference=reference.select_top_k, operator=select_top_k, backends=BACKENDS,
    axes=SELECT_AXES, inputs=_select_inputs, traffic=_select_traffic, agreement=_select_agreement,
    error=lambda inputs, expected, actual: relative_error(expected.mass, actual.mass),
    source=f"{_SOURCE}; Top-k: reference/selection.py"))
register(Kernel(
    name="self_indexing.sparse_attention_packed", reference=reference.sparse_attention_packed,
    operator=sparse_attention_packed, backends=BACKENDS, axes=ATTENTION_AXES, inputs=_attention_inputs,
    traffic=_attention_traffic, agreement=_attention_agreement, error=_first_error,
    source=f"{_SOURCE}; split and merge: arXiv 1805.02867 section 3.1"))
