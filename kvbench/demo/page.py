"""The demo page: one HTML file that needs nothing else, light or dark as the reader's system, readable on a phone."""
from __future__ import annotations

from html import escape
from string import Template

from kvbench import __version__
from kvbench.data import Sample
from kvbench.demo import pictures
from kvbench.demo.measurement import Outcome, attention_mass, decode_steps

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>kvbench demo</title>
<style>
:root { $light --paper: #ffffff; --panel: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { $dark --paper: #12161b; --panel: #1a2027; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 74rem;
       margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
p { max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 0.8rem; max-width: 46rem; font-size: 0.9rem; }
dt { font-weight: 600; }
dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
            margin: 1.5rem 0; }
figure { margin: 0; padding: 0.8rem; background: var(--panel); border-radius: 0.4rem; }
figure svg { width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption, footer { font-size: 0.9rem; }
</style>
</head>
<body>
<h1>KV-cache compression on real keys and values</h1>
<p>$intro</p>
<div class="wide">$table</div>
<dl>$legend</dl>
<p>These times are those of a call on one small head; <code>kvbench bench</code> measures speed.</p>
<div class="pictures">
$figures
</div>
<footer>$provenance</footer>
</body>
</html>
""")


def render(sample: Sample, outcomes: list[Outcome], head: list[str], rows: list[list[str]], legend: dict[str, str],
           machine: str) -> str:
    """The page as text; the terminal shows the same table and legend."""
    drawn = [
        pictures.bytes_against_error(outcomes),
        pictures.keys_before_and_after_rotation(sample.keys[0, 0]),
        pictures.attention_mass(attention_mass(sample)),
        pictures.allocated_bits(sample.keys[0, 0, :decode_steps(sample)[0][1]]),
    ]
    about = sample.metadata
    steps, group = decode_steps(sample), sample.queries.shape[1]
    return _PAGE.substitute(
        light=pictures.colours("light"), dark=pictures.colours("dark"),
        intro=f"One KV head of a real model with its {group} query heads: a prompt of {steps[0][1]} tokens, then "
              f"{len(steps)} decode steps, each of which appends one token and attends to all of them.",
        table=_table(head, rows),
        legend="\n".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in legend.items()),
        figures="\n".join(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
                          for svg, caption in drawn),
        provenance=f"Keys, values and queries: {escape(about['model'])}, layer {escape(about['layer'])}, KV head "
                   f"{escape(about['kv_head'])}, on {escape(about['text'])}; licence {escape(about['licence'])}. "
                   f"Measured with kvbench {__version__} on {escape(machine)}.")


def _table(head, rows) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"
