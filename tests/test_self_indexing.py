"""Self-Indexing: what is particular to it.  Agreement with the reference on every backend: tests/test_kernels.py."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import needs
from kvbench import arrays, caches, codecs, data, indexes, loaders, registry, trees
from kvbench.ops import attention, self_indexing
from kvbench.ops.dispatch import NUMPY_TYPE
from kvbench.ops.self_indexing_records import _attention_agreement
from kvbench.reference import attention as exact_attention
from kvbench.reference import kivi, selection
from kvbench.reference import self_indexing as reference
from kvbench.reference.self_indexing import Encoded
from kvbench.verify import compare
from strategies.arrays import schedules, seeds
from strategies.self_indexing import sparse_attention_packed as attention_arguments

FAST = [needs("cpu"), needs("simt")]


def normal(seed, shape, dtype="float16"):
    return np.random.default_rng([seed, 11]).standard_normal(shape).astype(NUMPY_TYPE[dtype])


def frozen(keys, query=None, **options):
    return reference.freeze(keys, query, **({"sinks": "none"} if query is None else {}), **options)


def bits_of(encoded):
    return [array.tobytes() for array in trees.arrays_of(encoded).values()]


def store(shape, head_dim):
    """An `Encoded` whose bits are all set: what is not written stays so."""
    def filled(last, dtype):
        return np.full((*shape, last), np.iinfo(dtype).max if dtype == np.uint32 else np.nan, dtype)
    return Encoded(filled(head_dim // 32, np.uint32), kivi.Values(filled(head_dim // 16, np.uint32), *(
        filled(head_dim // 32, np.float16) for _ in range(2)), 2, 32))


def slots(encoded, part):
    return trees.apply(lambda _, array: array[:, :, part], encoded)


# ---- codes in a store ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tokens_are_appended_to_a_store(backend, head_dim):
    """One prompt and single tokens write what one call writes, and nothing else."""
    keys = normal(0, (2, 2, 41, head_dim))
    prompt = frozen(keys)
    whole = self_indexing.encode(keys, prompt.mean, prompt.channel_scale, backend="reference")
    held = store((2, 2, 50), head_dim)
    for start, stop in ((0, 37), (37, 38), (38, 41)):
        given = slots(held, slice(start + 3, stop + 3))
        assert self_indexing.encode(keys[:, :, start:stop], prompt.mean, prompt.channel_scale, out=given,
                                    backend=backend) is given
    assert bits_of(slots(held, slice(3, 44))) == bits_of(whole)
    untouched = store((2, 2, 50), head_dim)
    for part in (slice(0, 3), slice(44, 50)):
        assert bits_of(slots(held, part)) == bits_of(slots(untouched, part))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_keys_that_are_not_finite_have_codes_zero(backend, bad):
    keys = normal(1, (1, 2, 20, 128), "float32")
    prompt = frozen(keys)
    clean = self_indexing.encode(keys, prompt.mean, prompt.channel_scale, backend=backend)
    keys[0, 1, 7, 100] = bad
    spoiled = self_indexing.encode(keys, prompt.mean, prompt.channel_scale, backend=backend)
    token = slots(spoiled, slice(7, 8))
    assert not any(array[0, 1].any() for array in trees.arrays_of(token).values())
    for one, other in zip(trees.arrays_of(clean).values(), trees.arrays_of(spoiled).values()):
        assert (np.delete(one, 7, axis=2) == np.delete(other, 7, axis=2)).all()
        assert (one[0, 0] == other[0, 0]).all()
    with pytest.raises(ValueError, match="self_indexing.encode: x: expected finite numbers, got NaN or Inf in 1 vect"):
        self_indexing.encode(keys, prompt.mean, prompt.channel_scale, check_finite=True, backend=backend)


# ---- from a prompt to an output --------------------------------------------------------------------------------------


def select(scores, k):
    chosen = selection.top_k(selection.Scores(scores), k, sinks=0, recent=0)
    return chosen.indices, chosen.counts


@pytest.mark.parametrize("backend", FAST)
def test_a_step_on_real_keys(backend):
    """Prompt, index, selection and attention: every chosen score reaches the k-th of the reference, and the output is
    that of the reference for the same selection, near the one over all tokens."""
    sample = data.sample()
    tokens, query = 700, np.ascontiguousarray(sample.queries[:, :, 1])
    keys, values = sample.keys[:, :, :tokens], sample.values[:, :, :tokens]
    prompt = frozen(keys, sample.queries[:, :, 0], sink_count=16)
    codebook = self_indexing.build_codebook(keys, prompt.mean, excluded=prompt.sinks)
    np.testing.assert_allclose(codebook, prompt.codebook, rtol=1e-6, atol=1e-6)
    coded = self_indexing.encode(keys, prompt.mean, prompt.channel_scale, backend=backend)
    packed = kivi.encode_values(values, 4, 32)
    scores = self_indexing.score(query, coded.sign, codebook, excluded=prompt.sinks, backend=backend)
    exact = reference.score(query, coded.sign, codebook, excluded=prompt.sinks)
    indices, counts = select(scores, 96)
    largest = np.sort(exact[0, 0])[-96]
    size = np.abs(reference.build_tables(query, codebook)).max(axis=-1).sum()
    assert (exact[0, 0, indices[0, 0, :96]] >= largest - 1e-5 * size).all() and counts.tolist() == [[96]]
    sinks = tuple(np.ascontiguousarray(x[:, :, prompt.sinks[0, 0]]) for x in (keys, values))
    arguments = {"query": query, "keys": coded, "values": packed, "channel_scale": prompt.channel_scale,
                 "indices": indices, "counts": counts, "mean": prompt.mean, "exact_keys": sinks[0],
                 "exact_values": sinks[1], "return_lse": True}
    made = self_indexing.sparse_attention_packed(**arguments, backend=backend)
    _attention_agreement(arguments, reference.sparse_attention_packed(**arguments), made)
    output, lse = attention.decode(query, keys, values, return_lse=True, backend="reference")
    missing = -np.expm1(np.minimum(made[1].astype(float) - lse, 0)).max()
    assert missing < 0.5 and np.linalg.norm(made[0].astype(float) - output) < 0.5 * np.linalg.norm(output)


@pytest.mark.parametrize("backend", FAST)
def test_the_exact_part_merges_as_a_part_of_its_own(backend):
    """Sinks and tail in the same softmax, or attended by the exact operator and merged: the same, and so is
    any number of splits."""
    query, keys, values = normal(2, (2, 4, 64)), normal(3, (2, 2, 150, 64)), normal(4, (2, 2, 150, 64))
    prompt = frozen(keys)
    coded, packed = reference.encode(keys, prompt.mean, prompt.channel_scale), kivi.encode_values(values, 2, 32)
    exact = {"exact_keys": normal(5, (2, 2, 40, 64)), "exact_values": normal(6, (2, 2, 40, 64))}
    lengths = np.array([40, 13], np.int32)
    common = {"query": query, "keys": coded, "values": packed, "channel_scale": prompt.channel_scale,
              "indices": np.tile(np.arange(0, 150, 2, dtype=np.int32), (2, 2, 1)),
              "counts": np.array([[75, 0], [33, 1]], np.int32), "mean": prompt.mean, "return_lse": True}
    whole = {**common, **exact, "exact_lengths": lengths}
    made = self_indexing.sparse_attention_packed(**whole, backend=backend)
    expected = reference.sparse_attention_packed(**whole)
    _attention_agreement(whole, expected, made)
    parts = [self_indexing.sparse_attention_packed(**common, backend=backend),
             attention.decode(query, *exact.values(), lengths=lengths, return_lse=True, backend=backend)]
    merged = attention.merge(*(np.stack([part[i].astype(np.float32) for part in parts]) for i in range(2)))
    np.testing.assert_allclose(merged[0], expected[0], atol=4e-3)        # float16 parts and weights
    np.testing.assert_allclose(merged[1], expected[1], atol=4e-3)
    for splits in (1, 3, 256):
        part = self_indexing.sparse_attention_packed(**whole, splits=splits, backend=backend)
        _attention_agreement(whole, expected, part)


@pytest.mark.parametrize("backend", [needs("simt")])
@settings(max_examples=25)
@given(arguments=attention_arguments(), splits=st.integers(1, 9), schedule=schedules)
def test_any_number_of_splits_agrees(backend, arguments, splits, schedule):
    """A workspace of the caller serves many launches: tickets are zero again after each."""
    batch, q_heads, head_dim = arguments["query"].shape
    scratch = attention.workspace(batch, q_heads, head_dim, "cpu")
    with np.errstate(all="ignore"):
        expected = reference.sparse_attention_packed(**arguments)
        for options in ({"splits": splits}, {"workspace": scratch}, {"workspace": scratch}):
            with loaders.simt_schedule(schedule, False):
                made = self_indexing.sparse_attention_packed(**arguments, **options, backend=backend)
            _attention_agreement(arguments, expected, made)
            assert not scratch.tickets.numpy().any()


@pytest.mark.parametrize("backend", FAST)
@given(seed=seeds)
def test_group_queries_score_as_their_mean(backend, seed):
    """Identity I2: the mean of the heads' scores is the score of the mean query."""
    rng = np.random.default_rng(seed)
    group = int(rng.integers(1, 17))
    query = normal(seed, (1, 2 * group, 64), "float32")
    sign = rng.integers(0, 2**32, (1, 2, 9, 2), dtype=np.uint32)
    codebook = normal(seed + 1, (1, 2, 16, 16, 4), "float32")
    each = self_indexing.score(query, sign, codebook, heads="each", backend=backend)
    mean = self_indexing.score(query, sign, codebook, backend=backend)
    size = np.abs(reference.build_tables(np.abs(query), np.abs(codebook), heads="each")).max(axis=-1).sum(axis=-1)
    np.testing.assert_allclose(each.reshape(1, 2, group, 9).mean(axis=2), mean, atol=1e-5 * size.max())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_lane_scores_many_tokens(backend, heads, head_dim):
    """More of them than a lane has at a time and under way; the last ones are no whole step."""
    rng, tokens = np.random.default_rng(head_dim), 2700
    compare(registry.get("self_indexing.score"), {
        "query": normal(1, (2, 6, head_dim)), "heads": heads, "lengths": np.array([tokens, tokens - 300], np.int32),
        "sign": rng.integers(0, 2**32, (2, 2, tokens, head_dim // 32), dtype=np.uint32),
        "codebook": normal(2, (2, 2, head_dim // 4, 16, 4), "float32"),
        "excluded": rng.integers(0, tokens, (2, 2, 5), dtype=np.int32)}, backend)


@pytest.mark.parametrize("backend", FAST)
def test_results_go_where_they_are_wanted(backend):
    query, sign, codebook = normal(7, (1, 4, 64)), np.zeros((1, 2, 5, 2), np.uint32), normal(8, (1, 2, 16, 16, 4),
                                                                                             "float32")
    scores, tables = np.empty((1, 2, 5), np.float32), np.empty((1, 4, 16, 16), np.float32)
    assert self_indexing.score(query, sign, codebook, out=scores, backend=backend) is scores
    assert self_indexing.build_tables(query, codebook, heads="each", out=tables, backend=backend) is tables
    arguments = attention_case()
    out, lse = np.empty((1, 4, 64), np.float32), np.empty((1, 4), np.float32)
    assert self_indexing.sparse_attention_packed(**arguments, out=out, lse=lse, backend=backend) is out
    expected = reference.sparse_attention_packed(**arguments)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


def test_other_frameworks_get_their_own_arrays():
    torch = pytest.importorskip("torch")
    keys = torch.from_numpy(normal(9, (1, 2, 6, 64)))
    prompt = frozen(keys.numpy())
    coded = self_indexing.encode(keys, *map(torch.from_numpy, (prompt.mean, prompt.channel_scale)))
    assert all(isinstance(array, torch.Tensor) for array in trees.arrays_of(coded).values())
    query, codebook = torch.from_numpy(normal(10, (1, 4, 64))), torch.from_numpy(prompt.codebook)
    assert isinstance(self_indexing.score(query, coded.sign, codebook), torch.Tensor)


# ---- codec, index, cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", reference.CENTRES)
def test_the_codec_holds_four_bits(centre):
    codec, x = codecs.SignVQ(128, centre, sinks=4), normal(0, (2, 2, 50, 128), "float32")
    packed = codec.encode(x)
    prompt = frozen(x, np.zeros((2, 2, 128)), centre=centre, sinks="first", sink_count=4)
    assert (packed.mean[:, :, 0] == prompt.mean).all() and (packed.channel_scale[:, :, 0] == prompt.channel_scale).all()
    per_token = sum(getattr(packed, name).nbytes for name in ("sign", "codes", "scale", "minimum"))
    assert codec.bits_per_element == 4 == 8 * per_token / x.size
    decoded = codec.decode(packed, "float32")
    bound = reference.error_bound(x, prompt.mean, codec.encoded(packed), prompt.channel_scale)
    assert (np.abs(decoded - x) <= bound + 1e-6 * (1 + np.abs(x))).all()
    query = normal(1, (2, 4, 128), "float32")
    expected = np.einsum("bhd,bhtd->bht", query, np.repeat(decoded.astype(float), 2, axis=1)) / 128**0.5
    np.testing.assert_allclose(codec.logits(query, packed), expected, atol=1e-5)
    assert codecs.rebuild(codec.config()) == codec
    index = indexes.SignVQ(128, centre, 4)
    assert codecs.rebuild(index.config()) == index and type(codecs.rebuild(index.config())) is indexes.SignVQ


def test_index_and_codec_have_one_sign_plane():
    """The index alone scores as the one of a cache, which holds a codebook and no signs."""
    codec, index, keys = codecs.SignVQ(64, sinks=3), indexes.SignVQ(64, sinks=3), normal(0, (1, 2, 40, 64))
    coded, packed, query = index.encode(keys), codec.encode(keys), normal(1, (1, 4, 64))
    scores = index.score(query, coded).logits
    assert scores.shape == (1, 2, 40) and (coded.sign == packed.sign).all()
    shared = indexes.SignVQCodebook(coded.codebook)
    assert (index.score(query, shared, packed).logits == scores).all()
    expected = reference.score(query, packed.sign, coded.codebook, scale=64**-0.5)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    with pytest.raises(TypeError, match="keys: expected keys stored by codecs.SignVQ, .* got NoneType"):
        index.score(query, shared)
    assert [*index.allocate(1, 2, 1000, "cpu").arrays()] == ["codebook"]


def held(cache):
    """Bytes of all that a cache holds, by name."""
    return {name: view.to_host().tobytes() for name, view in cache.contents().items()}


@pytest.mark.parametrize("value_bits", [2, 4])
def test_a_cache_that_selects_all_attends_to_all(value_bits, tmp_path):
    """The same as exact attention to sinks, decoded store and tail; one by one or at once; and saved."""
    keys, values, query = normal(0, (2, 2, 60, 64)), normal(1, (2, 2, 60, 64)), normal(2, (2, 4, 64))
    options = {"batch": 2, "kv_heads": 2, "q_heads": 4, "head_dim": 64, "capacity": 70, "sinks": 4, "tail": 8,
               "value_bits": value_bits}
    cache = caches.self_indexing(**options, budget=70)
    cache.append(keys[:, :, :50], values[:, :, :50])
    for t in range(50, 60):
        cache.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    at_once = caches.self_indexing(**options, budget=70)
    at_once.append(keys[:, :, :50], values[:, :, :50])
    at_once.append(keys[:, :, 50:], values[:, :, 50:])
    assert held(cache) == held(at_once)
    prompt = frozen(keys[:, :, :50], np.zeros((2, 2, 64)), sinks="first", sink_count=4)
    coded = reference.decode(reference.encode(keys, prompt.mean, prompt.channel_scale), prompt.channel_scale)
    whole = [coded + prompt.mean[:, :, None].astype(float), kivi.decode(kivi.encode_values(values, value_bits, 32))]
    for side, exact in zip(whole, (keys, values)):
        side[:, :, :4], side[:, :, 52:] = exact[:, :, :4], exact[:, :, 52:]
    expected, _ = exact_attention.decode(query, *whole)
    np.testing.assert_allclose(cache.attend(query).astype(float), expected, atol=2e-3)
    cache.save(tmp_path / "cache")
    again = caches.load(tmp_path / "cache")
    assert held(again) == held(cache) and (again.attend(query) == cache.attend(query)).all()


def test_a_cache_attends_to_its_budget():
    """One list for a KV head, of the best scores of the store; short sequences attend to all they have."""
    keys, values, query = normal(0, (2, 2, 300, 64)), normal(1, (2, 2, 300, 64)), normal(2, (2, 8, 64))
    cache = caches.self_indexing(2, 2, 8, 64, 400, budget=24, sinks=4, tail=16)
    cache.append(keys, values, lengths=[300, 30])
    output = cache.attend(query)
    chosen = cache.last_selection
    counts = arrays.borrow(chosen.counts, "counts").to_host()
    assert counts.tolist() == [[20, 20], [10, 10]]
    indices = arrays.borrow(chosen.indices, "indices").to_host()
    for b, length in enumerate((300, 30)):
        own, own_values = keys[b : b + 1, :, :length], values[b : b + 1, :, :length]
        prompt = frozen(own, np.zeros((1, 2, 64)), sinks="first", sink_count=4)
        coded = reference.encode(own[:, :, 4 : length - 16], prompt.mean, prompt.channel_scale)
        scores = reference.score(query[b : b + 1], coded.sign, prompt.codebook)
        for h in range(2):
            listed = indices[b, h, : counts[b, h]]
            assert set(listed) == set(np.argsort(-scores[0, h], kind="stable")[: counts[b, h]])
        near = [np.r_[0:4, length - 16 : length]]
        expected = reference.sparse_attention_packed(
            query[b : b + 1], coded, kivi.encode_values(own_values[:, :, 4 : length - 16], 2, 32), prompt.channel_scale,
            indices[b : b + 1], counts[b : b + 1], mean=prompt.mean, exact_keys=own[:, :, near[0]],
            exact_values=own_values[:, :, near[0]], return_lse=False)
        np.testing.assert_allclose(output[b].astype(float), expected[0], atol=2e-3)


def test_pairs_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="SignVQ x TokenInt: values: expected 2 or 4 bits .* got 8 bits"):
        caches.self_indexing(1, 1, 1, 64, 10, value_bits=8)
    with pytest.raises(ValueError, match="self_indexing: budget: expected an integer of at least 0, got 0.5"):
        caches.self_indexing(1, 1, 1, 64, 10, budget=0.5)
    for make in (codecs.SignVQ, indexes.SignVQ):
        with pytest.raises(ValueError, match="SignVQ: centre: expected one of mean, median, none, got 'mode'"):
            make(64, "mode")
        with pytest.raises(ValueError, match="SignVQ: head_dim: expected a .*multiple of 32, got 40"):
            make(40)


# ---- bad input -------------------------------------------------------------------------------------------------------


def attention_case():
    keys, values = normal(0, (1, 2, 6, 64)), normal(1, (1, 2, 6, 64))
    prompt = frozen(keys)
    return {"query": normal(2, (1, 4, 64)), "keys": reference.encode(keys, prompt.mean, prompt.channel_scale),
            "values": kivi.encode_values(values, 2, 32), "channel_scale": prompt.channel_scale,
            "indices": np.zeros((1, 2, 3), np.int32), "counts": np.ones((1, 2), np.int32)}


KEYS, MEAN, ALPHA = normal(0, (1, 2, 6, 64)), np.zeros((1, 2, 64), np.float32), np.ones((1, 2, 64), np.float32)
CODED = reference.encode(KEYS, MEAN, ALPHA)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"x": KEYS[0]}, ValueError, r"x: expected shape \[batch, kv_heads, tokens, head_dim\], got \[2, 6, 64\]"),
    ({"x": KEYS.astype(np.float64)}, TypeError, "x: expected dtype float16, bfloat16 or float32, got float64"),
    ({"x": KEYS[..., :20]}, ValueError, "x: expected a head_dim that is a multiple of 32, got 20"),
    ({"mean": MEAN[0]}, ValueError, "mean: expected shape"),
    ({"mean": MEAN.astype(np.float16)}, TypeError, "mean: expected dtype float32, got float16"),
    ({"channel_scale": 0 * ALPHA}, ValueError, "channel_scale: expected positive finite numbers"),
    ({"channel_scale": ALPHA * np.float32(np.nan)}, ValueError, "channel_scale: expected positive finite numbers"),
    ({"out": CODED.sign}, TypeError, "out: expected an Encoded from self_indexing.encode, got ndarray"),
    ({"out": slots(CODED, slice(0, 4))}, ValueError, "out.sign: expected shape"),
    ({"backend": "gpu"}, ValueError, "backend: expected one of reference, cpu, cuda, native, simt"),
])
def test_encode_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"self_indexing.encode: {message}"):
        self_indexing.encode(**{"x": KEYS, "mean": MEAN, "channel_scale": ALPHA, **arguments})


def test_encode_refuses_read_only_and_shared_memory():
    given = reference.encode(KEYS, MEAN, ALPHA)
    given.sign.flags.writeable = False
    with pytest.raises(ValueError, match="out.sign: expected writable memory"):
        self_indexing.encode(KEYS, MEAN, ALPHA, out=given)
    shared = Encoded(reference.encode(KEYS, MEAN, ALPHA).sign, kivi.Values(
        CODED.magnitude.codes, CODED.magnitude.scale, CODED.magnitude.scale, 2, 32))
    with pytest.raises(ValueError, match="out.magnitude.minimum: expected memory apart from out.magnitude.scale"):
        self_indexing.encode(KEYS, MEAN, ALPHA, out=shared)


GOOD_SCORE = {"query": normal(2, (1, 4, 64)), "sign": CODED.sign,
              "codebook": np.zeros((1, 2, 16, 16, 4), np.float32)}


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"query": normal(2, (1, 3, 64))}, ValueError, "query: expected q_heads a positive multiple of kv_heads = 2, got"),
    ({"codebook": np.zeros((1, 2, 16, 4, 4), np.float32)}, ValueError, "codebook: expected shape"),
    ({"sign": CODED.sign.astype(np.int32)}, TypeError, "sign: expected dtype uint32, got int32"),
    ({"sign": CODED.sign[:, :, ::2]}, ValueError, "sign: expected tokens that follow one another, 2 elements each"),
    ({"heads": "all"}, ValueError, "heads: expected one of mean, each, got 'all'"),
    ({"scale": np.inf}, ValueError, "scale: expected a finite number, got inf"),
    ({"excluded": np.zeros((1, 1, 3), np.int32)}, ValueError, "excluded: expected shape"),
    ({"lengths": np.zeros(2, np.int32)}, ValueError, "lengths: expected shape"),
])
def test_score_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"self_indexing.score: {message}"):
        self_indexing.score(**{**GOOD_SCORE, **arguments})


GOOD = attention_case()


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"keys": GOOD["values"]}, TypeError, "keys: expected an Encoded from self_indexing.encode, got Values"),
    ({"values": GOOD["keys"]}, TypeError, "values: expected a kivi.Values, got Encoded"),
    ({"values": kivi.encode_values(KEYS, 8, 32)}, ValueError, "values: expected 2 or 4 bits in groups of 32 .* got 8"),
    ({"values": kivi.encode_values(KEYS, 2, 64)}, ValueError, "values: expected .* got 2 bits in groups of 64"),
    ({"values": kivi.encode_values(KEYS[:, :, :4], 2, 32)}, ValueError, "values.codes: expected shape .* tokens = 6"),
    ({"indices": GOOD["indices"].astype(np.int64)}, TypeError, "indices: expected dtype int32, got int64"),
    ({"indices": np.zeros((1, 4, 3), np.int32)}, ValueError, "indices: expected shape .* kv_heads = 2"),
    ({"exact_keys": KEYS}, ValueError, "exact_values: expected keys and values, or neither"),
    ({"exact_keys": KEYS, "exact_values": KEYS[:, :, :3]}, ValueError, "exact_values: expected shape .* exact = 6"),
    ({"exact_lengths": np.zeros(1, np.int32)}, ValueError, "exact_lengths: expected exact_keys"),
    ({"exact_keys": KEYS.astype(np.float32), "exact_values": KEYS}, TypeError, "exact_keys: expected dtype float16"),
    ({"splits": 0}, ValueError, "splits: expected an integer from 1 to 256, got 0"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
])
def test_attention_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"self_indexing.sparse_attention_packed: {message}"):
        self_indexing.sparse_attention_packed(**{**GOOD, **arguments})


@pytest.mark.parametrize("backend", [needs("simt")])
def test_cuda_kernels_say_what_they_take(backend):
    keys, one = normal(0, (1, 1, 3, 32)), np.ones((1, 1, 32), np.float32)
    with pytest.raises(ValueError, match="x: expected head_dim 64, 128 or 256 on backend 'simt', got 32"):
        self_indexing.encode(keys, one, one, backend=backend)
    with pytest.raises(ValueError, match="query: expected at most 16 query heads per KV head .* got 17"):
        self_indexing.sparse_attention_packed(**{**GOOD, "query": normal(0, (1, 34, 64))}, backend=backend)
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, got 'simt'"):
        self_indexing.build_codebook(KEYS, MEAN, backend=backend)
    unaligned = np.zeros(2 * 6 * 2 + 1, np.uint32)[1:].reshape(1, 2, 6, 2)
    if unaligned.ctypes.data % 8:
        with pytest.raises(ValueError, match="sign: expected rows at multiples of 8 bytes"):
            self_indexing.score(**{**GOOD_SCORE, "sign": unaligned}, backend=backend)


@pytest.mark.skipif(loaders.availability("simt") is not None, reason=str(loaders.availability("simt")))
def test_attention_begins_early_only_if_it_is_told_so():
    """Else its query, or exact rows, may be what the kernel ahead writes."""
    with loaders.record() as launches:
        for told in ({}, {"early": False}, {"early": True}):
            self_indexing.sparse_attention_packed(**GOOD, **told, backend="simt")
    assert [launch["early"] for launch in launches] == [False, False, True]


# ---- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_step_runs_in_a_cuda_graph_on_the_callers_stream():
    """A token appended by out=, scores and attention, captured once and replayed."""
    cupy = pytest.importorskip("cupy")
    keys, values = normal(0, (2, 2, 300, 128)), normal(1, (2, 2, 300, 128))
    prompt = frozen(keys)
    placed = {name: trees.apply(lambda _, array: cupy.asarray(array), tree) for name, tree in {
        "query": normal(2, (2, 8, 128)), "keys": reference.encode(keys, prompt.mean, prompt.channel_scale),
        "values": kivi.encode_values(values, 2, 32), "channel_scale": prompt.channel_scale, "mean": prompt.mean,
        "indices": np.tile(np.arange(0, 300, 3, dtype=np.int32), (2, 2, 1)),
        "counts": np.full((2, 2), 100, np.int32)}.items()}
    token, codebook = cupy.asarray(normal(3, (2, 2, 1, 128))), cupy.asarray(prompt.codebook)
    scores, out = cupy.empty((2, 2, 300), np.float32), cupy.empty_like(placed["query"])
    scratch = attention.workspace(2, 8, 128, "cuda")

    def step():
        self_indexing.encode(token, placed["mean"], placed["channel_scale"], out=slots(placed["keys"], slice(299, 300)))
        self_indexing.score(placed["query"], placed["keys"].sign, codebook, out=scores)
        self_indexing.sparse_attention_packed(**placed, out=out, workspace=scratch)

    step()
    expected = scores.get(), out.get()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        for _ in range(3):
            scores.fill(0), out.fill(0)
            graph.launch(stream)
            stream.synchronize()
            for array, known in zip((scores, out), expected):
                assert array.get().tobytes() == known.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [pytest.param(*needs(b).values, marks=needs(b).marks) for b in ("cuda", "native")])
def test_attention_that_begins_early_waits_for_the_selection(backend):
    """Steps that follow one another without a pause; then each again, twice: what the second finds in memory before it
    waits is what it would find afterwards."""
    cupy = pytest.importorskip("cupy")
    keys, values = (cupy.asarray(normal(seed, (1, 8, 20000, 128))) for seed in (0, 1))
    cache = caches.self_indexing(1, 8, 32, 128, 20000, device="cuda", backend=backend)
    cache.append(keys, values)
    queries = [cupy.asarray(normal(seed, (1, 32, 128))) for seed in range(2, 34)]
    made = [cache.attend(query) for query in queries]
    for query, output in zip(queries, made):
        cache.attend(query)
        assert cache.attend(query).tobytes() == output.tobytes()
