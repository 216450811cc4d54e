"""Timing on the host: a monotonic clock around the call.

    cold   other data is written (or read, by choice) over every cache before each sample
    hot    back-to-back calls, as many as the clock needs; a sample is their mean
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvbench import arrays, trees
from kvbench.bench import machine

HOT_SECONDS = 200e-6       # least length of a hot sample, a thousand times the clock's resolution


class Cpu:
    """The host as a place to run a case: inputs, stopwatches, yardsticks."""

    kind, framework = "cpu", "numpy"
    device = arrays.Device("cpu")

    def __init__(self, clock: Callable[[], float] = time.perf_counter, flush: str = "write"):
        self.clock, self.flush_by = clock, flush
        self.threads = machine.usable_cores()
        self.cache_bytes = machine.cache_bytes()

    def inputs(self, kernel, problem: dict, seed: int) -> tuple[dict, str]:
        """The inputs of a case, and where they were drawn."""
        return kernel.inputs(problem, np.random.default_rng(seed)), "host"

    def stopwatch(self, call: Callable, framework: str = "numpy") -> Stopwatch:
        return Stopwatch(call, self)

    def yardsticks(self) -> dict[str, tuple[Stopwatch, int, tuple[str, ...]]]:
        """name -> (stopwatch, bytes moved per call, ways to time it).  The buffers are larger than any cache."""
        source = np.ones(2 * self._flush_buffer.size, np.int64)
        target = np.zeros_like(source)
        return {
            "copy": (self.stopwatch(lambda: self._on_every_thread(np.copyto, target, source)), 2 * source.nbytes,
                     ("hot",)),
            "read": (self.stopwatch(lambda: self._on_every_thread(np.max, source)), source.nbytes, ("hot",)),
            "empty_call": (self.stopwatch(lambda: None), 0, ("hot",)),
        }

    def flush(self) -> None:
        """Write, or read, twice the last-level cache, each thread its part, so that the caches of the single cores go
        too."""
        write, read = (lambda part: np.add(part, 1, out=part)), np.max
        self._on_every_thread(write if self.flush_by == "write" else read, self._flush_buffer)

    def describe(self) -> dict:
        """What a result says about the machine besides its processor."""
        return {"gpu": None, "state_before": {}}

    def current(self, framework: str):
        """The host has no streams."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def memory(self, framework: str):
        """Yields a dictionary whose "peak" is, afterwards, by how many bytes the resident set grew at most; None where
        the system does not tell.  Pages that were resident before and are used again do not count."""
        found: dict[str, int | None] = {"peak": None}
        before = machine.reset_peak_resident()
        yield found
        if before is not None:
            found["peak"] = max(0, machine.resident()["peak"] - before)

    def clock_mhz(self) -> None:
        """Of a GPU only: each core of a processor has a clock of its own."""

    def profiled(self, call: Callable) -> None:
        """Run the call once: whatever profiles the process sees it."""
        call()

    def release(self) -> None:
        """Nothing outlives a case here."""

    def state(self) -> dict:
        """Clocks of a processor change per core and per microsecond: nothing to read that would mean something."""
        return {}

    @functools.cached_property
    def _flush_buffer(self) -> np.ndarray:
        return np.zeros(2 * self.cache_bytes // 8, np.int64)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)

    def _on_every_thread(self, work: Callable, *whole: np.ndarray) -> None:
        """work on equal parts of the arrays, one part a thread: inside NumPy they do not wait for each other."""
        parts = zip(*(np.array_split(array, self.threads) for array in whole))
        list(self._pool.map(lambda part: work(*part), parts))


class Stopwatch:
    """Times one call.  `result` is what the last once() returned; `note` says why a better timer could not be used."""

    timer = "monotonic clock"
    note = None

    def __init__(self, call: Callable, cpu: Cpu):
        self._call, self._cpu = call, cpu
        self.result = call()               # compiles and allocates
        self._repeats = None

    def once(self) -> None:
        """Run as in a sample, untimed."""
        self.result = self._call()

    def poison(self) -> None:
        """Set every bit of the outputs (NaN, -1), so that what the next run leaves unwritten shows."""
        for name, output in trees.arrays_of(self.result).items():
            memory = arrays.borrow(output, name)
            if not memory.readonly:
                ctypes.memset(memory.pointer, 0xFF, memory.span_bytes)

    def cold(self, count: int) -> list[float]:
        """Seconds of `count` calls, each after a flush of the caches."""
        samples = []
        for _ in range(count):
            self._cpu.flush()
            samples.append(self._seconds(1))
        return samples

    def hot(self, count: int) -> list[float]:
        """Seconds per call of `count` runs of back-to-back calls."""
        if self._repeats is None:
            self._repeats = max(1, math.ceil(HOT_SECONDS / max(self._seconds(1), 1e-7)))
        return [self._seconds(self._repeats) / self._repeats for _ in range(count)]

    def _seconds(self, repeats: int) -> float:
        call, clock = self._call, self._cpu.clock
        start = clock()
        for _ in range(repeats):
            call()
        return clock() - start
