"""How many kernels a block of a model starts on the GPU when it decodes a token: each one costs microseconds."""

import numpy as np
import pytest

from gpu_host import gpu_backend, kernels_of, needs_compiler
from mpillama.bench import shapes
from mpillama.bench.model import describe
from mpillama.bench.weights import random_weights
from mpillama.comm.solo import SoloWorld
from mpillama.engine.sequence import Sequence as TokenSequence
from mpillama.ops import Ops
from mpillama.runner import Runner
from mpillama.sharding import Sharding

pytestmark = needs_compiler
_GPT_OSS = shapes.SHAPES["gpt-oss-20b"]
# n_layer, n_embd, n_head, n_head_kv, n_ff, n_vocab, n_ctx, rope_base, n_embd_head
_SIZES = 3, 256, 4, 2, 256, 64, 512, 1e4, 64
SHAPES = {
    "llama": shapes.ModelShape("llama", *_SIZES),
    "qwen2": shapes.ModelShape("qwen2", *_SIZES, biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": shapes.ModelShape("qwen3", *_SIZES),
    "gemma3": shapes.ModelShape("gemma3", *_SIZES),
    "qwen3moe": shapes.ModelShape("qwen3moe", *_SIZES, 8, 2),
    "gpt-oss": shapes.ModelShape(
        "gpt-oss", *_SIZES, 8, 2, biases=_GPT_OSS.biases, default_type="MXFP4", keys=_GPT_OSS.keys
    ),
}

# The sum of the experts' answers has no kernel of its own; nor have norms of heads, rotations, and norms of branches.
MOST = {"llama": 8, "qwen2": 8, "qwen3": 8, "gemma3": 8, "qwen3moe": 13, "gpt-oss": 12}


def launches(monkeypatch, name):
    """Return the kernels of a step of one token, after a prompt long enough to be split."""
    monkeypatch.setitem(shapes.SHAPES, "small", SHAPES[name])
    monkeypatch.setattr("mpillama.backends.gpu.attention._SPLIT_KEYS", 8)
    backend = gpu_backend()
    model = describe("small", None, (), 1, 512, backend)
    sharding = Sharding(model.cfg, model.shares)
    ops = Ops(backend, SoloWorld().group())
    runner = Runner(
        model.cfg, random_weights(model.tensors, sharding, 0, backend), ops, 2, 512, "f16", "f16", graphs=False
    )
    sequence = TokenSequence(list(range(50)), np.arange(runner.n_blocks))
    runner.run(sequence.next_batch(1000))
    seen = kernels_of(backend, monkeypatch)
    sequence.tokens.append(7)
    assert np.isfinite(runner.run(sequence.next_batch(1))).all()
    return seen


def of_a_block(seen):
    """Return what lies between the attention of two blocks: as much as a block starts."""
    starts = [i for i, name in enumerate(seen) if name == "store"]
    assert len(starts) == 3
    return seen[starts[0] : starts[1]]


@pytest.mark.parametrize("name", SHAPES)
def test_a_block_starts_few(name, monkeypatch):
    block = of_a_block(launches(monkeypatch, name))
    assert len(block) <= MOST[name], block
