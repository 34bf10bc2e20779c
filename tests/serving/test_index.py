"""Searching an index: right answers, the same ones however it is cut and opened, and clear refusals."""

import dataclasses
import functools
import gc
import itertools
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pictures
import pytest
import signed
import stores

from pipelines.index import IndexRequest, build_version, load_trained, run
from pipelines.runner import Runner
from serving import Index, embedder, storage
from serving.errors import (
    ChecksumMismatch,
    EmbedderMismatch,
    FormatError,
    ImageRejected,
    NotFound,
    UnsupportedVersion,
    UsageError,
)
from serving.index import Hit
from serving.manifest import FileEntry, IndexManifest, RunManifest, move_current, read_current
from serving.quantizer import Quantizer
from transforms.measuring import make_probe

RAW, DIM, ROWS = 48, 24, 1200
LABELS = ("cat", "dög", None)


@dataclass(frozen=True)
class Built:
    """A published index, and what went into it."""

    root: Path
    vectors: np.ndarray
    store: RunManifest
    manifest: IndexManifest

    @property
    def index(self) -> str:
        return str(self.root / "index")

    @property
    def folder(self) -> Path:
        return self.root / "index" / "versions" / self.manifest.version

    @property
    def uris(self) -> list[str]:
        return [f"/made/{number:06}.jpg" for number in range(len(self.vectors))]

    @functools.cached_property
    def whole(self) -> Index:
        return Index.open(self.index)

    @property
    def exhaustive(self) -> dict[str, int]:
        return {"nprobe": self.manifest.parameters["nlist"], "rerank": self.manifest.rows}

    @property
    def quantizer(self) -> Quantizer:
        return Quantizer((self.folder / self.manifest.trained.name).read_bytes())

    def cosines(self, queries: np.ndarray) -> np.ndarray:
        """Every row's true score, in the space of the index."""
        return self.quantizer.reduce(queries) @ self.quantizer.reduce(self.vectors).T

    def nearest(self, queries: np.ndarray, k: int) -> list[list[str]]:
        order = np.argsort(-self.cosines(queries), axis=1, kind="stable")[:, :k]
        return [[self.uris[place] for place in places] for places in order]


def build(root: Path, rows: int, raw: int, dim: int, shards: int, seed: int = 0) -> Built:
    vectors = stores.clustered(rows, raw, seed=seed)
    labels = [LABELS[number % len(LABELS)] for number in range(rows)]
    made = stores.write_store(root / "store", vectors, labels=labels)
    manifest, _ = run(request(root, dim, shards), Runner())
    return Built(root, vectors, made, manifest)


def request(root: Path, dim: int, shards: int) -> IndexRequest:
    return IndexRequest(str(root / "store"), str(root / "index"), dim=dim, shards=shards)


def cut(built: Built, shards: int) -> Index:
    """Another version of the same rows and quantizer, in so many shards."""
    trained = load_trained(built.index, built.manifest.quantizer)
    manifest = build_version(request(built.root, DIM, shards), built.store, trained, Runner())
    return Index.open(built.index, version=manifest.version)


def queries_for(built: Built, count: int = 100) -> np.ndarray:
    """Rows of the index a little displaced, so that a query is no row."""
    rng = np.random.default_rng(5)
    chosen = built.vectors[rng.choice(len(built.vectors), min(count, len(built.vectors)), replace=False)]
    return chosen + np.float32(0.2) * rng.standard_normal(chosen.shape, dtype=np.float32)


def uris_of(answers: list[list[Hit]]) -> list[list[str]]:
    return [[hit.uri for hit in hits] for hits in answers]


def scores_of(answers: list[list[Hit]]) -> np.ndarray:
    return np.array([[hit.score for hit in hits] for hits in answers])


def assert_same(found: list[list[Hit]], expected: list[list[Hit]]) -> None:
    """Equal but for the last bits of scores, which may depend on the batch."""
    assert uris_of(found) == uris_of(expected)
    np.testing.assert_allclose(scores_of(found), scores_of(expected), atol=1e-6)


def recall(found: list[list[str]], truth: list[list[str]]) -> float:
    return float(np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found, truth, strict=True)]))


def merged(answers: list[list[list[Hit]]], k: int) -> list[list[Hit]]:
    """What a front before several processes does."""
    return [sorted(itertools.chain(*hits), key=lambda hit: -hit.score)[:k] for hits in zip(*answers, strict=True)]


@pytest.fixture(scope="module", autouse=True)
def few_probes() -> Iterator[None]:
    """Tune and measure on few queries: other tests look at what is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.index.make_probe", functools.partial(make_probe, queries=100))
        patch.setattr("transforms.measuring._LATENCY_QUERIES", 10)
        yield


@pytest.fixture(scope="module")
def pq(tmp_path_factory: pytest.TempPathFactory) -> Built:
    built = build(tmp_path_factory.mktemp("pq"), ROWS, RAW, DIM, shards=3)
    assert built.manifest.kind == "ivf-pq"
    return built


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Built:
    built = build(tmp_path_factory.mktemp("exact"), 120, RAW, DIM, shards=3)
    assert built.manifest.kind == "exact"
    return built


@pytest.fixture(params=["pq", "exact"])
def built(request: pytest.FixtureRequest) -> Built:
    found: Built = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def copied(pq: Built, tmp_path: Path) -> Built:
    """An index that a test may damage."""
    shutil.copytree(pq.root, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(pq, root=tmp_path)


# --- Answers --------------------------------------------------------------------------------------------------------


def test_hits_say_what_they_are(built):
    answers = built.whole.search(built.vectors, 5, **built.exhaustive)
    assert len(built.whole) == len(built.vectors) == built.whole.info.rows
    label_of = dict(zip(built.uris, itertools.cycle(LABELS), strict=False))
    for uri, hits in zip(built.uris, answers, strict=True):
        assert len(hits) == 5
        assert hits[0].uri == uri
        assert hits[0].score == pytest.approx(1, abs=5e-3)
        assert all(hit.label == label_of[hit.uri] and -1 <= hit.score <= 1 for hit in hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert all(type(hit.row) is int and type(hit.score) is float for hit in hits)


def test_an_exact_index_is_brute_force(exact):
    queries = queries_for(exact)
    unit = exact.vectors / np.linalg.norm(exact.vectors, axis=1, keepdims=True)
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
    order = np.argsort(-cosines, axis=1)[:, :10]
    answers = exact.whole.search(queries, 10)
    assert uris_of(answers) == [[exact.uris[place] for place in places] for places in order]
    np.testing.assert_allclose(scores_of(answers), np.take_along_axis(cosines, order, axis=1), atol=1e-5)


def test_visiting_all_lists_finds_the_neighbours(pq):
    """Codes of 8 bits blur a score by some thousandths: rows nearer to the tenth than that may change places."""
    queries = queries_for(pq, 300)
    answers = pq.whole.search(queries, 10, **pq.exhaustive)
    cosines = pq.cosines(queries)
    place = {uri: number for number, uri in enumerate(pq.uris)}
    truth = np.array([[cosines[row, place[hit.uri]] for hit in hits] for row, hits in enumerate(answers)])
    tenth = -np.sort(-cosines, axis=1)[:, 9:10]
    assert np.mean(truth >= tenth - 5e-3) >= 0.99
    assert recall(uris_of(answers), pq.nearest(queries, 10)) >= 0.97
    error = np.abs(scores_of(answers) - truth)
    assert error.max() <= 8e-3
    assert np.sqrt(np.square(error).mean()) <= 3e-3


def test_visiting_all_lists_is_brute_force_over_the_codes(pq):
    """What the 8-bit codes can tell apart is found whole: nothing is lost on the way to them."""
    queries, quantizer = queries_for(pq, 300), pq.quantizer
    store = quantizer.empty_refine()
    decoded = store.sa_decode(quantizer.encode(pq.vectors).refine)
    scores = quantizer.reduce(queries) @ decoded.T
    order = np.argsort(-scores, axis=1)[:, :10]
    answers = pq.whole.search(queries, 10, **pq.exhaustive)
    assert recall(uris_of(answers), [[pq.uris[place] for place in places] for places in order]) >= 0.999
    np.testing.assert_allclose(scores_of(answers), np.take_along_axis(scores, order, axis=1), atol=1e-5)


def test_the_measured_settings_are_the_default(pq):
    queries, settings = queries_for(pq), pq.manifest.search
    explicit = pq.whole.search(queries, 10, nprobe=settings.nprobe, rerank=settings.rerank)
    assert pq.whole.search(queries, 10) == explicit
    assert recall(uris_of(explicit), pq.nearest(queries, 10)) >= 0.9


def test_one_neighbour_is_found_as_well_as_ten(pq):
    """`rerank` counts candidates, not a multiple of k."""
    queries = queries_for(pq, 300)
    truth = [hits[0] for hits in pq.nearest(queries, 1)]
    one, ten = (uris_of(pq.whole.search(queries, k)) for k in (1, 10))
    found_in = [np.mean([uri in hits for uri, hits in zip(truth, answers, strict=True)]) for answers in (one, ten)]
    assert found_in[0] >= found_in[1] - 0.02


@pytest.mark.parametrize("k", [1, 7, 50, ROWS - 1, ROWS, ROWS + 1000])
@pytest.mark.parametrize("options", [{}, {"nprobe": 1}, {"nprobe": 1, "rerank": 0}, {"rerank": 0}, {"nprobe": 10**9}])
def test_no_hit_is_missing_where_rows_suffice(pq, k, options):
    for hits in pq.whole.search(queries_for(pq, 5), k, **options):
        assert len(hits) == len({hit.row for hit in hits}) == min(k, ROWS)


def test_asking_for_more_than_all_gives_all(built):
    [hits] = built.whole.search(built.vectors[0], 10**6)
    assert sorted(hit.uri for hit in hits) == built.uris
    assert sorted(hit.row for hit in hits) == list(range(len(built.vectors)))


def test_a_batch_answers_like_its_queries_alone(built):
    queries = queries_for(built, 40)
    together = built.whole.search(queries)
    assert_same([built.whole.search(query)[0] for query in queries], together)
    assert_same(built.whole.search(queries[:13]) + built.whole.search(queries[13:]), together)


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "lists": np.ndarray.tolist,
    "float64": lambda queries: queries.astype(np.float64),
    "float16": lambda queries: queries.astype(np.float16),
    "columns first": np.asfortranarray,
    "every other": lambda queries: np.repeat(queries, 2, axis=0)[::2],
    "read-only": lambda queries: np.frombuffer(queries.tobytes(), np.float32).reshape(queries.shape),
    "rows": list,
}


@pytest.mark.parametrize("form", FORMS)
def test_queries_come_in_many_forms(pq, form):
    queries = pq.vectors[:20]  # float16 holds them without loss
    before = queries.copy()
    given = FORMS[form](queries)
    assert_same(pq.whole.search(given), pq.whole.search(queries))
    assert_same(pq.whole.search(given[3]), pq.whole.search(queries[3]))
    np.testing.assert_array_equal(queries, before)


@pytest.mark.parametrize("length", [1e-42, 1e-30, 1e-12, 1e12, 1e36])
def test_only_the_direction_of_a_query_counts(built, length):
    """In float32 the squares of such numbers vanish or overflow."""
    queries = queries_for(built, 20)
    scaled = (queries.astype(np.float64) * length).astype(np.float32)
    found = built.whole.search(scaled)
    tolerance = 1e-5 if length > 1e-38 else 0.05  # below, float32 has few digits left
    np.testing.assert_allclose(scores_of(found), scores_of(built.whole.search(queries)), atol=tolerance)


def test_a_query_of_zeros_is_answered(built):
    [hits] = built.whole.search(np.zeros(RAW), 3)
    assert len(hits) == 3
    assert np.isfinite([hit.score for hit in hits]).all()


def test_no_query_no_answer(built):
    assert built.whole.search(np.empty((0, RAW))) == []


def test_numpy_integers_are_integers(pq):
    numbers = np.array([3, 8, 100])
    found = pq.whole.search(pq.vectors[0], numbers[0], nprobe=numbers[1], rerank=numbers[2])
    assert found == pq.whole.search(pq.vectors[0], 3, nprobe=8, rerank=100)


def test_answers_repeat(built):
    queries = queries_for(built)
    first = built.whole.search(queries)
    assert built.whole.search(queries) == first
    assert Index.open(built.index).search(queries) == first


def test_threads_get_what_one_gets(pq):
    """Each with settings of its own, on one shared index."""
    work = [(queries_for(pq, 30)[start:], 1 + start % 12, 1 + start % 5) for start in range(24)]

    def answer(item: tuple[np.ndarray, int, int]) -> list[list[Hit]]:
        queries, k, nprobe = item
        return pq.whole.search(queries, k, nprobe=nprobe)

    serial = [answer(item) for item in work]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, work * 5)) == serial * 5


# --- Versions and shards --------------------------------------------------------------------------------------------


def test_the_current_version_is_opened_unless_another_is_named(pq):
    queries = queries_for(pq, 20)
    named = Index.open(f"file://{pq.index}/", version=pq.manifest.version)
    assert named.info == pq.whole.info == pq.manifest
    assert named.search(queries) == pq.whole.search(queries)


@pytest.mark.parametrize("shards", [[0], [2], [1, 2], [2, 0], [1, 1], (0, 1, 2), range(2)])
def test_rows_keep_their_numbers_in_every_subset(built, shards):
    [everything] = built.whole.search(built.vectors[0], len(built.vectors))
    row_of = {hit.uri: hit.row for hit in everything}
    opened = Index.open(built.index, shards=shards)
    [hits] = opened.search(built.vectors[0], len(built.vectors))
    assert len(hits) == len(opened) == sum(built.manifest.shards[number].rows for number in set(shards))
    assert {hit.uri: hit.row for hit in hits} == {hit.uri: row_of[hit.uri] for hit in hits}


def test_rows_count_through_the_shards_by_uri(built):
    starts = itertools.accumulate((shard.rows for shard in built.manifest.shards), initial=0)
    for shard, start in zip(built.manifest.shards, starts, strict=False):
        opened = Index.open(built.index, shards=[shard.number])
        [hits] = opened.search(built.vectors[0], len(built.vectors))
        in_order = sorted(hits, key=lambda hit: hit.uri)
        assert [hit.row for hit in in_order] == list(range(start, start + shard.rows))


def test_no_shard_no_hit(built):
    nothing = Index.open(built.index, shards=[])
    assert len(nothing) == 0
    assert nothing.search(built.vectors[:2]) == [[], []]


def test_shards_searched_apart_and_merged_are_the_whole(built):
    queries = queries_for(built, 50)
    apart = [Index.open(built.index, shards=[n]).search(queries, 10, **built.exhaustive) for n in range(3)]
    assert_same(merged(apart, 10), built.whole.search(queries, 10, **built.exhaustive))


@pytest.mark.parametrize(("rows", "seed"), [(4, 0), (100, 1), *((640, seed) for seed in range(2))])
def test_the_number_of_shards_changes_no_answer(tmp_path, rows, seed):
    """Four rows in seven shards leave some empty, and 640 are just enough for inverted lists."""
    one = build(tmp_path, rows, RAW, DIM, shards=1, seed=seed)
    queries = queries_for(one, 50)
    for shards in (3, 7):
        parted = cut(one, shards)
        assert len(parted.info.shards) == shards
        assert len(parted) == rows
        assert_same(parted.search(queries, 10, **one.exhaustive), one.whole.search(queries, 10, **one.exhaustive))
        # Among candidates of equal codes the first ones are ranked again, and shards change which are first.
        usual = [uris_of(index.search(queries, 10)) for index in (parted, one.whole)]
        assert recall(*usual) >= 0.99


@pytest.mark.parametrize("dim", [2, RAW])
def test_few_and_all_dimensions(tmp_path, dim):
    built = build(tmp_path, 640, RAW, dim, shards=2)
    queries = queries_for(built, 50)
    answers = built.whole.search(queries, 10, **built.exhaustive)
    best = -np.sort(-built.cosines(queries), axis=1)[:, :10]
    np.testing.assert_allclose(scores_of(answers), best, atol=1e-2)


@pytest.mark.parametrize("value", [0, 1])
def test_vectors_that_are_all_the_same(tmp_path, value):
    """A dead network gives zeros; every score is then as good as another, and still there are hits."""
    stores.write_store(tmp_path / "store", np.full((640, RAW), value, np.float32))
    run(request(tmp_path, DIM, 2), Runner())
    index = Index.open(str(tmp_path / "index"))
    for hits in index.search(np.stack([np.full(RAW, value), np.arange(RAW)]), 10):
        assert len({hit.uri for hit in hits}) == 10
        assert np.ptp([hit.score for hit in hits]) == 0


def test_a_new_version_with_another_quantizer_is_opened_by_the_next(copied):
    queries = queries_for(copied, 30)
    before = Index.open(copied.index)
    answers = before.search(queries)
    manifest, new = run(request(copied.root, 8, 2), Runner())
    assert new
    assert manifest.quantizer != copied.manifest.quantizer
    after = Index.open(copied.index)
    assert (after.info.version, after.info.reduced_dim) == (manifest.version, 8)
    assert uris_of(after.search(copied.vectors[:50], 1)) == [[uri] for uri in copied.uris[:50]]
    assert before.search(queries) == answers
    assert Index.open(copied.index, version=copied.manifest.version).search(queries) == answers


# --- What an index holds on to --------------------------------------------------------------------------------------


def test_an_index_asked_in_many_ways_keeps_the_last_of_them(built):
    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, faiss.SearchParametersIVF) for thing in gc.get_objects())

    index, before = Index.open(built.index), alive()
    for k in range(1, 101):
        for _ in range(2):
            assert len(index.search(built.vectors[0], k, nprobe=k)[0]) == k
    assert alive() - before <= 64


def test_an_index_outlives_what_it_was_made_from(built):
    queries = queries_for(built, 20)
    search = Index.open(built.index).search
    others = [Index.open(built.index, shards=[number]) for number in range(3)]
    gc.collect()
    answers = search(queries)
    del others
    gc.collect()
    assert search(queries) == answers == built.whole.search(queries)


def test_dropped_indexes_give_their_memory_back(built):
    def open_some(count: int) -> int:
        for _ in range(count):
            Index.open(built.index).search(built.vectors[0])
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    warm = open_some(20)
    size = sum(path.stat().st_size for path in built.folder.iterdir()) / 1024
    assert open_some(150) - warm < max(8 * 1024, 20 * size)


# --- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (np.zeros((2, RAW + 1)), rf"shape \(2, {RAW + 1}\).*takes \(N, {RAW}\).*made_up/avg"),
        (np.zeros(RAW - 1), rf"shape \({RAW - 1},\).*takes \(N, {RAW}\)"),
        (np.zeros((2, 2, RAW)), rf"shape \(2, 2, {RAW}\)"),
        (1.0, r"shape \(\)"),
        ([], r"shape \(0,\)"),
        ([[1.0] * RAW, [1.0]], "not an array of numbers"),
        (["cat.jpg"], "not an array of numbers.*cat.jpg"),
        (b"bytes", "not an array of numbers"),
        (object(), "not an array of numbers"),
        ([np.nan] * RAW, "NaN or infinity"),
        ([0.0] * (RAW - 1) + [np.inf], "NaN or infinity"),
        ([0.0] * (RAW - 1) + [-np.inf], "NaN or infinity"),
        ([1e300] * RAW, "NaN or infinity"),
    ],
    ids=str,
)
def test_wrong_vectors_are_refused(built, vectors, sentence):
    with pytest.raises(UsageError, match=sentence):
        built.whole.search(vectors)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": -3}, "k is -3"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"nprobe": -1}, "nprobe is -1"),
        ({"rerank": -1}, "rerank is -1"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(built, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        built.whole.search(built.vectors[0], **options)


@pytest.mark.parametrize("options", [{"k": 2.5}, {"nprobe": 1.5}, {"rerank": "10"}], ids=str)
def test_settings_of_a_wrong_type_are_refused(built, options):
    with pytest.raises(TypeError, match="as an integer"):
        built.whole.search(built.vectors[0], **options)


@pytest.mark.parametrize(("shards", "named"), [([3], r"\[3\]"), ([0, 7, -1], r"\[-1, 7\]")])
def test_unknown_shards_are_refused(pq, shards, named):
    with pytest.raises(UsageError, match=f"shards {named} are not in this index; it has 0 to 2"):
        Index.open(pq.index, shards=shards)


def test_vectors_of_another_embedder_are_refused(pq):
    ours = pq.manifest.embedder.fingerprint
    assert len(Index.open(pq.index, embedder=ours)) == ROWS
    with pytest.raises(EmbedderMismatch, match=rf"{ours} \(made_up/avg\), your vectors come from other"):
        Index.open(pq.index, embedder="other")


def test_what_is_no_index_is_not_found(pq, tmp_path):
    with pytest.raises(NotFound, match=rf"{tmp_path} is not a published index.*lookalike index"):
        Index.open(str(tmp_path))
    with pytest.raises(NotFound, match=r"missing/manifest.json does not exist"):
        Index.open(pq.index, version="missing")


# --- Damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = ["trained.faiss", *(f"{name}-00001-of-00003" for name in ("shard", "refine", "records"))]


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (flip, ChecksumMismatch, "is damaged: its checksum is not the manifest's"),
        (truncate, ChecksumMismatch, "bytes, its manifest names"),
        (lambda path: path.write_bytes(b""), ChecksumMismatch, "has 0 bytes"),
        (Path.unlink, NotFound, "does not exist"),
    ],
    ids=["flipped", "truncated", "emptied", "missing"],
)
@pytest.mark.parametrize("name", FILES)
def test_every_file_is_checked(copied, name, damage, error, sentence):
    [path] = (path for path in copied.folder.glob(f"{name}*") if path.suffix != ".json")
    damage(path)
    with pytest.raises(error, match=f"{path}.*{sentence}"):
        Index.open(copied.index)
    if name != "trained.faiss":  # the other shards are whole
        assert len(Index.open(copied.index, shards=[0, 2])) == ROWS - copied.manifest.shards[1].rows


@pytest.mark.parametrize(
    ("content", "error", "sentence"),
    [
        (b"", FormatError, "is not a manifest"),
        (b"{", FormatError, "is not a manifest"),
        (b"\x80\xff", FormatError, "is not a manifest"),
        (b"[1]", FormatError, "is not a manifest"),
        (b"{}", FormatError, "is not a manifest"),
        (b'{"format_version": 1}', FormatError, "is damaged: it has no checksum"),
        (b'{"format_version": 99}', UnsupportedVersion, "format version 99, this release reads 1; upgrade lookalike"),
        (b'{"format_version": 0}', UnsupportedVersion, "build it again"),
    ],
)
def test_damaged_manifests_are_refused(copied, content, error, sentence):
    path = copied.folder / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(error, match=f"{path}.*{sentence}"):
        Index.open(copied.index)


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b"{}", b"\xff", b"null", b'{"version": null}'])
def test_a_damaged_pointer_is_refused(copied, content):
    (copied.root / "index" / "CURRENT").write_bytes(content)
    with pytest.raises(FormatError, match="CURRENT is damaged"):
        Index.open(copied.index)


def test_a_pointer_to_nothing_names_the_manifest(copied):
    move_current(copied.index, "version", "gone", read_current(copied.index, "version")[1])
    with pytest.raises(NotFound, match=r"versions/gone/manifest.json does not exist"):
        Index.open(copied.index)


def reading(built: Built, **of_shard_0: Any) -> Index:
    """Open with a manifest that says something else of shard 0, checksums in order."""
    first, *rest = built.manifest.shards
    shards = (dataclasses.replace(first, **of_shard_0), *rest)
    return Index(built.index, dataclasses.replace(built.manifest, shards=shards))


@pytest.mark.parametrize("field", ["lists", "refine", "records"])
def test_files_of_other_rows_are_refused(pq, field):
    other = getattr(pq.manifest.shards[1], field)
    with pytest.raises(FormatError, match=f"{other.name} (does not hold the|has) .*rows"):
        reading(pq, **{field: other})


@pytest.mark.parametrize(("field", "source"), [("lists", "refine"), ("refine", "lists"), ("records", "lists")])
def test_files_of_another_kind_are_refused(pq, field, source):
    with pytest.raises(FormatError):
        reading(pq, **{field: getattr(pq.manifest.shards[0], source)})


def test_re_rank_codes_cannot_be_left_out(pq):
    with pytest.raises(FormatError, match="no re-rank codes for shard 0"):
        reading(pq, refine=None)


@pytest.mark.parametrize("field", ["lists", "refine", "records"])
def test_garbage_with_the_right_checksum_is_refused(copied, field):
    (copied.folder / "garbage").write_bytes(b"garbage" * 100)
    with pytest.raises(FormatError, match="garbage"):
        reading(copied, **{field: FileEntry.of("garbage", b"garbage" * 100)})


@pytest.mark.parametrize("change", [{"quantizer": "another"}, {"dim": RAW + 1}])
def test_a_quantizer_that_is_not_the_named_one_is_refused(pq, change):
    with pytest.raises(FormatError, match=r"trained.faiss is not the quantizer that the manifest names"):
        Index(pq.index, dataclasses.replace(pq.manifest, **change))


def test_keys_of_a_later_release_are_passed_over(copied):
    path = copied.folder / "manifest.json"
    signed.edit(path, later={"key": 1})
    assert Index.open(copied.index).info == copied.manifest


# --- Pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_pictures(artifact: str, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, list[bytes]]:
    """An index of drawn pictures, and their bytes in the order of `/made/…` uris."""
    root = tmp_path_factory.mktemp("pictures")
    spec = embedder.read_description(artifact).spec
    embedder.copy_artifact(artifact, storage.join(str(root / "store"), "embedders"))
    encoded = [path.read_bytes() for path in sorted(drawn.glob("*/*"))[::6]]
    stores.write_store(root / "store", embedder.Embedder.open(artifact).embed_images(encoded), embedder=spec)
    run(request(root, DIM, 2), Runner())
    return Index.open(str(root / "index")), encoded


def test_pictures_find_themselves(of_pictures):
    index, encoded = of_pictures
    answers = index.search_images(encoded, 3)
    assert [hits[0].uri for hits in answers] == [f"/made/{number:06}.jpg" for number in range(len(encoded))]
    assert answers == index.search(index.embedder.embed_images(encoded), 3)
    assert index.search_images([]) == []


def test_the_embedder_is_loaded_once(of_pictures):
    index, _ = of_pictures
    assert index.embedder is index.embedder
    assert index.embedder.fingerprint == index.info.embedder.fingerprint


def test_a_bad_picture_is_named_by_its_place(of_pictures):
    index, encoded = of_pictures
    with pytest.raises(ImageRejected, match="not_an_image: image 2 of 2"):
        index.search_images([encoded[0], b"text of some length"])


def test_searching_pictures_needs_the_embedder(pq):
    """That of made-up vectors has no model that could run."""
    with pytest.raises(FormatError, match=f"model of the embedder {pq.manifest.embedder.fingerprint} cannot be run"):
        pq.whole.search_images([pictures.encode(pictures.scene(), "PNG")])
