"""Lists and objects that were flattened into attribute names: `a.0.b` = 1 is `{"a": [{"b": 1}]}`."""

from __future__ import annotations

from typing import TypeAlias, cast

from agentlightning.types import Attributes, Json

Tree: TypeAlias = "dict[str, Tree | Json]"


def tree(attributes: Attributes, prefix: str) -> Tree:
    """What the attributes below `prefix.` hold; of a name that is a value and a prefix, the later one."""
    root: Tree = {}
    head = f"{prefix}."
    for name, value in attributes.items():
        if name.startswith(head) and not isinstance(value, bytes):
            _put(root, name[len(head) :].split("."), cast("Json", value))
    return root


def _put(node: Tree, path: list[str], value: Json) -> None:
    for step in path[:-1]:
        below = node.get(step)
        if not isinstance(below, dict):
            below = node[step] = {}
        node = below
    node[path[-1]] = value


def entries(node: object) -> list[Tree]:
    """The objects of a flattened list, by their numbers, which some writers leave gaps in."""
    if not isinstance(node, dict):
        return []
    numbered = [(key, below) for key, below in cast("Tree", node).items() if key.isdecimal()]
    numbered.sort(key=lambda entry: (len(entry[0]), entry[0]))
    return [below for _, below in numbered if isinstance(below, dict)]


def values(node: object) -> list[Json]:
    """The plain values of a flattened list, by their numbers."""
    if not isinstance(node, dict):
        return []
    numbered = [(key, value) for key, value in cast("Tree", node).items() if key.isdecimal()]
    numbered.sort(key=lambda entry: (len(entry[0]), entry[0]))
    return [value for _, value in numbered if not isinstance(value, dict)]


def below(node: Tree, *path: str) -> object:
    """The value or object at a path, None where there is none."""
    found: object = node
    for step in path:
        found = found.get(step) if isinstance(found, dict) else None
    return found


def leaf(node: Tree, *path: str) -> Json:
    """The plain value at a path, None where there is none."""
    found = below(node, *path)
    return None if isinstance(found, dict) else cast("Json", found)
