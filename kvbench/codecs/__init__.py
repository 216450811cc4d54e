"""Codecs: how a key or a value is stored, and which operator attends to a pair of stored keys and values.

    codec  = codecs.TurboQuantMSE(head_dim=128, bits=3)
    packed = codec.encode(x)                # x [batch, kv_heads, tokens, head_dim] -> a frozen dataclass of arrays
    x_hat  = codec.decode(packed)           # same framework and device
    s      = codec.logits(q, packed)        # [batch, q_heads, tokens] float32

A codec is a frozen dataclass of plain parameters; `config()` gives them as JSON and `rebuild` makes the codec again.
The same codec lays out the storage of a cache (`Store`): packed arrays of fixed capacity, written in place.
"""
from __future__ import annotations

from kvbench.codecs.base import FUSED, Codec, Exact, Fused, Packed, Part, Store, attend, fused, part, rebuild
from kvbench.codecs.block_gtq import BlockGTQ, BlockGTQTokens, load_calibration, save_calibration
from kvbench.codecs.exact import Float16, Float16Tokens
from kvbench.codecs.kivi import KiviKeys, KiviTokens, KiviValues, TokenInt
from kvbench.codecs.self_indexing import SignVQ, SignVQTokens
from kvbench.codecs.turboquant import TurboQuantMSE, TurboQuantProd, TurboQuantProdTokens, TurboQuantTokens

__all__ = ["FUSED", "BlockGTQ", "BlockGTQTokens", "Codec", "Exact", "Float16", "Float16Tokens", "Fused", "KiviKeys",
           "KiviTokens", "KiviValues", "Packed", "Part", "SignVQ", "SignVQTokens", "Store", "TokenInt", "TurboQuantMSE",
           "TurboQuantProd", "TurboQuantProdTokens", "TurboQuantTokens", "attend", "fused", "load_calibration", "part",
           "rebuild", "save_calibration"]
