"""Self-Indexing: keys as signs, which are their index as well, and 2-bit magnitudes (arXiv 2603.14224).

Tokens are rows of signs, codes, scales and minima.  The mean of the keys and the scale of each channel belong to a
sequence: the first append freezes them.  Values are `TokenInt`.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvbench import arrays
from kvbench.codecs.base import FUSED, Codec, Exact, Fused, Packed, part
from kvbench.codecs.kivi import KiviTokens, KiviValues, TokenInt
from kvbench.ops import self_indexing
from kvbench.ops.attention import check_scale
from kvbench.ops.dispatch import NUMPY_TYPE
from kvbench.reference import kivi
from kvbench.reference import self_indexing as reference
from kvbench.reference.self_indexing import CENTRES, GROUP, MAGNITUDE_BITS, Encoded


@dataclass(frozen=True, eq=False)
class SignVQTokens(Packed):
    """In the order of `reference.self_indexing`.

    sign                : [batch, kv_heads, tokens, head_dim / 32] uint32
    codes               : [batch, kv_heads, tokens, head_dim / 16] uint32, of magnitudes
    scale, minimum      : [batch, kv_heads, tokens, head_dim / 32] float16
    mean, channel_scale : [batch, kv_heads, 1, head_dim] float32, mu and alpha
    """

    sign: object
    codes: object
    scale: object
    minimum: object
    mean: object
    channel_scale: object


_OF_TOKENS = ("sign", "codes", "scale", "minimum")


@part
@dataclass(frozen=True)
class SignVQ(Codec):
    """k_hat = mu + alpha sign (s m + z), for keys: one bit of sign and two of magnitude, 4 bits with scale and minimum.

    head_dim   a multiple of 32.  CUDA kernels take 64, 128 and 256
    centre     "mean", "median" or "none" of the tokens of the first append, which should be a prompt; computed once, on
               the host, and frozen
    sinks      so many of the first tokens do not count for the scale of a channel: a cache keeps them exact

    Source: arXiv 2603.14224.
    """

    head_dim: int
    centre: str = "mean"
    sinks: int = 0

    def __post_init__(self):
        arguments = arrays.Arguments("SignVQ")
        for name, least in (("head_dim", 1), ("sinks", 0)):
            value = getattr(self, name)
            arguments.require(isinstance(value, int) and not isinstance(value, bool) and value >= least, name,
                              f"an integer of at least {least}", repr(value))
        arguments.require(self.head_dim % GROUP == 0, "head_dim", f"a multiple of {GROUP}", self.head_dim)
        arguments.require(self.centre in CENTRES, "centre", f"one of {', '.join(CENTRES)}", repr(self.centre))

    @property
    def bits_per_element(self) -> float:
        """Sign, magnitude, scale and minimum.  What is frozen takes 64 / tokens bits besides."""
        return 1 + MAGNITUDE_BITS + 32 / GROUP

    def encode(self, x) -> SignVQTokens:
        """As `Codec.encode`, with the statistics of x itself."""
        arguments = arrays.Arguments("SignVQ.encode")
        x = arguments.take("x", x, f"batch kv_heads tokens {self.head_dim}", self.inputs, strided=True)
        mean, scale = (arrays.upload(array, x.device, x.framework, stream=arguments.stream)
                       for array in freeze(x, self.centre, self.sinks)[:2])
        encoded = self_indexing.encode(x, mean, scale, stream=arguments.stream)
        rows = (array.reshape(*array.shape[:2], 1, self.head_dim).give() for array in (mean, scale))
        return SignVQTokens(encoded.sign, *encoded.magnitude.arrays().values(), *rows)

    def decode(self, packed: SignVQTokens, dtype: str = "float16"):
        """As `Codec.decode`, in float16, bfloat16 or float32: a diagnostic that NumPy computes on the host."""
        arguments = arrays.Arguments("SignVQ.decode")
        arguments.require(dtype in NUMPY_TYPE, "dtype", f"one of {', '.join(NUMPY_TYPE)}", repr(dtype))
        host = self._host(arguments, packed)
        result = arguments.result("result", None, (*host.sign.shape[:3], self.head_dim), dtype)
        with np.errstate(over="ignore"):
            result.copy_from(self._decoded(host).astype(NUMPY_TYPE[dtype]), arguments.stream)
        return result.give()

    def logits(self, q, packed: SignVQTokens, scale: float | None = None):
        """As `Codec.logits`: a diagnostic that NumPy computes on the host, whatever the device."""
        arguments = arrays.Arguments("SignVQ.logits")
        query = arguments.take("q", q, f"batch q_heads {self.head_dim}", arrays.FLOATS)
        keys = self._decoded(self._host(arguments, packed))
        batch, kv_heads, tokens = keys.shape[:3]
        arguments.require(query.shape[0] == batch and query.shape[1] % kv_heads == 0, "q",
                          f"[{batch}, a multiple of the {kv_heads} KV heads, {self.head_dim}]", list(query.shape))
        heads = query.to_host().astype(np.float64).reshape(batch, kv_heads, -1, self.head_dim)
        result = arguments.result("logits", None, (batch, query.shape[1], tokens), "float32")
        products = heads @ keys.swapaxes(-1, -2) * check_scale(arguments, scale, self.head_dim)
        result.copy_from(products.reshape(result.shape).astype(np.float32), arguments.stream)
        return result.give()

    def encoded(self, packed: SignVQTokens) -> Encoded:
        """The same arrays as the operators of `ops.self_indexing` take them."""
        return Encoded(packed.sign, kivi.Values(packed.codes, packed.scale, packed.minimum, MAGNITUDE_BITS, GROUP))

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> SignVQTokens:
        shape = (batch, kv_heads, capacity)
        rows = [arrays.zeros((batch, kv_heads, 1, self.head_dim), "float32", device) for _ in range(2)]
        return SignVQTokens(*(arrays.empty((*shape, self.head_dim // numbers), "uint32", device)
                              for numbers in (32, 32 // MAGNITUDE_BITS)),
                            *(arrays.empty((*shape, self.head_dim // GROUP), "float16", device) for _ in range(2)),
                            *rows)

    def prepare(self, storage: SignVQTokens, sequences: slice, x: arrays.Array, queries: arrays.Array | None, *,
                stream=None, backend=None) -> None:
        for target, source in zip((storage.mean, storage.channel_scale), freeze(x, self.centre, self.sinks)):
            target.narrow(0, sequences.start, sequences.stop).copy_from(source[:, :, None], stream)

    def write(self, storage: SignVQTokens, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        rows = _narrowed(storage, sequences, start, start + x.shape[2])
        self_indexing.encode(x, rows_of(rows.mean), rows_of(rows.channel_scale), out=self.encoded(rows), stream=stream,
                             backend=backend)

    def used(self, storage: SignVQTokens, sequence: int, tokens: int) -> SignVQTokens:
        return _narrowed(storage, slice(sequence, sequence + 1), 0, tokens)

    def _host(self, arguments, packed) -> SignVQTokens:
        lasts = (self.head_dim // 32, self.head_dim // 16, self.head_dim // GROUP, self.head_dim // GROUP)
        dtypes = ("uint32", "uint32", "float16", "float16")
        taken = [arguments.take(f"packed.{name}", getattr(packed, name), f"batch kv_heads tokens {last}", (dtype,),
                                strided=True) for name, last, dtype in zip(_OF_TOKENS, lasts, dtypes)]
        taken += [arguments.take(f"packed.{name}", getattr(packed, name), f"batch kv_heads 1 {self.head_dim}",
                                 ("float32",), strided=True) for name in ("mean", "channel_scale")]
        return SignVQTokens(*(array.to_host() for array in taken))

    def _decoded(self, host: SignVQTokens) -> np.ndarray:
        return reference.decode(self.encoded(host), host.channel_scale[:, :, 0]) + host.mean.astype(np.float64)


def freeze(x: arrays.Array, centre: str, sinks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mu, alpha, codebook) of a prompt [batch, kv_heads, tokens, head_dim], on the host: `reference.self_indexing`.

    The first `sinks` tokens count for mu alone.
    """
    batch, kv_heads, tokens, head_dim = x.shape
    mean, scale = (np.empty((batch, kv_heads, head_dim), np.float32) for _ in range(2))
    codebook = np.empty((batch, kv_heads, head_dim // reference.SUBVECTOR, reference.CODES, reference.SUBVECTOR),
                        np.float32)
    excluded = np.arange(min(sinks, tokens), dtype=np.int32)[None, None]
    for b in range(batch):
        for h in range(kv_heads):                       # one KV head at a time: a copy of all tokens may not fit
            own = x.narrow(0, b, b + 1).narrow(1, h, h + 1).to_host()
            mean[b, h] = reference.find_centre(own, centre)[0, 0]
            scale[b, h] = reference.channel_scale(own, mean[b : b + 1, h : h + 1], excluded=excluded)[0, 0]
            codebook[b, h] = self_indexing.build_codebook(own, mean[b : b + 1, h : h + 1].copy(), excluded=excluded,
                                                          backend="cpu")[0, 0]
    return mean, scale, codebook


def rows_of(statistic: arrays.Array) -> arrays.Array:
    """[batch, kv_heads, 1, head_dim] as operators take it: [batch, kv_heads, head_dim]."""
    statistic = arrays.borrow(statistic, "SignVQ")
    return statistic.reshape(*statistic.shape[:2], statistic.shape[3])


def _narrowed(storage: SignVQTokens, sequences: slice, start: int, stop: int) -> SignVQTokens:
    """Views of some tokens of some sequences, and of what is frozen for these."""
    views = {}
    for name, array in storage.arrays().items():
        view = array.narrow(0, sequences.start, sequences.stop)
        views[name] = view.narrow(2, start, stop) if name in _OF_TOKENS else view
    return SignVQTokens(**views)


def _attend(query, key_codec: SignVQ, keys: SignVQTokens, value_codec: TokenInt, values: KiviTokens, *, lengths, scale,
            out, lse, workspace, stream, backend, selection=None, exact: Exact | None = None) -> None:
    """A store of values may have more slots than one of keys."""
    tokens = arrays.borrow(keys.sign, "keys").shape[2]
    values = KiviTokens(**{name: arrays.borrow(array, name).narrow(2, 0, tokens)
                           for name, array in values.arrays().items()})
    chosen = {} if selection is None else {"indices": selection.indices, "counts": selection.counts}
    if exact is not None:
        chosen |= {"exact_keys": exact.keys.tokens, "exact_values": exact.values.tokens, "exact_lengths": exact.lengths,
                   "early": exact.settled and selection is not None}
    self_indexing.sparse_attention_packed(
        query, key_codec.encoded(keys), value_codec.encoded(values), rows_of(keys.channel_scale), **chosen,
        lengths=lengths, mean=rows_of(keys.mean), scale=scale, out=out, lse=lse, workspace=workspace, stream=stream,
        backend=backend)


def _check(key_codec: SignVQ, value_codec: TokenInt) -> None:
    if value_codec.bits not in (2, 4) or value_codec.group != GROUP:
        raise ValueError(f"SignVQ x {type(value_codec).__name__}: values: expected 2 or 4 bits in groups of {GROUP} "
                         f"channels, got {value_codec.bits} bits in groups of {value_codec.group}")


FUSED[SignVQ, TokenInt] = FUSED[SignVQ, KiviValues] = Fused(_attend, _attend, _attend, _check)
