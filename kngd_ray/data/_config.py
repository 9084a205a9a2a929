"""Settings of the data: its files, the part to train on and the feature cache."""

import os
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from glob import glob
from pathlib import Path
from typing import Literal

EMBEDDED = "embedded"
_EMBEDDED_DOMAIN = "noto"


@dataclass(frozen=True)
class ColumnNames:
    """What the columns of parquet files are called. A name that is not the default must be there.

    Raises:
        ValueError: when a name is empty, or one column is to be two things.
    """

    image: str = "image"
    """Pictures: bytes, or {bytes, path}."""

    features: str = "features"
    """In their place, where `model.name` is precomputed: lists of floats."""

    label: str = "label"
    """Classes: integers, or names."""

    class_name: str | None = "class_name"
    """Names of the classes, where labels are integers; null reads none."""

    domain: str | None = "domain"
    """Domains; null reads none."""

    split: str | None = "split"
    """Splits; null reads none."""

    def __post_init__(self) -> None:
        roles = asdict(self)
        for role, name in roles.items():
            if name is not None and not name.strip():
                raise ValueError(f"{role} is empty: name a column, or leave it out")
        for name, count in Counter(name for name in roles.values() if name is not None).items():
            if count > 1:
                first, second = [role for role in roles if roles[role] == name][:2]
                optional = [role for role in (second, first) if role in ("class_name", "domain", "split")]
                way = f", or read no {optional[0]}, data.columns.{optional[0]}=null" if optional else ""
                raise ValueError(f"{first} and {second} are both {name!r}: name two columns{way}")

    @property
    def renamed(self) -> dict[str, str | None]:
        """Names by role, where they are not the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class DataConfig:
    """A data set, its few-shot task and its feature cache.

    Raises:
        ValueError: when a field is out of its range.
    """

    path: str | tuple[str, ...] = EMBEDDED
    """Parquet file, several parquet files with one class list, a folder of them or of pictures, or
    "embedded": the emoji in six drawing styles which come with the package. Where `model.name` is
    precomputed, parquet files with features. Names of files may be patterns: shards/*.parquet."""

    columns: ColumnNames = field(default_factory=ColumnNames)
    """What the columns of parquet files are called, where not as here: {image: img, label: fine_label}."""

    layout: Literal["auto", "domains", "classes"] = "auto"
    """What the outermost folders of pictures are, below those of splits: domain/class/picture, or
    class/picture with any folders between. "auto" tells it by the names, and refuses what can be both."""

    val: Literal["ignore", "train", "test"] = "ignore"
    """What becomes of pictures that the data states to be for validation."""

    train_domain: str | None = None
    """Domain of the support set and of the in-distribution test. None: "noto" for the embedded set,
    elsewhere every domain which `ood_domains` does not name."""

    ood_domains: tuple[str, ...] | None = None
    """Domains tested out of distribution. None: every domain not trained on that has test rows."""

    order: tuple[str, ...] | None = None
    """Of a stream, its domains one after another, in the place of `train_domain`; each comes with `shots` pictures
    per class, and one that comes back with others."""

    time: str | None = None
    """Of a stream, the column of its parquet files that says when each row came: all train rows of the trained
    domains in that order, whatever `shots` says; rows of one time in the order of the files."""

    shots: int = 8
    """Labelled pictures per class in the support set."""

    draw: Literal["random", "first"] = "random"
    """How they are drawn. "random": every seed draws, evenly over the domains trained on, no picture
    twice. "first": seed 0 takes the first of each class in the order of the files."""

    classes: tuple[str, ...] | None = None
    """Class names. Data that carries names: the subset to use, in this order. Data with bare numbers:
    the name of label 0, 1, 2 and so on. None: all classes of the data, in order of their labels."""

    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts, each with one {} for the class name, or the name of a set of them; their text embeddings
    are averaged. :func:`kngd_ray.clip.resolve_templates` knows the sets and checks the prompts. Names
    that look like code are said in words, AnnualCrop as "Annual Crop"; {name} in place of {} keeps them."""

    test_fraction: float = 0.3
    """Part of each class and domain held out for testing where the data states no pictures for it."""

    on_bad_image: Literal["error", "skip"] = "error"
    """What an undecodable picture does: stop the run, or be left out of it."""

    cache_dir: str | None = None
    """Folder of frozen features. None: kngd_ray/features in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self) -> None:
        path = self.path
        if isinstance(path, str) and "," in path and not _found(path):
            # as lists of other settings are written; a file whose own name has a comma is that file
            object.__setattr__(self, "path", tuple(part.strip() for part in path.split(",")))
        if not self.path:
            raise ValueError('path is empty: name a parquet file, a folder, or "embedded"')
        if self.shots < 1:
            raise ValueError(f"shots is {self.shots}: it must be 1 or more")
        if self.order is not None and not self.order:
            raise ValueError("order is empty: name the domains of the stream, or leave it out")
        if self.order is not None and self.time is not None:
            raise ValueError(
                f"order is {list(self.order)} and time {self.time!r}: a stream has one order; leave one of them out"
            )
        if self.order is not None and self.train_domain is not None:
            raise ValueError(
                f"train_domain is {self.train_domain!r}, and order names those of the stream: leave one of them out"
            )
        if self.time is not None and not self.time.strip():
            raise ValueError("time is empty: name a column, or leave it out")
        if not 0.0 < self.test_fraction < 1.0:
            raise ValueError(f"test_fraction is {self.test_fraction}: it must lie between 0 and 1")
        if self.classes is not None and len(self.classes) < 2:
            raise ValueError(f"classes names {len(self.classes)}: name two or more, or leave it out")
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes names a class twice: name each once")
        if not self.templates:
            raise ValueError('templates is empty: give one or more, such as "a photo of a {}."')

    @property
    def trained_domain(self) -> str | None:
        """The one domain that is trained on, with the default resolved; None where there may be several."""
        if self.train_domain is None and self.path == EMBEDDED and not self.order:
            return _EMBEDDED_DOMAIN
        return self.train_domain

    @property
    def name(self) -> str:
        """What the data set is called where its path would be too long."""
        if self.path == EMBEDDED:
            return "emoji"
        paths = [self.path] if isinstance(self.path, str) else self.path
        return ", ".join(stem if "*" not in (stem := Path(path).stem) else Path(path).parent.name for path in paths)

    @property
    def cache_root(self) -> Path:
        """Folder of the feature cache, with the default and ~ resolved."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "kngd_ray" / "features"


def _found(path: str) -> bool:
    """Whether there is a file of a name, or one that a pattern finds."""
    return Path(path).expanduser().exists() or bool(glob(os.path.expanduser(path), recursive=True))
