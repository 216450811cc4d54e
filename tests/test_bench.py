"""The benchmark driver: is its time to be trusted?  Clocks and devices are faked wherever the truth must be known."""
import contextlib
import copy
import csv
import ctypes
import io
import json
import math
import os
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kvbench import arrays, bench, loaders, registry, trees
from kvbench.bench import (axes, baselines, calls, check, cpu, driver, gpu, machine, overview, results, suites, tables,
                           timing, yardsticks)
from kvbench.caches import PRESETS
from kvbench.errors import BackendUnavailable
from kvbench.registry import Kernel, Traffic


# ---- timing: the stop rule -----------------------------------------------------------------------------------------

class Samples:
    """Hands out known samples and advances its own clock by them."""

    def __init__(self, durations, overhead=0.0):
        self.durations, self.overhead, self.now, self.taken = iter(durations), overhead, 0.0, []

    def clock(self):
        return self.now

    def __call__(self, count):
        batch = [next(self.durations) for _ in range(count)]
        self.now += sum(batch) + count * self.overhead
        self.taken += batch
        return batch


def endless(*values):
    while True:
        yield from values


RULE = timing.StopRule(relative_error=0.01, minimum_samples=12, minimum_seconds=0.5, limit_seconds=3.0,
                       warm_up_seconds=0.1)


@given(count=st.integers(1, 1500))
def test_interval_of_the_median_has_the_rank_of_the_binomial_law(count):
    rank = timing._lower_rank(count)
    law = stats.binom(count, 0.5)
    if count <= 1000:
        assert law.cdf(rank - 1) <= 0.025 < law.cdf(rank)
    else:      # the normal approximation may be one rank off
        assert law.cdf(rank - 2) <= 0.025 < law.cdf(rank + 1)
    assert (timing.median_interval(range(count)) is None) == (count < 6)


def test_interval_holds_the_median_as_often_as_it_says():
    rng, trials, held = np.random.default_rng(0), 4000, 0
    for _ in range(trials):
        low, high = timing.median_interval(rng.lognormal(0, 1, 25))
        held += low <= 1.0 <= high                      # the median of exp(N(0, 1)) is 1
    expected = 1 - 2 * stats.binom(25, 0.5).cdf(timing._lower_rank(25) - 1)
    assert expected >= timing.CONFIDENCE
    assert abs(held - trials * expected) < 6 * math.sqrt(trials * expected * (1 - expected))


def test_statistics_of_known_samples():
    durations = [3e-6, 1e-6, 2e-6, 5e-6, 4e-6, 100e-6, 2.5e-6]
    summary = timing.Measurement(tuple(durations), True).summary()
    assert summary["median_us"] == 3.0 and summary["min_us"] == 1.0 and summary["count"] == 7
    assert summary["iqr_us"] == 2.25                   # quartiles 2.25 and 4.5
    assert summary["samples_us"] == [3.0, 1.0, 2.0, 5.0, 4.0, 100.0, 2.5]     # in the order in which they were taken


def test_steady_samples_stop_at_the_minimum():
    samples = Samples(endless(0.04))
    measured = timing.measure(samples, RULE, samples.clock)
    assert measured.converged and measured.median == 0.04 and measured.relative_error == 0
    assert 0.5 <= 0.04 * len(measured.samples) <= 0.5 + 2 * 0.04       # minimum_seconds decides: 13 samples


def test_minimum_of_samples_is_kept_when_each_is_long():
    samples = Samples(endless(0.2))
    assert len(timing.measure(samples, RULE, samples.clock).samples) == 12


def test_warm_up_is_thrown_away():
    samples = Samples([5.0, *[0.05] * 1000])
    measured = timing.measure(samples, RULE, samples.clock)
    assert measured.converged and max(measured.samples) == 0.05


def test_noise_that_does_not_settle_is_flagged_at_the_limit():
    samples = Samples(endless(0.01, 0.03))
    measured = timing.measure(samples, RULE, samples.clock)
    assert not measured.converged and not measured.summary()["converged"]
    assert 3.0 <= sum(measured.samples) <= 3.0 + 0.1
    assert measured.relative_error > RULE.relative_error


def test_noise_that_settles_takes_more_samples_than_the_minimum():
    rng = np.random.default_rng(1)
    samples = Samples(0.001 * (1 + 0.02 * rng.standard_normal(100_000)))
    rule = timing.StopRule(0.002, 10, 0.0, 100.0, 0.0)
    measured = timing.measure(samples, rule, samples.clock)
    assert measured.converged and measured.relative_error <= 0.002 and len(measured.samples) > 50
    assert abs(measured.median - 0.001) < 6 * 0.002 * 0.001


def test_calls_too_slow_for_an_interval_are_flagged():
    samples = Samples(endless(2.0))
    measured = timing.measure(samples, RULE, samples.clock)
    assert len(measured.samples) == 2 and not measured.converged
    assert measured.summary()["relative_error"] is None


def test_the_limit_counts_what_lies_between_the_samples():
    samples = Samples(endless(0.001, 0.003), overhead=0.1)
    assert not timing.measure(samples, RULE, samples.clock).converged
    assert samples.now <= 3.0 + 0.1 + 3 * 0.11


# ---- kernels made for these tests ------------------------------------------------------------------------------------

class Clock:
    """A clock that only the kernels under test move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


CLOCK = Clock()
DURATION = {"tokens": 1e-6}        # seconds per token


def doubled(x, *, out=None, backend=None):
    CLOCK.now += DURATION["tokens"] * x.shape[0]
    out = np.empty_like(x) if out is None else out
    np.multiply(x, 2, out=out)
    return out


def reference_doubled(x):
    return 2.0 * np.asarray(x, np.float64)


def agree(inputs, expected, actual):
    if not np.allclose(expected, actual, rtol=1e-6):
        raise AssertionError("does not double")


def make_kernel(name="fake.double", operator=doubled, **changes):
    fields = {
        "name": name, "reference": reference_doubled, "operator": operator, "backends": ("cpu", "reference"),
        "axes": {"tokens": (64, 128), "kv_heads": (2,), "group": (2,), "dtype": ("float32", "float16"),
                 "share": (0.85, 0.5)},
        "inputs": lambda problem, rng: {"x": rng.standard_normal((problem["tokens"], 8)).astype(problem["dtype"])},
        "traffic": lambda problem: Traffic(problem["tokens"] * 1000, problem["tokens"] * 500), "agreement": agree,
        "error": lambda inputs, expected, actual: check.relative_rms(expected, actual), "source": "none"}
    return Kernel(**{**fields, **changes})


@pytest.fixture
def fake(monkeypatch):
    """register(kernel): the registry holds only what is registered here; a small CPU with the tests' clock."""
    monkeypatch.setattr(registry, "load", lambda: None)
    monkeypatch.setattr(registry, "KERNELS", {})
    monkeypatch.setattr(loaders, "availability",
                        lambda backend: None if backend in ("cpu", "reference") else "not here")
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr(timing, "QUICK", timing.StopRule(0.05, 10, 0.0, 0.2, 0.0))
    monkeypatch.setattr(yardsticks, "measure", lambda place, rule: {
        name: {"bytes_moved": 1, "gbps": speed, "timer": "given", "cold": None,
               "hot": timing.Measurement((1.0,), True).summary()} for name, speed in (("copy", 6.0), ("read", 3.0))})
    monkeypatch.setitem(driver.PLACES, "cpu", lambda flush="write": cpu.Cpu(CLOCK, flush))
    driver.PLACES["cpu"].kind = "cpu"
    return registry.register


def quiet(*arguments, **options):
    """bench.run, its table returned as text."""
    lines = []
    outcome = bench.run(*arguments, quick=True, report=lines.append, **options)
    return outcome, "\n".join(lines)


# ---- the driver: correctness first -----------------------------------------------------------------------------------

def test_a_case_has_the_times_that_the_clock_gave(fake):
    fake(make_kernel())
    outcome, text = quiet(["fake.double"], "cpu", {"tokens": [64, 200]})
    assert outcome.exit_status == 0
    for case, tokens in zip(outcome.document["cases"], (64, 200), strict=True):
        assert case["problem"]["tokens"] == tokens
        for way in ("cold", "hot"):
            assert case[way]["median_us"] == pytest.approx(tokens)
            assert case[way]["converged"] and case[way]["count"] >= 10
        assert case["gbps"] == pytest.approx(1.5) and case["percent_of_copy"] == pytest.approx(25) \
            and case["percent_of_read"] == pytest.approx(50)                 # 1500 bytes a token, a token a microsecond
        assert case["checked"] == {"agrees": True, "failure": None, "parts": ["all"], "of": 1}
        assert case["error"] == 0 and case["timer"] == "monotonic clock"
        assert f"{tokens}.00" in text
    bench.validate(outcome.document)


def test_the_command_of_a_case_repeats_it_alone(fake, tmp_path):
    fake(make_kernel())
    outcome, _ = quiet((), "cpu", {"tokens": ["64", "1K"], "dtype": ["float16"]})
    second = outcome.document["cases"][1]
    words = second["command"].split()
    assert words[:3] == ["kvbench", "bench", "fake.double"] and "--quick" in words
    given = {name: values.split(",") for name, values in
             (words[i + 1].split("=") for i, word in enumerate(words) if word == "--axis")}
    again, _ = quiet([words[2]], words[words.index("--backend") + 1], given)
    assert [case["problem"] for case in again.document["cases"]] == [second["problem"]]


def wrong(x, *, out=None, backend=None):
    return doubled(x, out=out) + np.float32(0.1)


def unwritten_tail(x, *, out=None, backend=None):
    """Right in new memory that happens to hold the result of an earlier call; leaves the last row unwritten."""
    if out is None:
        return doubled(x)
    np.multiply(x[:-1], 2, out=out[:-1])
    return out


class RightOnce:
    """Leaves a counter behind: right for the first calls, wrong later."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, x, *, out=None, backend=None):
        self.left -= 1
        result = doubled(x, out=out)
        if self.left < 0:
            result[0, 0] += 1
        return result


def raises(x, *, out=None, backend=None):
    raise ValueError("fake.double: x: expected something else")


def short(x, *, backend=None):
    return doubled(x)[:-1]


@pytest.mark.parametrize("operator, reason", [
    (wrong, "does not double"), (unwritten_tail, "does not double"), (raises, "expected something else"), (short, "")],
    ids=["wrong", "unwritten", "raises", "short"])
def test_a_wrong_kernel_is_refused_and_never_timed(fake, monkeypatch, operator, reason):
    fake(make_kernel(operator=operator))
    monkeypatch.setattr(cpu.Stopwatch, "cold", lambda *_: pytest.fail("a wrong kernel was timed"))
    monkeypatch.setattr(cpu.Stopwatch, "hot", lambda *_: pytest.fail("a wrong kernel was timed"))
    outcome, text = quiet(["fake.double"], "cpu", baselines=[])
    case, = outcome.document["cases"]
    assert outcome.exit_status == 1 and outcome.failures == [case]
    assert not case["checked"]["agrees"] and reason in case["checked"]["failure"]
    assert case["cold"] is case["hot"] is case["gbps"] is case["speedup"] is None
    assert "WRONG, not timed" in text
    bench.validate(outcome.document)


def test_a_kernel_that_is_right_only_at_first_keeps_no_time(fake):
    fake(make_kernel(operator=RightOnce(calls=5)))
    outcome, _ = quiet(["fake.double"], "cpu")
    case, = outcome.document["cases"]
    assert outcome.exit_status == 1 and case["cold"] is None and case["hot"] is None
    assert case["checked"]["failure"].startswith("after many calls")


def test_one_wrong_case_does_not_cost_the_others(fake):
    fake(make_kernel("a.wrong", operator=wrong))
    fake(make_kernel("b.right"))
    outcome, _ = quiet((), "cpu")
    assert [case["cold"] is None for case in outcome.document["cases"]] == [True, False] and outcome.exit_status == 1


# ---- the driver: what is measured besides ----------------------------------------------------------------------------

@given(size=st.integers(1, 10**9), cache=st.integers(1, 10**9), most=st.integers(1, 64))
def test_input_sets_fill_twice_the_cache_and_no_more(size, cache, most):
    sets = calls.input_sets(size, cache, most)
    if sets is None:
        assert size >= 2 * cache or most * size < 2 * cache
    else:
        assert 1 < sets <= most and sets * size >= 2 * cache > (sets - 1) * size


def test_inputs_that_fit_the_cache_are_rotated(fake):
    """16 KiB of inputs, 64 KiB of cache: 8 sets, each in memory of its own, each with its own output."""
    seen, sets = [], set()

    def operator(x, *, out=None, backend=None):
        seen.append((x.ctypes.data, None if out is None else out.ctypes.data))
        return doubled(x, out=out)

    fake(make_kernel(operator=operator))
    outcome, text = quiet((), "cpu", {"tokens": [512]})
    case, = outcome.document["cases"]
    assert outcome.exit_status == 0 and case["input_sets"] == 8
    assert case["rotating"]["median_us"] == pytest.approx(512) and case["rotating"]["count"] >= 10
    sets = {pair for pair in seen if None not in pair}
    assert len({x for x, _ in sets}) == len({out for _, out in sets}) == 8
    assert "rotating us" in text


def test_a_set_of_inputs_with_a_wrong_result_keeps_no_time(fake):
    first = []

    def operator(x, *, out=None, backend=None):
        first.append(x.ctypes.data)
        result = doubled(x, out=out)
        if x.ctypes.data != first[0]:
            result[0, 0] += 1              # right on the inputs that are checked, wrong on every other copy of them
        return result

    fake(make_kernel(operator=operator))
    outcome, _ = quiet((), "cpu", {"tokens": [512]})
    case, = outcome.document["cases"]
    assert outcome.exit_status == 1 and case["cold"] is case["rotating"] is None
    assert case["checked"]["failure"].startswith("on another set of inputs")


def test_sets_of_inputs_that_do_not_fit_the_memory_cost_no_other_time(fake, monkeypatch):
    def refuses(inputs, device):
        raise MemoryError("too many sets")

    fake(make_kernel())
    monkeypatch.setattr(calls, "duplicate", refuses)
    outcome, text = quiet((), "cpu", {"tokens": [512]})
    case, = outcome.document["cases"]
    assert outcome.exit_status == 0 and case["cold"] and case["hot"] and case["rotating"] is case["input_sets"] is None
    assert case["note"] == "not rotated: MemoryError: too many sets" and case["note"] in text


def test_a_duplicate_lies_elsewhere_and_shares_what_is_not_on_the_device():
    inputs = {"x": np.arange(6.0).reshape(2, 3).T, "pair": (np.ones(2, np.float16), 3), "none": None}
    for device, shared in (("cpu", False), ("cuda:1", True)):
        same = calls.duplicate(inputs, arrays.Device.parse(device))
        assert (same["x"] == inputs["x"]).all() and (same["pair"][0] == 1).all() and same["pair"][1:] == (3,)
        assert np.shares_memory(same["x"], inputs["x"]) is shared
        assert same["x"].dtype == np.float64 and same["pair"][0].dtype == np.float16


def test_inputs_that_fill_the_cache_are_not_rotated(fake):
    fake(make_kernel())
    case, = quiet((), "cpu", {"tokens": [4096]})[0].document["cases"]      # 128 KiB
    assert case["rotating"] is None and case["input_sets"] is None and case["hot"]


@pytest.mark.parametrize("clock, throttled", [(2000.0, False), (1930.0, False), (1400.0, True)])
def test_a_clock_that_falls_is_reported(fake, monkeypatch, clock, throttled):
    fake(make_kernel())
    clocks = iter([2000.0, 1990.0, clock])             # at the start, after the cold samples, after the hot ones
    monkeypatch.setattr(cpu.Cpu, "clock_mhz", lambda self: next(clocks))
    monkeypatch.setattr(cpu.Cpu, "state", lambda self: {"clock_limits": "0x0000000000000004"})
    outcome, text = quiet((), "cpu")
    case, = outcome.document["cases"]
    lowest = min(1990.0, clock)
    assert case["clock"] == {"sm_mhz": lowest, "of_start": lowest / 2000, "throttled": throttled}
    said = "THROTTLED: the clock fell to 1400 MHz, 70 % of that at the start (software power cap)"
    assert (said in text) == throttled
    bench.validate(outcome.document)


def test_reasons_for_a_low_clock():
    assert machine.clock_limits("0x0000000000000000") == machine.clock_limits("[N/A]") == []
    assert machine.clock_limits("0x0000000000000001") == []                # idle is no limit
    assert machine.clock_limits("0x00000000000000a4") == ["software power cap", "software thermal slowdown",
                                                          "hardware power brake"]


def test_the_roofline_is_the_longer_of_launch_and_bytes():
    measured = {"copy": {"gbps": 2000.0}, "read": {"gbps": 3000.0},
                "empty_kernel": {"gbps": None, "cold": {"median_us": 4.0}, "hot": {"median_us": 0.8}}}
    assert yardsticks.launch_floor_us(measured) == 4.0 and yardsticks.reached_gbps(measured) == 3000.0
    assert yardsticks.attainable_us(measured, 3_000_000) == 4.0            # the bytes alone: 1 us
    assert yardsticks.attainable_us(measured, 300_000_000) == pytest.approx(100.0)
    assert yardsticks.attainable_us({}, 1) is None


def test_percent_of_the_roofline(fake):
    fake(make_kernel())
    case, = quiet((), "cpu", {"tokens": [600]})[0].document["cases"]
    assert case["percent_of_attainable"] == pytest.approx(100 * (600 * 1500 / 6e3) / 600)      # 6 GB/s, 600 us


def test_memory_on_the_host_is_the_growth_of_the_resident_set():
    if machine.reset_peak_resident() is None:
        pytest.skip("this system does not tell the peak of the resident set")
    with cpu.Cpu().memory("numpy") as used:
        np.ones(64 << 20, np.uint8)
    assert 60 << 20 <= used["peak"] <= 80 << 20


def test_unknown_memory_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "STATUS", tmp_path / "status")
    with cpu.Cpu().memory("numpy") as used:
        pass
    assert used["peak"] is None


def test_cores_are_written_as_ranges():
    assert machine._ranges([]) == "" and machine._ranges([3]) == "3"
    assert machine._ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert machine.pinning()["cores"]


def test_threads_and_pinning_are_said(fake, monkeypatch):
    fake(make_kernel())
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    outcome, text = quiet((), "cpu")
    assert outcome.document["machine"]["pinning"]["threads"] == {"OMP_PROC_BIND": "close"}
    assert "threads: " in text and "bound by OMP_PROC_BIND=close" in text
    monkeypatch.delenv("OMP_PROC_BIND")
    assert "single threads not pinned" in quiet((), "cpu")[1]


def test_every_case_prints_the_command_that_repeats_it(fake):
    fake(make_kernel())
    outcome, text = quiet((), "cpu", {"tokens": [64, 128]})
    for number, case in enumerate(outcome.document["cases"], 1):
        assert f"{number}  {case['command']}" in text.splitlines()


def test_profile_runs_one_case_once(fake, monkeypatch):
    ran = []

    def operator(x, *, out=None, backend=None):
        ran.append(x.shape[0])
        return doubled(x, out=out)

    fake(make_kernel(operator=operator))
    monkeypatch.setattr(cpu.Cpu, "profiled", lambda self, call: (ran.append("profiled"), call()))
    assert bench.profile(["fake.double"], "cpu", {"tokens": ["1K"]}).startswith("fake.double on cpu, tokens=1024")
    assert ran == [1024, "profiled", 1024]
    with pytest.raises(ValueError, match="--profile: expected one case, got 2"):
        bench.profile(["fake.double"], "cpu", {"tokens": [1, 2]})


# ---- suites ----------------------------------------------------------------------------------------------------------

def test_suites_find_their_kernels_in_the_registry():
    found = {name: [kernel.name for kernel in registry.select() if suite.belongs(kernel)]
             for name, suite in suites.SUITES.items()}
    assert {"attention.decode", "turboquant.decode_attention"} <= set(found["decode"])
    assert "turboquant.encode" in found["encode"] and "attention.merge" not in found["decode"]
    assert found["smoke"] == [kernel.name for kernel in registry.select()]
    for name in found:                     # every axis of a suite is one that its kernels have, as the checks demand
        kernels = [registry.get(kernel) for kernel in found[name]]
        if kernels:
            axes.check(kernels, suites.axes_of(name, kernels, {}))


def test_no_kernel_has_an_axis_of_the_command_lines_own_name():
    """`heads` sets kv_heads and group together; a kernel's own axis of that name could not be chosen."""
    assert [kernel.name for kernel in registry.select() if axes.HEADS in kernel.axes] == []


def test_the_command_line_overrides_a_suite():
    kernels = [registry.get("attention.decode")]
    assert suites.axes_of("decode", kernels, {"tokens": ["8"]}) == {"heads": ("32:8",)}
    assert suites.axes_of("decode", kernels, {"group": ["8"]}) == {"tokens": (4096, 32768, 131072)}
    assert suites.axes_of("encode", kernels, {"heads": ["8:2"]}) == {"tokens": (32768,)}


def test_a_suite_runs_its_kernels_on_its_axes(fake):
    def attend(x, *, return_lse=False, out=None, backend=None):
        return doubled(x, out=out)

    fake(make_kernel())
    fake(make_kernel("fake.attend", operator=attend))
    fake(make_kernel("fake.attend_elsewhere", operator=attend, backends=("reference",)))
    fake(make_kernel("fake.other", backends=("reference",)))
    outcome, _ = quiet((), "cpu", {"tokens": [8]}, suite="decode")
    assert [case["kernel"] for case in outcome.document["cases"]] == ["fake.attend"]
    assert [entry["kernel"] for entry in outcome.document["skipped"]] == ["fake.attend_elsewhere"]
    problem = outcome.document["cases"][0]["problem"]
    assert (problem["kv_heads"], problem["group"], problem["tokens"]) == (8, 4, 8)
    assert outcome.document["command"].startswith("kvbench bench --suite decode --backend cpu")


@pytest.mark.parametrize("suite, words", [("decod", "unknown suite 'decod'; did you mean decode"),
                                          ("select", "has none of fake.double")])
def test_wrong_suites_are_refused(fake, suite, words):
    fake(make_kernel())
    with pytest.raises(ValueError, match=words):
        quiet((), "cpu", suite=suite)


def test_the_overview_names_all_there_is_to_choose(monkeypatch):
    monkeypatch.setattr(baselines, "missing", lambda record: "flashinfer is not installed" if record.library else None)
    text = overview.text()
    for kernel in registry.select():
        assert f"  {kernel.name}  [" in text
    for record in baselines.BASELINES:
        assert f"  {record.name} (" in text and record.summary in text
    assert "missing here: flashinfer is not installed" in text and "heads: query:KV heads" in text
    assert "turboquant.encode" not in overview.text(["attention"])


# ---- calls -----------------------------------------------------------------------------------------------------------

def test_outputs_and_workspace_are_handed_in_again():
    seen = []

    def operator(query, *, return_lse=False, out=None, lse=None, workspace=None, backend=None, stream=None):
        seen.append((out, lse, workspace))
        return (np.zeros(1), np.ones(1)) if out is None else (out, lse)

    operator.__module__ = __name__
    place = types.SimpleNamespace(current=lambda framework: io.StringIO(), framework="numpy", device="cpu")
    call = driver.OperatorCall(operator, "cpu", {"query": 1}, {"batch": 2, "kv_heads": 3, "group": 4}, place)
    first, second = call(), call()
    assert seen[0] == (None, None, ("workspace of", 2, 12, "cpu"))
    assert seen[1][0] is first[0] is second[0] and seen[1][1] is first[1] is second[1]


def test_an_operator_may_have_a_workspace_of_its_own():
    def other(query, *, out=None, workspace=None, backend=None):
        return workspace

    other.__module__ = __name__
    place = types.SimpleNamespace(current=lambda framework: io.StringIO(), framework="numpy", device="cpu")
    assert driver.OperatorCall(other, "cpu", {"query": 1}, {"batch": 2}, place)() == ("of other", 2)


def workspace(batch, q_heads, device, extra=None):
    return "workspace of", batch, q_heads, device


def other_workspace(batch):
    return "of other", batch


# ---- what is chosen --------------------------------------------------------------------------------------------------

def test_simt_is_never_timed(fake):
    fake(make_kernel(backends=("cpu", "simt")))
    with pytest.raises(ValueError, match="simt.*never timed"):
        quiet((), "simt")


@pytest.mark.parametrize("arguments, error, words", [
    ((["fake.doubel"], "cpu"), ValueError, ["fake.doubel", "did you mean fake.double"]),
    (((), "cpuu"), ValueError, ["cpuu", "did you mean cpu"]),
    (((), "cuda"), BackendUnavailable, ["cuda", "not here"]),
    ((["fake.other"], "cpu"), ValueError, ["fake.other", "has no backend 'cpu'", "reference"]),
    (((), "cpu", {"token": [1]}), ValueError, ["unknown axis 'token'", "did you mean tokens"]),
    (((), "cpu", {"tokens": ["many"]}), ValueError, ["axis tokens", "positive integer", "many"]),
    (((), "cpu", {"tokens": ["0"]}), ValueError, ["axis tokens", "positive integer", "0"]),
    (((), "cpu", {"tokens": [""]}), ValueError, ["axis tokens", "positive integer"]),
    (((), "cpu", {"tokens": []}), ValueError, ["tokens", "no value"]),
    (((), "cpu", {"dtype": ["float61"]}), ValueError, ["axis dtype", "float16", "did you mean"]),
    (((), "cpu", {"share": ["0.7"]}), ValueError, ["axis share", "0.85", "0.7"]),
    (((), "cpu", {"heads": ["32"]}), ValueError, ["heads", "32:8"]),
    (((), "cpu", {"heads": ["32:5"]}), ValueError, ["heads", "multiple", "32:5"]),
    (((), "cpu", {"heads": ["32:8"], "group": [1]}), ValueError, ["heads", "leave out group"]),
    (((), "cpu", {}, ["nump"]), ValueError, ["unknown baseline 'nump'", "did you mean numpy"]),
    (((), "cpu", {}, ["flashinfer"]), ValueError, ["flashinfer", "none of fake.double"]),
    (((), "cpu", {}, [], True, "/no/such/folder/r.json"), ValueError, ["existing folder", "/no/such"]),
])
def test_wrong_names_are_refused_before_anything_runs(fake, monkeypatch, arguments, error, words):
    fake(make_kernel())
    fake(make_kernel("fake.other", backends=("reference",)))
    monkeypatch.setattr(driver, "OperatorCall", lambda *_: pytest.fail("something ran"))
    monkeypatch.setattr(yardsticks, "measure", lambda *_: pytest.fail("something ran"))
    with pytest.raises(error) as raised:
        bench.run(*arguments, report=lambda line: None)
    for word in words:
        assert word in str(raised.value)


@given(tokens=st.lists(st.integers(1, 10**6), min_size=1, max_size=4, unique=True),
       heads=st.lists(st.tuples(st.integers(1, 32), st.integers(1, 16)), min_size=1, max_size=3, unique=True))
def test_axes_multiply_out(tokens, heads):
    kernel = make_kernel()
    given_axes = {"tokens": [str(t) for t in tokens], "heads": [f"{kv * group}:{kv}" for kv, group in heads],
                  "share": ["0.5"]}
    axes.check([kernel], given_axes)
    expected = [{**kernel.problem(), "tokens": t, "kv_heads": kv, "group": group, "share": 0.5}
                for t in tokens for kv, group in heads]
    assert axes.problems(kernel, given_axes) == expected


def test_axis_values_in_other_forms():
    kernel = make_kernel()
    assert [p["tokens"] for p in axes.problems(kernel, {"tokens": ["4K", "1m", 7, "7", "7"]})] == [4096, 1 << 20, 7, 7]
    assert axes.problems(kernel, {"unrelated": ["1"]}) == [kernel.problem()]


def test_an_axis_concerns_the_kernels_that_have_it(fake):
    fake(make_kernel())
    fake(make_kernel("fake.plain", axes={"dtype": ("float32",), "tokens": (8,)}))
    outcome, _ = quiet((), "cpu", {"heads": ["4:2", "4:4"]})
    assert [case["kernel"] for case in outcome.document["cases"]] == ["fake.double", "fake.double", "fake.plain"]


def test_kernels_without_the_backend_are_left_out_and_said(fake):
    fake(make_kernel())
    fake(make_kernel("fake.other", backends=("reference",)))
    outcome, text = quiet((), "cpu")
    assert outcome.document["skipped"] == [{"kernel": "fake.other", "reason": "has no backend 'cpu'"}]
    assert "fake.other is left out" in text


def test_progress_is_cleared_before_each_row(fake):
    fake(make_kernel())
    events = []
    bench.run((), "cpu", quick=True, progress=lambda text: events.append(("progress", text)),
              report=lambda text: events.append(("row", text)))
    for before, after in zip(events, events[1:]):
        assert not (after[0] == "row" and before[0] == "progress" and before[1] != "" and "fake" in after[1])
    assert any("fake.double, cold" in text for kind, text in events if kind == "progress")


# ---- baselines -------------------------------------------------------------------------------------------------------

def add_baselines(monkeypatch, **prepared):
    monkeypatch.setattr(baselines, "BASELINES", tuple(
        baselines.Baseline(name, "fake.double", ("cpu",), "numpy", prepare, "") for name, prepare in prepared.items()))


def baseline_of(seconds, factor=2):
    def prepare(inputs):
        def call():
            CLOCK.now += seconds
            return inputs["x"] * np.float32(factor)
        return call
    return prepare


def test_speedup_is_over_the_best_right_baseline(fake, monkeypatch):
    fake(make_kernel())
    add_baselines(monkeypatch, slow=baseline_of(640e-6), good=baseline_of(160e-6), wrong=baseline_of(1e-6, factor=2.2))
    outcome, text = quiet((), "cpu", baselines=["all"])
    case, = outcome.document["cases"]
    assert case["best_baseline"] == "good" and case["speedup"] == pytest.approx(2.5)
    found = {entry["name"]: entry for entry in case["baselines"]}
    assert found["slow"]["cold"]["median_us"] == pytest.approx(640) and found["slow"]["checked"]["agrees"]
    assert found["wrong"]["cold"] is None and "relative RMS error" in found["wrong"]["checked"]["failure"]
    assert outcome.exit_status == 0, "a wrong baseline is no failure of the kernel"
    assert "2.50x the speed of good" in text


def test_a_cache_in_a_smaller_type_is_shown_but_no_yardstick(fake, monkeypatch):
    fake(make_kernel())
    monkeypatch.setattr(baselines, "BASELINES", tuple(
        baselines.Baseline(name, "fake.double", ("cpu",), "numpy", baseline_of(seconds, factor), "", storage=storage)
        for name, seconds, factor, storage in (("exact", 160e-6, 2, None), ("fp8", 16e-6, 2.1, "float8_e4m3fn"))))
    case, = quiet((), "cpu", baselines=["all"])[0].document["cases"]
    assert case["best_baseline"] == "exact" and case["speedup"] == pytest.approx(2.5)
    assert [entry["storage"] for entry in case["baselines"]] == [None, "float8_e4m3fn"]
    assert case["baselines"][1]["cold"]["median_us"] == pytest.approx(16)      # 5 % off, as fp8 may be


def test_a_missing_baseline_is_named_with_the_reason(fake, monkeypatch):
    def missing(inputs):
        raise baselines.Missing("quickattention is not installed")

    def refusing(inputs):
        raise RuntimeError("No available kernel")

    fake(make_kernel())
    add_baselines(monkeypatch, missing=missing, refusing=refusing, good=baseline_of(1e-3))
    outcome, text = quiet((), "cpu", baselines=["missing", "refusing", "good"])
    found = {entry["name"]: entry["missing"] for entry in outcome.document["cases"][0]["baselines"]}
    assert found["good"] is None and found["missing"] == "quickattention is not installed"
    assert "No available kernel" in found["refusing"]
    assert "missing: quickattention is not installed" in text


def test_libraries_of_baselines_are_loaded_before_any_kernel_runs(fake, monkeypatch):
    order = []

    def operator(x, *, out=None, backend=None):
        order.append("kernel")
        return doubled(x, out=out)

    fake(make_kernel(operator=operator))
    add_baselines(monkeypatch, good=baseline_of(1e-3))
    monkeypatch.setattr(baselines, "_import", lambda name: order.append(name))
    quiet((), "cpu", baselines=["good"])
    assert order[0] == "numpy" and "kernel" in order


def test_a_library_that_is_not_installed_is_missing():
    with pytest.raises(baselines.Missing, match="kvbench_no_such_library is not installed"):
        baselines._import("kvbench_no_such_library")


DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("name", ["numpy", "torch"])
@settings(deadline=None)           # the first example loads the library
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 70), kv_heads=st.integers(1, 3), group=st.integers(1, 5),
       batch=st.integers(1, 2), head_dim=st.sampled_from([16, 64]), dtype=st.sampled_from(sorted(DTYPES)))
def test_cpu_baselines_do_the_work_of_decode(name, seed, **problem):
    if name == "torch":
        pytest.importorskip("torch")
    kernel = registry.get("attention.decode")
    problem = kernel.problem() | problem
    inputs = kernel.inputs(problem, np.random.default_rng(seed))
    record, = baselines.of(kernel, "cpu", [name])
    comparison, limit = check.Check(kernel, problem, inputs), baselines.allowed_error(inputs)
    verdict = comparison.closeness(record.prepare(inputs)(), limit)
    assert verdict.agrees, verdict.failure
    wrong_scale = record.prepare(inputs | {"scale": 0.0})()      # uniform weights: the same only with one token
    assert problem["tokens"] < 3 or not comparison.closeness(wrong_scale, limit).agrees


@pytest.mark.parametrize("name", ["numpy", "torch"])
@settings(deadline=None)           # the first example loads the library
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["haar", "hadamard"]), inverse=st.booleans(),
       dtype=st.sampled_from(sorted(DTYPES)))
def test_cpu_baselines_do_the_work_of_rotate(name, seed, inverse, **problem):
    if name == "torch":
        pytest.importorskip("torch")
    kernel = registry.get("rotation.rotate")
    problem = kernel.problem(tokens=5, head_dim=64) | problem
    inputs = kernel.inputs(problem, np.random.default_rng(seed)) | {"inverse": inverse}
    record, = baselines.of(kernel, "cpu", [name])
    comparison, limit = check.Check(kernel, problem, inputs), baselines.allowed_error(inputs)
    assert comparison.closeness(record.prepare(inputs)(), limit).agrees
    assert not comparison.closeness(record.prepare(inputs | {"inverse": not inverse})(), limit).agrees


def test_baselines_of_exact_attention_serve_every_kernel_with_decoded_keys():
    codes, plain = registry.get("turboquant.decode_attention"), registry.get("attention.decode")
    given, record = [], next(record for record in baselines.BASELINES if record.name == "torch-cudnn")
    problem, on_cpu = codes.problem(tokens=64), plain.problem(tokens=64, dtype="float32")
    assert baselines.bytes_moved(record, codes, problem, "cuda") == plain.traffic(plain.problem(tokens=64)).bytes_moved
    assert baselines.bytes_moved(record, codes, problem, "cpu") == plain.traffic(on_cpu).bytes_moved
    assert baselines.bytes_moved(FLASHINFER[2], codes, problem, "cuda") is None        # fp8

    def exact(inputs, dtype):
        given.append(dtype)
        return {"keys": inputs["x"], "values": inputs["x"]}

    kernel = make_kernel(exact=exact)
    assert baselines.of(make_kernel(), "cuda", ["torch-cudnn"]) == []
    assert [record.name for record in baselines.of(kernel, "cuda", ["torch-cudnn", "kvbench-exact"])] \
        == ["torch-cudnn", "kvbench-exact"]
    assert baselines.of(make_kernel("attention.decode"), "cuda", ["kvbench-exact"]) == []
    record, = baselines.of(kernel, "cpu", ["numpy"])
    inputs = {"query": np.ones((1, 2, 4), np.float16), "x": np.ones((1, 1, 3, 4), np.float32), "scale": 0.5}
    on_host = baselines.inputs_of(record, kernel, inputs, "cpu")
    assert on_host["query"].dtype == np.float32 and on_host["scale"] == 0.5 and on_host["lengths"] is None
    assert baselines.inputs_of(record, kernel, inputs, "cuda")["query"] is inputs["query"]
    assert given == ["float32", "float16"]


def test_decoding_for_a_baseline_is_on_the_stream_that_reads_it(fake, monkeypatch):
    """On a GPU the timer's stream is ordered after no other: all work on the inputs of a call must be queued on it."""
    depth, seen = [0], []

    @contextlib.contextmanager
    def current(self, framework):
        depth[0] += 1
        yield
        depth[0] -= 1

    def exact(inputs, dtype):
        seen.append(("decode", depth[0]))
        return {"keys": inputs["x"][None, None], "values": inputs["x"][None, None]}

    def prepare(inputs):
        seen.append(("prepare", depth[0]))
        return lambda: doubled(inputs["keys"][0, 0])

    def attend(x, query, *, out=None, backend=None):
        return doubled(x, out=out)

    fake(make_kernel(operator=attend, reference=lambda x, query: reference_doubled(x), exact=exact, inputs=lambda *_: {
        "x": np.ones((64, 8), np.float32), "query": np.ones((1, 1, 8), np.float32)}))
    monkeypatch.setattr(cpu.Cpu, "current", current)
    monkeypatch.setattr(baselines, "bytes_moved", lambda *_: 100)
    monkeypatch.setattr(baselines, "BASELINES", (
        baselines.Baseline("good", baselines.EXACT, ("cpu",), "numpy", prepare, ""),))
    case, = quiet((), "cpu", baselines=["good"])[0].document["cases"]
    assert case["baselines"][0]["missing"] is None and case["baselines"][0]["checked"]
    assert {name for name, _ in seen} == {"decode", "prepare"} and all(inside for _, inside in seen)


@pytest.mark.parametrize("name", ["numpy", "torch", "kvbench-exact"])
def test_cpu_baselines_do_the_work_of_attention_on_codes(name):
    if name == "torch":
        pytest.importorskip("torch")
    for kernel in registry.select():
        if kernel.exact is None:
            continue
        problem = kernel.problem(tokens=40, kv_heads=2, head_dim=64)
        inputs = kernel.inputs(problem, np.random.default_rng(0))
        record, = baselines.of(kernel, "cpu", [name])
        given = baselines.inputs_of(record, kernel, inputs, "cpu")
        limit = baselines.allowed_error(given)
        verdict = check.Check(kernel, problem, inputs).closeness(record.prepare(given)(), limit)
        assert verdict.agrees, verdict.failure


FLASHINFER = [record for record in baselines.BASELINES if record.library == "flashinfer"]


class FlashInfer(types.SimpleNamespace):
    """FlashInfer's two functions with their own names of arguments, computed by PyTorch on the CPU."""

    @staticmethod
    def attend(query, keys, values, scale):
        import torch

        group = query.shape[0] // keys.shape[0]
        keys, values = (x.float().repeat_interleave(group, 0) for x in (keys, values))
        weights = torch.softmax(torch.einsum("hd,htd->ht", query.float(), keys) * scale, -1)
        return torch.einsum("ht,htd->hd", weights, values).to(query.dtype)

    @classmethod
    def single_decode_with_kv_cache(cls, q, k, v, kv_layout="NHD", use_tensor_cores=False, sm_scale=None):
        assert kv_layout == "HND"
        return cls.attend(q, k, v, sm_scale)

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
            assert kv_layout == "HND" and not float_workspace_buffer.any()

        def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
                 q_data_type=None, kv_data_type=None, sm_scale=None):
            assert (last_page_len == page_size).all()
            self.pages = [indices[start:end].long() for start, end in zip(indptr[:-1], indptr[1:])]
            self.scale, self.dtype, self.shape = sm_scale, kv_data_type, (num_kv_heads, page_size, head_dim)

        def run(self, q, paged_kv_cache):
            import torch

            assert all(part.dtype == self.dtype and part.shape[1:] == self.shape for part in paged_kv_cache)
            rows = [FlashInfer.attend(q[b], *(part.float()[pages].transpose(0, 1).flatten(1, 2)
                                              for part in paged_kv_cache), self.scale)
                    for b, pages in enumerate(self.pages)]
            return torch.stack(rows)




@pytest.mark.parametrize("record", FLASHINFER, ids=lambda record: record.name)
def test_flashinfer_baselines_do_the_work_of_decode(record, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "flashinfer", FlashInfer())
    monkeypatch.setattr(baselines, "WORKSPACE_BYTES", 16)
    kernel = registry.get("attention.decode")
    batch = 2 if "batch" in record.name else 1
    problem = kernel.problem(tokens=48, batch=batch, kv_heads=2, group=3, head_dim=64)
    inputs = kernel.inputs(problem, np.random.default_rng(0))
    verdict = check.Check(kernel, problem, inputs).closeness(record.prepare(inputs)(),
                                                             baselines.allowed_error(inputs, record.storage))
    assert verdict.agrees, verdict.failure
    assert (verdict.error > 0.01) == (record.storage is not None)          # fp8 is fp8
    refused = kernel.problem(tokens=47, batch=3 - batch, kv_heads=2, head_dim=64)
    with pytest.raises(baselines.Missing, match="whole pages of 16|takes batch 1"):
        record.prepare(kernel.inputs(refused, np.random.default_rng(0)))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(baselines.Missing, match="flashinfer is not installed"):
        record.prepare(inputs)
    assert "flashinfer is not installed" in baselines.missing(record)


def test_ragged_lengths_are_beyond_the_baselines():
    kernel = registry.get("attention.decode")
    problem = kernel.problem(tokens=8, batch=2, kv_heads=1)
    inputs = kernel.inputs(problem, np.random.default_rng(0))
    record, = baselines.of(kernel, "cpu", ["numpy"])
    record.prepare(inputs | {"lengths": np.array([8, 8], np.int32)})
    with pytest.raises(baselines.Missing, match="ragged"):
        record.prepare(inputs | {"lengths": np.array([8, 7], np.int32)})


# ---- the check in parts ----------------------------------------------------------------------------------------------

def test_axes_that_can_be_cut_are_observed():
    decode, rotate = registry.get("attention.decode"), registry.get("rotation.rotate")
    found = check.separable(decode, decode.problem(batch=2, kv_heads=4, tokens=100, head_dim=64))
    assert set(found) == {"batch", "kv_heads"}         # neither tokens nor head_dim: the output depends on all of them
    assert found["kv_heads"] == ({".query": 1, ".keys": 1, ".values": 1}, {"[0]": 1, "[1]": 1})
    assert "tokens" in check.separable(rotate, rotate.problem(tokens=64, head_dim=64))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(check, "WHOLE_BYTES", 0)
    monkeypatch.setattr(check, "PART_BYTES", 0)        # every part is one sequence and one KV head


def decode_case():
    kernel = registry.get("attention.decode")
    problem = kernel.problem(batch=2, kv_heads=4, group=2, tokens=40, head_dim=64)
    inputs = kernel.inputs(problem, np.random.default_rng(0))
    output, lse = kernel.reference(**inputs)
    return kernel, problem, inputs, output.astype(np.float16), lse.astype(np.float32)


@pytest.mark.parametrize("head", range(4))
def test_a_fault_in_any_compared_part_is_found(small_parts, head):
    kernel, problem, inputs, output, lse = decode_case()
    comparison = check.Check(kernel, problem, inputs)
    verdict = comparison.agreement((output, lse))
    assert verdict.agrees and verdict.error < 1e-3 and verdict.of == len(verdict.parts) == 8
    output[1, 2 * head + 1, 5] += 0.5
    verdict = comparison.agreement((output, lse))
    assert not verdict.agrees and f"kv_heads {head}:{head + 1} batch 1:2" in verdict.failure


def test_the_parts_that_were_compared_are_said(small_parts):
    kernel, problem, inputs, output, lse = decode_case()
    verdict = check.Check(kernel, problem, inputs, seconds=0).agreement((output, lse))
    assert verdict.parts == ("kv_heads 0:1 batch 0:1", "kv_heads 3:4 batch 1:2") and verdict.of == 8
    output[0, 2:-2] = np.nan                           # in no compared part, and the result does not claim otherwise
    assert check.Check(kernel, problem, inputs, seconds=0).agreement((output, lse)).agrees


def test_a_slow_agreement_is_cut_short_and_says_so(small_parts):
    kernel, problem, inputs, output, lse = decode_case()
    comparison = check.Check(kernel, problem, inputs)
    comparison._seconds = 0                            # the reference was quick, its tolerance is not
    parts = ("kv_heads 0:1 batch 0:1", "kv_heads 3:4 batch 1:2")
    assert comparison.agreement((output, lse)).parts == parts
    assert comparison.closeness(output, 1e-3).parts == parts
    output[0, 0, 0] += 0.5
    assert not comparison.agreement((output, lse)).agrees


def test_a_baseline_that_gives_the_first_output_alone_is_compared_in_parts(small_parts):
    kernel, problem, inputs, output, lse = decode_case()
    comparison = check.Check(kernel, problem, inputs)
    verdict = comparison.closeness(output, 1e-3)
    assert verdict.agrees and len(verdict.parts) == 8, verdict.failure
    output[1, 3, 5] += 0.5
    assert not comparison.closeness(output, 1e-3).agrees


def test_nan_never_passes():
    kernel, problem, inputs, output, lse = decode_case()
    comparison = check.Check(kernel, problem, inputs)
    output[0, 0, 0] = np.nan
    for verdict in (comparison.agreement((output, lse)), comparison.closeness((output, lse), 1e9)):
        assert not verdict.agrees and verdict.error is None


def test_trees_keep_what_is_no_array():
    rotation = registry.get("rotation.rotate").inputs({"batch": 1, "kv_heads": 1, "tokens": 2, "head_dim": 64,
                                                       "dtype": "float32", "kind": "hadamard", "rounds": 3},
                                                      np.random.default_rng(0))["rotation"]
    tree = {"x": np.arange(3), "rotation": rotation, "pair": (1, [np.ones(2)]), "none": None}
    assert set(trees.arrays_of(tree)) == {".x", ".rotation.signs", ".pair[1][0]"}
    same = trees.apply(lambda path, array: array, tree)
    assert same["rotation"] is rotation and same["pair"][0] == 1 and same["none"] is None
    changed = trees.apply(lambda path, array: array * 2, tree)
    assert changed["rotation"] == rotation and (changed["rotation"].signs == 2 * rotation.signs).all()


# ---- the CPU as a place ----------------------------------------------------------------------------------------------

def test_cold_flushes_before_each_sample_and_outside_of_it(monkeypatch):
    clock, log = Clock(), []
    place = cpu.Cpu(clock)

    def flush():
        log.append("flush")
        clock.now += 1.0

    def call():
        log.append("call")
        clock.now += 0.25

    monkeypatch.setattr(place, "flush", flush)
    stopwatch = place.stopwatch(call)
    log.clear()
    assert stopwatch.cold(3) == [0.25] * 3 and log == ["flush", "call"] * 3
    log.clear()
    assert stopwatch.hot(2) == [0.25] * 2 and "flush" not in log


def test_hot_samples_of_a_short_call_are_long_enough():
    clock = Clock()
    calls = []

    def call():
        calls.append(clock.now)
        clock.now += 3e-6

    stopwatch = cpu.Cpu(clock).stopwatch(call)
    assert stopwatch.hot(2) == pytest.approx([3e-6] * 2)
    assert 3e-6 * (len(calls) - 2) / 2 >= cpu.HOT_SECONDS


def test_flush_writes_twice_the_cache(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 16)
    place = cpu.Cpu()
    place.flush()
    assert place._flush_buffer.nbytes == 2 << 16 and (place._flush_buffer == 1).all()


def test_a_flush_that_reads_writes_nothing(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 16)
    place, read = cpu.Cpu(flush="read"), []
    monkeypatch.setattr(cpu.np, "max", lambda part: read.append(part.nbytes))
    place.flush()
    assert sum(read) == 2 << 16 and not place._flush_buffer.any()


def test_host_yardsticks_move_what_they_say(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 16)
    found = yardsticks.measure(cpu.Cpu(), timing.StopRule(0.5, 6, 0.0, 0.2, 0.0))
    assert found["copy"]["bytes_moved"] == 2 * found["read"]["bytes_moved"] == 2 * (4 << 16)
    for name in ("copy", "read"):
        speed = found[name]["bytes_moved"] / found[name]["hot"]["median_us"] / 1e3
        assert found[name]["gbps"] == pytest.approx(speed, rel=1e-3)


def test_a_sleeping_kernel_takes_as_long_as_it_sleeps():
    import time
    stopwatch = cpu.Cpu().stopwatch(lambda: time.sleep(0.003))
    measured = timing.measure(stopwatch.hot, timing.StopRule(0.5, 6, 0.0, 0.5, 0.0))
    assert min(measured.samples) >= 0.003


def test_machine_facts():
    facts = machine.describe()
    assert facts["usable_cores"] >= 1 and facts["cache_bytes"] >= 1 << 16 and facts["processor"]
    assert machine.versions()["numpy"] == np.__version__
    assert set(machine.source()) == {"commit", "dirty"}


def test_an_installed_copy_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    if machine._output("git", "init", "--quiet", str(tmp_path)) is None:
        pytest.skip("git is not installed")
    copied = tmp_path / "machine.py"
    copied.write_text("")
    monkeypatch.delenv("KVBENCH_COMMIT", raising=False)
    monkeypatch.setattr(machine, "__file__", str(copied))
    assert machine.source() == {"commit": None, "dirty": None}
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    machine._output("git", "add", "machine.py", folder=tmp_path)
    machine._output("git", *identity, "commit", "--quiet", "-m", "x", folder=tmp_path)
    assert len(machine.source()["commit"]) == 40 and machine.source()["dirty"] is False
    copied.write_text("changed")
    assert machine.source()["dirty"] is True
    monkeypatch.setenv("KVBENCH_COMMIT", "abc")              # a tree that was sent with an old history
    assert machine.source() == {"commit": "abc", "dirty": None}


# ---- result files ----------------------------------------------------------------------------------------------------

@pytest.fixture
def document(fake, monkeypatch):
    fake(make_kernel("a.right"))
    fake(make_kernel("b.wrong", operator=wrong))
    add_baselines(monkeypatch, good=baseline_of(1e-3))
    monkeypatch.setattr(baselines, "BASELINES", tuple(
        baselines.Baseline("good", name, ("cpu",), "numpy", baseline_of(1e-3), "") for name in ("a.right", "b.wrong")))
    return quiet((), "cpu", baselines=["good"])[0].document


def test_results_survive_the_way_to_disk_and_back(document, tmp_path):
    path = tmp_path / "r.json"
    results.Results(document).write(path)
    loaded = bench.load(path)
    assert loaded.document == document and loaded.exit_status == 1
    text = path.read_text()
    assert max(line.count(",") for line in text.splitlines() if "samples_us" in line) >= 9     # all on one line
    assert os.listdir(tmp_path) == ["r.json"] and path.stat().st_mode & 0o044


def test_both_validators_agree_on_broken_results(document):
    """Each single break is refused by the project's validator and by jsonschema: the schema means what it says."""
    jsonschema = pytest.importorskip("jsonschema")
    judge = jsonschema.Draft202012Validator(bench.SCHEMA)
    jsonschema.Draft202012Validator.check_schema(bench.SCHEMA)
    judge.validate(document)

    def paths(node, path=()):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node[:1]):
            yield (*path, key)
            if isinstance(value, (dict, list)):
                yield from paths(value, (*path, key))

    free = {("machine",), ("versions",), ("cases", 0, "problem"), ("cases", 0, "state"), ("cases", 1, "problem")}
    tried = 0
    for path in paths(document):
        if any(path[:len(start)] == start and len(path) > len(start) for start in free):
            continue
        for change in ("remove", "type", "extra", "negative", "empty"):
            broken = copy.deepcopy(document)
            parent = broken
            for key in path[:-1]:
                parent = parent[key]
            value = parent[path[-1]]
            if change == "remove" and isinstance(parent, dict) and path[0] != "yardsticks" \
                    and path[-1] not in (*results._TIMED_LATER, "storage", "bytes_moved", "flush"):
                del parent[path[-1]]
            elif change == "type":
                parent[path[-1]] = {"an": "object"} if not isinstance(value, dict) else [1]
            elif change == "extra" and isinstance(value, dict) and path not in free and path[0] != "yardsticks":
                value["surprise"] = 1
            elif change == "negative" and isinstance(value, (int, float)) and not isinstance(value, bool):
                parent[path[-1]] = -1
            elif change == "empty" and path[-1] == "samples_us":
                parent[path[-1]] = []
            else:
                continue
            tried += 1
            assert not judge.is_valid(broken), (path, change)
            with pytest.raises(ValueError):
                bench.validate(broken)
    assert tried > 100


@pytest.mark.parametrize("text, words", [
    ("", "not JSON"), ("{", "not JSON"), ("[]", "schema"), ('{"schema": "kvbench.bench/999"}', "kvbench.bench/999"),
    ('{"schema": "kvbench.bench/1"}', "missing")])
def test_broken_files_are_refused(tmp_path, text, words):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        bench.load(path)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        bench.load(tmp_path / "none.json")


def test_a_document_that_is_not_a_result_is_not_written(document, tmp_path):
    document["cases"][0]["gbps"] = math.nan
    with pytest.raises(ValueError, match=r"cases\[0\].gbps"):
        results.Results(document).write(tmp_path / "r.json")
    assert not os.listdir(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(document, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("the old file")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        results.Results(document).write(path)
    assert path.read_text() == "the old file" and os.listdir(tmp_path) == ["r.json"]


def test_ctrl_c_keeps_the_finished_cases(fake, tmp_path):
    def operator(x, *, out=None, backend=None):
        if x.shape[0] == 300:
            raise KeyboardInterrupt
        return doubled(x, out=out)

    fake(make_kernel(operator=operator))
    path = tmp_path / "r.json"
    outcome, text = quiet((), "cpu", {"tokens": [100, 200, 300, 400]}, json_path=path)
    assert outcome.interrupted and outcome.exit_status == 130
    kept = bench.load(path)
    assert [case["problem"]["tokens"] for case in kept.document["cases"]] == [100, 200]
    assert kept.document["complete"] is False and kept.exit_status == 130
    assert "interrupted: 2 of 4 cases" in text


def test_the_file_is_there_after_every_case(fake, tmp_path):
    path, seen = tmp_path / "r.json", []

    def operator(x, *, out=None, backend=None):
        seen.append(len(bench.load(path).document["cases"]) if path.exists() else 0)
        return doubled(x, out=out)

    fake(make_kernel(operator=operator))
    outcome, _ = quiet((), "cpu", {"tokens": [8, 9, 10]}, json_path=path)
    assert sorted(set(seen)) == [0, 1, 2] and bench.load(path).document == outcome.document


RESULTS = Path(__file__).parents[1] / "results"


def test_csv_has_a_line_for_every_contender(document):
    rows = list(csv.DictReader(io.StringIO(tables.as_csv([document, document]))))
    assert [row["contender"] for row in rows] == ["a.right", "good", "b.wrong"] * 2
    right, good, wrong_row = rows[:3]
    assert right["kernel"] == good["kernel"] == "a.right" and right["tokens"] == "64" and right["agrees"] == "True"
    assert float(right["cold_median_us"]) == pytest.approx(64) and float(good["cold_median_us"]) == pytest.approx(1000)
    assert float(right["speedup"]) == pytest.approx(1000 / 64, rel=1e-3) and right["best_baseline"] == "good"
    assert wrong_row["cold_median_us"] == "" and "WRONG" in wrong_row["remarks"]


COMMITTED = [path for path in sorted(RESULTS.glob("*/*.json")) if results.SCHEMA_VERSION in path.read_text()[:200]]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_can_be_read_and_shown(path):
    document = bench.load(path).document
    text = tables.as_markdown(document)
    assert all(case["command"] in text for case in document["cases"])
    assert len(tables.as_csv([document]).splitlines()) == 1 + sum(1 + len(c["baselines"]) for c in document["cases"])


# ---- the GPU stopwatch, on a device of our own making ----------------------------------------------------------------

class FakeGpu:
    """Runs queued work at once, or records it while a capture is on; counts time in a clock of its own."""

    kind, framework = "cuda", "cupy"
    flush_seconds = 1e-4

    def __init__(self, capturable=True):
        self.capturable, self.recording, self.log, self.now = capturable, None, [], 0.0
        self.stream = types.SimpleNamespace(ptr=0, synchronize=lambda: None, begin_capture=self.begin,
                                            end_capture=self.end)
        runtime = types.SimpleNamespace(memsetAsync=lambda pointer, value, size, _: ctypes.memset(pointer, value, size))
        self.cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(
            MemoryPool=lambda: types.SimpleNamespace(malloc=None), using_allocator=lambda malloc: io.StringIO(),
            runtime=runtime))

    def current(self, framework):
        return io.StringIO()           # any context manager

    def queue(self, name, seconds, work=lambda: None):
        def run():
            self.log.append(name)
            self.now += seconds
            work()
        if self.recording is None:
            run()
        else:
            self.recording.append(run)

    def begin(self):
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recording = []

    def end(self):
        work, self.recording = self.recording, None
        return types.SimpleNamespace(upload=lambda stream: None, launch=lambda stream: [run() for run in work])

    def flush(self):
        self.queue("flush", self.flush_seconds)

    def between_events(self, work):
        start = self.now
        work()
        return start, self.now

    def elapsed(self, pairs):
        return [end - start for start, end in pairs]


def device_call(device, seconds=20e-6):
    x, out = np.arange(4.0), np.zeros(4)

    def call():
        device.queue("kernel", seconds, lambda: np.multiply(x, 2, out=out))
        return out
    return call


def test_graph_replays_are_timed_and_the_flush_is_not():
    device = FakeGpu()
    stopwatch = gpu.Stopwatch(device_call(device), device, "cupy", graph=True)
    assert stopwatch.timer == "graph" and stopwatch.note is None
    device.log.clear()
    assert stopwatch.cold(3) == pytest.approx([20e-6] * 3) and device.log == ["flush", "kernel"] * 3
    device.log.clear()
    assert stopwatch.hot(2) == pytest.approx([20e-6] * 2)
    assert "flush" not in device.log and len(device.log) >= 2 * gpu.HOT_SECONDS / 20e-6


def test_several_sets_of_inputs_are_replayed_from_one_graph():
    device = FakeGpu()
    stopwatch = gpu.Stopwatch(calls.Rotating([device_call(device) for _ in range(3)]), device, "cupy", graph=True)
    assert stopwatch.timer == "graph" and stopwatch.hot(2) == pytest.approx([60e-6] * 2)
    stopwatch.poison()
    assert all(np.isnan(result).all() for result in stopwatch.result)
    stopwatch.once()
    assert [result.tolist() for result in stopwatch.result] == [[0, 2, 4, 6]] * 3


def test_what_cannot_be_captured_is_timed_between_events_and_says_so():
    device = FakeGpu(capturable=False)
    stopwatch = gpu.Stopwatch(device_call(device), device, "cupy", graph=True)
    assert stopwatch.timer == "events" and "not permitted when stream is capturing" in stopwatch.note
    device.log.clear()
    assert stopwatch.cold(2) == pytest.approx([20e-6] * 2)
    assert device.log.count("kernel") == 2 + 2         # two of them to see how long the host takes to launch
    assert stopwatch.hot(2) == pytest.approx([20e-6] * 2)


def test_a_replay_writes_the_poisoned_result_again():
    device = FakeGpu()
    stopwatch = gpu.Stopwatch(device_call(device), device, "cupy", graph=True)
    stopwatch.poison()
    assert np.isnan(stopwatch.result).all()
    stopwatch.once()
    assert (stopwatch.result == [0, 2, 4, 6]).all()


def test_a_graph_that_captured_nothing_shows():
    """A call that goes to another stream leaves the graph empty: the time would be wonderful."""
    device, out = FakeGpu(), np.zeros(4)

    def call():
        out[:] = 1
        return out

    stopwatch = gpu.Stopwatch(call, device, "cupy", graph=True)
    stopwatch.poison()
    stopwatch.once()
    assert np.isnan(stopwatch.result).all()


def test_the_clock_is_cycles_over_nanoseconds():
    launched = []
    device = object.__new__(gpu.Gpu)
    device.stream = io.StringIO()          # any context manager
    found = types.SimpleNamespace(get=lambda stream: np.array([2_000_100, 1_010_152]))
    device.cupy = types.SimpleNamespace(zeros=lambda count, dtype: found)
    device.__dict__["_module"] = types.SimpleNamespace(
        get_function=lambda name: lambda grid, block, arguments: launched.append((name, grid, block, *arguments)))
    assert device.clock_mhz() == pytest.approx(1980.0, rel=1e-4)
    assert launched == [("spin", (1,), (1,), gpu.SPIN_CYCLES, found)]


def test_a_profiler_sees_the_call_alone():
    log = []
    device = object.__new__(gpu.Gpu)
    device.stream = types.SimpleNamespace(synchronize=lambda: log.append("wait"))
    device.cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=types.SimpleNamespace(
        profilerStart=lambda: log.append("start"), profilerStop=lambda: log.append("stop"))))
    device.profiled(lambda: log.append("call"))
    assert log == ["wait", "start", "call", "wait", "stop"]


def test_device_memory_is_what_was_allocated_at_most():
    cupy = pytest.importorskip("cupy")
    seen = gpu.allocations(cupy)
    with seen:                             # CuPy takes it for a hook of its own
        pass
    for step, pointer, size in [("malloc", 1, 512), ("malloc", 2, 1024), ("free", 1, 512), ("malloc", 3, 600),
                                ("free", 99, 10**9), ("free", 2, 1024), ("malloc", 4, 512)]:   # 99: from before
        getattr(seen, f"{step}_postprocess")(device_id=0, size=size, mem_size=size, mem_ptr=pointer, pmem_id=0)
    assert seen.peak == 1024 + 600 and seen.in_use == 600 + 512


def test_large_draws_come_from_the_device():
    class OnDevice:
        def __getattr__(self, name):
            return lambda *arguments, **options: ("device", name)

    cupy = types.SimpleNamespace(random=types.SimpleNamespace(default_rng=lambda seed: OnDevice()))
    generator = gpu.DeviceGenerator(cupy, 0)
    large = (4, gpu.ON_DEVICE_ELEMENTS)
    assert generator.standard_normal(large, dtype=np.float32) == ("device", "standard_normal")
    assert generator.integers(0, 5, size=large) == ("device", "integers")
    assert isinstance(generator.standard_normal((4, 4)), np.ndarray) and isinstance(int(generator.integers(2**31)), int)
    assert generator.permutation(5).shape == (5,)      # not in CuPy: NumPy's


def test_yardstick_kernels_compile():
    pytest.importorskip("cupy")
    from cupy.cuda import nvrtc
    program = nvrtc.createProgram(gpu.YARDSTICK_KERNELS, "yardsticks.cu", (), ())
    nvrtc.compileProgram(program, ("-std=c++17", "-arch=sm_80"))


# ---- whole runs ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel", ["rotation.rotate", "attention.decode", "attention.merge"])
def test_a_small_run_on_the_cpu(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(timing, "QUICK", timing.StopRule(0.5, 10, 0.0, 0.5, 0.0))
    sizes = {"parts": [2]} if kernel == "attention.merge" else {"tokens": [96]}
    path = tmp_path / "r.json"
    outcome, text = quiet([kernel], "cpu", sizes | {"batch": [2], "head_dim": [64]}, ["all"], json_path=path)
    assert outcome.exit_status == 0, text
    case, = bench.load(path).document["cases"]
    assert case["cold"]["median_us"] > 0 and case["hot"]["median_us"] > 0 and case["percent_of_copy"] > 0
    assert 0 <= case["error"] < 1e-2 and case["inputs"] == "host"
    names = {entry["name"] for entry in case["baselines"]}
    assert names == ({"numpy", "torch"} if kernel != "attention.merge" else set())
    numpy_time = [entry for entry in case["baselines"] if entry["name"] == "numpy"]
    assert all(entry["checked"]["agrees"] and entry["cold"] for entry in numpy_time)


def test_the_reference_may_be_timed_and_is_labelled(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 20)
    outcome, _ = quiet(["rotation.rotate"], "reference", {"tokens": [8]})
    assert outcome.document["backend"] == outcome.document["cases"][0]["backend"] == "reference"
    assert outcome.exit_status == 0


NO_GPU = pytest.mark.skipif(loaders.availability("cuda") is not None, reason="needs a GPU and CuPy")


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("backend", ["cuda", "native"])
@pytest.mark.parametrize("kernel", ["rotation.rotate", "attention.decode", "attention.merge"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_small_run_on_the_gpu(kernel, backend, dtype, tmp_path):
    if reason := loaders.availability(backend):
        pytest.skip(reason)
    sizes = {} if kernel == "attention.merge" else {"tokens": [4096]}
    outcome, text = quiet([kernel], backend, {"dtype": [dtype]} | sizes, ["all"], json_path=tmp_path / "r.json")
    assert outcome.exit_status == 0, text
    case, = outcome.document["cases"]
    assert case["timer"] == "graph" and case["note"] is None, case["note"]
    if kernel != "attention.merge":
        assert case["inputs"] == "device", case["inputs"]
    ceiling = 1.05 * (outcome.document["machine"]["gpu"]["nominal_gbps"] or 1e5)
    for name in ("copy", "read"):
        assert 0.5 * ceiling < outcome.document["yardsticks"][name]["gbps"] < ceiling or ceiling > 1e5
    assert case["gbps"] < ceiling                      # cold: nothing comes from the L2
    assert outcome.document["yardsticks"]["empty_graph"]["cold"]["median_us"] <= case["cold"]["median_us"]
    for entry in case["baselines"]:
        assert entry["missing"] or entry["checked"]["agrees"], entry["checked"]
        assert entry["missing"] or entry["timer"] == "graph", entry["note"]


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("preset", PRESETS)
def test_a_whole_step_on_the_gpu(preset):
    """In one graph, on tokens that were drawn, and a cache that was filled, on the device."""
    outcome, text = quiet(["cache.decode_step"], "cuda", {"preset": [preset], "tokens": [8192]}, ["all"])
    assert outcome.exit_status == 0, text
    case, = outcome.document["cases"]
    assert (case["timer"], case["note"], case["inputs"]) == ("graph", None, "device"), (case["note"], case["inputs"])
    for entry in case["baselines"]:
        assert entry["missing"] or entry["checked"]["agrees"], entry["checked"]


@pytest.mark.gpu
@NO_GPU
def test_large_gpu_cases_are_checked_in_parts(monkeypatch):
    monkeypatch.setattr(check, "WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(check, "PART_BYTES", 1 << 20)
    outcome, text = quiet(["attention.decode"], "cuda", {"tokens": [4096], "batch": [2]})
    checked = outcome.document["cases"][0]["checked"]
    assert outcome.exit_status == 0, text
    assert checked["of"] == 16 and len(checked["parts"]) >= 2


def test_arrays_of_the_host_are_borrowed_not_copied():
    """poison() relies on it: it must reach the memory that the operator wrote."""
    x = np.zeros(4, np.float32)
    assert arrays.borrow(x, "x").pointer == x.ctypes.data


def test_json_of_a_run_is_plain(document):
    assert json.loads(json.dumps(document, allow_nan=False)) == document
