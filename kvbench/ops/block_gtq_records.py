"""Block-GTQ in the registry: problems, bytes, and what it means for a result to agree with the reference.

Operators: kvbench/ops/block_gtq.py.
"""
from __future__ import annotations

import numpy as np

from kvbench.ops import turboquant
from kvbench.ops.block_gtq import (BACKENDS, HOST_BACKENDS, allocate, calibrate, decode, decode_attention, encode,
                                   logits)
from kvbench.ops.dispatch import EPSILON, SMALLEST_NORMAL, assert_close, random_normal, relative_error
from kvbench.ops.turboquant_launch import CUDA_ATTENTION_BITS
from kvbench.ops.turboquant_records import (assert_codes, itemsize, less_mean, query_bytes, random_codes, random_query,
                                            random_tokens, scale_of_codes, tolerance_of_logits, vector_count)
from kvbench.reference import block_gtq as reference
from kvbench.reference.block_gtq import Calibration, Encoded, Plan
from kvbench.reference.rotation import hadamard
from kvbench.reference.turboquant import ROUNDING_DISTANCE
from kvbench.registry import Kernel, Traffic, register

_SIZES = {"tokens": (32768, 4096, 131072, 1), "head_dim": (128, 64, 256), "kv_heads": (8, 2, 32)}
_DTYPES = ("float16", "bfloat16", "float32")
_ALLOCATION = {"average_bits": (3, 2, 4), "tile": (16, 32), "scale_bits": (16, 8)}
_CODE_AXES = {**_SIZES, "batch": (1, 16), **_ALLOCATION, "dtype": _DTYPES}
_GROUP = {"group": (4, 8, 1)}


# ---- problems --------------------------------------------------------------------------------------------------------


def uneven_calibration(kv_heads: int, head_dim: int) -> Calibration:
    """Energies as uneven as those of real layers, some factors of four from block to block.  Not drawn: how long a row
    is follows from them, and is what `Traffic` counts."""
    query, key = 4.0 ** np.random.default_rng([kv_heads, head_dim]).normal(0, 1, (2, kv_heads, head_dim // 2))
    return Calibration(query, key, None, "half", head_dim)


def _plan(problem, seed) -> Plan:
    return reference.plan(uneven_calibration(problem["kv_heads"], problem["head_dim"]), problem["average_bits"],
                          tile=problem["tile"], seed=seed, scale_bits=problem["scale_bits"])


def random_keys(plan: Plan, shape: tuple[int, int, int], rng: np.random.Generator) -> Encoded:
    """Any codes of (batch, kv_heads, tokens) = shape, with scalars near 1; what a head has no use for is 0."""
    signs = rng.integers(0, 2, (*shape, plan.head_dim), np.uint8)
    magnitudes = rng.integers(0, 2 ** (plan.rates().astype(int) - 1)[:, None], signs.shape).astype(np.uint8)
    s = np.zeros((*shape, plan.scalars))
    for h, groups in enumerate(plan.groups):
        s[:, h, :, : len(groups)] = 1 + random_normal(rng, (shape[0], shape[2], len(groups)), "float32") / 16
    return Encoded(*reference.pack(signs, magnitudes, plan), reference.stored_scale(s, np.ones(shape, bool), plan))


def _shape(problem):
    return problem["batch"], problem["kv_heads"], problem["tokens"]


def _code_bytes(problem):
    return vector_count(problem) * round(_plan(problem, 0).bits_per_element * problem["head_dim"]) // 8


def _calibrate_inputs(problem, rng):
    query = random_normal(rng, (problem["batch"], problem["kv_heads"] * problem["group"], problem["tokens"],
                                problem["head_dim"]), problem["dtype"])
    return {"keys": random_tokens(problem, rng), "query": query, "pairing": "half", "centred": True}


def _calibrate_traffic(problem):
    vectors = vector_count(problem) * (1 + problem["group"]) * problem["head_dim"]
    written = problem["kv_heads"] * problem["head_dim"] * (8 + 4)          # two energies a pair, and the mean
    return Traffic(vectors * itemsize(problem), written)


def _allocate_inputs(problem, rng):
    scores = reference.score(uneven_calibration(problem["kv_heads"], problem["head_dim"]))
    return {"scores": scores, "average_bits": problem["average_bits"], "tile": problem["tile"]}


def _allocate_traffic(problem):
    blocks = problem["kv_heads"] * problem["head_dim"] // 2
    return Traffic(8 * blocks, blocks)


def _encode_inputs(problem, rng):
    return {"x": random_tokens(problem, rng), "plan": _plan(problem, int(rng.integers(2**31)))}


def _encode_traffic(problem):
    return Traffic(vector_count(problem) * problem["head_dim"] * itemsize(problem), _code_bytes(problem))


def _decode_inputs(problem, rng):
    plan = _plan(problem, int(rng.integers(2**31)))
    return {"encoded": random_keys(plan, _shape(problem), rng), "plan": plan, "dtype": problem["dtype"]}


def _decode_traffic(problem):
    return Traffic(_code_bytes(problem), vector_count(problem) * problem["head_dim"] * itemsize(problem))


def _decode_reference(encoded, plan, *, dtype="float16"):
    """`reference.decode`; float64 whatever the dtype."""
    return reference.decode(encoded, plan)


def _logits_inputs(problem, rng):
    plan = _plan(problem, int(rng.integers(2**31)))
    return {"query": random_query(problem, rng), "encoded": random_keys(plan, _shape(problem), rng), "plan": plan}


def _logits_traffic(problem):
    return Traffic(query_bytes(problem) + _code_bytes(problem), vector_count(problem) * problem["group"] * 4)


def _attention_inputs(problem, rng):
    plan = _plan(problem, int(rng.integers(2**31)))
    return {"query": random_query(problem, rng), "keys": random_keys(plan, _shape(problem), rng),
            "values": random_codes(problem, rng, problem["value_bits"]), "plan": plan,
            "value_rotation": hadamard(problem["head_dim"], int(rng.integers(2**31))), "return_lse": True}


def _attention_exact(inputs, dtype):
    return {"keys": decode(inputs["keys"], inputs["plan"], dtype=dtype),
            "values": turboquant.decode(inputs["values"], inputs["value_rotation"], dtype=dtype)}


def _attention_traffic(problem):
    rows = problem["batch"] * problem["kv_heads"] * problem["group"]
    values = vector_count(problem) * (problem["head_dim"] * problem["value_bits"] // 8 + 2)
    return Traffic(_code_bytes(problem) + values + query_bytes(problem), query_bytes(problem) + rows * 4)


# ---- agreement -------------------------------------------------------------------------------------------------------
#
# Every group is rotated by a dense matrix, in float32: off by at most (size + 2) EPSILON / 2 times its norm.


def _rotation_error(size):
    return (size + 2) * EPSILON["float32"] / 2


def _groups(plan):
    """(head, number of the group, group, its places in rate order)"""
    for h, groups in enumerate(plan.groups):
        for g, group in enumerate(groups):
            yield h, g, group, slice(group.start, group.start + group.size)


def _calibrate_agreement(inputs, expected, actual):
    """Sums of squares in float64 of float32 numbers, in any order: every term is positive.  A mean is rounded to
    float32 once, from sums of float64; the energy is that about the rounded mean, which moves it by its square."""
    vectors = max(np.asarray(inputs["keys"]).shape[2] * np.asarray(inputs["keys"]).shape[0], 1)
    if (expected.pairing, expected.rotary_dim) != (actual.pairing, actual.rotary_dim):
        raise AssertionError(f"expected {expected.pairing}, {expected.rotary_dim}, "
                             f"got {actual.pairing}, {actual.rotary_dim}")
    if (expected.mean is None) != (actual.mean is None):
        raise AssertionError(f"mean: expected {expected.mean}, got {actual.mean}")
    shift = 0.0
    if expected.mean is not None:
        size = np.abs(np.where(np.isfinite(k := np.asarray(inputs["keys"]).astype(np.float64)), k, 0)).max(initial=0)
        shift = 2.0**-24 * size                                    # two roundings of one number, and sums of float64
        assert_close(expected.mean.astype(np.float64), actual.mean, "float32", shift, "mean")
    for name, moved in (("query_energy", 0.0), ("key_energy", 2 * shift)):
        energy = getattr(expected, name)
        allowance = 8 * vectors * 2.0**-52 * energy + 2 * moved * np.sqrt(2 * energy) + 2 * moved**2
        difference = np.abs(getattr(actual, name) - energy)
        if getattr(actual, name).shape != energy.shape or not (difference <= allowance).all():
            raise AssertionError(f"{name}: off by up to {np.max(difference - allowance)} more than rounding allows")


def _allocate_agreement(inputs, expected, actual):
    if not np.array_equal(expected, actual):
        raise AssertionError(f"bits: {int(np.sum(expected != actual))} of {expected.size} differ")


def _encode_agreement(inputs, expected, actual):
    """As for TurboQuant, group by group.  A group that is tiny beside the largest coordinate of its vector is coded
    from what float32 leaves of it."""
    x, plan, mode = inputs["x"], inputs["plan"], inputs.get("scale_mode", "nc")
    difference = less_mean(x, inputs.get("mean"))
    finite = np.isfinite(difference).all(axis=-1)
    difference = np.where(finite[..., None], difference, 0.0)
    for name in ("sign", "magnitude", "scale"):
        if getattr(actual, name).shape != getattr(expected, name).shape:
            raise AssertionError(f"{name}: expected shape {getattr(expected, name).shape}, "
                                 f"got {getattr(actual, name).shape}")
    codes = [reference.unpack(e.sign, e.magnitude, plan) for e in (expected, actual)]
    again = reference.pack(*codes[1], plan)
    if (again[0] != actual.sign).any() or (again[1] != actual.magnitude).any():
        raise AssertionError("codes: bits are set that belong to no coordinate")
    cells = [np.where(signs != 0, -1 - magnitudes.astype(int), magnitudes) for signs, magnitudes in codes]
    near = reference.boundary_distance(x, plan, mean=inputs.get("mean")) <= ROUNDING_DISTANCE
    c = reference._centroids(actual, plan)
    scalars = np.where(finite[..., None], np.zeros(actual.scale.shape), np.nan)
    low, high = scalars.copy(), scalars.copy()
    largest = np.abs(difference).max(axis=-1)
    for h, g, group, places in _groups(plan):
        y = reference._rotated(difference[:, h], plan, h)[g]
        off = np.abs(cells[0] - cells[1])[:, h, :, places]
        negligible = assert_codes(off, near[:, h, :, places], np.linalg.norm(y, axis=-1), 2.0**-100 * largest[:, h])
        s, relative = scale_of_codes(y, c[:, h, :, places], finite[:, h], negligible, mode, _rotation_error(group.size))
        low[:, h, :, g] = np.maximum(s * (1 - relative) - negligible * 2.0**-90, 0)
        high[:, h, :, g] = s * (1 + relative) + negligible * 2.0**-90
    # Rounding to what is stored is monotonous: the stored number lies between those of both ends.
    ends = [reference.scale_of(reference.stored_scale(end, finite, plan), plan) for end in (low, high)]
    stored = reference.scale_of(actual.scale, plan)
    inside = np.where(np.isnan(ends[0]), np.isnan(stored), (stored >= ends[0]) & (stored <= ends[1]))
    if not inside.all():
        at = tuple(int(i) for i in np.argwhere(~inside)[0])
        raise AssertionError(f"scale: {int((~inside).sum())} of {inside.size} differ, the first at {list(at)}: "
                             f"expected {ends[0][at]!r} to {ends[1][at]!r}, got {stored[at]!r}")


def _decode_agreement(inputs, expected, actual):
    """The rotation's error, and one rounding each of the centroid, of the scalar and of the product with it."""
    encoded, plan = inputs["encoded"], inputs["plan"]
    s, c = reference.scale_of(encoded.scale, plan), reference._centroids(encoded, plan)
    allowance = np.zeros(c.shape)
    for h, g, group, places in _groups(plan):
        norm = np.linalg.norm(c[:, h, :, places], axis=-1) * s[:, h, :, g]
        error = (_rotation_error(group.size) + 4 * EPSILON["float32"] / 2) * norm + group.size * SMALLEST_NORMAL
        allowance[:, h, :, plan.order[h, places]] = error
    assert_close(expected, actual, inputs.get("dtype", "float16"), allowance, "decoded")


def _key_errors(query, encoded, plan, scale):
    """(logits, how far float32 may be off), [batch, kv_heads, group, tokens]: an error of the folded query in every
    group, |dq'_g| |c_g|, that of a sum of size products, and the rounding of the scalar and of sums over groups."""
    rows = reference.folded_query(query, plan, scale)
    s, c = reference.scale_of(encoded.scale, plan), reference._centroids(encoded, plan)
    base = np.zeros((*rows.shape[:3], c.shape[2]))
    error = np.zeros(base.shape)
    for h, g, group, places in _groups(plan):
        q, v = rows[:, h, :, places], c[:, h, :, places]
        products, absolute = q @ np.swapaxes(v, -1, -2), np.abs(q) @ np.swapaxes(np.abs(v), -1, -2)
        one = _rotation_error(group.size) * np.linalg.norm(q, axis=-1)[..., None] * np.linalg.norm(v, axis=-1)[:, None]
        one += (group.size + len(plan.groups[h]) + 10) * EPSILON["float32"] / 2 * absolute
        base[:, h] += s[:, h, None, :, g] * products
        error[:, h] += np.abs(s[:, h, None, :, g]) * one
    return base, error


def _half_operand_errors(query, encoded, plan, scale):
    """How far logits may be off, [batch, kv_heads, group, tokens], where tensor cores take the operands of a product
    in float16: a folded query is multiplied by a power of two that brings its largest coordinate into 2 to 4, so that
    rounding moves a coordinate by 2^-11 of itself or, where it is subnormal, by 2^-25, 2^-26 of the largest; centroids
    are those of float16, whatever comes of it.  Products of such numbers are exact, sums are float32."""
    rows = reference.folded_query(query, plan, scale)
    s, c = reference.scale_of(encoded.scale, plan), reference._centroids(encoded, plan)
    stored = c.astype(np.float16).astype(np.float64)
    floor = 2.0**-26 * np.abs(rows).max(axis=-1, keepdims=True)
    error = np.zeros((*rows.shape[:3], c.shape[2]))
    for h, g, group, places in _groups(plan):
        q, v = rows[:, h, :, places], np.swapaxes(c[:, h, :, places], -1, -2)
        w = np.swapaxes(stored[:, h, :, places], -1, -2)
        moved = np.maximum(EPSILON["float16"] / 2 * np.abs(q), floor[:, h])
        error[:, h] += np.abs(s[:, h, None, :, g]) * (np.abs(q @ (w - v)) + moved @ np.abs(w))
    return error


def _logits_agreement(inputs, expected, actual):
    plan = inputs["plan"]
    _, error = _key_errors(inputs["query"], inputs["encoded"], plan, inputs.get("scale"))
    assert_close(expected, actual, "float32", error.reshape(expected.shape) + plan.head_dim * SMALLEST_NORMAL, "logits")


def _attention_agreement(inputs, expected, actual):
    query, plan = np.asarray(inputs["query"]).astype(np.float64), inputs["plan"]
    scale = plan.head_dim**-0.5 if inputs.get("scale") is None else inputs["scale"]
    tokens = inputs["keys"].scale.shape[2]
    lengths = np.full(len(query), tokens) if inputs.get("lengths") is None else inputs["lengths"]
    with np.errstate(invalid="ignore", over="ignore"):
        base, error = _key_errors(query, inputs["keys"], plan, scale)
        if inputs["values"].bits in CUDA_ATTENTION_BITS:
            error += _half_operand_errors(query, inputs["keys"], plan, scale)
        output, lse = tolerance_of_logits(lambda b, g, n: (base[b, g, :, :n], error[b, g, :, :n]), query,
                                          inputs["values"], inputs["value_rotation"], lengths, scale,
                                          inputs.get("key_mean"))
    assert_close(expected[0], actual[0], np.asarray(actual[0]).dtype.name, output, "output")
    assert_close(expected[1], actual[1], "float32", lse, "log-sum-exp")


def _calibration_error(inputs, expected, actual):
    return relative_error(expected.key_energy, actual.key_energy)


def _decoded_error(inputs, expected, actual):
    return relative_error(reference.decode(expected, inputs["plan"]), reference.decode(actual, inputs["plan"]))


def _relative_error(inputs, expected, actual):
    return relative_error(expected, actual)


SOURCE = "arXiv 2606.24033"
register(Kernel(
    name="block_gtq.calibrate", reference=reference.calibrate, operator=calibrate, backends=HOST_BACKENDS,
    axes={**_SIZES, **_GROUP, "batch": (1, 16), "dtype": _DTYPES}, inputs=_calibrate_inputs,
    traffic=_calibrate_traffic, agreement=_calibrate_agreement, error=_calibration_error, source=SOURCE))
register(Kernel(
    name="block_gtq.allocate", reference=reference.allocate, operator=allocate, backends=HOST_BACKENDS,
    axes={name: values for name, values in {**_SIZES, **_ALLOCATION}.items() if name not in ("tokens", "scale_bits")},
    inputs=_allocate_inputs, traffic=_allocate_traffic, agreement=_allocate_agreement, error=_relative_error,
    source=f"{SOURCE} Theorem 1"))
register(Kernel(
    name="block_gtq.encode", reference=reference.encode, operator=encode, backends=BACKENDS, axes=_CODE_AXES,
    inputs=_encode_inputs, traffic=_encode_traffic, agreement=_encode_agreement, error=_decoded_error,
    source=f"{SOURCE}; arXiv 2504.19874 Algorithm 1"))
register(Kernel(
    name="block_gtq.decode", reference=_decode_reference, operator=decode, backends=BACKENDS, axes=_CODE_AXES,
    inputs=_decode_inputs, traffic=_decode_traffic, agreement=_decode_agreement, error=_relative_error, source=SOURCE))
register(Kernel(
    name="block_gtq.logits", reference=reference.logits, operator=logits, backends=BACKENDS,
    axes={**_CODE_AXES, **_GROUP}, inputs=_logits_inputs, traffic=_logits_traffic, agreement=_logits_agreement,
    error=_relative_error, source=SOURCE))
register(Kernel(
    name="block_gtq.decode_attention", reference=reference.decode_attention, operator=decode_attention,
    backends=BACKENDS, axes={**_CODE_AXES, **_GROUP, "value_bits": (3, 2, 4, 1)}, inputs=_attention_inputs,
    traffic=_attention_traffic, agreement=_attention_agreement,
    error=lambda inputs, expected, actual: relative_error(expected[0], actual[0]),
    source=f"{SOURCE}; arXiv 1805.02867 section 3.1", exact=_attention_exact))
