"""Selectors: which tokens are attended, given the scores of an index.

    chosen = selectors.TopP(0.85)(indexes.RaBitQ(128).score(q, coded))      # Selection(indices, counts, mass)

A selector is a frozen dataclass of plain parameters; `config()` gives them as JSON and `codecs.rebuild` makes it again.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from kvbench import arrays, codecs
from kvbench.codecs import part
from kvbench.ops import selection
from kvbench.ops.selection import Selection
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
    """The fewest tokens of each query head whose proxy mass reaches p; parameters as in `ops.selection.select_top_p`."""

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
