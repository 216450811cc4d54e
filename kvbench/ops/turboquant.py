"""TurboQuant: vectors as codes of their rotated coordinates in bit planes, and decode attention over the codes.

Reference: reference/turboquant.py (layout: reference/planes.py), kernels: cuda_src/turboquant.cu, their launches:
turboquant_launch.py, problems and agreement: turboquant_records.py.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvbench import registry
from kvbench.arrays import FLOATS, Arguments, Array
from kvbench.cpu import turboquant as cpu_turboquant
from kvbench.ops import attention, rotation as rotation_operator, turboquant_launch
from kvbench.ops.dispatch import check_heads, choose, require_finite, require_writable, round_into
from kvbench.ops.rotated import (check_cuda_size, check_host_mean, check_rotation, cpu_matrix, cpu_signs, host,
                                 in_tokens, rotated_query, take_mean)
from kvbench.ops.turboquant_launch import CUDA_ATTENTION_BITS, PLANES
from kvbench.reference import planes as bit_planes, turboquant as reference
from kvbench.reference.planes import Planes
from kvbench.reference.rotation import Rotation
from kvbench.reference.turboquant import (Encoded, EncodedProd, Projection, SCALE_MODES, codebook_for,
                                          gaussian_projection, orthogonal_projection)

__all__ = ["Encoded", "EncodedProd", "Projection", "decode", "decode_attention", "decode_prod", "encode",
           "encode_prod", "gaussian_projection", "logits", "logits_prod", "orthogonal_projection", "workspace"]

workspace = attention.workspace    # decode attention needs the same scratch

BACKENDS = registry.BACKENDS
HOST_BACKENDS = ("reference", "cpu")


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
    check_rotation(arguments, "rotation", rotation, x.shape[3])
    _check_bits(arguments, bits)
    arguments.require(scale_mode in SCALE_MODES, "scale_mode", f"one of {', '.join(SCALE_MODES)}", repr(scale_mode))
    mean = take_mean(arguments, "mean", mean)
    codes = _result_codes(arguments, "out", out, rotation.head_dim, bits, {"x": x, "mean": mean})
    backend = choose(backend, arguments, BACKENDS)
    if check_finite and backend != "reference":
        require_finite(arguments, x)

    if backend == "reference":
        result = reference.encode(x.numpy(), rotation, bits, scale_mode=scale_mode, mean=host(mean),
                                  check_finite=check_finite)
        codes.write(result)
    elif backend == "cpu":
        check_host_mean(arguments, mean)
        codebook = codebook_for(bits, rotation.head_dim)
        cpu_turboquant.encode(x.numpy(), *cpu_signs(rotation), host(mean), codebook.boundaries, codebook.centroids,
                              bits, scale_mode, codes.numpy_planes(), codes.scale.numpy(),
                              matrix=cpu_matrix(rotation, inverse=False))
    else:
        check_cuda_size(arguments, "x", x.shape[3], rotation, backend)
        arguments.require(x.aligned(16), "x", "rows at multiples of 16 bytes",
                          f"address {x.pointer:#x}, strides {x.strides}")
        if x.size:
            turboquant_launch.launch_encode(x, rotation, codes, scale_mode, mean, backend, arguments)
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
    codes = take_codes(arguments, "encoded", encoded, rotation)
    arguments.require(dtype in FLOATS, "dtype", f"one of {', '.join(FLOATS)}", repr(dtype))
    out = arguments.result("out", out, (*codes.scale.shape, codes.head_dim), dtype)
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        round_into(out, reference.decode(codes.on_host(), rotation))
    elif backend == "cpu":
        cpu_turboquant.decode(codes.numpy_planes(), codes.scale.numpy(), *cpu_signs(rotation),
                              codebook_for(codes.bits, rotation.head_dim).centroids, codes.bits, out.numpy(),
                              matrix=cpu_matrix(rotation, inverse=True))
    else:
        check_cuda_size(arguments, "encoded", codes.head_dim, rotation, backend)
        arguments.require(out.aligned(16), "out", "an address that is a multiple of 16 bytes", f"{out.pointer:#x}")
        if out.size:
            turboquant_launch.launch_decode(codes, rotation, out, backend, arguments)
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
    codes = take_codes(arguments, "encoded", encoded, rotation)
    group = check_heads(arguments, codes.head_dim)
    scale = attention.check_scale(arguments, scale, codes.head_dim)
    out = arguments.result("out", out, (*query.shape[:2], codes.scale.shape[2]), "float32")
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        round_into(out, reference.logits(query.numpy(), codes.on_host(), rotation, scale=scale))
    elif backend == "cpu":
        rotated = rotated_query(query.numpy(), rotation, group) * np.float32(scale)
        cpu_turboquant.logits(rotated, codes.numpy_planes(), codes.scale.numpy(),
                              codebook_for(codes.bits, rotation.head_dim).centroids, codes.bits, out.numpy())
    else:
        check_cuda_size(arguments, "encoded", codes.head_dim, rotation, backend)
        attention.check_cuda_heads(arguments, backend, codes.head_dim, group)
        if out.size:
            turboquant_launch.launch_logits(query, codes, rotation, scale, out, backend, arguments)
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
    values    : likewise, never centred; their bits may differ from those of the keys.  Stores whose heads are a
                multiple of 8 tokens apart (and begin at multiples of 16 bytes) are copied 16 bytes at a time, others
                two
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
    keys = take_codes(arguments, "keys", keys, key_rotation, "key_rotation")
    values = take_codes(arguments, "values", values, value_rotation, "value_rotation")
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    group = check_heads(arguments, keys.head_dim)
    scale = attention.check_scale(arguments, scale, keys.head_dim)
    key_mean = take_mean(arguments, "key_mean", key_mean)
    out, lse = attention.take_results(arguments, query, splits, out, lse, return_lse)
    backend = choose(backend, arguments, BACKENDS)
    batch, tokens = query.shape[0], keys.scale.shape[2]

    if backend in HOST_BACKENDS:
        host_lengths = np.full(batch, tokens, np.int32) if lengths is None else np.clip(lengths.numpy(), 0, tokens)
    if backend == "reference":
        output, log_sum = reference.decode_attention(
            query.numpy(), keys.on_host(), values.on_host(), key_rotation, value_rotation, lengths=host_lengths,
            scale=scale, key_mean=host(key_mean))
        round_into(out, output)
        if lse is not None:
            lse.numpy()[...] = log_sum
    elif backend == "cpu":
        check_host_mean(arguments, key_mean, "key_mean")
        _attend_on_cpu(query.numpy(), keys, values, key_rotation, value_rotation, host_lengths, scale, host(key_mean),
                       out.numpy(), None if lse is None else lse.numpy())
    else:
        check_cuda_size(arguments, "keys", keys.head_dim, key_rotation, backend, "key_rotation")
        check_cuda_size(arguments, "values", values.head_dim, value_rotation, backend, "value_rotation")
        attention.check_cuda_heads(arguments, backend, keys.head_dim, group)
        for name, codes in (("keys", keys), ("values", values)):
            arguments.require(codes.bits in CUDA_ATTENTION_BITS, name,
                              f"1 to 4 bits on backend {backend!r} (decode them, or use the cpu backend)",
                              f"{codes.bits} bits")
        if batch:
            turboquant_launch.launch_attention(query, keys, values, key_rotation, value_rotation, lengths, scale,
                                               key_mean, splits, out, lse, workspace, backend, arguments)
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
    check_rotation(arguments, "rotation", rotation, x.shape[3])
    _check_projection(arguments, projection, rotation)
    _check_bits(arguments, bits)
    mean = take_mean(arguments, "mean", mean)
    first = None if bits == 1 else _result_codes(arguments, "first", None, rotation.head_dim, bits - 1, {})
    sign = arguments.result("residual_sign", None, (*x.shape[:3], rotation.head_dim // 32), "uint32")
    norm = arguments.result("residual_norm", None, x.shape[:3], "float16")
    backend = choose(backend, arguments, HOST_BACKENDS)
    if check_finite and backend != "reference":
        require_finite(arguments, x)

    if backend == "reference":
        result = reference.encode_prod(x.numpy(), rotation, projection, bits, mean=host(mean),
                                       check_finite=check_finite)
        if first is not None:
            first.write(result.first)
        sign.numpy()[...], norm.numpy()[...] = result.residual_sign, result.residual_norm
    else:
        check_host_mean(arguments, mean)
        codebook = None if first is None else codebook_for(bits - 1, rotation.head_dim)
        cpu_turboquant.encode_prod(
            x.numpy(), *cpu_signs(rotation), host(mean), None if first is None else codebook.boundaries,
            None if first is None else codebook.centroids, bits, None if first is None else first.numpy_planes(),
            None if first is None else first.scale.numpy(), projection.matrix, sign.numpy(), norm.numpy(),
            matrix=cpu_matrix(rotation, inverse=False))
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
        round_into(out, reference.decode_prod(_prod_on_host(first, sign, norm, encoded.head_dim), rotation,
                                              projection))
    else:
        cpu_turboquant.decode_prod(*_cpu_prod(first, sign, norm, projection), *cpu_signs(rotation),
                                   *_prod_codebook(first, rotation), out.numpy(),
                                   matrix=cpu_matrix(rotation, inverse=True))
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
    group = check_heads(arguments, encoded.head_dim)
    scale = attention.check_scale(arguments, scale, encoded.head_dim)
    out = arguments.result("out", out, (*query.shape[:2], norm.shape[2]), "float32")
    backend = choose(backend, arguments, HOST_BACKENDS)
    if backend == "reference":
        round_into(out, reference.logits_prod(query.numpy(), _prod_on_host(first, sign, norm, encoded.head_dim),
                                              rotation, projection, scale=scale))
    else:
        rotated = rotated_query(query.numpy(), rotation, group) * np.float32(scale)
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


def take_codes(arguments, name, encoded, rotation, rotation_name="rotation") -> _Codes:
    """The codes that an operator reads: [batch, kv_heads, tokens] vectors of the rotation."""
    if not isinstance(encoded, Encoded):
        raise TypeError(f"{arguments.operator}: {name}: expected an Encoded from turboquant.encode, "
                        f"got {type(encoded).__name__}")
    check_rotation(arguments, rotation_name, rotation, encoded.head_dim)
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
    written = {**codes.planes, "scale": codes.scale}
    require_writable(arguments, {f"{name}.{part}": array for part, array in written.items()}, inputs)
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
        layouts[plane] = in_tokens(arguments, f"{name}.{plane}", planes[plane].strides[:3], count)
    scale = arguments.take(f"{name}.scale", encoded.scale, "batch kv_heads tokens", ("float16",), strided=True)
    strides = in_tokens(arguments, f"{name}.scale", scale.strides, 1)
    for plane, layout in layouts.items():
        arguments.require(layout == strides, f"{name}.{plane}",
                          f"strides of {list(strides)} tokens over sequences and heads, as in {name}.scale",
                          list(layout))
    return _Codes(planes, scale, encoded.head_dim, encoded.bits, strides)


def _take_prod(arguments, encoded, rotation, projection):
    """(first code or None, residual_sign, residual_norm) of validated arrays."""
    if not isinstance(encoded, EncodedProd):
        raise TypeError(f"{arguments.operator}: encoded: expected an EncodedProd from turboquant.encode_prod, "
                        f"got {type(encoded).__name__}")
    first = None if encoded.first is None else take_codes(arguments, "encoded.first", encoded.first, rotation)
    check_rotation(arguments, "rotation", rotation, encoded.head_dim)
    _check_projection(arguments, projection, rotation)
    known = arguments.sizes.setdefault("head_dim", encoded.head_dim)
    arguments.require(encoded.head_dim == known, "encoded", f"head_dim {known} as elsewhere", encoded.head_dim)
    sign = arguments.take("encoded.residual_sign", encoded.residual_sign,
                          f"batch kv_heads tokens {rotation.head_dim // 32}", ("uint32",), strided=True)
    norm = arguments.take("encoded.residual_norm", encoded.residual_norm, "batch kv_heads tokens", ("float16",),
                          strided=True)
    _check_on_host(arguments)
    strides = in_tokens(arguments, "encoded.residual_norm", norm.strides, 1)
    layouts = [in_tokens(arguments, "encoded.residual_sign", sign.strides[:3], rotation.head_dim // 32)]
    layouts += [] if first is None else [first.strides]
    arguments.require(all(layout == strides for layout in layouts), "encoded",
                      f"strides of {list(strides)} tokens over sequences and heads for all arrays", layouts)
    return first, sign, norm


def _check_projection(arguments, projection, rotation):
    if not isinstance(projection, Projection):
        raise TypeError(f"{arguments.operator}: projection: expected a Projection from gaussian_projection() or "
                        f"orthogonal_projection(), got {type(projection).__name__}")
    arguments.require(projection.head_dim == rotation.head_dim, "projection",
                      f"the size of the rotation, {rotation.head_dim}", projection.head_dim)


def _check_bits(arguments, bits):
    arguments.require(isinstance(bits, (int, np.integer)) and not isinstance(bits, bool) and bits in bit_planes.BITS,
                      "bits", "an integer from 1 to 8", repr(bits))


def _check_on_host(arguments):
    arguments.require(arguments.device.kind == "cpu", "backend",
                      f"arrays in host memory: {', '.join(HOST_BACKENDS)} are what implements this operator",
                      f"arrays on {arguments.device}: copy them to the host")


# ---- cpu -------------------------------------------------------------------------------------------------------------


def _attend_on_cpu(query, keys, values, key_rotation, value_rotation, lengths, scale, key_mean, out, lse):
    batch, q_heads, head_dim = query.shape
    kv_heads = keys.scale.shape[1]
    rotated = np.empty((batch, q_heads, value_rotation.head_dim), np.float32)
    log_sums = np.empty((batch, q_heads), np.float32)
    cpu_turboquant.decode_attention(
        rotated_query(query, key_rotation, q_heads // kv_heads) * np.float32(scale),
        keys.numpy_planes(), keys.scale.numpy(), codebook_for(keys.bits, key_rotation.head_dim).centroids,
        values.numpy_planes(), values.scale.numpy(), codebook_for(values.bits, value_rotation.head_dim).centroids,
        lengths, rotated, log_sums)
    finish_on_cpu(query, rotated, log_sums, value_rotation, scale, key_mean, out, lse)


def finish_on_cpu(query, rotated, log_sums, value_rotation, scale, key_mean, out, lse):
    """Rotate the sums over values back into `out`; add what a mean of the keys adds to `lse`, unless that is None."""
    batch, q_heads, head_dim = query.shape
    rotation_operator.rotate(rotated, value_rotation, inverse=True, out=rotated, backend="cpu")
    with np.errstate(over="ignore"):
        out[...] = rotated[..., :head_dim].astype(out.dtype)
    if lse is None:
        return
    if key_mean is not None:
        grouped = query.astype(np.float32).reshape(batch, key_mean.shape[-2], -1, head_dim)
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
