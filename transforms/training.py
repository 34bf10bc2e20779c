"""Train a quantizer on a sample: transform, coarse quantizer, codebooks."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from serving.errors import UsageError

SALT = 0x7472_6169_6E  # sets the training sample apart from the queries that measure
BITS = 4
SUBVECTOR = 2
"""Dimensions a 4-bit code stands for: 64 codes of 4 bits for 128 dimensions."""
POINTS_PER_CENTROID = 39
"""Fewer training points per centroid than this and FAISS, rightly, complains."""
SMALLEST = POINTS_PER_CENTROID * (1 << BITS)
"""Collections below this size get an exact index: too little to train 16 centroids on."""
LARGEST_SAMPLE = 262_144


@dataclass(frozen=True, slots=True)
class Design:
    """The shape of an index: `kind` is `ivf-pq` or `exact`; `dim` counts the reduced dimensions."""

    kind: str
    dim: int
    nlist: int
    code_bytes: int
    """Of a vector's codes in the lists, without its list number."""
    sample: int
    """Vectors to train on."""


def design(rows: int, raw_dim: int, dim: int = 128, nlist: int | None = None) -> Design:
    """Choose an index for `rows` vectors of `raw_dim` dimensions, reduced to `dim`."""
    if dim < SUBVECTOR:
        raise UsageError(f"--dim is {dim}; take at least {SUBVECTOR}")
    if dim % SUBVECTOR:
        raise UsageError(f"--dim {dim} is odd; codes stand for {SUBVECTOR} dimensions each, take an even one")
    if nlist is not None and nlist < 1:
        raise UsageError(f"--nlist is {nlist}; take at least 1")
    if rows < SMALLEST:
        return Design("exact", raw_dim, 1, 4 * raw_dim, 0)
    lists = _lists_for(rows) if nlist is None else nlist
    if lists > rows // POINTS_PER_CENTROID:
        raise UsageError(f"--nlist is {lists}; {rows} vectors can train 1 to {rows // POINTS_PER_CENTROID} lists")
    dim = min(dim, min(raw_dim, rows) // SUBVECTOR * SUBVECTOR)
    needed = max(SMALLEST, dim, POINTS_PER_CENTROID * lists)  # by the codebooks, the transform, the lists
    sample = min(rows, max(needed, min(LARGEST_SAMPLE, 256 * lists)))
    return Design("ivf-pq", dim, lists, math.ceil(dim // SUBVECTOR * BITS / 8), sample)


def train(shape: Design, raw_dim: int, vectors: npt.NDArray[np.float32]) -> bytes:
    """Train on raw vectors `[N, raw_dim]` and return the serialized quantizer.

    The same vectors in the same order give the same bytes on one type of CPU, whatever the number of threads.
    """
    return _exact(raw_dim) if shape.kind == "exact" else _ivf_pq(shape, raw_dim, vectors)


def stamp(quantizer: bytes, embedder: str) -> bytes:
    """Append an embedder's fingerprint, where FAISS no longer reads.

    Exact quantizers of equally long vectors are all alike; with the stamp each embedder's has its own id.
    """
    return quantizer + f"embedder {embedder}\n".encode()


def _lists_for(rows: int) -> int:
    """Return a power of two near 4 √rows, so that lists hold some dozens to some hundreds of vectors."""
    wanted = 4 * rows**0.5
    while wanted > rows / POINTS_PER_CENTROID:
        wanted /= 2
    return int(max(1, 2 ** int(np.log2(max(1.0, wanted)))))


def _exact(raw_dim: int) -> bytes:
    """One inverted list of whole vectors: a search visits them all."""
    coarse = faiss.IndexFlatIP(raw_dim)
    coarse.add(np.zeros((1, raw_dim), np.float32))
    lists = faiss.IndexIVFFlat(coarse, raw_dim, 1, faiss.METRIC_INNER_PRODUCT)
    lists.is_trained = True
    return _serialize(lists, [faiss.NormalizationTransform(raw_dim)])


def _ivf_pq(shape: Design, raw_dim: int, vectors: npt.NDArray[np.float32]) -> bytes:
    first = faiss.NormalizationTransform(raw_dim)
    # Centred, not whitened: centring raises retrieval quality by label, whitening ruins it.
    pca = faiss.PCAMatrix(raw_dim, shape.dim)
    second = faiss.NormalizationTransform(shape.dim)
    with _one_thread():  # the covariance's sums would depend on how threads share them
        reduced = first.apply(vectors)
        pca.train(reduced)
        reduced = second.apply(pca.apply(reduced))
    coarse = faiss.IndexFlatIP(shape.dim)
    lists = faiss.IndexIVFPQ(coarse, shape.dim, shape.nlist, shape.dim // SUBVECTOR, BITS, faiss.METRIC_INNER_PRODUCT)
    lists.by_residual = False  # one look-up table a query instead of one a list visited
    lists.train(reduced)
    refine = faiss.IndexScalarQuantizer(shape.dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    refine.train(reduced)
    return _serialize(faiss.IndexRefine(lists, refine), [first, pca, second])


def _serialize(inner: Any, chain: list[Any]) -> bytes:
    index = faiss.IndexPreTransform(inner)
    for transform in reversed(chain):
        index.prepend_transform(transform)
    index.is_trained = True
    return bytes(faiss.serialize_index(index))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
