"""TurboQuant in the registry: problems, bytes, and what it means for a result to agree with the reference.

Operators: kvbench/ops/turboquant.py.
"""
from __future__ import annotations

import math

import numpy as np

from kvbench.ops.dispatch import EPSILON, SMALLEST_NORMAL, assert_close, random_normal, relative_error
from kvbench.ops.turboquant import (BACKENDS, HOST_BACKENDS, decode, decode_attention, encode, encode_prod, logits,
                                    logits_prod)
from kvbench.ops.turboquant_launch import CUDA_ATTENTION_BITS, key_centroids
from kvbench.reference import planes as bit_planes, turboquant as reference
from kvbench.reference.planes import Planes
from kvbench.reference.rotation import hadamard
from kvbench.reference.turboquant import Encoded, EncodedProd, codebook_for, orthogonal_projection
from kvbench.registry import Kernel, Traffic, register

_SIZES = {"tokens": (32768, 4096, 131072, 1), "head_dim": (128, 64, 256), "kv_heads": (8, 2, 32)}
_CODE_BITS, _DTYPES = (3, 2, 4, 1), ("float16", "bfloat16", "float32")
ENCODE_AXES = {**_SIZES, "batch": (1, 16), "bits": _CODE_BITS, "dtype": _DTYPES}
LOGITS_AXES = {**_SIZES, "group": (4, 8, 1), "batch": (1, 16), "bits": _CODE_BITS, "dtype": _DTYPES}
ATTENTION_AXES = {**_SIZES, "group": (4, 8, 1), "batch": (1, 16), "key_bits": _CODE_BITS, "value_bits": _CODE_BITS,
                  "dtype": _DTYPES}


def vector_count(problem):
    return problem["batch"] * problem["kv_heads"] * problem["tokens"]


def itemsize(problem):
    return 4 if problem["dtype"] == "float32" else 2


def _code_bytes(problem, bits):
    return vector_count(problem) * (problem["head_dim"] * bits // 8 + 2)


def _rotation(problem, rng):
    return hadamard(problem["head_dim"], int(rng.integers(2**31)))


def random_tokens(problem, rng):
    shape = (problem["batch"], problem["kv_heads"], problem["tokens"], problem["head_dim"])
    return random_normal(rng, shape, problem["dtype"])


def random_query(problem, rng):
    shape = (problem["batch"], problem["kv_heads"] * problem["group"], problem["head_dim"])
    return random_normal(rng, shape, problem["dtype"])


def random_codes(problem, rng, bits):
    """Any codes, with scales near 1, as those of normal numbers have: no kernel's time depends on the codes."""
    shape = (problem["batch"], problem["kv_heads"], problem["tokens"])
    planes = {name: rng.integers(0, 2**32, (*shape, count), dtype=np.uint32)
              for name, count in bit_planes.words(bits, problem["head_dim"]).items()}
    return Encoded(Planes.of(planes), (1 + random_normal(rng, shape, "float32") / 16).astype(np.float16),
                   problem["head_dim"])


def _encode_inputs(problem, rng):
    return {"x": random_tokens(problem, rng), "rotation": _rotation(problem, rng), "bits": problem["bits"]}


def _encode_traffic(problem):
    reads = vector_count(problem) * problem["head_dim"] * itemsize(problem)
    return Traffic(reads, _code_bytes(problem, problem["bits"]))


def _decode_inputs(problem, rng):
    return {"encoded": random_codes(problem, rng, problem["bits"]), "rotation": _rotation(problem, rng),
            "dtype": problem["dtype"]}


def _decode_traffic(problem):
    written = vector_count(problem) * problem["head_dim"] * itemsize(problem)
    return Traffic(_code_bytes(problem, problem["bits"]), written)


def _decode_reference(encoded, rotation, *, dtype="float16"):
    """`reference.decode`; float64 whatever the dtype."""
    return reference.decode(encoded, rotation)


def _logits_inputs(problem, rng):
    return {"query": random_query(problem, rng), "encoded": random_codes(problem, rng, problem["bits"]),
            "rotation": _rotation(problem, rng)}


def query_bytes(problem):
    return problem["batch"] * problem["kv_heads"] * problem["group"] * problem["head_dim"] * itemsize(problem)


def _logits_traffic(problem):
    return Traffic(query_bytes(problem) + _code_bytes(problem, problem["bits"]),
                   vector_count(problem) * problem["group"] * 4)


def _attention_inputs(problem, rng):
    return {"query": random_query(problem, rng), "keys": random_codes(problem, rng, problem["key_bits"]),
            "values": random_codes(problem, rng, problem["value_bits"]), "key_rotation": _rotation(problem, rng),
            "value_rotation": _rotation(problem, rng), "return_lse": True}


def _attention_traffic(problem):
    rows = problem["batch"] * problem["kv_heads"] * problem["group"]
    codes = _code_bytes(problem, problem["key_bits"]) + _code_bytes(problem, problem["value_bits"])
    return Traffic(codes + query_bytes(problem), query_bytes(problem) + rows * 4)


def _attention_exact(inputs, dtype):
    return {side: decode(inputs[side], inputs[f"{name}_rotation"], dtype=dtype)
            for side, name in (("keys", "key"), ("values", "value"))}


def _encode_prod_inputs(problem, rng):
    projection = orthogonal_projection(problem["head_dim"], int(rng.integers(2**31)))
    return {"x": random_tokens(problem, rng), "rotation": _rotation(problem, rng), "projection": projection,
            "bits": problem["bits"]}


def _encode_prod_traffic(problem):
    reads = vector_count(problem) * problem["head_dim"] * itemsize(problem)
    scalars = vector_count(problem) * (2 if problem["bits"] > 1 else 0)
    return Traffic(reads, _code_bytes(problem, problem["bits"]) + scalars)


def _logits_prod_inputs(problem, rng):
    projection = orthogonal_projection(problem["head_dim"], int(rng.integers(2**31)))
    residual = random_codes(problem, rng, 1)
    first = random_codes(problem, rng, problem["bits"] - 1) if problem["bits"] > 1 else None
    encoded = EncodedProd(first, residual.planes.sign, residual.scale, problem["head_dim"])
    return {"query": random_query(problem, rng), "encoded": encoded, "rotation": _rotation(problem, rng),
            "projection": projection}


def _logits_prod_traffic(problem):
    plain = _logits_traffic(problem)
    return Traffic(plain.bytes_read + vector_count(problem) * (2 if problem["bits"] > 1 else 0), plain.bytes_written)


# Agreement.  The rotation of a vector in float32 is off by at most `rotation_error` times its norm (see
# ops/rotation.py); sums of n terms, one after another, by n EPSILON / 2 times the sum of their absolute values.

# The coordinates of a vector below this norm may be float32 subnormals, which GPUs may count as zero: its scale rounds
# to 0 in float16, and what its codes are does not matter.
NEGLIGIBLE_NORM = 2.0**-100


def rotation_error(rotation):
    levels = rotation.rounds * math.log2(rotation.head_dim) if rotation.kind == "hadamard" else rotation.head_dim
    return (levels + 2) * EPSILON["float32"] / 2


def _centroids(planes, size, bits):
    return codebook_for(bits, size).reconstruct(*bit_planes.unpack(planes, size))


def _cells(planes, size):
    """Number of each coordinate's cell, from the most negative one on: neighbouring cells differ by 1."""
    signs, magnitudes = bit_planes.unpack(planes, size)
    return np.where(signs != 0, -1 - magnitudes.astype(int), magnitudes)


def less_mean(x, mean):
    """x - mean in float64."""
    x = np.asarray(x).astype(np.float64)
    return x if mean is None else x - np.asarray(mean).astype(np.float64)[..., None, :]


def rotated(x, rotation):
    """R x of the padded vectors; zeros for those that hold NaN or Inf."""
    finite = np.isfinite(x).all(axis=-1)
    padding = [(0, 0)] * 3 + [(0, rotation.head_dim - x.shape[-1])]
    return reference.rotate(np.pad(np.where(finite[..., None], x, 0.0), padding), rotation)


def _assert_same_codes(inputs, bits, expected, actual, scale_mode):
    """Returns which tokens have the same codes.

    A code may be one cell off where its coordinate is within ROUNDING_DISTANCE of a decision.  The scale is that of the
    codes that are there, computed in float32: the norm and the sums over codes have D terms, relative to which all are
    positive (but for coordinates next to 0, which weigh nothing).
    """
    x, rotation, mean = inputs["x"], inputs["rotation"], inputs.get("mean")
    size, centred = rotation.head_dim, less_mean(x, mean)
    if actual.head_dim != expected.head_dim or actual.planes.arrays().keys() != expected.planes.arrays().keys():
        raise AssertionError(f"codes: expected {expected.bits} bits and head_dim {expected.head_dim}, "
                             f"got {actual.bits} and {actual.head_dim}")
    finite = np.isfinite(centred).all(axis=-1)
    off = np.abs(_cells(actual.planes, size) - _cells(expected.planes, size))
    allowed = reference.boundary_distance(x, rotation, bits, mean=mean) <= reference.ROUNDING_DISTANCE
    y, c = rotated(centred, rotation), _centroids(actual.planes, size, bits)
    negligible = assert_codes(off, allowed, np.linalg.norm(y, axis=-1))
    s, relative = scale_of_codes(y, c, finite, negligible, scale_mode, rotation_error(rotation))
    assert_close(s, actual.scale, "float16", relative * s + negligible * 2.0**-90, "scale")
    return (off == 0).all(axis=-1)


def assert_codes(off, allowed, norm, coarse=0.0):
    """Codes `off` [..., D] cells apart may be so by one where `allowed`, or where a vector of that `norm` [...] is
    negligible: below NEGLIGIBLE_NORM, or below `coarse`.  Returns which are."""
    negligible = (norm > 0) & (norm < np.maximum(NEGLIGIBLE_NORM, coarse))
    wrong = (off > allowed) & ~negligible[..., None]
    if wrong.any():
        raise AssertionError(f"codes: {int(wrong.sum())} of {wrong.size} differ by more than rounding allows, the "
                             f"first at [batch, kv_head, token, coordinate] = {np.argwhere(wrong)[0].tolist()}")
    return negligible


def scale_of_codes(y, c, finite, negligible, scale_mode, rotation_error):
    """(s of the rotated vectors y [..., D] and their codes c, how far float32 is from it relative to s)."""
    size, n = y.shape[-1], np.linalg.norm(y, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        w = (y * c).mean(axis=-1) * size**0.5 / n
        e = (c * c).mean(axis=-1)
        s = n * size**-0.5 * {"plain": 1.0, "nc": e**-0.5, "mse": w / e, "unbiased": 1 / w}[scale_mode]
    s = np.where(finite, np.minimum(np.where((n == 0) | negligible, 0.0, s), reference.LARGEST_SCALE), np.nan)
    return s, 2 * rotation_error + (2 * size + 16) * EPSILON["float32"] / 2


def _encode_agreement(inputs, expected, actual):
    _assert_same_codes(inputs, inputs["bits"], expected, actual, inputs.get("scale_mode", "nc"))


def _encode_prod_agreement(inputs, expected, actual):
    """Another code is another residual, whose signs are then not looked at; |residual| is off by no more than the
    rotated vector, up to its rounding."""
    x, rotation, projection, bits = (inputs[name] for name in ("x", "rotation", "projection", "bits"))
    mean, size = inputs.get("mean"), rotation.head_dim
    centred = less_mean(x, mean)
    finite, y = np.isfinite(centred).all(axis=-1), rotated(centred, rotation)
    norm = np.linalg.norm(y, axis=-1)
    same = np.ones(y.shape[:-1], bool)
    residual = y
    if bits > 1:
        same = _assert_same_codes(inputs, bits - 1, expected.first, actual.first, "plain")
        residual = y - (norm * size**-0.5)[..., None] * _centroids(actual.first.planes, size, bits - 1)
    distance = reference.residual_distance(x, rotation, projection, bits, mean=mean)
    differs = (bit_planes.unpack_bits(np.asarray(actual.residual_sign), size)
               != bit_planes.unpack_bits(expected.residual_sign, size))
    wrong = differs & (distance > reference.ROUNDING_DISTANCE) & same[..., None]
    if wrong.any():
        raise AssertionError(f"residual signs: {int(wrong.sum())} of {wrong.size} differ by more than rounding allows, "
                             f"the first at [batch, kv_head, token, coordinate] = {np.argwhere(wrong)[0].tolist()}")
    length = np.where(finite, np.minimum(np.linalg.norm(residual, axis=-1), reference.LARGEST_SCALE), np.nan)
    relative = 2 * rotation_error(rotation) + (2 * size + 16) * EPSILON["float32"] / 2
    assert_close(length, actual.residual_norm, "float16", relative * norm, "residual norm")


def _decode_agreement(inputs, expected, actual):
    """The rotation's error, and one rounding each of the centroid, the product with s and the remaining scale."""
    encoded, rotation = inputs["encoded"], inputs["rotation"]
    size = rotation.head_dim
    norm = np.linalg.norm(_centroids(encoded.planes, size, encoded.bits), axis=-1) * encoded.scale.astype(np.float64)
    relative = rotation_error(rotation) + 3 * EPSILON["float32"] / 2
    allowance = relative * norm + size * SMALLEST_NORMAL
    assert_close(expected, actual, inputs.get("dtype", "float16"), allowance[..., None], "decoded")


def _logits_allowance(query, scale, rotation, products, scales):
    """Of the logits [batch, q_heads, tokens] of one side: products(rows [batch, kv_heads, group, D]) gives, of vectors
    v_t, (sum_j |row_j v_tj|, |v_t|) before their scales, [batch, kv_heads, tokens]."""
    query = np.asarray(query).astype(np.float64)
    batch, kv_heads, tokens = scales.shape
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    padded = np.pad(scale * query, [(0, 0), (0, 0), (0, rotation.head_dim - query.shape[-1])])
    rows = reference.rotate(padded, rotation).reshape(batch, kv_heads, -1, rotation.head_dim)
    absolute, norms = products(np.abs(rows))
    length = np.linalg.norm(rows, axis=-1)[..., None]
    error = rotation_error(rotation) * length * norms[:, :, None]
    error += (rotation.head_dim + 8) * EPSILON["float32"] / 2 * absolute
    return (error * np.abs(scales.astype(np.float64))[:, :, None]).reshape(batch, query.shape[1], tokens)


def _logits_agreement(inputs, expected, actual):
    """An error of the rotated query, |dq| |c|, and that of a sum of D products."""
    encoded, rotation = inputs["encoded"], inputs["rotation"]
    c = np.abs(_centroids(encoded.planes, rotation.head_dim, encoded.bits))
    allowance = _logits_allowance(
        inputs["query"], inputs.get("scale"), rotation,
        lambda rows: (rows @ np.swapaxes(c, -1, -2), np.linalg.norm(c, axis=-1)), encoded.scale)
    assert_close(expected, actual, "float32", allowance + rotation.head_dim * SMALLEST_NORMAL, "logits")


def _logits_prod_agreement(inputs, expected, actual):
    """As for `logits`, with the vectors s c and k |r| S^T h; S has norm `length` at most, and its product D terms."""
    encoded, rotation, projection = inputs["encoded"], inputs["rotation"], inputs["projection"]
    size, tokens = rotation.head_dim, encoded.residual_norm.shape
    first = np.zeros((*tokens, size))
    if encoded.first is not None:
        first = np.abs(_centroids(encoded.first.planes, size, encoded.first.bits)
                       * encoded.first.scale[..., None].astype(np.float64))
    factor = projection.unbiasing * encoded.residual_norm.astype(np.float64)
    columns = np.abs(projection.matrix).sum(axis=0)                     # of S^T h, whatever the signs
    length = np.linalg.norm(projection.matrix, 2) * size**0.5

    def products(rows):
        absolute = rows @ np.swapaxes(first, -1, -2) + (rows @ columns)[..., None] * factor[:, :, None]
        return 2 * absolute, np.linalg.norm(first, axis=-1) + length * factor

    allowance = _logits_allowance(inputs["query"], inputs.get("scale"), rotation, products, np.ones(tokens))
    assert_close(expected, actual, "float32", allowance + size * SMALLEST_NORMAL, "logits")


def attention_tolerance(query, keys: Encoded, values: Encoded, key_rotation, value_rotation, lengths=None, scale=None,
                        key_mean=None) -> tuple[np.ndarray, np.ndarray]:
    """(output allowance [batch, q_heads, head_dim], lse allowance [batch, q_heads]) of decode attention on codes.

    A logit, s <q', c> with q' = scale R q, is off by at most delta, which is s times the sum of

        |<q', T - c>|                      `key_centroids` T in place of c: this is known, not estimated
        |q'|_max / 16256 / 2 sum |T|       q' rounded to whole multiples of |q'|_max / 16256
        float32 errors                     those of `logits`

    (cpu has the last one alone).  So a weight p_t is off by a factor within e^(+-delta_t), and the output by
    sum_t p_t (e^delta_t - 1) |v_t - output| e^(max delta).  To this add, in the order of the code below: weights p s
    rounded to float16, relative to sum_t p_t |v_t|; those below its normal range, to 2^-33 of the largest; float16
    centroids of values; float32 sums over tokens, as in `attention.decode_tolerance`; the rotation back.  What is
    estimated in rotated coordinates bounds every coordinate by its norm.
    """
    query = np.asarray(query).astype(np.float64)
    batch, q_heads, head_dim = query.shape
    kv_heads, tokens = keys.scale.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    key_size = key_rotation.head_dim
    padded = np.pad(query, [(0, 0), (0, 0), (0, key_size - head_dim)])
    rows = reference.rotate(scale * padded, key_rotation).reshape(batch, kv_heads, -1, key_size)
    lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    eps = EPSILON["float32"] / 2

    def key_errors(b, g, n):
        q = rows[b, g]
        c, s = _tokens_of(keys, key_size, b, g, n)
        products = q @ c.T
        error = rotation_error(key_rotation) * np.linalg.norm(q, axis=-1)[:, None] * np.linalg.norm(c, axis=-1)
        error += (key_size + 8) * eps * (np.abs(q) @ np.abs(c).T)
        if keys.bits in CUDA_ATTENTION_BITS:
            numbers, unit = key_centroids(keys.bits)
            stored = unit * (numbers + 0.5)
            table = np.sign(c) * stored[np.searchsorted(codebook_for(keys.bits, key_size).boundaries, np.abs(c))]
            rounding = np.abs(q).max(axis=-1, keepdims=True) / 16256 / 2
            error += np.abs(q @ table.T - products) + rounding * np.abs(table).sum(axis=-1)
        return s * products, np.abs(s) * error

    return tolerance_of_logits(key_errors, query, values, value_rotation, lengths, scale, key_mean)


def tolerance_of_logits(key_errors, query, values: Encoded, value_rotation, lengths, scale, key_mean):
    """As `attention_tolerance`, for keys of any kind: key_errors(b, g, n) gives the logits of the first n keys of one
    head, and how far they may be off, each [group, n]."""
    batch, q_heads, head_dim = query.shape
    kv_heads, value_size = values.scale.shape[1], value_rotation.head_dim
    group = q_heads // kv_heads
    eps = EPSILON["float32"] / 2
    rotation_back = value_rotation.dense()
    output, lse = np.zeros((batch, kv_heads, group, head_dim)), np.zeros((batch, kv_heads, group))
    for b in range(batch):
        n = int(lengths[b])
        arithmetic = (8 + math.log2(n + 1) + min(n, 1024) + n / 16) * eps
        for g in range(kv_heads if n else 0):
            base, delta = key_errors(b, g, n)
            largest = base.max(axis=-1, keepdims=True)
            p = np.exp(base - largest)
            p /= p.sum(axis=-1, keepdims=True)
            change = p * np.expm1(delta)
            c, s = _tokens_of(values, value_size, b, g, n)
            v = ((s[:, None] * c) @ rotation_back)[:, :head_dim]
            for h in range(group):
                allowance = change[h] @ np.abs(v - p[h] @ v) * np.exp(delta[h].max())
                allowance += 2.0**-11 * (p[h] @ np.abs(v))
                weights = p[h] * s
                tiny = 2.0**-33 * (p[h] * (np.abs(s) + 2.0**-20)).max() + SMALLEST_NORMAL * (1 + np.abs(s).max())
                allowance += tiny * np.linalg.norm(np.abs(c).sum(axis=0))
                allowance += np.linalg.norm(weights @ (c.astype(np.float16) - c)) * np.exp(delta[h].max())
                allowance += 2 * arithmetic * np.linalg.norm(np.abs(weights) @ np.abs(c))
                allowance += rotation_error(value_rotation) * np.linalg.norm(weights @ c) + 2 * SMALLEST_NORMAL
                output[b, g, h] = allowance
            lse[b, g] = change.sum(axis=-1) + arithmetic + 16 * 2 * eps * (
                np.abs(base).max(axis=-1) + math.log(n + 1) + 1)
    if key_mean is not None:
        mean = np.broadcast_to(np.asarray(key_mean).astype(np.float64), (batch, kv_heads, head_dim))
        grouped = np.abs(query).reshape(batch, kv_heads, -1, head_dim)
        lse += (head_dim + 8) * eps * abs(scale) * np.einsum("bghd,bgd->bgh", grouped, np.abs(mean))
    return output.reshape(batch, q_heads, head_dim), lse.reshape(batch, q_heads)


def _tokens_of(encoded, size, b, g, n):
    """(c [n, size], s [n]) float64 of the first n tokens of one head."""
    planes = Planes.of({name: plane[b, g, :n] for name, plane in encoded.planes.arrays().items()})
    return _centroids(planes, size, encoded.bits), encoded.scale[b, g, :n].astype(np.float64)


def _attention_agreement(inputs, expected, actual):
    with np.errstate(invalid="ignore", over="ignore"):
        output, lse = attention_tolerance(**{name: inputs.get(name) for name in (
            "query", "keys", "values", "key_rotation", "value_rotation", "lengths", "scale", "key_mean")})
    assert_close(expected[0], actual[0], np.asarray(actual[0]).dtype.name, output, "output")
    assert_close(expected[1], actual[1], "float32", lse, "log-sum-exp")


def _decoded_error(inputs, expected, actual):
    rotation = inputs["rotation"]
    return relative_error(reference.decode(expected, rotation), reference.decode(actual, rotation))


def _decoded_prod_error(inputs, expected, actual):
    how = inputs["rotation"], inputs["projection"]
    return relative_error(reference.decode_prod(expected, *how), reference.decode_prod(actual, *how))


SOURCE = "arXiv 2504.19874 Algorithm 1"
register(Kernel(
    name="turboquant.encode", reference=reference.encode, operator=encode, backends=BACKENDS, axes=ENCODE_AXES,
    inputs=_encode_inputs, traffic=_encode_traffic, agreement=_encode_agreement, error=_decoded_error,
    source=f"{SOURCE}; arXiv 2604.18555"))
register(Kernel(
    name="turboquant.decode", reference=_decode_reference, operator=decode, backends=BACKENDS, axes=ENCODE_AXES,
    inputs=_decode_inputs, traffic=_decode_traffic, agreement=_decode_agreement,
    error=lambda inputs, expected, actual: relative_error(expected, actual), source=SOURCE))
register(Kernel(
    name="turboquant.logits", reference=reference.logits, operator=logits, backends=BACKENDS, axes=LOGITS_AXES,
    inputs=_logits_inputs, traffic=_logits_traffic, agreement=_logits_agreement,
    error=lambda inputs, expected, actual: relative_error(expected, actual), source=SOURCE))
register(Kernel(
    name="turboquant.decode_attention", reference=reference.decode_attention, operator=decode_attention,
    backends=BACKENDS, axes=ATTENTION_AXES, inputs=_attention_inputs, traffic=_attention_traffic,
    agreement=_attention_agreement, error=lambda inputs, expected, actual: relative_error(expected[0], actual[0]),
    source=f"{SOURCE}; arXiv 1805.02867 section 3.1", exact=_attention_exact))
register(Kernel(
    name="turboquant.encode_prod", reference=reference.encode_prod, operator=encode_prod, backends=HOST_BACKENDS,
    axes=ENCODE_AXES, inputs=_encode_prod_inputs, traffic=_encode_prod_traffic, agreement=_encode_prod_agreement,
    error=_decoded_prod_error, source="arXiv 2504.19874 Algorithm 2"))
register(Kernel(
    name="turboquant.logits_prod", reference=reference.logits_prod, operator=logits_prod, backends=HOST_BACKENDS,
    axes=LOGITS_AXES, inputs=_logits_prod_inputs, traffic=_logits_prod_traffic, agreement=_logits_prod_agreement,
    error=lambda inputs, expected, actual: relative_error(expected, actual), source="arXiv 2504.19874 Theorem 2"))
