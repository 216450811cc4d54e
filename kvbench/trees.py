"""Arrays inside the containers that operators take and return: tuples, dictionaries, dataclasses."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def apply(function: Callable[[str, Any], Any], tree, path: str = "") -> Any:
    """The same containers with function(path, array) in place of each array; everything else is kept as it is."""
    if hasattr(tree, "__dlpack__"):
        return function(path, tree)
    if isinstance(tree, dict):
        return {key: apply(function, value, f"{path}.{key}") for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [apply(function, value, f"{path}[{i}]") for i, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        before = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        after = {name: apply(function, value, f"{path}.{name}") for name, value in before.items()}
        changed = {name: value for name, value in after.items() if value is not before[name]}
        return dataclasses.replace(tree, **changed) if changed else tree
    return tree


def arrays_of(tree) -> dict[str, Any]:
    """path -> array."""
    found = {}
    apply(lambda path, array: found.setdefault(path, array), tree)
    return found
