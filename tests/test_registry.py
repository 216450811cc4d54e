"""The registry and the folders tell the same story, and its records hold what they promise."""
import inspect
import pathlib
import re

import numpy as np
import pytest

import kvbench
from kvbench import loaders, registry, trees
from kvbench.arrays import Device
from kvbench.reference.block_gtq import Plan
from kvbench.reference.rotation import Rotation
from kvbench.reference.turboquant import Projection
from kvbench.registry import Kernel, Traffic

registry.load()
ROOT = pathlib.Path(__file__).parents[1]
COMPOSED = "cache"      # the stem whose steps are made of the operators of others: no layer but its own file
STEMS = sorted({kernel.stem for kernel in registry.KERNELS.values()} - {COMPOSED})
KERNELS = list(registry.KERNELS.values())
# How much of some arrays these move hangs on a list: tests/test_<stem>.py count it.
LISTS = ("attention.sparse_attention", "selection.select_top_p", "selection.select_top_k", "self_indexing.select_top_k",
         "rabitq.select_top_p", "rabitq.sparse_attention", "cache.decode_step")


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_leads_through_all_layers(stem):
    for path in (f"reference/{stem}.py", f"kvbench/cpu/{stem}.py", f"kvbench/ops/{stem}.py", f"tests/test_{stem}.py",
                 f"tests/strategies/{stem}.py"):
        assert (ROOT / path).exists(), path
    on_gpus = any("cuda" in kernel.backends for kernel in KERNELS if kernel.stem == stem)
    assert (ROOT / f"cuda_src/{stem}.cu").exists() == on_gpus


def test_whole_steps_are_a_stem_too():
    for path in ("kvbench/cache.py", "kvbench/cache_records.py", "tests/test_cache.py", "tests/strategies/cache.py"):
        assert (ROOT / path).exists(), path
    assert [kernel.name for kernel in KERNELS if kernel.stem == COMPOSED] == ["cache.decode_step"]


def test_no_stray_kernel_or_operator_file():
    """A large operator may have launches and records in files of their own, <stem>_launch and <stem>_records."""
    helpers = {"__init__", "claim", "convert", "dispatch", "codebook", "planes", "rotated", "tiles"}
    for folder, suffix in (("reference", ".py"), ("cuda_src", ".cu"), ("kvbench/cpu", ".py"), ("kvbench/ops", ".py")):
        stems = {re.sub("_(launch|records)$", "", path.stem) for path in (ROOT / folder).glob(f"*{suffix}")} - helpers
        assert stems <= set(STEMS), folder


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_reference_and_operator_take_the_same_inputs(kernel):
    problem = kernel.problem(**{axis: 1 for axis in ("tokens", "batch") if axis in kernel.axes})
    inputs = kernel.inputs(problem, np.random.default_rng(0))
    for function in (kernel.reference, kernel.operator):
        assert set(inputs) <= set(inspect.signature(function).parameters), function


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_traffic_counts_the_arrays_of_the_problem(kernel):
    small = {axis: 2 for axis in ("tokens", "batch", "parts") if axis in kernel.axes}
    problem = kernel.problem(**small)
    inputs = kernel.inputs(problem, np.random.default_rng(0))
    result = kernel.operator(**inputs, backend="reference")
    data = {name: value for name, value in inputs.items() if not isinstance(value, (Rotation, Projection, Plan))}
    counted = Traffic(*(sum(x.nbytes for x in trees.arrays_of(tree).values()) for tree in (data, result)))
    if kernel.name in LISTS:
        traffic = kernel.traffic(problem)
        assert 0 < traffic.bytes_read <= counted.bytes_read and 0 < traffic.bytes_written <= counted.bytes_written
    else:
        assert kernel.traffic(problem) == counted


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_public_operators_are_documented(kernel):
    text = inspect.getdoc(kernel.operator)
    assert "[" in text and "backend" in text + str(inspect.signature(kernel.operator)) and "arXiv" in text
    for name in inspect.signature(kernel.operator).parameters:
        if name not in ("backend", "stream", "out", "lse"):
            assert re.search(rf"\b{name}\b", text), f"{kernel.name}: {name} is not in the docstring"


def test_problem_checks_axes_and_values():
    kernel = registry.get("attention.decode")
    assert kernel.problem(tokens=7)["tokens"] == 7
    with pytest.raises(ValueError, match="unknown axis 'token'; did you mean tokens"):
        kernel.problem(token=7)
    with pytest.raises(ValueError, match="axis tokens: expected a positive integer, got 0"):
        kernel.problem(tokens=0)
    with pytest.raises(ValueError, match="axis dtype: expected one of .* got 'float61'; did you mean float16"):
        kernel.problem(dtype="float61")


def test_unknown_names_list_the_nearest():
    with pytest.raises(ValueError, match="unknown kernel 'attention.decod'; did you mean attention.decode"):
        registry.get("attention.decod")
    assert [k.name for k in registry.select(["attention"])] == [
        "attention.decode", "attention.sparse_attention", "attention.merge"]
    assert registry.select() == KERNELS


def test_the_name_of_an_algorithm_means_its_kernels_that_have_the_backend():
    kernels, lacking = registry.select_for("simt", ["self_indexing", "rotation"])
    assert [kernel.name for kernel in lacking] == ["self_indexing.build_codebook"]
    assert [kernel for kernel in registry.select(["self_indexing", "rotation"]) if kernel not in lacking] == kernels
    for names in (["self_indexing.build_codebook"], ["self_indexing", "self_indexing.build_codebook"]):
        with pytest.raises(ValueError, match="build_codebook has no backend 'simt'; it has reference, cpu"):
            registry.select_for("simt", names)
    with pytest.raises(ValueError, match="has no backend 'abacus'"):
        registry.select_for("abacus", ["self_indexing"])


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="registered twice"):
        registry.register(KERNELS[0])
    with pytest.raises(ValueError, match="unknown backends"):
        registry.register(Kernel(**{**KERNELS[0].__dict__, "name": "attention.other", "backends": ("gpu",)}))


def test_imports_point_down():
    """The table of folders in the architecture: nothing imports what stands above it."""
    order = ["errors", "trees", "driver", "arrays", "registry", "loaders", "cpu", "scores", "ops", "storage", "codecs",
             "selectors", "indexes", "cache", "caches", "cache_records", "claims", "verify", "bench", "demo", "report",
             "doctor", "integrations", "evaluate", "cli"]
    rank = {name: i for i, name in enumerate(order)}
    for path in (ROOT / "kvbench").rglob("*.py"):
        own = path.relative_to(ROOT / "kvbench").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for line in path.read_text().splitlines():
            if line.startswith(("from kvbench", "import kvbench")):   # imports inside functions are late on purpose
                for used in re.findall(r"kvbench\.(\w+)", line) or re.findall(r"\b(\w+)\b", line.split("import")[1]):
                    if used in rank:
                        assert rank[used] <= rank[own], f"{path.name}: {line}"
    for path in (ROOT / "reference").glob("*.py"):
        assert not re.search(r"^\s*(from|import) kvbench", path.read_text(), re.M), path


def test_package_says_its_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", kvbench.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvbench.nothing


def test_loader_refuses_unknown_kernels_and_arguments():
    with pytest.raises(ValueError, match="backend: expected one of"):
        loaders.availability("gpu")
    if loaders.availability("simt") is None:
        launch = loaders.get_function("rotation", "kvb::rotation_dense_kernel<float, 65>", "simt")
        with pytest.raises((RuntimeError, ValueError), match="rotation_dense_kernel<float, 65>"):
            launch((1,), (65,), ())
        launch = loaders.get_function("rotation", "kvb::rotation_dense_kernel<float, 64>", "simt")
        with pytest.raises(TypeError, match="kernel argument: expected an Array"):
            launch((1,), (64,), (3, 4, 5, 6))


@pytest.mark.skipif(loaders.availability("simt") is not None, reason=str(loaders.availability("simt")))
def test_cooperative_launches_are_recorded_and_limited():
    device = Device("cpu")
    launch = loaders.get_function("rotation", "kvb::rotation_dense_kernel<float, 64>", "simt")
    blocks = loaders.cooperative_blocks("simt", device, 64)
    assert blocks == 16 * loaders.cooperative_blocks("simt", device, 1024) > 16
    nothing = (None, None, None, np.uint64(0))
    with loaders.record() as launches:
        launch((blocks,), (64,), nothing)
        launch((blocks,), (64,), nothing, cooperative=True)
    assert [launch["cooperative"] for launch in launches] == [False, True]
    launch((blocks + 1,), (64,), nothing)
    with pytest.raises(RuntimeError, match=f"a cooperative launch has at most .* got {blocks + 1} blocks of 64"):
        launch((blocks + 1,), (64,), nothing, cooperative=True)
