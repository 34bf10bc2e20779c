"""Merging ever more partials into a few shards: what time and memory that takes.

`benchmarks.build` prints the table. The quantizer keeps codes of whole vectors too, so that a shard is large beside
everything else that a process holds.
"""

import ctypes
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks import stores
from benchmarks.watching import ask
from pipelines.index import IndexRequest, choose_designs, train_quantizer
from serving import storage
from serving.manifest import load_run_manifest
from transforms.catalog import catalog_files, part_name
from transforms.encoding import encode_part, load_quantizer, partial_bytes, partial_uri
from transforms.merging import MergeSettings, merge_shard
from transforms.schema import read_parquet, to_parquet

PARTIALS = (4, 16, 64)
HEADERS = ("partials", "rows", "shards", "seconds", "rows/s", "peak MiB above the start", "MiB of one shard")
_SHARDS = 4
_LISTS, _SAMPLE = 16, 8192
_ROW_GROUP = 16_384


def merge_rows(
    folder: Path, vectors: Path, partials: Sequence[int] = PARTIALS, rounds: int = 3
) -> list[tuple[object, ...]]:
    """Merge partials of a store of the rows of a .npy file; return rows of the table.

    Time is the median of the rounds, of all shards one after the other; the peak is that of a process that did them
    all, above what it had when partials were yet to be read. The store is kept in `folder`.
    """
    count = len(np.load(vectors, mmap_mode="r"))
    store, work = folder.absolute() / f"store-{max(partials)}", folder.absolute() / "merging"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if not (store / "CURRENT").exists():
        stores.write_store(store, vectors, part_rows=count // max(partials))
    parts, catalog, trained = _prepare(str(store), str(work))
    rows: list[tuple[object, ...]] = []
    for wanted in partials:
        chosen = evenly(parts, wanted)
        live = catalog.filter(pc.is_in(catalog["part"], pa.array(chosen)))
        file = work / f"catalog-{wanted}.parquet"
        storage.create(str(file), to_parquet(live, row_group=_ROW_GROUP))
        _encode(str(store), str(work), trained, chosen)
        _, found = ask("benchmarks.merges", work / f"{wanted}.log", work, trained, _SHARDS, file, rounds)
        mib = (round(found[name] / 2**20, 1) for name in ("peak_bytes", "shard_bytes"))
        rows.append((wanted, len(live), _SHARDS, round(found["seconds"], 3), round(len(live) / found["seconds"]), *mib))
    shutil.rmtree(work)
    return rows


def growth(rows: Sequence[Sequence[Any]]) -> str:
    """Say how rows, time and memory grow from the first row of the table to the last."""
    first, last = rows[0], rows[-1]
    names = {"rows": 1, "seconds": 3, "peak": 5}
    times = ", ".join(f"{name} × {last[place] / first[place]:.1f}" for name, place in names.items() if first[place])
    return f"from {first[0]} to {last[0]} partials: {times}; each shard reads every partial"


def evenly(parts: Sequence[tuple[str, int]], wanted: int) -> list[str]:
    """Choose names of parts, given with their rows, so that few of them hold about as many rows each as many do."""
    ordered = sorted(parts, key=lambda part: (part[1], part[0]))
    return [ordered[(2 * number + 1) * len(ordered) // (2 * wanted)][0] for number in range(wanted)]


def _prepare(store: str, index: str) -> tuple[list[tuple[str, int]], pa.Table, str]:
    """Train a quantizer; return the parts with their rows, the catalog, and the quantizer's id."""
    source = load_run_manifest(store)
    request = IndexRequest(store, index, nlist=_LISTS, recall_against="raw")
    shape = choose_designs(request, source)[0]
    trained = train_quantizer(request, source, replace(shape, sample=min(shape.sample, _SAMPLE)))
    catalog = pa.concat_tables([read_parquet(uri) for uri in catalog_files(store, source)])
    counted = catalog["part"].value_counts().to_pylist()
    return [(part["values"], part["counts"]) for part in counted], catalog, trained.quantizer


def _encode(store: str, index: str, trained: str, parts: Sequence[str]) -> None:
    """Write the partials that are not there yet."""
    quantizer, source = load_quantizer(index, trained), load_run_manifest(store)
    for part in parts:
        target = partial_uri(index, trained, f"{part}.parquet")
        if not storage.exists(target):
            table = encode_part(storage.join(store, part_name(source.embedder.fingerprint, part)), quantizer)
            storage.create(target, partial_bytes(table, trained))


def _merge(index: str, trained: str, shards: int, catalog: str, rounds: int) -> dict[str, Any]:
    """Merge all shards in this process, again in each round, and say what that took."""
    quantizer, seconds, largest = load_quantizer(index, trained), [], 0
    ctypes.CDLL(None).malloc_trim(0)
    # The kernel's own peak, begun anew here: looks from outside would miss what lasts some milliseconds.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for number in range(rounds):
        settings = MergeSettings(index, f"round-{number}", trained, shards, (catalog,))
        started = time.perf_counter()
        built = [merge_shard(shard, settings, quantizer) for shard in range(shards)]
        seconds.append(time.perf_counter() - started)
        largest = max(sum(entry.size for entry in shard.files) for shard in built)
        shutil.rmtree(settings.folder)
    taken = _status("VmHWM") - before
    return {"seconds": statistics.median(seconds), "peak_bytes": taken, "shard_bytes": largest}


def _status(name: str) -> int:
    """Return bytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


if __name__ == "__main__":
    _, _, answer, index, trained, shards, catalog, rounds = sys.argv
    Path(answer).write_text(json.dumps(_merge(index, trained, int(shards), catalog, int(rounds))))
