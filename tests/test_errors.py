"""Names that were misspelt."""

from kngd_ray.errors import closest, nearest


def test_the_end_of_a_message_guesses_and_lists() -> None:
    assert nearest("shot", ["shots", "path"]) == "; did you mean shots? (valid: path, shots)"
    assert nearest("shot", ["shots"], "data") == "; did you mean data.shots? (valid: shots)"
    assert nearest("xyz", ["shots"]) == " (valid: shots)"
    assert nearest("shots", []) == ""


def test_closest_ignores_case_and_ranks() -> None:
    names = ["ViT-B-32", "ViT-B-16", "RN50"]
    assert closest("vit-b-31", names, n=2) == ["ViT-B-32", "ViT-B-16"]
    assert closest("vit-b-31", names, n=3, cutoff=0) == names
    assert closest("mondy", names) == []
