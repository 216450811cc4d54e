"""Arguments of the attention kernels."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from strategies.arrays import batches, contents, dtypes, fill, groups, head_dims, kv_heads, seeds, token_counts


@st.composite
def decode(draw):
    head_dim, heads, batch = draw(head_dims), draw(kv_heads), draw(batches)
    tokens, dtype = draw(token_counts), draw(dtypes)
    rng = np.random.default_rng(draw(seeds))
    content = draw(contents)
    scale = draw(st.sampled_from((None, 0.0, 1.0, -0.05)))
    if content in ("large", "outlier channels"):
        # Else the logits are so large that no float32 sum says anything about them.
        scale = draw(st.sampled_from((0.0, 1e-9, 2.0**-24)))
    arguments = {"query": fill(rng, (batch, heads * draw(groups), head_dim), dtype, "normal"),
                 "keys": fill(rng, (batch, heads, tokens, head_dim), dtype, content),
                 "values": fill(rng, (batch, heads, tokens, head_dim), dtype, draw(contents)),
                 "scale": scale, "return_lse": True}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        arguments["lengths"] = np.array(lengths, np.int32)
        for b, length in enumerate(arguments["lengths"]):   # what lies beyond a sequence must not be read into a result
            arguments["keys"][b, :, length:] = np.nan
            arguments["values"][b, :, length:] = np.inf
    if draw(st.booleans()):                                     # an earlier result, some of it of no token at all
        shape = arguments["query"].shape
        lses = (draw(st.sampled_from((0.0, 1.0, 30.0))) * rng.standard_normal(shape[:2])).astype(np.float32)
        lses[rng.random(lses.shape) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = -np.inf
        outputs = fill(rng, shape, "float32", "normal")
        outputs[np.isneginf(lses)] = np.nan                     # not read
        arguments["earlier"] = outputs, lses
    return arguments


@st.composite
def sparse_attention(draw):
    """Rows that no list names are NaN, and so are entries beyond the counts, as far as integers can be."""
    arguments = draw(decode())
    arguments.pop("earlier", None)
    batch, kv_heads, tokens, _ = arguments["keys"].shape
    lists = kv_heads if draw(st.booleans()) else arguments["query"].shape[1]
    rng = np.random.default_rng(draw(seeds))
    lengths = arguments.get("lengths", np.full(batch, tokens))
    slots = tokens + draw(st.sampled_from((0, 3)))
    indices = rng.integers(-2**31, 2**31, (batch, lists, slots)).astype(np.int32)
    counts = np.minimum(rng.integers(0, tokens + 1, (batch, lists)), draw(st.sampled_from((0, 1, 17, tokens))))
    unread = np.ones((batch, kv_heads, tokens), bool)
    for b, i in np.ndindex(batch, lists):
        listed = rng.permutation(tokens)[: counts[b, i]]
        listed = np.sort(listed) if draw(st.booleans()) else listed
        indices[b, i, : counts[b, i]] = listed
        unread[b, i // (lists // kv_heads), listed[listed < lengths[b]]] = False
    for name in ("keys", "values"):
        arguments[name][unread] = np.nan
    slots_in_front(draw, rng, arguments)
    return {**arguments, "indices": indices, "counts": counts.astype(np.int32)}


def slots_in_front(draw, rng, arguments):
    """Adds slots in front of the tokens, of which some are attended in any case, or none."""
    first = arguments["first"] = draw(st.sampled_from((0, 0, 1, 20)))
    if not first:
        return
    batch, kv_heads, _, head_dim = arguments["keys"].shape
    leading = arguments["leading"] = rng.integers(0, first + 1, batch).astype(np.int32)
    for name in ("keys", "values"):
        front = fill(rng, (batch, kv_heads, first, head_dim), arguments[name].dtype.name, "normal")
        front[np.broadcast_to((np.arange(first) >= leading[:, None])[:, None], front.shape[:3])] = np.nan
        arguments[name] = np.concatenate([front, arguments[name]], axis=2)


@st.composite
def merge(draw):
    parts, batch, q_heads = draw(st.integers(1, 6)), draw(batches), draw(st.integers(1, 5))
    head_dim = draw(st.sampled_from((2, 64, 128, 300)))
    rng = np.random.default_rng(draw(seeds))
    outputs = fill(rng, (parts, batch, q_heads, head_dim), draw(dtypes), draw(contents))
    lses = (draw(st.sampled_from((0.0, 1.0, 100.0))) * rng.standard_normal((parts, batch, q_heads))).astype(np.float32)
    empty = rng.random(lses.shape) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    lses[empty] = -np.inf
    outputs[empty] = np.nan   # an empty part's output is not read
    return {"outputs": outputs, "lses": lses}
