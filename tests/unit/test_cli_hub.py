"""Model files from Hugging Face, without a network: huggingface_hub's functions are replaced by a hub in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from mpillama.cli.hub import choose, parts, resolve_hf, split_repo
from mpillama.errors import UsageError, UserError

FILES = [
    ".gitattributes",
    "README.md",
    "imatrix.gguf",
    "mmproj-model-f16.gguf",
    "model-BF16.gguf",
    "model-IQ4_XS.gguf",
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "model-Q8_0.gguf",
]


@dataclass
class Hub:
    """A hub with one repository, and a cache in huggingface_hub's own layout."""

    cache: Path
    repo: str = "user/model-GGUF"
    files: list[str] = field(default_factory=lambda: list(FILES))
    tokens: list[str | None] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)
    listings: int = 0
    failure: Exception | None = None

    def list_repo_files(self, repo_id: str) -> list[str]:
        self.listings += 1
        if self.failure:
            raise self.failure
        assert repo_id == self.repo
        return self.files

    def hf_hub_download(self, repo_id: str, filename: str, token: str | None = None) -> str:
        assert repo_id == self.repo
        assert filename in self.files
        self.downloads.append(filename)
        self.tokens.append(token)
        return str(self.put(filename))

    def put(self, filename: str, revision: str = "1" * 40, ref: str = "main") -> Path:
        """Put a file into the cache."""
        folder = self.cache / ("models--" + self.repo.replace("/", "--"))
        blob = folder / "blobs" / filename.replace("/", "_")
        path = folder / "snapshots" / revision / filename
        for needed in (blob.parent, path.parent, folder / "refs"):
            needed.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(b"GGUF")
        if not path.exists():
            path.symlink_to(blob)
        if ref:
            (folder / "refs" / ref).write_text(revision)
        return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "cache")
    scan: Callable[..., Any] = huggingface_hub.scan_cache_dir

    class Api:
        def __init__(self, token: str | None = None) -> None:
            hub.tokens.append(token)

        list_repo_files = staticmethod(hub.list_repo_files)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(hub.cache))
    return hub


def refused(kind: type[UserError], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        resolve_hf(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_default_is_q4_k_m_then_q8_0_then_the_first(hub: Hub) -> None:
    assert resolve_hf(hub.repo, token="hf_x").name == "model-Q4_K_M.gguf"
    assert hub.downloads == ["model-Q4_K_M.gguf"]
    assert set(hub.tokens) == {"hf_x"}
    assert choose([file for file in FILES if "Q4_K_M" not in file], ("Q4_K_M", "Q8_0"), True) == "model-Q8_0.gguf"
    assert choose(FILES[:6], ("Q4_K_M", "Q8_0"), True) == "model-BF16.gguf"
    assert choose(FILES[:4], ("Q4_K_M", "Q8_0"), True) is None


@pytest.mark.parametrize("quant", ["Q8_0", "q8_0", "iq4_xs", "Q4_K_S"])
def test_a_quant_is_found_in_any_case(hub: Hub, quant: str) -> None:
    assert resolve_hf(f"{hub.repo}:{quant}").name.lower() == f"model-{quant.lower()}.gguf"


def test_a_quant_that_is_not_there(hub: Hub) -> None:
    message = refused(UserError, f"{hub.repo}:Q2_K")
    assert message.startswith("user/model-GGUF has no file for quant Q2_K; it has model-BF16.gguf, model-IQ4_XS.gguf")
    assert "mmproj" not in message
    # A quant is a whole word at its end: Q4_K is not Q4_K_M.
    assert "no file for quant Q4_K;" in refused(UserError, f"{hub.repo}:Q4_K")
    assert "no file for quant Q..0;" in refused(UserError, f"{hub.repo}:Q..0")


def test_a_file_overrides_the_quant(hub: Hub) -> None:
    assert resolve_hf(f"{hub.repo}:Q8_0", "mmproj-model-f16.gguf").name == "mmproj-model-f16.gguf"
    assert "has no file other.gguf" in refused(UserError, hub.repo, "other.gguf")


def test_all_parts_of_a_split_model_are_fetched(hub: Hub) -> None:
    split = [f"Q4_K_M/big-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    hub.files = ["README.md", *reversed(split), "Q8_0/big-Q8_0-00001-of-00001.gguf"]
    path = resolve_hf(hub.repo)
    assert path.as_posix().endswith(split[0])
    assert hub.downloads == split
    # The second part named, all three come, and the first is what is opened.
    assert resolve_hf(hub.repo, split[1]).as_posix().endswith(split[0])


def test_parts() -> None:
    assert parts("a-00002-of-00003.gguf") == [f"a-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert parts("a-00002-of-00003.txt") == ["a-00002-of-00003.txt"]
    assert parts("a.gguf") == ["a.gguf"]


def test_a_cached_model_needs_no_network(hub: Hub) -> None:
    hub.put("model-Q4_K_M.gguf")
    hub.put("model-Q8_0.gguf")
    assert resolve_hf(hub.repo).name == "model-Q4_K_M.gguf"
    assert resolve_hf(hub.repo + ":q8_0").name == "model-Q8_0.gguf"
    assert resolve_hf(hub.repo, "model-Q8_0.gguf").name == "model-Q8_0.gguf"
    assert (hub.listings, hub.downloads) == (0, [])


def test_another_quant_in_the_cache_is_not_mistaken_for_the_default(hub: Hub) -> None:
    hub.put("model-Q8_0.gguf")
    assert resolve_hf(hub.repo).name == "model-Q4_K_M.gguf"
    assert hub.listings == 1


def test_half_a_split_model_in_the_cache_is_completed(hub: Hub) -> None:
    hub.files = [f"m-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]
    hub.put(hub.files[0])
    assert "not in the cache" in refused(UserError, hub.repo, offline=True)
    assert resolve_hf(hub.repo).name == hub.files[0]
    assert hub.downloads == hub.files
    assert resolve_hf(hub.repo, offline=True).name == hub.files[0]


def test_offline_takes_what_the_cache_has(hub: Hub) -> None:
    assert "is not in the cache and --offline forbids" in refused(UserError, hub.repo, offline=True)
    hub.put("model-BF16.gguf")
    assert resolve_hf(hub.repo, offline=True).name == "model-BF16.gguf"
    assert "a Q8_0 model is not in the cache" in refused(UserError, hub.repo + ":Q8_0", offline=True)
    assert "model-Q8_0.gguf is not in the cache" in refused(UserError, hub.repo, "model-Q8_0.gguf", offline=True)
    assert (hub.listings, hub.downloads) == (0, [])


def test_the_main_revision_of_the_cache_counts(hub: Hub) -> None:
    main = hub.put("model-Q4_K_M.gguf", "a" * 40)
    time.sleep(0.01)
    hub.put("model-Q4_K_M.gguf", "b" * 40, ref="")
    assert resolve_hf(hub.repo) == main


@pytest.mark.parametrize("repo", ["", "model", "a/b/c", "a/b:", ":Q4_0", "/b", "a/", "a b/c", "https://x/y"])
def test_malformed_repositories(hub: Hub, repo: str) -> None:
    assert refused(UsageError, repo) == f"--hf-repo: expected USER/MODEL or USER/MODEL:QUANT, got {repo!r}"


def test_split_repo() -> None:
    assert split_repo("ggml-org/gemma-3.1b_x:Q8_0") == ("ggml-org/gemma-3.1b_x", "Q8_0")
    assert split_repo("a/b") == ("a/b", "")


def test_a_repository_without_models(hub: Hub) -> None:
    hub.files = ["README.md", "model.safetensors", "mmproj.gguf"]
    assert "has no GGUF model file" in refused(UserError, hub.repo)


def http_error(kind: type[Exception]) -> Exception:
    return kind("line one\nline two", response=Mock(headers={}))


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (http_error(errors.GatedRepoError), "is gated: ask for access on its page, then give a token with --hf-token"),
        (http_error(errors.RepositoryNotFoundError), "no such repository, or it is private"),
        (http_error(errors.RemoteEntryNotFoundError), "not there any more"),
        (http_error(errors.HfHubHTTPError), "cannot fetch the model: line one"),
        (errors.LocalEntryNotFoundError("x"), "cannot reach the hub"),
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (ConnectionError("name or service not known"), "cannot fetch the model: name or service not known"),
        (TimeoutError(), "cannot fetch the model: TimeoutError"),
        (errors.HTTPError("connection refused"), "cannot fetch the model: connection refused"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_failures_are_one_line(hub: Hub, failure: Exception, said: str) -> None:
    hub.failure = failure
    message = refused(UserError, hub.repo)
    assert message.startswith(hub.repo)
    assert said in message


def test_a_bug_stays_a_bug(hub: Hub) -> None:
    hub.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        resolve_hf(hub.repo)
