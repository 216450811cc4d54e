"""Block-GTQ: keys whose RoPE blocks have their own number of bits, another allocation for every KV head, in one call.

Reference: reference/block_gtq.py (layout, too), problems and agreement: block_gtq_records.py.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvbench import registry
from kvbench.arrays import FLOATS, Arguments, Array
from kvbench.cpu import block_gtq as cpu_block_gtq
from kvbench.ops import attention, block_gtq_launch
from kvbench.ops.dispatch import check_cuda_head_dim, check_heads, choose, require_finite, require_writable, round_into
from kvbench.ops.rotated import check_host_mean, host, in_tokens, take_mean
from kvbench.ops.turboquant import finish_on_cpu, take_codes
from kvbench.reference import block_gtq as reference, turboquant
from kvbench.reference.block_gtq import Calibration, Encoded, Plan, blocks, plan, predicted_error, score
from kvbench.reference.planes import Planes
from kvbench.reference.rotation import Rotation

__all__ = ["Calibration", "Encoded", "Plan", "allocate", "blocks", "calibrate", "decode", "decode_attention", "encode",
           "logits", "plan", "predicted_error", "score", "workspace"]

workspace = attention.workspace    # decode attention needs the same scratch

BACKENDS = registry.BACKENDS
HOST_BACKENDS = ("reference", "cpu")     # of calibration and allocation, too: once per layer, or prompt


# ---- calibration and allocation --------------------------------------------------------------------------------------


def calibrate(keys, query=None, *, pairing: str, rotary_dim: int | None = None, centred: bool = False,
              backend: str | None = None, stream=None) -> Calibration:
    """Mean energies of the RoPE blocks of every KV head, EQ = E |q(i)|^2 and EK = E |k(i)|^2.

    keys       : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, after RoPE
    query      : [batch, q_heads, queries, head_dim], of the same tokens or others; None: every EQ is 1
    pairing    : "half" (block i is coordinates i and i + head_dim / 2) or "interleaved" (2 i and 2 i + 1), as the model
                 has it
    rotary_dim : coordinates that RoPE turns, the first ones (default: all)
    centred    : EK is that of k - mean, and the calibration has the mean of the keys of each head
    backend    : reference, cpu (default: cpu): the statistics of a prompt are taken on the host

    Returns a `Calibration` of float64 arrays in host memory.  Vectors with NaN or Inf do not count.
    Source: arXiv 2606.24033; product score: derived in reference/block_gtq.py.
    """
    arguments = Arguments("block_gtq.calibrate", stream=stream)
    keys = arguments.take("keys", keys, "batch kv_heads tokens head_dim", FLOATS, strided=True)
    query = arguments.take("query", query, "batch q_heads queries head_dim", FLOATS, strided=True, optional=True)
    head_dim = keys.shape[3]
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    pairs = blocks(head_dim, pairing, rotary_dim)
    if query is not None:
        check_heads(arguments, head_dim)
    backend = choose(backend, arguments, HOST_BACKENDS)

    if backend == "reference":
        return reference.calibrate(keys.numpy(), host(query), pairing=pairing, rotary_dim=rotary_dim, centred=centred)
    rows = _by_head(keys.numpy(), keys.shape[1])
    mean = _means(rows) if centred else None
    key_energy = _energies(rows, mean, pairs)
    query_energy = np.ones_like(key_energy)
    if query is not None:
        query_energy = _energies(_by_head(query.numpy(), keys.shape[1]), None, pairs)
    return Calibration(query_energy, key_energy, mean, pairing, int(rotary_dim))


def allocate(scores, average_bits: float, *, least: int = 1, most: int = reference.MOST_BITS, tile: int = 2,
             backend: str | None = None, stream=None) -> np.ndarray:
    """Bits of every block that minimise sum_i s_i 4^(-b_i) within the budget: bit after bit to where it gains most.

    scores       : [..., blocks] float64 or float32, finite and at least 0; every row is a head, with its own budget
    average_bits : bits per coordinate; the budget is floor(blocks * average_bits), rounded down to whole tiles
    least, most  : bits of a block, 1 to 8
    tile         : coordinates that get bits together: blocks next to each other in the order of falling scores.  2:
                   every block for itself; all backends but the reference encode tiles of multiples of 16
    backend      : reference, cpu (default: cpu)

    Returns [..., blocks] uint8 in host memory.  Source: arXiv 2606.24033, Theorem 1.
    """
    arguments = Arguments("block_gtq.allocate", stream=stream)
    scores = arguments.take("scores", scores, "... blocks", ("float64", "float32"))
    backend = choose(backend, arguments, HOST_BACKENDS)
    greedy = None if backend == "reference" else cpu_block_gtq.greedy
    return reference.allocate(scores.numpy(), average_bits, least=least, most=most, tile=tile, greedy=greedy)


# ---- keys and their codes --------------------------------------------------------------------------------------------


def encode(x, plan: Plan, *, scale_mode: str = "nc", mean=None, check_finite: bool = False,
           out: Encoded | None = None, backend: str | None = None, stream=None) -> Encoded:
    """Permute, rotate by groups, normalise, code and pack: `plan.bits_per_element` bits for every number.

    x            : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32; outer dimensions may be strided.
                   Keys after RoPE
    plan         : `block_gtq.plan(calibration, average_bits, tile=16 or 32)`, or a `Plan` of any other bits, of the KV
                   heads, or of those of every sequence, one after another.  All are encoded in one call.  cpu:
                   head_dim a multiple of 32, groups of whole multiples of 16; CUDA: head_dim 64, 128, 256 besides
    scale_mode   : "nc" keeps the norm of every group; "plain", "mse", "unbiased": see reference/turboquant.py
    mean         : [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, finite, subtracted from x and never
                   added back: softmax does not see it
    check_finite : ValueError where x holds NaN or Inf instead of NaN scalars for that token
    out          : an `Encoded` to write into (default: new).  Its arrays may be slices of a larger store, as for
                   `turboquant.encode`
    backend      : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128,
                   256

    Returns `Encoded`: sign [batch, kv_heads, tokens, head_dim / 32] uint32, magnitude [batch, kv_heads, tokens, words]
    uint32, scale [batch, kv_heads, tokens, scalars] float16 or uint8.  Arithmetic is float32, or on tensor cores as
    exact: backends agree in every code that is not within 2e-5 of a decision.
    Source: arXiv 2606.24033; each group: TurboQuant, arXiv 2504.19874, Algorithm 1.
    """
    arguments = Arguments("block_gtq.encode", stream=stream)
    x = arguments.take("x", x, "batch kv_heads tokens head_dim", FLOATS, strided=True)
    _check_type(arguments, plan)
    _check_plan(arguments, plan)
    arguments.require(scale_mode in turboquant.SCALE_MODES, "scale_mode",
                      f"one of {', '.join(turboquant.SCALE_MODES)}", repr(scale_mode))
    mean = take_mean(arguments, "mean", mean)
    codes = _result_codes(arguments, out, plan, {"x": x, "mean": mean})
    backend = choose(backend, arguments, BACKENDS)
    if check_finite and backend != "reference":
        require_finite(arguments, x)

    if backend == "reference":
        for b, part, own in _sequences(plan, x.shape, host(mean)):
            codes.write(b, reference.encode(x.numpy()[b], part, scale_mode=scale_mode, mean=own,
                                            check_finite=check_finite))
    elif backend == "cpu":
        check_host_mean(arguments, mean)
        cpu_block_gtq.encode(x.numpy(), host(mean), _checked_tables(arguments, plan), scale_mode, *codes.numpy())
    else:
        _checked_tables(arguments, plan)
        check_cuda_head_dim(arguments, "plan", plan.head_dim, backend)
        if x.size:
            block_gtq_launch.launch_encode(x, plan, codes, scale_mode, mean, backend, arguments)
    return codes.give() if out is None else out


def decode(encoded: Encoded, plan: Plan, *, dtype: str = "float16", out=None, backend: str | None = None, stream=None):
    """x_hat = P^T blockdiag(s_g R_g^T) c, of x - mean if it was centred.

    encoded : as `encode` gave it, or slices of a store: sign and magnitude [batch, kv_heads, tokens, words] uint32,
              scale [batch, kv_heads, tokens, scalars]
    plan    : the one that encoded
    dtype   : of the result: float16, bfloat16 or float32
    out     : [batch, kv_heads, tokens, head_dim] of that dtype (default: new, in the framework of the codes)
    backend : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256

    Arithmetic is float32, rounded once.  Source: arXiv 2606.24033.
    """
    arguments = Arguments("block_gtq.decode", stream=stream)
    codes = _take_keys(arguments, "encoded", encoded, plan)
    arguments.require(dtype in FLOATS, "dtype", f"one of {', '.join(FLOATS)}", repr(dtype))
    out = arguments.result("out", out, (*codes.scale.shape[:3], plan.head_dim), dtype)
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        for b, part, _ in _sequences(plan, codes.scale.shape):
            round_into(out.narrow(0, b.start, b.stop), reference.decode(codes.on_host(b), part))
    elif backend == "cpu":
        cpu_block_gtq.decode(*codes.numpy(), _checked_tables(arguments, plan), out.numpy())
    else:
        _checked_tables(arguments, plan)
        check_cuda_head_dim(arguments, "plan", plan.head_dim, backend)
        if out.size:
            block_gtq_launch.launch_decode(codes, plan, out, backend, arguments)
    return out.give()


def logits(query, encoded: Encoded, plan: Plan, *, scale: float | None = None, out=None, backend: str | None = None,
           stream=None):
    """scale <q_h, x_hat_t> = scale sum_g s_tg <q'_hg, c_tg>: nothing is rotated back, codes are read once per KV head.

    query   : [batch, q_heads, head_dim] float16, bfloat16 or float32; query head h reads KV head h // group
    encoded : keys of [batch, kv_heads, tokens, head_dim], as `encode` gave them, or slices of a store
    plan    : the one that encoded
    scale   : factor of the logits (default head_dim ** -0.5)
    out     : [batch, q_heads, tokens] float32 (default: new)
    backend : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128,
              256, group <= 16

    Of centred keys, the logits lack scale <q_h, mean>.  Arithmetic is float32.  Source: arXiv 2606.24033.
    """
    arguments = Arguments("block_gtq.logits", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    codes = _take_keys(arguments, "encoded", encoded, plan)
    group = check_heads(arguments, plan.head_dim)
    scale = attention.check_scale(arguments, scale, plan.head_dim)
    out = arguments.result("out", out, (*query.shape[:2], codes.scale.shape[2]), "float32")
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        for b, part, _ in _sequences(plan, codes.scale.shape):
            result = reference.logits(query.numpy()[b], codes.on_host(b), part, scale=scale)
            round_into(out.narrow(0, b.start, b.stop), result)
    elif backend == "cpu":
        checked = _checked_tables(arguments, plan)
        cpu_block_gtq.logits(_folded(query.numpy(), codes.scale.shape[1], plan, scale), *codes.numpy(), checked,
                             out.numpy())
    else:
        _checked_tables(arguments, plan)
        check_cuda_head_dim(arguments, "plan", plan.head_dim, backend)
        attention.check_cuda_heads(arguments, backend, plan.head_dim, group)
        if out.size:
            block_gtq_launch.launch_logits(query, codes, plan, scale, out, backend, arguments)
    return out.give()


def decode_attention(query, keys: Encoded, values: turboquant.Encoded, plan: Plan, value_rotation: Rotation, *,
                     lengths=None, scale: float | None = None, key_mean=None, splits: int | None = None,
                     return_lse: bool = False, out=None, lse=None, workspace: attention.Workspace | None = None,
                     backend: str | None = None, stream=None):
    """output_h = sum_t softmax_t(scale <q_h, k_hat_t>) v_hat_t: one decode step on codes, each read once per KV head.

    query      : [batch, q_heads, head_dim] float16, bfloat16 or float32, not rotated; head h reads KV head h // group
    keys       : codes of [batch, kv_heads, tokens, head_dim], as `encode` gave them, centred or not, or slices of a
                 store; the bits of every KV head are those that the plan gives it, in one call
    values     : TurboQuant codes, as `turboquant.encode` gave them, never centred
    plan, value_rotation : those that encoded; with other seeds, for their errors to be independent
    lengths    : [batch] int32, tokens of each sequence (default: all).  Slots from there on are never read; values
                 outside 0..tokens are clamped.  Length 0: output 0, lse -inf
    scale      : factor of the logits (default head_dim ** -0.5)
    key_mean   : [kv_heads, head_dim] or [batch, kv_heads, head_dim] float32, the mean that was subtracted from keys:
                 scale <q, mean> is added to lse, so that it merges with parts whose keys were not centred
    splits     : thread blocks per sequence and KV head (default: enough to fill the GPU); on GPUs
    return_lse : also return the natural log-sum-exp of the logits, with which partial results merge
    out, lse   : [batch, q_heads, head_dim] in query's dtype or float32;  [batch, q_heads] float32 (default: new)
    workspace  : from `attention.workspace(...)`, so that nothing is allocated (default: a temporary one)
    backend    : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256,
                 group <= 16

    Returns out, or (out, lse).  On GPUs, values of 1 to 4 bits take tensor cores: the folded query, centroids and
    weights are rounded to float16, sums are float32.  Else arithmetic is float32, and slower by far on GPUs.
    Source: arXiv 2606.24033; split and merge: arXiv 1805.02867, section 3.1.
    """
    arguments = Arguments("block_gtq.decode_attention", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    keys = _take_keys(arguments, "keys", keys, plan)
    values = take_codes(arguments, "values", values, value_rotation, "value_rotation")
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    group = check_heads(arguments, plan.head_dim)
    scale = attention.check_scale(arguments, scale, plan.head_dim)
    key_mean = take_mean(arguments, "key_mean", key_mean)
    out, lse = attention.take_results(arguments, query, splits, out, lse, return_lse)
    backend = choose(backend, arguments, BACKENDS)
    batch, tokens = query.shape[0], keys.scale.shape[2]
    if backend in HOST_BACKENDS:
        host_lengths = np.full(batch, tokens, np.int32) if lengths is None else np.clip(lengths.numpy(), 0, tokens)

    if backend == "reference":
        stored = values.on_host()
        for b, part, mean in _sequences(plan, keys.scale.shape, host(key_mean)):
            planes = {name: plane[b] for name, plane in stored.planes.arrays().items()}
            own = turboquant.Encoded(Planes.of(planes), stored.scale[b], stored.head_dim)
            output, log_sum = reference.decode_attention(query.numpy()[b], keys.on_host(b), own, part, value_rotation,
                                                         lengths=host_lengths[b], scale=scale, key_mean=mean)
            round_into(out.narrow(0, b.start, b.stop), output)
            if lse is not None:
                lse.numpy()[b] = log_sum
    elif backend == "cpu":
        check_host_mean(arguments, key_mean, "key_mean")
        rotated = np.empty((*query.shape[:2], value_rotation.head_dim), np.float32)
        log_sums = np.empty(query.shape[:2], np.float32)
        codebook = turboquant.codebook_for(values.bits, value_rotation.head_dim)
        cpu_block_gtq.decode_attention(_folded(query.numpy(), keys.scale.shape[1], plan, scale), *keys.numpy(),
                                       _checked_tables(arguments, plan), values.numpy_planes(), values.scale.numpy(),
                                       codebook.centroids, host_lengths, rotated, log_sums)
        finish_on_cpu(query.numpy(), rotated, log_sums, value_rotation, scale, host(key_mean), out.numpy(),
                      None if lse is None else lse.numpy())
    else:
        _checked_tables(arguments, plan)
        check_cuda_head_dim(arguments, "plan", plan.head_dim, backend)
        arguments.require(value_rotation.head_dim == plan.head_dim, "value_rotation",
                          f"size {plan.head_dim}, without padding, on backend {backend!r}", value_rotation.head_dim)
        attention.check_cuda_heads(arguments, backend, plan.head_dim, group)
        if batch:
            block_gtq_launch.launch_attention(query, keys, values, plan, value_rotation, lengths, scale, key_mean,
                                              splits, out, lse, workspace, backend, arguments)
    return (out.give(), lse.give()) if return_lse else out.give()


# ---- validation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Codes:
    """An `Encoded` whose arrays were validated."""

    sign: Array
    magnitude: Array
    scale: Array

    def numpy(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.sign.numpy(), self.magnitude.numpy(), self.scale.numpy()

    def on_host(self, sequences: slice) -> Encoded:
        return Encoded(*(array[sequences] for array in self.numpy()))

    def give(self) -> Encoded:
        return Encoded(self.sign.give(), self.magnitude.give(), self.scale.give())

    def write(self, sequences: slice, encoded: Encoded) -> None:
        for array, values in zip(self.numpy(), (encoded.sign, encoded.magnitude, encoded.scale)):
            array[sequences] = values


def _check_type(arguments, plan):
    if not isinstance(plan, Plan):
        raise TypeError(f"{arguments.operator}: plan: expected a Plan from block_gtq.plan, got {type(plan).__name__}")


def _check_plan(arguments, plan):
    """A plan for the KV heads, or for those of all sequences one after another, and for the same head_dim."""
    batch, kv_heads = (arguments.sizes[name] for name in ("batch", "kv_heads"))
    head_dim = arguments.sizes.setdefault("head_dim", plan.head_dim)
    arguments.require(plan.kv_heads in (kv_heads, batch * kv_heads), "plan",
                      f"one for kv_heads = {kv_heads}, or for batch * kv_heads = {batch * kv_heads}",
                      f"one for {plan.kv_heads}")
    arguments.require(plan.head_dim == head_dim, "plan", f"one for head_dim = {head_dim}", f"one for {plan.head_dim}")


def _sequences(plan, shape, mean=None):
    """(sequences, their plan, their mean), [batch, kv_heads] = shape: all at once if they share one plan, else each."""
    batch, kv_heads = shape[:2]
    if plan.kv_heads == kv_heads:
        yield slice(0, batch), plan, mean
        return
    for b in range(batch):
        own = mean[b : b + 1] if mean is not None and mean.ndim == 3 else mean
        yield slice(b, b + 1), plan.part(b * kv_heads, (b + 1) * kv_heads), own


def _rows(plan: Plan) -> dict[str, tuple[int, str]]:
    """Elements of a token in each array, and their dtype."""
    return {"sign": (-(-plan.head_dim // 32), "uint32"), "magnitude": (plan.magnitude_words, "uint32"),
            "scale": (plan.scalars, "float16" if plan.exponents is None else "uint8")}


def _take_keys(arguments, name, encoded, plan) -> _Codes:
    """The codes that an operator reads, or writes: [batch, kv_heads, tokens, ...] arrays of one layout."""
    if not isinstance(encoded, Encoded):
        raise TypeError(f"{arguments.operator}: {name}: expected an Encoded from block_gtq.encode, "
                        f"got {type(encoded).__name__}")
    _check_type(arguments, plan)
    taken, layouts = {}, {}
    for part, (count, dtype) in _rows(plan).items():
        array = arguments.take(f"{name}.{part}", getattr(encoded, part), f"batch kv_heads tokens {count}", (dtype,),
                               strided=True)
        taken[part] = array
        if count:
            layouts[part] = in_tokens(arguments, f"{name}.{part}", array.strides[:3], count)
    for part, layout in layouts.items():
        arguments.require(layout == layouts["scale"], f"{name}.{part}",
                          f"strides of {list(layouts['scale'])} tokens over sequences and heads, as in {name}.scale",
                          list(layout))
    _check_plan(arguments, plan)
    return _Codes(**taken)


def _result_codes(arguments, given, plan, inputs) -> _Codes:
    """The codes that `encode` writes: the caller's, apart from the `inputs`, or new ones in its framework."""
    shape = tuple(arguments.sizes[name] for name in ("batch", "kv_heads", "tokens"))
    if given is None:
        return _Codes(**{part: arguments.result(f"out.{part}", None, (*shape, count), dtype)
                         for part, (count, dtype) in _rows(plan).items()})
    codes = _take_keys(arguments, "out", given, plan)
    require_writable(arguments, {f"out.{part}": getattr(codes, part) for part in _rows(plan)}, inputs)
    return codes


def _checked_tables(arguments, plan):
    arguments.require(plan.head_dim % 32 == 0, "plan", "head_dim a multiple of 32 on every backend but the reference",
                      plan.head_dim)
    arguments.require(plan.tile() % block_gtq_launch.TILE == 0, "plan",
                      f"groups of multiples of {block_gtq_launch.TILE} coordinates on every backend but the reference "
                      f"(allocate with tile=16 or 32)",
                      f"groups of {sorted({group.size for head in plan.groups for group in head})}")
    return block_gtq_launch.tables_of(plan)


# ---- cpu -------------------------------------------------------------------------------------------------------------


def _folded(query: np.ndarray, kv_heads: int, plan: Plan, scale: float) -> np.ndarray:
    """q', [batch, kv_heads, group, head_dim] float32."""
    batch, q_heads, head_dim = query.shape
    grouped = query.astype(np.float32).reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
    matrices = block_gtq_launch.matrices_of(plan)
    if plan.kv_heads != kv_heads:
        matrices = matrices.reshape(batch, kv_heads, head_dim, head_dim)
    return grouped @ matrices * np.float32(scale)


def _by_head(x: np.ndarray, kv_heads: int) -> np.ndarray:
    """[kv_heads, vectors, head_dim] float32 of [batch, heads, vectors, head_dim], heads a multiple of kv_heads."""
    batch, heads, vectors, head_dim = x.shape
    grouped = np.moveaxis(x.astype(np.float32).reshape(batch, kv_heads, -1, head_dim), 1, 0)
    return np.ascontiguousarray(grouped.reshape(kv_heads, -1, head_dim))


def _means(rows: np.ndarray) -> np.ndarray:
    """[kv_heads, head_dim] float32, of the finite vectors."""
    finite = [head[np.isfinite(head).all(axis=-1)] for head in rows]
    return np.stack([head.mean(axis=0, dtype=np.float64) if len(head) else np.zeros(rows.shape[2])
                     for head in finite]).astype(np.float32)


def _energies(rows: np.ndarray, mean: np.ndarray | None, pairs: np.ndarray) -> np.ndarray:
    result = np.empty((len(rows), len(pairs)))
    cpu_block_gtq.energies(rows, np.zeros((len(rows), rows.shape[2]), np.float32) if mean is None else mean,
                           pairs, result)
    return result
