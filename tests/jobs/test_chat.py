"""`mpillama chat` as people use it: at a terminal, through pipes, on one rank and several."""

import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from job import launcher, mpirun, ranks_of

FLAGS = ["chat", "-t", "1", "--chat-template", "chatml", "--temp", "0"]


# Open MPI's launcher does not pass on the end of its input (nor does `mpirun -n 2 cat` end there).
def farewell(n_ranks):
    """Return what a job has to be told so that it leaves."""
    return "/exit\n" if n_ranks and "Open MPI" in launcher() else ""


def piped(text, *flags, n_ranks=0, template=True):
    text += farewell(n_ranks)
    command = [*mpirun(n_ranks), sys.executable, "-m", "mpillama", *FLAGS[: None if template else 3], *map(str, flags)]
    return subprocess.run(command, input=text.encode(), capture_output=True, timeout=60, check=False)


class Terminal:
    """A job at a terminal of its own."""

    def __init__(self, *flags, n_ranks=0, home=None):
        self.fd, inner = pty.openpty()
        command = [*mpirun(n_ranks), sys.executable, "-m", "mpillama", *FLAGS, *map(str, flags)]
        self.job = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm", **({"XDG_STATE_HOME": str(home)} if home else {})},
        )
        os.close(inner)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.job.poll() is None:
            os.killpg(self.job.pid, signal.SIGKILL)
        self.job.wait()
        os.close(self.fd)

    def type(self, text):
        os.write(self.fd, text.encode())

    def press_ctrl_c(self):
        """Type Ctrl-C as people do: not so soon after another that both count as one."""
        time.sleep(0.4)
        self.type("\x03")

    def wait_for(self, pattern, limit=30.0):
        """Return what was written up to and including a pattern, and forget it."""
        end = time.monotonic() + limit
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            if not ready:
                pytest.fail(f"no {pattern!r} in {self.seen!r}")
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                data = os.read(self.fd, 65536)
                if data:
                    self.seen += data.decode(errors="replace")
                    continue
            if self.job.poll() is not None:
                pytest.fail(f"the job ended before {pattern!r}: {self.seen!r}")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def leave(self, limit=20.0):
        """Return the exit code."""
        end = time.monotonic() + limit
        while self.job.poll() is None and time.monotonic() < end:
            ready, _, _ = select.select([self.fd], [], [], 0.05)
            if ready:
                with contextlib.suppress(OSError):
                    os.read(self.fd, 65536)
        return self.job.wait(1)


@pytest.mark.parametrize("n_ranks", [0, 2])
def test_piped_messages_and_commands(n_ranks, tmp_path):
    first = piped("A cat\n", "-n", 12, n_ranks=n_ranks).stdout.decode().removeprefix("> ").rstrip("> \n")
    text = (
        f"A cat\n/save {tmp_path}/a\ntwo \\\nlines\n/regen\n/save {tmp_path}/b\n/clear\n/system Be kind.\nA cat\n"
        f"/save {tmp_path}/c\n/load {tmp_path}/a\n/regen\n/load {tmp_path}/none\n/what\n /a message\n"
        f"/save {tmp_path}/d\n/exit\nno\n"
    )
    ended = piped(text, "-n", 12, n_ranks=n_ranks)
    assert ended.returncode == 0, ended.stderr
    remarks = (ended.stdout if n_ranks else ended.stderr).decode()
    for words in ("messages saved to", "2 messages loaded", "none: No such file", "/what: unknown command", "anew"):
        assert words in remarks
    a, b, c, d = (json.loads((tmp_path / name).read_text()) for name in "abcd")
    assert a[0] == {"role": "user", "content": "A cat"}
    assert a[1]["role"] == "assistant"
    assert a[1]["content"].strip() == first.strip()
    assert [message["content"] for message in b if message["role"] == "user"] == ["A cat", "two \nlines"]
    assert [message["role"] for message in b] == ["user", "assistant"] * 2
    assert c[0] == {"role": "system", "content": "Be kind."}
    assert len(c) == 3
    assert d[:2] == a
    assert d[2]["content"] == "/a message"
    # Only answers reach stdout where nobody asks for input.
    if not n_ranks:
        assert ended.stdout.decode().startswith(a[1]["content"])
        assert "saved" not in ended.stdout.decode()


def test_the_ranks_say_the_same_and_compute_only_what_is_new(tmp_path):
    text = "Tell me a story about a cat.\nWhat did the dog say to the cat?\nAnd then?\n"
    # In float32: on this text the model is so unsure that 8-bit activations decide.
    flags = ("-n", 40, "-v", "--backend", "reference", "-ctk", "f32", "-ctv", "f32")
    alone, together = (piped(text, *flags, n_ranks=n) for n in (0, 2))
    answers = together.stdout.decode().split("> ")[1:-1]
    assert alone.stdout.decode() == "".join(answers)
    counts = re.findall(r"chat: (\d+) tokens of prompt, (\d+) of them in the cache", together.stderr.decode())
    assert len(counts) == 3
    for (n_before, _), (n_prompt, n_cached) in itertools.pairwise(counts):
        # All full blocks of the prompt before; the answer's too, unless its tokens are spelled otherwise.
        assert int(n_prompt) > int(n_cached) >= int(n_before) // 32 * 32


def test_a_full_context_is_told_and_can_be_left():
    ended = piped(f"{'word ' * 300}\nA cat\n", "-n", 5, "-c", 128)
    assert ended.returncode == 0
    assert b"no longer fits into the context of 128 tokens" in ended.stderr
    assert ended.stderr.count(b"no longer") == 1
    assert ended.stdout.strip()
    ended = piped("A cat\nA dog\n", "-c", 96, "--ignore-eos")
    assert b"the context of 96 tokens is full; /clear" in ended.stderr


def test_without_a_template_nothing_is_loaded():
    ended = piped("", template=False)
    assert ended.returncode == 2
    assert ended.stderr.decode().count("\n") == 1
    assert b"--chat-template" in ended.stderr


def test_a_terminal_with_history_and_ctrl_c(tmp_path):
    # An answer that is not over before it is stopped, however fast the machine.
    with Terminal("--ignore-eos", "-c", 16384, home=tmp_path) as terminal:
        terminal.wait_for("> ")
        terminal.type("A cat\n")
        terminal.wait_for(r"(?s)A cat\r\n.*\w+ \w+")
        terminal.press_ctrl_c()
        terminal.wait_for("\n> ", 5)
        terminal.type("/save " + str(tmp_path / "a") + "\n")
        terminal.wait_for("2 messages saved")
        terminal.wait_for("> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.press_ctrl_c()
        terminal.wait_for("Ctrl-C again, or Ctrl-D, leaves")
        terminal.wait_for("> ")
        terminal.type("/help\n")
        terminal.wait_for("/regen")
        terminal.wait_for("> ")
        # Up twice: the line before the last one.
        terminal.type("\x1b[A\x1b[A\x01\x0b/clear\n")
        terminal.wait_for("begins anew")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.leave() == 0
    stopped = json.loads((tmp_path / "a").read_text())[1]["content"]
    assert len(stopped) > 0
    history = (tmp_path / "mpillama" / "chat_history").read_text().splitlines()
    assert history[0] == "A cat"
    assert history[-1] == "/clear"
    with Terminal(home=tmp_path) as terminal:
        terminal.wait_for("> ")
        terminal.type("\x1b[A")
        terminal.wait_for("/clear")
        terminal.press_ctrl_c()
        terminal.wait_for("Ctrl-C again")
        terminal.press_ctrl_c()
        assert terminal.leave() == 0


@pytest.mark.parametrize("n_ranks", [0, 2])
def test_a_thought_is_shown_apart(n_ranks):
    template = "{% for m in messages %}{{ m.content }}{% endfor %} Once upon a time, there was a <think>"
    flags = ["chat", "-t", "1", "--chat-template", template, "--temp", "0", "-n", "8"]
    ended = subprocess.run(
        [*mpirun(n_ranks), sys.executable, "-m", "mpillama", *flags],
        input=b"Go.\n" + farewell(n_ranks).encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    # Open MPI's launcher gives ranks a terminal for stdout, where thoughts are dimmed.
    shown = r"<think>\n.+\n</think>|\x1b\[2m.+\x1b\[22m"
    assert re.search(shown, ended.stdout.decode(), re.S), ended


def skip_where_text_is_held_back():
    if "Open MPI" in launcher():
        pytest.skip("Open MPI's launcher shows text only when a line is complete")


def test_ranks_sleep_while_somebody_types():
    skip_where_text_is_held_back()
    with Terminal(n_ranks=2) as terminal:
        terminal.wait_for("> ")
        ranks = ranks_of(terminal.job, 2)

        def seconds():
            spent = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in ranks]
            return [sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") for ticks in spent]

        before = seconds()
        time.sleep(2)
        assert max(after - b for after, b in zip(seconds(), before, strict=True)) < 0.3
        terminal.type("A cat\n")
        terminal.wait_for(r"\w+ \w+.*\n> ")
        # Ctrl-C as a launcher hands it on, to every rank: nobody leaves.
        for _ in range(2):
            for pid in reversed(ranks):
                os.kill(pid, signal.SIGINT)
            time.sleep(0.1)
        terminal.wait_for("Ctrl-C again")
        terminal.wait_for("> ")
        terminal.type("A dog\n")
        terminal.wait_for(r"\w+ \w+.*\n> ")
        terminal.type("\x04")
        assert terminal.leave() == 0


def test_sigterm_ends_a_waiting_chat():
    skip_where_text_is_held_back()
    with Terminal(n_ranks=2) as terminal:
        terminal.wait_for("> ")
        os.kill(ranks_of(terminal.job, 2)[0], signal.SIGTERM)
        assert terminal.leave() == 143
