"""The report as one HTML file that needs nothing else: tables made here, charts drawn by the scripts inside."""
from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from kvbench import __version__
from kvbench.report import compare, contents, fidelity

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>kvbench report</title>
<style>
$style</style>
</head>
<body>
<header><div><h1>$title</h1><p class="soft">$subtitle</p></div><button id="theme" title="light, dark, or as the system"
>theme: auto</button></header>
$facts
$comparison
$bench
$fidelity
<h2>Where these numbers are from</h2>
$sources
<footer><p>Made by kvbench $version.</p></footer>
<div id="tip" role="status"></div>
<script type="application/json" id="data">$data</script>
<script>
$charts
$script</script>
</body>
</html>
""")

_BENCH = """<div class="controls" data-needs-rows>
<label>machine<select id="place"></select></label>
<label>shape of the attention<select id="shape"></select></label>
<label>show only<input type="search" id="filter" placeholder="words, such as 128K 32:8"></label>
<label class="check"><input type="checkbox" id="baselines"> baselines in the table</label>
</div>
<div class="legend" id="legend" data-needs-rows></div>
<div class="charts">
<figure class="large" data-needs-rows><h3>Speed-up over the best exact attention</h3><div id="speedup"></div>
<figcaption>Cold calls: the caches are flushed before each. The dashed line is the fastest attention on an
uncompressed cache, of 16 bits (on a CPU also 32), that was timed for the same shape.</figcaption></figure>
<figure class="large" data-needs-rows><h3>Roofline</h3><div id="roofline"></div>
<figcaption>What a call must move, over the time that it takes, below the dashed line: the launch of an empty kernel on
the left, the measured rate of the memory on the right.</figcaption></figure>
<figure data-needs-rows><h3>Where the time of a call goes</h3><div class="pick" id="pick-tokens"></div>
<div class="keys"><span><i style="background: var(--floor)"></i>launch of an empty kernel</span>
<span><i style="background: var(--move)"></i>moving the bytes</span>
<span><i style="background: var(--rest)"></i>the rest: instructions, latency, merge</span></div>
<div id="breakdown"></div>
<figcaption>Moving the bytes is their number over the measured rate of the memory, as far as it exceeds the launch.
</figcaption>
</figure>
<figure><h3>Bytes per token against error</h3><div class="pick" id="pick-group"></div>
<div class="pick" id="pick-error"></div><div id="pareto"></div>
<figcaption>Whole caches on real keys and values, everything that they hold counted. Lower left is better; the line
joins those that no other beats in both.</figcaption></figure>
<figure><h3>Parts of a decode step</h3>
<div class="keys"><span><i style="background: var(--rest)"></i>append a token</span>
<span><i style="background: var(--move)"></i>attend</span></div><div id="steps"></div>
<figcaption>One small head, where the host's share is large; each part is waited for.</figcaption></figure>
</div>
<h2 data-needs-rows>All times</h2>
<p class="count" id="count" data-needs-rows></p>"""

# (title, row -> value, how it is shown); numbers are right-aligned and sort as numbers.  A column without values is
# left out, and that of machines where there is only one.
_COLUMNS = (
    ("method", lambda row: row["method"], str),
    ("shape", lambda row: row["shape"], str),
    ("tokens", lambda row: row["tokens"], lambda n: f"{n:,}"),
    ("cold us", lambda row: row["cold_us"], lambda n: f"{n:,.1f}"),
    ("speed-up", lambda row: row["speedup"], lambda n: f"{n:.2f}"),
    ("over", lambda row: row["best"], str),
    ("% of roofline", lambda row: row["percent"], lambda n: f"{n:.0f}"),
    ("GB/s", lambda row: row["gbps"], lambda n: f"{n:,.0f}"),
    ("± %", lambda row: _half_width(row), lambda n: f"{n:.1f}"),
    ("hot us", lambda row: row["hot_us"], lambda n: f"{n:,.1f}"),
    ("rotating us", lambda row: row["rotating_us"], lambda n: f"{n:,.1f}"),
    ("error", lambda row: row["error"], lambda n: f"{n:.1e}"),
    ("extra MB", lambda row: None if row["memory_bytes"] is None else row["memory_bytes"] / 1e6, lambda n: f"{n:,.2f}"),
    ("machine", lambda row: f"{row['machine']}, {row['backend']}", str),
)
_COLOURS = {compare.SLOWER: "bad", compare.BROKEN: "bad", compare.FASTER: "good", compare.REPAIRED: "good"}
_TEXT_COLUMNS = ("method", "shape", "over", "machine")


def render(runs: list[dict], accuracy: list[dict], comparison: compare.Comparison | None = None) -> str:
    """The page as text."""
    held = contents.contents(runs, accuracy)
    data = {**held, "errors": fidelity.ERRORS,
            "runs": [{"floor_us": run["floor_us"], "gbps": run["gbps"]} for run in held["runs"]]}
    files = resources.files("kvbench.report")
    cases = sum(not row["baseline"] for row in held["rows"])
    return _PAGE.substitute(
        style=(files / "page.css").read_text(encoding="utf-8"),
        charts=(files / "charts.js").read_text(encoding="utf-8"),
        script=(files / "page.js").read_text(encoding="utf-8"),
        title="What KV-cache kernels cost",
        subtitle=escape(f"{cases} cases on {', '.join(held['machines'])}; each was compared with its reference before "
                        "it was timed." if cases else "Whole caches on real keys and values."),
        facts=_facts(held), comparison=_comparison(comparison), bench=_BENCH + _cases(held["rows"]),
        fidelity=_fidelity(held["points"]), sources=_sources(held["runs"], accuracy), version=__version__,
        # "</script>" in a string would end the script; JSON may write the slash with a backslash.
        data=json.dumps(data, allow_nan=False).replace("</", "<\\/"))


def _facts(held: dict) -> str:
    facts = []
    best = max((row for row in held["rows"] if row["speedup"] and not row["baseline"]), key=lambda row: row["speedup"],
               default=None)
    if best:
        facts.append((f"{best['speedup']:.2f}×", "the largest speed-up over the best exact attention: "
                                                 f"{best['method']}, {best['shape']}, {best['tokens']:,} tokens"))
    near = max((row for row in held["rows"] if row["percent"] and not row["baseline"]), key=lambda row: row["percent"],
               default=None)
    if near:
        facts.append((f"{near['percent']:.0f} %", f"of the roofline, the nearest to it: {near['method']}"))
    for run in [run for run in held["runs"] if run["gbps"]][:1]:
        facts.append((f"{run['gbps']:,.0f} GB/s", "moved by the faster of a copy and a read, measured"
                      + (f"; nominal {run['nominal_gbps']:,.0f}" if run["nominal_gbps"] else "")))
        facts.append((f"{run['floor_us']:.2f} us", "for a call without work: the launch floor"))
    return '<div class="facts">' + "".join(f"<div><b>{escape(value)}</b><span>{escape(meaning)}</span></div>"
                                           for value, meaning in facts) + "</div>" if facts else ""


def _cases(rows: list[dict]) -> str:
    columns = [(title, value, show) for title, value, show in _COLUMNS
               if len({value(row) for row in rows} - {None}) > (title == "machine")]
    body = []
    for number, row in enumerate(rows):
        cells = [_cell(value(row), show, title in _TEXT_COLUMNS) for title, value, show in columns]
        notes = [*row["remarks"], *([f"missing: {row['missing']}"] if row["missing"] else [])]
        wrong = any(note.startswith(("WRONG", "THROTTLED")) for note in notes)
        cells.append(f'<td class="wrap{" bad" if wrong else ""}">{escape("; ".join(notes))}</td>')
        cells.append(f"<td><details><summary>command</summary><code>{escape(row['command'])}</code></details></td>")
        kind = ' class="baseline" hidden' if row["baseline"] else ""
        body.append(f'<tr data-row="{number}"{kind}>{"".join(cells)}</tr>')
    titles = [*(title for title, _, _ in columns), "remarks", "repeat"]
    if not rows:
        return ""
    return _table("cases", titles, [title not in (*_TEXT_COLUMNS, "remarks", "repeat") for title in titles], body)


def _fidelity(points: list[dict]) -> str:
    if not points:
        return ""
    errors = [error for error in fidelity.ERRORS if any(error in point["errors"] for point in points)]
    titles = ["preset", "bytes per token", "bits per number", *(fidelity.ERRORS[error] for error in errors), "from"]
    body = ["<tr>" + "".join([
        _cell(point["preset"], str, True), _cell(point["bytes_per_token"], lambda n: f"{n:,.1f}"),
        _cell(point["bits"], lambda n: f"{n:.2f}"),
        *(_cell(point["errors"].get(error), lambda n: f"{n:.1e}") for error in errors),
        _cell(point["group"], str, True)]) + "</tr>" for point in points]
    return "<h2>Whole caches on real keys and values</h2>" \
        + _table("fidelity", titles, [title not in ("preset", "from") for title in titles], body)


def _comparison(comparison: compare.Comparison | None) -> str:
    if comparison is None:
        return ""
    titles = ["verdict", "method", "shape", "tokens", "way", "before us", "now us", "now / before", "interval", "why"]
    numeric = [title in ("tokens", "before us", "now us", "now / before") for title in titles]

    def rows_of(changes):
        return [f'<tr><td class="{_COLOURS.get(change.verdict, "")}">{change.verdict}</td>' + "".join([
            _cell(contents.method(vars(change)), str, True), _cell(contents.shape(change.problem), str, True),
            _cell(change.problem.get("tokens"), lambda n: f"{n:,}"), _cell(change.way, str, True),
            _cell(change.before_us, lambda n: f"{n:,.1f}"), _cell(change.after_us, lambda n: f"{n:,.1f}"),
            _cell(change.ratio, lambda n: f"{n:.3f}"),
            _cell("" if change.low is None else f"{change.low:.3f} to {change.high:.3f}", str, True),
            f'<td class="wrap">{escape(change.reason or "")}</td>']) + "</tr>" for change in changes]

    same = [change for change in comparison.changes if change.verdict == compare.SAME]
    others = [change for change in compare.ranked(comparison.changes) if change.verdict != compare.SAME]
    alone = [f"only before: {name}" for name in comparison.only_before] + \
        [f"only now: {name}" for name in comparison.only_after]
    return (f"<h2>Compared with earlier results</h2><p>{escape(comparison.count())}. A verdict needs the whole "
            "interval of the ratio, which holds it with at least 90 % probability, beyond "
            f"±{100 * comparison.margin:g} %.</p>"
            + (_table("comparison", titles, numeric, rows_of(others)) if others else "")
            + (f'<details><summary class="count">{len(same)} the same</summary>'
               + _table("unchanged", titles, numeric, rows_of(same)) + "</details>" if same else "")
            + "".join(f'<p class="soft">{escape(line)}</p>' for line in alone))


def _sources(runs: list[dict], accuracy: list[dict]) -> str:
    titles = ["file", "machine", "measured", "commit", "command", "versions"]
    body = []
    for run in runs:
        state = [words for words, holds in (("interrupted", not run["complete"]),
                                            ("quick: a look, not a result", run["quick"])) if holds]
        commit = (run["commit"] or "unknown")[:12] + (" with changes" if run["dirty"] else "")
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        driver = f", driver {run['driver']}" if run["driver"] else f"; {run['processor']}" if run["processor"] else ""
        cells = [run["file"] + (f" ({', '.join(state)})" if state else ""),
                 f"{run['machine']}, {run['backend']}{driver}",
                 run["created"].replace("T", " ").replace("+00:00", " UTC"), commit]
        skipped = "".join(f"; left out: {entry['kernel']}, which {entry['reason']}" for entry in run["skipped"])
        body.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
                    + f'<td class="wrap"><code>{escape(run["command"])}</code></td>'
                    + f'<td class="wrap soft">{escape(versions + skipped)}</td></tr>')
    for document in accuracy:
        body.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in (
            document["file"], document["machine"] if isinstance(document.get("machine"), str) else "",
            document.get("created", ""), (document.get("source") or {}).get("commit", "") or "",
            document.get("command", document["schema"]), "")) + "</tr>")
    return _table("sources", titles, [False] * len(titles), body)


def _table(name: str, titles: Sequence[str], numeric: Sequence[bool], body: Sequence[str]) -> str:
    head = "".join(f'<th scope="col"{" class=n" if right else ""}><button type="button">{escape(title)}</button></th>'
                   for title, right in zip(titles, numeric))
    return (f'<div class="wide"><table class="sortable" id="{name}"><thead><tr>{head}</tr></thead><tbody>'
            + "\n".join(body) + "</tbody></table></div>")


def _cell(value, show, text: bool = False) -> str:
    if text:           # the name of a kernel may be broken where its words end
        return f"<td>{escape(str(value or '')).replace('.', '.<wbr>').replace('_', '_<wbr>')}</td>"
    if value is None:
        return '<td class="n" data-value=""></td>'
    return f'<td class="n" data-value="{value!r}">{escape(show(value))}</td>'


def _half_width(row: dict) -> float | None:
    """Half the interval of the median, in percent of it."""
    if row["low_us"] is None or not row["cold_us"]:
        return None
    return 50 * (row["high_us"] - row["low_us"]) / row["cold_us"]
