"""The border between kvbench and the caller's arrays: the only module that touches foreign memory.

An operator sees one type, `Array`: a strided view of memory that somebody else owns. `borrow` makes one from a NumPy,
PyTorch, JAX, CuPy or Numba CUDA array, or from anything that speaks DLPack, without copying; `Array.give` goes the
other way. `Arguments` validates the arguments of one operator call, before anything is launched or changed.

* **Nothing is guessed.** What cannot be described exactly (another byte order, torch's negative bit, a mask, a foreign
  kind of memory) is refused with an error that names the argument and the cure.
* **Streams.** An `Array` in device memory knows the CUDA stream on which the work on it is queued. Borrowing for
  another stream makes that stream wait for the producer; handing over makes the consumer's stream wait for us.
* **Lifetimes.** Memory borrowed across streams goes back to its producer when the work queued on it is done.

Frameworks are recognised by the type of a value and imported only if the caller uses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import math
import operator
import sys
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from kvbench.driver import Loan, driver
from kvbench.errors import BackendUnavailable

FLOATS = ("float16", "bfloat16", "float32")

_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2,
             "int32": 4, "uint32": 4, "int64": 8, "uint64": 8, "bool": 1}
_DTYPES = {tag: np.dtype(ml_dtypes.bfloat16 if tag == "bfloat16" else tag) for tag in _ITEMSIZE}
_TAGS = {dtype: tag for tag, dtype in _DTYPES.items()}
# The same for those who cannot hold bfloat16: Numba, NumPy's DLPack, the array interfaces.
_BITS = {**_DTYPES, "bfloat16": np.dtype("uint16")}

# What an error advises where a layout must change.
_COPY = {"numpy": "numpy.ascontiguousarray({})", "torch": "{}.contiguous()", "jax": "{}.copy()",
         "cupy": "cupy.ascontiguousarray({})", "numba": "a contiguous copy of {}"}


@dataclass(frozen=True)
class Device:
    """Where memory lives: "cpu" (pinned host memory included) or "cuda" with an index (managed memory included)."""

    kind: str
    index: int = 0

    def __post_init__(self):
        if self.kind not in ("cpu", "cuda") or self.index < 0 or (self.kind == "cpu" and self.index):
            raise ValueError(f'device: expected "cpu", "cuda" or "cuda:INDEX", got "{self.kind}:{self.index}"')

    def __str__(self):
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    @staticmethod
    def parse(device: Device | str) -> Device:
        """A `Device`, or "cpu", "cuda" (index 0), "cuda:1" as one."""
        if isinstance(device, Device):
            return device
        if not isinstance(device, str):
            raise TypeError(f"device: expected a string or a Device, got {type(device).__name__}")
        kind, colon, index = device.partition(":")
        if colon and not (kind == "cuda" and index.isdecimal()):
            raise ValueError(f'device: expected "cpu", "cuda" or "cuda:INDEX", got "{device}"')
        return Device(kind, int(index or 0))


_CPU = Device("cpu")
_cuda = functools.lru_cache(maxsize=None)(functools.partial(Device, "cuda"))


# ---- Layout


@functools.lru_cache(maxsize=4096)
def _row_major(shape):
    """The strides, in elements, of contiguous memory."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


@functools.lru_cache(maxsize=4096)
def _canonical(shape, strides):
    """`strides` with those that mean nothing (axes of length 1, empty arrays) as in contiguous memory."""
    if 0 in shape:
        return _row_major(shape)
    result, step = [], 1
    for length, stride in zip(reversed(shape), reversed(strides)):
        result.append(step if length == 1 else stride)
        step = result[-1] * length
    return tuple(reversed(result))


@functools.lru_cache(maxsize=4096)
def _overlaps_itself(shape, strides):
    """Whether two indices may name one element: unless each axis steps over all that the smaller ones reach."""
    reach = 0
    for stride, length in sorted((stride, length) for stride, length in zip(strides, shape) if length > 1):
        if stride <= reach:
            return True
        reach += stride * (length - 1)
    return False


def _interleaved(one: Array, other: Array) -> bool:
    """Whether two views of one shape and layout share no element, though their address ranges meet."""
    distance, rest = divmod(other.pointer - one.pointer, one.itemsize)
    if rest or one.strides != other.strides or _overlaps_itself(one.shape, one.strides):
        return False

    def met(distance, axes):   # by differences of indices: each stride is longer than all smaller ones reach
        if not axes:
            return distance == 0
        (stride, length), *smaller = axes
        return any(abs(steps) < length and met(distance - steps * stride, smaller)
                   for steps in {distance // stride, -(-distance // stride)})

    return not met(distance, sorted(((stride, length) for stride, length in zip(one.strides, one.shape)
                                     if length > 1), reverse=True))


def _rectangles(target, source):
    """(target offset, source offset, width, height, target pitch, source pitch) in bytes, of copies that together take
    `source` to `target`, which have one shape; as few as the two layouts allow."""
    if 0 in target.shape:
        return
    itemsize, axes = target.itemsize, []                # [length, target step, source step], merged where both continue
    for stride, source_stride, length in sorted(zip(target.strides, source.strides, target.shape), reverse=True):
        steps = [stride * itemsize, source_stride * itemsize]
        if length > 1 and axes and axes[-1][1:] == [length * step for step in steps]:
            axes[-1] = [axes[-1][0] * length, *steps]
        elif length > 1:
            axes.append([length, *steps])
    width = itemsize * axes.pop()[0] if axes and axes[-1][1:] == [itemsize, itemsize] else itemsize
    rows = axes.pop() if axes else [1, 0, 0]
    for index in np.ndindex(*(length for length, _, _ in axes)):
        offsets = (sum(i * axis[side] for i, axis in zip(index, axes)) for side in (1, 2))
        yield *offsets, width, *rows


# ---- Array


class Array:
    """A strided view of memory that somebody owns; the one array type inside kvbench.

    pointer : int - address of the first element
    shape, strides : tuples of int - strides count elements and are never negative
    dtype : "float16", "bfloat16", "float32", "float64", "int8" ... "uint64", "bool"
    device : Device
    framework : "numpy", "torch", "jax", "cupy", "numba" - of the object that `give` returns
    owner : object - keeps the memory alive
    readonly : bool - kvbench never writes such memory
    stream : int - the CUDA stream on which the work on device memory is queued
    value : the caller's object for exactly this view, or None
    """

    __slots__ = ("pointer", "shape", "strides", "dtype", "device", "framework", "owner", "readonly", "stream", "value")

    def __init__(self, pointer, shape, strides, dtype, device, framework, owner, *,
                 readonly=False, stream=0, value=None):
        self.pointer = pointer
        self.shape = shape
        self.strides = _row_major(shape) if strides is None else _canonical(shape, strides)
        self.dtype = dtype
        self.device = device
        self.framework = framework
        self.owner = owner
        self.readonly = readonly
        self.stream = stream
        self.value = value

    def __repr__(self):
        return f"Array({self.dtype} {list(self.shape)}, strides {list(self.strides)}, {self.device}, {self.framework})"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        return self.strides == _row_major(self.shape)

    @property
    def span_bytes(self) -> int:
        """Distance from `pointer` to the end of the last element; 0 if empty."""
        if 0 in self.shape:
            return 0
        return (1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides))) * self.itemsize

    def aligned(self, nbytes: int) -> bool:
        """Whether every row (run along the last axis) starts at a multiple of `nbytes`, as wide loads need."""
        return self.pointer % nbytes == 0 and all(
            stride * self.itemsize % nbytes == 0 for length, stride in zip(self.shape[:-1], self.strides) if length > 1)

    def overlaps(self, other: Array) -> bool:
        """Whether the address ranges of two arrays meet (interleaved views may meet and yet share no element)."""
        return (self.device == other.device and self.pointer < other.pointer + other.span_bytes
                and other.pointer < self.pointer + self.span_bytes)

    def _view(self, pointer, shape, strides):
        return Array(pointer, shape, strides, self.dtype, self.device, self.framework, self.owner,
                     readonly=self.readonly, stream=self.stream)

    def narrow(self, axis: int, start: int, stop: int) -> Array:
        """The view `start:stop` along `axis`; bounds are checked, not clipped."""
        if not -self.ndim <= axis < self.ndim:
            raise ValueError(f"narrow: axis: expected one of {self.ndim} dimensions, got {axis}")
        axis %= self.ndim
        if not 0 <= start <= stop <= self.shape[axis]:
            raise ValueError(f"narrow: expected 0 <= start <= stop <= {self.shape[axis]} on axis {axis}, "
                             f"got {start}:{stop}")
        return self._view(self.pointer + start * self.strides[axis] * self.itemsize,
                          (*self.shape[:axis], stop - start, *self.shape[axis + 1:]), self.strides)

    def joined(self, other: Array, axis: int) -> Array:
        """The view of this array and of `other`, which continues it along `axis`, as two views of one array may."""
        # Strides along axes of length 1 mean nothing.
        strides = tuple(own if length > 1 else step
                        for own, step, length in zip(self.strides, other.strides, self.shape))
        alike = all(i == axis or (own == length and (length == 1 or strides[i] == step)) for i, (own, length, step)
                    in enumerate(zip(self.shape, other.shape, other.strides)))
        end = self.pointer + self.shape[axis] * strides[axis] * self.itemsize
        if not alike or (end, self.dtype, self.device) != (other.pointer, other.dtype, other.device):
            raise ValueError(f"joined: expected memory that continues {self!r} along axis {axis}, got {other!r}")
        length = self.shape[axis] + other.shape[axis]
        return self._view(self.pointer, (*self.shape[:axis], length, *self.shape[axis + 1:]), strides)

    def reshape(self, *shape: int) -> Array:
        """The same contiguous memory under another shape of the same size."""
        if not self.is_contiguous:
            raise ValueError(f"reshape: expected contiguous memory, got {self!r}")
        if math.prod(shape) != self.size or min(shape, default=0) < 0:
            raise ValueError(f"reshape: expected a shape of {self.size} elements as {list(self.shape)}, "
                             f"got {list(shape)}")
        return self._view(self.pointer, shape, None)

    def numpy(self) -> np.ndarray:
        """The same host memory in NumPy; bfloat16 as `ml_dtypes.bfloat16`. ValueError for device memory."""
        if self.device.kind != "cpu":
            raise ValueError(f"numpy: expected host memory, got {self.device}: use to_host()")
        bits = _bits(self, self.readonly)
        return bits.view(_DTYPES["bfloat16"]) if self.dtype == "bfloat16" else bits

    def give(self):
        """The object for the caller: the very one it passed, if this is just that; else this memory in `framework`
        (a copy only where JAX cannot hold it: views that are strided or start within an allocation).

        Numba, which has no bfloat16, gets its bits as uint16. JAX without `jax_enable_x64` narrows 64-bit types, as it
        always does.
        """
        return _GIVERS[self.framework](self) if self.value is None else self.value

    def to_host(self) -> np.ndarray:
        """A contiguous copy in NumPy. Waits for all work on the device first."""
        result = empty(self.shape, self.dtype, _CPU)
        result.copy_from(self)
        return result.numpy()

    def copy_from(self, other: Array | np.ndarray, stream: int | None = None) -> None:
        """Copies `other`, of the same shape and dtype, into this memory.

        A copy within the device is queued on `stream` (default: this array's own); whoever names another one orders the
        later use of this array after it. A copy to or from host memory is done when the call returns; one to host
        memory waits for all work on the device first.
        """
        if stream is None:
            stream = self.stream
        other = borrow(other, "copy_from: other", stream=stream if self.device.kind == "cuda" else None)
        if self.readonly:
            raise ValueError("copy_from: expected writable memory, got a read-only array")
        if (other.shape, other.dtype) != (self.shape, self.dtype):
            raise ValueError(f"copy_from: other: expected {self.dtype} {list(self.shape)}, "
                             f"got {other.dtype} {list(other.shape)}")
        if self.device == other.device == _CPU:
            np.copyto(_bits(self, False), _bits(other, True))
            return
        if _CPU not in (self.device, other.device) and self.device != other.device:
            raise ValueError(f"copy_from: other: expected memory on {self.device} or cpu, got {other.device}")
        if self.overlaps(other) and not _interleaved(self, other):
            raise ValueError("copy_from: other: expected memory apart from the target's, got an array that overlaps it")
        if self.device.kind == "cpu":
            index, stream = other.device.index, other.stream
            driver().synchronize(index)
        else:
            index = self.device.index
            driver().order(index, stream, self.stream)
        for target, source, *rows in _rectangles(self, other):
            driver().copy(index, stream, self.pointer + target, other.pointer + source, *rows,
                          to_host=self.device.kind == "cpu", from_host=other.device.kind == "cpu")
        if self.device != other.device:
            driver().synchronize(index)

    def fill(self, value) -> None:
        """Sets every element to `value`. On a device: contiguous arrays only, queued on the array's stream."""
        if self.readonly:
            raise ValueError("fill: expected writable memory, got a read-only array")
        pattern = np.array(value, _DTYPES[self.dtype])
        if self.device.kind == "cpu":
            _bits(self, False)[...] = pattern.view(_BITS[self.dtype])
        elif not self.is_contiguous:
            raise ValueError(f"fill: expected contiguous memory, got {self!r}")
        elif self.itemsize == 8 and pattern.tobytes()[:4] != pattern.tobytes()[4:]:
            raise ValueError(f"fill: expected a value with two equal halves of 32 bits, such as 0, got {value!r}")
        elif self.size:
            driver().fill(self.device.index, self.stream, self.pointer, pattern.tobytes(), self.size)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_DEVICE[self.device.kind], self.device.index

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule of this memory, versioned if the consumer reads that; never a copy."""
        if copy:
            raise BufferError("an Array is exported without a copy: pass copy=None")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"an Array is exported on its own device, {self.device}, not on {tuple(dl_device)}")
        versioned = max_version is not None and max_version[0] >= 1
        if self.readonly and not versioned:
            raise BufferError("a read-only Array needs a consumer of DLPack 1.0 or newer (max_version)")
        if self.device.kind == "cuda" and stream != -1:
            driver().order(self.device.index, _one_legacy(stream or 0), self.stream)
        # NumPy makes the capsule and its deleter from a view of the bits, which it never reads: any address will do.
        # What NumPy cannot know is corrected in the capsule: the device, and bfloat16.
        bits = _bits(self, self.readonly)
        capsule = bits.__dlpack__(max_version=tuple(max_version)) if versioned else bits.__dlpack__()
        tensor = _open_capsule(capsule)[0].tensor
        tensor.device_type, tensor.device_id = self.__dlpack_device__()
        tensor.code, tensor.bits = _DLPACK_CODES[self.dtype]
        return capsule

    @property
    def __cuda_array_interface__(self) -> dict:
        """For consumers without DLPack; bfloat16 as uint16."""
        if self.device.kind != "cuda":
            raise AttributeError("__cuda_array_interface__: this is host memory")
        return {**_interface(self, self.readonly), "stream": self.stream or 1}


def _interface(array, readonly):
    """The array interface, NumPy's and CUDA's alike; bfloat16 as uint16."""
    dtype = _BITS[array.dtype]
    return {"version": 3, "shape": array.shape, "typestr": dtype.str, "data": (array.pointer, readonly),
            "strides": tuple(stride * dtype.itemsize for stride in array.strides)}


class _Exporter:
    """What NumPy views; the view keeps it, and it keeps the Array."""

    def __init__(self, array, readonly):
        self.array, self.__array_interface__ = array, _interface(array, readonly)


def _bits(array, readonly):
    """An ndarray at the address of `array`, bfloat16 as uint16."""
    return np.asarray(_Exporter(array, readonly))


# ---- DLPack: include/dlpack/dlpack.h and docs/source/python_spec.rst of github.com/dmlc/dlpack


_DLPACK_DEVICE = {"cpu": 1, "cuda": 2}
_DLPACK_KIND = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}                 # 3: pinned host memory, 13: managed memory
_DLPACK_CODES = {tag: (4 if tag == "bfloat16" else {"i": 0, "u": 1, "f": 2, "b": 6}[tag[0]], 8 * itemsize)
                 for tag, itemsize in _ITEMSIZE.items()}
_DLPACK_TAGS = {code: tag for tag, code in _DLPACK_CODES.items()}
_DLPACK_READ_ONLY = 1

_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)                         # called with the GIL held


class _Tensor(ctypes.Structure):
    """DLTensor"""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


class _Unversioned(ctypes.Structure):
    """DLManagedTensor"""

    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]
    major, minor, flags = 1, 0, 0


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned; under another major version only the first four fields keep their place."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
                ("deleter", _Deleter), ("flags", ctypes.c_uint64), ("tensor", _Tensor)]


# Name of a fresh capsule, of a consumed one, and what is inside. A capsule points at its name: these bytes live on.
_CAPSULES = ((b"dltensor_versioned", b"used_dltensor_versioned", _Versioned),
             (b"dltensor", b"used_dltensor", _Unversioned))


def _capsule_function(name, result):
    return ctypes.PYFUNCTYPE(result, ctypes.py_object, ctypes.c_char_p)((name, ctypes.pythonapi))


_capsule_is_valid = _capsule_function("PyCapsule_IsValid", ctypes.c_int)
_capsule_pointer = _capsule_function("PyCapsule_GetPointer", ctypes.c_void_p)
_capsule_rename = _capsule_function("PyCapsule_SetName", ctypes.c_int)


def _open_capsule(capsule):
    """(managed tensor, name once consumed) of a fresh capsule; (None, None) of anything else."""
    for fresh, used, managed in _CAPSULES:
        if _capsule_is_valid(capsule, fresh):
            return managed.from_address(_capsule_pointer(capsule, fresh)), used
    return None, None


class _Managed:
    """A consumed managed tensor, which its producer gets back when this object dies."""

    def __init__(self, capsule):
        self.managed, used = _open_capsule(capsule)
        if self.managed is None:
            raise ValueError(f"__dlpack__ returned {capsule!r}, not a fresh DLPack capsule")
        _capsule_rename(capsule, used)                  # from here on the deleter is ours to call

    def __del__(self):
        if self.managed is not None and self.managed.deleter:
            self.managed.deleter(ctypes.addressof(self.managed))


def _borrow_dlpack(value, where, stream, framework=None, readonly=False):
    stream = stream or 0
    try:
        device_type, index = value.__dlpack_device__()
        kind = _DLPACK_KIND.get(int(device_type))
        if kind is None:
            raise ValueError(f"it is on DLPack device type {int(device_type)}, not in host or CUDA memory")
        device = _CPU if kind == "cpu" else _cuda(int(index))
        request = {"stream": None if kind == "cpu" else stream or 1}        # to DLPack, 1 is the legacy stream
        try:
            capsule = value.__dlpack__(max_version=(1, 0), **request)
        except TypeError:                               # a producer older than DLPack 1.0
            capsule = value.__dlpack__(**request)
        owner = _Managed(capsule)
    except Exception as error:
        raise ValueError(f"{where}: expected an array that lends its memory, "
                         f"got {type(value).__name__}: {error}") from error
    managed = owner.managed
    if managed.major != 1:
        raise ValueError(f"{where}: expected DLPack version 1, got {managed.major}.{managed.minor}")
    tensor = managed.tensor
    tag = _DLPACK_TAGS.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if tag is None:
        _refuse_dtype(where, f"DLPack type code {tensor.code} with {tensor.bits} bits and {tensor.lanes} lanes")
    if kind == "cuda":
        owner = Loan(owner, device.index, stream)
    return _lend(where, Array(
        (tensor.data or 0) + tensor.byte_offset, tuple(tensor.shape[:tensor.ndim]),
        tuple(tensor.strides[:tensor.ndim]) if tensor.strides else None,    # NULL, allowed before 1.2: contiguous
        tag, device, framework or _default_framework(kind), owner,
        readonly=readonly or bool(managed.flags & _DLPACK_READ_ONLY), stream=stream, value=value), None)


# ---- Borrowing


def borrow(value, name: str, *, stream: int | None = None) -> Array:
    """The memory of `value` as an `Array`, without a copy. An `Array` passes through.

    value : an array of NumPy (`ml_dtypes.bfloat16` included), PyTorch, JAX, CuPy or Numba CUDA, or any object with
        `__dlpack__` or `__cuda_array_interface__`
    name : what errors call it
    stream : handle of the CUDA stream that will use the memory; it is made to wait for the producer's current stream.
        None: the producer's current stream itself (for JAX and bare DLPack the legacy stream, 0)

    TypeError for anything else and for dtypes that `Array` lacks; ValueError for memory that it cannot describe.
    """
    kind = type(value)
    borrower = _borrowers.get(kind)
    if borrower is None:
        borrower = _borrowers[kind] = _find_borrower(kind)
    return borrower(value, name, stream)


_borrowers: dict = {}


def _find_borrower(kind):
    for base in kind.__mro__:
        borrower = _BORROWERS.get((base.__module__.partition(".")[0], base.__name__))
        if borrower is not None:
            return borrower
    if hasattr(kind, "__dlpack__"):
        return _borrow_dlpack
    if hasattr(kind, "__cuda_array_interface__"):
        return _borrow_cuda_interface
    return _refuse_type


def _lend(where, array, stream):
    """What every borrowing ends with: the checks that all frameworks share, order between streams, lifetime."""
    if array.strides and min(array.strides) < 0:
        raise ValueError(f"{where}: expected strides of at least 0, got {list(array.strides)}: "
                         f"pass {_COPY[array.framework].format(_argument(where))}")
    if array.pointer % _ITEMSIZE[array.dtype]:
        raise ValueError(f"{where}: expected {array.dtype} at a multiple of {array.itemsize} bytes, "
                         f"got {array.pointer:#x}: pass a copy")
    if stream is not None and stream != array.stream and array.device.kind == "cuda":
        driver().order(array.device.index, stream, array.stream)
        array.owner, array.stream = Loan(array.owner, array.device.index, stream), stream
    return array


def _argument(where):
    """The bare name of an argument: "keys" for "decode: keys"."""
    return where.rpartition(" ")[2]


def _refuse_type(value, where, stream):
    name = _argument(where)
    raise TypeError(f"{where}: expected an array (NumPy, PyTorch, JAX, CuPy, Numba CUDA, or anything with __dlpack__), "
                    f"got {type(value).__name__}: pass numpy.asarray({name}, dtype)")


def _refuse_mask(value, where, stream):
    raise TypeError(f"{where}: expected an array without a mask, got {type(value).__name__}: "
                    f"pass {_argument(where)}.filled(...)")


def _refuse_dtype(where, dtype):
    raise TypeError(f"{where}: expected a dtype of {', '.join(_ITEMSIZE)}, got {dtype}")


def _numpy_tag(dtype, where):
    tag = _TAGS.get(dtype)
    if tag is None:
        name = _argument(where)
        _refuse_dtype(where, dtype.name if dtype.isnative else
                      f"{dtype.str} in foreign byte order: pass {name}.astype({name}.dtype.newbyteorder('='))")
    return tag


def _in_elements(strides, itemsize, shape, where):
    """Strides that count bytes (None: contiguous) as strides that count elements."""
    if strides is None:
        return None
    if any(stride % itemsize and length > 1 for stride, length in zip(strides, shape)):
        raise ValueError(f"{where}: expected strides in whole elements of {itemsize} bytes, got {list(strides)} bytes "
                         f"(a field of a record?): pass a copy")
    return tuple(stride // itemsize for stride in strides)


def _borrow_array(value, where, stream):
    if stream is None or stream == value.stream or value.device.kind == "cpu":
        return value
    array = _relabelled(value)
    array.value = value.value
    return _lend(where, array, stream)


def _borrow_numpy(value, where, stream):
    tag = _numpy_tag(value.dtype, where)
    interface = value.__array_interface__
    pointer, readonly = interface["data"]
    strides = _in_elements(interface["strides"], _ITEMSIZE[tag], value.shape, where)
    return _lend(where, Array(pointer, value.shape, strides, tag, _CPU, "numpy", value, readonly=readonly, value=value),
                 None)


@functools.lru_cache(maxsize=None)
def _torch_tags():
    torch = sys.modules["torch"]
    return {getattr(torch, tag): tag for tag in _ITEMSIZE if hasattr(torch, tag)}


def _borrow_torch(value, where, stream):
    torch = sys.modules["torch"]
    name = _argument(where)
    if value.layout is not torch.strided:
        raise ValueError(f"{where}: expected a dense tensor, got layout {value.layout}: pass {name}.to_dense()")
    if value.requires_grad:
        raise ValueError(f"{where}: expected a tensor outside autograd, got requires_grad=True: pass {name}.detach()")
    if value.is_neg() or value.is_conj():
        raise ValueError(f"{where}: expected plain memory, got a tensor with its negative or conjugate bit set: "
                         f"pass {name}.resolve_neg().resolve_conj()")
    tag = _torch_tags().get(value.dtype)
    if tag is None:
        _refuse_dtype(where, value.dtype)
    if value.is_cuda:
        index = value.get_device()
        device, current_stream = _cuda(index), torch._C._cuda_getCurrentRawStream(index)    # as Triton asks for it
    elif value.device.type == "cpu":
        device, current_stream = _CPU, 0
    else:
        raise ValueError(f"{where}: expected a tensor on cpu or cuda, got {value.device}: pass {name}.to('cpu')")
    shape = tuple(value.shape)
    try:
        pointer = value.data_ptr()
    except RuntimeError:                                # inside vmap, torch.compile and the like
        pointer = 0
    if not pointer and 0 not in shape:
        raise ValueError(f"{where}: expected a tensor with memory of its own, got {type(value).__name__} without")
    return _lend(where, Array(pointer, shape, value.stride(), tag, device, "torch", value, stream=current_stream,
                              value=value), stream)


def _borrow_jax(value, where, stream):
    # JAX arrays are immutable, though their capsules do not say so.
    return _borrow_dlpack(value, where, stream, "jax", readonly=True)


def _borrow_cupy(value, where, stream):
    tag = _numpy_tag(value.dtype, where)
    index = value.data.device_id
    return _lend(where, Array(
        value.data.ptr, value.shape, _in_elements(value.strides, _ITEMSIZE[tag], value.shape, where), tag, _cuda(index),
        "cupy", value, stream=sys.modules["cupy"].cuda.get_current_stream(index).ptr, value=value), stream)


def _borrow_cuda_interface(value, where, stream):
    """numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 2 (without stream) and 3."""
    interface = value.__cuda_array_interface__
    if interface.get("mask") is not None:
        _refuse_mask(value, where, stream)
    tag = _numpy_tag(np.dtype(interface["typestr"]), where)
    pointer, readonly = interface["data"]
    shape = tuple(interface["shape"])
    framework = "numba" if type(value).__module__.startswith("numba") else _default_framework("cuda")
    return _lend(where, Array(
        pointer or 0, shape, _in_elements(interface.get("strides"), _ITEMSIZE[tag], shape, where), tag,
        _cuda(driver().owning_device(pointer) if pointer else 0), framework, value, readonly=readonly,
        stream=_one_legacy(interface.get("stream") or 0), value=value), stream)


# By package and name of the type or of a type that it inherits from.
_BORROWERS = {
    ("kvbench", "Array"): _borrow_array, ("numpy", "MaskedArray"): _refuse_mask, ("numpy", "ndarray"): _borrow_numpy,
    ("torch", "Tensor"): _borrow_torch, ("jaxlib", "ArrayImpl"): _borrow_jax, ("jax", "Tracer"): _borrow_jax,
    ("cupy", "ndarray"): _borrow_cupy, ("numba", "DeviceNDArray"): _borrow_cuda_interface,
    ("numba_cuda", "DeviceNDArray"): _borrow_cuda_interface}


# ---- Allocating, and giving to a framework


def empty(shape: tuple[int, ...], dtype: str, device: Device | str, framework: str | None = None, *,
          stream: int | None = None) -> Array:
    """Contiguous memory with undefined content.

    framework : "numpy", "torch", "jax", "cupy" or "numba"; None: NumPy for host memory, and for device memory CuPy if
        it is installed, else PyTorch, else BackendUnavailable
    stream : handle of the CUDA stream that will use the memory; None: the framework's current stream
    """
    if dtype not in _ITEMSIZE:
        raise ValueError(f"dtype: expected one of {', '.join(_ITEMSIZE)}, got {dtype!r}")
    shape, device = tuple(operator.index(length) for length in shape), Device.parse(device)
    if min(shape, default=0) < 0:
        raise ValueError(f"shape: expected lengths of at least 0, got {list(shape)}")
    if device.kind == "cuda":
        driver()                                        # BackendUnavailable, rather than a framework's own error
    # JAX lends no memory to write into: another framework allocates, and JAX imports the finished result.
    allocator = _default_framework(device.kind) if framework in (None, "jax") else framework
    allocate = _ALLOCATORS.get((allocator, device.kind))
    if allocate is None:
        raise ValueError(f"framework: expected one that has memory on {device}, got {framework!r}")
    array = borrow(allocate(shape, dtype, device.index, stream), "empty")
    array.dtype = dtype                                 # for bfloat16 in Numba, which holds it as uint16
    if device.kind == "cuda" and stream is not None:
        array.stream = stream
    if framework == "jax":
        array.framework, array.value = "jax", None
    return array


def zeros(shape: tuple[int, ...], dtype: str, device: Device | str, framework: str | None = None, *,
          stream: int | None = None) -> Array:
    """`empty`, filled with zeros (on the array's stream)."""
    array = empty(shape, dtype, device, framework, stream=stream)
    array.fill(0)
    return array


def upload(host: np.ndarray, device: Device | str, framework: str | None = None, *, stream: int | None = None) -> Array:
    """A contiguous copy of a NumPy array on `device`. When the call returns, `host` may be changed again."""
    host = borrow(host, "host")
    array = empty(host.shape, host.dtype, device, framework, stream=stream)
    array.copy_from(host)
    return array


@functools.lru_cache(maxsize=None)
def _default_framework(kind):
    for framework in ("numpy",) if kind == "cpu" else ("cupy", "torch"):
        if importlib.util.find_spec(framework):
            return framework
    raise BackendUnavailable("allocating device memory needs CuPy or PyTorch: pip install 'kvbench[cuda13]'")


def _numpy_empty(shape, dtype, index, stream):
    # JAX imports memory without a copy if it starts at a multiple of 64 bytes; NumPy promises only 16.
    nbytes = math.prod(shape) * _ITEMSIZE[dtype]
    memory = np.empty(nbytes + 64, np.uint8)
    return np.ndarray(shape, _DTYPES[dtype], memory, -memory.ctypes.data % 64)


def _torch_host_empty(shape, dtype, index, stream):
    import torch
    return torch.empty(shape, dtype=getattr(torch, dtype))


# PyTorch and CuPy reuse freed memory in the order of the stream that it was allocated on: that must be the using one.

def _torch_empty(shape, dtype, index, stream):
    import torch
    context = contextlib.nullcontext()
    if stream is not None and stream != torch.cuda.current_stream(index).cuda_stream:
        # ExternalStream would take handle 0 for "none given" and make a new stream.
        context = torch.cuda.stream(torch.cuda.ExternalStream(stream, device=index) if stream
                                    else torch.cuda.default_stream(index))
    with context:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=f"cuda:{index}")


def _cupy_empty(shape, dtype, index, stream):
    import cupy
    with cupy.cuda.Device(index):
        context = contextlib.nullcontext()
        if stream is not None and stream != cupy.cuda.get_current_stream().ptr:
            context = cupy.cuda.Stream.from_external(_Stream(stream)) if stream else cupy.cuda.Stream.null
        with context:
            return cupy.empty(shape, _DTYPES[dtype])


def _numba_empty(shape, dtype, index, stream):
    from numba import cuda
    with cuda.gpus[index]:
        return cuda.device_array(shape, _BITS[dtype])


_ALLOCATORS = {("numpy", "cpu"): _numpy_empty, ("torch", "cpu"): _torch_host_empty, ("torch", "cuda"): _torch_empty,
               ("cupy", "cuda"): _cupy_empty, ("numba", "cuda"): _numba_empty}


def _relabelled(array, *, dtype=None, readonly=None):
    return Array(array.pointer, array.shape, array.strides, dtype or array.dtype, array.device, array.framework, array,
                 readonly=array.readonly if readonly is None else readonly, stream=array.stream)


def _give_torch(array):
    import torch
    return torch.from_dlpack(array)


def _give_jax(array):
    import jax
    # JAX has no strided views, and XLA counts on the alignment of whole allocations (on the GPU without a check).
    if not array.is_contiguous or array.pointer % (64 if array.device.kind == "cpu" else 256):
        view, array = array, empty(array.shape, array.dtype, array.device, "jax", stream=array.stream)
        array.copy_from(view)
    # JAX asks for unversioned capsules, which cannot say read-only; as its arrays are immutable it need not know.
    return jax.dlpack.from_dlpack(_relabelled(array, readonly=False))


def _give_cupy(array):
    import cupy
    if array.dtype == "bfloat16":
        return cupy.from_dlpack(_relabelled(array, dtype="uint16")).view(_DTYPES["bfloat16"])
    return cupy.from_dlpack(array)


def _give_numba(array):
    from numba import cuda
    return cuda.as_cuda_array(array)


_GIVERS = {"numpy": Array.numpy, "torch": _give_torch, "jax": _give_jax, "cupy": _give_cupy, "numba": _give_numba}


# ---- Streams


class _Stream:
    """A stream handle in the form of the CUDA stream protocol."""

    def __init__(self, handle):
        self._handle = handle

    def __cuda_stream__(self):
        return 0, self._handle


class _Handle(int):
    """A stream handle that keeps the stream object it came from: a destroyed stream must not be waited for."""

    stream: object


def _one_legacy(handle):
    """The legacy default stream has two handles, 0 and 1 (CU_STREAM_LEGACY); kvbench uses 0."""
    return 0 if handle == 1 else int(handle)


def _stream_handle(stream, where):
    handle = stream.__cuda_stream__()[1] if hasattr(stream, "__cuda_stream__") else stream
    if not isinstance(handle, int) or isinstance(handle, bool):
        raise TypeError(f"{where}: expected a handle (int) or an object with __cuda_stream__, got {stream!r}: "
                        f"pass its handle (.cuda_stream, .ptr or .handle)")
    if handle < 0 or handle == 2:
        raise ValueError(f"{where}: expected 0 or the handle of an explicit stream, got {handle}"
                         f"{' (the per-thread default stream, which PyTorch cannot use)' if handle == 2 else ''}")
    if handle is stream:
        return _one_legacy(handle)
    kept = _Handle(_one_legacy(handle))
    kept.stream = stream
    return kept


# ---- The arguments of one operator call


class Arguments:
    """Validates the arguments of one operator call, left to right, and remembers which of them fixed each size.

        arguments = Arguments("decode", stream=stream)
        query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
        keys = arguments.take("keys", keys, "batch kv_heads tokens head_dim", (query.dtype,), strided=True)
        arguments.require(splits > 0, "splits", "a positive number", splits)
        out = arguments.result("out", out, "batch q_heads head_dim", (query.dtype, "float32"))
        ...
        return out.give()

    sizes : size name -> int; "..." -> tuple of the leading dimensions
    device, framework, stream : those of the first array; an explicit `stream` (a handle, or an object with
        `__cuda_stream__`) wins over the framework's current one, and waits for it

    Errors read "operator: argument: expected ..., got ...: cure".
    """

    def __init__(self, operator: str, *, stream=None):
        self.operator = operator
        self.sizes: dict = {}
        self.device: Device | None = None
        self.framework: str | None = None
        self.stream: int | None = None if stream is None else _stream_handle(stream, f"{operator}: stream")
        self._origin: dict[str, str] = {}               # size name -> the argument that fixed it
        self._taken: dict[str, Array] = {}

    def take(self, name: str, value, shape: str, dtypes: tuple[str, ...], *, strided: bool = False,
             optional: bool = False) -> Array | None:
        """An input.

        shape : size names and numbers, such as "batch kv_heads tokens 128"; "..." in front stands for any leading
            dimensions. A name that is known already must have the same size again
        dtypes : those accepted
        strided : all but the last dimension may have any strides, if no two elements share memory
        optional : None is accepted, and returned
        """
        if value is None:
            if optional:
                return None
            raise TypeError(f"{self.operator}: {name}: expected an array [{_listed(shape)}], got None")
        array = self._accept(name, value, dtypes)
        self._bind(name, array.shape, shape)
        return self._keep(name, array, strided)

    def result(self, name: str, value, shape: str | tuple[int, ...], dtypes: str | tuple[str, ...], *,
               in_place: bool = False) -> Array:
        """The memory of an output: the caller's `value`, if it gave one, else new memory in its framework.

        shape : as for `take`, of known names; or a tuple of ints
        dtypes : those accepted; the first is the one that is allocated
        in_place : `value` may be exactly an input's memory; otherwise it must be apart from all inputs and outputs
        """
        where = f"{self.operator}: {name}"
        dtypes = (dtypes,) if isinstance(dtypes, str) else dtypes
        expected = self._lengths(shape) if isinstance(shape, str) else tuple(shape)
        if value is None:
            array = self._taken[name] = empty(expected, dtypes[0], self.device, self.framework, stream=self.stream)
            return array

        array = self._accept(name, value, dtypes)
        if array.shape != expected:
            named = f" = [{_listed(shape)}]" if isinstance(shape, str) else ""
            raise ValueError(f"{where}: expected shape {list(expected)}{named}, got {list(array.shape)}")
        if array.readonly:
            raise ValueError(f"{where}: expected writable memory, got " + (
                f"a JAX array, which is immutable: omit {name} and use the array that is returned"
                if array.framework == "jax" else "a read-only array: pass a writable copy"))
        for other, taken in self._taken.items():
            same = (array.pointer, array.shape, array.dtype) == (taken.pointer, taken.shape, taken.dtype)
            if array.overlaps(taken) and not (in_place and same and taken.is_contiguous):
                raise ValueError(f"{where}: expected memory apart from {other}, got an array that overlaps it: "
                                 f"pass another one, or omit {name}")
        array = self._keep(name, array, False)
        if isinstance(value, Array):
            array = array._view(array.pointer, array.shape, array.strides)
            array.value = value                         # kvbench's own memory: the caller gets its Array back
        return array

    def require(self, condition: bool, name: str, expected: str, given) -> None:
        """ValueError "operator: name: expected ..., got ..." unless the condition holds."""
        if not condition:
            raise ValueError(f"{self.operator}: {name}: expected {expected}, got {given}")

    def _accept(self, name, value, dtypes):
        where = f"{self.operator}: {name}"
        array = borrow(value, where)
        if array.dtype not in dtypes:
            raise TypeError(f"{where}: expected dtype {_alternatives(dtypes)}, got {array.dtype}: convert {name} first")
        if self.device is None:
            self.device, self.framework = array.device, array.framework
            self.stream = array.stream if self.stream is None else self.stream
        elif array.device != self.device:
            raise ValueError(f"{where}: expected memory on {self.device}, where {next(iter(self._taken))} is, "
                             f"got {array.device}: move one of them")
        return array

    def _keep(self, name, array, strided):
        """The end of every check; only an argument that is good makes streams wait."""
        if not array.is_contiguous:
            self._check_layout(name, array, strided)
        array = self._taken[name] = borrow(array, name, stream=self.stream)
        return array

    def _check_layout(self, name, array, strided):
        where, cure = f"{self.operator}: {name}", f"pass {_COPY[array.framework].format(name)}"
        layout = f"strides {list(array.strides)} for shape {list(array.shape)}"
        if not strided:
            raise ValueError(f"{where}: expected contiguous memory, got {layout}: {cure}")
        if array.strides[-1] != 1:
            raise ValueError(f"{where}: expected a contiguous last dimension, got {layout}: {cure}")
        if _overlaps_itself(array.shape, array.strides):
            raise ValueError(f"{where}: expected memory of its own for every element, got overlapping {layout} "
                             f"(an expanded array?): {cure}")

    def _bind(self, name, given, shape):
        wildcard, words = _parse(shape)
        leading = len(given) - len(words) + wildcard    # how many dimensions "..." takes; without it, 0
        reason = ""
        if leading == 0 or (wildcard and leading > 0):
            sizes = (given[:leading], *given[leading:]) if wildcard else given
            for word, size in zip(words, sizes):
                known = word if type(word) is int else self.sizes.setdefault(word, size)
                if known != size:
                    break
                self._origin.setdefault(word, name)
            else:
                return
            if type(word) is not int:
                reason = f" with {word} = {list(known) if word == '...' else known} as in {self._origin[word]}"
        raise ValueError(f"{self.operator}: {name}: expected shape [{_listed(shape)}]{reason}, got {list(given)}")

    def _lengths(self, shape):
        wildcard, words = _parse(shape)
        lengths = tuple(word if type(word) is int else self.sizes[word] for word in words)
        return lengths[0] + lengths[1:] if wildcard else lengths


@functools.lru_cache(maxsize=None)
def _parse(shape):
    """(whether it begins with "...", its words, numbers as int)"""
    words = tuple(int(word) if word.isdecimal() else word for word in shape.split())
    return words[:1] == ("...",), words


def _listed(shape):
    return ", ".join(shape.split())


def _alternatives(names):
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
