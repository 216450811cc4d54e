"""The micro-benchmark driver: what a kernel costs, against this machine's memory and against what one would use.

Rules: correctness before timing, on the inputs that are timed; cold and hot are two results; sampling ends when the
median is known well enough; baselines run in the same process with the same timer; a case that did not converge, a part
that was not checked and a baseline that is missing are said.
"""
from kvbench.bench.driver import profile, run
from kvbench.bench.results import SCHEMA, Results, load, validate

__all__ = ["SCHEMA", "Results", "load", "profile", "run", "validate"]
