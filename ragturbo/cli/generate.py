"""`ragturbo generate`: text to image files, with where the time went and which neighbours were used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ragturbo.generate import Generator
    from ragturbo.output import Output


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT…", help="What the image should show.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .png, .jpg or .webp file; several images are numbered beside it.")
    ] = Path("out.png"),
    model: Annotated[str, typer.Option(help='"shapes" (embedded), a local folder or a hub id.')] = "shapes",
    database: Annotated[str | None, typer.Option(help='A database folder, or "off".')] = None,
    adapter: Annotated[str | None, typer.Option(help='A folder with adapter.safetensors, or "off".')] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same image.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Images a prompt: seed, seed + 1, …")] = 1,
    mode: Annotated[str | None, typer.Option(help="adapter, slerp, lerp or none.")] = None,
    w: Annotated[float | None, typer.Option("-w", help="Weight of the target in slerp and lerp.")] = None,
    num_neighbors: Annotated[int | None, typer.Option("--num-neighbors", "-k", help="Neighbours to blend in.")] = None,
    lam: Annotated[float | None, typer.Option(help="λ of the adapter, in place of the cosine.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Neighbours that score less are not used.")] = None,
    query: Annotated[str | None, typer.Option(help="Search by this text instead of the prompt.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="With --guidance, on undistilled models.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps: 1 to 4 on distilled models.")] = 1,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance, on undistilled models.")] = 0.0,
    height: Annotated[int | None, typer.Option()] = None,
    width: Annotated[int | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    engine: Annotated[str, typer.Option(help="auto, eager or graph.")] = "auto",
    retriever: Annotated[str, typer.Option(help="auto, scann, exact or bm25.")] = "auto",
    vae: Annotated[str, typer.Option(help="full, tiny, or the path or id of an AutoencoderTiny.")] = "full",
    attention: Annotated[str, typer.Option(help="auto, sdpa, triton or xformers.")] = "auto",
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Never ask the hub.")] = False,
    grid: Annotated[
        bool, typer.Option("--grid", help="Write the image beside its neighbours and the image without retrieval.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Report for machines.")] = False,
) -> None:
    """Make images from text."""
    from ragturbo.cli.terminal import quiet_libraries
    from ragturbo.generate import Generator

    quiet_libraries()
    with Generator.from_pretrained(
        model,
        database=_off(database),
        adapter=_off(adapter),
        device=device,
        dtype=dtype,
        engine=engine,
        retriever=retriever,
        vae=vae,
        attention=attention,
        local_files_only=local_files_only,
    ) as gen:
        options: dict[str, Any] = {
            "seed": seed,
            "mode": mode,
            "w": w,
            "num_neighbors": num_neighbors,
            "lam": lam,
            "min_score": min_score,
            "query": query,
            "negative_prompt": negative_prompt,
            "num_images_per_prompt": num_images,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "height": height,
            "width": width,
        }
        output = gen(prompts, **options)
        assert not isinstance(output, tuple)
        images = _grids(gen, prompts, output, options) if grid else output.images
        files = _save(images, out)
        _report(gen, prompts, output, files, as_json)


def _off(value: str | None) -> str | bool | None:
    return False if value == "off" else value


def _save(images: list[Any], out: Path) -> list[Path]:
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out] if len(images) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        try:
            image.save(file)
        except (ValueError, OSError) as error:
            raise typer.BadParameter(f"cannot write {file}: {error}", param_hint="--out") from None
    return files


def _grids(gen: Generator, prompts: list[str], output: Output, options: dict[str, Any]) -> list[Any]:
    """One sheet an image: without retrieval | ours | its neighbours."""
    from ragturbo.cli.grid import sheet

    plain = {"num_inference_steps", "guidance_scale", "negative_prompt", "height", "width"}
    kept = {name: value for name, value in options.items() if name in plain}
    each = [p for p in prompts for _ in range(options["num_images_per_prompt"])]
    bare = gen(each, seed=output.seeds, mode="none", **kept)
    assert not isinstance(bare, tuple)
    return [
        sheet(prompt, image, without, neighbors)
        for prompt, image, without, neighbors in zip(each, output.images, bare.images, output.neighbors, strict=True)
    ]


def _report(gen: Generator, prompts: list[str], output: Output, files: list[Path], as_json: bool) -> None:
    per_prompt = len(output.images) // len(prompts)
    rows: list[dict[str, Any]] = [
        {
            "prompt": prompts[i // per_prompt],
            "file": str(file),
            "seed": output.seeds[i],
            "lam": output.lam[i],
            "neighbors": [
                {"id": n.id, "caption": n.caption, "score": n.score, "lam": n.lam, "used": n.used}
                for n in (output.neighbors[i] if output.neighbors else [])
            ],
        }
        for i, file in enumerate(files)
    ]
    if as_json:
        facts = {"images": rows, "mode": output.mode, "timings": output.timings, "notes": output.notes}
        typer.echo(json.dumps({**facts, "model": gen.info}, indent=2, default=str))
        return
    for row in rows:
        typer.echo(f"{row['file']}  seed {row['seed']}  {row['prompt']}")
        for n in row["neighbors"]:
            typer.echo(f"  λ {n['lam']:.3f}  #{n['id']}  {n['caption']}" + ("" if n["used"] else "  (under min_score)"))
    total = output.timings["total"]
    stages = "  ".join(f"{name} {1e3 * s:.1f}" for name, s in output.timings.items() if name != "total")
    typer.echo(f"mode {output.mode}, {1e3 * total:.1f} ms: {stages}", file=sys.stderr)
