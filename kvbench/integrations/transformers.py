"""A compressed cache for `model.generate` of Hugging Face transformers (5.0 and newer).

    from kvbench.integrations.transformers import KVBenchCache

    cache = KVBenchCache(model, "turboquant", key_bits=4)          # also sets the attention of `model`
    model.generate(**inputs, past_key_values=cache)
    cache.nbytes_used, cache.bits_per_element

A prompt attends to its own keys and values, exactly; then they are compressed.  Every later token is appended and
attended one by one by the operators of the preset, on the packed data: nothing is ever decompressed as a whole.

transformers hands the attention function what the `update` of a cache returns, but not the cache.  So `update` returns
the new keys with the layer attached to them, and the attention function, registered as "kvbench", finds it there.
Where it is lost on the way, and for a mask that is not causal attention with padding on the left, an error is raised.
"""
from __future__ import annotations

import inspect

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvbench import caches
from kvbench.registry import nearest

__all__ = ["ATTENTION", "KVBenchCache", "PackedLayer"]

ATTENTION = "kvbench"                   # the attention implementation that a model must be set to
_HANDLE = "_kvbench_layer"
_FULL, _SLIDING = "full_attention", ("sliding_attention", "chunked_attention")
_CHANGES = ("softcap", "s_aux", "position_bias")        # what some models add to attention, and no operator has


class KVBenchCache(Cache):
    """Keys and values of a whole model, each full-attention layer in a `kvbench.cache.KVCache` of its own.

    model    : a causal LM; its attention implementation becomes "kvbench", which without this cache is exact attention
    preset   : a name in `kvbench.caches.PRESETS`
    capacity : tokens that fit into each sequence, allocated at the first prompt (default: the most the model knows)
    backend  : of the operators (default: that of the model's device)
    chunks   : (cache, query, key, value, scale) -> output, for several tokens that one sequence gets after its prompt,
               where the preset selects no tokens, such as `kvbench.evaluate.chunks.attend` (default: one by one)
    options  : of the preset; `dtype`, of what is kept exact and of queries, is by default that of the model

    Batches with padding on the left, beam search, chunked prompts, copies and reuse after `reset` work.  Layers of
    sliding windows keep the library's own cache; layers without attention, weights of attention
    (`output_attentions`), dropout and assisted generation (`crop`) are refused.
    """

    def __init__(self, model, preset: str, *, capacity: int | None = None, backend: str | None = None,
                 chunks=None, **options):
        if preset not in caches.PRESETS:
            raise ValueError(f"KVBenchCache: preset: unknown preset {preset!r}{nearest(preset, caches.PRESETS)}")
        function = caches.PRESETS[preset].function
        for name in options:
            if name not in inspect.signature(function).parameters:
                raise ValueError(f"KVBenchCache: {preset} has no option {name!r}"
                                 f"{nearest(name, inspect.signature(function).parameters)}")
        config = model.config.get_text_config(decoder=True)
        capacity = config.max_position_embeddings if capacity is None else capacity
        options = {**options, "capacity": capacity, "backend": backend}
        super().__init__(layers=[_layer(kind, config, function, options, chunks) for kind in _layer_kinds(config)])
        model.set_attn_implementation(ATTENTION)

    def fill(self, prompt) -> None:
        """Store a prompt whose attention was computed elsewhere, without padding.

        prompt : (queries [batch, q_heads, tokens, head_dim], keys, values [batch, kv_heads, tokens, head_dim]) of each
                 layer, after RoPE
        """
        for layer, (query, key, value) in zip(self.layers, prompt, strict=True):
            layer.update(key, value)
            if isinstance(layer, PackedLayer):
                layer.store(query, key, value, np.zeros(len(key), np.int64))

    @property
    def packed(self) -> list[caches.KVCache]:
        """The caches of those layers that hold tokens, in their order."""
        return [layer.cache for layer in self.layers if isinstance(layer, PackedLayer) and layer.cache is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that these caches have allocated for tokens."""
        return sum(cache.nbytes for cache in self.packed)

    @property
    def nbytes_used(self) -> int:
        """Bytes of these that the present tokens occupy."""
        return sum(cache.nbytes_used for cache in self.packed)

    @property
    def bits_per_element(self) -> float:
        """Bits that a number of keys and values really takes, everything counted; nan without tokens."""
        elements = sum(2 * int(c.lengths.sum()) * c.kv_heads * c.head_dim for c in self.packed)
        return 8 * self.nbytes_used / elements if elements else float("nan")


class PackedLayer(CacheLayerMixin):
    """One layer of KVBenchCache.

    cache : its KVCache, or None before the first tokens.  Sequences lie in it without their padding
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, function, options: dict, chunks=None, **kwargs):
        super().__init__()
        self._function, self._options, self._chunks = function, options, chunks
        self.cache: caches.KVCache | None = None
        self._seen = 0                      # tokens of every sequence, padding included
        self._starts: np.ndarray | None = None      # [batch] where the padding of each sequence ends
        self._waiting = 0                   # tokens that `update` was given and attention has not stored

    # ---- what transformers asks a layer

    def lazy_initialization(self, key_states, value_states) -> None:
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """The keys with this layer attached, and the values; `attend` stores them."""
        if self._waiting:
            raise RuntimeError(f"KVBenchCache: {self._waiting} tokens were never stored: the model's attention must "
                               f"be {ATTENTION!r} (model.set_attn_implementation) and must not fail half way")
        self.lazy_initialization(key_states, value_states)
        self._waiting = key_states.shape[2]
        self._seen += self._waiting
        handle = key_states.view_as(key_states)
        setattr(handle, _HANDLE, self)
        return handle, value_states

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query) -> tuple[int, int]:
        """(width, offset) of the mask; query is a length or, in older releases, a tensor of positions."""
        return self._seen + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        return self._options["capacity"]

    get_max_cache_shape = get_max_length                # its name in older releases

    def reset(self) -> None:
        self.cache, self._seen, self._starts, self._waiting = None, 0, None, 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices) -> None:
        self._select(torch.arange(self.cache.batch)[indices.cpu()].tolist() if self.cache else [])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([i for i in range(self.cache.batch) for _ in range(repeats)] if self.cache else [])

    def crop(self, *args) -> None:
        raise NotImplementedError("KVBenchCache: tokens cannot be taken back out of a compressed cache (crop)")

    def offload(self) -> None:
        raise NotImplementedError("KVBenchCache: cannot be offloaded")

    prefetch = offload

    def _select(self, sequences: list[int]) -> None:
        if self.cache is not None:
            self.cache, self._starts = self.cache.select(sequences), self._starts[sequences]

    # ---- attention

    def attend(self, module, query, key, value, mask, scaling, options) -> torch.Tensor:
        """query [batch, q_heads, new, head_dim], key and value of the new tokens -> [batch, new, q_heads, head_dim]."""
        new, past = key.shape[2], self._seen - key.shape[2]
        if new != self._waiting or query.shape[2] != new or value.shape != key.shape:
            raise ValueError(f"KVBenchCache: expected queries, keys and values of the {self._waiting} new tokens and "
                             f"of one head_dim, got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
        if torch.is_grad_enabled() and key.requires_grad:
            raise ValueError("KVBenchCache: gradients do not pass a compressed cache: use torch.no_grad()")
        starts = self._checked_starts(mask, len(key), new, past)
        if self.cache is None:
            output = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)[0]
            self.store(query, key, value, starts)
        else:
            output = self._decode(query, key, value, starts, scaling)
            self._starts, self._waiting = starts, 0
        return output

    def store(self, query, key, value, starts: np.ndarray) -> None:
        """Make the cache and append the first tokens; those of each sequence begin at starts [batch]."""
        batch, kv_heads, new, head_dim = key.shape
        options = {"dtype": str(query.dtype).removeprefix("torch."), **self._options}
        self.cache = self._function(batch=batch, kv_heads=kv_heads, q_heads=query.shape[1], head_dim=head_dim,
                                    device=str(query.device), **options)
        keys, values, queries = (self._without_padding(x, starts) for x in (key, value, query))
        self.cache.append(keys, values, q=queries, lengths=new - np.minimum(starts, new))
        self._starts, self._waiting = starts, 0

    def _decode(self, query, key, value, starts, scaling) -> torch.Tensor:
        """Each token is appended, then its query attends: what one token per call would give."""
        past = self._seen - key.shape[2]
        keys, values = (self._cast(x) for x in (key, value))
        if self._chunks and self.cache.batch == 1 and self.cache.index is None and len(self.cache):
            return self._chunks(self.cache, self._cast(query), keys, values, scaling).to(query.dtype)
        queries = self._cast(query).transpose(1, 2)
        output = torch.empty(queries.shape, dtype=query.dtype, device=query.device)
        for i in range(key.shape[2]):
            token = queries[:, i].contiguous()
            # Where the padding goes on, this token is part of it.
            lengths = (past + i >= starts).astype(np.int64) if (past < starts).any() else None
            self.cache.append(keys[:, :, i:i + 1], values[:, :, i:i + 1], q=token[:, :, None], lengths=lengths)
            output[:, i] = self.cache.attend(token, scale=scaling)
        return output

    def _cast(self, x) -> torch.Tensor:
        return x.detach().to(getattr(torch, self.cache.dtype))

    def _without_padding(self, x, starts) -> torch.Tensor:
        """x [batch, heads, tokens, head_dim] with every sequence moved to the front."""
        x = self._cast(x)
        if not starts.any():
            return x
        places = torch.arange(x.shape[2], device=x.device) + torch.from_numpy(starts).to(x.device)[:, None]
        places = places.clamp(max=x.shape[2] - 1)[:, None, :, None]
        return x.gather(2, places.expand(x.shape))

    def _checked_starts(self, mask, batch: int, new: int, past: int) -> np.ndarray:
        """[batch] first position of each sequence that is no padding; ValueError for a mask that says anything else."""
        known = np.zeros(batch, np.int64) if self._starts is None else self._starts
        if len(known) != batch:
            raise ValueError(f"KVBenchCache: expected a batch of {len(known)}, as in the prompt, got {batch}")
        if mask is None:
            if known.any() or (past and new > 1):
                raise ValueError("KVBenchCache: expected an attention mask for a padded batch or a part of a prompt, "
                                 "got none")
            return known
        if mask.is_floating_point() and ((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all():
            mask = mask == 0                            # an additive mask, as some models of older releases make it
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, batch) \
                or mask.shape[2:] != (new, past + new):
            raise ValueError(f"KVBenchCache: expected a boolean mask [{batch}, 1, {new}, {past + new}], got "
                             f"{mask.dtype} {tuple(mask.shape)}")
        mask = mask[:, 0].expand(batch, new, past + new)
        last = mask[:, -1]
        starts = torch.where(last.any(1), last.int().argmax(1), past + new)
        slots = torch.arange(past + new, device=mask.device)
        rows = slots[past:]
        expected = (slots <= rows[:, None]) & (slots >= starts[:, None, None])
        real = rows >= starts[:, None]                  # what padding attends to does not matter
        if ((mask != expected) & real[:, :, None]).any():
            raise ValueError("KVBenchCache: expected causal attention with padding on the left only, got another mask "
                             "(pad with tokenizer.padding_side = 'left')")
        starts = starts.cpu().numpy()
        begun = known < past
        if self._starts is not None and (starts[begun] != known[begun]).any():
            raise ValueError(f"KVBenchCache: expected padding up to {known.tolist()}, as in the prompt, got "
                             f"{starts.tolist()}")
        return starts


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """The attention function: (output [batch, new, q_heads, head_dim], None)."""
    layer = getattr(key, _HANDLE, None)
    if layer is None:
        _refuse_lost_handle(query, key, attention_mask, options)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                                      **options)
    if dropout:
        raise ValueError(f"KVBenchCache: dropout: expected 0, got {dropout}: use model.eval()")
    if options.get("output_attentions"):
        raise ValueError("KVBenchCache: output_attentions: packed operators give no weights of attention")
    for name in _CHANGES:
        if options.get(name) is not None:
            raise ValueError(f"KVBenchCache: {name}: this model's attention has it, the packed operators do not")
    return layer.attend(module, query, key, value, attention_mask, scaling, options), None


def _refuse_lost_handle(query, key, mask, options) -> None:
    """A model that changes keys after `update` drops the handle: attending to them alone would be silently wrong."""
    positions = options.get("position_ids")
    only_new = key.shape[2] == query.shape[2]
    if (mask is not None and mask.shape[-1] > key.shape[2]) \
            or (only_new and positions is not None and int(positions.min()) > 0):
        raise RuntimeError("KVBenchCache: the keys that reach attention are not those that the cache returned: this "
                           "model changes them after `update`, which a packed cache cannot follow")


def _layer_kinds(config) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [_SLIDING[0] if getattr(config, "sliding_window", None) else _FULL] * config.num_hidden_layers
    for kind in kinds:
        if kind != _FULL and kind not in _SLIDING:
            raise ValueError(f"KVBenchCache: model: expected layers of full or sliding attention, got {kind!r}")
    return list(kinds)


def _layer(kind: str, config, function, options: dict, chunks):
    if kind == _FULL:
        return PackedLayer(function, options, chunks)
    window = config.sliding_window if kind == _SLIDING[0] else config.attention_chunk_size
    return DynamicSlidingWindowLayer(sliding_window=window)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
