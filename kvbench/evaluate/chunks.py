"""Many known tokens at once through one cache: what appending and attending one by one gives, up to rounding.

While a text is known, as for perplexity, all queries of a chunk can be answered by matrix products.  What a cache holds
is a pure function of the tokens, so a query at length L sees the final codes of tokens sinks .. sinks + n(L) (see
`kvbench.cache.Tail`) and the exact form of all others; both forms are at hand.  Codes are decoded by their codec, to
float16 where it gives no more: an error of 2^-11, small against that of the codes.
"""
from __future__ import annotations

import numpy as np

from kvbench.cache import KVCache


def attend(cache: KVCache, query, key, value, scale: float):
    """Append key and value [1, kv_heads, new, head_dim] and answer query [1, q_heads, new, head_dim], torch tensors.

    The cache has one sequence, with tokens, and no index.  Returns [1, new, q_heads, head_dim] in query's dtype.
    """
    import torch

    if cache.batch != 1 or cache.index is not None or not len(cache):
        raise ValueError(f"chunks.attend: expected one sequence with tokens and without an index, got {cache}")
    new, past, device = key.shape[2], len(cache), query.device
    exact_from = cache.sinks + int(cache.tail.encoded(max(past - cache.sinks, 0)))     # what is not encoded yet
    exact = [np.concatenate([before[:, exact_from:], x.cpu().float().numpy()[0]], axis=1)
             for before, x in zip(cache.stored(), (key, value))]
    cache.append(key, value)
    kept = [torch.from_numpy(x.astype(np.float32)).to(device) for x in cache.stored()]
    exact = [torch.from_numpy(x.astype(np.float32)).to(device) for x in exact]

    slots = torch.arange(past + new, device=device)
    lengths = np.arange(past + 1, past + new + 1)
    encoded = cache.sinks + torch.from_numpy(cache.tail.encoded(np.maximum(lengths - cache.sinks, 0))).to(device)
    start = min(exact_from, past)               # with fewer tokens than sinks all of them are exact
    exact = [x[:, x.shape[1] - (past + new - start):] for x in exact]
    changed = (slots[start:] >= cache.sinks) & (slots[start:] < encoded[:, None])       # [new, recent]: seen as codes
    heads = query.float().unflatten(1, (cache.kv_heads, -1))[0].flatten(1, 2)           # [kv_heads, group * new, ...]
    group = cache.q_heads // cache.kv_heads
    changed = changed.repeat(group, 1)
    logits = scale * heads @ kept[0].mT
    recent = logits[..., start:]
    recent.copy_(torch.where(changed, recent, scale * heads @ exact[0].mT))
    logits.masked_fill_((slots >= torch.from_numpy(lengths).to(device)[:, None]).repeat(group, 1), -torch.inf)
    weights = logits.softmax(dim=-1)
    late = weights[..., start:]
    output = weights[..., :start] @ kept[1][:, :start] + (late * changed) @ kept[1][:, start:] \
        + (late * ~changed) @ exact[1]
    return output.unflatten(1, (group, new)).flatten(0, 1).transpose(0, 1)[None].to(query.dtype)
