"""TurboQuant: keys and values as scalar-quantised coordinates of a random rotation, in bit planes (arXiv 2504.19874).

One vector x of D coordinates, with an orthogonal R, a codebook of b bits (`codebook`) and n = |x|:

    y = R x,    z = sqrt(D) y / n,    c_j = the centroid nearest to z_j,    x_hat = s R^T c.

Stored are the codes of c, in bit planes (`planes`), and the scalar s, rounded to float16.  With w = <z, c> / D and
e = <c, c> / D, both near 1 - D(b), the scalar is one of

    plain      s = n / sqrt(D)          the paper's: E x_hat = (1 - D(b)) x, so inner products shrink
    nc         s = n / |c|              keeps the norm, |x_hat| = n; inner products shrink by sqrt(1 - D(b)); the default
    mse        s = n / sqrt(D) w / e    the least error for these codes; inner products shrink by 1 - D(b)
    unbiased   s = n / sqrt(D) / w      <x, x_hat> = n^2; E <y, x_hat> = <y, x> for every y if R is Haar distributed

TurboQuant-prod (`encode_prod`) spends one of the b bits on the sign of a random projection S of the residual instead, which
makes the inner product unbiased over S whatever R is.  At equal bits its error is several times that of the codes above.

The sign plane is the 1-bit code of RaBitQ (arXiv 2405.12497): with r = n^2 / |y|_1 kept beside it (`rescale`), r <sign y, R q>
is an unbiased estimate of <x, q> (`sign_logits`).

**Centring keys is free.**  With a mean mu per KV head, k - mu is encoded in place of k and mu is never added back: <q, mu> is
the same number for all keys of a head, and the softmax over them does not see it.  Only the log-sum-exp is lower, by
scale <q, mu>; add that before a merge with partial results over keys that were not centred.  Values are not centred.

A head_dim that is no multiple of 32 is padded with zeros to the size of the rotation before it is rotated.
Special tokens: a zero vector has codes 0 and s = 0 and decodes to zeros.  A vector that holds NaN or Inf has codes 0 and
s = NaN, which stays visible in what is computed from that token, and touches no other.  s beyond 65504 becomes 65504.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from . import attention, planes as bit_planes
from .claim import Claim, bound, expectation, identity, variance, weakest
from .codebook import Codebook, PANTER_DITE, average, distortion, gamma_ratio, moments, normal, sphere
from .planes import Planes
from .rotation import Rotation, fixed_vectors, haar, hadamard, rotate, walsh_hadamard

SCALE_MODES = ("nc", "plain", "mse", "unbiased")
LARGEST_SCALE = 65504.0            # of float16

# Backends round the rotation in float32, each in its own order; their codes may differ where |z| is this close to a
# decision (`boundary_distance`), and nowhere else.
ROUNDING_DISTANCE = 2e-5


@dataclass(frozen=True, eq=False)
class Encoded:
    """Vectors [batch, kv_heads, tokens, head_dim] as codes.

    planes     of the size of the rotation: head_dim, or the next size that it was padded to
    scale      [batch, kv_heads, tokens] float16, the scalar s
    head_dim   of the vectors
    """

    planes: Planes
    scale: np.ndarray
    head_dim: int

    @property
    def bits(self) -> int:
        return self.planes.bits

    @property
    def nbytes(self) -> int:
        return self.planes.nbytes + self.scale.nbytes

    @property
    def bits_per_element(self) -> float:
        """Bits held per coordinate, scales and padding counted."""
        return 8 * self.nbytes / (self.scale.size * self.head_dim)


def codebook_for(bits: int, head_dim: int) -> Codebook:
    """The codebook of a rotation of that size: normal for powers of two from 64 on, else that of the sphere."""
    if head_dim >= 64 and head_dim & (head_dim - 1) == 0:
        return normal(bits)
    return sphere(bits, head_dim)


def quantise(y, codebook: Codebook, scale_mode: str = "nc") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes of rotated vectors y [..., D]: (signs [..., D] uint8, magnitudes [..., D] uint8, s [...] float64).

    s is not rounded yet.  A zero vector has codes 0 and s = 0.
    """
    if scale_mode not in SCALE_MODES:
        raise ValueError(f"turboquant: scale_mode: expected one of {', '.join(SCALE_MODES)}, got {scale_mode!r}")
    size = y.shape[-1]
    norm, z = _normalised(y)
    signs, magnitudes = codebook.assign(z)
    c = codebook.reconstruct(signs, magnitudes)
    w, e = (z * c).mean(axis=-1), (c * c).mean(axis=-1)
    w = np.where(norm == 0, 1.0, w)                      # w is 0 for a zero vector alone, whose s is 0 in any case
    factor = {"plain": 1.0, "nc": e**-0.5, "mse": w / e, "unbiased": 1 / w}[scale_mode]
    return signs, magnitudes, norm * size**-0.5 * factor


def encode(x, rotation: Rotation, bits: int, *, scale_mode: str = "nc", mean=None, check_finite: bool = False) -> Encoded:
    """Rotate, normalise, code and pack.

    x            : [batch, kv_heads, tokens, head_dim], any real dtype; keys after RoPE
    rotation     : of size head_dim, or of a larger multiple of 32, to which x is padded with zeros
    bits         : 1 to 8
    scale_mode   : "nc", "plain", "mse" or "unbiased", see the head of this module
    mean         : [kv_heads, head_dim], subtracted from x and never added back (keys only)
    check_finite : raise ValueError where x holds NaN or Inf, instead of storing s = NaN there

    Source: TurboQuant, arXiv 2504.19874, Algorithm 1; scales: EDEN, arXiv 2604.18555, and RaBitQ, arXiv 2405.12497.
    """
    y, finite = _rotated(x, rotation, mean, check_finite)
    signs, magnitudes, s = quantise(y, codebook_for(bits, rotation.head_dim), scale_mode)
    return Encoded(bit_planes.pack(signs, magnitudes, bits), _scalar(s, finite), np.shape(x)[-1])


def decode(encoded: Encoded, rotation: Rotation) -> np.ndarray:
    """x_hat = s R^T c, [batch, kv_heads, tokens, head_dim] float64 (of x - mean, if it was centred)."""
    s = encoded.scale.astype(np.float64)
    return rotate(s[..., None] * _centroids(encoded, rotation), rotation, inverse=True)[..., : encoded.head_dim]


def boundary_distance(x, rotation: Rotation, bits: int, *, mean=None) -> np.ndarray:
    """Distance of |z_j| to the nearest decision, 0 (the sign) or a boundary: [batch, kv_heads, tokens, rotation.head_dim].

    Codes of two backends may differ where it is at most ROUNDING_DISTANCE, there by one cell (the sign at 0), and nowhere
    else.  It is inf for a token without a direction (zero, NaN, Inf), whose codes are 0 everywhere.  In the modes other than
    "plain" s depends on the codes, and differs with them.
    """
    y, finite = _rotated(x, rotation, mean)
    norm, z = _normalised(y)
    distance = codebook_for(bits, rotation.head_dim).distance(z)
    return np.where((finite & (norm > 0))[..., None], distance, np.inf)


def logits(query, encoded: Encoded, rotation: Rotation, *, scale=None) -> np.ndarray:
    """scale <q_h, x_hat_t> = scale s_t <R q_h, c_t>, [batch, q_heads, tokens] float64; nothing is rotated back.

    query : [batch, q_heads, head_dim], q_heads a multiple of kv_heads        scale : default head_dim ** -0.5
    """
    rows = _query(query, encoded.head_dim, rotation, encoded.scale.shape, scale)           # [batch, kv_heads, group, D]
    products = rows @ np.swapaxes(_centroids(encoded, rotation), -1, -2)
    return _per_query_head(products * encoded.scale[:, :, None].astype(np.float64))


def decode_attention(query, keys: Encoded, values: Encoded, key_rotation: Rotation, value_rotation: Rotation, *,
                     lengths=None, scale=None, return_lse: bool = True):
    """One decode step of attention on the codes: `attention.decode` over the decoded keys and values.

    query   : [batch, q_heads, head_dim], not rotated
    keys    : of [batch, kv_heads, tokens, head_dim], centred or not        values : likewise, never centred
    lengths : [batch] int, tokens of each sequence (default: all); slots from there on are not read
    scale   : factor of the logits (default head_dim ** -0.5)

    Returns (output [batch, q_heads, head_dim], lse [batch, q_heads]), float64, natural logarithm; the output alone without
    `return_lse`.  An empty sequence gives output 0 and lse -inf.  lse of centred keys is lower by scale <q, mean>.
    Results over disjoint tokens merge by `attention.merge`.
    """
    batch, kv_heads, tokens = keys.scale.shape
    rows = np.log2(np.e) * _query(query, keys.head_dim, key_rotation, keys.scale.shape, scale)   # logits to base 2
    lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    key_centroids, value_centroids = _centroids(keys, key_rotation), _centroids(values, value_rotation)
    rotated = np.zeros((*rows.shape[:3], value_rotation.head_dim))
    lse = np.full(rows.shape[:3], -np.inf)
    for b in range(batch):
        n = int(lengths[b])
        if n == 0:
            continue
        for g in range(kv_heads):
            s_key, s_value = (encoded.scale[b, g, :n].astype(np.float64) for encoded in (keys, values))
            base_2 = s_key * (rows[b, g] @ key_centroids[b, g, :n].T)       # [group, n]; s multiplies the whole product
            largest = base_2.max(axis=-1, keepdims=True)
            p = np.exp2(base_2 - largest)
            total = p.sum(axis=-1, keepdims=True)
            rotated[b, g] = (p * s_value) @ value_centroids[b, g, :n] / total
            lse[b, g] = np.log(2) * (largest + np.log2(total))[:, 0]
    output = _per_query_head(rotate(rotated, value_rotation, inverse=True)[..., : values.head_dim])
    return (output, _per_query_head(lse)) if return_lse else output


# --- TurboQuant-prod -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A random matrix S [head_dim, head_dim] with E S^T sign(S r) proportional to r.

    kind "gaussian": iid N(0, 1);  "orthogonal": Haar distributed, with 2.75 times less variance.
    """

    kind: str
    head_dim: int
    seed: int
    matrix: np.ndarray = field(compare=False, repr=False)

    @property
    def unbiasing(self) -> float:
        """k with k E S^T sign(S r) = r / |r|: 1 over E <S^T sign(S u), u> = E |S u|_1 = D E |(S u)_1|, u = r / |r|.

        (S u)_1 is normal, E |.| = sqrt(2 / pi), or a coordinate of a uniform point on the sphere,
        E |.| = Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)).
        """
        mean = np.sqrt(2 / np.pi) if self.kind == "gaussian" else 1 / (np.sqrt(np.pi) * gamma_ratio(self.head_dim / 2))
        return 1 / (self.head_dim * mean)


def gaussian_projection(head_dim: int, seed: int) -> Projection:
    """S with iid N(0, 1) entries: the paper's."""
    rng = np.random.default_rng(_own_seed(seed))
    return Projection("gaussian", head_dim, seed, _frozen(rng.standard_normal((head_dim, head_dim))))


def orthogonal_projection(head_dim: int, seed: int) -> Projection:
    """S uniform on the orthogonal group."""
    return Projection("orthogonal", head_dim, seed, haar(head_dim, _own_seed(seed)).matrix)


@dataclass(frozen=True, eq=False)
class EncodedProd:
    """Vectors [batch, kv_heads, tokens, head_dim] as TurboQuant-prod codes.

    first           the "plain" code of bits - 1, or None for 1 bit
    residual_sign   [batch, kv_heads, tokens, words] uint32, the sign plane of S (R x - s c), 1 where negative
    residual_norm   [batch, kv_heads, tokens] float16, |x - s R^T c|: n gamma of the paper
    head_dim        of the vectors
    """

    first: Encoded | None
    residual_sign: np.ndarray
    residual_norm: np.ndarray
    head_dim: int

    @property
    def bits(self) -> int:
        return 1 + (0 if self.first is None else self.first.bits)

    @property
    def nbytes(self) -> int:
        return self.residual_sign.nbytes + self.residual_norm.nbytes + (0 if self.first is None else self.first.nbytes)

    @property
    def bits_per_element(self) -> float:
        """Bits held per coordinate, both scalars and padding counted."""
        return 8 * self.nbytes / (self.residual_norm.size * self.head_dim)


def encode_prod(x, rotation: Rotation, projection: Projection, bits: int, *, mean=None,
                check_finite: bool = False) -> EncodedProd:
    """bits - 1 bits of "plain" code, then the signs of the projected residual.  Arguments as in `encode`.

    The residual is projected in rotated coordinates, S (R x - s c), before s is rounded, where the paper has S (x - x_hat):
    S R has the law of S, and nothing needs to be rotated back.

    Source: TurboQuant, arXiv 2504.19874, Algorithm 2.
    """
    _check_projection(projection, rotation)
    y, finite = _rotated(x, rotation, mean, check_finite)
    first, residual = None, y
    if bits != 1:
        codebook = codebook_for(bits - 1, rotation.head_dim)
        signs, magnitudes, s = quantise(y, codebook, "plain")
        residual = y - s[..., None] * codebook.reconstruct(signs, magnitudes)
        first = Encoded(bit_planes.pack(signs, magnitudes, bits - 1), _scalar(s, finite), np.shape(x)[-1])
    negative = residual @ projection.matrix.T < 0                                          # sign(0) = +1
    return EncodedProd(first, bit_planes.pack_bits(negative),
                       _scalar(np.linalg.norm(residual, axis=-1), finite), np.shape(x)[-1])


def decode_prod(encoded: EncodedProd, rotation: Rotation, projection: Projection) -> np.ndarray:
    """x_hat = R^T (s c + k |r| S^T sign(S r)), [batch, kv_heads, tokens, head_dim] float64."""
    return rotate(_rotated_prod(encoded, rotation, projection), rotation, inverse=True)[..., : encoded.head_dim]


def logits_prod(query, encoded: EncodedProd, rotation: Rotation, projection: Projection, *, scale=None) -> np.ndarray:
    """scale <q_h, x_hat_t>, [batch, q_heads, tokens] float64.  Unbiased over S: E = scale <q_h, x_t>.

    query : [batch, q_heads, head_dim], q_heads a multiple of kv_heads        scale : default head_dim ** -0.5
    """
    rows = _query(query, encoded.head_dim, rotation, encoded.residual_norm.shape, scale)
    return _per_query_head(rows @ np.swapaxes(_rotated_prod(encoded, rotation, projection), -1, -2))


def _rotated_prod(encoded, rotation, projection):
    """R x_hat = s c + k |r| S^T h, h = 1 - 2 residual_sign: [batch, kv_heads, tokens, rotation.head_dim]."""
    _check_projection(projection, rotation)
    h = 1.0 - 2.0 * bit_planes.unpack_bits(encoded.residual_sign, rotation.head_dim)
    length = projection.unbiasing * encoded.residual_norm.astype(np.float64)
    rotated = length[..., None] * (h @ projection.matrix)
    if encoded.first is not None:
        rotated += encoded.first.scale[..., None].astype(np.float64) * _centroids(encoded.first, rotation)
    return rotated


# --- The sign plane as a RaBitQ code ---------------------------------------------------------------------------------


def rescale(x, rotation: Rotation, *, mean=None) -> np.ndarray:
    """r = n^2 / |R x|_1, [batch, kv_heads, tokens] float16: what the sign plane needs to estimate inner products."""
    y, finite = _rotated(x, rotation, mean)
    total = np.abs(y).sum(axis=-1)
    return _scalar((y * y).sum(axis=-1) / np.where(total == 0, 1.0, total), finite)


def sign_logits(query, sign, rescale, rotation: Rotation, *, scale=None) -> np.ndarray:
    """scale r_t <sign(R x_t), R q_h> = scale r_t (sum_j q'_j - 2 sum of q'_j where x_t is negative), q' = R q_h.

    query : [batch, q_heads, head_dim]        sign : [batch, kv_heads, tokens, words] uint32, a sign plane
    rescale : [batch, kv_heads, tokens]       scale : default head_dim ** -0.5

    Returns [batch, q_heads, tokens] float64.  If R is Haar distributed, its mean is scale <q_h, x_t>.
    Source: RaBitQ, arXiv 2405.12497, Theorem 3.2.
    """
    rows = _query(query, np.shape(query)[-1], rotation, rescale.shape, scale)
    negative = bit_planes.unpack_bits(sign, rotation.head_dim).astype(np.float64)
    products = rows.sum(axis=-1)[..., None] - 2 * rows @ np.swapaxes(negative, -1, -2)
    return _per_query_head(products * rescale[:, :, None].astype(np.float64))


# --- Steps shared by the above ---------------------------------------------------------------------------------------


def _rotated(x, rotation, mean=None, check_finite=False):
    """(R (x - mean) of the padded vectors, where they are finite [batch, kv_heads, tokens]).  The others are rotated as 0."""
    x = np.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"turboquant: x: expected [batch, kv_heads, tokens, head_dim], got {list(x.shape)}")
    x = x.astype(np.float64)
    _check_rotation(rotation, x.shape[-1])
    if mean is not None:
        mean = np.asarray(mean).astype(np.float64)
        if mean.shape != (x.shape[1], x.shape[3]) or not np.isfinite(mean).all():
            raise ValueError(f"turboquant: mean: expected finite numbers [kv_heads, head_dim] = [{x.shape[1]}, {x.shape[3]}], "
                             f"got {list(mean.shape)}")
        x = x - mean[:, None]
    finite = np.isfinite(x).all(axis=-1)
    if check_finite and not finite.all():
        raise ValueError(f"turboquant: x: expected finite numbers, got NaN or Inf in {(~finite).sum()} vectors, the first at "
                         f"[batch, kv_head, token] = {np.argwhere(~finite)[0].tolist()}")
    padding = [(0, 0)] * 3 + [(0, rotation.head_dim - x.shape[-1])]
    return rotate(np.pad(np.where(finite[..., None], x, 0.0), padding), rotation), finite


def _normalised(y):
    """(n = |y|, z = sqrt(D) y / n), z = 0 for a zero vector.  float64 has room for the squares of all float32 numbers."""
    norm = np.linalg.norm(y, axis=-1)
    return norm, y * (y.shape[-1] ** 0.5 / np.where(norm == 0, 1.0, norm))[..., None]


def _scalar(s, finite):
    """float16, at most 65504; NaN where x was not finite."""
    return np.where(finite, np.minimum(s, LARGEST_SCALE), np.nan).astype(np.float16)


def _centroids(encoded, rotation):
    """c of the codes, [batch, kv_heads, tokens, rotation.head_dim] float64."""
    _check_rotation(rotation, encoded.head_dim)
    codes = bit_planes.unpack(encoded.planes, rotation.head_dim)
    return codebook_for(encoded.bits, rotation.head_dim).reconstruct(*codes)


def _query(query, head_dim, rotation, tokens_shape, scale):
    """scale R q, padded, by KV head: [batch, kv_heads, group, rotation.head_dim].  Query head h has KV head h // group."""
    query = np.asarray(query).astype(np.float64)
    batch, kv_heads, _ = tokens_shape
    if query.ndim != 3 or query.shape[::2] != (batch, head_dim) or query.shape[1] % kv_heads:
        raise ValueError(f"turboquant: query: expected [{batch}, a multiple of {kv_heads}, {head_dim}], got {list(query.shape)}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    _check_rotation(rotation, head_dim)
    rows = rotate(np.pad(scale * query, [(0, 0), (0, 0), (0, rotation.head_dim - head_dim)]), rotation)
    return rows.reshape(batch, kv_heads, query.shape[1] // kv_heads, rotation.head_dim)


def _per_query_head(x):
    """[batch, kv_heads, group, ...] -> [batch, q_heads, ...]"""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _check_rotation(rotation, head_dim):
    if rotation.head_dim % 32 or rotation.head_dim < head_dim:
        raise ValueError(f"turboquant: rotation: expected a size that is a multiple of 32 and at least head_dim = {head_dim}, "
                         f"got {rotation.head_dim}")


def _check_projection(projection, rotation):
    if projection.head_dim != rotation.head_dim:
        raise ValueError(f"turboquant: projection: expected the size of the rotation, {rotation.head_dim}, "
                         f"got {projection.head_dim}")


def _own_seed(seed):
    """Another stream than the rotation of the same seed: S and R must be independent."""
    return int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1, np.uint64)[0])


def _frozen(array):
    array.setflags(write=False)
    return array
