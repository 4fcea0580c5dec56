"""The tables of raw rows, as Markdown lines: each tells how many rounds its percentiles are of, and its flags."""

from __future__ import annotations

from typing import Any

from ragturbo.bench.results import Run, flags, rounds

# Of fewer rounds than this a percentile is its largest value by another name.
LEAST = {"p50": 1, "p95": 20, "p99": 100}


def ops(run: Run, found: list[dict[str, Any]]) -> list[str]:
    lines = ["| benchmark | dtype | sizes | p50 | p95 | rounds | of roofline | flags |",
             "|---|---|---|--:|--:|--:|--:|---|"]  # fmt: skip
    for b in found:
        info = b["extra_info"]
        if "seconds" not in info:
            continue
        share = info.get("fraction_of_roofline")
        # Beside rows that replay a graph.
        launches = ["launches included"] if info.get("captured") is False else []
        lines.append(
            f"| {b['name']} | {info.get('dtype') or ''} | {_sizes(info)} | {_spread(b, 'p50', 'p95')} "
            f"| {'' if share is None else f'{share:.0%}'} | {_flags(run, b, launches)} |"
        )
    return lines


def retrieval(run: Run, found: list[dict[str, Any]]) -> list[str]:
    lines = ["| what | by | pairs | p50 | p95 | p99 | rounds | recall@10 | flags |",
             "|---|---|--:|--:|--:|--:|--:|--:|---|"]  # fmt: skip
    for b in sorted(found, key=lambda b: (b["group"] or "", b["extra_info"]["sizes"]["rows"])):
        info = b["extra_info"]
        recall, notes = info.get("recall"), [info["note"]] if info.get("note") else []
        lines.append(
            f"| {b['group']} | {info['sizes']['retriever']} | {info['sizes']['rows']:,} "
            f"| {_spread(b, 'p50', 'p95', 'p99')} | {'' if recall is None else f'{recall:.3f}'} "
            f"| {_flags(run, b, notes)} |"
        )
    return lines


def features(run: Run, found: list[dict[str, Any]]) -> list[str]:
    lines = ["| reader | rows a request | p50 | p95 | rounds | GB/s | flags |", "|---|--:|--:|--:|--:|--:|---|"]
    for b in sorted(found, key=lambda b: (b["extra_info"]["sizes"]["rows"], b["group"])):
        sizes, s = b["extra_info"]["sizes"], b["extra_info"]["seconds"]
        rate = sizes["rows"] * sizes["row_bytes"] / s["p50"] / 1e9
        lines.append(
            f"| {sizes['reader']} | {sizes['rows']} | {_spread(b, 'p50', 'p95')} | {rate:.1f} | {_flags(run, b)} |"
        )
    return lines


def generate(run: Run, found: list[dict[str, Any]]) -> list[str]:
    lines = ["| benchmark | model | dtype | CPU threads | batch | p50 | p95 | p99 | rounds | images/s | flags |",
             "|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|"]  # fmt: skip
    for b in found:
        info = b["extra_info"]
        if "seconds" not in info:
            continue
        lines.append(
            f"| {b['name']} | {info['sizes'].get('model')} | {info.get('dtype') or ''} | {info.get('threads', '')} "
            f"| {info['sizes'].get('batch')} | {_spread(b, 'p50', 'p95', 'p99')} "
            f"| {info['images_a_call'] / info['seconds']['p50']:.2f} | {_flags(run, b)} |"
        )
    return lines


def serve(run: Run, found: list[dict[str, Any]]) -> list[str]:
    lines = ["| benchmark | model | rate, 1/s | requests | p50 | p95 | p99 | rounds | images/s | flags |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|---|"]  # fmt: skip
    for b in found:
        info = b["extra_info"]
        if "seconds" not in info:
            continue
        rate, served = info.get("rate"), info.get("images_per_s")
        lines.append(
            f"| {b['name']} | {info['sizes'].get('model')} | {f'{rate:.2f}' if rate else ''} "
            f"| {info.get('requests', '')} | {_spread(b, 'p50', 'p95', 'p99')} "
            f"| {'' if served is None else f'{served:.2f}'} | {_flags(run, b)} |"
        )
    return lines


def start(run: Run, found: list[dict[str, Any]]) -> list[str]:
    lines = ["| benchmark | p50 | rounds | parts | flags |", "|---|--:|--:|---|---|"]
    for b in found:
        info = b["extra_info"]
        parts = {k.removesuffix("_s"): v for k, v in info.get("parts", {}).items()}
        parts |= {k.removesuffix("_s"): info[k] for k in ("added_s", "empty_s") if k in info}
        told = ", ".join(f"{name} {_time(value)}" for name, value in parts.items())
        lines.append(f"| {b['name']} | {_spread(b, 'p50')} | {told} | {_flags(run, b)} |")
    return lines


def _spread(b: dict[str, Any], *names: str) -> str:
    """The percentiles that so many rounds bear, and how many they are."""
    seconds, count = b["extra_info"]["seconds"], rounds(b)
    cells = [_time(seconds[name]) if (count or 1) >= LEAST[name] else "" for name in names]
    return " | ".join([*cells, "" if count is None else f"{count:,}"])


def _flags(run: Run, b: dict[str, Any], more: list[str] | None = None) -> str:
    return "; ".join([*flags(run, b), *(more or [])])


def _sizes(info: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in info.get("sizes", {}).items() if value is not None)


def _time(seconds: float) -> str:
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * scale:.4g} {unit}"
    return f"{seconds:.4g} s"
