"""A model's weights as ranks read them, alone and together, kept as the bytes that they are."""

import numpy as np

from mpillama.backends.base import ROW_UNIT
from mpillama.backends.reference import ReferenceBackend
from mpillama.config import read_config
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import row_bytes
from mpillama.loader import SliceReader, take_weights
from mpillama.partition import Partition
from mpillama.relay import Relay
from mpillama.tensors import model_tensors


class Raw(ReferenceBackend):
    """Keeps what it is given."""

    def weight(self, raw):
        return raw.raw.copy(), raw.n_in, raw.pad

    def vector(self, raw):
        return super().vector(raw).copy()


class RawInPieces(Raw):
    """The same, from pieces."""

    def new_weight(self, type, n_mats, n_rows, n_in, pad):
        return np.empty((n_mats, n_rows, row_bytes(type, n_in)), np.uint8), n_in, pad

    def fill(self, w, first, rows):
        data = w[0]
        n_rows, last = data.shape[1], first + len(rows)
        assert first % n_rows % ROW_UNIT == 0
        assert last % n_rows % ROW_UNIT == 0 or last == len(data) * n_rows
        data.reshape(-1, data.shape[2])[first:last] = rows


class Case:
    """A model, and how it lies over ranks."""

    def __init__(self, path, grid, weights, experts="off"):
        header = read_header(path)
        cfg = read_config(header, 64)
        self.paths, self.tensors = header.paths, model_tensors(header, cfg)
        self.grid, self.partition = grid, Partition(cfg, self.tensors, grid, weights, experts)

    def direct(self, world, watch=None, backend=None):
        source = SliceReader(self.paths, lambda n: None, watch)
        weights = take_weights(source, self.tensors, *self.partition.of(world.rank), backend or Raw())
        return weights, source.bytes_read

    def relay(self, world, chunk_bytes, progress=lambda n: None, watch=None, backend=None):
        source = Relay(world, self.paths, self.tensors.values(), self.partition, progress, watch, chunk_bytes)
        weights = take_weights(source, self.tensors, *self.partition.of(world.rank), backend or Raw())
        return weights, source.bytes_read


def assert_same(one, other):
    assert list(one._matrices) == list(other._matrices)
    for name, weight in one._matrices.items():
        assert weight.handle[1:] == other._matrices[name].handle[1:]
        np.testing.assert_array_equal(weight.handle[0], other._matrices[name].handle[0], err_msg=name)
    assert list(one._vectors) == list(other._vectors)
    for name, value in one._vectors.items():
        np.testing.assert_array_equal(value.data, other._vectors[name].data, err_msg=name)
