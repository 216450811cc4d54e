"""Arguments of the rotation kernels."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvbench.reference.rotation import haar, hadamard
from strategies.arrays import contents, dtypes, fill, head_dims, seeds


@st.composite
def rotations(draw, head_dim):
    seed = draw(seeds)
    return haar(head_dim, seed) if draw(st.integers(0, 3)) == 0 else hadamard(head_dim, seed, draw(st.integers(1, 8)))


@st.composite
def rotate(draw):
    head_dim = draw(head_dims)
    rows = st.sampled_from(((130,), (3, 190)))   # more than one round of the grid on the emulator
    leading = draw(st.one_of(st.lists(st.integers(0, 5), max_size=3).map(tuple), rows))
    x = fill(np.random.default_rng(draw(seeds)), (*leading, head_dim), draw(dtypes), draw(contents))
    return {"x": x, "rotation": draw(rotations(head_dim)), "inverse": draw(st.booleans())}
