"""Arguments of the KIVI kernels, at sizes and bits that every backend takes."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvbench import trees
from kvbench.reference.kivi import Encoded, Keys, Values
from strategies.arrays import batches, contents, dtypes, fill, groups, head_dims, kv_heads, seeds, token_counts

kernel_bits = st.sampled_from((2, 4))
group_sizes = st.sampled_from((32, 64, 128))     # numbers that share a scale; `groups` are those of query heads
# Scales and minima of groups, from tame to nasty.
PARAMETERS = ("normal", "zeros", "subnormal", "largest", "outlier channels")


def fitting(kind: type[Encoded], group: int, head_dim: int) -> int:
    """Groups of values are not longer than a token."""
    return group if kind is Keys else min(group, head_dim)


def random_codes(rng: np.random.Generator, kind: type[Encoded], shape: tuple[int, int, int], bits: int, group: int,
                 head_dim: int, content: str = "normal") -> Encoded:
    """Any codes, and float16 scales and minima of that kind: but for "normal", in half of the groups.

    shape : (batch, kv_heads, tokens), for keys in whole groups
    """
    batch, heads, tokens = shape
    rows = (tokens // group, head_dim) if kind is Keys else (tokens, head_dim // group)
    scale = rng.uniform(0.1, 2, (batch, heads, *rows)) * 3 / (2**bits - 1)
    minimum = rng.standard_normal(scale.shape) - 1.5
    some = rng.random(scale.shape) < 0.5
    if content == "outlier channels":
        some = rng.random(scale.shape) < 0.1
    special = {"normal": (1, 0), "zeros": (0, 0), "subnormal": (2.0**-20, 2.0**-22),
               "largest": (131008 / (2**bits - 1), -65504), "outlier channels": (20, -40)}[content]
    if content != "normal":
        scale[some], minimum[some] = special
    codes = rng.integers(0, 2**32, (batch, heads, tokens, head_dim * bits // 32), dtype=np.uint32)
    return kind(codes, scale.astype(np.float16), minimum.astype(np.float16), bits, group)


def in_a_store(rng: np.random.Generator, encoded: Encoded) -> Encoded:
    """The same tokens as slices of larger arrays, which hold other things around them.

    They begin a whole number of 128 tokens into the store: at a group, and where a GPU copies 16 bytes at a time.
    """
    before, after = (128 * int(n) for n in rng.integers(0, 2, 2))
    tokens = encoded.codes.shape[2]

    def slot(path, array):
        batch, heads, rows, *row = array.shape
        per = tokens // rows if rows else 1
        shape = (batch + 1, heads + 1, (before + after + -(-tokens // 128) * 128) // per, *row)
        store = np.frombuffer(rng.bytes(int(np.prod(shape)) * array.itemsize), array.dtype).reshape(shape).copy()
        view = store[:batch, 1:, before // per:before // per + rows]
        view[...] = array
        return view

    return trees.apply(slot, encoded)


@st.composite
def codes(draw, kind, shape, head_dim, contents=st.sampled_from(PARAMETERS), group=None):
    """Encoded vectors of (batch, kv_heads, tokens) = shape, contiguous or slices of a store."""
    rng = np.random.default_rng(draw(seeds))
    group = fitting(kind, draw(group_sizes) if group is None else group, head_dim)
    encoded = random_codes(rng, kind, shape, draw(kernel_bits), group, head_dim, draw(contents))
    return in_a_store(rng, encoded) if draw(st.booleans()) else encoded


def vectors(draw, shape):
    """x of the shape, sometimes with NaN and infinities, contiguous or with the tokens before the heads in memory."""
    rng = np.random.default_rng(draw(seeds))
    x = fill(rng, shape, draw(dtypes), draw(contents))
    if draw(st.booleans()):
        hit = rng.random(x.shape) < draw(st.sampled_from((0.01, 0.9)))
        x[hit] = rng.choice([np.nan, np.inf, -np.inf], int(hit.sum()))
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) if draw(st.booleans()) else x


@st.composite
def encode_keys(draw):
    head_dim, group = draw(head_dims), draw(group_sizes)
    tokens = group * draw(st.integers(0, 128 // group + 1))
    return {"x": vectors(draw, (draw(batches), draw(kv_heads), tokens, head_dim)), "bits": draw(kernel_bits),
            "group": group}


@st.composite
def encode_values(draw):
    head_dim = draw(head_dims)
    shape = (draw(batches), draw(kv_heads), draw(st.integers(0, 70)), head_dim)
    return {"x": vectors(draw, shape), "bits": draw(kernel_bits),
            "group": fitting(Values, draw(group_sizes), head_dim)}


@st.composite
def decode(draw):
    kind, group = draw(st.sampled_from((Keys, Values))), draw(group_sizes)
    tokens = group * draw(st.integers(0, 2)) if kind is Keys else draw(st.integers(0, 70))
    shape = (draw(batches), draw(kv_heads), tokens)
    return {"encoded": draw(codes(kind, shape, draw(head_dims), group=group)), "dtype": draw(dtypes)}


def query_for(draw, batch, heads, head_dim):
    return fill(np.random.default_rng(draw(seeds)), (batch, heads * draw(groups), head_dim), draw(dtypes),
                draw(st.sampled_from(("normal", "outlier channels", "equal", "zeros", "integers"))))


@st.composite
def logits(draw):
    head_dim, group = draw(head_dims), draw(group_sizes)
    shape = (draw(batches), draw(kv_heads), group * draw(st.integers(0, 2)))
    return {"query": query_for(draw, *shape[:2], head_dim), "keys": draw(codes(Keys, shape, head_dim, group=group)),
            "scale": draw(st.sampled_from((None, 0.0, 1.0, -0.05)))}


@st.composite
def decode_attention(draw):
    head_dim, group = draw(head_dims), draw(group_sizes)
    batch, heads, tokens = draw(batches), draw(kv_heads), draw(token_counts)
    shape = (batch, heads, -(-tokens // group) * group)
    content = draw(st.sampled_from(PARAMETERS))
    scale = draw(st.sampled_from((None, 0.0, 1.0, -0.05)))
    if content == "largest":
        # Else the logits are so large that no rounded query says anything about them.
        scale = draw(st.sampled_from((0.0, 1e-9, 2.0**-24)))
    arguments = {"query": query_for(draw, batch, heads, head_dim),
                 "keys": draw(codes(Keys, shape, head_dim, st.just(content), group)),
                 "values": draw(codes(Values, shape, head_dim)), "scale": scale, "return_lse": True}
    lengths = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    arguments["lengths"] = np.array(lengths if draw(st.booleans()) else [tokens] * batch, np.int32)
    for b, length in enumerate(arguments["lengths"]):       # what lies beyond a sequence must not be read into a result
        for side, first in (("keys", -(-length // group)), ("values", length)):
            arguments[side].scale[b, :, first:] = np.nan
            arguments[side].minimum[b, :, first:] = np.inf
    return arguments
