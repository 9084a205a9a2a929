"""Search files and what may be asked of a search: wrong input is refused before anything is started."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import kngd_ray
from kngd_ray.config import load_config
from kngd_ray.configs import names
from kngd_ray.errors import UsageError
from kngd_ray.tuning import plain_space
from kngd_ray.tuning.file import load_search, search_yaml

ROOT = Path(__file__).parents[2]
PACKAGE = Path(kngd_ray.__file__).parent
FILES = sorted((ROOT / "tune_configs").glob("*.yaml"))
SEARCH: dict[str, Any] = {
    "preset": "kalman_diagonal",
    "epochs": 1,
    "search": {"num_samples": 4, "batch": 2, "seeds": [0], "sampler": "random"},
    "space": {"filter.p0": {"low": 0.001, "high": 1.0, "log": True}},
}


@pytest.fixture
def search(command):
    """Runs a search of the small data, from a file with the given content."""

    def run(*settings: str, content: dict[str, Any] = SEARCH):
        file = command.folder / "search.yaml"
        file.write_text(yaml.safe_dump(content))
        return command("tune", file, *command.settings(*settings))

    return run


def refused(command, outcome, *words: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.sentence
    assert not command.runs.exists(), "nothing was started"


def test_the_shipped_files_are_there() -> None:
    names = {
        "noise_priors.yaml",
        "diagonal_priors.yaml",
        "adapters.yaml",
        "adamw_baseline.yaml",
        "pareto.yaml",
        "smoke.yaml",
    }
    assert {path.name for path in FILES} >= names


def test_searches_to_copy_are_those_of_the_package(subtests) -> None:
    shipped = {f"{name}.yaml" for name in names("searches")}
    assert {path.name for path in FILES} == shipped
    for path in FILES:
        with subtests.test(path.stem):
            assert path.read_bytes() == (PACKAGE / "configs" / "searches" / path.name).read_bytes()


def test_a_shipped_search_is_known_by_its_name_in_any_folder(command) -> None:
    (command.folder / "pareto").mkdir()  # a folder is no search
    for name in ("noise_priors", "pareto"):
        printed = command("tune", name, "search.num_samples=7", "--print-config")
        assert printed.code == 0, printed.err
        assert "num_samples: 7" in printed.out
    refused(command, command("tune", "noise_prior"), "there is no search 'noise_prior'; did you mean noise_priors")


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_shipped_files_make_sense_and_print_as_files(file: Path, command) -> None:
    search = load_search(file, [])
    assert search.points[0], "the preset lies in the space"
    printed = command("tune", file, "search.num_samples=7", "--print-config")
    assert printed.code == 0, printed.err
    again = command.folder / "printed.yaml"
    again.write_text(printed.out)
    assert load_search(again, []) == load_search(file, ["search.num_samples=7"])


def test_settings_over_a_file(command) -> None:
    smoke = ROOT / "tune_configs" / "smoke.yaml"
    changes = [
        "search.num_samples=3",
        "search.objective=held_out_nll,held_out_accuracy",
        "space.filter.logit_variance=null",
        "space.epochs={low: 1, high: 4, integer: true}",
        "space.observation.0.r0={low: 0.5, high: 2}",
        "data.shots=2",
    ]
    search = load_search(smoke, changes)
    assert (search.options.num_samples, search.options.seeds) == (3, (0, 1))
    assert search.options.objective == ("held_out_nll", "held_out_accuracy")
    assert search.config.data.shots == 2
    assert plain_space(search.space) == {
        "observation.0.r0": {"low": 0.5, "high": 2.0, "log": False, "integer": False},
        "epochs": {"low": 1.0, "high": 4.0, "log": False, "integer": True},
    }


def test_a_space_may_come_from_the_command_line_alone(search) -> None:
    content = {key: SEARCH[key] for key in ("preset", "epochs", "search")}
    assert search("space.filter.p0={low: 0.1, high: 1}", "--print-config", content=content).code == 0


def test_no_file(command) -> None:
    refused(command, command("tune"), "name a search, such as noise_priors or a YAML file, or --resume SEARCH")
    refused(command, command("tune", "search.num_samples=3"), "name a search, ")


def test_a_missing_file_names_the_nearest(command, search) -> None:
    search("--print-config")
    refused(command, command("tune", command.folder / "serch.yaml"), "there is no configuration file", "search.yaml")
    refused(command, command("tune", command.folder), "cannot be read")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["search.samplr=tpe"], ["search: unknown key 'samplr'; did you mean sampler?"]),
        (["search.num_samples=0"], ["search: num_samples is 0"]),
        (
            ["search.objective=null"],
            ["objective is []; name one or more (log_posterior, evidence, held_out_nll, held_out_accuracy)"],
        ),
        (["search.objective=[]"], ["name one or more (log_posterior, evidence, held_out_nll, held_out_accuracy)"]),
        (["search.seeds=null"], ["search: seeds is []; name at least one"]),
        (["search=3"], ["'search=3' changes the whole of search", "search.KEY=VALUE"]),
        (["space={filter.p0: {low: 1, high: 2}}"], ["changes the whole of space"]),
        (["space.filter.p=null"], ["drops what the space does not have; did you mean filter.p0?"]),
        (["space.filter.p0=null"], ["space is empty"]),
        (["space.filter.p0={low: 1, high: 1}"], ["space.filter.p0: low is 1 and high is 1; the range is empty"]),
        (["space.filter.p00={low: 1, high: 2}"], ["did you mean filter.p0?"]),
        (["space.data.shots={low: 1, high: 2}"], ["space.data.shots is not a setting of a fit"]),
        (["space.epochs={low: 1, high: 3}"], ["space.epochs cannot be 1.764: ", "; add integer: true"]),
        (
            ["space.posterior.temperature={low: 0.1, high: 1.0}"],
            ["space.posterior.temperature has no effect with search.objective=evidence", "take held_out_nll"],
        ),
        (
            ["space.batch_size={low: 8, high: 32, integer: true}"],
            ["score trials on different shots", "take search.objective=held_out_nll, or leave it out"],
        ),
        (
            ["space.batch_size={low: 8, high: 32, integer: true}", "search.objective=held_out_nll,evidence"],
            ["score trials on different shots"],
        ),
        (["space.optimizer.lr={low: 1, high: 2}"], ["no effect with method=kalman"]),
        (["method=adamw"], ["preset kalman_diagonal is for method=kalman, and method is adamw"]),
        (
            ["method=adamw", "preset=adamw"],
            ["search.objective is evidence, which adamw does not have: use held_out_nll"],
        ),
        (["search.objective=held_out_nll", "posterior.folds=0"], ["posterior.folds is 0: set posterior.folds=4"]),
        (["search.objective=held_out_nll", "posterior.folds=1"], ["folds is 1; give 2 or more"]),
        (["search.scheduler=asha"], ["search.scheduler is asha, which needs Ray", "trainer.num_workers is 0"]),
        (["search.scheduler=asha", "search.objective=evidence,held_out_nll"], ["one objective"]),
        (["search.scheduler=asha", "search.trial=batched", "trainer.num_workers=2"], ["take trial=local or train"]),
        (["search.trial=train"], ["search.trial is train", "give its jobs at least one worker"]),
        (["search.start=kalmn"], ["search.start: there is no preset 'kalmn'; did you mean kalman?"]),
        (["search.start=mine.yaml"], ["search.start: there is no configuration file mine.yaml"]),
        (["prior=elsewhere"], ["every trial of a search starts from CLIP's own weights"]),
        (["trainer.name=a/b"], ["it names a folder"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_wrong_settings(command, search, settings: list[str], words: list[str]) -> None:
    refused(command, search(*settings), *words)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"epochs": 1}, "has no space: name the settings to search, as the shipped noise_priors does"),
        ({**SEARCH, "search": [1]}, "search must hold `key: value` settings, and is [1]"),
        ({**SEARCH, "space": 3}, "space must hold `key: value` settings, and is 3"),
        *(
            ({**SEARCH, key: nothing}, f"{key} must hold `key: value` settings, and is {nothing!r}")
            for key in ("search", "space")
            for nothing in (0, [], "", False)
        ),
        *(({**SEARCH, "space": nothing}, "has no space: name the settings to search") for nothing in (None, {})),
        ({**SEARCH, "search": {"objective": None}}, "search: objective is []; name one or more"),
        ({**SEARCH, "space": {"filter.p0": [0.1, 1]}}, "give {low: .., high: ..} or {choices: [..]}"),
        ({**SEARCH, "serch": {}}, "did you mean"),
    ],
)
def test_wrong_files(command, search, content: dict[str, Any], word: str) -> None:
    refused(command, search(content=content), word)


def test_a_search_file_has_a_key_once(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("space:\n  epochs: {low: 1, high: 3}\n  epochs: {low: 5, high: 9}\n")
    with pytest.raises(UsageError, match=r"twice\.yaml has space\.epochs twice, at lines 2 and 3: leave one of them"):
        load_search(path, [])


def test_what_only_held_out_shots_can_judge_may_be_searched_with_them() -> None:
    """Both are refused with evidence."""
    changes = [
        "search.objective=held_out_nll",
        "space.batch_size={low: 8, high: 32, integer: true}",
        "space.posterior.temperature={low: 0.1, high: 1.0}",
    ]
    assert len(load_search(ROOT / "tune_configs" / "smoke.yaml", changes).space.dimensions) == 4


def test_an_empty_search_is_that_of_the_defaults(search) -> None:
    for nothing in (None, {}):
        assert search("--print-config", content={**SEARCH, "search": nothing}).code == 0


def test_the_preset_is_at_the_medians_of_noise_priors() -> None:
    search = load_search(ROOT / "tune_configs" / "noise_priors.yaml", [])
    (point,) = search.points
    assert set(point) == {dimension.key for dimension in search.space.dimensions}
    assert search.space.log_prior(point) == 0
    assert search.config.fit_options == load_config(overrides=["method=kalman"]).fit_options


def test_presets_that_diagonal_priors_starts_from_lie_in_its_space() -> None:
    points = load_search(ROOT / "tune_configs" / "diagonal_priors.yaml", []).points
    shared = {
        "filter.gate": "none",
        "noise.process": "random_walk",
        "noise.process.q": 1e-8,  # theirs is 0, which a logarithmic range has not
    }
    assert points == [
        {
            "observation": "log_likelihood",
            "observation.0.r0": 1.0,
            "filter.logit_variance": 30.0,
            "noise.observation": "fixed",
            **shared,
        },
        {
            "observation": "probability",
            "observation.0.r0": 0.05,
            "filter.logit_variance": 5.0,
            "noise.observation": "ema",
            "noise.observation.beta": 0.95,
            **shared,
        },
    ]


def test_a_search_starts_at_the_same_file_from_whatever_folder(
    command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (command.folder / "mine.yaml").write_text("filter: {logit_variance: 7}")
    smoke = ROOT / "tune_configs" / "smoke.yaml"
    monkeypatch.chdir(command.folder)
    search = load_search(smoke, ["search.start=kalman,kalman_diagonal,mine.yaml"])
    assert search.options.start == ("kalman", "kalman_diagonal", str(command.folder / "mine.yaml"))
    assert [point.get("filter.logit_variance") for point in search.points] == [1000, 30, 7]
    assert not search.notes
    (command.folder / "wide.yaml").write_text("filter: {logit_variance: 5000}")
    assert load_search(smoke, ["search.start=wide.yaml"]).notes == [
        "trial 0 is not quite the preset wide: it has filter.logit_variance=1000.0 for 5000.0, the nearest in the space"
    ]
    (open_space,) = load_search(
        smoke, ["space.filter.p0={low: 0.1, high: 1}", "space.filter.logit_variance=null"]
    ).notes
    assert open_space.endswith(
        "kalman_diagonal, which has no value of the space for filter.p0: the sampler chooses one"
    )
    saved = tmp_path / "saved.yaml"
    saved.write_text(search_yaml(search))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_search(saved, ["preset=kalman_diagonal"]).points == search.points


def test_train_says_what_a_search_file_is_for(command) -> None:
    smoke = ROOT / "tune_configs" / "smoke.yaml"
    refused(command, command("train", smoke), f"{smoke} is a search file: run it with kngd-ray tune")
    refused(command, command("train", f"preset={smoke}"), "is a search file")
    dotted = command.folder / "dotted.yaml"
    dotted.write_text("search.num_samples: 3")
    refused(command, command("train", dotted), "is a search file")


# What there is of a search by its name


@pytest.fixture
def searched(search, command):
    """The folder of a search that is finished, its winner not fitted."""
    outcome = search("trainer.name=mine", "search.refit=false", "search.num_samples=2", "--json")
    assert outcome.code == 0, outcome.err
    return command.run("mine")


def test_names_of_searches(searched, command) -> None:
    """One test of many questions, as each search costs a second."""
    storage = f"trainer.storage_path={command.runs}"

    def says(outcome, code: int, *words: str) -> None:
        assert outcome.code == code, outcome.err
        for word in words:
            assert word in outcome.sentence

    again = command("tune", command.folder / "search.yaml", *command.settings("trainer.name=mine"))
    says(again, 2, "the run mine exists", "--resume mine")
    fixed = "a continued search keeps its settings: leave out"
    for setting in ("epochs=3", "search.sampler=tpe", "space.epochs={low: 1, high: 2}", "data.shots=2"):
        says(command("tune", storage, setting, "--resume", "mine"), 2, fixed, setting, "search.num_samples")
    says(command("tune", "search.yaml", storage, "--resume", "mine"), 2, "leave out search.yaml")
    says(command("tune", storage, "--resume", "min"), 1, "there is no run min", "did you mean mine?")
    says(command("tune", storage, "search.num_samples=0", "--resume", "mine"), 2, "num_samples is 0")

    says(command("train", storage, "--resume", "mine"), 2, "mine is a search", "kngd-ray tune --resume mine")
    says(command("train", *command.settings("prior=mine")), 1, "mine is a search that has not fitted its winner")
    at = ("--storage-path", command.runs)
    says(command("evaluate", "mine", *at), 1, "has not fitted its winner", "champion.yaml")
    says(command("evaluate", searched, *at), 1, "has not fitted its winner")

    assert command.train("trainer.name=run").code == 0
    says(command("tune", storage, "--resume", "run"), 1, "run is not a search", "kngd-ray train --resume run")
