"""Rotations: what random inputs of test_kernels.py do not show by themselves, and the errors of the operator."""
import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from conftest import needs
from kvbench import loaders
from kvbench.ops.rotation import haar, hadamard, rotate, scaled_signs
from kvbench.reference import rotation as reference
from kvbench.verify import run
from kvbench import registry
from strategies.arrays import fill, head_dims, seeds

FLOAT_BACKENDS = [needs(backend) for backend in ("cpu", "simt", "cuda", "native")]


def bits_of_float32(x, rotation, inverse):
    """The definition of the float32 result: signs, butterflies in order, one scale; every operation rounded to
    float32."""
    signs, remaining = scaled_signs(rotation)
    y = x.astype(np.float32)
    for r in range(rotation.rounds):
        if inverse:
            y = reference.walsh_hadamard(y) * signs[rotation.rounds - 1 - r]
        else:
            y = reference.walsh_hadamard(y * signs[r])
    return (y * np.float32(remaining)).astype(x.dtype)


@pytest.mark.parametrize("backend", FLOAT_BACKENDS)
@given(data=st.data(), head_dim=head_dims, seed=seeds, rounds=st.integers(1, 8), inverse=st.booleans())
def test_hadamard_has_the_same_bits_on_every_backend(backend, data, head_dim, seed, rounds, inverse):
    dtype = data.draw(st.sampled_from(("float16", "bfloat16", "float32")))
    content = data.draw(st.sampled_from(("normal", "outlier channels", "equal", "zeros", "integers")))
    x = fill(np.random.default_rng(seed), (3, 5, head_dim), dtype, content)
    rotation = hadamard(head_dim, seed, rounds)
    actual = run(registry.get("rotation.rotate"), {"x": x, "rotation": rotation, "inverse": inverse}, backend)
    assert actual.tobytes() == bits_of_float32(x, rotation, inverse).tobytes()


@given(head_dim=st.sampled_from((2, 4, 64, 128, 512)), seed=seeds, rounds=st.integers(1, 4))
def test_reference_round_is_the_hadamard_matrix_of_scipy(head_dim, seed, rounds):
    rotation = hadamard(head_dim, seed, rounds)
    expected = np.eye(head_dim)
    for signs in rotation.signs:
        expected = scipy.linalg.hadamard(head_dim) / math.sqrt(head_dim) @ np.diag(signs) @ expected
    np.testing.assert_allclose(rotation.dense(), expected, atol=1e-14 * head_dim)


@pytest.mark.parametrize("make", [haar, hadamard])
@pytest.mark.parametrize("backend", FLOAT_BACKENDS)
def test_inverse_undoes_forward_in_place(make, backend):
    kernel = registry.get("rotation.rotate")
    x = np.random.default_rng(0).standard_normal((7, 128)).astype(np.float32)
    rotation = make(128, 3)
    y = run(kernel, {"x": x, "rotation": rotation}, backend)
    assert np.abs(y - x).max() > 0.1
    np.testing.assert_allclose(run(kernel, {"x": y, "rotation": rotation, "inverse": True}, backend), x, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", needs("simt")])
def test_out_may_be_the_input(backend):
    x = np.random.default_rng(0).standard_normal((70, 64)).astype(np.float16)
    expected = rotate(x, hadamard(64, 1), backend=backend)
    assert rotate(x, hadamard(64, 1), out=x, backend=backend) is x
    assert x.tobytes() == expected.tobytes()


def test_seed_makes_the_rotation():
    for make in (haar, hadamard):
        assert make(64, 5) == make(64, 5) and hash(make(64, 5)) == hash(make(64, 5)) and make(64, 5) != make(64, 6)
        np.testing.assert_array_equal(make(64, 5).dense(), make(64, 5).dense())
        assert np.abs(make(64, 5).dense() - make(64, 6).dense()).max() > 0.05
    assert hadamard(64, 5, 3) != hadamard(64, 5, 2)
    with pytest.raises(ValueError, match="read-only"):
        hadamard(64, 5).signs[0, 0] = 1


@pytest.mark.parametrize("backend", FLOAT_BACKENDS)
def test_nan_and_infinity_stay_in_their_row(backend):
    x = np.random.default_rng(0).standard_normal((9, 128)).astype(np.float16)
    clean = run(registry.get("rotation.rotate"), {"x": x, "rotation": hadamard(128, 0)}, backend)
    x[3, 7], x[5, 0] = np.nan, np.inf
    y = run(registry.get("rotation.rotate"), {"x": x, "rotation": hadamard(128, 0)}, backend)
    assert np.isnan(y[3]).all() and not np.isfinite(y[5]).any()
    others = [0, 1, 2, 4, 6, 7, 8]
    assert y[others].tobytes() == clean[others].tobytes()


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(x=[1.0]), TypeError, r"rotation.rotate: x: expected"),
    (dict(x=np.zeros((2, 64), np.int32)), TypeError, r"x: expected dtype float16, bfloat16 or float32, got int32"),
    (dict(x=np.zeros((2, 128), np.float32)), ValueError, r"rotation: expected head_dim 128 as in x, got 64"),
    (dict(x=np.zeros((128, 2), np.float32).T[:, ::2]), ValueError, r"x: expected contiguous memory"),
    (dict(rotation=np.eye(64)), TypeError, r"rotation: expected a Rotation .* got ndarray"),
    (dict(out=np.zeros((2, 64), np.float16)), TypeError, r"out: expected dtype float32, got float16"),
    (dict(out=np.zeros((3, 64), np.float32)), ValueError, r"out: expected shape \[2, 64\], got \[3, 64\]"),
    (dict(backend="gpu"), ValueError, r"backend: expected one of reference, cpu, cuda, native, simt, got 'gpu'"),
    (dict(backend="cuda"), ValueError, r"backend: expected one of reference, cpu, simt for arrays on cpu, got 'cuda'"),
])
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        rotate(**{"x": np.zeros((2, 64), np.float32), "rotation": hadamard(64, 0), **arguments})


@pytest.mark.skipif(loaders.availability("simt") is not None, reason=str(loaders.availability("simt")))
def test_cuda_kernels_say_which_sizes_they_take():
    with pytest.raises(ValueError, match="x: expected head_dim 64, 128 or 256 on backend 'simt', got 32"):
        rotate(np.zeros((2, 32), np.float32), hadamard(32, 0), backend="simt")
    with pytest.raises(ValueError, match="addresses that are multiples of 16 bytes"):
        rotate(np.zeros(2 * 64 + 1, np.float32)[1:].reshape(2, 64), hadamard(64, 0), backend="simt")


@pytest.mark.parametrize(("make", "message"), [
    (lambda: hadamard(96, 0), "head_dim: expected a power of two, got 96"),
    (lambda: hadamard(64, -1), "seed: expected a non-negative integer"),
    (lambda: hadamard(64, 0, 0), "rounds: expected an integer from 1 to 8, got 0"),
    (lambda: haar(7, 0), "head_dim: expected an even integer"),
    (lambda: haar(64, 1.5), "seed: expected a non-negative integer, got 1.5"),
    (lambda: reference.rotate(np.zeros((2, 32)), haar(64, 0)), r"x: expected \[..., 64\], got \[2, 32\]")])
def test_reference_refuses_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [haar, hadamard])
def test_rotations_are_no_function_of_data_drawn_from_the_same_seed(make):
    """One would draw vectors from default_rng(seed) and rotate them by seed: they must not be rows of that matrix."""
    x = np.random.default_rng(5).standard_normal((64, 64))
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    # 4096 coordinates of variance 1/64: one above 0.7 has a probability below 2e-6 if they are independent (Beta law).
    # QR of the data itself gives far larger ones, as it starts with the data's own first column.
    for inverse in (False, True):
        assert np.abs(reference.rotate(unit, make(64, 5), inverse=inverse)).max() < 0.7
        assert np.abs(reference.rotate(unit.T.copy(), make(64, 5), inverse=inverse)).max() < 0.7
