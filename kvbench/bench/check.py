"""Is the result right?  The kernel's own agreement with its reference, on the very inputs that are timed.

A small case is compared whole.  For a large one the float64 reference would take minutes, so it is compared in parts:
blocks along axes whose slices the reference treats independently, such as sequences of a batch and KV heads.  Which
axes these are is not assumed but observed, on a small problem: the dimension that doubles with the axis is found in
every array, and the reference of each half must equal that half of the reference.  The result says which parts were
compared.
"""
from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

import numpy as np

from kvbench import arrays, trees

WHOLE_BYTES = 64 << 20         # inputs up to here are compared whole
PART_BYTES = 16 << 20
PROBE_SIZE = 256               # no axis of the small problem is longer
LEAST_PARTS = 2                # the first and the last


@dataclass(frozen=True)
class Verdict:
    """What disagreed, if anything; relative RMS error, the worst of the parts; the parts compared, and of how many."""

    agrees: bool
    failure: str | None
    error: float | None
    parts: tuple[str, ...]
    of: int

    def summary(self) -> dict:
        return {"agrees": self.agrees, "failure": self.failure, "parts": list(self.parts), "of": self.of}


@dataclass
class Part:
    name: str
    cuts: dict[str, tuple[int, int]]               # axis -> (start, stop)
    inputs: dict | None = None                     # on the host, once computed
    expected: object = None
    accepted: object = None                        # a result that agreed: the same bits need no second look


class Check:
    """The expected outputs of one case, computed once, and compared with as many results as there are contenders."""

    def __init__(self, kernel, problem: dict, inputs: dict, seed: int = 0, seconds: float = 5.0):
        self._kernel, self._problem, self._inputs = kernel, problem, inputs
        total = sum(math.prod(a.shape) * arrays.borrow(a, name).itemsize for name, a in trees.arrays_of(inputs).items())
        self._dimensions = separable(kernel, problem) if total > WHOLE_BYTES else {}
        self._parts = self._cut(total, seed)
        self.of = len(self._parts)
        self._seconds = seconds
        self._expect()

    def agreement(self, result) -> Verdict:
        """By the kernel's own rule: exact for codes, its stated tolerance for floats."""
        def agree(part, actual):
            if part.accepted is None or not _identical(part.accepted, actual):
                self._kernel.agreement(part.inputs, part.expected, actual)
                part.accepted = actual
        return self._compare(result, agree, lambda part, actual: self._kernel.error(part.inputs, part.expected, actual))

    def closeness(self, result, limit: float) -> Verdict:
        """For a baseline: the relative RMS error of its output, the reference's first, must not exceed `limit`."""
        def error(part, actual):
            return relative_rms(part.expected, actual)

        def agree(part, actual):
            if not error(part, actual) <= limit:       # NaN must not pass
                raise AssertionError(f"relative RMS error {error(part, actual):.2e}, at most {limit:.2e} expected")

        if isinstance(self._parts[0].expected, tuple) and not isinstance(result, tuple):
            result = (result,)                         # it stands, and is cut, where the reference's first output does
        return self._compare(result, agree, error)

    def _compare(self, result, agree, error) -> Verdict:
        errors, failure = [], None
        start = time.monotonic()
        for i, part in enumerate(self._parts):
            try:
                actual = _take(result, part.cuts, {axis: outputs for axis, (_, outputs) in self._dimensions.items()},
                               self._problem, copy=True)
                errors.append(float(error(part, actual)))
                agree(part, actual)
            except Exception as wrong:     # a wrong shape or dtype shows as any exception, and is a failure too
                failure = f"{part.name}: {_first_line(wrong)}"
                break
            if i + 1 >= LEAST_PARTS and time.monotonic() - start >= self._seconds:
                del self._parts[i + 1:]        # a tolerance may take longer than the reference: no more for anybody
                break
        worst = max(errors, default=math.nan, key=lambda e: math.inf if math.isnan(e) else e)
        return Verdict(failure is None, failure, worst if math.isfinite(worst) else None,
                       tuple(part.name for part in self._parts), self.of)

    def _cut(self, total: int, seed: int) -> list[Part]:
        """The parts, in the order in which they are worth comparing: first, last, the others at random."""
        lengths, size = {}, total
        for axis in self._dimensions:
            if size <= PART_BYTES:
                break
            lengths[axis] = max(1, int(self._problem[axis] * PART_BYTES / size))
            size *= lengths[axis] / self._problem[axis]
        ranges = [[(axis, start, min(start + length, self._problem[axis]))
                   for start in range(0, self._problem[axis], length)] for axis, length in lengths.items()]
        blocks = list(itertools.product(*ranges))
        if len(blocks) > 2:
            middle = np.random.default_rng(seed).permutation(np.arange(1, len(blocks) - 1))
            blocks = [blocks[0], blocks[-1], *(blocks[i] for i in middle)]
        return [Part(" ".join(f"{axis} {start}:{stop}" for axis, start, stop in block) or "all",
                     {axis: (start, stop) for axis, start, stop in block}) for block in blocks]

    def _expect(self) -> None:
        """Compute the reference part by part until the time is used up; keep the parts that were computed."""
        start = time.monotonic()
        for i, part in enumerate(self._parts):
            part.inputs = _take(self._inputs, part.cuts,
                                {axis: inputs for axis, (inputs, _) in self._dimensions.items()}, self._problem)
            part.expected = self._kernel.reference(**part.inputs)
            if i + 1 >= LEAST_PARTS and time.monotonic() - start >= self._seconds:
                break
        self._parts = [part for part in self._parts if part.inputs is not None]


def separable(kernel, problem: dict) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """axis -> ({input path: dimension}, {output path: dimension}) for the axes along which the reference can be cut."""
    found: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    sizes = {axis: value for axis, value in problem.items() if isinstance(value, int) and not isinstance(value, bool)}
    small = dict(problem, **{axis: min(value, PROBE_SIZE) for axis, value in sizes.items()})
    for axis, value in sizes.items():
        if value < 2:
            continue
        half = max(1, min(value, PROBE_SIZE) // 2)
        try:
            inputs = [kernel.inputs(dict(small, **{axis: size}), np.random.default_rng(0)) for size in (half, 2 * half)]
            outputs = [kernel.reference(**given) for given in inputs]
            of_inputs, of_outputs = _doubled(*inputs), _doubled(*outputs)
            whole = {axis: 2 * half}
            halves = [{axis: (0, half)}, {axis: (half, 2 * half)}]
            independent = of_inputs and of_outputs and all(
                _same(kernel.reference(**_take(inputs[1], cut, {axis: of_inputs}, whole)),
                      _take(outputs[1], cut, {axis: of_outputs}, whole)) for cut in halves)
        except Exception:      # a size that the kernel does not take, or halves that do not fit: cannot be cut here
            continue
        used = [(path, dimension) for pair in found.values() for side in pair for path, dimension in side.items()]
        if independent and not any(item in used for side in (of_inputs, of_outputs) for item in side.items()):
            found[axis] = of_inputs, of_outputs
    return found


def relative_rms(expected, actual) -> float:
    """||actual - expected|| / ||expected|| of the first output."""
    expected, actual = (np.asarray(x[0] if isinstance(x, tuple) else x, np.float64) for x in (expected, actual))
    if expected.shape != actual.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), np.finfo(float).tiny))


def _take(tree, cuts: dict, dimensions: dict, problem: dict, copy: bool = False):
    """The part of the tree inside the cuts, as host arrays; whole NumPy arrays as they are, unless a copy is wanted.

    A dimension that belongs to an axis holds an equal share for each unit of it: `group` query heads per KV head.
    """
    def take(path, value):
        ranges = [(dimensions[axis][path], axis, cut) for axis, cut in cuts.items() if path in dimensions[axis]]
        if not ranges and not copy and isinstance(value, np.ndarray):
            return value
        array = arrays.borrow(value, path or "result")
        for dimension, axis, (start, stop) in ranges:
            share = array.shape[dimension] // problem[axis]
            array = array.narrow(dimension, start * share, stop * share)
        return array.to_host()

    return trees.apply(take, tree)


def _doubled(small, large) -> dict[str, int]:
    """path -> the one dimension that is twice as long in `large`; arrays of equal shape are left out."""
    small, large = trees.arrays_of(small), trees.arrays_of(large)
    found = {}
    for path, array in small.items():
        before, after = array.shape, large[path].shape
        if before == after:
            continue
        changed = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
        if len(before) != len(after) or len(changed) != 1 or after[changed[0]] != 2 * before[changed[0]]:
            raise ValueError(f"{path}: {before} against {after}")
        found[path] = changed[0]
    return found


def _same(first, second) -> bool:
    first, second = trees.arrays_of(first), trees.arrays_of(second)
    return first.keys() == second.keys() and all(
        np.allclose(first[path], second[path], rtol=1e-9, atol=1e-12, equal_nan=True) for path in first)


def _identical(first, second) -> bool:
    first, second = trees.arrays_of(first), trees.arrays_of(second)
    return first.keys() == second.keys() and all(
        first[path].dtype == second[path].dtype and first[path].tobytes() == second[path].tobytes() for path in first)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}" if not isinstance(error, AssertionError) else \
        (text[0] if text else "disagrees with the reference")
