"""The table and the bar chart of a breakdown, like the paper's Fig. 6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ragturbo.bench.paper import LABELS, ROWS, figure, footnotes

# Labels of a trained model, which is not one of the paper's.
OWN_LABELS = {
    "teacher": "teacher, 50 steps, CFG 7.5",
    "lcm": "LCM, 4 steps",
    "turbo": "student, 1 step",
    "ours": "student with retrieval, 1 step",
    "uncached": "the same, pairs encoded at request",
}
PROFILES = {"paper": "eager, in sequence", "turbo": "ragturbo"}
# "Reproduced" means measured on the paper's GPU, with its latencies within this.
REPRODUCED_WITHIN = 0.05


def machine_name(record: dict[str, Any]) -> str:
    found = record["context"].get("gpu")
    return found["name"] if found else f"{record['context']['cpu']}, {record['context']['cores']} cores"


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per bar: times in ms or why it was skipped, and the paper's value if there is one."""
    out, labels = [], LABELS if record["weights"] == "random" else OWN_LABELS
    for profile, kinds in record["profiles"].items():
        for kind, row in kinds.items():
            if kind not in LABELS:
                continue
            entry = {"kind": kind, "label": labels[kind], "profile": profile, "skipped": row.get("skipped")}
            if entry["skipped"] is None:
                entry |= {f"{name}_ms": row["seconds"][name] * 1e3 for name in ("mean", "p50", "p99")}
                entry |= {f"{name}_ms": row[name] * 1e3 for name in ("retrieval", "denoising")}
                entry |= {"images": row["images"], "engine": row.get("engine")}
                entry["stages_ms"] = {name: value * 1e3 for name, value in row["stages"].items()}
            # The paper's images are 512x512.
            if kind in ROWS and profile == "paper" and record["pixels"] == 512:
                entry["paper_ms"] = figure(f"latency.{kind}")
            out.append(entry)
    return out


def verdict(record: dict[str, Any]) -> str:
    """Say whether the paper's latencies were reproduced, which can only be judged on an L40S at SD 2.1's size."""
    name = machine_name(record)
    if "L40S" not in name or record["pixels"] != 512 or not record["model"].startswith("sd21"):
        return (
            f"Measured on {name}. The paper's numbers are of an L40S and Stable Diffusion 2.1's size at 512²: nothing "
            "here reproduces or refutes them."
        )
    found = {r["kind"]: r for r in rows(record) if r["profile"] == "paper" and r["skipped"] is None}
    errors = {k: found[k]["mean_ms"] / figure(f"latency.{k}") - 1 for k in ("ours", "turbo") if k in found}
    told = ", ".join(f"{LABELS[k]} {found[k]['mean_ms']:.1f} ms ({error:+.1%})" for k, error in errors.items())
    good = len(errors) == 2 and all(abs(error) <= REPRODUCED_WITHIN for error in errors.values())
    return f"{'Reproduced' if good else 'Not reproduced'} within {REPRODUCED_WITHIN:.0%}: {told}."


def markdown(record: dict[str, Any]) -> str:
    """Return the verdict, the table of Fig. 6, the table of stages and the paper's footnotes."""
    lines = [
        f"{verdict(record)} {record['model']}, {record['dtype']}, {record['pixels']}×{record['pixels']}, batch 1; "
        f"search over {record['search']['keys']:,} keys by {record['search']['by']}.",
        "",
        "| model | profile | images | mean ms | p50 | p99 | retrieval | denoising | paper (L40S) |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    timed = []
    for row in rows(record):
        name = f"| {row['label']} | {PROFILES[row['profile']]} "
        if row["skipped"] is not None:
            lines.append(f"{name}| | {row['skipped']} | | | | | |")
            continue
        timed.append(row)
        paper = f"{row['paper_ms']:.1f}" if "paper_ms" in row else ""
        lines.append(
            f"{name}| {row['images']} | {row['mean_ms']:.2f} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} "
            f"| {row['retrieval_ms']:.3f} | {row['denoising_ms']:.2f} | {paper} |"
        )
    if any(row["engine"] == "graph" for row in timed):
        lines += ["", "The graph engine searches while the encoder runs: its retrieval is the time that ours adds."]
    stages = list(dict.fromkeys(name for row in timed for name in row["stages_ms"]))
    lines += ["", "Stages, mean ms:", ""]
    lines += [f"| model | profile | {' | '.join(stages)} |", f"|---|---|{'--:|' * len(stages)}"]
    for row in timed:
        cells = (f"{row['stages_ms'][n]:.3f}" if n in row["stages_ms"] else "" for n in stages)
        lines.append(f"| {row['label']} | {PROFILES[row['profile']]} | {' | '.join(cells)} |")
    if record["flags"]:
        lines += ["", f"Flags: {'; '.join(record['flags'])}."]
    lines += ["", "Claims of the paper that its own figures contradict:", "", *(f"* {note}" for note in footnotes())]
    return "\n".join(lines) + "\n"


def bars(record: dict[str, Any], path: Path) -> Path:
    """Draw a PNG: this machine's bars, split into retrieval and denoising, beside the paper's."""
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
    # The teacher is 25 times slower: its bars are cut off and its numbers printed at the edge.
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
    # Without the library version and date, equal data give equal bytes.
    plot.savefig(path, dpi=120, metadata={"Software": None})
    return path
