"""Make the tables and the pictures of README.md again:  make figures

The tables come from the results of `kvbench bench --json` in results/<machine>/*.json and of `kvbench eval --json` in
results/<model>/eval.json, the pictures beside them from the same, the picture of keys and attention from the shipped
sample.
"""
from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kvbench import data
from kvbench.bench import results, timing
from kvbench.cli import table
from kvbench.demo import measurement, pictures
from kvbench.evaluate import driver as eval_driver
from kvbench.evaluate import results as eval_results
from kvbench.reference import rotation
from kvbench.report import contents

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
MARKERS = ("o", "s", "^", "D")
PANELS = 2             # shapes whose speed-up is drawn, those with most results
EVAL = "eval.json"     # in the folder of a model
PUBLISHED = "published.json"
GOALS = (4, 3, 2)      # bits; a cache counts for one if it really takes at most half a bit more
BEGIN, END = "<!-- results: made by results/figures.py -->\n", "<!-- end of results -->\n"


def main() -> None:
    (HERE / "sample.svg").write_text(pictures.standalone(sample_picture(data.sample())[0]), encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    folders = [folder for folder in sorted(HERE.iterdir()) if folder.is_dir()]
    sections = [model_tables(folder) if (folder / EVAL).exists() else results_table(folder) for folder in folders]
    README.write_text(before + BEGIN + "".join(sections) + END + after, encoding="utf-8")


def results_table(folder: Path) -> str:
    """The timed cases of one machine as Markdown, with pictures; nothing for a folder without complete results.

    Attention as one table for each way to flush the caches; the rest as a list.  Every case is listed beside them.  Of
    a case that was measured again, the newest counts.
    """
    runs, _ = contents.load(sorted(folder.glob("*.json")))
    documents = _newest([document for document in runs if document["complete"] and not document["quick"]])
    if not documents:
        return ""
    held = contents.contents(documents, [])
    cases = sorted(((document, case) for document in documents for case in document["cases"] if case["cold"]),
                   key=_order)
    head, columns = ["kernel", "problem", "backend", "flush", "us", "GB/s", "% of copy"], "llllrrr"
    compared = ["best alternative", "us", "speed-up"]
    (folder / "README.md").write_text(
        f"# Every result of `kvbench bench` in this folder\n\n{_machine(documents[0])}\n\n"
        + table(head + compared + ["commit"],
                [_row(*case) + _compared(case[1]) + [_commit(case[0])] for case in cases], columns + "lrrl") + "\n",
        encoding="utf-8")
    tables = [_attention_table(held["rows"], flush) for flush in timing.FLUSHES]
    own = [i for i, name in enumerate(head) if name not in ("backend", "flush")]
    others = [[_row(*case)[i] for i in own] for case in cases
              if not case[1]["baselines"] and results.flush_of(case[0]) == "write"]
    return (f"{_machine(documents[0])} [Every result]({folder.relative_to(HERE.parent)}/README.md).\n\n"
            + "".join(tables) + _published_table(held["rows"], folder.name) + "".join(results_pictures(folder, held))
            + ("Other kernels, other data written over the caches before every call:\n\n"
               + table([head[i] for i in own], others, "".join(columns[i] for i in own)) + "\n\n" if others else ""))


def _newest(documents: list[dict]) -> list[dict]:
    """The documents without the cases that a newer one has, too; none without any case."""
    def key(document, case):
        return case["kernel"], case["backend"], results.flush_of(document), str(sorted(case["problem"].items()))

    newest = {}
    for document in sorted(documents, key=lambda document: document["created"]):
        newest.update({key(document, case): document["file"] for case in document["cases"]})
    kept = [{**document, "cases": [case for case in document["cases"]
                                   if newest[key(document, case)] == document["file"]]} for document in documents]
    return [document for document in kept if document["cases"]]


def _machine(document: dict) -> str:
    machine = document["machine"]
    name = machine["gpu"]["name"] if machine.get("gpu") else machine["processor"]
    return f"{name}; copying memory reaches {document['yardsticks']['copy']['gbps']:.0f} GB/s."


def _published_table(rows: list[dict], machine: str) -> str:
    """Kernels as their authors publish them, measured on this machine in another run, over ours for the same codes."""
    published = json.loads((HERE / PUBLISHED).read_text(encoding="utf-8")).get(machine, [])
    ours = {(row["method"], _column(_cache(row))): row["cold_us"] for row in rows
            if row["attends"] and row["cold_us"] and not row["baseline"] and row["flush"] == "write"}
    columns = list(dict.fromkeys(cache for entry in published for cache in entry["us"]
                                 if (entry["method"], cache) in ours))

    def cell(entry, cache):
        if cache not in entry["us"]:
            return ""
        own = ours.get((entry["method"], cache))
        return f"{entry['us'][cache]:g}" + (f" ({entry['us'][cache] / own:.1f}x)" if own else "")

    body = [[entry["kernel"], *(cell(entry, cache) for cache in columns)] for entry in published]
    return ("" if not columns else
            "Kernels as their authors publish them, microseconds on the same kind of machine in another run; in "
            "brackets, times what\nours needs for the same codes:\n\n"
            + table(["query:KV heads, tokens", *columns], body, "l" + "r" * len(columns)) + "\n\n")


def _attention_table(rows: list[dict], flush: str) -> str:
    """Methods down, caches across: microseconds, and times the speed of the best attention on 16 bits."""
    rows = [row for row in rows if row["attends"] and row["cold_us"] and row["flush"] == flush]
    shapes = Counter(_form(row) for row in rows)
    rows = [row for row in rows if _form(row) == shapes.most_common(1)[0][0]]
    if not rows:
        return ""
    columns = sorted({_cache(row) for row in rows}, key=lambda cache: (cache[1], cache[2], cache[0]))
    best = {cache: min((row["cold_us"] for row in rows if row["exact"] and _cache(row) == cache), default=None)
            for cache in columns}
    found = {(row["method"], _cache(row)): row for row in rows if not row["baseline"]}

    def cell(row):
        if row is None:
            return ""
        return f"{row['cold_us']:.1f}" + (f" ({row['speedup']:.2f}x)" if row["speedup"] else "")

    body = [["best 16-bit attention", *("" if best[cache] is None else f"{best[cache]:.1f}" for cache in columns)],
            *([name, *(cell(found.get((name, cache))) for cache in columns)]
              for name in dict.fromkeys(name for name, _ in found))]
    how = {"write": "other data written over the caches before every call",
           "read": "other data read over the caches before every call, as a model's weights are before its attention"}
    return (f"Attention over a cache ({shapes.most_common(1)[0][0]}), microseconds; in brackets times the speed of the "
            f"best attention on 16 bits in\nthe same run; {how[flush]}:\n\n"
            + table(["query:KV heads, tokens", *map(_column, columns)], body, "l" + "r" * len(columns)) + "\n\n")


def _form(row: dict) -> str:
    """What a table does not vary: head_dim and dtype."""
    return ", ".join(part for part in row["shape"].split(", ") if "heads" not in part and "batch" not in part)


def _cache(row: dict) -> tuple[str, int, int]:
    """(query heads:KV heads, batch, tokens)"""
    parts = row["shape"].split(", ")
    batch = next((int(part.split()[1]) for part in parts if part.startswith("batch")), 1)
    return parts[0].removesuffix(" heads"), batch, row["tokens"]


def _column(cache: tuple[str, int, int]) -> str:
    heads, batch, tokens = cache
    return f"{heads}, {_tokens(tokens)}" + (f", batch {batch}" if batch > 1 else "")


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def results_pictures(folder: Path, held: dict):
    """Draws what there is to draw beside a table, and yields the lines that show it."""
    kernels = [row for row in held["rows"] if row["cold_us"] and not row["baseline"] and row["flush"] == "write"]
    compared = [row for row in kernels if row["speedup"] and row["tokens"]]
    look = _look(row["method"] for row in kernels)
    for name, rows, draw, words in (
            ("speedup", compared, speedup_picture, "Speed-up over the best 16-bit attention, by tokens in the cache"),
            ("roofline", kernels, roofline_picture, "GB/s over bytes that must move, and the roofline")):
        if rows:
            svg, _ = draw(rows, look, held["runs"][rows[0]["run"]])
            (folder / f"{name}.svg").write_text(pictures.standalone(svg), encoding="utf-8")
            yield f"![{words}]({folder.relative_to(HERE.parent)}/{name}.svg)\n\n"


def model_tables(folder: Path) -> str:
    """What each evaluated cache costs one model, and the best within 4, 3 and 2 bits; nothing for an unfinished run."""
    document = eval_results.load(folder / EVAL)
    if not document["complete"]:
        return ""
    cases = {(case["task"], case["cache"]): case for case in eval_results.means(document["cases"])}
    setup = document["setup"]["perplexity"]
    decoded = [case for case in cases.values() if case["task"] == "perplexity"]

    def row(case):
        alone, needle = cases.get(("codecs", case["cache"])), cases.get(("needle", case["cache"]))
        return [f"`{case['cache']}`" if case["cache"] != eval_driver.MODEL else "the model itself",
                f"{case['bits_per_element']:.2f}", f"{case['metrics']['perplexity']:.2f}",
                f"{case['metrics']['loss_percent']:+.1f}", *(
                    [f"{alone['bits_per_element']:.2f}", f"{alone['metrics']['loss_percent']:+.1f}"] if alone else
                    ["", ""]), f"{100 * needle['metrics']['found']:.0f}" if needle else ""]

    best = [(bits, eval_results.best_within(decoded, bits + 0.5, "loss_percent")) for bits in GOALS]
    lengths = " and ".join(map(str, document["setup"]["needle"]["lengths"]))
    return (f"{setup['model']}: perplexity of {setup['tokens']} tokens of English prose after a prompt of "
            f"{setup['prompt']}, each attending to what the cache holds at that step.\n"
            "Bits are of all that it holds at the end, exact tokens and scales included. Codes alone: every key and "
            f"value encoded, none kept exact, no\nprompt. Needles: share found in texts of {lengths} tokens.\n\n"
            + table(["cache", "bits", "perplexity", "loss %", "codes alone: bits", "loss %", "needles %"],
                    [row(case) for case in decoded], "lrrrrrr") + "\n\n"
            + "The best within half a bit of 4, 3 and 2:\n\n"
            + table(["at most", "best cache", "bits", "loss %"],
                    [[f"{bits + 0.5:g} bits", *(row(case)[i] for i in (0, 1, 3))] for bits, case in best if case],
                    "llrr") + "\n\n")


def _order(run_and_case: tuple[dict, dict]) -> tuple:
    """By kernel, then by how much is stored (bits), by tokens, by heads."""
    problem = run_and_case[1]["problem"]
    bits = tuple(value for axis, value in problem.items() if axis.endswith("bits"))
    return (run_and_case[1]["kernel"], bits, problem.get("tokens", 0), problem.get("batch", 1),
            problem.get("kv_heads", 0), results.flush_of(run_and_case[0]), str(problem))


def _row(run: dict, case: dict) -> list[str]:
    problem = case["problem"]
    parts = [f"{problem['kv_heads'] * problem['group']}:{problem['kv_heads']} heads"] if "group" in problem else []
    parts += [f"{problem[axis]}" if isinstance(problem[axis], str) else f"{axis} {problem[axis]}"
              for axis in problem if axis not in ("kv_heads", "group") and (problem[axis] != 1 or axis == "tokens")]
    return [case["kernel"], ", ".join(parts), case["backend"], results.flush_of(run),
            f"{case['cold']['median_us']:.1f}", f"{case['gbps']:.0f}", f"{case['percent_of_copy']:.0f}"]


def _compared(case: dict) -> list[str]:
    best = next((entry for entry in case["baselines"] if entry["name"] == case["best_baseline"]), None)
    return [best["name"], f"{best['cold']['median_us']:.1f}", f"{case['speedup']:.2f}"] if best else [""] * 3


def _commit(run: dict) -> str:
    return (run["source"]["commit"] or "")[:7]


@pictures.picture
def speedup_picture(rows: list[dict], look: dict[str, dict], run: dict):
    """A line per method over tokens; one panel for each of the shapes with most results."""
    shapes = [shape for shape, _ in Counter(row["shape"] for row in rows).most_common(PANELS)]
    look = {method: style for method, style in look.items()
            if any(row["method"] == method and row["shape"] in shapes for row in rows)}
    figure = Figure(figsize=(2 * pictures.WIDTH_INCHES, 2.6 + 0.1 * len(look)), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axis, shape in zip(panels, shapes):
        axis.axhline(1, color=pictures.FAINT, linewidth=1, linestyle="--")
        for method, style in look.items():
            own = sorted((row["tokens"], row["speedup"]) for row in rows
                         if (row["method"], row["shape"]) == (method, shape))
            axis.plot([tokens for tokens, _ in own], [speedup for _, speedup in own], **style, label=method)
        tokens = sorted({row["tokens"] for row in rows if row["shape"] == shape})
        axis.set_xscale("log", base=2)
        axis.set(title=shape, xlabel="tokens in the cache", ylim=(0, None))
        axis.set_xticks(tokens, [_tokens(count) for count in tokens])
        axis.minorticks_off()
        axis.grid(True, axis="y")
    panels[0].set_ylabel("times the best exact")
    _legend(figure, panels)
    return figure, ""


@pictures.picture
def roofline_picture(rows: list[dict], look: dict[str, dict], run: dict):
    """Every case as a point under what launch and memory allow."""
    figure = Figure(figsize=(2 * pictures.WIDTH_INCHES, 2.8 + 0.1 * len(look)), layout="constrained")
    axis = figure.subplots()
    moved = np.geomspace(min(row["bytes"] for row in rows) / 2, max(row["bytes"] for row in rows) * 2, 300)
    axis.plot(moved, moved / np.maximum(run["floor_us"], moved / run["gbps"] / 1e3) / 1e3, color=pictures.FAINT,
              linestyle="--", linewidth=1.2)
    for method, style in look.items():
        own = [(row["bytes"], row["gbps"]) for row in rows if row["method"] == method]
        axis.plot(*zip(*own), **{**style, "linestyle": "none"}, label=method)
    axis.set(xscale="log", ylim=(0, None), xlabel="bytes that must move", ylabel="GB/s, caches flushed")
    axis.xaxis.set_major_formatter(lambda value, _: next(f"{value / size:g} {unit}" for unit, size in (
        ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if value >= size or size == 1))
    axis.grid(True)
    _legend(figure, [axis])
    return figure, ""


def _look(methods) -> dict[str, dict]:
    """method -> how its marks look: colours first, then other markers."""
    styles = ({"marker": marker, "color": colour} for marker, colour in itertools.product(MARKERS, pictures.SERIES))
    return {method: {**style, "markersize": 4, "linewidth": 1.4} for method, style in zip(sorted(set(methods)), styles)}


def _legend(figure: Figure, panels) -> None:
    entries = dict(entry[::-1] for panel in panels for entry in zip(*panel.get_legend_handles_labels()))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2)


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
