"""What several commands ask of their flags, after each has been parsed by itself."""

from __future__ import annotations

from argparse import Namespace

from mpillama.errors import UsageError


def check_model(namespace: Namespace) -> None:
    """Raise UsageError for flags about the model that do not go together."""
    if namespace.hf_file and namespace.hf_repo is None:
        raise UsageError("--hf-file names a file of a repository: give the repository with --hf-repo USER/MODEL")


def check_split(namespace: Namespace) -> None:
    """Raise UsageError if shares are given for a model that is not split."""
    if namespace.split_mode == "none" and namespace.tensor_split is not None:
        raise UsageError("--tensor-split cuts the model over ranks, --split-mode none keeps it whole: give one of them")
