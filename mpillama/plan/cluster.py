"""What a cluster is to the cost model: devices, the links between them, and how many there are of each.

The tables hold what vendors publish (peak rates) and a share of it that programs are taken to reach; nothing in them
was measured here. `mpillama doctor --save cluster.toml` measures, and every number can be given in such a file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mpillama.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GIB = 1 << 30


@dataclass(frozen=True)
class Rate:
    """How fast a device multiplies with weights of one type.

    Attributes:
        gbps: 1e9 bytes of weights per second, where a step has few tokens.
        tflops: 1e12 multiplications and additions per second, where it has many.
    """

    gbps: float
    tflops: float


@dataclass(frozen=True)
class Device:
    """What one rank computes on.

    Attributes:
        memory_gb: 2^30 bytes.
        memory_gbps: 1e9 bytes per second that can be read from memory; ``memory_reach`` of that is reached.
        matrix_tflops: 1e12 multiplications and additions per second of 16-bit matrix products; ``matrix_reach`` of
            that is reached with quantized weights.
        op_us: microseconds of each op, however small.
        collective_us: microseconds that starting a collective takes, beside the links' own latency.
        step_us: microseconds between two steps: planning, sending the plan, choosing a token.
        reserve_gb: 2^30 bytes that drivers, libraries and the program take.
        types: measured rates by the weights' type, instead of the above.
    """

    name: str
    memory_gb: float
    memory_gbps: float
    matrix_tflops: float
    memory_reach: float = 0.7
    matrix_reach: float = 0.4
    op_us: float = 4.0
    collective_us: float = 10.0
    step_us: float = 100.0
    reserve_gb: float = 1.5
    types: Mapping[str, Rate] = field(default_factory=dict)

    def rate(self, type: str) -> Rate:
        """Return the rate of products with weights of a type."""
        found = self.types.get(type)
        return found or Rate(self.memory_gbps * self.memory_reach, self.matrix_tflops * self.matrix_reach)

    @property
    def gbps(self) -> float:
        """1e9 bytes per second that ops other than products reach."""
        return self.memory_gbps * self.memory_reach


@dataclass(frozen=True)
class Link:
    """What carries messages: ``latency_us`` for each, ``gbps`` in each direction.

    ``gbps`` (1e9 bytes per second) is that of a rank within a host, and that of the whole host between hosts.
    """

    name: str
    latency_us: float
    gbps: float


DEVICES: dict[str, Device] = {
    # Vendors' data sheets: memory, memory bandwidth, dense 16-bit matrix rate.
    "v100-32g": Device("v100-32g", 32, 900, 125),
    "a100-40g": Device("a100-40g", 40, 1555, 312),
    "a100-80g": Device("a100-80g", 80, 2039, 312),
    "l40s": Device("l40s", 48, 864, 362),
    "h100": Device("h100", 80, 3350, 989),
    "h200": Device("h200", 141 * 1e9 / GIB, 4800, 989),
    "gh200": Device("gh200", 96, 4000, 989),
    "b200": Device("b200", 180, 8000, 2250),
    # One of the two dies of a card: what a rank gets.
    "mi250x": Device("mi250x", 64, 1638, 191.5),
    "mi300x": Device("mi300x", 192, 5300, 1307),
    # A rank with a few cores; --measure finds out about the ones at hand.
    "cpu": Device("cpu", 64, 40, 1.0, 0.8, 0.5, 8.0, 4.0, 100.0, 0.25),
}
WITHIN: dict[str, Link] = {
    "shm": Link("shm", 1.0, 5),
    "pcie3": Link("pcie3", 6.0, 12),
    "pcie4": Link("pcie4", 6.0, 24),
    "pcie5": Link("pcie5", 6.0, 48),
    "nvlink2": Link("nvlink2", 5.0, 150),
    "nvlink3": Link("nvlink3", 5.0, 300),
    "nvlink4": Link("nvlink4", 5.0, 450),
    "nvlink5": Link("nvlink5", 5.0, 900),
    "xgmi": Link("xgmi", 6.0, 64),
    "xgmi3": Link("xgmi3", 6.0, 448),
}
BETWEEN: dict[str, Link] = {
    "ethernet1": Link("ethernet1", 40.0, 0.125),
    "ethernet10": Link("ethernet10", 25.0, 1.25),
    "ethernet25": Link("ethernet25", 20.0, 3.125),
    "ethernet100": Link("ethernet100", 15.0, 12.5),
    "edr": Link("edr", 2.0, 12.5),
    "hdr100": Link("hdr100", 2.0, 12.5),
    "hdr": Link("hdr", 2.0, 25),
    "ndr": Link("ndr", 2.0, 50),
    "omnipath": Link("omnipath", 2.0, 12.5),
    "slingshot": Link("slingshot", 2.5, 25),
}
_USUAL_WITHIN = {
    "v100-32g": "nvlink2",
    "a100-40g": "nvlink3",
    "a100-80g": "nvlink3",
    "l40s": "pcie4",
    "h100": "nvlink4",
    "h200": "nvlink4",
    "gh200": "nvlink4",
    "b200": "nvlink5",
    "mi250x": "xgmi",
    "mi300x": "xgmi3",
    "cpu": "shm",
}


@dataclass(frozen=True)
class Cluster:
    """``hosts`` alike, each with ``per_host`` ranks on a device of their own."""

    hosts: int
    per_host: int
    device: Device
    within: Link
    between: Link

    @property
    def n_ranks(self) -> int:
        """Ranks in all."""
        return self.hosts * self.per_host

    def host(self, rank: int) -> int:
        """Return the host of a rank: ranks fill one after the other."""
        return rank // self.per_host


def read_cluster(path: Path) -> dict[str, Any]:
    """Return the tables of a cluster file, for `make_cluster`.

    Raises:
        UsageError: it cannot be read, or is not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"--cluster {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--cluster {path} is not TOML: {error}") from None


def make_cluster(tables: Mapping[str, Any], source: str) -> Cluster:
    """Put a cluster together.

    Args:
        tables: ``hosts``, ``ranks_per_host``; ``device``, ``within`` and ``between``, each the name of one that is
            known, or a table of numbers, in which ``name`` gives what is not there.
        source: whence the tables come, for messages.

    Raises:
        UsageError: an unknown name, or a number that is none or not positive.
    """
    unknown = sorted(set(tables) - {"hosts", "ranks_per_host", "device", "within", "between"})
    if unknown:
        raise UsageError(
            f"{source}: unknown entry {unknown[0]!r}; there are hosts, ranks_per_host, device, within, between"
        )
    device = _one(tables.get("device", "cpu"), DEVICES, Device, f"{source}: device")
    usual = WITHIN[_USUAL_WITHIN.get(device.name, "shm")]
    within = _one(tables.get("within", usual.name), WITHIN, Link, f"{source}: within")
    between = _one(tables.get("between", "hdr"), BETWEEN, Link, f"{source}: between")
    hosts, per_host = (_count(tables.get(name, 1), f"{source}: {name}") for name in ("hosts", "ranks_per_host"))
    return Cluster(hosts, per_host, device, within, between)


def _one(given: Any, known: Mapping[str, Any], kind: type[Any], what: str) -> Any:
    """Return the entry of a table that is named, with what else is given in its place."""
    table = {"name": given} if isinstance(given, str) else given
    if not isinstance(table, Mapping):
        raise UsageError(f"{what} is {given!r}; give a name or a table")
    table = dict(table)
    name = table.pop("name", None)
    base = known.get(name) if isinstance(name, str) else next(iter(known.values()))
    names = [entry.name for entry in fields(kind)]
    numbers = [entry for entry in names if entry not in ("name", "types")]
    if base is None:
        needed = [e.name for e in fields(kind) if e.name in numbers and e.default is MISSING]
        if not set(table) >= set(needed):
            raise UsageError(
                f"{what} {name!r} is not known; there are {', '.join(known)}, or give it {', '.join(needed)}"
            )
        base = kind(str(name), **dict.fromkeys(needed, 1.0))
    values: dict[str, Any] = {"name": name or "custom"}
    for key, value in table.items():
        if key == "types" and "types" in names:
            values[key] = {type: _rate(rate, f"{what}.types.{type}") for type, rate in value.items()}
        elif key not in numbers:
            raise UsageError(f"{what}: unknown entry {key!r}; there are {', '.join(['name', *numbers])}")
        else:
            values[key] = _number(value, f"{what}.{key}")
    return replace(base, **values)


def _rate(given: Any, what: str) -> Rate:
    if not isinstance(given, Mapping) or set(given) != {"gbps", "tflops"}:
        raise UsageError(f"{what} needs the two numbers gbps and tflops")
    return Rate(_number(given["gbps"], what), _number(given["tflops"], what))


def _number(value: Any, what: str) -> float:
    free = what.endswith(("_us", "reserve_gb"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12 or not (value or free):
        raise UsageError(f"{what} is {value!r}; a number {'of at least' if free else 'above'} 0 is needed")
    return float(value)


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise UsageError(f"{what} is {value!r}; a positive integer is needed")
    return value


def as_toml(cluster: Cluster) -> str:
    """Return a cluster as the text of a file for ``--cluster``."""
    lines = [f"hosts = {cluster.hosts}", f"ranks_per_host = {cluster.per_host}"]
    for title, part in (("device", cluster.device), ("within", cluster.within), ("between", cluster.between)):
        lines += ["", f"[{title}]", f'name = "{part.name}"']
        numbers = [entry.name for entry in fields(part) if entry.name not in ("name", "types")]
        lines += [f"{name} = {getattr(part, name):.6g}" for name in numbers]
    for type, rate in cluster.device.types.items():
        lines += ["", f"[device.types.{type}]", f"gbps = {rate.gbps:.6g}", f"tflops = {rate.tflops:.6g}"]
    return "\n".join(lines) + "\n"
