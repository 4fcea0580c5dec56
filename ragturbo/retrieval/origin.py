"""Which model built a database. Its name is kept in build-report.json, because a manifest holds no paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.find import EMBEDDED, resolve
from ragturbo.retrieval.report import BuildReport


def name_to_report(encoder: Any, folder: Path) -> str | None:
    """Return the name of the model that encodes a database, for a local one its absolute path.

    None if the encoder has no name, or if the database is in its model's folder, which may be published as a whole.
    """
    name = getattr(getattr(encoder, "bundle", None), "name", None)
    return None if name is None or _home(folder) is not None else _name(str(name))


def _home(folder: Path) -> Path | None:
    """The folder of the model that a database belongs to, or None."""
    home = folder.absolute().parent
    return home if (home / "model_index.json").is_file() else None


def _name(name: str) -> str:
    path = Path(name).expanduser().absolute()
    if not path.is_dir():
        return name
    try:
        embedded = resolve(EMBEDDED).absolute()
    except ModelError:
        embedded = None
    return EMBEDDED if path == embedded else str(path)


def known_origin(folder: Path) -> str | None:
    """Return the name or folder of the model that built a database, or None if it is not known."""
    if (home := _home(folder)) is not None:
        return _name(str(home))
    report = BuildReport.find(folder)
    return None if report is None else report.model


def origin(folder: Path) -> str:
    """Return what `known_origin` does. Raises InvalidRequest if it is not known."""
    name = known_origin(folder)
    if name is None:
        raise InvalidRequest(
            f"it is not known which model built {folder}: pass model=, the name or folder of that model",
            option="model",
        )
    return name
