"""When is a time known well enough?  The stop rule, and what is reported of the samples.

The statistic is the median: one slow sample (an interrupt, another user of the machine) does not move it.  Its
uncertainty comes from order statistics: for n independent samples of any distribution the true median lies between the
samples of rank k and n - k + 1 with the probability that a fair coin gives neither fewer than k nor more than n - k
heads.  Sampling ends when that interval is narrow, not after a fixed count; what did not get there is flagged.
"""
from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
FLUSHES = ("write", "read")    # how a cold sample finds the caches: full of lines that were written, or read
BATCH_SECONDS = 0.02       # samples between two looks at the stop rule
LARGEST_BATCH = 100


@dataclass(frozen=True)
class StopRule:
    """Stop once the median is known to +-relative_error, but not before the minima; give up at the limit."""

    relative_error: float
    minimum_samples: int
    minimum_seconds: float
    limit_seconds: float
    warm_up_seconds: float


FULL = StopRule(relative_error=0.005, minimum_samples=30, minimum_seconds=0.2, limit_seconds=10.0, warm_up_seconds=0.1)
QUICK = StopRule(relative_error=0.03, minimum_samples=10, minimum_seconds=0.02, limit_seconds=1.0, warm_up_seconds=0.02)


@dataclass(frozen=True)
class Measurement:
    """Samples of one duration, in seconds, in the order in which they were taken."""

    samples: tuple[float, ...]
    converged: bool

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def relative_error(self) -> float:
        """Half the width of the confidence interval of the median, over the median; inf if the samples are too few."""
        interval = median_interval(self.samples)
        return (interval[1] - interval[0]) / (2 * self.median) if interval and self.median > 0 else math.inf

    def summary(self) -> dict:
        """What a result file holds: microseconds, rounded to 0.1 ns, below any clock's resolution."""
        p5, p25, p75, p95 = np.percentile(self.samples, [5, 25, 75, 95])
        error = self.relative_error
        return {
            "median_us": _us(self.median), "iqr_us": _us(p75 - p25), "p5_us": _us(p5), "p95_us": _us(p95),
            "min_us": _us(min(self.samples)), "count": len(self.samples), "converged": self.converged,
            "relative_error": round(error, 6) if math.isfinite(error) else None,
            "samples_us": [_us(sample) for sample in self.samples],
        }


def measure(sample: Callable[[int], Sequence[float]], rule: StopRule,
            clock: Callable[[], float] = time.monotonic) -> Measurement:
    """Call sample(count), which takes `count` samples and returns their seconds, until the rule is met.

    The first samples are warm-up and are thrown away.  The limit counts the time spent from there on, overhead such as
    cache flushes included.
    """
    count, start = 1, clock()
    while True:                                        # one warm-up sample at least
        before = clock()
        sample(count)
        count = _batch(count, clock() - before)
        if clock() - start >= rule.warm_up_seconds:
            break

    samples: list[float] = []
    start = clock()
    while True:
        before = clock()
        samples += sample(count)
        count = _batch(count, clock() - before)
        elapsed = clock() - start
        if len(samples) >= rule.minimum_samples and elapsed >= rule.minimum_seconds:
            if Measurement(tuple(samples), True).relative_error <= rule.relative_error:
                return Measurement(tuple(samples), True)
        if elapsed >= rule.limit_seconds:
            return Measurement(tuple(samples), False)


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The narrowest symmetric pair of order statistics that holds the true median with probability CONFIDENCE.

    None below 6 samples: the extremes of 5 hold it with probability 1 - 2 / 2^5 = 0.94 only.
    """
    rank = _lower_rank(len(samples))
    if rank == 0:
        return None
    ordered = np.partition(samples, [rank - 1, len(samples) - rank])
    return float(ordered[rank - 1]), float(ordered[len(samples) - rank])


@functools.lru_cache(maxsize=4096)
def _lower_rank(count: int) -> int:
    """The largest k with P(B < k) <= (1 - CONFIDENCE) / 2 for B ~ Binomial(count, 1/2): the rank of the lower end."""
    if count > 1000:           # normal approximation; exact and approximate rank differ by at most one here
        return math.floor(count / 2 - 1.96 * math.sqrt(count) / 2)
    tail, rank = 0, 0
    while (tail := tail + math.comb(count, rank)) <= (1 - CONFIDENCE) / 2 * 2**count:
        rank += 1
    return rank


def _batch(count: int, seconds: float) -> int:
    """How many samples fill BATCH_SECONDS, judged by the last batch."""
    return max(1, min(LARGEST_BATCH, int(BATCH_SECONDS * count / max(seconds, 1e-9))))


def _us(seconds: float) -> float:
    return round(float(seconds) * 1e6, 4)
