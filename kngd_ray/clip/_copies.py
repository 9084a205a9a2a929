"""Copies of a network, which every fit and every prediction makes of a model that is kept."""

import copy
from collections import OrderedDict
from typing import Any

_CONTAINERS = (dict, OrderedDict, set)


def copied(network: Any) -> Any:
    """A network of its own, as :func:`copy.deepcopy` makes it, in less than half of the time.

    Most of what a network is made of are empty tables of hooks, a dozen a module, which a deep copy takes apart and
    puts together one by one. Here they are made beforehand.

    Args:
        network: of modules of any kind.

    Returns:
        The same with weights of its own.
    """
    made: dict[int, Any] = {}
    for module in network.modules():
        for part in vars(module).values():
            if type(part) in _CONTAINERS and not part:
                made[id(part)] = type(part)()
    return copy.deepcopy(network, made)
