"""Loading of a step's data: workers, shared memory, reading ahead, and chunks used in order of arrival."""

import errno
import gc
import mmap
import multiprocessing
import os
import signal
import threading
from collections import namedtuple
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_shards import rows
from PIL import Image
from test_data_order import source, training_data
from toy import ToyTowers, toy_chunks

import train_siglip
from lib.backends import auto_workers, device
from lib.data import loading as data_loading
from lib.data import training
from lib.data.loading import LARGEST_PART, ImageBuffer, ReadAhead, bytes_in_flight, workers_that_fit
from lib.data.order import stable_hash
from lib.errors import InputError, RunError, machine_errors_reported
from lib.gradcache import prefetch
from lib.gradcache.step import GradCache, cached_step
from lib.losses import sigmoid
from lib.setup import data as data_setup
from lib.setup.data import Loading, chunks_ahead
from lib.setup.plan import BatchPlan

IMAGE = 3 * 224 * 224
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("cores", "world_size", "local", "workers"),
    [(16, 1, None, 15), (16, 2, 2, 7), (16, 8, 8, 1), (96, 16, 8, 11), (2, 1, None, 1), (1, 1, None, 1), (4, 8, 8, 1)],
    ids=["1 rank", "2 ranks", "8 ranks", "2 nodes of 8", "2 cores", "1 core", "more ranks than cores"],
)
def test_auto_workers_are_a_ranks_share_of_the_cores_but_one(monkeypatch, cores, world_size, local, workers):
    monkeypatch.setattr(device.joblib, "cpu_count", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("lib.distributed.rank_and_world_size", lambda: (0, world_size))
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert auto_workers() == workers


def shared_memory(monkeypatch, free: int) -> None:
    monkeypatch.setattr(data_loading.shutil, "disk_usage", lambda folder: Usage(free, 0, free))


def test_little_shared_memory_makes_parts_smaller_before_workers_fewer(monkeypatch):
    for free, workers, part in ((2**33, 15, 64), (64 * 2**20, 15, 5), (32 * 2**20, 10, 4), (2**20, 0, 4)):
        shared_memory(monkeypatch, free)
        assert workers_that_fit(15, IMAGE) == (workers, part)
        of_training = bytes_in_flight(workers, part, IMAGE) if workers else 0
        shared_memory(monkeypatch, free)
        assert 2 * of_training < free, "a validation reads as much at the same time"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared_memory(monkeypatch, 2**28)
    assert workers_that_fit(15, IMAGE) == (15, 5)
    assert workers_that_fit(0, IMAGE) == (0, LARGEST_PART)


def loading(monkeypatch, workers, free: int, state=None, data="somewhere", device="cpu") -> Loading:
    shared_memory(monkeypatch, free)
    monkeypatch.setattr(data_setup, "auto_workers", lambda: 15)
    config, device = train_siglip.DEFAULTS.__class__(workers=workers, data=(data,)), torch.device(device)
    return Loading.plan(config, state, SimpleNamespace(image_outputs=None, image_bytes=IMAGE), device)


def test_the_plan_says_why_workers_are_fewer_and_what_to_do(monkeypatch):
    assert loading(monkeypatch, "auto", 2**34) == Loading(15, 64)
    fewer = loading(monkeypatch, "auto", 32 * 2**20)
    assert fewer.workers == 10 and fewer.part_size == 4
    assert fewer.warning == (
        "10 of 15 workers on each rank: /dev/shm, through which they send images, has 32 MiB free; "
        "give it 0.70 GiB (docker run --shm-size)"
    )
    smaller = loading(monkeypatch, 15, 64 * 2**20)
    assert smaller.workers == 15 and smaller.warning.startswith("15 workers send 5 images at a time: /dev/shm")
    with pytest.raises(InputError, match=r"--workers 15: /dev/shm.* enough for 10; lower it, or give it"):
        loading(monkeypatch, 15, 32 * 2**20)


def test_the_digits_are_read_by_workers_where_the_towers_leave_the_cores_free(monkeypatch):
    assert loading(monkeypatch, "auto", 2**34, data="digits").workers == 0
    assert loading(monkeypatch, "auto", 2**34, data="digits", device="cuda").workers == 15
    assert loading(monkeypatch, 2, 2**34, data="digits").workers == 2


def test_a_resumed_run_reads_as_it_did_where_that_fits(monkeypatch):
    state = SimpleNamespace(progress={"workers": 3, "part_size": 16})
    for workers in ("auto", 3):
        assert loading(monkeypatch, workers, 2**30, state) == Loading(3, 16)
        smaller = loading(monkeypatch, workers, 2**24, state)
        assert (smaller.workers, smaller.part_size) == (3, 6) and "3 workers send 6 images" in smaller.warning
    assert loading(monkeypatch, 2, 2**30, state) == Loading(2, 64)


def plan(**changes) -> BatchPlan:
    settings = {
        "effective_batch": 32768, "world_size": 1, "chunk_size": 512, "keep_graphs": 0, "xbm_size": 0, "embed_dim": 8,
        "image_bytes": IMAGE, "graph_bytes": 1, "chunk_bytes": 1, "state_bytes": 1,
    }  # fmt: skip
    return BatchPlan(**settings | changes)


def test_a_step_is_read_ahead_within_a_quarter_of_free_memory(monkeypatch):
    monkeypatch.setattr(data_setup, "total_memory", lambda device: 2**37)
    for free, workers, chunks in ((2**37, 4, 64), (4 * 2**30, 4, 13), (2**20, 4, 1), (2**37, 0, 0)):
        monkeypatch.setattr(data_setup, "free_memory", lambda device, free=free: free)
        assert chunks_ahead(plan(), workers) == chunks
    monkeypatch.setattr(data_setup, "total_memory", lambda device: 2**32)
    with pytest.raises(InputError, match="--effective-batch 32768: the images of a step take 4.59 GiB on this machine"):
        chunks_ahead(plan(), 4)


def test_images_lie_in_one_buffer_of_the_exact_size_that_no_fork_moves():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    buffer = ImageBuffer(5, 7, image, pin=False)
    first = buffer[0]
    assert first.shape == (7, 3, 8, 8) and buffer[4].data_ptr() == first.data_ptr() + 4 * 7 * image.nbytes
    assert buffer[5].data_ptr() == first.data_ptr() and buffer[1].data_ptr() == first.data_ptr() + first.nbytes
    child = os.fork()
    if not child:  # a data worker: where it has no such pages, to free them would free what it has in their place
        os._exit(0 if mapped(first.data_ptr()) else 1)
    assert os.waitpid(child, 0)[1] == 0 and "sh" in flags_of_mapping(first.data_ptr())
    assert "sh" not in flags_of_mapping(torch.zeros(2**22).data_ptr())


def mapped(address: int) -> bool:
    try:
        return bool(flags_of_mapping(address))
    except AssertionError:
        return False


def flags_of_mapping(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address; sh: a write after a fork moves no page of it."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(each, 16) for each in head.split("-"))
            within = start <= address < end
        elif within and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no mapping holds it")


class Cudart:
    """CUDA's functions that lock memory; fails on request."""

    def __init__(self, refuses: bool) -> None:
        self.refuses, self.locked, self.calls = refuses, {}, []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append("lock")
        self.locked |= {} if self.refuses else {address: size}
        return 801 if self.refuses else 0

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unlock")
        del self.locked[address]
        return 0


def test_too_little_host_memory_is_said_as_such(monkeypatch):
    def no_memory(*given, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", no_memory)
        with pytest.raises(RunError, match="out of host memory: 4.6 GiB for the images .*lower --effective-batch"):
            ImageBuffer(64, 512, torch.empty(3, 224, 224, dtype=torch.uint8), pin=False)
    cudart = SimpleNamespace(cudaHostRegister=lambda *given: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with pytest.raises(RunError, match="out of host memory"):
        ImageBuffer(3, 2, torch.zeros(5), pin=True)


VERSION_2 = {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 200"}
VERSION_1 = {
    "memory.limit_in_bytes": "900",
    "memory.usage_in_bytes": "600",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 100",
}


@pytest.mark.parametrize(
    ("membership", "folder", "files", "limit", "free"),
    [
        ("0::/job/step", "job", VERSION_2, 1000, 500),
        ("0::/", ".", VERSION_2 | {"memory.max": "max"}, None, None),
        ("9:memory:/docker/on/the/host", "memory", VERSION_1, 900, 400),
    ],
    ids=["a parent's limit", "no limit", "version 1 in a container"],
)
def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch, membership, folder, files, limit, free):
    (tmp_path / "membership").write_text(f"7:cpu:/elsewhere\n{membership}\n")
    (tmp_path / "groups" / folder).mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "groups" / folder / name).write_text(content + "\n")
    monkeypatch.setattr(device, "MEMBERSHIPS", tmp_path / "membership")
    monkeypatch.setattr(device, "CONTROL_GROUPS", tmp_path / "groups")
    machine = SimpleNamespace(available=5000, total=9000)
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: machine)
    assert device.total_memory(CPU) == (limit or 9000) and device.free_memory(CPU) == (free or 5000)


@pytest.mark.parametrize("fault", ["raises", "cannot send", "is killed"])
def test_a_worker_that_fails_ends_the_run_and_leaves_no_process(monkeypatch, fault):
    """Neither a lost piece nor a traceback that holds the workers may block the end."""

    def failing(*given):
        if fault == "raises":
            raise KeyError("a fault of ours")
        if fault == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return threading.Lock()  # cannot be pickled

    monkeypatch.setattr("lib.data.step_parts.IndexedParts.__getitem__", failing)
    expected, words = (KeyError, "a fault of ours") if fault == "raises" else (RunError, "a data worker was killed")
    steps = closing(training_data(source(), workers=1).steps(0, 2))
    with pytest.raises(expected, match=words) as kept, machine_errors_reported(), steps as opened:
        for step in opened:
            list(step)
    assert kept.value.__traceback__ and not [each for each in multiprocessing.active_children() if each.is_alive()]


@pytest.mark.parametrize("refuses", [False, True])
def test_page_locked_memory_has_the_exact_size_and_is_unlocked(monkeypatch, refuses):
    cudart = Cudart(refuses)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: cudart.calls.append("wait"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    buffer = ImageBuffer(3, 2, torch.zeros(5), pin=True)
    address = buffer[0].data_ptr()
    assert cudart.locked == ({} if refuses else {address: 3 * 2 * 5 * 4})
    buffer[2].fill_(7)
    assert buffer[5][1].tolist() == [7] * 5
    buffer.close()
    buffer.close()
    assert cudart.calls == (["lock"] if refuses else ["lock", "wait", "unlock"]) and not cudart.locked


def test_a_step_in_the_buffer_is_left_alone_until_the_next_is_asked_for():
    """With two workers that are far ahead: a slow reader sees every pair of its step whole."""
    alone = [rows(step) for step in training_data(source(), workers=0).steps(0, 5)]
    for ahead in (1, 4):
        walk, seen = training_data(source(), workers=2, ahead=ahead).steps(0, 5), []
        for step in walk:
            chunks = list(step)
            threading.Event().wait(0.05)
            seen.append(rows(chunks))
        assert seen == alone


def test_a_thread_reads_no_further_than_there_is_room():
    made, closed = [], threading.Event()

    def items():
        for number in range(100):
            made.append(number)
            yield number

    ahead = ReadAhead(items(), 3, closed)
    taken = [next(ahead), next(ahead)]
    while len(made) < 3:
        pass
    threading.Event().wait(0.05)
    assert taken == [0, 1] and made == [0, 1, 2] and ahead.ready == 1
    ahead.give_back(2)
    assert [next(ahead), next(ahead), next(ahead)] == [2, 3, 4]
    ahead.close()
    assert closed.is_set() and len(made) <= 6


def test_closing_does_not_wait_for_a_whole_chunk(monkeypatch):
    """A chunk of many pieces is abandoned between two of them."""
    data, begun = training_data(source(), workers=1, batch=24, chunk_size=24, part_size=1), []
    original = training.ReadAhead

    def watched(items, room, closed):
        begun.append(closed)
        return original(items, room, closed)

    monkeypatch.setattr(training, "ReadAhead", watched)
    walk = data.steps(0, 1000)
    next(walk)
    walk.close()
    assert begun[0].is_set() and not [t for t in threading.enumerate() if t.name == "read ahead"]


class Events(list):
    """A slow source of chunks and towers that note what happens when."""

    def chunks(self, chunks):
        for number, chunk in enumerate(chunks):
            self.append(f"chunk {number} is there")
            yield chunk


def test_pass_1_begins_when_the_first_chunk_is_there():
    events, chunks = Events(), toy_chunks(12, 3, None)

    class Slow:
        def __len__(self) -> int:
            return len(chunks)

        def __iter__(self):
            return events.chunks(chunks)

    for kept in (0, 2, 4):
        events.clear()
        towers, gradients = ToyTowers(0.3), []
        towers.register_forward_pre_hook(lambda *_: events.append("forward"))
        torch.manual_seed(1)
        cached_step(GradCache(towers, CPU, keep_graphs=kept), Slow(), sigmoid, None)
        assert events[:8] == [word for n in range(4) for word in (f"chunk {n} is there", "forward")]
        gradients.append([parameter.grad for parameter in towers.parameters()])
        at_once = ToyTowers(0.3)
        torch.manual_seed(1)
        cached_step(GradCache(at_once, CPU, keep_graphs=kept), chunks, sigmoid, None)
        for ours, theirs in zip(gradients[-1], (p.grad for p in at_once.parameters()), strict=True):
            assert torch.equal(ours, theirs)


class FakeCuda:
    """Streams and events that note their order; tensors that note their copies."""

    def __init__(self, monkeypatch) -> None:
        self.notes, self.streams = [], 0
        fake = self

        class Stream:
            def __init__(self, device=None) -> None:
                fake.streams += 1

            def wait_stream(self, other) -> None:
                pass

        class Event:
            def __init__(self, blocking: bool) -> None:
                assert blocking

            def record(self, stream) -> None:
                self.number = len([note for note in fake.notes if note[0] == "computed"])
                fake.notes.append(("computed", self.number))

            def synchronize(self) -> None:
                fake.notes.append(("waited for", self.number))

        computing = Stream()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: _nothing())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)

    def tensor(self, number: int):
        copied = lambda device, non_blocking: self.notes.append(("copied", number)) or self.tensor(number)  # noqa: E731
        return SimpleNamespace(to=copied, record_stream=lambda stream: None)


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_) -> None: ...


def test_at_most_two_chunks_are_on_the_way_and_one_stream_copies_them(monkeypatch):
    prefetch._copy_stream.cache_clear()
    fake = FakeCuda(monkeypatch)
    for _ in range(2):
        fake.notes.clear()
        for number, inputs in prefetch.on_device(range(5), lambda n: {"pixels": fake.tensor(n)}, CUDA):
            assert ("copied", number) in fake.notes and list(inputs) == ["pixels"]
        for number in range(2, 5):  # the copy of a chunk follows the end of the one before the last
            waited = fake.notes.index(("waited for", number - 2))
            assert fake.notes.index(("computed", number - 1)) < waited < fake.notes.index(("copied", number))
    assert fake.streams == 2, "one that computes, and one for the process that copies"
    prefetch._copy_stream.cache_clear()


def test_the_index_is_hashed_once_and_not_at_every_step(monkeypatch):
    hashed = []
    monkeypatch.setattr(training, "stable_hash", lambda *parts: hashed.append(1) or stable_hash(*parts))
    data = training_data(source())
    states = []
    for step in data.steps(0, 6):
        list(step)
        states.append(data.state_dict()["data"])
    assert len(hashed) == 1 and len(set(states)) == 1
    assert states[0] == stable_hash(37, *(a.tobytes().hex() for a in (source().image_id, source().first_text)))


def test_a_run_tells_the_buffer_and_keeps_the_plan_in_its_checkpoint(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    for number in range(12):
        (pictures / ("ant", "bee")[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / ("ant", "bee")[number % 2] / f"{number}.png")
    flags = [f"--data={pictures}", "--effective-batch=8", "--chunk-size=3", "--xbm-size=0", "--steps=2", "--workers=2"]
    train_siglip.main([*flags, "--eval-every=0", f"--output-dir={tmp_path / 'run'}"])
    said = capsys.readouterr().out
    assert "in 3 chunks of 3" in said and "(3 chunks of a step and 3 read ahead)" in said
    assert "2 worker processes decode" in said
    manifest = (tmp_path / "run" / "checkpoints" / "step_000002" / "checkpoint.json").read_text()
    assert f'"part_size": {LARGEST_PART}' in manifest and '"workers": 2' in manifest
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "read ahead"] and os.path.isdir("/dev/shm")
