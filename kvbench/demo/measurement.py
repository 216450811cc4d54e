"""What each preset costs and gets right on the shipped sample: a prompt, then decode steps, as a model makes them."""
from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvbench import arrays, caches, loaders
from kvbench.bench import machine
from kvbench.data import Sample
from kvbench.reference import attention

TIMED_PASSES = 3

# What is measured: every preset as it comes; the exact one cut into the parts that compressing presets keep exact,
# which must lose nothing; and TurboQuant without such parts, which shows what they are worth.
CACHES = {name: preset.function for name, preset in caches.PRESETS.items()}
CACHES["exact in parts"] = functools.partial(caches.exact, sinks=4, tail=128)
CACHES["turboquant, codes alone"] = functools.partial(caches.turboquant, centred=False, sinks=0, tail=0)


@dataclass(frozen=True)
class Outcome:
    """One preset on the sample.

    nbytes         bytes that the cache holds after the last step, everything counted
    tokens         tokens in it
    elements       numbers that it stands for: keys and values of all tokens
    output_error   ||output - exact|| / ||exact|| over all steps and query heads, exact in float64 on the float16 sample
    attended       share of the tokens that a step attends to, mean over steps (1: all)
    mass           share of the exact attention weights that these have, mean over steps and query heads
    logit_error    max |logit - exact| of the last step's queries, all keys encoded by the preset's codec
    prompt_ms      time to append the prompt
    step_us        median time of one decode step: append a token, attend, wait for the result
                   (both of the quickest of a few passes: other programs on the machine only ever add)
    append_us      the parts of a step in a pass that waits for each: what they overlap in step_us, if they do, is in
    attend_us      both
    """

    preset: str
    nbytes: int
    tokens: int
    elements: int
    output_error: float
    attended: float
    mass: float
    logit_error: float
    prompt_ms: float
    step_us: float
    append_us: float
    attend_us: float

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / self.tokens

    @property
    def bits_per_element(self) -> float:
        return 8 * self.nbytes / self.elements

    @property
    def ratio(self) -> float:
        """How many times smaller than float16."""
        return 16 / self.bits_per_element


def backend_here() -> str:
    """The fast backend of this machine."""
    return "cuda" if loaders.availability("cuda") is None else "cpu"


def exact_outputs(sample: Sample) -> np.ndarray:
    """Attention outputs of the decode steps in float64: [steps, q_heads, head_dim]."""
    keys, values = sample.keys.astype(np.float64), sample.values.astype(np.float64)
    outputs = [attention.decode(sample.queries[:, :, step], keys[:, :, :position + 1], values[:, :, :position + 1])[0]
               for step, position in decode_steps(sample)]
    return np.concatenate(outputs)


def attention_mass(sample: Sample) -> np.ndarray:
    """Softmax weights of the decode steps' queries, mean over the steps: [q_heads, tokens] float64."""
    return np.mean(_attention_weights(sample), axis=0)


def _attention_weights(sample: Sample) -> list[np.ndarray]:
    """Of each decode step: [q_heads, tokens] float64."""
    keys, found = sample.keys[0, 0].astype(np.float64), []
    for step, position in decode_steps(sample):
        logits = sample.queries[0, :, step].astype(np.float64) @ keys.T * keys.shape[-1] ** -0.5
        logits[:, position + 1:] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        found.append(weights / weights.sum(axis=1, keepdims=True))
    return found


def measure(sample: Sample, backend: str, progress: Callable[[str], None]) -> list[Outcome]:
    """Every preset of kvbench.caches on the sample."""
    exact = exact_outputs(sample)
    outcomes = []
    for preset in CACHES:
        progress(f"{preset} on {backend}")
        outcomes.append(_measure_preset(preset, sample, exact, backend))
    progress("")
    return outcomes


def _measure_preset(preset, sample, exact, backend) -> Outcome:
    _, kv_heads, tokens, head_dim = sample.keys.shape
    device = arrays.Device("cuda" if backend == "cuda" else "cpu")
    keys, values = arrays.upload(sample.keys, device), arrays.upload(sample.values, device)
    steps = decode_steps(sample)
    weights = _attention_weights(sample)
    queries = [arrays.upload(np.ascontiguousarray(sample.queries[:, :, step]), device) for step, _ in steps]
    prompt = steps[0][1]
    prompt_times, step_times, part_times = [], [], []

    def wait():
        keys.narrow(2, 0, 1).to_host()

    # The first pass compiles, and is never the quickest; the last waits between the parts of a step.
    for parts_apart in [False] * (1 + TIMED_PASSES) + [True]:
        cache = CACHES[preset](batch=1, kv_heads=kv_heads, q_heads=sample.queries.shape[1], head_dim=head_dim,
                               capacity=tokens, device=device)
        start = time.perf_counter()
        cache.append(keys.narrow(2, 0, prompt), values.narrow(2, 0, prompt))
        wait()
        prompt_times.append(time.perf_counter() - start)
        outputs, times, kept = [], [], []
        for step, position in steps:
            start = time.perf_counter()
            cache.append(keys.narrow(2, position, position + 1), values.narrow(2, position, position + 1))
            if parts_apart:
                wait()
            middle = time.perf_counter()
            output = cache.attend(queries[step])
            outputs.append(arrays.borrow(output, "output").to_host()[0])
            times.append((middle - start, time.perf_counter() - middle))
            kept.append(_attended(cache, tokens))
        (part_times if parts_apart else step_times).append(np.array(times))
    difference = np.stack(outputs).astype(np.float64) - exact
    encoded = keys.narrow(2, 0, tokens - tokens % cache.keys.granule)        # whole granules
    logits = arrays.borrow(cache.keys.logits(queries[-1], cache.keys.encode(encoded)), "logits").to_host()[0]
    expected = sample.queries[0, :, -1].astype(np.float64) @ sample.keys[0, 0, :encoded.shape[2]].T * head_dim**-0.5
    return Outcome(preset, cache.nbytes, len(cache), 2 * kv_heads * len(cache) * head_dim,
                   float(np.linalg.norm(difference) / np.linalg.norm(exact)),
                   float(np.mean([mask.sum() / (position + 1) for mask, (_, position) in zip(kept, steps)])),
                   float(np.mean([(weight * mask).sum(axis=1) for mask, weight in zip(kept, weights)])),
                   float(np.abs(logits - expected).max()), 1e3 * min(prompt_times),
                   1e6 * min(float(np.median(times.sum(axis=1))) for times in step_times),
                   *(1e6 * np.median(part_times[0], axis=0)).tolist())


def _attended(cache: caches.KVCache, tokens: int) -> np.ndarray:
    """[tokens] bool: what the last step of one sequence with one KV head attended to."""
    mask = np.arange(tokens) < len(cache)
    if cache.last_selection is not None:
        selected, counts = (arrays.borrow(x, "selection").to_host()
                            for x in (cache.last_selection.indices, cache.last_selection.counts))
        mask[cache.sinks:cache.sinks + int(cache.tail.encoded(len(cache) - cache.sinks))] = False
        mask[cache.sinks + selected[0, 0, :counts[0, 0]]] = True
    return mask


def decode_steps(sample: Sample) -> list[tuple[int, int]]:
    """(index of the query, position of its token) of every decode step; the tokens before the first are the prompt."""
    return list(enumerate(map(int, sample.positions)))


def machine_here(backend: str) -> str:
    """The processor that was measured."""
    if backend == "cuda":
        return machine.Gpu().describe()["name"]
    host = machine.describe()
    return f"{host['processor']}, {host['usable_cores']} cores"
