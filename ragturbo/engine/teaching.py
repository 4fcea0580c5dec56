"""Add pairs to a Generator's database and remove them, with the model that the Generator has loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ragturbo.engine import fork
from ragturbo.engine.faults import typed
from ragturbo.errors import InvalidRequest
from ragturbo.retrieval.encoder import BundleEncoder

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle
    from ragturbo.retrieval import Database

Encoded = tuple[np.ndarray, np.ndarray]
# The installed package, whose files a model shares with every program that uses it.
_PACKAGE = Path(__file__).resolve().parents[1]
OnDevice = Callable[[Callable[[], Encoded]], Encoded]


class LoadedEncoder(BundleEncoder):
    """The encoder that built the database, over a loaded bundle, on the thread that runs the bundle's modules."""

    def __init__(self, bundle: Bundle, database: Database, on_device: OnDevice) -> None:
        """on_device: runs a function on the device thread between two batches."""
        super().__init__(bundle, size=database.encoder.get("size"), key=database.key_kind)
        self._on_device = on_device

    def encode(self, images: np.ndarray, captions: Sequence[str]) -> Encoded:
        return self._on_device(lambda: self._encode(images, captions))

    def _encode(self, images: np.ndarray, captions: Sequence[str]) -> Encoded:
        fork.note_use()
        try:
            return super().encode(images, captions)
        except Exception as error:
            raise typed(error)  # noqa: B904 (typed sets the cause)


def writable(database: Database | None, bundle: Bundle) -> Database:
    """Return the database if a Generator may write to it.

    Raises:
        InvalidRequest: there is none, or it belongs to an installed or downloaded model.
    """
    if database is None:
        raise InvalidRequest(
            "there is no database to write to: make one with `ragturbo db append my-db picture.png --caption … "
            f"--create --model {bundle.name}`, and load it with database='my-db' or use_database('my-db')"
        )
    path = database.path.resolve()
    own = bundle.database_path
    downloaded = own is not None and path == own.resolve() and not Path(bundle.name).expanduser().is_dir()
    if downloaded or path.is_relative_to(_PACKAGE):
        raise InvalidRequest(
            f"{database.path} belongs to the model {bundle.name!r}, which other programs use too: copy it with "
            f"`ragturbo db copy {bundle.name} my-db`, and load the copy with database='my-db' or use_database('my-db')"
        )
    return database
