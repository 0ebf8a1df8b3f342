"""The command line: llama.cpp's names, defaults and variables, and what is said about mistakes."""

from __future__ import annotations

import itertools
import string
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillama import __version__
from mpillama.cli.commands import COMMANDS
from mpillama.cli.foreign import foreign_flags
from mpillama.cli.options import Option, sampling_params
from mpillama.cli.parser import HELP, VERSION, HelpRequested, find_command, parse
from mpillama.engine.sampling.params import SamplingParams
from mpillama.errors import UsageError

# From llama.cpp's common/common.h and common/arg.cpp, except where the comment says otherwise.
DEFAULTS: dict[str, Any] = {
    "model": None,
    "hf_repo": None,
    "hf_file": None,
    "hf_token": None,
    "offline": False,
    "override_kv": (),
    "ctx_size": 0,
    "batch_size": 2048,
    "ubatch_size": 512,
    "cache_type_k": "f16",
    "cache_type_v": "f16",
    "split_mode": None,  # llama.cpp: layer; here by where the ranks are
    "tp": None,
    "pp": None,
    "dp": None,  # what the machine suggests; mpillama's own
    "ep": "auto",
    "threads": -1,
    "backend": "auto",
    "device": None,
    "load": "auto",  # mpillama's own
    "fit": None,  # llama.cpp: on
    "fit_ctx": 4096,
    "tensor_split": None,
    "rank_timeout": 60.0,  # mpillama's own
    "collectives": "auto",  # mpillama's own
    "wire": "f32",  # mpillama's own
    "deterministic": False,  # mpillama's own
    "rope_scaling": None,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_orig_ctx": 0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_beta_fast": -1.0,
    "prompt": None,
    "file": None,
    "system_prompt": None,
    "system_prompt_file": None,
    "predict": -1,
    "prompt_cache": None,
    "prompt_cache_ro": False,
    "escape": True,
    "reverse_prompt": (),
    "special": False,
    "display_prompt": True,
    "chat_template": None,
    "chat_template_file": None,
    "seed": -1,  # llama.cpp: 4294967295, the same 32 bits
    "temp": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "top_n_sigma": -1.0,
    "typical": 1.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": 64,
    "dry_sequence_breakers": ("\n", ":", '"', "*"),
    "adaptive_target": -1.0,
    "adaptive_decay": 0.9,
    "mirostat": 0,
    "mirostat_lr": 0.1,
    "mirostat_ent": 5.0,
    "samplers": "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature",
    "sampler_seq": None,
    "logit_bias": (),
    "grammar": None,
    "grammar_file": None,
    "json_schema": None,
    "json_schema_file": None,
    "ignore_eos": False,
    "verbose": False,
    "log_file": None,
    "log_disable": False,
    "no_progress": False,  # mpillama's own
    "perf": True,
    "notes": [],
}

# Variable, a value for it, the dest and what it becomes.
VARIABLES: list[tuple[str, str, str, Any]] = [
    ("LLAMA_ARG_MODEL", "a.gguf", "model", Path("a.gguf")),
    ("LLAMA_ARG_HF_REPO", "a/b", "hf_repo", "a/b"),
    ("HF_TOKEN", "hf_x", "hf_token", "hf_x"),
    ("LLAMA_ARG_OFFLINE", "1", "offline", True),
    ("LLAMA_ARG_OFFLINE", "0", "offline", False),
    ("LLAMA_ARG_CTX_SIZE", "77", "ctx_size", 77),
    ("LLAMA_ARG_BATCH", "78", "batch_size", 78),
    ("LLAMA_ARG_UBATCH", "79", "ubatch_size", 79),
    ("LLAMA_ARG_CACHE_TYPE_K", "f32", "cache_type_k", "f32"),
    ("LLAMA_ARG_CACHE_TYPE_V", "bf16", "cache_type_v", "bf16"),
    ("LLAMA_ARG_SPLIT_MODE", "none", "split_mode", "none"),
    ("LLAMA_ARG_DEVICE", "CUDA1,ROCm0,none,cuda:2,hip", "device", "cuda:1,hip:0,cpu,cuda:2,hip"),
    ("LLAMA_ARG_FIT", "off", "fit", "off"),
    ("MPILLAMA_COLLECTIVES", "host", "collectives", "host"),
    ("MPILLAMA_WIRE", "bf16", "wire", "bf16"),
    ("LLAMA_ARG_FIT_CTX", "7", "fit_ctx", 7),
    ("LLAMA_ARG_THREADS", "3", "threads", 3),
    ("LLAMA_ARG_TENSOR_SPLIT", "3/1", "tensor_split", (3.0, 1.0)),
    ("LLAMA_ARG_ROPE_SCALING_TYPE", "yarn", "rope_scaling", "yarn"),
    ("LLAMA_ARG_ROPE_SCALE", "8", "rope_freq_scale", 0.125),
    ("LLAMA_ARG_ROPE_FREQ_BASE", "1e6", "rope_freq_base", 1e6),
    ("LLAMA_ARG_ROPE_FREQ_SCALE", "0.5", "rope_freq_scale", 0.5),
    ("LLAMA_ARG_YARN_ORIG_CTX", "4096", "yarn_orig_ctx", 4096),
    ("LLAMA_ARG_YARN_EXT_FACTOR", "0.5", "yarn_ext_factor", 0.5),
    ("LLAMA_ARG_YARN_ATTN_FACTOR", "1.5", "yarn_attn_factor", 1.5),
    ("LLAMA_ARG_YARN_BETA_SLOW", "1", "yarn_beta_slow", 1.0),
    ("LLAMA_ARG_YARN_BETA_FAST", "32", "yarn_beta_fast", 32.0),
    ("LLAMA_ARG_N_PREDICT", "5", "predict", 5),
    ("LLAMA_ARG_CHAT_TEMPLATE", "chatml", "chat_template", "chatml"),
    ("LLAMA_ARG_CHAT_TEMPLATE_FILE", "t.jinja", "chat_template_file", Path("t.jinja")),
    ("LLAMA_ARG_TEMPERATURE", "0.1", "temp", 0.1),
    ("LLAMA_ARG_TOP_K", "7", "top_k", 7),
    ("LLAMA_ARG_TOP_P", "0.7", "top_p", 0.7),
    ("LLAMA_ARG_MIN_P", "0.2", "min_p", 0.2),
    ("LLAMA_ARG_REPEAT_PENALTY", "1.1", "repeat_penalty", 1.1),
    ("LLAMA_ARG_PRESENCE_PENALTY", "0.3", "presence_penalty", 0.3),
    ("LLAMA_ARG_FREQUENCY_PENALTY", "0.4", "frequency_penalty", 0.4),
    ("LLAMA_ARG_LOG_FILE", "x.log", "log_file", Path("x.log")),
    ("LLAMA_ARG_PERF", "off", "perf", False),
    ("LLAMA_ARG_NO_PERF", "1", "perf", False),
]

# Those of commands other than generate: the command, and then the same.
OTHER_VARIABLES: list[tuple[str, str, str, str, Any]] = [
    ("serve", "LLAMA_ARG_N_PARALLEL", "5", "parallel", 5),
    ("batch", "LLAMA_ARG_N_PARALLEL", "5", "parallel", 5),
    ("serve", "LLAMA_ARG_HOST", "0.0.0.0", "host", "0.0.0.0"),
    ("serve", "LLAMA_ARG_THINK_BUDGET", "9", "reasoning_budget", 9),
    ("serve", "LLAMA_ARG_REASONING", "false", "reasoning", "off"),
    ("batch", "LLAMA_ARG_REASONING_EFFORT", "low", "reasoning_effort", "low"),
    ("chat", "LLAMA_ARG_CHAT_TEMPLATE_KWARGS", '{"a": 1}', "chat_template_kwargs", {"a": 1}),
    ("serve", "LLAMA_ARG_N_PREDICT", "5", "predict", 5),
    ("batch", "LLAMA_ARG_N_PREDICT", "5", "predict", 5),
    ("serve", "LLAMA_ARG_PORT", "81", "port", 81),
    ("serve", "LLAMA_ARG_TIMEOUT", "7", "timeout", 7),
    ("serve", "LLAMA_ARG_ALIAS", "me", "alias", "me"),
    ("serve", "LLAMA_API_KEY", "a,b", "api_key", ("a", "b")),
    ("serve", "LLAMA_ARG_API_KEY_FILE", "k", "api_key_file", Path("k")),
]
# What a command cannot do without.
REQUIRED = {
    "logits": ["--tokens", "1", "--out", "x.npy"],
    "batch": ["-i", "in.jsonl", "-o", "out.jsonl"],
}

OPTIONS = [(command, option) for command in COMMANDS for option in command.options]


def generate(*argv: str, **environ: str) -> Namespace:
    name, namespace = parse(argv, environ)
    assert name == "generate"
    return namespace


def values_of(namespace: Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(namespace).items() if name != "given"}


def refused(*argv: str, **environ: str) -> str:
    """The message of the UsageError that these arguments cause; one line, like all that users get to see."""
    with pytest.raises(UsageError) as caught:
        parse(argv, environ)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def text_of(option: Option, value: Any) -> list[str]:
    """The words that give ``value`` to ``option``."""
    if isinstance(value, bool):
        return [option.names[0]] if value else list(option.negatives[:1])
    if option.repeat:
        return list(itertools.chain.from_iterable((option.names[0], item) for item in value))
    return [option.names[0], str(value)]


def test_defaults_are_llama_cpps() -> None:
    assert values_of(generate("-p", "x")) == DEFAULTS | {"prompt": "x"}


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda x: getattr(x, "dest", None) or x.name)
def test_typing_the_default_changes_nothing(command: Any, option: Option) -> None:
    required = REQUIRED.get(command.name, [])
    if option.default is None or option.names[0] == "--rope-scale":
        return
    typed = parse([command.name, *required, *text_of(option, option.default)], {})[1]
    assert values_of(typed) == values_of(parse([command.name, *required], {})[1])


@pytest.mark.parametrize(("variable", "text", "dest", "value"), VARIABLES)
def test_variables(variable: str, text: str, dest: str, value: Any) -> None:
    assert values_of(generate("-v", **{variable: text})) == DEFAULTS | {"verbose": True, dest: value}


@pytest.mark.parametrize(("command", "variable", "text", "dest", "value"), OTHER_VARIABLES)
def test_variables_of_other_commands(command: str, variable: str, text: str, dest: str, value: Any) -> None:
    plain = parse([command, *REQUIRED.get(command, [])], {})[1]
    given = parse([command, *REQUIRED.get(command, [])], {variable: text})[1]
    assert values_of(given) == values_of(plain) | {dest: value}
    assert given.given - plain.given == {dest}


def test_every_variable_is_tested() -> None:
    tested = {variable for variable, *_ in VARIABLES} | {"LLAMA_ARG_HF_FILE"}
    tested |= {variable for _, variable, *_ in OTHER_VARIABLES}
    assert {o.env for _, o in OPTIONS} | {o.negative_env for _, o in OPTIONS} == tested | {""}
    assert generate("-v", LLAMA_ARG_HF_REPO="a/b", LLAMA_ARG_HF_FILE="c.gguf").hf_file == "c.gguf"


def test_a_flag_wins_over_its_variable_and_over_those_it_excludes() -> None:
    assert generate("-c", "5", LLAMA_ARG_CTX_SIZE="7").ctx_size == 5
    assert generate("--perf", LLAMA_ARG_NO_PERF="1").perf is True
    namespace = generate("-hf", "a/b", LLAMA_ARG_MODEL="x.gguf")
    assert (namespace.model, namespace.hf_repo) == (None, "a/b")
    assert generate("--rope-scale", "2", LLAMA_ARG_ROPE_FREQ_SCALE="0.1").rope_freq_scale == 0.5
    assert generate("-c", "5", LLAMA_ARG_CTX_SIZE="nonsense").ctx_size == 5


def test_an_empty_variable_is_unset() -> None:
    assert generate("-v", LLAMA_ARG_CTX_SIZE="", LLAMA_ARG_NO_PERF="").perf is True


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("LLAMA_ARG_CTX_SIZE", "big", "LLAMA_ARG_CTX_SIZE: expected an integer of at least 0, got 'big'"),
        ("LLAMA_ARG_OFFLINE", "maybe", "LLAMA_ARG_OFFLINE: expected one of on, enabled, true, 1"),
        ("LLAMA_ARG_SPLIT_MODE", "row", "LLAMA_ARG_SPLIT_MODE: 'row' is not supported yet"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str, said: str) -> None:
    assert said in refused("-p", "x", **{variable: text})


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda x: getattr(x, "dest", None) or x.name)
def test_every_name_of_a_flag_does_the_same(command: Any, option: Option) -> None:
    others = list(REQUIRED.get(command.name, []))
    others += ["--plot", "x.png"] if option.dest == "plot_add" else []
    if option.dest in ("hf_file", "tokens", "tokens_file", "out"):
        others = {"hf_file": ["-hf", "a/b"], "out": ["--tokens", "1"]}.get(option.dest, ["--out", "x.npy"])
        others += REQUIRED.get(command.name, []) if option.dest == "hf_file" else []
    if option.parse is None:
        for names, value in ((option.names, True), (option.negatives, False)):
            for name in names:
                assert getattr(parse([command.name, name, *others], {})[1], option.dest) is value
        return
    results: list[Namespace] = []
    samples = (
        *("0.5", "3", "1", "none", "reference", "bf16", "f32", "linear", "7,1", "a=int:1", "1+1", "top_k", "k", "host"),
        *("llama.cpp", "on", "90s", "Q4_K", "h100", "64", "direct", '{"a": 1}'),
    )
    for sample in samples:
        try:
            results = [
                parse([command.name, *words, *others], {})[1]
                for name in option.names
                for words in ([name, sample], [f"{name}={sample}"])
            ]
            break
        except UsageError:
            continue
    assert results, "no sample fits"
    assert getattr(results[0], option.dest) != option.default
    assert all(result == results[0] for result in results)


def test_names_are_unique_and_shaped_like_llama_cpps() -> None:
    for command in COMMANDS:
        names = [name for option in command.options for name in (*option.names, *option.negatives)]
        assert len(names) == len(set(names))
        assert not set(names) & set(HELP + VERSION)
        assert all(name.startswith("-") and name == name.lower() for name in names)
    # These give some of llama.cpp's flags a meaning of their own, as other programs of llama.cpp do.
    real = [(command, option) for command, option in OPTIONS if command.name not in ("bench", "batch", "plan")]
    supported = {name for _, option in real for name in (*option.names, *option.negatives)}
    everywhere = foreign_flags("")
    assert not supported & set(everywhere)
    for command in COMMANDS:
        accepted = {name for name, flag in foreign_flags(command.name).items() if flag != everywhere.get(name)}
        assert not accepted & {name for option in command.options for name in (*option.names, *option.negatives)}


def test_without_a_command_it_is_generate() -> None:
    assert parse(["-m", "x.gguf", "-p", "hi"], {}) == parse(["generate", "-m", "x.gguf", "-p", "hi"], {})


@pytest.mark.parametrize("text", ["- one", "-1", "-x", "", "--not-a-flag", "a=b", "line\nline", "ünï"])
def test_a_value_may_look_like_anything_but_a_flag(text: str) -> None:
    assert generate("-p", text).prompt == text
    assert generate(f"--prompt={text}").prompt == text


def test_a_flag_as_a_value_needs_an_equals_sign() -> None:
    assert refused("-p", "-n", "5").startswith("-p needs a value (PROMPT), but the flag -n follows")
    assert generate("-p=-n").prompt == "-n"
    assert refused("-p", "--help").startswith("-p needs a value")


def test_random_prompts_arrive_unchanged(rng: np.random.Generator) -> None:
    alphabet = string.printable + "äß€😀"
    for _ in range(50):
        text = "".join(rng.choice(list(alphabet), 20))
        assert generate("--no-escape", f"--prompt={text}").prompt == text


def test_escapes_in_prompts_and_stop_strings_but_not_in_system_prompts() -> None:
    words = ["-p", r"a\nb", "-r", r"\t", "-r", r"\x41", "-sys", r"a\nb", "--dry-sequence-breaker", r"\n"]
    namespace = generate(*words)
    assert (namespace.prompt, namespace.reverse_prompt, namespace.system_prompt) == ("a\nb", ("\t", "A"), r"a\nb")
    assert namespace.dry_sequence_breakers == ("\n",)
    namespace = generate("--no-escape", *words)
    assert (namespace.prompt, namespace.reverse_prompt) == (r"a\nb", (r"\t", r"\x41"))
    assert "--prompt: not valid UTF-8" in refused("-p", r"\xff")


def test_underscores_in_long_flags() -> None:
    assert generate("--top_k", "3", "--ctx_size=9", "--no_escape").top_k == 3
    assert parse(["inspect", "my_model.gguf"], {})[1].model == Path("my_model.gguf")


def test_the_last_of_a_flag_wins_and_repeatable_ones_add_up() -> None:
    assert generate("-n", "3", "-n", "4").predict == 4
    assert generate("--escape", "--no-escape").escape is False
    assert generate("-r", "a", "-r", "b", "--reverse-prompt", "a").reverse_prompt == ("a", "b", "a")
    assert generate("--override-kv", "a=int:1,b=bool:true", "--override-kv", "c=str:x").override_kv == (
        ("a", 1),
        ("b", True),
        ("c", "x"),
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-n"], "-n needs a value: -n N"),
        (["--prompt"], "--prompt needs a value: --prompt PROMPT"),
        (["-n", "many"], "-n: expected an integer of at least -2, got 'many'"),
        (["-n", "-3"], "-n: expected an integer of at least -2, got '-3'"),
        (["-n", "0"], "-n 0 generates nothing"),
        (["-c", "-1"], "-c: expected an integer of at least 0, got '-1'"),
        (["-b", "0"], "-b: expected an integer of at least 1, got '0'"),
        (["--temp", "hot"], "--temp: expected a number, got 'hot'"),
        (["--temp=hot"], "--temp: expected a number, got 'hot'"),
        (["--top-p", "7"], "--top-p"),
        (["--samplers", "top_q"], "--samplers"),
        (["--sampler-seq", "k?"], "--sampler-seq"),
        (["-l", "x"], "--logit-bias"),
        (["-ctk", "q5_1"], "-ctk: 'q5_1' is not supported yet; use f32, f16, bf16, q8_0 or q4_0"),
        (["-ctv", "f8"], "-ctv: expected f32, f16, bf16, q8_0 or q4_0, got 'f8'"),
        (["-sm", "row"], "-sm: 'row' is not supported yet; use none, layer or tensor"),
        (["--ep", "maybe"], "--ep: expected auto, on or off, got 'maybe'"),
        (["--pp", "0"], "--pp: expected an integer of at least 1"),
        (["-ts", "0,0"], "-ts: expected one non-negative number per rank"),
        (["-sm", "none", "-ts", "1,1"], "--tensor-split cuts the model"),
        (["-m", "x", "-hf", "a/b"], "-m and -hf exclude each other"),
        (["-p", "x", "-f", "y"], "-p and -f exclude each other"),
        (["-hff", "x.gguf"], "--hf-file names a file of a repository"),
        (["--escape=yes"], "--escape is a switch and takes no value, got 'yes'"),
        (["-p", "x", "y"], "unexpected argument 'y'"),
        (["--out", "x.npy"], "--out is a flag of mpillama logits, not of mpillama generate"),
        (["generat"], "generat: unknown command; did you mean generate?"),
        (["model.gguf"], "type mpillama -m model.gguf"),
        (["dance"], "dance: unknown command (there are generate, chat, logits, inspect"),
        (["logits", "--tokens", "1"], "mpillama logits needs --out"),
        (["logits", "--out", "x.npy"], "no tokens: give ids with --tokens"),
        (["inspect", "a.gguf", "b.gguf"], "a.gguf and b.gguf both give the model"),
        (["inspect", "a.gguf", "-m", "b.gguf"], "a.gguf and -m both give the model"),
        (["inspect", "-m", "a.gguf", "b.gguf"], "-m and b.gguf both give the model"),
        (["inspect", "a.gguf", "-n", "0"], "-n: expected an integer of at least 1"),
    ],
)
def test_mistakes(argv: list[str], said: str) -> None:
    assert said in refused(*argv)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--temperature-foo", "--temp"),
        ("--thread", "--threads"),
        ("--ctxsize", "--ctx-size"),
        ("--n-predct", "--predict"),
        ("--tempp=1", "--temp"),
        ("-tss", "-ts"),
        ("--no-excape", "--no-escape"),
        ("--grammer", "--grammar"),
    ],
)
def test_suggestions(typed: str, meant: str) -> None:
    assert refused(typed, "1").endswith(f"{typed.split('=')[0]}: unknown flag; did you mean {meant}?")


def test_one_letter_off_is_found(rng: np.random.Generator) -> None:
    flags = [option.long_name for option in find_command("generate").options if len(option.long_name) > 8]
    known = {name for _, option in OPTIONS for name in (*option.names, *option.negatives)} | set(
        foreign_flags("generate")
    )
    for flag in rng.choice(flags, 20, replace=False):
        at = int(rng.integers(3, len(flag)))
        typo = flag[:at] + flag[at + 1 :]
        if typo not in known:
            assert "did you mean --" in refused(typo)


def test_nothing_near() -> None:
    assert refused("--zzzzzzzz") == "--zzzzzzzz: unknown flag; see mpillama generate --help"
    assert "unknown flag" in refused("--")


def test_logits_and_inspect() -> None:
    name, namespace = parse(["logits", "-m", "x", "--tokens", "1,2, 3", "--out", "y.npy", "-ts", "3,1"], {})
    assert (name, namespace.tokens, namespace.out) == ("logits", (1, 2, 3), Path("y.npy"))
    assert namespace.tensor_split == (3.0, 1.0)
    name, namespace = parse(["inspect", "x.gguf", "-n", "4", "--json"], {})
    assert (name, namespace.model, namespace.n_ranks, namespace.json) == ("inspect", Path("x.gguf"), 4, True)


def test_no_arguments_and_help() -> None:
    for argv in ([], ["-h"], ["--help"]):
        with pytest.raises(HelpRequested) as caught:
            parse(argv, {})
        for command in COMMANDS:
            assert command.name in caught.value.text
            assert command.summary in caught.value.text
            assert command.examples[0] in caught.value.text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_a_command(command: Any) -> None:
    for flag in HELP:
        with pytest.raises(HelpRequested) as caught:
            parse([command.name, "-v", flag], {})
        text = caught.value.text
        for example in command.examples:
            assert example in text
        for option in command.options:
            assert all(name in text for name in (*option.names, *option.negatives))
            assert f"\n{option.group}:\n" in text
            assert not option.env or option.env in text


def test_the_examples_in_the_help_are_right() -> None:
    import shlex

    for command in COMMANDS:
        for example in command.examples:
            words = shlex.split(example)
            name, _ = parse(words[words.index("mpillama") + 1 :], {})
            assert name == command.name


def test_help_of_the_default_command_and_version() -> None:
    with pytest.raises(HelpRequested, match="usage: mpillama generate"):
        parse(["-m", "x", "--help"], {})
    for argv in (["--version"], ["inspect", "--version"]):
        with pytest.raises(HelpRequested) as caught:
            parse(argv, {})
        assert caught.value.text == f"mpillama {__version__}"


def test_sampling_params_of_the_defaults_are_the_defaults() -> None:
    assert sampling_params(generate("-p", "x")) == SamplingParams()


def test_sampling_params_take_every_flag(rng: np.random.Generator) -> None:
    chosen = {
        "--seed": int(rng.integers(2**31)),
        "--temp": 0.3,
        "--top-k": int(rng.integers(41, 100)),
        "--top-p": float(rng.random()),
        "--min-p": float(rng.random()),
        "--typical": float(rng.random()),
        "--top-nsigma": 2.5,
        "--xtc-probability": float(rng.random()),
        "--xtc-threshold": float(rng.random()),
        "--dynatemp-range": 0.25,
        "--dynatemp-exp": 1.5,
        "--repeat-last-n": 17,
        "--repeat-penalty": 1.2,
        "--presence-penalty": 0.1,
        "--frequency-penalty": 0.2,
        "--dry-multiplier": 0.8,
        "--dry-base": 2.0,
        "--dry-allowed-length": 3,
        "--dry-penalty-last-n": 99,
        "--adaptive-target": 0.6,
        "--adaptive-decay": 0.5,
        "--mirostat": 2,
        "--mirostat-lr": 0.2,
        "--mirostat-ent": 4.0,
    }
    params = sampling_params(generate(*(word for flag, value in chosen.items() for word in (flag, str(value)))))
    fields = {"--top-nsigma": "top_n_sigma", "--dynatemp-exp": "dynatemp_exponent"}
    for flag, value in chosen.items():
        assert getattr(params, fields.get(flag, flag[2:].replace("-", "_"))) == value, flag
    untouched = {"min_keep", "logit_bias", "samplers", "dry_sequence_breakers"}
    assert {name for name, value in vars(params).items() if value == getattr(SamplingParams(), name)} == untouched


def test_what_a_model_recommends_is_its_default() -> None:
    model = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
        "general.sampling.sequence": "top_k;temperature",
    }
    params = sampling_params(generate("-p", "x"), model)
    assert (params.temp, params.top_k, params.samplers) == (0.6, 20, ("top_k", "temperature"))
    # Also a flag that says what is the default without it.
    params = sampling_params(generate("--temp", "0.8", "--sampler-seq", "pt"), model)
    assert (params.temp, params.top_k, params.samplers) == (0.8, 20, ("top_p", "temperature"))
    from_environment = parse(["generate", "-p", "x"], {"LLAMA_ARG_TOP_K": "7"})[1]
    assert sampling_params(from_environment, model).top_k == 7


def test_samplers_biases_and_breakers() -> None:
    assert sampling_params(generate("--samplers", "top_k;temperature")).samplers == ("top_k", "temperature")
    assert sampling_params(generate("--sampling-seq", "kt")).samplers == ("top_k", "temperature")
    params = sampling_params(generate("-l", "5+1.5", "-l", "6-2"))
    assert params.logit_bias == ((5, 1.5), (6, -2.0))
    breakers = ["--dry-sequence-breaker"]
    assert sampling_params(generate(*breakers, "none")).dry_sequence_breakers == ()
    words = [*breakers, "a", *breakers, "none", *breakers, r"\n"]
    assert sampling_params(generate(*words)).dry_sequence_breakers == ("\n",)
