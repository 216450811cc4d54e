"""What a report shows, taken from result files: plain lists of plain values, for the page and for tables.

Kernels are known by what their results say of them; nothing here names one.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kvbench import registry
from kvbench.bench import results, suites, tables, timing, yardsticks
from kvbench.report import fidelity

# Axes that say how large a problem is; all others are parameters of a method, and part of its name here.
SHAPE_AXES = ("tokens", "parts", "batch", "kv_heads", "group", "head_dim", "dtype")
SIXTEEN_BITS = ("float16", "bfloat16")


def load(paths: Sequence[str | Path]) -> tuple[list[dict], list[dict]]:
    """(results of `kvbench bench`, results of `kvbench demo` or `eval`); ValueError for anything else.

    A result of which no case was finished says nothing and is refused.
    """
    runs, accuracy = [], []
    for path in paths:
        version = _schema(path)
        if version in fidelity.SCHEMAS:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            try:
                fidelity.validate(document)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            accuracy.append({**document, "file": Path(path).name})
        else:
            document = results.load(path).document     # says which schema was expected
            if not document["cases"]:
                raise ValueError(f"{path}: holds no finished case: there is nothing to report")
            runs.append({**document, "file": Path(path).name})
    return runs, accuracy


def contents(runs: list[dict], accuracy: list[dict]) -> dict:
    """Everything that the page draws."""
    machines = list(dict.fromkeys(tables.machine_name(run["machine"]) for run in runs))
    rows = sorted((row for number, run in enumerate(runs) for row in _rows(number, run)),
                  key=lambda row: (row["of"], row["shape"], row["tokens"] or 0, row["machine"], row["run"]))
    _compare_with_best(rows)
    return {"machines": machines, "runs": [_run(run) for run in runs], "rows": rows,
            "points": fidelity.points(accuracy)}


def summaries(held: dict) -> list[tuple[list[str], list[list[str]], str]]:
    """(head, rows, alignment) of the tables for a terminal: the timed kernels, and what caches lose."""
    found = []
    if held["rows"]:
        rows = [[row["method"], row["shape"], _text(row["tokens"], "d"), row["backend"], _text(row["cold_us"], ".1f"),
                 _text(row["gbps"], ".0f"), _text(row["percent"], ".0f"), row["best"] or "",
                 _text(row["speedup"], ".2f"), "; ".join(row["remarks"])]
                for row in held["rows"] if not row["baseline"]]
        found.append((["method", "shape", "tokens", "backend", "cold us", "GB/s", "% roofline", "best exact",
                       "speed-up", "remarks"], rows, "llrlrrrlr"))
    if held["points"]:
        errors = [error for error in fidelity.ERRORS if any(error in point["errors"] for point in held["points"])]
        rows = [[point["preset"], point["group"], f"{point['bytes_per_token']:.1f}", _text(point["bits"], ".2f"),
                 *(_text(point["errors"].get(error), ".1e") for error in errors)] for point in held["points"]]
        head = ["preset", "from", "bytes per token", "bits", *(fidelity.ERRORS[error] for error in errors)]
        found.append((head, rows, "llrr" + "r" * len(errors)))
    return found


def method(case: dict) -> str:
    """The kernel and its parameters that have an effect, such as the bits of a code; of a kernel that the registry does
    not know (any more) all of them."""
    registry.load()
    kernel = registry.KERNELS.get(case["kernel"])
    unnamed = SHAPE_AXES + (kernel.idle_axes(case["problem"]) if kernel else ())
    parameters = ", ".join(f"{axis.replace('_', ' ')} {value}" if not isinstance(value, str) else value
                           for axis, value in case["problem"].items() if axis not in unnamed)
    return f"{case['kernel']} ({parameters})" if parameters else case["kernel"]


def shape(problem: dict) -> str:
    """All of the problem's size but its tokens, as one says it: 32:8 heads, head_dim 128."""
    parts = []
    if {"kv_heads", "group"} <= set(problem):
        parts.append(f"{problem['kv_heads'] * problem['group']}:{problem['kv_heads']} heads")
    elif "kv_heads" in problem:
        parts.append(f"{problem['kv_heads']} KV heads")
    parts += [f"{axis} {problem[axis]}" for axis in ("head_dim", "parts") if axis in problem]
    parts += [f"batch {problem['batch']}"] if problem.get("batch", 1) != 1 else []
    return ", ".join([*parts, *([problem["dtype"]] if "dtype" in problem else [])])


def _rows(number: int, run: dict) -> list[dict]:
    rows = []
    for case, entry, name in tables.contenders(run):
        moved = sum(case["traffic"].values()) if entry is case else entry.get("bytes_moved")
        attainable = None if moved is None else yardsticks.attainable_us(run["yardsticks"], moved)
        cold = entry["cold"]
        interval = timing.median_interval(cold["samples_us"]) if cold else None
        rows.append({
            "run": number, "machine": tables.machine_name(run["machine"]), "backend": case["backend"],
            "flush": results.flush_of(run), "kernel": case["kernel"], "baseline": entry is not case,
            "storage": entry.get("storage"),
            "method": method(case) if entry is case else name, "of": method(case), "shape": shape(case["problem"]),
            "attends": _attends(case["kernel"]), "exact": _exact(case, entry),
            "tokens": case["problem"].get("tokens"), "bytes": moved,
            "cold_us": cold and cold["median_us"], "low_us": interval and interval[0],
            "high_us": interval and interval[1], "hot_us": _median(entry, "hot"),
            "rotating_us": _median(entry, "rotating"), "gbps": entry["gbps"] if moved is not None else None,
            "floor_us": yardsticks.launch_floor_us(run["yardsticks"]), "attainable_us": attainable,
            "percent": 100 * attainable / cold["median_us"] if cold and attainable and cold["median_us"] else None,
            "memory_bytes": entry.get("memory_peak_bytes"), "error": entry["error"], "speedup": None, "best": None,
            "missing": entry.get("missing"), "remarks": tables.remarks(entry), "command": case["command"]})
    return rows


def _compare_with_best(rows: list[dict]) -> None:
    """Speed-up of every attention over the best exact attention of the same shape on the same machine and backend, with
    caches flushed alike.

    That is a baseline on a cache of 16 bits, or on the CPU of the 32 bits that it multiplies.  It comes from the same
    run where that has one, otherwise from another.
    """
    best: dict[tuple, dict] = {}
    for row in rows:
        if row["exact"] and row["cold_us"]:
            for key in (_place(row), (*_place(row), row["run"])):
                if key not in best or row["cold_us"] < best[key]["cold_us"]:
                    best[key] = row
    for row in rows:
        found = best.get((*_place(row), row["run"])) or best.get(_place(row)) if row["attends"] else None
        if found and row["cold_us"]:
            row["speedup"], row["best"] = found["cold_us"] / row["cold_us"], found["method"]


def _place(row: dict) -> tuple:
    return row["machine"], row["backend"], row["flush"], row["shape"], row["tokens"]


def _exact(case: dict, entry: dict) -> bool:
    """A baseline of attention for a model of 16 bits that gives up no accuracy."""
    return (entry is not case and entry.get("storage") is None and case["problem"].get("dtype") in SIXTEEN_BITS
            and _attends(case["kernel"]))


def _attends(kernel: str) -> bool:
    """By the registry; a kernel that it does not know (any more) compares with nothing."""
    registry.load()
    return kernel in registry.KERNELS and any(suites.get(name).belongs(registry.KERNELS[kernel])
                                              for name in ("decode", "step"))


def _run(run: dict) -> dict:
    machine, measured = run["machine"], run["yardsticks"]
    return {"file": run["file"], "machine": tables.machine_name(machine), "backend": run["backend"],
            "created": run["created"], "complete": run["complete"], "quick": run["quick"], "command": run["command"],
            "commit": run["source"]["commit"], "dirty": run["source"]["dirty"], "versions": run["versions"],
            "floor_us": yardsticks.launch_floor_us(measured), "gbps": yardsticks.reached_gbps(measured),
            "copy_gbps": measured.get("copy", {}).get("gbps"), "read_gbps": measured.get("read", {}).get("gbps"),
            "nominal_gbps": (machine.get("gpu") or {}).get("nominal_gbps"),
            "driver": (machine.get("gpu") or {}).get("driver"),
            "processor": None if machine.get("gpu") else tables.cpu_use(machine), "skipped": run["skipped"]}


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _median(entry: dict, way: str) -> float | None:
    return entry[way]["median_us"] if entry.get(way) else None


def _schema(path) -> str | None:
    """What a JSON file says it is; None for what `results.load` refuses with a reason."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document.get("schema") if isinstance(document, dict) else None
