"""The protocols of this package.

`Group` joins tensors; a backend's own library may implement it (MPI for host arrays, NCCL for device arrays). `Link`
hands tensors from one rank to another. `Team` carries small control messages between the ranks that hold one model;
`World` is the team of all ranks of a run: it can be parted into several, and knows how to end the run.
`tests/unit/test_comm_contract.py` holds every implementation to the same contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from mpillama.comm.watch import Watch
from mpillama.errors import JobError, PeerFailure, UserError
from mpillama.layout import Cut

T = TypeVar("T")


class Group(Protocol):
    """Ranks that share the slices of one model."""

    rank: int
    size: int

    @property
    def leader(self) -> bool:
        """Whether this rank is the one that adds replicated terms (biases, residuals) to a partial sum."""
        ...

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Return the sum of ``x`` over the ranks, bit for bit the same on each; ``x`` (contiguous) may be reused.

        The dtype on the wire is that of ``x``.
        """
        ...

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Return the ranks' slices joined along the last axis; ``x`` has shape (..., cut.width(rank))."""
        ...


class Arrival(Protocol):
    """An array that is on its way to this rank."""

    def wait(self) -> np.ndarray:
        """Return it, once it is here; waiting occupies no core for long."""
        ...


class Link(Protocol):
    """This rank's end of a channel between two ranks: float32 arrays, in order, each way independent of the other."""

    def send(self, x: np.ndarray) -> None:
        """Begin to send ``x``, which must not change any more.

        Returns before the partner has taken it, but may wait until the partner has taken the array before it: a rank
        that runs ahead of the next one waits here.
        """
        ...

    def expect(self, shape: tuple[int, ...]) -> Arrival:
        """Begin to receive the next array, of this shape; it can come in while this rank waits for other things."""
        ...

    def receive(self, shape: tuple[int, ...]) -> np.ndarray:
        """Wait for the next array, of this shape."""
        ...


class Courier(Protocol):
    """Bytes from any rank to any other; messages of a pair keep their order."""

    def send(self, rank: int, data: np.ndarray) -> None:
        """Begin to send ``data``, flat uint8, which must not change until the next `flush`; it may be empty."""
        ...

    def flush(self) -> None:
        """Wait until all that was sent has been taken."""
        ...

    def receive(self, rank: int, out: np.ndarray) -> int:
        """Wait for the next message of a rank, of at most as many bytes as ``out`` has; returns how many there are."""
        ...

    def progress(self) -> None:
        """Look after what is on its way, and after the other ranks; for who waits for something else."""
        ...

    def close(self) -> None:
        """`flush`, and end; all ranks do."""
        ...


class Team(Protocol):
    """Ranks that work through the same steps, and the host each lives on.

    Attributes:
        job_ranks: for each rank, its number among all ranks of the run: the one that people know it by.
    """

    rank: int
    size: int
    hosts: tuple[str, ...]
    job_ranks: tuple[int, ...]
    watch: Watch

    def group(self, ranks: Sequence[int] | None = None) -> Group:
        """Return a group for tensors in host memory: of all ranks, or of these, which include this one.

        All ranks of the team call this together, each with the ranks (in order) of its own group.
        """
        ...

    def link(self, partner: int) -> Link:
        """Return this rank's end of the channel to another rank; there is one for each pair."""
        ...

    def bcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` (any small picklable object) on every rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` on rank 0, and an empty list elsewhere."""
        ...

    def agree(self, signature: int) -> list[int]:
        """Return the 64-bit signatures of all ranks."""
        ...

    def send(self, message: np.ndarray) -> None:
        """Rank 0: give all others an int32 message, to be taken by `receive`."""
        ...

    def receive(self) -> np.ndarray:
        """Other ranks: wait for the next message of rank 0 without occupying a core."""
        ...


class World(Team, Protocol):
    """All ranks of one run."""

    local_rank: int
    local_size: int

    def part(self, ranks: Sequence[int]) -> Team:
        """Return the team of these ranks, which are consecutive and include this one; it lasts as long as the world.

        All ranks call this together, each with the ranks of its own team.
        """
        ...

    def post(self, rank: int, value: Any) -> None:
        """Send a small picklable object to another rank, to be taken by `fetch`; returns at once."""
        ...

    def fetch(self, seconds: float = 0.0) -> list[tuple[int, Any]]:
        """Return what others have posted to this rank, with who posted it; wait so long for it, without using a core.

        What one rank has posted comes in its order.
        """
        ...

    def courier(self) -> Courier:
        """Return this rank's end of a new `Courier`; all ranks call this together."""
        ...

    def report(self, amount: int) -> None:
        """Tell rank 0 of some progress (bytes); returns at once."""
        ...

    def reported(self) -> int:
        """Rank 0: return what the others have reported since the last call; returns at once."""
        ...

    def abort(self, exit_code: int) -> None:
        """End all ranks now."""
        ...

    def close(self) -> None:
        """Leave in peace, after all ranks have got here."""
        ...


def name_of(team: Team, rank: int) -> str:
    """Return what people know a rank of a team by."""
    return f"rank {team.job_ranks[rank]} on {team.hosts[rank]}"


def check_agreement(world: Team, signature: int) -> None:
    """Make sure that all ranks have come to the same point with the same signature.

    Raises:
        JobError: on every rank, if some differ from rank 0.
    """
    step = world.watch.step
    everyone = world.agree(signature)
    others = [name_of(world, rank) for rank, own in enumerate(everyone) if own != everyone[0]]
    if others:
        first = world.job_ranks[0]
        error = JobError(f"the ranks have diverged by step {step}: {', '.join(others)} differs from rank {first}")
        error.told = True
        raise error


def from_root(world: Team, make: Callable[[], T]) -> T:
    """Call ``make`` on rank 0 and return its result on every rank.

    Raises:
        UserError: on rank 0, what ``make`` raised.
        PeerFailure: on the other ranks, if ``make`` raised a UserError there.
    """
    if world.rank != 0:
        result = world.bcast(None)
        if isinstance(result, PeerFailure):
            raise result
        return result
    try:
        value = make()
    except UserError as error:
        world.bcast(PeerFailure(error.exit_code, error.line))
        error.told = True
        raise
    return world.bcast(value)


def attempt(make: Callable[[], T]) -> T | UserError:
    """Return what ``make`` returns, or the UserError that it raises, for `settle`."""
    try:
        return make()
    except UserError as error:
        return error


def settle(world: Team, outcome: T | UserError) -> T:
    """Return this rank's outcome of an `attempt` if no rank's is an error.

    Raises:
        UserError: on rank 0, if any rank has one; it names the rank, unless all ranks have come to it together.
        PeerFailure: on the other ranks then.
    """
    failed = isinstance(outcome, UserError)
    # A rank that only knows that another one has failed has nothing to say.
    said = (outcome.exit_code, outcome.line, outcome.told) if isinstance(outcome, UserError) else None
    everyone = world.gather((failed, None if isinstance(outcome, PeerFailure) else said))

    def judge() -> None:
        for rank, (_, told) in enumerate(everyone):
            if told is not None:
                code, line, known = told
                error = UserError(line if known or world.size == 1 else f"{name_of(world, rank)}: {line}")
                error.exit_code = code
                raise error
        if any(silent for silent, _ in everyone):
            raise UserError("a rank failed, and no rank says why")

    from_root(world, judge)
    return cast("T", outcome)
