"""The trained quantizer: how a vector becomes a list number and codes, for the batch side and for queries.

On disk it is one FAISS index without vectors: a chain of transforms (L2-normalise, centred PCA, L2-normalise), then
inverted lists, and around them 8-bit scalar codes for ranking again. A collection too small to train on has one
inverted list of whole vectors and no second ranking: the same shape, exact.
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from serving import storage
from serving.errors import FormatError

BATCH = 1024
"""Rows encoded at a time; bounds memory."""


@dataclass(frozen=True, slots=True)
class Codes:
    """What an index keeps of some vectors: uint8 `[N, list number + code]`, uint8 `[N, refine]` or None."""

    codes: npt.NDArray[np.uint8]
    refine: npt.NDArray[np.uint8] | None


class Quantizer:
    """A trained transform, coarse quantizer and codebooks. Its `id` is the hash of its bytes."""

    def __init__(self, data: bytes) -> None:
        self._index = _read(data)
        self.id = storage.sha256(data)[:16]
        inner = faiss.downcast_index(self._index.index)
        refined = isinstance(inner, faiss.IndexRefine)
        self.ivf = faiss.downcast_index(inner.base_index) if refined else inner
        if not isinstance(self.ivf, faiss.IndexIVF):
            raise FormatError(f"the trained quantizer holds {type(self.ivf).__name__} in place of inverted lists")
        self._refine = faiss.downcast_index(inner.refine_index) if refined else None
        self.chain = [faiss.downcast_VectorTransform(self._index.chain.at(i)) for i in range(self._index.chain.size())]
        self._steps = [_step(transform) for transform in self.chain]
        self._centroids: npt.NDArray[np.float64] | None = None

    @property
    def dim(self) -> int:
        """Return the length of a raw vector."""
        return int(self._index.d)

    @property
    def reduced_dim(self) -> int:
        """Return the length of a reduced vector."""
        return int(self.ivf.d)

    @property
    def exact(self) -> bool:
        """Tell whether the lists hold the vectors themselves."""
        return isinstance(self.ivf, faiss.IndexIVFFlat)

    @property
    def code_size(self) -> int:
        """Return the bytes of a list number and a code."""
        return int(self.ivf.sa_code_size())

    @property
    def refine_size(self) -> int:
        """Return the bytes of a re-rank code; 0 when there is none."""
        return int(self._refine.sa_code_size()) if self._refine is not None else 0

    def reduce(self, vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Map raw vectors `[N, dim]` into the index's space, float32 `[N, reduced_dim]` of length one.

        In float64: a float32 matrix product gives a row other last bits at another place of the batch, and with them
        now and then another code; then an index would depend on how its images were cut into units.
        """
        wide = vectors.astype(np.float64, order="C")
        for step in self._steps:
            wide = step(wide)
        return wide.astype(np.float32)

    def encode(self, vectors: npt.NDArray[Any]) -> Codes:
        """Encode raw vectors `[N, dim]`; a row's codes depend on that row alone."""
        codes = np.zeros((len(vectors), self.code_size), np.uint8)
        refine = np.zeros((len(vectors), self.refine_size), np.uint8) if self._refine is not None else None
        for start in range(0, len(vectors), BATCH):
            reduced = self.reduce(vectors[start : start + BATCH])
            rows = slice(start, start + len(reduced))
            codes[rows] = self._encode_lists(reduced)
            if refine is not None and self._refine is not None:
                refine[rows] = self._refine.sa_encode(reduced)
        return Codes(codes, refine)

    def empty_lists(self) -> Any:
        """Return inverted lists like the trained ones, without vectors."""
        return faiss.clone_index(self.ivf)

    def empty_refine(self) -> Any:
        """Return a re-rank store like the trained one, without vectors; None where there is none."""
        return faiss.clone_index(self._refine) if self._refine is not None else None

    def _encode_lists(self, reduced: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        lists = self._nearest_lists(reduced)
        codes = np.zeros((len(reduced), self.code_size), np.uint8)
        self.ivf.encode_vectors(
            len(reduced), faiss.swig_ptr(reduced), faiss.swig_ptr(lists), faiss.swig_ptr(codes), True
        )
        return codes

    def _nearest_lists(self, reduced: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        if self._centroids is None:
            self._centroids = self.ivf.quantizer.reconstruct_n(0, self.ivf.nlist).astype(np.float64)
        closeness = reduced.astype(np.float64) @ self._centroids.T
        if self.ivf.metric_type == faiss.METRIC_L2:
            closeness -= np.square(self._centroids).sum(axis=1) / 2
        return np.ascontiguousarray(closeness.argmax(axis=1), np.int64)


def _read(data: bytes) -> Any:
    try:
        index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    except (RuntimeError, MemoryError) as error:
        raise FormatError(f"the trained quantizer cannot be read: {str(error).splitlines()[-1]}") from None
    if not isinstance(index, faiss.IndexPreTransform):
        raise FormatError(f"the trained quantizer is not a chain of transforms but {type(index).__name__}")
    return index


def _step(transform: Any) -> Any:
    """Return the float64 form of a FAISS transform."""
    if isinstance(transform, faiss.NormalizationTransform):
        return _normalize
    if isinstance(transform, faiss.LinearTransform):
        matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in).astype(np.float64)
        bias = faiss.vector_to_array(transform.b).astype(np.float64) if transform.have_bias else 0.0
        return lambda vectors: vectors @ matrix.T + bias
    raise FormatError(f"the trained quantizer holds a {type(transform).__name__}, which this release does not read")


def _normalize(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    return vectors / np.where(lengths > 0, lengths, 1.0)
