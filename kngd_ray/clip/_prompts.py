"""Prompt templates: the sentences that stand for a class in a zero-shot head."""

from collections.abc import Sequence

from kngd_ray.errors import UsageError

_PLACE = "{}"
_NAMED_SETS = {
    "openai_imagenet": "OPENAI_IMAGENET_TEMPLATES",  # the 80 sentences of the CLIP paper
    "simple_imagenet": "SIMPLE_IMAGENET_TEMPLATES",  # the 7 of them that its authors found to suffice
}


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Check templates, and replace the name of a set by its members.

    Args:
        templates: Sentences with one ``{}`` each, or nothing but the name of a set
            (``openai_imagenet`` or ``simple_imagenet``). One string counts as one template.

    Returns:
        The templates, each with exactly one ``{}``.

    Raises:
        UsageError: There is no template, or one without exactly one ``{}``.
    """
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise UsageError("no prompt template is given: name at least one, such as 'a photo of a {}.'")
    if len(templates) == 1 and templates[0] in _NAMED_SETS:
        import open_clip

        return tuple(fill(_PLACE) for fill in getattr(open_clip, _NAMED_SETS[templates[0]]))
    for template in templates:
        if template.count(_PLACE) != 1:
            raise UsageError(
                f"prompt template {template!r} needs exactly one {{}} for the class name, such as "
                f"'a photo of a {{}}.', or the name of a set alone ({', '.join(_NAMED_SETS)})"
            )
    return templates


def expand(class_names: Sequence[str], templates: str | Sequence[str]) -> list[list[str]]:
    """Write every class name into every template, which :func:`resolve_templates` checks.

    Args:
        class_names: C names; an underscore counts as a space.
        templates: T templates, or the name of a set of them.

    Returns:
        C lists of T prompts.
    """
    templates = resolve_templates(templates)
    names = [name.replace("_", " ") for name in class_names]
    return [[template.replace(_PLACE, name) for template in templates] for name in names]
