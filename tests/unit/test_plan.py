"""Plans: the tape of a model's text against real runs, bytes against shards, and what fits against what is asked."""

import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest

from mpillama.backends.reference import ReferenceBackend
from mpillama.bench.model import describe, step_bytes
from mpillama.bench.shapes import shape_header
from mpillama.cli.main import main
from mpillama.comm.metered import MeteredGroup
from mpillama.comm.threads import run_threads
from mpillama.config import read_config
from mpillama.errors import UsageError
from mpillama.gguf.reader import read_header
from mpillama.loader import load_weights
from mpillama.ops import Ops
from mpillama.plan.cluster import BETWEEN, Link, as_toml, make_cluster, read_cluster
from mpillama.plan.cost import Span, allreduce_seconds, group_span
from mpillama.plan.layouts import Planner, Workload, grids, stages
from mpillama.plan.measure import fit_link
from mpillama.plan.report import as_json, as_text, collectives, job_script
from mpillama.plan.walk import PlanModel, step_batch, walk
from mpillama.runner import Runner
from mpillama.sharding import Sharding
from mpillama.tensors import model_tensors
from shared import shared
from tiny import write_llama

H100 = {"hosts": 64, "ranks_per_host": 8, "device": "h100", "between": "ndr"}
GOLDEN = ("llama-moe", "qwen2moe-moe", "gemma3-dense", "olmo2-dense", "gpt-oss-moe", "granite-dense")


def shape_model(spec, n_ctx=0):
    return PlanModel(spec, shape_header(spec), n_ctx)


def planner(spec, cluster, **work):
    return Planner(shape_model(spec), make_cluster(cluster, "test"), Workload(**work))


def traffic_of(path, n_ranks, batch):
    """Run a model for real; returns the traffic of each rank, and what each did in its backend."""
    header = read_header(path)
    cfg = read_config(header)
    tensors = model_tensors(header, cfg)
    sharding = Sharding(cfg, (1.0,) * n_ranks)

    def rank(world):
        group, backend = MeteredGroup(world.group()), ReferenceBackend()
        weights, _ = load_weights(header.paths, tensors, sharding, world.rank, backend)
        n_kv = sharding.cuts["k"].width(world.rank) // cfg.n_embd_head_k
        logits = Runner(cfg, weights, Ops(backend, group), n_kv, 64, "f32", "f32").run(batch)
        return group.take(), logits.shape

    return run_threads(n_ranks, rank)


def check_tape(path, n_ranks, rng):
    n_tokens = int(rng.integers(1, 9))
    batch = step_batch(1, n_tokens, 0, int(rng.integers(1, n_tokens + 1)))
    batch = replace(batch, block_tables=np.array([[0, 1]], np.int32))
    model = PlanModel("m", read_header(path))
    sharding = Sharding(model.cfg, (1.0,) * n_ranks)
    for rank, (real, _) in enumerate(traffic_of(path, n_ranks, batch)):
        events = list(walk(model, sharding, rank, batch, "f32", "f32").all(model))
        joint = [(event, times) for event, times in events if event.is_collective]
        assert sum(times for _, times in joint) == real.calls
        assert sum(event.act_bytes * times for event, times in joint) == real.nbytes


@pytest.mark.parametrize("name", GOLDEN)
def test_collectives_are_those_of_a_real_run(name, rng):
    check_tape(shared("golden", f"{name}.gguf"), int(rng.integers(2, 5)), rng)


def test_collectives_of_many_blocks_and_uneven_cuts(tmp_path, rng):
    """Seven heads over three ranks; five blocks, of which three are walked once."""
    path = write_llama(tmp_path / "m.gguf", rng, n_layer=5, n_head=7, n_head_kv=7, n_head_dim=32, n_embd=224, n_ff=352)
    assert len(PlanModel("m", read_header(path)).examples) == 3
    check_tape(path, 3, rng)


def test_where_collectives_come_from():
    """One after attention and one after the feed-forward network of each block, one for the embedding, the logits."""
    model = planner("llama-8b:Q4_K_M", {"ranks_per_host": 4})
    found = {(row["kind"], row["after"]): row for row in collectives(model, model.layout(4, 1, 1))}
    # The embedding's sum and the last block's are taken where they are needed: in the next part.
    assert found["allreduce", "token_embd"]["times"] == 1
    assert found["allreduce", "attn_output"]["times"] == 32
    assert found["allgather", "output"]["bytes"] == 4 * 128256
    rows = [row for row in collectives(model, model.layout(4, 1, 1)) if row["after"] == "ffn_down"]
    assert sum(row["times"] for row in rows) == 32
    assert {row["bytes"] for row in rows} == {4 * 4096}
    assert collectives(model, model.layout(1, 1, 4)) == []


@pytest.mark.parametrize("spec", ["llama-1b:Q4_K_M", "qwen3-30b-a3b:Q4_K_M", "gpt-oss-20b", "qwen2.5-0.5b:Q4_0"])
def test_weights_read_by_a_token(spec):
    """The bytes that bench counts from the header are those that the model's text multiplies with."""
    n_ranks = 4
    bench = describe(spec, None, (), n_ranks, 64, ReferenceBackend())
    expected = step_bytes(bench, Sharding(bench.cfg, bench.shares)).of(1, 1)
    model = shape_model(spec)
    read = flops = 0.0
    for rank in range(n_ranks):
        for event, times in walk(
            model, Sharding(model.cfg, (1.0,) * n_ranks), rank, step_batch(1, 1, 0), "f16", "f16"
        ).all(model):
            if event.type is not None:
                read += event.weight_bytes * times
                flops += event.flops * times
    # bench also counts norms and biases.
    assert read == pytest.approx(expected, rel=0.01)
    assert read <= expected
    if not model.cfg.n_expert and spec != "qwen2.5-0.5b:Q4_0":
        embedding = model.cfg.n_embd * model.cfg.n_vocab
        assert flops == pytest.approx(2 * (model.n_params - embedding), rel=0.001)


def test_attention_reads_what_it_sees():
    model = shape_model("gpt-oss-20b")
    n_past, n_new = 1000, 16
    found = walk(model, Sharding(model.cfg, (1.0,)), 0, step_batch(3, n_new, n_past), "f16", "q8_0")
    by_window = {
        model.cfg.windows[il]: next(e for e in found.parts[str(kind)] if e.kind == "attention")
        for kind, il in enumerate(model.examples)
    }
    token = 8 * 64 * (2 + 34 / 32)
    seen = np.arange(n_past + 1, n_past + n_new + 1)
    assert by_window[0].weight_bytes == pytest.approx(3 * token * seen[-1])
    assert by_window[0].flops == pytest.approx(3 * 2 * 64 * 128 * seen.sum())
    assert by_window[128].flops == pytest.approx(3 * 2 * 64 * 128 * np.minimum(seen, 128).sum())
    assert by_window[128].weight_bytes == pytest.approx(3 * token * (128 + n_new - 1))


def test_buffers_are_what_is_alive():
    """At its worst the gate, the up and their product are there with the residual, or the logits are."""
    model = shape_model("llama-1b:Q8_0")
    sharding = Sharding(model.cfg, (1.0,) * 2)
    one = walk(model, sharding, 0, step_batch(1, 512, 0), "f16", "f16").buffers
    ff, embd = 8192 // 2, 2048
    assert 4 * 512 * (3 * ff + embd) <= one <= 4 * 512 * (3 * ff + 5 * embd)
    assert walk(model, sharding, 0, step_batch(2, 512, 0), "f16", "f16").buffers == pytest.approx(2 * one, rel=0.1)


@pytest.mark.parametrize("spec", ["llama-3b:Q4_K_M", "qwen3-235b-a22b:Q4_K_M"])
def test_bytes_of_stages_and_ranks(spec, rng):
    model = planner(spec, {"ranks_per_host": 8})
    tp, pp = int(rng.choice([1, 2, 3, 5, 8])), int(rng.choice([1, 2, 3, 7]))
    sharding = Sharding(model.model.cfg, (1.0,) * tp)
    each = model.layout(tp, pp, 1).weights_per_rank
    whole = [sharding.bytes_of(model.model.tensors.values(), rank) for rank in range(tp)]
    # A tied head is on the first and the last stage.
    twice = sharding.bytes_of(model.model.outside(True, False), 0) if pp > 1 and spec.startswith("llama-3b") else 0
    assert len(each) == tp * pp
    assert sum(each) == pytest.approx(sum(whole) + twice * tp, rel=0.002)
    assert [len(blocks) for blocks in stages(28, 3)] == [10, 9, 9]


def test_grids():
    assert sorted(grids(4, 2)) == [(1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
    assert len(list(grids(512, 126))) == 49


def test_what_is_said_to_fit_fits():
    cluster = {"ranks_per_host": 4, "device": "a100-40g"}
    made = planner("llama-70b:Q4_K_M", cluster, n_ctx=1024)
    for grid in ((4, 1, 1), (2, 2, 1), (2, 1, 2)):
        memory = made.layout(*grid).memory
        assert memory.fits
        assert planner("llama-70b:Q4_K_M", cluster, n_ctx=memory.max_ctx).layout(*grid).fits
        assert not planner("llama-70b:Q4_K_M", cluster, n_ctx=memory.max_ctx + 64).layout(*grid).fits
    assert not made.layout(1, 1, 4).fits
    assert made.layout(1, 1, 4).memory.max_ctx == 0


def test_clusters_that_nobody_has_here_are_walked_at_once():
    began = time.process_time()
    dense = planner("llama-405b:BF16", H100, n_seqs=64)
    moe = planner("moe-1t:Q8_0", H100, n_seqs=64)
    for made, least in ((dense, 756), (moe, 1028)):
        layouts = made.layouts()
        assert layouts[0].fits
        text = "\n".join(as_text(made, layouts))
        assert "64 hosts x 8 h100" in text
        total = sum(layouts[0].weights_per_rank) * layouts[0].dp / (1 << 30)
        assert total >= least * layouts[0].dp
    assert time.process_time() - began < 20
    # A replica of the dense model needs a whole host; one rank cannot hold it.
    assert not any(layout.fits for layout in dense.layouts() if layout.tp * layout.pp < 10)


def test_more_bandwidth_or_less_latency_is_never_slower(rng):
    slow = {"hosts": 4, "ranks_per_host": 4, "device": "a100-80g", "between": "ethernet10"}
    base = planner("llama-8b:Q4_K_M", slow, n_seqs=8)
    better = planner("llama-8b:Q4_K_M", {**slow, "between": "ndr"}, n_seqs=8)
    for grid in grids(16, 32):
        a, b = base.layout(*grid), better.layout(*grid)
        assert b.decode >= a.decode
        assert b.prefill >= a.prefill
        assert (b.decode > a.decode) == (a.span.hosts > 1 or grid[0] * grid[1] > 4)
    pipelined = planner("llama-8b:Q4_K_M", slow, n_seqs=8, pipelined=True)
    assert pipelined.layout(4, 4, 1).decode > base.layout(4, 4, 1).decode


def test_where_groups_lie():
    cluster = make_cluster({"hosts": 3, "ranks_per_host": 4}, "test")
    assert group_span(cluster, 2) == Span(2, 1)
    assert group_span(cluster, 3) == Span(2, 2)  # ranks 3 to 5 are on two hosts
    assert group_span(cluster, 12) == Span(4, 3)


def test_a_link_is_what_its_measurement_was(rng):
    n_ranks = int(rng.integers(2, 17))
    link = Link("x", float(rng.uniform(0.5, 30)), float(rng.uniform(0.5, 10)))
    large = 1 << 24
    found = fit_link(n_ranks, allreduce_seconds(0, n_ranks, link), allreduce_seconds(large, n_ranks, link), large)
    if n_ranks > 3:
        # With two or three ranks doubling is as good as the other way.
        assert found["gbps"] == pytest.approx(link.gbps, rel=0.02)
    assert found["latency_us"] == pytest.approx(link.latency_us)


def test_cluster_files(tmp_path):
    types = {"Q4_K": {"gbps": 9.5, "tflops": 0.25}}
    cluster = make_cluster(
        {"hosts": 2, "ranks_per_host": 3, "device": {"name": "cpu", "op_us": 7, "types": types}}, "test"
    )
    path = tmp_path / "c.toml"
    path.write_text(as_toml(cluster))
    assert make_cluster(read_cluster(path), "file") == cluster
    own = {"name": "mine", "memory_gb": 16, "memory_gbps": 100, "matrix_tflops": 5}
    assert make_cluster({"device": own}, "test").device.gbps == pytest.approx(70)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hosts = 0", "hosts is 0"),
        ("hosts = 'many'", "positive integer"),
        ("nodes = 2", "unknown entry 'nodes'"),
        ("device = 'a100'", "a100-40g"),
        ("[device]\nname = 'h100'\nspeed = 2", "unknown entry 'speed'"),
        ("[within]\ngbps = -1", "above 0"),
        ("[device.types.Q4_K]\ngbps = 1", "gbps and tflops"),
        ("hosts = ", "not TOML"),
    ],
)
def test_errors_in_cluster_files(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        make_cluster(read_cluster(path), f"--cluster {path}")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_command(tmp_path, capsys):
    script = tmp_path / "job.sh"
    flags = ["plan", "--shape", "llama-70b", "--hosts", "4", "--gpus", "4", "--gpu-memory", "40G", "-np", "16"]
    assert main([*flags, "--json", "--sbatch", str(script)]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["best"]
    assert found["cluster"]["device"]["memory_gb"] == 40
    assert len(found["layouts"]) == 15
    assert best["fits"]
    assert best["tp"] * best["pp"] * best["dp"] == 16
    assert best["seconds"] == min(layout["seconds"] for layout in found["layouts"] if layout["fits"])
    n_seqs = -(-16 // best["dp"])
    layout = f"--tp {best['tp']} --pp {best['pp']} --dp {best['dp']} -np {n_seqs} -c {n_seqs * 4096}"
    assert re.search(rf"mpillama batch .* {layout} ", script.read_text())
    assert main([*flags, "--between-gbps", "0.1", "--memory-gbps", "1000", "--op-us", "0"]) == 0
    text = capsys.readouterr().out
    assert "1000 GB/s x 1," in text
    assert f"({BETWEEN['hdr'].latency_us:.3g} us, 0.1 GB/s)" in text
    assert main(["plan", "--shape", "llama-405b:BF16", "--gpus", "8"]) == 1
    assert "nothing fits" in capsys.readouterr().out
    assert main(["plan", "--shape", "llama-8b", "--device", "tpu"]) == 2
    assert "'tpu' is not known" in capsys.readouterr().err


def test_command_on_a_file(capsys):
    assert main(["plan", "--ranks-per-host", "2"]) == 0
    assert "demo.gguf" in capsys.readouterr().out


def test_job_script_of_all_ranks_in_one_group_needs_no_layout_flags():
    made = planner("llama-8b", {"ranks_per_host": 4, "device": "h100"})
    assert "--tp" not in job_script(made, made.layout(4, 1, 1), "-m x.gguf")
    assert "--gpus-per-node=4" in job_script(made, made.layout(4, 1, 1), "-m x.gguf")
    assert json.dumps(as_json(made, made.layouts()))
