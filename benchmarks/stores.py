"""An embedding store made of a file of vectors, as `lookalike embed` would have left it, in the memory of one part.

    python -m benchmarks.stores --vectors vectors.npy --store store/

Planning, parts, catalog and manifest are the project's own; only pictures and network are left out.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.names import number_of, uri_of
from serving import storage
from serving.embedder import EmbedderSpec, write_artifact
from serving.manifest import FileEntry, RunManifest, built_with, move_current, now
from transforms.catalog import commit, part_name, part_uri
from transforms.embedding import Outcome, part_table
from transforms.planning import Planner, read_unit
from transforms.schema import ImageRef, part_schema, to_parquet

PART_ROWS = 16_384
"""At most; parts come out about half as long, as units do."""
_ROW_GROUP = 512
_RUN = "generated"


def write_store(
    root: Path,
    vectors: Path,
    labels: Sequence[str | None] | None = None,
    part_rows: int = PART_ROWS,
) -> RunManifest:
    """Write a store of the rows of the .npy file `vectors`, in float16, and point CURRENT to it."""
    count, dim = np.load(vectors, mmap_mode="r").shape
    store = storage.normalize(str(root))
    made_by = EmbedderSpec("generated", "avg", f"{_RUN}:{count}", "none", (8, 8), dim, "none")
    write_artifact(storage.join(store, "embedders"), made_by, b"no model", {})
    folder = storage.join(store, "runs", _RUN, "plan")
    plan = Planner(folder, {"embedder": made_by.fingerprint}, part_rows).plan(_listing(count, labels), ())
    parts = []
    for name in plan.units:
        unit = read_unit(folder, name)
        first = number_of(unit[0].uri)
        # Mapped anew for each part: the pages of the last one go with its map.
        rows = np.load(vectors, mmap_mode="r")[first : first + len(unit)]
        outcomes = [Outcome(vector=vector) for vector in np.asarray(rows)]
        data = to_parquet(part_table(unit, outcomes, part_schema("float16")), row_group=_ROW_GROUP)
        storage.create(part_uri(store, made_by.fingerprint, name), data)
        parts.append(FileEntry.of(part_name(made_by.fingerprint, name), data))
    done = commit(store, made_by.fingerprint, _RUN, plan)
    assert done.accounting is not None
    manifest = RunManifest(
        run_id=_RUN,
        embedder=made_by.ref,
        dim=dim,
        rows=done.rows,
        live=done.live,
        parts=tuple(sorted(parts, key=lambda part: part.name)),
        catalog=tuple(done.files),
        plan=(*plan.unit_files, *plan.kept_files),
        listing_digest=plan.listing_digest,
        accounting=done.accounting,
        images=("photos",),
        parent=None,
        created=now(),
        built_with=built_with(),
    )
    storage.create(storage.join(store, "runs", _RUN, "manifest.json"), manifest.to_json())
    move_current(store, "run", _RUN, None)
    return manifest


def _listing(count: int, labels: Sequence[str | None] | None) -> Iterator[ImageRef]:
    """Yield the images in the order of their names."""
    for number in range(count):
        yield ImageRef(uri_of(number), "generated", 1, 0, labels[number] if labels else None)


def main() -> None:
    """Write a store and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, required=True, help="a .npy file, as `benchmarks.vectors` writes it")
    parser.add_argument("--store", type=Path, required=True, help="the folder to write")
    options = parser.parse_args()
    started = time.monotonic()
    manifest = write_store(options.store, options.vectors)
    print(f"{manifest.live:,} vectors in {len(manifest.parts)} parts, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
