"""What the front page shows in Python runs as it is, on a folder of pictures."""

import re
from importlib import resources
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]


def write_pictures(folder: Path, skip: int) -> None:
    """Eight pictures of each of three classes, as a user has them."""
    with resources.as_file(resources.files("kngd_ray") / "assets" / "emoji.parquet") as path:
        table = pq.read_table(path, columns=["image", "class_name", "domain"])
    rows = [row for row in table.to_pylist() if row["domain"] == "noto"]
    for name in sorted({row["class_name"] for row in rows})[:3]:
        own = [row["image"] for row in rows if row["class_name"] == name][skip : skip + 8]
        (folder / name).mkdir(parents=True)
        for number, data in enumerate(own, start=1):
            (folder / name / f"{number}.png").write_bytes(data)


def test_sixty_seconds_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, as the examples: a third of a process of its own would be imports."""
    (block,) = re.findall(r"## Sixty seconds in Python\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    write_pictures(tmp_path / "flowers", 0)
    write_pictures(tmp_path / "new_flowers", 8)
    first = sorted(path.name for path in (tmp_path / "flowers").iterdir())[0]
    for name in ("flowers", "new_flowers"):
        (tmp_path / name / first).rename(tmp_path / name / "rose")
    for name in ("MLFLOW_TRACKING_URI", "KNGD_STORAGE_PATH"):  # where a user has them set, results go there
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), names := {"__name__": "__main__"})
    assert {"method", "seed", "set", "accuracy", "nll", "ece"} <= set(names["run"].frame.columns)
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "mlflow.db").is_file()


def test_no_page_has_the_name_of_a_page_that_sphinx_writes() -> None:
    """It would be overwritten without a warning."""
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages.isdisjoint({"search", "genindex", "py-modindex"})
    assert "tuning" in pages
