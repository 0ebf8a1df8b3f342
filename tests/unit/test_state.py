"""KV in files: saved on some ranks, restored on others, and refused when anything is wrong with a file."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil

import pytest

from mpillama.backends import make_backend
from mpillama.backends.reference import ReferenceBackend
from mpillama.comm.threads import run_threads
from mpillama.config import read_config
from mpillama.engine.engine import Engine
from mpillama.engine.request import Request, RequestParams
from mpillama.engine.sampling.params import SamplingParams
from mpillama.errors import UserError
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import GGMLType
from mpillama.sharding import Sharding
from mpillama.state.file import KVShape
from mpillama.state.identity import model_identity
from mpillama.state.sequence import KVPlace, States
from mpillama.steps import Leader, follow
from mpillama.tensors import model_tensors
from tiny import open_runner, write_llama

N_CTX = 256
SIZES = {"n_embd": 96, "n_head": 6, "n_head_kv": 2, "n_head_dim": 32, "n_ff": 64, "n_layer": 3}


def on(path, shares, kv_type, work, make=ReferenceBackend, identity="model"):
    """Return what ``work(engine, states)`` gives on rank 0 of as many ranks as there are shares."""

    def main(world):
        runner, _ = open_runner(world, path, shares, N_CTX, kv_type, make)
        if world.rank:
            return follow(world, runner)
        leader, cfg = Leader(world, runner), runner.cfg
        shape = KVShape(identity, kv_type, kv_type, cfg.n_layer, cfg.n_head_kv, cfg.n_embd_head_k, cfg.n_embd_head_v)
        sharding = Sharding(cfg, shares)
        places = [KVPlace.of(sharding, rank, cfg.n_embd_head_k) for rank in range(world.size)]
        engine = Engine(leader.run, None, cfg.n_vocab, N_CTX, runner.n_blocks)
        try:
            return work(engine, States(leader, engine, shape, places))
        finally:
            leader.stop()

    return run_threads(len(shares), main)[0]


def greedy(engine, prompt, n=20):
    """Return the tokens that follow, and how many of the prompt were in the cache."""
    engine.add(Request("a", tuple(prompt), RequestParams(sampling=SamplingParams(temp=0), max_tokens=n)))
    tokens, cached = [], 0
    while engine.has_work():
        for output in engine.step():
            tokens += output.tokens
            cached = output.usage.n_cached if output.usage else cached
    return tokens, cached


def cpu():
    return make_backend("cpu", 1, (), "")


@pytest.mark.parametrize(
    ("make", "kv_type"),
    [(ReferenceBackend, "f32"), (ReferenceBackend, "q4_0"), *((cpu, t) for t in ("f16", "bf16", "q8_0", "q4_0"))],
)
def test_saved_on_two_ranks_and_restored_on_others(make, kv_type, tmp_path, rng):
    path, file = write_llama(tmp_path / "m.gguf", rng, GGMLType.F32, **SIZES), tmp_path / "state"
    prompt = rng.integers(0, 96, 130).tolist()

    def save(engine, states):
        tokens, _ = greedy(engine, prompt)
        assert states.save(file, [*prompt, *tokens]) == 128
        return tokens

    saved = on(path, [1.0, 1.0], kv_type, save, make)
    # Another continuation of the same beginning, with and without the file: what was saved is what is used.
    longer = [*prompt[:128], *rng.integers(0, 96, 9).tolist()]
    for shares in ([1.0], [1.0, 2.0, 1.0], [0.0, 1.0]):

        def restore(engine, states, longer=longer):
            assert states.load(file, longer) == 128
            return greedy(engine, longer), greedy(engine, prompt)

        (tokens, cached), (again, cached_again) = on(path, shares, kv_type, restore, make)
        assert (cached, cached_again) == (128, 128)
        assert again == saved
        if kv_type in ("f32", "f16", "bf16"):
            plain, none = on(path, shares, kv_type, lambda engine, states: greedy(engine, longer), make)
            assert none == 0
            assert tokens == plain
    # Backends keep the same numbers, so that one reads what another has written.
    other = cpu if make is ReferenceBackend else ReferenceBackend
    assert on(path, [1.0], kv_type, lambda engine, states: (states.load(file), greedy(engine, prompt))[1], other) == (
        saved,
        128,
    )


def test_only_what_begins_alike_and_fits(tmp_path, rng):
    path, file = write_llama(tmp_path / "m.gguf", rng, GGMLType.F32, **SIZES), tmp_path / "state"
    prompt = rng.integers(0, 96, 200).tolist()

    def work(engine, states):
        assert states.save(file, prompt) == 0
        assert not file.exists()
        greedy(engine, prompt, 1)
        return states.save(file, prompt), states.save(tmp_path / "short", prompt[:100])

    assert on(path, [1.0], "f32", work) == (192, 96)
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "short", "state"]
    other = [*prompt[:70], (prompt[70] + 1) % 96, *prompt[71:]]

    def restore(engine, states):
        found = [states.load(file, other), states.load(file, [1]), states.load(file)]
        assert engine.stats().kv_used == 0
        # The context holds 8 blocks, 6 of which are taken.
        greedy(engine, rng.integers(0, 96, 250).tolist(), 1)
        return [*found, states.load(file)]

    assert on(path, [2.0, 1.0], "f32", restore) == [64, 0, 192, 192]
    # A file that takes the place of another does so as a whole.
    before = file.read_bytes()
    file.chmod(0o400)
    with pytest.raises(UserError, match="cannot be written"):
        on(
            path,
            [1.0],
            "f32",
            lambda engine, states: greedy(engine, prompt, 1) and states.save(tmp_path / "no" / "x", prompt),
        )
    assert file.read_bytes() == before


def test_damage_is_refused(tmp_path, rng):
    path, file = write_llama(tmp_path / "m.gguf", rng, GGMLType.F32, **SIZES), tmp_path / "state"
    prompt = rng.integers(0, 96, 70).tolist()
    on(path, [1.0, 1.0], "q8_0", lambda engine, states: (greedy(engine, prompt, 1), states.save(file, prompt)))
    good = file.read_bytes()
    bad = tmp_path / "bad"

    def spoil(engine, states):
        expected, _ = greedy(engine, prompt[:40])
        for i in range(150):
            data = bytearray(good)
            if i % 3 == 0:
                data = data[: int(rng.integers(len(good)))]
            elif i % 3 == 1:
                data += rng.bytes(int(rng.integers(1, 5000)))
            else:
                # Half of the flips in the first bytes, where there is most to be understood.
                data[int(rng.integers(len(good) if i % 2 else 2000))] ^= 1 << int(rng.integers(8))
            bad.write_bytes(data)
            with pytest.raises(UserError) as caught:
                states.load(bad)
            assert "\n" not in str(caught.value)
            assert str(bad) in str(caught.value)
        assert engine.stats().kv_used == 0
        for data in (b"", b"GGUF", rng.bytes(10000), good[:8]):
            bad.write_bytes(data)
            with pytest.raises(UserError, match=r"no saved state|version"):
                states.load(bad)
        assert greedy(engine, prompt[:40])[0] == expected
        assert states.load(file) == 64
        return greedy(engine, prompt[:40])[0] == expected

    assert on(path, [1.0, 1.0, 1.0], "q8_0", spoil)
    for identity, kv_type, words in (("other", "q8_0", "another model"), ("model", "f16", r"q8_0, here f16")):
        with pytest.raises(UserError, match=words):
            on(path, [1.0], kv_type, lambda engine, states: states.load(file), identity=identity)


def test_identity_tells_models_apart(tmp_path, rng):
    def identity(path, **changes):
        header = read_header(path)
        cfg = read_config(header, 0)
        return model_identity({**header.metadata, **changes}, model_tensors(header, cfg), cfg, header.paths)

    one, other = (write_llama(tmp_path / name, rng, GGMLType.F32, **SIZES) for name in ("one", "other"))
    shutil.copy(one, tmp_path / "copy")
    assert identity(one) == identity(tmp_path / "copy")
    # The same header, other weights.
    assert identity(one) != identity(other)
    assert identity(one) != identity(one, **{"llama.rope.freq_base": 1e6})
    header = read_header(one)
    cfg = read_config(header, 0)
    scaled = dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, freq_scale=0.5))
    tensors = model_tensors(header, cfg)
    assert model_identity(header.metadata, tensors, cfg, header.paths) != model_identity(
        header.metadata, tensors, scaled, header.paths
    )


def test_a_full_disk_leaves_the_old_file_and_the_job(tmp_path, rng, monkeypatch):
    path, file = write_llama(tmp_path / "m.gguf", rng, GGMLType.F32, **SIZES), tmp_path / "state"
    prompt = rng.integers(0, 96, 70).tolist()

    def work(engine, states):
        greedy(engine, prompt, 1)
        assert states.save(file, prompt) == 64
        before, n_left = file.read_bytes(), 3

        def pwrite(fd, data, offset, write=os.pwrite):
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # As much as there is room for.
            return write(fd, data[:100], offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            with pytest.raises(UserError, match=r"rank . on threads: .*No space left"):
                states.save(file, prompt)
        assert file.read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["m.gguf", "state"]
        return states.save(file, prompt), greedy(engine, prompt)[1]

    assert on(path, [1.0, 1.0], "f32", work) == (64, 64)
