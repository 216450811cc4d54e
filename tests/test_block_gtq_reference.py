"""The reference of Block-GTQ: the definition in plain loops, printed tables, special tokens, and defects found."""
import dataclasses
import functools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import claims
from kvbench.reference import block_gtq, planes, turboquant
from kvbench.reference.block_gtq import (PAIRINGS, Calibration, Plan, allocate, blocks, calibrate, decode,
                                         decode_attention, encode, logits, plan)
from kvbench.reference.codebook import sphere
from kvbench.reference.rotation import hadamard
from kvbench.reference.turboquant import SCALE_MODES
from test_claims import find, find_without_defect

SEEDS = st.integers(0, 2**32)
MODES = st.sampled_from(SCALE_MODES)
HEAD_DIMS = st.sampled_from((2, 6, 32, 64, 80))
DTYPES = st.sampled_from((np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


def generator(seed):
    return np.random.default_rng([seed, 9])


@st.composite
def plans(draw, head_dims=HEAD_DIMS):
    return block_gtq._scheme(generator(draw(SEEDS)), draw(head_dims), draw(st.integers(1, 3)))


# --- The definition --------------------------------------------------------------------------------------------------


def code_of(x, scheme, head, mode):
    """(signs, magnitudes, scalars, x_hat) of one vector in rate order, group by group."""
    rates = sorted(set(scheme.bits[head].tolist()), reverse=True)
    signs, magnitudes, scalars, restored = [], [], [], np.zeros(len(x))
    for rate in rates:
        members = [i for i, b in enumerate(scheme.bits[head]) if b == rate]
        places = [c for i in members for c in blocks(len(x), scheme.pairing, scheme.rotary_dim)[i]]
        size, matrix = len(places), scheme.rotation_of(len(places)).dense()
        codebook = turboquant.codebook_for(rate, size)
        y = [math.fsum(matrix[j, i] * x[c] for i, c in enumerate(places)) for j in range(size)]
        n = math.sqrt(math.fsum(value**2 for value in y))
        z = [math.sqrt(size) * value / n for value in y]
        m = [sum(abs(value) > t for t in codebook.boundaries) for value in z]
        c = [math.copysign(codebook.centroids[k], value) for k, value in zip(m, z)]
        w, e = (math.fsum(a * b for a, b in zip(pair, c)) / size for pair in (z, c))
        s = n / math.sqrt(size) * {"plain": 1, "nc": e**-0.5, "mse": w / e, "unbiased": 1 / w}[mode]
        signs += [int(value < 0) for value in z]
        magnitudes += m
        scalars.append(s)
        restored[places] = s * np.array(c) @ matrix
    return signs, magnitudes, scalars, restored


@given(scheme=plans(), mode=MODES, seed=SEEDS, dtype=DTYPES, centred=st.booleans())
def test_encode_and_decode_follow_the_definition(scheme, mode, seed, dtype, centred):
    rng = generator(seed)
    x = rng.standard_normal((1, scheme.kv_heads, 2, scheme.head_dim)).astype(dtype)
    mean = rng.standard_normal((scheme.kv_heads, scheme.head_dim)) if centred else None
    encoded = encode(x, scheme, scale_mode=mode, mean=mean)
    signs, magnitudes = block_gtq.unpack(encoded.sign, encoded.magnitude, scheme)
    decoded, stored = decode(encoded, scheme), block_gtq.scale_of(encoded.scale, scheme)
    step = 2.0 ** (1 / 32) - 1 + 1e-9 if scheme.exponents is not None else 2.0**-11 * (1 + 1e-9)
    for h in range(scheme.kv_heads):
        for t in range(2):
            vector = x[0, h, t].astype(np.float64) - (mean[h] if centred else 0)
            expected = code_of(vector, scheme, h, mode)
            assert signs[0, h, t].tolist() == expected[0] and magnitudes[0, h, t].tolist() == expected[1]
            s = stored[0, h, t, : len(expected[2])]
            within = (s > 0) & (s < 2.0 ** (7.8 + (0 if scheme.exponents is None else scheme.exponents[h])))
            assert (np.abs(s / expected[2] - 1) <= step)[within].all()
            assert (stored[0, h, t, len(expected[2]) :] == 0).all()
            if mode == "nc":
                assert np.linalg.norm(decoded[0, h, t]) <= np.linalg.norm(vector) * (1 + step)
            if within.all():
                assert np.linalg.norm(decoded[0, h, t] - expected[3]) <= step * np.linalg.norm(expected[3]) + 1e-9


@given(seed=SEEDS, pairing=st.sampled_from(PAIRINGS), dtype=DTYPES, rotary=st.sampled_from((0, 4, 8)),
       centred=st.booleans())
def test_calibration_follows_the_definition(seed, pairing, dtype, rotary, centred):
    """Squares of every query head, averaged over heads and tokens; sums over the two coordinates of a block."""
    rng = generator(seed)
    keys, query = (rng.standard_normal((2, heads, 3, 8)).astype(dtype) for heads in (2, 6))
    found = calibrate(keys, query, pairing=pairing, rotary_dim=rotary, centred=centred)
    partner = {**{i: i + rotary // 2 for i in range(rotary // 2)}, **{i: i + 1 for i in range(rotary, 8, 2)}}
    if pairing == "interleaved":
        partner = {i: i + 1 for i in range(0, 8, 2)}
    for h in range(2):
        mean = keys[:, h].astype(float).mean(axis=(0, 1)) if centred else np.zeros(8)
        if centred:
            np.testing.assert_allclose(found.mean[h], mean, rtol=1e-6, atol=1e-7)
        for i, (low, high) in enumerate(sorted(partner.items())):
            for energy, vectors in ((found.key_energy, keys[:, h].astype(float) - mean),
                                    (found.query_energy, query[:, 3 * h : 3 * h + 3].astype(float))):
                expected = np.mean(vectors[..., low] ** 2 + vectors[..., high] ** 2)
                assert energy[h, i] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert (block_gtq.score(found) == found.query_energy * found.key_energy).all()
    assert (block_gtq.score(found, "mean") == (found.query_energy + found.key_energy) / 2).all()


def test_without_queries_keys_alone_decide():
    keys = generator(0).standard_normal((1, 2, 5, 8))
    found = calibrate(keys, pairing="half")
    assert (found.query_energy == 1).all() and (block_gtq.score(found) == found.key_energy).all()


def test_vectors_that_are_not_finite_do_not_count():
    keys, query = generator(0).standard_normal((2, 1, 2, 5, 8))
    expected = calibrate(np.delete(keys, 3, axis=2), np.delete(query, 1, axis=2), pairing="half", centred=True)
    keys[0, 0, 3, 1], keys[0, 1, 3] = np.nan, np.inf
    query[0, :, 1, 0] = -np.inf
    found = calibrate(keys, query, pairing="half", centred=True)
    for name, array in expected.arrays().items():
        np.testing.assert_allclose(found.arrays()[name], array, rtol=1e-12)
    nothing = calibrate(np.full((1, 2, 3, 8), np.nan), pairing="half", centred=True)
    assert not nothing.key_energy.any() and not nothing.mean.any()


def test_a_calibration_is_saved_as_arrays():
    rng = generator(1)
    for centred in (False, True):
        found = calibrate(rng.standard_normal((1, 2, 5, 8)), pairing="interleaved", rotary_dim=4, centred=centred)
        again = Calibration.of(found.arrays(), found.pairing, found.rotary_dim)
        assert again.arrays().keys() == found.arrays().keys()
        assert all((again.arrays()[name] == array).all() for name, array in found.arrays().items())
    for name, damage in (("key_energy", lambda x: -x), ("query_energy", lambda x: x * np.nan),
                         ("key_energy", lambda x: x[:1]), ("mean", lambda x: x[:, :3]), ("mean", lambda x: x / 0)):
        with np.errstate(all="ignore"), pytest.raises(ValueError, match="block_gtq: calibration: "):
            Calibration.of({**found.arrays(), name: damage(found.arrays()[name])}, "half", 8)


# --- Allocation ------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, count=st.integers(1, 40), least=st.integers(1, 8), more=st.integers(0, 7), share=st.floats(0, 1),
       size=st.sampled_from((1, 2, 4)))
def test_the_budget_is_spent_and_the_limits_are_kept(seed, count, least, more, share, size):
    count, most = size * count, min(least + more, 8)
    average_bits = least + share * (most - least)
    scores = block_gtq._scores(generator(seed), count)
    bits = allocate(scores, average_bits, least=least, most=most, tile=2 * size)
    assert bits.dtype == np.uint8 and least <= bits.min() and bits.max() <= most
    spent = int(bits.sum())
    assert spent % size == 0 and spent <= count * average_bits + 1e-6 and spent > count * average_bits - size - 1
    falling = np.argsort(-scores, kind="stable")
    tiles = bits[falling].reshape(-1, size)
    assert (tiles == tiles[:, :1]).all() and (np.diff(tiles[:, 0].astype(int)) <= 0).all()


def test_ties_and_zeros():
    assert allocate([1.0, 1, 1, 1], 1.5).tolist() == [2, 2, 1, 1]
    assert allocate([0.0, 0, 0], 2).tolist() == [2, 2, 2]                      # in turn
    assert allocate([0.0, 0, 0], 5 / 3).tolist() == [2, 2, 1]
    assert allocate([4.0, 1.0], 2.5).tolist() == [3, 2]
    assert allocate([0.0, 1e-300, 1e300], 4.0, most=8).tolist() == [1, 3, 8]   # zero stays while others can rise
    assert allocate([1e-320, 1e300], 1.5).tolist() == [1, 2]


def test_large_scores_do_not_overflow():
    with np.errstate(all="raise"):
        assert allocate(np.array([1e308, 1e-308, 5e-324]), 8 / 3, most=6).tolist() == [6, 1, 1]


@pytest.mark.parametrize("call", [
    lambda: allocate([1.0, -1.0], 2), lambda: allocate([1.0, np.nan], 2), lambda: allocate([1.0, 1.0], 0.5),
    lambda: allocate([1.0, 1.0], 2, least=3), lambda: allocate([1.0, 1.0], 5, most=4),
    lambda: allocate([1.0, 1.0], np.nan), lambda: allocate([1.0, 1.0], 2, least=0), lambda: allocate([1.0], 2, most=9),
    lambda: allocate([1.0] * 3, 2, tile=4), lambda: allocate([1.0] * 4, 2, tile=3), lambda: blocks(7, "half"),
    lambda: blocks(8, "halves"), lambda: blocks(8, "half", 10), lambda: blocks(8, "half", 3),
    lambda: block_gtq.score(calibrate(np.ones((1, 1, 1, 4)), pairing="half"), "sum"),
    lambda: calibrate(np.ones((1, 1, 4)), pairing="half"),
    lambda: calibrate(np.ones((1, 2, 1, 4)), np.ones((1, 3, 1, 4)), pairing="half"),
    lambda: Plan(np.array([[9, 1]]), "half", 4), lambda: Plan(np.array([[0, 1]]), "half", 4),
    lambda: Plan(np.array([1, 1]), "half", 4), lambda: Plan(np.array([[1.0]]), "half", 2),
    lambda: Plan(np.array([[1]]), "half", 2, rotation="fourier"),
    lambda: Plan(np.array([[1]]), "half", 2, exponents=np.zeros(3, np.int16)),
    lambda: plan(calibrate(np.ones((1, 1, 1, 4)), pairing="half"), 2, scale_bits=4),
    lambda: encode(np.ones((1, 2, 1, 4)), Plan(np.array([[1, 1]]), "half", 4)),
    lambda: encode(np.full((1, 1, 1, 4), np.nan), Plan(np.array([[1, 1]]), "half", 4), check_finite=True),
    lambda: logits(np.ones((1, 1, 6)), encode(np.ones((1, 1, 1, 4)), Plan(np.array([[1, 1]]), "half", 4)),
                   Plan(np.array([[1, 1]]), "half", 4)),
])
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="block_gtq|turboquant"):
        call()


# --- Printed tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "rates", "words", "scalars", "bits"), [
    (128, {5: 2, 4: 9, 3: 40, 2: 13}, 14, 4, 4.0),                # 2 w, blocks of each rate
    (128, {5: 8, 4: 8, 3: 24, 2: 24}, 12, 4, 3.5),                # tiles of 16
    (128, {4: 16, 3: 32, 2: 16}, 12, 3, 3.375),                   # tiles of 32
    (64, {4: 8, 3: 16, 2: 8}, 6, 3, 3.75),
])
def test_rows_are_as_long_as_printed(head_dim, rates, words, scalars, bits):
    heads = np.array([[rate for rate, count in rates.items() for _ in range(count)]])
    scheme = Plan(heads, "half", head_dim)
    assert (head_dim // 32 + scheme.magnitude_words, scheme.scalars) == (words, scalars)
    assert scheme.bits_per_element == bits
    encoded = encode(np.ones((1, 1, 2, head_dim)), scheme)
    assert encoded.nbytes == 2 * (4 * words + 2 * scalars)


# Group, bits: the codebook of the sphere in the modes nc and plain, of unit vectors (measured, with their last digit).
DISTORTIONS = {(2, 2): (0.0271, 0.0418), (2, 3): (0.0080, 0.0099), (2, 4): (0.0015, 0.0024), (4, 2): (0.0571, 0.0745),
               (4, 3): (0.0139, 0.0193), (8, 3): (0.0212, 0.0261), (8, 4): (0.00545, 0.0069), (16, 4): (0.0071, 0.0081)}


@pytest.mark.parametrize(("size", "bits"), DISTORTIONS)
def test_distortion_of_small_groups_is_as_printed(size, bits):
    x = generator(size).standard_normal((20000, size))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    for mode, printed in zip(("nc", "plain"), DISTORTIONS[size, bits]):
        signs, magnitudes, s = turboquant.quantise(x, sphere(bits, size), mode)
        error = ((x - s[:, None] * sphere(bits, size).reconstruct(signs, magnitudes)) ** 2).sum(axis=-1)
        # 6 standard errors, here and of a table made from at least a quarter of as many vectors, and its last digit.
        assert abs(error.mean() - printed) <= 18 * error.std() / 20000**0.5 + 1e-4


# --- Special tokens --------------------------------------------------------------------------------------------------


@given(scheme=plans(), mode=MODES, seed=SEEDS)
def test_zeros_and_not_a_number(scheme, mode, seed):
    """A group of zeros is exactly zero; a vector with NaN or Inf touches no other."""
    rng = generator(seed)
    x = rng.standard_normal((1, scheme.kv_heads, 4, scheme.head_dim))
    clean = encode(x, scheme, scale_mode=mode)
    x[:, :, 1] = 0
    group = scheme.groups[0][0]
    x[0, 0, 3, scheme.order[0, : group.size]] = 0
    x[:, :, 2, 0] = rng.choice([np.nan, np.inf, -np.inf])
    encoded = encode(x, scheme, scale_mode=mode)
    signs, magnitudes = block_gtq.unpack(encoded.sign, encoded.magnitude, scheme)
    stored, decoded = block_gtq.scale_of(encoded.scale, scheme), decode(encoded, scheme)
    assert not signs[:, :, 1:3].any() and not magnitudes[:, :, 1:3].any()
    assert not stored[:, :, 1].any() and not decoded[:, :, 1].any()
    assert np.isnan(stored[:, :, 2]).all() and np.isnan(decoded[:, :, 2]).all()
    assert stored[0, 0, 3, 0] == 0 and not decoded[0, 0, 3, scheme.order[0, : group.size]].any()
    for name in ("sign", "magnitude", "scale"):
        assert (getattr(encoded, name)[:, :, 0] == getattr(clean, name)[:, :, 0]).all()
    distance = block_gtq.boundary_distance(x, scheme)
    assert np.isinf(distance[:, :, 1:3]).all() and np.isfinite(distance[:, :, 0]).all()


def test_attention_over_nothing():
    scheme = block_gtq._scheme(generator(3), 64, 2)
    rotation, x = hadamard(64, 1), np.ones((2, 2, 3, 64))
    output, lse = decode_attention(np.ones((2, 4, 64)), encode(x, scheme), turboquant.encode(x, rotation, 3), scheme,
                                   rotation, lengths=[0, 3])
    assert not output[0].any() and (lse[0] == -np.inf).all() and np.isfinite(lse[1]).all()
    only = decode_attention(np.ones((2, 4, 64)), encode(x, scheme), turboquant.encode(x, rotation, 3), scheme,
                            rotation, lengths=[0, 3], return_lse=False)
    assert (only == output).all()


def test_sign_plane_is_a_rabitq_code_of_each_group():
    """sum_g r_g <sign y_g, q'_g> with r_g = n_g^2 / |y_g|_1 is unbiased over rotations; one r for the head is not."""
    rng = generator(5)
    x, query = rng.standard_normal((1, 1, 1, 32)), rng.standard_normal((1, 1, 32))
    x[..., blocks(32, "half")[:4]] *= 8
    bits = np.array([[4] * 4 + [2] * 12])
    estimates = []
    for seed in range(3000):
        scheme = Plan(bits, "half", 32, seed)
        rows = block_gtq.folded_query(query, scheme, 1.0)[0, 0, 0]
        negative = planes.unpack_bits(encode(x, scheme).sign, 32)[0, 0, 0]
        total = 0.0
        for group, y in zip(scheme.groups[0], block_gtq._rotated(x[0, 0, 0], scheme, 0)):
            places = slice(group.start, group.start + group.size)
            total += (y @ y) / np.abs(y).sum() * ((1.0 - 2 * negative[places]) @ rows[places])
        estimates.append(total)
    exact, error = float(x[0, 0, 0] @ query[0, 0]), np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - exact) <= 6 * error


# --- Defects that the claims find ------------------------------------------------------------------------------------

ALLOCATE, ENCODE, DECODE, CALIBRATE, PACK, LOGITS = (block_gtq.allocate, block_gtq.encode, block_gtq.decode,
                                                     block_gtq.calibrate, block_gtq.pack, block_gtq.logits)
ENERGIES, STORED, SCORE, ATTEND, BLOCKS = (block_gtq._energies, block_gtq.stored_scale, block_gtq.score,
                                           block_gtq.decode_attention, block_gtq.blocks)


def one_bit_elsewhere(scores, average_bits, *, least=1, most=8, tile=2):
    """The last bit goes from the block that needs it most to the one that needs it least."""
    bits = ALLOCATE(scores, average_bits, least=least, most=most, tile=tile)
    if bits.ndim == 1 and tile == 2 and bits.max() > least and bits.min() < most:
        bits[np.argmax(bits)] -= 1
        bits[np.argmin(np.where(bits < most, scores, np.inf))] += 1
    return bits


def of_squares(scores, average_bits, *, least=1, most=8, tile=2):
    """The best bits where every bit halves an error in place of its square: too many for the largest."""
    return ALLOCATE(np.clip(scores, 0, 1e150) ** 2, average_bits, least=least, most=most, tile=tile)


def to_the_smallest(scores, average_bits, *, least=1, most=8, tile=2):
    return ALLOCATE(1 / np.clip(scores, 1e-6, None), average_bits, least=least, most=most, tile=tile)


def by_size(scores, average_bits, *, least=1, most=8, tile=2):
    """Scores above 1 count double: not the same for scaled scores."""
    scores = np.clip(scores, 0, 1e150)
    return ALLOCATE(np.where(scores > 1, scores**2, scores), average_bits, least=least, most=most, tile=tile)


def tiles_by_index(scores, average_bits, *, least=1, most=8, tile=2):
    step, scores = tile // 2, np.asarray(scores, float)
    if step == 1:
        return ALLOCATE(scores, average_bits, least=least, most=most)
    return np.repeat(ALLOCATE(scores.reshape(*scores.shape[:-1], -1, step).sum(axis=-1), average_bits, least=least,
                              most=most), step, axis=-1)


def energies_of_means(heads, pairs):
    return ENERGIES(heads.mean(axis=1, keepdims=True), pairs)


def energies_of_coordinates(heads, pairs):
    return ENERGIES(heads, np.stack([pairs[:, 0], pairs[:, 0]], axis=1))


def mean_for_product(calibration, kind="product"):
    return SCORE(calibration, "mean")


def product_for_mean(calibration, kind="product"):
    return SCORE(calibration, "product")


def blocks_always_half(head_dim, pairing, rotary_dim=None):
    return BLOCKS(head_dim, "half", rotary_dim)


def quantised(factor):
    original = turboquant.quantise

    def quantise(y, codebook, scale_mode="nc"):
        signs, magnitudes, s = original(y, codebook, scale_mode)
        return signs, magnitudes, factor * s
    return quantise


def one_hadamard_round(size, seed):
    return hadamard(size, seed, 1)


def decode_one_scalar(encoded, scheme):
    """The scalar of the first group for all groups."""
    encoded = dataclasses.replace(encoded, scale=encoded.scale[..., :1].repeat(encoded.scale.shape[-1], -1))
    return DECODE(encoded, scheme)


def logits_of_one_scalar(query, encoded, scheme, *, scale=None):
    encoded = dataclasses.replace(encoded, scale=encoded.scale[..., :1].repeat(encoded.scale.shape[-1], -1))
    return LOGITS(query, encoded, scheme, scale=scale)


def attend_without_the_mean(*arguments, key_mean=None, **options):
    return ATTEND(*arguments, **options)


def pack_without_tops(signs, magnitudes, scheme):
    return PACK(signs, magnitudes & 3, scheme)


def encode_with_one_norm(x, scheme, **options):
    """Scalars depend on the tokens encoded with them, and so do the codes of the first."""
    encoded = ENCODE(x, scheme, **options)
    return dataclasses.replace(encoded, sign=encoded.sign ^ np.uint32(x.shape[2] > 1))


def encode_permuted(x, scheme, **options):
    return ENCODE(np.roll(x, 1, axis=-1), scheme, **options)


def encode_in_wide_rows(x, scheme, **options):
    encoded = ENCODE(x, scheme, **options)
    padding = np.zeros((*encoded.magnitude.shape[:3], 8), np.uint32)
    return dataclasses.replace(encoded, magnitude=np.concatenate([encoded.magnitude, padding], axis=-1))


def coarse_scalars(s, finite, scheme):
    return STORED(s, finite, scheme) & ~np.uint8(1)


def predicted_by_block(calibration, scheme):
    """Every block for itself: the sum that misses what a rotation spreads."""
    rates = np.array([sphere(int(b), 8).distortion for b in scheme.bits[0]])
    return ((calibration.query_energy * calibration.key_energy)[0] * rates).sum(keepdims=True) / 2


def encode_off_centre(x, scheme, mean=None, **options):
    return ENCODE(x, scheme, mean=None if mean is None else 2 * mean, **options)


DEFECTS = [
    ("allocate", one_bit_elsewhere, ["greedy is optimal", "certificate"]),
    ("allocate", of_squares, ["continuous optimum", "greedy is optimal"]),
    ("allocate", to_the_smallest, ["never worse than uniform", "certificate"]),
    ("allocate", by_size, ["equivariance"]),
    ("allocate", tiles_by_index, ["tiles are optimal"]),
    ("_energies", energies_of_means, ["RoPE invariance"]),
    ("_energies", energies_of_coordinates, ["RoPE invariance"]),
    ("score", mean_for_product, ["gauge invariance"]),
    ("score", product_for_mean, ["gauge invariance"]),
    ("blocks", blocks_always_half, ["pairings"]),
    ("turboquant.quantise", quantised(1.15), ["group distortion", "unbiased"]),
    ("haar", one_hadamard_round, ["distortion of a pair", "unbiased"]),
    ("predicted_error", predicted_by_block, ["predictor"]),
    ("decode", decode_one_scalar, ["fold", "attention on codes"]),
    ("logits", logits_of_one_scalar, ["fold", "attention on codes"]),
    ("decode_attention", attend_without_the_mean, ["attention on codes"]),
    ("pack", pack_without_tops, ["round trip"]),
    ("encode", encode_with_one_norm, ["append", "one group is TurboQuant"]),
    ("encode", encode_permuted, ["one group is TurboQuant", "pairings"]),
    ("encode", encode_in_wide_rows, ["bytes"]),
    ("encode", encode_off_centre, ["centring"]),
    ("stored_scale", coarse_scalars, ["scalars in a byte"]),
]


@pytest.mark.parametrize(("name", "defect", "found_by"), DEFECTS, ids=range(len(DEFECTS)))
def test_defect_is_found(monkeypatch, name, defect, found_by):
    assert all(find_without_defect("block_gtq", claim).holds for claim in found_by)
    *modules, name = name.split(".")
    monkeypatch.setattr(functools.reduce(getattr, modules, block_gtq), name, defect)
    missed = [claim for claim in found_by if find("block_gtq", claim).holds]
    assert not missed


def test_every_claim_finds_a_defect():
    assert {c.name for c in claims.algorithms()["block_gtq"]} == {name for _, _, names in DEFECTS for name in names}
