"""What ran: processor, GPU, versions, source.  Everything is read, nothing is set."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import kvbench

SYSTEM_CPU = Path("/sys/devices/system/cpu")
STATUS = Path("/proc/self/status")
FALLBACK_CACHE_BYTES = 64 << 20        # where the system does not tell

PACKAGES = ("numpy", "scipy", "numba", "ml_dtypes", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "torch",
            "flashinfer-python")

# nvidia-smi field -> (our name, converter).  The state changes during a run; the rest is fixed.
GPU_STATE = {
    "clocks.sm": ("sm_mhz", int), "clocks.mem": ("memory_mhz", int), "temperature.gpu": ("temperature_c", int),
    "power.draw": ("power_w", float), "clocks_event_reasons.active": ("clock_limits", str),
}


# Bits of nvidia-smi's clocks_event_reasons.active (nvml.h, nvmlClocksEventReason*) that mean a clock held down.
CLOCK_LIMITS = {0x4: "software power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown",
                0x40: "hardware thermal slowdown", 0x80: "hardware power brake"}
# What binds threads to cores, by library; none of them is set here.
PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def describe() -> dict:
    """The processor and its use by this process.  Threads are named per library: each has a pool of its own."""
    return {
        "system": f"{platform.system()} {platform.release()}", "processor": _processor_name(),
        "cores": os.cpu_count(), "usable_cores": usable_cores(), "cache_bytes": cache_bytes(), "threads": threads(),
        "pinning": pinning(),
    }


def pinning() -> dict:
    """The cores that the scheduler may choose from, and what binds single threads to one of them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return {"cores": _ranges(cores), "threads": {name: os.environ[name] for name in PINNING if name in os.environ}}


def clock_limits(mask: str) -> list[str]:
    """What held the GPU's clocks down, from the bits that nvidia-smi prints ("0x0000000000000004")."""
    try:
        bits = int(mask, 16)
    except ValueError:
        return []
    return [reason for bit, reason in CLOCK_LIMITS.items() if bits & bit]


def versions() -> dict:
    found = {"python": platform.python_version(), "kvbench": kvbench.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source() -> dict:
    """The commit: $KVBENCH_COMMIT, for a tree that was sent without its history or with an old one; else that of the
    working tree that this package runs from, or None."""
    here = Path(__file__)
    if os.environ.get("KVBENCH_COMMIT"):
        return {"commit": os.environ["KVBENCH_COMMIT"], "dirty": None}
    if _output("git", "ls-files", "--error-unmatch", here.name, folder=here.parent) is None:
        return {"commit": None, "dirty": None}     # an installed copy, even if it lies inside some other repository
    return {"commit": _output("git", "rev-parse", "HEAD", folder=here.parent),
            "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no", folder=here.parent))}


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, which containers and job schedulers set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident() -> dict[str, int]:
    """Bytes of this process in memory: now, and the most since reset_peak_resident."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return {name: int(lines[key].split()[0]) << 10 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def reset_peak_resident() -> int | None:
    """Make the peak what is resident now, and return that; None where the system does not allow or know it."""
    try:
        (STATUS.parent / "clear_refs").write_text("5")
        return resident()["now"]
    except (OSError, KeyError, ValueError):
        return None


def cache_bytes() -> int:
    """Size of the last-level cache, summed over its instances (one per core complex on some processors)."""
    largest: dict[str, int] = {}
    level = 0
    for index in SYSTEM_CPU.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            this_level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
            shared_by = (index / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        if this_level > level:
            level, largest = this_level, {}
        if this_level == level:
            largest[shared_by] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    return sum(largest.values()) or FALLBACK_CACHE_BYTES


class Gpu:
    """One NVIDIA GPU, asked through CuPy and, for driver, clocks and temperature, nvidia-smi, which drivers bring."""

    def __init__(self, index: int = 0):
        import cupy

        self._cupy = cupy
        self._index = index
        self._address = cupy.cuda.Device(index).pci_bus_id

    def describe(self) -> dict:
        runtime = self._cupy.cuda.runtime
        properties = runtime.getDeviceProperties(self._index)
        attributes = self._cupy.cuda.Device(self._index).attributes
        # Double data rate: two transfers a clock.  (kHz) (bits).
        nominal = 2 * attributes.get("MemoryClockRate", 0) * attributes.get("GlobalMemoryBusWidth", 0) / 8 * 1e3 / 1e9
        return {
            "name": properties["name"].decode(), "multiprocessors": properties["multiProcessorCount"],
            "compute_capability": f"{properties['major']}.{properties['minor']}",
            "memory_bytes": properties["totalGlobalMem"], "l2_bytes": properties["l2CacheSize"],
            "driver": self._query("driver_version"), "cuda_driver": _cuda_version(runtime.driverGetVersion()),
            "cuda_runtime": _cuda_version(runtime.runtimeGetVersion()), "nominal_gbps": round(nominal, 1) or None,
        }

    def state(self) -> dict:
        """Clocks, temperature, power and what limits the clocks, now; empty where nvidia-smi does not answer."""
        cells = (self._query(",".join(GPU_STATE)) or "").split(",")
        if len(cells) != len(GPU_STATE):
            return {}
        state = {}
        for cell, (name, convert) in zip(cells, GPU_STATE.values()):
            try:
                state[name] = convert(cell.strip())
            except ValueError:             # "[N/A]" on some boards
                continue
        return state

    def _query(self, fields: str) -> str | None:
        return _output("nvidia-smi", f"--id={self._address}", f"--query-gpu={fields}", "--format=csv,noheader,nounits")


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def threads() -> dict:
    """Threads of each library that is loaded, and the environment that set them."""
    found = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
                                                   "NUMBA_NUM_THREADS") if name in os.environ}
    if numba := sys.modules.get("numba"):
        found["numba"] = numba.get_num_threads()
    if torch := sys.modules.get("torch"):
        found["torch"] = torch.get_num_threads()
    return found


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _output(*command: str, folder: Path | None = None) -> str | None:
    """What a program prints; None if it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
