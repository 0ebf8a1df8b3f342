"""`mpillama generate`: continue a prompt, and stream the text to stdout."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

from mpillama.chat import encode_chat, template_from
from mpillama.cli.files import read_text
from mpillama.cli.grammar import constraint_from
from mpillama.cli.memory import least_context
from mpillama.cli.options import sampling_params
from mpillama.cli.progress import Log, format_timings
from mpillama.cli.prompt_cache import PromptCache
from mpillama.cli.session import Loaded, Model, load, open_model
from mpillama.cli.values import unescape
from mpillama.comm.base import World
from mpillama.engine.engine import Engine
from mpillama.engine.request import Output, Request, RequestParams
from mpillama.engine.sampling.chain import Sampler
from mpillama.errors import UsageError, UserError
from mpillama.gguf.reader import GGUFHeader
from mpillama.spmd import Interrupts
from mpillama.steps import Leader, follow
from mpillama.tokenizer import Tokenizer, load_tokenizer

_RAW = (
    "the prompt is continued as it is, without the model's chat template: mpillama chat talks to the model, and -sys "
    "puts the prompt into the template here"
)


@dataclass
class _Work:
    """What only rank 0 holds."""

    tokenizer: Tokenizer
    request: Request
    shown_prompt: str
    cache: PromptCache


def run(args: Namespace, world: World, interrupts: Interrupts) -> int:
    """Run the command on this rank; returns the exit code."""
    log = Log(args, world.rank)
    loaded, work = load(args, world, log, lambda: _prepare(args, world.size, log))
    interrupts.deferred = True
    if work is None:
        return follow(world, loaded.runner)
    leader = Leader(world, loaded.runner, loaded.model.grid.pp)
    try:
        timings = _generate(args, leader, loaded, work, interrupts, log)
    except UserError as error:
        leader.stop(error.exit_code)
        error.told = True
        raise
    leader.stop(interrupts.exit_code)
    if args.perf and not interrupts.exit_code:
        log.info(timings)
    return interrupts.exit_code


def _prepare(args: Namespace, n_ranks: int, log: Log) -> tuple[Model, _Work]:
    text, system = prompt_texts(args)
    header, model = open_model(args, n_ranks)
    tokenizer = load_tokenizer(header.metadata)
    text, templated = _templated(args, header, text, system)
    if args.prompt and not templated and header.metadata.get("tokenizer.chat_template"):
        log.info(_RAW)
    prompt = encode_chat(tokenizer, text) if templated else tokenizer.encode(text)
    if not prompt:
        if tokenizer.bos_id is None:
            raise UsageError(
                "the prompt is empty, and the model has no token to begin with; give a prompt with -p or -f"
            )
        prompt = [tokenizer.bos_id]
    if len(prompt) >= model.n_ctx:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens but the context holds {model.n_ctx}; shorten it, or raise -c"
        )
    if max(prompt) >= model.cfg.n_vocab:
        raise UsageError(f"the tokenizer made token {max(prompt)}, but the model has only {model.cfg.n_vocab}")
    params = RequestParams(
        sampling=sampling_params(args, header.metadata),
        max_tokens=args.predict if args.predict > 0 else None,
        stop=args.reverse_prompt,
        ignore_eos=args.ignore_eos,
        special=args.special,
        constraint=constraint_from(args, tokenizer, model.cfg.n_vocab),
    )
    model = replace(model, n_kv_min=least_context(args, model.n_kv, len(prompt) + 1))
    cache = PromptCache(args, header.metadata, model, log)
    # Now, and not when the weights have been read: a bias may be wrong.
    Sampler(params.sampling, model.cfg.n_vocab, model.n_ctx, tokenizer.token_bytes)
    shown = tokenizer.decode(prompt, special=args.special) if args.display_prompt and not templated else ""
    return model, _Work(tokenizer, Request("generate", tuple(prompt), params), shown, cache)


def prompt_texts(args: Namespace) -> tuple[str, str | None]:
    """Return the prompt and the system prompt, from flags or files; escapes in ``-p`` are replaced already."""
    prompt = _read(args.file, "-f") if args.file else args.prompt or ""
    if args.file and args.escape:
        prompt = unescape(prompt)
    system = _read(args.system_prompt_file, "-sysf") if args.system_prompt_file else args.system_prompt
    return prompt, system


def _read(path: str | Path, flag: str) -> str:
    # Editors end files with a newline that is not meant as part of the prompt (llama.cpp drops it too).
    return read_text(path, flag).removesuffix("\n")


def _templated(args: Namespace, header: GGUFHeader, prompt: str, system: str | None) -> tuple[str, bool]:
    """Apply the chat template if the flags ask for one; returns the text and whether it was."""
    if system is None and not args.chat_template and not args.chat_template_file:
        return prompt, False
    override = _read(args.chat_template_file, "--chat-template-file") if args.chat_template_file else args.chat_template
    template = template_from(header.metadata, override)
    if template is None:
        raise UsageError("the model has no chat template; name one with --chat-template (chatml, llama3, gemma, …)")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return template.render(messages), True


def _generate(args: Namespace, leader: Leader, loaded: Loaded, work: _Work, interrupts: Interrupts, log: Log) -> str:
    """Evaluate the prompt, then sample and stream tokens; returns the timings."""
    n_vocab, n_ctx, n_blocks = loaded.model.cfg.n_vocab, loaded.model.n_ctx, loaded.runner.n_blocks
    engine = Engine(leader, work.tokenizer, n_vocab, n_ctx, n_blocks, min(args.batch_size, args.ubatch_size))
    work.cache.restore(loaded, leader, engine, work.request.prompt)
    engine.add(work.request)
    outputs: list[Output] = []
    tokens = list(work.request.prompt)
    begun = False
    while engine.has_work() and not interrupts.exit_code:
        outputs = engine.step()
        if outputs and not begun:
            # Not before: a launcher forwards stdout and stderr separately: the prompt would meet the line of layout.
            begun = _write(work.shown_prompt) or True
        _write("".join(output.text for output in outputs))
        tokens += [token for output in outputs for token in output.tokens]
    if engine.has_work():
        _write("".join(output.text for output in engine.cancel(work.request.id)))
    if begun:
        _write("\n")
    work.cache.save(loaded, leader, engine, tokens)
    if interrupts.exit_code or not outputs:
        return ""
    end = outputs[-1]
    if end.finish_reason == "error":
        raise UserError(str(end.stop_reason))
    if end.stop_reason == "context":
        log.info(f"the context of {n_ctx} tokens is full; raise -c to go on")
    if end.usage is None or end.timings is None:
        return ""
    n = end.usage.n_generated
    return format_timings(
        load=loaded.seconds,
        read=(loaded.reading, loaded.n_read),
        sample=(end.timings.sample, n),
        prompt=(end.timings.prompt, end.usage.n_prompt),
        eval=(end.timings.decode - end.timings.sample, n - 1),
    )


def _write(text: str) -> bool:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
    return bool(text)
