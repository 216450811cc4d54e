"""What codecs have in common: parts that can be saved, packed tokens, storage, and the table of attention operators."""
from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kvbench import arrays
from kvbench.registry import nearest

# --------------------------------------------------------------------------------------------- parts that can be saved

_PARTS: dict[str, type] = {}


def part(cls: type) -> type:
    """Class decorator: what `config()` of its instances returns, `rebuild` turns into an equal instance."""
    _PARTS[cls.part_name or cls.__name__] = cls
    return cls


class Part:
    """A frozen dataclass with JSON-able fields that a saved cache names: a codec, an index or a selector.

    part_name   of the class, where another part has the same class name (an index that goes with a codec); else None
    """

    part_name = None

    def config(self) -> dict:
        """The name of the class under "part", and the fields."""
        return {"part": self.part_name or type(self).__name__, **dataclasses.asdict(self)}


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
    """Encoded tokens.  Every field is an array [batch, kv_heads, ...], in the framework of what was encoded, or None
    where a codec has no use for it."""

    def arrays(self) -> dict[str, object]:
        """The arrays that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: array for name, array in named.items() if array is not None}

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


# ---------------------------------------------------------------------------------------------------- decode attention


class Exact(NamedTuple):
    """The exact tokens of a cache, which are always attended: keys and values (`Float16Tokens`), and lengths, [batch]
    int32: how many of them there are.

    settled : whether a selection was the last call in the stream, and all else that is attended was there before that
        began, so that attention may begin before it has ended
    """

    keys: Packed
    values: Packed
    lengths: object
    settled: bool = False


@dataclass(frozen=True)
class Fused:
    """The operators that attend to one pair of codecs.

    dense   (query, key_codec, keys, value_codec, values, *, lengths, scale, out, lse, workspace, stream, backend):
            writes out [batch, q_heads, head_dim] and, unless it is None, lse [batch, q_heads] of the keys as they were
            given (a codec that centres keys adds scale <q, centre> again, so that parts merge)
    sparse  the same with `selection=`, what the cache's selector returned: attends to the selected slots alone; None if
            there is no such operator
    joint   as sparse, with `exact=`: the selected slots and those exact tokens in one launch, and no merge; None: each
            has a launch of its own.  Of `Float16` codecs, `exact` and the store follow one another in one array
    check   (key_codec, value_codec): ValueError for codecs of these classes that do not go together; None: all do

    workspace is the scratch of `attention.workspace`: with it a step allocates nothing.
    """

    dense: Callable
    sparse: Callable | None = None
    joint: Callable | None = None
    check: Callable | None = None


FUSED: dict[tuple[type[Codec], type[Codec]], Fused] = {}        # by codec of the keys and of the values


def fused(keys: Codec, values: Codec, *, sparse: bool = False) -> Fused:
    """The operators for keys stored by one codec and values by another; ValueError lists the pairs that exist, or says
    why these two do not go together."""
    found = FUSED.get((type(keys), type(values)))
    if found is None or (sparse and found.sparse is None):
        kind = "sparse" if sparse else "decode"
        known = sorted(f"{k.__name__} x {v.__name__}" for (k, v), pair in FUSED.items() if pair.sparse or not sparse)
        raise ValueError(f"no {kind} attention for keys {type(keys).__name__} x values {type(values).__name__}; "
                         f"supported: {', '.join(known) or 'none'}")
    if found.check is not None:
        found.check(keys, values)
    return found


def attend(query, key_codec: Codec, keys: Packed, value_codec: Codec, values: Packed, *, lengths, out, lse=None,
           scale=None, workspace=None, selection=None, exact: Exact | None = None, stream=None, backend=None) -> None:
    """out = softmax(scale <q, k_hat>) v_hat over the packed tokens, by the operator of this pair of codecs.

    query : [batch, q_heads, head_dim]        out : same shape, written        lse : [batch, q_heads] float32, written
    lengths : [batch] int32, tokens in the packed arrays        selection : of these slots only (default: all)
    exact : with a selection, where the pair has a joint operator: these tokens, too
    """
    operators = fused(key_codec, value_codec, sparse=selection is not None)
    options = dict(lengths=lengths, scale=scale, out=out, lse=lse, workspace=workspace, stream=stream, backend=backend)
    if selection is None:
        operators.dense(query, key_codec, keys, value_codec, values, **options)
    elif exact is None:
        operators.sparse(query, key_codec, keys, value_codec, values, selection=selection, **options)
    else:
        operators.joint(query, key_codec, keys, value_codec, values, selection=selection, exact=exact, **options)
