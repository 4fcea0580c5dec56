"""`ragturbo db …`: build and change a retrieval database. `db_read` has the commands that only read one."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ragturbo.cli import db_read
from ragturbo.cli.db_output import Folder, Json, conditions, one_or_many, progress, refuse_embedded, say, typed
from ragturbo.errors import InvalidRequest


class _TakesIds(TyperCommand):
    """A command whose arguments are ids, so that a negative number is not taken for an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if negative := next((text for text in args if re.fullmatch(r"-\d+", text)), None):
            raise InvalidRequest(f"{negative} is no id: ids are whole numbers from 0 on")
        return super().parse_args(ctx, args)


app = typer.Typer(name="db", help="Build, search, change and check a retrieval database.", no_args_is_help=True)
# Pixels at which a JPEG is decoded to see whether it is readable.
_LOOK = 64
_Pairs = Annotated[
    list[str], typer.Argument(metavar="PAIRS…", help="A folder, or .jsonl, .csv, .parquet or .tar files, or a pattern.")
]
_Caption = Annotated[str, typer.Option(help="Column of the captions.")]
_Image = Annotated[str, typer.Option(help='Column of the images, or a pattern: "train/{image_id}.jpg".')]
_Root = Annotated[Path | None, typer.Option(help="Folder of the image paths.")]
_Columns = Annotated[list[str] | None, typer.Option("--column", help="Column to keep; repeatable. Default: all.")]
_Batch = Annotated[int, typer.Option(help="Images encoded at once.")]
_Workers = Annotated[int | None, typer.Option(help="Threads that decode images.")]
_Thumbnails = Annotated[bool, typer.Option("--thumbnails/--no-thumbnails", help="Store a small WebP of each image.")]
_Dedupe = Annotated[bool, typer.Option("--dedupe", help="Skip pairs with caption and image of an earlier one.")]
_Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first bad image or caption.")]
_Resume = Annotated[bool, typer.Option("--resume/--restart", help="Continue a run that was killed.")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")]
_Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]


@app.command()
def build(
    pairs: _Pairs,
    database: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new database.")],
    model: Annotated[str, typer.Option(help='"shapes" (embedded), a local folder or a hub id.')] = "shapes",
    key: Annotated[str | None, typer.Option(help="pooled or clip. Default: the model's own.")] = None,
    feature_dtype: Annotated[str, typer.Option(help="float16, or int8 with one scale per token.")] = "float16",
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels. Default: the model's own.")] = None,
    segment_records: Annotated[int | None, typer.Option(help="Pairs per segment. Default: about 1 GiB.")] = None,
    index: Annotated[bool, typer.Option("--index/--no-index", help="Build the ScaNN index afterwards.")] = True,
    centred: Annotated[bool, typer.Option("--centred", help="Search about the mean of the keys.")] = False,
    caption: _Caption = "caption",
    image: _Image = "image",
    image_root: _Root = None,
    columns: _Columns = None,
    batch_size: _Batch = 16,
    workers: _Workers = None,
    thumbnails: _Thumbnails = True,
    dedupe: _Dedupe = False,
    strict: _Strict = False,
    resume: _Resume = True,
    device: _Device = None,
    dtype: _Dtype = None,
    as_json: Json = False,
) -> None:
    """Encode pairs into a new database. Resumes after a kill; torchrun shares the work among processes."""
    from ragturbo.retrieval import build as builder

    with progress(model) as (on_load, on_progress):
        report = builder.build(
            one_or_many(pairs), database, model=model, key=key, feature_dtype=feature_dtype, size=size,
            segment_records=segment_records, index=index, centred=centred, caption=caption, image=image,
            image_root=image_root, columns=columns, batch_size=batch_size, workers=workers, thumbnails=thumbnails,
            dedupe=dedupe, strict=strict, resume=resume, device=device, dtype=dtype, on_progress=on_progress,
            on_load=on_load,
        )  # fmt: skip
    _say_report(report, as_json, _built(report))


@app.command()
def append(
    database: Folder,
    pairs: Annotated[
        list[str],
        typer.Argument(metavar="PAIRS…", help="As for build, or image files with one --caption each."),
    ],
    model: Annotated[
        str | None, typer.Option(help="Default: the model that built the database; with --create, shapes.")
    ] = None,
    caption: Annotated[
        list[str] | None, typer.Option(help="Caption of an image file; repeatable. For tables: as for build.")
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Make the database if it does not exist.")] = False,
    image: _Image = "image",
    image_root: _Root = None,
    columns: _Columns = None,
    batch_size: _Batch = 16,
    workers: _Workers = None,
    thumbnails: _Thumbnails = True,
    dedupe: _Dedupe = False,
    strict: _Strict = False,
    resume: _Resume = True,
    device: _Device = None,
    dtype: _Dtype = None,
    as_json: Json = False,
) -> None:
    """Encode more pairs with the model that built the database. Of image files, all are added or none."""
    from ragturbo.retrieval import build as builder

    refuse_embedded(database)
    source, column, named = _with_captions(pairs, caption or [])
    change: Any = builder.append
    if not (database.expanduser() / "CURRENT").exists():
        _check_creation(database, create)
        change, model = builder.build, model or "shapes"
        typer.echo(f"{database} does not exist: making it, for the model {model}", err=True)
    with progress(model) as (on_load, on_progress):
        report = change(
            source, database, model=model, caption=column, image=image, image_root=image_root, columns=columns,
            batch_size=batch_size, workers=workers, thumbnails=thumbnails, dedupe=dedupe, strict=strict or named,
            resume=resume, device=device, dtype=dtype, on_progress=on_progress, on_load=on_load,
        )  # fmt: skip
    _say_report(report, as_json, _appended(report))


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A database, or a model that has one: shapes.")],
    database: Annotated[Path, typer.Argument(metavar="COPY", help="Folder of the new database.")],
    as_json: Json = False,
) -> None:
    """Copy a database, for example a model's own to append to it. Ids stay the same."""
    from ragturbo.messages import many
    from ragturbo.retrieval import Database

    made = Database.copy(source, database)
    facts = {"database": str(database), "pairs": len(made), "generation": made.snapshot.manifest.generation}
    say(facts, f"{many(len(made), 'pair')} in {database}", as_json)


@app.command(cls=_TakesIds)
def remove(
    database: Folder,
    ids: Annotated[list[int] | None, typer.Argument(metavar="ID…", help="Ids to remove.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="column=value; a pair must match all of them.")] = None,
    as_json: Json = False,
) -> None:
    """Remove pairs from every later search. `compact` then deletes their bytes."""
    from ragturbo.messages import many
    from ragturbo.retrieval import Database

    refuse_embedded(database)
    wanted = conditions(where)
    if bool(ids) == bool(wanted):
        both = "both were given" if ids else "neither was given"
        raise InvalidRequest(f"give ids, or --where COLUMN=VALUE: {both}")
    opened = Database.open(database, retriever="exact")
    removed = opened.remove(ids) if ids else opened.remove(where=typed(wanted))
    left = len(opened)
    text = f"removed {many(removed, 'pair')}; {left} {'is' if left == 1 else 'are'} left"
    say({"removed": removed, "pairs": left}, text, as_json)


@app.command()
def compact(database: Folder, as_json: Json = False) -> None:
    """Delete removed pairs from the disk and merge small segments."""
    from ragturbo.retrieval import Database

    refuse_embedded(database)
    opened = Database.open(database, retriever="exact")
    before = opened.info.bytes
    opened.compact()
    after = opened.info.bytes
    say({"bytes_before": before, "bytes_after": after}, f"{before} bytes before, {after} after", as_json)


@app.command()
def reindex(
    database: Folder,
    centred: Annotated[
        bool | None, typer.Option("--centred/--uncentred", help="Search about the mean of the keys.")
    ] = None,
    leaves: Annotated[int | None, typer.Option(help="Leaves of the tree; 0: no tree.")] = None,
    leaves_to_search: Annotated[int | None, typer.Option(help="Leaves that a search reads.")] = None,
    reorder: Annotated[int | None, typer.Option(help="Candidates rescored in bfloat16.")] = None,
    threads: Annotated[int, typer.Option(help="Threads for training; 0: all.")] = 0,
    as_json: Json = False,
) -> None:
    """Build the ScaNN index over all live pairs."""
    from dataclasses import replace

    from ragturbo.messages import many
    from ragturbo.retrieval import Database, ScannConfig
    from ragturbo.retrieval.retriever import EXACT_BELOW

    refuse_embedded(database)
    opened = Database.open(database, retriever="exact")
    given = {"leaves": leaves, "leaves_to_search": leaves_to_search, "reorder": reorder}
    chosen = {name: value for name, value in given.items() if value is not None}
    config = None
    if chosen:
        wanted = opened.snapshot.manifest.centred if centred is None else centred
        base = ScannConfig.by_size(max(len(opened), 1), wanted)
        if leaves and leaves_to_search is None:
            chosen["leaves_to_search"] = min(leaves, max(20, round(leaves / 40)))
        config = replace(base, **chosen, soar=bool(chosen.get("leaves", base.leaves)))  # type: ignore[arg-type]
    began = time.monotonic()
    opened.reindex(config, centred=centred, threads=threads)
    index = opened.info.index
    seconds = time.monotonic() - began
    if index:
        text = f"an index of {many(index['rows'], 'pair')} in {seconds:.0f} s"
    elif len(opened) < EXACT_BELOW:
        text = f"no index: exact search is as fast for {many(len(opened), 'pair')}, fewer than {EXACT_BELOW}"
    else:
        text = "no index: the package scann is not installed"
    say({"index": index, "seconds": seconds}, text, as_json)


for command in (db_read.info, db_read.search, db_read.listed, db_read.show, db_read.export, db_read.verify):
    name = "list" if command is db_read.listed else None
    app.command(name, cls=_TakesIds if command is db_read.show else None)(command)


def _with_captions(pairs: list[str], captions: list[str]) -> tuple[Any, str, bool]:
    """Return the pairs, the column of their captions, and whether they are image files with captions."""
    from ragturbo.messages import many
    from ragturbo.retrieval.images import load
    from ragturbo.retrieval.items import IMAGE_TYPES, check_caption

    images = [path for path in pairs if Path(path).suffix.lower() in IMAGE_TYPES and not Path(path).is_dir()]
    if not images:
        if len(captions) > 1:
            raise InvalidRequest(f"{len(captions)} captions but no image file; for a table, --caption is its column")
        return one_or_many(pairs), captions[0] if captions else "caption", False
    if len(images) < len(pairs):
        other = next(path for path in pairs if path not in images)
        raise InvalidRequest(f"{images[0]} is an image file and {other} is not; append them one after the other")
    if len(images) != len(captions):
        raise InvalidRequest(
            f"{many(len(images), 'image file')} and {many(len(captions), 'caption')}; give one --caption for each, in "
            "their order"
        )
    # Before the model is loaded.
    for path, caption in zip(images, captions, strict=True):
        if not Path(path).exists():
            raise InvalidRequest(f"{path}: no such file")
        if problem := check_caption(caption):
            raise InvalidRequest(f"{path}: {problem}")
        try:
            load(path, _LOOK)
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}: {error}") from error
    return list(zip(captions, images, strict=True)), "caption", True


def _check_creation(database: Path, create: bool) -> None:
    from ragturbo.errors import DatabaseError
    from ragturbo.retrieval.writer import check_new, check_writable

    if not create:
        raise DatabaseError(
            f"there is no database {database}; make one with --create, or copy a model's: "
            f"`ragturbo db copy shapes {shlex.quote(str(database))}`"
        )
    check_new(database.expanduser())
    check_writable(database.expanduser())


def _say_report(report: Any, as_json: bool, text: str) -> None:
    facts = {"database": report.path, "generation": report.generation, "added": 0 if report.already else report.pairs,
             "pairs": report.total, "first_id": report.first_id, "skipped": report.skipped, "notes": report.notes,
             "seconds": report.seconds, "encoded": report.encoded}  # fmt: skip
    say(facts, "\n".join([text, *report.lines()]), as_json)


def _built(report: Any) -> str:
    from ragturbo.messages import many

    text = f"{many(report.pairs, 'pair')} in {report.path}"
    if report.already:
        return f"{text}: this build was complete already"
    return f"{text}, {report.rate:.1f} encoded per second" if report.encoded else text


def _appended(report: Any) -> str:
    """Say which ids the new pairs have, for a few how to remove them, and how many pairs there are."""
    from ragturbo.messages import many

    ids, total = report.ids, f"{many(report.total, 'pair')} in all"
    if not ids:
        return f"nothing added to {report.path}; {total}"
    few = len(ids) <= 8
    named = " ".join(map(str, ids)) if few else f"{ids[0]} to {ids[-1]}"
    noun = "id" if len(ids) == 1 else "ids"
    if report.already:
        return f"nothing added to {report.path}: the same input was the last append ({noun} {named}); {total}"
    undo = f" (`ragturbo db remove {shlex.quote(report.path)} {named}` undoes it)" if few else ""
    return f"{many(report.pairs, 'pair')} added to {report.path}: {noun} {named}{undo}; {total}"
