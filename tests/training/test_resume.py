"""N steps, a kill and the rest equal the straight run: bitwise on the same ranks, to rounding on others."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.cases import make_options, make_task, some_slow
from helpers.compare import max_error
from helpers.cones import as_shipped
from helpers.ranks import run_ranks
from helpers.resuming import IDENTITY, KALMAN, RANKED, Killed, everything_in, kill_after, run_all, stands_for

from kngd_ray.errors import CheckpointError, StorageError
from kngd_ray.sharding import SingleProcess
from kngd_ray.training import checkpoint
from kngd_ray.training.options import OptimizerOptions
from kngd_ray.training.restoring import open_fit
from kngd_ray.training.resumable import latest, run_fit

FITS = {
    **{family: make_options(**settings) for family, settings in KALMAN.items()},
    "adamw": make_options(method="adamw", optimizer=OptimizerOptions(schedule="cosine")),
    "sgd": make_options(method="sgd", optimizer=OptimizerOptions(schedule="cosine")),
}


# where real fits happen: to a mode in each of several steps, and by rows that are linearised again
SHIPPED = {
    "default": as_shipped(1, "epochs=2", "batch_size=7", dtype=torch.float32),
    "default-rows": as_shipped(
        1, "epochs=2", "batch_size=7", "filter.iterations=4", "noise.observation=ema", dtype=torch.float32
    ),
}


def run(name: str, folder: Path, **changes) -> Path:
    options = {"identity": IDENTITY, "checkpoint_every": 2} | changes
    identity = options.pop("identity")
    task = SHIPPED[name] if name in SHIPPED else make_task(FITS[name])
    return run_fit(task, folder, identity, SingleProcess(), "cpu", **options)


def assert_same_bits(found: Path, expected: Path) -> None:
    a, b = everything_in(found), everything_in(expected)
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.iterdir())


@pytest.mark.parametrize("name", some_slow([*FITS, *SHIPPED], "diagonal_low_rank", "adamw", *SHIPPED))
def test_a_killed_run_resumes_bitwise(name, tmp_path, subtests):
    straight = run(name, tmp_path / "straight")
    for killed_after in (1, 2, 3, 5, 6):
        with subtests.test(killed_after=killed_after):
            folder = tmp_path / f"killed-{killed_after}"
            with pytest.raises(Killed):
                run(name, folder, on_step=kill_after(killed_after))
            steps = []
            resumed = run(name, folder, on_step=steps.append)
            begun = (killed_after - 1) // 2 * 2  # the newest checkpoint before the kill
            assert [record.step for record in steps] == list(range(begun + 1, 7))
            assert_same_bits(resumed, straight)
            assert steps_in(folder) == [6]


def test_killed_at_every_step(tmp_path):
    straight = run("ekf", tmp_path / "straight")
    for step in range(1, 7):
        with pytest.raises(Killed):
            run("ekf", tmp_path / "killed", on_step=kill_after(step), checkpoint_every=1)
    assert_same_bits(run("ekf", tmp_path / "killed"), straight)


def test_a_finished_fit_is_recognised(tmp_path):
    first = run("ekf", tmp_path)
    seen = []
    assert run("ekf", tmp_path, on_step=seen.append) == first
    assert not seen


def test_a_checkpoint_is_announced_before_it_is_written(tmp_path):
    there = []
    run("ekf", tmp_path, before_checkpoint=lambda: there.append(steps_in(tmp_path)))
    assert there == [[], [2], [2, 4]]


def _flip(folder: Path) -> None:
    raw = bytearray((folder / "weights.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(raw)


@pytest.mark.parametrize("damage", [_flip, lambda folder: (folder / "manifest.json").unlink()], ids=["bit", "torn"])
def test_a_damaged_newest_checkpoint_is_passed_over(damage, tmp_path, caplog):
    straight = run("dense", tmp_path / "straight")
    with pytest.raises(Killed):
        run("dense", tmp_path / "killed", on_step=kill_after(5))
    assert steps_in(tmp_path / "killed") == [2, 4]
    damage(max((tmp_path / "killed").iterdir()))
    seen = []
    resumed = run("dense", tmp_path / "killed", on_step=lambda r: seen.append(r.step))
    assert seen == [3, 4, 5, 6]
    assert "passed over" in caplog.text
    assert_same_bits(resumed, straight)


def test_with_all_checkpoints_damaged_the_run_starts_over(tmp_path):
    straight = run("ekf", tmp_path / "straight")
    with pytest.raises(Killed):
        run("ekf", tmp_path / "killed", on_step=kill_after(5))
    for folder in (tmp_path / "killed").iterdir():
        _flip(folder)
    assert latest(tmp_path / "killed") is None
    assert_same_bits(run("ekf", tmp_path / "killed"), straight)


def test_a_resumed_run_keeps_what_it_resumed_from_until_it_has_two(tmp_path):
    """Its first checkpoint may turn out damaged too."""
    with pytest.raises(Killed):
        run("ekf", tmp_path, on_step=kill_after(3))
    assert steps_in(tmp_path) == [2]
    with pytest.raises(Killed):
        run("ekf", tmp_path, on_step=kill_after(5))
    assert steps_in(tmp_path) == [2, 4]


@pytest.mark.parametrize("killed_after", [3, None])
def test_a_run_of_another_version_is_refused_and_kept(killed_after, tmp_path):
    """To begin again would delete what the other version can still read."""
    if killed_after is None:
        run("ekf", tmp_path)
    else:
        with pytest.raises(Killed):
            run("ekf", tmp_path, on_step=kill_after(killed_after))
    (folder,) = tmp_path.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    for refused in (lambda: run("ekf", tmp_path), lambda: open_fit(tmp_path), lambda: open_fit(folder)):
        with pytest.raises(CheckpointError, match="has format version 1, this kngd_ray reads 2") as error:
            refused()
        assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"class_names": ["a", "b", "c", "e"]}, "class_names"),
        ({"model": "another"}, "model"),
    ],
)
def test_another_identity_is_refused(change, says, tmp_path):
    run("ekf", tmp_path)
    with pytest.raises(CheckpointError, match=f"another task: its {says}"):
        run("ekf", tmp_path, identity=IDENTITY | change)


@pytest.mark.parametrize(
    "task",
    [
        make_task(replace(FITS["ekf"], epochs=3)),
        make_task(FITS["ekf"], seed=1),
        make_task(FITS["ekf"], shots=14),
        make_task(FITS["vdekf"]),
    ],
    ids=["epochs", "seed", "shots", "family"],
)
def test_other_settings_are_refused(task, tmp_path):
    with pytest.raises(Killed):
        run("ekf", tmp_path, on_step=kill_after(3))
    with pytest.raises(CheckpointError, match="belongs to another task"):
        run_fit(task, tmp_path, IDENTITY, SingleProcess(), "cpu", checkpoint_every=2)


def test_no_space_left_is_a_storage_error_and_the_last_checkpoint_stands(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run("ekf", tmp_path, on_step=kill_after(3))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(StorageError, match="no space left"):
            run("ekf", tmp_path)
    assert latest(tmp_path).manifest["step"] == 2
    assert_same_bits(run("ekf", tmp_path), run("ekf", tmp_path.with_name("straight")))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, Path]:
    """One process that never stopped."""
    return run_all(SingleProcess(), tmp_path_factory.mktemp("straight"), kill=None)


@pytest.fixture(scope="module")
def killed_on_four(tmp_path_factory) -> Path:
    """Checkpoints after step 4, written by four ranks that were then killed."""
    folder = tmp_path_factory.mktemp("four")
    run_ranks(4, run_all, folder, 5)
    return folder


@pytest.mark.parametrize("world_size", some_slow([1, 2, 3], 3))
def test_any_number_of_ranks_continues_what_four_wrote(world_size, killed_on_four, straight, tmp_path):
    folder = Path(shutil.copytree(killed_on_four, tmp_path / "copy"))
    for family in RANKED:
        found = latest(folder / family)
        assert found.manifest["step"] == 4
        assert len(found.manifest["pieces"]) == 4
    ends = run_ranks(world_size, run_all, folder, None) if world_size > 1 else [run_all(SingleProcess(), folder, None)]
    assert len({str(end) for end in ends}) == 1
    for family, end in ends[0].items():
        assert len(checkpoint.load(end).manifest["pieces"]) == world_size
        assert set(everything_in(end)) == set(everything_in(straight[family]))
        found, expected = stands_for(end, family), stands_for(straight[family], family)
        for name in expected:
            assert found[name].dtype == torch.float64
            assert max_error(found[name], expected[name]) < 1e-10, (family, name)


@pytest.mark.slow
def test_four_ranks_resume_bitwise(killed_on_four, tmp_path):
    resumed = run_ranks(4, run_all, Path(shutil.copytree(killed_on_four, tmp_path / "copy")), None)[0]
    straight = run_ranks(4, run_all, tmp_path / "straight", None)[0]
    for family in RANKED:
        assert_same_bits(resumed[family], straight[family])
