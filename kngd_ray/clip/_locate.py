"""Where a model's architecture and weights are: in the package, in open_clip, in a folder, or on a hub."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kngd_ray.clip._config import (
    CHECKPOINT_SUFFIXES,
    EMBEDDED_MODEL,
    HF_HUB,
    LOCAL_DIR,
    PRECOMPUTED,
    RANDOM,
    ModelConfig,
)
from kngd_ray.errors import ModelError, closest
from kngd_ray.storage import address

_MINI_CLIP = Path(__file__).resolve().parents[1] / "assets" / "mini_clip"
_CONFIG = "open_clip_config.json"
_PREFERRED = (  # as open_clip has it
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)

_LEFT_OPEN = {  # by tags of open_clip, what weights may need besides their architecture
    "quick_gelu": "activation (quick_gelu)",
    "mean": "normalisation of pictures",
    "std": "normalisation of pictures",
    "interpolation": "resizing of pictures",
    "resize_mode": "resizing of pictures",
}


@dataclass(frozen=True)
class Source:
    """Where open_clip finds one model.

    Attributes:
        name: what it is called here.
        open_clip_name: what open_clip calls it.
        checkpoint: its weights; None is untrained ones.
        tag: what open_clip says of these weights.
        config: the file that describes its architecture, where open_clip does not.
        left_open: what its file does not say, in a sentence; None where nothing is left open.
    """

    name: str
    open_clip_name: str
    checkpoint: Path | None
    tag: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    left_open: str | None = None

    @property
    def key(self) -> str:
        """Another one for every other source."""
        return json.dumps([self.name, self.open_clip_name, str(self.checkpoint), self.tag], default=str)

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from."""
        return tuple(path for path in (self.checkpoint, self.config) if path is not None)


def locate(config: ModelConfig) -> Source:
    """Find the architecture and the weights, fetching them if they are on a hub.

    Args:
        config: Which model and which weights.

    Returns:
        Where they are.

    Raises:
        ModelError: There is no such model, tag or file, or none is named.
    """
    if config.precomputed:
        raise ModelError(
            f"model.name={PRECOMPUTED} has no towers to encode pictures or texts with: set model.name to a CLIP model"
        )
    if config.name == EMBEDDED_MODEL or config.name.startswith((LOCAL_DIR, HF_HUB)):
        if config.pretrained is not None:
            what = "the embedded model" if config.name == EMBEDDED_MODEL else config.name
            raise ModelError(
                f"model.pretrained={config.pretrained!r} is not for {what}, which has its own "
                "weights: leave it out, or set model.name to the architecture of these weights"
            )
        if config.name == EMBEDDED_MODEL:
            # The folder has the layout of a hub repository: no name has to be registered with open_clip.
            return Source(EMBEDDED_MODEL, f"{LOCAL_DIR}{_MINI_CLIP}", _MINI_CLIP / _PREFERRED[0])
        return _folder(config.name) if config.name.startswith(LOCAL_DIR) else _repository(config.name)

    import open_clip

    name = config.name.replace("/", "-")  # as the CLIP paper writes them: ViT-B/32
    if name not in (models := open_clip.list_models()):
        raise ModelError(_unknown(config.name, name, models))
    tags = open_clip.list_pretrained_tags_by_model(name)
    choices = f"the path of a local checkpoint, or to a tag ({', '.join(tags) or 'it has none'})"
    if config.pretrained is None:
        raise ModelError(
            f"model {name} needs weights: set model.pretrained to {choices}, or to {RANDOM!r} if untrained "
            "weights are meant"
        )
    if config.pretrained == RANDOM:
        return Source(name, name, None)
    if tag := open_clip.get_pretrained_cfg(name, config.pretrained):
        return Source(name, name, _fetch(name, config.pretrained, tag), tag)
    path = Path(config.pretrained).expanduser()
    if path.is_file() or path.suffix in CHECKPOINT_SUFFIXES or len(path.parts) > 1:
        return Source(name, name, _check_path(path), left_open=_left_open(name, tags))
    raise ModelError(
        f"model.pretrained={config.pretrained!r} is neither a tag of {name} nor a file: set it to {choices}"
    )


def first_line(error: Exception) -> str:
    """What an error says first, to stand within a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def _unknown(given: str, name: str, models: Sequence[str]) -> str:
    """The sentence on a name that open_clip does not know."""
    if (Path(given).expanduser() / _CONFIG).is_file():
        return f"model.name={given!r} is a folder: write {LOCAL_DIR}{given}"
    near = _nearest(name, [EMBEDDED_MODEL, PRECOMPUTED, *models])
    hub = f"; a repository of Hugging Face's is named {HF_HUB}{given}" if given.count("/") == 1 else ""
    return f"model.name={given!r} is not a model of open_clip: did you mean {near}?{hub}"


def _folder(name: str) -> Source:
    """A folder with the layout of a hub repository, as ``export`` writes it.

    Raises:
        ModelError: It is none.
    """
    written = name.removeprefix(LOCAL_DIR)
    folder = Path(written).expanduser()
    if not written or not folder.is_dir():
        near = sorted(str(f.parent) for f in folder.parent.glob(f"*/{_CONFIG}")) if written else []
        hint = f"; the nearest is {LOCAL_DIR}{_nearest(str(folder), near, n=1)}" if near else ""
        raise ModelError(f"model.name={name!r}: there is no folder {written!r}{hint}")
    found = {f.name: f for f in sorted(folder.iterdir()) if f.suffix in CHECKPOINT_SUFFIXES and f.is_file()}
    file = next((found[known] for known in _PREFERRED if known in found), next(iter(found.values()), None))
    if not (folder / _CONFIG).is_file() or file is None:
        lacks = _CONFIG if file is not None else "weights, such as open_clip_model.safetensors"
        raise ModelError(
            f"model.name={name!r}: the folder lacks {lacks}: name one that kngd-ray export wrote, or an open_clip "
            "repository"
        )
    if len(found) > 1 and file.name not in _PREFERRED:
        raise ModelError(
            f"model.name={name!r}: the folder has several checkpoints, {', '.join(list(found)[:5])}: leave one in it"
        )
    _check_config(folder / _CONFIG, name)
    return Source(name, f"{LOCAL_DIR}{folder}", file, config=folder / _CONFIG)


def _repository(name: str) -> Source:
    """A repository of a hub, in its cache, downloaded if it is not there.

    Raises:
        ModelError: It cannot be reached, or is none of open_clip's.
    """
    from open_clip.pretrained import download_pretrained_from_hf

    repository = name.removeprefix(HF_HUB)
    if not repository or repository.count("/") > 1:
        raise ModelError(f"model.name={name!r} names no repository: write {HF_HUB}organisation/repository")
    try:
        config = Path(download_pretrained_from_hf(repository, filename=_CONFIG))
        weights = Path(download_pretrained_from_hf(repository))
    except Exception as error:  # whatever the hub client or the file system raises
        raise ModelError(
            f"model.name={name!r} is not in the local cache and cannot be downloaded "
            f"({first_line(error).split('Last error: ')[-1]}): check the name, or fetch the repository elsewhere and "
            f"name its folder, {LOCAL_DIR}FOLDER"
        ) from error
    _check_config(config, name)
    return Source(name, name, weights, config=config)


def _check_config(path: Path, name: str) -> None:
    """Refuse what does not describe a model.

    Raises:
        ModelError: It is no JSON, or has no architecture in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        kept = all(isinstance(found[key], kind) for key, kind in (("embed_dim", int), ("vision_cfg", dict)))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        kept = False
    if not kept:
        raise ModelError(f"model.name={name!r}: {path} does not describe an open_clip model: fetch or export it again")


def _fetch(name: str, tag_name: str, tag: dict[str, Any]) -> Path:
    """Path of a tag's weights in the hub's cache, downloaded if they are not there.

    Raises:
        ModelError: The hub cannot be reached, or does not give them.
    """
    import open_clip

    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # whatever the hub client, urllib or the file system raises
        raise ModelError(
            f"the weights {tag_name!r} of {name} are not in the local cache and cannot be downloaded "
            f"({first_line(error).split('Last error: ')[-1]}): pass a local checkpoint file through "
            f"model.pretrained, or use the {EMBEDDED_MODEL} model"
        ) from error


def _check_path(path: Path) -> Path:
    """The path of a local checkpoint, if it is there and of a kind that can be read.

    Raises:
        ModelError: It is not.
    """
    if not path.is_file() and address(path) is not None:
        raise ModelError(
            f"model.pretrained: {address(path)} is an address, and nothing is downloaded: fetch it, and name the file"
        )
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        found = [str(f) for f in sorted(folder.glob("*")) if f.suffix in CHECKPOINT_SUFFIXES]
        hint = f"the nearest is {_nearest(str(path), found, n=1)}" if found else f"{folder} has no checkpoint"
        raise ModelError(f"model.pretrained: there is no checkpoint file {path}; {hint}")
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ModelError(
            f"model.pretrained: {path} is not a checkpoint that can be read: the file name must end in "
            f"{', '.join(CHECKPOINT_SUFFIXES)}"
        )
    return path


def _left_open(name: str, tags: Sequence[str]) -> str | None:
    """What a file of weights does not say, and tags of its architecture do: open_clip then takes its defaults."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    own = open_clip.get_model_config(name) or {}
    taken = {**asdict(PreprocessCfg()), "quick_gelu": own.get("quick_gelu", False)}
    found: dict[str, str] = {}
    for tag in tags:
        stated = open_clip.get_pretrained_cfg(name, tag)
        for key, what in _LEFT_OPEN.items():
            # an architecture's own quick_gelu is no tag's to take away
            value = stated.get(key) or taken[key]
            if (tuple(value) if isinstance(value, list) else value) != taken[key]:
                found.setdefault(what, tag)
    if not found:
        return None
    others = " and ".join(f"another {what}, as of the tag {tag}" for what, tag in found.items())
    return (
        f"model.pretrained is a file, which does not say how its weights are to be run: open_clip's defaults for {name}"
        f" are taken, and some weights need {others}; if these do, name the tag, or as {LOCAL_DIR}FOLDER a folder with"
        f" the weights and their {_CONFIG}"
    )


def _nearest(word: str, words: Sequence[str], n: int = 3) -> str:
    """The n words most like a word, as a list for a sentence."""
    return " or ".join(closest(word, words, n, cutoff=0))
