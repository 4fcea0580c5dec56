"""Add one pair to a database, with the bytes that a build stores for it.

The pair is encoded before the writer's lock is taken, so an encoder that is busy keeps no other writer waiting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ragturbo.errors import DatabaseError, InvalidRequest
from ragturbo.messages import short
from ragturbo.retrieval import images, writer
from ragturbo.retrieval.build import BATCH_SIZE, check_encoder
from ragturbo.retrieval.encoder import check_pair_encoder
from ragturbo.retrieval.items import check_caption
from ragturbo.retrieval.manifest import load
from ragturbo.retrieval.pairs import Record
from ragturbo.retrieval.sources import from_tuple

if TYPE_CHECKING:
    from ragturbo.retrieval.database import Database
    from ragturbo.retrieval.encoder import PairEncoder

# Seconds to wait for another writer. A change of one pair takes a fraction of a second.
PATIENCE = 30.0


def add_pair(database: Database, caption: str, image: Any, *, encoder: PairEncoder, source: str | None = None) -> int:
    """Encode a pair, store it durably and move `database` to the generation that holds it.

    Args:
        caption, image: as an item of a build; what a build skips is an error.
        source: the pair's provenance; default: the path of the image, if it is one.

    Returns:
        The id of the pair.

    Raises:
        InvalidRequest: caption, image or feature cannot be stored. Nothing was written.
        DatabaseMismatch: another encoder built the database. Nothing was written.
        DatabaseError: it cannot be written, or another process is writing to it.
    """
    if source is not None and not isinstance(source, str):
        raise InvalidRequest(f"source={short(source)} must be text", option="source")
    item = from_tuple((caption, image, {} if source is None else {"source": source}))
    if problem := item.problem or check_caption(caption):
        raise InvalidRequest(problem)
    check_pair_encoder(encoder)
    start = load(database.path)
    check_encoder(database.path, start, encoder)
    pixels, digest, thumbnail = images.prepare(image, encoder.size, thumbnail=True)
    # The shape of a build's batches: another one gives other bits.
    keys, features = encoder.encode(np.stack([pixels] * BATCH_SIZE), [caption] * BATCH_SIZE)
    record = Record(0, caption, item.source, digest, thumbnail)
    manifest = writer.write_encoded(database.path, start, [([record], keys[:1], features[:1])], patience=PATIENCE)
    id = manifest.next_id - 1
    try:
        database.refresh()
    except DatabaseError as error:
        raise DatabaseError(f"pair {id} is stored, but the database cannot be opened with it: {error}") from error
    return id
