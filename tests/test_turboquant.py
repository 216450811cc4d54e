"""TurboQuant operators: stores, edges and errors that drawn inputs of test_kernels.py do not single out."""
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import needs
from kvbench import arrays, loaders, registry, trees
from kvbench.ops import attention, turboquant
from kvbench.reference import planes as bit_planes
from kvbench.reference import turboquant as reference
from kvbench.reference.planes import Planes
from kvbench.reference.rotation import haar, hadamard
from kvbench.reference.turboquant import Encoded
from kvbench.verify import compare, to_host
from strategies.arrays import NUMPY_TYPE, fill, groups, head_dims, schedules, seeds
from strategies.turboquant import in_a_store, random_planes, random_scales

BACKENDS = [needs(backend) for backend in ("reference", "cpu", "simt", "cuda", "native")]
CUDA_BACKENDS = [needs(backend) for backend in ("simt", "cuda", "native")]
HOST_BACKENDS = [needs(backend) for backend in ("reference", "cpu")]
all_bits = st.integers(1, 8)
kernel_bits = st.integers(1, 4)


def on(backend, tree):
    """NumPy arrays, in containers too, where the backend can reach them."""
    if backend not in ("cuda", "native"):
        return tree
    return trees.apply(lambda path, array: arrays.upload(array, "cuda").give(), tree)


def normal(seed, shape, dtype="float16"):
    return fill(np.random.default_rng(seed), shape, dtype, "normal")


def random_codes(seed, shape, bits, head_dim=64, scales="normal"):
    rng = np.random.default_rng(seed)
    return Encoded(random_planes(rng, shape, bits, head_dim), random_scales(rng, shape, scales), head_dim)


def case(seed=0, batch=2, kv_heads=2, group=3, tokens=70, head_dim=64, dtype="float16", key_bits=3, value_bits=3):
    shape = (batch, kv_heads, tokens)
    return {"query": normal(seed, (batch, kv_heads * group, head_dim), dtype),
            "keys": random_codes(seed + 1, shape, key_bits, head_dim),
            "values": random_codes(seed + 2, shape, value_bits, head_dim),
            "key_rotation": hadamard(head_dim, seed), "value_rotation": hadamard(head_dim, seed + 1)}


def attend(backend, inputs, **options):
    """decode_attention on the backend, results on the host."""
    placed = {name: on(backend, value) if name in ("query", "keys", "values", "lengths", "key_mean") else value
              for name, value in {**inputs, **options}.items()}
    return to_host(turboquant.decode_attention(**placed, backend=backend))


def encode(backend, x, rotation, bits, **options):
    options = {name: on(backend, value) if name in ("mean", "out") else value for name, value in options.items()}
    return to_host(turboquant.encode(on(backend, x), rotation, bits, **options, backend=backend))


def named(encoded):
    return {**encoded.planes.arrays(), "scale": encoded.scale}


def tokens_of(encoded, tokens):
    """encoded[:, :, tokens], of the same memory."""
    return Encoded(Planes.of({name: plane[:, :, tokens] for name, plane in encoded.planes.arrays().items()}),
                   encoded.scale[:, :, tokens], encoded.head_dim)


def assert_same(one, other):
    one, other = named(one), named(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name


# ------------------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("backend", BACKENDS)
@given(bits=all_bits, head_dim=head_dims, dtype=st.sampled_from(sorted(NUMPY_TYPE)), seed=seeds, data=st.data())
def test_appending_equals_encoding_at_once(backend, bits, head_dim, dtype, seed, data):
    """Tokens written piece by piece into a store, in place: the bytes of one call, and nothing beside them changes."""
    tokens, capacity, start = data.draw(st.integers(1, 12)), 20, data.draw(st.integers(0, 8))
    x, rotation = normal(seed, (2, 3, tokens, head_dim), dtype), hadamard(head_dim, seed)
    mean = normal(seed + 1, (2, 3, head_dim), "float32") if data.draw(st.booleans()) else None
    expected = encode(backend, x, rotation, bits, mean=mean)
    store = random_codes(seed, (3, 3, capacity), bits, head_dim)
    shadow = {name: array.copy() for name, array in named(store).items()}
    for name, array in named(expected).items():
        shadow[name][1:, :, start:start + tokens] = array
    store, x, mean = on(backend, store), on(backend, x), on(backend, mean)
    cuts = sorted({0, tokens, *data.draw(st.lists(st.integers(0, tokens), max_size=4))})
    for first, last in itertools.pairwise(cuts):
        slots = Encoded(*trees.apply(lambda path, array: array[1:, :, start + first:start + last],
                                     (store.planes, store.scale)), head_dim)
        turboquant.encode(x[:, :, first:last], rotation, bits, mean=mean, out=slots, backend=backend)
    for name, array in named(to_host(store)).items():
        assert array.tobytes() == shadow[name].tobytes(), name


@pytest.mark.parametrize("backend", BACKENDS)
@given(bits=all_bits, seed=seeds, dtype=st.sampled_from(sorted(NUMPY_TYPE)))
def test_strided_tokens_are_read_in_place(backend, bits, seed, dtype):
    """The [batch, tokens, kv_heads, head_dim] layout of most models, and a slice of a larger cache."""
    rotation, x = hadamard(64, seed), normal(seed, (2, 3, 9, 64), dtype)
    expected = encode(backend, x, rotation, bits)
    by_token = on(backend, np.ascontiguousarray(x.swapaxes(1, 2))).swapaxes(1, 2)
    larger = np.full((3, 4, 20, 64), np.nan, x.dtype)
    larger[1:, 1:, 5:14] = x
    for strided in (by_token, on(backend, larger)[1:, 1:, 5:14]):
        assert_same(to_host(turboquant.encode(strided, rotation, bits, backend=backend)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(bits=all_bits, head_dim=head_dims, seed=seeds, power=st.integers(-6, 6))
def test_codes_do_not_see_powers_of_two_and_signs_flip(backend, bits, head_dim, seed, power):
    x, rotation = normal(seed, (1, 2, 9, head_dim), "float32"), hadamard(head_dim, seed)
    one = encode(backend, x, rotation, bits)
    other = encode(backend, x * np.float32(2.0**power), rotation, bits)
    assert other.scale.tobytes() == (one.scale * np.float16(2.0**power)).tobytes()
    for name, plane in one.planes.arrays().items():
        assert plane.tobytes() == other.planes.arrays()[name].tobytes(), name
    flipped = encode(backend, -x, rotation, bits)
    assert (flipped.planes.sign == ~one.planes.sign).all() and flipped.scale.tobytes() == one.scale.tobytes()
    for name, plane in one.planes.arrays().items():
        assert name == "sign" or plane.tobytes() == flipped.planes.arrays()[name].tobytes(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", reference.SCALE_MODES)
@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
def test_special_tokens(backend, mode, dtype):
    """Zeros, NaN and Inf: codes 0, and 0 or NaN as the scale.  No token touches another."""
    x = normal(0, (1, 2, 8, 64), dtype)
    clean = encode(backend, x, hadamard(64, 1), 4, scale_mode=mode)
    x[0, 0, 1], x[0, 0, 3, 17], x[0, 1, 5, 63], x[0, 1, 6, 0] = 0, np.nan, np.inf, -np.inf
    special = [(0, 0, 1), (0, 0, 3), (0, 1, 5), (0, 1, 6)]
    actual = encode(backend, x, hadamard(64, 1), 4, scale_mode=mode)
    assert actual.scale[special[0]] == 0 and all(np.isnan(actual.scale[token]) for token in special[1:])
    for name, array in named(actual).items():
        expected = named(clean)[name].copy()
        for token in special:
            assert name == "scale" or not array[token].any()
            expected[token] = array[token]
        assert array.tobytes() == expected.tobytes(), name
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        encode(backend, x, hadamard(64, 1), 4, check_finite=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_saturate_and_may_be_subnormal(backend):
    x = np.ones((1, 1, 3, 64), np.float32) * np.array([1e6, 2.0**-20, 1e-30], np.float32)[:, None]
    scale = encode(backend, x, hadamard(64, 0), 8).scale[0, 0]
    assert scale[0] == 65504 and 2.0**-21 < scale[1] < 2.0**-19 and scale[2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_length_of_a_vector_is_too_small_or_too_large(backend, dtype):
    """The squares of these leave the range of float32; the codes must be those of the same vector near 1."""
    x, rotation = normal(3, (1, 1, 4, 64), dtype), hadamard(64, 3)
    expected = encode(backend, x, rotation, 4)
    for power in (-100, 100):
        actual = encode(backend, (x.astype(np.float32) * np.float32(2.0**power)).astype(x.dtype), rotation, 4)
        for name, plane in expected.planes.arrays().items():
            assert plane.tobytes() == actual.planes.arrays()[name].tobytes(), name
        assert (actual.scale == (0 if power < 0 else 65504)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, bits=all_bits)
def test_a_mean_is_shared_or_of_each_sequence(backend, seed, bits):
    rotation, x = hadamard(64, seed), normal(seed, (3, 2, 5, 64), "float32")
    shared = normal(seed + 1, (2, 64), "float32")
    one = encode(backend, x, rotation, bits, mean=shared)
    assert_same(one, encode(backend, x, rotation, bits, mean=np.broadcast_to(shared, (3, 2, 64)).copy()))
    assert_same(one, encode(backend, x - shared[:, None], rotation, bits))
    of_each = normal(seed + 2, (3, 2, 64), "float32")
    assert_same(encode(backend, x, rotation, bits, mean=of_each),
                encode(backend, x - of_each[:, :, None], rotation, bits))


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize("size, head_dim", [(32, 8), (32, 32), (64, 33), (96, 80), (96, 96), (128, 100)])
def test_other_sizes_are_padded(backend, size, head_dim):
    rotation = haar(size, 5) if size == 96 else hadamard(size, 5)
    for bits in range(1, 9):
        inputs = {"x": normal(bits, (2, 2, 7, head_dim)), "rotation": rotation, "bits": bits}
        compare(registry.get("turboquant.encode"), inputs, backend)
        encoded = reference.encode(**inputs)
        query = normal(bits, (2, 6, head_dim))
        compare(registry.get("turboquant.decode"), {"encoded": encoded, "rotation": rotation}, backend)
        compare(registry.get("turboquant.logits"), {"query": query, "encoded": encoded, "rotation": rotation}, backend)
        compare(registry.get("turboquant.decode_attention"),
                {"query": query, "keys": encoded, "values": encoded, "key_rotation": rotation,
                 "value_rotation": rotation, "return_lse": True}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_haar_rotations_serve_as_well(backend, head_dim):
    rotation, other = haar(head_dim, 1), haar(head_dim, 2)
    inputs = {"x": normal(0, (1, 2, 7, head_dim)), "rotation": rotation, "bits": 3}
    compare(registry.get("turboquant.encode"), inputs, backend)
    encoded, query = reference.encode(**inputs), normal(1, (1, 4, head_dim))
    compare(registry.get("turboquant.decode"), {"encoded": encoded, "rotation": rotation}, backend)
    compare(registry.get("turboquant.logits"), {"query": query, "encoded": encoded, "rotation": rotation}, backend)
    compare(registry.get("turboquant.decode_attention"),
            {"query": query, "keys": encoded, "values": encoded, "key_rotation": rotation, "value_rotation": other,
             "return_lse": True}, backend)


# --------------------------------------------------------------------------------------------------- decode and logits


@pytest.mark.parametrize("backend", BACKENDS)
@given(bits=all_bits, head_dim=head_dims, seed=seeds)
def test_stores_are_decoded_in_place(backend, bits, head_dim, seed):
    rng = np.random.default_rng(seed)
    encoded = random_codes(seed, (2, 2, 9), bits, head_dim)
    strided = in_a_store(rng, encoded)
    rotation, query = hadamard(head_dim, seed), normal(seed, (2, 4, head_dim))
    if backend in ("cuda", "native"):               # an upload would make it contiguous: a slice made on the device
        strided = tokens_of(on(backend, random_codes(seed, (2, 2, 14), bits, head_dim)), slice(3, 12))
        for target, source in zip(named(strided).values(), named(encoded).values()):
            target[...] = on(backend, source)
    for function, arguments in ((turboquant.decode, (rotation,)), (turboquant.logits, (rotation,))):
        first = () if function is turboquant.decode else (on(backend, query),)
        one, other = (to_host(function(*first, codes, *arguments, backend=backend))
                      for codes in (on(backend, encoded), strided))
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
def test_decode_gives_the_type_and_writes_where_it_is_told(backend, dtype):
    encoded, rotation = random_codes(0, (1, 2, 5), 3), hadamard(64, 0)
    encoded.scale[0, 0, 2], encoded.scale[0, 1, 3] = 0, np.nan
    decoded = to_host(turboquant.decode(on(backend, encoded), rotation, dtype=dtype, backend=backend))
    assert decoded.dtype == NUMPY_TYPE[dtype] and decoded.shape == (1, 2, 5, 64)
    assert not decoded[0, 0, 2].any() and np.isnan(decoded[0, 1, 3].astype(np.float32)).all()
    assert np.isfinite(np.delete(decoded[0, 1].astype(np.float32), 3, axis=0)).all()
    out = on(backend, np.ones((1, 2, 5, 64), NUMPY_TYPE[dtype]))
    given_back = turboquant.decode(on(backend, encoded), rotation, dtype=dtype, out=out, backend=backend)
    assert given_back is out and to_host(out).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@given(bits=all_bits, group=groups, seed=seeds, dtype=st.sampled_from(sorted(NUMPY_TYPE)))
def test_logits_are_the_products_with_what_is_decoded(backend, bits, group, seed, dtype):
    encoded, rotation = random_codes(seed, (2, 2, 9), bits), hadamard(64, seed)
    query = normal(seed, (2, 2 * group, 64), dtype)
    out = on(backend, np.full((2, 2 * group, 9), np.nan, np.float32))
    turboquant.logits(on(backend, query), on(backend, encoded), rotation, scale=0.5, out=out, backend=backend)
    decoded = np.repeat(reference.decode(encoded, rotation), group, axis=1)
    expected = 0.5 * np.einsum("bhd,bhtd->bht", query.astype(np.float64), decoded)
    np.testing.assert_allclose(to_host(out), expected, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@given(tokens=st.integers(1, 400), splits=st.integers(1, 12), group=groups, head_dim=head_dims, seed=seeds,
       schedule=schedules, key_bits=kernel_bits, value_bits=kernel_bits, dtype=st.sampled_from(sorted(NUMPY_TYPE)))
def test_any_number_of_splits_gives_the_result(backend, tokens, splits, group, head_dim, seed, schedule, key_bits,
                                               value_bits, dtype):
    kernel = registry.get("turboquant.decode_attention")
    inputs = {**case(seed, 1, 2, group, tokens, head_dim, dtype, key_bits, value_bits), "return_lse": True}
    expected = kernel.reference(**inputs)
    with loaders.simt_schedule(schedule):
        actual = attend(backend, inputs, splits=splits)
    kernel.agreement(inputs, expected, actual)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, key_bits=kernel_bits, value_bits=kernel_bits)
def test_slices_of_stores_are_attended_in_place(backend, seed, key_bits, value_bits):
    inputs = case(seed, tokens=40, key_bits=key_bits, value_bits=value_bits)
    expected = attend(backend, inputs, return_lse=True)
    strided = dict(inputs)
    for side in ("keys", "values"):
        codes, capacity = inputs[side], 64 if side == "keys" else 51
        store = on(backend, random_codes(seed, (3, 2, capacity), codes.bits, scales="NaN"))
        strided[side] = Encoded(*trees.apply(lambda path, array: array[1:, :, 3:43], (store.planes, store.scale)), 64)
        for target, source in zip(named(strided[side]).values(), named(codes).values()):
            target[...] = on(backend, source)
    strided["query"] = on(backend, inputs["query"])
    actual = to_host(turboquant.decode_attention(**strided, return_lse=True, backend=backend))
    for one, other in zip(expected, actual):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences_give_zeros(backend):
    mean = normal(9, (2, 2, 64), "float32")
    output, lse = attend(backend, case(), lengths=np.array([0, 5], np.int32), key_mean=mean, return_lse=True)
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
def test_slots_beyond_a_length_are_not_read_into_a_result(backend):
    lengths = np.array([33, 64], np.int32)
    expected = attend(backend, case(), lengths=lengths, return_lse=True)
    inputs = case()
    for b, length in enumerate(lengths):
        for side in ("keys", "values"):
            for name, array in named(inputs[side]).items():
                array[b, :, length:] = np.nan if name == "scale" else 0xFFFFFFFF
    for one, other in zip(expected, attend(backend, inputs, lengths=lengths, return_lse=True)):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_token_that_is_not_finite_stays_in_its_head(backend, side):
    inputs = case()
    clean = attend(backend, inputs)
    inputs[side].scale[0, 1, 33] = np.nan
    output = attend(backend, inputs)
    assert np.isnan(output[0, 3:]).all()
    assert output[0, :3].tobytes() == clean[0, :3].tobytes() and output[1].tobytes() == clean[1].tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 64), (2, 2, 64)])
def test_a_key_mean_moves_the_log_sum_exp_alone(backend, shape):
    """lse of k - mean plus scale <q, mean> is that of k; the weights do not see it."""
    inputs, mean = case(), normal(5, shape, "float32")
    output, lse = attend(backend, inputs, return_lse=True, scale=0.3)
    again, moved = attend(backend, inputs, return_lse=True, scale=0.3, key_mean=mean)
    products = 0.3 * np.einsum("bgrd,bgd->bgr", inputs["query"].astype(np.float64).reshape(2, 2, 3, 64),
                               np.broadcast_to(mean, (2, 2, 64)).astype(np.float64)).reshape(2, 6)
    assert output.tobytes() == again.tobytes()
    np.testing.assert_allclose(moved, lse + products, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
def test_parts_merge_to_the_whole(backend, dtype):
    """Attention over two ranges of a store, written into one buffer, merged: the attention over both."""
    inputs = case(tokens=100, dtype=dtype)
    query, keys, values = (on(backend, inputs[name]) for name in ("query", "keys", "values"))
    outputs = on(backend, np.full((2, 2, 6, 64), np.nan, np.float32))
    lses = on(backend, np.full((2, 2, 6), np.nan, np.float32))
    for part, (first, last) in enumerate(((0, 37), (37, 100))):
        turboquant.decode_attention(query, tokens_of(keys, slice(first, last)), tokens_of(values, slice(first, last)),
                                    inputs["key_rotation"], inputs["value_rotation"], out=outputs[part],
                                    lse=lses[part], backend=backend)
    merged = to_host(attention.merge(outputs, lses, backend=backend))
    whole = attend(backend, inputs, out=on(backend, np.zeros((2, 6, 64), np.float32)), return_lse=True)
    # Each weight is rounded to float16 in both, relative to the values that it weighs.
    largest = abs(reference.decode(inputs["values"], inputs["value_rotation"])).max()
    np.testing.assert_allclose(merged[0], whole[0], atol=2**-10 * largest)
    np.testing.assert_allclose(merged[1], whole[1], atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_centred_codes_and_exact_tokens_are_one_softmax(backend):
    """Half of the keys as 8-bit (4-bit where kernels take no more) codes less a mean, half exact."""
    bits = 8 if backend in ("reference", "cpu") else 4
    rotations = hadamard(64, 1), hadamard(64, 2)
    mean = 2 * normal(7, (2, 64), "float32")
    keys = (normal(0, (2, 2, 60, 64), "float32") + mean[:, None]).astype(np.float16)
    values, query = normal(1, (2, 2, 60, 64)), normal(2, (2, 6, 64))
    outputs, lses = np.zeros((2, 2, 6, 64), np.float32), np.zeros((2, 2, 6), np.float32)
    coded = {"query": query, "keys": reference.encode(keys[:, :, :30], rotations[0], bits, mean=mean),
             "values": reference.encode(values[:, :, :30], rotations[1], bits),
             "key_rotation": rotations[0], "value_rotation": rotations[1]}
    outputs[0], lses[0] = attend(backend, coded, key_mean=mean, return_lse=True)
    outputs[1], lses[1] = attention.decode(query, keys[:, :, 30:], values[:, :, 30:], return_lse=True)
    merged, lse = attention.merge(outputs, lses)
    expected, expected_lse = attention.decode(query, keys, values, return_lse=True, backend="reference")
    error = np.linalg.norm(merged - expected) / np.linalg.norm(expected)
    # The errors of a code are sqrt(D(b)), 0.0064 and 0.0975, of each token; a mean left out would be off by e^(q mean).
    assert error < (0.02 if bits == 8 else 0.25)
    assert abs(lse - expected_lse).max() < (0.05 if bits == 8 else 0.5)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_workspace_is_left_ready_for_the_next_launch(backend):
    inputs = case(tokens=300)
    scratch = attention.workspace(2, 6, 64, "cuda" if backend in ("cuda", "native") else "cpu")
    first = attend(backend, inputs, splits=2, workspace=scratch)
    assert not scratch.tickets.to_host().any()
    assert first.tobytes() == attend(backend, inputs, splits=2, workspace=scratch).tobytes()
    with pytest.raises(ValueError, match="workspace: expected room for batch 2, q_heads 6, splits 200"):
        attend(backend, inputs, splits=200, workspace=attention.workspace(1, 1, 64, scratch.tickets.device))


@given(key_bits=all_bits, value_bits=all_bits, tokens=st.integers(0, 300), group=groups, seed=seeds,
       dtype=st.sampled_from(sorted(NUMPY_TYPE)))
def test_the_cpu_attends_to_any_number_of_bits(key_bits, value_bits, tokens, group, seed, dtype):
    inputs = case(seed, 1, 2, group, tokens, 64, dtype, key_bits, value_bits)
    compare(registry.get("turboquant.decode_attention"), {**inputs, "return_lse": True}, "cpu")


@pytest.mark.parametrize("backend", [needs("cpu")])
def test_a_step_allocates_nothing_that_grows(backend):
    """With out=, lse= and a workspace; a GPU step is captured in a graph below."""
    inputs = case(batch=1, tokens=8000)
    out, lse = np.zeros((1, 6, 64), np.float16), np.zeros((1, 6), np.float32)
    options = dict(out=out, lse=lse, workspace=attention.workspace(1, 6, 64, "cpu"), backend=backend)
    turboquant.decode_attention(**inputs, **options)                        # compiled and warm
    tracemalloc.start()
    turboquant.decode_attention(**inputs, **options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 * 1024, f"{peak} bytes, where the keys take {inputs['keys'].nbytes}"


@pytest.mark.parametrize("dtype", sorted(NUMPY_TYPE))
def test_tensors_come_back_as_tensors(dtype):
    torch = pytest.importorskip("torch")
    x, rotation = torch.randn(1, 2, 9, 64).to(getattr(torch, dtype)), hadamard(64, 0)
    encoded = turboquant.encode(x, rotation, 3)
    assert all(isinstance(array, torch.Tensor) for array in named(encoded).values())
    decoded = turboquant.decode(encoded, rotation, dtype=dtype)
    assert isinstance(decoded, torch.Tensor) and decoded.dtype == x.dtype
    query = x[:, :, 0].contiguous()
    assert isinstance(turboquant.logits(query, encoded, rotation), torch.Tensor)
    output, lse = turboquant.decode_attention(query, encoded, encoded, rotation, rotation, return_lse=True)
    assert isinstance(output, torch.Tensor) and output.dtype == x.dtype and lse.dtype == torch.float32


# -------------------------------------------------------------------------------------------------------------- errors

X, TURN = normal(0, (1, 2, 5, 64)), hadamard(64, 0)
CODES = random_codes(0, (1, 2, 5), 3)
WIDER = Encoded(Planes.of({name: np.concatenate([plane, plane], axis=-1)
                           for name, plane in CODES.planes.arrays().items()}), CODES.scale, 64)
SPREAD = Encoded(CODES.planes, np.zeros((1, 2, 10), np.float16)[:, :, ::2], 64)
APART = Encoded(Planes.of({**CODES.planes.arrays(), "sign": np.zeros((1, 2, 9, 2), np.uint32)[:, :, :5]}),
                CODES.scale, 64)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(x=X.tolist()), TypeError, "turboquant.encode: x: expected"),
    (dict(x=X[0]), ValueError, "x: expected shape .*batch, kv_heads, tokens"),
    (dict(x=X.astype(np.int8)), TypeError, "x: expected dtype float16, bfloat16 or float32, got int8"),
    (dict(rotation="hadamard"), TypeError, "rotation: expected a Rotation"),
    (dict(rotation=hadamard(32, 0)), ValueError, "rotation: expected .* at least .*64, got 32"),
    (dict(bits=0), ValueError, "bits: expected an integer from 1 to 8, got 0"),
    (dict(bits=9), ValueError, "bits: expected an integer from 1 to 8, got 9"),
    (dict(bits=2.5), ValueError, "bits: expected an integer from 1 to 8, got 2.5"),
    (dict(scale_mode="NC"), ValueError, "scale_mode: expected one of nc, plain, mse, unbiased"),
    (dict(mean=np.zeros((3, 64), np.float32)), ValueError, r"mean: expected \[kv_heads, head_dim\] = \[2, 64\] or"),
    (dict(mean=np.zeros((1, 64), np.float64)), TypeError, "mean: expected dtype float32, got float64"),
    (dict(mean=np.zeros((2, 2, 64), np.float32)), ValueError, r"mean: expected .*, got \[2, 2, 64\]"),
    (dict(mean=np.full((2, 64), np.nan, np.float32)), ValueError, "mean: expected finite numbers"),
    (dict(out=CODES.planes), TypeError, "out: expected an Encoded"),
    (dict(out=random_codes(0, (1, 2, 6), 3)), ValueError, "out.*: expected shape"),
    (dict(out=random_codes(0, (1, 2, 5), 4)), ValueError, "out.*: expected .*3"),
    (dict(out=WIDER), ValueError, "out.*: expected shape"),
    (dict(out=SPREAD), ValueError, "out.*scale: expected"),
    (dict(out=APART), ValueError, "out.*: expected"),
    (dict(backend="cudaa"), ValueError, "backend: expected one of .* got 'cudaa'; did you mean cuda"),
])
def test_encode_errors_name_the_argument(arguments, error, message):
    before = {name: array.copy() for name, array in named(CODES).items()}
    with pytest.raises(error, match=message):
        turboquant.encode(**{"x": X, "rotation": TURN, "bits": 3, **arguments})
    assert all(array.tobytes() == before[name].tobytes() for name, array in named(CODES).items())


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(encoded=CODES.planes), TypeError, "encoded: expected an Encoded"),
    (dict(encoded=WIDER), ValueError, "encoded.*: expected shape"),
    (dict(encoded=SPREAD), ValueError, "encoded.*scale: expected"),
    (dict(encoded=APART), ValueError, "encoded.*: expected"),
    (dict(encoded=Encoded(CODES.planes, CODES.scale.astype(np.float32), 64)), TypeError,
     "scale: expected dtype float16"),
    (dict(encoded=Encoded(CODES.planes, CODES.scale, 65)), ValueError, "rotation: expected"),
    (dict(rotation=hadamard(128, 0)), ValueError, "encoded.*: expected shape"),
    (dict(rotation=TURN.signs), TypeError, "rotation: expected a Rotation"),
])
def test_decode_and_logits_errors_name_the_argument(arguments, error, message):
    good = {"encoded": CODES, "rotation": TURN}
    with pytest.raises(error, match=f"turboquant.decode: .*{message}"):
        turboquant.decode(**{**good, **arguments})
    with pytest.raises(error, match=f"turboquant.logits: .*{message}"):
        turboquant.logits(normal(0, (1, 4, 64)), **{**good, **arguments})


GOOD = case(batch=1, tokens=5)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(query=GOOD["query"].tolist()), TypeError, "turboquant.decode_attention: query: expected"),
    (dict(query=GOOD["query"][0]), ValueError, r"query: expected shape \[batch, q_heads, head_dim\], got \[6, 64\]"),
    (dict(query=GOOD["query"][:, :5]), ValueError,
     "query: expected q_heads a positive multiple of kv_heads = 2, got 5"),
    (dict(keys=GOOD["keys"].planes), TypeError, "keys: expected an Encoded"),
    (dict(keys=SPREAD), ValueError, "keys.*: expected"),
    (dict(values=random_codes(0, (1, 2, 4), 3)), ValueError,
     "values.*: expected shape .* tokens = 5 as in keys.*, got"),
    (dict(values=random_codes(0, (1, 2, 5), 3, 128), value_rotation=hadamard(128, 0)), ValueError,
     "values: expected head_dim 64 .*, got 128"),
    (dict(key_rotation=hadamard(128, 0)), ValueError, "keys.sign: expected shape .*4.*, got .*2"),
    (dict(value_rotation=None), TypeError, "value_rotation: expected a Rotation"),
    (dict(key_mean=np.zeros((2, 65), np.float32)), ValueError, "key_mean: expected shape"),
    (dict(lengths=np.zeros(1, np.int64)), TypeError, "lengths: expected dtype int32, got int64"),
    (dict(lengths=np.zeros(2, np.int32)), ValueError, "lengths: expected shape .* with batch = 1 as in query, got"),
    (dict(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
    (dict(splits=0), ValueError, "splits: expected an integer from 1 to 256, got 0"),
    (dict(out=np.zeros((1, 6, 64), np.float64)), TypeError, "out: expected dtype float16 or float32, got float64"),
    (dict(lse=np.zeros((1, 5), np.float32)), ValueError, r"lse: expected shape \[1, 6\]"),
    (dict(backend="gpu"), ValueError, "backend: expected one of"),
])
def test_attention_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        turboquant.decode_attention(**{**GOOD, **arguments})


@pytest.mark.parametrize("backend", [needs("simt")])
def test_cuda_kernels_say_what_they_take(backend):
    with pytest.raises(ValueError, match="at most 16 query heads per KV head on backend 'simt', got 17"):
        attend(backend, case(kv_heads=1, group=17))
    for name in ("key_bits", "value_bits"):
        with pytest.raises(ValueError, match=f"{name.split('_')[0]}s.*: expected .*4.* bits.*got 5"):
            attend(backend, case(**{name: 5}))
    with pytest.raises(ValueError, match="expected head_dim 64, 128 or 256 on backend 'simt', got 32"):
        turboquant.encode(X[..., :32].copy(), hadamard(32, 0), 3, backend=backend)
    with pytest.raises(ValueError, match="expected .*64, 128 or 256.* on backend 'simt'"):
        turboquant.encode(X[..., :33].copy(), TURN, 3, backend=backend)
    assert bit_planes.words(3, 64) == {name: plane.shape[-1] for name, plane in CODES.planes.arrays().items()}


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
def test_a_decode_step_runs_in_a_cuda_graph_on_the_callers_stream():
    """A token appended by out= and the attention over the store, captured once and replayed."""
    cupy = pytest.importorskip("cupy")
    inputs = case(tokens=300, head_dim=128)
    placed = {name: trees.apply(lambda path, array: cupy.asarray(array), inputs[name])
              for name in ("query", "keys", "values")}
    turns = {name: inputs[name] for name in ("key_rotation", "value_rotation")}
    token = cupy.asarray(normal(8, (2, 2, 1, 128)))
    out, scratch = cupy.empty_like(placed["query"]), attention.workspace(2, 6, 128, "cuda")

    def step():
        turboquant.encode(token, turns["key_rotation"], 3, out=tokens_of(placed["keys"], slice(299, 300)))
        turboquant.decode_attention(**placed, **turns, out=out, workspace=scratch)

    step()
    expected = out.get()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        for _ in range(3):
            out.fill(0)
            graph.launch(stream)
            stream.synchronize()
            assert out.get().tobytes() == expected.tobytes()
