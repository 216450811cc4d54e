"""Random rotations of key and value vectors: Haar orthogonal matrices and randomised Hadamard transforms.

A rotation spreads the energy of outlier channels over all coordinates.  After a Haar rotation, one coordinate t of a
fixed unit vector follows  f(t) = Gamma(D/2) / (sqrt(pi) Gamma((D-1)/2)) (1 - t^2)^((D-3)/2),  i.e.
(t+1)/2 ~ Beta((D-1)/2, (D-1)/2) (TurboQuant, arXiv 2504.19874, Lemma 1); that law is what the codebooks and the 1-bit
estimators are built on.  Randomised Hadamard rounds approximate it in D log2 D additions.

A rotation is made here, from an integer seed, and handed to every backend as data; no backend draws its own.
Row vectors are rotated: y = x R^T.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from scipy import linalg, special

from .claim import Claim, distribution, enumeration, expectation, identity, tail, weakest


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R of size head_dim x head_dim, made from (kind, head_dim, seed, rounds) and compared by
    them.

    kind     "haar": R is `matrix`;  "hadamard": R = H_rounds ... H_2 H_1 with H_r = head_dim^(-1/2) H diag(signs[r])
    signs    [rounds, head_dim] int8, +1 or -1      (hadamard only)
    matrix   [head_dim, head_dim] float64           (haar only)
    """

    kind: str
    head_dim: int
    seed: int
    rounds: int
    signs: np.ndarray | None = field(default=None, compare=False, repr=False)
    matrix: np.ndarray | None = field(default=None, compare=False, repr=False)

    def dense(self) -> np.ndarray:
        """R as a matrix [head_dim, head_dim] float64, so that y = x R^T."""
        return rotate(np.eye(self.head_dim), self).T   # row i of rotate(I) is R e_i, column i of R


def haar(head_dim: int, seed: int) -> Rotation:
    """R uniform on the orthogonal group: A with iid N(0,1) entries, A = Q U (QR), R = Q diag(sign(diag U)).

    Without the signs, Q of a QR routine is not Haar distributed (Mezzadri, arXiv math-ph/0609050, section 5).
    """
    _check_head_dim(head_dim)
    gaussian = _generator(seed).standard_normal((head_dim, head_dim))
    q, u = np.linalg.qr(gaussian)
    matrix = q * np.where(np.diag(u) < 0, -1.0, 1.0)   # column j of Q times sign(U_jj), sign(0) = +1
    return Rotation("haar", head_dim, seed, 0, matrix=_frozen(matrix))


def hadamard(head_dim: int, seed: int, rounds: int = 3) -> Rotation:
    """R = product over rounds of D^(-1/2) H diag(eps_r): fresh Rademacher signs eps_r, then the Walsh-Hadamard
    matrix H.

    H[i, j] = (-1)^popcount(i & j) (Sylvester order).  One round leaves the sign code of sparse keys badly biased, three
    rounds nearly unbiased; distortion is the same (claims of `rabitq` and `turboquant`).  head_dim must be a power of
    two.
    """
    _check_head_dim(head_dim)
    if head_dim & (head_dim - 1):
        raise ValueError(f"rotation.hadamard: head_dim: expected a power of two, got {head_dim}; "
                         f"use haar() for other sizes")
    if not isinstance(rounds, (int, np.integer)) or not 1 <= rounds <= 8:
        raise ValueError(f"rotation.hadamard: rounds: expected an integer from 1 to 8, got {rounds!r}")
    bits = _generator(seed).integers(0, 2, (rounds, head_dim), dtype=np.int8)
    signs = bits * np.int8(2) - np.int8(1)
    return Rotation("hadamard", head_dim, seed, int(rounds), signs=_frozen(signs))


def rotate(x: np.ndarray, rotation: Rotation, *, inverse: bool = False) -> np.ndarray:
    """y = x R^T, or x R with `inverse` (R is orthogonal, so that is R^-1).

    x : [..., head_dim], any real dtype.  Returns float64 of the same shape.
    """
    x = np.asarray(x).astype(np.float64)
    if x.shape[-1:] != (rotation.head_dim,):
        raise ValueError(f"rotation.rotate: x: expected [..., {rotation.head_dim}], got {list(x.shape)}")
    if rotation.kind == "haar":
        return x @ (rotation.matrix if inverse else rotation.matrix.T)
    scale = rotation.head_dim**-0.5
    if inverse:   # H is symmetric and H H = D I: undo the transform first, then the signs, last round first
        for signs in rotation.signs[::-1]:
            x = walsh_hadamard(x) * scale * signs
    else:
        for signs in rotation.signs:
            x = walsh_hadamard(x * signs) * scale
    return x


def walsh_hadamard(x: np.ndarray) -> np.ndarray:
    """y[..., k] = sum_j (-1)^popcount(j & k) x[..., j], unnormalised, by butterflies at distances 1, 2, 4, ... .

    The order of the distances is part of the definition: every backend keeps it, so that float32 results agree bit for
    bit.
    """
    size = x.shape[-1]
    distance = 1
    while distance < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * distance), 2, distance)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([low + high, low - high], axis=-2).reshape(*x.shape[:-1], size)
        distance *= 2
    return x


def _check_head_dim(head_dim):
    if not isinstance(head_dim, (int, np.integer)) or isinstance(head_dim, bool) or head_dim < 2 or head_dim % 2:
        raise ValueError(f"rotation: head_dim: expected an even integer of at least 2, got {head_dim!r}")


def _generator(seed):
    """A stream of its own: users draw test data from default_rng(seed), and a matrix made of that very data is not
    independent of it."""
    return np.random.default_rng([*b"rotation", _check_seed(seed)])


def _check_seed(seed):
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"rotation: seed: expected a non-negative integer, got {seed!r}")
    return seed


def _frozen(array):
    array.setflags(write=False)   # a rotation is shared by every codec that names its seed
    return array


# --- Claims ---------------------------------------------------------------------------------------------------------
#
# Fourth moments of L Hadamard rounds.  For a fixed unit vector x and Rademacher signs e,
# E (sum_j e_j x_j)^4 = 3 - 2 sum_j x_j^4 (only pairs and fourth powers survive), and the signs of a row of H change
# nothing.  So with m_L = E t^4 of any coordinate after L rounds, and m_0 = sum_j x_j^4 / D,
#
#     m_L = (3 - 2 D m_(L-1)) / D^2,     hence     m_L - m_Haar = (-2/D)^L (m_0 - m_Haar),     m_Haar = 3 / (D (D + 2)).
#
# Second moments: E t_i t_j = (1/D) sum_k (-1)^popcount((i ^ j) & k) E y_k^2, y the vector before the last round.  If an
# earlier round made it, every E y_k^2 is 1/D and the sum over k vanishes for i != j; otherwise y = x, and it does not.

_EPSILON = 2.0**-52
_ENUMERATED = 64 * _EPSILON     # means of numbers of at most 1: four times the error of three rotations and of the sum


def coordinate_cdf(t, head_dim: int):
    """P(T <= t) of one coordinate T of a uniform point on the unit sphere: (T + 1) / 2 ~ Beta((D-1)/2, (D-1)/2)."""
    half = (head_dim - 1) / 2
    return special.betainc(half, half, np.clip((np.asarray(t) + 1) / 2, 0, 1))


def fixed_vectors(head_dim: int) -> np.ndarray:
    """Unit vectors [6, head_dim] on which a rotation that is not random enough shows: sparse, flat, and any."""
    vectors = np.zeros((6, head_dim))
    vectors[0, -1] = 1                                          # one-hot
    vectors[1] = 1                                              # constant
    vectors[2, [0, 1]] = 1, 1                                   # two equal spikes: half of one round's output is 0
    vectors[3, [0, 1]] = 1, 0.5                                 # biases the sign code of one round
    vectors[4] = (-1.0) ** np.arange(head_dim)                  # a row of the Hadamard matrix
    vectors[5] = np.random.default_rng(0).standard_normal(head_dim)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _rounding(rotation):
    """Relative 2-norm error of one float64 rotation, rounded up by two.

    Hadamard: each of the log2 D butterflies, the rounded factor D^(-1/2) and its product cost 2^-53 per round.  Haar:
    sums of D products, where |R| has norm at most sqrt(D); the error of the QR routine has the same form (Higham,
    Accuracy and Stability of Numerical Algorithms, Theorem 19.4).
    """
    if rotation.kind == "haar":
        return _EPSILON * rotation.head_dim**1.5
    return _EPSILON * rotation.rounds * (np.log2(rotation.head_dim) + 2)


def _every_kind(rng, samples):
    """`samples` rotations: Haar and one to four Hadamard rounds in turn, of all sizes in use and the smallest."""
    for case in range(samples):
        rounds, seed = case % 5, int(rng.integers(2**32))
        if rounds == 0:
            yield haar(int(rng.choice([2, 6, 16, 64, 128])), seed)
        else:
            yield hadamard(int(rng.choice([2, 4, 64, 128, 256])), seed, rounds)


def _rotated(make, x, rng, samples):
    """[samples, *x.shape]: x under `samples` rotations of consecutive seeds, as a user draws them."""
    first = int(rng.integers(2**32))
    return np.stack([rotate(x, make(first + i)) for i in range(samples)])


def _orthogonality(rng, samples):
    deviation, allowance = [], []
    for rotation in _every_kind(rng, samples):
        size, r = rotation.head_dim, rotation.dense()
        deviation.append(np.abs(r @ r.T - np.eye(size)).max())
        # Columns of R are off by _rounding, so R by sqrt(D) times that; it enters twice, and the product has D terms.
        allowance.append(2 * size**0.5 * _rounding(rotation) + size * _EPSILON)
    return identity(deviation, allowance)


def _float32_orthogonality(rng, samples):
    deviation = []
    for rotation in _every_kind(rng, samples):
        r = rotation.dense().astype(np.float32).astype(np.float64)
        deviation.append(np.abs(r @ r.T - np.eye(rotation.head_dim)).max())
    return identity(deviation, 2.0**-23 * (1 + 1e-6))                 # second-order terms and the float64 errors above


def _inner_products(rng, samples):
    deviation, allowance = [], []
    for rotation in _every_kind(rng, samples):
        x = fixed_vectors(rotation.head_dim)
        x = x * 10.0 ** rng.uniform(-30, 30, (len(x), 1))
        y, norms = rotate(x, rotation), np.linalg.norm(x, axis=-1)
        deviation.append((y @ y.T - x @ x.T) / np.outer(norms, norms))
        allowance.append(np.full(deviation[-1].shape, 2 * _rounding(rotation) + 2 * rotation.head_dim * _EPSILON))
    return identity(deviation, allowance, samples=samples)


def _inverse(rng, samples):
    deviation, allowance = [], []
    for rotation in _every_kind(rng, samples):
        x = np.concatenate([fixed_vectors(rotation.head_dim), rng.standard_normal((2, rotation.head_dim))])
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        for there, back in ((False, True), (True, False)):
            again = rotate(rotate(x, rotation, inverse=there), rotation, inverse=back)
            deviation.append(np.linalg.norm(again - x, axis=-1))
        allowance += [np.full(len(x), 2 * _rounding(rotation))] * 2
    return identity(deviation, allowance, samples=samples)


def _dense_agrees(rng, samples):
    deviation, allowance = [], []
    for rotation in _every_kind(rng, samples):
        x = rng.standard_normal((3, rotation.head_dim))
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        deviation.append(np.linalg.norm(rotate(x, rotation) - x @ rotation.dense().T, axis=-1))
        # The matrix is off by sqrt(D) _rounding, and its product sums D terms.
        size = rotation.head_dim
        allowance.append(np.full(3, 2 * size**0.5 * _rounding(rotation) + _EPSILON * size**1.5))
    return identity(deviation, allowance, samples=samples)


def _hadamard_matrix(rng, samples):
    deviation, allowance = [], []
    for case in range(samples):
        size, rounds = int(rng.choice([2, 4, 16, 64, 128, 256])), 1 + case % 4
        rotation = hadamard(size, int(rng.integers(2**32)), rounds)
        x = rng.integers(-8, 9, size).astype(np.float64)
        expected = x
        for signs in rotation.signs:
            expected = linalg.hadamard(size) @ (signs * expected)     # integers below 2^53: no rounding
        y = rotate(x, rotation)
        expected = expected * float(size) ** (-rounds / 2)
        deviation.append(np.abs(y - expected).max())
        # D^(-1/2) is a power of two when D is a power of four, and then nothing is rounded at all.
        exact = np.log2(size) % 2 == 0
        allowance.append(0.0 if exact else _rounding(rotation) * np.linalg.norm(x))
    return identity(deviation, allowance)


def _repeatable(rng, samples):
    differences = []
    for rotation in _every_kind(rng, samples):
        make = haar if rotation.kind == "haar" else lambda size, seed, n=rotation.rounds: hadamard(size, seed, n)
        again = make(rotation.head_dim, rotation.seed)
        differences.append(np.abs(again.dense() - rotation.dense()).max())
    return identity(differences)


def _haar_law(rng, samples):
    cases = {}
    for size in (4, 64):
        t = _rotated(partial(haar, size), fixed_vectors(size), rng, samples)
        cases[f"head_dim {size}"] = distribution(t, partial(coordinate_cdf, head_dim=size))
    return weakest(cases)


def _haar_second_moments(rng, samples):
    t = _rotated(partial(haar, 16), fixed_vectors(16), rng, samples)
    return expectation(t[..., :, None] * t[..., None, :], np.eye(16) / 16)


def _haar_fourth_moment(rng, samples):
    size = 64
    t = _rotated(partial(haar, size), fixed_vectors(size), rng, samples)
    return expectation((t**4).mean(axis=-1), 3 / (size * (size + 2)))


def _haar_tail(rng, samples):
    size, edges = 64, np.array([1, 2, 3]) / 8                         # 1, 2 and 3 standard deviations
    t = np.abs(_rotated(partial(haar, size), fixed_vectors(size), rng, samples))
    count = (t[..., None] > edges).sum(axis=0)
    return tail(count, samples, 2 * coordinate_cdf(-edges, size), relation="=")


def _haar_mean(rng, samples):
    return expectation(_rotated(partial(haar, 16), np.eye(16), rng, samples), 0.0)


def _haar_trace(rng, samples):
    trace = np.trace(_rotated(partial(haar, 16), np.eye(16), rng, samples), axis1=1, axis2=2)
    return weakest({"law": distribution(trace, special.ndtr), "square": expectation(trace**2, 1.0)})


def _seeds_unrelated(rng, samples):
    makers = {"haar": partial(haar, 8), "hadamard": partial(hadamard, 8)}
    cases = {}
    for name, make in makers.items():
        r = _rotated(make, np.eye(8), rng, 2 * samples)
        cases[name] = expectation(r[0::2] * r[1::2], 0.0)
    return weakest(cases)


def _signs(rng, samples):
    first, size, rounds = int(rng.integers(2**32)), 8, 3
    signs = np.stack([hadamard(size, first + i, rounds).signs.reshape(-1) for i in range(samples)]).astype(np.float64)
    i, j = np.triu_indices(signs.shape[1], 1)
    return weakest({"values": identity(np.abs(signs) - 1), "mean": expectation(signs, 0.0),
                    "pairs": expectation(signs[:, i] * signs[:, j], 0.0)})


def _second_moments(x, rounds):
    """E t_i t_j after `rounds` Hadamard rounds, for the rows of x: [vectors, head_dim, head_dim]."""
    size = x.shape[-1]
    if rounds > 1:
        return np.broadcast_to(np.eye(size) / size, (len(x), size, size))
    h = linalg.hadamard(size)
    return np.einsum("ik,jk,vk->vij", h, h, x**2) / size


def _fourth_moment(x, rounds):
    """E t^4 after `rounds` Hadamard rounds, for the rows of x: [vectors, 1]."""
    size = x.shape[-1]
    haar_value = 3 / (size * (size + 2))
    return haar_value + (-2 / size) ** rounds * ((x**4).mean(axis=-1, keepdims=True) - haar_value)


def _all_sign_patterns(x, rounds):
    """x under every Hadamard rotation of its size: [2 ** (rounds * head_dim), *x.shape]."""
    size = x.shape[-1]
    patterns = np.array(list(itertools.product((1, -1), repeat=rounds * size))).reshape(-1, rounds, size)
    return np.stack([rotate(x, Rotation("hadamard", size, 0, rounds, signs=signs)) for signs in patterns])


def _hadamard_second_moments(rng, samples):
    cases = {}
    for size, rounds in ((8, 1), (4, 2), (4, 3)):
        x = fixed_vectors(size)
        t = _all_sign_patterns(x, rounds)
        cases[f"all signs, head_dim {size}, {rounds} rounds"] = enumeration(
            t[..., :, None] * t[..., None, :], _second_moments(x, rounds), _ENUMERATED)
    for rounds in (1, 2, 3):
        x = fixed_vectors(16)
        t = _rotated(partial(hadamard, 16, rounds=rounds), x, rng, samples)
        cases[f"head_dim 16, {rounds} rounds"] = expectation(
            t[..., :, None] * t[..., None, :], _second_moments(x, rounds), allowance=_ENUMERATED)
    return weakest(cases)


def _hadamard_fourth_moment(rng, samples):
    cases = {}
    for size, rounds in ((8, 1), (4, 2), (4, 3)):
        x = fixed_vectors(size)
        cases[f"all signs, head_dim {size}, {rounds} rounds"] = enumeration(
            _all_sign_patterns(x, rounds) ** 4, _fourth_moment(x, rounds), _ENUMERATED)
    for rounds in (1, 2, 3):
        x = fixed_vectors(64)
        t = _rotated(partial(hadamard, 64, rounds=rounds), x, rng, samples)
        cases[f"head_dim 64, {rounds} rounds"] = expectation(
            (t**4).mean(axis=-1), _fourth_moment(x, rounds)[:, 0], allowance=_ENUMERATED)
    return weakest(cases)


def _hadamard_tail(rng, samples):
    size, edges = 64, np.array([1.5, 2, 2.5, 3]) / 8
    cases = {}
    for rounds in (1, 2, 3):
        t = np.abs(_rotated(partial(hadamard, size, rounds=rounds), fixed_vectors(size), rng, samples))
        count = (t[..., None] > edges).sum(axis=0)
        cases[f"{rounds} rounds"] = tail(count, samples, 2 * np.exp(-(edges**2) * size / 2))
    return weakest(cases)


CLAIMS = (
    Claim("orthogonality", "R R^T = I for Haar and for one to four Hadamard rounds, up to float64 rounding",
          "textbook: Higham, Accuracy and Stability of Numerical Algorithms, Theorem 19.4", "identity",
          _orthogonality, samples=100),
    Claim("float32 orthogonality",
          "max |R R^T - I| <= 2^-23 for the float32 copy of R that kernels get: rounding moves a row by at most 2^-24",
          "derived: triangle inequality", "bound", _float32_orthogonality, samples=100),
    Claim("norms and inner products",
          "<R x, R y> = <x, y> and |R x| = |x| for sparse, flat and random vectors with norms from 1e-30 to 1e30",
          "textbook", "identity", _inner_products, samples=100),
    Claim("inverse", "R^T (R x) = x and R (R^T x) = x", "textbook", "identity", _inverse, samples=100),
    Claim("dense matrix", "rotate(x) = x R^T with R = dense()", "definition", "identity", _dense_agrees, samples=100),
    Claim("hadamard matrix",
          "L rounds are D^(-L/2) H diag(e_L) ... H diag(e_1) with SciPy's Hadamard matrix H: equal on integer vectors "
          "where D is a power of four, up to the rounding of D^(-1/2) elsewhere",
          "definition (Sylvester order)", "identity", _hadamard_matrix, samples=200),
    Claim("repeatable", "the same kind, size, seed and rounds give the same rotation bit for bit",
          "definition", "identity", _repeatable, samples=100),
    Claim("seeds unrelated", "rotations of neighbouring seeds are uncorrelated: E R_ij(s) R_ij(s+1) = 0",
          "definition", "expectation", _seeds_unrelated, samples=4000),
    Claim("haar coordinate law",
          "every coordinate t of a rotated fixed unit vector follows (t + 1) / 2 ~ Beta((D-1)/2, (D-1)/2)",
          "TurboQuant arXiv 2504.19874, Lemma 1", "expectation", _haar_law, samples=2000),
    Claim("haar second moments", "E t_i t_j = 1/D for i = j and 0 otherwise, for fixed unit vectors",
          "textbook", "expectation", _haar_second_moments, samples=2000),
    Claim("haar fourth moment", "E t^4 = 3 / (D (D + 2)), t a coordinate of a rotated fixed unit vector",
          "TurboQuant arXiv 2504.19874, Lemma 1", "expectation", _haar_fourth_moment, samples=4000),
    Claim("haar tail", "P(|t| > s) = 2 I_((1-s)/2)((D-1)/2, (D-1)/2), at 1, 2 and 3 standard deviations 1/sqrt(D)",
          "TurboQuant arXiv 2504.19874, Lemma 1", "tail", _haar_tail, samples=4000),
    Claim("haar mean", "E R = 0 entry by entry; without the sign fix the diagonal of Q is biased",
          "Mezzadri arXiv math-ph/0609050, section 5", "expectation", _haar_mean, samples=4000),
    Claim("haar trace",
          "tr R ~ N(0, 1) up to an error exponentially small in D, here D = 16, and E (tr R)^2 = 1",
          "Johansson, Annals of Mathematics 145 (1997)", "expectation",
          _haar_trace, samples=4000),
    Claim("hadamard signs", "signs are +1 or -1 with mean 0, pairwise uncorrelated within and across rounds",
          "definition", "expectation", _signs, samples=4000),
    Claim("hadamard second moments",
          "E t_i^2 = 1/D for every fixed unit vector; for i != j, E t_i t_j = 0 from two rounds on, but "
          "(1/D) sum_k (-1)^popcount((i ^ j) & k) x_k^2 after one",
          "derived in reference/rotation.py", "expectation", _hadamard_second_moments, samples=2000),
    Claim("hadamard fourth moment",
          "E t^4 = m + (-2/D)^L (sum_j x_j^4 / D - m) after L rounds, m = 3 / (D (D + 2)) the value of Haar",
          "derived in reference/rotation.py", "expectation", _hadamard_fourth_moment, samples=2000),
    Claim("hadamard tail",
          "P(|t| > s) <= 2 exp(-s^2 D / 2) for every coordinate of a rotated fixed unit vector, from one round on",
          "Hoeffding, Journal of the American Statistical Association 58 (1963), Theorem 2", "tail",
          _hadamard_tail, samples=4000),
)
