"""Arrays that are used again are those that nobody has any more."""

import numpy as np
import pytest

pytest.importorskip("mpillama._cpu", reason="the cpu backend is not built")
from mpillama.backends.cpu.buffers import Buffers

SHAPE = 512, 256


def test_memory_is_used_again_when_nobody_has_it():
    buffers = Buffers()
    first = buffers.empty(SHAPE)
    assert first.shape == SHAPE
    assert first.dtype == np.float32
    assert first.flags.c_contiguous
    where, part = first.ctypes.data, first[3:].T
    del first
    second = buffers.empty(SHAPE)
    assert second.ctypes.data != where
    del part
    # A smaller one fits as well, one of half the size would waste it.
    assert buffers.empty((400, 256)).ctypes.data == where
    assert buffers.empty((200, 256)).ctypes.data != where


def test_arrays_in_use_never_overlap(rng):
    buffers, held = Buffers(), []
    for i in range(300):
        array = buffers.empty((int(rng.integers(1, 200)), 1000))
        array[:] = i
        held.append((i, array))
        while len(held) > rng.integers(1, 20):
            held.pop(int(rng.integers(len(held))))
        assert all((array == i).all() for i, array in held)


def test_what_is_kept_has_an_end():
    buffers = Buffers()
    arrays = [buffers.empty((n, 1 << 16)) for n in range(1, 60)]
    del arrays
    buffers.empty((1 << 9, 1 << 16))
    assert sum(array.nbytes for array in buffers._kept) <= 256 << 20
    for n in range(1, 60):
        buffers.empty((1, n << 16))
    assert len(buffers._kept) <= 8


@pytest.mark.parametrize("shape", [(0, 4096), (1, 7), (3, 0, 5)])
def test_small_and_empty_ones(shape):
    assert Buffers().empty(shape).shape == shape
