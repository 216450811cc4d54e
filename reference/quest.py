"""Quest and Twilight: pages of keys ranked by an upper bound, and keys of four bits pruned by Top-p.

**Quest** (arXiv 2406.10774).  Of a page of consecutive tokens, per KV head and channel i, the least and the largest key
m_i, M_i are kept, in the dtype of the keys.  A query q scores the page by

    U = sum_i max(q_i m_i, q_i M_i) = <q+, M> + <q-, m>  >=  max over the page of <q, k>,

with q+ = max(q, 0) and q- = min(q, 0), and attends to all tokens of the pages with the largest U, ties to the lower
page.  The page of the newest token is always kept, and so are those of sinks and of a recent window.

**Twilight** (arXiv 2502.02770).  Select candidates C with a generous budget (all tokens, or those of Quest's pages);
estimate their logits from keys of four bits; keep the Top-p of C (`selection`); attend to those exactly.  The four-bit
key, per token and KV head, is

    step = (max k - min k) / 15,    low = min k,    u_i = clip(rint((k_i - low) / step), 0, 15),    k^ = step u + low,

with step and low rounded to float16 first, so that encoder and decoder agree.  <q, k^> = step <u, q> + low sum q.

NaN in a key is ignored by minimum and maximum (a page of nothing else scores NaN and is not selected).  A four-bit key
that holds NaN or Inf has codes 0 and step NaN, its logit is NaN, and it is not selected; no other token is affected.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import attention
from .claim import Claim, bound, expectation, identity, weakest
from .selection import Scores, Selection, attend, kept, middle, top_k, top_p, union

PAGE = 16
LARGEST = 65504.0                  # of float16


@dataclass(frozen=True, eq=False)
class Pages:
    """Least and largest keys of pages of `page` tokens.

    low, high   [batch, kv_heads, pages, head_dim] in the dtype of the keys; NaN for a page without a number
    lengths     [batch] tokens of each sequence
    page        tokens per page
    """

    low: np.ndarray
    high: np.ndarray
    lengths: np.ndarray
    page: int = PAGE

    @property
    def nbytes(self) -> int:
        return self.low.nbytes + self.high.nbytes


def encode(keys, *, page: int = PAGE, lengths=None) -> Pages:
    """m and M of every page of keys [batch, kv_heads, tokens, head_dim]; a last page has the tokens that are there.

    lengths : [batch] int, default all tokens; slots from there on are not read

    Source: Quest, arXiv 2406.10774, section 3.3.
    """
    keys = _keys(keys)
    nothing = np.full((*keys.shape[:2], 0, keys.shape[3]), np.nan).astype(keys.dtype)
    return append(Pages(nothing, nothing, np.zeros(len(keys), np.int64), _page(page)), keys, lengths=lengths)


def append(pages: Pages, keys, *, lengths=None) -> Pages:
    """The pages after tokens were added to every sequence: m = min(m, k), M = max(M, k), one token after another.

    keys : [batch, kv_heads, tokens, head_dim]        lengths : [batch] int, how many of them are new, default all
    """
    keys = _keys(keys)
    batch, kv_heads, tokens, head_dim = keys.shape
    if (batch, kv_heads, head_dim) != (*pages.low.shape[:2], pages.low.shape[3]) or keys.dtype != pages.low.dtype:
        raise ValueError(f"quest: keys: expected {pages.low.dtype} [{batch}, {pages.low.shape[1]}, tokens, "
                         f"{pages.low.shape[3]}] as the pages hold, got {keys.dtype} {list(keys.shape)}")
    new = _lengths(lengths, batch, tokens)
    after = pages.lengths + new
    extra = max(-(-int(after.max(initial=0)) // pages.page) - pages.low.shape[2], 0)
    empty = np.full((batch, kv_heads, extra, head_dim), np.nan)
    low, high = (np.concatenate([x.astype(np.float64), empty], axis=2) for x in (pages.low, pages.high))
    exact = keys.astype(np.float64) + 0.0                                # both zeros are +0: min and max then are exact
    for b in range(batch):
        for t in range(new[b]):
            g = (pages.lengths[b] + t) // pages.page
            low[b, :, g] = np.fmin(low[b, :, g], exact[b, :, t])         # fmin and fmax ignore NaN
            high[b, :, g] = np.fmax(high[b, :, g], exact[b, :, t])
    return Pages(low.astype(keys.dtype), high.astype(keys.dtype), after, pages.page)


def bounds(query, pages: Pages) -> np.ndarray:
    """U = <q+, M> + <q-, m>, [batch, q_heads, pages] float64, without a scale.

    query : [batch, q_heads, head_dim], q_heads a multiple of kv_heads

    Source: Quest, arXiv 2406.10774, Algorithm 1, in the form of two inner products.
    """
    q = _grouped(query, pages.low.shape)
    positive, negative = np.maximum(q, 0), np.minimum(q, 0)
    low, high = (np.swapaxes(x.astype(np.float64), -1, -2) for x in (pages.low, pages.high))
    with np.errstate(invalid="ignore"):
        return (positive @ high + negative @ low).reshape(*np.shape(query)[:2], low.shape[-1])


def score(query, pages: Pages, *, scale=None) -> Scores:
    """scale U of pages, [batch, q_heads, pages] float32, for a selection of pages.  scale : default head_dim ** -0.5"""
    scale = pages.low.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale < 0:
        raise ValueError(f"quest: scale: expected a number of at least 0, got {scale}; U is no bound otherwise")
    with np.errstate(over="ignore", invalid="ignore"):
        return Scores((scale * bounds(query, pages)).astype(np.float32))


def select_pages(scores: Scores, pages: Pages, budget: int, *, sinks: int = 0, recent: int = 1) -> Selection:
    """ceil(budget / page) pages by (U descending, page ascending), besides those that are always kept.

    Always kept are the pages of the first `sinks` and of the last `recent` tokens, at least that of the newest token.
    """
    if not isinstance(budget, (int, np.integer)) or isinstance(budget, bool) or budget < 0:
        raise ValueError(f"quest: budget: expected an integer of at least 0, got {budget!r}")
    window = _window(pages, sinks, recent)
    listed = [top_k(Scores(scores.logits[b : b + 1]), -(-budget // pages.page), lengths=n[None], sinks=first,
                    recent=last) for b, (n, first, last) in enumerate(zip(*window))]
    return Selection(*(np.concatenate([getattr(one, name) for one in listed])
                       for name in ("indices", "counts", "mass")))


def kept_tokens(selection: Selection, pages: Pages, tokens: int, *, sinks: int = 0, recent: int = 1) -> np.ndarray:
    """[batch, heads, tokens] bool: the tokens of the selected pages and of those that are always kept."""
    mask = np.zeros((*selection.counts.shape, tokens), bool)
    for b, (n, first, last) in enumerate(zip(*_window(pages, sinks, recent))):
        one = Selection(selection.indices[b : b + 1], selection.counts[b : b + 1], selection.mass[b : b + 1])
        chosen = kept(one, lengths=n[None], sinks=first, recent=last)[0]
        length = min(int(pages.lengths[b]), tokens)
        mask[b, :, :length] = np.repeat(chosen, pages.page, axis=-1)[:, :length]
    return mask


# --- Keys of four bits -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Int4:
    """Keys of four bits.

    codes      [batch, kv_heads, tokens, ceil(head_dim / 8)] uint32; u of coordinate 8 w + j is bits 4 j ... 4 j + 3 of
               word w, and unused bits are 0
    step, low  [batch, kv_heads, tokens] float16, saturating; NaN for a key that is not finite
    head_dim   of the keys
    """

    codes: np.ndarray
    step: np.ndarray
    low: np.ndarray
    head_dim: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.step.nbytes + self.low.nbytes


_NIBBLE = np.arange(0, 32, 4, dtype=np.uint32)


def encode_int4(keys) -> Int4:
    """keys : [batch, kv_heads, tokens, head_dim], any real dtype.

    Source: Twilight, arXiv 2502.02770, section 4.2 (per-token asymmetric INT4).
    """
    keys = _keys(keys).astype(np.float64)
    finite = np.isfinite(keys).all(axis=-1)
    exact = np.where(finite[..., None], keys, 0.0)
    low, high = exact.min(axis=-1, initial=np.inf), exact.max(axis=-1, initial=-np.inf)
    step, low = ((np.clip(x, -LARGEST, LARGEST)).astype(np.float16) for x in ((high - low) / 15, low))
    wide = step.astype(np.float64)[..., None]
    u = (exact - low.astype(np.float64)[..., None]) / np.where(wide == 0, 1.0, wide)
    u = np.where(wide == 0, 0.0, np.clip(np.rint(u), 0, 15)).astype(np.uint32)
    words = -(-keys.shape[-1] // 8)
    padded = np.zeros((*keys.shape[:3], words * 8), np.uint32)
    padded[..., : keys.shape[-1]] = np.where(finite[..., None], u, 0)
    codes = np.bitwise_or.reduce(padded.reshape(*keys.shape[:3], words, 8) << _NIBBLE, axis=-1)
    step, low = (np.where(finite, x, np.float16(np.nan)) for x in (step, low))
    return Int4(codes, step, low, keys.shape[-1])


def decode_int4(encoded: Int4) -> np.ndarray:
    """k^ = step u + low, [batch, kv_heads, tokens, head_dim] float64."""
    step, low = (x.astype(np.float64)[..., None] for x in (encoded.step, encoded.low))
    return step * _codes(encoded) + low


def score_int4(query, encoded: Int4, *, scale=None) -> Scores:
    """scale (step <u, q> + low sum q), and its noise |scale| step |q| / sqrt(12), [batch, q_heads, tokens] float32."""
    scale = encoded.head_dim**-0.5 if scale is None else float(scale)
    q = _grouped(query, (*encoded.step.shape, encoded.head_dim))
    step, low = (x.astype(np.float64)[:, :, None] for x in (encoded.step, encoded.low))
    with np.errstate(over="ignore", invalid="ignore"):
        logits = step * (q @ np.swapaxes(_codes(encoded), -1, -2)) + low * q.sum(axis=-1)[..., None]
        sigma = step * np.linalg.norm(q, axis=-1)[..., None] / 12**0.5
        shape = (*np.shape(query)[:2], encoded.step.shape[2])
        return Scores(*(x.astype(np.float32).reshape(shape) for x in (scale * logits, abs(scale) * sigma)))


def twilight(scores: Scores, p: float = 0.85, *, candidates=None, **options) -> Selection:
    """Top-p of the candidates by estimated logits.

    scores : of all tokens, as from `score_int4`        candidates : [batch, q_heads, tokens] bool, default all
    options : those of `selection.top_p`
    """
    logits = scores.logits
    if candidates is not None:
        if np.shape(candidates) != logits.shape:
            raise ValueError(f"quest: candidates: expected the shape of the logits, {list(logits.shape)}, "
                             f"got {list(np.shape(candidates))}")
        logits = np.where(candidates, logits, np.float32(-np.inf))       # what is not finite is no candidate
    return top_p(Scores(logits, scores.sigma), p, **options)


# --- Steps shared by the above ---------------------------------------------------------------------------------------


def _codes(encoded):
    fields = encoded.codes[..., None] >> _NIBBLE & np.uint32(15)
    *tokens, words = encoded.codes.shape
    return fields.reshape(*tokens, words * 8)[..., : encoded.head_dim].astype(np.float64)


def _window(pages, sinks, recent):
    """([batch] pages of each sequence, of its sinks, of its recent tokens): both rounded out to pages."""
    _, _ = middle(pages.lengths, sinks, recent)                          # checks the numbers
    count = -(-pages.lengths // pages.page)
    first = np.minimum(-(-sinks // pages.page), count)
    start = np.maximum(pages.lengths - max(recent, 1), 0) // pages.page             # page of the first recent token
    return count, first.astype(int), np.where(pages.lengths > 0, np.maximum(count - start, 0), 0)


def _grouped(query, shape):
    """[batch, kv_heads, group, head_dim] float64."""
    query, (batch, kv_heads, _, head_dim) = np.asarray(query), shape
    if query.ndim != 3 or query.shape[::2] != (batch, head_dim) or query.shape[1] % kv_heads:
        raise ValueError(f"quest: query: expected [batch, q_heads, head_dim] = [{batch}, a multiple of {kv_heads}, "
                         f"{head_dim}], got {list(query.shape)}")
    return query.astype(np.float64).reshape(batch, kv_heads, query.shape[1] // kv_heads, head_dim)


def _keys(keys):
    keys = np.asarray(keys)
    if keys.ndim != 4:
        raise ValueError(f"quest: keys: expected [batch, kv_heads, tokens, head_dim], got {list(keys.shape)}")
    return keys


def _page(page):
    if not isinstance(page, (int, np.integer)) or isinstance(page, bool) or page < 1:
        raise ValueError(f"quest: page: expected an integer of at least 1, got {page!r}")
    return int(page)


def _lengths(lengths, batch, tokens):
    lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.dtype.kind not in "iu" or np.any((lengths < 0) | (lengths > tokens)):
        raise ValueError(f"quest: lengths: expected integers [{batch}] from 0 to {tokens}, got {lengths.dtype} "
                         f"{lengths.tolist()}")
    return lengths.astype(np.int64)


# --- Claims ----------------------------------------------------------------------------------------------------------


def _problem(rng):
    """(query, keys, values, lengths, page): ragged, grouped, an outlier channel, equal keys, a NaN here and there."""
    batch, kv_heads, group, tokens = (int(n) for n in rng.integers(1, (3, 3, 4, 60)))
    head_dim, page = int(rng.choice([2, 8, 33])), int(rng.choice([1, 4, 16]))
    query = rng.standard_normal((batch, kv_heads * group, head_dim))
    keys, values = rng.standard_normal((2, batch, kv_heads, tokens, head_dim))
    keys[..., rng.integers(head_dim)] += 10
    keys = np.rint(keys) if rng.random() < 0.3 else keys
    dtype = (np.float16, np.float32, np.float64)[rng.integers(3)]
    return query, keys.astype(dtype), values, rng.integers(1, tokens + 1, batch), page


def _products(query, keys):
    """<q, k> [batch, q_heads, tokens]."""
    grouped = np.repeat(keys.astype(np.float64), query.shape[1] // keys.shape[1], axis=1)
    return np.einsum("bhd,bhtd->bht", query, grouped)


def _upper_bound(rng, samples):
    excess, equality = [], []
    for _ in range(samples):
        query, keys, _, lengths, page = _problem(rng)
        pages = encode(keys, page=page, lengths=lengths)
        u, products = bounds(query, pages), _products(query, keys)
        size = np.abs(query).sum() * np.abs(keys).max()
        for b, n in enumerate(lengths):
            for g in range(-(-n // page)):
                largest = products[b, :, g * page : min((g + 1) * page, n)].max(axis=-1)
                excess.append((largest - u[b, :, g]).max() / size)
                if page == 1:
                    equality.append(np.abs(largest - u[b, :, g]).max() / size)
    return weakest({"bound": bound(excess, 1e-13, samples=samples), "one token": identity(equality or [0.0], 1e-13)})


def _two_forms(rng, samples):
    deviation = []
    for _ in range(samples):
        query, keys, _, lengths, page = _problem(rng)
        pages = encode(keys, page=page)
        low, high = (np.repeat(x.astype(np.float64), query.shape[1] // keys.shape[1], axis=1)
                     for x in (pages.low, pages.high))
        q = query[:, :, None]
        expected = np.maximum(q * low, q * high).sum(axis=-1)
        deviation.append(np.abs(bounds(query, pages) - expected).max() / (np.abs(q) * np.abs(high - low + high)).max())
    return identity(deviation, 1e-12)


def _same_pages(one, other):
    if one.low.shape != other.low.shape:
        return 2.0**32
    return float(sum(np.sum((a != b) & ~(np.isnan(a) & np.isnan(b)))
                     for a, b in ((one.low, other.low), (one.high, other.high))) + np.sum(one.lengths != other.lengths))


def _incremental(rng, samples):
    """Any split, with NaN; against minimum and maximum over all tokens of a page at once."""
    differences = []
    for _ in range(samples):
        _, keys, _, _, page = _problem(rng)
        keys[rng.random(keys.shape) < 0.1] = np.nan
        tokens, whole = keys.shape[2], encode(keys, page=page)
        pages = encode(keys[:, :, :0], page=page)
        cuts = [0, *sorted(rng.integers(0, tokens + 1, rng.integers(0, 5))), tokens]
        for start, stop in zip(cuts, cuts[1:]):
            pages = append(pages, keys[:, :, start:stop])
        differences.append(_same_pages(pages, whole))
        at_once = [(np.fmin.reduce(part, axis=2), np.fmax.reduce(part, axis=2))
                   for part in (keys[:, :, g : g + page] for g in range(0, tokens, page))]
        low, high = (np.stack(parts, axis=2) for parts in zip(*at_once))
        differences.append(_same_pages(whole, Pages(low, high, whole.lengths, page)))
    return identity(differences)


def _permutation(rng, samples):
    differences = []
    for _ in range(samples):
        _, keys, _, _, page = _problem(rng)
        shuffled = keys.copy()
        for g in range(0, keys.shape[2], page):
            part = keys[:, :, g : g + page]
            shuffled[:, :, g : g + page] = part[:, :, rng.permutation(part.shape[2])]
        differences.append(_same_pages(encode(keys, page=page), encode(shuffled, page=page)))
    return identity(differences)


def _whole_budget(rng, samples):
    deviation, missing = [], []
    for _ in range(samples):
        query, keys, values, lengths, page = _problem(rng)
        pages, tokens = encode(keys, page=page, lengths=lengths), keys.shape[2]
        mask = kept_tokens(select_pages(score(query, pages), pages, tokens), pages, tokens)
        missing.append(np.sum(mask != (np.arange(tokens) < lengths[:, None])[:, None]))
        output, _ = attend(query, keys, values, mask)
        deviation.append(np.abs(output - attention.decode(query, keys, values, lengths=lengths)[0]).max())
    return weakest({"mask": identity(missing), "output": identity(deviation, 1e-12)})


def _page_order(rng, samples):
    """Against Python's stable sort; scores are rounded so that pages tie, and the newest page is always there."""
    differences = []
    for _ in range(samples):
        query, keys, _, lengths, page = _problem(rng)
        pages, tokens = encode(keys, page=page, lengths=lengths), keys.shape[2]
        scores = Scores(np.rint(score(query, pages).logits))
        budget, sinks, recent = (int(n) for n in rng.integers(0, 40, 3))
        options = {"sinks": sinks, "recent": recent}
        mask = kept_tokens(select_pages(scores, pages, budget, **options), pages, tokens, **options)
        for b, n in enumerate(lengths):
            always = {t // page for t in range(n) if t < sinks or t >= n - max(recent, 1)}
            rest = [g for g in range(-(-n // page)) if g not in always]
            for h in range(query.shape[1]):
                ordered = sorted(rest, key=lambda g: -scores.logits[b, h, g])
                expected = always | set(ordered[: -(-budget // page)])
                differences.append(np.sum(mask[b, h] != [t < n and t // page in expected for t in range(tokens)]))
    return identity(differences, samples=samples)


def _int4_keys(rng, dtype=np.float64):
    keys = rng.standard_normal((2, 2, 5, int(rng.choice([2, 8, 33, 64])))) * 10.0 ** rng.uniform(-2, 2)
    return (keys + rng.choice([0.0, 5.0]) * keys[:, :, :1]).astype(dtype)


def _int4_error(rng, samples):
    """Per coordinate D/2, but for the rounding of low and step: the range ends |low| 2^-11 + 15 step 2^-11 early."""
    excess, fields = [], []
    for _ in range(samples):
        keys = _int4_keys(rng)
        encoded = encode_int4(keys)
        low, step = keys.min(axis=-1), (keys.max(axis=-1) - keys.min(axis=-1)) / 15
        rounding = 2.0**-11 * (np.abs(low) + 15 * step) + 2.0**-24
        limit = np.maximum(encoded.step.astype(np.float64) / 2, rounding)
        error = np.abs(decode_int4(encoded) - keys)
        excess.append((error.max(axis=-1) / limit).max() - 1)
        query = rng.standard_normal((2, 4, keys.shape[-1]))
        scores = score_int4(query, encoded, scale=1.0)
        products, size = _products(query, decode_int4(encoded)), np.abs(query).sum(axis=-1)[..., None]
        fields.append((np.abs(scores.logits - products) / (size * np.abs(keys).max())).max())
        off = np.abs(scores.logits - _products(query, keys)) / size - np.repeat(limit, 2, axis=1)
        excess.append((off / np.abs(keys).max()).max())
    return weakest({"error": bound(excess, 2.0**-22, samples=samples), "logits": bound(fields, 2.0**-22)})


def _int4_variance(rng, samples):
    """Uniform coordinates between fixed ends: the ends are exact, the errors of the others uniform in a step.

    A few dozen keys share a query; each sample is one key.  Ends that float16 holds: nothing is lost to clipping.
    """
    keys = rng.uniform(0, 15, (1, 1, samples, 64))
    keys[..., 0], keys[..., 1] = 0, 15
    query = rng.standard_normal((1, 1, 64))
    scores = score_int4(query, encode_int4(keys), scale=1.0)
    error = scores.logits[0, 0].astype(np.float64) - _products(query, keys)[0, 0]
    law, inner = scores.sigma[0, 0, 0].astype(np.float64) ** 2, (query[0, 0, 2:] ** 2).sum() / (query**2).sum()
    return weakest({"mean": expectation(error, 0.0, allowance=1e-4),
                    "variance": expectation(error**2 / law, inner, allowance=1e-4)})


def _twilight(rng, samples):
    """The kept set is a part of C, is a minimal prefix of it with mass >= p, and p = 1 keeps all of C."""
    wrong = []
    for _ in range(samples):
        query, keys, values, lengths, page = _problem(rng)
        pages, tokens = encode(keys, page=page, lengths=lengths), keys.shape[2]
        chosen = select_pages(score(query, pages), pages, int(rng.integers(1, 80)))
        candidates = kept_tokens(chosen, pages, tokens)
        scores = score_int4(query, encode_int4(keys))
        p = float(rng.choice([0.5, 0.85, 1.0]))
        selection = twilight(scores, p, candidates=candidates, lengths=lengths, sinks=0, recent=0)
        mask = kept(selection, lengths=lengths, sinks=0, recent=0)
        weights = np.where(candidates, np.exp(scores.logits.astype(np.float64) - np.where(
            candidates, scores.logits, -np.inf).max(axis=-1, keepdims=True)), 0.0)
        total, have = weights.sum(axis=-1), np.where(mask, weights, 0.0).sum(axis=-1)
        least = np.where(mask, weights, np.inf).min(axis=-1)
        wrong += [np.sum(mask & ~candidates), np.sum(have < (p - tokens * 2.0**-31) * total - 1e-12),
                  np.sum((have - least > (p + 2.0**-16 + tokens * 2.0**-31) * total) & (mask.sum(axis=-1) > 1)),
                  np.sum(mask != candidates) if p == 1 else 0]
        if p == 1 and candidates.sum() == query.shape[1] * lengths.sum():
            dense, _ = attention.decode(query, keys, values, lengths=lengths)
            wrong.append(float(np.abs(attend(query, keys, values, mask)[0] - dense).max() > 1e-12))
        grouped = kept(union(selection, keys.shape[1]), lengths=lengths, sinks=0, recent=0)
        wrong.append(np.sum(mask & ~np.repeat(grouped, query.shape[1] // keys.shape[1], axis=1)))
    return identity(wrong, samples=samples)


CLAIMS = (
    Claim("upper bound", "U >= max <q, k> over the page, with equality for pages of one token",
          "Quest arXiv 2406.10774, section 3.3", "bound", _upper_bound, samples=100),
    Claim("two forms", "<q+, M> + <q-, m> = sum_i max(q_i m_i, q_i M_i)",
          "derived: the larger product has the sign of q", "identity", _two_forms, samples=100),
    Claim("incremental", "tokens appended in any portions give the pages of all tokens at once, NaN ignored",
          "definition", "identity", _incremental, samples=100),
    Claim("permutation", "the order of tokens in a page does not matter", "definition", "identity", _permutation,
          samples=100),
    Claim("whole budget", "a budget of all tokens is dense attention", "definition", "identity", _whole_budget,
          samples=100),
    Claim("order of pages", "the selection is that of a stable sort, besides the pages of sinks, of recent tokens and "
          "of the newest one", "definition", "identity", _page_order, samples=100),
    Claim("four bits", "|k_i - k^_i| <= step / 2, so |<q, k^> - <q, k>| <= step / 2 |q|_1, but for float16 of the ends",
          "derived: rounding to nearest", "bound", _int4_error, samples=200),
    Claim("noise of four bits", "the variance of <q, k^> is step^2 |q|^2 / 12, for coordinates uniform between the "
          "ends, which are exact",
          "textbook: uniform rounding error", "expectation", _int4_variance, samples=4000),
    Claim("twilight", "the kept set is a part of the candidates, with mass >= p, minimal; p = 1 keeps all of them",
          "Twilight arXiv 2502.02770, section 4", "identity", _twilight, samples=100),
)
