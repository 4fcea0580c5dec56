"""Tables and plots of compare.py's results, from their JSON alone: `python examples/shapes/compare_report.py`.

Values are paired prompt by prompt. An interval covers both kinds of chance, which captions were asked and with which
seeds was trained; "better" is said only where it leaves zero out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from compare import ARMS, RESULTS, UNTAUGHT
from PIL import Image, ImageDraw

from ragturbo.evaluate.drawing import render
from ragturbo.evaluate.run import image_path
from ragturbo.evaluate.suites import shapes
from ragturbo.evaluate.systems import parse_spec
from ragturbo.evaluate.table import Estimate, verdict
from ragturbo.evaluate.world import Scene, arrange, parse

RESAMPLES, SEED = 2000, 0
GROUPS = ("all", "common", "rare", "untaught")
IMAGES = Path(__file__).parents[2] / "docs" / "images"
TITLES = {
    "student": "student, one step", "slerp": "direct injection, w = 0.8", "slerp-best": "direct injection, best w*",
    "best-of-9": "student, best of nine seeds", "teacher": "teacher, 50 steps", "lcm": "consistency model, 4 steps",
    "adapter": "adapter and LoRA", "lora": "LoRA alone, no retrieval", "wrong": "adapter and LoRA, wrong neighbours",
    "no-neighbours": "adapter and LoRA, λ = 0", "trained-wrong": "trained with wrong neighbours",
    "adapter-only": "adapter without LoRA", "attention": "attention alone (Eq. 4) and LoRA",
    "lam-1": "λ fixed at 1", "k-2": "k = 2", "k-4": "k = 4",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """An arm's values: (training seeds, prompts)."""

    values: np.ndarray
    runs: tuple[dict[str, Any], ...]


def read(folder: Path) -> dict[str, Result]:
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text("utf-8"))
        found.setdefault(facts["arm"], []).append(facts)
    asked = {(run["first_prompt"], run["group"]) for runs in found.values() for run in runs}
    if len(asked) > 1:
        raise SystemExit(f"{folder}: the results are of different prompts; make them again with one --prompts")
    return {
        arm: Result(np.array([run["values"] for run in found[arm]]), tuple(found[arm])) for arm in ARMS if arm in found
    }


def mean(result: Result, group: str) -> Estimate:
    return _estimate(_resampled(result, group), result, group)


def difference(result: Result, other: Result, group: str) -> Estimate:
    """Paired: one drawing of prompts for both, drawings of seeds of their own."""
    asked = _columns(result, group)
    rng = np.random.default_rng(SEED)
    a, b = result.values[:, asked], other.values[:, asked]
    draws = [_one(a, b, rng) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(a.mean() - b.mean()), float(low), float(high), a.shape[1])


def _one(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> float:
    prompts = rng.integers(0, a.shape[1], a.shape[1])
    seeds_a, seeds_b = (rng.integers(0, len(x), len(x)) for x in (a, b))
    return float(a[seeds_a][:, prompts].mean() - b[seeds_b][:, prompts].mean())


def _resampled(result: Result, group: str) -> list[float]:
    values, rng = result.values[:, _columns(result, group)], np.random.default_rng(SEED)
    return [_one(values, np.zeros_like(values[:1]), rng) for _ in range(RESAMPLES)]


def _estimate(draws: Sequence[float], result: Result, group: str) -> Estimate:
    asked = _columns(result, group)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(result.values[:, asked].mean()), float(low), float(high), len(asked))


def _columns(result: Result, group: str) -> np.ndarray:
    return _groups(result.values.shape[1])[group]


@cache
def _groups(count: int) -> dict[str, np.ndarray]:
    """Which of the suite's prompts are of each group; the untaught are those of the rare no arm's data showed."""
    prompts = shapes(count).prompts
    rare = np.array([prompt.group == "rare" for prompt in prompts])
    untaught = np.array([not UNTAUGHT.isdisjoint(parse(prompt.text).kinds) for prompt in prompts])
    masks = (np.ones_like(rare), ~rare, rare, untaught)
    return {name: np.flatnonzero(mask) for name, mask in zip(GROUPS, masks, strict=True)}


def markdown(results: dict[str, Result]) -> str:
    lines = [f"| arm | training seeds | {' | '.join(GROUPS)} |", f"|---|---{'|---' * len(GROUPS)}|"]
    for arm, result in results.items():
        cells = [_cell(mean(result, group)) for group in GROUPS]
        trained = str(len(result.values)) if "training" in result.runs[0] else ""
        lines.append(f"| {TITLES[arm]} | {trained} | {' | '.join(cells)} |")
    for base in ("lora", "student"):
        if base not in results:
            continue
        lines += ["", f"Difference to: {TITLES[base]}, paired by prompt.", ""]
        lines += [f"| arm | {' | '.join(GROUPS)} | in words |", f"|---|---{'|---' * len(GROUPS)}|"]
        for arm, result in results.items():
            if arm != base:
                found = [difference(result, results[base], group) for group in GROUPS]
                cells = [f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in found]
                lines.append(f"| {TITLES[arm]} | {' | '.join(cells)} | {verdict(found[0])} |")
    first = next(iter(results.values()))
    made = sorted(
        {json.dumps({k: run["made_by"][k] for k in ("commit", "machine")}) for r in results.values() for run in r.runs}
    )
    lines += [
        "",
        f"{first.values.shape[1]} unseen captions; means with 95 % intervals over prompts and training seeds.",
    ]
    lines += [f"Made at {fact['commit'][:10]} on {fact['machine']}." for fact in map(json.loads, made)]
    return "\n".join(lines) + "\n"


def _cell(found: Estimate) -> str:
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def plot(results: dict[str, Result], images: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    images.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(results) + 1.0), layout="constrained")
    for j, (group, colour) in enumerate(zip(GROUPS[:3], ("tab:gray", "tab:blue", "tab:orange"), strict=True)):
        found = [mean(result, group) for result in results.values()]
        places = np.arange(len(found))[::-1] + 0.22 * (1 - j)
        errors = [[e.mean - e.low for e in found], [e.high - e.mean for e in found]]
        axes.errorbar([e.mean for e in found], places, xerr=errors, fmt="o", ms=4, lw=1, color=colour, label=group)
    axes.set_yticks(np.arange(len(results))[::-1], [TITLES[arm] for arm in results])
    axes.set_xlabel("faithfulness")
    axes.legend(fontsize=8)
    paths = [images / "comparison.png"]
    figure.savefig(paths[0], dpi=130)
    plt.close(figure)
    trained = {arm: r for arm, r in results.items() if "training" in r.runs[0] and ARMS[arm].trained_as is None}
    if trained:
        paths.append(_curves(trained, images / "comparison-training.png"))
    return paths


def _curves(trained: dict[str, Result], path: Path) -> Path:
    """What the first seed of every arm said while it trained."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for arm, result in trained.items():
        rows = result.runs[0]["training"]["stats"]
        steps = [row["step"] for row in rows]
        left.plot(steps, [row["distill"] for row in rows], lw=1, label=TITLES[arm])
        right.plot(steps, [np.mean(list(row["d_heads"].values())) for row in rows], lw=1)
    left.set_xlabel("step")
    left.set_ylabel("smooth L1 to the teacher (Eq. 8)")
    left.legend(fontsize=6)
    right.axhline(2.0, color="black", lw=0.6, ls=":")
    right.set_xlabel("step")
    right.set_ylabel("D's hinge, mean of its heads (2: no signal)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def sheet(results: dict[str, Result], drawn: Path, images: Path, count: int = 12) -> Path | None:
    """The first prompts, a row an arm (its first seed) and under them the true pictures; never chosen, always these."""
    suite = shapes(next(iter(results.values())).values.shape[1])
    prompts = suite.prompts[:count]
    rows: list[list[Image.Image]] = []
    titles: list[str] = []
    for arm, result in results.items():
        run = result.runs[0]
        folder = drawn / (arm if run["seed"] is None else f"{arm}-{run['seed']}")
        paths = [image_path(folder, parse_spec(run["system"]), prompt) for prompt in prompts]
        if all(path.exists() for path in paths):
            rows.append([Image.open(path).convert("RGB") for path in paths])
            titles.append(TITLES[arm])
    if not rows:
        return None
    # The captions' scenes as the world draws them: what was asked for.
    asked = [(prompt.text, parse(prompt.text)) for prompt in prompts]
    rows.append([render(Scene(said, text, arrange(said, np.random.default_rng(SEED)))) for text, said in asked])
    titles.append("what was asked for")
    side, left = 66, 250
    page = Image.new("RGB", (left + side * count, side * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for j, (title, row) in enumerate(zip(titles, rows, strict=True)):
        pen.text((4, j * side + 26), title.replace("λ", "lambda"), fill="black", font_size=12)
        for i, image in enumerate(row):
            page.paste(image, (left + i * side + 1, j * side + 1))
    path = images / "comparison-sheet.png"
    page.save(path)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--work", type=Path, help="compare.py's: also a sheet of its images")
    args = parser.parse_args(arguments)
    results = read(args.results)
    if not results:
        raise SystemExit(f"{args.results} holds no results: run compare.py first")
    print(markdown(results))
    made = [*plot(results, args.images), *([sheet(results, args.work / "drawn", args.images)] if args.work else [])]
    for path in filter(None, made):
        print(path)


if __name__ == "__main__":
    main()
