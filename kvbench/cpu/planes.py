"""Bit planes on the CPU: magnitude codes and signs in words, and tiles of centroids out of them.

The order of the bits: reference/planes.py.  Tiles: kvbench/cpu/tiles.py.
"""
from __future__ import annotations

import numba
import numpy as np

from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, flat
from kvbench.cpu.tiles import (TILE, aligned, exponentiate, load_scale, multiply, multiply_transposed, raise_largest,
                               whole)

PLANES = ("sign", "mag2_0", "mag2_1", "mag2_2", "mag1")


# --- Into words -------------------------------------------------------------------------------------------------------


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
def pack(z, code, j, bits, words):
    """Put the sign of z and the code of coordinate j, from 0 to 31, into the words of some tokens."""
    pack_sign(z, j, words[0])
    for pair in range((bits - 1) // 2):
        pack_pair(code, pair, j, words[1 + 2 * pair + (j >> 4)])
    if bits > 0 and bits % 2 == 0:
        pack_top(code, bits, j, words[7])


@numba.njit(**COMPILE)
def store_words(words, lane, planes, token, word, single, bits):
    """One column of what `load_words` loads."""
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


# --- Out of words -----------------------------------------------------------------------------------------------------


@numba.njit(**COMPILE)
def load_words(planes, token, count, word, single, bits, words):
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
    """c[j, i], coordinates 16 half .. 16 half + 15 of `lanes` tokens, of the words that `load_words` collected.

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


# --- Products with tiles of codes -------------------------------------------------------------------------------------


@numba.njit(**COMPILE)
def scratch():
    """Of a task: words, indices, 16 coordinates c and scales of the tokens of a tile."""
    return (aligned(8, TILE).view(np.uint32), aligned(1, TILE).view(np.uint32)[0], aligned(16, TILE),
            aligned(1, TILE)[0])


@numba.njit(**COMPILE_SUMS)
def tile_logits(query, planes, scale, token, count, centroids, bits, words, index, c, s, products):
    """products[h, i] = s_i <query_h, c_i> of `count` tokens from `token` on; what follows them is not defined."""
    group, size = query.shape
    lanes = whole(count)
    products[:, :lanes] = 0
    for word in range(size // 32):
        load_words(planes, token, count, word, size // 32, bits, words)
        for half in range(2):
            expand(words, half, lanes, bits, centroids, index, c)
            multiply(query, 32 * word + 16 * half, c, lanes, products)
    load_scale(scale, token, count, s)
    for h in range(group):
        for i in range(lanes):
            products[h, i] *= s[i]


@numba.njit(**COMPILE_SUMS)
def add_values(weights, planes, token, count, centroids, bits, words, index, c, output):
    """output += weights times the values of a tile.  weights : [group, TILE], 0 beyond `count`"""
    size, lanes = output.shape[1], whole(count)
    for word in range(size // 32):
        load_words(planes, token, count, word, size // 32, bits, words)
        for half in range(2):
            expand(words, half, lanes, bits, centroids, index, c)
            multiply_transposed(weights, c, lanes, output, 32 * word + 16 * half)


@numba.njit(**COMPILE_SUMS)
def attend_to_tile(weights, planes, scale, token, count, centroids, bits, words, index, c, s, largest, total, output):
    """One step of online softmax: `count` values from `token` on, by their logits `weights` [group, TILE], which are
    overwritten, to the running `output` [group, D], `total` and `largest` [group]; scratch as `scratch` gives it."""
    load_scale(scale, token, count, s)
    for h in range(len(weights)):
        new = raise_largest(weights[h], count, largest[h])
        factor = np.exp(largest[h] - new) if largest[h] > -np.inf else np.float32(0)
        largest[h] = new
        total[h] = total[h] * factor + exponentiate(weights[h], count, new)
        for d in range(output.shape[1]):
            output[h, d] *= factor
        for i in range(count):
            weights[h, i] *= s[i]
        weights[h, count : whole(count)] = 0
    add_values(weights, planes, token, count, centroids, bits, words, index, c, output)


# --- Arrays as kernels take them --------------------------------------------------------------------------------------


def both_signs(centroids):
    """[2^bits] float32: the centroids of positive codes, then those of negative ones."""
    return np.concatenate([centroids, np.negative(centroids)]).astype(np.float32)


def flat_planes(planes):
    """Those that PLANES names, empty where there is none."""
    absent = np.empty(0, np.uint32)
    return tuple(flat(planes[name]) if name in planes else absent for name in PLANES)
