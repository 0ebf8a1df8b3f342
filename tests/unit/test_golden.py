"""Logits of llama.cpp for tiny models of every architecture, on 1 to 6 ranks, whole, in pieces and token by token."""

import numpy as np
import pytest

from shared import shared
from tiny import nmse, run_on

MODELS = (
    *("llama-dense", "llama-moe", "mistral3-dense", "qwen2-dense", "qwen2moe-moe", "qwen3-dense", "qwen3moe-moe"),
    *("gemma2-dense", "gemma3-dense", "phi3-dense", "granite-dense", "olmo2-dense", "olmoe-moe", "gpt-oss-moe"),
)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_all_positions(name, n_ranks):
    reference = np.load(shared("golden", f"{name}.npz"))
    for chunk in (24, 7, 1):
        results = run_on(shared("golden", f"{name}.gguf"), reference["tokens"].tolist(), [1.0] * n_ranks, chunk)
        assert nmse(results[0], reference["logits"]) <= 1e-6
        for other in results[1:]:
            np.testing.assert_array_equal(other.view(np.uint32), results[0].view(np.uint32))


@pytest.mark.parametrize("name", MODELS)
def test_uneven_shares(name, rng):
    reference = np.load(shared("golden", f"{name}.npz"))
    shares = rng.uniform(0.2, 3.0, 3).tolist()
    result = run_on(shared("golden", f"{name}.gguf"), reference["tokens"].tolist(), shares)[0]
    assert nmse(result, reference["logits"]) <= 1e-6, shares


@pytest.mark.parametrize("kv_type", ["f16", "bf16"])
def test_narrow_kv_is_close(kv_type):
    reference = np.load(shared("golden", "llama-dense.npz"))
    result = run_on(shared("golden", "llama-dense.gguf"), reference["tokens"].tolist(), [1.0, 1.0], 5, kv_type)[0]
    assert 0 < nmse(result, reference["logits"]) <= {"f16": 1e-6, "bf16": 5e-5}[kv_type]
