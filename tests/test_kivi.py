"""KIVI operators: stores, edges, real data and errors that drawn inputs of test_kernels.py do not single out."""
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import needs
from kvbench import arrays, loaders, registry, trees
from kvbench.ops import attention, kivi
from kvbench.reference import attention as exact_attention
from kvbench.reference import kivi as reference
from kvbench.reference.kivi import Keys, Values
from kvbench.verify import compare, to_host
from strategies.arrays import NUMPY_TYPE, fill, groups, head_dims, schedules, seeds
from strategies.kivi import fitting, group_sizes, in_a_store, kernel_bits, random_codes

BACKENDS = [needs(backend) for backend in ("reference", "cpu", "simt", "cuda", "native")]
CUDA_BACKENDS = [needs(backend) for backend in ("simt", "cuda", "native")]
HOST_BACKENDS = [needs(backend) for backend in ("reference", "cpu")]
ENCODERS = {Keys: kivi.encode_keys, Values: kivi.encode_values}
kinds = st.sampled_from((Keys, Values))
few = settings(max_examples=15)


def on(backend, tree):
    """NumPy arrays, in containers too, where the backend can reach them."""
    if backend not in ("cuda", "native"):
        return tree
    return trees.apply(lambda path, array: arrays.upload(array, "cuda").give(), tree)


def normal(seed, shape, dtype="float16"):
    return fill(np.random.default_rng(seed), shape, dtype, "normal")


def codes_of(seed, kind, shape, bits=2, group=32, head_dim=64, content="normal"):
    return random_codes(np.random.default_rng(seed), kind, shape, bits, fitting(kind, group, head_dim), head_dim,
                        content)


def case(seed=0, batch=2, kv_heads=2, heads=3, tokens=96, head_dim=64, dtype="float16", key_bits=2, value_bits=2,
         group=32):
    shape = (batch, kv_heads, tokens)
    return {"query": normal(seed, (batch, kv_heads * heads, head_dim), dtype),
            "keys": codes_of(seed + 1, Keys, shape, key_bits, group, head_dim),
            "values": codes_of(seed + 2, Values, shape, value_bits, group, head_dim)}


def attend(backend, inputs, **options):
    """decode_attention on the backend, results on the host.  A workspace is there already."""
    placed = {name: value if isinstance(value, attention.Workspace) else on(backend, value)
              for name, value in {**inputs, **options}.items()}
    return to_host(kivi.decode_attention(**placed, backend=backend))


def encode(backend, kind, x, bits=2, group=32, **options):
    options = {name: on(backend, value) for name, value in options.items()}
    return to_host(ENCODERS[kind](on(backend, x), bits, group, **options, backend=backend))


def tokens_of(encoded, first, last):
    """encoded[:, :, first:last], of the same memory; of keys, whole groups."""
    step = encoded.group if isinstance(encoded, Keys) else 1
    return type(encoded)(encoded.codes[:, :, first:last], encoded.scale[:, :, first // step:last // step],
                         encoded.minimum[:, :, first // step:last // step], encoded.bits, encoded.group)


def assert_same(one, other):
    assert type(one) is type(other) and (one.bits, one.group) == (other.bits, other.group)
    for name in one.arrays():
        assert one.arrays()[name].tobytes() == other.arrays()[name].tobytes(), name


# ------------------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("backend", BACKENDS)
@few
@given(kind=kinds, bits=kernel_bits, group=group_sizes, head_dim=head_dims, dtype=st.sampled_from(sorted(NUMPY_TYPE)),
       seed=seeds, data=st.data())
def test_appending_equals_encoding_at_once(backend, kind, bits, group, head_dim, dtype, seed, data):
    """Tokens written piece by piece into a store, in place: the bytes of one call, and nothing beside them changes."""
    group = fitting(kind, group, head_dim)
    step = group if kind is Keys else 1
    count, start = (step * data.draw(st.integers(low, high)) for low, high in ((1, 3), (0, 2)))
    x = normal(seed, (2, 3, count, head_dim), dtype)
    expected = encode(backend, kind, x, bits, group)
    store = codes_of(seed, kind, (3, 3, 6 * step), bits, group, head_dim)
    shadow = type(store)(*(array.copy() for array in store.arrays().values()), bits, group)
    for name, array in tokens_of(shadow, start, start + count).arrays().items():
        array[1:] = expected.arrays()[name]
    store, x = on(backend, store), on(backend, x)
    cuts = sorted({0, count, *(step * cut for cut in data.draw(st.lists(st.integers(0, count // step), max_size=3)))})
    for first, last in itertools.pairwise(cuts):
        slots = tokens_of(store, start + first, start + last)
        ENCODERS[kind](x[:, :, first:last], bits, group, backend=backend,
                       out=trees.apply(lambda path, array: array[1:], slots))
    assert_same(to_host(store), shadow)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Keys, Values])
@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
def test_strided_tokens_are_read_in_place(backend, kind, dtype):
    """The [batch, tokens, kv_heads, head_dim] layout of most models, and a slice of a larger cache."""
    x = normal(7, (2, 3, 32, 64), dtype)
    expected = encode(backend, kind, x, 2)
    by_token = on(backend, np.ascontiguousarray(x.swapaxes(1, 2))).swapaxes(1, 2)
    larger = np.full((3, 4, 50, 64), np.nan, x.dtype)
    larger[1:, 1:, 5:37] = x
    for strided in (by_token, on(backend, larger)[1:, 1:, 5:37]):
        assert_same(to_host(ENCODERS[kind](strided, 2, backend=backend)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Keys, Values])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_tie_goes_to_the_even_code(backend, kind, bits):
    """Groups whose numbers lie on, and next to, all halves between two codes, for steps near both ends of float16."""
    qmax = 2**bits - 1
    rows = []
    for step, low in itertools.product((2.0**-24, 2.0**-14, 0.75, 1.0009765625, 2048), (0, 1, -3.5)):
        ends = np.array([low * step, (low + qmax) * step]).astype(np.float16)
        halves = ((np.arange(qmax) + 0.5 + low) * step).astype(np.float16)
        near = np.concatenate([np.nextafter(halves, np.float16(away)) for away in (-np.inf, np.inf)])
        rows.append(np.resize(np.concatenate([ends, halves, near]), 128))
    x = np.resize(np.stack(rows), (64, 128))
    x = np.clip(x, x[:, :1], x[:, 1:2])[None, None]                 # next to an end may be beyond it
    if kind is Keys:
        x = np.ascontiguousarray(x.swapaxes(2, 3))
    assert_same(encode(backend, kind, x, bits, 64 if kind is Keys else 32),
                encode("reference", kind, x, bits, 64 if kind is Keys else 32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Keys, Values])
@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_next_to_a_threshold_get_the_right_code(backend, kind, bits):
    """Groups between any two float16, where a difference of the rounded numbers may need more than float32 holds."""
    patterns = np.random.default_rng(3).integers(0, 1 << 16, (256, 2)).astype(np.uint16)
    patterns[:40, 1] ^= 1 << np.arange(40).astype(np.uint16) % 16                   # ends that are close or far apart
    ends = patterns.view(np.float16)
    ends = np.sort(np.where(np.isfinite(ends), ends, np.float16(-6e4)), axis=1)
    low, high = ends.astype(np.float64).T
    steps = ((high - low).astype(np.float32) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float64)
    edges = [low + (code + 0.5) * steps for code in (0, 2**(bits - 1) - 1, 2**bits - 2)]
    columns = [ends[:, 0], ends[:, 1]]
    for edge in edges:
        at = edge.astype(np.float16)
        columns += [at, *(np.nextafter(at, np.float16(away)) for away in (-np.inf, np.inf)),
                    *(np.nextafter(np.nextafter(at, np.float16(away)), np.float16(away)) for away in (-np.inf, np.inf))]
    x = np.clip(np.stack(columns, axis=1), ends[:, :1], ends[:, 1:])
    x = np.tile(x, (1, 2))[:, :32].reshape(1, 1, 128, 64)                            # two groups a row
    if kind is Keys:
        x = np.ascontiguousarray(x.swapaxes(2, 3))
    assert_same(encode(backend, kind, x, bits, 32), encode("reference", kind, x, bits, 32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [Keys, Values])
@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
def test_special_numbers_stay_in_their_group(backend, kind, dtype):
    x = normal(0, (1, 2, 64, 64), dtype)
    clean = encode(backend, kind, x)
    x[0, 0, 3, 5], x[0, 0, 3, 40], x[0, 1, 40, 63], x[0, 1, 41, 63] = np.nan, np.inf, -np.inf, 6e4
    spoilt = encode(backend, kind, x)
    differs = reference.decode(spoilt) != reference.decode(clean)
    touched = np.zeros_like(differs)
    for head, token, channel in ((0, 3, 5), (0, 3, 40), (1, 40, 63), (1, 41, 63)):
        span = slice(channel // 32 * 32, channel // 32 * 32 + 32)
        touched[0, head, token if kind is Values else slice(token // 32 * 32, token // 32 * 32 + 32),
                span if kind is Values else channel] = True
    assert not (differs & ~touched).any()
    codes = reference.unpack(spoilt.codes, 2)
    assert codes[0, 0, 3, 5] == 0 and codes[0, 0, 3, 40] == 3 and codes[0, 1, 40, 63] == 0
    with pytest.raises(ValueError, match="x: expected finite numbers, got NaN or Inf in"):
        encode(backend, kind, x, check_finite=True)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("kind", [Keys, Values])
@pytest.mark.parametrize("bits, group, head_dim", [(8, 32, 64), (8, 96, 96), (2, 160, 320), (4, 32, 32)])
def test_the_host_takes_other_sizes(backend, kind, bits, group, head_dim):
    x, query = normal(bits, (2, 2, 2 * group, head_dim), "float32"), normal(3, (2, 6, head_dim))
    stem = "encode_keys" if kind is Keys else "encode_values"
    compare(registry.get(f"kivi.{stem}"), {"x": x, "bits": bits, "group": group}, backend)
    encoded = {kind: ENCODERS[kind](x, bits, group, backend="reference") for kind in (Keys, Values)}
    compare(registry.get("kivi.decode"), {"encoded": encoded[kind]}, backend)
    compare(registry.get("kivi.logits"), {"query": query, "keys": encoded[Keys]}, backend)
    compare(registry.get("kivi.decode_attention"), {"query": query, "keys": encoded[Keys], "values": encoded[Values],
                                                    "return_lse": True}, backend)


# --------------------------------------------------------------------------------------------------- decode and logits


@pytest.mark.parametrize("backend", BACKENDS)
@few
@given(kind=kinds, bits=kernel_bits, head_dim=head_dims, group=group_sizes, seed=seeds)
def test_stores_are_read_in_place(backend, kind, bits, head_dim, group, seed):
    encoded = codes_of(seed, kind, (2, 2, 128), bits, group, head_dim)
    strided = in_a_store(np.random.default_rng(seed), encoded)
    if backend in ("cuda", "native"):               # an upload would make it contiguous: a slice made on the device
        strided = tokens_of(on(backend, codes_of(seed + 1, kind, (2, 2, 384), bits, group, head_dim)), 128, 256)
        for target, source in zip(strided.arrays().values(), encoded.arrays().values()):
            target[...] = on(backend, source)
    calls = [lambda codes: kivi.decode(codes, backend=backend)]
    if kind is Keys:
        query = on(backend, normal(seed, (2, 4, head_dim)))
        calls.append(lambda codes: kivi.logits(query, codes, backend=backend))
    for call in calls:
        assert to_host(call(on(backend, encoded))).tobytes() == to_host(call(strided)).tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
def test_decode_gives_the_type_and_writes_where_it_is_told(backend, dtype):
    encoded = codes_of(0, Values, (1, 2, 5), 4)
    decoded = to_host(kivi.decode(on(backend, encoded), dtype=dtype, backend=backend))
    assert decoded.dtype == NUMPY_TYPE[dtype] and decoded.shape == (1, 2, 5, 64)
    out = on(backend, np.ones((1, 2, 5, 64), NUMPY_TYPE[dtype]))
    given_back = kivi.decode(on(backend, encoded), dtype=dtype, out=out, backend=backend)
    assert given_back is out and to_host(out).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_write_where_they_are_told(backend):
    inputs = case()
    out = on(backend, np.full((2, 6, 96), np.nan, np.float32))
    kivi.logits(on(backend, inputs["query"]), on(backend, inputs["keys"]), scale=0.5, out=out, backend=backend)
    decoded = np.repeat(reference.decode(inputs["keys"]), 3, axis=1)
    expected = 0.5 * np.einsum("bhd,bhtd->bht", inputs["query"].astype(np.float64), decoded)
    np.testing.assert_allclose(to_host(out), expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@given(tokens=st.integers(1, 400), splits=st.integers(1, 12), heads=groups, head_dim=head_dims, seed=seeds,
       schedule=schedules, key_bits=kernel_bits, value_bits=kernel_bits, group=group_sizes,
       dtype=st.sampled_from(sorted(NUMPY_TYPE)))
def test_any_number_of_splits_gives_the_result(backend, tokens, splits, heads, head_dim, seed, schedule, key_bits,
                                               value_bits, group, dtype):
    kernel = registry.get("kivi.decode_attention")
    whole = -(-tokens // group) * group
    inputs = {**case(seed, 1, 2, heads, whole, head_dim, dtype, key_bits, value_bits, group),
              "lengths": np.array([tokens], np.int32), "return_lse": True}
    expected = kernel.reference(**inputs)
    with loaders.simt_schedule(schedule):
        actual = attend(backend, inputs, splits=splits)
    kernel.agreement(inputs, expected, actual)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("key_bits, value_bits", [(2, 2), (4, 4)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_kernel_is_as_near_as_float16_is(backend, head_dim, key_bits, value_bits):
    """Far nearer than the bound of the worst case: 2^-11 for each rounding, random over hundreds of terms."""
    inputs = case(3, 1, 2, 4, 512, head_dim, key_bits=key_bits, value_bits=value_bits)
    expected = reference.decode_attention(**inputs, return_lse=False)
    actual = attend(backend, inputs, out=np.zeros(inputs["query"].shape, np.float32))
    assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@few
@given(seed=seeds, key_bits=kernel_bits, value_bits=kernel_bits, group=group_sizes)
def test_slices_of_stores_are_attended_in_place(backend, seed, key_bits, value_bits, group):
    inputs = case(seed, tokens=128, key_bits=key_bits, value_bits=value_bits, group=group)
    expected = attend(backend, inputs, return_lse=True)
    strided = {"query": on(backend, inputs["query"])}
    for side, kind in (("keys", Keys), ("values", Values)):
        bits = key_bits if kind is Keys else value_bits
        store = on(backend, codes_of(seed, kind, (3, 2, 384), bits, group))
        slots = tokens_of(store, 128, 256)
        strided[side] = trees.apply(lambda path, array: array[1:], slots)
        for target, source in zip(strided[side].arrays().values(), inputs[side].arrays().values()):
            target[...] = on(backend, source)
    actual = to_host(kivi.decode_attention(**strided, return_lse=True, backend=backend))
    for one, other in zip(expected, actual):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences_give_zeros(backend):
    output, lse = attend(backend, case(), lengths=np.array([0, 5], np.int32), return_lse=True)
    assert not output[0].any() and np.isneginf(lse[0]).all() and np.isfinite(lse[1]).all()
    output, lse = attend(backend, case(tokens=0), return_lse=True)
    assert not output.any() and np.isneginf(lse).all()
    assert attend(backend, case(batch=0)).shape == (0, 6, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_outside_the_store_are_clamped(backend):
    full = attend(backend, case())
    clamped = attend(backend, case(), lengths=np.array([1000, -3], np.int32))
    assert clamped[0].tobytes() == full[0].tobytes() and not clamped[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [32, 64])
def test_slots_beyond_a_length_are_not_read_into_a_result(backend, group):
    """A length within a group of keys, whose scale counts, and one at the end of a group."""
    lengths = np.array([41, 64], np.int32)
    inputs = case(tokens=128, group=group)
    expected = attend(backend, inputs, lengths=lengths, return_lse=True)
    for b, length in enumerate(lengths):
        for side in ("keys", "values"):
            inputs[side].codes[b, :, length:] ^= 0x5A5A5A5A
            first = -(-length // group) if side == "keys" else length
            inputs[side].scale[b, :, first:], inputs[side].minimum[b, :, first:] = np.inf, np.nan
    for one, other in zip(expected, attend(backend, inputs, lengths=lengths, return_lse=True)):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("part", ["scale", "minimum"])
def test_a_group_that_is_not_finite_stays_in_its_head(backend, side, part):
    inputs = case()
    clean = attend(backend, inputs)
    inputs[side].arrays()[part][0, 1, 1] = np.nan
    output = attend(backend, inputs)
    assert np.isnan(output[0, 3:].astype(np.float32)).all()
    assert output[0, :3].tobytes() == clean[0, :3].tobytes() and output[1].tobytes() == clean[1].tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
def test_parts_merge_to_the_whole(backend, dtype):
    """Attention over two ranges of a store, written into one buffer, merged: the attention over both."""
    inputs = case(tokens=160, dtype=dtype)
    query, keys, values = (on(backend, inputs[name]) for name in ("query", "keys", "values"))
    outputs = on(backend, np.full((2, 2, 6, 64), np.nan, np.float32))
    lses = on(backend, np.full((2, 2, 6), np.nan, np.float32))
    for part, (first, last) in enumerate(((0, 64), (64, 160))):
        kivi.decode_attention(query, tokens_of(keys, first, last), tokens_of(values, first, last), out=outputs[part],
                              lse=lses[part], backend=backend)
    merged = to_host(attention.merge(outputs, lses, backend=backend))
    whole = attend(backend, inputs, out=on(backend, np.zeros((2, 6, 64), np.float32)), return_lse=True)
    # Each weight is rounded to float16 in both, and again times its scale, relative to the values that it weighs.
    largest = abs(reference.decode(inputs["values"])).max()
    np.testing.assert_allclose(merged[0], whole[0], atol=2**-9 * largest)
    np.testing.assert_allclose(merged[1], whole[1], atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_and_exact_tokens_are_one_softmax(backend):
    keys, values, query = normal(0, (2, 2, 96, 64)), normal(1, (2, 2, 96, 64)), normal(2, (2, 6, 64))
    coded = {"query": query, "keys": reference.encode_keys(keys[:, :, :64], 4),
             "values": reference.encode_values(values[:, :, :64], 4)}
    outputs, lses = np.zeros((2, 2, 6, 64), np.float32), np.zeros((2, 2, 6), np.float32)
    outputs[0], lses[0] = attend(backend, coded, return_lse=True)
    outputs[1], lses[1] = attention.decode(query, keys[:, :, 64:], values[:, :, 64:], return_lse=True)
    merged, lse = attention.merge(outputs, lses)
    held = [np.concatenate([reference.decode(coded[name]), x[:, :, 64:]], axis=2)
            for name, x in (("keys", keys), ("values", values))]
    expected, expected_lse = exact_attention.decode(query, *held)
    np.testing.assert_allclose(merged, expected, atol=4e-3)        # roundings of weights of at most 1 to float16
    np.testing.assert_allclose(lse, expected_lse, atol=4e-3)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_workspace_is_left_ready_for_the_next_launch(backend):
    inputs = case(tokens=320)
    scratch = attention.workspace(2, 6, 64, "cuda" if backend in ("cuda", "native") else "cpu")
    first = attend(backend, inputs, splits=2, workspace=scratch)
    assert not scratch.tickets.to_host().any()
    assert first.tobytes() == attend(backend, inputs, splits=2, workspace=scratch).tobytes()
    with pytest.raises(ValueError, match="workspace: expected room for batch 2, q_heads 6, splits 200"):
        attend(backend, inputs, splits=200, workspace=attention.workspace(1, 1, 64, scratch.tickets.device))


@pytest.mark.parametrize("backend", [needs("cpu")])
def test_a_step_allocates_nothing_that_grows(backend):
    """With out=, lse= and a workspace."""
    inputs = case(batch=1, tokens=8192)
    out, lse = np.zeros((1, 6, 64), np.float16), np.zeros((1, 6), np.float32)
    options = dict(out=out, lse=lse, workspace=attention.workspace(1, 6, 64, "cpu"), backend=backend)
    kivi.decode_attention(**inputs, **options)                              # compiled and warm
    tracemalloc.start()
    kivi.decode_attention(**inputs, **options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 * 1024, f"{peak} bytes, where the keys take {inputs['keys'].nbytes}"


@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
def test_tensors_come_back_as_tensors(dtype):
    torch = pytest.importorskip("torch")
    x = torch.randn(1, 2, 32, 64).to(getattr(torch, dtype))
    encoded = {kind: ENCODERS[kind](x, 2) for kind in (Keys, Values)}
    for codes in encoded.values():
        assert all(isinstance(array, torch.Tensor) for array in codes.arrays().values())
        decoded = kivi.decode(codes, dtype=dtype)
        assert isinstance(decoded, torch.Tensor) and decoded.dtype == x.dtype
    query = x[:, :, 0].contiguous()
    assert isinstance(kivi.logits(query, encoded[Keys]), torch.Tensor)
    output, lse = kivi.decode_attention(query, encoded[Keys], encoded[Values], return_lse=True)
    assert isinstance(output, torch.Tensor) and output.dtype == x.dtype and lse.dtype == torch.float32




# -------------------------------------------------------------------------------------------------------------- errors

X, KEYS, VALUES = normal(0, (1, 2, 64, 64)), codes_of(0, Keys, (1, 2, 64)), codes_of(1, Values, (1, 2, 64))
QUERY = normal(1, (1, 4, 64))


def changed(encoded, **fields):
    return type(encoded)(**{**{name: getattr(encoded, name) for name in ("codes", "scale", "minimum", "bits", "group")},
                            **fields})


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: kivi.encode_keys(X.tolist(), 2), TypeError, "kivi.encode_keys: x: expected"),
    (lambda: kivi.encode_keys(X[0], 2), ValueError, "x: expected shape .*batch, kv_heads, tokens"),
    (lambda: kivi.encode_keys(X.astype(np.int8), 2), TypeError, "x: expected dtype float16, bfloat16 or float32"),
    (lambda: kivi.encode_keys(X, 3), ValueError, "bits: expected 2, 4 or 8, got 3"),
    (lambda: kivi.encode_keys(X, True), ValueError, "bits: expected 2, 4 or 8, got True"),
    (lambda: kivi.encode_values(X, 2, 48), ValueError, "group: expected a positive multiple of 32, got 48"),
    (lambda: kivi.encode_values(X, 2, 0), ValueError, "group: expected a positive multiple of 32, got 0"),
    (lambda: kivi.encode_keys(X[:, :, :33], 2), ValueError, "x: expected tokens in whole groups of 32, got 33 tokens"),
    (lambda: kivi.encode_keys(X[..., :48], 2), ValueError, "x: expected a head_dim that is a multiple of 32, got 48"),
    (lambda: kivi.encode_values(X, 2, 128), ValueError, "x: expected head_dim in whole groups of 128, got head_dim 64"),
    (lambda: kivi.encode_keys(X, 2, out=VALUES), TypeError, "out: expected Keys, got Values"),
    (lambda: kivi.encode_keys(X, 4, out=KEYS), ValueError, "out: expected codes of 4 bits in groups of 32, got 2 bits"),
    (lambda: kivi.encode_keys(X[:, :, :32], 2, out=KEYS), ValueError, "out.codes: expected shape"),
    (lambda: kivi.encode_keys(X, 2, out=changed(KEYS, minimum=KEYS.scale)), ValueError,
     "out.minimum: expected memory apart from out.scale"),
    (lambda: kivi.encode_keys(X, 2, backend="cudaa"), ValueError, "backend: expected one of .* did you mean cuda"),
    (lambda: kivi.decode(X), TypeError, "encoded: expected Keys or Values from kivi.encode_keys"),
    (lambda: kivi.decode(KEYS, dtype="int8"), ValueError, "dtype: expected one of float16, bfloat16, float32"),
    (lambda: kivi.decode(changed(KEYS, codes=KEYS.codes.astype(np.int32))), TypeError, "encoded.codes: expected dtype"),
    (lambda: kivi.decode(changed(KEYS, scale=KEYS.scale[:, :, :1])), ValueError, "encoded.scale: expected shape"),
    (lambda: kivi.decode(changed(KEYS, bits=8, codes=KEYS.codes[..., :3])), ValueError,
     "encoded.codes: expected a positive multiple of 8 words per token"),
    (lambda: kivi.decode(changed(KEYS, group=96)), ValueError, "encoded.codes: expected tokens in whole groups of 96"),
    (lambda: kivi.decode(changed(VALUES, group=96)), ValueError,
     "encoded.codes: expected head_dim in whole groups of 96"),
    (lambda: kivi.decode(changed(KEYS, minimum=np.zeros((2, 2, 2, 64), np.float16)[:1, ::2])), ValueError,
     "encoded.minimum: expected"),
    (lambda: kivi.decode(changed(KEYS, codes=np.zeros((1, 2, 128, 4), np.uint32)[:, :, ::2])), ValueError,
     "encoded.codes: expected rows of a head that follow one another"),
    (lambda: kivi.logits(QUERY, VALUES), TypeError, "keys: expected Keys from kivi.encode_keys, got Values"),
    (lambda: kivi.logits(QUERY[:, :3], KEYS), ValueError, "query: expected q_heads a positive multiple of"),
    (lambda: kivi.logits(QUERY, KEYS, scale=np.nan), ValueError, "scale: expected a finite number"),
    (lambda: kivi.decode_attention(QUERY[..., :32].copy(), KEYS, VALUES), ValueError,
     "keys.codes: expected 2 words for head_dim 32, got 4"),
    (lambda: kivi.decode_attention(QUERY, KEYS, KEYS), TypeError, "values: expected Values .* got Keys"),
    (lambda: kivi.decode_attention(QUERY, KEYS, tokens_of(VALUES, 0, 63)), ValueError, "values.codes: expected shape"),
    (lambda: kivi.decode_attention(QUERY, KEYS, VALUES, splits=0), ValueError, "splits: expected an integer from 1"),
    (lambda: kivi.decode_attention(QUERY, KEYS, VALUES, lengths=np.zeros(2, np.int32)), ValueError,
     "lengths: expected shape"),
])
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


WIDE = codes_of(3, Keys, (1, 2, 64), 2, 32, 96), codes_of(4, Values, (1, 2, 64), 2, 32, 96)


@pytest.mark.parametrize("backend", [needs("simt")])
@pytest.mark.parametrize(("call", "message"), [
    (lambda: kivi.encode_keys(X, 8, backend="simt"), "x: expected 2 or 4 bits on backend 'simt'.*, got 8 bits"),
    (lambda: kivi.encode_keys(X[..., :32], 2, backend="simt"), "x: expected head_dim 64, 128 or 256 .*, got 32"),
    (lambda: kivi.encode_keys(normal(0, (1, 1, 96, 64)), 2, 96, backend="simt"), "x: expected groups of 32, 64 or 128"),
    (lambda: kivi.encode_keys(normal(0, (1, 2, 64, 80))[..., 4:68], 2, backend="simt"),
     "x: expected rows at multiples of 16 bytes"),
    (lambda: kivi.decode(codes_of(0, Keys, (1, 1, 32), 8), backend="simt"), "encoded: expected 2 or 4 bits"),
    (lambda: kivi.logits(normal(0, (1, 34, 64)), KEYS, backend="simt"), "at most 16 query heads per KV head"),
    (lambda: kivi.decode_attention(normal(0, (1, 4, 96)), *WIDE, backend="simt"), "head_dim 64, 128 or 256"),
    (lambda: kivi.decode_attention(QUERY, tokens_of(KEYS, 0, 32), tokens_of(codes_of(1, Values, (1, 2, 67)), 3, 35),
                                   backend="simt"), "values.scale: expected heads that begin at multiples of 16 bytes"),
])
def test_kernels_say_what_they_do_not_take(backend, call, message):
    with pytest.raises(ValueError, match=message):
        call()
