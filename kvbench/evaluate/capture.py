"""`kvbench capture`: queries, keys and values of chosen layers of a model that reads a text, after RoPE.

One file per layer (safetensors), with the metadata model, layer, text, licence, tokens, layout, text_sha256, made_with:

    keys, values     [1, kv_heads, tokens, head_dim] float16 - every token from position 0
    queries          [1, q_heads, positions, head_dim] float16
    query_positions  [positions] int32 - the query at position p attends to keys 0..p
"""
from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvbench import __version__, data
from kvbench.evaluate import models

LAYOUT = ("[batch, heads, tokens, head_dim] float16; queries and keys after RoPE; queries only at query_positions, the "
          "query at position p attends to keys 0..p")


@dataclass(frozen=True)
class Capture:
    """One layer; the arrays are those of the file, `source` names it."""

    source: str
    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    positions: np.ndarray
    metadata: dict[str, str]


def query_positions(tokens: int) -> np.ndarray:
    """Whose queries are kept: the first eighth, for calibration, and the last sixteenth, to evaluate: [n] int32."""
    return np.concatenate([np.arange(max(tokens // 8, 1)), np.arange(tokens - max(tokens // 16, 1), tokens)]) \
        .astype(np.int32) if tokens > 1 else np.zeros(1, np.int32)


def capture(model: models.Model, text: models.Text, tokens: int, layers: Sequence[int], made_with: str,
            progress: Callable[[str], None] = lambda line: None) -> list[Capture]:
    """Let the model read the first `tokens` tokens of the text and keep what its attention in `layers` was given.

    ValueError for a layer that the model lacks, or whose attention never reached the interface of transformers.
    """
    depth = model.config.num_hidden_layers
    for layer in layers:
        if not 0 <= layer < depth:
            raise ValueError(f"--layers: expected 0 to {depth - 1}, got {layer}")
    ids = models.tokens_of(model, text, tokens)
    positions = query_positions(tokens)
    kept: dict[int, dict[str, np.ndarray]] = {}

    def keep(layer, query, key, value):
        progress(f"layer {layer + 1} of {depth} reads {tokens} tokens")
        if layer in layers:
            found = {"keys": key, "values": value, "queries": query[:, :, positions]}
            kept[layer] = {name: x.float().cpu().numpy().astype(np.float16) for name, x in found.items()}

    with models.observed(model.network, keep):
        model.network.base_model(input_ids=ids, use_cache=False)
    progress("")
    if lost := [layer for layer in layers if layer not in kept]:
        raise ValueError(f"--layers: the attention of layers {lost} of {model.name} cannot be observed: it does not go "
                         "through the attention interface of transformers")
    captures = []
    for layer in layers:
        if not all(np.isfinite(x).all() for x in kept[layer].values()):
            raise ValueError(f"--layers: layer {layer} of {model.name} has numbers beyond the range of float16")
        metadata = {"model": model.name, "layer": str(layer), "text": text.title, "licence": model.licence,
                    "tokens": str(tokens), "layout": LAYOUT, "text_sha256": text.sha256,
                    "made_with": f"{made_with} (kvbench {__version__})"}
        captures.append(Capture(f"layer {layer}", **kept[layer], positions=positions, metadata=metadata))
    return captures


def write(capture: Capture, path: Path) -> None:
    """The file, in one step: `path` is the old file (or absent) or the whole new one."""
    from safetensors.numpy import save

    tensors = {"keys": capture.keys, "values": capture.values, "queries": capture.queries,
               "query_positions": capture.positions}
    content = save({name: np.ascontiguousarray(x) for name, x in tensors.items()}, capture.metadata)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise


def read(path: str | Path) -> Capture:
    """A file that `write` made; ValueError, with the path, for anything that is not one."""
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = ("keys", "values", "queries", "query_positions")
            keys, values, queries, positions = (file.get_tensor(name) for name in names)
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not a capture: {error}") from None
    wrong = None
    if keys.ndim != 4 or keys.shape[0] != 1 or values.shape != keys.shape:
        wrong = f"keys and values of one shape [1, kv_heads, tokens, head_dim], got {keys.shape} and {values.shape}"
    elif queries.shape[::2] != (1, len(positions)) or queries.shape[3] != keys.shape[3] \
            or queries.shape[1] % keys.shape[1]:
        wrong = f"queries that fit keys {keys.shape} and {len(positions)} query_positions, got {queries.shape}"
    elif not len(positions) or (np.diff(positions) <= 0).any() or positions[0] < 0 or positions[-1] >= keys.shape[2]:
        wrong = f"ascending query_positions below {keys.shape[2]}"
    elif {x.dtype.name for x in (keys, values, queries)} != {"float16"}:
        wrong = f"float16, got {keys.dtype}, {values.dtype}, {queries.dtype}"
    if wrong:
        raise ValueError(f"{path}: not a capture: expected {wrong}")
    return Capture(Path(path).stem, keys, values, queries, positions, metadata)


def sample() -> Capture:
    """One KV head that kvbench ships (see kvbench/data)."""
    shipped = data.sample()
    return Capture("shipped sample", shipped.keys, shipped.values, shipped.queries, shipped.positions,
                   shipped.metadata)
