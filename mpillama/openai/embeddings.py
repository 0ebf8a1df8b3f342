"""`/v1/embeddings`, and llama.cpp's own `/embedding`."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from mpillama.engine.request import Output, RequestParams
from mpillama.openai.call import Call, Chunk
from mpillama.openai.context import Context
from mpillama.openai.errors import bad
from mpillama.openai.fields import Fields


class EmbeddingCall(Call):
    """Vectors of length 1 for texts or token ids."""

    prefix = "embd-"

    def __init__(self, context: Context, fields: Fields, id: str = "") -> None:
        super().__init__(context, fields, id)
        self.stream = False
        self._base64 = fields.choice("encoding_format", "float", "base64") == "base64"
        if fields.has("dimensions"):
            raise bad("dimensions is not supported: the vectors are as long as the model makes them", "dimensions")
        name = fields.first("input", "content")
        prompts = context.prompts(fields.any(name), name, generates=False)
        self.add_requests(prompts, RequestParams(embedding=True))
        self._vectors: list[np.ndarray | None] = [None] * len(prompts)

    def take(self, choice: int, output: Output) -> list[Chunk]:
        """Keep a vector."""
        self._vectors[choice] = output.embedding
        return []

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage."""
        return {"prompt_tokens": self.n_prompt, "total_tokens": self.n_prompt}

    def answer(self) -> dict[str, Any]:
        """Return the whole answer."""
        return {
            "object": "list",
            "model": self.model,
            "data": [
                {"object": "embedding", "index": i, "embedding": self._render(vector)}
                for i, vector in enumerate(self._vectors)
                if vector is not None
            ],
            "usage": self.usage(),
        }

    def _render(self, vector: np.ndarray) -> str | list[float]:
        if self._base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return [float(x) for x in vector]


class NativeEmbeddingCall(EmbeddingCall):
    """llama.cpp's `/embedding`: an array, in which each text has a list of vectors, here always one."""

    def __init__(self, context: Context, fields: Fields, id: str = "") -> None:
        super().__init__(context, fields, id)
        if fields.integer("embd_normalize", 2) != 2:
            raise bad("embd_normalize must be 2 here: the vectors have length 1", "embd_normalize")

    def answer(self) -> Any:
        """Return the whole answer."""
        return [
            {"index": i, "embedding": [self._render(vector)]}
            for i, vector in enumerate(self._vectors)
            if vector is not None
        ]
