"""Sharded and unsharded are the same filter: gloo ranks against one process, over the matrix of cases."""

import pytest
import torch
from helpers.cases import FAMILIES
from helpers.compare import max_error
from helpers.ranks import run_ranks
from helpers.sharded import KALMAN_CASES, run_everything

from kngd_ray.sharding import SingleProcess

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
REPLICATED = ("mu", "noise", "log_evidence", "nis", "scores")


@pytest.fixture(scope="module")
def alone() -> dict:
    return run_everything(SingleProcess())


@pytest.fixture(scope="module", params=[1, 2, 3], ids="W={}".format)
def ranks(request) -> list[dict]:
    return run_ranks(request.param, run_everything, timeout=120)


@pytest.mark.parametrize("case", KALMAN_CASES)
def test_equals_one_process(ranks, alone, case):
    for rank in ranks:
        for key, expected in alone[case].items():
            assert max_error(rank[case][key], expected) < TOLERANCE[KALMAN_CASES[case]["dtype"]], key
            assert rank[case][key].dtype == expected.dtype


def test_replicated_quantities_are_bitwise_the_same_on_every_rank(ranks):
    for case in KALMAN_CASES:
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
    columns = [2 * (W - 1 - r) for r in range(W)]
    whole = torch.arange(sum(rows) * sum(columns), dtype=torch.float64).view(sum(rows), sum(columns))
    owner = torch.arange(W).repeat_interleave(torch.tensor(rows))
    pieces = whole.split(columns, 1)
    for r, rank in enumerate(ranks):
        found = rank["collectives"]
        assert torch.equal(found["sum"], W * torch.arange(4.0).double() + sum(range(W)))
        assert torch.equal(found["gathered"], whole)
        assert torch.equal(found["integers"], 2**40 + owner)
        assert found["nothing"].shape == (0, 3)
        assert torch.equal(found["exchanged"], pieces[r])
        assert found["no_rows"].shape == (0, columns[r])
        assert found["untouched"]
