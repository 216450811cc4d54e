"""Codebooks: the best scalar quantiser of one rotated coordinate, for 1 to 8 bits.

A unit vector, rotated at random and multiplied by sqrt(D), D its dimension, has coordinates z of variance 1.  One of them
follows the law of the sphere,

    f(z) = K / sqrt(D) (1 - z^2 / D)^((D-3)/2),    |z| <= sqrt(D),    K = Gamma(D/2) / (sqrt(pi) Gamma((D-1)/2)),

which tends to the normal law as D grows (TurboQuant, arXiv 2504.19874, Lemma 1).  A codebook of b bits is symmetric: a sign
and one of n = 2^(b-1) magnitudes, with centroids 0 < c_0 < c_1 < ... and boundaries t_i between them; t_0 = 0, and t_n is
the end of the law.  It has the least distortion E (z - c(z))^2 when both conditions of Lloyd and Max hold:

    c_i = m_i = E[z | t_i < z < t_(i+1)],        t_i = (c_(i-1) + c_i) / 2

(Max, IRE Transactions on Information Theory 6, 1960).  Newton's method on F_i = c_i - m_i reaches the rounding floor in a
few steps.  Plain Lloyd iterations, c <- m(c), need 10^5 of them at 8 bits; stopped after 100, they leave 4 times the least
distortion there.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from .claim import Claim, bound, identity, weakest

BITS = range(1, 9)
LARGEST_DIMENSION = 2**16              # beyond it the two laws agree better than SciPy's incomplete beta function computes
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
    """The codebook of sqrt(dimension) times a coordinate of a uniform point on the unit sphere, dimension 2 to 65536."""
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
    """E function(z, c(z)) of an even function under the law of `dimension` (None: normal), by quadrature in every cell.

    Independent of the closed forms: z = sqrt(D) sin(a) turns the law of the sphere into K cos(a)^(D-2) da, which is smooth
    in every dimension, and 128 Gauss-Legendre nodes do the rest.
    """
    if dimension is None:
        angles, end = codebook.boundaries, np.inf
    else:
        angles, end = np.arcsin(codebook.boundaries / np.sqrt(dimension)), np.pi / 2
    edges = np.concatenate([[0.0], angles])
    edges = np.append(edges, min(end, edges[-1] + 10 / np.sqrt(dimension or 1)))     # beyond, e^-50 of the law at most
    node, weight = np.polynomial.legendre.leggauss(128)
    half = np.diff(edges)[:, None] / 2
    at = edges[:-1, None] + half * (1 + node)                                        # [cells, nodes]
    if dimension is None:
        z, density = at, np.exp(-(at**2) / 2) / np.sqrt(2 * np.pi)
    else:
        z, density = np.sqrt(dimension) * np.sin(at), np.cos(at) ** (dimension - 2)
        density *= gamma_ratio((dimension - 1) / 2) / np.sqrt(np.pi)
    return float(2 * (half * weight * density * function(z, codebook.centroids[:, None])).sum())


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
    return np.concatenate([[0.0], boundaries, [law.end]])


def _masses(law, edges):
    """P(t_i < z < t_(i+1)) as differences of tails, which are accurate far from 0 where 1 - tail is not."""
    return -np.diff(law.tail(edges))


def _partial_means(law, edges):
    """int over (t_i, t_(i+1)) of s f(s) ds, as a product: the difference of two nearly equal exponentials would cancel."""
    with np.errstate(divide="ignore"):                                    # the decay at the end is -inf
        decay = law.decay(edges)
    return -law.peak * np.exp(decay[:-1]) * np.expm1(np.diff(decay))


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

# Closed forms: masses as small as 1e-4 are differences of tails that are off by 2^-53, which gives m_i an error of 1e-12 and
# a code, whose error adds over 128 cells with weights p_i, one of 1e-13.  Quadrature is more accurate.
_RESIDUAL = 1e-11
_ROUNDING = 1e-13

# D(b) of the normal law, computed with 30 digits.
_DISTORTIONS = ()


def _every(dimensions=(None, *_DIMENSIONS)):
    """All codebooks of the given dimensions, by name."""
    return {f"{bits} bits, {'normal' if dimension is None else f'dimension {dimension}'}":
            (normal(bits) if dimension is None else sphere(bits, dimension), dimension)
            for dimension in dimensions for bits in BITS}


def _centroid_condition(rng, samples):
    cases = {}
    for name, (book, dimension) in _every().items():
        # The residual of one cell at a time: E (z - c_i) 1[cell i] = 0, over P(cell i)
        residual = [average(lambda z, c, i=i: (c - z) * (c == i), book, dimension) /
                    average(lambda z, c, i=i: 1.0 * (c == i), book, dimension) for i in book.centroids]
        cases[name] = identity(residual, _RESIDUAL)
    return weakest(cases)
