"""A night after another: what changed is embedded, what is good is published."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import real

from pipelines import reindex
from pipelines.gate import GateDocument, Tolerance
from pipelines.lease import leased
from pipelines.reindex import ReindexRequest
from pipelines.report import Report, Timed
from pipelines.runner import Runner, Silent
from pipelines.training import IndexRequest
from serving import Index, storage
from serving.errors import Conflict, GateFailed, LeaseHeld, UsageError
from serving.manifest import load_index_manifest, load_run_manifest, read_current
from transforms.comparing import Changes
from transforms.sampling import live_rows
from transforms.verifying import check_run, check_version

pytestmark = pytest.mark.usefixtures("one_faiss_thread")

KINDS = ("balloon", "city", "fish", "leaf")


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch):
    monkeypatch.setattr("transforms.measuring._LATENCY_QUERIES", 5)


def put(uri: str, data: bytes) -> None:
    """Write an object, in the place of one that is there."""
    storage.of(uri).delete(uri)
    assert storage.create(uri, data)


def pictures(drawn: Path, kinds=KINDS) -> dict[str, bytes]:
    return {f"{kind}/{path.name}": path.read_bytes() for kind in kinds for path in sorted((drawn / kind).iterdir())}


def upload(root: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        put(f"{root}/images/{name}", data)


def request(root: str, artifact: str, labels: str = "parent", **options) -> ReindexRequest:
    embed = real.request(f"{root}/images", f"{root}/store", artifact, labels=labels, unit_size=8)
    return ReindexRequest(embed, IndexRequest(f"{root}/store", f"{root}/index"), **options)


def write_labels(root: str, labels: dict[str, str]) -> str:
    """Write a manifest of labels by name, and return where it is."""
    lines = ["uri,label", *(f"images/{name},{label}" for name, label in labels.items())]
    put(f"{root}/labels.csv", "\n".join(lines).encode())
    return f"{root}/labels.csv"


def night(root: str, artifact: str, labels: str = "parent", report: Report | None = None, **options) -> Report:
    asked = request(root, artifact, labels, **options)
    report = report or Report(asked.index.store, asked.index.index)
    reindex.run(asked, Runner((), Timed(Silent(), report)), report)
    report.end()
    return report


def lenient(**options) -> Tolerance:
    """Few pictures, and a random network: precision by label may be what it is."""
    return Tolerance(**{"max_precision_drop": 1.0, **options})


def current(root: str) -> str | None:
    found = read_current(f"{root}/index", "version")
    return found[0] if found else None


def answers(root: str) -> dict[str | None, list[tuple[str, str | None]]]:
    """Ask with every vector of the store; give uris and labels of the answers by the uri asked with."""
    live = live_rows(f"{root}/store", load_run_manifest(f"{root}/store"))
    found = Index.open(f"{root}/index").search(live.vectors(), 5)
    return {uri: [(hit.uri, hit.label) for hit in hits] for uri, hits in zip(live.column("uri"), found, strict=True)}


def maze(drawn: Path, number: int) -> bytes:
    """A picture of a kind that is not in the collection."""
    return sorted((drawn / "maze").iterdir())[number].read_bytes()


def test_nights_on_every_storage(anywhere, drawn, artifact, monkeypatch):
    """First run; nothing new; images added, changed, deleted, renamed, moved to another folder and relabelled."""
    files = pictures(drawn)
    upload(anywhere, files)
    labels = {name: name.partition("/")[0] for name in files}
    first = night(anywhere, artifact, write_labels(anywhere, labels))
    assert (first.published, first.parent, first.exit_code) == (True, None, 0)
    assert [check.name for check in first.checks] == ["recall@10", "planted queries"]
    assert first.embedded.counters["embed/embedded"] == 20
    assert first.candidate.lineage["quantizer"]["why"] == "no version was published before"
    assert current(anywhere) == first.candidate.version

    with monkeypatch.context() as nothing_runs:
        nothing_runs.setattr(Runner, "run", None)
        nothing_runs.setattr("pipelines.index.measure", None)
        again = night(anywhere, artifact, write_labels(anywhere, labels))
    assert (again.published, again.why, again.embedded.changed) == (False, "nothing changed", False)
    assert again.candidate == first.candidate
    assert set(again.seconds) == {"lease", "embed"}

    names = sorted(files)
    changed, gone, renamed, elsewhere = names[0], names[6], names[11], names[16]
    for name in (gone, renamed, elsewhere):
        storage.of(anywhere).delete(f"{anywhere}/images/{name}")
    moved = {"fish/another-name.jpg": files[renamed], f"balloon/{Path(elsewhere).name}": files[elsewhere]}
    upload(anywhere, {changed: maze(drawn, 0), "city/new.jpg": maze(drawn, 1), **moved})
    labels |= {"city/new.jpg": "new", names[2]: "other", names[8]: "other"}
    second = night(anywhere, artifact, write_labels(anywhere, labels), tolerance=lenient())
    counts = second.embedded.manifest.accounting
    assert second.embedded.counters["embed/embedded"] == counts.embedded == 4  # changed, new, and two under new names
    assert (counts.listed, counts.reused, counts.gone) == (20, 16, 3)
    lineage = second.candidate.lineage
    assert lineage["changes"] == dataclasses.asdict(Changes(added=3, changed=1, removed=3, reused=16, relabelled=2))
    assert (lineage["parent"], lineage["parent_run"]) == (first.candidate.version, first.embedded.manifest.run_id)
    assert lineage["embedder"] == first.candidate.embedder.fingerprint
    assert (lineage["quantizer"]["reused"], second.candidate.quantizer) == (True, first.candidate.quantizer)
    assert (second.published, current(anywhere)) == (True, second.candidate.version)

    found = answers(anywhere)
    kept = {*names, *moved, "city/new.jpg"} - {gone, renamed, elsewhere}
    assert set(found) == {f"{anywhere}/images/{name}" for name in kept}
    assert found[f"{anywhere}/images/city/new.jpg"][0] == (f"{anywhere}/images/city/new.jpg", "new")
    assert not list(check_run(f"{anywhere}/store", second.embedded.manifest))
    assert not list(check_version(f"{anywhere}/index", second.candidate))


@pytest.fixture
def root(drawn, artifact, tmp_path) -> str:
    """A folder after its first night."""
    for kind in KINDS:
        shutil.copytree(drawn / kind, tmp_path / "images" / kind)
    night(str(tmp_path), artifact)
    return str(tmp_path)


def test_other_labels_make_a_version_and_embed_nothing(root, artifact):
    before = current(root)
    report = night(root, artifact, labels="none")
    assert "embed/embedded" not in report.embedded.counters
    assert report.candidate.lineage["changes"]["relabelled"] == 20
    assert [check.name for check in report.checks] == ["recall@10", "rows", "planted queries"]
    assert report.checks[-1].current == 1.0  # what the gate wrote of the first one
    assert current(root) == report.candidate.version != before


def test_half_the_bucket_gone_is_refused_and_forced(root, artifact):
    before = current(root)
    for path in sorted(Path(root, "images").glob("*/*"))[::2]:
        path.unlink()
    report = Report(f"{root}/store", f"{root}/index")
    with pytest.raises(GateFailed, match=r"did not pass the gate and was not published: rows 10 where 16 is the least"):
        night(root, artifact, report=report, tolerance=lenient())
    assert (report.published, current(root)) == (False, before)
    refused = report.candidate
    assert load_index_manifest(f"{root}/index", refused.version) == refused, "it is finished"
    assert GateDocument.find(f"{root}/index", refused.version) is None

    with pytest.raises(GateFailed):  # the next night finds it built, and judges again
        night(root, artifact, tolerance=lenient())
    forced = night(root, artifact, tolerance=lenient(), force=True)
    assert (forced.published, forced.forced, forced.why) == (True, True, "the gate was overruled")
    assert forced.candidate == refused
    assert current(root) == refused.version
    document = GateDocument.find(f"{root}/index", refused.version)
    assert document.forced
    assert [check.name for check in document.checks if not check.passed] == ["rows"]
    assert night(root, artifact).why == "nothing changed"


def test_an_embedder_that_sees_nothing_is_refused(root, artifact, blind):
    before = current(root)
    with pytest.raises(GateFailed, match=r"P@1 by label 0\.\d+ where"):
        night(root, blind)
    assert current(root) == before
    assert night(root, artifact).candidate.version == before, "and yesterday's embedder goes on where it was"


def test_a_run_killed_between_store_and_index_is_made_up_for(root, artifact, drawn, monkeypatch):
    upload(root, {"city/new.jpg": maze(drawn, 1)})
    with monkeypatch.context() as killed:

        def die(*_):
            raise KeyboardInterrupt

        killed.setattr(reindex, "judge", die)
        with pytest.raises(KeyboardInterrupt):
            night(root, artifact)
    report = night(root, artifact, tolerance=lenient())
    assert (report.embedded.changed, report.published) == (False, True)
    assert report.candidate.rows == 21


def test_a_publication_by_somebody_else_is_not_overwritten(root, artifact, drawn, monkeypatch):
    """A hand that moves the pointer takes no lease."""
    upload(root, {"city/new.jpg": maze(drawn, 1)})
    judge = reindex.judge

    def meanwhile(*arguments):
        found = read_current(f"{root}/index", "version")
        uri = f"{root}/index/CURRENT"
        storage.of(uri).swap_pointer(uri, b'{"version": "by-hand"}', found[1])
        return judge(*arguments)

    monkeypatch.setattr(reindex, "judge", meanwhile)
    with pytest.raises(Conflict, match="was published by another run meanwhile"):
        night(root, artifact, tolerance=lenient())
    assert current(root) == "by-hand"


def test_a_run_at_work_is_not_disturbed(root, artifact):
    for held in ("store", "index"):
        with (
            leased(f"{root}/{held}", "embed"),
            pytest.raises(LeaseHeld, match=f"{held} is in use by `lookalike embed`"),
        ):
            night(root, artifact)
    assert night(root, artifact).why == "nothing changed"


def test_wrong_requests_are_refused(root, artifact):
    good = request(root, artifact)
    with pytest.raises(UsageError, match="--index is the store"):
        dataclasses.replace(good, index=IndexRequest(good.index.store, good.index.store))
    with pytest.raises(UsageError, match="name one store"):
        dataclasses.replace(good, index=IndexRequest("elsewhere", good.index.index))
    with pytest.raises(UsageError, match="--max-drift is -1; take 0 or more"):
        request(root, artifact, max_drift=-1.0)
