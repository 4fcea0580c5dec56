"""`ragturbo db …`: build, change, verify and describe a retrieval database."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ragturbo.cli.terminal import interactive, quiet_libraries
from ragturbo.errors import DatabaseCorrupt, InvalidRequest

app = typer.Typer(name="db", help="Build, change, verify and describe a retrieval database.", no_args_is_help=True)

_Folder = Annotated[Path, typer.Argument(metavar="DATABASE", help="Folder of the database.")]
_Pairs = Annotated[
    list[str], typer.Argument(metavar="PAIRS…", help="A folder, or .jsonl, .csv, .parquet or .tar files, or a pattern.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Model = Annotated[str, typer.Option(help='"shapes" (embedded), a local folder or a hub id.')]
_Caption = Annotated[str, typer.Option(help="Column of the captions.")]
_Image = Annotated[str, typer.Option(help='Column of the images, or a pattern: "train/{image_id}.jpg".')]
_Root = Annotated[Path | None, typer.Option(help="Folder of the image paths.")]
_Columns = Annotated[list[str] | None, typer.Option("--column", help="Column to keep; repeatable. Default: all.")]
_Batch = Annotated[int, typer.Option(help="Images encoded at once.")]
_Workers = Annotated[int | None, typer.Option(help="Threads that decode images.")]
_Thumbnails = Annotated[bool, typer.Option("--thumbnails/--no-thumbnails", help="Store a small WebP of each image.")]
_Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first bad image or caption.")]
_Resume = Annotated[bool, typer.Option("--resume/--restart", help="Continue a run that was killed.")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")]
_Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]


@app.command()
def build(
    pairs: _Pairs,
    database: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new database.")],
    model: _Model = "shapes",
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
    strict: _Strict = False,
    resume: _Resume = True,
    device: _Device = None,
    dtype: _Dtype = None,
    as_json: _Json = False,
) -> None:
    """Encode pairs into a new database. Resumes after a kill; torchrun shares the work among processes."""
    quiet_libraries()
    from ragturbo.retrieval import build as builder

    with _progress() as progress:
        report = builder.build(
            _one(pairs), database, model=model, key=key, feature_dtype=feature_dtype, size=size,
            segment_records=segment_records, index=index, centred=centred, caption=caption, image=image,
            image_root=image_root, columns=columns, batch_size=batch_size, workers=workers, thumbnails=thumbnails,
            strict=strict, resume=resume, on_progress=progress, **_device_options(device, dtype),
        )  # fmt: skip
    _say_report(report, as_json)


@app.command()
def append(
    database: _Folder,
    pairs: Annotated[
        list[str],
        typer.Argument(metavar="PAIRS…", help="As for build, or image files with one --caption each."),
    ],
    model: _Model = "shapes",
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
    strict: _Strict = False,
    resume: _Resume = True,
    device: _Device = None,
    dtype: _Dtype = None,
    as_json: _Json = False,
) -> None:
    """Encode more pairs with the model that built the database. Of image files, all are added or none."""
    quiet_libraries()
    from ragturbo.retrieval import build as builder

    source, column, named = _with_captions(pairs, caption or [])
    change = builder.append
    if not (database.expanduser() / "CURRENT").exists():
        _check_creation(database, create)
        change = builder.build
        typer.echo(f"{database} does not exist: making it, for the model {model}", err=True)
    with _progress() as progress:
        report = change(
            source, database, model=model, caption=column, image=image, image_root=image_root, columns=columns,
            batch_size=batch_size, workers=workers, thumbnails=thumbnails, strict=strict or named, resume=resume,
            on_progress=progress, **_device_options(device, dtype),
        )  # fmt: skip
    _say_report(report, as_json, appended=True)


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A database, or a model that has one: shapes.")],
    database: Annotated[Path, typer.Argument(metavar="COPY", help="Folder of the new database.")],
    as_json: _Json = False,
) -> None:
    """Copy a database, for example a model's own to append to it. Ids stay the same."""
    from ragturbo.retrieval import Database

    made = Database.copy(source, database)
    facts = {"database": str(database), "pairs": len(made), "generation": made.snapshot.manifest.generation}
    _say(facts, f"{len(made)} pairs in {database}", as_json)


@app.command()
def remove(
    database: _Folder,
    ids: Annotated[list[int] | None, typer.Argument(metavar="ID…", help="Ids to remove.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="column=value; a pair must match all of them.")] = None,
    as_json: _Json = False,
) -> None:
    """Remove pairs from every later search. `compact` then deletes their bytes."""
    from ragturbo.retrieval import Database

    conditions = dict(_condition(text) for text in where or [])
    if bool(ids) == bool(conditions):
        raise InvalidRequest("give ids, or --where column=value")
    opened = Database.open(database, retriever="exact")
    removed = opened.remove(ids) if ids else opened.remove(where=_typed(conditions))
    _say({"removed": removed, "pairs": len(opened)}, f"removed {removed} pairs; {len(opened)} are left", as_json)


@app.command()
def verify(
    database: _Folder,
    quick: Annotated[bool, typer.Option("--quick", help="Manifest, sizes, tables, keys and index only.")] = False,
    as_json: _Json = False,
) -> None:
    """Read every byte and compare it with the manifest. If there is damage, list it and exit with code 3."""
    from ragturbo.retrieval.snapshot import open_snapshot
    from ragturbo.retrieval.verify import problems

    say = (lambda name: print(f"\rsegment {name}", end="", file=sys.stderr)) if interactive() else None
    try:
        snapshot = open_snapshot(database)
        found = list(problems(snapshot, "quick" if quick else "full", say))
    except DatabaseCorrupt as error:
        found = [str(error)]
    if say:
        print("\r", end="", file=sys.stderr)
    text = "\n".join(found) if found else f"{database} is undamaged: {len(snapshot)} pairs"
    _say({"whole": not found, "problems": found}, text, as_json)
    if found:
        raise typer.Exit(3)


@app.command()
def info(database: _Folder, as_json: _Json = False) -> None:
    """Describe a database, its encoder and its retriever."""
    from ragturbo.retrieval import Database

    facts = Database.open(database).info.to_dict()
    width = max(len(name) for name in facts)
    _say(facts, "\n".join(f"{name:{width}}  {_plain(value)}" for name, value in facts.items()), as_json)


@app.command()
def compact(database: _Folder, as_json: _Json = False) -> None:
    """Delete removed pairs from the disk and merge small segments."""
    from ragturbo.retrieval import Database

    opened = Database.open(database, retriever="exact")
    before = opened.info.bytes
    opened.compact()
    after = opened.info.bytes
    _say({"bytes_before": before, "bytes_after": after}, f"{before} bytes before, {after} after", as_json)


@app.command()
def reindex(
    database: _Folder,
    centred: Annotated[
        bool | None, typer.Option("--centred/--uncentred", help="Search about the mean of the keys.")
    ] = None,
    leaves: Annotated[int | None, typer.Option(help="Leaves of the tree; 0: no tree.")] = None,
    leaves_to_search: Annotated[int | None, typer.Option()] = None,
    reorder: Annotated[int | None, typer.Option(help="Candidates rescored in bfloat16.")] = None,
    threads: Annotated[int, typer.Option(help="0: all.")] = 0,
    as_json: _Json = False,
) -> None:
    """Build the ScaNN index over all live pairs."""
    from dataclasses import replace

    from ragturbo.retrieval import Database, ScannConfig

    opened = Database.open(database, retriever="exact")
    given = {"leaves": leaves, "leaves_to_search": leaves_to_search, "reorder": reorder}
    chosen = {name: value for name, value in given.items() if value is not None}
    config = None
    if chosen:
        wanted = opened.snapshot.manifest.centred if centred is None else centred
        base = ScannConfig.by_size(max(len(opened), 1), wanted)
        config = replace(base, **chosen, soar=bool(chosen.get("leaves", base.leaves)))  # type: ignore[arg-type]
    began = time.monotonic()
    opened.reindex(config, centred=centred, threads=threads)
    index = opened.info.index
    seconds = time.monotonic() - began
    text = f"an index of {index['rows']} pairs in {seconds:.0f} s" if index else f"no index: {opened.choice()[1]}"
    _say({"index": index, "seconds": seconds}, text, as_json)


def _one(pairs: list[str]) -> Any:
    return pairs[0] if len(pairs) == 1 else pairs


def _with_captions(pairs: list[str], captions: list[str]) -> tuple[Any, str, bool]:
    """Return the pairs, the column of their captions, and whether they are image files with captions."""
    from ragturbo.retrieval.sources import IMAGE_TYPES

    images = [path for path in pairs if Path(path).suffix.lower() in IMAGE_TYPES and not Path(path).is_dir()]
    if not images:
        if len(captions) > 1:
            raise InvalidRequest(f"{len(captions)} captions but no image file; for a table, --caption is its column")
        return _one(pairs), captions[0] if captions else "caption", False
    if len(images) < len(pairs):
        other = next(path for path in pairs if path not in images)
        raise InvalidRequest(f"{images[0]} is an image file and {other} is not; append them one after the other")
    if len(images) != len(captions):
        raise InvalidRequest(
            f"{len(images)} image files and {len(captions)} captions; give one --caption for each, in their order"
        )
    return list(zip(captions, images, strict=True)), "caption", True


def _check_creation(database: Path, create: bool) -> None:
    from ragturbo.errors import DatabaseError
    from ragturbo.retrieval.writer import check_new

    if not create:
        raise DatabaseError(
            f"there is no database {database}; make one with --create, or copy a model's: "
            f"`ragturbo db copy shapes {database}`"
        )
    check_new(database.expanduser())


def _device_options(device: str | None, dtype: str | None) -> dict[str, Any]:
    if dtype is None:
        return {"device": device}
    import torch

    if dtype not in (names := ("float32", "float16", "bfloat16")):
        raise InvalidRequest(f"dtype={dtype!r} is not one of {', '.join(names)}")
    return {"device": device, "dtype": getattr(torch, dtype)}


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or not column:
        raise InvalidRequest(f"--where {text!r} must be column=value")
    return column, value


def _typed(conditions: dict[str, str]) -> dict[str, Any]:
    """Return each value as text and as the numbers it parses as, because columns are typed."""
    typed: dict[str, Any] = {}
    for column, value in conditions.items():
        options: list[Any] = [value]
        for kind in (int, float):
            try:
                options.append(kind(value))
            except ValueError:
                continue
        typed[column] = options
    return typed


@contextmanager
def _progress() -> Iterator[Callable[[int, int | None, int], None] | None]:
    """Show a progress bar on stderr if it is a terminal."""
    if not interactive():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, rate="")
        began = time.monotonic()

        def show(done: int, total: int | None, skipped: int) -> None:
            rate = done / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} pairs/s, {skipped} skipped")

        yield show


def _say_report(report: Any, as_json: bool, *, appended: bool = False) -> None:
    facts = {"database": report.path, "generation": report.generation, "pairs": report.pairs,
             "first_id": report.first_id, "skipped": report.skipped, "seconds": report.seconds,
             "encoded": report.encoded}  # fmt: skip
    text = f"{report.pairs} pairs in {report.path}"
    if appended:
        text = _appended(report)
    elif report.encoded:
        text += f", {report.rate:.1f} encoded per second"
    if report.skipped:
        first = report.skipped[0]
        text += (
            f"\n{len(report.skipped)} skipped, the first: item {first['item']} ({first['source']}): {first['reason']}\n"
            f"all of them: {report.path}/build-report.json"
        )
    _say(facts, text, as_json)


def _appended(report: Any) -> str:
    """Say which ids the new pairs have, and for a few how to remove them."""
    ids, few = report.ids, report.pairs <= 8
    named = " ".join(map(str, ids)) if few else f"{ids[0]} to {ids[-1]}"
    text = f"{report.pairs} {'pair' if report.pairs == 1 else 'pairs'} added to {report.path}: id {named}"
    return f"{text} (`ragturbo db remove {report.path} {named}` undoes it)" if few else text


def _say(facts: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(facts, indent=2) if as_json else text)


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
