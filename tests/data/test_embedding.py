"""KEY.npy is read or refused, whatever is in it."""

import io
import pickle

import numpy as np
import pytest

from ipa_train.data.embedding import read_embedding
from ipa_train.errors import DataError
from tests.data.conftest import npy


def claim(shape):
    """A header without its numbers."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


class Owned:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros(5, np.float32)), r"has shape \(5,\), but this run's image encoder takes \(4,\)"),
        (npy(np.zeros((1, 4), np.float32)), r"has shape \(1, 4\)"),
        (npy(np.zeros(4)), "is of float64, not float16 or float32"),
        (npy(np.array([1, 2, np.nan, 4], np.float16)), "is not finite"),
        (npy(np.array([1, 2, np.inf, 4], np.float32)), "is not finite"),
        (npy(np.zeros(4, np.float32))[:-1], "is not as long as that: truncated"),
        (npy(np.zeros(4, np.float32))[:50], "is no array of numpy.save"),
        (npy(np.array([Owned()] * 4, object)), "is of object"),
        (pickle.dumps(Owned()), "is no array of numpy.save"),
        (b"", "is no array of numpy.save"),
        (npy(np.zeros(4, np.float32)).replace(b"(4,), }", b"(((((4,"), "is no array of numpy.save"),
        (claim((10**12,)), r"has shape \(1000000000000,\)"),
    ],
)
def test_an_embedding_that_is_not_what_was_asked_for_is_refused_unread(data, message):
    with pytest.raises(DataError, match=message):
        read_embedding(data, (4,))


def test_whatever_is_damaged_an_embedding_is_read_or_refused():
    whole = npy(np.arange(4, dtype=np.float32))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        try:
            assert np.isfinite(read_embedding(bytes(data), (4,))).all()
        except DataError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_no_run_takes_an_embedding_of_such_a_shape(shape):
    with pytest.raises(DataError, match=r"which is neither \(f,\) nor \(s, f\)"):
        read_embedding(npy(np.zeros(shape, np.float32)), None)


@pytest.mark.parametrize("order", ["C", "F"])
def test_embeddings_keep_their_values(order):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert (read_embedding(npy(np.asarray(values, order=order)), (3, 4)) == values).all()
