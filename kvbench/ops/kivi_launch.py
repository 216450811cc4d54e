"""KIVI on CUDA: launch geometry, the same for CuPy, nvcc and the emulator.

Everything here has been validated by kvbench/ops/kivi.py.  Kernels: cuda_src/kivi.cu.
"""
from __future__ import annotations

import math

import numpy as np

from kvbench import loaders
from kvbench.ops import attention
from kvbench.ops.dispatch import RUN_TIME_TYPE
from kvbench.reference.kivi import Keys

CUDA_BITS = (2, 4)
CUDA_GROUPS = (32, 64, 128)

TILE = 32                                # tokens that a warp takes at a time
VALUE_STEPS = 4                          # rows that a lane of the value encoder has under way: kValueSteps of kivi.cu


def launch_encode(x, codes, backend, arguments):
    batch, kv_heads, tokens, head_dim = x.shape
    rows, side = batch * kv_heads * tokens, "keys" if codes.kind is Keys else "values"
    # Keys: a block takes 128 tokens, the largest group.  Values: a warp takes VALUE_STEPS times what fits it at once.
    block_rows = 128 if codes.kind is Keys else 4 * VALUE_STEPS * 512 // head_dim
    threads = 256 if codes.kind is Keys and head_dim == 256 else 128
    function = loaders.get_function("kivi", f"kvb::kivi_encode_{side}_kernel<{head_dim}>", backend, x.device)
    function((-(-rows // block_rows),), (threads,), (
        x, np.int32(RUN_TIME_TYPE[x.dtype]), *map(np.uint64, x.strides[:3]), *codes.arguments(), np.int32(codes.bits),
        np.int32(codes.group), np.int32(kv_heads), np.int32(tokens), np.uint32(rows)), stream=arguments.stream)


def launch_decode(codes, out, backend, arguments):
    batch, kv_heads, tokens, head_dim = out.shape
    rows = batch * kv_heads * tokens
    function = loaders.get_function("kivi", f"kvb::kivi_decode_kernel<{head_dim}>", backend, out.device)
    blocks = min(-(-rows // (2048 // head_dim)), 16 * loaders.multiprocessors(backend, out.device))
    function((blocks,), (128,), (
        *codes.arguments(), np.int32(codes.bits), np.int32(codes.group), np.int32(codes.kind is Keys), out,
        np.int32(RUN_TIME_TYPE[out.dtype]), np.int32(kv_heads), np.int32(tokens), np.uint32(rows)),
        stream=arguments.stream)


def launch_logits(query, keys, scale, out, backend, arguments):
    batch, kv_heads, tokens = keys.codes.shape[:3]
    heads, head_dim, device = query.shape[1] // kv_heads, query.shape[2], query.device
    blocks = min(-(-tokens // 256), max(1, 8 * loaders.multiprocessors(backend, device) // (batch * kv_heads)))
    function = loaders.get_function("kivi", f"kvb::kivi_logits_kernel<{head_dim}>", backend, device)
    function((blocks, kv_heads, batch), (256,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), *keys.arguments(), np.int32(keys.bits), np.int32(keys.group),
        np.float32(scale), out, np.int32(tokens), np.int32(heads)), stream=arguments.stream)


def launch_attention(query, keys, values, lengths, scale, splits, out, lse, workspace, backend, arguments):
    batch, kv_heads, tokens = keys.codes.shape[:3]
    head_dim, device = query.shape[2], query.device
    group = query.shape[1] // kv_heads
    heads = 8 if group <= 8 or head_dim == 256 else 16
    parts = -(-group // heads)
    if splits is None:
        splits = attention.choose_splits(-(-tokens // TILE), batch * kv_heads * parts, 8,
                                         loaders.multiprocessors(backend, device))
    scratch = attention.take_workspace(arguments, workspace, splits, device, out.framework)
    function = loaders.get_function(
        "kivi", f"kvb::kivi_attention_kernel<{head_dim}, {heads}, {keys.bits}, {values.bits}>", backend, device)
    function((splits, kv_heads * parts, batch), (256,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), *keys.arguments(), np.int32(keys.group), *values.arguments(),
        np.int32(values.group), lengths, out, np.int32(RUN_TIME_TYPE[out.dtype]), lse, scratch.partial_output,
        scratch.partial_statistics, scratch.tickets, np.int32(tokens), np.int32(group),
        np.float32(scale * math.log2(math.e))),
        shared_bytes=_attention_shared_bytes(head_dim, heads, keys.bits, values.bits), stream=arguments.stream)


def _attention_shared_bytes(head_dim: int, heads: int, key_bits: int, value_bits: int) -> int:
    """Dynamic shared memory of kivi_attention_kernel: the query as operands, a unit per head, and the warps' rings of
    tiles, whose place the end of the kernel (kvb/splits.cuh) takes over."""
    warps = 8
    tile = TILE * head_dim * (key_bits + value_bits) // 8 + 8 * head_dim
    ring = 3 if warps * 3 * tile <= 200 * 1024 else 2
    end = attention.split_shared_bytes(warps, heads, head_dim, 32 * warps)
    return attention.whole_lines(4 * heads) + 4 * heads * head_dim + max(warps * ring * tile, end)
