"""`--prompt-cache` of generate and chat: from one run to the next, on other numbers of ranks."""

import re

import pytest

from job import run
from test_chat import piped

PROMPT = (
    "Once upon a time, there was a little girl named Lily who lived in a small house near the forest with her mother. "
    "One day, she was playing with her white ball when it broke. She tried to put it together, but it fell apart again."
)


def generate(prompt, file, *flags, n_ranks=0):
    return run(["generate", "-p", prompt, "-n", 30, "--temp", 0, "-t", 1, "--prompt-cache", file, *flags], n_ranks)


def used(ended):
    return int(re.search(r"prompt cache: (\d+) tokens of \S+ are used", ended.err)[1])


def test_generate_goes_on_where_another_number_of_ranks_has_stopped(tmp_path):
    file = tmp_path / "kv"
    first = generate(PROMPT, file, "-v", n_ranks=2)
    assert first.code == 0, first.err
    assert "prompt cache: 64 tokens saved" in first.err
    before = file.read_bytes()
    for n_ranks in (3, 0):
        again = generate(PROMPT, file, "-v", "--prompt-cache-ro", n_ranks=n_ranks)
        assert (again.code, again.out) == (0, first.out), again.err
        assert used(again) == 32
    assert file.read_bytes() == before
    # A longer text has its own beginning in the file, what was generated included.
    longer = generate(first.out.rstrip("\n") + " Then", file, "-v", n_ranks=2)
    assert used(longer) == 64
    assert int(re.search(r"(\d+) tokens saved", longer.err)[1]) > 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kv"]


def test_files_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    file = tmp_path / "kv"
    assert generate(PROMPT, file).code == 0
    good = file.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 4
    for data, flags, words in (
        (good, ["-ctk", "q8_0"], "other keys"),
        (good, ["--override-kv", "llama.rope.freq_base=float:5e5"], "another model"),
        (good[:-1], [], "damaged"),
        (bytes(bad), [], "damaged"),
        (b"nothing", [], "no saved state"),
    ):
        file.write_bytes(data)
        for n_ranks in (0, 2):
            ended = generate(PROMPT, file, *flags, n_ranks=n_ranks)
            assert (ended.code, ended.out) == (1, ""), words
            assert len([line for line in ended.err.splitlines() if "mpillama" in line]) == 1
            assert words in ended.err
            assert file.read_bytes() == data
    ended = generate(PROMPT, tmp_path / "none" / "kv")
    assert ended.code == 2
    assert "no such folder" in ended.err


@pytest.mark.parametrize("n_ranks", [0, 2])
def test_chat_finds_its_last_conversation(n_ranks, tmp_path):
    file = tmp_path / "kv"
    flags = ["-n", 20, "-v", "--prompt-cache", file]
    first = piped(PROMPT + "\n", *flags, n_ranks=2)
    assert first.returncode == 0, first.stderr
    assert b"tokens saved to" in first.stderr
    second = piped(PROMPT + "\n", *flags, n_ranks=n_ranks)
    n_prompt, n_cached = map(int, re.search(rb"chat: (\d+) tokens of prompt, (\d+) of them", second.stderr).groups())
    assert n_cached == (n_prompt - 1) // 32 * 32 > 0
    assert second.stdout.decode().replace("> ", "").strip() == first.stdout.decode().replace("> ", "").strip()
