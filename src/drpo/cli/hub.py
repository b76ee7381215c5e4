"""Uploads to the Hugging Face hub; everything that can be known before is checked before anything is computed."""

from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from drpo.errors import InputError, as_typed, counted, one_line
from drpo.terminal import Terminal

CARD = "README.md"
_HARMLESS = frozenset({".gitattributes", CARD})
"""Files that an empty repository may have."""


def require_pushable(repo: str, overwrite: bool) -> HfApi:
    """Return the hub's client, after a check that an upload to a repository can work.

    Args:
        repo: owner/name.
        overwrite: the repository may have files, some of which are replaced.

    Raises:
        InputError: no such name, no token, one that may not write there, a repository with files, or no connection.
    """
    option = f"--push {repo}"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{option}: {one_line(error)}") from None
    owner, _, name = repo.partition("/")
    if not name:
        raise InputError(f"{option}: name the owner too, as owner/{owner}")
    if hub_constants.HF_HUB_OFFLINE:
        raise InputError(f"{option}: HF_HUB_OFFLINE is set; unset it to upload")
    if get_token() is None:
        raise InputError(f"{option}: there is no token of the hub; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        _require_rights(option, owner, api.whoami())
        files = set(api.list_repo_files(repo)) - _HARMLESS if api.repo_exists(repo) else set()
    except HfHubHTTPError as error:
        raise InputError(f"{option}: the hub refuses: {one_line(error)[:200]}") from None
    except (httpx2.HTTPError, OSError) as error:  # no network
        raise InputError(f"{option}: the hub cannot be reached: {one_line(error)[:200]}") from None
    if files and not overwrite:
        raise InputError(
            f"{option}: {counted(len(files), 'file')} are there, {min(files)} first; name another repository, or add "
            "--overwrite"
        )
    return api


def _require_rights(option: str, owner: str, account: dict[str, Any]) -> None:
    """Raise unless an account may write to what an owner has."""
    owners = [account.get("name"), *(org.get("name") for org in account.get("orgs", ()))]
    if owner not in owners:
        raise InputError(f"{option}: the token is {account.get('name')}'s, who does not belong to {owner!r}")
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise InputError(f"{option}: the token may only read; make one that may write, at the hub's settings")


def push(api: HfApi, repo: str, path: Path, public: bool, card: str) -> None:
    """Upload a file, or all files of a folder, to a repository; make it where there is none.

    Args:
        api: of `require_pushable`.
        repo: owner/name.
        path: of the file or the folder; it has been verified.
        public: of a new repository; else it is private.
        card: text of README.md, for a repository that has none.

    Raises:
        InputError: the upload broke off; the files stay here.
    """
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    size = sum(file.stat().st_size for file in files)
    console = Terminal()
    console.print(f"uploading {counted(len(files), 'file')}, {size / 1e6:,.1f} MB, to {repo}")
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        if CARD not in api.list_repo_files(repo):
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repo)
        if path.is_file():
            api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo)
        else:
            api.upload_folder(folder_path=path, repo_id=repo)
    except (httpx2.HTTPError, OSError) as error:
        raise InputError(
            f"--push {repo}: the upload broke off: {one_line(error)[:200]}; {path} is complete, so upload it with "
            f"`hf upload {repo} {as_typed(path)}`"
        ) from None
    console.print(f"{url}{'' if public else ' (private, if it is new)'}")


def card_of(base: str | None, objective: str | None) -> str:
    """Return the text of a repository's README.md.

    Args:
        base: hub id of the model that training began with, or None where that has none.
        objective: that it was trained with, or None.

    Example:
        >>> print(card_of("owner/base", "drpo(0.2)"))
        ---
        library_name: transformers
        tags: [drpo, reinforcement-learning]
        base_model: owner/base
        ---
        Trained with [drpo](https://arxiv.org/abs/2606.09821), objective `drpo(0.2)`.
        <BLANKLINE>
    """
    head = ["---", "library_name: transformers", "tags: [drpo, reinforcement-learning]"]
    head += [] if base is None else [f"base_model: {base}"]
    trained = "" if objective is None else f", objective `{objective}`"
    return "\n".join([*head, "---", f"Trained with [drpo](https://arxiv.org/abs/2606.09821){trained}.", ""])
