"""Arguments and output that the `ragturbo db` commands share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ragturbo.errors import InvalidRequest
from ragturbo.terminal import interactive, quiet_libraries

Folder = Annotated[Path, typer.Argument(metavar="DATABASE", help="Folder of the database.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Progress = Callable[[int, "int | None", int], None]


def say(facts: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str) if as_json else text)


def is_embedded(database: Path) -> bool:
    """Whether this is the embedded model's name, and no folder."""
    from ragturbo.model.find import EMBEDDED

    return str(database) == EMBEDDED and not database.exists()


def refuse_embedded(database: Path) -> None:
    if is_embedded(database):
        raise InvalidRequest(
            f"{database} is the embedded model's database, which cannot be changed; change a copy: "
            f"`ragturbo db copy {database} my-db`"
        )


def one_or_many(pairs: list[str]) -> Any:
    return pairs[0] if len(pairs) == 1 else pairs


def conditions(texts: list[str] | None) -> dict[str, str]:
    """Parse "column=value" of different columns."""
    found: dict[str, str] = {}
    for text in texts or []:
        column, equals, value = text.partition("=")
        if not equals or not column:
            raise InvalidRequest(f"--where {text!r} must be COLUMN=VALUE", option="where")
        if column in found:
            raise InvalidRequest(f"--where names {column!r} twice, and a pair has one value of it", option="where")
        found[column] = value
    return found


def typed(conditions: dict[str, str]) -> dict[str, Any]:
    """Return each value as text and as the numbers it parses as, because columns are typed."""
    found: dict[str, Any] = {}
    for column, value in conditions.items():
        options: list[Any] = [value]
        for kind in (int, float):
            try:
                options.append(kind(value))
            except ValueError:
                continue
        found[column] = options
    return found


@contextmanager
def progress(model: str | None) -> Iterator[tuple[Callable[[], None], _Progress | None]]:
    """Show on stderr, if it is a terminal, that the model is loaded, and then a progress bar.

    Yields:
        What to call before the model is loaded, and with (done, total, skipped).
    """
    if not interactive():
        yield quiet_libraries, None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading", total=None, rate="")
        began = time.monotonic()

        def load() -> None:
            quiet_libraries()
            bar.update(task, description=f"loading {model or 'the model'}")

        def show(done: int, total: int | None, skipped: int) -> None:
            nonlocal began
            if not done:
                began = time.monotonic()
            rate = done / max(time.monotonic() - began, 1e-9) if done else 0.0
            bar.update(task, description="", completed=done, total=total, rate=f"{rate:.1f} pairs/s, {skipped} skipped")

        yield load, show
