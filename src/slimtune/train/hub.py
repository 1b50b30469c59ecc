"""Say in plain words why something on the Hugging Face hub could not be had, and do not wait half a minute to find out."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlparse

from slimtune.core.errors import FileError


def is_cached(repo: str, filename: str = "config.json", repo_type: str = "model") -> bool:
    """Tell whether a file of a hub repository is in the local hub cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, filename, repo_type=repo_type), str)


def reachable() -> bool:
    """Tell whether the hub's name can be resolved at all (a proxy counts as yes); the hub's own client retries for 23 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def in_words(repo: str, error: Exception, kind: str, hint: str) -> FileError:
    """Return our error for whatever the hub's client raised.

    Args:
        repo: the name asked for.
        error: what was raised.
        kind: "model" or "data set".
        hint: what to type instead.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(e, GatedRepoError) for e in chain):
        return FileError(f"the {kind} is gated: you have to accept its terms on the hub first", where=repo, hint="then: hf auth login")
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return FileError(f"the hub has no such {kind} (or it is private)", where=repo, hint=f"{hint}; for a private one: hf auth login")
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FileError(f"cannot get the {kind} from the hub: {first[:300]}", where=repo, hint=hint)


def unreachable(repo: str, kind: str, hint: str) -> FileError:
    """Return the error for a hub that cannot be reached and a repository that is not in the local cache."""
    return FileError(f"there is no folder of this name here, and the hub cannot be reached to look for the {kind}", where=repo, hint=hint)
