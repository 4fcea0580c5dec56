"""The budgets: what a figure must be, what we want it to be, and under which name a measurement gives it.

Each is a benchmark with a number, never a timed test. A budget nobody has measured says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measurement of a budget, and the record it stands in."""

    value: float
    source: str
    commit: str = "unknown"
    when: str = ""
    gpu: str | None = None
    cores: int | None = None
    rounds: int = 0
    """0 where the record does not tell."""
    flags: tuple[str, ...] = ()


def best(figures: Sequence[Figure]) -> Figure:
    """That of the most rounds; of equals the newest."""
    return max(figures, key=lambda figure: (figure.rounds, figure.when, figure.source))


@dataclass(frozen=True)
class Budget:
    key: str
    what: str
    where: str
    """"gpu", which is an H200, or "cpu", a machine without a GPU."""
    must: float
    aim: float
    unit: str
    scale: float = 1.0
    """Measured values are in SI units; shown times this."""
    at_most: bool = True
    digits: int = 2
    cores: int | None = None
    """Of the CPU that the limits are for, where they are for one."""

    def kind(self, figure: Figure) -> bool:
        return (self.where == "gpu") == (figure.gpu is not None)

    def judges(self, figure: Figure) -> bool:
        """Whether it was measured on the machine that the limits are for."""
        if figure.gpu is not None:
            # A word of its own: a GH200 is another machine, and so is a slice.
            words = figure.gpu.split()
            return self.where == "gpu" and "H200" in words and "MIG" not in words
        return self.where == "cpu" and self.cores in (None, figure.cores)

    def met(self, value: float) -> str:
        better = value <= self.aim if self.at_most else value >= self.aim
        enough = value <= self.must if self.at_most else value >= self.must
        return "aim met" if better else "met" if enough else "not met"

    def show(self, value: float) -> str:
        return f"{value * self.scale:.{self.digits}f}{self.unit}"

    def limits(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{sign} {self._short(self.must)}, aim {self._short(self.aim)}"

    def _short(self, value: float) -> str:
        return f"{value * self.scale:g}{self.unit}"


BUDGETS = (
    Budget("image_p50_s", "text → uint8, full VAE, 512², batch 1, p50", "gpu", 14e-3, 9e-3, " ms", 1e3),
    Budget("faster_than_diffusers", "the same against diffusers eager", "gpu", 3, 3, "×", at_most=False),
    Budget("faster_than_compiled", "the same against diffusers + torch.compile", "gpu", 1.15, 1.3, "×", at_most=False),
    Budget("unet_s", "UNet alone, batch 1", "gpu", 4e-3, 2.5e-3, " ms", 1e3),
    Budget("retrieval_added_s", "retrieval + adapter, added to an image", "gpu", 0.15e-3, 0.1e-3, " ms", 1e3, digits=3),
    Budget("adapter_s", "adapter, 36M, batch 1, in a graph", "gpu", 0.12e-3, 0.06e-3, " ms", 1e3, digits=3),
    Budget("p99_over_p50", "p99 / p50 over 1,000 requests, every prompt new", "gpu", 1.15, 1.05, "×"),
    Budget("cold_start_s", "cold start to the first image, warm disk cache", "gpu", 10, 3, " s"),
    Budget("peak_memory_bytes", "peak device memory, buckets 1–8, keys not counted", "gpu", 10e9, 8e9, " GB", 1e-9),
    Budget("scann_p50_s", "ScaNN, 0.63M × 1024, one query, p50 at recall@10 ≥ 0.95", "cpu", 0.8e-3, 0.5e-3, " ms", 1e3,
           cores=2),
    Budget("scann_layer", "our layer over bare ScaNN, the same run", "cpu", 0.05, 0.05, " %", 1e2, digits=1),
    Budget("open_beyond_index_s", "opening 0.63M pairs, beyond the index's own load", "cpu", 2, 1, " s"),
    Budget("rows_of_memcpy", "feature rows, page cache, 64 a request, share of memcpy", "cpu", 0.8, 0.9, " %", 1e2,
           at_most=False, digits=0, cores=2),
    Budget("import_added_s", "import ragturbo, over an empty package", "cpu", 60e-3, 30e-3, " ms", 1e3, digits=0),
    Budget("library_overhead", "generate() over the same modules called by hand", "cpu", 0.08, 0.03, " %", 1e2,
           digits=1),
    Budget("build_images_per_s", "database build at real sizes", "gpu", 100, 200, " images/s", at_most=False, digits=0),
    Budget("ladd_samples_per_s", "LADD, real sizes, bf16", "gpu", 20, 40, " samples/s", at_most=False, digits=1),
)  # fmt: skip


def table(measured: Mapping[str, Sequence[Figure]]) -> list[str]:
    """Markdown rows. Of each budget the best figure from where its limits are for; another is shown, not judged."""
    out = ["| budget | limit | measured | | from | flags |", "|---|---|--:|---|---|---|"]
    for budget in BUDGETS:
        found = [figure for figure in measured.get(budget.key, ()) if budget.kind(figure)]
        found = [figure for figure in found if budget.judges(figure)] or found
        shown = "| | not measured | | |"
        if found:
            figure = best(found)
            place = figure.gpu or f"{figure.cores} CPU cores"
            verdict = budget.met(figure.value) if budget.judges(figure) else f"not judged: {place}"
            source = f"{figure.source}, {figure.commit}" + (f", {figure.rounds:,} rounds" if figure.rounds else "")
            shown = f"| {budget.show(figure.value)} | {verdict} | {source} | {'; '.join(figure.flags)} |"
        out.append(f"| {budget.what} | {budget.limits()} {shown}")
    return out
