"""What CPU kernels on rotated tiles share: vectors in and out, rotations, products, online softmax.

A tile holds one coordinate a row and one token a column: the steps of the rotation, of codes and of their packing are
then the same for neighbours in memory, and vectorise.  The arithmetic is float32.  Inner loops stand in functions of
their own, where few arrays are to be checked for overlaps.  Integers are cut back to 32 bits after every step, and
shifts to 31 before: Numba widens them to 64 bits, which would halve the vectors.
"""
from __future__ import annotations

import numba
import numpy as np

from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, float_to_half, half_to_float, load

LARGEST_SCALE = np.float32(65504)     # of float16
LANES = 32                            # tokens encoded or decoded at a time
TILE = 256                            # tokens whose logits are held at a time: 16 of their coordinates fill 16 KiB
TOKENS_PER_TASK = 1024                # one task of attention is a (sequence, KV head, split of this many tokens)


# --- Vectors in and out -----------------------------------------------------------------------------------------------


@numba.njit(**COMPILE)
def place(row, kv_heads, tokens):
    """Sequence, head and token of a vector."""
    return row // (kv_heads * tokens), row // tokens % kv_heads, row % tokens


@numba.njit(**COMPILE)
def load_row(x, start, mean, pair, row, head_dim):
    """x[start : start + head_dim] - mean[pair], times a power of two that brings the largest element near 1.

    Returns the factor that undoes it; 0 for a zero vector; NaN where x - mean holds NaN or Inf, and a row of zeros.
    """
    source = x[start : start + head_dim]
    factor = np.float32(1)
    for attempt in range(2):
        for d in range(head_dim):
            row[d] = load(source[d]) * factor
        if mean.size > 0:
            for d in range(head_dim):
                row[d] -= mean[pair, d] * factor
        largest = _largest_bits(row.view(np.uint32), head_dim)
        if largest < 0x7F800000:
            break
        factor = np.float32(0.25)        # the difference of two large numbers may overflow
    if largest >= 0x7F800000:
        row[:head_dim] = 0
        return np.float32(np.nan)
    if largest == 0:
        return np.float32(0)
    exponent = min(max(np.int64(largest >> 23), 1), 253)
    multiplier = np.uint32((254 - exponent) << 23).view(np.float32)
    for d in range(head_dim):
        row[d] *= multiplier
    return np.uint32(exponent << 23).view(np.float32) / factor


@numba.njit(**COMPILE)
def _largest_bits(words, count):
    """Of the magnitudes of float32 numbers, which are ordered as their bits are."""
    largest = np.uint32(0)
    for d in range(count):
        word = np.uint32(words[d] & np.uint32(0x7FFFFFFF))
        largest = max(largest, word)
    return largest


@numba.njit(**COMPILE)
def half_scale(value):
    """float16 bits."""
    return float_to_half(np.minimum(value, LARGEST_SCALE))       # NaN stays


@numba.njit(**COMPILE)
def load_scale(scale, token, count, s):
    for i in range(count):
        s[i] = half_to_float(scale[token + i])


# --- Rotation and norm of a tile --------------------------------------------------------------------------------------


def rotation_steps(signs, remaining_scale, size):
    """Signs [rounds, size] and remaining scale of a Hadamard rotation; no rounds for any other."""
    if signs is None:
        return np.zeros((0, size), np.float32), np.float32(1)
    return signs, np.float32(remaining_scale)


@numba.njit(**COMPILE)
def multiply_rows(y, signs):
    for d in range(len(y)):
        row, sign = y[d], signs[d]
        for i in range(len(row)):
            row[i] *= sign


@numba.njit(**COMPILE)
def walsh_hadamard(y):
    """`rotation.walsh_hadamard` of every column: the same additions in the same order."""
    elements = y.reshape(-1)
    distance = y.shape[1]
    while distance < y.size:
        for start in range(0, y.size, 2 * distance):
            low, high = elements[start : start + distance], elements[start + distance : start + 2 * distance]
            for i in range(distance):
                a, b = low[i], high[i]
                low[i] = a + b
                high[i] = a - b
        distance *= 2


@numba.njit(**COMPILE)
def measure(y, factor, norm, scaling):
    """y <- factor y, norm <- |y| / sqrt(D) of every column, and scaling <- its inverse, or 0."""
    size, lanes = y.shape
    part = np.empty(lanes, np.float32)
    for first in range(0, size, 32):              # sums of 32 terms, and of their sums
        part[:] = 0
        for d in range(first, min(first + 32, size)):
            _square(y[d], factor, part)
        norm += part
    for i in range(lanes):
        norm[i] = np.sqrt(norm[i] / np.float32(size))
        scaling[i] = np.float32(1) / norm[i] if norm[i] > 0 else np.float32(0)


@numba.njit(**COMPILE)
def _square(row, factor, total):
    for i in range(len(row)):
        row[i] *= factor
        total[i] += row[i] * row[i]


# --- Memory of a tile -------------------------------------------------------------------------------------------------


@numba.njit(**COMPILE)
def aligned(rows, columns):
    """[rows, columns] float32 zeros that start at a multiple of 64 bytes, so that no vector crosses a cache line."""
    memory = np.zeros(rows * columns + 16, np.float32)
    first = -memory.ctypes.data % 64 // 4
    return memory[first : first + rows * columns].reshape((rows, columns))


@numba.njit(**COMPILE)
def whole(count):
    """Lanes that are computed for `count` tokens: whole vectors."""
    return (count + 15) // 16 * 16


# --- Products and online softmax --------------------------------------------------------------------------------------


@numba.njit(**COMPILE_SUMS)
def multiply(query, start, c, lanes, products):
    """products[h, i] += sum_j query[h, start + j] c[j, i] over 16 coordinates."""
    for h in range(len(query)):
        for j in range(0, 16, 8):              # eight products for every sum that is loaded and stored
            q, block, row = query[h, start + j : start + j + 8], c[j : j + 8], products[h]
            for i in range(lanes):
                total = row[i]
                for k in range(8):
                    total += q[k] * block[k, i]
                row[i] = total


@numba.njit(**COMPILE_SUMS)
def multiply_transposed(weights, c, lanes, output, start):
    """output[h, start + j] += sum_i weights[h, i] c[j, i] of 16 coordinates."""
    for h in range(len(weights)):
        row = weights[h]
        for j in range(0, 16, 4):              # four sums at a time hide the latency of one
            c0, c1, c2, c3 = c[j], c[j + 1], c[j + 2], c[j + 3]
            sum0 = sum1 = sum2 = sum3 = np.float32(0)
            for i in range(lanes):
                sum0 += row[i] * c0[i]
                sum1 += row[i] * c1[i]
                sum2 += row[i] * c2[i]
                sum3 += row[i] * c3[i]
            output[h, start + j] += sum0
            output[h, start + j + 1] += sum1
            output[h, start + j + 2] += sum2
            output[h, start + j + 3] += sum3


@numba.njit(**COMPILE_SUMS)
def store_split(output, largest, total, out, lse):
    """The result of one split, out [group, D] and lse [group], of what `attend_to_tile` left."""
    for h in range(len(output)):
        inverse = np.float32(1) / total[h] if total[h] != 0 else np.float32(0)
        for d in range(output.shape[1]):
            out[h, d] = output[h, d] * inverse
        lse[h] = largest[h] + np.log(total[h])


@numba.njit(**COMPILE)
def raise_largest(logits, count, start):
    """The largest of `start` and `count` logits, in 16 columns, which vectorise.  NaN may be passed over: it shows in
    the sum of the weights."""
    columns = np.full(16, start, np.float32)
    whole = count // 16 * 16
    for first in range(0, whole, 16):
        for i in range(16):
            if not logits[first + i] <= columns[i]:
                columns[i] = logits[first + i]
    for i in range(whole, count):
        if not logits[i] <= columns[i - whole]:
            columns[i - whole] = logits[i]
    result = columns[0]
    for i in range(1, 16):
        if not columns[i] <= result:
            result = columns[i]
    return result


@numba.njit(**COMPILE_SUMS)
def exponentiate(logits, count, largest):
    """logits <- exp(logits - largest); returns their sum.  All weights are 0 if no logit is above -inf."""
    shift = np.float32(0) if largest == -np.inf else largest
    total = np.float32(0)
    for i in range(count):
        weight = _exp(logits[i] - shift)
        logits[i] = weight
        total += weight
    return total


@numba.njit(**COMPILE)
def _exp(x):
    """e^x of float32 x <= 0, off by at most 1 unit in the last place, and 0 below e^-87; np.exp does not vectorise.
    Source: Cephes, expf.c."""
    smallest = np.float32(-87)
    bounded = x if not x <= smallest else smallest
    exponent = np.rint(bounded * np.float32(1.4426950408889634))
    rest = bounded - exponent * np.float32(0.693359375) - exponent * np.float32(-2.12194440e-4)
    value = np.float32(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = value * rest + np.float32(coefficient)
    value = value * rest * rest + rest + np.float32(1)
    biased = np.float32(exponent + np.float32(1.5 * 2**23 + 127))        # an integer in the last bits, NaN or not
    power = np.uint32(biased.view(np.uint32) << 23).view(np.float32)
    return np.float32(0) if x < smallest else value * power
