"""What a text tower sees of prompts: long ones are cut, and some texts become the same tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kngd_ray.clip._prompts import expand, parts
from kngd_ray.errors import DataError

_WIDE = 16  # contexts in which a prompt that is cut is measured
_SHOWN = 100  # characters of a prompt in a message
_FEW = 4  # classes in a message


class Reading:
    """The prompts of classes as a text tower reads them.

    Args:
        tokenizer: of the model.
        class_names: C names.
        templates: T templates, or the name of a set of them.

    Attributes:
        tokens: (C T, L) int64, the prompts of a class one after another.
    """

    def __init__(
        self, tokenizer: Callable[..., Tensor], class_names: Sequence[str], templates: str | Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._names = tuple(class_names)
        self._parts = parts(templates)
        self._prompts = [prompt for row in expand(class_names, templates) for prompt in row]
        self.tokens = tokenizer(self._prompts)

    def check(self, model: str) -> None:
        """Refuse classes that it does not read, or takes for one.

        Args:
            model: its name, for messages.

        Raises:
            DataError: a name is cut, or two classes have the same prompts.
        """
        cut = {n: size for n, size in self._cut().items() if self._name_is_cut(n)}
        if cut:
            longest = max(cut, key=cut.__getitem__)
            others = len({n // len(self._parts) for n in cut}) - 1
            more = f", and so are those of {others} other classes" if others else ""
            name, prompt = _short(self._name(longest)), _short(self._prompts[longest])
            raise DataError(
                f"the prompts of the class {name!r} are too long: {prompt!r}"
                f" has {cut[longest]:,} tokens, and {model} reads {self.tokens.shape[1]}, so its name is cut off"
                f"{more}; shorten names or data.templates"
            )
        first: dict[bytes, int] = {}
        for number, row in enumerate(self.tokens.view(len(self._names), -1)):
            before = first.setdefault(row.numpy().tobytes(), number)
            if before != number:
                prompts = [self._prompts[n * len(self._parts)] for n in (before, number)]
                said = repr(prompts[0]) if len(set(prompts)) == 1 else f"{prompts[0]!r} and {prompts[1]!r}, read as one"
                raise DataError(
                    f"the classes {self._names[before]!r} and {self._names[number]!r} have one prompt to {model}, "
                    f"{said}, so that nothing tells them apart: rename one, or make them one class"
                )

    def note(self) -> str | None:
        """The line on prompts of which the end is cut off, behind the name of the class; None where there are none."""
        cut = [n for n in self._cut() if not self._name_is_cut(n)]
        if not cut:
            return None
        classes = list(dict.fromkeys(self._name(n) for n in cut))
        shown = ", ".join(map(_short, classes[:_FEW])) + (f" and {len(classes) - _FEW} more" if classes[_FEW:] else "")
        return (
            f"prompts of {len(classes)} of {len(self._names)} classes are longer than the {self.tokens.shape[1]} "
            f"tokens that the text tower reads, and are cut off behind the name: {shown}"
        )

    def _name(self, prompt: int) -> str:
        return self._names[prompt // len(self._parts)]

    def _cut(self) -> dict[int, int]:
        """Numbers of the prompts that are longer than the context, and how many tokens they have."""
        length = self.tokens.shape[1]
        if length < 3 or not self._prompts:
            return {}
        empty = self._tokenizer([""])[0]
        # of most prompts the end is padding: only the others are measured
        full = torch.nonzero(self.tokens[:, -2] != empty[-2]).flatten().tolist()
        if not full:
            return {}
        sizes = self._sizes([self._prompts[n] for n in full])
        return {n: size for n, size in zip(full, sizes, strict=True) if size > length}

    def _sizes(self, texts: list[str]) -> list[int]:
        """Numbers of tokens of texts; 0 for texts that fit into the context."""
        length = self.tokens.shape[1]
        found = []
        for narrow, wide in zip(
            self._tokenizer(texts), self._tokenizer(texts, context_length=_WIDE * length), strict=True
        ):
            fits = torch.equal(wide[:length], narrow) and bool((wide[length:] == wide[-1]).all())
            told = torch.nonzero(wide != wide[-1])  # the rest is padding
            found.append(0 if fits else max(int(told.max()) + 1, length + 1))
        return found

    def _name_is_cut(self, prompt: int) -> bool:
        before, said, _ = self._parts[prompt % len(self._parts)]
        return self._sizes([(before + said(self._name(prompt))).rstrip()])[0] > 0


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
