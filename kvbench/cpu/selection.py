"""Selection of tokens by their proxy logits on the CPU.  Reference: reference/selection.py."""
from __future__ import annotations

import math

import numba
import numpy as np

from kvbench.cpu.convert import COMPILE

PLAIN, SHRINK, SHIFT = 0, 1, 2
ONE = 2.0**31                     # the integer mass of the largest logit
SHARE_BITS = 16
NOTHING = np.int64(2**32)         # above every key


def select(logits, sigma, lengths, window, share, least, most, total, calibration, indices, counts, mass) -> None:
    """Write the lists of chosen tokens, each that of the query heads that share it.

    logits, sigma : [batch, q_heads, tokens] float32, sigma None unless calibrated        lengths : [batch] int32
    window        : (sinks, recent, block)
    share         : of the mass, in units of 2^-16; 65536 takes every candidate, 0 leaves the number to `least`
    least, most   : bounds of the number of tokens per query head
    total         : whether `share` is of the mass of all tokens, and not of the candidates alone
    calibration   : PLAIN, SHRINK or SHIFT
    indices       : [batch, lists, tokens] int32, ascending; not written from counts on
    counts        : [batch, lists] int32        mass : [batch, q_heads] float32
    """
    sigma = np.empty((*logits.shape[:2], 0), np.float32) if sigma is None else sigma
    _select(logits, sigma, lengths, *window, share, least, most, total, calibration, indices, counts, mass)


@numba.njit(parallel=True, **COMPILE)
def _select(logits, sigma, lengths, sinks, recent, block, share, least, most, total, calibration, indices, counts,
            mass):
    batch, q_heads, tokens = logits.shape
    lists = counts.shape[1]
    group = q_heads // max(lists, 1)
    for task in numba.prange(batch * lists):
        b, row = task // lists, task % lists
        length = min(max(np.int64(lengths[b]), 0), tokens)
        start = min(sinks, length)
        stop = start + block * (max(length - sinks - recent, 0) // block)
        chosen = np.zeros(stop - start, np.bool_)
        for h in range(row * group, (row + 1) * group):
            mass[b, h] = _select_row(logits[b, h, :length], sigma[b, h], start, stop, share, least, most, total,
                                     calibration, chosen)
        count = 0
        for t in range(stop - start):
            if chosen[t]:
                indices[b, row, count] = start + t
                count += 1
        counts[b, row] = count


@numba.njit(**COMPILE)
def _select_row(logits, sigma, start, stop, share, least, most, total, calibration, chosen):
    """Marks the tokens that one query head chooses; returns the share of the mass that was reached."""
    n = stop - start
    order_by, weigh_by = np.empty(n, np.float32), np.empty(n, np.float32)
    _correct(logits[start:stop], sigma[start:stop] if calibration != PLAIN else sigma, calibration, order_by, weigh_by)
    usable, largest = 0, -np.inf
    for t in range(n):
        if math.isfinite(order_by[t]) and math.isfinite(weigh_by[t]):
            usable += 1
            largest = max(largest, np.float64(weigh_by[t]))
        else:
            order_by[t] = np.nan
    if usable == 0:
        return np.float32(1)
    outside = np.uint64(0)
    if total:
        for t in range(len(logits)):
            if (t < start or t >= stop) and math.isfinite(logits[t]):
                largest = max(largest, np.float64(logits[t]))
        for t in range(len(logits)):
            if (t < start or t >= stop) and math.isfinite(logits[t]):
                outside += _mass(logits[t], largest)
    keys, weights = np.empty(usable, np.uint32), np.empty(usable, np.uint64)
    positions = np.empty(usable, np.int64)
    everything, i = outside, 0
    for t in range(n):
        if not math.isnan(order_by[t]):
            keys[i], weights[i], positions[i] = _order_key(order_by[t]), _mass(weigh_by[t], largest), t
            everything += weights[i]
            i += 1
    least, most = min(least, usable), min(most, usable)
    target = np.int64(2**63 - 1)
    if share < 1 << SHARE_BITS:
        part, rest = everything >> np.uint64(SHARE_BITS), everything & np.uint64((1 << SHARE_BITS) - 1)
        target = np.int64(share) * np.int64(part) + (
            (np.int64(share) * np.int64(rest) + (1 << SHARE_BITS) - 1) >> SHARE_BITS) - np.int64(outside)
    key, ties = _radix_threshold(keys, weights, target, least, most)
    reached = outside
    if calibration == SHIFT and key != NOTHING:
        threshold, passing = key, 0                     # of the proxy logit itself: every token at or above it
        for i in range(usable):
            passing += _order_key(logits[start + positions[i]]) >= threshold
        ties = passing
        proxies = np.empty(usable, np.uint32)
        for i in range(usable):
            proxies[i] = _order_key(logits[start + positions[i]])
        if passing > most:                              # a higher threshold
            threshold, ties = _radix_threshold(proxies, weights, np.int64(0), most, most)
        for i in range(usable):
            if keys[i] >= threshold:
                reached += weights[i]
        keys, key = proxies, threshold
    else:
        left = ties
        for i in range(usable):
            if keys[i] > key or (keys[i] == key and left > 0):
                left -= keys[i] == key
                reached += weights[i]
    for i in range(usable):
        if keys[i] > key or (keys[i] == key and ties > 0):
            ties -= keys[i] == key
            chosen[positions[i]] = True
    return np.float32(np.float64(reached) / np.float64(everything)) if everything else np.float32(1)


@numba.njit(**COMPILE)
def _correct(logits, sigma, calibration, order_by, weigh_by):
    """What orders the candidates, and the logarithm of their weights; not finite for what is left out."""
    if calibration == PLAIN:
        order_by[:] = logits
        weigh_by[:] = logits
    elif calibration == SHIFT:
        for t in range(len(logits)):
            square = np.float32(sigma[t] * sigma[t])
            order_by[t] = np.float32(logits[t] - square)
            weigh_by[t] = np.float32(logits[t] - np.float32(np.float32(0.5) * square))
            if not math.isfinite(logits[t]):
                order_by[t] = np.nan
    else:
        count, mean, squares, variance = 0, 0.0, 0.0, 0.0
        for t in range(len(logits)):
            if math.isfinite(logits[t]) and math.isfinite(sigma[t]):
                count += 1
                mean += np.float64(logits[t])
                squares += np.float64(np.float32(sigma[t] * sigma[t]))
        mean /= max(count, 1)
        squares /= max(count, 1)
        for t in range(len(logits)):
            if math.isfinite(logits[t]) and math.isfinite(sigma[t]):
                variance += (np.float64(logits[t]) - mean) ** 2
        prior = max(variance / max(count, 1) - squares, 0.0)
        for t in range(len(logits)):
            if math.isfinite(logits[t]) and math.isfinite(sigma[t]):
                square = np.float64(np.float32(sigma[t] * sigma[t]))
                keep = 1.0 if square == 0 else prior / (prior + square)
                order_by[t] = np.float32(mean + keep * (np.float64(logits[t]) - mean) + keep * square / 2)
            else:
                order_by[t] = np.nan
        weigh_by[:] = order_by


@numba.njit(**COMPILE)
def _mass(logit, largest):
    return np.uint64(np.rint(ONE * math.exp(np.float64(logit) - largest)))


@numba.njit(**COMPILE)
def _order_key(logit):
    bits = np.float32(logit + np.float32(0)).view(np.uint32)
    return np.uint32(~bits) if bits >> 31 else np.uint32(bits | np.uint32(2**31))


@numba.njit(**COMPILE)
def _radix_threshold(keys, weights, target, least, most):
    """(key, ties) as `reference.selection.radix_threshold`."""
    if most == 0 or (target <= 0 and least == 0):
        return NOTHING, 0
    prefix, mass, count = np.int64(0), np.int64(0), 0
    weight, remaining = np.int64(0), 0
    for shift in (24, 16, 8, 0):
        counts, sums = np.zeros(256, np.int64), np.zeros(256, np.int64)
        for i in range(len(keys)):
            if np.int64(keys[i]) >> (shift + 8) == prefix:
                digit = np.int64(keys[i]) >> shift & 255
                counts[digit] += 1
                sums[digit] += np.int64(weights[i])
        digit = 255
        while digit > 0:
            if (mass + sums[digit] >= target and count + counts[digit] >= least) or count + counts[digit] >= most:
                break
            mass += sums[digit]
            count += counts[digit]
            digit -= 1
        prefix = prefix << 8 | digit
        weight, remaining = sums[digit], counts[digit]
    weight = weight // max(remaining, 1)                # all that are left share key and mass
    short = target - mass
    ties = 0 if short <= 0 else remaining if weight == 0 or short >= weight * remaining else -(-short // weight)
    return prefix, min(max(ties, least - count, 1), remaining, most - count)
