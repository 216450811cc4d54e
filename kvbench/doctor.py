"""`kvbench doctor`: what this machine offers, what is missing, and the command that would supply it."""
from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata

from kvbench import __version__
from kvbench.registry import BACKENDS

# Distributions that may provide a library; the first one installed counts.
LIBRARIES = {
    "numpy": ("numpy",), "scipy": ("scipy",), "numba": ("numba",), "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "torch": ("torch",), "jax": ("jax",), "matplotlib": ("matplotlib",), "safetensors": ("safetensors",),
}


def examine() -> dict:
    """The findings as plain data: what `kvbench doctor --json` prints.  Imports no framework and launches nothing."""
    from kvbench import loaders

    return {
        "kvbench": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backends": {backend: {"available": reason is None, "reason": reason}
                     for backend in BACKENDS for reason in [loaders.availability(backend)]},
        "libraries": {name: _installed(distributions) for name, distributions in LIBRARIES.items()},
        "compilers": {"c++": _first_line("g++", "--version"), "nvcc": _last_line("nvcc", "--version")},
        "gpus": _gpus(),
        "cuda_headers": _cuda_headers(),
    }


def text(report: dict) -> str:
    """The findings for people."""
    def section(title, rows):
        width = max(len(name) for name, _ in rows)
        return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows)])

    gpus = [(f"{i}", f"{gpu['name']}, {gpu['memory']}, driver {gpu['driver']}, "
                     f"compute capability {gpu['compute_capability']}") for i, gpu in enumerate(report["gpus"])]
    return "\n\n".join([
        f"kvbench {report['kvbench']}, Python {report['python']}, {report['platform']}, {report['cores']} cores",
        section("Backends", [(name, "available" if state["available"] else f"missing: {state['reason']}")
                             for name, state in report["backends"].items()]),
        section("GPUs", gpus or [("none", "nvidia-smi lists no GPU")]),
        section("Libraries", [(name, version or "not installed") for name, version in report["libraries"].items()]),
        section("Compilers", [(name, found or "not found") for name, found in report["compilers"].items()]
                + [("CUDA headers", report["cuda_headers"] or "not found; pip install 'kvbench[cuda13]' brings them")]),
    ])


def _installed(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return version if len(distributions) == 1 else f"{version} ({name})"
    return None


def _output(*command: str) -> list[str]:
    """The lines that a program prints; none if it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _first_line(*command: str) -> str | None:
    return next(iter(_output(*command)), None)


def _last_line(*command: str) -> str | None:
    return next(reversed(_output(*command)), None)


def _gpus() -> list[dict]:
    fields = ("name", "driver_version", "memory.total", "compute_cap")
    lines = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    names = ("name", "driver", "memory", "compute_capability")
    return [dict(zip(names, (cell.strip() for cell in line.split(",")))) for line in lines]


def _cuda_headers() -> str | None:
    """The folder with cuda_fp16.h, which NVRTC needs at run time."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError:
        return None
    return find_nvidia_header_directory("cudart")
