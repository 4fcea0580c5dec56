"""The performance budgets: a limit, an aim, and the name under which a measurement reports its figure.

A budget is a benchmark with a number, never a timed test. A budget without a figure is listed as not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measurement of a budget, and the file it comes from. rounds: 0 if the record does not say."""

    value: float
    source: str
    commit: str = "unknown"
    when: str = ""
    gpu: str | None = None
    cores: int | None = None
    rounds: int = 0
    flags: tuple[str, ...] = ()

    @property
    def machine(self) -> str:
        return self.gpu or f"{self.cores} CPU cores"


def best(figures: Sequence[Figure]) -> Figure:
    """Return the figure with the most rounds; on a tie, the newest."""
    return max(figures, key=lambda figure: (figure.rounds, figure.when, figure.source))


CARDS = ("H200", "H100")


def card(gpu: str | None) -> str | None:
    """Return the entry of `CARDS` for a GPU's name; None for others, such as a GH200 or a MIG slice."""
    words = (gpu or "").split()
    return next((name for name in CARDS if name in words and "MIG" not in words), None)


@dataclass(frozen=True)
class Budget:
    """
    Args:
        where: "gpu", or "cpu" for a machine without a GPU.
        scale: measured values are in SI units and shown times this.
        cores: of the CPU that the limits are for, if they depend on it.
        h100: limit and aim for an H100, if they differ from an H200's.
    """

    key: str
    what: str
    where: str
    must: float
    aim: float
    unit: str
    scale: float = 1.0
    at_most: bool = True
    digits: int = 2
    cores: int | None = None
    h100: tuple[float, float] | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """The machines that the limits are for; each is judged by its own figures."""
        return CARDS if self.where == "gpu" else ("CPU" if self.cores is None else f"{self.cores} CPU cores",)

    def place(self, figure: Figure) -> str | None:
        """Return which of `places` the figure was measured on, or None."""
        if self.where == "gpu":
            return card(figure.gpu)
        return self.places[0] if figure.gpu is None and self.cores in (None, figure.cores) else None

    def bounds(self, place: str) -> tuple[float, float]:
        """Return limit and aim."""
        return self.h100 if place == "H100" and self.h100 else (self.must, self.aim)

    def met(self, value: float, place: str) -> str:
        must, aim = self.bounds(place)
        sign = 1 if self.at_most else -1
        return "aim met" if sign * value <= sign * aim else "met" if sign * value <= sign * must else "not met"

    def show(self, value: float) -> str:
        return f"{value * self.scale:.{self.digits}f}{self.unit}"

    def limits(self, place: str) -> str:
        must, aim = (f"{value * self.scale:g}{self.unit}" for value in self.bounds(place))
        return f"{'≤' if self.at_most else '≥'} {must}, aim {aim}"


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


def table(measured: Mapping[str, Sequence[Figure]]) -> list[str]:
    """Return Markdown: a row per budget and measured machine, and lists of what is not measured.

    A figure is judged by the limits of its machine. A figure of a machine without limits is shown and not judged.
    """
    out = ["| budget | on | limit | measured | | from | flags |", "|---|---|---|--:|---|---|---|"]
    missing, missing_on = [], dict[str, list[str]]()
    for budget in BUDGETS:
        by_place: dict[str | None, dict[str, list[Figure]]] = {}
        for figure in measured.get(budget.key, ()):
            if (budget.where == "gpu") == (figure.gpu is not None):
                machines = by_place.setdefault(budget.place(figure), {})
                machines.setdefault(figure.machine, []).append(figure)
        if not by_place.keys() & set(budget.places):
            missing.append(f"{budget.what} ({budget.limits(budget.places[0])})")
        for place in budget.places:
            if place not in by_place:
                missing_on.setdefault(place, []).append(budget.key)
                continue
            figure = best([figure for found in by_place[place].values() for figure in found])
            out.append(_row(budget, figure, budget.limits(place), budget.met(figure.value, place)))
        out += [_row(budget, best(found), "", "not judged") for _, found in sorted(by_place.get(None, {}).items())]
    if missing:
        out += ["", f"Not measured: {'; '.join(missing)}."]
    for place, keys in missing_on.items():
        out += ["", f"Not measured on {place}: {', '.join(keys)}."]
    return out


def _row(budget: Budget, figure: Figure, limit: str, verdict: str) -> str:
    source = f"{figure.source}, {figure.commit}" + (f", {figure.rounds:,} rounds" if figure.rounds else "")
    return (
        f"| {budget.what} | {figure.machine} | {limit} | {budget.show(figure.value)} | {verdict} | {source} "
        f"| {'; '.join(figure.flags)} |"
    )


def unverified(measured: Mapping[str, Sequence[Figure]]) -> list[str]:
    """Return Markdown rows of figures whose results were not found to be correct, with the reason."""
    rows = [
        f"| {budget.what} | {figure.machine} | {budget.show(figure.value)} | {figure.source}, {figure.commit} "
        f"| {'; '.join(figure.flags)} |"
        for budget in BUDGETS
        for figure in measured.get(budget.key, ())
    ]
    return (
        ["| unverified, not judged | on | time or rate | from | why |", "|---|---|--:|---|---|", *rows] if rows else []
    )
