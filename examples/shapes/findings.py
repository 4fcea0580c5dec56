"""Which settings to use, from data: `python examples/shapes/findings.py --work build/findings --adapter EXPORT`.

A cell is a system on a database: faithfulness on unseen captions beside the milliseconds of one image. What a cell's
JSON has is not measured again, so the times can be taken apart (`--untimed`, then without), on a silent machine;
`--report` makes the tables and the plot of the JSON alone.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device import DEVICE
from PIL import Image
from projected import make_projected
from scored import latency, record, score
from settings import Settings
from stage_bundle import pairs

from ragturbo import Database
from ragturbo.evaluate.drawing import render
from ragturbo.evaluate.suites import shapes
from ragturbo.evaluate.systems import Loading, parse_spec
from ragturbo.evaluate.table import estimate, verdict
from ragturbo.evaluate.world import COLOURS, sample_scene
from ragturbo.model.source import resolve

log = logging.getLogger("ragturbo.recipe")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "shapes" / "cpu-2core" / "findings"
OWN, CIRCLES, PROJECTED = "own", "circles", "projected"
WEIGHTS = (0.9, 0.8, 0.6, 0.4, 0.2)


@dataclass(frozen=True)
class Cell:
    question: str
    system: str
    database: str = OWN
    """ "own", "circles", "projected" (the own pairs under keys of a projection), or a number of pairs."""

    @property
    def name(self) -> str:
        return f"{self.question}-{parse_spec(self.system).slug}-{self.database}"


def cells(sizes: list[int]) -> list[Cell]:
    modes = ("student", "none", "slerp@w=0.8", "lerp@w=0.8", "adapter", "wrong")
    found = [Cell("mode", system) for system in modes]
    found += [Cell("steps", f"{kind}@steps={n}") for kind in ("student", "adapter") for n in (1, 2, 3, 4)]
    found += [Cell("blend", f"{kind}@w={w}") for w in WEIGHTS for kind in ("slerp", "lerp", "slerp@per=token+")]
    found += [Cell("neighbours", f"{kind}@k={k}") for kind in ("adapter", "slerp") for k in (1, 2, 4, 8)]
    found += [
        Cell("lambda", system) for system in ("adapter", *(f"adapter@lam={lam}" for lam in (0.25, 0.5, 0.75, 1.0)))
    ]
    found += [Cell("size", system, str(n)) for n in sizes for system in ("adapter", "slerp@w=0.8")]
    foreign = ("student", "adapter", "adapter@min_score=0.9", "slerp@w=0.8")
    found += [Cell("wrong domain", system, CIRCLES) for system in foreign]
    found += [Cell("keys", system, name) for name in (OWN, PROJECTED) for system in ("adapter", "slerp@w=0.8")]
    found += [Cell("search", f"adapter@retriever={name}") for name in ("exact", "bm25")]
    return [Cell(cell.question, _joined(cell.system), cell.database) for cell in found]


def _joined(system: str) -> str:
    """slerp@per=token+@w=0.5 -> slerp@per=token+w=0.5"""
    return system.replace("+@", "+")


def database(name: str, args: argparse.Namespace) -> Path:
    """The model's own, or one that is built once with the model."""
    if name == OWN:
        return Path(args.database) if args.database else resolve(args.model) / "database"
    folder = args.work / f"database-{name}"
    if not folder.exists():
        part = folder.with_name(f".{folder.name}.part")
        source = circles(args.circles) if name == CIRCLES else pairs(_count(name, args), Settings())
        asked = model(name, args)
        Database.build(source, part, model=asked, feature_dtype="int8", index=False, batch_size=64, resume=False)
        part.rename(folder)
    return folder


def _count(name: str, args: argparse.Namespace) -> int:
    return len(Database.open(database(OWN, args))) if name == PROJECTED else int(name)


def model(name: str, args: argparse.Namespace) -> str:
    if name != PROJECTED:
        return str(args.model)
    return str(make_projected(args.model, args.work / "projected", args.key_steps))


def circles(count: int) -> Iterator[tuple[str, Image.Image]]:
    """A database of another domain: whatever is asked for, it shows a single circle."""
    for i in range(count):
        scene = sample_scene(97_000_000 + i, "database", kinds=(("circle", COLOURS[i % len(COLOURS)]),))
        yield scene.caption, render(scene)


def measure(cell: Cell, args: argparse.Namespace) -> None:
    path = args.results / f"{cell.name}.json".replace(" ", "-")
    facts: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if facts and (args.untimed or "milliseconds" in facts):
        return
    log.info("%s", cell.name)
    where = database(cell.database, args)
    adapter = None if args.adapter is None else str(args.adapter)
    loading = Loading(model(cell.database, args), str(where), adapter, str(DEVICE))
    suite = shapes(args.prompts)
    if not facts:
        facts = {"question": cell.question, "database": cell.database, "pairs": len(Database.open(where))}
        facts |= score(cell.system, loading, suite, args.work / "drawn" / cell.database)
    record(path, facts if args.untimed else {**facts, "milliseconds": latency(cell.system, loading, suite)})


def report(results: Path, image: Path) -> str:
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json"))]
    if not rows:
        raise SystemExit(f"{results} holds no results: run findings.py first")
    base = next((row for row in rows if row["system"] == "student"), None)
    lines = []
    for question in dict.fromkeys(cell.question for cell in cells([0])):
        lines += [
            f"**{question}**",
            "",
            "| system | database | all | common | rare | to `student`, paired | ms an image |",
            "|---|---|---|---|---|---|---|",
        ]
        held = [row for row in rows if row["question"] == question]
        for row in sorted(held, key=lambda row: (row["database"] in (CIRCLES, PROJECTED), row["system"], row["pairs"])):
            stored = f"{row['pairs']:,}" + (f" {row['database']}" if row["database"] in (CIRCLES, PROJECTED) else "")
            cells_of = [_mean(row, letters) for letters in ("cr", "c", "r")]
            cells_of.append(_difference(row, base))
            took = f"{row['milliseconds']['p50']:.1f}" if "milliseconds" in row else "not timed"
            lines.append(f"| `{row['system']}` | {stored} | {' | '.join(cells_of)} | {took} |")
        lines.append("")
    timed = [row for row in rows if "milliseconds" in row]
    if timed:
        _plot(timed, image)
    made = {(row["made_by"]["commit"][:10], row["made_by"]["machine"]) for row in rows}
    lines += [
        f"{rows[0]['prompts']} unseen captions; made at {commit} on {machine}." for commit, machine in sorted(made)
    ]
    return "\n".join(lines) + "\n"


def _mean(row: dict[str, Any], letters: str) -> str:
    found = estimate([v for v, group in zip(row["values"], row["group"], strict=True) if group in letters])
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]" if found.count else ""


def _difference(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """All systems drew the same prompts from the same noise."""
    if base is None or row["system"] == base["system"]:
        return ""
    found = estimate([mine - theirs for mine, theirs in zip(row["values"], base["values"], strict=True)])
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}] {verdict(found)}"


def _plot(rows: list[dict[str, Any]], image: Path) -> None:
    """Quality beside latency, a colour a question."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for question in dict.fromkeys(row["question"] for row in rows):
        held = [row for row in rows if row["question"] == question]
        times, values = [row["milliseconds"]["p50"] for row in held], [np.mean(row["values"]) for row in held]
        axes.scatter(times, values, s=18, label=question)
    axes.set_xlabel("milliseconds from prompt to image, one at a time (median)")
    axes.set_ylabel("faithfulness")
    axes.legend(fontsize=7)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/findings"), help="databases and images")
    parser.add_argument("--results", type=Path, default=RESULTS, help="one JSON a cell")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--adapter", type=Path, help="an export of `ragturbo train`; default: the model's own")
    parser.add_argument("--database", help="default: the model's own")
    parser.add_argument("--prompts", type=int, default=400, help="unseen captions, every other one rare")
    parser.add_argument("--sizes", nargs="*", type=int, default=[250, 1000, 4000, 20480])
    parser.add_argument("--circles", type=int, default=1000, help="pairs of the database of another domain")
    parser.add_argument("--key-steps", type=int, default=600, help="training of the projection")
    parser.add_argument("--questions", nargs="+", help="only these")
    parser.add_argument("--untimed", action="store_true", help="scores alone; a later run without it adds the times")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="tables and plot of what is there")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "findings.png")
    args = parser.parse_args(arguments)
    if args.report:
        print(report(args.results, args.image))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    for cell in cells(args.sizes):
        if not args.questions or cell.question in args.questions:
            measure(cell, args)


if __name__ == "__main__":
    main()
