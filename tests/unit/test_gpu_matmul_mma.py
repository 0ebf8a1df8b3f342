"""Products on matrix units against float64, for every type, on the emulated device."""

import numpy as np
import pytest

from gpu_host import emulated, kernels_of, needs_compiler, skip_without
from mpillama.backends.gpu.matmul import FLOATS
from mpillama.backends.quants import SUPPORTED
from mpillama.gguf.types import GGMLType
from products import error, make_weight

pytestmark = needs_compiler
TYPES = sorted(SUPPORTED)
# Weights and activations have 11 bits each.
BOUND = 1e-3


def on_units(rng, warp=32):
    """Return a backend with NVIDIA's units, or AMD's.

    Copies of 16 bytes are done at once in order 0, as late as they may be in the others.
    """
    backend = emulated(warp, int(rng.integers(3)), int(rng.integers(1 << 30)), matrix_units=True)
    skip_without("matrix units", backend.device.matrix_units)
    return backend


def width(rng, type, least=1, most=6):
    return (
        int(rng.integers(32 * least, 64 * most)) if type in FLOATS else int(rng.integers(least, most)) * type.block_size
    )


def tokens(rng, *shape):
    """Of sizes that float16 has not."""
    sizes = 10.0 ** rng.uniform(-12, 12, (shape[0], *[1] * (len(shape) - 1)))
    return (rng.standard_normal(shape) * sizes).astype(np.float32)


def check(y, x, floats, bound=BOUND):
    """Compare each token's products with those of x (T, ..., n) and matrices (T, ..., rows, n) or (rows, n)."""
    x = x.astype(np.float64)[..., None, :]
    exact, sizes = (x * floats).sum(-1), np.sqrt(((x * floats) ** 2).sum(-1))
    assert y.shape == exact.shape
    # Not of the sum, of which little may be left: of what is summed up.
    errors = [error(row, expected, np.linalg.norm(size)) for row, expected, size in zip(y, exact, sizes, strict=True)]
    assert np.sqrt(np.mean(np.square(errors))) < bound
    # A token may have a single number, whose rounding errors all have the same sign.
    assert max(errors) < 4 * bound


# Compiling takes longest: for AMD's units some types, which have all that is particular to any.
CASES = [
    *((32, type) for type in TYPES),
    *((64, GGMLType[name]) for name in ("F16", "BF16", "Q4_0", "Q4_K", "Q6_K", "IQ3_S")),
]


@pytest.mark.parametrize(("warp", "type"), CASES, ids=lambda x: getattr(x, "name", x))
def test_every_type(warp, type, rng):
    backend = on_units(rng, warp)
    bound = 3e-6 if type == GGMLType.F32 else BOUND
    pad = (0, 0) if rng.integers(2) else (int(rng.integers(1, 20)), int(rng.integers(0, 12)))
    n_rows, n_in = int(rng.integers(1, 300)), width(rng, type, least=2)
    w, floats = make_weight(rng, backend, type, 1, n_rows, n_in, pad)
    x = tokens(rng, int(rng.integers(9, 140)), n_in - sum(pad))
    check(backend.linear(x, w), np.pad(x, ((0, 0), pad)), floats[0], bound)

    w, floats = make_weight(rng, backend, type, 4, int(rng.integers(1, 200)), n_in)
    n_tokens = int(rng.integers(9, 120))
    chosen = np.array([rng.permutation(5)[:2] for _ in range(n_tokens)], np.int32) - 1
    matrices = np.where(chosen < 0, 0, 1)[..., None, None] * floats[chosen]
    x, own = tokens(rng, n_tokens, n_in), tokens(rng, n_tokens, 2, n_in)
    check(backend.expert_linear(x, w, chosen), x[:, None], matrices, bound)
    check(backend.expert_linear(own, w, chosen), own, matrices, bound)


@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("type", [GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.F16], ids=lambda t: t.name)
def test_blocks_that_share_the_columns(type, warp, rng, monkeypatch):
    backend = on_units(rng, warp)
    n_rows, n_in = int(rng.integers(1, 200)), 32 * int(rng.integers(64, 120)) // type.block_size * type.block_size
    w, floats = make_weight(rng, backend, type, 1, n_rows, n_in)
    launch, grids = backend.device.launch, []
    monkeypatch.setattr(backend.device, "launch", lambda *args: grids.append(args[1:3]) or launch(*args))
    for n_tokens, n_cores in ((9, 2), (20, 20), (70, 30)):
        monkeypatch.setattr(backend.device, "n_cores", n_cores, raising=False)
        x = tokens(rng, n_tokens, n_in)
        y = backend.linear(x, w)
        check(y, x, floats[0])
        shares = [grid[2] for name, grid in grids if name.startswith("matmul_mma")][-1]
        assert shares >= 2 or n_cores == 2
        # The sum is one of parts in their order: the same each time.
        np.testing.assert_array_equal(backend.linear(x, w).view("u4"), y.view("u4"))


def test_activations_are_rounded_once_for_all_that_take_them(rng, monkeypatch):
    backend = on_units(rng)
    names = kernels_of(backend, monkeypatch)
    x = backend.device.upload(tokens(rng, 12, 256))
    for type in (GGMLType.Q4_K, GGMLType.F16, GGMLType.Q6_K):
        w, _ = make_weight(rng, backend, type, 1, 40, 256)
        backend.backend.linear(x, w)
    assert names == ["halve", *["matmul_mma_32"] * 3]


def test_a_recorded_product(rng):
    backend = on_units(rng)
    device = backend.device
    w, floats = make_weight(rng, backend, GGMLType.Q5_1, 1, 100, 2048)
    x = device.upload(tokens(rng, 11, 2048))
    with device.graph_memory():
        backend.backend.linear(x, w)
    # As at the begin of a step.
    backend.halved.clear()
    graph, y = device.capture(lambda: backend.backend.linear(x, w))
    for _ in range(2):
        values = tokens(rng, 11, 2048)
        device.write(x, values)
        graph.launch()
        check(device.download(y), values, floats[0])
