"""`ragturbo info`: installed packages, available fast paths, and why a path is off."""

from __future__ import annotations

import json

import typer

from ragturbo.cli import options


def info(as_json: options.Json = False) -> None:
    """Show installed packages, which fast paths are on, and why one is off."""
    from ragturbo.info import collect, lines

    facts = collect()
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(lines(facts)))
