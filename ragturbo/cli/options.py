"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Model = Annotated[str, typer.Option(help='"shapes" (included), a local folder or a hub id.')]
Database = Annotated[str | None, typer.Option(help='A database folder, or "off". Default: the model\'s own.')]
Adapter = Annotated[
    str | None, typer.Option(help='A folder with adapter.safetensors, or "off". Default: the model\'s own.')
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … Default: a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Distilled = Annotated[
    bool | None,
    typer.Option("--distilled/--undistilled", help="Whether the model takes 1 to 4 steps. Default: as it says itself."),
]
Engine = Annotated[str, typer.Option(help="auto, reference or graph.")]
Capture = Annotated[
    bool, typer.Option("--capture/--no-capture", help="Capture CUDA graphs; otherwise the graph engine runs eagerly.")
]
Retriever = Annotated[str, typer.Option(help="auto, scann, exact, bm25 or hybrid, which finds names.")]
Compose = Annotated[
    bool | None,
    typer.Option(
        "--compose/--no-compose",
        help="Neighbours for each noun phrase of a prompt. Default: as the adapter was trained.",
    ),
]
Attention = Annotated[str, typer.Option(help="auto, sdpa, triton or xformers.")]
Vae = Annotated[str, typer.Option(help="full, tiny, or the path or hub id of an AutoencoderTiny.")]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Do not download from the hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def path_or_off(value: str | None) -> str | Literal[False] | None:
    """Convert "off" to False, which is how Generator.from_pretrained turns a database or adapter off."""
    return False if value == "off" else value
