"""`make gpu`, as far as it goes without a GPU: on the CPU, with small sizes."""

import json

import pytest
import torch

from benchmarks import gpu


def test_a_machine_without_a_gpu_is_told_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("make gpu needs ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_lack_of_a_build_and_of_a_gpu_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without it" in gpu.missing("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds none on this machine" in gpu.missing("cuda")
    assert gpu.missing("cpu") is None


def test_a_part_that_fails_or_comes_too_late_leaves_the_others(monkeypatch):
    def fails():
        raise ValueError("a distinctive reason")

    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(gpu, "perf_counter", lambda: next(now))
    found = gpu.run({"one": lambda: 1, "two": fails, "three": lambda: 3}, seconds=35)
    assert found["one"]["result"] == 1
    assert found["two"]["reason"] == "ValueError: a distinctive reason"
    assert found["three"]["result"] is None
    assert found["three"]["reason"] == "left out: 35 s had passed"


def test_bars_are_judged_by_the_worst(monkeypatch):
    heads = [{"method": "diagonal ekf", "x_adamw": x} for x in (1.0, 1.3)]
    towers = [
        {"model": model, "method": method, "x_adamw": x, "peak_x_adamw": 1.1}
        for model, method, x in (("a", "ekf", 9.0), ("b", "adamw", 1.0), ("b", "ekf", 1.4), ("b", "vdekf", 9.0))
    ]
    found = gpu.judged({"step_cost": {"result": heads}, "tower_cost": {"result": towers}})
    assert found["head_time"] == {"found": 1.3, "most": 1.2, "met": False}
    assert found["tower_time"] == {"found": 1.4, "most": 1.5, "met": True}
    assert found["tower_memory"]["met"]
    assert gpu.judged({"step_cost": {"result": None}, "tower_cost": {"result": None}}) == {}


@pytest.mark.slow
def test_all_of_it_on_the_cpu(tmp_path):
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["tests"]["result"]["passed"] > 0
    assert {line["method"] for line in found["tower_cost"]["result"]} == {"adamw", "ekf"}
    assert {line["device"] for line in found["step_cost"]["result"]} == {"cpu"}
    assert all(0 < line["accuracy"] <= 1 for line in found["few_shot"]["result"])
    assert set(found["bars"]) == {"head_time", "tower_time", "tower_memory"}
