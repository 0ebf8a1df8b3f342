"""A trained model tells the reference's story, token for token, on however many ranks there are."""

import json

import numpy as np
import pytest

from mpillama.comm.mpi import MPIWorld
from mpillama.engine.sampling.chain import Sampler
from mpillama.engine.sampling.params import SamplingParams
from mpillama.engine.sequence import Sequence
from mpillama.gguf.reader import read_header
from mpillama.grid import Grid
from mpillama.runner import pack, unpack
from mpillama.steps import Leader, follow
from mpillama.tokenizer import load_tokenizer
from shared import shared
from tiny import open_runner


@pytest.mark.parametrize("layers", [False, True], ids=["tensor", "layer"])
def test_greedy_ids(layers):
    world = MPIWorld()
    grid = Grid(pp=world.size) if layers else Grid(tp=world.size)
    path = shared("models", "stories260K", "stories260K-f32.gguf")
    expected = json.loads(shared("models", "stories260K", "reference.json").read_text())
    runner, _ = open_runner(world, path, [1.0] * world.size, n_ctx=512, kv_type="f16", grid=grid)
    if world.rank:
        assert follow(world, runner) == 0
        return
    leader = Leader(world, runner)
    tokenizer = load_tokenizer(read_header(path).metadata)
    prompt = tokenizer.encode(expected["prompt"])
    assert prompt == expected["prompt_ids"]
    sampler = Sampler(SamplingParams(temp=0.0), tokenizer.n_vocab, 512)
    sequence, ids = Sequence(prompt, np.arange(runner.n_blocks)), []
    while len(ids) < len(expected["greedy_ids"]):
        batch = sequence.next_batch(4)
        logits = leader.run(unpack(pack(batch)))
        if sequence.pending == 0:
            ids.append(sampler.sample(logits[-1]))
            sequence.tokens.append(ids[-1])
    leader.stop()
    assert ids == expected["greedy_ids"]
