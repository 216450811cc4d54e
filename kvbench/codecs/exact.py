"""Exact storage: tokens as they are."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvbench import arrays
from kvbench.codecs.base import FUSED, Codec, Exact, Fused, Packed, part
from kvbench.ops import attention


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


def _attend_exact(query, key_codec: Float16, keys: Float16Tokens, value_codec: Float16, values: Float16Tokens, *,
                  lengths, scale, out, lse, workspace, stream, backend) -> None:
    attention.decode(query, keys.tokens, values.tokens, lengths=lengths, scale=scale, out=out, lse=lse,
                     workspace=workspace, stream=stream, backend=backend)


def _attend_selected(query, key_codec: Float16, keys: Float16Tokens, value_codec: Float16, values: Float16Tokens, *,
                     selection, lengths, scale, out, lse, workspace, stream, backend) -> None:
    attention.sparse_attention(query, keys.tokens, values.tokens, selection.indices, selection.counts, lengths=lengths,
                               scale=scale, out=out, lse=lse, workspace=workspace, stream=stream, backend=backend)


def _attend_jointly(query, key_codec: Float16, keys: Float16Tokens, value_codec: Float16, values: Float16Tokens, *,
                    selection, exact: Exact, lengths, scale, out, lse, workspace, stream, backend) -> None:
    attention.sparse_attention(query, *joined(keys, values, exact), selection.indices, selection.counts,
                               lengths=lengths, first=exact.keys.tokens.shape[2], leading=exact.lengths, scale=scale,
                               out=out, lse=lse, workspace=workspace, stream=stream, backend=backend)


def joined(keys: Float16Tokens, values: Float16Tokens, exact: Exact) -> tuple[arrays.Array, arrays.Array]:
    """(keys, values) [batch, kv_heads, slots, head_dim]: views of exact slots and those of the store behind them."""
    return tuple(front.tokens.joined(store.tokens, 2) for front, store in ((exact.keys, keys), (exact.values, values)))


FUSED[Float16, Float16] = Fused(_attend_exact, _attend_selected, _attend_jointly)
