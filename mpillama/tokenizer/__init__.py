"""Text to token ids and back, from the ``tokenizer.ggml.*`` keys of a GGUF file.

Only rank 0 has a tokenizer. Nothing here reads files: a tokenizer is made from a mapping of metadata. Ids are those of
llama.cpp for the same file and text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpillama.errors import ModelError
from mpillama.tokenizer.base import Tokenizer
from mpillama.tokenizer.bpe import load_bpe
from mpillama.tokenizer.spm import load_spm
from mpillama.tokenizer.stream import StreamDecoder

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]


def load_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file describes.

    ``tokenizer.ggml.model`` is ``llama`` (SentencePiece BPE with scores) or ``gpt2`` (byte-level BPE with merges).
    Raises ModelError if it is another kind or missing, if ``tokenizer.ggml.pre`` is unknown, or if keys are missing or
    do not fit each other.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model == "llama":
        return load_spm(metadata)
    if model == "gpt2":
        return load_bpe(metadata)
    if model in (None, "none", "no_vocab", "test"):
        what = "no tokenizer.ggml.model" if model is None else f"tokenizer.ggml.model '{model}'"
        raise ModelError(f"the file has no usable tokenizer ({what}): give and take token ids only")
    raise ModelError(f"tokenizer.ggml.model '{model}' is not supported; supported are 'llama' and 'gpt2'")
