"""The commands of the program: a new one is an entry of ``COMMANDS`` and the function it names."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from mpillama.cli import values
from mpillama.cli.batch_options import BATCH, check_batch
from mpillama.cli.bench_options import BENCH, check_bench
from mpillama.cli.chat_options import CHAT, check_chat
from mpillama.cli.checks import check_model, check_split
from mpillama.cli.doctor_options import DOCTOR
from mpillama.cli.grammar import GRAMMAR
from mpillama.cli.grid_options import GRID
from mpillama.cli.options import CONTEXT, LOGGING, MODEL, PROMPT, ROPE, SAMPLING, Option, sampling_params
from mpillama.cli.parallel_options import PARALLEL, TENSOR_SPLIT
from mpillama.cli.plan_options import PLAN, check_plan
from mpillama.cli.prompt_cache_options import PROMPT_CACHE
from mpillama.cli.serve_options import SERVE, check_serve
from mpillama.errors import UsageError


@dataclass(frozen=True)
class Command:
    """One command.

    ``run`` is ``module:function``, imported when the command runs, so that help needs no model code. The function
    returns the exit code; it takes the namespace and, if the command is ``parallel``, the world and the interrupts.
    ``check`` looks at the whole namespace and raises UsageError. ``positional`` is the dest of the option that a bare
    word sets, if the command takes one. ``stranded``: it runs on the first rank also where the ranks cannot join.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    options: tuple[Option, ...]
    run: str
    check: Callable[[Namespace], None] = lambda namespace: None
    positional: str = ""
    parallel: bool = True
    stranded: bool = False

    def load(self) -> Callable[..., int]:
        """Import and return the function that runs the command."""
        module, _, function = self.run.partition(":")
        return cast("Callable[..., int]", getattr(import_module(module), function))


def check_generate(namespace: Namespace) -> None:
    """Raise UsageError for what ``generate`` cannot do."""
    check_model(namespace)
    check_split(namespace)
    if namespace.predict == 0:
        raise UsageError("-n 0 generates nothing: give the number of tokens, or -1 for no limit")
    sampling_params(namespace)


def check_logits(namespace: Namespace) -> None:
    """Raise UsageError for what ``logits`` cannot do."""
    check_model(namespace)
    check_split(namespace)
    if namespace.tokens is None and namespace.tokens_file is None:
        raise UsageError("no tokens: give ids with --tokens 1,2,3 or a file of ids with --tokens-file FILE")


LOGITS = (
    Option(
        ("--tokens",),
        "token ids to evaluate, e.g. 1,15043,29991",
        values.token_ids,
        None,
        "IDS",
        excludes=("tokens_file",),
        group="logits",
    ),
    Option(
        ("--tokens-file",),
        "text file of token ids separated by commas or white space",
        values.path,
        None,
        "FNAME",
        excludes=("tokens",),
        group="logits",
    ),
    Option(
        ("--out",),
        "file to write the logits to: float32, one row per token",
        values.path,
        None,
        "FNAME.npy",
        required=True,
        group="logits",
    ),
)

INSPECT = (
    Option(("-n",), "show what each of N ranks would hold", values.integer(1), 1, dest="n_ranks", group="inspect"),
    Option(("--json",), "print JSON", None, False, group="inspect"),
)

COMMANDS = (
    Command(
        "generate",
        "continue a prompt (the default command)",
        (
            'mpillama -m model.gguf -p "Once upon a time" -n 64',
            'mpirun -n 4 mpillama generate -m model.gguf -p "The capital of France is" -n 32 --temp 0',
            "mpirun -n 2 mpillama generate -m model.gguf -ts 3,1 -f prompt.txt -c 4096",
            "mpirun -n 3 mpillama generate -m model.gguf -dev cuda:0,cuda:1,cpu -ts 9,9,1 -f prompt.txt",
            "mpirun -n 8 mpillama generate -m model.gguf --tp 4 --pp 2 -f prompt.txt",
            "mpirun -n 4 mpillama generate -m model.gguf -f book.txt --prompt-cache book.kv -n 256",
            'mpillama generate -hf ggml-org/gemma-3-1b-it-GGUF:Q8_0 -p "Hello" -s 42',
        ),
        (*MODEL, *PROMPT, *CONTEXT, *PROMPT_CACHE, *GRID, *PARALLEL, *SAMPLING, *GRAMMAR, *ROPE, *LOGGING),
        "mpillama.cli.generate:run",
        check_generate,
    ),
    Command(
        "chat",
        "talk to a model",
        (
            "mpillama chat -m model.gguf",
            'mpirun -n 4 mpillama chat -m model.gguf -sys "You are brief." -c 8192',
            'echo "What is MPI?" | mpirun -n 2 mpillama chat -m model.gguf --single-turn',
        ),
        CHAT,
        "mpillama.cli.chat:run",
        check_chat,
    ),
    Command(
        "logits",
        "write the logits of given tokens to a .npy file",
        (
            "mpillama logits -m model.gguf --tokens 1,15043,29991 --out logits.npy",
            "mpirun -n 4 mpillama logits -m model.gguf --tokens-file ids.txt --out logits.npy",
        ),
        (*LOGITS, *MODEL, *CONTEXT, *GRID, *PARALLEL, *ROPE, *LOGGING),
        "mpillama.cli.logits:run",
        check_logits,
    ),
    Command(
        "inspect",
        "show a model file and what each rank would hold of it",
        (
            "mpillama inspect model.gguf",
            "mpillama inspect model.gguf -n 4 -ts 3,1,1,1",
            "mpillama inspect model.gguf -n 8 --tp 4 --pp 2",
            "mpillama inspect model.gguf --json",
        ),
        (*INSPECT, *GRID, *TENSOR_SPLIT, *MODEL, *LOGGING),
        "mpillama.cli.inspect:run",
        check_model,
        positional="model",
        parallel=False,
    ),
    Command(
        "bench",
        "measure tokens per second, and where the time goes",
        (
            "mpillama bench -m model.gguf -p 512 -n 128",
            "mpirun -n 4 mpillama bench --shape llama-8b:Q4_K_M -n 64 -d 0,4096 -v",
            "mpirun -n 2 mpillama bench -m a.gguf,b.gguf -t 1,2 -ts 1/1,2/1 -o json",
            "mpirun -n 4 mpillama bench -m model.gguf --tp 2 --pp 2 -p 2048",
            "mpillama bench --shape llama-1b:Q4_0 --compare llama.cpp",
            "mpillama bench -m model.gguf -p 0 -n 64 -d 128 -npl 1,4,16",
        ),
        BENCH,
        "mpillama.cli.bench:run",
        check_bench,
    ),
    Command(
        "serve",
        "answer requests over HTTP: OpenAI's API, and a chat page",
        (
            "mpirun -n 4 mpillama serve -m model.gguf",
            "mpirun -n 4 mpillama serve -m model.gguf --host 0.0.0.0 --api-key SECRET -np 64",
            "mpirun -n 8 mpillama serve -m model.gguf --dp 2",
            "srun mpillama serve -m model.gguf --host $HOME/model.sock",
        ),
        SERVE,
        "mpillama.cli.serve:run",
        check_serve,
    ),
    Command(
        "batch",
        "answer a file of requests, in as many jobs as it takes",
        (
            "mpirun -n 4 mpillama batch -m model.gguf -i requests.jsonl -o results.jsonl",
            "srun mpillama batch -m model.gguf -i requests.jsonl -o results.jsonl -np 64 --time-limit 11:45:00",
            "mpirun -n 8 mpillama batch -m model.gguf -i requests.jsonl -o results.jsonl --dp 4",
            "mpillama batch -i requests.jsonl -o results.jsonl --temp 0 --log-file batch.log",
        ),
        BATCH,
        "mpillama.cli.batch:run",
        check_batch,
    ),
    Command(
        "plan",
        "predict which layouts of a model fit a cluster, and what they reach",
        (
            "mpillama plan model.gguf --hosts 4 --gpus 4 --gpu-memory 40G",
            "mpillama plan --shape llama-405b:Q8_0 --hosts 64 --gpus 8 --device h100 --between ndr -np 64",
            "mpillama plan model.gguf --ranks-per-host 2 --measure",
            "mpillama plan model.gguf --cluster cluster.toml -c 32768 -np 16 --sbatch job.sh",
        ),
        PLAN,
        "mpillama.cli.plan:run",
        check_plan,
        positional="model",
        parallel=False,
    ),
    Command(
        "doctor",
        "look for what is wrong with a job: launcher, MPI, cores, GPUs, network, files",
        (
            "mpillama doctor",
            "srun mpillama doctor -m model.gguf",
            "mpirun -n 4 mpillama doctor --json",
            "srun -N 2 mpillama doctor --save cluster.toml",
        ),
        DOCTOR,
        "mpillama.cli.doctor:run",
        stranded=True,
    ),
)
DEFAULT_COMMAND = "generate"
