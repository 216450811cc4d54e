"""Codecs: exact storage, TurboQuant, the storage of a cache, parts that can be saved, and the table of operators."""
import json
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench import arrays, codecs
from kvbench.ops import kivi, turboquant
from kvbench.ops.dispatch import EPSILON
from kvbench.reference import attention as exact_attention
from kvbench.reference import turboquant as reference
from kvbench.reference.codebook import PANTER_DITE

NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def normal(seed, shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(NUMPY[dtype])


def same_bytes(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


dtypes = st.sampled_from(sorted(NUMPY))
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.sampled_from((1, 2, 7, 64)))


@given(shapes, dtypes, seeds)
def test_float16_keeps_every_bit(shape, dtype, seed):
    # Any bit pattern: NaN payloads, infinities and subnormals included.
    kind = np.dtype(NUMPY[dtype])
    content = np.random.default_rng(seed).bytes(int(np.prod(shape)) * kind.itemsize)
    x = np.frombuffer(content, kind).reshape(shape).copy()
    original = x.copy()
    codec = codecs.Float16(shape[-1], dtype)
    packed = codec.encode(x)
    x[...] = 0                                      # packed tokens have memory of their own
    assert same_bytes(packed.tokens, original) and same_bytes(codec.decode(packed), original)
    assert packed.nbytes == original.nbytes
    assert codec.bits_per_element * original.size == 8 * packed.nbytes
    codec.decode(packed)[...] = 1
    assert same_bytes(packed.tokens, original)      # and so has what is decoded


@given(seeds, dtypes)
def test_float16_takes_strided_input(seed, dtype):
    x = normal(seed, (2, 5, 3, 8), dtype).transpose(0, 2, 1, 3)[:, :, 1:4]
    packed = codecs.Float16(8, dtype).encode(x)
    assert same_bytes(packed.tokens, np.ascontiguousarray(x))


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(0, 20), st.sampled_from((1, 2, 8, 64)),
       dtypes, dtypes, st.sampled_from((None, 0.25, -3.0)), seeds)
def test_float16_logits(batch, kv_heads, group, tokens, head_dim, dtype, query_dtype, scale, seed):
    keys = normal(seed, (batch, kv_heads, tokens, head_dim), dtype)
    query = normal(seed + 1, (batch, kv_heads * group, head_dim), query_dtype)
    codec = codecs.Float16(head_dim, dtype)
    logits = codec.logits(query, codec.encode(keys), scale)

    wide_keys = np.repeat(keys.astype(np.float64), group, axis=1)
    factor = head_dim**-0.5 if scale is None else scale
    expected = factor * np.einsum("bhd,bhtd->bht", query.astype(np.float64), wide_keys)
    magnitude = abs(factor) * np.einsum("bhd,bhtd->bht", abs(query.astype(np.float64)), abs(wide_keys))
    assert logits.shape == expected.shape and logits.dtype == np.float32
    # A float32 sum of head_dim products, times a factor that is itself rounded.
    assert np.all(abs(logits - expected) <= (head_dim + 3) * 2.0**-24 * magnitude)


def test_logits_refuses_query_heads_that_do_not_divide():
    codec = codecs.Float16(4)
    with pytest.raises(ValueError, match="q: expected a multiple of the 2 KV heads"):
        codec.logits(np.zeros((1, 3, 4), np.float16), codec.encode(np.zeros((1, 2, 5, 4), np.float16)))


@pytest.mark.parametrize("dtype", sorted(NUMPY))
def test_frameworks_get_back_their_own(dtype):
    torch = pytest.importorskip("torch")
    x = torch.randn(1, 2, 5, 4).to(getattr(torch, dtype))
    codec = codecs.Float16(4, dtype)
    packed = codec.encode(x)
    assert isinstance(packed.tokens, torch.Tensor) and torch.equal(codec.decode(packed), x)
    assert packed.nbytes == x.nbytes
    logits = codec.logits(x[:, :, 0].contiguous(), packed)
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 2, 5) and logits.dtype == torch.float32


def test_jax_gets_back_its_own():
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(40, dtype=jax.numpy.float16).reshape(1, 2, 5, 4)
    codec = codecs.Float16(4)
    decoded = codec.decode(codec.encode(x))
    assert isinstance(decoded, jax.Array) and same_bytes(decoded, x)


@pytest.mark.parametrize("arguments, message", [
    (dict(head_dim=0), "head_dim: expected a positive integer, got 0"),
    (dict(head_dim=True), "head_dim: expected a positive integer, got True"),
    (dict(head_dim=64.0), "head_dim: expected a positive integer, got 64.0"),
    (dict(head_dim=64, dtype="int8"), "dtype: expected one of float16, bfloat16, float32, got 'int8'"),
])
def test_float16_refuses_bad_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        codecs.Float16(**arguments)


def test_encode_names_what_is_wrong():
    codec = codecs.Float16(4)
    with pytest.raises(TypeError, match="Float16.encode: x: expected dtype float16, got float32"):
        codec.encode(np.zeros((1, 1, 2, 4), np.float32))
    with pytest.raises(ValueError, match="Float16.encode: x: expected .*4.*5"):
        codec.encode(np.zeros((1, 1, 2, 5), np.float16))
    with pytest.raises(ValueError, match="Float16.encode: x"):
        codec.encode(np.zeros((1, 2, 4), np.float16))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.data())
def test_write_touches_its_slots_alone_and_used_shows_them(batch, kv_heads, capacity, data):
    codec = codecs.Float16(4)
    storage = codec.allocate(batch, kv_heads, capacity, "cpu")
    shadow = np.full((batch, kv_heads, capacity, 4), 7, np.float16)
    storage.tokens.numpy()[...] = shadow
    low = data.draw(st.integers(0, batch - 1))
    sequences = slice(low, data.draw(st.integers(low + 1, batch)))
    start = data.draw(st.integers(0, capacity))
    count = data.draw(st.integers(0, capacity - start))
    x = normal(data.draw(seeds), (sequences.stop - sequences.start, kv_heads, count, 4), "float16")
    codec.write(storage, sequences, start, arrays.borrow(x, "x"))
    shadow[sequences, :, start:start + count] = x
    assert same_bytes(storage.tokens.numpy(), shadow)
    sequence, tokens = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, capacity))
    used = codec.used(storage, sequence, tokens)
    assert same_bytes(used.tokens.to_host(), shadow[sequence:sequence + 1, :, :tokens])
    assert used.nbytes == kv_heads * tokens * 4 * 2


# ---------------------------------------------------------------------------------------------------------------- KIVI

kivi_codecs = st.one_of(
    st.builds(codecs.KiviKeys, st.sampled_from((32, 64, 128)), st.sampled_from((2, 4, 8)), st.sampled_from((32, 64))),
    st.builds(lambda kind, size, bits: kind(size[0], bits, size[1]),
              st.sampled_from((codecs.KiviValues, codecs.TokenInt)), st.sampled_from(((32, 32), (64, 32), (128, 64))),
              st.sampled_from((2, 4, 8))))


def kivi_tokens(codec, granules, extra):
    """Whole groups of keys, any number of values."""
    return granules * codec.granule + (extra if codec.granule == 1 else 0)


@settings(max_examples=25)
@given(kivi_codecs, st.integers(0, 2), st.integers(0, 9), dtypes, st.sampled_from((None, 0.25, -3.0)), seeds)
def test_kivi_is_its_operators(codec, granules, extra, dtype, scale, seed):
    x = normal(seed, (2, 2, kivi_tokens(codec, granules, extra), codec.head_dim), dtype)
    packed = codec.encode(x)
    encode = kivi.encode_keys if isinstance(codec, codecs.KiviKeys) else kivi.encode_values
    expected = encode(x, codec.bits, codec.group)
    assert all(same_bytes(packed.arrays()[name], array) for name, array in expected.arrays().items())
    decoded = kivi.decode(expected, dtype="float32")
    assert same_bytes(codec.decode(packed, "float32"), decoded)
    assert codec.bits_per_element * x.size == 8 * packed.nbytes
    query = normal(seed + 1, (2, 6, codec.head_dim), dtype)
    factor = codec.head_dim**-0.5 if scale is None else scale
    wide, keys = query.astype(np.float64), np.repeat(decoded.astype(np.float64), 3, axis=1)
    products = factor * np.einsum("bhd,bhtd->bht", wide, keys)
    allowed = (codec.head_dim + 8) * 2.0**-23 * abs(factor) * np.einsum("bhd,bhtd->bht", abs(wide), abs(keys) + 1)
    assert np.all(abs(codec.logits(query, packed, scale) - products) <= allowed)


@settings(max_examples=25)
@given(kivi_codecs, st.integers(1, 2), st.integers(1, 3), st.data())
def test_kivi_writes_its_slots_in_place_and_used_shows_them(codec, batch, kv_heads, data):
    step = codec.granule
    capacity = step * data.draw(st.integers(1, 4))
    storage = codec.allocate(batch, kv_heads, capacity, "cpu")
    shadow = {}
    for name, array in storage.arrays().items():
        array.numpy()[...] = 7
        shadow[name] = array.numpy().copy()
        assert all(stride * array.itemsize % 16 == 0 for stride in array.strides[:2]), name
    start, count = (step * n for n in (data.draw(st.integers(0, capacity // step)), 0))
    count = step * data.draw(st.integers(0, (capacity - start) // step))
    sequences = slice(data.draw(st.integers(0, batch - 1)), batch)
    x = normal(data.draw(seeds), (batch - sequences.start, kv_heads, count, codec.head_dim), "float16")
    whole = codec.encode(x).arrays()
    codec.write(storage, sequences, start, arrays.borrow(x, "x"))
    tokens = step * data.draw(st.integers(0, capacity // step))
    used = codec.used(storage, batch - 1, tokens).arrays()
    for name, content in shadow.items():
        rows = 1 if name == "codes" else step
        content[sequences, :, start // rows:(start + count) // rows] = whole[name]
        assert same_bytes(storage.arrays()[name].numpy(), content), name
        assert same_bytes(used[name].to_host(), content[-1:, :, :tokens // rows])
    assert codecs.rebuild(json.loads(json.dumps(codec.config()))) == codec


@pytest.mark.parametrize(("make", "arguments", "message"), [
    (codecs.KiviKeys, dict(head_dim=48), "KiviKeys: head_dim: expected a positive multiple of 32, got 48"),
    (codecs.KiviKeys, dict(head_dim=64, bits=3), "KiviKeys: bits: expected 2, 4 or 8, got 3"),
    (codecs.KiviKeys, dict(head_dim=64, bits=True), "KiviKeys: bits: expected 2, 4 or 8, got True"),
    (codecs.TokenInt, dict(head_dim=64, group=48), "TokenInt: group: expected a positive multiple of 32, got 48"),
    (codecs.KiviValues, dict(head_dim=64, group=128), "KiviValues: group: expected a divisor of head_dim 64, got 128"),
])
def test_kivi_refuses_bad_parameters(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_kivi_pairs_that_go_together():
    keys = codecs.KiviKeys(64)
    for values in (codecs.KiviValues(64, 4), codecs.TokenInt(64)):
        assert codecs.fused(keys, values).sparse is None
    with pytest.raises(ValueError, match="no decode attention for keys KiviValues x values KiviValues"):
        codecs.fused(codecs.KiviValues(64), codecs.KiviValues(64))


# ---------------------------------------------------------------------------------------------------------- TurboQuant


@st.composite
def mse_codecs(draw, centred=st.booleans()):
    head_dim, rotation = draw(st.sampled_from(((64, "hadamard"), (128, "hadamard"), (64, "haar"), (8, "hadamard"),
                                               (33, "haar"), (96, "haar"))))
    return codecs.TurboQuantMSE(head_dim, draw(st.integers(1, 8)), draw(st.integers(0, 3)),
                                draw(st.sampled_from(reference.SCALE_MODES)), rotation, draw(st.integers(1, 3)),
                                draw(centred))


prod_codecs = st.builds(codecs.TurboQuantProd, st.sampled_from((8, 64, 128)), st.integers(1, 8), st.integers(0, 3),
                        st.sampled_from(("orthogonal", "gaussian")))
small = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 9))


@given(mse_codecs(), small, dtypes, seeds)
def test_turboquant_is_the_operators_with_its_rotation(codec, shape, dtype, seed):
    x = 3 + normal(seed, (*shape, codec.head_dim), dtype)
    packed = codec.encode(x)
    mean = None
    if codec.centred:
        wide = x.astype(np.float64)
        mean = packed.mean[:, :, 0]
        assert packed.mean.dtype == np.float32 and packed.mean.shape == (*shape[:2], 1, codec.head_dim)
        assert np.allclose(mean, wide.mean(axis=2) if shape[2] else 0, rtol=1e-6, atol=1e-6)
    expected = turboquant.encode(x, codec.turn, codec.bits, scale_mode=codec.scale_mode, mean=mean)
    assert packed.arrays().keys() - {"mean"} == {*expected.planes.arrays(), "scale"}
    for name, plane in expected.planes.arrays().items():
        assert same_bytes(packed.arrays()[name], plane)
    assert same_bytes(packed.scale, expected.scale)
    decoded = reference.decode(expected, codec.turn) + (0 if mean is None else mean[:, :, None].astype(np.float64))
    wide = codec.decode(packed, "float32")
    assert wide.dtype == np.float32
    # The rotation in float32, and what the mean rounds: far below what a wrong mean or a wrong rotation would do.
    assert np.allclose(wide, decoded, rtol=0, atol=1e-4 * max(1, abs(decoded).max(initial=0)))
    narrow = codec.decode(packed)
    assert narrow.dtype == np.float16 and np.allclose(narrow, wide, rtol=2 * EPSILON["float16"], atol=1e-4)


@given(mse_codecs(), small, st.integers(1, 4), st.sampled_from((None, 0.25, -3.0)), seeds)
def test_turboquant_logits_are_those_of_what_is_decoded(codec, shape, group, scale, seed):
    x = 2 + normal(seed, (*shape, codec.head_dim), "float16")
    query = normal(seed + 1, (shape[0], shape[1] * group, codec.head_dim), "float16")
    packed = codec.encode(x)
    logits = codec.logits(query, packed, scale)
    decoded = np.repeat(codec.decode(packed, "float32").astype(np.float64), group, axis=1)
    factor = codec.head_dim**-0.5 if scale is None else scale
    wide_query = query.astype(np.float64)
    expected = factor * np.einsum("bhd,bhtd->bht", wide_query, decoded)
    # What the centred part and the mean are in length, at most: they are rounded before they meet.
    largest = (np.linalg.norm(decoded, axis=-1) + np.sqrt(codec.head_dim) * abs(decoded).max(initial=0)).max(initial=0)
    allowed = 1e-5 * abs(factor) * np.linalg.norm(wide_query, axis=-1)[..., None] * largest
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert np.all(abs(logits - expected) <= allowed)


@given(st.integers(1, 8), st.sampled_from((64, 128)), st.sampled_from(("hadamard", "haar")), seeds)
def test_turboquant_errs_as_its_codebook_says(bits, head_dim, rotation, seed):
    """|x - x_hat|^2 / |x|^2 of the middle one of 400 tokens: below the bound of Panter and Dite, above that of Shannon.

    The mean is the claim of `kvbench prove turboquant`.  Here it would hang on one token: at 7 bits a coordinate of
    5 standard deviations, beyond the outermost level, errs 170 times as much as the others do.
    """
    codec = codecs.TurboQuantMSE(head_dim, bits, rotation=rotation)
    x = normal(seed, (1, 4, 100, head_dim), "float32").astype(np.float64)
    error = x - codec.decode(codec.encode(x.astype(np.float32)), "float32")
    relative = np.median((error**2).sum(axis=-1) / (x**2).sum(axis=-1))
    assert 4.0**-bits < relative < 1.05 * PANTER_DITE * 4.0**-bits


@given(st.integers(2, 8), seeds)
def test_centring_takes_away_what_all_keys_share(bits, seed):
    """Keys around a mean ten times their spread: coded as if the mean were not there."""
    x = normal(seed, (2, 2, 64, 64), "float32")
    shared = 10 * normal(seed + 1, (2, 2, 1, 64), "float32")
    plain, centred = codecs.TurboQuantMSE(64, bits), codecs.TurboQuantMSE(64, bits, centred=True)

    def error(codec, keys):
        return np.sqrt(((codec.decode(codec.encode(keys), "float32") - keys) ** 2).mean())

    assert error(centred, x + shared) < 1.05 * error(plain, x) + 1e-5 < 0.5 * error(plain, x + shared)


@given(seeds)
def test_a_token_that_is_not_finite_does_not_touch_the_mean(seed):
    x = normal(seed, (1, 2, 9, 64), "float16")
    x[0, 1, 4, 7] = np.inf
    mean = codecs.TurboQuantMSE(64, centred=True).encode(x).mean
    assert np.allclose(mean[0, 1, 0], np.delete(x[0, 1].astype(np.float64), 4, axis=0).mean(axis=0), atol=1e-6)
    assert not codecs.TurboQuantMSE(64, centred=True).encode(x * np.nan).mean.any()


@given(st.one_of(mse_codecs(), prod_codecs), small, seeds)
def test_turboquant_bits_are_counted_as_they_are_held(codec, shape, seed):
    packed = codec.encode(normal(seed, (*shape, codec.head_dim), "float16"))
    mean = 0 if packed.arrays().get("mean") is None else packed.mean.nbytes
    assert codec.bits_per_element * np.prod(shape) * codec.head_dim == pytest.approx(8 * (packed.nbytes - mean))
    if codec.head_dim % 32 == 0:
        scalars = 1 if isinstance(codec, codecs.TurboQuantMSE) or codec.bits == 1 else 2
        assert codec.bits_per_element == codec.bits + 16 * scalars / codec.head_dim
    assert codecs.TurboQuantMSE(128, 3).bits_per_element == 3.125


@given(prod_codecs, small, st.integers(1, 4), seeds)
def test_turboquant_prod_is_its_operators(codec, shape, group, seed):
    x = normal(seed, (*shape, codec.head_dim), "float16")
    query = normal(seed + 1, (shape[0], shape[1] * group, codec.head_dim), "float16")
    packed, expected = codec.encode(x), turboquant.encode_prod(x, codec.turn, codec.draw, codec.bits)
    assert same_bytes(packed.residual_sign, expected.residual_sign)
    assert same_bytes(packed.residual_norm, expected.residual_norm)
    assert (packed.scale is None) == (codec.bits == 1)
    assert same_bytes(codec.decode(packed), turboquant.decode_prod(expected, codec.turn, codec.draw))
    assert same_bytes(codec.logits(query, packed),
                      turboquant.logits_prod(query, expected, codec.turn, codec.draw))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_head_of_a_store_begins_where_a_gpu_copies_whole_units(head_dim, bits):
    """Else the attention kernel reads the store two bytes at a time."""
    storage = codecs.TurboQuantMSE(head_dim, bits).allocate(2, 3, 1001, "cpu")
    for name, array in storage.arrays().items():
        assert all(stride * array.itemsize % 16 == 0 for stride in array.strides[:2]), name


@given(st.one_of(mse_codecs(), prod_codecs), st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.data())
def test_turboquant_writes_its_slots_in_place_and_used_shows_them(codec, batch, kv_heads, capacity, data):
    storage = codec.allocate(batch, kv_heads, capacity, "cpu")
    shadow = {}
    for name, array in storage.arrays().items():
        array.numpy()[...] = 7
        shadow[name] = array.numpy().copy()
    low = data.draw(st.integers(0, batch - 1))
    sequences = slice(low, data.draw(st.integers(low + 1, batch)))
    start = data.draw(st.integers(0, capacity))
    count = data.draw(st.integers(0, capacity - start))
    x = normal(data.draw(seeds), (sequences.stop - sequences.start, kv_heads, count, codec.head_dim), "float16")
    codec.prepare(storage, sequences, arrays.borrow(x, "x"), None)
    whole = codec.encode(x).arrays()
    if "mean" in shadow:
        shadow["mean"][sequences] = whole["mean"]
    # In two pieces; but a product with a dense matrix is rounded in a way that depends on the number of rows.
    dense = codec.rotation == "haar" or isinstance(codec, codecs.TurboQuantProd)
    cut = 0 if dense else data.draw(st.integers(0, count))
    for first, last in ((0, cut), (cut, count)):
        codec.write(storage, sequences, start + first, arrays.borrow(x, "x").narrow(2, first, last))
    for name, content in shadow.items():
        if name != "mean":
            assert content.shape[2] - capacity in range(8)
            content[sequences, :, start:start + count] = whole[name]
        assert same_bytes(storage.arrays()[name].numpy(), content), name
    sequence, tokens = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, capacity))
    used = codec.used(storage, sequence, tokens).arrays()
    assert used.keys() == shadow.keys()
    for name, view in used.items():
        kept = shadow[name][sequence:sequence + 1]
        assert same_bytes(view.to_host(), kept if name == "mean" else kept[:, :, :tokens])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", sorted(NUMPY))
def test_turboquant_answers_in_the_framework_of_its_input(dtype, centred):
    torch = pytest.importorskip("torch")
    x = torch.randn(1, 2, 5, 64).to(getattr(torch, dtype))
    codec = codecs.TurboQuantMSE(64, centred=centred)
    packed = codec.encode(x.transpose(1, 2).contiguous().transpose(1, 2))       # strided, as models make them
    assert all(isinstance(array, torch.Tensor) for array in packed.arrays().values())
    decoded = codec.decode(packed, dtype)
    assert isinstance(decoded, torch.Tensor) and decoded.dtype == x.dtype
    assert (decoded.float() - x.float()).norm() < 0.25 * x.float().norm()
    logits = codec.logits(x[:, :, 0].contiguous(), packed)
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 2, 5) and logits.dtype == torch.float32


def test_turboquant_answers_jax():
    jax = pytest.importorskip("jax")
    x = normal(0, (1, 2, 5, 64), "float16")
    codec = codecs.TurboQuantMSE(64, centred=True)
    packed = codec.encode(jax.numpy.asarray(x))
    assert all(isinstance(array, jax.Array) for array in packed.arrays().values())
    assert same_bytes(codec.decode(packed), codec.decode(codec.encode(x)))


MSE, PROD = codecs.TurboQuantMSE, codecs.TurboQuantProd


@pytest.mark.parametrize("make, arguments, message", [
    (MSE, dict(head_dim=0), "TurboQuantMSE: head_dim: expected a positive integer, got 0"),
    (MSE, dict(head_dim=64.0), "head_dim: expected a positive integer, got 64.0"),
    (MSE, dict(head_dim=64, bits=0), "bits: expected an integer from 1 to 8, got 0"),
    (MSE, dict(head_dim=64, bits=9), "bits: expected an integer from 1 to 8, got 9"),
    (MSE, dict(head_dim=64, bits=True), "bits: expected an integer from 1 to 8, got True"),
    (MSE, dict(head_dim=64, seed=-1), "seed: expected a non-negative integer, got -1"),
    (MSE, dict(head_dim=64, rounds=9), "rounds: expected an integer from 1 to 8, got 9"),
    (MSE, dict(head_dim=64, rotation="Haar"), "rotation: expected one of hadamard, haar, got 'Haar'"),
    (MSE, dict(head_dim=96), "rotation: expected 'haar' for head_dim 96: its padded size 96 is no power of two, got "),
    (MSE, dict(head_dim=64, scale_mode="none"), "scale_mode: expected one of nc, plain, mse, unbiased, got 'none'"),
    (MSE, dict(head_dim=64, centred=1), "centred: expected True or False, got 1"),
    (PROD, dict(head_dim=64, bits=9), "TurboQuantProd: bits: expected an integer from 1 to 8, got 9"),
    (PROD, dict(head_dim=64, projection="haar"), "projection: expected one of orthogonal, gaussian, got 'haar'"),
])
def test_turboquant_refuses_bad_parameters(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_turboquant_names_what_is_wrong():
    codec = MSE(64, centred=True)
    with pytest.raises(TypeError, match="TurboQuantMSE.encode: x: expected dtype float16, bfloat16 or float32"):
        codec.encode(np.zeros((1, 1, 2, 64), np.int8))
    with pytest.raises(ValueError, match="TurboQuantMSE.encode: x: expected shape .*64.* got .*63"):
        codec.encode(np.zeros((1, 1, 2, 63), np.float16))
    with pytest.raises(ValueError, match="dtype: expected one of float16, bfloat16, float32, got 'int8'"):
        codec.decode(codec.encode(np.zeros((1, 1, 2, 64), np.float16)), "int8")


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bits", [(3, 3), (4, 2), (1, 8)])
def test_turboquant_attention_is_that_of_what_is_decoded(bits, centred):
    """Output and log-sum-exp; that of centred keys is the one of the keys as they were given."""
    key_codec, value_codec = MSE(64, bits[0], seed=1, centred=centred), MSE(64, bits[1], seed=2)
    x = [3 + normal(seed, (2, 2, 40, 64), "float16") for seed in (0, 1)]
    query, lengths = normal(2, (2, 6, 64), "float16"), np.array([40, 13], np.int32)
    keys, values = key_codec.encode(x[0]), value_codec.encode(x[1])
    out, lse = np.empty((2, 6, 64), np.float32), np.empty((2, 6), np.float32)
    codecs.attend(query, key_codec, keys, value_codec, values, lengths=lengths, out=out, lse=lse, scale=0.1)
    expected, expected_lse = exact_attention.decode(query, key_codec.decode(keys, "float32"),
                                                    value_codec.decode(values, "float32"), lengths=lengths, scale=0.1,
                                                    return_lse=True)
    assert np.allclose(out, expected, rtol=0, atol=1e-4) and np.allclose(lse, expected_lse, rtol=0, atol=1e-4)
    alone = np.empty_like(out)
    codecs.attend(query, key_codec, keys, value_codec, values, lengths=lengths, out=alone, scale=0.1)
    assert same_bytes(alone, out)


def test_turboquant_pairs_that_do_not_go_together():
    assert codecs.fused(MSE(64, centred=True), MSE(64, seed=1)) is codecs.FUSED[MSE, MSE]
    assert codecs.fused(MSE(64), MSE(64, rotation="haar"))
    with pytest.raises(ValueError, match="values: expected a codec that is not centred: .*centred=True"):
        codecs.fused(MSE(64), MSE(64, seed=1, centred=True))
    with pytest.raises(ValueError, match="values: expected another seed than that of the keys: .*seed=0"):
        codecs.fused(MSE(64, 3), MSE(64, 2))
    for pair in ((codecs.Float16(64), MSE(64)), (PROD(64), MSE(64))):
        with pytest.raises(ValueError, match="no decode attention for keys .*TurboQuantMSE x TurboQuantMSE"):
            codecs.fused(*pair)


# -------------------------------------------------------------------------------------------------- parts and the table


@given(st.one_of(st.builds(codecs.Float16, st.integers(1, 512), dtypes), mse_codecs(), prod_codecs))
def test_rebuild_gives_an_equal_part(codec):
    assert codecs.rebuild(json.loads(json.dumps(codec.config()))) == codec


def test_rebuild_suggests_names():
    with pytest.raises(ValueError, match="unknown codec, index or selector 'Float61'.*Float16"):
        codecs.rebuild({"part": "Float61", "head_dim": 4})


@dataclass(frozen=True)
class Unknown(codecs.Float16):
    """A codec for which no operator is registered."""


def test_pairs_without_an_operator_are_refused_by_name():
    known = codecs.Float16(4)
    assert codecs.fused(known, known) is codecs.FUSED[codecs.Float16, codecs.Float16]
    for pair in ((Unknown(4), known), (known, Unknown(4))):
        with pytest.raises(ValueError, match="no decode attention for .*Unknown.*; supported: .*Float16 x Float16"):
            codecs.fused(*pair)
    dense_alone = codecs.TurboQuantMSE(64)
    with pytest.raises(ValueError, match="no sparse attention for keys TurboQuantMSE x values TurboQuantMSE; "
                                         "supported: .*Float16 x Float16"):
        codecs.fused(dense_alone, dense_alone, sparse=True)


def test_attend_runs_the_operator_of_the_pair():
    codec = codecs.Float16(4)
    keys, values = (codec.encode(normal(seed, (1, 1, 1, 4), "float16")) for seed in (0, 1))
    out, lse = np.empty((1, 2, 4), np.float16), np.empty((1, 2), np.float32)
    query = normal(2, (1, 2, 4), "float16")
    codecs.attend(query, codec, keys, codec, values, lengths=np.ones(1, np.int32), out=out, lse=lse, scale=1.0)
    assert same_bytes(out[0], np.repeat(values.tokens[0, 0], 2, axis=0))            # one token has all the weight
    assert np.allclose(lse[0], query[0].astype(np.float64) @ keys.tokens[0, 0, 0].astype(np.float64), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", sorted(NUMPY))
def test_float16_on_a_gpu(dtype):
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 2, 33, 64, device="cuda").to(getattr(torch, dtype))
    codec = codecs.Float16(64, dtype)
    packed = codec.encode(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert packed.tokens.is_cuda and torch.equal(codec.decode(packed), x)
    query = x[:, :, 0].contiguous()
    expected = torch.einsum("bhd,bhtd->bht", query.double(), x.double()) / 8
    logits = codec.logits(query, packed)
    assert logits.is_cuda and torch.allclose(logits.double(), expected, atol=1e-4)
