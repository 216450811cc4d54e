"""Block-GTQ: keys whose RoPE blocks get their own number of bits, in groups of equal rate (arXiv 2606.24033).

RoPE turns pairs of coordinates, blocks, at different speeds, and the energy of queries and keys is very uneven over
blocks.  With EQ_i = E |q(i)|^2 and EK_i = E |k(i)|^2 of block i, a block of b_i bits per coordinate is off by about
EK_i 4^(-b_i), so that the mean squared error of a logit goes as

    J(b) = sum_i s_i 4^(-b_i),        s_i = EQ_i EK_i   ("product", default; the paper's: (EQ_i + EK_i) / 2, "mean").

J is separable, and the gain of one more bit, (3/4) s_i 4^(-b_i), falls with b_i: giving bit after bit to the block that
gains most is optimal (`allocate`; certificate: `is_optimal`).  RoPE keeps |q(i)| and |k(i)|, so the allocation is the
same before and after it; keys are coded after it, since a rotation across blocks does not commute with RoPE.

**Rate groups.**  The coordinates of a head are put in rate order: groups of equal bits, the largest number first,
blocks of a group by index, the two coordinates of a block next to each other.  Each group x_g, of D_g coordinates, is
coded as TurboQuant codes a vector: its own rotation R_g, the codebook of its dimension, its own scalar s_g.  So

    <q, k_hat> = sum_g s_g <q'_g, c_g>,        q'_g = R_g q_g:

permutation and rotations are folded into the query once per step, and scalars multiply finished sums.

**In memory**, per token; the order of bits inside words is that of `planes`, j counts in rate order, and N_b is the
number of coordinates of at least b bits, which come first:

    sign        ceil(D / 32) words      all j; one RaBitQ code per group, each of its own rotation
    magnitude   the words of            mag2_0: j < N_3,  mag2_1: j < N_5,  mag2_2: j < N_7,  ceil(N / 16) words each,
                                        mag1: top bits of the coordinates with an even number of bits, counted
                                        in rate order, ceil(N_even / 32) words
    scale       one scalar per group    float16, or one byte: 0 is 0, 255 is NaN, c is 2^((c - 128) / 16 + e), e a whole
                                        number per head

Heads have rows of equal length, that of the longest; what a shorter one does not use is 0.  In tiles of 32 coordinates
(`allocate`, `tile`) all rows of magnitudes are equally long, b words for a tile of b bits, its sign word included; in
tiles of 16, up to half a word apart.
"""
from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from . import attention, planes as bit_planes, turboquant
from .claim import Claim, bound, expectation, identity, weakest
from .codebook import sphere
from .rotation import Rotation, fixed_vectors, haar, hadamard, rotate
from .turboquant import codebook_for

PAIRINGS = ("half", "interleaved")
SCORES = ("product", "mean")
ROTATIONS = ("haar", "hadamard")
MOST_BITS = 8
STEPS_PER_OCTAVE = 16              # of scalars in one byte


# --- Blocks, energies, scores ----------------------------------------------------------------------------------------


def blocks(head_dim: int, pairing: str, rotary_dim: int | None = None) -> np.ndarray:
    """The two coordinates of each block, [head_dim / 2, 2].

    pairing    : "half": i and i + rotary_dim / 2 (Llama, Qwen, Mistral); "interleaved": 2 i and 2 i + 1 (GLM-4,
                 DeepSeek-V2)
    rotary_dim : coordinates that RoPE turns, the first ones (default: all).  The others are paired as neighbours
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    for name, value, most in (("head_dim", head_dim, 2**15), ("rotary_dim", rotary_dim, head_dim)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value % 2 or not 0 <= value <= most:
            raise ValueError(f"block_gtq: {name}: expected an even integer of at most {most}, got {value!r}")
    if pairing not in PAIRINGS:
        raise ValueError(f"block_gtq: pairing: expected one of {', '.join(PAIRINGS)}, got {pairing!r}")
    pairs = np.arange(head_dim).reshape(-1, 2)
    if pairing == "half":
        pairs[: rotary_dim // 2] = np.arange(rotary_dim).reshape(2, -1).T
    return pairs


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the allocation of one layer is made from.

    query_energy  [kv_heads, head_dim / 2] float64, EQ of each block; 1 everywhere if no queries were known
    key_energy    likewise, EK, of k - mean
    mean          [kv_heads, head_dim] float32, of the keys, to be subtracted before encoding; None: nothing is
    pairing, rotary_dim   as in `blocks`
    """

    query_energy: np.ndarray
    key_energy: np.ndarray
    mean: np.ndarray | None
    pairing: str
    rotary_dim: int

    @property
    def head_dim(self) -> int:
        return 2 * self.key_energy.shape[1]

    def arrays(self) -> dict[str, np.ndarray]:
        """What to save, by name; `of` makes the calibration again."""
        named = {"query_energy": self.query_energy, "key_energy": self.key_energy}
        return named if self.mean is None else {**named, "mean": self.mean}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], pairing: str, rotary_dim: int) -> Calibration:
        """ValueError for energies that are negative or not finite, and for shapes that do not fit together."""
        query, key = (np.asarray(arrays[name], np.float64) for name in ("query_energy", "key_energy"))
        if key.ndim != 2 or query.shape != key.shape:
            raise ValueError(f"block_gtq: calibration: expected energies [kv_heads, head_dim / 2] of queries and keys, "
                             f"got {list(query.shape)} and {list(key.shape)}")
        for name, energy in (("query_energy", query), ("key_energy", key)):
            if not (np.isfinite(energy) & (energy >= 0)).all():
                raise ValueError(f"block_gtq: calibration: {name}: expected finite numbers of at least 0")
        blocks(2 * key.shape[1], pairing, rotary_dim)
        mean = arrays.get("mean")
        if mean is not None:
            mean = np.asarray(mean, np.float32)
            if mean.shape != (len(key), 2 * key.shape[1]) or not np.isfinite(mean).all():
                raise ValueError(f"block_gtq: calibration: mean: expected finite numbers "
                                 f"{[len(key), 2 * key.shape[1]]}, got {list(mean.shape)}")
        return cls(query, key, mean, pairing, rotary_dim)


def calibrate(keys, query=None, *, pairing: str, rotary_dim: int | None = None, centred: bool = False) -> Calibration:
    """Energies of the blocks, and with `centred` the mean of the keys.

    keys  : [batch, kv_heads, tokens, head_dim], on the same side of RoPE as the queries, which is the side that will be
            encoded if `centred`
    query : [batch, q_heads, queries, head_dim], q_heads a multiple of kv_heads, or None: every EQ is then 1
    pairing, rotary_dim : as in `blocks`

    Query heads of a KV head are squared each and then averaged, never averaged first.  Vectors that hold NaN or Inf do
    not count.  Source: arXiv 2606.24033; the product score: derived in the head of this module.
    """
    keys = np.asarray(keys)
    if keys.ndim != 4:
        raise ValueError(f"block_gtq: keys: expected [batch, kv_heads, tokens, head_dim], got {list(keys.shape)}")
    batch, kv_heads, _, head_dim = keys.shape
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    pairs = blocks(head_dim, pairing, rotary_dim)
    keys = np.moveaxis(keys.astype(np.float64), 1, 0).reshape(kv_heads, -1, head_dim)
    mean = None
    if centred:
        mean = np.stack([_finite(head).mean(axis=0) if len(_finite(head)) else np.zeros(head_dim) for head in keys])
        mean = mean.astype(np.float32)
        keys = keys - mean[:, None].astype(np.float64)
    key_energy = _energies(keys, pairs)
    query_energy = np.ones_like(key_energy)
    if query is not None:
        query = np.asarray(query)
        if query.ndim != 4 or query.shape[3] != head_dim or query.shape[0] != batch or query.shape[1] % kv_heads:
            raise ValueError(f"block_gtq: query: expected [batch, q_heads, queries, head_dim] = [{batch}, a multiple "
                             f"of {kv_heads}, any, {head_dim}], got {list(query.shape)}")
        grouped = np.moveaxis(query.astype(np.float64), 1, 0).reshape(kv_heads, -1, head_dim)
        query_energy = _energies(grouped, pairs)
    return Calibration(query_energy, key_energy, mean, pairing, int(rotary_dim))


def score(calibration: Calibration, kind: str = "product") -> np.ndarray:
    """s [kv_heads, head_dim / 2] float64: "product", EQ EK, or "mean", the paper's (EQ + EK) / 2."""
    if kind not in SCORES:
        raise ValueError(f"block_gtq: score: expected one of {', '.join(SCORES)}, got {kind!r}")
    if kind == "product":
        return calibration.query_energy * calibration.key_energy
    return (calibration.query_energy + calibration.key_energy) / 2


def _finite(vectors):
    return vectors[np.isfinite(vectors).all(axis=-1)]


def _energies(heads, pairs):
    """[kv_heads, blocks] of [kv_heads, vectors, head_dim]; 0 for a head without finite vectors."""
    energies = np.zeros((len(heads), len(pairs)))
    for h, head in enumerate(heads):
        squares = _finite(head) ** 2
        if len(squares):
            energies[h] = squares.mean(axis=0)[pairs].sum(axis=-1)
    return energies


# --- Allocation ------------------------------------------------------------------------------------------------------


def allocate(scores, average_bits: float, *, least: int = 1, most: int = MOST_BITS, tile: int = 2,
             greedy: Callable | None = None) -> np.ndarray:
    """Bits per coordinate of every block, uint8 of the shape of `scores`, that minimise J within the budget.

    scores       : [..., blocks], finite, at least 0; every row is a head, with a budget of its own
    average_bits : bits per coordinate, from `least` to `most`; the budget is floor(blocks * average_bits), rounded down
                   to whole tiles
    least, most  : bits of a block, 1 to 8; at least 1 so that the sign plane is full
    tile         : coordinates that get bits together, a whole number of blocks: a tile is `tile` / 2 blocks that follow
                   one another in the order of falling scores, which is optimal among tiles of one size.  2: every block
                   for itself, the paper's
    greedy       : (scores [n], budget, least, most) -> bits [n] (default: `_greedy`)

    Ties go to the lowest index, and to the fewest bits where all scores are 0.  Source: arXiv 2606.24033, Theorem 1.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim < 1 or not (np.isfinite(scores) & (scores >= 0)).all():
        raise ValueError("block_gtq: scores: expected finite numbers of at least 0, [..., blocks]")
    count = scores.shape[-1]
    for name, value, low in (("least", least, 1), ("most", most, least)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= MOST_BITS:
            raise ValueError(f"block_gtq: {name}: expected an integer from {low} to {MOST_BITS}, got {value!r}")
    if not isinstance(tile, (int, np.integer)) or tile < 2 or tile % 2 or count % (tile // 2):
        raise ValueError(f"block_gtq: tile: expected an even number of coordinates that divides {2 * count}, "
                         f"got {tile!r}")
    if not least <= average_bits <= most:
        raise ValueError(f"block_gtq: average_bits: expected a number from least = {least} to most = {most}, "
                         f"got {average_bits!r}")
    step = tile // 2
    budget = int(count * average_bits + 1e-9) // step                    # in tiles; 1e-9: 2.2 * 5 is 11
    greedy = _greedy if greedy is None else greedy
    result = np.empty(scores.shape, np.uint8)
    for at in np.ndindex(scores.shape[:-1]):
        falling = np.argsort(-scores[at], kind="stable") if step > 1 else np.arange(count)
        tiles = scores[at][falling].reshape(-1, step).sum(axis=-1)
        result[at][falling] = np.repeat(greedy(tiles, budget, least, most), step)
    return result


def _greedy(scores, budget, least, most):
    """Bits of each score, `budget` in all.  s 4^-b = m 2^(e - 2 b) is compared by exponent and mantissa: exactly, and
    without underflow."""
    bits = np.full(len(scores), least, np.uint8)

    def entry(i):
        if scores[i] == 0:
            return np.inf, int(bits[i]), i
        mantissa, exponent = np.frexp(scores[i])
        return -float(exponent - 2 * int(bits[i])), -float(mantissa), i

    heap = [entry(i) for i in range(len(scores)) if bits[i] < most]
    heapq.heapify(heap)
    for _ in range(budget - least * len(scores)):
        *_, i = heapq.heappop(heap)
        bits[i] += 1
        if bits[i] < most:
            heapq.heappush(heap, entry(i))
    return bits


def objective(scores, bits) -> np.ndarray:
    """J = sum_i s_i 4^(-b_i) over the last axis."""
    return (np.asarray(scores, np.float64) * 4.0 ** -np.asarray(bits, np.float64)).sum(axis=-1)


def is_optimal(scores, bits, least: int = 1, most: int = MOST_BITS) -> bool:
    """The certificate: no bit does more for J at another block, s_i 4^(-b_i) <= s_j 4^(-(b_j - 1)) for b_i < most and
    b_j > least.  One head: scores and bits [blocks]."""
    scores, bits = np.asarray(scores, np.float64), np.asarray(bits, np.float64)
    gains, losses = (scores * 4.0**-bits)[bits < most], (scores * 4.0 ** (1 - bits))[bits > least]
    return not len(gains) or not len(losses) or bool(gains.max() <= losses.min())


# --- The plan: rate order, groups, rotations -------------------------------------------------------------------------


class Group(NamedTuple):
    """Coordinates start .. start + size - 1 in rate order, of `bits` bits each."""

    bits: int
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class Plan:
    """How the keys of one layer are coded: bits of the blocks of every KV head, and what rotates them.

    bits       [kv_heads, head_dim / 2] uint8, 1 to 8
    pairing, rotary_dim   as in `blocks`
    seed       of the rotations: one for each size of a group, shared by all heads
    rotation   "haar": a dense matrix for every group; "hadamard": three rounds of a randomised Hadamard transform for
               groups whose size is a power of two
    exponents  [kv_heads] int16: scalars are one byte, relative to 2^exponent; None: scalars are float16
    least_scalars, least_words   rows of scalars and of magnitudes are at least as long, and padded: what several plans
               share has rows of one length
    """

    bits: np.ndarray
    pairing: str
    rotary_dim: int
    seed: int = 0
    rotation: str = "haar"
    exponents: np.ndarray | None = None
    least_scalars: int = 1
    least_words: int = 0

    def __post_init__(self):
        bits = np.asarray(self.bits)
        if bits.ndim != 2 or bits.dtype.kind not in "ui" or not ((bits >= 1) & (bits <= MOST_BITS)).all():
            raise ValueError(f"block_gtq: plan: bits: expected integers from 1 to {MOST_BITS}, "
                             f"[kv_heads, head_dim / 2], got {bits.dtype} {list(bits.shape)}")
        blocks(self.head_dim, self.pairing, self.rotary_dim)
        if self.rotation not in ROTATIONS:
            raise ValueError(f"block_gtq: plan: rotation: expected one of {', '.join(ROTATIONS)}, "
                             f"got {self.rotation!r}")
        if self.exponents is not None and np.shape(self.exponents) != (len(bits),):
            raise ValueError(f"block_gtq: plan: exponents: expected one for each of the {len(bits)} KV heads, "
                             f"got {list(np.shape(self.exponents))}")

    @property
    def kv_heads(self) -> int:
        return self.bits.shape[0]

    @property
    def head_dim(self) -> int:
        return 2 * self.bits.shape[1]

    @functools.cached_property
    def order(self) -> np.ndarray:
        """[kv_heads, head_dim] int16: the coordinate that stands at each place of the rate order."""
        pairs = blocks(self.head_dim, self.pairing, self.rotary_dim)
        falling = np.argsort(-self.bits.astype(int), axis=-1, kind="stable")
        return pairs[falling].reshape(self.kv_heads, self.head_dim).astype(np.int16)

    @functools.cached_property
    def groups(self) -> tuple[tuple[Group, ...], ...]:
        """Of each KV head, in rate order."""
        result = []
        for head in self.bits:
            rates, counts = np.unique(head, return_counts=True)
            sizes = 2 * counts[::-1]
            starts = np.cumsum(sizes) - sizes
            result.append(tuple(Group(int(b), int(start), int(size))
                                for b, start, size in zip(rates[::-1], starts, sizes)))
        return tuple(result)

    @property
    def scalars(self) -> int:
        """Per token: as many as the head with most groups has."""
        return max(self.least_scalars, *(len(groups) for groups in self.groups))

    @property
    def magnitude_words(self) -> int:
        """Of a row: as many as the head with the longest row needs."""
        return max(self.least_words, *map(sum, self.plane_words()))

    def plane_words(self) -> list[tuple[int, ...]]:
        """Words of mag2_0, mag2_1, mag2_2 and mag1 in the rows of every head."""
        return [tuple(count for _, count in _plane_sizes(rates)) for rates in self.rates()]

    @property
    def bits_per_element(self) -> float:
        """Bits held per coordinate, scalars and padding counted."""
        words = -(-self.head_dim // 32) + self.magnitude_words
        return (32 * words + (16 if self.exponents is None else 8) * self.scalars) / self.head_dim

    def part(self, start: int, stop: int) -> Plan:
        """The plan of KV heads start .. stop - 1, with rows as long as those of all."""
        exponents = None if self.exponents is None else self.exponents[start:stop]
        return replace(self, bits=self.bits[start:stop], exponents=exponents, least_scalars=self.scalars,
                       least_words=self.magnitude_words)

    def rates(self) -> np.ndarray:
        """[kv_heads, head_dim] uint8: bits of the coordinates in rate order, falling."""
        return np.repeat(-np.sort(-self.bits.astype(int), axis=-1), 2, axis=-1).astype(np.uint8)

    def rotation_of(self, size: int) -> Rotation:
        """R_g of a group of that size."""
        kind = "hadamard" if self.rotation == "hadamard" and size & (size - 1) == 0 else "haar"
        return _rotation(kind, size, self.seed)

    def matrix(self, head: int) -> np.ndarray:
        """blockdiag(R_g) P, [head_dim, head_dim] float64: of x it makes the rotated coordinates in rate order."""
        result = np.zeros((self.head_dim, self.head_dim))
        for group in self.groups[head]:
            places = slice(group.start, group.start + group.size)
            result[places, self.order[head, places]] = self.rotation_of(group.size).dense()
        return result

    def tile(self) -> int:
        """The largest power of two that divides the sizes of all groups: 16 and more is what kernels take."""
        sizes = functools.reduce(np.bitwise_or, [group.size for head in self.groups for group in head])
        return int(sizes & -sizes)


@functools.lru_cache(maxsize=256)
def _rotation(kind, size, seed):
    return hadamard(size, seed) if kind == "hadamard" else haar(size, seed)


def plan(calibration: Calibration, average_bits: float, *, score_kind: str = "product", least: int = 1,
         most: int = MOST_BITS, tile: int = 2, seed: int = 0, rotation: str = "haar",
         scale_bits: int = 16) -> Plan:
    """The plan of a calibrated layer: `score`, then `allocate`.  scale_bits : 16 or 8, of the scalars of groups."""
    if scale_bits not in (8, 16):
        raise ValueError(f"block_gtq: scale_bits: expected 8 or 16, got {scale_bits!r}")
    bits = allocate(score(calibration, score_kind), average_bits, least=least, most=most, tile=tile)
    exponents = None
    if scale_bits == 8:                                     # the middle of the range: a typical coordinate of the head
        mean_square = calibration.key_energy.sum(axis=-1) / calibration.head_dim
        exponents = np.where(mean_square > 0, np.rint(np.log2(np.where(mean_square > 0, mean_square, 1)) / 2), 0)
        exponents = exponents.astype(np.int16)
    return Plan(bits, calibration.pairing, calibration.rotary_dim, seed, rotation, exponents)


def predicted_error(calibration: Calibration, plan: Plan) -> np.ndarray:
    """Mean squared error of <q, k_hat> for each KV head, [kv_heads] float64: what J does not see is that a rotation
    spreads the error evenly over its group,

        sum_g D(b_g) (sum_(i in g) EQ_i) (sum_(i in g) EK_i) / D_g.
    """
    result = np.zeros(plan.kv_heads)
    for h, groups in enumerate(plan.groups):
        for group in groups:
            members = plan.bits[h] == group.bits
            energies = calibration.query_energy[h, members].sum() * calibration.key_energy[h, members].sum()
            result[h] += codebook_for(group.bits, group.size).distortion * energies / group.size
    return result


# --- Codes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """Keys [batch, kv_heads, tokens, head_dim] as codes; see the head of this module.

    sign       [batch, kv_heads, tokens, ceil(head_dim / 32)] uint32
    magnitude  [batch, kv_heads, tokens, words] uint32
    scale      [batch, kv_heads, tokens, scalars] float16, or uint8; 0 where a head has fewer groups
    """

    sign: np.ndarray
    magnitude: np.ndarray
    scale: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.sign.nbytes + self.magnitude.nbytes + self.scale.nbytes


def encode(x, plan: Plan, *, scale_mode: str = "nc", mean=None, check_finite: bool = False) -> Encoded:
    """Permute, rotate by groups, normalise, code and pack.

    x            : [batch, kv_heads, tokens, head_dim], any real dtype; keys after RoPE
    scale_mode   : "nc", "plain", "mse" or "unbiased", of each group: see `turboquant`
    mean         : [kv_heads, head_dim] or [batch, kv_heads, head_dim], subtracted from x and never added back
    check_finite : raise ValueError where x holds NaN or Inf, instead of storing NaN scalars there

    A group that is zero has codes 0 and scalar 0.  A vector that holds NaN or Inf has codes 0 and NaN for all scalars.
    Source: arXiv 2606.24033; each group: TurboQuant, arXiv 2504.19874, Algorithm 1.
    """
    x, finite = _checked(x, plan, mean, check_finite)
    batch, kv_heads, tokens, head_dim = x.shape
    shape = (batch, kv_heads, tokens)
    signs, magnitudes = np.zeros((2, *x.shape), np.uint8)
    s = np.zeros((*shape, plan.scalars))
    for h, groups in enumerate(plan.groups):
        for g, (group, y) in enumerate(zip(groups, _rotated(x[:, h], plan, h))):
            places = slice(group.start, group.start + group.size)
            codes = turboquant.quantise(y, codebook_for(group.bits, group.size), scale_mode)
            signs[:, h, :, places], magnitudes[:, h, :, places], s[:, h, :, g] = codes
    return Encoded(*pack(signs, magnitudes, plan), stored_scale(s, finite, plan))


def decode(encoded: Encoded, plan: Plan) -> np.ndarray:
    """x_hat = P^T blockdiag(s_g R_g^T) c, [batch, kv_heads, tokens, head_dim] float64 (of x - mean, if centred)."""
    s, c = scale_of(encoded.scale, plan), _centroids(encoded, plan)
    result = np.empty(c.shape)
    for h, groups in enumerate(plan.groups):
        for g, group in enumerate(groups):
            places = slice(group.start, group.start + group.size)
            back = rotate(s[:, h, :, g, None] * c[:, h, :, places], plan.rotation_of(group.size), inverse=True)
            result[:, h, :, plan.order[h, places]] = np.moveaxis(back, -1, 0)
    return result


def logits(query, encoded: Encoded, plan: Plan, *, scale=None) -> np.ndarray:
    """scale <q_h, x_hat_t> = scale sum_g s_tg <q'_hg, c_tg>, [batch, q_heads, tokens] float64.

    query : [batch, q_heads, head_dim], q_heads a multiple of kv_heads        scale : default head_dim ** -0.5
    """
    rows, s, c = folded_query(query, plan, scale), scale_of(encoded.scale, plan), _centroids(encoded, plan)
    if rows.shape[0] != c.shape[0]:
        raise ValueError(f"block_gtq: query: expected the batch of the codes, {c.shape[0]}, got {rows.shape[0]}")
    result = np.zeros((*rows.shape[:3], c.shape[2]))
    for h, groups in enumerate(plan.groups):
        for g, group in enumerate(groups):
            places = slice(group.start, group.start + group.size)
            products = rows[:, h, :, places] @ np.swapaxes(c[:, h, :, places], -1, -2)
            result[:, h] += s[:, h, None, :, g] * products
    return result.reshape(rows.shape[0], rows.shape[1] * rows.shape[2], c.shape[2])


def decode_attention(query, keys: Encoded, values: turboquant.Encoded, plan: Plan, value_rotation: Rotation, *,
                     lengths=None, scale=None, key_mean=None, return_lse: bool = True):
    """One decode step of attention on the codes: `attention.decode` over the decoded keys and values.

    query    : [batch, q_heads, head_dim], not rotated        values : TurboQuant codes, never centred
    lengths  : [batch] int, tokens of each sequence (default: all); slots from there on are not read
    scale    : factor of the logits (default head_dim ** -0.5)
    key_mean : the mean of centred keys, as `encode` took it: scale <q, mean> is added to lse

    Returns (output [batch, q_heads, head_dim], lse [batch, q_heads]), float64, natural logarithm; the output alone
    without `return_lse`.  An empty sequence gives output 0 and lse -inf.
    """
    scale = plan.head_dim**-0.5 if scale is None else scale
    base_2 = logits(query, keys, plan, scale=np.log2(np.e) * scale)
    output, lse = turboquant.attend(base_2, values, value_rotation, lengths)
    if key_mean is not None:
        lse += turboquant.mean_logits(query, key_mean, plan.kv_heads, scale)
    return (output, lse) if return_lse else output


def folded_query(query, plan: Plan, scale=None) -> np.ndarray:
    """q' = scale blockdiag(R_g) P q, in rate order: [batch, kv_heads, group, head_dim] float64."""
    query = np.asarray(query).astype(np.float64)
    if query.ndim != 3 or query.shape[2] != plan.head_dim or query.shape[1] % plan.kv_heads:
        raise ValueError(f"block_gtq: query: expected [batch, q_heads, head_dim] = [any, a multiple of "
                         f"{plan.kv_heads}, {plan.head_dim}], got {list(query.shape)}")
    grouped = query.reshape(len(query), plan.kv_heads, query.shape[1] // plan.kv_heads, plan.head_dim)
    rows = np.empty(grouped.shape)
    for h, groups in enumerate(plan.groups):
        for group, y in zip(groups, _rotated(grouped[:, h], plan, h)):
            rows[:, h, :, group.start : group.start + group.size] = y
    return (plan.head_dim**-0.5 if scale is None else float(scale)) * rows


def boundary_distance(x, plan: Plan, *, mean=None) -> np.ndarray:
    """Distance of |z_j| to the nearest decision, [batch, kv_heads, tokens, head_dim] in rate order.

    As `turboquant.boundary_distance`: codes of two backends may differ where it is at most
    `turboquant.ROUNDING_DISTANCE`.  inf for a group without a direction.
    """
    x, finite = _checked(x, plan, mean)
    result = np.full(x.shape, np.inf)
    for h, groups in enumerate(plan.groups):
        for group, y in zip(groups, _rotated(x[:, h], plan, h)):
            norm = np.linalg.norm(y, axis=-1)
            z = y * (group.size**0.5 / np.where(norm == 0, 1.0, norm))[..., None]
            distance = codebook_for(group.bits, group.size).distance(z)
            known = finite[:, h] & (norm > 0)
            result[:, h, :, group.start : group.start + group.size] = np.where(known[..., None], distance, np.inf)
    return result


def _checked(x, plan, mean=None, check_finite=False):
    x, finite = turboquant.centred(x, mean, check_finite)
    if x.shape[1] != plan.kv_heads or x.shape[3] != plan.head_dim:
        raise ValueError(f"block_gtq: x: expected [batch, {plan.kv_heads}, tokens, {plan.head_dim}], as planned, "
                         f"got {list(x.shape)}")
    return x, finite


def _rotated(x, plan, head):
    """R_g x_g of each group of the vectors x [..., head_dim] of one KV head."""
    ordered = x[..., plan.order[head]]
    return [rotate(ordered[..., group.start : group.start + group.size], plan.rotation_of(group.size))
            for group in plan.groups[head]]


def _centroids(encoded, plan):
    """c of the codes in rate order, [batch, kv_heads, tokens, head_dim] float64."""
    if encoded.sign.shape[1] != plan.kv_heads:
        raise ValueError(f"block_gtq: encoded: expected the {plan.kv_heads} KV heads of the plan, "
                         f"got {encoded.sign.shape[1]}")
    signs, magnitudes = unpack(encoded.sign, encoded.magnitude, plan)
    c = np.empty(signs.shape)
    for h, groups in enumerate(plan.groups):
        for group in groups:
            places = slice(group.start, group.start + group.size)
            c[:, h, :, places] = codebook_for(group.bits, group.size).reconstruct(signs[:, h, :, places],
                                                                                  magnitudes[:, h, :, places])
    return c


# --- Scalars ---------------------------------------------------------------------------------------------------------


def stored_scale(s, finite, plan: Plan) -> np.ndarray:
    """The scalars s [batch, kv_heads, tokens, scalars] as they are stored; NaN where a vector was not finite.

    One byte: s between 2^-8 and 2^8 times 2^exponent, 16 steps to a factor of two; less is 0, more the largest.
    """
    if plan.exponents is None:
        return turboquant.stored_scale(s, finite[..., None])
    relative = s / 2.0 ** plan.exponents[:, None, None].astype(np.float64)
    logarithm = np.rint(STEPS_PER_OCTAVE * np.log2(np.where(relative > 0, relative, 1))) + 128
    code = np.where((relative > 0) & (logarithm >= 1), np.clip(logarithm, 1, 254), 0)
    return np.where(finite[..., None], code, 255).astype(np.uint8)


def scale_of(stored, plan: Plan) -> np.ndarray:
    """The scalars, float64, of what `stored_scale` stored."""
    if plan.exponents is None:
        return stored.astype(np.float64)
    values = 2.0 ** ((stored.astype(np.float64) - 128) / STEPS_PER_OCTAVE + plan.exponents[:, None, None])
    return np.where(stored == 0, 0.0, np.where(stored == 255, np.nan, values))


# --- Planes ----------------------------------------------------------------------------------------------------------


def pack(signs, magnitudes, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(sign, magnitude) words of codes [batch, kv_heads, tokens, head_dim] in rate order."""
    words = np.zeros((*signs.shape[:3], plan.magnitude_words), np.uint32)
    for h, rates in enumerate(plan.rates()):
        start, m = 0, magnitudes[:, h]
        for (plane, count), covered in zip(_plane_sizes(rates), _covered(rates)):
            part = m[..., covered].astype(np.uint32)
            if plane == "mag1":
                packed = bit_planes.pack_bits(part >> (rates[covered].astype(np.uint32) - 2))
            else:
                packed = bit_planes.pack_pairs(part >> np.uint32(2 * int(plane[-1])) & np.uint32(3))
            words[:, h, :, start : start + count] = packed
            start += count
    return bit_planes.pack_bits(signs), words


def unpack(sign, magnitude, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(signs, magnitudes), uint8 [batch, kv_heads, tokens, head_dim] in rate order, that were packed."""
    signs = bit_planes.unpack_bits(sign, plan.head_dim)
    magnitudes = np.zeros(signs.shape, np.uint8)
    for h, rates in enumerate(plan.rates()):
        start = 0
        for (plane, count), covered in zip(_plane_sizes(rates), _covered(rates)):
            part = magnitude[:, h, :, start : start + count]
            if plane == "mag1":
                top = bit_planes.unpack_bits(part, len(covered))
                magnitudes[:, h, :, covered] |= np.moveaxis(top << (rates[covered] - 2), -1, 0)
            else:
                pairs = bit_planes.unpack_pairs(part, len(covered))
                magnitudes[:, h, :, covered] |= np.moveaxis(pairs << np.uint8(2 * int(plane[-1])), -1, 0)
            start += count
    return signs, magnitudes


def _covered(rates):
    """Which coordinates each of mag2_0, mag2_1, mag2_2 and mag1 holds, in its order."""
    return [np.flatnonzero(rates >= least) for least in (3, 5, 7)] + [np.flatnonzero(rates % 2 == 0)]


def _plane_sizes(rates):
    """(plane, its words) in the order of a row of magnitudes."""
    counts = [len(covered) for covered in _covered(rates)]
    return [(f"mag2_{i}", -(-counts[i] // 16)) for i in range(3)] + [("mag1", -(-counts[3] // 32))]


# --- Claims ----------------------------------------------------------------------------------------------------------

_ROUNDING = 2.0**-52


def _scores(rng, count, ties=True):
    """Of all sizes; with `ties` some are equal, zero, or powers of four apart."""
    scores = 10.0 ** rng.uniform(-3, 3, count)
    if ties and rng.random() < 0.5:
        scores = 4.0 ** rng.integers(-3, 4, count)
    if ties:
        scores[rng.random(count) < 0.2] = rng.choice([0.0, 1.0])
    return scores


def _limits(rng):
    least = int(rng.integers(1, 4))
    return least, int(rng.integers(least, MOST_BITS + 1))


def _least_objective(scores, budget, least, most):
    """Minimum of J over all allocations of exactly `budget` bits, by dynamic programming over the blocks."""
    best = {0: 0.0}
    for s in scores:
        following = {}
        for spent, value in best.items():
            for bits in range(least, most + 1):
                if spent + bits <= budget:
                    total = value + s * 4.0**-bits
                    following[spent + bits] = min(following.get(spent + bits, np.inf), total)
        best = following
    return best[budget]


def _greedy_is_optimal(rng, samples):
    deviation, allowance = [], []
    for _ in range(samples):
        count, (least, most) = int(rng.integers(1, 7)), _limits(rng)
        budget = int(rng.integers(least * count, most * count + 1))
        scores = _scores(rng, count)
        expected = _least_objective(scores, budget, least, most)
        deviation.append(objective(scores, allocate(scores, budget / count, least=least, most=most)) - expected)
        allowance.append(2 * count * _ROUNDING * expected)
    return identity(deviation, allowance)


def _tiles_are_optimal(rng, samples):
    """Against every way to cut up to eight blocks into tiles of two, each with its own best allocation."""
    def cuts(members):
        if not members:
            yield []
        for other in members[1:]:
            for rest in cuts([i for i in members[1:] if i != other]):
                yield [(members[0], other), *rest]

    value, limit = [], []
    for _ in range(samples):
        count = int(rng.choice([2, 4, 6, 8]))
        scores = _scores(rng, count)
        budget = int(rng.integers(count // 2, 4 * count // 2 + 1))
        others = [_least_objective([scores[list(tile)].sum() for tile in cut], budget, 1, MOST_BITS)
                  for cut in cuts(list(range(count)))]
        value.append(objective(scores, allocate(scores, 2 * budget / count, tile=4)))
        limit.append(min(others) * (1 + 4 * count * _ROUNDING))
    return bound(value, limit)


def _certificate(rng, samples):
    failed = []
    for _ in range(samples):
        count, (least, most) = int(rng.integers(1, 129)), _limits(rng)
        scores = _scores(rng, count)
        bits = allocate(scores, rng.uniform(least, most), least=least, most=most)
        failed.append(not is_optimal(scores, bits, least, most))
    return identity(np.array(failed, float))


def _continuous(rng, samples):
    """|b_i - (Bud / L + log4(s_i / geomean))| of allocations that touch no bound."""
    distance = []
    while len(distance) < samples:
        count = int(rng.integers(1, 129))
        scores = 2.0 ** rng.uniform(-3, 3, count)
        bits = allocate(scores, rng.uniform(2.5, 6.5)).astype(int)
        if bits.min() > 1 and bits.max() < MOST_BITS:
            logarithms = np.log(scores) / np.log(4)
            distance.append(np.abs(bits - (bits.mean() + logarithms - logarithms.mean())).max())
    return bound(distance, 1 + 1e-12)


def _beats_uniform(rng, samples):
    value, limit = [], []
    for _ in range(samples):
        count, rate = int(rng.integers(1, 129)), int(rng.integers(1, MOST_BITS + 1))
        scores = _scores(rng, count)
        value.append(objective(scores, allocate(scores, rate)))
        limit.append(objective(scores, np.full(count, rate)) * (1 + 2 * count * _ROUNDING))
    return bound(value, limit)


def _equivariance(rng, samples):
    differences = []
    for _ in range(samples):
        count, average_bits = int(rng.integers(1, 129)), rng.uniform(1, MOST_BITS)
        scores = _scores(rng, count)
        bits = allocate(scores, average_bits)
        differences.append(np.sum(bits != allocate(scores * 2.0 ** int(rng.integers(-900, 900)), average_bits)))
        scores, permutation = _scores(rng, count, ties=False), rng.permutation(count)
        permuted = allocate(scores[permutation], average_bits)
        differences.append(np.sum(permuted != allocate(scores, average_bits)[permutation]))
    return identity(differences)


def _activations(rng, head_dim=64, heads=2):
    """(keys, queries) [1, heads, 40, head_dim] and [1, 2 heads, 40, head_dim], uneven over coordinates."""
    gains = 2.0 ** rng.normal(0, 1.5, (2, head_dim))
    return (rng.standard_normal((1, heads, 40, head_dim)) * gains[0],
            rng.standard_normal((1, 2 * heads, 40, head_dim)) * gains[1])


def _per_coordinate(factors, pairs):
    result = np.empty(pairs.size)
    result[pairs] = factors[:, None]
    return result


def _gauge(rng, samples):
    """Blocks of q times powers of two, and of k divided by them: the product score and its allocation stay."""
    differences, changed = [], 0
    for _ in range(samples):
        keys, query = _activations(rng)
        factors = _per_coordinate(2.0 ** rng.integers(-3, 4, 32), blocks(64, "half"))
        for kind in SCORES:
            one, other = (allocate(score(calibrate(k, q, pairing="half"), kind), 3.0)
                          for k, q in ((keys, query), (keys / factors, query * factors)))
            if kind == "product":
                differences.append(np.sum(one != other))
            else:
                changed += np.any(one != other)
    return weakest({"product stays": identity(differences),
                    "mean changes": bound([0.5], [changed / samples])})


def _turn(x, positions, pairs, base=10000.0):
    """RoPE of vectors [..., tokens, head_dim]."""
    angles = positions[:, None] * base ** (-np.arange(len(pairs)) / len(pairs))
    first, second = x[..., pairs[:, 0]], x[..., pairs[:, 1]]
    result = np.empty(x.shape)
    result[..., pairs[:, 0]] = first * np.cos(angles) - second * np.sin(angles)
    result[..., pairs[:, 1]] = first * np.sin(angles) + second * np.cos(angles)
    return result


def _rope(rng, samples):
    deviation = []
    for case in range(samples):
        pairing = PAIRINGS[case % 2]
        keys, query = _activations(rng)
        positions = rng.integers(0, 2**17, 40).astype(float)
        turned = (_turn(x, positions, blocks(64, pairing)) for x in (keys, query))
        before, after = calibrate(keys, query, pairing=pairing), calibrate(*turned, pairing=pairing)
        for name, energy in before.arrays().items():
            deviation.append(np.abs(after.arrays()[name] / energy - 1).max())
    # Cosine and sine are off by 2^-53 each, a turned square by some 8 of these; a mean adds as many as it has terms.
    return identity(deviation, 200 * _ROUNDING, samples=samples)


def _pairings(rng, samples):
    """The coordinates of one layout moved to where the other has them: the same bits, and the same codes."""
    differences = []
    for _ in range(samples):
        keys, query = _activations(rng)
        to_half = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])
        one = calibrate(keys, query, pairing="interleaved")
        other = calibrate(keys[..., to_half], query[..., to_half], pairing="half")
        plans = [plan(c, 3.0, seed=1) for c in (one, other)]
        differences.append(np.sum(plans[0].bits != plans[1].bits))
        if differences[-1]:
            continue
        codes = [encode(x, p) for x, p in zip((keys, keys[..., to_half]), plans)]
        differences += [np.sum(codes[0].sign != codes[1].sign), np.sum(codes[0].magnitude != codes[1].magnitude),
                        np.sum(codes[0].scale != codes[1].scale)]
    return identity(differences)


_SIZES = ((2, 2), (2, 4), (4, 3), (8, 3), (16, 4), (32, 5))              # of a group, and its bits


def _group_draws(rng, samples, size, bits, mode):
    """(R x [samples, 6, size], c s before rounding), of fixed unit vectors x under Haar rotations."""
    first = int(rng.integers(2**32))
    y = np.stack([rotate(fixed_vectors(size), haar(size, first + i)) for i in range(samples)])
    signs, magnitudes, s = turboquant.quantise(y, sphere(bits, size), mode)
    return y, s[..., None] * sphere(bits, size).reconstruct(signs, magnitudes)


def _distortion(rng, samples):
    cases = {}
    for size, bits in _SIZES:
        y, code = _group_draws(rng, samples, size, bits, "plain")
        cases[f"group of {size}, {bits} bits"] = expectation(((y - code) ** 2).sum(axis=-1),
                                                             sphere(bits, size).distortion)
    return weakest(cases)


def _distortion_of_a_pair(rng, samples):
    """nc in two dimensions: y = (cos a, sin a), a uniform, so |y - c / |c||^2 is an integral over one angle, which is
    here a sum over cells of the midpoints of a fine grid."""
    cases = {}
    angles = (np.arange(2**18) + 0.5) * (2 * np.pi / 2**18)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    for bits in (1, 2, 3):
        signs, magnitudes, s = turboquant.quantise(circle, sphere(bits, 2), "nc")
        code = s[..., None] * sphere(bits, 2).reconstruct(signs, magnitudes)
        expected = ((circle - code) ** 2).sum(axis=-1).mean()
        y, code = _group_draws(rng, samples, 2, bits, "nc")
        # Midpoints of a cell that a decision cuts are off by its width times the jump, at most 4, at some 2^bits of it.
        cases[f"{bits} bits"] = expectation(((y - code) ** 2).sum(axis=-1), expected, allowance=2.0**-12)
    return weakest(cases)


def _unbiased(rng, samples):
    cases = {}
    for size, bits in _SIZES:
        first, x = int(rng.integers(2**32)), fixed_vectors(size)
        other = np.random.default_rng(2).standard_normal(x.shape)
        rotations = [haar(size, first + i) for i in range(samples)]
        y, query = (np.stack([rotate(vectors, r) for r in rotations]) for vectors in (x, other))
        signs, magnitudes, s = turboquant.quantise(y, sphere(bits, size), "unbiased")
        code = s[..., None] * sphere(bits, size).reconstruct(signs, magnitudes)
        cases[f"group of {size}, {bits} bits"] = expectation((query * code).sum(axis=-1), (x * other).sum(axis=-1),
                                                             allowance=1e-12)
    return weakest(cases)


def _predictor(rng, samples):
    """Fixed energies, random directions in every block, and a rotation for each draw.  Given the error e of a key, the
    directions of q are uniform in every block, so that the mean of <q, e>^2 over them is sum_i EQ_i |e(i)|^2 / 2."""
    pairs = blocks(32, "half")
    energies = 2.0 ** np.random.default_rng(3).normal(0, 1.5, (2, 16))
    calibration = Calibration(energies[:1], energies[1:], None, "half", 32)
    scheme = plan(calibration, 3.0, tile=8)
    error = np.empty(samples)
    first, angle = int(rng.integers(2**32)), rng.uniform(0, 2 * np.pi, (samples, 16))
    keys = np.empty((samples, 32))
    keys[:, pairs] = np.sqrt(energies[1])[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    for i in range(samples):
        e = _exact_code(keys[i], Plan(scheme.bits, "half", 32, first + i)) - keys[i]
        error[i] = (energies[0] * (e[pairs] ** 2).sum(axis=-1)).sum() / 2
    predicted = predicted_error(calibration, scheme)[0]
    return expectation(error, predicted, allowance=0.1 * predicted)


def _exact_code(x, plan):
    """x_hat of one vector [head_dim] in the mode plain, scalars not rounded."""
    result = np.empty(plan.head_dim)
    for group, y in zip(plan.groups[0], _rotated(x, plan, 0)):
        book = codebook_for(group.bits, group.size)
        signs, magnitudes, s = turboquant.quantise(y, book, "plain")
        places = plan.order[0, group.start : group.start + group.size]
        result[places] = rotate(s * book.reconstruct(signs, magnitudes), plan.rotation_of(group.size), inverse=True)
    return result


def _scheme(rng, head_dim=None, kv_heads=2):
    """Any plan: free, tiled, flat, of few heads; float16 or one-byte scalars."""
    head_dim = int(rng.choice([2, 6, 32, 64, 96])) if head_dim is None else head_dim
    tiles = [w for w in (2, 2, 4, 16, 32) if head_dim % w == 0]
    bits = [allocate(_scores(rng, head_dim // 2), rng.uniform(1, MOST_BITS), tile=int(rng.choice(tiles)))
            for _ in range(kv_heads)]
    exponents = None if rng.random() < 0.5 else rng.integers(-3, 3, kv_heads).astype(np.int16)
    return Plan(np.stack(bits), str(rng.choice(PAIRINGS)), head_dim, int(rng.integers(2**32)),
                str(rng.choice(ROTATIONS)), exponents)


def _vectors(rng, plan, tokens):
    return rng.standard_normal((2, plan.kv_heads, tokens, plan.head_dim)) * 2.0 ** rng.normal(0, 1, plan.head_dim)


def _one_group(rng, samples):
    """Equal bits everywhere: TurboQuant of the permuted vector, bit for bit."""
    differences = []
    for case in range(samples):
        bits = 1 + case % MOST_BITS
        pairing, rotation = PAIRINGS[case % 2], ROTATIONS[case // 2 % 2]
        scheme = Plan(np.full((2, 32), bits), pairing, 64, int(rng.integers(2**32)), rotation)
        x = _vectors(rng, scheme, 3)
        ordered = np.stack([x[:, h][..., scheme.order[h]] for h in range(2)], axis=1)
        expected, actual = turboquant.encode(ordered, scheme.rotation_of(64), bits), encode(x, scheme)
        signs, magnitudes = unpack(actual.sign, actual.magnitude, scheme)
        others = bit_planes.unpack(expected.planes, 64)
        differences += [np.sum(signs != others[0]), np.sum(magnitudes != others[1]),
                        np.sum(actual.scale[..., 0] != expected.scale)]
    return identity(differences, samples=samples)


def _centring(rng, samples):
    """Softmax over the codes of k - mean, against that over decoded keys to which the mean was added, and exact keys
    whose mean is far from 0: subtracting it changes nothing but the error."""
    deviation, value, limit = [], [], []
    for _ in range(samples):
        scheme = _scheme(rng, head_dim=32, kv_heads=1)
        keys, query = _vectors(rng, scheme, 12), rng.standard_normal((2, 1, 32))
        keys += 20 * np.linalg.norm(keys, axis=-1).mean() * np.sign(rng.standard_normal(32)) / 32**0.5
        mean = calibrate(keys, pairing=scheme.pairing, centred=True).mean
        weights = []
        encoded = encode(keys, scheme, mean=mean)
        decoded = decode(encoded, scheme) + mean[:, None].astype(np.float64)
        for exponents in (logits(query, encoded, scheme), np.einsum("bhd,bhtd->bht", query, decoded) / 32**0.5):
            weights.append(np.exp(exponents - exponents.max(axis=-1, keepdims=True)))
            weights[-1] /= weights[-1].sum(axis=-1, keepdims=True)
        deviation.append(np.abs(weights[0] - weights[1]).max())
        value.append(np.linalg.norm(decoded - keys))
        limit.append(np.linalg.norm(decode(encode(keys, scheme), scheme) - keys))
    # Logits below 2^12 in size, off by 100 roundings of that at most.
    return weakest({"softmax": identity(deviation, 2.0**12 * 100 * _ROUNDING), "error": bound(value, limit)})


def _fold(rng, samples):
    """logits, where the query is folded, against products with the decoded keys."""
    deviation, allowance = [], []
    for _ in range(samples):
        scheme = _scheme(rng)
        x, query = _vectors(rng, scheme, 4), rng.standard_normal((2, 4, scheme.head_dim))
        encoded = encode(x, scheme)
        decoded = np.repeat(decode(encoded, scheme), 2, axis=1)
        expected = scheme.head_dim**-0.5 * np.einsum("bhd,bhtd->bht", query, decoded)
        deviation.append(np.abs(logits(query, encoded, scheme) - expected).max())
        norms = np.linalg.norm(query, axis=-1).max() * np.linalg.norm(decoded, axis=-1).max()
        allowance.append(4 * scheme.head_dim**1.5 * _ROUNDING * norms)
    return identity(deviation, allowance)


def _attention_on_codes(rng, samples):
    """decode_attention against attention over the decoded keys, the mean added back, and the decoded values."""
    deviation, allowance = [], []
    for _ in range(samples):
        scheme = _scheme(rng, head_dim=64)
        keys, values = _vectors(rng, scheme, 9), rng.standard_normal((2, 2, 9, 64))
        query, mean = rng.standard_normal((2, 4, 64)) / 4, rng.standard_normal((2, 64))
        rotation, lengths = hadamard(64, int(rng.integers(2**32))), rng.integers(0, 10, 2)
        stored = encode(keys, scheme, mean=mean), turboquant.encode(values, rotation, int(rng.integers(1, 9)))
        decoded = decode(stored[0], scheme) + mean[:, None], turboquant.decode(stored[1], rotation)
        actual = decode_attention(query, *stored, scheme, rotation, lengths=lengths, key_mean=mean)
        expected = attention.decode(query, *decoded, lengths=lengths)
        for one, other in zip(actual, expected):
            same = one == other
            deviation.append(np.abs(np.where(same, 0, one) - np.where(same, 0, other)).max())
            allowance.append(2.0**-40 * (1 + np.linalg.norm(decoded[0], axis=-1).max()))
    return identity(deviation, allowance, samples=samples)


def _round_trip(rng, samples):
    differences = []
    for _ in range(samples):
        scheme = _scheme(rng, kv_heads=int(rng.integers(1, 4)))
        shape = (2, scheme.kv_heads, int(rng.integers(0, 4)), scheme.head_dim)
        signs = rng.integers(0, 2, shape, np.uint8)
        magnitudes = rng.integers(0, 2 ** (scheme.rates() - 1).astype(int)[:, None], shape).astype(np.uint8)
        again = unpack(*pack(signs, magnitudes, scheme), scheme)
        differences += [np.sum(again[0] != signs), np.sum(again[1] != magnitudes)]
    return identity(differences, samples=samples)


def _append(rng, samples):
    differences = []
    for _ in range(samples):
        scheme = _scheme(rng, head_dim=int(rng.choice([32, 64])))
        scheme = Plan(scheme.bits, scheme.pairing, scheme.rotary_dim, scheme.seed, scheme.rotation, scheme.exponents)
        x = _vectors(rng, scheme, 5)
        whole, parts = encode(x, scheme), [encode(x[:, :, t : t + 1], scheme) for t in range(5)]
        distance = boundary_distance(x, scheme)
        if distance.min() < 1e-9:           # a dense rotation may round differently with the number of its rows
            continue
        for name in ("sign", "magnitude"):
            joined = np.concatenate([getattr(part, name) for part in parts], axis=2)
            differences.append(np.sum(joined != getattr(whole, name)))
    return identity(differences, samples=samples)


def _bytes(rng, samples):
    """Rows of tiles of 32: bits times head_dim and a scalar for every group; of others at most the rounding of four
    planes more."""
    differences, excess = [], []
    for case in range(samples):
        head_dim = int(rng.choice([64, 96, 128]))
        tile = (32, 2)[case % 2]
        average_bits = int(rng.integers(2 * head_dim // tile, MOST_BITS * head_dim // tile + 1)) * tile / head_dim
        average_bits = min(max(average_bits, 1), MOST_BITS)
        bits = np.stack([allocate(_scores(rng, head_dim // 2), average_bits, tile=tile) for _ in range(2)])
        scheme = Plan(bits, "half", head_dim, exponents=None if rng.random() < 0.5 else np.zeros(2, np.int16))
        encoded = encode(np.zeros((1, 2, 3, head_dim)), scheme)
        differences.append(8 * encoded.nbytes - scheme.bits_per_element * 6 * head_dim)
        exact = 2 * bits.sum(axis=-1).max() + (16 if scheme.exponents is None else 8) * scheme.scalars
        if tile == 32:
            differences.append(scheme.bits_per_element * head_dim - exact)
        else:
            excess.append(scheme.bits_per_element * head_dim - exact)
    return weakest({"held": identity(differences), "padding": bound(excess, 4 * 32)})


def _log_scalars(rng, samples):
    """Within the range, one byte is within a factor 2^(1/32); what lies below becomes 0, above the largest."""
    scheme = Plan(np.full((1, 1), 2), "half", 2, exponents=np.array([3], np.int16))
    s = 2.0 ** rng.uniform(-4.9, 10.8, (1, 1, samples, 1))
    again = scale_of(stored_scale(s, np.ones((1, 1, samples), bool), scheme), scheme)
    ends = np.array([0, 2.0**-6, 2.0**20]).reshape(1, 1, 3, 1)
    stored = stored_scale(ends, np.array([[[True, True, True]]]), scheme).ravel()
    return weakest({"inside": bound(np.abs(np.log2(again / s)), 1 / 32 + 1e-12),
                    "ends": identity(stored.astype(int) - np.array([0, 0, 254]))})


_PAPER = "arXiv 2606.24033, Theorem 1"

CLAIMS = (
    Claim("greedy is optimal", "J of the greedy allocation is the least J of all allocations of the same bits", _PAPER,
          "identity", _greedy_is_optimal, samples=150),
    Claim("tiles are optimal", "no way to cut the blocks into tiles of equal size has a smaller J than the sorted one",
          "derived in reference/block_gtq.py: exchange of two blocks", "bound", _tiles_are_optimal, samples=30),
    Claim("certificate", "s_i 4^(-b_i) <= s_j 4^(-(b_j - 1)) for every b_i that could rise and b_j that could fall",
          _PAPER, "identity", _certificate, samples=200),
    Claim("continuous optimum", "b_i is within 1 of mean b + log4(s_i / geomean s) where no bound is touched",
          "derived: follows from the certificate", "bound", _continuous, samples=200),
    Claim("never worse than uniform", "J of the allocation is at most J of equal bits", _PAPER, "bound",
          _beats_uniform, samples=200),
    Claim("equivariance", "2^a s has the bits of s, and permuted scores without ties have the permuted bits",
          "definition", "identity", _equivariance, samples=200),
    Claim("gauge invariance",
          "the product score's bits stay when blocks of q are scaled by powers of two and those of k divided by them; "
          "the mean score's change in most cases", "derived: EQ EK stays, and so do all logits", "identity", _gauge,
          samples=60),
    Claim("RoPE invariance", "EQ and EK are the same before and after RoPE at any positions",
          "derived: a turn keeps the norm of a block", "identity", _rope, samples=40),
    Claim("pairings", "coordinates moved from the interleaved layout to the half one have the same bits and codes",
          "definition", "identity", _pairings, samples=30),
    Claim("group distortion", "E |x_g - x_hat_g|^2 / |x_g|^2 is that of the codebook of its dimension, plain",
          "TurboQuant arXiv 2504.19874, Theorem 1", "expectation", _distortion, samples=2000),
    Claim("distortion of a pair", "in two dimensions and the mode nc it is the integral over one angle",
          "derived in reference/block_gtq.py", "expectation", _distortion_of_a_pair, samples=4000),
    Claim("unbiased", "E <q_g, x_hat_g> = <q_g, x_g> in the mode unbiased for groups of every size",
          "EDEN arXiv 2604.18555", "expectation", _unbiased, samples=2000),
    Claim("predictor",
          "E <q, k_hat - k>^2 is within 10 % of sum_g D(b_g) EQ_g EK_g / D_g for directions independent in every block",
          "derived: an error that a rotation spreads evenly over its group", "expectation", _predictor, samples=2000),
    Claim("one group is TurboQuant", "equal bits give the codes and scalars of TurboQuant for the permuted vectors",
          "definition", "identity", _one_group, samples=32),
    Claim("centring", "softmax does not see that the mean was subtracted, and keys far from 0 are off by less",
          "textbook: softmax is invariant to a constant", "identity", _centring, samples=60),
    Claim("fold", "<q, x_hat> = sum_g s_g <q'_g, c_g>", "derived in reference/block_gtq.py", "identity", _fold,
          samples=60),
    Claim("attention on codes", "decode_attention gives what attention over the decoded keys and values gives",
          "definition", "identity", _attention_on_codes, samples=40),
    Claim("round trip", "unpack(pack(codes)) = codes for any allocation", "definition", "identity", _round_trip,
          samples=100),
    Claim("append", "tokens encoded one by one have the codes of tokens encoded together", "definition", "identity",
          _append, samples=30),
    Claim("bytes", "a row of tiles of 32 holds the bits of its blocks and its scalars, and nothing else; of free "
          "blocks up to one word more per plane", "definition", "bound", _bytes, samples=40),
    Claim("scalars in a byte", "s is within a factor 2^(1/32) of what was stored, between 2^-8 and 2^7.9 of its head",
          "definition", "bound", _log_scalars, samples=1000),
)
