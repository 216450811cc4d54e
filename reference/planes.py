"""Bit planes: how the codes of rotated coordinates lie in memory.  The one definition; everything else links here.

The code of one coordinate is a sign bit (1 = negative) and a magnitude of b - 1 bits, b = 1 to 8.  Equal bits of all
coordinates of a token lie together, in planes, each of them an array of its own:

    plane     there if     holds                          shape
    sign      always       the sign bits                  [batch, kv_heads, tokens, ceil(head_dim / 32)] uint32
    mag2_0    b >= 3       magnitude bits 0 and 1         [batch, kv_heads, tokens, ceil(head_dim / 16)] uint32
    mag2_1    b >= 5       magnitude bits 2 and 3         likewise
    mag2_2    b >= 7       magnitude bits 4 and 5         likewise
    mag1      b is even    the top magnitude bit, b - 2   [batch, kv_heads, tokens, ceil(head_dim / 32)] uint32

A token is one short row of each plane: appending or gathering it touches nothing else.  The sign plane is the same for
every b; alone it is the RaBitQ code of the rotated vector.

Order of the bits.  Coordinate j = 32 w + 8 s + p, with s = 0..3 and p = 0..7:

    sign, mag1   word w, bit 4 p + s:

        bit           31 30 29 28   27 26 25 24   ...    7  6  5  4    3  2  1  0
        j - 32 w      31 23 15  7   30 22 14  6   ...   25 17  9  1   24 16  8  0
                      +- p = 7 -+   +- p = 6 -+         +- p = 1 -+   +- p = 0 -+

    mag2         word 2 w + (s >> 1), bits 4 p + 2 (s & 1) and the one above it, low bit first:

        bits          31,30  29,28   27,26  25,24   ...    7,6    5,4     3,2    1,0
        word 2 w         15      7      14      6   ...      9      1       8      0     j - 32 w
        word 2 w + 1     31     23      30     22   ...     25     17      24     16

Nibble p of a word belongs to the coordinates p, 8 + p, 16 + p, 24 + p.  So one shift and one mask give the codes of
eight coordinates, one per nibble: with S the sign word w and W the mag2 word 2 w + (s >> 1),

    ((W >> 2 (s & 1)) & 0x33333333)  |  (shift(S, 2 - s) & 0x44444444),      shift(x, a) = x << a, or x >> -a for a < 0,

has 4 sign + magnitude of coordinate 32 w + 8 s + p in nibble p: the selectors that the byte permutation of a GPU takes.
Bits of mag1 go to bit k of the nibbles by shift(M, k - s) & (0x11111111 << k).  Unused bits of the last word are 0.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .claim import Claim, identity

BITS = range(1, 9)


@dataclass(frozen=True, eq=False)
class Planes:
    """The planes of some tokens; see the head of this module for shapes and for the order of the bits."""

    sign: np.ndarray
    mag2: tuple[np.ndarray, ...] = ()
    mag1: np.ndarray | None = None

    @property
    def bits(self) -> int:
        """Bits per coordinate."""
        return 1 + 2 * len(self.mag2) + (self.mag1 is not None)

    def arrays(self) -> dict[str, np.ndarray]:
        """The planes that are there, by name: "sign", "mag2_0", ..., "mag1"."""
        named = {"sign": self.sign, **{f"mag2_{i}": plane for i, plane in enumerate(self.mag2)}}
        return named if self.mag1 is None else {**named, "mag1": self.mag1}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Planes:
        """The planes that `arrays()` named."""
        pairs = [arrays[f"mag2_{i}"] for i in range(3) if f"mag2_{i}" in arrays]
        return cls(arrays["sign"], tuple(pairs), arrays.get("mag1"))

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.arrays().values())


def words(bits: int, head_dim: int) -> dict[str, int]:
    """uint32 words per token of each plane, by name, for vectors of head_dim coordinates."""
    _check_bits(bits)
    single, double = -(-head_dim // 32), -(-head_dim // 16)
    named = {"sign": single, **{f"mag2_{i}": double for i in range((bits - 1) // 2)}}
    return named if bits % 2 else {**named, "mag1": single}


def pack(signs, magnitudes, bits: int) -> Planes:
    """The planes of the codes.

    signs      : [batch, kv_heads, tokens, head_dim], 1 where negative, else 0
    magnitudes : same shape, integers from 0 to 2^(bits-1) - 1

    ValueError names a code that does not fit.
    """
    _check_bits(bits)
    signs, magnitudes = (_codes(name, x, largest) for name, x, largest in
                         (("signs", signs, 1), ("magnitudes", magnitudes, 2 ** (bits - 1) - 1)))
    if signs.shape != magnitudes.shape:
        raise ValueError(f"planes.pack: magnitudes: expected the shape of signs, {list(signs.shape)}, "
                         f"got {list(magnitudes.shape)}")
    pairs = tuple(pack_pairs(magnitudes >> np.uint32(2 * i) & np.uint32(3)) for i in range((bits - 1) // 2))
    top = None if bits % 2 else pack_bits(magnitudes >> np.uint32(bits - 2))
    return Planes(pack_bits(signs), pairs, top)


def unpack(planes: Planes, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(signs, magnitudes), uint8 [batch, kv_heads, tokens, head_dim], that were packed."""
    magnitudes = np.zeros((*planes.sign.shape[:-1], head_dim), np.uint8)
    for i, plane in enumerate(planes.mag2):
        magnitudes |= unpack_pairs(plane, head_dim) << np.uint8(2 * i)
    if planes.mag1 is not None:
        magnitudes |= unpack_bits(planes.mag1, head_dim) << np.uint8(planes.bits - 2)
    return unpack_bits(planes.sign, head_dim), magnitudes


def concatenate(parts: Iterable[Planes]) -> Planes:
    """The tokens of several planes one after another: what packing them at once gives."""
    parts = [part.arrays() for part in parts]
    return Planes.of({name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]})


def gather(planes: Planes, tokens) -> Planes:
    """The rows of some tokens.  tokens : [batch, kv_heads, n] integers, or any shape that broadcasts to it."""
    tokens = np.asarray(tokens)
    tokens = np.broadcast_to(tokens, (*planes.sign.shape[:2], tokens.shape[-1]))[..., None]
    return Planes.of({name: np.take_along_axis(plane, tokens, axis=2) for name, plane in planes.arrays().items()})


# --- One plane -------------------------------------------------------------------------------------------------------

_BIT = (4 * np.arange(8) + np.arange(4)[:, None]).astype(np.uint32)              # [s, p]: 4 p + s
_PAIR = (4 * np.arange(8) + 2 * np.arange(2)[:, None]).astype(np.uint32)         # [s & 1, p]: 4 p + 2 (s & 1)


def pack_bits(bits) -> np.ndarray:
    """[..., n] of 0 and 1 -> [..., ceil(n / 32)] uint32, in the order of the sign plane."""
    return _pack(bits, _BIT)


def unpack_bits(words, n: int) -> np.ndarray:
    """[..., ceil(n / 32)] uint32 -> [..., n] uint8."""
    return _unpack(words, n, _BIT, 1)


def pack_pairs(pairs) -> np.ndarray:
    """[..., n] of 0 to 3 -> [..., ceil(n / 16)] uint32, in the order of a mag2 plane."""
    return _pack(pairs, _PAIR)


def unpack_pairs(words, n: int) -> np.ndarray:
    """[..., ceil(n / 16)] uint32 -> [..., n] uint8."""
    return _unpack(words, n, _PAIR, 3)


def _pack(values, shifts):
    *outer, n = np.shape(values)
    padded = np.zeros((*outer, -(-n // shifts.size) * shifts.size), np.uint32)
    padded[..., :n] = values
    fields = padded.reshape(*outer, -(-n // shifts.size), *shifts.shape) << shifts            # [..., words, s, p]
    return np.bitwise_or.reduce(fields, axis=(-2, -1))


def _unpack(words, n, shifts, mask):
    words = np.asarray(words)
    if words.dtype != np.uint32 or words.shape[-1:] != (-(-n // shifts.size),):
        raise ValueError(f"planes.unpack: plane: expected uint32 [..., {-(-n // shifts.size)}] for head_dim {n}, "
                         f"got {words.dtype} {list(words.shape)}")
    fields = (words[..., None, None] >> shifts & np.uint32(mask)).astype(np.uint8)            # [..., words, s, p]
    return fields.reshape(*words.shape[:-1], words.shape[-1] * shifts.size)[..., :n]


def _check_bits(bits):
    if not isinstance(bits, (int, np.integer)) or isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"planes: bits: expected an integer from 1 to 8, got {bits!r}")


def _codes(name, values, largest):
    values = np.asarray(values)
    if values.dtype.kind not in "bui" or values.size and not 0 <= int(values.min()) <= int(values.max()) <= largest:
        raise ValueError(f"planes.pack: {name}: expected integers from 0 to {largest}, got {values.dtype}"
                         + (f" from {values.min()} to {values.max()}" if values.size else ""))
    return values.astype(np.uint32)


# --- Claims ----------------------------------------------------------------------------------------------------------


def _problem(rng, bits):
    """(signs, magnitudes) of a few tokens, head_dim any number of coordinates or one that kernels take."""
    head_dim = int(rng.integers(1, 100)) if rng.random() < 0.5 else int(rng.choice([32, 64, 96, 128, 256]))
    shape = (*rng.integers(1, 3, 2), int(rng.integers(0, 6)), head_dim)
    return rng.integers(0, 2, shape), rng.integers(0, 2 ** (bits - 1), shape)


def _differences(one: Planes, other: Planes) -> int:
    """Words that differ; the planes must be the same ones, with the same shapes."""
    one, other = one.arrays(), other.arrays()
    if {name: plane.shape for name, plane in one.items()} != {name: plane.shape for name, plane in other.items()}:
        return 2**32
    return sum(int((plane != other[name]).sum()) for name, plane in one.items())


def _round_trip(rng, samples):
    differences = []
    for case in range(samples):
        signs, magnitudes = _problem(rng, 1 + case % 8)
        again = unpack(pack(signs, magnitudes, 1 + case % 8), signs.shape[-1])
        differences.append(np.sum(again[0] != signs) + np.sum(again[1] != magnitudes))
    return identity(differences)


def _sizes(rng, samples):
    excess = []
    for bits in BITS:
        for head_dim in (32, 64, 96, 128, 256):
            packed = pack(np.zeros((2, 3, 5, head_dim), int), np.zeros((2, 3, 5, head_dim), int), bits)
            declared = sum(words(bits, head_dim).values()) * 4
            excess += [packed.nbytes - 2 * 3 * 5 * head_dim * bits // 8, declared - head_dim * bits // 8]
    return identity(excess)


def _order(rng, samples):
    """Every bit of every coordinate alone, against the places that the head of this module names."""
    differences = []
    for j in range(96):
        w, s, p = j // 32, j % 32 // 8, j % 8
        single, double = (w, 4 * p + s), (2 * w + (s >> 1), 4 * p + 2 * (s & 1))
        places = [("mag2_0", *double), ("mag2_0", double[0], double[1] + 1), ("mag2_1", *double),
                  ("mag2_1", double[0], double[1] + 1), ("mag2_2", *double), ("mag2_2", double[0], double[1] + 1),
                  ("mag1", *single), ("sign", *single)]
        alone = (np.arange(96) == j).astype(int)[None, None, None]
        for bit, (plane, word, position) in enumerate(places):            # magnitude bits 0 to 6, then the sign
            expected = {name: np.zeros((1, 1, 1, n), np.uint32) for name, n in words(8, 96).items()}
            expected[plane][..., word] = 1 << position
            packed = pack(alone, alone * 0, 8) if bit == 7 else pack(alone * 0, alone << bit, 8)
            differences.append(_differences(packed, Planes.of(expected)))
    return identity(differences)


def _selectors(rng, samples):
    """The masks and shifts of the head of this module on Python integers of 32 bits."""
    def shift(x, a):
        return (x << a if a >= 0 else x >> -a) & 0xFFFFFFFF

    def nibbles(word):
        return np.array([word >> 4 * p & 15 for p in range(8)])

    differences = []
    for case in range(samples):
        bits = (2, 3, 4)[case % 3]
        signs, magnitudes = rng.integers(0, 2, (1, 1, 1, 64)), rng.integers(0, 2 ** (bits - 1), (1, 1, 1, 64))
        planes = {name: plane.ravel().tolist() for name, plane in pack(signs, magnitudes, bits).arrays().items()}
        for w in range(2):
            for s in range(4):
                low = planes["mag2_0"][2 * w + (s >> 1)] >> 2 * (s & 1) & 0x33333333 if bits > 2 else 0
                top = 2 if bits == 4 else 0
                if bits != 3:
                    low |= shift(planes["mag1"][w], top - s) & 0x11111111 << top
                sign = shift(planes["sign"][w], 2 - s) & 0x44444444
                codes = slice(32 * w + 8 * s, 32 * w + 8 * s + 8)
                differences += [np.sum(nibbles(low) != magnitudes[0, 0, 0, codes]),
                                np.sum(nibbles(sign) != 4 * signs[0, 0, 0, codes])]
    return identity(differences, samples=samples)


def _append(rng, samples):
    differences = []
    for case in range(samples):
        bits = 1 + case % 8
        signs, magnitudes = _problem(rng, bits)
        cuts = [0, *sorted(rng.integers(0, signs.shape[2] + 1, 2)), signs.shape[2]]
        parts = [pack(signs[:, :, a:b], magnitudes[:, :, a:b], bits) for a, b in zip(cuts, cuts[1:])]
        differences.append(_differences(concatenate(parts), pack(signs, magnitudes, bits)))
    return identity(differences)


def _gather(rng, samples):
    differences = []
    for case in range(samples):
        bits = 1 + case % 8
        signs, magnitudes = _problem(rng, bits)
        tokens = rng.integers(0, max(signs.shape[2], 1), (*signs.shape[:2], 4 if signs.shape[2] else 0))
        chosen = (np.take_along_axis(x, tokens[..., None], axis=2) for x in (signs, magnitudes))
        differences.append(_differences(gather(pack(signs, magnitudes, bits), tokens), pack(*chosen, bits)))
    return identity(differences)


CLAIMS = (
    Claim("round trip", "unpack(pack(codes)) = codes for 1 to 8 bits and any head_dim", "definition", "identity",
          _round_trip, samples=400),
    Claim("bytes", "the planes of a token hold head_dim bits / 8 bytes, for head_dim a multiple of 32", "definition",
          "identity", _sizes, samples=1),
    Claim("order of the bits", "each bit of each coordinate lies where the drawing puts it, and nowhere else",
          "definition", "identity", _order, samples=1),
    Claim("selectors", "a shift and a mask give the codes of eight coordinates, one per nibble, for 2, 3 and 4 bits",
          "derived in reference/planes.py", "identity", _selectors, samples=200),
    Claim("append", "packing tokens part by part gives the rows that packing them at once gives", "definition",
          "identity", _append, samples=200),
    Claim("gather", "the rows of some tokens are the planes of those tokens", "definition", "identity", _gather,
          samples=200),
)
