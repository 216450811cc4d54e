"""Codebooks: the printed tables, the edges of a cell, what is refused, and defects that the claims find."""
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kvbench import claims
from kvbench.reference import codebook
from kvbench.reference.codebook import Codebook, distortion, normal, sphere
from test_claims import find, find_without_defect

bits = st.integers(1, 8)
dimensions = st.one_of(st.none(), st.integers(2, 300))


def made(bits, dimension):
    return normal(bits) if dimension is None else sphere(bits, dimension)


# --- Tables: every digit that the specification prints ---------------------------------------------------------------

CENTROIDS = {1: "0.797885", 2: "0.452780 1.510418", 3: "0.245094 0.756005 1.343909 2.151946",
             4: "0.128395 0.388048 0.656759 0.942340 1.256231 1.618046 2.069017 2.732590"}
BOUNDARIES = {1: "", 2: "0.981599", 3: "0.500550 1.049957 1.747927",
              4: "0.258222 0.522404 0.799550 1.099286 1.437139 1.843532 2.400803"}
OUTER = {5: ("0.065890 0.198052", "2.691120 3.260732", "20.617363"),
         6: ("0.033410 0.100278", "3.240437 3.744101", "42.506492"),
         7: ("0.016828 0.050491", "3.734937 4.189694", "86.516300"),
         8: ("0.008446 0.025339", "4.186595 4.603536", "174.758768")}
DISTORTIONS = "0.363380 0.117482 0.0345478 0.00950101 0.00250467 6.44240e-4 1.63478e-4 4.11851e-5".split()
RATIOS = "1.454 1.880 2.211 2.432 2.565 2.639 2.678 2.699".split()
# Normal codebook on a sphere, dimension -> 1 to 4 bits, and the outer centroids of spheres
FOREIGN = {64: "0.3584 0.1145 0.0334 0.00917", 128: "0.3609 0.1160 0.0340 0.00932"}
SPHERES = {(2, 2): ("0.4203 1.2078", "0.0418"), (2, 3): ("0.9881 1.3277", "0.0099"),
           (2, 4): ("1.2304 1.3772", "0.0024"), (4, 2): ("0.4389 1.3488", "0.0745"),
           (4, 3): ("1.1382 1.6357", "0.0193"), (8, 3): ("1.2337 1.8603", "0.0261"),
           (8, 4): ("1.7518 2.1633", "0.0069"), (16, 4): ("1.8971 2.4156", "0.0081"),
           (64, 4): ("2.0233 2.6464", "0.0091")}


def assert_prints(values, printed):
    """The numbers, rounded to as many decimals as printed, are the ones printed."""
    for value, text in zip(np.atleast_1d(values), printed.split(), strict=True):
        mantissa, _, exponent = text.partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert abs(value - float(text)) <= 0.5000001 * unit, (value, text)


@pytest.mark.parametrize("bits", CENTROIDS)
def test_normal_codebooks_are_the_printed_ones(bits):
    assert_prints(normal(bits).centroids, CENTROIDS[bits])
    assert_prints(normal(bits).boundaries, BOUNDARIES[bits])


@pytest.mark.parametrize("bits", OUTER)
def test_large_normal_codebooks_are_the_printed_ones(bits):
    inner, outer, total = OUTER[bits]
    book = normal(bits)
    assert_prints(book.centroids[:2], inner)
    assert_prints(book.centroids[-2:], outer)
    assert_prints(book.centroids.sum(), total)
    if bits == 5:
        assert_prints(book.boundaries[[0, 1, -2, -1]], "0.131971 0.264715 2.504429 2.975926")


@pytest.mark.parametrize("bits", codebook.BITS)
def test_distortions_are_the_printed_ones(bits):
    assert_prints(normal(bits).distortion, DISTORTIONS[bits - 1])
    assert_prints(normal(bits).distortion * 4**bits, RATIOS[bits - 1])


@pytest.mark.parametrize("dimension", FOREIGN)
def test_normal_codebooks_on_spheres_are_as_measured(dimension):
    for bits, measured in enumerate(FOREIGN[dimension].split(), start=1):
        assert distortion(normal(bits), dimension) == pytest.approx(float(measured), rel=5e-3)     # two or three digits


@pytest.mark.parametrize(("dimension", "bits"), SPHERES)
def test_sphere_codebooks_are_the_printed_ones(dimension, bits):
    outer, printed = SPHERES[dimension, bits]
    assert_prints(sphere(bits, dimension).centroids[-2:], outer)
    assert_prints(sphere(bits, dimension).distortion, printed)


def test_distortion_is_that_of_drawn_points():
    points = np.random.default_rng(1).standard_normal((4000, 5))
    z = (points / np.linalg.norm(points, axis=1, keepdims=True))[:, 0] * 5**0.5
    for book in (sphere(2, 5), normal(2)):
        errors = (z - book.reconstruct(*book.assign(z))) ** 2
        assert abs(errors.mean() - distortion(book, 5)) < 6 * errors.std() / 4000**0.5


# --- Cells -----------------------------------------------------------------------------------------------------------


@given(bits=bits, dimension=dimensions, seed=st.integers(0, 2**32))
def test_assign_is_a_count_of_boundaries(bits, dimension, seed):
    book = made(bits, dimension)
    z = np.random.default_rng(seed).standard_normal((3, 5)) * 2
    z.flat[:3] = 0.0, -0.0, np.random.default_rng(seed).choice([*book.boundaries, 1.0])
    signs, magnitudes = book.assign(z)
    assert signs.dtype == magnitudes.dtype == np.uint8
    results = signs, magnitudes, book.reconstruct(signs, magnitudes), book.distance(z)
    for value, sign, magnitude, level, distance in zip(z.flat, *(x.flat for x in results), strict=True):
        assert sign == (value < 0)
        assert magnitude == sum(abs(value) > t for t in book.boundaries)
        assert level == (-1 if value < 0 else 1) * book.centroids[magnitude]
        assert distance == min(abs(abs(value) - t) for t in (0.0, *book.boundaries))


def test_a_boundary_belongs_to_the_inner_cell():
    book = normal(3)
    for sign in (1, -1):
        signs, magnitudes = book.assign(sign * book.boundaries)
        assert list(magnitudes) == [0, 1, 2] and (signs == (sign < 0)).all()
        assert list(book.assign(sign * np.nextafter(book.boundaries, 9))[1]) == [1, 2, 3]
        assert not book.distance(sign * book.boundaries).any()


@given(bits=bits, dimension=st.one_of(dimensions, st.sampled_from((2000, 10**4, codebook.LARGEST_DIMENSION))))
def test_every_codebook_converges(bits, dimension):
    book = made(bits, dimension)
    edge = np.inf if dimension is None else dimension**0.5
    values = np.sort(np.concatenate([[0.0], book.centroids, book.boundaries, [edge]]))
    assert (np.diff(values) > 0).all() and len(book.centroids) == 2 ** (bits - 1) == len(book.boundaries) + 1
    if dimension is None:
        means = [stats.truncnorm(a, b).mean() for a, b in zip((0, *book.boundaries), (*book.boundaries, np.inf))][:8]
        np.testing.assert_allclose(book.centroids[:8], means, atol=1e-9)
    residual, _ = codebook._residual(book.centroids, codebook._law(dimension))
    assert np.abs(residual).max() < 1e-11
    assert book.distortion <= normal(bits).distortion


def test_codebooks_are_shared_and_read_only():
    assert normal(3) is normal(np.int64(3)) and sphere(3, 64) is sphere(3, 64)
    assert normal(3) == dataclasses.replace(normal(3)) and normal(3) != normal(4) and normal(3) != sphere(3, 64)
    for array in (normal(3).centroids, normal(3).boundaries):
        assert array.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(("call", "message"), [
    (lambda: normal(0), "codebook: bits: expected an integer from 1 to 8, got 0"),
    (lambda: normal(9), "bits: expected an integer from 1 to 8, got 9"),
    (lambda: normal(2.0), "bits: .* got 2.0"),
    (lambda: normal(True), "bits: .* got True"),
    (lambda: sphere(3, 1), "dimension: expected an integer from 2 to 65536, got 1"),
    (lambda: sphere(3, 2**16 + 1), "dimension: .* got 65537"),
    (lambda: sphere("3", 64), "bits: .* got '3'"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("a", [0.5, 1.0, 31.5, 63.5, 64.0, 500.0, 32767.5])
def test_gamma_ratio(a):
    """Gamma(a + 1) / Gamma(a) = a links it with itself, across the two ways it is computed in."""
    assert codebook.gamma_ratio(a) * codebook.gamma_ratio(a + 0.5) == pytest.approx(a, rel=1e-14)


# --- Defects that the claims find ------------------------------------------------------------------------------------

SOLVED, RECONSTRUCT = codebook._solved, Codebook.reconstruct


def lloyd_of_100_iterations(bits, dimension):
    law, n = codebook._law(dimension), 2 ** (bits - 1)
    centroids = (np.arange(n) + 0.5) / n * min(6.0, law.end)
    for _ in range(100):
        centroids = centroids - codebook._residual(centroids, law)[0]
    return Codebook(bits, dimension, centroids, codebook._midpoints(centroids))


def normal_everywhere(bits, dimension):
    return dataclasses.replace(SOLVED(bits, None), dimension=dimension)


def uniform(bits, dimension):
    centroids = (np.arange(2 ** (bits - 1)) + 0.5) * 2.0 ** (2 - bits)
    return Codebook(bits, dimension, centroids, codebook._midpoints(centroids))


def without_radius(bits, dimension):
    book = SOLVED(bits, dimension)
    factor = 1.0 if dimension is None else 0.99
    return Codebook(bits, dimension, book.centroids * factor, book.boundaries * factor)


def shifted_boundaries(bits, dimension):
    book = SOLVED(bits, dimension)
    return Codebook(bits, dimension, book.centroids, book.boundaries * 1.01)


DEFECTS = [
    ("_solved", lloyd_of_100_iterations, ["centroid condition", "distortion table", "upper bound"]),
    ("_solved", normal_everywhere, ["centroid condition", "one bit", "three dimensions", "shrinkage is energy",
                                    "least distortion"]),
    ("_solved", uniform, ["distortion table", "least distortion", "upper bound"]),
    ("_solved", without_radius, ["centroid condition", "one bit", "three dimensions", "least distortion"]),
    ("_solved", shifted_boundaries, ["centroid condition", "nearest centroid", "distortion table"]),
    ("distortion", lambda book, law=None: 0.99 * distortion(book, law), ["distortion table", "lower bound"]),
    ("distortion", lambda book, law=None: distortion(book), ["closed forms", "sphere below normal"]),
]


@pytest.mark.parametrize(("function", "defect", "found_by"), DEFECTS, ids=range(len(DEFECTS)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")      # empty cells are what some of the defects are
def test_defect_is_found(monkeypatch, function, defect, found_by):
    assert all(find_without_defect("codebook", name).holds for name in found_by)
    monkeypatch.setattr(codebook, function, defect)
    SOLVED.cache_clear()                                             # codebooks keep their distortion
    try:
        missed = [name for name in found_by if find("codebook", name).holds]
    finally:
        SOLVED.cache_clear()
    assert not missed


def test_every_claim_finds_a_defect():
    assert {c.name for c in claims.algorithms()["codebook"]} == {name for _, _, names in DEFECTS for name in names}
