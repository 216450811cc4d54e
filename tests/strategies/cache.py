"""Arguments of whole decode steps."""
from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvbench import registry
from kvbench.verify import draw_problem
from strategies.arrays import seeds


@st.composite
def decode_step(draw):
    """Those of the registry: what an agreement of whole steps allows is worked out for the tokens that are drawn there.

    The parts have strategies of their own; tests/test_cache.py feeds caches anything.
    """
    kernel, rng = registry.get("cache.decode_step"), np.random.default_rng(draw(seeds))
    problem = draw_problem(kernel, rng) | {"preset": draw(st.sampled_from(kernel.axes["preset"])),
                                           "tokens": draw(st.sampled_from((1, 2, 70, 150, 300)))}
    return kernel.inputs(kernel.problem(**problem), rng)
