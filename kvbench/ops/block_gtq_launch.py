"""Block-GTQ: a plan as the tables that kernels take, and launches on CUDA, the same for CuPy, nvcc and the emulator.

Everything here has been validated by kvbench/ops/block_gtq.py.  Kernels: cuda_src/block_gtq.cu.
"""
from __future__ import annotations

import functools
import math

import numpy as np

from kvbench import loaders
from kvbench.arrays import Array, Device, empty, upload
from kvbench.cpu.block_gtq import Tables
from kvbench.ops import attention
from kvbench.ops.dispatch import CXX_TYPE, RUN_TIME_TYPE
from kvbench.ops.turboquant_launch import (CUDA_ATTENTION_BITS, attention_side, byte_table, device_rotation,
                                           mean_stride, rotated_back, value_table)
from kvbench.reference.block_gtq import Plan
from kvbench.reference.rotation import Rotation
from kvbench.reference.turboquant import SCALE_MODES, codebook_for

ENCODE_TOKENS = 32       # of a warp
DECODE_TOKENS = 32       # kDecodeTokens of cuda_src/block_gtq.cu; a row in shared memory has one column more
TILE = 16                # coordinates: groups are whole multiples of them
SIMPLE_TOKENS = 256      # of a block of the simple attention kernel
QUERY_HEADS = (4, 16)    # of a KV head, for which an instance of a kernel in float32 has sums
SHARED_BYTES = 232448    # that a block can have


def launch_encode(x, plan: Plan, codes, scale_mode: str, mean, backend: str, arguments) -> None:
    batch, kv_heads, tokens, head_dim = x.shape
    plans = _encode_plans_on_device(plan, x.device)
    parts = 1 if mean is None and x.dtype != "float32" else 2
    warps = 2 if head_dim == 256 else 4                          # kEncodeWarps of cuda_src/block_gtq.cu
    function = loaders.get_function(
        "block_gtq", f"kvb::block_gtq_encode_kernel<{CXX_TYPE[x.dtype]}, {head_dim}, {parts}>", backend, x.device)
    row = 2 * parts * (head_dim + 8) + 4 * (head_dim // 32 + plan.magnitude_words) + 2 * 8    # operands, codes, scalars
    resident = (8 if parts == 2 or head_dim == 256 else {"float16": 16, "bfloat16": 12}[x.dtype]) // warps   # as there
    resident *= loaders.multiprocessors(backend, x.device)
    blocks = min(-(-tokens // (ENCODE_TOKENS * warps)), max(1, resident // (kv_heads * batch)))
    function((blocks, kv_heads, batch), (32 * warps,), (
        x, *map(np.uint64, x.strides[:3]), mean, mean_stride(mean), plans, np.int32(plans.shape[1]),
        _plan_stride(plan, kv_heads), _operands_on_device(plan, x.device),
        np.int32(plan.rotary_dim if plan.pairing == "half" else 0), np.int32(SCALE_MODES.index(scale_mode)),
        *_stored(codes), np.int32(tokens)), shared_bytes=16 * plans.shape[1] + ENCODE_TOKENS * warps * row,
        stream=arguments.stream)


def launch_decode(codes, plan: Plan, out, backend: str, arguments) -> None:
    batch, kv_heads, tokens, head_dim = out.shape
    order, groups, segments, _, centroids, exponents, rotations = _tables_on_device(plan, out.device)
    function = loaders.get_function("block_gtq", f"kvb::block_gtq_decode_kernel<{CXX_TYPE[out.dtype]}, {head_dim}>",
                                    backend, out.device)
    function((-(-tokens // DECODE_TOKENS), kv_heads, batch), (128,), (
        *_stored(codes), order, groups, segments, rotations, centroids, exponents, _plan_stride(plan, kv_heads), out,
        np.int32(tokens)), shared_bytes=4 * head_dim * (DECODE_TOKENS + 1), stream=arguments.stream)


def launch_logits(query, codes, plan: Plan, scale: float, out, backend: str, arguments) -> None:
    batch, kv_heads, tokens = codes.scale.shape[:3]
    q_heads, head_dim = query.shape[1:]
    group, device = q_heads // kv_heads, query.device
    _, _, segments, _, centroids, exponents, _ = _tables_on_device(plan, device)
    folded = empty(query.shape, "float32", device, query.framework, stream=arguments.stream)
    fold = loaders.get_function("block_gtq", f"kvb::block_gtq_fold_kernel<{head_dim}>", backend, device)
    fold((q_heads, batch), (head_dim,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), _matrices_on_device(plan, device),
        _plan_stride(plan, kv_heads), np.float32(scale), folded, np.int32(group)), stream=arguments.stream)
    heads = next(n for n in QUERY_HEADS if group <= n)
    blocks = min(-(-tokens // 256), max(1, 8 * loaders.multiprocessors(backend, device) // (batch * kv_heads)))
    function = loaders.get_function("block_gtq", f"kvb::block_gtq_logits_kernel<{head_dim}, {heads}>", backend, device)
    function((blocks, kv_heads, batch), (256,), (
        folded, *_stored(codes), segments, centroids, exponents, _plan_stride(plan, kv_heads), out, np.int32(tokens),
        np.int32(group)), stream=arguments.stream)


def launch_attention(query, keys, values, plan: Plan, value_rotation, lengths, scale: float, key_mean, splits, out, lse,
                     workspace, backend: str, arguments) -> None:
    if values.bits not in CUDA_ATTENTION_BITS:
        _launch_simple_attention(query, keys, values, plan, value_rotation, lengths, scale, key_mean, splits, out, lse,
                                 workspace, backend, arguments)
        return
    batch, kv_heads, tokens = keys.scale.shape[:3]
    head_dim, device = query.shape[2], query.device
    group = query.shape[1] // kv_heads
    heads = 8 if group <= 8 or head_dim == 256 else 16
    parts = -(-group // heads)
    warps = 16 if head_dim <= 128 and heads == 8 else 8          # kBlockGtqWarps of kvb/block_gtq_attention.cuh
    if splits is None:
        splits = attention.choose_splits(-(-tokens // 32), batch * kv_heads * parts, warps,
                                         loaders.multiprocessors(backend, device))
    scratch = attention.take_workspace(arguments, workspace, splits, device, out.framework)
    order, _, _, rotations, _, exponents, _ = _tables_on_device(plan, device)
    ring, shared_bytes = _attention_ring(head_dim, heads, warps, plan, values.bits)
    function = loaders.get_function("block_gtq", f"kvb::block_gtq_attention_kernel<{head_dim}, {heads}, {values.bits}>",
                                    backend, device)
    with rotated_back(out, value_rotation, backend, arguments) as target:
        function((splits, kv_heads * parts, batch), (32 * warps,), (
            query, np.int32(RUN_TIME_TYPE[query.dtype]), order, *_records_on_device(plan, device), rotations, exponents,
            _plan_stride(plan, kv_heads), *_stored(keys), *attention_side(values),
            *device_rotation(value_rotation, device), *value_table(values.bits), key_mean, mean_stride(key_mean),
            lengths, target, np.int32(RUN_TIME_TYPE[target.dtype]), lse, scratch.partial_output,
            scratch.partial_statistics, scratch.tickets, np.int32(tokens), np.int32(group),
            np.float32(scale * math.log2(math.e)), np.int32(ring)), shared_bytes=shared_bytes, stream=arguments.stream)


def _attention_ring(head_dim: int, heads: int, warps: int, plan: Plan, value_bits: int) -> tuple[int, int]:
    """(tiles in a warp's ring, dynamic shared memory) of block_gtq_attention_kernel: three if there is room.

    In memory: units and offsets of the heads, records of chunks of 112 bytes, centroids of 6 to 8 bits, the query, the
    order of coordinates, the signs of the values' rotation, scalars of a tile per warp, and the rings.  The end of the
    kernel (kvb/splits.cuh) uses the rings again, and needs the rotated rows besides."""
    tile, most_groups, most_rounds = 32, 8, 8
    whole_lines, chunks = attention.whole_lines, head_dim // TILE
    fixed = (whole_lines(8 * heads) + whole_lines(112 * chunks) + 896 + 512 * chunks + 4 * head_dim * (1 + most_rounds)
             + warps * most_groups * tile * 4)
    scalar_bytes = plan.scalars * (2 if plan.exponents is None else 1)
    tile_bytes = (tile * (head_dim // 8 + 4 * plan.magnitude_words) + whole_lines(tile * scalar_bytes)
                  + whole_lines(tile * (head_dim // 8 * value_bits + 2)))
    end = attention.split_shared_bytes(warps, heads, head_dim, 32 * warps) + heads * head_dim * 4
    ring = next(tiles for tiles in (3, 2) if tiles == 2 or fixed + warps * tiles * tile_bytes <= SHARED_BYTES)
    return ring, fixed + max(warps * ring * tile_bytes, end)


def _launch_simple_attention(query, keys, values, plan: Plan, value_rotation, lengths, scale: float, key_mean, splits,
                             out, lse, workspace, backend: str, arguments) -> None:
    """In float32, for values of 5 to 8 bits."""
    batch, kv_heads, tokens = keys.scale.shape[:3]
    head_dim, device = query.shape[2], query.device
    group = query.shape[1] // kv_heads
    _, _, segments, _, centroids, exponents, _ = _tables_on_device(plan, device)
    if splits is None:
        splits = attention.choose_splits(-(-tokens // SIMPLE_TOKENS), batch * kv_heads, 1,
                                         loaders.multiprocessors(backend, device))
    scratch = attention.take_workspace(arguments, workspace, splits, device, out.framework)
    heads = next(n for n in QUERY_HEADS if group <= n)
    function = loaders.get_function("block_gtq", f"kvb::block_gtq_attention_simple_kernel<{head_dim}, {heads}>",
                                    backend, device)
    function((splits, kv_heads, batch), (256,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), _matrices_on_device(plan, device), _plan_stride(plan, kv_heads),
        *_stored(keys), segments, centroids, exponents, *values.arguments(),
        *_values_on_device(values.bits, value_rotation, device), key_mean, mean_stride(key_mean), lengths, out,
        np.int32(RUN_TIME_TYPE[out.dtype]), lse, scratch.partial_output, scratch.partial_statistics, scratch.tickets,
        np.int32(tokens), np.int32(group), np.float32(scale * math.log2(math.e))), stream=arguments.stream)


@functools.lru_cache(maxsize=64)
def tables_of(plan: Plan) -> Tables:
    """The plan as kernels take it; its groups are multiples of 16 coordinates."""
    sizes = sorted({group.size for head in plan.groups for group in head})
    offsets = dict(zip(sizes, np.cumsum([0, *(size**2 for size in sizes)])))
    books = sorted({(group.bits, group.size) for head in plan.groups for group in head})
    boundaries, centroids = np.zeros((len(books), 127), np.float32), np.zeros((len(books), 256), np.float32)
    for i, (bits, size) in enumerate(books):
        codebook = codebook_for(bits, size)
        boundaries[i, : len(codebook.boundaries)] = codebook.boundaries
        centroids[i, : 2**bits] = np.concatenate([codebook.centroids, -codebook.centroids])
    groups = np.zeros((plan.kv_heads, plan.scalars, 5), np.int64)
    segments = np.zeros((plan.kv_heads, plan.head_dim // TILE, 8), np.int32)
    for h, (head, words) in enumerate(zip(plan.groups, plan.plane_words())):
        starts = np.cumsum([0, *words])
        even = 0                                            # segments before this one with an even number of bits
        for g, group in enumerate(head):
            book = books.index((group.bits, group.size))
            groups[h, g] = group.start, group.size, group.bits, book, offsets[group.size]
            for k in range(group.start // TILE, (group.start + group.size) // TILE):
                segments[h, k] = (group.bits, g, book, *(starts[:3] + k), starts[3] + even // 2, even % 2)
                even += group.bits % 2 == 0
    rotations = np.concatenate([plan.rotation_of(size).dense().astype(np.float32).ravel() for size in sizes])
    exponents = np.zeros(plan.kv_heads) if plan.exponents is None else plan.exponents
    return Tables(plan.order.astype(np.int32), groups, segments, rotations, boundaries, centroids,
                  exponents.astype(np.int32))


@functools.lru_cache(maxsize=64)
def matrices_of(plan: Plan) -> np.ndarray:
    """[kv_heads, head_dim, head_dim] float32: what folds a query, q' = q matrix."""
    return np.stack([plan.matrix(h).T for h in range(plan.kv_heads)]).astype(np.float32)


def _plan_stride(plan: Plan, kv_heads: int) -> np.int32:
    """Rows of the tables from one sequence to the next: 0 if all share one plan."""
    return np.int32(0 if plan.kv_heads == kv_heads else kv_heads)


def _stored(codes) -> tuple:
    """sign, magnitude, scalars in float16 or in bytes, strides of sequences and heads in tokens, words, scalars."""
    in_bytes = codes.scale.dtype == "uint8"
    count = codes.scale.shape[3]
    return (codes.sign, codes.magnitude, None if in_bytes else codes.scale, codes.scale if in_bytes else None,
            *(np.uint64(stride // count) for stride in codes.scale.strides[:2]), np.int32(codes.magnitude.shape[3]),
            np.int32(count))


@functools.lru_cache(maxsize=64)
def _tables_on_device(plan: Plan, device: Device) -> tuple[Array, ...]:
    """What `tables_of` gives, as CUDA kernels take it: groups as six words of 32 bits, the last one 1 / size in float,
    rotations transposed; last the rotations as they are."""
    tables = tables_of(plan)
    rotations = np.concatenate([plan.rotation_of(size).dense().T.astype(np.float32).ravel()
                                for size in sorted({group.size for head in plan.groups for group in head})])
    sizes = np.maximum(tables.groups[..., 1:2], 1)
    groups = np.concatenate([tables.groups.astype(np.int32), (1 / sizes).astype(np.float32).view(np.int32)], axis=-1)
    return tuple(upload(np.ascontiguousarray(array), device) for array in (
        tables.order, groups, tables.segments, rotations, tables.centroids, tables.exponents, tables.rotations))


@functools.lru_cache(maxsize=64)
def _operands_on_device(plan: Plan, device: Device) -> Array:
    """The rotations of the plan's sizes, one after another, as B operands of m16n8k16, [size / 16, size / 16, 2, 32, 4]
    words: 256 R_g in two parts of float16, high and what it leaves, each two words of two numbers.  Lane (n, t) has row
    16 * step + 8 * octet + n, columns 2t, 2t + 1, 2t + 8, 2t + 9 of each 16."""
    operands = []
    for size in sorted({group.size for head in plan.groups for group in head}):
        matrix = 256 * plan.rotation_of(size).dense()
        high = matrix.astype(np.float16)
        parts = np.stack([high, (matrix - high).astype(np.float16)])
        # part, step, octet, n, columns, word, t, number
        tiles = parts.reshape(2, size // 16, 2, 8, size // 16, 2, 4, 2)
        operands.append(tiles.transpose(1, 4, 2, 3, 6, 0, 5, 7).ravel().view(np.uint32))
    return upload(np.concatenate(operands), device)


@functools.lru_cache(maxsize=64)
def _encode_plans_on_device(plan: Plan, device: Device) -> Array:
    """[kv_heads, chunks, 4] words: the `EncodePlan` of every head, and its tables, of cuda_src/block_gtq.cu."""
    tables = tables_of(plan)
    heads = []
    for h, order in enumerate(tables.order):
        groups, numbers = np.zeros((8, 8), np.int32), np.zeros(0, np.uint32)
        for i, (start, size, bits, _, rotation) in enumerate(tables.groups[h].tolist()):
            if size == 0:                                       # there for its place alone
                continue
            offsets = []
            for part in encode_tables(bits, size):
                offsets.append(len(numbers))
                numbers = np.concatenate([numbers, part, np.zeros(-len(part) % 4, np.uint32)])
            groups[i] = start, size, bits, rotation, np.float32(1 / size).view(np.int32), *offsets
        heads.append(np.concatenate([groups.ravel().view(np.uint32), tables.segments[h].ravel().view(np.uint32),
                                     np.argsort(order).astype(np.uint16).view(np.uint32),
                                     order.astype(np.uint16).view(np.uint32),
                                     np.int32([tables.exponents[h], 0, 0, 0]).view(np.uint32), numbers]))
    longest = max(map(len, heads))
    return upload(np.stack([np.pad(head, (0, longest - len(head))) for head in heads]).reshape(len(heads), -1, 4),
                  device)


def cells_of(bits: int) -> tuple[int, float]:
    """(count, range) of the cells in which codes of 4 bits and more are searched: `cell_count` of the kernel."""
    return {4: 32, 8: 512}.get(bits, 2**bits), 8.0 if bits == 8 else 4.0


def encode_tables(bits: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words of (levels, search, sums) of an `EncodeGroup` of cuda_src/block_gtq.cu."""
    codebook = codebook_for(bits, size)
    decisions, levels = (np.asarray(x, np.float32) for x in (codebook.boundaries, codebook.centroids))
    if bits <= 3:
        low, middle, high = decisions if bits == 3 else (0, *decisions, 0) if bits == 2 else (0, 0, 0)
        search = np.array([middle, (low + high) / 2, (high - low) / 2], np.float32)
        fields = {2: ((0, 1), (1, 1), (4, 1), (5, 1)), 3: ((0, 3), (2, 3), (4, 3), (6, 3))}.get(bits, ())
        sums = np.zeros({2: 64, 3: 256}.get(bits, 0), np.float32)
        for shift, mask in fields:
            sums += levels[np.arange(len(sums)) >> shift & mask] ** 2
        return levels.view(np.uint32), search.view(np.uint32), sums.view(np.uint32)
    count, end = cells_of(bits)
    scaled = (decisions / end).astype(np.float32)
    of_decision = np.rint(scaled * count).astype(int)           # in float32, to even, as the kernel rounds
    cells = np.zeros((count + 1, 2), np.uint32)
    cells[:, 0] = np.float32(np.inf).view(np.uint32)
    cells[of_decision, 0] = scaled.view(np.uint32)
    cells[:, 1] = np.searchsorted(of_decision, np.arange(count + 1))
    m = np.arange(2 ** (bits - 1), dtype=np.uint32)
    fields = m & 3 | (m >> 2 & 3) << 8 | (m >> 4 & 3) << 16 | m >> 6 << 24
    return levels.view(np.uint32), cells.ravel(), np.stack([(levels**2).view(np.uint32), fields], axis=-1).ravel()


@functools.lru_cache(maxsize=64)
def _records_on_device(plan: Plan, device: Device) -> tuple[Array, Array]:
    """Of every head, as kvb/block_gtq_attention.cuh has them: records of chunks and segments, seven times four words
    each, and centroids of 6 to 8 bits."""
    tables = tables_of(plan)
    records = np.zeros((*tables.segments.shape[:2], 7, 4), np.uint32)
    centroids = np.zeros((len(records), 64 + 128 + 256), np.float16)
    for h, segments in enumerate(tables.segments.tolist()):
        chunks = _chunks_of(tables.groups[h].tolist())
        for i, (count, work, k) in enumerate(chunks):
            bits, g, book, pair, middle, upper, top, half = segments[k]
            levels, first = tables.centroids[book, : 2**bits].astype(np.float16), 2**bits - 64
            positive, negative = levels.reshape(2, -1)
            if bits > 5:
                centroids[h, first : first + 2**bits] = levels
            else:
                entries = np.resize(positive, 16)          # m
                if bits == 2:                              # 2 sigma + m; 4 sigma + 2 m, and any bit 0
                    entries[:4], entries[8:] = levels, np.repeat(levels, 2)
                elif bits <= 3:                            # 4 sigma + m
                    entries[:8] = *np.resize(positive, 4), *np.resize(negative, 4)
                records[h, i, 4], records[h, i, 5] = byte_table(entries[:8]), byte_table(entries[8:])
            sign_to = {1: 2, 2: 1, 3: 2}.get(bits, 0)      # bit of the nibble for that of the first octet
            top_to = 2 if bits == 4 else 0
            for t in range(2):                             # lanes of the first or the second segment, or octet
                second, octet = (t, 0) if count == 2 else (0, t)
                for at, place, to in ((0, k + second, sign_to), (2, 2 * top + half + second, top_to)):
                    records[h, i, t, at : at + 2] = place // 2 * 4, 32 + to - place % 2 * 2 - octet
            records[h, i, 2] = 512 * k, 4 * DECODE_TOKENS * g, 4 * pair, 4 * middle
            records[h, i, 3, :2] = 4 * upper, max(2 * first, 0) + bits
            for j in range(count):
                start, size, *_, rotation = tables.groups[h, g].tolist()
                records[h, k + j, 6] = start, size, rotation, 2 * (count == 2) + j
        for run in range(11):
            until = sum(work - 1 + 5 * (2 - count) <= run for count, work, _ in chunks)
            records[h, run // 4, 3, 2] |= until << run % 4 * 8
    return upload(records, device), upload(centroids, device)


def _chunks_of(groups: list) -> list[tuple[int, int, int]]:
    """(segments, work, first segment) of the chunks of a head, in runs: two segments of a group at a time up to 5 bits,
    then those left over.  Work is the number of bits, 6 for 6 to 8."""
    chunks = []
    for start, size, bits, *_ in groups:
        first, end = start // TILE, (start + size) // TILE
        paired = first if bits > 5 else end - (end - first) % 2
        chunks += [(2, bits, k) for k in range(first, paired, 2)] + [(1, min(bits, 6), k) for k in range(paired, end)]
    return sorted(chunks, key=lambda chunk: (-chunk[0], *chunk[1:]))


@functools.lru_cache(maxsize=64)
def _matrices_on_device(plan: Plan, device: Device) -> Array:
    return upload(matrices_of(plan), device)


@functools.lru_cache(maxsize=64)
def _values_on_device(bits: int, rotation: Rotation, device: Device) -> tuple[Array, np.int32, Array]:
    """Centroids of the values' codes, positive ones first, their bits, and R_v."""
    centroids = codebook_for(bits, rotation.head_dim).centroids
    table = np.zeros(256, np.float32)
    table[: 2**bits] = np.concatenate([centroids, -centroids])
    return upload(table, device), np.int32(bits), upload(rotation.dense().astype(np.float32), device)
