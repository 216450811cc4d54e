"""The registry: one record per kernel drives tests, `kvbench list`, `verify`, `bench` and the documentation.

An operator that is not here does not exist.  `kvbench.ops` registers every kernel when it is imported.
"""
from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

BACKENDS = ("reference", "cpu", "cuda", "native", "simt")


@dataclass(frozen=True)
class Traffic:
    """The least that a call must move between memory and the processor, in bytes."""

    bytes_read: int
    bytes_written: int

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Kernel:
    """One operator: its reference, its implementations, and all that tests and benchmarks need to know about it.

    name        "<stem>.<verb>": the stem leads to reference/<stem>.py, cuda_src/<stem>.cu, kvbench/{cpu,ops}/<stem>.py
    reference   NumPy function with the operator's signature
    operator    function of kvbench.ops; `backend=` selects the implementation
    backends    those implemented
    axes        name -> values a benchmark may take, the default first
    inputs      (problem, rng) -> keyword arguments for both reference and operator, as NumPy arrays and plain objects
    traffic     problem -> Traffic
    agreement   (inputs, expected, actual) -> None, or AssertionError; exact for codes, a derived tolerance for floats
    error       (inputs, expected, actual) -> relative RMS error, for tables
    source      citation: arXiv id, section or theorem
    exact       for decode attention on codes: (inputs, dtype) -> {"keys", "values"}, the tokens that the codes stand
                for.  Exact attention on them is what one would run otherwise: its baselines become this kernel's
    idle_axes   problem -> axes that its other axes leave without effect: reports do not name them
    """

    name: str
    reference: Callable
    operator: Callable
    backends: tuple[str, ...]
    axes: Mapping[str, tuple]
    inputs: Callable
    traffic: Callable
    agreement: Callable
    error: Callable
    source: str
    exact: Callable | None = None
    idle_axes: Callable[[Mapping], tuple[str, ...]] = lambda problem: ()

    @property
    def stem(self) -> str:
        return self.name.split(".")[0]

    def problem(self, **overrides) -> dict:
        """One point of the axes: the defaults, changed by `overrides`.  Numeric axes take any positive integer."""
        problem = {axis: values[0] for axis, values in self.axes.items()}
        for axis, value in overrides.items():
            if axis not in self.axes:
                raise ValueError(f"{self.name}: unknown axis {axis!r}{nearest(axis, self.axes)}")
            allowed = self.axes[axis]
            numeric = all(isinstance(v, int) for v in allowed)
            if numeric and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ValueError(f"{self.name}: axis {axis}: expected a positive integer, got {value!r}")
            if not numeric and value not in allowed:
                raise ValueError(f"{self.name}: axis {axis}: expected one of {', '.join(map(str, allowed))}, "
                                 f"got {value!r}{nearest(str(value), allowed)}")
            problem[axis] = value
        return problem


KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    if kernel.name in KERNELS:
        raise ValueError(f"kernel {kernel.name!r} is registered twice")
    unknown = set(kernel.backends) - set(BACKENDS)
    if unknown:
        raise ValueError(f"kernel {kernel.name!r}: unknown backends {sorted(unknown)}")
    KERNELS[kernel.name] = kernel
    return kernel


def get(name: str) -> Kernel:
    """The kernel of that name; ValueError lists the nearest names."""
    load()
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}{nearest(name, KERNELS)}")
    return KERNELS[name]


def select(names: Iterable[str] | None = None) -> list[Kernel]:
    """Kernels by name or by stem ("attention" means all of its kernels); none named means all."""
    load()
    chosen = []
    for name in names or KERNELS:
        family = [k for k in KERNELS.values() if k.stem == name]
        chosen += [k for k in family or [get(name)] if k not in chosen]
    return chosen


def select_for(backend: str, names: Iterable[str] | None = None) -> tuple[list[Kernel], list[Kernel]]:
    """(kernels by name or by stem that have the backend, those that lack it).

    A stem means those of its kernels that have it.  ValueError if a kernel that is named lacks it, or none has it.
    """
    names = list(names or ())
    kernels = select(names)
    lacking = [kernel for kernel in kernels if backend not in kernel.backends]
    refused = [kernel for kernel in lacking if kernel.name in names or len(lacking) == len(kernels)]
    if refused:
        raise ValueError(f"{refused[0].name} has no backend {backend!r}; it has {', '.join(refused[0].backends)}")
    return [kernel for kernel in kernels if kernel not in lacking], lacking


def load() -> None:
    """Import what registers itself: the operators, and the decode step of the caches that are made of them."""
    import kvbench.cache_records
    import kvbench.ops  # noqa: F401  (here, not above: both import this module)


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean a, b?' or, when nothing is near, '; known: ...'."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(sorted(known))}"
