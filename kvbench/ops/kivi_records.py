"""KIVI in the registry: problems, bytes, and what it means for a result to agree with the reference.

Operators: kvbench/ops/kivi.py.
"""
from __future__ import annotations

import math

import numpy as np

from kvbench.ops.dispatch import EPSILON, SMALLEST_NORMAL, assert_close, random_normal, relative_error
from kvbench.ops.kivi import BACKENDS, decode, decode_attention, encode_keys, encode_values, logits
from kvbench.reference import kivi as reference
from kvbench.reference.kivi import Keys, Values
from kvbench.registry import Kernel, Traffic, register

# group_size: numbers that share a scale; of values at most head_dim.  Keys come in whole groups: tokens are rounded up.
_SIZES = {"tokens": (32768, 4096, 131072, 1), "head_dim": (128, 64, 256), "kv_heads": (8, 2, 32)}
_BITS, _GROUPS, _DTYPES = (2, 4), (32, 64, 128), ("float16", "bfloat16", "float32")
ENCODE_AXES = {**_SIZES, "batch": (1, 16), "bits": _BITS, "group_size": _GROUPS, "dtype": _DTYPES}
DECODE_AXES = {**ENCODE_AXES, "side": ("keys", "values")}
LOGITS_AXES = {**_SIZES, "group": (4, 8, 1), "batch": (1, 16), "bits": _BITS, "group_size": _GROUPS, "dtype": _DTYPES}
ATTENTION_AXES = {**_SIZES, "group": (4, 8, 1), "batch": (1, 16), "key_bits": _BITS, "value_bits": _BITS,
                  "group_size": _GROUPS, "dtype": _DTYPES}


def _whole_groups(problem):
    return -(-problem["tokens"] // problem["group_size"]) * problem["group_size"]


def _value_group(problem):
    return min(problem["group_size"], problem["head_dim"])


def _size(problem):
    return 4 if problem["dtype"] == "float32" else 2


def _numbers(problem, tokens):
    return problem["batch"] * problem["kv_heads"] * tokens * problem["head_dim"]


def _code_bytes(problem, tokens, bits, group):
    numbers = _numbers(problem, tokens)
    return numbers * bits // 8 + numbers // group * 4


def _random_tokens(problem, rng, tokens):
    shape = (problem["batch"], problem["kv_heads"], tokens, problem["head_dim"])
    return random_normal(rng, shape, problem["dtype"])


def _random_query(problem, rng):
    shape = (problem["batch"], problem["kv_heads"] * problem["group"], problem["head_dim"])
    return random_normal(rng, shape, problem["dtype"])


def _random_codes(problem, rng, kind, bits, group):
    """Any codes, with s and m as normal numbers have them: no kernel's time depends on the codes."""
    tokens, head_dim = _whole_groups(problem), problem["head_dim"]
    shape = (problem["batch"], problem["kv_heads"])
    codes = rng.integers(0, 2**32, (*shape, tokens, head_dim * bits // 32), dtype=np.uint32)
    rows = (tokens // group, head_dim) if kind is Keys else (tokens, head_dim // group)
    low, high = (sign * 2 + random_normal(rng, (*shape, *rows), "float32") / 4 for sign in (-1, 1))
    return kind(codes, ((high - low) / (2**bits - 1)).astype(np.float16), low.astype(np.float16), bits, group)


def _encode_keys_inputs(problem, rng):
    return {"x": _random_tokens(problem, rng, _whole_groups(problem)), "bits": problem["bits"],
            "group": problem["group_size"]}


def _encode_keys_traffic(problem):
    tokens = _whole_groups(problem)
    return Traffic(_numbers(problem, tokens) * _size(problem),
                   _code_bytes(problem, tokens, problem["bits"], problem["group_size"]))


def _encode_values_inputs(problem, rng):
    return {"x": _random_tokens(problem, rng, problem["tokens"]), "bits": problem["bits"],
            "group": _value_group(problem)}


def _encode_values_traffic(problem):
    tokens = problem["tokens"]
    return Traffic(_numbers(problem, tokens) * _size(problem),
                   _code_bytes(problem, tokens, problem["bits"], _value_group(problem)))


def _decode_group(problem):
    return problem["group_size"] if problem["side"] == "keys" else _value_group(problem)


def _decode_inputs(problem, rng):
    kind = Keys if problem["side"] == "keys" else Values
    return {"encoded": _random_codes(problem, rng, kind, problem["bits"], _decode_group(problem)),
            "dtype": problem["dtype"]}


def _decode_traffic(problem):
    tokens = _whole_groups(problem)
    return Traffic(_code_bytes(problem, tokens, problem["bits"], _decode_group(problem)),
                   _numbers(problem, tokens) * _size(problem))


def _decode_reference(encoded, *, dtype="float16"):
    """`reference.decode`; float64 whatever the dtype."""
    return reference.decode(encoded)


def _query_bytes(problem):
    return problem["batch"] * problem["kv_heads"] * problem["group"] * problem["head_dim"] * _size(problem)


def _logits_inputs(problem, rng):
    return {"query": _random_query(problem, rng),
            "keys": _random_codes(problem, rng, Keys, problem["bits"], problem["group_size"])}


def _logits_traffic(problem):
    tokens = _whole_groups(problem)
    return Traffic(_query_bytes(problem) + _code_bytes(problem, tokens, problem["bits"], problem["group_size"]),
                   problem["batch"] * problem["kv_heads"] * problem["group"] * tokens * 4)


def _attention_inputs(problem, rng):
    return {"query": _random_query(problem, rng),
            "keys": _random_codes(problem, rng, Keys, problem["key_bits"], problem["group_size"]),
            "values": _random_codes(problem, rng, Values, problem["value_bits"], _value_group(problem)),
            "return_lse": True}


def _attention_exact(inputs, dtype):
    """The cache that the codes stand for."""
    return {side: decode(inputs[side], dtype=dtype) for side in ("keys", "values")}


def _attention_traffic(problem):
    tokens, rows = _whole_groups(problem), problem["batch"] * problem["kv_heads"] * problem["group"]
    codes = (_code_bytes(problem, tokens, problem["key_bits"], problem["group_size"])
             + _code_bytes(problem, tokens, problem["value_bits"], _value_group(problem)))
    return Traffic(codes + _query_bytes(problem), _query_bytes(problem) + rows * 4)


# Agreement.


def _encode_agreement(inputs, expected, actual):
    """Every bit: the reference says why no allowance is needed."""
    if (type(actual), actual.bits, actual.group) != (type(expected), expected.bits, expected.group):
        raise AssertionError(f"expected {type(expected).__name__} of {expected.bits} bits in groups of "
                             f"{expected.group}, got {type(actual).__name__} of {actual.bits} in {actual.group}")
    for name, wanted in expected.arrays().items():
        array = np.asarray(actual.arrays()[name])
        if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
            raise AssertionError(f"{name}: expected {wanted.dtype} {wanted.shape}, got {array.dtype} {array.shape}")
        kind = np.dtype(f"u{wanted.itemsize}")
        wrong = np.argwhere(array.view(kind) != np.ascontiguousarray(wanted).view(kind))
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(f"{name}: {len(wrong)} of {wanted.size} differ, the first at {list(at)}: expected "
                                 f"{wanted[at]!r}, got {array[at]!r}")


def _decode_agreement(inputs, expected, actual):
    """s c is exact in float32, the sum is rounded once."""
    allowance = EPSILON["float32"] / 2 * np.abs(expected)
    assert_close(expected, actual, inputs.get("dtype", "float16"), allowance, "decoded")


def _of_head(encoded, b, g, n):
    """(s, c, m) of the first n tokens of one head, float64 [n, head_dim] each."""
    codes = reference.unpack(np.asarray(encoded.codes)[b, g, :n], encoded.bits).astype(np.float64)
    scale, minimum = (np.asarray(x)[b, g].astype(np.float64) for x in (encoded.scale, encoded.minimum))
    if isinstance(encoded, Keys):
        s, m = (np.repeat(x[: -(-n // encoded.group)], encoded.group, axis=0)[:n] for x in (scale, minimum))
    else:
        s, m = (np.repeat(x[:n], encoded.group, axis=1) for x in (scale, minimum))
    return s, codes, m


def _heads(query, keys, scale):
    """scale q, [batch, kv_heads, heads, head_dim] float64."""
    query = np.asarray(query).astype(np.float64)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (scale * query).reshape(len(query), np.shape(keys.codes)[1], -1, query.shape[-1])


def _logits_agreement(inputs, expected, actual):
    """A float32 sum of head_dim products of |q| and what s c + m rounds from."""
    keys, rows = inputs["keys"], _heads(inputs["query"], inputs["keys"], inputs.get("scale"))
    batch, kv_heads, tokens = keys.codes.shape[:3]
    allowance = np.zeros((*rows.shape[:3], tokens))
    for b in range(batch):
        for g in range(kv_heads):
            s, c, m = _of_head(keys, b, g, tokens)
            allowance[b, g] = np.abs(rows[b, g]) @ (s * c + np.abs(m)).T
    allowance *= (keys.head_dim + 8) * EPSILON["float32"] / 2
    assert_close(expected, actual, "float32", allowance.reshape(expected.shape) + keys.head_dim * SMALLEST_NORMAL,
                 "logits")


# Of cuda_src/kivi.cu: the largest weight of a head is 2^LEAST_GAP or more where it is rounded to float16, less where
# scales of values are 2^LARGE_SCALE or more.
LEAST_GAP, LARGE_SCALE = 7, 4


def attention_tolerance(query, keys: Keys, values: Values, lengths=None, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """(output allowance [batch, q_heads, head_dim], lse allowance [batch, q_heads]) of decode attention on codes.

    q is scale times the query, u a power of two of at most 2 max |q|.  A logit, sum_d q_d s_d c_d + q_d m_d, is off by
    at most delta, the sum over d of

        |q s c| 2^-11       q s rounded to float16; once more if the query itself is not of that type, then also |q m|
        u 2^-17 (1 + s) c   the same below the normal range: an error of 2^-25 in units of u, at a code that stands up
                            to 2^8 times higher than one that is not shifted
        u 2^-25 |m|         likewise, not shifted
        float32 errors      (head_dim + 16) eps (|q s c| + |q m|): tensor cores cut sums off instead of rounding them

    So a weight p_t is off by a factor within e^(+-delta_t), and another 2^-11 because it is rounded to float16, in
    numerator and total alike; the output by sum_t p_t (e^delta_t - 1) |v_t - output| e^(max delta).  To this add the
    rounding of p s to float16; that of weights below the normal range, 2^-25 beside a largest one of 2^LEAST_GAP or,
    for large scales S, 2^(11 - log2 S); and float32 sums over tokens, 16 at a time, or 1024 one after another.  (cpu
    has float32 errors alone.)
    """
    storage = np.asarray(query).dtype.name
    rows = _heads(query, keys, scale)
    batch, kv_heads, tokens = np.shape(keys.codes)[:3]
    lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    eps, half = EPSILON["float32"], EPSILON["float16"] / 2
    of_query = 0.0 if storage == "float16" else half
    output, lse = np.zeros(rows.shape), np.zeros(rows.shape[:3])
    for b in range(batch):
        n = int(lengths[b])
        arithmetic = (8 + math.log2(n + 1) + min(n, 1024) + n / 16) * eps
        for g in range(kv_heads if n else 0):
            q, (s, c, m) = rows[b, g], _of_head(keys, b, g, n)
            unit = 2 * np.abs(q).max(axis=-1, keepdims=True)
            coded, least = np.abs(q) @ (s * c).T, np.abs(q) @ np.abs(m).T
            delta = (half + of_query) * coded + of_query * least + (keys.head_dim + 16) * eps * (coded + least)
            delta += unit * (2.0**-17 * ((1 + s) * c).sum(axis=-1) + 2.0**-25 * np.abs(m).sum(axis=-1))
            delta += SMALLEST_NORMAL * keys.head_dim
            base = q @ (s * c + m).T
            largest = base.max(axis=-1, keepdims=True)
            p = np.exp(base - largest)
            total = p.sum(axis=-1, keepdims=True)
            p /= total
            change = p * np.expm1(delta + half)
            s, c, m = _of_head(values, b, g, n)
            v = s * c + m
            gap = min(LEAST_GAP, 11 - math.log2(max(s.max(), 2.0**LARGE_SCALE)))
            tiny = 2.0 ** (-25 - gap) / total
            for h in range(len(q)):
                worst = np.exp(delta[h].max())
                allowance = change[h] @ np.abs(v - p[h] @ v) * worst
                weighed, weighed_least = p[h] @ (s * c), p[h] @ np.abs(m)
                allowance += (half * weighed + arithmetic * (2 * weighed + 2 * weighed_least)) * worst
                allowance += tiny[h] * ((1 + s) * c + np.abs(m) + np.abs(v).max()).sum(axis=0) * worst
                output[b, g, h] = allowance + SMALLEST_NORMAL * (n + 2)
            lse[b, g] = (change.sum(axis=-1) + arithmetic + tiny[:, 0] * n
                         + 16 * eps * (np.abs(base).max(axis=-1) + math.log(n + 1) + 1))
    shape = np.shape(query)
    return output.reshape(shape), lse.reshape(shape[:2])


def _attention_agreement(inputs, expected, actual):
    with np.errstate(invalid="ignore", over="ignore"):
        output, lse = attention_tolerance(inputs["query"], inputs["keys"], inputs["values"], inputs.get("lengths"),
                                          inputs.get("scale"))
    assert_close(expected[0], actual[0], np.asarray(actual[0]).dtype.name, output, "output")
    assert_close(expected[1], actual[1], "float32", lse, "log-sum-exp")


def _decoded_error(inputs, expected, actual):
    return relative_error(reference.decode(expected), reference.decode(actual))


SOURCE = "KIVI, arXiv 2402.02750, section 3.2"
for _verb, _reference, _operator, _inputs, _traffic in (
        ("encode_keys", reference.encode_keys, encode_keys, _encode_keys_inputs, _encode_keys_traffic),
        ("encode_values", reference.encode_values, encode_values, _encode_values_inputs, _encode_values_traffic)):
    register(Kernel(
        name=f"kivi.{_verb}", reference=_reference, operator=_operator, backends=BACKENDS, axes=ENCODE_AXES,
        inputs=_inputs, traffic=_traffic, agreement=_encode_agreement, error=_decoded_error,
        source=f"{SOURCE} and Algorithm 1"))
register(Kernel(
    name="kivi.decode", reference=_decode_reference, operator=decode, backends=BACKENDS, axes=DECODE_AXES,
    inputs=_decode_inputs, traffic=_decode_traffic, agreement=_decode_agreement,
    error=lambda inputs, expected, actual: relative_error(expected, actual), source=SOURCE))
register(Kernel(
    name="kivi.logits", reference=reference.logits, operator=logits, backends=BACKENDS, axes=LOGITS_AXES,
    inputs=_logits_inputs, traffic=_logits_traffic, agreement=_logits_agreement,
    error=lambda inputs, expected, actual: relative_error(expected, actual), source=SOURCE))
register(Kernel(
    name="kivi.decode_attention", reference=reference.decode_attention, operator=decode_attention, backends=BACKENDS,
    axes=ATTENTION_AXES, inputs=_attention_inputs, traffic=_attention_traffic, agreement=_attention_agreement,
    error=lambda inputs, expected, actual: relative_error(expected[0], actual[0]),
    source=f"{SOURCE}; arXiv 1805.02867 section 3.1", exact=_attention_exact))
