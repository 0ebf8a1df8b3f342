"""Which model a file of KV belongs to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpillama.config import Config
from mpillama.errors import GGUFError
from mpillama.gguf.reader import TensorInfo
from mpillama.gguf.values import StringArray

_SAMPLE = 4096


def model_identity(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], cfg: Config, paths: Sequence[str]
) -> str:
    """Return a digest of everything that decides about a model's KV, as far as a header can tell.

    It covers the metadata (but not how the model is split into files), the tensors' names, types and shapes, the
    rotations as the user wants them, and a few bytes of the last block's weights, in which fine-tunes of one
    model differ.

    Raises:
        GGUFError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(metadata):
        if not key.startswith("split."):
            _feed(digest, key)
            _feed(digest, metadata[key])
    for name in sorted(tensors):
        info = tensors[name]
        _feed(digest, f"{name} {info.type.name} {info.shape}")
        if name.startswith((f"blk.{cfg.n_layer - 1}.", "output")):
            digest.update(_sample(info, paths))
    _feed(digest, f"{cfg.rope} {cfg.rope_window}")
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Add a value with its length, so that no two sequences of values look alike."""
    if isinstance(value, StringArray | list):
        _feed(digest, len(value))
        for item in value:
            _feed(digest, item)
        return
    data = value.tobytes() if isinstance(value, np.ndarray) else str(value).encode("utf-8", "surrogatepass")
    digest.update(f"{type(value).__name__} {len(data)} ".encode())
    digest.update(data)


def _sample(info: TensorInfo, paths: Sequence[str]) -> bytes:
    try:
        with open(paths[info.part], "rb", buffering=0) as file:
            return os.pread(file.fileno(), min(_SAMPLE, info.nbytes), info.offset)
    except OSError as error:
        raise GGUFError(f"{paths[info.part]}: cannot read {info.name}: {error.strerror}") from error
