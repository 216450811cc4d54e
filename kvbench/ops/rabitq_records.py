"""RaBitQ in the registry: problems, bytes, and what it means for a result to agree with the reference.

Operators: kvbench/ops/rabitq.py.
"""
from __future__ import annotations

import numpy as np

from kvbench.ops.attention import sparse_agreement
from kvbench.ops.dispatch import EPSILON, SMALLEST_NORMAL, assert_close, random_normal, relative_error
from kvbench.ops.rabitq import (BACKENDS, encode, quantize_query, quantized, score, scored, select_top_p,
                                sparse_attention)
from kvbench.ops.selection_records import BENCHMARK_P, MASS_ERROR, compare_lists, list_bytes, listed, spread
from kvbench.ops.turboquant_records import NEGLIGIBLE_NORM, less_mean, rotated, rotation_error
from kvbench.reference import attention as exact, planes as bit_planes, rabitq as reference, selection, turboquant
from kvbench.reference.rabitq import Encoded
from kvbench.reference.rotation import hadamard
from kvbench.registry import Kernel, Traffic, register

_DTYPES, _SIZES = ("float16", "bfloat16", "float32"), {"head_dim": (128, 64, 256), "kv_heads": (8, 2, 32)}
ENCODE_AXES = {"tokens": (32768, 4096, 131072, 128), **_SIZES, "batch": (1, 16), "dtype": _DTYPES}
QUERY_AXES = {**_SIZES, "group": (4, 8, 1), "batch": (1, 16), "query_bits": (4, 8), "dtype": _DTYPES}
SCORE_AXES = {"tokens": (131072, 32768, 4096), **_SIZES, "group": (4, 8, 1), "batch": (1, 16), "query_bits": (4, 8),
              "dtype": _DTYPES}
SELECT_AXES = {"tokens": SCORE_AXES["tokens"], "percent": (2, 10, 5), **SCORE_AXES}


def _keys_of(problem):
    return problem["batch"] * problem["kv_heads"] * problem["tokens"]


def _queries_of(problem):
    return problem["batch"] * problem["kv_heads"] * problem["group"]


def _size(problem):
    return 4 if problem["dtype"] == "float32" else 2


def _query(problem, rng):
    shape = (problem["batch"], problem["kv_heads"] * problem["group"], problem["head_dim"])
    return random_normal(rng, shape, problem["dtype"])


def _rotation(problem, rng):
    return hadamard(problem["head_dim"], int(rng.integers(2**31)))


def _encode_inputs(problem, rng):
    shape = (problem["batch"], problem["kv_heads"], problem["tokens"], problem["head_dim"])
    return {"keys": random_normal(rng, shape, problem["dtype"]), "rotation": _rotation(problem, rng)}


def _encode_traffic(problem):
    return Traffic(_keys_of(problem) * problem["head_dim"] * _size(problem),
                   _keys_of(problem) * (problem["head_dim"] // 8 + 2))


def _query_inputs(problem, rng):
    return {"query": _query(problem, rng), "rotation": _rotation(problem, rng), "query_bits": problem["query_bits"]}


def _query_traffic(problem):
    return Traffic(_queries_of(problem) * problem["head_dim"] * _size(problem),
                   _queries_of(problem) * (problem["head_dim"] + 8))


def _score_inputs(problem, rng):
    """Any codes, with scalars near those of normal keys, 1.25: no kernel's time depends on the codes."""
    shape = (problem["batch"], problem["kv_heads"], problem["tokens"])
    sign = rng.integers(0, 2**32, (*shape, problem["head_dim"] // 32), dtype=np.uint32)
    rescale = (1.25 + random_normal(rng, shape, "float32") / 16).astype(np.float16)
    encoded = Encoded(sign, rescale, None, None, None, problem["head_dim"])
    return {"query": _query(problem, rng), "encoded": encoded, "rotation": _rotation(problem, rng),
            "query_bits": problem["query_bits"]}


def _select_inputs(problem, rng):
    """Logits are spread so that about `percent` of the tokens have the mass, for each query head."""
    inputs = _score_inputs(problem, rng)
    query = inputs["query"].astype(np.float32) * np.float32(spread(problem["percent"]) / 1.25)
    return {**inputs, "query": query.astype(inputs["query"].dtype), "p": BENCHMARK_P}


def _attention_inputs(problem, rng):
    """The rows of the cache have nothing to do with the codes: what is selected does not hang on them."""
    inputs = _select_inputs(problem, rng)
    shape = (*inputs["encoded"].rescale.shape, problem["head_dim"])
    return {**inputs, **{name: random_normal(rng, shape, problem["dtype"]) for name in ("keys", "values")},
            "return_lse": True}


def _score_traffic(problem):
    return Traffic(_queries_of(problem) * problem["head_dim"] * _size(problem)
                   + _keys_of(problem) * (problem["head_dim"] // 8 + 2),
                   _keys_of(problem) * problem["group"] * 4)


def _select_traffic(problem):
    """No logit is written."""
    return Traffic(_score_traffic(problem).bytes_read, list_bytes(problem))


def _attention_traffic(problem):
    """No logit is written, and of the cache as many rows are read as are listed."""
    select, outputs = _select_traffic(problem), _queries_of(problem)
    return Traffic(select.bytes_read + listed(problem) * 2 * problem["head_dim"] * _size(problem),
                   select.bytes_written + outputs * (problem["head_dim"] * _size(problem) + 4))


# ---- agreement -------------------------------------------------------------------------------------------------------
#
# The rotation of a vector in float32 is off by at most `rotation_error` times its norm (see ops/rotation.py); sums of
# n terms by n EPSILON / 2 times the sum of their absolute values.

_HALF = EPSILON["float32"] / 2


def _encode_agreement(inputs, expected, actual):
    """A sign may differ where its coordinate is within ROUNDING_DISTANCE of 0, and nowhere else.

    r = |y|^2 / |y|_1 does not depend on signs.  Every coordinate is off by e = rotation error |y| at most, so |y|_1 by
    sqrt(D) |e|, where |y|_1 >= |y|; the two sums have D terms each.
    """
    keys, rotation = inputs["keys"], inputs["rotation"]
    key_mean, query_mean = inputs.get("key_mean"), inputs.get("query_mean")
    size, centred = rotation.head_dim, less_mean(keys, key_mean)
    for name in ("key_mean", "query_mean"):
        one, other = inputs.get(name), getattr(actual, name)
        if (one is None) != (other is None) or one is not None and not np.array_equal(one, other):
            raise AssertionError(f"{name}: expected the mean that was given")
    finite = np.isfinite(np.asarray(keys).astype(np.float64)).all(axis=-1)
    y = rotated(centred, rotation)
    norm = np.linalg.norm(y, axis=-1)
    negligible = (norm > 0) & (norm < NEGLIGIBLE_NORM)
    differs = bit_planes.unpack_bits(actual.sign, size) != bit_planes.unpack_bits(expected.sign, size)
    near = turboquant.boundary_distance(keys, rotation, 1, mean=key_mean) <= turboquant.ROUNDING_DISTANCE
    wrong = differs & ~near & ~negligible[..., None]
    if wrong.any():
        raise AssertionError(f"signs: {int(wrong.sum())} of {wrong.size} differ by more than rounding allows, the "
                             f"first at [batch, kv_head, token, coordinate] = {np.argwhere(wrong)[0].tolist()}")
    total = np.abs(y).sum(axis=-1)
    r = norm**2 / np.where(total == 0, 1.0, total)
    relative = (2 + size**0.5) * rotation_error(rotation) + (2 * size + 16) * _HALF
    limit = turboquant.LARGEST_SCALE
    assert_close(np.where(finite, np.minimum(r, limit), np.nan), actual.rescale, "float16",
                 relative * r + negligible * 2.0**-90, "rescale")
    if (expected.offset is None) != (actual.offset is None):
        raise AssertionError("offset: expected one if and only if there is a query mean")
    if expected.offset is not None:
        mean = np.asarray(query_mean).astype(np.float64)[..., None, :]
        a = np.where(finite, np.clip((centred * mean).sum(axis=-1), -limit, limit), np.nan)
        allowance = (size + 8) * _HALF * np.abs(np.where(finite[..., None], centred, 0) * mean).sum(axis=-1)
        if key_mean is not None:            # k - c_k rounds to half a unit of itself, or of the float32 that c_k is
            allowance += _HALF * np.abs(mean).sum(axis=-1) * np.abs(centred).max(axis=-1, initial=0, where=finite[
                ..., None])
        assert_close(a, actual.offset, "float16", allowance + size * SMALLEST_NORMAL * (1 + np.abs(mean).max(axis=-1)),
                     "offset")


def _query_errors(query, rotation, query_mean, query_bits, rounding, seed, step):
    """Of the queries: (the integers, e, flips): how far a rotated coordinate may be off, and how many codes may be one
    off, [batch, q_heads].

    t, whose rounding is the code, is off by 2 e / step for the two coordinates in its numerator, and by its own size
    times the relative error of 1 / (max - min): 15 (2 e / (15 step) + 3 units) for 4 bits; for 8 bits e / step and 127
    (e / (127 step) + 2 units).  4 e / step + 512 units is more than either, and than what the dither adds.
    """
    about = dict(query_mean=query_mean, query_bits=query_bits, rounding=rounding, seed=seed, step=step)
    with np.errstate(all="ignore"):
        code = quantized(query, rotation, **about)
        rotated = quantized(query, rotation, **{**about, "query_bits": 16, "rounding": "nearest"}).codes.astype(float)
        # Centring rounds each coordinate once more, and so does the reference when it gives float32.
        e = (rotation_error(rotation) + 2 * _HALF) * np.linalg.norm(rotated, axis=-1) + \
            rotation.head_dim * SMALLEST_NORMAL
        if query_bits == 16:
            return code, e, np.zeros(e.shape)
        delta = code.step.astype(np.float64)
        spread = np.where(delta > 0, delta, 1.0)
        low = code.low.astype(np.float64)
        t = (rotated - low[..., None]) / spread[..., None]
        if rounding == "random":
            t = t + reference.dither(t.shape, seed, step) - 0.5          # its floor is the nearest number to that
        distance = np.abs(t - np.floor(t) - 0.5)
        near = (distance <= (4 * e / spread)[..., None] + 512 * _HALF) | (delta == 0)[..., None]
    return code, e, near.sum(axis=-1) * (delta > 0)


def _query_agreement(inputs, expected, actual):
    """A code may be one off where its number before rounding is as close to a decision as rounding errors reach."""
    bits, rounding = inputs.get("query_bits", 4), inputs.get("rounding", "nearest")
    query, rotation = np.asarray(inputs["query"]), inputs["rotation"]
    code, e, flips = _query_errors(query, rotation, inputs.get("query_mean"), bits, rounding, inputs.get("seed", 0),
                                   inputs.get("step", 0))
    if actual.codes.dtype != expected.codes.dtype or actual.codes.shape != expected.codes.shape:
        raise AssertionError(f"codes: expected {expected.codes.dtype} {expected.codes.shape}, got {actual.codes.dtype} "
                             f"{actual.codes.shape}")
    usable = np.isfinite(code.step)
    negligible = usable & (code.step < rotation.head_dim * SMALLEST_NORMAL)     # a GPU may flush what codes are made of
    if bits == 16:
        assert_close(np.where(usable[..., None], expected.codes.astype(np.float64), 0), actual.codes, "float32",
                     np.where(usable, e, 0)[..., None], "rotated query")
    else:
        off = np.abs(actual.codes.astype(int) - expected.codes.astype(int))
        wrong = ((off > 1).any(axis=-1) | (off.sum(axis=-1) > flips)) & ~negligible
        if wrong.any():
            raise AssertionError(f"codes: those of {int(wrong.sum())} of {wrong.size} queries differ by more than "
                                 f"rounding allows, the first at [batch, q_head] = {np.argwhere(wrong)[0].tolist()}")
    levels = {4: 15, 8: 127, 16: np.inf}[bits]
    step = code.step.astype(np.float64)
    assert_close(step, actual.step, "float32", np.where(usable, 2 * e / levels + 4 * _HALF * step, 0), "step")
    assert_close(code.low.astype(np.float64), actual.low, "float32", np.where(usable & (bits == 4), e, 0), "low")


def _score_errors(inputs, expected):
    """How far logits, and sigma if there is one, may be from the expected ones.

    <S, codes> and <S, 1> are exact; what rounds is the query (its codes as in `quantize_query`), step and low, and
    every product and sum of what follows once, relative to the absolute values that it adds."""
    query, encoded, rotation = np.asarray(inputs["query"]), inputs["encoded"], inputs["rotation"]
    bits, rounding = inputs.get("query_bits", 4), inputs.get("rounding", "nearest")
    batch, q_heads, head_dim = query.shape
    kv_heads, tokens = encoded.rescale.shape[1:]
    size, scale = rotation.head_dim, inputs.get("scale")
    scale = head_dim**-0.5 if scale is None else scale

    def per_head(x):
        return np.abs(np.repeat(np.asarray(x).astype(np.float64), q_heads // kv_heads, axis=1))

    with np.errstate(all="ignore"):
        code, e, flips = _query_errors(query, rotation, encoded.query_mean, bits, rounding, inputs.get("seed", 0),
                                       inputs.get("step", 0))
        r, step, low = per_head(encoded.rescale), np.abs(code.step.astype(np.float64)), np.abs(code.low.astype(
            np.float64))
        if bits == 16:
            total = np.abs(code.codes.astype(np.float64)).sum(axis=-1)
            z = (size**0.5 * e + (size + 8) * _HALF * total)[..., None]
        else:
            levels = 15 if bits == 4 else 127
            products, ones = (np.abs(reference.sign_products(codes, encoded.sign))
                              for codes in (code.codes, np.ones_like(code.codes)))
            z = ((flips * step)[..., None] + (2 * e / levels + 4 * _HALF * step)[..., None] * products
                 + (e if bits == 4 else 0 * e)[..., None] * ones
                 + 8 * _HALF * (step[..., None] * products + low[..., None] * ones))
        heads = np.abs(query.astype(np.float64)).reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
        constant = np.zeros((batch, q_heads))
        if encoded.key_mean is not None:
            mean = np.broadcast_to(encoded.key_mean, (batch, kv_heads, head_dim)).astype(np.float64)
            constant = (heads * np.abs(mean)[:, :, None]).sum(axis=-1).reshape(batch, q_heads)
        offset = 0 if encoded.offset is None else per_head(encoded.offset)
        estimate = np.abs(np.asarray(expected.logits).astype(np.float64)) / max(abs(scale), 1e-300) if scale else 0
        allowance = abs(scale) * (r * z + (size + 8) * _HALF * constant[..., None]
                                  + 4 * _HALF * (offset + np.where(np.isfinite(estimate), estimate, 0)))
        allowance = np.where(np.isfinite(allowance), allowance, 0) + size * SMALLEST_NORMAL * (1 + np.nan_to_num(r))
    if expected.sigma is None:
        return allowance, None
    noise = np.asarray(expected.sigma).astype(np.float64)
    with np.errstate(all="ignore"):
        part = abs(scale) * size**0.5 * r * (2 * e / (15 if bits == 4 else 127) / 12**0.5)[..., None]
    off = (size + 32) * _HALF * np.nan_to_num(noise, posinf=0) + np.nan_to_num(part, posinf=0)
    return allowance, off + size * SMALLEST_NORMAL * (1 + np.nan_to_num(r))


def _score_agreement(inputs, expected, actual):
    allowance, off = _score_errors(inputs, expected)
    assert_close(expected.logits, actual.logits, "float32", allowance, "logits")
    if (expected.sigma is None) != (actual.sigma is None):
        raise AssertionError("sigma: expected only if it was asked for")
    if expected.sigma is not None:
        assert_close(np.asarray(expected.sigma).astype(np.float64), actual.sigma, "float32", off, "sigma")


def _select_agreement(inputs, expected, actual):
    """A token must be listed if logits that are off as far as they may be cannot leave it out, and may be if they can
    let it in; what the reference made is held to the same rule.

    Masses are computed as in `selection.select_top_p`, and each integer is off by half a unit of 2^-31.
    """
    options = {name: value for name, value in inputs.items() if name not in ("p", "min_tokens", "max_tokens")}
    scores = _score_reference(**options)
    errors, _ = _score_errors(options, scores)
    batch, q_heads, tokens = scores.logits.shape
    lists = inputs["encoded"].rescale.shape[1]
    sure, possible = np.zeros((2, batch, lists, tokens), bool)
    low, high = np.ones((2, batch, q_heads))
    for b, h in np.ndindex(batch, q_heads):
        candidates = np.flatnonzero(np.isfinite(scores.logits[b, h]))
        if not candidates.size:
            continue
        i = h // (q_heads // lists)
        certain, allowed, low[b, h], high[b, h] = _prefix_bounds(
            scores.logits[b, h, candidates].astype(np.float64), errors[b, h, candidates],
            selection.share(inputs["p"]) / 2**selection.SHARE_BITS, inputs.get("min_tokens", 1),
            inputs.get("max_tokens"))
        sure[b, i, candidates[certain]], possible[b, i, candidates[allowed]] = True, True
    for made in (expected, actual):
        compare_lists(made, sure, possible, low, high)


def _prefix_bounds(y, errors, share, least, most):
    """Of logits y +- errors: booleans, what is chosen in any case and what may be; least and largest share of mass."""
    count = len(y)
    most = count if most is None else min(most, count)
    errors = np.minimum(errors, 1e30)
    lower, upper = y - errors, y + errors
    light, heavy = np.exp(lower - upper.max()), np.exp(upper - upper.max())
    slack = MASS_ERROR + (count + 1) * 2.0**-31 / max(light.max(), 2.0**-31)

    def before(ends, own, ahead, others, ties):
        """How many others have `ends` above `own` (or equal, with `ties`), and what share they have if they weigh
        `ahead` and the rest weighs `others`."""
        order = np.argsort(-ends)
        n = np.searchsorted(-ends[order], -own, side="right" if ties else "left")
        sums, rests = (np.concatenate([[0.0], np.cumsum(x[order])]) for x in (ahead, others))
        itself = ends >= own if ties else ends > own
        inside = sums[n] - itself * ahead
        return n - itself, inside / (inside + rests[-1] - rests[n] + itself * others)

    def chosen(n, reached, goal):
        return (n < most) & ((share >= 1) | (reached < goal) | (n < least))

    with np.errstate(invalid="ignore"):          # nothing of nothing
        certain = chosen(*before(upper, lower, heavy, light, True), share - slack)
        allowed = chosen(*before(lower, upper, light, heavy, False), share + slack)

    def share_of(listed, ahead, others):
        inside = ahead[listed].sum()
        return inside / max(inside + others[~listed].sum(), 2.0**-1000)

    return certain, allowed, share_of(certain, light, heavy) - slack, share_of(allowed, heavy, light) + slack


def _score_reference(query, encoded, rotation, *, query_bits=4, rounding="nearest", seed=0, step=0, lengths=None,
                     scale=None, return_sigma=False):
    """`reference.score`, with means of [kv_heads, head_dim] too, and without sigma unless it is asked for."""
    shape = (*encoded.rescale.shape[:2], encoded.head_dim)
    means = (None if mean is None else np.broadcast_to(mean, shape) for mean in (encoded.key_mean, encoded.query_mean))
    encoded = Encoded(encoded.sign, encoded.rescale, encoded.offset, *means, encoded.head_dim)
    return scored(query, encoded, rotation, lengths=lengths, return_sigma=return_sigma, query_bits=query_bits,
                  rounding=rounding, seed=seed, step=step, scale=scale)


def _decoded_error(inputs, expected, actual):
    """Of r S: what the index holds of a key."""
    size = inputs["rotation"].head_dim
    one, other = ((1.0 - 2.0 * bit_planes.unpack_bits(code.sign, size)) * code.rescale[..., None].astype(np.float64)
                  for code in (expected, actual))
    return relative_error(one, other)


def _query_error(inputs, expected, actual):
    one, other = (code.step[..., None].astype(np.float64) * code.codes + code.low[..., None]
                  for code in (expected, actual))
    return relative_error(one, other)


def _score_error(inputs, expected, actual):
    return relative_error(expected.logits, actual.logits)


def _select_reference(query, encoded, rotation, p, *, query_bits=4, rounding="nearest", seed=0, step=0, lengths=None,
                      scale=None, min_tokens=1, max_tokens=None):
    """`scored`, `reference.selection.top_p` and the union over query heads."""
    scores = _score_reference(query, encoded, rotation, query_bits=query_bits, rounding=rounding, seed=seed, step=step,
                              lengths=lengths, scale=scale)
    made = selection.top_p(scores, p, lengths=lengths, min_tokens=min_tokens, max_tokens=max_tokens)
    return selection.union(made, encoded.rescale.shape[1])


def _attention_reference(query, encoded, rotation, p, keys, values, *, query_bits=4, rounding="nearest", seed=0, step=0,
                         lengths=None, first=0, leading=None, scale=None, min_tokens=1, max_tokens=None,
                         return_lse=True):
    """`_select_reference`, and `reference.attention.sparse_attention` to what it chooses."""
    made = _select_reference(query, encoded, rotation, p, query_bits=query_bits, rounding=rounding, seed=seed,
                             step=step, lengths=lengths, scale=scale, min_tokens=min_tokens, max_tokens=max_tokens)
    return (*_attended(made, query, keys, values, lengths, first, leading, scale), made)


def _attended(made, query, keys, values, lengths, first, leading, scale):
    return exact.sparse_attention(query, keys, values, made.indices, made.counts, lengths=lengths, first=first,
                                  leading=leading, scale=scale)


def _attention_agreement(inputs, expected, actual):
    """What is listed agrees as a selection does, and what is made of it with attention to just that list."""
    rows = {name: inputs.get(name) for name in ("query", "keys", "values", "lengths", "leading", "scale")}
    rows["first"] = inputs.get("first", 0)
    others = ("keys", "values", "first", "leading", "return_lse")
    _select_agreement({name: value for name, value in inputs.items() if name not in others}, expected[2], actual[2])
    output, lse, made = actual
    sparse_agreement({**rows, "indices": made.indices, "counts": made.counts}, _attended(made, **rows), (output, lse))


SOURCE = "arXiv 2405.12497 section 3"
register(Kernel(
    name="rabitq.encode", reference=reference.encode, operator=encode, backends=BACKENDS, axes=ENCODE_AXES,
    inputs=_encode_inputs, traffic=_encode_traffic, agreement=_encode_agreement, error=_decoded_error,
    source=f"{SOURCE}; arXiv 2606.31519"))
register(Kernel(
    name="rabitq.quantize_query", reference=quantized, operator=quantize_query, backends=BACKENDS, axes=QUERY_AXES,
    inputs=_query_inputs, traffic=_query_traffic, agreement=_query_agreement, error=_query_error,
    source=f"{SOURCE}.3.1"))
register(Kernel(
    name="rabitq.score", reference=_score_reference, operator=score, backends=BACKENDS, axes=SCORE_AXES,
    inputs=_score_inputs, traffic=_score_traffic, agreement=_score_agreement, error=_score_error,
    source=f"{SOURCE}.3.2; arXiv 2606.31519"))
register(Kernel(
    name="rabitq.select_top_p", reference=_select_reference, operator=select_top_p, backends=BACKENDS, axes=SELECT_AXES,
    inputs=_select_inputs, traffic=_select_traffic, agreement=_select_agreement,
    error=lambda inputs, expected, actual: relative_error(expected.mass, actual.mass),
    source=f"{SOURCE}.3.2; arXiv 2606.31519; Top-p: reference/selection.py"))
register(Kernel(
    name="rabitq.sparse_attention", reference=_attention_reference, operator=sparse_attention, backends=BACKENDS,
    axes=SELECT_AXES, inputs=_attention_inputs, traffic=_attention_traffic, agreement=_attention_agreement,
    error=lambda inputs, expected, actual: relative_error(expected[0], actual[0]),
    source="arXiv 2606.31519; Top-p: reference/selection.py; attention: reference/attention.py"))
