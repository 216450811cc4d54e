"""The operators of Block-GTQ, its codec, its preset: any allocation in one call, what is refused, stores, quality."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import needs
from kvbench import caches, codecs, data, registry
from kvbench.ops import block_gtq, block_gtq_launch, turboquant
from kvbench.ops.block_gtq_records import random_keys
from kvbench.reference import block_gtq as reference
from kvbench.reference.block_gtq import Encoded, Plan
from kvbench.reference.rotation import hadamard
from kvbench.reference.turboquant import codebook_for
from strategies.block_gtq import kernel_head_dims, plans
from strategies.turboquant import in_a_store, random_planes, random_scales

# Those that work in host memory; the others agree with the reference in test_kernels.py.
BACKENDS = [needs(backend) for backend in ("reference", "cpu", "simt")]
SEEDS = st.integers(0, 2**32)


def generator(seed):
    return np.random.default_rng([seed, 5])


def two_heads(rates=((4, 3, 3, 2), (5, 4, 2, 1)), head_dim=64, **options):
    """A plan with tiles of 16 of these bits in its two heads."""
    return Plan(np.repeat(np.array(rates, np.uint8), head_dim // 8, axis=1), "half", head_dim, **options)


def problem(seed=0, tokens=9, **options):
    rng, plan = generator(seed), two_heads(**options)
    keys = random_keys(plan, (2, 2, tokens), rng)
    values = turboquant.Encoded(random_planes(rng, (2, 2, tokens), 3, 64), random_scales(rng, (2, 2, tokens), "normal"),
                                64)
    query = rng.standard_normal((2, 4, 64)).astype(np.float32)
    return query, keys, values, plan, hadamard(64, 3)


def words_of(encoded):
    return [getattr(encoded, name).tobytes() for name in ("sign", "magnitude", "scale")]


# --- One call for all heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(data=st.data())
def test_every_head_is_coded_as_if_it_were_alone(backend, data):
    plan = data.draw(plans(3, kernel_head_dims))
    rng = generator(data.draw(SEEDS))
    x = rng.standard_normal((2, 3, 5, plan.head_dim)).astype(np.float32)
    whole = block_gtq.encode(x, plan, backend=backend)
    query = rng.standard_normal((2, 6, plan.head_dim)).astype(np.float32)
    logits = block_gtq.logits(query, whole, plan, backend=backend)
    for h in range(3):
        own = Plan(plan.bits[h : h + 1], plan.pairing, plan.rotary_dim, plan.seed, plan.rotation,
                   None if plan.exponents is None else plan.exponents[h : h + 1])
        alone = block_gtq.encode(x[:, h : h + 1], own, backend=backend)
        for name in ("sign", "magnitude", "scale"):
            one, other = getattr(alone, name)[:, 0], getattr(whole, name)[:, h]
            width = one.shape[-1]
            assert (one == other[..., :width]).all() and not other[..., width:].any()     # the rest is padding
        expected = block_gtq.logits(query[:, 2 * h : 2 * h + 2].copy(), alone, own, backend=backend)
        np.testing.assert_array_equal(expected, logits[:, 2 * h : 2 * h + 2])


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 70), max_size=4), scale_bits=st.sampled_from((8, 16)))
def test_a_store_holds_what_one_call_gives(backend, seed, cuts, scale_bits):
    """Whatever the cut, bit for bit: a cache appends tokens as they come."""
    plan = two_heads(exponents=np.zeros(2, np.int16) if scale_bits == 8 else None)
    x = generator(seed).standard_normal((2, 2, 70, 64)).astype(np.float16)
    whole = block_gtq.encode(x, plan, backend=backend)
    store = Encoded(*(np.full_like(getattr(whole, name), 77) for name in ("sign", "magnitude", "scale")))
    edges = [0, *sorted(cuts), 70]
    for start, stop in zip(edges, edges[1:]):
        part = Encoded(*(getattr(store, name)[:, :, start:stop] for name in ("sign", "magnitude", "scale")))
        assert block_gtq.encode(x[:, :, start:stop], plan, out=part, backend=backend) is part
    if backend != "reference":
        assert words_of(store) == words_of(whole)
    else:                                              # a matrix product may round differently with its number of rows
        assert np.mean([a != b for a, b in zip(store.sign.ravel(), whole.sign.ravel())]) < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_codes_are_read_in_place(backend):
    query, keys, values, plan, rotation = problem()
    expected = block_gtq.decode_attention(query, keys, values, plan, rotation, return_lse=True, backend=backend)
    rng = generator(1)
    strided = in_a_store(rng, keys)
    actual = block_gtq.decode_attention(query, strided, in_a_store(rng, values), plan, rotation, return_lse=True,
                                        backend=backend)
    for one, other in zip(expected, actual):
        assert one.tobytes() == other.tobytes()
    assert block_gtq.decode(strided, plan, backend=backend).tobytes() == block_gtq.decode(
        keys, plan, backend=backend).tobytes()


@pytest.mark.parametrize("backend", [needs("simt")])
@pytest.mark.parametrize("head_dim, rates", [
    (64, (4, 3, 2, 1)), (64, (8, 8, 8, 8)), (64, (1, 1, 1, 1)),
    (128, (7, 4, 4, 3, 2, 2, 1, 1)), (128, (5, 5, 4, 3, 3, 2, 1, 1)), (128, (8, 7, 6, 5, 5, 4, 3, 2)), (128, (2,) * 8),
    (256, (8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1)), (256, (8,) * 16), (256, (3,) * 16), (256, (5,) * 16)])
def test_attention_reads_rows_of_any_length_wherever_they_begin(head_dim, rates, backend):
    """Whole tiles go to shared memory in chunks of 16 bytes, parts of tiles and rows at odd places byte by byte."""
    kernel = registry.get("block_gtq.decode_attention")
    for seed in range(4):
        rng, bits, group = generator(seed), 1 + seed, (1, 8, 9, 16)[seed]
        plan = Plan(np.repeat(np.array([rates, (4,) * len(rates)], np.uint8), 8, axis=1), "half", head_dim,
                    exponents=np.zeros(2, np.int16) if seed % 2 else None)
        shape = (2, 2, 101)
        keys = random_keys(plan, shape, rng)
        values = turboquant.Encoded(random_planes(rng, shape, bits, head_dim), random_scales(rng, shape, "normal"),
                                    head_dim)
        inputs = {"query": rng.standard_normal((2, 2 * group, head_dim)).astype(np.float32), "plan": plan,
                  "value_rotation": hadamard(head_dim, 3), "return_lse": True, "lengths": np.array([101, 64], np.int32)}
        result = kernel.operator(keys=keys, values=values, **inputs, splits=2, backend=backend)
        kernel.agreement({**inputs, "keys": keys, "values": values},
                         kernel.reference(keys=keys, values=values, **inputs), result)
        again = kernel.operator(keys=in_a_store(rng, keys), values=in_a_store(rng, values), **inputs, splits=2,
                                backend=backend)
        assert [x.tobytes() for x in again] == [x.tobytes() for x in result]


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_beyond_a_sequence_are_not_read(backend):
    query, keys, values, plan, rotation = problem(tokens=9)
    lengths = np.array([0, 4], np.int32)
    expected = block_gtq.decode_attention(query, keys, values, plan, rotation, lengths=lengths, return_lse=True,
                                          backend=backend)
    keys.scale[:, :, 4:], values.scale[:, :, 4:] = np.nan, np.inf
    actual = block_gtq.decode_attention(query, keys, values, plan, rotation, lengths=lengths, return_lse=True,
                                        backend=backend)
    for one, other in zip(expected, actual):
        np.testing.assert_array_equal(one, other)
    assert not actual[0][0].any() and (actual[1][0] == -np.inf).all() and np.isfinite(actual[1][1]).all()
    clamped = block_gtq.decode_attention(query, *problem(tokens=9)[1:], lengths=np.array([-3, 99], np.int32),
                                         backend=backend)
    full = block_gtq.decode_attention(query, *problem(tokens=9)[1:], lengths=np.array([0, 9], np.int32),
                                      backend=backend)
    np.testing.assert_array_equal(clamped, full)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_token_stays_visible_and_alone(backend):
    plan = two_heads()
    x = generator(2).standard_normal((1, 2, 4, 64)).astype(np.float32)
    clean = block_gtq.encode(x, plan, backend=backend)
    x[0, 1, 2, 5], x[0, 0, 1] = np.nan, 0
    encoded = block_gtq.encode(x, plan, backend=backend)
    assert np.isnan(encoded.scale[0, 1, 2]).all() and not encoded.scale[0, 0, 1].any()
    assert not encoded.sign[0, 0, 1].any() and not encoded.magnitude[0, 1, 2].any()
    for h, t in ((0, 0), (0, 2), (1, 0), (1, 3)):
        assert (encoded.scale[0, h, t] == clean.scale[0, h, t]).all()
    decoded = block_gtq.decode(encoded, plan, backend=backend)
    assert np.isnan(decoded[0, 1, 2]).all() and not decoded[0, 0, 1].any() and np.isfinite(decoded[0, :, 3]).all()


@pytest.mark.parametrize("backend", [needs("cpu"), needs("simt")])
@given(seed=SEEDS, power=st.sampled_from((-120, -60, 60, 100)))
def test_groups_of_very_different_size(backend, seed, power):
    """A group that is tiny beside the others has a direction all the same."""
    plan, rng = two_heads(), generator(seed)
    x = rng.standard_normal((1, 2, 3, 64)).astype(np.float32)
    x[:, 0][..., plan.order[0, 48:]] *= 2.0**-40
    x *= np.float32(2.0**power)
    one, other = (block_gtq.encode(x, plan, backend=name) for name in (backend, "reference"))
    near = reference.boundary_distance(x, plan) <= 2e-5
    differs = [a != b for a, b in zip(reference.unpack(one.sign, one.magnitude, plan),
                                      reference.unpack(other.sign, other.magnitude, plan))]
    assert not ((differs[0] | differs[1]) & ~near).any()


@pytest.mark.parametrize("backend", [needs("simt")])
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_float16_of_any_size_at_any_place(head_dim, backend):
    """Rows whose chunks of 16 bytes are not aligned give the same codes, and these are right from subnormal numbers to
    the largest ones."""
    rng, kernel = generator(head_dim), registry.get("block_gtq.encode")
    blocks = (("half", head_dim), ("half", head_dim // 2), ("half", 24), ("interleaved", head_dim))
    for power, (pairing, rotary_dim) in zip((-18, -6, 0, 12), blocks):
        bits = rng.permuted(np.repeat(rng.integers(1, 9, (2, head_dim // 16)), 8, axis=1), axis=1).astype(np.uint8)
        plan = Plan(bits, pairing, rotary_dim)
        x = (rng.standard_normal((1, 2, 75, head_dim)) * 2.0**power).astype(np.float16)
        at_odd_places = np.zeros((1, 2, 75, head_dim + 3), np.float16)[..., 1 : 1 + head_dim]
        at_odd_places[...] = x
        encoded = block_gtq.encode(x, plan, backend=backend)
        kernel.agreement({"x": x, "plan": plan}, block_gtq.encode(x, plan, backend="reference"), encoded)
        assert words_of(block_gtq.encode(at_odd_places, plan, backend=backend)) == words_of(encoded)


@pytest.mark.parametrize("bits", range(4, 9))
def test_decisions_are_found_in_cells(bits):
    """The search of the kernel, in NumPy: it relies on cells that hold at most one decision."""
    (cells, end), rng = block_gtq_launch.cells_of(bits), generator(bits)
    for size in range(16, 257, 16):
        decisions = np.float32(codebook_for(bits, size).boundaries)
        z = np.concatenate([np.nextafter(decisions, 0), decisions, np.nextafter(decisions, 9),
                            rng.uniform(0, 16, 500)]).astype(np.float32)
        table = block_gtq_launch.encode_tables(bits, size)[1].reshape(-1, 2)
        x = np.minimum(z / np.float32(end), 1)
        own = table[np.rint(x * np.float32(cells)).astype(int)]
        assert (own[:, 1] + (x > own[:, 0].view(np.float32)) == np.searchsorted(decisions, z)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sequence_may_have_a_plan_of_its_own(backend):
    plans_of_two = [two_heads(), two_heads(((2, 2, 2, 2), (6, 4, 1, 1)))]
    both = Plan(np.concatenate([plan.bits for plan in plans_of_two]), "half", 64)
    rng, rotation = generator(6), hadamard(64, 1)
    x, query = rng.standard_normal((2, 2, 40, 64)).astype(np.float32), rng.standard_normal((2, 4, 64))
    query, mean = query.astype(np.float32), rng.standard_normal((2, 2, 64)).astype(np.float32)
    values, lengths = turboquant.encode(x, rotation, 3), np.array([40, 7], np.int32)
    encoded = block_gtq.encode(x, both, mean=mean, backend=backend)
    whole = (block_gtq.decode(encoded, both, backend=backend), block_gtq.logits(query, encoded, both, backend=backend),
             *block_gtq.decode_attention(query, encoded, values, both, rotation, lengths=lengths, key_mean=mean,
                                         return_lse=True, backend=backend))
    for b in range(2):
        one, part = slice(b, b + 1), both.part(2 * b, 2 * b + 2)
        alone = block_gtq.encode(x[one], part, mean=mean[one], backend=backend)
        for name in ("sign", "magnitude", "scale"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(encoded, name)[one])
        own = turboquant.encode(x[one], rotation, 3)
        expected = (block_gtq.decode(alone, part, backend=backend),
                    block_gtq.logits(query[one], alone, part, backend=backend),
                    *block_gtq.decode_attention(query[one], alone, own, part, rotation, lengths=lengths[one],
                                                key_mean=mean[one], return_lse=True, backend=backend))
        for of_both, of_one in zip(whole, expected):
            np.testing.assert_allclose(of_both[one], of_one, rtol=1e-5, atol=1e-5)


# --- What is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named():
    query, keys, values, plan, rotation = problem()
    x = np.ones((2, 2, 3, 64), np.float16)
    free = Plan(np.array([[3] * 31 + [4]] * 2), "half", 64)
    assert block_gtq.encode(x, free, backend="reference").sign.shape == (2, 2, 3, 2)
    for match, call in {
        "plan: expected groups of multiples of 16 .*allocate with": lambda: block_gtq.encode(x, free),
        "plan: expected head_dim a multiple of 32": lambda: block_gtq.encode(
            x[..., :48], Plan(np.full((2, 24), 3), "half", 48)),
        "plan: expected one for kv_heads = 1": lambda: block_gtq.encode(x[:1, :1], plan),
        "plan: expected one for head_dim = 32": lambda: block_gtq.encode(x[..., :32], plan),
        "scale_mode: expected one of": lambda: block_gtq.encode(x, plan, scale_mode="best"),
        "mean: expected": lambda: block_gtq.encode(x, plan, mean=np.ones((3, 64), np.float32)),
        "mean: expected finite": lambda: block_gtq.encode(x, plan, mean=np.full((2, 64), np.nan, np.float32)),
        "x: expected finite": lambda: block_gtq.encode(x * np.float16(np.nan), plan, check_finite=True),
        "encoded.magnitude: expected shape": lambda: block_gtq.decode(keys, two_heads(((2, 2, 2, 2),) * 2)),
        "dtype: expected one of": lambda: block_gtq.decode(keys, plan, dtype="float64"),
        "query: expected q_heads": lambda: block_gtq.logits(query[:, :3].copy(), keys, plan),
        "scale: expected": lambda: block_gtq.logits(query, keys, plan, scale=np.inf),
        "values.sign: expected shape": lambda: block_gtq.decode_attention(
            query, keys, turboquant.encode(x, rotation, 3), plan, rotation),
        "backend: expected one of reference, cpu": lambda: block_gtq.calibrate(x, pairing="half", backend="simt"),
        "plan: expected head_dim 64, 128 or 256 on": lambda: block_gtq.encode(
            x[..., :32], Plan(np.full((2, 16), 3), "half", 32), backend="simt"),
        "splits: expected an integer": lambda: block_gtq.decode_attention(query, keys, values, plan, rotation,
                                                                                splits=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="plan: expected a Plan"):
        block_gtq.encode(x, 3)
    with pytest.raises(TypeError, match="encoded: expected an Encoded from block_gtq.encode, got Encoded"):
        block_gtq.decode(values, plan)
    with pytest.raises(TypeError, match="encoded.scale: expected dtype uint8"):
        block_gtq.decode(keys, two_heads(exponents=np.zeros(2, np.int16)))


def test_the_codes_are_written_where_they_are_wanted_or_nowhere():
    plan, x = two_heads(), np.ones((1, 2, 3, 64), np.float32)
    out = block_gtq.encode(x, plan)
    out.sign.flags.writeable = False
    with pytest.raises(ValueError, match="out.sign: expected writable memory"):
        block_gtq.encode(x, plan, out=out)
    out.sign.flags.writeable = True
    shared = Encoded(out.sign, x.view(np.uint32)[..., : out.magnitude.shape[-1]], out.scale)
    with pytest.raises(ValueError, match="out.magnitude: expected"):
        block_gtq.encode(x, plan, out=shared)
    with pytest.raises(ValueError, match="strides"):
        block_gtq.decode(Encoded(out.sign[:, ::-1], out.magnitude, out.scale), plan)


# --- The codec and the preset ----------------------------------------------------------------------------------------


def normal(seed, shape, dtype=np.float16):
    """Keys or queries, uneven over coordinates."""
    rng = generator(seed)
    return (rng.standard_normal(shape) * 2.0 ** rng.normal(0, 1, shape[-1])).astype(dtype)


@st.composite
def made(draw):
    """A codec with a calibration or without."""
    head_dim, centred = draw(st.sampled_from((32, 64, 96))), draw(st.booleans())
    pairing, rotary_dim = draw(st.sampled_from(reference.PAIRINGS)), draw(st.sampled_from((None, 16)))
    calibration = None
    if draw(st.booleans()):
        calibration = block_gtq.calibrate(normal(draw(SEEDS), (1, 2, 20, head_dim)), pairing=pairing,
                                          rotary_dim=rotary_dim, centred=centred)
    return codecs.BlockGTQ(head_dim, draw(st.sampled_from((2.0, 2.5, 3.0, 4.5))), calibration, pairing, rotary_dim,
                           tile=draw(st.sampled_from((16, 32))), scale_bits=draw(st.sampled_from((8, 16))),
                           score=draw(st.sampled_from(reference.SCORES)), centred=centred, seed=draw(SEEDS))


@settings(max_examples=15)
@given(codec=made(), seed=SEEDS)
def test_a_codec_is_rebuilt_from_json(codec, seed):
    again = codecs.rebuild(json.loads(json.dumps(codec.config())))
    assert again == codec and hash(again) == hash(codec)
    x = normal(seed, (2, 2, 5, codec.head_dim))
    for one, other in zip(codec.encode(x).arrays().items(), again.encode(x).arrays().items()):
        assert one[0] == other[0] and one[1].tobytes() == other[1].tobytes()


@settings(max_examples=15)
@given(codec=made(), seed=SEEDS)
def test_rows_are_as_long_as_the_codec_says(codec, seed):
    packed = codec.encode(normal(seed, (1, 2, 5, codec.head_dim)))
    held = packed.sign.nbytes + packed.magnitude.nbytes + packed.scale.nbytes
    assert codec.bits_per_element * 2 * 5 * codec.head_dim == 8 * held
    plan = codec.plan(packed)
    assert (plan.scalars, plan.magnitude_words) == (packed.scale.shape[3], packed.magnitude.shape[3])
    exact = Plan(plan.bits, plan.pairing, plan.rotary_dim)
    assert exact.magnitude_words == plan.magnitude_words and exact.scalars <= plan.scalars


@settings(max_examples=15)
@given(codec=made(), seed=SEEDS)
def test_decode_and_logits_estimate_what_was_encoded(codec, seed):
    x, query = normal(seed, (2, 2, 6, codec.head_dim)), normal(seed + 1, (2, 4, codec.head_dim), np.float32)
    packed = codec.encode(x)
    decoded = codec.decode(packed, dtype="float32")
    assert np.linalg.norm(decoded - x) < 0.6 * np.linalg.norm(x.astype(np.float64))
    logits = codec.logits(query, packed)
    expected = np.einsum("bhd,bhtd->bht", query, np.repeat(decoded, 2, axis=1)) * codec.head_dim**-0.5
    scale = np.linalg.norm(query, axis=-1).max() * np.linalg.norm(decoded, axis=-1).max()
    assert np.abs(logits - expected).max() <= 1e-5 * scale


def test_calibrations_are_files(tmp_path):
    keys = normal(0, (1, 2, 20, 64))
    for centred in (False, True):
        calibration = block_gtq.calibrate(keys, pairing="interleaved", rotary_dim=32, centred=centred)
        codecs.save_calibration(tmp_path / "layer.safetensors", calibration)
        again = codecs.load_calibration(tmp_path / "layer.safetensors")
        assert codecs.BlockGTQ(64, 3.0, again, "interleaved", 32, centred=centred) == codecs.BlockGTQ(
            64, 3.0, calibration, "interleaved", 32, centred=centred)
    content = (tmp_path / "layer.safetensors").read_bytes()
    (tmp_path / "layer.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        codecs.load_calibration(tmp_path / "layer.safetensors")
    with pytest.raises(TypeError, match="calibration: expected a Calibration"):
        codecs.save_calibration(tmp_path / "other", {})


def test_bad_parameters_are_refused():
    calibration = block_gtq.calibrate(normal(0, (1, 2, 20, 64)), pairing="half")
    for match, call in {
        "head_dim: expected a multiple of 32": lambda: codecs.BlockGTQ(48),
        "average_bits: expected": lambda: codecs.BlockGTQ(64, 9.0),
        "avg_bits: expected more than 1 bit": lambda: codecs.BlockGTQ(64, 1.0),
        "tile: expected one of": lambda: codecs.BlockGTQ(64, tile=8),
        "scale_bits: expected one of": lambda: codecs.BlockGTQ(64, scale_bits=4),
        "pairing: expected one of": lambda: codecs.BlockGTQ(64, pairing="pairs"),
        "calibration: expected one for head_dim 32": lambda: codecs.BlockGTQ(32, 3.0, calibration),
        "calibration: expected one for pairing 'interleaved'": lambda: codecs.BlockGTQ(64, 3.0, calibration,
                                                                                        "interleaved"),
        "calibration: expected one with a mean": lambda: codecs.BlockGTQ(64, 3.0, calibration, centred=True),
        "calibration: expected one for 1 KV heads": lambda: codecs.BlockGTQ(64, 3.0, calibration).allocate(
            1, 1, 8, "cpu"),
        "another seed": lambda: codecs.fused(codecs.BlockGTQ(64), codecs.TurboQuantMSE(64)),
        "not centred": lambda: codecs.fused(codecs.BlockGTQ(64), codecs.TurboQuantMSE(64, seed=1, centred=True)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="calibration: expected a Calibration"):
        codecs.BlockGTQ(64, 3.0, 5)


@settings(max_examples=10)
@given(seed=SEEDS, cuts=st.lists(st.integers(6, 40), max_size=4), centred=st.booleans(), with_queries=st.booleans(),
       sinks=st.integers(0, 3), tail=st.sampled_from((0, 5)), scale_bits=st.sampled_from((8, 16)))
def test_a_cache_depends_on_its_tokens_alone(tmp_path_factory, seed, cuts, centred, with_queries, sinks, tail,
                                             scale_bits):
    """Calibrated by the first append, whatever follows and however it is cut; saved, loaded, and alone in its batch."""
    keys, values = normal(seed, (2, 2, 40, 64)), normal(seed + 1, (2, 2, 40, 64))
    queries = normal(seed + 2, (2, 4, 6, 64)) if with_queries else None

    def filled(rows, edges):
        cache = caches.block_gtq(len(keys[rows]), 2, 4, 64, 48, centred=centred, sinks=sinks, tail=tail,
                                 scale_bits=scale_bits)
        cache.append(keys[rows, :, :6], values[rows, :, :6], None if queries is None else queries[rows])
        for start, stop in zip([6, *edges], [*edges, 40]):
            if stop > start:
                cache.append(keys[rows, :, start:stop], values[rows, :, start:stop])
        return cache

    query = normal(seed + 3, (2, 4, 64))
    whole, pieces = filled(slice(0, 2), []), filled(slice(0, 2), sorted(cuts))
    held = {name: view.to_host().tobytes() for name, view in whole.contents().items()}
    assert held == {name: view.to_host().tobytes() for name, view in pieces.contents().items()}
    output = whole.attend(query)
    path = tmp_path_factory.mktemp("cache") / "layer.safetensors"
    whole.save(path)
    assert caches.load(path, capacity=50).attend(query).tobytes() == output.tobytes()
    for b in range(2):
        alone = filled(slice(b, b + 1), []).attend(query[b : b + 1])
        np.testing.assert_allclose(alone[0].astype(float), output[b].astype(float), atol=2e-2 * np.abs(output).max())
    codec, packed = whole._stores["store.keys"]
    calibrated = block_gtq.calibrate(keys[:1, :, :6], None if queries is None else queries[:1], pairing="half",
                                     centred=centred)
    expected = block_gtq.allocate(block_gtq.score(calibrated), 3.0, tile=32)
    np.testing.assert_array_equal(packed.bits.to_host()[0, :, 0], expected)


def test_a_budget_of_as_many_bytes_as_turboquant():
    for bits in (2, 3, 4):
        assert codecs.BlockGTQ(64, bits).bits_per_element == codecs.TurboQuantMSE(64, bits).bits_per_element
    assert codecs.BlockGTQ(128, 3.0, scale_bits=16).bits_per_element == 3.5           # of four groups, at most
    assert codecs.BlockGTQ(128, 3.0, tile=16).bits_per_element <= 3.5


def test_a_given_calibration_is_not_replaced():
    keys, values = normal(0, (1, 2, 30, 64)), normal(1, (1, 2, 30, 64))
    calibration = block_gtq.calibrate(normal(2, (1, 2, 50, 64)), pairing="half", centred=True)
    cache = caches.block_gtq(1, 2, 4, 64, 40, calibration=calibration, centred=True, sinks=0, tail=0)
    cache.append(keys, values)
    packed = cache._stores["store.keys"][1]
    expected = block_gtq.allocate(block_gtq.score(calibration), 3.0, tile=32)
    np.testing.assert_array_equal(packed.bits.to_host()[0, :, 0], expected)
    np.testing.assert_array_equal(packed.mean.to_host()[0, :, 0], calibration.mean)


def test_centring_does_not_change_what_is_merged():
    """lse of centred codes is that of the keys as they were: sinks and tail weigh as much as they should."""
    keys, values = normal(0, (1, 2, 60, 64)) + np.float16(3), normal(1, (1, 2, 60, 64))
    query, outputs = normal(2, (1, 4, 64)) / np.float16(4), []
    for sinks, tail in ((0, 0), (4, 20)):
        cache = caches.block_gtq(1, 2, 4, 64, 64, key_bits=8.0, value_bits=8, centred=True, sinks=sinks, tail=tail)
        cache.append(keys, values)
        outputs.append(cache.attend(query).astype(float))
    assert np.abs(outputs[0] - outputs[1]).max() < 0.05 * np.abs(outputs[0]).max()


# --- Real keys -------------------------------------------------------------------------------------------------------


def test_fewer_bytes_and_a_smaller_error_than_turboquant_on_real_keys():
    """The shipped sample, calibrated on the keys of its prompt, judged by the later queries: tiles of 32 with scalars
    of a byte, which hold the same bytes as TurboQuant, and tiles of 16."""
    sample = data.sample()
    first = int(sample.positions[0])
    keys, queries = sample.keys, sample.queries
    calibration = block_gtq.calibrate(keys[:, :, :first], pairing="half")
    exact = np.einsum("bhqd,bktd->bhqt", queries.astype(float), keys.astype(float))

    def error(decoded):
        logits = np.einsum("bhqd,bktd->bhqt", queries.astype(float), decoded.astype(float))
        return np.abs(logits - exact)[..., :first].mean() * keys.shape[-1] ** -0.5

    rotation = hadamard(keys.shape[-1], 0)
    uniform = {bits: error(turboquant.decode(turboquant.encode(keys, rotation, bits), rotation, dtype="float32"))
               for bits in (3, 4)}
    for bits in (3, 4):
        plan = block_gtq.plan(calibration, bits, tile=32, scale_bits=8)
        assert plan.bits_per_element <= bits + 0.25
        assert error(block_gtq.decode(block_gtq.encode(keys, plan), plan, dtype="float32")) < uniform[bits]
    plan = block_gtq.plan(calibration, 3, tile=16)
    assert error(block_gtq.decode(block_gtq.encode(keys, plan), plan, dtype="float32")) < 0.85 * uniform[3]
