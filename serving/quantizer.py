"""The trained quantizer: how a vector becomes a list number and codes, for the batch side and for queries.

On disk it is one FAISS index without vectors: a chain of transforms (L2-normalise, centred PCA, L2-normalise), then
inverted lists, and around them 8-bit scalar codes for ranking again. An index that is faithful to the raw vectors has
all this, but the first normalisation, inside one more ranking, by codes of the whole vectors. A collection too small
to train on has one inverted list of whole vectors and no second ranking: the same shape, exact.
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
    """What an index keeps of some vectors: uint8 `[N, list number + code]`, `[N, refine]` and `[N, raw]` or None."""

    codes: npt.NDArray[np.uint8]
    refine: npt.NDArray[np.uint8] | None
    raw: npt.NDArray[np.uint8] | None = None


class Quantizer:
    """A trained transform, coarse quantizer and codebooks. Its `id` is the hash of its bytes."""

    def __init__(self, data: bytes) -> None:
        self._index = _read(data)
        self.id = storage.sha256(data)[:16]
        self.chain = _chain(self._index)
        inner = faiss.downcast_index(self._index.index)
        self.raw: Any = None
        if isinstance(inner, faiss.IndexRefine) and isinstance(_base(inner), faiss.IndexPreTransform):
            self.raw, whole = faiss.downcast_index(inner.refine_index), _base(inner)
            self.chain += _chain(whole)
            inner = faiss.downcast_index(whole.index)
        refined = isinstance(inner, faiss.IndexRefine)
        self.ivf = _base(inner) if refined else inner
        if not isinstance(self.ivf, faiss.IndexIVF):
            raise FormatError(f"the trained quantizer holds {type(self.ivf).__name__} in place of inverted lists")
        self.refine: Any = faiss.downcast_index(inner.refine_index) if refined else None
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
        return int(self.refine.sa_code_size()) if self.refine is not None else 0

    @property
    def raw_size(self) -> int:
        """Return the bytes of the code of a whole vector; 0 when none is kept."""
        return int(self.raw.sa_code_size()) if self.raw is not None else 0

    @property
    def centroids(self) -> npt.NDArray[np.float64]:
        """Return the centroids of the inverted lists, float64 `[nlist, reduced_dim]`."""
        if self._centroids is None:
            coarse = faiss.downcast_index(self.ivf.quantizer)
            self._centroids = coarse.reconstruct_n(0, self.ivf.nlist).astype(np.float64)
        return self._centroids

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
        refine = np.zeros((len(vectors), self.refine_size), np.uint8)
        raw = np.zeros((len(vectors), self.raw_size), np.uint8)
        for start in range(0, len(vectors), BATCH):
            rows = slice(start, start + BATCH)
            reduced = self.reduce(vectors[rows])
            codes[rows] = self._encode_lists(reduced)
            if self.refine is not None:
                refine[rows] = self.refine.sa_encode(reduced)
            if self.raw is not None:
                raw[rows] = self.raw.sa_encode(_normalize(vectors[rows].astype(np.float64)).astype(np.float32))
        return Codes(codes, None if self.refine is None else refine, None if self.raw is None else raw)

    def distortion(self, vectors: npt.NDArray[Any]) -> float:
        """Return the mean squared distance of reduced vectors `[N, dim]` from what their codes in the lists stand for.

        Reduced vectors are of length one, so 0 is perfect and 1 as good as no code at all.
        """
        reduced = self.reduce(vectors)
        decoded = np.zeros_like(reduced)
        codes = self._encode_lists(reduced)
        self.ivf.sa_decode_c(len(codes), faiss.swig_ptr(codes), faiss.swig_ptr(decoded))
        return float(np.square(reduced - decoded).sum(axis=1).mean()) if len(reduced) else 0.0

    def empty_lists(self) -> Any:
        """Return inverted lists like the trained ones, without vectors."""
        return faiss.clone_index(self.ivf)

    def empty_refine(self) -> Any:
        """Return a re-rank store like the trained one, without vectors; None where there is none."""
        return faiss.clone_index(self.refine) if self.refine is not None else None

    def empty_raw(self) -> Any:
        """Return a store of codes of whole vectors like the trained one, without vectors; None where there is none."""
        return faiss.clone_index(self.raw) if self.raw is not None else None

    def _encode_lists(self, reduced: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        lists = self._nearest_lists(reduced)
        codes = np.zeros((len(reduced), self.code_size), np.uint8)
        self.ivf.encode_vectors(
            len(reduced), faiss.swig_ptr(reduced), faiss.swig_ptr(lists), faiss.swig_ptr(codes), True
        )
        return codes

    def _nearest_lists(self, reduced: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        closeness = reduced.astype(np.float64) @ self.centroids.T
        if self.ivf.metric_type == faiss.METRIC_L2:
            closeness -= np.square(self.centroids).sum(axis=1) / 2
        return np.ascontiguousarray(closeness.argmax(axis=1), np.int64)


def _read(data: bytes) -> Any:
    try:
        index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
    except (RuntimeError, MemoryError) as error:
        raise FormatError(f"the trained quantizer cannot be read: {str(error).splitlines()[-1]}") from None
    if not isinstance(index, faiss.IndexPreTransform):
        raise FormatError(f"the trained quantizer is not a chain of transforms but {type(index).__name__}")
    return index


def _chain(index: Any) -> list[Any]:
    return [faiss.downcast_VectorTransform(index.chain.at(number)) for number in range(index.chain.size())]


def _base(index: Any) -> Any:
    return faiss.downcast_index(index.base_index)


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
