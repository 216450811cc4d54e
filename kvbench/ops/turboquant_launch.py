"""TurboQuant on CUDA: launch geometry, the same for CuPy, nvcc and the emulator, and the tables that kernels take.

Everything here has been validated by kvbench/ops/turboquant.py.  Kernels: cuda_src/turboquant.cu.
"""
from __future__ import annotations

import contextlib
import functools
import math

import numpy as np
from scipy import special

from kvbench import loaders
from kvbench.arrays import Array, Device, empty, upload
from kvbench.ops import attention, rotation as rotation_operator
from kvbench.ops.dispatch import CUDA_HEAD_DIMS, CXX_TYPE, RUN_TIME_TYPE
from kvbench.reference.turboquant import SCALE_MODES, codebook_for

CUDA_ATTENTION_BITS = (1, 2, 3, 4)
PLANES = ("sign", "mag2_0", "mag2_1", "mag2_2", "mag1")      # in the order in which kernels take them

# Blocks, of one warp each, that share a multiprocessor: kEncodeBlocks and kDecodeBlocks of cuda_src/turboquant.cu.
ENCODE_BLOCKS, DECODE_BLOCKS = {64: 12, 128: 12, 256: 8}, {64: 12, 128: 8, 256: 8}


def launch_encode(x, rotation, codes, scale_mode, mean, backend, arguments):
    factors = None
    if rotation.kind == "haar":
        x, factors = prepared_rows(x, mean, backend, arguments)
        x = rotation_operator.rotate(x, rotation, out=x, backend=backend, stream=arguments.stream)
        mean = None
    batch, kv_heads, tokens, head_dim = x.shape
    function = loaders.get_function("turboquant", f"kvb::turboquant_encode_kernel<{CXX_TYPE[x.dtype]}, {head_dim}>",
                                    backend, x.device)
    function(*row_blocks(x.shape, ENCODE_BLOCKS, backend, x.device), (
        x, *map(np.uint64, x.strides[:3]), *device_rotation(rotation, x.device), mean, mean_stride(mean), factors,
        _codebook_on_device(codes.bits, x.device), np.int32(codes.bits), np.int32(SCALE_MODES.index(scale_mode)),
        *codes.arguments(), np.int32(kv_heads), np.int32(tokens), np.uint32(batch * kv_heads * tokens)),
        shared_bytes=tile_bytes(head_dim, x.itemsize), stream=arguments.stream)


def launch_decode(codes, rotation, out, backend, arguments):
    batch, kv_heads, tokens, head_dim = out.shape
    with rotated_back(out, rotation, backend, arguments) as target:
        function = loaders.get_function(
            "turboquant", f"kvb::turboquant_decode_kernel<{CXX_TYPE[target.dtype]}, {head_dim}>", backend, out.device)
        function(*row_blocks(out.shape, DECODE_BLOCKS, backend, out.device), (
            *codes.arguments(), _codebook_on_device(codes.bits, out.device), np.int32(codes.bits),
            *device_rotation(rotation, out.device), target, np.int32(kv_heads), np.int32(tokens),
            np.uint32(batch * kv_heads * tokens)), shared_bytes=tile_bytes(head_dim, target.itemsize),
            stream=arguments.stream)


def launch_logits(query, codes, rotation, scale, out, backend, arguments):
    batch, kv_heads, tokens = codes.scale.shape
    group, head_dim, device = query.shape[1] // kv_heads, query.shape[2], query.device
    if rotation.kind == "haar":
        query = rotated_on_device(query, rotation, backend, arguments)
    blocks = min(-(-tokens // 256), max(1, 8 * loaders.multiprocessors(backend, device) // (batch * kv_heads)))
    function = loaders.get_function("turboquant", f"kvb::turboquant_logits_kernel<{head_dim}>", backend, device)
    function((blocks, kv_heads, batch), (256,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), *codes.arguments(), _codebook_on_device(codes.bits, device),
        np.int32(codes.bits), *device_rotation(rotation, device), np.float32(scale), out, np.int32(tokens),
        np.int32(group)), stream=arguments.stream)


def launch_attention(query, keys, values, key_rotation, value_rotation, lengths, scale, key_mean, splits, out, lse,
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
    rotated = query if key_rotation.kind == "hadamard" else rotated_on_device(query, key_rotation, backend, arguments)
    # The mean is multiplied with the query that was not rotated.
    if key_mean is not None and rotated is not query:
        key_mean = rotated_on_device(key_mean, key_rotation, backend, arguments)
    function = loaders.get_function(
        "turboquant", f"kvb::turboquant_attention_kernel<{head_dim}, {heads}, {keys.bits}, {values.bits}>", backend,
        device)
    with rotated_back(out, value_rotation, backend, arguments) as target:
        function((splits, kv_heads * parts, batch), (256,), (
            rotated, np.int32(RUN_TIME_TYPE[rotated.dtype]), *attention_side(keys), *attention_side(values),
            *device_rotation(key_rotation, device), *device_rotation(value_rotation, device), *key_table(keys.bits),
            *value_table(values.bits), key_mean, mean_stride(key_mean), lengths, target,
            np.int32(RUN_TIME_TYPE[target.dtype]), lse, scratch.partial_output, scratch.partial_statistics,
            scratch.tickets, np.int32(tokens), np.int32(group), np.float32(scale * math.log2(math.e))),
            shared_bytes=_attention_shared_bytes(head_dim, heads, keys.bits, values.bits), stream=arguments.stream)


def _attention_shared_bytes(head_dim: int, heads: int, key_bits: int, value_bits: int) -> int:
    """Dynamic shared memory of turboquant_attention_kernel: what it holds of the query, the signs of both rotations,
    and the warps' rings of tiles.  The end of the kernel (kvb/splits.cuh) uses the rings again, and needs the rotated
    rows besides."""
    warps, ring, tile, most_rounds = 8, 3, 32, 8
    sides = (attention.whole_lines(tile * (head_dim // 8 * bits + 2)) for bits in (key_bits, value_bits))
    rings = warps * ring * sum(sides)
    end = attention.split_shared_bytes(warps, heads, head_dim, 32 * warps) + heads * head_dim * 4
    query = attention.whole_lines(12 * heads) + head_dim // 32 * (heads // 8) * 512
    return query + 2 * most_rounds * head_dim * 4 + max(rings, end)


def attention_side(codes) -> tuple:
    """Keys or values as the attention kernel takes them, which knows at most one mag2 plane."""
    return (codes.planes["sign"], codes.planes.get("mag2_0"), codes.planes.get("mag1"), codes.scale,
            *map(np.uint64, codes.strides))


def _code_tile(head_dim) -> tuple[int, int]:
    """(rows that a warp takes at a time, lanes that share a row) in the encode and decode kernels."""
    lanes = max(head_dim // 128, 1)
    return 32 // lanes, lanes


def row_blocks(shape, blocks, backend, device):
    """(grid, block) of kernels that take tiles of rows (kvb/row_tiles.cuh), for vectors of that shape."""
    tiles = -(-math.prod(shape[:-1]) // _code_tile(shape[-1])[0])
    return (min(tiles, blocks[shape[-1]] * loaders.multiprocessors(backend, device)),), (32,)


def tile_bytes(head_dim, itemsize):
    """Dynamic shared memory of these kernels: a tile of padded rows."""
    rows, lanes = _code_tile(head_dim)
    return rows * (head_dim * itemsize + 16 * lanes)


def device_rotation(rotation, device) -> tuple:
    """(signs, rounds, remaining scale) as kernels take them; rounds 0, nothing to rotate, for a dense rotation."""
    if rotation.kind == "haar":
        return None, np.int32(0), np.float32(1)
    return (rotation_operator.on_device(rotation, False, device), np.int32(rotation.rounds),
            np.float32(rotation_operator.scaled_signs(rotation)[1]))


def mean_stride(mean):
    """Elements from one sequence's mean to the next: 0 if all share one."""
    return np.uint64(0 if mean is None or len(mean.shape) == 2 else mean.strides[0])


def prepared_rows(x, mean, backend, arguments) -> tuple[Array, Array]:
    """(x - mean times a power of two per vector, [batch, kv_heads, tokens, head_dim] float32; what undoes it, per
    vector): what a dense rotation takes without overflow."""
    batch, kv_heads, tokens, head_dim = x.shape
    prepared = empty(x.shape, "float32", x.device, x.framework, stream=arguments.stream)
    factors = empty(x.shape[:3], "float32", x.device, x.framework, stream=arguments.stream)
    function = loaders.get_function("turboquant", f"kvb::turboquant_prepare_kernel<{CXX_TYPE[x.dtype]}>", backend,
                                    x.device)
    rows = batch * kv_heads * tokens
    function((min(-(-rows // 8), 8 * loaders.multiprocessors(backend, x.device)),), (256,), (
        x, *map(np.uint64, x.strides[:3]), mean, mean_stride(mean), prepared, factors, np.int32(kv_heads),
        np.int32(tokens), np.int32(head_dim), np.uint32(rows)), stream=arguments.stream)
    return prepared, factors


def rotated_on_device(x, rotation, backend, arguments) -> Array:
    """R x in float32, for a dense rotation."""
    rotated = empty(x.shape, "float32", x.device, x.framework, stream=arguments.stream)
    _convert(x, rotated, backend, arguments)
    return _rotate(rotated, rotation, False, backend, arguments)


@contextlib.contextmanager
def rotated_back(out, rotation, backend, arguments):
    """What a kernel shall write that rotates back unless the rotation is dense; out = R^T of it then, at the end."""
    if rotation.kind != "haar":
        yield out
        return
    target = empty(out.shape, "float32", out.device, out.framework, stream=arguments.stream)
    yield target
    _rotate_back(target, rotation, out, backend, arguments)


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
    return byte_table(table)


def byte_table(entries) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    """Eight float16 numbers as byte permutations look them up: the high bytes of 0-3 and of 4-7, then the low bytes."""
    split = np.asarray(entries, np.float16).view(np.uint8).reshape(8, 2)
    return *split[:, 1].copy().view(np.uint32), *split[:, 0].copy().view(np.uint32)
