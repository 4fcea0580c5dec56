"""`python -m benchmarks.word_search`: search by keys and words (retriever="hybrid") on a CPU, and what an append costs.

Captions are pairs of prompts of ragturbo.bench; one in a hundred names what no other does. Keys are random, so that
only the words can find a name.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import once, rotating, sample, summary
from ragturbo.bench.models import clustered_keys
from ragturbo.bench.prompts import prompts
from ragturbo.machine import describe, now
from ragturbo.retrieval import Database, Geometry, Record

WIDTH = 1024
SIZES = (4_000, 20_000)
NAMED = 100


def names(count: int, seed: int = 0) -> list[str]:
    """Return distinct made-up words."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[
            "".join(rng.choice(part) for part in ("bdfgkmnprtvz", "aeiou", "bdgklmnprtvz", "aeiou", "bdgkmnprtz"))
        ] = None
    return list(found)


def batch(captions: list[str], keys: np.ndarray) -> tuple[list[Record], np.ndarray, np.ndarray]:
    records = [Record(0, caption) for caption in captions]
    return records, keys, np.zeros((len(captions), 1, 8), np.float32)


def measure(size: int, appends: int = 5) -> dict[str, Any]:
    """Return the seconds of a database of `size` captions."""
    rng = np.random.default_rng(0)
    called = names(size // NAMED)
    every = prompts(1152)
    plain = [f"{every[i % 1152]}, with {every[(7 * i + i // 1152) % 1152]}" for i in range(size - len(called))]
    captions = [*plain, *(f"a {name}" for name in called)]
    geometry = Geometry(1, 1, 8, "float16", WIDTH)
    queries = [f"two {name}s beside {text}" for name, text in zip(called, plain, strict=False)]
    keys = clustered_keys(size, WIDTH, rng)
    asked = clustered_keys(len(queries), WIDTH, np.random.default_rng(1)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "db"
        Database.write(path, [batch(captions, keys)], geometry=geometry)
        database = Database.open(path)
        inputs = [(asked[i : i + 1], [query]) for i, query in enumerate(queries)]

        def hybrid(key: np.ndarray, texts: list[str]) -> np.ndarray:
            return database.search(key, 4, texts=texts, retriever="hybrid")[0]

        first = once(lambda: hybrid(*inputs[0]))
        times = {
            "hybrid": sample(rotating(hybrid, inputs)),
            "exact": sample(rotating(lambda key, texts: database.search(key, 4, retriever="exact"), inputs)),
            "bm25": sample(rotating(lambda key, texts: database.search(texts, 4, retriever="bm25"), inputs)),
        }
        found = [int(hybrid(*one)[0, 0]) == len(plain) + i for i, one in enumerate(inputs)]
        after = []
        for i, name in enumerate(names(appends, seed=1)):
            Database.write(path, [batch([f"a {name}x"], asked[i : i + 1])], geometry=geometry)
            database.refresh()
            key = asked[i + 1 : i + 2]
            ids: list[np.ndarray] = []
            after.append(once(lambda key=key, name=name, ids=ids: ids.append(hybrid(key, [f"two {name}xes"]))))
            assert int(ids[0][0, 0]) == size + i, "the appended pair was not found"
    return {
        "captions": size,
        "first_search_s": first,
        "search_after_append_s": statistics.median(after),
        "names_found_first": statistics.mean(found),
        **{name: summary(seconds) for name, seconds in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.word_search", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-2core/word_search.json"))
    options = parser.parse_args()
    rows = [measure(size) for size in SIZES]
    record = {"kind": "word_search", "datetime": now(), "context": describe(), "width": WIDTH, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for row in rows:
        p50 = {name: f"{1e3 * row[name]['seconds']['p50']:.2f} ms" for name in ("hybrid", "exact", "bm25")}
        print(f"{row['captions']} captions: first {1e3 * row['first_search_s']:.0f} ms, p50 {p50}, after an append "
              f"{1e3 * row['search_after_append_s']:.2f} ms, names first {row['names_found_first']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
