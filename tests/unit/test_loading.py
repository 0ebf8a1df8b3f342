"""From flags to loading: who reads, how large a context fits, and what is said of it."""

import os
import time
from argparse import Namespace

import numpy as np
import pytest

from mpillama.backends.base import KV_BLOCK
from mpillama.cli import loading, memory
from mpillama.cli.loading import choose_loading
from mpillama.cli.main import main
from mpillama.cli.memory import WORKSPACE, fit_memory, least_context
from mpillama.comm.solo import SoloWorld
from mpillama.comm.threads import run_threads
from mpillama.errors import PeerFailure, UsageError, UserError
from mpillama.gguf.types import GGMLType
from tiny import write_llama

MIB = 1 << 20


@pytest.mark.parametrize(
    ("wanted", "hosts", "types", "virtual", "expected"),
    [
        ("auto", "aabb", {"m": "lustre"}, False, "bcast"),
        ("auto", "aabb", {"m": "xfs", "n": "nfs4"}, False, "bcast"),
        ("auto", "aabb", {"m": "xfs"}, False, "direct"),
        ("auto", "aaaa", {"m": "lustre"}, False, "direct"),
        ("auto", "aabb", {"m": "lustre"}, True, "direct"),
        ("bcast", "aaaa", {"m": "xfs"}, False, "bcast"),
        ("direct", "aabb", {"m": "lustre"}, False, "direct"),
    ],
)
def test_who_reads(wanted, hosts, types, virtual, expected, monkeypatch):
    monkeypatch.setattr(loading, "file_system", lambda path: (types[path.name], "/"))

    def chosen(world):
        world.hosts = tuple(hosts)
        return choose_loading(wanted, world, list(types), virtual)

    assert run_threads(4, chosen) == [expected] * 4
    assert choose_loading(wanted, SoloWorld(), list(types), virtual) == "direct"


def test_virtual_ranks_read_for_themselves():
    def refused(world):
        with pytest.raises(PeerFailure if world.rank else UsageError):
            choose_loading("bcast", world, ["m"], True)

    run_threads(2, refused)


@pytest.mark.parametrize(
    ("fit", "ctx_size", "least"),
    [(None, 0, 4096), (None, 9000, 9000), ("on", 9000, 4096), ("off", 0, 9000), ("off", 9000, 9000)],
)
def test_least_context(fit, ctx_size, least):
    args = Namespace(fit=fit, ctx_size=ctx_size, fit_ctx=4096)
    assert least_context(args, 9000) == least
    assert least_context(args, 9000, 5000) == max(least, 5000)
    assert least_context(args, 300, 200) == 300


def test_the_context_fits_everywhere(rng):
    """Of hosts and GPUs of random sizes: what is granted fits on each, and what is refused names what would fit."""
    weights = rng.integers(1, 400, 4) * MIB
    kv = rng.integers(1, 300, 4) * MIB
    rooms = rng.integers(200, 2000, 4) * MIB
    n_kv = 10_000

    def fits(n):
        used = weights + WORKSPACE + kv * n / n_kv
        host = used[0] + used[2] <= min(rooms[0], rooms[2])
        return bool(host and used[1] <= rooms[1] and used[3] <= rooms[3])

    def ask(n_kv_min):
        def one(world):
            world.hosts = ("a", "b", "a", "b")
            own = int(rooms[world.rank]) if world.rank in (1, 3) else 0
            try:
                return fit_memory(world, weights.tolist(), kv.tolist(), n_kv, n_kv_min, own)
            except UserError as error:
                return error.line

        return run_threads(4, one)

    real, memory.available_memory = memory.available_memory, lambda: int(min(rooms[0], rooms[2]))
    try:
        granted, refused = ask(1), ask(n_kv)
    finally:
        memory.available_memory = real
    assert len(set(granted)) == len(set(refused)) == 1
    if fits(n_kv):
        assert granted[0] == refused[0] == n_kv
        return
    *_, largest = refused[0].rpartition("-c ")
    if largest.isdigit():
        assert int(largest) % KV_BLOCK == 0
        assert fits(int(largest) - 1)
        assert not fits(int(largest) + 2 * KV_BLOCK)
    else:
        assert not fits(2 * KV_BLOCK)
    if not isinstance(granted[0], str):
        assert 1 <= granted[0] <= int(largest)


@pytest.fixture
def model(tmp_path, rng):
    return write_llama(tmp_path / "m.gguf", rng, GGMLType.Q8_0, n_layer=8)


def run(model, *flags):
    return main(["logits", "-m", str(model), "--tokens", "1,2,3", "--out", str(model.with_name("o.npy")), *flags])


def test_fit_flag(model, monkeypatch, capsys):
    """Room for a context of about 100 tokens, where the model was trained with 128."""
    per_token = 8 * 2 * 2 * 64 * 2
    monkeypatch.setattr(memory, "available_memory", lambda: WORKSPACE + model.stat().st_size + 100 * per_token)
    monkeypatch.setattr(memory, "_OWN_CHOICE", 1.0)
    assert run(model, "-fitc", "32") == 0
    assert capsys.readouterr().err == ""
    assert run(model, "-fitc", "32", "-v") == 0
    assert "the memory holds a context of 96 tokens, where 128 were asked for" in capsys.readouterr().err
    assert run(model, "-fitc", "32", "-c", "4096", "--fit", "on") == 0
    assert "the memory holds a context of 96 tokens, where 4096 were asked for" in capsys.readouterr().err
    for flags in (["-c", "4096"], ["--fit", "off"], ["-fitc", "128"]):
        assert run(model, *flags) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.endswith("the largest context that fits is -c 96\n")


def test_a_read_that_hangs_is_named_with_rank_and_host(model, monkeypatch, capsys):
    pread, said, end = os.preadv, [], time.monotonic() + 20

    def preadv(fd, views, offset):
        while not said and offset > 20_000 and time.monotonic() < end:
            said.extend(capsys.readouterr().err.splitlines())
        return pread(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr("mpillama.reading.PATIENCE", 0.05)
    assert run(model) == 0
    host = SoloWorld().hosts[0]
    assert said[0].startswith(f"mpillama: rank 0 on {host}: has been waiting for 0 s to read ")
    assert f" of {model} at offset " in said[0]
    assert np.isfinite(np.load(model.with_name("o.npy"))).all()
