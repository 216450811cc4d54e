"""`kvbench bench --list`: what can be chosen on the command line, and what this machine lacks of it."""
from __future__ import annotations

from collections.abc import Sequence

from kvbench import registry
from kvbench.bench import axes, baselines
from kvbench.bench.suites import SUITES


def text(names: Sequence[str] = ()) -> str:
    """Suites with their kernels, kernels with their axes (defaults first), baselines with what is missing."""
    kernels = registry.select(names or None)
    lines = ["suites (--suite NAME)"]
    for name, suite in SUITES.items():
        given = "; ".join(f"{axis}={','.join(map(str, values))}" for axis, values in suite.axes.items())
        members = ", ".join(kernel.name for kernel in kernels if suite.belongs(kernel)) or "none"
        lines += [f"  {name}: {suite.summary}", f"      on {given}{', quick' if suite.quick else ''}: {members}"]
    lines += ["", "kernels and their axes (--axis NAME=V1,V2); defaults first; other numbers work, too"]
    for kernel in kernels:
        lines.append(f"  {kernel.name}  [{', '.join(kernel.backends)}]")
        lines += [f"      {axis}: {', '.join(map(str, kernel.axes[axis]))}" if axis in kernel.axes
                  else f"      {axis}: query:KV heads in one, such as 32:8" for axis in axes.names(kernel)]
    lines += ["", "baselines (--baseline NAME,... or all)"]
    for record in baselines.BASELINES:
        works = [kernel.name for kernel in kernels for device in record.devices
                 if record in baselines.of(kernel, device, [record.name])]
        if works:
            lack = baselines.missing(record)
            lines += [f"  {record.name} ({', '.join(record.devices)}): {record.summary}; for "
                      f"{', '.join(dict.fromkeys(works))}", *([f"      missing here: {lack}"] if lack else [])]
    return "\n".join(lines)
