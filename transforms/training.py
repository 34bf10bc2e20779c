"""Train a quantizer on a sample: transform, coarse quantizer, codebooks."""

import re
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from serving.errors import UsageError
from serving.rescoring import can_rescore
from serving.threads import one_thread
from transforms.designing import BITS, SUBVECTOR, Design

SALT = 0x7472_6169_6E  # sets the training sample apart from the queries that measure
_METRIC = faiss.METRIC_INNER_PRODUCT
_ROTATION_SAMPLE = 32_768
_ROTATION_ROUNDS = 10
_NEIGHBOURS = 32
_BUILD_EFFORT = 80
"""HNSW's own words for these two: M and efConstruction."""
_KMEANS_ROUNDS = 20
_WIDEST, _SEEN_ENOUGH = 0.1, 1000
"""Room on either side of the range of re-rank codes, as a share of it: at most, and times the vectors seen."""


def train(shape: Design, raw_dim: int, vectors: npt.NDArray[np.float32]) -> bytes:
    """Train on raw vectors `[N, raw_dim]` and return the serialized quantizer.

    The same vectors in the same order give the same bytes on one type of CPU, whatever the number of threads.
    """
    if shape.kind == "exact":
        return _exact(raw_dim)
    return _custom(shape.factory, raw_dim, vectors) if shape.factory else _ivf_pq(shape, raw_dim, vectors)


def stamp(quantizer: bytes, embedder: str) -> bytes:
    """Append an embedder's fingerprint, where FAISS no longer reads.

    Exact quantizers of equally long vectors are all alike; with the stamp each embedder's has its own id.
    """
    return quantizer + f"embedder {embedder}\n".encode()


def _exact(raw_dim: int) -> bytes:
    """One inverted list of whole vectors: a search visits them all."""
    coarse = faiss.IndexFlatIP(raw_dim)
    coarse.add(np.zeros((1, raw_dim), np.float32))
    lists = faiss.IndexIVFFlat(coarse, raw_dim, 1, _METRIC)
    lists.is_trained = True
    return _serialize(lists, [faiss.NormalizationTransform(raw_dim)])


def _ivf_pq(shape: Design, raw_dim: int, vectors: npt.NDArray[np.float32]) -> bytes:
    first = faiss.NormalizationTransform(raw_dim)
    # Centred, not whitened: centring raises retrieval quality by label, whitening ruins it.
    pca = faiss.PCAMatrix(raw_dim, shape.dim)
    second = faiss.NormalizationTransform(shape.dim)
    with one_thread():  # the covariance's sums would depend on how threads share them
        unit = first.apply(vectors)
        pca.train(unit)
        reduced = second.apply(pca.apply(unit))
    centroids = _cluster(reduced, shape.nlist)
    with one_thread():
        rotation = _rotation(reduced, centroids)
        reduced, centroids = rotation.apply(reduced), rotation.apply(centroids)
        turned = _turned(pca, rotation)
    coarse = _coarse(centroids, shape.graph)
    lists = faiss.IndexIVFPQ(coarse, shape.dim, shape.nlist, shape.dim // SUBVECTOR, BITS, _METRIC)
    # What the centroid leaves over is coded. By inner product one look-up table still serves all lists of a query:
    # the centroid's own share is added once a list.
    lists.by_residual = True
    with one_thread():  # the lists of the sample would depend on how a product is cut
        lists.train(reduced)
    inner: Any = lists
    if shape.refine_bytes:
        inner = faiss.IndexRefine(lists, _scalar_codes(reduced))
    if not shape.raw_bytes:
        return _serialize(inner, [first, turned, second])
    within = _chained(inner, [turned, second])
    return _serialize(faiss.IndexRefine(within, _scalar_codes(unit)), [first])


def _cluster(reduced: npt.NDArray[np.float32], nlist: int) -> npt.NDArray[np.float32]:
    dim = reduced.shape[1]
    clustering = faiss.Clustering(dim, nlist)
    clustering.spherical, clustering.niter = True, _KMEANS_ROUNDS
    clustering.train(reduced, faiss.IndexFlatIP(dim))
    return faiss.vector_to_array(clustering.centroids).reshape(nlist, dim)  # type: ignore[no-any-return]


def _rotation(reduced: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32]) -> Any:
    """Turn the space so that short codes lose least of what the centroids leave over (OPQ, Ge et al. 2013)."""
    dim = reduced.shape[1]
    nearest = faiss.IndexFlatIP(dim)
    nearest.add(centroids)
    some = reduced[:_ROTATION_SAMPLE]
    _, lists = nearest.search(some, 1)
    rotation = faiss.OPQMatrix(dim, dim // SUBVECTOR)
    rotation.niter = _ROTATION_ROUNDS
    codes = faiss.ProductQuantizer(dim, dim // SUBVECTOR, BITS)  # four bits a code, as in the lists
    rotation.pq = codes
    rotation.train(some - centroids[lists[:, 0]])
    return rotation


def _turned(pca: Any, rotation: Any) -> Any:
    """Return the projection and the rotation as one linear map; a normalisation after it is none the wiser."""
    matrix = faiss.vector_to_array(pca.A).reshape(pca.d_out, pca.d_in)
    turned = faiss.LinearTransform(pca.d_in, pca.d_out, True)
    faiss.copy_array_to_vector(np.ascontiguousarray(rotation.apply(np.ascontiguousarray(matrix.T)).T).ravel(), turned.A)
    faiss.copy_array_to_vector(rotation.apply(faiss.vector_to_array(pca.b)[np.newaxis])[0], turned.b)
    turned.is_trained = True
    return turned


def _coarse(centroids: npt.NDArray[np.float32], graph: bool) -> Any:
    dim = centroids.shape[1]
    coarse = faiss.IndexHNSWFlat(dim, _NEIGHBOURS, _METRIC) if graph else faiss.IndexFlatIP(dim)
    if graph:
        coarse.hnsw.efConstruction = _BUILD_EFFORT
    with one_thread():  # a graph depends on the order in which its points come
        coarse.add(centroids)
    return coarse


def _scalar_codes(vectors: npt.NDArray[np.float32]) -> Any:
    codes = faiss.IndexScalarQuantizer(vectors.shape[1], faiss.ScalarQuantizer.QT_8bit, _METRIC)
    # What lies outside the sample's range is clamped to it: the fewer were seen, the further others may lie outside.
    codes.sq.rangestat_arg = min(_WIDEST, _SEEN_ENOUGH / len(vectors))
    codes.train(vectors)
    return codes


def _custom(key: str, raw_dim: int, vectors: npt.NDArray[np.float32]) -> bytes:
    """Build what FAISS's own key says, behind a normalisation: vectors are compared by their cosine."""
    try:
        # Lists packed for FastScan cannot be merged: they are kept plain, and packed when an index is opened.
        made = faiss.index_factory(raw_dim, re.sub(r"x4fsr?", "x4", key), _METRIC)
        first = faiss.NormalizationTransform(raw_dim)
        with one_thread():
            made.train(first.apply(vectors))
    except RuntimeError as error:
        raise UsageError(f"--index-factory {key}: FAISS cannot build it: {str(error).splitlines()[-1]}") from None
    index = faiss.downcast_index(made)  # which does not own what `made` does
    _refuse_unreadable(key, index)
    if isinstance(index, faiss.IndexPreTransform):
        return _serialize(index.index, [first, *(index.chain.at(place) for place in range(index.chain.size()))])
    return _serialize(index, [first])


def _refuse_unreadable(key: str, index: Any) -> None:
    """Refuse what FAISS can build and this package cannot search."""
    inner = index
    while isinstance(inner, faiss.IndexPreTransform | faiss.IndexRefine):
        if isinstance(inner, faiss.IndexRefine):
            if not can_rescore(faiss.downcast_index(inner.refine_index)):
                raise UsageError(f"--index-factory {key}: re-rank by Refine(SQ8), Refine(SQfp16) or RFlat")
            inner = faiss.downcast_index(inner.base_index)
        else:
            steps = [faiss.downcast_VectorTransform(inner.chain.at(place)) for place in range(inner.chain.size())]
            if not all(isinstance(step, faiss.LinearTransform | faiss.NormalizationTransform) for step in steps):
                raise UsageError(f"--index-factory {key}: transform by PCA, OPQ, RR or L2norm")
            inner = faiss.downcast_index(inner.index)
    if type(inner) not in (faiss.IndexIVFPQ, faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer):  # no kinds of these
        raise UsageError(
            f"--index-factory {key}: take inverted lists (IVF…) of PQ, SQ or Flat codes, such as "
            "PCA128,IVF1024,PQ64x4fs,Refine(SQ8)"
        )


def _chained(inner: Any, chain: list[Any]) -> Any:
    index = faiss.IndexPreTransform(inner)
    for transform in reversed(chain):
        index.prepend_transform(transform)
    index.is_trained = True
    return index


def _serialize(inner: Any, chain: list[Any]) -> bytes:
    return bytes(faiss.serialize_index(_chained(inner, chain)))
