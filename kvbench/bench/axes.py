"""From the command line's axes to problems: typed by the registry, checked before anything runs, multiplied out."""
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from kvbench.registry import Kernel, nearest

HEADS = "heads"                            # query heads : KV heads, the way models state them
SUFFIXES = {"K": 1 << 10, "M": 1 << 20}    # tokens=32K


def check(kernels: Sequence[Kernel], axes: Mapping[str, Sequence]) -> None:
    """ValueError for an axis that none of the kernels has, or one without values."""
    known = {axis for kernel in kernels for axis in names(kernel)}
    for axis, values in axes.items():
        if axis not in known:
            raise ValueError(f"unknown axis {axis!r}{nearest(axis, known)}")
        if not values:
            raise ValueError(f"axis {axis!r}: expected {axis}=VALUE,..., got no value")
    clash = [axis for axis in ("kv_heads", "group") if axis in axes]
    if HEADS in axes and clash:
        raise ValueError(f"axis 'heads' sets kv_heads and group: leave out {' and '.join(clash)}")


def problems(kernel: Kernel, axes: Mapping[str, Sequence]) -> list[dict]:
    """The product of the given values, other axes at their defaults; axes that this kernel lacks do not concern it."""
    choices = [[_typed(kernel, axis, value) for value in dict.fromkeys(values)]
               for axis, values in axes.items() if axis in names(kernel)]
    return [kernel.problem(**{axis: value for part in parts for axis, value in part.items()})
            for parts in itertools.product(*choices)]


def names(kernel: Kernel) -> list[str]:
    """The axes that the command line takes for this kernel."""
    return [*kernel.axes, *([HEADS] if {"kv_heads", "group"} <= set(kernel.axes) else [])]


def _typed(kernel: Kernel, axis: str, value) -> dict:
    if axis == HEADS:
        return _heads(value)
    examples = kernel.axes[axis]
    if isinstance(value, str):
        named = {str(example): example for example in examples}
        value = _integer(value) if all(type(example) is int for example in examples) else named.get(value, value)
    kernel.problem(**{axis: value})        # refuses what the kernel does not take, and says what it does
    return {axis: value}


def _heads(value) -> dict:
    query, _, kv = str(value).partition(":")
    if not (query.isdecimal() and kv.isdecimal() and int(kv) and int(query) and int(query) % int(kv) == 0):
        raise ValueError(f"axis 'heads': expected QUERY:KV such as 32:8, the first a multiple of the second, "
                         f"got {value!r}")
    return {"kv_heads": int(kv), "group": int(query) // int(kv)}


def _integer(text: str) -> int | str:
    digits, factor = (text[:-1], SUFFIXES[text[-1].upper()]) if text[-1:].upper() in SUFFIXES else (text, 1)
    return int(digits) * factor if digits.isdecimal() else text
