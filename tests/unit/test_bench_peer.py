"""Comparing with llama.cpp (a stand-in for its package), and pictures of results."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mpillama.bench.peer import Peer, import_peer
from mpillama.bench.plan import Test
from mpillama.bench.plot import curves, import_matplotlib, plot, read_results
from mpillama.errors import ModelError, UsageError, UserError


class FakeLlama(ModuleType):
    """The functions of llama_cpp that are used; notes what is decoded, at which position, in which context."""

    __version__ = "9.9"

    def __init__(self, loads: bool = True, status: int = 0) -> None:
        super().__init__("llama_cpp")
        self.loads, self.status = loads, status
        self.n_past = 0
        self.decoded: list[tuple[int, int]] = []
        self.rows: list[tuple[int, int, bool]] = []
        self.contexts: list[Any] = []
        self.freed: list[str] = []
        self.affinity: set[int] = set()
        self.llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

    def llama_log_set(self, callback: Any, data: Any) -> None:
        callback(1, b"noise", None)

    def llama_backend_init(self) -> None: ...

    def llama_model_default_params(self) -> Any:
        return SimpleNamespace()

    def llama_model_load_from_file(self, path: bytes, params: Any) -> str | None:
        assert isinstance(path, bytes)
        self.affinity = os.sched_getaffinity(0)
        return "model" if self.loads else None

    def llama_model_get_vocab(self, model: str) -> str:
        return "vocab"

    def llama_vocab_n_tokens(self, vocab: str) -> int:
        return 32

    def llama_context_default_params(self) -> Any:
        return SimpleNamespace()

    def llama_init_from_model(self, model: str, params: Any) -> Any:
        self.contexts.append(params)
        self.n_past = 0
        return params

    def llama_get_memory(self, context: Any) -> Any:
        return context

    def llama_memory_seq_rm(self, memory: Any, sequence: int, start: int, stop: int) -> bool:
        assert stop == -1
        assert sequence < self.contexts[-1].n_seq_max
        assert start <= self.n_past
        self.n_past = start
        return True

    def llama_batch_get_one(self, tokens: Any, n: int) -> tuple[Any, int]:
        assert all(0 <= token < 32 for token in tokens)
        return tokens, n

    def llama_batch_init(self, n: int, n_embd: int, n_seq_max: int) -> Any:
        return SimpleNamespace(
            token=[0] * n, pos=[0] * n, n_seq_id=[0] * n, seq_id=[[0] for _ in range(n)], logits=[0] * n
        )

    def llama_batch_free(self, batch: Any) -> None:
        self.freed.append("batch")

    def llama_decode(self, context: Any, batch: Any) -> int:
        if isinstance(batch, SimpleNamespace):
            assert batch.n_tokens == len(batch.token) == sum(batch.n_seq_id)
            sequences = [ids[0] for ids in batch.seq_id]
            self.rows += list(zip(sequences, batch.pos, batch.logits, strict=True))
            self.n_past = max(batch.pos) + 1
            return self.status
        self.decoded.append((self.n_past, batch[1]))
        self.n_past += batch[1]
        return self.status

    def llama_synchronize(self, context: Any) -> None: ...

    def llama_free(self, context: Any) -> None:
        self.freed.append("context")

    def llama_model_free(self, model: str) -> None:
        self.freed.append("model")


@pytest.fixture
def fake(monkeypatch):
    library = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    return library


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UsageError, match="pip install llama-cpp-python"):
        import_peer()


def test_it_runs_the_same_tests(fake):
    cores = os.sched_getaffinity(0)
    one = {min(cores)}
    peer = Peer("m.gguf", 3, one)
    assert fake.affinity == one
    assert os.sched_getaffinity(0) == cores
    peer.prepare(200, 8, 4, "f16", "bf16")
    params = fake.contexts[0]
    assert (params.n_ctx, params.n_batch, params.n_ubatch) == (200, 8, 4)
    assert (params.type_k, params.type_v, params.n_threads, params.n_threads_batch) == (1, 30, 3, 3)
    assert peer.test(Test(20, 2), 8) > 0
    assert fake.decoded == [(0, 8), (8, 8), (16, 4), (20, 1), (21, 1)]


def test_sequences_together(fake):
    """They have the same positions, and logits are wanted where our own runs want them."""
    peer = Peer("m.gguf", 1, set())
    peer.prepare(200, 8, 8, "f16", "f16", 3)
    assert fake.contexts[0].n_seq_max == 3
    peer.test(Test(4, 2, n_depth=1, n_parallel=3), 8)
    depth = [(s, 0, True) for s in range(3)]
    prompt = [(s, 1 + i, i == 3) for s in range(3) for i in range(4)]
    assert fake.rows == [*depth, *prompt, *((s, 5 + i, True) for i in range(2) for s in range(3))]
    assert fake.freed.count("batch") == 5
    fake.rows.clear()
    peer.test(Test(0, 1, n_depth=1, n_parallel=3), 8)
    assert fake.rows == [(s, 1, True) for s in range(3)]


def test_the_depth_is_filled_once(fake):
    peer = Peer("m.gguf", 1, set())
    peer.prepare(200, 100, 100, "f16", "f16")
    peer.test(Test(0, 2, n_depth=50), 100, warmup=True)
    peer.test(Test(0, 2, n_depth=50), 100)
    peer.test(Test(0, 1, n_depth=70), 100)
    peer.test(Test(3, 0, n_depth=10), 100)
    expected = [(0, 50), (50, 1), (50, 1), (51, 1), (50, 20), (70, 1), (10, 3)]
    assert fake.decoded == expected
    peer.prepare(200, 100, 100, "f16", "f16")
    assert len(fake.contexts) == 1
    peer.prepare(200, 100, 100, "f32", "f16")
    peer.test(Test(0, 1, n_depth=5), 100)
    assert fake.decoded[len(expected) :] == [(0, 5), (5, 1)]
    peer.close()
    peer.close()
    assert fake.freed == ["context", "context", "model"]


def test_what_it_cannot_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", FakeLlama(loads=False))
    with pytest.raises(ModelError, match=r"llama.cpp \(9.9\) cannot load m.gguf"):
        Peer("m.gguf", 1, set())
    monkeypatch.setitem(sys.modules, "llama_cpp", FakeLlama(status=-3))
    peer = Peer("m.gguf", 1, set())
    peer.prepare(9, 9, 9, "f16", "f16")
    with pytest.raises(UserError, match="status -3"):
        peer.test(Test(4, 0), 9)


# -- pictures ----------------------------------------------------------------------------------------------------------


def row(test: str, avg_ts: float, n_ranks: int = 1, n_depth: int = 0, **more: Any) -> dict[str, Any]:
    found = {"test": test, "avg_ts": avg_ts, "stddev_ts": 0.5, "n_ranks": n_ranks, "n_depth": n_depth}
    return {**found, "n_threads": 1, "model_type": "m", "backends": "cpu", **more}


def test_curves_over_ranks_come_first():
    label, found = curves(
        [
            row("tg8", 20, 4, tensor_split="1/1/1/1"),
            row("tg8", 10, 1, tensor_split="1"),
            row("pp8", 99, 1),
            row("tg8 @ d64", 5, 1, 64),
        ]
    )
    assert label == "ranks"
    assert found == {
        "tg8, depth 0": [(1, 10, 0.5), (4, 20, 0.5)],
        "pp8, depth 0": [(1, 99, 0.5)],
        "tg8, depth 64": [(1, 5, 0.5)],
    }


def test_an_unequal_split_is_a_curve_of_its_own():
    rows = [row("tg8", 10, 1, tensor_split="1"), *(row("tg8", 9, 2, tensor_split=split) for split in ("1/1", "3/1"))]
    _, found = curves(rows)
    assert {name: [x for x, _, _ in points] for name, points in found.items()} == {
        "tg8, tensor_split equal": [1, 2],
        "tg8, tensor_split 3/1": [2],
    }


def test_curves_over_depth_and_of_the_peer():
    rows = [
        row("tg8 @ d64", 5, n_depth=64, peer="other", peer_avg_ts=4.0),
        row("tg8", 6, peer="other", peer_avg_ts=3.0),
    ]
    label, found = curves(rows)
    assert label == "tokens in the context"
    assert found == {"tg8": [(0, 6, 0.5), (64, 5, 0.5)], "tg8, other": [(0, 3.0, 0.0), (64, 4.0, 0.0)]}


def test_results_of_other_runs(tmp_path):
    rows = [row("tg8", 1.0), row("pp8", 2.0)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert read_results(tmp_path / "a.json") == read_results(tmp_path / "b.jsonl") == rows
    for text in ("", "[1]", '{"a": 1}', "nothing", '[{"avg_ts": 1}]'):
        (tmp_path / "c").write_text(text)
        if text:
            with pytest.raises(UsageError, match="not results of mpillama bench"):
                read_results(tmp_path / "c")
    with pytest.raises(UsageError, match="No such file"):
        read_results(tmp_path / "none")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'mpillama\[plot\]'"):
        import_matplotlib()


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot([row("tg8", 1.0, 1), row("tg8", 2.0, 2)], tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--plot"):
        plot([row("tg8", 1.0)], tmp_path / "no" / "f.png")
