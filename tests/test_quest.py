"""Quest operators: stores, edges and errors that drawn inputs of test_kernels.py do not single out."""
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import TESTED_BACKENDS, needs
from kvbench import arrays, trees
from kvbench.ops import quest
from kvbench.reference.quest import Pages
from kvbench.verify import to_host
from strategies.arrays import NUMPY_TYPE, fill, groups, head_dims, seeds

BACKENDS = [needs(backend) for backend in TESTED_BACKENDS]
dtypes = st.sampled_from(sorted(NUMPY_TYPE))


def on(backend, tree):
    """NumPy arrays, in containers too, where the backend can reach them."""
    if backend not in ("cuda", "native"):
        return tree
    return trees.apply(lambda path, array: arrays.upload(array, "cuda").give(), tree)


def normal(seed, shape, dtype="float16"):
    return fill(np.random.default_rng(seed), shape, dtype, "normal")


def encode(backend, keys, **options):
    options = {name: on(backend, value) if name == "lengths" else value for name, value in options.items()}
    return to_host(quest.encode(on(backend, keys), **options, backend=backend))


def score(backend, query, pages, **options):
    return to_host(quest.score(on(backend, query), on(backend, pages), **options, backend=backend)).logits


@pytest.mark.parametrize("backend", BACKENDS)
@given(head_dim=head_dims, dtype=dtypes, seed=seeds, page=st.sampled_from((1, 5, 16)), data=st.data())
def test_whole_pages_are_encoded_in_place_in_any_portions(backend, head_dim, dtype, seed, page, data):
    """Into slices of a larger store, of which nothing else changes: the bytes of one call."""
    count, start = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3))
    keys = normal(seed, (2, 3, count * page, head_dim), dtype)
    expected = encode(backend, keys, page=page)
    store = [normal(seed + i, (3, 3, 12, head_dim), dtype) for i in range(2)]
    shadow = [array.copy() for array in store]
    for array, made in zip(shadow, (expected.low, expected.high)):
        array[1:, :, start:start + count] = made
    low, high = on(backend, store)
    keys = on(backend, keys)
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=3))})
    for first, last in itertools.pairwise(cuts):
        out = Pages(*(array[1:, :, start + first:start + last] for array in (low, high)), None, page)
        assert quest.encode(keys[:, :, first * page:last * page], page=page, out=out, backend=backend) is out
    for array, made in zip(shadow, to_host((low, high))):
        assert array.tobytes() == made.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, dtype=dtypes, head_dim=head_dims)
def test_the_order_of_tokens_in_a_page_does_not_matter(backend, seed, dtype, head_dim):
    keys, rng = normal(seed, (1, 2, 48, head_dim), dtype), np.random.default_rng(seed)
    keys[..., 0] = rng.choice([0.0, -0.0], keys.shape[:-1])                 # both zeros are +0
    shuffled = rng.permuted(keys.reshape(1, 2, 3, 16, head_dim), axis=3).reshape(keys.shape)
    one, other = encode(backend, keys), encode(backend, shuffled)
    assert one.low.tobytes() == other.low.tobytes() and one.high.tobytes() == other.high.tobytes()
    assert not np.signbit(one.low[..., 0].astype(np.float32)).any()


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, group=groups, head_dim=head_dims, page=st.sampled_from((1, 16)), dtype=dtypes)
def test_bounds_hold_and_are_reached_by_pages_of_one_token(backend, seed, group, head_dim, page, dtype):
    keys, query = normal(seed, (1, 2, 40, head_dim), dtype), normal(seed + 1, (1, 2 * group, head_dim), dtype)
    pages = encode(backend, keys, page=page)
    bounds = score(backend, query, pages, scale=1.0, tokens=40).astype(np.float64)
    heads = np.repeat(keys.astype(np.float64), group, axis=1)
    exact = np.einsum("bhd,bhtd->bht", query.astype(np.float64), heads)
    largest = np.maximum(np.abs(pages.low.astype(np.float64)), np.abs(pages.high.astype(np.float64)))
    largest = np.repeat(np.repeat(largest, group, axis=1), page, axis=2)[:, :, :40]
    # Rounding of a sum of 2 head_dim products.
    allowed = (2 * head_dim + 8) * 2.0**-24 * np.einsum("bhd,bhtd->bht", np.abs(query.astype(np.float64)), largest)
    assert (bounds >= exact - allowed).all()
    if page == 1:
        assert (bounds <= exact + allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_ignored_and_a_page_of_nothing_else_scores_nan(backend):
    keys = normal(0, (1, 2, 48, 64))
    clean = encode(backend, keys)
    keys[0, 0, 3, 5] = np.nan
    keys[0, 1, 16:32, 7] = np.nan
    pages = encode(backend, keys)
    changed = (pages.low != clean.low) | (pages.high != clean.high)
    assert np.isnan(pages.low[0, 1, 1, 7]) and np.isnan(pages.high[0, 1, 1, 7])
    assert np.argwhere(changed).tolist() in ([[0, 1, 1, 7]], [[0, 0, 0, 5], [0, 1, 1, 7]])
    logits = score(backend, normal(1, (1, 4, 64)), pages)
    assert np.isnan(logits[0, 2:, 1]).all() and np.isnan(logits).sum() == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_end_what_is_read_and_are_clamped(backend):
    keys, lengths = normal(0, (3, 2, 70, 64)), np.array([33, -4, 1000], np.int32)
    full = encode(backend, keys)
    for b, length in ((0, 33), (1, 0)):
        keys[b, :, length:] = np.inf
    pages = encode(backend, keys, lengths=lengths)
    assert pages.low.shape == (3, 2, 5, 64) and (pages.lengths == lengths).all()
    for one, other in ((pages.low, full.low), (pages.high, full.high)):
        assert one[2].tobytes() == other[2].tobytes() and one[0, :, :2].tobytes() == other[0, :, :2].tobytes()
        assert np.isnan(one[1].astype(np.float32)).all() and np.isnan(one[0, :, 3:].astype(np.float32)).all()
    assert (pages.low[0, :, 2] == keys[0, :, 32]).all() and (pages.high[0, :, 2] == keys[0, :, 32]).all()
    query = normal(1, (3, 4, 64))
    per_page = score(backend, query, pages)
    assert np.isneginf(per_page[1]).all() and np.isneginf(per_page[0, :, 3:]).all()
    assert np.isfinite(per_page[0, :, :3]).all() and np.isfinite(per_page[2]).all()
    per_token = score(backend, query, pages, tokens=70)
    for b, length in enumerate((33, 0, 70)):
        assert np.isneginf(per_token[b, :, length:]).all()
        assert (per_token[b, :, :length] == np.repeat(per_page[b], 16, axis=-1)[:, :length]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_problems_and_outputs_of_the_caller(backend):
    for shape in ((0, 2, 5, 64), (1, 2, 0, 64)):
        pages = encode(backend, np.zeros(shape, np.float16))
        assert pages.low.shape == (shape[0], 2, -(-shape[2] // 16), 64)
        assert score(backend, np.zeros((shape[0], 4, 64), np.float16), pages).shape == (shape[0], 4, pages.low.shape[2])
    pages, query = encode(backend, normal(0, (1, 2, 20, 64))), normal(1, (1, 4, 64))
    out = on(backend, np.full((1, 4, 20), np.nan, np.float32))
    scores = quest.score(on(backend, query), on(backend, pages), tokens=20, out=out, backend=backend)
    assert scores.logits is out and scores.sigma is None
    assert to_host(out).tobytes() == score(backend, query, pages, tokens=20).tobytes()


def test_wrong_arguments_are_named():
    keys, query = normal(0, (1, 2, 20, 64)), normal(1, (1, 4, 64))
    pages = quest.encode(keys)
    cases = [
        (lambda: quest.encode(keys, page=0), ValueError, "page: expected an integer from 1 to"),
        (lambda: quest.encode(keys[0]), ValueError, "keys: expected shape"),
        (lambda: quest.encode(keys, page=8, out=pages), ValueError, "out: expected pages of 8 tokens, got 16"),
        (lambda: quest.encode(keys[:, :, :10], out=pages), ValueError, r"out.low: expected shape \[1, 2, 1, 64\]"),
        (lambda: quest.encode(keys, out=keys), TypeError, "out: expected Pages"),
        (lambda: quest.encode(keys, out=Pages(pages.low, pages.low, None, 16)), ValueError, "out.high: expected mem"),
        (lambda: quest.score(query, keys), TypeError, "pages: expected Pages from quest.encode, got ndarray"),
        (lambda: quest.score(query[:, :3].copy(), pages), ValueError, "query: expected q_heads a positive multiple"),
        (lambda: quest.score(query, pages, scale=-1.0), ValueError, "scale: expected a number of at least 0"),
        (lambda: quest.score(query, pages, tokens=33), ValueError, "tokens: expected an integer from 0 to the 32"),
        (lambda: quest.score(query, Pages(pages.low, pages.high, np.zeros(1), 16)), TypeError,
         "pages.lengths: expected dtype int32"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
