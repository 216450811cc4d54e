"""The reference of the RaBitQ index: single coordinates, printed tables, special keys and queries, defects found."""
import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import claims
from kvbench.reference import planes, rabitq, turboquant
from kvbench.reference.rabitq import encode, logits, quantise_query, rotate_query, score
from kvbench.reference.rotation import haar, hadamard
from kvbench.reference.selection import middle, top_k, top_p
from test_claims import find, find_without_defect

SEEDS = st.integers(0, 2**32 - 1)
QUERIES = st.sampled_from(((4, "nearest"), (4, "random"), (8, "nearest"), (16, "nearest")))


def vectors(seed, shape, dtype=np.float32):
    return np.random.default_rng([seed, 7]).standard_normal(shape).astype(dtype)


# --- The definition, one coordinate at a time ------------------------------------------------------------------------


def hashed(counter, seed):
    x = (seed + 0x9E3779B9 * counter) % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return ((x ^ x >> 16) >> 8) / 2**24


def integers_of(q, bits, rounding, xi):
    """(codes, step, low) of one rotated float32 query."""
    f = np.float32
    if bits == 8:
        step = max(abs(value) for value in q) / f(127)
        return [int(np.clip(np.rint(value / step), -127, 127)) for value in q], float(step), 0.0
    low, high = min(q), max(q)
    t = [(value - low) * (f(15) / (high - low)) for value in q]
    t = [math.floor(value + f(x)) if rounding == "random" else np.rint(value) for value, x in zip(t, xi)]
    return [int(np.clip(value, 0, 15)) for value in t], float((high - low) / f(15)), float(low)


@given(size=st.sampled_from((32, 64)), seed=SEEDS, how=QUERIES, centred=st.sampled_from(("", "k", "kq")),
       dtype=st.sampled_from((np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
def test_logits_follow_the_definition(size, seed, how, centred, dtype):
    (bits, rounding), rotation = how, haar(size, seed) if seed % 2 else hadamard(size, seed)
    keys, query = vectors(seed, (2, 2, 1, size), dtype), vectors(seed + 1, (2, 4, size), dtype)
    c_k, c_q = vectors(seed + 2, (2, size)) * ("k" in centred), vectors(seed + 3, (2, size)) * ("q" in centred)
    means = {"key_mean": c_k if "k" in centred else None, "query_mean": c_q if "q" in centred else None}
    encoded = encode(keys, rotation, **means)
    made = logits(query, encoded, rotation, query_bits=bits, rounding=rounding, seed=11, step=3)
    noise = rabitq.sigma(query, encoded, rotation, query_bits=bits, rounding=rounding)
    rotated, negative = rotate_query(query, encoded, rotation), planes.unpack_bits(encoded.sign, size)
    matrix = rotation.dense()
    for b, h in np.ndindex(2, 4):
        key, g = keys[b, h // 2, 0].astype(float) - c_k[h // 2], h // 2
        y = [math.fsum(matrix[i] * key) for i in range(size)]
        assert negative[b, g, 0].tolist() == [int(value < 0) for value in y]
        r, a = float(encoded.rescale[b, g, 0]), float(c_q[g].astype(float) @ key) if "q" in centred else 0.0
        assert r == pytest.approx(math.fsum(key**2) / math.fsum(map(abs, y)), rel=2.0**-11 * 1.001)
        if "q" in centred:
            assert float(encoded.offset[b, g, 0]) == pytest.approx(a, rel=2.0**-11 * 1.001, abs=1e-6)
            a = float(encoded.offset[b, g, 0])
        signs = [math.copysign(1, value) for value in y]
        q = rotated[b, h]
        np.testing.assert_allclose(q, matrix @ (query[b, h].astype(float) - c_q[g]), atol=1e-6)
        step, extra = 0.0, 0.0
        if bits == 16:
            z = math.fsum(s * value for s, value in zip(signs, matrix @ (query[b, h].astype(float) - c_q[g])))
        else:
            xi = [hashed(1 + i + size * (h + 4 * (b + 2 * 3)), 11) for i in range(size)]
            codes, step, low = integers_of(q, bits, rounding, xi)
            z = step * sum(s * u for s, u in zip(signs, codes)) + low * sum(signs)
            extra = step**2 / (6 if rounding == "random" else 12)
        expected = size**-0.5 * (r * z + a + query[b, h].astype(float) @ c_k[g])
        assert made[b, h, 0] == pytest.approx(expected, abs=1e-9)
        shrunk = 1 - 1 / size - 2 / math.pi * (1 - 1 / size)
        length = math.fsum((query[b, h].astype(float) - c_q[g]) ** 2)
        assert noise[b, h, 0] == pytest.approx(r * math.sqrt(shrunk * length / (size - 1) + extra), rel=1e-6)


def test_dither_is_the_printed_hash():
    xi = rabitq.dither((2, 3, 32), seed=2**32 - 5, step=10**6)
    assert xi.dtype == np.float32 and 0 <= xi.min() and xi.max() < 1
    for b, h, i in ((0, 0, 0), (1, 2, 31), (1, 0, 7)):
        assert xi[b, h, i] == hashed(1 + i + 32 * (h + 3 * (b + 2 * 10**6)), 2**32 - 5)


def test_the_index_shares_the_sign_plane_of_a_codec():
    keys, rotation, mean = vectors(0, (1, 2, 200, 64)), hadamard(64, 3), vectors(1, (2, 64))
    encoded = encode(keys, rotation, key_mean=mean)
    for bits in (1, 3, 8):
        assert (encoded.sign == turboquant.encode(keys, rotation, bits, mean=mean).planes.sign).all()
    assert (encoded.rescale == turboquant.rescale(keys, rotation, mean=mean)).all()
    query = vectors(2, (1, 6, 64))
    expected = turboquant.sign_logits(query, encoded.sign, encoded.rescale, rotation)
    constant = 64**-0.5 * np.einsum("bhd,hd->bh", query, np.repeat(mean, 3, axis=0))
    made = logits(query, encoded, rotation, query_bits=16)
    np.testing.assert_allclose(made, expected + constant[..., None], atol=1e-6)


# --- Printed tables --------------------------------------------------------------------------------------------------

# mean and standard deviation of alpha, sqrt E (1 / alpha^2 - 1)
ALIGNMENT = {64: "0.80101 0.02617 0.7508", 128: "0.79944 0.01864 0.7532", 256: "0.79866 0.01322 0.7543"}
SPREAD = {64: "0.0946 0.0819 0.0412 0.0295", 128: "0.0668 0.0579 0.0291 0.0209", 256: "0.0472 0.0409 0.0206 0.0147"}
ROUNDING = {64: "0.0140 0.0198 0.00093", 128: "0.01105 0.0156 0.00072", 256: "0.0085 0.0121 0.00055"}
MISSES = {1.9: "0.0571 0.0460 0.0277 0.0073", 3.0: "0.0024 0.0014 0.0004"}


def unit(text):
    return 10.0 ** -len(text.partition(".")[2])


@pytest.mark.parametrize("size", ALIGNMENT)
def test_alignment_is_as_printed(size):
    mean, deviation, m = ALIGNMENT[size].split()
    first, second = rabitq.alignment(size)
    assert first == pytest.approx(float(mean), abs=0.51 * unit(mean))
    assert math.sqrt(second - first**2) == pytest.approx(float(deviation), abs=0.51 * unit(deviation))
    inverse = 1 / rabitq._alpha(rabitq._pairs(np.random.default_rng(1), 10000, size)[0]) ** 2 - 1
    error = 6 * inverse.std() / 100 / (2 * float(m))
    assert math.sqrt(inverse.mean()) == pytest.approx(float(m), abs=error + unit(m))
    assert math.sqrt(1 - second) == pytest.approx({64: 0.5981, 128: 0.6005, 256: 0.6016}[size], abs=6e-5)
    rho = np.array([0, 0.5, 0.9, 0.95])
    law = np.sqrt((1 - rho**2) / (size - 1)) * float(m)
    np.testing.assert_allclose(law, [float(text) for text in SPREAD[size].split()], atol=1e-4)


@pytest.mark.parametrize("size", ROUNDING)
def test_noise_of_rounding_is_as_printed(size):
    for (bits, rounding), printed in zip(((4, "nearest"), (4, "random"), (8, "nearest")), ROUNDING[size].split()):
        squares = rabitq._rounding_differences(np.random.default_rng(2), 4000, size, bits, rounding, (0.0,))[0] ** 2
        error = 6 * squares.std() / 4000**0.5 / (2 * float(printed))
        assert math.sqrt(squares.mean()) == pytest.approx(float(printed), abs=error + unit(printed))


def test_miss_rates_are_as_printed():
    for epsilon, row in MISSES.items():
        for rho, printed in zip((0.0, 0.3, 0.5, 0.7), row.split()):
            assert rabitq.miss_rate(epsilon, 128, rho) == pytest.approx(float(printed), abs=0.51 * unit(printed))
    assert rabitq.miss_rate(1.9, 64) == pytest.approx(0.0568, abs=6e-5)
    assert rabitq.miss_rate(1.9, 256) == pytest.approx(0.0573, abs=6e-5)
    assert rabitq.miss_rate(1.9, 128, 0.9) < 1e-4 and rabitq.miss_rate(3.0, 128, 0.7) < 1e-4


@pytest.mark.parametrize(("head_dim", "plain", "centred"), [(64, 10, 12), (128, 18, 20), (256, 34, 36)])
def test_bytes_are_as_printed(head_dim, plain, centred):
    keys, rotation = vectors(0, (2, 3, 5, head_dim)), hadamard(head_dim, 0)
    assert encode(keys, rotation).nbytes == 30 * plain
    assert encode(keys, rotation, key_mean=keys[0, :, 0], query_mean=keys[0, :, 1]).nbytes == 30 * centred


# --- Special keys and queries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_keys_and_keys_equal_to_the_centroid(zero):
    keys, mean = vectors(0, (1, 2, 5, 64)), vectors(1, (2, 64))
    keys[0, :, 1], keys[0, :, 3] = zero, mean
    for encoded, token in ((encode(keys, haar(64, 0)), 1), (encode(keys, haar(64, 0), key_mean=mean), 3)):
        assert not encoded.sign[0, :, token].any() and not encoded.rescale[0, :, token].any()
    query = vectors(2, (1, 4, 64))
    assert not logits(query, encode(keys, haar(64, 0)), haar(64, 0))[0, :, 1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_in_their_token(bad):
    keys, mean = vectors(0, (1, 2, 140, 64)), vectors(1, (2, 64))
    clean = encode(keys, haar(64, 0), key_mean=mean, query_mean=mean)
    keys[0, 1, 130, 5] = bad
    encoded = encode(keys, haar(64, 0), key_mean=mean, query_mean=mean)
    assert not encoded.sign[0, 1, 130].any()
    assert np.isnan(encoded.rescale[0, 1, 130]) and np.isnan(encoded.offset[0, 1, 130])
    others = np.ones((1, 2, 140), bool)
    others[0, 1, 130] = False
    for name in ("sign", "rescale", "offset"):
        assert (getattr(clean, name) == getattr(encoded, name))[others].all()
    scores = score(vectors(2, (1, 4, 64)), encoded, haar(64, 0))
    assert np.isnan(scores.logits).sum() == 2 and np.isnan(scores.logits[0, 2:, 130]).all()
    assert 130 not in top_k(scores, 140, sinks=0, recent=0).indices[0, 2]
    assert 130 not in top_p(scores, 1.0, sinks=0, recent=0, calibrated=True).indices[0, 3]
    with pytest.raises(ValueError, match=r"keys: expected finite numbers, .* = \[0, 1, 130\]"):
        encode(keys, haar(64, 0), check_finite=True)
    sums, counts = rabitq.block_sums(keys)
    assert counts.tolist() == [[[128, 12], [128, 11]]] and np.isfinite(sums).all()


@pytest.mark.parametrize("bits", rabitq.QUERY_BITS)
def test_queries_that_are_not_finite_stay_in_their_head(bits):
    encoded, query = encode(vectors(0, (1, 2, 5, 64)), hadamard(64, 0)), vectors(1, (1, 4, 64))
    clean = score(query, encoded, hadamard(64, 0), query_bits=bits)
    query[0, 1, 3] = np.inf
    made = score(query, encoded, hadamard(64, 0), query_bits=bits)
    assert np.isnan(made.logits[0, 1]).all() and not np.isfinite(made.sigma[0, 1]).any()
    assert (made.logits == clean.logits)[0, [0, 2, 3]].all() and (made.sigma == clean.sigma)[0, [0, 2, 3]].all()
    assert not top_p(made, 0.9, sinks=0, recent=0).counts[0, 1]


@given(bits=st.sampled_from((4, 8)), seed=SEEDS,
       content=st.sampled_from(("equal", "zero", "subnormal", "tiny", "huge")))
def test_queries_of_any_size(bits, seed, content):
    q = vectors(seed, (2, 3, 32))
    q = {"equal": q[..., :1] + 0 * q, "zero": 0 * q, "subnormal": np.rint(3 * q) * np.float32(1e-45),
         "tiny": q * np.float32(1e-38), "huge": q * np.float32(3e37)}[content].astype(np.float32)
    code = quantise_query(q, bits)
    again = code.step[..., None].astype(float) * code.codes + code.low[..., None].astype(float)
    wide = q.astype(float)
    span = np.ptp(wide, axis=-1, keepdims=True) if bits == 4 else np.abs(wide).max(axis=-1, keepdims=True)
    half = 0.5001 * span / (15 if bits == 4 else 127)
    # Half a step; or the whole range where it is below 15 / 3.4e38 and has no reciprocal, or steps are subnormal.
    assert (np.abs(again - q) <= np.where(span < 1e-36, 1e-37, half)).all()
    if content in ("equal", "zero") and bits == 4:
        assert not code.codes.any() and (again == q).all()


def test_scalars_saturate():
    keys = np.full((1, 1, 2, 64), 1e30, np.float32)
    keys[0, 0, 1] *= -1
    encoded = encode(keys, hadamard(64, 0), query_mean=np.ones((1, 64)))
    assert encoded.rescale.tolist() == [[[65504, 65504]]] and encoded.offset.tolist() == [[[65504, -65504]]]
    small = encode(np.full((1, 1, 1, 64), 1e-45, np.float32), hadamard(64, 0))
    assert small.rescale[0, 0, 0] == 0
    assert np.isfinite(score(vectors(0, (1, 2, 64)), encoded, hadamard(64, 0)).logits).all()
    assert (rabitq.centroid(*rabitq.block_sums(np.full((1, 1, 300, 2), 3.4e38, np.float32))) > 3.3e38).all()


def test_no_tokens():
    encoded = encode(np.zeros((2, 2, 0, 64)), haar(64, 0), query_mean=np.ones((2, 64)))
    made = score(vectors(0, (2, 6, 64)), encoded, haar(64, 0))
    assert made.logits.shape == made.sigma.shape == (2, 6, 0)
    assert encoded.nbytes == 0 and encoded.offset.shape == (2, 2, 0)
    assert not rabitq.centroid(*rabitq.block_sums(np.zeros((2, 2, 0, 64)))).any()
    assert encode(np.zeros((0, 2, 3, 64)), haar(64, 0)).rescale.shape == (0, 2, 3)


# --- Incremental encoding, scores of real use ------------------------------------------------------------------------


@given(seed=SEEDS, tokens=st.integers(0, 500), kind=st.sampled_from(("haar", "hadamard")), batch=st.integers(1, 2),
       dtype=st.sampled_from((np.float16, np.float32)), strided=st.booleans(),
       content=st.sampled_from(("normal", "equal", "zeros", "huge", "subnormal", "NaN")))
def test_blocks_one_by_one_have_the_bits_of_all_at_once(seed, tokens, kind, batch, dtype, strided, content):
    rotation = haar(64, seed) if kind == "haar" else hadamard(64, seed, 1 + seed % 3)
    keys = vectors(seed, (batch, 2, tokens, 64), dtype)
    with np.errstate(over="ignore"):
        keys = {"normal": keys, "equal": keys[:, :, :1] + 0 * keys, "zeros": 0 * keys, "huge": keys * dtype(1e4),
                "subnormal": keys * dtype(1e-7), "NaN": np.where(keys > 2.5, dtype(np.nan), keys)}[content]
    means = {"key_mean": vectors(seed + 1, (2, 64)), "query_mean": vectors(seed + 2, (2, 64))}
    whole = encode(np.ascontiguousarray(keys.swapaxes(1, 2)).swapaxes(1, 2) if strided else keys, rotation, **means)
    for first in range(0, tokens, 128):
        alone = encode(keys[:, :, first : first + 128], rotation, **means)
        for name in ("sign", "rescale", "offset"):
            one, other = getattr(whole, name)[:, :, first : first + 128], getattr(alone, name)
            assert one.tobytes() == other.tobytes()


def test_scores_correlate_for_every_query():
    """Encoder and scorer apply the same rotation on the same side: 0.8 for Gaussian data, and 0 otherwise."""
    keys, query = vectors(0, (1, 2, 500, 128)), vectors(1, (1, 8, 128))
    exact = np.einsum("bhd,bhtd->bht", query, np.repeat(keys, 4, axis=1)) * 128**-0.5
    for rotation in (haar(128, 1), hadamard(128, 1), hadamard(128, 1, 1)):
        for bits in rabitq.QUERY_BITS:
            made = score(query, encode(keys, rotation), rotation, query_bits=bits)
            assert made.logits.dtype == made.sigma.dtype == np.float32
            for h in range(8):
                assert np.corrcoef(made.logits[0, h], exact[0, h])[0, 1] > 0.7
            assert np.sqrt((made.sigma**2).mean()) == pytest.approx((made.logits - exact).std(), rel=0.05)


def test_centring_shrinks_the_noise_and_keeps_the_logits():
    keys = vectors(0, (1, 1, 600, 64)) + 4 * vectors(1, (1, 1, 1, 64))
    prompt = vectors(2, (1, 4, 300, 64)) + 3 * vectors(3, (1, 1, 1, 64))
    query, rotation = prompt[:, :, -1], hadamard(64, 0)
    exact = np.einsum("bhd,btd->bht", query, keys[:, 0]) * 64**-0.5
    key_mean = rabitq.centroid(*rabitq.block_sums(keys))
    query_mean = rabitq.centroid(*rabitq.block_sums(prompt, 1))
    np.testing.assert_allclose(query_mean[0, 0], prompt.astype(float).mean(axis=(0, 1, 2)), atol=1e-6)
    noise = [(logits(query, encode(keys, rotation, **means), rotation) - exact).std() for means in (
        {}, {"key_mean": key_mean}, {"key_mean": key_mean, "query_mean": query_mean})]
    assert noise[0] > 2 * noise[1] > 4 * noise[2]


def test_the_tail_is_encoded_in_blocks():
    for length, expected in ((0, 0), (131, 4), (259, 4), (260, 132), (387, 132), (388, 260)):
        (start,), (stop,) = middle(np.array([length]), 4, 128, rabitq.BLOCK)
        assert stop == min(expected, length) and start == min(4, length)


GOOD, QUERY = vectors(0, (2, 3, 4, 64)), vectors(1, (2, 6, 64))
CODE = encode(GOOD, haar(64, 0))
ROTATED = rotate_query(QUERY, CODE, haar(64, 0))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: encode(GOOD[0], haar(64, 0)), r"keys: expected \[batch, kv_heads, tokens, head_dim\], got \[3, 4, 64\]"),
    (lambda: encode(GOOD, haar(32, 0)), "rotation: expected .* at least head_dim = 64, got 32"),
    (lambda: encode(GOOD, haar(64, 0), key_mean=np.zeros(64)), r"key_mean: expected .* = \[3, 64\], got \[64\]"),
    (lambda: encode(GOOD, haar(64, 0), query_mean=np.full((3, 64), np.inf)), "query_mean: .* with NaN or Inf"),
    (lambda: logits(QUERY[:, :5], CODE, haar(64, 0)), r"query: .* = \[2, a multiple of 3, 64\], got \[2, 5, 64\]"),
    (lambda: logits(QUERY, CODE, haar(64, 0), query_bits=5), "query_bits: expected 4, 8 or 16, got 5"),
    (lambda: logits(QUERY, CODE, haar(64, 0), query_bits=8, rounding="random"), "rounding: .* 'random' for 8 bits"),
    (lambda: logits(QUERY, CODE, haar(64, 0), rounding="up"), "rounding: expected 'nearest'.* got 'up'"),
    (lambda: quantise_query(ROTATED.astype(float)), r"rotated: expected float32 .* got float64 \[2, 6, 64\]"),
    (lambda: quantise_query(ROTATED, 16), "query_bits: expected 4 or 8 for a query in integers, got 16"),
    (lambda: rabitq.sign_products(np.zeros((2, 5, 64), int), CODE.sign), r"codes: expected \[2, a multiple of 3, size"),
    (lambda: rabitq.block_sums(GOOD, 2), "kv_heads: expected a divisor of 3 heads, got 2"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Defects that the claims find ------------------------------------------------------------------------------------

ENCODE, SIGMA, QUANTISE, ROTATE_QUERY = rabitq.encode, rabitq.sigma, rabitq.quantise_query, rabitq.rotate_query
DITHER, PRODUCTS, POPCOUNT = rabitq.dither, rabitq.sign_products, rabitq.popcount_products
SIGN_LOGITS, BLOCK_SUMS = rabitq.sign_logits, rabitq.block_sums


def encode_with(**change):
    def encode(*arguments, **options):
        made = ENCODE(*arguments, **options)
        return dataclasses.replace(made, **{name: function(made) for name, function in change.items()})
    return encode


def encode_with_the_norm(keys, rotation, **options):
    """r without the correction: |k| / sqrt(D) instead of |k|^2 / |y|_1."""
    return dataclasses.replace(ENCODE(keys, rotation, **options), rescale=turboquant.encode(
        np.asarray(keys), rotation, 1, scale_mode="plain", mean=options.get("key_mean")).scale)


def encode_after_a_partial_block(keys, rotation, **options):
    """The centroid of the tokens at hand, not a frozen one."""
    return ENCODE(keys, rotation, **{**options, "key_mean": np.nan_to_num(np.asarray(keys)[:, :, :100].mean(axis=2))
                                     if keys.shape[2] else options.get("key_mean")})


def rotate_query_backwards(query, encoded, rotation):
    inverse = dataclasses.replace(rotation, kind="haar", matrix=rotation.dense().T)
    return ROTATE_QUERY(query, encoded, inverse)


def quantise_down(*arguments, **options):
    made = QUANTISE(*arguments, **options)
    return dataclasses.replace(made, codes=np.maximum(made.codes, 1) - 1)


def quantise_without_rounding_at_random(rotated, query_bits=4, *, rounding="nearest", **options):
    return QUANTISE(rotated, query_bits)


def dither_of_every_step(shape, seed=0, step=0):
    return DITHER(shape, seed, 0)


def dither_of_five_values(shape, seed=0, step=0):
    return np.floor(DITHER(shape, seed, step) * 5) / np.float32(5)


def popcount_of_three_planes(codes, sign):
    return POPCOUNT(codes & 7, sign)


def products_of_positive_bits(codes, sign):
    return PRODUCTS(codes, ~sign)


def sign_logits_scaled(*arguments, **options):
    return SIGN_LOGITS(*arguments, **options) * 1.02


def alignment_of_the_limit(size):
    return (2 / np.pi) ** 0.5 * 0.98, 2 / np.pi * 0.98


def miss_rate_of_the_normal_law(epsilon, size, rho=0.0):
    return math.erfc(epsilon / math.sqrt(2))


def block_sums_of_all_tokens(x, kv_heads=None):
    sums, counts = BLOCK_SUMS(x, kv_heads)
    return sums, np.full_like(counts, rabitq.BLOCK)


def three_rounds(size, seed, rounds=3):
    return hadamard(size, seed, 3)


def twice(function):
    return lambda *arguments, **options: 2 * function(*arguments, **options)


def transform_of_one_round(x):
    """Only the last of three rounds mixes: the spikes stay as they are before it."""
    return x * x.shape[-1] ** 0.5


DEFECTS = [
    ("encode", encode_with_the_norm, ["unbiased", "alignment", "unbiased, true rotations", "exactness"]),
    ("encode", encode_with(sign=lambda made: made.sign ^ np.uint32(1)), ["unbiased", "exactness", "any rotation"]),
    ("encode", encode_with(offset=lambda made: None if made.offset is None else -made.offset),
     ["unbiased, true rotations", "exactness"]),
    ("encode", encode_after_a_partial_block, ["incremental", "token by token"]),
    ("_products", lambda code, sign: 1.1 * code.step[..., None].astype(float) * PRODUCTS(code.codes, sign),
     ["noise of rounding", "bias of nearest rounding", "random rounding", "integers", "noise predictor"]),
    ("rotate_query", rotate_query_backwards, ["exactness"]),
    ("quantise_query", quantise_down, ["rounding of a coordinate"]),
    ("quantise_query", quantise_without_rounding_at_random, ["random rounding", "noise of rounding"]),
    ("dither", dither_of_every_step, ["random rounding", "dither"]),
    ("dither", dither_of_five_values, ["dither"]),
    ("popcount_products", popcount_of_three_planes, ["integers"]),
    ("sign_products", products_of_positive_bits, ["integers", "noise of rounding"]),
    ("sign_logits", sign_logits_scaled, ["unbiased", "law of the error", "one Hadamard round is biased"]),
    ("sign_logits", twice(SIGN_LOGITS),
     ["variance", "any rotation", "miss rate", "inflation", "three Hadamard rounds"]),
    ("alignment", alignment_of_the_limit, ["alignment"]),
    ("miss_rate", miss_rate_of_the_normal_law, ["miss rate"]),
    ("walsh_hadamard", transform_of_one_round, ["three Hadamard rounds"]),
    ("hadamard", three_rounds, ["one Hadamard round is biased"]),
    ("block_sums", block_sums_of_all_tokens, ["centroid"]),
    ("sigma", twice(SIGMA), ["noise predictor", "inflation", "calibration on codes"]),
    ("_constant", lambda query, encoded: np.full(np.shape(query)[:2], np.nan), ["constant of centring", "exactness"]),
]


@pytest.mark.parametrize(("name", "defect", "found_by"), DEFECTS, ids=range(len(DEFECTS)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_defect_is_found(monkeypatch, name, defect, found_by):
    assert all(find_without_defect("rabitq", claim).holds for claim in found_by)
    monkeypatch.setattr(rabitq, name, defect)
    missed = [claim for claim in found_by if find("rabitq", claim).holds]
    assert not missed


def test_every_claim_finds_a_defect():
    assert {c.name for c in claims.algorithms()["rabitq"]} == {name for _, _, names in DEFECTS for name in names}
