"""The report: what a comparison may say, what the page holds, and, in a headless Chromium, what one can do with it."""
import copy
import csv
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import browser
from kvbench import bench, caches, cli, registry
from kvbench.bench import timing
from kvbench.report import compare, contents, fidelity, page

RESULTS = Path(__file__).parents[1] / "results"


# ---- results made for these tests ------------------------------------------------------------------------------------

def measurement(median_us, spread=0.001, count=40):
    """Samples around a median, evenly spread."""
    return timing.Measurement(tuple(1e-6 * median_us * (1 + spread * np.linspace(-1, 1, count))), True).summary()


def timed(median_us, **changes):
    return {"checked": {"agrees": True, "failure": None, "parts": ["all"], "of": 1}, "error": 2e-4, "timer": "graph",
            "note": None, "cold": measurement(median_us), "hot": measurement(0.8 * median_us), "gbps": 100.0,
            "percent_of_copy": 10.0, "percent_of_read": 9.0, **changes}


def case(kernel, median_us, baselines=(), *, tokens=4096, bits=None, heads=(8, 4), **changes):
    kv_heads, group = heads
    problem = {"tokens": tokens, "head_dim": 128, "kv_heads": kv_heads, "group": group, "batch": 1,
               **({"key_bits": bits, "value_bits": bits} if bits else {}), "dtype": "float16"}
    return {"kernel": kernel, "backend": "cuda", "problem": problem, "inputs": "device",
            "command": f"kvbench bench {kernel} --axis tokens={tokens}", "best_baseline": None, "speedup": None,
            "traffic": {"bytes_read": tokens * 100 * (bits or 16), "bytes_written": 0}, "state": {},
            "baselines": [{"name": name, "missing": None, **timed(us), **more} for name, us, more in baselines],
            **timed(median_us), **changes}


WRONG = {"checked": {"agrees": False, "failure": "all: off", "parts": ["all"], "of": 1}, "cold": None, "hot": None}


def run(*cases, gpu="A GPU", **changes):
    yardstick = {"bytes_moved": 10, "timer": "events", "cold": None, "hot": measurement(1)}
    document = {
        "schema": "kvbench.bench/1", "created": "2026-01-02T03:04:05+00:00", "complete": True,
        "command": "kvbench bench", "backend": "cuda", "quick": False, "seed": 0, "stop_rule": {
            "relative_error": 0.005, "minimum_samples": 30, "minimum_seconds": 0.2, "limit_seconds": 10.0,
            "warm_up_seconds": 0.1},
        "machine": {"processor": "A CPU", "cores": 2, "usable_cores": 2, "gpu": {"name": gpu}},
        "versions": {"python": "3"}, "source": {"commit": "0123456789abcdef", "dirty": False}, "skipped": [],
        "yardsticks": {"copy": {**yardstick, "gbps": 2000.0}, "read": {**yardstick, "gbps": 2500.0},
                       "empty_kernel": {**yardstick, "gbps": None, "cold": measurement(4), "bytes_moved": 0}},
        "cases": list(cases), **changes}
    bench.validate(document)
    return document


def stored(folder, name, document):
    path = folder / name
    path.write_text(json.dumps(document))
    return path


# ---- comparing -------------------------------------------------------------------------------------------------------

@given(st.floats(0.5, 2), st.floats(1, 1.5), st.floats(0, 0.3))
def test_a_verdict_is_what_its_interval_allows(low, width, margin):
    high = low * width
    verdict = compare.verdict_of(low, high, margin)
    inside = [1 / (1 + margin) <= end <= 1 + margin for end in (low, high)]
    assert (verdict == compare.SLOWER) == (low > 1 + margin)
    assert (verdict == compare.FASTER) == (high < 1 / (1 + margin))
    assert (verdict == compare.SAME) == all(inside)
    swapped = compare.verdict_of(1 / high, 1 / low, margin)        # before and now exchanged
    opposite = {compare.SLOWER: compare.FASTER, compare.FASTER: compare.SLOWER}.get(verdict, verdict)
    if min(abs(end - bound) for end in (low, high) for bound in (1 + margin, 1 / (1 + margin))) > 1e-9:
        assert swapped == opposite


@pytest.mark.parametrize("before, now, spread, verdict", [
    (100, 100, 0.001, compare.SAME), (100, 101, 0.001, compare.SAME), (100, 110, 0.001, compare.SLOWER),
    (110, 100, 0.001, compare.FASTER), (100, 104, 0.2, compare.UNCLEAR), (100, 100, 0.3, compare.UNCLEAR)])
def test_cases_are_judged_by_their_samples(before, now, spread, verdict):
    old, new = (run(case("attention.decode", us, cold=measurement(us, spread), hot=None)) for us in (before, now))
    change, = compare.compare([new], [old]).changes
    assert change.verdict == verdict and change.way == "cold"
    assert change.low <= now / before * 1.001 and change.high >= now / before * 0.999
    assert compare.compare([new], [old]).exit_status == (verdict == compare.SLOWER)


def test_noise_alone_is_hardly_ever_a_regression():
    """Two runs of the same code, 30 samples each, noise of 5 %: 2000 comparisons.  With no margin a verdict other than
    unclear has a probability of at most 10 %, each of the two at most 5 %."""
    rng, verdicts = np.random.default_rng(0), []
    for _ in range(2000):
        (a, b), (c, d) = (timing.median_interval(1 + 0.05 * rng.standard_normal(30)) for _ in range(2))
        verdicts.append(compare.verdict_of(c / b, d / a, 0.0))
    assert verdicts.count(compare.SLOWER) <= 2000 * 0.05 and verdicts.count(compare.FASTER) <= 2000 * 0.05
    assert verdicts.count(compare.SAME) == 0


def test_a_kernel_that_became_wrong_is_a_regression():
    right, wrong = run(case("attention.decode", 10)), run(case("attention.decode", 10, **WRONG))
    broken = compare.compare([wrong], [right])
    assert [change.verdict for change in broken.changes] == [compare.BROKEN] and broken.exit_status == 1
    assert broken.changes[0].reason == "all: off"
    repaired = compare.compare([right], [wrong])
    assert [change.verdict for change in repaired.changes] == [compare.REPAIRED] and repaired.exit_status == 0
    still = compare.compare([wrong], [wrong])
    assert [change.verdict for change in still.changes] == [compare.UNCLEAR] and still.exit_status == 0


@pytest.mark.parametrize("changes, reason", [
    ({"cold": measurement(20, count=5), "hot": None}, "too few samples"),
    ({"timer": "events"}, "timed by graph before"),
    ({"clock": {"sm_mhz": 900.0, "of_start": 0.5, "throttled": True}}, "throttled now")])
def test_what_cannot_be_told_is_unclear_and_says_why(changes, reason):
    comparison = compare.compare([run(case("attention.decode", 20, **changes))], [run(case("attention.decode", 10))])
    assert {change.verdict for change in comparison.changes} == {compare.UNCLEAR} and comparison.exit_status == 0
    assert all(reason in change.reason for change in comparison.changes)


def test_cases_of_one_side_are_named_and_the_latest_result_counts():
    a, b, c = (case("attention.decode", us, tokens=tokens) for us, tokens in ((10, 1), (20, 2), (30, 3)))
    again = run(case("attention.decode", 50, tokens=2), created="2026-02-01T00:00:00+00:00")
    comparison = compare.compare([again, run(b, c)], [run(a, b)])
    only, = comparison.only_before
    assert only == "attention.decode on cuda, tokens=1 head_dim=128 kv_heads=8 group=4 batch=1 dtype=float16"
    assert len(comparison.only_after) == 1 and {change.after_us for change in comparison.changes} == {50.0, 40.0}
    assert comparison.count() == "2 slower" and comparison.exit_status == 1


@pytest.mark.parametrize("after, before, words", [
    ([run(case("a", 1))], [run(case("a", 1), gpu="Another GPU")], "different machines: A GPU against Another GPU"),
    ([run(case("a", 1))], [run(case("a", 1), backend="native")], "different backends: cuda against native"),
    ([{**run(case("a", 1)), "flush": "read"}], [run(case("a", 1))],
     "different flushes of the caches: read against write"),
    ([run(case("a", 1))], [run(case("b", 1))], "no case is in both"),
    ([run(case("a", 1))], [], "none of kvbench bench")])
def test_results_that_do_not_compare_are_refused(after, before, words):
    with pytest.raises(ValueError, match=words):
        compare.compare(after, before)


# ---- what the page is made of ----------------------------------------------------------------------------------------

DEMO = {"schema": "kvbench.demo/1", "kvbench": "0", "machine": "A CPU", "outcomes": [
    {"preset": preset, "bytes_per_token": held, "bits_per_element": held / 16, "output_error": error,
     "logit_error": 10 * error, "append_us": 3.0, "attend_us": attend}
    for preset, held, error, attend in (("exact", 256.0, 2e-4, 30.0), ("small </script><b>", 50.0, 0.05, 20.0),
                                        ("worse", 80.0, 0.06, 10.0))]}


EVAL = {"schema": "kvbench.eval/1", "command": "kvbench eval", "machine": {}, "cases": [
    {"task": "logits", "cache": cache, "source": source, "bits_per_element": bits, "nbytes": nbytes, "tokens": 100,
     "metrics": {"logit_mae": mae, "kl": 2 * mae}}
    for cache, source, bits, nbytes, mae in (("codes", "layer 1", 4, 400, 0.1), ("codes", "layer 2", 6, 600, 0.3),
                                             ("exact", "layer 1", 16, 1600, 0.0))]}


def test_evaluations_are_means_over_their_sources():
    codes, exact = fidelity.points([{**EVAL, "file": "e.json"}])
    assert (codes["preset"], codes["group"]) == ("codes", "e.json: logits")
    assert codes["bits"] == codes["bytes_per_token"] == 5
    assert codes["errors"] == pytest.approx({"logit_mae": 0.2, "kl": 0.4}) and exact["errors"]["logit_mae"] == 0
    first, *_ = fidelity.points([{**DEMO, "file": "demo.json"}, {**EVAL, "file": "e.json"}])
    assert first["group"] == "demo.json" and first["parts"] == {"append": 3.0, "attend": 30.0}


def rows_of(*runs):
    return contents.contents([{**one, "file": f"{i}.json"} for i, one in enumerate(runs)], [])["rows"]


def test_speedup_is_over_the_best_exact_attention_of_the_same_shape():
    baselines = [("fast", 30, {}), ("slow", 60, {}), ("eight", 20, {"storage": "fp8"})]
    codes = case("turboquant.decode_attention", 10, baselines, bits=2)
    alone = case("turboquant.decode_attention", 5, bits=3)         # timed in another run, without baselines
    other = case("turboquant.decode_attention", 5, bits=3, tokens=9)
    rows = {(row["method"], row["tokens"]): row for row in rows_of(run(codes), run(alone, other))}
    two, three = (f"turboquant.decode_attention (key bits {bits}, value bits {bits})" for bits in (2, 3))
    assert rows[two, 4096]["speedup"] == pytest.approx(3) and rows[two, 4096]["best"] == "fast"
    assert rows[three, 4096]["speedup"] == pytest.approx(6)
    assert rows[three, 9]["speedup"] is None
    assert rows["eight", 4096]["speedup"] == pytest.approx(1.5) and rows["fast", 4096]["speedup"] == pytest.approx(1)


def test_a_run_of_its_own_decides_before_others():
    first = run(case("attention.decode", 10, [("good", 20, {})]))
    second = run(case("attention.decode", 10, [("good", 40, {})]))
    assert [row["speedup"] for row in rows_of(first, second) if not row["baseline"]] == pytest.approx([2, 4])


def test_kernels_of_other_kinds_and_unknown_ones_have_no_speedup():
    rows = rows_of(run(*(case(kernel, 10, [("dense", 30, {})]) for kernel in ("rotation.rotate", "not.registered"))))
    assert [row["speedup"] for row in rows] == [None] * 4


def test_a_share_of_the_roofline():
    row = next(row for row in rows_of(run(case("attention.decode", 10, tokens=5000))) if not row["baseline"])
    assert row["bytes"] == 8_000_000 and row["attainable_us"] == pytest.approx(4)          # 3.2 us of bytes: the launch
    row, = rows_of(run(case("attention.decode", 100, tokens=50_000)))
    assert row["attainable_us"] == pytest.approx(32) and row["percent"] == pytest.approx(32)


def test_every_registered_kernel_has_a_name_and_a_shape():
    """Methods differ by their parameters, shapes by their sizes: together they tell any two problems apart, but for
    axes that have no effect."""
    for kernel in registry.select():
        seen, problems = set(), set()
        for values in itertools.product(*(kernel.axes[axis][:2] for axis in kernel.axes)):
            problem = dict(zip(kernel.axes, values))
            seen.add((contents.method({"kernel": kernel.name, "problem": problem}), contents.shape(problem),
                      problem.get("tokens")))
            problems.add(tuple(item for item in problem.items() if item[0] not in kernel.idle_axes(problem)))
        assert len(seen) == len(problems)
        if kernel.name != "cache.decode_step":
            assert len(seen) == np.prod([min(2, len(values)) for values in kernel.axes.values()])


def test_a_share_of_tokens_is_named_where_it_has_an_effect():
    named = {preset: contents.method({"kernel": "cache.decode_step", "problem": {"preset": preset, "percent": 2}})
             for preset in caches.PRESETS}
    assert named["rabitq"] == "cache.decode_step (rabitq, percent 2)"
    assert {preset for preset, name in named.items() if "percent" in name} == {"rabitq", "twilight"}
    for kernel, preset in (("of.yesterday", "exact"), ("cache.decode_step", "of_yesterday")):
        case = {"kernel": kernel, "problem": {"preset": preset, "percent": 2}}
        assert contents.method(case) == f"{kernel} ({preset}, percent 2)"


# ---- the page as text ------------------------------------------------------------------------------------------------

TWO = "turboquant.decode_attention (key bits 2, value bits 2)"


class Tags(HTMLParser):
    """Tags and what they refer to, and the cells of every table row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.cells, self._in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag in ("td", "th"):
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.cells[-1] += data


def made(*documents, comparison=None):
    runs = [{**document, "file": f"{i}.json"} for i, document in enumerate(documents)]
    accuracy = [{**DEMO, "file": "demo.json"}, {**EVAL, "file": "e.json"}]
    return page.render(runs, accuracy, comparison)


FIRST = run(case("attention.decode", 40, [("torch-fast", 30, {}), ("torch-slow", 60, {}), ("gone", 1, {
                "missing": "gone is not installed", **WRONG, "checked": None})]),
            case("attention.decode", 400, [("torch-fast", 300, {})], tokens=32768),
            case("turboquant.decode_attention", 10, [("torch-fast", 30, {})], bits=2),
            case("turboquant.decode_attention", 60, [("torch-fast", 300, {})], bits=2, tokens=32768),
            case("turboquant.decode_attention", 15, [("torch-fast", 90, {})], bits=3, heads=(2, 8)),
            case("rotation.rotate", 7), case("attention.merge", 9, **WRONG))


def test_the_page_needs_nothing_else():
    text = made(FIRST)
    found = Tags(text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text) and "@import" not in text and "url(" not in text
    assert found.references == [] and not {"link", "iframe", "object", "img", "base"} & set(found.tags)
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert text.count("<script") == text.count("</script>") == 2       # the name of a preset ends none of them


def test_the_tables_hold_the_numbers_of_the_results():
    cells = Tags(made(FIRST)).cells
    assert {TWO, "32:8 heads, head_dim 128, float16", "10.0", "3.00", "WRONG, not timed: all: off",
            "missing: gone is not installed", "small </script><b>", "5.0e-02", "0123456789ab",
            "A GPU, cuda"} <= set(cells)


def test_committed_results_make_a_page():
    runs, accuracy = contents.load(sorted(RESULTS.glob("*/*.json")))
    text = page.render(runs, accuracy)
    for one, other in itertools.product(runs, ["file", "command"]):
        assert one[other].replace("'", "&#x27;") in text
    assert max(row["speedup"] for row in rows_of(*runs) if row["speedup"]) > 3


# ---- the command -----------------------------------------------------------------------------------------------------

def test_report_prints_a_table_and_writes_page_and_csv(tmp_path, capsys):
    files = [stored(tmp_path, "a.json", FIRST), stored(tmp_path, "demo.json", DEMO)]
    made = [tmp_path / name for name in ("p.html", "p.csv")]
    assert cli.main(["report", *map(str, files), "--html", str(made[0]), "--csv", str(made[1])]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"\| {re.escape(TWO)} .*\| torch-fast +\| +3\.00 \|", printed)
    assert "WRONG, not timed" in printed and "| exact " in printed and "A page to look at" in printed
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    assert len(list(csv.reader((tmp_path / "p.csv").open()))) == 1 + 7 + 7


def test_compare_ends_with_status_1_on_a_regression(tmp_path, capsys):
    before = stored(tmp_path, "before.json", FIRST)
    slower = copy.deepcopy(FIRST)
    slower["cases"][0] |= {"cold": measurement(80)}
    now = stored(tmp_path, "now.json", slower)
    assert cli.main(["report", str(before), "--compare", str(before)]) == 0
    assert "slower" not in capsys.readouterr().out
    html = tmp_path / "page.html"
    assert cli.main(["report", str(now), "--compare", str(before), "--html", str(html)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"\| slower +\| attention.decode .* 40.00 \| +80.00 \| 2.000 \[", printed)
    assert "1 slower" in printed
    text = html.read_text()
    assert "Compared with earlier results" in text and '<td class="bad">slower</td>' in text
    same = int(re.search(r"(\d+) same", printed)[1])
    assert f"{same} the same" in text and text.count("<td class=\"\">same</td>") == same
    assert cli.main(["report", str(now), "--compare", str(before), "--margin", "99"]) == 1
    assert cli.main(["report", str(before), "--compare", str(now)]) == 0
    assert "1 faster" in capsys.readouterr().out


EMPTY = {**FIRST, "cases": []}
OLD = {**FIRST, "schema": "kvbench.bench/0"}


@pytest.mark.parametrize("documents, message", [
    ([EMPTY], "holds no finished case"),
    ([OLD], "expected a result of schema 'kvbench.bench/1', got 'kvbench.bench/0'"),
    ([{"some": "JSON"}], "expected a result of schema"), ([{**FIRST, "cases": [{}]}], "is missing"),
    ([FIRST, "--compare", EMPTY], "holds no finished case"), ([FIRST, "--compare", OLD], "expected a result of schema"),
    ([FIRST, "--compare", run(case("attention.decode", 1), gpu="B")], "different machines"),
    ([FIRST, "--compare", run(case("attention.decode", 1, tokens=77))], "no case is in both"),
    ([FIRST, "--compare", DEMO], "none of kvbench bench from before"), ([DEMO, "--compare", FIRST], "from now"),
    ([{**DEMO, "outcomes": []}], "at least 1 items"), ([{**EVAL, "cases": [{}]}], "'bits_per_element' is missing"),
    ([{**DEMO, "outcomes": [{"preset": "x"}]}], "is missing"),
    ([FIRST, "--margin", "x"], "expected a percentage"), ([FIRST, "--html", "/nowhere/p.html"], "existing folder"),
    (["/nowhere/r.json"], "cannot be read"), ([], "RESULTS.json")])
def test_wrong_input_is_explained(documents, message, tmp_path, capsys):
    arguments = [str(stored(tmp_path, f"{i}.json", given)) if isinstance(given, dict) else given
                 for i, given in enumerate(documents)]
    try:
        status = cli.main(["report", *arguments])
    except SystemExit as stopped:              # what argparse itself finds
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == "" and message in printed.err


# ---- in a browser ----------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    folder = tmp_path_factory.mktemp("report")
    path = folder / "page.html"
    slower = copy.deepcopy(FIRST)
    slower["cases"][0] |= {"cold": measurement(80)}
    path.write_text(made(FIRST, run(case("attention.decode", 5, [("torch-fast", 10, {})]), gpu="B GPU"),
                         comparison=compare.compare([slower], [FIRST])), encoding="utf-8")
    with browser.Browser(folder) as window:
        yield window, path


@pytest.fixture
def window(opened):
    opened[0].open(opened[1])
    yield opened[0]
    assert opened[0].complaints() == []


def methods(window):
    return window.texts("#cases tbody td:first-child")


@needs_browser
def test_words_filter_table_and_charts(window):
    assert window.texts("#count") == ["7 of 8 rows"]       # the other machine's case is not of those chosen
    assert window.run("return document.querySelectorAll('#speedup .mark').length") == 4
    window.type("#filter", "32K bits")
    assert methods(window) == [TWO] and window.texts("#count") == ["1 of 8 rows"]
    assert window.run("return document.querySelectorAll('#speedup .mark').length") == 1
    window.type("#filter", "no such words")
    assert methods(window) == [] and "No method here" in window.texts("#speedup .empty")[0]


@needs_browser
def test_columns_sort_both_ways_and_what_is_missing_stays_below(window):
    column = "#cases th:nth-child(4)"
    assert window.texts(column) == ["cold us"]
    window.click(f"{column} button")
    cold = [float(text) if text else None for text in window.texts("#cases tbody td:nth-child(4)")]
    assert cold == [7, 10, 15, 40, 60, 400, None]
    window.click(f"{column} button")
    assert window.texts("#cases tbody td:nth-child(4)") == ["400.0", "60.0", "40.0", "15.0", "10.0", "7.0", ""]
    assert window.run("return document.querySelector(arguments[0]).getAttribute('aria-sort')", column) == "descending"


@needs_browser
def test_baselines_join_the_table_on_request(window):
    assert "torch-fast" not in methods(window)
    window.click("#baselines")
    assert methods(window).count("torch-fast") == 5 and "gone" in methods(window)


@needs_browser
def test_the_legend_hides_a_method_everywhere(window):
    button = f"#legend button:nth-child({1 + window.texts('#legend button').index(TWO)})"
    assert TWO in methods(window)
    window.click(button)
    assert TWO not in methods(window) and window.run("return document.querySelectorAll('#speedup .mark').length") == 2
    assert window.run("return document.querySelector(arguments[0]).getAttribute('aria-pressed')", button) == "false"
    window.click(button)
    assert TWO in methods(window)


@needs_browser
def test_shape_machine_and_tokens_can_be_chosen(window):
    choose = """const select = document.querySelector(arguments[0]);
                select.value = arguments[1]; select.dispatchEvent(new Event("change", {bubbles: true}));"""
    window.run(choose, "#shape", "16:2 heads, head_dim 128, float16")
    assert window.run("return document.querySelectorAll('#speedup .mark').length") == 1
    assert "6.00" in window.texts("#speedup text")
    window.run(choose, "#place", "B GPU, cuda")
    assert methods(window) == ["attention.decode"] and "2.00" in window.texts("#speedup text")
    window.run(choose, "#place", "A GPU, cuda")
    window.click("#pick-tokens button:nth-child(1)")
    assert "10.0 us" in window.texts("#breakdown text")
    window.click("#pick-tokens button:nth-child(2)")
    assert "10.0 us" not in window.texts("#breakdown text") and "60.0 us" in window.texts("#breakdown text")


@needs_browser
def test_marks_tell_their_numbers(window):
    window.run("document.querySelector('#speedup .mark').focus()")
    told = window.run("const tip = document.querySelector('#tip.on'); return tip && tip.textContent")
    assert told and "times as fast as torch-fast" in told


@needs_browser
def test_the_picture_of_errors_joins_what_nothing_beats(window):
    labels = window.texts("#pareto text.strong")
    assert "exact" in labels and "worse" not in labels and "worse" in window.texts("#pareto text")
    assert len(window.run("return document.querySelector('#pareto polyline').getAttribute('points').split(' ')")) == 2
    window.click("#pick-error button:nth-child(1)")
    assert "relative error of the attention output" in window.texts("#pareto text")
    window.click("#pick-group button:nth-child(2)")
    assert "codes" in window.texts("#pareto text") and "worse" not in window.texts("#pareto text")
    assert "mean absolute error of a logit" in window.texts("#pareto text")
    assert window.texts("#steps text.strong") == ["worse", "small </script><b>", "exact"]     # by their time


@needs_browser
def test_errors_alone_make_a_page(opened, tmp_path):
    path = tmp_path / "errors.html"
    path.write_text(page.render([], [{**EVAL, "file": "e.json"}]), encoding="utf-8")
    opened[0].open(path)
    assert opened[0].texts("h3") == ["Bytes per token against error"] and opened[0].texts(".controls") == []
    assert "codes" in opened[0].texts("#pareto text") and opened[0].complaints() == []


@needs_browser
def test_a_run_without_a_right_kernel_makes_a_page(opened, tmp_path):
    path = tmp_path / "wrong.html"
    document = run(case("attention.decode", 1, **WRONG))
    path.write_text(page.render([{**document, "file": "w.json"}], []), encoding="utf-8")
    opened[0].open(path)
    assert methods(opened[0]) == ["attention.decode"] and "WRONG" in opened[0].texts("#cases td.bad")[0]
    assert opened[0].complaints() == []


BACKGROUND = "return getComputedStyle(document.body).backgroundColor"


@needs_browser
def test_the_theme_follows_the_system_or_the_reader(window):
    window.run("localStorage.clear()")
    light = window.run(BACKGROUND)
    seen = []
    for _ in range(3):
        window.click("#theme")
        seen.append((window.texts("#theme")[0], window.run(BACKGROUND)))
    assert [name for name, _ in seen] == ["theme: light", "theme: dark", "theme: auto"]
    assert seen[0][1] == seen[2][1] == light != seen[1][1]


@needs_browser
def test_a_phone_in_the_dark_sees_it_all(opened, tmp_path):
    with browser.Browser(tmp_path, width=390, height=800, dark=True, mobile=True) as phone:
        phone.open(opened[1])
        assert phone.run("return innerWidth") == 390
        assert phone.run("return document.documentElement.scrollWidth") <= 390             # only tables scroll sideways
        wide = phone.run("""return [...document.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect())
                            .filter(box => box.right > 390 || box.left < 0).length""")
        assert wide == 0 and len(phone.texts("#speedup svg")) == 1
        # Text keeps its size: charts are drawn for this width, not shrunk to it.
        assert phone.run("""return Math.min(...[...document.querySelectorAll("figure svg")]
                            .map(e => e.getBoundingClientRect().width / e.viewBox.baseVal.width))""") > 0.99
        assert sum(map(int, re.findall(r"\d+", phone.run(BACKGROUND))[:3])) < 120
        assert phone.complaints() == []


@needs_browser
def test_labels_do_not_cover_each_other(window):
    covered = window.run("""
        const boxes = [...document.querySelectorAll("figure svg")].map(svg => [...svg.querySelectorAll("text")]
          .map(text => [text.textContent, text.getBoundingClientRect()]));
        return boxes.flatMap(texts => texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([b, q]) =>
          p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
          .map(([b]) => [a, b])));""")
    assert covered == []


def test_the_page_of_a_run_on_this_machine(tmp_path):
    """From the driver to the page, with nothing made up in between."""
    command = "bench attention.decode --backend cpu --axis tokens=64 --axis kv_heads=1 --axis dtype=float16 " \
              "--baseline numpy --quick --json r.json"
    done = subprocess.run([sys.executable, "-m", "kvbench.cli", *command.split()], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert cli.main(["report", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "quick: a look, not a result" in text and "threads: " in text
    row, = [row for row in rows_of(bench.load(tmp_path / "r.json").document) if not row["baseline"]]
    assert row["best"] == "numpy" and row["speedup"] > 0 and row["tokens"] == 64
