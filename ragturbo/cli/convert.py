"""`ragturbo convert`: pickled checkpoints to safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ragturbo.cli import options


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A pickled checkpoint (.bin, .pt, .pth, .ckpt) or a folder of them."),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The .safetensors file or folder to write.")],
    as_json: options.Json = False,
) -> None:
    """Convert a pickled checkpoint to safetensors without running code that the pickle may contain."""
    from ragturbo.convert import convert as run

    written = run(source, target)
    typer.echo(json.dumps({"written": list(map(str, written))}) if as_json else f"wrote {target}")
