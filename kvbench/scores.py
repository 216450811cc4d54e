"""What an index says about the tokens, and a selector chooses by."""
from __future__ import annotations

from typing import NamedTuple


class Scores(NamedTuple):
    """Estimated logits of all tokens, scale included.

    logits : [batch, q_heads, tokens] float32; -inf or NaN for what must not be selected
    sigma  : same shape, the standard deviation of logits - exact logits as the index predicts it, or None
    """

    logits: object
    sigma: object = None
