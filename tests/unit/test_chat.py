"""Chat templates: what they see, what they may not do, and the built-in ones."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pytest

from mpillama.chat import BUILTIN_TEMPLATES, ChatTemplate, encode_chat, template_from
from mpillama.errors import ModelError, UsageError, UserError
from mpillama.tokenizer import load_tokenizer

USER = [{"role": "user", "content": "Hi"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]


def metadata(**keys: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(len(tokens)),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256),
    } | {f"tokenizer.{key}": value for key, value in keys.items()}


def test_what_a_template_sees() -> None:
    source = (
        "{{ bos_token }}{{ eos_token }}|{{ strftime_now('%d %b %Y') }}|{{ tools is none }}|{{ add_generation_prompt }}|"
        "{{ enable_thinking }}|{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['content'] }}"
        "{% endfor %}|{% generation %}g{% endgeneration %}"
    )
    template = ChatTemplate(source, "<s>", "</s>", now=lambda: datetime(2026, 11, 21))
    assert template.render(CHAT, enable_thinking=False) == "<s></s>|21 Nov 2026|True|True|False|Be brief.|g"


def test_blocks_are_trimmed() -> None:
    source = "{%- for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    assert ChatTemplate(source).render(USER) == "Hi\n"


def test_tojson_is_plain_json() -> None:
    tools = [{"name": "größe", "what": "<b> & 'c'"}]
    assert ChatTemplate("{{ tools | tojson }}").render([], tools=tools) == (
        """[{"name": "größe", "what": "<b> & 'c'"}]"""
    )
    assert ChatTemplate("{{ tools | tojson(indent=1) }}").render([], tools=[1]) == "[\n 1\n]"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 + 'a' }}",
        "{{ missing.attribute }}",
        "{{ raise_exception('roles must\n alternate') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_and_failing_templates(source: str) -> None:
    with pytest.raises(UserError, match=r"chat template cannot render these messages: .") as caught:
        ChatTemplate(source).render([dict(USER[0])])
    assert "\n" not in str(caught.value)


def test_reason_of_a_refusal() -> None:
    with pytest.raises(UserError, match=r"cannot render these messages: roles must alternate$"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(USER)


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% nonesuch %}", "{% generation %}"])
def test_syntax_errors(source: str) -> None:
    with pytest.raises(UserError, match=r"error in line 2: ."):
        ChatTemplate("\n" + source)


def test_template_of_the_file_or_the_users() -> None:
    assert template_from(metadata()) is None
    own = template_from(metadata(chat_template="{{ bos_token }}own{{ eos_token }}"))
    assert own is not None
    assert own.render(USER) == "<s>own</s>"
    text = template_from(metadata(chat_template="own"), "{{ messages[0].content }}!")
    assert text is not None
    assert text.render(USER) == "Hi!"
    zephyr = template_from(metadata(chat_template="own"), "zephyr")
    assert zephyr is not None
    assert zephyr.render(USER) == "<|user|>\nHi</s>\n<|assistant|>\n"
    with pytest.raises(UsageError, match=r"no chat template 'lama3': .*chatml.*llama3.*zephyr"):
        template_from(metadata(), "lama3")
    with pytest.raises(ModelError, match="not a text"):
        template_from(metadata(chat_template=[1]))


def test_template_without_vocabulary() -> None:
    template = template_from({"tokenizer.chat_template": "{{ bos_token }}x"})
    assert template is not None
    assert template.render(USER) == "x"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
         "Yes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"),
        ("llama2", "[INST] Be brief.\nHi [/INST]Yes?</s>[INST] Bye [/INST]"),
        ("llama2-sys", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]Yes?</s>[INST] Bye [/INST]"),
        ("llama3", "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
         "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma", "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
         "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"),
        ("phi3", "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYes?<|end|>\n<|user|>\nBye<|end|>\n"
         "<|assistant|>\n"),
        ("mistral-v1", " [INST] Be brief.\n\nHi [/INST] Yes?</s> [INST] Bye [/INST]"),
        ("mistral-v3", "[INST] Be brief.\n\nHi[/INST] Yes?</s>[INST] Bye[/INST]"),
        ("mistral-v7", "[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Hi[/INST] Yes?</s>[INST] Bye[/INST]"),
        ("vicuna", "Be brief.\n\nUSER: Hi\nASSISTANT: Yes?</s>\nUSER: Bye\nASSISTANT:"),
        ("deepseek", "Be brief.### Instruction:\nHi\n### Response:\nYes?\n<|EOT|>\n### Instruction:\nBye\n"
         "### Response:\n"),
        ("deepseek3", "Be brief.\n\n<｜User｜>Hi<｜Assistant｜>Yes?<｜end▁of▁sentence｜><｜User｜>Bye<｜Assistant｜>"),
        ("gpt-oss", "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant"
         "<|message|>Yes?<|return|><|start|>user<|message|>Bye<|end|><|start|>assistant"),
    ],
)  # fmt: skip
def test_builtin_templates(name: str, expected: str) -> None:
    assert ChatTemplate(BUILTIN_TEMPLATES[name]).render(CHAT) == expected


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_builtin_templates_keep_every_message(name: str) -> None:
    template = ChatTemplate(BUILTIN_TEMPLATES[name], "<s>", "</s>")
    prompt = template.render(CHAT)
    places = [prompt.index(message["content"]) for message in CHAT]
    assert places == sorted(places)
    assert prompt.startswith(template.render(CHAT, add_generation_prompt=False))


def test_encode_chat_has_one_bos() -> None:
    tokenizer = load_tokenizer(metadata() | {"tokenizer.ggml.add_eos_token": True})
    plain = tokenizer.encode("Hi", add_special=False)
    assert encode_chat(tokenizer, "Hi") == [1, *plain]
    assert encode_chat(tokenizer, "<s>Hi") == [1, *plain]
    without = load_tokenizer(metadata() | {"tokenizer.ggml.add_bos_token": False})
    assert encode_chat(without, "Hi") == plain
