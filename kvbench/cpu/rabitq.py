"""RaBitQ index on the CPU.  Reference: reference/rabitq.py; the order of the bits: reference/planes.py.

Tiles, loads and rotations are those of cpu/tiles.py, words those of the sign plane in cpu/planes.py.  A query in
integers is multiplied in float32: its sums are integers below 2^24, so they are exact in any order.
"""
from __future__ import annotations

import numba
import numpy as np

from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, flat, float_to_half, half_to_float, strides_of
from kvbench.cpu.convert import bits as bit_view
from kvbench.cpu.planes import both_signs, flat_planes, scratch, tile_logits
from kvbench.cpu.tiles import (LANES, LARGEST_SCALE, TILE, aligned, load_row, multiply_rows, place, rotation_steps,
                               walsh_hadamard, whole)

TOKENS_PER_TASK = 1024       # one task of scores is a (sequence, KV head, split of this many tokens)
_NO_MEANS = np.zeros((0, 0), np.float32)


# --- Keys ------------------------------------------------------------------------------------------------------------


def encode(keys, signs, remaining_scale, matrix, key_mean, query_mean, sign, rescale, offset) -> None:
    """Writes sign, rescale and, unless it is None, offset in place.

    keys                   : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, contiguous rows
    signs, remaining_scale : of a randomised Hadamard rotation, or None        matrix : of a dense one, y = k matrix
    key_mean, query_mean   : [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, or None
    sign                   : [batch, kv_heads, tokens, size / 32] uint32
    rescale, offset        : [batch, kv_heads, tokens] float16; strides in tokens as those of sign
    """
    batch, kv_heads, tokens, head_dim = keys.shape
    size = 32 * sign.shape[-1]
    means = [_NO_MEANS if mean is None else np.ascontiguousarray(
        np.broadcast_to(mean, (batch, kv_heads, head_dim)), np.float32).reshape(-1, head_dim)
        for mean in (key_mean, query_mean)]
    dense = np.zeros((0, size), np.float32) if matrix is None else matrix
    no_offset = np.empty(0, np.uint16)
    _encode(flat(bit_view(keys)), strides_of(keys)[:3], head_dim, *means, *rotation_steps(signs, remaining_scale, size),
            dense, batch * kv_heads * tokens, kv_heads, tokens, flat(sign), flat(bit_view(rescale)),
            no_offset if offset is None else flat(bit_view(offset)), strides_of(rescale)[:2])


@numba.njit(parallel=True, **COMPILE)
def _encode(keys, key_strides, head_dim, key_mean, query_mean, signs, remaining_scale, matrix, rows, kv_heads, tokens,
            sign, rescale, offset, strides):
    rounds, size = signs.shape
    for task in numba.prange((rows + LANES - 1) // LANES):
        begin = task * LANES
        used = min(LANES, rows - begin)
        lanes = whole(used)
        y, row, turned = aligned(size, lanes), np.zeros(size, np.float32), np.empty(size, np.float32)
        undo, token = np.zeros(lanes, np.float32), np.zeros(lanes, np.int64)
        for i in range(used):
            b, g, t = place(begin + i, kv_heads, tokens)
            token[i] = b * strides[0] + g * strides[1] + t
            undo[i] = load_row(keys, b * key_strides[0] + g * key_strides[1] + t * key_strides[2], key_mean,
                               b * kv_heads + g, row, head_dim)
            if query_mean.size > 0:
                a = np.float32(0)
                for d in range(head_dim):
                    a += query_mean[b * kv_heads + g, d] * row[d]
                offset[token[i]] = _half_saturated(a * undo[i])
            if matrix.size > 0:
                _multiply(row, matrix, turned)
                y[:, i] = turned
            else:
                y[:, i] = row
        for k in range(rounds):
            multiply_rows(y, signs[k])
            walsh_hadamard(y)
        squares, sums = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
        word = np.empty(lanes, np.uint32)
        for w in range(size // 32):
            word[:] = 0
            part_square, part_sum = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
            for j in range(32):
                bit = np.uint32(1 << 4 * (j & 7) + (j >> 3))
                _add_coordinate(y[32 * w + j], bit, word, part_square, part_sum)
            squares += part_square
            sums += part_sum
            for i in range(used):
                sign[token[i] * (size // 32) + w] = word[i]
        for i in range(used):
            r = remaining_scale * (squares[i] / sums[i]) if sums[i] > 0 else np.float32(0)
            rescale[token[i]] = _half_saturated(r * undo[i])


@numba.njit(**COMPILE)
def _multiply(row, matrix, turned):
    """turned = row matrix, one coordinate of row after another."""
    turned[:] = 0
    for d in range(len(row)):
        x, line = row[d], matrix[d]
        for j in range(len(turned)):
            turned[j] += x * line[j]


@numba.njit(**COMPILE)
def _add_coordinate(y, bit, word, square, total):
    """Sign, square and magnitude of one coordinate of some tokens."""
    for i in range(len(y)):
        word[i] |= bit if y[i] < 0 else np.uint32(0)
        square[i] += y[i] * y[i]
        total[i] += abs(y[i])


@numba.njit(**COMPILE)
def _half_saturated(value):
    """float16 bits; NaN stays."""
    return float_to_half(np.minimum(np.maximum(value, -LARGEST_SCALE), LARGEST_SCALE))


# --- Queries ---------------------------------------------------------------------------------------------------------


def quantize(rotated, query_bits, dither, codes, step, low) -> None:
    """The integers of rotated queries, by the float32 arithmetic of the reference; writes codes, step and low.

    rotated : [batch, q_heads, size] float32        dither : the same, or None for rounding to nearest
    codes   : [batch, q_heads, size] uint8 for 4 bits, int8 for 8        step, low : [batch, q_heads] float32
    """
    size = rotated.shape[-1]
    xi = np.zeros((0, size), np.float32) if dither is None else dither.reshape(-1, size)
    _quantize(rotated.reshape(-1, size), query_bits, xi, codes.reshape(-1, size), step.reshape(-1), low.reshape(-1))


@numba.njit(**COMPILE)
def _quantize(rotated, query_bits, dither, codes, step, low):
    rows, size = rotated.shape
    for r in range(rows):
        smallest, largest, magnitude, usable = rotated[r, 0], rotated[r, 0], np.float32(0), True
        for d in range(size):
            value = rotated[r, d]
            usable = usable and np.isfinite(value)
            smallest, largest = min(smallest, value), max(largest, value)
            magnitude = max(magnitude, abs(value))
        delta = magnitude / np.float32(127) if query_bits == 8 else (largest - smallest) / np.float32(15)
        inverse = np.float32(15) / (largest - smallest)
        if not np.isfinite(inverse):
            inverse = np.float32(0)
        usable = usable and np.isfinite(delta)
        for d in range(size):
            value = np.float32(0)
            if usable:
                value = rotated[r, d] / delta if query_bits == 8 else (rotated[r, d] - smallest) * inverse
                if dither.size > 0:
                    value = np.floor(value + dither[r, d])
                if not np.isfinite(value):
                    value = np.float32(0)
            value = np.rint(value)
            if query_bits == 8:
                codes[r, d] = np.int8(min(max(value, np.float32(-127)), np.float32(127)))
            else:
                codes[r, d] = np.uint8(min(max(value, np.float32(0)), np.float32(15)))
        step[r] = delta if usable else np.float32(np.nan)
        low[r] = np.float32(np.nan) if not usable else np.float32(0) if query_bits == 8 else smallest


# --- Scores ----------------------------------------------------------------------------------------------------------


def score(codes, step, low, constant, kappa, sign, rescale, offset, lengths, scale, logits, sigma) -> None:
    """logits <- scale (r (step <S, codes> + low <S, 1>) + a + constant), sigma <- r kappa unless it is None.

    codes           : [batch, q_heads, size], integers or float32
    step, low, constant, kappa : [batch, q_heads] float32
    sign            : [batch, kv_heads, tokens, words] uint32        rescale, offset or None : without words, float16
    lengths         : [batch] int32; from there on logits are -inf and sigma 0
    logits, sigma   : [batch, q_heads, tokens] float32
    """
    batch, q_heads, size = codes.shape
    kv_heads, tokens = sign.shape[1:3]
    rows = np.ones((batch, kv_heads, q_heads // kv_heads + 1, size), np.float32)      # the last one gives <S, 1>
    rows[:, :, :-1] = codes.reshape(batch, kv_heads, -1, size)
    _score(rows, step, low, constant, kappa, flat_planes({"sign": sign}), flat(bit_view(rescale)),
           np.empty(0, np.uint16) if offset is None else flat(bit_view(offset)), strides_of(rescale)[:2],
           both_signs([1.0]), lengths, np.float32(scale), logits, np.empty((0, 0, 0), np.float32) if sigma is None
           else sigma, tokens)


@numba.njit(parallel=True, **COMPILE_SUMS)
def _score(rows, step, low, constant, kappa, planes, rescale, offset, strides, centroids, lengths, scale, logits,
           sigma, tokens):
    batch, kv_heads, group, _ = rows.shape
    group -= 1
    splits = (tokens + TOKENS_PER_TASK - 1) // TOKENS_PER_TASK
    for task in numba.prange(batch * kv_heads * splits):
        b, g, split = task // (kv_heads * splits), task // splits % kv_heads, task % splits
        words, index, c, r = scratch()
        products = aligned(group + 1, TILE)
        stop = min((split + 1) * TOKENS_PER_TASK, tokens)
        for start in range(split * TOKENS_PER_TASK, stop, TILE):
            count = min(TILE, stop - start)
            present = min(max(lengths[b] - start, 0), count)
            token = b * strides[0] + g * strides[1] + start
            if present > 0:
                tile_logits(rows[b, g], planes, rescale, token, present, centroids, 1, words, index, c, r, products)
            for h in range(group):
                head = g * group + h
                to = logits[b, head, start : start + count]
                for i in range(present):
                    value = step[b, head] * products[h, i] + low[b, head] * products[group, i]
                    if offset.size > 0:
                        value += half_to_float(offset[token + i])
                    to[i] = scale * (value + constant[b, head])
                to[present:] = -np.inf
                if sigma.size > 0:
                    noise = sigma[b, head, start : start + count]
                    for i in range(present):
                        noise[i] = r[i] * kappa[b, head]
                    noise[present:] = 0
