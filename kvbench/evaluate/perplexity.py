"""`kvbench eval --task perplexity` and `--task codecs`: how well a model predicts a text through a compressed cache.

perplexity  The prompt attends to itself exactly and is compressed; then every token is appended to the preset's cache
            and attends to it, as in decoding.  The text is known, so that a layer gets many tokens per call of the
            model.  Where the preset attends to all tokens they are answered together (`kvbench.evaluate.chunks`), where
            it selects, or by `stepwise`, one by one by its operators.
codecs      No prompt, no exact tokens, no cache: every key and value, of every layer, is what the preset's codecs make
            of it, those of the query's own token too.  What the codecs lose when nothing helps them.

perplexity = exp(mean of -log p(token | tokens before it)).
"""
from __future__ import annotations

import math
from collections.abc import Callable

from kvbench import arrays
from kvbench.evaluate import chunks, models
from kvbench.evaluate.specs import Spec

CHUNK = 256             # tokens per call of the model: their logits for a whole vocabulary must fit into memory
STORED = "float16"      # what caches keep exactly, and what codecs are given


def of_model(model: models.Model, ids, prompt: int, progress: Callable[[str], None] = lambda line: None) -> dict:
    """With the model's own attention and cache: the baseline of both tasks."""
    from transformers import DynamicCache

    losses = _decode(model, ids, prompt, DynamicCache(config=model.network.config), progress)
    config, bytes_each = model.config, model.network.dtype.itemsize
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(config) * (ids.shape[1] - 1)
    return _case(losses, 8.0 * bytes_each, elements * bytes_each, ids.shape[1])


def of_cache(model: models.Model, spec: Spec, ids, prompt: int, baseline: float, stepwise: bool = False,
             progress: Callable[[str], None] = lambda line: None) -> dict:
    """Through the preset's cache; baseline: the model's own perplexity on the same tokens.

    stepwise : let the preset's operators attend, token by token, also where `chunks` answers many at once
    """
    from kvbench.integrations.transformers import KVBenchCache

    before = model.network.config._attn_implementation
    cache = KVBenchCache(model.network, spec.preset, capacity=ids.shape[1],
                         chunks=None if stepwise else chunks.attend, **{"dtype": STORED, **dict(spec.options)})
    try:
        losses = _decode(model, ids, prompt, cache, progress)
    finally:
        model.network.set_attn_implementation(before)
    return _case(losses, cache.bits_per_element, cache.nbytes_used, ids.shape[1], baseline)


def of_codecs(model: models.Model, spec: Spec, ids, baseline: float,
              progress: Callable[[str], None] = lambda line: None) -> dict:
    """With every key and value of the text encoded and decoded by the codecs of the preset.

    ValueError if the text does not fill what a codec encodes together.
    """
    import torch

    count, held = ids.shape[1], {"nbytes": 0, "elements": 0}
    cache = spec.build(batch=1, kv_heads=1, q_heads=1, head_dim=_head_dim(model.config), capacity=count, dtype=STORED)
    granule = math.lcm(cache.keys.granule, cache.values.granule)
    read = -(-(count - 1) // granule) * granule         # the last token is predicted, and read only to fill a granule
    if read > count:
        raise ValueError(f"--tokens: expected a multiple of the {granule} tokens that {spec.text} encodes together, "
                         f"got {count}")

    def attend(exact, module, query, key, value, mask, **options):
        progress(f"layer {module.layer_idx + 1}")
        changed = []
        for codec, x in ((cache.keys, key), (cache.values, value)):
            packed = codec.encode(x.to(getattr(torch, STORED)).contiguous())
            held["nbytes"] += sum(arrays.borrow(part, "packed").nbytes for part in packed.arrays().values())
            held["elements"] += x.numel()
            changed.append(codec.decode(packed).to(x.dtype))
        return exact(module, query, *changed, mask, **options)

    with models.replaced_attention(model.network, attend):
        logits = model.network(input_ids=ids[:, :read], use_cache=False).logits
        losses = _losses(logits[:, :count - 1], ids[:, 1:])
    return _case(losses, 8 * held["nbytes"] / held["elements"], held["nbytes"], ids.shape[1], baseline)


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _decode(model, ids, prompt: int, cache, progress) -> list[float]:
    """-log p of every token after the prompt (at least one token), read in chunks."""
    import torch

    losses, total = [], ids.shape[1]
    with torch.inference_mode():
        logits = model.network(input_ids=ids[:, :prompt], past_key_values=cache, logits_to_keep=1).logits
        losses += _losses(logits, ids[:, prompt:prompt + 1])
        for start in range(prompt, total - 1, CHUNK):
            progress(f"token {start - prompt} of {total - prompt}")
            stop = min(start + CHUNK, total - 1)
            logits = model.network(input_ids=ids[:, start:stop], past_key_values=cache).logits
            losses += _losses(logits, ids[:, start + 1:stop + 1])
    return losses


def _losses(logits, targets) -> list[float]:
    import torch

    found = []
    for some, wanted in zip(logits[0].split(CHUNK), targets[0].split(CHUNK)):
        found += torch.nn.functional.cross_entropy(some.float(), wanted, reduction="none").tolist()
    return found


def _case(losses: list[float], bits: float, nbytes: int, tokens: int, baseline: float | None = None) -> dict:
    mean = math.fsum(losses) / len(losses)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    if not math.isfinite(perplexity):
        raise ValueError(f"perplexity: not a finite number after {len(losses)} tokens: the cache gave NaN or Inf")
    loss = 0.0 if baseline is None else 100 * (perplexity / baseline - 1)
    return {"metrics": {"perplexity": perplexity, "loss_percent": loss}, "bits_per_element": bits, "nbytes": nbytes,
            "tokens": tokens}
