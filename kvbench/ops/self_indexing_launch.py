"""Self-Indexing on CUDA: launch geometry, the same for CuPy, nvcc and the emulator.

Everything here has been validated by kvbench/ops/self_indexing.py.  Kernels: cuda_src/self_indexing.cu.
"""
from __future__ import annotations

import math

import numpy as np

from kvbench import loaders
from kvbench.ops import attention, selection
from kvbench.ops.dispatch import CXX_TYPE, RUN_TIME_TYPE

THREADS, WARPS = 256, 8
SCORE_BLOCKS, ENCODE_BLOCKS = {1: 4, 4: 3}, 4          # that share a multiprocessor; by tables: kScoreBlocks
TOP_K_SPAN = 16384     # tokens of a block of self_indexing_top_k_kernel, at most: centroids share its shared memory
SPARSE_HEADS = {64: 8, 128: 4, 256: 2}                 # query heads of a block of attention: kSparseHeads


def launch_encode(x, mean, channel_scale, codes, backend, arguments):
    batch, kv_heads, tokens, head_dim = x.shape
    per_block = WARPS * 32 // (head_dim // 8)
    blocks = _blocks(-(-tokens // per_block), batch * kv_heads, ENCODE_BLOCKS, backend, x.device)
    function = loaders.get_function(
        "self_indexing", f"kvb::self_indexing_encode_kernel<{CXX_TYPE[x.dtype]}, {head_dim}>", backend, x.device)
    function((blocks, kv_heads, batch), (THREADS,), (
        x, *map(np.uint64, x.strides[:3]), mean, channel_scale, *_keys(codes), np.int32(tokens)),
        stream=arguments.stream)


def launch_tables(query, codebook, own, scale, tables, backend, arguments):
    batch, heads, head_dim = tables.shape[0], tables.shape[1], query.shape[2]
    group = query.shape[1] * own // heads
    function = loaders.get_function("self_indexing", f"kvb::self_indexing_tables_kernel<{head_dim}>", backend,
                                    query.device)
    function((heads, batch), (THREADS,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), codebook, tables, np.int32(group), np.int32(own),
        np.float32(scale * own / group)), stream=arguments.stream)


def launch_score(query, sign, strides, codebook, own, scale, lengths, excluded, scores, backend, arguments):
    batch, kv_heads, tokens, _ = sign.shape
    head_dim, group, at_once = query.shape[2], query.shape[1] // kv_heads, 1 if own == 1 else 4
    heads = kv_heads * -(-own // at_once)
    blocks = _blocks(-(-tokens // THREADS), batch * heads, SCORE_BLOCKS[at_once], backend, query.device)
    function = loaders.get_function("self_indexing", f"kvb::self_indexing_score_kernel<{head_dim}, {at_once}>", backend,
                                    query.device)
    function((blocks, heads, batch), (THREADS,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), sign, *map(np.uint64, strides), codebook, lengths, excluded,
        np.int32(0 if excluded is None else excluded.shape[2]), scores, np.int32(tokens), np.int32(group),
        np.int32(own), np.float32(scale * own / group)), stream=arguments.stream)


def launch_top_k(query, sign, strides, codebook, scale, lengths, k, parts, span, scratch, result, backend, arguments):
    batch, kv_heads, tokens, _ = sign.shape
    head_dim, group = query.shape[2], query.shape[1] // kv_heads
    function = loaders.get_function("self_indexing", f"kvb::self_indexing_top_k_kernel<{head_dim}>", backend,
                                    query.device)
    function((parts, kv_heads, batch), (selection.THREADS,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), sign, *map(np.uint64, strides), codebook, lengths,
        np.int32(tokens), np.int32(group), np.float32(scale / group), np.int32(span),
        *selection.top_k_arguments(k, parts, span, scratch, result)),
        shared_bytes=selection.top_k_shared_bytes(span), stream=arguments.stream)


def launch_attention(query, keys, values, channel_scale, indices, counts, lengths, mean, exact_keys, exact_values,
                     exact_lengths, scale, splits, out, lse, workspace, early, backend, arguments):
    batch, kv_heads, tokens, _ = keys.sign.shape
    head_dim, device, group = query.shape[2], query.device, query.shape[1] // kv_heads
    heads = SPARSE_HEADS[head_dim]
    parts, exact = -(-group // heads), 0 if exact_keys is None else exact_keys.shape[2]
    slots = tokens if indices is None else indices.shape[2]
    if splits is None:
        splits = attention.choose_splits(-(-(slots + exact) // 32), batch * kv_heads * parts, 1,
                                         loaders.multiprocessors(backend, device))
    scratch = attention.take_workspace(arguments, workspace, splits, device, out.framework)
    shared_bytes = (2 * heads * head_dim + 8) * 4 + attention.split_shared_bytes(WARPS, heads, head_dim, THREADS)
    function = loaders.get_function(
        "self_indexing", f"kvb::self_indexing_attention_kernel<{head_dim}, {values.bits}>", backend, device)
    function((splits, kv_heads * parts, batch), (THREADS,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), *_keys(keys), values.codes, values.scale, values.minimum,
        *map(np.uint64, values.strides), channel_scale, mean, indices,
        *map(np.uint64, (0, 0) if indices is None else indices.strides[:2]), counts, np.int32(slots), lengths,
        np.int32(tokens), *_exact(exact_keys), *_exact(exact_values), exact_lengths, np.int32(exact), out,
        np.int32(RUN_TIME_TYPE[out.dtype]), lse, scratch.partial_output, scratch.partial_statistics, scratch.tickets,
        np.int32(group), np.float32(scale * math.log2(math.e))), shared_bytes=shared_bytes, stream=arguments.stream,
        early=early)


def _keys(codes) -> tuple:
    """Keys as kernels take them: signs, magnitudes, and the strides of sequences and heads."""
    magnitude = codes.magnitude
    return (codes.sign, magnitude.codes, magnitude.scale, magnitude.minimum, *map(np.uint64, codes.strides))


def _exact(array) -> tuple:
    return (array, *map(np.uint64, (0, 0, 0) if array is None else array.strides[:3]))


def _blocks(needed, pairs, resident, backend, device) -> int:
    """Blocks for each of `pairs` heads: as many as there is work for, or as fill the multiprocessors."""
    return max(1, min(needed, resident * loaders.multiprocessors(backend, device) // max(pairs, 1)))
