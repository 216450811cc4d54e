"""Self-Indexing KVCache: one-bit sign codes of keys that are part of their store and the index that ranks them.

AAAI-26, 40(33), doi 10.1609/aaai.v40i33.39988, arXiv 2603.14224, as the authors' repository has it.  For each KV head,
with the keys k[t] of a prompt after RoPE, in the order of the steps:

    centre      k'[t] = k[t] - mu, mu the mean (or the median) of the prompt: frozen, and taken from every later key
    sinks       the n tokens with the largest <mean of the last prompt query over its heads, k'[t]> stay exact
    scale       alpha_d = max |k'[t, d]| over the other tokens: frozen
    codes       code[t, g] = sum_i 2^i [k'[t, 4 g + i] >= 0]: the signs of four channels, g = 0 ... D/4 - 1
    codebook    C[g, c] = mean of k'[t, 4 g ... 4 g + 3] over the tokens with code[t, g] = c: frozen, one pass
    magnitudes  a[t, d] = |k'[t, d]| / alpha_d, 2 bits, in groups of 32 channels of one token:
                a_hat = s m + z,    k_hat'[t, d] = alpha_d sign[t, d] a_hat[t, d]
    values      2 (or 4) bits, in groups of 32 channels of one token

A decode step ranks the tokens by tables L[g, c] = <C[g, c], q[4 g ... 4 g + 3]> of the mean query q of the group:

    score[t] = sum_g L[g, code[t, g]] = <q, k_vq[t]>,    k_vq[t] the centroids of its codes, one behind the other,

and attends to the exact tokens, to the k best and, in the cache, to what was generated since.

What is left open there is decided so:

    k'          float32: one subtraction.  A token whose k' is not finite enters no statistic; its codes are 0 and its
                k_hat' is 0.  A zero of either sign is positive
    mu, alpha   float32.  alpha_d = 1 where the maximum is below 2^-100, and 2^125 at most: neither 1 / alpha nor a
                product that matters is subnormal
    1 / alpha   is rounded to float32, and a = |k'| (1 / alpha): one multiplication
    a_hat       `kivi.encode_values` of a, values likewise: a is rounded to float16 (saturating: it reaches 65504 for a
                key 65504 times outside the range of the prompt), and ties of m go to the even code
    empty       a cluster without tokens has C[g, c, i] = (+ or - by bit i of c) mean of |k'[., 4 g + i]| over all
                tokens; without any token 0

    |k' - k_hat'| <= alpha (e + 2^-11 a + 2^-25),    e of `kivi.error_bound`:  s / 2 unless s is subnormal

for any a up to 65504 and so for tokens appended later: the range of a group is its own.

**Bytes.**  For each token and KV head D/8 of signs, D/4 of magnitudes with D/8 of their scales and minima, and for
values of 2 bits D/4 and D/8 again: 7 D / 8 = 112 bytes at D = 128, of 512 in float16: 21.9 %.

**How codes lie in memory**; the one definition, everything else links here.

    sign        [batch, kv_heads, tokens, D / 32] uint32: bit d % 32 of word d // 32 is set where k'[t, d] >= 0
    magnitude   `kivi.Values`: codes [.., tokens, D / 16] uint32, scale and minimum [.., tokens, D / 32] float16
    values      `kivi.Values` of their own, as any codec of values lays them out

so nibble g % 8 of word g // 8 is code[t, g], and one plane is store and index.  All tokens of the prompt stand in
position order, the exact ones too: 112 bytes for each of them are cheaper than a map of positions, and nothing moves
when tokens are appended.  What is exact is left out of the scores (-inf) instead.

Why.
  * The scan reads the sign plane alone: at D = 128 a token is 16 bytes, one load of a lane, and a warp reads 512
    consecutive bytes.  8 KV heads of 131,072 tokens are 16.8 MB, and 4.2 MB of scores: 7 us at 2.97 TB/s.
  * A lane has a token, and all lanes look the same group up: of L[g, 0 ... 15], 16 floats in 16 banks of shared
    memory, so no two lanes that want different numbers meet in one bank.  32 look-ups a token are 7,944 cycles a
    multiprocessor (one warp a cycle), 4.5 us of 132 at 1.755 GHz.
  * Around each look-up stand an addition and the address: W << 2 & 0x3C3C3C3C and W >> 2 & 0x3C3C3C3C are the byte
    offsets of four even and four odd nibbles, one byte permutation or shift gives one of them, and g and the table are
    the immediate offset of the load.  (Tested: claim "operands".)  About 3.5 instructions a look-up, of which 1.5 at
    half rate.  Tables of 256 entries for two groups halve the look-ups, but 32 random rows of them meet in banks.
    A tensor core would want the 16 indicator bits of a nibble, or its 15 products of signs, as numbers: more
    instructions to make than the look-up costs.
  * A gathered token is 16 bytes of signs, 32 of magnitudes and 32 of values, each aligned and in one sector of 32, and
    four rows of 8 bytes of scales and minima, which waste 24 each: 224 bytes fetched for 112.  What is gathered is a
    small part of what is scanned; in return codes, scales and minima of values are those of every other codec.
  * Channels 32 u ... + 31 share s and z of magnitudes and their word of signs.  The code words of `kivi` have the
    channels of one eighth of each of those groups, so lane g of eight dequantises 16 of 128 channels from one word; its
    sign bits are 4 g ... 4 g + 3 of every word of signs: codes g, g + 8, g + 16 and g + 24.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy import special

from . import attention, kivi, selection
from .claim import Claim, bound, expectation, identity, weakest
from .kivi import to_float16

SUBVECTOR = 4                      # channels of a code
CODES = 2**SUBVECTOR
GROUP = 32                         # channels of a token that share s and z
MAGNITUDE_BITS = 2
CENTRES = ("mean", "median", "none")
SINKS = ("topk_last_query", "first", "none")
TABLES = ("mean", "each")
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**125     # of a channel; below the smallest counts as zero


@dataclass(frozen=True, eq=False)
class Encoded:
    """Keys [batch, kv_heads, tokens, head_dim] as codes; see the head of this module for the order of bits.

    sign        [batch, kv_heads, tokens, head_dim / 32] uint32, the index
    magnitude   |k'| / alpha
    """

    sign: np.ndarray
    magnitude: kivi.Values

    @property
    def tokens(self) -> int:
        return self.sign.shape[2]

    @property
    def head_dim(self) -> int:
        return 32 * self.sign.shape[3]

    @property
    def nbytes(self) -> int:
        return self.sign.nbytes + self.magnitude.nbytes

    @property
    def bits_per_element(self) -> float:
        """1 of the sign, 2 of the magnitude, 32 / 32 of its scale and minimum."""
        return 1 + self.magnitude.bits_per_element


@dataclass(frozen=True, eq=False)
class Frozen:
    """What a prompt fixes for all tokens of a KV head.

    mean            [batch, kv_heads, head_dim] float32, mu
    channel_scale   [batch, kv_heads, head_dim] float32, alpha
    codebook        [batch, kv_heads, head_dim / 4, 16, 4] float32, C
    sinks           [batch, kv_heads, count] int32, positions of the exact tokens, ascending, -1 from their number on
    """

    mean: np.ndarray
    channel_scale: np.ndarray
    codebook: np.ndarray
    sinks: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.channel_scale.nbytes + self.codebook.nbytes + self.sinks.nbytes


# --- What a prompt fixes ---------------------------------------------------------------------------------------------


def freeze(keys, query=None, *, centre: str = "mean", sinks: str = "topk_last_query", sink_count: int = 64,
           lengths=None) -> Frozen:
    """mu, the exact tokens, alpha and the codebook of a prompt, in this order.

    keys       : [batch, kv_heads, tokens, head_dim], after RoPE, head_dim a multiple of 32
    query      : [batch, q_heads, head_dim], the last query of the prompt, for "topk_last_query"
    centre     : "mean", "median" or "none"        sinks : "topk_last_query", "first" or "none"
    sink_count : tokens that stay exact            lengths : [batch] int, tokens of each prompt (default: all)
    """
    keys, lengths = _keys(keys, lengths)
    mean = find_centre(keys, centre, lengths=lengths)
    exact = find_sinks(keys, mean, query, sinks=sinks, count=sink_count, lengths=lengths)
    return Frozen(mean, channel_scale(keys, mean, excluded=exact, lengths=lengths),
                  build_codebook(keys, mean, excluded=exact, lengths=lengths), exact)


def find_centre(keys, centre: str = "mean", *, lengths=None) -> np.ndarray:
    """mu, [batch, kv_heads, head_dim] float32: "mean", "median" (the lower of two middle ones) or "none".

    Tokens with NaN or Inf are left out; of no tokens 0.
    """
    keys, lengths = _keys(keys, lengths)
    _check_choice("centre", centre, CENTRES)
    batch, kv_heads, tokens, head_dim = keys.shape
    mean = np.zeros((batch, kv_heads, head_dim), np.float32)
    for b, h in np.ndindex(batch, kv_heads):
        x = keys[b, h, : lengths[b]].astype(np.float64)
        x = x[np.isfinite(x).all(axis=-1)]
        if len(x) and centre == "mean":
            mean[b, h] = x.mean(axis=0)
        elif len(x) and centre == "median":
            mean[b, h] = np.partition(x, (len(x) - 1) // 2, axis=0)[(len(x) - 1) // 2]
    return mean


def find_sinks(keys, mean, query=None, *, sinks: str = "topk_last_query", count: int = 64, lengths=None) -> np.ndarray:
    """Positions of the exact tokens: [batch, kv_heads, count] int32, ascending, -1 from their number on.

    "topk_last_query": the tokens with the largest <q, k'>, q the mean of the query heads of the KV head in float32,
    ties to the smaller position; "first": 0 ... count - 1; "none": no tokens.
    """
    keys, lengths = _keys(keys, lengths)
    _check_choice("sinks", sinks, SINKS)
    _check_count("count", count, 0)
    batch, kv_heads, tokens, _ = keys.shape
    found = np.full((batch, kv_heads, 0 if sinks == "none" else count), -1, np.int32)
    grouped = _grouped(query, keys.shape) if sinks == "topk_last_query" else None
    centred = residual(keys, mean)
    for b, h in np.ndindex(batch, kv_heads):
        number = min(found.shape[2], int(lengths[b]))
        if sinks == "topk_last_query":
            u = (centred[b, h, : lengths[b]].astype(np.float64) @ grouped[b, h].mean(axis=0)).astype(np.float32)
            first = selection.ranking(np.where(np.isfinite(u), u, np.float32(-np.inf)))[:number]
            found[b, h, :number] = np.sort(first)
        else:
            found[b, h, :number] = np.arange(number)
    return found


def residual(keys, mean) -> np.ndarray:
    """k' = k - mu in float32, [batch, kv_heads, tokens, head_dim]; all of it NaN where a channel is not finite.

    mean : [batch, kv_heads, head_dim] or [kv_heads, head_dim] float32
    """
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.asarray(keys).astype(np.float32) - np.asarray(mean, np.float32)[..., None, :]
    return np.where(np.isfinite(x).all(axis=-1, keepdims=True), x, np.float32(np.nan))


def channel_scale(keys, mean, *, excluded=None, lengths=None) -> np.ndarray:
    """alpha, [batch, kv_heads, head_dim] float32: max |k'| over the stored tokens, 2^125 at most, 1 if below 2^-100.

    excluded : [batch, kv_heads, n] int, positions that stay exact; negative ones are none
    """
    keys, lengths = _keys(keys, lengths)
    x = np.abs(residual(keys, mean))
    stored = _stored(keys.shape, excluded, lengths)[..., None] & ~np.isnan(x)
    largest = x.max(axis=2, where=stored, initial=0)
    return np.where(largest < SMALLEST_SCALE, np.float32(1), np.minimum(largest, np.float32(LARGEST_SCALE)))


def build_codebook(keys, mean, *, excluded=None, lengths=None) -> np.ndarray:
    """C, [batch, kv_heads, head_dim / 4, 16, 4] float32: means of the centred subvectors of each code, in one pass.

    keys     : [batch, kv_heads, tokens, head_dim]        mean : [batch, kv_heads, head_dim] or [kv_heads, head_dim]
    excluded : [batch, kv_heads, n] int, positions that stay exact; negative ones are none
    lengths  : [batch] int, tokens of each prompt (default: all)
    """
    keys, lengths = _keys(keys, lengths)
    batch, kv_heads, tokens, head_dim = keys.shape
    x = residual(keys, mean).astype(np.float64)
    stored = _stored(keys.shape, excluded, lengths) & ~np.isnan(x[..., 0])
    result = np.zeros((batch, kv_heads, head_dim // SUBVECTOR, CODES, SUBVECTOR), np.float32)
    signs = np.where(np.arange(CODES)[:, None] >> np.arange(SUBVECTOR) & 1, 1.0, -1.0)           # [16, 4]
    for b, h in np.ndindex(batch, kv_heads):
        own = x[b, h][stored[b, h]].reshape(-1, head_dim // SUBVECTOR, SUBVECTOR)
        if len(own) == 0:
            continue
        codes = ((own >= 0) << np.arange(SUBVECTOR)).sum(axis=-1)
        size = np.abs(own).mean(axis=0)                                                        # [D / 4, 4]
        for g in range(head_dim // SUBVECTOR):
            for c in range(CODES):
                members = own[codes[:, g] == c, g]
                result[b, h, g, c] = members.mean(axis=0) if len(members) else signs[c] * size[g]
    return result


# --- Keys and their codes --------------------------------------------------------------------------------------------


def encode(x, mean, channel_scale, *, check_finite: bool = False) -> Encoded:
    """Signs and magnitudes of keys, token by token: of a prompt, or of what was generated since.

    x             : [batch, kv_heads, tokens, head_dim], keys after RoPE, head_dim a multiple of 32
    mean          : mu, [batch, kv_heads, head_dim] or [kv_heads, head_dim] float32
    channel_scale : alpha, likewise, positive
    check_finite  : raise ValueError where x holds NaN or Inf, instead of codes 0 for that token
    """
    x, _ = _keys(x, None, "x")
    if check_finite and not np.isfinite(x.astype(np.float64)).all():
        first = np.argwhere(~np.isfinite(x.astype(np.float64)).all(axis=-1))[0].tolist()
        raise ValueError(f"self_indexing: x: expected finite numbers, got NaN or Inf, the first at [batch, kv_head, "
                         f"token] = {first}")
    alpha = np.asarray(channel_scale, np.float32)
    if not (np.isfinite(alpha) & (alpha > 0)).all():
        raise ValueError("self_indexing: channel_scale: expected positive finite numbers, got "
                         f"{alpha[~(np.isfinite(alpha) & (alpha > 0))][0]}")
    centred = residual(x, mean)
    inverse = (np.float32(1) / alpha)[..., None, :]
    with np.errstate(over="ignore"):
        a = np.abs(centred) * inverse                                                          # float32, may be inf
    a = np.where(np.isposinf(a), np.float32(kivi.LARGEST), a)
    return Encoded(pack_signs(centred >= 0), kivi.encode_values(a, MAGNITUDE_BITS, GROUP))


def decode(encoded: Encoded, channel_scale) -> np.ndarray:
    """k_hat' = alpha sign a_hat, [batch, kv_heads, tokens, head_dim] float64, without mu."""
    signs = np.where(unpack_signs(encoded.sign), 1.0, -1.0)
    return np.asarray(channel_scale, np.float64)[..., None, :] * signs * kivi.decode(encoded.magnitude)


def error_bound(keys, mean, encoded: Encoded, channel_scale) -> np.ndarray:
    """What |k' - k_hat'| is at most for finite keys up to 65504 alpha, float64; see the head of this module.

    kivi's bound holds for a rounded to float16; the rounding costs 2^-11 a, or 2^-25 where that is subnormal, and
    1 / alpha and the product 2^-23 a, which 2^-20 of a covers.
    """
    alpha = np.asarray(channel_scale, np.float64)[..., None, :]
    a = np.abs(residual(keys, mean).astype(np.float64)) / alpha
    return alpha * (kivi.error_bound(encoded.magnitude) + (2.0**-11 + 2.0**-20) * a + 2.0**-25)


def pack_signs(positive) -> np.ndarray:
    """[..., head_dim] bool -> [..., head_dim / 32] uint32, bit d % 32 of word d // 32."""
    positive = np.asarray(positive)
    bits = positive.reshape(*positive.shape[:-1], positive.shape[-1] // 32, 32).astype(np.uint32)
    return np.bitwise_or.reduce(bits << np.arange(32, dtype=np.uint32), axis=-1)


def unpack_signs(words) -> np.ndarray:
    """[..., head_dim / 32] uint32 -> [..., head_dim] bool."""
    bits = np.asarray(words)[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    return bits.reshape(*bits.shape[:-2], 32 * bits.shape[-2]).astype(bool)


def codes(sign) -> np.ndarray:
    """[..., head_dim / 32] uint32 -> code of every group of four channels, [..., head_dim / 4] uint8."""
    nibbles = np.asarray(sign)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & np.uint32(15)
    return nibbles.reshape(*nibbles.shape[:-2], 8 * nibbles.shape[-2]).astype(np.uint8)


def quantised_keys(sign, codebook) -> np.ndarray:
    """k_vq: the centroids of the codes, [batch, kv_heads, tokens, head_dim] float64, without mu."""
    code = codes(sign)
    batch, kv_heads, tokens, groups = code.shape
    table = np.asarray(codebook, np.float64)
    b, h, _, g = np.ogrid[:batch, :kv_heads, :1, :groups]
    return table[b, h, g, code].reshape(batch, kv_heads, tokens, groups * SUBVECTOR)


# --- Scores ----------------------------------------------------------------------------------------------------------


def build_tables(query, codebook, *, heads: str = "mean", scale: float = 1.0) -> np.ndarray:
    """L[g, c] = scale <C[g, c], q[4 g ... 4 g + 3]>, float64.

    query    : [batch, q_heads, head_dim], q_heads a multiple of kv_heads
    codebook : [batch, kv_heads, head_dim / 4, 16, 4]
    heads    : "mean": one table for the mean query of the heads of a KV head; "each": one for every query head
    Returns [batch, kv_heads or q_heads, head_dim / 4, 16].
    """
    _check_choice("heads", heads, TABLES)
    table = np.asarray(codebook).astype(np.float64)
    batch, kv_heads, groups = table.shape[:3]
    grouped = _grouped(query, (batch, kv_heads, 0, groups * SUBVECTOR))
    if heads == "mean":
        grouped = grouped.mean(axis=2, keepdims=True)
    parts = grouped.reshape(*grouped.shape[:3], groups, SUBVECTOR)
    made = float(scale) * np.einsum("bkhgi,bkgci->bkhgc", parts, table)
    return made.reshape(batch, -1, groups, CODES)


def score(query, sign, codebook, *, heads: str = "mean", lengths=None, excluded=None, scale: float = 1.0) -> np.ndarray:
    """score[t] = sum_g L[g, code[t, g]] = scale <q, k_vq[t]>, [batch, kv_heads or q_heads, tokens] float64.

    query    : [batch, q_heads, head_dim]          sign     : [batch, kv_heads, tokens, head_dim / 32] uint32
    codebook : [batch, kv_heads, head_dim / 4, 16, 4] float32
    heads    : see `build_tables`                  lengths  : [batch] int, tokens of each sequence (default: all)
    excluded : [batch, kv_heads, n] int, positions that stay exact; negative ones are none
    -inf for tokens from the length on and for those that stay exact.
    """
    tables = build_tables(query, codebook, heads=heads, scale=scale)
    code = codes(sign)
    batch, kv_heads, tokens, groups = code.shape
    stored = _stored((batch, kv_heads, tokens), excluded, _lengths(lengths, batch, tokens))
    own, result = tables.shape[1] // kv_heads, np.full((batch, tables.shape[1], tokens), -np.inf)
    for b, h in np.ndindex(batch, tables.shape[1]):
        looked_up = tables[b, h][np.arange(groups), code[b, h // own]]                        # [tokens, D / 4]
        result[b, h] = np.where(stored[b, h // own], looked_up.sum(axis=-1), -np.inf)
    return result


def select_top_k(query, sign, codebook, k: int, *, lengths=None, scale: float = 1.0) -> selection.Selection:
    """The k tokens of every KV head with the largest scores of its mean query; arguments as in `score`.

    Returns Selection(indices [batch, kv_heads, tokens], counts and mass [batch, kv_heads]).
    """
    scores = score(query, sign, codebook, lengths=lengths, scale=scale)
    return selection.top_k(selection.Scores(scores), k, lengths=lengths)


def pool(scores, kv_heads: int) -> np.ndarray:
    """log sum_h softmax_t(scores_h), [batch, kv_heads, tokens]: ranks tokens for all heads of a KV head at once.

    scores : [batch, q_heads, tokens] of "each" head, with the scale of the logits; -inf for what must not be selected
    """
    scores = np.asarray(scores).astype(np.float64)
    batch, q_heads, tokens = scores.shape
    with np.errstate(invalid="ignore"):
        weight = scores - special.logsumexp(scores, axis=-1, keepdims=True) if tokens else scores
    weight = np.where(np.isnan(weight), -np.inf, weight).reshape(batch, kv_heads, q_heads // kv_heads, tokens)
    return special.logsumexp(weight, axis=2)


def selected_tokens(budget: int | float, tokens: int, exact: int) -> int:
    """k: how many of the stored tokens a budget selects, the exact ones taken off.

    budget : a count of tokens, or as a float a ratio of all tokens, of which ceil(budget tokens) are meant: in exact
             arithmetic of the ratio as it is printed, so that 0.07 of 100 is 7
    tokens : T of the prompt        exact : tokens of it that stay exact
    """
    if isinstance(budget, (float, np.floating)):
        if not 0 <= budget <= 1:
            raise ValueError(f"self_indexing: budget: expected a ratio from 0.0 to 1.0 or a count, got {budget!r}")
        budget = math.ceil(Fraction(repr(float(budget))) * int(tokens))
    _check_count("budget", budget, 0)
    return int(np.clip(budget - exact, 0, max(tokens - exact, 0)))


# --- Attention -------------------------------------------------------------------------------------------------------


def sparse_attention_packed(query, keys: Encoded, values: kivi.Values, channel_scale, indices=None, counts=None, *,
                            lengths=None, mean=None, exact_keys=None, exact_values=None, exact_lengths=None, scale=None,
                            return_lse: bool = True):
    """Attention to the selected tokens, dequantised, and to the exact ones: one softmax over both.

    query         : [batch, q_heads, head_dim]
    keys, values  : of [batch, kv_heads, tokens, head_dim]        channel_scale : alpha, [batch, kv_heads, head_dim]
    indices       : [batch, kv_heads, slots] int32, positions of the selected tokens, none twice (default: all tokens)
    counts        : [batch, kv_heads] int32, how many of `indices` are meant
    lengths       : [batch] int, tokens of each store (default: all); positions outside 0 ... length - 1 are left out
    mean          : mu, [batch, kv_heads, head_dim] (default 0): exact keys are not centred, k_hat' + mu is the selected
    exact_keys    : [batch, kv_heads, exact, head_dim], sinks and tail as they were given; exact_values likewise
    exact_lengths : [batch] int, how many of them there are (default: all)        scale : default head_dim ** -0.5

    Returns (output [batch, q_heads, head_dim], lse [batch, q_heads]), float64, natural logarithm; the output alone
    without `return_lse`.  Nothing at all to attend to gives output 0 and lse -inf.
    """
    query = np.asarray(query).astype(np.float64)
    batch, q_heads, head_dim = query.shape
    kv_heads = keys.sign.shape[1]
    held_keys, held_values = decode(keys, channel_scale), kivi.decode(values)
    lengths = _lengths(lengths, batch, keys.tokens)
    if mean is not None:
        held_keys = held_keys + np.asarray(mean, np.float64)[..., None, :]
    output, lse = np.zeros(query.shape), np.full((batch, q_heads), -np.inf)
    for b, h in np.ndindex(batch, kv_heads):
        chosen = np.arange(keys.tokens) if indices is None else np.asarray(indices)[b, h, : max(int(counts[b, h]), 0)]
        chosen = chosen[(chosen >= 0) & (chosen < lengths[b])]
        parts = [(held_keys[b, h, chosen], held_values[b, h, chosen])]
        if exact_keys is not None:
            number = np.shape(exact_keys)[2] if exact_lengths is None else int(exact_lengths[b])
            parts.append(tuple(np.asarray(x)[b, h, :number].astype(np.float64) for x in (exact_keys, exact_values)))
        own_keys, own_values = (np.concatenate(side)[None, None] for side in zip(*parts))
        own = slice(h * (q_heads // kv_heads), (h + 1) * (q_heads // kv_heads))
        output[b, own], lse[b, own] = (x[0] for x in attention.decode(query[b : b + 1, own], own_keys, own_values,
                                                                      scale=scale))
    return (output, lse) if return_lse else output


# --- Steps shared by the above ---------------------------------------------------------------------------------------


def _keys(keys, lengths, name="keys"):
    keys = np.asarray(keys)
    if keys.ndim != 4 or keys.shape[3] % GROUP or not keys.shape[3]:
        raise ValueError(f"self_indexing: {name}: expected [batch, kv_heads, tokens, head_dim], head_dim a multiple of "
                         f"{GROUP}, got {list(keys.shape)}")
    return keys, _lengths(lengths, keys.shape[0], keys.shape[2])


def _lengths(lengths, batch, tokens):
    lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.dtype.kind not in "iu" or np.any((lengths < 0) | (lengths > tokens)):
        raise ValueError(f"self_indexing: lengths: expected [{batch}] integers from 0 to {tokens}, got "
                         f"{lengths.tolist()}")
    return lengths


def _grouped(query, shape):
    """[batch, kv_heads, q_heads / kv_heads, head_dim] float64."""
    batch, kv_heads, _, head_dim = shape
    if query is None or np.ndim(query) != 3 or np.shape(query)[::2] != (batch, head_dim) or \
            np.shape(query)[1] % kv_heads or not np.shape(query)[1]:
        raise ValueError(f"self_indexing: query: expected [batch, q_heads, head_dim] = [{batch}, a multiple of "
                         f"{kv_heads}, {head_dim}], got {None if query is None else list(np.shape(query))}")
    return np.asarray(query).astype(np.float64).reshape(batch, kv_heads, -1, head_dim)


def _stored(shape, excluded, lengths):
    """[batch, kv_heads, tokens] bool: tokens of the sequences that do not stay exact."""
    batch, kv_heads, tokens = shape[:3]
    stored = np.broadcast_to(np.arange(tokens) < np.asarray(lengths)[:, None, None], (batch, kv_heads, tokens)).copy()
    if excluded is not None:
        for b, h in np.ndindex(batch, kv_heads):
            positions = np.asarray(excluded)[b, h]
            stored[b, h, positions[(positions >= 0) & (positions < tokens)]] = False
    return stored


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"self_indexing: {name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_count(name, value, least):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"self_indexing: {name}: expected an integer of at least {least}, got {value!r}")


# --- Claims ----------------------------------------------------------------------------------------------------------


def half_normal_distortion(group: int = GROUP) -> float:
    """E (a - a_hat)^2 / E a^2 of magnitudes of independent normal numbers, but for the rounding of a and s to float16.

    As `kivi.normal_distortion`, for 2 bits and the law of |x|: density 2 f on x > 0.
    """
    node, weight = np.polynomial.legendre.leggauss(160)
    a, b = (1 + node)[:, None], (0.2 + 3.9 * (1 + node))[None, :]                    # a in (0, 2), b in (0.2, 8)
    density = weight[:, None] * weight * 3.9 * 4 * np.exp(-(a**2 + b**2) / 2) / (2 * np.pi)
    width = np.maximum(2 * (special.ndtr(b) - special.ndtr(a)), 0)
    step, inner, low = (b - a) / 3, 0.0, a
    for c in range(4):
        level, high = a + c * step, np.minimum(a + (c + 0.5) * step, b)
        inner = inner + 2 * (kivi._square_below(high, level) - kivi._square_below(low, level))
        low = high
    return float((group - 1) * (group - 2) * (density * width ** (group - 3) * inner).sum())


def _vectors(rng, shape):
    """float16 keys of many kinds, all finite; channels of a kind share it."""
    return kivi._vectors(rng, shape)


def _problem(rng, tokens=None):
    """(query, keys, sinks), grouped heads; keys with a mean, and what they freeze."""
    batch, kv_heads, group = (int(rng.integers(1, high)) for high in (3, 3, 4))
    tokens = int(rng.integers(1, 90)) if tokens is None else tokens
    head_dim = int(rng.choice([32, 64, 128]))
    keys = rng.standard_normal((batch, kv_heads, tokens, head_dim))
    means = 3 * rng.standard_normal((batch, kv_heads, 1, head_dim))
    keys = to_float16(keys * rng.choice([0.1, 1, 10], head_dim) + means)
    query = rng.standard_normal((batch, kv_heads * group, head_dim))
    return query, keys, _freeze(rng, keys, query)


def _freeze(rng, keys, query):
    return freeze(keys, query, centre=str(rng.choice(CENTRES)), sinks=str(rng.choice(SINKS)),
                  sink_count=int(rng.choice([1, 4, 64])))


def _size(tables, sign):
    """sum_g |L[g, code[t, g]]|, what the rounding of a score is relative to: [batch, heads, tokens]."""
    code, own = codes(sign), tables.shape[1] // sign.shape[1]
    groups = np.arange(tables.shape[2])
    return np.stack([np.stack([np.abs(tables[b, h])[groups, code[b, h // own]].sum(axis=-1)
                               for h in range(tables.shape[1])]) for b in range(len(tables))])


def _worst(value, limit):
    return kivi._worst(value, limit)


def _is_product(rng, samples):
    pairs = []
    for _ in range(samples):
        query, keys, frozen = _problem(rng)
        sign = encode(keys, frozen.mean, frozen.channel_scale).sign
        kvq = quantised_keys(sign, frozen.codebook)
        own = query.shape[1] // keys.shape[1]
        for heads, rows in (("each", query), ("mean", query.reshape(len(query), -1, own, query.shape[2]).mean(axis=2))):
            made = score(query, sign, frozen.codebook, heads=heads)
            exact = np.einsum("bhd,bhtd->bht", rows, np.repeat(kvq, rows.shape[1] // keys.shape[1], axis=1))
            size = _size(build_tables(query, frozen.codebook, heads=heads), sign)
            moved = np.einsum("bhd,bhtd->bht", np.abs(rows),
                              np.abs(np.repeat(kvq, rows.shape[1] // keys.shape[1], axis=1)))
            pairs.append(_worst(made - exact, 1e-5 * size + 2.0**-45 * moved))
    return bound(*np.transpose(pairs), samples=samples)


def _mean_query(rng, samples):
    pairs = []
    for _ in range(samples):
        query, keys, frozen = _problem(rng)
        sign = encode(keys, frozen.mean, frozen.channel_scale).sign
        each = score(query, sign, frozen.codebook, heads="each")
        size = _size(build_tables(query, frozen.codebook, heads="each"), sign)
        by_head = (len(query), keys.shape[1], -1, keys.shape[2])
        made = score(query, sign, frozen.codebook)
        pairs.append(_worst(made - each.reshape(by_head).mean(axis=2), 2.0**-45 * size.reshape(by_head).sum(axis=2)))
    return bound(*np.transpose(pairs), samples=samples)


def _residuals(rng, samples):
    """Of stored tokens, by cluster and group; the centroid is rounded to float32."""
    pairs = []
    for _ in range(samples):
        _, keys, frozen = _problem(rng)
        x = residual(keys, frozen.mean).astype(np.float64)
        sign = encode(keys, frozen.mean, frozen.channel_scale).sign
        code, kvq = codes(sign), quantised_keys(sign, frozen.codebook)
        stored = _stored(keys.shape, frozen.sinks, np.full(len(keys), keys.shape[2]))
        left = (x - kvq).reshape(*code.shape, SUBVECTOR)
        parts, first = (y.reshape(left.shape) for y in (kvq, x))
        for b, h in np.ndindex(keys.shape[:2]):
            own = stored[b, h]
            for c in range(CODES):
                members = (code[b, h, own] == c)[..., None]
                total = (left[b, h, own] * members).sum(axis=0)
                pairs.append(_worst(total, 1e-5 * (np.abs(first[b, h, own]) * members).sum(axis=0)))
            inner = (parts[b, h, own] * left[b, h, own]).sum(axis=(0, 2))
            pairs.append(_worst(inner, 1e-5 * np.abs(parts[b, h, own] * first[b, h, own]).sum(axis=(0, 2))))
    return bound(*np.transpose(pairs), samples=samples)


def _error(rng, samples):
    """With the statistics of the same keys, and of quite different ones: what is appended later."""
    cases = {"own": [], "outside the range": []}
    for _ in range(samples):
        keys = _vectors(rng, (1, 2, 40, 64))
        other = to_float16(rng.standard_normal((1, 2, 40, 64)) * 10.0 ** rng.uniform(-3, 2))
        for name, source in (("own", keys), ("outside the range", other)):
            mean = find_centre(source)
            alpha = channel_scale(source, mean)
            encoded = encode(keys, mean, alpha)
            x = residual(keys, mean).astype(np.float64)
            inside = np.abs(x) <= kivi.LARGEST * alpha[:, :, None]
            # A group with one saturated number has another range, which its bound, by s, knows.
            pairs = _worst(np.where(inside, x - decode(encoded, alpha), 0), error_bound(keys, mean, encoded, alpha))
            cases[name].append(pairs)
    return weakest({name: bound(*np.transpose(pairs)) for name, pairs in cases.items()})


def _appended(rng, samples):
    """Codes of a token do not depend on its neighbours or on how tokens were cut into calls."""
    differences = []
    for _ in range(samples):
        _, keys, frozen = _problem(rng)
        later = to_float16(keys.astype(np.float64) * rng.choice([1, 100]) + rng.standard_normal(keys.shape[3]))
        whole = encode(np.concatenate([keys, later], axis=2), frozen.mean, frozen.channel_scale)
        cut = int(rng.integers(0, 2 * keys.shape[2] + 1))
        both = np.concatenate([keys, later], axis=2)
        parts = [encode(x, frozen.mean, frozen.channel_scale) for x in (both[:, :, :cut], both[:, :, cut:])]
        for one, *two in zip(*(({"sign": e.sign} | e.magnitude.arrays()).values() for e in (whole, *parts))):
            differences.append(np.sum(one.view(np.uint8) != np.concatenate(two, axis=2).view(np.uint8)))
    return identity(differences)


def _softmax_unchanged(rng, samples):
    """Every key less one mu: the same output, and lse less <q, mu>."""
    pairs = []
    for _ in range(samples):
        query, keys, frozen = _problem(rng)
        keys = keys.astype(np.float64)
        values = rng.standard_normal(keys.shape)
        mean = frozen.mean.astype(np.float64)
        exact = attention.decode(query, keys, values)
        moved = attention.decode(query, keys - mean[:, :, None], values)
        own = query.shape[1] // keys.shape[1]
        constant = query.shape[2] ** -0.5 * (query * np.repeat(mean, own, axis=1)).sum(axis=-1)
        rounded = np.concatenate([keys, keys - mean[:, :, None], mean[:, :, None]], axis=2)
        pairs += attention._compare((moved[0], moved[1] + constant), exact, query, rounded, values)
    return identity(*np.transpose(pairs), samples=samples)


def _balanced(rng, samples):
    """Numbers of tokens with k' >= 0, less half of all: at most 1 without ties."""
    off = []
    for _ in range(samples):
        tokens = int(rng.integers(1, 60))
        keys = np.argsort(rng.standard_normal((1, 1, tokens, 32)), axis=2).astype(np.float64) + rng.uniform(-9, 9)
        mean = find_centre(keys, "median")
        off.append(np.abs((residual(keys, mean) >= 0).sum(axis=2) - tokens / 2).max())
    return bound(off, 1.0)


def _distortion(rng, samples):
    """Of k_vq, 1 - 2 / pi but for the 16 / T that centroids of T tokens win; of k_hat', by its law."""
    shape = (1, 1, samples, 128)
    keys = rng.standard_normal(shape).astype(np.float32)
    zero, one = np.zeros((1, 128), np.float32), np.ones((1, 128), np.float32)
    encoded, codebook = encode(keys, zero, one), build_codebook(keys, zero)
    exact = keys[0, 0].astype(np.float64)
    coarse = ((exact - quantised_keys(encoded.sign, codebook)[0, 0]) ** 2).mean(axis=-1)
    fine = ((exact - decode(encoded, one)[0, 0]) ** 2).mean(axis=-1)
    expected = half_normal_distortion()
    return weakest({"signs": expectation(coarse, 1 - 2 / np.pi, allowance=0.5 * CODES / samples),
                    "signs and magnitudes": expectation(fine, expected, allowance=1e-3 * expected)})


def _empty_clusters(rng, samples):
    """A cluster without tokens: sizes that the others have on the average, signs of the code."""
    pairs = []
    for _ in range(samples):
        keys = rng.standard_normal((1, 1, int(rng.integers(1, 12)), 32)).astype(np.float32)
        zero = np.zeros((1, 32), np.float32)
        codebook, code = build_codebook(keys, zero)[0, 0].astype(np.float64), codes(encode(keys, zero, zero + 1).sign)
        for g, c in np.ndindex(8, CODES):
            if not (code[0, 0, :, g] == c).any():
                for i in range(SUBVECTOR):
                    size = math.fsum(abs(float(k)) for k in keys[0, 0, :, 4 * g + i]) / keys.shape[2]
                    pairs.append((abs(codebook[g, c, i] - (size if c >> i & 1 else -size)), 2.0**-23 * size))
    return bound(*np.transpose(pairs), samples=samples)


def _padding(rng, samples):
    """Slots from the length on, NaN among them, and tokens that are not finite, enter no statistic."""
    differences = []
    for _ in range(samples):
        query, keys, _ = _problem(rng)
        padded = np.concatenate([keys, _vectors(rng, keys.shape)], axis=2)
        padded[..., -1, :] = np.nan
        options = {"centre": str(rng.choice(CENTRES)), "sinks": str(rng.choice(SINKS)), "sink_count": 3}
        alone = freeze(keys, query, **options)
        within = freeze(padded, query, lengths=np.full(len(keys), keys.shape[2]), **options)
        spoiled = np.concatenate([keys, np.full_like(keys[:, :, :1], np.inf)], axis=2)
        beside = freeze(spoiled, query, **options) if options["sinks"] != "none" else freeze(spoiled, **options)
        enough = keys.shape[2] >= 3 or options["sinks"] == "none"
        for other in (within, *([beside] if enough else [])):
            differences += [np.sum(getattr(alone, name) != getattr(other, name))
                            for name in ("mean", "channel_scale", "codebook", "sinks")]
    return identity(differences)


def _chosen(rng, keys, frozen, query):
    """Top-k by scores, without the exact tokens: Selection per KV head."""
    sign = encode(keys, frozen.mean, frozen.channel_scale).sign
    scores = score(query, sign, frozen.codebook, excluded=frozen.sinks)
    k = selected_tokens(int(rng.integers(0, 2 * keys.shape[2])), keys.shape[2], 0)
    return selection.top_k(selection.Scores(scores.astype(np.float32)), k, sinks=0, recent=0)


def _exact_part(keys, values, frozen):
    """Keys and values of the sinks, [batch, kv_heads, n, head_dim], n alike for all."""
    at = np.maximum(frozen.sinks, 0)[..., None]
    number = int((frozen.sinks[0, 0] >= 0).sum()) if frozen.sinks.size else 0
    return tuple(np.take_along_axis(x, np.broadcast_to(at, (*at.shape[:3], x.shape[3])), axis=2)[:, :, :number]
                 for x in (keys, values))


def _attends(rng, samples):
    """Sinks and selection are dense attention over those tokens alone, and parts merge."""
    pairs = []
    for _ in range(samples):
        query, keys, frozen = _problem(rng)
        values = to_float16(rng.standard_normal(keys.shape))
        encoded = encode(keys, frozen.mean, frozen.channel_scale)
        packed = kivi.encode_values(values, int(rng.choice([2, 4])), GROUP)
        chosen, sinks = _chosen(rng, keys, frozen, query), _exact_part(keys, values, frozen)
        common = (query, encoded, packed, frozen.channel_scale, chosen.indices, chosen.counts)
        made = sparse_attention_packed(*common, mean=frozen.mean, exact_keys=sinks[0], exact_values=sinks[1])
        held = (decode(encoded, frozen.channel_scale) + frozen.mean.astype(np.float64)[:, :, None], kivi.decode(packed))
        mask = selection.kept(chosen, sinks=0, recent=0)
        part = selection.attend(query, *held, mask)
        expected = attention.merge(*map(np.stack, zip(part, attention.decode(query, *sinks))))
        everything = [np.concatenate([one, two.astype(np.float64)], axis=2) for one, two in zip(held, sinks)]
        pairs += attention._compare(made, expected, query, *everything)
    return identity(*np.transpose(pairs), samples=samples)


def _all_selected(rng, samples):
    """A budget of all tokens: dense attention over sinks and store."""
    pairs = []
    for _ in range(samples):
        query, keys, frozen = _problem(rng)
        values = to_float16(rng.standard_normal(keys.shape))
        encoded = encode(keys, frozen.mean, frozen.channel_scale)
        packed = kivi.encode_values(values, 2, GROUP)
        scores = score(query, encoded.sign, frozen.codebook, excluded=frozen.sinks)
        number = int((frozen.sinks[0, 0] >= 0).sum()) if frozen.sinks.size else 0
        k = selected_tokens(keys.shape[2], keys.shape[2], number)
        chosen = selection.top_k(selection.Scores(scores.astype(np.float32)), k, sinks=0, recent=0)
        sinks = _exact_part(keys, values, frozen)
        made = sparse_attention_packed(query, encoded, packed, frozen.channel_scale, chosen.indices, chosen.counts,
                                       mean=frozen.mean, exact_keys=sinks[0], exact_values=sinks[1])
        held = [decode(encoded, frozen.channel_scale) + frozen.mean.astype(np.float64)[:, :, None], kivi.decode(packed)]
        for side, exact in zip(held, (keys, values)):
            for b, h in np.ndindex(keys.shape[:2]):
                at = frozen.sinks[b, h][frozen.sinks[b, h] >= 0]
                side[b, h, at] = exact[b, h, at]
        pairs += attention._compare(made, attention.decode(query, *held), query, *held)
    return identity(*np.transpose(pairs), samples=samples)


def _mass_bound(rng, samples):
    """|o - o_sel| <= 2 (1 - mass) max |v|, exact keys and values, any set of tokens."""
    pairs = []
    for _ in range(samples):
        tokens, head_dim = int(rng.integers(1, 60)), 32
        query, keys, values = (rng.standard_normal((1, 1, n, head_dim)) for n in (1, tokens, tokens))
        chosen = rng.random(tokens) < rng.uniform(0.05, 1)
        chosen[rng.integers(tokens)] = True
        whole, lse = attention.decode(query[:, 0], keys, values)
        part, part_lse = attention.decode(query[:, 0], keys[:, :, chosen], values[:, :, chosen])
        outside = -np.expm1(part_lse - lse)[0, 0]
        largest = np.linalg.norm(values, axis=-1).max()
        pairs.append((np.linalg.norm(whole - part), 2 * max(outside, 0) * largest + 1e-12 * largest))
    return bound(*np.transpose(pairs))


def _budgets(rng, samples):
    """Counts and ratios against whole numbers; every other time a ratio is a whole number of tokens."""
    wrong = []
    for case in range(samples):
        tokens, exact, hundredths = (int(n) for n in rng.integers(0, (4000, 70, 101)))
        tokens -= tokens % 100 * (case % 2)
        exact = min(exact, tokens)
        budget = -(-hundredths * tokens // 100)
        for given in (budget, hundredths / 100):
            wrong.append(selected_tokens(given, tokens, exact) != min(max(budget - exact, 0), tokens - exact))
    return identity(np.array(wrong, float))


def _bytes(rng, samples):
    """7/8 D bytes a token with values of 2 bits, 9/8 D with 4, and 72 D for what is frozen."""
    differences = []
    for _ in range(samples):
        head_dim, tokens, bits = 32 * int(rng.integers(1, 9)), int(rng.integers(0, 50)), int(rng.choice([2, 4]))
        keys = np.zeros((2, 3, tokens, head_dim), np.float16)
        frozen = freeze(keys, sinks="none")
        encoded = encode(keys, frozen.mean, frozen.channel_scale)
        values = kivi.encode_values(keys, bits, GROUP)
        differences += [8 * (encoded.nbytes + values.nbytes) - 6 * tokens * head_dim * (5 + bits),
                        6 * tokens * head_dim * (encoded.bits_per_element + values.bits_per_element) - 6 * tokens *
                        head_dim * (5 + bits), frozen.nbytes - 6 * 72 * head_dim]
    return identity(differences)


def _order(rng, samples):
    """Every sign alone: one bit of one word, one bit of one code."""
    differences = []
    for head_dim in (32, 64, 128, 256):
        for d in range(head_dim):
            words = pack_signs(np.arange(head_dim) == d)
            expected = np.zeros(head_dim // 32, np.uint32)
            expected[d // 32] = 1 << d % 32
            code = np.zeros(head_dim // 4, np.uint8)
            code[d // 4] = 1 << d % 4
            differences += [np.sum(words != expected), np.sum(codes(words) != code),
                            np.sum(unpack_signs(words) != (np.arange(head_dim) == d))]
    return identity(differences)


def _operands(rng, samples):
    """Byte offsets of table entries by shift and mask, and the comparisons that replace the division of `kivi`."""
    differences = []
    for _ in range(samples):
        words = rng.integers(0, 2**32, 8, dtype=np.uint32)
        even = (words << np.uint32(2) & np.uint32(0x3C3C3C3C)).view(np.uint8).reshape(8, 4)
        odd = (words >> np.uint32(2) & np.uint32(0x3C3C3C3C)).view(np.uint8).reshape(8, 4)
        code = codes(words).reshape(8, 4, 2)
        differences += [np.sum(even != 4 * code[..., 0]), np.sum(odd != 4 * code[..., 1])]
        x = np.abs(_vectors(rng, (1, 1, 8, GROUP)))
        c, s, m = kivi.quantise(x, MAGNITUDE_BITS)
        y, step = x.astype(np.float32) - m.astype(np.float32)[..., None], s.astype(np.float32)[..., None]
        counted = sum((y > step * f if f != 1.5 else y >= step * f).astype(int) for f in np.float32([0.5, 1.5, 2.5]))
        differences.append(np.sum(np.where(step > 0, counted, 0) != c))
    return identity(differences, samples=samples)


_PAPER = "arXiv 2603.14224"

CLAIMS = (
    Claim("score is a product", "sum_g L[g, code[t, g]] = <q, k_vq[t]>, k_vq the centroids of the codes",
          f"{_PAPER}; derived in reference/self_indexing.py", "identity", _is_product, samples=100),
    Claim("mean query", "the score of the mean query is the mean of the scores of its heads", "derived: linear",
          "identity", _mean_query, samples=100),
    Claim("residuals", "of stored tokens, k' - k_vq adds up to 0 in every cluster, and is orthogonal to k_vq in every "
          "group", "textbook: means minimise the squared error", "identity", _residuals, samples=20),
    Claim("error", "|k' - k_hat'| <= alpha (s / 2 + roundings of `error_bound`), of tokens within the prompt's range "
          "and up to 65504 alpha outside it", "derived in reference/self_indexing.py", "bound", _error, samples=150),
    Claim("append", "the codes of a token do not depend on how tokens were cut into calls", "definition", "identity",
          _appended, samples=60),
    Claim("centring", "softmax(<q, k - mu>) is softmax(<q, k>), and lse is less by <q, mu>",
          "textbook: softmax does not see a constant", "identity", _softmax_unchanged, samples=60),
    Claim("balanced signs", "centred by the median, half of the tokens are positive in every channel, up to 1",
          f"{_PAPER}: entropy of a sign", "bound", _balanced, samples=200),
    Claim("distortion", "of normal numbers, E |k' - k_vq|^2 / E |k'|^2 = 1 - 2 / pi and that of k_hat' is the one of "
          "`half_normal_distortion`, 0.0481, if all channels have one alpha", "derived in reference/self_indexing.py",
          "expectation", _distortion, samples=10000),
    Claim("empty clusters", "a cluster without tokens has the mean magnitudes of its group with the signs of its code",
          "definition", "identity", _empty_clusters, samples=60),
    Claim("padding", "padding and tokens that are not finite enter no statistic", "definition", "identity", _padding,
          samples=60),
    Claim("attention", "one softmax over exact and selected tokens is dense attention over them, and the merge of both",
          f"{_PAPER}; arXiv 1805.02867, section 3.1", "identity", _attends, samples=60),
    Claim("all selected", "a budget of all tokens is dense attention over sinks and dequantised store", "definition",
          "identity", _all_selected, samples=60),
    Claim("mass bound", "|o - o_sel| <= 2 (1 - mass) max |v|, mass the softmax mass of the attended tokens",
          "derived: triangle inequality", "bound", _mass_bound, samples=200),
    Claim("budgets", "a count or a ratio of tokens, exact ones included, in exact arithmetic", "definition", "identity",
          _budgets, samples=300),
    Claim("bytes", "keys 4 bits per element, values 3 (or 5): 21.9 % of float16; 72 D bytes of a KV head are frozen",
          "definition", "identity", _bytes, samples=60),
    Claim("order of the bits", "each sign is one bit of one word and of one code", "definition", "identity", _order,
          samples=1),
    Claim("operands", "shifts and masks give byte offsets of look-ups; comparisons with s / 2, 3 s / 2 and 5 s / 2 "
          "give the codes of a magnitude without a division", "derived in reference/self_indexing.py", "identity",
          _operands, samples=200),
)
