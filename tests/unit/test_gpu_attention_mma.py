"""Attention of prompts on matrix units (attention_mma.cu) against float64, on what the cache has kept.

Queries are rounded to float16: a score, which is a sum of products q k, is wrong by at most 2^-11 of the sum of their sizes, and by
about 2e-4 times the root of the sum of their squares. Scores of `Pair` have a spread of 2, so weights are wrong by about 4e-4 of
what they are; rounding them adds 2e-4. That makes 5e-4 of the result's norm.
"""

import numpy as np
import pytest

from attention_pair import Pair
from gpu_host import emulated, needs_compiler, only_emulated
from mpillama.backends.gpu import attention, source
from mpillama.backends.gpu.attention import tiles_unit
from mpillama.backends.gpu.device import Unit
from mpillama.backends.gpu.emulated import EmulatedDevice
from mpillama.gguf.types import GGMLType

pytestmark = needs_compiler
ALL, WORST = 1e-3, 4e-3


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The kernels that were started, by name."""
    names, launch = [], EmulatedDevice.launch

    def note(self, unit, kernel, *args):
        names.append(kernel)
        launch(self, unit, kernel, *args)

    monkeypatch.setattr(EmulatedDevice, "launch", note)
    return names


def on_units(rng, order=None, **options):
    order = int(rng.integers(3)) if order is None else order
    return emulated(32, order, int(rng.integers(1 << 30)), matrix_units=True, **options)


def check(pair, *seq_lens):
    everything, worst, result = pair.error(*seq_lens)
    assert everything < ALL, seq_lens
    assert worst < WORST, seq_lens
    return result


@pytest.mark.parametrize("size", [(64, 64), (128, 128)])
def test_smoke(rng, size, launched):
    pair = Pair(rng, on_units(rng), (8, 2, *size), ("f16", "f16"))
    for n in (33, 100, 1, 7):
        e = pair.error(n)
        print(size, n, e[:2])
    print(launched)
