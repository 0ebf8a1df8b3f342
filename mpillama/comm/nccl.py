"""Collectives between GPUs: NCCL, or RCCL on AMD, through CuPy. Written to their documentation; see docs/gpu.md."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mpillama.comm.base import Group, Team, attempt, from_root, settle
from mpillama.comm.staged import Holder, tensor_group
from mpillama.errors import JobError, UsageError, UserError
from mpillama.layout import Cut


class OnGpu(Protocol):
    """A backend, as far as collectives are concerned.

    Attributes:
        device: it has the stream of all work, as a number, and makes float32 arrays.
    """

    device: Any

    def join(self, parts: Sequence[Any]) -> Any:
        """Return arrays joined along the last axis."""
        ...

    def narrow(self, x: Any, bf16: bool) -> Any:
        """Return float32 numbers in 16 bits."""
        ...

    def widen(self, x: Any, bf16: bool, out: Any) -> None:
        """Write numbers of 16 bits into a float32 array."""
        ...


@dataclass(frozen=True)
class Collectives:
    """How ranks with GPUs add up.

    Attributes:
        by: ``auto`` (NCCL where all have it, else by way of the host), ``host``, or ``mpi``: an MPI library that takes
            addresses of GPU memory.
        wire: in which type NCCL sends and adds up partial sums: ``f32``, ``bf16`` or ``f16``.
    """

    by: str = "auto"
    wire: str = "f32"


class NcclGroup:
    """Ranks with a GPU each, of one maker; float32 arrays of CuPy.

    All ranks of the group must make it at the same time. A rank that fails raises at once and does not wait for the
    others, which may already be inside of NCCL: the caller must end the run.

    Args:
        nccl: the module ``cupy.cuda.nccl``.
        backend: of this rank, whose GPU is the current one of this thread.
        name: the id of the group, see `meet`.
        rank: in the group.
        size: of the group.
        wire: see `Collectives`; of sums of any size.

    Raises:
        UserError: NCCL fails on this rank.
    """

    def __init__(self, nccl: Any, backend: OnGpu, name: Any, rank: int, size: int, wire: str = "f32") -> None:
        self.rank, self.size = rank, size
        self._wire, self._bf16 = wire, wire == "bf16"
        self._nccl, self._backend, self._device = nccl, backend, backend.device
        try:
            self._comm = nccl.NcclCommunicator(size, name, rank)
        except RuntimeError as error:
            raise _failure("cannot join the GPUs", str(error)) from None

    @property
    def leader(self) -> bool:
        """Whether this is the group's first rank."""
        return self.rank == 0

    @property
    def capturable(self) -> bool:
        """Whether a device can record its collectives, which NCCL's can; ranks must record and launch alike."""
        return True

    def allreduce(self, x: Any) -> Any:
        """Return the sum over the ranks, in place."""
        if not x.size:
            return x
        sent, type = x, self._nccl.NCCL_FLOAT32
        if self._wire != "f32":
            sent = self._backend.narrow(x, self._bf16)
            type = self._nccl.NCCL_BFLOAT16 if self._bf16 else self._nccl.NCCL_FLOAT16
        self._check("allReduce", sent.data.ptr, sent.data.ptr, x.size, type, self._nccl.NCCL_SUM)
        if sent is not x:
            self._backend.widen(sent, self._bf16, x)
        return x

    def broadcast(self, x: Any) -> Any:
        """Return the first rank's array, in place."""
        if x.size:
            self._check("broadcast", x.data.ptr, x.data.ptr, x.size, self._nccl.NCCL_FLOAT32, 0)
        return x

    def allgather(self, x: Any, cut: Cut) -> Any:
        """Return the slices joined along the last axis; each rank broadcasts its own, since sizes differ."""
        lead = tuple(x.shape[:-1])
        parts = [x if rank == self.rank else self._device.empty((*lead, cut.width(rank))) for rank in range(self.size)]
        self._nccl.groupStart()
        for rank, part in enumerate(parts):
            if part.size:
                self._check("broadcast", part.data.ptr, part.data.ptr, part.size, self._nccl.NCCL_FLOAT32, rank)
        self._nccl.groupEnd()
        return self._backend.join(parts)

    def _check(self, name: str, *args: Any) -> None:
        """Call NCCL, and learn of what went wrong in earlier calls.

        Raises:
            JobError: NCCL says so; the others may wait for this rank inside of NCCL.
        """
        try:
            self._comm.check_async_error()
            getattr(self._comm, name)(*args, self._device.stream)
        except RuntimeError as error:
            fault = JobError(_failure(f"failed in {name}", str(error)).line)
            fault.own = True
            raise fault from None


class IslandGroup:
    """Ranks of several kinds: NCCL joins the GPUs of an island, one of which speaks for it by way of the host.

    An island are the GPUs of one maker on one host; a rank outside of any speaks for itself.

    Args:
        everyone: a group of all ranks, for host arrays.
        speakers: a group of the ranks that speak, likewise; None on the others.
        island: of this rank, if it is on one.
        holder: the backend of this rank.
    """

    capturable = False
    """Whether a device can record its collectives."""

    def __init__(self, everyone: Group, speakers: Group | None, island: NcclGroup | None, holder: Holder) -> None:
        self._everyone, self._speakers, self._island, self._holder = everyone, speakers, island, holder
        self.rank, self.size, self.leader = everyone.rank, everyone.size, everyone.leader

    def allreduce(self, x: Any) -> Any:
        """Return the sum over the ranks: within each island, between those that speak, and back."""
        if self._island is not None:
            x = self._island.allreduce(x)
        if self._speakers is not None:
            x = self._holder.asarray(self._speakers.allreduce(self._holder.to_host(x)))
        return x if self._island is None else self._island.broadcast(x)

    def allgather(self, x: Any, cut: Cut) -> Any:
        """Return the slices joined along the last axis, by way of the host: once a step, for the logits."""
        return tensor_group(self._everyone, self._holder).allgather(x, cut)


def _failure(what: str, problem: str) -> UserError:
    return UserError(
        f"NCCL {what}: {problem}; run with NCCL_DEBUG=WARN to learn more, or with --collectives host to do without"
    )


def load_nccl() -> Any:
    """Return CuPy's NCCL module, or None where there is no NCCL."""
    with warnings.catch_warnings():
        # CuPy says in many words that it is missing.
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return nccl if nccl.available else None


def meet(world: Team, islands: Sequence[Sequence[int]], nccl: Any) -> Any:
    """Return the id of the island that this rank is on, None if it is on none; all ranks of ``world`` call this.

    Afterwards nobody needs MPI before the islands' groups are made: NCCL may wait for others without end.

    Raises:
        UserError: on rank 0, naming the rank on which NCCL cannot begin.
        PeerFailure: on the other ranks then.
    """
    own = next((island for island in islands if world.rank in island), ())

    def begin() -> Any:
        if not own or own[0] != world.rank:
            return None
        try:
            return nccl.get_unique_id()
        except (RuntimeError, OSError) as error:
            raise _failure("cannot begin", str(error)) from None

    names = world.bcast(world.gather(settle(world, attempt(begin))))
    world.bcast(world.gather(None))
    return names[own[0]] if own else None


def device_group(world: Team, backend: Any, how: Collectives, gpu: str = "") -> Group:
    """Return a group of all ranks for the arrays of this backend.

    NCCL joins them if all compute on GPUs of one maker, each on its own, and all have the library. Else it joins those
    of a host that do, and the rest goes by way of the host.

    Args:
        world: all ranks.
        backend: of this rank.
        how: to add up.
        gpu: what tells this rank's GPU from others of its host; "" if nothing does.

    Raises:
        UserError: see `meet` and `NcclGroup`; or ranks have different versions of NCCL, or this is not a group that
            can do as it should.
    """
    holder: Holder = backend
    if world.size == 1:
        return tensor_group(world.group(), holder)
    maker = backend.name if backend.name in ("cuda", "hip") else ""
    nccl = load_nccl() if maker and how.by == "auto" else None
    version = nccl.get_version() if nccl else 0
    told = world.bcast(world.gather((maker, maker if nccl else "", world.hosts[world.rank], gpu, version)))
    everyone, versions = [rank[1:4] for rank in told], [rank[4] for rank in told]
    islands = islands_of(everyone)
    all_by_nccl = bool(islands) and len(islands[0]) == world.size

    def check() -> None:
        if how.by == "mpi" and not all(rank[0] for rank in told):
            raise UsageError("--collectives mpi hands MPI addresses of GPU memory: all ranks need a GPU")
        if how.wire != "f32" and not all_by_nccl:
            raise UsageError(f"--wire {how.wire} needs NCCL between all ranks; leave it out, or see mpillama doctor")
        for first, *others in islands:
            for rank in others:
                if versions[rank] != versions[first]:
                    raise UserError(
                        f"rank {first} has NCCL {_spelled(versions[first])}, but rank {rank} on {world.hosts[rank]} "
                        f"{_spelled(versions[rank])}: install the same on all hosts"
                    )

    from_root(world, check)
    if how.by == "mpi":
        return _aware_group(world, backend)
    if not islands:
        return tensor_group(world.group(), holder)
    name = meet(world, islands, nccl)
    if all_by_nccl:
        return NcclGroup(nccl, backend, name, world.rank, world.size, how.wire)
    mine = next((island for island in islands if world.rank in island), None)
    quiet = {rank for island in islands for rank in island[1:]}
    speakers = [rank for rank in range(world.size) if rank not in quiet]
    # All ranks make both groups, in this order, before any of them enters NCCL.
    whole, spoken = world.group(), world.group([world.rank] if world.rank in quiet else speakers)
    island = NcclGroup(nccl, backend, name, mine.index(world.rank), len(mine)) if mine else None
    return IslandGroup(whole, None if world.rank in quiet else spoken, island, holder)


def _aware_group(world: Team, backend: Any) -> Group:
    communicator = getattr(world, "communicator", None)
    if communicator is None:
        raise UsageError("--collectives mpi needs ranks that MPI has started")
    from mpillama.comm.aware import AwareGroup

    return AwareGroup(communicator(), backend, world.watch)


def _spelled(version: int) -> str:
    """Return 22703 as 2.27.3; before 2.9 there were four digits."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version >= 10000 else str(version)


def islands_of(ranks: Sequence[tuple[str, str, str]]) -> list[list[int]]:
    """Return which ranks NCCL can join: all, or those of each host and maker, if they are several with a GPU each.

    Args:
        ranks: for each, the maker of its GPU ("" without one, or without NCCL), its host, and which GPU that is.
    """

    def joined(members: list[int]) -> bool:
        known = [ranks[rank][1:] for rank in members if ranks[rank][2]]
        return len(members) > 1 and len(set(known)) == len(known)

    if len({maker for maker, _, _ in ranks}) == 1 and ranks[0][0] and joined(list(range(len(ranks)))):
        return [list(range(len(ranks)))]
    places: dict[tuple[str, str], list[int]] = {}
    for rank, (maker, host, _) in enumerate(ranks):
        if maker:
            places.setdefault((maker, host), []).append(rank)
    return [members for members in places.values() if joined(members)]
