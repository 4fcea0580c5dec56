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


CARDS = ("H200", "H100")


def card(gpu: str | None) -> str | None:
    """Which of `CARDS` a GPU's name says it is. A GH200 is another machine, and so is a slice of a card."""
    words = (gpu or "").split()
    return next((name for name in CARDS if name in words and "MIG" not in words), None)


@dataclass(frozen=True)
class Budget:
    key: str
    what: str
    where: str
    """"gpu", or "cpu", a machine without a GPU."""
    must: float
    aim: float
    unit: str
    scale: float = 1.0
    """Measured values are in SI units; shown times this."""
    at_most: bool = True
    digits: int = 2
    cores: int | None = None
    """Of the CPU that the limits are for, where they are for one."""
    h100: tuple[float, float] | None = None
    """must and aim of an H100, where they are not those of an H200."""

    @property
    def places(self) -> tuple[str, ...]:
        """What the limits are for, each judged by itself."""
        return CARDS if self.where == "gpu" else (_cores(self.cores),)

    def place(self, figure: Figure) -> str | None:
        """Of `places`, the one that the figure was measured on."""
        if self.where == "gpu":
            return card(figure.gpu)
        return _cores(self.cores) if figure.gpu is None and self.cores in (None, figure.cores) else None

    def kind(self, figure: Figure) -> bool:
        return (self.where == "gpu") == (figure.gpu is not None)

    def bounds(self, place: str) -> tuple[float, float]:
        """must and aim."""
        return self.h100 if place == "H100" and self.h100 else (self.must, self.aim)

    def met(self, value: float, place: str) -> str:
        must, aim = self.bounds(place)
        better = value <= aim if self.at_most else value >= aim
        enough = value <= must if self.at_most else value >= must
        return "aim met" if better else "met" if enough else "not met"

    def show(self, value: float) -> str:
        return f"{value * self.scale:.{self.digits}f}{self.unit}"

    def limits(self, place: str) -> str:
        must, aim = self.bounds(place)
        return f"{'≤' if self.at_most else '≥'} {self._short(must)}, aim {self._short(aim)}"

    def _short(self, value: float) -> str:
        return f"{value * self.scale:g}{self.unit}"


def _cores(cores: int | None) -> str:
    return "CPU" if cores is None else f"{cores} CPU cores"


BUDGETS = (
    Budget("image_p50_s", "text → uint8, full VAE, 512², batch 1, p50", "gpu", 14e-3, 9e-3, " ms", 1e3,
           h100=(15e-3, 9.7e-3)),
    Budget("faster_than_diffusers", "the same against diffusers eager", "gpu", 3, 3, "×", at_most=False),
    Budget("faster_than_compiled", "the same against diffusers + torch.compile (reduce-overhead, channels_last)", "gpu",
           1.15, 1.3, "×", at_most=False),
    Budget("unet_s", "UNet alone, batch 1", "gpu", 4e-3, 2.5e-3, " ms", 1e3, h100=(4.3e-3, 2.7e-3)),
    Budget("retrieval_added_s", "retrieval + adapter, added to an image: 630,000 keys, 65,000 page-locked rows", "gpu",
           0.15e-3, 0.1e-3, " ms", 1e3, digits=3, h100=(0.18e-3, 0.12e-3)),
    Budget("adapter_s", "adapter, 36M, batch 1, in a graph", "gpu", 0.12e-3, 0.06e-3, " ms", 1e3, digits=3,
           h100=(0.13e-3, 0.065e-3)),
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


def table(measured: Mapping[str, Sequence[Figure]], places: Sequence[str] | None = None) -> list[str]:
    """Markdown rows: a budget is judged on every card that has limits, each by its own figures and limits alone.

    What another card measured is shown and not judged. places: only of these, such as the card of one run.
    """
    out = ["| budget | on | limit | measured | | from | flags |", "|---|---|---|--:|---|---|---|"]
    for budget in BUDGETS:
        figures = [figure for figure in measured.get(budget.key, ()) if budget.kind(figure)]
        for place in budget.places:
            if places is not None and place not in places:
                continue
            limit = budget.limits(place)
            found = [figure for figure in figures if budget.place(figure) == place]
            if not found:
                out.append(f"| {budget.what} | {place} | {limit} | | not measured | | |")
                continue
            figure = best(found)
            out.append(_row(budget, figure, figure.gpu or place, limit, budget.met(figure.value, place)))
        others: dict[str, list[Figure]] = {}
        for figure in figures:
            if budget.place(figure) is None:
                others.setdefault(figure.gpu or f"{figure.cores} CPU cores", []).append(figure)
        out += [_row(budget, best(found), place, "", "not judged") for place, found in sorted(others.items())]
    return out


def _row(budget: Budget, figure: Figure, place: str, limit: str, verdict: str) -> str:
    source = f"{figure.source}, {figure.commit}" + (f", {figure.rounds:,} rounds" if figure.rounds else "")
    value, flags = budget.show(figure.value), "; ".join(figure.flags)
    return f"| {budget.what} | {place} | {limit} | {value} | {verdict} | {source} | {flags} |"


def unverified(measured: Mapping[str, Sequence[Figure]]) -> list[str]:
    """Markdown rows of figures whose results were not found to be right, with the reason: never judged."""
    rows = [
        f"| {budget.what} | {figure.gpu or f'{figure.cores} CPU cores'} | {budget.show(figure.value)} "
        f"| {figure.source}, {figure.commit} | {'; '.join(figure.flags)} |"
        for budget in BUDGETS
        for figure in measured.get(budget.key, ())
    ]
    return (
        ["| unverified, not judged | on | time or rate | from | why |", "|---|---|--:|---|---|", *rows] if rows else []
    )
