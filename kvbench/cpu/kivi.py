"""KIVI on the CPU.  Reference: reference/kivi.py, which also says where the bits of a code lie.

What the functions share:

    codes            [batch, kv_heads, tokens, words] uint32, words = head_dim bits / 32
    scale, minimum   float16: per channel, of keys, [batch, kv_heads, tokens / group, head_dim];
                     per token, of values, [batch, kv_heads, tokens, head_dim / group]
    per_channel      whether they are the former

All of them may have any strides over sequences and heads; rows are contiguous.  Arithmetic is float32.

Words are taken apart field by field: field f of half h of all words of a row, which are neighbours in memory, makes
head_dim / (32 / bits) neighbours of an unpacked row.  That order of the channels, `order`, is undone once per result.
"""
from __future__ import annotations

import functools

import numba
import numpy as np

from kvbench.cpu.attention import merge
from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, flat, float_to_half, half_to_float, load, store, strides_of
from kvbench.cpu.convert import bits as bit_view
from kvbench.reference.kivi import places

LARGEST = np.float32(65504)           # of float16
TILE = 32                             # tokens whose logits are held at a time: within one group of keys
TOKENS_PER_TASK = 1024                # one task of attention is a (sequence, KV head, split of this many tokens)
ROWS_PER_TASK = 64                    # vectors encoded or decoded by one task, where they do not depend on each other


@functools.cache
def order(bits: int, head_dim: int) -> np.ndarray:
    """[head_dim] int64: the channels in the order in which `_unpack` gives them."""
    word, bit = places(bits, head_dim)
    return np.lexsort((word, bit))


# --- Encode and decode -----------------------------------------------------------------------------------------------


def encode(x, bits, group, per_channel, codes, scale, minimum) -> None:
    """x : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32; the others are written"""
    batch, kv_heads, tokens, head_dim = x.shape
    _encode(flat(bit_view(x)), strides_of(x)[:3], batch, kv_heads, tokens, bits, group, per_channel,
            order(bits, head_dim), *_side(codes, scale, minimum))


def decode(codes, scale, minimum, bits, group, per_channel, out) -> None:
    """out : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, written"""
    _decode(*_side(codes, scale, minimum), bits, group, per_channel, order(bits, out.shape[3]), bit_view(out))


def _side(codes, scale, minimum):
    """As kernels take them: in one dimension each, whatever the strides of sequences and heads, and these strides."""
    return (flat(codes), strides_of(codes)[:2], flat(bit_view(scale)), flat(bit_view(minimum)), strides_of(scale)[:2])


@numba.njit(parallel=True, **COMPILE)
def _encode(x, x_strides, batch, kv_heads, tokens, bits, group, per_channel, order, codes, strides, scale, minimum,
            scale_strides):
    head_dim = len(order)
    words = head_dim * bits // 32
    qmax = np.float32(2**bits - 1)
    block = group if per_channel else ROWS_PER_TASK             # tokens of one task
    blocks = (tokens + block - 1) // block
    for task in numba.prange(batch * kv_heads * blocks):
        b, h, first = task // (kv_heads * blocks), task // blocks % kv_heads, task % blocks * block
        count = min(block, tokens - first)
        rows = np.empty((count, head_dim), np.float32)
        row_start = b * strides[0] + h * strides[1] + first * words
        group_start = b * scale_strides[0] + h * scale_strides[1]
        for t in range(count):
            start = b * x_strides[0] + h * x_strides[1] + (first + t) * x_strides[2]
            source = x[start : start + head_dim]
            for d in range(head_dim):
                rows[t, d] = _to_float16(load(source[d]))
        low, step, code = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32), np.empty(head_dim, np.uint32)
        if per_channel:
            high = np.empty(head_dim, np.float32)
            _range_over_tokens(rows, low, high)
            for d in range(head_dim):
                low[d], step[d] = _parameters(low[d], high[d], qmax)
                minimum[group_start + first // group * head_dim + d] = float_to_half(low[d])
                scale[group_start + first // group * head_dim + d] = float_to_half(step[d])
        for t in range(count):
            if not per_channel:
                for g in range(head_dim // group):
                    smallest, largest = np.float32(np.inf), np.float32(-np.inf)
                    for d in range(g * group, (g + 1) * group):
                        if abs(rows[t, d]) < np.inf:
                            smallest, largest = min(smallest, rows[t, d]), max(largest, rows[t, d])
                    smallest, largest = _parameters(smallest, largest, qmax)
                    minimum[group_start + (first + t) * (head_dim // group) + g] = float_to_half(smallest)
                    scale[group_start + (first + t) * (head_dim // group) + g] = float_to_half(largest)
                    low[g * group : (g + 1) * group] = smallest
                    step[g * group : (g + 1) * group] = largest
            _assign(rows[t], low, step, qmax, code)
            _pack(code, bits, order, codes[row_start + t * words : row_start + (t + 1) * words])


@numba.njit(**COMPILE)
def _to_float16(value):
    """Rounded to float16, in float32; finite numbers saturate."""
    if abs(value) < np.inf:
        value = min(max(value, -LARGEST), LARGEST)
    return half_to_float(float_to_half(value))


@numba.njit(**COMPILE)
def _range_over_tokens(rows, low, high):
    """Least and greatest finite number of every column; inf and -inf without one."""
    low[:] = np.inf
    high[:] = -np.inf
    for t in range(rows.shape[0]):
        row = rows[t]
        for d in range(rows.shape[1]):
            is_finite = abs(row[d]) < np.inf
            low[d] = row[d] if is_finite and row[d] < low[d] else low[d]
            high[d] = row[d] if is_finite and row[d] > high[d] else high[d]


@numba.njit(**COMPILE)
def _parameters(low, high, qmax):
    """(m, s) of a group, in float32: a zero is +0, s is rounded to float16."""
    if low > high:                              # no number is finite
        return np.float32(0), np.float32(0)
    difference = np.float32(high - low)
    return np.float32(low + np.float32(0)), half_to_float(float_to_half(np.float32(difference / qmax)))


@numba.njit(**COMPILE)
def _assign(row, low, step, qmax, code):
    """Codes of a row; 0 where s is 0, and for NaN."""
    for d in range(len(row)):
        quotient = np.float32(row[d] - low[d]) / step[d]
        quotient = quotient if quotient > 0 else np.float32(0)              # NaN is not, either
        quotient = quotient if quotient < qmax else qmax
        code[d] = np.uint32(np.rint(quotient)) if step[d] > 0 else np.uint32(0)


@numba.njit(**COMPILE)
def _pack(code, bits, order, words):
    """The inverse of `_unpack`."""
    count, channel = len(words), 0
    words[:] = 0
    for half in range(2):
        for f in range(16 // bits):
            shift = np.uint32(16 * half + bits * f)
            for w in range(count):
                words[w] = np.uint32(words[w] | np.uint32(code[order[channel + w]] << shift))
            channel += count


@numba.njit(**COMPILE)
def _unpack(words, bits, row):
    """row <- the codes of one token, in `order`."""
    count, first, mask = len(words), 0, np.uint32(2**bits - 1)
    for half in range(2):
        for f in range(16 // bits):
            shift = np.uint32(16 * half + bits * f)
            target = row[first : first + count]
            for w in range(count):
                target[w] = np.float32(np.int32(np.uint32(np.uint32(words[w] >> shift) & mask)))
            first += count


@numba.njit(**COMPILE)
def _load_parameters(scale, minimum, start, token, group, per_channel, order, step, low):
    """s and m of every channel of a token, in `order`; start : of its head"""
    head_dim = len(order)
    start += token // group * head_dim if per_channel else token * (head_dim // group)
    for i in range(head_dim):
        source = start + (order[i] if per_channel else order[i] // group)
        step[i], low[i] = half_to_float(scale[source]), half_to_float(minimum[source])


@numba.njit(parallel=True, **COMPILE)
def _decode(codes, strides, scale, minimum, scale_strides, bits, group, per_channel, order, out):
    batch, kv_heads, tokens, head_dim = out.shape
    words = head_dim * bits // 32
    blocks = (tokens + TILE - 1) // TILE
    for task in numba.prange(batch * kv_heads * blocks):
        b, h, first = task // (kv_heads * blocks), task // blocks % kv_heads, task % blocks * TILE
        row, step, low = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        for t in range(first, min(first + TILE, tokens)):
            if t == first or not per_channel:
                _load_parameters(scale, minimum, b * scale_strides[0] + h * scale_strides[1], t, group, per_channel,
                                 order, step, low)
            start = b * strides[0] + h * strides[1] + t * words
            _unpack(codes[start : start + words], bits, row)
            for i in range(head_dim):
                out[b, h, t, order[i]] = store(np.float32(step[i] * row[i]) + low[i], out)     # the product is exact


# --- Logits and attention --------------------------------------------------------------------------------------------


def logits(query, codes, scale, minimum, bits, group, out) -> None:
    """query : [batch, q_heads, head_dim] float32, times the scale of the logits     out : [batch, q_heads, tokens]"""
    channels = order(bits, query.shape[2])
    _logits(np.ascontiguousarray(query[..., channels]), codes.shape[1], *_side(codes, scale, minimum), bits, group,
            channels, out)


def decode_attention(query, keys, values, lengths, out, lse) -> None:
    """One decode step of attention.

    query        : [batch, q_heads, head_dim] float32, times the scale of the logits
    keys, values : (codes, scale, minimum, bits, group)
    lengths      : [batch] int32, from 0 to tokens
    out          : [batch, q_heads, head_dim], any float dtype          lse : [batch, q_heads] float32, or None
    """
    batch, q_heads, head_dim = query.shape
    splits = max(-(-keys[0].shape[2] // TOKENS_PER_TASK), 1)
    outputs = np.zeros((splits, batch, q_heads, head_dim), np.float32)
    lses = np.full((splits, batch, q_heads), -np.inf, np.float32)
    sides = [(*_side(codes, scale, minimum), bits, group, order(bits, head_dim))
             for codes, scale, minimum, bits, group in (keys, values)]
    _decode_attention(np.ascontiguousarray(query[..., sides[0][-1]]), keys[0].shape[1], *sides[0], *sides[1], lengths,
                      outputs, lses)
    merge(outputs, lses, out, np.empty(lses.shape[1:], np.float32) if lse is None else lse)


@numba.njit(parallel=True, **COMPILE_SUMS)
def _logits(query, kv_heads, codes, strides, scale, minimum, scale_strides, bits, group, order, out):
    batch, q_heads, head_dim = query.shape
    tokens, words = out.shape[2], head_dim * bits // 32
    heads, tiles = q_heads // kv_heads, (tokens + TILE - 1) // TILE
    for task in numba.prange(batch * kv_heads * tiles):
        b, g, first = task // (kv_heads * tiles), task // tiles % kv_heads, task % tiles * TILE
        step, low = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        rows, products = np.empty((TILE, head_dim), np.float32), np.empty((heads, TILE), np.float32)
        _load_parameters(scale, minimum, b * scale_strides[0] + g * scale_strides[1], first, group, True, order, step,
                         low)
        start = b * strides[0] + g * strides[1] + first * words
        _key_products(query[b, g * heads : (g + 1) * heads], codes[start : start + TILE * words], TILE, bits, step, low,
                      rows, products)
        out[b, g * heads : (g + 1) * heads, first : first + TILE] = products


@numba.njit(**COMPILE_SUMS)
def _key_products(query, codes, count, bits, step, low, rows, products):
    """products[h, t] = <query_h, s c_t + m> of `count` tokens of a tile, which lie in one group."""
    words = len(codes) // count
    for t in range(count):
        row = rows[t]
        _unpack(codes[t * words : (t + 1) * words], bits, row)
        for i in range(len(row)):
            row[i] = row[i] * step[i] + low[i]
        for h in range(len(query)):
            q, total = query[h], np.float32(0)
            for i in range(len(row)):
                total += q[i] * row[i]
            products[h, t] = total


@numba.njit(parallel=True, **COMPILE_SUMS)
def _decode_attention(query, kv_heads, key_codes, key_strides, key_scale, key_minimum, key_scale_strides, key_bits,
                      key_group, key_order, value_codes, value_strides, value_scale, value_minimum,
                      value_scale_strides, value_bits, value_group, value_order, lengths, outputs, lses):
    batch, q_heads, head_dim = query.shape
    splits, heads = outputs.shape[0], q_heads // kv_heads
    key_words, value_words = head_dim * key_bits // 32, head_dim * value_bits // 32
    for task in numba.prange(batch * kv_heads * splits):
        b, g, split = task // (kv_heads * splits), task // splits % kv_heads, task % splits
        first, last = split * TOKENS_PER_TASK, min((split + 1) * TOKENS_PER_TASK, lengths[b])
        if first >= last:
            continue
        step, low = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        rows, weights = np.empty((TILE, head_dim), np.float32), np.empty((heads, TILE), np.float32)
        largest, total = np.full(heads, -np.inf, np.float32), np.zeros(heads, np.float32)
        output = np.zeros((heads, head_dim), np.float32)
        for start in range(first, last, TILE):
            count = min(TILE, last - start)
            _load_parameters(key_scale, key_minimum, b * key_scale_strides[0] + g * key_scale_strides[1], start,
                             key_group, True, key_order, step, low)
            row_start = b * key_strides[0] + g * key_strides[1] + start * key_words
            _key_products(query[b, g * heads : (g + 1) * heads], key_codes[row_start : row_start + count * key_words],
                          count, key_bits, step, low, rows, weights)
            for h in range(heads):
                _weigh(weights[h], count, largest, total, output, h)
            for t in range(count):
                row = rows[t]
                _load_parameters(value_scale, value_minimum, b * value_scale_strides[0] + g * value_scale_strides[1],
                                 start + t, value_group, False, value_order, step, low)
                row_start = b * value_strides[0] + g * value_strides[1] + (start + t) * value_words
                _unpack(value_codes[row_start : row_start + value_words], value_bits, row)
                for i in range(head_dim):
                    row[i] = row[i] * step[i] + low[i]
                for h in range(heads):
                    sums, weight = output[h], weights[h, t]
                    for i in range(head_dim):
                        sums[i] += weight * row[i]
        for h in range(heads):
            inverse = np.float32(1) / total[h] if total[h] != 0 else np.float32(0)
            for i in range(head_dim):
                outputs[split, b, g * heads + h, value_order[i]] = output[h, i] * inverse
            lses[split, b, g * heads + h] = largest[h] + np.log(total[h])


@numba.njit(**COMPILE_SUMS)
def _weigh(weights, count, largest, total, output, h):
    """weights <- exp(logits - the largest so far) of `count` tokens and one head, whose sums are rescaled to it."""
    new = largest[h]
    for t in range(count):
        if not weights[t] <= new:               # NaN is taken over, and stays
            new = weights[t]
    factor = np.exp(largest[h] - new) if largest[h] > -np.inf else np.float32(0)
    largest[h] = new
    sums = output[h]
    for i in range(len(sums)):
        sums[i] *= factor
    part = np.float32(0)
    for t in range(count):
        weights[t] = np.exp(weights[t] - new) if new > -np.inf or np.isnan(new) else np.float32(0)
        part += weights[t]
    total[h] = total[h] * factor + part
