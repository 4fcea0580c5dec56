"""Search by keys and words at once: a name that the text encoder does not know finds its picture."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragturbo import Database
from ragturbo.errors import InvalidRequest
from ragturbo.retrieval import Geometry, Record
from ragturbo.retrieval.postings import Postings
from ragturbo.retrieval.words import may_be_name, singular, words

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "arrow", "cube", "moon")
WHERE = ("left of", "right of", "above", "below")
GEOMETRY = Geometry(1, 1, 8, "float16", 64)
VOCABULARY = {word: i for i, word in enumerate(" ".join((*COLOURS, *SHAPES, *WHERE, "two", "three")).split())}


def keys_of(texts: list[str]) -> np.ndarray:
    """Keys of an encoder with a closed vocabulary: every other word is the same unknown word."""
    table = np.random.default_rng(0).standard_normal((len(VOCABULARY) + 1, 64))
    rows = [sum(table[VOCABULARY.get(w.removesuffix("s"), -1)] for w in (text or "?").split()) for text in texts]
    keys = np.array(rows, np.float32)
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def write(folder: Path, captions: list[str], **options) -> Database:
    return Database.write(folder, [batch(captions)], geometry=GEOMETRY, **options)


def batch(captions: list[str]) -> tuple:
    records = [Record(0, caption) for caption in captions]
    return records, keys_of(captions), np.zeros((len(captions), 1, 8), np.float32)


def scenes(n: int) -> list[str]:
    one = [f"a {c} {s}" for c, s in itertools.product(COLOURS, SHAPES)]
    pairs = [f"{a} {where} {b}" for a, where, b in itertools.product(one, WHERE, one)]
    return [*one, *(pairs[i] for i in np.random.default_rng(1).permutation(len(pairs))[: n - len(one)])]


def made_up(n: int, seed: int = 2) -> list[str]:
    rng = np.random.default_rng(seed)
    names: dict[str, None] = {}
    while len(names) < n:
        word = "".join(rng.choice(list(part)) for part in ("bdfgkmnprtvz", "aeiou", "bdgklmnprstxz"))
        word += rng.choice(["", "", "o", "y", "ch", "ix"])
        if words(word) and may_be_name(singular(word)):
            names.setdefault(word)
    return list(names)


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> tuple[Database, dict[str, int]]:
    """4,000 captions, of which 100 name something that no other does."""
    names = made_up(100)
    captions = [*scenes(3900), *(f"a {name}" for name in names)]
    order = np.random.default_rng(3).permutation(len(captions))
    database = write(tmp_path_factory.mktemp("names") / "db", [captions[i] for i in order], segment_records=900)
    place = {captions[i]: row for row, i in enumerate(order.tolist())}
    return database, {name: place[f"a {name}"] for name in names}


def plural(name: str) -> str:
    if name.endswith(("s", "x", "z", "ch")):
        return name + "es"
    return name[:-1] + "ies" if name.endswith("y") else name + "s"


def search(database: Database, *texts: str, k: int = 1, retriever: str = "hybrid", **options) -> np.ndarray:
    given = {"texts": list(texts)} if retriever == "hybrid" else {}
    return database.search(keys_of(list(texts)), k, retriever=retriever, **given, **options)[0]


def test_a_name_that_the_encoder_does_not_know_is_found_first_among_4000(named):
    database, where = named
    prompts = [f"two {plural(name)} left of a blue square" for name in where]
    ids = list(where.values())
    assert np.mean(search(database, *prompts)[:, 0] == ids) >= 0.98
    assert np.mean(search(database, *prompts, retriever="exact")[:, 0] == ids) <= 0.02
    # Both names of a prompt are among its first two.
    pairs = list(itertools.pairwise(where))
    both = search(database, *[f"a {a} above two {plural(b)}" for a, b in pairs], k=2)
    assert np.mean([set(row) == {where[a], where[b]} for row, (a, b) in zip(both, pairs, strict=True)]) >= 0.98


def test_a_prompt_without_a_name_gets_plain_reciprocal_rank_fusion(named):
    database, _ = named
    text = "a red star above a blue moon"
    dense, lexical = (
        database.search(q, 16, retriever=r)[0][0] for q, r in ((keys_of([text]), "exact"), ([text], "bm25"))
    )
    fused: dict[int, float] = {}
    for rows in (dense, lexical):
        for rank, id in enumerate(rows.tolist(), 1):
            fused[id] = fused.get(id, 0.0) + 1 / (60 + rank)
    expected = sorted(fused, key=lambda id: (-fused[id], id))[:5]
    ids, scores = database.search(keys_of([text]), 5, texts=[text], retriever="hybrid")
    assert ids[0].tolist() == expected
    np.testing.assert_allclose(scores[0], [fused[id] for id in expected], rtol=1e-6)


def test_of_several_pictures_of_one_name_the_words_and_the_key_decide(tmp_path):
    captions = ["a zib left of a red star", "a green zib", "a zib above a zib", *scenes(400)]
    database = write(tmp_path / "db", captions)
    assert search(database, "a green zib below a heart")[0, 0] == 1
    assert search(database, "a zib left of a red star")[0, 0] == 0
    hits = database.retriever("hybrid").find(keys_of(["two zibs"]), 4, texts=["two zibs"])
    assert set(hits.ids[0, :3]) == {0, 1, 2} and hits.rare_share[0].tolist() == [1, 1, 1, 0]
    assert (hits.bm25[0, :3] > 0).all() and hits.scores[0, 2] > 1 > hits.scores[0, 3]


def test_the_share_of_rare_words_is_weighted_by_how_rare_they_are(tmp_path):
    captions = ["a zib", *["a wug"] * 3, *scenes(396)]
    database = write(tmp_path / "db", captions)
    hits = database.retriever("hybrid").find(keys_of(["a zib on a wug"]), 2, texts=["a zib on a wug"])
    (first, second) = hits.rare_share[0].tolist()
    assert hits.ids[0].tolist() == [0, 1] and first > second and first + second == pytest.approx(1)


def test_words_of_place_and_number_are_not_names(tmp_path):
    captions = ["a zib", "two cubes left of a moon", *[f"a {c} {s}" for c, s in itertools.product(COLOURS, SHAPES)]]
    database = write(tmp_path / "db", captions)
    assert search(database, "two zibs left of a blue square")[0, 0] == 0


@pytest.mark.parametrize("n", [0, 1, 3, 20])
def test_tiny_databases_are_searched_too(tmp_path, n):
    captions = ["a zib", *scenes(80)][:n] if n else []
    database = write(tmp_path / "db", captions or ["a zib"])
    if not captions:
        database.remove([0])
    ids = search(database, "two zibs left of a blue square", "", k=5)
    assert ids[0, 0] == (0 if n else -1) and (ids[:, n:] == -1).all()


def test_an_appended_pair_is_found_at_once_and_only_its_own_words_are_indexed(tmp_path, plain, monkeypatch):
    database = write(tmp_path / "db", scenes(300), segment_records=100)
    query = "two zibs left of a blue square"
    search(database, query)
    made = []
    monkeypatch.setattr(
        "ragturbo.retrieval.pairs.Postings", lambda captions: made.append(captions) or Postings(captions)
    )
    plain.append_encoded(database, [batch(["a zib"])])
    new = int(database.ids[-1])
    assert search(database, query)[0, 0] == new == 300 and made == [["a zib"]]
    database.remove([new])
    assert search(database, query)[0, 0] != new and made == [["a zib"]]
    # Neither does a removed pair count as a caption with the word.
    plain.append_encoded(database, [batch(["a zib", "a wug"])])
    hits = database.retriever("hybrid").find(keys_of([query]), 1, texts=[query])
    assert hits.ids[0, 0] == 301 and hits.rare_share[0, 0] == 1
    before = search(database, query, k=20)
    database.compact()
    assert np.array_equal(search(database, query, k=20), before)


def test_a_removed_or_excluded_name_is_not_returned(tmp_path):
    database = write(tmp_path / "db", ["a zib", "a green zib", *scenes(200)])
    first, second = search(database, "a zib", k=2)[0].tolist()
    assert {first, second} == {0, 1}
    assert search(database, "a zib", exclude=[first])[0, 0] == second
    database.remove([first])
    assert search(database, "a zib")[0, 0] == second
    database.remove([second])
    assert not {0, 1} & set(search(database, "a zib", k=150)[0].tolist())


def test_a_frozen_view_keeps_its_generation(tmp_path, plain):
    database = write(tmp_path / "db", scenes(200))
    view = database.frozen()
    plain.append_encoded(database, [batch(["a zib"])])
    assert search(database, "a zib")[0, 0] == 200 and search(view, "a zib")[0, 0] != 200


def test_threads_search_while_pairs_come_and_go(tmp_path, plain):
    database = write(tmp_path / "db", ["a zib", *scenes(200)])
    wrong, ends = [], threading.Event()

    def ask() -> None:
        while not ends.is_set():
            found = search(database, "two zibs left of a blue square")[0, 0]
            if found != 0:
                wrong.append(found)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(10):
        plain.append_encoded(database, [batch([f"a wug{i}"])])
        assert search(database, f"a wug{i}")[0, 0] == 201 + i
    database.remove([201, 205])
    ends.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_hybrid_needs_both_and_no_other_retriever_takes_texts(tmp_path):
    database = write(tmp_path / "db", scenes(100))
    for texts in (None, "a zib", ["a", "b"]):
        with pytest.raises(InvalidRequest, match="give texts"):
            database.search(keys_of(["a zib"]), 1, retriever="hybrid", texts=texts)
    with pytest.raises(InvalidRequest, match="texts has no effect with retriever 'exact'"):
        database.search(keys_of(["a zib"]), 1, texts=["a zib"])
    assert Database.open(database.path, retriever="hybrid").choice() == ("hybrid", "requested")


def test_the_options_of_a_search_apply(tmp_path):
    database = write(tmp_path / "db", ["a zib", "a zib", "a green zib", *scenes(200)])
    ids = search(database, "a zib", k=4, min_score=1.0)
    assert sorted(ids[0].tolist()) == [-1, 0, 1, 2]
    assert len({0, 1} & set(search(database, "a zib", k=3, max_similarity=0.999)[0].tolist())) == 1


def test_scores_by_words_are_those_of_bm25s_over_the_live_captions(tmp_path):
    import bm25s

    captions = ["the of", *scenes(250)]
    database = write(tmp_path / "db", captions, segment_records=70)
    gone = list(range(5, 250, 3))
    database.remove(gone)
    live = [caption for i, caption in enumerate(captions) if i not in gone]
    index = bm25s.BM25()
    index.index([words(caption) for caption in live], show_progress=False)
    for text in ("a red star", "two red stars and a red cross", "below"):
        expected = index.get_scores(words(text))
        found = database.retriever("bm25").match(text).bm25
        np.testing.assert_allclose(np.delete(found, gone), expected, rtol=1e-5)
        assert not found[gone].any()


def test_equal_captions_come_in_the_order_of_their_ids(tmp_path):
    database = write(tmp_path / "db", ["a red star"] * 12)
    for retriever in ("bm25", "hybrid"):
        query = ["a red star"] if retriever == "bm25" else keys_of(["a red star"])
        texts = {"texts": ["a red star"]} if retriever == "hybrid" else {}
        assert database.search(query, 5, retriever=retriever, **texts)[0].tolist() == [[0, 1, 2, 3, 4]]


NOUNS = {
    "zibs": "zib", "crosses": "cross", "boxes": "box", "cities": "city", "houses": "house", "shoes": "shoe",
    "lenses": "lens", "viruses": "virus", "movies": "movie", "churches": "church", "glasses": "glass", "axes": "axe",
    "horses": "horse", "tomatoes": "tomato", "wubies": "wuby", "arrows": "arrow",
}  # fmt: skip


@pytest.mark.parametrize("many", NOUNS)
def test_a_plural_is_the_same_word_as_its_singular(many):
    assert singular(many) == singular(NOUNS[many])


@given(st.text("bdfgklmnprstvzaeiouxy", min_size=3, max_size=8))
def test_the_plural_of_any_name_is_the_same_word(name):
    if name[-2:-1] in tuple("aeiou") and name.endswith("y"):
        name += "l"
    if len(plural(name)) - (name.endswith(("s", "x", "z"))) > 3:
        assert singular(plural(name)) == singular(name)


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text):
    assert [singular(word) for word in words(text)] == words(text)


def test_plurals_match_in_bm25_too(tmp_path):
    database = write(tmp_path / "db", ["a cross", "a zib", *scenes(100)])
    assert search_words(database, "zibs") == 1
    assert search_words(database, "crosses") == 0


def search_words(database: Database, text: str) -> int:
    return int(database.search([text], 1, retriever="bm25")[0][0, 0])
