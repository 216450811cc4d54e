"""TurboQuant: vectors as codes of their rotated coordinates in bit planes, and decode attention over the codes.

Reference: reference/turboquant.py (layout: reference/planes.py), kernels: cuda_src/turboquant.cu.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from kvbench import loaders, registry
from kvbench.arrays import FLOATS, Arguments, Array, Device, empty, upload
from kvbench.cpu import turboquant as cpu_turboquant
from kvbench.ops import attention, rotation as rotation_operator
from kvbench.ops.dispatch import (CXX_TYPE, EPSILON, SMALLEST_NORMAL, assert_close, choose, random_normal,
                                  relative_error)
from kvbench.reference import planes as bit_planes, turboquant as reference
from kvbench.reference.planes import Planes
from kvbench.reference.rotation import Rotation, hadamard
from kvbench.reference.turboquant import (Encoded, EncodedProd, Projection, SCALE_MODES, codebook_for,
                                          gaussian_projection, orthogonal_projection)
from kvbench.registry import Kernel, Traffic, register

__all__ = ["Encoded", "EncodedProd", "Projection", "decode", "decode_attention", "decode_prod", "encode",
           "encode_prod", "gaussian_projection", "logits", "logits_prod", "orthogonal_projection", "workspace"]

workspace = attention.workspace    # decode attention needs the same scratch

CUDA_HEAD_DIMS = (64, 128, 256)
CUDA_ATTENTION_BITS = (1, 2, 3, 4)
BACKENDS = registry.BACKENDS
HOST_BACKENDS = ("reference", "cpu")
PLANES = ("sign", "mag2_0", "mag2_1", "mag2_2", "mag1")      # in the order in which kernels take them


# ---- vectors and their codes -----------------------------------------------------------------------------------------


def encode(x, rotation: Rotation, bits: int, *, scale_mode: str = "nc", mean=None, check_finite: bool = False,
           out: Encoded | None = None, backend: str | None = None, stream=None) -> Encoded:
    """Rotate, normalise, code and pack: a token of head_dim numbers becomes head_dim * bits / 8 + 2 bytes.

    x            : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32; outer dimensions may be strided.
                   Keys after RoPE
    rotation     : of size head_dim, or on reference and cpu of a larger multiple of 32, to which x is padded with zeros
    bits         : 1 to 8 per coordinate
    scale_mode   : "nc" keeps the norm of a vector; "plain", "mse", "unbiased": see reference/turboquant.py
    mean         : [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, finite, subtracted from x and never
                   added back (keys only: softmax does not see it)
    check_finite : ValueError where x holds NaN or Inf (in device memory: after a copy of x to the host) instead of
                   scale NaN for that token
    out          : an `Encoded` to write into (default: new).  Planes and scale may be slices of a larger store: the
                   tokens of a head follow one another, strides of sequences and heads, counted in tokens, are the same
                   for all of them
    backend      : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256.
                   There a Haar rotation costs a float32 copy of x and its rotation, in memory and time

    Returns `Encoded`: planes of [batch, kv_heads, tokens, words] uint32, scale [batch, kv_heads, tokens] float16.
    Arithmetic is float32: backends agree in every code that is not within 2e-5 of a decision.
    Source: TurboQuant, arXiv 2504.19874, Algorithm 1; scales: EDEN, arXiv 2604.18555, and RaBitQ, arXiv 2405.12497.
    """
    arguments = Arguments("turboquant.encode", stream=stream)
    x = arguments.take("x", x, "batch kv_heads tokens head_dim", FLOATS, strided=True)
    _check_rotation(arguments, "rotation", rotation, x.shape[3])
    _check_bits(arguments, bits)
    arguments.require(scale_mode in SCALE_MODES, "scale_mode", f"one of {', '.join(SCALE_MODES)}", repr(scale_mode))
    mean = _take_mean(arguments, "mean", mean)
    codes = _result_codes(arguments, "out", out, rotation.head_dim, bits, {"x": x, "mean": mean})
    backend = choose(backend, arguments, BACKENDS)
    if check_finite and backend != "reference":
        _check_finite(arguments, x)

    if backend == "reference":
        result = reference.encode(x.numpy(), rotation, bits, scale_mode=scale_mode, mean=_host(mean),
                                  check_finite=check_finite)
        codes.write(result)
    elif backend == "cpu":
        _check_host_mean(arguments, mean)
        codebook = codebook_for(bits, rotation.head_dim)
        cpu_turboquant.encode(x.numpy(), *_cpu_signs(rotation), _host(mean), codebook.boundaries, codebook.centroids,
                              bits, scale_mode, codes.numpy_planes(), codes.scale.numpy(),
                              matrix=_cpu_matrix(rotation, inverse=False))
    else:
        _check_cuda_size(arguments, "x", x.shape[3], rotation, backend)
        arguments.require(x.aligned(16), "x", "rows at multiples of 16 bytes",
                          f"address {x.pointer:#x}, strides {x.strides}")
        if x.size:
            _launch_encode(x, rotation, codes, scale_mode, mean, backend, arguments)
    return codes.give() if out is None else out


def decode(encoded: Encoded, rotation: Rotation, *, dtype: str = "float16", out=None, backend: str | None = None,
           stream=None):
    """x_hat = s R^T c, of x - mean if it was centred.

    encoded  : as `encode` gave it, or slices of a store: planes [batch, kv_heads, tokens, words] uint32, scale
               [batch, kv_heads, tokens] float16
    rotation : the one that encoded
    dtype    : of the result: float16, bfloat16 or float32
    out      : [batch, kv_heads, tokens, head_dim] of that dtype (default: new, in the framework of the codes)
    backend  : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256

    Arithmetic is float32, rounded once.  Source: TurboQuant, arXiv 2504.19874, Algorithm 1.
    """
    arguments = Arguments("turboquant.decode", stream=stream)
    codes = _take_codes(arguments, "encoded", encoded, rotation)
    arguments.require(dtype in FLOATS, "dtype", f"one of {', '.join(FLOATS)}", repr(dtype))
    out = arguments.result("out", out, (*codes.scale.shape, codes.head_dim), dtype)
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        _round_into(out, reference.decode(codes.on_host(), rotation))
    elif backend == "cpu":
        cpu_turboquant.decode(codes.numpy_planes(), codes.scale.numpy(), *_cpu_signs(rotation),
                              codebook_for(codes.bits, rotation.head_dim).centroids, codes.bits, out.numpy(),
                              matrix=_cpu_matrix(rotation, inverse=True))
    else:
        _check_cuda_size(arguments, "encoded", codes.head_dim, rotation, backend)
        arguments.require(out.aligned(16), "out", "an address that is a multiple of 16 bytes", f"{out.pointer:#x}")
        if out.size:
            _launch_decode(codes, rotation, out, backend, arguments)
    return out.give()


def logits(query, encoded: Encoded, rotation: Rotation, *, scale: float | None = None, out=None,
           backend: str | None = None, stream=None):
    """scale <q_h, x_hat_t> = scale s_t <R q_h, c_t>: nothing is rotated back, each code is read once per KV head.

    query    : [batch, q_heads, head_dim] float16, bfloat16 or float32; query head h reads KV head h // group
    encoded  : keys of [batch, kv_heads, tokens, head_dim], as `encode` gave them, or slices of a store
    rotation : the one that encoded
    scale    : factor of the logits (default head_dim ** -0.5)
    out      : [batch, q_heads, tokens] float32 (default: new)
    backend  : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256,
               group <= 16

    Of centred keys, the logits lack scale <q_h, mean>.  Arithmetic is float32.
    Source: TurboQuant, arXiv 2504.19874, section 3.
    """
    arguments = Arguments("turboquant.logits", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    codes = _take_codes(arguments, "encoded", encoded, rotation)
    group = _check_heads(arguments, codes.head_dim)
    scale = attention.check_scale(arguments, scale, codes.head_dim)
    out = arguments.result("out", out, (*query.shape[:2], codes.scale.shape[2]), "float32")
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        _round_into(out, reference.logits(query.numpy(), codes.on_host(), rotation, scale=scale))
    elif backend == "cpu":
        rotated = _rotated_query(query.numpy(), rotation, group) * np.float32(scale)
        cpu_turboquant.logits(rotated, codes.numpy_planes(), codes.scale.numpy(),
                              codebook_for(codes.bits, rotation.head_dim).centroids, codes.bits, out.numpy())
    else:
        _check_cuda_size(arguments, "encoded", codes.head_dim, rotation, backend)
        attention.check_cuda_heads(arguments, backend, codes.head_dim, group)
        if out.size:
            _launch_logits(query, codes, rotation, scale, out, backend, arguments)
    return out.give()


# ---- decode attention ------------------------------------------------------------------------------------------------


def decode_attention(query, keys: Encoded, values: Encoded, key_rotation: Rotation, value_rotation: Rotation, *,
                     lengths=None, scale: float | None = None, key_mean=None, splits: int | None = None,
                     return_lse: bool = False, out=None, lse=None, workspace: attention.Workspace | None = None,
                     backend: str | None = None, stream=None):
    """output_h = sum_t softmax_t(scale <q_h, k_hat_t>) v_hat_t: one decode step on codes, each read once per KV head.

    query     : [batch, q_heads, head_dim] float16, bfloat16 or float32, not rotated; head h reads KV head h // group
    keys      : codes of [batch, kv_heads, tokens, head_dim], as `encode` gave them, centred or not, or slices of a
                store
    values    : likewise, never centred; their bits may differ from those of the keys
    key_rotation, value_rotation : those that encoded, independent of each other
    lengths   : [batch] int32, tokens of each sequence (default: all).  Slots from there on are never read; values
                outside 0..tokens are clamped.  Length 0: output 0, lse -inf
    scale     : factor of the logits (default head_dim ** -0.5)
    key_mean  : [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, the mean that was subtracted from keys:
                scale <q, mean> is added to lse, so that it merges with parts whose keys were not centred
    splits    : thread blocks per sequence and KV head (default: enough to fill the GPU); cpu and reference do not split
    return_lse: also return the natural log-sum-exp of the logits, with which partial results merge
    out, lse  : [batch, q_heads, head_dim] in query's dtype or float32;  [batch, q_heads] float32 (default: new)
    workspace : from `attention.workspace(...)`, so that nothing is allocated (default: a temporary one)
    backend   : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256,
                group <= 16, 1 to 4 bits of keys and of values

    Returns out, or (out, lse).  The CUDA kernel multiplies the query, rounded to 15 bits, with centroids as
    whole numbers, and weights in float16 with float16 centroids, both on tensor cores; cpu is float32 throughout.
    Source: TurboQuant, arXiv 2504.19874, section 3; split and merge: arXiv 1805.02867, section 3.1.
    """
    arguments = Arguments("turboquant.decode_attention", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    keys = _take_codes(arguments, "keys", keys, key_rotation, "key_rotation")
    values = _take_codes(arguments, "values", values, value_rotation, "value_rotation")
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    group = _check_heads(arguments, keys.head_dim)
    scale = attention.check_scale(arguments, scale, keys.head_dim)
    key_mean = _take_mean(arguments, "key_mean", key_mean)
    arguments.require(splits is None or (isinstance(splits, int) and 1 <= splits <= attention.MAX_SPLITS), "splits",
                      f"an integer from 1 to {attention.MAX_SPLITS}", splits)
    out = arguments.result("out", out, "batch q_heads head_dim", (query.dtype, "float32"))
    wants_lse = return_lse or lse is not None
    lse = arguments.result("lse", lse, "batch q_heads", "float32") if wants_lse else None
    backend = choose(backend, arguments, BACKENDS)
    batch, tokens = query.shape[0], keys.scale.shape[2]

    if backend in HOST_BACKENDS:
        host_lengths = np.full(batch, tokens, np.int32) if lengths is None else np.clip(lengths.numpy(), 0, tokens)
    if backend == "reference":
        output, log_sum = reference.decode_attention(
            query.numpy(), keys.on_host(), values.on_host(), key_rotation, value_rotation, lengths=host_lengths,
            scale=scale, key_mean=_host(key_mean))
        _round_into(out, output)
        if lse is not None:
            lse.numpy()[...] = log_sum
    elif backend == "cpu":
        _check_host_mean(arguments, key_mean, "key_mean")
        _attend_on_cpu(query.numpy(), keys, values, key_rotation, value_rotation, host_lengths, scale, _host(key_mean),
                       out.numpy(), None if lse is None else lse.numpy())
    else:
        _check_cuda_size(arguments, "keys", keys.head_dim, key_rotation, backend, "key_rotation")
        _check_cuda_size(arguments, "values", values.head_dim, value_rotation, backend, "value_rotation")
        attention.check_cuda_heads(arguments, backend, keys.head_dim, group)
        for name, codes in (("keys", keys), ("values", values)):
            arguments.require(codes.bits in CUDA_ATTENTION_BITS, name,
                              f"1 to 4 bits on backend {backend!r} (decode them, or use the cpu backend)",
                              f"{codes.bits} bits")
        if batch:
            _launch_attention(query, keys, values, key_rotation, value_rotation, lengths, scale, key_mean, splits, out,
                              lse, workspace, backend, arguments)
    return (out.give(), lse.give()) if return_lse else out.give()


# ---- TurboQuant-prod -------------------------------------------------------------------------------------------------


def encode_prod(x, rotation: Rotation, projection: Projection, bits: int, *, mean=None, check_finite: bool = False,
                backend: str | None = None, stream=None) -> EncodedProd:
    """bits - 1 bits of "plain" code, then the signs of the projected residual: unbiased inner products, more error.

    x            : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32; outer dimensions may be strided
    rotation     : of size head_dim, or a larger multiple of 32, to which x is padded with zeros
    projection   : from `gaussian_projection` or `orthogonal_projection`, of the size of the rotation
    bits         : 1 to 8 per coordinate, the residual's bit among them
    mean         : [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, subtracted from x
    check_finite : ValueError where x holds NaN or Inf
    backend      : reference or cpu (default); host memory only

    Returns `EncodedProd`: the first code (None for 1 bit), residual_sign [batch, kv_heads, tokens, words] uint32,
    residual_norm [batch, kv_heads, tokens] float16.
    Source: TurboQuant, arXiv 2504.19874, Algorithm 2.
    """
    arguments = Arguments("turboquant.encode_prod", stream=stream)
    x = arguments.take("x", x, "batch kv_heads tokens head_dim", FLOATS, strided=True)
    _check_on_host(arguments)
    _check_rotation(arguments, "rotation", rotation, x.shape[3])
    _check_projection(arguments, projection, rotation)
    _check_bits(arguments, bits)
    mean = _take_mean(arguments, "mean", mean)
    first = None if bits == 1 else _result_codes(arguments, "first", None, rotation.head_dim, bits - 1, {})
    sign = arguments.result("residual_sign", None, (*x.shape[:3], rotation.head_dim // 32), "uint32")
    norm = arguments.result("residual_norm", None, x.shape[:3], "float16")
    backend = choose(backend, arguments, HOST_BACKENDS)
    if check_finite and backend != "reference":
        _check_finite(arguments, x)

    if backend == "reference":
        result = reference.encode_prod(x.numpy(), rotation, projection, bits, mean=_host(mean),
                                       check_finite=check_finite)
        if first is not None:
            first.write(result.first)
        sign.numpy()[...], norm.numpy()[...] = result.residual_sign, result.residual_norm
    else:
        _check_host_mean(arguments, mean)
        codebook = None if first is None else codebook_for(bits - 1, rotation.head_dim)
        cpu_turboquant.encode_prod(
            x.numpy(), *_cpu_signs(rotation), _host(mean), None if first is None else codebook.boundaries,
            None if first is None else codebook.centroids, bits, None if first is None else first.numpy_planes(),
            None if first is None else first.scale.numpy(), projection.matrix, sign.numpy(), norm.numpy(),
            matrix=_cpu_matrix(rotation, inverse=False))
    return EncodedProd(None if first is None else first.give(), sign.give(), norm.give(), x.shape[3])


def decode_prod(encoded: EncodedProd, rotation: Rotation, projection: Projection, *, dtype: str = "float16", out=None,
                backend: str | None = None, stream=None):
    """x_hat = R^T (s c + k |r| S^T sign(S r)), [batch, kv_heads, tokens, head_dim].

    encoded, rotation, projection : as `encode_prod` gave and took them
    dtype   : of the result: float16, bfloat16 or float32;  out : of that dtype (default: new)
    backend : reference or cpu (default); host memory only

    Source: TurboQuant, arXiv 2504.19874, Algorithm 2.
    """
    arguments = Arguments("turboquant.decode_prod", stream=stream)
    first, sign, norm = _take_prod(arguments, encoded, rotation, projection)
    arguments.require(dtype in FLOATS, "dtype", f"one of {', '.join(FLOATS)}", repr(dtype))
    out = arguments.result("out", out, (*norm.shape, encoded.head_dim), dtype)
    backend = choose(backend, arguments, HOST_BACKENDS)
    if backend == "reference":
        _round_into(out, reference.decode_prod(_prod_on_host(first, sign, norm, encoded.head_dim), rotation,
                                               projection))
    else:
        cpu_turboquant.decode_prod(*_cpu_prod(first, sign, norm, projection), *_cpu_signs(rotation),
                                   *_prod_codebook(first, rotation), out.numpy(),
                                   matrix=_cpu_matrix(rotation, inverse=True))
    return out.give()


def logits_prod(query, encoded: EncodedProd, rotation: Rotation, projection: Projection, *, scale: float | None = None,
                out=None, backend: str | None = None, stream=None):
    """scale <q_h, x_hat_t>, unbiased over the projection.

    query   : [batch, q_heads, head_dim] float16, bfloat16 or float32; query head h reads KV head h // group
    encoded, rotation, projection : as `encode_prod` gave and took them
    scale   : factor of the logits (default head_dim ** -0.5)
    out     : [batch, q_heads, tokens] float32 (default: new)
    backend : reference or cpu (default); host memory only

    Source: TurboQuant, arXiv 2504.19874, Theorem 2.
    """
    arguments = Arguments("turboquant.logits_prod", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    first, sign, norm = _take_prod(arguments, encoded, rotation, projection)
    group = _check_heads(arguments, encoded.head_dim)
    scale = attention.check_scale(arguments, scale, encoded.head_dim)
    out = arguments.result("out", out, (*query.shape[:2], norm.shape[2]), "float32")
    backend = choose(backend, arguments, HOST_BACKENDS)
    if backend == "reference":
        _round_into(out, reference.logits_prod(query.numpy(), _prod_on_host(first, sign, norm, encoded.head_dim),
                                               rotation, projection, scale=scale))
    else:
        rotated = _rotated_query(query.numpy(), rotation, group) * np.float32(scale)
        cpu_turboquant.logits_prod(rotated, *_cpu_prod(first, sign, norm, projection),
                                   *_prod_codebook(first, rotation), out.numpy())
    return out.give()


# ---- validation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Codes:
    """An `Encoded` whose arrays were validated: planes by name, and the strides of sequences and heads in tokens."""

    planes: dict[str, Array]
    scale: Array
    head_dim: int
    bits: int
    strides: tuple[int, int]

    def numpy_planes(self) -> dict[str, np.ndarray]:
        return {name: plane.numpy() for name, plane in self.planes.items()}

    def on_host(self) -> Encoded:
        return Encoded(Planes.of(self.numpy_planes()), self.scale.numpy(), self.head_dim)

    def give(self) -> Encoded:
        return Encoded(Planes.of({name: plane.give() for name, plane in self.planes.items()}), self.scale.give(),
                       self.head_dim)

    def write(self, encoded: Encoded) -> None:
        for name, plane in encoded.planes.arrays().items():
            self.planes[name].numpy()[...] = plane
        self.scale.numpy()[...] = encoded.scale

    def arguments(self) -> tuple:
        """As kernels take them: five planes, scale, strides of sequences and heads."""
        return (*(self.planes.get(name) for name in PLANES), self.scale, *map(np.uint64, self.strides))


def _take_codes(arguments, name, encoded, rotation, rotation_name="rotation") -> _Codes:
    """The codes that an operator reads: [batch, kv_heads, tokens] vectors of the rotation."""
    if not isinstance(encoded, Encoded):
        raise TypeError(f"{arguments.operator}: {name}: expected an Encoded from turboquant.encode, "
                        f"got {type(encoded).__name__}")
    _check_rotation(arguments, rotation_name, rotation, encoded.head_dim)
    known = arguments.sizes.setdefault("head_dim", encoded.head_dim)
    arguments.require(encoded.head_dim == known, name, f"head_dim {known} as elsewhere", encoded.head_dim)
    return _take_arrays(arguments, name, encoded, rotation.head_dim)


def _result_codes(arguments, name, given, size, bits, inputs) -> _Codes:
    """The codes that an operator writes: the caller's, apart from the `inputs`, or new ones in its framework."""
    shape = tuple(arguments.sizes[n] for n in ("batch", "kv_heads", "tokens"))
    words = bit_planes.words(bits, size)
    if given is None:
        planes = {plane: arguments.result(f"{name}.{plane}", None, (*shape, count), "uint32")
                  for plane, count in words.items()}
        scale = arguments.result(f"{name}.scale", None, shape, "float16")
        return _Codes(planes, scale, arguments.sizes["head_dim"], bits, (shape[1] * shape[2], shape[2]))
    if not isinstance(given, Encoded):
        raise TypeError(f"{arguments.operator}: {name}: expected an Encoded, got {type(given).__name__}")
    arguments.require(given.head_dim == arguments.sizes["head_dim"], name,
                      f"head_dim {arguments.sizes['head_dim']} as in x", given.head_dim)
    arguments.require(given.bits == bits, name, f"the planes of {bits} bits", f"those of {given.bits}")
    codes = _take_arrays(arguments, name, given, size)
    others = {other: array for other, array in inputs.items() if array is not None}
    for part, array in (*codes.planes.items(), ("scale", codes.scale)):
        arguments.require(not array.readonly, f"{name}.{part}", "writable memory",
                          "a read-only array: pass a writable copy, or omit out and use what is returned")
        for other, taken in others.items():
            arguments.require(not array.overlaps(taken), f"{name}.{part}", f"memory apart from {other}",
                              "an array that overlaps it")
        others[f"{name}.{part}"] = array
    return codes


def _take_arrays(arguments, name, encoded, size) -> _Codes:
    """Planes and scale, [batch, kv_heads, tokens, ...], of one layout."""
    planes, layouts = {}, {}
    if not isinstance(encoded.planes, Planes):
        raise TypeError(f"{arguments.operator}: {name}.planes: expected Planes, got {type(encoded.planes).__name__}")
    for plane, array in encoded.planes.arrays().items():
        count = bit_planes.words(encoded.bits, size)[plane]
        planes[plane] = arguments.take(f"{name}.{plane}", array, f"batch kv_heads tokens {count}", ("uint32",),
                                       strided=True)
        layouts[plane] = _in_tokens(arguments, f"{name}.{plane}", planes[plane].strides[:3], count)
    scale = arguments.take(f"{name}.scale", encoded.scale, "batch kv_heads tokens", ("float16",), strided=True)
    strides = _in_tokens(arguments, f"{name}.scale", scale.strides, 1)
    for plane, layout in layouts.items():
        arguments.require(layout == strides, f"{name}.{plane}",
                          f"strides of {list(strides)} tokens over sequences and heads, as in {name}.scale",
                          list(layout))
    return _Codes(planes, scale, encoded.head_dim, encoded.bits, strides)


def _in_tokens(arguments, name, strides, row) -> tuple[int, int]:
    """Strides of sequences and heads, counted in tokens, of an array whose token is `row` elements long."""
    arguments.require(strides[2] == row and strides[0] % row == 0 and strides[1] % row == 0, name,
                      f"tokens that follow one another, {row} elements each, and strides in whole tokens",
                      f"strides {list(strides)}")
    return strides[0] // row, strides[1] // row


def _take_prod(arguments, encoded, rotation, projection):
    """(first code or None, residual_sign, residual_norm) of validated arrays."""
    if not isinstance(encoded, EncodedProd):
        raise TypeError(f"{arguments.operator}: encoded: expected an EncodedProd from turboquant.encode_prod, "
                        f"got {type(encoded).__name__}")
    first = None if encoded.first is None else _take_codes(arguments, "encoded.first", encoded.first, rotation)
    _check_rotation(arguments, "rotation", rotation, encoded.head_dim)
    _check_projection(arguments, projection, rotation)
    known = arguments.sizes.setdefault("head_dim", encoded.head_dim)
    arguments.require(encoded.head_dim == known, "encoded", f"head_dim {known} as elsewhere", encoded.head_dim)
    sign = arguments.take("encoded.residual_sign", encoded.residual_sign,
                          f"batch kv_heads tokens {rotation.head_dim // 32}", ("uint32",), strided=True)
    norm = arguments.take("encoded.residual_norm", encoded.residual_norm, "batch kv_heads tokens", ("float16",),
                          strided=True)
    _check_on_host(arguments)
    strides = _in_tokens(arguments, "encoded.residual_norm", norm.strides, 1)
    layouts = [_in_tokens(arguments, "encoded.residual_sign", sign.strides[:3], rotation.head_dim // 32)]
    layouts += [] if first is None else [first.strides]
    arguments.require(all(layout == strides for layout in layouts), "encoded",
                      f"strides of {list(strides)} tokens over sequences and heads for all arrays", layouts)
    return first, sign, norm


def _take_mean(arguments, name, mean):
    """[kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, or None."""
    mean = arguments.take(name, mean, "... head_dim", ("float32",), optional=True)
    if mean is not None:
        batch, kv_heads, head_dim = (arguments.sizes[n] for n in ("batch", "kv_heads", "head_dim"))
        arguments.require(mean.shape in ((kv_heads, head_dim), (batch, kv_heads, head_dim)), name,
                          f"[kv_heads, head_dim] = {[kv_heads, head_dim]} or [batch, kv_heads, head_dim] = "
                          f"{[batch, kv_heads, head_dim]}", list(mean.shape))
    return mean


def _check_rotation(arguments, name, rotation, head_dim):
    if not isinstance(rotation, Rotation):
        raise TypeError(f"{arguments.operator}: {name}: expected a Rotation from hadamard() or haar(), "
                        f"got {type(rotation).__name__}")
    arguments.require(rotation.head_dim % 32 == 0 and rotation.head_dim >= head_dim, name,
                      f"a size that is a multiple of 32 and at least head_dim = {head_dim}", rotation.head_dim)


def _check_projection(arguments, projection, rotation):
    if not isinstance(projection, Projection):
        raise TypeError(f"{arguments.operator}: projection: expected a Projection from gaussian_projection() or "
                        f"orthogonal_projection(), got {type(projection).__name__}")
    arguments.require(projection.head_dim == rotation.head_dim, "projection",
                      f"the size of the rotation, {rotation.head_dim}", projection.head_dim)


def _check_bits(arguments, bits):
    arguments.require(isinstance(bits, (int, np.integer)) and not isinstance(bits, bool) and bits in bit_planes.BITS,
                      "bits", "an integer from 1 to 8", repr(bits))


def _check_heads(arguments, head_dim) -> int:
    """Query heads per KV head."""
    q_heads, kv_heads = arguments.sizes["q_heads"], arguments.sizes["kv_heads"]
    arguments.require(kv_heads > 0 and q_heads % kv_heads == 0 and q_heads > 0, "query",
                      f"q_heads a positive multiple of kv_heads = {kv_heads}", q_heads)
    arguments.require(head_dim > 0, "query", "a positive head_dim", head_dim)
    return q_heads // kv_heads


def _check_cuda_size(arguments, name, head_dim, rotation, backend, rotation_name="rotation"):
    arguments.require(head_dim in CUDA_HEAD_DIMS, name, f"head_dim 64, 128 or 256 on backend {backend!r}", head_dim)
    arguments.require(rotation.head_dim == head_dim, rotation_name,
                      f"size {head_dim}, without padding, on backend {backend!r}", rotation.head_dim)


def _check_on_host(arguments):
    arguments.require(arguments.device.kind == "cpu", "backend",
                      f"arrays in host memory: {', '.join(HOST_BACKENDS)} are what implements this operator",
                      f"arrays on {arguments.device}: copy them to the host")


def _check_finite(arguments, x):
    finite = np.isfinite(x.to_host()).all(axis=-1)
    arguments.require(bool(finite.all()), "x", "finite numbers",
                      f"NaN or Inf in {int((~finite).sum())} vectors, the first at [batch, kv_head, token] = "
                      f"{np.argwhere(~finite)[:1].tolist()}")


def _check_host_mean(arguments, mean, name="mean"):
    arguments.require(mean is None or bool(np.isfinite(mean.numpy()).all()), name, "finite numbers", "NaN or Inf")


# ---- cpu -------------------------------------------------------------------------------------------------------------


def _host(array):
    return None if array is None else array.numpy()


def _round_into(out: Array, exact: np.ndarray) -> None:
    with np.errstate(over="ignore"):   # beyond the largest float16 is infinity, as on every backend
        out.numpy()[...] = exact.astype(out.numpy().dtype)


def _cpu_signs(rotation):
    """(signs, remaining scale) of a Hadamard rotation, as cpu functions take them; those of a dense one get None."""
    return rotation_operator.scaled_signs(rotation) if rotation.kind == "hadamard" else (None, None)


def _cpu_matrix(rotation, inverse):
    return rotation_operator._matrix(rotation, inverse) if rotation.kind == "haar" else None


def _rotated_query(query: np.ndarray, rotation: Rotation, group: int) -> np.ndarray:
    """R q of the padded queries, [batch, kv_heads, group, rotation size] float32."""
    batch, q_heads, head_dim = query.shape
    padded = np.zeros((batch, q_heads, rotation.head_dim), np.float32)
    padded[..., :head_dim] = query
    rotated = rotation_operator.rotate(padded, rotation, out=padded, backend="cpu")
    return rotated.reshape(batch, q_heads // group, group, rotation.head_dim)


def _attend_on_cpu(query, keys, values, key_rotation, value_rotation, lengths, scale, key_mean, out, lse):
    batch, q_heads, head_dim = query.shape
    kv_heads = keys.scale.shape[1]
    rotated = np.empty((batch, q_heads, value_rotation.head_dim), np.float32)
    log_sums = np.empty((batch, q_heads), np.float32)
    cpu_turboquant.decode_attention(
        _rotated_query(query, key_rotation, q_heads // kv_heads) * np.float32(scale),
        keys.numpy_planes(), keys.scale.numpy(), codebook_for(keys.bits, key_rotation.head_dim).centroids,
        values.numpy_planes(), values.scale.numpy(), codebook_for(values.bits, value_rotation.head_dim).centroids,
        lengths, rotated, log_sums)
    rotation_operator.rotate(rotated, value_rotation, inverse=True, out=rotated, backend="cpu")
    with np.errstate(over="ignore"):
        out[...] = rotated[..., :head_dim].astype(out.dtype)
    if lse is None:
        return
    if key_mean is not None:
        grouped = query.astype(np.float32).reshape(batch, kv_heads, -1, head_dim)
        log_sums += np.float32(scale) * (grouped * key_mean[..., None, :]).sum(axis=-1).reshape(batch, q_heads)
    lse[...] = log_sums


def _prod_on_host(first, sign, norm, head_dim) -> EncodedProd:
    return EncodedProd(None if first is None else first.on_host(), sign.numpy(), norm.numpy(), head_dim)


def _cpu_prod(first, sign, norm, projection) -> tuple:
    """The code and its projection as cpu functions take them: planes and scale of the first stage, then the rest."""
    own = (None, None) if first is None else (first.numpy_planes(), first.scale.numpy())
    return (*own, sign.numpy(), norm.numpy(), projection.matrix, projection.unbiasing)


def _prod_codebook(first, rotation) -> tuple:
    """(centroids of the first stage or None, bits with the residual's)"""
    return (None, 1) if first is None else (codebook_for(first.bits, rotation.head_dim).centroids, first.bits + 1)


# ---- CUDA ------------------------------------------------------------------------------------------------------------

# Blocks, of one warp each, that share a multiprocessor: kEncodeBlocks and kDecodeBlocks of cuda_src/turboquant.cu.
ENCODE_BLOCKS, DECODE_BLOCKS = {64: 12, 128: 12, 256: 8}, {64: 12, 128: 8, 256: 8}
QUERY_TYPE = {"float32": 0, "float16": 1, "bfloat16": 2}


def _launch_encode(x, rotation, codes, scale_mode, mean, backend, arguments):
    factors = None
    if rotation.kind == "haar":
        x, factors = _prepared(x, mean, backend, arguments)
        x = rotation_operator.rotate(x, rotation, out=x, backend=backend, stream=arguments.stream)
        mean = None
    batch, kv_heads, tokens, head_dim = x.shape
    function = loaders.get_function("turboquant", f"kvb::turboquant_encode_kernel<{CXX_TYPE[x.dtype]}, {head_dim}>",
                                    backend, x.device)
    function(*_row_blocks(x.shape, ENCODE_BLOCKS, backend, x.device), (
        x, *map(np.uint64, x.strides[:3]), *_device_rotation(rotation, x.device), mean, _mean_stride(mean), factors,
        _codebook_on_device(codes.bits, x.device), np.int32(codes.bits), np.int32(SCALE_MODES.index(scale_mode)),
        *codes.arguments(), np.int32(kv_heads), np.int32(tokens), np.uint32(batch * kv_heads * tokens)),
        shared_bytes=_tile_bytes(head_dim, x.itemsize), stream=arguments.stream)


def _launch_decode(codes, rotation, out, backend, arguments):
    batch, kv_heads, tokens, head_dim = out.shape
    target = out
    if rotation.kind == "haar":
        target = empty(out.shape, "float32", out.device, out.framework, stream=arguments.stream)
    function = loaders.get_function(
        "turboquant", f"kvb::turboquant_decode_kernel<{CXX_TYPE[target.dtype]}, {head_dim}>", backend, out.device)
    function(*_row_blocks(out.shape, DECODE_BLOCKS, backend, out.device), (
        *codes.arguments(), _codebook_on_device(codes.bits, out.device), np.int32(codes.bits),
        *_device_rotation(rotation, out.device), target, np.int32(kv_heads), np.int32(tokens),
        np.uint32(batch * kv_heads * tokens)), shared_bytes=_tile_bytes(head_dim, target.itemsize),
        stream=arguments.stream)
    if target is not out:
        _rotate_back(target, rotation, out, backend, arguments)


def _launch_logits(query, codes, rotation, scale, out, backend, arguments):
    batch, kv_heads, tokens = codes.scale.shape
    group, head_dim, device = query.shape[1] // kv_heads, query.shape[2], query.device
    if rotation.kind == "haar":
        query = _rotated_on_device(query, rotation, backend, arguments)
    blocks = min(-(-tokens // 256), max(1, 8 * loaders.multiprocessors(backend, device) // (batch * kv_heads)))
    function = loaders.get_function("turboquant", f"kvb::turboquant_logits_kernel<{head_dim}>", backend, device)
    function((blocks, kv_heads, batch), (256,), (
        query, np.int32(QUERY_TYPE[query.dtype]), *codes.arguments(), _codebook_on_device(codes.bits, device),
        np.int32(codes.bits), *_device_rotation(rotation, device), np.float32(scale), out, np.int32(tokens),
        np.int32(group)), stream=arguments.stream)


def _launch_attention(query, keys, values, key_rotation, value_rotation, lengths, scale, key_mean, splits, out, lse,
                      workspace, backend, arguments):
    batch, kv_heads, tokens = keys.scale.shape
    head_dim, device = query.shape[2], query.device
    group = query.shape[1] // kv_heads
    heads = 8 if group <= 8 or head_dim == 256 else 16
    parts = -(-group // heads)
    if splits is None:
        splits = attention.choose_splits(-(-tokens // 32), batch * kv_heads * parts, 8,
                                         loaders.multiprocessors(backend, device))
    scratch = attention.take_workspace(arguments, workspace, splits, device, out.framework)
    rotated = query if key_rotation.kind == "hadamard" else _rotated_on_device(query, key_rotation, backend, arguments)
    # The mean is multiplied with the query that was not rotated.
    if key_mean is not None and rotated is not query:
        key_mean = _rotated_on_device(key_mean, key_rotation, backend, arguments)
    target = out
    if value_rotation.kind == "haar":
        target = empty(out.shape, "float32", device, out.framework, stream=arguments.stream)
    function = loaders.get_function(
        "turboquant", f"kvb::turboquant_attention_kernel<{head_dim}, {heads}, {keys.bits}, {values.bits}>", backend,
        device)
    function((splits, kv_heads * parts, batch), (256,), (
        rotated, np.int32(QUERY_TYPE[rotated.dtype]), *_attention_side(keys), *_attention_side(values),
        *_device_rotation(key_rotation, device), *_device_rotation(value_rotation, device), *key_table(keys.bits),
        *value_table(values.bits), key_mean, _mean_stride(key_mean), lengths, target,
        np.int32(QUERY_TYPE[target.dtype]), lse, scratch.partial_output, scratch.partial_statistics, scratch.tickets,
        np.int32(tokens), np.int32(group), np.float32(scale * math.log2(math.e))),
        shared_bytes=_attention_shared_bytes(head_dim, heads, keys.bits, values.bits),
        stream=arguments.stream)
    if target is not out:
        _rotate_back(target, value_rotation, out, backend, arguments)


def _attention_shared_bytes(head_dim: int, heads: int, key_bits: int, value_bits: int) -> int:
    """Dynamic shared memory of turboquant_attention_kernel: what it holds of the query, the signs of both rotations,
    and the warps' rings of tiles.  The end of the kernel (kvb/splits.cuh) uses the rings again, and needs the rotated
    rows besides."""
    warps, ring, tile, most_rounds = 8, 3, 32, 8
    rings = warps * ring * tile * (head_dim // 8 * (key_bits + value_bits) + 4)
    end = attention.split_shared_bytes(warps, heads, head_dim, 32 * warps) + heads * head_dim * 4
    return 12 * heads + head_dim // 32 * (heads // 8) * 512 + 2 * most_rounds * head_dim * 4 + max(rings, end)


def _attention_side(codes: _Codes) -> tuple:
    """Keys or values as the attention kernel takes them, which knows at most one mag2 plane."""
    return (codes.planes["sign"], codes.planes.get("mag2_0"), codes.planes.get("mag1"), codes.scale,
            *map(np.uint64, codes.strides))


def _code_tile(head_dim) -> tuple[int, int]:
    """(rows that a warp takes at a time, lanes that share a row) in the encode and decode kernels."""
    lanes = max(head_dim // 128, 1)
    return 32 // lanes, lanes


def _row_blocks(shape, blocks, backend, device):
    """(grid, block) of the encode and decode kernels for vectors of that shape."""
    tiles = -(-math.prod(shape[:-1]) // _code_tile(shape[-1])[0])
    return (min(tiles, blocks[shape[-1]] * loaders.multiprocessors(backend, device)),), (32,)


def _tile_bytes(head_dim, itemsize):
    """Dynamic shared memory of the encode and decode kernels: a tile of padded rows."""
    rows, lanes = _code_tile(head_dim)
    return rows * (head_dim * itemsize + 16 * lanes)


def _device_rotation(rotation, device) -> tuple:
    """(signs, rounds, remaining scale) as kernels take them; rounds 0, nothing to rotate, for a dense rotation."""
    if rotation.kind == "haar":
        return None, np.int32(0), np.float32(1)
    return (rotation_operator._on_device(rotation, False, device), np.int32(rotation.rounds),
            np.float32(rotation_operator.scaled_signs(rotation)[1]))


def _mean_stride(mean):
    """Elements from one sequence's mean to the next: 0 if all share one."""
    return np.uint64(0 if mean is None or len(mean.shape) == 2 else mean.strides[0])


def _prepared(x, mean, backend, arguments) -> tuple[Array, Array]:
    """(x - mean times a power of two per vector, [batch, kv_heads, tokens, head_dim] float32; what undoes it, per
    vector): what a dense rotation takes without overflow."""
    batch, kv_heads, tokens, head_dim = x.shape
    prepared = empty(x.shape, "float32", x.device, x.framework, stream=arguments.stream)
    factors = empty(x.shape[:3], "float32", x.device, x.framework, stream=arguments.stream)
    function = loaders.get_function("turboquant", f"kvb::turboquant_prepare_kernel<{CXX_TYPE[x.dtype]}>", backend,
                                    x.device)
    rows = batch * kv_heads * tokens
    function((min(-(-rows // 8), 8 * loaders.multiprocessors(backend, x.device)),), (256,), (
        x, *map(np.uint64, x.strides[:3]), mean, _mean_stride(mean), prepared, factors, np.int32(kv_heads),
        np.int32(tokens), np.int32(head_dim), np.uint32(rows)), stream=arguments.stream)
    return prepared, factors


def _rotated_on_device(x, rotation, backend, arguments) -> Array:
    """R x in float32, for a dense rotation."""
    rotated = empty(x.shape, "float32", x.device, x.framework, stream=arguments.stream)
    _convert(x, rotated, backend, arguments)
    return _rotate(rotated, rotation, False, backend, arguments)


def _rotate_back(rotated, rotation, out, backend, arguments) -> None:
    """out = R^T rotated, for a dense rotation; `rotated` is overwritten."""
    _convert(_rotate(rotated, rotation, True, backend, arguments), out, backend, arguments)


def _rotate(x, rotation, inverse, backend, arguments) -> Array:
    rotation_operator.rotate(x, rotation, inverse=inverse, out=x, backend=backend, stream=arguments.stream)
    return x


def _convert(x, out, backend, arguments) -> None:
    name = f"kvb::turboquant_convert_kernel<{CXX_TYPE[x.dtype]}, {CXX_TYPE[out.dtype]}>"
    function = loaders.get_function("turboquant", name, backend, x.device)
    function((min(-(-x.size // 256), 8 * loaders.multiprocessors(backend, x.device)),), (256,),
             (x, out, np.uint64(x.size)), stream=arguments.stream)


@functools.lru_cache(maxsize=64)
def _codebook_on_device(bits: int, device: Device) -> Array:
    """[2, 128] float32: boundaries, then magnitudes, of the normal codebook.  Unused entries are never reached."""
    codebook = codebook_for(bits, CUDA_HEAD_DIMS[0])
    table = np.zeros((2, 128), np.float32)
    table[0, : len(codebook.boundaries)] = codebook.boundaries
    table[1, : len(codebook.centroids)] = codebook.centroids
    return upload(table, device)


# ---- tables of the attention kernel ----------------------------------------------------------------------------------


@functools.cache
def key_centroids(bits: int) -> tuple[np.ndarray, float]:
    """(whole numbers T [2^(bits-1)] from 0 to 127, to 255 for 4 bits, unit): c_m is about unit * (T_m + 1/2).

    So the negative of a centroid is the complement of its number.  The pair with the least mean squared error over the
    normal law, found by trying units.
    """
    if bits not in CUDA_ATTENTION_BITS:
        raise ValueError(f"key_centroids: bits: expected 1 to 4, got {bits!r}")
    codebook, largest = codebook_for(bits, CUDA_HEAD_DIMS[0]), 255 if bits == 4 else 127
    c = codebook.centroids
    if bits == 1:
        return np.array([64]), float(c[0] / 64.5)
    weights = -np.diff(special.ndtr(-np.concatenate([[0.0], codebook.boundaries, [np.inf]])))
    units = np.linspace(c[-1] / largest, 3 * c[-1] / largest, 20001)[:, None]
    points = np.clip(np.floor(c / units), 0, largest) + 0.5
    units = (weights * c * points).sum(axis=1) / (weights * points**2).sum(axis=1)
    best = int(np.argmin((weights * (c - units[:, None] * points) ** 2).sum(axis=1)))
    return points[best].astype(int), float(units[best])


@functools.cache
def key_table(bits: int) -> tuple[np.uint32, np.uint32, np.float32]:
    """(entries 0-3, entries 4-7, unit) of the table of keys, in bytes: entry 4 sigma + m, or m alone for 4 bits."""
    numbers, unit = key_centroids(bits)
    table = np.zeros(8, np.uint8)
    table[: len(numbers)] = numbers
    if bits < 4:
        table[4 : 4 + len(numbers)] = ~numbers
    return *table.view(np.uint32), np.float32(unit)


@functools.cache
def value_table(bits: int) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    """float16 centroids of values: the high bytes of entries 0-3 and 4-7, then the low bytes; entries as for keys."""
    centroids = codebook_for(bits, CUDA_HEAD_DIMS[0]).centroids.astype(np.float16)
    table = np.zeros(8, np.float16)
    table[: len(centroids)] = centroids
    if bits < 4:
        table[4 : 4 + len(centroids)] = -centroids
    table = table.view(np.uint8).reshape(8, 2)
    return *table[:, 1].copy().view(np.uint32), *table[:, 0].copy().view(np.uint32)


# ---- registry --------------------------------------------------------------------------------------------------------

_SIZES = {"tokens": (32768, 4096, 131072, 1), "head_dim": (128, 64, 256), "kv_heads": (8, 2, 32)}
_CODE_BITS, _DTYPES = (3, 2, 4, 1), ("float16", "bfloat16", "float32")
ENCODE_AXES = {**_SIZES, "batch": (1, 16), "bits": _CODE_BITS, "dtype": _DTYPES}
LOGITS_AXES = {**_SIZES, "group": (4, 8, 1), "batch": (1, 16), "bits": _CODE_BITS, "dtype": _DTYPES}
ATTENTION_AXES = {**_SIZES, "group": (4, 8, 1), "batch": (1, 16), "key_bits": _CODE_BITS, "value_bits": _CODE_BITS,
                  "dtype": _DTYPES}


def _vectors(problem):
    return problem["batch"] * problem["kv_heads"] * problem["tokens"]


def _size(problem):
    return 4 if problem["dtype"] == "float32" else 2


def _code_bytes(problem, bits):
    return _vectors(problem) * (problem["head_dim"] * bits // 8 + 2)


def _rotation(problem, rng):
    return hadamard(problem["head_dim"], int(rng.integers(2**31)))


def _random_tokens(problem, rng):
    shape = (problem["batch"], problem["kv_heads"], problem["tokens"], problem["head_dim"])
    return random_normal(rng, shape, problem["dtype"])


def _random_query(problem, rng):
    shape = (problem["batch"], problem["kv_heads"] * problem["group"], problem["head_dim"])
    return random_normal(rng, shape, problem["dtype"])


def _random_codes(problem, rng, bits):
    """Any codes, with scales near 1, as those of normal numbers have: no kernel's time depends on the codes."""
    shape = (problem["batch"], problem["kv_heads"], problem["tokens"])
    planes = {name: rng.integers(0, 2**32, (*shape, count), dtype=np.uint32)
              for name, count in bit_planes.words(bits, problem["head_dim"]).items()}
    return Encoded(Planes.of(planes), (1 + random_normal(rng, shape, "float32") / 16).astype(np.float16),
                   problem["head_dim"])


def _encode_inputs(problem, rng):
    return {"x": _random_tokens(problem, rng), "rotation": _rotation(problem, rng), "bits": problem["bits"]}


def _encode_traffic(problem):
    return Traffic(_vectors(problem) * problem["head_dim"] * _size(problem), _code_bytes(problem, problem["bits"]))


def _decode_inputs(problem, rng):
    return {"encoded": _random_codes(problem, rng, problem["bits"]), "rotation": _rotation(problem, rng),
            "dtype": problem["dtype"]}


def _decode_traffic(problem):
    return Traffic(_code_bytes(problem, problem["bits"]), _vectors(problem) * problem["head_dim"] * _size(problem))


def _decode_reference(encoded, rotation, *, dtype="float16"):
    """`reference.decode`; float64 whatever the dtype."""
    return reference.decode(encoded, rotation)


def _logits_inputs(problem, rng):
    return {"query": _random_query(problem, rng), "encoded": _random_codes(problem, rng, problem["bits"]),
            "rotation": _rotation(problem, rng)}


def _query_bytes(problem):
    return problem["batch"] * problem["kv_heads"] * problem["group"] * problem["head_dim"] * _size(problem)


def _logits_traffic(problem):
    return Traffic(_query_bytes(problem) + _code_bytes(problem, problem["bits"]),
                   _vectors(problem) * problem["group"] * 4)


def _attention_inputs(problem, rng):
    return {"query": _random_query(problem, rng), "keys": _random_codes(problem, rng, problem["key_bits"]),
            "values": _random_codes(problem, rng, problem["value_bits"]), "key_rotation": _rotation(problem, rng),
            "value_rotation": _rotation(problem, rng), "return_lse": True}


def _attention_traffic(problem):
    rows = problem["batch"] * problem["kv_heads"] * problem["group"]
    codes = _code_bytes(problem, problem["key_bits"]) + _code_bytes(problem, problem["value_bits"])
    return Traffic(codes + _query_bytes(problem), _query_bytes(problem) + rows * 4)


def _encode_prod_inputs(problem, rng):
    projection = orthogonal_projection(problem["head_dim"], int(rng.integers(2**31)))
    return {"x": _random_tokens(problem, rng), "rotation": _rotation(problem, rng), "projection": projection,
            "bits": problem["bits"]}


def _encode_prod_traffic(problem):
    reads = _vectors(problem) * problem["head_dim"] * _size(problem)
    return Traffic(reads, _code_bytes(problem, problem["bits"]) + _vectors(problem) * (2 if problem["bits"] > 1 else 0))


def _logits_prod_inputs(problem, rng):
    projection = orthogonal_projection(problem["head_dim"], int(rng.integers(2**31)))
    residual = _random_codes(problem, rng, 1)
    first = _random_codes(problem, rng, problem["bits"] - 1) if problem["bits"] > 1 else None
    encoded = EncodedProd(first, residual.planes.sign, residual.scale, problem["head_dim"])
    return {"query": _random_query(problem, rng), "encoded": encoded, "rotation": _rotation(problem, rng),
            "projection": projection}


def _logits_prod_traffic(problem):
    plain = _logits_traffic(problem)
    return Traffic(plain.bytes_read + _vectors(problem) * (2 if problem["bits"] > 1 else 0), plain.bytes_written)


# Agreement.  The rotation of a vector in float32 is off by at most `_rotation_error` times its norm (see
# ops/rotation.py); sums of n terms, one after another, by n EPSILON / 2 times the sum of their absolute values.

# The coordinates of a vector below this norm may be float32 subnormals, which GPUs may count as zero: its scale rounds
# to 0 in float16, and what its codes are does not matter.
NEGLIGIBLE_NORM = 2.0**-100


def _rotation_error(rotation):
    levels = rotation.rounds * math.log2(rotation.head_dim) if rotation.kind == "hadamard" else rotation.head_dim
    return (levels + 2) * EPSILON["float32"] / 2


def _centroids(planes, size, bits):
    return codebook_for(bits, size).reconstruct(*bit_planes.unpack(planes, size))


def _cells(planes, size):
    """Number of each coordinate's cell, from the most negative one on: neighbouring cells differ by 1."""
    signs, magnitudes = bit_planes.unpack(planes, size)
    return np.where(signs != 0, -1 - magnitudes.astype(int), magnitudes)


def _centred(x, mean):
    """x - mean in float64."""
    x = np.asarray(x).astype(np.float64)
    return x if mean is None else x - np.asarray(mean).astype(np.float64)[..., None, :]


def _rotated(x, rotation):
    """R x of the padded vectors; zeros for those that hold NaN or Inf."""
    finite = np.isfinite(x).all(axis=-1)
    padding = [(0, 0)] * 3 + [(0, rotation.head_dim - x.shape[-1])]
    return reference.rotate(np.pad(np.where(finite[..., None], x, 0.0), padding), rotation)


def _assert_same_codes(inputs, bits, expected, actual, scale_mode):
    """Returns which tokens have the same codes.

    A code may be one cell off where its coordinate is within ROUNDING_DISTANCE of a decision.  The scale is that of the
    codes that are there, computed in float32: the norm and the sums over codes have D terms, relative to which all are
    positive (but for coordinates next to 0, which weigh nothing).
    """
    x, rotation, mean = inputs["x"], inputs["rotation"], inputs.get("mean")
    size, centred = rotation.head_dim, _centred(x, mean)
    if actual.head_dim != expected.head_dim or actual.planes.arrays().keys() != expected.planes.arrays().keys():
        raise AssertionError(f"codes: expected {expected.bits} bits and head_dim {expected.head_dim}, "
                             f"got {actual.bits} and {actual.head_dim}")
    finite = np.isfinite(centred).all(axis=-1)
    norm = np.where(finite, np.linalg.norm(np.where(finite[..., None], centred, 0), axis=-1), 0)
    negligible = (norm > 0) & (norm < NEGLIGIBLE_NORM)
    off = np.abs(_cells(actual.planes, size) - _cells(expected.planes, size))
    allowed = reference.boundary_distance(x, rotation, bits, mean=mean) <= reference.ROUNDING_DISTANCE
    wrong = (off > allowed) & ~negligible[..., None]
    if wrong.any():
        raise AssertionError(f"codes: {int(wrong.sum())} of {wrong.size} differ by more than rounding allows, the "
                             f"first at [batch, kv_head, token, coordinate] = {np.argwhere(wrong)[0].tolist()}")

    y, c = _rotated(centred, rotation), _centroids(actual.planes, size, bits)
    n = np.linalg.norm(y, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        w = (y * c).mean(axis=-1) * size**0.5 / n
        e = (c * c).mean(axis=-1)
        s = n * size**-0.5 * {"plain": 1.0, "nc": e**-0.5, "mse": w / e, "unbiased": 1 / w}[scale_mode]
    s = np.where(finite, np.minimum(np.where((n == 0) | negligible, 0.0, s), reference.LARGEST_SCALE), np.nan)
    relative = 2 * _rotation_error(rotation) + (2 * size + 16) * EPSILON["float32"] / 2
    assert_close(s, actual.scale, "float16", relative * s + negligible * 2.0**-90, "scale")
    return (off == 0).all(axis=-1)


def _encode_agreement(inputs, expected, actual):
    _assert_same_codes(inputs, inputs["bits"], expected, actual, inputs.get("scale_mode", "nc"))


def _encode_prod_agreement(inputs, expected, actual):
    """Another code is another residual, whose signs are then not looked at; |residual| is off by no more than the
    rotated vector, up to its rounding."""
    x, rotation, projection, bits = (inputs[name] for name in ("x", "rotation", "projection", "bits"))
    mean, size = inputs.get("mean"), rotation.head_dim
    centred = _centred(x, mean)
    finite, y = np.isfinite(centred).all(axis=-1), _rotated(centred, rotation)
    norm = np.linalg.norm(y, axis=-1)
    same = np.ones(y.shape[:-1], bool)
    residual = y
    if bits > 1:
        same = _assert_same_codes(inputs, bits - 1, expected.first, actual.first, "plain")
        residual = y - (norm * size**-0.5)[..., None] * _centroids(actual.first.planes, size, bits - 1)
    distance = reference.residual_distance(x, rotation, projection, bits, mean=mean)
    differs = (bit_planes.unpack_bits(np.asarray(actual.residual_sign), size)
               != bit_planes.unpack_bits(expected.residual_sign, size))
    wrong = differs & (distance > reference.ROUNDING_DISTANCE) & same[..., None]
    if wrong.any():
        raise AssertionError(f"residual signs: {int(wrong.sum())} of {wrong.size} differ by more than rounding allows, "
                             f"the first at [batch, kv_head, token, coordinate] = {np.argwhere(wrong)[0].tolist()}")
    length = np.where(finite, np.minimum(np.linalg.norm(residual, axis=-1), reference.LARGEST_SCALE), np.nan)
    relative = 2 * _rotation_error(rotation) + (2 * size + 16) * EPSILON["float32"] / 2
    assert_close(length, actual.residual_norm, "float16", relative * norm, "residual norm")


def _decode_agreement(inputs, expected, actual):
    """The rotation's error, and one rounding each of the centroid, the product with s and the remaining scale."""
    encoded, rotation = inputs["encoded"], inputs["rotation"]
    size = rotation.head_dim
    norm = np.linalg.norm(_centroids(encoded.planes, size, encoded.bits), axis=-1) * encoded.scale.astype(np.float64)
    relative = _rotation_error(rotation) + 3 * EPSILON["float32"] / 2
    allowance = relative * norm + size * SMALLEST_NORMAL
    assert_close(expected, actual, inputs.get("dtype", "float16"), allowance[..., None], "decoded")


def _logits_allowance(query, scale, rotation, products, scales):
    """Of the logits [batch, q_heads, tokens] of one side: products(rows [batch, kv_heads, group, D]) gives, of vectors
    v_t, (sum_j |row_j v_tj|, |v_t|) before their scales, [batch, kv_heads, tokens]."""
    query = np.asarray(query).astype(np.float64)
    batch, kv_heads, tokens = scales.shape
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    padded = np.pad(scale * query, [(0, 0), (0, 0), (0, rotation.head_dim - query.shape[-1])])
    rows = reference.rotate(padded, rotation).reshape(batch, kv_heads, -1, rotation.head_dim)
    absolute, norms = products(np.abs(rows))
    length = np.linalg.norm(rows, axis=-1)[..., None]
    error = _rotation_error(rotation) * length * norms[:, :, None]
    error += (rotation.head_dim + 8) * EPSILON["float32"] / 2 * absolute
    return (error * np.abs(scales.astype(np.float64))[:, :, None]).reshape(batch, query.shape[1], tokens)


def _logits_agreement(inputs, expected, actual):
    """An error of the rotated query, |dq| |c|, and that of a sum of D products."""
    encoded, rotation = inputs["encoded"], inputs["rotation"]
    c = np.abs(_centroids(encoded.planes, rotation.head_dim, encoded.bits))
    allowance = _logits_allowance(
        inputs["query"], inputs.get("scale"), rotation,
        lambda rows: (rows @ np.swapaxes(c, -1, -2), np.linalg.norm(c, axis=-1)), encoded.scale)
    assert_close(expected, actual, "float32", allowance + rotation.head_dim * SMALLEST_NORMAL, "logits")


def _logits_prod_agreement(inputs, expected, actual):
    """As for `logits`, with the vectors s c and k |r| S^T h; S has norm `length` at most, and its product D terms."""
    encoded, rotation, projection = inputs["encoded"], inputs["rotation"], inputs["projection"]
    size, tokens = rotation.head_dim, encoded.residual_norm.shape
    first = np.zeros((*tokens, size))
    if encoded.first is not None:
        first = np.abs(_centroids(encoded.first.planes, size, encoded.first.bits)
                       * encoded.first.scale[..., None].astype(np.float64))
    factor = projection.unbiasing * encoded.residual_norm.astype(np.float64)
    columns = np.abs(projection.matrix).sum(axis=0)                     # of S^T h, whatever the signs
    length = np.linalg.norm(projection.matrix, 2) * size**0.5

    def products(rows):
        absolute = rows @ np.swapaxes(first, -1, -2) + (rows @ columns)[..., None] * factor[:, :, None]
        return 2 * absolute, np.linalg.norm(first, axis=-1) + length * factor

    allowance = _logits_allowance(inputs["query"], inputs.get("scale"), rotation, products, np.ones(tokens))
    assert_close(expected, actual, "float32", allowance + size * SMALLEST_NORMAL, "logits")


def attention_tolerance(query, keys: Encoded, values: Encoded, key_rotation, value_rotation, lengths=None, scale=None,
                        key_mean=None) -> tuple[np.ndarray, np.ndarray]:
    """(output allowance [batch, q_heads, head_dim], lse allowance [batch, q_heads]) of decode attention on codes.

    A logit, s <q', c> with q' = scale R q, is off by at most delta, which is s times the sum of

        |<q', T - c>|                      `key_centroids` T in place of c: this is known, not estimated
        |q'|_max / 16256 / 2 sum |T|       q' rounded to whole multiples of |q'|_max / 16256
        float32 errors                     those of `logits`

    (cpu has the last one alone).  So a weight p_t is off by a factor within e^(+-delta_t), and the output by
    sum_t p_t (e^delta_t - 1) |v_t - output| e^(max delta).  To this add, in the order of the code below: weights p s
    rounded to float16, relative to sum_t p_t |v_t|; those below its normal range, to 2^-33 of the largest; float16
    centroids of values; float32 sums over tokens, as in `attention.decode_tolerance`; the rotation back.  What is
    estimated in rotated coordinates bounds every coordinate by its norm.
    """
    query = np.asarray(query).astype(np.float64)
    batch, q_heads, head_dim = query.shape
    kv_heads, tokens = keys.scale.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    key_size, value_size = key_rotation.head_dim, value_rotation.head_dim
    padded = np.pad(query, [(0, 0), (0, 0), (0, key_size - head_dim)])
    rows = reference.rotate(scale * padded, key_rotation).reshape(batch, kv_heads, -1, key_size)
    lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    eps = EPSILON["float32"] / 2
    output, lse = np.zeros((*rows.shape[:3], head_dim)), np.zeros(rows.shape[:3])
    for b in range(batch):
        n = int(lengths[b])
        arithmetic = (8 + math.log2(n + 1) + min(n, 1024) + n / 16) * eps
        for g in range(kv_heads if n else 0):
            q = rows[b, g]
            c, s = _tokens_of(keys, key_size, b, g, n)
            products = q @ c.T
            error = _rotation_error(key_rotation) * np.linalg.norm(q, axis=-1)[:, None] * np.linalg.norm(c, axis=-1)
            error += (key_size + 8) * eps * (np.abs(q) @ np.abs(c).T)
            if keys.bits in CUDA_ATTENTION_BITS:
                numbers, unit = key_centroids(keys.bits)
                stored = unit * (numbers + 0.5)
                table = np.sign(c) * stored[np.searchsorted(codebook_for(keys.bits, key_size).boundaries, np.abs(c))]
                rounding = np.abs(q).max(axis=-1, keepdims=True) / 16256 / 2
                error += np.abs(q @ table.T - products) + rounding * np.abs(table).sum(axis=-1)
            delta, base = np.abs(s) * error, s * products
            largest = base.max(axis=-1, keepdims=True)
            p = np.exp(base - largest)
            p /= p.sum(axis=-1, keepdims=True)
            change = p * np.expm1(delta)
            c, s = _tokens_of(values, value_size, b, g, n)
            v = reference.rotate(s[:, None] * c, value_rotation, inverse=True)[:, :head_dim]
            for h in range(len(q)):
                allowance = change[h] @ np.abs(v - p[h] @ v) * np.exp(delta[h].max())
                allowance += 2.0**-11 * (p[h] @ np.abs(v))
                weights = p[h] * s
                tiny = 2.0**-33 * (p[h] * (np.abs(s) + 2.0**-20)).max() + SMALLEST_NORMAL * (1 + np.abs(s).max())
                allowance += tiny * np.linalg.norm(np.abs(c).sum(axis=0))
                allowance += np.linalg.norm(weights @ (c.astype(np.float16) - c)) * np.exp(delta[h].max())
                allowance += 2 * arithmetic * np.linalg.norm(np.abs(weights) @ np.abs(c))
                allowance += _rotation_error(value_rotation) * np.linalg.norm(weights @ c) + 2 * SMALLEST_NORMAL
                output[b, g, h] = allowance
            lse[b, g] = change.sum(axis=-1) + arithmetic + 16 * 2 * eps * (
                np.abs(base).max(axis=-1) + math.log(n + 1) + 1)
    if key_mean is not None:
        mean = np.broadcast_to(np.asarray(key_mean).astype(np.float64), (batch, kv_heads, head_dim))
        grouped = np.abs(query).reshape(batch, kv_heads, -1, head_dim)
        lse += (head_dim + 8) * eps * abs(scale) * np.einsum("bghd,bgd->bgh", grouped, np.abs(mean))
    return output.reshape(batch, q_heads, head_dim), lse.reshape(batch, q_heads)


def _tokens_of(encoded, size, b, g, n):
    """(c [n, size], s [n]) float64 of the first n tokens of one head."""
    planes = Planes.of({name: plane[b, g, :n] for name, plane in encoded.planes.arrays().items()})
    return _centroids(planes, size, encoded.bits), encoded.scale[b, g, :n].astype(np.float64)


def _attention_agreement(inputs, expected, actual):
    with np.errstate(invalid="ignore", over="ignore"):
        output, lse = attention_tolerance(**{name: inputs.get(name) for name in (
            "query", "keys", "values", "key_rotation", "value_rotation", "lengths", "scale", "key_mean")})
    assert_close(expected[0], actual[0], np.asarray(actual[0]).dtype.name, output, "output")
    assert_close(expected[1], actual[1], "float32", lse, "log-sum-exp")


def _decoded_error(inputs, expected, actual):
    rotation = inputs["rotation"]
    return relative_error(reference.decode(expected, rotation), reference.decode(actual, rotation))


def _decoded_prod_error(inputs, expected, actual):
    how = inputs["rotation"], inputs["projection"]
    return relative_error(reference.decode_prod(expected, *how), reference.decode_prod(actual, *how))


SOURCE = "arXiv 2504.19874 Algorithm 1"
register(Kernel(
    name="turboquant.encode", reference=reference.encode, operator=encode, backends=BACKENDS, axes=ENCODE_AXES,
    inputs=_encode_inputs, traffic=_encode_traffic, agreement=_encode_agreement, error=_decoded_error,
    source=f"{SOURCE}; arXiv 2604.18555"))
register(Kernel(
    name="turboquant.decode", reference=_decode_reference, operator=decode, backends=BACKENDS, axes=ENCODE_AXES,
    inputs=_decode_inputs, traffic=_decode_traffic, agreement=_decode_agreement,
    error=lambda inputs, expected, actual: relative_error(expected, actual), source=SOURCE))
register(Kernel(
    name="turboquant.logits", reference=reference.logits, operator=logits, backends=BACKENDS, axes=LOGITS_AXES,
    inputs=_logits_inputs, traffic=_logits_traffic, agreement=_logits_agreement,
    error=lambda inputs, expected, actual: relative_error(expected, actual), source=SOURCE))
register(Kernel(
    name="turboquant.decode_attention", reference=reference.decode_attention, operator=decode_attention,
    backends=BACKENDS, axes=ATTENTION_AXES, inputs=_attention_inputs, traffic=_attention_traffic,
    agreement=_attention_agreement, error=lambda inputs, expected, actual: relative_error(expected[0], actual[0]),
    source=f"{SOURCE}; arXiv 1805.02867 section 3.1"))
register(Kernel(
    name="turboquant.encode_prod", reference=reference.encode_prod, operator=encode_prod, backends=HOST_BACKENDS,
    axes=ENCODE_AXES, inputs=_encode_prod_inputs, traffic=_encode_prod_traffic, agreement=_encode_prod_agreement,
    error=_decoded_prod_error, source="arXiv 2504.19874 Algorithm 2"))
register(Kernel(
    name="turboquant.logits_prod", reference=reference.logits_prod, operator=logits_prod, backends=HOST_BACKENDS,
    axes=LOGITS_AXES, inputs=_logits_prod_inputs, traffic=_logits_prod_traffic, agreement=_logits_prod_agreement,
    error=lambda inputs, expected, actual: relative_error(expected, actual), source="arXiv 2504.19874 Theorem 2"))
