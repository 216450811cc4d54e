"""The demo: the sample and the tool that cut it, what is measured, the pictures, and a page that needs nothing else."""
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.special import softmax

from kvbench import arrays, bench, caches, data
from kvbench.data import make
from kvbench.demo import measurement, pictures
from kvbench.reference.selection import Selection

PROVENANCE = ("model", "layer", "kv_head", "text", "licence", "layout", "made_with")


# ---- the sample

def test_sample_is_small_and_says_where_it_is_from():
    folder = resources.files("kvbench.data")
    assert len((folder / data.SAMPLE).read_bytes()) <= 2_000_000
    metadata = data.sample().metadata
    assert all(metadata[name] for name in PROVENANCE)
    assert metadata["licence"] == "Apache-2.0"
    about = (folder / "README.md").read_text(encoding="utf-8")
    for fact in (data.SAMPLE, "Apache-2.0", "SmolLM2-135M-Instruct", "kvbench.data.make"):
        assert fact in about


def test_sample_holds_every_key_that_its_queries_saw():
    sample = data.sample()
    _, kv_heads, tokens, head_dim = sample.keys.shape
    assert sample.values.shape == sample.keys.shape and kv_heads == 1
    assert sample.queries.shape == (1, 3, len(sample.positions), head_dim)
    assert np.array_equal(sample.positions, np.arange(tokens - len(sample.positions), tokens))
    for array in (sample.keys, sample.values, sample.queries):
        assert array.dtype == np.float16 and np.isfinite(array).all()


def capture(rng, kv_heads, group, tokens, head_dim=8):
    """A capture with queries at the first and at the last third of the positions."""
    positions = np.concatenate([np.arange(tokens // 3), np.arange(2 * tokens // 3, tokens)]).astype(np.int32)
    shapes = {"keys": (1, kv_heads, tokens, head_dim), "values": (1, kv_heads, tokens, head_dim),
              "queries": (1, kv_heads * group, len(positions), head_dim)}
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()} \
        | {"query_positions": positions}


@given(st.integers(1, 4), st.integers(1, 4), st.integers(6, 40), st.data())
def test_cut_keeps_heads_and_positions_together(kv_heads, group, tokens, drawn):
    whole = capture(np.random.default_rng(tokens), kv_heads, group, tokens)
    head = drawn.draw(st.integers(0, kv_heads - 1))
    first = drawn.draw(st.integers(2 * tokens // 3, tokens - 1))
    steps = drawn.draw(st.integers(1, tokens - first))
    part = make.cut(whole, head, first, steps)
    assert np.array_equal(part["keys"], whole["keys"][:, [head], :first + steps])
    assert np.array_equal(part["values"], whole["values"][:, [head], :first + steps])
    for step, position in enumerate(part["positions"]):
        row = list(whole["query_positions"]).index(position)
        for member in range(group):
            assert np.array_equal(part["queries"][0, member, step], whole["queries"][0, head * group + member, row])
    assert part["positions"][-1] == first + steps - 1 == part["keys"].shape[2] - 1


@pytest.mark.parametrize("choice", [{"kv_head": 2}, {"kv_head": -1}, {"first_query": 15}, {"steps": 0}, {"steps": 20}])
def test_cut_refuses_what_the_capture_lacks(choice):
    whole = capture(np.random.default_rng(0), kv_heads=2, group=3, tokens=30)
    with pytest.raises(ValueError, match="expected"):
        make.cut(whole, **{"kv_head": 0, "first_query": 20, "steps": 10} | choice)


def test_make_writes_a_sample(tmp_path, monkeypatch, capsys):
    whole = capture(np.random.default_rng(1), kv_heads=2, group=3, tokens=30)
    about = {"model": "a model", "layer": "3", "text": "a text", "licence": "Apache-2.0"}
    save_file(whole, tmp_path / "capture.safetensors", about)
    arguments = [str(tmp_path / "capture.safetensors"), "--kv-head", "1", "--first-query", "24", "--steps", "6",
                 "--out", str(tmp_path / "sample.safetensors")]
    assert make.main(arguments) == 0
    written = load_file(tmp_path / "sample.safetensors")
    expected = make.cut(whole, 1, 24, 6)
    assert written.keys() == expected.keys() and all(np.array_equal(written[name], expected[name]) for name in expected)

    (tmp_path / "sample.safetensors").unlink()
    monkeypatch.setattr(make, "LIMIT_BYTES", 1000)
    with pytest.raises(SystemExit) as stopped:
        make.main(arguments)
    assert stopped.value.code == 2 and "1000 may be shipped" in capsys.readouterr().err
    assert not (tmp_path / "sample.safetensors").exists()


# ---- what is measured

def small_sample(rng, tokens=40, steps=3, group=2, head_dim=8) -> data.Sample:
    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float16)
    keys, values = normal(1, 1, tokens, head_dim), normal(1, 1, tokens, head_dim)
    positions = np.arange(tokens - steps, tokens, dtype=np.int32)
    return data.Sample(keys, values, normal(1, group, steps, head_dim), positions, {})


@given(st.integers(0, 2**32 - 1), st.integers(4, 40))
def test_mass_and_exact_outputs_fit_together(seed, tokens):
    """With one step the mass is its softmax, and the exact output its mean of the values."""
    sample = small_sample(np.random.default_rng(seed), tokens, steps=1)
    mass = measurement.attention_mass(sample)
    assert np.allclose(mass.sum(axis=1), 1, rtol=0, atol=1e-12)
    expected = mass @ sample.values[0, 0].astype(np.float64)
    assert np.allclose(measurement.exact_outputs(sample)[0], expected, rtol=0, atol=1e-12)


def test_mass_is_causal():
    sample = small_sample(np.random.default_rng(0), tokens=40, steps=3)
    keys = sample.keys[0, 0].astype(np.float64)
    expected = np.zeros((2, 40))
    for step, tokens in enumerate((38, 39, 40)):
        logits = keys[:tokens] @ sample.queries[0, :, step].astype(np.float64).T / np.sqrt(8)
        expected[:, :tokens] += softmax(logits, axis=0).T / 3
    assert np.allclose(measurement.attention_mass(sample), expected, rtol=0, atol=1e-12)
    later = data.Sample(sample.keys.copy(), sample.values, sample.queries, sample.positions, {})
    later.keys[0, 0, 39] *= 2                  # seen by the last step only: the first two outputs must not move
    before, after = measurement.exact_outputs(sample), measurement.exact_outputs(later)
    assert np.array_equal(before[:2], after[:2]) and not np.array_equal(before[2], after[2])


class Forgetful:
    """A cache that answers zero, so that its error is exactly one, and attends to 2 sinks and the next 5 tokens."""

    sinks, tail = 2, caches.Tail()
    last_selection = Selection(np.arange(40, dtype=np.int32)[None, None], np.full((1, 1), 5, np.int32), None)

    def __init__(self, batch, kv_heads, q_heads, head_dim, capacity, device):
        self.shape, self.nbytes, self.tokens = (batch, q_heads, head_dim), 64 * capacity, 0
        self.keys = SimpleNamespace(encode=lambda keys: keys, logits=self.logits, granule=1)

    def append(self, k, v):
        self.tokens += k.shape[2]

    def attend(self, q):
        return np.zeros(self.shape, np.float16)

    def logits(self, q, keys):
        exact = q.to_host()[:, :, None].astype(np.float64) @ keys.to_host().astype(np.float64).swapaxes(-1, -2)
        return (exact[:, :, 0] * self.shape[-1] ** -0.5 + 0.25).astype(np.float32)

    def __len__(self):
        return self.tokens


def test_measured_numbers_mean_what_they_say(monkeypatch):
    monkeypatch.setattr(measurement, "CACHES", {"forgetful": Forgetful})
    told = []
    sample = small_sample(np.random.default_rng(2))
    outcome, = measurement.measure(sample, "cpu", told.append)
    assert outcome.output_error == 1.0
    assert outcome.logit_error == pytest.approx(0.25, abs=1e-5)
    assert (outcome.tokens, outcome.nbytes, outcome.bytes_per_token) == (40, 64 * 40, 64)
    assert outcome.bits_per_element == 8 * 64 / (2 * 8) and outcome.ratio == 0.5
    assert outcome.step_us > 0 and outcome.prompt_ms > 0
    assert outcome.attended == pytest.approx(np.mean(7 / (sample.positions + 1)))
    assert outcome.mass == pytest.approx(measurement.attention_mass(sample)[:, :7].sum(axis=1).mean())
    assert told == ["forgetful on cpu", ""]


# ---- pictures and page

def outcome(preset, nbytes, error):
    return measurement.Outcome(preset, nbytes, 100, 12800, error, 1.0, 1.0, 0.1, 1.0, 10.0, 3.0, 8.0)


def test_pictures_are_well_formed_and_take_their_colours_from_the_page():
    rng = np.random.default_rng(3)
    mass = rng.exponential(size=(3, 500))
    drawn = [pictures.keys_before_and_after_rotation(rng.standard_normal((300, 16)).astype(np.float16)),
             pictures.attention_mass(mass / mass.sum(axis=1, keepdims=True)),
             pictures.bytes_against_error([outcome("alpha", 25600, 2e-4), outcome("beta", 25600, 2e-4),
                                           outcome("gamma", 5000, 0.1)])]
    for svg, caption in drawn:
        root = ElementTree.fromstring(pictures.standalone(svg))
        assert root.tag.endswith("svg") and len(caption) > 40
        assert not re.search("#0[1-9a]0[1-9a]0[1-9a]", svg) and "var(--ink)" in svg
    assert ">alpha, beta<" in drawn[2][0] and ">gamma<" in drawn[2][0]


def test_captions_tell_what_is_drawn():
    keys = np.full((100, 16), 0.5)
    keys[:, [3, 11]] = 8                                     # two outlier channels that are one half-split RoPE pair
    caption = pictures.keys_before_and_after_rotation(keys.astype(np.float16))[1]
    assert "up to 8.0 where the median channel has 0.5" in caption and "3 and 11 are one RoPE pair" in caption
    mass = np.zeros((2, 200))
    mass[0, :4], mass[1, 0], mass[1, 1:] = 0.25, 0.9, 0.1 / 199
    caption = pictures.attention_mass(mass)[1]
    assert "takes 25% and 90%" in caption and "4 and 1 of them hold 85 %" in caption


class Page(HTMLParser):
    """What a page refers to, and the identifiers that it defines."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.identifiers = [], [], []
        self.feed(text)
        self.references += re.findall(r"url\(['\"]?([^'\")]+)", text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value)
            if name == "id":
                self.identifiers.append(value)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run([sys.executable, "-m", "kvbench.cli", "demo", "--json", "demo.json"], cwd=folder,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, *((folder / name).read_text(encoding="utf-8") for name in ("kvbench-demo.html", "demo.json"))


def test_page_needs_nothing_else(demo):
    page = Page(demo[1])
    assert "http" not in demo[1] and "@import" not in demo[1]
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    inside = [reference[1:] for reference in page.references if reference.startswith("#")]
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert set(inside) == set(page.identifiers) and len(set(page.identifiers)) == len(page.identifiers)
    assert page.tags.count("svg") == 4


def table_rows(text) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_page_and_terminal_show_the_same_table(demo):
    printed, page, _ = demo
    head, _, *rows = table_rows(printed)
    assert [row[0] for row in rows] == list(measurement.CACHES)
    assert "".join(f"<th>{cell}</th>" for cell in head) in page
    for row in rows:
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert "kvbench-demo.html" in printed


def test_json_holds_what_the_table_shows(demo):
    document = json.loads(demo[2])
    assert document["schema"] == "kvbench.demo/1" and document["machine"]
    assert document["sample"] == data.sample().metadata
    head, _, *rows = table_rows(demo[0])
    for row, outcome in zip(rows, document["outcomes"], strict=True):
        shown = dict(zip(head, row))
        assert shown["preset"] == outcome["preset"] and shown["bytes"] == f"{outcome['nbytes']:,}"
        assert shown["bits"] == f"{outcome['bits_per_element']:.2f}" and shown["step us"] == f"{outcome['step_us']:.0f}"
        assert outcome["append_us"] > 0 and outcome["attend_us"] > 0


def test_exact_presets_lose_rounding_only(demo):
    """Rounding the output to float16 costs at most 2^-11 of each number, float32 sums far less."""
    head, _, *rows = table_rows(demo[0])
    numbers_of = {row[0]: dict(zip(head, row)) for row in rows}
    assert set(caches.PRESETS) < set(measurement.CACHES) == set(numbers_of)
    for name in ("exact", "exact in parts"):
        numbers = numbers_of[name]
        assert numbers["bits"] == "16.00" and numbers["ratio"] == "1.00"
        assert 0 < float(numbers["error"]) < 2**-11 and float(numbers["logit error"]) < 1e-3


def test_turboquant_is_small_and_near(demo):
    """3 bits and a float16 per 64 of them; an error of the output far below that of a token, sqrt(D(3)) = 0.19, where
    the newest tokens are exact."""
    head, _, *rows = table_rows(demo[0])
    numbers_of = {row[0]: dict(zip(head, row)) for row in rows}
    preset, alone = numbers_of["turboquant"], numbers_of["turboquant, codes alone"]
    assert alone["bits"] == "3.25" and 3.25 < float(preset["bits"]) < 3.6
    assert float(preset["error"]) < 0.1 < float(alone["error"]) < 0.5


def test_sparse_presets_read_a_part_of_the_cache_that_has_most_of_the_mass(demo):
    head, _, *rows = table_rows(demo[0])
    numbers_of = {row[0]: dict(zip(head, row)) for row in rows}
    for name, numbers in numbers_of.items():
        attended, mass = float(numbers["attended"].removesuffix(" %")), float(numbers["mass"])
        if name in ("rabitq", "quest", "twilight", "self_indexing"):
            assert 0 < attended < 40 and float(numbers["error"]) < 0.2
            assert (0.8 if name == "self_indexing" else 0.85) < mass < 1          # 160 tokens, whatever their mass
        else:
            assert attended == 100 and mass == 1


def test_page_reads_well_anywhere_and_says_where_its_data_are_from(demo):
    page = demo[1]
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    metadata = data.sample().metadata
    assert metadata["model"] in page and metadata["licence"] in page and metadata["text"] in page


def test_backend_is_one_that_this_machine_has():
    backend = measurement.backend_here()
    assert measurement.machine_here(backend)
    device = arrays.Device("cuda" if backend == "cuda" else "cpu")
    assert arrays.upload(np.zeros(3, np.float16), device).device == device


# ---- what the README shows

ROOT = Path(__file__).parents[1]


def remade(folder) -> str:
    """The results in README.md as `make figures` makes them in a copy of the repository at `folder`."""
    shutil.copy(ROOT / "README.md", folder)
    subprocess.run([sys.executable, folder / "results" / "figures.py"], cwd=folder, check=True, timeout=120)
    ElementTree.parse(folder / "results" / "sample.svg")
    return shown_results(folder / "README.md")


def shown_results(path) -> str:
    return path.read_text(encoding="utf-8").partition("<!-- results")[2].partition("<!-- end of results -->")[0]


def test_readme_shows_the_committed_results(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    assert remade(tmp_path) == shown_results(ROOT / "README.md"), "run `make figures`"
    for listed in (tmp_path / "results").glob("*/README.md"):
        assert listed.read_text() == (ROOT / listed.relative_to(tmp_path)).read_text(), "run `make figures`"
    for path in re.findall(r"\]\((results/.*?)\)", shown_results(ROOT / "README.md")):
        assert (tmp_path / path).is_file() and (ROOT / path).is_file(), "run `make figures`"


def test_results_become_a_table(tmp_path):
    (tmp_path / "results" / "machine").mkdir(parents=True)
    for name in ("figures.py", "published.json"):
        shutil.copy(ROOT / "results" / name, tmp_path / "results")
    axes = {"heads": ["6:2"], "tokens": [96], "head_dim": [64], "dtype": ["float16"]}
    results = bench.run(["attention.decode"], "cpu", axes, ["numpy"], quick=True, report=lambda line: None)
    case, = results.document["cases"]
    path = tmp_path / "results" / "machine" / "attention.json"
    results.write(path)
    assert case["kernel"] not in remade(tmp_path), "a quick look is no result"
    results.document["quick"] = False
    results.write(path)
    (_, cache), _, (_, best), (name, cell) = table_rows(remade(tmp_path))
    assert cache == "6:2, 96" and name == "attention.decode"
    assert best == f"{case['baselines'][0]['cold']['median_us']:.1f}"
    assert cell == f"{case['cold']['median_us']:.1f} ({case['speedup']:.2f}x)"
    _, _, cells = table_rows((tmp_path / "results" / "machine" / "README.md").read_text())
    assert cells[1].startswith("6:2 heads") and "tokens 96" in cells[1] and "float16" in cells[1]
    assert cells[3:5] == ["write", f"{case['cold']['median_us']:.1f}"]
    # Of what was measured twice, the newer counts, whatever the files are called.
    results.document["created"] = "2001" + results.document["created"][4:]
    case["cold"]["median_us"] *= 2
    results.write(path.with_name("zz.json"))
    again = remade(tmp_path), (tmp_path / "results" / "machine" / "README.md").read_text()
    assert table_rows(again[0])[3][1] == cell and table_rows(again[1])[2:] == [cells]
    assert cells[7] == "numpy" and cells[9] == f"{case['speedup']:.2f}"
    for name, words in (("speedup", ("attention.decode", "6:2 heads")), ("roofline", ("attention.decode", "GB/s"))):
        assert f"](results/machine/{name}.svg)" in remade(tmp_path)
        drawn = (tmp_path / "results" / "machine" / f"{name}.svg").read_text(encoding="utf-8")
        assert all(word in drawn for word in words) and "prefers-color-scheme" in drawn
        ElementTree.fromstring(drawn)
