"""KIVI: keys as integers per channel, values as integers per token, and decode attention over the integers.

Reference: reference/kivi.py, which also says where the bits of a code lie; kernels: cuda_src/kivi.cu, their launches:
kivi_launch.py, problems and agreement: kivi_records.py.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvbench import registry
from kvbench.arrays import FLOATS, Arguments, Array
from kvbench.cpu import kivi as cpu_kivi
from kvbench.ops import attention, kivi_launch
from kvbench.ops.dispatch import check_cuda_head_dim, check_heads, choose, require_finite, require_writable, round_into
from kvbench.ops.kivi_launch import CUDA_BITS, CUDA_GROUPS, TILE
from kvbench.reference import kivi as reference
from kvbench.reference.kivi import BITS, Encoded, Keys, Values

__all__ = ["TILE", "Encoded", "Keys", "Values", "decode", "decode_attention", "encode_keys", "encode_values",
           "logits", "workspace"]

workspace = attention.workspace    # decode attention needs the same scratch

BACKENDS = registry.BACKENDS
HOST_BACKENDS = ("reference", "cpu")


# ---- vectors and their codes -----------------------------------------------------------------------------------------


def encode_keys(x, bits: int, group: int = 32, *, check_finite: bool = False, out: Keys | None = None,
                backend: str | None = None, stream=None) -> Keys:
    """c = round((x - m) / s) with m = min x and s = (max x - m) / (2^bits - 1) of `group` tokens of one channel.

    x            : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, rounded to float16 first; outer
                   dimensions may be strided.  Keys after RoPE, in whole groups of tokens
    bits         : 2, 4 or 8
    group        : tokens that share s and m, a multiple of 32; the first token of x begins one
    check_finite : ValueError where x holds NaN or Inf (in device memory: after a copy of x to the host).  Else they
                   touch no other number of their group: NaN gets the code 0, Inf is clamped
    out          : `Keys` to write into (default: new).  They may be slices of a larger store: the rows of a head follow
                   one another
    backend      : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256, 2 or
                   4 bits, groups of 32, 64 or 128

    Returns `Keys`: codes [batch, kv_heads, tokens, head_dim bits / 32] uint32; scale and minimum, s and m, [batch,
    kv_heads, tokens / group, head_dim] float16.  All backends give the same bits.
    Source: KIVI, arXiv 2402.02750, section 3.2 and Algorithm 1.
    """
    return _encode("encode_keys", Keys, reference.encode_keys, x, bits, group, check_finite, out, backend, stream)


def encode_values(x, bits: int, group: int = 32, *, check_finite: bool = False, out: Values | None = None,
                  backend: str | None = None, stream=None) -> Values:
    """c = round((x - m) / s) with m = min x and s = (max x - m) / (2^bits - 1) of `group` channels of one token.

    x            : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, as for `encode_keys`; any number of
                   tokens
    bits         : 2, 4 or 8
    group        : channels that share s and m, a multiple of 32 that divides head_dim
    check_finite : as for `encode_keys`
    out          : `Values` to write into (default: new), as for `encode_keys`
    backend      : as for `encode_keys`

    Returns `Values`: codes as those of keys; scale and minimum [batch, kv_heads, tokens, head_dim / group] float16.
    All backends give the same bits.
    Source: KIVI, arXiv 2402.02750, section 3.2 and Algorithm 1.
    """
    return _encode("encode_values", Values, reference.encode_values, x, bits, group, check_finite, out, backend, stream)


def _encode(verb, kind, by_reference, x, bits, group, check_finite, out, backend, stream):
    arguments = Arguments(f"kivi.{verb}", stream=stream)
    x = arguments.take("x", x, "batch kv_heads tokens head_dim", FLOATS, strided=True)
    tokens, head_dim = x.shape[2:]
    _check_parameters(arguments, bits, group)
    arguments.require(head_dim > 0 and head_dim % 32 == 0, "x", "a head_dim that is a multiple of 32", head_dim)
    if kind is Keys:
        arguments.require(tokens % group == 0, "x", f"tokens in whole groups of {group}",
                          f"{tokens} tokens: the last ones stay exact")
    else:
        arguments.require(head_dim % group == 0, "x", f"head_dim in whole groups of {group}", f"head_dim {head_dim}")
    codes = _result_codes(arguments, kind, out, bits, group, x)
    backend = choose(backend, arguments, BACKENDS)
    if check_finite and backend != "reference":
        require_finite(arguments, x)

    if backend == "reference":
        codes.write(by_reference(x.numpy(), bits, group, check_finite=check_finite))
    elif backend == "cpu":
        cpu_kivi.encode(x.numpy(), bits, group, kind is Keys, *codes.numpy_arrays())
    else:
        _check_cuda(arguments, "x", head_dim, bits, group, backend)
        arguments.require(x.aligned(16), "x", "rows at multiples of 16 bytes",
                          f"address {x.pointer:#x}, strides {x.strides}")
        if x.size:
            kivi_launch.launch_encode(x, codes, backend, arguments)
    return codes.give() if out is None else out


def decode(encoded: Encoded, *, dtype: str = "float16", out=None, backend: str | None = None, stream=None):
    """x_hat = s c + m.

    encoded : `Keys` or `Values`, as the encoders gave them, or slices of a store
    dtype   : of the result: float16, bfloat16 or float32
    out     : [batch, kv_heads, tokens, head_dim] of that dtype (default: new, in the framework of the codes)
    backend : reference, cpu, cuda, native, simt (default: by device); the last three as for `encode_keys`

    Arithmetic is float32, which rounds once, and the result once more; it may be Inf in float16.
    Source: KIVI, arXiv 2402.02750, section 3.1.
    """
    arguments = Arguments("kivi.decode", stream=stream)
    codes = _take_codes(arguments, "encoded", encoded, (Keys, Values))
    arguments.require(dtype in FLOATS, "dtype", f"one of {', '.join(FLOATS)}", repr(dtype))
    out = arguments.result("out", out, "batch kv_heads tokens head_dim", dtype)
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        round_into(out, reference.decode(codes.on_host()))
    elif backend == "cpu":
        cpu_kivi.decode(*codes.numpy_arrays(), codes.bits, codes.group, codes.kind is Keys, out.numpy())
    else:
        _check_cuda(arguments, "encoded", codes.head_dim, codes.bits, codes.group, backend)
        arguments.require(out.aligned(16), "out", "an address that is a multiple of 16 bytes", f"{out.pointer:#x}")
        if out.size:
            kivi_launch.launch_decode(codes, out, backend, arguments)
    return out.give()


def logits(query, keys: Keys, *, scale: float | None = None, out=None, backend: str | None = None, stream=None):
    """scale <q_h, k_hat_t>, each code read once per KV head.

    query   : [batch, q_heads, head_dim] float16, bfloat16 or float32; query head h reads KV head h // group
    keys    : of [batch, kv_heads, tokens, head_dim], as `encode_keys` gave them, or slices of a store
    scale   : factor of the logits (default head_dim ** -0.5)
    out     : [batch, q_heads, tokens] float32 (default: new)
    backend : reference, cpu, cuda, native, simt (default: by device); the last three as for `encode_keys`, and up to 16
              query heads per KV head

    Arithmetic is float32.  Source: KIVI, arXiv 2402.02750, section 3.2.
    """
    arguments = Arguments("kivi.logits", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    keys = _take_codes(arguments, "keys", keys, (Keys,))
    heads = check_heads(arguments, keys.head_dim)
    scale = attention.check_scale(arguments, scale, keys.head_dim)
    out = arguments.result("out", out, "batch q_heads tokens", "float32")
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        round_into(out, reference.logits(query.numpy(), keys.on_host(), scale=scale))
    elif backend == "cpu":
        cpu_kivi.logits(_scaled_query(query, scale), *keys.numpy_arrays(), keys.bits, keys.group, out.numpy())
    else:
        _check_cuda(arguments, "keys", keys.head_dim, keys.bits, keys.group, backend)
        attention.check_cuda_heads(arguments, backend, keys.head_dim, heads)
        if out.size:
            kivi_launch.launch_logits(query, keys, scale, out, backend, arguments)
    return out.give()


# ---- decode attention ------------------------------------------------------------------------------------------------


def decode_attention(query, keys: Keys, values: Values, *, lengths=None, scale: float | None = None,
                     splits: int | None = None, return_lse: bool = False, out=None, lse=None,
                     workspace: attention.Workspace | None = None, backend: str | None = None, stream=None):
    """output_h = sum_t softmax_t(scale <q_h, k_hat_t>) v_hat_t: one decode step on codes, each read once per KV head.

    query     : [batch, q_heads, head_dim] float16, bfloat16 or float32; query head h reads KV head h // group
    keys      : of [batch, kv_heads, tokens, head_dim], as `encode_keys` gave them, or slices of a store
    values    : likewise, from `encode_values`; bits and group may differ from those of the keys.  On a GPU the heads of
                both stores begin at multiples of 16 bytes
    lengths   : [batch] int32, tokens of each sequence (default: all), in whole groups or not.  Slots from there on are
                not read into a result; lengths outside 0..tokens are clamped.  Length 0: output 0, lse -inf
    scale     : factor of the logits (default head_dim ** -0.5)
    splits    : thread blocks per sequence and KV head (default: enough to fill the GPU); cpu and reference do not split
    return_lse: also return the natural log-sum-exp of the logits, with which partial results merge: those over exact
                tokens, too (`attention.merge`)
    out, lse  : [batch, q_heads, head_dim] in query's dtype or float32;  [batch, q_heads] float32 (default: new)
    workspace : from `attention.workspace(...)`, so that nothing is allocated (default: a temporary one)
    backend   : reference, cpu, cuda, native, simt (default: by device); the last three as for `encode_keys`, and up to
                16 query heads per KV head

    Returns out, or (out, lse).  The CUDA kernel multiplies codes, exactly, with s q and with weights times s, both
    rounded to float16, on tensor cores with float32 sums; cpu is float32 throughout.
    Source: KIVI, arXiv 2402.02750, section 3.2; split and merge: arXiv 1805.02867, section 3.1.
    """
    arguments = Arguments("kivi.decode_attention", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    keys = _take_codes(arguments, "keys", keys, (Keys,))
    values = _take_codes(arguments, "values", values, (Values,))
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    heads = check_heads(arguments, keys.head_dim)
    scale = attention.check_scale(arguments, scale, keys.head_dim)
    out, lse = attention.take_results(arguments, query, splits, out, lse, return_lse)
    backend = choose(backend, arguments, BACKENDS)
    batch, tokens = query.shape[0], arguments.sizes["tokens"]

    if backend in HOST_BACKENDS:
        host_lengths = np.full(batch, tokens, np.int32) if lengths is None else np.clip(lengths.numpy(), 0, tokens)
    if backend == "reference":
        output, log_sum = reference.decode_attention(query.numpy(), keys.on_host(), values.on_host(),
                                                     lengths=host_lengths, scale=scale)
        round_into(out, output)
        if lse is not None:
            lse.numpy()[...] = log_sum
    elif backend == "cpu":
        sides = [(*side.numpy_arrays(), side.bits, side.group) for side in (keys, values)]
        cpu_kivi.decode_attention(_scaled_query(query, scale), *sides, host_lengths, out.numpy(),
                                  None if lse is None else lse.numpy())
    else:
        attention.check_cuda_heads(arguments, backend, keys.head_dim, heads)
        for name, side in (("keys", keys), ("values", values)):
            _check_cuda(arguments, name, side.head_dim, side.bits, side.group, backend)
            for part, array in side.arrays().items():
                arguments.require(_heads_aligned(array), f"{name}.{part}",
                                  f"heads that begin at multiples of 16 bytes on backend {backend!r}",
                                  f"address {array.pointer:#x}, strides {array.strides}")
        if batch:
            kivi_launch.launch_attention(query, keys, values, lengths, scale, splits, out, lse, workspace, backend,
                                         arguments)
    return (out.give(), lse.give()) if return_lse else out.give()


# ---- validation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Codes:
    """`Keys` or `Values` (kind) whose arrays were validated."""

    kind: type[Encoded]
    codes: Array
    scale: Array
    minimum: Array
    bits: int
    group: int

    @property
    def head_dim(self) -> int:
        return self.codes.shape[3] * 32 // self.bits

    def arrays(self) -> dict[str, Array]:
        return {"codes": self.codes, "scale": self.scale, "minimum": self.minimum}

    def numpy_arrays(self) -> list[np.ndarray]:
        return [array.numpy() for array in self.arrays().values()]

    def on_host(self) -> Encoded:
        return self.kind(*self.numpy_arrays(), self.bits, self.group)

    def give(self) -> Encoded:
        return self.kind(*(array.give() for array in self.arrays().values()), self.bits, self.group)

    def write(self, encoded: Encoded) -> None:
        for target, source in zip(self.numpy_arrays(), encoded.arrays().values()):
            target[...] = source

    def arguments(self) -> tuple:
        """As kernels take them: the three arrays; strides of sequences and heads of the codes, and of s and m."""
        return (*self.arrays().values(), *map(np.uint64, self.codes.strides[:2]),
                *map(np.uint64, self.scale.strides[:2]))


def _check_parameters(arguments, bits, group, where=""):
    for name, value, expected, good in (
            ("bits", bits, f"{', '.join(map(str, BITS[:-1]))} or {BITS[-1]}", lambda n: n in BITS),
            ("group", group, "a positive multiple of 32", lambda n: n > 0 and n % 32 == 0)):
        is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        arguments.require(is_integer and good(value), where + name, expected, repr(value))


def _take_codes(arguments, name, encoded, kinds) -> _Codes:
    """The codes that an operator reads: [batch, kv_heads, tokens] vectors of head_dim."""
    if not isinstance(encoded, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{arguments.operator}: {name}: expected {expected} from kivi.encode_"
                        f"{' or kivi.encode_'.join(kind.__name__.lower() for kind in kinds)}, "
                        f"got {type(encoded).__name__}")
    return _take_arrays(arguments, name, encoded)


def _take_arrays(arguments, name, encoded) -> _Codes:
    _check_parameters(arguments, encoded.bits, encoded.group, f"{name}.")
    bits, group = int(encoded.bits), int(encoded.group)
    words = f"{name}_words"
    codes = arguments.take(f"{name}.codes", encoded.codes, f"batch kv_heads tokens {words}", ("uint32",), strided=True)
    arguments.require(codes.shape[3] > 0 and codes.shape[3] % bits == 0, f"{name}.codes",
                      f"a positive multiple of {bits} words per token, 32 channels each", codes.shape[3])
    head_dim, tokens = codes.shape[3] * 32 // bits, codes.shape[2]
    known = arguments.sizes.setdefault("head_dim", head_dim)
    arguments.require(head_dim == known, f"{name}.codes", f"{known * bits // 32} words for head_dim {known}",
                      codes.shape[3])
    if isinstance(encoded, Keys):
        arguments.require(tokens % group == 0, f"{name}.codes", f"tokens in whole groups of {group}", tokens)
        shape = f"batch kv_heads {tokens // group} head_dim"
    else:
        arguments.require(head_dim % group == 0, f"{name}.codes", f"head_dim in whole groups of {group}", head_dim)
        shape = f"batch kv_heads tokens {head_dim // group}"
    scale, minimum = (arguments.take(f"{name}.{part}", getattr(encoded, part), shape, ("float16",), strided=True)
                      for part in ("scale", "minimum"))
    for part, array in (("codes", codes), ("scale", scale), ("minimum", minimum)):
        arguments.require(array.shape[2] <= 1 or array.strides[2] == array.shape[3], f"{name}.{part}",
                          "rows of a head that follow one another", f"strides {list(array.strides)}")
    arguments.require(minimum.strides[:2] == scale.strides[:2], f"{name}.minimum",
                      f"strides {list(scale.strides)} as those of {name}.scale", list(minimum.strides))
    return _Codes(Keys if isinstance(encoded, Keys) else Values, codes, scale, minimum, bits, group)


def _result_codes(arguments, kind, given, bits, group, x) -> _Codes:
    """The codes that an encoder writes: the caller's, apart from x and from each other, or new ones."""
    batch, kv_heads, tokens, head_dim = x.shape
    if given is None:
        rows = (tokens // group, head_dim) if kind is Keys else (tokens, head_dim // group)
        codes = arguments.result("out.codes", None, (batch, kv_heads, tokens, head_dim * bits // 32), "uint32")
        scale, minimum = (arguments.result(f"out.{part}", None, (batch, kv_heads, *rows), "float16")
                          for part in ("scale", "minimum"))
        return _Codes(kind, codes, scale, minimum, int(bits), int(group))
    if not isinstance(given, kind):
        raise TypeError(f"{arguments.operator}: out: expected {kind.__name__}, got {type(given).__name__}")
    arguments.require((given.bits, given.group) == (bits, group), "out", f"codes of {bits} bits in groups of {group}",
                      f"{given.bits} bits in groups of {given.group}")
    codes = _take_arrays(arguments, "out", given)
    require_writable(arguments, {f"out.{part}": array for part, array in codes.arrays().items()}, {"x": x})
    return codes


def _check_cuda(arguments, name, head_dim, bits, group, backend):
    check_cuda_head_dim(arguments, name, head_dim, backend)
    arguments.require(bits in CUDA_BITS, name, f"2 or 4 bits on backend {backend!r}: 8 are for reference and cpu",
                      f"{bits} bits")
    arguments.require(group in CUDA_GROUPS, name, f"groups of 32, 64 or 128 on backend {backend!r}", group)


def _heads_aligned(array) -> bool:
    return array.size == 0 or array.pointer % 16 == 0 and all(
        stride * array.itemsize % 16 == 0 for length, stride in zip(array.shape[:2], array.strides) if length > 1)


# ---- cpu -------------------------------------------------------------------------------------------------------------


def _scaled_query(query: Array, scale: float) -> np.ndarray:
    return query.numpy().astype(np.float32) * np.float32(scale)
