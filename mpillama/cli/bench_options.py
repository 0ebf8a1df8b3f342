"""The flags of `mpillama bench`: llama-bench's, where commas, repetition and ranges give several values."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

from mpillama.bench.output import FORMATS
from mpillama.bench.plan import Load
from mpillama.cli.checks import check_model
from mpillama.cli.grid_options import GRID
from mpillama.cli.options import CONTEXT, LOGGING, MODEL, Option
from mpillama.cli.parallel_options import BACKEND, COLLECTIVES, DEVICE, TIMEOUT
from mpillama.cli.values import BadValueError, choice, integer, number, path
from mpillama.errors import UsageError

_RANGE = re.compile(r"([0-9]+)-([0-9]+)(?:([+*])([0-9]+))?")
# A list longer than this is a slip of the hand.
_MAX_VALUES = 1000
# llama-bench's, for what is not typed.
_DEFAULTS: dict[str, tuple[object, ...]] = {
    "n_prompt": (512,),
    "n_gen": (128,),
    "n_depth": (0,),
    "n_parallel": (1,),
    "batch_size": (2048,),
    "ubatch_size": (512,),
    "cache_type_k": ("f16",),
    "cache_type_v": ("f16",),
    "threads": (-1,),
}


def integers(low: int) -> Callable[[str], tuple[int, ...]]:
    """Return a parser of ``1,2,4``, ``1-4``, ``128-512+128`` and ``1-64*2``, all of at least ``low``."""
    single = integer(low)

    def parse(text: str) -> tuple[int, ...]:
        return tuple(value for part in text.split(",") for value in expand(part))

    def expand(part: str) -> list[int]:
        match = _RANGE.fullmatch(part)
        if match is None:
            return [single(part)]
        first, last, operator, step = single(match[1]), single(match[2]), match[3] or "+", int(match[4] or 1)
        if first > last or step == 0 or (operator == "*" and (step == 1 or first == 0)):
            raise BadValueError(f"expected a range that grows, like 1-8, 128-512+128 or 1-64*2, got {part!r}")
        found = []
        while first <= last:
            found.append(first)
            if len(found) > _MAX_VALUES:
                raise BadValueError(f"expected at most {_MAX_VALUES} values, got {part!r}")
            first = first + step if operator == "+" else first * step
        return found

    return parse


def several(parse: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    """Return a parser of a list of what ``parse`` takes."""
    return lambda text: tuple(parse(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Parse a list of names."""
    found = tuple(text.split(","))
    if not all(found) or "\0" in text:
        raise BadValueError(f"expected names separated by commas, got {text!r}")
    return found


def pair(text: str) -> tuple[tuple[int, int]]:
    """Parse ``PP,TG``."""
    parts = text.split(",")
    if len(parts) != 2:
        raise BadValueError(f"expected two lengths like 512,128, got {text!r}")
    prompt, generated = (integer(0)(part) for part in parts)
    return ((prompt, generated),)


def splits(text: str) -> tuple[tuple[float, ...] | str, ...]:
    """Parse splits separated by commas, each of them ``auto``, ``memory`` or shares separated by slashes: ``3/1``."""
    found: list[tuple[float, ...] | str] = []
    for part in text.split(","):
        if part in ("auto", "memory"):
            found.append(part)
            continue
        try:
            shares = tuple(number(share) for share in part.split("/"))
        except BadValueError:
            shares = ()
        if not shares or min(shares) < 0 or max(shares) <= 0:
            raise BadValueError(f"expected shares separated by / and splits by commas, like 1/1,3/1,auto, got {text!r}")
        found.append(shares)
    return tuple(found)


def _list(names: str, help: str, parse: Callable[[str], tuple[object, ...]], **more: str) -> Option:
    """Return a flag of several values; what was not typed stays empty until `with_defaults`."""
    option = Option(tuple(names.split()), help, parse, (), repeat=True, **more)  # type: ignore[arg-type]
    usual = ",".join(map(str, _DEFAULTS.get(option.dest, ())))
    return replace(option, shown=option.shown or usual)


def _context(dest: str) -> Option:
    """Return a flag of the other commands as one that takes several values."""
    option = next(option for option in CONTEXT if option.dest == dest)
    parse = several(option.parse or str)
    return replace(option, parse=parse, default=(), env="", repeat=True, shown=",".join(map(str, _DEFAULTS[dest])))


_HUGGING_FACE = ("hf_repo", "hf_file", "hf_token", "offline")
_TEST = (
    _list("-m --model", "model files", names, metavar="FNAME,...", shown="the demo model"),
    _list(
        "--shape",
        "models of random weights made in memory, e.g. llama-1b:Q4_K_M; a wrong name lists all",
        names,
        metavar="NAME[:TYPE],...",
    ),
    _list("-p --n-prompt", "tokens of a prompt, 0 = no such test", integers(0)),
    _list("-n --n-gen", "tokens to generate, 0 = no such test", integers(0)),
    _list("-pg", "a prompt and tokens to generate after it, timed together; can be repeated", pair, metavar="PP,TG"),
    _list("-d --n-depth", "tokens in the context before the test", integers(0)),
    _list("-npl --n-parallel", "sequences that are evaluated together, with as many tokens each", integers(1)),
    _list("-b --batch-size", "logical maximum batch size", integers(1)),
    _list("-ub --ubatch-size", "physical maximum batch size", integers(1)),
    _context("cache_type_k"),
    _context("cache_type_v"),
    _list("-t --threads", "CPU threads per rank, 0 or -1 = the rank's share of its node", integers(-1)),
    _list(
        "-ts --tensor-split",
        "share of the model of each rank, separated by /; auto = by measured speed, memory = by free memory; commas "
        "separate splits",
        splits,
        metavar="N0/N1/...,auto,...",
        shown="equal shares",
    ),
)
_RUN = (
    Option(("-r", "--repetitions"), "times each test is repeated", integer(1), 5),
    Option(("--delay",), "seconds to wait before each test", integer(0), 0),
    Option(("--no-warmup",), "time the first run too", None, False),
    Option(("--progress",), "say on stderr which test runs", None, False),
    Option(
        ("--compare",),
        "run llama.cpp (llama-cpp-python package) on the same tests in alternation; on one host",
        choice("llama.cpp"),
        None,
        "llama.cpp",
    ),
)
_OUTPUT = (
    Option(
        ("-o", "--output", "--output-format"),
        "format on stdout: " + ", ".join(("none", *FORMATS)),
        choice("none", *FORMATS),
        "md",
        "FORMAT",
    ),
    Option(("-oe", "--output-err"), "format on stderr", choice("none", *FORMATS), None, "FORMAT", shown="none"),
    Option(("--plot",), "draw tokens per second over ranks, depth or threads", path, None, "FILE.png"),
    Option(
        ("--plot-add",),
        "results of other runs (-o json, jsonl) to draw along; can be repeated",
        lambda text: (path(text),),
        (),
        "FILE",
        repeat=True,
    ),
)

BENCH = (
    *(replace(option, group="what is measured") for option in _TEST),
    *(replace(option, group="what is measured") for option in (*BACKEND, *DEVICE)),
    *(replace(option, group="what is measured") for option in (*COLLECTIVES, *TIMEOUT)),
    *(replace(option, env="") for option in GRID),
    *(replace(option, excludes=(), env="") for option in MODEL if option.dest in _HUGGING_FACE),
    *(replace(option, group="how") for option in _RUN),
    *(replace(option, group="output") for option in _OUTPUT),
    *(option for option in LOGGING if option.dest != "perf"),
)


def with_defaults(namespace: Namespace) -> Namespace:
    """Return the namespace with llama-bench's defaults for the lists that were not typed."""
    filled = {dest: getattr(namespace, dest) or values for dest, values in _DEFAULTS.items()}
    return Namespace(**{**vars(namespace), **filled})


def loads(args: Namespace) -> list[Load]:
    """Return the loads in order: files, then shapes; without either the model of ``-hf`` or the demo model."""
    models = [(name, False) for name in args.model] + [(name, True) for name in args.shape]
    if args.hf_repo:
        models.insert(0, ("", False))
    splits = args.tensor_split or ((),)
    return [
        Load(name, random, split, n)
        for name, random in models or [("", False)]
        for split in splits
        for n in args.threads
    ]


def check_bench(namespace: Namespace) -> None:
    """Raise UsageError for what ``bench`` cannot do."""
    check_model(namespace)
    filled = with_defaults(namespace)
    if not (any(filled.n_prompt) or any(filled.n_gen) or any(p + g for p, g in filled.pg)):
        raise UsageError("there is nothing to run: give lengths with -p, -n or -pg, e.g. -p 512 -n 128")
    if namespace.plot_add and not namespace.plot:
        raise UsageError("--plot-add adds results to a picture: name its file with --plot FILE.png")
