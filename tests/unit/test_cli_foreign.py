"""What llama.cpp has and mpillama does not: flags that are accepted or refused, variables, names of programs."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path

import pytest
from test_cli_parser import DEFAULTS, REQUIRED, generate, refused, values_of

from mpillama.cli import generate as generate_command
from mpillama.cli.foreign import ForeignFlag, accepting_command, foreign_flags
from mpillama.cli.foreign_tables import ACCEPTED, PROGRAMS
from mpillama.cli.options import Option
from mpillama.cli.parser import find_command, parse
from mpillama.cli.progress import Log

FLAGS = foreign_flags("generate")
EVERYWHERE = foreign_flags("")
HERE = [(command, flag) for command in ACCEPTED for flag in foreign_flags(command) if flag not in EVERYWHERE]


def sample(flag: ForeignFlag) -> list[str]:
    """Values that the flag takes."""
    known = {"[": "on", "{": flag.metavars[0].strip("{}").split("|")[0]} if flag.metavars else {}
    return [known.get(metavar[0], "99") for metavar in flag.metavars]


def notes_of(command: str, *argv: str, **environ: str) -> list[str]:
    return parse([command, *REQUIRED.get(command, []), *argv], environ)[1].notes


@pytest.mark.parametrize("flag", [flag for flag, foreign in FLAGS.items() if not foreign.ignored])
def test_unsupported_flags(flag: str) -> None:
    said = refused("-p", "x", flag, "y")
    assert said.startswith(f"{flag} is a llama.cpp flag that mpillama does not support")
    assert said.endswith(f": {FLAGS[flag].remark}" if FLAGS[flag].remark else " yet")


@pytest.mark.parametrize("flag", [flag for flag, foreign in FLAGS.items() if foreign.ignored])
def test_ignored_flags_take_their_values_and_leave_a_note(flag: str) -> None:
    foreign = FLAGS[flag]
    namespace = generate(flag, *sample(foreign), "-n", "3")
    note = f"{flag} has no effect in mpillama" + (f": {foreign.remark}" if foreign.remark else "")
    assert values_of(namespace) == DEFAULTS | {"predict": 3, "notes": [note]}
    if foreign.arity and not foreign.may_lack(None):
        assert refused("-p", "x", flag) == f"{flag} needs a value: {flag} value"


@pytest.mark.parametrize(("command", "flag"), HERE)
def test_flags_of_one_command(command: str, flag: str) -> None:
    foreign = foreign_flags(command)[flag]
    note = f"{flag} has no effect in mpillama" + (f": {foreign.remark}" if foreign.remark else "")
    assert notes_of(command, flag, *sample(foreign)) == [note]
    assert find_command(accepting_command(flag)).name in ACCEPTED


def test_what_people_type_from_memory() -> None:
    line = "-m m.gguf -ngl 99 -fa on --no-mmap -c 4096 -n 128 -t 8 --temp 0.7 -no-cnv -nkvo --numa isolate -p hi"
    namespace = generate(*line.split())
    assert (namespace.model, namespace.ctx_size, namespace.predict) == (Path("m.gguf"), 4096, 128)
    assert (namespace.threads, namespace.temp, namespace.prompt) == (8, 0.7, "hi")
    assert [note.split()[0] for note in namespace.notes] == ["-ngl", "-fa", "--no-mmap", "-no-cnv", "-nkvo", "--numa"]


@pytest.mark.parametrize("flag", ["--lora", "-ot", "--mmproj", "-cmoe", "-md", "--mmproj-auto", "-ag"])
def test_flags_that_must_not_be_ignored(flag: str) -> None:
    assert not any(foreign_flags(command)[flag].ignored for command in ("generate", "chat", "serve", "bench"))


@pytest.mark.parametrize("flag", ["--no-slots", "--no-webui", "--no-prefill-assistant", "--no-cache-prompt", "--props"])
def test_a_server_refuses_what_it_would_do_otherwise(flag: str) -> None:
    assert refused("serve", flag).startswith(f"{flag} is a llama.cpp flag that mpillama does not support")


def test_the_arity_of_foreign_flags() -> None:
    arities = {"-ngl": 1, "-fa": 1, "-nkvo": 0, "-cmoe": 0, "--control-vector-layer-range": 2, "--mlock": 0}
    assert {flag: FLAGS[flag].arity for flag in arities} == arities
    assert all(0 <= foreign.arity <= 2 for foreign in FLAGS.values())


def test_lines_are_read_in_all_their_parts() -> None:
    every = {flag for command in ("", *ACCEPTED) for flag in foreign_flags(command).values()}
    for flag in every:
        assert flag.names
        assert not any(mark in word for word in (*flag.metavars, *flag.variables) for mark in "$ ")
        assert all(variable.startswith("LLAMA_ARG_") and variable.isupper() for variable in flag.variables)
        assert not flag.remark.startswith("|")
    ngl = FLAGS["-ngl"]
    assert (ngl.metavars, ngl.variables) == (("N",), ("LLAMA_ARG_N_GPU_LAYERS",))
    assert (FLAGS["-mm"].remark, FLAGS["--path"].remark) == ("there are only models of text", "")


@pytest.mark.parametrize("flag", ["-cnv", "--conversation", "-i", "--interactive", "-if", "-mli", "--multiline-input"])
def test_a_conversation_is_what_chat_is(flag: str) -> None:
    assert notes_of("chat", flag)[0].startswith(f"{flag} has no effect")
    assert refused(flag).endswith("does not support: use mpillama chat")


def test_no_conversation_is_what_generate_does() -> None:
    assert notes_of("generate", "--no-conversation")[0].startswith("--no-conversation has no effect")
    assert refused("chat", "-no-cnv") == "-no-cnv is a flag of mpillama generate, not of mpillama chat"


def test_what_only_a_server_does_is_named_so() -> None:
    assert refused("--metrics") == "--metrics is a flag of mpillama serve, not of mpillama generate"
    # A flag of another command comes first: bench ignores -c, which elsewhere is not.
    assert refused("doctor", "-c", "5") == "-c is a flag of mpillama generate, not of mpillama doctor"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["serve", "--reasoning-format", "none"],
            "--reasoning-format: expected auto or deepseek, got 'none': thoughts",
        ),
        (["serve", "--cors-origins", "http://a"], "--cors-origins: expected *, got 'http://a': pages of any origin"),
        (["bench", "-embd", "0,1"], "-embd: expected 0, got '1': logits"),
    ],
)
def test_of_some_values_only_what_is_done_anyway(words: list[str], said: str) -> None:
    assert refused(*words).startswith(said)
    assert len(notes_of("serve", "--reasoning-format", "deepseek", "--cors-origins=*")) == 2
    assert len(notes_of("bench", "-embd", "0,0")) == 1


@pytest.mark.parametrize("flag", ["-fa", "--flash-attn", "-co", "--color", "--log-colors"])
def test_a_value_that_older_versions_did_not_have(flag: str) -> None:
    for words in ([flag], [flag, "off"], [flag, "auto"], [flag, "1"], [flag, "-1"], [f"{flag}=on"]):
        assert generate(*words, "-n", "3").predict == 3
        assert len(generate("-n", "3", *words).notes) == 1
    assert "unexpected argument 'maybe'" in refused(flag, "maybe")


def test_switches_of_llama_bench_have_values() -> None:
    words = "-nkvo 0,1 --no-host 0 --repack 1 -mmp 0 --mmap 1 -dio 1 -nopo 1 --no-op-offload 0 -embd 0 -fa on,0,auto"
    found = parse(["bench", *words.split(), "-nkvo", "-c", "512", "-p", "7"], {})[1]
    assert (found.n_prompt, len(found.notes)) == ((7,), 12)
    assert "unexpected argument '0'" in refused("-nkvo", "0")


def test_what_llama_batched_bench_has() -> None:
    assert parse(["bench", "--output-format", "jsonl"], {})[1].output == "jsonl"
    for words in (["-npp", "1"], ["-ntg", "1"], ["-pps"], ["-tgs"]):
        assert "mpillama bench" in refused("bench", *words)


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("-cmoe", "-dev cuda:0,cpu and -ts, or with --ep"),
        ("--rpc", "start mpillama with mpirun"),
        ("-mu", "use -hf"),
        ("--ssl-key-file", "a tunnel or a proxy"),
        ("--context-shift", "a larger -c"),
        ("--lora", "merge it into the model first"),
        ("-o", "> FNAME"),
    ],
)
def test_a_refusal_says_what_to_do(flag: str, hint: str) -> None:
    assert hint in refused(flag, "x")


def test_hints_name_flags_that_there_are() -> None:
    options: list[Option] = [o for name in ("generate", "chat", "serve", "bench") for o in find_command(name).options]
    known = {name for option in options for name in (*option.names, *option.negatives)}
    texts = [flag.remark for command in ("", *ACCEPTED) for flag in foreign_flags(command).values()]
    for text in [*texts, *PROGRAMS.values()]:
        named = [word.strip(",.:;") for word in text.split() if word.startswith("-")]
        assert set(named) <= known, text


@pytest.mark.parametrize("flag", ["-ngl", "--n-gpu-layers", "-mg"])
def test_who_asks_for_a_gpu_is_told_how_to_get_one(flag: str) -> None:
    plain, hint = f"{flag} has no effect in mpillama", ": GPUs are used with -dev cuda:0 or --backend cuda"
    for words in (["generate"], ["bench", "--backend", "cpu"], ["serve", "-dev", "cpu"]):
        assert notes_of(*words, flag, "7") == [plain + hint]
    for words in (["generate", "--backend", "cuda"], ["bench", "-dev", "cpu,cuda:1"], ["serve", "-dev", "hip"]):
        assert notes_of(*words, flag, "7") == [plain]
    assert notes_of("generate", flag, "0") == notes_of("inspect", flag, "7") == [plain]


def test_variables_of_foreign_flags_are_noted() -> None:
    environ = {"LLAMA_ARG_RPC": "a:1", "LLAMA_ARG_NO_JINJA": "1", "LLAMA_ARG_N_GPU_LAYERS": "9", "LLAMA_ARG_MMPROJ": ""}
    assert sorted(notes_of("generate", "-fa", "on", **environ)) == [
        "-fa has no effect in mpillama",
        "LLAMA_ARG_NO_JINJA has no effect in mpillama: chat templates are always Jinja",
        "LLAMA_ARG_N_GPU_LAYERS has no effect in mpillama: GPUs are used with -dev cuda:0 or --backend cuda",
        "LLAMA_ARG_RPC has no effect in mpillama: start mpillama with mpirun: ranks take the place of RPC servers",
    ]
    metrics = {"LLAMA_ARG_ENDPOINT_METRICS": "1"}
    assert notes_of("generate", "-v", **metrics) == []
    assert notes_of("serve", **metrics) == [
        "LLAMA_ARG_ENDPOINT_METRICS has no effect in mpillama: /metrics is always there"
    ]


def test_no_variable_is_of_a_flag_that_a_command_has() -> None:
    for name in ("generate", "chat", "serve", "batch", "logits"):
        options = find_command(name).options
        own = {option.env for option in options} | {option.negative_env for option in options}
        assert not own & {variable for flag in foreign_flags(name).values() for variable in flag.variables}


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("server", "use mpillama serve"),
        ("llama-server", "use mpillama serve"),
        ("cli", "use mpillama chat"),
        ("llama-cli", "use mpillama chat"),
        ("completion", "use mpillama generate"),
        ("run", "use mpillama generate"),
        ("llama-bench", "use mpillama bench"),
        ("batched-bench", "use mpillama bench with -npl"),
        ("perplexity", "use llama.cpp's"),
        ("llama-quantize", "use llama.cpp's"),
        ("tokenize", "use llama.cpp's"),
    ],
)
def test_names_of_llama_cpps_programs(word: str, hint: str) -> None:
    assert refused(word, "-m", "x").startswith(f"{word} is a program of llama.cpp: {hint}")


TEMPLATE = "tokenizer.chat_template=str:{% for m in messages %}{{ m.content }}{% endfor %}"


def told(*argv: str) -> str:
    """What `generate` says before it loads the demo model."""
    args: Namespace = generate("-v", *argv)
    stream = io.StringIO()
    generate_command._prepare(args, 1, Log(args, stream=stream))
    return stream.getvalue()


def test_a_prompt_that_does_not_go_through_the_template_is_told(tmp_path: Path) -> None:
    said = told("-p", "Hi", "--override-kv", TEMPLATE)
    assert "without the model's chat template" in said
    assert "mpillama chat" in said
    assert "-sys" in said
    (tmp_path / "x").write_text("Hi")
    for words in (["-sys", "Be brief."], ["--chat-template", "chatml"]):
        assert told("-p", "Hi", "--override-kv", TEMPLATE, *words) == ""
    assert told("-f", str(tmp_path / "x"), "--override-kv", TEMPLATE) == told("-p", "Hi") == ""
