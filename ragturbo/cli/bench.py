"""`ragturbo bench …`: the paper's Fig. 6 on this machine, and the pages made from the raw results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure this machine, and make the pages of measured results.", no_args_is_help=True)
JsonFlag = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.command()
def breakdown(
    model: Annotated[
        str,
        typer.Option(help='"sd21" (random weights), "rehearsal" (small ones), "shapes", a folder or a hub id.'),
    ] = "sd21",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default a GPU if there is one.")] = None,
    prompts: Annotated[int, typer.Option(help="Different prompts, one image each.")] = 100,
    teacher_prompts: Annotated[int, typer.Option(help="Prompts for the 50-step teacher.")] = 5,
    pairs: Annotated[int, typer.Option(help="Pairs in the database rows are read from, for random weights.")] = 4096,
    keys: Annotated[int, typer.Option(help="Keys that are searched.")] = 630_000,
    profile: Annotated[list[str] | None, typer.Option(help="paper, turbo; both by default.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A folder for JSON and bar chart.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """The paper's Fig. 6: teacher, LCM, SD Turbo and ours, in the paper's way and in ragturbo's."""
    from ragturbo.cli.terminal import interactive, quiet_libraries

    quiet_libraries()
    import torch

    from ragturbo.bench.breakdown import LABELS, Settings
    from ragturbo.bench.breakdown import breakdown as measure
    from ragturbo.bench.chart import bars, markdown
    from ragturbo.errors import InvalidRequest

    chosen = tuple(profile or ("paper", "turbo"))
    if unknown := sorted(set(chosen) - {"paper", "turbo"}):
        raise InvalidRequest(f"profile {unknown[0]!r} is neither paper nor turbo")
    settings = Settings(
        config=model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), prompts=prompts,
        teacher_prompts=teacher_prompts, pairs=pairs, keys=keys, profiles=chosen,
    )  # fmt: skip

    def tell(profile: str, kind: str) -> None:
        if interactive():
            typer.echo(f"{profile}: {LABELS[kind]} …", err=True)

    record = measure(settings, tell)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "breakdown.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        bars(record, out / "breakdown.png")
    typer.echo(json.dumps(record, indent=1) if as_json else markdown(record))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of raw results, one folder a machine.")] = Path(
        "benchmarks/results"
    ),
    page: Annotated[Path, typer.Option(help="The page whose marked sections are made from them.")] = Path(
        "docs/performance.md"
    ),
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 3 on disagreement.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make the tables and plots of docs/performance.md from the raw JSON, or check that they agree."""
    from ragturbo.bench.report import update

    changed: list[str] = update(results, page, write=not check)
    told: dict[str, Any] = {"page": str(page), "stale": changed if check else [], "written": [] if check else changed}
    if as_json:
        typer.echo(json.dumps(told, indent=1))
    elif not changed:
        typer.echo(f"{page} agrees with {results}")
    else:
        verb = "disagrees with the data in" if check else "updated:"
        typer.echo(f"{page} {verb} {', '.join(changed)}" + ("; run `ragturbo bench report`" if check else ""))
    if check and changed:
        raise typer.Exit(3)


@app.command()
def history(
    files: Annotated[
        list[Path], typer.Argument(help="Raw JSON of suites, such as older ones: `git show COMMIT:FILE`.")
    ],
    results: Annotated[Path, typer.Option(help="Folder of raw results, one folder a machine.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Keep what one image took by these runs. `report` does it for those that lie in the folder."""
    from ragturbo.bench.history import keep_file

    for path in files:
        kept = keep_file(path, results)
        typer.echo(f"{path} -> {kept[0]}" if kept else f"{path}: what is kept is no worse")
