"""Reading together: the same weights bit for bit as by reading alone, each byte once, and one end for all."""

import os
import threading
import time

import pytest

from mpillama.comm.base import attempt, settle
from mpillama.comm.threads import run_threads
from mpillama.errors import PeerFailure, UserError
from mpillama.gguf.types import GGMLType
from mpillama.grid import Grid
from mpillama.reading import ReadWatch
from mpillama.relay import cut_chunks, reading_ranks
from relay_case import Case, Raw, RawInPieces, assert_same
from tiny import write_llama

SHAPES = [
    ({"n_layer": 3}, Grid(3), "off"),
    ({"n_layer": 3, "tied": True}, Grid(1, 3), "off"),
    ({"n_layer": 3, "tied": True, "fused_qkv": True}, Grid(2, 1, 2), "off"),
    ({"n_expert": 7, "n_expert_used": 2}, Grid(2, 2), "off"),
    ({"n_expert": 7, "n_expert_used": 2}, Grid(4), "on"),
]


@pytest.mark.parametrize(("sizes", "grid", "experts"), SHAPES, ids=lambda x: str(x))
@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.F16])
def test_same_weights_as_direct(sizes, grid, experts, type, tmp_path, rng, monkeypatch):
    path = write_llama(tmp_path / "m.gguf", rng, type, n_head=12, n_head_kv=4, **sizes)
    shares = rng.uniform(0.0, 3.0, grid.replica_size) * (rng.random(grid.replica_size) < 0.8)
    shares[:: grid.tp] += 0.5
    case = Case(path, grid, shares.tolist(), experts)
    # From chunks of one row to one of everything.
    chunk_bytes = int(2 ** rng.uniform(11, 22))
    monkeypatch.setattr("mpillama.loader.PIECE", int(2 ** rng.uniform(8, 16)))
    hosts = tuple(rng.permutation([str(i % 2) for i in range(grid.size)]))
    counted = [0] * grid.size

    def main(world):
        world.hosts = hosts

        def progress(n):
            counted[world.rank] += n

        alone, together = case.direct(world), case.relay(world, chunk_bytes, progress)
        in_pieces = case.direct(world, backend=RawInPieces()), case.relay(world, chunk_bytes, backend=RawInPieces())
        for weights, _ in (together, *in_pieces):
            assert_same(weights, alone[0])
        assert in_pieces[0][1] == alone[1]
        return alone, together

    results = run_threads(grid.size, main)
    assert counted == [case.partition.bytes_of(rank) for rank in range(grid.size)]
    n_file = sum(info.nbytes for info in {info.offset: info for info in case.tensors.values()}.values())
    n_read = sum(n for _, (_, n) in results)
    # What lies between tensors is read along.
    assert n_file <= n_read <= n_file + 32 * len(case.tensors), (chunk_bytes, shares)
    n_chunks = len(cut_chunks(case.tensors.values(), chunk_bytes))
    assert sum(n > 0 for _, (_, n) in results) == min(grid.size, n_chunks)


def test_split_files_are_read_in_order(tmp_path, rng):
    """Chunks end with a file, and hold no more bytes than they should unless a row is longer."""
    write_llama(tmp_path / "m.gguf", rng, GGMLType.Q8_0, split_max_tensors=8)
    case = Case(tmp_path / "m-00001-of-00003.gguf", Grid(4), [5.0, 2.0, 1.0, 1.0])
    chunks = cut_chunks(case.tensors.values(), 50_000)
    assert [c.part for c in chunks] == sorted(c.part for c in chunks)
    assert {c.part for c in chunks} == {0, 1, 2}
    assert max(c.n_bytes for c in chunks) <= 50_000
    results = run_threads(4, lambda world: (case.direct(world)[0], case.relay(world, 50_000)[0]))
    for alone, together in results:
        assert_same(together, alone)


def test_readers_take_turns_over_hosts():
    assert reading_ranks(["a", "a", "a", "b", "b", "c"], 2) == [0, 3, 5, 1, 4]
    assert reading_ranks(["a", "b", "a", "b"], 9) == [0, 1, 2, 3]


def ends(world, case, **more):
    with pytest.raises(UserError) as caught:
        settle(world, attempt(lambda: case.relay(world, 20_000, **more)))
    assert isinstance(caught.value, PeerFailure) == (world.rank != 0)
    return caught.value.line


@pytest.mark.parametrize("how", ["truncated", "EIO", "backend"])
def test_what_one_rank_cannot_read_ends_all_with_one_line(how, tmp_path, rng, monkeypatch):
    path = write_llama(tmp_path / "m.gguf", rng, GGMLType.Q4_0)
    case = Case(path, Grid(4), [1.0, 2.0, 1.0, 1.0])
    broken = rng.integers(path.stat().st_size // 2, path.stat().st_size - 40_000)
    pread = os.preadv
    victim = int(rng.integers(4))

    class Full(Raw):
        def weight(self, raw):
            raise UserError("GPU 0 is out of memory")

    def preadv(fd, views, offset):
        if how == "EIO" and offset >= broken:
            raise OSError(5, "Input/output error")
        return pread(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    if how == "truncated":
        os.truncate(path, broken)

    def main(world):
        full = how == "backend" and world.rank == victim
        return ends(world, case, backend=Full() if full else None)

    lines = run_threads(4, main, timeout=20)
    assert len(set(lines)) == 1
    words = {
        "truncated": "the file ends inside",
        "EIO": "Input/output error",
        "backend": f"rank {victim} on threads: ",
    }
    assert words[how] in lines[0]


@pytest.mark.parametrize("together", [False, True])
def test_a_read_that_hangs_is_spoken_of_while_it_lasts(together, tmp_path, rng, monkeypatch):
    path = write_llama(tmp_path / "m.gguf", rng, GGMLType.Q4_0)
    case = Case(path, Grid(2), [1.0, 1.0])
    expected = run_threads(2, lambda world: case.direct(world)[0])
    answers, pread, said = threading.Event(), os.preadv, ([], [])
    hangs = iter([True])

    def preadv(fd, views, offset):
        if offset > 60_000 and next(hangs, False):
            assert answers.wait(20)
        return pread(fd, views, offset)

    def main(world):
        def say(text):
            said[world.rank].append(text)
            # Twice: it goes on saying so.
            if len(said[world.rank]) == 2:
                answers.set()

        watch = ReadWatch(say, 0.1)
        found = case.relay(world, 20_000, watch=watch) if together else case.direct(world, watch)
        end = time.monotonic() + 5
        while len(said[world.rank]) == 2 and time.monotonic() < end:
            time.sleep(0.02)
        watch.close()
        return found[0]

    monkeypatch.setattr(os, "preadv", preadv)
    for alone, found in zip(expected, run_threads(2, main), strict=True):
        assert_same(found, alone)
    first, second, third = said[0] or said[1]
    assert first.startswith("has been waiting for 0 s to read ")
    assert f"bytes of {path} at offset " in second
    assert third.startswith(f"{path} can be read again, after ")
    assert not (said[0] and said[1])
