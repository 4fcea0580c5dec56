"""Which model built a database. Its name is kept in build-report.json, because a manifest holds no paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.find import EMBEDDED, resolve
from ragturbo.retrieval.report import BuildReport


def model_name(encoder: Any) -> str | None:
    """Return the name of an encoder's model, for a local one the absolute path; None if it has none."""
    name = getattr(getattr(encoder, "bundle", None), "name", None)
    return None if name is None else _name(str(name))


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
    home = folder.absolute().parent
    if (home / "model_index.json").is_file():
        # A model's own database is in its folder.
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
