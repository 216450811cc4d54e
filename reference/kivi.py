"""KIVI: keys as integers per channel, values as integers per token, the newest tokens exact (arXiv 2402.02750).

G numbers x, a group, as integers of b bits (sections 2 and 3.1 of the paper), qmax = 2^b - 1:

    m = min x,    s = (max x - m) / qmax,    c = round((x - m) / s),    x_hat = s c + m.

Keys have few channels that are large in all tokens: a group is one channel of G consecutive tokens, on a grid that
begins at token 0.  Values have none: a group is G consecutive channels of one token.  The paper leaves the rounding of
x, s and m open; here x is first rounded to float16 (finite numbers beyond 65504 to 65504), and

    m           is float16, exactly; a zero is stored as +0
    s           is rounded to float32 after the difference and after the quotient, then to float16; zeros are +0, too
    c           comes from the stored s and m: one float32 subtraction, one division, clamped to 0 ... qmax, rounded
                half to even.  No difference or quotient is a subnormal float32, no product is added to anything: with
                IEEE operations (no reciprocals, no fast-math) every backend finds the same codes, without an allowance
    s = 0       where all numbers are equal, or so close that s rounds to 0: c = 0 and x_hat = m
    x_hat       s c is exact in float32, so x_hat rounds once there; here it is exact in float64.  In float16 it may
                overflow: it exceeds the largest number of its group by up to qmax s / 2048

    |x - x_hat| <= max(s / 2, qmax 2^-25 if s < 2^-14) + 2^-22 qmax s         (`error_bound`)

because a quotient is off by at most 2^-22 of itself before it is rounded to an integer, and what the clamp cuts off is
qmax times the error of s: 2^-11 of s, less than s / (2 qmax), or 2^-25 where float16 is subnormal.

NaN and Inf are left out of m and s, so that the other numbers of a group keep theirs.  NaN gets the code 0, +-Inf is
clamped; a group without a finite number has s = m = 0.

**The cache** after T tokens is a function of the tokens alone, however they arrived (Algorithm 1; its flush stands
before the logits in print, after them in the authors' code and here):

    keys    0 ... nK(T) - 1 are codes,  nK(T) = R floor(T / R),        the others exact: R of them are flushed at once
    values  0 ... nV(T) - 1 are codes,  nV(T) = max(0, T - R),         the others exact: flushed one by one

A decode step of token T attends to state(T) and to its own exact key and value; then the state becomes state(T + 1).

**How codes lie in memory**; the one definition, everything else links here.  Keys and values alike: a token is a row of
head_dim b / 32 words of 32 bits, whatever groups its numbers belong to.  Channel d = 32 u + 4 g + 2 v + h of a token,
with g = 0..7 and v, h = 0, 1, is field n = 2 (u + g head_dim / 32) + v of half h:

    word n // F,    bits 16 h + b (n mod F) and up, low bit first,    F = 16 / b fields to a half.

Two bits, head_dim 128, word g (channels less 4 g; the upper half has the odd channels):

    bits        15,14  13,12  11,10   9,8    7,6    5,4    3,2    1,0         31,30  ...  19,18  17,16
    channel       98     96     66     64     34     32      2      0           99    ...     3      1

Four bits, head_dim 128, words 2 g and 2 g + 1:

    bits        15-12  11-8    7-4    3-0                   bits        15-12  11-8    7-4    3-0
    channel       34     32      2      0     word 2 g      channel       98     96     66     64     word 2 g + 1

Why.  A tensor core adds up along the channels for logits and along the tokens for outputs, and takes its operands in
registers that hold neighbours *along that sum*.  Rows of tokens serve both, though keys are grouped along tokens:

  * Scales never touch codes.  For keys the sum over channels has s_d q_d in place of q_d, new for every group of
    tokens, plus one number per group, sum_d q_d m_d; for values the weights p_t s_t, plus sum_t p_t m_t per group of
    channels (`logits`, `decode_attention`).
  * One AND makes operands: W & 0x00030003 << 2 f is a pair of float16, c 2^(2 f - 24), exactly: subnormal numbers,
    which mma takes as they are.  Fields that end by bit 10 of a half need no shift.  The power of two is
    a factor of the query, or of the output.  Likewise W & 0x03030303 << 2 f is four u8.  For b = 4 the masks are
    0x000F000F and 0x0F0F0F0F.  (Tested: claim "operands".)
  * Keys, B operand of m16n8k16 (two neighbours along the sum per register) or of m16n8k32 (four): a word is 32 / b
    channels of one token, so a register holds channels of one token, and the order of the sum is free as long as the
    query has the same.  Lane (g, t) of the product reads the channels 32 u + 8 t ... + 7 of token g, a quarter of
    the row; their s, and their m, are 16 consecutive bytes for each u.  The two halves of a register are channels d
    and d + 1, as are those of a word of s.
  * Values, A operand of m16n8k16, V^T: a register is one channel of two tokens.  One byte permutation puts the lower
    halves of the words of two tokens into one register, another the upper halves: from there on as above.  Lane (g, t)
    reads the channels 32 u + 4 g ... + 3 of the tokens of t: an eighth of the row (with head_dim 64 and 2 bits half of
    the fields of a word).  Rows g and g + 8 of one product are v = 0 and 1 of the same u: all rows of a product lie in
    the same 32 channels, hence in the same group, and so share the weights p_t s_t.
  * Appending writes the row of the token and its scales, and reads nothing; a tile of 32 tokens is contiguous in every
    array (head_dim 128, 2 bits, G = 32: 1024 bytes of codes, 256 of scales, 256 of minima, of keys as of values);
    values may be gathered token by token.  The keys of a group are written together: so are their scales made.
  * What remains to transpose are the scales of values, which lie together by token and are needed as pairs of tokens:
    two byte permutations for two tokens and two groups, which are 128 codes.

Scales and minima: keys [batch, kv_heads, tokens / G, head_dim], values [batch, kv_heads, tokens, head_dim / G], in the
order of the channels.  The layout of the authors' repository, transposed for keys, is made by `to_interchange`.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import special

from . import attention
from .claim import Claim, bound, expectation, identity, weakest

BITS = (2, 4, 8)
LARGEST = 65504.0                  # of float16
SMALLEST_NORMAL = 2.0**-14         # of float16
ARITHMETIC = ("ref", "compat")


# --- Codes of a group ------------------------------------------------------------------------------------------------


def to_float16(x) -> np.ndarray:
    """x rounded to float16; finite numbers saturate at +-65504, NaN and Inf stay."""
    x = np.asarray(x)
    if x.dtype == np.float16:
        return x
    x = x.astype(np.float64)
    return np.where(np.isfinite(x), np.clip(x, -LARGEST, LARGEST), x).astype(np.float16)


def quantise(x, bits: int, arithmetic: str = "ref") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes of groups x [..., G]: (c [..., G] uint8, s [...] float16, m [...] float16).

    arithmetic : "ref", the definition; "compat": the difference max - m and all of c rounded to float16 at each step,
                 as the authors' code does.  There s may overflow to Inf, which makes all codes of the group 0

    Source: KIVI, arXiv 2402.02750, section 3.1.
    """
    _check_bits(bits)
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"kivi: arithmetic: expected one of {', '.join(ARITHMETIC)}, got {arithmetic!r}")
    x = to_float16(x)
    number = np.float32 if arithmetic == "ref" else np.float16
    finite = np.isfinite(x)
    some = finite.any(axis=-1)
    m = np.where(some, x.min(axis=-1, where=finite, initial=np.inf), np.float16(0))
    largest = np.where(some, x.max(axis=-1, where=finite, initial=-np.inf), np.float16(0))
    m = m + np.float16(0)                                                                    # -0 becomes +0
    with np.errstate(over="ignore"):
        s = ((largest.astype(number) - m.astype(number)) / number(2**bits - 1)).astype(np.float16)
    s = s + np.float16(0)                                                                    # of -0 alone, too
    return assign(x, s, m, bits, arithmetic), s, m


def assign(x, s, m, bits: int, arithmetic: str = "ref") -> np.ndarray:
    """round(clamp((x - m) / s, 0, qmax)), half to even, for x [..., G] and the s, m [...] of its groups: uint8."""
    number = np.float32 if arithmetic == "ref" else np.float16
    x, s, m = np.asarray(x).astype(number), s[..., None].astype(number), m[..., None].astype(number)
    with np.errstate(over="ignore", invalid="ignore"):
        c = np.rint(np.clip((x - m) / np.where(s > 0, s, number(1)), 0, 2**bits - 1))
    return np.where((s > 0) & ~np.isnan(c), c, 0).astype(np.uint8)


# --- Codes of keys and values ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """Keys or values [batch, kv_heads, tokens, head_dim] as codes; see the head of this module for the order of bits.

    codes            [batch, kv_heads, tokens, head_dim bits / 32] uint32
    scale, minimum   float16, s and m of the groups: of `Keys` [batch, kv_heads, tokens / group, head_dim],
                     of `Values` [batch, kv_heads, tokens, head_dim / group]
    """

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray
    bits: int
    group: int

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def head_dim(self) -> int:
        return self.codes.shape[3] * 32 // self.bits

    def arrays(self) -> dict[str, np.ndarray]:
        return {"codes": self.codes, "scale": self.scale, "minimum": self.minimum}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def bits_per_element(self) -> float:
        """Bits held per number, scales and minima counted: b + 32 / G."""
        return self.bits + 32 / self.group


class Keys(Encoded):
    """Per channel: a group is one channel of `group` consecutive tokens."""

    grouped_axis = 2


class Values(Encoded):
    """Per token: a group is `group` consecutive channels of one token.  (Keys may be stored so, too.)"""

    grouped_axis = 3


def encode_keys(x, bits: int, group: int = 32, *, check_finite: bool = False) -> Keys:
    """Quantise per channel, in groups of consecutive tokens, and pack.

    x            : [batch, kv_heads, tokens, head_dim], any real dtype, after RoPE; tokens in whole groups, the first on
                   the grid of the sequence; head_dim a multiple of 32
    bits         : 2, 4 or 8        group : a multiple of 32 (the paper: 32, 64, 128)
    check_finite : raise ValueError where x holds NaN or Inf

    Source: KIVI, arXiv 2402.02750, section 3.2 and Algorithm 1.
    """
    x = _input(x, bits, group, check_finite)
    if x.shape[2] % group:
        raise ValueError(f"kivi: x: expected tokens in whole groups of {group}, got {x.shape[2]} tokens: the last ones "
                         "stay exact")
    return _encode(Keys, x, bits, group)


def encode_values(x, bits: int, group: int = 32, *, check_finite: bool = False) -> Values:
    """Quantise per token, in groups of consecutive channels, and pack.  Arguments as in `encode_keys`; any number of
    tokens, head_dim a multiple of `group`.

    Source: KIVI, arXiv 2402.02750, section 3.2 and Algorithm 1.
    """
    x = _input(x, bits, group, check_finite)
    if x.shape[3] % group:
        raise ValueError(f"kivi: x: expected head_dim in whole groups of {group}, got head_dim {x.shape[3]}")
    return _encode(Values, x, bits, group)


def decode(encoded: Encoded) -> np.ndarray:
    """x_hat = s c + m, [batch, kv_heads, tokens, head_dim] float64, exact: multiples of 2^-24 below 2^27."""
    codes = unpack(encoded.codes, encoded.bits).astype(np.float64)
    return _per_number(encoded, encoded.scale) * codes + _per_number(encoded, encoded.minimum)


def error_bound(encoded: Encoded) -> np.ndarray:
    """What |x - x_hat| is at most for finite x, derived in the head of this module: the shape of x, float64."""
    s, qmax = _per_number(encoded, encoded.scale), 2**encoded.bits - 1
    return np.maximum(s / 2, np.where(s < SMALLEST_NORMAL, qmax * 2.0**-25, 0)) + 2.0**-22 * qmax * s


def logits(query, keys: Keys, *, scale=None) -> np.ndarray:
    """scale <q_h, k_hat_t>, [batch, q_heads, tokens] float64, with s and m folded into the query:

        <q, k_hat_t> = sum_d (q_d s_d) c_td + sum_d q_d m_d,    s and m those of the group of t.

    query : [batch, q_heads, head_dim], q_heads a multiple of kv_heads        scale : default head_dim ** -0.5
    """
    rows = _query(query, keys, scale)                                       # [batch, kv_heads, q_heads/kv_heads, D]
    batch, kv_heads, heads, head_dim = rows.shape
    s, m = (x.astype(np.float64)[:, :, :, None] for x in (keys.scale, keys.minimum))             # [.., groups, 1, D]
    folded = rows[:, :, None] * s                                           # [batch, kv_heads, groups, heads, D]
    codes = unpack(keys.codes, keys.bits).reshape(batch, kv_heads, keys.tokens // keys.group, keys.group, head_dim)
    products = folded @ np.swapaxes(codes, -1, -2).astype(np.float64)       # [batch, kv_heads, groups, heads, G]
    products += (rows[:, :, None] * m).sum(axis=-1)[..., None]
    return np.moveaxis(products, 3, 2).reshape(batch, kv_heads * heads, keys.tokens)


def decode_attention(query, keys: Keys, values: Values, *, lengths=None, scale=None, return_lse: bool = True):
    """One decode step of attention on the codes: `attention.decode` over the decoded keys and values.

    query   : [batch, q_heads, head_dim]
    keys    : of [batch, kv_heads, tokens, head_dim]        values : likewise
    lengths : [batch] int, tokens of each sequence (default: all), in whole groups or not; slots from there on are not
              read
    scale   : factor of the logits (default head_dim ** -0.5)

    Scales and minima of values are folded into the weights:

        output_c = sum_t (p_t s_tg) c_tc + sum_t p_t m_tg,    g the group of channel c.

    Returns (output [batch, q_heads, head_dim], lse [batch, q_heads]), float64, natural logarithm; the output alone
    without `return_lse`.  An empty sequence gives output 0 and lse -inf.  Results over disjoint tokens, exact
    ones among them, merge by `attention.merge`.
    """
    if (keys.codes.shape[:3], keys.head_dim) != (values.codes.shape[:3], values.head_dim):
        raise ValueError(f"kivi: values: expected [batch, kv_heads, tokens, head_dim] = "
                         f"{[*keys.codes.shape[:3], keys.head_dim]} as of the keys, got "
                         f"{[*values.codes.shape[:3], values.head_dim]}")
    every = logits(query, keys, scale=scale)
    batch, kv_heads, tokens = keys.codes.shape[:3]
    every = every.reshape(batch, kv_heads, every.shape[1] // kv_heads, tokens)
    lengths = _lengths(lengths, batch, tokens)
    codes = unpack(values.codes, values.bits).reshape(*values.scale.shape, values.group).astype(np.float64)
    s, m = values.scale.astype(np.float64), values.minimum.astype(np.float64)     # [batch, kv_heads, tokens, groups]
    output, lse = np.zeros((*every.shape[:3], values.head_dim)), np.full(every.shape[:3], -np.inf)
    for b in range(batch):
        n = lengths[b]
        if n == 0:
            continue
        for g in range(kv_heads):
            largest = every[b, g, :, :n].max(axis=-1, keepdims=True)
            p = np.exp(every[b, g, :, :n] - largest)                                  # [heads, n]
            total = p.sum(axis=-1, keepdims=True)
            weighted = p[:, :, None] * s[b, g, :n]                                    # [heads, n, groups]
            parts = np.einsum("htg,tgc->hgc", weighted, codes[b, g, :n]) + (p @ m[b, g, :n])[..., None]
            output[b, g] = parts.reshape(len(p), -1) / total
            lse[b, g] = (largest + np.log(total))[:, 0]
    output, lse = output.reshape(np.shape(query)), lse.reshape(*np.shape(query)[:2])
    return (output, lse) if return_lse else output


# --- The cache -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """Which tokens are codes, and of how many bits.

    key_bits, value_bits   2, 4 or 8        group : G, a multiple of 32
    window                 R, the exact tokens: a multiple of the group
    sinks                  the first tokens are kept exact besides, and attended exactly (0: KIVI).  The groups do not
                           move: the first key group has them too
    """

    key_bits: int = 2
    value_bits: int = 2
    group: int = 32
    window: int = 128
    sinks: int = 0

    def __post_init__(self):
        _check_bits(self.key_bits, "key_bits")
        _check_bits(self.value_bits, "value_bits")
        _check_group(self.group)
        if not _is_integer(self.window) or self.window < 1 or self.window % self.group:
            raise ValueError(f"kivi: window: expected a positive multiple of the group {self.group}, "
                             f"got {self.window!r}")
        if not _is_integer(self.sinks) or self.sinks < 0:
            raise ValueError(f"kivi: sinks: expected an integer of at least 0, got {self.sinks!r}")

    def stored_keys(self, tokens: int) -> int:
        """nK(T) = R floor(T / R)."""
        return self.window * (tokens // self.window)

    def stored_values(self, tokens: int) -> int:
        """nV(T) = max(0, T - R); nV <= nK."""
        return max(tokens - self.window, 0)

    def nbytes(self, tokens: int, kv_heads: int, head_dim: int) -> int:
        """Bytes that hold `tokens` tokens of one sequence."""
        n_k, n_v = self.stored_keys(tokens), self.stored_values(tokens)
        codes = n_k * (self.key_bits + 32 / self.group) + n_v * (self.value_bits + 32 / self.group)
        exact = 16 * ((tokens - n_k) + (tokens - n_v) + 2 * min(tokens, self.sinks))
        return int(kv_heads * head_dim * (codes + exact)) // 8


@dataclass(frozen=True, eq=False)
class State:
    """What the cache holds of sequences of T tokens each; sequences of other lengths are other states.

    keys, values             codes of the tokens [0, nK) and [0, nV)
    key_tail, value_tail     the exact tokens [nK, T) and [nV, T): [batch, kv_heads, ..., head_dim] float16
    sink_keys, sink_values   the exact tokens [0, min(T, sinks)), likewise
    """

    keys: Keys
    values: Values
    key_tail: np.ndarray
    value_tail: np.ndarray
    sink_keys: np.ndarray
    sink_values: np.ndarray

    @property
    def tokens(self) -> int:
        return self.keys.tokens + self.key_tail.shape[2]

    def arrays(self) -> dict[str, np.ndarray]:
        named = {f"{side}.{name}": array for side in ("keys", "values")
                 for name, array in getattr(self, side).arrays().items()}
        return named | {name: getattr(self, name) for name in ("key_tail", "value_tail", "sink_keys", "sink_values")}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())


def prefill(keys, values, scheme: Scheme) -> State:
    """state(T) of a prompt [batch, kv_heads, T, head_dim], T = 0 included."""
    keys, values = _tokens(keys, values)
    n_k, n_v, sinks = scheme.stored_keys(keys.shape[2]), scheme.stored_values(keys.shape[2]), scheme.sinks
    return State(encode_keys(keys[:, :, :n_k], scheme.key_bits, scheme.group),
                 encode_values(values[:, :, :n_v], scheme.value_bits, scheme.group),
                 keys[:, :, n_k:], values[:, :, n_v:], keys[:, :, :sinks], values[:, :, :sinks])


def append(state: State, keys, values, scheme: Scheme) -> State:
    """state(T + n) from state(T) and n more tokens [batch, kv_heads, n, head_dim]; codes that are there stay.

    Source: KIVI, arXiv 2402.02750, Algorithm 1, decoding; more than one token at once: as one by one.
    """
    keys, values = _tokens(keys, values, state)
    sinks = [np.concatenate([old, new], axis=2)[:, :, : scheme.sinks] if old.shape[2] == state.tokens else old
             for old, new in ((state.sink_keys, keys), (state.sink_values, values))]
    tokens = state.tokens + keys.shape[2]
    key_tail = np.concatenate([state.key_tail, keys], axis=2)
    value_tail = np.concatenate([state.value_tail, values], axis=2)
    new_keys = scheme.stored_keys(tokens) - state.keys.tokens
    new_values = max(scheme.stored_values(tokens) - state.values.tokens, 0)             # a cropped state has more
    return State(_concatenate(state.keys, encode_keys(key_tail[:, :, :new_keys], scheme.key_bits, scheme.group)),
                 _concatenate(state.values,
                              encode_values(value_tail[:, :, :new_values], scheme.value_bits, scheme.group)),
                 key_tail[:, :, new_keys:], value_tail[:, :, new_values:], *sinks)


def crop(state: State, tokens: int) -> State:
    """The first `tokens` tokens.  ValueError below nK: what was exact of the tokens before is gone.

    Values that became codes stay codes: the result is state(tokens) of the scheme only if no value did since.
    """
    if not state.keys.tokens <= tokens <= state.tokens:
        raise ValueError(f"kivi: tokens: expected {state.keys.tokens} (keys that are codes) to {state.tokens}, "
                         f"got {tokens}")
    return State(state.keys, state.values, state.key_tail[:, :, : tokens - state.keys.tokens],
                 state.value_tail[:, :, : tokens - state.values.tokens], state.sink_keys[:, :, :tokens],
                 state.sink_values[:, :, :tokens])


def attend(query, state: State, keys=None, values=None, *, scale=None, return_lse: bool = True):
    """Attention to all that the cache holds and to the tokens of this step, which are exact.

    query  : [batch, q_heads, head_dim]
    keys   : [batch, kv_heads, n, head_dim], n >= 0: the tokens of the chunk up to that of the query, itself included;
             not yet in `state`.  A decode step gives its one token; then `append` makes the next state
    values : likewise        scale : default head_dim ** -0.5

    Returns (output, lse), float64, as `decode_attention`.
    """
    if keys is None:
        keys = values = np.zeros((*state.key_tail.shape[:2], 0, state.key_tail.shape[3]), np.float16)
    keys, values = _tokens(keys, values, state)
    everything = []
    for sinks, encoded, tail, new in ((state.sink_keys, state.keys, state.key_tail, keys),
                                      (state.sink_values, state.values, state.value_tail, values)):
        held = np.concatenate([decode(encoded), tail, new], axis=2)
        held[:, :, : sinks.shape[2]] = sinks
        everything.append(held)
    return attention.decode(query, *everything, scale=scale, return_lse=return_lse)


# --- How codes lie in memory -----------------------------------------------------------------------------------------


@functools.cache
def places(bits: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(word, bit) of every channel, [head_dim] integers each: the drawing in the head of this module."""
    d = np.arange(head_dim)
    u, g, v, h = d // 32, d // 4 % 8, d // 2 % 2, d % 2
    n, fields = 2 * (u + g * (head_dim // 32)) + v, 16 // bits
    return n // fields, (16 * h + bits * (n % fields)).astype(np.uint32)


def pack(codes, bits: int) -> np.ndarray:
    """[..., head_dim] integers from 0 to 2^bits - 1 -> [..., head_dim bits / 32] uint32; head_dim a multiple of 32.

    ValueError names a code that does not fit.
    """
    codes = np.asarray(codes)
    _check_bits(bits)
    if codes.ndim < 1 or codes.shape[-1] % 32:
        raise ValueError(f"kivi.pack: codes: expected [..., a multiple of 32], got {list(codes.shape)}")
    if codes.dtype.kind not in "bui" or codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(f"kivi.pack: codes: expected integers from 0 to {2**bits - 1}, got {codes.dtype}"
                         + (f" from {codes.min()} to {codes.max()}" if codes.size else ""))
    head_dim = codes.shape[-1]
    word, bit = places(bits, head_dim)
    by_word = np.argsort(word, kind="stable")                                # 32 / bits channels to a word
    fields = (codes.astype(np.uint32) << bit)[..., by_word]
    fields = fields.reshape(*codes.shape[:-1], head_dim * bits // 32, 32 // bits)
    return np.ascontiguousarray(np.bitwise_or.reduce(fields, axis=-1))


def unpack(words, bits: int) -> np.ndarray:
    """[..., head_dim bits / 32] uint32 -> the codes [..., head_dim] uint8 that were packed."""
    words = np.asarray(words)
    _check_bits(bits)
    if words.dtype != np.uint32 or words.ndim < 1 or words.shape[-1] % bits:
        raise ValueError(f"kivi.unpack: words: expected uint32 [..., a multiple of {bits}], got {words.dtype} "
                         f"{list(words.shape)}")
    word, bit = places(bits, words.shape[-1] * 32 // bits)
    return (words[..., word] >> bit & np.uint32(2**bits - 1)).astype(np.uint8)


def to_interchange(encoded: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(words, s, m) as the authors' repository keeps them, where field j of a word is in bits [b j, b j + b):

    Keys    transposed: words [batch, kv_heads, head_dim, tokens b / 32] int32, along tokens; s, m [.., tokens / G]
    Values  words [batch, kv_heads, tokens, head_dim b / 32] int32, along channels; s, m [.., head_dim / G]
    """
    arrays = unpack(encoded.codes, encoded.bits), encoded.scale, encoded.minimum
    codes, scale, minimum = (np.swapaxes(x, 2, 3) for x in arrays) if isinstance(encoded, Keys) else arrays
    shifts = (encoded.bits * np.arange(32 // encoded.bits)).astype(np.uint32)
    fields = codes.astype(np.uint32).reshape(*codes.shape[:3], codes.shape[3] * encoded.bits // 32, len(shifts))
    words = np.ascontiguousarray(np.bitwise_or.reduce(fields << shifts, axis=-1)).view(np.int32)
    return words, np.ascontiguousarray(scale), np.ascontiguousarray(minimum)


def from_interchange(kind: type[Encoded], words, scale, minimum, bits: int, group: int) -> Encoded:
    """The Keys or Values (`kind`) of which `to_interchange` gives these arrays."""
    shifts = (bits * np.arange(32 // bits)).astype(np.int32)
    fields = (np.asarray(words)[..., None] >> shifts & np.int32(2**bits - 1)).astype(np.uint8)   # words may be negative
    arrays = fields.reshape(*fields.shape[:3], fields.shape[3] * len(shifts)), np.asarray(scale), np.asarray(minimum)
    if kind is Keys:
        arrays = [np.ascontiguousarray(np.swapaxes(x, 2, 3)) for x in arrays]
    return kind(pack(arrays[0], bits), *arrays[1:], bits, group)


# --- Steps shared by the above ---------------------------------------------------------------------------------------


def _encode(kind, x, bits, group):
    """Quantise along kind.grouped_axis."""
    axis = kind.grouped_axis
    split = x.reshape(*x.shape[:axis], x.shape[axis] // group, group, *x.shape[axis + 1 :])
    c, s, m = quantise(np.moveaxis(split, axis + 1, -1), bits)
    s, m = np.ascontiguousarray(s), np.ascontiguousarray(m)
    return kind(pack(np.moveaxis(c, -1, axis + 1).reshape(x.shape), bits), s, m, bits, group)


def _per_number(encoded, x):
    """[.., tokens / G, head_dim] or [.., tokens, head_dim / G] -> [.., tokens, head_dim] float64."""
    return np.repeat(x.astype(np.float64), encoded.group, axis=encoded.grouped_axis)


def _concatenate(first, second):
    return type(first)(*(np.concatenate([array, second.arrays()[name]], axis=2)
                         for name, array in first.arrays().items()), first.bits, first.group)


def _input(x, bits, group, check_finite):
    x = np.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"kivi: x: expected [batch, kv_heads, tokens, head_dim], got {list(x.shape)}")
    _check_bits(bits)
    _check_group(group)
    if x.shape[3] % 32 or not x.shape[3]:
        raise ValueError(f"kivi: x: expected a head_dim that is a multiple of 32, got {x.shape[3]}")
    x = to_float16(x)
    if check_finite and not np.isfinite(x).all():
        finite = np.isfinite(x).all(axis=-1)
        raise ValueError(f"kivi: x: expected finite numbers, got NaN or Inf in {(~finite).sum()} vectors, the first at "
                         f"[batch, kv_head, token] = {np.argwhere(~finite)[0].tolist()}")
    return x


def _tokens(keys, values, state=None):
    """Both as float16 [batch, kv_heads, tokens, head_dim], of one shape, which is that of the state but for tokens."""
    keys, values = to_float16(keys), to_float16(values)
    if keys.ndim != 4:
        raise ValueError(f"kivi: keys: expected [batch, kv_heads, tokens, head_dim], got {list(keys.shape)}")
    if values.shape != keys.shape:
        raise ValueError(f"kivi: values: expected the shape of keys, {list(keys.shape)}, got {list(values.shape)}")
    if state is not None:
        shape = state.key_tail.shape
        if (keys.shape[:2], keys.shape[3]) != (shape[:2], shape[3]):
            raise ValueError(f"kivi: keys: expected [{shape[0]}, {shape[1]}, tokens, {shape[3]}] as the cache holds, "
                             f"got {list(keys.shape)}")
    return keys, values


def _query(query, keys, scale):
    """scale q by KV head, to which q_heads / kv_heads in a row belong: [batch, kv_heads, q_heads / kv_heads, D]."""
    query = np.asarray(query).astype(np.float64)
    batch, kv_heads = keys.codes.shape[:2]
    if query.ndim != 3 or query.shape[::2] != (batch, keys.head_dim) or query.shape[1] % kv_heads:
        raise ValueError(f"kivi: query: expected [batch, q_heads, head_dim] = [{batch}, a multiple of {kv_heads}, "
                         f"{keys.head_dim}], got {list(query.shape)}")
    scale = keys.head_dim**-0.5 if scale is None else float(scale)
    return (scale * query).reshape(batch, kv_heads, query.shape[1] // kv_heads, keys.head_dim)


def _lengths(lengths, batch, tokens):
    lengths = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.dtype.kind not in "ui" or lengths.size and not (
            0 <= lengths.min() <= lengths.max() <= tokens):
        raise ValueError(f"kivi: lengths: expected [batch] = [{batch}] integers from 0 to {tokens}, got "
                         f"{lengths.tolist()}")
    return lengths


def _is_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_bits(bits, name="bits"):
    if not _is_integer(bits) or bits not in BITS:
        raise ValueError(f"kivi: {name}: expected 2, 4 or 8, got {bits!r}")


def _check_group(group):
    if not _is_integer(group) or group < 1 or group % 32:
        raise ValueError(f"kivi: group: expected a positive multiple of 32, got {group!r}")


# --- Claims ----------------------------------------------------------------------------------------------------------


def normal_distortion(bits: int, group: int) -> float:
    """E (x - x_hat)^2 / E x^2 for independent normal numbers, but for the rounding of x and s to float16.

    With a and b the least and the largest of G numbers, whose joint density is G (G - 1) f(a) f(b) (F(b) - F(a))^(G-2),
    the others are independent with the density f / (F(b) - F(a)) on (a, b), and a and b have no error:

        (G - 1) (G - 2) int int f(a) f(b) (F(b) - F(a))^(G-3) int_a^b (x - x_hat)^2 f(x) dx da db.

    Both outer integrals by Gauss-Legendre nodes; of 32 numbers and more, a < 1 and b > -1 but for 2 F(-1)^32 = 5e-26.
    """
    node, weight = np.polynomial.legendre.leggauss(96)
    a, b = (-8 + 4.5 * (1 + node))[:, None], (-1 + 4.5 * (1 + node))[None, :]              # a in (-8, 1), b in (-1, 8)
    density = weight[:, None] * weight * 4.5**2 * np.exp(-(a**2 + b**2) / 2) / (2 * np.pi)
    width = np.maximum(special.ndtr(b) - special.ndtr(a), 0)
    step = (b - a) / (2**bits - 1)
    inner, low = 0.0, a
    for c in range(2**bits):
        level, high = a + c * step, np.minimum(a + (c + 0.5) * step, b)
        inner = inner + _square_below(high, level) - _square_below(low, level)
        low = high
    return float((group - 1) * (group - 2) * (density * width ** (group - 3) * inner).sum())


def _square_below(t, r):
    """int_-inf^t (x - r)^2 f(x) dx of the normal law, by parts."""
    return (1 + r**2) * special.ndtr(t) + (2 * r - t) * np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)


def _vectors(rng, shape):
    """float16 of one of many kinds: outlier channels, large means, equal numbers, zeros, subnormal, saturating."""
    x = rng.standard_normal(shape)
    kind = rng.integers(10)
    if kind == 1:
        x += 1000 * rng.choice([-1, 1])
    elif kind == 2:
        x[..., rng.integers(shape[-1])] *= 100
    elif kind == 3:
        x *= 2.0 ** rng.uniform(-26, -8)
    elif kind == 4:
        x *= 30000
    elif kind == 5:
        x[...] = rng.standard_normal((*shape[:2], 1, shape[-1]) if rng.random() < 0.5 else (*shape[:3], 1))
    elif kind == 6:
        x *= rng.random(shape) < 0.1
    elif kind == 7:
        x = np.rint(x)
    elif kind == 8:
        x = rng.choice([-1, 1], shape) * 2.0 ** rng.uniform(-24, 16, shape)
    elif kind == 9:
        x *= rng.choice([2.0**-12, 1, 30000], (*shape[:2], 1, shape[-1]))
    return to_float16(x)


def _parameters(rng):
    """(bits, group, head_dim), a head_dim that holds whole groups."""
    group = int(rng.choice([32, 64, 128]))
    return int(rng.choice(BITS)), group, group * int(rng.choice([1, 2])) if group < 128 else 128


def _encoded(rng):
    """(x, its Keys or Values) of a few tokens."""
    bits, group, head_dim = _parameters(rng)
    if rng.random() < 0.5:
        x = _vectors(rng, (1, 2, group * int(rng.integers(1, 3)), head_dim))
        return x, encode_keys(x, bits, group)
    x = _vectors(rng, (1, 2, int(rng.integers(1, 60)), head_dim))
    return x, encode_values(x, bits, group)


def _worst(value, limit):
    """Of arrays, the (value, limit) nearest to breaking value <= limit."""
    value, limit = np.broadcast_arrays(np.abs(value).ravel(), np.ravel(limit))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(value == 0, 0, value / limit)
    at = np.argmax(np.where(np.isnan(ratio), np.inf, ratio))
    return value[at], limit[at]


def _error(rng, samples):
    cases = {"exact": [], "float32": []}
    for _ in range(samples):
        x, encoded = _encoded(rng)
        x_hat, x = decode(encoded), x.astype(np.float64)
        s, m = (_per_number(encoded, array) for array in (encoded.scale, encoded.minimum))
        qmax = 2**encoded.bits - 1
        specified = s / 2 + 2.0**-22 * (np.abs(m) + qmax * s) + np.where(s < SMALLEST_NORMAL, qmax * 2.0**-25, 0)
        cases["exact"].append(_worst(x - x_hat, error_bound(encoded)))
        cases["float32"].append(_worst(x - x_hat.astype(np.float32), specified))
    return weakest({name: bound(*np.transpose(pairs)) for name, pairs in cases.items()})


def _float16_decoding(rng, samples):
    """s c and the sum rounded to float16 each, where that is finite."""
    pairs = []
    for _ in range(samples):
        _, encoded = _encoded(rng)
        s, m = (_per_number(encoded, array) for array in (encoded.scale, encoded.minimum))
        exact = decode(encoded)
        with np.errstate(over="ignore"):
            product = (s * unpack(encoded.codes, encoded.bits)).astype(np.float16)
            half = product + m.astype(np.float16)
        finite = np.isfinite(half)
        limit = (2**encoded.bits - 1) * s * 2.0**-11 * (1 + 2.0**-11) + np.abs(exact) * 2.0**-11
        pairs.append(_worst(np.where(finite, half, 0) - np.where(finite, exact, 0), limit))
    return bound(*np.transpose(pairs))


def _compat_error(rng, samples):
    """Where max - min fits float16."""
    pairs = []
    for _ in range(samples):
        bits, group, _ = _parameters(rng)
        x = _vectors(rng, (1, 1, 40, group))[0, 0]
        c, s, m = (array.astype(np.float64) for array in quantise(x, bits, "compat"))
        c, s, m, x = (array[np.isfinite(s)] for array in (c, s, m, x.astype(np.float64)))
        limit = s * (0.5 + (2**bits - 1) * 2.0**-10) + np.where(s < SMALLEST_NORMAL, (2**bits - 1) * 2.0**-25, 0)
        if len(s):
            pairs.append(_worst(x - (c * s[:, None] + m[:, None]), np.broadcast_to(limit[:, None], x.shape)))
    return bound(*np.transpose(pairs))


def _distortion(rng, samples):
    """The rounding of s, relative 2^-11 at most, enters squared: qmax^2 2^-22 s^2 beside s^2 / 12, 7e-4 for 4 bits."""
    cases = {}
    for group in (32, 64, 128):
        x = to_float16(rng.standard_normal((samples, group)))
        for bits in (2, 4):
            c, s, m = (array.astype(np.float64) for array in quantise(x, bits))
            error = ((x - (c * s[:, None] + m[:, None])) ** 2).mean(axis=-1)
            expected = normal_distortion(bits, group)
            cases[f"{bits} bits, groups of {group}"] = expectation(error, expected, allowance=1e-3 * expected)
    return weakest(cases)


def _requantised(rng, samples):
    """x_hat in float32, through `assign` with the stored s and m; the extremes of every group."""
    differences, minima, maxima = [], [], []
    for _ in range(samples):
        bits, group, _ = _parameters(rng)
        x = _vectors(rng, (1, 1, 40, group))[0, 0]
        c, s, m = quantise(x, bits)
        wide, step = x.astype(np.float64), s.astype(np.float64)[:, None]
        x_hat = c * step + m.astype(np.float64)[:, None]
        differences.append(np.sum(assign(x_hat.astype(np.float32), s, m, bits) != c))
        minima.append(np.abs((x_hat - wide)[wide == wide.min(axis=-1, keepdims=True)]).max() if np.any(s) else 0)
        top = (wide == wide.max(axis=-1, keepdims=True)) & (step >= SMALLEST_NORMAL)
        limit = np.broadcast_to((2**bits - 1) * step * (2.0**-11 + 2.0**-22), x.shape)
        if top.any():
            maxima.append(_worst((x_hat - wide)[top], limit[top]))
    return weakest({"codes": identity(differences), "minimum": identity(minima),
                    "maximum": bound(*np.transpose(maxima))})


def _problem(rng):
    """(query, keys, values float16, encoded keys and values): grouped heads; keys with a large channel."""
    bits, group, head_dim = _parameters(rng)
    batch, kv_heads, heads = (int(rng.integers(1, high)) for high in (3, 3, 4))
    tokens = group * int(rng.integers(1, 3))
    query = rng.standard_normal((batch, kv_heads * heads, head_dim)) * rng.choice([0.3, 1.0, 3.0])
    keys, values = rng.standard_normal((2, batch, kv_heads, tokens, head_dim))
    keys[..., rng.integers(head_dim)] += 10
    values[:, :, rng.integers(tokens)] *= 100
    keys, values = to_float16(keys), to_float16(values)
    return query, keys, values, encode_keys(keys, bits, group), encode_values(values, int(rng.choice(BITS)), group)


def _rounding(query, keys):
    """Absolute error of a float64 logit by either order of summation, and relative error of a softmax weight.

    Sums of head_dim products of at most |q| |k|; s c and m are at most 3 |k| in a group that spans zero or not.
    """
    norms = np.linalg.norm(query, axis=-1).max() * np.abs(keys.astype(np.float64)).max(initial=0)
    return 2.0**-52 * (8 * query.shape[-1] * (norms + 1) + keys.shape[2])


def _per_query_head(x, query):
    """[batch, kv_heads, ...] repeated to [batch, q_heads, ...]: head h takes KV head h // group."""
    return np.repeat(x, query.shape[1] // x.shape[1], axis=1)


def _logit_bound(rng, samples):
    pairs = []
    for _ in range(samples):
        query, keys, _, encoded, _ = _problem(rng)
        exact = np.einsum("bhd,bhtd->bht", query, _per_query_head(keys.astype(np.float64), query))
        limit = np.einsum("bhd,bhtd->bht", np.abs(query), _per_query_head(error_bound(encoded), query))
        pairs.append(_worst(logits(query, encoded, scale=1.0) - exact, limit + _rounding(query, keys)))
    return bound(*np.transpose(pairs))


def _output_bound(rng, samples):
    """With the weights of the stored keys, which both outputs share."""
    pairs = []
    for _ in range(samples):
        query, keys, values, *encoded = _problem(rng)
        p = special.softmax(logits(query, encoded[0]), axis=-1)
        exact = np.einsum("bht,bhtd->bhd", p, _per_query_head(values.astype(np.float64), query))
        limit = np.einsum("bht,bhtd->bhd", p, _per_query_head(error_bound(encoded[1]), query))
        rounding = 8 * _rounding(query, keys) * np.abs(values.astype(np.float64)).max()
        pairs.append(_worst(decode_attention(query, *encoded, return_lse=False) - exact, limit + rounding))
    return bound(*np.transpose(pairs))


def _probability_ratio(rng, samples):
    pairs = []
    for _ in range(samples):
        query, keys, _, *encoded = _problem(rng)
        stored = logits(query, encoded[0])
        exact = query.shape[-1] ** -0.5 * np.einsum("bhd,bhtd->bht", query,
                                                    _per_query_head(keys.astype(np.float64), query))
        probability = stored - decode_attention(query, *encoded)[1][..., None]                 # its logarithm
        ratio = probability - special.log_softmax(exact, axis=-1)
        limit = 2 * np.abs(stored - exact).max(axis=-1, keepdims=True) + 4 * _rounding(query, keys)
        pairs.append(_worst(ratio, np.broadcast_to(limit, ratio.shape)))
    return bound(*np.transpose(pairs))


def _compare(actual, expected, query, keys, values):
    """[(difference, allowance)] of two (output, lse), where equal infinities do not differ."""
    error = _rounding(query, keys)
    pairs = []
    allowances = 8 * error * np.abs(values.astype(np.float64)).max(), 4 * error
    for one, other, allowance in zip(actual, expected, allowances):
        same = one == other
        pairs.append((np.abs(np.where(same, 0.0, one) - np.where(same, 0.0, other)).max(initial=0), allowance))
    return pairs


def _agreement(rng, samples, compare):
    pairs = [pair for _ in range(samples) for pair in compare(rng, *_problem(rng))]
    return identity(*np.transpose(pairs), samples=samples)


def _attention_on_codes(rng, query, keys, values, *encoded):
    lengths = rng.integers(0, keys.shape[2] + 1, len(keys))
    scale = None if rng.random() < 0.5 else 0.2
    decoded = [decode(one) for one in encoded]
    expected = attention.decode(query, *decoded, lengths=lengths, scale=scale)
    every = scale if scale is not None else query.shape[-1] ** -0.5
    products = every * np.einsum("bhd,bhtd->bht", query, _per_query_head(decoded[0], query))
    difference = np.abs(logits(query, encoded[0], scale=scale) - products).max()
    return [*_compare(decode_attention(query, *encoded, lengths=lengths, scale=scale), expected, query, keys, values),
            (difference, _rounding(query, keys))]


def _split_and_merge(rng, query, keys, values, *encoded):
    """Two parts; a key group that the cut divides is read by both."""
    cut = int(rng.integers(0, keys.shape[2] // encoded[0].group + 1)) * encoded[0].group
    lengths = rng.integers(0, keys.shape[2] + 1, len(keys))
    parts = [decode_attention(query, *(_part(one, *part) for one in encoded),
                              lengths=np.clip(lengths - part[0], 0, part[1] - part[0]))
             for part in ((0, cut), (cut, keys.shape[2]))]
    whole = decode_attention(query, *encoded, lengths=lengths)
    return _compare(attention.merge(*map(np.stack, zip(*parts))), whole, query, keys, values)


def _grouped_heads(rng, query, keys, values, *encoded):
    output, lse = decode_attention(query, *encoded)
    pairs = []
    for h in range(query.shape[1]):
        g = h // (query.shape[1] // keys.shape[1])
        one = [type(e)(*(array[:, g : g + 1] for array in e.arrays().values()), e.bits, e.group) for e in encoded]
        pairs += _compare((output[:, h : h + 1], lse[:, h : h + 1]), decode_attention(query[:, h : h + 1], *one),
                          query, keys, values)
    return pairs


def _part(encoded, start, stop):
    """Tokens [start, stop), of keys in whole groups."""
    by = encoded.group if isinstance(encoded, Keys) else 1
    return type(encoded)(encoded.codes[:, :, start:stop], *(x[:, :, start // by : stop // by]
                                                            for x in (encoded.scale, encoded.minimum)),
                         encoded.bits, encoded.group)


def _scheme(rng):
    """(a scheme, head_dim, up to 3 R + 2 tokens)."""
    group = int(rng.choice([32, 64]))
    window = group * int(rng.integers(1, 3))
    scheme = Scheme(int(rng.choice(BITS)), int(rng.choice(BITS)), group, window, int(rng.choice([0, 0, 1, 4, 40])))
    return scheme, 64, int(rng.integers(1, 3 * window + 3))


def _differences(one: State, other: State) -> int:
    """Numbers whose bits differ; shapes must agree."""
    one, other = one.arrays(), other.arrays()
    if any(array.shape != other[name].shape or array.dtype != other[name].dtype for name, array in one.items()):
        return 2**32
    return sum(int(np.sum(array.view(f"u{array.itemsize}") != other[name].view(f"u{array.itemsize}")))
               for name, array in one.items())


def _appended(rng, samples):
    differences = []
    for _ in range(samples):
        scheme, head_dim, tokens = _scheme(rng)
        keys, values = (_vectors(rng, (1, 2, tokens, head_dim)) for _ in range(2))
        cuts = sorted(rng.integers(0, tokens + 1, int(rng.integers(0, 12))))
        state = prefill(keys[:, :, :0], values[:, :, :0], scheme)
        for start, stop in zip([0, *cuts], [*cuts, tokens]):
            state = append(state, keys[:, :, start:stop], values[:, :, start:stop], scheme)
        differences.append(_differences(state, prefill(keys, values, scheme)))
    return identity(differences)


def _steps(rng, samples):
    """Attention over [0, nV) codes, [nV, nK) codes and exact values, [nK, T] exact, each apart, and merged."""
    pairs = []
    for _ in range(samples):
        scheme, head_dim, tokens = _scheme(rng)
        keys, values = (to_float16(rng.standard_normal((1, 2, tokens + 1, head_dim))) for _ in range(2))
        query = rng.standard_normal((1, 4, head_dim))
        state = prefill(keys[:, :, :tokens], values[:, :, :tokens], scheme)
        n_k, n_v = scheme.window * (tokens // scheme.window), max(tokens - scheme.window, 0)
        sinks = min(scheme.sinks, tokens)
        whole = [encode_keys(keys[:, :, :n_k], scheme.key_bits, scheme.group),
                 encode_values(values[:, :, :n_k], scheme.value_bits, scheme.group)]
        between, on = decode(whole[0]), min(sinks, n_v)
        parts = [attention.decode(query, keys[:, :, :sinks], values[:, :, :sinks]),
                 attention.decode(query, between[:, :, max(n_v, sinks) : n_k], values[:, :, max(n_v, sinks) : n_k]),
                 attention.decode(query, keys[:, :, max(n_k, sinks) :], values[:, :, max(n_k, sinks) :])]
        if on == 0:
            parts.append(decode_attention(query, *whole, lengths=[n_v]))
        else:
            decoded = between[:, :, on:n_v], decode(whole[1])[:, :, on:n_v]
            parts.append(attention.decode(query, *decoded))
        expected = attention.merge(*map(np.stack, zip(*parts)))
        actual = attend(query, state, keys[:, :, tokens:], values[:, :, tokens:])
        pairs += _compare(actual, expected, query, keys, values)
    return identity(*np.transpose(pairs), samples=samples)


def _bytes(rng, samples):
    differences = []
    for _ in range(samples):
        scheme, head_dim, tokens = _scheme(rng)
        x = np.zeros((1, 2, tokens, head_dim), np.float16)
        state = prefill(x, x, scheme)
        differences.append(state.nbytes - scheme.nbytes(tokens, 2, head_dim))
        for encoded in (state.keys, state.values):
            differences.append(8 * encoded.nbytes - encoded.bits_per_element * encoded.tokens * 2 * head_dim)
    return identity(differences)


def _codes(rng):
    bits = int(rng.choice(BITS))
    return bits, rng.integers(0, 2**bits, (2, int(rng.integers(0, 4)), 32 * int(rng.integers(1, 9))))


def _round_trip(rng, samples):
    differences = []
    for _ in range(samples):
        bits, codes = _codes(rng)
        words = pack(codes, bits)
        differences += [np.sum(unpack(words, bits) != codes), words.nbytes - codes.size * bits // 8]
    return identity(differences)


def _order(rng, samples):
    """Every bit of every channel alone, against the rule in the head of this module."""
    differences = []
    for bits in BITS:
        for head_dim in (32, 64, 96, 128, 256):
            for u in range(head_dim // 32):
                for g in range(8):
                    for v in range(2):
                        for h in range(2):
                            n = 2 * (u + g * head_dim // 32) + v
                            word, low = divmod(n, 16 // bits)
                            alone = np.arange(head_dim) == 32 * u + 4 * g + 2 * v + h
                            for bit in {0, bits - 1}:
                                expected = np.zeros(head_dim * bits // 32, np.uint32)
                                expected[word] = 1 << (16 * h + bits * low + bit)
                                differences.append(np.sum(pack(alone.astype(int) << bit, bits) != expected))
    return identity(differences)


def _operands(rng, samples):
    """Masks and permutations of the head of this module on words of 32 bits, as lane (g, t) sees them."""
    differences = []
    for case in range(samples):
        bits, head_dim = BITS[case % 3], (64, 128, 256)[case // 3 % 3]
        fields, mask = 16 // bits, 2**bits - 1
        first, second = rng.integers(0, 2**bits, (2, head_dim))               # of two tokens
        words = [pack(codes, bits) for codes in (first, second)]
        merged = np.stack([words[0] & np.uint32(0xFFFF) | words[1] << np.uint32(16),          # byte permutations
                           words[0] >> np.uint32(16) | words[1] & np.uint32(0xFFFF0000)])
        for g in range(8):
            for u in range(head_dim // 32):
                for v in range(2):
                    word, field = divmod(2 * (u + g * head_dim // 32) + v, fields)
                    shift = 0 if bits * (field + 1) <= 10 else 8              # what does not end by bit 10
                    place, d = bits * field - shift, 32 * u + 4 * g + 2 * v
                    masks = np.uint32(mask * 0x00010001 << place)
                    registers = np.array([x[word] >> np.uint32(shift) & masks for x in (words[0], *merged)])
                    pairs = registers.view(np.float16).astype(np.float64).reshape(3, 2) * 2.0 ** (24 - place)
                    expected = [first[d : d + 2],                                            # two channels of a key
                                (first[d], second[d]), (first[d + 1], second[d + 1])]        # two tokens of a value
                    differences.append(np.sum(pairs != expected))
        for i in range(8 // bits):                                            # four u8 of every word
            four = (words[0] >> np.uint32(bits * i) & np.uint32(mask * 0x01010101)).view(np.uint8).reshape(-1, 4)
            n = np.arange(head_dim // 2).reshape(-1, fields)[:, [i, i + fields // 2]]           # fields in bytes 0, 1
            g, u, v = n // (head_dim // 16), n // 2 % (head_dim // 32), n % 2
            d = (32 * u + 4 * g + 2 * v)[:, None] + np.array([[[0], [1]]])                     # [word, half, byte]
            differences.append(np.sum(four.reshape(-1, 2, 2) != first[d]))
        g, t = case % 8, case % 4                                             # the segments of a lane
        segment = np.arange(head_dim) // 4 % 8
        for chosen, at, share in ((segment == g, g, 8), (segment // 2 == t, t, 4)):
            low = np.where(chosen, mask, 0)
            row = np.unpackbits(pack(low, bits).view(np.uint8), bitorder="little").reshape(-1, 2, 16)
            row = np.moveaxis(row, 1, 0).reshape(2, -1)                       # the lower halves, the upper halves
            expected = np.zeros_like(row)
            size = row.shape[1] // share
            expected[:, at * size : (at + 1) * size] = 1
            differences.append(np.sum(row != expected))
    return identity(differences, samples=samples)


def _interchange(rng, samples):
    differences = []
    for _ in range(samples):
        _, encoded = _encoded(rng)
        codes = unpack(encoded.codes, encoded.bits)
        words, scale, minimum = to_interchange(encoded)
        kind, bits = type(encoded), encoded.bits
        along = codes if kind is Values else np.swapaxes(codes, 2, 3)
        j = np.arange(along.shape[3])
        word, shift = words.view(np.uint32)[..., j * bits // 32], (j * bits % 32).astype(np.uint32)
        fields = word >> shift & np.uint32(2**bits - 1)
        again = from_interchange(kind, words, scale, minimum, bits, encoded.group)
        differences += [np.sum(fields != along), np.sum(again.codes != encoded.codes),
                        np.sum(again.scale != encoded.scale), np.sum(again.minimum != encoded.minimum)]
    return identity(differences)


def _group_by_group(rng, samples):
    """Keys in groups of tokens, values token by token, heads one by one: what a group is does not change its codes."""
    differences = []
    for _ in range(samples):
        bits, group, head_dim = _parameters(rng)
        x = _vectors(rng, (1, 2, 2 * group, head_dim))
        for encode, step in ((encode_keys, group), (encode_values, 1)):
            whole = encode(x, bits, group).arrays()
            start = step * int(rng.integers(2 * group // step))
            h, by = int(rng.integers(2)), group if encode is encode_keys else 1
            one = encode(x[:, h : h + 1, start : start + step], bits, group).arrays()
            for name, array in one.items():
                first = start if name == "codes" else start // by
                differences.append(np.sum(whole[name][:, h : h + 1, first : first + array.shape[2]] != array))
    return identity(differences)


_SPECIFIED = "KIVI arXiv 2402.02750, section 3.1"

CLAIMS = (
    Claim("error",
          "|x - x_hat| <= max(s / 2, qmax 2^-25 if s < 2^-14) + 2^-22 qmax s, and in float32 <= s / 2 + 2^-22 (|m| + "
          "qmax s) + qmax 2^-25 if s < 2^-14, for 2, 4 and 8 bits, whatever float16 x holds",
          "derived in reference/kivi.py", "bound", _error, samples=300),
    Claim("error of compat", "|x - x_hat| <= s (1/2 + qmax 2^-10) + qmax 2^-25 if s < 2^-14, where s is finite",
          "derived: two float16 roundings of a quotient of at most qmax", "bound", _compat_error, samples=300),
    Claim("float16 decoding", "s c + m in float16 arithmetic is within qmax s 2^-11 + |x_hat| 2^-11 of x_hat",
          "derived: two roundings", "bound", _float16_decoding, samples=200),
    Claim("distortion",
          "E (x - x_hat)^2 / E x^2 of independent normal numbers is that of `normal_distortion`, groups of 32, 64, "
          "128: 0.1544, 0.2024, 0.2504 for 2 bits, 0.00612, 0.00803, 0.00995 for 4",
          "derived in reference/kivi.py", "expectation", _distortion, samples=20000),
    Claim("requantising",
          "x_hat in float32 has the codes of x for the same s and m; x_hat is the least number of its group exactly, "
          "and the largest up to qmax s / 2048 (s normal)", _SPECIFIED, "identity", _requantised, samples=200),
    Claim("group by group", "a group has the same codes, s and m alone and among others", "definition", "identity",
          _group_by_group, samples=60),
    Claim("logit bound", "|<q, k - k_hat>| <= 1/2 sum_d |q_d| s_d, plus the rounding of `error_bound`",
          "derived: triangle inequality", "bound", _logit_bound, samples=100),
    Claim("output bound",
          "|o_c - o_hat_c| <= 1/2 sum_t p_t s_tg for the same weights, plus the rounding of `error_bound`",
          "derived: triangle inequality", "bound", _output_bound, samples=100),
    Claim("probability ratio", "if all scaled logits move by at most e, exp(-2 e) <= p_hat_t / p_t <= exp(2 e)",
          "textbook: both the numerator and the sum move by a factor of at most exp(e)", "bound", _probability_ratio,
          samples=100),
    Claim("attention on codes",
          "logits and decode_attention, with s and m folded into query and weights, give what decoded keys and values "
          "give", "definition", "identity", partial(_agreement, compare=_attention_on_codes), samples=100),
    Claim("split and merge", "parts of the tokens merge to output and lse of the whole",
          "Milakov and Gimelshein arXiv 1805.02867, section 3.1", "identity",
          partial(_agreement, compare=_split_and_merge), samples=100),
    Claim("grouped heads", "query head h gives what it gives alone on KV head h // (q_heads / kv_heads)", "definition",
          "identity", partial(_agreement, compare=_grouped_heads), samples=60),
    Claim("append", "state(T) has the same bits however T tokens were cut into prompt, chunks and single tokens",
          "KIVI arXiv 2402.02750, Algorithm 1", "identity", _appended, samples=100),
    Claim("steps",
          "a step attends to nK(T) coded and the other exact keys, nV(T) coded and the other exact values, and itself",
          "KIVI arXiv 2402.02750, Algorithm 1", "identity", _steps, samples=100),
    Claim("bytes", "b + 32 / G bits per coded number and 16 per exact one, and nothing else", "definition", "identity",
          _bytes, samples=60),
    Claim("round trip", "unpack(pack(codes)) = codes in head_dim b / 8 bytes", "definition", "identity", _round_trip,
          samples=200),
    Claim("order of the bits", "each bit of each channel lies where the rule puts it, and nowhere else", "definition",
          "identity", _order, samples=1),
    Claim("operands",
          "masks give pairs of float16 c 2^(b f - 24), and four u8; two byte permutations pair the values of two "
          "tokens; what a lane reads is contiguous", "derived in reference/kivi.py", "identity", _operands, samples=36),
    Claim("interchange", "the layout of the authors' repository holds the same codes, and nothing is lost",
          "definition", "identity", _interchange, samples=100),
)
