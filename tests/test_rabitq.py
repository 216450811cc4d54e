"""RaBitQ operators: stores, edges and errors that drawn inputs of test_kernels.py do not single out, and regression
tests of the defects R1 to R16 of the public release that concern them."""
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import TESTED_BACKENDS, needs
from kvbench import arrays, loaders, registry, trees
from kvbench.ops import attention, rabitq, rabitq_launch, selection, turboquant
from kvbench.reference import attention as exact, rabitq as reference
from kvbench.reference.rabitq import Encoded
from kvbench.reference.rotation import Rotation, haar, hadamard
from kvbench.scores import Scores
from kvbench.verify import compare, to_host
from strategies.arrays import NUMPY_TYPE, fill, groups, head_dims, seeds
from strategies.rabitq import index_in_a_store, random_index

BACKENDS = [needs(backend) for backend in TESTED_BACKENDS]
CUDA_BACKENDS = [needs(backend) for backend in TESTED_BACKENDS if backend not in ("reference", "cpu")]
HOST_BACKENDS = [needs(backend) for backend in ("reference", "cpu")]
dtypes = st.sampled_from(sorted(NUMPY_TYPE))


def on(backend, tree):
    """NumPy arrays, in containers too, where the backend can reach them."""
    if backend not in ("cuda", "native"):
        return tree
    return trees.apply(lambda path, array: arrays.upload(array, "cuda").give(), tree)


def normal(seed, shape, dtype="float16"):
    return fill(np.random.default_rng(seed), shape, dtype, "normal")


def encode(backend, keys, rotation, **options):
    options = {name: on(backend, value) for name, value in options.items()}
    return to_host(rabitq.encode(on(backend, keys), rotation, **options, backend=backend))


def score(backend, query, encoded, rotation, **options):
    options = {name: on(backend, value) if name == "lengths" else value for name, value in options.items()}
    return to_host(rabitq.score(on(backend, query), on(backend, encoded), rotation, **options, backend=backend))


def parts(encoded):
    return {name: array for name in ("sign", "rescale", "offset") if (array := getattr(encoded, name)) is not None}


def tokens_of(encoded, index):
    """encoded[index], of the same memory; the means as they are."""
    return dataclasses.replace(encoded, **{name: array[index] for name, array in parts(encoded).items()})


def assert_same(one, other):
    assert parts(one).keys() == parts(other).keys()
    for name, array in parts(one).items():
        assert array.tobytes() == parts(other)[name].tobytes(), name


# ------------------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("backend", BACKENDS)
@given(head_dim=head_dims, dtype=dtypes, seed=seeds, data=st.data())
def test_appending_equals_encoding_at_once(backend, head_dim, dtype, seed, data):
    """Tokens written piece by piece into a store, in place: the bytes of one call, and nothing beside them changes."""
    tokens, start = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 8))
    keys, rotation = normal(seed, (2, 3, tokens, head_dim), dtype), hadamard(head_dim, seed)
    means = {name: normal(seed + i, (2, 3, head_dim), "float32") for i, name in enumerate(("key_mean", "query_mean"))
             if data.draw(st.booleans())}
    expected = encode(backend, keys, rotation, **means)
    store = random_index(np.random.default_rng(seed), (3, 3, 20), head_dim, query_mean="query_mean" in means)
    slots = (slice(1, None), slice(None), slice(start, start + tokens))
    shadow = {name: array.copy() for name, array in parts(store).items()}
    for name, array in parts(expected).items():
        shadow[name][slots] = array
    store, keys, means = on(backend, store), on(backend, keys), on(backend, means)
    cuts = sorted({0, tokens, *data.draw(st.lists(st.integers(0, tokens), max_size=4))})
    for first, last in itertools.pairwise(cuts):
        out = tokens_of(store, (slice(1, None), slice(None), slice(start + first, start + last)))
        assert rabitq.encode(keys[:, :, first:last], rotation, **means, out=out, backend=backend) is out
    for name, array in parts(to_host(store)).items():
        assert array.tobytes() == shadow[name].tobytes(), name


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, dtype=dtypes)
def test_strided_keys_are_read_in_place(backend, seed, dtype):
    """The [batch, tokens, kv_heads, head_dim] layout of most models, and a slice of a larger cache."""
    rotation, keys = hadamard(64, seed), normal(seed, (2, 3, 9, 64), dtype)
    expected = encode(backend, keys, rotation)
    larger = np.full((3, 4, 20, 64), np.nan, keys.dtype)
    larger[1:, 1:, 5:14] = keys
    for strided in (on(backend, np.ascontiguousarray(keys.swapaxes(1, 2))).swapaxes(1, 2),
                    on(backend, larger)[1:, 1:, 5:14]):
        assert_same(to_host(rabitq.encode(strided, rotation, backend=backend)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, bits=st.integers(1, 8), head_dim=head_dims, centred=st.booleans())
def test_a_codec_of_the_same_rotation_holds_the_same_signs(backend, seed, bits, head_dim, centred):
    keys, rotation = on(backend, normal(seed, (1, 2, 40, head_dim))), hadamard(head_dim, seed)
    mean = on(backend, normal(seed + 1, (2, head_dim), "float32")) if centred else None
    codec = turboquant.encode(keys, rotation, bits, mean=mean, backend=backend)
    index = rabitq.encode(keys, rotation, key_mean=mean, backend=backend)
    assert (to_host(index).sign == to_host(codec).planes.sign).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
@pytest.mark.parametrize("kind", [hadamard, haar])
def test_special_tokens(backend, dtype, kind):
    """Zeros, NaN and Inf: code 0, and 0 or NaN as r.  No token touches another."""
    keys, query_mean, rotation = normal(0, (1, 2, 8, 64), dtype), normal(1, (2, 64), "float32"), kind(64, 1)
    clean = encode(backend, keys, rotation, query_mean=query_mean)
    keys[0, 0, 1], keys[0, 0, 3, 17], keys[0, 1, 5, 63], keys[0, 1, 6, 0] = 0, np.nan, np.inf, -np.inf
    special = [(0, 0, 1), (0, 0, 3), (0, 1, 5), (0, 1, 6)]
    actual = encode(backend, keys, rotation, query_mean=query_mean)
    assert actual.rescale[special[0]] == 0 and actual.offset[special[0]] == 0
    for token in special:
        assert not actual.sign[token].any()
    for token in special[1:]:
        assert np.isnan(actual.rescale[token]) and np.isnan(actual.offset[token])
    for name, array in parts(actual).items():
        expected = parts(clean)[name].copy()
        for token in special:
            expected[token] = array[token]
        assert array.tobytes() == expected.tobytes(), name
    with pytest.raises(ValueError, match="expected finite numbers"):
        encode(backend, keys, rotation, check_finite=True)
    logits = score(backend, normal(2, (1, 4, 64)), actual, rotation).logits
    bad = np.isnan(logits)
    assert bad.sum() == 6 and bad[0, :2, 3].all() and bad[0, 2:, 5:7].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_r16_no_epsilon_hides_in_a_norm(backend):
    """The release added 1e-8 and 1e-6 to norms, and took > here and >= there: keys of any length have one code."""
    rotation, keys = hadamard(64, 3), normal(3, (1, 1, 4, 64), "float32")
    expected = encode(backend, keys, rotation)
    for power in (-100, -30, -10, 10, 100):
        actual = encode(backend, keys * np.float32(2.0**power), rotation)
        assert (actual.sign == expected.sign).all()
        with np.errstate(over="ignore"):
            r = np.minimum(np.ldexp(expected.rescale.astype(np.float64), power), 65504).astype(np.float16)
        # Rounded once, from a float32 r: below 2^-14 that of `expected` was rounded before.
        assert (np.abs(actual.rescale.astype(float) - r) <= 2.0**-24).all()
    zero = encode(backend, np.zeros((1, 1, 3, 64), np.float16), rotation, query_mean=normal(4, (1, 64), "float32"))
    assert not zero.sign.any() and not zero.rescale.any() and not zero.offset.any()
    one = np.zeros((1, 1, 1, 64), np.float32)                 # y = +-1/8 in every coordinate, or exact zeros
    one[..., :2] = 1
    for key in (one, one * np.float32(2.0**-140)):
        compare(registry.get("rabitq.encode"), {"keys": key, "rotation": hadamard(64, 3, 1)}, backend)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("size, head_dim", [(32, 8), (64, 33), (96, 80), (96, 96), (128, 100)])
def test_other_sizes_are_padded(backend, size, head_dim):
    rotation = haar(size, 5) if size == 96 else hadamard(size, 5)
    inputs = {"keys": normal(0, (2, 2, 7, head_dim)), "rotation": rotation,
              "key_mean": normal(1, (2, head_dim), "float32"), "query_mean": normal(2, (2, head_dim), "float32")}
    compare(registry.get("rabitq.encode"), inputs, backend)
    encoded = dataclasses.replace(reference.encode(**inputs), key_mean=inputs["key_mean"],
                                  query_mean=inputs["query_mean"])
    for bits in (4, 8, 16):
        options = {"query": normal(3, (2, 6, head_dim)), "rotation": rotation, "query_bits": bits}
        compare(registry.get("rabitq.quantize_query"), {**options, "query_mean": inputs["query_mean"]}, backend)
        compare(registry.get("rabitq.score"), {**options, "encoded": encoded, "return_sigma": True}, backend)


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("backend", BACKENDS)
@given(head_dim=head_dims, group=groups, seed=seeds, bits=st.sampled_from((4, 8)), tokens=st.integers(1, 90))
def test_products_of_integers_are_exact(backend, head_dim, group, seed, bits, tokens):
    """A query of whole numbers that reach both ends is its own code: with r = 1 logits are whole numbers."""
    rng, least, most = np.random.default_rng(seed), *((0, 15) if bits == 4 else (-127, 127))
    query = rng.integers(least, most + 1, (2, 2 * group, head_dim)).astype(np.float32)
    query[..., 0], query[..., -1] = least, most
    encoded = random_index(rng, (2, 2, tokens), head_dim)
    encoded.rescale[...] = 1
    identity = Rotation("haar", head_dim, -1, 0, matrix=np.eye(head_dim))    # rotations are told apart by their seeds
    scores = score(backend, query, encoded, identity, query_bits=bits, scale=1.0)
    assert (scores.logits == reference.sign_products(query.astype(np.int64), encoded.sign)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(head_dim=head_dims, seed=seeds, noise=st.booleans())
def test_slices_of_stores_are_scored_in_place(backend, head_dim, seed, noise):
    rng, rotation, query = np.random.default_rng(seed), hadamard(head_dim, seed), normal(seed, (2, 4, head_dim))
    encoded = random_index(rng, (2, 2, 70), head_dim, key_mean=True, query_mean=True)
    strided = index_in_a_store(rng, encoded)
    if backend in ("cuda", "native"):               # an upload would make it contiguous: a slice made on the device
        larger = on(backend, random_index(rng, (2, 2, 90), head_dim, key_mean=True, query_mean=True))
        means = on(backend, {"key_mean": encoded.key_mean, "query_mean": encoded.query_mean})
        strided = dataclasses.replace(tokens_of(larger, (slice(None), slice(None), slice(11, 81))), **means)
        for target, source in zip(parts(strided).values(), parts(encoded).values()):
            target[...] = on(backend, source)
    out = on(backend, Scores(*(np.full((2, 4, 70), np.nan, np.float32) for _ in range(1 + noise))))
    made = rabitq.score(on(backend, query), strided, rotation, out=out.logits, sigma=out.sigma, backend=backend)
    assert made.logits is out.logits and made.sigma is out.sigma
    expected = score(backend, query, encoded, rotation, return_sigma=noise)
    for one, other in zip(expected[:1 + noise], to_host(out)[:1 + noise]):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_end_what_is_read_and_are_clamped(backend):
    rotation, query = hadamard(64, 0), normal(0, (3, 4, 64))
    encoded = random_index(np.random.default_rng(0), (3, 2, 100), 64)
    full = score(backend, query, encoded, rotation, return_sigma=True)
    for b, length in ((0, 37), (1, 0)):
        encoded.rescale[b, :, length:] = np.nan
    scores = score(backend, query, encoded, rotation, lengths=np.array([37, -5, 1000], np.int32), return_sigma=True)
    for b, length in enumerate((37, 0, 100)):
        for one, other, beyond in ((scores.logits, full.logits, -np.inf), (scores.sigma, full.sigma, 0)):
            assert one[b, :, :length].tobytes() == other[b, :, :length].tobytes()
            assert (one[b, :, length:] == beyond).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_problems(backend):
    rotation = hadamard(64, 0)
    for shape in ((0, 2, 5), (1, 2, 0)):
        encoded = encode(backend, np.zeros((*shape, 64), np.float16), rotation)
        assert encoded.sign.shape == (*shape, 2) and encoded.rescale.shape == shape
        assert score(backend, np.zeros((shape[0], 4, 64), np.float16), encoded, rotation).logits.shape == (
            shape[0], 4, shape[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [hadamard, haar])
def test_a_query_that_is_not_finite_has_logits_nan(backend, bits, kind):
    rotation, query = kind(64, 0), normal(0, (1, 4, 64), "float32")
    clean = query.copy()
    query[0, 1, 3], query[0, 2, 5] = np.nan, np.inf
    code = to_host(rabitq.quantize_query(on(backend, query), rotation, query_bits=bits, backend=backend))
    assert np.isnan(code.step[0, 1:3]).all() and np.isnan(code.low[0, 1:3]).all() and not code.codes[0, 1:3].any()
    encoded = random_index(np.random.default_rng(0), (1, 2, 20), 64)
    logits = score(backend, query, encoded, rotation, query_bits=bits).logits
    assert np.isnan(logits[0, 1:3]).all()
    expected = score(backend, clean, encoded, rotation, query_bits=bits).logits
    assert logits[0, ::3].tobytes() == expected[0, ::3].tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_rounding_follows_seed_and_step(backend):
    rotation, query = hadamard(64, 0), on(backend, normal(0, (2, 4, 64)))
    codes = {key: to_host(rabitq.quantize_query(query, rotation, rounding="random", seed=key[0], step=key[1],
                                                backend=backend)).codes
             for key in ((0, 0), (1, 0), (0, 1), (2**32, 0), (2**40 + 7, 10**9))}
    assert (codes[0, 0] == codes[2**32, 0]).all()             # the hash is modulo 2^32
    del codes[2**32, 0]
    for one, other in itertools.combinations(codes.values(), 2):
        assert 0.1 < (one != other).mean() < 0.6 and np.abs(one.astype(int) - other).max() == 1


# ------------------------------------------------------------------------------------- defects of the public release


@pytest.mark.parametrize("scorer", BACKENDS)
@pytest.mark.parametrize("encoder", BACKENDS)
def test_r1_every_scorer_reads_what_every_encoder_writes(encoder, scorer):
    """The release turned keys by the transpose of what it turned queries by: correlation -0.03."""
    for kind in (hadamard, haar):
        rotation = kind(64, 2)
        means = {"key_mean": normal(2, (2, 64), "float32"), "query_mean": normal(3, (2, 64), "float32")}
        keys = (normal(0, (1, 2, 300, 64)) + means["key_mean"][:, None]).astype(np.float16)
        query = (normal(1, (1, 4, 64)) + np.repeat(means["query_mean"], 2, axis=0)).astype(np.float16)
        encoded = dataclasses.replace(encode(encoder, keys, rotation, **means), **means)
        exact = np.einsum("bhd,bhtd->bht", query.astype(float), np.repeat(keys.astype(float), 2, axis=1))
        logits = score(scorer, query, encoded, rotation).logits
        for h in range(4):
            assert np.corrcoef(logits[0, h], exact[0, h])[0, 1] > 0.7


@pytest.mark.parametrize("backend", BACKENDS)
def test_r2_scores_have_an_axis_of_heads(backend):
    """The release took the maximum over KV heads, and then any() over what was left: every token was selected."""
    keys, query, rotation = normal(0, (2, 3, 200, 64)), normal(1, (2, 6, 64)), hadamard(64, 0)
    logits = score(backend, query, encode(backend, keys, rotation), rotation).logits
    assert logits.shape == (2, 6, 200)
    best = [frozenset(np.argsort(-row)[:20].tolist()) for row in logits.reshape(12, 200)]
    assert len(set(best)) == 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_r3_the_scale_reaches_the_logits(backend):
    """The release computed 1 / sqrt(head_dim) and took the softmax of unscaled scores."""
    keys, query, rotation = normal(0, (1, 2, 200, 128)), normal(1, (1, 4, 128)), hadamard(128, 0)
    encoded = encode(backend, keys, rotation, key_mean=normal(2, (2, 128), "float32"))
    default, one, half = (score(backend, query, encoded, rotation, scale=scale, return_sigma=True)
                          for scale in (None, 1.0, 0.5))
    np.testing.assert_allclose(default.logits, one.logits * 128**-0.5, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(half.logits, one.logits * 0.5, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(half.sigma, one.sigma * 0.5, rtol=1e-6)
    exact = np.einsum("bhd,bhtd->bht", query.astype(float), np.repeat(keys.astype(float), 2, axis=1)) * 128**-0.5
    # Unit logits and an error of 0.77: the estimates spread by sqrt(1 + 0.77^2), not 11.3 times that.
    assert 1 < default.logits.std() / exact.std() < 1.6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [hadamard, haar])
def test_r11_a_rotation_stays_orthogonal(backend, kind):
    """The release rounded its matrix to bfloat16, and overwrote the float32 one."""
    rotation = kind(64, 5)
    before = rotation.dense().copy()
    encoded = encode(backend, normal(0, (1, 2, 20, 64), "bfloat16"), rotation)
    score(backend, normal(1, (1, 4, 64), "bfloat16"), encoded, rotation)
    after = rotation.dense()
    assert (after == before).all() and np.abs(after.T @ after - np.eye(64)).max() < 1e-5


@pytest.mark.skipif(loaders.availability("simt") is not None, reason=str(loaders.availability("simt")))
def test_r12_no_length_needs_a_kernel_of_its_own_and_no_scalar_a_copy():
    """The release compiled its encoder for every prompt length, and converted all scalars of the index every step."""
    rotation, launched = hadamard(64, 0), set()
    for tokens in (1, 7, 128, 300):
        with loaders.record() as launches:
            encoded = rabitq.encode(normal(0, (1, 1, tokens, 64)), rotation, backend="simt")
        assert len(launches) == 1
        launched.add(launches[0]["kernel"])
        with loaders.record() as launches:
            rabitq.score(normal(1, (1, 4, 64)), encoded, rotation, backend="simt")
        assert len(launches) == 1
        launched.add(launches[0]["kernel"])
        held = sorted(len(memory) for memory, readonly in filter(
            lambda argument: isinstance(argument, tuple), launches[0]["args"]))
        # The query, three rounds of signs, code, r, and the logits.
        assert held == sorted((4 * 64 * 2, 3 * 64 * 4, tokens * 8, tokens * 2, tokens * 4 * 4))
    assert len(launched) == 2


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("tokens", [1, 64, 511, 512, 513, 4096, 131072, 10**6])
@pytest.mark.parametrize("pairs", [1, 8, 64, 1000])
def test_blocks_of_a_score_fit_at_once_and_have_equal_work(tokens, pairs):
    for head_dim, tiles in itertools.product((64, 128, 256), (1, 2, 4)):
        blocks = rabitq_launch.score_blocks(tokens, pairs, head_dim, tiles, 132)
        steps = -(-tokens // (256 if head_dim == 256 else 512))
        assert 1 <= blocks <= max(1, 3 * 132 // pairs) and blocks <= steps
        assert -(-steps // blocks) - steps / blocks < 1


# ----------------------------------------------------------------------------------------------------------- selection


def some_index(content, tokens, head_dim):
    """(float32 query of two KV heads with up to 4 query heads, index) whose logits are as `content` says."""
    rng = np.random.default_rng(7)
    encoded = random_index(rng, (1, 2, tokens), head_dim, key_mean=True, query_mean=content == "offset")
    encoded.rescale[...] = rng.uniform(1, 1.5, encoded.rescale.shape)
    query = 3 * normal(8, (1, 8, head_dim), "float32")
    if content == "wide":                   # further apart than a part has bins
        query *= 30
    elif content == "apart":                # parts, from one another, than a row has bins
        encoded.rescale[:, :, : tokens // 2] *= 100
    elif content == "equal":                # more than a list has room for
        encoded.sign[...] = encoded.sign[:, :, :1]
        encoded.rescale[...] = 1
    elif content == "ties":
        encoded.sign[...] = encoded.sign[:, :, rng.integers(0, 20, tokens)]
        encoded.rescale[...] = 1
    elif content == "huge":                 # some overflow
        query *= np.float32(1e37)
    elif content == "tiny":
        query *= np.float32(1e-39)
        encoded.key_mean[...] *= np.float32(1e-39)
    elif content in ("masked", "nothing"):
        share = 0.3 if content == "masked" else 1.0
        encoded.rescale[rng.random(encoded.rescale.shape) < share] = np.nan
        encoded.rescale[:, :, 5] = np.inf
    elif content == "wide and masked":      # downwards alone: what is not finite is not near the largest
        query[...] = 30 * query[:, :1] * np.linspace(1, 2, 8, dtype=np.float32)[:, None]
        encoded.key_mean[...] = 0
        above = rabitq.score(query[:, :2], encoded, hadamard(head_dim, 3), backend="reference").logits > 0
        encoded.rescale[above] *= np.float16(0.01)
        encoded.rescale[rng.random(encoded.rescale.shape) < 0.3] = np.nan
    return query, encoded


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("content", ["normal", "wide", "apart", "equal", "ties", "huge", "tiny", "masked", "nothing",
                                     "offset", "wide and masked"])
def test_top_p_in_one_launch(backend, content):
    """The same bits as scores and a selection in turn: of whole parts and a short one, sequences that end in the first,
    and lists too short for what is near the threshold."""
    place = "cuda" if backend in ("cuda", "native") else "cpu"
    for group, head_dim, length in ((4, 64, 1500), (3, 128, 1024), (1, 256, 700), (4, 128, 30), (2, 64, 0)):
        tokens, rotation = 1500, hadamard(head_dim, 3)
        query, encoded = some_index(content, tokens, head_dim)
        query, encoded = on(backend, np.ascontiguousarray(query[:, : 2 * group])), on(backend, encoded)
        options = dict(lengths=on(backend, np.array([length], np.int32)), backend=backend)
        bounds = {}, dict(min_tokens=40, max_tokens=90)
        for room, p, bound in itertools.product((16, 4096), (0.6, 1.0), bounds):
            with pytest.MonkeyPatch.context() as patch, loaders.simt_schedule(room, ftz=content == "tiny"):    # as GPUs
                patch.setattr(selection, "TOP_P_LEAST", selection.TOP_P_UNIT)
                scratch = selection.workspace(1, 2 * group, tokens, place, listed=room)
                assert selection.together(tokens, 2, group, backend, scratch.tickets.device, scratch)[0] > 1
                made = [to_host(rabitq.select_top_p(query, encoded, rotation, p, workspace=scratch, **bound, **options))
                        for _ in range(2)]
                scored = rabitq.score(query, encoded, rotation, **options)
                in_turn = to_host(selection.select_top_p(scored, p, kv_heads=2, **bound, **options))
            assert not scratch.together.bins.to_host().any() and not scratch.together.rendezvous.to_host().any()
            assert not scratch.together.parts.to_host().any()
            for one in made:
                where = group, head_dim, length, room, p, bound
                assert one.counts.tolist() == in_turn.counts.tolist(), where
                assert one.mass.tobytes() == in_turn.mass.tobytes(), where
                for row, count in np.ndenumerate(in_turn.counts):
                    assert one.indices[row][:count].tolist() == in_turn.indices[row][:count].tolist(), where


@pytest.mark.parametrize("backend", [needs("simt")])
def test_scores_and_top_p_are_one_launch_where_there_is_room(backend):
    def launches(batch, heads, group, tokens, **options):
        encoded = random_index(np.random.default_rng(0), (batch, heads, tokens), 64)
        with loaders.record() as recorded:
            rabitq.select_top_p(normal(1, (batch, heads * group, 64)), encoded, hadamard(64, 0), 0.9, backend=backend,
                                **options)
        names = [launch["kernel"].partition("_kernel")[0].removeprefix("kvb::") for launch in recorded]
        return names, [launch["cooperative"] for launch in recorded]

    in_turn = ["rabitq_score", "selection_histogram", "selection_collect"], [False] * 3
    assert launches(1, 2, 4, 700) == launches(2, 1, 1, 700) == (["rabitq_top_p"], [True])
    assert launches(1, 2, 5, 700) == in_turn              # query heads
    assert launches(3, 3, 2, 70) == in_turn               # blocks: the emulator has room for eight
    assert launches(1, 8, 4, 12000) == in_turn            # shared memory
    assert launches(1, 2, 4, 0)[0][0] != "rabitq_top_p"


@pytest.mark.parametrize(("blocks", "tokens", "kv_heads", "group", "expected"), [
    (132, 131072, 8, 4, (16, 8192)), (132, 32768, 8, 4, (16, 2048)), (132, 16384, 8, 4, None),
    (132, 140000, 8, 4, (16, 8960)), (132, 150000, 8, 4, None), (132, 131072, 8, 5, None), (132, 131072, 32, 1, None),
    (132, 131072, 133, 1, None), (132, 131072, 2, 4, (32, 4096)), (0, 131072, 8, 4, None)])
def test_one_launch_takes_long_sequences_of_few_heads(monkeypatch, blocks, tokens, kv_heads, group, expected):
    """On an H100."""
    scratch = selection.workspace(1, kv_heads * group, tokens, "cpu")
    monkeypatch.setattr(loaders, "cooperative_blocks", lambda *where: blocks)
    monkeypatch.setattr(loaders, "shared_bytes", lambda *where: 227 * 1024)
    assert selection.together(tokens, kv_heads, group, "cuda", arrays.Device("cpu"), scratch) == expected


@pytest.mark.gpu
def test_top_p_in_one_launch_runs_in_a_cuda_graph(monkeypatch):
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(selection, "TOP_P_LEAST", selection.TOP_P_UNIT)
    query, encoded = (on("cuda", array) for array in some_index("normal", 9000, 128))
    rotation, scratch = hadamard(128, 3), selection.workspace(1, 8, 9000, "cuda")
    assert selection.together(9000, 2, 4, "cuda", scratch.tickets.device, scratch) == (18, 512)

    def select(**options):
        return rabitq.select_top_p(query, encoded, rotation, 0.9, workspace=scratch, backend="cuda", **options)

    scored = rabitq.score(query, encoded, rotation, backend="cuda")
    expected, stream = to_host(selection.select_top_p(scored, 0.9, kv_heads=2, backend="cuda")), cupy.cuda.Stream(
        non_blocking=True)
    made, logits = select(), cupy.zeros((1, 8, 9000), "float32")
    with stream:
        stream.begin_capture()
        select(out=made, scores=logits)
        graph = stream.end_capture()
        for _ in range(3):
            made.counts.fill(0)
            made.indices.fill(-1)
            graph.launch(stream)
            stream.synchronize()
            host = to_host(made)
            assert (host.counts == expected.counts).all() and expected.counts.all()
            for row, count in np.ndenumerate(expected.counts):
                assert host.indices[row][:count].tolist() == expected.indices[row][:count].tolist()


# ----------------------------------------------------------------------------------------------------------- attention


def chosen_alike(made, in_turn):
    assert made.counts.tolist() == in_turn.counts.tolist() and made.mass.tobytes() == in_turn.mass.tobytes()
    for row, count in np.ndenumerate(in_turn.counts):
        assert made.indices[row][:count].tolist() == in_turn.indices[row][:count].tolist()


def attended_alike(backend, query, encoded, rotation, p, rows, *, lengths=None, first=0, leading=None, room=4096,
                   **bounds):
    """One launch chooses what scores and a selection in turn choose, attends to just that, says so when it is asked
    again, and leaves its workspaces as they were."""
    query, encoded, rows = (on(backend, x) for x in (query, encoded, rows))
    options = dict(lengths=on(backend, lengths), backend=backend)
    place, (_, kv_heads, tokens) = "cuda" if backend in ("cuda", "native") else "cpu", encoded.rescale.shape
    workspace = rabitq.AttentionWorkspace(selection.workspace(1, query.shape[1], tokens, place, listed=room),
                                          attention.workspace(1, query.shape[1], query.shape[2], place))
    assert selection.together(tokens, kv_heads, query.shape[1] // kv_heads, backend, workspace.select.tickets.device,
                              workspace.select, least=rabitq.ATTENTION_LEAST)
    with loaders.record() as launches, loaders.simt_schedule(room):
        first_time, again = (to_host(rabitq.sparse_attention(
            query, encoded, rotation, p, *rows, first=first, leading=on(backend, leading), return_lse=True,
            workspace=workspace, **bounds, **options)) for _ in range(2))
    if backend == "simt":               # whose launches alone are recorded
        assert [launch["kernel"].partition("<")[0] for launch in launches] == 2 * ["kvb::rabitq_attention_kernel"]
    for one, other in zip(first_time[:2], again[:2], strict=True):
        assert one.tobytes() == other.tobytes()
    for words in (*trees.arrays_of(workspace.select.together).values(), workspace.attend.tickets):
        assert not words.to_host().any()
    scored = rabitq.score(query, encoded, rotation, **options)
    in_turn = to_host(selection.select_top_p(scored, p, kv_heads=kv_heads, **bounds, **options))
    chosen_alike(first_time[2], in_turn)
    inputs = dict(query=query, keys=rows[0], values=rows[1], lengths=lengths, first=first, leading=leading,
                  indices=in_turn.indices, counts=in_turn.counts)
    inputs = to_host(inputs)
    attention.sparse_agreement(inputs, exact.sparse_attention(**inputs), first_time[:2])
    return in_turn


def some_rows(kv_heads, slots, head_dim, dtype="float16"):
    return tuple(normal(seed, (1, kv_heads, slots, head_dim), dtype) for seed in (3, 4))


@pytest.fixture
def as_on_large_gpus(monkeypatch):
    monkeypatch.setattr(rabitq, "ATTENTION_LEAST", selection.TOP_P_UNIT)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("content", ["normal", "apart", "equal", "masked", "nothing", "offset"])
def test_attention_in_one_launch(backend, content, as_on_large_gpus):
    """Parts with about as many tokens, and ("apart") with far more than others; lists that are too short; short
    sequences; exact slots in front of few, many or no tokens; a cache that is a part of a larger one."""
    for group, head_dim, length, first in ((4, 64, 1500, 20), (3, 128, 1030, 0), (1, 64, 30, 300), (2, 128, 0, 7)):
        query, encoded = some_index(content, 1500, head_dim)
        query = query[:, : 2 * group].astype(np.float16)
        rows = tuple(array[:, :, :-4] for array in some_rows(2, first + 1507, head_dim))
        for room, p in ((16, 0.6), (4096, 0.97), (4096, 1.0)):
            attended_alike(backend, query, encoded, hadamard(head_dim, 3), p, rows, room=room, first=first,
                           lengths=np.array([length], np.int32), leading=np.array([first * 2 // 3], np.int32))


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("room", [16, 4096, 4097])       # another order of threads, too, where they are emulated
@pytest.mark.parametrize("heavy", [3, 225, 450])
def test_attention_to_tokens_of_one_part(backend, heavy, room, as_on_large_gpus):
    """All that is chosen lies in one part, or most of it: blocks take equal shares then, some of exact slots alone."""
    tokens, rng, rotation = 1500, np.random.default_rng(0), hadamard(64, 0)
    query = normal(1, (1, 2, 64))
    encoded = random_index(rng, (1, 2, tokens), 64)
    encoded.rescale[...] = 0.01
    encoded.rescale[:, :, 600 : 600 + heavy] = rng.uniform(2, 2.1, (1, 2, heavy))
    encoded.sign[:, :, 600 : 600 + heavy] = rabitq.encode(query[:, :, None], rotation).sign
    made = attended_alike(backend, query, encoded, rotation, 0.99, some_rows(2, tokens + 60, 64), first=60,
                          leading=np.array([50], np.int32), room=room)
    assert (made.counts <= heavy).all() and (made.counts >= 0.9 * heavy).all()


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_attention_to_more_tokens_of_a_part_than_its_list_has_room_for(backend):
    """All of 40000 and more, in bfloat16."""
    tokens = 33 * selection.EVEN_MOST if backend in ("cuda", "native") else 8 * selection.EVEN_MOST + 2000
    encoded = random_index(np.random.default_rng(0), (1, 1, tokens), 64)
    attended_alike(backend, normal(1, (1, 1, 64), "bfloat16"), encoded, hadamard(64, 0), 1.0,
                   some_rows(1, tokens, 64, "bfloat16"))


@pytest.mark.parametrize("backend", [needs("simt")])
def test_attention_is_one_launch_where_there_is_room(backend):
    def launches(heads, group, tokens, head_dim=64, dtype="float16", **options):
        encoded = random_index(np.random.default_rng(0), (1, heads, tokens), head_dim)
        with loaders.record() as recorded:
            rabitq.sparse_attention(normal(1, (1, heads * group, head_dim), dtype), encoded, hadamard(head_dim, 0), 0.9,
                                    *some_rows(heads, tokens, head_dim, dtype), backend=backend, **options)
        assert [launch["cooperative"] for launch in recorded] == [len(recorded) < 4] + [False] * (len(recorded) - 1)
        return [launch["kernel"].partition("_kernel")[0].removeprefix("kvb::") for launch in recorded]

    assert launches(2, 4, 700) == launches(2, 4, 700, 128, "bfloat16") == ["rabitq_attention"]
    assert launches(2, 4, 700, 64, "float32") == ["rabitq_top_p", "attention_sparse_simple"]
    assert launches(2, 4, 700, 256) == ["rabitq_top_p", "attention_sparse"]
    assert launches(2, 5, 700) == ["rabitq_score", "selection_histogram", "selection_collect", "attention_sparse"]


# -------------------------------------------------------------------------------------------------------------- errors


def test_wrong_arguments_are_named():
    keys, query, rotation = normal(0, (1, 2, 9, 64)), normal(1, (1, 4, 64)), hadamard(64, 0)
    encoded = rabitq.encode(keys, rotation)
    mean = normal(2, (2, 64), "float32")

    def attend(keys=keys, values=None, p=0.9, **options):
        return rabitq.sparse_attention(query, encoded, rotation, p, keys, keys if values is None else values, **options)

    cases = [
        (lambda: rabitq.encode(keys, hadamard(32, 0)), ValueError, "rotation: expected a size that is a multiple"),
        (lambda: rabitq.encode(keys, "hadamard"), TypeError, "rotation: expected a Rotation"),
        (lambda: rabitq.encode(keys, rotation, key_mean=mean[:1]), ValueError, "key_mean: expected shape"),
        (lambda: rabitq.encode(keys, rotation, key_mean=mean * np.float32(np.inf)), ValueError, "key_mean: expected "),
        (lambda: rabitq.encode(keys, rotation, query_mean=mean, out=encoded), ValueError, "out: expected an offset if"),
        (lambda: rabitq.encode(keys, rotation, out=tokens_of(encoded, np.s_[:, :, 1:])), ValueError, "expected shape"),
        (lambda: rabitq.encode(keys, rotation, out=encoded.sign), TypeError, "out: expected Encoded, got ndarray"),
        (lambda: rabitq.encode(keys.astype(np.int32), rotation), TypeError, "keys: expected dtype float16"),
        (lambda: rabitq.quantize_query(query, rotation, query_bits=5), ValueError, "query_bits: expected 4, 8 or 16"),
        (lambda: rabitq.quantize_query(query, rotation, query_bits=8, rounding="random"), ValueError,
         "rounding: expected 'nearest' for 8 bits"),
        (lambda: rabitq.quantize_query(query, rotation, rounding="up"), ValueError, "rounding: expected one of near"),
        (lambda: rabitq.quantize_query(query, rotation, seed=-1), ValueError, "seed: expected an integer from 0"),
        (lambda: rabitq.quantize_query(query, rotation, step=1.5), ValueError, "step: expected an integer from 0"),
        (lambda: rabitq.quantize_query(query, rotation, query_mean=normal(0, (3, 64), "float32")), ValueError,
         "query: expected q_heads a positive multiple of kv_heads = 3, got 4"),
        (lambda: rabitq.score(query[:, :3].copy(), encoded, rotation), ValueError, "query: expected q_heads a posi"),
        (lambda: rabitq.score(query, encoded, hadamard(128, 0)), ValueError, "encoded.sign: expected shape"),
        (lambda: rabitq.score(query, keys, rotation), TypeError, "encoded: expected Encoded, got ndarray"),
        (lambda: rabitq.score(query, encoded, rotation, scale=np.nan), ValueError, "scale: expected a finite number"),
        (lambda: rabitq.score(query, encoded, rotation, lengths=np.zeros(1)), TypeError, "lengths: expected dtype int"),
        (lambda: rabitq.score(query, encoded, rotation, out=np.zeros((1, 4, 8), np.float32)), ValueError,
         "out: expected shape"),
        (lambda: rabitq.score(query, encoded, rotation, sigma=np.zeros((1, 4, 9))), TypeError, "sigma: expected dtype"),
        (lambda: rabitq.select_top_p(query, encoded, rotation, 0), ValueError, "select_top_p: p: expected 0 < p <= 1"),
        (lambda: rabitq.select_top_p(query, encoded, rotation, 0.9, min_tokens=3, max_tokens=2), ValueError,
         "max_tokens: expected an integer of at least 3, got 2"),
        (lambda: rabitq.select_top_p(query, encoded, rotation, 0.9, out=query), TypeError, "out: expected a Selection"),
        (lambda: rabitq.select_top_p(query, encoded, rotation, 0.9, scores=np.zeros((1, 2, 9), np.float32)), ValueError,
         "scores: expected shape"),
        (lambda: rabitq.score(query, dataclasses.replace(encoded, query_mean=mean), rotation), ValueError,
         "encoded: expected both offset and query_mean, or neither"),
        (lambda: attend(keys[:, :, :8]), ValueError, "keys: expected slots for the 9 tokens of the index, got 8"),
        (lambda: attend(first=1), ValueError, "first: expected an integer from 0 to 0, got 1"),
        (lambda: attend(keys.astype(np.float32)), TypeError, "keys: expected dtype float16"),
        (lambda: attend(values=keys[:, :1]), ValueError, "values: expected shape"),
        (lambda: attend(chosen=query), TypeError, "chosen: expected a Selection"),
        (lambda: attend(p=2), ValueError, "sparse_attention: p: expected 0 < p <= 1"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("backend", [needs("simt")])
def test_what_kernels_do_not_take_is_named(backend):
    query, rotation = normal(1, (1, 4, 64)), hadamard(64, 0)
    encoded = random_index(np.random.default_rng(0), (1, 2, 9), 64)
    with pytest.raises(ValueError, match="query_bits: expected 4 or 8 on backend 'simt', got 16"):
        rabitq.score(query, encoded, rotation, query_bits=16, backend=backend)
    with pytest.raises(ValueError, match="at most 16 query heads per KV head"):
        rabitq.score(normal(1, (1, 34, 64)), encoded, rotation, backend=backend)
    with pytest.raises(ValueError, match="at most 16 query heads per KV head"):
        rabitq.select_top_p(normal(1, (1, 34, 64)), encoded, rotation, 0.9, backend=backend)
    with pytest.raises(TypeError, match="workspace: expected a Workspace from selection.workspace"):
        rabitq.select_top_p(query, encoded, rotation, 0.9, workspace="some", backend=backend)
    rows = some_rows(2, 9, 64)
    scratch = rabitq.sparse_attention_workspace(1, 4, 9, 64, "cpu")
    for workspace, error, message in (
            ("some", TypeError, "workspace: expected an AttentionWorkspace from rabitq.sparse_attention_workspace"),
            (dataclasses.replace(scratch, select=2), TypeError, "workspace.select: expected a Workspace from selec"),
            (dataclasses.replace(scratch, attend=2), TypeError, "workspace: expected a Workspace from attention."),
            (rabitq.sparse_attention_workspace(1, 2, 9, 64, "cpu"), ValueError, "workspace.select: expected room fo")):
        with pytest.raises(error, match=message):
            rabitq.sparse_attention(query, encoded, rotation, 0.9, *rows, workspace=workspace, backend=backend)
    with pytest.raises(ValueError, match="values: expected rows at multiples of 16 bytes"):
        rabitq.sparse_attention(query, encoded, rotation, 0.9, rows[0], normal(0, (1, 2, 9, 72))[..., 4:68],
                                backend=backend)
    with pytest.raises(ValueError, match="keys: expected head_dim 64, 128 or 256 on backend 'simt', got 32"):
        rabitq.encode(normal(0, (1, 2, 9, 32)), hadamard(32, 0), backend=backend)
    with pytest.raises(ValueError, match="keys: expected rows at multiples of 16 bytes"):
        rabitq.encode(normal(0, (1, 2, 9, 72))[..., 4:68], rotation, backend=backend)


def test_an_index_may_have_tokens_in_any_store():
    """Arrays with different strides are refused: a kernel has one pair of strides for all."""
    rng = np.random.default_rng(0)
    encoded = random_index(rng, (2, 2, 9), 64)
    wide = np.zeros((2, 2, 20, 2), np.uint32)[:, :, :9]
    with pytest.raises(ValueError, match="encoded: expected the same strides of sequences and heads"):
        rabitq.score(normal(0, (2, 4, 64)), Encoded(wide, encoded.rescale, None, None, None, 64), hadamard(64, 0))
