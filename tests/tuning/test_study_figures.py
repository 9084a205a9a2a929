"""Pictures of a study: each as a still and as a page, the pages with one script between them."""

from pathlib import Path

import matplotlib
import optuna
import pytest

from kngd_ray.errors import StorageError
from kngd_ray.tuning.figures import study_figures

optuna.logging.set_verbosity(optuna.logging.ERROR)


def study(trials: int) -> optuna.Study:
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("filter.p0", 0.1, 1.0) + trial.suggest_float("observation.0.r0", 0.1, 1.0)

    made = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    made.optimize(objective, trials)
    return made


def test_pages_share_one_script(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    style = dict(matplotlib.rcParams)
    names = study_figures(study(6), ["held_out_nll"], folder)
    assert dict(matplotlib.rcParams) == style, "a notebook's own figures would change"
    assert set(names) == {"history", "importances", "parallel_coordinates", "contour"}
    pages = {f"{name}{suffix}" for name in names for suffix in (".png", ".html")}
    assert {path.name for path in folder.iterdir()} == pages | {"plotly.min.js"}
    for name in names:
        page = (folder / f"{name}.html").read_text()
        assert page.count("src=") == 1
        assert '<script src="plotly.min.js" onerror=' in page
        assert f"see {name}.png" in page, "what is said where the script is not beside it"
        assert "Plotly.newPlot(" in page
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6


def test_a_study_without_trials_leaves_no_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kngd_ray.tuning.figures._plots", lambda *arguments: {})
    assert study_figures(study(0), ["held_out_nll"], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        study_figures(study(2), ["held_out_nll"], tmp_path / "file" / "figures")
