"""Rows and searches that are kept: what is there is not computed again."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kngd_ray.storage import write_text

KEY = ["data", "domain", "shots", "seed", "method"]


class Store:
    """A folder of results: ``DATA-METHOD.parquet`` with a row per (domain, shots, seed), ``searches/`` beside.

    Args:
        folder: created when something is written.
        searches: folder of the searches; None is its own. They see training shots alone, so --dev shares them.
    """

    def __init__(self, folder: Path, searches: Path | None = None) -> None:
        self.folder = folder
        self._kept = searches or folder / "searches"

    def rows(self, data: str, method: str) -> pd.DataFrame:
        """The rows of a method on a data set; empty where there are none."""
        path = self._path(data, method)
        return pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=[*KEY, "recipe"])

    def finished(self, data: str, domain: str, shots: int, method: str, recipe: str) -> set[int]:
        """Seeds whose row is there, computed by this recipe."""
        rows = self.rows(data, method)
        same = (rows["domain"] == domain) & (rows["shots"] == shots) & (rows["recipe"] == recipe)
        return {int(seed) for seed in rows["seed"][same]}

    def add(self, data: str, method: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows in the place of those with the same key."""
        new = pd.DataFrame(list(rows))
        old = self.rows(data, method)
        kept = old if old.empty else pd.concat([old, new], ignore_index=True)
        frame = (new if old.empty else kept).drop_duplicates(KEY, keep="last")
        path = self._path(data, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        frame.sort_values(KEY).to_parquet(part, index=False, compression="zstd")
        part.replace(path)

    def all_rows(self, methods: Iterable[str]) -> pd.DataFrame:
        """Every row of some methods."""
        wanted = set(methods)
        found = [pd.read_parquet(path) for path in sorted(self.folder.glob("*.parquet"))]
        frames = [frame[frame["method"].isin(wanted)] for frame in found]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=KEY)

    def search(self, data: str, shots: int, method: str, recipe: str) -> dict[str, Any] | None:
        """A search that was kept, if it was of this recipe."""
        found: dict[str, Any] | None = self._searches(data, method).get(str(shots))
        return found if found is not None and found["recipe"] == recipe else None

    def keep_search(self, data: str, shots: int, method: str, recipe: str, found: Mapping[str, Any]) -> None:
        """Keep a search."""
        kept = self._searches(data, method) | {str(shots): {"recipe": recipe, **found}}
        path = self._search_path(data, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        inner = ",\n".join(f"{json.dumps(key)}: {json.dumps(kept[key])}" for key in sorted(kept, key=int))
        write_text(path, f"{{\n{inner}\n}}\n")

    def _searches(self, data: str, method: str) -> dict[str, Any]:
        path = self._search_path(data, method)
        return json.loads(path.read_text()) if path.is_file() else {}

    def _search_path(self, data: str, method: str) -> Path:
        return self._kept / f"{data}-{method}.json"

    def _path(self, data: str, method: str) -> Path:
        return self.folder / f"{data}-{method}.parquet"


def recipe_of(*parts: Any) -> str:
    """A short name of what decides a figure."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
