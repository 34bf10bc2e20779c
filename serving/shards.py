"""Read a version's shards: into memory, or mapped from local files."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from serving import records, storage
from serving.errors import ChecksumMismatch, FormatError, NotFound, StorageError, UsageError
from serving.manifest import FileEntry, IndexManifest, Shard
from serving.quantizer import Quantizer
from serving.rescoring import Rescoring, code_view

MODES = ("memory", "mmap")


@dataclass(frozen=True, slots=True)
class Segment:
    """Inverted lists of one or more shards; their ids count from 0, the rows that they mean from `start`."""

    lists: Any
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Opened:
    """Shards as they were opened: in memory one segment holds all lists, mapped there is one a shard."""

    segments: list[Segment]
    refine: Rescoring | None
    refine_index: Any
    """All re-rank codes in one FAISS index; None where they are mapped, or where there are none."""
    raw: Rescoring | None
    records: list[pa.Table]


def choose(info: IndexManifest, shards: Sequence[int] | None) -> list[Shard]:
    """Return the shards of these numbers, in order; all for None."""
    if shards is None:
        return list(info.shards)
    unknown = sorted(set(shards) - {shard.number for shard in info.shards})
    if unknown:
        raise UsageError(f"shards {unknown} are not in this index; it has 0 to {len(info.shards) - 1}")
    return [shard for shard in info.shards if shard.number in set(shards)]


def open_memory(folder: str, shards: Sequence[Shard], quantizer: Quantizer) -> Opened:
    """Load shards, every file checked against its checksum. Records and raw codes are mapped where files are local."""
    refine, packs = quantizer.empty_refine(), _packs(quantizer)
    if refine is not None:
        refine.ntotal = sum(shard.rows for shard in shards)
        refine.codes.resize(refine.ntotal * refine.code_size)  # once; growing copies what is there
    parts: list[Segment] = []
    for shard, start in zip(shards, itertools.accumulate((shard.rows for shard in shards), initial=0), strict=False):
        found = _read_faiss(folder, shard.lists)  # emptied as it is merged, which mapped lists refuse
        _check_alike(folder, shard.lists, found, quantizer.ivf, shard.rows)
        parts.append(Segment(found, start, shard.rows))
        if refine is not None:
            entry = _entry(folder, shard.refine, shard, "re-rank codes")
            found = _load_faiss(folder, entry)
            _check_alike(folder, entry, found, refine, shard.rows)  # FAISS would read past their end
            code_view(refine)[start : start + shard.rows] = code_view(found)
    segment = Segment((_packed if packs else _merged)(quantizer, parts), 0, sum(shard.rows for shard in shards))
    rescoring = None if refine is None else Rescoring(refine, [code_view(refine)], refine)
    tables = [_records(folder, shard, checked=True) for shard in shards]
    raw = _open_raw(folder, shards, quantizer, checked=True)
    return Opened([segment], rescoring, refine, raw, tables)


def _packs(quantizer: Quantizer) -> bool:
    """Tell whether the codes are such as FastScan takes."""
    return isinstance(quantizer.ivf, faiss.IndexIVFPQ) and quantizer.ivf.pq.nbits == 4


def _packed(quantizer: Quantizer, parts: Sequence[Segment]) -> Any:
    """Merge the lists of shards, which are emptied, and pack them for FastScan.

    The plain lists are put aside into a file in memory before they are packed: in the heap both would lie mixed, and
    what the plain ones leave would be half as much again as what is kept, and never given back.
    """
    merged = _merged(quantizer, parts)
    try:
        descriptor = os.memfd_create("lists")
    except (AttributeError, OSError):  # not on this system
        packed = faiss.IndexIVFPQFastScan(merged)
    else:
        path = f"/proc/self/fd/{descriptor}"
        faiss.write_index(merged, path)
        del merged
        plain = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
        os.close(descriptor)
        packed = faiss.IndexIVFPQFastScan(plain)
    packed.own_fields, packed.quantizer = False, quantizer.ivf.quantizer  # which outlives it
    return packed


def _merged(quantizer: Quantizer, parts: Sequence[Segment]) -> Any:
    """Merge the lists of shards, which are emptied."""
    merged = quantizer.empty_lists()
    for part in parts:
        merged.invlists.merge_from(part.lists.invlists, part.start)
        merged.ntotal += part.rows
    return merged


def list_ids(lists: Any, number: int) -> npt.NDArray[np.int64]:
    """Return the ids of an inverted list, without copying."""
    size = lists.list_size(number)
    if not size:
        return np.empty(0, np.int64)
    return faiss.rev_swig_ptr(lists.get_ids(number), size)  # type: ignore[no-any-return]


def open_mapped(folder: str, shards: Sequence[Shard], quantizer: Quantizer) -> Opened:
    """Map shards from local files, whose sizes are checked and whose bytes are not: they are not read yet."""
    if storage.scheme_of(folder) != "file":
        raise UsageError(f"{folder} is not on a local disk, so it cannot be mapped; copy it here, or open it in memory")
    segments, codes, keep = [], [], []
    for shard, start in zip(shards, itertools.accumulate((shard.rows for shard in shards), initial=0), strict=False):
        lists = _map_faiss(folder, shard.lists)
        _check_alike(folder, shard.lists, lists, quantizer.ivf, shard.rows)
        _lend(quantizer.ivf.quantizer, lists)
        segments.append(Segment(lists, start, shard.rows))
        if quantizer.refine is not None:
            entry = _entry(folder, shard.refine, shard, "re-rank codes")
            keep.append(_map_faiss(folder, entry))
            _check_alike(folder, entry, keep[-1], quantizer.refine, shard.rows)
            codes.append(code_view(keep[-1]))
    refine = None if quantizer.refine is None else Rescoring(quantizer.refine, codes, keep)
    tables = [_records(folder, shard, checked=False) for shard in shards]
    return Opened(segments, refine, None, _open_raw(folder, shards, quantizer, checked=False), tables)


def _open_raw(folder: str, shards: Sequence[Shard], quantizer: Quantizer, checked: bool) -> Rescoring | None:
    """Open the codes of whole vectors: mapped from local files, read from elsewhere."""
    if quantizer.raw is None:
        return None
    found = []
    for shard in shards:
        entry = _entry(folder, shard.raw, shard, "codes of whole vectors")
        found.append(_load_faiss(folder, entry) if checked else _map_faiss(folder, entry))
        _check_alike(folder, entry, found[-1], quantizer.raw, shard.rows)
    return Rescoring(quantizer.raw, [code_view(store) for store in found], found)


def _entry(folder: str, entry: FileEntry | None, shard: Shard, what: str) -> FileEntry:
    if entry is None:
        raise FormatError(f"{folder}: the manifest names no {what} for shard {shard.number}")
    return entry


def _load_faiss(folder: str, entry: FileEntry) -> Any:
    """Check a file and load it; a local one is mapped, for what is copied out of it need not be read into memory."""
    if storage.scheme_of(folder) == "file":
        entry.check(folder)
        return _map_faiss(folder, entry)
    return _read_faiss(folder, entry)


def _read_faiss(folder: str, entry: FileEntry) -> Any:
    data = np.frombuffer(entry.read(folder), np.uint8)
    try:
        return faiss.deserialize_index(data)
    except (RuntimeError, MemoryError) as error:
        raise _unreadable(folder, entry, error) from None


def _map_faiss(folder: str, entry: FileEntry) -> Any:
    path = storage.join(folder, entry.name)
    size = storage.of(path).stat(path).size
    if size != entry.size:
        raise ChecksumMismatch(f"{path} has {size:,} bytes, its manifest names {entry.size:,}; restore it")
    try:
        return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:
        raise _unreadable(folder, entry, error) from None


def _unreadable(folder: str, entry: FileEntry, error: Exception) -> FormatError:
    return FormatError(f"{storage.join(folder, entry.name)}: {str(error).splitlines()[-1]}")


def _records(folder: str, shard: Shard, checked: bool) -> pa.Table:
    uri = storage.join(folder, shard.records.name)
    if storage.scheme_of(folder) == "file":
        if checked:
            shard.records.check(folder)
        table = records.from_buffer(_map_buffer(uri), uri)
    else:
        table = records.from_buffer(shard.records.read(folder), uri)
    if len(table) != shard.rows:
        raise FormatError(f"{folder}: {shard.records.name} has {len(table)} rows, the manifest says {shard.rows}")
    return table


def _map_buffer(path: str) -> pa.Buffer:
    try:
        with pa.memory_map(path) as source:
            return source.read_buffer()
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None


def _lend(coarse: Any, lists: Any) -> None:
    """Give lists a coarse quantizer that stays its owner's, in place of the empty one out of their file."""
    # That one would live on, and the file stay mapped. Taking it over by `this.own` breaks SWIG's reference counts;
    # a chain that owns it takes it along.
    last_owner = faiss.IndexPreTransform(lists.quantizer)
    last_owner.own_fields = True
    lists.own_fields, lists.quantizer = False, coarse


def _check_alike(folder: str, entry: FileEntry, found: Any, model: Any, rows: int) -> None:
    alike = type(found) is type(model) and found.ntotal == rows and found.code_size == model.code_size
    if not alike or (isinstance(model, faiss.IndexIVF) and found.nlist != model.nlist):
        raise FormatError(f"{folder}: {entry.name} does not hold the {rows} rows of its manifest")
