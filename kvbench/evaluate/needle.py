"""`kvbench eval --task needle`: does a model still find one sentence in a long text, through a compressed cache?

A text of so many tokens holds, at a given depth, "The secret number of CITY is DIGITS."  It is the prompt: it attends
to itself exactly and is compressed.  The question and the answer then attend to the compressed cache.  The needle is
found if every token of the answer is the model's first choice, which is what greedy decoding would have written.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvbench.evaluate import models
from kvbench.evaluate.perplexity import STORED
from kvbench.evaluate.specs import Spec

CITIES = ("Lisbon", "Vienna", "Oslo", "Cairo", "Lima", "Dublin", "Athens", "Warsaw")
DIGITS = 5


@dataclass(frozen=True)
class Needle:
    """context, question, answer : token ids, [1, n] int64 torch."""

    name: str
    context: object
    question: object
    answer: object


def make(model: models.Model, text: models.Text, tokens: int, depth: float, seed: int) -> Needle:
    """A needle at share `depth` of a context of exactly `tokens` tokens; city and digits are drawn from the seed."""
    import torch

    rng = np.random.default_rng([seed, tokens, round(1000 * depth)])
    city = CITIES[rng.integers(len(CITIES))]
    digits = "".join(map(str, rng.integers(0, 10, DIGITS)))

    def encode(piece):
        return model.tokenizer(piece, return_tensors="pt", add_special_tokens=False).input_ids.to(model.network.device)

    sentence = encode(f"\n\nThe secret number of {city} is {digits}.\n\n")
    question = encode(f"\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is")
    answer = encode(f" {digits}")
    hay = tokens - sentence.shape[1]
    if hay < 1:
        raise ValueError(f"--lengths: expected more than the {sentence.shape[1]} tokens of the needle, got {tokens}")
    straw = models.tokens_of(model, text, hay)
    place = round(depth * hay)
    return Needle(f"{tokens} tokens, depth {depth:g}", torch.cat([straw[:, :place], sentence, straw[:, place:]], dim=1),
                  question, answer)


def read(model: models.Model, needle: Needle, progress: Callable[[str], None] = lambda line: None) -> list[tuple]:
    """(queries, keys, values) of every layer after the model has read the context, for `answer_through`."""
    prompt = {}

    def keep(layer, query, key, value):
        progress(f"layer {layer + 1} reads {key.shape[2]} tokens")
        prompt[layer] = query, key, value

    with models.observed(model.network, keep):
        model.network.base_model(input_ids=needle.context, use_cache=False)
    return [prompt[layer] for layer in sorted(prompt)]


def of_model(model: models.Model, needle: Needle, prompt: list[tuple]) -> dict:
    """With the model's own attention and cache: the baseline."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.network.config)
    for layer, (_, key, value) in enumerate(prompt):
        cache.update(key, value, layer)
    elements = sum(key.numel() + value.numel() for _, key, value in prompt)
    bytes_each = model.network.dtype.itemsize
    return {**_answered(model, needle, cache), "bits_per_element": 8.0 * bytes_each, "nbytes": elements * bytes_each,
            "tokens": needle.context.shape[1]}


def of_cache(model: models.Model, spec: Spec, needle: Needle, prompt: list[tuple]) -> dict:
    """Through the preset's cache; bits are those of the compressed context."""
    from kvbench.integrations.transformers import KVBenchCache

    tokens = needle.context.shape[1]
    capacity = tokens + needle.question.shape[1] + needle.answer.shape[1]
    before = model.network.config._attn_implementation
    cache = KVBenchCache(model.network, spec.preset, capacity=capacity, **{"dtype": STORED, **dict(spec.options)})
    try:
        cache.fill(prompt)
        held = {"bits_per_element": cache.bits_per_element, "nbytes": cache.nbytes_used, "tokens": tokens}
        return {**_answered(model, needle, cache), **held}
    finally:
        model.network.set_attn_implementation(before)


def _answered(model: models.Model, needle: Needle, cache) -> dict:
    import torch

    wanted = needle.answer[0]
    asked = torch.cat([needle.question, needle.answer[:, :-1]], dim=1)
    with torch.inference_mode():
        logits = model.network(input_ids=asked, past_key_values=cache).logits[0, -len(wanted):].float()
    chances = torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None]).mean().item()
    if not math.isfinite(chances):
        raise ValueError("needle: the probability of the answer is not a finite number: the cache gave NaN or Inf")
    return {"metrics": {"found": float((logits.argmax(dim=-1) == wanted).all()), "log_probability": chances}}
