"""The parts of a batch job that need no model: ids, files of requests and of results, times."""

import json
import os
import random
import resource
import signal

import pytest

from mpillama.batch.clock import default_margin, parse_duration, slurm_seconds_left
from mpillama.batch.ids import IdSet
from mpillama.batch.requests import MAX_LINE, Requests, parse_line
from mpillama.batch.results import Results, key
from mpillama.errors import UsageError, UserError


def result(name, number=1, text="x"):
    return {"id": f"batch_req_{number}", "custom_id": name, "response": {"body": text}, "error": None}


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_ids_are_found_across_merges():
    ids, n = IdSet(), 200_000
    assert all(ids.add(f"request-{i}") for i in range(n))
    assert len(ids) == n
    assert not any(ids.add(f"request-{i}") for i in range(0, n, 997))
    assert f"request-{n}" not in ids
    assert "\ud800" not in ids
    assert ids.add("\ud800")
    assert ids._sorted.nbytes <= 8 * n


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b"[1]", "expected an object"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"custom_id": 5}', "custom_id"),
        (b'{"custom_id": ""}', "custom_id"),
        (b'{"custom_id": "a", "method": "GET"}', "POST"),
        (b'{"custom_id": "a", "url": "/v2"}', "url must be one of /v1/chat/completions"),
        (b'{"custom_id": "a", "url": "/v1/completions"}', "body"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": []}', "body"),
    ],
)
def test_lines_that_are_no_requests(line, said):
    parsed = parse_line(line, 7)
    assert said in parsed.error
    assert parsed.body is None
    assert parsed.result_id == "batch_req_7"
    assert parsed.custom_id == ("a" if b'"a"' in line else None)


def test_requests_are_read_a_line_at_a_time(tmp_path):
    path = tmp_path / "in.jsonl"
    good = b'{"custom_id": "%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "%s"}}\n'
    with path.open("wb") as file:
        for i in range(3):
            file.write(good % (i, b"x" * 100))
        file.write(b"\n   \n" + b"y" * (MAX_LINE + 5000) + b"\n" + good[:-1] % (9, b"the last has no newline"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    requests = Requests(path)
    found = list(requests)
    assert [line.number for line in found] == [1, 2, 3, 6, 7]
    assert [line.custom_id for line in found] == ["0", "1", "2", None, "9"]
    assert "longer than 64 MiB" in found[3].error
    assert found[4].body == {"prompt": "the last has no newline"}
    assert requests.bytes_read == path.stat().st_size
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * MAX_LINE


@pytest.mark.parametrize(("name", "said"), [("none", "No such file"), ("", "directory")])
def test_requests_that_cannot_be_read(tmp_path, name, said):
    with pytest.raises(UsageError, match=said):
        Requests(tmp_path / name)


@pytest.mark.parametrize("seed", range(20))
def test_results_go_on_after_a_line_was_torn(tmp_path, seed):
    """Killed at a random byte, again and again: each result is there once and every line is whole."""
    random_, path = random.Random(seed), tmp_path / "out.jsonl"
    wanted = {f"id-{i}": f"é{i}\n" * random_.randrange(20) for i in range(40)}
    while True:
        with Results(path) as results:
            left = [name for name in wanted if key(name, "") not in results.answered]
            for name in left[: random_.randrange(1, 9)]:
                results.write(result(name, text=wanted[name]))
        if not left:
            break
        whole = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(whole - random_.choice([0, 1, random_.randrange(min(300, whole))]))
    assert sorted(line["custom_id"] for line in lines_of(path)) == sorted(wanted)
    assert all(line["response"]["body"] == wanted[line["custom_id"]] for line in lines_of(path))


def test_results_of_lines_without_an_id_are_told_apart_by_their_number(tmp_path):
    with Results(tmp_path / "o") as results:
        results.write(result(None, 3))
        results.write(result("batch_req_3", 4))
        assert key(None, "batch_req_3") in results.answered
        assert key(None, "batch_req_4") not in results.answered
        assert len(results.answered) == 2


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "thesis.txt"
    path.write_text("It was a dark night.\nThe end\n")
    with pytest.raises(UsageError, match="line 1 is not a result"):
        Results(path)
    assert path.read_text() == "It was a dark night.\nThe end\n"
    with pytest.raises(UsageError, match="Is a directory"):
        Results(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        Results(tmp_path / "no" / "folder")


def test_two_jobs_do_not_write_one_file(tmp_path):
    with Results(tmp_path / "o"), pytest.raises(UsageError, match="another job"):
        Results(tmp_path / "o")


def _fill(results):
    for i in range(100):
        results.write(result(f"n{i}", text="y" * 200))


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """A limit on the size of files stands for the disk: the write that meets it is cut short."""
    path = tmp_path / "o"
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Results(path) as results:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
            with pytest.raises(UserError, match="results before are safe: make room"):
                _fill(results)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert [line["custom_id"] for line in lines_of(path)] == [f"n{i}" for i in range(len(lines_of(path)))]
    assert 10 < len(lines_of(path)) < 100
    assert path.read_bytes().endswith(b"\n")
    with Results(path) as results:
        assert results.repaired == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("1h30m", 5400),
        ("2d", 172800),
        ("11:45:00", 42300),
        ("5:00", 300),
        ("1-00:00:10", 86410),
        ("", None),
        ("soon", None),
        ("2-03:04:05", 183845),
        ("3:04:05", 11045),
        ("4:05", 245),
        ("UNLIMITED", None),
        ("1:5", None),
        ("-5", None),
        ("h", None),
    ],
)
def test_durations(text, seconds):
    if seconds is None:
        with pytest.raises(ValueError, match="expected a time"):
            parse_duration(text)
    else:
        assert parse_duration(text) == seconds


def test_what_slurm_says(tmp_path, monkeypatch):
    assert slurm_seconds_left({}) is None
    assert slurm_seconds_left({"SLURM_JOB_END_TIME": "1000", "SLURM_JOB_ID": "5"}, now=lambda: 400.0) == 600
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$3" = 5 ] && echo 1-02:00:00 || echo UNLIMITED\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert slurm_seconds_left({"SLURM_JOB_ID": "5"}) == 93600
    assert slurm_seconds_left({"SLURM_JOB_ID": "6"}) is None
    assert default_margin(60) == 10
    assert default_margin(1200) == 60
    assert default_margin(86400) == 120
