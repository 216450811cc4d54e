"""RaBitQ on CUDA: launch geometry, the same for CuPy, nvcc and the emulator.

Everything here has been validated by kvbench/ops/rabitq.py.  Kernels: cuda_src/rabitq.cu.
"""
from __future__ import annotations

import math

import numpy as np

from kvbench import loaders
from kvbench.ops import rotation as rotation_operator, selection
from kvbench.ops.dispatch import CXX_TYPE, RUN_TIME_TYPE
from kvbench.ops.turboquant_launch import (device_rotation, mean_stride, prepared_rows, rotated_on_device, row_blocks,
                                           tile_bytes)
from kvbench.reference.rabitq import alignment

ENCODE_BLOCKS = {64: 18, 128: 12, 256: 8}     # per multiprocessor, of one warp: kEncodeBlocks


def launch_encode(keys, rotation, code, key_mean, query_mean, backend, arguments):
    factors = None
    if rotation.kind == "haar":
        keys, factors = prepared_rows(keys, key_mean, backend, arguments)
        keys = rotation_operator.rotate(keys, rotation, out=keys, backend=backend, stream=arguments.stream)
        key_mean = None
        if query_mean is not None:            # its product with the key is that of both, rotated
            query_mean = rotated_on_device(query_mean, rotation, backend, arguments)
    batch, kv_heads, tokens, head_dim = keys.shape
    function = loaders.get_function("rabitq", f"kvb::rabitq_encode_kernel<{CXX_TYPE[keys.dtype]}, {head_dim}>", backend,
                                    keys.device)
    function(*row_blocks(keys.shape, ENCODE_BLOCKS, backend, keys.device), (
        keys, *map(np.uint64, keys.strides[:3]), key_mean, mean_stride(key_mean), query_mean, mean_stride(query_mean),
        *device_rotation(rotation, keys.device), factors, code.sign, code.rescale, code.offset,
        *map(np.uint64, code.strides), np.int32(kv_heads), np.int32(tokens), np.uint32(batch * kv_heads * tokens)),
        shared_bytes=tile_bytes(head_dim, keys.itemsize), stream=arguments.stream)


def launch_quantize(query, rotation, query_mean, kv_heads, query_bits, rounding, seed, step, codes, delta, low, backend,
                    arguments):
    batch, q_heads, head_dim = query.shape
    rotated, query_mean = _rotated_by_matrix(query, query_mean, rotation, backend, arguments)
    function = loaders.get_function("rabitq", f"kvb::rabitq_quantize_kernel<{head_dim}>", backend, query.device)
    function((kv_heads, batch), (128,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), rotated, query_mean, mean_stride(query_mean),
        *device_rotation(rotation, query.device), *_rounding(query, query_bits, rounding, seed, step), codes, delta,
        low, np.int32(q_heads // kv_heads)), stream=arguments.stream)


def launch_score(query, code, rotation, lengths, scale, logits, sigma, backend, arguments, **options):
    batch, kv_heads, tokens = code.rescale.shape
    head_dim, group, device = query.shape[2], query.shape[1] // kv_heads, query.device
    tiles = 1 if group <= 4 else 2 if group <= 8 else 4
    function = loaders.get_function("rabitq", f"kvb::rabitq_score_kernel<{head_dim}, {tiles}>", backend, device)
    blocks = score_blocks(tokens, batch * kv_heads, head_dim, tiles, loaders.multiprocessors(backend, device))
    function((blocks, kv_heads, batch), (256,), (
        *_scored(query, code, rotation, lengths, scale, backend, arguments, **options), logits, sigma),
        stream=arguments.stream)


def launch_top_p(query, code, rotation, lengths, scale, parts, selected, shared_bytes, backend, arguments, **options):
    """selected : what of its arguments concerns the selection"""
    batch, kv_heads, _ = code.rescale.shape
    function = loaders.get_function("rabitq", f"kvb::rabitq_top_p_kernel<{query.shape[2]}>", backend, query.device)
    function((parts, kv_heads, batch), (selection.THREADS,), (
        *_scored(query, code, rotation, lengths, scale, backend, arguments, **options), *selected),
        shared_bytes=shared_bytes, stream=arguments.stream, cooperative=True)


def attention_shared_bytes(head_dim: int, span: int) -> int:
    """Dynamic shared memory of rabitq_attention_kernel: an operand of 8 query heads, and what a selection takes, whose
    place rings (of 16 warps, three units of 16 rows of 16-bit numbers each) and a list take afterwards."""
    rings = 16 * 3 * 16 * head_dim * 2
    return 8 * head_dim * 2 + max(selection.top_p_shared_bytes(span), rings + 4 * selection.EVEN_MOST)


def launch_attention(query, code, rotation, lengths, scale, keys, values, first, leading, out, lse, parts, selected,
                     shared_bytes, workspace, backend, arguments, **options):
    """selected : as of `launch_top_p`        workspace : of attention, checked"""
    batch, kv_heads, _ = code.rescale.shape
    function = loaders.get_function(
        "rabitq", f"kvb::rabitq_attention_kernel<{CXX_TYPE[keys.dtype]}, {query.shape[2]}>", backend, query.device)
    function((parts, kv_heads, batch), (selection.THREADS,), (
        *_scored(query, code, rotation, lengths, scale, backend, arguments, **options), *selected, keys, values,
        *map(np.uint64, keys.strides[:3]), *map(np.uint64, values.strides[:3]), leading, np.int32(first), out, lse,
        workspace.partial_output, workspace.partial_statistics, workspace.tickets,
        np.float32(scale * math.log2(math.e)), np.int32(out.dtype == "float32")),
        shared_bytes=shared_bytes, stream=arguments.stream, cooperative=True)


def _scored(query, code, rotation, lengths, scale, backend, arguments, *, query_bits, rounding, seed, step) -> tuple:
    """What the kernels that score share."""
    head_dim, (_, kv_heads, tokens) = query.shape[2], code.rescale.shape
    rotated, query_mean = _rotated_by_matrix(query, code.query_mean, rotation, backend, arguments)
    return (query, np.int32(RUN_TIME_TYPE[query.dtype]), rotated, code.key_mean, mean_stride(code.key_mean), query_mean,
            mean_stride(query_mean), *device_rotation(rotation, query.device),
            *_rounding(query, query_bits, rounding, seed, step), np.float32(scale),
            np.float32((1 - alignment(head_dim)[1]) / (head_dim - 1)), code.sign, code.rescale, code.offset,
            *map(np.uint64, code.strides), lengths, np.int32(tokens), np.int32(query.shape[1] // kv_heads))


def score_blocks(tokens: int, pairs: int, head_dim: int, tiles: int, multiprocessors: int) -> int:
    """Blocks per sequence and KV head: as many as fit at once, but all with the same number of steps."""
    per_block = 8 * (32 if head_dim == 256 else 64)                  # tokens of a step of 8 warps
    at_once = (3 if tiles == 1 else 2 if tiles == 2 else 1) * multiprocessors      # what registers allow
    most = max(1, at_once // pairs)
    steps = -(-tokens // (per_block * most))
    return max(1, -(-tokens // (per_block * steps)))


def _rotated_by_matrix(query, query_mean, rotation, backend, arguments):
    """(R q, R c_q) for a dense rotation; (None, c_q) for one that kernels do themselves."""
    if rotation.kind == "hadamard":
        return None, query_mean
    return (rotated_on_device(query, rotation, backend, arguments),
            query_mean and rotated_on_device(query_mean, rotation, backend, arguments))


def _rounding(query, query_bits, rounding, seed, step) -> tuple:
    """(bits, random, seed, counter of the first coordinate) as kernels take them: modulo 2^32, as the hash is."""
    return (np.int32(query_bits), np.int32(rounding == "random"), np.uint32(seed % 2**32),
            np.uint32((1 + query.size * int(step)) % 2**32))
