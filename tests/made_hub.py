"""A cache of the Hugging Face hub with repositories in it, as huggingface_hub lays it out; no network."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def offline_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, the only place where hub ids are looked for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return root


def publish(folder: Path, repo_id: str, cache: Path) -> Path:
    """Copy a folder into the cache as the main revision of a repository."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, repository / "snapshots" / COMMIT))
