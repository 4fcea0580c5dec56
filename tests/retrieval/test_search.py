"""Search by every retriever: correct and complete results, and -1 and NaN for missing neighbours."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragturbo import Database
from ragturbo.errors import DatabaseCorrupt, DatabaseError, InvalidRequest
from ragturbo.retrieval import Geometry, Record, Retriever, ScannConfig
from ragturbo.retrieval.scann import ScannRetriever

GEOMETRY = Geometry(1, 1, 8, "float16", 32)
N = 3000


def clustered(n: int, seed: int, dim: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n // 20 + 1, dim))
    return (centres[rng.integers(0, len(centres), n)] + 0.5 * rng.standard_normal((n, dim))).astype(np.float32)


def near(n: int, seed: int) -> np.ndarray:
    """Queries from where the stored keys are."""
    rng = np.random.default_rng(seed)
    return clustered(N, 0)[rng.integers(0, N, n)] + 0.3 * rng.standard_normal((n, 32)).astype(np.float32)


def batch(keys: np.ndarray, captions: list[str] | None = None) -> tuple:
    records = [
        Record(0, captions[i] if captions else f"caption {i}", f"site-{i % 5}", extra={"year": 2000 + i % 3})
        for i in range(len(keys))
    ]
    features = np.arange(len(keys) * 8, dtype=np.float32).reshape(-1, 1, 8) % 1000
    return records, keys, features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "db"
    database = Database.write(folder, [batch(clustered(N, 0))], geometry=GEOMETRY, segment_records=1000)
    database.reindex(ScannConfig(leaves=40, leaves_to_search=10, reorder=60, training_sample=N))
    return folder


@pytest.fixture(scope="module")
def database(folder) -> Database:
    return Database.open(folder)


def oracle(database: Database, queries: np.ndarray, k: int, without=()) -> tuple[np.ndarray, np.ndarray]:
    """Cosines with the stored keys in float64, sorted."""
    ids = np.array([id for id in database.ids if id not in set(without)])
    stored = database.keys(ids).numpy().astype(np.float64)
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    scores = unit.astype(np.float64) @ stored.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids[order], np.take_along_axis(scores, order, 1)


@pytest.mark.parametrize("k", [1, 7, 3000, 3005])
def test_exact_search_is_the_sorted_cosine(k, database):
    queries = clustered(6, 5)
    ids, scores = database.search(queries, k, retriever="exact")
    _, expected = oracle(database, queries, min(k, N))
    assert ids.shape == scores.shape == (6, k) and ids.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_allclose(scores[:, : min(k, N)], expected, atol=2e-6)
    cosines = np.einsum("bd,bkd->bk", queries / np.linalg.norm(queries, axis=1, keepdims=True),
                        database.keys(ids[:, : min(k, N)]).numpy())  # fmt: skip
    np.testing.assert_allclose(cosines, expected, atol=2e-6)
    assert (ids[:, N:] == -1).all() and np.isnan(scores[:, N:]).all()


@pytest.mark.parametrize("k", [1, 7, 3005])
def test_blocks_give_what_one_pass_gives(k, database, monkeypatch):
    from ragturbo.retrieval import exact

    queries, hidden = clustered(6, 5), np.arange(0, 100, 7)
    whole = exact.ExactRetriever(database.snapshot).search(queries, k, exclude=hidden)
    monkeypatch.setattr(exact, "_BLOCK", 700 * queries.shape[1])
    ids, scores = exact.ExactRetriever(database.snapshot).search(queries, k, exclude=hidden)
    np.testing.assert_allclose(scores, whole[1], atol=1e-6)
    assert np.mean(ids == whole[0]) > 0.99 and not np.isin(ids, hidden).any()


@pytest.mark.parametrize("retriever", ["exact", "scann"])
def test_results_are_where_and_what_the_keys_were(retriever, database):
    queries = clustered(3, 6)
    found = {}
    for keys in (queries, torch.from_numpy(queries), torch.from_numpy(queries).half()):
        ids, scores = database.search(keys, 4, retriever=retriever)
        assert type(ids) is type(keys)
        found[str(getattr(keys, "dtype", ""))] = np.asarray(ids)
    assert np.array_equal(found["float32"], found["torch.float32"])


def recall(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), true.tolist(), strict=True)]))


def test_scann_finds_what_exact_search_finds(database):
    queries = near(200, 7)
    found, scores = database.search(queries, 10, retriever="scann")
    true, best = oracle(database, queries, 10)
    assert recall(found, true) >= 0.95
    assert (np.diff(scores, axis=1) <= 0).all()
    assert abs(scores[:, 0] - best[:, 0]).max() < 0.01
    for one in range(5):
        assert np.array_equal(database.search(queries[one : one + 1], 10, retriever="scann")[0][0], found[one])


@pytest.mark.parametrize("k", [1, 60, 61, 500, N, N + 3])
def test_scann_returns_k_neighbours_whatever_its_reorder_count(k, database):
    """ScaNN silently caps k; padding is index 0 with a NaN distance."""
    ids, scores = database.search(near(3, 8), k, retriever="scann")
    assert ids.shape == (3, k)
    for row, values in zip(ids, scores, strict=True):
        real = row[row >= 0]
        assert len(set(real.tolist())) == len(real) == min(k, N)
        assert np.isnan(values[row < 0]).all() and not np.isnan(values[row >= 0]).any()


@pytest.mark.parametrize("retriever", ["exact", "scann"])
@pytest.mark.parametrize("bad", ["nan", "inf", "zero", "narrow", "flat", "integer k", "no k"])
def test_a_query_without_neighbours_is_refused(bad, retriever, database):
    keys, k = clustered(2, 9), 3
    if bad == "nan":
        keys[1, 4] = np.nan
    elif bad == "inf":
        keys[1, 4] = np.inf
    elif bad == "zero":
        keys[1] = 0
    elif bad == "narrow":
        keys = keys[:, :31]
    elif bad == "flat":
        keys = keys[0]
    else:
        k = 2.5 if bad == "integer k" else 0
    with pytest.raises(InvalidRequest):
        database.search(keys, k, retriever=retriever)
    if keys.ndim == 2 and keys.shape[1] == 32 and k == 3:
        with pytest.raises(InvalidRequest):
            database.search(keys[1:], k, retriever=retriever)


@pytest.mark.parametrize("retriever", ["exact", "scann"])
def test_excluded_ids_are_never_returned_and_others_take_their_place(retriever, database):
    # ScaNN trains its index anew each time, and misses some of one query's ten now and then: recall is a mean of forty.
    queries = near(40, 10)
    first, _ = oracle(database, queries, 30)
    for exclude in (first[0], torch.from_numpy(first[0]), list(first[0]), set(first[0].tolist())):
        ids, _ = database.search(queries, 10, exclude=exclude, retriever=retriever)
        assert (ids >= 0).all() and not set(ids.ravel().tolist()) & set(first[0].tolist())
        assert recall(ids, oracle(database, queries, 10, first[0])[0]) >= 0.9
    per_row = first[:, :20].copy()
    per_row[::2] = -1
    ids, _ = database.search(queries, 10, exclude=per_row, retriever=retriever)
    assert not any(set(row) & set(banned) for row, banned in zip(ids.tolist(), per_row.tolist(), strict=True))
    assert recall(ids[::2], first[::2, :10]) >= 0.9
    with pytest.raises(InvalidRequest, match="exclude"):
        database.search(queries, 1, exclude=np.zeros((3, 2), np.int64), retriever=retriever)
    with pytest.raises(InvalidRequest, match="whole numbers"):
        database.search(queries, 1, exclude=[0.5], retriever=retriever)


def test_removed_and_new_pairs_are_seen_by_an_old_index(plain, tmp_path, folder):
    database = Database.open(shutil.copytree(folder, tmp_path / "db"))
    queries = near(20, 11)
    gone = np.unique(oracle(database, queries, 8)[0])
    database.remove(gone)
    new = clustered(50, 12)
    new[:20] = queries
    plain.append_encoded(database, [batch(new)])
    assert database.snapshot.manifest.index is not None
    for _ in range(2):
        ids, scores = database.search(queries, 10, retriever="scann")
        assert ids[:, 0].tolist() == list(range(N, N + 20)) and (scores[:, 0] > 0.999).all()
        assert not set(ids.ravel().tolist()) & set(gone.tolist())
        assert recall(ids, oracle(database, queries, 10)[0]) >= 0.9
        everything, _ = database.search(queries[:1], len(database) + 5, retriever="scann")
        assert set(everything[0].tolist()) == {*database.ids.tolist(), -1}
        # Compaction moves rows; the index knows them by id.
        database.compact()
    database.reindex()
    assert database.snapshot.manifest.index is None and database.choice()[0] == "exact"


def test_centring_searches_about_the_mean_of_the_keys(tmp_path):
    """Keys with a large common mean: cosines are close to 1 until the mean is subtracted."""
    lean = clustered(400, 13) + 30
    database = Database.write(tmp_path / "db", [batch(lean)], geometry=GEOMETRY)
    assert database.info.key_mean_norm > 0.99
    query = lean[7:8] + 0.01
    _, plain = database.search(query, 50)
    ids, centred = database.search(query, 50, centred=True)
    assert ids[0, 0] == 7
    assert plain[0, -1] > 0.99 and centred[0, -1] < 0.9
    stored = database.keys(database.ids).numpy().astype(np.float64)
    mean = stored.mean(axis=0)
    x, q = stored - mean, query[0] / np.linalg.norm(query[0]) - mean
    expected = x @ q / np.linalg.norm(x, axis=1) / np.linalg.norm(q)
    np.testing.assert_allclose(centred[0], np.sort(expected)[::-1][:50], atol=2e-3)
    database.reindex(ScannConfig(0, 0, 40, soar=False, centred=True))
    assert database.snapshot.manifest.centred
    ids, scores = database.search(query, 50, retriever="scann")
    assert recall(ids, database.search(query, 50, retriever="exact")[0]) >= 0.9
    with pytest.raises(InvalidRequest, match="index is centred"):
        database.search(query, 5, retriever="scann", centred=False)


def test_a_minimum_score_leaves_neighbours_out(database):
    queries = clustered(5, 14)
    _, scores = database.search(queries, 20, retriever="exact")
    limit = float(np.median(scores))
    ids, kept = database.search(queries, 20, min_score=limit, retriever="exact")
    assert np.array_equal(np.isnan(kept), ~(scores >= limit)) and ((ids == -1) == np.isnan(kept)).all()


def test_near_duplicates_are_dropped_and_diversity_spreads(tmp_path):
    keys = clustered(40, 15)
    keys[1:10] = keys[0] + 0.001 * np.arange(1, 10)[:, None]
    database = Database.write(tmp_path / "db", [batch(keys)], geometry=GEOMETRY)
    query = keys[:1] * 1.01
    assert set(database.search(query, 5)[0][0].tolist()) <= set(range(10))
    ids, scores = database.search(query, 5, max_similarity=0.99)
    assert len(set(ids[0].tolist()) & set(range(10))) == 1 and (np.diff(scores[0]) <= 0).all()
    near, far = (database.search(query, 5, diversity=d)[0][0] for d in (0.0, 0.9))

    def spread(ids):
        found = database.keys(ids).numpy()
        return float(np.linalg.norm(found[:, None] - found[None], axis=2).mean())

    assert spread(far) > spread(near) and far[0] == near[0]
    for bad in ({"diversity": 2}, {"max_similarity": 3}, {"min_score": float("nan")}):
        with pytest.raises(InvalidRequest):
            database.search(query, 5, **bad)


def test_bm25_finds_by_words(tmp_path):
    captions = [
        "a red boat on a lake",
        "two dogs in the snow",
        "a boat and a lighthouse",
        "snow on red roofs",
        "the of",
    ]
    database = Database.write(tmp_path / "db", [batch(clustered(5, 16), captions)], geometry=GEOMETRY)
    ids, scores = database.search(["a lighthouse by a boat", "zebra", "", "SNOW"], 3, retriever="bm25")
    assert ids[0].tolist() == [2, 0, -1] and scores[0, 0] > scores[0, 1] > 0
    assert (ids[1:3] == -1).all() and set(ids[3].tolist()) == {1, 3, -1}
    database.remove([2])
    assert database.search(["lighthouse boat"], 1, retriever="bm25")[0].tolist() == [[0]]
    assert database.search(["lighthouse boat"], 1, retriever="bm25", exclude=[0])[0].tolist() == [[-1]]
    with pytest.raises(InvalidRequest, match="searches by text"):
        database.search(clustered(1, 0), 1, retriever="bm25")


def test_a_retriever_of_ones_own_takes_part(database):
    class Remote:
        """What a client of a vector database elsewhere looks like."""

        name = "remote"

        def search(self, keys, k, *, exclude=None):
            return np.tile(np.arange(k), (len(keys), 1)), np.linspace(1, 0, k, dtype=np.float32)[None].repeat(
                len(keys), 0
            )

    assert isinstance(Remote(), Retriever)
    ids, _ = database.search(clustered(2, 0), 3, retriever=Remote(), min_score=0.4)
    assert ids.tolist() == [[0, 1, -1]] * 2
    assert Database.open(database.path, retriever=Remote()).choice() == ("remote", "given by the caller")
    with pytest.raises(InvalidRequest, match="no search"):
        database.search(clustered(2, 0), 3, retriever=object())
    with pytest.raises(InvalidRequest, match="not one of"):
        database.search(clustered(2, 0), 3, retriever="faiss")


def test_auto_says_what_it_chose_and_why(database, tmp_path, monkeypatch):
    assert database.info.retriever == "exact" and "3000 pairs, fewer than 20000" in database.info.why
    monkeypatch.setattr("ragturbo.retrieval.database.EXACT_BELOW", 100)
    assert Database.open(database.path).choice() == ("scann", "3000 pairs with a saved index")
    monkeypatch.setattr("ragturbo.retrieval.scann.available", lambda: False)
    assert Database.open(database.path).choice() == ("exact", "the package scann is not installed")
    plain = Database.write(tmp_path / "db", [batch(clustered(200, 1))], geometry=GEOMETRY)
    assert plain.choice() == ("exact", "the database has no index; make one with `ragturbo db reindex`")
    with pytest.raises(DatabaseError, match="no ScaNN index; make one"):
        plain.search(clustered(1, 0), 1, retriever="scann")


def test_a_retriever_is_checked_at_open_and_its_index_loaded_by_the_first_search(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ragturbo.retrieval.database.EXACT_BELOW", 100)
    loads = []
    load = ScannRetriever._load
    monkeypatch.setattr(ScannRetriever, "_load", lambda self, index: loads.append(1) or load(self, index))
    database = Database.open(folder)
    assert database.asked_retriever == "auto" and database.choice()[0] == "scann" and loads == []
    view = database.frozen()
    for _ in range(2):
        assert view.search(near(1, 3), 4)[0].shape == database.search(near(1, 3), 4)[0].shape == (1, 4)
    assert loads == [1]
    plain = Database.write(tmp_path / "db", [batch(clustered(20, 1))], geometry=GEOMETRY)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for asked, error, message in (
        ("faiss", InvalidRequest, "not one of"),
        (object(), InvalidRequest, "no search"),
        ("scann", DatabaseError, "needs the package scann"),
    ):
        with pytest.raises(error, match=message):
            Database.open(plain.path, retriever=asked)


def test_an_index_deleted_before_its_first_use_is_replaced_by_the_newest(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "db")
    reader, view = (Database.open(copy, retriever="scann") for _ in range(2))
    view = view.frozen()
    writer = Database.open(copy, retriever="exact")
    for id in (1, 2):
        writer.remove([id])
    ids, _ = reader.search(writer.keys([3]), 3)
    assert ids[0, 0] == 3 and len(reader) == N - 2
    with pytest.raises(DatabaseCorrupt, match="scann"):
        view.search(writer.keys([3]), 3)


def test_tiny_databases_are_searched_too(plain, tmp_path):
    for n in (1, 2, 5):
        database = Database.write(tmp_path / f"{n}", [batch(clustered(n, n))], geometry=GEOMETRY)
        ids, _ = database.search(clustered(2, 0), 4)
        assert all(set(row.tolist()) == {*range(n), -1} for row in ids) or n == 5
        with pytest.raises(InvalidRequest, match="too few for ScaNN"):
            database.reindex(ScannConfig(0, 0, 10, soar=False))
    database.remove(database.ids)
    assert len(database) == 0 and (database.search(clustered(2, 0), 4)[0] == -1).all()
    database.compact()
    assert (database.search(clustered(2, 0), 4)[0] == -1).all() and not database.rows([-1]).any()
    plain.append_encoded(database, [batch(clustered(2, 9))])
    assert database.ids.tolist() == [5, 6]


def test_more_leaves_than_pairs_is_refused(database, tmp_path):
    plain = Database.write(tmp_path / "db", [batch(clustered(100, 1))], geometry=GEOMETRY)
    with pytest.raises(InvalidRequest, match="300 leaves are more than the 100 pairs"):
        plain.reindex(ScannConfig(300, 10, 50))
    assert plain.snapshot.manifest.index is None


def test_a_planted_pickle_beside_the_index_is_refused_and_never_read(folder, tmp_path):
    import pickle

    copy = shutil.copytree(folder, tmp_path / "db")
    scann = next(copy.glob("gen-*/scann"))
    (scann / "scann_docids.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(DatabaseCorrupt, match="scann_docids.pkl"):
        Database.open(copy, retriever="scann").retriever()


def test_a_damaged_index_is_named(folder, tmp_path, rng, long_count):
    copy = shutil.copytree(folder, tmp_path / "db")
    for path in sorted(next(copy.glob("gen-*/scann")).iterdir()):
        good = path.read_bytes()
        for _ in range(long_count(40)):
            data = bytearray(good)
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(data)
            with pytest.raises(DatabaseCorrupt, match=path.name):
                Database.open(copy, retriever="scann").retriever()
        path.write_bytes(good)
    Database.open(copy, retriever="scann").retriever()


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 60), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31), st.sets(st.integers(0, 59)),
)  # fmt: skip
def test_exact_search_against_the_oracle(rows, k, queries, seed, removed):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        keys = clustered(rows, seed, 6)
        geometry = Geometry(1, 1, 8, "float16", 6)
        database = Database.write(f"{folder}/db", [batch(keys)], geometry=geometry, segment_records=7)
        gone = [id for id in removed if id < rows]
        if gone:
            database.remove(gone)
        asked = clustered(queries, seed + 1, 6)
        _, scores = database.search(asked, k)
        if len(database):
            expected = oracle(database, asked, k)[1]
            np.testing.assert_allclose(scores[:, : expected.shape[1]], expected, atol=3e-6)
            assert np.isnan(scores[:, expected.shape[1] :]).all()


def test_searching_imports_scann_only_when_it_searches(folder):
    code = (
        "import sys\n"
        "from ragturbo import Database\n"
        f"db = Database.open({str(folder)!r})\n"
        "db.search(db.keys(db.ids[:1]), 2)\n"
        "print(sorted({'scann', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_one_pass_kernels_contract_gives_what_the_blocked_product_gives(tmp_path):
    """On a GPU exact search is `ops.topk` over keys in which removed pairs are NaN: here by that op's reference."""
    from ragturbo.ops import describe
    from ragturbo.retrieval.exact import ExactRetriever

    database = Database.write(tmp_path / "db", [batch(clustered(200, 3))], geometry=GEOMETRY)
    database.remove(range(0, 200, 3))
    retriever = ExactRetriever(database.snapshot)
    query = torch.nn.functional.normalize(torch.from_numpy(clustered(3, 4)), dim=1)
    expected = retriever.search(query, 10)
    retriever.keys = retriever.keys.clone()
    retriever.keys.masked_fill_(retriever.dead[:, None], float("nan"))
    retriever._descriptor = describe(retriever.keys.data_ptr(), 200, "cpu")
    ids, scores = retriever._one_pass(query, 10)
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(scores, expected[1])


def test_a_removal_shares_what_did_not_change(folder, tmp_path):
    """Neither the keys nor the index are read again: a live service does not stop for it."""
    database = Database.open(shutil.copytree(folder, tmp_path / "db"), retriever="scann")
    before = database.retriever()
    database.remove([5])
    after = database.retriever()
    assert after is not before and after.searcher is before.searcher
    assert database.snapshot.keys is before.snapshot.keys
    assert 5 not in database.search(database.keys([5]), 3)[0]
