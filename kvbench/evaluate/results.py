"""The result file of `kvbench eval`: one schema, checked before every write and after every read."""
from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kvbench.bench.results import validate as validate_schema

SCHEMA_VERSION = "kvbench.eval/1"
TASKS = ("logits", "perplexity", "codecs", "needle")

_STRING, _NUMBER = {"type": "string"}, {"type": "number"}
_BITS, _COUNT = {"type": "number", "minimum": 0}, {"type": "integer", "minimum": 0}
_STRING_OR_NULL, _FREE = {"type": ["string", "null"]}, {"type": "object"}
_CASE = {
    # Both "cache" and "bits_per_element" are of what did the attention; the model's own is called "model".
    "task": {"enum": list(TASKS)}, "cache": _STRING, "source": _STRING, "bits_per_element": _BITS, "nbytes": _COUNT,
    "tokens": _COUNT, "seconds": _BITS, "metrics": {"type": "object", "additionalProperties": _NUMBER},
}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A run of kvbench eval", "type": "object",
    "required": ["schema", "created", "complete", "command", "machine", "versions", "source", "setup", "cases"],
    "additionalProperties": False,
    "properties": {
        "schema": {"enum": [SCHEMA_VERSION]}, "created": _STRING, "complete": {"type": "boolean"}, "command": _STRING,
        "machine": _FREE, "versions": _FREE,
        "source": {"type": "object", "required": ["commit", "dirty"], "additionalProperties": False,
                   "properties": {"commit": _STRING_OR_NULL, "dirty": {"type": ["boolean", "null"]}}},
        # What every case of a task shares: cases of two runs are comparable if this is equal.
        "setup": {"type": "object", "additionalProperties": _FREE},
        "cases": {"type": "array", "items": {"type": "object", "required": sorted(_CASE), "properties": _CASE,
                                             "additionalProperties": False}},
    },
}


def validate(document: dict) -> None:
    """ValueError names the place that does not fit the schema."""
    validate_schema(document, SCHEMA)


def load(path: str | Path) -> dict:
    """Read and check a result file; ValueError says what is wrong with it."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        validate(document)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a result of kvbench eval: {error}") from error
    return document


def write(document: dict, path: Path) -> None:
    """Replace the file in one step: a reader sees the old file or the new one, never a part."""
    validate(document)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise


def means(cases: Iterable[dict]) -> list[dict]:
    """One case per task and cache: the mean over its sources of bits and metrics, the sum of bytes."""
    grouped: dict[tuple, list[dict]] = {}
    for case in cases:
        grouped.setdefault((case["task"], case["cache"]), []).append(case)
    found = []
    for group in grouped.values():
        metrics = {name: sum(case["metrics"][name] for case in group) / len(group)
                   for name in group[0]["metrics"] if all(name in case["metrics"] for case in group)}
        found.append({**group[0], "metrics": metrics, "nbytes": sum(case["nbytes"] for case in group),
                      "bits_per_element": sum(case["bits_per_element"] for case in group) / len(group),
                      "source": group[0]["source"] if len(group) == 1 else f"mean of {len(group)}"})
    return found


def best_within(cases: Iterable[dict], bits: float, metric: str) -> dict | None:
    """Of the caches that really take at most `bits` per element, the one with the smallest metric: equal bytes."""
    fitting = [case for case in cases if case["bits_per_element"] <= bits and metric in case["metrics"]]
    return min(fitting, key=lambda case: case["metrics"][metric], default=None)
