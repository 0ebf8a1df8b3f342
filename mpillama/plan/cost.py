"""The cost model: seconds of ops, collectives and steps. Every formula is written in docs/clusters.md too.

- An op takes the longer of reading its bytes and doing its arithmetic, and a fixed time for being started.
- A collective takes the better of two algorithms (Thakur, Rabenseifner, Gropp: Optimization of Collective Communication
  Operations in MPICH, 2005): recursive doubling, which passes the whole message ceil(log2 p) times, or a reduce-scatter
  followed by an allgather, with twice as many messages but 2 (p - 1) / p times its bytes in all. Where the group spans
  hosts, it works within each host first, then between hosts, whose link all ranks of a host share.
- Stages of a pipeline take turns; between two of them one message of float32 (tokens, n_embd) is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from mpillama.plan.cluster import Cluster, Device, Link
from mpillama.plan.shapes import Event

# Attention's products are of float vectors and small; kernels reach this share of what matrix products reach.
ATTENTION_REACH = 0.5
CATEGORIES = ("weights", "products", "attention", "other ops", "collectives", "sends", "overhead")


@dataclass
class Cost:
    """Seconds by category.

    ``weights`` are products whose time is that of reading weights, ``products`` those whose time is the arithmetic;
    ``overhead`` is what starting ops and collectives takes, and what passes between steps.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())

    def add(self, category: str, seconds: float) -> None:
        """Count more time."""
        self.seconds[category] = self.seconds.get(category, 0.0) + seconds

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        """Return the sum."""
        result = Cost(dict(self.seconds))
        for category, seconds in other.seconds.items():
            result.add(category, seconds * times)
        return result


@dataclass(frozen=True)
class Span:
    """Where the ranks of a group are: ``per_host`` of them on each of ``hosts``."""

    per_host: int
    hosts: int


def group_span(cluster: Cluster, size: int) -> Span:
    """Return how the widest of the groups of ``size`` consecutive ranks lies over the hosts."""
    groups = [
        {cluster.host(rank) for rank in (first, first + size - 1)}
        for first in range(0, cluster.n_ranks - size + 1, size)
    ]
    hosts = max(max(group) - min(group) + 1 for group in groups)
    return Span(math.ceil(size / hosts), hosts)


def allreduce_seconds(nbytes: float, n_ranks: int, link: Link) -> float:
    """Return the time of an allreduce over one kind of link, the group's software not included."""
    if n_ranks == 1:
        return 0.0
    rounds, alpha, beta = math.ceil(math.log2(n_ranks)), link.latency_us * 1e-6, 1e-9 / link.gbps
    doubling = rounds * (alpha + nbytes * beta)
    scattered = 2 * rounds * alpha + 2 * (n_ranks - 1) / n_ranks * nbytes * beta
    return min(doubling, scattered)


def allgather_seconds(nbytes: float, n_ranks: int, link: Link) -> float:
    """Return the time of an allgather whose result has ``nbytes``."""
    rounds = math.ceil(math.log2(n_ranks))
    return rounds * link.latency_us * 1e-6 + (n_ranks - 1) / n_ranks * nbytes * 1e-9 / link.gbps


def send_seconds(nbytes: float, link: Link, device: Device) -> float:
    """Return the time of one message."""
    return (link.latency_us + device.collective_us) * 1e-6 + nbytes * 1e-9 / link.gbps


def collective_seconds(event: Event, span: Span, cluster: Cluster) -> float:
    """Return the time of a collective, without ``collective_us``."""
    formula = allreduce_seconds if event.kind == "allreduce" else allgather_seconds
    within = formula(event.act_bytes, span.per_host, cluster.within)
    return within + formula(event.act_bytes, span.hosts, cluster.between)


def events_cost(events: Iterable[Event], span: Span, cluster: Cluster) -> Cost:
    """Return what a rank's events take."""
    cost, device = Cost(), cluster.device
    for event in events:
        if event.is_collective:
            cost.add("collectives", collective_seconds(event, span, cluster))
            cost.add("overhead", device.collective_us * 1e-6)
            continue
        cost.add("overhead", device.op_us * 1e-6)
        if event.type is not None:
            rate = device.rate(event.type.name)
            reading = event.weight_bytes / rate.gbps / 1e9 + event.act_bytes / device.gbps / 1e9
            arithmetic = event.flops / rate.tflops / 1e12
            cost.add("weights" if reading > arithmetic else "products", max(reading, arithmetic))
        else:
            reading = (event.weight_bytes + event.act_bytes) / device.gbps / 1e9
            reach = device.matrix_tflops * device.matrix_reach * ATTENTION_REACH
            arithmetic = event.flops / reach / 1e12 if event.kind == "attention" else 0.0
            cost.add("attention" if event.kind == "attention" else "other ops", max(reading, arithmetic))
    return cost
