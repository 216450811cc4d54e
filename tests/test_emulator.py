"""The emulator of cuda_src: planted faults are found, and every intrinsic agrees with a definition of its own.

Kernels: tests/emulator/faults.cu and intrinsics.cu. On a machine with a GPU the intrinsics, and blocks that wait
for each other, also run there, so that the definitions (of the tensor-core fragments above all) are compared with the
hardware.
"""
import functools
import itertools
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

import emulator
from kvbench import bindings
from kvbench.bindings import toolchain

seeds = st.integers(0, 2**32 - 1)
schedules = st.integers(1, 2**64 - 1)
masks = st.integers(1, 2**32 - 1)
i32, u32, i64, u64, f32 = np.int32, np.uint32, np.int64, np.uint64, np.float32
bf16 = ml_dtypes.bfloat16
FULL = u32(0xFFFFFFFF)


@pytest.fixture(scope="module")
def faulty():
    return emulator.Emulator("faults.cu")


BACKENDS = ["simt", pytest.param("cuda", marks=pytest.mark.gpu)]


def load(backend, source, *kernels):
    if backend == "simt":
        return emulator.Emulator(source)
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("no GPU")
    return emulator.Gpu(source, *kernels)


@pytest.fixture(scope="module", params=BACKENDS)
def run(request):
    return load(request.param, "intrinsics.cu")


@pytest.fixture(scope="module", params=BACKENDS)
def run_cooperatively(request):
    return functools.partial(load(request.param, "faults.cu", "share_kernel<true>", "tell_kernel"), cooperative=True)


def test_the_emulator_is_built():
    """Skipped tests would hide a module that failed to compile, so its absence is a failure wherever g++ is."""
    try:
        toolchain.find_cxx(), toolchain.find_cuda_headers()
    except toolchain.Missing as reason:
        pytest.skip(str(reason))
    assert bindings.missing("_simt") is None


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_wrappers_compile_for_gpus(architecture):
    """Every wrapper and intrinsic of the emulator means something to a GPU, too; no GPU is needed to see that."""
    pytest.importorskip("cupy")
    cubin, lowered = emulator.compile_cubin("intrinsics.cu", architecture)
    assert len(lowered) > 70 and all(name.encode() in cubin for name in lowered.values())


# ---- faults: order of threads ----------------------------------------------------------------------------------------

def rotated(faulty, kernel, seed, threads):
    x, out = np.arange(1000, 1000 + threads, dtype=i32), np.zeros(threads, i32)
    faulty(kernel, 1, threads, x, out, seed=seed)
    return (out != np.roll(x, 1)).sum()


@pytest.mark.parametrize("kernel, threads", [("rotate_kernel", 128), ("rotate_warp_kernel", 32)])
def test_a_missing_barrier_changes_the_result(faulty, kernel, threads):
    assert all(rotated(faulty, f"{kernel}<true>", seed, threads) == 0 for seed in range(30))
    assert all(rotated(faulty, f"{kernel}<false>", seed, threads) > 0 for seed in range(30))


def test_a_schedule_replays_exactly_and_another_differs(faulty):
    def wrong(seed):
        x, out = np.arange(128, dtype=i32), np.zeros(128, i32)
        faulty("rotate_kernel<false>", 1, 128, x, out, seed=seed)
        return out.tobytes()

    assert len({wrong(seed) for seed in range(20)}) == 20
    assert all(wrong(seed) == wrong(seed) for seed in range(20))


def test_blocks_run_in_another_order_under_another_schedule(faulty):
    def order(seed, blocks=20):
        out = np.zeros(blocks, i32)
        faulty("block_order_kernel", blocks, 32, np.zeros(1, i32), out, seed=seed)
        assert sorted(out) == list(range(blocks))
        return tuple(out)

    assert order(0) == tuple(range(20))
    drawn = {order(seed) for seed in range(1, 60)}
    assert len(drawn) > 10
    assert {(blocks[1] - blocks[0]) % 20 for blocks in drawn} == {1, 19}, "forwards and backwards"


@pytest.mark.parametrize("barrier", ["__syncthreads", "shuffle"])
def test_divergent_barriers(faulty, barrier):
    kernel, message = {
        "__syncthreads": (
            "two_barriers_kernel",
            r"block \(0,0,0\) thread \((3[2-9]|[4-6]\d),0,0\): __syncthreads at line "
            r"(\d+) while other threads wait at the barrier of line (?!\2)\d+",
        ),
        "shuffle": (
            "stuck_kernel",
            r"block \(0,0,0\): deadlock: threads wait from thread \(0,0,0\) in __shfl_sync at line \d+, "
            r"from thread \(1,0,0\) in __syncthreads at line \d+",
        ),
    }[barrier]
    with pytest.raises(RuntimeError, match=f"kvb::{kernel}: {message}"):
        faulty(kernel, 1, 64 if "two" in kernel else 32, np.zeros(64, i32))


@pytest.mark.parametrize("commit, wait, pending, complete", [(True, True, 0, True), (True, True, 1, False),
                                                             (True, False, 0, False), (False, True, 0, False)])
def test_asynchronous_copies_land_when_waited_for(faulty, commit, wait, pending, complete):
    x = np.random.default_rng(0).normal(size=512).astype(f32)
    name = f"copy_kernel<{str(commit).lower()}, {str(wait).lower()}, {pending}>"
    for seed in range(10):
        out = np.zeros_like(x)
        faulty(name, 1, 64, x, out, seed=seed)
        assert np.array_equal(out, x) == complete
        missing = np.isnan(out)   # the poison of shared memory
        np.testing.assert_array_equal(out[~missing], x[~missing])
        if pending == 1:
            assert not missing[:256].any(), "the older group has landed"


def test_a_wait_covers_a_threads_own_copies_only(faulty):
    x = np.arange(256, dtype=i32)
    results = {}
    for barrier, seed in itertools.product((True, False), range(10)):
        out = np.zeros_like(x)
        faulty(f"copy_for_neighbour_kernel<{str(barrier).lower()}>", 1, 64, x, out, seed=seed)
        results[barrier, seed] = np.array_equal(out, np.roll(x, -4))
    assert all(right == barrier for (barrier, _), right in results.items())


# ---- faults: warp collectives ----------------------------------------------------------------------------------------

def test_a_shuffle_from_a_lane_that_has_left(faulty):
    with pytest.raises(
        RuntimeError,
        match=r"early_exit_kernel: block \(0,0,0\) thread \(1,0,0\): __shfl_sync at line \d+: "
        r"lane 1 reads lane 0, which is not in the mask or has exited",
    ):
        faulty("early_exit_kernel", 1, 32, np.zeros(32, i32))


def test_a_shuffle_from_a_lane_outside_the_mask(faulty):
    with pytest.raises(RuntimeError, match="lane 0 reads lane 9, which is not in the mask"):
        faulty("shuffle_members_kernel", 1, 32, np.zeros(32, i32), u32(0xFF), u32(0xFF), i32(9))


def test_a_lane_outside_its_own_mask(faulty):
    with pytest.raises(
        RuntimeError, match=r"thread \(8,0,0\): __shfl_sync at line \d+: mask 000000ff lacks the calling lane"
    ):
        faulty("shuffle_members_kernel", 1, 32, np.zeros(32, i32), u32(0x1FF), u32(0xFF), i32(0))


def test_a_mask_that_names_lanes_which_do_not_come(faulty):
    out = np.zeros(32, i32)
    faulty(
        "shuffle_members_kernel", 1, 32, out, u32(0xFF), FULL, i32(3)
    )  # they have exited: only their values are missing
    assert (out[:8] == 3).all()
    with pytest.raises(RuntimeError, match="deadlock: .* in __shfl_sync .* in __ballot_sync"):
        faulty("two_collectives_kernel", 1, 32, out)


def test_an_mma_needs_the_whole_warp(faulty):
    with pytest.raises(RuntimeError, match=r"mma_m16n8k16 at line \d+ needs all 32 lanes, has 0000ffff"):
        faulty("half_a_warp_mma_kernel", 1, 32, np.zeros(32, f32))


# ---- faults: bounds of global memory ---------------------------------------------------------------------------------

PLACE = r"block \(1,0,0\) thread \(5,0,0\): "
elements = st.integers(1, 3000)


@given(
    size=st.integers(1, 750).map(lambda n: 4 * n),
    distance=st.integers(0, 2**20),
    after=st.booleans(),
    write=st.booleans(),
    seed=schedules,
)
def test_an_access_outside_an_array_is_found_where_it_happens(faulty, size, distance, after, write, seed):
    """The first element past the end faults. Before the start lies the rest of a page, which only writes show."""
    x, out = np.zeros(size, i32), np.zeros(size, i32)
    index = size + distance if after else -1 - distance
    near = -4096 <= 4 * index < 0
    assume(write or not near)
    with pytest.raises(RuntimeError) as caught:
        faulty("global_access_kernel<int>", 2, 32, x, out, i64(index), i32(write), seed=seed)
    place = f"byte {4 * index} of " + (
        rf"argument 1 \({4 * size} bytes\)" if write else rf"argument 0 \({4 * size} bytes, read-only\)"
    )
    at_once = PLACE + ("write to " if write else "read of ") + place
    at_block_end = r"block \(1,0,0\): wrote to " + place
    assert re.fullmatch(
        f"kvb::global_access_kernel<int>: ({at_once}{'|' + at_block_end if near else ''})", str(caught.value)
    )
    assert not x.any() and not out.any()


@given(size=st.integers(1, 100), offset=st.integers(0, 15), excess=st.integers(0, 40))
def test_single_bytes_past_the_end(faulty, size, offset, excess):
    """Where an array does not end on a multiple of 16 bytes, writes to the gap are found when the block ends."""
    out = np.zeros(200, np.uint8)[offset:offset + size]
    with pytest.raises(RuntimeError, match=rf"block \(1,0,0\).*: (write|wrote) to byte {size + excess} of argument 1 "):
        faulty("global_access_kernel<unsigned char>", 2, 32, np.zeros(1, np.uint8), out, i64(size + excess), i32(1))
    faulty("global_access_kernel<unsigned char>", 2, 32, np.zeros(1, np.uint8), out, i64(size - 1), i32(1))
    assert out[-1] == 1


def test_a_write_to_a_read_only_array(faulty):
    out = np.zeros(64, i32)
    out.flags.writeable = False
    with pytest.raises(RuntimeError, match=PLACE + r"write to byte 12 of argument 1 \(256 bytes, read-only\)"):
        faulty("global_access_kernel<int>", 2, 32, out.copy(), out, i64(3), i32(1))


def test_what_the_kernel_declares_const_is_left_alone(faulty, tmp_path):
    """It may lie in memory that cannot be written at all."""
    np.arange(64, dtype=i32).tofile(tmp_path / "x")
    x, out = np.memmap(tmp_path / "x", i32, "r"), np.zeros(64, i32)
    faulty("global_access_kernel<int>", 2, 32, x, out, i64(7), i32(0))
    assert out[0] == 7


def test_null_and_wild_pointers(faulty):
    out = np.zeros(64, i32)
    with pytest.raises(RuntimeError, match=PLACE + "read of address 0xc: null pointer"):
        faulty("global_access_kernel<int>", 2, 32, None, out, i64(3), i32(0))
    with pytest.raises(
        RuntimeError, match=PLACE + "(read of address 0x[0-9a-f]+, which belongs to no argument|.*cannot exist)"
    ):
        faulty("global_access_kernel<int>", 2, 32, None, out, i64(2**44), i32(0))
    with pytest.raises(RuntimeError, match=PLACE + ".*address that cannot exist"):
        faulty("global_access_kernel<int>", 2, 32, None, out, i64(2**60), i32(0))


def test_arrays_that_overlap_share_memory(faulty):
    """As on the GPU: what is written through one argument is read through the other."""
    memory = np.arange(100, dtype=i32)
    faulty("rotate_kernel<true>", 1, 64 + 64, np.zeros(128, i32), np.zeros(128, i32))
    x, out = memory[:60], memory[40:]
    faulty("global_access_kernel<int>", 2, 32, x, out, i64(50), i32(0))
    assert memory[40] == 50   # out[0] is x[40]
    with pytest.raises(RuntimeError, match=PLACE + r"read of byte 400 of argument 0/1 \(400 bytes\)"):
        faulty("global_access_kernel<int>", 2, 32, x, out, i64(100), i32(0))


@given(offset=st.integers(0, 15), size=st.integers(0, 50))
def test_arrays_keep_their_misalignment(faulty, offset, size):
    """So an access that needs 16-byte alignment behaves as it would on the caller's own addresses."""
    memory = np.zeros(400, np.uint8)
    memory = memory[-memory.ctypes.data % 16:][:300]
    words = memory[4 * offset:4 * offset + 4 * max(size, 32)].view(u32)
    if 4 * (offset + 1) % 16 == 0:
        faulty("bad_address_kernel", 1, 32, words, i32(5))
    else:
        with pytest.raises(RuntimeError, match=r"load_once at line \d+: 0x[0-9a-f]+ is not 16-byte aligned"):
            faulty("bad_address_kernel", 1, 32, words, i32(5))


@pytest.mark.parametrize("which, message", [
    (0, "cp_async_16 at line .* not 16-byte aligned"), (1, "cp_async_16 at line .* not 16-byte aligned"),
    (2, "cp_async_16 at line .* is not shared memory"), (3, "ldmatrix_x4 at line .* not 16-byte aligned"),
    (4, "ldmatrix_x4 at line .* is not shared memory"), (6, "store_once at line .* not 8-byte aligned"),
    (7, "store_once at line .* is shared memory, global expected"),
    (8, "prefetch_l2 at line .* is shared memory, global expected"), (9, "cp_async_16_once at line .* not a policy")])
def test_addresses_that_ptx_refuses(faulty, which, message):
    memory = np.zeros(80, u32)
    words = memory[-memory.ctypes.data // 4 % 4:][:64]
    with pytest.raises(RuntimeError, match=r"bad_address_kernel: block \(0,0,0\) thread \(\d+,0,0\): " + message):
        faulty("bad_address_kernel", 1, 32, words, i32(which))


# ---- faults: shared memory, stack, arithmetic ------------------------------------------------------------------------


@given(distance=st.integers(0, 2000), after=st.booleans(), write=st.booleans(), dynamic=st.booleans())
def test_an_access_outside_a_shared_array(faulty, distance, after, write, dynamic):
    size = 40 if dynamic else 32   # words
    index = size + distance if after else -1 - distance
    assume(after or write)         # before the start lies the rest of a page, which only writes show
    name = "dynamic shared memory" if dynamic else "tile"
    with pytest.raises(
        RuntimeError,
        match=rf"shared_access_kernel: block \(1,0,0\)( thread \(5,0,0\))?: (read of|write to|wrote to) "
        rf"byte {4 * index} of {name} \({4 * size} bytes of shared memory\)",
    ):
        faulty("shared_access_kernel", 2, 32, np.zeros(32, i32), i32(index), i32(write), i32(dynamic), shared=160)


def test_shared_memory_limits(faulty):
    out = np.zeros(32, i32)
    faulty("static_shared_kernel<49152>", 1, 32, out, shared=(227 - 48) * 1024)
    assert (out == 1).all()
    with pytest.raises(
        RuntimeError, match="static_shared_kernel<49153>.*shared memory exhausted by block: 49153 bytes static"
    ):
        faulty("static_shared_kernel<49153>", 1, 32, out)
    with pytest.raises(RuntimeError, match="shared memory exhausted by block: 49152 bytes static .*, 183297 dynamic"):
        faulty("static_shared_kernel<49152>", 1, 32, out, shared=(227 - 48) * 1024 + 1)
    with pytest.raises(RuntimeError, match="shared memory exhausted: 232449 bytes dynamic"):
        faulty("static_shared_kernel<49152>", 1, 32, out, shared=227 * 1024 + 1)


@pytest.mark.parametrize("scalar, numpy_type", [("float", f32), ("double", np.float64), ("__half", np.float16),
                                                ("__nv_bfloat16", bf16), ("int", i32)])
def test_shared_memory_starts_poisoned_in_every_block(faulty, scalar, numpy_type):
    out = np.zeros(4 * 32 * 2, numpy_type)
    faulty(f"unwritten_shared_kernel<{scalar}>", 4, 32, out, shared=32 * out.itemsize)
    assert (out == -1).all() if scalar == "int" else np.isnan(out.astype(np.float64)).all()


def test_a_stack_overrun(faulty):
    out = np.zeros(32, i32)
    faulty("big_frame_kernel<32768>", 1, 32, out)
    for size in (80000, 500000):  # the second is larger than the guard page below the stack
        with pytest.raises(
            RuntimeError, match=rf"big_frame_kernel<{size}>: block \(0,0,0\) thread \(0,0,0\): overran its stack"
        ):
            faulty(f"big_frame_kernel<{size}>", 1, 32, out)


def test_a_division_by_zero(faulty):
    with pytest.raises(
        RuntimeError, match=r"divide_kernel: block \(0,0,0\) thread \(0,0,0\): integer division by zero"
    ):
        faulty("divide_kernel", 1, 32, np.zeros(32, i32), i32(0))


# ---- faults: the launch itself ---------------------------------------------------------------------------------------


def test_launches_that_cuda_refuses(faulty):
    x = np.zeros(128, i32)
    for grid, block in [
        ((0,), 32),
        (1, 0),
        (1, 1025),
        (1, (32, 33)),
        (1, (1, 1, 65)),
        ((1, 65536), 32),
        ((2**31,), 32),
    ]:
        with pytest.raises(RuntimeError, match="rotate_kernel<true>: a (block|grid) has"):
            faulty("rotate_kernel<true>", grid, block, x, x)


def test_kernels_and_arguments_are_checked(faulty):
    x = np.zeros(128, i32)
    launch, span = faulty.module.launch, (x.ctypes.data, x.nbytes, False)
    with pytest.raises(ValueError, match="no kernel kvb::absent_kernel"):
        faulty("absent_kernel", 1, 32)
    with pytest.raises(ValueError, match="rotate_kernel<true>: expected 2 arguments, got 1"):
        faulty("rotate_kernel<true>", 1, 128, x)
    with pytest.raises(
        ValueError, match="divide_kernel: argument 1: expected a scalar of 4 bytes, got a scalar of 8 bytes"
    ):
        faulty("divide_kernel", 1, 32, x, i64(1))
    with pytest.raises(ValueError, match="argument 0: expected a pointer, got a scalar of 4 bytes"):
        faulty("divide_kernel", 1, 32, i32(1), i32(1))
    with pytest.raises(ValueError, match="argument 1: expected the bytes of a scalar"):
        faulty("divide_kernel", 1, 32, x, x)
    with pytest.raises(ValueError, match=r"argument 0: expected \(address, nbytes, readonly\) or None"):
        launch("kvb::rotate_kernel<true>", (1, 1, 1), (128, 1, 1), [x.ctypes.data, span])


def test_names_are_compared_without_spaces(faulty):
    names = dict(faulty.module.kernels())
    assert names["kvb::copy_kernel<true, true, 0>"] == 32
    assert "kvb::global_access_kernel<unsigned char>" in names
    x = np.zeros(512, f32)
    for spelling in ("copy_kernel<true,true,0>", " copy_kernel < true , true,  0 > "):
        faulty(spelling, 1, 64, x, x.copy())


def test_a_fault_leaves_the_emulator_usable(faulty):
    for _ in range(3):
        with pytest.raises(RuntimeError, match="read of byte 512"):
            faulty("global_access_kernel<int>", 2, 32, np.zeros(128, i32), np.zeros(1, i32), i64(128), i32(0))
        assert rotated(faulty, "rotate_kernel<true>", 5, 128) == 0


def test_faults_outside_kernels_are_left_to_the_process():
    """After a launch that failed, a genuine fault of the process still ends it."""
    script = textwrap.dedent("""
        import ctypes, sys
        import numpy as np
        import emulator
        run = emulator.Emulator("faults.cu")
        try:
            x = np.zeros(4, np.int32)
            run("global_access_kernel<int>", 2, 32, x, x.copy(), np.int64(4), np.int32(0))
        except RuntimeError:
            ctypes.string_at(0)
    """)
    done = subprocess.run([sys.executable, "-c", script], cwd=emulator.HERE.parent, timeout=60)
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("line, message", [
    ("__shared__ int s[32];", "use_the_macro_KVB_SHARED"), ("out[0] = __activemask();", "__activemask"),
    ("out[0] = __shfl(1, 2);", "__shfl"), ("out[0] = __nanosleep(5);", "__nanosleep"),
    ("KVB_SHARED(float, s, [8]); s[0] = out; ", "float")])
def test_what_has_no_meaning_here_does_not_compile(tmp_path, line, message):
    source = tmp_path / "kernel.cu"
    source.write_text(f'#include "kvb/device.cuh"\n__global__ void kernel(int* out) {{ {line} }}\n')
    with pytest.raises(toolchain.CompileError, match=message):
        toolchain.compile_all([toolchain.emulation_step(source, [emulator.INCLUDE], ("-fsyntax-only",))], [], tmp_path)


# ---- the grid and its barriers ---------------------------------------------------------------------------------------


@given(grid=st.tuples(*[st.integers(1, 4)] * 3), block=st.tuples(*[st.integers(1, 9)] * 3), seed=schedules)
def test_every_thread_of_the_grid_runs_once_at_its_place(run, grid, block, seed):
    total = int(np.prod(grid) * np.prod(block))
    out, visits = np.zeros((total, 6), i32), np.zeros(total, i32)
    run("positions_kernel", grid, block, out, visits, seed=seed)
    assert (visits == 1).all()
    expected = itertools.product(*(range(n) for n in (*grid[::-1], *block[::-1])))
    np.testing.assert_array_equal(out, [(bx, by, bz, tx, ty, tz) for bz, by, bx, tz, ty, tx in expected])


@given(blocks=st.integers(1, 40), seed=schedules)
def test_the_last_block_sees_what_the_others_left(run, blocks, seed):
    partial, counter, total = np.zeros(blocks, i32), np.zeros(1, i32), np.zeros(1, i32)
    run("last_block_kernel", blocks, 32, partial, counter, total, seed=seed)
    assert total[0] == blocks * (blocks + 1) // 2


@given(threads=st.integers(1, 1024), density=st.sampled_from((0, 0.01, 0.5, 1)), data=seeds, seed=schedules)
def test_barrier_votes(run, threads, density, data, seed):
    predicate = (np.random.default_rng(data).random(threads) < density).astype(i32) * i32(-8)
    out = np.zeros((threads, 3), i32)
    run("votes_kernel", 1, threads, predicate, out, seed=seed)
    assert (out == [np.count_nonzero(predicate), predicate.any(), predicate.all()]).all()


@given(threads=st.integers(1, 1024), share=st.floats(0, 1), seed=schedules)
def test_threads_that_have_left_do_not_hold_up_a_barrier(run, threads, share, seed):
    stay = max(1, int(share * threads))
    out = np.full(threads, -1, i32)
    run("barrier_after_exit_kernel", 1, threads, out, i32(stay), seed=seed)
    assert (out[:stay] == stay * (stay - 1) // 2).all() and (out[stay:] == -1).all()


# ---- warp collectives ------------------------------------------------------------------------------------------------


def shuffle_source(kind, lane, argument, width):
    """PTX ISA, shfl.sync: segments of `width` lanes; a source outside the own segment means the own value."""
    first = lane // width * width
    source = {"idx": first + argument % width, "up": lane - argument, "down": lane + argument, "xor": lane ^ argument}[
        kind
    ]
    if kind == "up":
        return source if source >= first else lane
    return source if source < first + width else lane


@pytest.mark.parametrize("scalar, numpy_type", [("int", i32), ("float", f32), ("double", np.float64),
                                                ("unsigned long long", u64)])
@given(
    kind=st.sampled_from(("idx", "up", "down", "xor")),
    argument=st.integers(0, 31),
    width=st.sampled_from((1, 2, 4, 8, 16, 32)),
    mask=st.just(2**32 - 1) | masks,
    seed=schedules,
)
def test_shuffles(run, scalar, numpy_type, kind, argument, width, mask, seed):
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    source = {lane: shuffle_source(kind, lane, argument, width) for lane in lanes}
    assume(set(source.values()) <= set(lanes))   # others are undefined in CUDA, and errors here
    x = np.random.default_rng(seed % 2**32).integers(0, 2**30, 32).astype(numpy_type) * numpy_type(3)
    out = np.zeros(32, numpy_type)
    expected = out.copy()
    expected[lanes] = x[[source[lane] for lane in lanes]]
    number = ("idx", "up", "down", "xor").index(kind)
    run(f"shuffle_kernel<{scalar}>", 1, 32, x, out, u32(mask), i32(number), i32(argument), i32(width), seed=seed)
    np.testing.assert_array_equal(out, expected)


@given(
    votes=st.integers(0, 2**32 - 1) | st.just(2**32 - 1) | st.just(0), mask=st.just(2**32 - 1) | masks, seed=schedules
)
def test_warp_votes(run, votes, mask, seed):
    predicate = np.array([votes >> lane & 1 for lane in range(32)], i32) * i32(5)
    out = np.zeros((32, 3), u32)
    run("warp_votes_kernel", 1, 32, predicate, out, u32(mask), seed=seed)
    for lane in range(32):
        expected = (votes & mask, votes & mask != 0, votes & mask == mask) if mask >> lane & 1 else (0, 0, 0)
        assert tuple(out[lane]) == expected


@given(mask=st.just(2**32 - 1) | masks, seed=schedules)
def test_reductions(run, mask, seed):
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    x = np.random.default_rng(seed % 2**32).integers(0, 2**32, 32, dtype=u32)
    out = np.zeros((32, 2), u32)
    run("reduce_kernel", 1, 32, x, out, u32(mask), seed=seed)
    expected = np.zeros((32, 2), u32)
    expected[lanes] = sum(int(v) for v in x[lanes]) % 2**32, max(x[lanes])
    np.testing.assert_array_equal(out, expected)


# ---- atomics ---------------------------------------------------------------------------------------------------------

ATOMICS = {
    "add": lambda old, v: old + v,
    "sub": lambda old, v: old - v,
    "min": min,
    "max": max,
    "and": lambda old, v: old & v,
    "or": lambda old, v: old | v,
    "xor": lambda old, v: old ^ v,
    "exchange": lambda old, v: v,
    "compare": lambda old, v: old + v,
}


@pytest.mark.parametrize("scalar, numpy_type", [("int", i32), ("unsigned int", u32)])
@given(
    operation=st.sampled_from(sorted(ATOMICS)),
    threads=st.integers(1, 200),
    start=st.integers(0, 2**31 - 1),
    data=seeds,
    seed=schedules,
)
def test_atomics(run, scalar, numpy_type, operation, threads, start, data, seed):
    """There is an order of the threads in which each finds what the one before it has left."""
    low, high = (-2**20, 2**20) if scalar == "int" else (0, 2**20)
    value = np.random.default_rng(data).integers(low, high, threads).astype(numpy_type)
    target, before = np.array([start], numpy_type), np.zeros(threads, numpy_type)
    number = ("add", "sub", "min", "max", "and", "or", "xor", "exchange", "compare").index(operation)
    run(f"atomic_kernel<{scalar}>", 1, threads, target, value, before, i32(number), seed=seed)

    def next_value(old, v):
        return int(np.array([ATOMICS[operation](int(old), int(v)) & 0xFFFFFFFF], u32).view(numpy_type)[0])

    # Each thread is an edge from what it found to what it left: an Eulerian walk from start to end exists exactly if
    # all edges hang together and every value is left as often as it is found, start and end aside.
    edges = [(int(old), next_value(old, v)) for old, v in zip(before, value)]
    assert Counter([a for a, _ in edges] + [int(target[0])]) == Counter([b for _, b in edges] + [start])
    reached, fresh = {start}, [start]
    following = {}
    for a, b in edges:
        following.setdefault(a, []).append(b)
    while fresh:
        for b in following.get(fresh.pop(), ()):
            if b not in reached:
                reached.add(b)
                fresh.append(b)
    assert {a for a, _ in edges} <= reached


@pytest.mark.parametrize("kernel, numpy_type", [("atomic_add_kernel", f32), ("atomic_add_long_kernel", u64)])
@given(threads=st.integers(1, 300), data=seeds, seed=schedules)
def test_wide_atomic_sums(run, kernel, numpy_type, threads, data, seed):
    value = np.random.default_rng(data).integers(1, 2**12, threads).astype(numpy_type)   # float sums are exact
    if numpy_type is u64:
        value <<= u64(40)
    target, before = np.zeros(1, numpy_type), np.zeros(threads, numpy_type)
    run(kernel, 1, threads, target, value, before, seed=seed)
    order = np.argsort(before, kind="stable")
    np.testing.assert_array_equal(before[order], np.concatenate([[0], np.cumsum(value[order])[:-1]]).astype(numpy_type))
    assert target[0] == value.sum(dtype=numpy_type)


# ---- element-wise intrinsics -----------------------------------------------------------------------------------------

COUNT = 256
SPECIAL = np.array(
    [
        0,
        1,
        2,
        31,
        32,
        0x7F,
        0x80,
        0xFF,
        0x7FFFFFFF,
        0x80000000,
        0x80000001,
        0xFFFFFFFE,
        0xFFFFFFFF,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0x00800000,
        0x007FFFFF,
        0x3F800000,
        0x4F000000,
        0xCF000000,
    ],
    u32,
)


def words(rng):
    """32-bit patterns of every magnitude, special ones in front in random order."""
    x = (rng.integers(0, 2**32, COUNT, dtype=u32) >> rng.integers(0, 32, COUNT, dtype=u32)).astype(u32)
    x[:len(SPECIAL)] = rng.permutation(SPECIAL)
    return x


def floats(rng):
    """Half of them any bit pattern, half of moderate size."""
    x = rng.integers(0, 2**32, COUNT, dtype=u32)
    x[:len(SPECIAL)] = rng.permutation(SPECIAL)
    x[np.isnan(x.view(f32))] |= u32(0x00400000)   # no signalling NaN: libm's fmaxf treats them otherwise than CUDA's
    return np.where(np.arange(COUNT) < COUNT // 2, x.view(f32), rng.normal(0, 100, COUNT).astype(f32))


def pairs_of(make):
    return lambda rng: np.stack([make(rng), make(rng)], -1)


def drawn_as(dtype, make=words):
    return lambda rng: make(rng).view(dtype)


def wrap(x):
    return x & 0xFFFFFFFF


def signed(x):
    return (x & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def byte_perm(x, y, selector):
    """CUDA Math API: three bits of a nibble pick a byte of eight (PTX prmt looks at the fourth bit, this does not)."""
    table = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
    return int.from_bytes(bytes(table[int(selector) >> shift & 7] for shift in (0, 4, 8, 12)), "little")


def permute_bytes(x, y, selector):
    """PTX prmt, generic form: with the fourth bit of a nibble set, the byte's top bit eight times."""
    table = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
    nibbles = [int(selector) >> shift & 15 for shift in (0, 4, 8, 12)]
    return int.from_bytes(bytes(255 * (table[n & 7] >> 7) if n & 8 else table[n] for n in nibbles), "little")


def dp4a(a, b, c):
    bytes_of = [np.array([x], i32).view(np.int8).astype(int) for x in (a, b)]
    return signed(int(c) + int(bytes_of[0] @ bytes_of[1]))


def nearest_float(exact: Fraction):
    """The float32 nearest to an exact value, ties to even; overflow to infinity."""
    if abs(exact) >= 2**128 - 2**103:   # halfway between the largest float and 2^128, which is even
        return f32(np.inf if exact > 0 else -np.inf)
    largest = float(np.finfo(f32).max)
    guess = f32(min(max(float(exact), -largest), largest))
    near = [x for x in (np.nextafter(guess, f32(-np.inf)), guess, np.nextafter(guess, f32(np.inf))) if np.isfinite(x)]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - exact), int(np.abs(x).view(u32)) & 1))


def fma(a, b, c):
    if not np.isfinite([a, b, c]).all():
        with np.errstate(all="ignore"):
            return f32(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:   # the sign of a zero follows from the operands' signs
        return f32(np.float64(a) * np.float64(b)) * f32(0) + c if c == 0 else f32(0)
    return nearest_float(exact)


def to_unsigned(x):
    """Rounded to nearest even; NaN becomes 0, what is out of range the nearest limit."""
    if np.isnan(x):
        return 0
    return int(np.rint(np.clip(np.float64(x), 0, 2**32 - 1)))


def to_int(rounding):
    def convert(x):
        if np.isnan(x):
            return 0
        if np.isinf(x):
            return 2**31 - 1 if x > 0 else -2**31
        return min(max(int(rounding(np.float64(x))), -2**31), 2**31 - 1)
    return convert


def numpy_operation(function):
    def quiet(*operands):
        with np.errstate(all="ignore"):
            return function(*operands)
    return quiet


@np.errstate(all="ignore")
def half_bits(x):
    return x.astype(np.float16)


@np.errstate(all="ignore")
def bfloat_bits(x):
    return x.astype(bf16)


def each(function, dtype):
    return lambda *arrays: np.array([function(*row) for row in zip(*arrays)]).astype(dtype)


INT, LONG = drawn_as(i32), lambda rng: rng.integers(-2**63, 2**63 - 1, COUNT) >> rng.integers(0, 63, COUNT)
# name: (makers of the inputs, independent definition over whole arrays)
EXACT = {
    "popc": ([words], each(lambda x: bin(x).count("1"), i32)),
    "popcll": ([drawn_as(u64, LONG)], each(lambda x: bin(x).count("1"), i32)),
    "clz": ([words], each(lambda x: 32 - int(x).bit_length(), i32)),
    "ffs": ([words], each(lambda x: (int(x) & -int(x)).bit_length(), i32)),
    "brev": ([words], each(lambda x: int(f"{x:032b}"[::-1], 2), u32)),
    "byte_perm": ([words] * 3, each(byte_perm, u32)),
    "permute_bytes": ([words] * 3, each(permute_bytes, u32)),
    "funnelshift_l": ([words] * 3, each(lambda lo, hi, n: wrap((int(hi) << 32 | int(lo)) << (int(n) % 32) >> 32), u32)),
    "funnelshift_r": ([words] * 3, each(lambda lo, hi, n: wrap((int(hi) << 32 | int(lo)) >> (int(n) % 32)), u32)),
    "dp4a": ([INT] * 3, each(dp4a, i32)),
    "min_int": ([INT] * 2, np.minimum), "max_int": ([INT] * 2, np.maximum),
    "min_unsigned": ([words] * 2, np.minimum), "max_unsigned": ([words] * 2, np.maximum),
    "min_long": ([LONG] * 2, np.minimum), "max_long": ([LONG] * 2, np.maximum),
    "fmul_rn": ([floats] * 2, numpy_operation(np.multiply)), "fadd_rn": ([floats] * 2, numpy_operation(np.add)),
    "fsub_rn": ([floats] * 2, numpy_operation(np.subtract)), "fdiv_rn": ([floats] * 2, numpy_operation(np.divide)),
    "fsqrt_rn": ([floats], numpy_operation(np.sqrt)), "frcp_rn": ([floats], numpy_operation(lambda x: f32(1) / x)),
    "fmaf_rn": ([floats] * 3, each(fma, f32)), "fmaf": ([floats] * 3, each(fma, f32)),
    # Which of two zeros is the larger is not defined: the kernels add 0.
    "fmaxf": ([floats] * 2, lambda x, y: np.fmax(x, y) + f32(0)),
    "fminf": ([floats] * 2, lambda x, y: np.fmin(x, y) + f32(0)), "fabsf": ([floats], np.abs),
    "saturatef": ([floats], lambda x: np.fmin(np.fmax(x, f32(0)), f32(1)) + f32(0)),
    "isnan": ([floats], lambda x: (x != x).astype(i32)),
    "float2uint_rn": ([floats], each(to_unsigned, u32)),
    "float2int_rn": ([floats], each(to_int(np.rint), i32)), "float2int_rz": ([floats], each(to_int(np.trunc), i32)),
    "float2int_rd": ([floats], each(to_int(np.floor), i32)), "float2int_ru": ([floats], each(to_int(np.ceil), i32)),
    "int2float_rn": ([INT], lambda x: x.astype(f32)), "uint2float_rn": ([words], lambda x: x.astype(f32)),
    "float_as_uint": ([floats], lambda x: x.view(u32)), "uint_as_float": ([words], lambda x: x.view(f32)),
    "float_as_int": ([floats], lambda x: x.view(i32)), "int_as_float": ([INT], lambda x: x.view(f32)),
    "float2half_rn": ([floats], half_bits), "float2bfloat16_rn": ([floats], bfloat_bits),
    "float22half2_rn": ([pairs_of(floats)], half_bits), "float22bfloat162_rn": ([pairs_of(floats)], bfloat_bits),
    "half22float2": ([lambda rng: words(rng).view(np.float16).reshape(-1, 2)], lambda x: x.astype(f32)),
    "bfloat1622float2": ([lambda rng: words(rng).view(bf16).reshape(-1, 2)], lambda x: x.astype(f32)),
    "ldg": ([words], lambda x: x), "ldcg": ([words], lambda x: x), "load_once_1": ([words], lambda x: x),
    "load_once_2": ([pairs_of(words)], lambda x: x), "load_once_4": ([pairs_of(pairs_of(words))], lambda x: x),
}


def apply(run, name, inputs, expected_like, seed=0, ftz=False):
    x = [np.ascontiguousarray(a) for a in inputs]
    fill = [np.zeros(len(x[0]), u64)] * (3 - len(x))   # an argument that the kernel does not use
    out = np.empty(expected_like.shape, expected_like.dtype)
    out.view(np.uint8)[...] = 0xA5
    n = len(x[0])
    run(f"{name}_kernel", -(-n // 64), 64, *x, *fill, out, i32(n), seed=seed, ftz=ftz)
    return out


def assert_same_bits(actual, expected, inputs):
    """Bit for bit, but for the payload and sign of NaN."""
    bits = f"u{expected.dtype.itemsize}"
    same = actual.view(bits) == expected.view(bits)
    if expected.dtype.kind in "fV":
        same |= np.isnan(actual.astype(f32)) & np.isnan(expected.astype(f32))
    if not same.all():
        at = tuple(np.argwhere(~same)[0])
        given_values = [a[at[0]] for a in inputs]
        pytest.fail(
            f"{(~same).sum()} of {same.size} differ; first: f({given_values}) = {actual[at]!r}, not {expected[at]!r}"
        )


@pytest.mark.parametrize("name", sorted(EXACT))
@given(data=seeds)
def test_exact_intrinsics(run, name, data):
    makers, definition = EXACT[name]
    rng = np.random.default_rng(data)
    inputs = [make(rng) for make in makers]
    expected = definition(*inputs)
    assert_same_bits(apply(run, name, inputs, expected, seed=data), expected, inputs)


@pytest.mark.parametrize("name, numpy_type", [("half2float", np.float16), ("bfloat162float", bf16)])
def test_all_16_bit_floats(run, name, numpy_type):
    x = np.arange(65536, dtype=np.uint16).view(numpy_type)
    expected = x.astype(f32)
    assert_same_bits(apply(run, name, [x], expected), expected, [x])


def ulps(actual, exact):
    """Distance in units of the last place of a normal float32 near `exact` (float64)."""
    return np.abs(actual.astype(np.float64) - exact) / np.exp2(np.floor(np.log2(np.abs(exact))) - 23)


@given(data=seeds)
def test_rsqrtf(run, data):
    """CUDA C Programming Guide, mathematical functions: 2 ulp."""
    x = np.abs(floats(np.random.default_rng(data)))
    out = apply(run, "rsqrtf", [x], x)
    normal = np.isfinite(x) & (x >= 2.0**-126)
    assert (ulps(out[normal], x[normal].astype(np.float64) ** -0.5) <= 2).all()
    edge = np.array([0, -0.0, np.inf, -1, np.nan], f32)
    np.testing.assert_array_equal(
        apply(run, "rsqrtf", [edge], edge), np.array([np.inf, -np.inf, 0, np.nan, np.nan], f32)
    )


@given(data=seeds, ftz=st.booleans())
def test_exp2_approx(run, data, ftz):
    """PTX ISA, ex2.approx.ftz.f32: at most 2 ulp; subnormal arguments count as zero, subnormal results become zero."""
    rng = np.random.default_rng(data)
    x = np.concatenate([rng.uniform(-126, 128, COUNT), rng.normal(0, 1, COUNT), rng.normal(0, 1e-6, 20)]).astype(f32)
    x = np.minimum(x, np.nextafter(f32(128), f32(0)))
    assert (ulps(apply(run, "exp2_approx", [x], x, ftz=ftz), np.exp2(x.astype(np.float64))) <= 2).all()
    edge = np.array([0, 1, -1, 128, np.inf, -np.inf, np.nan, -126, -127, -150, -1e30, 1e-45, -1e-40], f32)
    expected = np.array([1, 2, .5, np.inf, np.inf, 0, np.nan, 2.0**-126, 0, 0, 0, 1, 1], f32)
    np.testing.assert_array_equal(apply(run, "exp2_approx", [edge], edge, ftz=ftz), expected)


def test_store_once(run):
    four, two, one = np.zeros(256, u32), np.zeros(128, u32), np.zeros(64, u32)
    run("store_once_kernel", 1, 64, four, two, one)
    assert all((x == np.arange(x.size)).all() for x in (four, two, one))


def test_flushing_of_subnormals():
    """Only the emulator's switch: on a GPU this is a compile option."""
    run = emulator.Emulator("intrinsics.cu")
    tiny, half, one = (np.full(1, x, f32) for x in (2.0**-126, 0.5, 1))
    for ftz, product, kept in [(False, 2.0**-127, 2.0**-130), (True, 0, 0)]:
        assert apply(run, "fmul_rn", [tiny, half], one, ftz=ftz)[0] == product
        assert apply(run, "fmul_rn", [np.full(1, 2.0**-130, f32), one], one, ftz=ftz)[0] == kept
    assert np.float32(2.0**-126) * np.float32(0.5) != 0, "the process itself is back to normal"


# ---- tensor cores and asynchronous copies ----------------------------------------------------------------------------


def fragments(matrix, rows, columns):
    """Elements of a matrix in lane order, packed in pairs or fours into 32-bit words: [32, words]."""
    return np.ascontiguousarray(matrix[rows, columns]).view(u32)


# The fragment layouts of the PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating point type" and "for
# mma.m16n8k32"), element i of lane `lane`, in the ISA's own words: groupID = lane >> 2, threadID_in_group = lane % 4.
def a_k16(lane, i):
    row = lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_k16(lane, i):
    return (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def a_k32(lane, i):
    row = lane >> 2 if 0 <= i < 4 or 8 <= i < 12 else (lane >> 2) + 8
    return row, (lane % 4) * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_k32(lane, i):
    return (lane % 4) * 4 + (i & 3) + (16 if i >= 4 else 0), lane >> 2


def d_any(lane, i):
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), (lane % 4) * 2 + (i & 1)


def places(layout, elements):
    grid = np.array([[layout(lane, i) for i in range(elements)] for lane in range(32)])
    return grid[..., 0], grid[..., 1]


def multiply(run, kernel, a, b, c, layouts, seed):
    """a b + c through one warp's fragments."""
    layout_a, layout_b = layouts
    per_word = 4 // a.itemsize
    d = np.ascontiguousarray(c[places(d_any, 4)])
    run(
        kernel,
        1,
        32,
        fragments(a, *places(layout_a, 4 * per_word)),
        fragments(b, *places(layout_b, 2 * per_word)),
        d,
        seed=seed,
    )
    out = np.empty_like(c)
    out[places(d_any, 4)] = d
    return out


@pytest.mark.parametrize("scalar, numpy_type", [("__half", np.float16), ("__nv_bfloat16", bf16)])
@given(data=seeds, seed=schedules)
def test_mma_m16n8k16(run, scalar, numpy_type, data, seed):
    rng = np.random.default_rng(data)
    a, b = (rng.integers(-16, 17, shape).astype(f32) / 4 for shape in ((16, 16), (16, 8)))   # sums are exact
    c = rng.integers(-1000, 1000, (16, 8)).astype(f32)
    out = multiply(
        run, f"mma_k16_kernel<{scalar}>", a.astype(numpy_type), b.astype(numpy_type), c, (a_k16, b_k16), seed
    )
    np.testing.assert_array_equal(out, a @ b + c)


@pytest.mark.parametrize("scalar, numpy_type", [("__half", np.float16), ("__nv_bfloat16", bf16)])
@given(data=seeds)
def test_mma_m16n8k16_rounds_like_a_float32_sum(run, scalar, numpy_type, data):
    """Random operands: 16 products and a summand, each step of the hardware's sum within one unit of float32."""
    rng = np.random.default_rng(data)
    a, b = (rng.normal(size=shape).astype(numpy_type) for shape in ((16, 16), (16, 8)))
    c = rng.normal(size=(16, 8)).astype(f32)
    out = multiply(run, f"mma_k16_kernel<{scalar}>", a, b, c, (a_k16, b_k16), data)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    magnitude = np.abs(wide_a) @ np.abs(wide_b) + np.abs(c)
    assert (np.abs(out - (wide_a @ wide_b + c)) <= 17 * 2.0**-23 * magnitude).all()


def test_mma_carries_infinity_and_nan(run):
    a, b, c = np.ones((16, 16), np.float16), np.ones((16, 8), np.float16), np.zeros((16, 8), f32)
    a[3, 5], a[4, 0], c[7, 2] = np.inf, np.nan, -np.inf
    out = multiply(run, "mma_k16_kernel<__half>", a, b, c, (a_k16, b_k16), 0)
    expected = np.full((16, 8), 16, f32)
    expected[3], expected[4], expected[7, 2] = np.inf, np.nan, -np.inf
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("scalar, numpy_type", [("kvb::i8", np.int8), ("kvb::u8", np.uint8)])
@given(data=seeds, seed=schedules)
def test_mma_m16n8k32(run, scalar, numpy_type, data, seed):
    rng = np.random.default_rng(data)
    a = rng.integers(-128, 128, (16, 32)).astype(np.int8)
    b = rng.integers(0, 256, (32, 8)).astype(np.uint8).view(numpy_type)
    c = rng.integers(-2**31, 2**31, (16, 8)).astype(i32)   # sums wrap around
    exact = a.astype(np.int64) @ b.astype(np.int64) + c
    expected = (exact & 0xFFFFFFFF).astype(u32).view(i32)
    np.testing.assert_array_equal(multiply(run, f"mma_k32_kernel<{scalar}>", a, b, c, (a_k32, b_k32), seed), expected)


@pytest.mark.parametrize("transposed", [False, True])
@given(data=seeds, seed=schedules)
def test_ldmatrix(run, transposed, data, seed):
    rng = np.random.default_rng(data)
    matrices, rows = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16), rng.permutation(32).astype(i32)
    out = np.zeros((32, 4), u32)
    run(f"ldmatrix_kernel<{str(transposed).lower()}>", 1, 32, matrices, rows, out, seed=seed)
    for lane, j in itertools.product(range(32), range(4)):
        matrix = matrices[j].T if transposed else matrices[j]
        pair = matrix[lane // 4, 2 * (lane % 4):][:2]
        assert out[lane, j] == int(pair[0]) | int(pair[1]) << 16


@given(data=seeds, seed=schedules)
def test_transpose_8x8(run, data, seed):
    matrix = np.random.default_rng(data).integers(0, 2**16, (8, 8)).astype(np.uint16)
    out = np.zeros(32, u32)
    run("transpose_8x8_kernel", 1, 32, matrix.view(u32).reshape(-1), out, seed=seed)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), matrix.T)


@pytest.mark.parametrize("once", [False, True])
@given(chunks=st.integers(1, 6), missing=st.integers(0, 6), seed=st.just(0) | schedules)
def test_a_ring_of_asynchronous_copies(run, once, chunks, missing, seed):
    """Chunks that are not valid come out as zeros, and global memory is not read for them: the array ends before.
    The copy for data that is read once also takes a part of a chunk."""
    present = max(0, chunks - missing)
    expected = np.zeros((chunks + 1, 32, 4), i32)
    expected[:present] = 1 + np.arange(128 * present).reshape(-1, 32, 4)
    x = expected[:present + once].copy()
    if once:
        x[present] = np.arange(-128, 0).reshape(32, 4)
        expected[present] = np.where(np.arange(4) < np.arange(32)[:, None] % 5, x[present], 0)
    out = np.full(128 * chunks, -1, i32)
    run(f"ring_kernel<{str(once).lower()}>", 1, 32, x, out, i32(chunks), i32(present), seed=seed)
    np.testing.assert_array_equal(out.reshape(-1, 32, 4), expected[:chunks])


# ---- cooperative launches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 9])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_blocks_of_a_cooperative_launch_wait_for_each_other(run_cooperatively, blocks, seed):
    x, shown, tickets = np.arange(1, blocks + 1, dtype=i32), np.zeros(blocks, i32), np.zeros(1, u32)
    out = np.zeros((blocks, 64), i32)
    run_cooperatively("share_kernel<true>", blocks, 64, x, shown, tickets, out, i32(0), seed=seed)
    expected = x.sum() + 1000 * np.arange(blocks)[:, None] + np.roll(np.arange(64), -1)
    assert (out == expected).all() and tickets[0] == blocks


@pytest.mark.parametrize("blocks", [1, 9])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_blocks_of_a_cooperative_launch_tell_each_other(run_cooperatively, blocks, seed):
    x, words, pairs = np.arange(1, blocks + 1, dtype=i32), np.zeros(blocks, np.uint64), np.zeros(2 * blocks, np.uint64)
    out = np.zeros(blocks, np.uint64)
    run_cooperatively("tell_kernel", blocks, 64, x, words, pairs, np.zeros(64 * blocks, i32), out, i32(0), seed=seed)
    assert (out == 3 * x.sum()).all() and (words == x).all()


def share(faulty, blocks=3, absent=0, wait=True, **options):
    out = np.zeros((blocks, 64), i32)
    faulty(f"share_kernel<{str(wait).lower()}>", blocks, 64, np.ones(blocks, i32), np.zeros(blocks, i32),
           np.zeros(1, u32), out, i32(absent), **options)
    return out - 1000 * np.arange(blocks)[:, None] - np.roll(np.arange(64), -1)


def test_blocks_that_wait_in_vain_are_named(faulty):
    with pytest.raises(RuntimeError, match="wait_for_tickets at line .* waits for other blocks in a launch that is"):
        share(faulty)
    for seed in (0, 1):
        with pytest.raises(RuntimeError, match=r"deadlock: blocks wait for each other, from thread \(0,0,0\) in "
                                               r"wait_for_tickets at line \d+, from thread \(1,0,0\) in __syncthreads"):
            share(faulty, absent=1, cooperative=True, seed=seed)
    assert (share(faulty, cooperative=True) == 3).all()   # what the failed launches left does not matter
    with pytest.raises(RuntimeError, match=r"deadlock: blocks wait for each other, .* wait_for_published at line"):
        faulty("tell_kernel", 3, 64, np.ones(3, i32), np.zeros(3, np.uint64), np.zeros(6, np.uint64),
               np.zeros(192, i32), np.zeros(3, np.uint64), i32(1), cooperative=True)


def test_a_missing_wait_for_other_blocks_changes_the_result(faulty):
    assert (share(faulty, wait=False, cooperative=True) != 3).any()


def test_the_room_for_a_cooperative_launch(faulty):
    """As many blocks as there is room for run, one more does not."""
    blocks = faulty.module.cooperative_threads // 64
    assert (share(faulty, blocks, cooperative=True) == blocks).all()
    with pytest.raises(RuntimeError, match=rf"share_kernel<true>: a cooperative launch has at most {64 * blocks} "
                                           rf"threads, got {blocks + 1} blocks of 64"):
        share(faulty, blocks + 1, cooperative=True)
