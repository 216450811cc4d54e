"""Named sets of cases: what one asks of a machine first, without knowing kernels and axes by name.

A suite finds its kernels in the registry by what they do, so a new kernel is in it from the day it is registered.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvbench.bench import axes
from kvbench.caches import PRESETS
from kvbench.registry import Kernel, nearest


@dataclass(frozen=True)
class Suite:
    """belongs(kernel): is it one of them?  axes: their values, unless the command line gives others."""

    summary: str
    belongs: Callable[[Kernel], bool]
    axes: dict[str, tuple] = field(default_factory=dict)
    quick: bool = False


def _is_step(kernel: Kernel) -> bool:
    """A whole decode step, made of other kernels."""
    return kernel.stem == "cache"


def _attends(kernel: Kernel) -> bool:
    """Attention of a query over a cache: operators of this kind can return their log-sum-exp, to be merged."""
    return "return_lse" in inspect.signature(kernel.operator).parameters and not _is_step(kernel)


def _verb(*words: str) -> Callable[[Kernel], bool]:
    return lambda kernel: kernel.name.partition(".")[2].split("_")[0] in words


SUITES = {
    "decode": Suite("attention over a cache, from 4K to 128K tokens", _attends,
                    {"heads": ("32:8",), "tokens": (4096, 32768, 131072)}),
    "encode": Suite("writing keys and values into a cache", _verb("encode"), {"kv_heads": (8,), "tokens": (32768,)}),
    "select": Suite("scoring tokens cheaply, and choosing those to attend to",
                    _verb("score", "select", "top", "quantize"), {"heads": ("32:8",), "tokens": (32768, 131072)}),
    "step": Suite("a whole decode step of every preset's cache", _is_step,
                  {"preset": tuple(PRESETS), "heads": ("32:8",), "tokens": (32768, 131072)}),
    "smoke": Suite("every kernel on a small case, quickly: does it all run?", lambda kernel: True,
                   {"tokens": (256,), "preset": tuple(PRESETS)}, quick=True),
}


def get(name: str) -> Suite:
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}{nearest(name, SUITES)}")
    return SUITES[name]


def kernels_of(name: str, kernels: Sequence[Kernel]) -> list[Kernel]:
    """Those of `kernels` that belong to the suite; ValueError if none does."""
    chosen = [kernel for kernel in kernels if get(name).belongs(kernel)]
    if not chosen:
        raise ValueError(f"suite {name!r} ({get(name).summary}) has none of {', '.join(k.name for k in kernels)}")
    return chosen


def axes_of(name: str, kernels: Sequence[Kernel], given: dict) -> dict:
    """The suite's values of the axes that these kernels have, and of none that `given` sets in one form or another."""
    known = {axis for kernel in kernels for axis in axes.names(kernel)}
    taken = set(given) | ({"kv_heads", "group"} if axes.HEADS in given else set()) \
        | ({axes.HEADS} if {"kv_heads", "group"} & set(given) else set())
    return {axis: values for axis, values in get(name).axes.items() if axis in known and axis not in taken}
