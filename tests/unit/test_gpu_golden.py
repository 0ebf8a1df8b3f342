"""llama.cpp's logits of tiny models of every architecture, on the emulated GPU, alone and on several ranks."""

import functools

import numpy as np
import pytest
from test_golden import MODELS

from gpu_host import gpu_backend, needs_compiler
from shared import shared
from tiny import nmse, run_on, write_llama

pytestmark = needs_compiler


@pytest.mark.parametrize(("n_ranks", "chunk", "warp", "order"), [(1, 24, 32, 0), (2, 11, 64, 1), (3, 8, 32, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_all_positions(name, n_ranks, chunk, warp, order):
    # Chunks of 24, 11 and 8 tokens go through tiles, through tiles and then two tokens, and through rows.
    reference = np.load(shared("golden", f"{name}.npz"))
    make = functools.partial(gpu_backend, warp, order)
    results = run_on(shared("golden", f"{name}.gguf"), reference["tokens"].tolist(), [1.0] * n_ranks, chunk, make=make)
    assert nmse(results[0], reference["logits"]) <= 1e-6
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), results[0].view(np.uint32))


@pytest.mark.parametrize("name", ["llama-moe", "gpt-oss-moe"])
def test_token_by_token(name):
    reference = np.load(shared("golden", f"{name}.npz"))
    make = functools.partial(gpu_backend, 64, 0)
    result = run_on(shared("golden", f"{name}.gguf"), reference["tokens"].tolist(), [1.0], 1, make=make)[0]
    assert nmse(result, reference["logits"]) <= 1e-6


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_quantized_model_is_close_to_its_floats(kv_type, tmp_path, rng):
    """Activations in 8 bits, and cut inside of quant blocks: 12 heads of 64 on 4 ranks."""
    from mpillama.gguf.types import GGMLType

    path = write_llama(tmp_path / "m.gguf", rng, GGMLType.Q4_K, n_head=12, n_head_kv=2, n_ff=768)
    tokens = rng.integers(0, 96, 9).tolist()
    exact = run_on(path, tokens, [1.0])[0]
    for weights in ([1.0], [1.0, 2.0, 1.0]):
        result = run_on(path, tokens, weights, 5, kv_type, make=functools.partial(gpu_backend, 32, 0))[0]
        assert nmse(result, exact) < 2e-3
