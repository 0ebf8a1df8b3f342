"""A table of strong scaling: the same model on more and more ranks, measured on this host and predicted by `plan`.

    python examples/scaling.py                                     # llama-1b:Q4_0 on 1, 2 and 4 ranks
    python examples/scaling.py --shape qwen3-8b:Q4_K_M --ranks 1,2,4,8 -p 512 -n 64 --rounds 3
    python examples/scaling.py --ranks "" --cluster llama-70b:Q4_K_M,a100-80g,hdr,4,1

For each number of ranks `mpillama bench` and `mpillama plan --measure` (which measures the CPUs with that many ranks,
and predicts) run one after the other, several times in alternation; the ratio is the median of measured / predicted.
Each ``--cluster SHAPE,DEVICE,LINK,GPUS,HOSTS`` adds a row for a cluster that is not at hand: nobody has measured those.
Random weights: no files are needed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

MPILLAMA = [sys.executable, "-m", "mpillama"]
CLUSTERS = (
    "llama-8b:Q4_K_M,a100-80g,hdr,1,1",
    "llama-8b:Q4_K_M,a100-80g,hdr,4,1",
    "llama-70b:Q4_K_M,a100-80g,hdr,4,1",
    "llama-70b:Q4_K_M,a100-80g,hdr,4,4",
    "llama-405b:Q8_0,h100,ndr,8,1",
    "llama-405b:Q8_0,h100,ndr,8,4",
)
KINDS = {"prompt": "prefill_tokens_per_second", "generation": "decode_tokens_per_second"}


def run(command: list[str]) -> str:
    """Return what a command prints; ends the program if it fails."""
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        sys.exit(f"{' '.join(command)}: {told.stderr.strip() or told.stdout.strip()}")
    return told.stdout


def predicted(shape: str, work: list[str], cluster: list[str], tp: int) -> dict[str, float]:
    """Return the tokens per second that `plan` predicts of ``tp`` ranks that share every weight, or of its best layout
    if that is 0."""
    found: dict[str, Any] = json.loads(run([*MPILLAMA, "plan", "--shape", shape, *work, *cluster, "--json"]))
    layout = next(one for one in found["layouts"] if not tp or (one["tp"], one["pp"], one["dp"]) == (tp, 1, 1))
    return {kind: layout[field] for kind, field in KINDS.items()}


def measured(shape: str, args: argparse.Namespace, n_ranks: int) -> dict[str, float]:
    """Return the tokens per second that `bench` measures: of a prompt, and of generation after such a prompt."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun") or sys.exit("there is no mpirun")
    launch = [mpirun, "-n", str(n_ranks), *MPILLAMA] if n_ranks > 1 else MPILLAMA
    bench = [*launch, "bench", "--shape", shape, "-r", str(args.r), "-o", "jsonl", "-sm", "tensor"]
    rows = run([*bench, "-p", str(args.p), "-n", str(args.n), "-d", f"0,{args.p}"]).splitlines()
    speeds = {(row["n_gen"] > 0, row["n_depth"]): row["avg_ts"] for row in map(json.loads, rows)}
    return {"prompt": speeds[False, 0], "generation": speeds[True, args.p]}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-1b:Q4_0", help="model and type (default: %(default)s)")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks on this host (default: %(default)s)")
    parser.add_argument("-p", type=int, default=256, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("-n", type=int, default=32, help="tokens generated after it (default: %(default)s)")
    parser.add_argument("-r", type=int, default=2, help="repetitions of a test in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of prediction and measurement (default: %(default)s)")
    parser.add_argument("--cluster", action="append", help="SHAPE,DEVICE,LINK,GPUS,HOSTS; replaces the built-in list")
    args = parser.parse_args()
    work = ["-p", str(args.p), "-n", str(args.n)]

    numbers = [int(n) for n in args.ranks.split(",") if n]
    if numbers:
        print(f"{args.shape}, {args.p} + {args.n} tokens, on this host; t/s of prompt and generation\n")
        print("| ranks | measured prompt | predicted | ratio | measured generation | predicted | ratio |")
        print("|---|---|---|---|---|---|---|")
    for n_ranks in numbers:
        here = ["--measure", "--ranks-per-host", str(n_ranks)]
        pairs = [
            (measured(args.shape, args, n_ranks), predicted(args.shape, work, here, n_ranks))
            for _ in range(args.rounds)
        ]
        cells = [str(n_ranks)]
        for kind in KINDS:
            ours, plan = (median(pair[i][kind] for pair in pairs) for i in (0, 1))
            ratio = median(pair[0][kind] / pair[1][kind] for pair in pairs)
            cells += [f"{ours:.3g}", f"{plan:.3g}", f"{ratio:.2f}"]
        print("|", " | ".join(cells), "|", flush=True)

    print("\nNot measured; what plan predicts of its best layout on clusters that were not at hand\n")
    print("| model | GPUs | predicted prompt t/s | predicted generation t/s |")
    print("|---|---|---|---|")
    for text in args.cluster or CLUSTERS:
        shape, device, link, gpus, hosts = text.split(",")
        flags = ["--device", device, "--between", link, "--gpus", gpus, "--hosts", hosts]
        speeds = predicted(shape, work, flags, 0)
        words = [shape, f"{hosts} x {gpus} {device}, {link}", *(f"{speeds[kind]:.3g}" for kind in KINDS)]
        print("|", " | ".join(words), "|", flush=True)


if __name__ == "__main__":
    main()
