"""A copy of a network is a deep copy: the same in everything, and nothing of it is the other's."""

import copy

import pytest
import torch
from torch import nn

from kngd_ray.clip._copies import copied


def containers(network):
    """The tables of all modules by name: hooks, weights, parts."""
    return {
        f"{name}.{key}": part
        for name, module in network.named_modules()
        for key, part in vars(module).items()
        if isinstance(part, (dict, list, set))
    }


@pytest.mark.parametrize("name", ["mini", "vit", "custom"])
def test_a_copy_is_the_same_and_shares_nothing(request, name):
    network = request.getfixturevalue(name).network
    found, expected = copied(network), copy.deepcopy(network)
    assert repr(found) == repr(expected)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, x in found.state_dict().items():
        assert torch.equal(x, expected.state_dict()[key]), key
        assert x.untyped_storage().data_ptr() != network.state_dict()[key].untyped_storage().data_ptr(), key
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in network.parameters()]
    own, others, deep = containers(found), containers(network), containers(expected)
    assert own.keys() == others.keys()
    assert {key: (type(part), len(part)) for key, part in own.items()} == {
        key: (type(part), len(part)) for key, part in deep.items()
    }
    assert not {key for key, part in own.items() if part is others[key]}
    one, other = (len({id(part) for part in parts.values()}) for parts in (own, deep))
    assert one == other, "two modules of a copy share no more of them"


def test_what_is_shared_within_stays_shared():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    network[0].notes = network[1].notes = {}
    network[0].register_forward_hook(lambda module, given, y: y + 1)
    found = copied(network)
    assert found[0].weight is found[1].weight
    assert found[0].notes is found[1].notes
    assert found[0].notes is not network[0].notes
    x = torch.ones(1, 3)
    assert torch.equal(found(x), network(x))
    found[1].register_forward_hook(lambda module, given, y: y + 1)
    assert torch.equal(found(x), network(x) + 1)
