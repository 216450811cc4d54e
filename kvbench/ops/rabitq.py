"""RaBitQ index: one bit per rotated coordinate of a key, and the proxy logits that these estimate.

Reference: reference/rabitq.py (order of the bits: reference/planes.py), kernels: cuda_src/rabitq.cu, their launches:
rabitq_launch.py, problems and agreement: rabitq_records.py.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from kvbench import registry
from kvbench.arrays import FLOATS, Arguments, Array
from kvbench.cpu import rabitq as cpu_rabitq
from kvbench.ops import attention, rabitq_launch, rotation as rotation_operator, selection
from kvbench.ops.dispatch import check_heads, choose, require_finite, require_writable
from kvbench.ops.rotated import (check_cuda_size, check_host_mean, check_rotation, cpu_matrix, cpu_signs, host,
                                 in_tokens)
from kvbench.reference import rabitq as reference
from kvbench.reference.rabitq import QUERY_BITS, ROUNDINGS, Encoded, Query
from kvbench.reference.rotation import Rotation
from kvbench.reference.selection import Selection
from kvbench.scores import Scores

__all__ = ["AttentionWorkspace", "Encoded", "Query", "Scores", "encode", "quantize_query", "score", "select_top_p",
           "select_top_p_workspace", "sparse_attention", "sparse_attention_workspace"]

BACKENDS = registry.BACKENDS
HOST_BACKENDS = ("reference", "cpu")
ATTENTION_SIZES = (64, 128)      # head_dim of rabitq_attention_kernel
ATTENTION_LEAST = 1024           # tokens of a part of it, on a GPU: else more launches take less time
CODE_TYPE = {4: "uint8", 8: "int8", 16: "float32"}       # of a query, by its bits


# ---- keys ------------------------------------------------------------------------------------------------------------


def encode(keys, rotation: Rotation, *, key_mean=None, query_mean=None, check_finite: bool = False,
           out: Encoded | None = None, backend: str | None = None, stream=None) -> Encoded:
    """S = sign R (k - c_k), r = |k - c_k|^2 / |R (k - c_k)|_1 and a = <c_q, k - c_k>, in one pass over the keys.

    keys         : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, after RoPE; outer dimensions may be
                   strided
    rotation     : of size head_dim, or on reference and cpu of a larger multiple of 32, to which keys are padded with
                   zeros
    key_mean     : c_k, [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, finite (default 0)
    query_mean   : c_q, likewise; without it there is no a: head_dim / 8 + 2 bytes a key, with it 2 more
    check_finite : ValueError where keys hold NaN or Inf (in device memory: after a copy of the keys to the host)
                   instead of r = NaN for that token, which is never selected
    out          : an `Encoded` to write into (default: new), with the same means.  Its arrays may be slices of a larger
                   store: the tokens of a head follow one another, and strides counted in tokens are the same for all
    backend      : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256.
                   There a Haar rotation costs a float32 copy of the keys and its rotation, in memory and time

    Returns `Encoded`: sign [batch, kv_heads, tokens, size / 32] uint32, rescale and offset [batch, kv_heads, tokens]
    float16.  A token is encoded by itself, so any split into calls gives the same bits.  Arithmetic is float32:
    backends agree in every sign whose coordinate is not within 2e-5 root mean squares of 0.
    Source: RaBitQ, arXiv 2405.12497, section 3.1 and Theorem 3.2; RaBitQCache, arXiv 2606.31519.
    """
    arguments = Arguments("rabitq.encode", stream=stream)
    keys = arguments.take("keys", keys, "batch kv_heads tokens head_dim", FLOATS, strided=True)
    check_rotation(arguments, "rotation", rotation, keys.shape[3])
    means = {name: _take_mean(arguments, name, mean) for name, mean in (("key_mean", key_mean),
                                                                        ("query_mean", query_mean))}
    code = _result_code(arguments, out, rotation.head_dim, {"keys": keys, **means})
    backend = choose(backend, arguments, BACKENDS)
    if check_finite and backend != "reference":
        require_finite(arguments, keys)

    if backend == "reference":
        result = reference.encode(keys.numpy(), rotation, check_finite=check_finite,
                                  **{name: host(mean) for name, mean in means.items()})
        code.sign.numpy()[...], code.rescale.numpy()[...] = result.sign, result.rescale
        if code.offset is not None:
            code.offset.numpy()[...] = result.offset
    elif backend == "cpu":
        for name, mean in means.items():
            check_host_mean(arguments, mean, name)
        cpu_rabitq.encode(keys.numpy(), *cpu_signs(rotation), cpu_matrix(rotation, inverse=False),
                          *(host(mean) for mean in means.values()), code.sign.numpy(), code.rescale.numpy(),
                          host(code.offset))
    else:
        check_cuda_size(arguments, "keys", keys.shape[3], rotation, backend)
        arguments.require(keys.aligned(16), "keys", "rows at multiples of 16 bytes",
                          f"address {keys.pointer:#x}, strides {keys.strides}")
        if keys.size:
            rabitq_launch.launch_encode(keys, rotation, code, *means.values(), backend, arguments)
    if out is not None:
        return out
    return Encoded(code.sign.give(), code.rescale.give(), code.offset and code.offset.give(),
                   *(mean and mean.give() for mean in means.values()), keys.shape[3])


# ---- queries ---------------------------------------------------------------------------------------------------------


def quantize_query(query, rotation: Rotation, *, query_mean=None, query_bits: int = 4, rounding: str = "nearest",
                   seed: int = 0, step: int = 0, out: Query | None = None, backend: str | None = None,
                   stream=None) -> Query:
    """R (q - c_q) in integers: q'_i = step codes_i + low.  `score` does this itself; here it stands alone.

    query      : [batch, q_heads, head_dim] float16, bfloat16 or float32, after RoPE, not rotated
    rotation   : of size head_dim, or on reference and cpu of a larger multiple of 32
    query_mean : c_q, [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, of which query head h takes row
                 h // (q_heads // kv_heads)  (default 0)
    query_bits : 4 (codes 0 to 15), 8 (-127 to 127, low 0), or 16: codes are q' in float32, step 1 and low 0
    rounding   : "nearest" (ties to even) or, for 4 bits, "random": unbiased given the rotation, by a hash of seed,
                 step (of decoding), sequence, query head and coordinate; both are integers of at least 0
    out        : a `Query` to write into (default: new)
    backend    : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256,
                 query_bits 4 or 8, with a query_mean at most 16 query heads per KV head

    Returns `Query`: codes [batch, q_heads, size] uint8, int8 or float32, step and low [batch, q_heads] float32, NaN for
    a query that is not finite.
    Source: RaBitQ, arXiv 2405.12497, section 3.3.1.
    """
    arguments = Arguments("rabitq.quantize_query", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    check_rotation(arguments, "rotation", rotation, query.shape[2])
    _check_query_options(arguments, query_bits, rounding, seed, step)
    query_mean = _take_mean(arguments, "query_mean", query_mean)
    batch, q_heads, head_dim = query.shape
    kv_heads = arguments.sizes.setdefault("kv_heads", q_heads)
    check_heads(arguments, head_dim)
    given = (None, None, None) if out is None else _fields(arguments, "out", out, Query)[:3]
    codes = arguments.result("out.codes", given[0], (batch, q_heads, rotation.head_dim), CODE_TYPE[query_bits])
    scales = [arguments.result(f"out.{name}", value, (batch, q_heads), "float32")
              for name, value in zip(("step", "low"), given[1:])]
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        result = quantized(query.numpy(), rotation, query_mean=host(query_mean), query_bits=query_bits,
                           rounding=rounding, seed=seed, step=step)
        for array, value in zip((codes, *scales), (result.codes, result.step, result.low)):
            array.numpy()[...] = value
    elif backend == "cpu":
        check_host_mean(arguments, query_mean, "query_mean")
        rotated, _ = _rotated_on_cpu(query.numpy(), rotation, host(query_mean), kv_heads)
        _quantize_on_cpu(rotated, query_bits, rounding, seed, step, codes.numpy(), *(x.numpy() for x in scales))
    else:
        check_cuda_size(arguments, "query", head_dim, rotation, backend)
        attention.check_cuda_heads(arguments, backend, head_dim, q_heads // kv_heads)
        _check_integers(arguments, query_bits, backend)
        if codes.size:
            rabitq_launch.launch_quantize(query, rotation, query_mean, kv_heads, query_bits, rounding, seed, step,
                                          codes, *scales, backend, arguments)
    return Query(codes.give(), *(array.give() for array in scales)) if out is None else out


def quantized(query, rotation: Rotation, *, query_mean=None, query_bits: int = 4, rounding: str = "nearest",
              seed: int = 0, step: int = 0) -> Query:
    """What `quantize_query` computes, by the functions of the reference, on NumPy arrays."""
    batch, q_heads, head_dim = query.shape
    if query_mean is not None:
        query_mean = np.broadcast_to(query_mean, (batch, *query_mean.shape[-2:]))
    kv_heads = q_heads if query_mean is None else query_mean.shape[1]
    about = Encoded(np.zeros((batch, kv_heads, 0, rotation.head_dim // 32), np.uint32),
                    np.zeros((batch, kv_heads, 0), np.float16), None, None, query_mean, head_dim)
    rotated = reference.rotate_query(query, about, rotation)
    if query_bits != 16:
        return reference.quantise_query(rotated, query_bits, rounding=rounding, seed=seed, step=step)
    usable = np.isfinite(rotated).all(axis=-1)
    scales = (np.where(usable, np.float32(value), np.float32(np.nan)) for value in (1, 0))
    return Query(np.where(usable[..., None], rotated, np.float32(0)), *scales)


# ---- scores ----------------------------------------------------------------------------------------------------------


def score(query, encoded: Encoded, rotation: Rotation, *, query_bits: int = 4, rounding: str = "nearest",
          seed: int = 0, step: int = 0, lengths=None, scale: float | None = None, return_sigma: bool = False,
          out=None, sigma=None, backend: str | None = None, stream=None) -> Scores:
    """scale (r <S, R (q - c_q)> + a + <q, c_k>), an estimate of scale <q, k>: each code is read once per KV head.

    query        : [batch, q_heads, head_dim] float16, bfloat16 or float32, after RoPE; head h reads KV head h // group
    encoded      : keys of [batch, kv_heads, tokens, head_dim] as `encode` gave them, or slices of a store
    rotation     : the one that encoded
    query_bits, rounding, seed, step : how the query is rounded, see `quantize_query`
    lengths      : [batch] int32, tokens of each sequence (default: all).  Slots from there on are not read; their
                   logits are -inf and their sigma 0.  Values outside 0..tokens are clamped
    scale        : factor of the logits (default head_dim ** -0.5)
    return_sigma : also give the standard deviation that the index expects, which calibrated selection needs: it doubles
                   what is written
    out, sigma   : where to write logits and sigma (default: new); a sigma is written, wanted or not
    backend      : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256,
                   group <= 16, query_bits 4 or 8

    Returns Scores(logits, sigma), [batch, q_heads, tokens] float32, sigma None unless asked for.  Products of signs and
    integers are exact on every backend.
    Source: RaBitQ, arXiv 2405.12497, Theorem 3.2 and section 3.3; RaBitQCache, arXiv 2606.31519.
    """
    arguments = Arguments("rabitq.score", stream=stream)
    options = dict(query_bits=query_bits, rounding=rounding, seed=seed, step=step)
    query, code, lengths, scale = _take_scored(arguments, query, encoded, rotation, lengths, scale, options)
    shape = (*query.shape[:2], code.rescale.shape[2])
    logits = arguments.result("out", out, shape, "float32")
    wants_sigma = return_sigma or sigma is not None
    sigma = arguments.result("sigma", sigma, shape, "float32") if wants_sigma else None
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        result = scored(query.numpy(), code.on_host(), rotation, lengths=host(lengths), scale=scale, **options)
        logits.numpy()[...] = result.logits
        if sigma is not None:
            sigma.numpy()[...] = result.sigma
    elif backend == "cpu":
        _score_on_cpu(query.numpy(), code.on_host(), rotation, host(lengths), scale, logits.numpy(), host(sigma),
                      **options)
    else:
        _check_scored_on_cuda(arguments, query, code, rotation, query_bits, backend)
        if logits.size:
            rabitq_launch.launch_score(query, code, rotation, lengths, scale, logits, sigma, backend, arguments,
                                       **options)
    return Scores(logits.give(), sigma and sigma.give())


def scored(query, encoded: Encoded, rotation: Rotation, *, lengths=None, return_sigma: bool = True,
           **options) -> Scores:
    """What `score` computes, by the functions of the reference, on NumPy arrays."""
    with np.errstate(invalid="ignore", over="ignore"):
        result = reference.score(query, encoded, rotation, **options)
    logits, sigma = result.logits, result.sigma
    if lengths is not None:
        beyond = np.arange(logits.shape[2]) >= np.asarray(lengths)[:, None, None]
        logits, sigma = np.where(beyond, np.float32(-np.inf), logits), np.where(beyond, np.float32(0), sigma)
    return Scores(logits, sigma if return_sigma else None)


def select_top_p(query, encoded: Encoded, rotation: Rotation, p: float, *, query_bits: int = 4,
                 rounding: str = "nearest", seed: int = 0, step: int = 0, lengths=None, scale: float | None = None,
                 min_tokens: int = 1, max_tokens: int | None = None, out: Selection | None = None, scores=None,
                 workspace: selection.Workspace | None = None, backend: str | None = None, stream=None) -> Selection:
    """The fewest tokens of each query head whose estimated mass reaches p, united over the query heads of a KV head:
    `score`, and `selection.select_top_p` with kv_heads.

    query, encoded, rotation, query_bits, rounding, seed, step, lengths, scale, backend : as in `score`
    p, min_tokens, max_tokens : as in `selection.select_top_p`, without a calibration; nothing is always kept
    out       : a Selection to write into: indices [batch, kv_heads, tokens] int32, counts [batch, kv_heads] int32, mass
                [batch, q_heads] float32 (default: new)
    scores    : [batch, q_heads, tokens] float32 that may be written (default: new)
    workspace : from `select_top_p_workspace(...)`, so that nothing is allocated (default: a temporary one)

    On CUDA, with up to four query heads per KV head, the scores stay in the shared memory of blocks that wait for each
    other, and all is one cooperative launch, where that is faster and the GPU has room for it (on an H100, with 8 KV
    heads, from 28673 to 147456 tokens); what else is asked for takes three, with the same result.
    Source: RaBitQCache, arXiv 2606.31519; Top-p: reference/selection.py.
    """
    arguments = Arguments("rabitq.select_top_p", stream=stream)
    options = dict(query_bits=query_bits, rounding=rounding, seed=seed, step=step)
    query, code, lengths, scale = _take_scored(arguments, query, encoded, rotation, lengths, scale, options)
    selection.check_top_p(arguments, p, min_tokens, max_tokens, "middle", False)
    (batch, q_heads, _), (_, kv_heads, tokens) = query.shape, code.rescale.shape
    result = selection.take_result(arguments, out, batch, q_heads, kv_heads, tokens)
    logits = arguments.result("scores", scores, (batch, q_heads, tokens), "float32")
    backend = choose(backend, arguments, BACKENDS)

    if backend not in HOST_BACKENDS:
        _check_scored_on_cuda(arguments, query, code, rotation, query_bits, backend)
        workspace = selection.take_workspace(arguments, workspace, batch * q_heads,
                                             selection.parts_of(tokens, batch * q_heads, backend, query.device)[0],
                                             tokens)
        geometry = selection.together(tokens, batch * kv_heads, q_heads // kv_heads, backend, query.device, workspace)
        if geometry:
            selected = selection.top_p_arguments(p, min_tokens, max_tokens, *geometry, logits, workspace, result)
            rabitq_launch.launch_top_p(query, code, rotation, lengths, scale, geometry[0], selected,
                                       selection.top_p_shared_bytes(geometry[1]), backend, arguments, **options)
            return selection.give(result)
    made = score(query, encoded, rotation, lengths=lengths, scale=scale, out=logits, backend=backend, stream=stream,
                 **options)
    selection.select_top_p(made, p, kv_heads=kv_heads, lengths=lengths, min_tokens=min_tokens, max_tokens=max_tokens,
                           out=result, workspace=workspace, backend=backend, stream=stream)
    return selection.give(result)


def select_top_p_workspace(batch: int, q_heads: int, tokens: int, device, *, framework: str | None = None,
                           stream=None) -> selection.Workspace:
    """Scratch of `select_top_p` for at most these sizes: that of a selection."""
    return selection.workspace(batch, q_heads, tokens, device, framework=framework, stream=stream)


@dataclass(frozen=True)
class AttentionWorkspace:
    """Scratch memory of `sparse_attention`: that of a selection, and that of attention.  One stream at a time."""

    select: selection.Workspace
    attend: attention.Workspace


def sparse_attention_workspace(batch: int, q_heads: int, tokens: int, head_dim: int, device, *,
                               framework: str | None = None, stream=None) -> AttentionWorkspace:
    """Scratch of `sparse_attention` for at most these sizes."""
    return AttentionWorkspace(
        selection.workspace(batch, q_heads, tokens, device, framework=framework, stream=stream),
        attention.workspace(batch, q_heads, head_dim, device, framework=framework))


def sparse_attention(query, encoded: Encoded, rotation: Rotation, p: float, keys, values, *, query_bits: int = 4,
                     rounding: str = "nearest", seed: int = 0, step: int = 0, lengths=None, first: int = 0,
                     leading=None, scale: float | None = None, min_tokens: int = 1, max_tokens: int | None = None,
                     return_lse: bool = False, out=None, lse=None, chosen: Selection | None = None, scores=None,
                     workspace: AttentionWorkspace | None = None, backend: str | None = None, stream=None):
    """Attention to the fewest tokens whose estimated mass reaches p: `select_top_p`, and `attention.sparse_attention`
    to the tokens that it chooses.

    query, encoded, rotation, p, query_bits, rounding, seed, step, lengths, min_tokens, max_tokens : of `select_top_p`
    keys, values : [batch, kv_heads, slots, head_dim] in query's dtype, outer dimensions may be strided; slot
                   first + t is token t of the index, for all its tokens
    first, leading, return_lse, out, lse : as in `attention.sparse_attention`
    scale        : of the estimated and of the exact logits (default head_dim ** -0.5)
    chosen, scores : `out` and `scores` of `select_top_p`
    workspace    : from `sparse_attention_workspace(...)`, so that nothing is allocated (default: a temporary one)

    Returns (output, lse, Selection); lse is None unless it is wanted.  On CUDA, with a cache of 16 bits, head_dim 64 or
    128 and up to four query heads per KV head, all is one cooperative launch where the GPU has room for it and it is
    faster (on an H100, with 8 KV heads, from 12289 to 147456 tokens): a block attends to what is chosen of its own
    part, or if one has many more tokens than others, to an equal share.  What else is asked for takes two launches or
    four.
    Source: RaBitQCache, arXiv 2606.31519.
    """
    arguments = Arguments("rabitq.sparse_attention", stream=stream)
    options = dict(query_bits=query_bits, rounding=rounding, seed=seed, step=step)
    query, code, lengths, scale = _take_scored(arguments, query, encoded, rotation, lengths, scale, options)
    selection.check_top_p(arguments, p, min_tokens, max_tokens, "middle", False)
    keys, values = (arguments.take(name, array, "batch kv_heads slots head_dim", (query.dtype,), strided=True)
                    for name, array in (("keys", keys), ("values", values)))
    (batch, q_heads, head_dim), (_, kv_heads, tokens), slots = query.shape, code.rescale.shape, keys.shape[2]
    arguments.require(slots >= tokens, "keys", f"slots for the {tokens} tokens of the index", slots)
    first, leading = attention.take_leading(arguments, first, leading, slots - tokens)
    out, lse = attention.take_results(arguments, query, None, out, lse, return_lse)
    result = selection.take_result(arguments, chosen, batch, q_heads, kv_heads, tokens, "chosen")
    logits = arguments.result("scores", scores, (batch, q_heads, tokens), "float32")
    backend = choose(backend, arguments, BACKENDS)
    if workspace is not None and not isinstance(workspace, AttentionWorkspace):
        raise TypeError(f"rabitq.sparse_attention: workspace: expected an AttentionWorkspace from "
                        f"rabitq.sparse_attention_workspace(), got {type(workspace).__name__}")
    select_scratch, scratch = (None, None) if workspace is None else (workspace.select, workspace.attend)

    if backend not in HOST_BACKENDS:
        _check_scored_on_cuda(arguments, query, code, rotation, query_bits, backend)
        attention.check_cuda(arguments, backend, query, keys, values, out)
        select_scratch = selection.take_workspace(
            arguments, select_scratch, batch * q_heads,
            selection.parts_of(tokens, batch * q_heads, backend, query.device)[0], tokens, "workspace.select")
        if scratch is not None:
            attention.take_workspace(arguments, scratch, 1, query.device, out.framework)
        shared_bytes = partial(rabitq_launch.attention_shared_bytes, head_dim)
        geometry = None
        if query.dtype != "float32" and head_dim in ATTENTION_SIZES:
            geometry = selection.together(tokens, batch * kv_heads, q_heads // kv_heads, backend, query.device,
                                          select_scratch, shared_bytes, ATTENTION_LEAST)
        if geometry:
            scratch = attention.take_workspace(arguments, scratch, geometry[0], query.device, out.framework)
            selected = selection.top_p_arguments(p, min_tokens, max_tokens, *geometry, logits, select_scratch, result)
            rabitq_launch.launch_attention(query, code, rotation, lengths, scale, keys, values, first, leading, out,
                                           lse, geometry[0], selected, shared_bytes(geometry[1]), scratch, backend,
                                           arguments, **options)
            return out.give(), lse and lse.give(), selection.give(result)
    made = select_top_p(query, encoded, rotation, p, lengths=lengths, scale=scale, min_tokens=min_tokens,
                        max_tokens=max_tokens, out=result, scores=logits, workspace=select_scratch, backend=backend,
                        stream=stream, **options)
    attention.sparse_attention(query, keys, values, made.indices, made.counts, lengths=lengths, first=first,
                               leading=leading, scale=scale, out=out, lse=lse, workspace=scratch, backend=backend,
                               stream=stream)
    return out.give(), lse and lse.give(), selection.give(result)


# ---- validation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Code:
    """An `Encoded` whose arrays were validated, and the strides of sequences and heads in tokens."""

    sign: Array
    rescale: Array
    offset: Array | None
    key_mean: Array | None
    query_mean: Array | None
    strides: tuple[int, int]
    head_dim: int

    def on_host(self) -> Encoded:
        """Means as [batch, kv_heads, head_dim]."""
        shape = (*self.rescale.shape[:2], self.head_dim)
        means = (mean and np.broadcast_to(mean.numpy(), shape) for mean in (self.key_mean, self.query_mean))
        return Encoded(self.sign.numpy(), self.rescale.numpy(), host(self.offset), *means, self.head_dim)


def _take_code(arguments, encoded, rotation) -> _Code:
    """The index that `score` reads."""
    _fields(arguments, "encoded", encoded, Encoded)
    check_rotation(arguments, "rotation", rotation, encoded.head_dim)
    known = arguments.sizes.setdefault("head_dim", encoded.head_dim)
    arguments.require(encoded.head_dim == known, "encoded", f"head_dim {known} as in query", encoded.head_dim)
    arguments.require((encoded.offset is None) == (encoded.query_mean is None), "encoded",
                      "both offset and query_mean, or neither", "one of them")
    arrays, strides = _take_arrays(arguments, "encoded", encoded, rotation.head_dim)
    means = (_take_mean(arguments, f"encoded.{name}", getattr(encoded, name)) for name in ("key_mean", "query_mean"))
    return _Code(*arrays, *means, strides, encoded.head_dim)


def _result_code(arguments, given, size, inputs) -> _Code:
    """The index that `encode` writes: the caller's, apart from the `inputs`, or new memory in its framework."""
    shape = tuple(arguments.sizes[name] for name in ("batch", "kv_heads", "tokens"))
    means, head_dim = (inputs["key_mean"], inputs["query_mean"]), arguments.sizes["head_dim"]
    if given is None:
        sign = arguments.result("out.sign", None, (*shape, size // 32), "uint32")
        rescale = arguments.result("out.rescale", None, shape, "float16")
        offset = None if means[1] is None else arguments.result("out.offset", None, shape, "float16")
        return _Code(sign, rescale, offset, *means, (shape[1] * shape[2], shape[2]), head_dim)
    _fields(arguments, "out", given, Encoded)
    arguments.require(given.head_dim == head_dim, "out", f"head_dim {head_dim} as in keys", given.head_dim)
    arguments.require((given.offset is None) == (means[1] is None), "out",
                      "an offset if and only if there is a query_mean", "one without the other")
    arrays, strides = _take_arrays(arguments, "out", given, size)
    written = {f"out.{name}": array for name, array in zip(("sign", "rescale", "offset"), arrays) if array is not None}
    require_writable(arguments, written, inputs)
    return _Code(*arrays, *means, strides, head_dim)


def _take_arrays(arguments, name, encoded, size):
    """((sign, rescale, offset or None), strides of sequences and heads in tokens): one layout for all."""
    words = size // 32
    arrays = (arguments.take(f"{name}.sign", encoded.sign, f"batch kv_heads tokens {words}", ("uint32",), strided=True),
              *(arguments.take(f"{name}.{part}", getattr(encoded, part), "batch kv_heads tokens", ("float16",),
                               strided=True, optional=part == "offset") for part in ("rescale", "offset")))
    layouts = [in_tokens(arguments, f"{name}.{part}", array.strides[:3], row)
               for part, array, row in zip(("sign", "rescale", "offset"), arrays, (words, 1, 1)) if array is not None]
    arguments.require(len(set(layouts)) == 1, name,
                      "the same strides of sequences and heads, counted in tokens, for all arrays", layouts)
    return arrays, layouts[0]


def _take_mean(arguments, name, mean):
    """[kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, or None."""
    one_for_all = len(getattr(mean, "shape", ())) == 2
    return arguments.take(name, mean, "kv_heads head_dim" if one_for_all else "batch kv_heads head_dim", ("float32",),
                          optional=True)


def _fields(arguments, name, value, expected):
    if not isinstance(value, expected):
        raise TypeError(f"{arguments.operator}: {name}: expected {expected.__name__}, got {type(value).__name__}")
    return tuple(getattr(value, field) for field in expected.__dataclass_fields__)


def _check_query_options(arguments, query_bits, rounding, seed, step):
    arguments.require(query_bits in QUERY_BITS and not isinstance(query_bits, bool), "query_bits", "4, 8 or 16",
                      repr(query_bits))
    arguments.require(rounding in ROUNDINGS, "rounding", f"one of {', '.join(ROUNDINGS)}", repr(rounding))
    arguments.require(rounding == "nearest" or query_bits == 4, "rounding", f"'nearest' for {query_bits} bits",
                      repr(rounding))
    for name, value in (("seed", seed), ("step", step)):
        arguments.require(isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < 2**63,
                          name, "an integer from 0 to 2^63 - 1", repr(value))


def _take_scored(arguments, query, encoded, rotation, lengths, scale, options):
    """(query, code, lengths, scale), validated, of an operator that scores."""
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    code = _take_code(arguments, encoded, rotation)
    _check_query_options(arguments, **options)
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    check_heads(arguments, query.shape[2])
    return query, code, lengths, attention.check_scale(arguments, scale, query.shape[2])


def _check_scored_on_cuda(arguments, query, code, rotation, query_bits, backend):
    check_cuda_size(arguments, "encoded", query.shape[2], rotation, backend)
    attention.check_cuda_heads(arguments, backend, query.shape[2], query.shape[1] // code.rescale.shape[1])
    _check_integers(arguments, query_bits, backend)


def _check_integers(arguments, query_bits, backend):
    arguments.require(query_bits in (4, 8), "query_bits", f"4 or 8 on backend {backend!r}", query_bits)


# ---- cpu -------------------------------------------------------------------------------------------------------------


def _rotated_on_cpu(query, rotation, query_mean, kv_heads):
    """(R (q - c_q) [batch, q_heads, size], q - c_q [batch, q_heads, head_dim]) float32."""
    batch, q_heads, head_dim = query.shape
    centred = query.astype(np.float32).reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
    if query_mean is not None:
        centred = centred - query_mean[..., None, :]
    centred = centred.reshape(query.shape)
    padded = np.zeros((batch, q_heads, rotation.head_dim), np.float32)
    padded[..., :head_dim] = centred
    with np.errstate(invalid="ignore", over="ignore"):
        return rotation_operator.rotate(padded, rotation, out=padded, backend="cpu"), centred


def _quantize_on_cpu(rotated, query_bits, rounding, seed, step, codes, delta, low):
    if query_bits == 16:
        usable = np.isfinite(rotated).all(axis=-1)
        codes[...] = np.where(usable[..., None], rotated, np.float32(0))
        delta[...], low[...] = (np.where(usable, np.float32(value), np.float32(np.nan)) for value in (1, 0))
    elif rotated.size:
        xi = reference.dither(rotated.shape, seed, step) if rounding == "random" else None
        cpu_rabitq.quantize(rotated, query_bits, xi, codes, delta, low)


def _score_on_cpu(query, encoded, rotation, lengths, scale, logits, sigma, *, query_bits, rounding, seed, step):
    batch, q_heads, head_dim = query.shape
    kv_heads, tokens = encoded.rescale.shape[1:]
    rotated, centred = _rotated_on_cpu(query, rotation, encoded.query_mean, kv_heads)
    codes = np.empty(rotated.shape, CODE_TYPE[query_bits])
    delta, low = np.empty((2, batch, q_heads), np.float32)
    _quantize_on_cpu(rotated, query_bits, rounding, seed, step, codes, delta, low)
    constant = np.zeros((batch, q_heads), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        if encoded.key_mean is not None:
            grouped = query.astype(np.float32).reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
            constant += (grouped * encoded.key_mean[:, :, None]).sum(axis=-1).reshape(constant.shape)
        kappa = scale * np.sqrt(rotation.head_dim * noise_variance(
            (centred.astype(np.float64) ** 2).sum(axis=-1), delta.astype(np.float64), rotation.head_dim, query_bits,
            rounding))
    lengths = np.full(batch, tokens, np.int32) if lengths is None else np.clip(lengths, 0, tokens)
    if logits.size:
        cpu_rabitq.score(codes, delta, low, constant, np.abs(kappa).astype(np.float32), encoded.sign, encoded.rescale,
                         encoded.offset, lengths, scale, logits, sigma)


def noise_variance(square, delta, size, query_bits, rounding):
    """kappa^2 / (scale^2 size), see `reference.sigma`: of queries with |q - c_q|^2 = square and this step."""
    rest = 0.0 if query_bits == 16 else delta**2 / (6 if rounding == "random" else 12)
    return noise_share(size) * square + rest


def noise_share(size: int) -> float:
    """(1 - E alpha^2) / (size - 1): the share of |q - c_q|^2 in it."""
    return (1 - reference.alignment(size)[1]) / (size - 1)
