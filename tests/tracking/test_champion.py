"""The alias ``champion`` moves to a version that is known to be better, and to no other."""

import logging

import pytest

from kngd_ray.tracking._quiet import quiet
from kngd_ray.tracking._server import Server

TASK = {"data.path": "pets", "data.shots": "8", "seeds": "0"}


@pytest.fixture
def register(store, experiment, caplog):
    """Make a version of a model, whose run has some settings and evidence; returns the champion's number, and why."""
    with quiet():
        server = Server(store, experiment)

    def make(nll: float | None, digest: str | None = None, **settings: str) -> tuple[int, str]:
        with quiet():
            client = server.client
            run = client.create_run(server.experiment_id).info.run_id
            server.log(run, params=TASK | {key.replace("__", "."): value for key, value in settings.items()})
            if digest is not None:
                server.log_input(run, {"name": "pets", "digest": digest, "source": "pets", "profile": {}})
            if nll is not None:
                server.log(run, [("calibration/held_out_nll", nll, 0, 0)])
            model = client.create_logged_model(server.experiment_id, "model", source_run_id=run).model_id
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                server.register(experiment, model, run)
            return int(client.get_model_version_by_alias(experiment, "champion").version), caplog.text

    return make


def test_only_better_evidence_on_the_same_task_moves_it(register):
    assert register(0.5, filter__p0="1") == (1, "")
    champion, why = register(0.6)  # as of a search of two trials
    assert champion == 1
    assert "its NLL of held-out shots is 0.5000, and that of the new one 0.6000" in why
    champion, why = register(0.1, data__shots="16")
    assert champion == 1
    assert "another task (data.shots)" in why
    champion, why = register(None)
    assert champion == 1
    assert "nothing was held out" in why
    assert register(0.4, data__cache_dir="elsewhere", filter__p0="2") == (5, "")


def test_data_that_was_replaced_is_another_task_and_a_copy_of_it_the_same(register):
    assert register(0.5, "1" * 32) == (1, "")
    champion, why = register(0.1, "2" * 32)
    assert champion == 1
    assert "trained on other data, as its digest in MLflow says" in why
    assert register(0.4, "1" * 32, data__path="copy", data__columns__label="y") == (3, "")
    champion, why = register(0.1, data__path="elsewhere")
    assert champion == 3
    assert "another task (data.columns.label, data.path)" in why, "a run of an earlier version has no digest"


def test_of_runs_that_held_nothing_out_the_newer_has_it(register):
    assert register(None) == (1, "")
    assert register(None) == (2, "")
