"""What inspect says of a grid is what its ranks would hold."""

import json

from mpillama.cli.inspect import run
from mpillama.cli.parser import parse
from tiny import write_llama


def inspect(path, capsys, *words):
    assert run(parse(["inspect", str(path), *words], {})[1]) == 0
    return capsys.readouterr().out


def test_a_grid(tmp_path, rng, capsys):
    path = write_llama(tmp_path / "m.gguf", rng, n_layer=5, n_expert=4, n_expert_used=2, tied=True)
    found = json.loads(inspect(path, capsys, "-n", "6", "--tp", "2", "--ep", "on", "-ts", "1,1,1,1,3,3", "--json"))[
        "ranks"
    ]
    assert (found["tp"], found["pp"], found["stages"]) == (2, 3, [[0, 1], [1, 2], [2, 5]])
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    for rank in range(6):
        assert found["bytes_per_rank"][rank] == sum(tensor["bytes"][rank] for tensor in tensors.values())
    embedding, head = tensors["token_embd.weight"], tensors["output.weight"]
    assert [n > 0 for n in embedding["bytes"]] == [True, True, False, False, False, False]
    assert [n > 0 for n in head["bytes"]] == [False, False, False, False, True, True]
    experts = tensors["blk.1.ffn_up_exps.weight"]
    assert (experts["split"], experts["ranges"]) == ("expert", [[0, 0], [0, 0], [0, 2], [2, 4], [0, 0], [0, 0]])
    text = inspect(path, capsys, "-n", "6", "--pp", "3", "-ts", "1,1,1,1,3,3")
    assert "3 stages of 2" in text
    assert "(blocks 2 to 4)" in text
