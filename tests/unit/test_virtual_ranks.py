"""Virtual ranks: the same bits on however many processes, and the logits of a run without them."""

import numpy as np
import pytest

from comm_contract import CONTRACT
from mpillama.backends.cpu.backend import CpuBackend
from mpillama.backends.reference import ReferenceBackend
from mpillama.comm.threads import ThreadWorld, run_threads
from mpillama.comm.virtual import Crew
from mpillama.gguf.types import GGMLType
from mpillama.runner import VirtualRunner
from shared_ranks import run_shared
from tiny import logits_of, nmse, open_runner, run_on, write_llama

BACKENDS = {"reference": ReferenceBackend, "cpu": lambda: CpuBackend(1)}


class VirtualWorld:
    """A virtual rank's world, as far as loading a model needs it."""

    def __init__(self, group):
        self._group, self.rank, self.size = group, group.rank, group.size

    def group(self, ranks=None):
        return self._group


def logits_on(counts, path, tokens, make, chunk):
    """Return the logits of the first process of so many with so many virtual ranks each."""

    def main(world):
        crew = Crew(world.group(), counts)
        worlds = [VirtualWorld(group) for group in crew.groups()]
        runners = [open_runner(w, path, [1.0] * crew.size, make=make)[0] for w in worlds]
        return logits_of(VirtualRunner(runners, crew), tokens, chunk)

    return run_shared([list(range(len(counts)))], main)[0]


@pytest.mark.parametrize("type", [GGMLType.Q4_0, GGMLType.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_on_any_number_of_processes(backend, type, tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, type, n_head=12, n_head_kv=4, n_ff=768)
    tokens = rng.integers(0, 96, 15).tolist()
    make = BACKENDS[backend]
    alone = logits_on([6], path, tokens, make, 7)
    assert nmse(alone, run_on(path, tokens, [1.0], 7, make=make)[0]) < (1e-3 if backend == "cpu" else 1e-9)
    for counts in ([3, 3], [2, 2, 2], [1, 2, 2, 1]):
        assert logits_on(counts, path, tokens, make, 7).tobytes() == alone.tobytes(), counts


@pytest.mark.parametrize("counts", [[4], [2, 1], [1, 1, 3]])
@pytest.mark.parametrize("check", [c for c in CONTRACT if c.__name__.startswith(("all", "many"))])
def test_contract(check, counts):
    class World(ThreadWorld):
        def group(self, ranks=None):
            return self.virtual

    def main(world):
        crew = Crew(world.group(), counts)
        groups = crew.groups()

        def body(inner):
            mine = World(inner._board, inner.rank)
            mine.rank, mine.size, mine.virtual = groups[inner.rank].rank, crew.size, groups[inner.rank]
            mine.bcast = lambda value: everyone(mine, value)
            check(mine)

        def everyone(mine, value):
            data = np.frombuffer(value, np.uint8)
            return groups[mine.rank - crew.first].allreduce(data * np.uint8(mine.rank == 0)).tobytes()

        run_threads(len(groups), body)

    run_threads(len(counts), main)


def test_a_failing_virtual_rank_ends_the_run():
    class Ill:
        cfg, n_blocks = None, 1

        def __init__(self, group, ill):
            self.group, self.ill = group, ill

        def run(self, batch):
            if self.ill:
                raise ValueError("ill")
            return self.group.allreduce(np.ones(3, "f4"))

    crew = Crew(run_threads(1, lambda world: world.group())[0], [3])
    runner = VirtualRunner([Ill(group, group.rank == 1) for group in crew.groups()], crew)
    with pytest.raises(ValueError, match="ill"):
        runner.run(None)
