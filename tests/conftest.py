"""Fixtures of several files of tests: the folder of real data, a web server, a cache of shards."""

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import get_args

import pytest

from lib.evaluation.tasks import CommonFlags, Task

ROOT = Path(__file__).resolve().parents[1]
TASKS = [task.__name__.lower() for task, _ in map(get_args, get_args(Task)) if issubclass(task, CommonFlags)]
"""The tasks of evaluate.py that take data and a model."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for the tests: runs with frozen trunks store their outputs, and leave the user's alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images and weights next to the checkout; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs the real data folder ../shared, which is not here")
    return folder


@pytest.fixture
def server(monkeypatch):
    """A web server of this machine, for tests that fetch from it."""
    pytest.importorskip("aiohttp")
    from made_server import Server

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def full_beyond() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which no file can become larger than so many bytes, as on a disk that is full."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def no_pauses(monkeypatch):
    """No waiting between the attempts of a transfer."""
    monkeypatch.setattr("lib.data.remote.BASE_DELAY", 0.001)


@pytest.fixture
def fetcher(tmp_path):
    """A fetcher with an empty cache that keeps everything."""
    from lib.data.fetcher import Fetcher

    return Fetcher(tmp_path / "cache", 0)
