"""KIVI: keys as integers per channel, values as integers per token, both in small groups (arXiv 2402.02750).

Keys are encoded `group` tokens at a time, on the grid of the store: a cache gives them whole groups.  Values are
encoded token by token.  Either way an append writes the rows of the new tokens and reads nothing.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvbench import arrays
from kvbench.codecs.base import FUSED, Codec, Fused, Packed, part
from kvbench.ops import kivi
from kvbench.ops.attention import check_scale
from kvbench.reference.kivi import BITS, Encoded, Keys, Values


@dataclass(frozen=True, eq=False)
class KiviTokens(Packed):
    """Codes in the order of `reference.kivi`, scales and minima of their groups.

    codes          : [batch, kv_heads, tokens, head_dim bits / 32] uint32
    scale, minimum : float16; [batch, kv_heads, tokens / group, head_dim] of `KiviKeys`,
                     [batch, kv_heads, tokens, head_dim / group] of `TokenInt`
    """

    codes: object
    scale: object
    minimum: object


@dataclass(frozen=True)
class _Integers(Codec):
    """What codecs of groups of integers share: x_hat = s c + m.  `kind` says what a group is."""

    head_dim: int
    bits: int = 2
    group: int = 32

    kind = Encoded

    def __post_init__(self):
        arguments = arrays.Arguments(type(self).__name__)

        def integer(name, good, expected):
            value = getattr(self, name)
            arguments.require(isinstance(value, int) and not isinstance(value, bool) and good(value), name, expected,
                              repr(value))

        integer("head_dim", lambda n: n > 0 and n % 32 == 0, "a positive multiple of 32")
        integer("bits", lambda n: n in BITS, "2, 4 or 8")
        integer("group", lambda n: n > 0 and n % 32 == 0, "a positive multiple of 32")

    @property
    def bits_per_element(self) -> float:
        """Codes, scale and minimum."""
        return self.bits + 32 / self.group

    def decode(self, packed: KiviTokens, dtype: str = "float16"):
        """As `Codec.decode`, in float16, bfloat16 or float32."""
        return kivi.decode(self.encoded(packed), dtype=dtype)

    def encoded(self, packed: KiviTokens) -> Encoded:
        """The same arrays as the operators of `ops.kivi` take them."""
        return self.kind(packed.codes, packed.scale, packed.minimum, self.bits, self.group)

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> KiviTokens:
        """As `Store.allocate`, in whole tiles of 32 tokens or groups of keys: heads begin where a GPU copies whole
        units, and the stores of keys and values are of one length."""
        unit = max(self.granule, kivi.TILE)
        shape, capacity = (batch, kv_heads), -(-capacity // unit) * unit
        return KiviTokens(arrays.empty((*shape, capacity, self.head_dim * self.bits // 32), "uint32", device),
                          *(arrays.empty((*shape, *self._rows(capacity)), "float16", device) for _ in range(2)))

    def used(self, storage: KiviTokens, sequence: int, tokens: int) -> KiviTokens:
        return self._narrowed(storage, slice(sequence, sequence + 1), 0, tokens)

    def _narrowed(self, storage: KiviTokens, sequences: slice, start: int, stop: int) -> KiviTokens:
        """Views of some tokens of some sequences."""
        views = {}
        for name, array in storage.arrays().items():
            step = 1 if name == "codes" else self.granule
            rows = array.narrow(0, sequences.start, sequences.stop)
            views[name] = rows.narrow(2, start // step, stop // step)
        return KiviTokens(**views)


@part
@dataclass(frozen=True)
class KiviKeys(_Integers):
    """x_hat = s c + m per channel, for keys, which have few channels that are large in all tokens: bits + 32 / group.

    head_dim    a multiple of 32.  CUDA kernels take 64, 128 and 256
    bits        2, 4 or 8.  CUDA kernels take 2 and 4
    group       consecutive tokens of a channel that share s and m, and are encoded together: a multiple of 32.  CUDA
                kernels take 32, 64 and 128

    Source: KIVI, arXiv 2402.02750, section 3.2.
    """

    kind = Keys

    @property
    def granule(self) -> int:
        return self.group

    def encode(self, x) -> KiviTokens:
        """As `Codec.encode`, for whole groups of tokens."""
        return KiviTokens(**kivi.encode_keys(x, self.bits, self.group).arrays())

    def logits(self, q, packed: KiviTokens, scale: float | None = None):
        return kivi.logits(q, self.encoded(packed), scale=scale)

    def write(self, storage: KiviTokens, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        rows = self._narrowed(storage, sequences, start, start + x.shape[2])
        kivi.encode_keys(x, self.bits, self.group, out=self.encoded(rows), stream=stream, backend=backend)

    def _rows(self, capacity: int) -> tuple[int, int]:
        return capacity // self.group, self.head_dim


@part
@dataclass(frozen=True)
class TokenInt(_Integers):
    """x_hat = s c + m per token, in groups of channels: bits + 32 / group.

    head_dim    a multiple of the group.  CUDA kernels take 64, 128 and 256
    bits        2, 4 or 8.  CUDA kernels take 2 and 4
    group       consecutive channels of a token that share s and m: a multiple of 32.  CUDA kernels take 32, 64 and 128

    Source: KIVI, arXiv 2402.02750, section 3.2.
    """

    kind = Values

    def __post_init__(self):
        super().__post_init__()
        arrays.Arguments(type(self).__name__).require(self.head_dim % self.group == 0, "group",
                                                      f"a divisor of head_dim {self.head_dim}", self.group)

    def encode(self, x) -> KiviTokens:
        return KiviTokens(**kivi.encode_values(x, self.bits, self.group).arrays())

    def logits(self, q, packed: KiviTokens, scale: float | None = None):
        """As `Codec.logits`, of the decoded tokens: a diagnostic that NumPy computes on the host, whatever the
        device."""
        arguments = arrays.Arguments(f"{type(self).__name__}.logits")
        query = arguments.take("q", q, f"batch q_heads {self.head_dim}", arrays.FLOATS)
        keys = arrays.borrow(self.decode(packed, "float32"), "decoded").to_host()
        batch, kv_heads, tokens = keys.shape[:3]
        arguments.require(query.shape[0] == batch and query.shape[1] % kv_heads == 0, "q",
                          f"[{batch}, a multiple of the {kv_heads} KV heads, {self.head_dim}]", list(query.shape))
        heads = query.to_host().astype(np.float32).reshape(batch, kv_heads, -1, self.head_dim)
        result = arguments.result("logits", None, (batch, query.shape[1], tokens), "float32")
        products = heads @ keys.swapaxes(-1, -2) * np.float32(check_scale(arguments, scale, self.head_dim))
        result.copy_from(products.reshape(result.shape), arguments.stream)
        return result.give()

    def write(self, storage: KiviTokens, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        rows = self._narrowed(storage, sequences, start, start + x.shape[2])
        kivi.encode_values(x, self.bits, self.group, out=self.encoded(rows), stream=stream, backend=backend)

    def _rows(self, capacity: int) -> tuple[int, int]:
        return capacity, self.head_dim // self.group


@part
@dataclass(frozen=True)
class KiviValues(TokenInt):
    """KIVI's values: `TokenInt` by the name that goes with `KiviKeys`."""


def _attend(query, key_codec: KiviKeys, keys: KiviTokens, value_codec: TokenInt, values: KiviTokens, *, lengths, scale,
            out, lse, workspace, stream, backend) -> None:
    kivi.decode_attention(query, key_codec.encoded(keys), value_codec.encoded(values), lengths=lengths, scale=scale,
                          out=out, lse=lse, workspace=workspace, stream=stream, backend=backend)


FUSED[KiviKeys, KiviValues] = FUSED[KiviKeys, TokenInt] = Fused(_attend)
