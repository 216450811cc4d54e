"""What every operator shares: the choice of the backend, storage types, and the tolerance of float results."""
from __future__ import annotations

import ml_dtypes
import numpy as np

from kvbench import loaders
from kvbench.arrays import Arguments, Array
from kvbench.registry import nearest

CUDA_HEAD_DIMS = (64, 128, 256)
_HOST, _DEVICE = ("reference", "cpu", "simt"), ("cuda", "native")


def choose(backend: str | None, arguments: Arguments, implemented: tuple[str, ...]) -> str:
    """The backend to run: the one asked for, or the default for the device that the arguments are on.

    Host memory: `cpu`.  Device memory: `cuda`, or `native` where CuPy is not installed.  Raises ValueError for an
    unknown backend or one that cannot reach the memory, BackendUnavailable if this machine lacks it.
    """
    on_device = arguments.device.kind == "cuda"
    if backend is None:
        backend = "cpu" if not on_device else "native" if loaders.availability("cuda") else "cuda"
    arguments.require(backend in implemented, "backend", f"one of {', '.join(implemented)}",
                      f"{backend!r}{nearest(str(backend), implemented)}")
    reachable = _DEVICE if on_device else _HOST
    arguments.require(backend in reachable, "backend",
                      f"one of {', '.join(reachable)} for arrays on {arguments.device}", repr(backend))
    loaders.require(backend)
    return backend


def check_cuda_head_dim(arguments: Arguments, name: str, head_dim: int, backend: str) -> None:
    arguments.require(head_dim in CUDA_HEAD_DIMS, name, f"head_dim 64, 128 or 256 on backend {backend!r}", head_dim)


def check_heads(arguments: Arguments, head_dim: int) -> int:
    """Query heads per KV head, from the sizes q_heads and kv_heads; ValueError unless they divide."""
    q_heads, kv_heads = arguments.sizes["q_heads"], arguments.sizes["kv_heads"]
    arguments.require(kv_heads > 0 and q_heads % kv_heads == 0 and q_heads > 0, "query",
                      f"q_heads a positive multiple of kv_heads = {kv_heads}", q_heads)
    arguments.require(head_dim > 0, "query", "a positive head_dim", head_dim)
    return q_heads // kv_heads


def require_finite(arguments: Arguments, x: Array) -> None:
    """ValueError where x [batch, kv_heads, tokens, head_dim] holds NaN or Inf; device memory is copied to the host."""
    finite = np.isfinite(x.to_host()).all(axis=-1)
    arguments.require(bool(finite.all()), "x", "finite numbers",
                      f"NaN or Inf in {int((~finite).sum())} vectors, the first at [batch, kv_head, token] = "
                      f"{np.argwhere(~finite)[:1].tolist()}")


def require_writable(arguments: Arguments, written: dict[str, Array], inputs: dict[str, Array | None]) -> None:
    """ValueError unless all arrays that a caller gives to be written are writable, apart from the inputs and from each
    other.  For what `Arguments.result` does not take: several arrays, and slices of stores."""
    others = {name: array for name, array in inputs.items() if array is not None}
    for name, array in written.items():
        arguments.require(not array.readonly, name, "writable memory",
                          "a read-only array: pass a writable copy, or omit out and use what is returned")
        for other, taken in others.items():
            arguments.require(not array.overlaps(taken), name, f"memory apart from {other}",
                              "an array that overlaps it")
        others[name] = array


def round_into(out: Array, exact: np.ndarray) -> None:
    """Writes a reference's result into host memory of any float dtype."""
    with np.errstate(over="ignore"):   # beyond the largest float16 is infinity, as on every backend
        out.numpy()[...] = exact.astype(out.numpy().dtype)


CXX_TYPE = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}
RUN_TIME_TYPE = {"float32": 0, "float16": 1, "bfloat16": 2}      # of `load_float` and `store_float` in kvb/convert.cuh

# Distance from 1 to the next number.  Rounding to nearest costs half of it.
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}   # positive subnormal
SMALLEST_NORMAL = 2.0**-126                                                     # float32: GPUs may flush what is below
LARGEST = {"float16": 65504.0, "bfloat16": float(np.uint32(0x7F7F0000).view(np.float32)),
           "float32": float(np.finfo(np.float32).max)}


NUMPY_TYPE = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def random_normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Standard normal numbers in a storage type: the benchmark's inputs."""
    return rng.standard_normal(shape, dtype=np.float32).astype(NUMPY_TYPE[dtype])


def assert_close(expected: np.ndarray, actual: np.ndarray, dtype: str, allowance: np.ndarray, what: str) -> None:
    """|actual - expected| <= allowance + half a unit in the last place of the stored type, element by element.

    expected : float64, exact          actual : as returned, of storage type `dtype`
    allowance : absolute error allowed before the result is rounded to `dtype` (broadcast)
    Where expected is NaN, actual must be; where rounding overflows `dtype`, actual may be infinite.  NaN never passes
    for a number.
    """
    expected, got = np.asarray(expected, np.float64), np.asarray(actual).astype(np.float64)
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: expected shape {expected.shape}, got {got.shape}")
    allowance = np.broadcast_to(np.asarray(allowance, np.float64), expected.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        rounding = EPSILON[dtype] / 2 * (np.abs(expected) + allowance) + SMALLEST[dtype] / 2
        close = np.abs(got - expected) <= allowance + rounding
        overflow = (np.isinf(got) & (np.sign(got) == np.sign(expected))
                    & (np.abs(expected) + allowance + rounding >= LARGEST[dtype]))
        held = np.where(np.isfinite(expected), close | overflow,
                        np.where(np.isnan(expected), np.isnan(got), got == expected))
    if not held.all():
        index = tuple(int(i) for i in np.argwhere(~held)[0])
        with np.errstate(invalid="ignore"):
            worst = np.where(held, 0, np.abs(got - expected) / (allowance + rounding))
        raise AssertionError(
            f"{what}: {int((~held).sum())} of {held.size} elements differ; first at {index}: "
            f"expected {expected[index]!r}, got {got[index]!r}, allowed {float((allowance + rounding)[index]):.3g}; "
            f"worst {float(np.nanmax(worst, initial=0)):.3g} times allowed")


def relative_error(expected: np.ndarray, actual: np.ndarray) -> float:
    """Root mean square error over root mean square of the expected values; 0 for two zeros, NaN if either has one."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual).astype(np.float64)
    norm = np.linalg.norm(expected)
    error = np.linalg.norm(actual - expected)
    return float(error / norm) if norm else float(error)
