"""Whole experts are chosen where a token waits less for them; the estimate is exact."""

from itertools import combinations

import numpy as np
import pytest

from mpillama.bench.shapes import shape_header
from mpillama.config import read_config
from mpillama.experts import expected_max, whole_expert_blocks
from mpillama.sharding import Sharding
from mpillama.tensors import model_tensors


def test_expected_load_is_the_mean_over_all_choices(rng):
    for _ in range(5):
        counts = rng.integers(0, 5, int(rng.integers(1, 4))).tolist()
        counts[0] += 2
        n_used = int(rng.integers(1, min(4, sum(counts)) + 1))
        weights = rng.uniform(0.3, 2.0, len(counts)).tolist()
        owner = [rank for rank, n in enumerate(counts) for _ in range(n)]
        loads = [
            max(sum(owner[expert] == rank for expert in chosen) / w for rank, w in enumerate(weights))
            for chosen in combinations(range(len(owner)), n_used)
        ]
        assert expected_max(counts, n_used, weights) == pytest.approx(np.mean(loads))


@pytest.mark.parametrize(
    ("shape", "n_ranks", "whole"),
    [
        ("mixtral-8x7b:Q4_0", 2, False),
        ("mixtral-8x7b:Q4_0", 8, False),  # 2 of 8 experts: 6 ranks would wait
        ("qwen3-30b-a3b:Q4_0", 2, False),
        ("gpt-oss-20b", 4, False),
        ("qwen3-30b-a3b:Q8_0", 4, False),
        ("qwen3-30b-a3b:Q4_K_M", 4, True),  # 192 of 768 columns, in blocks of 256
        ("qwen3-30b-a3b:Q4_K_M", 8, True),
    ],
)
def test_auto(shape, n_ranks, whole):
    header = shape_header(shape)
    cfg = read_config(header)
    tensors = model_tensors(header, cfg)
    blocks = whole_expert_blocks(cfg, tensors.values(), [1.0] * n_ranks)
    assert blocks == frozenset(range(cfg.n_layer) if whole else ())
    assert whole_expert_blocks(cfg, tensors.values(), [1.0] * n_ranks, "on") == frozenset(range(cfg.n_layer))
    assert not whole_expert_blocks(cfg, tensors.values(), [1.0] * n_ranks, "off")
    if whole:
        sliced, kept = Sharding(cfg, [1.0] * n_ranks), Sharding(cfg, [1.0] * n_ranks, whole_experts=blocks)
        experts = [info for info in tensors.values() if "_exps" in info.name]
        assert sum(kept.bytes_of(experts, rank) for rank in range(n_ranks)) == sum(info.nbytes for info in experts)
        assert sum(sliced.bytes_of(experts, rank) for rank in range(n_ranks)) > sum(info.nbytes for info in experts)


def test_a_dense_model_has_none():
    header = shape_header("llama-1b:Q4_0")
    cfg = read_config(header)
    assert not whole_expert_blocks(cfg, model_tensors(header, cfg).values(), [1.0] * 4, "on")
