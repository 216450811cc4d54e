"""Indexes: what cheap score ranks the tokens of a cache.

    index  = indexes.RaBitQ(head_dim=128, query_bits=4, seed=0)
    coded  = index.encode(keys)             # keys [batch, kv_heads, tokens, head_dim] -> a frozen dataclass of arrays
    scores = index.score(q, coded)          # Scores(logits [batch, q_heads, tokens] float32, sigma or None)

An index is a frozen dataclass of plain parameters, and lays out its storage in a cache as a codec does
(`codecs.Store`).
"""
from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from kvbench import arrays, codecs
from kvbench.codecs.base import Packed, Store, part
from kvbench.codecs.exact import joined
from kvbench.codecs.self_indexing import SignVQTokens, freeze
from kvbench.ops import quest, rabitq, self_indexing, turboquant
from kvbench.ops.attention import check_scale
from kvbench.reference import rabitq as reference
from kvbench.reference.quest import PAGE, Pages
from kvbench.reference.rabitq import BLOCK, Encoded
from kvbench.reference.rotation import Rotation, haar, hadamard
from kvbench.reference.self_indexing import CENTRES, CODES, SUBVECTOR
from kvbench.scores import Scores
from kvbench.selectors import Selection, Selector, TopK, TopP

__all__ = ["Index", "Quest", "QuestPages", "RaBitQ", "RaBitQTokens", "Scores", "SignVQ", "SignVQCodebook", "TurboQuant"]

ROTATIONS = {"hadamard": hadamard, "haar": haar}


class Index(Store):
    """A way to rank tokens.  Subclasses are frozen dataclasses with a field `head_dim`.

    per_kv_head   whether logits are [batch, kv_heads, tokens], one for all query heads of a KV head
    ordered       whether `select` ends with a kernel that begins after all that is ahead of it in the stream, as the
                  selectors' do: attention may then begin before that has ended
    """

    head_dim: int
    noise: bool = False         # whether scores come with sigma
    per_kv_head = False
    ordered = True

    def allocate_scores(self, batch: int, heads: int, tokens: int, device) -> Scores:
        """`out` of `score` for storage of so many tokens: with it a step allocates nothing for scores.  heads : query
        heads, or KV heads if `per_kv_head`"""
        logits, sigma = (arrays.empty((batch, heads, tokens), "float32", device) if wanted else None
                         for wanted in (True, self.noise))
        return Scores(logits, sigma)

    def reads(self, name: str) -> bool:
        """Whether `score` reads the array of that name in `KVCache.contents`."""
        return name.startswith("store.index.")

    @abstractmethod
    def encode(self, keys) -> Packed:
        """keys : [batch, kv_heads, tokens, head_dim] float16, bfloat16 or float32, after RoPE -> packed arrays in their
        framework."""

    @abstractmethod
    def score(self, q, coded: Packed, keys: Packed | None = None, *, lengths=None, scale: float | None = None,
              out: Scores | None = None, stream=None, backend=None) -> Scores:
        """Estimates of scale <q_h, k_t> for all tokens.

        q       : [batch, q_heads, head_dim]        coded : as `encode` gave it, or the storage of a cache
        keys    : the packed keys of the cache, for an index that reads the planes of their codec; others ignore them
        lengths : [batch] int32, tokens of each sequence (default: all that coded has room for): logits are -inf from
                  there on
        scale   : default head_dim ** -0.5        out : Scores to write into (default: new)

        Returns Scores(logits, sigma), [batch, q_heads, tokens] float32 (or per KV head) in q's framework; sigma may be
        None.
        """


    def select(self, selector: Selector, q, coded: Packed, keys: Packed | None = None, *, kv_heads: int | None = None,
               lengths=None, scale: float | None = None, scores: Scores | None = None, out: Selection | None = None,
               workspace=None, stream=None, backend=None) -> Selection:
        """What the selector chooses by these scores: an index that knows a faster way than both in turn takes it.

        q, coded, keys, lengths, scale : as of `score`, and `scores` its `out`: it may be written, or not
        kv_heads, out, workspace       : as of the selector
        """
        made = self.score(q, coded, keys, lengths=lengths, scale=scale, out=scores, stream=stream, backend=backend)
        return selector(made, kv_heads=kv_heads, lengths=lengths, out=out, workspace=workspace, stream=stream,
                        backend=backend)

    def attend(self, selector: Selector, q, coded: Packed, sides, *, exact: codecs.Exact | None = None, kv_heads: int,
               lengths=None, scale: float | None = None, scores: Scores | None = None,
               selection: Selection | None = None, select_workspace=None, out=None, lse=None, workspace=None,
               stream=None, backend=None) -> Selection:
        """Attention to what `select` chooses, and to `exact` tokens if there are any; returns what was chosen.

        sides : (key_codec, keys, value_codec, values) of the cache
        exact, out, lse, workspace          : of `codecs.attend`
        scores, selection, select_workspace : `scores`, `out` and `workspace` of `select`, as are all others
        """
        chosen = self.select(selector, q, coded, sides[1], kv_heads=kv_heads, lengths=lengths, scale=scale,
                             scores=scores, out=selection, workspace=select_workspace, stream=stream, backend=backend)
        codecs.attend(q, *sides, lengths=lengths, scale=scale, out=out, lse=lse, workspace=workspace, selection=chosen,
                      exact=exact, stream=stream, backend=backend)
        return chosen


# --- RaBitQ ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RaBitQTokens(Packed):
    """sign     : [batch, kv_heads, tokens, head_dim / 32] uint32, in the order of `reference.planes`
    rescale     : [batch, kv_heads, tokens] float16, r
    offset      : [batch, kv_heads, tokens] float16, a; None: queries are not centred
    key_mean    : [batch, kv_heads, 1, head_dim] float32, c_k; None: keys are not centred
    query_mean  : likewise, c_q
    """

    sign: object
    rescale: object
    offset: object = None
    key_mean: object = None
    query_mean: object = None


@part
@dataclass(frozen=True)
class RaBitQ(Index):
    """One bit per rotated coordinate of a key, and a scalar: head_dim / 8 + 2 bytes a token (18 for 128).

    head_dim        64, 128 or 256 on CUDA, else a multiple of 32 (of "hadamard", a power of two)
    query_bits      4, 8, or 16 for a query in floating point (host backends only)
    seed            of the rotation
    rotation        "hadamard": `rounds` rounds of signs and Walsh-Hadamard transform, or "haar": a dense matrix
    centred         encode keys less the mean of those in the first append (which should be a prompt), computed once, on
                    the host, and frozen; its product with the query is added to the logits
    query_centred   centre queries by the mean of those given with the first append, too: 2 bytes more a token and,
                    where queries have much in common, half the noise.  Without queries that mean is 0
    noise           give sigma with the scores, for calibrated selection: they are written twice as many bytes

    A token that holds NaN or Inf has logits NaN, and is not selected.
    Source: RaBitQ, arXiv 2405.12497; RaBitQCache, arXiv 2606.31519.
    """

    head_dim: int
    query_bits: int = 4
    seed: int = 0
    rotation: str = "hadamard"
    rounds: int = 3
    centred: bool = True
    query_centred: bool = False
    noise: bool = False

    def __post_init__(self):
        arguments = arrays.Arguments("RaBitQ")
        for name, least, most in (("head_dim", 32, 2**16), ("seed", 0, 2**63 - 1), ("rounds", 1, 8)):
            value = getattr(self, name)
            arguments.require(_is_integer(value) and least <= value <= most, name,
                              f"an integer from {least} to {most}", repr(value))
        arguments.require(self.query_bits in reference.QUERY_BITS and not isinstance(self.query_bits, bool),
                          "query_bits", "4, 8 or 16", repr(self.query_bits))
        arguments.require(self.rotation in ROTATIONS, "rotation", f"one of {', '.join(ROTATIONS)}", repr(self.rotation))
        power = self.head_dim & (self.head_dim - 1) == 0
        arguments.require(self.head_dim % 32 == 0 and (power or self.rotation == "haar"), "head_dim",
                          "a multiple of 32, and a power of two for a Hadamard rotation", self.head_dim)
        for name in ("centred", "query_centred", "noise"):
            arguments.require(isinstance(getattr(self, name), bool), name, "True or False", repr(getattr(self, name)))

    @property
    def turn(self) -> Rotation:
        """R."""
        return _rotation(self.rotation, self.head_dim, self.seed, self.rounds)

    @property
    def granule(self) -> int:
        """1; but the product with a dense matrix may round differently with the number of rows, which are therefore
        encoded in blocks."""
        return BLOCK if self.rotation == "haar" else 1

    @property
    def bytes_per_token(self) -> int:
        """Of one key of one KV head."""
        return self.head_dim // 8 + 2 + 2 * self.query_centred

    def encode(self, keys, queries=None) -> RaBitQTokens:
        """As `Index.encode`; a centred index takes the means of the keys and of the queries itself.

        queries : [batch, q_heads, tokens, head_dim], for an index that centres them
        """
        arguments = arrays.Arguments("RaBitQ.encode")
        keys = arguments.take("keys", keys, f"batch kv_heads tokens {self.head_dim}", arrays.FLOATS, strided=True)
        queries = arguments.take("queries", queries, f"batch q_heads queries {self.head_dim}", arrays.FLOATS,
                                 strided=True, optional=True)
        arguments.require(queries is None or queries.shape[1] % keys.shape[1] == 0, "queries",
                          f"a multiple of the {keys.shape[1]} KV heads as q_heads", queries and queries.shape[1])
        means = [mean if mean is None else arrays.upload(mean, keys.device, keys.framework, stream=arguments.stream)
                 for mean in self._means(keys, queries)]
        coded = rabitq.encode(keys, self.turn, **dict(zip(("key_mean", "query_mean"), map(_rows, means))),
                              stream=arguments.stream)
        return RaBitQTokens(coded.sign, coded.rescale, coded.offset, *(mean and mean.give() for mean in means))

    def score(self, q, coded: RaBitQTokens, keys=None, *, lengths=None, scale=None, out=None, stream=None,
              backend=None) -> Scores:
        if out is not None and (out.sigma is not None) != self.noise:
            raise ValueError(f"RaBitQ.score: out: expected Scores {'with' if self.noise else 'without'} sigma for "
                             f"noise={self.noise}, got the other kind")
        given = Scores(None) if out is None else out
        scores = rabitq.score(q, self.encoded(coded), self.turn, query_bits=self.query_bits, lengths=lengths,
                              scale=scale, return_sigma=self.noise, out=given.logits, sigma=given.sigma, stream=stream,
                              backend=backend)
        return scores if out is None else out

    def select(self, selector, q, coded: RaBitQTokens, keys=None, *, kv_heads=None, lengths=None, scale=None,
               scores=None, out=None, workspace=None, stream=None, backend=None) -> Selection:
        """As `Index.select`; scores and Top-p are one launch where the GPU has room for it."""
        if not _is_plain(selector) or kv_heads != coded.sign.shape[1]:
            return super().select(selector, q, coded, keys, kv_heads=kv_heads, lengths=lengths, scale=scale,
                                  scores=scores, out=out, workspace=workspace, stream=stream, backend=backend)
        return rabitq.select_top_p(q, self.encoded(coded), self.turn, selector.p, query_bits=self.query_bits,
                                   lengths=lengths, scale=scale, min_tokens=selector.minimum,
                                   max_tokens=selector.maximum, scores=None if scores is None else scores.logits,
                                   out=out, workspace=workspace, stream=stream, backend=backend)

    def attend(self, selector, q, coded: RaBitQTokens, sides, *, exact=None, kv_heads, lengths=None, scale=None,
               scores=None, selection=None, select_workspace=None, out=None, lse=None, workspace=None, stream=None,
               backend=None) -> Selection:
        """As `Index.attend`; all is one launch where the tokens are exact and the GPU has room for it."""
        key_codec, keys, value_codec, values = sides
        exactly = all(isinstance(codec, codecs.Float16) for codec in (key_codec, value_codec))
        if not exactly or not _is_plain(selector) or kv_heads != coded.sign.shape[1]:
            return super().attend(selector, q, coded, sides, exact=exact, kv_heads=kv_heads, lengths=lengths,
                                  scale=scale, scores=scores, selection=selection, select_workspace=select_workspace,
                                  out=out, lse=lse, workspace=workspace, stream=stream, backend=backend)
        rows, front = (keys.tokens, values.tokens), {}
        if exact is not None:
            rows = joined(keys, values, exact)
            front = dict(first=exact.keys.tokens.shape[2], leading=exact.lengths)
        scratch = rabitq.AttentionWorkspace(select_workspace, workspace)
        return rabitq.sparse_attention(q, self.encoded(coded), self.turn, selector.p, *rows, **front,
                                       query_bits=self.query_bits, lengths=lengths, scale=scale,
                                       min_tokens=selector.minimum, max_tokens=selector.maximum, out=out, lse=lse,
                                       chosen=selection, scores=None if scores is None else scores.logits,
                                       workspace=scratch, stream=stream, backend=backend)[2]

    def encoded(self, coded: RaBitQTokens) -> Encoded:
        """The same arrays as the operators of `ops.rabitq` take them."""
        means = (mean if mean is None else _rows(arrays.borrow(mean, "RaBitQ: mean"))
                 for mean in (coded.key_mean, coded.query_mean))
        return Encoded(coded.sign, coded.rescale, coded.offset, *means, self.head_dim)

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> RaBitQTokens:
        def mean(wanted):
            return arrays.zeros((batch, kv_heads, 1, self.head_dim), "float32", device) if wanted else None

        shape = (batch, kv_heads, capacity)
        return RaBitQTokens(arrays.empty((*shape, self.head_dim // 32), "uint32", device),
                            arrays.empty(shape, "float16", device),
                            arrays.empty(shape, "float16", device) if self.query_centred else None,
                            mean(self.centred), mean(self.query_centred))

    def prepare(self, storage: RaBitQTokens, sequences: slice, x: arrays.Array, queries: arrays.Array | None, *,
                stream=None, backend=None) -> None:
        for mean, value in zip((storage.key_mean, storage.query_mean), self._means(x, queries)):
            if mean is not None:
                mean.narrow(0, sequences.start, sequences.stop).copy_from(value, stream)

    def write(self, storage: RaBitQTokens, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        rows = self.encoded(_narrowed(storage, sequences, start, start + x.shape[2]))
        rabitq.encode(x, self.turn, key_mean=rows.key_mean, query_mean=rows.query_mean, out=rows, stream=stream,
                      backend=backend)

    def used(self, storage: RaBitQTokens, sequence: int, tokens: int) -> RaBitQTokens:
        return _narrowed(storage, slice(sequence, sequence + 1), 0, tokens)

    def _means(self, keys: arrays.Array, queries: arrays.Array | None):
        """(c_k, c_q) [batch, kv_heads, 1, head_dim] float32, or None where the index does not centre."""
        return (_mean(keys, keys.shape[1]) if self.centred else None,
                None if not self.query_centred else _mean(queries, keys.shape[1]) if queries is not None
                else np.zeros((*keys.shape[:2], 1, self.head_dim), np.float32))


def _is_plain(selector: Selector) -> bool:
    """Whether it is the Top-p that the operators of `ops.rabitq` have."""
    return (isinstance(selector, TopP) and selector.united and not selector.calibrated and not selector.sinks
            and not selector.recent)


@functools.lru_cache(maxsize=256)
def _rotation(kind: str, size: int, seed: int, rounds: int) -> Rotation:
    return haar(size, seed) if kind == "haar" else hadamard(size, seed, rounds)


def _is_integer(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _mean(x: arrays.Array, kv_heads: int) -> np.ndarray:
    """Of the tokens without NaN or Inf of all heads of a KV head: [batch, kv_heads, 1, head_dim] float32."""
    batch, heads, _, head_dim = x.shape
    group, means = heads // kv_heads, np.empty((batch, kv_heads, 1, head_dim), np.float32)
    for b in range(batch):
        for h in range(kv_heads):                       # one KV head at a time: a copy of all tokens may not fit
            own = x.narrow(0, b, b + 1).narrow(1, h * group, (h + 1) * group).to_host()
            means[b, h, 0] = reference.centroid(*reference.block_sums(own, 1))[0, 0]
    return means


def _rows(mean: arrays.Array | None) -> arrays.Array | None:
    """A mean [batch, kv_heads, 1, head_dim] as operators take it: [batch, kv_heads, head_dim]."""
    return None if mean is None else mean.reshape(*mean.shape[:2], mean.shape[3])


def _narrowed(storage: RaBitQTokens, sequences: slice, start: int, stop: int) -> RaBitQTokens:
    """Views of some tokens of some sequences, and of the whole means of these."""
    views = {}
    for name, array in storage.arrays().items():
        view = array.narrow(0, sequences.start, sequences.stop)
        views[name] = view if name.endswith("mean") else view.narrow(2, start, stop)
    return RaBitQTokens(**views)


# --- Quest -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QuestPages(Packed):
    """low, high : [batch, kv_heads, pages, head_dim] in the dtype of the keys: the least and the largest of a page."""

    low: object
    high: object


@part
@dataclass(frozen=True)
class Quest(Index):
    """Least and largest key of every page: an upper bound of its logits, which every token of the page gets.

    So Top-k of k tokens, k a multiple of `page`, takes the k / page pages with the largest bounds, ties to the lower
    page.

    head_dim   64, 128 or 256 on CUDA        page   tokens of a page; a cache writes whole pages
    dtype      of the keys: 4 head_dim / page bytes a token for 16-bit keys

    Source: Quest, arXiv 2406.10774.
    """

    head_dim: int
    page: int = PAGE
    dtype: str = "float16"

    def __post_init__(self):
        arguments = arrays.Arguments("Quest")
        for name in ("head_dim", "page"):
            value = getattr(self, name)
            arguments.require(_is_integer(value) and value >= 1, name, "an integer of at least 1", repr(value))
        arguments.require(self.dtype in arrays.FLOATS, "dtype", f"one of {', '.join(arrays.FLOATS)}", repr(self.dtype))

    @property
    def granule(self) -> int:
        return self.page

    def encode(self, keys) -> QuestPages:
        arguments = arrays.Arguments("Quest.encode")
        keys = arguments.take("keys", keys, f"batch kv_heads tokens {self.head_dim}", (self.dtype,), strided=True)
        pages = quest.encode(keys, page=self.page, stream=arguments.stream)
        return QuestPages(pages.low, pages.high)

    def score(self, q, coded: QuestPages, keys=None, *, lengths=None, scale=None, out=None, stream=None,
              backend=None) -> Scores:
        """As `Index.score`, an upper bound; without lengths the last page counts as full."""
        tokens = coded.low.shape[2] * self.page
        scores = quest.score(q, Pages(coded.low, coded.high, lengths, self.page), scale=scale, tokens=tokens,
                             out=None if out is None else out.logits, stream=stream, backend=backend)
        return scores if out is None else out

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> QuestPages:
        shape = (batch, kv_heads, -(-capacity // self.page), self.head_dim)
        return QuestPages(*(arrays.empty(shape, self.dtype, device) for _ in range(2)))

    def write(self, storage: QuestPages, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        first, last = start // self.page, -(-(start + x.shape[2]) // self.page)
        pages = (array.narrow(0, sequences.start, sequences.stop).narrow(2, first, last)
                 for array in (storage.low, storage.high))
        quest.encode(x, page=self.page, out=Pages(*pages, None, self.page), stream=stream, backend=backend)

    def used(self, storage: QuestPages, sequence: int, tokens: int) -> QuestPages:
        return QuestPages(*(array.narrow(0, sequence, sequence + 1).narrow(2, 0, -(-tokens // self.page))
                            for array in (storage.low, storage.high)))


# --- Keys of a few bits ----------------------------------------------------------------------------------------------


@part
@dataclass(frozen=True)
class TurboQuant(Index):
    """Logits on keys of `bits` bits: bits head_dim / 8 + 2 bytes a token (66 for 4 bits of 128), and little noise.

    What Twilight estimates by, with a random rotation and a codebook in place of a scale and a zero point.
    `score` leaves logits beyond `lengths` undefined, which a selector is told, too.

    head_dim, bits, seed, centred : of `codecs.TurboQuantMSE`; what a mean adds to all logits of a head is left out

    Source: Twilight, arXiv 2502.02770; the code: TurboQuant, arXiv 2504.19874.
    """

    head_dim: int
    bits: int = 4
    seed: int = 0
    centred: bool = True

    def __post_init__(self):
        self.codec      # noqa: B018  (checks the parameters)

    @property
    def codec(self) -> codecs.TurboQuantMSE:
        return codecs.TurboQuantMSE(self.head_dim, self.bits, self.seed, centred=self.centred)

    def encode(self, keys) -> codecs.TurboQuantTokens:
        return self.codec.encode(keys)

    def score(self, q, coded: codecs.TurboQuantTokens, keys=None, *, lengths=None, scale=None, out=None, stream=None,
              backend=None) -> Scores:
        if out is not None:             # the storage may have a few slots more
            tokens = arrays.borrow(out.logits, "out.logits").shape[2]
            coded = codecs.TurboQuantTokens(**{
                name: array if name == "mean" else arrays.borrow(array, name).narrow(2, 0, tokens)
                for name, array in coded.arrays().items()})
        logits = turboquant.logits(q, self.codec.encoded(coded), self.codec.turn, scale=scale,
                                   out=None if out is None else out.logits, stream=stream, backend=backend)
        return Scores(logits) if out is None else out

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> codecs.TurboQuantTokens:
        return self.codec.allocate(batch, kv_heads, capacity, device)

    def prepare(self, storage, sequences: slice, x, queries, *, stream=None, backend=None) -> None:
        self.codec.prepare(storage, sequences, x, queries, stream=stream, backend=backend)

    def write(self, storage, sequences: slice, start: int, x: arrays.Array, *, stream=None, backend=None) -> None:
        self.codec.write(storage, sequences, start, x, stream=stream, backend=backend)

    def used(self, storage, sequence: int, tokens: int) -> codecs.TurboQuantTokens:
        return self.codec.used(storage, sequence, tokens)


# --- Self-Indexing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SignVQCodebook(Packed):
    """codebook : [batch, kv_heads, head_dim / 4, 16, 4] float32, of a prompt
    sign        : [batch, kv_heads, tokens, head_dim / 32] uint32; None in a cache, whose keys have the signs already
    """

    codebook: object
    sign: object = None


@part
@dataclass(frozen=True)
class SignVQ(Index):
    """The signs of the codec `codecs.SignVQ`, looked up in tables of the mean query of a KV head: no byte a token more.

    centre, sinks   as of the codec, and equal to those: a cache whose keys are other codes is refused when it scores

    One score serves all query heads of a KV head.  What centring takes from all logits of a head alike is not added.
    Source: arXiv 2603.14224.
    """

    head_dim: int
    centre: str = "mean"
    sinks: int = 0

    part_name = "SignVQIndex"
    per_kv_head = True

    def __post_init__(self):
        arguments = arrays.Arguments("SignVQ")
        arguments.require(_is_integer(self.head_dim) and self.head_dim > 0 and self.head_dim % 32 == 0, "head_dim",
                          "a positive multiple of 32", repr(self.head_dim))
        arguments.require(self.centre in CENTRES, "centre", f"one of {', '.join(CENTRES)}", repr(self.centre))
        arguments.require(_is_integer(self.sinks) and self.sinks >= 0, "sinks", "an integer of at least 0",
                          repr(self.sinks))

    def reads(self, name: str) -> bool:
        return super().reads(name) or name.startswith("store.keys.sign.")

    def encode(self, keys) -> SignVQCodebook:
        """As `Index.encode`, with the statistics of these keys; the signs come with the codebook."""
        arguments = arrays.Arguments("SignVQ.encode")
        keys = arguments.take("keys", keys, f"batch kv_heads tokens {self.head_dim}", arrays.FLOATS, strided=True)
        mean, scale, codebook = (arrays.upload(array, keys.device, keys.framework, stream=arguments.stream)
                                 for array in freeze(keys, self.centre, self.sinks))
        coded = self_indexing.encode(keys, mean, scale, stream=arguments.stream)
        return SignVQCodebook(codebook.give(), coded.sign)

    def score(self, q, coded: SignVQCodebook, keys: SignVQTokens | None = None, *, lengths=None, scale=None, out=None,
              stream=None, backend=None) -> Scores:
        logits = self_indexing.score(q, _signs(coded, keys), coded.codebook, lengths=lengths,
                                     scale=check_scale(arrays.Arguments("SignVQ.score"), scale, self.head_dim),
                                     out=None if out is None else out.logits, stream=stream, backend=backend)
        return Scores(logits)

    def select(self, selector, q, coded: SignVQCodebook, keys: SignVQTokens | None = None, *, kv_heads=None,
               lengths=None, scale=None, scores=None, out=None, workspace=None, stream=None, backend=None) -> Selection:
        """As `Index.select`; scores and Top-k are one launch."""
        if not isinstance(selector, TopK) or selector.sinks or selector.recent:
            return super().select(selector, q, coded, keys, kv_heads=kv_heads, lengths=lengths, scale=scale,
                                  scores=scores, out=out, workspace=workspace, stream=stream, backend=backend)
        return self_indexing.select_top_k(q, _signs(coded, keys), coded.codebook, selector.k, lengths=lengths,
                                          scale=check_scale(arrays.Arguments("SignVQ.select"), scale, self.head_dim),
                                          scores=None if scores is None else scores.logits, out=out,
                                          workspace=workspace, stream=stream, backend=backend)

    def allocate(self, batch: int, kv_heads: int, capacity: int, device) -> SignVQCodebook:
        shape = (batch, kv_heads, self.head_dim // SUBVECTOR, CODES, SUBVECTOR)
        return SignVQCodebook(arrays.zeros(shape, "float32", device))

    def prepare(self, storage: SignVQCodebook, sequences: slice, x: arrays.Array, queries: arrays.Array | None, *,
                stream=None, backend=None) -> None:
        codebook = freeze(x, self.centre, self.sinks)[2]
        storage.codebook.narrow(0, sequences.start, sequences.stop).copy_from(codebook, stream)

    def write(self, storage: SignVQCodebook, sequences: slice, start: int, x: arrays.Array, *, stream=None,
              backend=None) -> None:
        """Nothing: the codec of the keys writes the signs."""

    def used(self, storage: SignVQCodebook, sequence: int, tokens: int) -> SignVQCodebook:
        return SignVQCodebook(storage.codebook.narrow(0, sequence, sequence + 1))


def _signs(coded: SignVQCodebook, keys: SignVQTokens | None):
    if coded.sign is not None:
        return coded.sign
    if not isinstance(keys, SignVQTokens):
        raise TypeError("SignVQ: keys: expected keys stored by codecs.SignVQ, whose signs are the index, "
                        f"got {type(keys).__name__}")
    return keys.sign
