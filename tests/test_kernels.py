"""Every kernel of the registry, on every backend of this machine, against its reference on drawn inputs."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import TESTED_BACKENDS, needs
from kvbench import loaders, registry, trees
from kvbench.reference.selection import Selection
from kvbench.verify import compare, draw_problem, run
from strategies import inputs
from strategies.arrays import schedules

registry.load()
KERNELS = registry.KERNELS.values()
PAIRS = [pytest.param(kernel.name, *needs(backend).values, marks=needs(backend).marks, id=f"{kernel.name}-{backend}")
         for kernel in KERNELS for backend in TESTED_BACKENDS if backend in kernel.backends]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
@given(data=st.data())
def test_agrees_with_the_reference(name, backend, data):
    kernel = registry.get(name)
    arguments = data.draw(inputs(kernel), label="inputs")
    compare(kernel, arguments, backend, schedule=data.draw(schedules) if backend == "simt" else 0,
            ftz=data.draw(st.booleans()) if backend == "simt" else False)


@pytest.mark.parametrize("name", [k.name for k in KERNELS if "simt" in k.backends])
@given(data=st.data())
def test_every_schedule_gives_the_same_bits(name, data):
    """No result may depend on which thread runs first: no reference is needed to see a missing barrier."""
    kernel = registry.get(name)
    arguments = data.draw(inputs(kernel), label="inputs")
    in_order, shuffled = (run(kernel, arguments, "simt", schedule=seed)
                          for seed in (0, data.draw(schedules.filter(bool))))
    for one, other in zip(parts(in_order), parts(shuffled), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_agrees_on_registry_problems(name, backend):
    """The benchmark's own inputs, at small sizes: what `kvbench verify` runs."""
    kernel = registry.get(name)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        compare(kernel, kernel.inputs(kernel.problem(**draw_problem(kernel, rng)), rng), backend)


@pytest.mark.parametrize("name", [k.name for k in KERNELS])
def test_agreement_refuses_a_wrong_result(name):
    """The tolerance is worth something: one wrong element, a swapped pair of elements, and NaN are all refused."""
    kernel = registry.get(name)
    rng = np.random.default_rng(1)
    small = {axis: 2 for axis in ("tokens", "batch", "parts") if axis in kernel.axes}
    if "percent" in kernel.axes:
        small["tokens"] = 60            # lists of different lengths
    arguments = kernel.inputs(kernel.problem(**small), rng)
    expected = kernel.reference(**arguments)
    kernel.agreement(arguments, expected, run(kernel, arguments, "reference"))
    for damage in (wrong_element, first_is_nan, swapped):
        actual = run(kernel, arguments, "reference")
        for damaged, array in trees.arrays_of(actual).items():   # each array of a container in turn
            if damage is first_is_nan and array.dtype.kind in "iu":
                continue
            if np.array_equal(damage(array), array):
                continue
            broken = trees.apply(lambda path, x, damaged=damaged: damage(x) if path == damaged else x, actual)
            with pytest.raises(AssertionError):
                kernel.agreement(arguments, expected, broken)


def wrong_element(x):
    """One element off by 0.05, or one bit of a word of codes, or of a byte."""
    chosen = np.arange(x.size).reshape(x.shape) == x.size // 2
    if x.dtype.kind in "iu":
        return x ^ (chosen.astype(x.dtype) << min(13, 8 * x.itemsize - 3))
    return x + x.dtype.type(0.05) * chosen


def first_is_nan(x):
    return np.where(np.arange(x.size).reshape(x.shape) == 0, np.array(np.nan, x.dtype), x).astype(x.dtype)


def swapped(x):
    return np.roll(x, 1, axis=-1 if x.shape[-1] > 1 else 1)


def parts(result):
    if isinstance(result, Selection):       # what lies beyond a list is undefined
        unlisted = np.arange(result.indices.shape[2]) >= result.counts[:, :, None]
        return np.where(unlisted, -1, result.indices), result.counts, result.mass
    if isinstance(result, tuple):
        return [part for one in result for part in parts(one)]
    return trees.arrays_of(result).values()


def test_unavailable_backends_say_what_to_do():
    from kvbench.errors import BackendUnavailable

    for backend in registry.BACKENDS:
        reason = loaders.availability(backend)
        if reason:
            with pytest.raises(BackendUnavailable, match=backend):
                loaders.require(backend)
