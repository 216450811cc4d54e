"""Selectors: what they ask of the operators, how they are saved, and p fitted to a prompt's queries."""
import json

import numpy as np
import pytest

from kvbench import codecs, data, indexes
from kvbench.demo import measurement
from kvbench.ops.selection import select_top_k, select_top_p
from kvbench.reference import selection as reference
from kvbench.scores import Scores
from kvbench.selectors import TopK, TopP


def scores(shape=(2, 6, 200), sigma=0.5):
    rng = np.random.default_rng(0)
    return Scores((3 * rng.standard_normal(shape)).astype(np.float32), np.full(shape, sigma, np.float32))


def same(one, other):
    listed = np.arange(one.indices.shape[2]) < one.counts[:, :, None]
    return (one.counts == other.counts).all() and (one.indices == other.indices)[listed].all()


@pytest.mark.parametrize("selector, function", [
    (TopP(0.7), lambda s, **o: select_top_p(s, 0.7, **o)),
    (TopP(0.7, calibrated="shrink"), lambda s, **o: select_top_p(s, 0.7, calibrated="shrink", **o)),
    (TopP(0.7, minimum=9, maximum=12, sinks=4, recent=30, normalise="global"),
     lambda s, **o: select_top_p(s, 0.7, min_tokens=9, max_tokens=12, sinks=4, recent=30, normalise="global", **o)),
    (TopK(20, sinks=4, recent=30), lambda s, **o: select_top_k(s, 20, sinks=4, recent=30, **o)),
])
def test_a_selector_is_its_operator(selector, function):
    lengths = np.array([200, 120], np.int32)
    assert same(selector(scores(), kv_heads=2, lengths=lengths), function(scores(), kv_heads=2, lengths=lengths))
    alone = codecs.rebuild({**selector.config(), "united": False})
    assert same(alone(scores(), lengths=lengths), function(scores(), lengths=lengths))
    out, workspace = selector.allocate(2, 6, 2, 200, "cpu")
    made = selector(scores(), kv_heads=2, lengths=lengths, out=out, workspace=workspace)
    assert made.indices is out.indices and out.indices.shape == (2, 2, 200)


@pytest.mark.parametrize("selector", [TopP(0.85), TopP(0.5, sinks=3, maximum=70, calibrated=True, united=False),
                                      TopK(160), TopK(0, recent=9)])
def test_config_rebuilds_an_equal_selector(selector):
    assert codecs.rebuild(json.loads(json.dumps(selector.config()))) == selector


@pytest.mark.parametrize("make, message", [
    (lambda: TopP(1.2), "TopP: p: expected 0 < p <= 1, got 1.2"),
    (lambda: TopP(0.5, minimum=-1), "minimum: expected an integer of at least 0, got -1"),
    (lambda: TopP(0.5, minimum=5, maximum=4), "maximum: expected an integer of at least 5, got 4"),
    (lambda: TopP(0.5, calibrated="no"), "calibrated: expected True, False, 'shrink' or 'shift', got 'no'"),
    (lambda: TopP(0.5, normalise="both"), "normalise: expected one of middle, global"),
    (lambda: TopP(0.5, sinks=1.0), "sinks: expected an integer of at least 0, got 1.0"),
    (lambda: TopK(-1), "TopK: k: expected an integer of at least 0, got -1"),
    (lambda: TopK(4, united=1), "united: expected True or False, got 1"),
    (lambda: TopK(4)(scores()), "TopK: kv_heads: expected the number of KV heads to unite over, got None"),
])
def test_wrong_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def prompt():
    """The sample up to its first decode step but 16, and the queries of those 16."""
    sample = data.sample()
    return sample, int(sample.positions[15]) + 1


@pytest.mark.parametrize("p, calibrated", [(0.65, "shrink"), (0.85, False), (0.95, "shift")])
def test_fitted_p_achieves_the_mass_on_the_next_queries(prompt, p, calibrated):
    """On a real layer, within 0.05 on average over heads and queries: the goal of the calibration."""
    sample, tokens = prompt
    keys = sample.keys[:, :, :tokens]
    index = indexes.RaBitQ(keys.shape[3], noise=True)
    coded = index.encode(keys)
    wanted = TopP(p, calibrated=calibrated)
    fitted = wanted.fitted(index, coded, keys, np.ascontiguousarray(sample.queries[:, :, :16]))
    shares, nominal = [], []
    window = dict(sinks=4, recent=128, block=128)
    for step, position in measurement.decode_steps(sample)[16::4]:
        query, length = np.ascontiguousarray(sample.queries[:, :, step]), min(position + 1, tokens)
        exact = (query.astype(np.float64)[0] @ keys[0, 0].astype(np.float64).T * keys.shape[3] ** -0.5)[None]
        found = index.score(query, coded)
        for selector, into in ((fitted, shares), (wanted, nominal)):
            made = select_top_p(found, selector.p, calibrated=calibrated, lengths=np.array([length], np.int32),
                                **window)
            into.append(reference.achieved(made, exact, lengths=np.array([length]), **window).mean())
    assert abs(np.mean(shares) - p) < 0.05, (fitted, np.mean(shares), np.mean(nominal))
    if not calibrated:
        assert np.mean(nominal) < p - 0.2             # what the published rule achieves


def test_fitted_refuses_more_queries_than_tokens():
    index, keys = indexes.RaBitQ(64), np.zeros((1, 1, 4, 64), np.float16)
    with pytest.raises(ValueError, match="TopP.fitted: queries: expected 1 to 4 queries for 4 tokens, got 5"):
        TopP(0.5).fitted(index, index.encode(keys), keys, np.zeros((1, 1, 5, 64), np.float16))
