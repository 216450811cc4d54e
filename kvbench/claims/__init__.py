"""Run the claims that the references state, and report what was found (`kvbench prove`).

    results = run(["rotation"], seed=0)        # -> [Result]
    print(table(results)); exit_status(results)

What a claim is, and how it is judged, is `kvbench.reference.claim`.
"""
from __future__ import annotations

import hashlib
import importlib
import json
import math
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import scipy

import kvbench
import kvbench.reference
from kvbench.reference.claim import MINIMUM_SAMPLES, SIGMAS, Claim, Evidence
from kvbench.registry import nearest

SCHEMA = "kvbench.claims/1"


@dataclass(frozen=True)
class Result:
    """One claim of one algorithm, the evidence found, and what it takes to find it again: seed and number of cases."""

    algorithm: str
    claim: Claim
    evidence: Evidence
    seed: int
    cases: int
    seconds: float

    @property
    def holds(self) -> bool:
        return self.evidence.holds


def algorithms() -> Mapping[str, tuple[Claim, ...]]:
    """The claims of every reference module that states some, by the name of the module."""
    found = {}
    for module in pkgutil.iter_modules(kvbench.reference.__path__):
        claims = getattr(importlib.import_module(f"kvbench.reference.{module.name}"), "CLAIMS", None)
        if claims is not None:
            names = [claim.name for claim in claims]
            if len(set(names)) < len(names):
                raise ValueError(f"reference {module.name!r} states two claims of one name: {sorted(names)}")
            found[module.name] = tuple(claims)
    return found


def prove(names: Iterable[str] | str | None = None, samples: int | None = None, seed: int = 0,
          progress: Callable[[str], None] | None = None) -> Iterator[Result]:
    """Check the claims of the named algorithms (default: of all) one after another; what was yielded is kept on Ctrl-C.

    samples   cases per claim (default: the claim's own number)
    seed      any integer; with the names of algorithm and claim it fixes the draws, whatever else is run
    progress  told what is being checked, in one line, before each claim; "" at the end

    ValueError for an unknown algorithm names the nearest ones.
    """
    known = algorithms()
    names = [names] if isinstance(names, str) else list(names or known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown algorithm {name!r}{nearest(name, known)}")
    if samples is not None and (not _is_integer(samples) or samples < MINIMUM_SAMPLES):
        raise ValueError(f"claims: samples: expected an integer of at least {MINIMUM_SAMPLES}, got {samples!r}")
    if not _is_integer(seed):
        raise ValueError(f"claims: seed: expected an integer, got {seed!r}")

    chosen = [(name, claim) for name in dict.fromkeys(names) for claim in known[name]]
    for position, (algorithm, claim) in enumerate(chosen, start=1):
        if progress is not None:
            progress(f"{algorithm}: {claim.name} ({position} of {len(chosen)})")
        start = time.perf_counter()
        cases = claim.samples if samples is None else int(samples)
        evidence = claim.check(generator(seed, algorithm, claim.name), cases)
        yield Result(algorithm, claim, evidence, int(seed), cases, time.perf_counter() - start)
    if progress is not None:
        progress("")


def run(names: Iterable[str] | str | None = None, samples: int | None = None, seed: int = 0,
        progress: Callable[[str], None] | None = None) -> list[Result]:
    """All results of `prove` at once."""
    return list(prove(names, samples, seed, progress))


def generator(seed: int, algorithm: str, claim: str) -> np.random.Generator:
    """The source of one claim's draws; it depends on nothing else that runs."""
    digest = hashlib.sha256(json.dumps([int(seed), algorithm, claim]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def exit_status(results: Iterable[Result]) -> int:
    """0 when every claim held, 1 when one did not."""
    return int(not all(result.holds for result in results))


def table(results: Iterable[Result]) -> str:
    """A Markdown table for people.  Intervals are at 6 sigma; a deterministic check reports its worst case alone."""
    rows = [("algorithm", "claim", "kind", "estimate", "interval", "expected", "samples", "verdict", "source")]
    for r in results:
        e = r.evidence
        interval = "" if e.low == e.high else f"[{e.low:.5g}, {e.high:.5g}]"
        rows.append((r.algorithm, r.claim.name, r.claim.kind, f"{e.estimate:.5g}", interval,
                     f"{e.relation} {e.expected:.5g}", str(e.samples), "holds" if r.holds else "FALSE", r.claim.source))
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def explain(results: Iterable[Result]) -> str:
    """The claims that did not hold, in full: what was stated, what was found, and the call that finds it again."""
    lines = []
    for r in results:
        if not r.holds:
            e = r.evidence
            lines += [f"{r.algorithm}: {r.claim.name} does not hold.",
                      f"  stated: {r.claim.statement} ({r.claim.source})",
                      f"  found:  {e.estimate:.8g} in [{e.low:.8g}, {e.high:.8g}] from {e.samples} samples; {e.note}",
                      f"  needed: {e.relation} {e.expected:.8g}",
                      f"  again:  kvbench prove {r.algorithm} --seed {r.seed}"
                      + (f" --samples {r.cases}" if r.cases != r.claim.samples else "")]
    return "\n".join(lines)


def to_json(results: Iterable[Result]) -> dict:
    """All of it as a JSON document.  A number that is not finite is null; `holds` is false for NaN."""
    return {
        "schema": SCHEMA,
        "versions": {"kvbench": kvbench.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
        "sigmas": SIGMAS,
        "results": [{
            "algorithm": r.algorithm, "claim": r.claim.name, "kind": r.claim.kind,
            "statement": r.claim.statement, "source": r.claim.source,
            "seed": r.seed, "cases": r.cases, "seconds": round(r.seconds, 6), "holds": r.holds,
            **{key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in asdict(r.evidence).items()},
        } for r in results],
    }


def _is_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
