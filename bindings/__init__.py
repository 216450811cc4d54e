"""Compiled builds of the CUDA sources; either module may be absent, and kvbench works without them.

``_native``: the kernels compiled by nvcc, launched on a GPU. Without nvcc at build time its ``has_cuda`` is False.
``_simt``: the same kernels compiled by g++, run on the CPU with one fiber per CUDA thread.

Where one is missing, ``missing(module)`` tells why.
"""
from importlib import import_module, resources


def missing(module: str) -> str | None:
    """Why the extension module ``"_native"`` or ``"_simt"`` cannot be used, or None if it can."""
    try:
        loaded = import_module(f"{__name__}.{module}")
    except ImportError as error:
        return _build_note(module) or f"{__name__}.{module} cannot be imported: {error}"
    if not getattr(loaded, "has_cuda", True):
        return _build_note(module) or f"{__name__}.{module} was built without CUDA"
    return None


def _build_note(module: str) -> str | None:
    """What setup.py left beside this file when it could not build all of the module."""
    note = resources.files(__name__).joinpath(f"{module}.missing.txt")
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None
