"""What of a working folder is sent to a cluster, and what never is."""

import os
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

import kngd_ray
from kngd_ray.cluster.bundle import NO_CODE, collect, show_bytes, write_zip
from kngd_ray.errors import KngdError, UsageError

SECRET = "planted-7f3a9c51"
CREDENTIALS = """
    .env .env.production config/.ENV server.pem tls.key id_rsa id_ed25519.pub .netrc netrc _netrc .aws/config
    .ssh/known_hosts .mlflow/a .ray/auth_token auth_token hf_token.txt Token kubeconfig.yaml credentials.json
    client_secret.yaml passwords.txt .git-credentials .databrickscfg secrets/hf.txt Credentials/aws.csv apikey.txt
    API_KEY.yaml .config/gcloud/adc.json conf/secrets/run.yaml private-key.toml prod.tfvars .kaggle/kaggle.json
    """


def plant(root: Path, *names: str, content: str = "x = 1\n") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def sent(root: Path, *include: str) -> set[str]:
    return set(collect(root, include).sizes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder within a repository, whose own ignore file is above it."""
    (tmp_path / "repository" / "project").mkdir(parents=True)
    git(tmp_path / "repository", "init", "-q")
    return tmp_path / "repository" / "project"


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True)


def test_code_and_settings_are_sent(root: Path) -> None:
    names = {"run.yaml", "src/model.py", "src/deep/er/a.toml", ".hidden.yml", "many_tokens.py", "secrets/vault.py"}
    plant(root, *names)
    assert sent(root) == names
    git(root, "add", "src")  # tracked or not
    (root / "src" / "model.py").unlink()
    assert sent(root) == names - {"src/model.py"}


def test_data_runs_and_caches_stay_here(root: Path) -> None:
    """As does whatever else is not known to be code or settings."""
    names = """
        pkg/__pycache__/a.cpython-311.pyc .cache/features/a kngd_runs/a/results.json mlartifacts/1/a mlflow.db
        mlflow.db-wal shots.parquet x.Parquet deep/er/a.npz photos/cat.jpg x.JPG x.heic weights.safetensors weights.pt
        data.tar.gz labels.csv frame.pkl notes.txt notebook.ipynb a.json Makefile
    """
    plant(root, "run.yaml", *names.split())
    assert sent(root) == {"run.yaml"}
    assert set(collect(root).ignored[NO_CODE]) == set(names.split())
    assert sent(root, "labels.csv", "photos", "deep/*/*.npz", "*.Parquet") == {
        *("run.yaml", "labels.csv", "photos/cat.jpg", "deep/er/a.npz", "x.Parquet")
    }


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../a.py", "a/../../b", ".", ""])
def test_nothing_is_included_from_outside(root: Path, pattern: str) -> None:
    plant(root, "a/a.py")
    with pytest.raises(UsageError, match="name a file or folder below"):
        collect(root, [pattern])


def test_what_is_included_is_there(root: Path) -> None:
    plant(root, "a.py")
    with pytest.raises(UsageError, match=r"include=gone\.csv: there is no such file in"):
        collect(root, ["gone.csv"])


def test_what_git_leaves_out_stays_here(root: Path) -> None:
    plant(root.parent, ".gitignore", content="build/\n/project/own.py\n*.log.py\n")
    plant(root.parent, ".git/info/exclude", content="excluded.py\n")
    plant(root, ".gitignore", content="!kept.log.py\n")
    plant(root, "a.py", "own.py", "build/b.py", "excluded.py", "x.log.py", "kept.log.py", "nested/a.py")
    git(root / "nested", "init", "-q")  # a repository of its own
    assert sent(root) == {"a.py", "kept.log.py"}
    assert sent(root, "build", "own.py") == {"a.py", "kept.log.py", "build/b.py", "own.py"}
    plant(root, ".rayignore", content="kept*\n")
    package = collect(root)
    assert set(package.sizes) == {"a.py"}
    assert package.ignored[".rayignore"] == ["kept.log.py"]


def test_a_program_that_a_repository_names_is_not_run(root: Path) -> None:
    plant(root, "a.py")
    plant(root, "hook", content=f"#!/bin/sh\ntouch {root}/ran\n")
    (root / "hook").chmod(0o755)
    git(root, "config", "core.fsmonitor", str(root / "hook"))
    assert sent(root) == {"a.py"}
    assert not (root / "ran").exists()


def test_outside_a_repository_only_what_is_named_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "run.yaml", "src/a.py", "src/.venv/b.py", "src/own/pyvenv.cfg", "src/own/b.py", "src/.git/c.py")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", "/")
    with pytest.raises(UsageError, match=r"not in a git repository .*include=\[run\.yaml"):
        collect(tmp_path)
    assert sent(tmp_path, "src") == {"src/a.py"}
    monkeypatch.setenv("PATH", "")  # no git
    assert sent(tmp_path, "run.yaml") == {"run.yaml"}


@pytest.mark.parametrize("name", CREDENTIALS.split())
def test_a_credential_is_never_sent(root: Path, name: str) -> None:
    plant(root, "run.yaml")
    plant(root, name, content=SECRET)
    git(root, "add", "--force", ".")
    for include in ((), (name,), ("*", "**/*")):
        package = collect(root, include)
        assert set(package.sizes) == {"run.yaml"}
        assert package.secrets == (name,)
    archive = root / "package.zip"
    write_zip(package, archive)
    with ZipFile(archive) as opened:
        assert not any(SECRET in opened.read(entry).decode() for entry in opened.namelist())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.yaml", f"tracking.uri: postgresql://user:{SECRET}@db.example.org/mlflow\n"),
        ("settings.ini", f"[a]\nurl = https://me:{SECRET}@example.org\n"),
        ("deploy", f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n"),
        ("more.yaml", f"db:\n  password: {SECRET}\n"),
        ("run.sh", f"export HF_TOKEN='{SECRET}'\n"),
        ("main2.py", "login('hf_" + "a1B2" * 8 + "')\n"),
        ("a.toml", "key = 'AKIA" + "ABCD" * 4 + "'\n"),
    ],
)
def test_a_credential_is_known_by_what_it_holds(root: Path, name: str, content: str) -> None:
    plant(root, "main.py")
    plant(root, name, content=content)
    package = collect(root, [name])
    assert set(package.sizes) == {"main.py"}
    assert package.secrets == (name,)


@pytest.mark.parametrize(
    "line",
    [
        *(
            "tracking.uri: http://host:5000",
            "tracking.uri: postgresql://user:$PASSWORD@db/mlflow",
            "a: https://a/b:c@d",
        ),
        *("tokenizer: ViT-B-32-long", "password: ${PASSWORD}", "token: /run/secrets/token", "max_tokens: 123456789"),
    ],
)
def test_what_is_no_credential_is_sent(root: Path, line: str) -> None:
    plant(root, "run.yaml", content=f"{line}\n")
    assert sent(root) == {"run.yaml"}


def test_the_own_checkout_brings_its_model_and_pictures() -> None:
    root = Path(kngd_ray.__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("this is no git checkout")
    package = collect(root)
    assert package.brings_kngd_ray
    assert package.shadowing == []
    needed = {p.relative_to(root).as_posix() for p in (root / "kngd_ray" / "assets").rglob("*") if p.is_file()}
    assert needed <= set(package.sizes)
    sources = {p.relative_to(root).as_posix() for p in (root / "kngd_ray").rglob("*.py")}
    assert sources <= set(package.sizes)
    assert {"pyproject.toml", "tune_configs/smoke.yaml", "rayjob.yaml", "cluster.yaml"} <= set(package.sizes)
    assert package.secrets == ()
    assert package.bytes < 60 * 2**20


def test_links_are_sent_as_what_they_lead_to_and_never_lead_out(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    (root.parent / "outside.txt").write_text(SECRET)
    outside.write_text(SECRET)
    plant(root, "real.py", "folder/a.py", "shots.parquet")
    plant(root, ".env", content=SECRET)
    links = {
        "inside.py": root / "real.py",
        "out.py": outside,
        "upwards.py": Path("../outside.txt"),
        "to_folder.py": root / "folder",
        "around.py": root,
        "innocent.py": root / ".env",
        "shots.py": root / "shots.parquet",
        "nowhere.py": root / "gone",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    package = collect(root, ["pipe"])
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
        git(root, "init", "-q")
    os.utime(second / "a.py", (0, 0))
    for number, root in enumerate((first, second)):
        write_zip(collect(root), tmp_path / f"{number}.zip")
    assert (tmp_path / "0.zip").read_bytes() == (tmp_path / "1.zip").read_bytes()
    with ZipFile(tmp_path / "0.zip") as opened:
        assert opened.getinfo("a.py").external_attr >> 16 & 0o777 == 0o755


def test_too_much_is_refused_with_the_way_out(tmp_path: Path) -> None:
    plant(tmp_path, "a.csv", content="1" * 3000)
    plant(tmp_path, "deep/b.csv", content="1" * 5000)
    package = collect(tmp_path, ["a.csv", "deep"])
    assert package.largest(1) == [("deep/b.csv", 5000)]
    package.refuse_above(8001)
    with pytest.raises(UsageError, match=r"7\.8 KiB to send .* \.rayignore|/deep/b\.csv \(4\.9 KiB\)"):
        package.refuse_above(8000)


def test_folders_that_are_no_project_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        collect(tmp_path / "gone")
    with pytest.raises(UsageError, match="not a project folder"):
        collect(Path("/"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="not a project folder"):
        collect(tmp_path)
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")
    with pytest.raises(UsageError, match="there is nothing to send in"):
        collect(tmp_path / "empty")


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    plant(tmp_path, "a.py", "b.py")
    package = collect(tmp_path, ["*.py"])
    (tmp_path / "b.py").unlink()
    with pytest.raises(KngdError, match=r"cannot read .*b\.py .*: leave it out by the line /b\.py"):
        write_zip(package, tmp_path / "package.zip")


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB")])
def test_sizes_are_shown_for_people(size: int, shown: str) -> None:
    assert show_bytes(size) == shown
