"""Shapes, storage types and array contents that kernels must take."""
from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

NUMPY_TYPE = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

dtypes = st.sampled_from(tuple(NUMPY_TYPE))
head_dims = st.sampled_from((64, 128, 256))
groups = st.integers(1, 16)              # query heads per KV head
batches = st.integers(1, 3)
kv_heads = st.integers(1, 3)
around_tiles = st.sampled_from((15, 16, 17, 127, 128, 129, 255, 256, 257))
token_counts = st.one_of(st.integers(0, 150), around_tiles)
seeds = st.integers(0, 2**32 - 1)
schedules = st.integers(0, 2**63 - 1)    # of the emulator; 0 runs threads in order

# What is drawn into an array, from tame to nasty.  Infinities and NaN have tests of their own.
CONTENTS = ("normal", "outlier channels", "equal", "zeros", "some zero rows", "large", "small", "subnormal", "integers")
contents = st.sampled_from(CONTENTS)


def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, content: str) -> np.ndarray:
    """An array [..., head_dim] of the storage type, with this kind of content."""
    x = rng.standard_normal(shape)
    if content == "outlier channels" and shape[-1]:
        x[..., rng.integers(shape[-1], size=2)] *= 50
    elif content == "equal":
        x[...] = rng.standard_normal()
    elif content == "zeros":
        x[...] = 0
    elif content == "some zero rows":
        x[rng.random(shape[:-1]) < 0.5] = 0
    elif content == "large":       # a quarter of the largest float16: rotations may overflow, on every backend alike
        x *= 16384 / max(np.abs(x).max(initial=0), 1)
    elif content == "small":
        x *= 2.0**-10
    elif content == "subnormal":
        x *= {"float16": 2.0**-20, "bfloat16": 2.0**-128, "float32": 2.0**-128}[dtype]
    elif content == "integers":    # sums are exact
        x = np.rint(x)
    return x.astype(NUMPY_TYPE[dtype])
