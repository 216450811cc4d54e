"""The reference of KIVI: one group in plain numbers, the layout, printed tables, the cache, and defects found."""
import dataclasses
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import claims
from kvbench.reference import attention, kivi
from kvbench.reference.kivi import (Keys, Scheme, Values, append, attend, crop, decode, decode_attention, encode_keys,
                                    encode_values, error_bound, logits, pack, prefill, quantise, to_float16,
                                    to_interchange, unpack)
from strategies.arrays import fill
from test_claims import find, find_without_defect

ALL_BITS = st.sampled_from(kivi.BITS)
GROUPS = st.sampled_from((32, 64, 128))
SEEDS = st.integers(0, 2**32 - 1)
CONTENTS = st.sampled_from(("normal", "outlier channels", "equal", "zeros", "some zero rows", "large", "small",
                            "subnormal", "integers", "mean", "all exponents"))
DTYPES = st.sampled_from(("float16", "bfloat16", "float32"))


def filled(seed, shape, dtype="float16", content="normal"):
    """As strategies.arrays.fill, and two kinds more: a mean of 1000 standard deviations, all exponents of float16."""
    rng = np.random.default_rng([seed, 3])
    if content == "mean":
        return fill(rng, shape, dtype, "normal") + np.array(1000, fill(rng, (1,), dtype, "zeros").dtype)
    if content == "all exponents":
        exponents = rng.integers(-26, 16 if dtype == "float16" else 20, shape)
        return (rng.choice([-1, 1], shape) * 2.0**exponents).astype(fill(rng, (1,), dtype, "zeros").dtype)
    return fill(rng, shape, dtype, content)


def same_bits(one, other):
    return kivi._differences(one, other) == 0


# --- One group, in numbers of known precision ------------------------------------------------------------------------


def rounded(x, digits, smallest):
    """The Fraction x rounded half to even to that many binary digits, with the least exponent of the type."""
    if x == 0:
        return Fraction(0)
    exponent = math.floor(math.log2(abs(x)))
    exponent += (abs(x) >= Fraction(2) ** (exponent + 1)) - (abs(x) < Fraction(2) ** exponent)
    unit = Fraction(2) ** max(exponent - digits + 1, smallest)
    return round(x / unit) * unit                       # round(Fraction) rounds half to even


def single(x):
    return rounded(x, 24, -149)


def half(x):
    return rounded(x, 11, -24)


def group_of(x, bits):
    """(codes, s, m) of finite numbers, step by step, as the head of the module has it; all but the codes Fractions."""
    x = [half(max(min(Fraction(float(value)), Fraction(65504)), Fraction(-65504))) for value in x]
    qmax, m = 2**bits - 1, min(x)
    s = half(single(single(max(x) - m) / qmax))
    if s == 0:
        return [0] * len(x), s, m
    return [round(min(single(single(value - m) / s), Fraction(qmax))) for value in x], s, m


@given(bits=ALL_BITS, content=CONTENTS, dtype=DTYPES, seed=SEEDS)
def test_a_group_follows_the_definition(bits, content, dtype, seed):
    x = filled(seed, (1, 1, 4, 32), dtype, content)[0, 0]
    codes, s, m = quantise(x, bits)
    assert codes.dtype == np.uint8 and s.dtype == m.dtype == np.float16
    for row in range(4):
        expected = group_of(x[row], bits)
        assert codes[row].tolist() == expected[0]
        assert (Fraction(float(s[row])), Fraction(float(m[row]))) == expected[1:]


@given(bits=ALL_BITS, group=GROUPS, content=CONTENTS, dtype=DTYPES, seed=SEEDS, tokens=st.integers(0, 70),
       batch=st.integers(1, 2), heads=st.integers(1, 2))
def test_groups_run_along_tokens_or_channels(bits, group, content, dtype, seed, tokens, batch, heads):
    x = filled(seed, (batch, heads, group * (tokens % 3), 96), dtype, content)
    keys = encode_keys(x, bits, group)
    assert isinstance(keys, Keys) and (keys.bits, keys.group, keys.tokens) == (bits, group, x.shape[2])
    assert keys.codes.shape == (*x.shape[:3], 3 * bits) and keys.scale.shape == (batch, heads, tokens % 3, 96)
    assert keys.minimum.shape == keys.scale.shape and keys.head_dim == 96
    assert all(array.flags.c_contiguous for array in keys.arrays().values())
    for t in range(0, x.shape[2], group):
        c, s, m = quantise(x[:, :, t : t + group].swapaxes(2, 3), bits)
        assert (unpack(keys.codes, bits)[:, :, t : t + group].swapaxes(2, 3) == c).all()
        assert (keys.scale[:, :, t // group] == s).all() and (keys.minimum[:, :, t // group] == m).all()
    x = filled(seed, (batch, heads, tokens, 2 * group), dtype, content)
    values = encode_values(x, bits, group)
    assert all(array.flags.c_contiguous for array in values.arrays().values())
    assert isinstance(values, Values) and values.scale.shape == (batch, heads, tokens, 2)
    for i in range(2):
        part = slice(i * group, (i + 1) * group)
        c, s, m = quantise(x[..., part], bits)
        assert (unpack(values.codes, bits)[..., part] == c).all()
        assert (values.scale[..., i] == s).all() and (values.minimum[..., i] == m).all()


@given(bits=ALL_BITS, group=st.sampled_from((32, 64)), content=CONTENTS, dtype=DTYPES, seed=SEEDS)
def test_decoding_is_exact_and_within_its_bound(bits, group, content, dtype, seed):
    x = filled(seed, (1, 2, group, 64), dtype, content)
    for encoded, spread in ((encode_keys(x, bits, group), lambda p, t, d: p[0, 1, t // group, d]),
                            (encode_values(x, bits, group), lambda p, t, d: p[0, 1, t, d // group])):
        x_hat, codes = decode(encoded), unpack(encoded.codes, bits)
        for t, d in ((0, 0), (5, 63), (group - 1, 17)):
            s, m = (Fraction(float(spread(p, t, d))) for p in (encoded.scale, encoded.minimum))
            assert Fraction(float(x_hat[0, 1, t, d])) == int(codes[0, 1, t, d]) * s + m
        error = np.abs(to_float16(x).astype(np.float64) - x_hat)
        assert (error <= error_bound(encoded)).all()
        for factor in (np.float32, np.float64):             # s c is exact: a fused and a separate addition agree
            s = kivi._per_number(encoded, encoded.scale).astype(factor)
            product = codes * s
            assert (product.astype(np.float64) == codes * s.astype(np.float64)).all()


def test_printed_group():
    c, s, m = quantise(np.array([-1.0, 0.2, 0.5, 2.0]), 2)
    assert (c.tolist(), float(s), float(m)) == ([0, 1, 2, 3], 1.0, -1.0)
    c, s, m = quantise(np.array([0.0, 0.5, 1.5, 2.5, 3.0]), 2)                 # halves to even
    assert c.tolist() == [0, 0, 2, 2, 3]


def test_modes_of_arithmetic_differ_as_printed():
    """0.06 % (2 bits) and 0.3 % (4 bits) of codes; 2 % and 5 % at a mean of 1000 standard deviations."""
    x = np.random.default_rng(0).standard_normal((10000, 32))
    for mean, bits, printed in ((0, 2, 0.0006), (0, 4, 0.003), (1000, 2, 0.02), (1000, 4, 0.05)):
        one, other = (quantise(x + mean, bits, arithmetic)[0] for arithmetic in kivi.ARITHMETIC)
        assert np.mean(one != other) == pytest.approx(printed, rel=0.4)
        assert np.abs(one.astype(int) - other).max() <= 1


def test_compat_rounds_every_step():
    x = np.random.default_rng(0).standard_normal((200, 32)).astype(np.float16)
    c, s, m = quantise(x, 4, "compat")
    for row in range(200):
        values = [Fraction(float(value)) for value in x[row]]
        step = half(half(max(values) - min(values)) / 15)
        assert (Fraction(float(s[row])), Fraction(float(m[row]))) == (step, min(values))
        assert c[row].tolist() == [round(min(half(half(value - min(values)) / step), Fraction(15))) for value in values]
    c, s, _ = quantise(np.array([-65504.0, 0, 65504]), 2, "compat")
    assert np.isinf(s) and not c.any()
    assert float(quantise(np.array([-65504.0, 0, 65504]), 2)[1]) == 43680


# --- Special numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", kivi.BITS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 65504.0, 1e30, 2.0**-24, 2.0**-30])
def test_equal_numbers_are_kept(bits, value):
    c, s, m = quantise(np.full((2, 32), value), bits)
    assert not c.any() and not s.any() and (m == to_float16(value)).all()
    assert not np.signbit(m[m == 0]).any()


@pytest.mark.parametrize("bits", kivi.BITS)
def test_subnormal_groups(bits):
    """Multiples of 2^-24: s rounds to 0 up to half a step, and is a subnormal number from there on."""
    qmax = 2**bits - 1
    for span in range(1, 3 * qmax):
        x = np.arange(span + 1) * 2.0**-24
        c, s, m = quantise(x, bits)
        assert float(s) == 2.0**-24 * round(Fraction(span, qmax)) and m == 0
        error = np.abs(x - c * float(s))
        assert (error <= max(float(s) / 2, qmax * 2.0**-25)).all() and (c == 0).all() == (2 * span < qmax)


def test_zeros_of_either_sign_have_one_minimum():
    for x in ([0.0, -0.0, 1.0, 2.0], [-0.0, 0.0, 1.0, 2.0]):
        assert quantise(np.array(x), 2)[2].view(np.uint16) == 0


@pytest.mark.parametrize("bits", kivi.BITS)
@pytest.mark.parametrize("arithmetic", kivi.ARITHMETIC)
def test_numbers_that_are_not_finite_leave_the_others_alone(bits, arithmetic):
    x = np.random.default_rng(1).standard_normal(32).astype(np.float16)
    rest = np.arange(32) > 2
    expected = quantise(x[rest], bits, arithmetic)
    x[:3] = np.nan, np.inf, -np.inf
    c, s, m = quantise(x, bits, arithmetic)
    assert (c[rest] == expected[0]).all() and (s, m) == expected[1:]
    assert c[:3].tolist() == [0, 2**bits - 1, 0]
    for bad in ([np.nan] * 3, [np.inf, np.inf, np.inf], [np.nan, -np.inf, np.inf]):
        c, s, m = quantise(np.array(bad), bits, arithmetic)
        assert not c.any() and s == 0 and m == 0


@pytest.mark.parametrize("encode", [encode_keys, encode_values])
def test_check_finite(encode):
    x = filled(0, (1, 2, 32, 64))
    encode(x, 2, check_finite=True)
    x[0, 1, 5, 3] = np.nan
    x[0, 1, 7] = np.inf
    encode(x, 2)
    with pytest.raises(ValueError, match=r"NaN or Inf in 2 vectors, the first at .* = \[0, 1, 5\]"):
        encode(x, 2, check_finite=True)


def test_inputs_saturate():
    x = np.array([1e6, -1e6, 65519, 65521, np.inf, -np.inf, np.nan, 3e38, 1e-8])
    expected = [65504, -65504, 65504, 65504, np.inf, -np.inf, np.nan, 65504, 0]
    for dtype in (np.float64, np.float32):
        np.testing.assert_array_equal(to_float16(x.astype(dtype)), np.array(expected, np.float16))
    wide = np.array([3e38, -1e30, 1.0], ml_dtypes.bfloat16)
    assert to_float16(wide).tolist() == [65504, -65504, 1]


def test_what_is_decoded_may_exceed_float16():
    keys = encode_keys(np.tile(np.array([-65504.0, 65504.0]), 16)[None, None, :, None] * np.ones(32), 2)
    assert decode(keys).max() == 3 * 43680 - 65504 == 65536 > kivi.LARGEST + 16            # which rounds to infinity


# --- The layout ------------------------------------------------------------------------------------------------------


@given(bits=ALL_BITS, blocks=st.integers(1, 9), seed=SEEDS, tokens=st.integers(0, 3))
def test_pack_is_the_loop_over_channels(bits, blocks, seed, tokens):
    head_dim, fields = 32 * blocks, 16 // bits
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, tokens, head_dim))
    words = pack(codes, bits)
    assert words.dtype == np.uint32 and words.shape == (2, tokens, bits * blocks) and words.flags.c_contiguous
    assert (unpack(words, bits) == codes).all() and unpack(words, bits).dtype == np.uint8
    for b in range(2):
        for t in range(tokens):
            expected = [0] * (bits * blocks)
            for d in range(head_dim):
                u, g, v, h = d // 32, d // 4 % 8, d // 2 % 2, d % 2
                n = 2 * (u + g * blocks) + v
                expected[n // fields] |= int(codes[b, t, d]) << (16 * h + bits * (n % fields))
            assert words[b, t].tolist() == expected


def test_drawn_words():
    """The drawings in the head of the module: codes that name their channel, of the word that is drawn, g = 3."""
    d = np.arange(128)
    for bits, word, upper in ((2, 3, (98, 96, 66, 64, 34, 32, 2, 0)), (4, 6, (34, 32, 2, 0)), (4, 7, (98, 96, 66, 64))):
        for position, channel in enumerate(reversed(upper)):
            for odd in range(2):
                words = pack((d == channel + odd + 12).astype(int), bits)
                assert words[word] == 1 << (bits * position + 16 * odd) and np.count_nonzero(words) == 1


def test_interchange_is_as_printed():
    """2-bit codes 3, 0, 1, 2, 0, ... are the word 0x93; keys are packed along tokens, values along channels."""
    codes = np.zeros((1, 1, 32, 32), int)
    codes[0, 0, :4, 5] = 3, 0, 1, 2
    parameters = np.zeros((1, 1, 1, 32), np.float16)
    words, scale, minimum = to_interchange(Keys(pack(codes, 2), parameters, parameters, 2, 32))
    assert words.dtype == np.int32 and words.shape == (1, 1, 32, 2) and words[0, 0, 5].tolist() == [0x93, 0]
    assert np.count_nonzero(words) == 1 and scale.shape == minimum.shape == (1, 1, 32, 1)
    codes = np.swapaxes(codes, 2, 3)
    parameters = np.swapaxes(parameters, 2, 3)
    words, scale, _ = to_interchange(Values(pack(codes, 2), parameters, parameters, 2, 32))
    assert words[0, 0, 5].tolist() == [0x93, 0] and scale.shape == (1, 1, 32, 1)
    negative = to_interchange(Values(pack(codes * 0 + 3, 2), parameters, parameters, 2, 32))
    assert (negative[0] == -1).all()
    again = kivi.from_interchange(Values, *negative, 2, 32)
    assert (unpack(again.codes, 2) == 3).all()


def test_no_tokens():
    x, query = np.zeros((2, 3, 0, 64)), filled(0, (2, 6, 64))
    keys, values = encode_keys(x, 2), encode_values(x, 4, 64)
    assert keys.nbytes == values.nbytes == 0 and (keys.bits_per_element, values.bits_per_element) == (3.0, 4.5)
    assert logits(query, keys).shape == (2, 6, 0) and decode(keys).shape == (2, 3, 0, 64)
    output, lse = decode_attention(query, keys, values)
    assert output.shape == (2, 6, 64) and not output.any() and np.isneginf(lse).all()
    assert encode_keys(np.zeros((0, 2, 32, 64)), 2).scale.shape == (0, 2, 1, 64)


def test_ragged_lengths_are_not_read_beyond():
    x, query = filled(0, (3, 2, 64, 64)), filled(1, (3, 4, 64))
    lengths = np.array([0, 37, 64])
    keys, values = encode_keys(x, 2), encode_values(x, 4)
    values.scale[1, :, 37:], values.minimum[1, :, 37:] = np.nan, np.inf
    keys.codes[1, :, 37:] ^= np.uint32(0xFFFFFFFF)
    output, lse = decode_attention(query, keys, values, lengths=lengths)
    assert not output[0].any() and np.isneginf(lse[0]).all()
    decoded = decode(keys)[1:2, :, :37], decode(encode_values(x, 4))[1:2, :, :37]
    for one, other in zip((output[1:2], lse[1:2]), attention.decode(query[1:2], *decoded)):
        np.testing.assert_allclose(one, other, atol=1e-12)
    assert decode_attention(query, keys, values, lengths=lengths, return_lse=False).shape == (3, 4, 64)


# --- Printed tables --------------------------------------------------------------------------------------------------


def test_bits_per_element_are_as_printed():
    printed = {(2, 32): "3.00 5.33", (2, 64): "2.50 6.40", (2, 128): "2.25 7.11",
               (4, 32): "5.00 3.20", (4, 64): "4.50 3.56", (4, 128): "4.25 3.76"}
    for (bits, group), text in printed.items():
        for encode in (encode_keys, encode_values):
            encoded = encode(np.zeros((1, 2, 128, 128)), bits, group)
            held = 8 * encoded.nbytes / (2 * 128 * 128)
            assert held == encoded.bits_per_element and f"{held:.2f} {16 / held:.2f}" == text


def test_bytes_are_as_printed():
    scheme = Scheme()
    assert scheme.nbytes(4159, 8, 128) == 3511936 and f"{17035264 / 3511936:.2f}" == "4.85"
    assert scheme.nbytes(32768, 8, 128) == 25378816 and f"{134217728 / 25378816:.2f}" == "5.29"
    assert (scheme.stored_keys(4159), scheme.stored_values(4159)) == (4096, 4031)
    state = prefill(*np.zeros((2, 1, 1, 4159, 32), np.float16), scheme)
    assert {name: array.nbytes * 32 for name, array in state.arrays().items() if "tail" in name} == {
        "key_tail": 129024, "value_tail": 262144}
    assert (state.keys.nbytes * 32, state.values.nbytes * 32) == (1572864, 1547904)
    means = {tokens: [np.mean([bits + 13 * exact / tokens for exact in window]) for bits, window in
                      ((3, np.arange(129)), (3, [128]))] for tokens in (4096, 32768)}
    assert [f"{mean:.2f}" for pair in means.values() for mean in pair] == ["3.20", "3.41", "3.03", "3.05"]


def test_distortion_of_normal_numbers_is_as_printed():
    for bits, printed in ((2, 0.1545), (4, 0.00612)):
        assert kivi.normal_distortion(bits, 32) == pytest.approx(printed, rel=0.01)      # as the specification allows
    assert [f"{kivi.normal_distortion(bits, group):.3g}" for bits in (2, 4) for group in (32, 64, 128)] == [
        "0.154", "0.202", "0.25", "0.00612", "0.00803", "0.00995"]


def test_worst_errors_are_as_printed():
    """compat: 0.5021 s and 0.5105 s seen; float16 decoding at a mean of 1000 standard deviations: 0.75 s."""
    x = np.random.default_rng(2).standard_normal((20000, 32))
    for bits, low, high in ((2, 0.5005, 0.503), (4, 0.504, 0.515)):
        c, s, m = (array.astype(np.float64) for array in quantise(x, bits, "compat"))
        worst = (np.abs(to_float16(x) - (c * s[:, None] + m[:, None])) / s[:, None]).max()
        assert low < worst < high
    x = x + 1000
    c, s, m = quantise(x, 2)
    with_half = c.astype(np.float16) * s[:, None] + m[:, None]
    worst = np.abs(to_float16(x).astype(np.float64) - with_half)[s > 0] / s[s > 0].astype(np.float64)[:, None]
    assert 0.6 < worst.max() < 1


# --- The cache -------------------------------------------------------------------------------------------------------


def tokens_of(seed, tokens, head_dim=32):
    return filled(seed, (1, 1, tokens, head_dim)), filled(seed + 1, (1, 1, tokens, head_dim))


def part(pair, start, stop):
    return [x[:, :, start:stop] for x in pair]


@pytest.mark.parametrize("scheme", [Scheme(window=32), Scheme(4, 2, window=64, sinks=3)], ids=str)
def test_every_prompt_followed_by_single_tokens_makes_the_same_states(scheme):
    last = 3 * scheme.window + 2
    both = tokens_of(0, last)
    expected = [prefill(*part(both, 0, tokens), scheme) for tokens in range(last + 1)]
    for prompt in range(0, last + 1, 1 if scheme.window == 32 else 7):
        state = expected[prompt]
        for tokens in range(prompt + 1, last + 1):
            state = append(state, *part(both, tokens - 1, tokens), scheme)
            assert state.tokens == tokens
            if tokens % 5 == 0 or tokens > last - 3 or tokens - prompt < 3 or tokens % scheme.window < 2:
                assert same_bits(state, expected[tokens])


def test_states_hold_what_the_rule_says():
    scheme = Scheme(window=64, group=32)
    both = tokens_of(0, 200)
    for tokens, keys, values in ((0, 0, 0), (1, 0, 0), (63, 0, 0), (64, 64, 0), (65, 64, 1), (127, 64, 63),
                                 (128, 128, 64), (129, 128, 65), (200, 192, 136)):
        state = prefill(*part(both, 0, tokens), scheme)
        assert (state.tokens, state.keys.tokens, state.values.tokens) == (tokens, keys, values)
        assert (state.key_tail == both[0][:, :, keys:tokens]).all() and state.key_tail.dtype == np.float16
        assert (state.value_tail == both[1][:, :, values:tokens]).all()
        assert (unpack(state.keys.codes, 2) == unpack(encode_keys(both[0][:, :, :keys], 2).codes, 2)).all()


@given(seed=SEEDS, group=st.sampled_from((32, 64)), blocks=st.integers(1, 2), key_bits=ALL_BITS, value_bits=ALL_BITS,
       sinks=st.sampled_from((0, 1, 33)), content=CONTENTS, dtype=DTYPES,
       counts=st.lists(st.integers(0, 70), min_size=1, max_size=6))
def test_chunks_make_the_same_state(seed, group, blocks, key_bits, value_bits, sinks, content, dtype, counts):
    scheme = Scheme(key_bits, value_bits, group, group * blocks, sinks)
    tokens = sum(counts)
    both = [filled(seed + i, (2, 1, tokens, 64), dtype, content) for i in range(2)]
    state, start = prefill(*part(both, 0, 0), scheme), 0
    for count in counts:
        state = append(state, *part(both, start, start + count), scheme)
        start += count
    assert same_bits(state, prefill(*both, scheme)) and state.nbytes == 2 * scheme.nbytes(tokens, 1, 64)


def test_a_step_sees_the_state_before_its_flush():
    """T = 63 with R = 64: the step that completes a window still has 64 exact keys; the next has none but its own."""
    scheme, both = Scheme(window=64), tokens_of(3, 65)
    query = filled(5, (1, 2, 32))
    state = prefill(*part(both, 0, 63), scheme)
    exact = attention.decode(query, *part(both, 0, 64))
    np.testing.assert_allclose(attend(query, state, *part(both, 63, 64))[0], exact[0], atol=1e-12)
    state = append(state, *part(both, 63, 64), scheme)
    keys = np.concatenate([decode(encode_keys(both[0][:, :, :64], 2)), both[0][:, :, 64:]], axis=2)
    expected = attention.decode(query, keys, both[1])                          # 65 = R + 1 exact values
    for one, other in zip(attend(query, state, *part(both, 64, 65)), expected):
        np.testing.assert_allclose(one, other, atol=1e-12)
    assert np.abs(expected[0] - attention.decode(query, *both)[0]).max() > 1e-3


def test_a_chunk_attends_to_itself_exactly():
    """Three tokens on a full window: all of them see state(64), and each the exact ones up to itself."""
    scheme, both = Scheme(window=64), tokens_of(3, 67)
    state, stored = prefill(*part(both, 0, 64), scheme), decode(encode_keys(both[0][:, :, :64], 2))
    for last in (65, 66, 67):
        query = filled(last, (1, 2, 32))
        keys = np.concatenate([stored, both[0][:, :, 64:last]], axis=2)
        expected = attention.decode(query, keys, both[1][:, :, :last])
        np.testing.assert_allclose(attend(query, state, *part(both, 64, last))[0], expected[0], atol=1e-12)


def test_sinks_are_exact_and_the_groups_stay():
    both = tokens_of(1, 100)
    plain, kept = (prefill(*both, Scheme(window=32, sinks=sinks)) for sinks in (0, 5))
    assert all((array == kept.arrays()[name]).all() for name, array in plain.arrays().items() if "sink" not in name)
    assert (kept.sink_keys == both[0][:, :, :5]).all() and (kept.sink_values == both[1][:, :, :5]).all()
    query = filled(2, (1, 1, 32))
    keys, values = decode(kept.keys), decode(kept.values)
    keys[:, :, :5], values[:, :, :5] = part(both, 0, 5)
    keys = np.concatenate([keys, kept.key_tail], axis=2)
    values = np.concatenate([values, kept.value_tail], axis=2)
    np.testing.assert_allclose(attend(query, kept)[0], attention.decode(query, keys, values)[0], atol=1e-12)
    assert kept.nbytes == Scheme(window=32, sinks=5).nbytes(100, 1, 32)


def test_crop():
    scheme, both = Scheme(window=64, sinks=2), tokens_of(1, 150)
    state = prefill(*both, scheme)
    cut = crop(state, 130)
    assert cut.tokens == 130 and cut.values.tokens == 86 and cut.value_tail.shape[2] == 44
    again = append(cut, *part(both, 130, 150), scheme)
    assert same_bits(again, state) and same_bits(crop(state, 150), state)
    assert same_bits(append(again, *tokens_of(7, 60), scheme), append(state, *tokens_of(7, 60), scheme))
    short = prefill(*part(both, 0, 20), scheme)
    assert same_bits(crop(short, 1), prefill(*part(both, 0, 1), scheme))
    with pytest.raises(ValueError, match=r"tokens: expected 128 \(keys that are codes\) to 150, got 127"):
        crop(state, 127)


def test_quality_orders_as_the_paper_says():
    """Keys with outlier channels: per channel beats per token; more bits, smaller groups and sinks are better."""
    keys = filled(0, (1, 2, 512, 64)) + (8 * (np.arange(64) % 16 == 3)).astype(np.float16)
    exact = keys.astype(np.float64)

    def error(encoded):
        return np.linalg.norm(decode(encoded) - exact) / np.linalg.norm(exact)

    for bits in (2, 4):
        assert error(encode_keys(keys, bits)) < 0.6 * error(encode_values(keys, bits))
    assert error(encode_keys(keys, 4)) < error(encode_keys(keys, 2, 32)) < error(encode_keys(keys, 2, 128))


# --- Errors ----------------------------------------------------------------------------------------------------------

GOOD = filled(0, (2, 3, 64, 64))
KEYS, VALUES, QUERY = encode_keys(GOOD, 2), encode_values(GOOD, 2), filled(1, (2, 6, 64))
STATE = prefill(GOOD, GOOD, Scheme())


@pytest.mark.parametrize(("call", "message"), [
    (lambda: quantise(GOOD, 3), "bits: expected 2, 4 or 8, got 3"),
    (lambda: quantise(GOOD, 2, "fast"), "arithmetic: expected one of ref, compat, got 'fast'"),
    (lambda: encode_keys(GOOD[0], 2), r"x: expected \[batch, kv_heads, tokens, head_dim\], got \[3, 64, 64\]"),
    (lambda: encode_keys(GOOD, True), "bits: expected 2, 4 or 8, got True"),
    (lambda: encode_keys(GOOD, 2, 48), "group: expected a positive multiple of 32, got 48"),
    (lambda: encode_values(GOOD, 2, 0), "group: expected a positive multiple of 32, got 0"),
    (lambda: encode_keys(GOOD[:, :, :33], 2), "x: expected tokens in whole groups of 32, got 33 tokens: the last ones"),
    (lambda: encode_keys(GOOD[..., :48], 2), "x: expected a head_dim that is a multiple of 32, got 48"),
    (lambda: encode_values(GOOD, 2, 128), "x: expected head_dim in whole groups of 128, got head_dim 64"),
    (lambda: pack(np.full(32, 4), 2), "codes: expected integers from 0 to 3, got int64 from 4 to 4"),
    (lambda: pack(np.zeros(32), 2), "codes: expected integers from 0 to 3, got float64 from"),
    (lambda: pack(np.zeros(33, int), 2), r"codes: expected \[..., a multiple of 32\], got \[33\]"),
    (lambda: unpack(np.zeros(3, np.uint32), 2), r"words: expected uint32 \[..., a multiple of 2\], got uint32 \[3\]"),
    (lambda: unpack(np.zeros(4, np.int32), 2), "words: expected uint32 .* got int32"),
    (lambda: logits(QUERY[:, :5], KEYS), r"query: .* = \[2, a multiple of 3, 64\], got \[2, 5, 64\]"),
    (lambda: decode_attention(QUERY[..., :32], KEYS, VALUES), r"query: expected .* got \[2, 6, 32\]"),
    (lambda: decode_attention(QUERY, KEYS, encode_values(GOOD[:, :, :63], 2)),
     r"values: expected .* = \[2, 3, 64, 64\] as of the keys, got \[2, 3, 63, 64\]"),
    (lambda: decode_attention(QUERY, KEYS, VALUES, lengths=[1, 65]), r"lengths: .* from 0 to 64, got \[1, 65\]"),
    (lambda: decode_attention(QUERY, KEYS, VALUES, lengths=[1]), r"lengths: expected \[batch\] = \[2\] .* got \[1\]"),
    (lambda: Scheme(key_bits=5), "key_bits: expected 2, 4 or 8, got 5"),
    (lambda: Scheme(value_bits=1), "value_bits: expected 2, 4 or 8, got 1"),
    (lambda: Scheme(group=64, window=96), "window: expected a positive multiple of the group 64, got 96"),
    (lambda: Scheme(window=0), "window: expected a positive multiple of the group 32, got 0"),
    (lambda: Scheme(sinks=-1), "sinks: expected an integer of at least 0, got -1"),
    (lambda: prefill(GOOD[0], GOOD[0], Scheme()), "keys: expected .* got"),
    (lambda: prefill(GOOD, GOOD[:, :, :3], Scheme()), r"values: expected the shape of keys, .* got \[2, 3, 3, 64\]"),
    (lambda: append(STATE, GOOD[:1], GOOD[:1], Scheme()), r"keys: expected \[2, 3, tokens, 64\] as the cache holds"),
    (lambda: crop(STATE, 65), r"tokens: expected 0 .* to 64, got 65"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match="kivi.*" + message):
        call()


# --- Defects that the claims find ------------------------------------------------------------------------------------

QUANTISE, ASSIGN, ENCODE, DECODE, ATTEND_CODES = (kivi.quantise, kivi.assign, kivi._encode, kivi.decode,
                                                  kivi.decode_attention)
LOGITS, PREFILL, APPEND, ATTEND, PACK = kivi.logits, kivi.prefill, kivi.append, kivi.attend, kivi.pack
INTERCHANGE, BOUND = kivi.to_interchange, kivi.error_bound


def assign_rounds_down(x, s, m, bits, arithmetic="ref"):
    x, s, m = (np.asarray(array).astype(np.float64) for array in (x, s[..., None], m[..., None]))
    return np.floor(np.clip((x - m) / np.where(s > 0, s, 1), 0, 2**bits - 1)).astype(np.uint8)


def quantise_with_a_wide_scale(x, bits, arithmetic="ref"):
    """(max - min) / 2^bits, as quantisers of integers with a zero point have it."""
    _, s, m = QUANTISE(x, bits, arithmetic)
    s = (s.astype(np.float32) * np.float32((2**bits - 1) / 2**bits)).astype(np.float16)
    return ASSIGN(x, s, m, bits, arithmetic), s, m


def quantise_in_float16(x, bits, arithmetic="ref"):
    return QUANTISE(x, bits, "compat")


def quantise_without_rounding_m(x, bits, arithmetic="ref"):
    """An integer zero point, which most libraries have: m is a multiple of s."""
    _, s, m = QUANTISE(x, bits, arithmetic)
    wide = s.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        m = np.where(s > 0, np.rint(m / wide) * wide, m).astype(np.float16)
    return ASSIGN(x, s, m, bits, arithmetic), s, m


def encode_with_one_scale(kind, x, bits, group):
    encoded = ENCODE(kind, x, bits, group)
    scale = np.broadcast_to(encoded.scale.max(axis=2, keepdims=True, initial=0), encoded.scale.shape)
    return dataclasses.replace(encoded, scale=scale)


def decode_in_float16(encoded):
    with np.errstate(over="ignore"):
        return DECODE(encoded).astype(np.float16).astype(np.float64)


def per_number_scaled(encoded, x):
    return np.repeat(x.astype(np.float64), encoded.group, axis=encoded.grouped_axis) * 1.0001


def logits_without_minima(query, keys, *, scale=None):
    return LOGITS(query, dataclasses.replace(keys, minimum=keys.minimum * 0), scale=scale)


def logits_of_another_head(query, keys, *, scale=None):
    order = np.argsort(np.arange(query.shape[1]) % keys.codes.shape[1], kind="stable")
    return LOGITS(query[:, order], keys, scale=scale)[:, np.argsort(order)]


def attend_without_minima(query, keys, values, **options):
    return ATTEND_CODES(query, keys, dataclasses.replace(values, minimum=values.minimum * 0), **options)


def attend_a_token_too_many(query, keys, values, *, lengths=None, **options):
    lengths = None if lengths is None else np.minimum(np.asarray(lengths) + 1, keys.tokens)
    return ATTEND_CODES(query, keys, values, lengths=lengths, **options)


def attend_in_bits(*arguments, **options):
    output, lse = ATTEND_CODES(*arguments, **{**options, "return_lse": True})
    return (output, lse / np.log(2)) if options.get("return_lse", True) else output


def append_one_group_a_token(state, keys, values, scheme):
    """The wrong short cut of ports: what is new is quantised at once (here: the newest values)."""
    following = APPEND(state, keys, values, scheme)
    if not following.value_tail.shape[2]:
        return following
    tail = following.value_tail.copy()
    tail[:, :, -1] = kivi.to_float16(DECODE(encode_values(tail[:, :, -1:], scheme.value_bits, 32)))[:, :, 0]
    return dataclasses.replace(following, value_tail=tail)


def append_keeps_the_window_full(state, keys, values, scheme):
    """Keys flushed group by group, down to R exact ones."""
    for i in range(keys.shape[2]):
        state = APPEND(state, keys[:, :, i : i + 1], values[:, :, i : i + 1],
                       dataclasses.replace(scheme, window=scheme.group))
    return state


def attend_after_the_flush(query, state, keys=None, values=None, **options):
    """As Algorithm 1 is printed: the token before this one is flushed too early (windows of one group)."""
    scheme = Scheme(state.keys.bits, state.values.bits, state.keys.group, state.keys.group)
    return ATTEND(query, APPEND(state, keys, values, scheme), **options)


def attend_without_the_new_token(query, state, keys=None, values=None, **options):
    return ATTEND(query, state, **options)


def pack_low_bits_first(codes, bits):
    codes = np.asarray(codes)
    shifts = (bits * np.arange(32 // bits)).astype(np.uint32)
    fields = codes.astype(np.uint32).reshape(*codes.shape[:-1], codes.shape[-1] * bits // 32, len(shifts))
    return np.bitwise_or.reduce(fields << shifts, axis=-1)


def pack_wastes_a_word(codes, bits):
    words = PACK(codes, bits)
    return np.concatenate([words] * 2, axis=-1)


def pack_drops_a_bit(codes, bits):
    return PACK(np.asarray(codes) & ~1, bits)


def interchange_not_transposed(encoded):
    words, scale, minimum = INTERCHANGE(Values(encoded.codes, encoded.scale, encoded.minimum, encoded.bits,
                                               encoded.group))
    return words, scale, minimum


def scheme_with_wide_scales(self, tokens, kv_heads, head_dim):
    """Scales and minima of 32 bits."""
    coded = self.stored_keys(tokens) + self.stored_values(tokens)
    return int(kv_heads * head_dim * 32 / self.group * coded / 8) + NBYTES(self, tokens, kv_heads, head_dim)


NBYTES = Scheme.nbytes
DEFECTS = [
    (kivi, "assign", assign_rounds_down, ["error", "error of compat", "distortion"]),
    (kivi, "quantise", quantise_with_a_wide_scale, ["error", "error of compat", "requantising", "distortion"]),
    (kivi, "quantise", quantise_in_float16, ["error"]),
    (kivi, "quantise", quantise_without_rounding_m, ["error", "requantising"]),
    (kivi, "_encode", encode_with_one_scale, ["group by group"]),
    (kivi, "decode", decode_in_float16, ["error", "attention on codes"]),
    (kivi, "decode", lambda encoded: DECODE(encoded) * 1.01, ["float16 decoding", "steps"]),
    (kivi, "_per_number", per_number_scaled, ["error", "attention on codes"]),
    (kivi, "error_bound", lambda encoded: BOUND(encoded) / 4, ["error", "output bound"]),
    (kivi, "error_bound", lambda encoded: BOUND(encoded) / 30, ["logit bound"]),
    (kivi, "logits", logits_without_minima, ["logit bound", "attention on codes"]),
    (kivi, "logits", logits_of_another_head, ["grouped heads", "attention on codes"]),
    (kivi, "logits", lambda *arguments, scale=None: LOGITS(*arguments, scale=1.0), ["attention on codes"]),
    (kivi, "decode_attention", attend_without_minima, ["output bound", "attention on codes"]),
    (kivi, "decode_attention", attend_a_token_too_many, ["attention on codes", "split and merge", "steps"]),
    (kivi, "decode_attention", attend_in_bits, ["split and merge", "attention on codes", "steps",
                                                "probability ratio"]),
    (kivi, "append", append_one_group_a_token, ["append"]),
    (kivi, "append", append_keeps_the_window_full, ["append"]),
    (kivi, "attend", attend_after_the_flush, ["steps"]),
    (kivi, "attend", attend_without_the_new_token, ["steps"]),
    (kivi, "pack", pack_low_bits_first, ["round trip", "order of the bits", "operands"]),
    (kivi, "pack", pack_drops_a_bit, ["round trip", "order of the bits", "operands"]),
    (kivi, "pack", pack_wastes_a_word, ["bytes", "order of the bits"]),
    (kivi, "to_interchange", interchange_not_transposed, ["interchange"]),
    (Scheme, "nbytes", scheme_with_wide_scales, ["bytes"]),
]


@pytest.mark.parametrize(("where", "name", "defect", "found_by"), DEFECTS, ids=range(len(DEFECTS)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_defect_is_found(monkeypatch, where, name, defect, found_by):
    assert all(find_without_defect("kivi", claim).holds for claim in found_by)
    monkeypatch.setattr(where, name, defect)

    def holds(claim):
        try:
            return find("kivi", claim).holds
        except (ValueError, IndexError):                    # shapes that no longer fit are noticed, too
            return False

    missed = [claim for claim in found_by if holds(claim)]
    assert not missed


def test_every_claim_finds_a_defect():
    assert {c.name for c in claims.algorithms()["kivi"]} == {name for *_, names in DEFECTS for name in names}
