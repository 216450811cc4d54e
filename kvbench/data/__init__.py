"""The shipped sample: real queries, keys and values of one KV head (README.md says where they are from)."""
from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np

SAMPLE = "smollm2_135m_layer22_head1.safetensors"


@dataclass(frozen=True)
class Sample:
    """Consecutive decode steps of a model at the end of a long text, for one KV head.

    keys      : [1, 1, tokens, head_dim] float16 - from token 0, after RoPE
    values    : [1, 1, tokens, head_dim] float16
    queries   : [1, group, steps, head_dim] float16 - after RoPE, of the last `steps` tokens
    positions : [steps] int32 - the query at position p attends to keys 0..p; the last one is tokens - 1
    metadata  : model, layer, head, text, licence and origin, as strings
    """

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    positions: np.ndarray
    metadata: dict[str, str]


def sample() -> Sample:
    """The sample that `kvbench demo` runs on."""
    from safetensors import safe_open

    with resources.as_file(resources.files(__package__) / SAMPLE) as path, safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in ("keys", "values", "queries", "positions")}
        return Sample(**tensors, metadata=file.metadata())
