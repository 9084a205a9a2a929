"""The study on disk: whenever a search is killed, whoever goes on with it, its history is that of an unbroken one."""

import json
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.searching import POINT, SPACE, TWO, die, drive, history, open_study, score
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from kngd_ray.errors import CheckpointError, StorageError
from kngd_ray.tuning import JOURNAL, parse_space


class Killed(BaseException):
    """Stands for whatever ends a process between two writes."""


@pytest.fixture
def killed_at_write(monkeypatch):
    """Sets after how many writes to the journal a driver dies; None lets it live."""
    append, left = JournalFileBackend.append_logs, [None]

    def counting(self, logs) -> None:
        if left[0] is not None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
        append(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", counting)
    return lambda writes: left.__setitem__(0, writes)


def unbroken(folder: Path, **options):
    study = open_study(folder, **options)
    drive(study)
    return history(study)


@pytest.mark.parametrize("objective", [("evidence",), TWO], ids=["one", "two"])
@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "gp"])
def test_a_killed_search_has_the_history_of_an_unbroken_one(sampler, objective, tmp_path: Path) -> None:
    """Drivers that run three trials each and die with the claim of two more; no trial is run twice."""
    options = {"sampler": sampler, "objective": objective}
    if sampler == "gp":  # whose fits take a second
        options["num_samples"] = 8
    expected = unbroken(tmp_path / "whole", **options)
    ran: list[int] = []
    while True:
        study = open_study(tmp_path / "killed", **options)
        ran += drive(study, most=3)
        if not study.claim(2):
            break
        die(study)
    assert history(study) == expected
    assert sorted(ran) == list(range(len(expected)))
    assert expected[0][2].items() >= POINT.items(), "the first trial is the given point"
    if sampler != "nsga2":  # whose children may be as their parents were
        assert len({json.dumps(settings) for _, _, settings, _ in expected}) == len(expected)


@pytest.mark.parametrize(
    ("sampler", "objective", "batch", "from_write"),
    [pytest.param("tpe", ("evidence",), 10, 75, marks=pytest.mark.slow), ("nsga2", TWO, 3, 2)],
)
def test_it_may_die_between_any_two_writes(sampler, objective, batch, from_write, tmp_path, killed_at_write) -> None:
    """A suggestion that was half written is completed as it would have been; TPE's from when it no longer draws."""
    options = {"sampler": sampler, "objective": objective, "batch": batch, "num_samples": 4 + batch}
    expected = unbroken(tmp_path / "whole", **options)
    for writes in range(from_write, 200):
        killed_at_write(writes)
        study = open_study(tmp_path / f"{writes}", **options)
        try:
            drive(study)
        except Killed:
            die(study)
        else:
            return  # it came to its end before
        finally:
            killed_at_write(None)
        again = open_study(tmp_path / f"{writes}", **options)
        drive(again)
        assert history(again) == expected, writes
    pytest.fail("the search never came to its end")


def test_a_line_that_was_half_written(tmp_path: Path) -> None:
    """The disk was full, or the machine went down: what is before it counts."""
    expected = unbroken(tmp_path / "whole")
    folder = tmp_path / "torn"
    study = open_study(folder)
    drive(study, most=6)
    die(study)
    with (folder / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code": 6, "trial_')
    again = open_study(folder)
    drive(again)
    assert history(again) == expected


def test_several_drivers_share_a_batch(tmp_path: Path) -> None:
    expected = unbroken(tmp_path / "one")
    first, second = open_study(tmp_path / "two"), open_study(tmp_path / "two")
    mine, others = first.claim(3), second.claim(3)
    assert [trial.number for trial in mine] == [0, 1, 2]
    assert [trial.number for trial in others] == [3]
    assert first.claim() is None, "the next batch knows the results of all of this one"
    for study, trials in ((second, others), (first, mine)):
        for trial in trials:
            study.finish(trial.number, score(trial.settings, ["evidence"]), {})
    assert drive(second) == list(range(4, 12))
    assert first.claim() == []
    assert history(first) == history(second) == expected


def test_a_dead_drivers_trials_are_taken_over_and_a_living_ones_are_not(tmp_path: Path) -> None:
    living, dead, heir = (open_study(tmp_path / "study") for _ in range(3))
    kept, left = living.claim(1), dead.claim(2)
    die(dead)
    taken = heir.claim(4)
    assert {trial.number for trial in kept} == {0}
    assert [trial for trial in taken if trial.number in (1, 2)] == left, "as the trials they were"
    assert [trial.number for trial in taken] == [1, 2, 3]
    living.close()
    assert heir.claim(4) == kept, "one that was closed gives up its trials"


def _work(folder: Path, seconds: float, begun: Any = None) -> None:
    study = open_study(folder, num_samples=24, batch=6)
    while (claimed := study.claim(2)) != []:
        if begun is not None:  # nobody goes on before each has trials of the first batch, however slow it started
            begun.wait(60)
            begun = None
        time.sleep(seconds)
        for trial in claimed or ():
            with (folder / "ran").open("a") as file:
                file.write(f"{os.getpid()} {trial.number}\n")
            study.finish(trial.number, score(trial.settings, ["evidence"]), {})
    study.close()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    open_study(folder).close()
    fork = multiprocessing.get_context("fork")  # most of a new one would be imports
    begun = fork.Barrier(2)
    processes = [fork.Process(target=_work, args=(folder, seconds, begun)) for seconds in (0.01, 0.03)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    ran = [line.split() for line in (folder / "ran").read_text().splitlines()]
    assert sorted(int(number) for _, number in ran) == list(range(24)), "each once"
    assert len(Counter(pid for pid, _ in ran)) == 2
    open_study(tmp_path / "one").close()
    _work(tmp_path / "one", 0.0)
    one, two = (open_study(tmp_path / name) for name in ("one", "two"))
    assert history(two) == history(one)


def test_a_search_may_be_prolonged(tmp_path: Path) -> None:
    study = open_study(tmp_path / "study", num_samples=8)
    drive(study)
    before = history(study)
    study.close()
    longer = open_study(tmp_path / "study", num_samples=12)
    assert drive(longer) == [8, 9, 10, 11]
    assert history(longer)[:8] == before
    assert history(longer) == unbroken(tmp_path / "whole", num_samples=12), "8 is a whole number of batches"
    shorter = open_study(tmp_path / "study", num_samples=4)
    assert shorter.claim() == []


def test_what_became_of_trials(tmp_path: Path) -> None:
    study = open_study(tmp_path / "study", num_samples=4)
    study.claim(4)
    study.report(1, 1, 0.5)
    study.stop(1)
    study.fail(2, "its process died")
    study.finish(3, {"evidence": float("nan")}, {})
    assert study.best() == []
    study.finish(0, {"evidence": -1.5}, {"by_seed": {"evidence": [-1.0, -2.0]}})
    finished, stopped, failed, infinite = study.results()
    assert (finished.state, finished.objective) == ("finished", {"evidence": -1.5})
    assert finished.figures == {"by_seed": {"evidence": [-1.0, -2.0]}}
    assert (stopped.state, stopped.objective, stopped.reason) == ("stopped", {}, None)
    assert (failed.state, failed.reason) == ("failed", "its process died")
    assert (infinite.state, infinite.reason) == ("failed", "an objective is not finite (evidence nan)")
    assert [best.number for best in study.best()] == [0]
    assert study.claim() == []


def test_the_front_is_sorted_by_the_first_objective(tmp_path: Path) -> None:
    study = open_study(tmp_path / "study", num_samples=4, objective=TWO)
    for trial, (accuracy, nll) in zip(study.claim(4), [(0.5, 0.4), (0.9, 0.8), (0.4, 0.9), (0.7, 0.6)], strict=True):
        study.finish(trial.number, dict(zip(TWO, (accuracy, nll), strict=True)), {})
    assert [best.number for best in study.best()] == [1, 3, 0]


def test_the_least_nll_wins_and_the_greatest_evidence(tmp_path: Path) -> None:
    for objective, winner in (("held_out_nll", 0), ("evidence", 1)):
        study = open_study(tmp_path / objective, num_samples=2, objective=(objective,))
        study.claim(2)
        study.finish(0, {objective: -2.0}, {})
        study.finish(1, {objective: -1.0}, {})
        assert study.best()[0].number == winner


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "not a journal\n" + text,
        lambda text: text.replace('"op_code"', '"opcode"', 1),
        lambda text: text.replace("{", "", 3),
        lambda text: "[]\n" + text,
    ],
    ids=["text", "key", "braces", "list"],
)
def test_a_damaged_journal_is_one_sentence(damage, tmp_path: Path) -> None:
    study = open_study(tmp_path / "study")
    drive(study, most=6)
    study.close()
    journal = tmp_path / "study" / JOURNAL
    journal.write_text(damage(journal.read_text()))
    with pytest.raises(CheckpointError, match=r"study\.journal is damaged .*: start the search again\.$") as error:
        drive(open_study(tmp_path / "study"))
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "drivers").write_text("a file where a folder should be")
    with pytest.raises(StorageError):
        open_study(tmp_path / "study")


def test_optunas_own_tools_open_the_study(tmp_path: Path) -> None:
    study = open_study(tmp_path / "study")
    drive(study)
    study.close()
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study" / JOURNAL)))
    found = optuna.load_study(study_name="study", storage=storage)
    assert len(found.trials) == 12
    assert found.best_trial.number == study.best()[0].number
    assert {t.state for t in found.trials} == {TrialState.COMPLETE, TrialState.FAIL}
    assert set(found.trials[0].params) <= {d.key for d in SPACE.dimensions}


def test_a_trial_whose_settings_were_lost_gets_them_again(tmp_path: Path) -> None:
    """Optuna's own record of a trial is what counts, not what another space would suggest."""
    study = open_study(tmp_path / "study")
    before = study.claim(1)
    die(study)
    narrow = parse_space({"filter.p0": {"low": 1e-3, "high": 10.0, "log": True}})
    again = open_study(tmp_path / "study", space=narrow).claim(1)
    assert again[0].settings == {"filter.p0": before[0].settings["filter.p0"]}


def test_opening_a_study_writes_nothing_and_its_folder_may_be_renamed(tmp_path: Path) -> None:
    study = open_study(tmp_path / "study")
    drive(study)
    study.close()
    before, journal = history(study), (tmp_path / "study" / JOURNAL).read_bytes()
    (tmp_path / "study").rename(tmp_path / "renamed")
    again = open_study(tmp_path / "renamed")
    assert history(again) == before
    assert again.claim() == []
    assert (tmp_path / "renamed" / JOURNAL).read_bytes() == journal


@pytest.mark.parametrize("objective", [("evidence",), TWO], ids=["one", "two"])
def test_the_values_have_names(objective, tmp_path: Path) -> None:
    study = open_study(tmp_path / "s", objective=objective)
    assert study.study.metric_names == list(objective)
    assert open_study(tmp_path / "s", objective=objective).study.metric_names == list(objective)
