import faiss
import pytest

from serving.threads import one_thread


@pytest.mark.parametrize("count", [1, 3])
def test_the_number_of_threads_comes_back(count):
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(count)
        with one_thread():
            assert faiss.omp_get_max_threads() == 1
        assert faiss.omp_get_max_threads() == count
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert faiss.omp_get_max_threads() == count
    finally:
        faiss.omp_set_num_threads(before)
