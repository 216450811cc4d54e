"""Which tokens are attended, by their proxy logits: Top-p and Top-k, without a sort, exact and deterministic.

Reference: reference/selection.py, kernels: cuda_src/selection.cu.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kvbench import loaders, registry, trees
from kvbench.arrays import Arguments, Array, Device, empty, zeros
from kvbench.cpu import selection as cpu_selection
from kvbench.ops.dispatch import choose
from kvbench.reference import selection as reference
from kvbench.reference.selection import CALIBRATIONS, NORMALISE, Selection
from kvbench.scores import Scores

__all__ = ["Selection", "Workspace", "select_top_k", "select_top_p", "workspace"]

BACKENDS = registry.BACKENDS
THREADS = 512          # of a block
MAX_GROUP = 16         # query heads of a list
START = 2048           # a thread block's time besides that of its tokens, in tokens: about 2 us
MAX_BLOCKS = 32        # of a row, each of which takes a part
TILE = 2048            # tokens of which each lane of a block takes a group of four
MAX_QUADS = 8          # such groups of a tile, at most
BINS = 2048            # of the histogram
LISTED = 4096          # tokens of a part near the threshold that are listed; where there are more the row is searched
DIGITS = 256           # of that search
TOP_K = 1024           # tokens of a list that is made by one launch, at most: kMerged of cuda_src/include/kvb/top_k.cuh
TOP_K_SPAN = 32768     # tokens of a part then, at most, whose logits are in shared memory, beside
TOP_K_BYTES = 32992    # for all else: TopKMemory
MERGED_BYTES = 65536   # of the logits and tokens of all parts' lists, that take the place of a part's, or more
MOMENTS = 4            # of a part, for "shrink"
BOUNDS_WORDS = 4       # of 4 bytes, per part: PartBounds of cuda_src/selection.cu
SUMS_WORDS = 4         # of 8 bytes, per part: PartSums of cuda_src/include/kvb/top_p.cuh
BRACKET_WORDS = 8      # of 4 bytes, per query head: Bracket, there, too
RENDEZVOUS_WORDS = 64  # of 4 bytes, per list: Rendezvous
TOP_P_PART_WORDS = 4   # of 8 bytes, per part that is counted together with others: TopPPart
ROW_BINS = 8192        # of a query head whose parts are counted together: kRing
TOP_P_HEADS = 4        # query heads of a list that is made by one launch, at most
TOP_P_UNIT = 256       # tokens of a part then: a multiple of this, kTopPUnit
TOP_P_LEAST = 2048     # and as many, on a GPU: three launches take less time for shorter parts
TOP_P_SPAN = 32 * THREADS     # tokens of a part, at most: kTopPSpan
TOP_P_BYTES = 68160    # of shared memory, besides the logits: TopPMemory
TOP_P_STATIC = 13312   # and what a kernel declares itself, at most
EVEN_MOST = 4096       # tokens that are chosen of a part whose block attends to its own alone, at most: kEvenMost
ENTRY_WORDS = 2        # of 4 bytes: Entry


@dataclass(frozen=True)
class Together:
    """Scratch memory of blocks that run at the same time and wait for each other; rows are query heads.

    bins        [rows * ROW_BINS] uint32, zero between launches: tokens that share a bin
    rendezvous  [rows * RENDEZVOUS_WORDS] uint32, zero between launches: where they wait
    parts       [parts * TOP_P_PART_WORDS] uint64, zero between launches: what parts of all rows tell each other
    """

    bins: Array
    rendezvous: Array
    parts: Array


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of the selection kernels; with it and `out=` a selection allocates nothing.  One stream at a time.

    tickets   [rows] uint32, zero between launches        rows = batch * q_heads
    bounds    [parts * BOUNDS_WORDS] uint32, of the parts of all rows: largest keys and weights
    counts    [parts * BINS] uint32: tokens that share a bin        masses   [parts * BINS] float32: their mass
    sums      [parts * SUMS_WORDS] uint64: exact masses
    brackets  [rows * BRACKET_WORDS] uint32: keys between which a prefix ends
    masks     [rows * words] uint32: tokens above, a bit each        words = tokens / 32, rounded up to a multiple of 4
    entries   [parts * listed * ENTRY_WORDS] uint32: tokens inside
    moments   [parts * MOMENTS] float64
    together  of scores and selection in one launch
    """

    tickets: Array
    bounds: Array
    counts: Array
    masses: Array
    sums: Array
    brackets: Array
    masks: Array
    entries: Array
    moments: Array
    together: Together

    @property
    def listed(self) -> int:
        """Tokens of a part that there is room for."""
        return self.entries.size // (self.sums.size // SUMS_WORDS * ENTRY_WORDS)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in trees.arrays_of(self).values())


def workspace(batch: int, q_heads: int, tokens: int, device: Device | str, *, listed: int = LISTED,
              framework: str | None = None, stream=None) -> Workspace:
    """Scratch for selections with at most this batch, q_heads and tokens.

    listed : tokens of a part near the threshold (up to 1/10 from it for p = 0.85, and up to 1/64 for Top-k) that are
        sorted out quickly; where there are more the result is the same, but takes longer
    """
    device = Device.parse(device)
    rows, listed = batch * q_heads, max(min(listed, tokens), 1)

    def new(allocate, size, dtype):
        return allocate((size,), dtype, device, framework, stream=stream)

    backend = "simt" if device.kind == "cpu" else "native" if loaders.availability("cuda") else "cuda"
    multiprocessors = loaders.multiprocessors(backend, device)
    # Fewer rows may have more parts, in all.
    parts = max((n * choose_blocks(tokens, n, multiprocessors) for n in range(1, rows + 1)), default=0)
    at_once = TOP_P_HEADS * loaders.cooperative_blocks(backend, device, THREADS)
    few, most = min(rows, at_once), min(rows * MAX_BLOCKS, at_once)
    return Workspace(new(zeros, rows, "uint32"), new(empty, parts * BOUNDS_WORDS, "uint32"),
                     new(empty, parts * BINS, "uint32"), new(empty, parts * BINS, "float32"),
                     new(empty, parts * SUMS_WORDS, "uint64"), new(empty, rows * BRACKET_WORDS, "uint32"),
                     new(empty, rows * words_of(tokens), "uint32"),
                     new(empty, parts * listed * ENTRY_WORDS, "uint32"), new(empty, parts * MOMENTS, "float64"),
                     Together(new(zeros, few * ROW_BINS, "uint32"), new(zeros, few * RENDEZVOUS_WORDS, "uint32"),
                              new(zeros, most * TOP_P_PART_WORDS, "uint64")))


@lru_cache(maxsize=4096)
def choose_blocks(tokens: int, rows: int, multiprocessors: int) -> int:
    """Thread blocks per row, of at least 1024 tokens, one to a multiprocessor at a time.

    A block takes as long as its tokens do, and as START more for what it does but once.
    """
    def duration(blocks):
        return -(-rows * blocks // multiprocessors) * (tokens / blocks + START)

    return min(range(1, max(min(-(-tokens // 1024), MAX_BLOCKS), 1) + 1), key=duration)


def parts_of(tokens: int, rows: int, backend: str, device: Device) -> tuple[int, int]:
    """(parts of a row, a thread block each; tokens of a part, a multiple of 32)"""
    parts = choose_blocks(tokens, rows, loaders.multiprocessors(backend, device))
    return parts, -(-tokens // (32 * parts)) * 32


def in_one_launch(k: int | None, parts: int, span: int, scratch: Workspace) -> bool:
    """Whether the first k of a row, a list of its own, are chosen by one launch.

    There must be room for the first k of all parts, and some more: as many as share a bin with the last of a part.
    """
    return k is not None and 0 < k + k // 4 <= min(_listed(parts, span, scratch), TOP_K) and span <= TOP_K_SPAN


def top_k_arguments(k: int, parts: int, span: int, scratch: Workspace, result: Selection) -> tuple:
    """What choose_top_k of cuda_src/include/kvb/top_k.cuh needs, as the kernels that call it take it."""
    return (scratch.tickets, scratch.sums, scratch.entries, result.indices, result.counts, result.mass,
            *map(np.int32, (k, _listed(parts, span, scratch), _places(span), scratch.listed)))


def top_k_shared_bytes(span: int) -> int:
    """Dynamic shared memory of these kernels."""
    return TOP_K_BYTES + 8 * _places(span)


def _places(span: int) -> int:
    """Logits, and tokens, of lists that there is room for where those of a part were: a multiple of four."""
    return max(4 * span, MERGED_BYTES) // 8


def _listed(parts: int, span: int, scratch: Workspace) -> int:
    """Tokens that a part lists, at most."""
    return min(scratch.listed, _places(span) // parts)


def together(tokens: int, kv_heads: int, group: int, backend: str, device: Device, scratch: Workspace,
             shared_bytes=None, least: int | None = None) -> tuple[int, int] | None:
    """(parts of a row, tokens of each) if the scores of so many KV heads, of all sequences, and their Top-p can be one
    launch, whose blocks are all on the device at the same time and have the logits of their parts in shared memory.

    shared_bytes : a function: of the tokens of a part, the dynamic shared memory (default: top_p_shared_bytes)
    least        : tokens of a part for which it is worth while (default: TOP_P_LEAST)
    """
    least = TOP_P_LEAST if least is None else least
    shared_bytes = shared_bytes or top_p_shared_bytes
    blocks = loaders.cooperative_blocks(backend, device, THREADS)
    if group > TOP_P_HEADS or not 0 < kv_heads <= blocks:
        return None
    parts = min(blocks // kv_heads, MAX_BLOCKS)
    span = -(-tokens // (TOP_P_UNIT * parts)) * TOP_P_UNIT
    if span < (TOP_P_UNIT if backend == "simt" else least):
        return None
    parts = -(-tokens // span)
    fits = span <= TOP_P_SPAN and shared_bytes(span) + TOP_P_STATIC <= loaders.shared_bytes(backend, device)
    return (parts, span) if fits and _entries(parts, kv_heads * group, scratch) else None


def top_p_arguments(p: float, least: int, most: int | None, parts: int, span: int, logits: Array, scratch: Workspace,
                    result: Selection) -> tuple:
    """What choose_top_p of cuda_src/include/kvb/top_p.cuh needs, as the kernels that call it take it."""
    _, heads, tokens = logits.shape
    rows, shared = logits.shape[0] * heads, scratch.together
    return (np.int32(span), logits, shared.rendezvous, shared.bins, shared.parts, scratch.entries,
            result.indices, result.counts, result.mass, np.uint32(reference.share(p)),
            *map(np.int32, (*_bounds(least, most), _entries(parts, rows, scratch))))


def top_p_shared_bytes(span: int) -> int:
    """Dynamic shared memory of these kernels, with the logits of PartRows."""
    return TOP_P_BYTES + 4 * TOP_P_HEADS * (span + 8)


def _entries(parts: int, rows: int, scratch: Workspace) -> int:
    """Tokens of a part that there is room for."""
    return scratch.entries.size // (ENTRY_WORDS * rows * parts)


def _bounds(least: int, most: int | None) -> tuple[int, int]:
    """Tokens of a prefix, as kernels take them."""
    return min(least, 2**31 - 1), 2**31 - 1 if most is None else min(most, 2**31 - 1)


def words_of(tokens: int) -> int:
    """Of 32 tokens, for a row."""
    return -(-tokens // 128) * 4


def select_top_p(scores, p: float, *, kv_heads: int | None = None, lengths=None, sinks: int = 0, recent: int = 0,
                 block: int = 1, min_tokens: int = 1, max_tokens: int | None = None, normalise: str = "middle",
                 calibrated: bool | str = False, out: Selection | None = None, workspace=None,
                 backend: str | None = None, stream=None) -> Selection:
    """The fewest tokens whose mass reaches p: sum_chosen exp(logit_t) >= p sum_t exp(logit_t), the crossing one too.

    scores     : Scores(logits [batch, q_heads, tokens] float32, sigma: same shape or None); a logit that is not finite
                 is never chosen
    p          : 0 < p <= 1, taken as ceil(65536 p) / 65536; 1 chooses every token
    kv_heads   : one list for the query heads of each KV head, the union of theirs; None: one list per query head
    lengths    : [batch] int32, tokens of each sequence (default: all); clamped to 0..tokens
    sinks, recent, block : the first `sinks` tokens and the last `recent` to `recent + block - 1`, which leave that
                 window in blocks, are always kept: they are no candidates, and are not listed
    min_tokens, max_tokens : bounds of what a query head chooses; None: no upper one
    normalise  : "middle": p of the candidates' mass; "global": of that of all tokens, those always kept included, which
                 need exact logits
    calibrated : False, "shrink" or "shift" (True): what the noise `sigma` does to the mass is corrected, see
                 reference/selection.py
    out        : a Selection to write into (default: new memory)
    workspace  : from `workspace(...)`, so that nothing is allocated (default: a temporary one)
    backend    : reference, cpu, cuda, native, simt (default: by device); the last three: at most 16 query heads a list

    Returns Selection(indices [batch, lists, tokens] int32, ascending, undefined from counts on; counts [batch, lists]
    int32; mass [batch, q_heads] float32, the share that was reached).  Ties belong to the lower index.  Masses are
    integers, so no result depends on the order of sums.
    Source: arXiv 2502.02770 (Top-p pruning), arXiv 2606.31519 (by proxy scores).
    """
    arguments = Arguments("selection.select_top_p", stream=stream)
    check_top_p(arguments, p, min_tokens, max_tokens, normalise, calibrated)
    calibrated = "shift" if calibrated is True else calibrated
    rule = dict(share=reference.share(p), least=min_tokens, most=max_tokens, total=normalise == "global",
                calibrated=calibrated)
    window = dict(sinks=sinks, recent=recent, block=block)

    def by_reference(scores, lengths):
        return reference.top_p(scores, p, lengths=lengths, min_tokens=min_tokens, max_tokens=max_tokens,
                               normalise=normalise, calibrated=calibrated, **window)

    return _select(arguments, scores, lengths, window, rule, kv_heads, out, workspace, backend, by_reference)


def select_top_k(scores, k: int, *, kv_heads: int | None = None, lengths=None, sinks: int = 0, recent: int = 0,
                 block: int = 1, out: Selection | None = None, workspace=None, backend: str | None = None,
                 stream=None) -> Selection:
    """The k tokens with the largest logits, or all: the first k in the order (logit descending, index ascending).

    scores   : Scores(logits [batch, q_heads, tokens] float32, ...); sigma is not looked at
    k        : 0 or more

    kv_heads, lengths, sinks, recent, block, out, workspace, backend and the result are as in `select_top_p`; `mass` is
    the share of the candidates' mass, on CUDA for some hundred tokens of a list per query head a float32 sum in a fixed
    order.  Source: Quest, arXiv 2406.10774; radix descent: reference/selection.py.
    """
    arguments = Arguments("selection.select_top_k", stream=stream)
    check_count(arguments, "k", k, 0)
    rule = dict(share=0, least=k, most=k, total=False, calibrated=False)
    window = dict(sinks=sinks, recent=recent, block=block)

    def by_reference(scores, lengths):
        return reference.top_k(scores, k, lengths=lengths, **window)

    return _select(arguments, scores, lengths, window, rule, kv_heads, out, workspace, backend, by_reference)


def _select(arguments, scores, lengths, window, rule, kv_heads, out, workspace, backend, by_reference):
    for name, least in (("sinks", 0), ("recent", 0), ("block", 1)):
        check_count(arguments, name, window[name], least)
    if not isinstance(scores, Scores):
        raise TypeError(f"{arguments.operator}: scores: expected Scores(logits, sigma), got {type(scores).__name__}")
    logits = arguments.take("scores.logits", scores.logits, "batch q_heads tokens", ("float32",))
    sigma = None
    if rule["calibrated"]:
        arguments.require(scores.sigma is not None, "scores.sigma", "the noise of the logits, for a calibrated "
                          "selection", None)
        sigma = arguments.take("scores.sigma", scores.sigma, "batch q_heads tokens", ("float32",))
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    batch, q_heads, tokens = logits.shape
    if kv_heads is not None:
        check_count(arguments, "kv_heads", kv_heads, 1)
        arguments.require(q_heads % kv_heads == 0, "kv_heads", f"a divisor of the {q_heads} query heads", kv_heads)
    lists = q_heads if kv_heads is None else kv_heads
    result = take_result(arguments, out, batch, q_heads, lists, tokens)
    backend = choose(backend, arguments, BACKENDS)

    if backend in ("reference", "cpu"):
        host_lengths = np.full(batch, tokens, np.int32) if lengths is None else np.clip(lengths.numpy(), 0, tokens)
        host_sigma = None if sigma is None else sigma.numpy()
        arrays_out = result.indices.numpy(), result.counts.numpy(), result.mass.numpy()
    if backend == "reference":
        made = by_reference(Scores(logits.numpy(), host_sigma), host_lengths)
        made = made if kv_heads is None else reference.union(made, kv_heads)
        for array, value in zip(arrays_out, (made.indices, made.counts, made.mass)):
            array[...] = value
    elif backend == "cpu":
        calibration = CALIBRATIONS.index(rule["calibrated"])
        most = tokens if rule["most"] is None else rule["most"]
        cpu_selection.select(logits.numpy(), host_sigma, host_lengths, tuple(window.values()), rule["share"],
                             rule["least"], most, rule["total"], calibration, *arrays_out)
    else:
        arguments.require(q_heads // lists <= MAX_GROUP, "kv_heads",
                          f"at most {MAX_GROUP} query heads a list on backend {backend!r}", q_heads // lists)
        if batch and q_heads:
            _launch(logits, sigma, lengths, window, rule, result, workspace, backend, arguments)
    return give(result)


def take_result(arguments: Arguments, out: Selection | None, batch: int, q_heads: int, lists: int, tokens: int,
                name: str = "out") -> Selection:
    """The caller's Selection, or a new one, as Arrays."""
    if out is not None and not isinstance(out, Selection):
        raise TypeError(f"{arguments.operator}: {name}: expected a Selection, got {type(out).__name__}")
    given = (None, None, None) if out is None else (out.indices, out.counts, out.mass)
    return Selection(arguments.result(f"{name}.indices", given[0], (batch, lists, tokens), "int32"),
                     arguments.result(f"{name}.counts", given[1], (batch, lists), "int32"),
                     arguments.result(f"{name}.mass", given[2], (batch, q_heads), "float32"))


def give(result: Selection) -> Selection:
    """The same arrays in the caller's framework."""
    return Selection(result.indices.give(), result.counts.give(), result.mass.give())


def _launch(logits, sigma, lengths, window, rule, result, workspace, backend, arguments):
    batch, q_heads, tokens = logits.shape
    rows, device, calibration = batch * q_heads, logits.device, CALIBRATIONS.index(rule["calibrated"])
    parts, span = parts_of(tokens, rows, backend, device)
    scratch = take_workspace(arguments, workspace, rows, parts, tokens)
    quads = min(max(-(-span // TILE), 1), MAX_QUADS)
    moments = scratch.moments if calibration else None
    common = (logits, sigma, lengths, np.int32(tokens), np.int32(span), np.int32(quads),
              *(np.int32(min(window[name], 2**31 - 1)) for name in ("sinks", "recent", "block")))
    group = q_heads // result.counts.shape[1]
    total = np.int32(rule["total"])
    bounds = map(np.int32, _bounds(rule["least"], rule["most"]))

    def launch(name, *extra, shared_bytes=0):
        function = loaders.get_function("selection", f"kvb::selection_{name}", backend, device)
        function((parts, q_heads, batch), (THREADS,), (*common, *extra), shared_bytes=shared_bytes,
                 stream=arguments.stream)

    if not rule["share"] and group == 1 and in_one_launch(rule["most"], parts, span, scratch):
        function = loaders.get_function("selection", "kvb::selection_top_k_kernel", backend, device)
        function((parts, q_heads, batch), (THREADS,), (
            *common, *top_k_arguments(rule["most"], parts, span, scratch, result)),
            shared_bytes=top_k_shared_bytes(span), stream=arguments.stream)
        return
    if rule["calibrated"] == "shrink":
        launch("moments_kernel", moments)
    launch(f"histogram_kernel<{calibration}>", moments, scratch.bounds, scratch.counts, scratch.masses, total)
    launch(f"collect_kernel<{calibration}>", moments, scratch.bounds, scratch.counts, scratch.masses, scratch.tickets,
           scratch.brackets, scratch.sums, scratch.masks, scratch.entries, result.indices, result.counts, result.mass,
           np.uint32(rule["share"]), *bounds, total, np.int32(words_of(tokens)), np.int32(scratch.listed),
           np.int32(group), np.int32(rule["most"] is not None), shared_bytes=group * 3 * DIGITS * 4)


def take_workspace(arguments: Arguments, given: Workspace | None, rows: int, parts: int, tokens: int,
                   name: str = "workspace") -> Workspace:
    """The caller's workspace, checked for size and device, or a new one."""
    if given is None:
        stream = arguments.stream if arguments.device.kind == "cuda" else None
        return workspace(rows, 1, tokens, arguments.device, framework=arguments.framework, stream=stream)
    if not isinstance(given, Workspace):
        raise TypeError(f"{arguments.operator}: {name}: expected a Workspace from selection.workspace(), "
                        f"got {type(given).__name__}")
    arguments.require(given.tickets.device == arguments.device, name, f"memory on {arguments.device}",
                      given.tickets.device)
    arguments.require(given.tickets.size >= rows and given.masks.size >= rows * words_of(tokens)
                      and given.sums.size >= rows * parts * SUMS_WORDS, name,
                      f"room for {rows} query heads of {tokens} tokens",
                      f"{given.tickets.size} query heads, {given.masks.size * 32} tokens in all")
    return given


def check_top_p(arguments: Arguments, p, least, most, normalise, calibrated,
                names: tuple[str, str] = ("min_tokens", "max_tokens")) -> None:
    """The parameters of Top-p."""
    number = isinstance(p, (int, float, np.number)) and not isinstance(p, bool)
    arguments.require(number and 0 < p <= 1, "p", "0 < p <= 1", repr(p))
    arguments.require(normalise in NORMALISE, "normalise", f"one of {', '.join(NORMALISE)}", repr(normalise))
    arguments.require(calibrated is True or calibrated in CALIBRATIONS, "calibrated",
                      "True, False, 'shrink' or 'shift'", repr(calibrated))
    check_count(arguments, names[0], least, 0)
    if most is not None:
        check_count(arguments, names[1], most, least)


def check_count(arguments: Arguments, name: str, value, least: int) -> None:
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    arguments.require(integer and value >= least, name, f"an integer of at least {least}", repr(value))
