"""What one would use otherwise: library functions that do a kernel's work, timed in the same run with the same timer.

A baseline gets the very arrays that the kernel gets and must come close to the kernel's reference before it is timed.
"Close" is the accuracy that its storage type allows, not the kernel's own tolerance: a user would accept either.
"""
from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvbench import arrays
from kvbench.ops import attention
from kvbench.registry import Kernel, get, nearest

EXACT = "attention.decode"     # the kernel whose baselines are those of every kernel with `exact`
PAGE_TOKENS = 16               # FlashInfer's batch decode reads pages; 16 tokens is what serving systems use
WORKSPACE_BYTES = 128 << 20    # what FlashInfer's documentation gives its wrappers


class Missing(Exception):
    """This baseline cannot run this case here; the message says why."""


@dataclass(frozen=True)
class Baseline:
    """prepare(inputs) -> a call without arguments that returns the kernel's first output; raises Missing."""

    name: str
    kernel: str
    devices: tuple[str, ...]
    framework: str             # the library, whose stream and graph capture the call needs: numpy, torch, kvbench
    prepare: Callable[[dict], Callable]
    summary: str
    library: str | None = None     # where the call needs another library than its framework
    storage: str | None = None     # where it holds keys and values in a smaller type than they come in


def choose(requested: Sequence[str], kernels: Sequence[Kernel], device: str) -> list[str]:
    """The requested names, "all" spelled out; ValueError for one that does no kernel's work on this device."""
    known = list(dict.fromkeys(baseline.name for baseline in BASELINES))
    useful = list(dict.fromkeys(baseline.name for kernel in kernels for baseline in of(kernel, device, known)))
    for name in requested:
        if name not in known and name != "all":
            raise ValueError(f"unknown baseline {name!r}{nearest(name, [*known, 'all'])}")
        if name not in useful and name != "all":
            names = ", ".join(kernel.name for kernel in kernels)
            raise ValueError(f"baseline {name!r} does the work of none of {names} on {device}; "
                             f"those that do: {', '.join(useful) or 'none'}")
    return useful if "all" in requested else list(dict.fromkeys(requested))


def load(names: Sequence[str]) -> None:
    """Import the libraries of these baselines, before any kernel runs.

    The order matters on the CPU: if Numba's OpenMP threads start first, PyTorch joins that library with the nesting
    that Numba switched on, and runs several times slower than by itself.
    """
    for framework in {baseline.framework for baseline in BASELINES if baseline.name in names}:
        with contextlib.suppress(Missing):     # said again, with the reason, for every case that misses it
            _import(framework)


def of(kernel: Kernel, device: str, names: Sequence[str]) -> list[Baseline]:
    """The baselines of these names that do a kernel's work on a device ("cpu", "cuda").

    Exact attention is not a baseline of itself: it is the kernel that is timed.
    """
    works = {kernel.name} | ({EXACT} if kernel.exact else set())
    return [baseline for baseline in BASELINES if baseline.name in names and device in baseline.devices
            and baseline.kernel in works and not (baseline.framework == "kvbench" and kernel.name == EXACT)]


def missing(baseline: Baseline) -> str | None:
    """Why this baseline cannot run here, if it cannot."""
    try:
        _import(baseline.framework)
        _import(baseline.library or baseline.framework)
    except Missing as reason:
        return str(reason)
    return None


def inputs_of(baseline: Baseline, kernel: Kernel, inputs: dict, device: str) -> dict:
    """What the baseline gets: the kernel's inputs, or those of exact attention on the cache that the codes replace.

    On the CPU that cache is float32, the type that CPUs multiply; on a GPU it has the type of the query.
    """
    if baseline.kernel == kernel.name:
        return inputs
    query = inputs["query"]
    dtype = "float32" if device == "cpu" else arrays.borrow(query, "query").dtype
    if device == "cpu":
        query = query.astype(np.float32)
    return {"query": query, "lengths": inputs.get("lengths"), "scale": inputs.get("scale"),
            **kernel.exact(inputs, dtype)}


def bytes_moved(baseline: Baseline, kernel: Kernel, problem: dict, device: str) -> int | None:
    """The least that this way of doing the work must move; None where it holds keys and values in a type of its own."""
    if baseline.storage is not None:
        return None
    if baseline.kernel == kernel.name:
        return kernel.traffic(problem).bytes_moved
    exact = get(EXACT)
    shape = {axis: value for axis, value in problem.items() if axis in exact.axes}
    return exact.traffic(exact.problem(**shape | ({"dtype": "float32"} if device == "cpu" else {}))).bytes_moved


def allowed_error(inputs: dict, storage: str | None = None) -> float:
    """Relative RMS error that a baseline may have: a few roundings in the storage type, and float32 sums.

    One rounding costs half an eps; inputs, probabilities and output are each rounded once.  Wrong work is off by more.
    A baseline that holds keys and values in a smaller type rounds each of them once more.
    """
    dtypes = [arrays.borrow(value, name).dtype for name, value in inputs.items() if hasattr(value, "__dlpack__")]
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float8_e4m3fn": 2.0**-3}
    return 4 * max((eps.get(dtype, 0.0) for dtype in dtypes), default=0.0) + eps.get(storage, 0.0) + 32 * 2.0**-23


# ---- decode attention ------------------------------------------------------------------------------------------------

def _plain(inputs: dict):
    """query, keys, values, scale of a decode step; Missing if its sequences have unequal lengths."""
    query, keys, values = (inputs[name] for name in ("query", "keys", "values"))
    if inputs.get("lengths") is not None:
        lengths = arrays.borrow(inputs["lengths"], "lengths").to_host()
        if (lengths != keys.shape[2]).any():
            raise Missing("takes no ragged lengths without a mask")
    scale = inputs.get("scale")
    return query, keys, values, query.shape[-1]**-0.5 if scale is None else scale


def _numpy_decode(inputs):
    query, keys, values, scale = _plain(inputs)
    batch, kv_heads, _, head_dim = keys.shape

    def call():
        # NumPy multiplies no 16-bit floats: the conversion is part of what this way costs.
        grouped = query.astype(np.float32).reshape(batch, kv_heads, -1, head_dim)
        logits = grouped @ keys.astype(np.float32, copy=False).swapaxes(-1, -2)
        logits *= np.float32(scale)
        logits -= logits.max(axis=-1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=-1, keepdims=True)
        return (logits @ values.astype(np.float32, copy=False)).reshape(query.shape)

    return call


def _torch_decode(backend: str | None, packed: bool):
    """Scaled dot product attention by one of PyTorch's backends.

    packed: the query heads of a group stand as query tokens of their KV head, which is the same sum without a mask and
    needs no grouped-query support.
    """
    def prepare(inputs):
        torch = _import("torch")
        query, keys, values, scale = _plain(inputs)
        query, keys, values = (_torch_tensor(torch, x) for x in (query, keys, values))
        batch, q_heads, head_dim = query.shape
        kv_heads = keys.shape[1]
        shaped = query.view(batch, kv_heads, q_heads // kv_heads, head_dim) if packed else query[:, :, None]
        grouped = not packed and q_heads != kv_heads
        attend = torch.nn.functional.scaled_dot_product_attention
        kernels = getattr(torch.nn.attention.SDPBackend, backend) if backend else None

        @torch.inference_mode()
        def call():
            if kernels is None:
                return attend(shaped, keys, values, scale=scale, enable_gqa=grouped).reshape(query.shape)
            with torch.nn.attention.sdpa_kernel(kernels):
                return attend(shaped, keys, values, scale=scale, enable_gqa=grouped).reshape(query.shape)

        return call
    return prepare


def _flashinfer_single(tensor_cores: bool, dtype: str | None = None):
    def prepare(inputs):
        torch, flashinfer = _import("torch"), _import("flashinfer")
        query, keys, values, scale = _plain(inputs)
        if query.shape[0] != 1:
            raise Missing("single decode takes batch 1")
        query, keys, values = (_torch_tensor(torch, x)[0] for x in (query, keys, values))
        if dtype:
            keys, values = (x.to(getattr(torch, dtype)) for x in (keys, values))

        def call():
            return flashinfer.single_decode_with_kv_cache(query, keys, values, kv_layout="HND", sm_scale=scale,
                                                          use_tensor_cores=tensor_cores)[None]

        return call
    return prepare


def _flashinfer_batch(tensor_cores: bool, dtype: str | None = None):
    """Batch decode from a paged cache; the pages lie in order, which is the best case of such a cache."""
    def prepare(inputs):
        torch, flashinfer = _import("torch"), _import("flashinfer")
        query, keys, values, scale = _plain(inputs)
        batch, kv_heads, tokens, head_dim = keys.shape
        if tokens % PAGE_TOKENS:
            raise Missing(f"wants tokens in whole pages of {PAGE_TOKENS}")
        query, keys, values = (_torch_tensor(torch, x) for x in (query, keys, values))
        pages = batch * tokens // PAGE_TOKENS

        def paged(x):
            x = x.to(getattr(torch, dtype)) if dtype else x
            x = x.view(batch, kv_heads, tokens // PAGE_TOKENS, PAGE_TOKENS, head_dim)
            return x.transpose(1, 2).reshape(pages, kv_heads, PAGE_TOKENS, head_dim)

        cache = paged(keys), paged(values)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=query.device), "HND", use_tensor_cores=tensor_cores)
        ends = torch.arange(0, pages + 1, tokens // PAGE_TOKENS, dtype=torch.int32, device=query.device)
        last = torch.full((batch,), PAGE_TOKENS, dtype=torch.int32, device=query.device)
        wrapper.plan(ends, torch.arange(pages, dtype=torch.int32, device=query.device), last, query.shape[1], kv_heads,
                     head_dim, PAGE_TOKENS, q_data_type=query.dtype, kv_data_type=cache[0].dtype, sm_scale=scale)
        return lambda: wrapper.run(query, cache)
    return prepare


def _own_decode(inputs):
    """This project's exact attention, with the workspace that a decode loop would hold."""
    query, keys, values, scale = _plain(inputs)
    array = arrays.borrow(query, "query")
    batch, q_heads, head_dim = array.shape
    workspace = attention.workspace(batch, q_heads, head_dim, array.device, framework=array.framework)
    out = attention.decode(query, keys, values, scale=scale, workspace=workspace)
    return lambda: attention.decode(query, keys, values, scale=scale, out=out, workspace=workspace)


# ---- rotation --------------------------------------------------------------------------------------------------------

def _dense_rotation(inputs) -> np.ndarray:
    """The matrix M with y = x M."""
    matrix = inputs["rotation"].dense().T
    return matrix.T if inputs.get("inverse") else matrix


def _numpy_rotate(inputs):
    x = inputs["x"]
    matrix = _dense_rotation(inputs).astype(np.float32)
    return lambda: (x.astype(np.float32) @ matrix).astype(x.dtype)


def _torch_rotate(inputs):
    torch = _import("torch")
    x = _torch_tensor(torch, inputs["x"])
    matrix = torch.as_tensor(np.ascontiguousarray(_dense_rotation(inputs)), device=x.device).to(x.dtype)
    return lambda: x @ matrix


# ---- all -------------------------------------------------------------------------------------------------------------

def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed ({error})") from error


def _torch_tensor(torch, value):
    tensor = torch.from_dlpack(arrays.borrow(value, "input"))
    if tensor.is_cuda and not torch.cuda.is_available():
        raise Missing("this PyTorch has no CUDA")
    return tensor


def _decode(name: str, framework: str, prepare: Callable, summary: str, devices: tuple[str, ...] = ("cuda",),
            **more) -> Baseline:
    return Baseline(name, EXACT, devices, framework, prepare, summary, **more)


def _flashinfer(name: str, prepare: Callable, summary: str, storage: str | None = None) -> Baseline:
    return _decode(name, "torch", prepare, f"FlashInfer {summary}", library="flashinfer", storage=storage)


FP8 = "float8_e4m3fn"
BASELINES: tuple[Baseline, ...] = (
    _decode("torch-cudnn", "torch", _torch_decode("CUDNN_ATTENTION", False), "PyTorch SDPA, cuDNN backend, enable_gqa"),
    _decode("torch-cudnn-packed", "torch", _torch_decode("CUDNN_ATTENTION", True),
            "PyTorch SDPA, cuDNN backend, query heads of a group as query tokens"),
    _decode("torch-flash", "torch", _torch_decode("FLASH_ATTENTION", False),
            "PyTorch SDPA, FlashAttention backend, enable_gqa"),
    _decode("torch-flash-packed", "torch", _torch_decode("FLASH_ATTENTION", True),
            "PyTorch SDPA, FlashAttention backend, query heads of a group as query tokens"),
    _decode("torch-efficient", "torch", _torch_decode("EFFICIENT_ATTENTION", True),
            "PyTorch SDPA, memory-efficient backend, which knows no groups: query heads of a group as query tokens"),
    _flashinfer("flashinfer", _flashinfer_single(False), "single decode on CUDA cores"),
    _flashinfer("flashinfer-tensor", _flashinfer_single(True), "single decode on tensor cores"),
    _flashinfer("flashinfer-fp8", _flashinfer_single(False, FP8), "single decode of an fp8 (e4m3) cache", FP8),
    _flashinfer("flashinfer-batch", _flashinfer_batch(False), "batch decode of a paged cache on CUDA cores"),
    _flashinfer("flashinfer-batch-tensor", _flashinfer_batch(True), "batch decode of a paged cache on tensor cores"),
    _flashinfer("flashinfer-batch-fp8", _flashinfer_batch(False, FP8), "batch decode of a paged fp8 (e4m3) cache", FP8),
    _decode("kvbench-exact", "kvbench", _own_decode, "this project's exact attention on the decoded cache",
            ("cpu", "cuda")),
    _decode("torch", "torch", _torch_decode(None, True),
            "PyTorch SDPA on the CPU, query heads of a group as query tokens", ("cpu",)),
    _decode("numpy", "numpy", _numpy_decode, "NumPy and its BLAS in float32", ("cpu",)),
    Baseline("torch", "rotation.rotate", ("cpu", "cuda"), "torch", _torch_rotate,
             "PyTorch matrix product in the type of x"),
    Baseline("numpy", "rotation.rotate", ("cpu",), "numpy", _numpy_rotate, "NumPy and its BLAS in float32"),
)
