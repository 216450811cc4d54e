"""One decode step of every preset in the registry: the whole way from a query to the output of a filled cache.

The operators of `kvbench.ops` are timed one by one by their own records.  What a user waits for is the sum: scores of
the index, selection, attention to what was selected and to the exact sinks and tail, the merge, and what lies between.

**Tokens.**  Of the tokens in the store `percent` (with a Top-k selector: k) are chosen by drawing, the same number for
every KV head, in whole granules of the index.  Their keys stand out in one direction of the KV head, which its queries
have, by GAP in the logit: they hold all but about 1e-6 of the attention, whatever noise an index has.  So

- a Top-p selector of TOP_P lists these tokens, all but the last 2^-16 of the estimated mass, and a Top-k selector
  exactly these: `percent` is the share of its rows that each KV head reads, and the union over its query heads is no
  larger;
- dense attention to all tokens gives the same output, and is a fair baseline of sparse presets, too.

Time does not depend on where they lie otherwise.  Presets without a selector attend to everything.
"""
from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import numpy as np

from kvbench import arrays, registry
from kvbench.caches import PRESETS, KVCache
from kvbench.ops.attention import DECODE_AXES
from kvbench.ops.dispatch import EPSILON, NUMPY_TYPE, assert_close, relative_error
from kvbench.registry import Kernel, Traffic, register
from kvbench.selectors import TopK

AXES = {"preset": tuple(PRESETS), "tokens": (131072, 32768, 4096), "percent": (2, 10, 5), **{
    axis: DECODE_AXES[axis] for axis in ("head_dim", "kv_heads", "group", "batch", "dtype")}}
GAP = 20.0
TOP_P = 1 - 2.0**-16
CHUNK_TOKENS, FIRST_TOKENS = 32768, 4096    # of an append; of the first, whose statistics are made on the host


@dataclass(frozen=True, eq=False)
class Contents:
    """What a preset's cache holds, as data.

    preset, options  a name in `caches.PRESETS`, and arguments of its function
    tokens           of every sequence
    arrays           by name, as `KVCache.contents` gives them
    """

    preset: str
    options: dict
    tokens: int
    arrays: dict


def decode_step(query, contents: Contents, *, return_lse: bool = True, out=None, lse=None,
                workspace: KVCache | None = None, backend: str | None = None):
    """softmax(scale q K^T) V over a preset's cache, by `KVCache.attend`: one decode step as a model takes it.

    query      : [batch, q_heads, head_dim] float16, bfloat16 or float32
    contents   : what the cache holds; it decides the preset
    return_lse : also return the log-sum-exp of the attended logits
    out, lse   : [batch, q_heads, head_dim] in query's dtype or float32;  [batch, q_heads] float32 (default: new)
    workspace  : a cache that holds these contents, from `workspace(...)` (default: a temporary one)
    backend    : reference, cpu, cuda, native, simt (default: by device)

    Returns (out, lse), or out.  Source: of each preset `caches.PRESETS`; the merge: arXiv 1805.02867, section 3.1.
    """
    made = _cache(query, contents, backend) if workspace is None else workspace
    return made.attend(query, out=out, return_lse=return_lse, lse=lse)


def workspace(query, contents: Contents, backend: str | None = None) -> KVCache:
    """A cache of its own that holds these contents, on the device of the query."""
    return _cache(query, contents, backend)


def _cache(query, contents, backend):
    query = arrays.borrow(query, "query")
    kv_heads = arrays.borrow(next(iter(contents.arrays.values())), "contents").shape[1]
    made = _made(contents.preset, query.shape[0], kv_heads, query.shape[1], query.shape[2], contents.tokens,
                 device=query.device, backend=backend, **contents.options)
    made.restore([contents.tokens] * query.shape[0], contents.arrays)
    return made


def _made(preset, *sizes, **options) -> KVCache:
    return PRESETS[preset].function(*sizes, **options)


def _options(problem) -> dict:
    """Arguments of the preset's function besides sizes."""
    return {"dtype": problem["dtype"]} | ({} if _idle_axes(problem) else {"top_p": TOP_P})


def _idle_axes(problem) -> tuple[str, ...]:
    """What is attended to follows `percent` with a Top-p selector alone.  Of a preset of another version: none."""
    preset = PRESETS.get(problem["preset"])
    return ("percent",) if preset and "top_p" not in inspect.signature(preset.function).parameters else ()


def _sizes(problem) -> tuple[int, int, int, int, int]:
    heads = problem["kv_heads"]
    return problem["batch"], heads, heads * problem["group"], problem["head_dim"], problem["tokens"]


def _selected(made: KVCache, tokens: int, percent: int) -> tuple[int, int]:
    """(tokens in the store, those that a KV head attends to)"""
    stored = int(made.tail.encoded(max(tokens - made.sinks, 0)))
    if made.index is None:
        return stored, stored
    wanted = made.selector.k if isinstance(made.selector, TopK) else max(stored * min(percent, 100) // 100, 1)
    return stored, min(wanted, stored)


def _inputs(problem, rng):
    batch, kv_heads, q_heads, head_dim, tokens = _sizes(problem)
    dtype, options = NUMPY_TYPE[problem["dtype"]], _options(problem)
    keys, values = (rng.standard_normal((batch, kv_heads, tokens, head_dim), dtype=np.float32) for _ in range(2))
    direction = rng.standard_normal((batch, kv_heads, 1, head_dim), dtype=np.float32)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    query = 0.3 * rng.standard_normal((batch, kv_heads, problem["group"], head_dim), dtype=np.float32)
    query += math.sqrt(head_dim) * np.asarray(direction, like=query)

    made = _made(problem["preset"], *_sizes(problem), device=arrays.borrow(keys, "keys").device, **options)
    stored, selected = _selected(made, tokens, problem["percent"])
    granule = 1 if made.index is None else made.index.granule
    gap = np.zeros((batch, kv_heads, tokens, 1), np.float32)
    for pair in np.ndindex(batch, kv_heads):
        chosen = rng.permutation(stored // granule)[: -(-selected // granule)]
        gap[pair][made.sinks : made.sinks + stored].reshape(-1, granule)[chosen] = GAP
    keys += np.asarray(gap, like=keys) * np.asarray(direction, like=keys)
    query, keys, values = (x.astype(dtype) for x in (query.reshape(batch, q_heads, head_dim), keys, values))
    start = 0
    while start < tokens:
        stop = min(start + (CHUNK_TOKENS if start else FIRST_TOKENS), tokens)
        made.append(keys[:, :, start:stop], values[:, :, start:stop])
        start = stop
    held = {name: view.give() if view.size else view for name, view in made.contents().items()}
    return {"query": query, "contents": Contents(problem["preset"], options, tokens, held)}


def _exact(inputs, dtype):
    """The tokens that the cache stands for, in their order."""
    made = _cache(inputs["query"], inputs["contents"], None)
    sides = zip(*(made.stored(sequence, dtype) for sequence in range(made.batch)))
    return {name: arrays.upload(np.stack(side).astype(NUMPY_TYPE[dtype]), made.device).give()
            for name, side in zip(("keys", "values"), sides)}


def _traffic(problem):
    """Of a sparse preset: all that its index reads, the rows that a KV head attends to, and all exact tokens."""
    made = _made(problem["preset"], *_sizes(problem), **_options(problem))       # its memory is not touched
    batch, tokens = problem["batch"], problem["tokens"]
    stored, selected = _selected(made, tokens, problem["percent"])
    read = 0
    for name, view in made.contents([tokens] * batch).items():
        rows = name.startswith(("store.keys", "store.values")) and view.shape[2] == stored
        scored = made.index is not None and made.index.reads(name)
        read += view.nbytes if scored or not rows else view.nbytes * selected // stored
    outputs = batch * made.q_heads
    row_bytes = made.head_dim * np.dtype(NUMPY_TYPE[problem["dtype"]]).itemsize
    return Traffic(read + outputs * row_bytes, outputs * (row_bytes + 4))


def _agreement(inputs, expected, actual):
    """The operators have agreements of their own, for any input; this one is for the tokens that are drawn here.

    The reference attends to the same stored bytes.  A logit is at most about 30, the sum of head_dim products whose two
    factors (the query, rotated or not, and a decoded key) are each rounded once, to 16 bits at worst: independent
    errors of EPSILON / sqrt(12), in all 30 sqrt(2 / 12 / head_dim) EPSILON = 1.5 EPSILON for head_dim 64.  Weights are
    off by as much, independently for the tokens, and so each output by 1.5 EPSILON of the root mean square of its row,
    since values are independent, too.  Allowed are 12 EPSILON, eight standard deviations.  The tokens at the end of a
    Top-p list, which may differ where estimates round differently, hold 2^-16 of the estimated mass: less than that.
    """
    epsilon = max(EPSILON[np.asarray(inputs["query"]).dtype.name], EPSILON["float16"])
    spread = np.sqrt(np.mean(np.square(expected[0]), axis=-1, keepdims=True))
    assert_close(expected[0], actual[0], np.asarray(actual[0]).dtype.name, 12 * epsilon * spread, "output")
    assert_close(expected[1], actual[1], "float32", 12 * epsilon, "log-sum-exp")


def _reference(query, contents):
    made = _cache(query, contents, "reference")
    with np.errstate(invalid="ignore", over="ignore"):          # scores of slots that hold nothing
        return made.attend(query, out=np.empty(query.shape, np.float32), return_lse=True)


register(Kernel(
    name="cache.decode_step", reference=_reference, operator=decode_step, backends=registry.BACKENDS, axes=AXES,
    inputs=_inputs, traffic=_traffic, agreement=_agreement,
    error=lambda inputs, expected, actual: relative_error(expected[0], actual[0]),
    source="; ".join(dict.fromkeys(preset.source for preset in PRESETS.values())), exact=_exact,
    idle_axes=_idle_axes))
