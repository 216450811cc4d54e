"""`kvbench demo`: every preset on real keys and values, as a table and as one page to look at."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from kvbench import __version__


SCHEMA_VERSION = "kvbench.demo/1"


class Demo(NamedTuple):
    """What the command shows: a table, what its columns mean, the text of the page, and all of it as JSON."""

    head: list[str]
    rows: list[list[str]]
    legend: dict[str, str]
    page: str
    document: dict


def run(progress: Callable[[str], None]) -> Demo:
    """Measure every preset on the shipped sample with the fast backend of this machine."""
    from kvbench import data
    from kvbench.demo import measurement, page

    sample, backend = data.sample(), measurement.backend_here()
    outcomes = measurement.measure(sample, backend, progress)
    machine = measurement.machine_here(backend)
    head = ["preset", "bytes", "bits", "ratio", "error", "attended", "mass", "logit error", "prompt ms", "step us"]
    rows = [[o.preset, f"{o.nbytes:,}", f"{o.bits_per_element:.2f}", f"{o.ratio:.2f}", f"{o.output_error:.1e}",
             f"{100 * o.attended:.0f} %", f"{o.mass:.3f}", f"{o.logit_error:.1e}", f"{o.prompt_ms:.2f}",
             f"{o.step_us:.0f}"] for o in outcomes]
    legend = {
        "bytes": f"all that the cache holds after {len(sample.keys[0, 0])} tokens",
        "bits": "the same per number of keys and values, scales and padding included",
        "ratio": "16 bits over that",
        "error": "of the attention output over all decode steps, relative to exact attention in float64",
        "attended": "share of the tokens whose keys and values a decode step reads, mean over the steps",
        "mass": "share of the exact attention weights that these tokens have",
        "logit error": "the largest of the last step's queries on the keys as the preset stores them",
        "prompt ms": f"time to append the prompt, best of a few passes, backend {backend} on {machine}",
        "step us": "median time of one decode step (append a token, attend, wait for the result) in the best pass",
    }
    document = {"schema": SCHEMA_VERSION, "kvbench": __version__, "machine": machine, "backend": backend,
                "sample": dict(sample.metadata),
                "outcomes": [{**dataclasses.asdict(o), "bytes_per_token": o.bytes_per_token,
                              "bits_per_element": o.bits_per_element} for o in outcomes]}
    return Demo(head, rows, legend, page.render(sample, outcomes, head, rows, legend, machine), document)
