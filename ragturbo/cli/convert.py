"""`ragturbo convert`: pickles people have, as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="A pickled checkpoint (.bin, .pt, .pth, .ckpt) or a folder of them.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file or folder to write.")],
) -> None:
    """Turn a pickled checkpoint into safetensors, without running what the pickle may carry."""
    from ragturbo.convert import convert as run

    run(source, target)
    typer.echo(f"wrote {target}")
