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

Tiles and their arithmetic: kvbench/cpu/tiles.py; the words of codes: kvbench/cpu/planes.py.
"""
from __future__ import annotations

import numba
import numpy as np

from kvbench.cpu.attention import merge
from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, flat, half_to_float, store, strides_of
from kvbench.cpu.convert import bits as bit_view
from kvbench.cpu.planes import (attend_to_tile, both_signs, expand, flat_planes, load_words, pack, scratch, store_words,
                                tile_logits)
from kvbench.cpu.rotation import hadamard
from kvbench.cpu.tiles import (LANES, TILE, TOKENS_PER_TASK, aligned, half_scale, load_row, measure, multiply_rows,
                               place, rotation_steps, store_split, walsh_hadamard, whole)

SCALE_MODES = {"nc": 0, "plain": 1, "mse": 2, "unbiased": 3}
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
    source = flat(bit_view(x)), 0, strides_of(x)[:3], head_dim, no_mean if mean is None else mean
    rotation = rotation_steps(signs, remaining_scale, size)
    code = (np.asarray(boundaries, np.float32), np.asarray(centroids, np.float32), bits, SCALE_MODES[scale_mode],
            flat_planes(planes), flat(bit_view(scale)), strides_of(scale)[:2])
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
            _pack_signs(residual @ prod[0], first, *shape, flat(prod[1]), strides_of(scale)[:2])


@numba.njit(parallel=True, **COMPILE)
def _prepare(x, x_start, x_strides, head_dim, mean, first, kv_heads, tokens, prepared, factors):
    """The rows of x as float32 near 1, padded with zeros: what a dense matrix takes without overflow."""
    for i in numba.prange(len(factors)):
        b, g, t = place(first + i, kv_heads, tokens)
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
            b, g, t = place(begin + i, kv_heads, tokens)
            token[i] = b * strides[0] + g * strides[1] + t
            undo[i] = load_row(x, x_start + b * x_strides[0] + g * x_strides[1] + t * x_strides[2], mean,
                               b * kv_heads + g, row, head_dim)
            if factors.size > 0:
                undo[i] *= factors[begin - first + i]
            for d in range(head_dim):
                y[d, i] = row[d]
        for k in range(rounds):
            multiply_rows(y, signs[k])
            walsh_hadamard(y)
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
            pack(z, code, j, bits, words)
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
                store_words(words, i, planes, token[i], word, size // 32, bits)
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


@numba.njit(parallel=True, **COMPILE)
def _pack_signs(projected, first, kv_heads, tokens, plane, strides):
    rows, size = projected.shape
    for r in numba.prange(rows):
        b, g, t = place(first + r, kv_heads, tokens)
        token = b * strides[0] + g * strides[1] + t
        for word in range(size // 32):
            packed = np.uint32(0)
            for j in range(32):
                if projected[r, 32 * word + j] < 0:
                    packed |= np.uint32(1) << np.uint32(4 * (j & 7) + (j >> 3))
            plane[token * (size // 32) + word] = packed


# --- Decode ----------------------------------------------------------------------------------------------------------


def decode(planes, scale, signs, remaining_scale, centroids, bits, out, *, matrix=None):
    """x_hat = s R^T c.

    signs, remaining_scale : of a randomised Hadamard rotation, or None
    matrix                 : of a dense one, x_hat = (s c) matrix: the transpose of what `encode` takes
    out                    : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, contiguous rows
    """
    batch, kv_heads, tokens, head_dim = out.shape
    rows, shape, size = batch * kv_heads * tokens, (kv_heads, tokens), 32 * planes["sign"].shape[-1]
    code = (flat_planes(planes), flat(bit_view(scale)), strides_of(scale)[:2], both_signs(centroids), bits,
            *rotation_steps(signs, remaining_scale, size))
    target = flat(bit_view(out)), 0, strides_of(out)[:3], head_dim
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
        _decode(flat_planes(planes), flat(bit_view(scale)), strides_of(scale)[:2], both_signs(centroids), bits,
                *rotation_steps(None, None, size), first, count, *shape, result.reshape(-1),
                *_rows(first, size, *shape), size)
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
        _store_rows(result, first, *shape, flat(bit_view(out)), 0, strides_of(out)[:3], head_dim)


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
            b, g, t = place(begin + i, kv_heads, tokens)
            token[i] = b * strides[0] + g * strides[1] + t
        for word in range(size // 32):
            for i in range(used):
                load_words(planes, token[i], 1, word, size // 32, bits, words[:, i:])
            for half in range(2):
                expand(words, half, lanes, bits, centroids, index, y[32 * word + 16 * half :])
        for k in range(rounds):
            walsh_hadamard(y)
            multiply_rows(y, signs[rounds - 1 - k])
        for i in range(used):
            b, g, t = place(begin + i, kv_heads, tokens)
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
        b, g, t = place(first + r, kv_heads, tokens)
        start = out_start + b * out_strides[0] + g * out_strides[1] + t * out_strides[2]
        row, target = rows[r], out[start : start + head_dim]
        for d in range(head_dim):
            target[d] = store(row[d], out)


# --- Logits and attention --------------------------------------------------------------------------------------------


def logits(rotated_query, planes, scale, centroids, bits, out) -> None:
    """out_ht = s_t <q'_h, c_t>.

    rotated_query : [batch, kv_heads, group, D] float32, q' = scale R q
    out           : [batch, q_heads, tokens] float32
    """
    _logits(np.ascontiguousarray(rotated_query), flat_planes(planes), flat(bit_view(scale)), strides_of(scale)[:2],
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
    codes = [(flat_planes(planes), flat(bit_view(scale)), strides_of(scale)[:2], both_signs(centroids),
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
        tile_logits(query[b, g], planes, scale, token, count, centroids, bits, words, index, c, s, products)
        for h in range(group):
            for i in range(count):
                out[b, g * group + h, first + i] = products[h, i]


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
            tile_logits(query[b, g], key_planes, key_scale, b * key_strides[0] + g * key_strides[1] + start, count,
                        key_centroids, key_bits, words, index, c, s, weights)
            attend_to_tile(weights, value_planes, value_scale, b * value_strides[0] + g * value_strides[1] + start,
                           count, value_centroids, value_bits, words, index, c, s, largest, total, output)
        store_split(output, largest, total, outputs[split, b, g * group :], lses[split, b, g * group :])


def _rows(first, size, kv_heads, tokens):
    """Start and strides of [batch, kv_heads, tokens, size] of which memory holds the vectors from `first` on."""
    return -first * size, (kv_heads * tokens * size, tokens * size, size)
