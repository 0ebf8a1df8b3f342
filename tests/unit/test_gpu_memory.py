"""What a step needs of a GPU's memory, next to what is said of it before anything is loaded."""

import weakref

import numpy as np
import pytest

from gpu_host import gpu_backend, needs_compiler, only_emulated
from mpillama.backends.base import KV_BLOCK
from mpillama.backends.gpu import backend as backend_module
from mpillama.backends.gpu.emulated import EmulatedDevice
from mpillama.comm.threads import run_threads
from mpillama.engine.sequence import Sequence as TokenSequence
from mpillama.gguf.types import GGMLType
from tiny import open_runner, write_llama

pytestmark = [needs_compiler, only_emulated]


@pytest.fixture
def in_use(monkeypatch):
    """The bytes of arrays now, and at most."""
    use = {"now": 0, "most": 0}
    empty = EmulatedDevice.empty

    def count(n):
        use["now"] += n
        use["most"] = max(use["most"], use["now"])

    def counted(self, *args):
        out = empty(self, *args)
        count(out.nbytes)
        weakref.finalize(out, count, -out.nbytes)
        return out

    monkeypatch.setattr(EmulatedDevice, "empty", counted)
    return use


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("way", ["tiles", "matrix units", "library"])
def test_a_step_needs_no_more_than_is_said(experts, way, rng, tmp_path, monkeypatch, in_use):
    monkeypatch.setattr(backend_module, "_LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(backend_module, "_BLAS_BYTES", 0)
    monkeypatch.setattr("mpillama.backends.gpu.matmul.GEMM_ELEMENTS", 1024)
    n_tokens = int(rng.integers(100, 200))
    sizes = {"n_embd": 256, "n_ff": 32 * int(rng.integers(2, 40)), "n_vocab": int(rng.integers(90, 500)), "n_layer": 2}
    if experts:
        sizes |= {"n_expert": 4, "n_expert_used": int(rng.integers(1, 4))}
    path = write_llama(tmp_path / "m.gguf", rng, GGMLType.Q8_0, **sizes)
    how = {"tiles": {}, "matrix units": {"matrix_units": True}, "library": {"gemm_tokens": 9}}[way]

    def main(world):
        runner, _ = open_runner(world, path, [1.0], 256, make=lambda: gpu_backend(**how))
        before = in_use["most"] = in_use["now"]
        sequence = TokenSequence(rng.integers(0, 90, n_tokens).tolist(), np.arange(256 // KV_BLOCK))
        runner.run(sequence.next_batch(1000))
        return in_use["most"] - before, runner._ops.backend.work_bytes(runner.cfg, n_tokens, 1)

    ((used, said),) = run_threads(1, main)
    assert used <= said < 3 * used
