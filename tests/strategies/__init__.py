"""Hypothesis strategies for kernel inputs: seeds and shapes are drawn, large arrays come from a seeded generator.

`inputs(kernel name)` draws the keyword arguments of a kernel, for the reference and the operator alike.
"""
from __future__ import annotations

import importlib

from hypothesis import strategies as st

from kvbench.registry import Kernel


def inputs(kernel: Kernel) -> st.SearchStrategy[dict]:
    """Drawn arguments of a kernel, from tests/strategies/<stem>.py, function <verb>."""
    return getattr(importlib.import_module(f"strategies.{kernel.stem}"), kernel.name.split(".")[1])()
