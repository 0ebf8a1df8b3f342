"""With --deterministic the same seed tells the same story on any number of ranks, bit for bit."""

import numpy as np
import pytest

from job import run
from mpillama.gguf.types import GGMLType
from tiny import write_llama


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_same_bits_on_any_number_of_ranks(backend, tmp_path, rng):
    model = write_llama(tmp_path / "m.gguf", rng, GGMLType.Q4_K, n_head=8, n_head_kv=4, n_ff=768)
    tokens = ",".join(map(str, rng.integers(0, 96, 30)))
    results = []
    for n_ranks, share in ((0, ""), (2, ""), (3, "3,1,2")):
        out = tmp_path / "out.npy"
        arguments = ["logits", "-m", model, "--tokens", tokens, "--out", out, "--deterministic", "--backend", backend]
        ended = run([*arguments, "-ub", 8, *(["-ts", share] if share else [])], n_ranks)
        assert ended.code == 0, ended.err
        results.append(np.load(out))
    assert all(other.tobytes() == results[0].tobytes() for other in results)


def test_a_rank_without_a_part_is_refused(tmp_path, rng):
    model = write_llama(tmp_path / "m.gguf", rng)
    arguments = ["logits", "-m", model, "--tokens", "1", "--out", tmp_path / "o.npy", "--deterministic", "-ts", "1,0"]
    ended = run(arguments, 2)
    assert ended.code == 2
    assert "leaves none for rank 1" in ended.err
