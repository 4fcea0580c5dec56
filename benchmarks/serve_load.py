"""Open-loop load on `ragturbo serve`, and the server's overhead over `generate()`.

    python benchmarks/serve_load.py --seconds 60 --out benchmarks/results/shapes/cpu-2core/serve.json
    python benchmarks/serve_load.py --page docs/serving.md --out benchmarks/results/shapes/cpu-2core/serve.json

The first writes a JSON record. The second writes the record's table into the page and measures nothing.

The server runs in a process of its own. Arrivals are Poisson at shares of the capacity, whether or not earlier requests
have been answered, and latencies count from the intended arrival. Memory and open files are the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ragturbo.bench.prompts import prompts
from ragturbo.bench.timing import percentiles
from ragturbo.machine import describe, now

PATH = "/v1/images/generations"
SHARES = (0.1, 0.5, 0.9, 3.0)
# Refusals have to answer within this.
SLOW = 0.02
WORDS = prompts(256)


@dataclass
class Load:
    share: float
    rate: float
    seconds: float = 0.0
    accepted: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    other: dict[str, int] = field(default_factory=dict)
    # Delays of the load generator itself, which shares the machine with the server.
    late_start: list[float] = field(default_factory=list)
    # Refusals that took longer than SLOW from the intended arrival.
    slow: list[dict[str, float]] = field(default_factory=list)
    # `stolen()` at the start, after every second, and at the end.
    stolen: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def refused(self, took: float, late: float, offset: float) -> None:
        """took: seconds from the intended arrival at `offset`. late: delay of sending."""
        self.rejected.append(took)
        if took > SLOW:
            self.slow.append(
                {"offset_s": offset, "late_s": late, "from_sending_s": took - late, "answered_s": offset + took}
            )

    def slow_refusals(self) -> dict[str, Any]:
        rows = []
        for row in self.slow:
            # Steal time between its arrival and its answer.
            first, last = (min(int(row[name]), len(self.stolen) - 2) for name in ("offset_s", "answered_s"))
            rows.append(row | {"steal_s": self.stolen[last + 1] - self.stolen[first]})
        stolen = [row for row in rows if row["steal_s"] > 0]
        return {
            "from_intended": len(rows),
            "from_sending": sum(row["from_sending_s"] > SLOW for row in rows),
            "with_steal": len(stolen),
            "from_sending_without_steal": sum(row["from_sending_s"] > SLOW and row["steal_s"] == 0 for row in rows),
            "each": rows,
        }

    def summary(self, capacity: float, deadline: float) -> dict[str, Any]:
        return {
            "share": self.share,
            "rate": self.rate,
            "seconds": self.seconds,
            "requests": len(self.accepted) + len(self.rejected) + sum(self.other.values()),
            "accepted": len(self.accepted),
            "rejected": len(self.rejected),
            "other": self.other,
            "goodput_images_per_s": len(self.accepted) / self.seconds,
            "goodput_of_capacity": len(self.accepted) / self.seconds / capacity,
            "accepted_seconds": percentiles(self.accepted) if self.accepted else None,
            "accepted_max_s": max(self.accepted, default=None),
            "accepted_after_deadline": sum(s > deadline for s in self.accepted),
            "rejected_seconds": percentiles(self.rejected) if self.rejected else None,
            "rejected_max_s": max(self.rejected, default=None),
            "rejected_over_20_ms": self.slow_refusals(),
            "steal_seconds": self.stolen[-1] - self.stolen[0],
            "seconds_with_steal": sum(b > a for a, b in zip(self.stolen[:-1], self.stolen[1:], strict=True)),
            "late_start_seconds": percentiles(self.late_start),
            "memory_bytes": [self.memory[0], max(self.memory), self.memory[-1]],
            "open_files": [self.files[0], max(self.files), self.files[-1]],
        }


class Client:
    """Keep-alive connections to one server, with a minimal HTTP client to keep its overhead low."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, i: int, mode: str | None) -> tuple[int, float]:
        """Return the status and the time of sending."""
        body = json.dumps({"prompt": WORDS[i % len(WORDS)], "seed": i} | ({"mode": mode} if mode else {})).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connection = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = connection
        sent = time.perf_counter()
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer, re.I)
        assert length is not None, answer
        await reader.readexactly(int(length[1]))
        self._idle.append(connection)
        return int(answer[9:12]), sent

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


class Server:
    def __init__(self, arguments: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-c", "from ragturbo.cli import main; main()", "serve", "--port", str(self.port)]
        self._log = log.open("wb")
        begin = time.monotonic()
        self.process = subprocess.Popen([*command, *arguments], stderr=self._log)
        while not self._ready():
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended: {log.read_text()}")
            time.sleep(0.05)
        self.cold_start = time.monotonic() - begin

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    @property
    def memory(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(60)
        self._log.close()
        return code


async def capacity(server: Server, mode: str | None, clients: int, seconds: float) -> float:
    """Return images per second with `clients` clients that have one request in flight each."""
    client, done = Client(server.port), 0
    until = time.perf_counter() + seconds

    async def caller(first: int) -> None:
        nonlocal done
        i = first
        while time.perf_counter() < until:
            assert (await client.post(i, mode))[0] == 200
            done, i = done + 1, i + clients

    begin = time.perf_counter()
    await asyncio.gather(*(caller(i) for i in range(clients)))
    client.close()
    return done / (time.perf_counter() - begin)


async def open_loop(server: Server, mode: str | None, share: float, rate: float, seconds: float, seed: int) -> Load:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, size=max(1, round(rate * seconds))))
    load, client = Load(share, rate), Client(server.port)
    begin = time.perf_counter()

    async def one(i: int, intended: float) -> None:
        try:
            status, sent = await client.post(i, mode)
        except (OSError, EOFError) as error:
            name = type(error).__name__
            load.other[name] = load.other.get(name, 0) + 1
            return
        took = time.perf_counter() - intended
        if status == 200:
            load.accepted.append(took)
        elif status == 429:
            load.refused(took, sent - intended, intended - begin)
        else:
            load.other[str(status)] = load.other.get(str(status), 0) + 1

    async def watch() -> None:
        while True:
            load.memory.append(server.memory)
            load.files.append(server.files)
            load.stolen.append(stolen())
            await asyncio.sleep(max(0.0, begin + len(load.stolen) - time.perf_counter()))

    watching = asyncio.ensure_future(watch())
    running = set()
    for i, offset in enumerate(arrivals):
        intended = begin + float(offset)
        if (wait := intended - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        load.late_start.append(time.perf_counter() - intended)
        task = asyncio.ensure_future(one(i, intended))
        running.add(task)
        task.add_done_callback(running.discard)
    # Goodput counts until the last accepted request is answered.
    await asyncio.gather(*running)
    load.seconds = time.perf_counter() - begin
    watching.cancel()
    load.stolen.append(stolen())
    client.close()
    # After the client has closed the connections of the burst.
    await asyncio.sleep(1)
    load.memory.append(server.memory)
    load.files.append(server.files)
    return load


def stolen() -> float:
    """Return the steal time of this machine's cores in seconds since boot."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def overhead(port: int, mode: str | None, pairs: int) -> dict[str, Any]:
    """Time the same prompts and seeds alternately by `gen(...)` and through the idle server."""
    return asyncio.run(by_turns(port, mode, pairs))


async def by_turns(port: int, mode: str | None, pairs: int) -> dict[str, Any]:
    import ragturbo

    client = Client(port)
    plain, served = [], []
    with ragturbo.Generator.from_pretrained("shapes", log_prompts=False) as gen:
        gen.warmup()
        for i in range(pairs + 5):
            begin = time.perf_counter()
            gen(WORDS[i % len(WORDS)], seed=i, mode=mode, output_type="png")
            between = time.perf_counter()
            assert (await client.post(i, mode))[0] == 200
            end = time.perf_counter()
            # Warm-up.
            if i >= 5:
                plain.append(between - begin)
                served.append(end - between)
    client.close()
    difference = statistics.median(s - p for s, p in zip(served, plain, strict=True))
    return {
        "pairs": pairs,
        "generate_seconds": percentiles(plain),
        "served_seconds": percentiles(served),
        "median_of_differences_s": difference,
        "difference_of_medians_s": statistics.median(served) - statistics.median(plain),
    }


async def loads(
    server: Server, args: argparse.Namespace, full: float, shares: list[float], deadline: float
) -> list[Any]:
    # No garbage collection in the load generator.
    gc.collect()
    gc.freeze()
    gc.disable()
    found = []
    for share in shares:
        load = await open_loop(server, args.mode, share, share * full, args.seconds, args.seed)
        found.append(load.summary(full, deadline) | {"deadline_s": deadline})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    gc.enable()
    return found


def flags(args: argparse.Namespace, deadline: float) -> list[str]:
    return ["--timeout", str(deadline), "--max-queue", str(args.max_queue)]


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    server = Server(flags(args, args.timeout), args.log)
    try:
        record: dict[str, Any] = {"kind": "serve", "context": {**describe(), "when": now()}, "model": "shapes"}
        record |= {"mode": args.mode or "the model's own", "server": flags(args, args.timeout)}
        record |= {"cold_start_s": server.cold_start}
        if args.pairs:
            # In a process of its own, so that the model does not slow down the load generator.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
                record["overhead"] = child.submit(overhead, server.port, args.mode, args.pairs).result()
            print(json.dumps(record["overhead"]), file=sys.stderr, flush=True)
        await capacity(server, args.mode, args.clients, args.warm)
        full = await capacity(server, args.mode, args.clients, args.capacity_seconds)
        record |= {"capacity_images_per_s": full, "capacity_clients": args.clients, "deadline_s": args.timeout}
        print(f"capacity {full:.1f} images/s", file=sys.stderr, flush=True)
        record["loads"] = await loads(server, args, full, args.shares, args.timeout)
        record["metrics"] = counted(server)
    finally:
        record["exit_code_after_sigterm"] = server.stop()
    if args.short_timeout:
        # A deadline shorter than the queue refuses requests.
        server = Server(flags(args, args.short_timeout), args.log.with_suffix(".short.log"))
        try:
            await capacity(server, args.mode, args.clients, args.warm)
            record["loads"] += await loads(server, args, full, [max(args.shares)], args.short_timeout)
            record["metrics_short"] = counted(server)
        finally:
            server.stop()
    return record


def counted(server: Server) -> dict[str, float]:
    kept = ("ragturbo_executor", "ragturbo_rejections", "ragturbo_batches", "ragturbo_in_flight", "ragturbo_queue")
    return {name: value for name, value in server.metrics().items() if name.startswith(kept)}


def table(record: dict[str, Any], source: Path) -> str:
    """Return the record as Markdown."""

    def spread(found: dict[str, float] | None) -> str:
        return "–" if found is None else " / ".join(f"{1e3 * found[name]:.1f}" for name in ("p50", "p99", "max"))

    facts, lines = record["context"], []
    # Older records have it outside of the context.
    asked = facts["environment"] if "environment" in facts else record["environment"]
    threads = asked.get("OMP_NUM_THREADS", "its own number of")
    commit = facts["commit"][:9] + (" and changes" if facts["dirty"] else "")
    lines += [
        f"{facts['cpu']}, {facts['cores']} cores, shared with the generator of load; embedded model, mode "
        f"{record['mode']}, torch on {threads} thread(s); commit {commit}; {source.name}:",
        f"capacity {record['capacity_images_per_s']:.1f} images/s ({record['capacity_clients']} clients, each with one",
        f"request in flight), ready {record['cold_start_s']:.1f} s after start. Over 20 ms: from the intended arrival,",
        "of them from the actual sending, of these in seconds in which no other machine had taken these cores.",
        "",
        "| load | deadline, s | requests | accepted | goodput of capacity | p50 / p99 / max, ms | past the deadline | "
        "refused | refusal p50 / p99 / max, ms | over 20 ms: intended, sent, without steal | "
        "the generator itself late, p50 / p99 / max, ms | "
        "memory, MiB: start / most / end | open files |",
        "|--:|" + "--:|" * 12,
    ]
    for load in record["loads"]:
        over = load["rejected_over_20_ms"]
        cells = [
            f"{100 * load['share']:.0f} %",
            f"{load['deadline_s']:g}",
            load["requests"],
            load["accepted"],
            f"{100 * load['goodput_of_capacity']:.0f} %",
            spread(load["accepted_seconds"]),
            load["accepted_after_deadline"] + sum(load["other"].values()),
            load["rejected"],
            spread(load["rejected_seconds"]),
            " / ".join(str(over[name]) for name in ("from_intended", "from_sending", "from_sending_without_steal")),
            spread(load["late_start_seconds"]),
            " / ".join(f"{n / 2**20:.0f}" for n in load["memory_bytes"]),
            " / ".join(map(str, load["open_files"])),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if cost := record.get("overhead"):
        served, called = (1e3 * cost[name]["p50"] for name in ("served_seconds", "generate_seconds"))
        lines += [
            "",
            f"One request at a time, by turns with `generate()` in another process ({cost['pairs']} pairs): median "
            f"{served:.1f} ms served,",
            f"{called:.1f} ms called, PNG included; the median difference is "
            f"{1e3 * cost['median_of_differences_s']:.2f} ms.",
        ]
    return "\n".join(lines)


def fill(page: Path, text: str) -> None:
    """Write the text between the page's marks."""
    begin, end = "<!-- measured -->", "<!-- /measured -->"
    before, mark, rest = page.read_text("utf-8").partition(begin)
    _, closing, after = rest.partition(end)
    if not mark or not closing:
        raise SystemExit(f"{page} has no {begin} … {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the record here instead of to stdout")
    parser.add_argument("--log", type=Path, default=Path("build/serve.log"), help="the server's stderr")
    parser.add_argument("--seconds", type=float, default=60, help="duration of each load")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="loads, as shares of the capacity")
    parser.add_argument("--mode", help="adapter, slerp, lerp or none; by default the model's")
    parser.add_argument("--timeout", type=float, default=5.0, help="the server's deadline, seconds")
    parser.add_argument(
        "--short-timeout", type=float, default=0.6, help="deadline of another run of the largest load; 0 for none"
    )
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--clients", type=int, default=16, help="clients of the capacity's closed loop")
    parser.add_argument("--warm", type=float, default=3, help="seconds of warm-up")
    parser.add_argument("--capacity-seconds", type=float, default=15)
    parser.add_argument("--pairs", type=int, default=150, help="pairs of the overhead; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="write the record's table into this page and measure nothing")
    args = parser.parse_args()
    if args.page is not None:
        if args.out is None:
            parser.error("--page needs --out, the record")
        fill(args.page, table(json.loads(args.out.read_text("utf-8")), args.out))
        return
    args.log.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asyncio.run(measure(args)), indent=1) + "\n"
    if args.out is None:
        print(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
