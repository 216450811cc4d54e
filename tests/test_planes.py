"""Bit planes against a loop over single bits, what is refused, and defects that the claims find."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench import claims
from kvbench.reference import planes
from kvbench.reference.planes import Planes, concatenate, gather, pack, unpack, words
from test_claims import find, find_without_defect

bits = st.integers(1, 8)
head_dims = st.one_of(st.integers(1, 130), st.sampled_from((32, 64, 128, 256)))


def codes(seed, shape, bits):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, shape), rng.integers(0, 2 ** (bits - 1), shape)


def packed_bit_by_bit(signs, magnitudes, bits, head_dim):
    """{plane: words} of one token, as Python integers, straight from the rule."""
    planes = {"sign": [0] * -(-head_dim // 32)}
    planes |= {f"mag2_{i}": [0] * -(-head_dim // 16) for i in range((bits - 1) // 2)}
    if bits % 2 == 0:
        planes["mag1"] = [0] * -(-head_dim // 32)
    for j in range(head_dim):
        w, s, p = j // 32, j % 32 // 8, j % 8
        planes["sign"][w] |= int(signs[j]) << (4 * p + s)
        for i in range((bits - 1) // 2):
            planes[f"mag2_{i}"][2 * w + (s >> 1)] |= (int(magnitudes[j]) >> 2 * i & 3) << (4 * p + 2 * (s & 1))
        if bits % 2 == 0:
            planes["mag1"][w] |= (int(magnitudes[j]) >> (bits - 2)) << (4 * p + s)
    return planes


@given(bits=bits, head_dim=head_dims, seed=st.integers(0, 2**32))
def test_pack_is_the_loop_over_bits(bits, head_dim, seed):
    signs, magnitudes = codes(seed, (2, 1, 2, head_dim), bits)
    packed = pack(signs, magnitudes, bits)
    assert packed.bits == bits
    assert {name: plane.shape[-1] for name, plane in packed.arrays().items()} == words(bits, head_dim)
    for b in range(2):
        for t in range(2):
            expected = packed_bit_by_bit(signs[b, 0, t], magnitudes[b, 0, t], bits, head_dim)
            assert {name: plane[b, 0, t].tolist() for name, plane in packed.arrays().items()} == expected
    for plane in packed.arrays().values():
        assert plane.dtype == np.uint32 and plane.flags.c_contiguous and plane.shape[:3] == (2, 1, 2)
    again = unpack(packed, head_dim)
    for actual, expected in zip(again, (signs, magnitudes)):
        assert actual.dtype == np.uint8
        np.testing.assert_array_equal(actual, expected)


def test_printed_words():
    j = np.arange(32)
    packed = pack(np.isin(j, (0, 1, 8, 31))[None, None, None], (j // 3 % 4)[None, None, None], 3)
    assert packed.sign.ravel().tolist() == [0x80000013]
    assert packed.mag2[0].ravel().tolist() == [0x6211DCC8, 0xBB766211] and packed.mag1 is None


@pytest.mark.parametrize(("bits", "names"), [
    (1, ["sign"]), (2, ["sign", "mag1"]), (3, ["sign", "mag2_0"]), (4, ["sign", "mag2_0", "mag1"]),
    (5, ["sign", "mag2_0", "mag2_1"]), (6, ["sign", "mag2_0", "mag2_1", "mag1"]),
    (7, ["sign", "mag2_0", "mag2_1", "mag2_2"]), (8, ["sign", "mag2_0", "mag2_1", "mag2_2", "mag1"])])
def test_planes_of_each_number_of_bits(bits, names):
    packed = pack(*codes(0, (1, 2, 3, 64), bits), bits)
    assert list(words(bits, 64)) == list(packed.arrays()) == names
    assert packed.nbytes == 2 * 3 * 64 * bits // 8
    again = Planes.of(packed.arrays())
    assert again.bits == bits and list(again.arrays()) == names


@given(bits=bits, head_dim=head_dims, seed=st.integers(0, 2**32), cut=st.integers(0, 7))
def test_append_and_gather(bits, head_dim, seed, cut):
    signs, magnitudes = codes(seed, (2, 2, 7, head_dim), bits)
    whole = pack(signs, magnitudes, bits)
    joined = concatenate([pack(signs[:, :, :cut], magnitudes[:, :, :cut], bits),
                          pack(signs[:, :, cut:], magnitudes[:, :, cut:], bits)])
    for tokens in (np.random.default_rng(seed).integers(0, 7, (2, 2, 4)), np.array([[[6, 0]]]), np.array([3, 3, 1])):
        chosen = np.broadcast_to(tokens, (2, 2, tokens.shape[-1]))[..., None]
        expected = [np.take_along_axis(x, chosen, axis=2) for x in (signs, magnitudes)]
        for actual, wanted in zip(unpack(gather(whole, tokens), head_dim), expected):
            np.testing.assert_array_equal(actual, wanted)
    for name, plane in whole.arrays().items():
        np.testing.assert_array_equal(plane, joined.arrays()[name])


def test_no_tokens():
    packed = pack(np.zeros((1, 2, 0, 64), int), np.zeros((1, 2, 0, 64), int), 4)
    assert {plane.shape for plane in packed.arrays().values()} == {(1, 2, 0, 2), (1, 2, 0, 4)}
    assert unpack(packed, 64)[0].shape == (1, 2, 0, 64)


ZEROS = np.zeros((1, 1, 1, 32), int)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: pack(ZEROS, ZEROS, 0), "planes: bits: expected an integer from 1 to 8, got 0"),
    (lambda: words(9, 64), "planes: bits: expected an integer from 1 to 8, got 9"),
    (lambda: pack(ZEROS, ZEROS, True), "planes: bits: .* got True"),
    (lambda: pack(ZEROS + 2, ZEROS, 3), "planes.pack: signs: expected integers from 0 to 1, got int64 from 2 to 2"),
    (lambda: pack(ZEROS, ZEROS + 4, 3), "pack: magnitudes: expected integers from 0 to 3, got int64 from 4 to 4"),
    (lambda: pack(ZEROS, ZEROS - 1, 3), "pack: magnitudes: expected integers from 0 to 3, got int64 from -1 to -1"),
    (lambda: pack(ZEROS, ZEROS + 0.5, 3), "pack: magnitudes: expected integers .* got float64"),
    (lambda: pack(ZEROS, ZEROS[..., :31], 3),
     r"magnitudes: expected the shape of signs, \[1, 1, 1, 32\], got \[1, 1, 1, 31\]"),
    (lambda: unpack(pack(ZEROS, ZEROS, 3), 33),
     r"planes.unpack: plane: expected uint32 \[..., 3\] for head_dim 33, got uint32 \[1, 1, 1, 2\]"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Defects that the claims find ------------------------------------------------------------------------------------


def changed(change):
    """Planes of pack(), changed."""
    return lambda signs, magnitudes, bits: Planes.of({name: change(name, plane) for name, plane in
                                                      PACK(signs, magnitudes, bits).arrays().items()})


def pack_drops_top_bit(signs, magnitudes, bits):
    packed = PACK(signs, magnitudes, bits)
    return packed if packed.mag1 is None else Planes(packed.sign, packed.mag2, packed.mag1 * 0)


def pack_wastes_a_word(name, plane):
    return np.concatenate([plane, plane[..., :1]], axis=-1) if name == "sign" else plane


def concatenate_reversed(parts):
    return CONCATENATE(list(parts)[::-1])


def gather_from_first_head(planes, tokens):
    return GATHER(planes, np.broadcast_to(np.asarray(tokens)[:1, :1], np.shape(tokens)))


PACK, CONCATENATE, GATHER, BIT = pack, concatenate, gather, planes._BIT
PLAIN = np.arange(32, dtype=np.uint32).reshape(4, 8)                    # bit j for coordinate j

DEFECTS = [
    ("_BIT", PLAIN, ["order of the bits", "selectors"]),
    ("_PAIR", PLAIN[:2] * 2, ["order of the bits", "selectors"]),
    ("pack", changed(lambda name, plane: plane[..., ::-1]), ["round trip", "order of the bits", "selectors"]),
    ("pack", changed(lambda name, plane: plane ^ np.uint32(name == "sign")), ["round trip", "order of the bits"]),
    ("pack", pack_drops_top_bit, ["round trip", "order of the bits", "selectors"]),
    ("pack", changed(pack_wastes_a_word), ["bytes"]),
    ("concatenate", concatenate_reversed, ["append"]),
    ("gather", gather_from_first_head, ["gather"]),
]


@pytest.mark.parametrize(("name", "defect", "found_by"), DEFECTS, ids=range(len(DEFECTS)))
def test_defect_is_found(monkeypatch, name, defect, found_by):
    assert all(find_without_defect("planes", claim).holds for claim in found_by)
    monkeypatch.setattr(planes, name, defect)
    missed = [claim for claim in found_by if find("planes", claim).holds]
    assert not missed


def test_every_claim_finds_a_defect():
    assert {c.name for c in claims.algorithms()["planes"]} == {name for _, _, names in DEFECTS for name in names}
