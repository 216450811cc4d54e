"""The claims of every reference hold; the machinery that says so would notice if they did not."""
import dataclasses
import functools
import json
import math
import sys

import numpy as np
import pytest
import scipy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

import kvbench
from kvbench import claims, reference
from kvbench.reference import attention, claim, rotation
from kvbench.reference.claim import Claim, Evidence

ALL = [pytest.param(algorithm, stated, id=f"{algorithm}-{stated.name.replace(' ', '_')}")
       for algorithm, every in claims.algorithms().items() for stated in every]


def find(algorithm, name):
    """The evidence for one claim, from as few samples as a plain defect needs."""
    stated = {c.name: c for c in claims.algorithms()[algorithm]}[name]
    return stated.check(claims.generator(0, algorithm, name), 40 if stated.kind in ("identity", "bound") else 1000)


@functools.cache
def find_without_defect(algorithm, name):
    return find(algorithm, name)


# --- Every claim of every reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm, stated", ALL)
def test_claim_holds(algorithm, stated):
    evidence = stated.check(claims.generator(0, algorithm, stated.name), stated.samples)
    assert evidence.holds, evidence
    assert evidence.low <= evidence.estimate <= evidence.high
    assert stated.statement and stated.source


# --- Defects that a claim is there to find --------------------------------------------------------------------------


def haar_without_sign_fix(head_dim, seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((head_dim, head_dim)))
    return rotation.Rotation("haar", head_dim, seed, 0, matrix=q)


def haar_not_orthogonal(head_dim, seed):
    matrix = np.random.default_rng(seed).standard_normal((head_dim, head_dim)) / head_dim**0.5
    return rotation.Rotation("haar", head_dim, seed, 0, matrix=matrix)


def haar_only_permutes(head_dim, seed):
    rng = np.random.default_rng(seed)
    matrix = np.eye(head_dim)[rng.permutation(head_dim)] * rng.choice([-1.0, 1.0], head_dim)
    return rotation.Rotation("haar", head_dim, seed, 0, matrix=matrix)


def haar_ignores_seed(head_dim, seed):
    return dataclasses.replace(HAAR(head_dim, 0), seed=seed)


def haar_from_global_state(head_dim, seed):
    return dataclasses.replace(HAAR(head_dim, int(np.random.randint(2**31))), seed=seed)


def with_signs(change):
    def hadamard(head_dim, seed, rounds=3):
        made = HADAMARD(head_dim, seed, rounds)
        return dataclasses.replace(made, signs=change(made.signs))
    return hadamard


def rotate_scaled_once(x, made, *, inverse=False):
    return ROTATE(x, made, inverse=inverse) * made.head_dim ** (max(made.rounds - 1, 0) / 2)


def rotate_forward_only(x, made, *, inverse=False):
    return ROTATE(x, made)


def rotate_rounds_reversed(x, made, *, inverse=False):
    return ROTATE(x, made if made.signs is None else dataclasses.replace(made, signs=made.signs[::-1]), inverse=inverse)


def rotate_in_float32(x, made, *, inverse=False):
    return ROTATE(x, made, inverse=inverse).astype(np.float32).astype(np.float64)


def decode_with(change=lambda *results: results, **fixed):
    def decode(query, keys, values, **options):
        return change(*DECODE(query, keys, values, **{**options, **fixed}))
    return decode


def decode_takes_head_modulo(query, keys, values, **options):
    order = np.argsort(np.arange(query.shape[1]) % keys.shape[1], kind="stable")
    output, lse = DECODE(query[:, order], keys, values, **options)
    return output[:, np.argsort(order)], lse[:, np.argsort(order)]


def decode_prefers_recent(query, keys, values, **options):
    return DECODE(query, keys + 0.01 * np.arange(keys.shape[2])[:, None], values, **options)


def decode_reads_one_too_many(query, keys, values, *, lengths=None, **options):
    lengths = None if lengths is None else np.minimum(lengths + 1, keys.shape[2])
    return DECODE(query, keys, values, lengths=lengths, **options)


def merge_means(outputs, lses):
    return np.mean(outputs, axis=0), MERGE(outputs, lses)[1]


def merge_multiplies_by_zero(outputs, lses):
    lse = MERGE(np.zeros_like(outputs), lses)[1]
    with np.errstate(invalid="ignore"):
        return np.sum(np.exp(lses - lse)[..., None] * outputs, axis=0), lse


def merge_forgets_first_part(outputs, lses):
    return MERGE(outputs, lses)[0], MERGE(outputs[1:], lses[1:])[1] if len(lses) > 1 else lses[0]


HAAR, HADAMARD, ROTATE = rotation.haar, rotation.hadamard, rotation.rotate
DECODE, MERGE = attention.decode, attention.merge

DEFECTS = [
    (rotation, "haar", haar_without_sign_fix, ["haar mean", "haar trace"]),
    (rotation, "haar", haar_not_orthogonal, ["orthogonality", "float32 orthogonality", "norms and inner products",
                                             "inverse"]),
    (rotation, "haar", haar_only_permutes, ["haar coordinate law", "haar tail", "haar fourth moment"]),
    (rotation, "haar", haar_ignores_seed, ["seeds unrelated", "haar coordinate law", "haar second moments"]),
    (rotation, "haar", haar_from_global_state, ["repeatable"]),
    (rotation, "hadamard", with_signs(np.ones_like), ["hadamard signs", "hadamard second moments", "hadamard tail",
                                                      "hadamard fourth moment"]),
    (rotation, "hadamard", with_signs(lambda signs: np.repeat(signs[:1], len(signs), axis=0)),
     ["hadamard signs", "hadamard second moments", "hadamard fourth moment"]),
    (rotation, "hadamard", with_signs(lambda signs: (signs + 1) // 2), ["hadamard signs", "orthogonality"]),
    (rotation, "rotate", rotate_scaled_once, ["orthogonality", "norms and inner products", "hadamard matrix"]),
    (rotation, "rotate", rotate_forward_only, ["inverse"]),
    (rotation, "rotate", rotate_rounds_reversed, ["hadamard matrix"]),
    (rotation, "rotate", rotate_in_float32, ["orthogonality", "norms and inner products", "inverse"]),
    (attention, "decode", decode_with(lambda output, lse: (output, lse / np.log(2))),
     ["softmax and log-sum-exp", "split and merge", "key shift"]),
    (attention, "decode", decode_with(lambda output, lse: (output * (1 + 1e-9), lse)),
     ["softmax and log-sum-exp", "convexity"]),
    (attention, "decode", decode_with(scale=1.0), ["softmax and log-sum-exp", "key shift"]),
    (attention, "decode", decode_with(lengths=None), ["ragged lengths"]),
    (attention, "decode", decode_reads_one_too_many, ["ragged lengths", "split and merge"]),
    (attention, "decode", decode_takes_head_modulo, ["grouped heads", "softmax and log-sum-exp"]),
    (attention, "decode", decode_prefers_recent, ["permutation", "split and merge"]),
    (attention, "decode", decode_with(lambda output, lse: (output + 0.1, lse)),
     ["dropped mass, not renormalised", "convexity"]),
    (attention, "decode", decode_with(lambda output, lse: (output, lse - 0.1)),
     ["softmax and log-sum-exp"]),
    (attention, "decode", decode_with(lambda output, lse: (output**3, lse)),
     ["dropped mass identity", "dropped mass bound"]),
    (attention, "merge", merge_means, ["split and merge", "merge in any order"]),
    (attention, "merge", merge_multiplies_by_zero, ["split and merge"]),
    (attention, "merge", merge_forgets_first_part, ["split and merge", "merge in any order"]),
]


@pytest.mark.parametrize("module, function, defect, found_by",
                         [pytest.param(*row, id=f"{row[1]}-{i}-{row[2].__name__}") for i, row in enumerate(DEFECTS)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")      # NaN and overflow are what some of the defects are
def test_defect_is_found(monkeypatch, module, function, defect, found_by):
    algorithm = module.__name__.rpartition(".")[2]
    assert all(find_without_defect(algorithm, name).holds for name in found_by)
    monkeypatch.setattr(module, function, defect)
    missed = [name for name in found_by if find(algorithm, name).holds]
    assert not missed


def test_every_claim_finds_a_defect():
    """A claim that no defect above makes false may be one that cannot fail."""
    found = {(row[0].__name__.rpartition(".")[2], name) for row in DEFECTS for name in row[3]}
    stated = {(algorithm, c.name) for algorithm in ("rotation", "attention") for c in claims.algorithms()[algorithm]}
    # dense() is rotate() of the unit vectors: what it could get wrong is whether it transposes.
    assert stated - found == {("rotation", "dense matrix")}


def test_transposed_dense_matrix_is_found(monkeypatch):
    monkeypatch.setattr(rotation.Rotation, "dense", lambda self: rotation.rotate(np.eye(self.head_dim), self))
    assert not find("rotation", "dense matrix").holds


# --- The builders: a true statement holds whatever is drawn ----------------------------------------------------------


def true_statements(rng):
    """Each builder on draws that are what they are said to be."""
    normal, uniform, skewed = rng.standard_normal(1000), rng.random((1000, 3)), rng.exponential(size=(1000, 2))
    return {
        "expectation": claim.expectation(normal, 0.0),
        "expectation of skewed components": claim.expectation(skewed, [1.0, 1.0]),
        "expectation at a bound": claim.expectation(normal, 0.0, relation="<="),
        "variance, mean known": claim.variance(uniform, 1 / 12, mean=0.5),
        "variance, mean unknown": claim.variance(normal, 1.0),
        "tail at its bound": claim.tail((rng.random((300, 4)) < [0.001, 0.1, 0.5, 0.999]).sum(axis=0), 300,
                                        [0.001, 0.1, 0.5, 0.999]),
        "tail rate": claim.tail((uniform < 0.01).sum(axis=0), 1000, 0.01, relation="="),
        "distribution": claim.distribution(normal, stats.norm.cdf),
        "distribution of components": claim.distribution(uniform, stats.uniform.cdf),
    }


def test_true_statements_hold_for_every_seed():
    for seed in range(300):
        for name, evidence in true_statements(np.random.default_rng(seed)).items():
            assert evidence.holds, (name, seed, evidence)


def test_intervals_are_six_standard_errors_and_not_wider():
    """6 `strain` of an expectation is |z|: over many seeds, z must have variance 1."""
    z = [6 * claim.expectation(np.random.default_rng(seed).standard_normal(1000), 0.0).strain for seed in range(3000)]
    assert claim.expectation(np.square(z), 1.0, allowance=0.01).holds
    e = claim.expectation(np.arange(1000.0), 480.0)                             # symmetric: no skewness
    half = stats.t.isf(stats.norm.sf(6), 999) * np.arange(1000).std(ddof=1) / 1000**0.5
    assert (e.estimate, e.low, e.high) == (499.5, pytest.approx(499.5 - half), pytest.approx(499.5 + half))
    assert e.strain == pytest.approx(19.5 / half) and e.samples == 1000


def test_interval_of_a_skewed_sample_is_longer_towards_the_tail():
    x = np.repeat([0.0, 1.0], [1800, 200])                                      # skewness (1 - 2p) / sqrt(p (1 - p))
    k, error = stats.t.isf(stats.norm.sf(6), 1999), x.std(ddof=1) / 2000**0.5
    longer = 0.8 / 0.3 * (2 * k**2 + 1) / (6 * 2000**0.5)
    e, mirrored = claim.expectation(x, 0.1), claim.expectation(-x, -0.1)
    assert e.low == pytest.approx(0.1 - k * error) and e.high == pytest.approx(0.1 + (k + longer) * error, rel=1e-4)
    assert (mirrored.low, mirrored.high) == pytest.approx((-e.high, -e.low))


@given(trials=st.integers(1, 10**6), share=st.floats(0, 1))
@example(trials=65408, share=0.99999)
@settings(max_examples=200, deadline=None)
def test_tail_interval_is_exact(trials, share):
    count = round(share * trials)
    e = claim.tail(count, trials, 0.5)
    one_sided = stats.norm.sf(6)
    assert e.low == 0 if count == 0 else stats.binom.sf(count - 1, trials, e.low) == pytest.approx(one_sided, rel=1e-6)
    # A limit next to 1 has few digits left in 1 - high, which is what the probability depends on: none is nearer.
    digits = 2.0**-52 / (1 - e.high) if e.high < 1 else 0
    assert e.high == 1 if count == trials else \
        stats.binom.cdf(count, trials, e.high) == pytest.approx(one_sided, rel=1e-6 + digits)
    assert e.holds == (e.low <= 0.5)
    assert claim.tail(count, trials, 0.5, relation="=").holds == (e.low <= 0.5 <= e.high)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 200), columns=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_distribution_is_the_kolmogorov_distance(seed, count, columns):
    x = np.random.default_rng(seed).standard_normal((count, columns))
    e = claim.distribution(x, stats.norm.cdf)
    assert e.estimate == pytest.approx(max(stats.kstest(column, stats.norm.cdf).statistic for column in x.T))
    assert e.strain == pytest.approx(e.estimate / math.sqrt(math.log(2 / claim.MISS_PROBABILITY) / (2 * count)))


def test_critical_distance_has_the_stated_miss_probability():
    """The inequality of Dvoretzky, Kiefer and Wolfowitz is safe, and at large n nearly sharp."""
    for count in (10, 1000, 100000):
        critical = math.sqrt(math.log(2 / claim.MISS_PROBABILITY) / (2 * count))
        missed = stats.kstwo.sf(critical, count)
        assert missed <= claim.MISS_PROBABILITY * 1.01
    assert missed > claim.MISS_PROBABILITY / 2


@given(seed=st.integers(0, 2**32), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_the_worst_component_is_reported(seed, shape):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1000, *shape))
    each = [claim.expectation(x[(slice(None), *at)], 0.0) for at in np.ndindex(*shape)]
    worst, together = max(each, key=lambda e: e.strain), claim.expectation(x, 0.0)
    assert together.strain == pytest.approx(worst.strain) and together.estimate == pytest.approx(worst.estimate)


# --- The builders: a false statement does not hold -------------------------------------------------------------------

RNG = np.random.default_rng(7)
NORMAL = RNG.standard_normal(10_000)

FALSE_STATEMENTS = {
    "a value off by more than rounding": claim.identity([0.0, 1e-12], 1e-13),
    "equality of codes, one different": claim.identity(np.array([3, 1, 2]) - np.array([3, 1, 3])),
    "a bound broken once in many": claim.bound(np.r_[np.zeros(999), 1.0001], 1.0),
    "a bound broken where the limit is zero": claim.bound([0.0, 1e-300], [1.0, 0.0]),
    "an enumeration that forgets an outcome": claim.enumeration([1.0, -1.0, 1.0], 0.0, 1e-9),
    "a mean that is shifted": claim.expectation(NORMAL + 0.1, 0.0),
    "one shifted component": claim.expectation(NORMAL.reshape(1000, 10) + 0.4 * (np.arange(10) == 4), 0.0),
    "a mean that is above its bound": claim.expectation(NORMAL + 0.1, 0.0, relation="<="),
    "a mean that is below its bound": claim.expectation(NORMAL - 0.1, 0.0, relation=">="),
    "a forgotten sign": claim.expectation(np.abs(NORMAL), 0.0),
    "an error larger than its allowance": claim.expectation(NORMAL + 0.2, 0.0, allowance=0.1),
    "a constant that is another": claim.expectation(np.ones(1000), 1.0 + 1e-9),
    "a variance of n samples over n + 1": claim.variance(np.sqrt(0.9) * NORMAL, 1.0),
    "a variance about a wrong mean": claim.variance(NORMAL, 1.0, mean=0.5),
    "a tail twice its bound": claim.tail(200, 10_000, 0.01),
    "an event that must not happen": claim.tail(1, 10**6, 0.0),
    "a rate below the stated one": claim.tail(40, 10_000, 0.01, relation="="),
    "one tail of several": claim.tail([5, 200], 10_000, 0.01),
    "normal, but wider": claim.distribution(1.2 * NORMAL, stats.norm.cdf),
    "normal, but rounded": claim.distribution(np.round(NORMAL), stats.norm.cdf),
    "one component with another law": claim.distribution(np.stack([NORMAL, np.abs(NORMAL)], axis=1), stats.norm.cdf),
    "one case of several": claim.weakest({"good": claim.identity(0.0), "bad": claim.identity(1.0),
                                          "also good": claim.expectation(NORMAL, 0.0)}),
}


@pytest.mark.parametrize("name", FALSE_STATEMENTS)
def test_false_statement_does_not_hold(name):
    assert not FALSE_STATEMENTS[name].holds


def test_place_of_the_fault_is_named():
    assert "worst of 10, at [4]" in FALSE_STATEMENTS["one shifted component"].note
    assert FALSE_STATEMENTS["one case of several"].note == "weakest of 3: bad"
    note = claim.identity(np.array([[0, 0], [0, 5]]), note="codes").note
    assert note == "codes; worst of 4, at [1, 1]"


WITH_NAN = np.r_[NORMAL[:1000], np.nan]
NAN_STATEMENTS = {
    "identity": lambda: claim.identity([0.0, np.nan], 1.0),
    "identity, allowance": lambda: claim.identity([0.0, 0.5], [1.0, np.nan]),
    "identity, infinite": lambda: claim.identity([np.inf], 1.0),
    "bound": lambda: claim.bound([np.nan, 0.5], 1.0),
    "enumeration": lambda: claim.enumeration([1.0, np.nan], 0.0),
    "enumeration, expected": lambda: claim.enumeration([1.0, -1.0], np.nan),
    "expectation": lambda: claim.expectation(WITH_NAN, 0.0),
    "expectation, bound": lambda: claim.expectation(WITH_NAN, 100.0, relation="<="),
    "expectation, expected": lambda: claim.expectation(NORMAL, np.nan),
    "expectation, infinite": lambda: claim.expectation(np.r_[NORMAL, np.inf], 0.0),
    "expectation, one component": lambda: claim.expectation(np.stack([WITH_NAN, np.zeros(1001)], axis=1), 0.0),
    "variance": lambda: claim.variance(WITH_NAN, 1.0),
    "tail, probability": lambda: claim.tail(0, 100, np.nan),
    "distribution": lambda: claim.distribution(WITH_NAN, stats.norm.cdf),
    "distribution, law": lambda: claim.distribution(NORMAL, lambda t: t * np.nan),
    "weakest": lambda: claim.weakest({"nan": claim.identity(np.nan), "good": claim.identity(0.0)}),
}


@pytest.mark.parametrize("name", NAN_STATEMENTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_never_passes(name):
    assert not NAN_STATEMENTS[name]().holds


def test_variance_estimate_is_unbiased():
    x = np.random.default_rng(0).standard_normal(1000)
    assert claim.variance(x, 1.0).estimate == pytest.approx(x.var(ddof=1), rel=1e-12)
    assert claim.variance(x, 1.0, mean=0.0).estimate == pytest.approx(np.mean(x**2), rel=1e-12)


def test_edges_of_the_judgement():
    assert claim.identity([1.0], 1.0).holds and claim.identity(0.0).holds
    assert claim.bound([-5.0], 0.0).holds
    assert claim.expectation(np.full(1000, 0.5), 0.5).holds                       # no variance, no difference
    assert claim.expectation(np.full(1000, 0.5), 0.5 + 1e-13, allowance=1e-12).holds
    assert claim.enumeration([1.0, -1.0], 0.0).holds
    assert claim.tail(0, 1, 0.0).holds and claim.tail(0, 100, 0.0, relation="=").holds
    safe = claim.expectation(NORMAL - 1, 0.0, relation="<=")
    assert safe.strain < -1 and safe.high < 0                                    # shown, not only not contradicted
    assert claim.tail(np.int64(3), 100, 1.0).samples == 100


@pytest.mark.parametrize("call, message", [
    (lambda: claim.identity([]), "at least one number"),
    (lambda: claim.expectation(np.zeros(999), 0.0), "at least 1000"),
    (lambda: claim.expectation(NORMAL, 0.0, relation="<"), "'=', '<=' or '>='"),
    (lambda: claim.bound([1.0], -1.0), "non-negative"),
    (lambda: claim.tail(5, 4, 0.5), "0 to trials"),
    (lambda: claim.tail(0, 0, 0.5), "0 to trials"),
    (lambda: Claim("a", "b", "c", "hope", lambda rng, samples: None), "expected one of identity, bound"),
])
def test_wrong_use_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- The runner ------------------------------------------------------------------------------------------------------

MODULE = '''
from .claim import Claim, expectation, identity
import numpy as np
CLAIMS = (
    Claim("true | normal", "E X = 0", "textbook", "expectation",
          lambda rng, n: expectation(rng.standard_normal(n), 0.0)),
    Claim("false", "E |X| = 0", "nobody", "expectation",
          lambda rng, n: expectation(np.abs(rng.standard_normal(n)), 0.0)),
    Claim("not a number", "0/0 = 0", "nobody", "identity", lambda rng, n: identity(np.nan)),
)
'''


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """A reference `made_up` beside the real ones, with one true claim and two false ones."""
    (tmp_path / "made_up.py").write_text(MODULE)
    monkeypatch.setattr(reference, "__path__", [*reference.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("kvbench.reference.made_up", None)
    vars(reference).pop("made_up", None)


def test_algorithms_are_the_references_that_state_claims(made_up):
    found = claims.algorithms()
    assert {"rotation", "attention", "made_up"} <= set(found) and "claim" not in found
    assert [c.name for c in found["made_up"]] == ["true | normal", "false", "not a number"]


def test_two_claims_of_one_name_are_refused(made_up):
    (made_up / "made_up.py").write_text(MODULE.replace('"false"', '"true | normal"'))
    with pytest.raises(ValueError, match="made_up.*two claims of one name"):
        claims.algorithms()


def test_false_claims_are_reported(made_up):
    results = claims.run("made_up", seed=3)
    assert [r.holds for r in results] == [True, False, False]
    assert claims.exit_status(results) == 1 and claims.exit_status(results[:1]) == 0

    lines = claims.table(results).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert [line.count("FALSE") for line in lines] == [0, 0, 0, 1, 1] and "true \\| normal" in lines[2]
    assert all(word in lines[0] for word in ("claim", "kind", "estimate", "interval", "expected", "verdict", "source"))

    text = claims.explain(results)
    assert "made_up: false does not hold" in text and "E |X| = 0" in text
    assert "kvbench prove made_up --seed 3\n" in text and "true | normal" not in text
    assert claims.explain(claims.run("made_up", samples=2000)).endswith("kvbench prove made_up --seed 0 --samples 2000")
    assert claims.explain(results[:1]) == ""


NUMBER = (int, float)
SCHEMA = {
    "algorithm": str, "claim": str, "kind": str, "statement": str, "source": str,
    "seed": int, "cases": int, "seconds": NUMBER,
    "holds": bool, "estimate": NUMBER, "low": NUMBER, "high": NUMBER, "expected": NUMBER, "relation": str,
    "strain": NUMBER, "samples": int, "note": str,
}


def test_json(made_up):
    document = json.loads(json.dumps(claims.to_json(claims.run(["made_up", "attention"], seed=5)), allow_nan=False))
    assert set(document) == {"schema", "versions", "sigmas", "results"}
    assert document["schema"] == "kvbench.claims/1" and document["sigmas"] == 6
    assert document["versions"] == {"kvbench": kvbench.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
    for result in document["results"]:
        assert set(result) == set(SCHEMA)
        missing = {key for key, value in result.items() if value is None}
        assert all(isinstance(value, SCHEMA[key]) for key, value in result.items() if key not in missing)
        assert not missing or (missing <= {"estimate", "low", "high", "strain"} and result["claim"] == "not a number")
        assert result["kind"] in claim.KINDS and result["relation"] in ("=", "<=", ">=") and result["seed"] == 5
    verdicts = {r["claim"]: r["holds"] for r in document["results"] if r["algorithm"] == "made_up"}
    assert verdicts == {"true | normal": True, "false": False, "not a number": False}


def evidences(results):
    return {(r.algorithm, r.claim.name): r.evidence for r in results if r.claim.name != "not a number"}


def test_draws_depend_on_seed_and_claim_alone(made_up):
    first = evidences(claims.run(["attention", "made_up"]))
    assert evidences(claims.run(["made_up", "attention"])) == first
    alone = evidences(claims.run("made_up"))
    assert alone.items() <= first.items()
    other = evidences(claims.run("made_up", seed=1))
    assert all(other[key] != alone[key] for key in alone)
    estimates = [claims.generator(0, *key).random() for key in (("a", "b"), ("b", "a"), ("a", "c"), ("ab", ""))]
    assert len(set(estimates)) == 4


def test_samples_and_repeated_names(made_up):
    results = claims.run(["made_up", "made_up"], samples=1234)
    assert [r.evidence.samples for r in results] == [1234, 1234, 1]
    assert [r.evidence.samples for r in claims.run("made_up")[:2]] == [1000, 1000]


def test_progress_and_interruption(made_up):
    lines = []
    assert len(claims.run("made_up", progress=lines.append)) == 3
    assert lines == ["made_up: true | normal (1 of 3)", "made_up: false (2 of 3)", "made_up: not a number (3 of 3)", ""]
    started = claims.prove("made_up")
    assert next(started).claim.name == "true | normal"          # yielded before the next claim is checked


@pytest.mark.parametrize("arguments, message", [
    ({"names": "rotatoin"}, "unknown algorithm 'rotatoin'; did you mean rotation"),
    ({"names": ["attention", "zzz"]}, "unknown algorithm 'zzz'; known: .*attention.*rotation"),
    ({"samples": 999}, "samples: expected an integer of at least 1000, got 999"),
    ({"samples": 1e3}, "samples: expected an integer"),
    ({"seed": "0"}, "seed: expected an integer, got '0'"),
    ({"seed": True}, "seed: expected an integer"),
])
def test_wrong_arguments_are_refused_before_anything_runs(arguments, message):
    ran = []
    with pytest.raises(ValueError, match=message):
        claims.run(**arguments, progress=ran.append)
    assert not ran


def test_evidence_holds_up_to_the_edge():
    edge = Evidence(1.0, 0.0, 2.0, 0.0, "=", 1.0, 100)
    assert edge.holds and not dataclasses.replace(edge, strain=math.nextafter(1.0, 2.0)).holds
    assert not dataclasses.replace(edge, strain=math.nan).holds
