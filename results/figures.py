"""Make the tables and the picture of README.md again:  make figures

The tables come from the results of `kvbench bench --json` in results/<machine>/*.json, the picture from the shipped
sample.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kvbench import bench, data
from kvbench.cli import table
from kvbench.demo import measurement, pictures
from kvbench.reference import rotation

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: made by results/figures.py -->\n", "<!-- end of results -->\n"


def main() -> None:
    (HERE / "sample.svg").write_text(pictures.standalone(sample_picture(data.sample())[0]), encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = [results_table(folder) for folder in sorted(HERE.iterdir()) if folder.is_dir()]
    README.write_text(before + BEGIN + "".join(sections) + END + after, encoding="utf-8")


def results_table(folder: Path) -> str:
    """Every timed case of one machine as Markdown; nothing for a folder without complete results."""
    documents = [bench.load(path).document for path in sorted(folder.glob("*.json"))]
    documents = [document for document in documents if document["complete"] and not document["quick"]]
    if not documents:
        return ""
    cases = [case for document in documents for case in document["cases"] if case["cold"]]
    rows = [_row(case) for case in sorted(cases, key=_order)]
    machine = documents[0]["machine"]
    name = machine["gpu"]["name"] if machine.get("gpu") else machine["processor"]
    copy = documents[0]["yardsticks"]["copy"]["gbps"]
    return (f"{name}; copying memory reaches {copy:.0f} GB/s. Times are cold: caches flushed before every call.\n\n"
            + table(["kernel", "problem", "backend", "us", "GB/s", "% of copy", "best alternative", "us", "speed-up"],
                    rows, "lllrrrlrr") + "\n\n")


def _order(case: dict) -> tuple:
    """By kernel, then by how much is stored (bits), by tokens, by heads."""
    problem = case["problem"]
    bits = tuple(value for axis, value in problem.items() if axis.endswith("bits"))
    return case["kernel"], bits, problem["tokens"], problem["batch"], problem["kv_heads"], str(problem)


def _row(case: dict) -> list[str]:
    problem = case["problem"]
    parts = [f"{problem['kv_heads'] * problem['group']}:{problem['kv_heads']} heads"] if "group" in problem else []
    parts += [f"{problem[axis]}" if isinstance(problem[axis], str) else f"{axis} {problem[axis]}"
              for axis in problem if axis not in ("kv_heads", "group") and problem[axis] != 1]
    best = next((entry for entry in case["baselines"] if entry["name"] == case["best_baseline"]), None)
    compared = [best["name"], f"{best['cold']['median_us']:.1f}", f"{case['speedup']:.2f}"] if best else [""] * 3
    return [case["kernel"], ", ".join(parts), case["backend"], f"{case['cold']['median_us']:.1f}",
            f"{case['gbps']:.0f}", f"{case['percent_of_copy']:.0f}", *compared]


@pictures.picture
def sample_picture(sample: data.Sample):
    """What real keys and real attention look like: outlier channels, and few tokens with most of the mass."""
    keys = sample.keys[0, 0].astype(np.float64)
    mass = measurement.attention_mass(sample)
    figure = Figure(figsize=(2 * pictures.WIDTH_INCHES, 2.4), layout="constrained")
    channels, tokens = figure.subplots(1, 2)
    turned = rotation.rotate(keys, rotation.hadamard(keys.shape[1], seed=0))
    for x, colour, label in [(keys, pictures.SERIES[1], "as they are"), (turned, pictures.SERIES[0], "rotated")]:
        channels.stairs(np.sqrt(np.mean(x**2, axis=0)), color=colour, label=label, linewidth=1.4)
    channels.set(xlabel="channel", ylabel="RMS of the keys", ylim=(0, None))
    channels.legend()
    for head, colour in zip(range(len(mass)), pictures.SERIES):
        tokens.plot(np.arange(1, mass.shape[1] + 1), np.cumsum(np.sort(mass[head])[::-1]), color=colour,
                    label=f"query head {head}")
    tokens.set(xscale="log", xlim=(1, mass.shape[1]), ylim=(0, 1.02), xlabel="tokens, heaviest first",
               ylabel="attention mass")
    tokens.xaxis.set_major_formatter("{x:g}")
    tokens.legend()
    return figure, ""


if __name__ == "__main__":
    main()
