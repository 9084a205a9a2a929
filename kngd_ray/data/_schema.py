"""Which column of a parquet file is what: by the settings, the types, and what Hugging Face keeps in the schema."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from kngd_ray.data._config import ColumnNames
from kngd_ray.data._source import hint, listing
from kngd_ray.errors import DataError

ROLES = ("label", "class_name", "domain", "split")
_SUGGESTED = 4  # columns that a message offers


def check_named(schema: Any, names: ColumnNames, content: str, path: Path) -> None:
    """Refuse a file that lacks a column which the settings name, or has one twice.

    Args:
        schema: of the file.
        names: of its columns.
        content: the column of pictures or features.
        path: the file.

    Raises:
        DataError: it does.
    """
    read = {role: getattr(names, role) for role in ROLES}
    read["image" if content == names.image else "features"] = content
    for role, name in read.items():
        if role in names.renamed and name is not None and name not in schema.names:
            default = getattr(ColumnNames(), role)
            way = f": set data.columns.{role}={default}" if default in schema.names else ""
            raise DataError(
                f"{path} has no column {name!r}, which data.columns.{role} names{hint(name, schema.names)};"
                f" it has {listing(schema.names) or 'no columns'}{way}"
            )
        if schema.names.count(name) > 1:
            raise DataError(f"{path} has {schema.names.count(name)} columns `{name}`: write it again with one")


def columns_of(schema: Any, names: ColumnNames, path: Path) -> dict[str, str]:
    """Find the columns besides pictures or features.

    Args:
        schema: of a file.
        names: of its columns.
        path: the file.

    Returns:
        The columns that the file has, by role; the class names stand for labels that are not there.

    Raises:
        DataError: when the classes are missing or of a type that cannot hold them.
    """
    found = {role: name for role in ROLES if (name := getattr(names, role)) in schema.names}
    if "label" not in found and "class_name" not in found:
        raise DataError(
            f"{path} has no label column (it has {listing(schema.names)}): add `label`, integers or class names"
            f"{_offer('label', _label_columns(schema))}"
        )
    label = found.setdefault("label", found.get("class_name", ""))
    kind = _kind(schema, label)
    if not (pa.types.is_integer(kind) or _is_text(kind)):
        raise DataError(f"{path}: column `{label}` is {kind}: it must be integers or class names, one a row")
    return found


def check_texts(schema: Any, stored: Mapping[str, str], path: Path) -> None:
    """Refuse names that are none.

    Args:
        schema: of a file.
        stored: its columns by role.
        path: the file.

    Raises:
        DataError: a column of class names, domains or splits is neither text nor numbers of names.
    """
    for name in (stored[role] for role in ROLES[1:] if role in stored):
        kind = _kind(schema, name)
        if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise DataError(f"{path}: column `{name}` is {kind}: it must be text")


def lacks_content(role: str, what: str, schema: Any, path: Path) -> str:
    """Return the sentence for a file without pictures or features, with the columns that may be them.

    Args:
        role: ``image`` or ``features``.
        what: the same in words, with the name that it is to have.
        schema: of the file.
        path: the file.
    """
    fits = picture_column if role == "image" else vector_column
    offer = _offer(role, [name for name in schema.names if fits(schema.field(schema.names.index(name)).type)])
    has = f"it has {listing(schema.names) or 'no columns'}"
    return f"{path} has no {role} column ({has}): name {what}{offer}"


def picture_column(kind: Any) -> bool:
    """Whether values of a type may be pictures: bytes, or a struct of bytes and path."""
    parts = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    return _is_bytes(kind) or {"bytes", "path"} <= parts


def vector_column(kind: Any) -> bool:
    """Whether values of a type may be features: lists of floats."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and pa.types.is_floating(kind.value_type)


def hugging_face_names(schema: Any, column: str) -> list[str]:
    """Return the names which Hugging Face `datasets` keeps in the schema's metadata for numbers, if any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (LookupError, TypeError, ValueError, RecursionError):
        return []


def _label_columns(schema: Any) -> list[str]:
    """Columns that may be the label: those with names in the schema, else integers and text."""
    named = [name for name in schema.names if hugging_face_names(schema, name)]
    kinds = [(field.name, field.type) for field in schema]
    return named or [name for name, kind in kinds if pa.types.is_integer(kind) or pa.types.is_string(kind)]


def _offer(role: str, columns: list[str]) -> str:
    """The end of a sentence on a column that goes by another name."""
    return f", or say which it is, data.columns.{role}={' or '.join(columns[:_SUGGESTED])}" if columns else ""


def _kind(schema: Any, name: str) -> Any:
    """The type of a column's values."""
    kind = schema.field(name).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    """Whether values are names; bytes, which some writers use, are read as UTF-8."""
    strings = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(is_kind(kind) for is_kind in strings) or _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))
