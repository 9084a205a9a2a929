"""YAML from anybody: plain data alone, within bounds of size that no settings come near.

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
_FOREIGN = re.compile("[\0\ud800-\udfff]")  # which escapes may spell, and no file system or UTF-8 takes


class LimitError(ComposerError):
    """YAML that is well formed, and refused all the same."""


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

    @staticmethod
    def _refuse(wrong: bool, reason: str, event: Any) -> None:
        if wrong:
            raise LimitError(None, None, reason, event.start_mark)
