"""The streamed filter is the sharded one, in place and layer by layer: gloo ranks against one process."""

import pytest
import torch
from helpers.cases import FAMILIES, some_slow
from helpers.compare import max_error
from helpers.ranks import run_ranks
from helpers.streaming import CASES, LAYERS, SHAPES, STREAMS, follow, run_streams

from kngd_ray.filters import Layer
from kngd_ray.sharding import SingleProcess, StreamedFilter
from kngd_ray.sharding.streamed import _rounds

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
FIGURES = ("mu", "covariance", "figures", "predicted", "weight")


@pytest.fixture(scope="module")
def whole() -> dict:
    """The same steps by ShardedFilter, in one process."""
    return {case: follow(SingleProcess(), names, stream=False) for case, names in CASES.items()}


@pytest.fixture(scope="module", params=some_slow([0, 2, 1, 3, 4], 0, 2), ids="W={}".format)
def ranks(request) -> list[dict]:
    return run_ranks(request.param, run_streams) if request.param else [run_streams(SingleProcess())]


def test_equals_the_sharded_filter(ranks, whole, subtests):
    for case, names in CASES.items():
        with subtests.test(case):
            for rank in ranks:
                for key in FIGURES:
                    assert max_error(rank[case][key], whole[case][key]) < TOLERANCE[names["dtype"]], key
                    assert rank[case][key].dtype == whole[case][key].dtype
                    assert torch.equal(rank[case][key], ranks[0][case][key]), key


def test_gates_closed_in_some_cases_and_not_in_others(whole):
    weights = {case: whole[case]["weight"] for case in CASES if CASES[case]["gate"] != "off"}
    assert all(bool((weight < 1).any()) for weight in weights.values())
    assert all(bool((weight == 1).any()) for weight in weights.values())


def test_a_layer_is_built_once_in_each_pass_and_once_where_it_is_kept(ranks):
    asked = {case: set(rank[case]["asked"]) for rank in ranks for case in CASES}
    for case, counts in asked.items():
        assert counts == {"tight": {2}, "some": {1, 2}, "roomy": {1}}[CASES[case]["budget"]], case


def test_a_refused_step_is_refused_everywhere_and_changes_nothing(ranks, subtests):
    for family in STREAMS:
        with subtests.test(family):
            check_refusal(ranks, family)


def check_refusal(ranks, family):
    for rank in ranks:
        found = rank[f"refused/{family}"]
        assert found["kept"] == [True, True, True]
        nu, H, S = found["messages"]
        assert "innovations are NaN" in nu
        assert "S is NaN or infinite" in H
        assert "not positive definite" in S
        assert found["messages"] == ranks[0][f"refused/{family}"]["messages"]


def test_a_layer_whose_posterior_does_not_factor_keeps_its_covariance(ranks):
    unlearned = {name for rank in ranks for name in rank["failed"]["unlearned"]}
    assert "mlp.weight" in unlearned
    at = 0
    for layer in LAYERS:
        own, at = slice(at, at + layer.size), at + layer.size
        for rank in ranks:
            found = rank["failed"]
            same = torch.equal(found["before"][own, own], found["after"][own, own])
            assert same == (layer.name in unlearned), layer.name
            assert bool(found["moved"][own].any())


def test_slices_are_spread_in_place(ranks):
    for rank in ranks:
        found = rank["spread"]
        assert torch.equal(found["whole"], found["expected"])
        assert found["in place"]
        assert found["bytes"]


def test_layers_of_several_dtypes_arrive_in_their_own(ranks):
    assert [rank["mixed"]["wrong"] for rank in ranks] == [[] for _ in ranks]


@pytest.mark.parametrize("family", ["dense", "diagonal_low_rank"])
def test_families_whose_layers_need_one_another_do_not_stream(family):
    with pytest.raises(ValueError, match=f"{family}.*tune.parameters=adapter"):
        StreamedFilter(FAMILIES[family], LAYERS, SingleProcess())


def test_layers_are_brought_together_beside_a_large_one(monkeypatch):
    monkeypatch.setattr("kngd_ray.sharding.streamed._TOGETHER", 100)
    layers = [Layer(str(n), size, 1, factored=False) for n, size in enumerate([30, 40, 900, 10, 900, 50, 60, 1])]
    rounds = [[layer.size for layer in found] for found in _rounds(layers, 1)]
    assert rounds == [[30, 40, 900, 10], [900, 50], [60, 1]]
    assert list(_rounds([], 1)) == []


def test_shapes_have_all_forms():
    assert {(T is None, T == 1, own_x) for _, _, T, own_x in SHAPES.values()} == {
        (True, False, True),
        (False, False, True),
        (False, False, False),
        (False, True, True),
    }
