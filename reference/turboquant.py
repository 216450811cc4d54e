"""TurboQuant: keys and values as scalar-quantised coordinates of a random rotation, in bit planes (arXiv 2504.19874).

One vector x of D coordinates, with an orthogonal R, a codebook of b bits (`codebook`) and n = |x|:

    y = R x,    z = sqrt(D) y / n,    c_j = the centroid nearest to z_j,    x_hat = s R^T c.

Stored are the codes of c, in bit planes (`planes`), and the scalar s, rounded to float16.  With w = <z, c> / D and
e = <c, c> / D, both near 1 - D(b), the scalar is one of

    nc         s = n / |c|              keeps the norm, |x_hat| = n; inner products shrink by sqrt(1 - D(b)); default
    plain      s = n / sqrt(D)          the paper's: E x_hat = (1 - D(b)) x, so inner products shrink
    mse        s = n / sqrt(D) w / e    the least error for these codes; inner products shrink by 1 - D(b)
    unbiased   s = n / sqrt(D) / w      <x, x_hat> = n^2; E <y, x_hat> = <y, x> for every y if R is Haar distributed

TurboQuant-prod (`encode_prod`) spends one of the b bits on the sign of a random projection S of the residual instead,
which makes the inner product unbiased over S whatever R is.  At equal bits its error is several times that of the
codes above.

The sign plane is the 1-bit code of RaBitQ (arXiv 2405.12497): with r = n^2 / |y|_1 kept beside it (`rescale`),
r <sign y, R q> is an unbiased estimate of <x, q> (`sign_logits`).

**Centring keys is free.**  With a mean mu per KV head, k - mu is encoded in place of k and mu is never added back:
<q, mu> is the same number for all keys of a head, and the softmax over them does not see it.  Only the log-sum-exp is
lower, by scale <q, mu>; add that before a merge with partial results over keys that were not centred.  Values, which
are summed and not compared, are not centred.

A head_dim that is no multiple of 32 is padded with zeros to the size of the rotation before it is rotated.
Special tokens: a zero vector has codes 0 and s = 0 and decodes to zeros.  A vector that holds NaN or Inf has codes 0
and s = NaN, which stays visible in what is computed from that token, and touches no other.  An s beyond 65504 becomes
65504.
"""
from __future__ import annotations

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
        return (32 * sum(plane.shape[-1] for plane in self.planes.arrays().values()) + 16) / self.head_dim


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


def encode(x, rotation: Rotation, bits: int, *, scale_mode: str = "nc", mean=None,
           check_finite: bool = False) -> Encoded:
    """Rotate, normalise, code and pack.

    x            : [batch, kv_heads, tokens, head_dim], any real dtype; keys after RoPE
    rotation     : of size head_dim, or of a larger multiple of 32, to which x is padded with zeros
    bits         : 1 to 8
    scale_mode   : "nc", "plain", "mse" or "unbiased", see the head of this module
    mean         : [kv_heads, head_dim] or [batch, kv_heads, head_dim], subtracted from x and never added back (keys
                   only)
    check_finite : raise ValueError where x holds NaN or Inf, instead of storing s = NaN there

    Source: TurboQuant, arXiv 2504.19874, Algorithm 1; scales: EDEN, arXiv 2604.18555, and RaBitQ, arXiv 2405.12497.
    """
    y, finite = _rotated(x, rotation, mean, check_finite)
    signs, magnitudes, s = quantise(y, codebook_for(bits, rotation.head_dim), scale_mode)
    return Encoded(bit_planes.pack(signs, magnitudes, bits), stored_scale(s, finite), np.shape(x)[-1])


def decode(encoded: Encoded, rotation: Rotation) -> np.ndarray:
    """x_hat = s R^T c, [batch, kv_heads, tokens, head_dim] float64 (of x - mean, if it was centred)."""
    s = encoded.scale.astype(np.float64)
    return rotate(s[..., None] * _centroids(encoded, rotation), rotation, inverse=True)[..., : encoded.head_dim]


def boundary_distance(x, rotation: Rotation, bits: int, *, mean=None) -> np.ndarray:
    """Distance of |z_j| to the nearest decision, 0 (the sign) or a boundary: [batch, kv_heads, tokens, rotation size].

    Codes of two backends may differ where it is at most ROUNDING_DISTANCE, there by one cell (the sign at 0), and
    nowhere else.  It is inf for a token without a direction (zero, NaN, Inf), whose codes are 0 everywhere.  In the
    modes other than "plain" s depends on the codes, and differs with them.
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
                     lengths=None, scale=None, key_mean=None, return_lse: bool = True):
    """One decode step of attention on the codes: `attention.decode` over the decoded keys and values.

    query    : [batch, q_heads, head_dim], not rotated
    keys     : of [batch, kv_heads, tokens, head_dim], centred or not        values : likewise, never centred
    lengths  : [batch] int, tokens of each sequence (default: all); slots from there on are not read
    scale    : factor of the logits (default head_dim ** -0.5)
    key_mean : the mean of centred keys, as `encode` took it: scale <q, mean> is added to lse

    Returns (output [batch, q_heads, head_dim], lse [batch, q_heads]), float64, natural logarithm; the output alone
    without `return_lse`.  An empty sequence gives output 0 and lse -inf.  For centred keys lse is lower by
    scale <q, mean>, unless `key_mean` is given.  Results over disjoint tokens merge by `attention.merge`.
    """
    scale = keys.head_dim**-0.5 if scale is None else scale
    base_2 = logits(query, keys, key_rotation, scale=np.log2(np.e) * scale)
    output, lse = attend(base_2, values, value_rotation, lengths)
    if key_mean is not None:
        lse += mean_logits(query, key_mean, keys.scale.shape[1], scale)
    return (output, lse) if return_lse else output


def attend(base_2, values: Encoded, rotation: Rotation, lengths=None) -> tuple[np.ndarray, np.ndarray]:
    """(output, lse) of attention to coded values by logits to base 2, [batch, q_heads, tokens], whatever the keys.

    Other arguments, and results, as in `decode_attention`; the sum over values is rotated back, once.
    """
    batch, kv_heads, tokens = values.scale.shape
    rows = base_2.reshape(batch, kv_heads, base_2.shape[1] // kv_heads, tokens)
    lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    centroids = _centroids(values, rotation)
    rotated = np.zeros((*rows.shape[:3], rotation.head_dim))
    lse = np.full(rows.shape[:3], -np.inf)
    for b in range(batch):
        n = int(lengths[b])
        if n == 0:
            continue
        for g in range(kv_heads):
            largest = rows[b, g, :, :n].max(axis=-1, keepdims=True)
            p = np.exp2(rows[b, g, :, :n] - largest)
            total = p.sum(axis=-1, keepdims=True)
            rotated[b, g] = (p * values.scale[b, g, :n].astype(np.float64)) @ centroids[b, g, :n] / total
            lse[b, g] = np.log(2) * (largest + np.log2(total))[:, 0]
    return _per_query_head(rotate(rotated, rotation, inverse=True)[..., : values.head_dim]), _per_query_head(lse)


def mean_logits(query, mean, kv_heads: int, scale: float) -> np.ndarray:
    """scale <q_h, mean>, [batch, q_heads] float64: what the logits of centred keys lack."""
    query = np.asarray(query).astype(np.float64)
    batch, q_heads, head_dim = query.shape
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    return scale * _per_query_head(np.einsum("bghd,bgd->bgh", grouped,
                                             mean_of_heads(mean, (batch, kv_heads, head_dim))))


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
    matrix = rng.standard_normal((head_dim, head_dim))
    matrix.setflags(write=False)
    return Projection("gaussian", head_dim, seed, matrix)


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
        own = (32 * self.residual_sign.shape[-1] + 16) / self.head_dim
        return own + (0 if self.first is None else self.first.bits_per_element)


def encode_prod(x, rotation: Rotation, projection: Projection, bits: int, *, mean=None,
                check_finite: bool = False) -> EncodedProd:
    """bits - 1 bits of "plain" code, then the signs of the projected residual.  Arguments as in `encode`.

    The residual is projected in rotated coordinates and before s is rounded, S (R x - s c), where the paper has
    S (x - x_hat): S R has the law of S, and nothing needs to be rotated back.

    Source: TurboQuant, arXiv 2504.19874, Algorithm 2.
    """
    _check_projection(projection, rotation)
    y, finite = _rotated(x, rotation, mean, check_finite)
    codes, residual = _first_stage(y, bits)
    head_dim, first = np.shape(x)[-1], None
    if codes is not None:
        signs, magnitudes, s = codes
        first = Encoded(bit_planes.pack(signs, magnitudes, bits - 1), stored_scale(s, finite), head_dim)
    sign = bit_planes.pack_bits(residual @ projection.matrix.T < 0)                        # sign(0) = +1
    return EncodedProd(first, sign, stored_scale(np.linalg.norm(residual, axis=-1), finite), head_dim)


def residual_distance(x, rotation: Rotation, projection: Projection, bits: int, *, mean=None) -> np.ndarray:
    """|<S_j, z - c>| / |S_j|, how far the residual is from the other sign: [batch, kv_heads, tokens, rotation size].

    As `boundary_distance`: residual signs of two backends may differ where it is at most ROUNDING_DISTANCE, provided
    that the codes of the token agree; another code is another residual.  inf for a token without a direction.
    """
    _check_projection(projection, rotation)
    y, finite = _rotated(x, rotation, mean)
    norm, _ = _normalised(y)
    projected = np.abs(_first_stage(y, bits)[1] @ projection.matrix.T) / np.linalg.norm(projection.matrix, axis=-1)
    distance = projected * (rotation.head_dim**0.5 / np.where(norm == 0, 1.0, norm))[..., None]
    return np.where((finite & (norm > 0))[..., None], distance, np.inf)


def decode_prod(encoded: EncodedProd, rotation: Rotation, projection: Projection) -> np.ndarray:
    """x_hat = R^T (s c + k |r| S^T sign(S r)), [batch, kv_heads, tokens, head_dim] float64."""
    return rotate(_rotated_prod(encoded, rotation, projection), rotation, inverse=True)[..., : encoded.head_dim]


def logits_prod(query, encoded: EncodedProd, rotation: Rotation, projection: Projection, *, scale=None) -> np.ndarray:
    """scale <q_h, x_hat_t>, [batch, q_heads, tokens] float64.  Unbiased over S: E = scale <q_h, x_t>.

    query : [batch, q_heads, head_dim], q_heads a multiple of kv_heads        scale : default head_dim ** -0.5
    """
    rows = _query(query, encoded.head_dim, rotation, encoded.residual_norm.shape, scale)
    return _per_query_head(rows @ np.swapaxes(_rotated_prod(encoded, rotation, projection), -1, -2))


def _first_stage(y, bits):
    """(the "plain" code of bits - 1 as `quantise` gives it, R x - s c), or (None, R x) for 1 bit."""
    if not isinstance(bits, (int, np.integer)) or isinstance(bits, bool) or bits not in bit_planes.BITS:
        raise ValueError(f"turboquant: bits: expected an integer from 1 to 8, got {bits!r}")
    if bits == 1:
        return None, y
    codebook = codebook_for(bits - 1, y.shape[-1])
    signs, magnitudes, s = quantise(y, codebook, "plain")
    return (signs, magnitudes, s), y - s[..., None] * codebook.reconstruct(signs, magnitudes)


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
    return stored_scale((y * y).sum(axis=-1) / np.where(total == 0, 1.0, total), finite)


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
    """(R (x - mean) of the padded vectors, which of them are finite [batch, kv_heads, tokens]).  Others count as 0."""
    x, finite = centred(x, mean, check_finite)
    _check_rotation(rotation, x.shape[-1])
    padding = [(0, 0)] * 3 + [(0, rotation.head_dim - x.shape[-1])]
    return rotate(np.pad(x, padding), rotation), finite


def centred(x, mean=None, check_finite=False) -> tuple[np.ndarray, np.ndarray]:
    """(x - mean float64, 0 where a vector holds NaN or Inf; which vectors do not, [batch, kv_heads, tokens])."""
    x = np.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"turboquant: x: expected [batch, kv_heads, tokens, head_dim], got {list(x.shape)}")
    x = x.astype(np.float64)
    if mean is not None:
        x = x - mean_of_heads(mean, (*x.shape[:2], x.shape[3]))[:, :, None]
    finite = np.isfinite(x).all(axis=-1)
    if check_finite and not finite.all():
        raise ValueError(f"turboquant: x: expected finite numbers, got NaN or Inf in {(~finite).sum()} vectors, the "
                         f"first at [batch, kv_head, token] = {np.argwhere(~finite)[0].tolist()}")
    return np.where(finite[..., None], x, 0.0), finite


def mean_of_heads(mean, shape):
    """A mean of keys as [batch, kv_heads, head_dim] = shape float64."""
    mean = np.asarray(mean).astype(np.float64)
    if mean.shape not in (shape, shape[1:]) or not np.isfinite(mean).all():
        raise ValueError(f"turboquant: mean: expected finite numbers [batch, kv_heads, head_dim] = {list(shape)} or "
                         f"[kv_heads, head_dim] = {list(shape[1:])}, got {list(mean.shape)}"
                         + ("" if np.isfinite(mean).all() else " with NaN or Inf"))
    return np.broadcast_to(mean, shape)


def _normalised(y):
    """(n = |y|, z = sqrt(D) y / n), z = 0 for a zero vector.  float64 has room for the squares of float32 numbers."""
    norm = np.linalg.norm(y, axis=-1)
    return norm, y * (y.shape[-1] ** 0.5 / np.where(norm == 0, 1.0, norm))[..., None]


def stored_scale(s, finite):
    """float16, at most 65504; NaN where x was not finite."""
    return np.where(finite, np.minimum(s, LARGEST_SCALE), np.nan).astype(np.float16)


def _centroids(encoded, rotation):
    """c of the codes, [batch, kv_heads, tokens, rotation.head_dim] float64."""
    _check_rotation(rotation, encoded.head_dim)
    codes = bit_planes.unpack(encoded.planes, rotation.head_dim)
    return codebook_for(encoded.bits, rotation.head_dim).reconstruct(*codes)


def _query(query, head_dim, rotation, tokens_shape, scale):
    """scale R q, padded, by KV head, to which q_heads / kv_heads in a row belong: [batch, kv_heads, group, size]."""
    query = np.asarray(query).astype(np.float64)
    batch, kv_heads, _ = tokens_shape
    if query.ndim != 3 or query.shape[::2] != (batch, head_dim) or query.shape[1] % kv_heads:
        raise ValueError(f"turboquant: query: expected [batch, q_heads, head_dim] = [{batch}, a multiple of "
                         f"{kv_heads}, {head_dim}], got {list(query.shape)}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    _check_rotation(rotation, head_dim)
    rows = rotate(np.pad(scale * query, [(0, 0), (0, 0), (0, rotation.head_dim - head_dim)]), rotation)
    return rows.reshape(batch, kv_heads, query.shape[1] // kv_heads, rotation.head_dim)


def _per_query_head(x):
    """[batch, kv_heads, group, ...] -> [batch, q_heads, ...]"""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _check_rotation(rotation, head_dim):
    if rotation.head_dim % 32 or rotation.head_dim < head_dim:
        raise ValueError(f"turboquant: rotation: expected a size that is a multiple of 32 and at least head_dim = "
                         f"{head_dim}, got {rotation.head_dim}")


def _check_projection(projection, rotation):
    if projection.head_dim != rotation.head_dim:
        raise ValueError(f"turboquant: projection: expected the size of the rotation, {rotation.head_dim}, "
                         f"got {projection.head_dim}")


def _own_seed(seed):
    """Another stream than the rotation of the same seed: S and R must be independent."""
    return int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1, np.uint64)[0])


# --- Claims ----------------------------------------------------------------------------------------------------------
#
# Laws over Haar rotations.  Let o = R x / |x|, uniform on the unit sphere, and v = R x_hat / |x|, a function of o that
# turns with it.  For a unit vector y = rho x / |x| + sqrt(1 - rho^2) u, u orthogonal to x, and given o, R u is uniform
# on the unit sphere orthogonal to o, of D - 1 dimensions.  So
#
#     <y, x_hat> / |x| = rho <o, v> + sqrt(1 - rho^2) <R u, v>    has the mean rho E <o, v> and, given o, the variance
#     (1 - rho^2) (|v|^2 - <o, v>^2) / (D - 1).
#
# In "unbiased" <o, v> = 1, so that |v|^2 - <o, v>^2 = |x - x_hat|^2 / |x|^2.  In "plain"
# <o, v> = w, whose mean is E z c(z), and |x - x_hat|^2 / |x|^2 = 1 - 2 w + e, whose mean is the distortion of the
# codebook under the law of a coordinate: exact in every dimension.  With a = 2 w - e and f = e - w, of mean 0 for the
# sphere's own codebook, and d = 1 - a the distortion of one vector in "plain",
#
#     mse:   <o, v> = w^2 / e = a + f^2 / (a + 2 f),
#     nc:    <o, v> = w / sqrt(e) = sqrt(a) (1 + f^2 / (2 a^2) + O(f^3)),
#
# so that, with m = 1 - D(b) and to leading order, the shrinkage differs from m by E f^2 / m, and from sqrt(m) by
# (E f^2 / 2 - Var d / 8) / m^(3/2).  Both f and d are means over coordinates, whose dependence (a large one leaves less
# to the others) lowers their variances: E f^2 <= E (c (c - z))^2 / D and Var d <= Var (z - c)^2 / D, again to leading
# order.  Twice the larger term is allowed for.

_HALF = 2.0**-11                     # relative rounding error of float16
_COSINE = 0.35                       # rho
_SIZES = (32, 64)                    # with the codebook of the sphere, and with the normal one


def _other_vectors(x):
    """Unit vectors with cosine _COSINE to those of x."""
    direction = np.random.default_rng(1).standard_normal(x.shape)
    direction -= (direction * x).sum(axis=-1, keepdims=True) * x
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    return _COSINE * x + (1 - _COSINE**2) ** 0.5 * direction


def _haar_draws(rng, samples, size):
    """R x and R y [samples, 6, size] of the fixed unit vectors x and their y, under Haar rotations."""
    x, first = fixed_vectors(size), int(rng.integers(2**32))
    both = np.stack([x, _other_vectors(x)])
    rotated = np.stack([rotate(both, haar(size, first + i)) for i in range(samples)], axis=1)
    return rotated[0], rotated[1]


def _rotated_code(y, bits, scale_mode):
    """R x_hat before s is rounded, [..., size]."""
    codebook = codebook_for(bits, y.shape[-1])
    signs, magnitudes, s = quantise(y, codebook, scale_mode)
    return s[..., None] * codebook.reconstruct(signs, magnitudes)


def _distortions(rng, samples):
    """(bits, size, |x - x_hat|^2 [samples, 6]) in "plain" for all numbers of bits."""
    for size in _SIZES:
        y, _ = _haar_draws(rng, samples, size)
        for bits in bit_planes.BITS:
            yield bits, size, ((y - _rotated_code(y, bits, "plain")) ** 2).sum(axis=-1)


def _distortion(rng, samples):
    return weakest({f"{bits} bits, head_dim {size}": expectation(error, distortion(codebook_for(bits, size), size))
                    for bits, size, error in _distortions(rng, samples)})


def _distortion_bounds(rng, samples):
    cases = {}
    for bits, size, error in _distortions(rng, samples):
        cases[f"{bits} bits, head_dim {size}, above"] = expectation(error, PANTER_DITE * 4.0**-bits, relation="<=")
        cases[f"{bits} bits, head_dim {size}, below"] = expectation(error, 4.0**-bits, relation=">=")
    return weakest(cases)


def _shrinkage(rng, samples, scale_mode):
    cases = {}
    for size in _SIZES:
        y, other = _haar_draws(rng, samples, size)
        for bits in bit_planes.BITS:
            codebook = codebook_for(bits, size)
            left = 1 - distortion(codebook, size)
            f = average(lambda z, c: (c * (c - z)) ** 2, codebook, size) / size
            d = (average(lambda z, c: (z - c) ** 4, codebook, size) - (1 - left) ** 2) / size
            # The normal codebook is not the sphere's own: f has a small mean.
            f += (moments(codebook, size)[1] - moments(codebook, size)[0]) ** 2
            expected, unknown = {"plain": (moments(codebook, size)[0], 0.0), "mse": (left, 2 * f / left),
                                 "nc": (left**0.5, (f + d / 4) / left**1.5)}[scale_mode]
            products = (other * _rotated_code(y, bits, scale_mode)).sum(axis=-1)
            cases[f"{bits} bits, head_dim {size}"] = expectation(products, _COSINE * expected,
                                                                 allowance=_COSINE * unknown)
    return weakest(cases)


def _unbiased(rng, samples):
    cases = {}
    for size in _SIZES:
        y, other = _haar_draws(rng, samples, size)
        for bits in bit_planes.BITS:
            products = (other * _rotated_code(y, bits, "unbiased")).sum(axis=-1)
            cases[f"{bits} bits, head_dim {size}"] = expectation(products, _COSINE)
    return weakest(cases)


def _unbiased_variance(rng, samples):
    """E ((<y, x_hat> - rho)^2 - (1 - rho^2) / (D - 1) |x - x_hat|^2) = 0, over its second term: no table is needed."""
    cases = {}
    for size in _SIZES:
        y, other = _haar_draws(rng, samples, size)
        for bits in bit_planes.BITS:
            code = _rotated_code(y, bits, "unbiased")
            squares = ((other * code).sum(axis=-1) - _COSINE) ** 2
            law = (1 - _COSINE**2) / (size - 1) * ((y - code) ** 2).sum(axis=-1)
            cases[f"{bits} bits, head_dim {size}"] = expectation(squares / law.mean(), law.mean(axis=0) / law.mean())
    return weakest(cases)


# Variance of prod.  Let r be the residual, a unit vector for now, k the unbiasing factor, and rho the cosine of y to r.
# Gaussian S: <S^T sign(S r), y> is the sum of D independent sign(g) h, where g and h are normal with correlation rho;
# E sign(g) h = rho sqrt(2 / pi) and E h^2 = 1, so
#
#     Var = k^2 D (1 - 2 / pi rho^2) = (pi / 2 - rho^2) / D.
#
# Orthogonal S: as above with o = S r and v = k sign(o): <o, v> = k |o|_1, |v|^2 = k^2 D, and
# E |o|_1^2 = 1 + (2 / pi) (D - 1), because E |o_1 o_2| = (2 / pi) / D.  Hence
#
#     Var = k^2 (rho^2 (1 + (2 / pi) (D - 1)) + (1 - rho^2) (1 - 2 / pi)) - rho^2,
#
# close to (pi / 2 - 1) / D for small rho: 2.75 times less.  For a residual of any length multiply by |r|^2.

_PROJECTIONS = {"gaussian": gaussian_projection, "orthogonal": orthogonal_projection}


def _prod_variance_law(kind, size, rho):
    if kind == "gaussian":
        return (np.pi / 2 - rho**2) / size
    k = orthogonal_projection(size, 0).unbiasing
    return k**2 * (rho**2 * (1 + 2 / np.pi * (size - 1)) + (1 - rho**2) * (1 - 2 / np.pi)) - rho**2


def _prod_estimates(rng, samples, kind, bits, size, rotations):
    """(<y, x_hat> [samples, 6], <y, x> [6], the residual of the first stage [6, size], y [6, size]).

    x has the norm sqrt(size), so that the scale of the first stage is 1.  One rotation per sample, or one for all.
    """
    x = fixed_vectors(size) * size**0.5
    y, first = _other_vectors(fixed_vectors(size)), int(rng.integers(2**32))
    estimates, rotation = np.empty((samples, len(x))), haar(size, first)
    for i in range(samples):
        if rotations:
            rotation = haar(size, first + i)
        projection = _PROJECTIONS[kind](size, first + i)
        encoded = encode_prod(x[None, None], rotation, projection, bits)
        estimates[i] = (decode_prod(encoded, rotation, projection)[0, 0] * y).sum(axis=-1)
    residual = x if encoded.first is None else x - decode(encoded.first, rotation)[0, 0]
    return estimates, (x * y).sum(axis=-1), residual, y


def _prod_unbiased(rng, samples, rotations):
    cases = {}
    for kind in _PROJECTIONS:
        for bits in (1, 2, 4):
            estimates, exact, residual, _ = _prod_estimates(rng, samples, kind, bits, 32, rotations)
            # float16 of the residual's norm
            rounding = _HALF * 32**0.5 if rotations else _HALF * np.linalg.norm(residual, axis=-1)
            cases[f"{kind}, {bits} bits"] = expectation(estimates, exact, allowance=rounding)
    return weakest(cases)


def _prod_variance(rng, samples, kind):
    cases = {}
    for bits in (1, 2, 4):
        estimates, exact, residual, y = _prod_estimates(rng, samples, kind, bits, 32, False)
        length = np.linalg.norm(residual, axis=-1)
        law = length**2 * _prod_variance_law(kind, 32, (residual * y).sum(axis=-1) / length)
        cases[f"{bits} bits"] = variance(estimates, law, mean=exact, allowance=3 * _HALF * law)
    return weakest(cases)


def _sign_estimates(rng, samples, size):
    """(<y, x> from the sign plane and r, r) [samples, 6], of unit vectors; the plane is that of 3 bits."""
    x, first = fixed_vectors(size), int(rng.integers(2**32))
    y = _other_vectors(x)
    estimates, scalars = np.empty((samples, len(x))), np.empty((samples, len(x)))
    for i in range(samples):
        rotation = haar(size, first + i)
        sign, r = encode(x[None, None], rotation, 3).planes.sign, rescale(x[None, None], rotation)
        estimates[i], scalars[i] = np.diag(sign_logits(y[None], sign, r, rotation, scale=1.0)[0]), r[0, 0]
    return estimates, scalars


def _sign_unbiased(rng, samples):
    return weakest({f"head_dim {size}": expectation(_sign_estimates(rng, samples, size)[0], _COSINE, allowance=_HALF)
                    for size in _SIZES})


def _sign_variance(rng, samples):
    """|v|^2 = r^2 D for v = r sign(o), so |v_|_|^2 = r^2 D - 1."""
    cases = {}
    for size in _SIZES:
        estimates, r = _sign_estimates(rng, samples, size)
        law = (1 - _COSINE**2) / (size - 1) * (r**2 * size - 1)
        cases[f"head_dim {size}"] = expectation((estimates - _COSINE) ** 2 / law.mean(), law.mean(axis=0) / law.mean(),
                                                allowance=8 * _HALF)
    return weakest(cases)


# --- Statements about every single vector ---


def _rotation(rng, padded=False):
    """(head_dim, a rotation): Haar or Hadamard, of sizes in use; larger than head_dim if `padded`."""
    seed = int(rng.integers(2**32))
    size = int(rng.choice([32, 64, 96, 128]))
    made = haar(size, seed) if size in (32, 96) or rng.random() < 0.3 else hadamard(size, seed, int(rng.integers(1, 4)))
    return int(rng.integers(1, size + 1)) if padded else size, made


def _vectors(rng, head_dim, shape=(2, 2, 3)):
    """Sparse and ordinary vectors, some with an outlier channel, of norms for which s is a normal float16."""
    x = rng.standard_normal((*shape, head_dim))
    x[..., rng.integers(head_dim)] *= rng.choice([1, 100])
    x *= rng.random(x.shape) < rng.choice([0.1, 1.0])
    x[..., 0] += np.all(x == 0, axis=-1)
    return x * (head_dim**0.5 / np.linalg.norm(x, axis=-1, keepdims=True) * 2.0 ** rng.uniform(-6, 6, (*shape, 1)))


def _keeps(rng, samples, scale_mode, quantity):
    """Relative deviation of quantity(x, x_hat) from n^2; s is rounded to float16."""
    deviation = []
    for case in range(samples):
        head_dim, rotation = _rotation(rng)
        x = _vectors(rng, head_dim)
        x_hat = decode(encode(x, rotation, 1 + case % 8, scale_mode=scale_mode), rotation)
        deviation.append(np.abs(quantity(x, x_hat) / (x * x).sum(axis=-1) - 1).max())
    return deviation


def _keeps_norm(rng, samples):
    def norms(x, x_hat):
        return np.linalg.norm(x, axis=-1) * np.linalg.norm(x_hat, axis=-1)

    return identity(_keeps(rng, samples, "nc", norms), _HALF + 1e-12)


def _keeps_inner_product(rng, samples):
    return identity(_keeps(rng, samples, "unbiased", lambda x, x_hat: (x * x_hat).sum(axis=-1)), _HALF + 1e-12)


def _least_squares(rng, samples):
    excess = []
    for case in range(samples):
        head_dim, _ = _rotation(rng)
        y = _vectors(rng, head_dim)
        y /= np.linalg.norm(y, axis=-1, keepdims=True)
        code = _rotated_code(y, 1 + case % 8, "mse")
        error = ((y - code) ** 2).sum(axis=-1)
        for factor in (0.9, 0.999, 1.001, 1.1):
            excess.append((error - ((y - factor * code) ** 2).sum(axis=-1)).max())
    return bound(excess, 1e-14, samples=samples)


def _one_bit_is_rabitq(rng, samples):
    """The sign plane is the same for all bits, s c_0 = r in "unbiased", and the two estimate the same logits."""
    cases = {"plane": [], "scalar": [], "logits": []}
    for _ in range(samples):
        head_dim, rotation = _rotation(rng)
        x, query = _vectors(rng, head_dim), rng.standard_normal((2, 4, head_dim))
        one, r = encode(x, rotation, 1, scale_mode="unbiased"), rescale(x, rotation)
        cases["plane"] += [np.sum(encode(x, rotation, bits).planes.sign != one.planes.sign) for bits in (2, 3, 8)]
        c_0 = codebook_for(1, head_dim).centroids[0]
        cases["scalar"].append(np.abs(one.scale.astype(np.float64) * c_0 / r.astype(np.float64) - 1).max())
        estimates = sign_logits(query, one.planes.sign, r, rotation)
        error = np.abs(estimates - logits(query, one, rotation)) - 2.1 * _HALF * np.abs(estimates)
        cases["logits"].append(error.max() / np.abs(estimates).max())
    return weakest({"plane": identity(cases["plane"]), "scalar": identity(cases["scalar"], 2.1 * _HALF),
                    "logits": bound(cases["logits"], 1e-12)})


def _equivariance(rng, samples):
    differences = []
    for case in range(samples):
        head_dim, rotation = _rotation(rng)
        x, a, bits = _vectors(rng, head_dim), int(rng.integers(-4, 5)), 1 + case % 8
        mode = SCALE_MODES[case // 8 % 4]
        plain, scaled, negated = (encode(factor * x, rotation, bits, scale_mode=mode) for factor in (1, 2.0**a, -1))
        differences += [np.sum(plane != scaled.planes.arrays()[name]) for name, plane in plain.planes.arrays().items()]
        differences.append(np.sum(scaled.scale != plain.scale * np.float16(2.0**a)))
        (signs, magnitudes), opposite = (bit_planes.unpack(e.planes, head_dim) for e in (plain, negated))
        zero = _rotated(x, rotation)[0] == 0                                    # has the sign bit 0 in both
        differences += [np.sum((signs == opposite[0]) != zero), np.sum(magnitudes != opposite[1]),
                        np.sum(plain.scale != negated.scale)]
    return identity(differences)


def _token_by_token(rng, samples):
    """Hadamard rotations: a matrix product may round differently with the number of its rows."""
    differences = []
    for case in range(samples):
        size = int(rng.choice([32, 64, 128]))
        rotation, x, bits = hadamard(size, int(rng.integers(2**32))), _vectors(rng, size), 1 + case % 8
        whole = encode(x, rotation, bits)
        parts = [encode(x[:, :, t : t + 1], rotation, bits) for t in range(x.shape[2])]
        joined = bit_planes.concatenate(part.planes for part in parts).arrays()
        differences += [np.sum(plane != joined[name]) for name, plane in whole.planes.arrays().items()]
        differences.append(np.sum(whole.scale != np.concatenate([part.scale for part in parts], axis=2)))
    return identity(differences)


def _float32_distance(rng, samples):
    """z by float32 arithmetic: butterflies as kernels do them, or sums over a Haar matrix in plain order."""
    distance = []
    for _ in range(samples):
        head_dim, rotation = _rotation(rng)
        x = _vectors(rng, head_dim).astype(np.float32)
        y = x
        if rotation.kind == "haar":
            y = np.zeros_like(x)
            for column, row in zip(np.moveaxis(x, -1, 0), rotation.matrix.T.astype(np.float32)):
                y = y + column[..., None] * row
        else:
            for signs in rotation.signs:
                y = walsh_hadamard(y * signs.astype(np.float32)) * np.float32(head_dim**-0.5)
        norm = np.sqrt((x * x).sum(axis=-1, keepdims=True, dtype=np.float32))
        z = y * (np.float32(head_dim**0.5) / norm)
        _, exact = _normalised(_rotated(x, rotation)[0])
        distance.append(np.abs(z - exact).max())
    return bound(distance, ROUNDING_DISTANCE)


def _attention_problem(rng):
    """(query, keys, values, their rotations, lengths): small, ragged, grouped; keys with a large mean."""
    (head_dim, key_rotation), (_, value_rotation) = _rotation(rng, padded=True), _rotation(rng)
    if value_rotation.head_dim < head_dim:
        value_rotation = hadamard(128, value_rotation.seed)
    batch, kv_heads, group, tokens = (int(rng.integers(1, high)) for high in (3, 3, 5, 30))
    query = rng.standard_normal((batch, kv_heads * group, head_dim)) * rng.choice([0.3, 1.0, 3.0])
    keys, values = rng.standard_normal((2, batch, kv_heads, tokens, head_dim))
    keys[..., rng.integers(head_dim)] += 5
    return query, keys, values, key_rotation, value_rotation, rng.integers(0, tokens + 1, batch)


def _attention_allowance(query, keys, values):
    """Error of (output, lse): a logit is a sum of head_dim products after a rotation, whose relative error in norm is
    at most 2^-52 head_dim^1.5; errors of logits are relative errors of weights, and sums over tokens add roundings."""
    head_dim, tokens = query.shape[-1], keys.shape[2]
    norms = np.linalg.norm(query, axis=-1).max() * np.linalg.norm(keys, axis=-1).max(initial=0) * head_dim**-0.5
    error = 2.0**-52 * (4 * 128**1.5 * (norms + 1) + tokens)
    return 4 * error * np.linalg.norm(values, axis=-1).max(initial=0), 2 * error


def _compared(actual, expected, allowances):
    """[(largest difference, allowance)] of two (output, lse), where equal infinities do not differ."""
    pairs = []
    for one, other, allowance in zip(actual, expected, allowances):
        same = one == other
        pairs.append((np.abs(np.where(same, 0.0, one) - np.where(same, 0.0, other)).max(initial=0), allowance))
    return pairs


def _attention_agreement(rng, samples, compare):
    pairs = [pair for _ in range(samples) for pair in compare(rng, *_attention_problem(rng))]
    return identity(*np.transpose(pairs), samples=samples)


def _encoded_pair(rng, keys, values, key_rotation, value_rotation, mean=None):
    key_bits, value_bits = rng.integers(1, 9, 2)
    return (encode(keys, key_rotation, int(key_bits), scale_mode=str(rng.choice(SCALE_MODES)), mean=mean),
            encode(values, value_rotation, int(value_bits)))


def _attention_on_codes(rng, query, keys, values, key_rotation, value_rotation, lengths):
    stored = _encoded_pair(rng, keys, values, key_rotation, value_rotation)
    decoded = decode(stored[0], key_rotation), decode(stored[1], value_rotation)
    scale = None if rng.random() < 0.5 else 0.2
    actual = decode_attention(query, *stored, key_rotation, value_rotation, lengths=lengths, scale=scale)
    expected = attention.decode(query, *decoded, lengths=lengths, scale=scale)
    return _compared(actual, expected, _attention_allowance(query, *decoded))


def _split_and_merge(rng, query, keys, values, key_rotation, value_rotation, lengths):
    stored = _encoded_pair(rng, keys, values, key_rotation, value_rotation)
    whole = decode_attention(query, *stored, key_rotation, value_rotation, lengths=lengths)
    cut = int(rng.integers(0, keys.shape[2] + 1))
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        encoded = [Encoded(Planes.of({name: plane[:, :, part] for name, plane in one.planes.arrays().items()}),
                           one.scale[:, :, part], one.head_dim) for one in stored]
        inside = np.clip(lengths - (part.start or 0), 0, encoded[0].scale.shape[2])
        parts.append(decode_attention(query, *encoded, key_rotation, value_rotation, lengths=inside))
    merged = attention.merge(*map(np.stack, zip(*parts)))
    return _compared(merged, whole, _attention_allowance(query, keys, values))


def _logits_on_codes(rng, query, keys, values, key_rotation, value_rotation, lengths):
    """logits, and those of prod, against products with the decoded keys."""
    pairs = []
    encoded, _ = _encoded_pair(rng, keys, values, key_rotation, value_rotation)
    projection = _PROJECTIONS[rng.choice(list(_PROJECTIONS))](key_rotation.head_dim, int(rng.integers(2**32)))
    prod = encode_prod(keys, key_rotation, projection, int(rng.integers(1, 9)))
    for actual, decoded in (
            (logits(query, encoded, key_rotation), decode(encoded, key_rotation)),
            (logits_prod(query, prod, key_rotation, projection), decode_prod(prod, key_rotation, projection))):
        grouped = np.repeat(decoded, query.shape[1] // keys.shape[1], axis=1)
        expected = query.shape[-1] ** -0.5 * np.einsum("bhd,bhtd->bht", query, grouped)
        pairs += _compared([actual], [expected], _attention_allowance(query, decoded, values)[1:])
    return pairs


def _centring(rng, query, keys, values, key_rotation, value_rotation, lengths):
    """Codes of k - mu, and what they give against exact attention over keys to which mu was added back."""
    mean = keys.mean(axis=2) if rng.random() < 0.5 else keys.mean(axis=(0, 2))         # [batch,] kv_heads, head_dim
    stored = _encoded_pair(rng, keys, values, key_rotation, value_rotation, mean=mean)
    subtracted = encode(keys - mean[..., None, :], key_rotation, stored[0].bits).planes.arrays()
    codes = [(np.sum(plane != subtracted[name]), 0.0) for name, plane in stored[0].planes.arrays().items()]
    decoded = decode(stored[0], key_rotation) + mean[..., None, :], decode(stored[1], value_rotation)
    rotations = key_rotation, value_rotation
    output, lse = decode_attention(query, *stored, *rotations, lengths=lengths)
    raised = decode_attention(query, *stored, *rotations, lengths=lengths, key_mean=mean)
    grouped = query.reshape(len(query), keys.shape[1], -1, query.shape[-1])
    constant = query.shape[-1] ** -0.5 * (grouped * mean[..., None, :]).sum(axis=-1).reshape(lse.shape)
    expected, allowances = attention.decode(query, *decoded, lengths=lengths), _attention_allowance(query, *decoded)
    return codes + _compared((output, lse + constant), expected, allowances) + _compared(raised, expected, allowances)


CLAIMS = (
    Claim("distortion",
          "E |x - x_hat|^2 / |x|^2 is the distortion of the codebook under the law of one coordinate, for 1 to 8 bits, "
          "plain, whatever x is; it tends to 0.3634, 0.1175, 0.03455, 0.009501, ... as head_dim grows",
          "TurboQuant arXiv 2504.19874, Theorem 1", "expectation", _distortion, samples=2000),
    Claim("distortion bounds", "4^-b <= E |x - x_hat|^2 / |x|^2 <= sqrt(3) pi / 2 4^-b for 1 to 8 bits, plain",
          "TurboQuant arXiv 2504.19874, Theorems 1 and 3", "expectation", _distortion_bounds, samples=2000),
    Claim("shrinkage of plain",
          "E <y, x_hat> = E z c(z) <y, x>, which is (1 - D(b)) <y, x> for the sphere's own codebook",
          "derived in reference/turboquant.py", "expectation", partial(_shrinkage, scale_mode="plain"), samples=2000),
    Claim("shrinkage of mse", "E <y, x_hat> = (1 - D(b)) <y, x>, up to a term of order 1 / head_dim",
          "derived in reference/turboquant.py; EDEN arXiv 2604.18555", "expectation",
          partial(_shrinkage, scale_mode="mse"), samples=2000),
    Claim("shrinkage of nc", "E <y, x_hat> = sqrt(1 - D(b)) <y, x>, up to a term of order 1 / head_dim",
          "derived in reference/turboquant.py", "expectation", partial(_shrinkage, scale_mode="nc"), samples=2000),
    Claim("unbiased", "E <y, x_hat> = <y, x> in the mode unbiased, for every head_dim, codebook, x and y",
          "EDEN arXiv 2604.18555; RaBitQ arXiv 2405.12497, Theorem 3.2", "expectation", _unbiased, samples=2000),
    Claim("variance of unbiased",
          "Var <y, x_hat> = |y|^2 (1 - rho^2) / (D - 1) E |x - x_hat|^2, rho the cosine of x and y",
          "derived in reference/turboquant.py", "expectation", _unbiased_variance, samples=2000),
    Claim("prod unbiased over S", "E <y, x_hat> = <y, x> for one rotation, gaussian and orthogonal S, 1, 2 and 4 bits",
          "TurboQuant arXiv 2504.19874, Theorem 2; orthogonal: derived at Projection.unbiasing", "expectation",
          partial(_prod_unbiased, rotations=False)),
    Claim("prod unbiased over S and R", "E <y, x_hat> = <y, x> over both, gaussian and orthogonal S, 1, 2 and 4 bits",
          "TurboQuant arXiv 2504.19874, Theorem 2", "expectation", partial(_prod_unbiased, rotations=True)),
    Claim("variance of prod, gaussian S",
          "Var <y, x_hat> = (pi / 2 |r|^2 |y|^2 - <r, y>^2) / D, r the residual of the first stage",
          "derived in reference/turboquant.py; TurboQuant arXiv 2504.19874, Lemma 4 bounds it", "expectation",
          partial(_prod_variance, kind="gaussian"), samples=2000),
    Claim("variance of prod, orthogonal S",
          "Var <y, x_hat> = |r|^2 |y|^2 (k^2 (rho^2 (1 + (2 / pi) (D - 1)) + (1 - rho^2) (1 - 2 / pi)) - rho^2), "
          "rho the cosine of r and y: 2.75 times less for small rho",
          "derived in reference/turboquant.py", "expectation", partial(_prod_variance, kind="orthogonal"),
          samples=2000),
    Claim("sign plane unbiased", "E r <sign R x, R y> = <x, y>, r = |x|^2 / |R x|_1: the sign plane is a RaBitQ code",
          "RaBitQ arXiv 2405.12497, Theorem 3.2", "expectation", _sign_unbiased, samples=2000),
    Claim("sign plane variance", "Var = (1 - rho^2) / (D - 1) E (r^2 D - 1) for unit vectors",
          "RaBitQ arXiv 2405.12497, Theorem 3.2; derived in reference/turboquant.py", "expectation", _sign_variance,
          samples=2000),
    Claim("one bit is RaBitQ", "the sign plane is the same for all bits; with 1 bit, s c_0 = r in the mode unbiased",
          "EDEN arXiv 2604.18555", "identity", _one_bit_is_rabitq, samples=60),
    Claim("nc keeps the norm", "|x_hat| = |x| up to the rounding of s", "definition", "identity", _keeps_norm,
          samples=200),
    Claim("unbiased keeps the inner product", "<x, x_hat> = |x|^2 up to the rounding of s", "definition", "identity",
          _keeps_inner_product, samples=200),
    Claim("mse is least squares", "no other s has a smaller |x - x_hat| in the mode mse, before s is rounded",
          "EDEN arXiv 2604.18555", "bound", _least_squares, samples=200),
    Claim("equivariance",
          "2^a x has the codes of x and 2^a times its s; -x has the opposite signs, the same magnitudes and the same s",
          "definition", "identity", _equivariance, samples=200),
    Claim("token by token", "tokens encoded one by one have the codes and scales of tokens encoded together",
          "definition", "identity", _token_by_token, samples=100),
    Claim("float32 rounding", "z by float32 arithmetic is within 2e-5 of z: codes differ nowhere else",
          "derived: some tens of additions in a row, each off by 2^-24 of numbers near 1", "bound",
          _float32_distance, samples=200),
    Claim("attention on codes", "decode_attention gives what attention over the decoded keys and values gives",
          "definition", "identity", partial(_attention_agreement, compare=_attention_on_codes), samples=200),
    Claim("split and merge", "parts of the tokens merge to output and lse of the whole",
          "Milakov and Gimelshein arXiv 1805.02867, section 3.1", "identity",
          partial(_attention_agreement, compare=_split_and_merge), samples=200),
    Claim("logits on codes", "logits and logits_prod are products of the query with decoded keys",
          "definition", "identity", partial(_attention_agreement, compare=_logits_on_codes), samples=200),
    Claim("centring",
          "keys coded as k - mu give the output of keys decoded with mu added back, and a lse lower by scale <q, mu>, "
          "which key_mean adds",
          "textbook: softmax is invariant to a constant", "identity", partial(_attention_agreement, compare=_centring),
          samples=200),
)
