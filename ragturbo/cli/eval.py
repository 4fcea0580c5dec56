"""`ragturbo eval`: compare systems on a suite of prompts."""

from __future__ import annotations

import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragturbo.cli import options
from ragturbo.errors import InvalidRequest

if TYPE_CHECKING:
    from ragturbo.evaluate.scores import Metric
    from ragturbo.evaluate.suites import Suite

# A few minutes on two cores; the whole suite has 1,000 prompts.
SHAPES_LIMIT = 300
# The options that only some suites read: those a suite needs, and those it can do without.
_CLIP = ("clip_model", "clip_weights")
NEEDED: dict[str, tuple[str, ...]] = {
    "shapes": (),
    "coco": ("captions",),
    "tifa": ("prompts", "questions", "vqa", "aesthetic_weights"),
    "classes": ("classes",),
    "text": ("prompts",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "shapes": ("count",),
    "coco": ("references", "fid_weights", *_CLIP),
    "tifa": ("aesthetic_clip",),
    "classes": ("encoders", *_CLIP),
    "text": _CLIP,
}
SUITES = tuple(NEEDED)


def evaluate(
    ctx: typer.Context,
    suite: Annotated[str, typer.Option(help="shapes, coco, tifa, classes or text.")] = "shapes",
    systems: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated kind[:folder][@key=value[+key=value]]; the first is the baseline. Default: those of "
            "student, slerp, adapter and teacher that the model has the parts for."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for images, scores and report; an interrupted run continues there.")
    ] = Path("evaluation"),
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first prompts. Default on shapes: 300.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="shapes: number of captions.")] = 1000,
    model: options.Model = "shapes",
    database: options.Database = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    captions: Annotated[Path | None, typer.Option(help="coco: captions_val2017.json.")] = None,
    references: Annotated[
        Path | None, typer.Option(help="coco: a folder of real images or saved statistics (.npz), for FID.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="tifa: tifa_v1.0_question_answers.json.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="text: a file, one prompt a line; tifa: tifa_v1.0_text_inputs.json.")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="classes: a folder of folders of real images.")] = None,
    clip_model: Annotated[
        str, typer.Option(help="coco, classes, text: open_clip model of the CLIP score.")
    ] = "ViT-bigG-14",
    clip_weights: Annotated[str | None, typer.Option(help="Its .safetensors file or open_clip tag.")] = None,
    fid_weights: Annotated[str | None, typer.Option(help="coco: Inception weights of torch-fidelity.")] = None,
    aesthetic_weights: Annotated[
        Path | None, typer.Option(help="tifa: LAION's aesthetic head as .safetensors.")
    ] = None,
    aesthetic_clip: Annotated[str | None, typer.Option(help="tifa: weights of the head's CLIP ViT-L/14.")] = None,
    vqa: Annotated[str | None, typer.Option(help="tifa: folder or id of a visual question answering model.")] = None,
    encoders: Annotated[
        str | None, typer.Option(help="classes: name=folder[,name=folder] of CLIP, SigLIP or DINOv2 models.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow downloads from the hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of report.md.")] = False,
) -> None:
    """Compare systems: draw every prompt, score the images, and write report.md, report.json and sheet.html."""
    from ragturbo.config import check_device, check_dtype, one_of
    from ragturbo.terminal import loading
    from ragturbo.train.start import check_database

    # Mistakes are reported before torch is imported, which takes seconds.
    one_of("suite", suite, SUITES)
    _check_options(ctx, suite)
    check_device(device)
    check_dtype(dtype)
    if database not in (None, "off"):
        check_database(database)
    # Also checks the model and adapter.
    usual = default_systems(model, database, adapter, suite, download)
    from ragturbo.evaluate import suites
    from ragturbo.evaluate.images import check_folder
    from ragturbo.evaluate.systems import LoadOptions, parse_system

    parsed = [parse_system(text) for text in (systems or usual).split(",")]
    if len({system.slug for system in parsed}) != len(parsed):
        raise typer.BadParameter("two systems have the same name", param_hint="--systems")
    if suite == "shapes":
        chosen = suites.shapes(count).head(SHAPES_LIMIT if limit is None else limit)
    elif suite == "coco":
        assert captions is not None
        chosen = suites.coco(captions, references).head(limit)
    elif suite == "tifa":
        assert prompts is not None and questions is not None
        chosen = suites.tifa(prompts, questions).head(limit)
    elif suite == "classes":
        assert classes is not None
        chosen = suites.classes(classes).head(limit)
    else:
        assert prompts is not None
        chosen = suites.text(prompts).head(limit)
    load = LoadOptions(model, options.path_or_off(database), options.path_or_off(adapter), device, dtype, not download)
    check_folder(out, chosen, load)
    with loading(model):
        from ragturbo.engine.build import choose_device
        from ragturbo.evaluate.evaluation import Evaluation, load_fid

        where = choose_device(device, dtype)[0]
        # Metrics load before the first image is drawn, so that a missing file is reported immediately.
        metrics = _load_metrics(
            chosen, where, clip_model, clip_weights, aesthetic_weights, aesthetic_clip, vqa, encoders, not download
        )
    evaluation = Evaluation(
        chosen,
        parsed,
        load,
        out,
        metrics,
        fid=partial(load_fid, references, fid_weights, where) if references and "fid" in chosen.metrics else None,
        batch=batch,
        command=shlex.join(["ragturbo", *sys.argv[1:]]),
        progress=ProgressLine() if sys.stderr.isatty() else None,
    )
    rows = evaluation.run()
    if not rows:
        typer.echo("this process is done; the last one writes the report", err=True)
    elif as_json:
        typer.echo((out / "report.json").read_text("utf-8"))
    else:
        typer.echo((out / "report.md").read_text("utf-8"))
        typer.echo(f"{out / 'report.md'}  {out / 'report.json'}  {out / 'sheet.html'}", err=True)


def default_systems(model: str, database: str | None, adapter: str | None, suite: str, download: bool) -> str:
    """Return the systems that the model has the parts for (database, adapter, teacher)."""
    from ragturbo.model.find import TEACHER, Hub, look

    off = options.path_or_off
    parts = look(model, Hub(local_files_only=not download), adapter=off(adapter), database=off(database))
    chosen = ["student"]
    if parts.database is not None:
        chosen.append("slerp@w=0.8")
        if parts.has_adapter:
            chosen.append("adapter")
    if (parts.folder / TEACHER).is_dir():
        chosen.append("teacher@guidance=3" if suite == "shapes" else "teacher")
    return ",".join(chosen)


def _check_options(ctx: typer.Context, suite: str) -> None:
    """Refuse options that have no effect with the suite, and the lack of those it needs; look for the files given."""
    given = [name for name in ctx.params if str(getattr(ctx.get_parameter_source(name), "name", "")) == "COMMANDLINE"]
    readers = {name: [other for other in SUITES if name in (*NEEDED[other], *OPTIONAL[other])] for name in given}
    if idle := {name: others for name, others in readers.items() if others and suite not in others}:
        named = ", ".join(f"{_option(name)} (for {', '.join(others)})" for name, others in idle.items())
        raise InvalidRequest(f"without effect with --suite {suite}: {named}")
    if missing := [name for name in NEEDED[suite] if name not in given]:
        raise InvalidRequest(f"--suite {suite} needs {', '.join(map(_option, missing))}; see `ragturbo eval --help`")
    if "fid_weights" in given and "references" not in given:
        raise InvalidRequest("--fid-weights has no effect without --references, the real images of the FID")
    for name in ("references", "fid_weights", "aesthetic_weights"):
        if name in given and not Path(ctx.params[name]).expanduser().exists():
            raise InvalidRequest(f"{_option(name)}: there is no file or folder {ctx.params[name]}")
    for item in str(ctx.params["encoders"]).split(",") if "encoders" in given else []:
        if not all(item.partition("=")):
            raise InvalidRequest(f"--encoders {item}: write name=folder, such as dino=facebook/dinov2-base")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _load_metrics(
    suite: Suite,
    device: Any,
    clip_model: str,
    clip_weights: str | None,
    aesthetic_weights: Path | None,
    aesthetic_clip: str | None,
    vqa: str | None,
    encoders: str | None,
    local_files_only: bool,
) -> list[Metric]:
    from ragturbo.evaluate.faithfulness import Faithfulness
    from ragturbo.evaluate.feature_metrics import Aesthetic, ClassSimilarity, ClipScore
    from ragturbo.evaluate.tifa import HuggingFaceVQA, Tifa

    metrics: list[Metric] = []
    for name in suite.metrics:
        if name == "faithfulness":
            metrics.append(Faithfulness())
        elif name == "clip":
            metrics.append(ClipScore.load(clip_model, clip_weights, device))
        elif name == "aesthetic":
            metrics.append(Aesthetic.load(aesthetic_weights, aesthetic_clip, device))
        elif name == "tifa":
            metrics.append(Tifa(HuggingFaceVQA(str(vqa), device, local_files_only=local_files_only)))
        elif name == "class-similarity":
            for item in encoders.split(",") if encoders else []:
                label, _, folder_or_id = item.partition("=")
                metrics.append(ClassSimilarity(label, folder_or_id, device=device, local_files_only=local_files_only))
    return metrics


class ProgressLine:
    """Prints one line with the work done and the estimated time left."""

    def __init__(self) -> None:
        self._what, self._since, self._from = "", 0.0, 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._since, self._from = what, now, done
        rate = (done - self._from) / max(now - self._since, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        end = "\n" if done == total else ""
        print(f"\r\033[K{what}: {done} of {total}{left}", end=end, file=sys.stderr, flush=True)
