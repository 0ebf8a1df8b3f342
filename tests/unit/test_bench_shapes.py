"""Random models by shape: published sizes, the quantizer's mixtures, and the same weights on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpillama.backends.quants import dequantize
from mpillama.backends.reference import ReferenceBackend
from mpillama.bench.model import describe, load
from mpillama.bench.shapes import SHAPES, shape_header
from mpillama.bench.weights import RANDOM_TYPES, RandomTensors, random_blocks, write_random_gguf
from mpillama.comm.base import World
from mpillama.comm.threads import run_threads
from mpillama.config import read_config
from mpillama.errors import UsageError, UserError
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import GGMLType, row_bytes
from mpillama.ops import Ops
from mpillama.runner import Runner
from mpillama.sharding import Sharding, Slice
from mpillama.tensors import model_tensors
from tiny import logits_of, nmse, run_on

# Of the model cards; llama-1b has a head of its own besides the 1.24e9 of Llama 3.2 1B.
PUBLISHED = {
    "llama-1b": 1.236e9 + 2048 * 128256,
    "llama-3b": 3.21e9,
    "llama-8b": 8.03e9,
    "llama-70b": 70.6e9,
    "llama-405b": 405.9e9,
    "mistral-7b": 7.25e9,
    "mixtral-8x7b": 46.7e9,
    "qwen2.5-0.5b": 0.494e9,
    "qwen2.5-7b": 7.62e9,
    "qwen3-0.6b": 0.596e9,
    "qwen3-4b": 4.02e9,
    "qwen3-8b": 8.19e9,
    "qwen3-32b": 32.8e9,
    "qwen3-30b-a3b": 30.5e9,
    "qwen3-235b-a22b": 235e9,
    "gpt-oss-20b": 20.9e9,
    "gpt-oss-120b": 116.8e9,
    "moe-1t": 1.04e12,
}


def n_params(header) -> int:
    return sum(math.prod(info.shape) for info in header.tensors.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    header = shape_header(name)
    assert n_params(header) == pytest.approx(PUBLISHED[name], rel=0.01)
    cfg = read_config(header)
    assert set(model_tensors(header, cfg)) >= set(header.tensors)


def test_all_shapes_are_checked():
    assert set(SHAPES) == {*PUBLISHED, "tiny"}


def read_bytes(spec: str) -> int:
    header = shape_header(spec)
    return sum(info.nbytes for name, info in header.tensors.items() if name != "token_embd.weight")


def test_bytes_of_a_token_of_llama_1b():
    """Files of this shape made by llama.cpp's quantizer: 0.76, 0.79 and 1.32 GB for each token."""
    assert read_bytes("llama-1b:Q4_0") == pytest.approx(0.76e9, rel=0.01)
    assert read_bytes("llama-1b:Q4_K_M") == pytest.approx(0.79e9, rel=0.015)
    assert read_bytes("llama-1b:Q8_0") == pytest.approx(1.32e9, rel=0.01)


def types(spec: str) -> dict[str, str]:
    return {name: info.type.name for name, info in shape_header(spec).tensors.items()}


def test_mixture_of_the_quantizer():
    found = types("llama-8b:Q4_K_M")
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q6_K", "Q4_K")
    wide = [il for il in range(32) if found[f"blk.{il}.ffn_down.weight"] == "Q6_K"]
    assert wide == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert wide == [il for il in range(32) if found[f"blk.{il}.attn_v.weight"] == "Q6_K"]
    assert {found[f"blk.{il}.{name}.weight"] for il in range(32) for name in ("attn_q", "ffn_up")} == {"Q4_K"}
    assert types("llama-70b")["blk.13.attn_v.weight"] == "Q5_K"
    assert types("llama-70b")["blk.12.attn_v.weight"] == "Q6_K"
    assert types("qwen3-0.6b:Q4_K_M")["token_embd.weight"] == "Q6_K"
    assert types("mixtral-8x7b")["blk.5.attn_k.weight"] == "Q8_0"
    assert {found[name] for name in found if "norm" in name} == {"F32"}


def test_rows_that_are_no_whole_number_of_blocks():
    # 2880 and 896 are not multiples of 256.
    assert types("gpt-oss-20b:Q4_K")["blk.0.attn_q.weight"] == "Q5_0"
    assert types("qwen2.5-0.5b:Q6_K")["blk.0.ffn_up.weight"] == "Q8_0"
    found = types("gpt-oss-20b")
    assert (found["blk.3.ffn_up_exps.weight"], found["blk.3.attn_q.weight"]) == ("MXFP4", "Q8_0")
    assert (found["blk.3.ffn_gate_inp.weight"], found["blk.3.ffn_up_exps.bias"]) == ("F32", "F32")
    assert "blk.3.attn_sinks.weight" in found


@pytest.mark.parametrize(
    ("spec", "message"),
    [("llama-2b", "unknown shape 'llama-2b'; there are llama-1b"), ("tiny:Q9", "unknown type 'Q9'; there are F32")],
)
def test_unknown_names(spec, message):
    with pytest.raises(UsageError, match=message):
        shape_header(spec)


@pytest.mark.parametrize("type", sorted(RANDOM_TYPES), ids=lambda t: t.name)
def test_random_blocks_are_small_numbers(type):
    blocks = random_blocks(type, 2000)
    x = dequantize(blocks, type)
    assert np.isfinite(x).all()
    assert 0.01 < x.std() < 0.05
    assert abs(x.mean()) < 0.2 * x.std()
    assert (blocks == random_blocks(type, 2000)).all()


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.Q8_0, GGMLType.Q4_K], ids=lambda t: t.name)
def test_a_slice_is_part_of_the_whole(type, rng):
    from mpillama.gguf.reader import TensorInfo

    n_in, n_rows, n_mats = 512, 3000, 3
    info = TensorInfo("blk.0.ffn_up_exps.weight", type, (n_in, n_rows, n_mats), 0, 0)
    width = row_bytes(type, n_in)
    whole = RandomTensors().read(info, Slice(0, n_rows, 0, width, n_mats, n_in))
    assert whole.shape == (n_mats, n_rows, width)
    assert len(np.unique(whole[0], axis=0)) == n_rows
    for _ in range(5):
        rows = sorted(rng.integers(0, n_rows + 1, 2).tolist())
        cols = sorted((rng.integers(0, width // type.block_bytes + 1, 2) * type.block_bytes).tolist())
        for a, b in ((0, width), cols):
            part = RandomTensors().read(info, Slice(*rows, a, b, n_mats, n_in))
            assert (part == whole[:, rows[0] : rows[1], a:b]).all()


def random_runner(world: World, spec: str, n_ctx: int = 64) -> Runner:
    backend = ReferenceBackend()
    model = describe(spec, None, (), world.size, n_ctx, backend)
    sharding = Sharding(model.cfg, model.shares)
    weights = load(model, sharding, world.rank, backend, lambda n: None)
    n_head_kv = sharding.cuts["k"].width(world.rank) // model.cfg.n_embd_head_k
    return Runner(model.cfg, weights, Ops(backend, world.group()), n_head_kv, n_ctx, "f32", "f32")


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_M", "F32"])
def test_the_same_model_in_memory_in_parts_and_in_a_file(type, tmp_path, rng):
    spec = f"tiny:{type}"
    tokens = rng.integers(0, 2048, 12).tolist()
    alone = run_threads(1, lambda world: logits_of(random_runner(world, spec), tokens))[0]
    assert np.isfinite(alone).all()
    assert 0.05 < alone.std() < 50
    for n_ranks in (2, 3):
        parts = run_threads(n_ranks, lambda world: logits_of(random_runner(world, spec), tokens))
        assert nmse(parts[0], alone) < 1e-9
    header = shape_header(spec)
    path = tmp_path / "m.gguf"
    write_random_gguf(path, header)
    written = read_header(path)
    assert {name: (i.type, i.shape) for name, i in written.tensors.items()} == {
        name: (i.type, i.shape) for name, i in header.tensors.items()
    }
    assert nmse(run_on(path, tokens, [1.0])[0], alone) < 1e-12


def test_no_room_for_the_file(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(UserError, match="set TMPDIR"):
        write_random_gguf(tmp_path / "m.gguf", shape_header("tiny"))
