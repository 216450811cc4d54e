"""Storage types inside Numba kernels: float32, float16 (as uint16 bits) and bfloat16 (as int16 bits).

Numba has no 16-bit floats on the CPU.  The two bit views differ in their integer type, so that one kernel source is
specialised for each storage type by its argument types: `load(array[i])` and `store(value, array)` pick the conversion.
"""
from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload

COMPILE = {"cache": True, "nogil": True, "error_model": "numpy"}
# Sums may be reordered and contracted (so that they vectorise); NaN, infinities and signed zeros keep their meaning.
COMPILE_SUMS = {**COMPILE, "fastmath": {"reassoc", "contract"}}


def bits(array: np.ndarray) -> np.ndarray:
    """The view of `array` that kernels take: float32 itself, uint16 for float16, int16 for bfloat16."""
    return array.view({"float32": np.float32, "float16": np.uint16, "bfloat16": np.int16}[array.dtype.name])


def flat(array: np.ndarray) -> np.ndarray:
    """The memory from the first element to the last in one dimension: one type for kernels, whatever the strides."""
    if array.flags.c_contiguous:
        return array.reshape(-1)
    length = 1 + sum((n - 1) * stride for n, stride in zip(array.shape, strides_of(array)))
    return np.lib.stride_tricks.as_strided(array, (length,), (array.itemsize,))


def strides_of(array: np.ndarray) -> tuple[int, ...]:
    """In elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def load(stored):
    """One stored element (float32, uint16 or int16 bits) as float32."""
    raise NotImplementedError("for Numba kernels")


def store(value, like):
    """float32 rounded to nearest even, in the element type of the array `like`."""
    raise NotImplementedError("for Numba kernels")


@overload(load)
def _load(stored):
    if stored == numba.float32:
        return lambda stored: stored
    if stored == numba.uint16:
        return lambda stored: half_to_float(stored)
    if stored == numba.int16:
        return lambda stored: np.uint32(np.uint32(np.uint16(stored)) << 16).view(np.float32)


@overload(store)
def _store(value, like):
    if like.dtype == numba.float32:
        return lambda value, like: value
    if like.dtype == numba.uint16:
        return lambda value, like: float_to_half(value)
    if like.dtype == numba.int16:
        return lambda value, like: np.int16(float_to_bfloat(value))


# Integer arithmetic of Numba widens to 64 bits: results are cut back to 32 where their bits are looked at.

@numba.njit(**COMPILE)
def half_to_float(half):
    word = np.uint32(half)
    magnitude = np.uint32((word & 0x7FFF) << 13)
    result = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)   # exact, subnormals too
    if magnitude >= 0x7C00 << 13:                # infinity and NaN keep all exponent bits
        result = np.uint32(magnitude | 0x7F800000)
    return np.uint32(result | (word & 0x8000) << 16).view(np.float32)


@numba.njit(**COMPILE)
def float_to_half(value):
    word = np.float32(value).view(np.uint32)
    magnitude = np.uint32(word & 0x7FFFFFFF)
    if magnitude > 0x7F800000:                   # NaN
        result = np.uint32(0x7E00)
    elif magnitude >= 0x477FF000:                # 65520, half way beyond the largest: infinity
        result = np.uint32(0x7C00)
    elif magnitude < 0x38800000:                 # below 2^-14: subnormal; adding 1/2 rounds at its last bit
        result = np.uint32(np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - 0x3F000000)
    else:
        result = np.uint32((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13)
    return np.uint16(result | word >> 16 & 0x8000)


@numba.njit(**COMPILE)
def float_to_bfloat(value):
    word = np.float32(value).view(np.uint32)
    if word & 0x7FFFFFFF > 0x7F800000:           # NaN stays NaN
        return np.uint16(word >> 16 | 0x40)
    return np.uint16((word + 0x7FFF + (word >> 16 & 1)) >> 16)
