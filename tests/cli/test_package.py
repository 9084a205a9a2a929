"""What of a working folder is sent to a cluster, and what never is."""

import os
from pathlib import Path
from zipfile import ZipFile

import pytest

import kngd_ray
from kngd_ray.commands.package import collect, show_bytes, write_zip
from kngd_ray.errors import KngdError, UsageError

SECRET = "planted-7f3a9c51"


def plant(root: Path, *names: str, content: str = "x = 1\n") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def sent(root: Path) -> set[str]:
    return set(collect(root).sizes)


def test_code_and_settings_are_sent(tmp_path: Path) -> None:
    names = {"run.yaml", "src/model.py", "notes.txt", "src/deep/er/a.json", ".hidden", "many_tokens.py", "Makefile"}
    plant(tmp_path, *names)
    assert sent(tmp_path) == names


@pytest.mark.parametrize(
    "name",
    [
        ".git/config",
        "pkg/__pycache__/a.cpython-311.pyc",
        ".venv/lib/a.py",
        "node_modules/a.js",
        ".cache/features/a",
        "kngd_runs/a/config.yaml",
        "mlruns/1/meta.yaml",
        "mlartifacts/1/a",
        "mlflow.db",
        "mlflow.db-wal",
        "shots.parquet",
        "deep/er/a.npz",
        "photos/cat.jpg",
        "weights.safetensors",
        "weights.pt",
        "data.tar.gz",
    ],
)
def test_data_runs_and_caches_stay_here(tmp_path: Path, name: str) -> None:
    plant(tmp_path, "run.yaml", name)
    assert sent(tmp_path) == {"run.yaml"}


def test_a_virtual_environment_stays_here_whatever_it_is_called(tmp_path: Path) -> None:
    plant(tmp_path, "run.yaml", "py311/pyvenv.cfg", "py311/lib/a.py", "conda/conda-meta/history", "conda/b.py")
    assert sent(tmp_path) == {"run.yaml"}


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".env.production",
        "config/.ENV",
        "server.pem",
        "tls.key",
        "id_rsa",
        "id_ed25519.pub",
        ".netrc",
        ".aws/config",
        ".ssh/known_hosts",
        ".mlflow/a",
        ".ray/auth_token",
        "auth_token",
        "hf_token.txt",
        "Token",
        "kubeconfig.yaml",
        "credentials.json",
        "client_secret.yaml",
        "passwords.txt",
        ".git-credentials",
        ".databrickscfg",
    ],
)
@pytest.mark.parametrize("asked", [False, True], ids=["", "asked for"])
def test_a_credential_is_never_sent(tmp_path: Path, name: str, asked: bool) -> None:
    plant(tmp_path, "run.yaml")
    plant(tmp_path, name, content=SECRET)
    if asked:
        plant(tmp_path, ".rayignore", content=f"!*\n!{name}\n")
    package = collect(tmp_path)
    assert set(package.sizes) - {".rayignore"} == {"run.yaml"}
    assert any(name.startswith(left) for left in package.secrets)
    archive = tmp_path / "package.zip"
    write_zip(package, archive)
    with ZipFile(archive) as opened:
        assert not any(SECRET in opened.read(entry).decode() for entry in opened.namelist())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.yaml", f"tracking.uri: postgresql://user:{SECRET}@db.example.org/mlflow\n"),
        ("settings.ini", f"[a]\nurl = https://me:{SECRET}@example.org\n"),
        ("deploy", f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n"),
    ],
)
def test_a_credential_is_known_by_what_it_holds(tmp_path: Path, name: str, content: str) -> None:
    plant(tmp_path, "main.py")
    plant(tmp_path, name, content=content)
    package = collect(tmp_path)
    assert set(package.sizes) == {"main.py"}
    assert package.secrets == (name,)


@pytest.mark.parametrize("uri", ["http://host:5000", "postgresql://user:$PASSWORD@db/mlflow", "https://a/b:c@d"])
def test_an_address_without_a_password_is_no_credential(tmp_path: Path, uri: str) -> None:
    plant(tmp_path, "run.yaml", content=f"tracking.uri: {uri}\n")
    assert sent(tmp_path) == {"run.yaml"}


def test_ignore_files_follow_the_rules_of_git(tmp_path: Path) -> None:
    plant(tmp_path, ".gitignore", content="/build/\n*.log\n!kept.log\nlarge_*\n")
    plant(tmp_path, ".rayignore", content="/drafts\n!small.parquet\n!large_but_needed\n")
    plant(tmp_path, "src/.gitignore", content="/generated.py\n")
    plant(tmp_path, "build/a.py", "a.log", "kept.log", "drafts/a.py", "small.parquet", "other.parquet")
    plant(tmp_path, "src/build/b.py", "src/generated.py", "src/sub/generated.py", "large_one", "large_but_needed")
    ignore_files = {".gitignore", ".rayignore", "src/.gitignore"}
    wanted = {"kept.log", "small.parquet", "src/build/b.py", "src/sub/generated.py", "large_but_needed"}
    assert sent(tmp_path) == wanted | ignore_files
    ignored = collect(tmp_path).ignored
    assert ignored[".rayignore"] == ["drafts/"]
    assert "build/" in ignored[".gitignore"]
    assert "other.parquet" in ignored["the defaults"]


def test_the_own_checkout_brings_its_model_and_pictures() -> None:
    root = Path(kngd_ray.__file__).parents[1]
    package = collect(root)
    assert package.brings_kngd_ray
    needed = {p.relative_to(root).as_posix() for p in (root / "kngd_ray" / "assets").rglob("*") if p.is_file()}
    assert needed <= set(package.sizes)
    sources = {p.relative_to(root).as_posix() for p in (root / "kngd_ray").rglob("*.py")}
    assert sources <= set(package.sizes)
    assert {"pyproject.toml", "tune_configs/smoke.yaml"} <= set(package.sizes)
    assert not any(name.startswith((".git/", "benchmarks/results/few_shot_emoji.png")) for name in package.sizes)
    assert package.bytes < 60 * 2**20


def test_links_are_sent_as_what_they_lead_to_and_never_lead_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "project", tmp_path / "outside.txt"
    outside.write_text(SECRET)
    plant(root, "real.py", "folder/a.py", "shots.parquet")
    plant(root, ".env", content=SECRET)
    links = {
        "inside.py": root / "real.py",
        "out.txt": outside,
        "upwards": Path("../outside.txt"),
        "to_folder": root / "folder",
        "around": root,
        "innocent.txt": root / ".env",
        "shots": root / "shots.parquet",
        "nowhere": root / "gone",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    package = collect(root)
    assert set(package.sizes) == {"real.py", "folder/a.py", "inside.py"}
    assert set(package.unfit) == set(links) - {"inside.py"} | {"pipe"}
    archive = tmp_path / "package.zip"
    write_zip(package, archive)
    with ZipFile(archive) as opened:
        assert set(opened.namelist()) == set(package.sizes)
        assert opened.read("inside.py") == opened.read("real.py")


def test_the_same_files_make_the_same_package(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for root, names in ((first, ("a.py", "b/c.yaml")), (second, ("b/c.yaml", "a.py"))):
        plant(root, *names)
        (root / "a.py").chmod(0o755)
    os.utime(second / "a.py", (0, 0))
    for number, root in enumerate((first, second)):
        write_zip(collect(root), tmp_path / f"{number}.zip")
    assert (tmp_path / "0.zip").read_bytes() == (tmp_path / "1.zip").read_bytes()
    with ZipFile(tmp_path / "0.zip") as opened:
        assert opened.getinfo("a.py").external_attr >> 16 & 0o777 == 0o755


def test_too_much_is_refused_with_the_way_out(tmp_path: Path) -> None:
    plant(tmp_path, "a.csv", content="1" * 3000)
    plant(tmp_path, "deep/b.csv", content="1" * 5000)
    package = collect(tmp_path)
    assert package.largest(1) == [("deep/b.csv", 5000)]
    package.refuse_above(8001)
    with pytest.raises(UsageError, match=r"7\.8 KiB to send .* \.rayignore|/deep/b\.csv \(4\.9 KiB\)"):
        package.refuse_above(8000)


def test_folders_that_are_no_project_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        collect(tmp_path / "gone")
    with pytest.raises(UsageError, match="no project's folder"):
        collect(Path("/"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no project's folder"):
        collect(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"nothing in .* is to be sent"):
        collect(tmp_path / "empty")


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    plant(tmp_path, "a.py", "b.py")
    package = collect(tmp_path)
    (tmp_path / "b.py").unlink()
    with pytest.raises(KngdError, match=r"cannot read .*b\.py .*: leave it out by the line /b\.py"):
        write_zip(package, tmp_path / "package.zip")


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB")])
def test_sizes_are_shown_for_people(size: int, shown: str) -> None:
    assert show_bytes(size) == shown
