"""The reference of Quest pages and of Twilight: the definition in plain Python, special keys, and defects found."""
import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import claims
from kvbench.reference import quest
from kvbench.reference.quest import append, bounds, encode, encode_int4, kept_tokens, score_int4, select_pages, twilight
from kvbench.reference.selection import Scores, top_p
from test_claims import find, find_without_defect

SEEDS = st.integers(0, 2**32)
DTYPES = st.sampled_from((np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
CONTENTS = st.sampled_from(("normal", "equal", "zeros", "huge", "subnormal", "NaN", "infinite"))


def vectors(seed, shape, dtype=np.float32, content="normal"):
    rng = np.random.default_rng([seed, 7])
    x = rng.standard_normal(shape)
    x = {"normal": x, "equal": 0 * x + 1.3, "zeros": np.copysign(0.0, x), "huge": 1e4 * x, "subnormal": 1e-7 * x,
         "NaN": np.where(rng.random(shape) < 0.2, np.nan, x),
         "infinite": np.where(rng.random(shape) < 0.05, np.copysign(np.inf, x), x)}[content]
    return x.astype(dtype)


# --- Quest -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, dtype=DTYPES, content=CONTENTS, page=st.sampled_from((1, 3, 16)), tokens=st.integers(0, 40))
def test_pages_and_bounds_follow_the_definition(seed, dtype, content, page, tokens):
    keys, query = vectors(seed, (2, 2, tokens, 5), dtype, content), vectors(seed + 1, (2, 4, 5))
    lengths = np.random.default_rng(seed).integers(0, tokens + 1, 2)
    pages = encode(keys, page=page, lengths=lengths)
    assert pages.low.dtype == pages.high.dtype == keys.dtype
    assert pages.low.shape == (2, 2, -(-int(lengths.max()) // page), 5) and pages.lengths.tolist() == lengths.tolist()
    u, products = bounds(query, pages), np.full((2, 4, pages.low.shape[2]), -np.inf)
    for b, g in np.ndindex(2, pages.low.shape[2]):
        rows = keys[b, :, g * page : min((g + 1) * page, lengths[b])].astype(float)
        for h, i in np.ndindex(2, 5):
            numbers = [value for value in rows[h, :, i].tolist() if not math.isnan(value)]
            low, high = float(pages.low[b, h, g, i]), float(pages.high[b, h, g, i])
            assert (low, high) == (min(numbers), max(numbers)) if numbers else math.isnan(low) and math.isnan(high)
        for h in range(4):
            if len(rows[0]) and np.isfinite(rows).all():
                products[b, h, g] = max(rows[h // 2] @ query[b, h].astype(float))
                expected = math.fsum(max(q * low, q * high) for q, low, high in zip(
                    query[b, h].astype(float), pages.low[b, h // 2, g].astype(float),
                    pages.high[b, h // 2, g].astype(float)))
                assert u[b, h, g] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert (u + 1e-9 * np.abs(np.nan_to_num(u)) >= products)[np.isfinite(u)].all()


@given(seed=SEEDS, content=CONTENTS, cuts=st.lists(st.integers(0, 60), max_size=5), dtype=DTYPES)
def test_any_split_gives_the_same_bits(seed, content, cuts, dtype):
    keys = vectors(seed, (2, 2, 60, 5), dtype, content)
    pages, whole = encode(keys[:, :, :0]), encode(keys)
    cuts = [0, *sorted(cuts), 60]
    for start, stop in zip(cuts, cuts[1:]):
        pages = append(pages, keys[:, :, start:stop])
    assert pages.low.tobytes() == whole.low.tobytes() and pages.high.tobytes() == whole.high.tobytes()


def test_ragged_appends():
    keys = vectors(0, (2, 1, 20, 4))
    pages = append(encode(keys[:, :, :7], page=4, lengths=np.array([7, 2])), keys[:, :, 7:], lengths=np.array([1, 9]))
    assert pages.lengths.tolist() == [8, 11] and pages.low.shape[2] == 3 and np.isnan(pages.low[0, 0, 2]).all()
    second = np.concatenate([keys[1, 0, :2], keys[1, 0, 7:16]])
    for g in range(3):
        assert (pages.low[1, 0, g] == second[4 * g : 4 * g + 4].min(axis=0)).all()


def test_one_bad_key_does_not_spoil_its_page():
    keys = vectors(0, (1, 1, 32, 4))
    expected = encode(np.delete(keys, 5, axis=2)[:, :, :15])
    keys[0, 0, 5] = np.nan
    pages = encode(keys)
    assert (pages.low[0, 0, 0] == expected.low[0, 0, 0]).all()
    keys[0, 0, :16] = np.nan
    keys = np.concatenate([keys, keys[:, :, 16:]], axis=2)
    pages = encode(keys)
    scores = quest.score(vectors(1, (1, 2, 4)), pages)
    assert np.isnan(scores.logits[..., 0]).all()
    assert select_pages(scores, pages, 48).indices[0, 0, :2].tolist() == [1, -1]


def test_selection_of_pages():
    """Six pages of 4, the last of one token; budgets are rounded up, ties go to the lower page."""
    pages = encode(vectors(0, (1, 1, 21, 4)), page=4)
    scores = Scores(np.float32([[[5, 1, 7, 7, 2, 0]]]))

    def tokens(budget, **options):
        mask = kept_tokens(select_pages(scores, pages, budget, **options), pages, 24, **options)
        return sorted({int(t) // 4 for t in np.flatnonzero(mask[0, 0])}), int(mask.sum())

    assert tokens(0) == ([5], 1) and tokens(1) == ([2, 5], 5) and tokens(5) == ([2, 3, 5], 9)
    assert tokens(0, sinks=1) == ([0, 5], 5) and tokens(0, sinks=5, recent=2) == ([0, 1, 4, 5], 13)
    assert tokens(4, sinks=12) == ([0, 1, 2, 3, 5], 17) and tokens(21) == ([0, 1, 2, 3, 4, 5], 21)


@pytest.mark.parametrize(("head_dim", "printed"), [(64, 16), (128, 32)])
def test_bytes_are_as_printed(head_dim, printed):
    keys = np.zeros((1, 2, 64, head_dim), np.float16)
    assert encode(keys).nbytes == 2 * 64 * printed
    assert encode_int4(keys).nbytes == 2 * 64 * (head_dim // 2 + 4)


# --- Keys of four bits -----------------------------------------------------------------------------------------------


@given(seed=SEEDS, dtype=DTYPES, content=CONTENTS, head_dim=st.sampled_from((1, 2, 8, 13, 64)))
def test_four_bits_follow_the_definition(seed, dtype, content, head_dim):
    keys, query = vectors(seed, (1, 2, 4, head_dim), dtype, content), vectors(seed + 1, (1, 4, head_dim))
    encoded = encode_int4(keys)
    assert encoded.codes.dtype == np.uint32 and encoded.step.dtype == encoded.low.dtype == np.float16
    scores, decoded = score_int4(query, encoded), quest.decode_int4(encoded)
    for h, t in np.ndindex(2, 4):
        key, words = keys[0, h, t].astype(float), encoded.codes[0, h, t].tolist()
        codes = [words[i // 8] >> 4 * (i % 8) & 15 for i in range(8 * len(words))]
        assert not any(codes[head_dim:])
        if not np.isfinite(key).all():
            assert not any(codes) and np.isnan(encoded.step[0, h, t]) and np.isnan(scores.logits[0, 2 * h, t])
            continue
        step, low = float(np.float16((max(key) - min(key)) / 15)), float(np.float16(min(key)))
        assert (float(encoded.step[0, h, t]), float(encoded.low[0, h, t])) == (step, low)
        expected = [0 if step == 0 else int(np.clip(np.rint((value - low) / step), 0, 15)) for value in key]
        assert codes[:head_dim] == expected
        np.testing.assert_allclose(decoded[0, h, t], step * np.array(expected) + low)
        for head in (2 * h, 2 * h + 1):
            q = query[0, head].astype(float)
            exact, size = head_dim**-0.5 * (q @ decoded[0, h, t]), np.abs(q).sum() * (np.abs(key).max() + 1e-30)
            assert abs(scores.logits[0, head, t] - exact) <= 1e-6 * size
            noise = head_dim**-0.5 * step * np.linalg.norm(q) / 12**0.5
            assert scores.sigma[0, head, t] == pytest.approx(noise, rel=1e-6, abs=1e-30)


def test_no_tokens():
    query, nothing = vectors(0, (2, 4, 8)), np.zeros((2, 2, 0, 8), np.float16)
    pages = encode(nothing)
    assert bounds(query, pages).shape == (2, 4, 0) and pages.nbytes == 0
    made = select_pages(quest.score(query, pages), pages, 100)
    assert not made.counts.any() and kept_tokens(made, pages, 0).shape == (2, 4, 0)
    assert score_int4(query, encode_int4(nothing)).logits.shape == (2, 4, 0)


def test_twilight_prunes_the_pages_of_quest():
    keys, query = vectors(0, (1, 2, 200, 16)), 3 * vectors(1, (1, 4, 16))
    pages, scores = encode(keys), score_int4(query, encode_int4(keys))
    candidates = kept_tokens(select_pages(quest.score(query, pages), pages, 64), pages, 200)
    assert (candidates.sum(axis=-1) == 64 + 8).all()
    window = {"sinks": 0, "recent": 0}
    pruned = twilight(scores, 0.85, candidates=candidates, **window)
    everything = twilight(scores, 0.85, **window)
    assert (everything.indices == top_p(scores, 0.85, **window).indices).all()
    for h in range(4):
        chosen = pruned.indices[0, h, : pruned.counts[0, h]]
        assert candidates[0, h, chosen].all() and 0 < len(chosen) < 72 and pruned.mass[0, h] >= 0.85
        # Within the candidates nothing better was left out.
        left = [t for t in np.flatnonzero(candidates[0, h]) if t not in chosen]
        assert scores.logits[0, h, chosen].min() >= scores.logits[0, h, left].max()


GOOD, QUERY = vectors(0, (2, 3, 40, 8)), vectors(1, (2, 6, 8))
PAGES = encode(GOOD)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: encode(GOOD[0]), r"keys: expected \[batch, kv_heads, tokens, head_dim\], got \[3, 40, 8\]"),
    (lambda: encode(GOOD, page=0), "page: expected an integer of at least 1, got 0"),
    (lambda: encode(GOOD, lengths=np.array([1, 41])), r"lengths: expected integers \[2\] from 0 to 40, got int64"),
    (lambda: append(PAGES, GOOD.astype(np.float16)), "keys: expected float32 .* as the pages hold, got float16"),
    (lambda: append(PAGES, GOOD[:, :2]), r"keys: expected float32 \[2, 3, tokens, 8\] .* got .* \[2, 2, 40, 8\]"),
    (lambda: bounds(QUERY[:, :5], PAGES), r"query: .* = \[2, a multiple of 3, 8\], got \[2, 5, 8\]"),
    (lambda: quest.score(QUERY, PAGES, scale=-1), "scale: expected a number of at least 0, got -1.0; U is no bound"),
    (lambda: select_pages(quest.score(QUERY, PAGES), PAGES, 16, sinks=-1), "sinks: expected an integer of at least 0"),
    (lambda: select_pages(quest.score(QUERY, PAGES), PAGES, -16), "budget: expected an integer of at least 0, got -16"),
    (lambda: twilight(score_int4(QUERY, encode_int4(GOOD)), candidates=np.ones((2, 3, 40), bool)),
     r"candidates: expected the shape of the logits, \[2, 6, 40\], got \[2, 3, 40\]"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Defects that the claims find ------------------------------------------------------------------------------------

BOUNDS, APPEND, KEPT, ENCODE_INT4, SCORE_INT4, TWILIGHT = (quest.bounds, quest.append, quest.kept_tokens,
                                                           quest.encode_int4, quest.score_int4, quest.twilight)


def bounds_of_the_middle(query, pages):
    middle = ((pages.low + pages.high) / 2).astype(pages.low.dtype)
    return BOUNDS(query, dataclasses.replace(pages, low=middle, high=middle))


def bounds_swapped(query, pages):
    return BOUNDS(query, dataclasses.replace(pages, low=pages.high, high=pages.low))


def append_starts_a_page(pages, keys, *, lengths=None):
    """The page that was being filled is closed early."""
    closed = dataclasses.replace(pages, lengths=-(-pages.lengths // pages.page) * pages.page)
    made = APPEND(closed, keys, lengths=lengths)
    return dataclasses.replace(made, lengths=made.lengths - closed.lengths + pages.lengths)


def append_keeps_the_first(pages, keys, *, lengths=None):
    made = APPEND(pages, keys, lengths=lengths)
    first = keys[:, :, :: pages.page]
    low = made.low.copy()
    low[:, :, : first.shape[2]] = first[:, :, : low.shape[2]]
    return dataclasses.replace(made, low=low)


def kept_without_the_newest(*arguments, **options):
    mask = KEPT(*arguments, **options)
    mask[..., -1] = False
    return mask


def int4_of_three_bits(keys):
    made = ENCODE_INT4(keys)
    return dataclasses.replace(made, codes=made.codes & np.uint32(0xEEEEEEEE))


def score_without_the_low_end(query, encoded, **options):
    return SCORE_INT4(query, dataclasses.replace(encoded, low=encoded.low * np.float16(0)), **options)


def twilight_of_all_tokens(scores, p=0.85, *, candidates=None, **options):
    return TWILIGHT(scores, p, **options)


def twilight_with_less(scores, p=0.85, **options):
    return TWILIGHT(scores, p * 0.8, **options)


def twilight_with_more(scores, p=0.85, **options):
    return TWILIGHT(scores, min(1.0, p * 1.1), **options)


DEFECTS = [
    ("bounds", bounds_of_the_middle, ["upper bound", "two forms"]),
    ("bounds", bounds_swapped, ["upper bound", "two forms"]),
    ("append", append_starts_a_page, ["incremental"]),
    ("append", append_keeps_the_first, ["incremental", "permutation"]),
    ("kept_tokens", kept_without_the_newest, ["whole budget", "order of pages"]),
    ("encode_int4", int4_of_three_bits, ["four bits", "noise of four bits"]),
    ("score_int4", score_without_the_low_end, ["four bits"]),
    ("twilight", twilight_of_all_tokens, ["twilight"]),
    ("twilight", twilight_with_less, ["twilight"]),
    ("twilight", twilight_with_more, ["twilight"]),
]


@pytest.mark.parametrize(("name", "defect", "found_by"), DEFECTS, ids=range(len(DEFECTS)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_defect_is_found(monkeypatch, name, defect, found_by):
    assert all(find_without_defect("quest", claim).holds for claim in found_by)
    monkeypatch.setattr(quest, name, defect)
    missed = [claim for claim in found_by if find("quest", claim).holds]
    assert not missed


def test_every_claim_finds_a_defect():
    assert {c.name for c in claims.algorithms()["quest"]} == {name for _, _, names in DEFECTS for name in names}
