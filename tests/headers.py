"""What is done with a model's header before its first weight is read, and what has to be true of the outcome."""

from __future__ import annotations

import dataclasses
import math
import pickle
import warnings
from array import array
from itertools import accumulate

import numpy as np

from gguf_bytes import string
from mpillama.backends.reference import ReferenceBackend
from mpillama.backends.rope import rope_table
from mpillama.config import Config, Rope, read_config
from mpillama.errors import GGUFError, ModelError, UserError
from mpillama.gguf.reader import GGUFHeader
from mpillama.gguf.values import StringArray
from mpillama.loader import check_types
from mpillama.sharding import Sharding
from mpillama.tensors import model_tensors


def strings(*items: str) -> StringArray:
    parts = [string(item) for item in items]
    return StringArray(b"".join(parts), array("Q", accumulate(map(len, parts))))


def use(header: GGUFHeader, n_ranks: int = 3) -> Config:
    """Do all that is done with a header before the first weight is read, and check what came out."""
    cfg = read_config(header)
    tensors = model_tensors(header, cfg)
    check_types(tensors.values(), ReferenceBackend())
    sharding = Sharding(cfg, [1.0] * n_ranks)
    for rank in range(n_ranks):
        assert 0 <= sharding.bytes_of(tensors.values(), rank) <= header.file_bytes
    pickle.loads(pickle.dumps((cfg, tensors)))
    for rope in (cfg.rope, cfg.rope_window):
        check_rope(rope)
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.type in ("int", "float"):
            assert isinstance(value, int) == (field.type == "int") or value == 0, field.name
            assert not isinstance(value, bool)
            assert math.isfinite(value)
            assert value >= 0
    assert len(cfg.windows) == cfg.n_layer
    return cfg


def check_rope(rope: Rope) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = rope_table(np.array([0, 1, 100_000]), rope, None)
    assert np.isfinite(table.cos).all()
    assert np.isfinite(table.sin).all()


def check_message(error: UserError) -> None:
    message = str(error)
    assert message.isprintable()
    assert len(message) < 400
    assert isinstance(error, ModelError | GGUFError)
