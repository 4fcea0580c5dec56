"""`ragturbo bench`: measure the paper's Fig. 6 on this machine, and generate docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure the paper's Fig. 6, and generate the page of measured results.", no_args_is_help=True)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def breakdown(
    model: Annotated[
        str, typer.Option(help='"sd21" (random weights), "rehearsal" (small ones), "shapes", a folder or a hub id.')
    ] = "sd21",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default a GPU if there is one.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts, one image each.")] = 100,
    teacher_prompts: Annotated[int, typer.Option(min=1, help="Number of prompts for the 50-step teacher.")] = 5,
    pairs: Annotated[int, typer.Option(min=1, help="Size of the database, with random weights.")] = 4096,
    keys: Annotated[int, typer.Option(min=1, help="Number of keys to search.")] = 630_000,
    profile: Annotated[list[str] | None, typer.Option(help="paper, turbo; both by default.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the JSON and the bar chart.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure the paper's Fig. 6: teacher, LCM, SD Turbo and ours, as eager modules and by ragturbo."""
    from ragturbo.bench.paper import LABELS, PROFILES, RANDOM_WEIGHTS
    from ragturbo.config import check_device, one_of
    from ragturbo.folders import check_writable, make_folder
    from ragturbo.model.find import Hub, look
    from ragturbo.terminal import interactive, loading

    for name in profile or []:
        one_of("profile", name, PROFILES)
    check_device(device)
    if model not in RANDOM_WEIGHTS:
        look(model, Hub())
    if out is not None:
        check_writable(out)
    with loading(model):
        import torch

        from ragturbo.bench.breakdown import Settings
        from ragturbo.bench.breakdown import breakdown as measure
        from ragturbo.bench.fig6 import bars, markdown

    chosen = tuple(profile or PROFILES)
    settings = Settings(
        config=model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), prompts=prompts,
        teacher_prompts=teacher_prompts, pairs=pairs, keys=keys, profiles=chosen,
    )  # fmt: skip

    def tell(profile: str, kind: str, record: dict[str, Any]) -> None:
        if interactive():
            typer.echo(f"{profile}: {LABELS[kind]} …", err=True)

    record = measure(settings, tell)
    if out is not None:
        make_folder(out)
        (out / "breakdown.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        bars(record, out / "breakdown.png")
    typer.echo(json.dumps(record, indent=1) if as_json else markdown(record))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of raw results, one subfolder per machine.")] = Path(
        "benchmarks/results"
    ),
    page: Annotated[Path, typer.Option(help="Page whose marked sections are generated.")] = Path("docs/performance.md"),
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 3 if out of date.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Generate the tables of docs/performance.md from the raw JSON, or check that they are up to date."""
    from ragturbo.bench.performance_page import update

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
