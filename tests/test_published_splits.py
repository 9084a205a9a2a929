"""The published splits are those that are drawn."""

from benchmarks.few_shot.data import DataSet
from benchmarks.few_shot.splits import FOLDER, as_text, splits_of


def test_the_emoji_are_as_published_and_fewer_shots_are_the_first() -> None:
    data = DataSet("embedded")
    found = splits_of(data)
    assert (FOLDER / "emoji.json").read_text() == as_text(found)
    two = {data.images.keys[row].decode()[:16] for row in data.shots("noto", 2, seed=3).tolist()}
    assert two == {key for keys in found["shots"]["noto"]["3"].values() for key in keys[:2]}
