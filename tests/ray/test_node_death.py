"""A node of a small cluster is switched off in the middle of a job, with a spare one and without."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from helpers.compare import max_error
from helpers.resuming import IDENTITY, everything_in
from helpers.workloads import long_task
from ray.cluster_utils import Cluster

from kngd_ray.cluster import ray_session, run_job
from kngd_ray.cluster._ray_private import use_token_if_there
from kngd_ray.cluster.auth_token import ensure_token
from kngd_ray.config import TrainerConfig
from kngd_ray.training.job import FitEvent, Job, run_fits
from kngd_ray.training.resumable import latest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FIT = "kalman-seed0"
STEPS = 200
SILENCE = 2.0  # seconds without a step, by which a job that starts again is told from what was still on its way


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without cores, joined as by trainer.address; the nodes come in the test."""
    ensure_token()
    use_token_if_there()  # as `ray start` does it
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        with ray_session(found.address):
            yield found
    finally:
        found.shutdown()


def below(node: object) -> list[psutil.Process]:
    """What a node's raylet has started."""
    raylets = [info[0].process for kind, info in node.all_processes.items() if "raylet" in kind]  # type: ignore[attr-defined]
    return [child for raylet in raylets for child in psutil.Process(raylet.pid).children(recursive=True)]


def has_a_rank(node: object) -> bool:
    """Whether a Ray Train worker runs there."""
    return any("RayTrainWorker" in " ".join(process.cmdline()) for process in below(node))


def switch_off(cluster: Cluster, node: object) -> None:
    """SIGKILL to a node's processes, its workers first: a machine takes all along."""
    for process in below(node):
        process.kill()
    cluster.remove_node(node, allow_graceful=False)


def end(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Everything in the last checkpoint of a finished fit, and how many ranks wrote it."""
    found = latest(folder / "fits" / FIT)
    assert found is not None
    assert found.manifest["step"] == STEPS
    return everything_in(found.folder), len(found.manifest["pieces"])


@pytest.mark.parametrize(("spare", "ranks"), [(True, 2), (False, 1)], ids=["spare", "no-spare"])
def test_a_job_goes_on_with_the_nodes_that_are_left(
    cluster: Cluster, tmp_path: Path, spare: bool, ranks: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("fault", f"a node dies, {'a spare one is there' if spare else 'no spare'}, num_workers: [1, 2]")
    # the spare one is there beforehand: the fit might end while a node starts
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3 if spare else 2)]
    cluster.wait_for_nodes()
    job = Job({FIT: long_task(STEPS)}, IDENTITY, tmp_path / "job", checkpoint_every=5)
    heard, off, went_on = 0.0, 0.0, 0.0

    def on_event(event: FitEvent) -> None:
        nonlocal heard, off, went_on
        assert event.error is None
        if event.record is None:
            return
        step = event.record["step"]
        if not off and step >= 20:
            switch_off(cluster, next(node for node in reversed(nodes) if has_a_rank(node)))
            off = time.monotonic()
            time.sleep(1)  # what the other rank still writes
            shutil.copytree(job.folder / "fits", tmp_path / "copy" / "fits")
        elif off and not went_on and time.monotonic() - heard > SILENCE:
            went_on = time.monotonic()
        heard = time.monotonic()

    run_job(job, TrainerConfig(num_workers=(1, 2), max_failures=2), on_event)
    assert went_on
    record_property("seconds", json.dumps([round(went_on - off, 1)]))
    assert went_on - off < 240  # on a machine that is busy with other things; docs/reliability.md has figures
    found, pieces = end(job.folder)
    assert pieces == ranks

    # from the checkpoint of two ranks that was left: what one process makes of it
    alone = Job(job.fits, IDENTITY, tmp_path / "copy")
    run_fits(alone, lambda event: None)
    expected, _ = end(alone.folder)
    assert found.keys() == expected.keys()
    if ranks == 1:
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    else:
        for name in expected:
            assert max_error(found[name], expected[name]) < 1e-4, name
