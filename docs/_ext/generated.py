"""Pages that are made from the program itself, so that none of them can be out of date.

settings.md     every setting, from the typed configuration tree
commands.md     every command and option, from the command line's own parser

They are written into ``docs/reference`` when a build begins. Links to files of the repository outside of ``docs``, which
open on a code host, are turned into text with the file's path, or into a copy of a picture.
"""

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
REFERENCE = DOCS / "reference"
_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?\)")
_NAMED_TYPES = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "NoneType": "null"}


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", write_reference)
    app.connect("source-read", keep_links)
    return {"parallel_read_safe": True}


def write_reference(_: Sphinx) -> None:
    """Write the generated pages, where they differ from what is there."""
    for name, text in (("settings", settings_page()), ("commands", commands_page())):
        path = REFERENCE / f"{name}.md"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def keep_links(app: Sphinx, name: str, source: list[str]) -> None:
    """Say the path of a linked file that the site does not have; pictures are taken along."""
    here = Path(app.env.doc2path(name)).parent

    def replaced(match: re.Match[str]) -> str:
        picture, text, up, target, _ = match.groups()
        path = (here / up / target).resolve()
        if picture or path.is_relative_to(DOCS):
            return match.group(0)
        shown = path.relative_to(DOCS.parent)
        if text.startswith("`") or text in (path.name, path.stem):
            return f"`{shown}`"
        around = match.string[max(match.start() - 1, 0) : match.end() + 1]
        return f"{text}: `{shown}`" if around.startswith("(") and around.endswith(")") else f"{text} (`{shown}`)"

    source[0] = _OUTSIDE.sub(replaced, source[0])


def settings_page() -> str:
    """Every setting with its type, default and what it does."""
    from kngd_ray.config import Config
    from kngd_ray.configs import names

    presets = ", ".join(f"`{name}`" for name in names("presets"))
    lines = [
        "# Settings",
        "",
        "Generated from the typed configuration tree. Write `key=value` on the command line, the same keys in YAML, or keywords",
        "in Python. `kngd-ray train --print-config` shows the values that a run would take. Defaults here are those of the tree,",
        f"before a preset changes them. Presets: {presets}.",
        "",
    ]
    for title, prefix, cls in sections(Config, "", "The run"):
        rows = list(rows_of(cls, prefix))
        if rows:
            lines += [
                f"## {title}",
                "",
                *summary(cls),
                "| setting | type | default | |",
                "|---|---|---|---|",
                *rows,
                "",
            ]
    return "\n".join(lines)


def sections(cls: type, prefix: str, title: str) -> Iterator[tuple[str, str, type]]:
    """A dataclass of the tree and all that lie below it, each with the dotted prefix of its settings."""
    yield title, prefix, cls
    hints = get_type_hints(cls)
    for each in fields(cls):
        path = f"{prefix}{each.name}"
        choices = list(dataclasses_in(hints[each.name]))
        listed = get_origin(hints[each.name]) in (tuple, list)
        for choice in choices:
            kind = kind_of(choice)
            shown = f"`{path}`" if kind is None else f"`{path}={kind}`"
            yield from sections(choice, f"{path}.0." if listed else f"{path}.", shown)


def dataclasses_in(hint: Any) -> Iterator[type]:
    """The dataclasses that a type is, or is made of."""
    if is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for inner in get_args(hint):
        yield from dataclasses_in(inner)


def kind_of(cls: type) -> str | None:
    """The name that chooses a dataclass among others; None of one without a choice."""
    hint = get_type_hints(cls).get("kind")
    return str(get_args(hint)[0]) if get_origin(hint) is Literal else None


def rows_of(cls: type, prefix: str) -> Iterator[str]:
    """One line of the table for each setting of a dataclass."""
    hints, said = get_type_hints(cls), explained(cls)
    for each in fields(cls):
        if each.name == "kind":
            continue
        hint = hints[each.name]
        kinds = [kind for kind in map(kind_of, dataclasses_in(hint)) if kind]
        if any(dataclasses_in(hint)) and not kinds:
            continue  # a section of its own
        kind = ", ".join(f"`{name}`" for name in kinds) if kinds else type_name(hint)
        yield f"| `{prefix}{each.name}` | {escaped(kind)} | {escaped(default_of(each))} | {escaped(said.get(each.name, ''))} |"


def type_name(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(each) for each in inner)
    if origin in (tuple, list):
        return f"list of {type_name(inner[0])}"
    if origin is dict or "Mapping" in str(origin):
        return "mapping"
    name = getattr(hint, "__name__", str(hint))
    return _NAMED_TYPES.get(name, name)


def default_of(each: Field[Any]) -> str:
    """A default as it is written in YAML."""
    value = (
        each.default
        if each.default is not MISSING
        else each.default_factory()
        if callable(each.default_factory)
        else None
    )
    if value is None:
        return "`null`"
    parts = value if isinstance(value, (tuple, list)) else [value]
    shown = [kind_of(type(part)) or str(part) if is_dataclass(part) else written(part) for part in parts]
    return f"`[{', '.join(shown)}]`" if isinstance(value, (tuple, list)) else f"`{shown[0]}`"


def written(value: Any) -> str:
    """A scalar as it is written in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def summary(cls: type) -> list[str]:
    """The first paragraph of a docstring."""
    first = (inspect.getdoc(cls) or "").split("\n\n", 1)[0].replace("\n", " ")
    return [] if first.startswith(f"{cls.__name__}(") or not first else [plain(first), ""]


def explained(cls: type) -> dict[str, str]:
    """What the docstrings say of a dataclass's fields: its own under Attributes, those of its bases, and after fields."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(base.__doc__ or ""), re.MULTILINE)
        if section:
            for name, text in re.findall(r"^ {4}(\w+)[^:\n]*: (.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE):
                found[name] = " ".join(text.split())
        try:
            source = inspect.getsource(base)
        except OSError:
            continue
        for name, text in re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL):
            found[name] = " ".join(text.split())
    return {name: plain(text) for name, text in found.items()}


def plain(text: str) -> str:
    """A docstring's reStructuredText as Markdown."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text.replace("``", "`"))


def escaped(text: str) -> str:
    """Text as a cell of a table."""
    return text.replace("|", "\\|")


def commands_page() -> str:
    """Every command with its arguments and options."""
    import typer.main

    from kngd_ray.cli.app import app

    group = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        "Generated from the command line's own parser. Exit codes: 0, 1 (failed), 2 (wrong usage).",
        "",
    ]
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        usage = " ".join(
            p.make_metavar_text() if hasattr(p, "make_metavar_text") else metavar(p) for p in arguments(command)
        )
        lines += [
            f"## kngd-ray {name}",
            "",
            as_markdown(inspect.cleandoc(command.help or "")),
            "",
            "```text",
            f"kngd-ray {name} [OPTIONS] {usage}".rstrip(),
            "```",
            "",
        ]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        if options:
            lines += ["| option | |", "|---|---|"]
            lines += [
                f"| {', '.join(f'`{o}`' for o in p.opts)} | {with_code(escaped(p.help or ''))} |" for p in options
            ]
            lines.append("")
    return "\n".join(lines)


def as_markdown(text: str) -> str:
    """A help text as Markdown; paragraphs after a backspace keep their lines."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(f"```text\n{p[2:]}\n```" if p.startswith("\x08\n") else with_code(p) for p in paragraphs)


def with_code(text: str) -> str:
    """Options and settings in a sentence as code: two hyphens would become a dash."""
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]*|[a-z_.]+=[\w./-]*\w)", r"`\1`", text)


def arguments(command: Any) -> list[Any]:
    """The arguments of a command that have no name."""
    return [p for p in command.params if p.param_type_name == "argument"]


def metavar(parameter: Any) -> str:
    """An argument as the usage line shows it."""
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"
