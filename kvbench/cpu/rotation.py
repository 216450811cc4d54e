"""Rotation on the CPU: randomised Hadamard rounds in Numba, dense matrices through BLAS.

Reference: reference/rotation.py.
"""
from __future__ import annotations

import numba
import numpy as np

from kvbench.cpu.convert import COMPILE, bits, load, store

ROWS_PER_TASK = 64


def hadamard(x: np.ndarray, out: np.ndarray, signs: np.ndarray, remaining_scale: float, inverse: bool) -> None:
    """x, out : [rows, head_dim], one dtype, may be the same array.   signs : [rounds, head_dim] float32, +-2^-k

    Same additions in the same order as the CUDA kernel, so the same float32 bits before the last rounding.
    """
    _hadamard(bits(x), bits(out), signs, np.float32(remaining_scale), inverse)


def dense(x: np.ndarray, out: np.ndarray, matrix: np.ndarray) -> None:
    """out = x matrix.   x, out : [rows, head_dim]   matrix : [head_dim, head_dim] float32"""
    out[...] = (x.astype(np.float32) @ matrix).astype(out.dtype)


@numba.njit(parallel=True, **COMPILE)
def _hadamard(x, out, signs, remaining_scale, inverse):
    rows, head_dim = x.shape
    rounds = signs.shape[0]
    for task in numba.prange((rows + ROWS_PER_TASK - 1) // ROWS_PER_TASK):
        row = np.empty(head_dim, np.float32)
        for r in range(task * ROWS_PER_TASK, min((task + 1) * ROWS_PER_TASK, rows)):
            for d in range(head_dim):
                row[d] = load(x[r, d])
            for i in range(rounds):
                if inverse:
                    walsh_hadamard(row)
                    for d in range(head_dim):
                        row[d] *= signs[rounds - 1 - i, d]
                else:
                    for d in range(head_dim):
                        row[d] *= signs[i, d]
                    walsh_hadamard(row)
            for d in range(head_dim):
                out[r, d] = store(row[d] * remaining_scale, out)


@numba.njit(**COMPILE)
def walsh_hadamard(row):
    """In place, unnormalised, butterflies at distances 1, 2, 4, ... ."""
    distance = 1
    while distance < row.size:
        for start in range(0, row.size, 2 * distance):
            for d in range(start, start + distance):
                low, high = row[d], row[d + distance]
                row[d] = low + high
                row[d + distance] = low - high
        distance *= 2
