"""What every group and world must do, run by each implementation's own tests on each number of ranks."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mpillama.comm.base import World, check_agreement, from_root
from mpillama.errors import JobError, ModelError, PeerFailure
from mpillama.layout import Cut, split


def allreduce_sums_to_the_same_bits(world: World) -> None:
    group = world.group()
    assert (group.rank, group.size, group.leader) == (world.rank, world.size, world.rank == 0)
    rng = np.random.default_rng(5)
    for shape in ((1, 1), (3, 7), (17, 1000), (64, 4096), (0, 5)):
        shares = (rng.standard_normal((world.size, *shape)) * 10.0 ** rng.integers(-3, 3, (world.size, *shape))).astype(
            "f4"
        )
        total = group.allreduce(shares[world.rank].copy())
        assert total.dtype == np.float32
        np.testing.assert_allclose(total, shares.astype("f8").sum(axis=0), rtol=1e-5, atol=1e-5)
        bits = world.bcast(total.tobytes())
        assert bits == total.tobytes(), f"rank {world.rank} has another sum than rank 0"


def allreduce_takes_any_array(world: World) -> None:
    """Other types, views, and arrays that hold the sums of the call before; call after call."""
    group = world.group()
    rng = np.random.default_rng(7)
    for n in (1, 31, 32, 33, 4095, 4096, 4097, 70_001):
        for dtype, step in (("f4", 1), ("f8", 1), ("f4", 3), ("f2", 1)):
            shares = rng.integers(-50, 50, (world.size, n, step)).astype(dtype)
            mine = shares[world.rank][:, 0]
            expected = shares.astype("f8").sum(axis=0)[:, 0]
            total = group.allreduce(mine)
            assert total.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(total, expected)
            np.testing.assert_array_equal(group.allreduce(total), expected * world.size)
    held = group.allreduce(np.ones(5, "f4"))
    group.allreduce(np.full(5, 9, "f4"))
    np.testing.assert_array_equal(held, np.full(5, world.size))


def many_small_collectives_keep_their_order(world: World) -> None:
    """Ranks that are early and late by turns, and sums and joins in turn, of sizes that go in one piece or in many."""
    group = world.group()
    rng = np.random.default_rng(8)
    cut = split(1000, [1.0] * world.size)
    start, stop = cut.ranges[world.rank]
    for i in range(150):
        n = int(rng.choice([1, 100, 5000, 20_000], p=[0.5, 0.4, 0.08, 0.02]))
        if int(rng.integers(10)) == world.rank:
            time.sleep(0.002)
        total = group.allreduce(np.full(n, i + world.rank, "f4"))
        assert (total == i * world.size + world.size * (world.size - 1) // 2).all(), i
        if i % 3 == 0:
            whole = np.arange(1000, dtype="f4")[None] + i
            np.testing.assert_array_equal(group.allgather(whole[:, start:stop], cut), whole)


def allgather_joins_uneven_slices(world: World) -> None:
    group = world.group()
    rng = np.random.default_rng(6)
    for size, weights in ((7, [1.0] * world.size), (100, list(range(world.size, 0, -1))), (1, [1.0] * world.size)):
        cut = split(size, weights)
        for n_rows in (1, 5, 0):
            whole = rng.standard_normal((n_rows, size)).astype("f4")
            start, stop = cut.ranges[world.rank]
            np.testing.assert_array_equal(group.allgather(whole[:, start:stop], cut), whole)
    empty = Cut(4, ((0, 4), *[(4, 4)] * (world.size - 1)))
    whole = np.arange(8, dtype="f4").reshape(2, 4)
    start, stop = empty.ranges[world.rank]
    np.testing.assert_array_equal(group.allgather(whole[:, start:stop], empty), whole)


def allgather_joins_more_than_fits_at_once(world: World) -> None:
    group = world.group()
    rng = np.random.default_rng(9)
    for shape, weights in (((3, 40_007), [1.0] * world.size), ((2, 5, 9_001), list(range(1, world.size + 1)))):
        cut = split(shape[-1], weights)
        whole = rng.integers(0, 1 << 30, shape, dtype=np.int32)
        start, stop = cut.ranges[world.rank]
        np.testing.assert_array_equal(group.allgather(whole[..., start:stop], cut), whole)


def disagreement_is_found_by_all(world: World) -> None:
    world.watch.begin_step()
    check_agreement(world, (1 << 64) - 3)
    if world.size > 1:
        with pytest.raises(JobError, match=f"rank {world.size - 1} on ") as caught:
            check_agreement(world, int(world.rank == world.size - 1))
        assert caught.value.told
        assert "rank 0 on" not in str(caught.value)
    check_agreement(world, 0)


def messages_of_any_length_arrive_in_order(world: World) -> None:
    for n in (1, 2, 1022, 1023, 1024, 1025, 50_000, 3):
        message = np.arange(n, dtype=np.int32) - 1
        if world.rank == 0:
            world.send(message)
        else:
            np.testing.assert_array_equal(world.receive(), message)


def waiting_costs_no_core(world: World) -> None:
    """A rank that waits a second for a message must not compute meanwhile."""
    if world.rank == 0:
        time.sleep(1.0)
        world.send(np.zeros(3, np.int32))
    else:
        began = time.thread_time()
        world.receive()
        assert time.thread_time() - began < 0.25


def objects_reach_everyone(world: World) -> None:
    value = {"size": world.size, "array": np.arange(3)} if world.rank == 0 else None
    assert world.bcast(value)["size"] == world.size
    ranks = world.gather(world.rank)
    assert ranks == (list(range(world.size)) if world.rank == 0 else [])
    assert len(world.hosts) == world.size
    assert 0 <= world.local_rank < world.local_size <= world.size


def progress_adds_up(world: World) -> None:
    for _ in range(10):
        world.report(3)
    world.bcast(None)
    if world.rank == 0:
        total, began = 0, time.monotonic()
        while total < 30 * (world.size - 1) and time.monotonic() - began < 10:
            total += world.reported()
        assert total == 30 * (world.size - 1)
    world.bcast(None)


def an_error_of_rank_0_reaches_everyone(world: World) -> None:
    def fail() -> int:
        raise ModelError("no such model")

    with pytest.raises(ModelError if world.rank == 0 else PeerFailure) as caught:
        from_root(world, fail)
    assert caught.value.told
    assert caught.value.exit_code == ModelError.exit_code
    assert from_root(world, lambda: 7) == 7


def parts_of_the_world_are_groups(world: World) -> None:
    n_lower = max(1, world.size // 2)
    ranks = range(n_lower) if world.rank < n_lower else range(n_lower, world.size)
    group = world.group(ranks)
    assert (group.rank, group.size) == (world.rank - ranks[0], len(ranks))
    assert group.leader == (world.rank == ranks[0])
    total = group.allreduce(np.full((2, 3), 10.0**world.rank, "f4"))
    np.testing.assert_array_equal(total, np.full((2, 3), sum(10.0**rank for rank in ranks), "f4"))
    cut = split(5, [1.0] * group.size)
    start, stop = cut.ranges[group.rank]
    whole = np.arange(10, dtype="f4").reshape(2, 5) + 100 * ranks[0]
    np.testing.assert_array_equal(group.allgather(whole[:, start:stop], cut), whole)


def links_keep_the_order_of_arrays_of_any_size(world: World) -> None:
    if world.size == 1:
        return
    after, before = world.link((world.rank + 1) % world.size), world.link((world.rank - 1) % world.size)
    shapes = [(1, 1), (3, 7), (512, 2048), (0, 5), (1, 4096)]
    for number, shape in enumerate(shapes):
        arrival = before.expect(shape)
        after.send(np.full(shape, 10 * world.rank + number, "f4"))
        got = arrival.wait()
        assert (got.shape, got.dtype) == (shape, np.float32)
        assert (got == 10 * ((world.rank - 1) % world.size) + number).all()


def a_sender_does_not_wait_for_a_busy_partner(world: World) -> None:
    x = np.arange(2_000_000, dtype="f4").reshape(1000, 2000)
    for first in range(0, world.size - 1, 2):
        if world.rank == first:
            began = time.monotonic()
            world.link(first + 1).send(x)
            assert time.monotonic() - began < 0.4
        elif world.rank == first + 1:
            time.sleep(0.6)
            np.testing.assert_array_equal(world.link(first).receive((1000, 2000)), x)
    world.bcast(None)


def couriers_carry_bytes_between_all_ranks(world: World) -> None:
    """Of any size, shorter than expected ones and empty ones too, in order for each pair; and again with another."""
    if world.size == 1:
        return
    for n in (1, 70_001):
        courier = world.courier()
        others = [rank for rank in range(world.size) if rank != world.rank]
        sizes = [n, 0, max(1, n // 3), 2 * n]

        def data(source: int, target: int, i: int, sizes: list[int] = sizes) -> np.ndarray:
            return np.random.default_rng([source, target, i]).integers(0, 256, sizes[i], dtype=np.uint8)

        for i in range(len(sizes)):
            for rank in others:
                courier.send(rank, data(world.rank, rank, i))
        courier.progress()
        for rank in others:
            for i, size in enumerate(sizes):
                out = np.zeros(2 * n, np.uint8)
                assert courier.receive(rank, out) == size
                np.testing.assert_array_equal(out[:size], data(rank, world.rank, i))
                assert not out[size:].any()
        courier.flush()
        courier.close()


def parts_of_the_world_are_teams(world: World) -> None:
    """Each with messages, groups and links of its own, whatever the others do meanwhile."""
    n_lower = max(1, world.size // 2)
    ranks = range(n_lower) if world.rank < n_lower else range(n_lower, world.size)
    team = world.part(ranks)
    assert (team.rank, team.size) == (world.rank - ranks[0], len(ranks))
    assert team.job_ranks == tuple(ranks)
    assert team.hosts == tuple(world.hosts[rank] for rank in ranks)
    for _ in range(1 + ranks[0]):  # one team has more to say than the other
        assert team.bcast(world.rank) == ranks[0]
        assert team.gather(world.rank) == (list(ranks) if team.rank == 0 else [])
        assert team.agree(world.rank) == list(ranks)
        if team.rank == 0 and team.size > 1:
            team.send(np.arange(5, dtype=np.int32))
        elif team.size > 1:
            np.testing.assert_array_equal(team.receive(), np.arange(5))
        total = team.group().allreduce(np.full((2, 3), 10.0**world.rank, "f4"))
        np.testing.assert_array_equal(total, np.full((2, 3), sum(10.0**rank for rank in ranks), "f4"))
    if team.size > 1:
        after, before = team.link((team.rank + 1) % team.size), team.link((team.rank - 1) % team.size)
        arrival = before.expect((3, 1))
        after.send(np.full((3, 1), world.rank, "f4"))
        assert (arrival.wait() == ranks[team.rank - 1]).all()
        with pytest.raises(JobError, match=f"rank {ranks[-1]} on "):
            check_agreement(team, int(team.rank == team.size - 1))
    world.bcast(None)


def what_is_posted_arrives_in_order(world: World) -> None:
    if world.size == 1:
        assert world.fetch() == []
        return
    sizes = [1, 300_000, 10, 5_000_000, 2]
    if world.rank:
        for i, size in enumerate(sizes):
            world.post(0, (i, bytes(size)))
        while not (answer := world.fetch(1.0)):
            pass
        assert answer == [(0, {"rank": world.rank})]
    else:
        came: dict[int, list[tuple[int, bytes]]] = {rank: [] for rank in range(1, world.size)}
        while any(len(values) < len(sizes) for values in came.values()):
            for source, value in world.fetch(1.0):
                came[source].append(value)
        for rank, values in came.items():
            assert [(i, len(data)) for i, data in values] == list(enumerate(sizes))
            world.post(rank, {"rank": rank})
    world.bcast(None)


def waiting_for_mail_costs_no_core(world: World) -> None:
    began, busy = time.monotonic(), time.thread_time()
    assert world.fetch(0.5) == []
    assert time.monotonic() - began > 0.4 or world.size == 1
    assert time.thread_time() - busy < 0.15
    world.bcast(None)


CONTRACT = (
    couriers_carry_bytes_between_all_ranks,
    parts_of_the_world_are_teams,
    what_is_posted_arrives_in_order,
    waiting_for_mail_costs_no_core,
    parts_of_the_world_are_groups,
    links_keep_the_order_of_arrays_of_any_size,
    a_sender_does_not_wait_for_a_busy_partner,
    allreduce_sums_to_the_same_bits,
    allreduce_takes_any_array,
    many_small_collectives_keep_their_order,
    allgather_joins_uneven_slices,
    allgather_joins_more_than_fits_at_once,
    disagreement_is_found_by_all,
    messages_of_any_length_arrive_in_order,
    waiting_costs_no_core,
    objects_reach_everyone,
    progress_adds_up,
    an_error_of_rank_0_reaches_everyone,
)
