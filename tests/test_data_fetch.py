"""Remote shards: retried, complete or absent, downloaded once, kept within the limit of the cache."""

import gzip
import multiprocessing
import os
import pickle
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from made_server import cached, random_tar
from made_shards import tar_bytes

from lib.data import remote
from lib.data.fetcher import Fetcher, default_fetcher, fault
from lib.data.remote import Unreachable
from lib.errors import InputError

pytestmark = pytest.mark.usefixtures("no_pauses")


def test_a_remote_that_fails_twice_is_asked_three_times_and_then_no_more(server, fetcher, capfd):
    server.files["/a.tar"] = random_tar()
    server.failures["/a.tar"] = 2
    url = f"{server.url}/a.tar"
    assert fetcher.find(url, "--data") == (url,) and not server.requests
    path = fetcher.local(url)
    assert Path(path).read_bytes() == server.files["/a.tar"] and fault(path) is None
    assert server.requests == {"/a.tar": 3}
    assert cached(fetcher) == [os.path.basename(path)] and path.endswith("-a.tar")
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1 and "a.tar failed (503" in warnings[0] and warnings[0].endswith("trying again")
    again = pickle.loads(pickle.dumps(fetcher))
    assert again.local(url) == path and server.requests == {"/a.tar": 3}


def test_a_remote_that_stays_down_leaves_nothing_behind(server, fetcher):
    server.files["/a.tar"] = random_tar()
    server.failures["/a.tar"] = 100
    with pytest.raises(Unreachable) as error:
        fetcher.local(f"{server.url}/a.tar")
    assert pickle.loads(pickle.dumps(error.value)).reason == "unreachable" and "503" in str(error.value)
    assert server.requests == {"/a.tar": remote.ATTEMPTS} and cached(fetcher) == []
    with pytest.raises(Unreachable, match="unreachable"):
        fetcher.local(f"{server.url}/absent.tar")
    assert server.requests["/absent.tar"] == 1  # an answer, and a final one
    address = server.url
    server.close()
    with pytest.raises(Unreachable, match="unreachable"):
        fetcher.local(f"{address}/b.tar")
    with pytest.raises(InputError, match="classes.txt cannot be reached"):
        fetcher.read_text(f"{address}/classes.txt")
    assert cached(fetcher) == []
    server.__init__()  # for the fixture to close


def test_a_download_cut_short_is_a_failed_attempt(server, fetcher, monkeypatch):
    server.files["/a.tar"] = random_tar()
    server.short["/a.tar"] = 2
    assert Path(fetcher.local(f"{server.url}/a.tar")).read_bytes() == server.files["/a.tar"]
    assert server.requests["/a.tar"] == 3
    # Of a filesystem that does not notice, the size it told does.
    fsspec.filesystem("memory").pipe("/cut.tar", b"x" * 100)
    whole = fsspec.implementations.memory.MemoryFileSystem.get_file

    def get_half(self, url, path, callback):
        whole(self, url, path, callback=callback)
        os.truncate(path, 50)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "get_file", get_half)
    with pytest.raises(Unreachable, match="50 of 100 bytes"):
        fetcher.local("memory://cut.tar")
    assert len(cached(fetcher)) == 1


def test_braces_globs_and_side_files_of_remotes(server, fetcher):
    for number in range(3):
        server.files[f"/d/part-{number}.tar"] = random_tar()
    found = fetcher.find(server.url + "/d/part-{0..2}.tar", "--data")
    assert found == tuple(f"{server.url}/d/part-{number}.tar" for number in range(3))
    assert [Path(fetcher.local(url)).read_bytes() for url in found] == [
        server.files[f"/d/part-{number}.tar"] for number in range(3)
    ]
    server.files["/d/"] = b'<a href="part-1.tar">1</a> <a href="part-0.tar">0</a> <a href="other.txt">o</a>'
    assert fetcher.find(f"{server.url}/d/part-*.tar", "--data") == found[:2]
    with pytest.raises(InputError, match="--val-data .*there is no such file"):
        fetcher.find(f"{server.url}/d/none-*.tar", "--val-data")
    signed = f"{server.url}/d/part-0.tar?token=[1]"
    assert fetcher.find(signed, "--data") == (signed,)
    assert fetcher.local(signed).endswith("-part-0.tar") and fetcher.local(signed) != fetcher.local(found[0])
    memory = fsspec.filesystem("memory")
    memory.pipe({"/set/a-0.tar": b"", "/set/a-1.tar": b"", "/set/classes.txt": "é\n".encode()})
    assert fetcher.find("memory://set/a-[01].tar", "--data") == ("memory:///set/a-0.tar", "memory:///set/a-1.tar")
    assert fetcher.read_text("memory://set/classes.txt") == "é\n"
    assert fetcher.read_text("memory://set/index.json") is None
    server.files["/d/classes.txt"] = b"ant\nbee\n"
    assert fetcher.read_text(f"{server.url}/d/classes.txt") == "ant\nbee\n"
    for server.absent in (404, 403):  # as stores of objects answer
        server.requests.clear()
        assert fetcher.read_text(f"{server.url}/d/index.json") is None
        assert server.requests == {"/d/index.json": 1}
    server.failures["/d/classes.txt"] = 2
    assert fetcher.read_text(f"{server.url}/d/classes.txt") == "ant\nbee\n"


def test_local_shards_stay_where_they_are(tmp_path, fetcher):
    path = tmp_path / "a.tar"
    path.write_bytes(random_tar())
    misnamed = tmp_path / "b.tar.gz"
    misnamed.write_bytes(random_tar())
    assert fetcher.find(f"file://{path}", "--data") == (str(path),)
    assert fetcher.local(str(path)) == fetcher.local(f"file://{path}") == str(path)
    assert fetcher.local(str(misnamed)) == str(misnamed)
    (tmp_path / "classes.txt").write_text("ant\n")
    assert fetcher.read_text(str(tmp_path / "classes.txt")) == "ant\n"
    assert fetcher.read_text(str(path / "index.json")) is None
    assert not fetcher.cache.exists()


def test_many_who_ask_at_once_download_once(server, fetcher):
    server.files |= {"/a.tar": random_tar(), "/b.tar": random_tar()}
    server.seconds = 0.2
    with ThreadPoolExecutor(4) as threads:
        paths = set(threads.map(fetcher.local, [f"{server.url}/a.tar"] * 4))
    assert len(paths) == 1 and server.requests == {"/a.tar": 1}
    # Forked as a DataLoader's workers are, from a process that has an open session.
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    ask = lambda: said.put(fetcher.local(f"{server.url}/b.tar"))  # noqa: E731
    workers = [context.Process(target=ask) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    paths = {said.get() for _ in workers}
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == server.files["/b.tar"]
    assert server.requests["/b.tar"] == 1


def test_the_cache_keeps_to_its_limit_and_to_what_was_used_last(server, tmp_path):
    size = len(random_tar(1, 10_000))
    fetcher = Fetcher(tmp_path / "cache", 3 * size)
    urls = [f"{server.url}/{number}.tar" for number in range(5)]
    paths = []
    for number, url in enumerate(urls[:3]):
        server.files[f"/{number}.tar"] = random_tar(1, 10_000)
        paths.append(Path(fetcher.local(url)))
        os.utime(paths[-1], (1000 + number, 1000 + number))
    fetcher.local(urls[0])  # used again: the second is the oldest now
    server.files |= {"/3.tar": random_tar(1, 10_000), "/4.tar": random_tar(1, 10_000)}
    fetcher.local(urls[3])
    assert [path.exists() for path in paths] == [True, False, True]
    with fetcher._lock(paths[2].name):  # another process holds it
        fetcher.local(urls[4])
        assert len(cached(fetcher)) == 4 and paths[2].exists()
    fetcher.local(urls[1])
    # What was used in the last minutes stays, above the limit too.
    assert len(cached(fetcher)) == 4 and not paths[2].exists() and paths[0].exists()


def test_nothing_is_written_outside_the_cache(server, tmp_path):
    fetcher = Fetcher(tmp_path / "deep" / "cache", 0)
    names = ["/..%2f..%2fescape.tar", "/a/../../up.tar", "/x\ny.tar", "/" + "l" * 300 + ".tar", "/..", "/~$(id).tar"]
    for name in names:
        with pytest.raises(Unreachable):
            fetcher.local(server.url + name)
    memory = fsspec.filesystem("memory")
    hostile = ["/..\\..\\e.tar", "/" + "n" * 300 + ".tar", "/;rm -rf x", "/.."]
    content = random_tar()
    for name in hostile[:3]:
        memory.pipe(name, content)
        path = Path(fetcher.local(f"memory:/{name}"))
        assert path.parent == fetcher.cache / "shards" and path.read_bytes() == content
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(fetcher.cache in path.parents for path in everything)


def test_gzip_is_unpacked_and_of_a_damaged_one_the_pieces_before_the_damage_are_kept(server, fetcher, tmp_path):
    whole = random_tar(20)
    packed = gzip.compress(whole[:9000]) + gzip.compress(whole[9000:]) + b"\0" * 100  # two members and padding
    text = tar_bytes({"a.txt": os.urandom(300_000).hex().encode()})
    shrunk = gzip.compress(text)
    contents = {
        "whole": packed,
        "cut": packed[:-3000],
        "checksum": packed[:12000] + b"no" + packed[12002:],
        "garbage": shrunk[:300_000] + os.urandom(100) + shrunk[300_100:],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.tar.gz").write_bytes(content)
        server.files[f"/{name}.tgz"] = content
        for shard in (str(tmp_path / f"{name}.tar.gz"), f"{server.url}/{name}.tgz"):
            path = fetcher.local(shard)
            unpacked = Path(path).read_bytes()
            assert path == fetcher.local(shard) and Path(path).parent == fetcher.cache / "shards"
            assert fault(path) == (None if name == "whole" else "bad_gzip")
            if name == "garbage":
                good = len(os.path.commonprefix([unpacked, text]))
                # What damage decodes to is for the checksums of the tar. Of the piece with the damage nothing is kept.
                assert 200_000 < good < len(text)
            else:
                assert len(unpacked) > len(whole) * 0.7
                assert whole.startswith(unpacked[:11000])
    assert server.requests == {f"/{name}.tgz": 1 for name in contents}
    before = cached(fetcher)
    for content in (b"", b"no gzip", b"\x1f\x8bno gzip"):
        (tmp_path / "bad.tar.gz").write_bytes(content)
        with pytest.raises(Unreachable) as error:
            fetcher.local(str(tmp_path / "bad.tar.gz"))
        assert error.value.reason == "bad_gzip"
    with pytest.raises(Unreachable, match="unreachable"):
        fetcher.local(str(tmp_path / "gone.tar.gz"))
    assert cached(fetcher) == before
    path = Path(fetcher.local(str(tmp_path / "whole.tar.gz")))
    (tmp_path / "whole.tar.gz").write_bytes(gzip.compress(whole[:10240]))
    assert Path(fetcher.local(str(tmp_path / "whole.tar.gz"))) != path  # another file, not the one unpacked before


def test_commands_run_only_when_allowed(tmp_path, fetcher, capfd):
    trap, shard = tmp_path / "executed", tmp_path / "a.tar"
    shard.write_bytes(random_tar())
    for act in (lambda: fetcher.find(f"pipe:touch {trap}", "--val-data"), lambda: fetcher.local(f"pipe:touch {trap}")):
        with pytest.raises(InputError, match="not run unless --allow-pipe"):
            act()
    assert not trap.exists()
    allowed = Fetcher(tmp_path / "cache", 0, allow_pipe=True)
    assert allowed.find("pipe:cat /x/{0..1}.tar", "--data") == ("pipe:cat /x/0.tar", "pipe:cat /x/1.tar")
    path = allowed.local(f"pipe:cat {shard} && echo run >> {trap}")
    assert Path(path).read_bytes() == shard.read_bytes() and Path(path).parent == allowed.cache / "shards"
    assert trap.read_text() == "run\n"
    assert allowed.local(f"pipe:cat {shard} && echo run >> {trap}") == path and trap.read_text() == "run\n"
    assert Path(allowed.local(f"pipe:gzip -c {shard}")).read_bytes() == shard.read_bytes()
    assert allowed.read_text(f"pipe:cat {shard}") is None
    failing = f"pipe:(echo once >> {trap}; echo no luck >&2; false) | cat"
    with pytest.raises(Unreachable, match="exit code 1: no luck"):
        allowed.local(failing)
    assert trap.read_text().count("once") == remote.ATTEMPTS and len(cached(allowed)) == 2
    flaky = f"pipe:echo try >> {trap}; test $(grep -c try {trap}) -ge 3 && cat {shard}"
    assert Path(allowed.local(flaky)).read_bytes() == shard.read_bytes()
    assert trap.read_text().count("try") == 3


def test_what_cannot_be_used_is_an_error_before_anything_is_read(tmp_path, fetcher, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "[1]{2}.tar").write_bytes(b"")
    assert fetcher.find(str(tmp_path / "[1]{2}.tar"), "--data") == (str(tmp_path / "[1]{2}.tar"),)
    for data, message in (
        (str(tmp_path / "none-{0..3}.tar"), "there is no file .*none-0.tar"),
        (str(tmp_path / "none-*.tar"), "there is no file"),
        (str(tmp_path / "a{0,1.tar"), "brace is not closed"),
        ("ftpx://host/a.tar", "ftpx:// is not known"),
        ("ftp://127.0.0.1:1/a.tar", "ftp:// is not known; give http"),  # its filesystem wants a host
        ("zip://a.tar", "zip:// cannot be used"),
        ("local:///a.tar", "local:// is this machine"),
    ):
        with pytest.raises(InputError, match=f"^--data .*{message}"):
            fetcher.find(data, "--data")
    if find_spec("s3fs") is None:
        with pytest.raises(InputError, match="^--data s3://bucket/a.tar: needs s3fs; pip install s3fs$"):
            fetcher.find("s3://bucket/a.tar", "--data")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(InputError, match="needs aiohttp; pip install aiohttp"):
        fetcher.find("https://host/a.tar", "--data")


def test_a_cache_that_cannot_be_written_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    fsspec.filesystem("memory").pipe("/full.tar", b"x")
    with pytest.raises(InputError, match="^--cache-dir .*file/cache cannot be written .*; name a folder"):
        Fetcher(tmp_path / "file" / "cache", 0).local("memory://full.tar")
    fetcher = Fetcher(tmp_path / "cache", 0)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "get_file", full)
    with pytest.raises(InputError, match="--cache-dir .*No space left on device"):
        fetcher.local("memory://full.tar")
    assert cached(fetcher) == []
    assert default_fetcher().cache.name == "contrastive-training"


def test_a_full_disk_is_a_fault_of_the_cache_and_not_of_the_shard(server, tmp_path, full_beyond, capfd):
    shard = tar_bytes({"a.txt": bytes(30_000)})
    server.files["/a.tar"] = shard
    (tmp_path / "a.tar").write_bytes(shard)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(shard))
    fetcher = Fetcher(tmp_path / "cache", 0, allow_pipe=True)
    shards = (f"{server.url}/a.tar", f"pipe:cat {tmp_path}/a.tar", str(tmp_path / "b.tar.gz"))
    for shard_here in shards:
        told = r"^--cache-dir .*/cache cannot be written \(File too large\); name a folder that can$"
        with full_beyond(20_000), pytest.raises(InputError, match=told):
            fetcher.local(shard_here)
    assert cached(fetcher) == [] and "again" not in capfd.readouterr().err
    with (
        full_beyond(20_000),
        pytest.raises(InputError, match="a.tar cannot be read .*File too large.*; check the file"),
    ):
        fetcher.read_text(f"{server.url}/a.tar")
    assert [Path(fetcher.local(each)).read_bytes() for each in shards] == [shard] * 3


def test_no_room_for_a_small_file_is_not_taken_for_its_absence(server, fetcher, monkeypatch):
    server.files["/classes.txt"] = b"ant\n"

    def none_usable(*_, **__):  # as of tempfile, where no folder for temporary files can be written
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", none_usable)
    with pytest.raises(InputError, match="classes.txt cannot be read .No usable temporary directory found"):
        fetcher.read_text(f"{server.url}/classes.txt")
