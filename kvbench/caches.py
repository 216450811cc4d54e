"""Named caches: each preset is a published system, or the baseline, made of codecs, an index and a selector."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvbench import codecs
from kvbench.cache import KVCache, Tail, load

__all__ = ["PRESETS", "KVCache", "Preset", "Tail", "exact", "load", "turboquant"]


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


def turboquant(batch: int, kv_heads: int, q_heads: int, head_dim: int, capacity: int, key_bits: int = 3,
               value_bits: int = 3, seed: int = 0, centred: bool = True, tail: int = 128, sinks: int = 4,
               dtype: str = "float16", device="cpu", backend: str | None = None) -> KVCache:
    """Keys and values as TurboQuant codes of key_bits and value_bits (1 to 8) per coordinate; sinks and tail exact.

    seed    : of the two rotations
    centred : keys are encoded less the mean of those in the first append, which should be a prompt

    The defaults are what real keys ask for.  Output error at 3 bits and 8K tokens, mean over two layers each of
    SmolLM2-135M and Qwen2.5-Coder-0.5B:

        codes alone     centred     with 4 sinks     with a tail of 128
           0.38           0.33          0.30               0.06            (not centred, sinks and tail: 0.09)

    Half of the attention is on the newest tokens, and the key of a sink is far from the mean.  Together they take
    0.2 bits per element at 8K tokens, less in longer contexts.

    A head_dim whose size, padded to a multiple of 32, is no power of two is rotated by a dense matrix.  CUDA kernels
    take head_dim 64, 128 and 256 and, for attention, up to 4 bits.
    """
    rotation = "hadamard" if -(-head_dim // 32) * 32 in (2**k for k in range(5, 17)) else "haar"
    keys, values = (codecs.TurboQuantMSE(head_dim, bits, seed=2 * seed + side, rotation=rotation, centred=centre)
                    for side, (bits, centre) in enumerate(((key_bits, centred), (value_bits, False))))
    return KVCache(batch, kv_heads, q_heads, head_dim, capacity, keys=keys, values=values, sinks=sinks,
                   tail=Tail(recent=tail), dtype=dtype, device=device, backend=backend)


PRESETS: dict[str, Preset] = {
    "exact": Preset(exact, "16-bit keys and values, dense attention",
                    "arXiv 1706.03762, section 3.2.1; grouped query heads: arXiv 2305.13245"),
    "turboquant": Preset(turboquant, "3-bit codes by TurboQuant, keys centred, the first 4 and last 128 tokens exact",
                         "arXiv 2504.19874, Algorithm 1; scales: arXiv 2604.18555"),
}
