"""Rotate vectors by a random orthogonal matrix: y = x R^T.

Reference: reference/rotation.py, kernel: cuda_src/rotation.cu.
"""
from __future__ import annotations

import functools
import math

import numpy as np

from kvbench import loaders, registry
from kvbench.arrays import FLOATS, Arguments, Device, upload
from kvbench.cpu import rotation as cpu_rotation
from kvbench.ops.dispatch import (CXX_TYPE, EPSILON, SMALLEST_NORMAL, assert_close, check_cuda_head_dim, choose,
                                  random_normal, relative_error)
from kvbench.reference import rotation as reference
from kvbench.reference.rotation import Rotation, haar, hadamard
from kvbench.registry import Kernel, Traffic, register

__all__ = ["Rotation", "haar", "hadamard", "rotate"]

BACKENDS = registry.BACKENDS


def rotate(x, rotation: Rotation, *, inverse: bool = False, out=None, backend: str | None = None, stream=None):
    """y = x R^T, or x R with `inverse`: one pass over memory for a randomised Hadamard rotation.

    x        : [..., head_dim] float16, bfloat16 or float32, contiguous
    rotation : from `hadamard(head_dim, seed, rounds=3)` or `haar(head_dim, seed)`
    out      : same shape and dtype, may be x itself (default: new, in x's framework)
    backend  : reference, cpu, cuda, native or simt (default: by the device of x); the last three want
               head_dim 64, 128 or 256
    stream   : CUDA stream handle (default: the framework's current stream)

    Arithmetic is float32, rounded once to x's dtype; backends agree bit for bit on Hadamard rotations, but that GPUs
    may flush float32 subnormals.  A dense (Haar) rotation costs head_dim multiply-adds per element and is compute bound
    on a GPU.
    Source: TurboQuant, arXiv 2504.19874, section 3; randomised Hadamard: QuIP#, arXiv 2402.04396, section 3.
    """
    arguments = Arguments("rotation.rotate", stream=stream)
    x = arguments.take("x", x, "... head_dim", FLOATS)
    if not isinstance(rotation, Rotation):
        raise TypeError(f"rotation.rotate: rotation: expected a Rotation from hadamard() or haar(), "
                        f"got {type(rotation).__name__}")
    arguments.require(rotation.head_dim == arguments.sizes["head_dim"], "rotation",
                      f"head_dim {arguments.sizes['head_dim']} as in x", rotation.head_dim)
    out = arguments.result("out", out, x.shape, x.dtype, in_place=True)
    backend = choose(backend, arguments, BACKENDS)
    head_dim, rows = rotation.head_dim, x.size // rotation.head_dim

    if backend == "reference":
        result = reference.rotate(x.numpy(), rotation, inverse=inverse)
        with np.errstate(over="ignore"):   # beyond the largest float16 is infinity, as on every backend
            out.numpy()[...] = result.astype(out.numpy().dtype)
    elif backend == "cpu":
        rows_of_x, rows_of_out = x.numpy().reshape(rows, head_dim), out.numpy().reshape(rows, head_dim)
        if rotation.kind == "haar":
            cpu_rotation.dense(rows_of_x, rows_of_out, dense_matrix(rotation, inverse))
        else:
            signs, remaining_scale = scaled_signs(rotation)
            cpu_rotation.hadamard(rows_of_x, rows_of_out, signs, remaining_scale, inverse)
    else:
        check_cuda_head_dim(arguments, "x", head_dim, backend)
        arguments.require(x.aligned(16) and out.aligned(16), "x, out", "addresses that are multiples of 16 bytes",
                          f"{x.pointer:#x}, {out.pointer:#x}")
        if rows:
            _launch(x, out, rotation, inverse, rows, backend, arguments)
    return out.give()


def _launch(x, out, rotation, inverse, rows, backend, arguments):
    head_dim, device = rotation.head_dim, x.device
    if rotation.kind == "haar":
        name, block, rows_per_block, blocks_per_multiprocessor = "rotation_dense_kernel", head_dim, 8, 2048 // head_dim
        constants = (on_device(rotation, inverse, device), np.uint64(rows))
    else:
        name, block, rows_per_block, blocks_per_multiprocessor = "rotation_hadamard_kernel", 256, 64, 8
        constants = (on_device(rotation, False, device), np.uint64(rows), np.int32(rotation.rounds),
                     np.float32(scaled_signs(rotation)[1]), np.int32(inverse))
    function = loaders.get_function("rotation", f"kvb::{name}<{CXX_TYPE[x.dtype]}, {head_dim}>", backend, device)
    blocks = min(-(-rows // rows_per_block), loaders.multiprocessors(backend, device) * blocks_per_multiprocessor)
    function((blocks,), (block,), (x, out, *constants), stream=arguments.stream)


@functools.lru_cache(maxsize=256)
def scaled_signs(rotation: Rotation) -> tuple[np.ndarray, float]:
    """(signs * 2^-k [rounds, head_dim] float32, remaining scale): head_dim^(-1/2) per round split into an exact power
    of two and the rest, so that float32 arithmetic rounds only in additions and once at the end, the same on every
    backend."""
    exponent = int(math.log2(rotation.head_dim)) // 2
    remaining = (rotation.head_dim**-0.5 * 2.0**exponent) ** rotation.rounds
    return np.ldexp(rotation.signs.astype(np.float32), -exponent), float(np.float32(remaining))


@functools.lru_cache(maxsize=256)
def dense_matrix(rotation: Rotation, inverse: bool) -> np.ndarray:
    """M with y = x M: R^T, or R for the inverse; float32."""
    return np.ascontiguousarray(rotation.matrix if inverse else rotation.matrix.T).astype(np.float32)


@functools.lru_cache(maxsize=256)
def on_device(rotation: Rotation, inverse: bool, device: Device):
    """The rotation's data on the device: it is uploaded when a rotation is first used there."""
    return upload(dense_matrix(rotation, inverse) if rotation.kind == "haar" else scaled_signs(rotation)[0], device)


# ---- registry --------------------------------------------------------------------------------------------------------

AXES = {"tokens": (32768, 4096, 131072, 1048576), "head_dim": (128, 64, 256), "kv_heads": (8,), "batch": (1,),
        "dtype": ("float16", "bfloat16", "float32"), "kind": ("hadamard", "haar"), "rounds": (3, 1, 2)}


def _inputs(problem, rng):
    shape = (problem["batch"], problem["kv_heads"], problem["tokens"], problem["head_dim"])
    seed = int(rng.integers(2**31))
    rotation = (haar(problem["head_dim"], seed) if problem["kind"] == "haar"
                else hadamard(problem["head_dim"], seed, problem["rounds"]))
    return {"x": random_normal(rng, shape, problem["dtype"]), "rotation": rotation}


def _traffic(problem):
    elements = problem["batch"] * problem["kv_heads"] * problem["tokens"] * problem["head_dim"]
    nbytes = elements * (4 if problem["dtype"] == "float32" else 2)
    return Traffic(nbytes, nbytes)


def _agreement(inputs, expected, actual):
    """Forward error of float32 butterflies: each of rounds * log2(D) levels adds at most half an epsilon of its inputs,
    whose norm every level keeps (after scaling), so the error of an element is below (levels + 2) eps/2 ||x||.  A dense
    product of length D: D eps/2 ||x|| at most."""
    x, rotation = inputs["x"], inputs["rotation"]
    levels = rotation.rounds * math.log2(rotation.head_dim) if rotation.kind == "hadamard" else rotation.head_dim
    norm = np.linalg.norm(np.asarray(x).astype(np.float64), axis=-1, keepdims=True)
    allowance = (levels + 2) * EPSILON["float32"] / 2 * norm + rotation.head_dim * SMALLEST_NORMAL
    assert_close(expected, actual, x.dtype.name, allowance, "rotated")


register(Kernel(
    name="rotation.rotate", reference=reference.rotate, operator=rotate, backends=BACKENDS, axes=AXES, inputs=_inputs,
    traffic=_traffic, agreement=_agreement, error=lambda inputs, expected, actual: relative_error(expected, actual),
    source="arXiv 2504.19874 section 3; arXiv 2402.04396 section 3"))
