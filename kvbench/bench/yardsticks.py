"""What this machine can do, measured in the same run by the same timer: the figures that kernels are compared with.

    copy           bytes read plus bytes written per second of a large copy
    read           bytes read per second by a kernel (on the host: by all threads) that does nothing else
    empty_kernel   a kernel without work, empty_graph: a graph without a kernel (GPU): what the timer itself costs
    empty_call     a Python call without work (host)

The roofline of a call is a processor without instructions: it takes the launch of an empty kernel, or the time in which
its bytes cross the memory bus at the measured rate, whichever is longer.
"""
from __future__ import annotations

from kvbench.bench import timing


def measure(place, rule: timing.StopRule) -> dict[str, dict]:
    """name -> {bytes_moved, gbps, timer, cold, hot}.  Copy and read are hot, on buffers larger than any cache."""
    found = {}
    for name, (stopwatch, moved, ways) in place.yardsticks().items():
        times = {way: timing.measure(getattr(stopwatch, way), rule).summary() if way in ways else None
                 for way in ("cold", "hot")}
        found[name] = {"bytes_moved": moved, "gbps": gbps(moved, times["hot"]["median_us"]) if moved else None,
                       "timer": stopwatch.timer, **times}
    return found


def launch_floor_us(measured: dict[str, dict]) -> float:
    """What a call without work takes, in microseconds."""
    entry = measured.get("empty_kernel") or measured.get("empty_call") or {}
    return ((entry.get("cold") or entry.get("hot")) or {}).get("median_us", 0.0)


def reached_gbps(measured: dict[str, dict]) -> float | None:
    """The faster of copy and read: what the memory gave to a kernel that only moves bytes."""
    return max((entry["gbps"] for entry in measured.values() if entry["gbps"]), default=None)


def attainable_us(measured: dict[str, dict], moved: int) -> float | None:
    """The roofline: the least time, in microseconds, for a call that moves so many bytes."""
    speed = reached_gbps(measured)
    return max(launch_floor_us(measured), moved / speed / 1e3) if speed else None


def gbps(moved: int, microseconds: float) -> float | None:
    """10^9 bytes per second."""
    return round(moved / microseconds / 1e3, 3) if microseconds > 0 else None
