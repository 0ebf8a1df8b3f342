"""What each rank computes on: ``--backend`` and ``-dev``, which may name something else for every rank."""

from __future__ import annotations

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mpillama.backends import GPU_NAMES
from mpillama.backends.base import Backend
from mpillama.backends.gpu.driver import list_gpus
from mpillama.cli.gpus import GpuWish, choose_gpu
from mpillama.comm.base import World
from mpillama.doctor.facts import processor
from mpillama.errors import UsageError, UserError

_MIB = 1 << 20


def devices_of(args: Namespace, hosts: Sequence[str]) -> list[tuple[str, int | None]]:
    """Return backend and number of the GPU of each rank.

    A list of as many entries as there are ranks has one for each. A shorter one has an entry for each rank of a host,
    is the same for all hosts, and begins anew where a host has more ranks.

    Raises:
        UsageError: it is longer than that.
    """
    flag, text = ("-dev", args.device) if args.device else ("--backend", args.backend)
    named = [_backend_and_number(entry, bool(args.device)) for entry in text.split(",")]
    if len(named) == len(hosts):
        return named
    most = max(Counter(hosts).values())
    if len(named) > most:
        where = f"{len(hosts)} rank{'s' if len(hosts) > 1 else ''}"
        where += f", at most {most} on a host" if most < len(hosts) else ""
        raise UsageError(
            f"{flag} {text} names {len(named)} devices, but there {'is' if len(hosts) == 1 else 'are'} {where}: name "
            "one for each rank, or one for each rank of a host"
        )
    places: Counter[str] = Counter()
    found = []
    for host in hosts:
        found.append(named[places[host] % len(named)])
        places[host] += 1
    return found


def _backend_and_number(entry: str, is_device: bool) -> tuple[str, int | None]:
    """Return these of an entry as the flags' parsers leave it; as a device the CPU has the best backend for it."""
    name, _, number = entry.partition(":")
    return "auto" if is_device and name == "cpu" else name, int(number) if number else None


def choose_device(args: Namespace, world: World) -> tuple[str, int, str]:
    """Return this rank's backend, the number of its GPU, and what tells that from others; all ranks call it together.

    ``MPILLAMA_SHARE_GPUS=1`` lets ranks share a GPU.

    Raises:
        UserError: see `devices_of` and `choose_gpu`.
    """
    devices = devices_of(args, world.hosts)
    wishes = [GpuWish(name, index) if name in GPU_NAMES else GpuWish() for name, index in devices]
    index, identity = 0, ""
    if any(wish.kind for wish in wishes):
        index, identity = choose_gpu(wishes, world, share=os.environ.get("MPILLAMA_SHARE_GPUS", "") == "1")
    return devices[world.rank][0], index, identity


@dataclass(frozen=True)
class Kinds:
    """The backends of all ranks: their names, and what decides about the last bits of their results.

    ``gpu`` tells this rank's GPU from others; "" if it has none.
    """

    names: tuple[str, ...]
    arithmetic: tuple[str, ...]
    gpu: str = ""

    def __str__(self) -> str:
        """For people: ``cpu backend``, ``cpu, cuda and hip backends``."""
        *names, last = dict.fromkeys(self.names)
        return f"{', '.join(names)} and {last} backends" if names else f"{last} backend"

    def alike(self, ranks: Iterable[int]) -> bool:
        """Whether these ranks compute the same bits from the same input."""
        return len({self.arithmetic[rank] for rank in ranks}) == 1


def kinds_of(world: World, backend: Backend, gpu: str) -> Kinds:
    """Return the kinds of all ranks, which call this together."""
    everyone = world.bcast(world.gather((backend.name, arithmetic(backend))))
    return Kinds(tuple(name for name, _ in everyone), tuple(detail for _, detail in everyone), gpu)


def arithmetic(backend: Any) -> str:
    """Return what decides about the last bits of a backend's results."""
    pool, device = getattr(backend, "pool", None), getattr(backend, "device", None)
    # NumPy's products depend on the processor.
    detail = pool.level if pool else getattr(device, "model", "") if device else processor()
    return f"{backend.name} {detail}"


def device_table() -> str:
    """Return what ``--list-devices`` prints: what ranks of this host can compute on."""
    from mpillama.cli.memory import available_memory

    cores = len(os.sched_getaffinity(0))
    name = processor() or "the processor"
    lines = [f"  cpu: {name}, {cores} core{'s' if cores > 1 else ''} ({available_memory() // _MIB} MiB free)"]
    for kind in GPU_NAMES:
        try:
            gpus = list_gpus(kind)
        except UsageError:
            # No CuPy, or the one for the other kind.
            continue
        except UserError as error:
            lines.append(f"  no {kind} device: {error.line}")
            continue
        lines += [f"  {kind}:{g.index}: {g.name} ({g.total // _MIB} MiB, {g.free // _MIB} MiB free)" for g in gpus]
    return "\n".join(["Available devices:", *lines])
