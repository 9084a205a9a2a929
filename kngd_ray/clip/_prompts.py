"""Prompts: the sentences that stand for a class in a zero-shot head, and how a class is called in them."""

import ast
import re
import unicodedata
from collections.abc import Callable, Sequence

from kngd_ray.clip.builds import torchvision_errors
from kngd_ray.errors import DataError, UsageError, spelled

_PLACE = "{}"
_IN_WORDS = "{words}"
_PLACES = re.compile(r"\{(?:name|words)?\}")
_NAMED_SETS = {
    "openai_imagenet": "OPENAI_IMAGENET_TEMPLATES",  # the 80 sentences of the CLIP paper
    "simple_imagenet": "SIMPLE_IMAGENET_TEMPLATES",  # the 7 of them that its authors found to suffice
}
# AnnualCrop, annualCrop and BirdOfPrey; not iPhone, McDonald, BMW, F-16A or SUVs.
_CODE = re.compile(r"[A-Z]?[a-z]{2,}(?:[A-Z][a-z]+)+")
_WORD = re.compile(r"[A-Z]?[a-z]+")
_LITERAL = re.compile(r"""[bBuUrR]{0,2}(['"])(?:(?!\1).)*\1""")
_SHOWN = 4  # names in a message
_MISSING = frozenset({"nan", "NaN", "None", "<NA>", "NaT", "null"})


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Check templates, and replace the name of a set by its members.

    Args:
        templates: Sentences with one ``{}`` each, or nothing but the name of a set
            (``openai_imagenet`` or ``simple_imagenet``). One string counts as one template. ``{name}`` and
            ``{words}`` are ``{}`` that :func:`worded` leaves alone.

    Returns:
        The templates, each with exactly one place for the class name.

    Raises:
        UsageError: There is no template, or one without exactly one ``{}``.
    """
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise UsageError("no prompt template is given: name at least one, such as 'a photo of a {}.'")
    if len(templates) == 1 and templates[0] in _NAMED_SETS:
        with torchvision_errors():
            import open_clip

        return tuple(fill(_PLACE) for fill in getattr(open_clip, _NAMED_SETS[templates[0]]))
    for template in templates:
        if len(_PLACES.findall(template)) != 1:
            raise UsageError(
                f"prompt template {template!r} needs exactly one {{}} for the class name, such as "
                f"'a photo of a {{}}.', or the name of a set alone ({', '.join(_NAMED_SETS)})"
            )
    return templates


def worded(templates: str | Sequence[str], class_names: Sequence[str]) -> tuple[str, ...]:
    """Have names that look like code said in words, see :func:`in_words`.

    The outcome is kept with the weights that are trained on it: of ``{}`` in a checkpoint names are said as they are.

    Args:
        templates: as :func:`resolve_templates` takes them. ``{name}`` is the name as it is, whatever it looks like.
        class_names: the classes.

    Returns:
        The templates as they are given if no name looks like code, else all of them, with ``{words}`` for ``{}``.
    """
    given = (templates,) if isinstance(templates, str) else tuple(templates)
    if all(in_words(name) == _plain(name) for name in class_names):
        return given
    return tuple(template.replace(_PLACE, _IN_WORDS) for template in resolve_templates(given))


def same_sentences(some: str | Sequence[str], others: str | Sequence[str]) -> bool:
    """Whether templates differ at most in how they have names said."""
    a, b = ([_PLACES.sub(_PLACE, t) for t in resolve_templates(templates)] for templates in (some, others))
    return a == b


def in_words(name: str) -> str:
    """How a class is called where prompts say it in words.

    Args:
        name: of the class.

    Returns:
        The name with spaces for underscores, without quotes of its own or Python's (``b'bird'``), and split where a
        word looks like code: ``Annual Crop`` for ``AnnualCrop``. Digits and capitals stay: ``F-16A``, ``BMW``.
    """
    bare = name.strip()
    if _LITERAL.fullmatch(bare):
        bare = _literal(bare)
    words = _plain(bare).split(" ")
    return " ".join(" ".join(_WORD.findall(word)) if _CODE.fullmatch(word) else word for word in words)


def expand(class_names: Sequence[str], templates: str | Sequence[str]) -> list[list[str]]:
    """Write every class name into every template, which :func:`resolve_templates` checks.

    Args:
        class_names: C names; an underscore counts as a space.
        templates: T templates, or the name of a set of them.

    Returns:
        C lists of T prompts.
    """
    return [[before + said(name) + after for before, said, after in parts(templates)] for name in class_names]


def parts(templates: str | Sequence[str]) -> list[tuple[str, Callable[[str], str], str]]:
    """What stands before and after the class in each template, and how the class is called between."""
    found: list[tuple[str, Callable[[str], str], str]] = []
    for template in resolve_templates(templates):
        before, after = _PLACES.split(template)
        found.append((before, in_words if _IN_WORDS in template else _plain, after))
    return found


def check_names(class_names: Sequence[str]) -> None:
    """Refuse a name that cannot be used in a prompt.

    Args:
        class_names: the classes.

    Raises:
        DataError: one is empty, or a list or the like as Python writes it.
    """
    for name in class_names:
        if not name.strip():
            raise DataError(f"a class is called {name!r}, which means nothing in a prompt: give it a name")
        if name[0] + name[-1] in {"[]", "()", "{}"} and any(quote in name for quote in "'\""):
            raise DataError(f"a class is called {name!r}, which is a Python list: give it one name")


def said_otherwise(class_names: Sequence[str], templates: str | Sequence[str]) -> str | None:
    """The line on names that prompts say in words.

    Args:
        class_names: the classes.
        templates: of the prompts, as :func:`worded` has them.

    Returns:
        None where all are said as they are.
    """
    changed = [name for name in class_names if in_words(name) != _plain(name)]
    if not changed or not any(said is in_words for _, said, _ in parts(templates)):
        return None
    shown = ", ".join(f"{name} as {in_words(name)!r}" for name in changed[:_SHOWN])
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return f"prompts say class names that look like code in words, {shown}{more}: a template with {{name}} keeps them"


def called_missing(class_names: Sequence[str]) -> str | None:
    """The line on a class that is called as a missing value is once it is text; None where there is none."""
    found = next((name for name in class_names if name in _MISSING), None)
    if found is None:
        return None
    return f"there is a class called {found!r}, as text that was made of missing values is: look at the labels"


def called_alike(class_names: Sequence[str]) -> str | None:
    """The line on classes whose names differ by case, spaces or the form of accents alone; None where none do."""
    alike: dict[str, list[str]] = {}
    for name in class_names:
        alike.setdefault(unicodedata.normalize("NFC", " ".join(name.split())).casefold(), []).append(name)
    found = [" and ".join(map(spelled, names)) for names in alike.values() if len(names) > 1]
    if not found:
        return None
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    shown = ", ".join(found[:_SHOWN])
    return (
        f"names of classes differ by case, spaces or the form of accents alone, {shown}{more}: if they are one class, "
        "give it one name"
    )


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _literal(text: str) -> str:
    """What a string or bytes are that Python wrote."""
    try:
        value = ast.literal_eval(text)
        return value.decode() if isinstance(value, bytes) else str(value)
    except (ValueError, SyntaxError):  # UnicodeDecodeError is a ValueError
        return text
