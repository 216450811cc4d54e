"""The few calls of the NVIDIA driver that kvbench makes itself: copies, order between streams, whose memory it is.

They go through `libcuda.so.1`, which every machine with an NVIDIA GPU has, so that no array framework is needed for
them. All work is done in the device's primary context, the one that PyTorch, JAX, CuPy, Numba and the CUDA runtime use.
Streams are handles (int); 0 is the legacy default stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections import deque

from kvbench.errors import BackendUnavailable

_HOST, _DEVICE = 1, 2           # CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE
_LONGEST_PITCH = 2**31 - 1      # CU_DEVICE_ATTRIBUTE_MAX_PITCH, the same on every device
_OWNING_DEVICE = 9              # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_WITHOUT_TIMING = 2             # CU_EVENT_DISABLE_TIMING
_NOT_READY = 600                # CUDA_ERROR_NOT_READY


class _Rectangle(ctypes.Structure):
    """CUDA_MEMCPY2D: `height` rows of `width` bytes, `pitch` bytes apart on either side."""

    _fields_ = [(side + name, kind) for side in ("source_", "target_") for name, kind in (
        ("x", ctypes.c_size_t), ("y", ctypes.c_size_t), ("memory_type", ctypes.c_uint), ("host", ctypes.c_void_p),
        ("device", ctypes.c_uint64), ("array", ctypes.c_void_p), ("pitch", ctypes.c_size_t))
    ] + [("width", ctypes.c_size_t), ("height", ctypes.c_size_t)]


def _side(name, address, pitch, on_host):
    kind, field = (_HOST, "_host") if on_host else (_DEVICE, "_device")
    return {f"{name}_memory_type": kind, name + field: address, f"{name}_pitch": pitch}


class Driver:
    """The loaded driver. Calling it with a function's name and ctypes arguments raises RuntimeError on a CUDA error."""

    def __init__(self):
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
            self("cuInit", ctypes.c_uint(0))
        except (OSError, RuntimeError) as error:
            raise BackendUnavailable(f"device memory needs an NVIDIA GPU and its driver, which this machine lacks "
                                     f"({error}): use host memory, or install the driver (see nvidia-smi)") from None
        self._contexts = {}

    def __call__(self, name, *arguments):
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} (CUDA error {status})")

    @contextlib.contextmanager
    def on(self, index: int):
        """Makes the primary context of device `index` current, and restores what was current before."""
        if index not in self._contexts:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
            self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[index] = context
        self("cuCtxPushCurrent_v2", self._contexts[index])
        try:
            yield
        finally:
            self("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def record(self, index: int, stream: int) -> ctypes.c_void_p:
        """A new event behind everything that is queued on `stream` now."""
        event = ctypes.c_void_p()
        with self.on(index):
            self("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_WITHOUT_TIMING))
            self("cuEventRecord", event, ctypes.c_void_p(stream))
        return event

    def passed(self, event: ctypes.c_void_p) -> bool:
        """Whether the work before `event` is done, or has failed: nothing is left to wait for. Frees it if so."""
        if self._library.cuEventQuery(event) == _NOT_READY:
            return False
        self._library.cuEventDestroy_v2(event)
        return True

    def order(self, index: int, stream: int, before: int) -> None:
        """Makes `stream` wait, on the device, for everything that is queued on the stream `before` now."""
        if stream == before:
            return
        event = self.record(index, before)
        with self.on(index):
            self("cuStreamWaitEvent", ctypes.c_void_p(stream), event, ctypes.c_uint(0))
        self("cuEventDestroy_v2", event)                # the driver keeps it until the wait is over

    def copy(self, index: int, stream: int, target: int, source: int, width: int, height: int = 1,
             target_pitch: int = 0, source_pitch: int = 0, *, to_host: bool = False, from_host: bool = False) -> None:
        """Queues a copy of `height` rows of `width` bytes, by default from device to device memory."""
        with self.on(index):
            # A pitch below the width (a broadcast row) or beyond the driver's limit cannot be said as one rectangle.
            if height > 1 and width <= min(target_pitch, source_pitch) \
                    and max(target_pitch, source_pitch) <= _LONGEST_PITCH:
                rectangle = _Rectangle(**_side("source", source, source_pitch, from_host),
                                       **_side("target", target, target_pitch, to_host), width=width, height=height)
                self("cuMemcpy2DAsync_v2", ctypes.byref(rectangle), ctypes.c_void_p(stream))
                return
            for row in range(height):
                self("cuMemcpyAsync", ctypes.c_uint64(target + row * target_pitch),
                     ctypes.c_uint64(source + row * source_pitch), ctypes.c_size_t(width), ctypes.c_void_p(stream))

    def fill(self, index: int, stream: int, pointer: int, pattern: bytes, count: int) -> None:
        """Queues `count` repetitions of `pattern`: of 1, 2 or 4 bytes, or of 8 of which both halves are the same."""
        if len(pattern) == 8:
            pattern, count = pattern[:4], 2 * count
        name, kind = {1: ("cuMemsetD8Async", ctypes.c_ubyte), 2: ("cuMemsetD16Async", ctypes.c_ushort),
                      4: ("cuMemsetD32Async", ctypes.c_uint)}[len(pattern)]
        with self.on(index):
            self(name, ctypes.c_uint64(pointer), kind.from_buffer_copy(pattern), ctypes.c_size_t(count),
                 ctypes.c_void_p(stream))

    def synchronize(self, index: int) -> None:
        """Waits for all work on the device, whatever stream it is on."""
        with self.on(index):
            self("cuCtxSynchronize")

    def owning_device(self, pointer: int) -> int:
        """The index of the device that holds the memory at `pointer`."""
        index = ctypes.c_int()
        self("cuPointerGetAttribute", ctypes.byref(index), ctypes.c_int(_OWNING_DEVICE), ctypes.c_uint64(pointer))
        return index.value


@functools.lru_cache(maxsize=None)
def driver() -> Driver:
    """The driver, loaded on first use; BackendUnavailable where there is none."""
    return Driver()


class Loan:
    """Keeps `value`, whose memory work on `stream` uses, until that work is done.

    Needed where the producer's allocator does not follow our stream: it may reuse the memory as soon as it gets it
    back, while kernels that read it are still queued. When the loan dies, its value therefore waits behind an event.
    Waiting values are let go whenever another loan is made or dies; the host never blocks.
    """

    _waiting: deque = deque()

    def __init__(self, value, index: int, stream: int):
        self._value, self._index, self._stream = value, index, stream
        self.collect()

    def __del__(self):
        if not sys.is_finalizing():
            self._waiting.append((driver().record(self._index, self._stream), self._value))
            self.collect()

    @classmethod
    def collect(cls):
        """Let go of what nobody uses any more."""
        for _ in range(len(cls._waiting)):
            try:
                event, value = cls._waiting.popleft()
            except IndexError:                          # another thread was faster
                return
            if not driver().passed(event):
                cls._waiting.append((event, value))
