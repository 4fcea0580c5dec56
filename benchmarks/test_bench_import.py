"""Start-up: `import ragturbo` over an empty package, torch's own import, and a fresh process to its first image."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.startup import empty_package_time, first_image, import_time
from benchmarks.timing import summary
from ragturbo.bench.timing import percentiles


def record(benchmark: Any, seconds: list[float], **extra: Any) -> None:
    benchmark.extra_info.update({**summary(seconds), "sizes": {}, "dtype": None, **extra})


@pytest.mark.quick
def test_import_over_an_empty_package(benchmark):
    """Interleaved, so that other load affects both alike."""
    empty: list[float] = []
    ours: list[float] = []

    def pair() -> None:
        empty.append(empty_package_time())
        ours.append(import_time("ragturbo"))

    benchmark.group = "start"
    benchmark.pedantic(pair, rounds=10, warmup_rounds=1)
    added = percentiles(ours)["p50"] - percentiles(empty)["p50"]
    record(benchmark, ours, op="import", device="cpu", added_s=added, empty_s=percentiles(empty)["p50"],
           measured={"import_added_s": added})  # fmt: skip


def test_import_of_torch(benchmark):
    """What every first image includes."""
    seconds: list[float] = []
    benchmark.group = "start"
    benchmark.pedantic(lambda: seconds.append(import_time("torch")), rounds=5, warmup_rounds=1)
    record(benchmark, seconds, op="import_torch", device="cpu")


def test_first_image(benchmark, bundle, device, tmp_path_factory):
    """Import, load and first image, with a warm disk cache."""
    folder = bundle.save(tmp_path_factory.mktemp("cold") / "model")
    _measure(benchmark, "first_image", device, {"model": bundle.name, "pixels": bundle.default_size}, str(folder))


@pytest.mark.parametrize("database", ["own", "none"])
def test_first_image_of_the_embedded_model(benchmark, database):
    """The model that `ragturbo.generate` has by default, on the CPU; its adapter is used with its database only."""
    options = {} if database == "own" else {"database": False}
    _measure(benchmark, "first_image_embedded", "cpu", {"model": "shapes", "database": database}, "shapes", **options)


def _measure(benchmark: Any, op: str, device: str, sizes: dict[str, Any], model: str, **options: Any) -> None:
    parts = [first_image(model, device, **options)]
    benchmark.group = "start"
    # One more round on a slow machine.
    rounds = 4 if parts[0]["total_s"] < 10 else 1
    benchmark.pedantic(lambda: parts.append(first_image(model, device, **options)), rounds=rounds)
    middle = sorted(parts, key=lambda p: p["total_s"])[len(parts) // 2]
    record(benchmark, [p["total_s"] for p in parts], op=op, device=device, sizes=sizes, parts=middle)
