"""`ragturbo data …`: make training data. Commands share work between the processes of torchrun and can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ragturbo.train.report import DataReport

app = typer.Typer(
    help="Make training data: teacher latents, encoded images, neighbours, latent LPIPS.", no_args_is_help=True
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards.")]
Model = Annotated[str, typer.Option(help="A local folder or a hub id.")]
Caption = Annotated[str, typer.Option(help="Name of the caption column.")]
ScoreColumn = Annotated[str | None, typer.Option(help="Name of a column of scores, with --min-score.")]
MinScore = Annotated[float | None, typer.Option(help="Skip rows with a lower score.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples per forward pass. Must not change on resume.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Inputs per shard, the unit of work and of resuming.")]
Data = Annotated[Path, typer.Argument(metavar="DATA", help="A folder made by `data teacher` or `data encode`.")]
Dtype = Annotated[str, typer.Option(help="Storage type: float16, bfloat16 or float32.")]
Precision = Annotated[str | None, typer.Option(help="Compute type; by default float16 on a GPU.")]
StoreText = Annotated[
    bool, typer.Option("--store-text", help="Also store text states, so that training needs no text encoder.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default the launcher's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def teacher(
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help=".txt with one prompt per line, .jsonl, .csv or .parquet.")
    ],
    out: Out,
    model: Model,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 7.5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the teacher.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="The noise of prompt i is drawn from (seed, i).")] = 0,
    caption_column: Caption = "caption",
    score_column: ScoreColumn = None,
    min_score: MinScore = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    batch: Batch = 16,
    shard_size: ShardSize = 1024,
    dtype: Dtype = "float16",
    precision: Precision = None,
    store_text: StoreText = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Generate latents with the teacher, stored with the noise they were generated from."""
    _check_options(device, dtype, precision)
    # Mistakes are reported before torch is imported, which takes seconds.
    from ragturbo.checks import number
    from ragturbo.train.folder import check_data_output
    from ragturbo.train.progress import loading
    from ragturbo.train.prompts import read_prompts

    number("guidance", guidance, 0.0, 1000.0)
    chosen = read_prompts(prompts, caption=caption_column, score_column=score_column, min_score=min_score, limit=limit)
    check_data_output(out)
    _check_model(model)
    with loading(model):
        from ragturbo.train.teacher import make_teacher_data

    report = make_teacher_data(
        chosen.texts,
        out,
        model=model,
        guidance=guidance,
        steps=steps,
        seed=seed,
        batch=batch,
        shard_size=shard_size,
        dtype=dtype,
        precision=precision,
        store_text=store_text,
        device=device,
        left_out=chosen.left_out,
    )
    _say(report, as_json)


@app.command()
def encode(
    pairs: Annotated[
        str, typer.Argument(metavar="PAIRS", help="A folder, .jsonl, .csv, .parquet or .tar files, as for `db build`.")
    ],
    out: Out,
    model: Model,
    min_size: Annotated[int, typer.Option(min=1, help="Skip images with a shorter side, in pixels.")] = 1024,
    caption_column: Caption = "caption",
    image_column: Annotated[str, typer.Option(help="Name of the image column, or a pattern over columns.")] = "image",
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None,
    score_column: ScoreColumn = None,
    min_score: MinScore = None,
    size: Annotated[int | None, typer.Option(min=1, help="Image side in pixels; by default the model's.")] = None,
    batch: Batch = 16,
    shard_size: ShardSize = 1024,
    dtype: Dtype = "float16",
    precision: Precision = None,
    store_text: StoreText = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Encode real captioned images as latents. What is left out is counted, and listed in OUT/skipped.jsonl."""
    _check_options(device, dtype, precision)
    from ragturbo.retrieval.sources import Columns, open_source
    from ragturbo.train.folder import check_data_output
    from ragturbo.train.progress import loading
    from ragturbo.train.prompts import check_scores

    check_scores(score_column, min_score)
    columns = Columns(caption_column, image_column, image_root)
    open_source(pairs, columns)
    check_data_output(out)
    from ragturbo.errors import InvalidRequest
    from ragturbo.model.find import Hub, look

    factor = look(model, Hub()).factor
    if size is not None and size % factor:
        raise InvalidRequest(f"size={size} must be a multiple of {factor}", option="size")
    with loading(model):
        from ragturbo.train.encode import make_encoded_data

    report = make_encoded_data(
        pairs,
        out,
        model=model,
        columns=columns,
        min_size=min_size,
        score_column=score_column,
        min_score=min_score,
        size=size,
        batch=batch,
        shard_size=shard_size,
        dtype=dtype,
        precision=precision,
        store_text=store_text,
        device=device,
    )
    _say(report, as_json)


@app.command()
def relabel(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder made by `data teacher`.")],
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS", help="One prompt per sample, in order; an empty one leaves it out. See `data teacher`."
        ),
    ],
    out: Out,
    model: Model,
    caption_column: Caption = "caption",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Give teacher latents other prompts for the student, such as short ones. D keeps the teacher's."""
    _check_options(device)
    from ragturbo.train.folder import check_data_output, check_relabel, read_plan
    from ragturbo.train.progress import loading
    from ragturbo.train.prompts import read_prompts

    read_plan(data.expanduser())
    chosen = read_prompts(prompts, caption=caption_column, keep_empty=True)
    check_relabel(data.expanduser(), chosen.texts)
    check_data_output(out)
    _check_model(model)
    with loading(model):
        from ragturbo.train.relabel import relabel

    _say(relabel(data, chosen.texts, out, model=model, device=device), as_json)


@app.command()
def neighbors(
    data: Data,
    database: Annotated[Path, typer.Option(help="The database to retrieve from.")],
    model: Model,
    num_neighbors: Annotated[int, typer.Option("--num-neighbors", "-k", min=1, help="Neighbours per sample.")] = 4,
    max_cosine: Annotated[
        float | None, typer.Option(help="Exclude rows whose key has at least this cosine with the sample's.")
    ] = None,
    retriever: Annotated[str, typer.Option(help="auto, scann, exact or hybrid (finds names).")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Samples per search.")] = 256,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the database rows each sample is trained with, excluding its own record and duplicates."""
    _check_options(device)
    from ragturbo.checks import number
    from ragturbo.train.folder import read_plan
    from ragturbo.train.progress import loading
    from ragturbo.train.start import check_database, check_neighbor_retriever

    check_neighbor_retriever(retriever)
    if max_cosine is not None:
        number("max_cosine", max_cosine, -1.0, 1.0)
    read_plan(data.expanduser())
    check_database(database)
    _check_model(model)
    with loading(model):
        from ragturbo.train.neighbors import make_neighbors

    report = make_neighbors(
        data,
        database,
        model=model,
        k=num_neighbors,
        max_cosine=max_cosine,
        retriever=retriever,
        batch=batch,
        device=device,
    )
    _say(report, as_json)


@app.command()
def lpips(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    width: Annotated[int, typer.Option(min=1, help="Channels of the first block; 64 in VGG16.")] = 64,
    words: Annotated[int, typer.Option(min=2, help="Size of the vocabulary to predict.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 20_000,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate at the start; it falls to 0.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the batches and the augmentation.")] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train the network of the latent LPIPS loss on captioned latents."""
    _check_options(device)
    from ragturbo.checks import number
    from ragturbo.folders import check_writable
    from ragturbo.train.folder import read_plan
    from ragturbo.train.progress import loading

    number("lr", lr)
    read_plan(data.expanduser())
    if out.is_dir():
        raise typer.BadParameter(
            f"{out} is a folder; give a file, such as {out / 'vgg.safetensors'}", param_hint="--out"
        )
    check_writable(out.parent)
    with loading(data):
        from ragturbo.train.train_vgg import train_vgg

    result = train_vgg(data, out, width=width, words=words, steps=steps, batch=batch, lr=lr, seed=seed, device=device)
    text = (
        f"wrote {out}: average precision on the words of held-out captions {result['average_precision']:.3f} "
        f"(by frequency alone {result['by_frequency']:.3f})"
    )
    typer.echo(json.dumps({"out": str(out), **result}) if as_json else text)


def _say(report: DataReport, as_json: bool) -> None:
    """Print what was made; what was left out is logged."""
    typer.echo(json.dumps(report.to_dict()) if as_json else str(report))


def _check_options(device: str | None, dtype: str | None = None, precision: str | None = None) -> None:
    from ragturbo.config import DTYPES, check_device, one_of

    check_device(device)
    for name, value in (("dtype", dtype), ("precision", precision)):
        if value is not None:
            one_of(name, value, DTYPES)


def _check_model(name: str) -> None:
    """Raise ModelError if there is no such model."""
    from ragturbo.model.find import check_model, resolve

    check_model(resolve(name))
