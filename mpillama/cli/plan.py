"""`mpillama plan`: what a model would take and reach on a cluster; needs no MPI, no GPU and no weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from mpillama.bench.shapes import shape_header, split_spec
from mpillama.cli.session import model_path
from mpillama.errors import UserError
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import GGMLType
from mpillama.plan.cluster import Cluster, make_cluster, read_cluster
from mpillama.plan.layouts import Planner, Workload
from mpillama.plan.measure import measurable
from mpillama.plan.report import as_json, as_text, job_script
from mpillama.plan.walk import PlanModel

# Flag -> table and entry; a rate that is given is what is reached.
_NUMBERS = {
    "memory": ("device", "memory_gb"),
    "memory_gbps": ("device", "memory_gbps"),
    "matrix_tflops": ("device", "matrix_tflops"),
    "op_us": ("device", "op_us"),
    "within_us": ("within", "latency_us"),
    "within_gbps": ("within", "gbps"),
    "between_us": ("between", "latency_us"),
    "between_gbps": ("between", "gbps"),
}
_MEASURED_TYPES = 4
_REACHED = {"memory_gbps": "memory_reach", "matrix_tflops": "matrix_reach"}


def run(args: Namespace) -> int:
    """Print the plan; returns 0, or 1 if nothing fits."""
    model, flag = _model(args)
    cluster = _cluster(args, model)
    work = Workload(
        args.n_prompt,
        args.n_gen,
        args.parallel,
        args.ctx_size or min(model.cfg.n_ctx_train, max(4096, args.n_prompt + args.n_gen)),
        args.ubatch_size,
        args.cache_type_k,
        args.cache_type_v,
        args.pipelined,
    )
    planner = Planner(model, cluster, work)
    layouts = planner.layouts()
    if args.json:
        print(json.dumps(as_json(planner, layouts), indent=1))
    else:
        print("\n".join(as_text(planner, layouts)))
    best = layouts[0]
    if args.sbatch and best.fits:
        _write(args.sbatch, job_script(planner, best, flag))
    return 0 if best.fits else 1


def _model(args: Namespace) -> tuple[PlanModel, str]:
    """Return the model, and the flag that names it in a job script."""
    if args.shape:
        name, kind = split_spec(args.shape)
        return PlanModel(
            f"{name}:{kind}", shape_header(args.shape), args.ctx_size
        ), '-m "${MODEL:?path of the GGUF file}"'
    path = model_path(args)
    header = read_header(path)
    for key, value in args.override_kv:
        header.metadata[key] = value  # type: ignore[index]
    given = f"-hf {args.hf_repo}" if args.hf_repo else f"-m {path.absolute()}" if args.model else ""
    return PlanModel(path.name, header, args.ctx_size), given


def _cluster(args: Namespace, model: PlanModel) -> Cluster:
    source = "the flags"
    tables: dict[str, Any] = {}
    if args.cluster:
        tables, source = read_cluster(args.cluster), f"--cluster {args.cluster}"
    if args.hosts:
        tables["hosts"] = args.hosts
    per_host = args.gpus or args.ranks_per_host
    if per_host:
        tables["ranks_per_host"] = per_host
    if args.gpus and not args.device and not args.cluster:
        tables["device"] = "a100-40g"
    for name in ("device", "within", "between"):
        if getattr(args, name):
            tables[name] = getattr(args, name)
    if args.measure:
        tables |= _measured(tables.get("ranks_per_host", 1), model, args)
    for dest, (table, entry) in _NUMBERS.items():
        value = getattr(args, dest)
        if value is None:
            continue
        found = tables.get(table, {})
        found = {"name": found} if isinstance(found, str) else dict(found)
        found.setdefault("name", "cpu" if table == "device" else _default(args, tables, table))
        found[entry] = value
        if dest in _REACHED:
            found[_REACHED[dest]] = 1.0
        tables[table] = found
    return make_cluster(tables, source)


def _measured(n_ranks: int, model: PlanModel, args: Namespace) -> dict[str, Any]:
    """Let `mpillama doctor --save` measure this machine with ``n_ranks`` ranks, and return the tables it writes.

    Raises:
        UserError: there is no mpirun, or it does not get that far.
    """
    types = measurable(model)[:_MEASURED_TYPES] or [GGMLType.Q4_K]
    beside = Path(sys.executable).with_name("mpirun")
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    if n_ranks > 1 and not launcher:
        raise UserError("--measure of several ranks needs mpirun; pip install mpich provides one")
    with tempfile.TemporaryDirectory(prefix="mpillama-plan-") as folder:
        file = Path(folder, "cluster.toml")
        command = [str(launcher), "-n", str(n_ranks)] if n_ranks > 1 else []
        command += [sys.executable, "-m", "mpillama", "doctor", "--save", str(file), "--backend", args.backend]
        command += ["-t", str(args.threads), "--types", ",".join(type.name for type in types)]
        told = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if not file.exists():
            lines = (told.stderr or told.stdout).strip().splitlines() or [f"exit code {told.returncode}"]
            raise UserError(f"--measure: {' '.join(command[:3])} … doctor says: {lines[-1]}")
        tables = read_cluster(file)
    del tables["hosts"]
    return tables


def _default(args: Namespace, tables: dict[str, Any], table: str) -> str:
    """Return the name of the link that there is without a word about it."""
    plain = make_cluster({"device": tables.get("device", "cpu")}, "the flags")
    return plain.within.name if table == "within" else plain.between.name


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise UserError(f"--sbatch {path}: {error.strerror}") from None
