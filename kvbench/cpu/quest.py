"""Quest on the CPU.  Reference: reference/quest.py."""
from __future__ import annotations

import numba
import numpy as np

from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, flat, load, store, strides_of
from kvbench.cpu.convert import bits as bit_view

PAGES_PER_TASK = 64


def encode(keys, page, lengths, low, high) -> None:
    """Writes the least and the largest keys of every page; NaN where it has no number.

    keys      : [batch, kv_heads, tokens, head_dim], any strides        lengths : [batch] int32
    low, high : [batch, kv_heads, pages, head_dim], the dtype of the keys, any strides
    """
    _encode(flat(bit_view(keys)), strides_of(keys)[:3], page, lengths, flat(bit_view(low)), strides_of(low)[:3],
            flat(bit_view(high)), strides_of(high)[:3], low.shape)


@numba.njit(parallel=True, **COMPILE)
def _encode(keys, key_strides, page, lengths, low, low_strides, high, high_strides, shape):
    batch, kv_heads, pages, head_dim = shape
    splits = (pages + PAGES_PER_TASK - 1) // PAGES_PER_TASK
    for task in numba.prange(batch * kv_heads * splits):
        b, h, split = task // (kv_heads * splits), task // splits % kv_heads, task % splits
        least, largest = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        for g in range(split * PAGES_PER_TASK, min((split + 1) * PAGES_PER_TASK, pages)):
            least[:], largest[:] = np.inf, -np.inf
            for t in range(g * page, min((g + 1) * page, lengths[b])):
                start = b * key_strides[0] + h * key_strides[1] + t * key_strides[2]
                _include(keys[start : start + head_dim], least, largest)
            start = b * low_strides[0] + h * low_strides[1] + g * low_strides[2]
            to_low = low[start : start + head_dim]
            start = b * high_strides[0] + h * high_strides[1] + g * high_strides[2]
            to_high = high[start : start + head_dim]
            for d in range(head_dim):
                empty = least[d] > largest[d]
                to_low[d] = store(np.float32(np.nan) if empty else least[d], low)
                to_high[d] = store(np.float32(np.nan) if empty else largest[d], high)


@numba.njit(**COMPILE)
def _include(key, least, largest):
    """NaN compares as false: it changes nothing."""
    for d in range(len(key)):
        x = load(key[d]) + np.float32(0)               # both zeros are +0
        least[d] = x if x < least[d] else least[d]
        largest[d] = x if x > largest[d] else largest[d]


def score(query, low, high, page, lengths, scale, per_token, out) -> None:
    """out <- scale (<q+, M> + <q-, m>), -inf from the end of a sequence on.

    query : [batch, q_heads, head_dim]        low, high : [batch, kv_heads, pages, head_dim]        lengths : [batch]
    out   : [batch, q_heads, pages] float32, or `per_token` [batch, q_heads, tokens]
    """
    _score(query.astype(np.float32), flat(bit_view(low)), strides_of(low)[:3], flat(bit_view(high)),
           strides_of(high)[:3], low.shape, page, lengths, np.float32(scale), page if per_token else 1, out)


@numba.njit(parallel=True, **COMPILE_SUMS)
def _score(query, low, low_strides, high, high_strides, shape, page, lengths, scale, wide, out):
    """wide : slots of a page in out"""
    batch, kv_heads, pages, head_dim = shape
    group, slots = query.shape[1] // kv_heads, out.shape[2]
    splits = (pages + PAGES_PER_TASK - 1) // PAGES_PER_TASK
    for task in numba.prange(batch * kv_heads * splits):
        b, h, split = task // (kv_heads * splits), task // splits % kv_heads, task % splits
        least, largest = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        for g in range(split * PAGES_PER_TASK, min((split + 1) * PAGES_PER_TASK, pages)):
            present = g * page < lengths[b]
            if present:
                start = b * low_strides[0] + h * low_strides[1] + g * low_strides[2]
                _load_row(low[start : start + head_dim], least)
                start = b * high_strides[0] + h * high_strides[1] + g * high_strides[2]
                _load_row(high[start : start + head_dim], largest)
            for i in range(h * group, (h + 1) * group):
                bound = scale * _bound(query[b, i], least, largest) if present else np.float32(-np.inf)
                for slot in range(g * wide, min((g + 1) * wide, slots)):
                    beyond = slot * (page // wide) >= lengths[b]
                    out[b, i, slot] = np.float32(-np.inf) if beyond else bound


@numba.njit(**COMPILE)
def _load_row(stored, row):
    for d in range(len(row)):
        row[d] = load(stored[d])


@numba.njit(**COMPILE_SUMS)
def _bound(q, least, largest):
    total = np.float32(0)
    for d in range(len(q)):
        positive, negative = max(q[d], np.float32(0)), min(q[d], np.float32(0))
        total += positive * largest[d] + negative * least[d]
    return total
