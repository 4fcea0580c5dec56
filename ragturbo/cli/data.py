"""`ragturbo data …`: what the trainer reads. Each command shares its work by torchrun and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragturbo.cli.terminal import quiet_libraries

app = typer.Typer(
    help="Make training data: teacher latents, encoded images, neighbours, latent LPIPS.", no_args_is_help=True
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards.")]
Model = Annotated[str, typer.Option(help="A local folder or a hub id.")]
Caption = Annotated[str, typer.Option(help="Name of the caption column.")]
ScoreColumn = Annotated[str | None, typer.Option(help="Name of a column of scores, with --min-score.")]
MinScore = Annotated[float | None, typer.Option(help="Rows that score less are left out.")]
Batch = Annotated[int, typer.Option(help="Samples a forward; part of what a resumed run must keep.")]
ShardSize = Annotated[int, typer.Option(help="Inputs a shard: the unit of work and of restart.")]
Dtype = Annotated[str, typer.Option(help="What is stored: float16, bfloat16 or float32.")]
Precision = Annotated[str | None, typer.Option(help="What it is computed in; float16 on a GPU unless said otherwise.")]
StoreText = Annotated[bool, typer.Option("--store-text", help="Store text states too: more disk, no text encoder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; the launcher's own by default.")]


@app.command()
def teacher(
    prompts: Annotated[Path, typer.Argument(help=".txt, one prompt a line, or .jsonl, .csv, .parquet.")],
    out: Out,
    model: Model,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.5,
    steps: Annotated[int, typer.Option(help="Steps of the teacher.")] = 50,
    seed: Annotated[int, typer.Option(help="Prompt i has noise (seed, i).")] = 0,
    caption_column: Caption = "caption",
    score_column: ScoreColumn = None,
    min_score: MinScore = None,
    limit: Annotated[int | None, typer.Option(help="Take the first so many prompts.")] = None,
    batch: Batch = 16,
    shard_size: ShardSize = 1024,
    dtype: Dtype = "float16",
    precision: Precision = None,
    store_text: StoreText = False,
    device: Device = None,
) -> None:
    """Prompts to the teacher's latents, with the noise that made them."""
    quiet_libraries()
    from ragturbo.train.prompts import read_prompts
    from ragturbo.train.teacher import make_teacher_data

    chosen = read_prompts(prompts, caption=caption_column, score_column=score_column, min_score=min_score, limit=limit)
    written = make_teacher_data(
        chosen,
        out,
        model=model,
        guidance=guidance,
        steps=steps,
        seed=seed,
        batch=batch,
        shard_size=shard_size,
        dtype=_dtype(dtype, "--dtype"),
        precision=precision and _dtype(precision, "--precision"),
        store_text=store_text,
        device=device,
    )
    typer.echo(f"wrote {written} shards to {out}")


@app.command()
def encode(
    pairs: Annotated[str, typer.Argument(help="A folder, .jsonl, .csv, .parquet or .tar shards, as for `db build`.")],
    out: Out,
    model: Model,
    min_size: Annotated[int, typer.Option(help="Images with a shorter side in pixels are left out.")] = 1024,
    caption_column: Caption = "caption",
    image_column: Annotated[str, typer.Option(help="Name of the image column, or a pattern of columns.")] = "image",
    image_root: Annotated[Path | None, typer.Option(help="Where the image paths start.")] = None,
    score_column: ScoreColumn = None,
    min_score: MinScore = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels; the model's own by default.")] = None,
    batch: Batch = 16,
    shard_size: ShardSize = 1024,
    dtype: Dtype = "float16",
    precision: Precision = None,
    store_text: StoreText = False,
    device: Device = None,
) -> None:
    """Real captioned images to latents."""
    quiet_libraries()
    from ragturbo.retrieval.sources import Columns
    from ragturbo.train.encode import make_encoded_data

    written = make_encoded_data(
        pairs,
        out,
        model=model,
        columns=Columns(caption_column, image_column, image_root),
        min_size=min_size,
        score_column=score_column,
        min_score=min_score,
        size=size,
        batch=batch,
        shard_size=shard_size,
        dtype=_dtype(dtype, "--dtype"),
        precision=precision and _dtype(precision, "--precision"),
        store_text=store_text,
        device=device,
    )
    typer.echo(f"wrote {written} shards to {out}")


@app.command()
def neighbors(
    data: Annotated[Path, typer.Argument(help="A folder made by `data teacher` or `data encode`.")],
    database: Annotated[Path, typer.Option(help="The database to retrieve from.")],
    model: Model,
    num_neighbors: Annotated[int, typer.Option("--num-neighbors", "-k", help="Neighbours a sample.")] = 4,
    max_cosine: Annotated[
        float | None, typer.Option(help="Rows with a key this close to the sample's are near-duplicates, left out.")
    ] = None,
    retriever: Annotated[str, typer.Option(help="auto, scann or exact.")] = "auto",
    batch: Annotated[int, typer.Option(help="Samples a search.")] = 256,
    device: Device = None,
) -> None:
    """For every sample, the rows it is trained with: never its own record."""
    quiet_libraries()
    from ragturbo.train.neighbors import make_neighbors

    written = make_neighbors(
        data,
        database,
        model=model,
        k=num_neighbors,
        max_cosine=max_cosine,
        retriever=retriever,
        batch=batch,
        device=device,
    )
    typer.echo(f"wrote neighbours of {written} shards to {data}/neighbors")


@app.command()
def lpips(
    data: Annotated[Path, typer.Argument(help="A folder made by `data teacher` or `data encode`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    width: Annotated[int, typer.Option(help="Channels of the first block; VGG16's own are 64.")] = 64,
    words: Annotated[int, typer.Option(help="Words of the captions to tell apart.")] = 512,
    steps: Annotated[int, typer.Option()] = 20_000,
    batch: Annotated[int, typer.Option()] = 64,
    lr: Annotated[float, typer.Option()] = 1e-3,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = None,
) -> None:
    """Train the network of the latent LPIPS loss on captioned latents."""
    quiet_libraries()
    from ragturbo.train.train_vgg import train_vgg

    result = train_vgg(data, out, width=width, words=words, steps=steps, batch=batch, lr=lr, seed=seed, device=device)
    typer.echo(
        f"wrote {out}: held-out words told with average precision {result['average_precision']:.3f} "
        f"(by frequency alone {result['by_frequency']:.3f})"
    )


def _dtype(name: str, option: str) -> str:
    from ragturbo.train.shards import DTYPES

    if name not in DTYPES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(DTYPES)}", param_hint=option)
    return name
