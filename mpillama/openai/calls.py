"""Which call answers which URL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from mpillama.openai.anthropic import MessagesCall
from mpillama.openai.call import Call
from mpillama.openai.chat import ChatCall
from mpillama.openai.completions import CompletionCall, NativeCall
from mpillama.openai.context import Context
from mpillama.openai.embeddings import EmbeddingCall, NativeEmbeddingCall
from mpillama.openai.errors import ApiError
from mpillama.openai.fields import Fields
from mpillama.openai.responses import ResponsesCall

__all__ = ["CALLS", "Call", "open_call"]

CALLS: Mapping[str, Callable[[Context, Fields, str], Call]] = MappingProxyType(
    {
        "/v1/chat/completions": ChatCall,
        "/v1/completions": CompletionCall,
        "/v1/embeddings": EmbeddingCall,
        "/v1/responses": ResponsesCall,
        "/v1/messages": MessagesCall,
        "/completion": NativeCall,
        "/embedding": NativeEmbeddingCall,
    }
)


def open_call(context: Context, url: str, body: Any, id: str = "") -> Call:
    """Return the call that a body (a JSON value) asks for.

    Args:
        context: the model.
        url: path of the API.
        body: a JSON value.
        id: of the answer and, so that it has to be different from others, of the requests; by default a random one.

    Raises:
        ApiError: the URL is unknown, or the body cannot be served.
    """
    make = CALLS.get(url)
    if make is None:
        raise ApiError(404, f"there is no {url}; there are {', '.join(CALLS)}", param="url")
    return make(context, Fields(body), id)
