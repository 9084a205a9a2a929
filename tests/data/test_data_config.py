from pathlib import Path

import pytest

from kngd_ray.data import DataConfig


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"path": ""}, "path is empty"),
        ({"path": ()}, "path is empty"),
        ({"shots": 0}, "shots is 0: it must be 1 or more"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0: it must lie between 0 and 1"),
        ({"classes": ("cat",)}, "classes names 1: name two or more"),
        ({"classes": ("cat", "cat")}, "classes names a class twice"),
        ({"templates": ()}, "templates is empty"),
    ],
)
def test_values_out_of_range_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**fields)


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert DataConfig().cache_root == tmp_path / ".cache/kngd_ray/features"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert DataConfig().cache_root == Path("/somewhere/kngd_ray/features")
    assert DataConfig(cache_dir="~/features").cache_root == tmp_path / "features"
