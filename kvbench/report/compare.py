"""Is it faster than before?  Case by case, from the samples of two runs.

The median of each run has an interval from order statistics (bench.timing.median_interval).  The ratio of the medians
then lies between the quotients of their ends with at least 2 * 0.95 - 1 = 90 % probability.  A verdict needs the whole
interval on one side of a margin, so that noise alone makes no regression; what cannot be told is called unclear.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.bench import results, tables, timing

MARGIN = 0.02          # two runs of the same code on the same card differ by up to 1 or 2 %
FASTER, SLOWER, SAME, UNCLEAR, BROKEN, REPAIRED = "faster", "slower", "same", "unclear", "wrong now", "right now"
REGRESSIONS = (SLOWER, BROKEN)


@dataclass(frozen=True)
class Change:
    """One kernel on one problem, timed one way, before and after.

    before_us, after_us  medians; None where that run has no time
    low, high            the interval of after / before; None where a run has too few samples
    reason               why the verdict is unclear, or what is wrong
    """

    kernel: str
    backend: str
    problem: dict
    way: str
    before_us: float | None
    after_us: float | None
    low: float | None
    high: float | None
    verdict: str
    reason: str | None = None

    @property
    def ratio(self) -> float | None:
        return self.after_us / self.before_us if self.after_us and self.before_us else None


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    margin: float

    @property
    def exit_status(self) -> int:
        """1 if a case became slower or wrong."""
        return int(any(change.verdict in REGRESSIONS for change in self.changes))

    def count(self) -> str:
        return ", ".join(f"{number} {verdict}" for verdict in (SLOWER, BROKEN, FASTER, REPAIRED, SAME, UNCLEAR)
                         if (number := sum(change.verdict == verdict for change in self.changes)))


def compare(after: Sequence[dict], before: Sequence[dict], margin: float = MARGIN) -> Comparison:
    """Every case of `after` that `before` has, too.  ValueError where the runs do not compare."""
    for documents, which in ((after, "now"), (before, "before")):
        if not documents:
            raise ValueError(f"the results do not compare: there is none of kvbench bench from {which}")
    for facts, what in ((_machine, "machines"), (lambda document: document["backend"], "backends"),
                        (results.flush_of, "flushes of the caches")):
        one, other = ({facts(document) for document in documents} for documents in (after, before))
        if one != other:
            raise ValueError(f"the results do not compare: they are of different {what}: {_listed(one)} against "
                             f"{_listed(other)}")
    new, old = _by_case(after), _by_case(before)
    common = [key for key in new if key in old]
    if not common:
        raise ValueError("the results do not compare: no case is in both")
    changes = [change for key in common for change in _changes(new[key], old[key], margin)]
    return Comparison(changes, [name(case) for key, case in old.items() if key not in new],
                      [name(case) for key, case in new.items() if key not in old], margin)


def name(case: dict) -> str:
    return f"{case['kernel']} on {case['backend']}, {tables.problem_text(case['problem'])}"


def _changes(new: dict, old: dict, margin: float) -> list[Change]:
    right = [bool(case["checked"] and case["checked"]["agrees"]) for case in (old, new)]
    about = new["kernel"], new["backend"], new["problem"]
    if not all(right):
        verdict = {(True, False): BROKEN, (False, True): REPAIRED, (False, False): UNCLEAR}[tuple(right)]
        reason = (new["checked"] or {}).get("failure") if not right[1] else None
        before, after = (case["cold"]["median_us"] if case["cold"] else None for case in (old, new))
        return [Change(*about, "cold", before, after, None, None, verdict, reason)]
    return [_timed(about, way, old, new, margin) for way in ("cold", "hot", "rotating")
            if old.get(way) and new.get(way)]


def _timed(about, way, old, new, margin) -> Change:
    before, after = old[way]["median_us"], new[way]["median_us"]
    intervals = [timing.median_interval(case[way]["samples_us"]) for case in (old, new)]
    if None in intervals or not all(end > 0 for interval in intervals for end in interval):
        return Change(*about, way, before, after, None, None, UNCLEAR, "too few samples for an interval")
    (old_low, old_high), (new_low, new_high) = intervals
    low, high = new_low / old_high, new_high / old_low
    for case, when in ((old, "before"), (new, "now")):
        if (case.get("clock") or {}).get("throttled"):
            return Change(*about, way, before, after, low, high, UNCLEAR, f"the clock was throttled {when}")
    if old["timer"] != new["timer"]:
        return Change(*about, way, before, after, low, high, UNCLEAR,
                      f"timed by {old['timer']} before, by {new['timer']} now")
    return Change(*about, way, before, after, low, high, verdict_of(low, high, margin))


def verdict_of(low: float, high: float, margin: float) -> str:
    """What an interval of the ratio after / before means."""
    if low > 1 + margin:
        return SLOWER
    if high < 1 / (1 + margin):
        return FASTER
    if low >= 1 / (1 + margin) and high <= 1 + margin:
        return SAME
    return UNCLEAR


def lines(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table; slower ones first."""
    rows = [[change.verdict, change.kernel, tables.problem_text(change.problem), change.way, _us(change.before_us),
             _us(change.after_us), interval_text(change), change.reason or ""]
            for change in ranked(comparison.changes)]
    return ["verdict", "kernel", "problem", "way", "before us", "now us", "now / before", "why"], rows


def ranked(changes: Sequence[Change]) -> list[Change]:
    """What matters most first."""
    order = (BROKEN, SLOWER, UNCLEAR, FASTER, REPAIRED, SAME)
    return sorted(changes, key=lambda change: order.index(change.verdict))


def interval_text(change: Change) -> str:
    if change.low is None:
        return "-"
    return f"{change.ratio:.3f} [{change.low:.3f}, {change.high:.3f}]"


def _by_case(documents: Sequence[dict]) -> dict[tuple, dict]:
    """The latest result of each case."""
    ordered = sorted(documents, key=lambda document: document["created"])
    cases = itertools.chain.from_iterable(document["cases"] for document in ordered)
    return {(case["kernel"], case["backend"], *sorted((axis, str(value)) for axis, value in case["problem"].items())):
            case for case in cases}


def _machine(document: dict) -> str:
    machine = document["machine"]
    return tables.machine_name(machine) if machine.get("gpu") else \
        f"{machine['processor']} ({machine['usable_cores']} cores)"


def _listed(items: set[str]) -> str:
    return ", ".join(sorted(items))


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
