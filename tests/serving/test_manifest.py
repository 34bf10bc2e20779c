"""Documents survive a round trip whole, and damage of any kind is one clear error."""

import copy
import dataclasses
import gc
import importlib
import json
import re
import types
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from signed import edit, sign

from serving import storage
from serving.errors import ChecksumMismatch, FormatError, NotFound, UnsupportedVersion, UsageError
from serving.manifest import (
    Accounting,
    Document,
    EmbedderRef,
    FileEntry,
    IndexManifest,
    RunManifest,
    built_with,
    load_index_manifest,
    load_run_manifest,
    move_current,
    now,
)

ROOT = Path(__file__).parents[2]
URI = "/somewhere/document.json"


def defining_modules() -> Iterator[str]:
    for path in sorted(ROOT.glob("*/*.py")):
        if path.parent.name in ("serving", "transforms", "pipelines", "jobs") and "(Document)" in path.read_text():
            yield f"{path.parent.name}.{path.stem}"


def document_classes() -> dict[str, type[Document]]:
    """Every kind of document in every room, by name."""
    for module in defining_modules():
        importlib.import_module(module)
    gc.collect()  # dataclass(slots=True) makes a class twice
    return {kind.__name__: kind for kind in Document.__subclasses__() if not kind.__module__.startswith("test")}


DOCUMENTS = document_classes()


def example(kind: Any, full: bool) -> Any:
    """Make a value of an annotated type; where something may be absent, it is there if `full`."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: example(hints[field.name], full) for field in dataclasses.fields(kind)})
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return example(args[0], full) if full else None
    if origin is tuple:
        times = (3 if full else 0) if args[-1] is Ellipsis else 1
        return tuple(example(arg, full) for arg in args if arg is not Ellipsis) * times
    if origin is Literal:
        return args[-1 if full else 0]
    if origin is dict:
        return {"größe": 1, "~": 2} if full else {}
    return {str: 'ü "quoted"\n日本', int: 2**53 + 1, bool: True, float: 0.1, Any: [1, {"x": None}]}[kind]


@pytest.fixture(params=DOCUMENTS)
def kind(request: pytest.FixtureRequest) -> type[Document]:
    return DOCUMENTS[request.param]


@dataclasses.dataclass(frozen=True, slots=True)
class Small(Document):
    FORMAT = 3
    name: str
    size: tuple[int, int] = (0, 0)
    note: str | None = None


def small(**values: Any) -> Small:
    return Small.from_json(sign({"format_version": 3, "name": "a", **values}), URI)


# --- Round trips ----------------------------------------------------------------------------------------------------


def test_the_documents_are_all_here():
    assert {"IndexManifest", "RunManifest", "EmbedderDocument", "TrainedDocument", "ShardDocument"} <= set(DOCUMENTS)


@pytest.mark.parametrize("full", [True, False])
def test_every_document_survives_a_round_trip(kind, full):
    document = example(kind, full)
    found = kind.from_json(document.to_json(), URI)
    assert found == document
    assert found.to_json() == document.to_json()


def test_a_document_is_one_line_of_json_a_key_for_people_to_read(kind):
    data = example(kind, True).to_json()
    assert data.endswith(b"}\n")
    keys = list(json.loads(data))
    assert keys == sorted(keys)
    assert json.loads(data)["format_version"] == kind.FORMAT
    assert len(data.splitlines()) > len(keys)


def test_a_document_is_loaded_from_where_it_was_written(kind, tmp_path):
    uri = str(tmp_path / "document.json")
    document = example(kind, True)
    storage.create(uri, document.to_json())
    assert kind.load(uri) == document
    with pytest.raises(NotFound, match=f"{uri}x does not exist"):
        kind.load(f"{uri}x")


def test_what_is_absent_has_its_default():
    assert small() == Small("a")
    assert small(size=[1, 2], note="b", later={"key": 1}) == Small("a", (1, 2), "b")


# --- Damage ---------------------------------------------------------------------------------------------------------


def places(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every way down into a JSON value."""
    for key in body if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ():
        yield (*path, key)
        yield from places(body[key], (*path, key))


def changed(body: Any, path: tuple[Any, ...], value: Any) -> bytes:
    other = copy.deepcopy(body)
    inner = other
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return sign(other)


def unsigned(document: Document) -> dict[str, Any]:
    return {key: value for key, value in json.loads(document.to_json()).items() if key != "checksum"}


def test_a_value_of_another_type_is_damage_or_fits(kind):
    body = unsigned(example(kind, True))
    refusals = []
    for path in places(body):
        for value in (None, "text", 7, [], {}, [[]], [None], {"key": 1}):
            try:
                assert isinstance(kind.from_json(changed(body, path, value), URI), kind)
            except FormatError as error:
                refusals.append(str(error))
    assert len(refusals) > 3 * len(dataclasses.fields(kind))
    assert all(sentence.startswith(URI) for sentence in refusals)


def test_a_missing_key_is_named(kind):
    body = unsigned(example(kind, True))
    for field in dataclasses.fields(kind):
        if field.default is field.default_factory is dataclasses.MISSING:
            without = {key: value for key, value in body.items() if key != field.name}
            with pytest.raises(FormatError, match=f"{URI} is damaged: .*'{field.name}'"):
                kind.from_json(sign(without), URI)


def test_a_changed_value_is_no_match_for_the_checksum(kind):
    body = json.loads(example(kind, True).to_json())
    for path in places(unsigned(example(kind, True))):
        if path != ("format_version",):
            other = copy.deepcopy(body)
            inner = other
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = "another"
            with pytest.raises(ChecksumMismatch, match=f"{URI} is damaged: its checksum is not that of its content"):
                kind.from_json(json.dumps(other).encode(), URI)


@pytest.mark.parametrize("checksum", ["", "0" * 64, None, 3, []])
def test_another_checksum_is_refused(checksum):
    body = {**json.loads(Small("a").to_json()), "checksum": checksum}
    with pytest.raises(ChecksumMismatch, match=f"{URI} is damaged"):
        Small.from_json(json.dumps(body).encode(), URI)


def test_a_document_without_a_checksum_is_refused(kind):
    with pytest.raises(FormatError, match=f"{URI} is damaged: it has no checksum"):
        kind.from_json(json.dumps(unsigned(example(kind, True))).encode(), URI)


def test_a_document_may_be_laid_out_anew(kind, tmp_path):
    document = example(kind, True)
    (tmp_path / "document").write_bytes(document.to_json())
    edit(tmp_path / "document", later={"key": 1})
    assert kind.load(str(tmp_path / "document")) == document


@pytest.mark.parametrize("data", [b"", b"{", b"garbage", b"\xff\xfe", b"null", b"3", b"[1]", b'["x"]', b'"x"', b"{}"])
def test_what_is_no_document_is_refused(kind, data):
    with pytest.raises(FormatError, match=f"{URI} is not a manifest of this project, or it is damaged"):
        kind.from_json(data, URI)


def test_a_cut_document_is_refused(kind):
    data = example(kind, True).to_json()
    for end in range(0, len(data) - 2, 7):
        with pytest.raises(FormatError):
            kind.from_json(data[:end], URI)


@pytest.mark.parametrize(
    ("found", "advice"), [(99, "upgrade lookalike"), (4, "upgrade lookalike"), (2, "build it again"), ("x", "build")]
)
def test_other_versions_are_refused(found, advice):
    with pytest.raises(UnsupportedVersion, match=f"{URI} has format version {found}, this release reads 3; {advice}"):
        small(format_version=found)


@pytest.mark.parametrize("size", [[1], [1, 2, 3], "12", {"1": 2}, 1, [1, "2"], None])
def test_a_tuple_has_its_length_and_kinds(size):
    with pytest.raises(FormatError, match=f"{URI} is damaged"):
        small(size=size)


# --- Files ----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_and_checked(tmp_path):
    (tmp_path / "part").write_bytes(b"bytes")
    entry = FileEntry.of("part", b"bytes")
    assert (entry.size, entry.sha256) == (5, storage.sha256(b"bytes"))
    assert entry.read(str(tmp_path)) == b"bytes"
    entry.check(str(tmp_path))
    assert FileEntry.of("a/empty", b"").size == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"bites", "is damaged: its checksum is not the manifest's; restore it"),
        (b"byte", "has 4 bytes, its manifest names 5; restore it"),
        (b"b" * 12345, "has 12,345 bytes, its manifest names 5"),
        (b"", "has 0 bytes"),
    ],
)
@pytest.mark.parametrize("way", [FileEntry.read, FileEntry.check])
def test_a_file_of_other_bytes_is_refused(tmp_path, content, sentence, way):
    (tmp_path / "part").write_bytes(content)
    with pytest.raises(ChecksumMismatch, match=re.escape(f"{tmp_path}/part {sentence}")):
        way(FileEntry.of("part", b"bytes"), str(tmp_path))


def test_a_file_of_many_blocks_is_checked_to_its_end(tmp_path):
    data = b"0123456789" * 250_000
    (tmp_path / "part").write_bytes(data)
    entry = FileEntry.of("part", data)
    entry.check(str(tmp_path))
    (tmp_path / "part").write_bytes(data[:-1] + b"x")
    with pytest.raises(ChecksumMismatch, match="part is damaged"):
        entry.check(str(tmp_path))


@pytest.mark.parametrize("way", [FileEntry.read, FileEntry.check])
def test_a_file_that_is_missing_is_named(tmp_path, way):
    with pytest.raises(NotFound, match=f"{tmp_path}/some/part does not exist"):
        way(FileEntry.of("some/part", b"bytes"), str(tmp_path))


# --- Pointers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "key", "sentence"),
    [
        (load_index_manifest, "run", "is an embedding store, not an index; name an index"),
        (load_run_manifest, "version", "is an index, not an embedding store; name an embedding store"),
    ],
)
def test_a_store_and_an_index_are_not_taken_for_each_other(tmp_path, load, key, sentence):
    move_current(str(tmp_path), key, "one", None)
    with pytest.raises(UsageError, match=f"^{tmp_path} {sentence}$"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("load", "kind", "key", "folder", "what"),
    [
        (load_index_manifest, IndexManifest, "version", "versions", "is not a published index.*`lookalike index`"),
        (load_run_manifest, RunManifest, "run", "runs", "is not an embedding store.*`lookalike embed`"),
    ],
)
def test_manifests_are_found_by_the_pointer_or_by_name(tmp_path, load, kind, key, folder, what):
    root = str(tmp_path)
    with pytest.raises(NotFound, match=f"{root} {what}"):
        load(root)
    manifest = example(kind, True)
    storage.create(storage.join(root, folder, "one", "manifest.json"), manifest.to_json())
    assert load(root, "one") == manifest
    move_current(root, key, "one", None)
    assert load(root) == manifest
    with pytest.raises(NotFound, match=f"{folder}/two/manifest.json does not exist"):
        load(root, "two")


# --- The rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "closes"),
    [((10, 4, 3, {"truncated": 2, "empty": 1}), True), ((10, 4, 3, {"truncated": 2}), False), ((0, 0, 0, {}), True)],
)
def test_the_accounting_closes_when_nothing_vanished(counts, closes):
    accounting = Accounting(*counts)
    assert accounting.closes is closes
    assert accounting.rejects == sum(counts[3].values())


@pytest.mark.parametrize(("weights", "untrained"), [("untrained:seed=0", True), ("imagenet:12", False), ("", False)])
def test_random_weights_are_known_as_such(weights, untrained):
    assert EmbedderRef("f", "b", weights).untrained is untrained


def test_what_can_change_bytes_is_recorded():
    found = built_with()
    assert {"python", "machine", "numpy", "pyarrow", "faiss-cpu"} <= set(found)
    assert all(found.values())


def test_times_are_utc():
    written = datetime.fromisoformat(now())
    assert written.utcoffset() == timedelta(0)
    assert abs(written - datetime.now(written.tzinfo)) < timedelta(minutes=1)
