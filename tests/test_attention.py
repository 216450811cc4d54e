"""Decode attention and merge: layouts, edges and errors that drawn inputs of test_kernels.py do not single out."""
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import needs
from kvbench import arrays, loaders, registry
from kvbench.ops import attention
from kvbench.ops.dispatch import EPSILON
from kvbench.reference import attention as reference
from kvbench.verify import compare, run, to_host
from strategies.arrays import fill, groups, head_dims, schedules, seeds

BACKENDS = [needs(backend) for backend in ("reference", "cpu", "simt", "cuda", "native")]
CUDA_BACKENDS = [needs(backend) for backend in ("simt", "cuda", "native")]


def case(seed=0, batch=2, kv_heads=2, group=3, tokens=70, head_dim=64, dtype="float16"):
    rng = np.random.default_rng(seed)
    return {"query": fill(rng, (batch, kv_heads * group, head_dim), dtype, "normal"),
            "keys": fill(rng, (batch, kv_heads, tokens, head_dim), dtype, "normal"),
            "values": fill(rng, (batch, kv_heads, tokens, head_dim), dtype, "normal")}


def on(backend, array):
    """A NumPy array where the backend can reach it."""
    return arrays.upload(array, "cuda").give() if backend in ("cuda", "native") else array


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@given(tokens=st.integers(1, 400), splits=st.integers(1, 12), group=groups, head_dim=head_dims, seed=seeds,
       schedule=schedules, dtype=st.sampled_from(("float16", "bfloat16", "float32")))
def test_any_number_of_splits_gives_the_result(backend, tokens, splits, group, head_dim, seed, schedule, dtype):
    kernel = registry.get("attention.decode")
    inputs = case(seed, 1, 2, group, tokens, head_dim, dtype)
    expected = kernel.reference(**inputs)
    with loaders.simt_schedule(schedule):
        actual = attention.decode(**{name: on(backend, x) for name, x in inputs.items()}, splits=splits,
                                  return_lse=True, backend=backend)
    kernel.agreement(inputs, expected, to_host(actual))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_caches_are_read_in_place(backend):
    """A slice of a preallocated cache, and the [batch, tokens, kv_heads, head_dim] layout of most models."""
    inputs = case(tokens=40)
    expected = run(registry.get("attention.decode"), {**inputs, "return_lse": True}, backend)
    capacity = np.full((2, 2, 64, 64), np.nan, np.float16)
    capacity[:, :, 3:43] = inputs["keys"]
    keys = on(backend, capacity)[:, :, 3:43]
    values = on(backend, np.ascontiguousarray(inputs["values"].transpose(0, 2, 1, 3))).transpose(0, 2, 1, 3)
    actual = attention.decode(on(backend, inputs["query"]), keys, values, return_lse=True, backend=backend)
    for one, other in zip(expected, to_host(actual)):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences_give_zeros(backend):
    inputs = {**case(), "lengths": np.array([0, 5], np.int32), "return_lse": True}
    output, lse = run(registry.get("attention.decode"), inputs, backend)
    assert not output[0].any() and np.isneginf(lse[0]).all() and np.isfinite(lse[1]).all()
    output, lse = run(registry.get("attention.decode"), {**case(tokens=0), "return_lse": True}, backend)
    assert not output.any() and np.isneginf(lse).all()
    assert run(registry.get("attention.decode"), case(batch=0), backend).shape == (0, 6, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_outside_the_cache_are_clamped(backend):
    inputs = case()
    full = run(registry.get("attention.decode"), inputs, backend)
    clamped = run(registry.get("attention.decode"), {**inputs, "lengths": np.array([1000, -3], np.int32)}, backend)
    assert clamped[0].tobytes() == full[0].tobytes() and not clamped[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_head(backend):
    inputs = case(kv_heads=2)
    clean = run(registry.get("attention.decode"), inputs, backend)
    inputs["keys"][0, 1, 33, 5] = np.nan
    output = run(registry.get("attention.decode"), inputs, backend)
    assert np.isnan(output[0, 3:]).all()
    assert output[0, :3].tobytes() == clean[0, :3].tobytes() and output[1].tobytes() == clean[1].tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_any_size_are_handled(backend):
    """A huge logit takes all the weight; very negative logits shift away."""
    inputs = case(batch=1, kv_heads=1, group=1, tokens=40, dtype="float32")
    for sign in (1, -1):
        inputs["keys"] = np.zeros_like(inputs["keys"])
        inputs["keys"][0, 0, :, 0] = np.where(np.arange(40) == 17, sign * 2000, sign * 1000)
        inputs["query"] = np.eye(1, 64, dtype=np.float32)[None]
        output = run(registry.get("attention.decode"), {**inputs, "scale": 1.0}, backend)
        values = inputs["values"][0, 0]
        expected = values[17] if sign == 1 else np.delete(values, 17, axis=0).mean(axis=0)
        np.testing.assert_allclose(output[0, 0], expected, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_parts_merge_to_the_whole(backend, dtype):
    """Attention over two ranges, written into one buffer of partial results, merged: the attention over both."""
    inputs = case(tokens=100, dtype=dtype)
    query, keys, values = (on(backend, x) for x in inputs.values())
    outputs = on(backend, np.full((2, 2, 6, 64), np.nan, np.float32))
    lses = on(backend, np.full((2, 2, 6), np.nan, np.float32))
    for part, (first, last) in enumerate(((0, 37), (37, 100))):
        attention.decode(query, keys[:, :, first:last], values[:, :, first:last], out=outputs[part], lse=lses[part],
                         backend=backend)
    kernel = registry.get("attention.decode")
    kernel.agreement(inputs, reference.decode(**inputs), to_host(attention.merge(outputs, lses, backend=backend)))


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_workspace_is_left_ready_for_the_next_launch(backend):
    inputs = {name: on(backend, x) for name, x in case(tokens=300).items()}
    scratch = attention.workspace(2, 6, 64, "cuda" if backend in ("cuda", "native") else "cpu")
    first = to_host(attention.decode(**inputs, splits=2, workspace=scratch, backend=backend))
    assert not scratch.tickets.to_host().any()
    again = to_host(attention.decode(**inputs, splits=2, workspace=scratch, backend=backend))
    assert first.tobytes() == again.tobytes()
    with pytest.raises(ValueError, match="workspace: expected room for batch 2, q_heads 6, splits 200"):
        attention.decode(**inputs, splits=200, workspace=attention.workspace(1, 1, 64, scratch.tickets.device),
                         backend=backend)


@given(tokens=st.integers(1, 10**6), pairs=st.integers(1, 2000), group=st.integers(1, 16),
       multiprocessors=st.integers(1, 200))
def test_a_workspace_has_room_for_the_splits_that_are_chosen(tokens, pairs, group, multiprocessors):
    splits = attention.choose_splits(-(-tokens // 16), pairs, 8, multiprocessors)
    assert pairs * group * splits <= attention.most_parts(pairs * group, multiprocessors)


def test_a_workspace_does_not_grow_with_the_batch_beyond_what_the_gpu_takes():
    assert attention.most_parts(64 * 32, 132) * 128 * 4 < 2**23          # all 256 splits would be 270 MB


@given(tokens=st.integers(0, 10**6), pairs=st.integers(1, 5000), multiprocessors=st.integers(1, 200))
def test_splits_fill_the_gpu(tokens, pairs, multiprocessors):
    tiles = -(-tokens // 16)
    splits = attention.choose_splits(tiles, pairs, 8, multiprocessors)
    assert 1 <= splits <= attention.MAX_SPLITS
    assert splits == 1 or (tiles // splits >= 8 and pairs * splits <= 4 * multiprocessors)
    enough_tiles = tiles // 8 >= 4 * multiprocessors
    if enough_tiles and multiprocessors * 4 >= pairs * 8 and -(-4 * multiprocessors // pairs) <= attention.MAX_SPLITS:
        rounds = -(-pairs * splits // multiprocessors)
        assert pairs * splits / (rounds * multiprocessors) > 0.75


def test_compares_with_torch():
    torch = pytest.importorskip("torch")
    inputs = {name: torch.from_numpy(x.astype(np.float32)) for name, x in case(tokens=50, group=2).items()}
    expected = torch.nn.functional.scaled_dot_product_attention(
        inputs["query"][:, :, None], inputs["keys"], inputs["values"], enable_gqa=True)
    actual = attention.decode(**inputs)
    assert isinstance(actual, torch.Tensor)
    torch.testing.assert_close(actual, expected[:, :, 0])


# --- Listed tokens ---------------------------------------------------------------------------------------------------


def some_lists(seed, batch, lists, tokens, counts, slots=None):
    """Ascending positions, and what is no position beyond the counts."""
    rng, slots = np.random.default_rng(seed), tokens if slots is None else slots
    indices = np.full((batch, lists, slots), 2**31 - 1, np.int32)
    counts = np.broadcast_to(np.asarray(counts, np.int32), (batch, lists)).copy()
    for row in np.ndindex(batch, lists):
        indices[row][: counts[row]] = np.sort(rng.permutation(tokens)[: counts[row]])
    return indices, counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("lists", [2, 6])
def test_a_full_list_is_dense_attention(backend, dtype, lists):
    inputs = case(tokens=90, dtype=dtype)
    indices, counts = some_lists(0, 2, lists, 90, 90)
    actual = run(registry.get("attention.sparse_attention"),
                 {**inputs, "indices": indices, "counts": counts, "return_lse": True}, backend)
    registry.get("attention.decode").agreement(inputs, reference.decode(**inputs), actual)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@given(count=st.integers(0, 300), splits=st.integers(1, 6), group=groups, head_dim=head_dims, seed=seeds,
       schedule=schedules, dtype=st.sampled_from(("float16", "bfloat16", "float32")), per_head=st.booleans())
def test_lists_of_any_length_in_any_number_of_splits(backend, count, splits, group, head_dim, seed, schedule, dtype,
                                                     per_head):
    kernel, inputs = registry.get("attention.sparse_attention"), case(seed, 1, 2, group, 300, head_dim, dtype)
    indices, counts = some_lists(seed, 1, 2 * group if per_head and group < 4 else 2, 300, count)
    inputs |= {"indices": indices, "counts": counts, "return_lse": True}
    with loaders.simt_schedule(schedule):
        actual = attention.sparse_attention(**{name: x if name == "return_lse" else on(backend, x)
                                               for name, x in inputs.items()}, splits=splits, backend=backend)
    kernel.agreement(inputs, kernel.reference(**inputs), to_host(actual))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("splits", [None, 3])
def test_an_earlier_result_is_merged_as_merge_merges_it(backend, dtype, splits):
    """In one split and in several, of which the last block merges; parts without tokens are not read."""
    inputs = case(tokens=400, dtype=dtype)
    inputs["lengths"] = np.array([400, 0], np.int32)
    output, lse = reference.decode(**case(seed=1, tokens=50, dtype=dtype))
    lse[:, 1], output[:, 1] = -np.inf, np.nan
    earlier = output.astype(np.float32), lse.astype(np.float32)
    actual = to_host(attention.decode(
        **{name: on(backend, x) for name, x in inputs.items()}, earlier=tuple(on(backend, x) for x in earlier),
        splits=splits, return_lse=True, backend=backend))
    expected = reference.merge(*(np.stack(pair) for pair in zip(reference.decode(**inputs), earlier)))
    registry.get("attention.decode").agreement({**inputs, "earlier": earlier}, expected, actual)
    assert not actual[0][1, 1].any() and np.isneginf(actual[1][1, 1])
    np.testing.assert_allclose(np.asarray(actual[0][1, 0], float), earlier[0][1, 0], rtol=2 * EPSILON[dtype], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_leading_slots_and_a_list_are_one_softmax(backend, dtype):
    """Whatever their number, and whatever the list holds: attention to the slots that both name."""
    inputs = case(tokens=90, dtype=dtype)
    indices, counts = some_lists(0, 2, 2, 60, [[60, 7], [0, 33]])
    counts[1, 0] = -3                                                   # clamped, as values of `leading` are
    leading, first = np.array([30, -1], np.int32), 30
    sparse = {**inputs, "indices": indices, "counts": counts, "leading": leading, "first": first, "return_lse": True}
    output, lse = run(registry.get("attention.sparse_attention"), sparse, backend)
    for b, g in np.ndindex(2, 2):
        heads, kept = slice(3 * g, 3 * g + 3), [*range(30 * (b == 0)), *(30 + indices[b, g, :max(counts[b, g], 0)])]
        part = {"query": inputs["query"][b:b + 1, heads], **{
            side: inputs[side][b:b + 1, g:g + 1, np.array(kept, int)] for side in ("keys", "values")}}
        registry.get("attention.decode").agreement(part, reference.decode(**part),
                                                   (output[b:b + 1, heads], lse[b:b + 1, heads]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_r4_rows_that_are_not_listed_are_not_read(backend, dtype):
    """The release masked logits and read all of the cache, NaN included."""
    inputs = case(tokens=200, dtype=dtype)
    indices, counts = some_lists(1, 2, 2, 200, [[0, 1], [17, 64]])
    clean = run(registry.get("attention.sparse_attention"), {**inputs, "indices": indices, "counts": counts}, backend)
    for pair in np.ndindex(2, 2):
        unlisted = np.setdiff1d(np.arange(200), indices[pair][: counts[pair]])
        inputs["keys"][pair][unlisted], inputs["values"][pair][unlisted] = np.nan, np.inf
    poisoned = run(registry.get("attention.sparse_attention"), {**inputs, "indices": indices, "counts": counts},
                   backend)
    assert poisoned.tobytes() == clean.tobytes() and np.isfinite(poisoned).all() and not poisoned[0, :3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_outside_the_sequence_are_left_out(backend):
    inputs, kernel = case(tokens=50), registry.get("attention.sparse_attention")
    indices, counts = some_lists(2, 2, 2, 50, 50)
    strange = {**inputs, "indices": indices.copy(), "counts": counts + 9, "lengths": np.array([30, 60], np.int32)}
    strange["indices"][:, :, 40:] = [-1, 50, 2**31 - 1, -2**31, 51, 77, -9, 1000, 50, -5]
    plain = {**inputs, "indices": indices, "counts": np.array([[30, 30], [40, 40]], np.int32)}
    plain["indices"][0, :, :30], plain["indices"][1, :, :40] = np.arange(30), np.arange(40)
    strange["indices"][:, :, :40] = np.arange(40)
    expected = kernel.reference(**plain)
    kernel.agreement(plain, expected, run(kernel, {**strange, "return_lse": True}, backend))


def test_the_bytes_of_sparse_attention_are_those_of_the_listed_rows():
    kernel = registry.get("attention.sparse_attention")
    problem = kernel.problem(tokens=1000, percent=5, kv_heads=2, group=3, head_dim=64)
    inputs = kernel.inputs(problem, np.random.default_rng(0))
    listed = 2 * 50 * (2 * 64 * 2 + 4)
    assert kernel.traffic(problem).bytes_read == listed + inputs["counts"].nbytes + inputs["query"].nbytes


@pytest.mark.parametrize(("changes", "error", "message"), [
    (dict(indices=np.zeros((1, 3, 4), np.int32), counts=np.zeros((1, 3), np.int32)), ValueError,
     "indices: expected lists for the 2 KV heads or the 6 query heads, got 3"),
    (dict(indices=np.zeros((1, 2, 4), np.int64)), TypeError, "indices: expected dtype int32, got int64"),
    (dict(counts=np.zeros((1, 6), np.int32)), ValueError, "counts: expected shape .* with lists = 2 as in indices"),
    (dict(counts=None), TypeError, "counts: expected an array"),
    (dict(first=5), ValueError, "first: expected an integer from 0 to 4, got 5"),
    (dict(leading=np.zeros(2, np.int32)), ValueError, "leading: expected shape .* with batch = 1"),
    (dict(splits=0), ValueError, "splits: expected an integer from 1 to 256, got 0"),
])
def test_sparse_errors_name_the_argument(changes, error, message):
    good = {**GOOD, "indices": np.zeros((1, 2, 4), np.int32), "counts": np.ones((1, 2), np.int32)}
    attention.sparse_attention(**good)
    with pytest.raises(error, match=f"attention.sparse_attention: {message}"):
        attention.sparse_attention(**{**good, **changes})


GOOD = case(batch=1, tokens=4)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(query=GOOD["query"].tolist()), TypeError, "attention.decode: query: expected"),
    (dict(query=GOOD["query"][0]), ValueError, r"query: expected shape \[batch, q_heads, head_dim\], got \[6, 64\]"),
    (dict(keys=GOOD["keys"].astype(np.float32)), TypeError, "keys: expected dtype float16, got float32"),
    (dict(values=GOOD["values"][:, :, :3]), ValueError, "values: expected shape .* with tokens = 4 as in keys, got"),
    (dict(keys=GOOD["keys"][..., :32], values=GOOD["values"][..., :32]), ValueError,
     "keys: expected shape .* with head_dim = 64 as in query, got"),
    (dict(query=GOOD["query"][:, :5]), ValueError,
     "query: expected q_heads a positive multiple of kv_heads = 2, got 5"),
    (dict(lengths=np.zeros(1, np.int64)), TypeError, "lengths: expected dtype int32, got int64"),
    (dict(lengths=np.zeros(2, np.int32)), ValueError, "lengths: expected shape .* with batch = 1 as in query, got"),
    (dict(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
    (dict(scale="big"), ValueError, "scale: expected a finite number, got big"),
    (dict(splits=0), ValueError, "splits: expected an integer from 1 to 256, got 0"),
    (dict(out=np.zeros((1, 6, 64), np.float64)), TypeError, "out: expected dtype float16 or float32, got float64"),
    (dict(lse=np.zeros((1, 5), np.float32)), ValueError, r"lse: expected shape \[1, 6\]"),
    (dict(workspace="none", backend="simt"), TypeError, "workspace: expected a Workspace"),
    (dict(backend="cudaa"), ValueError, "backend: expected one of .* got 'cudaa'; did you mean cuda"),
])
def test_decode_errors_name_the_argument(arguments, error, message):
    if arguments.get("backend") == "simt" and loaders.availability("simt"):
        pytest.skip(loaders.availability("simt"))
    with pytest.raises(error, match=message):
        attention.decode(**{**GOOD, **arguments})


@pytest.mark.parametrize("backend", [needs("simt")])
def test_cuda_kernels_say_what_they_take(backend):
    with pytest.raises(ValueError,
                       match="query: expected at most 16 query heads per KV head on backend 'simt', got 17"):
        attention.decode(**case(kv_heads=1, group=17), backend=backend)
    with pytest.raises(ValueError, match="query: expected head_dim 64, 128 or 256 on backend 'simt', got 32"):
        attention.decode(**case(head_dim=32), backend=backend)
    odd = np.zeros((1, 2, 4, 66), np.float16)[..., :64]
    with pytest.raises(ValueError, match="keys: expected rows at multiples of 16 bytes"):
        attention.decode(GOOD["query"], odd, GOOD["values"], backend=backend)
    assert attention.decode(**case(head_dim=32), backend="cpu").shape == (2, 6, 32)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(outputs=np.zeros((0, 1, 2, 4), np.float32), lses=np.zeros((0, 1, 2), np.float32)), ValueError,
     "outputs: expected at least one part"),
    (dict(lses=np.zeros((3, 1, 3), np.float32)), ValueError,
     "lses: expected shape .* with q_heads = 2 as in outputs, got"),
    (dict(lses=np.zeros((3, 1, 2), np.float64)), TypeError, "lses: expected dtype float32"),
    (dict(out=np.zeros((1, 2, 5), np.float32)), ValueError, "out: expected shape"),
])
def test_merge_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        attention.merge(**{"outputs": np.zeros((3, 1, 2, 4), np.float32), "lses": np.zeros((3, 1, 2), np.float32),
                           **arguments})


@pytest.mark.gpu
def test_decode_runs_in_a_cuda_graph_on_the_callers_stream():
    cupy = pytest.importorskip("cupy")
    inputs = {name: cupy.asarray(x) for name, x in case(tokens=300, head_dim=128).items()}
    out, scratch = cupy.empty_like(inputs["query"]), attention.workspace(2, 6, 128, "cuda")
    expected = attention.decode(**inputs, backend="cuda").get()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        attention.decode(**inputs, out=out, workspace=scratch, backend="cuda")
        graph = stream.end_capture()
        for _ in range(3):
            out.fill(0)
            graph.launch(stream)
            stream.synchronize()
            assert out.get().tobytes() == expected.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums_of_equal_values_stay_within_the_tolerance(backend):
    """Equal weights and equal values: the rounding errors of a long float32 sum all have one sign."""
    inputs = {**case(batch=1, kv_heads=1, group=1, tokens=257, dtype="float32"), "return_lse": True}
    inputs["keys"][...] = 0
    inputs["values"][...] = np.float32(0.7144656)
    compare(registry.get("attention.decode"), inputs, backend)


@pytest.mark.gpu
@pytest.mark.skipif(loaders.availability("native") is not None, reason=str(loaders.availability("native")))
def test_native_serves_torch_without_cupy(tmp_path):
    """Where CuPy is not installed, tensors on a GPU go to the kernels that nvcc built."""
    pytest.importorskip("torch")
    script = tmp_path / "without_cupy.py"
    script.write_text("""
import sys
sys.modules["cupy"] = None
import torch
from kvbench.ops import attention, rotation
query = torch.randn(1, 8, 128, device="cuda", dtype=torch.float16)
keys, values = torch.randn(2, 1, 2, 300, 128, device="cuda", dtype=torch.float16)
expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]
torch.testing.assert_close(attention.decode(query, keys, values), expected, atol=2e-3, rtol=2e-3)
turn = rotation.hadamard(128, seed=1)
torch.testing.assert_close(rotation.rotate(rotation.rotate(keys, turn), turn, inverse=True), keys, atol=5e-3, rtol=5e-3)
print("agrees")
""", encoding="utf-8")
    done = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True)
    assert done.stdout == "agrees\n", done.stderr
