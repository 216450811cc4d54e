"""Named caches: each preset is a published system, or the baseline, made of codecs, an index and a selector."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvbench import codecs, indexes, selectors
from kvbench.cache import KVCache, Tail, load

__all__ = ["PRESETS", "KVCache", "Preset", "Tail", "block_gtq", "exact", "kivi", "load", "quest", "rabitq",
           "self_indexing", "turboquant", "twilight"]


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
    rotation = _rotation(head_dim)
    keys, values = (codecs.TurboQuantMSE(head_dim, bits, seed=2 * seed + side, rotation=rotation, centred=centre)
                    for side, (bits, centre) in enumerate(((key_bits, centred), (value_bits, False))))
    return KVCache(batch, kv_heads, q_heads, head_dim, capacity, keys=keys, values=values, sinks=sinks,
                   tail=Tail(recent=tail), dtype=dtype, device=device, backend=backend)


def kivi(batch: int, kv_heads: int, q_heads: int, head_dim: int, capacity: int, bits: int = 2, group: int = 32,
         residual: int = 128, sinks: int = 0, key_bits: int | None = None, value_bits: int | None = None,
         dtype: str = "float16", device="cpu", backend: str | None = None) -> KVCache:
    """Keys as integers per channel, values as integers per token, of `bits` bits; the newest tokens exact, as in KIVI.

    bits       : 2, 4 or 8; key_bits and value_bits, if given, for one side alone
    group      : numbers that share a scale and a minimum: tokens of a channel of keys, channels of a token of values
    residual   : at least so many of the newest tokens are exact
    sinks      : the first tokens, exact (0: KIVI).  Where those draw attention, 4 of them halve the error of 2 bits
                 (0.41 to 0.19 and 0.74 to 0.26 in two layers of Qwen2.5-Coder-0.5B, 7K tokens, residual 0)

    **Where this differs from KIVI.**  Of T tokens KIVI encodes R floor(T / R) keys and T - R values, R the residual.
    Here both have one boundary, that of `Tail(residual, block=group)`, which is nowhere beyond either of these: group
    floor((T - R) / group) tokens are encoded, R to R + group - 1 are exact.  One boundary costs R / 2 more exact keys
    on average and keeps a token in one place, the store or the tail, as everywhere in `KVCache`; an append writes one
    token, every `group`-th also encodes a group.  And the groups of keys begin behind the sinks, not at token 0.
    """
    return KVCache(batch, kv_heads, q_heads, head_dim, capacity,
                   keys=codecs.KiviKeys(head_dim, bits if key_bits is None else key_bits, group),
                   values=codecs.KiviValues(head_dim, bits if value_bits is None else value_bits, group),
                   sinks=sinks, tail=Tail(recent=residual, block=group), dtype=dtype, device=device, backend=backend)


def block_gtq(batch: int, kv_heads: int, q_heads: int, head_dim: int, capacity: int, key_bits: float = 3.0,
              value_bits: int = 3, calibration=None, pairing: str = "half", tile: int = 32,
              scale_bits: int = 8, seed: int = 0, centred: bool = False, tail: int = 128, sinks: int = 4,
              dtype: str = "float16", device="cpu", backend: str | None = None) -> KVCache:
    """Keys by Block-GTQ, with key_bits bits per coordinate on average, more for the RoPE blocks that move logits most;
    values as TurboQuant codes of value_bits; sinks and tail exact.

    calibration : of the layer, from `kvbench.ops.block_gtq.calibrate` (None: the first append of a sequence, which
                  should be a prompt, decides its bits, together with the queries that are given with it)
    pairing     : of RoPE: "half" (Llama, Qwen, Mistral) or "interleaved" (GLM-4, DeepSeek-V2)
    tile, scale_bits, centred : see `codecs.BlockGTQ`; a calibration with a mean goes with centred=True
    seed        : of the rotations

    Queries matter: without them the bits follow the energy of the keys alone, and with centred=True, which leaves
    little of it, they go astray.  With a prompt's queries centring helps as it helps `turboquant`.  head_dim is a
    multiple of 32.
    """
    keys = codecs.BlockGTQ(head_dim, key_bits, calibration, pairing, tile=tile, scale_bits=scale_bits, centred=centred,
                           seed=2 * seed)
    values = codecs.TurboQuantMSE(head_dim, value_bits, seed=2 * seed + 1, rotation=_rotation(head_dim))
    return KVCache(batch, kv_heads, q_heads, head_dim, capacity, keys=keys, values=values, sinks=sinks,
                   tail=Tail(recent=tail), dtype=dtype, device=device, backend=backend)


def rabitq(batch: int, kv_heads: int, q_heads: int, head_dim: int, capacity: int, top_p: float = 0.85,
           calibrated: bool | str = False, query_bits: int = 4, query_centred: bool = False, seed: int = 0,
           maximum: int | None = None, tail: int = 128, block: int = 128, sinks: int = 4, dtype: str = "float16",
           device="cpu", backend: str | None = None) -> KVCache:
    """RaBitQCache: 16-bit keys and values, of which a step reads those of the tokens that a 1-bit index chooses.

    top_p, maximum : of `selectors.TopP`: the share of the proxy mass, and the most tokens of one query head
    calibrated     : False, "shrink" or "shift" (True): correct the mass for the noise of the index.  Without it the
                     true mass falls far short of top_p: 0.05 to 0.7 for 0.85 on four real layers.  The best remedy is
                     `selectors.TopP.fitted`, by the prompt's own queries
    query_bits     : 4 or 8        query_centred : centre queries, by those given to the first append, too
    seed           : of the rotation
    tail, block    : the newest `tail` to `tail + block - 1` tokens are exact and always attended, and are encoded in
                     blocks

    The index takes head_dim / 8 + 2 bytes a token and KV head (18 for 128), 2 more if queries are centred.
    """
    index = indexes.RaBitQ(head_dim, query_bits=query_bits, seed=seed, query_centred=query_centred,
                           noise=bool(calibrated))
    return _sparse(batch, kv_heads, q_heads, head_dim, capacity, index, Tail(tail, block=block), sinks, dtype, device,
                   backend, selectors.TopP(top_p, calibrated=calibrated, maximum=maximum))


def quest(batch: int, kv_heads: int, q_heads: int, head_dim: int, capacity: int, budget: int = 1024, page: int = 16,
          tail: int = 16, sinks: int = 0, dtype: str = "float16", device="cpu", backend: str | None = None) -> KVCache:
    """Quest: 16-bit keys and values, of which a step reads the pages with the largest bounds of their logits.

    budget : tokens of the pages that each query head chooses; the heads of a KV head attend to the union
    tail   : the newest tokens, exact and attended in any case; a page is encoded when it has left them
    """
    return _sparse(batch, kv_heads, q_heads, head_dim, capacity, indexes.Quest(head_dim, page, dtype),
                   Tail(tail, block=page), sinks, dtype, device, backend, selectors.TopK(budget))


def twilight(batch: int, kv_heads: int, q_heads: int, head_dim: int, capacity: int, top_p: float = 0.85, bits: int = 4,
             seed: int = 0, tail: int = 128, block: int = 128, sinks: int = 4, dtype: str = "float16", device="cpu",
             backend: str | None = None) -> KVCache:
    """Twilight: 16-bit keys and values, of which a step reads those in the Top-p of logits on keys of 4 bits.

    All tokens are candidates.  The 4-bit keys are those of `indexes.TurboQuant`, where the publication has a scale and
    a zero point for each token: the same bytes within 3 %, and less noise.
    """
    return _sparse(batch, kv_heads, q_heads, head_dim, capacity, indexes.TurboQuant(head_dim, bits, seed),
                   Tail(tail, block=block), sinks, dtype, device, backend, selectors.TopP(top_p))


def _rotation(head_dim: int) -> str:
    """The fast rotation, where the size that TurboQuant pads head_dim to is a power of two."""
    return "hadamard" if -(-head_dim // 32) * 32 in (2**k for k in range(5, 17)) else "haar"


def _sparse(batch, kv_heads, q_heads, head_dim, capacity, index, tail, sinks, dtype, device, backend, selector):
    codec = codecs.Float16(head_dim, dtype)
    return KVCache(batch, kv_heads, q_heads, head_dim, capacity, keys=codec, values=codec, index=index,
                   selector=selector, sinks=sinks, tail=tail, dtype=dtype, device=device, backend=backend)


def self_indexing(batch: int, kv_heads: int, q_heads: int, head_dim: int, capacity: int, budget: int = 160,
                  sinks: int = 64, tail: int = 128, value_bits: int = 2, centre: str = "mean", dtype: str = "float16",
                  device="cpu", backend: str | None = None) -> KVCache:
    """Keys as signs, which are the index, and 2-bit magnitudes; values as integers; a step attends to few tokens.

    budget     : tokens of the prompt that a KV head attends to, the sinks among them
    sinks      : the first tokens, exact, always attended        tail : so many of the newest tokens, likewise
    value_bits : 2 (the authors') or 4, which takes most of the error away
    centre     : keys are encoded less the "mean" or "median" of those in the first append, which should be a prompt

    **Where this differs from the authors' method.**  Their sinks are the tokens that the last prompt query weighs most;
    here a cache keeps the first ones (`reference.self_indexing.find_sinks` has both).  Their generated tokens are
    codes from birth and always attended; here the newest `tail` tokens are exact, and older ones must be selected.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise ValueError(f"self_indexing: budget: expected an integer of at least 0, got {budget!r}")
    return KVCache(batch, kv_heads, q_heads, head_dim, capacity, keys=codecs.SignVQ(head_dim, centre, sinks),
                   values=codecs.TokenInt(head_dim, value_bits), index=indexes.SignVQ(head_dim, centre, sinks),
                   selector=selectors.TopK(max(budget - sinks, 0)), sinks=sinks, tail=Tail(recent=tail), dtype=dtype,
                   device=device, backend=backend)


PRESETS: dict[str, Preset] = {
    "exact": Preset(exact, "16-bit keys and values, dense attention",
                    "arXiv 1706.03762, section 3.2.1; grouped query heads: arXiv 2305.13245"),
    "kivi": Preset(kivi, "2-bit keys per channel and values per token in groups of 32, the last 128 tokens exact",
                   "arXiv 2402.02750, section 3.2 and Algorithm 1"),
    "turboquant": Preset(turboquant, "3-bit codes by TurboQuant, keys centred, the first 4 and last 128 tokens exact",
                         "arXiv 2504.19874, Algorithm 1; scales: arXiv 2604.18555"),
    "block_gtq": Preset(block_gtq, "keys of 3 bits on average by Block-GTQ, values of 3 bits by TurboQuant",
                        "arXiv 2606.24033"),
    "rabitq": Preset(rabitq, "16-bit cache, attended where a 1-bit index has 85 % of the proxy mass (Top-p)",
                     "arXiv 2606.31519; estimator: arXiv 2405.12497"),
    "quest": Preset(quest, "16-bit cache, attended in the pages with the largest bounds of logits (1024 tokens)",
                    "arXiv 2406.10774"),
    "twilight": Preset(twilight, "16-bit cache, attended where logits on 4-bit keys have 85 % of the mass (Top-p)",
                       "arXiv 2502.02770"),
    "self_indexing": Preset(self_indexing, "3-bit keys whose signs are the index, 2-bit values; attends to 160 tokens, "
                            "the first 64 of them exact, and to the last 128", "arXiv 2603.14224"),
}
