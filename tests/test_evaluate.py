"""`kvbench eval`: metrics that mean what they say, perplexity and needles through a cache, and one result file."""
import contextlib
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from kvbench import caches, cli
from kvbench.cache import Tail
from kvbench.codecs import TurboQuantMSE
from kvbench.evaluate import capture, logits, models, needle, perplexity, results, specs
from strategies.models import TEXT, save_tiny

with contextlib.suppress(ImportError):      # the tests of a model, which need it, are then skipped
    import torch

TINY_CACHE = "turboquant:sinks=1,tail=2"


# ---- presets as text

def test_specs_are_products_of_their_choices():
    found = specs.parse("turboquant:key_bits=4/2,centred=false,value_bits=3/1")
    assert [spec.text for spec in found] == [f"turboquant:key_bits={k},centred=False,value_bits={v}"
                                             for k in (4, 2) for v in (3, 1)]
    sizes = dict(batch=1, kv_heads=1, q_heads=2, head_dim=32, capacity=9)
    cache = found[1].build(**sizes, dtype="float32")
    assert (cache.keys.bits, cache.values.bits, cache.keys.centred, cache.dtype) == (4, 1, False, "float32")
    assert specs.parse("exact:dtype=bfloat16")[0].build(**sizes, dtype="float32").dtype == "bfloat16"
    assert [spec.text for spec in specs.parse_all([])] == list(caches.PRESETS)
    chosen = [spec.text for spec in specs.parse_all(["exact:tail=4", "all", "exact"])]
    assert chosen == ["exact:tail=4", *caches.PRESETS]


@pytest.mark.parametrize("text, message", [
    ("exat", "unknown preset 'exat'; did you mean exact"), ("turboquant:bits=3", "no option 'bits'"),
    ("turboquant:key_bit=3", "did you mean key_bits"), ("turboquant:key_bits=", "expected key_bits=VALUE"),
    ("turboquant:key_bits=2/", "expected key_bits=VALUE"), ("turboquant:tail=1,tail=2", "tail is given twice"),
    ("exact:capacity=4", "no option 'capacity'"), ("exact:", "no option ''"),
])
def test_wrong_specs_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        specs.parse(text)


# ---- logits

def small_capture(tokens=60, kv_heads=2, group=2, head_dim=32, seed=0):
    rng = np.random.default_rng(seed)
    positions = np.r_[0:5, tokens - 12:tokens].astype(np.int32)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float16)
    return capture.Capture("a layer", normal(1, kv_heads, tokens, head_dim), normal(1, kv_heads, tokens, head_dim),
                           normal(1, kv_heads * group, len(positions), head_dim), positions, {})


@given(st.integers(0, 9), st.integers(0, 20), st.integers(1, 12))
def test_an_exact_cache_loses_rounding_only(sinks, tail, queries):
    found = logits.measure(small_capture(), specs.parse(f"exact:sinks={sinks},tail={tail}")[0], queries)
    metrics = found["metrics"]
    assert metrics["logit_mae"] == metrics["kl"] == 0 and metrics["output_error"] < 2**-10
    assert metrics["top10"] == metrics["budget"] == metrics["recall"] == 1
    assert metrics["mass"] == pytest.approx(1, abs=1e-12)
    assert found["bits_per_element"] == 16 and found["tokens"] == (60 if queries > 1 else 55)


def test_metrics_are_those_of_their_definitions():
    """Every token in the store: the metrics from `decode` of the codecs, written out for one query."""
    whole = small_capture()
    cache, = [specs.parse("turboquant:sinks=0,tail=0,key_bits=2,centred=False")[0]]
    found = logits.measure(whole, cache, queries=1)["metrics"]
    built = cache.build(batch=1, kv_heads=2, q_heads=4, head_dim=32, capacity=60)
    keys, values = (codec.decode(codec.encode(x))[0].astype(np.float64)
                    for codec, x in ((built.keys, whole.keys), (built.values, whole.values)))
    row = logits.rows_of(whole.positions, 1)[1][0]
    seen, query = whole.positions[row] + 1, whole.queries[0, :, row].astype(np.float64)
    mae, kl, top, outputs = [], [], [], []
    for head in range(4):
        exact, other = (x[head // 2, :seen].astype(np.float64) @ query[head] / np.sqrt(32)
                        for x in (whole.keys[0], keys))
        p, q = softmax(exact), softmax(other)
        mae.append(np.abs(exact - other).mean())
        kl.append(np.sum(p * np.log(p / q)))
        top.append(len(set(np.argsort(exact)[-10:]) & set(np.argsort(other)[-10:])) / 10)
        outputs.append((p @ whole.values[0, head // 2, :seen].astype(np.float64), q @ values[head // 2, :seen]))
    exact, other = (np.stack(side) for side in zip(*outputs))
    assert found["logit_mae"] == pytest.approx(np.mean(mae), rel=1e-9)
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-6) and found["top10"] == pytest.approx(np.mean(top))
    # The operator computes in float32 and rounds to float16.
    assert found["output_error"] == pytest.approx(np.linalg.norm(other - exact) / np.linalg.norm(exact), rel=5e-3)


def test_queries_see_exact_tokens_as_they_were_then():
    """With a tail as long as the text nothing is encoded; with one of all evaluated tokens only the prompt is."""
    whole = small_capture()
    assert logits.measure(whole, specs.parse("turboquant:tail=64")[0])["metrics"]["logit_mae"] == 0
    some, all_of_it = (logits.measure(whole, specs.parse(f"turboquant:tail={tail},sinks=0,key_bits=1")[0])["metrics"]
                       for tail in (20, 0))
    assert 0 < some["logit_mae"] < all_of_it["logit_mae"] and some["kl"] < all_of_it["kl"]


class Sparse:
    """A cache that attends to the first sink, two tokens of its store and the tail, as a selecting preset does."""

    index, sinks, tail = object(), 1, Tail(2)

    def __init__(self, slots):
        indices = np.array([[[*row, -1] for row in slots]], np.int32)
        self.last_selection = SimpleNamespace(indices=indices, counts=np.full((1, len(slots)), 2, np.int32))


def test_sparse_presets_are_judged_by_what_they_attend():
    for slots, expected in (([[0, 3], [1, 2]], [[0, 1, 4, 8, 9], [0, 1, 4, 8, 9], [0, 2, 3, 8, 9], [0, 2, 3, 8, 9]]),
                            ([[0, 3], [1, 2], [5, 6], [2, 4]],
                             [[0, 1, 4, 8, 9], [0, 2, 3, 8, 9], [0, 6, 7, 8, 9], [0, 3, 5, 8, 9]])):
        attended = logits._attended(Sparse(slots), seen=10, q_heads=4)
        assert [np.flatnonzero(row).tolist() for row in attended] == expected
    weights = np.array([0.4, 0.05, 0.3, 0.15, 0.1])
    for chosen, share in (([0, 2], 1.0), ([0, 1], 0.5), ([1, 4], 0.0), ([0, 1, 2, 3, 4], 1.0), ([], 1.0)):
        assert logits._share_of_heaviest(weights, np.isin(np.arange(5), chosen)) == share


def test_stored_is_what_attention_sees():
    rng = np.random.default_rng(1)
    keys, values = rng.standard_normal((2, 2, 2, 40, 32)).astype(np.float32)
    cache = caches.turboquant(2, 2, 4, 32, capacity=40, sinks=3, tail=5, dtype="float32")
    cache.append(keys[:, :, :30], values[:, :, :30], lengths=[30, 2])
    cache.append(keys[:, :, 30:], values[:, :, 30:])
    query = rng.standard_normal((2, 4, 32)).astype(np.float32)
    output = cache.attend(query)
    order = [np.arange(40), np.r_[0, 1, 30:40]]
    for b in range(2):
        stored = cache.stored(b)
        for side, original in zip(stored, (keys, values)):
            exact = np.r_[0:3, len(order[b]) - 5:len(order[b])]
            np.testing.assert_array_equal(side[:, exact], original[b][:, order[b]][:, exact])
            assert side.shape == (2, len(order[b]), 32)
        for head in range(4):
            weights = softmax(stored[0][head // 2].astype(np.float64) @ query[b, head] / np.sqrt(32))
            # Decoded to float16: 2^-11 of numbers below 4, in logits of 32 products and in values.
            np.testing.assert_allclose(output[b, head], weights @ stored[1][head // 2], rtol=0, atol=0.02)


def test_selected_sequences_are_copies():
    rng = np.random.default_rng(2)
    keys, values = rng.standard_normal((2, 3, 2, 20, 32)).astype(np.float16)
    cache = caches.turboquant(3, 2, 4, 32, capacity=24, sinks=1, tail=2)
    cache.append(keys, values, lengths=[20, 7, 13])
    before = copy.deepcopy(cache)
    chosen = cache.select([2, 0, 2, 2])
    assert chosen.lengths.tolist() == [13, 20, 13, 13]
    cache.append(keys[:, :, :1], values[:, :, :1])
    for i, sequence in enumerate([2, 0, 2, 2]):
        for found, expected in zip(chosen.stored(i), before.stored(sequence)):
            np.testing.assert_array_equal(found, expected)
    for wrong in ([], [3], [-1]):
        with pytest.raises(ValueError, match="numbers of the 3 sequences"):
            cache.select(wrong)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20, unique=True), st.integers(1, 9))
def test_evaluated_queries_come_after_the_prompt(positions, queries):
    positions = np.sort(positions)
    if positions[-1] == 0:
        with pytest.raises(ValueError, match="later position than 0"):
            logits.rows_of(positions, queries)
        return
    known, asked = logits.rows_of(positions, queries)
    assert 1 <= len(asked) <= queries and positions[asked[0]] > 0
    if len(known):
        assert positions[known[-1]] + 1 == positions[asked[0]], "the prompt ends where decoding begins"
    assert (np.diff(positions[known]) == 1).all()


# ---- a model

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return models.load(str(folder))


def own_loss(model, ids, prompt):
    with torch.no_grad():
        logits = model.network(input_ids=ids).logits[0, prompt - 1:-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, prompt:]))


def test_perplexity_of_an_exact_cache_is_the_models_own(model, monkeypatch):
    monkeypatch.setattr(perplexity, "CHUNK", 16)
    ids = models.tokens_of(model, models.Text("words", TEXT), 90)
    base = perplexity.of_model(model, ids, 20)
    assert base["metrics"]["perplexity"] == pytest.approx(np.exp(own_loss(model, ids, 20)), rel=1e-4)
    assert base["bits_per_element"] == 32 and base["nbytes"] == 2 * 2 * 2 * 32 * 89 * 4
    for stepwise in (False, True):
        exact, = specs.parse("exact:dtype=float32,sinks=1,tail=4")
        found = perplexity.of_cache(model, exact, ids, 20, base["metrics"]["perplexity"], stepwise)
        assert abs(found["metrics"]["loss_percent"]) < 0.02
        assert found["bits_per_element"] == 32 and found["nbytes"] == base["nbytes"]
    assert model.network.config._attn_implementation == "sdpa", "the model is left as it was"


def test_both_ways_through_a_compressed_cache_agree(model):
    ids = models.tokens_of(model, models.Text("words", TEXT), 60)
    spec, = specs.parse("turboquant:key_bits=2,value_bits=2,sinks=2,tail=5")
    base = perplexity.of_model(model, ids, 20)["metrics"]["perplexity"]
    fast, slow = (perplexity.of_cache(model, spec, ids, 20, base, stepwise) for stepwise in (False, True))
    assert fast["nbytes"] == slow["nbytes"] and fast["bits_per_element"] == slow["bits_per_element"] < 8
    assert fast["metrics"]["perplexity"] == pytest.approx(slow["metrics"]["perplexity"], rel=0.05)
    assert abs(fast["metrics"]["loss_percent"]) > 0.1, "2 bits must show"


def test_codecs_alone_encode_every_token(model):
    ids = models.tokens_of(model, models.Text("words", TEXT), 65)
    base = perplexity.of_model(model, ids, 1)["metrics"]["perplexity"]
    exact, = specs.parse("exact")
    assert abs(perplexity.of_codecs(model, exact, ids, base)["metrics"]["loss_percent"]) < 1
    four, one = (perplexity.of_codecs(model, specs.parse(
        f"turboquant:key_bits={bits},value_bits={bits},centred=False,tail=64")[0], ids, base) for bits in (6, 1))
    assert four["bits_per_element"] == 6.5 and one["bits_per_element"] == 1.5, "the tail does not count"
    assert abs(four["metrics"]["loss_percent"]) < abs(one["metrics"]["loss_percent"])


class Thirteen(TurboQuantMSE):
    """A codec that takes 13 tokens at a time, as those with statistics of several tokens do."""

    granule = 13

    def encode(self, x):
        assert x.shape[2] % 13 == 0
        return super().encode(x)


def test_codecs_alone_encode_whole_groups(model):
    ids = models.tokens_of(model, models.Text("words", TEXT), 66)
    codec = Thirteen(32, bits=4)
    spec = SimpleNamespace(text="thirteen", build=lambda **sizes: SimpleNamespace(keys=codec, values=codec))
    whole, one_more = (perplexity.of_codecs(model, spec, ids[:, :count], 1.0) for count in (65, 66))
    assert whole["nbytes"] == one_more["nbytes"] == 2 * 2 * 2 * 65 * 32 * 4.5 / 8, "the last token is only predicted"
    with pytest.raises(ValueError, match="expected a multiple of the 13 tokens that thirteen encodes together, got 60"):
        perplexity.of_codecs(model, spec, ids[:, :60], 1.0)


@given(st.integers(60, 130), st.floats(0, 1), st.integers(0, 3))
def test_needles_lie_where_they_should(model, tokens, depth, seed):
    text = models.Text("words", TEXT)
    one = needle.make(model, text, tokens, depth, seed)
    assert one.context.shape == (1, tokens) and one.answer.shape[1] == needle.DIGITS
    context, wanted = one.context[0].tolist(), one.answer[0].tolist()
    places = [i for i in range(tokens) if context[i:i + needle.DIGITS] == wanted]
    assert len(places) == 1 and abs(places[0] - depth * tokens) < 20
    again = needle.make(model, text, tokens, depth, seed)
    assert torch.equal(one.context, again.context) and torch.equal(one.answer, again.answer)


def test_a_needle_through_an_exact_cache_is_the_models_own(model):
    one = needle.make(model, models.Text("words", TEXT), 80, 0.5, 0)
    prompt = needle.read(model, one)
    with torch.no_grad():
        whole = torch.cat([one.context, one.question, one.answer], dim=1)
        logits = model.network(input_ids=whole).logits[0, -needle.DIGITS - 1:-1]
    expected = float(logits.log_softmax(-1).gather(1, one.answer[0][:, None]).mean())
    found = (logits.argmax(-1) == one.answer[0]).all()
    own = needle.of_model(model, one, prompt)
    through = needle.of_cache(model, specs.parse("exact:dtype=float32,tail=4")[0], one, prompt)
    for case in (own, through):
        assert case["metrics"]["log_probability"] == pytest.approx(expected, abs=1e-3)
        assert case["metrics"]["found"] == float(found) and case["tokens"] == 80
    with pytest.raises(ValueError, match="tokens of the needle"):
        needle.make(model, models.Text("words", TEXT), 10, 0.5, 0)


# ---- the command

def run(folder, *arguments, path=None):
    given = ["eval", "--model", str(folder), "--text", str(folder / "text.txt"), "--prompt", "10", "--tokens", "30",
             "--lengths", "60", "--depths", "0.2,0.8", *arguments]
    status = cli.main([*given, "--json", str(path)] if path else given)
    return status, json.loads(path.read_text()) if path and path.exists() else None


def test_the_command_writes_what_it_prints(folder, tmp_path, capsys):
    status, document = run(folder, "--task", "perplexity,codecs,needle", "--cache", "exact", "--cache", TINY_CACHE,
                           path=tmp_path / "eval.json")
    assert status == 0 and document["complete"]
    results.validate(document)
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(results.SCHEMA)
    jsonschema.validate(document, results.SCHEMA)
    assert len(document["cases"]) == 3 + 3 + 3 * 2
    assert {case["cache"] for case in document["cases"]} == {"model", "exact", TINY_CACHE}
    printed = capsys.readouterr()
    assert "\r" not in printed.err
    for case in document["cases"]:
        assert any(row.startswith(f"| {case['cache']} ") and case["source"] in row and f"{case['nbytes']:,}" in row
                   for row in printed.out.splitlines())
    assert "perplexity at equal bytes" in printed.out and "mean of 2" in printed.out


def test_logits_of_the_sample_need_no_model(tmp_path, capsys):
    path = tmp_path / "logits.json"
    assert cli.main(["eval", "--cache", "exact", "--cache", "turboquant:key_bits=2/4", "--queries", "3", "--json",
                     str(path)]) == 0
    document = results.load(path)
    assert list(document["setup"]) == ["logits"] and len(document["cases"]) == 3
    two, four = (case["metrics"]["logit_mae"] for case in document["cases"][1:])
    assert 0 < four < two
    assert "logits at equal bytes" in capsys.readouterr().out


def test_resumed_runs_measure_what_is_missing(folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / "eval.json"
    _, first = run(folder, "--cache", "exact", path=path)
    _, both = run(folder, "--task", "codecs", "--cache", "exact", "--resume", path=path)
    assert list(both["setup"]) == ["perplexity", "codecs"] and both["cases"][-2:] == first["cases"]
    monkeypatch.setattr(perplexity, "of_model", lambda *a: pytest.fail("the baseline is known"))
    _, third = run(folder, "--cache", TINY_CACHE, "--cache", "exact", "--resume", path=path)
    assert [case["cache"] for case in third["cases"][:3]] == ["model", TINY_CACHE, "exact"]
    assert [third["cases"][0], third["cases"][2]] == first["cases"] and third["cases"][3:] == both["cases"][:2]
    _, fourth = run(folder, "--cache", "exact", "--resume", path=path)
    assert len(fourth["cases"]) == 5, "caches that this run does not name are kept"
    with pytest.raises(pytest.fail.Exception):
        run(folder, "--cache", "exact", "--resume", "--prompt", "11", path=path)        # another setup


def test_an_interrupted_run_keeps_what_is_done(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(perplexity, "of_cache", interrupt)
    status, document = run(folder, "--cache", "exact", path=tmp_path / "eval.json")
    assert status == 130 and not document["complete"] and [case["cache"] for case in document["cases"]] == ["model"]


@pytest.mark.parametrize("arguments, message", [
    (["--task", "perplexity"], "--model: expected a model"), (["--resume"], "--resume: expected --json"),
    (["--kv", "/nonexistent"], "/nonexistent"), (["--cache", "exakt"], "unknown preset 'exakt'"),
])
def test_wrong_usage_is_said(capsys, arguments, message):
    assert cli.main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--task", "logit"], ["--depths", "2"], ["--depths", "x"], ["--tokens", "0"],
                                       ["--lengths", "1,x"]])
def test_wrong_values_are_said(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", *arguments])
    assert stopped.value.code == 2 and "error" in capsys.readouterr().err


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "eval.json"
    for content in ("", "[]", '{"schema": "kvbench.bench/1"}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="eval.json: not a result of kvbench eval"):
            results.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        results.load(tmp_path / "none.json")


def case(cache, bits, error, source="a"):
    return {"task": "logits", "cache": cache, "source": source, "bits_per_element": bits, "nbytes": 10, "tokens": 1,
            "seconds": 0.0, "metrics": {"output_error": error}}


def test_equal_bytes_compare_real_bits():
    cases = [case("a", 3.2, 0.2), case("a", 3.6, 0.4, "b"), case("b", 3.5, 0.25), case("c", 2.0, 0.5)]
    means = results.means(cases)
    assert [(m["cache"], m["bits_per_element"], m["source"], m["nbytes"]) for m in means] == [
        ("a", pytest.approx(3.4), "mean of 2", 20), ("b", 3.5, "a", 10), ("c", 2.0, "a", 10)]
    best = {bits: results.best_within(means, bits, "output_error") for bits in (1, 2.5, 3.45, 3.5)}
    assert best[1] is None and [best[bits]["cache"] for bits in (2.5, 3.45, 3.5)] == ["c", "a", "b"]


# ---- the real model

@pytest.mark.models
def test_smollm2_finds_needles_and_loses_little(capsys, tmp_path):
    path = tmp_path / "eval.json"
    assert cli.main(["eval", "--model", "smollm2", "--task", "perplexity,needle", "--cache", "exact", "--cache",
                     "turboquant:key_bits=4,value_bits=4", "--prompt", "256", "--tokens", "256", "--lengths", "512",
                     "--depths", "0.3", "--json", str(path)]) == 0
    found = {(case["task"], case["cache"]): case["metrics"] for case in results.load(path)["cases"]}
    assert abs(found["perplexity", "exact"]["loss_percent"]) < 0.1
    assert found["perplexity", "turboquant:key_bits=4,value_bits=4"]["loss_percent"] < 3
    assert all(metrics["found"] == 1 for (task, _), metrics in found.items() if task == "needle")
