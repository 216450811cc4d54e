"""Self-Indexing on the CPU.  Reference: reference/self_indexing.py, which also says where the bits of a code lie.

What the functions share:

    sign, codes      [batch, kv_heads, tokens, words] uint32, of keys; codes are those of the magnitudes
    scale, minimum   [batch, kv_heads, tokens, head_dim / 32] float16
    mean             [batch, kv_heads, head_dim] float32, mu        channel_scale : likewise, alpha
    codebook         [batch, kv_heads, head_dim / 4, 16, 4] float32

Arrays of tokens may have any strides over sequences and heads; the tokens of a head follow one another without gaps.
Arithmetic is float32, but for sums over the tokens of a prompt, which are float64.
"""
from __future__ import annotations

import functools

import numba
import numpy as np

from kvbench.cpu.attention import merge
from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, flat, float_to_half, half_to_float, strides_of
from kvbench.cpu.convert import bits as bit_view
from kvbench.reference import kivi

LARGEST = np.float32(65504)           # of float16
INFINITY = np.float32(np.inf)
GROUP = 32                            # channels that share a scale
TOKENS_PER_TASK = 256                 # of encoding and of attention
SCORES_PER_TASK = 4096
TOKENS_PER_CHUNK = 16384              # of all heads of a sequence that are held in float32 at a time


@functools.cache
def places(bits: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(word, bit) of the code of every channel in a row of `kivi.pack`, int64 [head_dim] each."""
    words = kivi.pack(np.eye(head_dim, dtype=np.uint8), bits)
    word = words.argmax(axis=1)
    return word, np.log2(words[np.arange(head_dim), word]).astype(np.int64)


# --- What a prompt fixes, and codes ----------------------------------------------------------------------------------


def build_codebook(keys, mean, stored, codebook) -> None:
    """keys : [batch, kv_heads, tokens, head_dim]        stored : [batch, kv_heads, tokens] bool, what enters
    codebook : written"""
    for b in range(len(keys)):
        _build_codebook(keys[b].astype(np.float32, order="C"), mean[b], stored[b], codebook[b])


def encode(x, mean, channel_scale, sign, codes, scale, minimum) -> None:
    """x : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32; sign and what follows are written"""
    batch, kv_heads, tokens, head_dim = x.shape
    inverse, strides, chunk = np.float32(1) / channel_scale, _in_tokens(sign), -(-TOKENS_PER_CHUNK // max(kv_heads, 1))
    store = flat(sign), flat(codes), flat(bit_view(scale)), flat(bit_view(minimum))
    for b in range(batch):
        for first in range(0, tokens, chunk):
            part = x[b, :, first : first + chunk].astype(np.float32, order="C")
            _encode(part, mean[b], inverse[b], *places(2, head_dim), *store, b * strides[0] + first, strides[1])


def _in_tokens(array):
    """Strides of sequences and heads, in tokens, of an array whose tokens follow one another."""
    row = array.shape[3]
    return tuple(stride // row for stride in strides_of(array)[:2])


@numba.njit(**COMPILE)
def _centre(x, mean, row):
    """row <- x - mean; returns whether all of it is finite."""
    finite = True
    for d in range(len(row)):
        row[d] = x[d] - mean[d]
        finite &= abs(row[d]) < INFINITY
    return finite


@numba.njit(parallel=True, **COMPILE)
def _build_codebook(x, mean, stored, codebook):
    """Of one sequence, x float32."""
    kv_heads, tokens, head_dim = x.shape
    groups = head_dim // 4
    for h in numba.prange(kv_heads):
        row = np.empty(head_dim, np.float32)
        sums, sizes, counts = np.zeros((groups, 16, 4)), np.zeros(head_dim), np.zeros((groups, 16), np.int64)
        number = 0
        for t in range(tokens):
            if not stored[h, t] or not _centre(x[h, t], mean[h], row):
                continue
            number += 1
            for g in range(groups):
                code = 0
                for i in range(4):
                    code |= np.int64(row[4 * g + i] >= 0) << i
                    sizes[4 * g + i] += abs(row[4 * g + i])
                counts[g, code] += 1
                for i in range(4):
                    sums[g, code, i] += row[4 * g + i]
        for g in range(groups):
            for c in range(16):
                for i in range(4):
                    if counts[g, c] > 0:
                        centroid = sums[g, c, i] / counts[g, c]
                    else:
                        centroid = (1 if c >> i & 1 else -1) * sizes[4 * g + i] / max(number, 1)
                    codebook[h, g, c, i] = centroid


@numba.njit(parallel=True, **COMPILE)
def _encode(x, mean, inverse, word_of, bit_of, sign, codes, scale, minimum, place, head_stride):
    """Some tokens of one sequence, x float32, whose first one has the row `place` of the store."""
    kv_heads, tokens, head_dim = x.shape
    blocks, words, code_words, groups = -(-tokens // TOKENS_PER_TASK), head_dim // 32, head_dim // 16, head_dim // GROUP
    for task in numba.prange(kv_heads * blocks):
        h, first = task // blocks, task % blocks * TOKENS_PER_TASK
        row, packed = np.empty(head_dim, np.float32), np.empty(code_words, np.uint32)
        for t in range(first, min(first + TOKENS_PER_TASK, tokens)):
            at = place + h * head_stride + t
            finite = _centre(x[h, t], mean[h], row)
            packed[:] = 0
            for w in range(words):
                word = np.uint32(0)
                for i in range(32):
                    word = np.uint32(word | np.uint32(np.uint32(row[32 * w + i] >= 0) << i))
                sign[at * words + w] = word if finite else np.uint32(0)
            for d in range(head_dim):
                magnitude = min(abs(row[d]) * inverse[h, d], LARGEST) if finite else np.float32(0)
                row[d] = half_to_float(float_to_half(magnitude))
            for g in range(groups):
                low, high = row[g * GROUP], row[g * GROUP]
                for d in range(g * GROUP, (g + 1) * GROUP):
                    low, high = min(low, row[d]), max(high, row[d])
                half = float_to_half((high - low) / np.float32(3))
                step = half_to_float(half)
                scale[at * groups + g], minimum[at * groups + g] = half, float_to_half(low)
                for d in range(g * GROUP, (g + 1) * GROUP):
                    y = row[d] - low
                    if y > np.float32(0.5) * step and step > 0:           # no division: claim "operands"
                        code = 1 + np.int64(y >= np.float32(1.5) * step) + np.int64(y > np.float32(2.5) * step)
                        packed[word_of[d]] |= np.uint32(code << bit_of[d])
            for w in range(code_words):
                codes[at * code_words + w] = packed[w]


# --- Scores ----------------------------------------------------------------------------------------------------------


def build_tables(query, codebook, own, scale, tables) -> None:
    """own : 1 for the mean of the heads of a KV head, or q_heads / kv_heads: how many tables a KV head has
    tables : [batch, kv_heads own, head_dim / 4, 16] float32, written"""
    _build_tables(query.astype(np.float32), codebook, own, np.float32(scale), tables)


def score(query, sign, codebook, own, scale, lengths, excluded, scores) -> None:
    """lengths : [batch] int32        excluded : [batch, kv_heads, n] int32
    scores : [batch, kv_heads own, tokens] float32, written"""
    batch, kv_heads, groups = codebook.shape[:3]
    tables = np.empty((batch, kv_heads * own, groups, 16), np.float32)
    build_tables(query, codebook, own, scale, tables)
    _score(tables, own, flat(sign).view(np.uint8), _in_tokens(sign), lengths, excluded, scores)


@numba.njit(**COMPILE)
def _build_tables(query, codebook, own, scale, tables):
    batch, kv_heads, groups = codebook.shape[:3]
    group = query.shape[1] // kv_heads
    shared = group // own                                     # query heads that share a table
    q = np.empty(4 * groups, np.float32)
    for b in range(batch):
        for table in range(kv_heads * own):
            for d in range(4 * groups):
                total = np.float32(0)
                for i in range(shared):
                    total += query[b, table * shared + i, d]
                q[d] = total * (scale / np.float32(shared))
            for g in range(groups):
                for c in range(16):
                    centroid = codebook[b, table // own, g, c]
                    total = np.float32(0)
                    for i in range(4):
                        total += centroid[i] * q[4 * g + i]
                    tables[b, table, g, c] = total


@numba.njit(parallel=True, **COMPILE)
def _score(tables, own, sign, places, lengths, excluded, scores):
    """A byte of signs is the codes of two groups: 256 sums of two entries each."""
    batch, heads, groups = tables.shape[:3]
    tokens, pairs = scores.shape[2], groups // 2
    blocks = -(-tokens // SCORES_PER_TASK)
    for task in numba.prange(batch * heads * blocks):
        b, head, first = task // (heads * blocks), task // blocks % heads, task % blocks * SCORES_PER_TASK
        both = np.empty((pairs, 256), np.float32)
        for j in range(pairs):
            for byte in range(256):
                both[j, byte] = tables[b, head, 2 * j, byte & 15] + tables[b, head, 2 * j + 1, byte >> 4]
        last = min(first + SCORES_PER_TASK, tokens)
        start = (b * places[0] + head // own * places[1]) * pairs
        for t in range(first, min(last, lengths[b])):
            total = np.float32(0)
            for j in range(pairs):
                total += both[j, sign[start + t * pairs + j]]
            scores[b, head, t] = total
        for t in range(max(first, lengths[b]), last):
            scores[b, head, t] = -INFINITY
        for i in range(excluded.shape[2]):
            if first <= excluded[b, head // own, i] < last:
                scores[b, head, excluded[b, head // own, i]] = -INFINITY


# --- Attention -------------------------------------------------------------------------------------------------------


def sparse_attention_packed(query, sign, codes, scale, minimum, channel_scale, value_codes, value_scale, value_minimum,
                            bits, indices, counts, lengths, mean, exact_keys, exact_values, exact_lengths, factor, out,
                            lse) -> None:
    """value_codes, value_scale, value_minimum : of values of `bits` bits, [batch, kv_heads, tokens, ...]
    indices : [batch, kv_heads, slots] int32        counts : [batch, kv_heads] int32        lengths : [batch] int32
    mean : as above, or None        exact_keys, exact_values : [batch, kv_heads, exact, head_dim] of query's dtype
    exact_lengths : [batch] int32        factor : of the logits        lse : [batch, q_heads] float32 or None
    """
    batch, q_heads, head_dim = query.shape
    kv_heads = sign.shape[1]
    rows = query.astype(np.float32).reshape(batch, kv_heads, -1, head_dim) * np.float32(factor)
    folded = rows * channel_scale[:, :, None]
    offset = np.zeros(rows.shape[:3], np.float32) if mean is None else (rows * mean[:, :, None]).sum(axis=-1)
    splits = -(-(indices.shape[2] + exact_keys.shape[2]) // TOKENS_PER_TASK) or 1
    outputs = np.zeros((splits, batch, q_heads, head_dim), np.float32)
    lses = np.full((splits, batch, q_heads), -np.inf, np.float32)
    _attend(rows, folded, offset, flat(sign), flat(codes), flat(bit_view(scale)), flat(bit_view(minimum)),
            _in_tokens(sign), flat(value_codes), flat(bit_view(value_scale)), flat(bit_view(value_minimum)),
            _in_tokens(value_codes), *places(2, head_dim), *places(bits, head_dim), bits,
            np.ascontiguousarray(indices), counts, lengths, *(np.ascontiguousarray(x, np.float32)
                                                              for x in (exact_keys, exact_values)),
            exact_lengths, outputs, lses)
    merge(outputs, lses, out, np.empty((batch, q_heads), np.float32) if lse is None else lse)


@numba.njit(**COMPILE)
def _dequantise(codes, scale, minimum, at, bits, word_of, bit_of, row):
    """row <- s c + m of the token `at`"""
    head_dim, mask = len(row), np.uint32((1 << bits) - 1)
    words, groups = head_dim * bits // 32, head_dim // GROUP
    for g in range(groups):
        step, low = half_to_float(scale[at * groups + g]), half_to_float(minimum[at * groups + g])
        for d in range(g * GROUP, (g + 1) * GROUP):
            code = np.uint32(codes[at * words + word_of[d]] >> np.uint32(bit_of[d])) & mask
            row[d] = step * np.float32(code) + low


@numba.njit(parallel=True, **COMPILE_SUMS)
def _attend(rows, folded, offset, sign, codes, scale, minimum, places, value_codes, value_scale, value_minimum,
            value_places, word_of, bit_of, value_word_of, value_bit_of, bits, indices, counts, lengths, exact_keys,
            exact_values, exact_lengths, outputs, lses):
    batch, kv_heads, group, head_dim = rows.shape
    splits, words = outputs.shape[0], head_dim // 32
    for task in numba.prange(batch * kv_heads * splits):
        b, h, split = task // (kv_heads * splits), task // splits % kv_heads, task % splits
        count = counts[b, h]
        first, last = split * TOKENS_PER_TASK, min((split + 1) * TOKENS_PER_TASK, count + exact_lengths[b])
        key, value = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        largest, total = np.full(group, -np.inf, np.float32), np.zeros(group, np.float32)
        output = np.zeros((group, head_dim), np.float32)
        for i in range(first, last):
            if i < count:
                t = indices[b, h, i]
                if t < 0 or t >= lengths[b]:
                    continue
                at = b * places[0] + h * places[1] + t
                _dequantise(codes, scale, minimum, at, 2, word_of, bit_of, key)
                for d in range(head_dim):
                    if not sign[at * words + d // 32] >> np.uint32(d % 32) & np.uint32(1):
                        key[d] = -key[d]
                _dequantise(value_codes, value_scale, value_minimum, b * value_places[0] + h * value_places[1] + t,
                            bits, value_word_of, value_bit_of, value)
            else:
                for d in range(head_dim):
                    key[d], value[d] = exact_keys[b, h, i - count, d], exact_values[b, h, i - count, d]
            for j in range(group):
                logit = np.float32(0)
                if i < count:
                    for d in range(head_dim):
                        logit += folded[b, h, j, d] * key[d]
                    logit += offset[b, h, j]
                else:
                    for d in range(head_dim):
                        logit += rows[b, h, j, d] * key[d]
                if not logit <= largest[j]:                   # NaN is taken over, and stays
                    factor = np.exp(largest[j] - logit) if largest[j] > -np.inf else np.float32(0)
                    largest[j] = logit
                    total[j] *= factor
                    for d in range(head_dim):
                        output[j, d] *= factor
                known = largest[j] > -np.inf or np.isnan(largest[j])
                weight = np.exp(logit - largest[j]) if known else np.float32(0)
                total[j] += weight
                for d in range(head_dim):
                    output[j, d] += weight * value[d]
        for j in range(group):
            inverse = np.float32(1) / total[j] if total[j] != 0 else np.float32(0)
            for d in range(head_dim):
                outputs[split, b, h * group + j, d] = output[j, d] * inverse
            lses[split, b, h * group + j] = largest[j] + np.log(total[j])
