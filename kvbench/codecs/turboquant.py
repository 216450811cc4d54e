"""TurboQuant: rotated coordinates as scalar codes in bit planes, and one float16 scale per token (arXiv 2504.19874).

Tokens are rows of the planes, of the scale and of nothing else: a cache appends by letting the encoder write the rows
of the new tokens into its planes, and reads what it wrote without another step.  Only a mean, if keys are centred,
belongs to a whole sequence.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from kvbench import arrays
from kvbench.codecs.base import FUSED, Codec, Fused, Packed, part
from kvbench.ops import turboquant
from kvbench.ops.attention import check_scale
from kvbench.ops.dispatch import NUMPY_TYPE
from kvbench.reference import planes as bit_planes
from kvbench.reference import turboquant as reference
from kvbench.reference.planes import Planes
from kvbench.reference.rotation import Rotation, haar, hadamard
from kvbench.reference.turboquant import Encoded, EncodedProd, Projection

ROTATIONS = ("hadamard", "haar")
ALIGNED_TOKENS = 8    # so many rows of every plane, and scales, fill whole units of 16 bytes, which GPUs copy at a time
PROJECTIONS = {"orthogonal": reference.orthogonal_projection, "gaussian": reference.gaussian_projection}


@dataclass(frozen=True, eq=False)
class TurboQuantTokens(Packed):
    """Codes in the order of `reference.planes`; planes that the number of bits does not need are None.

    sign, mag1             : [batch, kv_heads, tokens, size / 32] uint32, size the head_dim, padded to a multiple of 32
    mag2_0, mag2_1, mag2_2 : [batch, kv_heads, tokens, size / 16] uint32
    scale                  : [batch, kv_heads, tokens] float16
    mean                   : [batch, kv_heads, 1, head_dim] float32, subtracted before encoding; None: nothing was
    """

    sign: object
    scale: object
    mag2_0: object = None
    mag2_1: object = None
    mag2_2: object = None
    mag1: object = None
    mean: object = None


@part
@dataclass(frozen=True)
class TurboQuantMSE(Codec):
    """x_hat = s R^T c (+ mean): random rotation R, codebook of `bits` bits, float16 scale s: bits + 16 / head_dim.

    head_dim    any; padded with zeros to a multiple of 32.  CUDA kernels take 64, 128 and 256
    bits        1 to 8 per coordinate.  Attention in CUDA kernels takes up to 4
    seed        of the rotation.  Keys and values of one cache need different ones: their errors must be independent
    scale_mode  "nc" keeps norms (default); "unbiased", "mse", "plain": see `reference.turboquant`
    rotation    "hadamard": `rounds` rounds of signs and Walsh-Hadamard transform (the padded size a power of two);
                "haar": a dense matrix, for any size; slow on a GPU, and its rounding, which decides codes next to a
                decision, may depend on how the tokens were cut into calls
    centred     for keys: encode x - mean.  The mean of each KV head is that of the tokens of the first append, is
                computed once, on the host, and frozen.  The logits of all keys of a head lose the same number, which
                the softmax does not see, and the error shrinks with what the mean takes from the norm

    `decode` and `logits` add the mean again, so that they estimate x and <q, x>, and do so on the host.
    """

    head_dim: int
    bits: int = 3
    seed: int = 0
    scale_mode: str = "nc"
    rotation: str = "hadamard"
    rounds: int = 3
    centred: bool = False

    def __post_init__(self):
        arguments = _check_parameters(self)
        arguments.require(self.scale_mode in reference.SCALE_MODES, "scale_mode",
                          f"one of {', '.join(reference.SCALE_MODES)}", repr(self.scale_mode))
        arguments.require(isinstance(self.centred, bool), "centred", "True or False", repr(self.centred))

    @property
    def turn(self) -> Rotation:
        """R, of the padded size."""
        return _drawn(self)

    @property
    def bits_per_element(self) -> float:
        """Planes and scale.  A mean takes 32 / tokens bits besides."""
        return _bits_per_element(self.bits, self.head_dim, self.turn.head_dim)

    def encode(self, x) -> TurboQuantTokens:
        """As `Codec.encode`; a centred codec takes the mean of x itself."""
        arguments = arrays.Arguments("TurboQuantMSE.encode")
        x = arguments.take("x", x, f"batch kv_heads tokens {self.head_dim}", self.inputs, strided=True)
        mean = None
        if self.centred:
            mean = arrays.upload(_means(x), x.device, x.framework, stream=arguments.stream)
        encoded = turboquant.encode(x, self.turn, self.bits, scale_mode=self.scale_mode, mean=mean_rows(mean),
                                    stream=arguments.stream)
        return TurboQuantTokens(**encoded.planes.arrays(), scale=encoded.scale, mean=mean and mean.give())

    def decode(self, packed: TurboQuantTokens, dtype: str = "float16"):
        """As `Codec.decode`, in float16, bfloat16 or float32.  A mean is added on the host."""
        encoded = self.encoded(packed)
        if packed.mean is None:
            return turboquant.decode(encoded, self.turn, dtype=dtype)
        return decoded_plus_mean("TurboQuantMSE.decode", packed.mean, self.head_dim, dtype,
                                 lambda: turboquant.decode(encoded, self.turn, dtype="float32"))

    def logits(self, q, packed: TurboQuantTokens, scale: float | None = None):
        """As `Codec.logits`.  What a mean adds, the same number for all tokens of a head, is added on the host."""
        logits = turboquant.logits(q, self.encoded(packed), self.turn, scale=scale)
        if packed.mean is None:
            return logits
        return logits_plus_mean("TurboQuantMSE.logits", q, packed.mean, self.head_dim, scale, logits)

    def encoded(self, packed: TurboQuantTokens) -> Encoded:
        """The same arrays as the operators of `ops.turboquant` take them."""
        return Encoded(Planes.of(packed.arrays()), packed.scale, self.head_dim)

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> TurboQuantTokens:
        """As `Store.allocate`, with up to 7 slots more: see ALIGNED_TOKENS."""
        shape = (batch, kv_heads, -(-capacity // ALIGNED_TOKENS) * ALIGNED_TOKENS)
        # Zeros, not undefined: the log-sum-exp of an empty sequence is -inf plus what the mean adds.
        mean = arrays.zeros((batch, kv_heads, 1, self.head_dim), "float32", device) if self.centred else None
        return TurboQuantTokens(**_planes(shape, self.bits, self.turn.head_dim, device),
                                scale=arrays.empty(shape, "float16", device), mean=mean)

    def prepare(self, storage: TurboQuantTokens, sequences: slice, x: arrays.Array, queries: arrays.Array | None, *,
                stream=None, backend=None) -> None:
        if self.centred:
            storage.mean.narrow(0, sequences.start, sequences.stop).copy_from(_means(x), stream)

    def write(self, storage: TurboQuantTokens, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        rows = _slots(storage, sequences, start, x)
        turboquant.encode(x, self.turn, self.bits, scale_mode=self.scale_mode, mean=mean_rows(rows.mean),
                          out=self.encoded(rows), stream=stream, backend=backend)

    def used(self, storage: TurboQuantTokens, sequence: int, tokens: int) -> TurboQuantTokens:
        return _narrowed(storage, slice(sequence, sequence + 1), 0, tokens)


@dataclass(frozen=True, eq=False)
class TurboQuantProdTokens(Packed):
    """Codes of bits - 1 bits and their scale as in `TurboQuantTokens` (none for 1 bit), and those of the residual.

    residual_sign : [batch, kv_heads, tokens, size / 32] uint32
    residual_norm : [batch, kv_heads, tokens] float16
    """

    residual_sign: object
    residual_norm: object
    sign: object = None
    scale: object = None
    mag2_0: object = None
    mag2_1: object = None
    mag2_2: object = None
    mag1: object = None


@part
@dataclass(frozen=True)
class TurboQuantProd(Codec):
    """x_hat = R^T (s c + k |r| S^T sign(S r)), r = R x - s c: inner products unbiased over S: bits + 32 / head_dim.

    One of the bits is the sign of a random projection S of the residual.  At equal bits its error is several times that
    of `TurboQuantMSE`; there is no attention operator for it, and no CUDA kernel.

    projection  "orthogonal" or, as in the paper and with 2.75 times the variance, "gaussian"; drawn from another stream
                of the seed than the rotation.  Other parameters as for `TurboQuantMSE`

    Source: TurboQuant, arXiv 2504.19874, Algorithm 2.
    """

    head_dim: int
    bits: int = 3
    seed: int = 0
    projection: str = "orthogonal"
    rotation: str = "hadamard"
    rounds: int = 3

    def __post_init__(self):
        arguments = _check_parameters(self)
        arguments.require(self.projection in PROJECTIONS, "projection", f"one of {', '.join(PROJECTIONS)}",
                          repr(self.projection))

    @property
    def turn(self) -> Rotation:
        """R, of the padded size."""
        return _drawn(self)

    @property
    def draw(self) -> Projection:
        """S, of the padded size."""
        return _project(self.projection, self.turn.head_dim, self.seed)

    @property
    def bits_per_element(self) -> float:
        first = _bits_per_element(self.bits - 1, self.head_dim, self.turn.head_dim) if self.bits > 1 else 0.0
        return first + _bits_per_element(1, self.head_dim, self.turn.head_dim)

    def encode(self, x) -> TurboQuantProdTokens:
        encoded = turboquant.encode_prod(x, self.turn, self.draw, self.bits)
        first = encoded.first
        coarse = {} if first is None else {**first.planes.arrays(), "scale": first.scale}
        return TurboQuantProdTokens(residual_sign=encoded.residual_sign, residual_norm=encoded.residual_norm, **coarse)

    def decode(self, packed: TurboQuantProdTokens, dtype: str = "float16"):
        """As `Codec.decode`, in float16, bfloat16 or float32."""
        return turboquant.decode_prod(self.encoded(packed), self.turn, self.draw, dtype=dtype)

    def logits(self, q, packed: TurboQuantProdTokens, scale: float | None = None):
        return turboquant.logits_prod(q, self.encoded(packed), self.turn, self.draw, scale=scale)

    def encoded(self, packed: TurboQuantProdTokens) -> EncodedProd:
        """The same arrays as the operators of `ops.turboquant` take them."""
        first = None
        if self.bits > 1:
            first = Encoded(Planes.of(packed.arrays()), packed.scale, self.head_dim)
        return EncodedProd(first, packed.residual_sign, packed.residual_norm, self.head_dim)

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> TurboQuantProdTokens:
        shape, size = (batch, kv_heads, capacity), self.turn.head_dim
        own = dict(residual_sign=arrays.empty((*shape, size // 32), "uint32", device),
                   residual_norm=arrays.empty(shape, "float16", device))
        if self.bits == 1:
            return TurboQuantProdTokens(**own)
        return TurboQuantProdTokens(**own, **_planes(shape, self.bits - 1, size, device),
                                    scale=arrays.empty(shape, "float16", device))

    def write(self, storage: TurboQuantProdTokens, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        encoded = self.encode(x).arrays()
        for name, rows in _slots(storage, sequences, start, x).arrays().items():
            rows.copy_from(encoded[name], stream)


# --- Shared by both --------------------------------------------------------------------------------------------------


def _check_parameters(codec) -> arrays.Arguments:
    arguments = arrays.Arguments(type(codec).__name__)

    def integer(name, least, most, expected):
        value = getattr(codec, name)
        arguments.require(isinstance(value, int) and not isinstance(value, bool) and least <= value <= most, name,
                          expected, repr(value))

    integer("head_dim", 1, float("inf"), "a positive integer")
    integer("bits", 1, bit_planes.BITS[-1], f"an integer from 1 to {bit_planes.BITS[-1]}")
    integer("seed", 0, float("inf"), "a non-negative integer")
    integer("rounds", 1, 8, "an integer from 1 to 8")
    arguments.require(codec.rotation in ROTATIONS, "rotation", f"one of {', '.join(ROTATIONS)}", repr(codec.rotation))
    size = _padded(codec.head_dim)
    arguments.require(codec.rotation == "haar" or size & (size - 1) == 0, "rotation",
                      f"'haar' for head_dim {codec.head_dim}: its padded size {size} is no power of two",
                      repr(codec.rotation))
    return arguments


def decoded_plus_mean(operator: str, mean, head_dim: int, dtype: str, decode):
    """decode(), float32 and centred, plus the mean [batch, kv_heads, 1, head_dim] in `dtype`; added on the host."""
    arguments = arrays.Arguments(operator)
    arguments.require(dtype in NUMPY_TYPE, "dtype", f"one of {', '.join(NUMPY_TYPE)}", repr(dtype))
    mean = arguments.take("packed.mean", mean, f"batch kv_heads 1 {head_dim}", ("float32",), strided=True)
    centred = arrays.borrow(decode(), "decoded")
    result = arguments.result("result", None, centred.shape, dtype)
    with np.errstate(over="ignore"):
        result.copy_from((centred.to_host() + mean.to_host()).astype(NUMPY_TYPE[dtype]), arguments.stream)
    return result.give()


def logits_plus_mean(operator: str, q, mean, head_dim: int, scale: float | None, logits):
    """Logits of centred keys plus scale <q, mean>, which is added on the host."""
    arguments = arrays.Arguments(operator)
    query = arguments.take("q", q, f"batch q_heads {head_dim}", arrays.FLOATS)
    mean = arguments.take("packed.mean", mean, f"batch kv_heads 1 {head_dim}", ("float32",), strided=True)
    logits = arrays.borrow(logits, "logits")
    result = arguments.result("result", None, logits.shape, "float32")
    heads = query.to_host().astype(np.float64).reshape(*mean.shape[:2], -1, head_dim)
    constant = check_scale(arguments, scale, head_dim) * (heads @ mean.to_host().swapaxes(-1, -2))
    result.copy_from((logits.to_host() + constant.reshape(*logits.shape[:2], 1)).astype(np.float32), arguments.stream)
    return result.give()


def _padded(head_dim: int) -> int:
    return -(-head_dim // 32) * 32


def _drawn(codec) -> Rotation:
    return _rotation(codec.rotation, _padded(codec.head_dim), codec.seed, codec.rounds)


@functools.lru_cache(maxsize=256)
def _rotation(kind: str, size: int, seed: int, rounds: int) -> Rotation:
    return haar(size, seed) if kind == "haar" else hadamard(size, seed, rounds)


@functools.lru_cache(maxsize=256)
def _project(kind: str, size: int, seed: int) -> Projection:
    return PROJECTIONS[kind](size, seed)


def _bits_per_element(bits: int, head_dim: int, size: int) -> float:
    return (32 * sum(bit_planes.words(bits, size).values()) + 16) / head_dim


def _planes(shape: tuple[int, int, int], bits: int, size: int, device) -> dict[str, arrays.Array]:
    """Undefined planes of [batch, kv_heads, tokens] = shape vectors."""
    return {name: arrays.empty((*shape, n), "uint32", device) for name, n in bit_planes.words(bits, size).items()}


def _means(x: arrays.Array) -> np.ndarray:
    """Mean over the tokens, [batch, kv_heads, 1, head_dim] float32.  Tokens with NaN or Inf do not count: they touch no
    other."""
    batch, kv_heads, _, head_dim = x.shape
    means = np.zeros((batch, kv_heads, 1, head_dim), np.float32)
    for b in range(batch):
        for h in range(kv_heads):                       # one head at a time: a copy of all keys may not fit
            head = x.narrow(0, b, b + 1).narrow(1, h, h + 1).to_host()[0, 0].astype(np.float32)
            finite = head[np.isfinite(head).all(axis=-1)]
            if len(finite):
                means[b, h, 0] = finite.mean(axis=0, dtype=np.float64)
    return means


def mean_rows(mean: arrays.Array | None) -> arrays.Array | None:
    """A mean [batch, kv_heads, 1, head_dim] as the operators take it: [batch, kv_heads, head_dim]."""
    return None if mean is None else mean.reshape(*mean.shape[:2], mean.shape[3])


def _slots(storage: Packed, sequences: slice, start: int, x: arrays.Array) -> Packed:
    """Views of the slots that the tokens x go to."""
    return _narrowed(storage, sequences, start, start + x.shape[2])


def _narrowed(storage: Packed, sequences: slice, start: int, stop: int) -> Packed:
    """Views of some tokens of some sequences, and of the whole mean of these."""
    views = {}
    for name, array in storage.arrays().items():
        view = array.narrow(0, sequences.start, sequences.stop)
        views[name] = view if name == "mean" else view.narrow(2, start, stop)
    return type(storage)(**views)


# --- Attention -------------------------------------------------------------------------------------------------------


def _check_pair(keys: TurboQuantMSE, values: TurboQuantMSE) -> None:
    arguments = arrays.Arguments("TurboQuantMSE attention")
    arguments.require(not values.centred, "values", "a codec that is not centred: values are summed, and their mean "
                      "does not cancel", values)
    arguments.require(keys.turn != values.turn, "values",
                      "another seed than that of the keys: their rotations must be independent", values)


def _attend(query, key_codec: TurboQuantMSE, keys: TurboQuantTokens, value_codec: TurboQuantMSE,
            values: TurboQuantTokens, *, lengths, scale, out, lse, workspace, stream, backend) -> None:
    mean = None
    if lse is not None and keys.mean is not None:
        mean = mean_rows(arrays.borrow(keys.mean, "keys.mean"))
    turboquant.decode_attention(query, key_codec.encoded(keys), value_codec.encoded(values), key_codec.turn,
                                value_codec.turn, lengths=lengths, scale=scale, key_mean=mean, out=out, lse=lse,
                                workspace=workspace, stream=stream, backend=backend)


FUSED[TurboQuantMSE, TurboQuantMSE] = Fused(_attend, check=_check_pair)
