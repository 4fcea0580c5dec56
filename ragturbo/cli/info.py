"""`ragturbo info`: what is installed, which fast paths are on, and why one is off."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def info(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Say what is installed, which fast paths are on, and why one is off."""
    from ragturbo.info import collect, lines

    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        for line in lines(facts):
            typer.echo(line)
