"""A kernel's operator as a call without arguments, as a decode loop would make it: nothing is allocated again."""
from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

from kvbench import arrays, trees


class OperatorCall:
    """An operator with the memory that it would otherwise allocate: workspace and, after the first call, outputs.

    The outputs of an operator stand together in its signature, from `out` on, in the order in which they are returned;
    a module whose operators take a `workspace` has a function of that name, or one for an operator alone, such as
    `select_top_k_workspace`.  Its parameters are axes of the problem, or arguments of the operator.
    """

    def __init__(self, operator: Callable, backend: str, inputs: dict, problem: dict, place):
        self._operator, self._arguments = operator, {**inputs, "backend": backend}
        parameters = list(inspect.signature(operator).parameters)
        after = parameters[parameters.index("out"):] if "out" in parameters else []
        ends = [i for i, name in enumerate(after) if name in ("workspace", "backend", "stream")]
        self._outputs = after[:min(ends, default=len(after))]
        self._needs_workspace, self._problem, self._place = "workspace" in parameters, problem, place

    def __call__(self):
        if self._needs_workspace:          # with the first call, so that its memory counts with that of the outputs
            with self._place.current(self._place.framework):
                self._arguments["workspace"] = _workspace(self._operator, self._arguments, self._problem, self._place)
            self._needs_workspace = False
        result = self._operator(**self._arguments)
        if self._outputs:
            self._arguments |= zip(self._outputs, result if isinstance(result, tuple) else (result,))
            self._outputs = []
        return result


class Rotating:
    """Calls on several sets of inputs, one after the other: by the time a set comes round again it has left the cache.

    That is how a model runs: between two calls on one layer's cache lie those of all other layers.
    """

    def __init__(self, calls: list[Callable]):
        self.calls = calls

    def __call__(self) -> list:
        return [call() for call in self.calls]


def input_bytes(inputs) -> int:
    return sum(arrays.borrow(array, path).span_bytes for path, array in trees.arrays_of(inputs).items())


def duplicate(inputs, device: arrays.Device):
    """The same inputs in other memory of the device; what lies elsewhere (rotations, for a GPU) is shared."""
    def copy(path, value):
        array = arrays.borrow(value, path)
        if array.device != device:
            return value
        new = arrays.empty(array.shape, array.dtype, array.device, array.framework)
        new.copy_from(array)
        return new.give()

    return trees.apply(copy, inputs)


def input_sets(size: int, cache_bytes: int, most: int) -> int | None:
    """How many sets of `size` bytes fill twice the cache; None where one does, and where more than `most` would."""
    sets = -(-2 * cache_bytes // max(size, 1))
    return sets if 1 < sets <= most else None


def _workspace(operator: Callable, arguments: dict, problem: dict, place):
    module = sys.modules[inspect.unwrap(operator).__module__]
    make = getattr(module, f"{operator.__name__}_workspace", None) or module.workspace
    known = {**arguments, **problem, "device": place.device, "framework": place.framework}
    if "kv_heads" in problem and "group" in problem:
        known["q_heads"] = problem["kv_heads"] * problem["group"]
    return make(**{name: known[name] for name in inspect.signature(make).parameters if name in known})
