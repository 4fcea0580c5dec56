"""Markdown tables of benchmark rows, each with its number of rounds and its flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ragturbo.bench.results import Run, flags, rounds

# Rounds below which a percentile is left blank.
LEAST = {"p50": 1, "p95": 20, "p99": 100}
# Heading -> cell, from a benchmark's extra_info, name and group. A heading that ends with a colon is aligned right.
Columns = dict[str, Callable[[dict[str, Any]], str]]

GENERATE: Columns = {
    "benchmark": lambda info: info["name"],
    "model": lambda info: str(info["sizes"].get("model")),
    "CPU threads:": lambda info: str(info.get("threads", "")),
    "batch:": lambda info: str(info["sizes"].get("batch")),
    "images/s:": lambda info: f"{info['images_a_call'] / info['seconds']['p50']:.2f}",
}
SERVE: Columns = {
    "benchmark": lambda info: info["name"],
    "model": lambda info: str(info["sizes"].get("model")),
    "rate, 1/s:": lambda info: f"{info['rate']:.2f}" if info.get("rate") else "",
    "requests:": lambda info: str(info.get("requests", "")),
    "images/s:": lambda info: f"{info['images_per_s']:.2f}" if "images_per_s" in info else "",
}
RETRIEVAL: Columns = {
    "by": lambda info: info["sizes"]["retriever"],
    "what": lambda info: info["group"],
    "recall@10:": lambda info: "" if info.get("recall") is None else f"{info['recall']:.3f}",
}
FEATURES: Columns = {
    "reader": lambda info: info["sizes"]["reader"],
    "GB/s:": lambda info: f"{info['sizes']['rows'] * info['sizes']['row_bytes'] / info['seconds']['p50'] / 1e9:.1f}",
}


def table(columns: Columns, run: Run, found: list[dict[str, Any]]) -> list[str]:
    """Return a table with the columns, percentiles, rounds and flags of each benchmark that has times."""
    heads = [*columns, "p50:", "p95:", "p99:", "rounds:", "flags"]
    lines = [_line(head.rstrip(":") for head in heads)]
    lines.append("|" + "".join("--:|" if head.endswith(":") else "---|" for head in heads))
    for b in found:
        info = b["extra_info"]
        if "seconds" not in info:
            continue
        count = rounds(b)
        spread = [_time(info["seconds"][name]) if (count or 1) >= least else "" for name, least in LEAST.items()]
        notes = [*flags(run, b), *([info["note"]] if info.get("note") else [])]
        cells = [*(cell({**info, "name": b["name"], "group": b["group"]}) for cell in columns.values()), *spread]
        lines.append(_line([*cells, "" if count is None else f"{count:,}", "; ".join(notes)]))
    return lines


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _time(seconds: float) -> str:
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * scale:.4g} {unit}"
    return f"{seconds:.4g} s"
