"""What labels are called in prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from kngd_ray.clip import same_sentences, worded
from kngd_ray.errors import InputError, UsageError


def names_of(classes: Sequence[Any], given: Mapping[Any, str] | None, *, said: bool) -> tuple[str, ...]:
    """Name the classes.

    Args:
        classes: labels.
        given: their names by label; None is what they are themselves.
        said: whether prompts say the names.

    Returns:
        A name for each.

    Raises:
        UsageError: one has no name, or two have the same.
    """
    if given is not None and not hasattr(given, "keys"):
        raise UsageError(f"class_names is a {type(given).__name__}: give a dictionary of names by label.")
    missing = [] if given is None else [label for label in classes if label not in given]
    if missing:
        raise UsageError(f"class_names lacks the label {missing[0]!r}: name every label, or leave class_names out.")
    if given is not None:
        names = tuple(name_of(given[label], "a name in class_names") for label in classes)
    else:
        names = tuple(name_of(label) if said or isinstance(label, bytes) else str(label) for label in classes)
    if len(set(names)) < len(names):
        raise UsageError("two labels have one name: give each its own by class_names=.")
    return names


def templates_of(given: str | Sequence[str], before: Sequence[str] | None, names: Sequence[str]) -> tuple[str, ...]:
    """The prompts that a fit is trained on.

    Args:
        given: to the estimator.
        before: those of the fit that is continued; None where there is none.
        names: classes that are said in words where they look like code; none where names were given for prompts.

    Returns:
        Templates.
    """
    templates = listed_templates(given)
    if before is not None:
        return tuple(before) if same_sentences(before, templates) else templates
    return worded(templates, names)


def listed_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """One template is a list of one."""
    return (templates,) if isinstance(templates, str) else tuple(templates)


def name_of(label: Any, what: str = "the label") -> str:
    """What a label is called in prompts.

    Args:
        label: a string, bytes, or a number.
        what: it is called in messages.

    Returns:
        The string, the text that the bytes are, or the digits.

    Raises:
        InputError: it is something else, or bytes that are no text.
    """
    if isinstance(label, bytes):
        try:
            return label.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{what}, {label!r}, is not UTF-8: give text, or name the label by class_names=."
            ) from error
    if isinstance(label, (str, int, float)):  # also booleans
        return str(label)
    raise InputError(f"{what}, {label!r}, cannot be used in a prompt: name each label by class_names=.")


def said_of(classes: Sequence[Any], names: Sequence[str]) -> list[str]:
    """What is to be said of labels that are numbers, of which prompts are made.

    Args:
        classes: labels.
        names: what they are called.

    Returns:
        None or one sentence.
    """
    if all(isinstance(label, (int, float)) for label in classes) and list(names) == [*map(str, classes)]:
        return [
            f"labels are numbers, and prompts say them, as {names[0]!r}: name them by class_names= if they have names"
        ]
    return []


def said_of_digits(classes: Sequence[Any]) -> list[str]:
    """What is to be said of labels to which class embeddings belong, where text has another order than its numbers.

    Args:
        classes: labels in their order.

    Returns:
        None or one sentence.
    """
    if not all(isinstance(label, str) and label.removeprefix("-").isdecimal() for label in classes):
        return []
    if list(classes) == sorted(classes, key=int):
        return []
    shown = ", ".join(repr(label) for label in classes[:3])
    return [
        f"labels are whole numbers as text, which are sorted as text, {shown} and so on, and so must be the rows of"
        " class_embeddings: give labels as integers if the rows follow the numbers"
    ]
