"""kvbench.arrays: borrowing from and giving to NumPy, PyTorch, JAX and bare DLPack; copies and streams on an emulated
driver; every error message of `Arguments`; and, on a GPU, PyTorch, CuPy, JAX and Numba CUDA."""

import contextlib
import ctypes
import gc
import math
import os
import struct
import subprocess
import sys
import textwrap
import warnings
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import arrays, driver as driver_module
from kvbench.arrays import FLOATS, Arguments, Array, Device, borrow, empty, upload, zeros
from kvbench.errors import BackendUnavailable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")     # JAX shares the GPU with the others here

TAGS = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
        "uint64", "bool")
SHAPES = ((), (1,), (0,), (7,), (3, 0, 2), (2, 3, 4), (1, 5, 1), (2, 1, 3, 8))


def host_array(shape, tag, seed=0):
    """Random bits, so that no two elements are alike by habit; NaN payloads included."""
    dtype = np.dtype(ml_dtypes.bfloat16 if tag == "bfloat16" else tag)
    rng = np.random.default_rng(seed)
    if tag == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape).copy()


def assert_same_bits(actual, expected):
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.tobytes() == expected.tobytes()


def to_framework(host, framework):
    """A framework's own copy of a host array."""
    if framework == "numpy":
        return host.copy()
    if framework == "torch":
        torch = pytest.importorskip("torch")
        bits = host.view(np.uint16) if host.dtype == ml_dtypes.bfloat16 else host
        tensor = torch.from_numpy(bits.copy())
        return tensor.view(torch.bfloat16) if host.dtype == ml_dtypes.bfloat16 else tensor
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        return jax.numpy.asarray(host)


class Producer:
    """An object that lends `host` through DLPack as a test says: what real producers do only rarely."""

    def __init__(self, host, *, versioned=True, major=1, flags=0, device=(1, 0), strides=True, byte_offset=0, code=None,
                 lanes=1, knows_versions=True, deleter=True):
        self.host, self.device, self.knows_versions, self.requests, self.deleted = host, device, knows_versions, [], 0
        kind = arrays._Versioned if versioned and knows_versions else arrays._Unversioned
        tensor = arrays._Tensor(
            data=host.ctypes.data - byte_offset, device_type=device[0], device_id=device[1], ndim=host.ndim,
            lanes=lanes, shape=(ctypes.c_int64 * host.ndim)(*host.shape), byte_offset=byte_offset)
        tensor.code, tensor.bits = code or arrays._DLPACK_CODES[arrays._TAGS[host.dtype]]
        if strides:
            tensor.strides = (ctypes.c_int64 * host.ndim)(*(stride // host.itemsize for stride in host.strides))
        self.managed = kind(tensor=tensor)
        if deleter:
            self.managed.deleter = arrays._Deleter(self.delete)
        if kind is arrays._Versioned:
            self.managed.major, self.managed.minor, self.managed.flags = major, 3, flags

    def delete(self, address):
        assert address == ctypes.addressof(self.managed)
        self.deleted += 1

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **request):
        if "max_version" in request and not self.knows_versions:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.requests.append(request)
        new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
            ("PyCapsule_New", ctypes.pythonapi))
        name = b"dltensor_versioned" if isinstance(self.managed, arrays._Versioned) else b"dltensor"
        self.capsule = new_capsule(ctypes.addressof(self.managed), name, None)
        return self.capsule


# ---- Devices


@pytest.mark.parametrize("text, device", [("cpu", Device("cpu")), ("cuda", Device("cuda", 0)),
                                          ("cuda:3", Device("cuda", 3))])
def test_device_parses_and_prints(text, device):
    assert Device.parse(text) == device and Device.parse(device) is device
    assert Device.parse(str(device)) == device


@pytest.mark.parametrize("text", ["tpu", "cpu:0", "cpu:1", "cuda:", "cuda:x", "cuda:-1", "", "cuda:1:2"])
def test_device_refuses(text):
    with pytest.raises(ValueError, match='device: expected "cpu", "cuda" or "cuda:INDEX", got'):
        Device.parse(text)


def test_device_refuses_other_types():
    with pytest.raises(TypeError, match="device: expected a string or a Device, got int"):
        Device.parse(0)


# ---- Borrowing from every framework on the CPU, and giving back


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_borrowed_memory_is_the_callers(framework, tag, shape):
    host = host_array(shape, tag)
    value = to_framework(host, framework)
    array = borrow(value, "x")
    assert (array.shape, array.dtype, array.device, array.framework) == (shape, tag, Device("cpu"), framework)
    assert (array.ndim, array.size, array.itemsize, array.nbytes) == (host.ndim, host.size, host.itemsize, host.nbytes)
    assert array.is_contiguous and array.span_bytes == host.nbytes
    assert array.readonly == (framework == "jax")
    assert_same_bits(array.numpy(), host)
    assert_same_bits(array.to_host(), host)
    assert array.give() is value
    if framework == "torch":
        assert array.pointer == value.data_ptr()
    elif framework == "jax" and host.size:
        assert array.pointer == value.unsafe_buffer_pointer()
    else:
        assert array.numpy().ctypes.data == array.pointer


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("tag", TAGS)
def test_views_are_given_in_the_framework(framework, tag):
    host = host_array((4, 6), tag)
    value = to_framework(host, framework)
    view = borrow(value, "x").narrow(0, 1, 3)
    given = view.give()
    assert type(given) is type(value)
    if framework == "jax" and tag in ("float64", "int64", "uint64"):
        return                                          # JAX narrows 64-bit types where jax_enable_x64 is off
    again = borrow(given, "given")
    assert_same_bits(again.numpy(), host[1:3])
    assert again.pointer == view.pointer or (framework == "jax" and view.pointer % 64)


def test_jax_gets_a_copy_of_what_it_cannot_hold():
    host = host_array((4, 6), "float32")
    array = borrow(to_framework(host, "jax"), "x")
    assert array.pointer % 64 == 0
    for view, expected in ((array.narrow(1, 0, 5), host[:, :5]), (array.narrow(0, 1, 3), host[1:3])):
        assert_same_bits(np.asarray(view.give()), expected)
    assert array.narrow(0, 0, 3).give().unsafe_buffer_pointer() == array.pointer


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 3)], ids=str)
def test_allocated_memory_is_given_in_the_framework(framework, tag, shape):
    if framework != "numpy":
        pytest.importorskip(framework)
    host = host_array(shape, tag, seed=1)
    array = empty(shape, tag, "cpu", framework)
    assert (array.framework, array.is_contiguous, array.readonly, array.dtype) == (framework, True, False, tag)
    array.copy_from(host)
    given = array.give()
    if framework == "jax" and tag in ("float64", "int64", "uint64"):
        return
    assert_same_bits(borrow(given, "given").numpy(), host)
    assert borrow(given, "given").framework == framework
    if host.size:
        assert borrow(given, "given").pointer == array.pointer, "the result must be the memory that was written"


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_zeros_upload_fill(framework):
    if framework != "numpy":
        pytest.importorskip(framework)
    array = zeros((3, 4), "bfloat16", Device("cpu"), framework)
    assert not array.numpy().view(np.uint16).any()
    array.fill(1.5)
    assert (array.numpy().astype(np.float32) == 1.5).all()
    part = array.narrow(1, 1, 3)
    part.fill(-2)
    assert_same_bits(part.to_host(), np.full((3, 2), -2, ml_dtypes.bfloat16))
    assert (array.numpy()[:, [0, 3]].astype(np.float32) == 1.5).all()
    host = host_array((3, 4), "int32")
    uploaded = upload(host[::-1].T.copy().T, "cpu", framework)
    assert uploaded.is_contiguous and uploaded.framework == framework
    assert_same_bits(uploaded.numpy(), host[::-1])


def test_allocation_errors():
    with pytest.raises(ValueError, match="dtype: expected one of float16, .*, got 'half'"):
        empty((1,), "half", "cpu")
    with pytest.raises(ValueError, match=r"shape: expected lengths of at least 0, got \[2, -1\]"):
        empty((2, -1), "float16", "cpu")
    with pytest.raises(TypeError):
        empty((2.0,), "float16", "cpu")
    with pytest.raises(ValueError, match="framework: expected one that has memory on cpu, got 'cupy'"):
        empty((1,), "float16", "cpu", "cupy")
    with pytest.raises(ValueError, match="fill: expected writable memory"):
        borrow(np.frombuffer(b"abcd", np.uint8), "x").fill(0)


def test_device_memory_without_a_gpu_is_refused_with_the_reason(monkeypatch):
    def missing(name):
        raise OSError("libcuda.so.1: cannot open shared object file")
    monkeypatch.setattr(driver_module.ctypes, "CDLL", missing)
    driver_module.driver.cache_clear()
    with pytest.raises(BackendUnavailable, match="device memory needs an NVIDIA GPU and its driver, .*libcuda.so.1"):
        empty((1,), "float16", "cuda")
    with pytest.raises(BackendUnavailable):
        upload(np.ones(3, np.float32), "cuda:1")


@given(st.data())
def test_any_numpy_view_is_described_exactly_or_refused(data):
    """Random slices and axis orders: what is borrowed equals the view, and only negative strides are refused."""
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple), label="shape")
    view = host_array(shape, data.draw(st.sampled_from(("float16", "bfloat16", "int64"))))
    axes = data.draw(st.permutations(range(view.ndim)), label="axes")
    slices = tuple(data.draw(st.slices(length), label="slice") for length in shape)
    view = view[..., *slices].transpose(axes)
    negative = any(stride < 0 and length > 1 for stride, length in zip(view.strides, view.shape)) and view.size
    if negative:
        with pytest.raises(ValueError, match="x: expected strides of at least 0, .*: pass numpy.ascontiguousarray"):
            borrow(view, "x")
        return
    array = borrow(view, "x")
    assert array.numpy().tobytes() == view.tobytes() and array.shape == view.shape
    assert array.is_contiguous == view.flags.c_contiguous
    if view.size:
        assert array.span_bytes == np.lib.array_utils.byte_bounds(view)[1] - array.pointer
    assert_same_bits(array.to_host(), view)


@pytest.mark.parametrize("shape", [(2, 3, 9, 4), (1, 1, 2, 4), (1, 3, 2, 1), (2, 1, 5, 4)])
def test_two_views_of_one_array_are_joined_again(shape):
    array = arrays.upload(np.arange(np.prod(shape), dtype=np.int32).reshape(shape), "cpu")
    for length in range(1, shape[2]):
        one, other = array.narrow(2, 0, length), array.narrow(2, length, shape[2])
        assert (one.joined(other, 2).numpy() == array.numpy()).all()
        with pytest.raises(ValueError, match="joined: expected memory that continues"):
            other.joined(one, 2)
        with pytest.raises(ValueError, match="joined: expected memory that continues"):
            one.joined(arrays.upload(other.to_host(), "cpu"), 2)


@given(st.data())
def test_narrow_and_reshape_agree_with_numpy(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
    host = host_array(shape, "bfloat16")
    array = borrow(host, "x")
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis]))
    stop = data.draw(st.integers(start, shape[axis]))
    view = array.narrow(axis, start, stop)
    expected = np.moveaxis(np.moveaxis(host, axis, 0)[start:stop], 0, axis)
    assert view.numpy().tobytes() == expected.tobytes() and view.shape == expected.shape
    assert view.is_contiguous == expected.flags.c_contiguous
    assert_same_bits(array.reshape(host.size).numpy(), host.reshape(-1))


def test_view_errors():
    array = borrow(np.zeros((2, 3), np.float32), "x")
    for arguments in ((2, 0, 1), (-3, 0, 1)):
        with pytest.raises(ValueError, match="narrow: axis: expected one of 2 dimensions"):
            array.narrow(*arguments)
    for start, stop in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"narrow: expected 0 <= start <= stop <= 3 on axis 1, got {start}:{stop}"):
            array.narrow(1, start, stop)
    with pytest.raises(ValueError, match="reshape: expected contiguous memory"):
        array.narrow(1, 0, 2).reshape(4)
    for shape in ((5,), (-2, -3)):
        with pytest.raises(ValueError, match="reshape: expected a shape of 6 elements"):
            array.reshape(*shape)


def test_aligned_looks_at_every_row():
    memory = np.zeros(4096, np.uint8)
    memory = memory[-memory.ctypes.data % 64:]
    array = borrow(memory[:1024].view(np.float16).reshape(8, 64), "x")
    assert array.aligned(64) and array.narrow(0, 3, 4).aligned(64)
    assert array.narrow(1, 8, 64).aligned(16) and not array.narrow(1, 8, 64).aligned(32)
    assert not array.narrow(1, 4, 64).aligned(16)
    rows_of_odd_pitch = borrow(memory[:8 * 72].view(np.float16).reshape(8, 36), "x").narrow(1, 0, 32)
    assert rows_of_odd_pitch.aligned(8) and not rows_of_odd_pitch.aligned(16)
    assert borrow(memory[:66].view(np.float16).reshape(1, 33), "x").aligned(64), "a single row has no next row"


def test_read_only_memory_is_never_written():
    host = np.arange(4, dtype=np.float32)
    host.flags.writeable = False
    array = borrow(host, "x")
    assert array.readonly and not array.numpy().flags.writeable and array.narrow(0, 1, 3).readonly
    with pytest.raises(ValueError, match="copy_from: expected writable memory"):
        array.copy_from(np.zeros(4, np.float32))


def test_copy_from_wants_the_same_shape_and_dtype():
    array = empty((2, 3), "float32", "cpu")
    with pytest.raises(ValueError, match=r"copy_from: other: expected float32 \[2, 3\], got float32 \[3, 2\]"):
        array.copy_from(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"copy_from: other: expected float32 \[2, 3\], got float16 \[2, 3\]"):
        array.copy_from(np.zeros((2, 3), np.float16))


# ---- What is refused


@pytest.mark.parametrize("value, name", [([1.0, 2.0], "list"), (1.5, "float"), (None, "NoneType"), (b"abcd", "bytes"),
                                         (np.float32(1), "float32"), ({"a": 1}, "dict")])
def test_what_is_no_array_is_a_type_error(value, name):
    with pytest.raises(TypeError, match=rf"keys: expected an array .*, got {name}: pass numpy.asarray\(keys, dtype\)"):
        borrow(value, "keys")


@pytest.mark.parametrize("value, message", [
    (np.zeros(3, ">f4"), r"keys: expected a dtype of .*, got >f4 in foreign byte order: "
                         r"pass keys.astype\(keys.dtype.newbyteorder\('='\)\)"),
    (np.array([None, 1]), "keys: expected a dtype of .*, got object"),
    (np.array(["a"]), "keys: expected a dtype of .*, got str32"),
    (np.zeros(3, np.complex64), "keys: expected a dtype of .*, got complex64"),
    (np.zeros(3, "datetime64[s]"), "keys: expected a dtype of .*, got datetime64"),
    (np.zeros(3, [("a", "f4"), ("b", "i2")]), "keys: expected a dtype of .*, got void48"),
    (np.zeros(3, ml_dtypes.float8_e4m3fn), "keys: expected a dtype of .*, got float8_e4m3fn"),
    (np.zeros(3, np.longdouble), "keys: expected a dtype of .*, got longdouble|float128"),
    (np.ma.masked_array([1.0, 2.0], [True, False]), r"keys: expected an array without a mask, got MaskedArray: "
                                                    r"pass keys.filled\(...\)")])
def test_numpy_dtypes_that_are_refused(value, message):
    with pytest.raises(TypeError, match=message):
        borrow(value, "keys")


def test_numpy_layouts_that_are_refused():
    bytes_of = np.zeros(64, np.uint8)
    start = -bytes_of.ctypes.data % 16
    misaligned = bytes_of[start + 1:start + 33].view(np.float32)
    with pytest.raises(ValueError, match="keys: expected float32 at a multiple of 4 bytes, got 0x.*pass a copy"):
        borrow(misaligned, "keys")
    records = np.zeros(3, [("a", "f4"), ("b", "i2")])
    with pytest.raises(ValueError, match=r"keys: expected strides in whole elements of 4 bytes, got \[6\] bytes"):
        borrow(records["a"], "keys")
    assert borrow(records["a"][:1], "keys").shape == (1,), "a stride that is never taken is no fault"
    with pytest.raises(ValueError, match=r"keys: expected strides of at least 0, .*numpy.ascontiguousarray\(keys\)"):
        borrow(np.arange(5.0)[::-1], "keys")
    assert borrow(np.arange(1.0)[::-1], "keys").strides == (1,)
    assert borrow(np.zeros((4, 0))[::-1], "keys").is_contiguous


def test_torch_tensors_that_are_refused():
    torch = pytest.importorskip("torch")
    negative = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert negative.is_neg()
    with pytest.raises(ValueError, match=r"keys: .*negative or conjugate bit.*keys.resolve_neg\(\).resolve_conj\(\)"):
        borrow(negative, "keys")
    assert_same_bits(borrow(negative.resolve_neg(), "keys").numpy(), np.array([-2, 4], np.float32))
    with pytest.raises(ValueError, match="negative or conjugate bit"):
        borrow(torch.tensor([1 + 2j]).conj(), "keys")
    parameter = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"keys: .*outside autograd, got requires_grad=True: pass keys.detach\(\)"):
        borrow(parameter, "keys")
    assert borrow(parameter.detach(), "keys").pointer == parameter.data_ptr()
    with pytest.raises(ValueError, match=r"keys: .*dense tensor, got layout torch.sparse_coo: pass keys.to_dense\(\)"):
        borrow(torch.ones(3).to_sparse(), "keys")
    with pytest.raises(ValueError, match="keys: expected a tensor on cpu or cuda, got meta"):
        borrow(torch.ones(3, device="meta"), "keys")
    with pytest.raises(TypeError, match="keys: expected a dtype of .*, got torch.complex64"):
        borrow(torch.tensor([1 + 2j]), "keys")
    with pytest.raises(TypeError, match="keys: expected a dtype of .*, got torch.float8_e5m2"):
        borrow(torch.zeros(3).to(torch.float8_e5m2), "keys")
    without = "keys: expected a tensor with memory of its own, got .* without"
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(), warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=without):
        borrow(torch.ones(3), "keys")
    with pytest.raises(ValueError, match=without):
        torch.vmap(lambda x: borrow(x, "keys"))(torch.ones(2, 3))


@given(st.data())
def test_any_torch_view_is_described_exactly(data):
    torch = pytest.importorskip("torch")
    base = torch.arange(120, dtype=torch.int32).reshape(2, 3, 4, 5)
    axes = data.draw(st.permutations(range(4)))
    slices = tuple(slice(data.draw(st.integers(0, 2)), None, data.draw(st.integers(1, 2))) for _ in range(4))
    view = base.permute(axes)[slices]
    if view.shape[1] and data.draw(st.booleans()):
        view = view[:, :1].expand(-1, 3, -1, -1)
    array = borrow(view, "x")
    assert array.numpy().tolist() == view.tolist()
    assert array.is_contiguous == view.is_contiguous()


def test_jax_arrays_that_are_refused():
    jax = pytest.importorskip("jax")
    with pytest.raises(ValueError, match="keys: expected an array that lends its memory, got DynamicJaxprTracer"):
        jax.jit(lambda x: borrow(x, "keys"))(jax.numpy.ones(3))
    deleted = jax.numpy.ones(3)
    deleted.delete()
    with pytest.raises(ValueError, match="keys: expected an array that lends its memory, got ArrayImpl"):
        borrow(deleted, "keys")
    with pytest.raises((TypeError, ValueError), match="keys: "):
        borrow(jax.numpy.ones(3, jax.numpy.complex64), "keys")
    with pytest.raises((TypeError, ValueError), match="keys: "):
        borrow(jax.numpy.ones(3, jax.numpy.float8_e4m3fn), "keys")


def test_jax_arrays_still_being_computed_are_waited_for():
    jax = pytest.importorskip("jax")
    x = jax.numpy.eye(700) * 1.0
    compute = jax.jit(lambda x: jax.numpy.linalg.matrix_power(x, 40) + 1)
    compute(x).block_until_ready()
    assert_same_bits(borrow(compute(x), "x").to_host(), np.eye(700, dtype=np.float32) + 1)


# ---- DLPack, consumer


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("strides", [True, False])
@pytest.mark.parametrize("byte_offset", [0, 12])
@pytest.mark.parametrize("tag", TAGS)
def test_dlpack_is_consumed(versioned, strides, byte_offset, tag):
    host = host_array((3, 4), tag)
    producer = Producer(host, versioned=versioned, strides=strides, byte_offset=byte_offset)
    array = borrow(producer, "x")
    assert array.pointer == host.ctypes.data and array.strides == (4, 1) and not array.readonly
    assert array.framework == "numpy" and array.give() is producer
    assert_same_bits(array.numpy(), host)
    assert producer.requests == [{"max_version": (1, 0), "stream": None}]
    assert repr(producer.capsule).split('"')[1] == ("used_dltensor_versioned" if versioned else "used_dltensor")
    view = array.narrow(0, 1, 2)
    del array
    assert producer.deleted == 0, "a view still uses the memory"
    del view
    assert producer.deleted == 1


def test_dlpack_of_strided_memory():
    host = host_array((3, 8), "float16")
    assert_same_bits(borrow(Producer(host[:, 2:6]), "x").numpy(), host[:, 2:6])


def test_dlpack_without_deleter_or_rank():
    array = borrow(Producer(np.array(3.5), deleter=False), "x")
    assert array.shape == () and array.numpy() == 3.5


def test_old_dlpack_producers_are_asked_again_without_max_version():
    producer = Producer(host_array((3,), "float32"), knows_versions=False)
    borrow(producer, "x")
    assert producer.requests == [{"stream": None}]


def test_dlpack_read_only_flag():
    assert borrow(Producer(host_array((3,), "float32"), flags=1), "x").readonly
    assert not borrow(Producer(host_array((3,), "float32"), flags=2), "x").readonly      # "copied"


def test_pinned_host_memory_is_host_memory():
    assert borrow(Producer(host_array((3,), "float32"), device=(3, 0)), "x").device == Device("cpu")


@pytest.mark.parametrize("options, error, message", [
    (dict(major=2), ValueError, "keys: expected DLPack version 1, got 2.3"),
    (dict(device=(10, 0)), ValueError, "keys: expected an array that lends its memory, got Producer: "
                                       "it is on DLPack device type 10, not in host or CUDA memory"),
    (dict(code=(5, 64)), TypeError, "keys: expected a dtype of .*, got DLPack type code 5 with 64 bits and 1 lanes"),
    (dict(lanes=4), TypeError, "keys: expected a dtype of .*, got DLPack type code 2 with 32 bits and 4 lanes"),
    (dict(code=(2, 8)), TypeError, "keys: expected a dtype of .*, got DLPack type code 2 with 8 bits")])
def test_dlpack_that_is_refused_is_returned(options, error, message):
    producer = Producer(host_array((3,), "float32"), **options)
    with pytest.raises(error, match=message):
        borrow(producer, "keys")
    assert producer.deleted == (0 if "device" in options else 1)


def test_dlpack_producers_that_fail_or_cheat():
    class Failing(Producer):
        def __dlpack__(self, **request):
            raise BufferError("lent to somebody else")

    class Cheating(Producer):
        def __dlpack__(self, **request):
            return 7

    class Twice(Producer):
        def __dlpack__(self, **request):
            return self.capsule if hasattr(self, "capsule") else super().__dlpack__(**request)

    host = host_array((3,), "float32")
    with pytest.raises(ValueError, match="keys: .*lends its memory, got Failing: lent to somebody else"):
        borrow(Failing(host), "keys")
    with pytest.raises(ValueError, match="__dlpack__ returned 7, not a fresh DLPack capsule"):
        borrow(Cheating(host), "keys")
    twice = Twice(host)
    first = borrow(twice, "keys")
    with pytest.raises(ValueError, match="not a fresh DLPack capsule"):
        borrow(twice, "keys")
    del first
    assert twice.deleted == 1


# ---- DLPack, producer


class Owner:
    """Something that owns memory and can be watched dying."""

    def __init__(self, host):
        self.host = host

    def array(self, readonly=False, strides=None):
        host = self.host
        return Array(host.ctypes.data, host.shape, strides, arrays._TAGS[host.dtype], Device("cpu"), "numpy", self,
                     readonly=readonly)


def exported(host, import_):
    """`import_` of an Array on `host`, and a reference that tells whether the memory is still held."""
    owner = Owner(host)
    return import_(owner.array()), weakref.ref(owner)


@pytest.mark.parametrize("consumer", ["numpy", "torch", "jax", "kvbench"])
@pytest.mark.parametrize("tag", TAGS)
def test_arrays_are_exported(consumer, tag):
    if consumer in ("torch", "jax"):
        pytest.importorskip(consumer)
    if consumer == "numpy" and tag == "bfloat16":
        pytest.skip("NumPy's DLPack has no bfloat16")
    import_ = {"numpy": np.from_dlpack, "torch": lambda x: sys.modules["torch"].from_dlpack(x),
               "jax": lambda x: sys.modules["jax"].dlpack.from_dlpack(x),
               "kvbench": lambda x: arrays._borrow_dlpack(x, "x", None)}[consumer]
    memory = np.zeros(256, np.uint8)
    host = memory[-memory.ctypes.data % 64:][:96].view(np.dtype(ml_dtypes.bfloat16 if tag == "bfloat16" else tag))
    host[...] = host_array(host.shape, tag)
    imported, owner = exported(host, import_)
    narrowed = consumer == "jax" and tag in ("float64", "int64", "uint64")
    if not narrowed:
        assert owner() is not None, "the consumer still uses the memory"
        again = borrow(imported, "x")
        assert again.pointer == host.ctypes.data and again.dtype == tag
        assert_same_bits(again.numpy(), host)
        del again
    del imported
    if consumer == "jax":
        gc.collect()                                    # JAX lets go of foreign memory when the collector runs
    assert owner() is None, "the consumer is done: the memory must be let go"


@pytest.mark.parametrize("max_version, name", [(None, "dltensor"), ((0, 8), "dltensor"), ((1, 0), "dltensor_versioned"),
                                               ((2, 5), "dltensor_versioned")])
def test_exported_capsules_have_the_version_asked_for_and_release_when_unused(max_version, name):
    capsule, owner = exported(host_array((3, 4), "bfloat16"), lambda array: array.__dlpack__(max_version=max_version))
    assert repr(capsule).split('"')[1] == name and owner() is not None
    del capsule
    assert owner() is None


def test_export_refuses_what_it_cannot_promise():
    read_only = Owner(host_array((3,), "float32")).array(readonly=True)
    with pytest.raises(BufferError, match="read-only Array needs a consumer of DLPack 1.0"):
        read_only.__dlpack__()
    assert not np.from_dlpack(read_only).flags.writeable
    array = Owner(host_array((3,), "float32")).array()
    with pytest.raises(BufferError, match="exported without a copy"):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"exported on its own device, cpu, not on \(2, 0\)"):
        array.__dlpack__(dl_device=(2, 0))
    assert array.__dlpack__(dl_device=(1, 0), copy=False) and array.__dlpack_device__() == (1, 0)
    assert not hasattr(array, "__cuda_array_interface__")


def test_a_consumers_refusal_reaches_the_caller_and_releases_the_memory():
    owner = Owner(host_array((3,), "bfloat16"))
    with pytest.raises((BufferError, RuntimeError, TypeError)) as caught:
        np.from_dlpack(owner.array())
    assert str(caught.value)
    reference = weakref.ref(owner)
    del owner, caught
    assert reference() is None


def test_exports_of_device_memory_say_so(emulated):
    """NumPy makes the capsule without reading the memory: an address that nobody may read goes through it."""
    array = Array(0x7f0000000040, (4, 6), (8, 1), "bfloat16", Device("cuda", 1), "torch", None, stream=0)
    managed, _ = arrays._open_capsule(capsule := array.__dlpack__(max_version=(1, 0), stream=1))
    tensor = managed.tensor
    assert (tensor.data, tensor.device_type, tensor.device_id, tensor.ndim) == (0x7f0000000040, 2, 1, 2)
    assert (tensor.code, tensor.bits, tensor.lanes, tensor.byte_offset) == (4, 16, 1, 0)
    assert (tensor.shape[:2], tensor.strides[:2]) == ([4, 6], [8, 1])
    assert emulated.orders == [], "the legacy stream is the array's own, under its other handle"
    del capsule
    interface = array.__cuda_array_interface__
    assert interface == {"version": 3, "shape": (4, 6), "typestr": "<u2", "data": (0x7f0000000040, False),
                         "strides": (16, 2), "stream": 1}


def test_importing_kvbench_imports_no_framework_and_leaving_python_is_quiet():
    code = textwrap.dedent("""
        import sys
        import kvbench.arrays as arrays
        loaded = {"torch", "jax", "cupy", "numba"} & set(sys.modules)
        assert not loaded, loaded
        import numpy as np
        kept = []                                       # alive when the interpreter ends
        def keep(name, import_):
            try:
                __import__(name)
            except ImportError:
                return
            array = arrays.upload(np.arange(64, dtype=np.float32), "cpu")
            kept.append(import_(sys.modules[name], array))
            kept.append(arrays.borrow(kept[-1], "x"))
            kept.append([kept[-1].give(), array, kept])
        keep("torch", lambda torch, array: torch.from_dlpack(array))
        keep("jax", lambda jax, array: jax.dlpack.from_dlpack(array))
        keep("numpy", lambda numpy, array: numpy.from_dlpack(array))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


# ---- Device memory, emulated: a driver whose device memory is host memory and whose streams are a list


class Library:
    """The functions of libcuda.so.1 that kvbench calls. It keeps the rules that a wrong call would break on a GPU: a
    context must be current, pitches must be possible, events belong to somebody."""

    def __init__(self):
        self.context, self.events, self.calls, self.busy = [], {}, [], False

    def cuGetErrorString(self, status, text):
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"broken rule"
        return 0

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context, index):
        context._obj.value = 1000 + index.value
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.context.append(context.value - 1000)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        self.context.pop()
        return 0

    def call(self, *what):
        if not self.context:
            return 201                                  # CUDA_ERROR_INVALID_CONTEXT
        self.calls.append(what)
        return 0

    def cuEventCreate(self, event, flags):
        event._obj.value = 1 + len(self.calls) + len(self.events)
        self.events[event._obj.value] = None
        return self.call("create")

    def cuEventRecord(self, event, stream):
        self.events[event.value] = stream.value or 0
        return self.call("record", stream.value or 0)

    def cuEventQuery(self, event):
        assert event.value in self.events
        return 600 if self.busy else 0

    def cuEventDestroy_v2(self, event):
        del self.events[event.value]
        return 0

    def cuStreamWaitEvent(self, stream, event, flags):
        return self.call("wait", stream.value or 0, self.events[event.value])

    def cuMemcpyAsync(self, target, source, nbytes, stream):
        ctypes.memmove(target.value, source.value, nbytes.value)
        return self.call("copy", stream.value or 0)

    def cuMemcpy2DAsync_v2(self, rectangle, stream):
        # The layout of CUDA_MEMCPY2D, from cuda.h, written down a second time.
        raw = bytes(rectangle._obj)
        assert len(raw) == 128
        side = "QQI4xQQQQ"
        fields = struct.unpack(f"={side}{side}QQ", raw)
        (source_x, source_y, source_type, source_host, source, source_array, source_pitch,
         target_x, target_y, target_type, target_host, target, target_array, target_pitch, width, height) = fields
        assert not any((source_x, source_y, source_array, target_x, target_y, target_array))
        self.sides = source_type, target_type
        source, target = ((host if type == 1 else address) for type, host, address in
                          ((source_type, source_host, source), (target_type, target_host, target)))
        if width > min(source_pitch, target_pitch) or max(source_pitch, target_pitch) > 2**31 - 1:
            return 1                                    # CUDA_ERROR_INVALID_VALUE
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
        return self.call("rectangle", stream.value or 0)

    def cuMemsetD8Async(self, pointer, value, count, stream):
        ctypes.memmove(pointer.value, bytes(value) * count.value, len(bytes(value)) * count.value)
        return self.call("fill", stream.value or 0)

    cuMemsetD16Async = cuMemsetD32Async = cuMemsetD8Async

    def cuCtxSynchronize(self):
        return self.call("synchronize")

    def cuPointerGetAttribute(self, index, attribute, pointer):
        assert attribute.value == 9
        index._obj.value = 1
        return 0

    @property
    def orders(self):
        """(waiting stream, awaited stream) of every wait."""
        return [call[1:] for call in self.calls if call[0] == "wait"]

    @property
    def copies(self):
        return [call for call in self.calls if call[0] in ("copy", "rectangle")]


@contextlib.contextmanager
def emulated_driver():
    library = Library()
    driver = object.__new__(driver_module.Driver)
    driver._library, driver._contexts = library, {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(driver_module, "driver", lambda: driver)
        monkeypatch.setattr(arrays, "driver", lambda: driver)
        yield library
        library.busy = False
        driver_module.Loan.collect()
        assert not driver_module.Loan._waiting
    assert not library.context, "a context was left current"
    assert not library.events, "an event was leaked"


@pytest.fixture
def emulated():
    with emulated_driver() as library:
        yield library


def on_device(host, stream=0, index=0):
    """`host` as if it were in device memory."""
    strides = tuple(stride // host.itemsize for stride in host.strides)
    return Array(host.ctypes.data, host.shape, strides, arrays._TAGS[host.dtype], Device("cuda", index), "torch", host,
                 stream=stream)


class DeviceObject:
    """What Numba's device arrays are to others."""

    def __init__(self, host, stream=None, readonly=False, **more):
        self.host = host
        self.__cuda_array_interface__ = {"version": 3, "shape": host.shape, "typestr": host.dtype.str,
                                         "data": (host.ctypes.data, readonly), "stream": stream,
                                         "strides": None if host.flags.c_contiguous else host.strides, **more}

    __cuda_array_interface__ = None


def layouts(data, shape):
    """An array of `shape` with a drawn memory layout, non-negative strides, and room around it."""
    axes = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    padding = [data.draw(st.integers(0, 2)) for _ in shape]
    base = np.zeros([shape[axis] * steps[axis] + padding[axis] for axis in axes], np.uint16)
    return base, base.transpose(np.argsort(axes))[..., *(slice(0, n * step, step) for n, step in zip(shape, steps))]


@given(st.data())
def test_device_copies_equal_numpy_copies_for_every_pair_of_layouts(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
    (target_base, target), (_, source) = layouts(data, shape), layouts(data, shape)
    source[...] = np.random.default_rng(0).integers(1, 60000, shape)
    if shape and shape[0] and data.draw(st.booleans()):
        source = np.broadcast_to(source[:1], shape)
    expected_base = target_base.copy()
    if target.size:
        offset = target.ctypes.data - target_base.ctypes.data
        np.ndarray(target.shape, target.dtype, expected_base, offset, target.strides)[...] = source
    kinds = data.draw(st.sampled_from(("device to device", "host to device", "device to host")))
    with emulated_driver():
        to = on_device(target) if kinds.endswith("to device") else borrow(target, "target")
        from_ = borrow(source, "source") if kinds.startswith("host") else on_device(source)
        to.copy_from(from_)
        np.testing.assert_array_equal(target_base, expected_base)       # and nothing beside it was written
        np.testing.assert_array_equal(from_.to_host(), source)


@pytest.mark.parametrize("target, source, copies", [
    (np.zeros((2, 8, 100, 64), np.float16)[:, :, 7:12], np.ones((2, 8, 5, 64), np.float16), 1),
    (np.zeros((2, 8, 100, 64), np.float16), np.ones((2, 8, 100, 64), np.float16), 1),
    (np.zeros((8, 99, 2, 64), np.float16).swapaxes(0, 2), np.ones((8, 99, 2, 64), np.float16).swapaxes(0, 2), 1),
    (np.zeros((3, 8, 100, 64), np.float16)[:2, :4, 7:12], np.ones((2, 4, 5, 64), np.float16), 2)])
def test_appending_to_a_cache_is_one_copy(emulated, target, source, copies):
    on_device(target).copy_from(on_device(source))
    assert len(emulated.copies) == copies and (target == 1).all()


def test_rectangles_say_which_side_is_host_memory(emulated):
    target, source = np.zeros((3, 40), np.uint8)[:, :8], np.ones((3, 8), np.uint8)
    on_device(target).copy_from(source)
    assert emulated.sides == (1, 2) and (target == 1).all()
    on_device(target).to_host()
    assert emulated.sides == (2, 1)
    on_device(np.zeros_like(source)).copy_from(on_device(target))
    assert emulated.sides == (2, 2)


def test_a_pitch_beyond_the_drivers_limit_is_copied_row_by_row(emulated, monkeypatch):
    monkeypatch.setattr(driver_module, "_LONGEST_PITCH", 30)
    target, source = np.zeros((3, 40), np.uint8)[:, :8], np.ones((3, 8), np.uint8)
    on_device(target).copy_from(on_device(source))
    assert [call[0] for call in emulated.copies] == ["copy"] * 3 and (target == 1).all()


def test_copies_wait_for_what_they_read_and_the_host_waits_for_copies(emulated):
    a, b = host_array((4, 4), "float32"), np.zeros((4, 4), np.float32)
    on_device(b, stream=8).copy_from(on_device(a, stream=16))
    assert emulated.orders == [(8, 16)] and emulated.calls[-1][0] != "synchronize"
    emulated.calls.clear()
    on_device(b, stream=8).copy_from(on_device(a, stream=8), stream=24)
    assert emulated.orders == [(24, 8), (24, 8)] and ("copy", 24) in emulated.calls
    emulated.calls.clear()
    on_device(b, stream=8).copy_from(a)
    assert emulated.calls == [("copy", 8), ("synchronize",)]
    emulated.calls.clear()
    on_device(b, stream=8).to_host()
    assert emulated.calls == [("synchronize",), ("copy", 8), ("synchronize",)]


@given(shape=st.tuples(*[st.integers(1, 4)] * 3), steps=st.tuples(*[st.integers(1, 2)] * 3), data=st.data())
def test_views_that_interleave_are_told_from_views_that_meet(shape, steps, data):
    """Slices of one layout anywhere in one memory: whether they share an element, by listing their elements."""
    sizes = [length * step + data.draw(st.integers(0, 2)) for length, step in zip(shape, steps)]
    memory = np.arange(2 * math.prod(sizes), dtype=np.float32)
    strides = [4 * step * math.prod(sizes[axis + 1:]) for axis, step in enumerate(steps)]
    one, other = (np.lib.stride_tricks.as_strided(memory[data.draw(st.integers(0, memory.size // 2)):], shape, strides)
                  for _ in range(2))
    met = bool(set(one.ravel().tolist()) & set(other.ravel().tolist()))
    assert arrays._interleaved(borrow(one, "one"), borrow(other, "other")) is not met


def test_device_copies_go_between_heads_that_interleave(emulated):
    memory = np.arange(24, dtype=np.float32).reshape(2, 6, 2)                     # [kv_heads, tokens, head_dim]
    on_device(memory[:, :2]).copy_from(on_device(memory[:, 3:5]))
    np.testing.assert_array_equal(memory[:, :2], np.arange(24).reshape(2, 6, 2)[:, 3:5])


def test_device_copies_that_are_refused(emulated):
    memory = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="copy_from: other: expected memory apart from the target's"):
        on_device(memory[:6]).copy_from(on_device(memory[2:]))
    with pytest.raises(ValueError, match="copy_from: other: expected memory on cuda:0 or cpu, got cuda:1"):
        on_device(memory).copy_from(on_device(memory.copy(), index=1))
    assert not emulated.copies
    with pytest.raises(ValueError, match=r"numpy: expected host memory, got cuda:0: use to_host\(\)"):
        on_device(memory).numpy()


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("value", [0, 1])
def test_device_fill(emulated, tag, value):
    host = host_array((5,), tag)
    array = on_device(host, stream=8)
    if value and host.itemsize == 8:
        with pytest.raises(ValueError, match="fill: .*two equal halves of 32 bits, such as 0, got 1"):
            array.fill(value)
        return
    array.fill(value)
    assert_same_bits(host, np.full((5,), value, host.dtype))
    assert emulated.calls == [("fill", 8)]
    with pytest.raises(ValueError, match="fill: expected contiguous memory"):
        on_device(np.zeros((4, 4), np.float32)[:, :2]).fill(0)


def test_driver_errors_name_the_call(emulated):
    emulated.call = lambda *what: 700
    with pytest.raises(RuntimeError, match=r"cuCtxSynchronize: broken rule \(CUDA error 700\)"):
        on_device(np.zeros(3, np.float32)).to_host()
    del emulated.call


def test_borrowing_for_a_stream_makes_it_wait_and_keeps_the_memory_until_the_work_is_done(emulated):
    value = DeviceObject(host_array((3, 4), "float32"), stream=16)
    reference = weakref.ref(value)
    array = borrow(value, "x", stream=8)
    assert emulated.orders == [(8, 16)] and array.stream == 8 and array.device == Device("cuda", 1)
    emulated.busy = True
    del value, array
    assert reference() is not None, "stream 8 may still read it"
    assert emulated.calls[-1] == ("record", 8)
    borrow(DeviceObject(host_array((3,), "float32"), stream=16), "y", stream=8)
    assert reference() is not None
    emulated.busy = False
    borrow(DeviceObject(host_array((3,), "float32"), stream=16), "y", stream=8)
    assert reference() is None


def test_borrowing_on_the_producers_stream_needs_no_event(emulated):
    for stream, ours in ((16, 16), (16, None), (1, 0), (None, 0), (1, None)):
        array = borrow(DeviceObject(host_array((3,), "float32"), stream=stream), "x", stream=ours)
        assert array.stream == (16 if stream == 16 else 0)
    assert emulated.calls == []


def test_array_passes_through_borrow_unless_the_stream_changes(emulated):
    array = on_device(host_array((3,), "float32"), stream=16)
    assert borrow(array, "x") is array and borrow(array, "x", stream=16) is array
    moved = borrow(array, "x", stream=8)
    assert moved.stream == 8 and moved.pointer == array.pointer and array.stream == 16 and emulated.orders == [(8, 16)]
    value = DeviceObject(host_array((3,), "float32"))
    assert borrow(borrow(value, "x"), "x", stream=8).give() is value
    host = borrow(host_array((3,), "float32"), "x")
    assert borrow(host, "x", stream=8) is host


@pytest.mark.parametrize("ours, asked", [(None, 1), (0, 1), (48, 48)])
def test_dlpack_producers_are_told_our_stream(emulated, ours, asked):
    producer = Producer(host_array((3,), "float32"), device=(13, 0))
    array = borrow(producer, "x", stream=ours)
    assert producer.requests == [{"max_version": (1, 0), "stream": asked}] and emulated.orders == []
    assert array.stream == (ours or 0) and array.device == Device("cuda", 0)
    emulated.busy = True
    del array
    assert producer.deleted == 0, "the work on our stream may still use it"
    emulated.busy = False
    driver_module.Loan.collect()
    assert producer.deleted == 1


@pytest.mark.parametrize("asked, orders", [(None, [(0, 16)]), (1, [(0, 16)]), (48, [(48, 16)]), (16, []), (-1, [])])
def test_consumers_streams_wait_for_us(emulated, asked, orders):
    on_device(host_array((3,), "float32"), stream=16).__dlpack__(stream=asked)
    assert emulated.orders == orders


def test_cuda_array_interface_layouts(emulated):
    host = host_array((4, 6), "float16")
    array = borrow(DeviceObject(host[:, 1:4]), "x")
    assert array.strides == (6, 1) and array.shape == (4, 3) and array.pointer == host.ctypes.data + 2
    assert borrow(DeviceObject(host, readonly=True), "x").readonly
    assert borrow(DeviceObject(np.zeros((0, 3), np.float32), data=(0, False)), "x").shape == (0, 3)
    with pytest.raises(TypeError, match="x: expected a dtype of .*, got complex64"):
        borrow(DeviceObject(np.zeros(3, np.complex64)), "x")
    with pytest.raises(TypeError, match="x: expected an array without a mask"):
        borrow(DeviceObject(host, mask=host), "x")
    with pytest.raises(ValueError, match="x: expected strides of at least 0"):
        borrow(DeviceObject(host[::-1]), "x")


# ---- Arguments


def decode(query=None, keys=None, lengths=None, *, out=None, strided=True, stream=None):
    """An operator's use of Arguments."""
    arguments = Arguments("decode", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    keys = arguments.take("keys", keys, "batch kv_heads tokens head_dim", (query.dtype,), strided=strided)
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    out = arguments.result("out", out, "batch q_heads head_dim", (query.dtype, "float32"))
    return arguments, query, keys, lengths, out


QUERY, KEYS = np.zeros((2, 8, 64), np.float16), np.zeros((2, 4, 10, 64), np.float16)


def test_arguments_bind_sizes():
    arguments, query, keys, lengths, out = decode(QUERY, KEYS)
    assert arguments.sizes == {"batch": 2, "q_heads": 8, "head_dim": 64, "kv_heads": 4, "tokens": 10}
    assert (arguments.device, arguments.framework, arguments.stream) == (Device("cpu"), "numpy", 0)
    assert query.give() is QUERY and keys.give() is KEYS and lengths is None
    assert (out.shape, out.dtype, out.framework) == ((2, 8, 64), "float16", "numpy")


@pytest.mark.parametrize("shape, leading", [((64,), ()), ((0, 64), (0,)), ((2, 3, 64), (2, 3))])
def test_the_wildcard_takes_leading_dimensions(shape, leading):
    arguments = Arguments("rotate")
    arguments.take("x", np.zeros(shape, np.float32), "... head_dim", FLOATS)
    assert arguments.sizes == {"...": leading, "head_dim": 64}
    arguments.take("signs", np.zeros(64, np.int8), "64", ("int8",))
    arguments.take("y", np.zeros(shape, np.float32), "... 64", FLOATS)
    assert arguments.result("out", None, "... head_dim", "float16").shape == shape
    assert arguments.result("norms", None, "... 1", "float32").shape == (*leading, 1)
    assert arguments.result("other", None, (3, 5), "float32").shape == (3, 5)


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("tag", FLOATS)
def test_results_come_in_the_first_arguments_framework(framework, tag):
    query = to_framework(host_array((2, 8, 64), tag), framework)
    keys = to_framework(host_array((2, 4, 10, 64), tag), "numpy")
    _, _, _, _, out = decode(query, keys)
    out.copy_from(borrow(query, "query"))
    given = out.give()
    assert type(given) is type(query) and given.dtype == query.dtype
    assert_same_bits(borrow(given, "given").to_host(), borrow(query, "query").to_host())


def test_out_is_the_callers_object():
    for out in (np.zeros((2, 8, 64), np.float16), np.zeros((2, 8, 64), np.float32)):
        assert decode(QUERY, KEYS, out=out)[-1].give() is out
    torch = pytest.importorskip("torch")
    out = torch.zeros(2, 8, 64)
    assert decode(QUERY, KEYS, out=out)[-1].give() is out


def test_strided_inputs():
    cache = np.zeros((4, 2, 16, 64), np.float16)
    for keys in (cache.transpose(1, 0, 2, 3), cache.transpose(1, 0, 2, 3)[:, :, 3:9], cache[:2, :, ::2, :]):
        assert decode(QUERY, keys)[2].numpy().shape == keys.shape
        with pytest.raises(ValueError, match=r"decode: keys: expected contiguous memory, got strides .*: "
                                             r"pass numpy.ascontiguousarray\(keys\)"):
            decode(QUERY, keys, strided=False)


EXPANDED = np.broadcast_to(np.zeros((2, 1, 10, 64), np.float16), (2, 4, 10, 64))
SLIDING = np.lib.stride_tricks.as_strided(np.zeros(4096, np.float16), (2, 4, 10, 64), (128, 256, 64, 2))
READ_ONLY = np.zeros((2, 8, 64), np.float16)
READ_ONLY.flags.writeable = False
SHARED = np.zeros((3, 8, 64), np.float16)


@pytest.mark.parametrize("call, error, message", [
    (dict(query=None, keys=KEYS), TypeError,
     "decode: query: expected an array [batch, q_heads, head_dim], got None"),
    (dict(query=[[1.0]], keys=KEYS), TypeError,
     "decode: query: expected an array (NumPy, PyTorch, JAX, CuPy, Numba CUDA, or anything with __dlpack__), got list: "
     "pass numpy.asarray(query, dtype)"),
    (dict(query=QUERY.astype(np.float64), keys=KEYS), TypeError,
     "decode: query: expected dtype float16, bfloat16 or float32, got float64: convert query first"),
    (dict(query=QUERY, keys=KEYS.astype(np.float32)), TypeError,
     "decode: keys: expected dtype float16, got float32: convert keys first"),
    (dict(query=QUERY[0], keys=KEYS), ValueError,
     "decode: query: expected shape [batch, q_heads, head_dim], got [8, 64]"),
    (dict(query=QUERY, keys=KEYS[:1]), ValueError,
     "decode: keys: expected shape [batch, kv_heads, tokens, head_dim] with batch = 2 as in query, got [1, 4, 10, 64]"),
    (dict(query=QUERY, keys=np.zeros((2, 4, 10, 32), np.float16)), ValueError,
     "decode: keys: expected shape [batch, kv_heads, tokens, head_dim] with head_dim = 64 as in query, "
     "got [2, 4, 10, 32]"),
    (dict(query=QUERY, keys=KEYS, lengths=np.zeros(3, np.int32)), ValueError,
     "decode: lengths: expected shape [batch] with batch = 2 as in query, got [3]"),
    (dict(query=QUERY, keys=KEYS, lengths=np.zeros(2)), TypeError,
     "decode: lengths: expected dtype int32, got float64: convert lengths first"),
    (dict(query=np.zeros((2, 8, 128), np.float16)[:, :, ::2], keys=KEYS), ValueError,
     "decode: query: expected contiguous memory, got strides [1024, 128, 2] for shape [2, 8, 64]: "
     "pass numpy.ascontiguousarray(query)"),
    (dict(query=QUERY, keys=np.zeros((2, 4, 64, 10), np.float16).swapaxes(2, 3)), ValueError,
     "decode: keys: expected a contiguous last dimension, got strides [2560, 640, 1, 10] for shape [2, 4, 10, 64]: "
     "pass numpy.ascontiguousarray(keys)"),
    (dict(query=QUERY, keys=EXPANDED), ValueError,
     "decode: keys: expected memory of its own for every element, got overlapping strides [640, 0, 64, 1] for shape "
     "[2, 4, 10, 64] (an expanded array?): pass numpy.ascontiguousarray(keys)"),
    (dict(query=QUERY, keys=SLIDING), ValueError,
     "decode: keys: expected memory of its own for every element, got overlapping strides [64, 128, 32, 1] for shape "
     "[2, 4, 10, 64] (an expanded array?): pass numpy.ascontiguousarray(keys)"),
    (dict(query=QUERY, keys=KEYS, out=np.zeros((2, 8, 64))), TypeError,
     "decode: out: expected dtype float16 or float32, got float64: convert out first"),
    (dict(query=QUERY, keys=KEYS, out=np.zeros((2, 4, 64), np.float16)), ValueError,
     "decode: out: expected shape [2, 8, 64] = [batch, q_heads, head_dim], got [2, 4, 64]"),
    (dict(query=QUERY, keys=KEYS, out=READ_ONLY), ValueError,
     "decode: out: expected writable memory, got a read-only array: pass a writable copy"),
    (dict(query=QUERY, keys=KEYS, out=np.zeros((2, 8, 128), np.float16)[:, :, :64]), ValueError,
     "decode: out: expected contiguous memory, got strides [1024, 128, 1] for shape [2, 8, 64]: "
     "pass numpy.ascontiguousarray(out)"),
    (dict(query=QUERY, keys=KEYS, out=QUERY), ValueError,
     "decode: out: expected memory apart from query, got an array that overlaps it: pass another one, or omit out"),
    (dict(query=SHARED[:2], keys=KEYS, out=SHARED[1:]), ValueError,
     "decode: out: expected memory apart from query, got an array that overlaps it: pass another one, or omit out"),
    (dict(query=QUERY, keys=KEYS, stream="s"), TypeError,
     "decode: stream: expected a handle (int) or an object with __cuda_stream__, got 's': "
     "pass its handle (.cuda_stream, .ptr or .handle)"),
    (dict(query=QUERY, keys=KEYS, stream=True), TypeError,
     "decode: stream: expected a handle (int) or an object with __cuda_stream__, got True: "
     "pass its handle (.cuda_stream, .ptr or .handle)"),
    (dict(query=QUERY, keys=KEYS, stream=-1), ValueError,
     "decode: stream: expected 0 or the handle of an explicit stream, got -1"),
    (dict(query=QUERY, keys=KEYS, stream=2), ValueError,
     "decode: stream: expected 0 or the handle of an explicit stream, got 2 (the per-thread default stream, which "
     "PyTorch cannot use)")])
def test_argument_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error) as caught:
        decode(**call)
    assert str(caught.value) == message


def test_argument_errors_of_wildcards_and_numbers():
    arguments = Arguments("rotate")
    arguments.take("x", np.zeros((2, 3, 64), np.float32), "... head_dim", FLOATS)
    for value, shape, message in (
            (np.zeros((2, 4, 64), np.float32), "... head_dim",
             "rotate: y: expected shape [..., head_dim] with ... = [2, 3] as in x, got [2, 4, 64]"),
            (np.zeros((2, 64), np.float32), "... 3 head_dim",
             "rotate: y: expected shape [..., 3, head_dim] with ... = [2, 3] as in x, got [2, 64]"),
            (np.zeros((64,), np.float32), "... 3 head_dim", "rotate: y: expected shape [..., 3, head_dim], got [64]"),
            (np.zeros((5, 64), np.float32), "4 head_dim", "rotate: y: expected shape [4, head_dim], got [5, 64]"),
            (np.zeros((5, 64), np.float32), "", "rotate: y: expected shape [], got [5, 64]")):
        with pytest.raises(ValueError) as caught:
            arguments.take("y", value, shape, FLOATS)
        assert str(caught.value) == message
    with pytest.raises(ValueError) as caught:
        arguments.result("out", np.zeros((2, 3), np.float32), (3, 2), "float32")
    assert str(caught.value) == "rotate: out: expected shape [3, 2], got [2, 3]"
    arguments.require(True, "seed", "a number", "x")
    with pytest.raises(ValueError) as caught:
        arguments.require(False, "bits", "2, 3 or 4", 5)
    assert str(caught.value) == "rotate: bits: expected 2, 3 or 4, got 5"


def test_in_place_outputs():
    arguments = Arguments("rotate")
    memory = np.zeros((3, 64), np.float32)
    arguments.take("x", memory[:2], "rows head_dim", FLOATS)
    assert arguments.result("out", memory[:2], "rows head_dim", "float32", in_place=True).numpy().shape == (2, 64)
    for value, shape in ((memory[1:], (2, 64)), (memory, (3, 64)), (memory[:1], (1, 64))):
        with pytest.raises(ValueError, match="rotate: out: expected memory apart from x"):
            arguments.result("out", value, shape, "float32", in_place=True)
    with pytest.raises(ValueError, match="rotate: norms: expected memory apart from out"):
        other = Arguments("rotate")
        other.take("x", memory[:1], "rows head_dim", FLOATS)
        other.result("out", memory[1:2], "rows head_dim", "float32")
        other.result("norms", memory[1:2, :1].reshape(1), "rows", "float32")


@pytest.mark.parametrize("framework, cure", [("torch", "keys.contiguous()"),
                                             ("numpy", "numpy.ascontiguousarray(keys)")])
def test_layout_cures_are_in_the_frameworks_words(framework, cure):
    keys = to_framework(np.zeros((2, 4, 64, 10), np.float16), framework).swapaxes(2, 3)
    with pytest.raises(ValueError) as caught:
        decode(QUERY, keys)
    assert str(caught.value).endswith(f": pass {cure}")


def test_jax_outputs_are_refused():
    out = to_framework(np.zeros((2, 8, 64), np.float16), "jax")
    with pytest.raises(ValueError) as caught:
        decode(QUERY, KEYS, out=out)
    assert str(caught.value) == ("decode: out: expected writable memory, got a JAX array, which is immutable: "
                                 "omit out and use the array that is returned")


def test_arguments_must_share_a_device(emulated):
    with pytest.raises(ValueError) as caught:
        decode(QUERY, on_device(KEYS))
    assert str(caught.value) == "decode: keys: expected memory on cpu, where query is, got cuda:0: move one of them"
    with pytest.raises(ValueError) as caught:
        decode(on_device(QUERY, stream=8), on_device(KEYS, stream=16, index=1))
    assert str(caught.value) == "decode: keys: expected memory on cuda:0, where query is, got cuda:1: move one of them"
    assert emulated.orders == [], "an error must change nothing"


class Stream:
    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return 0, self.handle


@pytest.mark.parametrize("stream, chosen, orders", [
    (None, 8, [(8, 16)]), (8, 8, [(8, 16)]), (Stream(48), 48, [(48, 8), (48, 16)]), (0, 0, [(0, 8), (0, 16)]),
    (1, 0, [(0, 8), (0, 16)])])
def test_the_first_argument_or_the_caller_chooses_the_stream(emulated, stream, chosen, orders):
    out = np.zeros((2, 8, 64), np.float16)
    arguments, query, keys, _, out = decode(on_device(QUERY, stream=8), on_device(KEYS, stream=16),
                                            out=on_device(out, stream=chosen), stream=stream)
    assert arguments.stream == query.stream == keys.stream == out.stream == chosen and emulated.orders == orders


# ---- On a GPU


@pytest.fixture
def gpu():
    driver_module.driver.cache_clear()
    try:
        return driver_module.driver()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def to_gpu(host, framework):
    """A framework's own device copy of a host array."""
    bits = host.view(np.uint16) if host.dtype == ml_dtypes.bfloat16 else host
    if framework == "torch":
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(bits.copy())
        return (tensor.view(torch.bfloat16) if bits is not host else tensor).cuda()
    if framework == "cupy":
        cupy = pytest.importorskip("cupy")
        array = cupy.asarray(bits)
        return array.view(ml_dtypes.bfloat16) if bits is not host else array
    if framework == "jax":
        jax = pytest.importorskip("jax")
        try:
            device = jax.devices("cuda")[0]
        except RuntimeError as error:
            pytest.skip(f"JAX has no GPU: {error}")
        with jax.enable_x64(True):
            return jax.device_put(host, device)
    cuda = pytest.importorskip("numba.cuda")
    return cuda.to_device(host)


def supported(framework, tag):
    return not (framework == "numba" and tag == "bfloat16")


GPU_FRAMEWORKS = ("torch", "cupy", "jax", "numba")


@pytest.mark.gpu
@pytest.mark.parametrize("framework", GPU_FRAMEWORKS)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 8)], ids=str)
def test_gpu_memory_is_borrowed(gpu, framework, tag, shape):
    if not supported(framework, tag):
        pytest.skip("Numba has no bfloat16")
    if framework == "numba" and shape == ():
        pytest.skip("Numba has no device arrays without dimensions")
    host = host_array(shape, tag)
    value = to_gpu(host, framework)
    array = borrow(value, "x")
    assert (array.shape, array.dtype, array.device, array.framework) == (shape, tag, Device("cuda", 0), framework)
    assert array.readonly == (framework == "jax") and array.give() is value and array.is_contiguous
    assert_same_bits(array.to_host(), host)


@pytest.mark.gpu
@pytest.mark.parametrize("framework", GPU_FRAMEWORKS)
@pytest.mark.parametrize("tag", ["float16", "bfloat16", "float32", "int32", "uint32", "bool"])
def test_gpu_results_are_given_in_the_framework(gpu, framework, tag):
    example = to_gpu(host_array((2, 8), "float32"), framework)
    host = host_array((4, 16), tag)
    array = empty((4, 16), tag, "cuda", framework)
    array.copy_from(host)
    given = array.give()
    assert type(given) is type(example)
    if supported(framework, tag):
        again = borrow(given, "given")
        assert (again.dtype, again.pointer) == (tag, array.pointer)
        assert_same_bits(again.to_host(), host)
    part = array.narrow(0, 1, 3)
    assert_same_bits(borrow(part.give(), "part").to_host().view(np.uint8), host[1:3].view(np.uint8))
    assert not zeros((4, 16), tag, "cuda", framework).to_host().view(np.uint8).any()


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["torch", "cupy", "numba"])
def test_gpu_strided_memory(gpu, framework):
    host = host_array((4, 16), "float32")
    value = to_gpu(host, framework)
    assert_same_bits(borrow(value[:, 2:9], "x").to_host(), host[:, 2:9])
    target = zeros((4, 16), "float32", "cuda", framework)
    target.narrow(1, 2, 9).copy_from(borrow(value[:, 2:9], "x"))
    expected = np.zeros_like(host)
    expected[:, 2:9] = host[:, 2:9]
    assert_same_bits(target.to_host(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("consumer", ["torch", "cupy", "jax"])
@pytest.mark.parametrize("producer", GPU_FRAMEWORKS)
def test_gpu_arrays_are_exported(gpu, producer, consumer):
    host = host_array((4, 16), "float16")
    to_gpu(host[:1], consumer)                          # skips where the consumer has no GPU
    array = upload(host, "cuda", producer)
    package = sys.modules[consumer]
    imported = borrow((package.dlpack if consumer == "jax" else package).from_dlpack(array), "imported")
    assert (imported.pointer, imported.framework) == (array.pointer, consumer)
    assert_same_bits(imported.to_host(), host)


def busy_then_ones_torch(stream):
    """Ones that are written late on `stream`: who reads them too early sees zeros."""
    import torch
    value = torch.zeros(1 << 22, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        value.fill_(1)
    return value


@pytest.mark.gpu
def test_gpu_streams_of_torch(gpu):
    torch = pytest.importorskip("torch")
    side, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert borrow(torch.zeros(3, device="cuda"), "x").stream == side.cuda_stream
        arguments = Arguments("operator")
        arguments.take("x", torch.zeros(3, device="cuda"), "n", FLOATS)
        assert arguments.stream == side.cuda_stream
    value = busy_then_ones_torch(side)
    with torch.cuda.stream(side):
        arguments = Arguments("operator", stream=other)
        x = arguments.take("x", value, "n", FLOATS)
    assert arguments.stream == x.stream == other.cuda_stream
    out = arguments.result("out", None, "n", "float32")
    out.copy_from(x)                                    # queued on `other`, which must wait for `side`
    other.synchronize()
    assert out.give().min().item() == 1


@pytest.mark.gpu
def test_gpu_streams_of_cupy(gpu):
    cupy = pytest.importorskip("cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        assert borrow(cupy.zeros(3, "float32"), "x").stream == stream.ptr
    assert borrow(cupy.zeros(3, "float32"), "x").stream == cupy.cuda.get_current_stream().ptr
    arguments = Arguments("operator", stream=stream)
    arguments.take("x", cupy.ones(3, "float32"), "n", FLOATS)
    out = arguments.result("out", None, "n", "float32")
    assert arguments.stream == out.stream == stream.ptr and isinstance(out.give(), cupy.ndarray)


@pytest.mark.gpu
def test_gpu_streams_of_numba(gpu):
    cuda = pytest.importorskip("numba.cuda")
    stream = cuda.stream()
    handle = stream.__cuda_stream__()[1] if hasattr(stream, "__cuda_stream__") else stream.handle.value
    assert borrow(cuda.to_device(np.ones(3, np.float32)), "x").stream == 0       # the default stream
    assert borrow(cuda.device_array(3, np.float32, stream=stream), "x").stream == handle


@pytest.mark.gpu
def test_gpu_results_for_jax_wait_for_our_stream(gpu):
    """JAX computes on streams of its own: it must not read a result before the work queued on ours is done."""
    torch = pytest.importorskip("torch")
    side = torch.cuda.Stream()
    template = to_gpu(host_array((1 << 22,), "float32"), "jax")
    arguments = Arguments("operator", stream=side)
    arguments.take("x", template, "n", FLOATS)
    out = arguments.result("out", None, "n", "float32")
    out.copy_from(borrow(busy_then_ones_torch(side), "ones", stream=side.cuda_stream))
    assert float((out.give() * 2).min()) == 2


@pytest.mark.gpu
def test_gpu_memory_of_jax_is_kept_until_our_work_is_done(gpu):
    torch = pytest.importorskip("torch")
    side = torch.cuda.Stream()
    value = to_gpu(np.full(1 << 22, 7, np.float32), "jax")
    x = borrow(value, "x", stream=side.cuda_stream)
    out = empty((1 << 22,), "float32", "cuda", "torch", stream=side.cuda_stream)
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
    out.copy_from(x)
    del x, value
    for _ in range(4):                                  # would be given the same memory, had it been let go
        to_gpu(np.zeros(1 << 22, np.float32), "jax").block_until_ready()
    side.synchronize()
    assert out.give().min().item() == 7


@pytest.mark.gpu
def test_gpu_operators_can_be_captured_in_a_graph(gpu):
    """Arguments and copies within the device ask nothing that stream capture forbids."""
    torch = pytest.importorskip("torch")
    x, out = torch.zeros(1024, device="cuda"), torch.zeros(1024, device="cuda")

    def operate():
        arguments = Arguments("operator")
        source = arguments.take("x", x, "n", FLOATS)
        arguments.result("out", out, "n", "float32").copy_from(source, arguments.stream)

    operate()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operate()
    x.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert out.min().item() == 3


@pytest.mark.gpu
def test_gpu_arguments_on_host_and_device_are_refused(gpu):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="decode: keys: expected memory on cuda:0, where query is, got cpu"):
        decode(torch.zeros(2, 8, 64, device="cuda", dtype=torch.float16), KEYS)
