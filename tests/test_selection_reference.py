"""The reference of selections: brute force, ties, numbers that are not finite, printed figures, and defects found."""
import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import special

from kvbench import claims
from kvbench.reference import attention, selection
from kvbench.reference.selection import Scores, kept, middle, top_k, top_p, union
from test_claims import find, find_without_defect

SEEDS = st.integers(0, 2**32)
SHARES = st.floats(0, 1, exclude_min=True)
# Few values, so that they tie; both zeros, subnormals, the largest, and what is not finite.
LOGITS = st.one_of(st.sampled_from((0.0, -0.0, 1.0, 1.5, -3.0, 1e-45, -1e-45, 3.4e38, -3.4e38, math.nan, math.inf,
                                    -math.inf)), st.floats(width=32))
NO_WINDOW = {"sinks": 0, "recent": 0}


def one_row(y, sigma=None):
    sigma = None if sigma is None else np.array(sigma, np.float32)[None, None]
    return Scores(np.array(y, np.float32).reshape(1, 1, -1), sigma)


def chosen(made, row=(0, 0)):
    return made.indices[row][: made.counts[row]].tolist()


# --- The definition --------------------------------------------------------------------------------------------------


@given(y=st.lists(LOGITS, max_size=30), p=SHARES)
@example(y=[1.0] * 10, p=0.65).via("65536 p is rounded down by rint: 6.5 of 10 tokens")
@example(y=[0.0, math.nan, -0.0, 0.0], p=0.6)
def test_top_p_is_the_shortest_prefix(y, p):
    """All prefixes in the order, each with its mass in Python integers."""
    made = top_p(one_row(y), p, **NO_WINDOW)
    y = [float(np.float32(value)) for value in y]
    order = sorted((t for t, value in enumerate(y) if math.isfinite(value)), key=lambda t: (-y[t], t))
    assert made.indices.dtype == made.counts.dtype == np.int32 and made.mass.dtype == np.float32
    if not order:
        assert chosen(made) == [] and made.mass[0, 0] == 1
        return
    masses = [round(2**31 * math.exp(y[t] - y[order[0]])) for t in order]
    q = math.ceil(p * 65536)
    expected = len(order) if p == 1 or q == 65536 else next(
        n for n in itertools.count(1) if sum(masses[:n]) * 65536 >= q * sum(masses))
    assert chosen(made) == sorted(order[:expected])
    assert made.mass[0, 0] == pytest.approx(sum(masses[:expected]) / sum(masses)) and made.mass[0, 0] >= p - 6e-8
    assert (made.indices[0, 0, made.counts[0, 0] :] == -1).all()


@given(y=st.lists(LOGITS, max_size=30), k=st.integers(0, 40))
def test_top_k_is_a_stable_sort(y, k):
    y = [float(np.float32(value)) for value in y]
    order = sorted((t for t, value in enumerate(y) if math.isfinite(value)), key=lambda t: -y[t])
    assert chosen(top_k(one_row(y), k, **NO_WINDOW)) == sorted(order[:k])


@given(seed=SEEDS, p=SHARES, least=st.integers(0, 6), most=st.one_of(st.none(), st.integers(0, 9)),
       sinks=st.integers(0, 5), recent=st.integers(0, 9), block=st.sampled_from((1, 4, 128)),
       normalise=st.sampled_from(selection.NORMALISE), calibrated=st.sampled_from((*selection.CALIBRATIONS, True)),
       content=st.sampled_from(("normal", "equal", "integers", "huge", "subnormal", "holes")))
def test_every_option_keeps_its_word(seed, p, least, most, sinks, recent, block, normalise, calibrated, content):
    rng = np.random.default_rng(seed)
    batch, heads, tokens = (int(n) for n in rng.integers((0, 1, 0), (4, 4, 40)))
    y = rng.standard_normal((batch, heads, tokens))
    y = {"normal": y, "equal": y * 0, "integers": np.rint(2 * y), "huge": 1e38 * y, "subnormal": 1e-42 * y,
         "holes": np.where(rng.random(y.shape) < 0.4, rng.choice([np.nan, np.inf, -np.inf]), y)}[content]
    scores = Scores(y.astype(np.float32), rng.uniform(0, 2, y.shape).astype(np.float32))
    lengths, most = rng.integers(0, tokens + 1, batch), None if most is None else least + most
    window = {"lengths": lengths, "sinks": sinks, "recent": recent, "block": block}
    made = top_p(scores, p, min_tokens=least, max_tokens=most, normalise=normalise, calibrated=calibrated, **window)
    mask = kept(made, **window)
    start, stop = middle(lengths, sinks, recent, block)
    for b, h in np.ndindex(batch, heads):
        indices = chosen(made, (b, h))
        candidates = [t for t in range(start[b], stop[b]) if math.isfinite(scores.logits[b, h, t])]
        assert indices == sorted(set(indices)) and set(indices) <= set(candidates)
        assert len(indices) <= (len(candidates) if most is None else most)
        if content != "huge":                            # there, corrections may overflow and leave a token out
            assert len(indices) >= min(least, len(candidates))
        always = [t for t in range(lengths[b]) if t < start[b] or t >= stop[b]]
        assert np.flatnonzero(mask[b, h]).tolist() == sorted(indices + always)
        assert 0 <= made.mass[b, h] <= 1 and (most is not None or content == "huge" or made.mass[b, h] >= p - 6e-8)


@given(length=st.integers(0, 1000), sinks=st.integers(0, 200), recent=st.integers(0, 300),
       block=st.sampled_from((1, 7, 128)))
def test_middle_leaves_the_window(length, sinks, recent, block):
    (start,), (stop,) = middle(np.array([length]), sinks, recent, block)
    assert start == min(sinks, length) and start <= stop <= length and (stop - start) % block == 0
    if stop > start:
        assert recent <= length - stop < recent + block
    elif length > sinks + recent:
        assert length - sinks - recent < block


def test_global_counts_what_is_always_kept():
    """Mass 8 of 16 lies outside M: half of p = 0.75 is there already."""
    y = np.log([4.0, 2, 2, 1, 1, 1, 1, 4])
    scores, window = one_row(y), {"sinks": 1, "recent": 1}
    assert chosen(top_p(scores, 0.74, normalise="global", **window)) == [1, 2]
    assert top_p(scores, 0.74, normalise="global", **window).mass[0, 0] == 0.75
    assert chosen(top_p(scores, 0.74, **window)) == [1, 2, 3, 4]
    assert chosen(top_p(scores, 0.4, normalise="global", min_tokens=0, **window)) == []
    assert chosen(top_p(scores, 0.4, normalise="global", **window)) == [1]
    y[0] = np.nan                                        # an exact logit that is not a number weighs nothing
    assert chosen(top_p(one_row(y), 0.5, normalise="global", **window)) == [1]


def test_shift_takes_all_above_the_threshold():
    """Token 0 crosses at y - sigma^2 = 0.5; tokens 1 and 3 have y above it, although their own y - sigma^2 is lower."""
    scores = one_row([0.5, 1.0, 0.4, 0.6], [0.0, 2.0, 0.0, 1.5])
    made = top_p(scores, 0.3, calibrated="shift", **NO_WINDOW)
    assert chosen(made) == [0, 1, 3]
    w = [math.exp(a - b * b / 2) for a, b in zip((0.5, 1.0, 0.4, 0.6), (0.0, 2.0, 0.0, 1.5))]
    assert made.mass[0, 0] == pytest.approx(w[0] / sum(w), rel=1e-6)
    assert chosen(top_p(scores, 0.3, calibrated=True, **NO_WINDOW)) == [0, 1, 3]
    fewer = top_p(scores, 0.3, calibrated="shift", max_tokens=1, **NO_WINDOW)
    assert chosen(fewer) == [1] and fewer.mass[0, 0] == 0           # no y - sigma^2 is as large as 1: no mass is sure
    assert chosen(top_p(scores, 0.3, calibrated="shift", min_tokens=4, **NO_WINDOW)) == [0, 1, 2, 3]


@given(seed=SEEDS)
def test_shrink_is_the_posterior(seed):
    rng = np.random.default_rng(seed)
    y, sigma = rng.standard_normal(50) * 2, rng.uniform(0.1, 1, 50)
    scores = one_row(y, sigma)
    y, sigma = scores.logits[0, 0].astype(float), scores.sigma[0, 0].astype(float)
    mean, prior = y.mean(), max(y.var() - (sigma**2).mean(), 0)
    precision = 1 / prior + 1 / sigma**2
    posterior = (mean / prior + y / sigma**2) / precision + 1 / (2 * precision)
    expected = top_p(one_row(posterior), 0.85, **NO_WINDOW)
    made = top_p(scores, 0.85, calibrated="shrink", **NO_WINDOW)
    assert abs(made.counts[0, 0] - expected.counts[0, 0]) <= 1
    assert made.mass[0, 0] == pytest.approx(expected.mass[0, 0], abs=1e-3) or made.counts[0, 0] != expected.counts[0, 0]


def test_shrink_to_nothing():
    """Logits that spread less than their noise say nothing: all are equal, and the lower indices win."""
    assert chosen(top_p(one_row([3.0, 1.0, 2.0, 4.0], [5.0] * 4), 0.5, calibrated="shrink", **NO_WINDOW)) == [0, 1]


@given(seed=SEEDS)
def test_radix_descent_of_any_weights(seed):
    """Weights need not belong to the keys: few different keys, weights with zeros, any target up to the total."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    keys = rng.integers(0, 2**32, 5, dtype=np.uint32)[rng.integers(0, int(rng.integers(1, 6)), n)]
    table = {int(key): int(rng.choice([0, 1, 7, 2**31])) for key in keys}
    weights = np.array([table[int(key)] for key in keys], np.uint64)
    target = int(rng.integers(0, int(weights.sum()) + 1))
    least, most = int(rng.integers(0, 9)), int(rng.integers(9, 70))
    order = sorted(range(n), key=lambda t: (-int(keys[t]), t))
    length = selection.prefix_length(weights[order], target, least, most)
    key, ties = selection.radix_threshold(keys, weights, target, least, most)
    found = [t for t in range(n) if keys[t] > key] + [t for t in range(n) if keys[t] == key][:ties]
    assert sorted(found) == sorted(order[:length])


@given(total=st.integers(0, 2**53), q=st.integers(0, 2**16))
def test_target_without_overflow(total, q):
    assert selection.target_mass(q, total) == -(-q * total // 65536)
    assert q * (total >> 16) < 2**64 and q * (total & 65535) + 65535 < 2**64


@given(p=SHARES)
def test_share_is_rounded_up(p):
    assert p <= selection.share(p) / 65536 <= p + 2.0**-16


def test_a_million_tokens():
    """Flat rows, a small first token, masses far below 1e-5 of the sum: what bisection by an absolute width loses."""
    y = np.zeros(10**6, np.float32)
    y[0] = -5
    made = top_p(one_row(y), 0.85, **NO_WINDOW)
    assert made.counts[0, 0] == math.ceil(selection.share(0.85) / 65536 * (10**6 - 1 + math.exp(-5)))
    assert made.indices[0, 0, 0] == 1 and made.indices[0, 0, made.counts[0, 0] - 1] == made.counts[0, 0]
    key, ties = selection.radix_threshold(selection.order_key(y), selection.masses(y, 0.0), selection.target_mass(
        selection.share(0.85), int(selection.masses(y, 0.0).sum())), 1, 10**6)
    assert key == selection.order_key(np.float32(0)) and ties == made.counts[0, 0]


def test_rounding_p_to_nearest_misses_it():
    """The specification's rint(65536 p): at p = 0.65 it accepts 42598 of 65536 equal tokens, less than 0.65 of them."""
    made = top_p(one_row(np.zeros(65536)), 0.65, **NO_WINDOW)
    assert made.counts[0, 0] == 42599 and 42598 / 65536 < 0.65 <= 42599 / 65536


def test_union_and_masks():
    y = np.random.default_rng(0).standard_normal((2, 6, 30)).astype(np.float32)
    made = top_p(Scores(y), 0.5, **NO_WINDOW)
    one = union(made, 2)
    assert one.indices.shape == (2, 2, 30) and one.counts.shape == (2, 2) and (one.mass == made.mass).all()
    masks = kept(made, **NO_WINDOW).reshape(2, 2, 3, 30)
    assert (kept(one, **NO_WINDOW) == masks.any(axis=2)).all()
    assert (special.softmax(y, axis=-1) * np.repeat(kept(one, **NO_WINDOW), 3, axis=1)).sum(axis=-1).min() >= 0.5


@given(seed=SEEDS)
def test_attend_reads_nothing_else(seed):
    """Keys and values that are not kept are NaN; the result is dense attention with logits of -inf there."""
    rng = np.random.default_rng(seed)
    query, keys, values = rng.standard_normal((2, 6, 8)), *rng.standard_normal((2, 2, 2, 20, 8))
    mask = rng.random((2, 2, 20)) < rng.choice([0.0, 0.2, 1.0])
    poisoned = (np.where(mask[..., None], x, np.nan) for x in (keys, values))
    output, lse = selection.attend(query, *poisoned, mask)
    logits = np.where(np.repeat(mask, 3, axis=1), np.einsum(
        "bhd,bhtd->bht", query, np.repeat(keys, 3, axis=1)) * 8**-0.5, -np.inf)
    with np.errstate(invalid="ignore"):
        expected = np.einsum("bht,bhtd->bhd", special.softmax(logits, axis=-1), np.repeat(values, 3, axis=1))
    np.testing.assert_allclose(lse, special.logsumexp(logits, axis=-1))
    np.testing.assert_allclose(output, np.where(np.isneginf(lse)[..., None], 0, expected), atol=1e-12)
    if mask.all():
        np.testing.assert_allclose(output, attention.decode(query, keys, values)[0], atol=1e-12)


# --- Printed figures -------------------------------------------------------------------------------------------------


def test_achieved_mass_is_as_printed():
    assert selection.gaussian_mass(0.85, 3, 2) == pytest.approx(0.47, abs=0.005)


GOOD = Scores(np.zeros((2, 3, 9), np.float32))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: top_p(GOOD, 0.0), "p: expected 0 < p <= 1, got 0.0"),
    (lambda: top_p(GOOD, math.nan), "p: expected 0 < p <= 1, got nan"),
    (lambda: top_p(GOOD, 1.5), "p: expected 0 < p <= 1, got 1.5"),
    (lambda: top_p(GOOD, 0.5, normalise="all"), "normalise: expected one of middle, global, got 'all'"),
    (lambda: top_p(GOOD, 0.5, calibrated="yes"), "calibrated: expected True, False, 'shrink' or 'shift', got 'yes'"),
    (lambda: top_p(GOOD, 0.5, calibrated=True), "sigma: expected the noise of the scores .* got None"),
    (lambda: top_p(Scores(GOOD.logits, GOOD.logits[:1]), 0.5, calibrated=True),
     r"sigma: expected the shape of logits, \[2, 3, 9\], got \[1, 3, 9\]"),
    (lambda: top_p(GOOD, 0.5, min_tokens=-1), "min_tokens: expected an integer of at least 0, got -1"),
    (lambda: top_p(GOOD, 0.5, min_tokens=3, max_tokens=2), "max_tokens: expected an integer of at least 3, got 2"),
    (lambda: top_p(GOOD, 0.5, sinks=1.5), "sinks: expected an integer of at least 0, got 1.5"),
    (lambda: top_p(GOOD, 0.5, block=0), "block: expected an integer of at least 1, got 0"),
    (lambda: top_p(GOOD, 0.5, lengths=np.array([1, 10])), r"lengths: expected integers \[2\] from 0 to 9, got int64"),
    (lambda: top_p(Scores(GOOD.logits[0]), 0.5), r"logits: expected .* \[batch, q_heads, tokens\], got .* \[3, 9\]"),
    (lambda: top_k(Scores(np.zeros((1, 1, 3), int)), 2), "logits: expected floating point .* got int64"),
    (lambda: top_k(GOOD, True), "k: expected an integer of at least 0, got True"),
    (lambda: union(top_k(GOOD, 2), 2), "kv_heads: expected a divisor of 3 query heads, got 2"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Defects that the claims find ------------------------------------------------------------------------------------

CORRECTED, PREFIX, RADIX = selection._corrected, selection.prefix_length, selection.radix_threshold
MIDDLE, ATTEND, FITTED = selection.middle, selection.attend, selection.fitted_p


def prefix_without_the_crossing_token(ordered, target, least, most):
    return max(PREFIX(ordered, target, least, most) - 1, 0)


def prefix_with_one_more(ordered, target, least, most):
    return min(PREFIX(ordered, target, least, most) + 1, len(ordered))


def prefix_without_least(ordered, target, least, most):
    return PREFIX(ordered, target, 0, most)


def share_to_nearest(p):
    return int(np.rint(p * 65536))


def ranking_prefers_late_tokens(logits):
    return len(logits) - 1 - np.argsort(-np.asarray(logits)[::-1], kind="stable")


def middle_without_blocks(lengths, sinks, recent, block=1):
    return MIDDLE(lengths, sinks, recent, 1)


def corrected_by_half(logits, sigma, candidates, calibrated):
    return CORRECTED(logits, None if sigma is None else sigma * 0.5, candidates, calibrated)


def corrected_against_zero(logits, sigma, candidates, calibrated):
    order_by, weigh_by = CORRECTED(logits, sigma, candidates, calibrated)
    return order_by, np.maximum(weigh_by, 0)


def corrected_to_the_mean(logits, sigma, candidates, calibrated):
    order_by, weigh_by = CORRECTED(logits, sigma, candidates, calibrated)
    return (order_by * 0, weigh_by * 0) if calibrated else (order_by, weigh_by)


def corrected_never(logits, sigma, candidates, calibrated):
    return logits[candidates], logits[candidates]


def masses_too_sharp(logits, largest):
    return np.rint(selection.ONE * np.exp(2 * (np.asarray(logits, float) - float(largest)))).astype(np.uint64)


def key_without_the_flip(logits):
    return np.asarray(logits, np.float32).view(np.uint32)


def key_of_two_zeros(logits):
    bits = np.asarray(logits, np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


def radix_forgets_ties(*arguments):
    key, ties = RADIX(*arguments)
    return key, min(ties, 1)


def attend_to_a_token_too_many(query, keys, values, mask, **options):
    return ATTEND(query, keys, values, mask | (np.arange(mask.shape[-1]) == 0), **options)


def union_is_intersection(made, kv_heads):
    mask = selection._mask(made, made.indices.shape[-1]).all(axis=1, keepdims=True)
    return selection.Selection(*selection._lists(mask), made.mass)


def nominal_mass(p, tau, sigma):
    return p


def masses_of_all(logits, largest):
    return np.full(len(np.asarray(logits)), selection.ONE, np.uint64)


def fitted_a_little_less(*arguments, **options):
    return max(FITTED(*arguments, **options) - 2.0**-16, 2.0**-16)


def fitted_to_the_nominal_p(scores, exact, p, **options):
    return p


DEFECTS = [
    ("fitted_p", fitted_a_little_less, ["fitted p"]),
    ("fitted_p", fitted_to_the_nominal_p, ["fitted p", "fitted p holds for other queries"]),
    ("prefix_length", prefix_without_the_crossing_token, ["mass reached", "real mass"]),
    ("prefix_length", prefix_with_one_more, ["minimal"]),
    ("prefix_length", prefix_without_least, ["order"]),
    ("share", share_to_nearest, ["mass reached"]),
    ("ranking", ranking_prefers_late_tokens, ["order", "radix descent"]),
    ("middle", middle_without_blocks, ["order"]),
    ("masses", masses_too_sharp, ["mass reached", "real mass", "shift is calibrated"]),
    ("masses", masses_of_all, ["nominal p against achieved mass"]),
    ("gaussian_mass", nominal_mass, ["nominal p against achieved mass"]),
    ("order_key", key_without_the_flip, ["order of keys", "radix descent"]),
    ("order_key", key_of_two_zeros, ["order of keys"]),
    ("radix_threshold", radix_forgets_ties, ["radix descent"]),
    ("_corrected", corrected_by_half, ["shrink is calibrated", "shift is calibrated", "shift identity"]),
    ("_corrected", corrected_against_zero, ["constant"]),
    ("_corrected", corrected_to_the_mean, ["no noise"]),
    ("_corrected", corrected_never, ["shrink is calibrated", "shift is calibrated"]),
    ("attend", attend_to_a_token_too_many, ["pruning bound"]),
    ("union", union_is_intersection, ["union"]),
]


@pytest.mark.parametrize(("name", "defect", "found_by"), DEFECTS, ids=range(len(DEFECTS)))
def test_defect_is_found(monkeypatch, name, defect, found_by):
    assert all(find_without_defect("selection", claim).holds for claim in found_by)
    monkeypatch.setattr(selection, name, defect)
    missed = [claim for claim in found_by if find("selection", claim).holds]
    assert not missed


def test_every_claim_finds_a_defect():
    assert {c.name for c in claims.algorithms()["selection"]} == {name for _, _, names in DEFECTS for name in names}
