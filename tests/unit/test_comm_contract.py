"""The contract of groups and worlds, for one rank alone, for threads, and for threads that share memory like ranks."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from comm_contract import CONTRACT
from mpillama.comm.board import Board, share_file
from mpillama.comm.shared import native_module_is_built
from mpillama.comm.solo import SoloWorld
from mpillama.comm.threads import run_threads
from mpillama.errors import JobError
from shared_ranks import run_shared

needs_native = pytest.mark.skipif(not native_module_is_built(), reason="mpillama._shm is not built")
# Of ranks, by host.
PLACES = [
    [[0]],
    [[0, 1]],
    [[0, 1, 2]],
    [[0, 1, 2, 3, 4]],
    [[0, 1], [2, 3]],
    [[0, 2], [1, 3]],
    [[1, 2, 3], [0]],
    [[0], [1], [2]],
]
GROUPS = [check for check in CONTRACT if check.__name__.startswith(("all", "many"))]


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_solo(check):
    check(SoloWorld())


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_threads(check, n_ranks):
    run_threads(n_ranks, check)


@needs_native
@pytest.mark.parametrize("hosts", PLACES, ids=str)
@pytest.mark.parametrize("check", GROUPS, ids=lambda check: check.__name__)
def test_shared_memory(check, hosts):
    run_shared(hosts, check)


def test_a_failing_thread_ends_the_others():
    def main(world):
        if world.rank == 1:
            raise ValueError("rank 1 is ill")
        world.bcast(None)

    with pytest.raises(ValueError, match="rank 1 is ill"):
        run_threads(3, main)
    assert threading.active_count() < 20


def late(world):
    """Let rank 1 come too late to the third collective of the second step."""
    group = world.group()
    for step in range(1, 3):
        world.watch.begin_step()
        for call in range(1, 4):
            if (world.rank, step, call) == (1, 2, 3):
                time.sleep(2.5)
                return
            group.allreduce(np.ones(3, "f4"))


def test_a_thread_that_does_not_come_is_named():
    with pytest.raises(JobError, match="rank 1 has not come within 1 s"):
        run_threads(3, late, timeout=1.0)


@needs_native
def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(
        JobError, match=r"rank 1 on host0 has not come to allreduce 3 of step 2 .* allreduce 2 of step 2"
    ):
        run_shared([[0, 1, 2]], late, limit=1.0)


@needs_native
def test_ranks_with_different_collectives_have_diverged():
    def main(world):
        world.group().allreduce(np.ones(3 + world.rank, "f4"))

    with pytest.raises(JobError, match="diverged"):
        run_shared([[0, 1]], main, limit=5.0)


class Alone:
    """The communicator of one rank."""

    rank, size = 0, 1

    def bcast(self, value):
        return value

    def allgather(self, value):
        return [value]


def test_a_dead_process_is_noticed_and_a_stopped_one_is_not():
    fd = share_file(Alone(), Board.nbytes(2))
    assert os.fstat(fd).st_nlink == 0  # nothing to be left behind
    board = Board(bytearray(Board.nbytes(2)), fd, 0, 2)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        Board(bytearray(Board.nbytes(2)), fd, 1, 2)
        os.write(writer, b".")
        signal.pause()
    os.read(reader, 1)
    assert board.dead([0, 1]) == []
    os.kill(child, signal.SIGSTOP)
    assert board.dead([0, 1]) == []
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert board.dead([0, 1]) == [1]
    for end in (fd, reader, writer):
        os.close(end)
