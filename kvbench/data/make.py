"""Cut a sample for `kvbench demo` out of a capture:  python -m kvbench.data.make CAPTURE.safetensors --out SAMPLE

A capture holds one layer: `keys` and `values` [1, kv_heads, tokens, head_dim], and `queries` [1, q_heads, positions,
head_dim] at `query_positions` [positions]; float16, after RoPE; with the text metadata model, layer, text and licence.

The cut is one KV head with the query heads that share it, from token 0 to the last query kept.  Every query therefore
sees exactly the keys that it saw in the model.  Shortening the text instead would move the queries next to keys that
were never their neighbours, and taking the sink away would change what attention looks like.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

LIMIT_BYTES = 2_000_000


def cut(capture: dict[str, np.ndarray], kv_head: int, first_query: int, steps: int) -> dict[str, np.ndarray]:
    """The tensors of a Sample: KV head `kv_head`, queries at positions first_query .. first_query + steps - 1."""
    keys, values, queries = capture["keys"], capture["values"], capture["queries"]
    positions = capture["query_positions"]
    kv_heads, tokens = keys.shape[1:3]
    group = queries.shape[1] // kv_heads
    if not 0 <= kv_head < kv_heads:
        raise ValueError(f"kv_head: expected 0 to {kv_heads - 1}, got {kv_head}")
    end = first_query + steps
    wanted = np.arange(first_query, end, dtype=np.int32)
    rows = np.flatnonzero(np.isin(positions, wanted))
    if steps < 1 or end > tokens or not np.array_equal(positions[rows], wanted):
        raise ValueError(f"first_query and steps: expected positions that the capture holds queries for, "
                         f"got {first_query} to {end - 1} of {tokens} tokens")
    heads = slice(kv_head * group, (kv_head + 1) * group)
    return {"keys": keys[:, kv_head:kv_head + 1, :end].copy(), "values": values[:, kv_head:kv_head + 1, :end].copy(),
            "queries": queries[:, heads, rows].copy(), "positions": wanted}


def main(argv=None) -> int:
    from safetensors import safe_open
    from safetensors.numpy import save

    parser = argparse.ArgumentParser(prog="python -m kvbench.data.make", description="Cut a sample out of a capture.")
    parser.add_argument("capture", type=Path)
    parser.add_argument("--kv-head", type=int, default=1)
    parser.add_argument("--first-query", type=int, default=7680, help="position of the first query kept")
    parser.add_argument("--steps", type=int, default=48, help="how many queries to keep")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    with safe_open(options.capture, "numpy") as file:
        capture = {name: file.get_tensor(name) for name in file.keys()}
        origin = {name: file.metadata()[name] for name in ("model", "layer", "text", "licence")}
    try:
        tensors = cut(capture, options.kv_head, options.first_query, options.steps)
    except ValueError as error:
        parser.error(str(error))
    metadata = origin | {
        "kv_head": str(options.kv_head),
        "layout": "[batch, heads, tokens, head_dim] float16; queries and keys after RoPE; "
                  "the query at position p attends to keys 0..p",
        "made_with": f"python -m kvbench.data.make {options.capture.name} --kv-head {options.kv_head} "
                     f"--first-query {options.first_query} --steps {options.steps}",
    }
    content = save(tensors, metadata)
    if len(content) > LIMIT_BYTES:
        parser.error(f"the sample would take {len(content)} bytes; {LIMIT_BYTES} may be shipped: keep fewer tokens")
    options.out.write_bytes(content)
    print(f"{options.out}: {len(content)} bytes, {tensors['keys'].shape[2]} tokens, {options.steps} queries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
