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
from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, float_to_half, half_to_float, load, store
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
    head_dim = x.shape[3]
    _encode(bit_view(x), bits, group, per_channel, order(bits, head_dim), codes, bit_view(scale), bit_view(minimum))


def decode(codes, scale, minimum, bits, group, per_channel, out) -> None:
    """out : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, written"""
    _decode(codes, bit_view(scale), bit_view(minimum), bits, group, per_channel, order(bits, out.shape[3]),
            bit_view(out))


@numba.njit(parallel=True, **COMPILE)
def _encode(x, bits, group, per_channel, order, codes, scale, minimum):
    batch, kv_heads, tokens, head_dim = x.shape
    qmax = np.float32(2**bits - 1)
    block = group if per_channel else ROWS_PER_TASK             # tokens of one task
    blocks = (tokens + block - 1) // block
    for task in numba.prange(batch * kv_heads * blocks):
        b, h, first = task // (kv_heads * blocks), task // blocks % kv_heads, task % blocks * block
        count = min(block, tokens - first)
        rows = np.empty((count, head_dim), np.float32)
        for t in range(count):
            for d in range(head_dim):
                rows[t, d] = _to_float16(load(x[b, h, first + t, d]))
        low, step, code = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32), np.empty(head_dim, np.uint32)
        if per_channel:
            high = np.empty(head_dim, np.float32)
            _range_over_tokens(rows, low, high)
            for d in range(head_dim):
                low[d], step[d] = _parameters(low[d], high[d], qmax)
                minimum[b, h, first // group, d] = float_to_half(low[d])
                scale[b, h, first // group, d] = float_to_half(step[d])
        for t in range(count):
            if not per_channel:
                for g in range(head_dim // group):
                    smallest, largest = np.float32(np.inf), np.float32(-np.inf)
                    for d in range(g * group, (g + 1) * group):
                        if abs(rows[t, d]) < np.inf:
                            smallest, largest = min(smallest, rows[t, d]), max(largest, rows[t, d])
                    smallest, largest = _parameters(smallest, largest, qmax)
                    minimum[b, h, first + t, g] = float_to_half(smallest)
                    scale[b, h, first + t, g] = float_to_half(largest)
                    low[g * group : (g + 1) * group] = smallest
                    step[g * group : (g + 1) * group] = largest
            _assign(rows[t], low, step, qmax, code)
            _pack(code, bits, order, codes[b, h, first + t])


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
    count, field, channel = len(words), 0, 0
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
def _load_parameters(scale, minimum, group, per_channel, order, step, low):
    """s and m of every channel, in `order`, from one row of the arrays."""
    for i in range(len(order)):
        source = order[i] if per_channel else order[i] // group
        step[i], low[i] = half_to_float(scale[source]), half_to_float(minimum[source])


@numba.njit(parallel=True, **COMPILE)
def _decode(codes, scale, minimum, bits, group, per_channel, order, out):
    batch, kv_heads, tokens, head_dim = out.shape
    blocks = (tokens + TILE - 1) // TILE
    for task in numba.prange(batch * kv_heads * blocks):
        b, h, first = task // (kv_heads * blocks), task // blocks % kv_heads, task % blocks * TILE
        row, step, low = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        for t in range(first, min(first + TILE, tokens)):
            if t == first or not per_channel:
                place = t // group if per_channel else t
                _load_parameters(scale[b, h, place], minimum[b, h, place], group, per_channel, order, step, low)
            _unpack(codes[b, h, t], bits, row)
            for i in range(head_dim):
                out[b, h, t, order[i]] = store(np.float32(step[i] * row[i]) + low[i], out)     # the product is exact


# --- Logits and attention --------------------------------------------------------------------------------------------


def logits(query, codes, scale, minimum, bits, group, out) -> None:
    """query : [batch, q_heads, head_dim] float32, times the scale of the logits     out : [batch, q_heads, tokens]"""
    channels = order(bits, query.shape[2])
    _logits(np.ascontiguousarray(query[..., channels]), codes, bit_view(scale), bit_view(minimum), bits, group,
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
    sides = [(codes, bit_view(scale), bit_view(minimum), bits, group, order(bits, head_dim))
             for codes, scale, minimum, bits, group in (keys, values)]
    _decode_attention(np.ascontiguousarray(query[..., sides[0][-1]]), *sides[0], *sides[1], lengths, outputs, lses)
    merge(outputs, lses, out, np.empty(lses.shape[1:], np.float32) if lse is None else lse)


@numba.njit(parallel=True, **COMPILE_SUMS)
def _logits(query, codes, scale, minimum, bits, group, order, out):
    batch, q_heads, head_dim = query.shape
    kv_heads, tokens = codes.shape[1], codes.shape[2]
    heads, tiles = q_heads // kv_heads, (tokens + TILE - 1) // TILE
    for task in numba.prange(batch * kv_heads * tiles):
        b, g, first = task // (kv_heads * tiles), task // tiles % kv_heads, task % tiles * TILE
        step, low = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        rows, products = np.empty((TILE, head_dim), np.float32), np.empty((heads, TILE), np.float32)
        _load_parameters(scale[b, g, first // group], minimum[b, g, first // group], group, True, order, step, low)
        _key_products(query[b, g * heads : (g + 1) * heads], codes[b, g, first : first + TILE], bits, step, low, rows,
                      products)
        out[b, g * heads : (g + 1) * heads, first : first + TILE] = products


@numba.njit(**COMPILE_SUMS)
def _key_products(query, codes, bits, step, low, rows, products):
    """products[h, t] = <query_h, s c_t + m> of the tokens of a tile, which lie in one group."""
    for t in range(len(codes)):
        row = rows[t]
        _unpack(codes[t], bits, row)
        for i in range(len(row)):
            row[i] = row[i] * step[i] + low[i]
        for h in range(len(query)):
            q, total = query[h], np.float32(0)
            for i in range(len(row)):
                total += q[i] * row[i]
            products[h, t] = total


@numba.njit(parallel=True, **COMPILE_SUMS)
def _decode_attention(query, key_codes, key_scale, key_minimum, key_bits, key_group, key_order, value_codes,
                      value_scale, value_minimum, value_bits, value_group, value_order, lengths, outputs, lses):
    batch, q_heads, head_dim = query.shape
    kv_heads, splits = key_codes.shape[1], outputs.shape[0]
    heads = q_heads // kv_heads
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
            count, place = min(TILE, last - start), start // key_group
            _load_parameters(key_scale[b, g, place], key_minimum[b, g, place], key_group, True, key_order, step, low)
            _key_products(query[b, g * heads : (g + 1) * heads], key_codes[b, g, start : start + count], key_bits, step,
                          low, rows, weights)
            for h in range(heads):
                _weigh(weights[h, :count], largest, total, output, h)
            for t in range(count):
                row = rows[t]
                _load_parameters(value_scale[b, g, start + t], value_minimum[b, g, start + t], value_group, False,
                                 value_order, step, low)
                _unpack(value_codes[b, g, start + t], value_bits, row)
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
def _weigh(weights, largest, total, output, h):
    """weights <- exp(logits - the largest so far) of one head, whose sums are rescaled to it."""
    new = largest[h]
    for t in range(len(weights)):
        if not weights[t] <= new:               # NaN is taken over, and stays
            new = weights[t]
    factor = np.exp(largest[h] - new) if largest[h] > -np.inf else np.float32(0)
    largest[h] = new
    sums = output[h]
    for i in range(len(sums)):
        sums[i] *= factor
    part = np.float32(0)
    for t in range(len(weights)):
        weights[t] = np.exp(weights[t] - new) if new > -np.inf or np.isnan(new) else np.float32(0)
        part += weights[t]
    total[h] = total[h] * factor + part
