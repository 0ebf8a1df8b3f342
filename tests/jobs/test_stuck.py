"""A rank that keeps the others waiting is named, and the job ends soon after the limit; a slow one is no failure."""

import os
import signal

import pytest

from job import finish, ranks_of, run, start
from shared import shared

LIMIT = 1.5
# Beyond the limit: start and end of the processes, and the time that is given to those who see the late rank.
SLACK = 8.0

STEPS = """
import os, signal, sys, time
from functools import partial
import numpy as np
import mpillama.comm.mpi as mpi
from mpillama.comm.base import check_agreement
from mpillama.spmd import run

mpi.MPIWorld = partial(mpi.MPIWorld, hosts={hosts}, shared={shared})

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def main(world, interrupts):
    group = world.group()
    for step in range(1, 31):
        world.watch.begin_step()
        for call in range(1, 5):
            if (world.rank, step, call) == ({victim}, 30, 3):
                {fault}
            assert (group.allreduce(np.ones(30_000, "f4")) == world.size).all()
        check_agreement(world, 7 if (step, world.rank) != (20, {diverged}) else 8)
    {after}
    return 0

sys.exit(run(main, {limit}))
"""


def steps(n_ranks, limit=60.0, **changes):
    """Run 30 steps of four collectives each, with something wrong in the third of the last step."""
    what = {
        "hosts": (),
        "shared": True,
        "victim": -1,
        "diverged": -1,
        "fault": "pass",
        "after": "pass",
        "limit": LIMIT,
    } | changes
    return run([], n_ranks, limit, program=("-c", STEPS.format(**what)))


def assert_told(ended, *words):
    assert ended.code != 0
    assert "Traceback" not in ended.err
    ours = [line for line in ended.err.splitlines() if line.startswith("mpillama: error:")]
    assert len(ours) == 1, ended.err
    for word in words:
        assert word in ours[0]
    assert ended.seconds < LIMIT + SLACK


@pytest.mark.parametrize(
    ("hosts", "shared", "victim"),
    [
        ((), True, 1),
        (("a", "a", "b", "b"), True, 0),
        (("a", "b", "b", "a"), True, 3),
        (("a", "a", "a", "b"), True, 3),
        ((), False, 2),
    ],
)
def test_a_stopped_rank_is_named(hosts, shared, victim):
    ended = steps(4, hosts=hosts, shared=shared, victim=victim, fault="stop()")
    assert_told(ended, f"rank {victim} on ", "allreduce 3 of step 30")


def test_a_rank_that_hangs_is_named():
    ended = steps(3, victim=2, fault="time.sleep(600)")
    assert_told(ended, "rank 2 on ", "has not come to allreduce 3 of step 30", "last at allreduce 2", "process runs")


@pytest.mark.parametrize("hosts", [(), ("a", "b", "b")])
def test_rank_0_that_stops_between_two_steps_is_named(hosts):
    after = "stop() if world.rank == 0 else world.receive()"
    assert_told(steps(3, hosts=hosts, after=after), "rank 0 on ")


def test_a_rank_elsewhere_that_stops_while_rank_0_waits_for_mail_is_named():
    after = "stop() if world.rank == 2 else [world.fetch(1.0) for _ in range(30)]"
    assert_told(steps(3, hosts=("a", "a", "b"), after=after), "rank 2 on b")


def test_slow_ranks_and_idle_ones_are_no_failure():
    idle = f"time.sleep({2 * LIMIT}); world.send(np.ones(3, np.int32))"
    after = f"world.receive() if world.rank else exec('{idle}', globals(), locals())"
    ended = steps(3, victim=1, fault=f"time.sleep({LIMIT / 2})", after=after)
    assert ended.code == 0, ended.err


def test_divergence_is_named():
    ended = steps(4, diverged=2)
    assert_told(ended, "diverged by step 20", "rank 2 on ")
    assert "rank 1 on" not in ended.err


def test_the_limit_of_the_command_line():
    stories = shared("models", "stories260K", "stories260K-f32.gguf")
    arguments = ["generate", "-m", stories, "-p", "Once upon a time", "-c", 100000, "--ignore-eos", "--timeout", LIMIT]
    job = start(arguments, 3)
    assert job.stdout.read(20)
    os.kill(ranks_of(job, 3)[1], signal.SIGSTOP)
    ended = finish(job, 30)
    assert_told(ended, " of step ", "--timeout")
