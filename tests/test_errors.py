"""Names that were misspelt, and texts made fit to be shown."""

import unicodedata

import pytest

from kngd_ray.errors import closest, nearest, printable, redact, spelled


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


SECRET = "pL4nt3d0/x+Y7z9=="


@pytest.mark.parametrize(
    "text",
    [
        "https://b.s3.amazonaws.com/a.parquet?X-Amz-Algorithm=AWS4&X-Amz-Credential={}&X-Amz-Signature={}",
        "https://b.s3.amazonaws.com/a?AWSAccessKeyId={}&Signature={}&Expires=1",
        "https://b.s3.amazonaws.com/a?x-amz-security-token={}",
        "https://a.blob.core.windows.net/c?sv=2024-01-01&sr=c&sp=r&sig={}",
        "DefaultEndpointsProtocol=https;AccountKey={}",
        "https://storage.googleapis.com/b/a?GoogleAccessId={}&X-Goog-Signature={}",
        "https://d1.cloudfront.net/a?Policy={}&Signature={}&Key-Pair-Id={}",
        "https://maps.example.org/a?key={}&x=1",
        "https://example.org/a?api_key={}",
        "https://example.org/a?apikey={} and",
        "https://login.example.org/?next=https%3A%2F%2Fa%2F%3Fapi_key%3D{}",
        "postgresql://me:{}@host/db",
        "401 for header Authorization: Bearer {}",
        "Authorization: Basic {}",
        'said {{"api_key": "{}", "a": 1}}',
        "x-api-key: {}",
        "AWS_SECRET_ACCESS_KEY={}",
        "HF_TOKEN={} kngd-ray",
        "client_secret={}",
    ],
)
def test_a_secret_is_taken_out_of_a_text(text: str) -> None:
    shown = redact(text.format(*["pL4nt3d0xY7z9" if "://me" in text else SECRET] * 3))
    assert "pL4nt3d0" not in shown
    assert "***" in shown
    assert redact(shown) == shown


@pytest.mark.parametrize("key", ["hf_" + "aB3" * 11, "AKIA" + "ABCD" * 4, "ghp_" + "a1" * 18, "sk-" + "aB3_" * 9])
def test_a_key_is_known_by_its_shape(key: str) -> None:
    assert redact(f"refused ({key}): try again") == "refused (***): try again"


@pytest.mark.parametrize(
    "text",
    [
        "there is no token: run `ray get-auth-token --generate`",
        "set RAY_AUTH_MODE=token and put the token of its head into ~/.ray/auth_token",
        "sigma=3 signal=1 design=x",
        "the basic configuration: see a/b?c=d&page=2",
        "mail me@example.org",
        "noise.process.q=1e-4 data.path=/a/sk-learn.parquet",
        "train filter.covariance.kind=kronecker filter.covariance.tokens=reduced",
        "filter={'covariance': {'kind': 'kronecker', 'tokens': 'reduced'}}",
        "filter.covariance.tokens=reducd",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("text", ["covariance.token=x", "API_TOKENS=x", "{'tokens': 'x'}", "token=reduced"])
def test_what_is_like_it_goes(text: str) -> None:
    assert "***" in redact(text)


def test_names_that_look_alike_are_told_apart() -> None:
    assert spelled("caf\u00e9") == "'caf\u00e9'"
    assert spelled("cafe\u0301") == r"'cafe\u0301'"


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[31mred\nline\tb\u202ec\x9b\x7f") == "a\\x1b[31mred\\nline\\tb\\u202ec\\x9b\\x7f"
    assert printable("a\n\tb\r", "\n\t") == "a\n\tb\\r"
    kept = "Größe, 図鑑, می\u200cخواهم, 👩\u200d🔬, a b, \\n"
    assert printable(kept) == kept
    for code in range(0x110000):
        letter = chr(code)
        if unicodedata.category(letter) in {"Cc", "Zl", "Zp", "Cs"} or unicodedata.bidirectional(letter) in {
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        }:
            assert printable(letter).isascii(), hex(code)
    assert printable("\udcff").encode() == b"\\udcff"
