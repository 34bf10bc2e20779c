"""Search the inverted lists of opened shards: one coarse search for all of them, then codes, then a second ranking."""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from serving.manifest import SearchSettings
from serving.quantizer import Quantizer
from serving.rescoring import Floats, Rows, best_of
from serving.selection import Selection
from serving.shards import Opened, Segment
from serving.threads import one_thread

_BEST_FIRST = 11
"""FAISS's number for the scan that takes one query's lists nearest first and keeps candidates in a reservoir."""
_BUFFERS = 64
"""Of different k that a thread keeps."""


class Lists:
    """Opened shards, ready to be searched from many threads at once. Rows count over the opened shards."""

    def __init__(self, quantizer: Quantizer, opened: Opened) -> None:
        self._quantizer = quantizer
        self._opened = opened  # FAISS holds bare pointers into it
        self._refine = opened.refine
        self._segments = opened.segments
        self.rows = sum(segment.rows for segment in opened.segments)
        self.nlist = int(quantizer.ivf.nlist)
        self._centroids: Floats | None = None
        self._whole: Any = None
        if len(opened.segments) == 1 and (opened.refine_index is not None or opened.refine is None):
            self._whole, self._single, self._keep = _assemble(quantizer, opened)
            self._segments = [Segment(self._keep[0], 0, self.rows)]
        # FAISS only reads them, so threads share them; making them anew takes longer than some searches.
        self._params = _params_cache(self.nlist, self.rows, opened.refine is not None, _is_graph(quantizer))
        self._local = threading.local()

    def one(self, pointer: Any, k: int, settings: SearchSettings) -> tuple[Floats, Rows]:
        """Return scores and rows `[k]` of one reduced vector, by its address; -1 where too few were found.

        They are this thread's buffers, which its next call fills again. Only where `is_whole`.
        """
        try:
            buffers = self._local.buffers
        except AttributeError:
            buffers = self._local.buffers = {}
        if k not in buffers:
            if len(buffers) >= _BUFFERS:
                buffers.clear()
            scores, rows = np.empty(k, np.float32), np.empty(k, np.int64)
            buffers[k] = scores, rows, faiss.swig_ptr(scores), faiss.swig_ptr(rows)
        scores, rows, to_scores, to_rows = buffers[k]
        params, _ = self._params(k, settings)
        threads = faiss.omp_get_max_threads()
        if threads == 1:
            self._single.search_c(1, pointer, k, to_scores, to_rows, params)
        else:
            with one_thread():  # waking FAISS's pool takes longer than one search
                self._single.search_c(1, pointer, k, to_scores, to_rows, params)
        return scores, rows

    @property
    def is_whole(self) -> bool:
        """Tell whether FAISS holds all opened rows as one index, which is the fast way."""
        return self._whole is not None

    def many(
        self, reduced: Floats, k: int, settings: SearchSettings, selection: Selection | None = None
    ) -> tuple[Floats, Rows]:
        """Return scores and rows `[N, k]` of reduced vectors, best first; -1 where too few were found."""
        if selection is None and self._whole is not None:
            scores, rows = self._whole.search(reduced, k, params=self._params(k, settings)[0])
            return scores, rows
        if (
            selection is not None
            and self._refine is not None
            and selection.prefers_scan(settings.nprobe, self.nlist, self.rows)
        ):
            return self.scan(reduced, k, selection.rows)
        if len(reduced) == 1:
            with one_thread():
                return self._preassigned(reduced, k, settings, selection)
        return self._preassigned(reduced, k, settings, selection)

    def scan(self, reduced: Floats, k: int, rows: Rows | None = None) -> tuple[Floats, Rows]:
        """Rank all of `rows` (or all there are) by their re-rank codes.

        Where there are no such codes, all rows are taken to be as near as one another, and the first are returned.
        """
        chosen = np.arange(self.rows) if rows is None else rows
        if self._refine is None:
            chosen = chosen[:k]
            return _stacked([(np.full(len(chosen), score), chosen) for score in reduced @ self._some_vector()], k)
        return _stacked([self._refine.best(query, chosen, k) for query in reduced], k)

    def select(self, rows: Rows) -> Selection:
        """Prepare searches among some rows only (sorted)."""
        return Selection.of(rows, self._segments, self.nlist)

    @property
    def can_scan(self) -> bool:
        """Tell whether there are re-rank codes."""
        return self._refine is not None

    def _some_vector(self) -> Floats:
        """Return what the code of some row stands for."""
        for segment, number in itertools.product(self._segments, range(self.nlist)):
            if segment.lists.invlists.list_size(number):
                break
        decoded = np.empty(segment.lists.d, np.float32)
        segment.lists.reconstruct_from_offset(number, 0, faiss.swig_ptr(decoded))
        return decoded

    def _preassigned(
        self, reduced: Floats, k: int, settings: SearchSettings, selection: Selection | None
    ) -> tuple[Floats, Rows]:
        depth = k if self._refine is None else _candidates(k, settings.rerank, self.rows)
        lists, closeness = self._coarse(reduced, settings, selection)
        found = [
            self._search_segment(number, reduced, depth, lists, closeness, selection)
            for number in range(len(self._segments))
        ]
        scores = np.concatenate([scores for scores, _ in found], axis=1)
        rows = np.concatenate([rows for _, rows in found], axis=1)
        return _stacked([self._rank(*answer, depth, k) for answer in zip(reduced, scores, rows, strict=True)], k)

    def _rank(self, query: Floats, scores: Floats, rows: Rows, depth: int, k: int) -> tuple[Floats, Rows]:
        there = rows >= 0
        scores, rows = best_of(scores[there], rows[there], depth if self._refine is not None else k)
        return (scores, rows) if self._refine is None else self._refine.best(query, rows, k)

    def _coarse(
        self, reduced: Floats, settings: SearchSettings, selection: Selection | None
    ) -> tuple[npt.NDArray[np.int64], Floats]:
        """Return the lists to visit and their centroids' scores, `[N, nprobe]`."""
        if selection is None:
            nprobe = min(settings.nprobe, self.nlist)
            _, effort = self._params(1, settings)
            closeness, lists = self._quantizer.ivf.quantizer.search(reduced, nprobe, params=effort)
            return lists, closeness
        # A graph finds its way through centroids that a selection leaves out, so these are compared one by one.
        if self._centroids is None:
            self._centroids = self._quantizer.centroids.astype(np.float32)
        near = reduced @ self._centroids[selection.lists].T
        nprobe = selection.lists_to_visit(settings.nprobe, self.nlist, self.rows)
        order = np.argsort(-near, axis=1, kind="stable")[:, :nprobe]
        return selection.lists[order], np.ascontiguousarray(np.take_along_axis(near, order, axis=1))

    def _search_segment(
        self,
        number: int,
        reduced: Floats,
        depth: int,
        lists: npt.NDArray[np.int64],
        closeness: Floats,
        selection: Selection | None,
    ) -> tuple[Floats, Rows]:
        segment = self._segments[number]
        scores = np.full((len(reduced), depth), -np.inf, np.float32)
        rows = np.full((len(reduced), depth), -1, np.int64)
        params = faiss.SearchParametersIVF(nprobe=lists.shape[1])
        if selection is not None:
            params.sel = selection.selectors[number]
        segment.lists.search_preassigned_c(
            len(reduced),
            faiss.swig_ptr(reduced),
            depth,
            faiss.swig_ptr(lists),
            faiss.swig_ptr(closeness),
            faiss.swig_ptr(scores),
            faiss.swig_ptr(rows),
            False,
            params,
        )
        rows[rows >= 0] += segment.start
        return scores, rows


def _candidates(k: int, rerank: int, rows: int) -> int:
    return min(max(rerank, 2 * k), max(rows, k))


def _stacked(answers: list[tuple[Floats, Rows]], k: int) -> tuple[Floats, Rows]:
    scores = np.full((len(answers), k), -np.inf, np.float32)
    rows = np.full((len(answers), k), -1, np.int64)
    for number, (found, of) in enumerate(answers):
        scores[number, : len(found)], rows[number, : len(of)] = found, of
    return scores, rows


def _is_graph(quantizer: Quantizer) -> bool:
    return isinstance(faiss.downcast_index(quantizer.ivf.quantizer), faiss.IndexHNSW)


def _params_cache(
    nlist: int, rows: int, reranks: bool, graph: bool
) -> Callable[[int, SearchSettings], tuple[Any, Any]]:
    """Return a function that makes FAISS's parameters of a search and of its coarse part, and keeps the last few."""

    @functools.lru_cache(maxsize=64)  # per index, and without a reference to it, which would keep it from going
    def make(k: int, settings: SearchSettings) -> tuple[Any, Any]:
        coarse = faiss.SearchParametersHNSW(efSearch=max(settings.ef_search, settings.nprobe)) if graph else None
        params: Any = faiss.SearchParametersIVF(nprobe=min(settings.nprobe, nlist), quantizer_params=coarse)
        if reranks:
            factor = (_candidates(k, settings.rerank, rows) + 0.5) / k  # FAISS rounds down, in float32
            params = faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=params)
        return params, coarse

    return make


def _assemble(quantizer: Quantizer, opened: Opened) -> tuple[Any, Any, tuple[Any, ...]]:
    """Put the re-rank codes around the lists, once as batches want it and once as single queries do.

    Returned are the index for batches, the one for single queries, and the parts of both, which FAISS holds by bare
    pointers: they must live as long as the wholes. The lists searched come first among the parts.
    """
    (segment,) = opened.segments
    lists = single = segment.lists
    if isinstance(lists, faiss.IndexIVFPQFastScan):
        single = faiss.IndexIVFPQFastScan(quantizer.ivf)  # which has no rows: those of the lists are lent to it
        single.replace_invlists(lists.invlists, False)
        single.ntotal = lists.ntotal
        single.implem = _BEST_FIRST
    if opened.refine_index is None:
        return lists, single, (lists, single)
    refine = opened.refine_index
    return faiss.IndexRefine(lists, refine), faiss.IndexRefine(single, refine), (lists, single, refine)
