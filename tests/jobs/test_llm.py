"""`mpillama.LLM` inside MPI programs, and the examples."""

import json
from pathlib import Path

import numpy as np
import pytest

from job import run
from mpillama import LLM, GenerationParams, UserError
from server import Server

EXAMPLES = Path(__file__).parents[2] / "examples"
GREEDY = GenerationParams(max_tokens=12, temperature=0)
PROMPTS = ["Once upon a time", "One day, Lily", [5, 6, 7]]

# Every rank writes what it has seen; arguments that do not count on the others are None there.
PROGRAM = """
import json, sys
from mpi4py import MPI
from mpillama import LLM, GenerationParams, UserError
comm = MPI.COMM_WORLD
seen, errors = [], []
def wrong(make):
    try:
        make()
    except UserError as error:
        errors.append(str(error))
wrong(lambda: LLM("/nonexistent.gguf"))
wrong(lambda: LLM(cache_type_k="f33"))
wrong(lambda: LLM(tensor_split=[1] * 9))
with LLM(threads=1, chat_template="chatml", n_parallel=4) as llm:
    own = lambda value: value if llm.rank == 0 else None
    greedy = GenerationParams(max_tokens=12, temperature=0)
    for completion in llm.generate(own(["Once upon a time", "One day, Lily", [5, 6, 7]]), own(greedy)):
        seen.append([completion.prompt, completion.text, completion.tokens, completion.finish_reason])
    wrong(lambda: llm.generate("a", GenerationParams(temperature="hot")))
    wrong(lambda: llm.generate(own(5)))
    wrong(lambda: llm.generate("a", own(5)))
    try:
        llm.generate("a", own(GenerationParams(stop=5)))
    except (UserError, TypeError) as error:
        errors.append("5")
    wrong(lambda: llm.generate(own("word " * 9999)))
    wrong(lambda: llm.chat(own([{"role": "nobody", "content": "a"}])))
    pieces = []
    for i, piece in enumerate(llm.stream(own("Once upon a time"), greedy)):
        pieces.append(piece.text)
        if i == 3:
            seen.append(llm.generate("One", greedy)[0].text)
    seen.append("".join(pieces))
    for piece in llm.stream("Once"):
        break
    hot = GenerationParams(max_tokens=12, n=2, seed=4, temperature=2.0)
    chat = llm.chat(own([{"role": "user", "content": "A story!"}]), hot)
    seen.append([choice.text for choice in chat[0].choices] + [chat[0].message])
    seen.append(llm.embed(["a cat", "a dog"]).tolist())
wrong(lambda: llm.generate("a"))
alone = LLM(comm=MPI.COMM_SELF, threads=1)
seen.append([alone.size, alone.generate(f"Rank {comm.rank}", greedy)[0].text])
assert comm.allreduce(1) == comm.size
everything = comm.gather({"seen": seen, "errors": errors})
if comm.rank == 0:
    print(json.dumps(everything))
"""


@pytest.fixture(scope="module")
def alone():
    with LLM(threads=1) as llm:
        yield llm


def test_all_ranks_see_the_same_and_go_on_after_errors(alone):
    ended = run([], 2, program=("-c", PROGRAM))
    assert ended.code == 0, ended.err
    first, second = json.loads(ended.out)
    assert first["errors"] == second["errors"]
    for error, words in zip(
        first["errors"],
        [
            "no such file",
            "cache_type_k",
            "9 shares",
            "temperature",
            "prompts must",
            "params must",
            "5",
            "context",
            "role",
            "closed",
        ],
        strict=True,
    ):
        assert words in error
    assert first["seen"][:-1] == second["seen"][:-1]
    assert first["seen"][-1][0] == second["seen"][-1][0] == 1
    expected = alone.generate(PROMPTS, GREEDY)
    assert [text for _, text, _, _ in first["seen"][:3]] == [completion.text for completion in expected]
    assert [tuple(tokens) for _, _, tokens, _ in first["seen"][:3]] == [completion.tokens for completion in expected]
    assert first["seen"][3] == alone.generate("One", GREEDY)[0].text
    assert first["seen"][4] == expected[0].text
    texts = first["seen"][5]
    assert texts[0] != texts[1]
    assert texts[2] == {"role": "assistant", "content": texts[0]}
    vectors = np.array(first["seen"][6])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for rank, line in enumerate((first, second)):
        assert line["seen"][-1][1] == alone.generate(f"Rank {rank}", GREEDY)[0].text


def test_params_of_each_prompt_and_what_they_ask_for(alone):
    params = [
        GenerationParams(max_tokens=3, temperature=0, logprobs=2),
        GenerationParams(max_tokens=0),
        GenerationParams(max_tokens=200, temperature=0, stop=["there"]),
        GenerationParams(max_tokens=40, temperature=0, json_schema={"enum": ["yes", "no"]}),
    ]
    found = alone.generate(["Once upon a time"] * 4, params)
    assert len(found[0].tokens) == len(found[0].choices[0].logprobs) == 3
    assert [len(logprob.top) for logprob in found[0].choices[0].logprobs] == [2, 2, 2]
    assert (found[1].text, found[1].tokens, found[1].finish_reason) == ("", (), "length")
    assert (found[2].text, found[2].choices[0].stop_reason) == (", ", "there")
    assert json.loads(found[3].text) in ("yes", "no")
    with pytest.raises(UserError, match="4 params"):
        alone.generate(["a"], params)
    with pytest.raises(UserError, match="chat template"):
        alone.chat([{"role": "user", "content": "a"}])


def test_seed_and_n(alone):
    params = GenerationParams(max_tokens=12, seed=11, n=2, temperature=2.0)
    first, second = (alone.generate("The", params)[0] for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert first.choices[0].text != first.choices[1].text
    pieces = list(alone.stream("The", params))
    for index, choice in enumerate(first.choices):
        assert "".join(piece.text for piece in pieces if piece.index == index) == choice.text
        assert tuple(t for piece in pieces if piece.index == index for t in piece.tokens) == choice.tokens


def test_a_file_that_one_rank_cannot_read():
    code = (
        "import os, sys\n"
        "import mpillama.loader as loader\n"
        "from mpi4py import MPI\n"
        "from mpillama import LLM, UserError\n"
        "from mpillama.errors import GGUFError\n"
        "def read(self, *_, **__): raise GGUFError('m.gguf: cannot read it')\n"
        "if MPI.COMM_WORLD.rank == 1: loader.SliceReader.read = read\n"
        "try:\n"
        "    LLM(threads=1)\n"
        "except UserError as error:\n"
        "    told = MPI.COMM_WORLD.gather(str(error))\n"
        "    if told: print('\\n'.join(told))\n"
    )
    ended = run([], 3, program=("-c", code))
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert "rank 1 on " in lines[0]
    assert "cannot read it" in lines[0]


def test_importing_is_light():
    code = "import sys, mpillama; sys.exit(bool({'numpy', 'mpi4py', 'jinja2', 'mpillama.cli'} & set(sys.modules)))"
    assert run([], program=("-c", code)).code == 0


def test_example_embed_in_mpi():
    ended = run([], 2, program=("-m", "mpi4py", str(EXAMPLES / "embed_in_mpi.py")))
    assert ended.code == 0, ended.err
    assert "on 2 ranks" in ended.out
    assert "MPI goes on: True" in ended.out
    assert "refused: prompt has" in ended.out


def test_example_map_dataset(tmp_path, alone):
    prompts = [f"Once upon a time, there were {n} cats" for n in range(7)]
    (tmp_path / "in").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    flags = [str(tmp_path / "in"), str(tmp_path / "out"), "--ranks-per-model", "2", "--max-tokens", "6"]
    ended = run(flags, 3, program=("-m", "mpi4py", str(EXAMPLES / "map_dataset.py")))
    assert ended.code == 0, ended.err
    assert "2 models wrote 42 tokens" in ended.out
    found = sorted((json.loads(line) for line in (tmp_path / "out").read_text().splitlines()), key=lambda x: x["line"])
    expected = alone.generate(prompts, GenerationParams(max_tokens=6, temperature=0))
    assert [line["text"] for line in found] == [completion.text for completion in expected]


def test_example_openai_client():
    pytest.importorskip("openai")
    with Server("--chat-template", "chatml", n_ranks=2) as server:
        ended = run([server.url], program=(str(EXAMPLES / "openai_client.py"),))
        assert ended.code == 0, ended.err
        assert "embeddings: 2 vectors of 192 numbers" in ended.out
        assert "chat: " in ended.out
