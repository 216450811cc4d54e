"""What one would use otherwise: library functions that do a kernel's work, timed in the same run with the same timer.

A baseline gets the very arrays that the kernel gets and must come close to the kernel's reference before it is timed.
"Close" is the accuracy that its storage type allows, not the kernel's own tolerance: a user would accept either.
"""
from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvbench import arrays
from kvbench.ops import turboquant
from kvbench.registry import nearest


class Missing(Exception):
    """This baseline cannot run this case here; the message says why."""


@dataclass(frozen=True)
class Baseline:
    """prepare(inputs) -> a call without arguments that returns the kernel's first output; raises Missing."""

    name: str
    kernel: str
    devices: tuple[str, ...]
    framework: str             # "numpy" or "torch": whose stream and graph capture the call needs
    prepare: Callable[[dict], Callable]
    summary: str


def choose(requested: Sequence[str], kernels: Sequence[str], device: str) -> list[str]:
    """The requested names, "all" spelled out; ValueError for one that does no kernel's work on this device."""
    known = list(dict.fromkeys(baseline.name for baseline in BASELINES))
    useful = list(dict.fromkeys(baseline.name for kernel in kernels for baseline in of(kernel, device, known)))
    for name in requested:
        if name not in known and name != "all":
            raise ValueError(f"unknown baseline {name!r}{nearest(name, [*known, 'all'])}")
        if name not in useful and name != "all":
            raise ValueError(f"baseline {name!r} does the work of none of {', '.join(kernels)} on {device}; "
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


def of(kernel: str, device: str, names: Sequence[str]) -> list[Baseline]:
    """The baselines of these names that do a kernel's work on a device ("cpu", "cuda")."""
    return [baseline for baseline in BASELINES
            if baseline.name in names and baseline.kernel == kernel and device in baseline.devices]


def allowed_error(inputs: dict) -> float:
    """Relative RMS error that a baseline may have: a few roundings in the storage type, and float32 sums.

    One rounding costs half an eps; inputs, probabilities and output are each rounded once.  Wrong work is off by more.
    """
    dtypes = [arrays.borrow(value, name).dtype for name, value in inputs.items() if hasattr(value, "__dlpack__")]
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
    return 4 * max((eps.get(dtype, 0.0) for dtype in dtypes), default=0.0) + 32 * 2.0**-23


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


def _flashinfer_decode(tensor_cores: bool):
    def prepare(inputs):
        torch, flashinfer = _import("torch"), _import("flashinfer")
        query, keys, values, scale = _plain(inputs)
        if query.shape[0] != 1:
            raise Missing("single decode takes batch 1")
        query, keys, values = (_torch_tensor(torch, x)[0] for x in (query, keys, values))

        def call():
            return flashinfer.single_decode_with_kv_cache(query, keys, values, kv_layout="HND", sm_scale=scale,
                                                          use_tensor_cores=tensor_cores)[None]

        return call
    return prepare


# ---- decode attention on codes ---------------------------------------------------------------------------------------

def _on_decoded(prepare: Callable[[dict], Callable], dtype: str) -> Callable[[dict], Callable]:
    """A baseline of exact attention for the cache that the codes replace: decoded keys and values, held in dtype."""
    def prepare_decoded(inputs):
        key_rotation, value_rotation = inputs["key_rotation"], inputs["value_rotation"]
        query = inputs["query"]
        if dtype == "float32":
            query = query.astype(np.float32)
        elif arrays.borrow(query, "query").dtype != dtype:
            raise Missing(f"compares with a {dtype} cache, and wants queries of that type")
        return prepare({**inputs, "query": query, "keys": turboquant.decode(inputs["keys"], key_rotation, dtype=dtype),
                        "values": turboquant.decode(inputs["values"], value_rotation, dtype=dtype)})
    return prepare_decoded


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


_EXACT: tuple[Baseline, ...] = (
    Baseline("torch-cudnn", "attention.decode", ("cuda",), "torch", _torch_decode("CUDNN_ATTENTION", False),
             "PyTorch SDPA, cuDNN backend, enable_gqa"),
    Baseline("torch-cudnn-packed", "attention.decode", ("cuda",), "torch", _torch_decode("CUDNN_ATTENTION", True),
             "PyTorch SDPA, cuDNN backend, query heads of a group as query tokens"),
    Baseline("torch-flash", "attention.decode", ("cuda",), "torch", _torch_decode("FLASH_ATTENTION", False),
             "PyTorch SDPA, FlashAttention backend, enable_gqa"),
    Baseline("torch-flash-packed", "attention.decode", ("cuda",), "torch", _torch_decode("FLASH_ATTENTION", True),
             "PyTorch SDPA, FlashAttention backend, query heads of a group as query tokens"),
    Baseline("torch-efficient", "attention.decode", ("cuda",), "torch", _torch_decode("EFFICIENT_ATTENTION", True),
             "PyTorch SDPA, memory-efficient backend, which knows no groups: query heads of a group as query tokens"),
    Baseline("flashinfer", "attention.decode", ("cuda",), "torch", _flashinfer_decode(False),
             "FlashInfer single decode on CUDA cores"),
    Baseline("flashinfer-tensor", "attention.decode", ("cuda",), "torch", _flashinfer_decode(True),
             "FlashInfer single decode on tensor cores"),
    Baseline("torch", "attention.decode", ("cpu",), "torch", _torch_decode(None, True),
             "PyTorch SDPA on the CPU, query heads of a group as query tokens"),
    Baseline("numpy", "attention.decode", ("cpu",), "numpy", _numpy_decode, "NumPy and its BLAS in float32"),
)
BASELINES: tuple[Baseline, ...] = (
    *_EXACT,
    *(replace(exact, kernel="turboquant.decode_attention", summary=f"{exact.summary}, on the decoded cache",
              prepare=_on_decoded(exact.prepare, "float32" if exact.devices == ("cpu",) else "float16"))
      for exact in _EXACT),
    Baseline("torch", "rotation.rotate", ("cpu", "cuda"), "torch", _torch_rotate,
             "PyTorch matrix product in the type of x"),
    Baseline("numpy", "rotation.rotate", ("cpu",), "numpy", _numpy_rotate, "NumPy and its BLAS in float32"),
)
