"""docs/performance.md's marked sections, made from the raw JSON alone: equal data give equal text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ragturbo.bench import budgets, chart, plots
from ragturbo.bench.results import Machine, history, read
from ragturbo.errors import InvalidRequest

# <!-- bench:NAME --> … <!-- /bench -->
_SECTION = re.compile(r"(<!-- bench:([a-z]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def update(results: Path, page: Path, *, write: bool) -> list[str]:
    """Renders every section of `page`; gives the names of those that differed. Plots are drawn beside the page."""
    machines = read(results)
    if not page.is_file():
        raise InvalidRequest(f"there is no {page}; give --page")
    text = page.read_text("utf-8")
    changed: list[str] = []

    def render(match: re.Match[str]) -> str:
        name = match[2]
        if name not in SECTIONS:
            raise InvalidRequest(f"{page} has a section {name!r}; known: {', '.join(SECTIONS)}")
        new = f"{match[1]}{SECTIONS[name](machines)}{match[3]}"
        if new != match[0]:
            changed.append(name)
        return new

    new = _SECTION.sub(render, text)
    changed += [f"plots/{name}" for name in plots.stale(machines, page.parent / "plots")]
    if write:
        plots.draw(machines, page.parent / "plots")
        page.write_text(new, "utf-8")
    return changed


def machines_section(machines: list[Machine]) -> str:
    lines = ["| folder | machine | torch | triton | commit | file | took, s |", "|---|---|---|---|---|---|--:|"]
    for machine in machines:
        for run in machine.runs:
            c = run.context
            gpu = c.get("gpu")
            what = f"{c['cpu']}, {c['cores']} cores"
            if gpu:
                limit = f", {gpu['power_limit_w']:.0f} W" if gpu.get("power_limit_w") else ""
                what = f"{gpu['name']}, driver {gpu.get('driver', 'unknown')}{limit}; {what}"
            packages = c["packages"]
            lines.append(
                f"| {machine.name} | {what} | {packages.get('torch', '')} | {packages.get('triton', '')} "
                f"| {run.commit} | {run.path.name} | {_whole(run.data.get('wall_s'))} |"
            )
    return _block(lines)


def _whole(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f}"


def budgets_section(machines: list[Machine]) -> str:
    """GPU budgets from GPU machines, CPU budgets from CPU machines; the newest measurement of each."""
    found: dict[str, tuple[float, str]] = {}
    for machine in machines:
        is_gpu = machine.runs[0].context.get("gpu") is not None
        for key, value in machine.figures().items():
            wanted = next((b.where for b in budgets.BUDGETS if b.key == key), None)
            if wanted == ("gpu" if is_gpu else "cpu"):
                found[key] = value
    return _block(budgets.table(found))


def ops_section(machines: list[Machine]) -> str:
    """Each op and implementation, with its share of the roofline."""
    other = ("stage", "generate", "peer", "serve", "import", "first_image", "modules_by_hand", "retrieval", "features")
    return _suites(machines, lambda info: not str(info.get("op", "")).startswith(other), _op_table, plot="roofline")


def retrieval_section(machines: list[Machine]) -> str:
    """One query by each retriever, with its recall; opening; what was made once."""
    return _suites(machines, lambda info: info.get("op") == "retrieval" and "seconds" in info, _retrieval_table)


def features_section(machines: list[Machine]) -> str:
    return _suites(machines, lambda info: "reader" in info.get("sizes", {}), _features_table)


def stages_section(machines: list[Machine]) -> str:
    return _suites(machines, lambda info: str(info.get("op", "")).startswith("stage"), _op_table, plot="stages")


def generate_section(machines: list[Machine]) -> str:
    return _suites(
        machines,
        lambda info: str(info.get("op", "")).startswith(("generate", "peer", "modules_by_hand")),
        _generate_table,
        plot="throughput",
    )


def serve_section(machines: list[Machine]) -> str:
    return _suites(machines, lambda info: str(info.get("op", "")).startswith("serve"), _serve_table)


def start_section(machines: list[Machine]) -> str:
    return _suites(machines, lambda info: info.get("op") in ("import", "first_image"), _start_table)


def breakdown_section(machines: list[Machine]) -> str:
    parts = []
    for machine in machines:
        for run in (r for r in machine.runs if r.kind == "breakdown"):
            parts.append(f"### {machine.name}: {run.data['model']} ({run.path.name}, {run.commit})\n")
            parts.append(chart.markdown(run.data))
            parts.append(f"![bars of the table above](plots/{plots.bars_name(machine, run)})\n")
    return "\n".join(parts) if parts else "Not measured yet.\n"


def history_section(machines: list[Machine]) -> str:
    """One row a run of the suites: what one image took, by commit."""
    lines = [
        "| machine | when | commit | model | mode | generate, batch 1, p50 ms | file |",
        "|---|---|---|---|---|--:|---|",
    ]
    for machine in machines:
        for run, b in history(machine):
            info = b["extra_info"]
            lines.append(
                f"| {machine.name} | {run.when[:10]} | {run.commit} | {info['sizes'].get('model')} "
                f"| {info.get('mode')} | {info['seconds']['p50'] * 1e3:.2f} | {run.path.name} |"
            )
    pictures = [text for machine in machines if (text := _picture(machine, "history"))]
    return _block(lines) + "".join(f"\n{text}" for text in pictures)


SECTIONS: dict[str, Callable[[list[Machine]], str]] = {
    "machines": machines_section,
    "budgets": budgets_section,
    "breakdown": breakdown_section,
    "ops": ops_section,
    "stages": stages_section,
    "retrieval": retrieval_section,
    "features": features_section,
    "generate": generate_section,
    "serve": serve_section,
    "start": start_section,
    "history": history_section,
}


def _suites(
    machines: list[Machine],
    belongs: Callable[[dict[str, Any]], bool],
    table: Callable[[list[dict[str, Any]]], list[str]],
    plot: str | None = None,
) -> str:
    parts = []
    for machine in machines:
        for i, (run, found) in enumerate(machine.table(belongs)):
            only = "" if i == 0 else ", rows that no file above has"
            parts.append(f"{machine.name} ({run.path.name}, {run.commit}{only}):\n")
            parts.append(_block(table(found)))
            if plot is not None and i == 0:
                parts.append(_picture(machine, plot))
    return "\n".join(parts) if parts else "Not measured yet.\n"


def _picture(machine: Machine, plot: str) -> str:
    name = plots.suite_name(machine, plot)
    return f"![{plot}](plots/{name})\n" if name in plots.wanted([machine]) else ""


def _op_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| benchmark | dtype | sizes | p50 | p95 | of roofline | flags |", "|---|---|---|--:|--:|--:|---|"]
    for b in found:
        info = b["extra_info"]
        if "seconds" not in info:
            continue
        share = info.get("fraction_of_roofline")
        lines.append(
            f"| {b['name']} | {info.get('dtype') or ''} | {_sizes(info)} | {_time(info['seconds']['p50'])} "
            f"| {_time(info['seconds']['p95'])} | {'' if share is None else f'{share:.0%}'} "
            f"| {'; '.join(info.get('flags', []))} |"
        )
    return lines


def _retrieval_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| what | by | pairs | p50 | p95 | p99 | recall@10 | flags |", "|---|---|--:|--:|--:|--:|--:|---|"]
    for b in sorted(found, key=lambda b: (b["group"] or "", b["extra_info"]["sizes"]["rows"])):
        info = b["extra_info"]
        s, recall = info["seconds"], info.get("recall")
        notes = [info["note"]] if info.get("note") else []
        lines.append(
            f"| {b['group']} | {info['sizes']['retriever']} | {info['sizes']['rows']:,} | {_time(s['p50'])} "
            f"| {_time(s['p95'])} | {_time(s['p99'])} | {'' if recall is None else f'{recall:.3f}'} "
            f"| {'; '.join([*info.get('flags', []), *notes])} |"
        )
    return lines


def _features_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| reader | rows a request | p50 | p95 | GB/s | flags |", "|---|--:|--:|--:|--:|---|"]
    for b in sorted(found, key=lambda b: (b["extra_info"]["sizes"]["rows"], b["group"])):
        info = b["extra_info"]
        sizes, s = info["sizes"], info["seconds"]
        rate = sizes["rows"] * sizes["row_bytes"] / s["p50"] / 1e9
        lines.append(
            f"| {sizes['reader']} | {sizes['rows']} | {_time(s['p50'])} | {_time(s['p95'])} | {rate:.1f} "
            f"| {'; '.join(info.get('flags', []))} |"
        )
    return lines


def _generate_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| benchmark | model | dtype | CPU threads | batch | p50 | p95 | p99 | images/s | flags |",
             "|---|---|---|--:|--:|--:|--:|--:|--:|---|"]  # fmt: skip
    for b in found:
        info = b["extra_info"]
        if "seconds" not in info:
            continue
        s = info["seconds"]
        lines.append(
            f"| {b['name']} | {info['sizes'].get('model')} | {info.get('dtype') or ''} | {info.get('threads', '')} "
            f"| {info['sizes'].get('batch')} | {_time(s['p50'])} | {_time(s['p95'])} | {_time(s['p99'])} "
            f"| {info['images_a_call'] / s['p50']:.2f} | {'; '.join(info.get('flags', []))} |"
        )
    return lines


def _serve_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| benchmark | model | rate, 1/s | requests | p50 | p95 | p99 | images/s |",
             "|---|---|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for b in found:
        info = b["extra_info"]
        if "seconds" not in info:
            continue
        s, rate, served = info["seconds"], info.get("rate"), info.get("images_per_s")
        lines.append(
            f"| {b['name']} | {info['sizes'].get('model')} | {f'{rate:.2f}' if rate else ''} "
            f"| {info.get('requests', '')} | {_time(s['p50'])} | {_time(s['p95'])} | {_time(s['p99'])} "
            f"| {'' if served is None else f'{served:.2f}'} |"
        )
    return lines


def _start_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| benchmark | p50 | parts |", "|---|--:|---|"]
    for b in found:
        info = b["extra_info"]
        parts = {k.removesuffix("_s"): v for k, v in info.get("parts", {}).items()}
        parts |= {k.removesuffix("_s"): info[k] for k in ("added_s", "empty_s") if k in info}
        told = ", ".join(f"{name} {_time(value)}" for name, value in parts.items())
        lines.append(f"| {b['name']} | {_time(info['seconds']['p50'])} | {told} |")
    return lines


def _sizes(info: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in info.get("sizes", {}).items() if value is not None)


def _time(seconds: float) -> str:
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * scale:.4g} {unit}"
    return f"{seconds:.4g} s"


def _block(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
