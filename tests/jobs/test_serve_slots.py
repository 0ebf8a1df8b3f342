"""Slots of `mpillama serve`: KV saved by one server, and taken up by another one on other ranks."""

from urllib.parse import quote

from server import Server
from test_prompt_cache import PROMPT

ASKED = {"prompt": PROMPT, "n_predict": 40, "temperature": 0, "cache_prompt": True}


def act(server, slot, action, filename=None):
    body = {} if filename is None else {"filename": filename}
    return server.ask(f"/slots/{slot}?action={action}", body)


def test_a_slot_goes_from_one_server_to_another(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with Server("--slot-save-path", tmp_path, "-np", 3, n_ranks=2) as server:
        status, first = server.ask("/completion", {**ASKED, "id_slot": 2})
        assert (status, first["id_slot"], first["tokens_cached"]) == (200, 2, 0)
        listed = server.ask("/slots")[1]
        assert [slot["id"] for slot in listed] == [0, 1, 2]
        assert listed[2]["n_decoded"] == first["tokens_predicted"]
        assert act(server, 0, "save", "empty")[0] == 400
        status, saved = act(server, 2, "save", "kv é.bin")
        assert status == 200
        # The last token has no KV: nobody has asked for what follows it.
        n_tokens = first["tokens_evaluated"] + first["tokens_predicted"] - 1
        assert saved["n_saved"] == n_tokens // 32 * 32 > first["tokens_evaluated"] // 32 * 32
        assert saved["n_written"] == (tmp_path / "kv é.bin").stat().st_size
        # What goes on with a slot's text stays there.
        again = server.ask("/completion", {**ASKED, "prompt": PROMPT + first["content"], "n_predict": 1})[1]
        assert (again["id_slot"], again["tokens_cached"] > first["tokens_evaluated"]) == (2, True)
        assert act(server, 2, "erase")[1]["n_erased"] >= saved["n_saved"]
        assert server.ask("/completion", ASKED)[1]["tokens_cached"] == 0

    with Server("--slot-save-path", tmp_path, "-np", 2, n_ranks=3) as server:
        status, restored = act(server, 1, "restore", "kv é.bin")
        assert (status, restored["n_restored"]) == (200, saved["n_saved"])
        assert restored["n_read"] == saved["n_written"]
        second = server.ask("/completion", ASKED)[1]
        assert second["content"] == first["content"]
        assert second["tokens_cached"] == (first["tokens_evaluated"] - 1) // 32 * 32 > 0
        assert second["id_slot"] == 1

        # Or a damaged file would not be read at all: all that it should hold is there.
        assert act(server, 1, "erase")[1]["n_erased"] > 0
        good = (tmp_path / "kv é.bin").read_bytes()
        (tmp_path / "foreign").write_bytes(b"GGUF" * 100)
        (tmp_path / "torn").write_bytes(good[: len(good) // 2])
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 16
        (tmp_path / "bad").write_bytes(bad)
        for slot, action, name, words in (
            (0, "restore", "none", "no file"),
            (0, "restore", "other", "no file"),
            (0, "restore", "foreign", "no saved state"),
            (0, "restore", "torn", "damaged"),
            (0, "restore", "bad", "digest"),
            (0, "restore", "../x", "plain name"),
            (0, "save", "a/b", "plain name"),
            (0, "save", "a\\b", "plain name"),
            (0, "save", "a\0b", "plain name"),
            (0, "save", ".hidden", "plain name"),
            (0, "save", "\ud800", "plain name"),
            (0, "save", "x" * 300, "plain name"),
            (0, "save", "", "missing"),
            (0, "restore", 5, "string"),
            (2, "erase", None, "no slot"),
            (-1, "erase", None, "no slot"),
            (quote("²"), "erase", None, "no slot"),
            (0, "burn", "a", "save, restore or erase"),
        ):
            status, answer = act(server, slot, action, name)
            assert (status, words in answer["error"]["message"]) == (400, True), (action, name, answer)
            assert "\n" not in answer["error"]["message"]
            assert str(tmp_path) not in answer["error"]["message"]
        answer = server.ask("/completion", ASKED)[1]
        assert (answer["content"], answer["id_slot"]) == (first["content"], 0)
        status, answer = act(server, 0, "save", "other")
        assert (status, "cannot be written" in answer["error"]["message"]) == (400, True)
        status, answer = server.ask("/completion", {**ASKED, "id_slot": 2})
        assert (status, "id_slot" in answer["error"]["message"]) == (400, True)
        assert not any(slot["is_processing"] for slot in server.ask("/slots")[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "foreign", "kv é.bin", "other", "torn"]


def test_without_a_folder_there_are_no_files():
    with Server(n_ranks=0) as server:
        status, answer = act(server, 0, "save", "a")
        assert (status, "--slot-save-path" in answer["error"]["message"]) == (501, True)
