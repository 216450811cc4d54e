"""RaBitQ index: one bit per rotated coordinate of a key, and one scalar, that estimate its product with any query.

For a key k and queries q of its KV head, both after RoPE, with frozen centroids c_k and c_q and an orthogonal R:

    k~ = k - c_k,   q~ = q - c_q,   y = R k~,   q' = R q~,   S = sign(y),   r = |k~|^2 / |y|_1,   a = <c_q, k~>
    <q, k> = <q~, k~> + a + <q, c_k>,          estimate of it = r <S, q'> + a + <q, c_k>.

Stored are the sign plane of `planes` (18 bytes a key with r at head_dim 128) and a if queries are centred: of a codec
whose sign plane codes the same k~, r alone.  Sources: RaBitQ, arXiv 2405.12497 (estimator); RaBitQCache, arXiv
2606.31519 (index of a key-value cache).  Keys and values themselves stay as they are: scores only rank tokens.

**The query in integers.**  <S, q'> is replaced by Z, from integers that every backend computes exactly:

    4 bits   q'_i = D u_i + v with u_i in 0 ... 15, v = min q', D = (max q' - v) / 15;   Z = D I + v E,
             I = <S, u> = sum u - 2 sum_j 2^j popc(negative AND bit j of u),   E = <S, 1> = size - 2 popc(negative)
    8 bits   q'_i = D w_i with |w_i| <= 127, D = max|q'| / 127;                           Z = D <S, w>
    16       Z = <S, q'>, the query in floating point

u_i is rounded to nearest, or at random: floor(t + xi), t = (q'_i - v) / D, which is unbiased given R.

**What is unbiased.**  Over Haar rotations, with alpha = <S, y> / (sqrt(size) |k~|) and rho the cosine of k~ and q~,

    (estimate - exact) / (|k~| |q~|) = sqrt(1 - rho^2) sqrt(1 - alpha^2) / alpha X,     E X = 0,
    X^2 ~ Beta(1/2, (size - 2) / 2) independent of alpha,     Var X = 1 / (size - 1)         (RaBitQ, Theorem 3.2).

For every orthogonal R, |estimate - exact| <= |q_|_| |k~| sqrt(1/alpha^2 - 1), q_|_ the part of q~ orthogonal to k~.
One Hadamard round is not unbiased: for k = 2 e_1 + e_2 the estimate of <k, e_1> is 1.25 times too large and that of
<k, e_2> is 0, whatever its signs.  Three rounds come within 0.01 of |k| |q|.  Exp of an estimate, softmax weights and
Top-p masses are not unbiased either; `selection` corrects for that with

    sigma_t = scale sqrt(size) r_t kappa,     kappa^2 = (1 - E alpha^2) |q~|^2 / (size - 1) + (D^2/12, /6 if random).

**Incremental encoding is batch encoding, bit for bit**: centroids are frozen, and tokens are encoded in blocks of 128
that begin at multiples of 128, because a product of matrices may round differently with the number of its rows.

A zero key has code 0 and r = 0.  A key that holds NaN or Inf has code 0 and r = NaN: its logits are NaN and it is never
selected; no other token is affected.  r and a saturate at 65504.  A query that is not finite has logits NaN.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import special, stats

from . import planes as bit_planes
from . import turboquant
from .claim import Claim, bound, distribution, expectation, identity, tail, variance, weakest
from .codebook import gamma_ratio
from .rotation import Rotation, haar, hadamard, rotate, walsh_hadamard
from .selection import Scores, gaussian_mass, middle, top_p
from .turboquant import LARGEST_SCALE, sign_logits

BLOCK = 128                        # tokens encoded at once
QUERY_BITS = (4, 8, 16)
ROUNDINGS = ("nearest", "random")
EPSILON = 1.9                      # of the error bound, the public library's default


@dataclass(frozen=True, eq=False)
class Encoded:
    """Keys [batch, kv_heads, tokens, head_dim] as an index.

    sign         [batch, kv_heads, tokens, words] uint32, the sign plane of `planes`, 1 where negative
    rescale      [batch, kv_heads, tokens] float16, r
    offset       [batch, kv_heads, tokens] float16, a, or None without a query centroid
    key_mean     [batch, kv_heads, head_dim] float32, c_k, or None for 0
    query_mean   [batch, kv_heads, head_dim] float32, c_q, or None for 0
    head_dim     of the keys
    """

    sign: np.ndarray
    rescale: np.ndarray
    offset: np.ndarray | None
    key_mean: np.ndarray | None
    query_mean: np.ndarray | None
    head_dim: int

    @property
    def nbytes(self) -> int:
        """Of what grows with the tokens; the centroids are not counted."""
        return self.sign.nbytes + self.rescale.nbytes + (0 if self.offset is None else self.offset.nbytes)


@dataclass(frozen=True, eq=False)
class Query:
    """Rotated queries as integers: q'_i = step codes_i + low.

    codes   [batch, q_heads, size] uint8 from 0 to 15 (4 bits) or int8 from -127 to 127 (8 bits)
    step    [batch, q_heads] float32, NaN for a query that is not finite
    low     [batch, q_heads] float32, 0 for 8 bits
    """

    codes: np.ndarray
    step: np.ndarray
    low: np.ndarray


# --- Centroids -------------------------------------------------------------------------------------------------------


def block_sums(x, kv_heads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(sums [batch, kv_heads, blocks, head_dim] float64, counts [batch, kv_heads, blocks]) of blocks of 128 tokens.

    x : [batch, heads, tokens, head_dim], keys, or queries of a prompt whose heads h // (heads // kv_heads) share a sum

    Tokens with NaN or Inf are left out.  Sums of chunks that end at multiples of 128 are those of the whole.
    """
    x = _four("x", x)
    batch, heads, tokens, head_dim = x.shape
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"rabitq: kv_heads: expected a divisor of {heads} heads, got {kv_heads!r}")
    blocks = -(-tokens // BLOCK)
    padded = np.full((batch, kv_heads, heads // kv_heads, blocks * BLOCK, head_dim), np.nan)
    padded[..., :tokens, :] = x.reshape(batch, kv_heads, heads // kv_heads, tokens, head_dim)
    padded = np.moveaxis(padded.reshape(*padded.shape[:3], blocks, BLOCK, head_dim), 2, 3)       # tokens of all heads
    finite = np.isfinite(padded).all(axis=-1)
    sums = np.where(finite[..., None], padded, 0.0).sum(axis=(-3, -2))
    return sums, finite.sum(axis=(-2, -1))


def centroid(sums, counts) -> np.ndarray:
    """The mean of the tokens, [batch, kv_heads, head_dim] float32: blocks in ascending order; 0 of no tokens."""
    total = np.zeros((*np.shape(sums)[:2], np.shape(sums)[3]))
    for block in range(np.shape(sums)[2]):
        total += sums[:, :, block]
    mean = total / np.maximum(np.sum(counts, axis=-1), 1)[..., None]
    return np.clip(mean, -np.finfo(np.float32).max, np.finfo(np.float32).max).astype(np.float32)


# --- Keys ------------------------------------------------------------------------------------------------------------


def encode(keys, rotation: Rotation, *, key_mean=None, query_mean=None, check_finite: bool = False) -> Encoded:
    """S and r (and a) of keys.

    keys         : [batch, kv_heads, tokens, head_dim], any real dtype, after RoPE
    rotation     : of size head_dim, or of a larger multiple of 32, to which keys are padded with zeros
    key_mean     : c_k, [kv_heads, head_dim] or [batch, kv_heads, head_dim]        query_mean : c_q, likewise
    check_finite : raise ValueError where keys hold NaN or Inf, instead of r = NaN there

    Tokens are encoded in blocks of 128 from the first one on, so any split at multiples of 128 gives the same bits.
    Source: RaBitQ, arXiv 2405.12497, section 3.1 (code) and Theorem 3.2 (estimator, from which r).
    """
    keys = _four("keys", keys)
    batch, kv_heads, tokens, head_dim = keys.shape
    key_mean, query_mean = (None if mean is None else _mean(name, mean, (batch, kv_heads, head_dim))
                            for name, mean in (("key_mean", key_mean), ("query_mean", query_mean)))
    if check_finite and not np.isfinite(keys).all():
        first = np.argwhere(~np.isfinite(keys).all(axis=-1))[0].tolist()
        raise ValueError(f"rabitq: keys: expected finite numbers, got NaN or Inf, the first at [batch, kv_head, token] "
                         f"= {first}")
    parts = [[], [], []]
    for first in range(0, tokens, BLOCK):
        block = np.zeros((batch, kv_heads, BLOCK, head_dim))             # always the same number of rows
        count = min(BLOCK, tokens - first)
        block[:, :, :count] = keys[:, :, first : first + count]
        arrays = (turboquant.encode(block, rotation, 1, mean=key_mean).planes.sign,              # nu: y < 0
                  turboquant.rescale(block, rotation, mean=key_mean),                            # r = n^2 / |y|_1
                  _offset(block, key_mean, query_mean))                                          # a = <c_q, k~>
        for part, array in zip(parts, arrays):
            part.append(array[:, :, :count])
    empty = turboquant.encode(keys[:, :, :0], rotation, 1).planes.sign, np.zeros((batch, kv_heads, 0), np.float16)
    sign, rescale, offset = (np.concatenate([nothing, *part], axis=2)
                             for nothing, part in zip((*empty, empty[1]), parts))
    return Encoded(sign, rescale, None if query_mean is None else offset, key_mean, query_mean, head_dim)


def _offset(keys, key_mean, query_mean):
    """a = <c_q, k~>, float16, saturating; NaN for a key that is not finite."""
    if query_mean is None:
        return np.zeros(keys.shape[:3], np.float16)
    centred = keys if key_mean is None else keys - key_mean.astype(np.float64)[:, :, None]
    centred = np.where(np.isfinite(keys).all(axis=-1, keepdims=True), centred, np.nan)
    return np.clip((centred * query_mean.astype(np.float64)[:, :, None]).sum(axis=-1), -LARGEST_SCALE,
                   LARGEST_SCALE).astype(np.float16)


# --- Queries ---------------------------------------------------------------------------------------------------------


def rotate_query(query, encoded: Encoded, rotation: Rotation) -> np.ndarray:
    """q' = R (q - c_q), [batch, q_heads, size] float32: what is quantised.  q is padded as keys were."""
    centred = _centred(query, encoded)
    padding = [(0, 0), (0, 0), (0, rotation.head_dim - encoded.head_dim)]
    with np.errstate(invalid="ignore", over="ignore"):
        return rotate(np.pad(centred, padding), rotation).astype(np.float32)


def quantise_query(rotated, query_bits: int = 4, *, rounding: str = "nearest", seed: int = 0, step: int = 0) -> Query:
    """The integers of rotated queries [batch, q_heads, size] float32, by float32 arithmetic in this order.

    query_bits : 4 or 8        rounding : "nearest" (ties to even) or "random" (4 bits only), from seed and step

    A function of the float32 numbers alone, so backends that agree on them agree on the codes.
    Source: RaBitQ, arXiv 2405.12497, section 3.3.1 (randomised rounding).
    """
    if query_bits not in (4, 8):
        raise ValueError(f"rabitq: query_bits: expected 4 or 8 for a query in integers, got {query_bits!r}")
    if rounding not in ROUNDINGS or rounding == "random" and query_bits != 4:
        raise ValueError(f"rabitq: rounding: expected 'nearest', or 'random' for 4 bits, got {rounding!r} for "
                         f"{query_bits} bits")
    q = np.asarray(rotated)
    if q.ndim != 3 or q.dtype != np.float32 or q.shape[-1] == 0:
        raise ValueError(f"rabitq: rotated: expected float32 [batch, q_heads, size], got {q.dtype} {list(q.shape)}")
    f = np.float32
    with np.errstate(all="ignore"):
        if query_bits == 8:
            delta = np.abs(q).max(axis=-1) / f(127)
            low, t = np.zeros_like(delta), q / delta[..., None]
        else:
            low, high = q.min(axis=-1), q.max(axis=-1)
            delta, inverse = (high - low) / f(15), f(15) / (high - low)
            # Of equal coordinates, and of a range below 15 / 3.4e38, whose inverse overflows, all codes are 0.
            t = (q - low[..., None]) * np.where(np.isfinite(inverse), inverse, f(0))[..., None]
        if rounding == "random":
            t = np.floor(t + dither(q.shape, seed, step))
        smallest, largest, dtype = (0, 15, np.uint8) if query_bits == 4 else (-127, 127, np.int8)
        usable = np.isfinite(q).all(axis=-1) & np.isfinite(delta)
        codes = np.clip(np.rint(np.where(usable[..., None] & np.isfinite(t), t, f(0))), smallest, largest).astype(dtype)
    return Query(codes, np.where(usable, delta, f(np.nan)), np.where(usable, low, f(np.nan)))


def dither(shape: tuple[int, int, int], seed: int = 0, step: int = 0) -> np.ndarray:
    """xi in [0, 1), multiples of 2^-24, float32: a hash of (seed, step, batch, q_head, coordinate) of `shape`.

    Counter 1 + i + size (head + heads (sequence + batch step)) times the golden ratio, through lowbias32 (public hash
    by C. Wellons), modulo 2^32.
    """
    counter = 1 + np.arange(np.prod(shape), dtype=np.uint64).reshape(shape) + np.uint64(int(np.prod(shape)) * int(step))
    x = (np.uint64(seed) + np.uint64(0x9E3779B9) * (counter & np.uint64(0xFFFFFFFF))).astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x = x * np.uint32(factor)
    x ^= x >> np.uint32(16)
    return (x >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def sign_products(codes, sign) -> np.ndarray:
    """<S, codes> exactly, int64 [batch, q_heads, tokens]: sum of codes - 2 sum of the codes where the key is negative.

    codes : [batch, q_heads, size] integers        sign : [batch, kv_heads, tokens, words] uint32
    """
    rows = _by_kv_head(codes.astype(np.int64), sign)
    negative = bit_planes.unpack_bits(sign, codes.shape[-1]).astype(np.int64)
    products = rows.sum(axis=-1)[..., None] - 2 * rows @ np.swapaxes(negative, -1, -2)
    return products.reshape(*codes.shape[:2], sign.shape[2])


def popcount_products(codes, sign) -> np.ndarray:
    """As `sign_products`, of codes from 0 to 15, by population counts: U - 2 X, X = sum_j 2^j popc(negative AND u^(j)).

    Source: RaBitQ, arXiv 2405.12497, section 3.3.2.
    """
    u = _by_kv_head(codes.astype(np.uint8), sign)
    total = u.sum(axis=-1, dtype=np.int64)[..., None]
    for j in range(4):
        plane = bit_planes.pack_bits(u >> np.uint8(j) & np.uint8(1))                 # [batch, kv_heads, group, words]
        both = plane[:, :, :, None] & sign[:, :, None]                               # [..., group, tokens, words]
        total = total - 2 * (np.bitwise_count(both).sum(axis=-1, dtype=np.int64) << j)
    return total.reshape(*codes.shape[:2], sign.shape[2])


# --- Scores ----------------------------------------------------------------------------------------------------------


def logits(query, encoded: Encoded, rotation: Rotation, *, query_bits: int = 4, rounding: str = "nearest",
           seed: int = 0, step: int = 0, scale=None) -> np.ndarray:
    """scale (r Z + a + <q, c_k>), [batch, q_heads, tokens] float64: an estimate of scale <q, k>.

    query : [batch, q_heads, head_dim], not rotated; q_heads a multiple of kv_heads
    query_bits : 4, 8, or 16 for a query in floating point        rounding, seed, step : see `quantise_query`
    scale : default head_dim ** -0.5
    """
    scale = encoded.head_dim**-0.5 if scale is None else float(scale)
    _check_query_bits(query_bits)
    with np.errstate(invalid="ignore"):
        if query_bits == 16:
            estimate = sign_logits(_centred(query, encoded), encoded.sign, encoded.rescale, rotation, scale=1.0)
        else:
            code = quantise_query(rotate_query(query, encoded, rotation), query_bits, rounding=rounding, seed=seed,
                                  step=step)
            estimate = _per_query_head(encoded.rescale, query) * _products(code, encoded.sign)        # r Z
        if encoded.offset is not None:
            estimate = estimate + _per_query_head(encoded.offset, query)                              # + a
        return scale * (estimate + _constant(query, encoded)[..., None])                              # + <q, c_k>


def sigma(query, encoded: Encoded, rotation: Rotation, *, query_bits: int = 4, rounding: str = "nearest",
          scale=None) -> np.ndarray:
    """The standard deviation of `logits` about the exact ones, [batch, q_heads, tokens] float64: r_t kappa.

    kappa^2 = scale^2 size ((1 - E alpha^2) |q~|^2 / (size - 1) + rounding of the query), rounding D^2 / 12, or D^2 / 6
    at random.  The factor 1 - rho^2 of the law is left out, and alpha^2 of each key is replaced by its mean.
    """
    scale, size = encoded.head_dim**-0.5 if scale is None else float(scale), rotation.head_dim
    _check_query_bits(query_bits)
    with np.errstate(invalid="ignore", over="ignore"):
        noise = (1 - alignment(size)[1]) / (size - 1) * (_centred(query, encoded) ** 2).sum(axis=-1)
        if query_bits != 16:
            step = quantise_query(rotate_query(query, encoded, rotation), query_bits).step.astype(np.float64)
            noise = noise + step**2 / (6 if rounding == "random" else 12)
        kappa = abs(scale) * np.sqrt(size * noise)
        return _per_query_head(encoded.rescale, query) * kappa[..., None]


def score(query, encoded: Encoded, rotation: Rotation, *, query_bits: int = 4, rounding: str = "nearest",
          seed: int = 0, step: int = 0, scale=None) -> Scores:
    """`logits` and `sigma` in float32, for `selection`.  Arguments as there."""
    options = {"query_bits": query_bits, "rounding": rounding, "scale": scale}
    with np.errstate(over="ignore"):
        return Scores(logits(query, encoded, rotation, seed=seed, step=step, **options).astype(np.float32),
                      sigma(query, encoded, rotation, **options).astype(np.float32))


def _products(code, sign):
    """Z = D I + v E, float64."""
    ones = sign_products(np.ones_like(code.codes), sign)                             # E = size - 2 popc(negative)
    return code.step[..., None].astype(np.float64) * sign_products(code.codes, sign) \
        + code.low[..., None].astype(np.float64) * ones


# --- The law ---------------------------------------------------------------------------------------------------------


def alignment(size: int) -> tuple[float, float]:
    """(E alpha, E alpha^2) over Haar rotations: alpha = |o|_1 / sqrt(size), o uniform on the unit sphere.

    E |o_1| = Gamma(size/2) / (sqrt(pi) Gamma((size+1)/2)), and E |o_1 o_2| = 2 / (pi size).
    """
    return float((size / np.pi) ** 0.5 / gamma_ratio(size / 2)), 1 / size + 2 / np.pi * (1 - 1 / size)


def miss_rate(epsilon: float, size: int, rho: float = 0.0) -> float:
    """P(|error| > epsilon |k~| |q~| sqrt((1/alpha^2 - 1) / (size - 1))) over Haar rotations, query in floating point.

    From X^2 ~ Beta(1/2, (size - 2)/2): P(X^2 > epsilon^2 / ((size - 1) (1 - rho^2))); at most 2 exp(-epsilon^2 / 2).
    """
    limit = min(epsilon**2 / ((size - 1) * (1 - rho**2)), 1.0)
    return float(stats.beta.sf(limit, 0.5, (size - 2) / 2))


# --- Steps shared by the above ---------------------------------------------------------------------------------------


def _four(name, x):
    x = np.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"rabitq: {name}: expected [batch, kv_heads, tokens, head_dim], got {list(x.shape)}")
    return x.astype(np.float64)


def _mean(name, mean, shape):
    with np.errstate(over="ignore"):
        mean = np.asarray(mean).astype(np.float32)
    if mean.shape not in (shape, shape[1:]) or not np.isfinite(mean).all():
        raise ValueError(f"rabitq: {name}: expected finite float32 [batch, kv_heads, head_dim] = {list(shape)} or "
                         f"[kv_heads, head_dim] = {list(shape[1:])}, got {list(mean.shape)}"
                         + ("" if np.isfinite(mean).all() else " with NaN or Inf"))
    return np.broadcast_to(mean, shape)


def _grouped(query, encoded):
    """[batch, kv_heads, group, head_dim] float64."""
    query, (batch, kv_heads, _) = np.asarray(query), encoded.rescale.shape
    if query.ndim != 3 or query.shape[::2] != (batch, encoded.head_dim) or query.shape[1] % kv_heads:
        raise ValueError(f"rabitq: query: expected [batch, q_heads, head_dim] = [{batch}, a multiple of {kv_heads}, "
                         f"{encoded.head_dim}], got {list(query.shape)}")
    return query.astype(np.float64).reshape(batch, kv_heads, query.shape[1] // kv_heads, encoded.head_dim)


def _centred(query, encoded):
    """q~ = q - c_q, [batch, q_heads, head_dim] float64."""
    grouped = _grouped(query, encoded)
    if encoded.query_mean is not None:
        grouped = grouped - encoded.query_mean.astype(np.float64)[:, :, None]
    return grouped.reshape(np.shape(query))


def _constant(query, encoded):
    """<q, c_k>, [batch, q_heads] float64."""
    if encoded.key_mean is None:
        return np.zeros(np.shape(query)[:2])
    grouped = _grouped(query, encoded) * encoded.key_mean.astype(np.float64)[:, :, None]
    return grouped.sum(axis=-1).reshape(np.shape(query)[:2])


def _per_query_head(x, query):
    """[batch, kv_heads, tokens] -> [batch, q_heads, tokens] float64"""
    return np.repeat(x.astype(np.float64), np.shape(query)[1] // x.shape[1], axis=1)


def _by_kv_head(codes, sign):
    """[batch, q_heads, size] -> [batch, kv_heads, group, size]"""
    batch, q_heads, size = codes.shape
    if sign.shape[0] != batch or q_heads % sign.shape[1]:
        raise ValueError(f"rabitq: codes: expected [{sign.shape[0]}, a multiple of {sign.shape[1]}, size], "
                         f"got {list(codes.shape)}")
    return codes.reshape(batch, sign.shape[1], q_heads // sign.shape[1], size)


def _check_query_bits(query_bits):
    if query_bits not in QUERY_BITS:
        raise ValueError(f"rabitq: query_bits: expected 4, 8 or 16, got {query_bits!r}")


# --- Claims ----------------------------------------------------------------------------------------------------------
#
# Only o = R k~ / |k~| and R q~ matter.  Over Haar rotations o is uniform on the unit sphere, and R q~ / |q~| is
# rho o + sqrt(1 - rho^2) e with e uniform on the unit sphere orthogonal to o.  So pairs are drawn by Gram and Schmidt,
# and handed to the functions above as key and queries, with the identity as the rotation; "true rotations" draws
# matrices.

_HALF = 2.0**-11                                    # relative rounding error of float16, here of r
_RHO = np.array([0.0, 0.3, 0.7, 0.95])


def _as_it_is(size):
    return Rotation("haar", size, 0, 0, matrix=np.eye(size))


def _pairs(rng, samples, size, rho=_RHO):
    """(o [samples, size], R q~ [samples, len(rho), size]), unit vectors."""
    o, e = rng.standard_normal((2, samples, size))
    o /= np.linalg.norm(o, axis=-1, keepdims=True)
    e -= (e * o).sum(axis=-1, keepdims=True) * o
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    rho = np.asarray(rho)[:, None]
    return o, rho * o[:, None] + np.sqrt(1 - rho**2) * e[:, None]


def _one_each(keys):
    """The code of keys [samples, size], rotated already, as one token of a sequence each; encoded as tokens of one."""
    encoded = encode(keys[None, None], _as_it_is(keys.shape[-1]))
    return Encoded(encoded.sign[0, 0, :, None, None], encoded.rescale[0, 0, :, None, None], None, None, None,
                   encoded.head_dim)


def _estimates(rng, samples, size, rho=_RHO, norm=1.0, **options):
    """(estimates [samples, len(rho)] of |k~| |q~| rho, the key code, o, R q~), |k~| = norm, scale 1."""
    o, q = _pairs(rng, samples, size, rho)
    encoded = _one_each(norm * o)
    return logits(q, encoded, _as_it_is(size), scale=1.0, **options)[..., 0], encoded, o, q


def _alpha(o):
    return np.abs(o).sum(axis=-1) / o.shape[-1] ** 0.5


def _alignment(rng, samples):
    """alpha from the stored r: alpha = |k~| / (sqrt(size) r)."""
    cases = {}
    for size in (64, 128, 256):
        _, encoded, _, _ = _estimates(rng, samples, size)
        alpha = 1 / (size**0.5 * encoded.rescale[:, 0, 0].astype(np.float64))
        mean, square = alignment(size)
        cases[f"mean, {size}"] = expectation(alpha, mean, allowance=_HALF * mean)
        cases[f"square, {size}"] = expectation(alpha**2, square, allowance=2.1 * _HALF * square)
    return weakest(cases)


def _unbiased(rng, samples):
    return weakest({f"head_dim {size}": expectation(_estimates(rng, samples, size, query_bits=16)[0], _RHO,
                                                    allowance=_HALF * _RHO) for size in (64, 128, 256)})


def _true_rotations(rng, samples):
    """Rotation matrices, a key and queries with means, everything through the public functions."""
    size, data = 64, np.random.default_rng(3)
    key_mean, query_mean = data.standard_normal((2, 1, size)).astype(np.float32)
    key = data.standard_normal((1, 1, 1, size)) + 3 * key_mean
    query = data.standard_normal((1, 3, size)) + 2 * query_mean
    exact, first = (query[0] * key[0, 0]).sum(axis=-1) * size**-0.5, int(rng.integers(2**32))
    estimates, allowance = np.empty((samples, 3)), 0.0
    for i in range(samples):
        rotation = haar(size, first + i)
        encoded = encode(key, rotation, key_mean=key_mean, query_mean=query_mean)
        estimates[i] = logits(query, encoded, rotation, query_bits=16)[0, :, 0]
        allowance = max(allowance, float(np.abs(encoded.offset).astype(np.float64).max()))
    centred = ((query - query_mean)[0] * (key - key_mean)[0, 0]).sum(axis=-1)
    return expectation(estimates, exact, allowance=_HALF * size**-0.5 * (np.abs(centred) + allowance))


def _variance(rng, samples):
    """E (error^2 - law) = 0 over the mean of the law, which is given alpha: no table is needed."""
    cases = {}
    for size in (64, 128):
        estimates, _, o, _ = _estimates(rng, samples, size, query_bits=16)
        law = (1 - _RHO**2) / (size - 1) * (1 / _alpha(o) ** 2 - 1)[:, None]
        squares = (estimates - _RHO) ** 2 - law
        # r is off by 2^-11: (e + rho d)^2 with E e^2 = law.
        cases[f"head_dim {size}"] = expectation(squares / law.mean(axis=0), 0.0, allowance=2.1 * _HALF + (
            _HALF * _RHO) ** 2 / law.mean(axis=0) + 2 * _HALF * _RHO / np.sqrt(law.mean(axis=0)) * 0.05)
    return weakest(cases)


def _standardised(rng, samples, size):
    """(X [samples, len(rho)], alpha): the error in units of its law, with r before it was rounded."""
    estimates, encoded, o, _ = _estimates(rng, samples, size, query_bits=16)
    alpha = _alpha(o)
    exact_r = 1 / (size**0.5 * alpha)
    estimates = estimates * (exact_r / encoded.rescale[:, 0, 0].astype(np.float64))[:, None]
    return (estimates - _RHO) / np.sqrt(1 - _RHO**2) / np.sqrt(1 / alpha**2 - 1)[:, None], alpha


def _law(rng, samples):
    cases = {}
    for size in (64, 128):
        x, alpha = _standardised(rng, samples, size)
        cases[f"law, {size}"] = distribution(np.minimum(x**2, 1), partial(special.betainc, 0.5, (size - 2) / 2))
        spread = (alpha - alpha.mean()) / alpha.std()
        cases[f"sign, {size}"] = expectation(x, 0.0)
        cases[f"independence, {size}"] = expectation(spread[:, None] * (x**2 * (size - 1) - 1), 0.0)
    return weakest(cases)


def _miss(rng, samples):
    cases = {}
    for size in (64, 128):
        x, _ = _standardised(rng, samples, size)
        for epsilon in (1.0, EPSILON, 3.0):
            count = (np.abs(x) * np.sqrt(1 - _RHO**2) > epsilon / (size - 1) ** 0.5).sum(axis=0)
            exact = np.array([miss_rate(epsilon, size, rho) for rho in _RHO])
            cases[f"exact, {size}, {epsilon}"] = tail(count, samples, exact, relation="=")
            cases[f"bound, {size}, {epsilon}"] = tail(count, samples, min(2 * np.exp(-(epsilon**2) / 2), 1.0))
    return weakest(cases)


def _any_rotation(rng, samples):
    """|error| <= |q_|_| |k| sqrt(1/alpha^2 - 1) for Haar, one and three rounds, any vectors; with equality q ~ k."""
    excess, allowance = [], []
    for case in range(samples):
        size, rotation = _rotation(rng, case)
        keys = turboquant._vectors(rng, size, (1, 1, 4))
        query = np.concatenate([rng.standard_normal((1, 3, size)), keys[0, :, :1] * rng.uniform(0.1, 2)], axis=1)
        encoded = encode(keys, rotation)
        estimates, exact = logits(query, encoded, rotation, query_bits=16, scale=1.0)[0], query[0] @ keys[0, 0].T
        norms, lengths = np.linalg.norm(keys[0, 0], axis=-1), np.linalg.norm(query[0], axis=-1, keepdims=True)
        orthogonal = np.sqrt(np.maximum(lengths**2 - (exact / norms) ** 2, 0))
        alpha = _alpha(rotate(keys[0, 0], rotation) / norms[:, None])
        limit = orthogonal * norms * np.sqrt(np.maximum(1 / alpha**2 - 1, 0))
        excess.append((np.abs(estimates - exact) - limit) / (lengths * norms))
        # r is off by 2^-11 of an estimate of at most |k| |q| / alpha; roundings under a root come out as 1e-8.
        allowance.append(_HALF / alpha + 1e-7 + 0 * lengths)
    return bound(excess, allowance, samples=samples)


def _rotation(rng, case):
    size, seed = int(rng.choice([32, 64, 128])), int(rng.integers(2**32))
    return size, haar(size, seed) if case % 3 == 0 else hadamard(size, seed, 1 if case % 3 == 1 else 3)


def _spikes(size):
    """k = (2 e_1 + e_2) / sqrt(5), and queries e_1, e_2, of unit length."""
    key = np.zeros((1, 1, 1, size))
    key[..., :2] = 2 / 5**0.5, 1 / 5**0.5
    return key, np.eye(size)[None, :2]


def _one_round(rng, samples):
    """The larger spike decides every sign, S = d_1 H e_1, and |y|_1 = k_1 sqrt(size): the estimates are 1.25 k_1, 0."""
    deviation = []
    for _ in range(samples):
        size = int(rng.choice([32, 64, 128, 256]))
        rotation, (key, query) = hadamard(size, int(rng.integers(2**32)), 1), _spikes(size)
        estimates = logits(query, encode(key, rotation), rotation, query_bits=16, scale=1.0)[0, :, 0]
        deviation.append(estimates - np.array([1.25 * key[0, 0, 0, 0], 0.0]))
    return identity(deviation, 1.2 * _HALF + 1e-12, samples=samples)


def _three_rounds(rng, samples):
    """Signs are drawn as `rotation.hadamard` draws them, many at once."""
    cases = {}
    for size in (64, 128):
        key, query = _spikes(size)
        outlier = np.random.default_rng(2).standard_normal(size)
        outlier[[3, 17, 30]] *= 20
        keys = np.stack([key[0, 0, 0], outlier / np.linalg.norm(outlier)])
        rotated = np.broadcast_to(np.concatenate([keys, query[0]]), (samples, 4, size))
        for signs in rng.choice([-1.0, 1.0], (3, samples, 1, size)):
            rotated = walsh_hadamard(rotated * signs) * size**-0.5
        estimates = np.stack([logits(rotated[:, 2:], _one_each(rotated[:, i]), _as_it_is(size), query_bits=16,
                                     scale=1.0)[..., 0] for i in range(2)], axis=1)
        cases[f"head_dim {size}"] = expectation(estimates, keys @ query[0].T, allowance=0.01)
    return weakest(cases)


def _rounding_differences(rng, samples, size, query_bits, rounding, rho=_RHO):
    """((rounded - floating point query) [samples, len(rho)], r [samples, 1], q code, R q~)."""
    o, q = _pairs(rng, samples, size, rho)
    encoded = _one_each(o)
    both = [logits(q, encoded, _as_it_is(size), scale=1.0, **options)[..., 0] for options in (
        {"query_bits": query_bits, "rounding": rounding, "seed": int(rng.integers(2**32))}, {"query_bits": 16})]
    code = quantise_query(rotate_query(q, encoded, _as_it_is(size)), query_bits)
    return both[0] - both[1], encoded.rescale[:, 0].astype(np.float64), code, q


def _nearest_bias(rng, samples):
    cases = {}
    for size in (64, 128):
        difference = _rounding_differences(rng, samples, size, 4, "nearest", (0.5, 0.7, 0.95))[0]
        cases[f"head_dim {size}"] = expectation(difference, 2.5e-4, allowance=2.5e-4)
    return weakest(cases)


def _random_unbiased(rng, samples):
    """One key and one query, the dither of many steps; float32 sums and xi are off by up to 2^-20 and 2^-24."""
    cases = {}
    for size in (32, 128):
        o, q = _pairs(np.random.default_rng(size), 1, size)
        encoded, seed = _one_each(o), int(rng.integers(2**32))
        z = np.stack([logits(q, encoded, _as_it_is(size), scale=1.0, rounding="random", seed=seed, step=i)[0, :, 0]
                      for i in range(samples)])
        exact = logits(q, encoded, _as_it_is(size), scale=1.0, query_bits=16)[0, :, 0]
        cases[f"mean, {size}"] = expectation(z, exact, allowance=2.0**-19)
        # The variance given R is r^2 D^2 sum f (1 - f), f the fractions of t.
        low, high = q.min(axis=-1), q.max(axis=-1)
        t = (q - low[..., None]) * (15 / (high - low))[..., None]
        law = (encoded.rescale.item() * (high - low) / 15) ** 2 * ((t % 1) * (1 - t % 1)).sum(axis=-1)
        cases[f"variance, {size}"] = variance(z, law[0], mean=exact, allowance=1e-4 * law[0])
    return weakest(cases)


def _rounding_noise(rng, samples):
    """Squares over the model r^2 size D^2 / 12 (nearest) or / 6 (random).

    The two extreme coordinates are codes 0 and 15 exactly, hence the factor (size - 2) / size of 4 bits, (size - 1) /
    size of 8; the fractions of the others are uniform but for 3 %.
    """
    cases = {}
    for size in (64, 128):
        for bits, rounding in ((4, "nearest"), (4, "random"), (8, "nearest")):
            difference, r, code, _ = _rounding_differences(rng, samples, size, bits, rounding)
            model = r**2 * size * code.step.astype(np.float64) ** 2 / (6 if rounding == "random" else 12)
            exact = (size - (2 if bits == 4 else 1)) / size
            cases[f"{bits} bits, {rounding}, {size}"] = expectation(difference**2 / model, exact, allowance=0.03)
    return weakest(cases)


def _rounding_limit(rng, samples):
    """|Z - <S, q'>| <= size D / 2 (nearest) or size D (random), and the sum |q' - D u - v| bounds it code by code."""
    excess, allowance = [], []
    for case in range(samples):
        size, rotation = _rotation(rng, case)
        bits, rounding = ((4, "nearest"), (4, "random"), (8, "nearest"))[case % 3]
        q = (rng.standard_normal((2, 2, size)) * 10.0 ** rng.uniform(-20, 20, (2, 2, 1))).astype(np.float32)
        code = quantise_query(q, bits, rounding=rounding, seed=case)
        again = code.step[..., None].astype(float) * code.codes + code.low[..., None].astype(float)
        step = code.step[..., None].astype(float)
        excess.append((np.abs(again - q) / step).max() - (1.0 if rounding == "random" else 0.5))
        allowance.append(2.0**-15)                                       # float32: codes to 127, roundings of 2^-24
    return bound(excess, allowance)


def _problem(rng, case, tokens=None):
    """(query, keys, rotation, key_mean, query_mean): grouped heads, large means, padded or not."""
    size, rotation = _rotation(rng, case)
    head_dim = size if case % 4 else int(rng.integers(1, size + 1))
    batch, kv_heads, group = (int(n) for n in rng.integers(1, 3, 3))
    tokens = int(rng.integers(1, 30)) if tokens is None else tokens
    key_mean, query_mean = (rng.standard_normal((batch, kv_heads, head_dim)).astype(np.float32) * 3 for _ in range(2))
    keys = rng.standard_normal((batch, kv_heads, tokens, head_dim)) + key_mean[:, :, None]
    query = rng.standard_normal((batch, kv_heads, group, head_dim)) + query_mean[:, :, None]
    return query.reshape(batch, -1, head_dim), keys, rotation, key_mean, query_mean


def _exactness(rng, samples):
    """<y, q'> + a + <q, c_k> = <q, k>: with the coordinates of the key for its code nothing is estimated; and q~ = k~
    gives r <S, y> = |k~|^2."""
    deviation, allowance = [], []
    for case in range(samples):
        query, keys, rotation, key_mean, query_mean = _problem(rng, case, 1)
        encoded = encode(keys, rotation, key_mean=key_mean, query_mean=query_mean)
        group = query.shape[1] // keys.shape[1]
        padding = [(0, 0)] * 3 + [(0, rotation.head_dim - keys.shape[-1])]
        y = np.repeat(rotate(np.pad(keys - key_mean[:, :, None], padding), rotation)[:, :, 0], group, axis=1)
        rotated, offset = rotate_query(query, encoded, rotation).astype(float), _per_query_head(encoded.offset, query)
        exact = (query * np.repeat(keys[:, :, 0], group, axis=1)).sum(axis=-1)
        size = np.linalg.norm(y, axis=-1) * np.linalg.norm(rotated, axis=-1) + np.abs(exact)
        deviation.append((((y * rotated).sum(axis=-1) + offset[..., 0] + _constant(query, encoded) - exact)).ravel())
        allowance.append((2.0**-22 * size + _HALF * np.abs(offset[..., 0]) + 2.0**-24).ravel())
        own = query_mean + (keys - key_mean[:, :, None])[:, :, 0]                    # q~ = k~
        squared = ((keys - key_mean[:, :, None]) ** 2).sum(axis=-1)[..., 0]
        estimate = logits(own, encoded, rotation, query_bits=16, scale=1.0)[..., 0] - _constant(own, encoded)
        deviation.append((estimate - encoded.offset[..., 0].astype(float) - squared).ravel())
        allowance.append(((_HALF + 1e-10) * squared + 1e-7).ravel())
    return identity(np.concatenate(deviation), np.concatenate(allowance), samples=samples)


def _integers(rng, samples):
    """Population counts, bytes and a dense product, and D I + v E = <S, D u + v>."""
    differences, rounding = [], []
    for case in range(samples):
        query, keys, rotation, _, _ = _problem(rng, case)
        encoded = encode(keys, rotation)
        code = quantise_query(rotate_query(query, encoded, rotation))
        products, size = sign_products(code.codes, encoded.sign), rotation.head_dim
        s = 1 - 2 * np.repeat(bit_planes.unpack_bits(encoded.sign, size), query.shape[1] // keys.shape[1],
                              axis=1).astype(np.int64)
        dense = np.einsum("bhi,bhti->bht", code.codes.astype(np.int64), s)
        differences += [np.abs(products - other).max() for other in (
            dense, popcount_products(code.codes, encoded.sign), _byte_products(code.codes, encoded.sign))]
        values = code.step[..., None].astype(float) * code.codes + code.low[..., None]
        total = np.abs(values).sum(axis=-1)[..., None] + 15 * np.abs(code.step[..., None]) * size
        error = _products(code, encoded.sign) - np.einsum("bhi,bhti->bht", values, s)
        rounding.append((np.abs(error) / np.where(total == 0, 1, total)).max())
    return weakest({"integers": identity(differences, samples=samples), "sum": bound(rounding, 2.0**-45)})


def _byte_products(codes, sign):
    """U - 2 <negative, u> as byte products do it: for j = 0 ... 7, (word >> j) & 0x01010101 holds a byte each for the
    coordinates 8 (j & 3) + (j >> 2) + {0, 2, 4, 6} of the word.
    """
    codes = _by_kv_head(codes.astype(np.int64), sign)
    total = codes.sum(axis=-1)[..., None]
    for j in range(8):
        four = (sign >> np.uint32(j) & np.uint32(0x01010101))[..., None] >> np.uint32([0, 8, 16, 24]) & np.uint32(255)
        at = 32 * np.arange(sign.shape[-1])[:, None] + 8 * (j & 3) + (j >> 2) + np.array([0, 2, 4, 6])
        total = total - 2 * np.einsum("bgtwi,bghwi->bght", four.astype(np.int64), codes[..., at])
    return total.reshape(codes.shape[0], -1, sign.shape[2])


def _centring_constant(rng, samples):
    deviation = []
    for case in range(samples):
        query, keys, rotation, key_mean, query_mean = _problem(rng, case)
        estimates = logits(query, encode(keys, rotation, key_mean=key_mean, query_mean=query_mean), rotation)
        constant = keys.shape[-1] ** -0.5 * _constant(query, encode(keys, rotation, key_mean=key_mean))
        one, other = (special.softmax(x, axis=-1) for x in (estimates, estimates - constant[..., None]))
        deviation.append(np.abs(one - other).max())
    return identity(deviation, 1e-12)


# sigma against the law.  sigma^2 = r^2 (1 - E a) + ..., a = alpha^2, where the law has r^2 (1 - a) (1 - rho^2).  With
# m = E a and v = Var a / m^2, E[1/a] = (1 + v) / m to second order, so E[1/a - 1] / ((1 - m) E[1/a]) =
# 1 + v m / (1 - m): 1.008 for size 64, 1.004 for 128.  Twice that is allowed for, and 3 % of the rounding as above.


def _noise_predictor(rng, samples):
    cases = {}
    for size in (64, 128):
        mean, square = alignment(size)
        v = 4 * (square - mean**2) / square                             # Var a / m^2 = 4 Var alpha / alpha^2
        for bits, rounding in ((16, "nearest"), (4, "nearest"), (4, "random"), (8, "nearest")):
            estimates, encoded, _, q = _estimates(rng, samples, size, np.array([0.0, 0.5]), query_bits=bits,
                                                  rounding=rounding, seed=int(rng.integers(2**32)))
            predicted = sigma(q, encoded, _as_it_is(size), query_bits=bits, rounding=rounding, scale=1.0)[..., 0] ** 2
            share = sigma(q, encoded, _as_it_is(size), query_bits=16, scale=1.0)[..., 0] ** 2
            rho = np.array([0.0, 0.5])
            expected = 1 - rho**2 * share.mean(axis=0) / predicted.mean(axis=0)
            cases[f"{bits} bits, {rounding}, {size}"] = expectation(
                (estimates - rho) ** 2 / predicted.mean(axis=0), expected,
                allowance=2 * v * square / (1 - square) + (0.03 + 2 / size) * (1 - share.mean(axis=0) / predicted.mean(
                    axis=0)) + 4 * _HALF)
    return weakest(cases)


def _inflation(rng, samples):
    """E exp(error) over exp(sigma^2 / 2) at sigma up to 1: |k~| |q~| chosen for it, the query in floating point."""
    cases = {}
    for target in (0.5, 1.0):
        size = 128
        norm = target / np.sqrt((1 - alignment(size)[1]) / alignment(size)[1] / (size - 1))
        estimates, encoded, _, q = _estimates(rng, samples, size, np.array([0.0]), norm, query_bits=16)
        predicted = sigma(q, encoded, _as_it_is(size), query_bits=16, scale=1.0)[..., 0]
        cases[f"sigma {target}"] = expectation(np.exp(estimates) / np.exp(predicted**2 / 2).mean(), 1.0, allowance=0.02)
    return weakest(cases)


def _calibration(rng, samples):
    """Keys of one length on true codes, with logits N(0, tau^2): along q they are exact, across it they are random.

    The directions of the queries and of the rest of the keys are isotropic, so the identity is as good as any rotation.
    """
    size, tokens, length, tau, masses = 64, 800, 10.0, 1.25, {False: [], "shrink": [], "shift": []}
    for _ in range(samples // 20):
        q = rng.standard_normal((20, 1, size))
        q /= np.linalg.norm(q, axis=-1, keepdims=True)
        exact, across = tau * rng.standard_normal((20, tokens)), rng.standard_normal((20, tokens, size))
        across -= (across @ q[:, 0, :, None]) * q
        across *= (np.sqrt(np.maximum(length**2 - exact**2, 0)) / np.linalg.norm(across, axis=-1))[..., None]
        scores = score(q, encode((exact[..., None] * q + across)[:, None], _as_it_is(size)), _as_it_is(size), scale=1.0)
        weights = special.softmax(exact, axis=-1)
        for mode, achieved in masses.items():
            chosen = top_p(scores, 0.85, sinks=0, recent=0, calibrated=mode)
            achieved += [weights[b, chosen.indices[b, 0, : chosen.counts[b, 0]]].sum() for b in range(20)]
    noise = float(np.sqrt((scores.sigma.astype(np.float64) ** 2).mean()))
    return weakest({"plain": expectation(masses[False], gaussian_mass(0.85, tau, noise), allowance=0.02),
                    "shrink": expectation(masses["shrink"], 0.85, allowance=0.02),
                    "shift": expectation(masses["shift"], 0.85, allowance=0.02)})


def _same(one, other):
    """Numbers that differ between two encodings, bit for bit."""
    pairs = ((one.sign, other.sign), (one.rescale.view(np.uint16), other.rescale.view(np.uint16)),
             (one.offset.view(np.uint16), other.offset.view(np.uint16)))
    return sum(int(np.sum(a != b)) if a.shape == b.shape else 2**32 for a, b in pairs)


def _joined(parts):
    first = parts[0]
    return Encoded(*(np.concatenate([getattr(part, name) for part in parts], axis=2)
                     for name in ("sign", "rescale", "offset")), first.key_mean, first.query_mean, first.head_dim)


def _incremental(rng, samples):
    """Tokens arrive in any portions and are encoded as blocks of 128 leave the window; in the end all at once."""
    differences = []
    for case in range(samples):
        query, keys, rotation, key_mean, query_mean = _problem(rng, case, int(rng.integers(0, 700)))
        sinks, recent, tokens = int(rng.integers(0, 9)), int(rng.integers(0, 100)), keys.shape[2]
        options = {"key_mean": key_mean, "query_mean": query_mean}
        arrivals = [*np.sort(rng.integers(0, tokens + 1, int(rng.integers(0, 6)))), tokens]
        done, parts = sinks, [encode(keys[:, :, :0], rotation, **options)]
        for length in arrivals:
            _, (stop,) = middle(np.array([length]), sinks, recent, BLOCK)
            if stop > done:
                parts.append(encode(keys[:, :, done:stop], rotation, **options))
                done = stop
        differences.append(_same(_joined(parts), encode(keys[:, :, sinks:done], rotation, **options)))
    return identity(differences)


def _token_by_token(rng, samples):
    differences = []
    for case in range(samples):
        query, keys, _, key_mean, query_mean = _problem(rng, 1, int(rng.integers(1, 6)))
        rotation = hadamard(1 << (keys.shape[-1] - 1).bit_length(), case)
        parts = [encode(keys[:, :, t : t + 1], rotation, key_mean=key_mean, query_mean=query_mean)
                 for t in range(keys.shape[2])]
        whole = encode(keys, rotation, key_mean=key_mean, query_mean=query_mean)
        differences.append(_same(_joined(parts), whole))
    return identity(differences)


def _chunked_centroid(rng, samples):
    differences, deviation = [], []
    for _ in range(samples):
        heads, group, blocks = (int(n) for n in rng.integers(1, 4, 3))
        tokens = int(rng.integers((blocks - 1) * BLOCK, blocks * BLOCK + 1))
        x = rng.standard_normal((2, heads * group, tokens, 8)) * 10.0 ** rng.uniform(-5, 5)
        x[rng.random(x.shape) < 0.001] = np.nan
        cut = BLOCK * int(rng.integers(0, blocks + 1))
        chunks = [block_sums(part, heads) for part in (x[:, :, :cut], x[:, :, cut:])]
        whole = centroid(*block_sums(x, heads))
        differences.append(np.sum(whole != centroid(*(np.concatenate(parts, axis=2) for parts in zip(*chunks)))))
        rows = x.reshape(2, heads, -1, 8)
        usable = np.isfinite(rows).all(axis=-1, keepdims=True)
        expected = np.where(usable, rows, 0).sum(axis=2) / np.maximum(usable.sum(axis=2), 1)
        deviation.append(np.abs(whole - expected).max() / max(np.abs(rows[np.isfinite(rows)]).max(initial=0), 1e-300))
    return weakest({"chunks": identity(differences), "mean": bound(deviation, 2.0**-24 + 1e-13)})


def _dither(rng, samples):
    """Uniform on multiples of 2^-24, and without correlation between neighbours in coordinate, head and step."""
    seed = int(rng.integers(2**32))
    xi = np.stack([dither((1, 2, 32), seed, step) for step in range(2 * samples)]).reshape(-1, 64).astype(np.float64)
    centred = xi - 0.5
    return weakest({"law": distribution(xi, lambda t: np.clip(t, 0, 1)),
                    "coordinates": expectation(centred[:, 1:] * centred[:, :-1], 0.0),
                    "heads": expectation(centred[:, :32] * centred[:, 32:], 0.0),
                    "steps": expectation(centred[1::2] * centred[::2], 0.0)})


CLAIMS = (
    Claim("alignment", "E alpha = sqrt(D / pi) Gamma(D/2) / Gamma((D+1)/2) and E alpha^2 = 1/D + (2/pi) (1 - 1/D)",
          "RaBitQ arXiv 2405.12497, appendix B; derived at alignment", "expectation", _alignment, samples=5000),
    Claim("unbiased", "E r <S, R q> = <q, k> over Haar rotations, at cosines 0, 0.3, 0.7, 0.95",
          "RaBitQ arXiv 2405.12497, Theorem 3.2", "expectation", _unbiased, samples=20000),
    Claim("unbiased, true rotations", "the same with drawn matrices, key and query centroids, and a in float16",
          "RaBitQ arXiv 2405.12497, Theorem 3.2", "expectation", _true_rotations, samples=1000),
    Claim("variance", "Var = (1 - rho^2) / (D - 1) E (1 / alpha^2 - 1) for unit vectors",
          "RaBitQ arXiv 2405.12497, Theorem 3.2 and its proof", "expectation", _variance, samples=20000),
    Claim("law of the error", "the standardised error X has X^2 ~ Beta(1/2, (D - 2)/2) and is independent of alpha",
          "RaBitQ arXiv 2405.12497, proof of Theorem 3.2", "expectation", _law, samples=20000),
    Claim("miss rate", "P(|error| > epsilon sqrt((1/alpha^2 - 1) / (D - 1))) is the tail of that Beta law, 0.057 for "
          "epsilon 1.9 at rho = 0, and at most 2 exp(-epsilon^2 / 2)", "RaBitQ arXiv 2405.12497, Theorem 3.2", "tail",
          _miss, samples=20000),
    Claim("any rotation", "|error| <= |q_|_| |k| sqrt(1/alpha^2 - 1) for every orthogonal R, one Hadamard round too",
          "derived: Cauchy and Schwarz on the part of S orthogonal to y", "bound", _any_rotation, samples=200),
    Claim("one Hadamard round is biased", "for k = 2 e_1 + e_2 the estimates of <k, e_1>, <k, e_2> are 2.5 and 0 for "
          "all signs of one round", "derived in reference/rabitq.py", "identity", _one_round, samples=100),
    Claim("three Hadamard rounds", "bias at most 0.01 |k| |q| for that key and one with outlier channels",
          "derived by simulation: a limit, not a law", "expectation", _three_rounds, samples=10000),
    Claim("random rounding", "E Z = <S, q'> over the dither, and Var Z = D^2 sum f (1 - f), f the fractions of t",
          "RaBitQ arXiv 2405.12497, section 3.3.1", "expectation", _random_unbiased, samples=2000),
    Claim("bias of nearest rounding", "between 0 and 5e-4 |k| |q| for cosines from 0.5 on, 4 bits",
          "derived by simulation: a limit, not a law", "expectation", _nearest_bias, samples=20000),
    Claim("noise of rounding", "nearest adds the variance r^2 size D^2 / 12, random / 6, within 3 %, less the share of "
          "the extreme coordinates, which are exact", "RaBitQ arXiv 2405.12497, Theorem 3.3", "expectation",
          _rounding_noise, samples=5000),
    Claim("rounding of a coordinate", "|q'_i - D u_i - v| <= D / 2 for nearest, D for random, 4 and 8 bits",
          "definition", "bound", _rounding_limit, samples=200),
    Claim("exactness", "<R k~, R q~> + a + <q, c_k> = <q, k>, and q~ = k~ is estimated as |k~|^2", "definition",
          "identity", _exactness, samples=200),
    Claim("integers", "population counts, bytes and a dense product give the same <S, u>, and D I + v E = <S, D u + v>",
          "RaBitQ arXiv 2405.12497, section 3.3.2", "identity", _integers, samples=200),
    Claim("constant of centring", "<q, c_k> does not change the softmax over estimates",
          "textbook: softmax is invariant to a constant", "identity", _centring_constant, samples=100),
    Claim("noise predictor", "E error^2 = E sigma^2, but for the factor 1 - rho^2 of the sign code's part",
          "derived in reference/rabitq.py", "expectation", _noise_predictor, samples=5000),
    Claim("inflation", "E exp(estimate - exact) = exp(sigma^2 / 2) within 2 % for sigma up to 1",
          "textbook: mean of a log-normal variable", "expectation", _inflation, samples=20000),
    Claim("calibration on codes", "for normal logits and true codes of keys, Top-p plain achieves Phi(Phi^-1(p) - "
          "sigma^2 / sqrt(tau^2 + sigma^2)), shrink and shift achieve p, within 0.02",
          "derived in reference/selection.py", "expectation", _calibration, samples=1000),
    Claim("incremental", "blocks of 128 encoded as they leave the window have the bits of all tokens encoded at once",
          "definition", "identity", _incremental, samples=40),
    Claim("token by token", "with a Hadamard rotation single tokens have the bits of all tokens encoded at once",
          "definition", "identity", _token_by_token, samples=60),
    Claim("centroid", "chunks that end at multiples of 128 give the centroid of the whole bit for bit; it is the mean "
          "of the finite tokens", "definition", "identity", _chunked_centroid, samples=60),
    Claim("dither", "the hash is uniform, and uncorrelated between coordinates, heads and steps",
          "lowbias32, public hash", "expectation", _dither, samples=2000),
)
