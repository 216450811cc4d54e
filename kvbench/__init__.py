"""kvbench: a workbench for KV-cache compression kernels.

    from kvbench import codecs, caches, ops         # parts, presets, and the kernels alone
"""
import importlib

__version__ = "0.1.0"

_MODULES = ("arrays", "bench", "caches", "claims", "codecs", "indexes", "ops", "registry",
            "selectors")


def __getattr__(name):
    # Submodules load when they are used: `import kvbench` stays quick, and Numba compiles nothing for `kvbench doctor`.
    if name in _MODULES:
        return importlib.import_module(f"kvbench.{name}")
    raise AttributeError(f"module 'kvbench' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_MODULES])
