"""Steps that are recorded and started again: the same bits as without, whatever comes between; also over NCCL."""

import ctypes
import functools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from test_golden import MODELS

from gpu_host import REAL, gpu_backend, needs_compiler, only_emulated, skip_without
from mpillama.backends.base import KV_BLOCK
from mpillama.backends.gpu.emulated import DeviceArray, EmulatedDevice
from mpillama.backends.reference import ReferenceBackend
from mpillama.comm.nccl import NcclGroup, meet
from mpillama.comm.threads import run_threads
from mpillama.engine.sequence import Sequence as TokenSequence
from mpillama.gguf.types import GGMLType
from mpillama.grid import Grid
from shared import shared
from step_cases import schedule
from tiny import nmse, open_runner, run_on, write_llama

pytestmark = needs_compiler
N_BLOCKS = 12
_TYPES = (GGMLType.F16, GGMLType.Q4_0, GGMLType.Q8_0)


@pytest.fixture(autouse=True)
def near_bounds(monkeypatch):
    """Let graphs serve up to 32, 64, 128 … tokens, and splits begin at 8 keys, so that short sequences cross bounds."""
    monkeypatch.setattr("mpillama.backends.gpu.inputs._LEAST_SEEN", KV_BLOCK)
    monkeypatch.setattr("mpillama.backends.gpu.attention._SPLIT_KEYS", 8)
    if REAL:
        skip_without("graphs", gpu_backend().device.can_capture)


def open_on(world, path, join=None, graphs=True, experts="off", kv_type="f16", **device):
    """Return a rank's runner on an emulated GPU."""
    make = functools.partial(gpu_backend, **device)
    n_ctx, weights = N_BLOCKS * KV_BLOCK, [1.0] * world.size
    return open_runner(world, path, weights, n_ctx, kv_type, make, experts=experts, join=join, graphs=graphs)[0]


def model(tmp_path, rng, experts, types=_TYPES):
    more = {"n_expert": 6, "n_expert_used": 2, "n_ff": 64} if experts else {}
    type = types[int(rng.integers(len(types)))]
    return write_llama(tmp_path / "m.gguf", rng, type, n_embd=128, n_head_dim=32, n_layer=1, **more)


@pytest.mark.parametrize("experts", [False, True])
def test_recorded_steps_give_the_same_bits(experts, tmp_path, rng, calls):
    path, batches = model(tmp_path, rng, experts), schedule(rng, 96, 60, N_BLOCKS, 40)

    def main(world):
        plain, recorded = open_on(world, path, graphs=False), open_on(world, path)
        expected = [plain.run(batch) for batch in batches]
        assert len(calls) == len(batches)
        return expected, [recorded.run(batch) for batch in batches]

    ((expected, got),) = run_threads(1, main)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.view("u4"), b.view("u4"))
    # What was not run as text was started from a graph.
    assert len(calls) < 1.9 * len(batches)


@pytest.mark.parametrize("name", MODELS)
def test_golden_logits_from_graphs(name, rng, calls):
    """A prompt, then token by token; the step of every architecture can be recorded."""
    reference = np.load(shared("golden", f"{name}.npz"))
    tokens = reference["tokens"].tolist()
    n_prompt = len(tokens) - 6

    def main(world):
        runner = open_on(world, shared("golden", f"{name}.gguf"), kv_type="f32", order=2)
        sequence = TokenSequence(tokens[:n_prompt], np.arange(runner.n_blocks)[::-1])
        runner.run(sequence.next_batch(1000))
        parts = []
        for token in tokens[n_prompt:]:
            sequence.tokens.append(token)
            parts.append(runner.run(sequence.next_batch(1)))
        return np.concatenate(parts)

    result = run_threads(1, main)[0]
    assert nmse(result, reference["logits"][n_prompt:]) <= 1e-6
    # The prompt, and for each bound that is met once as usual, and twice to be recorded.
    assert len(calls) <= 7


def test_stages_of_a_pipeline_record_their_part(tmp_path, rng, calls):
    path, tokens = (
        write_llama(tmp_path / "m.gguf", rng, n_embd=64, n_ff=64, n_head_dim=32),
        rng.integers(0, 96, 12).tolist(),
    )
    plain = run_on(path, tokens, [1.0], 1, make=ReferenceBackend)[0]
    calls.clear()
    staged_logits = run_on(path, tokens, [1.0] * 2, 1, make=gpu_backend, grid=Grid(tp=1, pp=2))
    np.testing.assert_allclose(staged_logits[0], plain, rtol=2e-4, atol=2e-4 * np.abs(plain).max())
    assert len(calls) == 6


class QueuedNccl:
    """A stand-in for NCCL, with ranks that are threads: its calls are work of the emulated devices, as on GPUs."""

    NCCL_FLOAT32, NCCL_SUM = 7, 0

    def __init__(self, devices):
        self._devices, self._slots = devices, [None] * len(devices)
        self._barrier = threading.Barrier(len(devices), timeout=60)

    def get_unique_id(self):
        return b"i" * 128

    def groupStart(self):  # noqa: N802
        pass

    groupEnd = groupStart  # noqa: N815

    def NcclCommunicator(self, n, name, rank):  # noqa: N802
        def exchange(mine, take):
            self._slots[rank] = mine
            self._barrier.wait()
            values = [value.copy() for value in self._slots]
            self._barrier.wait()
            mine[:] = take(values)

        def queue(pointer, count, take):
            mine = np.frombuffer((ctypes.c_float * count).from_address(pointer), np.float32)
            self._devices[rank].enqueue(lambda: exchange(mine, take))

        return SimpleNamespace(
            check_async_error=lambda: None,
            allReduce=lambda a, b, count, *_: queue(b, count, lambda values: np.sum(values, axis=0)),
            broadcast=lambda a, b, count, type, root, _: queue(b, count, lambda values: values[root]),
        )


@only_emulated
@pytest.mark.parametrize("experts", ["off", "on"])
def test_collectives_are_recorded_too(experts, tmp_path, rng, monkeypatch, calls):
    monkeypatch.setattr(DeviceArray, "data", property(lambda x: SimpleNamespace(ptr=x.ctypes.data)), raising=False)
    monkeypatch.setattr(EmulatedDevice, "stream", 1, raising=False)
    path, batches = model(tmp_path, rng, experts == "on"), schedule(rng, 96, 45, N_BLOCKS, 40)
    n_ranks = 2
    devices = [None] * n_ranks
    nccl = QueuedNccl(devices)

    def group(world, backend):
        devices[world.rank] = backend.device
        name = meet(world, [range(world.size)], nccl)
        return NcclGroup(nccl, backend, name, world.rank, world.size)

    def main(world, *options):
        runner = open_on(world, path, *options, experts=experts)
        return [runner.run(batch) for batch in batches]

    staged_logits = run_threads(n_ranks, main)
    assert len(calls) == n_ranks * len(batches)
    for logits in run_threads(n_ranks, lambda world: main(world, group)):
        for a, b in zip(logits, staged_logits[0], strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(calls) < 1.95 * n_ranks * len(batches)


@only_emulated
def test_what_cannot_be_recorded_is_an_error():
    device = EmulatedDevice()
    x, y = device.upload(np.ones((2, 2), "f4")), device.empty((2, 2))
    for work in (lambda: device.upload(np.ones(1)), lambda: device.download(x), lambda: device.gemm(x, x, y)):
        with pytest.raises(RuntimeError, match="while work is being recorded"):
            device.capture(work)
    # Copies are recorded, of what arrays hold when the graph is launched.
    graph, _ = device.capture(lambda: device.copy(y, x))
    device.write(x, np.array([[3, 1], [2, 5]], "f4"))
    graph.launch()
    assert device.download(y).tolist() == [[3, 1], [2, 5]]
