"""Arguments of the Self-Indexing kernels, at sizes that every backend takes."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvbench.reference import kivi
from kvbench.reference.self_indexing import Encoded, channel_scale
from strategies.arrays import batches, contents, dtypes, fill, head_dims, kv_heads, seeds
from strategies.turboquant import few_tokens, in_a_store, query_for

more_tokens = st.one_of(st.integers(0, 70), st.sampled_from((255, 256, 257, 600)))
tables = st.sampled_from(("mean", "each"))


def _centre(rng, shape, x):
    """Of the size of the tokens, or 0; float32 [batch, kv_heads, head_dim]."""
    finite = np.abs(x[np.isfinite(x)].astype(np.float64))
    size = finite.mean() if finite.size else 1.0
    return (rng.choice([0.0, 1.0]) * size * rng.standard_normal(shape)).astype(np.float32)


@st.composite
def keys(draw, shape):
    """(keys, mean): some tokens with NaN or infinities, contiguous or with the tokens before the heads in memory."""
    rng = np.random.default_rng(draw(seeds))
    x = fill(rng, shape, draw(dtypes), draw(contents))
    if draw(st.booleans()):
        hit = rng.random(x.shape) < 0.5 / x.shape[-1]
        x[hit] = rng.choice([np.nan, np.inf, -np.inf], int(hit.sum()))
    mean = _centre(rng, (*shape[:2], shape[3]), x)
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) if draw(st.booleans()) else x, mean


@st.composite
def encode(draw):
    shape = (draw(batches), draw(kv_heads), draw(few_tokens), draw(head_dims))
    x, mean = draw(keys(shape))
    with np.errstate(over="ignore", invalid="ignore"):
        alpha = channel_scale(x, mean)
    if draw(st.booleans()):                     # what was frozen before: keys are inside its range, or far outside
        alpha *= np.exp2(np.random.default_rng(draw(seeds)).integers(-24, 3, alpha.shape)).astype(np.float32)
    return {"x": x, "mean": mean, "channel_scale": np.maximum(alpha, np.float32(2.0**-100))}


@st.composite
def positions(draw, batch, heads, tokens):
    """Tokens that stay exact: distinct ones, and some that are none."""
    rng = np.random.default_rng(draw(seeds))
    chosen = [[rng.permutation(np.arange(-2, tokens + 2)) for _ in range(heads)] for _ in range(batch)]
    number = draw(st.integers(0, min(tokens + 4, 70)))
    return np.array(chosen, np.int32).reshape(batch, heads, -1)[:, :, :number]


@st.composite
def ragged(draw, batch, tokens):
    return np.array(draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch)), np.int32)


@st.composite
def build_codebook(draw):
    shape = (draw(batches), draw(kv_heads), draw(few_tokens), draw(head_dims))
    x, mean = draw(keys(shape))
    arguments = {"keys": x, "mean": mean}
    if draw(st.booleans()):
        arguments["excluded"] = np.ascontiguousarray(draw(positions(*shape[:3])))
    if draw(st.booleans()):
        arguments["lengths"] = draw(ragged(shape[0], shape[2]))
    return arguments


@st.composite
def build_tables(draw):
    batch, heads, head_dim = draw(batches), draw(kv_heads), draw(head_dims)
    codebook = np.random.default_rng(draw(seeds)).standard_normal((batch, heads, head_dim // 4, 16, 4))
    return {"query": query_for(draw, batch, heads, head_dim), "codebook": codebook.astype(np.float32),
            "heads": draw(tables), "scale": draw(st.sampled_from((1.0, 0.125, 0.0, -2.0)))}


@st.composite
def score(draw):
    arguments = draw(build_tables())
    batch, heads, head_dim = arguments["codebook"].shape[0], arguments["codebook"].shape[1], \
        4 * arguments["codebook"].shape[2]
    tokens, rng = draw(more_tokens), np.random.default_rng(draw(seeds))
    sign = rng.integers(0, 2**32, (batch, heads, tokens, head_dim // 32), dtype=np.uint32)
    if draw(st.booleans()):                     # a slice of a store, whose rows may begin at other places than it does
        store = rng.integers(0, 2**32, (batch, heads + 1, tokens + 8, head_dim // 32), dtype=np.uint32)
        store[:, 1:, 4 : 4 + tokens] = sign
        sign = store[:, 1:, 4 : 4 + tokens]
    arguments["sign"] = sign
    if draw(st.booleans()):
        arguments["lengths"] = draw(ragged(batch, tokens))
    if draw(st.booleans()):
        arguments["excluded"] = np.ascontiguousarray(draw(positions(batch, heads, tokens)))
    return arguments


@st.composite
def select_top_k(draw):
    """Of several parts, and of codes that often recur."""
    arguments = draw(score())
    for name in ("heads", "excluded"):
        arguments.pop(name, None)
    if draw(st.booleans()):
        arguments["sign"] = arguments["sign"] & np.uint32(0x00010010)
    return {**arguments, "k": draw(st.one_of(st.integers(0, 20), st.integers(0, 600)))}


def random_rows(rng, shape, bits, head_dim):
    """Any words are codes; magnitudes of two bits are not negative."""
    scale = rng.choice([0.0, 2.0**-24, 1.0], shape) * rng.uniform(0.1, 1, (*shape, head_dim // 32))[..., 0]
    scale = np.broadcast_to(scale[..., None], (*shape, head_dim // 32)).astype(np.float16)
    minimum = (rng.uniform(0, 1, scale.shape)).astype(np.float16)
    codes = rng.integers(0, 2**32, (*shape, head_dim * bits // 32), dtype=np.uint32)
    return codes, np.ascontiguousarray(scale), minimum


@st.composite
def sparse_attention_packed(draw):
    head_dim, batch, heads, tokens = draw(head_dims), draw(batches), draw(kv_heads), draw(few_tokens)
    rng, shape = np.random.default_rng(draw(seeds)), (batch, heads, tokens)
    bits = draw(st.sampled_from((2, 4)))
    codes, scale, minimum = random_rows(rng, shape, bits, head_dim)
    values = kivi.Values(codes, scale, minimum - np.float16(0.5), bits, 32)
    sign = rng.integers(0, 2**32, (*shape, head_dim // 32), dtype=np.uint32)
    packed = Encoded(sign, kivi.Values(*random_rows(rng, shape, 2, head_dim), 2, 32))
    if draw(st.booleans()):
        packed, values = in_a_store(rng, packed), in_a_store(rng, values)
    slots = draw(st.integers(0, tokens + 3))
    indices = np.array([[rng.permutation(np.arange(-1, tokens + 2))[:slots] for _ in range(heads)]
                        for _ in range(batch)], np.int32).reshape(batch, heads, slots)
    arguments = {"query": query_for(draw, batch, heads, head_dim), "keys": packed, "values": values,
                 "channel_scale": rng.uniform(0.5, 2, (batch, heads, head_dim)).astype(np.float32), "indices": indices,
                 "counts": rng.integers(0, slots + 1, (batch, heads)).astype(np.int32), "return_lse": True,
                 "scale": draw(st.sampled_from((None, 0.0, 1.0, -0.05)))}
    if draw(st.integers(0, 3)) == 0:            # all tokens
        del arguments["indices"], arguments["counts"]
    if draw(st.booleans()):
        arguments["mean"] = rng.standard_normal((batch, heads, head_dim)).astype(np.float32)
    if draw(st.booleans()):
        arguments["lengths"] = draw(ragged(batch, tokens))
        for b, length in enumerate(arguments["lengths"]):   # what lies beyond a sequence must not be read into a result
            arguments["values"].scale[b, :, length:] = np.nan
            arguments["keys"].magnitude.scale[b, :, length:] = np.inf
    if draw(st.booleans()):
        dtype, exact = arguments["query"].dtype, draw(st.integers(0, 70))
        for name in ("exact_keys", "exact_values"):
            arguments[name] = rng.standard_normal((batch, heads, exact, head_dim)).astype(dtype)
        if draw(st.booleans()):
            arguments["exact_lengths"] = draw(ragged(batch, exact))
            for b, length in enumerate(arguments["exact_lengths"]):
                arguments["exact_keys"][b, :, length:] = np.nan
                arguments["exact_values"][b, :, length:] = np.nan
    return arguments
