"""Hypothesis profiles, and which backends the tests of kernels run on here.

ci    50 examples, the same every time (Hypothesis chooses it where CI is set)     deep    2000 random examples, by hand
dev   20 random examples                                                           HYPOTHESIS_PROFILE chooses
"""
import os

# Test processes share the cores; BLAS threads of each would wait for one another.  Read when NumPy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from kvbench import loaders  # noqa: E402

_COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, print_blob=True, **_COMMON)
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

TESTED_BACKENDS = ("reference", "cpu", "simt", "cuda", "native")


def needs(backend):
    """A pytest parameter for the backend, skipped with the reason where this machine lacks it."""
    reason = loaders.availability(backend)
    marks = [pytest.mark.gpu] if backend in ("cuda", "native") else []
    return pytest.param(backend, marks=[*marks, pytest.mark.skipif(reason is not None, reason=str(reason))])


def pytest_collection_modifyitems(items):
    no_gpu = loaders.availability("cuda") and loaders.availability("native")
    for item in items:
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
