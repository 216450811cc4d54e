"""The reference of Self-Indexing: single tokens in plain numbers, printed tables, special keys, the sample, defects."""
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from kvbench import claims, data
from kvbench.reference import kivi, selection, self_indexing
from kvbench.reference.self_indexing import (build_codebook, build_tables, channel_scale, decode, encode, find_centre,
                                             find_sinks, freeze, pool, residual, score, selected_tokens,
                                             sparse_attention_packed)
from strategies.arrays import contents, dtypes, fill, seeds
from test_claims import find, find_without_defect


def filled(seed, shape, dtype="float16", content="normal"):
    return fill(np.random.default_rng([seed, 5]), shape, dtype, content)


# --- The definition, one number at a time ----------------------------------------------------------------------------


@given(seed=seeds, dtype=dtypes, content=contents, head_dim=st.sampled_from((32, 64)))
def test_codes_follow_the_definition(seed, dtype, content, head_dim):
    keys = filled(seed, (1, 2, 7, head_dim), dtype, content)
    mean, alpha = find_centre(keys), channel_scale(keys, find_centre(keys))
    encoded = encode(keys, mean, alpha)
    decoded, s = decode(encoded, alpha), encoded.magnitude.scale.astype(np.float64)
    m, codes = encoded.magnitude.minimum.astype(np.float64), kivi.unpack(encoded.magnitude.codes, 2)
    for h, t in np.ndindex(2, 7):
        for d in range(head_dim):
            k = np.float32(keys[0, h, t, d]) - mean[0, h, d]
            assert int(encoded.sign[0, h, t, d // 32]) >> d % 32 & 1 == int(k >= 0)
            a = np.float16(np.abs(k) * (np.float32(1) / alpha[0, h, d]))
            step, low = s[0, h, t, d // 32], m[0, h, t, d // 32]
            code = np.rint(np.clip((np.float32(a) - np.float32(low)) / np.float32(step), 0, 3)) if step else 0
            assert codes[0, h, t, d] == code
            assert decoded[0, h, t, d] == (1.0 if k >= 0 else -1.0) * float(alpha[0, h, d]) * (step * code + low)


@given(seed=seeds, content=contents, tokens=st.integers(1, 40))
def test_what_a_prompt_fixes_follows_the_definition(seed, content, tokens):
    keys, query = filled(seed, (1, 1, tokens, 32), "float16", content), filled(seed + 1, (1, 2, 32), "float32")
    frozen = freeze(keys, query, sink_count=3)
    k = keys[0, 0].astype(float)
    mean = [math.fsum(k[:, d]) / tokens for d in range(32)]
    np.testing.assert_allclose(frozen.mean[0, 0], mean, rtol=2.0**-23, atol=1e-30)
    centred = np.float32(keys[0, 0]) - frozen.mean[0, 0]
    u = centred.astype(float) @ query[0].astype(float).mean(axis=0)
    best = sorted(range(tokens), key=lambda t: (-np.float32(u[t]), t))[:3]
    assert [t for t in frozen.sinks[0, 0] if t >= 0] == sorted(best)
    rest = [t for t in range(tokens) if t not in best]
    for d in range(32):
        largest = max((abs(float(centred[t, d])) for t in rest), default=0.0)
        assert frozen.channel_scale[0, 0, d] == (largest if largest >= 2.0**-100 else 1)
        g, i = divmod(d, 4)
        clusters = {c: [] for c in range(16)}
        for t in rest:
            clusters[sum(int(centred[t, 4 * g + j] >= 0) << j for j in range(4))].append(float(centred[t, d]))
        size = math.fsum(map(abs, (float(centred[t, d]) for t in rest))) / max(len(rest), 1)
        for c, members in clusters.items():
            expected = math.fsum(members) / len(members) if members else size if c >> i & 1 else -size
            assert frozen.codebook[0, 0, g, c, i] == pytest.approx(expected, rel=2.0**-22, abs=1e-30)


@given(seed=seeds)
def test_scores_follow_the_definition(seed):
    rng = np.random.default_rng(seed)
    query, sign = rng.standard_normal((2, 4, 32)), rng.integers(0, 2**32, (2, 2, 3, 1), dtype=np.uint32)
    codebook = rng.standard_normal((2, 2, 8, 16, 4)).astype(np.float32)
    excluded, lengths = np.array([[[2], [-1]], [[0], [7]]]), np.array([3, 2])
    for heads in self_indexing.TABLES:
        made = score(query, sign, codebook, heads=heads, lengths=lengths, excluded=excluded, scale=0.5)
        tables = build_tables(query, codebook, heads=heads, scale=0.5)
        for b, h, t in np.ndindex(made.shape):
            g = h if heads == "mean" else h // 2
            q = query[b, 2 * g : 2 * g + 2].mean(axis=0) if heads == "mean" else query[b, h]
            total = 0.0
            for j in range(8):
                c = int(sign[b, g, t, 0]) >> 4 * j & 15
                look_up = 0.5 * math.fsum(q[4 * j : 4 * j + 4] * codebook[b, g, j, c])
                assert tables[b, h, j, c] == pytest.approx(look_up, abs=1e-14)
                total += look_up
            gone = t >= lengths[b] or t in excluded[b, g]
            assert made[b, h, t] == (-math.inf if gone else pytest.approx(total, abs=1e-13))


def test_pooled_scores_are_sums_of_softmax():
    scores = np.random.default_rng(0).standard_normal((2, 6, 9)) * 5
    scores[:, :, 4] = -np.inf
    expected = np.log(special.softmax(scores, axis=-1).reshape(2, 3, 2, 9).sum(axis=2), where=np.arange(9) != 4,
                      out=np.full((2, 3, 9), -np.inf))
    np.testing.assert_allclose(pool(scores, 3), expected, rtol=1e-12)
    assert np.isneginf(pool(np.full((1, 2, 3), -np.inf), 1)).all()
    assert pool(np.zeros((1, 2, 0)), 1).shape == (1, 1, 0)


# --- Printed tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "size"), [(64, 56), (128, 112), (256, 224)])
def test_bytes_are_as_printed(head_dim, size):
    keys = np.zeros((1, 1, 5, head_dim), np.float16)
    frozen = freeze(keys, sinks="none")
    encoded, values = encode(keys, frozen.mean, frozen.channel_scale), kivi.encode_values(keys, 2, 32)
    assert encoded.nbytes + values.nbytes == 5 * size and encoded.sign.nbytes == 5 * head_dim // 8
    assert (encoded.bits_per_element + values.bits_per_element) / 32 == 7 / 32          # 21.9 % of float16
    assert frozen.codebook.nbytes == 64 * head_dim


@pytest.mark.parametrize(("tokens", "size"), [(4096, 493_056), (32768, 3_704_320)])
def test_the_size_of_a_cache_is_as_printed(tokens, size):
    """Sinks leave the store there; here they stay in it, 112 bytes each, and mu and alpha are float32, not float16."""
    sinks, frozen, stored = 64 * 4 * 128, 64 * 128 + 4 * 128, 112 * (tokens - 64)
    assert stored + sinks + frozen == size
    here = 112 * tokens + sinks + 72 * 128
    assert here - size == 64 * 112 + 4 * 128
    assert here < 1.02 * size


def test_distortions_are_as_printed():
    """One alpha for each channel, the largest of its T numbers, costs a little more than one for all."""
    keys = np.random.default_rng(0).standard_normal((1, 1, 16384, 128), np.float32)
    zero = np.zeros((1, 128), np.float32)
    alpha = channel_scale(keys, zero)
    error = ((keys - decode(encode(keys, zero, alpha), alpha)) ** 2).mean()
    assert error == pytest.approx(0.050, rel=0.03)
    assert self_indexing.half_normal_distortion() == pytest.approx(0.0481, abs=5e-5)


def test_budgets_are_as_printed():
    assert selected_tokens(160, 7168, 64) == 96
    assert selected_tokens(0.075, 7168, 64) == 538 - 64
    assert selected_tokens(0.07, 100, 0) == 7
    assert [selected_tokens(budget, 100, 64) for budget in (0, 10, 64, 65, 100, 1000, 1.0)] == [0, 0, 0, 1, 36, 36, 36]


# --- Special keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", self_indexing.CENTRES)
def test_equal_keys_and_zeros(centre):
    keys = np.full((1, 1, 6, 32), 3, np.float16)
    frozen = freeze(keys, sinks="none", centre=centre)
    encoded = encode(keys, frozen.mean, frozen.channel_scale)
    assert (encoded.sign == 2**32 - 1).all()                              # zero is positive, of either sign
    np.testing.assert_array_equal(decode(encoded, frozen.channel_scale), residual(keys, frozen.mean))
    assert (frozen.channel_scale == (3 if centre == "none" else 1)).all()
    negative = encode(-np.zeros_like(keys), np.zeros((1, 32)), np.ones((1, 32)))
    assert (negative.sign == 2**32 - 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_in_their_token(bad):
    keys, query = filled(0, (1, 2, 40, 64)), filled(1, (1, 4, 64))
    keys[0, 1, 7] = 0
    clean = freeze(np.delete(keys, 7, axis=2), query, sink_count=3)
    keys[0, 1, 7, 5] = bad
    frozen = freeze(keys, query, sink_count=3)
    for name in ("mean", "channel_scale", "codebook"):
        assert (getattr(frozen, name)[0, 1] == getattr(clean, name)[0, 1]).all()
    assert 7 not in frozen.sinks[0, 1]
    encoded = encode(keys, frozen.mean, frozen.channel_scale)
    assert not encoded.sign[0, 1, 7].any() and not decode(encoded, frozen.channel_scale)[0, 1, 7].any()
    assert np.isfinite(score(query, encoded.sign, frozen.codebook)).all()
    with pytest.raises(ValueError, match=r"x: expected finite numbers, .* = \[0, 1, 7\]"):
        encode(keys, frozen.mean, frozen.channel_scale, check_finite=True)


def test_prompts_shorter_than_the_sinks():
    """Everything is exact: statistics of nothing, no token to select, and attention to the sinks alone."""
    keys, query = filled(0, (1, 1, 5, 32)), filled(1, (1, 2, 32))
    for sinks in ("topk_last_query", "first"):
        frozen = freeze(keys, query, sinks=sinks, sink_count=8)
        assert frozen.sinks[0, 0].tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
        assert (frozen.channel_scale == 1).all() and not frozen.codebook.any()
        encoded = encode(keys, frozen.mean, frozen.channel_scale)
        scores = score(query, encoded.sign, frozen.codebook, excluded=frozen.sinks)
        assert np.isneginf(scores).all() and selected_tokens(160, 5, 5) == 0
        chosen = selection.top_k(selection.Scores(scores.astype(np.float32)), 3, sinks=0, recent=0)
        assert not chosen.counts.any()
        values = filled(2, keys.shape)
        output = sparse_attention_packed(query, encoded, kivi.encode_values(values, 2, 32), frozen.channel_scale,
                                         chosen.indices, chosen.counts, exact_keys=keys, exact_values=values,
                                         return_lse=False)
        expected = special.softmax(query[0].astype(float) @ keys[0, 0].T.astype(float) / 32**0.5, axis=-1)
        np.testing.assert_allclose(output[0], expected @ values[0, 0].astype(float), atol=1e-12)
    empty = freeze(keys[:, :, :0], sinks="first", sink_count=2)
    assert not empty.mean.any() and (empty.sinks == -1).all()


def test_nothing_to_attend_to():
    keys = encode(np.ones((1, 1, 3, 32)), np.zeros((1, 32)), np.ones((1, 32)))
    values = kivi.encode_values(np.ones((1, 1, 3, 32)), 2, 32)
    output, lse = sparse_attention_packed(np.ones((1, 1, 32)), keys, values, np.ones((1, 1, 32)),
                                          np.array([[[-1, 3, 2]]]), np.array([[2]]))
    assert not output.any() and np.isneginf(lse).all()                    # positions outside the store are none


def test_keys_far_outside_the_range_of_the_prompt():
    """Up to 65504 times alpha the bound holds; beyond it the magnitude stays there, in its sign."""
    alpha = np.full((1, 32), 2.0**-10, np.float32)
    keys = np.linspace(-1, 1, 32)[None, None, None] * np.array([60.0, 1000.0])[:, None][None, None]
    encoded = encode(keys, np.zeros((1, 32)), alpha)
    error = np.abs(decode(encoded, alpha) - keys.astype(np.float32))
    bound = self_indexing.error_bound(keys, np.zeros((1, 32)), encoded, alpha)
    assert (error[0, 0, 0] <= bound[0, 0, 0]).all()
    assert (np.abs(decode(encoded, alpha)[0, 0, 1]) <= 65504 * 2.0**-10 * (1 + 2.0**-10)).all()
    assert (np.sign(decode(encoded, alpha)[0, 0, 1]) == np.sign(keys[0, 0, 1])).all()


def test_median_of_an_even_number_is_the_lower():
    keys = np.broadcast_to(np.array([4.0, 1, 3, 2])[:, None], (1, 1, 4, 32))
    assert (find_centre(keys, "median") == 2).all() and (find_centre(keys) == 2.5).all()
    assert not find_centre(keys, "none").any()
    assert find_sinks(keys, find_centre(keys), np.ones((1, 1, 32)), count=2).tolist() == [[[0, 2]]]
    assert find_sinks(keys, find_centre(keys), -np.ones((1, 1, 32)), count=2).tolist() == [[[1, 3]]]
    assert find_sinks(keys, find_centre(keys), sinks="first", count=2).tolist() == [[[0, 1]]]
    assert find_sinks(keys, find_centre(keys), sinks="none").shape == (1, 1, 0)
    assert find_sinks(0 * keys, find_centre(keys), np.ones((1, 1, 32)), count=2).tolist() == [[[0, 1]]]      # ties


# --- Real keys -------------------------------------------------------------------------------------------------------


def test_the_sample_is_ranked_as_the_authors_found():
    """Softmax mass of what is attended, mean over heads and steps: sinks alone < signs < exact scores < oracle."""
    sample = data.sample()
    tokens = int(sample.positions[0])
    keys, queries = sample.keys[:, :, :tokens], sample.queries.astype(np.float64)
    group, steps = queries.shape[1], queries.shape[2]
    mass = {}
    for centre in ("mean", "median"):
        frozen = freeze(keys, queries[:, :, 0], centre=centre)
        encoded = encode(keys, frozen.mean, frozen.channel_scale)
        exact = np.zeros(tokens, bool)
        exact[frozen.sinks[0, 0]] = True
        centred = residual(keys, frozen.mean)[0, 0].astype(np.float64)
        for step in range(1, steps, max(steps // 8, 1)):
            query = queries[:, :, step]
            weights = special.softmax(query[0] @ keys[0, 0].T.astype(np.float64) * query.shape[2] ** -0.5, axis=-1)
            ranked = {centre: score(query, encoded.sign, frozen.codebook)[0, 0],
                      "each": pool(score(query, encoded.sign, frozen.codebook, heads="each",
                                         scale=query.shape[2] ** -0.5), 1)[0, 0],
                      "exact": centred @ query[0].mean(axis=0), "oracle": weights.mean(axis=0)}
            for budget in (64, 160, 0.075):
                for name, scores in ranked.items():
                    chosen = np.argsort(np.where(exact, np.inf, scores))[::-1][: 64 + selected_tokens(budget, tokens,
                                                                                                       64)]
                    mass.setdefault((name, budget), []).append(weights[:, chosen].sum() / group)
    mass = {name: np.mean(found) for name, found in mass.items()}
    for budget in (160, 0.075):
        alone, coarse = mass["mean", 64], mass["mean", budget]
        assert alone < coarse < mass["exact", budget] < mass["oracle", budget]
        assert coarse - alone > 0.25 * (mass["oracle", budget] - alone)
        assert mass["median", budget] == pytest.approx(coarse, abs=0.03)
        assert mass["each", budget] == pytest.approx(coarse, abs=0.03)
    assert mass["mean", 160] < mass["mean", 0.075]


# --- Bad input -------------------------------------------------------------------------------------------------------

KEYS, QUERY = np.ones((2, 3, 4, 64), np.float16), np.ones((2, 6, 64), np.float16)
FROZEN = freeze(KEYS, QUERY)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: freeze(KEYS[0]), r"keys: expected \[batch, kv_heads, tokens, head_dim\], .* got \[3, 4, 64\]"),
    (lambda: freeze(KEYS[..., :20]), r"head_dim a multiple of 32, got \[2, 3, 4, 20\]"),
    (lambda: freeze(KEYS), r"query: expected .* = \[2, a multiple of 3, 64\], got None"),
    (lambda: freeze(KEYS, QUERY[:, :5]), r"query: expected .* = \[2, a multiple of 3, 64\], got \[2, 5, 64\]"),
    (lambda: freeze(KEYS, QUERY, centre="mode"), "centre: expected one of mean, median, none, got 'mode'"),
    (lambda: freeze(KEYS, QUERY, sinks="last"), "sinks: expected one of topk_last_query, first, none, got 'last'"),
    (lambda: freeze(KEYS, QUERY, sink_count=-1), "count: expected an integer of at least 0, got -1"),
    (lambda: freeze(KEYS, QUERY, lengths=[4, 5]), r"lengths: expected \[2\] integers from 0 to 4, got \[4, 5\]"),
    (lambda: encode(KEYS, FROZEN.mean, 0 * FROZEN.channel_scale), "channel_scale: expected positive .* got 0.0"),
    (lambda: build_tables(QUERY, FROZEN.codebook, heads="all"), "heads: expected one of mean, each, got 'all'"),
    (lambda: selected_tokens(1.5, 10, 0), "budget: expected a ratio from 0.0 to 1.0 or a count, got 1.5"),
    (lambda: selected_tokens(-1, 10, 0), "budget: expected an integer of at least 0, got -1"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Defects that the claims find ------------------------------------------------------------------------------------

ENCODE, SCORE, CODEBOOK, CENTRE = encode, score, build_codebook, find_centre
SCALE, ATTEND, SELECTED, CODES = channel_scale, sparse_attention_packed, selected_tokens, self_indexing.codes


def encode_by_magnitude(keys, mean, alpha, **options):
    """Codes of the next token: the signs of one and the magnitudes of another."""
    made = ENCODE(keys, mean, alpha, **options)
    return dataclasses.replace(made, sign=np.roll(made.sign, 1, axis=2))


def encode_by_its_own_range(keys, mean, alpha, **options):
    """alpha of the keys at hand, not the frozen one."""
    return ENCODE(keys, mean, SCALE(np.asarray(keys), mean), **options)


def encode_within_the_range(keys, mean, alpha, **options):
    limit = np.asarray(alpha)[..., None, :]
    return ENCODE(np.clip(residual(keys, mean), -limit, limit) + np.asarray(mean)[..., None, :], mean, alpha, **options)


def score_without_sharing(query, sign, codebook, *, heads="mean", **options):
    """The first head of each group in place of their mean."""
    own = np.shape(query)[1] // sign.shape[1]
    return SCORE(query[:, ::own] if heads == "mean" else query, sign, codebook, heads=heads, **options)


def codebook_of_all_tokens(keys, mean, *, excluded=None, lengths=None):
    return CODEBOOK(keys, mean)


def codebook_with_zeros(keys, mean, **options):
    made = CODEBOOK(keys, mean, **options)
    positive = np.arange(16)[:, None] >> np.arange(4) & 1 == 1
    opposite = np.abs(made).max(axis=-2, keepdims=True) * np.where(positive, 1, -1)
    return np.where(made == opposite, 0, made)


def codebook_too_large(keys, mean, **options):
    return CODEBOOK(keys, mean, **options) * np.float32(1.5)


def centre_of_all(keys, centre="mean", *, lengths=None):
    return CENTRE(np.where(np.isfinite(keys), keys, 0), centre)


def attend_without_mean(*arguments, mean=None, **options):
    return ATTEND(*arguments, **options)


def attend_to_one_less(query, keys, values, alpha, indices, counts, **options):
    return ATTEND(query, keys, values, alpha, indices, np.asarray(counts) - 1, **options)


def selected_of_floats(budget, tokens, exact):
    if isinstance(budget, float):
        budget = math.ceil(budget * tokens)
    return int(np.clip(budget - exact, 0, max(tokens - exact, 0)))


def codes_backwards(sign):
    made = CODES(sign)
    return made >> 3 | made >> 1 & 2 | made << 1 & 4 | made << 3 & 8


DEFECTS = [
    ("encode", encode_by_magnitude, ["error", "residuals"]),
    ("encode", encode_by_its_own_range, ["append"]),
    ("encode", encode_within_the_range, ["error"]),
    ("score", score_without_sharing, ["score is a product", "mean query"]),
    ("build_codebook", codebook_of_all_tokens, ["padding"]),
    ("build_codebook", codebook_with_zeros, ["empty clusters"]),
    ("build_codebook", codebook_too_large, ["residuals", "distortion"]),
    ("find_centre", centre_of_all, ["padding"]),
    ("find_centre", lambda *arguments, **options: 1 + CENTRE(*arguments, **options), ["balanced signs"]),
    ("sparse_attention_packed", attend_without_mean, ["attention", "all selected"]),
    ("sparse_attention_packed", attend_to_one_less, ["attention", "all selected"]),
    ("selected_tokens", selected_of_floats, ["budgets"]),
    ("codes", codes_backwards, ["order of the bits", "operands"]),
    ("half_normal_distortion", lambda group=32: kivi.normal_distortion(2, 32), ["distortion"]),
    ("GROUP", 64, ["bytes"]),
]


@pytest.mark.parametrize(("name", "defect", "found_by"), DEFECTS, ids=range(len(DEFECTS)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_defect_is_found(monkeypatch, name, defect, found_by):
    assert all(find_without_defect("self_indexing", claim).holds for claim in found_by)
    monkeypatch.setattr(self_indexing, name, defect)
    missed = [claim for claim in found_by if finds_nothing(claim)]
    assert not missed


def finds_nothing(claim):
    try:
        return find("self_indexing", claim).holds
    except ValueError:                                                    # refused by a check of the arguments
        return False


def test_defects_of_attention_are_found(monkeypatch):
    """Claims about attention itself: an output that is no convex combination of values."""
    real = self_indexing.attention.decode

    def doubled(*arguments, **options):
        output, lse = real(*arguments, **options)
        return output * (1 + np.abs(arguments[1]).max()), lse - 0.1 * np.abs(arguments[1]).mean()

    assert all(find_without_defect("self_indexing", name).holds for name in ("mass bound", "centring"))
    monkeypatch.setattr(self_indexing.attention, "decode", doubled)
    assert not find("self_indexing", "mass bound").holds and not find("self_indexing", "centring").holds


def test_every_claim_finds_a_defect():
    found = {name for _, _, names in DEFECTS for name in names} | {"mass bound", "centring"}
    assert {c.name for c in claims.algorithms()["self_indexing"]} == found
