"""Arguments of the selection kernels."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvbench.reference.selection import CALIBRATIONS, NORMALISE
from kvbench.scores import Scores
from strategies.arrays import seeds

# batch, kv_heads, group: each query head costs the emulator two launches of 512 threads.
SHAPES = st.sampled_from(((1, 1, 1), (3, 1, 1), (1, 3, 2), (2, 2, 2), (1, 1, 16), (1, 2, 5)))
token_counts = st.one_of(st.integers(0, 150), st.sampled_from((31, 32, 33, 513)))
CONTENTS = ("normal", "wide", "narrow", "equal", "ties", "two values", "holes", "nothing", "one large", "huge",
            "subnormal")
shares = st.one_of(st.sampled_from((1e-6, 0.5, 0.65, 0.85, 0.95, 1.0)), st.floats(0.01, 1))


def logits(rng: np.random.Generator, shape: tuple[int, ...], content: str) -> np.ndarray:
    """[..., tokens] float32"""
    y = rng.standard_normal(shape)
    y = {"wide": 20 * y, "narrow": 1e-3 * y, "equal": 0 * y + 0.7, "ties": np.rint(2 * y), "huge": 1e38 * y,
         "two values": np.where(y > 1, 5.0, -3.0), "subnormal": 1e-40 * y}.get(content, 3 * y)
    if content == "holes":
        y[rng.random(shape) < 0.4] = rng.choice([np.nan, np.inf, -np.inf])
    elif content == "nothing":
        y[...] = np.nan
    elif content == "one large":
        y[..., -1:] = 30
    return np.clip(y, -3e38, 3e38).astype(np.float32) if content == "huge" else y.astype(np.float32)


@st.composite
def rows(draw, calibrated=False):
    """The arguments that Top-p and Top-k share."""
    (batch, heads, group), tokens = draw(SHAPES), draw(token_counts)
    rng = np.random.default_rng(draw(seeds))
    # A correction is arithmetic, whose overflow and underflow have tests of their own.
    content = draw(st.sampled_from(CONTENTS[:-2] if calibrated else CONTENTS))
    y = logits(rng, (batch, heads * group, tokens), content)
    sigma = (rng.uniform(0, 2, y.shape) * draw(st.sampled_from((0.0, 0.3, 1.0)))).astype(np.float32)
    arguments = {"scores": Scores(y, sigma if calibrated or draw(st.booleans()) else None),
                 "kv_heads": draw(st.sampled_from((None, heads))), "sinks": draw(st.sampled_from((0, 1, 4))),
                 "recent": draw(st.sampled_from((0, 3, 40))), "block": draw(st.sampled_from((1, 8)))}
    if draw(st.booleans()):
        arguments["lengths"] = np.array(draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch)),
                                        np.int32)
    return arguments


@st.composite
def select_top_p(draw):
    calibrated = draw(st.sampled_from((*CALIBRATIONS, True)))
    least = draw(st.sampled_from((0, 1, 6)))
    most = draw(st.one_of(st.none(), st.integers(least, least + 40)))
    return {**draw(rows(bool(calibrated))), "p": draw(shares), "min_tokens": least, "max_tokens": most,
            "normalise": draw(st.sampled_from(NORMALISE)), "calibrated": calibrated}


@st.composite
def select_top_k(draw):
    return {**draw(rows()), "k": draw(st.one_of(st.integers(0, 20), st.integers(0, 600)))}
