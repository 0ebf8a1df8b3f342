"""A description of the API for programs that read such."""

from __future__ import annotations

from typing import Any

from mpillama import __version__

Schema = dict[str, Any]
_STRING: Schema = {"type": "string"}
_BOOLEAN: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}
_COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": 64}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS: Schema = {"type": "array", "items": {"anyOf": [_STRING, _IDS]}, "minItems": 1}
_PROMPT: Schema = {"anyOf": [_STRING, _IDS, _TEXTS]}


def _number(low: float | None = None, high: float | None = None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {"type": "number", **{name: value for name, value in bounds.items() if value is not None}}


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required}


_SAMPLING: dict[str, Schema] = {
    "model": _STRING,
    "stream": _BOOLEAN,
    "stream_options": _object([], include_usage=_BOOLEAN),
    "max_tokens": _COUNT,
    "n": {"type": "integer", "minimum": 1, "maximum": 4},
    "seed": {"type": "integer"},
    "stop": {"anyOf": [_STRING, {"type": "array", "items": _STRING, "maxItems": 64}]},
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": {"type": "integer", "minimum": 0, "maximum": 1000},
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1),
    "repeat_penalty": _number(0.5, 2),
    "repeat_last_n": {"type": "integer", "minimum": -1, "maximum": 4096},
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "dry_multiplier": _number(0, 5),
    "dry_base": _number(1, 5),
    "mirostat": {"type": "integer", "enum": [0, 1, 2]},
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
    "grammar": _STRING,
    "json_schema": {"type": "object"},
    "reasoning_budget": {"type": "integer", "minimum": -1},
    "cache_prompt": _BOOLEAN,
    "timings_per_token": _BOOLEAN,
    "ignore_eos": _BOOLEAN,
    "id_slot": {"type": "integer", "minimum": -1, "maximum": 3},
    "user": _STRING,
}
_PART: Schema = _object(["type", "text"], type={"enum": ["text"]}, text=_STRING)
_MESSAGE: Schema = _object(
    ["role", "content"],
    role={"enum": ["system", "developer", "user", "assistant", "tool"]},
    content={"anyOf": [_STRING, {"type": "array", "items": _PART}]},
    tool_call_id=_STRING,
)
_FUNCTION: Schema = _object(["name"], name=_STRING, description=_STRING, parameters={"type": "object"})
_TOOL: Schema = _object(["type", "function"], type={"enum": ["function"]}, function=_FUNCTION)
_FORMAT: Schema = _object(
    ["type"],
    type={"enum": ["text", "json_object", "json_schema"]},
    json_schema=_object(["name", "schema"], name=_STRING, schema={"type": "object"}),
)
_MESSAGES: Schema = {"type": "array", "items": _MESSAGE, "minItems": 1}
_CHAT: Schema = _object(
    ["messages"],
    **_SAMPLING,
    messages=_MESSAGES,
    logprobs=_BOOLEAN,
    top_logprobs={"type": "integer", "minimum": 0, "maximum": 20},
    tools={"type": "array", "items": _TOOL},
    tool_choice={"anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}]},
    response_format=_FORMAT,
    reasoning_effort=_STRING,
    reasoning_format={"enum": ["auto", "deepseek", "none"]},
    chat_template_kwargs={"type": "object"},
)
_COMPLETION: Schema = _object(
    ["prompt"],
    **_SAMPLING,
    prompt=_PROMPT,
    echo=_BOOLEAN,
    best_of={"type": "integer", "minimum": 1, "maximum": 4},
    logprobs={"type": "integer", "minimum": 0, "maximum": 5},
)
_NATIVE: Schema = _object(
    ["prompt"],
    **_SAMPLING,
    prompt=_PROMPT,
    n_predict=_COUNT,
    n_cmpl=_SAMPLING["n"],
    n_probs={"type": "integer", "minimum": 0, "maximum": 20},
    return_tokens=_BOOLEAN,
    response_fields={"type": "array", "items": _STRING},
)
_EMBEDDINGS: Schema = _object(["input"], model=_STRING, input=_PROMPT, encoding_format={"enum": ["float", "base64"]})
_EMBEDDING: Schema = _object(["content"], content=_PROMPT, embd_normalize={"enum": [2]})
_RESPONSES: Schema = _object(
    ["input"],
    model=_STRING,
    input={"anyOf": [_STRING, _MESSAGES]},
    instructions=_STRING,
    max_output_tokens=_COUNT,
    stream=_BOOLEAN,
    temperature=_number(0, 2),
    top_p=_number(0, 1),
)
_BLOCKS: Schema = {"anyOf": [_STRING, {"type": "array", "items": _PART}]}
_ANTHROPIC: Schema = _object(
    ["messages", "max_tokens"],
    model=_STRING,
    messages={
        "type": "array",
        "items": _object(["role", "content"], role={"enum": ["user", "assistant"]}, content=_BLOCKS),
        "minItems": 1,
    },
    system=_BLOCKS,
    max_tokens=_COUNT,
    stream=_BOOLEAN,
    stop_sequences={"type": "array", "items": _STRING, "maxItems": 64},
    temperature=_number(0, 1),
    top_p=_number(0, 1),
    top_k={"type": "integer", "minimum": 0, "maximum": 1000},
    tools={"type": "array", "items": _object(["name"], name=_STRING, description=_STRING, input_schema=_OBJECT)},
    tool_choice=_object(["type"], type={"enum": ["auto", "any", "tool", "none"]}, name=_STRING),
    thinking=_object(["type"], type={"enum": ["enabled", "disabled"]}, budget_tokens=_COUNT),
)
_POSTS = {
    "/v1/chat/completions": ("Answer messages", _CHAT),
    "/v1/completions": ("Continue prompts", _COMPLETION),
    "/v1/embeddings": ("Turn texts into vectors", _EMBEDDINGS),
    "/v1/responses": ("Answer, in the form of OpenAI's newer API", _RESPONSES),
    "/v1/messages": ("Answer, in the form of Anthropic's API", _ANTHROPIC),
    "/completion": ("Continue a prompt, in llama.cpp's form", _NATIVE),
    "/embedding": ("Turn texts into vectors, in llama.cpp's form", _EMBEDDING),
    "/tokenize": (
        "Turn a text into token ids",
        _object(["content"], content=_STRING, add_special=_BOOLEAN, parse_special=_BOOLEAN, with_pieces=_BOOLEAN),
    ),
    "/detokenize": ("Turn token ids into a text", _object(["tokens"], tokens={**_IDS, "minItems": 0})),
    "/apply-template": ("Show the prompt that messages become", _object(["messages"], messages=_MESSAGES)),
    "/v1/chat/completions/input_tokens": ("Count the tokens that messages become", _CHAT),
    "/v1/responses/input_tokens": ("Count the tokens that an input becomes", _RESPONSES),
    "/v1/messages/count_tokens": ("Count the tokens that Anthropic's messages become", _ANTHROPIC),
}
_GETS = {
    "/health": "Whether requests are taken",
    "/v1/models": "The model",
    "/props": "Defaults of sampling, and the chat template",
    "/slots": "What is under way",
    "/metrics": "Counters for Prometheus",
}


def document() -> Schema:
    """Return the OpenAPI description."""
    error = {"description": "An error, as JSON with error.message"}
    ok = {"description": "The answer"}
    paths: Schema = {path: {"get": {"summary": text, "responses": {"200": ok}}} for path, text in _GETS.items()}
    for path, (text, schema) in _POSTS.items():
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": ok, "400": error, "413": error, "429": error, "503": error},
            }
        }
    number = {"name": "id_slot", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}}
    action = {"name": "action", "in": "query", "required": True, "schema": {"enum": ["save", "restore", "erase"]}}
    paths["/slots/{id_slot}"] = {
        "post": {
            "summary": "Save the KV of a slot in a file, restore it, or erase it (with --slot-save-path)",
            "parameters": [number, action],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _object(["filename"], filename=_STRING)}},
            },
            "responses": {"200": ok, "400": error, "501": error, "503": error},
        }
    }
    key = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mpillama", "version": __version__, "description": "OpenAI's API, and parts of llama.cpp's"},
        "paths": paths,
        "components": {"securitySchemes": {"key": key}},
        "security": [{}, {"key": []}],
    }
