"""Results as tables: Markdown, CSV, JSON, JSON lines and SQL, with llama-bench's names where it has them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, TextIO

from mpillama import __version__

FORMATS = ("csv", "json", "jsonl", "md", "sql")
SQL_TABLE = "mpillama_bench"


@dataclass(frozen=True)
class Result:
    """One row. Fields down to ``stddev_ts``, and the samples, are llama-bench's; None is what was not measured.

    Attributes:
        n_threads: of each rank; ``n_ranks`` and ``n_hosts`` say how many there are.
        comm_us: and what follows, down to ``read_gbps``: see `Figures`.
        stream_gbps: what all ranks together read from memory, measured in this run.
        stream_share: read_gbps / stream_gbps.
        peer: the program compared with, its tokens per second, and the median of our tokens per second over its, taken
            pair by pair.
    """

    build_commit: str
    cpu_info: str
    gpu_info: str
    backends: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    type_k: str
    type_v: str
    split_mode: str
    tensor_split: str
    n_prompt: int
    n_gen: int
    n_depth: int
    n_parallel: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    test: str
    n_ranks: int
    n_hosts: int
    comm_us: float
    comm_min_us: float
    comm_bytes: float
    comm_calls: float
    host_us: float | None
    skew_us: float
    overhead_us: float
    weight_bytes: float
    kv_bytes: float
    read_gbps: float
    stream_gbps: float | None
    stream_share: float | None
    peer: str | None
    peer_avg_ts: float | None
    peer_stddev_ts: float | None
    peer_ratio: float | None
    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]
    peer_samples_ts: tuple[float, ...]


_LISTS = ("samples_ns", "samples_ts", "peer_samples_ts")
_SQL_TYPES = {"str": "TEXT", "int": "INTEGER", "float": "REAL"}


def scalar_fields() -> dict[str, str]:
    """Return the fields that hold one value, with their SQL types."""
    kinds = {item.name: str(item.type).removesuffix(" | None") for item in fields(Result)}
    return {name: _SQL_TYPES[kind] for name, kind in kinds.items() if name not in _LISTS}


class Printer(Protocol):
    """Writes rows as they come."""

    def header(self) -> None:
        """Write what comes before the rows."""
        ...

    def row(self, result: Result) -> None:
        """Write a row, and flush."""
        ...

    def footer(self) -> None:
        """Write what comes after the rows."""
        ...


class _Plain:
    """A printer without header and footer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def header(self) -> None:
        """Nothing."""

    def footer(self) -> None:
        """Nothing."""


class JsonLines(_Plain):
    """An object a line."""

    def row(self, result: Result) -> None:
        """Write a line."""
        self._write(json.dumps(asdict(result)) + "\n")


class Json(_Plain):
    """A list of objects."""

    _between = "\n"

    def header(self) -> None:
        """Open the list."""
        self._write("[")

    def row(self, result: Result) -> None:
        """Write an object."""
        lines = json.dumps(asdict(result), indent=2).replace("\n", "\n  ")
        self._write(f"{self._between}  {lines}")
        self._between = ",\n"

    def footer(self) -> None:
        """Close the list."""
        self._write("\n]\n")


class Csv(_Plain):
    """Comma-separated values, all in quotes, without the samples."""

    def _line(self, values: Iterable[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(values)
        self._write(text.getvalue())

    def header(self) -> None:
        """Write the names."""
        self._line(scalar_fields())

    def row(self, result: Result) -> None:
        """Write the values; what was not measured is empty."""
        self._line(getattr(result, name) for name in scalar_fields())


class Sql(_Plain):
    """Statements that fill a table, for sqlite3, without the samples."""

    def header(self) -> None:
        """Make the table."""
        columns = ",\n".join(f"  {name} {type}" for name, type in scalar_fields().items())
        self._write(f"CREATE TABLE IF NOT EXISTS {SQL_TABLE} (\n{columns}\n);\n\n")

    def row(self, result: Result) -> None:
        """Insert a row."""
        names = list(scalar_fields())
        values = ", ".join(_sql(getattr(result, name)) for name in names)
        self._write(f"INSERT INTO {SQL_TABLE} ({', '.join(names)}) VALUES ({values});\n")


def _sql(value: str | float | None) -> str:
    if value is None:
        return "NULL"
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


# Columns of the Markdown table by field: title, and width; left-aligned if negative.
_COLUMNS: Mapping[str, tuple[str, int]] = {
    "model_type": ("model", -30),
    "model_size": ("size", 10),
    "model_n_params": ("params", 10),
    "backends": ("backend", -10),
    "n_threads": ("threads", 7),
    "n_ranks": ("ranks", 5),
    "n_batch": ("n_batch", 7),
    "n_ubatch": ("n_ubatch", 8),
    "type_k": ("type_k", 6),
    "type_v": ("type_v", 6),
    "tensor_split": ("ts", 10),
    "test": ("test", 15),
    "avg_ts": ("t/s", 18),
    "comm_us": ("comm us/t", 9),
    "comm_bytes": ("comm B/t", 9),
    "comm_calls": ("comms/t", 7),
    "host_us": ("host us/t", 9),
    "skew_us": ("skew us", 8),
    "read_gbps": ("GB/s", 7),
    "stream_share": ("of stream", 9),
    "peer_avg_ts": ("", 18),
    "peer_ratio": ("ratio", 6),
}
DETAILS = ("comm_us", "comm_bytes", "comm_calls", "host_us", "skew_us", "read_gbps", "stream_share")
COMPARISON = ("peer_avg_ts", "peer_ratio")
_ALWAYS = ("model_type", "model_size", "model_n_params", "backends", "n_threads", "n_ranks", "test", "avg_ts")


class Markdown(_Plain):
    """llama-bench's table: settings have a column only where they are not the defaults.

    Args:
        stream: to write to.
        also: fields to show besides those that are always shown.
        peer: the title of the column of the program that is compared with.
    """

    def __init__(self, stream: TextIO, also: Iterable[str] = (), peer: str = "") -> None:
        super().__init__(stream)
        shown = {*_ALWAYS, *also}
        self._columns = {name: column for name, column in _COLUMNS.items() if name in shown}
        if "peer_avg_ts" in self._columns:
            self._columns["peer_avg_ts"] = (peer, 18)

    def header(self) -> None:
        """Write the titles."""
        self._line([title for title, _ in self._columns.values()])
        rules = ["-" * (abs(width) - 1) + ("-" if width < 0 else ":") for _, width in self._columns.values()]
        self._line(rules)

    def row(self, result: Result) -> None:
        """Write a line."""
        self._line([_cell(name, result) for name in self._columns])

    def footer(self) -> None:
        """Write the version."""
        self._write(f"\nmpillama {__version__}\n")

    def _line(self, cells: list[str]) -> None:
        widths = [width for _, width in self._columns.values()]
        padded = [cell.ljust(-w) if w < 0 else cell.rjust(w) for cell, w in zip(cells, widths, strict=True)]
        self._write(f"| {' | '.join(padded)} |\n")


def _cell(name: str, result: Result) -> str:
    value = getattr(result, name)
    if value is None:
        return ""
    if name == "model_size":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.2f} MiB"
    if name == "model_n_params":
        return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.2f} M"
    if name == "avg_ts":
        return f"{value:.2f} ± {result.stddev_ts:.2f}"
    if name == "peer_avg_ts":
        return f"{value:.2f} ± {result.peer_stddev_ts:.2f}"
    if name == "stream_share":
        return f"{100 * value:.0f} %"
    if name == "peer_ratio":
        return f"{value:.3f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", r"\|")


def make_printer(format: str, stream: TextIO, also: Iterable[str] = (), peer: str = "") -> Printer:
    """Return a printer of one of `FORMATS`; see `Markdown` for ``also`` and ``peer``."""
    if format == "md":
        return Markdown(stream, also, peer)
    kinds: dict[str, Callable[[TextIO], Printer]] = {"csv": Csv, "json": Json, "jsonl": JsonLines, "sql": Sql}
    return kinds[format](stream)
