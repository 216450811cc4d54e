"""The command line: exit statuses, tables, JSON, suggestions, and what is kept when it is interrupted."""
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvbench import bench, claims, cli, doctor, registry
from kvbench.errors import BackendUnavailable
from kvbench.reference.claim import MINIMUM_SAMPLES

README = Path(__file__).parents[1] / "README.md"
TINY = ("--axis", "tokens=64", "--axis", "kv_heads=1")


def kvbench(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "kvbench.cli", *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, env={**os.environ, **environment})


def held(*arguments, **environment):
    """Runs a command that must succeed, in silence but for its results."""
    done = kvbench(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr, "progress is for terminals"
    return done


# ---- what each command prints

def test_doctor_reports_every_backend():
    report = json.loads(held("doctor", "--json").stdout)
    assert list(report["backends"]) == list(registry.BACKENDS)
    assert report["backends"]["reference"] == {"available": True, "reason": None}
    assert report["libraries"]["numpy"] == np.__version__
    text = held("doctor").stdout
    for backend in registry.BACKENDS:
        assert re.search(rf"^  {backend} +(available|missing: .)", text, re.MULTILINE)


def test_doctor_informs_where_nothing_is_installed():
    report = json.loads(held("doctor", "--json", PATH="", CUDA_VISIBLE_DEVICES="").stdout)
    assert report["compilers"] == {"c++": None, "nvcc": None} and report["gpus"] == []
    assert not report["backends"]["cuda"]["available"] and report["backends"]["cuda"]["reason"]
    text = doctor.text({**report, "cuda_headers": None})
    assert "pip install 'kvbench[cuda13]'" in text and "nvidia-smi lists no GPU" in text


def test_doctor_repeats_what_the_tools_say(tmp_path):
    for name, text in [
            ("g++", "echo g++ 99.1; echo more"), ("nvcc", "echo copyright; echo Build 13.9"),
            ("nvidia-smi", "echo 'NVIDIA X, 580.1, 81559 MiB, 9.0'; echo 'NVIDIA Y, 580.1, 24564 MiB, 8.9'")]:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    report = json.loads(held("doctor", "--json", PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="").stdout)
    assert report["compilers"] == {"c++": "g++ 99.1", "nvcc": "Build 13.9"}
    assert report["gpus"] == [
        {"name": "NVIDIA X", "driver": "580.1", "memory": "81559 MiB", "compute_capability": "9.0"},
        {"name": "NVIDIA Y", "driver": "580.1", "memory": "24564 MiB", "compute_capability": "8.9"}]
    (tmp_path / "g++").write_text("#!/bin/sh\necho broken\nexit 1\n")
    assert doctor._first_line(str(tmp_path / "g++")) is None


def test_list_shows_kernels_and_backends():
    registry.load()
    listed = json.loads(held("list", "--json").stdout)
    assert {kernel["name"]: tuple(kernel["backends"]) for kernel in listed["kernels"]} \
        == {kernel.name: kernel.backends for kernel in registry.KERNELS.values()}
    assert all(state["available"] == (state["reason"] is None) for state in listed["backends"].values())
    rows = held("list").stdout.splitlines()
    for kernel in registry.KERNELS.values():
        row = next(row for row in rows if row.startswith(f"| {kernel.name} "))
        assert row.split("|")[2].strip() == "yes" and kernel.source in row


def test_list_tells_what_is_absent():
    done = held("list", CUDA_VISIBLE_DEVICES="")
    assert "| absent " in done.stdout and "cuda is absent here: " in done.stdout


def test_prove_writes_what_it_prints(tmp_path):
    path = tmp_path / "claims.json"
    printed = held("prove", "attention", "--samples", MINIMUM_SAMPLES, "--seed", 7, "--json", path).stdout
    results = json.loads(path.read_text())["results"]
    assert len(results) == len(claims.algorithms()["attention"])
    for result in results:
        assert result["holds"] and result["seed"] == 7 and f"| {result['claim']} " in printed


def test_verify_writes_what_it_prints(tmp_path):
    path = tmp_path / "verdicts.json"
    printed = held("verify", "attention.merge", "--backend", "cpu", "--examples", 3, "--json", path).stdout
    document = json.loads(path.read_text())
    assert document["complete"] and document["verdicts"] == [
        {"kernel": "attention.merge", "backend": "cpu", "examples": 3, "agrees": True, "failures": []}]
    assert re.search(r"\| attention\.merge \| cpu +\| +3 \| agrees +\|", printed)


def test_verify_takes_every_backend_of_this_machine():
    printed = held("verify", "attention.merge", "--examples", 1, CUDA_VISIBLE_DEVICES="").stdout
    backends = [row.split("|")[2].strip() for row in printed.splitlines()[2:]]
    available = json.loads(held("list", "--json", CUDA_VISIBLE_DEVICES="").stdout)["backends"]
    assert backends == [name for name, state in available.items() if state["available"] and name != "reference"]


def test_bench_writes_what_it_prints(tmp_path):
    path = tmp_path / "bench.json"
    printed = held("bench", "rotation.rotate", "--backend", "cpu", *TINY, "--axis", "dtype=float16,float32", "--quick",
                   "--json", path, "--csv", tmp_path / "bench.csv", "--markdown", tmp_path / "bench.md").stdout
    document = json.loads(path.read_text())
    bench.validate(document)
    assert document["complete"] and document["quick"]
    assert [case["problem"]["dtype"] for case in document["cases"]] == ["float16", "float32"]
    assert all(case["problem"]["tokens"] == 64 for case in document["cases"])
    assert printed.count("| rotation.rotate ") == 2
    assert (tmp_path / "bench.csv").read_text().count("\n") == 3
    assert (tmp_path / "bench.md").read_text() in printed


def test_bench_lists_what_there_is_to_choose():
    printed = held("bench", "--list").stdout
    assert "--suite NAME" in printed and "  torch-cudnn (cuda): " in printed and "  rotation.rotate  [" in printed


def test_bench_profiles_one_case():
    printed = held("bench", "rotation.rotate", "--profile", "--backend", "cpu", *TINY).stdout
    assert printed.startswith("ran once: rotation.rotate on cpu, tokens=64")


def test_version_and_help():
    assert held("--version").stdout.startswith("kvbench ")
    assert "Exit status" in held("--help").stdout


# ---- wrong usage

@pytest.mark.parametrize("arguments, message", [
    (["bnch"], "did you mean bench?"),
    (["verify", "attention.decod"], "did you mean attention.decode"),
    (["verify", "--backend", "smit"], "did you mean simt?"),
    (["bench", "rotatoin"], "did you mean rotation.rotate"),
    (["bench", "rotation", "--axis", "token=8"], "did you mean tokens?"),
    (["bench", "rotation", "--axis", "tokens"], "expected NAME=V1,V2"),
    (["bench", "rotation", "--backend", "cpu", "--axis", "tokens=many"], "positive integer"),
    (["bench", "rotation", "--backend", "cpu", "--baseline", "numy"], "did you mean numpy"),
    (["bench", "--backend", "simt"], "never timed"),
    (["bench", "--suite", "decod"], "did you mean decode"),
    (["bench", "attention", "--profile", "--backend", "cpu"], "expected one case, got 3"),
    (["bench", "--csv", "/nowhere/results.csv"], "expected a file in an existing folder"),
    (["prove", "rotatio"], "did you mean rotation"),
    (["prove", "--samples", "0"], "expected a positive integer, got '0'"),
    (["prove", "--seed", "-1"], "expected a non-negative integer"),
    (["verify", "--examples", "x"], "expected a positive integer, got 'x'"),
    (["demo", "--html", "/nowhere/page.html"], "expected a file in an existing folder"),
    (["verify", "--json", "."], "expected a file in an existing folder"),
    ([], "COMMAND"),
])
def test_wrong_usage_is_explained(arguments, message, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as stopped:              # what argparse itself finds
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == "" and message in printed.err


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_named_kernel_without_the_backend_is_refused(command, monkeypatch, capsys):
    kernel = registry.get("rotation.rotate")
    monkeypatch.setitem(registry.KERNELS, kernel.name, dataclasses.replace(kernel, backends=("reference", "cuda")))
    assert cli.main([command, "attention.merge", kernel.name, "--backend", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "rotation.rotate has no backend 'cpu'; it has reference, cuda" in printed.err


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_missing_backend_names_the_cure(command):
    done = kvbench(command, "rotation", "--backend", "cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert f"kvbench {command}: backend 'cuda' is not available" in done.stderr
    assert "NVIDIA GPU" in done.stderr or "pip install" in done.stderr


def test_wrong_names_end_a_real_run_with_status_2():
    done = kvbench("verify", "rotatoin")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "kvbench verify: unknown kernel 'rotatoin'; did you mean rotation.rotate?\n"


def test_errors_of_the_machine_are_not_tracebacks(monkeypatch, capsys):
    def broken():
        raise BackendUnavailable("no such luck: install luck")
    monkeypatch.setattr(doctor, "examine", broken)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "kvbench doctor: no such luck: install luck\n"


# ---- what fell short, and what is kept

@pytest.fixture
def wrong_kernel(monkeypatch):
    """A kernel of the registry whose operator is off by one percent."""
    right = registry.get("rotation.rotate")

    def operator(x, rotation, *, inverse=False, **options):
        return right.operator(np.asarray(x * x.dtype.type(1.01)), rotation, inverse=inverse, **options)
    wrong = dataclasses.replace(right, name="rotation.wrong", operator=operator)
    monkeypatch.setitem(registry.KERNELS, wrong.name, wrong)
    return wrong


def test_a_wrong_kernel_is_reported(wrong_kernel, tmp_path, capsys):
    path = tmp_path / "verdicts.json"
    assert cli.main(["verify", wrong_kernel.name, "--backend", "cpu", "--examples", "4", "--json", str(path)]) == 1
    verdict, = json.loads(path.read_text())["verdicts"]
    assert not verdict["agrees"] and verdict["failures"]
    printed = capsys.readouterr().out
    assert "FAILED" in printed and verdict["failures"][0] in printed


def test_a_wrong_kernel_is_not_timed(wrong_kernel, capsys):
    assert cli.main(["bench", wrong_kernel.name, "--backend", "cpu", *TINY, "--axis", "dtype=float32", "--quick"]) == 1
    assert "WRONG, not timed" in capsys.readouterr().out


def test_a_false_claim_is_reported(monkeypatch, tmp_path, capsys):
    result = next(claims.prove(["attention"], samples=MINIMUM_SAMPLES))
    false = dataclasses.replace(result, evidence=dataclasses.replace(result.evidence, strain=float("nan")))
    monkeypatch.setattr(claims, "prove", lambda *arguments: iter([result, false]))
    path = tmp_path / "claims.json"
    assert cli.main(["prove", "--json", str(path)]) == 1
    assert [entry["holds"] for entry in json.loads(path.read_text())["results"]] == [True, False]
    assert "does not hold" in capsys.readouterr().out


def test_interrupted_prove_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    first = next(claims.prove(["attention"], samples=MINIMUM_SAMPLES))

    def interrupted(*arguments):
        yield first
        raise KeyboardInterrupt
    monkeypatch.setattr(claims, "prove", interrupted)
    path = tmp_path / "claims.json"
    assert cli.main(["prove", "--json", str(path)]) == 130
    assert len(json.loads(path.read_text())["results"]) == 1
    assert first.claim.name in capsys.readouterr().out


def test_interrupted_verify_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    from kvbench import verify

    real = verify.verify

    def second_call_is_interrupted(kernel, *arguments, **options):
        if kernel.name != "attention.decode":
            raise KeyboardInterrupt
        return real(kernel, *arguments, **options)
    monkeypatch.setattr(verify, "verify", second_call_is_interrupted)
    path = tmp_path / "verdicts.json"
    kernels = ["attention.decode", "attention.merge"]
    assert cli.main(["verify", *kernels, "--backend", "cpu", "--examples", "1", "--json", str(path)]) == 130
    document = json.loads(path.read_text())
    assert not document["complete"] and [v["kernel"] for v in document["verdicts"]] == ["attention.decode"]
    assert "attention.decode" in capsys.readouterr().out


def test_interrupted_elsewhere(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt
    monkeypatch.setattr(doctor, "examine", interrupted)
    assert cli.main(["doctor"]) == 130


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen([sys.executable, "-m", "kvbench.cli", "list", "--json"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()                     # long before anything is written
    assert process.stderr.read() == "" and process.wait(timeout=60) == 141


def test_progress_is_for_terminals(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    for stream, expected in [(Terminal(), "\r\x1b[Kworking"), (io.StringIO(), "")]:
        monkeypatch.setattr(sys, "stderr", stream)
        cli._progress("working")
        assert stream.getvalue() == expected


# ---- what the README says

def test_readme_names_every_command():
    text = README.read_text(encoding="utf-8")
    for command in cli._parser()[1]:
        assert f"\nkvbench {command} " in text


def test_readme_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["output"].shape == (1, 32, 128) and names["lse"].shape == (1, 32)
    assert (tmp_path / "kv.safetensors").exists()
