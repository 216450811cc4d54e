"""Compare kernels with their references on drawn problems.

`kvbench verify`, and the machinery of tests/test_kernels.py.
"""
from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from kvbench import loaders, trees
from kvbench.arrays import borrow, upload
from kvbench.reference.block_gtq import Plan
from kvbench.reference.rotation import Rotation
from kvbench.reference.turboquant import Projection
from kvbench.registry import Kernel

# Sizes of drawn problems; axes that are not here take their registry values.
SMALL = {"tokens": 150, "batch": 3, "kv_heads": 3, "group": 16, "parts": 8}


@dataclass(frozen=True)
class Verdict:
    """What came of comparing one kernel on one backend: how many problems, and what went wrong, each with its
    problem."""

    kernel: str
    backend: str
    examples: int
    failures: list[str]

    @property
    def held(self) -> bool:
        return not self.failures


def verify(kernel: Kernel, backend: str, examples: int = 20, seed: int = 0) -> Verdict:
    """Run `examples` drawn problems and compare each with the reference; BackendUnavailable if the backend is
    missing."""
    loaders.require(backend)
    failures = []
    for example in range(examples):
        rng = np.random.default_rng([seed, example, zlib.crc32(kernel.name.encode())])
        problem = draw_problem(kernel, rng)
        inputs = kernel.inputs(kernel.problem(**problem), rng)
        try:
            compare(kernel, inputs, backend, schedule=int(rng.integers(1, 2**63)) if example % 2 else 0)
        except Exception as error:   # every problem is tried; a crash is a failure like a wrong number
            failures.append(f"{problem} (seed {seed}, example {example}): {type(error).__name__}: {error}")
    return Verdict(kernel.name, backend, examples, failures)


def draw_problem(kernel: Kernel, rng: np.random.Generator) -> dict:
    """A small problem: sizes from 1 up, every other axis from its values."""
    return {axis: int(rng.integers(1, SMALL[axis] + 1)) if axis in SMALL else values[int(rng.integers(len(values)))]
            for axis, values in kernel.axes.items()}


def compare(kernel: Kernel, inputs: dict, backend: str, *, schedule: int = 0, ftz: bool = False) -> None:
    """AssertionError unless the operator on `backend` agrees with the reference on these inputs."""
    with np.errstate(all="ignore"):
        expected = kernel.reference(**inputs)
        kernel.agreement(inputs, expected, run(kernel, inputs, backend, schedule=schedule, ftz=ftz))


def run(kernel: Kernel, inputs: dict, backend: str, *, schedule: int = 0, ftz: bool = False):
    """The operator's result on `backend` as NumPy arrays; GPU backends get the inputs in device memory."""
    if backend in ("cuda", "native"):
        inputs = {name: on_device(value, "cuda") for name, value in inputs.items()}
    with loaders.simt_schedule(schedule, ftz):
        return to_host(kernel.operator(**inputs, backend=backend))


def on_device(value, device):
    """An input with its arrays in device memory.  A rotation, a projection, a plan stay: operators take them there."""
    if isinstance(value, (Rotation, Projection, Plan)):
        return value
    return trees.apply(lambda _, x: upload(x, device).give() if isinstance(x, np.ndarray) else x, value)


def to_host(result):
    """Arrays of any framework as NumPy arrays, inside tuples and dataclasses too."""
    return trees.apply(lambda path, array: borrow(array, path or "result").to_host(), result)
