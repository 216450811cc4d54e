"""Block-GTQ on the CPU.  Reference: reference/block_gtq.py; codes and values as in kvbench/cpu/turboquant.py.

What the functions share:

    sign       [batch, kv_heads, tokens, D / 32] uint32
    magnitude  [batch, kv_heads, tokens, words] uint32
    scale      [batch, kv_heads, tokens, scalars] float16, or uint8: one byte, relative to 2^exponents[head]
    tables     `Tables` of the plan, whose groups are whole multiples of 16 coordinates

The three arrays may have any strides over sequences and heads, the same for all of them if counted in tokens; the
tokens of a head follow one another without gaps.  D is a multiple of 32.

A task works on tokens of one head, so that what differs from head to head is looked up once for many tokens.  Tiles
hold one coordinate a row, in rate order, and one token a column.  Rotations are dense and add up in a fixed order:
what a token becomes does not depend on those that are encoded with it.
"""
from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from kvbench.cpu.attention import merge
from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, flat, half_to_float, store, strides_of
from kvbench.cpu.convert import bits as bit_view
from kvbench.cpu.planes import (attend_to_tile, both_signs, expand, flat_planes, load_column, pack_pair, pack_sign,
                                pack_top, scratch)
from kvbench.cpu.tiles import (LANES, TILE, TOKENS_PER_TASK, aligned, half_scale, load_row, measure, multiply,
                               store_split, whole)
from kvbench.cpu.turboquant import SCALE_MODES, assign, scale_factor


class Tables(NamedTuple):
    """A plan as kernels take it, for the KV heads of all sequences or, one after another, those of every sequence.

    order       [kv_heads, D] int32: the coordinate at each place of the rate order
    groups      [kv_heads, scalars, 5] int64: start, size, bits, codebook, first element of the rotation; size 0: none
    segments    [kv_heads, D / 16, 8] int32 of 16 coordinates each: bits, group, codebook, the words of mag2_0, mag2_1,
                mag2_2 and mag1 in the row of magnitudes, and the half of that last word
    rotations   [any] float32: R_g of every size, row by row
    boundaries  [codebooks, 127] float32        centroids : [codebooks, 256] float32, positive ones, then negative
    exponents   [kv_heads] int32, of scalars of one byte
    """

    order: np.ndarray
    groups: np.ndarray
    segments: np.ndarray
    rotations: np.ndarray
    boundaries: np.ndarray
    centroids: np.ndarray
    exponents: np.ndarray


def energies(heads, mean, pairs, out):
    """out[h, i] = mean of |x(i) - mean(i)|^2 over the finite vectors of a head, float64 sums.

    heads : [kv_heads, vectors, head_dim] float32        mean : [kv_heads, head_dim] float32
    pairs : [blocks, 2] int64                            out  : [kv_heads, blocks] float64
    """
    _energies(heads, mean, pairs, out)


@numba.njit(parallel=True, **COMPILE)
def _energies(heads, mean, pairs, out):
    for h in numba.prange(len(heads)):
        sums, count = np.zeros(heads.shape[2], np.float64), 0
        for t in range(heads.shape[1]):
            row, finite = heads[h, t], True
            for d in range(len(row)):
                finite = finite and np.isfinite(row[d])
            if finite:
                count += 1
                for d in range(len(row)):
                    difference = np.float64(row[d]) - np.float64(mean[h, d])
                    sums[d] += difference * difference
        for i in range(len(pairs)):
            out[h, i] = (sums[pairs[i, 0]] + sums[pairs[i, 1]]) / max(count, 1)


def greedy(scores, budget, least, most):
    """Bits of each score, `budget` in all: `reference.block_gtq.allocate`, by exponents and mantissas as there."""
    bits = np.full(len(scores), least, np.uint8)
    _greedy(*np.frexp(scores), budget - least * len(scores), most, bits)
    return bits


@numba.njit(**COMPILE)
def _greedy(mantissas, exponents, rest, most, bits):
    for _ in range(rest):
        best = -1
        for i in range(len(bits)):
            if bits[i] < most and (best < 0 or _gains_more(mantissas, exponents, bits, i, best)):
                best = i
        bits[best] += 1


@numba.njit(**COMPILE)
def _gains_more(mantissas, exponents, bits, i, j):
    """Whether a bit at i does more than one at j: s_i 4^-b_i > s_j 4^-b_j; of two zeros, the one of fewer bits."""
    if mantissas[i] == 0 or mantissas[j] == 0:
        return mantissas[i] > mantissas[j] or (mantissas[i] == mantissas[j] and bits[i] < bits[j])
    one, other = exponents[i] - 2 * np.int64(bits[i]), exponents[j] - 2 * np.int64(bits[j])
    return one > other or (one == other and mantissas[i] > mantissas[j])


# --- Encode ----------------------------------------------------------------------------------------------------------


def encode(x, mean, tables: Tables, scale_mode, sign, magnitude, scale):
    """Permute, rotate by groups, normalise, code and pack: writes sign, magnitude and scale in place.

    x    : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, contiguous rows
    mean : [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, subtracted from x, or None
    """
    batch, kv_heads, tokens, head_dim = x.shape
    centre = np.zeros((0, head_dim), np.float32)
    if mean is not None:
        centre = np.broadcast_to(mean, (batch, kv_heads, head_dim)).astype(np.float32).reshape(-1, head_dim)
    _encode(flat(bit_view(x)), strides_of(x)[:3], x.shape, centre, *tables, SCALE_MODES[scale_mode],
            sign.shape[-1], flat(sign), magnitude.shape[-1], flat(magnitude), scale.shape[-1],
            *_scale_views(scale), _in_tokens(scale))


@numba.njit(parallel=True, **COMPILE)
def _encode(x, x_strides, shape, mean, order, groups, segments, rotations, boundaries, centroids, exponents, mode,
            sign_words, sign, magnitude_words, magnitude, scalars, halves, bytes_, token_strides):
    batch, kv_heads, tokens, size = shape
    chunks = (tokens + LANES - 1) // LANES
    for task in numba.prange(batch * kv_heads * chunks):
        b, h, first = task // (kv_heads * chunks), task // chunks % kv_heads, task % chunks * LANES
        p = (b * kv_heads + h) % len(order)
        used = min(LANES, tokens - first)
        lanes = whole(used)
        ordered, row = aligned(size, lanes), np.empty(size, np.float32)
        undo = np.zeros(lanes, np.float32)
        for i in range(used):
            start = b * x_strides[0] + h * x_strides[1] + (first + i) * x_strides[2]
            undo[i] = load_row(x, start, mean, b * kv_heads + h, row, size)
            for d in range(size):
                ordered[d, i] = row[order[p, d]]
        token = b * token_strides[0] + h * token_strides[1] + first
        signs, rows = np.zeros((sign_words, lanes), np.uint32), np.zeros((magnitude_words, lanes), np.uint32)
        for g in range(scalars):
            _encode_group(ordered, groups[p, g], segments[p], rotations, boundaries, centroids, mode, undo, used, g,
                          token, scalars, halves, bytes_, exponents[p], signs, rows)
        for i in range(used):
            for word in range(sign_words):
                sign[(token + i) * sign_words + word] = signs[word, i]
            for word in range(magnitude_words):
                magnitude[(token + i) * magnitude_words + word] = rows[word, i]


@numba.njit(**COMPILE)
def _encode_group(ordered, group, segments, rotations, boundaries, centroids, mode, undo, used, g, token, scalars,
                  halves, bytes_, exponent, signs, rows):
    """One group of the vectors in the columns of `ordered`: codes to the words `signs` and `rows`, s to its place."""
    start, size, bits, book = group[0], group[1], group[2], group[3]
    lanes = len(undo)
    norm, scaling, power = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32), np.ones(lanes, np.float32)
    inner, energy = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    if size > 0:
        part, y = ordered[start : start + size], aligned(size, lanes)
        _scale_to_one(part, power)
        _rotate(rotations[group[4] : group[4] + size * size].reshape((size, size)), part, y)
        measure(y, np.float32(1), norm, scaling)
        decisions, levels = boundaries[book, : (1 << bits - 1) - 1], centroids[book, : 1 << bits - 1]
        size_of_z, code, c = np.empty(lanes, np.float32), np.empty(lanes, np.uint32), np.empty(lanes, np.float32)
        for d in range(size):
            place, segment = (start + d) & 31, segments[(start + d) >> 4]
            z = y[d]
            assign(z, scaling, decisions, levels, size_of_z, code, c)
            pack_sign(z, place, signs[(start + d) >> 5])
            for pair in range((bits - 1) // 2):
                pack_pair(code, pair, place, rows[segment[3 + pair]])
            if bits % 2 == 0:
                pack_top(code, bits, (place & 15) + 16 * segment[7], rows[segment[6]])
            for i in range(lanes):
                inner[i] += size_of_z[i] * c[i]
                energy[i] += c[i] * c[i]
    for i in range(used):
        s = undo[i] if np.isnan(undo[i]) else np.float32(0)        # groups that a head does not have: 0, or NaN
        if norm[i] > 0:
            s = norm[i] * scale_factor(mode, inner[i] / size, energy[i] / size) * power[i] * undo[i]
        _store_scale(s, (token + i) * scalars + g, halves, bytes_, exponent)


@numba.njit(**COMPILE)
def _scale_to_one(part, power):
    """Columns times powers of two that bring their largest elements near 1; power <- what undoes it."""
    size, lanes = part.shape
    for i in range(lanes):
        largest = np.float32(0)
        for d in range(size):
            largest = max(largest, abs(part[d, i]))
        if largest > 0:
            exponent = min(max(np.int64(np.float32(largest).view(np.uint32) >> 23), 1), 253)
            power[i] = np.uint32(exponent << 23).view(np.float32)
            multiplier = np.uint32((254 - exponent) << 23).view(np.float32)
            for d in range(size):
                part[d, i] *= multiplier


@numba.njit(**COMPILE)
def _rotate(matrix, x, y):
    """y <- matrix x, columns apart: products are added one after another."""
    for d in range(len(y)):
        row, target = matrix[d], y[d]
        target[:] = 0
        for j in range(len(x)):
            _add_multiple(row[j], x[j], target)


@numba.njit(**COMPILE)
def _add_multiple(factor, row, target):
    for i in range(len(target)):
        target[i] += factor * row[i]


@numba.njit(**COMPILE)
def _store_scale(s, place, halves, bytes_, exponent):
    if bytes_.size == 0:
        halves[place] = half_scale(s)
    elif np.isnan(s):
        bytes_[place] = 255
    else:
        code = 0.0
        if s > 0:
            code = np.rint(16 * (np.log2(np.float64(s)) - exponent)) + 128
        bytes_[place] = np.uint8(min(code, 254.0)) if code >= 1 else np.uint8(0)


@numba.njit(**COMPILE)
def _load_scale(place, halves, bytes_, exponent):
    if bytes_.size == 0:
        return half_to_float(halves[place])
    if bytes_[place] == 0 or bytes_[place] == 255:
        return np.float32(0) if bytes_[place] == 0 else np.float32(np.nan)
    return np.float32(2.0 ** ((np.float64(bytes_[place]) - 128) / 16 + exponent))


# --- Decode ----------------------------------------------------------------------------------------------------------


def decode(sign, magnitude, scale, tables: Tables, out):
    """x_hat = P^T blockdiag(s_g R_g^T) c.

    out : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, contiguous rows
    """
    _decode(flat(sign), flat(magnitude), *_scale_views(scale), (sign.shape[-1], magnitude.shape[-1], scale.shape[-1]),
            _in_tokens(scale), *tables, flat(bit_view(out)), strides_of(out)[:3], out.shape)


@numba.njit(parallel=True, **COMPILE)
def _decode(sign, magnitude, halves, bytes_, words, token_strides, order, groups, segments, rotations, boundaries,
            centroids, exponents, out, out_strides, shape):
    batch, kv_heads, tokens, size = shape
    chunks = (tokens + LANES - 1) // LANES
    for task in numba.prange(batch * kv_heads * chunks):
        b, h, first = task // (kv_heads * chunks), task // chunks % kv_heads, task % chunks * LANES
        p = (b * kv_heads + h) % len(order)
        used = min(LANES, tokens - first)
        lanes = whole(used)
        token = b * token_strides[0] + h * token_strides[1] + first
        c, back = aligned(size, lanes), aligned(size, lanes)
        column, index = aligned(8, lanes).view(np.uint32), np.empty(lanes, np.uint32)
        s, row = np.zeros(lanes, np.float32), np.empty(size, np.float32)
        for k in range(size // 16):
            _load_segment(sign, magnitude, words, token, used, segments[p, k], k, column)
            _expand_segment(column, segments[p, k], k, lanes, centroids, index, c[16 * k : 16 * k + 16])
        for g in range(words[2]):
            start, count, offset = groups[p, g, 0], groups[p, g, 1], groups[p, g, 4]
            for i in range(used):
                s[i] = _load_scale((token + i) * words[2] + g, halves, bytes_, exponents[p])
            for d in range(start, start + count):
                back[d, :] = 0
                for j in range(count):
                    _add_multiple(rotations[offset + j * count + d - start], c[start + j], back[d])
                for i in range(lanes):
                    back[d, i] *= s[i]
        for i in range(used):
            for d in range(size):
                row[order[p, d]] = back[d, i]
            begin = b * out_strides[0] + h * out_strides[1] + (first + i) * out_strides[2]
            target = out[begin : begin + size]
            for d in range(size):
                target[d] = store(row[d], out)


@numba.njit(**COMPILE)
def _load_segment(sign, magnitude, words, token, count, segment, k, column):
    """The words of coordinates 16 k .. 16 k + 15 of `count` tokens, as `expand` takes them, to the rows of `column`."""
    half, bits = k & 1, segment[0]
    load_column(sign, token * words[0] + (k >> 1), words[0], count, column[0])
    for pair in range((bits - 1) // 2):
        load_column(magnitude, token * words[1] + segment[3 + pair], words[1], count, column[1 + 2 * pair + half])
    if bits % 2 == 0:
        load_column(magnitude, token * words[1] + segment[6], words[1], count, column[7])
        if segment[7] != half:             # bits of the other half of a word: coordinates 16 apart are 2 bits apart
            for i in range(count):
                moved = column[7, i] >> np.uint32(2) if segment[7] == 1 else np.uint32(column[7, i] << np.uint32(2))
                column[7, i] = np.uint32(moved)


@numba.njit(**COMPILE)
def _expand_segment(column, segment, k, lanes, centroids, index, c):
    bits = segment[0]
    expand(column, k & 1, lanes, bits, centroids[segment[2], : 1 << bits], index, c)


# --- Logits and attention --------------------------------------------------------------------------------------------


def logits(folded_query, sign, magnitude, scale, tables: Tables, out) -> None:
    """out_ht = sum_g s_tg <q'_hg, c_tg>.

    folded_query : [batch, kv_heads, group, D] float32, in rate order and rotated by groups
    out          : [batch, q_heads, tokens] float32
    """
    _logits(np.ascontiguousarray(folded_query), *_keys(sign, magnitude, scale, tables), out)


def decode_attention(folded_query, sign, magnitude, scale, tables: Tables, value_planes, value_scale, value_centroids,
                     lengths, out, lse) -> None:
    """One decode step of attention: the queries folded, the output in the rotated coordinates of the values.

    folded_query : as for `logits`        values : as in `kvbench.cpu.turboquant.decode_attention`
    lengths      : [batch] int32, from 0 to tokens
    out          : [batch, q_heads, D of the values], any float dtype        lse : [batch, q_heads] float32, or None
    """
    batch, kv_heads, group, _ = folded_query.shape
    size = 32 * value_planes["sign"].shape[-1]
    splits = max(-(-scale.shape[2] // TOKENS_PER_TASK), 1)
    outputs = np.zeros((splits, batch, kv_heads * group, size), np.float32)
    lses = np.full((splits, batch, kv_heads * group), -np.inf, np.float32)
    values = (flat_planes(value_planes), flat(bit_view(value_scale)), strides_of(value_scale)[:2],
              both_signs(value_centroids), len(value_centroids).bit_length())
    _decode_attention(np.ascontiguousarray(folded_query), *_keys(sign, magnitude, scale, tables), *values, lengths,
                      outputs, lses)
    merge(outputs, lses, out, np.empty(lses.shape[1:], np.float32) if lse is None else lse)


@numba.njit(parallel=True, **COMPILE_SUMS)
def _logits(query, sign, magnitude, halves, bytes_, words, token_strides, segments, centroids, exponents, out):
    batch, kv_heads, group = query.shape[:3]
    tokens = out.shape[2]
    tiles = (tokens + TILE - 1) // TILE
    for task in numba.prange(batch * kv_heads * tiles):
        b, h, first = task // (kv_heads * tiles), task // tiles % kv_heads, task % tiles * TILE
        p = (b * kv_heads + h) % len(segments)
        count = min(TILE, tokens - first)
        column, index, c, s = scratch()
        products, partial = aligned(group, TILE), aligned(group, TILE)
        token = b * token_strides[0] + h * token_strides[1] + first
        _tile_logits(query[b, h], sign, magnitude, halves, bytes_, words, segments[p], centroids, exponents[p], token,
                     count, column, index, c, s, partial, products)
        for q in range(group):
            for i in range(count):
                out[b, h * group + q, first + i] = products[q, i]


@numba.njit(**COMPILE_SUMS)
def _tile_logits(query, sign, magnitude, halves, bytes_, words, segments, centroids, exponent, token, count, column,
                 index, c, s, partial, products):
    """products[h, i] = sum_g s_ig <query_hg, c_ig> of `count` tokens from `token` on; what follows is not defined."""
    lanes = whole(count)
    products[:, :lanes] = 0
    partial[:, :lanes] = 0
    for k in range(len(segments)):
        _load_segment(sign, magnitude, words, token, count, segments[k], k, column)
        _expand_segment(column, segments[k], k, lanes, centroids, index, c)
        multiply(query, 16 * k, c, lanes, partial)
        if k + 1 == len(segments) or segments[k + 1, 1] != segments[k, 1]:           # the last one of its group
            for i in range(count):
                s[i] = _load_scale((token + i) * words[2] + segments[k, 1], halves, bytes_, exponent)
            for h in range(len(query)):
                for i in range(lanes):
                    products[h, i] += s[i] * partial[h, i]
                    partial[h, i] = 0


@numba.njit(parallel=True, **COMPILE_SUMS)
def _decode_attention(query, sign, magnitude, halves, bytes_, words, token_strides, segments, centroids, exponents,
                      value_planes, value_scale, value_strides, value_centroids, value_bits, lengths, outputs, lses):
    batch, kv_heads, group, _ = query.shape
    splits, size = outputs.shape[0], outputs.shape[3]
    for task in numba.prange(batch * kv_heads * splits):
        b, h, split = task // (kv_heads * splits), task // splits % kv_heads, task % splits
        p = (b * kv_heads + h) % len(segments)
        first, last = split * TOKENS_PER_TASK, min((split + 1) * TOKENS_PER_TASK, lengths[b])
        if first >= last:
            continue
        column, index, c, s = scratch()
        weights, partial = aligned(group, TILE), aligned(group, TILE)
        largest, total = np.full(group, -np.inf, np.float32), np.zeros(group, np.float32)
        output = np.zeros((group, size), np.float32)
        for start in range(first, last, TILE):
            count = min(TILE, last - start)
            _tile_logits(query[b, h], sign, magnitude, halves, bytes_, words, segments[p], centroids, exponents[p],
                         b * token_strides[0] + h * token_strides[1] + start, count, column, index, c, s, partial,
                         weights)
            attend_to_tile(weights, value_planes, value_scale, b * value_strides[0] + h * value_strides[1] + start,
                           count, value_centroids, value_bits, column, index, c, s, largest, total, output)
        store_split(output, largest, total, outputs[split, b, h * group :], lses[split, b, h * group :])


def _keys(sign, magnitude, scale, tables):
    return (flat(sign), flat(magnitude), *_scale_views(scale),
            (sign.shape[-1], magnitude.shape[-1], scale.shape[-1]), _in_tokens(scale), tables.segments,
            tables.centroids, tables.exponents)


def _scale_views(scale):
    """(float16 bits, bytes) of the scalars in one dimension, the other one empty."""
    if scale.dtype == np.uint8:
        return np.empty(0, np.uint16), flat(scale)
    return flat(bit_view(scale)), np.empty(0, np.uint8)


def _in_tokens(scale):
    """Strides of sequences and heads, in tokens."""
    return tuple(stride // scale.shape[-1] for stride in strides_of(scale)[:2])
