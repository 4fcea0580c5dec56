"""`ragturbo profile`: time by stage, a Chrome trace, and command lines for nsys and ncu."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ragturbo.cli import options
from ragturbo.errors import InvalidRequest

PROMPTS = ["a red circle left of a blue square", "a green triangle", "a blue circle above a red square"]


def profile(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts, used in turn.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Chrome trace to write.")] = Path("ragturbo-trace.json"),
    requests: Annotated[int, typer.Option(min=1, help="Number of profiled requests.")] = 5,
    model: Annotated[str, typer.Option(help='"shapes" (embedded), a local folder or a hub id.')] = "shapes",
    database: Annotated[str | None, typer.Option(help='A database folder, or "off".')] = None,
    mode: Annotated[str | None, typer.Option(help="adapter, slerp, lerp or none.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.")] = None,
    distilled: options.Distilled = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    engine: Annotated[str, typer.Option(help="auto, reference or graph.")] = "auto",
    ranged: Annotated[
        bool, typer.Option("--range", help="Only mark the requests for nsys and ncu, with cudaProfilerStart.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Profile requests after a warm-up."""
    from ragturbo.checks import check_call
    from ragturbo.config import check_device, has_driver
    from ragturbo.folders import check_writable
    from ragturbo.generate import Generator
    from ragturbo.messages import many
    from ragturbo.model.find import Hub, look
    from ragturbo.terminal import loading

    texts, call = prompts or PROMPTS, {"num_inference_steps": steps, "mode": mode}
    own = options.path_or_off(database)
    check_call(texts, **call, parts=look(model, Hub(), database=own, distilled=distilled))
    if ranged:
        check_device("cuda")
    elif out.is_dir():
        raise InvalidRequest(f"{out} is a folder; give a file as --out, such as {out / 'trace.json'}")
    else:
        check_writable(out.parent)
    check_device(device)
    if not has_driver():
        # torch's profiler reports the missing GPU as an error.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with loading(model):
        generator = Generator.from_pretrained(
            model, database=own, distilled=distilled, device=device, dtype=dtype, engine=engine, batch_sizes=(1,)
        )
        from ragturbo.bench import profile as profiling
    with generator as gen:
        if ranged and gen.bundle.device.type != "cuda":
            raise InvalidRequest("--range marks requests for nsys and ncu and needs a CUDA GPU")
        profiling.run(gen, texts, profiling.WARMUPS, **call)
        recording = profiling.cuda_range(gen) if ranged else profiling.traced(gen, out)
        with recording:
            timings = profiling.run(gen, texts, requests, **call)
        stages, info = profiling.median(timings), gen.info
    report = {
        "requests": requests,
        "median_seconds": stages,
        "engine": info["engine"],
        "device": info["device"],
        "trace": None if ranged else str(out),
        "streams": {} if ranged else profiling.summary(out),
        "commands": profiling.commands(_arguments(sys.argv)),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(f"{many(requests, 'request')}, engine {info['engine']} on {info['device']}; median by stage:")
    for stage, seconds in stages.items():
        typer.echo(f"  {stage:<10}{1e3 * seconds:9.3f} ms")
    if not ranged:
        for stream, work in report["streams"].get("streams", {}).items():
            overlap = work["beside_main_us"]
            beside = "" if overlap is None else f", overlapping the main stream for {overlap} us"
            typer.echo(f"\nstream {stream}: {work['operations']} operations, busy for {work['busy_us']} us{beside}")
            for row in work["costliest"]:
                typer.echo(f"  {row['us']:10.1f} us {row['calls']:5} x {row['name']}")
        typer.echo(f"\nChrome trace (chrome://tracing, ui.perfetto.dev): {out}")
        for tool, line in report["commands"].items():
            typer.echo(f"\n{tool}:\n  {line}")


def _arguments(argv: list[str]) -> list[str]:
    """Return the arguments of this run without --range and --json, for a command line that repeats it."""
    given = argv[argv.index("profile") + 1 :] if "profile" in argv else []
    return [argument for argument in given if argument not in ("--range", "--json")]
