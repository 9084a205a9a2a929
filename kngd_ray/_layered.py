"""Layers of plain settings, merged with the memory of who set what, and validated as dataclasses.

The engine under :mod:`kngd_ray.config`; it knows nothing of what the settings mean. A *choice* is a
dataclass with a ``kind`` field, or a union of such; see :mod:`kngd_ray.config` for how it is written.
"""

import re
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from math import isfinite
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from kngd_ray._plugins import added
from kngd_ray._yaml import number, written
from kngd_ray.errors import UsageError, closest, nearest


@dataclass
class Leaf:
    """A value and the layer that set it, counted from 0."""

    value: Any
    layer: int


DEFAULTS = 0
"""The layer of what dataclasses have by themselves."""

_SHOWN = 200  # characters of a wrong value in a message
_LIKE = 0.75  # likeness from which a setting further down may be meant
_LONGEST_ROW = 10_000  # numbers that a range may stand for

Node: TypeAlias = "Leaf | dict[str, Node] | list[Node]"
T = TypeVar("T")


def merge(node: Node, value: Any, layer: int) -> Node:
    """Lay a layer's value over a node; mappings merge, all else replaces.

    A mapping over a list changes its elements: the only one, or those that its keys number. A bare name over a choice
    changes its kind; names over a list of choices keep the options of those that the list had.

    Args:
        node: the layers below.
        value: plain data.
        layer: number of the layer, larger wins.

    Returns:
        The merged node.
    """
    if isinstance(value, Mapping):
        if isinstance(node, list) and value and (len(node) == 1 or all(_numbers(key) for key in value)):
            for key, inner in value.items():
                node = assign(node, str(key).split("."), inner, layer, str(key))
            return node
        merged: dict[str, Node] = dict(node) if isinstance(node, dict) else _as_choice(node)
        for key, inner in value.items():
            # dotted keys in files mean what they mean on the command line
            head, _, rest = str(key).partition(".")
            merged[head] = merge(merged.get(head, {}), {rest: inner} if rest else inner, layer)
        return merged
    if isinstance(value, list):
        return _laid_over(node, value, layer)
    if isinstance(value, str):
        if isinstance(node, list) or (isinstance(node, dict) and "," in value):
            names = [name.strip() for name in value.split(",")]
            if all(names) and any(name in names for name in _kinds(node)):
                return _laid_over(node, names, layer)
        elif isinstance(node, dict) and "kind" in node:
            return {**node, "kind": Leaf(value, layer)}
    return Leaf(value, layer)


def _laid_over(node: Node, items: list[Any], layer: int) -> list[Node]:
    """A list in the place of a node; bare names keep the options that layers above the defaults gave to that kind."""
    left = [old for old in _elements(node) if _newest(old) > DEFAULTS]
    merged = []
    for item in items:
        same = next((old for old in left if isinstance(item, str) and kind_at(old) == item), {})
        left = [old for old in left if old is not same]
        merged.append(merge(same, item, layer))
    return merged


def _elements(node: Node) -> list[Node]:
    """The choices that a node has: those of its list, or itself."""
    return [item for item in (node if isinstance(node, list) else [node]) if isinstance(item, dict) and "kind" in item]


def _kinds(node: Node) -> list[Any]:
    """Of the choices that a node has."""
    return [kind_at(item) for item in _elements(node)]


def assign(node: Node, path: list[str], value: Any, layer: int, full: str) -> Node:
    """Set one dotted path.

    Args:
        node: where the path starts.
        path: what is left of it.
        value: what to set, plain data.
        layer: who sets it.
        full: the whole path, for messages.

    Returns:
        The node with the value set.

    Raises:
        UsageError: an element that its list does not have.
    """
    if not path:
        return merge(node, value, layer)
    head, rest = path[0], path[1:]
    if isinstance(node, Leaf) and isinstance(node.value, str) and head.isdecimal():
        node = _names(node)
    elif isinstance(node, dict) and "kind" in node and head.isdecimal():
        node = [node]
    if isinstance(node, list):
        index = int(head) if head.isdecimal() else 0 if len(node) == 1 else -1
        if not 0 <= index < len(node):
            raise UsageError(f"{full}: that list has {len(node)} elements; address one by its number, from 0.")
        below = rest if head.isdecimal() else path
        return [assign(item, below, value, layer, full) if i == index else item for i, item in enumerate(node)]
    mapping = node if isinstance(node, dict) else _as_choice(node)
    return {**mapping, head: assign(mapping.get(head, {}), rest, value, layer, full)}


def kind_at(node: Node, *path: str) -> Any:
    """The kind of the choice at a path; None where there is none.

    Args:
        node: where the path starts.
        *path: keys of mappings.

    Returns:
        Its name.
    """
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return None
        node = node[key]
    kind = node.get("kind") if isinstance(node, dict) else node
    return kind.value if isinstance(kind, Leaf) else None


def _numbers(key: Any) -> bool:
    """Whether a key, perhaps dotted, starts with the number of a list's element."""
    return str(key).partition(".")[0].isdecimal()


def _names(leaf: Leaf) -> list[Node]:
    """The long form of a list that was given as ``a,b``."""
    return [Leaf(name.strip(), leaf.layer) for name in leaf.value.split(",")]


def _as_choice(node: Node) -> dict[str, Node]:
    """The long form of a choice that was given as a bare name."""
    return {"kind": node} if isinstance(node, Leaf) and isinstance(node.value, str) else {}


def build(cls: type[T], node: Node, path: str) -> T:
    """Validate a node as a dataclass; each field as a choice, a dataclass or a leaf.

    Args:
        cls: the dataclass.
        node: merged layers.
        path: where the node is, for messages.

    Returns:
        The object.

    Raises:
        UsageError: an unknown or missing key, or a value out of its type or range.
    """
    if not isinstance(node, dict):
        raise UsageError(f"{path}: expected settings of the form key: value, found {shortened(_raw(node))}.")
    hints = _hints(cls)  # type: ignore[arg-type]
    own = fields(cls)  # type: ignore[arg-type]
    known = [f.name for f in own]
    kind = node.get("kind")
    values: dict[str, Any] = {}
    for key, inner in node.items():
        here = f"{path}.{key}" if path else key
        if key in known:
            values[key] = _value(hints[key], inner, here)
        elif not (isinstance(kind, Leaf) and _newest(inner) < kind.layer):
            deeper = [] if path or closest(key, known) else _deeper(key, _leaves(cls))  # type: ignore[arg-type]
            guess = (
                f"; did you mean {' or '.join(deeper)}?{nearest('', known)}" if deeper else nearest(key, known, path)
            )
            raise UsageError(f"unknown key {here!r}{guess}.")
    required = [f.name for f in own if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise UsageError(f"{path or 'the configuration'} lacks {', '.join(missing)}.")
    try:
        return cls(**values)
    except ValueError as error:
        raise UsageError(f"{path}: {error}." if path else f"{error}.") from error


def _value(hint: Any, node: Node, path: str) -> Any:
    choices = _choices(hint)
    if choices:
        return _choose(choices, node, path)
    if is_dataclass(hint):
        return build(hint, node, path)  # type: ignore[arg-type]
    element = _tuple_element(hint)
    if element is not None and _choices(element):
        if isinstance(node, Leaf) and isinstance(node.value, str):
            node = _names(node)
        items = node if isinstance(node, list) else [node]
        return tuple(_choose(_choices(element), item, f"{path}.{i}") for i, item in enumerate(items))
    raw = _raw(node)
    if element is not None and raw is not None and not isinstance(raw, list):
        # "0,1,2" and a lone 0 are lists too; in texts a comma before a space belongs to the text, as in prompts
        comma = r",(?!\s)" if element is str else ","
        raw = [item.strip() for item in re.split(comma, raw)] if isinstance(raw, str) else [raw]
    kinds = {*_members(hint), *_members(element)}
    if isinstance(raw, list):
        listed = [item for given in raw for item in (_in_a_row(given, path) if int in kinds else [given])]
        raw = [_meant(item, kinds) for item in listed]
    else:
        raw = _meant(raw, kinds)
    given = raw if isinstance(raw, list) else [raw]
    if any(isinstance(item, bool) for item in given) and bool not in (element, *_members(hint)):
        raise UsageError(f"{path}={shortened(raw).lower()}: expected {_named(hint)}.")
    try:
        words = {*_literals(hint), *_literals(element)}
        if int in kinds and str not in kinds and any(isinstance(item, str) and item not in words for item in given):
            # of which pydantic would make numbers by rules of its own: of 0-4 minus four
            raise UsageError(f"{path}={shortened(raw)}: input should be a valid integer.")
        value = _adapter(hint).validate_python(raw)
    except ValidationError as error:
        if bool in kinds:
            others = "".join(f", {option}" for option in _literals(hint))
            raise UsageError(f"{path}={shortened(raw)}: expected a boolean: true{others} or false.") from error
        if str in kinds and raw is None:
            raise UsageError(f"{path}=null: expected a text; if that is its name, quote it: '\"null\"'.") from error
        first = error.errors()[0]
        shown = first["input"] if not isinstance(raw, list) else raw
        options = [str(o) for o in (*_literals(hint), *_literals(element))]
        hint_text = nearest(str(first["input"]), options) if options else ""
        raise UsageError(
            f"{path}={shortened(shown)}: {first['msg'][0].lower()}{first['msg'][1:]}{hint_text}."
        ) from error
    if isinstance(value, float) and not isfinite(value):
        raise UsageError(f"{path}={raw}: expected a finite number.")
    return value


def _meant(value: Any, kinds: Set[Any]) -> Any:
    """A scalar as its setting takes it: what is written like a number is a text where texts are asked for.

    Args:
        value: as YAML has it.
        kinds: types that the setting, or an element of its list, may have.

    Returns:
        The value, or another reading of it.
    """
    numbers = kinds & {int, float}
    if isinstance(value, str) and numbers and str not in kinds:
        found = number(value.strip())
        return value if found is None else found
    text = written(value)
    words = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if text is not None and ((str in kinds and not numbers and bool not in kinds) or text in words):
        return text
    return value


def _in_a_row(value: Any, path: str) -> list[Any]:
    """The whole numbers of a range such as ``0-4``, both ends included; of anything else itself.

    Raises:
        UsageError: a range that goes down, or on and on.
    """
    found = re.fullmatch(r"\s*(\d{1,18})\s*-\s*(\d{1,18})\s*", value) if isinstance(value, str) else None
    if found is None:
        return [value]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _LONGEST_ROW:
        raise UsageError(f"{path}={value}: expected a range from less to more, of at most {_LONGEST_ROW:,} numbers.")
    return list(range(first, last + 1))


def _choose(choices: Mapping[str, type], node: Node, path: str) -> Any:
    if isinstance(node, list):
        node = {"kind": Leaf([kind_at(item) or _raw(item) for item in node], _newest(node))}
    elif isinstance(node, Leaf):
        node = {} if node.value is None else {"kind": node}
    kind = _raw(node.get("kind", Leaf(None, 0)))
    if kind is None and len(choices) == 1:
        (kind,) = choices
    if not isinstance(kind, str) or kind not in choices:
        given = "nothing" if kind is None else shortened(kind)
        raise UsageError(f"{path} is {given}{nearest(kind if isinstance(kind, str) else '', list(choices))}.")
    known = [f.name for f in fields(choices[kind])]
    for key, inner in node.items():
        others = [other for other, cls in choices.items() if key in [f.name for f in fields(cls)]]
        # an option that a lower layer set for the kind that this one replaced is dropped below, without a word
        stale = isinstance(node.get("kind"), Leaf) and _newest(inner) < _newest(node["kind"])
        if key not in known and others and not stale:
            raise UsageError(
                f"{path}.{key} is an option of {path}={' or '.join(others)}, and {path} is {kind}: set that as well."
            )
    return build(choices[kind], node, path)


def shortened(value: Any) -> str:
    """A value as it stands in a message: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _raw(node: Node) -> Any:
    if isinstance(node, Leaf):
        return node.value
    if isinstance(node, list):
        return [_raw(item) for item in node]
    return {key: _raw(item) for key, item in node.items()}


def layers_of(node: Node) -> set[int]:
    """The layers that have set any part of a node, and been kept."""
    found, left = set(), [node]
    while left:
        part = left.pop()
        if isinstance(part, Leaf):
            found.add(part.layer)
        else:
            left += part if isinstance(part, list) else part.values()
    return found


def _newest(node: Node) -> int:
    """The latest layer that set any part of a node."""
    return max(layers_of(node), default=-1)


def _deeper(key: str, leaves: Sequence[str]) -> list[str]:
    """Settings further down whose last name is a key, or is close to it."""
    ends = [leaf.rpartition(".")[2] for leaf in leaves]
    meant = [key] if key in ends else closest(key, ends, cutoff=_LIKE)
    return [leaf for leaf, end in zip(leaves, ends, strict=True) if end in meant]


@cache
def _leaves(cls: Any) -> list[str]:
    """Dotted paths of all settings that are no options of a choice."""
    found = []
    for name, hint in _hints(cls).items():
        if is_dataclass(hint) and not _choices(hint):
            found += [f"{name}.{below}" for below in _leaves(hint)]  # type: ignore[arg-type]
        else:
            found.append(name)
    return found


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _members(hint: Any) -> tuple[Any, ...]:
    """The hints of a union; any other hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(hint: Any) -> dict[str, type]:
    """The dataclasses with a ``kind`` that a hint admits, by kind; empty for any other hint."""
    found = {}
    members = _members(hint)
    for member in members:
        if not (is_dataclass(member) and isinstance(member, type)):
            return {}
        kinds = [f.default for f in fields(member) if f.name == "kind"]
        if not kinds:
            return {}
        found[str(kinds[0])] = member
    for member in added(frozenset(members)):
        found[str(next(f.default for f in fields(member) if f.name == "kind"))] = member
    return found


def _tuple_element(hint: Any) -> Any:
    """The T of ``tuple[T, ...]``, also where the hint is optional or admits a bare T; None otherwise."""
    members = _members(hint)
    if str in members:
        return None  # `str | tuple[str, ...]` takes a bare string as it is
    for member in members:
        if get_origin(member) is tuple:
            return get_args(member)[0]
    return None


def _literals(hint: Any) -> tuple[Any, ...]:
    return tuple(choice for member in _members(hint) if get_origin(member) is Literal for choice in get_args(member))


def _named(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "kind":
                yield path, inner
            else:
                yield from flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{path}.{index}")
    elif isinstance(value, list):
        yield path, ",".join(str(item) for item in value)
    else:
        yield path, value


def plain(config: Any) -> dict[str, Any]:
    """Nested dicts, lists and scalars."""

    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listed(value[key]) for key in sorted(value, key=lambda key: key != "kind")}  # kind first
        return [listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    plain: dict[str, Any] = listed(asdict(config))
    return plain
