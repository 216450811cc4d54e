"""Selectors: which tokens are attended, given the scores of an index.

    chosen = selectors.TopP(0.85)(indexes.RaBitQ(128).score(q, coded))      # Selection(indices, counts, mass)

A selector is a frozen dataclass of plain parameters; `config()` gives them as JSON and `codecs.rebuild` makes it again.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import numpy as np

from kvbench import arrays, codecs, trees
from kvbench.codecs import part
from kvbench.ops import selection
from kvbench.ops.selection import Selection
from kvbench.reference import selection as reference
from kvbench.scores import Scores

__all__ = ["Selection", "Selector", "TopK", "TopP"]


class Selector(codecs.Part, ABC):
    """What a cache asks for the tokens to attend to.

    sinks, recent  tokens at both ends that are always kept, are no candidates and are not listed.  They count in what
                   the selector is given.  A cache keeps its own sinks and tail exact and outside its store, and its
                   selector is given the store alone: there both are 0
    united         one list for the query heads of a KV head, the union of theirs, so that each row of the cache is read
                   once; otherwise one list per query head
    """

    sinks: int
    recent: int
    united: bool

    @abstractmethod
    def __call__(self, scores: Scores, *, kv_heads: int | None = None, lengths=None, out: Selection | None = None,
                 workspace: selection.Workspace | None = None, backend: str | None = None, stream=None) -> Selection:
        """Selection(indices [batch, lists, tokens] int32, counts [batch, lists] int32, mass [batch, q_heads] float32).

        scores : logits [batch, q_heads, tokens]        kv_heads : to unite over (needed if `united`)
        lengths, out, workspace, backend, stream : as in `ops.selection.select_top_p`
        """

    def allocate(self, batch: int, q_heads: int, kv_heads: int, tokens: int, device) -> tuple[Selection,
                                                                                             selection.Workspace]:
        """`out` and `workspace` for scores of these sizes: with them a selection allocates nothing."""
        lists = kv_heads if self.united else q_heads
        out = Selection(arrays.empty((batch, lists, tokens), "int32", device),
                        arrays.zeros((batch, lists), "int32", device),
                        arrays.zeros((batch, q_heads), "float32", device))
        return out, selection.workspace(batch, q_heads, tokens, device)

    def _options(self, kv_heads, **options) -> dict:
        if self.united and kv_heads is None:
            raise ValueError(f"{type(self).__name__}: kv_heads: expected the number of KV heads to unite over, "
                             "got None: give it, or take united=False")
        return dict(kv_heads=kv_heads if self.united else None, sinks=self.sinks, recent=self.recent, **options)


@part
@dataclass(frozen=True)
class TopP(Selector):
    """The fewest tokens of each query head whose proxy mass reaches p; see `ops.selection.select_top_p`."""

    p: float
    sinks: int = field(default=0, kw_only=True)
    recent: int = field(default=0, kw_only=True)
    minimum: int = field(default=1, kw_only=True)
    maximum: int | None = field(default=None, kw_only=True)
    united: bool = field(default=True, kw_only=True)
    normalise: str = field(default="middle", kw_only=True)
    calibrated: bool | str = field(default=False, kw_only=True)

    def __post_init__(self):
        arguments = arrays.Arguments("TopP")
        selection.check_top_p(arguments, self.p, self.minimum, self.maximum, self.normalise, self.calibrated,
                              names=("minimum", "maximum"))
        _check_window(arguments, self)

    def __call__(self, scores, *, kv_heads=None, lengths=None, out=None, workspace=None, backend=None, stream=None):
        return selection.select_top_p(scores, self.p, min_tokens=self.minimum, max_tokens=self.maximum,
                                      normalise=self.normalise, calibrated=self.calibrated, lengths=lengths, out=out,
                                      workspace=workspace, backend=backend, stream=stream, **self._options(kv_heads))

    def fitted(self, index, coded, keys, queries, *, sinks: int = 4, recent: int = 128, block: int = 128,
               scale: float | None = None, backend: str | None = None) -> TopP:
        """The same selector with the p at which, for these queries, it achieves the true mass that `p` now means.

        A nominal p is a share of estimated mass, and estimates have noise.  This measures what it leads to on queries
        whose exact logits are known, those of the end of a prompt; see `reference.selection.fitted_p`.  A few are
        enough, 16 to 32 say.  All is computed once, on the host where logits are concerned.

        On two layers each of SmolLM2-135M and Qwen2.5-Coder-0.5B, head_dim 64, 8K tokens, `calibrated="shrink"` with p
        fitted to 16 queries of 64 positions achieves, on 384 later positions, within 0.05 of 0.65, 0.75, 0.85 and 0.95
        on average over the heads of each layer, with keys centred; nominal p is off by up to 0.19 (shrink), 0.26
        (shift) or 0.83 (uncorrected).

        index, coded  : the index, and what it made of the keys
        keys          : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32
        queries       : [batch, q_heads, queries, head_dim], keys' dtype, of the last `queries` of these tokens: each
                        sees the keys up to its own
        sinks, recent, block : of the cache: `sinks` and `Tail(recent, block=block)`
        """
        arguments = arrays.Arguments("TopP.fitted")
        keys = arguments.take("keys", keys, "batch kv_heads tokens head_dim", arrays.FLOATS, strided=True)
        queries = arguments.take("queries", queries, "batch q_heads queries head_dim", (keys.dtype,), strided=True)
        tokens, count, head_dim = keys.shape[2], queries.shape[2], keys.shape[3]
        arguments.require(1 <= count <= tokens, "queries", f"1 to {tokens} queries for {tokens} tokens", count)
        codec, batch, known = codecs.Float16(head_dim, keys.dtype), keys.shape[0], []
        window = dict(sinks=sinks, recent=recent, block=block)
        for i in range(count):
            query = arrays.upload(np.ascontiguousarray(queries.narrow(2, i, i + 1).to_host()[:, :, 0]), keys.device)
            lengths = np.full(batch, tokens - count + i + 1, np.int32)
            scores = index.score(query, coded, lengths=arrays.upload(lengths, keys.device), scale=scale,
                                 backend=backend)
            exact = arrays.borrow(codec.logits(query, codecs.Float16Tokens(keys), scale), "logits").to_host()
            known.append((scores, lengths, reference.true_weights(exact, lengths=lengths, **window)))

        def achieved(share):
            masses = []
            for scores, lengths, weights in known:
                made = selection.select_top_p(
                    scores, share / 2**reference.SHARE_BITS, lengths=arrays.upload(lengths, keys.device),
                    min_tokens=self.minimum, max_tokens=self.maximum, normalise=self.normalise,
                    calibrated=self.calibrated, backend=backend, **window)
                made = trees.apply(lambda _, x: arrays.borrow(x, "made").to_host(), made)
                masses.append(reference.listed_weight(made, weights))
            return np.mean(masses)

        low, high = 1, 2**reference.SHARE_BITS
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if achieved(middle) >= self.p else (middle + 1, high)
        return replace(self, p=low / 2**reference.SHARE_BITS)


@part
@dataclass(frozen=True)
class TopK(Selector):
    """The k tokens of each query head with the largest scores."""

    k: int
    sinks: int = field(default=0, kw_only=True)
    recent: int = field(default=0, kw_only=True)
    united: bool = field(default=True, kw_only=True)

    def __post_init__(self):
        arguments = arrays.Arguments("TopK")
        selection.check_count(arguments, "k", self.k, 0)
        _check_window(arguments, self)

    def __call__(self, scores, *, kv_heads=None, lengths=None, out=None, workspace=None, backend=None, stream=None):
        return selection.select_top_k(scores, self.k, lengths=lengths, out=out, workspace=workspace, backend=backend,
                                      stream=stream, **self._options(kv_heads))


def _check_window(arguments, selector: Selector) -> None:
    for name in ("sinks", "recent"):
        selection.check_count(arguments, name, getattr(selector, name), 0)
    arguments.require(isinstance(selector.united, bool), "united", "True or False", repr(selector.united))
