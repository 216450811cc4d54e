"""What operators on codes of rotated vectors share: validation, and arrays as the CPU kernels take them."""
from __future__ import annotations

import numpy as np

from kvbench.ops import rotation as rotation_operator
from kvbench.ops.dispatch import check_cuda_head_dim
from kvbench.reference.rotation import Rotation


def take_mean(arguments, name, mean):
    """[kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, or None."""
    mean = arguments.take(name, mean, "... head_dim", ("float32",), optional=True)
    if mean is not None:
        batch, kv_heads, head_dim = (arguments.sizes[n] for n in ("batch", "kv_heads", "head_dim"))
        arguments.require(mean.shape in ((kv_heads, head_dim), (batch, kv_heads, head_dim)), name,
                          f"[kv_heads, head_dim] = {[kv_heads, head_dim]} or [batch, kv_heads, head_dim] = "
                          f"{[batch, kv_heads, head_dim]}", list(mean.shape))
    return mean


def check_host_mean(arguments, mean, name="mean"):
    arguments.require(mean is None or bool(np.isfinite(mean.numpy()).all()), name, "finite numbers", "NaN or Inf")


def check_rotation(arguments, name, rotation, head_dim):
    if not isinstance(rotation, Rotation):
        raise TypeError(f"{arguments.operator}: {name}: expected a Rotation from hadamard() or haar(), "
                        f"got {type(rotation).__name__}")
    arguments.require(rotation.head_dim % 32 == 0 and rotation.head_dim >= head_dim, name,
                      f"a size that is a multiple of 32 and at least head_dim = {head_dim}", rotation.head_dim)


def check_cuda_size(arguments, name, head_dim, rotation, backend, rotation_name="rotation"):
    check_cuda_head_dim(arguments, name, head_dim, backend)
    arguments.require(rotation.head_dim == head_dim, rotation_name,
                      f"size {head_dim}, without padding, on backend {backend!r}", rotation.head_dim)


def in_tokens(arguments, name, strides, row) -> tuple[int, int]:
    """Strides of sequences and heads, counted in tokens, of an array whose token is `row` elements long."""
    arguments.require(strides[2] == row and strides[0] % row == 0 and strides[1] % row == 0, name,
                      f"tokens that follow one another, {row} elements each, and strides in whole tokens",
                      f"strides {list(strides)}")
    return strides[0] // row, strides[1] // row


def host(array):
    return None if array is None else array.numpy()


def cpu_signs(rotation):
    """(signs, remaining scale) of a Hadamard rotation, as cpu functions take them; those of a dense one get None."""
    return rotation_operator.scaled_signs(rotation) if rotation.kind == "hadamard" else (None, None)


def cpu_matrix(rotation, inverse):
    return rotation_operator.dense_matrix(rotation, inverse) if rotation.kind == "haar" else None


def rotated_query(query: np.ndarray, rotation: Rotation, group: int) -> np.ndarray:
    """R q of the padded queries, [batch, kv_heads, group, rotation size] float32."""
    batch, q_heads, head_dim = query.shape
    padded = np.zeros((batch, q_heads, rotation.head_dim), np.float32)
    padded[..., :head_dim] = query
    rotated = rotation_operator.rotate(padded, rotation, out=padded, backend="cpu")
    return rotated.reshape(batch, q_heads // group, group, rotation.head_dim)
