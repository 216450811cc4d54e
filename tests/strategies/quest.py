"""Arguments of the Quest kernels, at sizes that every backend takes."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvbench.reference.quest import Pages
from strategies.arrays import batches, contents, dtypes, fill, groups, head_dims, kv_heads, seeds, token_counts
from strategies.turboquant import vectors

page_sizes = st.sampled_from((1, 3, 16, 32))


@st.composite
def encode(draw):
    shape = (draw(batches), draw(kv_heads), draw(token_counts), draw(head_dims))
    arguments = {"keys": draw(vectors(shape, draw(dtypes))), "page": draw(page_sizes)}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, shape[2]), min_size=shape[0], max_size=shape[0]))
        arguments["lengths"] = np.array(lengths, np.int32)
    return arguments


@st.composite
def score(draw):
    batch, heads, head_dim, dtype = draw(batches), draw(kv_heads), draw(head_dims), draw(dtypes)
    page, count = draw(page_sizes), draw(st.integers(0, 70))
    rng, content = np.random.default_rng(draw(seeds)), draw(contents)
    one, other = (fill(rng, (batch, heads, count, head_dim), dtype, content) for _ in range(2))
    low, high = np.minimum(one, other), np.maximum(one, other)
    if draw(st.booleans()):                                 # pages without a number in some channel
        low[..., 0][rng.random(low.shape[:-1]) < 0.2] = np.nan
        high[np.isnan(low.astype(np.float32))] = np.nan
    lengths = None
    if draw(st.booleans()):
        lengths = np.array(draw(st.lists(st.integers(0, count * page), min_size=batch, max_size=batch)), np.int32)
    return {"query": fill(rng, (batch, heads * draw(groups), head_dim), draw(dtypes), "normal"),
            "pages": Pages(low, high, lengths, page), "scale": draw(st.sampled_from((None, 0.0, 1.0))),
            "tokens": draw(st.sampled_from((None, count * page, max(count * page - 1, 0))))}
