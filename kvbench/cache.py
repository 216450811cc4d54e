"""KVCache: a codec for keys, one for values, an index with its selector if wanted, and tokens that are kept exact."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np

from kvbench import arrays, codecs, storage, trees
from kvbench.driver import Loan, driver
from kvbench.errors import CapacityError
from kvbench.ops import attention

_FORMAT, _VERSION = "kvbench.cache", 1
_SIDES = ("keys", "values")


def _require_integer(where: str, name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where}: {name}: expected an integer of at least {least}, got {value!r}")


def _require(condition: bool, name: str, expected, given) -> None:
    if not condition:
        raise ValueError(f"KVCache: {name}: expected {expected}, got {given!r}")


@dataclass(frozen=True)
class Tail:
    """When the newest tokens, kept exact, are encoded: in blocks of `block`, and never the newest `recent`.

    Of T tokens (sinks not counted) the store holds n(T) = block * floor(max(0, T - recent) / block) and the tail the
    other recent ... recent + block - 1.

    | cache                                          | Tail                     |
    |------------------------------------------------|--------------------------|
    | every token encoded at once                    | Tail()                   |
    | TurboQuant with an exact window of R           | Tail(recent=R)           |
    | RaBitQCache (128 exact, blocks of 128)         | Tail(128, block=128)     |
    | KIVI's keys (append, attend, then flush R)     | Tail(1, block=R)         |
    | KIVI's keys and values, at least R exact       | Tail(R, block=group)     |

    **Slots.**  Whole blocks of the recent tokens live in a ring, everything younger in order behind it:

        slot(p) = p mod ring  if p - n < ring  else  p - n,         ring = recent rounded down to blocks

    so the tail fills slots 0 ... length - 1 without holes (attention does not mind their order), its layout depends on
    T alone, and a flush moves one block instead of the whole tail.
    """

    recent: int = 0
    block: int = 1

    def __post_init__(self):
        _require_integer("Tail", "recent", self.recent, 0)
        _require_integer("Tail", "block", self.block, 1)

    @property
    def ring(self) -> int:
        return self.recent - self.recent % self.block

    @property
    def slots(self) -> int:
        """Slots for the longest tail, and for the block that is completed before it leaves."""
        return max(self.recent + self.block - 1, self.block if self.block > 1 else 0)

    def encoded(self, tokens):
        """n(T): how many of `tokens` tokens (an int or an array) are in the store."""
        return np.maximum(tokens - self.recent, 0) // self.block * self.block

    def runs(self, first: int, last: int, encoded: int) -> Iterator[tuple[int, int, int]]:
        """(position, slot, count): the runs of consecutive slots in which tokens [first, last) lie."""
        while first < last:
            if first - encoded < self.ring:
                slot = first % self.ring
                count = min(last - first, self.ring - slot, self.ring - (first - encoded))
            else:
                slot, count = first - encoded, last - first
            yield first, slot, count
            first += count


class KVCache:
    """Keys and values of one attention layer, compressed, with room for `capacity` tokens of every sequence.

    The tokens of a sequence, in the order of their arrival:

        | exact sinks | store: encoded by `keys` and `values`        | exact tail                |
        0           sinks                                  sinks + n(T)                         T

    `tail` says when tokens move from the tail to the store (see `Tail`).  Sinks and tail share one exact buffer.  With
    a selector, one operator attends to it and to the selected tokens (`codecs.Fused.joint`); otherwise each of the two
    parts is attended by the operator of its pair of codecs, the exact one second, which merges the results exactly by
    log-sum-exp.  Without sinks and tail the store holds everything and nothing is merged.  What the cache holds is a
    pure function of the tokens: appending one by one gives the same bytes as one prompt (codecs with statistics freeze
    them at the first append).  Everything is preallocated; `append` and `attend` allocate nothing that grows.

    batch, kv_heads, q_heads, head_dim, capacity : sizes; q_heads is 1 to 16 times kv_heads
    keys, values : codecs; a pair without an operator is refused
    index, selector : rank the tokens of the store and choose those to attend to (default: all).  An index is a
        `codecs.Store` of keys with `allocate_scores` and `attend`, see `indexes.Index`, which makes the latter of a
        method `score`; it is given the packed stores, for an index that reads the codec's own planes.  A selector is a
        `selectors.Selector`.  Sinks and recent tokens are the cache's own, here and in `tail`: they lie outside the
        store, are attended in any case, and the selector, which sees the slots of the store alone, must have none
    sinks : the first tokens, kept exact forever and always attended
    dtype : of the tokens that are appended, of those kept exact, and of queries and outputs
    encode_stream : None, or the CUDA stream on which tokens are encoded while the caller's stream goes on; see there
    last_selection : what the selector chose in the last step, positions counted in the store: slot i is token
        sinks + i.  The next step writes into the same arrays.  None before the first one
    device : "cpu", "cuda", "cuda:1"        backend : of the operators (default: that of the device)
    """

    def __init__(self, batch: int, kv_heads: int, q_heads: int, head_dim: int, capacity: int, *, keys: codecs.Codec,
                 values: codecs.Codec, index=None, selector=None, sinks: int = 0, tail: Tail = Tail(),
                 dtype: str = "float16", device="cpu", backend: str | None = None):
        sizes = dict(batch=batch, kv_heads=kv_heads, q_heads=q_heads, head_dim=head_dim, capacity=capacity)
        for name, value in sizes.items():
            _require_integer("KVCache", name, value, 1)
        _require_integer("KVCache", "sinks", sinks, 0)
        _require(q_heads % kv_heads == 0 and q_heads // kv_heads <= 16, "q_heads",
                 f"1 to 16 times the {kv_heads} KV heads", q_heads)
        _require(isinstance(tail, Tail), "tail", "a Tail", tail)
        _require((index is None) == (selector is None), "selector", "an index and a selector, or neither",
                 f"index={index}, selector={selector}")
        for name in ("sinks", "recent"):
            own = getattr(selector, name, 0)
            _require(own == 0, "selector", f"one with {name}=0: the cache's own sinks and tail stay exact", selector)
        for name, codec in (("keys", keys), ("values", values)):
            _require(isinstance(codec, codecs.Codec), name, "a codec", codec)
            _require(codec.head_dim == head_dim, name, f"a codec for head_dim {head_dim}", codec)
            _require(dtype in codec.inputs, "dtype", f"one that {name}={codec} takes: {', '.join(codec.inputs)}", dtype)
        for name, store in (("keys", keys), ("values", values), ("index", index)):
            _require(store is None or isinstance(store, codecs.Store), name, "a codecs.Store", store)
            granule = 1 if store is None else store.granule
            _require(tail.block % granule == 0, "tail", f"blocks of whole granules of {granule} tokens ({name})", tail)

        self.batch, self.kv_heads, self.q_heads, self.head_dim, self.capacity = sizes.values()
        self.keys, self.values, self.index, self.selector = keys, values, index, selector
        self.sinks, self.tail, self.dtype = sinks, tail, dtype
        self.device, self.backend = arrays.Device.parse(device), backend
        self.last_selection = None

        operators = codecs.fused(keys, values, sparse=index is not None)     # refuses a pair without an operator
        exact = codecs.Float16(head_dim, dtype)
        exact_slots = min(capacity, sinks + tail.slots)
        store_slots = int(tail.encoded(max(capacity - sinks, 0)))
        self._parts = [part for part, slots in (("exact", exact_slots), ("store", store_slots)) if slots]
        self._joint = index is not None and operators.joint is not None and len(self._parts) == 2
        self._owned: dict[str, tuple[codecs.Store, codecs.Packed]] = {}      # what holds tokens, by name
        if self._joint and keys == values == exact:                          # one array: all rows have one base
            for side in _SIDES:
                whole = exact.allocate(batch, kv_heads, exact_slots + store_slots, self.device).tokens
                for part, start, slots in (("exact", 0, exact_slots), ("store", exact_slots, store_slots)):
                    self._owned[f"{part}.{side}"] = exact, codecs.Float16Tokens(whole.narrow(2, start, start + slots))
        for name, codec, slots in (("exact.keys", exact, exact_slots), ("exact.values", exact, exact_slots),
                                   ("store.keys", keys, store_slots), ("store.values", values, store_slots),
                                   ("store.index", index, store_slots)):
            if codec is not None and name not in self._owned:   # without slots too: statistics of a prompt need a place
                self._owned[name] = codec, codec.allocate(batch, kv_heads, slots, self.device)

        self._lengths, self._prepared = np.zeros(batch, np.int64), False
        # Tokens of each sequence that are in the store, or on their way; whether the caller's stream has not yet waited
        # for all of them, and for some that count as stored.
        self._ahead, self._room = np.zeros(batch, np.int64), store_slots
        self._encode_stream, self._encoding, self._queued, self._awaited = None, None, False, False
        self._owned_scratch = {"counts": arrays.zeros((2, batch), "int32", self.device)}     # tokens: exact part, store
        if len(self._parts) > 1 and not self._joint:
            self._owned_scratch["output"] = arrays.empty((batch, q_heads, head_dim), "float32", self.device)
            self._owned_scratch["lse"] = arrays.empty((batch, q_heads), "float32", self.device)
        if index is not None and store_slots:
            ranked = kv_heads if index.per_kv_head else q_heads
            self._owned_scratch["scores"] = index.allocate_scores(batch, ranked, store_slots, self.device)
            self._owned_scratch["selection"] = selector.allocate(batch, ranked, kv_heads, store_slots, self.device)
        self._owned_workspace = attention.workspace(batch, q_heads, head_dim, self.device)
        self._stores, self._scratch, self._workspace = self._owned, self._owned_scratch, self._owned_workspace
        self._stream = self._scratch["counts"].stream

    def _follow(self, stream: int) -> None:
        """Queue further work on `stream`, behind all that this cache has queued on the stream used before."""
        if self.device.kind == "cpu" or stream == self._stream:
            return

        def move(path: str, array: arrays.Array) -> arrays.Array:
            return arrays.borrow(array, "KVCache", stream=stream)

        move("", self._scratch["counts"])                   # waits for the stream that was used last
        # Views of the owned arrays, not of the last views: switching to and fro must not build a chain of loans.
        self._stores = {name: (codec, trees.apply(move, packed)) for name, (codec, packed) in self._owned.items()}
        self._scratch = trees.apply(move, self._owned_scratch)
        self._workspace = trees.apply(move, self._owned_workspace)
        self._stream = stream

    # ------------------------------------------------------------------------------------------- asynchronous encoding

    @property
    def encode_stream(self):
        """The stream on which tokens are encoded, a handle (int); None (default): that of the caller.

        Set it to an object with `__cuda_stream__`, which the cache then keeps, or to the handle of a stream that
        outlives the cache; one that does not synchronise with the legacy default stream. Caches of many layers may
        share one.  The caller's stream should have the higher priority: else blocks of its kernels wait for those that
        encode.  Then `append` only queues the encoding, behind an event on the caller's stream, and the caller's
        stream waits for it, on the device, where its result is first needed:

        - A block is encoded as soon as all of its tokens have arrived, and counts as stored when `tail` says so,
          `recent` tokens later: until then its tokens are attended in the tail.  The append that moves it to the store
          waits, by then for nothing.
        - What an append puts into the store at once, most of a prompt, is waited for by the next append or attend.

        So contents and results are at any time those of a cache without the stream, bit for bit.  The host never waits
        (`prepare` does, and with statistics the first append of a sequence).  The memory of k and v is kept until the
        encoder is done, but must not be overwritten before the next append or attend.  A captured `attend` does not
        wait for a prompt: append a token, or attend once, before it is replayed.  In host memory nothing is queued, and
        the order of encoding is the same.
        """
        return self._encode_stream

    @encode_stream.setter
    def encode_stream(self, stream) -> None:
        self._join()
        handle = None if stream is None else arrays.Arguments("KVCache: encode_stream", stream=stream).stream
        self._encode_stream = handle

        def lent(_, array):
            view = arrays.borrow(array, "KVCache", stream=handle).narrow(0, 0, array.shape[0])
            view.owner = (stream, view.owner)   # let go of from the last on: the stream outlives what it has borrowed
            return view

        # Made once: every borrowing of an array orders the streams, and one order is enough for an append.
        self._encoding = None if handle is None else {
            name: (codec, trees.apply(lent, packed))
            for name, (codec, packed) in self._owned.items() if name.startswith("store.")}

    def _join(self) -> None:
        """Make the stream in use wait for all that is queued on the stream of the encoder."""
        if self._queued and self.device.kind == "cuda":
            driver().order(self.device.index, self._stream, self._encode_stream)
        self._queued = self._awaited = False

    # ------------------------------------------------------------------------------------------------------- contents

    def __len__(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._lengths.max())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence: [batch] int64, a copy."""
        return self._lengths.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that hold tokens, at full capacity.  (`attend` has scratch besides, of fixed size.)"""
        return sum(packed.nbytes for _, packed in self._owned.values())

    @property
    def nbytes_used(self) -> int:
        """Bytes of these arrays that the present tokens occupy."""
        return sum(view.nbytes for view in self.contents().values())

    @property
    def bits_per_element(self) -> float:
        """Bits that an appended number really takes, 8 nbytes_used / (numbers in keys and values); nan when empty."""
        elements = 2 * int(self._lengths.sum()) * self.kv_heads * self.head_dim
        return 8 * self.nbytes_used / elements if elements else float("nan")

    def __repr__(self) -> str:
        return (f"KVCache(batch={self.batch}, kv_heads={self.kv_heads}, q_heads={self.q_heads}, "
                f"head_dim={self.head_dim}, capacity={self.capacity}, keys={self.keys}, values={self.values}, "
                f"tokens={self._lengths.tolist()})")

    def clear(self) -> None:
        """Forget all tokens; the memory is kept, and so are statistics by `prepare`."""
        self._join()
        self._set_lengths(np.zeros(self.batch, np.int64))
        self._ahead = np.zeros(self.batch, np.int64)
        self.last_selection = None

    # --------------------------------------------------------------------------------------------------------- append

    def append(self, k, v, q=None, lengths=None) -> None:
        """Add tokens to the end of every sequence: a prompt, a part of one, or a single token.

        k, v    : [batch, kv_heads, tokens, head_dim], the cache's dtype and device; keys after RoPE
        q       : [batch, q_heads, queries, head_dim], the queries of the last `queries` of these tokens (up to all of
                  them), for methods that look at the prompt's queries
        lengths : [batch] int, how many of these tokens belong to each sequence (default: all); the others are padding

        What is frozen of a prompt (means, scales of channels, codebooks, bits) is that of the first append of a
        sequence: where a prompt comes in chunks, of its first chunk.  `prepare` freezes that of other tokens.

        CapacityError if any sequence would outgrow the capacity; like every error, before anything is written.
        """
        arguments = arrays.Arguments("KVCache.append")
        new, queries = self._take_tokens(arguments, k, v, q)
        tokens = arguments.sizes["tokens"]
        added = self._added(arguments, lengths, tokens)
        grown = self._lengths + added
        if grown.max() > self.capacity:
            sequence = int(grown.argmax())
            room = self.capacity - self._lengths[sequence]
            raise CapacityError(f"KVCache.append: k: expected at most {room} more tokens for sequence {sequence} "
                                f"(capacity {self.capacity}), got {added[sequence]}; nothing was written: "
                                "make the cache with a larger capacity")

        self._follow(arguments.stream)
        if self._awaited:
            self._join()
        options = dict(stream=arguments.stream, backend=self.backend)
        for sequences in _equal_runs(self._lengths, added, self._ahead):
            old, count = int(self._lengths[sequences.start]), int(added[sequences.start])
            if count:
                chunk = {name: _part(x, sequences, 0, count) for name, x in new.items()}
                if old == 0 and not self._prepared:
                    # Query i belongs to token tokens - queries + i: those of padding are left out.
                    known = 0 if queries is None else max(count - (tokens - queries.shape[2]), 0)
                    asked = _part(queries, sequences, 0, known) if known else None
                    for encoder, packed, side in self._encoders(self._stores):
                        encoder.prepare(packed, sequences, chunk[side], asked, **options)
                self._extend(sequences, old, count, chunk, options)
        self._set_lengths(grown)
        Loan.collect()                                          # a prompt that an encoder is done with

    def prepare(self, k, v, q=None) -> None:
        """Freeze the statistics of every sequence by these tokens, which are not stored: not by its first append.

        k, v, q : as for `append`: a whole prompt that will be appended in chunks, or a sample of a layer's tokens

        Statistics are made on the host: this waits for the device, and later appends do not.  ValueError if the cache
        holds tokens.
        """
        arguments = arrays.Arguments("KVCache.prepare")
        new, queries = self._take_tokens(arguments, k, v, q)
        arguments.require(not self._lengths.any(), "k", "an empty cache", f"one with {self._lengths.tolist()} tokens")
        self._follow(arguments.stream)
        for encoder, packed, side in self._encoders(self._stores):
            encoder.prepare(packed, slice(0, self.batch), new[side], queries, stream=arguments.stream,
                            backend=self.backend)
        self._prepared = True

    def _take_tokens(self, arguments: arrays.Arguments, k, v, q) -> tuple[dict[str, arrays.Array], arrays.Array | None]:
        shape = f"{self.batch} {self.kv_heads} tokens {self.head_dim}"
        new = {"keys": arguments.take("k", k, shape, (self.dtype,), strided=True),
               "values": arguments.take("v", v, shape, (self.dtype,), strided=True)}
        tokens, queries = arguments.sizes["tokens"], None
        if q is not None:
            shape = f"{self.batch} {self.q_heads} queries {self.head_dim}"
            queries = arguments.take("q", q, shape, (self.dtype,), strided=True)
            arguments.require(1 <= queries.shape[2] <= tokens, "q", f"1 to {tokens} queries for {tokens} tokens",
                              queries.shape[2])
        self._require_device(arguments, "k")
        arguments.require(tokens > 0, "k", "at least one token", tokens)
        return new, queries

    def _added(self, arguments: arrays.Arguments, lengths, tokens: int) -> np.ndarray:
        if lengths is None:
            return np.full(self.batch, tokens, np.int64)
        if hasattr(lengths, "__dlpack__") or hasattr(lengths, "__cuda_array_interface__"):
            lengths = arrays.borrow(lengths, "lengths").to_host()
        lengths = np.asarray(lengths)
        arguments.require(lengths.shape == (self.batch,) and lengths.dtype.kind in "iu", "lengths",
                          f"{self.batch} integers, one for each sequence", f"{lengths.dtype} {lengths.shape}")
        arguments.require(lengths.min() >= 0 and lengths.max() <= tokens, "lengths",
                          f"values between 0 and the {tokens} tokens given", lengths.tolist())
        return lengths.astype(np.int64)

    def _extend(self, sequences: slice, old: int, count: int, new: dict[str, arrays.Array], options: dict) -> None:
        """Append `count` tokens to sequences that all hold `old`."""
        sinks = min(max(self.sinks - old, 0), count)
        if sinks:
            self._write_exact(sequences, old, new, 0, sinks, options)
        if sinks == count:
            return
        # From here positions count from the end of the sinks: the sequences grow from `first` to `last` tokens, and
        # what the store holds from `encoded` to `goal`.  New token number i has position i + shift.
        shift = old - self.sinks
        first, last = shift + sinks, shift + count
        encoded, goal, ahead = (int(n) for n in (*self.tail.encoded(np.array([first, last])),
                                                 self._ahead[sequences.start]))
        block = self.tail.block
        while encoded < goal:
            if first - encoded >= block:                        # whole blocks lie in the tail: they leave it
                stop = min(first - (first - encoded) % block, goal)
                self._encode_tail(sequences, max(ahead, encoded), stop, encoded, options)
                self._join()                                    # slots that the encoder reads are filled again now
                self._close_gap(sequences, encoded, stop, first, options["stream"])
                encoded = stop
            elif first > encoded:                               # a block began in the tail: the new tokens complete it
                self._write_tail(sequences, new, shift, first, encoded + block, encoded, options)
                first = encoded + block
            else:                                               # the other blocks never enter the tail
                self._write_store(sequences, encoded, {name: x.narrow(2, first - shift, goal - shift)
                                                       for name, x in new.items()}, options)
                self._awaited = self._queued
                first = encoded = goal
        self._write_tail(sequences, new, shift, first, last, encoded, options)
        ahead = max(ahead, encoded)
        if self._encode_stream is not None:                     # whole blocks of the tail, before they leave it
            complete = min(last // block * block, self._room)
            self._encode_tail(sequences, ahead, complete, encoded, options)
            ahead = max(ahead, complete)
        self._ahead[sequences] = ahead

    def _encode_tail(self, sequences: slice, first: int, last: int, encoded: int, options: dict) -> None:
        """Write tokens [first, last), whole blocks of a tail that begins at `encoded`, into the store."""
        for position, slot, n in self.tail.runs(first, last, encoded):
            self._write_store(sequences, position, self._exact_views(sequences, self.sinks + slot, n), options)

    def _close_gap(self, sequences: slice, encoded: int, stop: int, last: int, stream: int) -> None:
        """Tokens [encoded, stop) have left the tail, which ends at `last`: move those behind the ring to new slots.

        They go to slots of tokens that left, or forward by more than their own number: no move overwrites what it, or
        a later one, reads.
        """
        for position, slot, n in self.tail.runs(max(encoded + self.tail.ring, stop), last, stop):
            for b, h, name in product(range(sequences.start, sequences.stop), range(self.kv_heads), _SIDES):
                head = self._stores[f"exact.{name}"][1].tokens.narrow(0, b, b + 1).narrow(1, h, h + 1)
                source = self.sinks + position - encoded
                target = self.sinks + slot
                head.narrow(2, target, target + n).copy_from(head.narrow(2, source, source + n), stream)

    def _write_tail(self, sequences: slice, new: dict[str, arrays.Array], shift: int, first: int, last: int,
                    encoded: int, options: dict) -> None:
        for position, slot, n in self.tail.runs(first, last, encoded):
            self._write_exact(sequences, self.sinks + slot, new, position - shift, n, options)

    def _write_exact(self, sequences: slice, slot: int, x: dict[str, arrays.Array], start: int, count: int,
                     options: dict) -> None:
        for name in _SIDES:
            codec, packed = self._stores[f"exact.{name}"]
            codec.write(packed, sequences, slot, x[name].narrow(2, start, start + count), **options)

    def _write_store(self, sequences: slice, position: int, x: dict[str, arrays.Array], options: dict) -> None:
        stores = self._stores
        if self._encode_stream is not None:
            # Borrowing makes this stream wait for the caller's, and keeps the memory until the encoder is done.
            options, stores, self._queued = {**options, "stream": self._encode_stream}, self._encoding, True
            x = {side: arrays.borrow(array, "KVCache", stream=self._encode_stream) for side, array in x.items()}
        for encoder, packed, side in self._encoders(stores):
            encoder.write(packed, sequences, position, x[side], **options)

    def _encoders(self, stores) -> list[tuple[codecs.Store, codecs.Packed, str]]:
        """The codecs and the index, what they write into, and which of the new tokens they encode."""
        return [(*stores[f"store.{name}"], side)
                for name, side in (("keys", "keys"), ("values", "values"), ("index", "keys"))
                if f"store.{name}" in stores]

    def _exact_views(self, sequences: slice, slot: int, count: int) -> dict[str, arrays.Array]:
        return {name: _part(self._stores[f"exact.{name}"][1].tokens, sequences, slot, slot + count)
                for name in _SIDES}

    def _split(self, lengths: np.ndarray) -> np.ndarray:
        """[2, batch]: tokens in the exact part and in the store."""
        encoded = self.tail.encoded(np.maximum(lengths - self.sinks, 0))
        return np.stack([lengths - encoded, encoded])

    def _set_lengths(self, lengths: np.ndarray) -> None:
        # Filled on the device: a copy from the host would have to wait until it is done.
        for sequences in _equal_runs(lengths):
            for row, count in enumerate(self._split(lengths[sequences.start])):
                self._scratch["counts"].narrow(0, row, row + 1).narrow(1, sequences.start, sequences.stop).fill(count)
        self._lengths = lengths

    # --------------------------------------------------------------------------------------------------------- attend

    def attend(self, q, scale: float | None = None, out=None, return_lse: bool = False, lse=None):
        """softmax(scale q K^T) V of one decode step over all tokens (with a selector: the exact and the selected ones).

        q     : [batch, q_heads, head_dim], the cache's dtype and device
        scale : factor of the logits (default head_dim ** -0.5)
        out   : where to write, [batch, q_heads, head_dim] in q's dtype or float32 (default: a new array in q's dtype)
        lse   : where to write the log-sum-exp, [batch, q_heads] float32 (default: a new array, if it is wanted)

        With `out`, and `lse` if it is wanted, a step allocates nothing.

        Returns the output in q's framework or, with return_lse, (output, lse [batch, q_heads] float32).  An empty
        sequence gives output 0 and lse -inf.
        """
        arguments = arrays.Arguments("KVCache.attend")
        query = arguments.take("q", q, f"{self.batch} {self.q_heads} {self.head_dim}", (self.dtype,))
        self._require_device(arguments, "q")
        scale = attention.check_scale(arguments, scale, self.head_dim)
        result = arguments.result("out", out, query.shape, (query.dtype, "float32"))
        wants_lse = return_lse or lse is not None
        lse = arguments.result("lse", lse, query.shape[:2], "float32") if wants_lse else None

        self._follow(arguments.stream)
        if self._awaited:
            self._join()
        options = dict(stream=arguments.stream, backend=self.backend)
        exact_lengths, store_lengths = (_row(self._scratch["counts"], i) for i in range(2))
        exact = codecs.Exact(*(self._stores[f"exact.{side}"][1] for side in _SIDES), exact_lengths,
                             getattr(self.index, "ordered", False))
        earlier = None
        if "store" in self._parts:
            if len(self._parts) > 1 and not self._joint:
                earlier = self._scratch["output"], self._scratch["lse"]
            self._attend_store(query, scale, *(earlier or (result, lse)), store_lengths,
                               exact if self._joint else None, options)
        if not self._joint and "exact" in self._parts:
            attention.decode(query, exact.keys.tokens, exact.values.tokens, lengths=exact_lengths, scale=scale,
                             earlier=earlier, out=result, lse=lse, workspace=self._workspace, **options)
        return (result.give(), lse.give()) if return_lse else result.give()

    def _attend_store(self, query: arrays.Array, scale: float, out: arrays.Array, lse: arrays.Array | None,
                      lengths: arrays.Array, exact: codecs.Exact | None, options: dict) -> None:
        """Attention to the store, and to `exact` tokens if there are any, in the last launch."""
        (key_codec, keys), (value_codec, values) = self._stores["store.keys"], self._stores["store.values"]
        sides = key_codec, keys, value_codec, values
        if self.index is None:
            codecs.attend(query, *sides, lengths=lengths, scale=scale, out=out, lse=lse, workspace=self._workspace,
                          **options)
            return
        chosen, scratch = self._scratch["selection"]
        self.last_selection = self.index.attend(
            self.selector, query, self._stores["store.index"][1], sides, exact=exact, kv_heads=self.kv_heads,
            lengths=lengths, scale=scale, scores=self._scratch["scores"], selection=chosen, select_workspace=scratch,
            out=out, lse=lse, workspace=self._workspace, **options)

    def _require_device(self, arguments: arrays.Arguments, name: str) -> None:
        arguments.require(arguments.device == self.device, name, f"an array on the cache's device {self.device}",
                          f"one on {arguments.device}")

    def stored(self, sequence: int = 0, dtype: str = "float16") -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of one sequence as attention sees them: [kv_heads, tokens, head_dim] each, on the host.

        In the order of their arrival.  A diagnostic: what is encoded is decoded by its codec, to `dtype`.
        """
        self._join()
        length = int(self._lengths[sequence])
        exact, encoded = (int(n) for n in self._split(self._lengths)[:, sequence])
        sinks, rows = min(self.sinks, length), slice(sequence, sequence + 1)
        sides = []
        for side in _SIDES:
            buffer = _part(self._stores[f"exact.{side}"][1].tokens, rows, 0, exact).to_host()[0]
            pieces = [buffer[:, :sinks]]
            if encoded:
                codec, packed = self._stores[f"store.{side}"]
                rounded = {} if isinstance(codec, codecs.Float16) else {"dtype": dtype}
                decoded = codec.decode(codec.used(packed, sequence, encoded), **rounded)
                pieces.append(arrays.borrow(decoded, "decoded").to_host()[0])
            for _, slot, n in self.tail.runs(encoded, length - sinks, encoded):
                pieces.append(buffer[:, sinks + slot:sinks + slot + n])
            sides.append(np.concatenate(pieces, axis=1))
        return tuple(sides)

    # ---------------------------------------------------------------------------------------------------- save, load

    def contents(self, lengths=None) -> dict[str, arrays.Array]:
        """Views of everything that the present tokens occupy, or that sequences of these lengths would.

        By name, PART.SIDE.ARRAY.SEQUENCE such as "store.keys.sign.0"; all are [1, kv_heads, ...].
        """
        self._join()
        lengths = self._lengths if lengths is None else np.asarray(lengths, np.int64)
        counts, views = dict(zip(("exact", "store"), self._split(lengths))), {}
        for name, (codec, packed) in self._stores.items():
            for sequence in np.flatnonzero(lengths):
                used = codec.used(packed, int(sequence), int(counts[name.split(".")[0]][sequence]))
                views |= {f"{name}.{field}.{sequence}": view for field, view in used.arrays().items()}
        return views

    def restore(self, lengths, contents: Mapping[str, object]) -> None:
        """Hold what `contents` of a cache with the same parameters gave, on any device, for sequences of these lengths.

        ValueError for lengths that do not fit, and for arrays that are not those of such a cache.
        """
        lengths = np.asarray(lengths, np.int64)
        _require(lengths.shape == (self.batch,) and lengths.min() >= 0 and lengths.max() <= self.capacity, "lengths",
                 f"{self.batch} lengths of at most {self.capacity}", lengths.tolist())
        self._set_lengths(lengths)
        self._ahead = self._split(lengths)[1]
        views = self.contents()
        _require(views.keys() == contents.keys(), "arrays", sorted(views), sorted(contents))
        for name, view in views.items():
            view.copy_from(contents[name])

    def save(self, path) -> None:
        """Write the present tokens and all parameters to a safetensors file; `load` gives the same cache.

        Atomic: `path` is never half written.  The file holds a format version and a checksum over all of its bytes.
        """
        parts = {name: part and part.config() for name, part in self._part_objects().items()}
        content = {"parameters": self._parameters(), "parts": parts, "tail": asdict(self.tail),
                   "lengths": self._lengths.tolist()}
        tensors = {name: view.to_host() for name, view in self.contents().items()}
        storage.write(path, tensors, content, _FORMAT, _VERSION)

    def _parameters(self) -> dict:
        return {name: getattr(self, name) for name in
                ("batch", "kv_heads", "q_heads", "head_dim", "capacity", "sinks", "dtype")}

    def _part_objects(self) -> dict[str, codecs.Part | None]:
        return {name: getattr(self, name) for name in ("keys", "values", "index", "selector")}

    def select(self, sequences: Sequence[int]) -> KVCache:
        """A new cache that holds copies of these sequences, in this order and as often as they are named."""
        _require(len(sequences) > 0 and all(0 <= i < self.batch for i in sequences), "sequences",
                 f"one or more numbers of the {self.batch} sequences", sequences)
        copy = KVCache(**{**self._parameters(), "batch": len(sequences)}, **self._part_objects(), tail=self.tail,
                       device=self.device, backend=self.backend)
        copy._follow(self._stream)
        lengths, views = self._lengths[np.asarray(sequences, np.int64)], self.contents()
        names = (name.rpartition(".") for name in copy.contents(lengths))
        copy.restore(lengths, {f"{part}.{i}": views[f"{part}.{sequences[int(i)]}"] for part, _, i in names})
        return copy

    def __deepcopy__(self, memo) -> KVCache:
        return self.select(range(self.batch))

    def __reduce__(self):
        raise TypeError("KVCache: cannot be pickled or shallowly copied, it holds memory addresses: "
                        "use save and load, or copy.deepcopy")


def load(path, device="cpu", capacity: int | None = None, backend: str | None = None) -> KVCache:
    """The cache that `KVCache.save` wrote, on `device`, with its capacity or another one.

    ValueError, with the path, for a file that is truncated, damaged, foreign or of a newer format; CapacityError if the
    tokens do not fit into `capacity`.
    """
    device = arrays.Device.parse(device)
    if capacity is not None:
        _require_integer("load", "capacity", capacity, 1)
    tensors, content = storage.read(path, _FORMAT, _VERSION)
    try:
        lengths = np.array(content["lengths"], np.int64)
        parameters = content["parameters"]
        if capacity is not None:
            if lengths.max() > capacity:
                raise CapacityError(f"load: capacity: expected at least the {lengths.max()} tokens of {path}, "
                                    f"got {capacity}")
            parameters = {**parameters, "capacity": capacity}
        parts = {name: config and codecs.rebuild(config) for name, config in content["parts"].items()}
        cache = KVCache(**parameters, **parts, tail=Tail(**content["tail"]), device=device, backend=backend)
        cache.restore(lengths, tensors)
    except CapacityError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the content of a cache: {error}") from error
    return cache


def _equal_runs(*columns: np.ndarray) -> Iterator[slice]:
    """Longest runs of neighbours that are equal in every column: sequences that one call can serve."""
    changes = np.flatnonzero(np.any([np.diff(column) for column in columns], axis=0)) + 1
    edges = [0, *changes.tolist(), len(columns[0])]
    for start, stop in zip(edges, edges[1:]):
        yield slice(start, stop)


def _part(array: arrays.Array, sequences: slice, start: int, stop: int) -> arrays.Array:
    """array[sequences, :, start:stop]"""
    return array.narrow(0, sequences.start, sequences.stop).narrow(2, start, stop)


def _row(array: arrays.Array, i: int) -> arrays.Array:
    """array[i]"""
    return array.narrow(0, i, i + 1).reshape(*array.shape[1:])
