"""The command line of bench: lists, ranges, llama-bench's defaults, and the cross product that they make."""

from __future__ import annotations

from argparse import Namespace
from itertools import pairwise

import pytest

from mpillama.bench.plan import Load, Test, cases, workloads
from mpillama.cli.bench_options import BENCH, check_bench, with_defaults
from mpillama.cli.commands import COMMANDS
from mpillama.cli.parser import parse
from mpillama.errors import UsageError


def bench(*argv: str) -> Namespace:
    name, namespace = parse(["bench", *argv], {})
    assert name == "bench"
    return with_defaults(namespace)


def test_defaults_are_llama_benchs():
    args = bench()
    assert (args.n_prompt, args.n_gen, args.pg, args.n_depth) == ((512,), (128,), (), (0,))
    assert (args.batch_size, args.ubatch_size, args.cache_type_k, args.cache_type_v) == (
        (2048,),
        (512,),
        ("f16",),
        ("f16",),
    )
    assert (args.repetitions, args.delay, args.no_warmup, args.output, args.output_err) == (5, 0, False, "md", None)
    assert (args.model, args.shape, args.tensor_split, args.threads) == ((), (), (), (-1,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", (7,)),
        ("1,2,4", (1, 2, 4)),
        ("1-4", (1, 2, 3, 4)),
        ("128-512+128", (128, 256, 384, 512)),
        ("1-20*3", (1, 3, 9)),
        ("0,8-9", (0, 8, 9)),
    ],
)
def test_lists_and_ranges(text, expected):
    assert bench("-p", text).n_prompt == expected
    assert bench("-p", "5", "-p", text).n_prompt == (5, *expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "x"], "-p: expected an integer"),
        (["-p", "4-1"], "range that grows"),
        (["-p", "0-8*2"], "range that grows"),
        (["-p", "1-8*1"], "range that grows"),
        (["-p", "1-8+0"], "range that grows"),
        (["-p", "1-99999"], "at most 1000"),
        (["-b", "0"], "-b: expected an integer of at least 1"),
        (["-pg", "512"], "two lengths"),
        (["-pg", "1,2,3"], "two lengths"),
        (["-ts", "1/x"], "separated by /"),
        (["-ts", "0/0"], "separated by /"),
        (["-r", "0"], "-r: expected"),
        (["-o", "xml"], "-o: expected"),
        (["-m", "a.gguf,"], "names separated by commas"),
        (["-ctk", "f16,f8"], "expected f32"),
        (["-p", "0", "-n", "0"], "nothing to run"),
        (["-p", "0", "-n", "0", "-pg", "0,0"], "nothing to run"),
        (["--plot-add", "x.json"], "--plot FILE"),
        (["--compare", "ollama"], "expected llama.cpp"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(UsageError) as caught:
        parse(["bench", *words], {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_and_splits():
    args = bench("-pg", "512,128", "-pg", "1,2", "-ts", "1/1,3/1,auto,memory", "-ctk", "f32,bf16")
    assert args.pg == ((512, 128), (1, 2))
    assert args.tensor_split == ((1.0, 1.0), (3.0, 1.0), "auto", "memory")
    assert args.cache_type_k == ("f32", "bf16")


def test_flags_that_llama_bench_has_and_generate_ignores():
    assert bench("--no-warmup").no_warmup is True
    assert bench("-o", "jsonl").output == "jsonl"
    assert bench("-nkvo").notes == ["-nkvo has no effect in mpillama"]
    assert {"-r", "-oe", "--delay", "--progress", "-d"} <= {name for option in BENCH for name in option.names}
    assert next(command for command in COMMANDS if command.name == "bench").check is check_bench


def test_names_of_tests():
    assert [test.name for test in workloads([512, 0], [128], [(64, 16), (0, 0)], [0, 4096])] == [
        "pp512",
        "tg128",
        "pp64+tg16",
        "pp512 @ d4096",
        "tg128 @ d4096",
        "pp64+tg16 @ d4096",
    ]
    assert Test(64, 16, 100).n_tokens == 80
    assert Test(64, 16, 100).n_ctx == 180
    several = Test(64, 16, 100, n_parallel=3)
    assert (several.name, several.n_tokens, several.n_ctx) == ("pp64+tg16 @ d100 x 3", 240, 3 * 192)


def test_cross_product_loads_as_seldom_as_possible(rng):
    sizes = rng.integers(1, 4, 6)
    loads = [Load(f"m{i}", False, (), -1) for i in range(sizes[0])]
    kinds = [[f"t{i}" for i in range(n)] for n in sizes[1:3]]
    n_batch, n_ubatch = ([2**i for i in range(n)] for n in sizes[3:5])
    tests = [Test(i + 1, 0) for i in range(sizes[5])]
    found = cases(loads, n_batch, n_ubatch, kinds[0], kinds[1], tests)
    assert len(found) == len(set(found)) == sizes.prod()
    assert sum(a.load != b.load for a, b in pairwise(found)) == len(loads) - 1
    caches = [(case.load, case.type_k, case.type_v) for case in found]
    assert sum(a != b for a, b in pairwise(caches)) == len(set(caches)) - 1
