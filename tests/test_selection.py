"""Selection: geometry of launches, ties and long rows, workspaces, errors, and defects of the published release."""
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import needs
from kvbench import loaders, registry
from kvbench.arrays import upload
from kvbench.ops import selection
from kvbench.ops.selection import Selection, select_top_k, select_top_p, workspace
from kvbench.reference import selection as reference
from kvbench.scores import Scores
from kvbench.verify import run, to_host
from strategies.arrays import schedules
from strategies.selection import select_top_p as drawn_top_p

BACKENDS = [needs(backend) for backend in ("reference", "cpu", "simt", "cuda", "native")]
CUDA_BACKENDS = [needs(backend) for backend in ("simt", "cuda", "native")]


def on(backend, array):
    """A NumPy array where the backend can reach it."""
    return upload(array, "cuda").give() if backend in ("cuda", "native") else array


def scores(y, backend="cpu", sigma=None):
    return Scores(on(backend, np.asarray(y, np.float32)),
                  None if sigma is None else on(backend, np.asarray(sigma, np.float32)))


def lists(made: Selection) -> dict:
    made = to_host(made)
    return {row: made.indices[row][: made.counts[row]].tolist() for row in np.ndindex(made.counts.shape)}


def normal(seed, shape, tau=3.0):
    return (tau * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


# --- Launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@given(data=st.data(), blocks=st.integers(1, 4), listed=st.sampled_from((1, 3, 4096)), schedule=schedules)
def test_blocks_and_lists_of_any_size_give_the_selection(backend, data, blocks, listed, schedule):
    """Several blocks to a row, and rows with more tokens near the threshold than are listed."""
    arguments = data.draw(drawn_top_p())
    kernel = registry.get("selection.select_top_p")
    batch, q_heads, tokens = arguments["scores"].logits.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "choose_blocks", lambda *sizes: blocks)
        scratch = workspace(batch, q_heads, tokens, "cuda" if backend in ("cuda", "native") else "cpu", listed=listed)
        made = run(kernel, {**arguments, "workspace": scratch}, backend, schedule=schedule)
        again = run(kernel, {**arguments, "workspace": scratch}, backend)       # the workspace was left as it was found
    kernel.agreement(arguments, kernel.reference(**arguments), made)
    assert lists(made) == lists(again) and made.mass.tobytes() == again.mass.tobytes()
    assert not scratch.tickets.to_host().any()


@given(tokens=st.integers(0, 2**22), rows=st.integers(1, 4096), multiprocessors=st.integers(1, 200))
def test_blocks_fill_the_gpu(tokens, rows, multiprocessors):
    blocks = selection.choose_blocks(tokens, rows, multiprocessors)
    assert 1 <= blocks <= selection.MAX_BLOCKS                         # a lane reads what each has found
    assert blocks == 1 or blocks <= -(-tokens // 1024)
    turns = [-(-rows * n // multiprocessors) for n in (1, blocks)]     # of the multiprocessors, a block each
    assert turns[1] <= turns[0] * blocks                               # no later than with one block per row


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_many_tokens_in_many_blocks(backend):
    """The geometry of a GPU of 132 multiprocessors on rows of more than one block; every backend chooses the same."""
    y = normal(0, (1, 2, 5000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "multiprocessors", lambda *where: 132)
        assert selection.choose_blocks(5000, 2, 132) == 5
        made = [select_top_p(scores(y, where), 0.85, backend=where) for where in (backend, "cpu")]
    assert lists(made[0]) == lists(made[1])


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("most", [None, 300])
@pytest.mark.parametrize("calibrated", [False, "shrink", "shift"])
@pytest.mark.parametrize("content", ["narrow", "normal", "apart", "wide", "masked"])
def test_long_rows_in_every_mode(backend, most, calibrated, content):
    """Rows whose keys are further apart than bins are kept, or than they are counted, or so near each other that the
    whole row is searched; infinite logits; and with "shift" a bound that raises the threshold."""
    tokens, rng = 6000, np.random.default_rng(7)
    y = normal(8, (1, 4, tokens), tau={"narrow": 0.02, "normal": 3.0, "apart": 9.0, "wide": 20.0}.get(content, 3.0))
    if content == "masked":
        y[..., rng.permutation(tokens)[:2000]] = rng.choice([np.inf, -np.inf, np.nan, -1e9], (1, 4, 2000))
    sigma = rng.uniform(0, 1, y.shape)
    options = dict(kv_heads=2, sinks=4, recent=64, block=16, calibrated=calibrated, max_tokens=most)
    for p in (0.3, 0.85, 1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loaders, "multiprocessors", lambda *where: 132)
            made, expected = (to_host(select_top_p(scores(y, where, sigma), p, backend=where, **options))
                              for where in (backend, "cpu"))
        assert lists(made) == lists(expected)
        assert made.mass == pytest.approx(expected.mass, rel=2e-6)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("content", ["normal", "narrow", "apart", "gap", "equal", "masked", "high", "low", "tiny"])
def test_top_k_in_one_launch(backend, content):
    """Keys further apart than bins are kept or counted; keys beyond the least and the largest bin; parts that have no
    room for all that share a bin with their k-th."""
    tokens, rng = 6000, np.random.default_rng(11)
    y = normal(12, (1, 4, tokens), tau={"narrow": 0.02, "apart": 30.0}.get(content, 2.0))
    if content == "gap":
        y[rng.random(y.shape) < 0.02] += 200
    elif content == "equal":
        y = np.round(y)
    elif content == "masked":
        y[..., rng.permutation(tokens)[:2000]] = rng.choice([np.inf, -np.inf, np.nan, -1e9], (1, 4, 2000))
    elif content in ("high", "low", "tiny"):    # a bin is 1/64, the number of one an int32
        factor, shift = {"high": (2e6, 4e7), "low": (2e6, -4e7), "tiny": (1e-39, 0)}[content]
        y = (factor * y.astype(np.float64) + shift).astype(np.float32)
    place = "cuda" if backend in ("cuda", "native") else "cpu"
    options = dict(sinks=4, recent=64, block=16)
    for k in (1, 37, 160, 600):
        expected = to_host(select_top_k(scores(y, "cpu"), k, backend="cpu", **options))
        for room in (k + k // 4, 4096):
            with pytest.MonkeyPatch.context() as patch, loaders.simt_schedule(ftz=content == "tiny"):    # as on a GPU
                patch.setattr(loaders, "multiprocessors", lambda *where: 132)
                scratch = workspace(1, 4, tokens, place, listed=room)
                made = to_host(select_top_k(scores(y, backend), k, workspace=scratch, backend=backend, **options))
                listed = scratch.sums.to_host().view(np.uint32).reshape(-1, 4)[:4 * 5, 3]       # TopKPart
                again = to_host(select_top_k(scores(y, backend), k, workspace=scratch, backend=backend, **options))
            assert lists(made) == lists(again) == lists(expected), (k, room)
            assert made.mass.tobytes() == again.mass.tobytes()
            assert made.mass == pytest.approx(expected.mass, rel=2e-6), (k, room)
            if content == "normal":     # the first k of a part and those of a bin, but no more than there is room for
                assert min(k, 900) <= listed.max() <= min(k + 60, room), (k, room)


@pytest.mark.skipif(loaders.availability("simt") is not None, reason=str(loaders.availability("simt")))
def test_a_few_of_a_row_take_one_launch():
    y = normal(13, (1, 2, 4000))
    for k, kv_heads, expected in ((20, None, ["top_k"]), (900, None, ["histogram", "collect"]), (0, None, ["histogram",
                                  "collect"]), (20, 1, ["histogram", "collect"])):
        with loaders.record() as launches:
            select_top_k(scores(y), k, kv_heads=kv_heads, backend="simt")
        names = [launch["kernel"].removeprefix("kvb::selection_").partition("_kernel")[0] for launch in launches]
        assert names == expected, (k, kv_heads)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("rule", [0.3, 0.9, 1 - 2**-16, 5000])
@pytest.mark.parametrize("content", ["normal", "apart", "gap"])
def test_few_tokens_are_near_the_threshold(backend, rule, content):
    """The histogram brackets the last token that is chosen, and few others with it.  Nothing else shows that it does:
    with a wrong bracket the whole row is searched, slowly, and the result is the same."""
    tokens = 20000
    y = normal(9, (1, 4, tokens), tau=9.0 if content == "apart" else 1.0)
    if content == "gap":
        y[np.random.default_rng(10).random(y.shape) < 0.02] += 20
    scratch = workspace(1, 4, tokens, "cuda" if backend in ("cuda", "native") else "cpu")
    select, like = (select_top_k, reference.top_k) if rule >= 1 else (select_top_p, reference.top_p)
    select(scores(y, backend), rule, workspace=scratch, backend=backend)
    brackets = scratch.brackets.to_host().view(np.float32).reshape(-1, selection.BRACKET_WORDS)[:4]
    counts = like(scores(y), rule, sinks=0, recent=0).counts[0]
    for row, count, (_, _, low, high, *_) in zip(y[0], counts, brackets):
        assert low <= np.sort(row)[-count] < high
        assert np.count_nonzero((low <= row) & (row < high)) < 0.1 * tokens


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("calibrated", [False, "shrink", "shift"])
def test_results_go_where_they_are_wanted(backend, calibrated):
    y, device = normal(1, (2, 4, 100)), "cuda" if backend in ("cuda", "native") else "cpu"
    given_scores, scratch = scores(y, backend, np.full(y.shape, 0.5)), workspace(2, 4, 100, device)
    out = Selection(*(on(backend, np.full(shape, -7, dtype)) for shape, dtype in (
        ((2, 2, 100), np.int32), ((2, 2), np.int32), ((2, 4), np.float32))))
    made = select_top_p(given_scores, 0.6, kv_heads=2, calibrated=calibrated, out=out, workspace=scratch,
                        backend=backend)
    assert made.indices is out.indices and made.counts is out.counts and made.mass is out.mass
    host = to_host(made)
    unlisted = np.arange(100) >= host.counts[:, :, None]
    assert (host.indices[unlisted] == -7).all() and (host.indices[~unlisted] >= 0).all()


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_a_workspace_that_is_too_small_is_refused(backend):
    device = "cuda" if backend in ("cuda", "native") else "cpu"
    y = scores(normal(2, (1, 4, 300)), backend)
    for small in (workspace(1, 3, 300, device), workspace(1, 4, 200, device)):
        with pytest.raises(ValueError, match="workspace: expected room for 4 query heads of 300 tokens"):
            select_top_k(y, 3, workspace=small, backend=backend)
    with pytest.raises(TypeError, match="workspace: expected a Workspace from selection.workspace"):
        select_top_k(y, 3, workspace="some", backend=backend)
    with pytest.raises(ValueError, match="kv_heads: expected at most 16 query heads a list on backend"):
        select_top_k(scores(normal(2, (1, 17, 10)), backend), 3, kv_heads=1, backend=backend)


# --- Defects of the published release (the numbers are those of the specification) ------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_r2_every_head_selects_for_itself(backend):
    """The release's scores had no head axis, and one mask for all: every token was selected."""
    y = normal(3, (2, 6, 300))
    made = to_host(select_top_p(scores(y, backend), 0.8, backend=backend))
    assert made.counts.shape == (2, 6) and (made.counts < 150).all() and len(set(made.counts.ravel().tolist())) > 1
    assert len({tuple(row) for row in lists(made).values()}) == 12
    with pytest.raises(ValueError, match=r"scores.logits: expected shape \[batch, q_heads, tokens\], got \[2, 300\]"):
        select_top_p(scores(y[:, 0], backend), 0.8, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_r10_the_crossing_token_is_included(backend):
    """The release kept cumulative masses <= p: less than p."""
    y = normal(4, (1, 8, 400), tau=1.5)
    for p in (0.3, 0.65, 0.85, 0.99):
        made = to_host(select_top_p(scores(y, backend), p, backend=backend))
        for h in range(8):
            weights = np.exp(y[0, h].astype(float) - y[0, h].max())
            chosen = made.indices[0, h, : made.counts[0, h]]
            kept = weights[chosen].sum() / weights.sum()
            without = kept - weights[chosen].min() / weights.sum()
            assert kept >= p - 1e-6 and without < p + 2**-16 + 1e-6         # p counts in steps of 2^-16
            assert made.mass[0, h] == pytest.approx(kept, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_r13_one_to_four_tokens(backend):
    """The release divided by zero where there were few."""
    for tokens in range(5):
        y = scores(np.arange(tokens, dtype=np.float32)[None, None], backend)
        assert lists(select_top_k(y, 2, backend=backend)) == {(0, 0): list(range(max(tokens - 2, 0), tokens))}
        assert lists(select_top_p(y, 1.0, backend=backend)) == {(0, 0): list(range(tokens))}
        assert lists(select_top_p(y, 1e-6, backend=backend)) == {(0, 0): [tokens - 1] if tokens else []}


@pytest.mark.parametrize("backend", BACKENDS)
def test_r14_ties_and_flat_rows(backend):
    """The release searched for a threshold in floating point, to an absolute 1e-5, from the first token's weight."""
    flat = np.zeros((1, 1, 1000))
    assert lists(select_top_p(scores(flat, backend), 0.75, backend=backend)) == {(0, 0): list(range(750))}
    flat[0, 0, 0] = -5                                     # the first token is not the largest
    assert lists(select_top_p(scores(flat, backend), 0.5, backend=backend)) == {(0, 0): list(range(1, 501))}
    steps = np.repeat([1.0, 3.0, 2.0], 100)[None, None]    # the crossing value is shared by a hundred
    need = math.ceil((0.9 * 100 * (math.e + math.e**2 + math.e**3) - 100 * math.e**3) / math.e**2)
    chosen = [*range(100, 200), *range(200, 200 + need)]
    assert lists(select_top_p(scores(steps, backend), 0.9, backend=backend)) == {(0, 0): chosen}
    again = [to_host(select_top_p(scores(steps, backend), 0.9, backend=backend)).mass.tobytes() for _ in range(2)]
    assert again[0] == again[1]


def test_r14_a_million_tokens():
    y = normal(5, (1, 1, 10**6), tau=0.5)
    made = select_top_p(scores(y), 0.95)
    order = reference.ranking(y[0, 0])
    weights = reference.masses(y[0, 0], y.max())
    count = reference.prefix_length(weights[order], reference.target_mass(reference.share(0.95), int(weights.sum())), 1,
                                    10**6)
    assert made.counts[0, 0] == count and (made.indices[0, 0, :count] == np.sort(order[:count])).all()


# --- Edges and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_corrections_that_overflow_leave_a_token_out(backend):
    y, sigma = np.array([[[1.0, 2.0, 3.0, 4.0]]]), np.array([[[0.0, np.inf, 3e19, np.nan]]])
    for calibrated in ("shift", "shrink"):
        chosen = lists(select_top_p(scores(y, backend, sigma), 1.0, calibrated=calibrated, backend=backend))[0, 0]
        assert 0 in chosen and 1 not in chosen and 3 not in chosen
        nothing = select_top_p(scores(y, backend, np.full(y.shape, np.nan)), 0.5, calibrated=calibrated,
                               backend=backend)
        assert lists(nothing) == {(0, 0): []} and to_host(nothing).mass.tolist() == [[1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_shapes(backend):
    for shape in ((0, 2, 5), (2, 2, 0)):
        made = to_host(select_top_p(scores(np.zeros(shape), backend), 0.5, kv_heads=1, backend=backend))
        assert made.indices.shape == (shape[0], 1, shape[2]) and not made.counts.any() and (made.mass == 1).all()


def test_the_bytes_of_a_selection_are_those_of_its_list():
    """Logits are read once, and positions written are those of the list."""
    kernel = registry.get("selection.select_top_k")
    problem = kernel.problem(tokens=1000, percent=10, kv_heads=2, group=1)
    inputs = kernel.inputs(problem, np.random.default_rng(0))
    made, traffic = select_top_k(**inputs), kernel.traffic(problem)
    assert made.counts.tolist() == [[100, 100]]
    assert traffic.bytes_read == inputs["scores"].logits.nbytes
    assert traffic.bytes_written == 4 * int(made.counts.sum()) + made.counts.nbytes + made.mass.nbytes


def test_benchmark_scores_select_their_share():
    kernel = registry.get("selection.select_top_p")
    for percent in (10, 20):       # the formula is that of many tokens
        problem = kernel.problem(tokens=20000, percent=percent, kv_heads=4, group=1)
        counts = select_top_p(**kernel.inputs(problem, np.random.default_rng(0))).counts
        assert counts.mean() / 20000 == pytest.approx(percent / 100, rel=0.2)


GOOD = Scores(np.zeros((2, 3, 9), np.float32))


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: select_top_p(GOOD, 0.0), ValueError, "select_top_p: p: expected 0 < p <= 1, got 0.0"),
    (lambda: select_top_p(GOOD, True), ValueError, "p: expected 0 < p <= 1, got True"),
    (lambda: select_top_p(GOOD.logits, 0.5), TypeError, r"scores: expected Scores\(logits, sigma\), got ndarray"),
    (lambda: select_top_p(GOOD, 0.5, normalise="all"), ValueError, "normalise: expected one of middle, global, got"),
    (lambda: select_top_p(GOOD, 0.5, calibrated="yes"), ValueError, "calibrated: expected True, False, 'shrink' or"),
    (lambda: select_top_p(GOOD, 0.5, calibrated=True), ValueError, "scores.sigma: expected the noise of the logits"),
    (lambda: select_top_p(GOOD, 0.5, min_tokens=3, max_tokens=2), ValueError, "max_tokens: expected an integer of at"),
    (lambda: select_top_p(GOOD, 0.5, block=0), ValueError, "block: expected an integer of at least 1, got 0"),
    (lambda: select_top_p(GOOD, 0.5, kv_heads=2), ValueError, "kv_heads: expected a divisor of the 3 query heads"),
    (lambda: select_top_p(GOOD, 0.5, lengths=np.zeros(2)), TypeError, "lengths: expected dtype int32, got float64"),
    (lambda: select_top_p(GOOD, 0.5, out=(1, 2)), TypeError, "out: expected a Selection, got tuple"),
    (lambda: select_top_p(GOOD, 0.5, backend="cudaa"), ValueError, "backend: expected one of .* did you mean cuda"),
    (lambda: select_top_k(GOOD, 1.5), ValueError, "select_top_k: k: expected an integer of at least 0, got 1.5"),
    (lambda: select_top_k(Scores(GOOD.logits.astype(np.float16)), 1), TypeError, "logits: expected dtype float32"),
])
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
def test_selection_runs_in_a_cuda_graph():
    cupy = pytest.importorskip("cupy")
    y = cupy.asarray(normal(6, (1, 8, 5000)))
    out = to_host(select_top_p(Scores(y), 0.85, kv_heads=2, backend="cuda"))
    made = Selection(cupy.zeros((1, 2, 5000), "int32"), cupy.zeros((1, 2), "int32"), cupy.zeros((1, 8), "float32"))
    scratch, stream = workspace(1, 8, 5000, "cuda"), cupy.cuda.Stream(non_blocking=True)
    select_top_p(Scores(y), 0.85, kv_heads=2, out=made, workspace=scratch, backend="cuda")      # compiles
    with stream:
        stream.begin_capture()
        select_top_p(Scores(y), 0.85, kv_heads=2, out=made, workspace=scratch, backend="cuda")
        graph = stream.end_capture()
        for _ in range(3):
            made.counts.fill(0)
            graph.launch(stream)
            stream.synchronize()
            assert lists(made) == lists(out)
