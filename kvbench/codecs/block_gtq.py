"""Block-GTQ: keys whose RoPE blocks have their own number of bits, in tiles (arXiv 2606.24033); values by TurboQuant.

The bits of the blocks come from a calibration.  Either the codec has one, made from some text and saved with it, or
every sequence is calibrated by its first tokens, and keeps its bits, its mean and the exponents of its scalars beside
its codes.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvbench import arrays, storage as files
from kvbench.codecs.base import FUSED, Codec, Fused, Packed, part
from kvbench.codecs.turboquant import (ALIGNED_TOKENS, TurboQuantMSE, TurboQuantTokens, decoded_plus_mean,
                                       logits_plus_mean, mean_rows)
from kvbench.ops import block_gtq
from kvbench.reference import block_gtq as reference
from kvbench.reference.block_gtq import Calibration, Encoded, Plan
from kvbench.reference.turboquant import SCALE_MODES

_FORMAT, _VERSION = "kvbench.calibration", 1


# --- Calibrations as values and as files -----------------------------------------------------------------------------


class _Frozen(NamedTuple):
    """A calibration as numbers: what a codec compares and writes as JSON."""

    query_energy: tuple
    key_energy: tuple
    mean: tuple | None
    pairing: str
    rotary_dim: int

    @classmethod
    def of(cls, given) -> _Frozen:
        """Of a Calibration, or of what `config` of a codec made of one."""
        if isinstance(given, Calibration):
            given = {**given.arrays(), "pairing": given.pairing, "rotary_dim": given.rotary_dim}
        if isinstance(given, _Frozen):
            given = given._asdict()
        if not isinstance(given, Mapping):
            raise TypeError(f"BlockGTQ: calibration: expected a Calibration from block_gtq.calibrate, "
                            f"got {type(given).__name__}")
        named = {name: np.asarray(given[name]) for name in ("query_energy", "key_energy", "mean")
                 if given.get(name) is not None}
        checked = Calibration.of(named, given["pairing"], given["rotary_dim"])
        rows = {name: tuple(map(tuple, array.tolist())) for name, array in checked.arrays().items()}
        return cls(rows["query_energy"], rows["key_energy"], rows.get("mean"), checked.pairing, checked.rotary_dim)

    def calibration(self) -> Calibration:
        named = {name: np.array(rows) for name, rows in self._asdict().items() if isinstance(rows, tuple)}
        return Calibration.of(named, self.pairing, self.rotary_dim)


def save_calibration(path, calibration: Calibration) -> None:
    """Write the calibration of a layer to a safetensors file, in one step and with a checksum."""
    if not isinstance(calibration, Calibration):
        raise TypeError(f"save_calibration: calibration: expected a Calibration, got {type(calibration).__name__}")
    content = {"pairing": calibration.pairing, "rotary_dim": calibration.rotary_dim}
    files.write(path, calibration.arrays(), content, _FORMAT, _VERSION)


def load_calibration(path) -> Calibration:
    """The calibration that `save_calibration` wrote; ValueError, with the path, for a damaged or foreign file."""
    tensors, content = files.read(path, _FORMAT, _VERSION)
    try:
        return Calibration.of(tensors, content["pairing"], content["rotary_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the content of a calibration: {error}") from error


# --- The codec -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockGTQTokens(Packed):
    """Codes in the order of `reference.block_gtq`, and what was frozen for the sequence.

    sign      : [batch, kv_heads, tokens, head_dim / 32] uint32
    magnitude : [batch, kv_heads, tokens, words] uint32
    scale     : [batch, kv_heads, tokens, scalars] float16 or uint8
    bits      : [batch, kv_heads, 1, head_dim / 2] uint8, of each block
    exponent  : [batch, kv_heads, 1, 1] int16, of scalars of one byte; None: they are float16
    mean      : [batch, kv_heads, 1, head_dim] float32, subtracted before encoding; None: nothing was
    """

    sign: object
    magnitude: object
    scale: object
    bits: object
    exponent: object = None
    mean: object = None


_OF_SEQUENCES = ("bits", "exponent", "mean")


@part
@dataclass(frozen=True)
class BlockGTQ(Codec):
    """Keys with `avg_bits` bits per coordinate on average, more for the RoPE blocks that move logits most.

    head_dim     a multiple of 32
    avg_bits     of the codes, more than 1; the budget is rounded down to whole tiles.  Scalars come on top
    calibration  of the layer, from `block_gtq.calibrate` or `load_calibration`: the same bits for all sequences.  None:
                 every sequence is calibrated by its first append, by the keys, and by the queries if given with them
    pairing      of RoPE, "half" or "interleaved", and rotary_dim the coordinates that it turns (default: all); those
                 of the calibration, if there is one
    score        "product", E|q|^2 E|k|^2 of a block, or "mean", the paper's
    tile         16 or 32 coordinates that get bits together; with 32, head_dim 64 and scalars of 8 bits the bytes are
                 those of `TurboQuantMSE` of as many bits
    least, most  bits of a block
    scale_bits   of the scalar of a group: 8, steps of 1/16 octave, or 16, float16
    scale_mode   as for `TurboQuantMSE`
    centred      encode x - mean, of the calibration or of the first append: see `TurboQuantMSE`
    seed         of the rotations.  Values need another one: their errors must be independent
    rotation     "haar", or "hadamard" for groups whose size is a power of two
    """

    head_dim: int
    avg_bits: float = 3.0
    calibration: Calibration | None = None
    pairing: str = "half"
    rotary_dim: int | None = None
    score: str = "product"
    tile: int = 32
    least: int = 1
    most: int = reference.MOST_BITS
    scale_bits: int = 8
    scale_mode: str = "nc"
    centred: bool = False
    seed: int = 0
    rotation: str = "haar"

    def __post_init__(self):
        arguments = arrays.Arguments("BlockGTQ")

        def integer(name, value, low, high, expected):
            arguments.require(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high, name,
                              expected, repr(value))

        integer("head_dim", self.head_dim, 32, 2**15, "a multiple of 32")
        arguments.require(self.head_dim % 32 == 0, "head_dim", "a multiple of 32", self.head_dim)
        integer("seed", self.seed, 0, float("inf"), "a non-negative integer")
        for name, allowed in (("pairing", reference.PAIRINGS), ("score", reference.SCORES), ("scale_bits", (8, 16)),
                              ("scale_mode", SCALE_MODES), ("rotation", reference.ROTATIONS),
                              ("tile", (16, 32)), ("centred", (False, True))):
            arguments.require(getattr(self, name) in allowed, name, f"one of {', '.join(map(str, allowed))}",
                              repr(getattr(self, name)))
        reference.blocks(self.head_dim, self.pairing, self.rotary_dim)
        bits = reference.allocate(np.zeros(self.head_dim // 2), self.avg_bits, least=self.least, most=self.most,
                                  tile=self.tile)
        arguments.require(int(bits.sum()) > len(bits), "avg_bits", "more than 1 bit for at least one tile",
                          repr(self.avg_bits))
        if self.calibration is None:
            return
        frozen = _Frozen.of(self.calibration)
        object.__setattr__(self, "calibration", frozen)
        arguments.require(len(frozen.key_energy[0]) == self.head_dim // 2, "calibration",
                          f"one for head_dim {self.head_dim}", f"one for {2 * len(frozen.key_energy[0])}")
        own = frozen.pairing, frozen.rotary_dim
        arguments.require(own == (self.pairing, self.rotary_dim or self.head_dim), "calibration",
                          f"one for pairing {self.pairing!r}, rotary_dim {self.rotary_dim or self.head_dim}", own)
        arguments.require((frozen.mean is not None) == self.centred, "calibration",
                          f"one with{'' if self.centred else 'out'} a mean, as centred={self.centred}",
                          "one without" if self.centred else "one with a mean")

    def config(self) -> dict:
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.calibration is not None:
            named["calibration"] = self.calibration._asdict()
        return {"part": type(self).__name__, **named}

    @functools.cached_property
    def _widths(self) -> tuple[int, int]:
        """(scalars, magnitude words) of rows that hold any allocation of the budget.

        In tiles of 16 or 32 the words follow from the budget: the number of tiles with an even number of bits is even
        or odd with it.  Of n tiles, k can differ in their bits if the least and the largest sum of such bits allow it.
        """
        count, step = self.head_dim // self.tile, self.tile // 2
        bits = reference.allocate(np.zeros(self.head_dim // 2), self.avg_bits, least=self.least, most=self.most,
                                  tile=self.tile)
        budget = int(bits.sum()) // step
        fitting = [k for k in range(1, min(count, self.most - self.least + 1) + 1)
                   if k * (k - 1) // 2 <= budget - count * self.least
                   and k * (k - 1) // 2 <= count * self.most - budget]
        plan = Plan(bits[None], self.pairing, self._rotary)
        return max(fitting), plan.magnitude_words

    @property
    def _rotary(self) -> int:
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def bits_per_element(self) -> float:
        """Codes and scalars, in rows that hold any allocation.  What is frozen for a sequence comes on top."""
        scalars, words = self._widths
        return (self.head_dim + 32 * words + self.scale_bits * scalars) / self.head_dim

    def encode(self, x) -> BlockGTQTokens:
        """As `Codec.encode`; without a calibration, every sequence of x is calibrated by itself."""
        arguments = arrays.Arguments("BlockGTQ.encode")
        x = arguments.take("x", x, f"batch kv_heads tokens {self.head_dim}", self.inputs, strided=True)
        frozen = {name: arrays.upload(array, x.device, x.framework, stream=arguments.stream)
                  for name, array in self._freeze(x, None).items()}
        mean = frozen.get("mean")
        encoded = block_gtq.encode(x, self._plan(frozen), scale_mode=self.scale_mode, mean=mean_rows(mean),
                                   stream=arguments.stream)
        return BlockGTQTokens(encoded.sign, encoded.magnitude, encoded.scale,
                              **{name: array.give() for name, array in frozen.items()})

    def decode(self, packed: BlockGTQTokens, dtype: str = "float16"):
        """As `Codec.decode`, in float16, bfloat16 or float32.  A mean is added on the host."""
        plan, encoded = self.plan(packed), self.encoded(packed)
        if packed.mean is None:
            return block_gtq.decode(encoded, plan, dtype=dtype)
        return decoded_plus_mean("BlockGTQ.decode", packed.mean, self.head_dim, dtype,
                                 lambda: block_gtq.decode(encoded, plan, dtype="float32"))

    def logits(self, q, packed: BlockGTQTokens, scale: float | None = None):
        """As `Codec.logits`.  What a mean adds, the same number for all tokens of a head, is added on the host."""
        logits = block_gtq.logits(q, self.encoded(packed), self.plan(packed), scale=scale)
        if packed.mean is None:
            return logits
        return logits_plus_mean("BlockGTQ.logits", q, packed.mean, self.head_dim, scale, logits)

    def encoded(self, packed: BlockGTQTokens) -> Encoded:
        """The same arrays as the operators of `ops.block_gtq` take them."""
        return Encoded(packed.sign, packed.magnitude, packed.scale)

    def plan(self, packed: BlockGTQTokens) -> Plan:
        """Of the KV heads of every sequence, one after another."""
        return self._plan({name: arrays.borrow(array, f"packed.{name}") for name, array in packed.arrays().items()
                           if name in _OF_SEQUENCES})

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> BlockGTQTokens:
        """As `Store.allocate`.  Sequences that are not calibrated yet have the bits of equal scores.

        Bits and exponents stay in host memory, where kernels' tables are made of them: looking them up in device memory
        would have to wait for it.
        """
        scalars, words = self._widths
        shape = (batch, kv_heads, -(-capacity // ALIGNED_TOKENS) * ALIGNED_TOKENS)
        dtype = "uint8" if self.scale_bits == 8 else "float16"
        nothing = np.zeros((1, kv_heads, 0, self.head_dim), np.float32)
        frozen = {name: arrays.upload(np.repeat(array, batch, axis=0), device if name == "mean" else "cpu")
                  for name, array in self._freeze(arrays.borrow(nothing, "keys"), None).items()}
        return BlockGTQTokens(arrays.empty((*shape, self.head_dim // 32), "uint32", device),
                              arrays.empty((*shape, words), "uint32", device),
                              arrays.empty((*shape, scalars), dtype, device), **frozen)

    def prepare(self, storage: BlockGTQTokens, sequences: slice, x: arrays.Array, queries: arrays.Array | None, *,
                stream=None, backend=None) -> None:
        if self.calibration is None:
            for name, array in self._freeze(x, queries).items():
                getattr(storage, name).narrow(0, sequences.start, sequences.stop).copy_from(array, stream)

    def write(self, storage: BlockGTQTokens, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        rows = _narrowed(storage, sequences, start, start + x.shape[2])
        block_gtq.encode(x, self.plan(rows), scale_mode=self.scale_mode, mean=mean_rows(rows.mean),
                         out=self.encoded(rows), stream=stream, backend=backend)

    def used(self, storage: BlockGTQTokens, sequence: int, tokens: int) -> BlockGTQTokens:
        return _narrowed(storage, slice(sequence, sequence + 1), 0, tokens)

    def _freeze(self, x: arrays.Array, queries: arrays.Array | None) -> dict[str, np.ndarray]:
        """bits, and exponent and mean if there are any, of every sequence of x: by the calibration, or by x itself."""
        batch, kv_heads = x.shape[:2]
        if self.calibration is not None:
            shared = self.calibration.calibration()
            if len(shared.key_energy) != kv_heads:
                raise ValueError(f"BlockGTQ: calibration: expected one for {kv_heads} KV heads, "
                                 f"got one for {len(shared.key_energy)}")
            calibrations = [shared] * batch
        else:
            calibrations = [block_gtq.calibrate(_float_rows(x, b), None if queries is None else _float_rows(queries, b),
                                                pairing=self.pairing, rotary_dim=self.rotary_dim,
                                                centred=self.centred) for b in range(batch)]
        plans = [reference.plan(calibration, self.avg_bits, score_kind=self.score, least=self.least, most=self.most,
                                tile=self.tile, scale_bits=self.scale_bits) for calibration in calibrations]
        frozen = {"bits": np.stack([plan.bits for plan in plans])[:, :, None]}
        if self.scale_bits == 8:
            frozen["exponent"] = np.stack([plan.exponents for plan in plans])[:, :, None, None]
        if self.centred:
            frozen["mean"] = np.stack([calibration.mean for calibration in calibrations])[:, :, None]
        return frozen

    def _plan(self, frozen: dict[str, arrays.Array]) -> Plan:
        bits, exponent = frozen["bits"].to_host(), frozen.get("exponent")
        exponents = None if exponent is None else exponent.to_host().tobytes()
        return _plan_of(self, bits.tobytes(), exponents)


@functools.lru_cache(maxsize=256)
def _plan_of(codec: BlockGTQ, bits: bytes, exponents: bytes | None) -> Plan:
    """One object for equal plans: operators keep their tables by it."""
    scalars, words = codec._widths
    return Plan(np.frombuffer(bits, np.uint8).reshape(-1, codec.head_dim // 2), codec.pairing, codec._rotary,
                codec.seed, codec.rotation, None if exponents is None else np.frombuffer(exponents, np.int16),
                scalars, words)


def _float_rows(x: arrays.Array, sequence: int) -> np.ndarray:
    """One sequence in host memory, as calibration takes it."""
    return np.ascontiguousarray(x.narrow(0, sequence, sequence + 1).to_host())


def _narrowed(storage: BlockGTQTokens, sequences: slice, start: int, stop: int) -> BlockGTQTokens:
    """Views of some tokens of some sequences, and of all that was frozen for these."""
    views = {}
    for name, array in storage.arrays().items():
        view = array.narrow(0, sequences.start, sequences.stop)
        views[name] = view if name in _OF_SEQUENCES else view.narrow(2, start, stop)
    return BlockGTQTokens(**views)


# --- Attention -------------------------------------------------------------------------------------------------------


def _check_pair(keys: BlockGTQ, values: TurboQuantMSE) -> None:
    arguments = arrays.Arguments("BlockGTQ attention")
    arguments.require(not values.centred, "values", "a codec that is not centred: values are summed, and their mean "
                      "does not cancel", values)
    arguments.require(keys.seed != values.seed, "values",
                      "another seed than that of the keys: their rotations must be independent", values)


def _attend(query, key_codec: BlockGTQ, keys: BlockGTQTokens, value_codec: TurboQuantMSE, values: TurboQuantTokens, *,
            lengths, scale, out, lse, workspace, stream, backend) -> None:
    mean = None
    if lse is not None and keys.mean is not None:
        mean = mean_rows(arrays.borrow(keys.mean, "keys.mean"))
    block_gtq.decode_attention(query, key_codec.encoded(keys), value_codec.encoded(values), key_codec.plan(keys),
                               value_codec.turn, lengths=lengths, scale=scale, key_mean=mean, out=out, lse=lse,
                               workspace=workspace, stream=stream, backend=backend)


FUSED[BlockGTQ, TurboQuantMSE] = Fused(_attend, check=_check_pair)
