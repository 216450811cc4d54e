"""Arguments of the Block-GTQ kernels, at sizes and tiles that every backend takes."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvbench.ops.block_gtq_records import random_keys
from kvbench.reference import block_gtq
from kvbench.reference.block_gtq import Plan
from strategies.arrays import batches, contents, dtypes, fill, groups, kv_heads, seeds, token_counts
from strategies.rotation import rotations
from strategies.turboquant import SCALES, codes, few_tokens, in_a_store, query_for, random_scales, scale_modes, vectors

head_dims = st.sampled_from((32, 64, 96, 128))
kernel_head_dims = st.sampled_from((64, 128, 256))       # of CUDA kernels


@st.composite
def plans(draw, heads, sizes=head_dims, scale_bits=st.sampled_from((16, 8)), most=8):
    """Any bits in tiles of 16 or 32, or the same for all blocks, other ones for every head."""
    rng, head_dim = np.random.default_rng(draw(seeds)), draw(sizes)
    tile, least = draw(st.sampled_from((16, 32))), draw(st.integers(1, 3))
    average_bits = draw(st.one_of(st.integers(least, most), st.floats(least, most)))
    # Enough for whole tiles of the least number of bits.
    count = head_dim // tile
    average_bits = max(np.floor(average_bits * count) / count, least)
    bits = [block_gtq.allocate(4.0 ** rng.normal(0, draw(st.sampled_from((0, 1, 3))), head_dim // 2), average_bits,
                               least=least, most=most, tile=tile) for _ in range(heads)]
    exponents = rng.integers(-2, 3, heads).astype(np.int16) if draw(scale_bits) == 8 else None
    pairing = draw(st.sampled_from(block_gtq.PAIRINGS))
    return Plan(np.stack(bits), pairing, draw(st.sampled_from((0, head_dim // 2, head_dim))), draw(seeds),
                draw(st.sampled_from(block_gtq.ROTATIONS)), exponents)


@st.composite
def keys(draw, plan, shape, scales=st.sampled_from(SCALES)):
    """Codes of (batch, kv_heads, tokens) = shape, contiguous or slices of a store."""
    rng = np.random.default_rng(draw(seeds))
    encoded = random_keys(plan, shape, rng)
    content = draw(scales)
    if plan.exponents is None:
        present = encoded.scale != 0
        encoded.scale[present] = random_scales(rng, encoded.scale.shape, content)[present]
    elif content != "normal":
        stored = {"zeros": 0, "subnormal": 1, "largest": 254, "NaN": 255}[content]
        encoded.scale[rng.random(encoded.scale.shape) < 0.5] = stored
    return in_a_store(rng, encoded) if draw(st.booleans()) else encoded


@st.composite
def calibrate(draw):
    head_dim, batch, heads, dtype = draw(head_dims), draw(batches), draw(kv_heads), draw(dtypes)
    x = draw(vectors((batch, heads, draw(st.integers(1, 40)), head_dim), dtype))
    arguments = {"keys": x, "pairing": draw(st.sampled_from(block_gtq.PAIRINGS)), "centred": draw(st.booleans()),
                 "rotary_dim": draw(st.sampled_from((None, 0, 16, head_dim)))}
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(seeds))
        shape = (batch, heads * draw(groups), draw(st.integers(1, 10)), head_dim)
        arguments["query"] = fill(rng, shape, dtype, draw(contents))
    return arguments


@st.composite
def allocate(draw):
    rng, tile = np.random.default_rng(draw(seeds)), draw(st.sampled_from((2, 4, 16, 32)))
    count = tile // 2 * draw(st.integers(1, 6))
    least = draw(st.integers(1, 8))
    most = draw(st.integers(least, 8))
    scores = np.stack([block_gtq._scores(rng, count) for _ in range(draw(kv_heads))])
    return {"scores": scores, "average_bits": draw(st.floats(least, most)), "least": least, "most": most, "tile": tile}


@st.composite
def encode(draw):
    heads = draw(kv_heads)
    plan = draw(plans(heads, kernel_head_dims))
    x = draw(vectors((draw(batches), heads, draw(few_tokens), plan.head_dim), draw(dtypes)))
    arguments = {"x": x, "plan": plan, "scale_mode": draw(scale_modes)}
    mean_shape = draw(st.sampled_from((None, x.shape[1:2], x.shape[:2])))
    if mean_shape is not None:
        finite = np.abs(x[np.isfinite(x)].astype(np.float64))
        size = finite.mean() if finite.size else 1.0
        mean = np.random.default_rng(draw(seeds)).standard_normal((*mean_shape, plan.head_dim))
        arguments["mean"] = (size * mean).astype(np.float32)
    return arguments


@st.composite
def decode(draw):
    heads = draw(kv_heads)
    plan = draw(plans(heads, kernel_head_dims))
    return {"encoded": draw(keys(plan, (draw(batches), heads, draw(few_tokens)))), "plan": plan}


@st.composite
def logits(draw):
    heads, batch = draw(kv_heads), draw(batches)
    plan = draw(plans(heads, kernel_head_dims))
    return {"query": query_for(draw, batch, heads, plan.head_dim), "plan": plan,
            "encoded": draw(keys(plan, (batch, heads, draw(few_tokens)))),
            "scale": draw(st.sampled_from((None, 0.0, 1.0, -0.05)))}


@st.composite
def decode_attention(draw):
    heads, batch, tokens = draw(kv_heads), draw(batches), draw(token_counts)
    plan, shape = draw(plans(heads, kernel_head_dims)), (batch, heads, tokens)
    key_scales = draw(st.sampled_from(SCALES[:-1]))         # NaN has tests of its own
    scale = draw(st.sampled_from((None, 0.0, 1.0, -0.05)))
    if key_scales == "largest":                             # else the logits are so large that rounding decides them
        scale = draw(st.sampled_from((0.0, 1e-9, 2.0**-24)))
    arguments = {"query": query_for(draw, batch, heads, plan.head_dim), "plan": plan,
                 "keys": draw(keys(plan, shape, st.just(key_scales))),
                 "values": draw(codes(shape, draw(st.integers(1, 8)), plan.head_dim, st.sampled_from(SCALES[:-1]))),
                 "value_rotation": draw(rotations(plan.head_dim)), "scale": scale, "return_lse": True}
    mean_shape = draw(st.sampled_from((None, (heads,), (batch, heads))))
    if mean_shape is not None:
        rng = np.random.default_rng(draw(seeds))
        arguments["key_mean"] = rng.standard_normal((*mean_shape, plan.head_dim)).astype(np.float32)
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        arguments["lengths"] = np.array(lengths, np.int32)
        for b, length in enumerate(lengths):                # what lies beyond a sequence must not be read into a result
            arguments["keys"].scale[b, :, length:] = np.nan if plan.exponents is None else 255
            arguments["values"].scale[b, :, length:] = np.inf
    return arguments
