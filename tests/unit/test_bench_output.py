"""Every format of results parses back to the same values."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest

from mpillama.bench.output import COMPARISON, DETAILS, FORMATS, SQL_TABLE, Result, make_printer, scalar_fields

LLAMA_BENCH = {
    *("build_commit", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size"),
    *("model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "split_mode", "tensor_split"),
    *("n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts"),
    *("samples_ns", "samples_ts"),
}


def random_result(rng: np.random.Generator) -> Result:
    """Random values of the right types, with what needs quoting in the texts."""
    made: dict[str, Any] = {}
    for item in fields(Result):
        kind = str(item.type)
        if "tuple" in kind:
            made[item.name] = tuple(int(x) if "int" in kind else float(x) for x in rng.integers(1, 10**9, 3))
        elif kind.startswith("str"):
            made[item.name] = 'it\'s "a", \\name\\ | ü' + str(rng.integers(1000))
        elif kind.startswith("int"):
            made[item.name] = int(rng.integers(0, 10**12))
        else:
            made[item.name] = None if "None" in kind and rng.integers(2) else float(rng.random() * 1e4)
    return Result(**made)


def printed(format: str, results: list[Result], *more: Any) -> str:
    stream = io.StringIO()
    printer = make_printer(format, stream, *more)
    printer.header()
    for result in results:
        printer.row(result)
    printer.footer()
    return stream.getvalue()


@pytest.fixture
def results(rng):
    return [random_result(rng) for _ in range(3)]


def as_json(result: Result) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(result).items()}


def test_json(results):
    assert json.loads(printed("json", results)) == [as_json(result) for result in results]
    assert json.loads(printed("json", [])) == []


def test_jsonl(results):
    assert [json.loads(line) for line in printed("jsonl", results).splitlines()] == [as_json(r) for r in results]


def test_csv(results):
    rows = list(csv.DictReader(io.StringIO(printed("csv", results))))
    for row, result in zip(rows, results, strict=True):
        expected = {name: getattr(result, name) for name in scalar_fields()}
        assert row == {name: "" if value is None else str(value) for name, value in expected.items()}


def test_sql(results):
    with sqlite3.connect(":memory:") as database:
        # Twice, as when two runs are put into one database.
        database.executescript(printed("sql", results) + printed("sql", results[:1]))
        names = list(scalar_fields())
        rows = database.execute(f"SELECT {', '.join(names)} FROM {SQL_TABLE}").fetchall()
    assert rows == [tuple(getattr(result, name) for name in names) for result in [*results, results[0]]]


def test_names_are_llama_benchs():
    assert {item.name for item in fields(Result)} >= LLAMA_BENCH
    assert set(scalar_fields()) == {item.name for item in fields(Result)} - {
        "samples_ns",
        "samples_ts",
        "peer_samples_ts",
    }
    assert scalar_fields()["avg_ts"] == scalar_fields()["peer_ratio"] == "REAL"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown(rng):
    result = replace(
        random_result(rng),
        model_type="llama 1B",
        model_size=763097088,
        model_n_params=1498482688,
        backends="cpu",
        n_threads=2,
        n_ranks=4,
        test="pp512 @ d64",
        avg_ts=283.456,
        stddev_ts=1.005,
    )
    lines = printed("md", [result]).splitlines()
    assert cells(lines[0]) == ["model", "size", "params", "backend", "threads", "ranks", "test", "t/s"]
    assert cells(lines[2]) == ["llama 1B", "727.75 MiB", "1.50 B", "cpu", "2", "4", "pp512 @ d64", "283.46 ± 1.00"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[-1].startswith("mpillama ")


def test_markdown_has_more_columns_on_demand(rng):
    result = replace(
        random_result(rng), n_batch=77, stream_share=0.5, peer_avg_ts=10.0, peer_stddev_ts=0.5, peer_ratio=1.25
    )
    lines = printed("md", [result], ["n_batch", *DETAILS, *COMPARISON], "other t/s").splitlines()
    row = dict(zip(cells(lines[0]), cells(lines[2]), strict=True))
    assert row["n_batch"] == "77"
    assert row["of stream"] == "50 %"
    assert row["other t/s"] == "10.00 ± 0.50"
    assert row["ratio"] == "1.250"
    assert row["GB/s"] == f"{result.read_gbps:.1f}"
    bare = printed("md", [replace(result, stream_share=None)], DETAILS).splitlines()
    assert dict(zip(cells(bare[0]), cells(bare[2]), strict=True))["of stream"] == ""


def test_all_formats_are_there():
    assert set(FORMATS) == {"csv", "json", "jsonl", "md", "sql"}
