"""`mpillama chat`: a conversation, on any number of ranks."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpillama.cli.api_context import api_context
from mpillama.cli.console import Console, history_path
from mpillama.cli.engine_session import Prepared, Service, run_engine
from mpillama.cli.generate import prompt_texts
from mpillama.cli.progress import Log
from mpillama.cli.prompt_cache import PromptCache
from mpillama.comm.base import World
from mpillama.engine.request import Output
from mpillama.engine.sampling.params import RANDOM_SEED
from mpillama.errors import UsageError
from mpillama.openai.chat import ChatCall
from mpillama.openai.errors import ApiError
from mpillama.openai.fields import Fields, parse_json
from mpillama.openai.messages import read_messages
from mpillama.spmd import Interrupts, Stopped, launch

HELP = """\
/clear         forget the conversation, but not the system prompt
/system TEXT   set the system prompt; without TEXT there is none
/regen         answer the last message again
/save FILE     write the messages to FILE as JSON
/load FILE     go on with the messages of FILE
/help          show this
/exit          leave; so do Ctrl-D, and Ctrl-C twice
A line that ends with \\ goes on with the next one. Ctrl-C stops an answer. To send a line that begins with /, put a
space before it."""


def run(args: Namespace, world: World, interrupts: Interrupts) -> int:
    """Run the command on this rank; returns the exit code."""
    log = Log(args, world.rank)
    first: list[tuple[str, str | None]] = []
    if world.rank:
        # Ctrl-C is rank 0's: it stops an answer, not the job.
        interrupts.on_ctrl_c = lambda: None

    caches: list[PromptCache] = []

    def check(prepared: Prepared) -> None:
        if prepared.template is None:
            raise UsageError("the model has no chat template; name one with --chat-template (chatml, llama3, gemma, …)")
        caches.append(PromptCache(args, prepared.metadata, prepared.model, log))

    def body(service: Service) -> int:
        asks = sys.stdin.isatty() or bool(launch(os.environ).launcher)
        console = Console(asks, history_path(os.environ))
        interrupts.on_ctrl_c = console.ctrl_c
        chat = Chat(args, service, interrupts, console, log, *first[0])
        try:
            caches[0].restore(service.loaded, service.leader, service.engine)
            code = chat.run()
        except Stopped as stopped:
            code = stopped.exit_code
        finally:
            interrupts.deferred = True
            console.close()
        if chat.tokens:
            caches[0].save(service.loaded, service.leader, service.engine, chat.tokens)
        return code

    return run_engine(args, world, interrupts, log, body, lambda: first.append(prompt_texts(args)), check)


class Chat:
    """A conversation and its commands.

    Args:
        args: flags.
        service: the model.
        interrupts: of this rank.
        console: where the person is.
        log: for timings.
        first: message to begin with; "": none.
        system: system prompt, if any.
    """

    def __init__(
        self,
        args: Namespace,
        service: Service,
        interrupts: Interrupts,
        console: Console,
        log: Log,
        first: str = "",
        system: str | None = None,
    ) -> None:
        self._args, self._service, self._interrupts = args, service, interrupts
        self._console, self._log, self._first = console, log, first
        self._context = api_context(service)
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._n_again = 0
        # What the model has in its cache: the last prompt and what was generated, as text and as tokens.
        self._text = ""
        self.tokens: tuple[int, ...] = ()
        self._commands: dict[str, Callable[[str], bool]] = {
            "/clear": self._clear,
            "/system": self._system,
            "/regen": self._regen,
            "/save": self._save,
            "/load": self._load,
            "/help": self._help,
            "/exit": lambda rest: False,
            "/quit": lambda rest: False,
        }

    def run(self) -> int:
        """Talk until one of both leaves; returns the exit code."""
        message = self._first or self._read()
        while message is not None and self._take(message):
            if self._args.single_turn or self._interrupts.exit_code:
                break
            message = self._read()
        return self._interrupts.exit_code

    def _read(self) -> str | None:
        # While somebody types there is nothing to finish: SIGTERM may end it at once.
        self._interrupts.deferred = False
        try:
            return self._console.read()
        finally:
            self._interrupts.deferred = True

    def _take(self, message: str) -> bool:
        """Obey a command or answer a message; False: leave."""
        if message.startswith("/"):
            name, _, rest = message.strip().partition(" ")
            command = self._commands.get(name)
            if command is None:
                self._console.say(f"{name}: unknown command; /help lists them")
                return True
            return command(rest.strip())
        if message.strip():
            self.messages.append({"role": "user", "content": message.lstrip() if message[0] == " " else message})
            self._answer()
        return True

    # -- answers ---------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        """Answer the last message; what cannot be answered is taken back."""
        console, engine = self._console, self._service.engine
        try:
            call = self._call()
        except ApiError as error:
            self.messages.pop()
            console.say(self._full() if error.code == "context_length_exceeded" else error.line)
            return
        console.stopped = False
        raw, tokens, last = "", list(call.requests[0].prompt), Output(call.id)
        engine.add(call.requests[0])
        while engine.has_work() and not console.stopped and not self._interrupts.exit_code:
            for last in engine.step():
                raw += last.text
                tokens += last.tokens
                self._show(call, last)
        if engine.has_work():
            last = engine.cancel(call.id)[-1]
        console.end_thought()
        state = call.choices[0]
        console.write("" if state.content.endswith("\n") else "\n")
        self._text, self.tokens = call.prompt + raw, tuple(tokens)
        if last.finish_reason == "error":
            console.say(str(last.stop_reason))
        elif last.stop_reason == "context":
            console.say(f"the context of {engine.n_ctx} tokens is full; /clear begins anew, a larger -c holds more")
        if state.content or state.thought:
            message = {"role": "assistant", "content": state.content}
            self.messages.append({**message, "reasoning_content": state.thought} if state.thought else message)
        else:
            self.messages.pop()
        if last.usage is not None and last.timings is not None:
            usage, times = last.usage, last.timings
            rate = usage.n_generated / max(times.decode, 1e-9)
            self._log.verbose(
                f"chat: {usage.n_prompt} tokens of prompt, {usage.n_cached} of them in the cache, "
                f"{times.prompt:.2f} s; {usage.n_generated} generated, {rate:.1f} t/s"
            )

    def _call(self) -> ChatCall:
        body: dict[str, Any] = {"messages": self.messages, "stream": True, "stop": list(self._args.reverse_prompt)}
        if self._args.predict > 0:
            body["max_tokens"] = self._args.predict
        if self._args.seed not in (-1, RANDOM_SEED):
            # Or the same seed would give the same answer again.
            body["seed"] = (self._args.seed + self._n_again) % RANDOM_SEED
        call = ChatCall(self._context, Fields(body))
        prompt = self._context.check_prompt(self._encoded(call), "messages")
        call.requests = (replace(call.requests[0], prompt=prompt),)
        return call

    def _encoded(self, call: ChatCall) -> tuple[int, ...]:
        """Return the ids of a prompt; what the model itself has written stays spelled as it did that.

        Its tokens need not be those that the tokenizer would make of the same text, and the cache is by tokens.
        """
        if self._text and call.prompt.startswith(self._text):
            tokenizer = self._service.tokenizer
            rest = tokenizer.encode(call.prompt[len(self._text) :], add_special=False)
            # At a control token no token can span the seam.
            if rest and not tokenizer.token_bytes(rest[0]):
                return (*self.tokens, *rest)
        return call.requests[0].prompt

    def _show(self, call: ChatCall, output: Output) -> None:
        """Write what an output adds."""
        state = call.choices[0]
        n_thought, n_content = len(state.thought), len(state.content)
        call.push(output)
        self._console.think(state.thought[n_thought:])
        if len(state.content) > n_content:
            self._console.end_thought()
            self._console.write(state.content[n_content:])

    def _full(self) -> str:
        n_ctx = self._service.engine.n_ctx
        return (
            f"the conversation no longer fits into the context of {n_ctx} tokens, so the last message was dropped; "
            "/clear begins anew, /save FILE keeps what was said, a larger -c holds more"
        )

    # -- commands --------------------------------------------------------------------------------------------------

    def _clear(self, rest: str) -> bool:
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        self._console.say("the conversation begins anew")
        return True

    def _system(self, rest: str) -> bool:
        if self.messages and self.messages[0]["role"] == "system":
            del self.messages[0]
        if rest:
            self.messages.insert(0, {"role": "system", "content": rest})
        self._console.say("the system prompt is set" if rest else "there is no system prompt")
        return True

    def _regen(self, rest: str) -> bool:
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            self._console.say("there is no message to answer")
            return True
        self._n_again += 1
        self._answer()
        return True

    def _save(self, rest: str) -> bool:
        if not rest:
            self._console.say("give a file: /save FILE")
            return True
        try:
            text = json.dumps(self.messages, ensure_ascii=False, indent=2)
            Path(rest).expanduser().write_text(text + "\n", encoding="utf-8", errors="replace")
        except OSError as error:
            self._console.say(f"{rest}: {error.strerror}")
        else:
            self._console.say(f"{len(self.messages)} messages saved to {rest}")
        return True

    def _load(self, rest: str) -> bool:
        try:
            value = parse_json(Path(rest).expanduser().read_bytes())
            self.messages = read_messages(Fields({"messages": value}))
        except OSError as error:
            self._console.say(f"{rest or '/load FILE'}: {error.strerror}")
        except ApiError as error:
            self._console.say(f"{rest}: {error.line}")
        else:
            self._console.say(f"{len(self.messages)} messages loaded from {rest}")
        return True

    def _help(self, rest: str) -> bool:
        self._console.say(HELP)
        return True
