"""Folders that commands write to, and their JSON files: checked before anything slow, with errors in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ragturbo.errors import DatabaseCorrupt, InvalidRequest


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"the folder {folder} cannot be made: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """Raise InvalidRequest if `folder` cannot be written to. Makes nothing."""
    for path in (folder, *folder.absolute().parents):
        if not path.exists():
            continue
        if not path.is_dir():
            raise InvalidRequest(f"{folder} cannot be written: {path} is a file, not a folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise InvalidRequest(f"{folder} cannot be written: {path} is read-only for this user")
        return


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DatabaseCorrupt(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DatabaseCorrupt(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise DatabaseCorrupt(f"{path} is damaged: it holds no settings")
    return values
