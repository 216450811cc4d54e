"""Presets and their options as text:  turboquant:key_bits=4,value_bits=2/3,sinks=4."""
from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from kvbench import caches
from kvbench.registry import nearest

# What the user of a spec does not choose: the shape of the model and where it runs.
_GIVEN = ("batch", "kv_heads", "q_heads", "head_dim", "capacity", "device", "backend")


@dataclass(frozen=True)
class Spec:
    """A preset of `kvbench.caches` with options of its own; `text` is how it was written and what results call it."""

    preset: str
    options: tuple[tuple[str, object], ...] = ()

    @property
    def text(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options)
        return f"{self.preset}:{options}" if options else self.preset

    def build(self, **sizes) -> caches.KVCache:
        """The cache: sizes are batch, kv_heads, q_heads, head_dim, capacity, and device, backend, dtype if wanted.

        An option of the spec overrides one of `sizes`.
        """
        return caches.PRESETS[self.preset].function(**{**sizes, **dict(self.options)})


def parse(text: str) -> list[Spec]:
    """PRESET[:NAME=VALUE,...]; a slash between values gives one spec for each, a product over several options.

    ValueError names an unknown preset or option and the nearest known ones.
    """
    preset, colon, rest = text.partition(":")
    if preset not in caches.PRESETS:
        raise ValueError(f"--cache: unknown preset {preset!r}{nearest(preset, caches.PRESETS)}")
    known = [name for name in inspect.signature(caches.PRESETS[preset].function).parameters if name not in _GIVEN]
    names, choices = [], []
    for option in rest.split(",") if colon else ():
        name, equals, values = option.partition("=")
        if name not in known:
            raise ValueError(f"--cache: {preset} has no option {name!r}{nearest(name, known)}")
        if not (equals and all(values.split("/"))):
            raise ValueError(f"--cache: expected {name}=VALUE, got {option!r}")
        if name in names:
            raise ValueError(f"--cache: {name} is given twice in {text!r}")
        names.append(name)
        choices.append([_value(value) for value in values.split("/")])
    return [Spec(preset, tuple(zip(names, chosen))) for chosen in product(*choices)]


def parse_all(texts: Sequence[str]) -> list[Spec]:
    """The specs of all texts in order, each once; "all", or no text, is every preset with its own defaults."""
    every = list(caches.PRESETS)
    found = [spec for text in texts or every for each in (every if text == "all" else [text]) for spec in parse(each)]
    return list(dict.fromkeys(found))


def _value(text: str):
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text
