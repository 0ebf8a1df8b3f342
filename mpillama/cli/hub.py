"""Model files from Hugging Face repositories, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpillama.errors import UsageError, UserError

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
"""The quants that llama.cpp looks for, in this order, when none is named."""

# Files that llama.cpp does not take for a model: projectors, importance matrices, heads of speculative decoding.
_NOT_A_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_SPLIT = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)


def resolve_hf(repo: str, file: str | None = None, token: str | None = None, offline: bool = False) -> Path:
    """Return the path of a model file of a repository in the local cache, downloaded if it is not there yet.

    ``repo`` is ``user/repo`` or ``user/repo:quant``; ``file`` is the path of a file in it and overrides the quant.
    Without either, the file is the one that llama.cpp takes: Q4_K_M, else Q8_0, else the first GGUF file. A model in
    the cache is used without asking the network, if it is the one that would be downloaded. Of a split model all
    parts are fetched and the path of the first is returned. To be called by one rank. Raises UsageError for a
    malformed ``repo`` and UserError, one line, for whatever the hub, the network or the disk object to.
    """
    repo_id, quant = split_repo(repo)
    quants = (quant,) if quant else DEFAULT_QUANTS
    with _one_line_errors(repo_id):
        from huggingface_hub import HfApi, hf_hub_download

        cached = _cached_files(repo_id)
        # Online, only the first choice is sure to be what the hub would give.
        wanted = _find(sorted(cached), file, quants if offline else quants[:1], fallback=offline and not quant)
        if wanted is not None and all(part in cached for part in parts(wanted)):
            return cached[parts(wanted)[0]]
        if offline:
            what = file or (f"a {quant} model" if quant else "a GGUF model")
            raise UserError(f"{repo_id}: {what} is not in the cache and --offline forbids to fetch it")
        files = sorted(HfApi(token=token).list_repo_files(repo_id))
        wanted = _find(files, file, quants, fallback=not quant)
        if wanted is None:
            raise UserError(_not_found(repo_id, files, file, quant))
        paths = [Path(hf_hub_download(repo_id, part, token=token)) for part in parts(wanted)]
        return paths[0]


def split_repo(repo: str) -> tuple[str, str]:
    """Return repository and quant (empty if none) of ``user/repo[:quant]``."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", repo, re.ASCII)
    if match is None:
        raise UsageError(f"--hf-repo: expected USER/MODEL or USER/MODEL:QUANT, got {repo!r}")
    return match[1], match[2] or ""


def parts(file: str) -> list[str]:
    """Return the names of all parts of a split model, given one of them; a file that is not split is its only part."""
    match = _SPLIT.fullmatch(file)
    if match is None:
        return [file]
    return [f"{match[1]}-{part:05d}-of-{match[3]}{file[-5:]}" for part in range(1, int(match[3]) + 1)]


def choose(files: list[str], quants: tuple[str, ...], fallback: bool) -> str | None:
    """Return the first model file of the first of ``quants`` that has one; with ``fallback``, else the first model.

    A quant is matched without regard to case, anywhere before a dot or a dash, as in llama.cpp. Of a split model only
    the first part counts.
    """
    models = [file for file in files if _is_model(file) and parts(file)[0] == file]
    for quant in quants:
        pattern = re.compile(re.escape(quant) + "[.-]", re.IGNORECASE)
        for file in models:
            if pattern.search(file):
                return file
    return models[0] if fallback and models else None


def _find(files: list[str], file: str | None, quants: tuple[str, ...], fallback: bool) -> str | None:
    """Return ``file`` if it is among ``files``, or without one the model that :func:`choose` takes."""
    if file:
        return file if file in files else None
    return choose(files, quants, fallback)


def _is_model(file: str) -> bool:
    name = file.rsplit("/", 1)[-1]
    return name.lower().endswith(".gguf") and not any(mark in name for mark in _NOT_A_MODEL)


def _cached_files(repo_id: str) -> dict[str, Path]:
    """Return the cached files of a repository by their path in it; of several revisions, those of ``main``."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        info = scan_cache_dir()
    except CacheNotFound:
        return {}
    for repo in info.repos:
        if repo.repo_id == repo_id and repo.repo_type == "model" and repo.revisions:
            revision = max(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
            return {f.file_path.relative_to(revision.snapshot_path).as_posix(): f.file_path for f in revision.files}
    return {}


def _not_found(repo_id: str, files: list[str], file: str | None, quant: str) -> str:
    models = [name for name in files if _is_model(name) and parts(name)[0] == name]
    if not models:
        return f"{repo_id} has no GGUF model file; look for a repository whose name ends in -GGUF"
    shown = ", ".join(models[:8]) + (", …" if len(models) > 8 else "")
    return f"{repo_id} has no file {file or f'for quant {quant}'}; it has {shown}"


@contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one-line UserErrors."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{repo_id} is gated: ask for access on its page, then give a token with --hf-token") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{repo_id}: no such repository, or it is private and needs a token (--hf-token)") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{repo_id}: cannot reach the hub, and the file is not in the cache") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{repo_id}: the repository lists the file, but it is not there any more") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"{repo_id}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it") from error
    except errors.HFValidationError as error:
        raise UsageError(f"--hf-repo: {repo_id!r} is not a valid repository name") from error
    # HTTPError is that of the HTTP library that this version of huggingface_hub uses, the base of its network errors.
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{repo_id}: cannot fetch the model: {reason}") from error
