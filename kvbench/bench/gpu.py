"""Timing on an NVIDIA GPU: events around the replay of a CUDA graph, on one stream, for kernels and baselines alike.

    cold   a buffer of at least twice the L2 is written (or read, by choice) before each sample, on the same stream and
           outside of the events
    hot    many calls captured in one graph; a sample is the graph's time over the calls

The flush also hides the host: while it runs, the start event, the graph and the end event are queued, so the GPU meets
them without a gap.  Nothing is subtracted; what the events alone cost is in the yardsticks.  A call that cannot be
captured is timed between plain events, and the result says so (`timer`, `note`).

A flush that writes leaves the L2 full of written lines, whose way to memory falls into the cold sample: up to the size
of the L2 on top of what the contender moves, which weighs the more the less that is.  A flush that reads leaves lines
that are just dropped, as attention in a decode step finds them: the weights have been read before it.
"""
from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable

import numpy as np

from kvbench import arrays, trees
from kvbench.bench import machine
from kvbench.errors import BackendUnavailable
from kvbench.verify import on_device

LEAST_FLUSH_BYTES = 256 << 20
HOT_SECONDS = 200e-6           # least length of a hot sample: far above what events cost the GPU and a launch the host
MOST_HOT_CALLS = 200
YARDSTICK_BYTES = 512 << 20    # per buffer: ten times the L2, long enough that ramps at both ends do not count
SPIN_CYCLES = 2_000_000        # about a millisecond, a thousand times the resolution of the GPU's timer
ON_DEVICE_ELEMENTS = 1 << 16   # smaller draws stay on the host: they are lengths, seeds, choices

YARDSTICK_KERNELS = r"""
// Reads `count` 16-byte words once.  One thread in 2^32 writes what it saw; without that the loads could be dropped.
extern "C" __global__ void read_words(const uint4* words, long long count, unsigned* seldom)
{
    unsigned seen = 0;
    const long long stride = (long long)gridDim.x * blockDim.x;
    #pragma unroll 8
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const uint4 word = words[i];
        seen ^= word.x ^ word.y ^ word.z ^ word.w;
    }
    if (seen == 0x9e3779b9u) *seldom = seen;
}
extern "C" __global__ void empty() {}
// Spins for `cycles` of this multiprocessor's clock, and tells how many cycles and nanoseconds that were.
extern "C" __global__ void spin(long long cycles, long long* found)
{
    long long begun, ended;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begun));
    const long long start = clock64();
    long long passed = 0;
    while (passed < cycles) passed = clock64() - start;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ended));
    found[0] = passed;
    found[1] = ended - begun;
}
"""


class Gpu:
    """The first GPU as a place to run a case: inputs, stopwatches, yardsticks.  Streams, events, graphs: CuPy's."""

    kind, framework = "cuda", "cupy"

    def __init__(self, flush: str = "write"):
        try:
            import cupy
        except ImportError as error:
            raise BackendUnavailable("bench: timing on a GPU uses CuPy's events and graphs, also for backend 'native': "
                                     "pip install 'kvbench[cuda13]'") from error
        self.cupy = cupy
        self.facts = machine.Gpu(0)
        self.device = arrays.Device("cuda", 0)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.cache_bytes = self.properties["l2CacheSize"]
        self.flush_bytes = max(LEAST_FLUSH_BYTES, 2 * self.cache_bytes)
        self.flush_by = flush
        self._flush_buffer = cupy.zeros(self.flush_bytes, cupy.uint8)

    def inputs(self, kernel, problem: dict, seed: int) -> tuple[dict, str]:
        """The inputs of a case on the device, and where they were drawn.

        Large arrays are drawn on the device: gigabytes of normal variates take minutes on one core.  Where the kernel's
        input maker cannot work on CuPy's arrays, NumPy draws on the host, and the second value says why.
        """
        with self.stream:
            try:
                drawn, where = kernel.inputs(problem, DeviceGenerator(self.cupy, seed)), "device"
            except Exception as error:     # CuPy refuses in many ways; a fault of the input maker shows again below
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                drawn, where = kernel.inputs(problem, np.random.default_rng(seed)), f"host ({reason})"
            placed = {name: on_device(value, self.device) for name, value in drawn.items()}
        self.cupy.cuda.runtime.deviceSynchronize()
        self.release()
        return placed, where

    def stopwatch(self, call: Callable, framework: str = "cupy", graph: bool = True) -> Stopwatch:
        return Stopwatch(call, self, framework, graph)

    def yardsticks(self) -> dict[str, tuple[Stopwatch, int, tuple[str, ...]]]:
        """name -> (stopwatch, bytes moved per call, ways to time it)."""
        cupy = self.cupy
        free, _ = cupy.cuda.runtime.memGetInfo()
        size = min(YARDSTICK_BYTES, free // 8) // 4096 * 4096
        with self.stream:
            source, target = cupy.random.default_rng(0).random(size // 8), cupy.zeros(size // 8)
        empty = self._module.get_function("empty")

        def copy():
            target.data.copy_from_device_async(source.data, size, self.stream)

        return {
            # Plain events: a copy inside a graph may go to a copy engine, which is not what a kernel competes with.
            "copy": (self.stopwatch(copy, graph=False), 2 * size, ("hot",)),
            "read": (self.stopwatch(lambda: self._read(source)), size, ("hot",)),
            "empty_kernel": (self.stopwatch(lambda: empty((1,), (32,), ())), 0, ("cold", "hot")),
            "empty_graph": (self.stopwatch(lambda: None), 0, ("cold",)),
        }

    def flush(self) -> None:
        if self.flush_by == "write":
            self._flush_buffer.data.memset_async(0, self.flush_bytes, self.stream)
        else:
            with self.stream:
                self._read(self._flush_buffer)

    def _read(self, source) -> None:
        """Read the whole of a device array once, on the current stream."""
        blocks = 8 * self.properties["multiProcessorCount"]
        self._module.get_function("read_words")((blocks,), (256,), (source, np.int64(source.nbytes // 16),
                                                                     self._seldom))

    @functools.cached_property
    def _seldom(self):
        return self.cupy.zeros(1, np.uint32)

    @functools.cached_property
    def flush_seconds(self) -> float:
        with self.stream:
            self.flush()
            return self.elapsed([self.between_events(self.flush) for _ in range(5)])[-1]

    def between_events(self, work: Callable) -> tuple:
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record(self.stream)
        work()
        end.record(self.stream)
        return start, end

    def elapsed(self, pairs: list[tuple]) -> list[float]:
        """Seconds between the events of each pair, once all have happened."""
        self.stream.synchronize()
        return [self.cupy.cuda.get_elapsed_time(start, end) * 1e-3 for start, end in pairs]

    @functools.cached_property
    def _module(self):
        return self.cupy.RawModule(code=YARDSTICK_KERNELS)

    def clock_mhz(self) -> float:
        """The clock of a multiprocessor right now, behind whatever is queued: a GPU that is held down shows at once."""
        with self.stream:
            found = self.cupy.zeros(2, np.int64)
            self._module.get_function("spin")((1,), (1,), (np.int64(SPIN_CYCLES), found))
            cycles, nanoseconds = found.get(stream=self.stream).tolist()
        return 1e3 * cycles / nanoseconds

    @contextlib.contextmanager
    def memory(self, framework: str):
        """Yields a dictionary whose "peak" is, afterwards, the most memory in bytes that was allocated meanwhile."""
        found: dict[str, int | None] = {"peak": None}
        if framework == "torch":
            import torch

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield found
            found["peak"] = torch.cuda.max_memory_allocated() - before
        else:
            with allocations(self.cupy) as seen:
                yield found
            found["peak"] = seen.peak

    def profiled(self, call: Callable) -> None:
        """Run the call once between cudaProfilerStart and cudaProfilerStop: `ncu --profile-from-start off` sees it
        alone."""
        runtime = self.cupy.cuda.runtime
        self.stream.synchronize()
        runtime.profilerStart()
        call()
        self.stream.synchronize()
        runtime.profilerStop()

    @functools.cached_property
    def torch_stream(self):
        """This stream as PyTorch sees it."""
        import torch

        return torch.cuda.ExternalStream(self.stream.ptr, device=torch.device("cuda", 0))

    @contextlib.contextmanager
    def current(self, framework: str):
        """Make the stream current, in CuPy and, for a PyTorch call, in PyTorch."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stream)
            if framework == "torch":
                import torch

                stack.enter_context(torch.cuda.stream(self.torch_stream))
            yield

    def describe(self) -> dict:
        """What a result says about the machine besides its processor."""
        return {"gpu": {**self.facts.describe(), "flush_bytes": self.flush_bytes}, "state_before": self.state()}

    def state(self) -> dict:
        """Clocks, temperature, power now."""
        return self.facts.state()

    def release(self) -> None:
        """Give cached memory back between cases, so that one framework's cache does not starve the other."""
        self.stream.synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()


def allocations(cupy):
    """A CuPy memory hook that knows the most bytes in use, of those that were allocated while it was on."""
    class Allocations(cupy.cuda.MemoryHook):
        name = "kvbench allocations"
        in_use = peak = 0

        def __init__(self):
            self._sizes = {}

        def malloc_postprocess(self, *, mem_size, mem_ptr, **_):
            self._sizes[mem_ptr] = mem_size
            self.in_use += mem_size
            self.peak = max(self.peak, self.in_use)

        def free_postprocess(self, *, mem_ptr, **_):
            self.in_use -= self._sizes.pop(mem_ptr, 0)

    return Allocations()


class Stopwatch:
    """Times one call.  `result` is what it wrote; `note` says why a better timer could not be used."""

    def __init__(self, call: Callable, gpu: Gpu, framework: str, graph: bool):
        self._call, self._gpu, self._framework = call, gpu, framework
        self.timer, self.note = "graph", None
        with gpu.current(framework):
            self.result = call()                       # compiles and allocates
            gpu.stream.synchronize()
            try:
                if not graph:
                    raise _NoGraph
                self._launch, self.result = self._capture(1)
            except _NoGraph:
                self.timer, self._launch = "events", call
            except Exception as error:                 # whatever a framework raises when a call cannot be captured
                self.timer, self._launch = "events", call
                self.note = f"no graph: {type(error).__name__}: {error}".splitlines()[0]
        self._hot = None

    def once(self) -> None:
        with self._gpu.current(self._framework):
            returned = self._launch()
        if self.timer == "events":
            self.result = returned
        self._gpu.stream.synchronize()

    def poison(self) -> None:
        """Set every bit of the outputs (NaN, -1), so that what the next run leaves unwritten shows.

        This also catches a graph that captured nothing because the call went to another stream.
        """
        for name, output in trees.arrays_of(self.result).items():
            memory = arrays.borrow(output, name, stream=self._gpu.stream.ptr)
            self._gpu.cupy.cuda.runtime.memsetAsync(memory.pointer, 0xFF, memory.span_bytes, self._gpu.stream.ptr)
        self._gpu.stream.synchronize()

    def cold(self, count: int) -> list[float]:
        """Seconds of `count` calls, each after a flush of the L2."""
        gpu = self._gpu
        with gpu.current(self._framework):
            pairs = []
            for _ in range(count):
                for _ in range(self._flushes):
                    gpu.flush()
                pairs.append(gpu.between_events(self._launch))
            return gpu.elapsed(pairs)

    def hot(self, count: int) -> list[float]:
        """Seconds per call of `count` runs of back-to-back calls."""
        gpu = self._gpu
        with gpu.current(self._framework):
            if self._hot is None:
                self._hot = self._prepare_hot()
            repeats, launch = self._hot
            launch()                                   # untimed: keeps the GPU busy while the samples are queued
            return [seconds / repeats for seconds in gpu.elapsed([gpu.between_events(launch) for _ in range(count)])]

    @functools.cached_property
    def _flushes(self) -> int:
        """Flushes that last longer than the host needs to queue one launch: with a graph one is plenty."""
        if self.timer == "graph":
            return 1
        self._launch()
        start = time.perf_counter()
        self._launch()
        seconds = time.perf_counter() - start
        self._gpu.stream.synchronize()
        return 1 + math.ceil(1.5 * seconds / self._gpu.flush_seconds)

    def _prepare_hot(self) -> tuple[int, Callable]:
        gpu = self._gpu
        self._launch()
        single = min(gpu.elapsed([gpu.between_events(self._launch) for _ in range(3)]))
        repeats = max(1, min(MOST_HOT_CALLS, math.ceil(HOT_SECONDS / max(single, 1e-6))))
        if self.timer == "graph":
            return repeats, self._capture(repeats)[0]

        def several():
            for _ in range(repeats):
                self._call()

        return repeats, several

    def _capture(self, repeats: int) -> tuple[Callable, object]:
        """(launch, result): a graph of `repeats` calls and what the last of them returned."""
        return (self._capture_torch if self._framework == "torch" else self._capture_cupy)(repeats)

    def _capture_cupy(self, repeats):
        cupy, stream = self._gpu.cupy, self._gpu.stream
        # What a call allocates while it is captured belongs to the graph for good: a pool of its own keeps others out.
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            try:
                for _ in range(repeats):
                    result = self._call()
            except BaseException:
                with contextlib.suppress(Exception):   # the capture is already invalid; this only ends it
                    stream.end_capture()
                raise
            graph = stream.end_capture()
        graph.upload(stream)

        def launch(_owner=(pool, result)):
            graph.launch(stream)

        return launch, result

    def _capture_torch(self, repeats):
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._gpu.torch_stream, capture_error_mode="relaxed"):
            for _ in range(repeats):
                result = self._call()

        def launch(_owner=result):
            graph.replay()                             # on the current stream, which is ours

        return launch, result


class _NoGraph(Exception):
    """Plain events were asked for."""


class DeviceGenerator:
    """A random generator like NumPy's whose large arrays are drawn on the device by CuPy, from the same kind of seed.

    Small draws, and the distributions that CuPy lacks, come from NumPy.
    """

    def __init__(self, cupy, seed: int):
        self._host = np.random.default_rng(seed)
        self._on_device = cupy.random.default_rng(seed)

    def __getattr__(self, name):
        return getattr(self._host, name)

    def standard_normal(self, size=None, dtype=np.float64):
        return self._for(size).standard_normal(size, dtype=dtype)

    def normal(self, loc=0.0, scale=1.0, size=None):
        return loc + scale * self.standard_normal(size)

    def random(self, size=None, dtype=np.float64):
        return self._for(size).random(size, dtype=dtype)

    def uniform(self, low=0.0, high=1.0, size=None):
        return low + (high - low) * self.random(size)

    def integers(self, low, high=None, size=None, dtype=np.int64, endpoint=False):
        return self._for(size).integers(low, high, size, dtype=dtype, endpoint=endpoint)

    def _for(self, size):
        large = size is not None and math.prod(np.atleast_1d(size).tolist()) >= ON_DEVICE_ELEMENTS
        return self._on_device if large else self._host
