"""Chat templates: messages to the prompt that a model was trained on.

A template is a Jinja program that comes with the model, so it is foreign code: it runs in a sandbox, and whatever goes
wrong in it is an error of the user, not ours. What it sees is what Hugging Face's ``apply_chat_template`` shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpillama.errors import ModelError, UsageError, UserError
from mpillama.tokenizer import Tokenizer
from mpillama.tokenizer.vocabulary import special_ids_by_key

RESERVED = frozenset(("messages", "tools", "add_generation_prompt", "self"))
"""What `ChatTemplate.render` gives a template by itself, and no variable of the template's own can be called."""


class ChatTemplate:
    """A compiled template. `now` is what ``strftime_now`` in a template formats.

    Raises UserError if `source` is no valid template.
    """

    def __init__(
        self, source: str, bos_token: str = "", eos_token: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        self.source = source
        self._context = {"bos_token": bos_token, "eos_token": eos_token}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationExtension]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template has an error in line {error.lineno}: {_one_line(error)}") from error
        except (RecursionError, MemoryError, SyntaxError) as error:  # valid to Jinja, too much for Python's compiler
            raise UserError(f"the chat template cannot be compiled: {_one_line(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for `messages` (each with ``role`` and ``content``).

        `add_generation_prompt` ends it where the assistant begins to speak; `tools` are JSON schemas of functions;
        `extra` are variables of the template itself (``enable_thinking``). Raises UserError if the template refuses the
        messages or fails.
        """
        context = self._context | extra
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **context
            )
        except Exception as error:  # a foreign program may raise anything
            raise UserError(f"the chat template cannot render these messages: {_one_line(error)}") from error


def template_from(metadata: Mapping[str, Any], override: str | None = None) -> ChatTemplate | None:
    """The chat template of a file, or the one that the user wants instead; None if there is neither.

    `override` is the text of a template or the name of one in :data:`BUILTIN_TEMPLATES`. Raises UsageError if it is
    neither, UserError if the template is broken.
    """
    if override is None:
        source = metadata.get("tokenizer.chat_template")
        if source is not None and not isinstance(source, str):
            raise ModelError("tokenizer.chat_template is not a text: the file is broken; choose a template yourself")
    elif "{{" in override or "{%" in override:
        source = override
    elif override in BUILTIN_TEMPLATES:
        source = BUILTIN_TEMPLATES[override]
    else:
        raise UsageError(
            f"there is no chat template '{override}': give the text of one, or one of {', '.join(BUILTIN_TEMPLATES)}"
        )
    if not source:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    ids = special_ids_by_key(metadata, len(tokens))
    bos, eos = (tokens[ids[role]] if role in ids else "" for role in ("bos", "eos"))
    return ChatTemplate(source, bos, eos)


def encode_chat(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a rendered prompt: with one BOS if the model wants it, whether or not the template wrote it; no EOS."""
    ids = tokenizer.encode(prompt, add_special=False, parse_special=True)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


class _GenerationExtension(Extension):
    """``{% generation %}`` marks what the assistant said, for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse up to ``{% endgeneration %}``."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike Jinja's own filter: models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    """How a template refuses messages."""
    raise jinja2.TemplateError(message)


def _one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _turns(turn: str, prompt: str = "") -> str:
    """A template that writes `turn` for each message, and `prompt` where the assistant is to speak."""
    ending = "{% if add_generation_prompt %}" + prompt + "{% endif %}" if prompt else ""
    return "{% for message in messages %}" + turn + "{% endfor %}" + ending


def _by_role(system: str, user: str, assistant: str) -> str:
    """A turn that is written differently for each role."""
    choice = ("{% if message.role == 'system' %}", "{% elif message.role == 'user' %}", "{% else %}")
    return choice[0] + system + choice[1] + user + choice[2] + assistant + "{% endif %}"


_CONTENT = "{{ message.content }}"
_TRIMMED = "{{ message.content | trim }}"


def _instruct(opening: str, system: str, closing: str, answer: str) -> str:
    """Llama 2 and Mistral: `opening`, an optional system message and what the user says, `closing`, the answer."""
    begin = "{% if loop.first or loop.previtem.role == 'assistant' %}" + opening + "{% endif %}"
    return _turns(begin + _by_role(system, _CONTENT + closing, answer + "</s>"))


def _mistral_v7(space: str) -> str:
    """A system prompt with brackets of its own."""
    return _turns(
        _by_role(
            f"[SYSTEM_PROMPT]{space}{_CONTENT}[/SYSTEM_PROMPT]",
            f"[INST]{space}{_CONTENT}[/INST]",
            f"{space}{_CONTENT}</s>",
        )
    )


# Gemma knows no system message: it goes before what the user says first.
_GEMMA = (
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = ns.system + message.content | trim %}{% else %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% if ns.system and message.role != 'assistant' %}{{ ns.system }}\n\n{% set ns.system = '' %}{% endif %}"
    "{{ message.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# The names are llama.cpp's. None writes the BOS token: the tokenizer adds it.
BUILTIN_TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "chatml": _turns(
            "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n", "<|im_start|>assistant\n"
        ),
        "command-r": _turns(
            "<|START_OF_TURN_TOKEN|>"
            + _by_role("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
            + f"{_TRIMMED}<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        "deepseek": _turns(
            _by_role(
                "{{ message.content }}",
                "### Instruction:\n{{ message.content }}\n",
                "### Response:\n{{ message.content }}\n<|EOT|>\n",
            ),
            "### Response:\n",
        ),
        "deepseek2": _turns(
            _by_role(
                "{{ message.content }}\n\n",
                "User: {{ message.content }}\n\n",
                "Assistant: {{ message.content }}<｜end▁of▁sentence｜>",
            ),
            "Assistant:",
        ),
        "deepseek3": _turns(
            _by_role(
                "{{ message.content }}\n\n",
                "<｜User｜>{{ message.content }}",
                "<｜Assistant｜>{{ message.content }}<｜end▁of▁sentence｜>",
            ),
            "<｜Assistant｜>",
        ),
        "falcon3": _turns("<|{{ message.role }}|>\n{{ message.content }}\n", "<|assistant|>\n"),
        "gemma": _GEMMA,
        "gpt-oss": _turns(
            "<|start|>{{ message.role }}<|message|>{{ message.content }}"
            "{{ '<|return|>' if message.role == 'assistant' else '<|end|>' }}",
            "<|start|>assistant",
        ),
        "granite": _turns(
            "<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "llama2": _instruct("[INST] ", _CONTENT + "\n", " [/INST]", _CONTENT),
        "llama2-sys": _instruct("[INST] ", f"<<SYS>>\n{_CONTENT}\n<</SYS>>\n\n", " [/INST]", _CONTENT),
        "llama3": _turns(
            "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "mistral-v1": _instruct(" [INST] ", _CONTENT + "\n\n", " [/INST]", " " + _CONTENT),
        "mistral-v3": _instruct("[INST] ", _CONTENT + "\n\n", "[/INST]", " " + _TRIMMED),
        "mistral-v3-tekken": _instruct("[INST]", _CONTENT + "\n\n", "[/INST]", _CONTENT),
        "mistral-v7": _mistral_v7(" "),
        "mistral-v7-tekken": _mistral_v7(""),
        "openchat": _turns(
            "{% if message.role != 'system' %}GPT4 Correct {{ message.role | capitalize }}: {% endif %}"
            "{{ message.content }}<|end_of_turn|>",
            "GPT4 Correct Assistant:",
        ),
        "phi3": _turns("<|{{ message.role }}|>\n{{ message.content }}<|end|>\n", "<|assistant|>\n"),
        "phi4": _turns(
            "<|im_start|>{{ message.role }}<|im_sep|>{{ message.content }}<|im_end|>",
            "<|im_start|>assistant<|im_sep|>",
        ),
        "vicuna": _turns(
            _by_role(
                "{{ message.content }}\n\n", "USER: {{ message.content }}\n", "ASSISTANT: {{ message.content }}</s>\n"
            ),
            "ASSISTANT:",
        ),
        "zephyr": _turns("<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n", "<|assistant|>\n"),
    }
)
