"""Self-Indexing: keys as signs and 2-bit magnitudes, scores from the signs alone, attention to what they select.

Reference: reference/self_indexing.py, which also says where the bits of a code lie; kernels: cuda_src/self_indexing.cu,
their launches: self_indexing_launch.py, problems and agreement: self_indexing_records.py.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvbench import registry
from kvbench.arrays import FLOATS, Arguments, Array
from kvbench.cpu import self_indexing as cpu_self_indexing
from kvbench.ops import attention, selection, self_indexing_launch
from kvbench.ops.dispatch import check_cuda_head_dim, check_heads, choose, require_finite, require_writable, round_into
from kvbench.reference import kivi
from kvbench.reference import self_indexing as reference
from kvbench.reference.selection import Selection
from kvbench.reference.self_indexing import CODES, GROUP, MAGNITUDE_BITS, SUBVECTOR, TABLES, Encoded
from kvbench.scores import Scores

__all__ = ["Encoded", "build_codebook", "build_tables", "encode", "score", "select_top_k", "select_top_k_workspace",
           "sparse_attention_packed", "workspace"]

workspace = attention.workspace    # attention needs the same scratch

BACKENDS = registry.BACKENDS
HOST_BACKENDS = ("reference", "cpu")


# ---- keys and their codes --------------------------------------------------------------------------------------------


def build_codebook(keys, mean, *, excluded=None, lengths=None, out=None, backend: str | None = None, stream=None):
    """C[g, c] = mean of the centred subvectors k'[t, 4 g ... 4 g + 3] whose signs are c: one pass over a prompt.

    keys     : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, after RoPE; outer dimensions may be
               strided; head_dim a multiple of 32
    mean     : [batch, kv_heads, head_dim] float32, mu
    excluded : [batch, kv_heads, positions] int32 of tokens that stay exact and do not enter; others than 0 ... tokens -
               1 are none
    lengths  : [batch] int32, tokens of each prompt (default: all), clamped to 0 ... tokens
    out      : [batch, kv_heads, head_dim / 4, 16, 4] float32 (default: new)
    backend  : reference, cpu (arrays in host memory: a prompt is read once)

    A cluster without tokens gets the mean magnitudes of its group with the signs of its code; sums are float64.
    Source: arXiv 2603.14224; reference/self_indexing.py.
    """
    arguments = Arguments("self_indexing.build_codebook", stream=stream)
    keys = arguments.take("keys", keys, "batch kv_heads tokens head_dim", FLOATS, strided=True)
    head_dim = _check_head_dim(arguments, "keys", keys.shape[3])
    mean = arguments.take("mean", mean, "batch kv_heads head_dim", ("float32",))
    excluded = _take_excluded(arguments, excluded)
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    out = arguments.result("out", out, (*keys.shape[:2], head_dim // SUBVECTOR, CODES, SUBVECTOR), "float32")
    backend = choose(backend, arguments, HOST_BACKENDS)

    host_lengths = _host_lengths(lengths, keys.shape[0], keys.shape[2])
    if backend == "reference":
        out.numpy()[...] = reference.build_codebook(keys.numpy(), mean.numpy(), excluded=_host(excluded),
                                                    lengths=host_lengths)
    else:
        stored = reference._stored(keys.shape, _host(excluded), host_lengths)
        cpu_self_indexing.build_codebook(keys.numpy(), mean.numpy(), stored, out.numpy())
    return out.give()


def encode(x, mean, channel_scale, *, check_finite: bool = False, out: Encoded | None = None,
           backend: str | None = None, stream=None) -> Encoded:
    """sign(k - mu) and 2 bits of |k - mu| / alpha in groups of 32 channels: head_dim / 2 bytes a token, in one pass.

    x             : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32; outer dimensions may be strided;
                    head_dim a multiple of 32.  Keys after RoPE
    mean          : [batch, kv_heads, head_dim] float32, mu, finite
    channel_scale : [batch, kv_heads, head_dim] float32, alpha: finite, positive and neither it nor 1 / alpha subnormal
                    (`reference.self_indexing.channel_scale` gives such); in device memory it is not looked at
    check_finite  : ValueError where x holds NaN or Inf (in device memory: after a copy of x to the host) instead of
                    codes 0 for that token
    out           : an `Encoded` to write into (default: new).  Its arrays may be slices of a larger store: the tokens
                    of a head follow one another, strides of sequences and heads, counted in tokens, are the same for
                    all of them
    backend       : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256

    Returns `Encoded`: sign [batch, kv_heads, tokens, head_dim / 32] uint32, magnitude a `kivi.Values` of 2 bits.
    Backends agree bit for bit, but for signs of channels where k, mu or k - mu is a subnormal float32, which GPUs may
    count as zero.
    Source: arXiv 2603.14224; reference/self_indexing.py.
    """
    arguments = Arguments("self_indexing.encode", stream=stream)
    x = arguments.take("x", x, "batch kv_heads tokens head_dim", FLOATS, strided=True)
    _check_head_dim(arguments, "x", x.shape[3])
    mean = arguments.take("mean", mean, "batch kv_heads head_dim", ("float32",))
    channel_scale = arguments.take("channel_scale", channel_scale, "batch kv_heads head_dim", ("float32",))
    codes = _result_codes(arguments, out, {"x": x, "mean": mean, "channel_scale": channel_scale})
    backend = choose(backend, arguments, BACKENDS)
    if arguments.device.kind == "cpu":
        alpha = channel_scale.numpy()
        arguments.require(bool((np.isfinite(alpha) & (alpha > 0)).all()), "channel_scale", "positive finite numbers",
                          "others")
    if check_finite:
        require_finite(arguments, x)

    if backend == "reference":
        codes.write(reference.encode(x.numpy(), mean.numpy(), channel_scale.numpy()))
    elif backend == "cpu":
        cpu_self_indexing.encode(x.numpy(), mean.numpy(), channel_scale.numpy(), *codes.on_host_arrays())
    else:
        _check_cuda_head_dim(arguments, "x", x.shape[3], backend)
        arguments.require(x.aligned(16), "x", "rows at multiples of 16 bytes",
                          f"address {x.pointer:#x}, strides {x.strides}")
        if x.size:
            self_indexing_launch.launch_encode(x, mean, channel_scale, codes, backend, arguments)
    return codes.give() if out is None else out


# ---- scores ----------------------------------------------------------------------------------------------------------


def build_tables(query, codebook, *, heads: str = "mean", scale: float = 1.0, out=None, backend: str | None = None,
                 stream=None):
    """L[g, c] = scale <C[g, c], q[4 g ... 4 g + 3]>: what `score` looks up.

    query    : [batch, q_heads, head_dim] float16, bfloat16 or float32; query head h reads KV head h // group
    codebook : [batch, kv_heads, head_dim / 4, 16, 4] float32, from `build_codebook`
    heads    : "mean": one table for the mean query of the heads of a KV head; "each": one for every query head
    scale    : factor, that of the logits or 1
    out      : [batch, kv_heads or q_heads, head_dim / 4, 16] float32 (default: new)
    backend  : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256

    Arithmetic is float32.  Source: arXiv 2603.14224; reference/self_indexing.py.
    """
    arguments = Arguments("self_indexing.build_tables", stream=stream)
    query, codebook, own, scale = _take_query(arguments, query, codebook, heads, scale)
    batch, kv_heads, groups = codebook.shape[:3]
    out = arguments.result("out", out, (batch, kv_heads * own, groups, CODES), "float32")
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        round_into(out, reference.build_tables(query.numpy(), codebook.numpy(), heads=heads, scale=scale))
    elif backend == "cpu":
        cpu_self_indexing.build_tables(query.numpy(), codebook.numpy(), own, scale, out.numpy())
    else:
        _check_cuda_head_dim(arguments, "query", query.shape[2], backend)
        if out.size:
            self_indexing_launch.launch_tables(query, codebook, own, scale, out, backend, arguments)
    return out.give()


def score(query, sign, codebook, *, heads: str = "mean", lengths=None, excluded=None, scale: float = 1.0, out=None,
          backend: str | None = None, stream=None):
    """score[t] = sum_g L[g, code[t, g]] = scale <q, k_vq[t]>: ranks tokens by their signs, head_dim / 8 bytes each.

    query    : [batch, q_heads, head_dim] float16, bfloat16 or float32; query head h reads KV head h // group
    sign     : [batch, kv_heads, tokens, head_dim / 32] uint32, as in `Encoded`, or a slice of a store whose tokens of a
               head follow one another
    codebook : [batch, kv_heads, head_dim / 4, 16, 4] float32, from `build_codebook`
    heads    : "mean": scores of the mean query of the heads of a KV head; "each": of every query head
    lengths  : [batch] int32, tokens of each sequence (default: all), clamped to 0 ... tokens; -inf from there on
    excluded : [batch, kv_heads, positions] int32 of tokens that stay exact: -inf; others than 0 ... tokens - 1 are none
    scale    : factor, that of the logits or 1
    out      : [batch, kv_heads or q_heads, tokens] float32 (default: new)
    backend  : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256; sign rows
               at multiples of 16 bytes (8 for head_dim 64)

    The constant <q, mu>, the same for all tokens, is left out.  Arithmetic is float32.  On CUDA the tables of the query
    are built by the same launch; signs are read once for up to four tables.
    Source: arXiv 2603.14224; reference/self_indexing.py.
    """
    arguments = Arguments("self_indexing.score", stream=stream)
    query, codebook, own, scale = _take_query(arguments, query, codebook, heads, scale)
    sign, strides = _take_sign(arguments, sign)
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    excluded = _take_excluded(arguments, excluded)
    batch, kv_heads, tokens = sign.shape[:3]
    out = arguments.result("out", out, (batch, kv_heads * own, tokens), "float32")
    backend = choose(backend, arguments, BACKENDS)

    if backend in HOST_BACKENDS:
        host_lengths = _host_lengths(lengths, batch, tokens)
    if backend == "reference":
        round_into(out, reference.score(query.numpy(), sign.numpy(), codebook.numpy(), heads=heads,
                                        lengths=host_lengths, excluded=_host(excluded), scale=scale))
    elif backend == "cpu":
        none = np.empty((batch, kv_heads, 0), np.int32)
        cpu_self_indexing.score(query.numpy(), sign.numpy(), codebook.numpy(), own, scale, host_lengths,
                                none if excluded is None else excluded.numpy(), out.numpy())
    else:
        _check_cuda_sign(arguments, sign, backend)
        if out.size:
            self_indexing_launch.launch_score(query, sign, strides, codebook, own, scale, lengths, excluded, out,
                                              backend, arguments)
    return out.give()


def select_top_k(query, sign, codebook, k: int, *, lengths=None, scale: float = 1.0, out: Selection | None = None,
                 scores=None, workspace: selection.Workspace | None = None, backend: str | None = None,
                 stream=None) -> Selection:
    """The k tokens of every KV head with the largest scores of its mean query: `score`, and `selection.select_top_k`.

    query, sign, codebook, lengths, scale, backend : as in `score`, with heads="mean" and nothing excluded
    k         : 0 or more
    out       : a Selection to write into, its lists those of KV heads: indices [batch, kv_heads, tokens] int32, counts
                [batch, kv_heads] int32, mass [batch, kv_heads] float32 (default: new)
    scores    : [batch, kv_heads, tokens] float32 that may be written (default: new where they are needed)
    workspace : from `select_top_k_workspace(...)`, so that nothing is allocated (default: a temporary one)

    On CUDA the scores stay in shared memory, and all is one launch, for a k of up to some hundred and sequences of up
    to some hundred thousand tokens; what else is asked for takes three, with the same result.
    Source: arXiv 2603.14224; Top-k: reference/selection.py.
    """
    arguments = Arguments("self_indexing.select_top_k", stream=stream)
    query, codebook, own, scale = _take_query(arguments, query, codebook, "mean", scale)
    sign, strides = _take_sign(arguments, sign)
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    selection.check_count(arguments, "k", k, 0)
    batch, kv_heads, tokens = sign.shape[:3]
    result = selection.take_result(arguments, out, batch, kv_heads, kv_heads, tokens)
    if scores is not None:
        scores = arguments.result("scores", scores, (batch, kv_heads, tokens), "float32")
    backend = choose(backend, arguments, BACKENDS)

    if backend not in HOST_BACKENDS:
        _check_cuda_sign(arguments, sign, backend)
        parts, span = selection.parts_of(tokens, batch * kv_heads, backend, sign.device)
        scratch = selection.take_workspace(arguments, workspace, batch * kv_heads, parts, tokens)
        if selection.in_one_launch(k, parts, span, scratch) and span <= self_indexing_launch.TOP_K_SPAN:
            if result.counts.size:
                self_indexing_launch.launch_top_k(query, sign, strides, codebook, scale, lengths, k, parts, span,
                                                  scratch, result, backend, arguments)
            return selection.give(result)
        workspace = scratch
    logits = score(query, sign, codebook, lengths=lengths, scale=scale, out=scores, backend=backend, stream=stream)
    selection.select_top_k(Scores(logits), k, lengths=lengths, out=result, workspace=workspace, backend=backend,
                           stream=stream)
    return selection.give(result)


def select_top_k_workspace(batch: int, kv_heads: int, tokens: int, device, *, framework: str | None = None,
                           stream=None) -> selection.Workspace:
    """Scratch of `select_top_k` for at most these sizes: that of a selection among a row per KV head."""
    return selection.workspace(batch, kv_heads, tokens, device, framework=framework, stream=stream)


# ---- attention -------------------------------------------------------------------------------------------------------


def sparse_attention_packed(query, keys: Encoded, values: kivi.Values, channel_scale, indices=None, counts=None, *,
                            lengths=None, mean=None, exact_keys=None, exact_values=None, exact_lengths=None,
                            scale: float | None = None, splits: int | None = None, return_lse: bool = False, out=None,
                            lse=None, workspace: attention.Workspace | None = None, early: bool = False,
                            backend: str | None = None, stream=None):
    """One softmax over the selected tokens, dequantised from the packed store, and the exact ones.

    query         : [batch, q_heads, head_dim] float16, bfloat16 or float32; query head h reads KV head h // group
    keys          : of [batch, kv_heads, tokens, head_dim], as `encode` gave them, or slices of a store
    values        : a `kivi.Values` of 2 or 4 bits in groups of 32 channels, or slices of a store
    channel_scale : [batch, kv_heads, head_dim] float32, alpha
    indices       : [batch, kv_heads, slots] int32, positions of the selected tokens, none twice; any order is right
                    (default: all tokens)
    counts        : [batch, kv_heads] int32, entries of each list, clamped to 0 ... slots; what lies beyond is not read
    lengths       : [batch] int32, tokens of each store (default: all), clamped; entries outside 0 ... length - 1 are
                    left out, since checking them would wait for the device
    mean          : [batch, kv_heads, head_dim] float32, mu (default 0): scale <q, mu> is added to the logits of
                    selected tokens, so that they merge with keys that were not centred
    exact_keys    : [batch, kv_heads, exact, head_dim], query's dtype, not centred, outer dimensions may be strided:
                    sinks and tail (default: none); exact_values likewise
    exact_lengths : [batch] int32, how many of them there are (default: all), clamped to 0 ... exact
    scale         : factor of the logits (default head_dim ** -0.5)
    splits        : thread blocks per sequence and KV head (default: enough to fill the GPU); cpu and reference do not
                    split
    return_lse    : also return the natural log-sum-exp of the logits, with which partial results merge
    out, lse      : [batch, q_heads, head_dim] in query's dtype or float32;  [batch, q_heads] float32 (default: new)
    workspace     : from `workspace(...)`, so that nothing is allocated (default: a temporary one)
    early         : True: the last call in the stream made indices and counts, and all else was there before that began;
                    then this may begin before that has ended (GPUs of compute capability 9.0 and above)
    backend       : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256,
                    group <= 16

    Returns out, or (out, lse); output 0 and lse -inf where there is nothing to attend to.  Arithmetic is float32.
    Source: arXiv 2603.14224; split and merge: arXiv 1805.02867, section 3.1.
    """
    arguments = Arguments("self_indexing.sparse_attention_packed", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    _check_head_dim(arguments, "query", query.shape[2])
    keys = _take_codes(arguments, "keys", keys)
    values = _take_values(arguments, values)
    group = check_heads(arguments, query.shape[2])
    channel_scale = arguments.take("channel_scale", channel_scale, "batch kv_heads head_dim", ("float32",))
    arguments.require((indices is None) == (counts is None), "counts", "indices and counts, or neither", "one of them")
    indices = arguments.take("indices", indices, "batch kv_heads slots", ("int32",), strided=True, optional=True)
    counts = arguments.take("counts", counts, "batch kv_heads", ("int32",), optional=True)
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    mean = arguments.take("mean", mean, "batch kv_heads head_dim", ("float32",), optional=True)
    arguments.require((exact_keys is None) == (exact_values is None), "exact_values", "keys and values, or neither",
                      "one of them")
    exact = [arguments.take(name, x, "batch kv_heads exact head_dim", (query.dtype,), strided=True, optional=True)
             for name, x in (("exact_keys", exact_keys), ("exact_values", exact_values))]
    exact_lengths = arguments.take("exact_lengths", exact_lengths, "batch", ("int32",), optional=True)
    arguments.require(exact_lengths is None or exact[0] is not None, "exact_lengths", "exact_keys, whose number it is",
                      "none")
    scale = attention.check_scale(arguments, scale, query.shape[2])
    out, lse = attention.take_results(arguments, query, splits, out, lse, return_lse)
    backend = choose(backend, arguments, BACKENDS)
    batch, kv_heads, tokens = keys.sign.shape[:3]

    if backend in HOST_BACKENDS:
        none = np.empty((batch, kv_heads, 0, query.shape[2]), query.numpy().dtype)
        host_exact = [none if x is None else x.numpy() for x in exact]
        stored = _host_lengths(lengths, batch, tokens)
        listed = (np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, kv_heads, tokens)),
                  np.repeat(stored[:, None], kv_heads, axis=1))
        if indices is not None:
            listed = indices.numpy(), np.clip(counts.numpy(), 0, indices.shape[2])
        exact_counts = _host_lengths(exact_lengths, batch, host_exact[0].shape[2])
    if backend == "reference":
        output, log_sum = reference.sparse_attention_packed(
            query.numpy(), keys.on_host(), values.on_host(), channel_scale.numpy(), *listed, lengths=stored,
            mean=_host(mean), exact_keys=host_exact[0], exact_values=host_exact[1], exact_lengths=exact_counts,
            scale=scale)
        round_into(out, output)
        if lse is not None:
            lse.numpy()[...] = log_sum
    elif backend == "cpu":
        cpu_self_indexing.sparse_attention_packed(
            query.numpy(), *keys.on_host_arrays(), channel_scale.numpy(), *values.on_host_arrays(), values.bits,
            *listed, stored, _host(mean), *host_exact, exact_counts, scale, out.numpy(), _host(lse))
    else:
        attention.check_cuda_heads(arguments, backend, query.shape[2], group)
        wide = {"exact_keys": exact[0], "exact_values": exact[1], **keys.by_name("keys"), **values.by_name("values")}
        for name, array in wide.items():
            row = 16 if array is None else min(16, array.shape[3] * array.itemsize)
            arguments.require(array is None or array.aligned(row), name, f"rows at multiples of {row} bytes",
                              "others: copy it")
        if batch:
            self_indexing_launch.launch_attention(
                query, keys, values, channel_scale, indices, counts, lengths, mean, *exact, exact_lengths, scale,
                splits, out, lse, workspace, early, backend, arguments)
    return (out.give(), lse.give()) if return_lse else out.give()


# ---- validation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    """A `kivi.Values` whose arrays were validated, with the strides of sequences and heads in tokens."""

    codes: Array
    scale: Array
    minimum: Array
    bits: int
    strides: tuple[int, int]

    def by_name(self, name: str) -> dict[str, Array]:
        return {f"{name}.{part}": getattr(self, part) for part in ("codes", "scale", "minimum")}

    def on_host_arrays(self) -> tuple[np.ndarray, ...]:
        return self.codes.numpy(), self.scale.numpy(), self.minimum.numpy()

    def on_host(self) -> kivi.Values:
        return kivi.Values(*self.on_host_arrays(), self.bits, GROUP)


@dataclass(frozen=True)
class _Codes:
    """An `Encoded`, likewise."""

    sign: Array
    magnitude: _Values

    @property
    def strides(self) -> tuple[int, int]:
        return self.magnitude.strides

    def by_name(self, name: str) -> dict[str, Array]:
        return {f"{name}.sign": self.sign, **self.magnitude.by_name(f"{name}.magnitude")}

    def on_host_arrays(self) -> tuple[np.ndarray, ...]:
        return self.sign.numpy(), *self.magnitude.on_host_arrays()

    def on_host(self) -> Encoded:
        return Encoded(self.sign.numpy(), self.magnitude.on_host())

    def give(self) -> Encoded:
        magnitude = self.magnitude
        return Encoded(self.sign.give(), kivi.Values(magnitude.codes.give(), magnitude.scale.give(),
                                                     magnitude.minimum.give(), magnitude.bits, GROUP))

    def write(self, encoded: Encoded) -> None:
        for target, source in zip(self.on_host_arrays(), (encoded.sign, *encoded.magnitude.arrays().values())):
            target[...] = source


def _take_codes(arguments, name, encoded) -> _Codes:
    if not isinstance(encoded, Encoded):
        raise TypeError(f"{arguments.operator}: {name}: expected an Encoded from self_indexing.encode, "
                        f"got {type(encoded).__name__}")
    words = arguments.sizes["head_dim"] // 32
    sign = arguments.take(f"{name}.sign", encoded.sign, f"batch kv_heads tokens {words}", ("uint32",), strided=True)
    magnitude = _take_values(arguments, encoded.magnitude, f"{name}.magnitude", (MAGNITUDE_BITS,))
    strides = _in_tokens(arguments, f"{name}.sign", sign)
    arguments.require(strides == magnitude.strides, f"{name}.sign",
                      f"strides of {list(magnitude.strides)} tokens over sequences and heads, as of the magnitudes",
                      list(strides))
    return _Codes(sign, magnitude)


def _take_values(arguments, values, name="values", bits=(2, 4)) -> _Values:
    if not isinstance(values, kivi.Values):
        raise TypeError(f"{arguments.operator}: {name}: expected a kivi.Values, got {type(values).__name__}")
    arguments.require(values.bits in bits and values.group == GROUP, name,
                      f"{' or '.join(map(str, bits))} bits in groups of {GROUP} channels",
                      f"{values.bits} bits in groups of {values.group}")
    head_dim = arguments.sizes["head_dim"]
    codes = arguments.take(f"{name}.codes", values.codes, f"batch kv_heads tokens {head_dim * values.bits // 32}",
                           ("uint32",), strided=True)
    parameters = [arguments.take(f"{name}.{part}", getattr(values, part), f"batch kv_heads tokens {head_dim // GROUP}",
                                 ("float16",), strided=True) for part in ("scale", "minimum")]
    layouts = [_in_tokens(arguments, f"{name}.{part}", array)
               for part, array in zip(("codes", "scale", "minimum"), (codes, *parameters))]
    arguments.require(layouts[0] == layouts[1] == layouts[2], name,
                      "arrays with the same strides, in tokens, over sequences and heads", [*map(list, layouts)])
    return _Values(codes, *parameters, values.bits, layouts[0])


def _result_codes(arguments, given, inputs) -> _Codes:
    """The codes that `encode` writes: the caller's, apart from the inputs, or new ones in its framework."""
    shape = tuple(arguments.sizes[n] for n in ("batch", "kv_heads", "tokens"))
    head_dim = arguments.sizes["head_dim"]
    if given is None:
        sign, codes = (arguments.result(f"out.{part}", None, (*shape, head_dim // numbers), "uint32")
                       for part, numbers in (("sign", 32), ("magnitude.codes", 16)))
        scale, minimum = (arguments.result(f"out.magnitude.{part}", None, (*shape, head_dim // GROUP), "float16")
                          for part in ("scale", "minimum"))
        return _Codes(sign, _Values(codes, scale, minimum, MAGNITUDE_BITS, (shape[1] * shape[2], shape[2])))
    codes = _take_codes(arguments, "out", given)
    require_writable(arguments, codes.by_name("out"), inputs)
    return codes


def _in_tokens(arguments, name, array) -> tuple[int, int]:
    """Strides of sequences and heads, counted in tokens, of [batch, kv_heads, tokens, row]."""
    row, strides = array.shape[3], array.strides
    arguments.require(strides[2] == row and strides[0] % row == 0 and strides[1] % row == 0, name,
                      f"tokens that follow one another, {row} elements each, and strides in whole tokens",
                      f"strides {list(strides)}")
    return strides[0] // row, strides[1] // row


def _take_query(arguments, query, codebook, heads, scale):
    """(query, codebook, tables of a KV head, scale)"""
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    head_dim = _check_head_dim(arguments, "query", query.shape[2])
    codebook = arguments.take("codebook", codebook, f"batch kv_heads {head_dim // SUBVECTOR} {CODES} {SUBVECTOR}",
                              ("float32",))
    group = check_heads(arguments, head_dim)
    arguments.require(heads in TABLES, "heads", f"one of {', '.join(TABLES)}", repr(heads))
    scale = attention.check_scale(arguments, scale, head_dim)
    return query, codebook, 1 if heads == "mean" else group, scale


def _take_sign(arguments, sign):
    """(signs of a store, strides of sequences and heads in tokens)"""
    sign = arguments.take("sign", sign, f"batch kv_heads tokens {arguments.sizes['head_dim'] // 32}", ("uint32",),
                          strided=True)
    return sign, _in_tokens(arguments, "sign", sign)


def _check_cuda_sign(arguments, sign, backend):
    _check_cuda_head_dim(arguments, "query", arguments.sizes["head_dim"], backend)
    row = min(16, 4 * sign.shape[3])
    arguments.require(sign.aligned(row), "sign", f"rows at multiples of {row} bytes",
                      f"address {sign.pointer:#x}, strides {sign.strides}")


def _take_excluded(arguments, excluded):
    return arguments.take("excluded", excluded, "batch kv_heads positions", ("int32",), optional=True)


def _check_head_dim(arguments, name, head_dim) -> int:
    arguments.require(head_dim > 0 and head_dim % GROUP == 0, name, f"a head_dim that is a multiple of {GROUP}",
                      head_dim)
    return head_dim


def _check_cuda_head_dim(arguments, name, head_dim, backend):
    check_cuda_head_dim(arguments, name, head_dim, backend)


def _host(array):
    return None if array is None else array.numpy()


def _host_lengths(lengths, batch, tokens) -> np.ndarray:
    return np.full(batch, tokens, np.int32) if lengths is None else np.clip(lengths.numpy(), 0, tokens)
