"""The console: a signal ends what waits for input, whenever it comes."""

import os
import pty
import subprocess
import sys

import pytest

# A handler that runs on another thread does not interrupt the one that reads, as one that comes just before it reads.
WAITING = """
import signal, sys, threading, time
from pathlib import Path
from mpillama.cli.console import Console
from mpillama.spmd import Interrupts, Stopped

interrupts = Interrupts()
interrupts.install()
console = Console(True, Path("/nonexistent/history"))
def ctrl_c():
    raise KeyboardInterrupt

interrupts.on_ctrl_c = ctrl_c

def signal_myself():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.{name})

for _ in range({times}):
    threading.Thread(target=signal_myself, daemon=True).start()
    try:
        console._line("> ")
    except KeyboardInterrupt:
        print("ctrl-c", flush=True)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 0)])
def test_a_signal_is_noticed_although_it_interrupts_nothing(terminal: bool, name: str, code: int) -> None:
    script = WAITING.format(name=name, times=1 if code else 2)
    outer, inner = pty.openpty() if terminal else os.pipe()
    job = subprocess.Popen([sys.executable, "-c", script], stdin=inner if terminal else outer)
    try:
        assert job.wait(20) == code
    finally:
        job.kill()
        job.wait()
        os.close(outer)
        os.close(inner)
