"""What this machine can do, measured in the same run by the same timer: the figures that kernels are compared with.

    copy           bytes read plus bytes written per second of a large copy
    read           bytes read per second by a kernel (on the host: by all threads) that does nothing else
    empty_kernel   a kernel without work, empty_graph: a graph without a kernel (GPU): what the timer itself costs
    empty_call     a Python call without work (host)
"""
from __future__ import annotations

from kvbench.bench import timing


def measure(place, rule: timing.StopRule) -> dict[str, dict]:
    """name -> {bytes_moved, gbps or None, median_us, ...}.  Copy and read are hot, on buffers larger than any cache."""
    found = {}
    for name, (stopwatch, moved) in place.yardsticks().items():
        if moved:
            summary = timing.measure(stopwatch.hot, rule).summary()
            found[name] = {"bytes_moved": moved, "gbps": gbps(moved, summary["median_us"]), "timer": stopwatch.timer,
                           "cold": None, "hot": summary}
        else:
            found[name] = {"bytes_moved": 0, "gbps": None, "timer": stopwatch.timer,
                           "cold": timing.measure(stopwatch.cold, rule).summary(),
                           "hot": timing.measure(stopwatch.hot, rule).summary()}
        stopwatch = None
    place.release()
    return found


def gbps(moved: int, microseconds: float) -> float | None:
    """10^9 bytes per second."""
    return round(moved / microseconds / 1e3, 3) if microseconds > 0 else None
