"""YAML from anybody: plain data alone, within bounds of size that no settings come near.

Scalars are read as YAML 1.2 reads them: ``010`` is ten, ``0x10`` sixteen and ``1e-3`` a number; ``no``, ``12:30`` and
``2024-01-05`` are texts. Numbers remember how they were written, since only the setting that they are for knows whether
a number is meant: a domain may be called 2019, and a run 007.

A key comes once, since of two one would win without a word; ``data: {shots: 4}`` and ``data.shots: 8`` are one key.

Aliases are counted each time: nine levels of ten of them are a billion entries that a page of text asks for.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

# Far above any settings: what is beyond was written to exhaust memory, or is no file of settings.
_MAX_BYTES = 4 << 20
_MAX_ENTRIES = 100_000  # keys and values, what an alias repeats counted each time
_MAX_DEPTH = 50
_MAX_KEY = 1000
_MAX_NUMBER = 100  # characters of a number, date or whatever else is no text
_MARKS = tuple("#&*!|>%@`")  # with which a text may begin, and YAML begins what is none
_FOREIGN = re.compile("[\0\ud800-\udfff]")  # which escapes may spell, and no file system or UTF-8 takes


# of YAML 1.2's core schema; True and TRUE stay texts, which a setting that is a yes or no reads as one
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|false")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class Whole(int):
    """A whole number and how it was written."""

    text: str


class Real(float):
    """A number with a point or an exponent, and how it was written."""

    text: str


class LimitError(ComposerError):
    """YAML that is well formed, and refused all the same."""


class RepeatedError(LimitError):
    """A key that comes twice.

    Args:
        key: with those above it.
        first: where it is.
        second: where it is again.

    Attributes:
        key: with those above it.
        lines: where it is, counted from 1.
    """

    def __init__(self, key: str, first: Any, second: Any) -> None:
        super().__init__(None, None, f"{key} twice", second)
        self.key = key
        self.lines = sorted((first.line + 1, second.line + 1))


def read_text(path: Path) -> str:
    """Read a file of settings.

    Args:
        path: the file.

    Returns:
        Its text.

    Raises:
        ValueError: it is too large, or no UTF-8; OSError passes.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES >> 20} MiB")
    return data.decode()


def number(text: str) -> Whole | Real | None:
    """Read a number of YAML 1.2, digits in groups too, as in 1_000.

    Args:
        text: as it was written.

    Returns:
        The number; None if it is none.
    """
    digits = re.sub(r"(?<=[0-9])_(?=[0-9])", "", text)
    if _INT.fullmatch(digits):
        base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
        found: Whole | Real = Whole(digits[2:] if base != 10 else digits, base)
    elif _FLOAT.fullmatch(digits):
        found = Real(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
    else:
        return None
    found.text = text
    return found


def written(value: Any) -> str | None:
    """How a scalar that is no text was written.

    Args:
        value: of :func:`plain_data`, or of a program.

    Returns:
        The text; None of what is no number, yes or no.
    """
    if isinstance(value, bool):
        return str(value).lower()
    return getattr(value, "text", str(value)) if isinstance(value, (int, float)) else None


def dumped(data: Any) -> str:
    """Write plain data as YAML that reads the same by the rules of 1.2 and by the older ones.

    Args:
        data: nested mappings, lists and scalars.

    Returns:
        YAML.
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def plain_data(text: str) -> Any:
    """Read YAML without Python objects.

    Args:
        text: YAML.

    Returns:
        Nested mappings, lists and scalars.

    Raises:
        YAMLError: it is malformed, or not of a size that settings have.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        # PyYAML's constructors let through what they meet: the 30th of February, !!int of nothing
        raise yaml.YAMLError(f"a value is not of its kind ({error})") from error
    finally:
        loader.dispose()


def typed(text: str) -> Any:
    """Read a value that was typed: YAML without comments.

    What YAML would drop or refuse is text where nothing else can be meant: ``run #2``, ``#x``, ``*.parquet``, ``@x``.

    Args:
        text: as it was typed.

    Returns:
        Nested mappings, lists and scalars.

    Raises:
        LimitError: part of it would be dropped.
    """
    text = text.strip()
    one_line = "\n" not in text
    if one_line and text.startswith(_MARKS) and not text.startswith("!!"):  # !!str 007 says what it is
        if text.startswith("&"):
            _refuse_beyond_limits(text)
        return plain_data(_quoted(text))
    data = plain_data(text)
    tokens = list(yaml.scan(text, Loader=_Loader))[1:-1]  # without the stream's beginning and end
    left = list(text)
    for token in tokens:
        left[token.start_mark.index : token.end_mark.index] = " " * (token.end_mark.index - token.start_mark.index)
    commented = bool("".join(left).strip())
    plain = len(tokens) == 1 and isinstance(tokens[0], yaml.ScalarToken) and tokens[0].plain
    marked = any(isinstance(token, (yaml.DocumentStartToken, yaml.DocumentEndToken)) for token in tokens)
    if one_line and (marked or (commented and plain)):
        return plain_data(_quoted(text))
    if commented:
        raise LimitError(None, None, "what follows a # is a comment there", None)
    referred = {token.value for token in tokens if isinstance(token, yaml.AliasToken)}
    unused = [token.value for token in tokens if isinstance(token, yaml.AnchorToken) and token.value not in referred]
    if unused:
        raise LimitError(None, None, f"&{unused[0]} is an anchor there", None)
    return data


def _refuse_beyond_limits(text: str) -> None:
    """Refuse what is YAML and too much of it; what is no YAML passes.

    Raises:
        LimitError: it is too much.
    """
    try:
        plain_data(text)
    except LimitError:
        raise
    except yaml.YAMLError:
        return


def _quoted(text: str) -> str:
    """A text of one line as YAML."""
    doubled = text.replace("'", "''")
    return f"'{doubled}'"


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for no text."""


def _represent_text(dumper: _Dumper, text: str) -> Any:
    scalar = any(kind.fullmatch(text) for kind in (_NULL, _BOOL, _INT, _FLOAT))
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if scalar else None)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Whole, lambda dumper, value: dumper.represent_int(int(value)))
_Dumper.add_representer(Real, lambda dumper, value: dumper.represent_float(float(value)))


class _Loader(yaml.SafeLoader):
    """Reads plain data, and no more of it than settings are.

    Args:
        text: YAML.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._entries = 0
        self._sizes: dict[int, int] = {}  # by id of a node that is complete: entries in it

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Build a node, unless it is too much.

        Args:
            parent: the node above it.
            index: its key there; None for a key itself.

        Returns:
            The node.

        Raises:
            LimitError: it is too deep, too large, or no text and too long, or holds a character that nothing takes.
        """
        event = self.peek_event()  # type: ignore[no-untyped-call]
        repeated = isinstance(event, yaml.AliasEvent)
        before = self._entries
        self._entries += 1
        self._depth += 1
        self._refuse(self._depth > _MAX_DEPTH, f"nested more than {_MAX_DEPTH} deep", event)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if repeated:
            self._refuse(id(node) not in self._sizes, "an alias refers to what it is part of", event)
            self._entries += self._sizes[id(node)]
        self._refuse(self._entries > _MAX_ENTRIES, f"more than {_MAX_ENTRIES:,} entries, aliases included", event)
        if isinstance(node, yaml.ScalarNode) and not repeated:
            key = index is None and isinstance(parent, yaml.MappingNode)
            most = _MAX_KEY if key else _MAX_BYTES if node.tag == "tag:yaml.org,2002:str" else _MAX_NUMBER
            self._refuse(
                len(node.value) > most, f"a {'key' if key else 'number'} of more than {most} characters", event
            )
            self._refuse(_FOREIGN.search(node.value) is not None, "a character that no name or path may have", event)
        if not repeated:
            self._sizes[id(node)] = self._entries - before
        return node

    def get_single_node(self) -> Any:
        """Build the document.

        Returns:
            Its node; None of an empty one. A key that it has twice is a :class:`RepeatedError`.
        """
        node: Any = super().get_single_node()
        _refuse_repeated(node, "", {})
        return node

    @staticmethod
    def _refuse(wrong: bool, reason: str, event: Any) -> None:
        if wrong:
            raise LimitError(None, None, reason, event.start_mark)


def _refuse_repeated(node: Any, above: str, settings: dict[str, Any]) -> None:
    """Refuse a document that has a key twice, or the same setting by a dotted key and by nested ones.

    Args:
        node: of the document, or a part of it.
        above: dotted keys that lead there, with a dot at the end.
        settings: what was met, and where; settings of this part are added.

    Raises:
        RepeatedError: there is one.
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated(item, "", {})
    if not isinstance(node, yaml.MappingNode):
        return
    keys: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        path = f"{above}{key.value}"
        if key.value in keys:
            raise RepeatedError(path, keys[key.value], key.start_mark)
        keys[key.value] = key.start_mark
        if isinstance(value, yaml.MappingNode):
            _refuse_repeated(value, f"{path}.", settings)
            continue
        setting = path.removesuffix(".kind")  # of a choice its bare name is short for
        if setting in settings:
            raise RepeatedError(setting, settings[setting], key.start_mark)
        settings[setting] = key.start_mark
        _refuse_repeated(value, "", {})


def _construct_number(loader: _Loader, node: Any) -> Any:
    found = number(loader.construct_scalar(node))
    if found is None:
        raise ValueError(f"{node.value!r} is not a number")
    return found


_Loader.yaml_implicit_resolvers = {}  # in place of those of YAML 1.1
for _tag, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tf")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile("<<"), ["<"]),
):
    # PyYAML asks for a match at the beginning
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), _first)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_number)
