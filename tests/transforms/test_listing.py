import glob
import itertools
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving import storage
from serving.disk import DiskStorage
from serving.errors import AccessDenied, NotFound, UsageError
from serving.storage import Entry
from transforms import listing
from transforms.listing import Listing, is_image_name, matches, read_manifest, split_glob

ODD_NAMES = ["#", "%", "100%25", "?", "*", "**", "[1]", "[", " lead", "a b", "é", "日本", ".hidden", "\\", "a,b", '"q"']


def fill(root, names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return str(root)


def listed(*inputs, **options):
    """List, and give uris relative to the first input's folder, with their labels."""
    refs = list(Listing([str(uri) for uri in inputs], **options))
    assert [ref.uri for ref in refs] == sorted({ref.uri for ref in refs})
    return {ref.uri: ref.label for ref in refs}


def below(root, names):
    return {f"{root}/{name}" for name in names}


class FakeBucket:
    """Objects by uri, as a remote store lists them."""

    def __init__(self, *uris):
        self.uris = uris

    def list(self, uri):
        return iter([Entry(key, 1, "e", 0) for key in sorted(self.uris) if key.startswith(f"{uri}/")])

    def stat(self, uri):
        if uri not in self.uris:
            raise NotFound(f"{uri} does not exist")
        return Entry(uri, 1, "e", 0)


@pytest.fixture
def bucket(monkeypatch):
    """Put objects into the one bucket there is."""

    def put(*uris):
        fake = FakeBucket(*uris)
        monkeypatch.setattr(storage, "of", lambda _uri: fake)

    return put


# Folders


def test_a_folder_gives_its_pictures_at_any_depth_labelled_by_their_folder(tmp_path):
    root = fill(tmp_path, ["b.jpg", "a/x.PNG", "a/b/y.webp", "a.jpg", "readme.txt", "a/model.bin", "noending"])
    images = Listing([root])
    refs = list(images)
    assert [(ref.uri, ref.label) for ref in refs] == [
        (f"{root}/a.jpg", None),
        (f"{root}/a/b/y.webp", "b"),
        (f"{root}/a/x.PNG", "a"),
        (f"{root}/b.jpg", None),
    ]
    assert images.skipped == 3
    assert list(images) == refs
    assert images.skipped == 3, "counted anew each time"


def test_a_reference_says_which_version_was_listed(tmp_path):
    root = fill(tmp_path, ["a.jpg"])
    os.utime(f"{root}/a.jpg", ns=(1, 1_234_567_891_234_567_891))
    (ref,) = Listing([root])
    entry = storage.of(root).stat(f"{root}/a.jpg")
    assert (ref.uri, ref.etag, ref.size, ref.updated) == (entry.uri, entry.etag, 5, 1_234_567_891_234_567)


@pytest.mark.parametrize("folder", ODD_NAMES)
def test_odd_names_are_taken_literally(tmp_path, folder):
    names = [f"{folder}/{name}.jpg" for name in ODD_NAMES]
    root = fill(tmp_path, names)
    assert listed(root) == {f"{root}/{name}": folder for name in names}
    assert set(listed(f"{root}/{folder}")) == below(root, names)
    assert set(listed(f"{root}/{folder}/{folder}.jpg")) == {f"{root}/{folder}/{folder}.jpg"}


def test_all_files_are_listed_on_request(tmp_path):
    root = fill(tmp_path, ["a.jpg", "noending", "b.txt"])
    images = Listing([root], all_files=True)
    assert {ref.uri for ref in images} == below(root, ["a.jpg", "noending", "b.txt"])
    assert images.skipped == 0


def test_one_file_is_listed_whatever_it_is_called(tmp_path):
    root = fill(tmp_path, ["picture", "a.jpg"])
    assert listed(f"{root}/picture") == {f"{root}/picture": None}


def test_labels_can_be_left_out(tmp_path):
    root = fill(tmp_path, ["a/x.jpg"])
    assert listed(root, labels="none") == {f"{root}/a/x.jpg": None}


@pytest.mark.parametrize("name", ["a.jpg", "A.JPEG", "b.tiff", "c.heic", "d.jxl", ".jpg", "x.y.svg"])
def test_names_of_pictures(name):
    assert is_image_name(f"/x/{name}")


@pytest.mark.parametrize("name", ["a.txt", "jpg", "a.jpg.gz", "a", "a.mp4", "jpg/readme"])
def test_names_of_other_files(name):
    assert not is_image_name(f"/x/{name}")


def test_an_empty_folder_lists_nothing_and_a_missing_one_is_named(tmp_path):
    assert listed(tmp_path) == {}
    with pytest.raises(NotFound, match="nowhere"):
        list(Listing([f"{tmp_path}/nowhere"]))


def test_nothing_to_list_is_an_error():
    with pytest.raises(UsageError, match="no images were named"):
        Listing([])


def test_the_root_folder_labels_like_any_other(monkeypatch):
    entries = [Entry(uri, 1, "e", 0) for uri in ("/a.jpg", "/photos/b.jpg", "/zz1/c.jpg")]
    monkeypatch.setattr(storage, "list_entries", lambda _root: iter(entries))
    assert listed("/") == {"/a.jpg": None, "/photos/b.jpg": "photos", "/zz1/c.jpg": "zz1"}
    assert listed("/zz*/c.jpg") == {"/zz1/c.jpg": "zz1"}
    assert listed("/*.jpg") == {"/a.jpg": None}


# Several inputs


def test_inputs_are_merged_in_order_and_a_uri_listed_twice_comes_once(tmp_path):
    root = fill(tmp_path, ["a/x.jpg", "a/b/y.jpg", "c/z.jpg", "a.jpg"])
    assert listed(f"{root}/c", root, f"{root}/a", f"{root}/a/*.jpg") == {
        f"{root}/a.jpg": None,
        f"{root}/a/b/y.jpg": "b",
        f"{root}/a/x.jpg": "a",
        f"{root}/c/z.jpg": "c",
    }


def test_labels_do_not_depend_on_the_order_of_overlapping_inputs(tmp_path):
    root = fill(tmp_path, ["a/x.jpg", "a/b/y.jpg", "a/b/z.jpg"])
    manifest = write_manifest(root, "csv", [("a/b/y.jpg", "why"), ("a/b/z.jpg", None)])
    for inputs in itertools.permutations([root, f"{root}/a", f"{root}/a/b", f"{root}/a/x.jpg", manifest]):
        assert list(listed(*inputs).values()) == ["why", "b", "a"]


def test_random_inputs_come_out_sorted_and_once(tmp_path):
    rng = random.Random(5)
    names = {"/".join(rng.choices("ab!~é", k=rng.randint(1, 3))) + f"{n}.jpg" for n in range(60)}
    root = fill(tmp_path, names)
    folders = sorted({str(Path(root, name).parent) for name in names})
    for _ in range(20):
        inputs = rng.choices(folders, k=rng.randint(1, 5))
        expected = {uri for uri in below(root, names) if any(uri.startswith(f"{folder}/") for folder in inputs)}
        assert set(listed(*inputs)) == expected


# Globs

TREE = [
    "a.jpg",
    "b.png",
    "c.txt",
    "x/a.jpg",
    "x/.h.jpg",
    "x/y/a.jpg",
    "x/y/z/b.jpg",
    ".d/a.jpg",
    "xy/a1.jpg",
    "é/[1].jpg",
]


@pytest.mark.parametrize(
    "pattern",
    [
        "*", "*.jpg", "?.jpg", "x/*.jpg", "*/a.jpg", "*/*", "**", "**/*.jpg", "**/a.jpg", "x/**", "x/**/*.jpg",
        "x/**/a.jpg", "**/y/**", "**/**/b.jpg", "[ab].*", "[!a].*", "x*/a*.jpg", "x?/*", "é/*", "é/[[]1].jpg",
        "nothing*",
    ],
)  # fmt: skip
def test_globs_agree_with_the_shell(tmp_path, pattern):
    root = fill(tmp_path, TREE)
    found = glob.glob(pattern, root_dir=root, recursive=True, include_hidden=True)
    assert set(listed(f"{root}/{pattern}")) == {f"{root}/{name}" for name in found if Path(root, name).is_file()}


def test_random_globs_agree_with_the_shell(tmp_path):
    root = fill(tmp_path, TREE)
    rng = random.Random(3)
    wild = ["*", "**", "?", "x*", "*.jpg", "[ax]*"]
    for _ in range(150):
        middle = rng.choices([*wild, "x", "y"], k=rng.randint(0, 2))
        pattern = "/".join([rng.choice(wild), *middle, rng.choice(["*", "?", "*.jpg", "[ax]*", "a.jpg"])])
        found = glob.glob(pattern, root_dir=root, recursive=True, include_hidden=True)
        expected = {f"{root}/{name}" for name in found if Path(root, name).is_file()}
        assert set(listed(f"{root}/{pattern}")) == expected, pattern


def test_a_glob_takes_whatever_it_names_and_labels_from_its_first_wildcard_on(tmp_path):
    root = fill(tmp_path, ["k/cat/1.bin", "k/dog/2.bin", "k/3.bin"])
    images = Listing([f"{root}/k/**"])
    assert [(ref.uri, ref.label) for ref in images] == [
        (f"{root}/k/3.bin", None),
        (f"{root}/k/cat/1.bin", "cat"),
        (f"{root}/k/dog/2.bin", "dog"),
    ]
    assert images.skipped == 0


def test_a_wildcard_in_a_folder_that_exists_is_literal(tmp_path):
    root = fill(tmp_path, ["[1]/a.jpg", "1/a.jpg", "1/b.jpg"])
    assert split_glob(f"{root}/[1]") == (f"{root}/[1]", None)
    assert split_glob(f"{root}/[1]/*.jpg") == (f"{root}/[1]", ("*.jpg",))
    assert split_glob(f"{root}/[2]/*.jpg") == (root, ("[2]", "*.jpg"))
    assert set(listed(f"{root}/[1]/*.jpg")) == below(root, ["[1]/a.jpg"])


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a/b", "*", False),
        ("a/b", "*/*", True),
        ("a/b", "**", True),
        ("a", "**/a", True),
        ("a/b/c/d", "**/b/**/d", True),
        ("a/b/c/d", "**/c/**/b", False),
        ("aXb", "a[!Y]b", True),
        ("A", "a", False),
        ("a*b", "a[*]b", True),
    ],
)
def test_matching_keeps_to_parts_of_the_path(path, pattern, expected):
    assert matches(tuple(path.split("/")), tuple(pattern.split("/"))) == expected


# Buckets


def test_a_prefix_of_a_bucket_is_a_folder_and_may_be_one_object(bucket):
    bucket("gs://b/p/cat/1.jpg", "gs://b/p/2.jpg", "gs://b/p2/3.jpg", "gs://b/one")
    assert listed("gs://b/p/") == {"gs://b/p/2.jpg": None, "gs://b/p/cat/1.jpg": "cat"}
    assert listed("gs://b/one") == {"gs://b/one": None}
    assert listed("gs://b/none") == {}
    assert listed("gs://b/p*/*.jpg") == {"gs://b/p/2.jpg": "p", "gs://b/p2/3.jpg": "p2"}
    assert len(listed("gs://b")) == 3


def test_a_wildcard_cannot_stand_for_a_bucket(bucket):
    bucket("gs://b/p/1.jpg")
    with pytest.raises(UsageError, match=r"gs://\*/p: the bucket's name"):
        list(Listing(["gs://*/p"]))


# Manifests


def write_manifest(folder, kind, rows):
    """Write (uri, label) rows; return the manifest's path."""
    path = Path(folder, f"list.{kind}")
    if kind == "csv":
        quoted = (",".join('"' + (value or "").replace('"', '""') + '"' for value in row) for row in rows)
        path.write_bytes(("\ufeffuri,label\r\n" + "\r\n".join(quoted) + "\r\n").encode())
    elif kind == "parquet":
        uris, labels = zip(*rows, strict=True)
        pq.write_table(pa.table({"label": labels, "uri": uris}), path)
    else:
        lines = (json.dumps({"uri": uri, "label": label}, ensure_ascii=False) for uri, label in rows)
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    return str(path)


KINDS = ["csv", "parquet", "jsonl", "ndjson"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_names_images_beside_it_or_anywhere(tmp_path, kind):
    root = fill(tmp_path / "images", ["b.jpg", "sub/a b.jpg", "é.jpg", "z"])
    rows = [("z", None), ("sub/a b.jpg", 'the "label", quoted'), (f"{root}/é.jpg", "ñ"), (f"file://{root}/b.jpg", "")]
    assert listed(write_manifest(root, kind, rows)) == {
        f"{root}/b.jpg": None,
        f"{root}/sub/a b.jpg": 'the "label", quoted',
        f"{root}/z": None,
        f"{root}/é.jpg": "ñ",
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mark", ["\n", "\u2028", "\x85", "\x0b", "\x1c", "\r\n"])
def test_only_ends_of_lines_end_a_row(tmp_path, kind, mark):
    name, label = f"a{mark}b.jpg", f"x{mark}y"
    root = fill(tmp_path, [name, "c.jpg"])
    assert listed(write_manifest(root, kind, [(name, label), ("c.jpg", None)])) == {
        f"{root}/{name}": label,
        f"{root}/c.jpg": None,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_image_is_listed_without_etag(tmp_path, kind):
    root = fill(tmp_path, ["a.jpg", "folder/b.jpg"])
    refs = list(Listing([write_manifest(root, kind, [("gone.jpg", "x"), ("a.jpg", "y"), ("folder", "z")])]))
    assert [(ref.uri, ref.etag == "", ref.size, ref.label) for ref in refs] == [
        (f"{root}/a.jpg", False, 5, "y"),
        (f"{root}/folder", True, 0, "z"),
        (f"{root}/gone.jpg", True, 0, "x"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_conflicting_labels_are_refused_and_equal_ones_are_not(tmp_path, kind):
    root = fill(tmp_path, ["a.jpg"])
    assert listed(write_manifest(root, kind, [("a.jpg", "cat"), ("./a.jpg", "cat")])) == {f"{root}/a.jpg": "cat"}
    with pytest.raises(UsageError, match=r"names .*a\.jpg twice, as 'cat' and as None; keep one"):
        listed(write_manifest(root, kind, [("a.jpg", "cat"), (f"{root}/a.jpg", None)]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_uri_is_refused(tmp_path, kind):
    with pytest.raises(UsageError, match="every row needs a `uri`"):
        listed(write_manifest(tmp_path, kind, [("a.jpg", None), ("" if kind == "csv" else None, "x")]))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("m.csv", b"path,label\na.jpg,x\n", r"must name a column `uri`; it names \['path', 'label'\]"),
        ("m.csv", b"", "must name a column `uri`"),
        ("m.csv", b"uri\n\xff\n", "cannot be read as a manifest"),
        ("m.jsonl", b'{"uri": "a.jpg"}\n{"uri": ', "cannot be read as a manifest"),
        ("m.jsonl", b'["a.jpg"]\n', "every line must be an object"),
        ("m.jsonl", b'{"path": "a.jpg"}\n', "every row needs a `uri`"),
        ("m.jsonl", b'{"uri": 7}\n', "every row needs a `uri`"),
        ("m.jsonl", b'{"uri": "a\\u0000.jpg"}\n', "m.jsonl"),
        ("m.jsonl", b'{"uri": "a\\ud800.jpg"}\n', "m.jsonl"),
        ("m.parquet", b"PAR1 and no more", "cannot be read as a manifest"),
        ("m.csv", b"uri\nhttp://host/a.jpg\n", "http"),
    ],
)
def test_a_broken_manifest_is_one_sentence_naming_it(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=said):
        list(Listing([f"{tmp_path}/{name}"]))


def test_a_damaged_parquet_manifest_is_one_sentence_too(tmp_path):
    path = Path(write_manifest(tmp_path, "parquet", [("a.jpg", "x")]))
    data = bytearray(path.read_bytes())
    data[-200:-100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"list\.parquet cannot be read as a manifest"):
        read_manifest(str(path))


def test_a_parquet_manifest_needs_the_column_uri_and_no_other(tmp_path):
    root = fill(tmp_path, ["a.jpg"])
    pq.write_table(pa.table({"uri": ["a.jpg"], "size": [7]}), f"{root}/m.parquet")
    assert listed(f"{root}/m.parquet") == {f"{root}/a.jpg": None}
    pq.write_table(pa.table({"image": ["a.jpg"]}), f"{root}/m.parquet")
    with pytest.raises(UsageError, match=r"needs a column `uri`; it has \['image'\]"):
        read_manifest(f"{root}/m.parquet")


def test_labels_that_are_numbers_become_words(tmp_path):
    pq.write_table(pa.table({"uri": ["a", "b"], "label": [0, None]}), tmp_path / "m.parquet")
    assert read_manifest(f"{tmp_path}/m.parquet") == [(f"{tmp_path}/a", "0"), (f"{tmp_path}/b", None)]


def test_a_jsonl_manifest_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'\xef\xbb\xbf{"uri": "a.jpg"}\n')
    assert read_manifest(f"{tmp_path}/m.jsonl") == [(f"{tmp_path}/a.jpg", None)]


def test_a_manifest_labels_the_images_of_a_folder(tmp_path):
    root = fill(tmp_path / "images", ["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    labels = write_manifest(tmp_path, "csv", [("images/a/1.jpg", "one"), ("images/b/3.jpg", "three"), ("no.jpg", "no")])
    assert listed(root, labels=labels) == {
        f"{root}/a/1.jpg": "one",
        f"{root}/a/2.jpg": None,
        f"{root}/b/3.jpg": "three",
    }


def test_a_manifest_among_the_inputs_keeps_its_own_labels(tmp_path):
    root = fill(tmp_path, ["a/1.jpg", "b/2.jpg"])
    manifest = write_manifest(root, "csv", [("b/2.jpg", "two")])
    assert listed(manifest, f"{root}/a") == {f"{root}/a/1.jpg": None, f"{root}/b/2.jpg": "two"}


def test_a_manifest_that_is_not_there_is_named_at_once(tmp_path):
    with pytest.raises(NotFound, match=r"parents\.csv"):
        Listing([str(tmp_path)], labels=f"{tmp_path}/parents.csv")


@pytest.mark.parametrize("word", ["parnt", "Parent", "", "."])
def test_labels_that_are_neither_a_word_nor_a_manifest_are_refused(tmp_path, word):
    with pytest.raises(UsageError, match=rf"--labels is {word}; it takes parent, none, or a manifest .* \.csv"):
        Listing([str(tmp_path)], labels=word)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_called_like_a_manifest_is_a_folder(tmp_path, bucket, kind):
    root = fill(tmp_path, [f"photos.{kind}/a.jpg"])
    assert listed(f"{root}/photos.{kind}") == {f"{root}/photos.{kind}/a.jpg": None}
    bucket(f"gs://b/photos.{kind}/a.jpg")
    assert listed(f"gs://b/photos.{kind}") == {f"gs://b/photos.{kind}/a.jpg": None}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_out_of_reach_is_listed_without_etag(tmp_path, monkeypatch, kind):
    root = fill(tmp_path, ["a.jpg", "secret.jpg"])
    manifest = write_manifest(root, kind, [("a.jpg", "x"), ("n" * 300, "y"), ("secret.jpg", "z")])
    stat = DiskStorage.stat

    def guarded(disk, uri):
        if "secret" in uri:
            raise AccessDenied(f"{uri}: permission denied")
        return stat(disk, uri)

    monkeypatch.setattr(DiskStorage, "stat", guarded)
    assert [(ref.label, ref.etag == "") for ref in Listing([manifest])] == [("x", False), ("y", True), ("z", True)]


def test_many_images_of_a_manifest_keep_the_order_of_uris(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "_STATS_AHEAD", 30)
    names = [f"{number:03}.jpg" for number in range(200)]
    root = fill(tmp_path, names)
    shuffled = random.Random(1).sample(names, len(names))
    refs = list(Listing([write_manifest(root, "csv", [(name, name) for name in shuffled])]))
    assert [ref.uri for ref in refs] == [f"{root}/{name}" for name in names]
    assert all(ref.uri.endswith(ref.label) for ref in refs)


def test_a_manifest_is_not_looked_up_whole_before_its_first_image(tmp_path, bucket, monkeypatch):
    names = [f"{number:05}.jpg" for number in range(5000)]
    manifest = write_manifest(tmp_path, "csv", [(f"gs://b/{name}", None) for name in names])
    data = storage.read(manifest)
    bucket()
    monkeypatch.setattr(storage, "read", lambda _uri: data)
    asked = []
    monkeypatch.setattr(FakeBucket, "stat", lambda _self, uri: asked.append(uri) or Entry(uri, 1, "e", 0))
    refs = iter(Listing([manifest]))
    assert next(refs).uri == "gs://b/00000.jpg"
    assert len(asked) < 2000
    assert [ref.uri for ref in refs] == [f"gs://b/{name}" for name in names[1:]]
    assert len(asked) == 5000
