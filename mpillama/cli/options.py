"""The table of flags: llama.cpp's names, environment variables and defaults, and a few of mpillama's own.

One flag is one :class:`Option`; the groups below are put together by the commands in ``commands.py``. Names and
defaults are those of llama.cpp's ``common/arg.cpp`` and ``common/common.h``. The exceptions: ``--split-mode`` is chosen
by where the ranks are, and ``-s -1`` stands for the random seed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from mpillama.cli import values

if TYPE_CHECKING:
    from mpillama.engine.sampling.params import SamplingParams


@dataclass(frozen=True)
class Option:
    """One flag.

    ``parse`` converts the text of a value (raising ``values.BadValueError``); an option without it is a switch, which
    ``names`` set to True and ``negatives`` to False. ``excludes`` holds the dests of options that cannot be given
    together with this one. With ``repeat``, ``parse`` returns a tuple and the tuples of all occurrences are joined,
    replacing the default. ``shown`` is what help says of the default where the value itself says little. With
    ``escapes``, backslash escapes in the value are replaced unless there is ``--no-escape``.
    """

    names: tuple[str, ...]
    help: str
    parse: Callable[[str], Any] | None = None
    default: Any = None
    metavar: str = "N"
    env: str = ""
    negatives: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    repeat: bool = False
    required: bool = False
    group: str = ""
    dest: str = ""
    shown: str = ""
    escapes: bool = False

    def __post_init__(self) -> None:
        if not self.dest:
            object.__setattr__(self, "dest", self.long_name.lstrip("-").replace("-", "_"))

    @property
    def long_name(self) -> str:
        """The first name that starts with two dashes, else the first name."""
        return next((name for name in self.names if name.startswith("--")), self.names[0])

    @property
    def negative_env(self) -> str:
        """The variable that switches a pair off by being set at all: LLAMA_ARG_NO_X for LLAMA_ARG_X."""
        return self.env.replace("LLAMA_ARG_", "LLAMA_ARG_NO_") if self.env and self.negatives else ""

    def default_text(self) -> str:
        """What help shows of the default; empty if there is nothing to show."""
        if self.shown:
            return self.shown
        if self.parse is None:
            return ("enabled" if self.default else "disabled") if self.negatives else ""
        return "" if self.default is None or self.default == () else str(self.default)


def _grouped(group: str, *options: Option) -> tuple[Option, ...]:
    return tuple(replace(option, group=group) for option in options)


def _number(names: str, default: float, help: str, env: str = "", dest: str = "") -> Option:
    return Option(tuple(names.split()), help, values.number, default, env=env, dest=dest)


MODEL = _grouped(
    "model",
    Option(
        ("-m", "--model"),
        "model file to load",
        values.path,
        None,
        "FNAME",
        "LLAMA_ARG_MODEL",
        excludes=("hf_repo",),
        shown="the demo model",
    ),
    Option(
        ("-hf", "-hfr", "--hf-repo"),
        "Hugging Face repository; without a quant Q4_K_M is taken, else Q8_0, else the first GGUF file",
        str,
        None,
        "USER/MODEL[:QUANT]",
        "LLAMA_ARG_HF_REPO",
        excludes=("model",),
    ),
    Option(
        ("-hff", "--hf-file"),
        "file in the Hugging Face repository; overrides the quant of --hf-repo",
        str,
        None,
        "FILE",
        "LLAMA_ARG_HF_FILE",
    ),
    Option(("-hft", "--hf-token"), "Hugging Face access token", str, None, "TOKEN", "HF_TOKEN"),
    Option(
        ("--offline",),
        "use files of the Hugging Face cache only, no network",
        None,
        False,
        env="LLAMA_ARG_OFFLINE",
    ),
    Option(
        ("--override-kv",),
        "override metadata of the model file; TYPE is int, float, bool or str; can be repeated",
        values.kv_overrides,
        (),
        "KEY=TYPE:VALUE,...",
        repeat=True,
    ),
)

CONTEXT = _grouped(
    "context",
    Option(
        ("-c", "--ctx-size"),
        "size of the context in tokens, 0 = what the model was trained with",
        values.integer(0),
        0,
        env="LLAMA_ARG_CTX_SIZE",
    ),
    Option(("-b", "--batch-size"), "logical maximum batch size", values.integer(1), 2048, env="LLAMA_ARG_BATCH"),
    Option(("-ub", "--ubatch-size"), "physical maximum batch size", values.integer(1), 512, env="LLAMA_ARG_UBATCH"),
    Option(
        ("-ctk", "--cache-type-k"),
        "data type of cached keys: f32, f16, bf16, q8_0 or q4_0",
        values.choice("f32", "f16", "bf16", "q8_0", "q4_0", later=("q4_1", "iq4_nl", "q5_0", "q5_1")),
        "f16",
        "TYPE",
        "LLAMA_ARG_CACHE_TYPE_K",
    ),
    Option(
        ("-ctv", "--cache-type-v"),
        "data type of cached values: f32, f16, bf16, q8_0 or q4_0",
        values.choice("f32", "f16", "bf16", "q8_0", "q4_0", later=("q4_1", "iq4_nl", "q5_0", "q5_1")),
        "f16",
        "TYPE",
        "LLAMA_ARG_CACHE_TYPE_V",
    ),
)

ROPE = _grouped(
    "RoPE",
    Option(
        ("--rope-scaling",),
        "RoPE frequency scaling method",
        values.choice("none", "linear", "yarn"),
        None,
        "{none,linear,yarn}",
        "LLAMA_ARG_ROPE_SCALING_TYPE",
        shown="the model's, else linear",
    ),
    Option(
        ("--rope-scale",),
        "RoPE context scaling factor, expands the context by N",
        values.reciprocal,
        0.0,
        env="LLAMA_ARG_ROPE_SCALE",
        dest="rope_freq_scale",
        shown="the model's",
    ),
    _number("--rope-freq-base", 0.0, "RoPE base frequency, 0 = the model's", "LLAMA_ARG_ROPE_FREQ_BASE"),
    _number(
        "--rope-freq-scale",
        0.0,
        "RoPE frequency scaling factor, expands the context by 1/N",
        "LLAMA_ARG_ROPE_FREQ_SCALE",
    ),
    Option(
        ("--yarn-orig-ctx",),
        "YaRN: original context size, 0 = the model's",
        values.integer(0),
        0,
        env="LLAMA_ARG_YARN_ORIG_CTX",
    ),
    _number(
        "--yarn-ext-factor", -1.0, "YaRN: extrapolation mix factor, 0 = interpolation", "LLAMA_ARG_YARN_EXT_FACTOR"
    ),
    _number("--yarn-attn-factor", -1.0, "YaRN: attention magnitude", "LLAMA_ARG_YARN_ATTN_FACTOR"),
    _number("--yarn-beta-slow", -1.0, "YaRN: high correction dim, alpha", "LLAMA_ARG_YARN_BETA_SLOW"),
    _number("--yarn-beta-fast", -1.0, "YaRN: low correction dim, beta", "LLAMA_ARG_YARN_BETA_FAST"),
)

PROMPT = _grouped(
    "prompt and output",
    Option(("-p", "--prompt"), "prompt to continue", str, None, "PROMPT", excludes=("file",), escapes=True),
    Option(("-f", "--file"), "file with the prompt", values.path, None, "FNAME", excludes=("prompt",)),
    Option(
        ("-sys", "--system-prompt"),
        "system prompt, applied through the chat template",
        str,
        None,
        "PROMPT",
        excludes=("system_prompt_file",),
    ),
    Option(
        ("-sysf", "--system-prompt-file"),
        "file with the system prompt",
        values.path,
        None,
        "FNAME",
        excludes=("system_prompt",),
    ),
    Option(
        ("-n", "--predict", "--n-predict"),
        "tokens to generate, -1 = no limit, -2 = until the context is full",
        values.integer(-2),
        -1,
        env="LLAMA_ARG_N_PREDICT",
    ),
    Option(
        ("-e", "--escape"),
        r"process the escapes \n \r \t \' \" \\ \xHH in prompts and stop strings",
        None,
        True,
        negatives=("--no-escape",),
    ),
    Option(
        ("-r", "--reverse-prompt"),
        "stop where the text PROMPT is generated; can be repeated",
        values.one,
        (),
        "PROMPT",
        repeat=True,
        escapes=True,
    ),
    Option(("-sp", "--special"), "print special tokens", None, False),
    Option(
        ("--display-prompt",),
        "print the prompt before what is generated",
        None,
        True,
        negatives=("--no-display-prompt",),
    ),
    Option(
        ("--chat-template",),
        "chat template: Jinja text or a built-in name",
        str,
        None,
        "JINJA_TEMPLATE",
        "LLAMA_ARG_CHAT_TEMPLATE",
        shown="the model's",
        excludes=("chat_template_file",),
    ),
    Option(
        ("--chat-template-file",),
        "file with the chat template",
        values.path,
        None,
        "JINJA_TEMPLATE_FILE",
        "LLAMA_ARG_CHAT_TEMPLATE_FILE",
        excludes=("chat_template",),
    ),
)

SAMPLING = _grouped(
    "sampling",
    Option(("-s", "--seed"), "seed of the random numbers, -1 = a random one", values.seed, -1, "SEED"),
    _number("--temp --temperature", 0.8, "temperature, 0 = greedy", "LLAMA_ARG_TEMPERATURE"),
    Option(("--top-k",), "top-k sampling, 0 = disabled", values.integer(), 40, env="LLAMA_ARG_TOP_K"),
    _number("--top-p", 0.95, "top-p sampling, 1.0 = disabled", "LLAMA_ARG_TOP_P"),
    _number("--min-p", 0.05, "min-p sampling, 0.0 = disabled", "LLAMA_ARG_MIN_P"),
    _number("--top-nsigma --top-n-sigma", -1.0, "top-n-sigma sampling, -1.0 = disabled", dest="top_n_sigma"),
    _number("--typical --typical-p", 1.0, "locally typical sampling, 1.0 = disabled"),
    _number("--xtc-probability", 0.0, "XTC probability, 0.0 = disabled"),
    _number("--xtc-threshold", 0.1, "XTC threshold, 1.0 = disabled"),
    _number("--dynatemp-range", 0.0, "dynamic temperature range, 0.0 = disabled"),
    _number("--dynatemp-exp", 1.0, "dynamic temperature exponent", dest="dynatemp_exponent"),
    Option(("--repeat-last-n",), "last N tokens to penalize, 0 = disabled", values.integer(), 64),
    _number("--repeat-penalty", 1.0, "penalty of repeated tokens, 1.0 = disabled", "LLAMA_ARG_REPEAT_PENALTY"),
    _number("--presence-penalty", 0.0, "presence penalty, 0.0 = disabled", "LLAMA_ARG_PRESENCE_PENALTY"),
    _number("--frequency-penalty", 0.0, "frequency penalty, 0.0 = disabled", "LLAMA_ARG_FREQUENCY_PENALTY"),
    _number("--dry-multiplier", 0.0, "DRY multiplier, 0.0 = disabled"),
    _number("--dry-base", 1.75, "DRY base"),
    Option(("--dry-allowed-length",), "DRY allowed length", values.integer(), 2),
    Option(("--dry-penalty-last-n",), "DRY penalty for the last N tokens, 0 = disabled", values.integer(), 64),
    Option(
        ("--dry-sequence-breaker",),
        "DRY sequence breaker, instead of the defaults; none = no breakers; can be repeated",
        values.one,
        ("\n", ":", '"', "*"),
        "STRING",
        repeat=True,
        dest="dry_sequence_breakers",
        escapes=True,
        shown=r"'\n', ':', '\"', '*'",
    ),
    _number("--adaptive-target", -1.0, "adaptive-p: prefer tokens near this probability, negative = disabled"),
    _number("--adaptive-decay", 0.9, "adaptive-p: how slowly the target adapts, 0.0 to 0.99"),
    Option(("--mirostat",), "0 = disabled, 1 = Mirostat, 2 = Mirostat 2.0", values.integer(0, 2), 0),
    _number("--mirostat-lr", 0.1, "Mirostat learning rate, eta"),
    _number("--mirostat-ent", 5.0, "Mirostat target entropy, tau"),
    Option(
        ("--samplers",),
        "samplers in their order, separated by ;",
        str,
        "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature",
        "SAMPLERS",
        excludes=("sampler_seq",),
    ),
    Option(
        ("--sampler-seq", "--sampling-seq"),
        "samplers in their order as letters",
        str,
        None,
        "SEQUENCE",
        shown="edskypmxt",
        excludes=("samplers",),
    ),
    Option(
        ("-l", "--logit-bias"),
        "make a token likelier or less likely, e.g. 15043+1 or 15043-1; can be repeated",
        values.one,
        (),
        "TOKEN_ID(+/-)BIAS",
        repeat=True,
    ),
    Option(("--ignore-eos",), "go on after the end-of-generation token", None, False),
)

LOGGING = _grouped(
    "logging",
    Option(("-v", "--verbose", "--log-verbose"), "print more on stderr", None, False),
    Option(("--log-file",), "write the log to a file too", values.path, None, "FNAME", "LLAMA_ARG_LOG_FILE"),
    Option(("--log-disable",), "no log, neither on stderr nor in the file", None, False),
    Option(("--no-progress",), "no progress bar (there is none without a terminal either)", None, False),
    Option(("--perf",), "print timings at the end", None, True, env="LLAMA_ARG_PERF", negatives=("--no-perf",)),
)


def sampling_params(namespace: Namespace, metadata: Mapping[str, Any] | None = None) -> SamplingParams:
    """Return the sampling parameters that the flags ask for, else the model's file by its ``metadata``.

    The dests of the sampling group are the fields of SamplingParams.

    Raises:
        UsageError: a flag is wrong; it is named.
        ModelError: what the file recommends is.
    """
    from mpillama.engine.sampling import params

    given: dict[str, Any] = {
        field.name: getattr(namespace, field.name, field.default) for field in fields(params.SamplingParams)
    }
    given["samplers"] = (
        params.parse_samplers(namespace.samplers)
        if namespace.sampler_seq is None
        else params.parse_sampler_seq(namespace.sampler_seq)
    )
    given["logit_bias"] = tuple(params.parse_logit_bias(text) for text in namespace.logit_bias)
    breakers = namespace.dry_sequence_breakers
    while "none" in breakers:
        breakers = breakers[breakers.index("none") + 1 :]
    given["dry_sequence_breakers"] = breakers
    by_user = namespace.given | ({"samplers"} if "sampler_seq" in namespace.given else set())
    given |= params.recommended(metadata or {}, by_user)
    return params.SamplingParams(**given)
