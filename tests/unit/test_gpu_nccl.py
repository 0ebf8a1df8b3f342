"""The NCCL group against a stand-in for NCCL whose ranks are threads: the contract, and failures at each stage."""

import ctypes
import threading

import numpy as np
import pytest

import fake_cupy
from comm_contract import allgather_joins_uneven_slices, allreduce_sums_to_the_same_bits
from mpillama.comm.nccl import Collectives, IslandGroup, NcclGroup, device_group, islands_of, meet
from mpillama.comm.solo import SoloWorld
from mpillama.comm.staged import StagedGroup
from mpillama.comm.threads import run_threads
from mpillama.errors import JobError, PeerFailure, UserError


class FakeNccl:
    """What CuPy's module offers, for threads of one process."""

    NCCL_FLOAT32, NCCL_FLOAT16, NCCL_BFLOAT16, NCCL_SUM = 7, 6, 9, 0
    version = 23203

    def __init__(self, size, fail_id=False, fail_join=(), fail_call=()):
        self.size, self.fail_id, self.fail_join, self.fail_call = size, fail_id, fail_join, fail_call
        self.barrier = threading.Barrier(size, timeout=20)
        self.slots = [None] * size
        nccl = self

        class NcclCommunicator:
            def __init__(self, n, name, rank):
                assert (n, name) == (nccl.size, b"i" * 128)
                if rank in nccl.fail_join:
                    raise RuntimeError("NCCL_ERROR_UNHANDLED_CUDA_ERROR: unhandled cuda error")
                self.rank = rank

            def check_async_error(self):
                if self.rank in nccl.fail_call:
                    raise RuntimeError("NCCL_ERROR_REMOTE_ERROR: remote process exited")

            def _exchange(self, value):
                nccl.slots[self.rank] = value
                nccl.barrier.wait()
                values = [value.copy() for value in nccl.slots]
                nccl.barrier.wait()
                return values

            def allReduce(self, send, receive, count, type, op, stream):  # noqa: N802
                assert (type, op, stream) == (7, 0, 99)
                values = self._exchange(_floats(send, count))
                _floats(receive, count)[:] = np.sum(values, axis=0, dtype=np.float32)

            def broadcast(self, send, receive, count, type, root, stream):
                assert (type, stream) == (7, 99)
                values = self._exchange(_floats(send, count))
                _floats(receive, count)[:] = values[root]

        self.NcclCommunicator = NcclCommunicator

    def get_version(self):
        return self.version

    def get_unique_id(self):
        if self.fail_id:
            raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: no interface")
        return b"i" * 128

    def groupStart(self):  # noqa: N802
        pass

    def groupEnd(self):  # noqa: N802
        pass


def _floats(ptr, count):
    return np.frombuffer((ctypes.c_float * count).from_address(ptr), np.float32)


class Memory:
    stream = 99

    def empty(self, shape):
        return np.full(shape, np.nan, np.float32).view(fake_cupy.Array)


class Backend:
    host_arrays = False

    def __init__(self, name="cuda"):
        self.name, self.device = name, Memory()

    def asarray(self, x):
        return x

    to_host = asarray

    def join(self, parts):
        return np.concatenate(parts, axis=-1)


def join(world, nccl):
    """Return the group of all ranks."""
    name = meet(world, [range(world.size)], nccl)
    return NcclGroup(nccl, Backend(), name, world.rank, world.size)


class OnGpu:
    """A world whose group takes arrays of the host and hands them to another group as those of the device."""

    def __init__(self, world, group):
        self._group = group
        self.rank, self.size, self.leader = self._group.rank, self._group.size, self._group.leader
        self.bcast = world.bcast

    def group(self):
        return self

    def allreduce(self, x):
        return np.array(self._group.allreduce(np.array(x).view(fake_cupy.Array)), subok=False)

    def allgather(self, x, cut):
        return np.array(self._group.allgather(np.array(x).view(fake_cupy.Array), cut), subok=False)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("check", [allreduce_sums_to_the_same_bits, allgather_joins_uneven_slices])
def test_contract(check, n_ranks):
    nccl = FakeNccl(n_ranks)
    run_threads(n_ranks, lambda world: check(OnGpu(world, join(world, nccl))))


def test_rank_0_cannot_begin_and_nobody_waits():
    nccl = FakeNccl(3, fail_id=True)

    def main(world):
        with pytest.raises(UserError if world.rank == 0 else PeerFailure) as caught:
            join(world, nccl)
        assert caught.value.told
        if world.rank == 0:
            said = "NCCL cannot begin: NCCL_ERROR_SYSTEM_ERROR: no interface; run with"
            assert caught.value.line.startswith(f"rank 0 on {world.hosts[0]}: {said}")

    run_threads(3, main)


def test_a_rank_that_cannot_join_says_so_at_once():
    nccl = FakeNccl(3, fail_join=(1,))

    def main(world):
        if world.rank != 1:
            join(world, nccl)
            return
        with pytest.raises(UserError, match="NCCL cannot join the GPUs: NCCL_ERROR_UNHANDLED_CUDA_ERROR") as caught:
            join(world, nccl)
        # Not told: the program ends the others, which may wait inside of NCCL.
        assert not caught.value.told

    run_threads(3, main)


def test_an_error_while_running_names_the_call():
    nccl = FakeNccl(2, fail_call=(0, 1))

    def main(world):
        group = join(world, nccl)
        with pytest.raises(JobError, match="NCCL failed in allReduce: NCCL_ERROR_REMOTE_ERROR"):
            group.allreduce(Memory().empty((3,)))

    run_threads(2, main)


@pytest.mark.parametrize(
    ("having", "by_host", "kind"), [({0, 1}, False, NcclGroup), ({0}, False, StagedGroup), ({0, 1}, True, StagedGroup)]
)
def test_all_ranks_choose_alike(having, by_host, kind, monkeypatch):
    nccl, here = FakeNccl(2), threading.local()
    monkeypatch.setattr("mpillama.comm.nccl.load_nccl", lambda: nccl if here.rank in having else None)

    def main(world):
        here.rank = world.rank
        return type(device_group(world, Backend(), Collectives("host" if by_host else "auto")))

    assert run_threads(2, main) == [kind] * 2
    assert type(device_group(SoloWorld(), Backend(), Collectives())) is StagedGroup


@pytest.mark.parametrize(
    ("names", "gpus", "kind"),
    [
        (("cuda", "cuda"), ("a", "b"), NcclGroup),
        (("cuda", "cuda"), ("a", "a"), StagedGroup),
        (("cuda", "hip"), ("a", "b"), StagedGroup),
        (("emulated", "cuda"), ("", "a"), StagedGroup),
    ],
)
def test_nccl_joins_only_different_gpus_of_one_maker(names, gpus, kind, monkeypatch):
    nccl = FakeNccl(2)
    monkeypatch.setattr("mpillama.comm.nccl.load_nccl", lambda: nccl)

    def main(world):
        return type(device_group(world, Backend(names[world.rank]), Collectives(), gpus[world.rank]))

    assert run_threads(2, main) == [kind] * 2


def test_different_versions_are_told_once(monkeypatch):
    libraries, here = [FakeNccl(3) for _ in range(3)], threading.local()
    libraries[2].version = 22703
    monkeypatch.setattr("mpillama.comm.nccl.load_nccl", lambda: libraries[here.rank])

    def main(world):
        here.rank = world.rank
        with pytest.raises(PeerFailure if world.rank else UserError) as caught:
            device_group(world, Backend(), Collectives(), str(world.rank))
        assert caught.value.line.startswith("rank 0 has NCCL 2.32.3, but rank 2 on threads 2.27.3: install the same")

    run_threads(3, main)


@pytest.mark.parametrize(
    ("how", "names", "words"),
    [
        (Collectives(wire="bf16"), ("cuda", "hip"), "--wire bf16 needs NCCL between all ranks"),
        (Collectives("host", "f16"), ("cuda", "cuda"), "--wire f16 needs NCCL between all ranks"),
        (Collectives("mpi"), ("cuda", "cpu"), "all ranks need a GPU"),
        (Collectives("mpi"), ("cuda", "cuda"), "needs ranks that MPI has started"),
    ],
)
def test_what_cannot_be_is_refused(how, names, words, monkeypatch):
    nccl = FakeNccl(2)
    monkeypatch.setattr("mpillama.comm.nccl.load_nccl", lambda: nccl)

    def main(world):
        with pytest.raises(UserError, match=words):
            device_group(world, Backend(names[world.rank]), how, str(world.rank))

    run_threads(2, main)


def test_islands():
    cuda, hip, none = ("cuda", "a"), ("hip", "a"), ("", "a")
    assert islands_of([(*cuda, "0"), (*cuda, "1")]) == [[0, 1]]
    assert islands_of([(*cuda, "0"), ("cuda", "b", "0"), ("cuda", "b", "1")]) == [[0, 1, 2]]
    assert islands_of([(*cuda, "0"), (*none, ""), ("cuda", "b", "0"), ("cuda", "b", "1")]) == [[2, 3]]
    assert islands_of([(*hip, "0"), (*cuda, "0"), (*hip, "1"), (*cuda, "1")]) == [[0, 2], [1, 3]]
    assert islands_of([(*cuda, "0"), (*cuda, "0"), (*hip, "0")]) == []
    assert islands_of([(*none, "")]) == []


def on_islands(world, kinds):
    """Return the group of ranks of these kinds."""
    backend = Backend(kinds[world.rank])
    backend.asarray = lambda x: np.array(x).view(fake_cupy.Array)
    backend.to_host = lambda x: np.array(x, subok=False)
    group = device_group(world, backend, Collectives(), str(world.rank))
    assert isinstance(group, IslandGroup)
    return group


@pytest.mark.parametrize("kinds", [("cuda", "cuda", "cpu"), ("cpu", "hip", "cuda", "hip", "cuda", "cuda")])
@pytest.mark.parametrize("check", [allreduce_sums_to_the_same_bits, allgather_joins_uneven_slices])
def test_contract_of_islands(check, kinds, monkeypatch):
    libraries, here = {kind: FakeNccl(kinds.count(kind)) for kind in kinds}, threading.local()
    monkeypatch.setattr("mpillama.comm.nccl.load_nccl", lambda: libraries[here.kind])

    def main(world):
        here.kind = kinds[world.rank]
        return check(OnGpu(world, on_islands(world, kinds)))

    run_threads(len(kinds), main)
