"""Files that several write at once, and file systems that lack what others have."""

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from kngd_ray.errors import KngdError
from kngd_ray.experiment.run_folder import DrivenElsewhereError, locked
from kngd_ray.storage import take_lock, temporary_beside, write_text


def test_several_writers_of_one_file_leave_one_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "tracking.json"
    texts = [str(n) * 20_000 for n in range(4)]
    path.write_text(texts[0])
    problems: list[Any] = []
    over = threading.Event()

    def write(text: str) -> None:
        for _ in range(40):
            try:
                write_text(path, text)
            except KngdError as error:
                problems.append(error)

    def read() -> None:
        while not over.is_set():
            if (found := path.read_text()) not in texts:
                problems.append(found[:20])

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    reader.join()
    assert not problems
    assert os.listdir(tmp_path) == ["tracking.json"]


def test_what_killed_writers_left_is_swept_away_and_what_others_are_writing_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    old, young = temporary_beside(path), temporary_beside(path)
    for each in (old, young):
        each.touch()
    os.utime(old, (0, 0))
    write_text(path, "x")
    assert sorted(tmp_path.iterdir()) == sorted([path, young])


def test_a_name_that_is_no_text_is_written_by_its_bytes(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "a\udce9.png")
    assert (tmp_path / "page.html").read_text() == "a\\udce9.png"


def test_a_file_system_without_locks_is_not_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with locked(tmp_path), pytest.raises(DrivenElsewhereError, match="driven by another process"), locked(tmp_path):
        pass

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert "is on a file system without file locks (No locks available)" in caplog.text
    with (tmp_path / "x").open("w") as file, pytest.raises(KngdError, match=r"give trainer\.storage_path on another"):
        take_lock(file, tmp_path)
