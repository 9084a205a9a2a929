"""What of a working folder goes to a cluster: code and settings; no data, runs, caches or credentials.

What git knows or would add, as far as its suffix is that of code or settings, and what ``include=`` names. Nothing
sends what looks like a credential.
"""

import os
import re
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from kngd_ray.errors import KEY_SHAPES, KngdError, UsageError
from kngd_ray.storage import storage_errors

RAYIGNORE = ".rayignore"
NO_CODE = "suffix (include=PATH sends it)"

_SUFFIXES = {
    *(".py", ".pyi", ".pyx", ".pxd", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".sh"),
    *(".yaml", ".yml", ".toml"),
}
_SOURCE = _SUFFIXES - {".sh", ".yaml", ".yml", ".toml"}  # where a word such as token says nothing
_TOOLS = {
    *(".git", ".hg", ".svn", "__pycache__", ".eggs", ".venv", "venv", "node_modules", ".tox", ".nox", ".cache"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints"),
}
_GIT_SECONDS = 60.0

_PRIVATE_FOLDERS = {
    *(".aws", ".azure", ".config", ".docker", ".gcloud", ".gnupg", ".huggingface", ".kaggle", ".kube", ".mlflow"),
    *(".oci", ".password-store", ".ray", ".ssh", ".streamlit", ".wandb"),
}
_PRIVATE_FILES = """
    .env .env.* *.env .envrc *.pem *.key *.p12 *.pfx *.jks *.keystore *.kdbx *.gpg *.asc *.tfstate *.tfvars *.ovpn
    id_rsa* id_dsa* id_ecdsa* id_ed25519* .netrc _netrc netrc .pgpass pgpass .my.cnf .pypirc .npmrc .git-credentials
    .htpasswd htpasswd .boto .s3cfg .databrickscfg kubeconfig* *.kubeconfig kaggle.json adc.json
    *service_account*.json *service-account*.json *application_default_credentials*
"""
_PRIVATE_WORDS = (
    *("token", "secret", "credential", "password", "passwd", "apikey", "api_key", "api-key", "access_key"),
    *("accesskey", "access-key", "private_key", "private-key", "privatekey", "auth_key", "authkey"),
)
_NOT_PRIVATE = ("tokeniz", "special_tokens_map", "added_tokens")  # of text models
_READ_BYTES = 2**20  # settings and keys are smaller
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_PASSWORD = re.compile(rb"://[^/\s:@'\"]+:(?![$<{*])[^/\s@'\"]+@")
_KEY = re.compile(KEY_SHAPES.encode())
_SETTING = re.compile(  # password: hunter22, and no reference to one: ${PASSWORD}, /run/secrets/password
    rb"(?im)^[ \t\w.\"'-]*(?:password|passwd|token|api_?key|access_?key|secret_?key)[\"']?[ \t]*[:=]"
    rb"[ \t]*[\"']?[^\s\"'$<{*#/~.!][^\s\"'#]{7,}"
)


@dataclass(frozen=True)
class Bundle:
    """The files that are sent.

    Attributes:
        root: the working folder.
        sizes: bytes of each file by its path in the folder, with slashes.
        ignored: what each kind of rule left out of what git lists.
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
    def shadowing(self) -> list[str]:
        """Files and folders that would shadow installed modules, such as ``torch.py``."""
        installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        modules = {name: name.removesuffix(".py") for name in self.sizes if "/" not in name and name.endswith(".py")}
        modules |= {f"{name.partition('/')[0]}/": name.partition("/")[0] for name in self.sizes if _is_package(name)}
        return [
            place
            for place, module in modules.items()
            if module != "kngd_ray"
            and module.isidentifier()
            and (module in sys.stdlib_module_names or PathFinder.find_spec(module, installed) is not None)
        ]

    @property
    def brings_kngd_ray(self) -> bool:
        """Whether the cluster runs the kngd_ray that is sent instead of an installed one."""
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
            f"{self.root} has {show_bytes(self.bytes)} to send and Ray takes less than {show_bytes(limit)}: add what "
            f"the run does not need to {self.root / RAYIGNORE}, starting with /{name} ({show_bytes(size)}), include "
            "less, and put data on storage that the cluster reads."
        )


def collect(root: Path, include: Sequence[str] = ()) -> Bundle:
    """Look through a working folder.

    Args:
        root: the folder.
        include: files, folders or patterns below it that are sent whatever their suffix, and whatever git says.

    Returns:
        What would be sent of it, and what not.

    Raises:
        UsageError: it is no folder, one that is more than a project, in no git repository and nothing is named, or
            nothing in it is to be sent.
    """
    if not root.is_dir():
        raise UsageError(f"working_dir={root}: there is no such folder.")
    root = root.resolve()
    if root in (Path.home().resolve(), Path(root.anchor)):
        raise UsageError(f"{root} is not a project folder: change into one, or name it with working_dir=FOLDER.")
    sorter = _Sorter(root)
    for pattern in include:
        for name in _asked_for(root, pattern):
            sorter.take(name, asked_for=True)
    listed = _listed(root)
    if listed is None and not include:
        raise UsageError(
            f"{root} is not in a git repository (or git is not installed), which decides what is sent: run "
            "`git init` there, or name what the command needs, as in include=[run.yaml, src]."
        )
    kept, left_out = listed or ([], [])
    for name in kept:
        sorter.take(name, asked_for=False)
    sorter.links()
    if left_out:
        sorter.ignored[RAYIGNORE] = left_out
    if not sorter.sizes:
        raise UsageError(
            f"there is nothing to send in {root}: name another folder with working_dir=, or files with include=."
        )
    return Bundle(root, dict(sorted(sorter.sizes.items())), sorter.ignored, tuple(sorter.secrets), tuple(sorter.unfit))


def write_zip(package: Bundle, target: Path) -> None:
    """Write the package; the same files give the same bytes, so the cluster gets them only once.

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


def _is_package(name: str) -> bool:
    return name.count("/") == 1 and name.endswith("/__init__.py")


def show_bytes(count: int) -> str:
    """A size for people: 96 B, 3.2 KiB, 118.0 MiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value >= 1024:
            value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


class _Sorter:
    """Decides file by file what is sent."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.own = "kngd_ray/" if (root / "kngd_ray" / "__init__.py").is_file() else None
        self.sizes: dict[str, int] = {}
        self.ignored: dict[str, list[str]] = {}
        self.secrets: list[str] = []
        self.unfit: list[str] = []
        self._seen: set[str] = set()
        self._links: list[str] = []

    def take(self, name: str, *, asked_for: bool) -> None:
        """Decide on a file.

        Args:
            name: its path in the folder.
            asked_for: by name, so that its suffix does not matter.
        """
        path = self.root / name
        if name in self._seen or not os.path.lexists(path):  # of git's index alone: it was deleted
            return
        self._seen.add(name)
        if "\\" in name or not _is_unicode(name):
            self.unfit.append(name.encode(errors="replace").decode())
        elif _secret_name(name):
            self.secrets.append(name)
        elif not (asked_for or path.suffix.lower() in _SUFFIXES or self._is_own(name)):
            self.ignored.setdefault(NO_CODE, []).append(name)
        elif path.is_symlink():
            self._links.append(name)
        elif not path.is_file():
            self.unfit.append(name)
        elif _secret_content(path):
            self.secrets.append(name)
        else:
            self.sizes[name] = path.stat().st_size

    def links(self) -> None:
        """A link counts as the file that it leads to, if that is sent itself."""
        for name in self._links:
            path = (self.root / name).resolve()
            target = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else None
            if target in self.sizes:
                self.sizes[name] = self.sizes[target]
            else:
                self.unfit.append(name)

    def _is_own(self, name: str) -> bool:
        """Whether a file is of this package, whose model and pictures it needs, where its own checkout is sent."""
        return self.own is not None and name.startswith(self.own)


def _listed(root: Path) -> tuple[list[str], list[str]] | None:
    """Files of a folder that git knows or would add, and the ones that .rayignore leaves out.

    Returns:
        Both; None where the folder is in no repository.

    Raises:
        UsageError: git cannot be asked.
    """
    known = _git(root, "--cached", "--others", "--exclude-standard")
    if known is None:
        return None
    left_out = set(_git(root, "--cached", "--others", "--ignored", f"--exclude-per-directory={RAYIGNORE}") or ())
    return [name for name in known if name not in left_out], [name for name in known if name in left_out]


def _git(root: Path, *which: str) -> list[str] | None:
    """What `git ls-files` says of a folder; None where the folder is in no repository.

    Raises:
        UsageError: git is not installed, or does not answer.
    """
    # of a hook's; and a repository may name a program for git to run when it looks at files
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"LC_ALL": "C"}
    command = ["git", "-c", "core.fsmonitor=false", "ls-files", "-z", *which]
    try:
        asked = subprocess.run(  # noqa: S603 - arguments of our own
            command, cwd=root, env=environment, capture_output=True, timeout=_GIT_SECONDS, check=False
        )
    except FileNotFoundError:
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"git cannot list the files of {root} ({error}): correct that.") from error
    if asked.returncode:
        said = (asked.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[0]
        if "not a git repository" in said:
            return None
        raise UsageError(f"git cannot list the files of {root} ({said.rstrip('.')}): correct that.")
    return [os.fsdecode(name) for name in asked.stdout.split(b"\0") if name]


def _asked_for(root: Path, pattern: str) -> list[str]:
    """Files that an entry of ``include`` names: a file, all in a folder, or matches of a pattern, ``conf/*.json``.

    Raises:
        UsageError: it leads out of the folder, is the folder itself, or matches nothing.
    """
    parts = PurePosixPath(pattern)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise UsageError(f"include={pattern}: name a file or folder below {root}, as in include=conf/labels.json.")
    place = root / pattern
    if place.is_dir() and not place.is_symlink():
        found = list(_below(place))
    elif os.path.lexists(place):
        found = [place]
    else:
        try:
            found = [path for path in sorted(root.glob(pattern)) if path.is_symlink() or not path.is_dir()]
        except (ValueError, NotImplementedError) as error:
            raise UsageError(
                f"include={pattern}: this is not a pattern ({error}); write one such as conf/*.json."
            ) from error
    if not found:
        raise UsageError(f"include={pattern}: there is no such file in {root}.")
    return [path.relative_to(root).as_posix() for path in found]


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, except version control, caches and virtual environments.

    Raises:
        KngdError: a folder cannot be read.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise KngdError(f"cannot read {folder} ({error.strerror}): leave it out of include.") from error
    for entry in entries:
        path = folder / entry.name
        if not entry.is_dir(follow_symlinks=False):
            yield path
        elif entry.name not in _TOOLS and not _is_environment(path):
            yield from _below(path)


def _is_environment(folder: Path) -> bool:
    """Whether a folder is a virtual environment, whatever it is called."""
    return (folder / "pyvenv.cfg").is_file() or (folder / "conda-meta").is_dir()


def _is_unicode(name: str) -> bool:
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _secret_name(name: str) -> bool:
    """Whether a path looks like a credential, by its own name or the name of a folder above it."""
    *folders, file = name.lower().split("/")
    if not _PRIVATE_FOLDERS.isdisjoint(folders) or any(fnmatch(file, pattern) for pattern in _PRIVATE_FILES.split()):
        return True
    if PurePosixPath(file).suffix in _SOURCE or any(word in file for word in _NOT_PRIVATE):
        return False
    return any(word in part for part in (*folders, file) for word in _PRIVATE_WORDS)


def _secret_content(path: Path) -> bool:
    """Whether a small file holds a key that is known by its shape, or, if no source, a password or private key."""
    if path.stat().st_size > _READ_BYTES:
        return False
    try:
        content = path.read_bytes()
    except OSError:
        return False  # said when it is packed
    if path.suffix.lower() in _SOURCE:
        return bool(_KEY.search(content))
    return any(pattern.search(content) for pattern in (_KEY, _PRIVATE_KEY, _PASSWORD, _SETTING))
