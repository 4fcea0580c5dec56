"""`ragturbo convert`: pickled checkpoints to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="A pickled checkpoint (.bin, .pt, .pth, .ckpt) or a folder of them.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file or folder to write.")],
) -> None:
    """Convert a pickled checkpoint to safetensors without running code that the pickle may contain."""
    from ragturbo.convert import convert as run

    run(source, target)
    typer.echo(f"wrote {target}")
