"""How a query comes into the index's space: in float32, and for a single one without an allocation.

The batch side reduces in float64 (`Quantizer.reduce`), so that codes do not depend on a row's place in a batch; a
query needs no more than float32, whose last bits no ranking sees.
"""

import math
import threading
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from serving.errors import FormatError

Floats = npt.NDArray[np.float32]


class _Map:
    """One linear map of the chain, and whether what enters it is brought to length one."""

    def __init__(self, transform: Any, normalized: bool) -> None:
        self.matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in).copy()
        self.bias = faiss.vector_to_array(transform.b).copy() if transform.have_bias else None
        self.normalized = normalized
        self.pointer = faiss.swig_ptr(self.matrix)


class Reduction:
    """A chain of normalisations and linear maps, as `Quantizer.chain` holds it."""

    def __init__(self, chain: Sequence[Any], dim: int) -> None:
        self._maps: list[_Map] = []
        self._dim = dim
        normalized = False
        for transform in chain:
            if isinstance(transform, faiss.NormalizationTransform):
                normalized = True
            elif isinstance(transform, faiss.LinearTransform):
                self._maps.append(_Map(transform, normalized))
                normalized = False
            else:
                raise FormatError(f"the trained quantizer holds a {type(transform).__name__}, which is not read here")
        self._ends_normalized = normalized
        self._local = threading.local()

    def one(self, vector: Floats, length: float) -> Any:
        """Reduce `vector` (contiguous, `[dim]`, of that length); return the address of the float32 `[reduced]`.

        It is this thread's buffer, which its next call fills again.
        """
        try:
            buffers = self._local.buffers
        except AttributeError:
            buffers = self._local.buffers = self._make_buffers()
        source = faiss.swig_ptr(vector)
        # FAISS's products use neither BLAS nor OpenMP, whose thread pools cost more than they save on one query.
        for step, (out, pointer) in zip(self._maps, buffers, strict=False):  # without a map there still is a buffer
            rows, columns = step.matrix.shape
            faiss.fvec_inner_products_ny(pointer, source, step.pointer, columns, rows)
            if step.normalized and length > 0:
                out *= 1 / length
            if step.bias is not None:
                out += step.bias
            vector, source, length = out, pointer, math.sqrt(out.dot(out))
        if not self._maps:  # only brought to length one; the caller's own vector stays as it is
            out, source = buffers[0]
            np.copyto(out, vector)
            vector = out
        if self._ends_normalized and length > 0:
            vector *= 1 / length
        return source

    def many(self, vectors: Floats) -> Floats:
        """Reduce `[N, dim]`."""
        reduced = vectors
        for step in self._maps:
            out = reduced @ step.matrix.T
            if step.normalized:
                out /= _lengths(reduced)
            if step.bias is not None:
                out += step.bias
            reduced = out
        if self._ends_normalized:
            reduced = reduced / _lengths(reduced)
        return np.ascontiguousarray(reduced)

    def _make_buffers(self) -> list[tuple[Floats, Any]]:
        made = [np.empty(len(step.matrix), np.float32) for step in self._maps] or [np.empty(self._dim, np.float32)]
        return [(buffer, faiss.swig_ptr(buffer)) for buffer in made]


def _lengths(vectors: Floats) -> Floats:
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, np.newaxis]
    return np.where(lengths > 0, lengths, np.float32(1))
