"""The result file: one schema, checked before every write and after every read."""
from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvbench.bench.timing import FLUSHES

SCHEMA_VERSION = "kvbench.bench/1"


def _object(required: dict, optional: dict | None = None) -> dict:
    return {"type": "object", "required": sorted(required), "properties": {**required, **(optional or {})},
            "additionalProperties": False}


def _or_null(schema: dict) -> dict:
    return {**schema, "type": [schema["type"], "null"]} if "type" in schema else schema


_STRING, _BOOLEAN, _COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
_NUMBER, _LIST_OF_STRINGS = {"type": "number", "minimum": 0}, {"type": "array", "items": {"type": "string"}}
_FREE = {"type": "object"}     # facts about a machine differ from machine to machine

_MEASUREMENT = _object({
    "median_us": _NUMBER, "iqr_us": _NUMBER, "p5_us": _NUMBER, "p95_us": _NUMBER, "min_us": _NUMBER, "count": _COUNT,
    "converged": _BOOLEAN, "relative_error": _or_null(_NUMBER),
    "samples_us": {"type": "array", "items": _NUMBER, "minItems": 1}})
_CLOCK = _object({"sm_mhz": _NUMBER, "of_start": _NUMBER, "throttled": _BOOLEAN})
_CHECKED = _object({"agrees": _BOOLEAN, "failure": _or_null(_STRING), "parts": _LIST_OF_STRINGS, "of": _COUNT})
_TIMED = {"checked": _or_null(_CHECKED), "error": _or_null(_NUMBER), "timer": _or_null(_STRING),
          "note": _or_null(_STRING), "cold": _or_null(_MEASUREMENT), "hot": _or_null(_MEASUREMENT),
          "gbps": _or_null(_NUMBER),
          "percent_of_copy": _or_null(_NUMBER), "percent_of_read": _or_null(_NUMBER)}
# Absent from results of before these were measured.
_TIMED_LATER = {"percent_of_attainable": _or_null(_NUMBER), "memory_peak_bytes": _or_null(_COUNT),
                "rotating": _or_null(_MEASUREMENT), "input_sets": _or_null(_COUNT), "clock": _or_null(_CLOCK)}

SCHEMA = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A run of kvbench bench", **_object({
    "schema": {"enum": [SCHEMA_VERSION]}, "created": _STRING, "complete": _BOOLEAN, "command": _STRING,
    "backend": _STRING, "quick": _BOOLEAN, "seed": _COUNT,
    "stop_rule": _object({"relative_error": _NUMBER, "minimum_samples": _COUNT, "minimum_seconds": _NUMBER,
                          "limit_seconds": _NUMBER, "warm_up_seconds": _NUMBER}),
    "machine": _FREE, "versions": _FREE,
    "source": _object({"commit": _or_null(_STRING), "dirty": _or_null(_BOOLEAN)}),
    "yardsticks": {"type": "object", "additionalProperties": _object({
        "bytes_moved": _COUNT, "gbps": _or_null(_NUMBER), "timer": _STRING, "cold": _or_null(_MEASUREMENT),
        "hot": _or_null(_MEASUREMENT)})},
    "skipped": {"type": "array", "items": _object({"kernel": _STRING, "reason": _STRING})},
    "cases": {"type": "array", "items": _object({
        "kernel": _STRING, "backend": _STRING, "problem": _FREE, "command": _STRING, "inputs": _or_null(_STRING),
        "traffic": _object({"bytes_read": _COUNT, "bytes_written": _COUNT}), **_TIMED,
        "best_baseline": _or_null(_STRING), "speedup": _or_null(_NUMBER), "state": _FREE,
        "baselines": {"type": "array", "items": _object(
            {"name": _STRING, "missing": _or_null(_STRING), **_TIMED},
            {"storage": _or_null(_STRING), "bytes_moved": _or_null(_COUNT), **_TIMED_LATER})},
    }, _TIMED_LATER)},
}, {"flush": {"enum": list(FLUSHES)}})}   # absent from results of before there was a choice: "write"


def flush_of(document: dict) -> str:
    """How the caches were flushed before the cold samples of a run."""
    return document.get("flush", "write")


@dataclass
class Results:
    """A run: `document` is what the file holds."""

    document: dict
    interrupted: bool = False

    @property
    def failures(self) -> list[dict]:
        """Cases whose kernel did not agree with its reference, or could not run."""
        return [case for case in self.document["cases"] if not (case["checked"] and case["checked"]["agrees"])]

    @property
    def exit_status(self) -> int:
        """0: every kernel agreed with its reference; 1: one did not; 130: Ctrl-C ended the run."""
        return 130 if self.interrupted else 1 if self.failures else 0

    def write(self, path: str | Path) -> None:
        """Replace the file in one step: a reader sees the old file or the new one, never a part."""
        validate(self.document)
        write_text(path, _lists_on_one_line(json.dumps(self.document, indent=1, allow_nan=False)) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Replace a file in one step."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())     # mkstemp makes it private; a result is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load(path: str | Path) -> Results:
    """Read and check a result file; ValueError says what is wrong with it."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    version = document.get("schema") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: expected a result of schema {SCHEMA_VERSION!r}, got {version!r}")
    try:
        validate(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Results(document, interrupted=not document["complete"])


def validate(value, schema: dict = SCHEMA, where: str = "result") -> None:
    """Check against the part of JSON Schema that SCHEMA uses; ValueError names the place."""
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"{where}: expected one of {schema['enum']}, got {value!r}")
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is(value, name) for name in types):
        raise ValueError(f"{where}: expected {' or '.join(types)}, got {value!r:.60}")
    if isinstance(value, dict):
        for key in schema.get("required", []):
            if key not in value:
                raise ValueError(f"{where}: {key!r} is missing")
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, item in value.items():
            if key in properties:
                validate(item, properties[key], f"{where}.{key}")
            elif others is False:
                raise ValueError(f"{where}: unknown key {key!r}")
            elif others is not True:
                validate(item, others, f"{where}.{key}")
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            raise ValueError(f"{where}: expected at least {schema['minItems']} items, got {len(value)}")
        for i, item in enumerate(value):
            validate(item, schema.get("items", {}), f"{where}[{i}]")
    elif "minimum" in schema and value is not None and value < schema["minimum"]:
        raise ValueError(f"{where}: expected at least {schema['minimum']}, got {value!r}")


def _is(value, name: str) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {"object": isinstance(value, dict), "array": isinstance(value, list), "string": isinstance(value, str),
            "boolean": isinstance(value, bool), "null": value is None, "number": number and math.isfinite(value),
            "integer": number and isinstance(value, int)}[name]


def _lists_on_one_line(text: str) -> str:
    """Indented JSON with each list of samples on one line: samples are for machines."""
    return re.sub(r'"samples_us": \[[^]]*\]', lambda found: re.sub(r"\s+", " ", found.group()), text)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
