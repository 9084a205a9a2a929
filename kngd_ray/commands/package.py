"""What of a working folder goes to a cluster: code and settings; no data, runs, caches or credentials.

Later rules win, as in git: the defaults below, the ``.gitignore`` files, the ``.rayignore`` files. A line such as
``!shots.parquet`` in .rayignore sends what would be left out; nothing sends a credential.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from pathspec import GitIgnoreSpec

from kngd_ray.errors import KngdError, UsageError
from kngd_ray.storage import storage_errors

GITIGNORE, RAYIGNORE = ".gitignore", ".rayignore"

_TOOLS = """
    .git .hg .svn __pycache__/ *.py[cod] *.egg-info/ .eggs/ .venv/ venv/ node_modules/ .tox/ .nox/ .cache/
    .mypy_cache/ .pytest_cache/ .ruff_cache/ .hypothesis/ .ipynb_checkpoints/ .idea/ .vscode/ .DS_Store
"""
_RUNS = "kngd_runs/ mlruns/ mlartifacts/ *.db *.db-journal *.db-shm *.db-wal *.sqlite *.sqlite3"
_DATA = """
    *.parquet *.arrow *.feather *.npy *.npz *.h5 *.hdf5 *.tfrecord *.lmdb *.mp4
    *.png *.jpg *.jpeg *.gif *.bmp *.tif *.tiff *.webp
    *.zip *.tar *.tgz *.gz *.bz2 *.xz *.zst *.7z *.whl
    *.safetensors *.pt *.pth *.ckpt *.bin *.onnx
"""
_DEFAULTS = (*_TOOLS.split(), *_RUNS.split(), *_DATA.split())
_ASSETS = "!/kngd_ray/assets/**"  # model and pictures of this package, where it is its own checkout that is sent

_PRIVATE_FOLDERS = {".aws", ".azure", ".docker", ".gnupg", ".huggingface", ".kube", ".mlflow", ".oci", ".ray", ".ssh"}
_PRIVATE_FILES = """
    .env .env.* *.env *.pem *.key *.p12 *.pfx *.jks *.keystore *.kdbx *.tfstate id_rsa* id_dsa* id_ecdsa* id_ed25519*
    .netrc _netrc .pgpass .my.cnf .pypirc .npmrc .git-credentials .htpasswd .boto .s3cfg .databrickscfg
    kubeconfig* *.kubeconfig *service_account*.json *service-account*.json
"""
_PRIVATE_WORDS = ("token", "secret", "credential", "password", "passwd")
_NOT_PRIVATE = ("tokeniz", "special_tokens_map", "added_tokens")  # of text models
_SOURCE = {".py", ".pyi", ".pyx", ".c", ".cc", ".cpp", ".cu", ".h", ".js", ".ts", ".css", ".html", ".md", ".rst"}
_READ_BYTES = 2**20  # settings and keys are smaller
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_PASSWORD = re.compile(rb"://[^/\s:@'\"]+:(?![$<{*])[^/\s@'\"]+@")


@dataclass(frozen=True)
class Package:
    """The files that are sent.

    Attributes:
        root: the working folder.
        sizes: bytes of each file by its path in the folder, with slashes.
        ignored: what each kind of rule left out; a folder stands for all in it and ends in a slash.
        secrets: what was left out as a credential.
        unfit: links that lead out or to folders, and what is no plain file.
    """

    root: Path
    sizes: Mapping[str, int]
    ignored: Mapping[str, list[str]] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """All files together, before they are compressed."""
        return sum(self.sizes.values())

    @property
    def brings_kngd_ray(self) -> bool:
        """Whether the cluster runs the kngd_ray that is sent, whatever is installed there."""
        return "kngd_ray/__init__.py" in self.sizes

    def largest(self, n: int) -> list[tuple[str, int]]:
        """The n largest files."""
        return sorted(self.sizes.items(), key=lambda item: (-item[1], item[0]))[:n]

    def refuse_above(self, limit: int) -> None:
        """Refuse what the cluster would.

        Args:
            limit: bytes that it takes.

        Raises:
            UsageError: there is more.
        """
        if self.bytes < limit:
            return
        name, size = self.largest(1)[0]
        raise UsageError(
            f"{self.root} has {show_bytes(self.bytes)} to send and Ray takes less than {show_bytes(limit)}: put what "
            f"the run does not need into {self.root / RAYIGNORE}, first /{name} ({show_bytes(size)}), and data on "
            "storage that the cluster reads."
        )


def collect(root: Path) -> Package:
    """Look through a working folder.

    Args:
        root: the folder.

    Returns:
        What would be sent of it, and what not.

    Raises:
        UsageError: it is no folder, one that is more than a project, or nothing in it is to be sent.
    """
    if not root.is_dir():
        raise UsageError(f"--working-dir {root}: there is no such folder; name the one to run the command in.")
    root = root.resolve()
    if root in (Path.home().resolve(), Path(root.anchor)):
        raise UsageError(f"{root} is no project's folder: change into that, or name it with --working-dir.")
    walk = _Walk(root)
    walk.folder("", [], [])
    walk.links()
    if not walk.sizes:
        raise UsageError(f"nothing in {root} is to be sent: name another folder with --working-dir.")
    return Package(root, dict(sorted(walk.sizes.items())), walk.ignored, tuple(walk.secrets), tuple(walk.unfit))


def write_zip(package: Package, target: Path) -> None:
    """Write the package; the same files give the same bytes, so that the cluster need not be sent them twice.

    Args:
        package: what is sent.
        target: the file.

    Raises:
        KngdError: a file cannot be read, or the target cannot be written.
    """
    with storage_errors(target), ZipFile(target, "w", compresslevel=1) as archive:
        for name in package.sizes:
            path = package.root / name
            try:
                source = path.open("rb")
            except OSError as error:
                raise KngdError(
                    f"cannot read {path} ({error.strerror}): leave it out by the line /{name} in {RAYIGNORE}."
                ) from error
            with source:
                info = ZipInfo(name)  # of the year 1980
                info.compress_type = ZIP_DEFLATED
                info.external_attr = (stat.S_IFREG | os.fstat(source.fileno()).st_mode & 0o777) << 16
                with archive.open(info, "w") as entry:
                    copyfileobj(source, entry)


def show_bytes(count: int) -> str:
    """A size for people: 96 B, 3.2 KiB, 118.0 MiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value >= 1024:
            value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


class _Walk:
    """One pass over a folder; what is left out is not looked into."""

    def __init__(self, root: Path) -> None:
        self.root = root
        own = (root / "kngd_ray" / "__init__.py").is_file()
        self.defaults = GitIgnoreSpec.from_lines([*_DEFAULTS, *([_ASSETS] if own else [])])
        self.sizes: dict[str, int] = {}
        self.ignored: dict[str, list[str]] = {}
        self.secrets: list[str] = []
        self.unfit: list[str] = []
        self._links: list[str] = []

    def folder(self, base: str, git: list[tuple[str, GitIgnoreSpec]], ray: list[tuple[str, GitIgnoreSpec]]) -> None:
        """Judge all entries of a folder, by its own rules and those of the folders above.

        Raises:
            KngdError: it cannot be read.
        """
        here = self.root / base
        git, ray = git + list(_rules(here / GITIGNORE, base)), ray + list(_rules(here / RAYIGNORE, base))
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise KngdError(
                f"cannot read {here} ({error.strerror}): leave it out by the line /{base} in {RAYIGNORE}."
            ) from error
        for entry in entries:
            name = base + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            rule = self._rule(f"{name}/" if is_folder else name, git, ray)
            if _secret_name(entry.name, is_folder):
                self.secrets.append(f"{name}/" if is_folder else name)
            elif rule is None and is_folder and _is_environment(here / entry.name):
                self.ignored.setdefault("the defaults", []).append(f"{name}/")
            elif rule is not None:
                self.ignored.setdefault(rule, []).append(f"{name}/" if is_folder else name)
            elif is_folder:
                self.folder(f"{name}/", git, ray)
            elif entry.is_symlink():
                self._links.append(name)
            elif not entry.is_file(follow_symlinks=False) or "\\" in name or not _is_unicode(name):
                self.unfit.append(name.encode(errors="replace").decode())
            elif _secret_content(here / entry.name):
                self.secrets.append(name)
            else:
                self.sizes[name] = entry.stat(follow_symlinks=False).st_size

    def links(self) -> None:
        """A link counts as the file that it leads to, if that is sent itself."""
        for name in self._links:
            path = (self.root / name).resolve()
            target = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else None
            if target in self.sizes:
                self.sizes[name] = self.sizes[target]
            else:
                self.unfit.append(name)

    def _rule(
        self, name: str, git: list[tuple[str, GitIgnoreSpec]], ray: list[tuple[str, GitIgnoreSpec]]
    ) -> str | None:
        """Which kind of rule leaves an entry out; None if it is sent."""
        verdict = None
        for rule, specs in (("the defaults", [("", self.defaults)]), (GITIGNORE, git), (RAYIGNORE, ray)):
            for base, spec in specs:
                include = spec.check_file(name.removeprefix(base)).include
                if include is not None:
                    verdict = rule if include else None
        return verdict


def _rules(file: Path, base: str) -> Iterator[tuple[str, GitIgnoreSpec]]:
    if not file.is_file():
        return
    try:
        yield base, GitIgnoreSpec.from_lines(file.read_text().splitlines())
    except (OSError, ValueError) as error:  # a pattern, or text, that is none
        raise UsageError(f"{file} cannot be read ({error}): correct it, it decides what is sent.") from error


def _is_environment(folder: Path) -> bool:
    """Whether a folder is a virtual environment, whatever it is called."""
    return (folder / "pyvenv.cfg").is_file() or (folder / "conda-meta").is_dir()


def _is_unicode(name: str) -> bool:
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _secret_name(name: str, is_folder: bool) -> bool:
    name = name.lower()
    if is_folder:
        return name in _PRIVATE_FOLDERS
    if any(fnmatch(name, pattern) for pattern in _PRIVATE_FILES.split()):
        return True
    source = PurePosixPath(name).suffix in _SOURCE or any(word in name for word in _NOT_PRIVATE)
    return not source and any(word in name for word in _PRIVATE_WORDS)


def _secret_content(path: Path) -> bool:
    """Whether a small file that is no source holds a private key, or an address with a password."""
    if path.suffix.lower() in _SOURCE or path.stat().st_size > _READ_BYTES:
        return False
    try:
        content = path.read_bytes()
    except OSError:
        return False  # said when it is packed
    return bool(_PRIVATE_KEY.search(content) or _PASSWORD.search(content))
