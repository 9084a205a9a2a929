"""What is imported when it is first used: torch, and names of packages whose modules need it.

Torch takes longer than all else that a wrong setting, ``--print-config`` or a plugin's look at the settings needs, and
the options of a fit are fields of the classes that compute with it. Modules with options import its names from here.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor
    from torch.nn import functional
else:

    class _Deferred:
        """A module that is imported when it is asked for something."""

        __slots__ = ("__dict__", "_name")

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            module = import_module(self._name)
            self.__dict__ = vars(module)  # from now on its names are found without this, replaced ones too
            return getattr(module, name)

    class _Instances(type):
        """Asks the class of that name in torch."""

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, getattr(torch, cls.__name__))

    torch = _Deferred("torch")
    functional = _Deferred("torch.nn.functional")

    class Tensor(metaclass=_Instances):
        """Stands for torch's in annotations and ``isinstance``."""

    class Generator(metaclass=_Instances):
        """Stands for torch's."""


def on_demand(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a package's ``__getattr__`` (PEP 562), which imports the module that has a name when it is asked for.

    Args:
        package: its ``__name__``.
        homes: module below the package by name.

    Returns:
        The function.
    """

    def found(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return found


__all__ = ["Generator", "Tensor", "functional", "on_demand", "torch"]
