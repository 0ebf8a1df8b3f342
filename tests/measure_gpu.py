"""Measure a GPU: how near mpillama comes to what its memory and its matrix units can do. Prints tables in Markdown.

    python tests/measure_gpu.py [--shapes llama-8b:Q4_K_M,…] [--out FILE] [--kernels] [--skip-bench]

Decoding is compared with a copy within the GPU's memory: it must read every weight once for each token. Prompts are
compared with a large bfloat16 product of the vendor's library: their multiplications, at least, must be done.
``--kernels`` says where the time of one step goes, kernel by kernel, without graphs, each timed by events. Exit code
3: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import run_gpu
from mpillama.backends import make_backend
from mpillama.backends.base import KV_BLOCK, Batch
from mpillama.backends.gpu.backend import GpuBackend
from mpillama.backends.gpu.device import Unit
from mpillama.bench.model import describe, load
from mpillama.comm.solo import SoloWorld
from mpillama.comm.staged import tensor_group
from mpillama.errors import UserError
from mpillama.gguf.types import GGMLType
from mpillama.grid import ONE_RANK
from mpillama.ops import Ops
from mpillama.partition import Partition
from mpillama.runner import Runner

SHAPES = "llama-8b:Q4_K_M,llama-8b:Q8_0,qwen3-30b-a3b:Q4_K_M"
PROMPTS = (512, 2048)
N_GEN = 128
_SIDE = 8192


def seconds(work: Callable[[], object], finish: Callable[[], None], least: float = 0.5) -> float:
    """Return the median time of a piece of work, after some of it for warming up."""
    times: list[float] = []
    for _ in range(3):
        work()
    finish()
    began = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < least:
        start = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - start)
    return median(times)


def matrix_tflops(backend: GpuBackend, side: int = _SIDE) -> float:
    """Return 1e12 operations per second of a bfloat16 product of random numbers, summed in float32; 0 without BLAS."""
    device = backend.device
    if not device.gemm_tokens:
        return 0.0
    # Bytes of bfloat16 numbers around 1: zeros would be faster.
    rng = np.random.default_rng(0)
    x, w = (
        (rng.standard_normal((side, side)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for _ in "xw"
    )
    a, b, out = device.upload(x), device.upload(w), device.empty((side, side))
    return 2 * side**3 / seconds(partial(device.gemm, a, b, out), device.synchronize) / 1e12


def prompt_flops(shape: str, n_tokens: int) -> float:
    """Return the operations that a prompt needs at least: products with weights, and half of each attention matrix."""
    model = describe(shape, None, (), 1, n_tokens, make_backend("reference"))
    cfg, total = model.cfg, 0.0
    for info in model.tensors.values():
        n = math.prod(info.shape)
        if len(info.shape) < 2 or info.name == "token_embd.weight":
            continue
        if "_exps." in info.name:
            n = n * cfg.n_expert_used // cfg.n_expert
        total += 2.0 * n * (1 if info.name.startswith("output.") else n_tokens)
    per_pair = 2.0 * cfg.n_head * (cfg.n_embd_head_k + cfg.n_embd_head_v)
    return total + cfg.n_layer * per_pair * n_tokens * (n_tokens + 1) / 2


def bench(backend: str, shape: str, *arguments: str, **env: str) -> list[dict[str, Any]]:
    """Return the rows of `mpillama bench`.

    Raises:
        UserError: it failed.
    """
    command = [
        sys.executable,
        "-m",
        "mpillama",
        "bench",
        "--backend",
        backend,
        "--shape",
        shape,
        "-o",
        "jsonl",
        *arguments,
    ]
    done = subprocess.run(command, cwd=run_gpu.ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])} failed with exit code {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def bench_table(backend: str, shapes: list[str], tflops: float, repetitions: int) -> list[str]:
    """Return a row for each test of each shape."""
    table = ["| shape | test | graphs | t/s | share of copy | share of bf16 |", "|---|---|---|---|---|---|"]
    for shape in shapes:
        prompts = ",".join(map(str, PROMPTS))
        many = ["-p", prompts, "-n", str(N_GEN), "-ub", str(max(PROMPTS)), "-r", str(repetitions)]
        few = ["-p", "0", "-n", str(N_GEN), "-r", str(repetitions)]
        for graphs, arguments in (("1", many), ("0", few)):
            try:
                rows = bench(backend, shape, *arguments, MPILLAMA_GRAPHS=graphs)
            except UserError as error:
                table.append(f"| {shape} | {error.line} | | | | |")
                continue
            for row in rows:
                decodes = row["n_gen"] > 0
                memory = f"{100 * row['stream_share']:.1f} %" if decodes and row["stream_share"] else ""
                flops = 0.0 if decodes else prompt_flops(shape, row["n_prompt"]) / row["n_prompt"] * row["avg_ts"]
                matrix = f"{100 * flops / tflops / 1e12:.1f} %" if flops and tflops else ""
                used = {"1": "yes", "0": "no"}[graphs] if decodes else ""
                speed = f"{row['avg_ts']:.1f} ± {row['stddev_ts']:.1f}"
                table.append(f"| {shape} | {row['test']} | {used} | {speed} | {memory} | {matrix} |")
                print(table[-1], file=sys.stderr, flush=True)
    return table


class Timed:
    """A device that times each launch and each product of its library by events."""

    def __init__(self, device: Any) -> None:
        import cupy

        self._device, self._event = device, partial(cupy.cuda.Event)
        self._stream = cupy.cuda.ExternalStream(device.stream)
        self.spans: list[tuple[str, Any, Any]] = []
        self.can_capture = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def _timed(self, name: str, call: Callable[[], None]) -> None:
        start, end = self._event(), self._event()
        start.record(self._stream)
        call()
        end.record(self._stream)
        self.spans.append((name, start, end))

    def launch(self, unit: Unit, kernel: str, *args: Any, **kwargs: Any) -> None:
        """Start a kernel."""
        types = [GGMLType(value).name for name, value in unit.defines if name.endswith("TYPE")]
        name = " ".join([kernel, *types])
        self._timed(name, partial(self._device.launch, unit, kernel, *args, **kwargs))

    def gemm(self, *args: Any) -> None:
        """Multiply."""
        self._timed("gemm (library)", partial(self._device.gemm, *args))

    def take(self) -> dict[str, tuple[int, float]]:
        """Return calls and microseconds of each kernel since the last call."""
        from cupy.cuda import get_elapsed_time

        self._device.synchronize()
        found: dict[str, tuple[int, float]] = {}
        for name, start, end in self.spans:
            calls, us = found.get(name, (0, 0.0))
            found[name] = calls + 1, us + 1e3 * get_elapsed_time(start, end)
        self.spans = []
        return found


def kernel_table(backend: str, shape: str) -> list[str]:
    """Return where the time of a token after 512 others, and of a prompt of 512, goes."""
    owner = make_backend(backend)
    assert isinstance(owner, GpuBackend)
    device = Timed(owner.device)
    timed = GpuBackend(device)
    n_ctx, n_prompt = 1024, 512
    model = describe(shape, None, (), 1, n_ctx, timed)
    partition = Partition(model.cfg, model.tensors, ONE_RANK, (1.0,))
    sharding, index = partition.of(0)
    weights = load(model, sharding, index, timed, lambda n: None)
    ops = Ops(timed, tensor_group(SoloWorld().group(), timed))
    runner = Runner(model.cfg, weights, ops, partition.n_head_kv(0), n_ctx, "f16", "f16")
    table = np.arange(n_ctx // KV_BLOCK, dtype=np.int32)[None]

    def step(first: int, n: int) -> None:
        tokens = np.arange(n, dtype=np.int32) * 7 % 1000
        lengths, rows = np.array([n], np.int32), np.array([n - 1], np.int32)
        runner.run(Batch(tokens, np.arange(first, first + n, dtype=np.int32), lengths, table, rows))

    lines = []
    for title, first, n in (("prompt of 512", 0, n_prompt), ("one token after 512", n_prompt, 1)):
        for _ in range(3):
            step(first, n)
        device.take()
        began = time.perf_counter()
        step(first, n)
        wall = 1e6 * (time.perf_counter() - began)
        found = device.take()
        total = sum(us for _, us in found.values())
        lines += ["", f"{shape}, {title}: {total:.0f} µs in kernels, {wall:.0f} µs in all (with the timing)", ""]
        lines += ["| kernel | calls | µs | share |", "|---|---|---|---|"]
        for name, (calls, us) in sorted(found.items(), key=lambda item: -item[1][1])[:16]:
            lines.append(f"| {name} | {calls} | {us:.0f} | {100 * us / total:.1f} % |")
    return lines


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "hip"), default="cuda")
    parser.add_argument("--shapes", default=SHAPES, metavar="NAME:TYPE,...", help=f"default: {SHAPES}")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--kernels", action="store_true", help="also time each kernel of a step of each shape")
    parser.add_argument("--skip-bench", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    if problem := run_gpu.no_gpu(args.backend):
        print(f"measure_gpu: {problem}", file=sys.stderr)
        return run_gpu.NO_GPU
    try:
        backend = make_backend(args.backend)
    except UserError as error:
        print(f"measure_gpu: {error.line}", file=sys.stderr)
        return error.exit_code
    assert isinstance(backend, GpuBackend)
    copy, tflops = backend.stream_gbps(1), matrix_tflops(backend)
    lines = [
        f"copy within memory: {copy:.0f} GB/s (read and written); bf16 product of {_SIDE}: {tflops:.0f} TFLOP/s",
        "",
    ]
    print(lines[0], file=sys.stderr, flush=True)
    del backend
    shapes = args.shapes.split(",")
    if not args.skip_bench:
        lines += bench_table(args.backend, shapes, tflops, args.repetitions)
    for shape in shapes if args.kernels else ():
        lines += kernel_table(args.backend, shape)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
