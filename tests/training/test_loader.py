"""Batches on their way into a fit: the same pixels for any number of ranks, from any step, and no thread left."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.cases import make_options
from helpers.cases import make_task as make_feature_task
from helpers.tower_fits import FITS, STEPS, make_task, write_shots

from kngd_ray.clip import CLIPNetwork, RandomResizedCrop
from kngd_ray.errors import DataError
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training import loader
from kngd_ray.training.batches import Batch
from kngd_ray.training.fit import FitTask, build_head, fit
from kngd_ray.training.loader import cores, decoding_threads
from kngd_ray.training.pictures import Pictures, augmentation

CITE = "cite-vdekf"


class Place(SingleProcess):
    """One of several ranks that say nothing to one another."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Pictures:
    return write_shots(tmp_path_factory.mktemp("shots") / "pictures.arrow")


@pytest.fixture(scope="module")
def task(shots) -> FitTask:
    return make_task(CITE, shots)


@pytest.fixture(scope="module")
def network(task) -> CLIPNetwork:
    return build_head(task)


def batches(task: FitTask, network: CLIPNetwork, group: Group | None = None, start: int = 0) -> list[Batch]:
    with loader.batches(task.sampler, network, group or SingleProcess(), start) as found:
        return list(found)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]


def assert_same(found: Sequence[Batch], expected: Sequence[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)
        assert torch.equal(one.labels, other.labels)


@pytest.fixture(scope="module")
def alone(task, network) -> list[Batch]:
    return batches(task, network)


def test_a_batch_is_what_the_sampler_chose(alone, task, network, shots) -> None:
    assert [len(batch.labels) for batch in alone] == [3, 3, 1] * 2
    for step, batch in enumerate(alone):
        chosen = task.sampler.chosen(step)
        seeds = [augmentation(task.seed, step // 3, i) for i in chosen.local.tolist()]
        assert (batch.step, batch.rank, list(batch.sizes)) == (step, 0, [len(batch.labels)])
        assert torch.equal(batch.labels, shots.labels[chosen.local])
        assert torch.equal(batch.inputs["label"], batch.labels)
        assert torch.equal(batch.inputs["text"], network.tokens(batch.labels))
        crop = RandomResizedCrop.of(network.preprocess_cfg, (0.5, 1.0))
        expected = shots.load(chosen.local, network.transform, augment=crop, seeds=seeds)
        assert torch.equal(batch.inputs["image"], expected)
    assert not threads()


def test_every_shot_once_an_epoch_each_time_as_another_crop(alone, shots) -> None:
    first, second = (torch.cat([batch.inputs["image"] for batch in alone[3 * n : 3 * n + 3]]) for n in (0, 1))
    assert len(first) == len(second) == len(shots)
    assert len(torch.unique(torch.cat([first, second]), dim=0)) == 2 * len(shots)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(alone, task, network, world_size) -> None:
    parts = [batches(task, network, Place(rank, world_size)) for rank in range(world_size)]
    for step, expected in enumerate(alone):
        ranks = [part[step] for part in parts]
        for key, whole in expected.inputs.items():
            assert torch.equal(torch.cat([batch.inputs[key] for batch in ranks]), whole)
        assert torch.equal(torch.cat([batch.labels for batch in ranks]), expected.labels)
        assert all(list(batch.sizes) == [len(b.labels) for b in ranks] for batch in ranks)
    assert {len(part[-1].labels) for part in parts} == {0, 1}, "a rank without any"


@pytest.mark.parametrize("start", [1, 3, STEPS - 1, STEPS])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_fit_sees_what_is_left(task, network, start, world_size) -> None:
    for rank in range(world_size):
        place = Place(rank, world_size)
        assert_same(batches(task, network, place, start), batches(task, network, place)[start:])


def test_a_batch_that_is_repeated_is_cropped_anew(task, network) -> None:
    """As evidence is taken: each batch as often as there are epochs, before the next."""
    found = batches(replace(task, prequential=True), network)
    assert [batch.scored for batch in found] == [True, False] * 3
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(before.labels, after.labels)
        assert not torch.equal(before.inputs["image"], after.inputs["image"])


def test_without_augmentation_pictures_are_as_they_are_tested(shots) -> None:
    options = FITS["full-vdekf"]
    task = make_task("full-vdekf", shots)
    task = replace(task, options=replace(options, tune=replace(options.tune, augment="none")))
    network = build_head(task)
    for step, batch in enumerate(batches(task, network)):
        assert torch.equal(batch.inputs["image"], shots.load(task.sampler.chosen(step).local, network.transform))


def test_shots_in_memory_are_not_decoded() -> None:
    task = make_feature_task(make_options())
    found = batches(task, build_head(task))  # type: ignore[arg-type]
    for step, batch in enumerate(found):
        assert torch.equal(batch.inputs, task.sampler.batch(step).inputs)
    assert len(found) == task.sampler.steps


def test_a_part_of_the_shots(task, network, shots) -> None:
    """As folds are: crops go by the number within the part."""
    part = shots.subset(torch.tensor([4, 0, 6]))
    found = batches(replace(task, support=part), network)
    assert [len(batch.labels) for batch in found] == [3, 3]
    assert sorted(found[0].labels.tolist()) == sorted(part.labels.tolist())


@pytest.fixture
def damaged(tmp_path) -> Pictures:
    """The pictures, the last of which is another than it was."""
    shots = write_shots(tmp_path / "pictures.arrow")
    data = bytearray(shots.path.read_bytes())
    data[data.index(shots.file.read(6)) + 30] ^= 1
    shots.path.unlink()
    shots.path.write_bytes(data)
    return shots


def test_a_damaged_picture_ends_the_fit_at_its_step_and_leaves_no_thread(damaged, tmp_path) -> None:
    task = replace(make_task("full-vdekf", write_shots(tmp_path / "whole.arrow")), support=damaged)
    step = next(step for step in range(STEPS) if 6 in task.sampler.chosen(step).local)
    seen: list[int] = []
    with pytest.raises(DataError, match=r"pictures.arrow, picture 6 .*its bytes changed"):
        fit(task, on_step=lambda record: seen.append(record.step))
    assert seen == list(range(1, step + 1))
    assert not threads()


def test_a_fit_that_is_killed_leaves_no_thread(task) -> None:
    def kill(_: object) -> None:
        assert threads()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(task, on_step=kill)
    assert not threads()


@pytest.mark.parametrize("world_size", [1, 2, 64])
def test_ranks_share_the_cores(world_size, monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert decoding_threads(world_size) == {1: 8, 2: 4, 64: 2}[world_size]


def test_a_system_without_affinity(monkeypatch) -> None:
    """Such as macOS."""
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert decoding_threads(1) == 6


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 6), ("", 6)])
def test_a_container_may_have_less_time_than_cores(quota, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("kngd_ray.training.loader._QUOTA", tmp_path / "cpu.max")
    assert cores() == 6
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores() == expected
