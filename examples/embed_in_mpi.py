"""A model inside an MPI program: all ranks hold one model together and call it collectively.

mpirun -n 4 python -m mpi4py examples/embed_in_mpi.py [model.gguf]
"""

import sys

from mpi4py import MPI

from mpillama import LLM, GenerationParams, UserError

comm = MPI.COMM_WORLD


def say(*words):
    """Print on one rank only; every rank has the same results."""
    if comm.rank == 0:
        print(*words, flush=True)


# A simulation of sorts: each rank has a number, and the model is asked about their sum.
total = comm.allreduce(comm.rank + 1)

with LLM(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
    say(f"{llm.name} on {llm.size} ranks, {llm.n_ctx} tokens of context")

    # Prompts are taken from rank 0; the completions come to every rank.
    prompts = [f"Once upon a time, there were {total} cats.", "One day, a dog"]
    params = GenerationParams(max_tokens=24, temperature=0)
    completions = llm.generate(prompts if comm.rank == 0 else None, params)
    for prompt, completion in zip(prompts, completions, strict=True):
        say(f"{prompt}|{completion.text}| ({completion.finish_reason}, {completion.usage.n_generated} tokens)")

    # A stream is iterated by all ranks, each of which sees all of it.
    for piece in llm.stream("The sun", params):
        if comm.rank == 0:
            print(piece.text, end="", flush=True)
    say()

    # Vectors for every text; each rank works on with its own share of them.
    vectors = llm.embed(["a cat", "a kitten", "the rain", "a storm"])
    mine = vectors[comm.rank :: comm.size]
    nearest = comm.gather((mine @ vectors.T).tolist())
    say(f"{sum(map(len, nearest or []))} rows of similarities")

    # A mistake is an exception on every rank, after which the model goes on.
    try:
        llm.generate("word " * 100_000)
    except UserError as error:
        say(f"refused: {error}")

say("MPI goes on:", comm.allreduce(1) == comm.size)
