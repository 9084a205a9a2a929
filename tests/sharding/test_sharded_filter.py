"""Sharded and unsharded are the same filter: gloo ranks against one process, over the matrix of cases."""

import pytest
import torch
from helpers.cases import FAMILIES
from helpers.compare import max_error
from helpers.ranks import run_ranks
from helpers.sharded import (
    EXCHANGES,
    FAILURES,
    FORMS,
    KALMAN_CASES,
    SHIPPED,
    exchange_case,
    exchange_samples,
    run_everything,
)

from kngd_ray.sharding import Ownership, SingleProcess

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
REPLICATED = ("mu", "noise", "log_evidence", "nis", "scores", "log_predictive")


@pytest.fixture(scope="module")
def alone() -> dict:
    return run_everything(SingleProcess())


@pytest.fixture(
    scope="module",
    params=[2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))],
    ids="W={}".format,
)
def ranks(request) -> list[dict]:
    return run_ranks(request.param, run_everything)


def test_equals_one_process(ranks, alone, subtests):
    tolerances = {case: TOLERANCE[names["dtype"]] for case, names in KALMAN_CASES.items()}
    for case, tolerance in {**tolerances, **dict.fromkeys(SHIPPED, 1e-9)}.items():
        with subtests.test(case):
            for rank in ranks:
                for key, expected in alone[case].items():
                    assert max_error(rank[case][key], expected) < tolerance, key
                    assert rank[case][key].dtype == expected.dtype


def test_replicated_quantities_are_bitwise_the_same_on_every_rank(ranks):
    for case in (*KALMAN_CASES, *SHIPPED):
        first, *others = (rank[case] for rank in ranks)
        for other in others:
            assert all(torch.equal(other[key], first[key]) for key in REPLICATED), case


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_and_unused_layers(ranks, alone, family):
    expected = alone[f"frozen/{family}"]
    assert torch.equal(expected["spare"], torch.ones(2, 5, dtype=torch.float64))
    for rank in ranks:
        found = rank[f"frozen/{family}"]
        assert torch.equal(found["frozen"], expected["frozen"])
        assert torch.equal(found["spare"], expected["spare"])
        for key in ("mu", "covariance", *REPLICATED):
            assert max_error(found[key], expected[key]) < 1e-10, key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refused_step_is_refused_everywhere_and_changes_nothing(ranks, alone, family):
    expected = alone[f"refused/{family}"]
    for rank in ranks:
        found = rank[f"refused/{family}"]
        assert "innovations are NaN" in found["refused"]
        assert found["refused"] == expected["refused"]
        assert found["kept"]
        assert max_error(found["mu"], expected["mu"]) < 1e-10
        assert max_error(found["noise"], expected["noise"]) < 1e-10


def test_a_matrix_that_does_not_factor_on_one_rank_refuses_the_step_on_all(ranks, alone):
    """Otherwise the others would wait in a collective that this rank never joins."""
    for case in FAILURES:
        expected = alone[f"failed/{case}"]
        assert "a distinctive reason" in expected["refused"], case
        for rank in ranks:
            found = rank[f"failed/{case}"]
            assert "refused" in found["refused"], case
            assert found["kept"], case
            assert torch.equal(found["mu"], ranks[0][f"failed/{case}"]["mu"]), case
            assert max_error(found["mu"], expected["mu"]) < 1e-10, case
            if found["fails"] and not case.startswith("gram") and "serial" not in case:
                assert "a distinctive reason" in found["refused"], case


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_says_what_it_cost_each_rank(ranks, alone, family):
    costs = [rank[f"cost/{family}"] for rank in ranks]
    assert sum(cost["held"] for cost in costs) == alone[f"cost/{family}"]["held"]
    assert all((cost["moved"] > 0) == (len(ranks) > 1) for cost in costs)
    assert all(cost["scores"] == 0 for cost in costs)


@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_gradient_descent_under_ddp_equals_one_process(ranks, alone, method):
    expected = alone[method]
    assert expected["refused"] == [1]
    for rank in ranks:
        found = rank[method]
        assert found["refused"] == [1]
        assert max_error(found["mu"], expected["mu"]) < 1e-6
        assert max_error(found["losses"], expected["losses"]) < 1e-6
        assert torch.equal(found["mu"], ranks[0][method]["mu"])


def test_collectives(ranks):
    W = len(ranks)
    rows = [r % 3 for r in range(W)]
    whole = torch.arange(2.0 * sum(rows), dtype=torch.float64).view(sum(rows), 2)
    owner = torch.arange(W).repeat_interleave(torch.tensor(rows))
    for r, rank in enumerate(ranks):
        found = rank["collectives"]
        assert torch.equal(found["sum"], W * torch.arange(4.0).double() + sum(range(W)))
        assert torch.equal(found["gathered"], whole)
        assert torch.equal(found["integers"], 2**40 + owner)
        assert found["nothing"].shape == (0, 3)
        assert [message.tolist() for message in found["exchanged"]] == [
            [10.0 * other + r] * (other + r) for other in range(W)
        ]
        assert [len(message) for message in found["no_numbers"]] == [0] * W
        assert found["untouched"]


@pytest.mark.parametrize("case", EXCHANGES)
def test_what_arrives_are_the_columns_of_the_whole_jacobian(ranks, case):
    """And in as few bytes as factors or rows would take, the fewer of both for each part."""
    settings = EXCHANGES[case]
    k, dtype, samples = settings["k"], settings["dtype"], exchange_samples(len(ranks))
    layers, H = exchange_case(k, sum(samples), settings["layers"], dtype)
    ownership = Ownership.balanced(FAMILIES[settings["family"]], layers, len(ranks))
    for r, rank in enumerate(ranks):
        found, numbers, factored = rank[f"exchange/{case}"], 0, []
        assert list(found["rows"]) == [part.layer.name for part in ownership.parts[r]]
        for part in ownership.parts[r]:
            _, i, tokens, own_x = FORMS[part.layer.name]
            assert max_error(found["rows"][part.layer.name], H[part.layer.name].rows()[:, part.flat]) < 1e-6
            assert found["rows"][part.layer.name].dtype == dtype
            as_rows = k * part.o * i
            as_factors = as_rows if tokens is None else tokens * (k * part.o + i * own_x)
            numbers += min(as_rows, as_factors)
            if tokens is not None and (as_factors < as_rows or len(ranks) == 1):
                factored.append(part.layer.name)
        assert found["factors"] == factored
        assert found["bytes"] == numbers * (sum(samples) - samples[r]) * dtype.itemsize


def test_the_forms_of_an_exchange_are_all_met(ranks):
    """Otherwise the test above would compare less than it says."""
    factored = {name for case in EXCHANGES for rank in ranks for name in rank[f"exchange/{case}"]["factors"]}
    assert {"one-token", "tokens", "shared"} <= factored
    if len(ranks) > 1:
        assert not {"rows-are-fewer", "shared-rows-are-fewer", "bias"} & factored
