"""What is said of a loaded model: how it lies over the ranks, and what they have read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mpillama.cli.devices import Kinds
from mpillama.cli.progress import format_bytes, format_rate
from mpillama.gguf.reader import TensorInfo
from mpillama.grid import Grid
from mpillama.partition import Partition


def layout_line(
    hosts: Sequence[str],
    kinds: Kinds,
    n_threads: int,
    grid: Grid,
    weights: Sequence[float],
    partition: Partition,
    shares: Sequence[int],
    kv: Sequence[int],
    n_kv: int,
) -> str:
    """Return the line about the layout.

    Args:
        hosts: of each rank.
        kinds: of their devices.
        n_threads: of this rank.
        grid: of the ranks.
        weights: a share for each rank of a replica.
        partition: of the model.
        shares: bytes of weights of each rank.
        kv: bytes of KV of each rank.
        n_kv: tokens that this has room for.
    """
    total = sum(weights)
    split = ",".join(f"{100 * weight / total:.3g}" for weight in weights)
    low, high = min(shares), max(shares)
    per_rank = format_bytes(high) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"
    each = " each" if len(hosts) > 1 else ""
    return (
        f"layout: {_count(len(hosts), 'rank')} on {_count(len(set(hosts)), 'host')}, {_grid_words(grid, partition)}"
        f"{kinds} with {_count(n_threads, 'thread')}{each}, tensor split {split} %, "
        f"weights {per_rank} per rank, KV {format_bytes(max(kv))} for {n_kv} tokens"
    )


def reading_lines(
    hosts: Sequence[str],
    shares: Sequence[int],
    kv: Sequence[int],
    read: Sequence[tuple[int, int]],
    tensors: Iterable[TensorInfo],
    seconds: float,
    loading: str,
) -> Iterator[str]:
    """Yield a line for each rank, and one for all.

    Args:
        hosts: of each rank.
        shares: bytes of weights of each rank.
        kv: bytes of KV of each rank.
        read: bytes that each rank has read from files, and its peak memory.
        tensors: of the model.
        seconds: until all ranks had their weights.
        loading: how they were read, ``--load``.
    """
    for rank, (n_read, peak) in enumerate(read):
        yield (
            f"rank {rank} on {hosts[rank]}: share {format_bytes(shares[rank])}, "
            f"read {format_bytes(n_read)}, KV {format_bytes(kv[rank])}, peak memory {format_bytes(peak)}"
        )
    n_file = sum(info.nbytes for info in {(info.part, info.offset): info for info in tensors}.values())
    rate = format_rate(seconds, sum(n for n, _ in read))
    yield f"read in all: {rate}, of {format_bytes(n_file)} of tensors in the file (--load {loading})"


def _grid_words(grid: Grid, partition: Partition) -> str:
    words = f"{grid.dp} replicas of {_count(grid.replica_size, 'rank')}, " if grid.dp > 1 else ""
    if grid.pp > 1:
        blocks = "+".join(str(len(stage.blocks)) for stage in partition.stages)
        words += f"{grid.pp} stages of {_count(grid.tp, 'rank')} with {blocks} blocks, "
    whole = len(partition.whole_experts)
    return words + (f"whole experts in {_count(whole, 'block')}, " if whole else "")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
