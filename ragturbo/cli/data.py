"""`ragturbo data …`: make training data. Commands share work between the processes of torchrun and can be resumed."""

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
MinScore = Annotated[float | None, typer.Option(help="Skip rows with a lower score.")]
Batch = Annotated[int, typer.Option(help="Samples per forward pass. Must not change on resume.")]
ShardSize = Annotated[int, typer.Option(help="Inputs per shard, the unit of work and of resuming.")]
Dtype = Annotated[str, typer.Option(help="Storage type: float16, bfloat16 or float32.")]
Precision = Annotated[str | None, typer.Option(help="Compute type; by default float16 on a GPU.")]
StoreText = Annotated[
    bool, typer.Option("--store-text", help="Also store text states, so that training needs no text encoder.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default the launcher's.")]


@app.command()
def teacher(
    prompts: Annotated[Path, typer.Argument(help=".txt with one prompt per line, .jsonl, .csv or .parquet.")],
    out: Out,
    model: Model,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.5,
    steps: Annotated[int, typer.Option(help="Steps of the teacher.")] = 50,
    seed: Annotated[int, typer.Option(help="The noise of prompt i is drawn from (seed, i).")] = 0,
    caption_column: Caption = "caption",
    score_column: ScoreColumn = None,
    min_score: MinScore = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first prompts.")] = None,
    batch: Batch = 16,
    shard_size: ShardSize = 1024,
    dtype: Dtype = "float16",
    precision: Precision = None,
    store_text: StoreText = False,
    device: Device = None,
) -> None:
    """Generate latents with the teacher, stored with the noise they were generated from."""
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
    pairs: Annotated[str, typer.Argument(help="A folder, .jsonl, .csv, .parquet or .tar files, as for `db build`.")],
    out: Out,
    model: Model,
    min_size: Annotated[int, typer.Option(help="Skip images with a shorter side, in pixels.")] = 1024,
    caption_column: Caption = "caption",
    image_column: Annotated[str, typer.Option(help="Name of the image column, or a pattern over columns.")] = "image",
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None,
    score_column: ScoreColumn = None,
    min_score: MinScore = None,
    size: Annotated[int | None, typer.Option(help="Image side in pixels; by default the model's.")] = None,
    batch: Batch = 16,
    shard_size: ShardSize = 1024,
    dtype: Dtype = "float16",
    precision: Precision = None,
    store_text: StoreText = False,
    device: Device = None,
) -> None:
    """Encode real captioned images as latents."""
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
def relabel(
    data: Annotated[Path, typer.Argument(help="A folder made by `data teacher`.")],
    prompts: Annotated[Path, typer.Argument(help="One prompt per sample, in order; see `data teacher`.")],
    out: Out,
    model: Model,
    caption_column: Caption = "caption",
    device: Device = None,
) -> None:
    """Give teacher latents other prompts for the student, such as short ones. D keeps the teacher's."""
    quiet_libraries()
    from ragturbo.train.prompts import read_prompts
    from ragturbo.train.relabel import relabel

    written = relabel(data, read_prompts(prompts, caption=caption_column), out, model=model, device=device)
    typer.echo(f"wrote {written} shards to {out}")


@app.command()
def neighbors(
    data: Annotated[Path, typer.Argument(help="A folder made by `data teacher` or `data encode`.")],
    database: Annotated[Path, typer.Option(help="The database to retrieve from.")],
    model: Model,
    num_neighbors: Annotated[int, typer.Option("--num-neighbors", "-k", help="Neighbours per sample.")] = 4,
    max_cosine: Annotated[
        float | None, typer.Option(help="Exclude rows whose key has at least this cosine with the sample's.")
    ] = None,
    retriever: Annotated[str, typer.Option(help="auto, scann, exact or hybrid (finds names).")] = "auto",
    batch: Annotated[int, typer.Option(help="Samples per search.")] = 256,
    device: Device = None,
) -> None:
    """Find the database rows each sample is trained with, excluding its own record and duplicates."""
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
    width: Annotated[int, typer.Option(help="Channels of the first block; 64 in VGG16.")] = 64,
    words: Annotated[int, typer.Option(help="Size of the vocabulary to predict.")] = 512,
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
        f"wrote {out}: average precision on the words of held-out captions {result['average_precision']:.3f} "
        f"(by frequency alone {result['by_frequency']:.3f})"
    )


def _dtype(name: str, option: str) -> str:
    from ragturbo.train.shards import DTYPES

    if name not in DTYPES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(DTYPES)}", param_hint=option)
    return name
