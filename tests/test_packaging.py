"""kvbench installs from a source distribution, a wheel and a working tree, with and without compilers."""
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

import emulator
from kvbench import bindings
from kvbench.bindings import toolchain

ROOT = emulator.ROOT
PACKAGES = ("kvbench", "reference", "cuda_src", "bindings")
SITE = [path for path in sys.path if path.endswith("site-packages")]


def run(*command, cwd, **environment):
    """Run a command without network; the test fails with its output if it fails."""
    settings = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "KVBENCH_CUDA": "0",
                "KVBENCH_BUILD_CACHE": str(emulator.CACHE), **environment}
    settings.pop("PYTHONPATH", None)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=settings, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=400)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


class Environment:
    """A fresh virtual environment that sees the libraries of the running one, but not the kvbench installed there."""

    def __init__(self, folder: Path):
        venv.create(folder, symlinks=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        # A plain path in a .pth file brings the libraries; .pth files of editable installs inside it are not read.
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "libraries.pth").write_text("\n".join(SITE) + "\n")

    def install(self, *what, **environment):
        return run(
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            "install",
            "--no-deps",
            "--no-build-isolation",
            *what,
            cwd=self.folder,
            **environment,
        )

    def evaluate(self, code: str):
        """Run code from a folder that has nothing to do with kvbench, and return what it prints."""
        return run(self.python, "-c", textwrap.dedent(code), cwd=self.folder).strip()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy of the working tree, without what earlier builds have left there."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    tree.mkdir()
    leave_out = shutil.ignore_patterns("__pycache__", "*.so", "*.missing.txt", "*.egg-info")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, tree)
    (tree / "bindings" / "_simt.missing.txt").write_text("left over from another build")
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=tree)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    return environment


def sources(*suffixes):
    """The project's own files with these suffixes, as paths from the root."""
    return {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*")
            if path.suffix in suffixes and "__pycache__" not in path.parts}


def test_the_sdist_holds_every_source(unpacked):
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    assert sources(".py", ".cu", ".cuh", ".h", ".cpp", ".css", ".js") <= held
    assert {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".cu", ".cpp")
    } <= held
    assert {"README.md", "LICENSE", "pyproject.toml", "setup.py"} <= held
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc", ".missing.txt"))]


def test_the_wheel_maps_every_folder_into_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for path in sources(".py", ".cu", ".cuh", ".h", ".cpp", ".css", ".js"):
        assert (path if path.startswith("kvbench/") else f"kvbench/{path}") in held
    assert not [name for name in held if not name.startswith(("kvbench/", "kvbench-"))]
    data = {f"kvbench/data/{path.name}" for path in (ROOT / "kvbench" / "data").iterdir() if path.is_file()}
    assert data <= held
    assert "kvbench/bindings/_simt.missing.txt" not in held, "a note of an earlier build"


EVERYTHING = """
    import importlib, pkgutil, sys
    from importlib import resources
    import kvbench, kvbench.reference, kvbench.bindings
    for module in pkgutil.walk_packages(kvbench.__path__, "kvbench."):
        if not module.name.endswith("__main__") and not module.name.startswith("kvbench.integrations."):
            importlib.import_module(module.name)
    kernels = resources.files("kvbench.cuda_src")
    assert (kernels / "rotation.cu").read_text() and (kernels / "include" / "kvb" / "device.cuh").is_file()
    assert not {"reference", "cuda_src", "bindings"} & set(sys.modules)
    print(kvbench.__file__)
"""


def test_an_installed_wheel_works_anywhere(installed):
    assert installed.evaluate(EVERYTHING).startswith(str(installed.folder))
    assert "usage: kvbench" in run(installed.folder / "bin" / "kvbench", "--help", cwd=installed.folder)


def test_the_emulator_of_a_wheel_runs(installed):
    """Built from the sdist: what is missing there would show here."""
    assert installed.evaluate("""
        import numpy as np
        from kvbench import bindings, ops, reference
        import kvbench.reference.rotation
        reason = bindings.missing("_simt")
        if reason is None:
            x = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
            rotation = kvbench.reference.rotation.hadamard(64, seed=1)
            y = ops.rotation.rotate(x, rotation, backend="simt")
            np.testing.assert_allclose(y, kvbench.reference.rotation.rotate(x, rotation), atol=1e-5)
        print(reason)
    """) == str(expected_simt_reason())


def expected_simt_reason():
    try:
        toolchain.find_cxx(), toolchain.find_cuda_headers()
    except toolchain.Missing as reason:
        return reason


def test_an_editable_install_maps_the_folders(unpacked, tmp_path):
    environment = Environment(tmp_path)
    environment.install("-e", unpacked)
    assert environment.evaluate(EVERYTHING) == str(unpacked / "kvbench" / "__init__.py")
    (unpacked / "reference" / "added.py").write_text("VALUE = 7")
    assert environment.evaluate("from kvbench.reference.added import VALUE; print(VALUE)") == "7"
    (unpacked / "reference" / "added.py").unlink()


# ---- what is missing is said -----------------------------------------------------------------------------------------

REASONS = 'from kvbench import bindings; print(bindings.missing("_simt"), bindings.missing("_native"), sep="\\n---\\n")'


@pytest.mark.parametrize(
    "settings, simt, native",
    [
        (
            {"PATH": "/nonexistent"},
            "no C\\+\\+ compiler \\(g\\+\\+\\).*install g\\+\\+ and reinstall",
            "no C\\+\\+ compiler",
        ),
        (
            {"CXX": "false", "KVBENCH_CUDA": "0"},
            "false .*cuda_src.*failed with status 1",
            "false .*native.*failed with status 1",
        ),
    ],
)
def test_without_a_compiler_the_package_installs_and_says_so(unpacked, tmp_path, settings, simt, native):
    environment = Environment(tmp_path / "environment")
    tree = shutil.copytree(unpacked, tmp_path / "tree")
    environment.install(tree, **{"CUDA_HOME": "", "CUDA_PATH": "", "KVBENCH_CUDA": "", "CXX": "", **settings})
    reasons = environment.evaluate(REASONS).split("\n---\n")
    assert re.search(simt, reasons[0], re.S) and re.search(native, reasons[1], re.S)
    assert environment.evaluate("""
        import numpy as np
        from kvbench import ops
        import kvbench.reference.rotation
        x = np.ones((3, 64), np.float32)
        rotation = kvbench.reference.rotation.hadamard(64, seed=1)
        print(abs(ops.rotation.rotate(x, rotation) - kvbench.reference.rotation.rotate(x, rotation)).max() < 1e-5)
    """) == "True"


def test_without_cuda_the_native_module_says_so(installed):
    assert "KVBENCH_CUDA=0" in installed.evaluate(REASONS).split("\n---\n")[1]
    assert installed.evaluate("""
        from kvbench.bindings import _native
        print(_native.has_cuda, _native.kernels(), _native.device_count())
    """) == "False [] 0"


def test_a_missing_module_without_a_note():
    assert "kvbench.bindings._absent cannot be imported" in bindings.missing("_absent")


# ---- the native module -----------------------------------------------------------------------------------------------


@pytest.fixture
def native():
    reason = bindings.missing("_native")
    if reason:
        pytest.skip(reason)
    from kvbench.bindings import _native

    return _native


def test_both_builds_hold_the_same_kernels(native):
    from kvbench.bindings import _simt

    assert native.kernels() == _simt.kernels() and native.kernels()


def test_the_native_module_checks_arguments_before_it_touches_a_gpu(native):
    name = "kvb::rotation_dense_kernel<float, 64>"   # (x, y, matrix, u64 rows)
    rows = (5).to_bytes(8, "little")
    for arguments, message in [
        ([0, 0, 0], "expected 4 arguments, got 3"),
        ([0, 0, 0, rows[:4]], "argument 3: expected a scalar of 8 bytes"),
        ([rows, 0, 0, rows], "argument 0: expected a pointer"),
        ([0, 0, 0, 5], "argument 3: expected the bytes of a scalar"),
        ([0.5, 0, 0, rows], "argument 0: expected an address or None"),
    ]:
        with pytest.raises(ValueError, match=re.escape(name) + ".*" + message):
            native.launch(name, (1, 1, 1), (64, 1, 1), arguments)
    with pytest.raises(ValueError, match="no kernel kvb::absent"):
        native.launch("kvb::absent", (1, 1, 1), (64, 1, 1), [])


def test_cuda_errors_are_told(native):
    """Without a GPU every launch is such an error; with one, a block of too many threads."""
    with pytest.raises(RuntimeError, match="cudaError"):
        native.launch("kvb::rotation_dense_kernel<float, 64>", (1, 1, 1), (2048, 1, 1), [None, None, None, bytes(8)])
    with pytest.raises(RuntimeError, match="CUDA device 99: cudaError"):
        native.properties(99)


# ---- where compilers and headers are looked for ----------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """tools(name, output) puts a program on an otherwise empty PATH that prints `output`."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "KVBENCH_CUDA", "KVBENCH_CUDA_ARCHS", "CXX"):
        monkeypatch.delenv(name, raising=False)

    def add(name, output):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nprintf '{output}'\n")
        program.chmod(0o755)
        return str(program)
    return add


def gencode(*pairs):
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in pairs]


def test_gpu_architectures(tools, monkeypatch):
    nvcc = tools("nvcc", "compute_75\\ncompute_80\\ncompute_90\\n")
    assert toolchain.gpu_architectures(nvcc) == gencode((80, "sm_80"), (90, "sm_90"), (90, "compute_90"))
    monkeypatch.setenv("KVBENCH_CUDA_ARCHS", "native")
    with pytest.raises(toolchain.Missing, match="nvidia-smi shows no GPU"):
        toolchain.gpu_architectures(nvcc)
    tools("nvidia-smi", "9.0\\n9.0\\n8.6\\n")
    assert toolchain.gpu_architectures(nvcc) == gencode((86, "sm_86"), (90, "sm_90"))
    monkeypatch.setenv("KVBENCH_CUDA_ARCHS", "sm_90, 10.0")
    assert toolchain.gpu_architectures(nvcc) == gencode((90, "sm_90"), (100, "sm_100"), (100, "compute_100"))
    monkeypatch.delenv("KVBENCH_CUDA_ARCHS")
    assert toolchain.gpu_architectures(nvcc) == gencode((86, "sm_86"), (90, "sm_90"))
    tools("nvidia-smi", "NVIDIA-SMI has failed\\n")
    assert toolchain.gpu_architectures(tools("nvcc", "compute_75\\n compute_80\\n")) == gencode(
        (80, "sm_80"), (80, "compute_80")
    )
    with pytest.raises(toolchain.Missing, match="supports none of"):
        toolchain.gpu_architectures(tools("nvcc", "compute_52\\n"))


def test_nvcc_is_found_or_forbidden(tools, tmp_path, monkeypatch):
    with pytest.raises(toolchain.Missing, match="no nvcc"):
        toolchain.find_nvcc()
    nvcc = tools("nvcc", "")
    assert toolchain.find_nvcc() == nvcc
    monkeypatch.setenv("KVBENCH_CUDA", "0")
    with pytest.raises(toolchain.Missing, match="KVBENCH_CUDA=0"):
        toolchain.find_nvcc()


@pytest.mark.parametrize("layout", [
    {"toolkit/include": ("cuda_fp16.h", "crt/host_defines.h"), "toolkit/include/cccl": ("nv/target",)},
    {"nvidia/cu13/include": ("cuda_fp16.h", "crt/host_defines.h", "nv/target")},
    {"nvidia/cuda_runtime/include": ("cuda_fp16.h",), "nvidia/cuda_nvcc/include": ("crt/host_defines.h",),
     "nvidia/cuda_cccl/include": ("nv/target",)},
])
def test_cuda_headers_of_toolkits_and_wheels(tools, tmp_path, monkeypatch, layout):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for folder, names in layout.items():
        with pytest.raises(toolchain.Missing, match="nvidia-cuda-runtime"):
            toolchain.find_cuda_headers()   # as long as one is missing
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
    assert set(toolchain.find_cuda_headers()) == {tmp_path / folder for folder in layout}


def test_objects_are_reused_until_something_changes(tmp_path):
    header, source, cache = tmp_path / "value.h", tmp_path / "unit.cpp", tmp_path / "cache"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "value.h"\nint value() { return VALUE; }\n')

    def compile_it(*flags):
        step = toolchain.Step((toolchain.find_cxx(), *flags), source, (tmp_path,))
        return toolchain.compile_all([step], toolchain.headers_under(tmp_path), cache)[0]

    first = compile_it()
    assert compile_it() == first and first.is_file()
    assert compile_it("-O2") != first
    header.write_text("#define VALUE 2\n")
    changed = compile_it()
    assert changed != first
    source.write_text("not C++")
    with pytest.raises(toolchain.CompileError, match="(?s)unit.cpp.*failed with status 1:.*error:"):
        compile_it()
    assert not list(cache.glob("partial*.lock")) and changed.is_file()


# ---- one module object for each module -------------------------------------------------------------------------------


def test_the_folders_are_never_imported_by_their_bare_names():
    """From the repository's root `import reference` works and makes a second copy of every module."""
    bare = re.compile(r"^\s*(?:import|from)\s+(reference|cuda_src|bindings)\b", re.M)
    for path in sources(".py"):
        assert not bare.search((ROOT / path).read_text()), path
    for path in (ROOT / "tests").rglob("*.py"):
        assert not bare.search(path.read_text()), path
