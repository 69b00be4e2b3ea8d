"""Shards and the files next to them are bounded in time, size and number, and only tars are kept."""

import gzip
import io
import os
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import psutil
import pytest
from braceexpand import UnbalancedBracesError, braceexpand
from made_server import cached, random_tar
from made_shards import tar_bytes

from lib.data import fetcher as fetch
from lib.data import remote
from lib.data.fetcher import Fetcher, copy_note
from lib.data.remote import Unreachable
from lib.errors import InputError

pytestmark = pytest.mark.usefixtures("no_pauses")


def test_braces_stand_for_the_names_that_bash_has(tmp_path, fetcher, monkeypatch):
    pieces = ("a", "{", "}", ",", "{0..2}", "{08..10}", "{c..a}", "{1..9..4}", "{b,c}", "\\{", "")
    compared = refused = 0
    for number in range(0, 14_641, 3):
        pattern = "".join(pieces[number // len(pieces) ** place % len(pieces)] for place in range(4)) + "z"
        try:
            expected = list(braceexpand(pattern))
        except UnbalancedBracesError:
            with pytest.raises(InputError, match="brace is not closed"):
                list(fetch.expanded(pattern, "--data"))
            refused += 1
            continue
        marks = [letter for letter in pattern.replace("\\{", "") if letter in "{}"]
        if all(
            marks[:place].count("}") <= place / 2 for place in range(len(marks))
        ):  # the twin takes some "}{" for names
            assert list(fetch.expanded(pattern, "--data")) == expected
            assert fetch._count_names(pattern) == len(expected), pattern
            compared += 1
    assert compared > 1000 and refused > 300
    # These names would not fit into any memory: they are counted before one is made.
    endless = "{0..99999999}{0..99999999}{{0..99999999}{0..99999999},b}.tar"
    with pytest.raises(InputError, match="--val-data .*: the braces stand for more than 1,000,000 names"):
        fetcher.find(f"{tmp_path}/{endless}", "--val-data")
    with pytest.raises(InputError, match="--val-data .*: there is no file .*/000.tar"):
        fetcher.find(f"{tmp_path}/{{000..999}}.tar", "--val-data")
    monkeypatch.setattr(fetch, "MOST_NAMES", 1000)
    assert len(fetcher.find("http://h/{000..999}.tar", "--data")) == 1000
    for pattern in (f"http://h/{endless}", "http://h/{0000..1000}.tar"):
        with pytest.raises(
            InputError, match=r"^--data http://h/\{0.*\.tar: the braces stand for more than 1,000 names"
        ):
            fetcher.find(pattern, "--data")
    for pattern in ("{0.." + "9" * 5000 + "}.tar", "{" * 5000 + "}" * 5000):
        with pytest.raises(InputError, match="^--data .{100}...: the braces cannot be read"):
            fetcher.find(pattern, "--data")


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_local_shard_that_is_no_file_is_told_and_not_waited_for(tmp_path, fetcher, ending):
    paths = {name: tmp_path / f"{name}.{ending}" for name in ("fifo", "folder", "device", "dangling", "loop", "gone")}
    os.mkfifo(paths["fifo"])
    paths["folder"].mkdir()
    paths["device"].symlink_to("/dev/zero")
    paths["dangling"].symlink_to(tmp_path / "nowhere.tar")
    paths["loop"].symlink_to(paths["loop"])
    reasons = {}
    for name, path in paths.items():
        with pytest.raises(Unreachable) as error:
            fetcher.local(str(path))
        reasons[name] = error.value.reason
        assert error.value.detail and not fetcher.is_here(str(path))
    with pytest.raises(Unreachable, match="unreachable"):
        fetcher.local(f"a\0b.{ending}")
    assert reasons == {
        **dict.fromkeys(("fifo", "folder", "device"), "not_a_file"),
        **dict.fromkeys(("dangling", "loop", "gone"), "unreachable"),
    }
    there = {str(path) for name, path in paths.items() if name != "gone"}
    assert set(fetcher.find(str(tmp_path / f"*.{ending}"), "--data")) == there
    assert not fetcher.cache.exists()


def test_the_pace_of_a_transfer_is_judged_over_a_window(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(remote, "LEAST_RATE", 100.0)

    def progress(*reports: tuple[float, int], size: int | None = None) -> str | None:
        clock[0] = 0.0
        pace = remote.Pace(window=10, longest=35, most_bytes=9000)
        try:
            for clock[0], value in reports:
                pace.absolute_update(value)
            if size is not None:
                pace.set_size(size)
        except Unreachable as error:
            return str(error)
        return None

    assert progress((10, 1000), (20, 2000), (30, 3000), (35, 3001)) is None
    assert progress((9, 0), (10, 999)) == "unreachable: too slow, 999 bytes in 10 seconds"
    assert progress((10, 5000), (20, 5999)) == "unreachable: too slow, 999 bytes in 10 seconds"  # not the average
    assert progress((10, 1000), (20, 2000), (30, 3000), (36, 8000)) == "unreachable: not finished within 35 seconds"
    assert progress((1, 9000)) is None
    assert progress((1, 9001)) == progress((1, 0), size=9001) == "too_large: more than 9,000 bytes"


def test_a_server_that_drips_is_given_up_after_a_second_attempt(server, fetcher, monkeypatch, capfd):
    server.files |= {"/a.tar": random_tar(), "/classes.txt": b"ant\n"}
    server.drip = 0.02
    assert fetcher.read_text(f"{server.url}/classes.txt") == "ant\n"  # within the window slowness is no fault
    monkeypatch.setattr(remote, "SLOW_SECONDS", 0.1)
    with pytest.raises(Unreachable, match="^unreachable: too slow, .* bytes in 0 seconds"):
        fetcher.local(f"{server.url}/a.tar")
    server.files["/classes.txt"] *= 100
    with pytest.raises(InputError, match=r"--data: http.*/classes.txt cannot be reached or read \(too slow, "):
        fetcher.read_text(f"{server.url}/classes.txt")
    assert server.requests == {"/a.tar": 2, "/classes.txt": 3} and cached(fetcher) == []
    monkeypatch.setattr(remote, "LEAST_RATE", 0.0)  # fast enough, but without an end
    monkeypatch.setattr(remote, "LONGEST", 0.3)
    with pytest.raises(Unreachable, match="^unreachable: "):
        fetcher.local(f"{server.url}/a.tar")
    assert server.requests["/a.tar"] == 3 and cached(fetcher) == []


def ended(process: int) -> bool:
    """True if the killed process ends; without a parent that waits for it, it stays a zombie."""
    for _ in range(1000):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
                continue
        return True
    return False


@pytest.mark.parametrize(
    "printing", ["", "while true; do printf x; sleep 0.02; done &", "yes no >&2 & sleep 0.1; kill $!;"]
)
def test_a_command_that_stands_still_is_killed_with_all_that_it_started(tmp_path, monkeypatch, printing):
    monkeypatch.setattr(remote, "SLOW_COMMAND_SECONDS", 0.3)
    monkeypatch.setattr(remote, "_POLL_SECONDS", 0.05)
    fetcher, ids = Fetcher(tmp_path / "cache", 0, allow_pipe=True), tmp_path / "ids"
    with pytest.raises(Unreachable, match="^unreachable: too slow"):
        fetcher.local(f"pipe:{printing} sleep 600 & echo $! >> {ids}; wait")
    started = [int(line) for line in ids.read_text().split()]
    assert len(started) == 2 and cached(fetcher) == []
    assert all(map(ended, started))


NO_TARS = {
    b"<!DOCTYPE html><title>Log in</title>" + b" " * 600: "an HTML page: is a login needed?",
    b"\xef\xbb\xbf\n<HTML>" + b" " * 600: "an HTML page: is a login needed?",
    b"": "an empty file",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "it begins with b'version https://git-lfs.'",
    b'{"error": "busy"}' + b"\0" * 600: 'it begins with b\'{"error": "busy"}',
    gzip.compress(b"<html>" + b" " * 600, mtime=0): "an HTML page: is a login needed?",
    b"\0" * 511: "it begins with b'",
}


@pytest.mark.parametrize("content", NO_TARS, ids=lambda content: repr(content[:12]))
def test_what_is_no_tar_is_neither_kept_nor_asked_for_again_at_once(server, fetcher, content):
    url = f"{server.url}/a.tar"
    server.files["/a.tar"] = content
    with pytest.raises(Unreachable) as error:
        fetcher.local(url)
    assert error.value.reason == "not_a_tar" and error.value.detail.startswith(NO_TARS[content])
    assert server.requests == {"/a.tar": 1} and cached(fetcher) == [] and not fetcher.is_here(url)
    server.files["/a.tar"] = random_tar()  # now with a login
    path = fetcher.local(url)
    assert Path(path).read_bytes() == server.files["/a.tar"] and fetcher.is_here(url)
    assert copy_note(url, path) == f" (its copy is {path}: remove it to fetch the shard again)"


def test_every_kind_of_tar_is_kept(server, fetcher, tmp_path):
    old = bytearray(random_tar())
    old[257:265] = bytes(8)  # of before POSIX: known by its checksum alone
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + 8 * 32 + sum(old[156:512]))
    kinds = {"old": bytes(old), "empty": bytes(10240), "damaged": b"0" + random_tar()[1:]}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            tar.addfile(tarfile.TarInfo("n" * 60 + "/" + "é" * 40))
        kinds[str(form)] = file.getvalue()
    for name, content in kinds.items():
        server.files |= {f"/{name}.tar": content, f"/{name}.tgz": gzip.compress(content)}
        for ending in ("tar", "tgz"):
            assert Path(fetcher.local(f"{server.url}/{name}.{ending}")).read_bytes() == content
    local = tmp_path / "a.tar"
    assert copy_note(str(local), str(local)) == ""


def test_a_gzip_bomb_is_stopped_at_the_limit_and_leaves_nothing(server, tmp_path, monkeypatch):
    content = tar_bytes({"a.txt": bytes(200_000)})
    packed = gzip.compress(content)
    assert len(packed) < 2000
    server.files["/a.tar"], local = packed, tmp_path / "a.tar.gz"
    local.write_bytes(packed)
    monkeypatch.setattr(fetch, "_PIECE", 10_000)
    largest = 0

    def noted(source, size):
        nonlocal largest
        largest = max(largest, len(piece := read(source, size)))
        return piece

    read = gzip.GzipFile.read1
    monkeypatch.setattr(gzip.GzipFile, "read1", noted)
    for cache_bytes, least, ratio, limit in (
        (0, 5000, 20, 20 * len(packed)),
        (0, 50_000, 1, 50_000),
        (9999, 2**30, 1, 9999),
    ):
        monkeypatch.setattr(fetch, "LEAST_LIMIT", least)
        monkeypatch.setattr(fetch, "USUAL_RATIO", ratio)
        fetcher = Fetcher(tmp_path / "cache", cache_bytes)
        for shard in (f"{server.url}/a.tar", str(local)):
            with pytest.raises(Unreachable) as error:
                fetcher.local(shard)
            assert str(error.value) == f"too_large: unpacked it has more than {limit:,} bytes"
            assert cached(fetcher) == []
    assert 0 < largest <= 10_000
    monkeypatch.setattr(fetch, "LEAST_LIMIT", len(content))
    assert Path(Fetcher(tmp_path / "cache", 0).local(str(local))).read_bytes() == content


@pytest.mark.parametrize("piece", [1, 7, 1000, 4096, 2**20])
def test_unpacking_in_pieces_gives_what_unpacking_at_once_gives(monkeypatch, piece):
    monkeypatch.setattr(fetch, "_PIECE", piece)
    for content in (b"", b"a" * 4096, bytes(range(256)) * 16, os.urandom(3000) + bytes(3000)):
        packed = gzip.compress(content) + gzip.compress(b"") + gzip.compress(content[:999]) + bytes(600)
        unpacked = io.BytesIO()
        assert fetch.gunzip(io.BytesIO(packed), unpacked, 2**20)
        assert unpacked.getvalue() == gzip.decompress(packed)
        unpacked = io.BytesIO()
        assert not fetch.gunzip(io.BytesIO(packed[:-610]), unpacked, 2**20)
        assert gzip.decompress(packed).startswith(unpacked.getvalue())


def test_small_files_are_bounded_and_a_web_page_in_their_place_is_none(server, fetcher, tmp_path, monkeypatch):
    url, local = f"{server.url}/classes.txt", tmp_path / "classes.txt"

    def both(content: bytes) -> tuple:
        server.files["/classes.txt"] = content
        local.write_bytes(content)
        found = []
        for path in (url, str(local)):
            try:
                found.append(fetcher.read_text(path))
            except InputError as error:
                assert str(error).startswith(f"--data: {path} ")
                found.append(str(error).removeprefix(f"--data: {path} "))
        return tuple(found)

    assert both(b"\xef\xbb\xbfant\r\nbee\r\n") == ("ant\r\nbee\r\n",) * 2
    assert both(b"<!doctype html>\n<body>Log in") == (None, None)
    assert both(b"caf\xe9\n") == ("is not UTF-8 text; save it as UTF-8, or remove it",) * 2
    server.headers = {"Content-Encoding": "gzip"}
    assert both(gzip.compress(b"ant\n")) == ("ant\n",) * 2
    monkeypatch.setattr(fetch, "SMALL_BYTES", 1000)
    monkeypatch.setattr(remote, "SMALL_BYTES", 1000)
    remedies = "check the network", "check the file"
    limit = "cannot be reached or read (unpacked it has more than 1,000 bytes)"
    assert both(gzip.compress(bytes(2000))) == tuple(f"{limit}; {remedy}" for remedy in remedies)
    server.headers = {}
    assert both(b"x" * 1000) == ("x" * 1000,) * 2
    server.requests.clear()
    limit = "cannot be reached or read (more than 1,000 bytes)"
    assert both(b"x" * 1001) == tuple(f"{limit}; {remedy}" for remedy in remedies)
    assert server.requests == {"/classes.txt": 2}
    local.unlink()
    os.mkfifo(local)
    with pytest.raises(InputError, match="classes.txt cannot be read .*not a regular file.*; check the file"):
        fetcher.read_text(str(local))


def test_what_a_server_compresses_unasked_arrives_whole(server, fetcher):
    content = tar_bytes({"a.txt": bytes(9000)})
    server.files["/a.tar"], server.headers = gzip.compress(content), {"Content-Encoding": "gzip"}
    assert Path(fetcher.local(f"{server.url}/a.tar")).read_bytes() == content
    assert server.requests == {"/a.tar": 1}
    server.files["/b.tar"], server.headers = b"", {}
    with pytest.raises(Unreachable, match="not_a_tar: an empty file"):
        fetcher.local(f"{server.url}/b.tar")


def test_a_filesystem_that_cannot_be_made_is_one_line(fetcher, monkeypatch):
    class Broken(fsspec.AbstractFileSystem):
        def __init__(self, **options):
            raise RuntimeError("no credentials\nare here")

    fsspec.register_implementation("broken", Broken, clobber=True)
    for act in (
        lambda: fetcher.find("broken://a.tar?key=1", "--data"),
        lambda: fetcher.read_text("broken://index.json"),
    ):
        with pytest.raises(
            InputError, match=r"^--data broken://[a-z.?=1]+: broken:// cannot be used \(no credentials are here\)$"
        ):
            act()
