"""Small random models as GGUF files, of any tensor type, and a way to run a file on N ranks without MPI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mpillama.backends.base import Backend, Batch
from mpillama.backends.reference import ReferenceBackend
from mpillama.comm.base import Group, World
from mpillama.comm.pipeline import open_pipe
from mpillama.comm.staged import tensor_group
from mpillama.comm.threads import run_threads
from mpillama.config import read_config
from mpillama.engine.sequence import Sequence as TokenSequence
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import GGMLType, row_bytes
from mpillama.grid import Grid
from mpillama.loader import load_weights
from mpillama.ops import Ops
from mpillama.partition import Partition
from mpillama.runner import Runner, pack, unpack
from mpillama.tensors import model_tensors

Makers = Callable[[], Backend] | Sequence[Callable[[], Backend]]

# Where a block keeps its float16 factors: random bits there could be infinite.
_F16_AT = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ3_S: (0,),
    GGMLType.IQ1_S: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
    GGMLType.Q1_0: (0,),
    GGMLType.Q2_0: (0,),
}


def random_blocks(
    rng: np.random.Generator, type: GGMLType, shape: Sequence[int], size: float = 0.02, byte: int | None = None
) -> np.ndarray:
    """Return the bytes of a random tensor, uint8 (..., row bytes); ``shape`` has its in axis last.

    Of quantized types all bytes may be the same one, but for the factors of blocks.
    """
    *lead, n_in = shape
    if type in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        x = (rng.standard_normal((*lead, n_in)) * size * 4).astype(np.float32)
        if type == GGMLType.F16:
            return x.astype(np.float16).view(np.uint8)
        if type == GGMLType.BF16:
            return (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return x.view(np.uint8)
    low, high = (0, 256) if byte is None else (byte, byte + 1)
    raw = rng.integers(low, high, (*lead, row_bytes(type, n_in)), dtype=np.uint8)
    blocks = raw.reshape(-1, type.block_bytes)
    for at in _F16_AT.get(type, ()):
        factor = rng.uniform(0.2, 1.0, len(blocks)) * size / (16 if type.block_size == 256 else 4)
        blocks[:, at : at + 2] = factor.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if type == GGMLType.MXFP4:
        blocks[:, 0] = rng.integers(118, 122, len(blocks))
    elif type == GGMLType.NVFP4:
        blocks[:, :4] = rng.integers(1, 16, (len(blocks), 4))
    elif type == GGMLType.IQ1_M:
        # The float16 factor is cut into the upper 4 bits of 4 words.
        factor = (rng.uniform(0.2, 1.0, (len(blocks), 1)) * size / 16).astype(np.float16).view(np.uint16)
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | (factor >> [0, 4, 8, 12] & 15) << 4
    return raw


def write_llama(path: Path, rng: np.random.Generator, type: GGMLType = GGMLType.F32, **sizes: Any) -> Path:
    """Write a random llama model whose matrices all have ``type``; sizes override the defaults below."""
    size = {
        "n_layer": 2,
        "n_embd": 256,
        "n_head": 4,
        "n_head_kv": 2,
        "n_head_dim": 64,
        "n_ff": 512,
        "n_vocab": 96,
    } | sizes
    arch = sizes.get("arch", "llama")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=size.get("split_max_tensors", 0))
    writer.add_context_length(128)
    writer.add_embedding_length(size["n_embd"])
    writer.add_block_count(size["n_layer"])
    writer.add_feed_forward_length(size["n_ff"])
    writer.add_head_count(size["n_head"])
    writer.add_head_count_kv(size["n_head_kv"])
    writer.add_key_length(size["n_head_dim"])
    writer.add_value_length(size["n_head_dim"])
    writer.add_rope_dimension_count(size["n_head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    n_q, n_kv = size["n_head"] * size["n_head_dim"], size["n_head_kv"] * size["n_head_dim"]
    n_embd, n_ff = size["n_embd"], size["n_ff"]
    n_expert = size.get("n_expert", 0)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(size["n_expert_used"])

    def matrix(name: str, *shape: int, type: GGMLType = type, rows: tuple[int, ...] = ()) -> None:
        """Write a matrix; one that is fused draws the same numbers as its members of so many ``rows`` would."""
        parts = [random_blocks(rng, type, (*shape[:-2], n, shape[-1])) for n in rows or shape[-2:-1]]
        # Not as uint8, whose shape the writer would look up among the types that it knows.
        writer.add_tensor(f"{name}.weight", np.concatenate(parts).view(np.int8), raw_shape=shape, raw_dtype=type)

    def norm(name: str, n: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, n).astype(np.float32))

    matrix("token_embd", size["n_vocab"], n_embd)
    for il in range(size["n_layer"]):
        norm(f"blk.{il}.attn_norm", n_embd)
        if size.get("fused_qkv"):
            matrix(f"blk.{il}.attn_qkv", n_q + 2 * n_kv, n_embd, rows=(n_q, n_kv, n_kv))
        else:
            matrix(f"blk.{il}.attn_q", n_q, n_embd)
            matrix(f"blk.{il}.attn_k", n_kv, n_embd)
            matrix(f"blk.{il}.attn_v", n_kv, n_embd)
        matrix(f"blk.{il}.attn_output", n_embd, n_q)
        norm(f"blk.{il}.ffn_norm", n_embd)
        if n_expert:
            matrix(f"blk.{il}.ffn_gate_inp", n_expert, n_embd, type=GGMLType.F32)
            matrix(f"blk.{il}.ffn_gate_exps", n_expert, n_ff, n_embd)
            matrix(f"blk.{il}.ffn_up_exps", n_expert, n_ff, n_embd)
            matrix(f"blk.{il}.ffn_down_exps", n_expert, n_embd, n_ff)
        else:
            if arch == "phi3":
                matrix(f"blk.{il}.ffn_up", 2 * n_ff, n_embd, rows=(n_ff, n_ff))
            else:
                matrix(f"blk.{il}.ffn_gate", n_ff, n_embd)
                matrix(f"blk.{il}.ffn_up", n_ff, n_embd)
            matrix(f"blk.{il}.ffn_down", n_embd, n_ff)
    norm("output_norm", n_embd)
    if not size.get("tied"):
        matrix("output", size["n_vocab"], n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_runner(
    world: World,
    path: Path,
    weights: Sequence[float],
    n_ctx: int = 128,
    kv_type: str = "f32",
    make: Makers = ReferenceBackend,
    grid: Grid | None = None,
    experts: str = "off",
    join: Callable[[World, Backend], Group] | None = None,
    graphs: bool = True,
) -> tuple[Runner, int]:
    """Load a rank's share of a model, all ranks tensor-parallel by default; returns the runner and the bytes read.

    ``make`` makes the backend of every rank, or there is one for each; ``join`` makes the group of the rank's stage.
    """
    header = read_header(path)
    cfg = read_config(header, n_ctx)
    tensors = model_tensors(header, cfg)
    grid = grid or Grid(tp=len(weights))
    partition = Partition(cfg, tensors, grid, weights, experts)
    sharding, index = partition.of(world.rank)
    backend = make() if callable(make) else make[world.rank]()
    loaded, n_read = load_weights(header.paths, tensors, sharding, index, backend)
    group = join(world, backend) if join else tensor_group(world.group(grid.stage_ranks(world.rank)), backend)
    ops, pipe = Ops(backend, group, alike=callable(make)), open_pipe(world, grid)
    sizes = (partition.n_head_kv(world.rank), n_ctx, kv_type, kv_type)
    return Runner(cfg, loaded, ops, *sizes, sharding.blocks, pipe, graphs=graphs), n_read


def logits_of(runner: Runner, tokens: Sequence[int], chunk: int = 1000) -> np.ndarray:
    """Return the logits of all positions, with the prompt fed ``chunk`` tokens at a time, over the wire format."""
    sequence = TokenSequence(tokens, np.arange(runner.n_blocks)[::-1])
    parts = []
    while sequence.pending:
        batch: Batch = unpack(pack(sequence.next_batch(chunk, all_logits=True)))
        parts.append(runner.run(batch))
    return np.concatenate(parts)


def run_on(
    path: Path,
    tokens: Sequence[int],
    weights: Sequence[float],
    chunk: int = 1000,
    kv_type: str = "f32",
    make: Makers = ReferenceBackend,
    grid: Grid | None = None,
    experts: str = "off",
) -> list[np.ndarray]:
    """Return every rank's logits, on as many threads as there are weights; see `Runner.run` for who has them."""

    def main(world: World) -> np.ndarray:
        runner, _ = open_runner(world, path, weights, kv_type=kv_type, make=make, grid=grid, experts=experts)
        return logits_of(runner, tokens, chunk)

    return run_threads(len(weights), main)


def rounded_to_int8(x: np.ndarray) -> np.ndarray:
    """Return activations as int8 kernels see them: 32 numbers share a factor; float64."""
    n = x.shape[-1]
    groups = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % 32)]).reshape(*x.shape[:-1], -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    q = np.rint(groups * inverse).astype(np.float64) * (top / np.float32(127))
    return q.reshape(*x.shape[:-1], -1)[..., :n]


def nmse(x: np.ndarray, reference: np.ndarray) -> float:
    """Return the squared error over the squared size."""
    a, b = x.astype(np.float64), reference.astype(np.float64)
    return float(((a - b) ** 2).sum() / (b**2).sum())
