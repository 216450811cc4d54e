"""What people read of a run: Markdown rows as they come, and whole runs as Markdown or CSV."""
from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator

from kvbench.bench import baselines as baseline_records
from kvbench.bench import machine, results, yardsticks


class Live:
    """Rows printed as the results come: widths are fixed from the plan."""

    def __init__(self, plan, report: Callable[[str], None]):
        self._report, self._number = report, 0
        names = [kernel.name for kernel, _ in plan] + [f"  {record.name}" for record in baseline_records.BASELINES]
        self._columns = [("#", len(str(len(plan))), str.rjust), ("kernel", max(map(len, names)), str.ljust),
                         ("problem", max([7, *(len(problem_text(problem)) for _, problem in plan)]), str.ljust),
                         *((title, width, str.rjust) for title, width in (
                             ("cold us", 10), ("+-%", 5), ("hot us", 10), ("rotating us", 11), ("GB/s", 7),
                             ("% copy", 6), ("% roof", 6), ("MB", 6), ("error", 7))),
                         ("note", 4, str.ljust)]

    def head(self, document: dict) -> None:
        measured = document["yardsticks"]
        self._report(f"{machine_name(document['machine'])}: "
                     + ", ".join(f"{name} {entry['gbps']:.0f} GB/s" if entry["gbps"] else
                                 f"{name} {(entry['cold'] or entry['hot'])['median_us']:.2f} us"
                                 for name, entry in measured.items()))
        if not document["machine"].get("gpu"):
            self._report(cpu_use(document["machine"]))
        how = {"write": "written", "read": "read"}[results.flush_of(document)]
        self._report(f"cold: other data {how} over the caches before each sample; GB/s, % and +-% belong to it; hot: "
                     "back to back;\nrotating: the same on several sets of inputs, where one would stay in the cache; "
                     f"% roof: of the time that an empty\nkernel ({yardsticks.launch_floor_us(measured):.2f} us) or "
                     "moving the bytes at the measured rate would take; MB: most memory beyond the inputs\n")
        self._line([title for title, _, _ in self._columns])
        self._report("|" + "|".join("-" * (width + 1) + (":" if pad is str.rjust else "-")
                                    for _, width, pad in self._columns) + "|")

    def case(self, case: dict) -> None:
        self._number += 1
        notes = [f"{case['speedup']:.2f}x the speed of {case['best_baseline']}"] if case["speedup"] else []
        limits = machine.clock_limits(str(case["state"].get("clock_limits", "")))
        self._row(str(self._number), case["kernel"], problem_text(case["problem"]), case, notes, limits)
        for entry in case["baselines"]:
            self._row("", f"  {entry['name']}", "", entry, [f"missing: {entry['missing']}"] if entry["missing"] else [])

    def foot(self, document: dict) -> None:
        for skipped in document["skipped"]:
            self._report(f"{skipped['kernel']} is left out: {skipped['reason']}")
        if document["cases"]:
            self._report("\nTo repeat one case:")
        for number, case in enumerate(document["cases"], 1):
            self._report(f"{number:>{self._columns[0][1]}}  {case['command']}")

    def _row(self, number: str, name: str, problem: str, entry: dict, notes: list[str], limits: list[str] = ()) -> None:
        cold, hot = entry["cold"], entry["hot"]
        spread = cold["relative_error"] if cold else None
        used, rotating = entry.get("memory_peak_bytes"), entry.get("rotating")
        self._line([number, name, problem, _number(cold and cold["median_us"], ".2f"),
                    _number(None if spread is None else 100 * spread, ".1f"), _number(hot and hot["median_us"], ".2f"),
                    _number(rotating and rotating["median_us"], ".2f"), _number(entry["gbps"], ".4g"),
                    _number(entry["percent_of_copy"], ".1f"), _number(entry.get("percent_of_attainable"), ".1f"),
                    _number(None if used is None else used / 1e6, ".2f"), _number(entry["error"], ".1e"),
                    "; ".join(notes + remarks(entry, limits))])

    def _line(self, cells: list[str]) -> None:
        self._report("| " + " | ".join(pad(cell, width) for cell, (_, width, pad) in zip(cells, self._columns)) + " |")


def remarks(entry: dict, limits: list[str] = ()) -> list[str]:
    """What a reader must know before using the times of a contender."""
    checked, clock = entry["checked"], entry.get("clock")
    notes = []
    if checked and not checked["agrees"]:
        notes.append(f"WRONG, not timed: {checked['failure']}")
    elif checked and len(checked["parts"]) < checked["of"]:
        notes.append(f"checked in {len(checked['parts'])} of {checked['of']} parts")
    notes += [f"{way} did not converge" for way in ("cold", "hot", "rotating")
              if entry.get(way) and not entry[way]["converged"]]
    if clock and clock["throttled"]:
        why = f" ({', '.join(limits)})" if limits else ""
        notes.append(f"THROTTLED: the clock fell to {clock['sm_mhz']:.0f} MHz, {100 * clock['of_start']:.0f} % of that "
                     f"at the start{why}")
    if entry["note"]:
        notes.append(f"timed by {entry['timer']}: {entry['note']}" if entry["timer"] == "events" else entry["note"])
    return notes


def problem_text(problem: dict) -> str:
    return " ".join(f"{axis}={value}" for axis, value in problem.items())


def machine_name(described: dict) -> str:
    gpu = described.get("gpu")
    return gpu["name"] if gpu else described["processor"]


def cpu_use(described: dict) -> str:
    """How many threads, and what keeps them where they are."""
    threads = ", ".join(f"{name} {count}" for name, count in described.get("threads", {}).items()) or "library defaults"
    pinned = described.get("pinning", {})
    bound = ", ".join(f"{name}={value}" for name, value in pinned.get("threads", {}).items())
    return (f"threads: {threads}; on cores {pinned.get('cores') or 'unknown'} of {described['cores']}, single threads "
            f"{'bound by ' + bound if bound else 'not pinned'}")


# ---- whole runs ------------------------------------------------------------------------------------------------------

def contenders(document: dict) -> Iterator[tuple[dict, dict, str]]:
    """(case, entry, name) of every kernel and, behind it, its baselines; a kernel's entry is the case itself."""
    for case in document["cases"]:
        yield case, case, case["kernel"]
        for entry in case["baselines"]:
            yield case, entry, entry["name"]


TIMES = ("cold", "hot", "rotating")
PLAIN = ("gbps", "percent_of_copy", "percent_of_read", "percent_of_attainable", "memory_peak_bytes", "error", "timer")


def as_csv(documents: list[dict]) -> str:
    """One line per contender and case; the axes of all kernels are columns, empty where a kernel lacks one."""
    axes = list(dict.fromkeys(axis for document in documents for case in document["cases"] for axis in case["problem"]))
    head = ["machine", "commit", "backend", "kernel", "contender", *axes, "bytes_moved",
            *(f"{way}_{part}" for way in TIMES for part in ("median_us", "iqr_us", "p5_us", "p95_us", "min_us", "count",
                                                            "relative_error")),
            *PLAIN, "agrees", "speedup", "best_baseline", "missing", "remarks", "command"]
    text = io.StringIO()
    writer = csv.DictWriter(text, head, lineterminator="\n")
    writer.writeheader()
    for document in documents:
        for case, entry, name in contenders(document):
            row = {"machine": machine_name(document["machine"]), "commit": document["source"]["commit"],
                   "backend": case["backend"], "kernel": case["kernel"], "contender": name, **case["problem"],
                   "bytes_moved": sum(case["traffic"].values()), "agrees": (entry["checked"] or {}).get("agrees"),
                   "missing": entry.get("missing"), "remarks": "; ".join(remarks(entry)), "command": case["command"]}
            if entry is case:
                row |= {"speedup": case["speedup"], "best_baseline": case["best_baseline"]}
            row |= {key: entry.get(key) for key in PLAIN}
            row |= {f"{way}_{key}": value for way in TIMES for key, value in (entry.get(way) or {}).items()
                    if f"{way}_{key}" in head}
            writer.writerow(row)
    return text.getvalue()


def as_markdown(document: dict) -> str:
    """The table that was printed while the run lasted."""
    lines: list[str] = []
    shown = Live([(_Named(case["kernel"]), case["problem"]) for case in document["cases"]], lines.append)
    shown.head(document)
    for case in document["cases"]:
        shown.case(case)
    shown.foot(document)
    return "\n".join(lines) + "\n"


class _Named(str):
    """A kernel of which only the name is known: results may be older or newer than the registry."""

    @property
    def name(self) -> str:
        return str(self)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
