"""What caches hold and what that costs them in accuracy, from results of `kvbench demo` and `kvbench eval`.

Both are read for what a picture of bytes against errors needs; whatever else they hold is theirs.
"""
from __future__ import annotations

import math
from collections.abc import Iterator

from kvbench.bench import results

ERRORS = {"output_error": "relative error of the attention output", "logit_error": "largest error of a logit",
          "logit_mae": "mean absolute error of a logit", "kl": "KL divergence of the attention weights, nats",
          "loss_percent": "perplexity lost, percent"}
PARTS = ("append", "attend")

_STRING, _NUMBER, _COUNT = {"type": "string"}, {"type": "number", "minimum": 0}, {"type": "integer", "minimum": 1}


def _list_of(name: str, required: dict) -> dict:
    return {"type": "object", "required": [name], "properties": {name: {"type": "array", "minItems": 1, "items": {
        "type": "object", "required": sorted(required), "properties": required}}}}


SCHEMAS = {
    "kvbench.demo/1": _list_of("outcomes", {"preset": _STRING, "bytes_per_token": _NUMBER,
                                            "bits_per_element": _NUMBER}),
    "kvbench.eval/1": _list_of("cases", {"task": _STRING, "cache": _STRING, "source": _STRING, "nbytes": _NUMBER,
                                         "tokens": _COUNT, "bits_per_element": _NUMBER, "metrics": {"type": "object"}}),
}


def validate(document: dict) -> None:
    """ValueError names the place that does not fit."""
    results.validate(document, SCHEMAS[document["schema"]])


def points(documents: list[dict]) -> list[dict]:
    """One per cache and group, where a group is what can be drawn in one picture: the same keys and values."""
    found = []
    for document in documents:
        read = _demo if document["schema"] == "kvbench.demo/1" else _eval
        found += [{"machine": document["machine"] if isinstance(document.get("machine"), str) else "", **point}
                  for point in read(document)]
    return found


def _demo(document: dict) -> Iterator[dict]:
    for outcome in document["outcomes"]:
        yield {"preset": outcome["preset"], "group": document["file"], "bytes_per_token": outcome["bytes_per_token"],
               "bits": outcome["bits_per_element"], "errors": _errors([outcome]),
               "parts": {part: outcome[f"{part}_us"] for part in PARTS if _is_number(outcome.get(f"{part}_us"))}}


def _eval(document: dict) -> Iterator[dict]:
    """The mean over the captured layers, or whatever else the sources of a task are."""
    grouped: dict[tuple, list[dict]] = {}
    for case in document["cases"]:
        grouped.setdefault((case["task"], case["cache"]), []).append(case)
    for (task, cache), cases in grouped.items():
        yield {"preset": cache, "group": f"{document['file']}: {task}", "parts": {},
               "bytes_per_token": sum(case["nbytes"] / case["tokens"] for case in cases) / len(cases),
               "bits": sum(case["bits_per_element"] for case in cases) / len(cases),
               "errors": _errors([case["metrics"] for case in cases])}


def _errors(metrics: list[dict]) -> dict[str, float]:
    return {error: sum(each[error] for each in metrics) / len(metrics) for error in ERRORS
            if all(_is_number(each.get(error)) for each in metrics)}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
