"""Every registered kernel under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The launches of every kernel on small problems are recorded once and replayed by tests/emulator/replay.cpp, a program
without Python, built with each sanitizer together with all of cuda_src. Planted faults show that the builds find them.
"""
import os
import shutil
import subprocess

import numpy as np
import pytest

import emulator
from kvbench import loaders, registry
from kvbench.bindings import missing

pytestmark = pytest.mark.skipif(missing("_simt") is not None, reason=str(missing("_simt")))

registry.load()
SANITIZERS = sorted(emulator.SANITIZERS)
SCHEDULES = ("0", "1", "2", str(2**63 + 12345))
PROBLEMS = 6
# What an axis of a kernel may be in these small problems, where its own values are too large.
SMALL = {"tokens": (1, 5, 33, 70), "batch": (1, 2), "kv_heads": (1, 2), "parts": (1, 3, 5), "group": (1, 3, 8)}
SEVERAL_PARTS = dict.fromkeys(("rabitq.select_top_p", "rabitq.sparse_attention"), {"tokens": (5, 300)})  # of 256


@pytest.fixture(scope="module")
def programs():
    """{(sanitizer, "kernels" or "faults"): program}"""
    kernels, faults = sorted((emulator.ROOT / "cuda_src").glob("*.cu")), [emulator.HERE / "faults.cu"]
    return {(sanitizer, name): emulator.build_replay(sanitizer, sources)
            for sanitizer in SANITIZERS for name, sources in (("kernels", kernels), ("faults", faults))}


def replay(program, launches, folder, schedules=SCHEDULES):
    path = folder / "launches"
    emulator.write_launches(launches, path)
    # ThreadSanitizer of g++ 12 cannot map its shadow where address randomisation is strong; setarch -R turns it off.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [*prefix, program, path, *schedules],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        env=environment,
    )


def problems(kernel):
    """Small problems that between them take every value of the axes that are not sizes."""
    rng = np.random.default_rng(0)
    axes = {axis: SMALL.get(axis, values) for axis, values in kernel.axes.items()} | SEVERAL_PARTS.get(kernel.name, {})
    longest = max(PROBLEMS, *map(len, axes.values()))
    columns = {axis: rng.permutation([i % len(values) for i in range(longest)]) for axis, values in axes.items()}
    return [{axis: axes[axis][columns[axis][i]] for axis in axes} for i in range(longest)]


@pytest.fixture(scope="module")
def recorded():
    """{kernel name: launches}"""
    launches = {}
    for kernel in registry.KERNELS.values():
        if "simt" not in kernel.backends:
            continue
        with loaders.record() as launches[kernel.name]:
            for i, problem in enumerate(problems(kernel)):
                kernel.operator(**kernel.inputs(kernel.problem(**problem), np.random.default_rng(i)), backend="simt")
    return launches


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", [kernel.name for kernel in registry.KERNELS.values() if "simt" in kernel.backends])
def test_kernels_are_clean(programs, recorded, tmp_path, sanitizer, name):
    assert recorded[name], "no launch of this kernel was recorded"
    done = replay(programs[sanitizer, "kernels"], recorded[name], tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    assert done.stdout == f"{len(recorded[name])} launches, {len(SCHEDULES)} schedules each\n"


# ---- the tests can fail ----------------------------------------------------------------------------------------------


def array(size, dtype=np.int32, readonly=False):
    return np.arange(size).astype(dtype).view(np.uint8), readonly


def launch(kernel, threads, *arguments, blocks=1, shared=0, cooperative=False):
    arguments = [a if isinstance(a, tuple) or a is None else a.tobytes() for a in arguments]
    return {"kernel": f"kvb::{kernel}", "grid": (blocks, 1, 1), "block": (threads, 1, 1), "shared_bytes": shared,
            "cooperative": cooperative, "args": arguments}


def share(wait):
    return launch(f"share_kernel<{wait}>", 64, array(5), array(5), (np.zeros(4, np.uint8), False), array(5 * 64),
                  i32(0), blocks=5, cooperative=True)


i32, i64 = np.int32, np.int64
RACES = {
    "rotate_kernel": launch("rotate_kernel<false>", 128, array(128), array(128)),
    "rotate_warp_kernel": launch("rotate_warp_kernel<false>", 32, array(32), array(32)),
    "shuffle_is_no_fence_kernel": launch("shuffle_is_no_fence_kernel", 32, array(32)),
    "global_race_kernel": launch("global_race_kernel", 32, array(33)),
    "copy_for_neighbour_kernel": launch("copy_for_neighbour_kernel<false>", 64, array(256), array(256)),
    "share_kernel": share("false"),
}
OVERRUNS = {
    "read after a global array": launch(
        "global_access_kernel<int>", 32, array(33), array(33), i64(33), i32(0), blocks=2
    ),
    "read before a global array": launch(
        "global_access_kernel<int>", 32, array(33), array(33), i64(-1), i32(0), blocks=2
    ),
    "write after a global array": launch(
        "global_access_kernel<int>", 32, array(33), array(33), i64(33), i32(1), blocks=2
    ),
    "write to a read-only array": launch(
        "global_access_kernel<int>", 32, array(33), array(33, readonly=True), i64(3), i32(1), blocks=2
    ),
    "read after a shared array": launch(
        "shared_access_kernel", 32, array(32), i32(32), i32(0), i32(0), blocks=2, shared=128
    ),
    "read before a shared array": launch(
        "shared_access_kernel", 32, array(32), i32(-1), i32(0), i32(0), blocks=2, shared=128
    ),
    "read after dynamic shared memory": launch(
        "shared_access_kernel", 32, array(32), i32(33), i32(0), i32(1), blocks=2, shared=132
    ),
    "write after dynamic shared memory": launch(
        "shared_access_kernel", 32, array(32), i32(33), i32(1), i32(1), blocks=2, shared=132
    ),
    "division by zero": launch("divide_kernel", 32, array(32), i32(0)),
}
CLEAN = {
    "barrier": launch("rotate_kernel<true>", 128, array(128), array(128)),
    "warp barrier": launch("rotate_warp_kernel<true>", 32, array(32), array(32)),
    "wait and barrier": launch("copy_for_neighbour_kernel<true>", 64, array(256), array(256)),
    "wait for other blocks": share("true"),
    "last elements": launch("shared_access_kernel", 32, array(32), i32(31), i32(1), i32(0), blocks=2, shared=128),
}


@pytest.mark.parametrize("name", sorted(RACES))
@pytest.mark.parametrize("schedule", ["0", "7"])
def test_races_are_reported(programs, tmp_path, name, schedule):
    done = replay(programs["thread", "faults"], [RACES[name]], tmp_path, [schedule])
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr and "faults.cu" in done.stderr and name in done.stderr


@pytest.mark.parametrize("name", sorted(OVERRUNS))
def test_overruns_are_reported(programs, tmp_path, name):
    done = replay(programs["address", "faults"], [OVERRUNS[name]], tmp_path, ["0"])
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr or "runtime error" in done.stderr
    assert "faults.cu:" in done.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_same_kernels_without_their_faults_are_clean(programs, tmp_path, sanitizer):
    done = replay(programs[sanitizer, "faults"], list(CLEAN.values()), tmp_path)
    assert done.returncode == 0, done.stderr[:6000]


def test_a_fault_found_by_the_emulator_fails_the_replay(programs, tmp_path):
    done = replay(programs["thread", "faults"], [launch("two_barriers_kernel", 64, array(64))], tmp_path)
    assert done.returncode == 1 and "while other threads wait at the barrier of line" in done.stderr


def test_a_truncated_file_is_refused(programs, tmp_path):
    path = tmp_path / "launches"
    emulator.write_launches([CLEAN["barrier"]], path)
    path.write_bytes(path.read_bytes()[:-1])
    done = subprocess.run([programs["address", "faults"], path, "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "ends in the middle of a launch" in done.stderr
