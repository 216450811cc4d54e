"""Quest: pages of keys, and upper bounds of their logits.

Reference: reference/quest.py, kernels: cuda_src/quest.cu.
"""
from __future__ import annotations

import numpy as np

from kvbench import loaders, registry
from kvbench.arrays import FLOATS, Arguments
from kvbench.cpu import quest as cpu_quest
from kvbench.ops import attention
from kvbench.ops.dispatch import (CXX_TYPE, EPSILON, RUN_TIME_TYPE, SMALLEST_NORMAL, assert_close, check_cuda_head_dim,
                                  choose, random_normal, relative_error, require_writable)
from kvbench.reference import quest as reference
from kvbench.reference.quest import Pages
from kvbench.registry import Kernel, Traffic, register
from kvbench.scores import Scores

__all__ = ["Pages", "Scores", "encode", "score"]

BACKENDS = registry.BACKENDS
ENCODE_BLOCKS, SCORE_BLOCKS = 8, 3             # per multiprocessor, of 256 threads


def encode(keys, *, page: int = reference.PAGE, lengths=None, out: Pages | None = None, backend: str | None = None,
           stream=None) -> Pages:
    """Least and largest key of every page and channel, exact, in the dtype of the keys.

    keys    : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32; outer dimensions may be strided
    page    : tokens of a page; the last one has those that are left
    lengths : [batch] int32, tokens of each sequence (default: all).  Slots from there on are not read; values outside
              0..tokens are clamped
    out     : `Pages` to write into (default: new); low and high may be slices of a larger store
    backend : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256

    Returns `Pages`: low and high [batch, kv_heads, ceil(tokens / page), head_dim], NaN where a page has no number (NaN
    in keys is ignored), and the lengths that were given.
    Source: Quest, arXiv 2406.10774, section 3.3.
    """
    arguments = Arguments("quest.encode", stream=stream)
    keys = arguments.take("keys", keys, "batch kv_heads tokens head_dim", FLOATS, strided=True)
    arguments.require(_is_page(page), "page", "an integer from 1 to 2^31 - 1", repr(page))
    lengths = arguments.take("lengths", lengths, "batch", ("int32",), optional=True)
    batch, kv_heads, tokens, head_dim = keys.shape
    shape = (batch, kv_heads, -(-tokens // page), head_dim)
    if out is None:
        low, high = (arguments.result(f"out.{name}", None, shape, keys.dtype) for name in ("low", "high"))
    else:
        _check_pages(arguments, "out", out)
        arguments.require(out.page == page, "out", f"pages of {page} tokens", out.page)
        low, high = _stored(arguments, out, shape, {"keys": keys, "lengths": lengths})
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        result = encoded(keys.numpy(), page=page, lengths=None if lengths is None else lengths.numpy())
        low.numpy()[...], high.numpy()[...] = result.low, result.high
    elif backend == "cpu":
        cpu_quest.encode(keys.numpy(), page, _host_lengths(lengths, batch, tokens), low.numpy(), high.numpy())
    else:
        _check_cuda(arguments, backend, keys=keys, low=low, high=high)
        if low.size:
            _launch_encode(keys, page, lengths, low, high, backend, arguments)
    return Pages(low.give(), high.give(), lengths and lengths.give(), page) if out is None else out


def encoded(keys, *, page: int = reference.PAGE, lengths=None) -> Pages:
    """`reference.encode` on NumPy arrays, with as many pages as `tokens` need whatever the lengths."""
    tokens = keys.shape[2]
    clamped = None if lengths is None else np.clip(lengths, 0, tokens)
    pages = reference.encode(keys, page=page, lengths=clamped)
    missing = [(0, 0), (0, 0), (0, -(-tokens // page) - pages.low.shape[2]), (0, 0)]
    low, high = (np.concatenate([x, np.full((*x.shape[:2], missing[2][1], x.shape[3]), np.nan).astype(x.dtype)], axis=2)
                 for x in (pages.low, pages.high))
    return Pages(low, high, lengths, page)


def score(query, pages: Pages, *, scale: float | None = None, tokens: int | None = None, out=None,
          backend: str | None = None, stream=None) -> Scores:
    """scale (<q+, M> + <q-, m>), at least scale <q, k> for every key of the page; pages are read once per KV head.

    query   : [batch, q_heads, head_dim] float16, bfloat16 or float32; query head h reads KV head h // group
    pages   : as `encode` gave them, or slices of a store.  Where they have lengths, the logits of what lies beyond are
              -inf, and it is not read
    scale   : factor of the logits, at least 0 (default head_dim ** -0.5)
    tokens  : give every token of a page its bound, for selectors of tokens: of the first so many tokens, at most those
              that the pages hold (default: one logit per page)
    out     : where to write the logits (default: new)
    backend : reference, cpu, cuda, native, simt (default: by device); the last three: head_dim 64, 128, 256,
              group <= 16

    Returns Scores(logits, None): [batch, q_heads, pages], or of tokens, float32; NaN for a page without a number.
    Source: Quest, arXiv 2406.10774, Algorithm 1.
    """
    arguments = Arguments("quest.score", stream=stream)
    query = arguments.take("query", query, "batch q_heads head_dim", FLOATS)
    _check_pages(arguments, "pages", pages)
    low = arguments.take("pages.low", pages.low, "batch kv_heads pages head_dim", FLOATS, strided=True)
    high = arguments.take("pages.high", pages.high, "batch kv_heads pages head_dim", (low.dtype,), strided=True)
    lengths = arguments.take("pages.lengths", pages.lengths, "batch", ("int32",), optional=True)
    batch, q_heads, head_dim = query.shape
    kv_heads, count = low.shape[1:3]
    arguments.require(kv_heads > 0 and q_heads % kv_heads == 0 and q_heads > 0, "query",
                      f"q_heads a positive multiple of kv_heads = {kv_heads}", q_heads)
    scale = attention.check_scale(arguments, scale, head_dim)
    arguments.require(scale >= 0, "scale", "a number of at least 0: U is no bound otherwise", scale)
    arguments.require(tokens is None or isinstance(tokens, (int, np.integer)) and not isinstance(tokens, bool)
                      and 0 <= tokens <= count * pages.page, "tokens",
                      f"an integer from 0 to the {count * pages.page} of the pages", repr(tokens))
    out = arguments.result("out", out, (batch, q_heads, count if tokens is None else tokens), "float32")
    backend = choose(backend, arguments, BACKENDS)

    if backend == "reference":
        on_host = Pages(low.numpy(), high.numpy(), None if lengths is None else lengths.numpy(), pages.page)
        out.numpy()[...] = scored(query.numpy(), on_host, scale=scale, tokens=tokens).logits
    elif backend == "cpu":
        cpu_quest.score(query.numpy(), low.numpy(), high.numpy(), pages.page,
                        _host_lengths(lengths, batch, count * pages.page), scale, tokens is not None, out.numpy())
    else:
        attention.check_cuda_heads(arguments, backend, head_dim, q_heads // kv_heads)
        _check_cuda(arguments, backend, low=low, high=high)
        if out.size:
            _launch_score(query, low, high, pages.page, lengths, scale, 1 if tokens is None else pages.page, out,
                          backend, arguments)
    return Scores(out.give())


def scored(query, pages: Pages, *, scale=None, tokens: int | None = None) -> Scores:
    """`reference.score` on NumPy arrays, -inf beyond the lengths, per page or per token."""
    with np.errstate(invalid="ignore", over="ignore"):
        logits = reference.score(query, pages, scale=scale).logits
    count, page = logits.shape[2], pages.page
    lengths = np.full(len(logits), count * page) if pages.lengths is None else np.asarray(pages.lengths)
    first = np.arange(count) * page
    if tokens is not None:
        first, logits = np.arange(tokens), np.repeat(logits, page, axis=-1)[..., :tokens]
    return Scores(np.where(first >= lengths[:, None, None], np.float32(-np.inf), logits))


# ---- cuda ------------------------------------------------------------------------------------------------------------


def _launch_encode(keys, page, lengths, low, high, backend, arguments):
    batch, kv_heads, tokens, head_dim = keys.shape
    units = low.size * low.itemsize // 16
    function = loaders.get_function("quest", f"kvb::quest_encode_kernel<{CXX_TYPE[keys.dtype]}, {head_dim}>", backend,
                                    keys.device)
    blocks = min(-(-units // 256), ENCODE_BLOCKS * loaders.multiprocessors(backend, keys.device))
    function((blocks,), (256,), (
        keys, *map(np.uint64, keys.strides[:3]), lengths, low, high, *map(np.uint64, low.strides[:3]),
        np.int32(kv_heads), np.int32(tokens), np.int32(low.shape[2]), np.int32(page), np.uint64(units)),
        stream=arguments.stream)


def _launch_score(query, low, high, page, lengths, scale, wide, out, backend, arguments):
    batch, kv_heads, pages, head_dim = low.shape
    function = loaders.get_function("quest", f"kvb::quest_score_kernel<{CXX_TYPE[low.dtype]}, {head_dim}>", backend,
                                    low.device)
    at_once = max(1, 32 * 16 // (head_dim * low.itemsize))              # pages of a warp
    blocks = min(-(-pages // (8 * at_once)),
                 max(1, SCORE_BLOCKS * loaders.multiprocessors(backend, low.device) // (batch * kv_heads)))
    function((blocks, kv_heads, batch), (256,), (
        query, np.int32(RUN_TIME_TYPE[query.dtype]), low, high, *map(np.uint64, low.strides[:3]), lengths,
        np.float32(scale), out, np.int32(out.shape[2]), np.int32(wide), np.int32(page), np.int32(pages),
        np.int32(query.shape[1] // kv_heads)), stream=arguments.stream)


# ---- validation ------------------------------------------------------------------------------------------------------


def _check_pages(arguments, name, pages):
    if not isinstance(pages, Pages):
        raise TypeError(f"{arguments.operator}: {name}: expected Pages from quest.encode, got {type(pages).__name__}")
    arguments.require(_is_page(pages.page), name, "pages of 1 to 2^31 - 1 tokens", repr(pages.page))


def _is_page(page):
    return isinstance(page, (int, np.integer)) and not isinstance(page, bool) and 1 <= page < 2**31


def _stored(arguments, out, shape, inputs):
    """The caller's low and high, apart from the `inputs` and from each other."""
    stored = {}
    for name in ("low", "high"):
        array = arguments.take(f"out.{name}", getattr(out, name), "batch kv_heads pages head_dim",
                               (inputs["keys"].dtype,), strided=True)
        arguments.require(array.shape == shape, f"out.{name}", f"shape {list(shape)}", list(array.shape))
        stored[f"out.{name}"] = array
    require_writable(arguments, stored, inputs)
    return list(stored.values())


def _check_cuda(arguments, backend, *, low, high, keys=None):
    check_cuda_head_dim(arguments, "keys" if keys else "pages", low.shape[3], backend)
    arguments.require(low.strides == high.strides, "low, high", "the same strides", [low.strides, high.strides])
    for name, array in (("keys", keys), ("low", low), ("high", high)):
        arguments.require(array is None or array.aligned(16), name, "rows at multiples of 16 bytes",
                          array and f"address {array.pointer:#x}, strides {array.strides}")


def _host_lengths(lengths, batch, tokens):
    return np.full(batch, tokens, np.int32) if lengths is None else np.clip(lengths.numpy(), 0, tokens)


# ---- registry --------------------------------------------------------------------------------------------------------

_SIZES = {"tokens": (131072, 32768, 4096), "head_dim": (128, 64, 256), "kv_heads": (8, 2, 32)}
ENCODE_AXES = {**_SIZES, "batch": (1, 16), "page": (16, 32), "dtype": FLOATS}
SCORE_AXES = {**_SIZES, "group": (4, 8, 1), "batch": (1, 16), "page": (16, 32), "dtype": FLOATS}


def _page_bytes(problem):
    pages = problem["batch"] * problem["kv_heads"] * -(-problem["tokens"] // problem["page"])
    return pages * 2 * problem["head_dim"] * (4 if problem["dtype"] == "float32" else 2)


def _random_keys(problem, rng):
    shape = (problem["batch"], problem["kv_heads"], problem["tokens"], problem["head_dim"])
    return random_normal(rng, shape, problem["dtype"])


def _encode_inputs(problem, rng):
    return {"keys": _random_keys(problem, rng), "page": problem["page"]}


def _encode_traffic(problem):
    keys = problem["batch"] * problem["kv_heads"] * problem["tokens"] * problem["head_dim"]
    return Traffic(keys * (4 if problem["dtype"] == "float32" else 2), _page_bytes(problem))


def _score_inputs(problem, rng):
    """Any bounds of pages, in the right order: no kernel's time depends on them."""
    rows = {**problem, "tokens": -(-problem["tokens"] // problem["page"])}
    one, other = _random_keys(rows, rng), _random_keys(rows, rng)
    query = random_normal(rng, (problem["batch"], problem["kv_heads"] * problem["group"], problem["head_dim"]),
                          problem["dtype"])
    return {"query": query, "pages": Pages(np.minimum(one, other), np.maximum(one, other), None, problem["page"])}


def _score_traffic(problem):
    heads = problem["batch"] * problem["kv_heads"] * problem["group"]
    query = heads * problem["head_dim"] * (4 if problem["dtype"] == "float32" else 2)
    return Traffic(query + _page_bytes(problem), heads * -(-problem["tokens"] // problem["page"]) * 4)


def _encode_agreement(inputs, expected, actual):
    """Exact, but that a GPU may take a float32 subnormal for 0; and any NaN is NaN."""
    for name in ("low", "high"):
        one, other = (np.asarray(getattr(pages, name)) for pages in (expected, actual))
        if one.shape != other.shape or one.dtype != other.dtype:
            raise AssertionError(f"{name}: expected {one.dtype} {one.shape}, got {other.dtype} {other.shape}")
        wide, other_wide = one.astype(np.float64), other.astype(np.float64)
        flushed = (np.abs(wide) < SMALLEST_NORMAL) & (other_wide == 0)
        same = (wide == other_wide) & (np.signbit(wide) == np.signbit(other_wide))
        same |= np.isnan(wide) & np.isnan(other_wide)
        wrong = ~(same | flushed)
        if wrong.any():
            raise AssertionError(f"{name}: {int(wrong.sum())} of {wrong.size} numbers differ, the first at "
                                 f"[batch, kv_head, page, channel] = {np.argwhere(wrong)[0].tolist()}")
    if (expected.lengths is None) != (actual.lengths is None) or actual.page != expected.page:
        raise AssertionError("lengths, page: expected those that were given")
    if expected.lengths is not None and not np.array_equal(expected.lengths, actual.lengths):
        raise AssertionError("lengths: expected those that were given")


def _score_agreement(inputs, expected, actual):
    """A sum of 2 head_dim products, each rounded, of which a GPU may take subnormal factors for 0."""
    query, pages, scale = np.abs(np.asarray(inputs["query"]).astype(np.float64)), inputs["pages"], inputs.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.fmax(np.abs(pages.low.astype(np.float64)), np.abs(pages.high.astype(np.float64)))
        largest = np.repeat(np.where(np.isfinite(largest), largest, 0), query.shape[1] // pages.low.shape[1], axis=1)
        total = np.einsum("bhd,bhgd->bhg", np.where(np.isfinite(query), query, 0), largest)
        allowance = scale * (2 * query.shape[-1] + 8) * EPSILON["float32"] / 2 * total
        allowance += SMALLEST_NORMAL * (query.shape[-1] + scale * (np.nan_to_num(query).sum(axis=-1)[..., None]
                                                                   + largest.sum(axis=-1)))
    if inputs.get("tokens") is not None:
        allowance = np.repeat(allowance, pages.page, axis=-1)[..., : inputs["tokens"]]
    assert_close(expected.logits, actual.logits, "float32", allowance, "bounds")


def _pages_error(inputs, expected, actual):
    return max(relative_error(expected.low, actual.low), relative_error(expected.high, actual.high))


register(Kernel(
    name="quest.encode", reference=encoded, operator=encode, backends=BACKENDS, axes=ENCODE_AXES,
    inputs=_encode_inputs, traffic=_encode_traffic, agreement=_encode_agreement, error=_pages_error,
    source="arXiv 2406.10774 section 3.3"))
register(Kernel(
    name="quest.score", reference=scored, operator=score, backends=BACKENDS, axes=SCORE_AXES, inputs=_score_inputs,
    traffic=_score_traffic, agreement=_score_agreement,
    error=lambda inputs, expected, actual: relative_error(expected.logits, actual.logits),
    source="arXiv 2406.10774 Algorithm 1"))
