"""Random models of every tensor type give the same logits on any number of ranks, however the axes divide."""

import os

import numpy as np
import pytest

from mpillama.backends.quants import SUPPORTED
from mpillama.comm.solo import SoloWorld
from mpillama.comm.threads import run_threads
from mpillama.config import read_config
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import GGMLType
from mpillama.sharding import Sharding
from mpillama.tensors import model_tensors
from tiny import logits_of, nmse, open_runner, run_on, write_llama


@pytest.mark.parametrize("type", sorted(SUPPORTED), ids=lambda t: t.name)
def test_every_type_on_several_ranks(type, tmp_path, rng):
    # 12 heads of 64 on 4 ranks end inside 256-wide blocks of attn_output, and so does 768 on 4 in ffn_down; the 2 KV
    # heads are replicated.
    path = write_llama(tmp_path / "m.gguf", rng, type, n_head=12, n_head_kv=2, n_ff=768)
    tokens = rng.integers(0, 96, 9).tolist()
    alone = run_on(path, tokens, [1.0])[0]
    assert np.isfinite(alone).all()
    assert alone.std() > 0
    for weights in ([1.0] * 3, [1.0] * 4, [2.0, 1.0]):
        assert nmse(run_on(path, tokens, weights)[0], alone) < 1e-9, weights


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes_and_shares(seed, tmp_path, rng):
    group, n_head_kv = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    sizes = {
        "n_head": group * n_head_kv,
        "n_head_kv": n_head_kv,
        "n_head_dim": int(rng.choice([6, 16, 32])),
        "n_embd": int(rng.choice([20, 64, 96])),
        "n_ff": int(rng.integers(3, 200)),
        "n_vocab": int(rng.integers(5, 130)),
        "tied": bool(rng.integers(2)),
    }
    if rng.integers(2):
        n_expert = int(rng.integers(1, 6))
        sizes |= {"n_expert": n_expert, "n_expert_used": int(rng.integers(1, n_expert + 1))}
    path = write_llama(tmp_path / "m.gguf", rng, **sizes)
    tokens = rng.integers(0, sizes["n_vocab"], 12).tolist()
    alone = run_on(path, tokens, [1.0])[0]
    for n_ranks in (2, 3, 5, 7):
        weights = rng.uniform(0.1, 3.0, n_ranks).tolist()
        for chunk in (12, 5):
            results = run_on(path, tokens, weights, chunk)
            assert nmse(results[0], alone) < 1e-9, (sizes, weights)
            assert all((other == results[0]).all() for other in results)


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.Q4_K])
def test_fused_tensors_are_their_members(type, tmp_path, rng):
    """qwen2 and phi3 differ in nothing else that a file without rope factors says."""
    seed = int(rng.integers(1 << 30))
    plain = write_llama(tmp_path / "a.gguf", np.random.default_rng(seed), type, arch="qwen2", n_head=8)
    fused = write_llama(tmp_path / "b.gguf", np.random.default_rng(seed), type, arch="phi3", n_head=8, fused_qkv=True)
    tokens = rng.integers(0, 96, 8).tolist()
    for weights in ([1.0], [1.0] * 3, [1.0, 2.5]):
        np.testing.assert_array_equal(run_on(fused, tokens, weights)[0], run_on(plain, tokens, weights)[0])


def test_a_rank_without_share_still_takes_part(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng)
    tokens = [1, 2, 3, 4]
    assert nmse(run_on(path, tokens, [1.0, 0.0, 2.0])[0], run_on(path, tokens, [1.0])[0]) < 1e-9


def test_each_byte_is_read_by_one_rank(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, n_head=8, n_head_kv=4, n_ff=1024, n_vocab=256)
    header = read_header(path)
    tensors = model_tensors(header, read_config(header))
    for n_ranks in (1, 2, 4):
        read = run_threads(n_ranks, lambda world, n=n_ranks: open_runner(world, path, [1.0] * n)[1])
        sharding = Sharding(read_config(header), [1.0] * n_ranks)
        replicated = sum(i.nbytes for i in tensors.values() if not sharding.placement(i).axis)
        whole = sum(i.nbytes for i in tensors.values())
        assert sum(read) == whole + (n_ranks - 1) * (replicated if n_ranks > 1 else 0)
        assert replicated < 0.02 * whole or n_ranks == 1
        assert read == [sharding.bytes_of(tensors.values(), rank) for rank in range(n_ranks)]


def test_a_tied_head_is_read_once(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, tied=True)
    header = read_header(path)
    _, n_read = open_runner(SoloWorld(), path, [1.0])
    assert n_read == sum(info.nbytes for info in header.tensors.values())


def test_prompt_in_pieces_is_the_prompt(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng)
    tokens = rng.integers(0, 96, 70).tolist()
    whole = logits_of(open_runner(SoloWorld(), path, [1.0])[0], tokens)
    for chunk in (1, 3, 32, 64):
        assert nmse(logits_of(open_runner(SoloWorld(), path, [1.0])[0], tokens, chunk), whole) < 1e-10


def test_a_file_that_shrinks_is_an_error(tmp_path, rng):
    from mpillama.errors import GGUFError
    from mpillama.loader import SliceReader

    path = write_llama(tmp_path / "m.gguf", rng)
    header = read_header(path)
    last = max(header.tensors.values(), key=lambda info: info.offset)
    os.truncate(path, last.offset + 10)
    sharding = Sharding(read_config(header), [1.0])
    with SliceReader(header.paths, lambda n: None) as reader, pytest.raises(GGUFError, match="ends inside"):
        reader.read(last, sharding.slice_of(last, 0))
