"""A job over a data set: groups of ranks each hold a model, and take every n-th line of a JSONL file.

mpirun -n 8 python -m mpi4py examples/map_dataset.py prompts.jsonl answers.jsonl --ranks-per-model 2 -m model.gguf

Lines are {"prompt": …}; answers are written with the line's number, in any order. For a file of requests that has to
survive kills and time limits, there is `mpillama batch`.
"""

import argparse
import json

from mpi4py import MPI

from mpillama import LLM, GenerationParams

parser = argparse.ArgumentParser()
parser.add_argument("input")
parser.add_argument("output")
parser.add_argument("-m", "--model")
parser.add_argument("--ranks-per-model", type=int, default=1)
parser.add_argument("--max-tokens", type=int, default=32)
args = parser.parse_args()

world = MPI.COMM_WORLD
# Neighbours share a model; with 1 this is MPI.COMM_SELF.
group_number, n_groups = world.rank // args.ranks_per_model, -(-world.size // args.ranks_per_model)
group = world.Split(group_number)

with open(args.input, encoding="utf-8") as file:
    lines = [(number, json.loads(line)) for number, line in enumerate(file)][group_number::n_groups]

with LLM(args.model, comm=group) as llm:
    params = GenerationParams(max_tokens=args.max_tokens, temperature=0)
    completions = llm.generate([line["prompt"] for _, line in lines], params)

# One rank of each group speaks for it; MPI-IO puts the texts one after the other.
text = "".join(
    json.dumps({"line": number, "prompt": line["prompt"], "text": completion.text}) + "\n"
    for (number, line), completion in zip(lines, completions, strict=True)
    if group.rank == 0
).encode()
out = MPI.File.Open(world, args.output, MPI.MODE_CREATE | MPI.MODE_WRONLY)
out.Set_size(0)
out.Write_ordered(text)
out.Close()

n_tokens = world.reduce(sum(c.usage.n_generated for c in completions) if group.rank == 0 else 0)
if world.rank == 0:
    print(f"{n_groups} models wrote {n_tokens} tokens")
