"""Exact decode attention over a key-value cache, and the merge of partial results.

Reference: reference/attention.py, kernels: cuda_src/attention.cu.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvbench import loaders, registry
from kvbench.arrays import FLOATS, Arguments, Array, Device, empty, zeros
from kvbench.cpu import attention as cpu_attention
from kvbench.ops.dispatch import (CXX_TYPE, EPSILON, SMALLEST_NORMAL, assert_close, check_cuda_head_dim,
                                  check_heads, choose, random_normal, relative_error)
from kvbench.reference import attention as reference
from kvbench.registry import Kernel, Traffic, register

__all__ = ["Workspace", "decode", "merge", "sparse_attention", "workspace"]

MAX_GROUP = 16
MAX_SPLITS = 256     # per sequence and KV head; beyond it the merge costs more than the split gains
BLOCKS_PER_MULTIPROCESSOR = 4    # at most, when splits are chosen
BACKENDS = registry.BACKENDS
HOST_BACKENDS = ("reference", "cpu")


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of split decode kernels; with it and `out=` a decode step allocates nothing.

    One stream at a time.

    partial_output     room for [batch, q_heads, splits, head_dim] float32
    partial_statistics room for [batch, q_heads, splits, 2] float32: reference exponent and total of each part
    tickets            [batch * q_heads] uint32: splits that have finished; zero between launches
    """

    partial_output: Array
    partial_statistics: Array
    tickets: Array

    @property
    def nbytes(self) -> int:
        return self.partial_output.nbytes + self.partial_statistics.nbytes + self.tickets.nbytes


def workspace(batch: int, q_heads: int, head_dim: int, device: Device | str, *,
              framework: str | None = None) -> Workspace:
    """Scratch for any decode operator with at most this batch, q_heads and head_dim, and the splits that it chooses."""
    device = Device.parse(device)
    backend = "simt" if device.kind == "cpu" else "native" if loaders.availability("cuda") else "cuda"
    rows = batch * q_heads
    return _workspace(rows, most_parts(rows, loaders.multiprocessors(backend, device)), head_dim, device, framework)


def most_parts(rows: int, multiprocessors: int) -> int:
    """Partial results that `choose_splits` can lead to for so many query heads in all.

    It makes more than one split only up to BLOCKS_PER_MULTIPROCESSOR, and a block has the query heads of one KV head.
    """
    return min(rows * MAX_SPLITS, max(rows, BLOCKS_PER_MULTIPROCESSOR * multiprocessors * MAX_GROUP))


def _workspace(rows, parts, head_dim, device, framework, stream=None):
    return Workspace(empty((parts * head_dim,), "float32", device, framework, stream=stream),
                     empty((parts * 2,), "float32", device, framework, stream=stream),
                     zeros((rows,), "uint32", device, framework, stream=stream))


def decode(query, keys, values, *, lengths=None, scale: float | None = None, splits: int | None = None,
           return_lse: bool = False, earlier=None, out=None, lse=None, workspace: Workspace | None = None,
           backend: str | None = None, stream=None):
    """output_h = sum_t softmax_t(scale <q_h, k_t>) v_t: one decode step, each key and value byte read once per KV head.

    query     : [batch, q_heads, head_dim] float16, bfloat16 or float32
    keys      : [batch, kv_heads, tokens, head_dim], query's dtype; outer dimensions may be strided (a slice of a larger
                cache, a transposed [batch, tokens, kv_heads, head_dim]); values likewise
    lengths   : [batch] int32, tokens of each sequence (default: all).  Slots from there on are never read; values
                outside 0..tokens are clamped, since checking them would wait for the device.  Length 0:
                output 0, lse -inf
    scale     : factor of the logits (default head_dim ** -0.5)
    splits    : thread blocks per sequence and KV head (default: enough to fill the GPU, and what a workspace has room
                for); the cpu and reference backends do not split
    return_lse: also return the natural log-sum-exp of the logits, with which partial results merge
    earlier   : (output [batch, q_heads, head_dim], lse [batch, q_heads]) float32, of other tokens: what is returned is
                of these and those, as `merge` would make it of both, without a launch of its own
    out, lse  : [batch, q_heads, head_dim] in query's dtype or float32;  [batch, q_heads] float32 (default: new)
    workspace : from `workspace(...)`, so that nothing is allocated (default: a temporary one)
    backend   : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256,
                group <= 16

    Query head h reads KV head h // group.  Returns out, or (out, lse).  float16 and bfloat16 use tensor cores with
    float32 sums and weights rounded to the cache's type; float32 is float32 throughout.
    Source: FlashAttention (arXiv 2205.14135), split and merge: arXiv 1805.02867, section 3.1.
    """
    arguments = Arguments("attention.decode", stream=stream)
    query, keys, values, lengths, scale = _take_inputs(arguments, query, keys, values, lengths, scale)
    if earlier is not None:
        earlier = (arguments.take("earlier[0]", earlier[0], "batch q_heads head_dim", ("float32",)),
                   arguments.take("earlier[1]", earlier[1], "batch q_heads", ("float32",)))
    out, lse = take_results(arguments, query, splits, out, lse, return_lse)
    backend = choose(backend, arguments, BACKENDS)
    tokens = keys.shape[2]
    host_earlier = None if earlier is None or backend not in HOST_BACKENDS else tuple(x.numpy() for x in earlier)
    host_lengths = None if lengths is None or backend not in HOST_BACKENDS else np.clip(lengths.numpy(), 0, tokens)

    if backend == "reference":
        _store_reference(out, lse, reference.decode(query.numpy(), keys.numpy(), values.numpy(), lengths=host_lengths,
                                                    scale=scale, earlier=host_earlier))
    elif backend == "cpu":
        cpu_attention.decode(query.numpy(), keys.numpy(), values.numpy(), host_lengths, scale, host_earlier,
                             out.numpy(), None if lse is None else lse.numpy())
    else:
        check_cuda(arguments, backend, query, keys, values, out)
        if query.shape[0]:
            _launch_decode(query, keys, values, lengths, None, earlier or (None, None), scale, splits, out, lse,
                           workspace, backend, arguments)
    return (out.give(), lse.give()) if return_lse else out.give()


def sparse_attention(query, keys, values, indices, counts, *, lengths=None, first: int = 0, leading=None,
                     scale: float | None = None, splits: int | None = None, return_lse: bool = False, out=None,
                     lse=None, workspace: Workspace | None = None, backend: str | None = None, stream=None):
    """output_h = sum_(t in list) softmax_t(scale <q_h, k_t>) v_t: attention to listed tokens, no other row is read.

    query     : [batch, q_heads, head_dim] float16, bfloat16 or float32
    keys      : [batch, kv_heads, tokens, head_dim], query's dtype, outer dimensions may be strided; values likewise
    indices   : [batch, lists, slots] int32, positions of tokens, none twice; lists = kv_heads (one for all query heads
                of a KV head) or q_heads.  Any order is right, an ascending one reads memory best
    counts    : [batch, lists] int32, entries of each list, clamped to 0..slots; what lies beyond is not read.  A count
                of 0: output 0, lse -inf
    lengths   : [batch] int32, tokens of each sequence (default: all), clamped to 0..tokens; entries outside
                0..length - 1 are left out, since checking them would wait for the device
    first     : slot of token 0: indices and lengths count from there
    leading   : [batch] int32, how many of the `first` slots in front are attended in any case, by all query heads
                (default: none), clamped to 0..first: the exact sinks and tail of a cache

    scale, splits, return_lse, out, lse, workspace and backend are as in `decode`, and so is the precision.  With lists
    per KV head each listed row is read once for all of its query heads; with lists per query head once for each.
    Source: RaBitQCache (arXiv 2606.31519), Quest (arXiv 2406.10774); split and merge: arXiv 1805.02867, section 3.1.
    """
    arguments = Arguments("attention.sparse_attention", stream=stream)
    query, keys, values, lengths, scale = _take_inputs(arguments, query, keys, values, lengths, scale)
    indices = arguments.take("indices", indices, "batch lists slots", ("int32",), strided=True)
    counts = arguments.take("counts", counts, "batch lists", ("int32",))
    batch, q_heads, kv_heads, lists = (arguments.sizes[n] for n in ("batch", "q_heads", "kv_heads", "lists"))
    arguments.require(lists in (kv_heads, q_heads), "indices",
                      f"lists for the {kv_heads} KV heads or the {q_heads} query heads", lists)
    tokens = keys.shape[2]
    first, leading = take_leading(arguments, first, leading, tokens)
    out, lse = take_results(arguments, query, splits, out, lse, return_lse)
    backend = choose(backend, arguments, BACKENDS)

    if backend in HOST_BACKENDS:
        most = tokens - first
        host_lengths = np.full(batch, most, np.int32) if lengths is None else np.clip(lengths.numpy(), 0, most)
        host_counts = np.clip(counts.numpy(), 0, indices.shape[2])
        before = np.zeros(batch, np.int32) if leading is None else np.clip(leading.numpy(), 0, first)
    if backend == "reference":
        _store_reference(out, lse, reference.sparse_attention(
            query.numpy(), keys.numpy(), values.numpy(), indices.numpy(), host_counts, lengths=host_lengths,
            first=first, leading=before, scale=scale))
    elif backend == "cpu":
        cpu_attention.sparse_attention(query.numpy(), keys.numpy(), values.numpy(), indices.numpy(), host_counts,
                                       host_lengths, first, before, scale, out.numpy(),
                                       None if lse is None else lse.numpy())
    else:
        check_cuda(arguments, backend, query, keys, values, out)
        if batch:
            _launch_decode(query, keys, values, lengths, (indices, counts, leading, first), (None, None), scale, splits,
                           out, lse, workspace, backend, arguments)
    return (out.give(), lse.give()) if return_lse else out.give()


def _take_inputs(arguments, query, keys, values, lengths, scale):
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    keys = arguments.take("keys", keys, "batch kv_heads tokens head_dim", (query.dtype,), strided=True)
    values = arguments.take("values", values, "batch kv_heads tokens head_dim", (query.dtype,), strided=True)
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    check_heads(arguments, query.shape[2])
    return query, keys, values, lengths, check_scale(arguments, scale, query.shape[2])


def take_leading(arguments: Arguments, first: int, leading, most: int) -> tuple[int, Array | None]:
    """(first, leading) of `sparse_attention`, validated: `most` is what `first` may be."""
    arguments.require(isinstance(first, int) and not isinstance(first, bool) and 0 <= first <= most, "first",
                      f"an integer from 0 to {most}", repr(first))
    return first, arguments.take("leading", leading, "batch", ("int32",), optional=True)


def take_results(arguments: Arguments, query: Array, splits, out, lse, return_lse: bool) -> tuple[Array, Array | None]:
    """(out, lse) of a decode attention operator, validated or new; lse None unless it is wanted.  Checks `splits`."""
    arguments.require(splits is None or (isinstance(splits, int) and 1 <= splits <= MAX_SPLITS), "splits",
                      f"an integer from 1 to {MAX_SPLITS}", splits)
    out = arguments.result("out", out, "batch q_heads head_dim", (query.dtype, "float32"))
    wants_lse = return_lse or lse is not None
    return out, arguments.result("lse", lse, "batch q_heads", "float32") if wants_lse else None


def _store_reference(out, lse, result):
    with np.errstate(over="ignore"):
        out.numpy()[...] = result[0].astype(out.numpy().dtype)
    if lse is not None:
        lse.numpy()[...] = result[1]


def check_cuda(arguments, backend, query, keys, values, out):
    check_cuda_heads(arguments, backend, query.shape[2], query.shape[1] // keys.shape[1])
    for name, array in (("query", query), ("keys", keys), ("values", values), ("out", out)):
        arguments.require(array.aligned(16), name, "rows at multiples of 16 bytes",
                          f"address {array.pointer:#x}, strides {array.strides}")


def check_scale(arguments: Arguments, scale, head_dim: int) -> float:
    """The logit scale: head_dim ** -0.5 by default; finite."""
    scale = head_dim**-0.5 if scale is None else scale
    arguments.require(isinstance(scale, (int, float, np.number)) and math.isfinite(scale), "scale", "a finite number",
                      scale)
    return float(scale)


def check_cuda_heads(arguments: Arguments, backend: str, head_dim: int, group: int) -> None:
    """What every CUDA decode kernel is built for."""
    check_cuda_head_dim(arguments, "query", head_dim, backend)
    arguments.require(group <= MAX_GROUP, "query",
                      f"at most {MAX_GROUP} query heads per KV head on backend {backend!r}", group)


def choose_splits(tiles: int, pairs: int, tiles_per_block: int, multiprocessors: int) -> int:
    """Splits per (sequence, KV head), such that pairs * splits blocks fill the multiprocessors evenly in few rounds.

    A partly filled last round leaves multiprocessors idle; every further round costs a start, an end and more partial
    results to merge, about 5 % of a round.  No split gets less than `tiles_per_block` tiles.
    """
    most = max(1, min(tiles // tiles_per_block, MAX_SPLITS, BLOCKS_PER_MULTIPROCESSOR * multiprocessors // pairs))

    def merit(splits):
        rounds = -(-pairs * splits // multiprocessors)
        return pairs * splits / (rounds * multiprocessors) - 0.05 * rounds

    return max(range(1, most + 1), key=merit)


def take_workspace(arguments: Arguments, given: Workspace | None, splits: int, device: Device,
                   framework: str) -> Workspace:
    """The caller's workspace, checked for size and device, or a new one."""
    batch, q_heads, head_dim = (arguments.sizes[name] for name in ("batch", "q_heads", "head_dim"))
    if given is None:
        # Allocated on the launch's stream and released after the launch: the frameworks' allocators order both by
        # stream.
        return _workspace(batch * q_heads, batch * q_heads * splits, head_dim, device, framework,
                          arguments.stream if device.kind == "cuda" else None)
    if not isinstance(given, Workspace):
        raise TypeError(f"{arguments.operator}: workspace: expected a Workspace from attention.workspace(), "
                        f"got {type(given).__name__}")
    rows = batch * q_heads * splits
    arguments.require(given.tickets.device == device, "workspace", f"memory on {device}", given.tickets.device)
    arguments.require(given.partial_output.size >= rows * head_dim and given.partial_statistics.size >= rows * 2
                      and given.tickets.size >= batch * q_heads, "workspace",
                      f"room for batch {batch}, q_heads {q_heads}, splits {splits}, head_dim {head_dim}",
                      f"{given.partial_output.size} partial outputs, {given.tickets.size} tickets")
    return given


def whole_lines(size: int) -> int:
    """Bytes of shared memory that `size` take of whole lines: kSharedLine of cuda_src/include/kvb/device.cuh."""
    return -(-size // 128) * 128


def split_shared_bytes(copies: int, heads: int, head_dim: int, threads: int) -> int:
    """Shared memory that the end of a split kernel needs (kvb/splits.cuh): the warps' copies, or the threads' sums."""
    return max(copies * heads * (head_dim + 2) * 4, threads * 24)


def _launch_decode(query, keys, values, lengths, listed, earlier, scale, splits, out, lse, workspace, backend,
                   arguments):
    """listed : (indices, counts, leading, first), or None for all tokens        earlier : (output, lse), or two None"""
    batch, kv_heads, tokens, head_dim = keys.shape
    lists, most = (kv_heads, tokens) if listed is None else listed[0].shape[1:]
    if listed is not None:
        indices, counts, leading, first = listed
        slots, most = most, most + first
    group, device = query.shape[1] // lists, query.device
    kernel = "attention_decode" if listed is None else "attention_sparse"
    if query.dtype == "float32":
        name, tile, tiles_per_block = f"{kernel}_simple_kernel<{head_dim}>", 32, 1
        copies, heads, ring_bytes = 1, MAX_GROUP, (MAX_GROUP * head_dim + 32 * (head_dim + 1)) * 4
    else:
        heads = 8 if group <= 8 else 16
        name = f"{kernel}_kernel<{CXX_TYPE[query.dtype]}, {head_dim}, {heads}>"
        tile, tiles_per_block, copies = 16, 8, 8
        ring_bytes = (8 * 3 * 16 + heads) * head_dim * 2    # 8 warps, kRingUnits units of 16 rows; the queries
    if splits is None:
        splits = choose_splits(-(-most // tile), batch * lists, tiles_per_block,
                               loaders.multiprocessors(backend, device))
    shared_bytes = split_shared_bytes(copies, heads, head_dim, 256)
    if query.dtype == "float32":
        shared_bytes += MAX_GROUP * head_dim * 4    # the copies follow the queries
    scratch = take_workspace(arguments, workspace, splits, device, out.framework)
    function = loaders.get_function("attention", f"kvb::{name}", backend, device)
    extra = () if listed is None else (indices, counts, *map(np.uint64, indices.strides[:2]), np.int32(slots),
                                       np.int32(lists // kv_heads), leading, np.int32(first))
    function((splits, lists, batch), (256,), (
        query, keys, values, lengths, out, lse, scratch.partial_output,
        scratch.partial_statistics, scratch.tickets, *earlier, *map(np.uint64, keys.strides[:3]),
        *map(np.uint64, values.strides[:3]), np.int32(tokens), np.int32(group), np.float32(scale * math.log2(math.e)),
        np.int32(out.dtype == "float32"), *extra), shared_bytes=max(ring_bytes, shared_bytes), stream=arguments.stream)


def merge(outputs, lses, *, out=None, lse=None, backend: str | None = None, stream=None):
    """Merge partial attention results over disjoint sets of tokens: output = sum_i exp(lse_i - lse) output_i.

    outputs : [parts, batch, q_heads, head_dim] float16, bfloat16 or float32
    lses    : [parts, batch, q_heads] float32, natural; -inf for a part without tokens, whose output is not read
    out     : [batch, q_heads, head_dim] float32, float16 or bfloat16 (default: outputs' dtype)
    lse     : [batch, q_heads] float32 (default: new)

    Returns (out, lse).  Source: arXiv 1805.02867, section 3.1.
    """
    arguments = Arguments("attention.merge", stream=stream)
    outputs = arguments.take("outputs", outputs, "parts batch q_heads head_dim", FLOATS)
    lses = arguments.take("lses", lses, "parts batch q_heads", ("float32",))
    parts, head_dim = arguments.sizes["parts"], arguments.sizes["head_dim"]
    arguments.require(parts > 0, "outputs", "at least one part", parts)
    out = arguments.result("out", out, "batch q_heads head_dim", (outputs.dtype, *FLOATS))
    lse = arguments.result("lse", lse, "batch q_heads", "float32")
    backend = choose(backend, arguments, BACKENDS)
    rows = arguments.sizes["batch"] * arguments.sizes["q_heads"]

    if backend == "reference":
        output, log_sum = reference.merge(outputs.numpy(), lses.numpy())
        with np.errstate(over="ignore"):
            out.numpy()[...] = output.astype(out.numpy().dtype)
        lse.numpy()[...] = log_sum
    elif backend == "cpu":
        cpu_attention.merge(outputs.numpy(), lses.numpy(), out.numpy(), lse.numpy())
    elif rows:
        name = f"kvb::attention_merge_kernel<{CXX_TYPE[outputs.dtype]}, {CXX_TYPE[out.dtype]}>"
        function = loaders.get_function("attention", name, backend, outputs.device)
        function((rows,), (min(256, -(-head_dim // 32) * 32),),
                 (outputs, lses, out, lse, np.int32(parts), np.uint64(rows), np.int32(head_dim)),
                 stream=arguments.stream)
    return out.give(), lse.give()


# ---- registry --------------------------------------------------------------------------------------------------------

DECODE_AXES = {"tokens": (32768, 4096, 131072), "head_dim": (128, 64, 256), "kv_heads": (8, 2, 32), "group": (4, 8, 1),
               "batch": (1, 16), "dtype": ("float16", "bfloat16", "float32")}
MERGE_AXES = {"parts": (3, 16), "head_dim": (128, 64, 256), "kv_heads": (8,), "group": (4,), "batch": (16, 1),
              "dtype": ("float32", "float16", "bfloat16")}


SPARSE_AXES = {"tokens": (131072, 32768, 4096), "percent": (2, 10, 5), **{
    axis: DECODE_AXES[axis] for axis in ("head_dim", "kv_heads", "group", "batch", "dtype")}}


def _decode_inputs(problem, rng):
    batch, kv_heads, head_dim = problem["batch"], problem["kv_heads"], problem["head_dim"]
    cache = (batch, kv_heads, problem["tokens"], head_dim)
    return {"query": random_normal(rng, (batch, kv_heads * problem["group"], head_dim), problem["dtype"]),
            "keys": random_normal(rng, cache, problem["dtype"]), "values": random_normal(rng, cache, problem["dtype"]),
            "return_lse": True}


def _decode_traffic(problem):
    size = 4 if problem["dtype"] == "float32" else 2
    cache = problem["batch"] * problem["kv_heads"] * problem["tokens"] * problem["head_dim"] * size
    rows = problem["batch"] * problem["kv_heads"] * problem["group"]
    return Traffic(2 * cache + rows * problem["head_dim"] * size, rows * (problem["head_dim"] * size + 4))


def decode_tolerance(query, keys, values, lengths, scale, dtype) -> tuple[np.ndarray, np.ndarray]:
    """(output allowance [batch, q_heads, head_dim], lse allowance [batch, q_heads]) of float32 decode attention.

    A logit summed in float32 is off by at most delta = (head_dim + 4) eps/2 scale sum_j |q_j k_j|, and so is the
    log-sum-exp, plus the rounding of its own arithmetic.  Logits off by delta change each weight by a factor within
    e^(+-2 delta); weights rounded to the cache's type by one within 1 +- its eps/2, in numerator and total alike (the
    log-sum-exp is that of the rounded weights, so that partial results merge to what one launch gives).  A sum of n
    terms, one after another, is off by n eps/2 of the sum of absolute values: n is all tokens in the float32 kernel;
    with 16-bit caches the tensor cores take 16 at a time, and the CPU 1024 before it merges.  All of these are relative
    to sum_t w_t |v_t|, which is what the allowance multiplies.
    Weights below the normal range of float16 have an absolute error of 2^-33 of the largest weight; float32 subnormals
    may count as zero.
    """
    query, keys, values = (np.asarray(x).astype(np.float64) for x in (query, keys, values))
    batch, q_heads, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    weight_epsilon = 0.0 if dtype == "float32" else EPSILON[dtype]
    one_after_another = tokens if dtype == "float32" else min(tokens, 1024) + tokens / 16
    lengths_or_all = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    valid = np.arange(tokens) < lengths_or_all[:, None]     # [batch, tokens]
    signed_keys, keys, values = keys, *(np.abs(np.where(valid[:, None, :, None], x, 0)) for x in (keys, values))
    grouped = np.abs(query).reshape(batch, kv_heads, -1, head_dim)
    with np.errstate(invalid="ignore", over="ignore"):
        logits = np.einsum("bghd,bgtd->bght", grouped, keys).max(axis=-1, initial=0).reshape(batch, q_heads)
        largest = logits * (head_dim**-0.5 if scale is None else abs(scale))
        delta = (head_dim + 4) * EPSILON["float32"] / 2 * largest
        arithmetic = (8 + math.log2(tokens + 1) + one_after_another) * EPSILON["float32"] / 2
        weighted = reference.decode(query, signed_keys, values, lengths=lengths, scale=scale, return_lse=False)
        factor = np.expm1(2 * delta) + weight_epsilon + 2 * arithmetic
        largest_value = values.max(axis=(2, 3), initial=0).repeat(q_heads // kv_heads, axis=1)
        underflow = (tokens + 2) * SMALLEST_NORMAL + tokens * 2.0**-33 * largest_value
        return (factor[..., None] * weighted + underflow[..., None],
                delta + weight_epsilon / 2 + arithmetic
                + 16 * EPSILON["float32"] * (largest + math.log(tokens + 1) + 1))


def _decode_agreement(inputs, expected, actual):
    dtype = inputs["query"].dtype.name
    output, lse = decode_tolerance(inputs["query"], inputs["keys"], inputs["values"], inputs.get("lengths"),
                                   inputs.get("scale"), dtype)
    stored = np.asarray(actual[0]).dtype.name
    if inputs.get("earlier") is not None:
        output, lse = merged_tolerance(inputs, output, lse)
    assert_close(expected[0], actual[0], stored, output, "output")
    assert_close(expected[1], actual[1], "float32", lse, "log-sum-exp")


def merged_tolerance(inputs, output, lse) -> tuple[np.ndarray, np.ndarray]:
    """That of `decode_tolerance`, for a result that is merged with an earlier one.

    Of output = w o + (1 - w) o', w = 1 / (1 + e^(l' - l)), the first part is off by w times its own allowance, and w by
    at most a quarter of the error of l' - l, which the rounding of both and of the difference adds to.
    """
    own, own_lse = reference.decode(*(inputs[name] for name in ("query", "keys", "values")),
                                    lengths=inputs.get("lengths"), scale=inputs.get("scale"))
    earlier, earlier_lse = (np.asarray(x).astype(np.float64) for x in inputs["earlier"])
    finite = [np.where(np.isfinite(x), np.abs(x), 0) for x in (own_lse, earlier_lse)]
    delta = np.where(np.isneginf(own_lse), 0, lse) + EPSILON["float32"] * (8 + 4 * (finite[0] + finite[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        own, earlier = (np.where(np.isneginf(own_of)[..., None], 0, np.abs(x))
                        for own_of, x in ((own_lse, own), (earlier_lse, earlier)))
        return output + (delta[..., None] + 8 * EPSILON["float32"]) * (own + earlier) + 2 * SMALLEST_NORMAL, delta


def _sparse_counts(problem):
    """Tokens of each list."""
    return max(problem["tokens"] * min(problem["percent"], 100) // 100, 1)


def _sparse_inputs(problem, rng):
    """Any tokens, `percent` of them, a list for each KV head."""
    inputs = _decode_inputs(problem, rng)
    batch, kv_heads, tokens = inputs["keys"].shape[:3]
    count = _sparse_counts(problem)
    indices = np.zeros((batch, kv_heads, tokens), np.int32)
    for pair in np.ndindex(batch, kv_heads):
        indices[pair][:count] = np.sort(rng.permutation(tokens)[:count])
    return {**inputs, "indices": indices, "counts": np.full((batch, kv_heads), count, np.int32)}


def _sparse_traffic(problem):
    lists, size = problem["batch"] * problem["kv_heads"], 4 if problem["dtype"] == "float32" else 2
    row_bytes, count = problem["head_dim"] * size, _sparse_counts(problem)
    outputs = lists * problem["group"]
    return Traffic(outputs * row_bytes + lists * (count * (2 * row_bytes + 4) + 4), outputs * (row_bytes + 4))


def sparse_agreement(inputs, expected, actual):
    """The tolerance of `decode` over the listed rows of each list."""
    query, keys, values, indices, counts = (inputs[n] for n in ("query", "keys", "values", "indices", "counts"))
    (batch, lists), dtype = counts.shape, query.dtype.name
    group, lists_per_head = query.shape[1] // lists, lists // keys.shape[1]
    lengths, first, leading = inputs.get("lengths"), inputs.get("first", 0), inputs.get("leading")
    output, lse = np.zeros(query.shape), np.zeros(query.shape[:2])
    for b, i in np.ndindex(batch, lists):
        heads, pair = slice(i * group, (i + 1) * group), (slice(b, b + 1), slice(i // lists_per_head,
                                                                               i // lists_per_head + 1))
        listed = indices[b, i, : min(max(counts[b, i], 0), indices.shape[2])]
        listed = listed[(listed >= 0) & (listed < (keys.shape[2] - first if lengths is None else lengths[b]))]
        listed = np.concatenate([np.arange(0 if leading is None else leading[b]), first + listed])
        (output[b, heads],), (lse[b, heads],) = decode_tolerance(
            query[pair[0], heads], keys[pair][:, :, listed], values[pair][:, :, listed], None, inputs.get("scale"),
            dtype)
    assert_close(expected[0], actual[0], np.asarray(actual[0]).dtype.name, output, "output")
    assert_close(expected[1], actual[1], "float32", lse, "log-sum-exp")


def _merge_inputs(problem, rng):
    shape = (problem["parts"], problem["batch"], problem["kv_heads"] * problem["group"])
    return {"outputs": random_normal(rng, (*shape, problem["head_dim"]), problem["dtype"]),
            "lses": (3 * random_normal(rng, shape, "float32")).astype(np.float32)}


def _merge_traffic(problem):
    rows, size = problem["batch"] * problem["kv_heads"] * problem["group"], 4 if problem["dtype"] == "float32" else 2
    row_bytes = problem["head_dim"] * size + 4
    return Traffic(problem["parts"] * rows * row_bytes, rows * row_bytes)


def _merge_agreement(inputs, expected, actual):
    """Weights exp(lse_i - lse): the rounding of a difference of size |lse| becomes a relative error of the weight.
    float32 subnormals may count as zero."""
    outputs, lses = np.asarray(inputs["outputs"]).astype(np.float64), np.asarray(inputs["lses"]).astype(np.float64)
    finite = np.where(np.isfinite(lses), np.abs(lses), 0).max(axis=0)
    relative = EPSILON["float32"] * (8 + lses.shape[0] + 2 * finite)
    read = np.where(np.isneginf(lses)[..., None], 0, np.abs(outputs)).max(axis=0)
    assert_close(expected[0], actual[0], np.asarray(actual[0]).dtype.name,
                 relative[..., None] * read + (lses.shape[0] + 1) * SMALLEST_NORMAL, "output")
    assert_close(expected[1], actual[1], "float32", relative, "log-sum-exp")


register(Kernel(
    name="attention.decode", reference=reference.decode, operator=decode, backends=BACKENDS, axes=DECODE_AXES,
    inputs=_decode_inputs, traffic=_decode_traffic, agreement=_decode_agreement,
    error=lambda inputs, expected, actual: relative_error(expected[0], actual[0]),
    source="arXiv 2205.14135; arXiv 1805.02867 section 3.1"))
register(Kernel(
    name="attention.sparse_attention", reference=reference.sparse_attention, operator=sparse_attention,
    backends=BACKENDS, axes=SPARSE_AXES, inputs=_sparse_inputs, traffic=_sparse_traffic, agreement=sparse_agreement,
    error=lambda inputs, expected, actual: relative_error(expected[0], actual[0]),
    source="arXiv 2606.31519; arXiv 2406.10774; arXiv 1805.02867 section 3.1"))
register(Kernel(
    name="attention.merge", reference=reference.merge, operator=merge, backends=BACKENDS, axes=MERGE_AXES,
    inputs=_merge_inputs, traffic=_merge_traffic, agreement=_merge_agreement,
    error=lambda inputs, expected, actual: relative_error(expected[0], actual[0]),
    source="arXiv 1805.02867 section 3.1"))
