"""Bars like the paper's Fig. 6, and the table beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ragturbo.bench.breakdown import LABELS, REPRODUCED_WITHIN
from ragturbo.bench.paper import ROWS, figure, footnotes

# Of a model that is its own, and not one of the paper's sizes with random weights.
OWN_LABELS = {
    "teacher": "teacher, 50 steps, CFG 7.5",
    "lcm": "LCM, 4 steps",
    "turbo": "student, 1 step",
    "ours": "student with retrieval, 1 step",
    "uncached": "the same, pairs encoded at request",
}
PROFILES = {"paper": "eager, in sequence", "turbo": "ragturbo"}


def machine_name(record: dict[str, Any]) -> str:
    found = record["context"].get("gpu")
    return found["name"] if found else f"{record['context']['cpu']}, {record['context']['cores']} cores"


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a bar: label, profile, total and parts in ms, the paper's value if there is one, or why it is missing."""
    out, labels = [], LABELS if record["weights"] == "random" else OWN_LABELS
    for profile, kinds in record["profiles"].items():
        for kind, row in kinds.items():
            if kind not in LABELS:
                continue
            entry = {"kind": kind, "label": labels[kind], "profile": profile, "skipped": row.get("skipped")}
            if entry["skipped"] is None:
                entry |= {
                    "mean_ms": row["seconds"]["mean"] * 1e3,
                    "p50_ms": row["seconds"]["p50"] * 1e3,
                    "p99_ms": row["seconds"]["p99"] * 1e3,
                    "retrieval_ms": row["retrieval"] * 1e3,
                    "denoising_ms": row["denoising"] * 1e3,
                    "images": row["images"],
                    "engine": row.get("engine"),
                    "stages_ms": {name: value * 1e3 for name, value in row["stages"].items()},
                }
            # The paper's images are 512x512: another size has nothing to stand beside.
            if kind in ROWS and profile == "paper" and record["pixels"] == 512:
                entry["paper_ms"] = figure(f"latency.{kind}")
            out.append(entry)
    return out


def verdict(record: dict[str, Any]) -> str:
    """Whether the paper's numbers were reproduced: a word that only its own card can give."""
    name = machine_name(record)
    if "L40S" not in name or record["pixels"] != 512 or not record["model"].startswith("sd21"):
        return (
            f"Measured on {name}. The paper's numbers are an L40S's, of Stable Diffusion 2.1's size at 512²: nothing "
            "here reproduces or refutes them."
        )
    found = {r["kind"]: r for r in rows(record) if r["profile"] == "paper" and r["skipped"] is None}
    errors = {k: found[k]["mean_ms"] / figure(f"latency.{k}") - 1 for k in ("ours", "turbo") if k in found}
    told = ", ".join(f"{LABELS[k]} {found[k]['mean_ms']:.1f} ms ({error:+.1%})" for k, error in errors.items())
    good = len(errors) == 2 and all(abs(error) <= REPRODUCED_WITHIN for error in errors.values())
    return f"{'Reproduced' if good else 'Not reproduced'} within {REPRODUCED_WITHIN:.0%}: {told}."


def markdown(record: dict[str, Any]) -> str:
    """The table of Fig. 6, the projection under its name, and the paper's footnotes."""
    projected = record.get("projection", {}).get("rows", {})
    # A projection is of the published sizes: beside images of another size it would say nothing.
    exact = record.get("projection", {}).get("held_out") if record["pixels"] == 512 else None
    lines = [
        f"{verdict(record)} {record['model']}, {record['dtype']}, {record['pixels']}×{record['pixels']}, batch 1; "
        f"search over {record['search']['keys']:,} keys by {record['search']['by']}.",
        "",
        "| model | profile | images | mean ms | p50 | p99 | retrieval | denoising | paper (L40S) | projected to L40S |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows(record):
        name = f"| {row['label']} | {PROFILES[row['profile']]} "
        if row["skipped"] is not None:
            lines.append(f"{name}| | {row['skipped']} | | | | | | |")
            continue
        paper = f"{row['paper_ms']:.1f}" if "paper_ms" in row else ""
        told = projected.get(row["kind"]) if row["profile"] == "paper" and exact else None
        lines.append(
            f"{name}| {row['images']} | {row['mean_ms']:.2f} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} "
            f"| {row['retrieval_ms']:.3f} | {row['denoising_ms']:.2f} | {paper} "
            f"| {'' if told is None else format(told['seconds'] * 1e3, '.1f')} |"
        )
    if exact:
        basis = record["projection"]["basis"]
        shown = ", ".join(
            f"{r['gpu']} {r['projected_s'] * 1e3:.1f} ms against {r['published_s'] * 1e3:.1f} ms ({r['error']:+.0%})"
            for r in exact
        )
        lines += ["", f"The projection is {basis}. On figures it has not seen: {shown}."]
    if any(row.get("engine") == "graph" for row in rows(record)):
        lines += [
            "",
            "Under a graph, where search runs beside the encoder, retrieval is what ours takes longer.",
        ]
    lines += ["", "Stages, mean ms:", "", *_stage_table(record)]
    if record["flags"]:
        lines += ["", f"Flags: {'; '.join(record['flags'])}."]
    lines += ["", "Where the paper disagrees with itself:", "", *(f"* {note}" for note in footnotes())]
    return "\n".join(lines) + "\n"


def _stage_table(record: dict[str, Any]) -> list[str]:
    timed = [r for r in rows(record) if r["skipped"] is None]
    names = list(dict.fromkeys(name for r in timed for name in r["stages_ms"]))
    out = [f"| model | profile | {' | '.join(names)} |", f"|---|---|{'--:|' * len(names)}"]
    for r in timed:
        cells = (f"{r['stages_ms'][n]:.3f}" if n in r["stages_ms"] else "" for n in names)
        out.append(f"| {r['label']} | {PROFILES[r['profile']]} | {' | '.join(cells)} |")
    return out


def digest(data: Any) -> str:
    """Of what is drawn: a plot carries it, so that one behind its data is found without drawing it again."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def bars(record: dict[str, Any], path: Path) -> Path:
    """A PNG: this machine's bars, split into retrieval and denoising, beside the paper's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [r for r in rows(record) if r["skipped"] is None]
    labels = [f"{r['label']}\n({PROFILES[r['profile']]})" for r in timed]
    plot = Figure(figsize=(9, 0.62 * len(timed) + 1.6), layout="constrained")
    FigureCanvasAgg(plot)
    axes = plot.add_subplot()
    places = list(range(len(timed)))
    denoising, retrieval = ([r[f"{part}_ms"] for r in timed] for part in ("denoising", "retrieval"))
    axes.barh(places, denoising, height=0.38, color="#4477aa", label=f"denoising, {machine_name(record)}")
    axes.barh(places, retrieval, left=denoising, height=0.38, color="#ee6677", label="retrieval")
    theirs = [(p + 0.38, r["paper_ms"]) for p, r in zip(places, timed, strict=True) if "paper_ms" in r]
    if theirs:
        at, values = [t[0] for t in theirs], [t[1] for t in theirs]
        axes.barh(at, values, height=0.3, color="#bbbbbb", label="the paper, NVIDIA L40S")
    # The teacher is 25 times the rest: its bars run out of the picture, and their numbers stand at its edge.
    shown = [r["mean_ms"] for r in timed if r["kind"] != "teacher"] + [t[1] for t in theirs if t[1] < 1000]
    limit = 1.2 * max(shown or denoising)
    for place, value in [*zip(places, (r["mean_ms"] for r in timed), strict=True), *theirs]:
        cut = value > 0.95 * limit
        text = f"{value:.1f} → " if cut else f" {value:.1f}"
        axes.text(min(value, limit), place, text, va="center", ha="right" if cut else "left", fontsize=8)
    axes.set_xlim(0, limit)
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms an image (mean)")
    axes.set_title(f"{record['pixels']}×{record['pixels']}, batch 1, {record['model']}", fontsize=9)
    plot.legend(fontsize=8, loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the library's version and the date, equal data give equal bytes.
    plot.savefig(path, dpi=120, metadata={"Software": None, "Data": digest(record)})
    return path
