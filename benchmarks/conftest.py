"""Fixtures of the benchmarks: verify before timing, percentiles, and the machine's description in each record.

A benchmark takes the fixture `measure`:

    def test_slerp(measure, device):
        measure(slerp, inputs=[(h, r, w), ...], verify=lambda: assert_close(...), cost=..., dtype="float16")

`device` is "cpu" or "cuda"; rows marked `gpu` are skipped without a GPU. Rows of torch.compile are marked `compiled`,
because compiling may take minutes.

With --benchmark-json=F every row and failure is also written to the file Fl (or $RAGTURBO_ROWS) when it finishes: see
`benchmarks.suite_rows`. RAGTURBO_INSTANT=1 prints failures at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ceilings import ceilings
from benchmarks.roofline import Work
from benchmarks.suite_rows import append
from benchmarks.timing import CAPTURE_BELOW, in_bulk, once, rotating, summary, synchronized
from ragturbo.machine import describe, gpu_state, no_gpu_reason, now

MAX_ROUNDS = 1000
_STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", choices=["default", "paper"], default="default", help="paper: search 630,000 keys")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: one row of each kind; `-m quick` takes under a minute")
    config.addinivalue_line("markers", "compiled: a row of torch.compile, which may compile for minutes")


def pytest_sessionstart(session: pytest.Session) -> None:
    if count := os.environ.get("RAGTURBO_BENCH_THREADS"):
        torch.set_num_threads(int(count))
    # Cached, so that commit and threads are those at the start of the run.
    describe()
    if (path := rows_path(session.config)) is not None:
        if "RAGTURBO_ROWS" not in os.environ:
            path.unlink(missing_ok=True)
        append(path, machine_info={"ragturbo": describe()}, datetime=now())


def rows_path(config: pytest.Config) -> Path | None:
    """Return the file for finished rows, or None."""
    if named := os.environ.get("RAGTURBO_ROWS"):
        return Path(named)
    # A path, or the open file in older versions of pytest-benchmark.
    out = config.getoption("benchmark_json")
    return Path(f"{getattr(out, 'name', out) if hasattr(out, 'write') else out}l") if out else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    path = rows_path(item.config)
    if report.failed:
        text = "\n".join(report.longreprtext.splitlines()[-60:])
        if path is not None:
            append(path, failed={report.nodeid: text})
        if os.environ.get("RAGTURBO_INSTANT") == "1":
            print(f"\nFAILED {report.nodeid} ({report.when})\n{text}", flush=True)
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                # After an illegal access every later row would fail.
                item.session.shouldstop = f"the CUDA context was lost in {report.nodeid}: {error}"
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if path is not None and call.when == "call" and report.passed and getattr(benchmark, "stats", None) is not None:
        entry = benchmark.stats.as_dict(include_data=False)
        told = entry["extra_info"]
        known = {told["device"]: ceilings(told["device"])} if "floor_s" in told else {}
        append(path, benchmark=entry, ceilings=known, wall_s=round(time.monotonic() - _STARTED, 1))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = no_gpu_reason()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # The node's name is private.
    machine_info.pop("node", None)
    machine_info["ragturbo"] = describe()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    told = [entry["extra_info"] for entry in output_json["benchmarks"]]
    devices = {"cpu" if no_gpu_reason() else "cuda", *(info["device"] for info in told if "floor_s" in info)}
    output_json["ceilings"] = {device: ceilings(device) for device in sorted(devices)}
    output_json["wall_s"] = round(time.monotonic() - _STARTED, 1)
    if not config.getoption("benchmark_save_data"):
        # Percentiles are in extra_info.
        for entry in output_json["benchmarks"]:
            entry["stats"].pop("data", None)


def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    here, there = _gpu_name(machine_info), _gpu_name(compared_benchmark.get("machine_info", {}))
    if here != there:
        benchmarksession.logger.warning(
            f"the compared run was made on {there}, this one on {here}: their times cannot be compared"
        )


def _gpu_name(machine_info: dict[str, Any]) -> str:
    found = machine_info.get("ragturbo", {})
    return found["gpu"]["name"] if found.get("gpu") else f"no GPU ({found.get('cpu', 'unknown CPU')})"


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if no_gpu_reason() else "cuda"


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, device: str) -> Callable[..., None]:
    """Verify and time a call: see `Measure.__call__`."""
    return Measure(benchmark, request, device)


class Measure:
    def __init__(self, benchmark: Any, request: pytest.FixtureRequest, device: str) -> None:
        self._benchmark, self._request, self._device = benchmark, request, device
        self._seconds = row_seconds(request.config)

    def __call__(
        self,
        call: Callable[..., Any],
        *,
        inputs: Sequence[tuple[Any, ...]] = ((),),
        verify: Callable[[], object] | None = None,
        exact: Callable[[], torch.Tensor] | None = None,
        within: float = 8,
        cost: Any = None,
        dtype: str | torch.dtype | None = None,
        sizes: dict[str, Any] | None = None,
        group: str | None = None,
        device: str | None = None,
        capture: bool = True,
        rounds: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Time `call(*inputs[i])`, rotating over `inputs`.

        Args:
            verify: raises if the result is wrong; then nothing is timed.
            exact: returns the fp64 result of the first input, which is verified.
            within: allowed relative error to `exact` in units of the dtype's epsilon.
            cost: bytes and FLOPs of one call, as `benchmarks.roofline` counts them.
            device: "cpu" for host work on a machine with a GPU.
            capture: capture GPU work of a few milliseconds and replay it in bulk. False for calls that wait for the
                device themselves.
            rounds: number of rounds, by default from the time limit.
            extra: more entries for extra_info.
        """
        if verify is not None:
            verify()
        if exact is not None:
            out, wanted = call(*inputs[0]), exact()
            error = (out.double() - wanted).norm() / wanted.norm()
            assert error < within * torch.finfo(out.dtype).eps, error
        cuda = (device or self._device) == "cuda"
        run = rotating(call, inputs)
        run = synchronized(run) if cuda else run
        if cuda:
            # The first call loads code and creates handles.
            run()
        each = once(run)
        slow = each > 0.5
        if not slow:
            each = min(once(run) for _ in range(3))
        calls = 1
        in_graph = cuda and capture and each < CAPTURE_BELOW
        if in_graph:
            run, calls = in_bulk(call, inputs)
            each = once(run)
        least = 3 if slow else 5
        count = rounds or max(least, min(MAX_ROUNDS, int(self._seconds / max(each, 1e-9))))
        # Loop over host calls that are short compared to the clock's overhead.
        loops = 1 if cuda else max(1, min(10_000, int(20e-6 / max(each, 1e-9))))
        if loops > 1:
            count = max(5, min(MAX_ROUNDS, int(self._seconds / (each * loops))))
        states: list[Any] = []
        seen = 0

        def look() -> None:
            nonlocal seen
            # Between rounds, while the GPU is busy and may be throttled.
            if cuda and seen in (0, count // 2, count - 1):
                states.append(gpu_state())
            seen += 1

        bench = self._benchmark
        if group is not None:
            bench.group = group
        if loops > 1:
            bench.pedantic(run, rounds=count, iterations=loops, warmup_rounds=1)
        else:
            bench.pedantic(run, setup=look, rounds=count, warmup_rounds=0 if slow else 1)
        info = {
            "op": request_op(self._request),
            "device": "cuda" if cuda else "cpu",
            "torch_threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch.") if dtype is not None else None,
            "sizes": sizes or {},
            **_cost(cost),
            **(extra or {}),
        }
        if bench.stats is not None:
            data = bench.stats.stats.data
            # One replay holds many calls.
            data[:] = [seconds / calls for seconds in data]
            info |= summary(data, states) | {"calls_a_round": calls * loops}
            if cuda:
                info |= {"captured": in_graph, "gpu_states": states}
            if cost is not None and (floor := floor_seconds(info, ceilings(info["device"]))) is not None:
                info |= {"floor_s": floor, "fraction_of_roofline": floor / info["seconds"]["p50"]}
        bench.extra_info.update(info)


def row_seconds(config: pytest.Config) -> float:
    """Return --benchmark-max-time if given, else half a second, with which all rows take ten minutes on two cores."""
    given = any(str(argument).startswith("--benchmark-max-time") for argument in config.invocation_params.args)
    return float(config.getoption("benchmark_max_time")) if given else 0.5


def request_op(request: pytest.FixtureRequest) -> str:
    """Return the op: test_bench_slerp.py measures slerp."""
    return request.node.path.stem.removeprefix("test_bench_")


def _cost(cost: Any) -> dict[str, Any]:
    """cost: a `roofline.Work`, or bytes and flops by name."""
    if cost is None:
        return {}
    if isinstance(cost, Work):
        return {"bytes": cost.memory_bytes, "link_bytes": cost.link_bytes, "flops": cost.flops}
    return {"bytes": cost["bytes"], "flops": cost["flops"]}


def floor_seconds(info: dict[str, Any], best: dict[str, Any]) -> float | None:
    """Return the largest of bytes over bandwidth, bytes over the host link and FLOPs over the dtype's rate."""
    rates = best["flops_per_s"]
    # fp16 has no rate of its own on a CPU.
    rate = rates.get(info["dtype"] or "float32", rates["float32"] if info["device"] == "cpu" else None)
    if rate is None:
        return None
    link = info.get("link_bytes", 0) / (best.get("link_bytes_per_s") or best["bytes_per_s"])
    return max(info["bytes"] / best["bytes_per_s"], link, info["flops"] / rate)


@pytest.fixture(scope="session")
def bundle(device: str) -> Any:
    """The model of end-to-end rows: SD 2.1's size on a GPU, the embedded model on a CPU."""
    from ragturbo.bench.models import make_bundle
    from ragturbo.errors import RagTurboError
    from ragturbo.model.bundle import Bundle

    if device == "cuda":
        return make_bundle("sd21", "cuda", torch.float16)
    try:
        return Bundle.load("shapes", device="cpu")
    except RagTurboError:
        # The embedded model is missing. The record has the model's name.
        return make_bundle("rehearsal", "cpu", torch.float32)


@pytest.fixture(scope="session")
def sd21(device: str, request: pytest.FixtureRequest) -> Any:
    """SD 2.1's configuration with random weights: fp16 on a GPU, where it is `bundle`, fp32 on a CPU."""
    from ragturbo.bench.models import make_bundle

    return request.getfixturevalue("bundle") if device == "cuda" else make_bundle("sd21", device, torch.float32)


@pytest.fixture(scope="session")
def database(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundle's own database, or 4,096 random pairs of its geometry."""
    from ragturbo.bench.models import make_database
    from ragturbo.retrieval import Database

    if bundle.database_path is not None:
        return Database.open(bundle.database_path)
    return make_database(bundle, tmp_path_factory.mktemp("database") / "db", 4096)


@pytest.fixture(scope="session")
def make_generator(bundle: Any, database: Any) -> Iterator[Callable[..., Any]]:
    """`make_generator(engine="reference", …)`: Generators over one bundle and database, one per set of options."""
    from ragturbo import Generator
    from ragturbo.config import GeneratorConfig

    made: dict[str, Any] = {}

    def make(**options: Any) -> Any:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = Generator(bundle, database=database, config=GeneratorConfig(**options))
            made[key].warmup()
        return made[key]

    yield make
    for generator in made.values():
        generator.close()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Record torch's number of threads, and fail a benchmark that changes it."""
    before = torch.get_num_threads()
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info["torch_threads"] = before
    yield
    if (left := torch.get_num_threads()) != before:
        torch.set_num_threads(before)
        pytest.fail(f"the number of torch threads was {before} before this benchmark and {left} after it")
