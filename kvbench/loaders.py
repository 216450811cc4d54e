"""One CUDA source, three builds: `get_function` gives the same kernel instance compiled by NVRTC, nvcc or g++.

    backend   built                                              runs
    cuda      by CuPy (NVRTC) when first used                    on the GPU
    native    by nvcc into kvbench.bindings._native              on the GPU, without CuPy
    simt      by g++ into kvbench.bindings._simt                 on the CPU, one fiber per CUDA thread

All three are launched alike, so grid, block and arguments are written once, in kvbench.ops:

    function = get_function("rotation", "kvb::rotation_dense_kernel<float, 64>", "simt")
    function((blocks,), (64,), (x, y, matrix, np.uint64(rows)))
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.resources
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvbench.arrays import Array, Device
from kvbench.bindings import missing
from kvbench.errors import BackendUnavailable


@dataclass(frozen=True)
class Schedule:
    """How the emulator runs a launch: seed 0 in order, any other seed a random order; `ftz` flushes subnormals."""

    seed: int = 0
    ftz: bool = False


_schedule = Schedule()
_recorded: list | None = None


@contextlib.contextmanager
def simt_schedule(seed: int = 0, ftz: bool = False):
    """Run every `simt` launch inside the block under this schedule."""
    global _schedule
    before, _schedule = _schedule, Schedule(seed, ftz)
    try:
        yield
    finally:
        _schedule = before


@contextlib.contextmanager
def record():
    """Collect the `simt` launches made inside the block, with the arrays as they were before each launch.

    Yields a list of dicts: kernel, grid, block, shared_bytes, early, cooperative, args; an argument is the bytes of a
    scalar, a pair (uint8 snapshot of the array's memory, readonly), or None.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


# ---- what this machine has -------------------------------------------------------------------------------------------

@functools.cache
def availability(backend: str) -> str | None:
    """None if the backend works here, else the reason and the command that would supply it."""
    if backend in ("reference", "cpu"):
        return None
    if backend == "cuda":
        try:
            import cupy
        except ImportError as error:
            return f"CuPy cannot be imported ({error}); on a machine with an NVIDIA GPU: pip install 'kvbench[cuda13]'"
        try:
            if cupy.cuda.runtime.getDeviceCount() > 0:
                return None
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return f"CuPy finds no usable GPU ({error}); it needs an NVIDIA GPU and its driver"
        return "CuPy finds no GPU; it needs an NVIDIA GPU and its driver"
    if backend == "native":
        reason = missing("_native")
        if reason is None:
            from kvbench.bindings import _native

            reason = None if _native.device_count() else "no NVIDIA GPU or driver is present"
        return reason
    if backend == "simt":
        return missing("_simt")
    raise ValueError(f"backend: expected one of reference, cpu, cuda, native, simt, got {backend!r}")


def require(backend: str) -> None:
    """Raise BackendUnavailable if this machine lacks the backend."""
    reason = availability(backend)
    if reason:
        raise BackendUnavailable(f"backend {backend!r} is not available: {reason}")


@functools.cache
def multiprocessors(backend: str, device: Device) -> int:
    """Multiprocessors of the device, for launch geometry; one for the emulator: small problems then take every
    branch."""
    if backend == "cuda":
        import cupy

        return cupy.cuda.runtime.getDeviceProperties(device.index)["multiProcessorCount"]
    if backend == "native":
        from kvbench.bindings import _native

        return _native.properties(device.index)["multiprocessors"]
    return 1


@functools.cache
def shared_bytes(backend: str, device: Device) -> int:
    """Shared memory that a block may have; on the emulator as on compute capability 9.0."""
    if backend == "cuda":
        import cupy

        return cupy.cuda.runtime.getDeviceProperties(device.index)["sharedMemPerBlockOptin"]
    if backend == "native":
        from kvbench.bindings import _native

        return _native.properties(device.index)["shared_bytes_per_block"]
    return 227 * 1024


@functools.cache
def cooperative_blocks(backend: str, device: Device, threads: int) -> int:
    """Blocks of so many threads that a cooperative launch may have: one for each multiprocessor, none on a device
    without such launches; on the emulator as many as it has room for, and none without it."""
    if backend == "cuda":
        import cupy

        attribute = cupy.cuda.runtime.cudaDevAttrCooperativeLaunch
        supported = cupy.cuda.runtime.deviceGetAttribute(attribute, device.index)
        return multiprocessors(backend, device) if supported else 0
    if backend == "native":
        from kvbench.bindings import _native

        return multiprocessors(backend, device) if _native.properties(device.index)["cooperative_launch"] else 0
    if availability(backend):
        return 0
    from kvbench.bindings import _simt

    return _simt.cooperative_threads // threads


# ---- kernels -------------------------------------------------------------------------------------------------------

@functools.cache
def get_function(stem: str, name: str, backend: str, device: Device = Device("cpu")):
    """The kernel instance `name` (a C++ name expression) of cuda_src/<stem>.cu, as a callable

        function(grid, block, args, shared_bytes=0, stream=0, early=False, cooperative=False)

    grid and block have one to three entries; an argument is an Array, a NumPy scalar of the kernel's own type, or None
    for a null pointer.  early: the kernel calls wait_for_earlier() of cuda_src/include/kvb/device.cuh, and may begin
    before the one ahead of it has ended (on compute capability 9.0 and above).  cooperative: all blocks are on the GPU
    at the same time, so that they may wait for each other (wait_for_tickets() there); the launch raises if they do not
    fit.  The emulator faults a write to what the kernel declares const.  The call does not wait for the kernel (simt:
    runs it to the end).
    """
    require(backend)
    return {"cuda": _cupy_function, "native": _native_function, "simt": _simt_function}[backend](stem, name, device)


def include_directory() -> str:
    return str(importlib.resources.files("kvbench.cuda_src") / "include")


def source(stem: str) -> str:
    return (importlib.resources.files("kvbench.cuda_src") / f"{stem}.cu").read_text()


@functools.cache
def headers_hash() -> str:
    """Hash of every header: CuPy's compile cache does not look into files reached through -I."""
    digest = hashlib.sha256()
    root = importlib.resources.files("kvbench.cuda_src") / "include" / "kvb"
    for header in sorted(path for path in root.iterdir() if path.name.endswith(".cuh")):
        digest.update(header.read_bytes())
    return digest.hexdigest()[:16]


def nvrtc_options() -> tuple[str, ...]:
    return ("-std=c++17", f"-I{include_directory()}", f"-DKVB_HEADERS_{headers_hash()}")


def _cupy_function(stem, name, device):
    import cupy

    with cupy.cuda.Device(device.index):
        module = cupy.RawModule(code=source(stem), options=nvrtc_options(), name_expressions=[name])
        kernel = module.get_function(name)
        limit = cupy.cuda.runtime.getDeviceProperties(device.index)["sharedMemPerBlockOptin"] - kernel.shared_size_bytes
        kernel.max_dynamic_shared_size_bytes = limit

    class Stream(NamedTuple):
        handle: int

        def __cuda_stream__(self):
            return 0, self.handle

    @functools.lru_cache(maxsize=16)
    def stream_of(handle):
        return cupy.cuda.Stream.from_external(Stream(handle)) if handle else cupy.cuda.Stream.null

    starts_early = _starts_early(cupy.cuda.runtime.getDeviceProperties(device.index)["major"])

    def launch(grid, block, args, shared_bytes=0, stream=0, early=False, cooperative=False):
        packed = tuple(np.uint64(_pointer(a)) if _is_pointer(a) else a for a in args)
        attributes = _launch_attributes(early and starts_early, cooperative)
        with cupy.cuda.Device(device.index), stream_of(stream):
            if attributes:
                _launch_with(attributes, kernel.kernel.ptr, _three(grid), _three(block), packed, shared_bytes, stream)
            else:
                kernel(_three(grid), _three(block), packed, shared_mem=shared_bytes)

    launch.registers = kernel.num_regs
    launch.local_bytes = kernel.local_size_bytes
    return launch


def _starts_early(major: int) -> bool:
    """Whether GPUs of this compute capability start a kernel before the one ahead of it in the stream has ended."""
    return major >= 9


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute, of which the value has 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int),
                ("rest", ctypes.c_char * 60)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


_COOPERATIVE = _LaunchAttribute(id=2, value=1)
_PROGRAMMATIC_STREAM_SERIALIZATION = _LaunchAttribute(id=6, value=1)


@functools.cache
def _launch_attributes(early: bool, cooperative: bool) -> ctypes.Array:
    wanted = [*([_PROGRAMMATIC_STREAM_SERIALIZATION] if early else []), *([_COOPERATIVE] if cooperative else [])]
    return (_LaunchAttribute * len(wanted))(*wanted)


def _launch_with(attributes, function, grid, block, args, shared_bytes, stream):
    """cuLaunchKernelEx, which CuPy lacks."""
    values = [ctypes.create_string_buffer(value.tobytes(), value.nbytes) for value in args]
    parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))     # copied by the launch
    config = _LaunchConfig(grid, block, shared_bytes, stream or None, ctypes.addressof(attributes), len(attributes))
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), parameters, None)
    if status:
        raise RuntimeError(f"cuLaunchKernelEx: CUDA error {status} for grid {grid}, block {block}, "
                           f"{shared_bytes} bytes of shared memory, attributes {[a.id for a in attributes]}")


@functools.cache
def _driver():
    return ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")


def _native_function(stem, name, device):
    from kvbench.bindings import _native

    def launch(grid, block, args, shared_bytes=0, stream=0, early=False, cooperative=False):
        packed = [_pointer(a) or None if _is_pointer(a) else a.tobytes() for a in args]
        _native.launch(name, _three(grid), _three(block), packed, shared_bytes, stream, device.index, early,
                       cooperative)

    return launch


def _simt_function(stem, name, device):
    from kvbench.bindings import _simt

    def launch(grid, block, args, shared_bytes=0, stream=0, early=False, cooperative=False):
        if _recorded is not None:
            _recorded.append({"kernel": name, "grid": _three(grid), "block": _three(block),
                              "shared_bytes": shared_bytes, "early": early, "cooperative": cooperative,
                              "args": [_snapshot(a) if _is_pointer(a) else a.tobytes() for a in args]})
        packed = [_span(a) if _is_pointer(a) else a.tobytes() for a in args]
        _simt.launch(name, _three(grid), _three(block), packed, shared_bytes, _schedule.seed, _schedule.ftz,
                     cooperative)

    return launch


def _three(sizes):
    return tuple(int(size) for size in (*sizes, 1, 1)[:3])


def _is_pointer(argument):
    if isinstance(argument, np.generic):
        return False
    if argument is None or isinstance(argument, Array):
        return True
    raise TypeError(f"kernel argument: expected an Array, a NumPy scalar or None, got {argument!r}")


def _pointer(argument):
    return 0 if argument is None else argument.pointer


def _span(argument):
    return None if argument is None else (argument.pointer, argument.span_bytes, argument.readonly)


def _snapshot(argument):
    if argument is None:
        return None
    pointer, nbytes, readonly = _span(argument)
    return np.frombuffer(ctypes.string_at(pointer, nbytes), np.uint8), readonly
