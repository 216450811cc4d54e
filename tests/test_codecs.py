"""Codecs: exact storage, the storage of a cache, parts that can be saved, and the table of attention operators."""
import json
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import arrays, codecs

NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def normal(seed, shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(NUMPY[dtype])


def same_bytes(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


dtypes = st.sampled_from(sorted(NUMPY))
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.sampled_from((1, 2, 7, 64)))


@given(shapes, dtypes, seeds)
def test_float16_keeps_every_bit(shape, dtype, seed):
    # Any bit pattern: NaN payloads, infinities and subnormals included.
    kind = np.dtype(NUMPY[dtype])
    content = np.random.default_rng(seed).bytes(int(np.prod(shape)) * kind.itemsize)
    x = np.frombuffer(content, kind).reshape(shape).copy()
    original = x.copy()
    codec = codecs.Float16(shape[-1], dtype)
    packed = codec.encode(x)
    x[...] = 0                                      # packed tokens have memory of their own
    assert same_bytes(packed.tokens, original) and same_bytes(codec.decode(packed), original)
    assert packed.nbytes == original.nbytes
    assert codec.bits_per_element * original.size == 8 * packed.nbytes
    codec.decode(packed)[...] = 1
    assert same_bytes(packed.tokens, original)      # and so has what is decoded


@given(seeds, dtypes)
def test_float16_takes_strided_input(seed, dtype):
    x = normal(seed, (2, 5, 3, 8), dtype).transpose(0, 2, 1, 3)[:, :, 1:4]
    packed = codecs.Float16(8, dtype).encode(x)
    assert same_bytes(packed.tokens, np.ascontiguousarray(x))


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(0, 20), st.sampled_from((1, 2, 8, 64)),
       dtypes, dtypes, st.sampled_from((None, 0.25, -3.0)), seeds)
def test_float16_logits(batch, kv_heads, group, tokens, head_dim, dtype, query_dtype, scale, seed):
    keys = normal(seed, (batch, kv_heads, tokens, head_dim), dtype)
    query = normal(seed + 1, (batch, kv_heads * group, head_dim), query_dtype)
    codec = codecs.Float16(head_dim, dtype)
    logits = codec.logits(query, codec.encode(keys), scale)

    wide_keys = np.repeat(keys.astype(np.float64), group, axis=1)
    factor = head_dim**-0.5 if scale is None else scale
    expected = factor * np.einsum("bhd,bhtd->bht", query.astype(np.float64), wide_keys)
    magnitude = abs(factor) * np.einsum("bhd,bhtd->bht", abs(query.astype(np.float64)), abs(wide_keys))
    assert logits.shape == expected.shape and logits.dtype == np.float32
    # A float32 sum of head_dim products, times a factor that is itself rounded.
    assert np.all(abs(logits - expected) <= (head_dim + 3) * 2.0**-24 * magnitude)


def test_logits_refuses_query_heads_that_do_not_divide():
    codec = codecs.Float16(4)
    with pytest.raises(ValueError, match="q: expected a multiple of the 2 KV heads"):
        codec.logits(np.zeros((1, 3, 4), np.float16), codec.encode(np.zeros((1, 2, 5, 4), np.float16)))


@pytest.mark.parametrize("dtype", sorted(NUMPY))
def test_frameworks_get_back_their_own(dtype):
    torch = pytest.importorskip("torch")
    x = torch.randn(1, 2, 5, 4).to(getattr(torch, dtype))
    codec = codecs.Float16(4, dtype)
    packed = codec.encode(x)
    assert isinstance(packed.tokens, torch.Tensor) and torch.equal(codec.decode(packed), x)
    assert packed.nbytes == x.nbytes
    logits = codec.logits(x[:, :, 0].contiguous(), packed)
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 2, 5) and logits.dtype == torch.float32


def test_jax_gets_back_its_own():
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(40, dtype=jax.numpy.float16).reshape(1, 2, 5, 4)
    codec = codecs.Float16(4)
    decoded = codec.decode(codec.encode(x))
    assert isinstance(decoded, jax.Array) and same_bytes(decoded, x)


@pytest.mark.parametrize("arguments, message", [
    (dict(head_dim=0), "head_dim: expected a positive integer, got 0"),
    (dict(head_dim=True), "head_dim: expected a positive integer, got True"),
    (dict(head_dim=64.0), "head_dim: expected a positive integer, got 64.0"),
    (dict(head_dim=64, dtype="int8"), "dtype: expected one of float16, bfloat16, float32, got 'int8'"),
])
def test_float16_refuses_bad_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        codecs.Float16(**arguments)


def test_encode_names_what_is_wrong():
    codec = codecs.Float16(4)
    with pytest.raises(TypeError, match="Float16.encode: x: expected dtype float16, got float32"):
        codec.encode(np.zeros((1, 1, 2, 4), np.float32))
    with pytest.raises(ValueError, match="Float16.encode: x: expected .*4.*5"):
        codec.encode(np.zeros((1, 1, 2, 5), np.float16))
    with pytest.raises(ValueError, match="Float16.encode: x"):
        codec.encode(np.zeros((1, 2, 4), np.float16))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.data())
def test_write_touches_its_slots_alone_and_used_shows_them(batch, kv_heads, capacity, data):
    codec = codecs.Float16(4)
    storage = codec.allocate(batch, kv_heads, capacity, "cpu")
    shadow = np.full((batch, kv_heads, capacity, 4), 7, np.float16)
    storage.tokens.numpy()[...] = shadow
    low = data.draw(st.integers(0, batch - 1))
    sequences = slice(low, data.draw(st.integers(low + 1, batch)))
    start = data.draw(st.integers(0, capacity))
    count = data.draw(st.integers(0, capacity - start))
    x = normal(data.draw(seeds), (sequences.stop - sequences.start, kv_heads, count, 4), "float16")
    codec.write(storage, sequences, start, arrays.borrow(x, "x"))
    shadow[sequences, :, start:start + count] = x
    assert same_bytes(storage.tokens.numpy(), shadow)
    sequence, tokens = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, capacity))
    used = codec.used(storage, sequence, tokens)
    assert same_bytes(used.tokens.to_host(), shadow[sequence:sequence + 1, :, :tokens])
    assert used.nbytes == kv_heads * tokens * 4 * 2


@given(st.integers(1, 512), dtypes)
def test_rebuild_gives_an_equal_part(head_dim, dtype):
    codec = codecs.Float16(head_dim, dtype)
    assert codecs.rebuild(json.loads(json.dumps(codec.config()))) == codec


def test_rebuild_suggests_names():
    with pytest.raises(ValueError, match="unknown codec, index or selector 'Float61'.*Float16"):
        codecs.rebuild({"part": "Float61", "head_dim": 4})


@dataclass(frozen=True)
class Unknown(codecs.Float16):
    """A codec for which no operator is registered."""


def test_pairs_without_an_operator_are_refused_by_name():
    known = codecs.Float16(4)
    assert codecs.fused(known, known) is codecs.FUSED[codecs.Float16, codecs.Float16]
    for pair in ((Unknown(4), known), (known, Unknown(4))):
        with pytest.raises(ValueError, match="no decode attention for keys .*Unknown.*; supported: Float16 x Float16"):
            codecs.fused(*pair)
    with pytest.raises(ValueError, match="no sparse attention for keys Float16 x values Float16; supported: none"):
        codecs.fused(known, known, sparse=True)


def test_attend_runs_the_operator_of_the_pair():
    codec = codecs.Float16(4)
    keys, values = (codec.encode(normal(seed, (1, 1, 1, 4), "float16")) for seed in (0, 1))
    out, lse = np.empty((1, 2, 4), np.float16), np.empty((1, 2), np.float32)
    query = normal(2, (1, 2, 4), "float16")
    codecs.attend(query, codec, keys, codec, values, lengths=np.ones(1, np.int32), out=out, lse=lse, scale=1.0)
    assert same_bytes(out[0], np.repeat(values.tokens[0, 0], 2, axis=0))            # one token has all the weight
    assert np.allclose(lse[0], query[0].astype(np.float64) @ keys.tokens[0, 0, 0].astype(np.float64), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", sorted(NUMPY))
def test_float16_on_a_gpu(dtype):
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 2, 33, 64, device="cuda").to(getattr(torch, dtype))
    codec = codecs.Float16(64, dtype)
    packed = codec.encode(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert packed.tokens.is_cuda and torch.equal(codec.decode(packed), x)
    query = x[:, :, 0].contiguous()
    expected = torch.einsum("bhd,bhtd->bht", query.double(), x.double()) / 8
    logits = codec.logits(query, packed)
    assert logits.is_cuda and torch.allclose(logits.double(), expected, atol=1e-4)
