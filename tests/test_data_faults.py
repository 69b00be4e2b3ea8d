"""Every fault of a shard is one counted skip with a reason, wherever it occurs; the rest of the data is used."""

import gzip
import io
import os
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from made_shards import Remote, all_ranks, captioned, first_step, make_tar, tar_bytes, totals, training_data
from PIL import Image

from lib.data import open_evaluation, open_sources, remote
from lib.data.dealing import Dealing, ShardPosition
from lib.data.fetcher import Fetcher, Unreachable
from lib.data.images import MAX_PIXELS
from lib.data.order import stable_hash
from lib.data.shard_stream import ShardStream
from lib.errors import InputError

LAYOUTS = [(1, 0), (2, 3), (4, 1)]


def good(shard: str, numbers) -> list[int]:
    return [stable_hash(f"{shard}/{number:04d}") for number in numbers]


def first_pass(source, world_size: int, workers: int, steps: int = 10):
    """(ids used, totals, sorted skips) of the first pass on all ranks."""
    parts = all_ranks(source, world_size, workers=workers, augment="none")
    for part in parts:
        list(part.steps(0, steps))
    skips = sorted(
        (skip.where.partition(" (its copy")[0].rpartition("/")[2], skip.key, skip.reason)
        for part in parts
        for skip in part.new_skips()
    )
    return sorted(id for part in parts for id in part.first_pass), totals(parts), skips


def huge() -> bytes:
    """A PNG of few bytes and more pixels than are decoded."""
    file = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 8000 + 1, 8000)).save(file, "PNG")
    return file.getvalue()


def faulty_members() -> dict[str, bytes]:
    """Samples 0 to 11: even ones are good, each odd one has another fault."""
    members = captioned(range(12))
    members["0001.png"] = huge()
    members["0003.png"] = b"not an image"
    members["0003.txt"] = "naïve".encode()  # UTF-8 beyond ASCII is no fault
    members["0005.txt"] = "naïve".encode("latin-1")
    members["0007.txt"] = b" \n"
    del members["0009.png"], members["0011.txt"]
    return members


FAULTS = [
    ("a.tar", "a.tar/0001", "oversized"),
    ("a.tar", "a.tar/0003", "not_an_image"),
    ("a.tar", "a.tar/0005", "not_utf8"),
    ("a.tar", "a.tar/0007", "empty_caption"),
    ("a.tar", "a.tar/0009", "no_image"),
    ("a.tar", "a.tar/0011", "no_text"),
]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("world_size, workers", LAYOUTS)
def test_every_fault_of_a_sample_is_counted_and_named_once(tmp_path, world_size, workers, counted):
    make_tar(tmp_path / "a.tar", faulty_members())
    make_tar(tmp_path / "b.tar", captioned(range(3)))
    source, _ = open_sources(str(tmp_path / "?.tar"), None, None)
    assert source.size == 12 - 4 + 3  # what decoding alone would find is not known yet
    source = source if counted else replace(source, samples=None)
    used, (read, count, skipped), skips = first_pass(source, world_size, workers)
    assert skips == FAULTS
    assert used == sorted(good("a.tar", range(0, 12, 2)) + good("b.tar", range(3)))
    assert read == count + sum(skipped.values()) == 15 and skipped == {why: 1 for _, _, why in FAULTS}


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("world_size, workers", LAYOUTS)
def test_every_fault_of_a_shard_is_one_event_and_what_can_be_read_is_used(tmp_path, world_size, workers, counted):
    """A cut tar, no tar at all, a zipped one cut, one that is no gzip, one that cannot be reached, and a good one."""
    whole = tar_bytes(captioned(range(8)))
    (tmp_path / "a-cut.tar").write_bytes(whole[: whole.index(b"0005.txt") + 100])
    (tmp_path / "b-none.tar").write_bytes(b"no tar at all")
    zipped = gzip.compress(whole, 1)
    (tmp_path / "c-cut.tar.gz").write_bytes(zipped[: len(zipped) * 2 // 3])
    (tmp_path / "d-none.tar.gz").write_bytes(b"no gzip at all")
    make_tar(tmp_path / "e-down.tar", captioned(range(8)))
    make_tar(tmp_path / "f-good.tar", captioned(range(8)))
    fetcher = SomeDown(tmp_path / "cache", 0)
    source, _ = open_sources(str(tmp_path / "{*.tar,*.tar.gz}"), None, None, fetcher=fetcher)
    source = source if counted else replace(source, samples=None)
    used, (read, count, skipped), skips = first_pass(source, world_size, workers)
    assert skips == [
        ("a-cut.tar", "a-cut.tar", "truncated_tar"),
        ("b-none.tar", "b-none.tar", "unreadable_tar"),
        ("c-cut.tar.gz", "c-cut.tar.gz", "bad_gzip"),
        ("d-none.tar.gz", "d-none.tar.gz", "bad_gzip"),
        ("e-down.tar", "e-down.tar", "unreachable"),
    ]
    unzipped = [id for id in used if id in good("c-cut.tar.gz", range(8))]
    assert 2 <= len(unzipped) < 8
    assert used == sorted(good("a-cut.tar", range(5)) + unzipped + good("f-good.tar", range(8)))
    assert read == count + sum(skipped.values()) and count == len(used)
    assert skipped == {"truncated_tar": 1, "unreadable_tar": 1, "bad_gzip": 2, "unreachable": 1}


@pytest.mark.parametrize("world_size, workers", LAYOUTS)
def test_a_shard_that_is_no_file_is_one_event(tmp_path, world_size, workers):
    make_tar(tmp_path / "a.tar", captioned(range(6)))
    os.mkfifo(tmp_path / "b.tar")
    (tmp_path / "c.tar").mkdir()
    os.mkfifo(tmp_path / "d.tar.gz")
    source, _ = open_sources(str(tmp_path / "{*.tar,*.tar.gz}"), None, None, fetcher=Fetcher(tmp_path / "cache", 0))
    assert source.size == 6 and source.samples == (6, 0, 0, 0)
    used, (read, count, skipped), skips = first_pass(source, world_size, workers)
    assert used == sorted(good("a.tar", range(6)))
    assert skips == [(name, name, "not_a_file") for name in ("b.tar", "c.tar", "d.tar.gz")]
    assert (read, count, skipped) == (9, 6, {"not_a_file": 3})


@pytest.mark.parametrize("name", ["b.tar", "b.tar.gz"])
def test_an_only_shard_that_is_no_file_is_one_line(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(
        InputError, match=f"^--data .*{name} cannot be reached or read \\(not_a_file: a FIFO, device or"
    ):
        open_sources(str(tmp_path / name), None, None, fetcher=Fetcher(tmp_path / "cache", 0))


class SomeDown(Fetcher):
    """A real fetcher for which shards of one name are unreachable."""

    def local(self, shard: str) -> str:
        if "down" in shard:
            raise Unreachable("unreachable")
        return super().local(shard)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server of four shards: 1.tar comes at the third attempt, 2.tar never."""
    monkeypatch.setattr(remote, "BASE_DELAY", 0.001)
    for number in range(4):
        make_tar(tmp_path / f"{number}.tar", captioned(range(6)))
    asked = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            name = self.path.partition("?")[0]
            asked[name] += 1
            if name == "/2.tar" or (name == "/1.tar" and asked[name] < 3):
                return self.send_error(503)
            return super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_may_fail_for_a_while_and_one_that_stays_down_is_one_event(server, tmp_path, workers):
    fetcher = Fetcher(tmp_path / "cache", 0)
    source, _ = open_sources(f"{server}/{{0..3}}.tar?key=secret", None, None, fetcher=fetcher)
    assert source.size is None and source.names == ("0.tar", "1.tar", "2.tar", "3.tar")
    used, (read, _, skipped), skips = first_pass(source, 1, workers)
    assert used == sorted(id for shard in (0, 1, 3) for id in good(f"{shard}.tar", range(6)))
    assert read == 19 and skipped == {"unreachable": 1} and skips == [("2.tar", "2.tar", "unreachable")]


@pytest.fixture
def login_page(tmp_path):
    """The address of a web server that answers with a page, but for 1.tar."""
    make_tar(tmp_path / "1.tar", captioned(range(6)))

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path == "/1.tar":
                return super().do_GET()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<!DOCTYPE html><html><title>Log in</title></html>")

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_login_page_is_no_shard_no_index_and_no_list_of_classes(login_page, tmp_path):
    fetcher = Fetcher(tmp_path / "cache", 0)
    source, _ = open_sources(f"{login_page}/{{0..2}}.tar", None, None, fetcher=fetcher)
    assert source.classes is None
    used, (read, count, skipped), skips = first_pass(source, 1, 0)
    assert used == sorted(good("1.tar", range(6))) and (read, count, skipped) == (8, 6, {"not_a_tar": 2})
    assert skips == [(name, name, "not_a_tar") for name in ("0.tar", "2.tar")]
    for data in ("{2..9}.tar", "folder", "2.tar?key=secret"):
        with pytest.raises(InputError) as error:
            open_sources(f"{login_page}/{data}", None, None, fetcher=fetcher)
        line = str(error.value)
        assert "cannot be reached or read (not_a_tar: an HTML page: is a login needed?)" in line and "\n" not in line
        assert line.startswith(f"--data {login_page}/")


def test_a_shard_that_was_down_is_tried_again_in_the_next_pass(tmp_path):
    for number in range(3):
        make_tar(tmp_path / f"{number}.tar", captioned(range(4)))
    source, _ = open_sources(str(tmp_path / "?.tar"), None, None)
    down, up = (Remote(tmp_path, 0, log=tmp_path / "log", down=names) for names in (("1.tar",), ()))
    first = training_data(replace(source, fetcher=down), augment="none")
    list(first.steps(0, 1))
    list(first.steps(1, 2))
    assert totals([first])[2] == {"unreachable": 1} and sorted(first.first_pass) == sorted(
        good("0.tar", range(4)) + good("2.tar", range(4))
    )
    second = training_data(replace(source, fetcher=up), augment="none")
    second.load_state_dict(first.state_dict())
    later = {id for step in second.steps(2, 4) for chunk in step for id in chunk.sample_id.tolist()}
    assert later == set(good("0.tar", range(4)) + good("1.tar", range(4)) + good("2.tar", range(4)))


def test_a_bad_shard_in_the_cache_is_named_with_its_copy(server, tmp_path):
    fetcher = Fetcher(tmp_path / "cache", 0)
    source, _ = open_sources(f"{server}/{{0..1}}.tar", None, None, fetcher=fetcher)
    copy = Path(fetcher.local(source.shards[1]))
    copy.write_bytes(copy.read_bytes()[:5000])
    (data,) = all_ranks(source, 1, augment="none")
    list(data.steps(0, 2))
    (skip,) = data.new_skips()
    assert (
        skip.reason == "truncated_tar"
        and skip.where == f"{server}/1.tar (its copy is {copy}: remove it to fetch the shard again)"
    )


def test_shards_that_all_stay_down_are_an_error_and_no_endless_loop(tmp_path):
    make_tar(tmp_path / "0.tar", captioned(range(4)))
    source, _ = open_sources(str(tmp_path / "0.tar"), None, None)
    down = Remote(tmp_path, 0, log=tmp_path / "log", down=("tar",))
    with pytest.raises(InputError, match="no pair that can be used"):
        list(training_data(replace(source, fetcher=down)).steps(0, 1))
    with pytest.raises(InputError, match="--data .*0.tar.* cannot be reached or read"):
        open_sources(str(tmp_path / "0.tar"), None, None, fetcher=down)


def test_a_shard_that_goes_down_between_runs_costs_its_waiting_samples_and_one_event(tmp_path):
    for number in range(3):
        make_tar(tmp_path / f"{number}.tar", captioned(range(6)))
    source, _ = open_sources(str(tmp_path / "?.tar"), None, None)
    first = training_data(source, shuffle_buffer=100)  # all samples wait in the buffer
    first_step(first)
    down = Remote(tmp_path, 0, log=tmp_path / "log", down=("1.tar",))
    second = training_data(replace(source, fetcher=down), shuffle_buffer=100)
    second.load_state_dict(first.state_dict())
    list(second.steps(1, 3))
    assert second.counts.skipped == {"unreachable": 1}
    used = first.first_pass + second.first_pass
    assert len(used) == len(set(used)) == second.counts.used
    assert set(good("0.tar", range(6)) + good("2.tar", range(6))) <= set(used)


def test_the_next_shard_is_fetched_while_one_is_read(tmp_path):
    for number in range(4):
        make_tar(tmp_path / f"{number}.tar", captioned(range(6)))
    source, _ = open_sources(str(tmp_path / "?.tar"), None, None)
    watched = Remote(tmp_path, 0, log=tmp_path / "log")
    far = replace(source, shards=tuple(f"far://{shard}" for shard in source.shards), fetcher=watched)
    for shards, ahead in ((far, 1), (replace(source, fetcher=watched), 0)):
        stream = ShardStream(shards, Dealing(4, source.samples, 0, 1, {}), 0, 1, ShardPosition())
        before = set(threading.enumerate())
        stream.next()
        for thread in set(threading.enumerate()) - before:
            assert thread.daemon
            thread.join()
        assert len(watched.opened()) == 1 + ahead


def test_faults_of_shards_to_evaluate_on_are_left_out_and_listed(tmp_path):
    make_tar(tmp_path / "a.tar", faulty_members())
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:3000])
    make_tar(tmp_path / "c-down.tar", captioned(range(3)))
    data = open_evaluation(str(tmp_path / "*.tar"), "auto", None, fetcher=SomeDown(tmp_path / "cache", 0))
    assert set(data.skipped) == {
        ("a.tar/0005", "not_utf8"),
        ("a.tar/0007#0", "empty_caption"),
        ("a.tar/0009", "no_image"),
        ("a.tar/0011", "no_text"),
        ("b.tar", "truncated_tar"),
        ("c-down.tar", "unreachable"),
    }
    assert [key for key in data.image_keys if key.startswith("a.tar")] == [
        f"a.tar/{n:04d}" for n in (0, 1, 2, 3, 4, 6, 8, 10)
    ]
