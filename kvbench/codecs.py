"""Codecs: how a key or a value is stored, and which operator attends to a pair of stored keys and values.

    codec  = codecs.Float16(head_dim=128)
    packed = codec.encode(x)                # x [batch, kv_heads, tokens, head_dim] -> a frozen dataclass of arrays
    x_hat  = codec.decode(packed)           # same framework and device
    s      = codec.logits(q, packed)        # [batch, q_heads, tokens] float32

A codec is a frozen dataclass of plain parameters; `config()` gives them as JSON and `rebuild` makes the codec again.
The same codec lays out the storage of a cache (`Store`): packed arrays of fixed capacity, written in place.
"""
from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvbench import arrays
from kvbench.ops import attention
from kvbench.registry import nearest

# --------------------------------------------------------------------------------------------- parts that can be saved

_PARTS: dict[str, type] = {}


def part(cls: type) -> type:
    """Class decorator: what `config()` of its instances returns, `rebuild` turns into an equal instance."""
    _PARTS[cls.__name__] = cls
    return cls


class Part:
    """A frozen dataclass with JSON-able fields that a saved cache names: a codec, an index or a selector."""

    def config(self) -> dict:
        """The class name under "part", and the fields."""
        return {"part": type(self).__name__, **dataclasses.asdict(self)}


def rebuild(config: dict) -> Part:
    """The part that `config()` described; ValueError lists the nearest names for an unknown one."""
    parameters = dict(config)
    name = parameters.pop("part")
    if name not in _PARTS:
        raise ValueError(f"unknown codec, index or selector {name!r}{nearest(name, _PARTS)}")
    return _PARTS[name](**parameters)


# ------------------------------------------------------------------------------------------------------------ protocol


@dataclass(frozen=True, eq=False)
class Packed:
    """Encoded tokens.  Every field is an array [batch, kv_heads, ...], in the framework of what was encoded."""

    def arrays(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())


class Store(Part, ABC):
    """What lays out one store of a cache: packed arrays, as `arrays.Array`, with room for `capacity` tokens.

    granule  tokens that are encoded together (1: every token on its own); a cache writes whole granules on that grid
    """

    granule: int = 1

    @abstractmethod
    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> Packed:
        """Packed storage for `capacity` (0 or more) tokens of each sequence; its content is undefined."""

    @abstractmethod
    def write(self, storage: Packed, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        """Encode x [len(sequences), kv_heads, tokens, head_dim] into slots [start, start + tokens) of those sequences.

        start and tokens are multiples of `granule`.  What a slot holds depends on its own granule alone (and on what
        `prepare` froze), never on how the tokens were cut into calls: a cache relies on it.
        """

    def prepare(self, storage: Packed, sequences: slice, x: arrays.Array, queries: arrays.Array | None,
                *, stream=None, backend=None) -> None:
        """Called with the first tokens of sequences (and the queries given with them) before anything is written.

        What centres or scales by statistics of the prompt freezes them in its storage here.  Others do nothing.
        """

    def used(self, storage: Packed, sequence: int, tokens: int) -> Packed:
        """Views of all that the storage holds for the first `tokens` tokens (whole granules) of one sequence."""
        return type(storage)(**{name: array.narrow(0, sequence, sequence + 1).narrow(2, 0, tokens)
                                for name, array in storage.arrays().items()})


class Codec(Store):
    """A way to store keys or values.  Subclasses are frozen dataclasses with a field `head_dim`.

    inputs   dtypes that `encode` and `write` take
    """

    head_dim: int
    inputs: tuple[str, ...] = arrays.FLOATS

    @property
    @abstractmethod
    def bits_per_element(self) -> float:
        """Bits held per stored number: codes, scales, norms and padding, everything counted."""

    @abstractmethod
    def encode(self, x) -> Packed:
        """x : [batch, kv_heads, tokens, head_dim], a dtype of `inputs` -> packed arrays in the framework of x."""

    @abstractmethod
    def decode(self, packed: Packed):
        """[batch, kv_heads, tokens, head_dim], in the framework and on the device of the packed arrays."""

    @abstractmethod
    def logits(self, q, packed: Packed, scale: float | None = None):
        """scale <q_h, x_hat_t>: q [batch, q_heads, head_dim] -> [batch, q_heads, tokens] float32, in q's framework.

        scale defaults to head_dim ** -0.5.
        """


# ------------------------------------------------------------------------------------------------------- exact storage


@dataclass(frozen=True, eq=False)
class Float16Tokens(Packed):
    """tokens : [batch, kv_heads, tokens, head_dim]."""

    tokens: object


@part
@dataclass(frozen=True)
class Float16(Codec):
    """Exact storage, x_hat = x: 16 bits per element as float16 (default) or bfloat16, 32 as float32."""

    head_dim: int
    dtype: str = "float16"

    def __post_init__(self):
        if isinstance(self.head_dim, bool) or not isinstance(self.head_dim, int) or self.head_dim < 1:
            raise ValueError(f"Float16: head_dim: expected a positive integer, got {self.head_dim!r}")
        if self.dtype not in arrays.FLOATS:
            raise ValueError(f"Float16: dtype: expected one of {', '.join(arrays.FLOATS)}, got {self.dtype!r}")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.dtype,)

    @property
    def bits_per_element(self) -> float:
        return 32.0 if self.dtype == "float32" else 16.0

    def encode(self, x) -> Float16Tokens:
        return Float16Tokens(self._copy("Float16.encode", "x", x))

    def decode(self, packed: Float16Tokens):
        return self._copy("Float16.decode", "packed.tokens", packed.tokens)

    def logits(self, q, packed: Float16Tokens, scale: float | None = None):
        """As `Codec.logits`, in float32: a diagnostic that NumPy computes on the host, whatever the device."""
        arguments = arrays.Arguments("Float16.logits")
        query = arguments.take("q", q, f"batch q_heads {self.head_dim}", arrays.FLOATS)
        keys = arguments.take("packed.tokens", packed.tokens, f"batch kv_heads tokens {self.head_dim}", self.inputs,
                              strided=True)
        batch, q_heads, kv_heads = (arguments.sizes[name] for name in ("batch", "q_heads", "kv_heads"))
        arguments.require(q_heads % kv_heads == 0, "q", f"a multiple of the {kv_heads} KV heads as q_heads", q_heads)
        scale = attention.check_scale(arguments, scale, self.head_dim)
        result = arguments.result("logits", None, (batch, q_heads, keys.shape[2]), "float32")

        heads = query.to_host().astype(np.float32).reshape(batch, kv_heads, -1, self.head_dim)
        logits = np.empty((*heads.shape[:3], keys.shape[2]), np.float32)
        for b in range(batch):
            for h in range(kv_heads):                   # one head at a time: a float32 copy of all keys may not fit
                head = keys.narrow(0, b, b + 1).narrow(1, h, h + 1).to_host()[0, 0].astype(np.float32)
                np.matmul(heads[b, h], head.T, out=logits[b, h])
        result.copy_from((logits * np.float32(scale)).reshape(result.shape), arguments.stream)
        return result.give()

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> Float16Tokens:
        return Float16Tokens(arrays.empty((batch, kv_heads, capacity, self.head_dim), self.dtype, device))

    def write(self, storage: Float16Tokens, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        rows = storage.tokens.narrow(0, sequences.start, sequences.stop)
        rows.narrow(2, start, start + x.shape[2]).copy_from(x, stream)

    def _copy(self, operator: str, name: str, value):
        arguments = arrays.Arguments(operator)
        source = arguments.take(name, value, f"batch kv_heads tokens {self.head_dim}", self.inputs, strided=True)
        copy = arguments.result("result", None, source.shape, self.dtype)
        copy.copy_from(source, arguments.stream)
        return copy.give()


# ---------------------------------------------------------------------------------------------------- decode attention


@dataclass(frozen=True)
class Fused:
    """The operators that attend to one pair of codecs.

    dense   (query, key_codec, keys, value_codec, values, *, lengths, scale, out, lse, workspace, stream, backend):
            writes out [batch, q_heads, head_dim] and, unless it is None, lse [batch, q_heads] of the keys as they were
            given (a codec that centres keys adds scale <q, centre> again, so that parts merge)
    sparse  the same with `selection=`: attends to the selected slots alone; None if there is no such operator

    workspace is the scratch of `attention.workspace`: with it a step allocates nothing.
    """

    dense: Callable
    sparse: Callable | None = None


def _attend_exact(query, key_codec: Float16, keys: Float16Tokens, value_codec: Float16, values: Float16Tokens, *,
                  lengths, scale, out, lse, workspace, stream, backend) -> None:
    attention.decode(query, keys.tokens, values.tokens, lengths=lengths, scale=scale, out=out, lse=lse,
                     workspace=workspace, stream=stream, backend=backend)


FUSED: dict[tuple[type[Codec], type[Codec]], Fused] = {
    (Float16, Float16): Fused(_attend_exact),
}


def fused(keys: Codec, values: Codec, *, sparse: bool = False) -> Fused:
    """The operators for keys stored by one codec and values by another; ValueError lists the pairs that exist."""
    found = FUSED.get((type(keys), type(values)))
    if found is None or (sparse and found.sparse is None):
        kind = "sparse" if sparse else "decode"
        known = [f"{k.__name__} x {v.__name__}" for (k, v), pair in FUSED.items() if pair.sparse or not sparse]
        raise ValueError(f"no {kind} attention for keys {type(keys).__name__} x values {type(values).__name__}; "
                         f"supported: {', '.join(known) or 'none'}")
    return found


def attend(query, key_codec: Codec, keys: Packed, value_codec: Codec, values: Packed, *, lengths, out, lse=None,
           scale=None, workspace=None, selection=None, stream=None, backend=None) -> None:
    """out = softmax(scale <q, k_hat>) v_hat over the packed tokens, by the operator of this pair of codecs.

    query : [batch, q_heads, head_dim]        out : same shape, written        lse : [batch, q_heads] float32, written
    lengths : [batch] int32, tokens in the packed arrays        selection : attend to these slots only (default: all)
    """
    operators = fused(key_codec, value_codec, sparse=selection is not None)
    options = dict(lengths=lengths, scale=scale, out=out, lse=lse, workspace=workspace, stream=stream, backend=backend)
    if selection is None:
        operators.dense(query, key_codec, keys, value_codec, values, **options)
    else:
        operators.sparse(query, key_codec, keys, value_codec, values, selection=selection, **options)
