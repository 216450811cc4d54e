"""Codebooks: the best scalar quantiser of one rotated coordinate, for 1 to 8 bits.

A unit vector, rotated at random and multiplied by sqrt(D), D its dimension, has coordinates z of variance 1.  One of
them follows the law of the sphere,

    f(z) = K / sqrt(D) (1 - z^2 / D)^((D-3)/2),    |z| <= sqrt(D),    K = Gamma(D/2) / (sqrt(pi) Gamma((D-1)/2)),

which tends to the normal law as D grows (TurboQuant, arXiv 2504.19874, Lemma 1).  A codebook of b bits is symmetric: a
sign and one of n = 2^(b-1) magnitudes, with centroids 0 < c_0 < c_1 < ... and boundaries t_i between them; t_0 = 0,
and t_n is the end of the law.  It has the least distortion E (z - c(z))^2 when both conditions of Lloyd and Max hold:

    c_i = m_i = E[z | t_i < z < t_(i+1)],        t_i = (c_(i-1) + c_i) / 2

(Max, IRE Transactions on Information Theory 6, 1960).  Newton's method on F_i = c_i - m_i reaches the rounding floor
in a few steps.  Plain Lloyd iterations, c <- m(c), need 10^5 of them at 8 bits; stopped after 100, they leave 4 times
the least distortion there.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from .claim import Claim, bound, identity, weakest

BITS = range(1, 9)
LARGEST_DIMENSION = 2**16              # beyond, the beta function loses digits; D(b) is 1e-4 from its limit there
PANTER_DITE = np.sqrt(3) * np.pi / 2   # 4^b times the distortion of the normal law tends to it from below


@dataclass(frozen=True)
class Codebook:
    """A symmetric quantiser of a variable of variance 1: its sign, and the index of a magnitude.

    bits         1 to 8
    dimension    of the sphere to whose law it belongs; None for the normal law
    centroids    [2^(bits-1)] float64, positive, ascending, read-only
    boundaries   [2^(bits-1) - 1] float64, t_1, t_2, ... between the magnitudes, read-only
    distortion   E (z - c(z))^2 under its own law: the squared error of a quantised vector over its squared norm
    """

    bits: int
    dimension: int | None
    centroids: np.ndarray = field(compare=False, repr=False)
    boundaries: np.ndarray = field(compare=False, repr=False)

    @functools.cached_property
    def distortion(self) -> float:
        return distortion(self, self.dimension)

    def assign(self, z) -> tuple[np.ndarray, np.ndarray]:
        """(signs, magnitudes) uint8, of the shape of z: 1 where z < 0, and the number of boundaries t_i < |z|.

        So |z| = t_i belongs to the inner cell, and both zeros to the positive sign.
        """
        z = np.asarray(z, dtype=np.float64)
        return (z < 0).astype(np.uint8), np.searchsorted(self.boundaries, np.abs(z)).astype(np.uint8)

    def reconstruct(self, signs, magnitudes) -> np.ndarray:
        """c(z) float64 of the codes that `assign` gives."""
        return np.where(np.asarray(signs) != 0, -1.0, 1.0) * self.centroids[magnitudes]

    def distance(self, z) -> np.ndarray:
        """min_i | |z| - t_i | over all decisions, t_0 = 0, where the sign changes, among them; float64, shape of z."""
        edges = np.concatenate([[-np.inf, 0.0], self.boundaries, [np.inf]])
        z = np.abs(np.asarray(z, dtype=np.float64))
        above = np.maximum(np.searchsorted(edges, z), 1)
        return np.minimum(z - edges[above - 1], edges[above] - z)


def normal(bits: int) -> Codebook:
    """The codebook of the normal law N(0, 1), for coordinates of many dimensions (64 and more)."""
    return _solved(_integer("bits", bits, 1, BITS[-1]), None)


def sphere(bits: int, dimension: int) -> Codebook:
    """The codebook of a coordinate of a uniform point on the unit sphere, times sqrt(dimension) (2 to 65536)."""
    return _solved(_integer("bits", bits, 1, BITS[-1]), _integer("dimension", dimension, 2, LARGEST_DIMENSION))


def moments(codebook: Codebook, dimension: int | None = None) -> tuple[float, float]:
    """(E z c(z), E c(z)^2) under the law of `dimension` (None: normal), which need not be the codebook's own.

    The first is the factor by which the code shrinks inner products, the second the energy of the code.
    """
    law = _law(dimension)
    edges = _edges(codebook.boundaries, law)
    return (float(2 * (codebook.centroids * _partial_means(law, edges)).sum()),
            float(2 * (codebook.centroids**2 * _masses(law, edges)).sum()))


def distortion(codebook: Codebook, dimension: int | None = None) -> float:
    """E (z - c(z))^2 = 1 - 2 E z c(z) + E c(z)^2 under the law of `dimension` (None: normal)."""
    inner, energy = moments(codebook, dimension)
    return 1 - 2 * inner + energy


def average(function: Callable, codebook: Codebook, dimension: int | None = None) -> float:
    """E function(z, c(z)), even in z, under the law of `dimension` (None: normal), by quadrature in every cell."""
    return float(2 * _integrals(function, codebook, dimension).sum())


def gamma_ratio(a: float) -> float:
    """Gamma(a + 1/2) / Gamma(a), by its asymptotic series where the functions overflow and their logarithms cancel."""
    if a < 64:
        return float(special.gamma(a + 0.5) / special.gamma(a))
    return float(np.sqrt(a) * np.exp(-1 / (8 * a) + 1 / (192 * a**3) - 1 / (640 * a**5)))


# --- The two laws, on the positive half line -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Law:
    """A symmetric law of variance 1 by closed forms.

    end        its largest value
    density    f(t)
    tail       P(z > t)
    peak       int_0^end s f(s) ds
    decay      log of int_t^end s f(s) ds / peak
    start      quantile function of the law proportional to f^(1/3), by which many centroids are spread (companding)
    """

    end: float
    density: Callable
    tail: Callable
    peak: float
    decay: Callable
    start: Callable


def _law(dimension: int | None) -> _Law:
    if dimension is None:
        peak = 1 / np.sqrt(2 * np.pi)
        return _Law(np.inf, lambda t: peak * np.exp(-(t**2) / 2), lambda t: special.ndtr(-t), peak,
                    lambda t: -(t**2) / 2, lambda q: np.sqrt(3) * special.ndtri(q))
    half, radius = (dimension - 1) / 2, np.sqrt(dimension)
    density = gamma_ratio(half) / np.sqrt(np.pi * dimension)              # K / sqrt(D), the density at 0
    companded = (dimension - 3) / 6 + 1                                   # (1 - t^2)^((D-3)/6) is of the same family
    return _Law(radius, lambda t: density * np.exp((half - 1) * np.log1p(-((t / radius) ** 2))),
                lambda t: special.betainc(half, half, (1 - t / radius) / 2), density * dimension / (dimension - 1),
                lambda t: half * np.log1p(-((t / radius) ** 2)),
                lambda q: radius * (1 - 2 * special.betaincinv(companded, companded, 1 - q)))


def _edges(boundaries, law):
    return np.concatenate([[0.0], np.minimum(boundaries, law.end), [law.end]])


def _masses(law, edges):
    """P(t_i < z < t_(i+1)) as differences of tails, which are accurate far from 0 where 1 - tail is not."""
    return -np.diff(law.tail(edges))


def _partial_means(law, edges):
    """int over (t_i, t_(i+1)) of s f(s) ds, as a product: a difference of nearly equal exponentials would cancel."""
    with np.errstate(divide="ignore", invalid="ignore"):                  # -inf at the end; empty cells beyond it
        decay = law.decay(edges)
        return np.where(edges[:-1] < law.end, -law.peak * np.exp(decay[:-1]) * np.expm1(np.diff(decay)), 0.0)


@functools.cache
def _nodes():
    return np.polynomial.legendre.leggauss(128)


def _integrals(function, codebook, dimension):
    """int of function(z, c_i) f(z) dz over every cell, [2^(bits-1)], by 128 Gauss-Legendre nodes and no closed form.

    z = sqrt(D) sin(a) turns the law of the sphere into K cos(a)^(D-2) da, which is smooth in every dimension.
    """
    if dimension is None:
        angles, end = codebook.boundaries, np.inf
    else:
        angles, end = np.arcsin(np.minimum(codebook.boundaries / np.sqrt(dimension), 1)), np.pi / 2
    last = angles[-1] if len(angles) else 0.0
    edges = np.concatenate([[0.0], angles, [min(end, last + 10 / np.sqrt(dimension or 1))]])   # e^-50 is beyond
    node, weight = _nodes()
    half = np.diff(edges)[:, None] / 2
    at = edges[:-1, None] + half * (1 + node)                                        # [cells, nodes]
    if dimension is None:
        z, density = at, np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
    else:
        z, density = np.sqrt(dimension) * np.sin(at), np.cos(at) ** (dimension - 2)
        density *= gamma_ratio((dimension - 1) / 2) / np.sqrt(np.pi)
    return (half * weight * density * function(z, codebook.centroids[:, None])).sum(axis=1)


# --- Newton's method -------------------------------------------------------------------------------------------------


@functools.cache
def _solved(bits, dimension):
    law, n = _law(dimension), 2 ** (bits - 1)
    centroids = law.start((n + np.arange(n) + 0.5) / 2**bits)
    residual, slope = _residual(centroids, law)
    for _ in range(50):
        following = centroids - np.linalg.solve(slope, residual)
        following_residual, slope = _residual(following, law)
        if not np.abs(following_residual).max() < np.abs(residual).max():     # the rounding floor, or NaN
            break
        centroids, residual = following, following_residual
    if not np.abs(residual).max() < 1e-10:
        raise ArithmeticError(f"codebook: bits {bits}, dimension {dimension}: Newton's method ended with a residual of "
                              f"{np.abs(residual).max():.1e}")
    return Codebook(bits, dimension, _frozen(centroids), _frozen(_midpoints(centroids)))


def _residual(centroids, law):
    """F_i = c_i - m_i and its derivatives.  m_i moves by f(t) |m_i - t| / p_i with an end t of its cell, t by c / 2."""
    edges = _edges(_midpoints(centroids), law)
    masses, inner = _masses(law, edges), edges[1:-1]
    means = _partial_means(law, edges) / masses
    low = np.append(0.0, law.density(inner) * (means[1:] - inner) / masses[1:])
    high = np.append(law.density(inner) * (inner - means[:-1]) / masses[:-1], 0.0)
    slope = np.diag(1 - (low + high) / 2) - np.diag(low[1:] / 2, -1) - np.diag(high[:-1] / 2, 1)
    return centroids - means, slope


def _midpoints(centroids):
    return (centroids[:-1] + centroids[1:]) / 2


def _frozen(array):
    array.setflags(write=False)     # every encoder shares the arrays
    return array


def _integer(name, value, low, high):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"codebook: {name}: expected an integer from {low} to {high}, got {value!r}")
    return int(value)


# --- Claims ----------------------------------------------------------------------------------------------------------

_DIMENSIONS = (2, 3, 4, 5, 8, 16, 31, 32, 62, 64, 96, 128, 256, 1000)

# A tail is off by some 2^-53, and cells of 8 bits have masses near 1e-4: the mean of such a cell is off by 1e-12.
# Sums over cells weigh by the mass, and are off by the rounding of 128 terms of at most 1.
_MEAN_ROUNDING = 1e-11
_SUM_ROUNDING = 1e-13

# D(b) of the normal law, b = 1 to 8, computed with 40 digits from centroids that are right to 12.
_DISTORTIONS = (0.36338022763241866, 0.11748184782932929, 0.03454776078850373, 0.0095010080081918861,
                0.0025046683556747991, 0.00064423966531726228, 0.00016347822998023679, 4.1185082867117486e-5)


def _all(dimensions=(None, *_DIMENSIONS)):
    """(name, codebook) of every number of bits and every given dimension."""
    for dimension in dimensions:
        for bits in BITS:
            law = "normal" if dimension is None else f"dimension {dimension}"
            yield f"{law}, {bits} bits", normal(bits) if dimension is None else sphere(bits, dimension)


def _centroid_condition(rng, samples):
    cases = {}
    for name, book in _all():
        mass = _integrals(lambda z, c: np.ones_like(z), book, book.dimension)
        moment = _integrals(lambda z, c: z - c, book, book.dimension)
        cases[name] = identity(moment / mass, _MEAN_ROUNDING)
    return weakest(cases)


def _nearest_centroid(rng, samples):
    cases = {}
    for name, book in _all((None, 2, 64)):
        z = np.concatenate([rng.standard_normal(samples) * 2, book.boundaries, -book.boundaries, [0.0, -0.0, 1e300]])
        levels = np.concatenate([-book.centroids, book.centroids])
        chosen = book.reconstruct(*book.assign(z))
        cases[name] = identity(np.abs(z - chosen) - np.abs(z[:, None] - levels).min(axis=1), 4 * np.spacing(np.abs(z)))
    return weakest(cases)


def _least_distortion(rng, samples):
    books = [book for _, book in _all((None, 2, 3, 8, 64))]
    least, other = [], []
    for _ in range(samples):
        book = books[rng.integers(len(books))]
        centroids = book.centroids.copy()
        moved = slice(None) if rng.random() < 0.5 else rng.integers(len(centroids))
        centroids[moved] *= 1 + rng.choice([-1, 1]) * 10.0 ** rng.uniform(-3, -1)
        centroids.sort()
        least.append(book.distortion)
        other.append(distortion(Codebook(book.bits, None, centroids, _midpoints(centroids)), book.dimension))
    return bound(least, np.array(other) + _SUM_ROUNDING)


def _table(rng, samples):
    return identity([normal(bits).distortion - value for bits, value in zip(BITS, _DISTORTIONS)], _SUM_ROUNDING)


def _shrinkage_is_energy(rng, samples):
    cases = {}
    for name, book in _all():
        inner, energy = moments(book, book.dimension)
        cases[name] = identity([inner - energy, energy - (1 - book.distortion)], _SUM_ROUNDING)
    return weakest(cases)


def _closed_forms(rng, samples):
    cases = {}
    for dimension in (None, *_DIMENSIONS):
        for book in [normal(bits) for bits in BITS] + [sphere(bits, 8) for bits in BITS]:
            inner, energy = moments(book, dimension)
            integrals = (average(lambda z, c: z * c, book, dimension), average(lambda z, c: c * c, book, dimension),
                         average(lambda z, c: (z - c) ** 2, book, dimension))
            cases[f"{book} under dimension {dimension}"] = identity(
                np.subtract((inner, energy, distortion(book, dimension)), integrals), 2 * _SUM_ROUNDING)
    return weakest(cases)


def _one_bit(rng, samples):
    mean = [np.sqrt(2 / np.pi)] + [np.sqrt(d) / (np.sqrt(np.pi) * gamma_ratio(d / 2)) for d in _DIMENSIONS]
    books = [book for name, book in _all() if book.bits == 1]
    differences = [(book.centroids[0] - m, book.distortion - (1 - m**2)) for book, m in zip(books, mean)]
    return identity(differences, _SUM_ROUNDING)


def _three_dimensions(rng, samples):
    """On the sphere in three dimensions, a coordinate is uniform (Archimedes), and equal cells are the best ones."""
    cases = {}
    for bits in BITS:
        book, step = sphere(bits, 3), np.sqrt(3) / 2 ** (bits - 1)
        cases[f"{bits} bits"] = identity(book.centroids - step * (np.arange(2 ** (bits - 1)) + 0.5), 1e-9)
        cases[f"{bits} bits, distortion"] = identity(book.distortion - 4.0**-bits, _SUM_ROUNDING)
    return weakest(cases)


def _upper_bound(rng, samples):
    return weakest({name: bound(book.distortion, PANTER_DITE * 4.0**-book.bits) for name, book in _all()})


def _lower_bound(rng, samples):
    return weakest({name: bound(4.0**-book.bits, book.distortion + _SUM_ROUNDING)
                    for name, book in _all((None, *_DIMENSIONS[1:]))})


def _sphere_below_normal(rng, samples):
    cases = {}
    for name, book in _all(_DIMENSIONS):
        foreign = distortion(normal(book.bits), book.dimension)
        cases[name] = bound([book.distortion, foreign],
                            np.array([foreign, normal(book.bits).distortion]) + _SUM_ROUNDING)
    return weakest(cases)


CLAIMS = (
    Claim("centroid condition",
          "c_i = E[z | t_i < z < t_(i+1)] to 1e-11, 1 to 8 bits, normal law and spheres of 2 to 1000 dimensions; "
          "the means taken by quadrature",
          "Max, IRE Transactions on Information Theory 6, 1960", "identity", _centroid_condition),
    Claim("nearest centroid", "c(z) is as near to z as any of the 2^b centroids, ties and zeros included",
          "Max, IRE Transactions on Information Theory 6, 1960", "identity", _nearest_centroid),
    Claim("least distortion", "another centroid, or all of them scaled by another factor, cannot lower E (z - c(z))^2",
          "Max, IRE Transactions on Information Theory 6, 1960", "bound", _least_distortion, samples=300),
    Claim("distortion table",
          "D(b) = 0.3634, 0.1175, 0.03455, 0.009501, 0.002505, 6.442e-4, 1.635e-4, 4.119e-5 for b = 1 to 8, normal law",
          "TurboQuant arXiv 2504.19874, Theorem 1 (prints 0.36, 0.117, 0.03, 0.009)", "identity", _table),
    Claim("shrinkage is energy", "E z c(z) = E c(z)^2 = 1 - D(b) under the codebook's own law",
          "textbook: follows from the centroid condition", "identity", _shrinkage_is_energy),
    Claim("closed forms", "E z c(z), E c(z)^2 and the distortion of a codebook under another law agree with quadrature",
          "definition", "identity", _closed_forms),
    Claim("one bit",
          "the centroid of 1 bit is E |z| = sqrt(D) Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)), or sqrt(2/pi) for the "
          "normal law, and its distortion 1 - c^2", "textbook", "identity", _one_bit),
    Claim("three dimensions", "a coordinate of the sphere in 3 dimensions is uniform: 2^b equal cells, distortion 4^-b",
          "textbook: Archimedes", "identity", _three_dimensions),
    Claim("upper bound", "D(b) < sqrt(3) pi / 2 4^-b, for 1 to 8 bits, the normal law and every sphere",
          "TurboQuant arXiv 2504.19874, Theorem 1; Panter and Dite 1951", "bound", _upper_bound),
    Claim("lower bound", "D(b) >= 4^-b in 3 dimensions and more, with equality in 3; two dimensions fall below it",
          "TurboQuant arXiv 2504.19874, Theorem 3, for this quantiser", "bound", _lower_bound),
    Claim("sphere below normal",
          "on a sphere its own codebook is no worse than the normal one, and that one no worse than on the normal law",
          "derived: the optimum is the least; the second inequality is a numerical finding", "bound",
          _sphere_below_normal),
)
