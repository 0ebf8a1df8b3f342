"""What `mpillama plan` says: as text for people, as JSON for programs, and as a job script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mpillama.plan.cluster import GIB, Cluster
from mpillama.plan.cost import CATEGORIES
from mpillama.plan.layouts import Layout, Planner
from mpillama.plan.shapes import Event
from mpillama.plan.walk import EMBEDDING, HEAD

# Of layouts that fit; the table says how many it leaves out.
_SHOWN = 12


def collectives(planner: Planner, layout: Layout) -> list[dict[str, Any]]:
    """Return the collectives of a step of generation in order, alike ones of alike blocks together.

    Each has its kind, the product it completes, its bytes, and how often it comes in a step.
    """
    walk = planner.walks(layout.tp, planner.decode_step(-(-planner.work.n_seqs // layout.dp)))[0]
    counts: Counter[tuple[str, str, str, float]] = Counter()
    for event, times in walk.all(planner.model):
        if event.is_collective:
            counts[_place(event), event.kind, event.what, event.act_bytes] += times
    return [
        {"in": place, "kind": kind, "after": what, "bytes": int(nbytes), "times": times}
        for (place, kind, what, nbytes), times in counts.items()
    ]


def _place(event: Event) -> str:
    return event.part if event.part in (EMBEDDING, HEAD) else "blocks"


def work_per_step(planner: Planner, layout: Layout) -> dict[str, dict[str, float]]:
    """Return what the busiest rank of a tensor-parallel group does, all stages together, by kind of step."""
    n_seqs = -(-planner.work.n_seqs // layout.dp)
    result = {}
    for name, step in (("prompt", planner.prefill_step(n_seqs)), ("generation", planner.decode_step(n_seqs))):
        walk = planner.walks(layout.tp, step)[-1]
        sums = {"tokens": float(step[0] * step[1]), "flops": 0.0, "weight_bytes": 0.0, "collective_bytes": 0.0}
        sums |= {"ops": 0.0, "collectives": 0.0}
        for event, times in walk.all(planner.model):
            sums["flops"] += event.flops * times
            sums["weight_bytes"] += event.weight_bytes * times
            sums["collectives" if event.is_collective else "ops"] += times
            sums["collective_bytes"] += event.act_bytes * times * event.is_collective
        result[name] = {**sums, "buffer_bytes": float(walk.buffers)}
    return result


def as_json(planner: Planner, layouts: Sequence[Layout]) -> dict[str, Any]:
    """Return all that is known."""
    model, best = planner.model, layouts[0]
    return {
        "model": {"name": model.name, "n_params": model.n_params, "bytes": model.nbytes, "n_layer": model.cfg.n_layer},
        "cluster": asdict(planner.cluster),
        "workload": asdict(planner.work),
        "layouts": [_layout_json(layout) for layout in layouts],
        "best": {
            **_layout_json(best),
            "why": why(planner, layouts),
            "collectives": collectives(planner, best),
            "steps": work_per_step(planner, best),
            "weights_per_rank_of_a_replica": list(best.weights_per_rank),
        }
        if best.fits
        else None,
    }


def _layout_json(layout: Layout) -> dict[str, Any]:
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "hosts_of_a_tp_group": layout.span.hosts,
        "fits": layout.fits,
        "memory": asdict(layout.memory),
        "prefill_tokens_per_second": layout.prefill,
        "decode_tokens_per_second": layout.decode,
        "seconds": layout.seconds,
        "seconds_of_a_generation_step": dict(layout.decode_cost.seconds),
        "seconds_of_all_prompts": dict(layout.prefill_cost.seconds),
    }


def as_text(planner: Planner, layouts: Sequence[Layout]) -> list[str]:
    """Return lines for people."""
    model, work, cluster = planner.model, planner.work, planner.cluster
    fitting = [layout for layout in layouts if layout.fits]
    lines = [
        f"model    {model.name}: {_count(model.n_params)} weights, {_size(model.nbytes)}, {model.cfg.n_layer} blocks",
        f"cluster  {_cluster_text(cluster)}",
        f"work     {work.n_seqs} sequence{'s' * (work.n_seqs > 1)} of {work.n_prompt} + {work.n_gen} tokens, context "
        f"{work.n_ctx}, KV {work.type_k}/{work.type_v}, {work.n_ubatch} tokens a step",
        "",
    ]
    lines += _layout_table(fitting[:_SHOWN] or layouts[:3])
    more = len(fitting) - _SHOWN
    lines += [f"  and {more} more that fit (--json has all)"] if more > 0 else []
    n_not = len(layouts) - len(fitting)
    lines += [f"  {n_not} of {len(layouts)} layouts do not fit"] if n_not else []
    if not fitting:
        least = min(layouts, key=lambda layout: layout.memory.total)
        return [*lines, "", "nothing fits: " + _advice(least)]
    best = fitting[0]
    lines += ["", f"best     {best.name}: {why(planner, layouts)}"]
    lines += ["", "collectives of a step of generation (bytes of the result on each rank)"]
    found = collectives(planner, best)
    rows = [(row["in"], row["kind"], row["after"], f"{row['bytes']:,}", f"x {row['times']}") for row in found]
    lines += _table(("in", "kind", "after", "bytes", "times"), rows) if rows else ["  none"]
    if rows:
        n_calls, n_bytes = sum(row["times"] for row in found), sum(row["bytes"] * row["times"] for row in found)
        tokens = -(-work.n_seqs // best.dp)
        lines.append(f"  in all {n_calls} calls, {n_bytes:,} bytes for {tokens} token{'s' * (tokens > 1)}")
    lines += [f"  and {best.pp - 1} sends of {4 * model.cfg.n_embd:,} bytes a token"] if best.pp > 1 else []
    lines += ["", "work of the busiest rank of a tensor-parallel group in one step, all stages together"]
    lines += _table(
        ("step", "tokens", "GFLOP", "weights and KV read", "ops", "collectives", "buffers"),
        [
            (
                name,
                f"{row['tokens']:.0f}",
                f"{row['flops'] / 1e9:.3g}",
                _size(row["weight_bytes"]),
                f"{row['ops']:.0f}",
                f"{row['collectives']:.0f} ({_size(row['collective_bytes'])})",
                _size(row["buffer_bytes"]),
            )
            for name, row in work_per_step(planner, best).items()
        ],
    )
    return [*lines, "", "Predicted by the cost model of docs/clusters.md; rates are those of the cluster line."]


def why(planner: Planner, layouts: Sequence[Layout]) -> str:
    """Return in words what the best layout's time goes into, and how much slower the best of another kind is."""
    best = layouts[0]
    total = best.decode_cost.total
    shares = [(best.decode_cost.seconds.get(category, 0.0) / total, category) for category in CATEGORIES]
    spent = ", ".join(
        f"{100 * share:.0f} % {category}" for share, category in sorted(shares, reverse=True) if share > 0.02
    )
    text = f"a step of generation takes {1e3 * total:.3g} ms ({spent})"
    others = [x for x in layouts[1:] if x.fits and x.tp != best.tp]
    if others:
        second = min(others, key=lambda layout: layout.seconds)
        text += f"; {second.name} would take {second.seconds / best.seconds:.2f} times as long for the whole work"
    small = [x for x in layouts if not x.fits and x.seconds < best.seconds]
    if small:
        text += f"; {len(small)} faster layout{'s' * (len(small) > 1)} would not fit"
    idle = planner.work.n_seqs < best.dp
    return text + (f"; {best.dp - planner.work.n_seqs} replicas have nothing to do" if idle else "")


def _advice(least: Layout) -> str:
    memory = least.memory
    if memory.total - memory.kv > memory.available:
        return (
            f"{least.name} needs {_size(memory.weights)} for weights on the fullest rank, of "
            f"{_size(memory.available)}; take more hosts, or a type with fewer bits"
        )
    return (
        f"{least.name} needs {_size(memory.total)} on the fullest rank, of {_size(memory.available)}; with -c "
        f"{memory.max_ctx} or fewer sequences (-np) it fits"
    )


def _layout_table(layouts: Sequence[Layout]) -> list[str]:
    head = ("TP", "PP", "DP", "TP spans", "weights", "KV", "buffers", "needed", "of", "max context", "max sequences")
    rows = [
        (
            f"{x.tp}",
            f"{x.pp}",
            f"{x.dp}",
            f"{x.span.hosts} hosts" if x.span.hosts > 1 else "1 host",
            _size(x.memory.weights),
            _size(x.memory.kv),
            _size(x.memory.buffers),
            _size(x.memory.total),
            _size(x.memory.available),
            f"{x.memory.max_ctx:,}",
            f"{x.memory.max_seqs:,}",
            f"{x.prefill:,.0f}",
            f"{x.decode:,.1f}",
            "" if x.fits else "does not fit",
        )
        for x in layouts
    ]
    return _table((*head, "prompt t/s", "generation t/s", ""), rows)


def _cluster_text(cluster: Cluster) -> str:
    device, within, between = cluster.device, cluster.within, cluster.between
    measured = f", {', '.join(device.types)} as measured" if device.types else ""
    return (
        f"{cluster.hosts} host{'s' * (cluster.hosts > 1)} x {cluster.per_host} {device.name} "
        f"({device.memory_gb:.4g} GiB, {device.memory_gbps:.4g} GB/s x {device.memory_reach:g}, "
        f"{device.matrix_tflops:.4g} Tflop/s x {device.matrix_reach:g}, "
        f"{device.op_us:.3g} us an op{measured}); within a host {within.name} "
        f"({within.latency_us:.3g} us, {within.gbps:.3g} GB/s), between hosts {between.name} "
        f"({between.latency_us:.3g} us, {between.gbps:.3g} GB/s)"
    )


def _count(n: int) -> str:
    return f"{n / 1e9:,.1f} billion" if n >= 1e9 else f"{n / 1e6:.1f} million"


def _size(n: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n < 1000 * size else f"{n / size:.0f} {unit}"
    return f"{n:.0f} B"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return [f"  {line.rstrip()}" for line in lines]


def job_script(planner: Planner, layout: Layout, model: str, program: str = "mpillama") -> str:
    """Return a Slurm script for a layout; ``model`` is the flag and value that name the model."""
    cluster = planner.cluster
    is_gpu = cluster.device.name != "cpu"
    given = {"--tp": layout.tp, "--pp": layout.pp, "--dp": layout.dp}
    # Tensor parallelism over all ranks of a host is what runs without flags.
    plain = cluster.hosts == 1 and layout.tp == cluster.n_ranks
    layout_flags = "" if plain else " ".join(f"{flag} {n}" for flag, n in given.items()) + " "
    command = [
        f"    {program} generate {model} {layout_flags}-c {planner.work.n_ctx} \\",
        f'    -p "${{PROMPT:-Once upon a time}}" -n {planner.work.n_gen}',
    ]
    if planner.work.n_seqs > 1 or layout.dp > 1:
        # Of each replica.
        n_seqs = -(-planner.work.n_seqs // layout.dp)
        command = [
            f"    {program} batch {model} {layout_flags}-np {n_seqs} -c {n_seqs * planner.work.n_ctx} \\",
            '    -i "${REQUESTS:-requests.jsonl}" -o "${RESULTS:-results.jsonl}"',
        ]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {planner.model.name} on {cluster.hosts} x {cluster.per_host} {cluster.device.name}, as planned by",
            f"# mpillama plan: about {layout.prefill:,.0f} tokens/s of prompts, {layout.decode:,.1f} generated.",
            "#SBATCH --job-name=mpillama",
            f"#SBATCH --nodes={cluster.hosts}",
            f"#SBATCH --ntasks-per-node={cluster.per_host}",
            *([f"#SBATCH --gpus-per-node={cluster.per_host}"] if is_gpu else ["#SBATCH --exclusive"]),
            "#SBATCH --time=01:00:00",
            "#SBATCH --output=%x-%j.out",
            "# pmix is for Open MPI, pmi2 for MPICH, MVAPICH and Intel MPI.",
            "# Without -K ranks wait for one that was killed; srun does not inherit --cpus-per-task.",
            'srun -K1 --mpi="${MPILLAMA_PMI:-pmix}" ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \\',
            *command,
            "",
        ]
    )
