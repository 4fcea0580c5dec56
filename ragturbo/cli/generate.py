"""`ragturbo generate`: write images for prompts, and print timings and the neighbours that were used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragturbo.cli import options
from ragturbo.config import has_driver
from ragturbo.errors import InvalidRequest
from ragturbo.folders import check_writable

if TYPE_CHECKING:
    from ragturbo.generate import Generator
    from ragturbo.model.find import Parts
    from ragturbo.output import Output

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT…", help="What the image should show; quote it.")],
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="A .png, .jpg or .webp file, of which several images get numbers, or a folder."
        ),
    ] = "out.png",
    model: options.Model = "shapes",
    database: options.Database = None,
    adapter: options.Adapter = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same image.")] = None,
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", help="Images per prompt; their seeds are seed, seed + 1, …")
    ] = 1,
    mode: Annotated[str | None, typer.Option(help="adapter, slerp, lerp or none.")] = None,
    w: Annotated[float | None, typer.Option("-w", help="Weight of the target in slerp and lerp.")] = None,
    num_neighbors: Annotated[int | None, typer.Option("--num-neighbors", "-k", help="Neighbours to blend in.")] = None,
    lam: Annotated[float | None, typer.Option(help="Strength λ of the adapter. Default: the cosine.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Ignore neighbours with a lower score.")] = None,
    query: Annotated[str | None, typer.Option(help="Search by this text instead of the prompt.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="With --guidance, on undistilled models.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps: 1 to 4 on distilled models. Default: the model's, 1 or 50.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance, on undistilled models. Default there: 7.5.")
    ] = None,
    distilled: options.Distilled = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    engine: options.Engine = "auto",
    capture: options.Capture = True,
    retriever: options.Retriever = "auto",
    compose: options.Compose = None,
    vae: options.Vae = "full",
    attention: options.Attention = "auto",
    local_files_only: options.LocalFilesOnly = False,
    grid: Annotated[
        bool, typer.Option("--grid", help="Write the image next to its neighbours and the image without retrieval.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Generate images from text."""
    from ragturbo.checks import check_call
    from ragturbo.generate import Generator
    from ragturbo.model.find import Hub, look
    from ragturbo.terminal import loading

    off = options.path_or_off
    sampling: dict[str, Any] = {
        "negative_prompt": negative_prompt, "num_inference_steps": steps, "guidance_scale": guidance,
        "height": height, "width": width,
    }  # fmt: skip
    call: dict[str, Any] = {
        "seed": seed, "num_images_per_prompt": num_images, "mode": mode, "w": w, "num_neighbors": num_neighbors,
        "lam": lam, "min_score": min_score, "query": query, "compose": compose, **sampling,
    }  # fmt: skip
    output_files(out, 1)
    if len(prompts) > 1 and not any(" " in prompt.strip() for prompt in prompts):
        typer.echo(f"{len(prompts)} prompts of one word each; quote a prompt of several words", err=True)
    hub = Hub(local_files_only=local_files_only)
    parts = look(model, hub, adapter=off(adapter), database=off(database), distilled=distilled)
    check_call(prompts, **call, parts=parts)
    _refuse_without_effect(parts, mode, retriever, engine, grid=grid, capture=capture)
    files = output_files(out, len(prompts) * num_images)
    with loading(model):
        generator = Generator.from_pretrained(
            model, database=off(database), adapter=off(adapter),
            device=device, dtype=dtype, distilled=distilled, local_files_only=local_files_only, engine=engine,
            capture=capture, retriever=retriever, vae=vae, attention=attention,
        )  # fmt: skip
    with generator:
        output = generator(prompts, **call)
        each_prompt = [prompt for prompt in prompts for _ in range(num_images)]
        images = _grids(generator, each_prompt, output, sampling) if grid else output.images
        for image, file in zip(images, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
        _report(generator, each_prompt, output, files, steps, as_json)


def _refuse_without_effect(
    parts: Parts, mode: str | None, retriever: str, engine: str, *, grid: bool, capture: bool
) -> None:
    if parts.database is None and retriever != "auto":
        raise InvalidRequest(f"retriever={retriever!r} has no effect without a database", option="retriever")
    if grid and (mode == "none" or parts.database is None):
        raise InvalidRequest(
            "--grid compares an image with its neighbours, and nothing is retrieved here", option="grid"
        )
    if not capture and engine != "graph" and not has_driver():
        raise InvalidRequest("--no-capture has no effect without a GPU, unless with --engine graph", option="capture")


def output_files(out: str, count: int) -> list[Path]:
    """Return the files to write. Missing folders are made; a folder, or a name that ends in "/", gets out.png in it."""
    if not out:
        raise InvalidRequest("--out is empty", option="out")
    path = Path(out).expanduser()
    if path.is_dir() or out.endswith("/"):
        path = path / "out.png"
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidRequest(f"out={str(path)!r}: the file's name must end in {', '.join(SUFFIXES)}", option="out")
    check_writable(path.parent)
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def _grids(generator: Generator, prompts: list[str], output: Output, sampling: dict[str, Any]) -> list[Any]:
    """Draw a comparison for each image, which takes a second pass without retrieval."""
    from ragturbo.cli.grid import comparison

    seeds = [seed for seed in output.seeds if seed is not None]
    without = generator(prompts, seed=seeds, mode="none", **sampling)
    return [comparison(*row) for row in zip(prompts, output.images, without.images, output.neighbors, strict=True)]


def _report(
    generator: Generator, prompts: list[str], output: Output, files: list[Path], steps: int | None, as_json: bool
) -> None:
    rows: list[dict[str, Any]] = [
        {
            "prompt": prompts[i],
            "file": str(file),
            "seed": output.seeds[i],
            "lam": output.lam[i],
            "neighbors": [
                {
                    "id": n.id,
                    "caption": n.caption,
                    "score": n.score,
                    "lam": n.lam,
                    "used": n.used,
                    "cosine": n.cosine,
                    "bm25": n.bm25,
                }
                for n in (output.neighbors[i] if output.neighbors else [])
            ],
        }
        for i, file in enumerate(files)
    ]
    if as_json:
        facts = {"images": rows, "mode": output.mode, "timings": output.timings, "notes": output.notes}
        typer.echo(json.dumps({**facts, "model": generator.info}, indent=2, default=str))
        return
    from ragturbo.messages import cut, many

    for row in rows:
        typer.echo(f"{row['file']}  seed {row['seed']}  {cut(row['prompt'])}")
        for n in row["neighbors"]:
            unused = "" if n["used"] else "  (below --min-score)"
            typer.echo(f"  λ {n['lam']:.3f}  #{n['id']}  {cut(n['caption'] or '')}{unused}")
    total = output.timings["total"]
    stages = "  ".join(f"{name} {1e3 * s:.1f}" for name, s in output.timings.items() if name != "total")
    steps = steps or generator.info["num_inference_steps"]
    typer.echo(
        f"mode {output.mode}, {many(steps, 'step')}, {1e3 * total:.1f} ms: {stages}",
        file=sys.stderr,
    )
