"""TurboQuant on the CPU.  Reference: reference/turboquant.py; the order of the bits: reference/planes.py.

What the functions share:

    planes      as `Planes.arrays()` names them, each [batch, kv_heads, tokens, words] uint32
    scale       [batch, kv_heads, tokens] float16
    signs       [rounds, D] float32, +-2^-k, and `remaining_scale`, of a randomised Hadamard rotation, or None
    matrix      [D, D] float32, of a dense rotation, or None;  with neither of the two nothing is rotated
    bits        of a code, 1 to 8;  `centroids` and `boundaries` of its codebook: any float dtype

Planes and scale may have any strides over sequences and heads, the same for all of them if counted in tokens; the
tokens of a head follow one another without gaps.  D is the size of the rotation, a multiple of 32.  head_dim, that of
the vectors, is at most D; what is missing counts as zeros.

The kernels hold tiles with one coordinate a row and one token a column: the steps of the rotation, of the codes and of
their packing are then the same for neighbours in memory, and vectorise.  Their arithmetic is float32.  Inner loops
stand in functions of their own, where few arrays are to be checked for overlaps.  Integers are cut back to 32 bits
after every step, and shifts to 31 before: Numba widens them to 64 bits, which would halve the vectors.
"""
from __future__ import annotations

import numba
import numpy as np

from kvbench.cpu.attention import merge
from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, float_to_half, half_to_float, load, store
from kvbench.cpu.convert import bits as bit_view
from kvbench.cpu.rotation import hadamard

PLANES = ("sign", "mag2_0", "mag2_1", "mag2_2", "mag1")
SCALE_MODES = {"nc": 0, "plain": 1, "mse": 2, "unbiased": 3}
LARGEST_SCALE = np.float32(65504)     # of float16
LANES = 32                            # tokens encoded or decoded at a time
TILE = 256                            # tokens whose logits are held at a time: 16 of their coordinates fill 16 KiB
TOKENS_PER_TASK = 1024                # one task of attention is a (sequence, KV head, split of this many tokens)
ROWS_PER_CHUNK = 8192                 # vectors rotated by a dense matrix at a time


# --- Encode ----------------------------------------------------------------------------------------------------------


def encode(x, signs, remaining_scale, mean, boundaries, centroids, bits, scale_mode, planes, scale, *, matrix=None):
    """Rotate, normalise, code and pack: writes `planes` and `scale` in place.

    x                      : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, contiguous rows
    signs, remaining_scale : of a randomised Hadamard rotation, or None        matrix : of a dense one, y = x matrix
    mean                   : [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, subtracted from x, or None
    scale_mode             : "nc", "plain", "mse" or "unbiased"
    """
    _encode_all(x, signs, remaining_scale, matrix, mean, boundaries, centroids, bits, scale_mode, planes, scale)


def encode_prod(x, signs, remaining_scale, mean, boundaries, centroids, bits, planes, scale, projection,
                residual_sign, residual_norm, *, matrix=None):
    """TurboQuant-prod: `bits` - 1 bits of "plain" code, then the signs of the projected residual, all in place.

    boundaries, centroids, planes, scale : of the first stage; not looked at for 1 bit, which has none
    projection    : [D, D], S
    residual_sign : [batch, kv_heads, tokens, D / 32] uint32        residual_norm : [batch, kv_heads, tokens] float16

    Other arguments as in `encode`.
    """
    if bits == 1:
        boundaries, centroids, planes, scale = (), (0,), {"sign": residual_sign}, residual_norm
    transposed = np.ascontiguousarray(np.asarray(projection).T, np.float32)
    _encode_all(x, signs, remaining_scale, matrix, mean, boundaries, centroids, bits - 1, "plain", planes, scale,
                (transposed, residual_sign, residual_norm))


def _encode_all(x, signs, remaining_scale, matrix, mean, boundaries, centroids, bits, scale_mode, planes, scale,
                prod=None):
    """prod : (S^T, residual_sign, residual_norm) of TurboQuant-prod, or None"""
    batch, kv_heads, tokens, head_dim = x.shape
    rows, shape, size = batch * kv_heads * tokens, (kv_heads, tokens), 32 * planes["sign"].shape[-1]
    no_mean = np.zeros((0, head_dim), np.float32)
    if mean is not None:
        mean = np.broadcast_to(mean, (batch, kv_heads, head_dim)).astype(np.float32).reshape(-1, head_dim)
    source = flat(bit_view(x)), 0, strides(x)[:3], head_dim, no_mean if mean is None else mean
    rotation = _rotation(signs, remaining_scale, size)
    code = (np.asarray(boundaries, np.float32), np.asarray(centroids, np.float32), bits, SCALE_MODES[scale_mode],
            flat_planes(planes), flat(bit_view(scale)), strides(scale)[:2])
    norms = flat(bit_view(scale if prod is None else prod[2]))
    chunk = max(rows, 1) if matrix is None and prod is None else ROWS_PER_CHUNK
    for first in range(0, rows, chunk):
        count = min(chunk, rows - first)
        residual = np.empty((0 if prod is None else count, size), np.float32)
        if matrix is None:
            _encode(*source, *rotation, np.ones(0, np.float32), first, count, *shape, *code, residual, norms)
        else:
            prepared, factors = np.empty((count, size), np.float32), np.empty(count, np.float32)
            _prepare(*source, first, *shape, prepared, factors)
            _encode((prepared @ matrix).reshape(-1), *_rows(first, size, *shape), size, no_mean, *rotation, factors,
                    first, count, *shape, *code, residual, norms)
        if prod is not None:
            _pack_signs(residual @ prod[0], first, *shape, flat(prod[1]), strides(scale)[:2])


@numba.njit(**COMPILE)
def _place(row, kv_heads, tokens):
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


@numba.njit(parallel=True, **COMPILE)
def _prepare(x, x_start, x_strides, head_dim, mean, first, kv_heads, tokens, prepared, factors):
    """The rows of x as float32 near 1, padded with zeros: what a dense matrix takes without overflow."""
    for i in numba.prange(len(factors)):
        b, g, t = _place(first + i, kv_heads, tokens)
        prepared[i, head_dim:] = 0
        factors[i] = load_row(x, x_start + b * x_strides[0] + g * x_strides[1] + t * x_strides[2], mean,
                               b * kv_heads + g, prepared[i], head_dim)


@numba.njit(parallel=True, **COMPILE)
def _encode(x, x_start, x_strides, head_dim, mean, signs, remaining_scale, factors, first, count, kv_heads, tokens,
            boundaries, centroids, bits, mode, planes, scale, strides, residual, residual_norm):
    """Vectors first .. first + count - 1.  factors : [count] that rows were divided by, or [0]
    bits : 0 for none but the residual       residual : [count, D], z - c of the vectors, and residual_norm; or [0, D]
    """
    rounds, size = signs.shape
    for task in numba.prange((count + LANES - 1) // LANES):
        begin = first + task * LANES
        used = min(LANES, first + count - begin)
        lanes = whole(used)
        y = aligned(size, lanes)
        undo, token = np.zeros(lanes, np.float32), np.zeros(lanes, np.int64)
        row = np.empty(size, np.float32)
        for i in range(used):
            b, g, t = _place(begin + i, kv_heads, tokens)
            token[i] = b * strides[0] + g * strides[1] + t
            undo[i] = load_row(x, x_start + b * x_strides[0] + g * x_strides[1] + t * x_strides[2], mean,
                                b * kv_heads + g, row, head_dim)
            if factors.size > 0:
                undo[i] *= factors[begin - first + i]
            for d in range(head_dim):
                y[d, i] = row[d]
        for k in range(rounds):
            _multiply_rows(y, signs[k])
            _walsh_hadamard(y)
        norm, scaling = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
        measure(y, remaining_scale, norm, scaling)
        inner, energy = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
        _encode_tile(y, scaling, boundaries, centroids, bits, planes, token[:used], residual.size > 0, inner, energy)
        for i in range(used):
            if bits > 0:
                s = norm[i] * scale_factor(mode, inner[i], energy[i]) if norm[i] > 0 else np.float32(0)
                scale[token[i]] = half_scale(s * undo[i])
            if residual.size > 0:
                square = np.float32(0)
                for d in range(size):
                    residual[begin - first + i, d] = y[d, i]
                    square += y[d, i] * y[d, i]
                residual_norm[token[i]] = half_scale(norm[i] * np.sqrt(square) * undo[i])


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


@numba.njit(**COMPILE)
def _encode_tile(y, scaling, boundaries, centroids, bits, planes, token, keeps_residual, inner, energy):
    """The codes of z = scaling y to `planes`, at `token` of the first columns; inner <- w = <z, c> / D and energy <-
    e = <c, c> / D.  y <- z, or with `keeps_residual` z - c, 0 for a zero vector."""
    size, lanes = y.shape
    part_inner, part_energy = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    words, code = aligned(8, lanes).view(np.uint32), np.empty(lanes, np.uint32)
    magnitude, c = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    for word in range(size // 32):
        words[:] = 0
        part_inner[:] = 0
        part_energy[:] = 0
        for j in range(32):
            z = y[32 * word + j]
            assign(z, scaling, boundaries, centroids, magnitude, code, c)
            _pack(z, code, j, bits, words)
            for i in range(lanes):
                part_inner[i] += magnitude[i] * c[i]
                part_energy[i] += c[i] * c[i]
            if keeps_residual:
                for i in range(lanes):
                    difference = magnitude[i] - c[i] if scaling[i] > 0 else np.float32(0)
                    z[i] = -difference if z[i] < 0 else difference
        inner += part_inner
        energy += part_energy
        if bits > 0:
            for i in range(len(token)):
                _store_words(words, i, planes, token[i], word, size // 32, bits)
    inner /= np.float32(size)
    energy /= np.float32(size)


@numba.njit(**COMPILE)
def scale_factor(mode, w, e):
    """s over |y| / sqrt(D)."""
    if mode == 0:
        return np.float32(1) / np.sqrt(e)
    if mode == 1:
        return np.float32(1)
    if mode == 2:
        return w / e
    return np.float32(1) / w


@numba.njit(**COMPILE)
def assign(z, scaling, boundaries, centroids, magnitude, code, c):
    """z <- z scaling, |z|, the magnitude code and its centroid c > 0 of one coordinate of some tokens."""
    lanes = len(z)
    for i in range(lanes):
        z[i] *= scaling[i]
        magnitude[i] = abs(z[i])
        code[i] = 0
    for boundary in boundaries:
        for i in range(lanes):
            code[i] += np.uint32(1) if magnitude[i] > boundary else np.uint32(0)
    for i in range(lanes):
        c[i] = centroids[code[i]]


@numba.njit(**COMPILE)
def _pack(z, code, j, bits, words):
    """Put the sign of z and the code of coordinate j, from 0 to 31, into the words of some tokens."""
    pack_sign(z, j, words[0])
    for pair in range((bits - 1) // 2):
        pack_pair(code, pair, j, words[1 + 2 * pair + (j >> 4)])
    if bits > 0 and bits % 2 == 0:
        pack_top(code, bits, j, words[7])


@numba.njit(**COMPILE)
def pack_sign(z, j, row):
    """Set the bit of place j, from 0 to 31, of a sign word of some tokens where z is negative."""
    single = np.uint32(1 << 4 * (j & 7) + (j >> 3))
    for i in range(len(row)):
        row[i] |= single if z[i] < 0 else np.uint32(0)


@numba.njit(**COMPILE)
def pack_pair(code, pair, j, row):
    """Magnitude bits 2 pair and the one above it to the place of coordinate j, of 16 or 32, in its word of mag2."""
    shift, place = np.uint32(4 * (j & 7) + 2 * (j >> 3 & 1)), np.uint32(2 * pair)
    for i in range(len(row)):
        field = np.uint32(np.uint32(code[i] >> (place & np.uint32(31))) & np.uint32(3))
        row[i] |= np.uint32(field << (shift & np.uint32(31)))


@numba.njit(**COMPILE)
def pack_top(code, bits, j, row):
    """The top magnitude bit of an even number of bits to place j, from 0 to 31, of a word of mag1."""
    single, top = np.uint32(1 << 4 * (j & 7) + (j >> 3)), np.uint32(1 << (bits - 2))
    for i in range(len(row)):
        row[i] |= single if code[i] >= top else np.uint32(0)


@numba.njit(**COMPILE)
def half_scale(value):
    """float16 bits."""
    return float_to_half(np.minimum(value, LARGEST_SCALE))       # NaN stays


@numba.njit(**COMPILE)
def _store_words(words, lane, planes, token, word, single, bits):
    """One column of what `_load_words` loads."""
    planes[0][token * single + word] = words[0, lane]
    for half in range(2):
        if bits >= 3:
            planes[1][2 * (token * single + word) + half] = words[1 + half, lane]
        if bits >= 5:
            planes[2][2 * (token * single + word) + half] = words[3 + half, lane]
        if bits >= 7:
            planes[3][2 * (token * single + word) + half] = words[5 + half, lane]
    if bits % 2 == 0:
        planes[4][token * single + word] = words[7, lane]


@numba.njit(parallel=True, **COMPILE)
def _pack_signs(projected, first, kv_heads, tokens, plane, strides):
    rows, size = projected.shape
    for r in numba.prange(rows):
        b, g, t = _place(first + r, kv_heads, tokens)
        token = b * strides[0] + g * strides[1] + t
        for word in range(size // 32):
            packed = np.uint32(0)
            for j in range(32):
                if projected[r, 32 * word + j] < 0:
                    packed |= np.uint32(1) << np.uint32(4 * (j & 7) + (j >> 3))
            plane[token * (size // 32) + word] = packed


# --- Rotation of a tile ----------------------------------------------------------------------------------------------


@numba.njit(**COMPILE)
def _multiply_rows(y, signs):
    for d in range(len(y)):
        row, sign = y[d], signs[d]
        for i in range(len(row)):
            row[i] *= sign


@numba.njit(**COMPILE)
def _walsh_hadamard(y):
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


# --- Decode ----------------------------------------------------------------------------------------------------------


def decode(planes, scale, signs, remaining_scale, centroids, bits, out, *, matrix=None):
    """x_hat = s R^T c.

    signs, remaining_scale : of a randomised Hadamard rotation, or None
    matrix                 : of a dense one, x_hat = (s c) matrix: the transpose of what `encode` takes
    out                    : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, contiguous rows
    """
    batch, kv_heads, tokens, head_dim = out.shape
    rows, shape, size = batch * kv_heads * tokens, (kv_heads, tokens), 32 * planes["sign"].shape[-1]
    code = (flat_planes(planes), flat(bit_view(scale)), strides(scale)[:2], both_signs(centroids), bits,
            *_rotation(signs, remaining_scale, size))
    target = flat(bit_view(out)), 0, strides(out)[:3], head_dim
    if matrix is None:
        _decode(*code, 0, rows, *shape, *target)
        return
    for first in range(0, rows, ROWS_PER_CHUNK):
        rotated = np.empty((min(ROWS_PER_CHUNK, rows - first), size), np.float32)
        _decode(*code, first, len(rotated), *shape, rotated.reshape(-1), *_rows(first, size, *shape), size)
        _store_rows(rotated @ matrix, first, *shape, *target)


def decode_prod(planes, scale, residual_sign, residual_norm, projection, unbiasing, signs, remaining_scale, centroids,
                bits, out, *, matrix=None):
    """x_hat = R^T (s c + k |r| S^T h), h the residual signs and k = `unbiasing`.

    planes, scale, centroids : of the first stage, of `bits` - 1 bits; not looked at for 1 bit
    Other arguments as in `encode_prod` and `decode`.
    """
    batch, kv_heads, tokens, head_dim = out.shape
    rows, shape, size = batch * kv_heads * tokens, (kv_heads, tokens), 32 * residual_sign.shape[-1]
    projection = np.ascontiguousarray(projection, np.float32)

    def expanded(planes, scale, centroids, bits, first, count):
        result = np.empty((count, size), np.float32)
        _decode(flat_planes(planes), flat(bit_view(scale)), strides(scale)[:2], both_signs(centroids), bits,
                *_rotation(None, None, size), first, count, *shape, result.reshape(-1), *_rows(first, size, *shape),
                size)
        return result

    for first in range(0, rows, ROWS_PER_CHUNK):
        count = min(ROWS_PER_CHUNK, rows - first)
        result = expanded({"sign": residual_sign}, residual_norm, [unbiasing], 1, first, count) @ projection
        if bits > 1:
            result += expanded(planes, scale, centroids, bits - 1, first, count)
        if matrix is not None:
            result = result @ matrix
        elif signs is not None:
            hadamard(result, result, signs, remaining_scale, inverse=True)
        _store_rows(result, first, *shape, flat(bit_view(out)), 0, strides(out)[:3], head_dim)


@numba.njit(parallel=True, **COMPILE)
def _decode(planes, scale, strides, centroids, bits, signs, remaining_scale, first, count, kv_heads, tokens, out,
            out_start, out_strides, head_dim):
    """Vectors first .. first + count - 1."""
    rounds, size = signs.shape
    for task in numba.prange((count + LANES - 1) // LANES):
        begin = first + task * LANES
        used = min(LANES, first + count - begin)
        lanes = whole(used)
        y = aligned(size, lanes)
        words, index = aligned(8, lanes).view(np.uint32), np.empty(lanes, np.uint32)
        token, row = np.empty(lanes, np.int64), np.empty(size, np.float32)
        for i in range(used):
            b, g, t = _place(begin + i, kv_heads, tokens)
            token[i] = b * strides[0] + g * strides[1] + t
        for word in range(size // 32):
            for i in range(used):
                _load_words(planes, token[i], 1, word, size // 32, bits, words[:, i:])
            for half in range(2):
                expand(words, half, lanes, bits, centroids, index, y[32 * word + 16 * half :])
        for k in range(rounds):
            _walsh_hadamard(y)
            _multiply_rows(y, signs[rounds - 1 - k])
        for i in range(used):
            b, g, t = _place(begin + i, kv_heads, tokens)
            start = out_start + b * out_strides[0] + g * out_strides[1] + t * out_strides[2]
            s = half_to_float(scale[token[i]]) * remaining_scale
            for d in range(head_dim):
                row[d] = y[d, i] * s
            target = out[start : start + head_dim]
            for d in range(head_dim):
                target[d] = store(row[d], out)


@numba.njit(parallel=True, **COMPILE)
def _store_rows(rows, first, kv_heads, tokens, out, out_start, out_strides, head_dim):
    for r in numba.prange(rows.shape[0]):
        b, g, t = _place(first + r, kv_heads, tokens)
        start = out_start + b * out_strides[0] + g * out_strides[1] + t * out_strides[2]
        row, target = rows[r], out[start : start + head_dim]
        for d in range(head_dim):
            target[d] = store(row[d], out)


@numba.njit(**COMPILE)
def _load_words(planes, token, count, word, single, bits, words):
    """The words of coordinates 32 word .. 32 word + 31, of `count` tokens.

    words : [8, count]: sign, mag2_0 twice, mag2_1 twice, mag2_2 twice, mag1      single : words of a sign row
    """
    load_column(planes[0], token * single + word, single, count, words[0])
    for half in range(2):
        start = 2 * (token * single + word) + half
        if bits >= 3:
            load_column(planes[1], start, 2 * single, count, words[1 + half])
        if bits >= 5:
            load_column(planes[2], start, 2 * single, count, words[3 + half])
        if bits >= 7:
            load_column(planes[3], start, 2 * single, count, words[5 + half])
    if bits % 2 == 0:
        load_column(planes[4], token * single + word, single, count, words[7])


@numba.njit(**COMPILE)
def load_column(plane, start, step, count, row):
    """row[i] = plane[start + i step]"""
    start, step = np.uint64(start), np.uint64(step)      # signed indices would be checked for -1, -2, ...
    whole = count // 16 * 16
    for first in range(0, whole, 16):
        for i in range(first, first + 16):               # 16 at a time make a vector
            row[i] = plane[start + np.uint64(i) * step]
    for i in range(whole, count):
        row[i] = plane[start + np.uint64(i) * step]


@numba.njit(**COMPILE)
def expand(words, half, lanes, bits, centroids, index, c):
    """c[j, i], coordinates 16 half .. 16 half + 15 of `lanes` tokens, of the words that `_load_words` collected.

    centroids : of `both_signs`        index : scratch [lanes] uint32
    """
    if bits <= 2:
        _expand_2(words, half, lanes, centroids, c)
    elif bits == 3:
        _expand_4(words, half, lanes, centroids, c)
    elif bits == 4:
        _expand_8(words, half, lanes, centroids, c)
    else:
        _expand_many(words, half, lanes, bits, centroids, index, c)


# A choice among up to eight magnitudes vectorises, a look-up does not.  Bits in a word, j = 0..15: 4 p + s of the sign
# and of mag1, and 4 p + 2 (s & 1) of mag2, s = 2 half + (j >> 3), p = j & 7.

@numba.njit(**COMPILE)
def _expand_2(words, half, lanes, centroids, c):
    c0, c1 = centroids[0], centroids[len(centroids) // 2 - 1]       # of 1 bit: the same
    signs, tops = words[0], words[7]
    for j in range(16):
        place, row = 4 * (j & 7) + 2 * half + (j >> 3), c[j]
        top = np.uint32(1 << place)
        for i in range(lanes):
            row[i] = _signed(c1 if np.uint32(tops[i] & top) != 0 else c0, signs[i], np.uint32(31 - place))


@numba.njit(**COMPILE)
def _expand_4(words, half, lanes, centroids, c):
    c0, c1, c2, c3 = centroids[0], centroids[1], centroids[2], centroids[3]
    signs, pairs = words[0], words[1 + half]
    for j in range(16):
        place, row = 4 * (j & 7) + 2 * half + (j >> 3), c[j]
        low, high = np.uint32(1 << place - 2 * half + (j >> 3)), np.uint32(2 << place - 2 * half + (j >> 3))
        for i in range(lanes):
            is_odd = np.uint32(pairs[i] & low) != 0
            lower, upper = c1 if is_odd else c0, c3 if is_odd else c2
            value = upper if np.uint32(pairs[i] & high) != 0 else lower
            row[i] = _signed(value, signs[i], np.uint32(31 - place))


@numba.njit(**COMPILE)
def _expand_8(words, half, lanes, centroids, c):
    c0, c1, c2, c3 = centroids[0], centroids[1], centroids[2], centroids[3]
    c4, c5, c6, c7 = centroids[4], centroids[5], centroids[6], centroids[7]
    signs, pairs, tops = words[0], words[1 + half], words[7]
    for j in range(16):
        place, row = 4 * (j & 7) + 2 * half + (j >> 3), c[j]
        low, high = np.uint32(1 << place - 2 * half + (j >> 3)), np.uint32(2 << place - 2 * half + (j >> 3))
        top = np.uint32(1 << place)
        for i in range(lanes):
            is_odd, is_high = np.uint32(pairs[i] & low) != 0, np.uint32(pairs[i] & high) != 0
            lower_even, lower_odd = c2 if is_high else c0, c3 if is_high else c1
            upper_even, upper_odd = c6 if is_high else c4, c7 if is_high else c5
            lower, upper = lower_odd if is_odd else lower_even, upper_odd if is_odd else upper_even
            row[i] = _signed(upper if np.uint32(tops[i] & top) != 0 else lower, signs[i], np.uint32(31 - place))


@numba.njit(**COMPILE)
def _expand_many(words, half, lanes, bits, centroids, index, c):
    signs, tops = words[0], words[7]
    negative = np.uint32(1 << bits - 1)
    top_value = np.uint32(1 << bits - 2) if bits % 2 == 0 else np.uint32(0)
    for j in range(16):
        place, row = 4 * (j & 7) + 2 * half + (j >> 3), c[j]
        bit, shift = np.uint32(1 << place), np.uint32(place - 2 * half + (j >> 3))
        for i in range(lanes):
            sign = negative if np.uint32(signs[i] & bit) != 0 else np.uint32(0)
            index[i] = np.uint32(sign | (top_value if np.uint32(tops[i] & bit) != 0 else np.uint32(0)))
        for pair in range((bits - 1) // 2):
            pairs, to = words[1 + 2 * pair + half], np.uint32(2 * pair)
            for i in range(lanes):
                field = np.uint32(np.uint32(pairs[i] >> (shift & np.uint32(31))) & np.uint32(3))
                index[i] = np.uint32(index[i] | np.uint32(field << (to & np.uint32(31))))
        for i in range(lanes):
            row[i] = centroids[index[i]]


@numba.njit(**COMPILE)
def _signed(value, signs, to_top):
    """-value if the bit of `signs` is set that a shift by `to_top` brings to the top."""
    sign = np.uint32(np.uint32(signs << (to_top & np.uint32(31))) & np.uint32(0x80000000))
    return np.uint32(np.float32(value).view(np.uint32) ^ sign).view(np.float32)


# --- Logits and attention --------------------------------------------------------------------------------------------


def logits(rotated_query, planes, scale, centroids, bits, out) -> None:
    """out_ht = s_t <q'_h, c_t>.

    rotated_query : [batch, kv_heads, group, D] float32, q' = scale R q
    out           : [batch, q_heads, tokens] float32
    """
    _logits(np.ascontiguousarray(rotated_query), flat_planes(planes), flat(bit_view(scale)), strides(scale)[:2],
            both_signs(centroids), bits, out)


def logits_prod(rotated_query, planes, scale, residual_sign, residual_norm, projection, unbiasing, centroids, bits,
                out) -> None:
    """out_ht = s_t <q'_h, c_t> + k |r_t| <S q'_h, h_t>, h the residual signs and k = `unbiasing`.

    planes, scale, centroids : of the first stage, of `bits` - 1 bits; not looked at for 1 bit
    Other arguments as in `encode_prod` and `logits`.
    """
    projected = rotated_query @ np.ascontiguousarray(np.asarray(projection).T, np.float32)
    logits(projected, {"sign": residual_sign}, residual_norm, [unbiasing], 1, out)
    if bits > 1:
        first = np.empty_like(out)
        logits(rotated_query, planes, scale, centroids, bits - 1, first)
        out += first


def decode_attention(rotated_query, key_planes, key_scale, key_centroids, value_planes, value_scale, value_centroids,
                     lengths, out, lse) -> None:
    """One decode step of attention, in rotated coordinates.

    rotated_query : [batch, kv_heads, group, D of the keys] float32, q' = scale R_k q
    lengths       : [batch] int32, from 0 to tokens
    out           : [batch, q_heads, D of the values], any float dtype: R_v output, still to be rotated back
    lse           : [batch, q_heads] float32, or None
    """
    batch, kv_heads, group, _ = rotated_query.shape
    size = 32 * value_planes["sign"].shape[-1]
    splits = max(-(-key_scale.shape[2] // TOKENS_PER_TASK), 1)
    outputs = np.zeros((splits, batch, kv_heads * group, size), np.float32)
    lses = np.full((splits, batch, kv_heads * group), -np.inf, np.float32)
    codes = [(flat_planes(planes), flat(bit_view(scale)), strides(scale)[:2], both_signs(centroids),
              len(centroids).bit_length())
             for planes, scale, centroids in ((key_planes, key_scale, key_centroids),
                                              (value_planes, value_scale, value_centroids))]
    _decode_attention(np.ascontiguousarray(rotated_query), *codes[0], *codes[1], lengths, outputs, lses)
    merge(outputs, lses, out, np.empty(lses.shape[1:], np.float32) if lse is None else lse)


@numba.njit(parallel=True, **COMPILE_SUMS)
def _logits(query, planes, scale, strides, centroids, bits, out):
    batch, kv_heads, group = query.shape[:3]
    tokens = out.shape[2]
    tiles = (tokens + TILE - 1) // TILE
    for task in numba.prange(batch * kv_heads * tiles):
        b, g, first = task // (kv_heads * tiles), task // tiles % kv_heads, task % tiles * TILE
        count = min(TILE, tokens - first)
        words, index, c, s = scratch()
        products = aligned(group, TILE)
        token = b * strides[0] + g * strides[1] + first
        _tile_logits(query[b, g], planes, scale, token, count, centroids, bits, words, index, c, s, products)
        for h in range(group):
            for i in range(count):
                out[b, g * group + h, first + i] = products[h, i]


@numba.njit(**COMPILE)
def scratch():
    """Of a task: words, indices, 16 coordinates c and scales of the tokens of a tile."""
    return (aligned(8, TILE).view(np.uint32), aligned(1, TILE).view(np.uint32)[0], aligned(16, TILE),
            aligned(1, TILE)[0])


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


@numba.njit(**COMPILE_SUMS)
def _tile_logits(query, planes, scale, token, count, centroids, bits, words, index, c, s, products):
    """products[h, i] = s_i <query_h, c_i> of `count` tokens from `token` on; what follows them is not defined."""
    group, size = query.shape
    lanes = whole(count)
    products[:, :lanes] = 0
    for word in range(size // 32):
        _load_words(planes, token, count, word, size // 32, bits, words)
        for half in range(2):
            expand(words, half, lanes, bits, centroids, index, c)
            multiply(query, 32 * word + 16 * half, c, lanes, products)
    load_scale(scale, token, count, s)
    for h in range(group):
        for i in range(lanes):
            products[h, i] *= s[i]


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


@numba.njit(**COMPILE)
def load_scale(scale, token, count, s):
    for i in range(count):
        s[i] = half_to_float(scale[token + i])


@numba.njit(**COMPILE_SUMS)
def _add_values(weights, planes, token, count, centroids, bits, words, index, c, output):
    """output += weights times the values of a tile.  weights : [group, TILE], 0 beyond `count`"""
    size, lanes = output.shape[1], whole(count)
    for word in range(size // 32):
        _load_words(planes, token, count, word, size // 32, bits, words)
        for half in range(2):
            expand(words, half, lanes, bits, centroids, index, c)
            _multiply_transposed(weights, c, lanes, output, 32 * word + 16 * half)


@numba.njit(**COMPILE_SUMS)
def _multiply_transposed(weights, c, lanes, output, start):
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


@numba.njit(parallel=True, **COMPILE_SUMS)
def _decode_attention(query, key_planes, key_scale, key_strides, key_centroids, key_bits, value_planes, value_scale,
                      value_strides, value_centroids, value_bits, lengths, outputs, lses):
    batch, kv_heads, group, _ = query.shape
    splits, size = outputs.shape[0], outputs.shape[3]
    for task in numba.prange(batch * kv_heads * splits):
        b, g, split = task // (kv_heads * splits), task // splits % kv_heads, task % splits
        first, last = split * TOKENS_PER_TASK, min((split + 1) * TOKENS_PER_TASK, lengths[b])
        if first >= last:
            continue
        words, index, c, s = scratch()
        weights = aligned(group, TILE)
        largest = np.full(group, -np.inf, np.float32)
        total = np.zeros(group, np.float32)
        output = np.zeros((group, size), np.float32)
        for start in range(first, last, TILE):
            count = min(TILE, last - start)
            _tile_logits(query[b, g], key_planes, key_scale, b * key_strides[0] + g * key_strides[1] + start, count,
                         key_centroids, key_bits, words, index, c, s, weights)
            attend_to_tile(weights, value_planes, value_scale, b * value_strides[0] + g * value_strides[1] + start,
                           count, value_centroids, value_bits, words, index, c, s, largest, total, output)
        store_split(output, largest, total, outputs[split, b, g * group :], lses[split, b, g * group :])


@numba.njit(**COMPILE_SUMS)
def attend_to_tile(weights, planes, scale, token, count, centroids, bits, words, index, c, s, largest, total, output):
    """One step of online softmax: `count` values from `token` on, by their logits `weights` [group, TILE], which are
    overwritten, to the running `output` [group, D], `total` and `largest` [group]; scratch as `scratch` gives it."""
    load_scale(scale, token, count, s)
    for h in range(len(weights)):
        new = _largest(weights[h], count, largest[h])
        factor = np.exp(largest[h] - new) if largest[h] > -np.inf else np.float32(0)
        largest[h] = new
        total[h] = total[h] * factor + _exponentiate(weights[h], count, new)
        for d in range(output.shape[1]):
            output[h, d] *= factor
        for i in range(count):
            weights[h, i] *= s[i]
        weights[h, count : whole(count)] = 0
    _add_values(weights, planes, token, count, centroids, bits, words, index, c, output)


@numba.njit(**COMPILE_SUMS)
def store_split(output, largest, total, out, lse):
    """The result of one split, out [group, D] and lse [group], of what `attend_to_tile` left."""
    for h in range(len(output)):
        inverse = np.float32(1) / total[h] if total[h] != 0 else np.float32(0)
        for d in range(output.shape[1]):
            out[h, d] = output[h, d] * inverse
        lse[h] = largest[h] + np.log(total[h])


@numba.njit(**COMPILE)
def _largest(logits, count, start):
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
def _exponentiate(logits, count, largest):
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


# --- Arrays as kernels take them -------------------------------------------------------------------------------------


def flat(array):
    """The memory from the first element to the last in one dimension: one type for kernels, whatever the strides."""
    if array.flags.c_contiguous:
        return array.reshape(-1)
    length = 1 + sum((n - 1) * stride for n, stride in zip(array.shape, strides(array)))
    return np.lib.stride_tricks.as_strided(array, (length,), (array.itemsize,))


def strides(array):
    """In elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def _rows(first, size, kv_heads, tokens):
    """Start and strides of [batch, kv_heads, tokens, size] of which memory holds the vectors from `first` on."""
    return -first * size, (kv_heads * tokens * size, tokens * size, size)


def _rotation(signs, remaining_scale, size):
    """Signs [rounds, size] and remaining scale of a Hadamard rotation; no rounds for any other."""
    if signs is None:
        return np.zeros((0, size), np.float32), np.float32(1)
    return signs, np.float32(remaining_scale)


def both_signs(centroids):
    """[2^bits] float32: the centroids of positive codes, then those of negative ones."""
    return np.concatenate([centroids, np.negative(centroids)]).astype(np.float32)


def flat_planes(planes):
    """Those that PLANES names, empty where there is none."""
    absent = np.empty(0, np.uint32)
    return tuple(flat(planes[name]) if name in planes else absent for name in PLANES)
