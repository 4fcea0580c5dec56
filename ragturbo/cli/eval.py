"""`ragturbo eval`: tables, plots and a contact sheet for a list of systems on a suite of prompts."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ragturbo.evaluate.suites import Suite

# Minutes on two cores; `--limit 1000` is the whole suite.
SHAPES_LIMIT = 300


def evaluate(
    suite: Annotated[str, typer.Option(help="shapes, coco, tifa, classes or text.")] = "shapes",
    systems: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated kind[:folder][@key=value[+key=value]]; the first is the baseline. Default: what the "
            "model can do of student, slerp, adapter and teacher."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Where images, scores and the report go; a killed run goes on there.")
    ] = Path("evaluation"),
    limit: Annotated[
        int | None, typer.Option(help="Only the first prompts; the title says so. Default on shapes: 300.")
    ] = None,
    count: Annotated[int, typer.Option(help="Captions of the shapes suite.")] = 1000,
    model: Annotated[str, typer.Option(help="The bundle our own systems run on.")] = "shapes",
    database: Annotated[str | None, typer.Option()] = None,
    adapter: Annotated[str | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    batch: Annotated[int, typer.Option(help="Images drawn together.")] = 8,
    captions: Annotated[Path | None, typer.Option(help="coco: captions_val2017.json.")] = None,
    references: Annotated[
        Path | None, typer.Option(help="coco: a folder of real images or saved statistics (.npz), for FID.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="tifa: tifa_v1.0_question_answers.json.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="text: a file, one prompt a line; tifa: tifa_v1.0_text_inputs.json.")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="classes: a folder of folders of real images.")] = None,
    clip_model: Annotated[str, typer.Option(help="open_clip's name of the model for the CLIP score.")] = "ViT-bigG-14",
    clip_weights: Annotated[str | None, typer.Option(help="Its .safetensors file or tag.")] = None,
    fid_weights: Annotated[str | None, typer.Option(help="torch-fidelity's Inception weights.")] = None,
    aesthetic_weights: Annotated[Path | None, typer.Option(help="LAION's head, as safetensors.")] = None,
    aesthetic_clip: Annotated[str | None, typer.Option(help="Weights of the ViT-L/14 below the head.")] = None,
    vqa: Annotated[str | None, typer.Option(help="tifa: folder or id of a visual question answering model.")] = None,
    encoders: Annotated[
        str | None, typer.Option(help="classes: name=folder[,name=folder] of CLIP, SigLIP, DINOv2 …")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Models may be fetched from the hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
) -> None:
    """Compare systems: draw every prompt, score, and write DIR/report.md, report.json and sheet.html."""
    from ragturbo.cli.terminal import quiet_libraries
    from ragturbo.engine.build import choose_device
    from ragturbo.evaluate import suites
    from ragturbo.evaluate.evaluation import Evaluation, reference
    from ragturbo.evaluate.systems import Loading, parse_spec

    quiet_libraries()
    whole = _suite(suites, suite, count, captions, references, questions, prompts, classes)
    asked = whole.head(SHAPES_LIMIT if limit is None and suite == "shapes" else limit)
    specs = [
        parse_spec(text) for text in (systems or default_systems(model, database, adapter, suite, download)).split(",")
    ]
    where = choose_device(device, dtype)[0]
    loading = Loading(model, _off(database), _off(adapter), device, dtype, local_files_only=not download)
    metrics = _metrics(
        asked, where, clip_model, clip_weights, aesthetic_weights, aesthetic_clip, vqa, encoders, download
    )
    evaluation = Evaluation(
        asked,
        specs,
        loading,
        out,
        metrics,
        fid=reference(references, fid_weights, where) if references and "fid" in asked.metrics else None,
        batch=batch,
        command=shlex.join(["ragturbo", *sys.argv[1:]]),
        progress=Watch() if sys.stderr.isatty() else None,
    )
    rows = evaluation.run()
    if not rows:
        typer.echo("this process has done its share; the last one writes the report", err=True)
    elif as_json:
        typer.echo((out / "report.json").read_text("utf-8"))
    else:
        typer.echo((out / "report.md").read_text("utf-8"))
        typer.echo(f"{out / 'report.md'}  {out / 'report.json'}  {out / 'sheet.html'}", err=True)


def default_systems(model: str, database: str | None, adapter: str | None, suite: str, download: bool) -> str:
    """What this model can do: injection needs a database, the adapter both, and a teacher is not always shipped."""
    from ragturbo.model import adapter as adapter_file
    from ragturbo.model.bundle import DATABASE, TEACHER
    from ragturbo.model.source import resolve

    folder = resolve(model, local_files_only=not download)
    chosen = ["student"]
    if database != "off" and (database or (folder / DATABASE).is_dir()):
        chosen.append("slerp@w=0.8")
        if adapter != "off" and (adapter or (folder / adapter_file.FILE).is_file()):
            chosen.append("adapter")
    if (folder / TEACHER).is_dir():
        chosen.append("teacher@guidance=3" if suite == "shapes" else "teacher")
    return ",".join(chosen)


def _off(value: str | None) -> str | bool | None:
    return False if value == "off" else value


def _given(value: Path | None, option: str, suite: str) -> Path:
    if value is None:
        raise typer.BadParameter(f"the suite {suite!r} needs it", param_hint=option)
    return value


def _suite(
    suites: Any,
    name: str,
    count: int,
    captions: Path | None,
    references: Path | None,
    questions: Path | None,
    prompts: Path | None,
    classes: Path | None,
) -> Suite:
    if name == "shapes":
        return suites.shapes(count)
    if name == "coco":
        return suites.coco(_given(captions, "--captions", name), references)
    if name == "tifa":
        return suites.tifa(_given(prompts, "--prompts", name), _given(questions, "--questions", name))
    if name == "classes":
        return suites.classes(_given(classes, "--classes", name))
    if name == "text":
        return suites.text(_given(prompts, "--prompts", name))
    raise typer.BadParameter(f"{name!r} is not one of shapes, coco, tifa, classes, text", param_hint="--suite")


def _metrics(
    suite: Suite,
    device: Any,
    clip_model: str,
    clip_weights: str | None,
    aesthetic_weights: Path | None,
    aesthetic_clip: str | None,
    vqa: str | None,
    encoders: str | None,
    download: bool,
) -> list[Any]:
    """The suite's metrics, loaded before the first image is drawn: a missing file is said at once."""
    from ragturbo.evaluate.aesthetics import Aesthetic
    from ragturbo.evaluate.clipscore import ClipScore
    from ragturbo.evaluate.scores import Faithfulness
    from ragturbo.evaluate.similarity import ClassSimilarity
    from ragturbo.evaluate.tifa import HuggingFaceVQA, Tifa

    made: list[Any] = []
    for name in suite.metrics:
        if name == "faithfulness":
            made.append(Faithfulness())
        elif name == "clip":
            made.append(ClipScore.load(clip_model, clip_weights, device))
        elif name == "aesthetic":
            made.append(Aesthetic.load(aesthetic_weights, aesthetic_clip, device))
        elif name == "tifa":
            folder = _given(Path(vqa) if vqa else None, "--vqa", suite.name)
            made.append(Tifa(HuggingFaceVQA.load(str(folder), device, local_files_only=not download)))
        elif name == "class-similarity":
            for item in (encoders or "").split(",") if encoders else []:
                label, _, folder_or_id = item.partition("=")
                made.append(ClassSimilarity.load(label, folder_or_id, device=device, local_files_only=not download))
    return made


class Watch:
    """One line that says what is done and how long the rest takes."""

    def __init__(self) -> None:
        self._what, self._since, self._from = "", 0.0, 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._since, self._from = what, now, done
        rate = (done - self._from) / max(now - self._since, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        print(
            f"\r\033[K{what}: {done} of {total}{left}", end="\n" if done == total else "", file=sys.stderr, flush=True
        )
