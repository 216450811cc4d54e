"""The reference of TurboQuant: a loop over single coordinates, printed tables, special tokens, and defects found."""
import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import claims
from kvbench.reference import attention, planes, turboquant
from kvbench.reference.codebook import normal, sphere
from kvbench.reference.rotation import haar, hadamard, rotate, walsh_hadamard
from kvbench.reference.turboquant import SCALE_MODES, decode, decode_attention, encode, encode_prod, logits
from test_claims import find, find_without_defect

ALL_BITS = st.integers(1, 8)
SEEDS = st.integers(0, 2**32)
MODES = st.sampled_from(SCALE_MODES)


def vectors(seed, shape, dtype=np.float32):
    return np.random.default_rng([seed, 7]).standard_normal(shape).astype(dtype)


# --- The definition, one coordinate at a time ------------------------------------------------------------------------


def code_of(x, matrix, bits, mode):
    """(signs, magnitudes, s) of one vector, step by step; s as float64."""
    size = len(x)
    codebook = normal(bits) if size in (64, 128, 256) else sphere(bits, size)
    y = [math.fsum(matrix[j, i] * x[i] for i in range(size)) for j in range(size)]
    n = math.sqrt(math.fsum(value**2 for value in x))
    z = [math.sqrt(size) * value / n for value in y]
    signs = [int(value < 0) for value in z]
    magnitudes = [sum(abs(value) > t for t in codebook.boundaries) for value in z]
    c = [(1 - 2 * sign) * codebook.centroids[m] for sign, m in zip(signs, magnitudes)]
    w = math.fsum(a * b for a, b in zip(z, c)) / size
    e = math.fsum(value**2 for value in c) / size
    s = {"plain": n / math.sqrt(size), "nc": n / math.sqrt(size * e), "mse": n / math.sqrt(size) * w / e,
         "unbiased": n / math.sqrt(size) / w}[mode]
    return signs, magnitudes, s, c


@given(bits=ALL_BITS, mode=MODES, size=st.sampled_from((32, 64, 96)), seed=SEEDS, centred=st.booleans(),
       dtype=st.sampled_from((np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
def test_encode_and_decode_follow_the_definition(bits, mode, size, seed, centred, dtype):
    rotation = haar(size, seed) if size == 96 else hadamard(size, seed)
    x, mean = vectors(seed, (2, 2, 1, size), dtype), vectors(seed + 1, (2, size))
    encoded = encode(x, rotation, bits, scale_mode=mode, mean=mean if centred else None)
    signs, magnitudes = planes.unpack(encoded.planes, size)
    decoded = decode(encoded, rotation)
    matrix = rotation.dense()
    assert encoded.scale.dtype == np.float16 and encoded.bits == bits
    for b in range(2):
        for h in range(2):
            vector = x[b, h, 0].astype(np.float64) - (mean[h] if centred else 0)
            expected = code_of(vector, matrix, bits, mode)
            assert signs[b, h, 0].tolist() == expected[0] and magnitudes[b, h, 0].tolist() == expected[1]
            s = float(encoded.scale[b, h, 0])
            assert abs(s - expected[2]) <= 2.0**-11 * expected[2] * (1 + 1e-9)
            np.testing.assert_allclose(decoded[b, h, 0], s * matrix.T @ expected[3], atol=1e-12)


def test_codebooks_of_each_size():
    for size in (64, 128, 256, 512):
        assert turboquant.codebook_for(3, size) == normal(3)
    for size in (2, 32, 66, 96, 192):
        assert turboquant.codebook_for(3, size) == sphere(3, size)


# --- Printed tables --------------------------------------------------------------------------------------------------

# Unit vectors at cosine 0.35, head_dim 128: relative bias of <y, x_hat>, D times its mean squared error, |x - x_hat|^2
MOMENTS = {1: "-0.362 2.263 0.3608  -0.201 0.955 0.4010  -0.361 2.255 0.3605  0.000 0.500 0.5671",
           2: "-0.115 0.315 0.1160  -0.059 0.159 0.1188  -0.115 0.302 0.1152  0.000 0.116 0.1305",
           3: "-0.033 0.0545 0.0340  -0.017 0.0343 0.0338  -0.034 0.0468 0.0335  0.000 0.0307 0.0347",
           4: "-0.009 0.0121 0.0093  -0.005 0.0084 0.0092  -0.009 0.0094 0.0092  0.000 0.0082 0.0093"}
# Standard deviation of |x - x_hat|^2 over vectors, plain
SPREADS = {64: "0.042 0.021 0.0080 0.0026", 128: "0.030 0.015 0.0061 0.0021"}


def sphere_pairs(size, samples, cosine=0.35):
    """R x and R y for unit vectors x, y at that cosine, R Haar: a uniform point, and one at that angle to it."""
    x, y = np.random.default_rng(11).standard_normal((2, samples, size))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    y -= (x * y).sum(axis=-1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    return x, cosine * x + (1 - cosine**2) ** 0.5 * y


def within(samples, printed):
    """The mean is the printed number, within 6 standard errors and the rounding and the sampling error of the print."""
    unit = 10.0 ** -len(printed.partition(".")[2])
    return abs(samples.mean() - float(printed)) <= 6 * samples.std() / len(samples) ** 0.5 + unit


@pytest.mark.parametrize("bits", MOMENTS)
def test_errors_of_the_scale_modes_are_as_printed(bits):
    x, y = sphere_pairs(128, 8000)
    printed = iter(MOMENTS[bits].split())
    for mode in ("plain", "nc", "mse", "unbiased"):
        code = turboquant._rotated_code(x, bits, mode)
        products = (y * code).sum(axis=-1)
        assert within(products / 0.35 - 1, next(printed))
        assert within(128 * (products - 0.35) ** 2, next(printed))
        assert within(((x - code) ** 2).sum(axis=-1), next(printed))


@pytest.mark.parametrize("size", SPREADS)
def test_spread_of_the_distortion_is_as_printed(size):
    x, _ = sphere_pairs(size, 8000)
    for bits, printed in enumerate(SPREADS[size].split(), start=1):
        spread = ((x - turboquant._rotated_code(x, bits, "plain")) ** 2).sum(axis=-1).std()
        assert spread == pytest.approx(float(printed), rel=0.08)


@pytest.mark.parametrize(("head_dim", "printed"), [
    (64, {1: "10 1.25", 2: "18 2.25", 3: "26 3.25", 4: "34 4.25", 8: "66 8.25"}),
    (128, {1: "18 1.125", 2: "34 2.125", 3: "50 3.125", 4: "66 4.125", 8: "130 8.125"})])
def test_sizes_are_as_printed(head_dim, printed):
    x, rotation = vectors(0, (2, 3, 5, head_dim)), hadamard(head_dim, 0)
    for bits, text in printed.items():
        encoded = encode(x, rotation, bits)
        assert f"{encoded.nbytes / 30:g} {encoded.bits_per_element:g}" == text
        prod = encode_prod(x, rotation, turboquant.gaussian_projection(head_dim, 0), bits)
        second_scalar = 0 if bits == 1 else 2
        assert prod.nbytes == encoded.nbytes + 30 * second_scalar and prod.bits == bits
        assert prod.bits_per_element == encoded.bits_per_element + 8 * second_scalar / head_dim


def test_padding_counts():
    encoded = encode(vectors(0, (1, 1, 4, 80)), haar(96, 0), 3)
    assert encoded.head_dim == 80 and encoded.nbytes == 4 * (36 + 2) and encoded.bits_per_element == 8 * 38 / 80


# --- Special tokens --------------------------------------------------------------------------------------------------


def all_zero(encoded, token):
    return all(not plane[0, 0, token].any() for plane in encoded.planes.arrays().values())


@pytest.mark.parametrize("mode", SCALE_MODES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_vectors(mode, zero):
    x = vectors(0, (1, 1, 3, 64))
    x[0, 0, 1] = zero
    encoded = encode(x, haar(64, 0), 3, scale_mode=mode)
    assert all_zero(encoded, 1) and encoded.scale[0, 0, 1] == 0
    assert not decode(encoded, haar(64, 0))[0, 0, 1].any()
    assert logits(vectors(1, (1, 2, 64)), encoded, haar(64, 0))[0, :, 1].tolist() == [0, 0]
    assert turboquant.rescale(x, haar(64, 0))[0, 0, 1] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", SCALE_MODES)
def test_values_that_are_not_finite_stay_in_their_token(mode, bad):
    x = vectors(0, (1, 2, 4, 64))
    clean = encode(x, hadamard(64, 0), 4, scale_mode=mode)
    x[0, 0, 2, 9] = bad
    encoded = encode(x, hadamard(64, 0), 4, scale_mode=mode)
    assert all_zero(encoded, 2) and np.isnan(encoded.scale[0, 0, 2])
    assert np.isnan(decode(encoded, hadamard(64, 0))[0, 0, 2]).all()
    others = np.ones((1, 2, 4), bool)
    others[0, 0, 2] = False
    for name, plane in clean.planes.arrays().items():
        assert (plane == encoded.planes.arrays()[name])[others].all()
    assert (clean.scale == encoded.scale)[others].all()
    output, lse = decode_attention(vectors(1, (1, 4, 64)), encoded, clean, hadamard(64, 0), hadamard(64, 0))
    assert np.isnan(output[0, :2]).all() and np.isfinite(output[0, 2:]).all() and np.isfinite(lse[0, 2:]).all()
    assert np.isnan(turboquant.rescale(x, hadamard(64, 0))).tolist() == np.isnan(encoded.scale).tolist()
    assert np.isinf(turboquant.boundary_distance(x, hadamard(64, 0), 4)[0, 0, 2]).all()
    prod = encode_prod(x, hadamard(64, 0), turboquant.gaussian_projection(64, 0), 4)
    assert np.isnan(prod.residual_norm).tolist() == np.isnan(encoded.scale).tolist()
    assert not prod.residual_sign[0, 0, 2].any()
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 vectors, the first at .* = \[0, 0, 2\]"):
        encode(x, hadamard(64, 0), 4, check_finite=True)


def test_scales_saturate_and_keep_subnormals():
    x = vectors(0, (1, 1, 1, 64))
    unit = float(np.float64(np.linalg.norm(x.astype(np.float64))) / 8)
    for norm, expected in ((65000, 65000), (65504, 65504), (65519, 65504), (65521, 65504), (1e6, 65504), (3e38, 65504),
                           (2.0**-20, 2.0**-20), (2.0**-24, 2.0**-24), (2.0**-26, 0.0), (1e-38, 0.0)):
        encoded = encode(x.astype(np.float64) * (norm / unit), hadamard(64, 0), 3, scale_mode="plain")
        assert float(encoded.scale[0, 0, 0]) == float(np.float16(expected)) and not all_zero(encoded, 0)
        assert np.isfinite(turboquant.rescale(x.astype(np.float64) * (norm / unit), hadamard(64, 0))).all()


def test_ties_belong_to_the_inner_cell_and_positive_sign():
    """y with |z| exactly at a boundary, 0 and -0: norm 8 = sqrt(64) makes z = y."""
    boundary = normal(2).boundaries[0]
    y = np.zeros(64)
    y[:4] = boundary, -boundary, -0.0, np.nextafter(boundary, 2)
    y[4] = (64 - (y[:4] ** 2).sum()) ** 0.5
    norm, z = turboquant._normalised(y)
    assert norm == 8 and (z == y).all()
    signs, magnitudes, _ = turboquant.quantise(y, normal(2))
    assert signs[:5].tolist() == [0, 1, 0, 0, 0] and magnitudes[:5].tolist() == [0, 0, 0, 1, 1]


def test_no_tokens_and_empty_sequences():
    rotation, query = haar(64, 0), vectors(0, (2, 4, 64))
    empty = encode(np.zeros((2, 2, 0, 64)), rotation, 3)
    assert empty.nbytes == 0 and empty.bits_per_element == 3.25 and logits(query, empty, rotation).shape == (2, 4, 0)
    output, lse = decode_attention(query, empty, empty, rotation, rotation)
    assert not output.any() and np.isneginf(lse).all()
    some = encode(vectors(1, (2, 2, 5, 64)), rotation, 3)
    output, lse = decode_attention(query, some, some, rotation, rotation, lengths=np.array([0, 3]))
    assert not output[0].any() and np.isneginf(lse[0]).all() and np.isfinite(lse[1]).all() and output[1].all()
    assert decode_attention(query, some, some, rotation, rotation, return_lse=False).shape == (2, 4, 64)
    assert encode(np.zeros((0, 2, 3, 64)), rotation, 3).scale.shape == (0, 2, 3)


# --- The rule for codes of two backends ------------------------------------------------------------------------------


@given(bits=ALL_BITS, seed=SEEDS, content=st.sampled_from(("normal", "outlier", "sparse", "mean")))
def test_float32_codes_differ_only_near_a_decision(bits, seed, content):
    rotation, x = hadamard(64, seed), vectors(seed, (1, 1, 20, 64))
    x[..., 3] *= 50 if content == "outlier" else 1
    x *= np.random.default_rng(seed).random(x.shape) < (0.1 if content == "sparse" else 1)
    mean = np.full((1, 64), 20, np.float32) if content == "mean" else None
    x = x if mean is None else x + mean
    y = x if mean is None else x - mean
    norm = np.sqrt((y * y).sum(axis=-1, keepdims=True))
    for signs in rotation.signs:
        y = walsh_hadamard(y * signs.astype(np.float32)) * np.float32(0.125)
    codebook = normal(bits)
    with np.errstate(invalid="ignore"):
        z = np.where(norm == 0, np.float32(0), y * (np.float32(8) / norm))
    signs, magnitudes = codebook.assign(z)
    exact_signs, exact_magnitudes = planes.unpack(encode(x, rotation, bits, mean=mean).planes, 64)
    distance = turboquant.boundary_distance(x, rotation, bits, mean=mean)
    differ = (signs != exact_signs) | (magnitudes != exact_magnitudes)
    assert (distance[differ] <= turboquant.ROUNDING_DISTANCE).all()
    assert (np.abs(magnitudes.astype(int) - exact_magnitudes.astype(int)) <= 1).all()


def test_boundary_distance_is_to_the_nearest_decision():
    x, rotation = vectors(3, (1, 2, 6, 64)), haar(64, 1)
    x[0, 1, 3] = 0
    y = rotate(x, rotation)
    norm = np.linalg.norm(y, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        z = np.abs(8 * y / norm)
    edges = np.array([0.0, *normal(3).boundaries])
    expected = np.abs(z[..., None] - edges).min(axis=-1)
    distance = turboquant.boundary_distance(x, rotation, 3)
    assert np.isinf(distance[0, 1, 3]).all()
    np.testing.assert_allclose(distance[norm[..., 0] > 0], expected[norm[..., 0] > 0], atol=1e-13)
    # As far as that, and no further, z can move before its code changes.
    for direction in (-1, 1):
        moved = y + direction * 0.999 * np.where(np.isinf(distance), 0, distance) * norm / 8
        assert all((a == b).all() for a, b in zip(normal(3).assign(8 * moved / np.where(norm == 0, 1, norm)),
                                                  planes.unpack(encode(x, rotation, 3).planes, 64)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_residual_distance_is_that_of_the_projected_residual(bits):
    x, rotation = vectors(3, (1, 1, 4, 64)), haar(64, 1)
    x[0, 0, 2] = 0
    projection = turboquant.gaussian_projection(64, 5)
    distance = turboquant.residual_distance(x, rotation, projection, bits)
    prod = encode_prod(x, rotation, projection, bits)
    negative = planes.unpack_bits(prod.residual_sign, 64)
    for t in (0, 1, 3):
        z = rotate(x[0, 0, t], rotation) * 8 / np.linalg.norm(x[0, 0, t].astype(np.float64))
        residual = z if bits == 1 else z - normal(bits - 1).reconstruct(*normal(bits - 1).assign(z))
        projected = projection.matrix @ residual / np.linalg.norm(projection.matrix, axis=1)
        assert (negative[0, 0, t] == (projected < 0)).all()
        np.testing.assert_allclose(distance[0, 0, t], np.abs(projected), atol=1e-12)
    assert np.isinf(distance[0, 0, 2]).all() and not negative[0, 0, 2].any() and prod.residual_norm[0, 0, 2] == 0


# --- Attention, centring, prod ---------------------------------------------------------------------------------------


def test_padded_heads_attend_as_decoded():
    query, x = vectors(0, (1, 6, 80)), vectors(1, (1, 2, 9, 80))
    rotation = haar(96, 2)
    encoded = encode(x, rotation, 4)
    decoded = decode(encoded, rotation)
    assert decoded.shape == x.shape
    expected = attention.decode(query, decoded, decoded)
    for one, other in zip(decode_attention(query, encoded, encoded, rotation, rotation), expected):
        np.testing.assert_allclose(one, other, atol=1e-13)


def test_centring_makes_keys_with_a_large_mean_accurate():
    keys = vectors(0, (1, 1, 400, 64)) + 5 * vectors(1, (1, 1, 1, 64))
    query, rotation = vectors(2, (1, 1, 64)), haar(64, 3)
    exact = 0.125 * (keys[0, 0] @ query[0, 0])
    errors = []
    for mean in (None, keys[0].mean(axis=1)):
        error = logits(query, encode(keys, rotation, 3, mean=mean), rotation)[0, 0] - exact
        errors.append(error.std())                      # a constant does not matter
    assert errors[1] < errors[0] / 3


def test_projections():
    """S is independent of the rotation of its seed, repeatable, and its constant is the one of its law."""
    for make in (turboquant.gaussian_projection, turboquant.orthogonal_projection):
        assert make(64, 3) == make(64, 3) and make(64, 3) != make(64, 4)
        assert (make(64, 3).matrix == make(64, 3).matrix).all()
        for other in (np.random.default_rng(3).standard_normal((64, 64)), haar(64, 3).matrix):
            assert np.abs(np.corrcoef(make(64, 3).matrix.ravel(), other.ravel())[0, 1]) < 6 / 64
        with pytest.raises(ValueError, match="read-only"):
            make(64, 3).matrix[0, 0] = 1
    orthogonal = turboquant.orthogonal_projection(64, 3)
    np.testing.assert_allclose(orthogonal.matrix @ orthogonal.matrix.T, np.eye(64), atol=1e-13)
    assert turboquant.gaussian_projection(128, 0).unbiasing == pytest.approx((math.pi / 2) ** 0.5 / 128)
    mean = math.gamma(64) / (math.pi**0.5 * math.gamma(64.5))
    assert turboquant.orthogonal_projection(128, 0).unbiasing == pytest.approx(1 / (128 * mean), rel=1e-13)
    assert mean / (2 / math.pi / 128) ** 0.5 == pytest.approx(1.002, abs=1e-4)


def test_prod_errors_are_as_printed():
    """D times the bound on the variance, pi / 2 D(b - 1); orthogonal S does 2.7 to 2.9 times better."""
    for bits, printed in enumerate((1.5708, 0.5708, 0.1845, 0.0543), start=1):
        distortion = 1.0 if bits == 1 else normal(bits - 1).distortion
        assert math.pi / 2 * distortion == pytest.approx(printed, abs=5.1e-5)
    for cosine in (0.0, 0.2, 0.35):
        gaussian, orthogonal = (turboquant._prod_variance_law(kind, 128, cosine) for kind in ("gaussian", "orthogonal"))
        assert 2.7 < gaussian / orthogonal < 2.9


GOOD = vectors(0, (2, 3, 4, 64))
CODE = encode(GOOD, haar(64, 0), 3)
QUERY = vectors(1, (2, 6, 64))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: encode(GOOD[0], haar(64, 0), 3), r"x: expected \[batch, kv_heads, tokens, head_dim\], got \[3, 4, 64\]"),
    (lambda: encode(GOOD, haar(32, 0), 3), "rotation: expected .* multiple of 32 and at least head_dim = 64, got 32"),
    (lambda: encode(GOOD, haar(66, 0), 3), "rotation: expected a size that is a multiple of 32 .* got 66"),
    (lambda: encode(GOOD, haar(64, 0), 9), "bits: expected an integer from 1 to 8, got 9"),
    (lambda: encode(GOOD, haar(64, 0), 3, scale_mode="best"), "scale_mode: expected one of nc, plain, .* got 'best'"),
    (lambda: encode(GOOD, haar(64, 0), 3, mean=np.zeros(64)), r"mean: expected finite .* = \[3, 64\], got \[64\]"),
    (lambda: encode(GOOD, haar(64, 0), 3, mean=np.full((3, 64), np.nan)), r"mean: .* got \[3, 64\] with NaN"),
    (lambda: encode_prod(GOOD, haar(64, 0), turboquant.gaussian_projection(64, 0), 0), "bits: expected .* got 0"),
    (lambda: encode_prod(GOOD, haar(64, 0), turboquant.gaussian_projection(64, 0), 9), "bits: expected .* got 9"),
    (lambda: encode_prod(GOOD, haar(64, 0), turboquant.gaussian_projection(32, 0), 3),
     "projection: expected the size of the rotation, 64, got 32"),
    (lambda: decode(CODE, haar(32, 0)), "rotation: expected a size"),
    (lambda: decode(CODE, haar(96, 0)), r"plane: expected uint32 \[..., 6\] for head_dim 96, got .* \[2, 3, 4, 4\]"),
    (lambda: logits(QUERY[:, :5], CODE, haar(64, 0)), r"query: .* = \[2, a multiple of 3, 64\], got \[2, 5, 64\]"),
    (lambda: logits(QUERY[..., :32], CODE, haar(64, 0)), r"query: expected .* got \[2, 6, 32\]"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Defects that the claims find ------------------------------------------------------------------------------------

QUANTISE, ENCODE, DECODE, ROTATED = turboquant.quantise, turboquant.encode, turboquant.decode, turboquant._rotated
RESCALE, SIGN_LOGITS, LOGITS, ATTEND = (turboquant.rescale, turboquant.sign_logits, turboquant.logits,
                                        turboquant.decode_attention)
ENCODE_PROD, NORMALISED, SCALAR, RESIDUAL_STAGE = (turboquant.encode_prod, turboquant._normalised,
                                                   turboquant.stored_scale, turboquant._first_stage)


def always(mode):
    return lambda y, codebook, scale_mode="nc": QUANTISE(y, codebook, mode)


def quantise_scaled(factor):
    def quantise(y, codebook, scale_mode="nc"):
        signs, magnitudes, s = QUANTISE(y, codebook, scale_mode)
        return signs, magnitudes, s * factor
    return quantise


def quantise_without_the_radius(y, codebook, scale_mode="nc"):
    """Centroids of variance 1 on coordinates of variance 1 / D: all codes are 0."""
    signs, magnitudes, s = QUANTISE(y, codebook, scale_mode)
    return signs, magnitudes * 0, s


def quantise_rounds_down(y, codebook, scale_mode="nc"):
    return QUANTISE(y, dataclasses.replace(codebook, boundaries=codebook.centroids[1:]), scale_mode)


def normalised_with_epsilon(y):
    norm, z = NORMALISED(y)
    return norm, z * (norm / (norm + 1e-2))[..., None]


def one_hadamard_round(head_dim, seed):
    return hadamard(head_dim, seed, rounds=1)


def encode_with_one_scale(x, *arguments, **options):
    encoded = ENCODE(x, *arguments, **options)
    scale = np.broadcast_to(encoded.scale.max(axis=2, keepdims=True), encoded.scale.shape)
    return dataclasses.replace(encoded, scale=scale)


def encode_signs_of_more_bits(x, rotation, bits, **options):
    encoded = ENCODE(x, rotation, bits, **options)
    sign = encoded.planes.sign ^ np.uint32(bits == 3)
    return dataclasses.replace(encoded, planes=dataclasses.replace(encoded.planes, sign=sign))


def decode_without_rotation(encoded, rotation):
    return turboquant._centroids(encoded, rotation)[..., : encoded.head_dim] * encoded.scale[..., None].astype(float)


def coarse_scalar(s, finite):
    return SCALAR(s.astype(ml_dtypes.bfloat16).astype(float), finite)


def rescale_by_the_plain_scalar(x, rotation, *, mean=None):
    return ENCODE(x, rotation, 1, scale_mode="plain").scale


def sign_logits_of_positive_coordinates(query, sign, rescale, rotation, *, scale=None):
    return SIGN_LOGITS(query, ~sign, rescale, rotation, scale=scale)


def mean_of_double(x, rotation, mean=None, check_finite=False):
    return ROTATED(x, rotation, None if mean is None else 2 * mean, check_finite)


def attend_with_a_token_too_many(query, keys, values, *rotations, lengths=None, **options):
    lengths = None if lengths is None else np.minimum(lengths + 1, keys.scale.shape[2])
    return ATTEND(query, keys, values, *rotations, lengths=lengths, **options)


def attend_without_value_scales(query, keys, values, *rotations, **options):
    values = dataclasses.replace(values, scale=np.ones_like(values.scale))
    return ATTEND(query, keys, values, *rotations, **options)


def attend_in_bits(*arguments, **options):
    output, lse = ATTEND(*arguments, **options)
    return output, lse / np.log(2)


def logits_unscaled(*arguments, scale=None):
    return LOGITS(*arguments, scale=1.0)


def first_stage_keeps_the_norm(y, bits):
    codes, residual = RESIDUAL_STAGE(y, bits)
    return codes, residual / np.linalg.norm(residual, axis=-1, keepdims=True)


def encode_prod_without_residual(*arguments, **options):
    encoded = ENCODE_PROD(*arguments, **options)
    return dataclasses.replace(encoded, residual_norm=encoded.residual_norm * 0)


def fixed_projection(head_dim, seed):
    return turboquant.Projection("gaussian", head_dim, seed, np.ones((head_dim, head_dim)))


def gaussian_as_orthogonal(head_dim, seed):
    return dataclasses.replace(turboquant.gaussian_projection(head_dim, seed), kind="orthogonal")


def orthogonal_as_gaussian(head_dim, seed):
    made = turboquant.orthogonal_projection(head_dim, seed)
    return dataclasses.replace(made, kind="gaussian", matrix=made.matrix)


PROJECTIONS = turboquant._PROJECTIONS
PER_VECTOR = ["nc keeps the norm", "unbiased keeps the inner product"]

DEFECTS = [
    ("quantise", always("nc"), ["shrinkage of plain", "unbiased keeps the inner product", "mse is least squares"]),
    ("quantise", always("plain"), ["shrinkage of nc", "nc keeps the norm", "mse is least squares"]),
    ("quantise", always("unbiased"), ["shrinkage of mse", "nc keeps the norm", "mse is least squares"]),
    ("quantise", quantise_scaled(1.05), ["distortion", "unbiased", *PER_VECTOR]),
    ("quantise", quantise_without_the_radius, ["distortion bounds", *PER_VECTOR]),
    ("quantise", quantise_rounds_down, ["distortion", "shrinkage of plain"]),
    ("haar", one_hadamard_round, ["unbiased", "variance of unbiased", "sign plane unbiased", "sign plane variance"]),
    ("_normalised", normalised_with_epsilon, ["equivariance", "float32 rounding"]),
    ("stored_scale", coarse_scalar, [*PER_VECTOR, "one bit is RaBitQ"]),
    ("encode", encode_with_one_scale, ["token by token", *PER_VECTOR]),
    ("encode", encode_signs_of_more_bits, ["one bit is RaBitQ"]),
    ("decode", decode_without_rotation, ["unbiased keeps the inner product", "attention on codes", "logits on codes",
                                         "centring"]),
    ("_rotated", mean_of_double, ["centring"]),
    ("rescale", rescale_by_the_plain_scalar, ["sign plane unbiased", "sign plane variance", "one bit is RaBitQ"]),
    ("sign_logits", sign_logits_of_positive_coordinates, ["sign plane unbiased", "one bit is RaBitQ"]),
    ("logits", logits_unscaled, ["logits on codes", "one bit is RaBitQ"]),
    ("decode_attention", attend_with_a_token_too_many, ["attention on codes", "split and merge"]),
    ("decode_attention", attend_without_value_scales, ["attention on codes", "centring"]),
    ("decode_attention", attend_in_bits, ["attention on codes", "split and merge", "centring"]),
    ("_first_stage", first_stage_keeps_the_norm, ["prod unbiased over S"]),
    ("encode_prod", encode_prod_without_residual, ["prod unbiased over S and R"]),
    ("_PROJECTIONS", {**PROJECTIONS, "gaussian": fixed_projection}, ["prod unbiased over S"]),
    ("_PROJECTIONS", {**PROJECTIONS, "gaussian": orthogonal_as_gaussian}, ["variance of prod, gaussian S"]),
    ("_PROJECTIONS", {**PROJECTIONS, "orthogonal": gaussian_as_orthogonal}, ["variance of prod, orthogonal S"]),
]


@pytest.mark.parametrize(("name", "defect", "found_by"), DEFECTS, ids=range(len(DEFECTS)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_defect_is_found(monkeypatch, name, defect, found_by):
    assert all(find_without_defect("turboquant", claim).holds for claim in found_by)
    monkeypatch.setattr(turboquant, name, defect)
    missed = [claim for claim in found_by if find("turboquant", claim).holds]
    assert not missed


def test_every_claim_finds_a_defect():
    assert {c.name for c in claims.algorithms()["turboquant"]} == {name for _, _, names in DEFECTS for name in names}
