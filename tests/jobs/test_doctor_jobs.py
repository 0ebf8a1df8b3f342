"""`mpillama doctor` and `plan --measure` as users start them."""

import json

from job import mpirun, run
from mpillama.data import demo_model_path


def test_alone():
    ended = run(["doctor", "-m", demo_model_path()])
    assert ended.code == 0, ended.err
    assert "one process, no launcher" in ended.out
    assert "demo.gguf" in ended.out


def test_on_ranks(tmp_path):
    file = tmp_path / "cluster.toml"
    ended = run(["doctor", "--json", "--save", file, "--types", "Q8_0", "-t", "1", "-m", demo_model_path()], 3)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["launched"], found["world_size"], len(found["ranks"])) == (3, 3, 3)
    assert {time["where"] for time in found["times"]} == {"within"}
    assert found["model"]["read"] > 0
    assert not found["broken"]
    ended = run(["plan", "--shape", "llama-1b:Q8_0", "--cluster", file, "--json"])
    assert ended.code == 0, ended.err
    cluster = json.loads(ended.out)["cluster"]
    assert (cluster["hosts"], cluster["per_host"], list(cluster["device"]["types"])) == (1, 3, ["Q8_0"])


def test_without_an_mpi_library(tmp_path):
    ended = run(["doctor"], 2, env={"MPI4PY_LIBMPI": str(tmp_path / "none.so")})
    assert ended.code != 0
    assert ended.out.count("broken  ranks") == 1
    assert "no MPI library can be loaded" in ended.out


def test_plan_measures():
    mpirun(2)
    ended = run(["plan", "--shape", "llama-1b:Q8_0", "--ranks-per-host", 2, "--measure", "-t", "1", "--json"])
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert list(found["cluster"]["device"]["types"]) == ["Q8_0"]
    assert (found["cluster"]["within"]["name"], len(found["layouts"])) == ("shm", 3)


def test_a_model_that_is_not_there():
    ended = run(["doctor", "-m", "/no/such.gguf"], 2)
    assert ended.code == 1
    assert "broken  model" in ended.out
    # Some launchers have a word to say about every code other than 0.
    assert "mpillama" not in ended.err
