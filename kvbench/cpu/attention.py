"""Exact decode attention on the CPU.  Reference: reference/attention.py."""
from __future__ import annotations

import numba
import numpy as np

from kvbench.cpu.convert import COMPILE, COMPILE_SUMS, bits, load, store

TILE = 64                 # tokens whose logits are held at a time
TOKENS_PER_TASK = 1024    # one task is a (sequence, KV head, split of this many tokens)


def decode(query, keys, values, lengths, scale, earlier, out, lse) -> None:
    """query, out : [batch, q_heads, head_dim]   keys, values : [batch, kv_heads, tokens, head_dim], any strides
    lengths : [batch] int32, or None for all tokens   lse : [batch, q_heads] float32 or None
    earlier : (output, lse) float32 of other tokens, or None
    out : query's dtype or float32
    """
    batch, kv_heads, tokens, _ = keys.shape
    counts = np.full(batch, tokens, np.int32) if lengths is None else lengths
    none = np.broadcast_to(np.zeros(1, np.int32), (batch, kv_heads))
    _attend(query, keys, values, np.empty((batch, kv_heads, 0), np.int32), none, counts, tokens, counts, scale,
            earlier, out, lse)


def sparse_attention(query, keys, values, indices, counts, lengths, first, leading, scale, out, lse) -> None:
    """indices : [batch, lists, slots] int32   counts : [batch, lists] int32   lengths, leading : [batch] int32
    others above"""
    _attend(query, keys, values, indices, counts, leading, first, lengths, scale, None, out, lse)


def _attend(query, keys, values, indices, counts, leading, first, lengths, scale, earlier, out, lse):
    """Of each list: the first `leading` slots, then `counts` entries, which count from slot `first`."""
    batch, q_heads, head_dim = query.shape
    most = int(leading.max(initial=0)) + int(counts.max(initial=0))
    splits = max(-(-most // TOKENS_PER_TASK), 1)
    parts = splits + (earlier is not None)
    outputs = np.zeros((parts, batch, q_heads, head_dim), np.float32)
    lses = np.full((parts, batch, q_heads), -np.inf, np.float32)
    _decode(bits(query), bits(keys), bits(values), indices, counts, leading, first, lengths, np.float32(scale),
            outputs[:splits], lses[:splits])
    if earlier is not None:
        outputs[-1], lses[-1] = earlier
    merge(outputs, lses, out, np.empty((batch, q_heads), np.float32) if lse is None else lse)


def merge(outputs, lses, out, lse) -> None:
    """outputs : [parts, batch, q_heads, head_dim]   lses : [parts, batch, q_heads] float32
    out, lse : without parts"""
    _merge(bits(outputs), lses, bits(out), lse)


@numba.njit(parallel=True, **COMPILE_SUMS)
def _decode(query, keys, values, indices, counts, leading, start, lengths, scale, outputs, lses):
    """The query heads of a list attend to slots 0 ... leading - 1 and to start + indices[0 ... counts - 1]."""
    batch, q_heads, head_dim = query.shape
    lists = counts.shape[1]
    group, lists_per_head = q_heads // lists, lists // keys.shape[1]
    splits = outputs.shape[0]
    for task in numba.prange(batch * lists * splits):
        b, i, split = task // (lists * splits), task // splits % lists, task % splits
        g = i // lists_per_head
        before = leading[b]
        first, last = split * TOKENS_PER_TASK, min((split + 1) * TOKENS_PER_TASK, before + counts[b, i])
        if first >= last:
            continue
        tokens = np.empty(TOKENS_PER_TASK, np.int64)
        n = 0
        for t in range(first, last):
            if t < before:
                tokens[n] = t
                n += 1
            else:
                token = np.int64(indices[b, i, t - before])
                if 0 <= token < lengths[b]:
                    tokens[n] = start + token
                    n += 1
        q = np.empty((group, head_dim), np.float32)
        for h in range(group):
            for d in range(head_dim):
                q[h, d] = load(query[b, i * group + h, d]) * scale
        row = np.empty(head_dim, np.float32)
        weights = np.empty((group, TILE), np.float32)
        largest = np.full(group, -np.inf, np.float32)
        total = np.zeros(group, np.float32)
        output = np.zeros((group, head_dim), np.float32)
        for done in range(0, n, TILE):
            count = min(TILE, n - done)
            for t in range(count):
                for d in range(head_dim):
                    row[d] = load(keys[b, g, tokens[done + t], d])
                for h in range(group):
                    logit = np.float32(0)
                    for d in range(head_dim):
                        logit += q[h, d] * row[d]
                    weights[h, t] = logit
            for h in range(group):
                new = largest[h]
                for t in range(count):
                    if not weights[h, t] <= new:   # NaN is taken over, and stays
                        new = weights[h, t]
                factor = np.exp(largest[h] - new) if largest[h] > -np.inf else np.float32(0)
                largest[h] = new
                total[h] *= factor
                for d in range(head_dim):
                    output[h, d] *= factor
                for t in range(count):
                    weights[h, t] = np.exp(weights[h, t] - new) if new > -np.inf or np.isnan(new) else np.float32(0)
                    total[h] += weights[h, t]
            for t in range(count):
                for d in range(head_dim):
                    row[d] = load(values[b, g, tokens[done + t], d])
                for h in range(group):
                    weight = weights[h, t]
                    for d in range(head_dim):
                        output[h, d] += weight * row[d]
        for h in range(group):
            inverse = np.float32(1) / total[h] if total[h] != 0 else np.float32(0)
            for d in range(head_dim):
                outputs[split, b, i * group + h, d] = output[h, d] * inverse
            lses[split, b, i * group + h] = largest[h] + np.log(total[h])


@numba.njit(**COMPILE)
def _merge(outputs, lses, out, lse):
    parts, batch, q_heads, head_dim = outputs.shape
    weights, value = np.empty(parts, np.float32), np.empty(head_dim, np.float32)
    for b in range(batch):
        for h in range(q_heads):
            largest = np.float32(-np.inf)
            for i in range(parts):
                if not lses[i, b, h] <= largest:
                    largest = lses[i, b, h]
            shift = np.float32(0) if largest == -np.inf else largest
            total = np.float32(0)
            for i in range(parts):
                weights[i] = np.exp(lses[i, b, h] - shift)
                total += weights[i]
            inverse = np.float32(1) / total if total != 0 else np.float32(0)
            value[:] = 0
            for i in range(parts):
                weight = weights[i] * inverse
                if weight != 0:   # an empty part's output is not read into the result
                    for d in range(head_dim):
                        value[d] += weight * load(outputs[i, b, h, d])
            for d in range(head_dim):
                out[b, h, d] = store(value[d], out)
            lse[b, h] = shift + np.log(total)
