"""Arguments of the RaBitQ kernels, at sizes and bits that every backend takes."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvbench.reference.rabitq import Encoded
from strategies.arrays import batches, dtypes, fill, groups, head_dims, kv_heads, seeds, token_counts
from strategies.attention import slots_in_front
from strategies.rotation import rotations
from strategies.selection import shares
from strategies.turboquant import SCALES, few_tokens, in_a_store, random_scales, vectors

roundings = st.sampled_from(((4, "nearest"), (4, "random"), (8, "nearest")))
# Of queries; infinities and NaN have tests of their own.
QUERIES = ("normal", "outlier channels", "equal", "zeros", "integers", "small")


def mean_for(draw, x, shapes=(None, "heads", "all")):
    """A mean of the size of the tokens x, of each head or of each sequence too, or None."""
    chosen, (batch, heads, _, head_dim) = draw(st.sampled_from(shapes)), x.shape
    if chosen is None:
        return None
    finite = np.abs(x[np.isfinite(x)].astype(np.float64))
    size = finite.mean() if finite.size else 1.0
    shape = (heads, head_dim) if chosen == "heads" else (batch, heads, head_dim)
    return (size * np.random.default_rng(draw(seeds)).standard_normal(shape)).astype(np.float32)


@st.composite
def encode(draw):
    head_dim, shape = draw(head_dims), (draw(batches), draw(kv_heads), draw(few_tokens))
    keys = draw(vectors((*shape, head_dim), draw(dtypes)))
    means = {name: mean_for(draw, keys) for name in ("key_mean", "query_mean")}
    return {"keys": keys, "rotation": draw(rotations(head_dim)),
            **{name: mean for name, mean in means.items() if mean is not None}}


def rounding_for(draw):
    bits, rounding = draw(roundings)
    return {"query_bits": bits, "rounding": rounding, "seed": draw(seeds), "step": draw(st.integers(0, 10**6))}


def query_for(draw, batch, heads, head_dim):
    return fill(np.random.default_rng(draw(seeds)), (batch, heads * draw(groups), head_dim), draw(dtypes),
                draw(st.sampled_from(QUERIES)))


@st.composite
def quantize_query(draw):
    head_dim, batch, heads = draw(head_dims), draw(batches), draw(kv_heads)
    arguments = {"query": query_for(draw, batch, heads, head_dim), "rotation": draw(rotations(head_dim)),
                 **rounding_for(draw)}
    mean_shape = draw(st.sampled_from((None, (heads,), (batch, heads))))
    if mean_shape is not None:
        rng = np.random.default_rng(draw(seeds))
        arguments["query_mean"] = rng.standard_normal((*mean_shape, head_dim)).astype(np.float32)
    return arguments


def random_index(rng, shape, head_dim, *, scales="normal", key_mean=False, query_mean=False):
    """Any words are codes.  shape : (batch, kv_heads, tokens)"""
    means = [rng.standard_normal((*shape[:2], head_dim)).astype(np.float32) if wanted else None
             for wanted in (key_mean, query_mean)]
    return Encoded(rng.integers(0, 2**32, (*shape, head_dim // 32), dtype=np.uint32), random_scales(rng, shape, scales),
                   rng.standard_normal(shape).astype(np.float16) if query_mean else None, *means, head_dim)


def index_in_a_store(rng, encoded):
    """The same tokens as slices of larger arrays; the means as they are."""
    stored = in_a_store(rng, (encoded.sign, encoded.rescale, encoded.offset))
    return Encoded(*stored, encoded.key_mean, encoded.query_mean, encoded.head_dim)


@st.composite
def score(draw, counts=token_counts):
    head_dim, shape = draw(head_dims), (draw(batches), draw(kv_heads), draw(counts))
    rng = np.random.default_rng(draw(seeds))
    encoded = random_index(rng, shape, head_dim, scales=draw(st.sampled_from(SCALES)), key_mean=draw(st.booleans()),
                           query_mean=draw(st.booleans()))
    arguments = {"query": query_for(draw, *shape[:2], head_dim), "rotation": draw(rotations(head_dim)),
                 "scale": draw(st.sampled_from((None, 0.0, 1.0, -0.05))), "return_sigma": draw(st.booleans()),
                 **rounding_for(draw)}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, shape[2]), min_size=shape[0], max_size=shape[0]))
        arguments["lengths"] = np.array(lengths, np.int32)
        for b, length in enumerate(lengths):                # what lies beyond a sequence must not be read into a result
            encoded.rescale[b, :, length:] = np.nan
    return {**arguments, "encoded": index_in_a_store(rng, encoded) if draw(st.booleans()) else encoded}


@st.composite
def select_top_p(draw):
    """Of several parts, and of codes that often recur."""
    arguments = draw(score(st.one_of(token_counts, st.sampled_from((257, 700, 1300)))))
    del arguments["return_sigma"]
    if draw(st.booleans()):
        arguments["encoded"].sign[...] &= np.uint32(0x00010010)
    if draw(st.booleans()):
        arguments["min_tokens"] = draw(st.integers(0, 40))
    if draw(st.booleans()):
        arguments["max_tokens"] = draw(st.integers(arguments.get("min_tokens", 1), 200))
    return {**arguments, "p": draw(shares)}


@st.composite
def sparse_attention(draw):
    """Rows beyond the sequences are NaN, and there may be more slots than tokens of the index."""
    arguments = draw(select_top_p())
    query, (batch, kv_heads, tokens) = arguments["query"], arguments["encoded"].rescale.shape
    rng = np.random.default_rng(draw(seeds))
    if np.abs(query.astype(np.float32)).max(initial=0) > 10:    # else no float32 sum says anything about exact logits
        arguments["scale"] = 2.0**-24
    slots = tokens + draw(st.sampled_from((0, 3)))
    for name in ("keys", "values"):
        rows = fill(rng, (batch, kv_heads, slots, query.shape[2]), query.dtype.name, "normal")
        for b, length in enumerate(arguments.get("lengths", np.full(batch, tokens))):
            rows[b, :, length:] = np.nan
        arguments[name] = rows
    slots_in_front(draw, rng, arguments)
    return {**arguments, "return_lse": True}
