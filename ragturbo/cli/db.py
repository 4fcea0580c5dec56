"""`ragturbo db …`: build, change, prove and describe a retrieval database."""

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

app = typer.Typer(name="db", help="Build, change, prove and describe a retrieval database.", no_args_is_help=True)

_Folder = Annotated[Path, typer.Argument(metavar="DATABASE", help="The database's folder.")]
_Pairs = Annotated[
    list[str], typer.Argument(metavar="PAIRS…", help="A folder, or .jsonl, .csv, .parquet or .tar files or a pattern.")
]
_Json = Annotated[bool, typer.Option("--json", help="For machines.")]
_Model = Annotated[str, typer.Option(help='"shapes" (embedded), a local folder or a hub id.')]
_Caption = Annotated[str, typer.Option(help="The column of the captions.")]
_Image = Annotated[str, typer.Option(help='The column of the images, or a pattern: "train/{image_id}.jpg".')]
_Root = Annotated[Path | None, typer.Option(help="The folder image paths are under.")]
_Columns = Annotated[list[str] | None, typer.Option("--column", help="A column to keep; once for each. Default: all.")]
_Batch = Annotated[int, typer.Option(help="Images encoded at once.")]
_Workers = Annotated[int | None, typer.Option(help="Decoding threads.")]
_Thumbnails = Annotated[bool, typer.Option("--thumbnails/--no-thumbnails", help="Keep a small WebP of every image.")]
_Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first bad image or caption.")]
_Resume = Annotated[bool, typer.Option("--resume/--restart", help="Go on where a killed run stopped.")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")]
_Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]


@app.command()
def build(
    pairs: _Pairs,
    database: Annotated[Path, typer.Option("--out", "-o", help="The folder of the new database.")],
    model: _Model = "shapes",
    key: Annotated[str | None, typer.Option(help="pooled or clip. Default: the model's own.")] = None,
    feature_dtype: Annotated[str, typer.Option(help="float16, or int8 with a scale a token.")] = "float16",
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels. Default: the model's own.")] = None,
    segment_records: Annotated[int | None, typer.Option(help="Pairs a segment. Default: about 1 GiB.")] = None,
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
    """Encode pairs into a new database. Killed, it resumes; under torchrun, every process takes a share."""
    quiet_libraries()
    from ragturbo.retrieval import build as builder

    with _progress() as progress:
        report = builder.build(
            _one(pairs), database, model=model, key=key, feature_dtype=feature_dtype, size=size,
            segment_records=segment_records, index=index, centred=centred, caption=caption, image=image,
            image_root=image_root, columns=columns, batch_size=batch_size, workers=workers, thumbnails=thumbnails,
            strict=strict, resume=resume, on_progress=progress, **_where(device, dtype),
        )  # fmt: skip
    _say_report(report, as_json)


@app.command()
def append(
    database: _Folder,
    pairs: _Pairs,
    model: _Model = "shapes",
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
    """Encode more pairs with the model the database was built with."""
    quiet_libraries()
    from ragturbo.retrieval import build as builder

    with _progress() as progress:
        report = builder.append(
            _one(pairs), database, model=model, caption=caption, image=image, image_root=image_root, columns=columns,
            batch_size=batch_size, workers=workers, thumbnails=thumbnails, strict=strict, resume=resume,
            on_progress=progress, **_where(device, dtype),
        )  # fmt: skip
    _say_report(report, as_json)


@app.command()
def remove(
    database: _Folder,
    ids: Annotated[list[int] | None, typer.Argument(metavar="ID…", help="Ids to remove.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="column=value; several must all hold. Quarantines a source.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Take pairs out of every search from now on. `compact` then deletes their bytes."""
    from ragturbo.retrieval import Database

    conditions = dict(_condition(text) for text in where or [])
    if bool(ids) == bool(conditions):
        raise InvalidRequest("give ids, or --where column=value")
    opened = Database.open(database, retriever="exact")
    removed = opened.remove(ids) if ids else opened.remove(where=_typed(opened, conditions))
    _say({"removed": removed, "pairs": len(opened)}, f"removed {removed} pairs; {len(opened)} are left", as_json)


@app.command()
def verify(
    database: _Folder,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes, manifest, tables, keys and index only.")] = False,
    as_json: _Json = False,
) -> None:
    """Read every byte and compare it with the manifest. Exit code 3 and a list of what is damaged, if anything is."""
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
    text = "\n".join(found) if found else f"{database} is whole: {len(snapshot)} pairs"
    _say({"whole": not found, "problems": found}, text, as_json)
    if found:
        raise typer.Exit(3)


@app.command()
def info(database: _Folder, as_json: _Json = False) -> None:
    """What is in a database, what made it, and how it is searched."""
    from ragturbo.retrieval import Database

    facts = Database.open(database, retriever="auto").info.to_dict()
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
    leaves: Annotated[int | None, typer.Option(help="Partitions of the tree; 0: no tree.")] = None,
    leaves_to_search: Annotated[int | None, typer.Option()] = None,
    reorder: Annotated[int | None, typer.Option(help="Candidates scored again at full width.")] = None,
    threads: Annotated[int, typer.Option(help="0: all.")] = 0,
    as_json: _Json = False,
) -> None:
    """Build the ScaNN index anew over all live pairs."""
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


def _where(device: str | None, dtype: str | None) -> dict[str, Any]:
    if dtype is None:
        return {"device": device}
    import torch

    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in names:
        raise InvalidRequest(f"dtype={dtype!r} is not one of {', '.join(names)}")
    return {"device": device, "dtype": names[dtype]}


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or not column:
        raise InvalidRequest(f"--where {text!r} must be column=value")
    return column, value


def _typed(database: Any, conditions: dict[str, str]) -> dict[str, Any]:
    """A value as text, and as the number or truth value it may be: columns keep the types they came with."""
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
    """A bar with rate and time left, on stderr, where somebody looks at it."""
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


def _say_report(report: Any, as_json: bool) -> None:
    facts = {"database": report.path, "generation": report.generation, "pairs": report.pairs,
             "skipped": report.skipped, "seconds": report.seconds, "encoded": report.encoded}  # fmt: skip
    text = f"{report.pairs} pairs in {report.path}"
    if report.encoded:
        text += f", {report.rate:.1f} encoded a second"
    if report.skipped:
        first = report.skipped[0]
        text += (
            f"\n{len(report.skipped)} skipped, the first: item {first['item']} ({first['source']}): {first['reason']}\n"
            f"all of them: {report.path}/build-report.json"
        )
    _say(facts, text, as_json)


def _say(facts: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(facts, indent=2) if as_json else text)


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
