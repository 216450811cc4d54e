"""Claims: what a paper or a proof says of an algorithm, stated as data together with a check that can find it false.

A reference module ends with `CLAIMS`, a tuple of `Claim`.  Its checks draw random cases and hand them to one of the
builders below, which returns the `Evidence`:

    identity      |deviation| <= allowance in every case                   exact, or up to a derived rounding error
    bound         value <= limit in every case                             deterministic bound
    enumeration   mean over all equally likely outcomes = expected         exact expectation, nothing drawn
    expectation   E X = expected                                           mean +- 6 standard errors (Student, skewness)
    variance      Var X = expected                                         likewise
    tail          P(event) <= bound, or = probability                      exact binomial interval (Clopper-Pearson)
    distribution  X follows a law: sup |F_n - F| is 0 but for sampling     Dvoretzky-Kiefer-Wolfowitz inequality

Statistical intervals have the confidence of 6 standard deviations of a normal variable: a true claim is reported
false with probability 2e-9 for each number compared, so "false" is a defect and not chance.  A statistical claim holds
when its interval does not contradict it; the width of the interval, which is reported, says how much that means.
NaN never passes.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

SIGMAS = 6.0
MISS_PROBABILITY = 2 * float(stats.norm.sf(SIGMAS))     # 1.97e-9, two-sided
KINDS = ("identity", "bound", "expectation", "tail")

# The interval of a mean takes the mean to be nearly normal; of fewer samples no statement is made.
MINIMUM_SAMPLES = 1000


@dataclass(frozen=True)
class Evidence:
    """What a check found: `estimate` stands in `relation` ("=", "<=" or ">=") to `expected`, or it does not.

    estimate, low, high   the number measured and its interval; of a deterministic check the worst case, without one
    expected              the value, bound or rounding allowance that the claim gives
    relation              how the number claimed relates to `expected`
    strain                distance from `expected` in units of the interval, or of the allowance: the claim holds up to
                          1, and never with NaN; below -1 ("<=", ">=") the whole interval is on the safe side
    samples               cases drawn, or enumerated
    note                  which component, vector or parameter the numbers belong to
    """

    estimate: float
    low: float
    high: float
    expected: float
    relation: str
    strain: float
    samples: int
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.strain <= 1


@dataclass(frozen=True)
class Claim:
    """A statement about an algorithm, and the check that may find it false.

    name       short, unique within the algorithm
    statement  plain English with the formula
    source     arXiv id with theorem or equation, a textbook, or "derived" with the place of the derivation
    kind       "identity", "bound" (deterministic), "expectation" (moments and laws) or "tail" (probabilities of events)
    check      (rng, samples) -> Evidence; draws from `rng` alone, about `samples` independent cases
    samples    cases drawn unless the caller says otherwise
    """

    name: str
    statement: str
    source: str
    kind: str
    check: Callable[[np.random.Generator, int], Evidence]
    samples: int = MINIMUM_SAMPLES

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"claim {self.name!r}: kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")


# --- Evidence without chance ----------------------------------------------------------------------------------------


def identity(deviation, allowance=0.0, *, samples=None, note="") -> Evidence:
    """|deviation| <= allowance everywhere.  The allowance is a derived rounding error; 0 asks for equality.

    deviation, allowance : arrays that broadcast against each other        samples : cases (default: numbers compared)
    """
    return bound(np.abs(deviation), allowance, samples=samples, note=note)


def bound(value, limit, *, samples=None, note="") -> Evidence:
    """value <= limit everywhere, with limit >= 0 (add the rounding allowance to it).

    value, limit : arrays that broadcast against each other                samples : cases (default: numbers compared)
    """
    value, limit = np.broadcast_arrays(_numbers(value), _numbers(limit))
    if np.any(limit < 0):
        raise ValueError(f"bound: limit: expected non-negative numbers, got {limit.min()}")
    samples = value.size if samples is None else samples
    return _worst(value, value, value, limit, "<=", _ratio(value, limit), samples, note)


def enumeration(values, expected, allowance=0.0, *, note="") -> Evidence:
    """The mean over axis 0 of `values`, all outcomes, equally likely, is `expected` up to a rounding allowance."""
    values = _numbers(values)
    mean = np.ascontiguousarray(np.moveaxis(values, 0, -1)).mean(axis=-1)     # contiguous: NumPy then sums pairwise
    return _interval(mean, mean - allowance, mean + allowance, expected, "=", len(values), note)


# --- Evidence from samples ------------------------------------------------------------------------------------------


def expectation(samples, expected, *, allowance=0.0, relation="=", note="") -> Evidence:
    """E X = expected (or <=, >= by `relation`): the mean over axis 0 within 6 standard errors and the allowance.

    samples   : [n, ...], independent along axis 0; the rest are components, each of which must agree.  The coordinates
                that one rotation gives are components, or their mean is one sample: they are not independent.
    expected  : broadcasts against one sample         allowance : rounding, or a known error of `expected`; likewise

    Student's law takes the place of the normal, and the end that a skewed sample leaves too near is moved out by the
    Cornish-Fisher term skewness (2 k^2 + 1) / (6 sqrt(n)), k = 6 (Johnson, Journal of the American Statistical
    Association 73, 1978): squares of a normal variable miss 5 times too often without it at n = 1000.  Fourth powers
    need n >> 1000 all the same.  The share of a rare event belongs to `tail`, which is right for a count of 0 too.
    """
    samples = _numbers(samples)
    count = len(samples)
    if count < MINIMUM_SAMPLES:
        raise ValueError(f"expectation: samples: expected at least {MINIMUM_SAMPLES} along axis 0, got {count}")
    mean, spread = samples.mean(axis=0), samples.std(axis=0, ddof=1)
    width = stats.t.isf(MISS_PROBABILITY / 2, count - 1)
    skewness = _ratio(((samples - mean) ** 3).mean(axis=0), spread**3)
    longer = skewness * (2 * width**2 + 1) / (6 * np.sqrt(count))
    error = spread / np.sqrt(count)
    low = mean - error * (width + np.maximum(-longer, 0)) - allowance
    high = mean + error * (width + np.maximum(longer, 0)) + allowance
    return _interval(mean, low, high, expected, relation, count, note)


def variance(samples, expected, *, mean=None, allowance=0.0, relation="=", note="") -> Evidence:
    """Var X = expected: E (X - mean)^2 by `expectation`; without a known mean, (X - sample mean)^2 n / (n - 1)."""
    samples = _numbers(samples)
    if mean is None:
        count = len(samples)
        squares = (samples - samples.mean(axis=0)) ** 2 * (count / max(count - 1, 1))
    else:
        squares = (samples - mean) ** 2
    return expectation(squares, expected, allowance=allowance, relation=relation, note=note)


def tail(count, trials, probability, *, relation="<=", note="") -> Evidence:
    """P(event) <= probability, or "=" for a known rate, from `count` events in `trials` independent trials.

    The interval is Clopper and Pearson's, valid for every count: low is the p with P(Bin(trials, p) >= count) = a and
    high the p with P(Bin(trials, p) <= count) = a, where 2a = MISS_PROBABILITY.

    count, probability : arrays that broadcast against each other        trials : int, the same for all of them
    """
    count = _numbers(count)
    if trials < 1 or np.any(count < 0) or np.any(count > trials):
        raise ValueError(f"tail: count: expected 0 to trials, got {count.min():g} to {count.max():g} of {trials}")
    with np.errstate(invalid="ignore"):                                       # where() replaces the NaN of both ends
        low = np.where(count > 0, stats.beta.ppf(MISS_PROBABILITY / 2, count, trials - count + 1), 0.0)
        high = np.where(count < trials, stats.beta.isf(MISS_PROBABILITY / 2, count + 1, trials - count), 1.0)
    return _interval(count / trials, low, high, probability, relation, trials, note)


def distribution(samples, cdf: Callable, *, note="") -> Evidence:
    """X follows the continuous law `cdf`: sup_x |F_n(x) - cdf(x)| <= sqrt(ln(2 / MISS_PROBABILITY) / (2 n)).

    Dvoretzky, Kiefer and Wolfowitz with Massart's constant (Annals of Probability 18, 1990), valid for every n; the
    allowed distance is 3.22 / sqrt(n).  The interval is that of the distance between the law of X and `cdf`.

    samples : [n, ...], independent along axis 0; each of the other components must follow the law
    """
    samples = np.sort(_numbers(samples), axis=0)                              # NaN sorts to the end and stays NaN
    count = len(samples)
    steps = np.arange(1, count + 1).reshape(-1, *[1] * (samples.ndim - 1)) / count     # F_n at the samples
    law = cdf(samples)
    distance = np.maximum(steps - law, law - (steps - 1 / count)).max(axis=0)
    critical = np.sqrt(np.log(2 / MISS_PROBABILITY) / (2 * count))
    low, high, zero = np.maximum(distance - critical, 0), distance + critical, np.zeros_like(distance)
    return _worst(distance, low, high, zero, "<=", distance / critical, count, note)


def weakest(cases: Mapping[str, Evidence]) -> Evidence:
    """The evidence nearest to failing of several that must all hold; the note names its case."""
    name, evidence = max(cases.items(), key=lambda case: np.nan_to_num(case[1].strain, nan=np.inf))
    return replace(evidence, note="; ".join(filter(None, (f"weakest of {len(cases)}: {name}", evidence.note))))


# --- The one judgement ----------------------------------------------------------------------------------------------


def _interval(estimate, low, high, expected, relation, samples, note) -> Evidence:
    """Where `expected` lies in the interval: 0 at the estimate, 1 at the end that contradicts the claim."""
    if relation not in ("=", "<=", ">="):
        raise ValueError(f"relation: expected '=', '<=' or '>=', got {relation!r}")
    estimate, low, high, expected = np.broadcast_arrays(*map(_numbers, (estimate, low, high, expected)))
    above = estimate - expected
    strain = _ratio(above, np.where(above > 0, estimate - low, high - estimate))
    strain = {"=": np.abs(strain), "<=": strain, ">=": -strain}[relation]
    return _worst(estimate, low, high, expected, relation, strain, samples, note)


def _worst(estimate, low, high, expected, relation, strain, samples, note) -> Evidence:
    """The component with the largest strain; NaN is larger than everything."""
    at = np.unravel_index(np.argmax(np.where(np.isnan(strain), np.inf, strain)), strain.shape)
    if strain.size > 1:
        place = f"worst of {strain.size}, at [{', '.join(map(str, at))}]"
        note = f"{note}; {place}" if note else place
    estimate, low, high, expected, strain = (float(x[at]) for x in (estimate, low, high, expected, strain))
    return Evidence(estimate, low, high, expected, relation, strain, int(samples), note)


def _ratio(part, whole):
    """part / whole for whole >= 0, where nothing of nothing is 0 and something of nothing is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(part == 0, 0.0, part / whole)


def _numbers(values):
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("evidence: expected at least one number, got none: what compares nothing shows nothing")
    return values
