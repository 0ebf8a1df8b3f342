"""`mpillama generate`: continue a prompt, and stream the text to stdout."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpillama.chat import encode_chat, template_from
from mpillama.cli.options import sampling_params
from mpillama.cli.progress import Log, format_timings
from mpillama.cli.session import Loaded, Model, load, open_model
from mpillama.cli.values import unescape
from mpillama.comm.base import World
from mpillama.engine.sampling.chain import Sampler
from mpillama.engine.sequence import Sequence
from mpillama.engine.stops import StopStrings
from mpillama.errors import UsageError, UserError
from mpillama.gguf.reader import GGUFHeader
from mpillama.spmd import Interrupts, Leader, follow
from mpillama.tokenizer import Tokenizer, load_tokenizer
from mpillama.tokenizer.stream import StreamDecoder


@dataclass
class Request:
    """What only rank 0 holds."""

    tokenizer: Tokenizer
    prompt: list[int]
    shown_prompt: str
    sampler: Sampler
    n_ctx: int
    seconds_tokenize: float = 0.0


def run(args: Namespace, world: World, interrupts: Interrupts) -> int:
    """Run the command on this rank; returns the exit code."""
    log = Log(args, world.rank)
    loaded, request = load(args, world, log, lambda: _prepare(args, world.size))
    interrupts.deferred = True
    if request is None:
        return follow(world, loaded.runner)
    leader = Leader(world, loaded.runner)
    try:
        timings = _generate(args, leader, loaded, request, interrupts, log)
    except UserError as error:
        leader.stop(error.exit_code)
        error.told = True
        raise
    leader.stop(interrupts.exit_code)
    if args.perf and not interrupts.exit_code:
        log.info(timings)
    return interrupts.exit_code


def _prepare(args: Namespace, n_ranks: int) -> tuple[Model, Request]:
    text, system = _prompt_texts(args)
    header, model = open_model(args, n_ranks)
    tokenizer = load_tokenizer(header.metadata)
    text, templated = _templated(args, header, text, system)
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
    params = sampling_params(args, tokenizer.eog_ids if args.ignore_eos else ())
    sampler = Sampler(params, model.cfg.n_vocab, model.n_ctx, tokenizer.token_bytes)
    shown = tokenizer.decode(prompt, special=args.special) if args.display_prompt and not templated else ""
    return model, Request(tokenizer, prompt, shown, sampler, model.n_ctx)


def _prompt_texts(args: Namespace) -> tuple[str, str | None]:
    """Return the prompt and the system prompt, from flags or files; escapes in ``-p`` are replaced already."""
    prompt = _read(args.file, "-f") if args.file else args.prompt or ""
    if args.file and args.escape:
        prompt = unescape(prompt)
    system = _read(args.system_prompt_file, "-sysf") if args.system_prompt_file else args.system_prompt
    return prompt, system


def _read(path: str | Path, flag: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{flag} {path}: the file is not UTF-8 text") from None
    # Editors end files with a newline that is not meant as part of the prompt (llama.cpp drops it too).
    return text.removesuffix("\n")


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


def _generate(
    args: Namespace, leader: Leader, loaded: Loaded, request: Request, interrupts: Interrupts, log: Log
) -> str:
    """Evaluate the prompt, then sample and stream tokens; returns the timings."""
    tokenizer, sampler, runner = request.tokenizer, request.sampler, loaded.runner
    sequence = Sequence(request.prompt, np.arange(runner.n_blocks, dtype=np.int32))
    n_batch = min(args.batch_size, args.ubatch_size)
    began = time.perf_counter()
    while sequence.pending:
        logits = leader.run(sequence.next_batch(n_batch))
        if interrupts.exit_code:
            return ""
    prompt_seconds = time.perf_counter() - began
    # Not before: a launcher forwards stdout and stderr separately, and the prompt would meet the line of layout.
    _write(request.shown_prompt)
    for token in request.prompt:
        sampler.accept(token, generated=False)

    decoder = StreamDecoder(tokenizer, special=args.special, continues=len(request.prompt) > 1)
    stops = StopStrings(args.reverse_prompt)
    n_generated, eval_seconds, n_eval, sample_seconds, n_sampled = 0, 0.0, 0, 0.0, 0
    reason = ""
    while not interrupts.exit_code:
        began = time.perf_counter()
        token = sampler.sample(logits[-1])
        sampler.accept(token)
        sample_seconds += time.perf_counter() - began
        n_sampled += 1
        if token in tokenizer.eog_ids and not args.ignore_eos:
            break
        n_generated += 1
        if _write(stops.push(decoder.push(token))) and stops.found:
            break
        if stops.found or n_generated == args.predict:
            break
        if len(sequence.tokens) >= request.n_ctx:
            reason = f"the context of {request.n_ctx} tokens is full; raise -c to go on"
            break
        sequence.tokens.append(token)
        began = time.perf_counter()
        logits = leader.run(sequence.next_batch(1))
        eval_seconds += time.perf_counter() - began
        n_eval += 1
    if not stops.found:
        _write(stops.push(decoder.flush()) + stops.flush())
    _write("\n")
    if reason:
        log.info(reason)
    return format_timings(
        load=loaded.seconds,
        sample=(sample_seconds, n_sampled),
        prompt=(prompt_seconds, len(request.prompt)),
        eval=(eval_seconds, n_eval),
    )


def _write(text: str) -> bool:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
    return bool(text)
