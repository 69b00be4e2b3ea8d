"""Owns the way of an export to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError  # the error of the client that it talks with
from huggingface_hub.utils import validate_repo_id

from lib.errors import InputError, RunError


def check_hub(repo_id: str) -> None:
    """Raise InputError where a push cannot succeed, before the work of an export."""
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id  # the hub knows the owner of a bare name, the card's example would not
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"--push-to-hub {repo_id} is no name for the hub; give OWNER/NAME")
    if constants.is_offline_mode():
        raise InputError(f"--push-to-hub {repo_id}: HF_HUB_OFFLINE is set; unset it, or leave the flag out")
    if get_token() is None:
        raise InputError(f"--push-to-hub {repo_id}: nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a finished export as one commit, making the repository where there is none; returns its address."""
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export a model")
    except (HTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RunError(
            f"--push-to-hub {repo_id} failed ({reason}); the export is whole in {folder}: "
            f"`hf upload {repo_id} {folder}` sends it"
        ) from error
    return str(address)
