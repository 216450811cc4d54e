"""Named caches: each preset is a published system, or the baseline, made of codecs, an index and a selector."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvbench import codecs
from kvbench.cache import KVCache, Tail, load

__all__ = ["PRESETS", "KVCache", "Preset", "Tail", "exact", "load"]


class Preset(NamedTuple):
    """function(batch, kv_heads, q_heads, head_dim, capacity, ...) -> KVCache; one line on what it is; its source."""

    function: Callable[..., KVCache]
    description: str
    source: str


def exact(batch: int, kv_heads: int, q_heads: int, head_dim: int, capacity: int, dtype: str = "float16", tail: int = 0,
          sinks: int = 0, device="cpu", backend: str | None = None) -> KVCache:
    """Every key and value as it is: the baseline that all others are compared with.

    tail and sinks only move tokens into the exact buffer, as the compressing presets do; the result is the same.
    """
    codec = codecs.Float16(head_dim, dtype)
    return KVCache(batch, kv_heads, q_heads, head_dim, capacity, keys=codec, values=codec, sinks=sinks,
                   tail=Tail(recent=tail), dtype=dtype, device=device, backend=backend)


PRESETS: dict[str, Preset] = {
    "exact": Preset(exact, "16-bit keys and values, dense attention",
                    "arXiv 1706.03762, section 3.2.1; grouped query heads: arXiv 2305.13245"),
}
