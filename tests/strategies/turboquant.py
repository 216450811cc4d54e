"""Arguments of the TurboQuant kernels, at sizes and bits that every backend takes."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvbench import trees
from kvbench.reference import planes, turboquant
from kvbench.reference.planes import Planes
from kvbench.reference.turboquant import Encoded, EncodedProd
from strategies.arrays import batches, contents, dtypes, fill, groups, head_dims, kv_heads, seeds, token_counts
from strategies.rotation import rotations

all_bits = st.integers(1, 8)
kernel_bits = st.integers(1, 4)           # of attention in CUDA kernels
scale_modes = st.sampled_from(turboquant.SCALE_MODES)
few_tokens = st.integers(0, 70)
# Scales of tokens, from tame to nasty.
SCALES = ("normal", "zeros", "subnormal", "largest", "NaN")


def random_planes(rng: np.random.Generator, shape: tuple[int, int, int], bits: int, size: int) -> Planes:
    """Any words are codes.  shape : (batch, kv_heads, tokens)"""
    return Planes.of({name: rng.integers(0, 2**32, (*shape, n), dtype=np.uint32)
                      for name, n in planes.words(bits, size).items()})


def random_scales(rng: np.random.Generator, shape: tuple[int, int, int], content: str) -> np.ndarray:
    """float16, positive; but for "normal", half of the tokens are of that kind."""
    scale = rng.uniform(0.1, 2, shape)
    special = {"normal": 1, "zeros": 0, "subnormal": 2.0**-20, "largest": turboquant.LARGEST_SCALE, "NaN": np.nan}
    if content != "normal":
        scale[rng.random(shape) < 0.5] = special[content]
    return scale.astype(np.float16)


def in_a_store(rng: np.random.Generator, encoded: Encoded | EncodedProd) -> Encoded | EncodedProd:
    """The same tokens as slices of larger arrays, which hold other things around them."""
    before, after = (int(n) for n in rng.integers(0, 4, 2))

    def slot(path, array):
        batch, heads, tokens, *row = array.shape
        shape = (batch + 1, heads + 1, before + tokens + after, *row)
        store = np.frombuffer(rng.bytes(int(np.prod(shape)) * array.itemsize), array.dtype).reshape(shape).copy()
        view = store[:batch, 1:, before:before + tokens]
        view[...] = array
        return view

    return trees.apply(slot, encoded)


@st.composite
def codes(draw, shape, bits, head_dim, scales=st.sampled_from(SCALES)):
    """Encoded vectors of (batch, kv_heads, tokens) = shape, contiguous or slices of a store."""
    rng = np.random.default_rng(draw(seeds))
    encoded = Encoded(random_planes(rng, shape, bits, head_dim), random_scales(rng, shape, draw(scales)), head_dim)
    return in_a_store(rng, encoded) if draw(st.booleans()) else encoded


@st.composite
def vectors(draw, shape, dtype):
    """x of the shape, some tokens with NaN or infinities, contiguous or with the tokens before the heads in memory."""
    rng = np.random.default_rng(draw(seeds))
    x = fill(rng, shape, dtype, draw(contents))
    if draw(st.booleans()):
        hit = rng.random(x.shape) < 0.5 / x.shape[-1]
        x[hit] = rng.choice([np.nan, np.inf, -np.inf], int(hit.sum()))
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) if draw(st.booleans()) else x


@st.composite
def encode(draw):
    head_dim, shape = draw(head_dims), (draw(batches), draw(kv_heads), draw(few_tokens))
    x = draw(vectors((*shape, head_dim), draw(dtypes)))
    # Of the size of the tokens: a mean much larger than they are leaves nothing of them but rounding.
    mean_shape = draw(st.sampled_from((None, shape[1:2], shape[:2])))
    arguments = {"x": x, "rotation": draw(rotations(head_dim)), "bits": draw(all_bits), "scale_mode": draw(scale_modes)}
    if mean_shape is not None:
        finite = np.abs(x[np.isfinite(x)].astype(np.float64))
        size = finite.mean() if finite.size else 1.0
        mean = np.random.default_rng(draw(seeds)).standard_normal((*mean_shape, head_dim))
        arguments["mean"] = (size * mean).astype(np.float32)
    return arguments


@st.composite
def decode(draw):
    head_dim, shape = draw(head_dims), (draw(batches), draw(kv_heads), draw(few_tokens))
    return {"encoded": draw(codes(shape, draw(all_bits), head_dim)), "rotation": draw(rotations(head_dim))}


def query_for(draw, batch, heads, head_dim):
    return fill(np.random.default_rng(draw(seeds)), (batch, heads * draw(groups), head_dim), draw(dtypes),
                draw(st.sampled_from(("normal", "outlier channels", "equal", "zeros", "integers"))))


@st.composite
def logits(draw):
    head_dim, shape = draw(head_dims), (draw(batches), draw(kv_heads), draw(few_tokens))
    return {"query": query_for(draw, *shape[:2], head_dim), "encoded": draw(codes(shape, draw(all_bits), head_dim)),
            "rotation": draw(rotations(head_dim)), "scale": draw(st.sampled_from((None, 0.0, 1.0, -0.05)))}


@st.composite
def decode_attention(draw):
    head_dim, shape = draw(head_dims), (draw(batches), draw(kv_heads), draw(token_counts))
    batch, heads, tokens = shape
    key_scales = draw(st.sampled_from(SCALES[:-1]))         # NaN has tests of its own
    scale = draw(st.sampled_from((None, 0.0, 1.0, -0.05)))
    if key_scales == "largest":
        # Else the logits are so large that no rounded query says anything about them.
        scale = draw(st.sampled_from((0.0, 1e-9, 2.0**-24)))
    arguments = {"query": query_for(draw, batch, heads, head_dim),
                 "keys": draw(codes(shape, draw(kernel_bits), head_dim, st.just(key_scales))),
                 "values": draw(codes(shape, draw(kernel_bits), head_dim, st.sampled_from(SCALES[:-1]))),
                 "key_rotation": draw(rotations(head_dim)), "value_rotation": draw(rotations(head_dim)),
                 "scale": scale, "return_lse": True}
    mean_shape = draw(st.sampled_from((None, (heads,), (batch, heads))))
    if mean_shape is not None:
        rng = np.random.default_rng(draw(seeds))
        arguments["key_mean"] = rng.standard_normal((*mean_shape, head_dim)).astype(np.float32)
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        arguments["lengths"] = np.array(lengths, np.int32)
        for b, length in enumerate(lengths):                # what lies beyond a sequence must not be read into a result
            arguments["keys"].scale[b, :, length:] = np.nan
            arguments["values"].scale[b, :, length:] = np.inf
    return arguments


# --- TurboQuant-prod -------------------------------------------------------------------------------------------------


@st.composite
def projections(draw, head_dim):
    return draw(st.sampled_from((turboquant.orthogonal_projection, turboquant.gaussian_projection)))(
        head_dim, draw(st.integers(0, 3)))


@st.composite
def encode_prod(draw):
    arguments = draw(encode())
    del arguments["scale_mode"]
    return {**arguments, "projection": draw(projections(arguments["x"].shape[-1]))}


@st.composite
def codes_prod(draw, shape, bits, head_dim):
    rng = np.random.default_rng(draw(seeds))
    first = None
    if bits > 1:
        first = Encoded(random_planes(rng, shape, bits - 1, head_dim), random_scales(rng, shape, "normal"), head_dim)
    sign, norm = random_planes(rng, shape, 1, head_dim).sign, random_scales(rng, shape, draw(st.sampled_from(SCALES)))
    encoded = EncodedProd(first, sign, norm, head_dim)
    return in_a_store(rng, encoded) if draw(st.booleans()) else encoded


@st.composite
def decode_prod(draw):
    head_dim, shape = draw(head_dims), (draw(batches), draw(kv_heads), draw(few_tokens))
    return {"encoded": draw(codes_prod(shape, draw(all_bits), head_dim)), "rotation": draw(rotations(head_dim)),
            "projection": draw(projections(head_dim))}


@st.composite
def logits_prod(draw):
    arguments = draw(decode_prod())
    query = query_for(draw, *arguments["encoded"].residual_norm.shape[:2], arguments["rotation"].head_dim)
    return {"query": query, **arguments, "scale": draw(st.sampled_from((None, 0.0, 1.0, -0.05)))}
