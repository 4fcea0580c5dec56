"""The `ragturbo db` commands that only read a database."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragturbo.cli.db_output import Folder, Json, conditions, is_embedded, say, typed
from ragturbo.errors import DatabaseCorrupt, InvalidRequest
from ragturbo.terminal import interactive, loading

if TYPE_CHECKING:
    from ragturbo.retrieval import Database, Record

_THUMBNAIL_TYPES = (".webp", ".png", ".jpg", ".jpeg")
_Where = Annotated[list[str] | None, typer.Option(help="column=value; a pair must match all of them.")]


def search(
    database: Folder,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", help="What to search for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Pairs per text.")] = 5,
    retriever: Annotated[str, typer.Option(help="auto, exact, scann, bm25 (words) or hybrid (both).")] = "auto",
    model: Annotated[str | None, typer.Option(help="Default: the model that built the database.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Leave out pairs with a lower score.")] = None,
    as_json: Json = False,
) -> None:
    """Find the pairs that are nearest to each text. Prints id, score, caption and source."""
    from ragturbo.messages import cut

    opened = _open(database, retriever)
    if not all(map(str.strip, texts)):
        raise InvalidRequest("a text to search for is empty")
    by_words = opened.choice()[0] == "bm25"
    with nullcontext() if by_words else loading(model or "the text encoder"):
        ids, scores = opened.search(texts, k, model=model, min_score=min_score)
        unknown = [] if by_words else [opened.text_keys(model).unknown(text) for text in texts]
    found: list[dict[str, Any]] = []
    for text, row, values in zip(texts, ids.tolist(), scores.tolist(), strict=True):
        hits = [(id, score) for id, score in zip(row, values, strict=True) if id >= 0]
        records = opened.records([id for id, _ in hits], thumbnails=False)
        found.append({"text": text, "hits": [
            {"id": id, "score": score, "caption": record.caption, "source": record.source}
            for (id, score), record in zip(hits, records, strict=True)
        ]})  # fmt: skip
    lines = []
    for query in found:
        if len(texts) > 1:
            lines.append(f"{cut(query['text'])}:")
        lines += [f"{hit['id']}  {hit['score']:.3f}  {_line(hit)}" for hit in query["hits"]] or ["no pair was found"]
    say({"queries": found}, "\n".join(lines), as_json)
    for text, words in zip(texts, unknown, strict=False):
        if words and opened.choice()[0] != "hybrid":
            typer.echo(
                f"{cut(text)!r}: the model does not know {', '.join(words)}; --retriever bm25 or hybrid finds words",
                err=True,
            )


def listed(
    database: Folder,
    limit: Annotated[int, typer.Option(min=1, help="Pairs to print.")] = 20,
    offset: Annotated[int, typer.Option(min=0, help="Pairs to leave out first.")] = 0,
    where: _Where = None,
    as_json: Json = False,
) -> None:
    """List pairs in the order of their ids: id, caption and source."""
    from ragturbo.messages import many
    from ragturbo.retrieval.where import matching

    opened = _open(database)
    wanted = conditions(where)
    ids = matching(opened.snapshot, typed(wanted)) if wanted else opened.ids
    records = opened.records(ids[offset : offset + limit], thumbnails=False)
    lines = [f"{record.id}  {_line(_facts(record))}" for record in records]
    say({"pairs": [_facts(record) for record in records], "total": len(ids)}, "\n".join(lines), as_json)
    if not as_json and len(records) < len(ids):
        typer.echo(f"{len(records)} of {many(len(ids), 'pair')}; see --limit and --offset", err=True)


def show(
    database: Folder,
    ids: Annotated[list[int], typer.Argument(metavar="ID…", help="Ids of the pairs.")],
    image: Annotated[Path | None, typer.Option(help="Write the thumbnail of one pair: .webp, .png or .jpg.")] = None,
    as_json: Json = False,
) -> None:
    """Show everything that is stored of pairs."""
    opened = _open(database)
    if image is not None:
        _check_image(image, len(ids))
    records = [opened[id] for id in ids]
    if image is not None:
        _write_thumbnail(records[0], image)
    facts = [_facts(record) | {"thumbnail_bytes": len(record.thumbnail or b"")} for record in records]
    say({"pairs": facts}, "\n\n".join(map(_table, facts)), as_json)


def export(
    database: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .jsonl, .csv or .parquet file.")],
    thumbnails: Annotated[Path | None, typer.Option(help="A folder for the thumbnails, ID.webp.")] = None,
    as_json: Json = False,
) -> None:
    """Write id, caption, source, sha256 and the other columns of every pair to a table.

    If the images are still there, `db build OUT --image source --image-root FOLDER` builds from it for another model.
    """
    from ragturbo.messages import many
    from ragturbo.retrieval.export import export_table

    written = export_table(_open(database), out, thumbnails)
    say({"pairs": written, "file": str(out)}, f"{many(written, 'pair')} written to {out}", as_json)


def info(database: Folder, as_json: Json = False) -> None:
    """Describe a database, its encoder and its retriever."""
    say(facts := _open(database).info.to_dict(), _table(facts), as_json)


def verify(
    database: Folder,
    quick: Annotated[bool, typer.Option("--quick", help="Manifest, sizes, tables, keys and index only.")] = False,
    as_json: Json = False,
) -> None:
    """Read every byte and compare it with the manifest. If there is damage, list it and exit with code 3."""
    from ragturbo.messages import many
    from ragturbo.retrieval.snapshot import open_snapshot
    from ragturbo.retrieval.verify import problems

    on_segment = (lambda name: print(f"\rsegment {name}", end="", file=sys.stderr)) if interactive() else None
    pairs = 0
    try:
        snapshot = open_snapshot(_folder(database))
        pairs = len(snapshot)
        found = list(problems(snapshot, "quick" if quick else "full", on_segment))
    except DatabaseCorrupt as error:
        found = [str(error)]
    if on_segment:
        print("\r", end="", file=sys.stderr)
    text = "\n".join(found) if found else f"{database} is undamaged: {many(pairs, 'pair')}"
    say({"whole": not found, "problems": found}, text, as_json)
    if found:
        raise typer.Exit(3)


def _open(database: Path, retriever: str = "auto") -> Database:
    from ragturbo.retrieval import Database

    return Database.open(_folder(database), retriever=retriever)


def _folder(database: Path) -> Path:
    """Return the folder of a database. "shapes" is the embedded model's, unless there is a folder of that name."""
    from ragturbo.model.find import EMBEDDED
    from ragturbo.retrieval.copy import find

    return find(EMBEDDED) if is_embedded(database) else database.expanduser()


def _facts(record: Record) -> dict[str, Any]:
    known = {"id": record.id, "caption": record.caption, "source": record.source, "sha256": record.sha256}
    return known | record.extra


def _line(facts: dict[str, Any]) -> str:
    from ragturbo.messages import cut

    source = "" if facts["source"] is None else f"  ({cut(facts['source'])})"
    return cut(facts["caption"], 100) + source


def _table(facts: dict[str, Any]) -> str:
    """One line per fact; a dictionary has one line per entry."""
    rows: dict[str, Any] = {}
    for name, value in facts.items():
        inner = value if isinstance(value, dict) else None
        rows |= {name: value} if inner is None else {f"{name} {key}": part for key, part in inner.items()}
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:{width}}  {_plain(value)}" for name, value in rows.items())


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _check_image(path: Path, ids: int) -> None:
    from ragturbo.retrieval.export import check_parent

    if ids != 1:
        raise InvalidRequest(f"--image writes the thumbnail of one pair, and there are {ids} ids")
    check_parent(path)
    if path.suffix.lower() not in _THUMBNAIL_TYPES:
        raise InvalidRequest(f"--image {path} must end in {', '.join(_THUMBNAIL_TYPES)}", option="image")


def _write_thumbnail(record: Record, path: Path) -> None:
    picture = record.image()
    if picture is None or record.thumbnail is None:
        raise InvalidRequest(f"pair {record.id} has no thumbnail: the database was built without them")
    try:
        if path.suffix.lower() == ".webp":
            path.write_bytes(record.thumbnail)
        else:
            picture.save(path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror or error}") from error
