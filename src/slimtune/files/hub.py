"""Where an adapter's folder is: here, or on the Hugging Face hub, from which two files come and never a pickle.

A folder of this name here is always meant first. The network is asked only for what looks like a repository ("user/adapter") and cannot be
a mistyped path: there is no folder "user" here, or `revision=` says that a repository is meant.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slimtune.core.errors import FileError, closest

FILES = ["adapter_config.json", "adapter_model.safetensors"]
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def located(folder: str | Path, revision: str | None) -> Path:
    """Return the local folder of an adapter, fetched from the hub where that was meant.

    Args:
        revision: branch, tag or commit of a repository.

    Raises:
        FileError: there is neither, or it cannot be fetched, with the command that fetches it.
    """
    path = Path(folder)
    if path.exists() and revision is None:
        return path
    repo = str(folder)
    if not isinstance(folder, str) or not _REPO.fullmatch(repo):
        if revision is not None:
            raise FileError(f"revision={revision!r} is of a repository on the hub, and {repo} names none", where=repo, hint='"user/adapter"')
        return path  # whoever reads it says what is missing
    if path.exists():
        what = f"there is a folder {repo} here, which has no revision {revision!r}"
        raise FileError(what, where=str(path.absolute()), hint=f"leave revision= out to read it, or: {_command(repo, revision)}")
    owner = path.parent
    if owner.is_dir() and revision is None:
        near = closest(path.name, sorted(p.name for p in owner.iterdir() if p.is_dir()))
        fetch = f"one from the hub: {_command(repo, revision)}"
        raise FileError(f"there is no folder {repo}", where=str(path.absolute()), hint=f"in {owner}/: {near or 'no folder'}; {fetch}")
    return _fetched(repo, revision)


def _command(repo: str, revision: str | None) -> str:
    of = f" --revision {revision}" if revision else ""
    return f"hf download {repo}{of} {' '.join(FILES)} --local-dir {repo.split('/')[1]}"


def _fetched(repo: str, revision: str | None) -> Path:
    by_hand = f"{_command(repo, revision)}, then st.load(model, {repo.split('/')[1]!r})"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        hint = f"pip install huggingface_hub, or on another machine: {by_hand}"
        raise FileError(f"there is no folder {repo}, and nothing to fetch it from the hub with", where=repo, hint=hint) from None
    try:
        return Path(snapshot_download(repo_id=repo, revision=revision, allow_patterns=FILES))
    except Exception as error:  # whatever the hub's client and its network raise
        raise FileError(f"there is no folder {repo}, and the hub gave none: {_in_words(error)}", where=repo, hint=by_hand) from None


def _in_words(error: Any) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    name = type(error).__name__
    said = {
        "RepositoryNotFoundError": "it has no such repository, or it is private (hf auth login)",
        "RevisionNotFoundError": "it has no such revision",
        "GatedRepoError": "its terms have to be accepted on its page first (then: hf auth login)",
    }
    first = next((line for line in str(error).splitlines() if line.strip()), name)
    return said.get(name) or f"{first.strip()[:200]}"
