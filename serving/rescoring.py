"""Score rows by the scalar codes kept of their vectors, in memory or mapped from files."""

import threading
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from serving.errors import FormatError

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
_CHUNK = 512
"""Rows scored at a time: their codes, and the floats made of them, stay in the cache."""


def code_view(store: Any) -> npt.NDArray[np.uint8]:
    """Return the codes that a FAISS index keeps, uint8 `[N, code size]`, without copying; `store` must stay alive."""
    count, size = int(store.ntotal), int(store.code_size)
    if count == 0:
        return np.empty((0, size), np.uint8)
    return faiss.rev_swig_ptr(store.codes.data(), count * size).reshape(count, size)  # type: ignore[no-any-return]


class Rescoring:
    """The codes of some shards' rows, one shard after the other; `rows` count over all of them.

    Scores are inner products with what the codes stand for, as `faiss.IndexScalarQuantizer` and `faiss.IndexFlat`
    give them.
    """

    def __init__(self, model: Any, shards: Sequence[npt.NDArray[np.uint8]], keep: Any = None) -> None:
        self._low, self._step, self._stored = _decoding(model)
        self._shards = [codes.view(self._stored) for codes in shards]
        self._starts = np.cumsum([0, *(len(codes) for codes in shards)])
        self._dim = int(model.d)
        self._keep = keep  # whoever owns the memory
        self._local = threading.local()

    def scores(self, query: Floats, rows: Rows) -> Floats:
        """Return the score of each of `rows` (0 ≤ row < count) with `query` `[dim]`, float32."""
        scaled, offset = query, 0.0
        if self._step is not None:
            scaled, offset = query * self._step, float(query.dot(self._low))
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            self._score(scaled, chunk, scores[start : start + len(chunk)])
        if offset:
            scores += np.float32(offset)
        return scores

    def best(self, query: Floats, rows: Rows, k: int) -> tuple[Floats, Rows]:
        """Return the best `k` of `rows` and their scores, best first; the lower row first among equals."""
        return best_of(self.scores(query, rows), rows, k)

    def _score(self, scaled: Floats, rows: Rows, out: Floats) -> None:
        stored, floats = self._buffers()
        codes, decoded = stored[: len(rows)], floats[: len(rows)]
        if len(self._shards) == 1:
            # Clipping spares numpy a copy of the result; there is nothing to clip.
            self._shards[0].take(rows, axis=0, out=codes, mode="clip")
        else:
            shard_of = np.searchsorted(self._starts, rows, side="right") - 1
            for shard in np.unique(shard_of):
                mine = shard_of == shard
                codes[mine] = self._shards[shard][rows[mine] - self._starts[shard]]
        if stored is not floats:
            np.copyto(decoded, codes)
        faiss.fvec_inner_products_ny(
            faiss.swig_ptr(out), faiss.swig_ptr(scaled), faiss.swig_ptr(decoded), self._dim, len(rows)
        )

    def _buffers(self) -> tuple[npt.NDArray[Any], Floats]:
        try:
            return self._local.buffers  # type: ignore[no-any-return]
        except AttributeError:
            floats = np.empty((_CHUNK, self._dim), np.float32)
            stored = floats if self._stored == np.float32 else np.empty((_CHUNK, self._dim), self._stored)
            self._local.buffers = stored, floats
            return stored, floats


def best_of(scores: Floats, rows: Rows, k: int) -> tuple[Floats, Rows]:
    """Return the `k` highest scores and their rows, best first; the lower row first among equals."""
    if len(rows) > 4 * k:
        bound = np.partition(scores, len(scores) - k)[len(scores) - k]
        near = np.flatnonzero(scores >= bound)
        scores, rows = scores[near], rows[near]
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


def can_rescore(model: Any) -> bool:
    """Tell whether a FAISS index keeps its vectors in a way that is read here."""
    if isinstance(model, faiss.IndexScalarQuantizer):
        return int(model.sq.qtype) in (faiss.ScalarQuantizer.QT_8bit, faiss.ScalarQuantizer.QT_fp16)
    return isinstance(model, faiss.IndexFlat)


def _decoding(model: Any) -> tuple[Any, Any, Any]:
    """Return what a code is to be added to and multiplied by, or None, and the type it is stored as."""
    if not can_rescore(model):
        raise FormatError(f"the trained quantizer re-ranks by a {type(model).__name__}, which this release cannot read")
    if isinstance(model, faiss.IndexFlat):
        return None, None, np.float32
    if int(model.sq.qtype) == faiss.ScalarQuantizer.QT_fp16:
        return None, None, np.float16
    low, width = faiss.vector_to_array(model.sq.trained).reshape(2, -1)
    # A code c stands for the middle of its step: low + (c + 1/2) / 255 of the width.
    return low + width / 510, width / 255, np.uint8
