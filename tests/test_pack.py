"""Packing neither loses nor adds samples, and gives the same bytes after interruptions."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.data import BadImage, open_evaluation, open_sources
from lib.data.order import sample_id, stable_hash
from lib.data.pack.__main__ import main
from lib.data.pack.writer import Record, ShardWriter
from lib.errors import InputError, RunError

ROOT = Path(__file__).resolve().parents[1]


def make_image(path: Path, number: int, size: tuple[int, int] = (9, 7), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def table(tmp_path) -> Path:
    """30 images in three splits, one to three captions each; some captions empty, an image missing, one broken."""
    folder = tmp_path / "table"
    lines = []
    for number in range(30):
        name = f"{number}.{'png' if number % 3 else 'JPG'}"
        make_image(folder / "images" / name, number)
        split = ("train", "train", "train", "val", "test")[number % 5]
        for caption in range(1 + number % 3):
            text = "" if caption == 1 and number % 2 else f"é {number}, caption {caption}"
            group = f"pair {number // 2}" if number < 10 else None
            lines.append({"image": name, "caption": text, "split": split, "group": group})
    lines += [{"image": "gone.jpg", "caption": text, "split": "train"} for text in "ab"]
    lines.append({"image": "0.JPG", "caption": None, "split": "test"})
    (folder / "images" / "1.png").write_bytes((folder / "images" / "1.png").read_bytes()[:60])
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no json\n")
    return path


@pytest.fixture
def folders(tmp_path) -> Path:
    folder = tmp_path / "folders"
    for number in range(24):
        split = "test" if number % 4 == 3 else "train"
        make_image(folder / split / ("10", "2", "big_bee")[number % 3] / f"{number}.png", number)
    return folder


def pack(source: Path | str, out: Path, *flags: str) -> Path:
    main([str(source), "--out", str(out), *flags])
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def records(folder: Path, split: str = "") -> list[dict]:
    found = []
    for shard in sorted(folder.glob(f"{split}*.tar")):
        found += [json.loads(content) for name, content in members(shard).items() if name.endswith(".json")]
    return found


def images_by_key(shard: Path) -> dict[str, bytes]:
    """The image bytes of the samples of a shard by their keys."""
    inside = members(shard)
    records = {name.removesuffix(".json"): json.loads(inside[name]) for name in inside if name.endswith(".json")}
    images = {name.partition(".")[0]: inside[name] for name in inside if not name.endswith((".json", ".txt"))}
    return {records[number]["key"]: content for number, content in images.items()}


def training_pairs(data: Path | str, captions: str, prompts: str | None = None) -> set[tuple]:
    """(id with the first text, group, texts, their numbers) of every pair that can be used."""
    source, _ = open_sources(str(data), None, prompts, captions=captions)
    if hasattr(source, "shards"):
        items = [item for shard in range(len(source.shards)) for _, found in source.read(shard) for item in found]
        items = [item for item in items if item.reason is None]
        assert source.size == len(items)
        return {
            (sample_id(stable_hash(item.key), item.numbers[0]), item.group, item.texts, item.numbers) for item in items
        }
    pairs = set()
    for pair in range(source.size):
        rows = range(source.first_text[pair], source.first_text[pair] + source.text_count[pair])
        texts, numbers = tuple(source.texts[row] for row in rows), tuple(int(source.text_number[row]) for row in rows)
        pairs.add((source.sample_id(pair, rows[0]), int(source.group[pair]), texts, numbers))
    return pairs


def evaluated(data: Path, split: str) -> dict[str, tuple]:
    """By image key: the pixels, the group, and the captions or the class."""
    found = open_evaluation(str(data), split, None)
    images = {}
    for index, key in enumerate(found.image_keys):
        try:
            pixels = found.open_image(index).tobytes()
        except BadImage as bad:
            pixels = bad.reason
        if found.captions is None:
            said = found.classes[found.labels[index]]
        else:
            said = [found.captions[row] for row in np.flatnonzero(found.caption_image == index)]
        images[key] = (pixels, int(found.group[index]), said)
    return images


def test_a_table_is_the_same_data_after_packing(table, tmp_path, capsys):
    out = pack(table, tmp_path / "out", "--shard-size", "4")
    for captions in ("one", "all"):
        assert training_pairs(out, captions) == training_pairs(table, captions)
    for split in ("train", "val", "test"):
        assert evaluated(out, split) == evaluated(table, split)
    first = next(iter(members(out / "train-000000.tar").items()))
    record = json.loads(members(out / "train-000000.tar")["000000000.json"])
    assert first[1] == (table.parent / "images" / record["key"]).read_bytes()  # the original bytes
    assert members(out / "train-000000.tar")["000000000.txt"].decode() == record["captions"][0]
    assert first[0].startswith("000000000.") and record["split"] == "train"
    assert {len(records(out, shard.stem)) for shard in sorted(out.glob("train-*.tar"))[:-1]} == {4}
    index = json.loads((out / "index.json").read_text())
    assert index["classes"] is None and sorted(index["shards"]) == sorted(path.name for path in out.glob("*.tar"))
    for name, entry in index["shards"].items():
        inside = records(out, Path(name).stem)
        assert entry["samples"] == len(inside) and name.startswith(entry["split"])
        assert entry["pairs"] == sum(bool(text) for record in inside for text in record["captions"])
        assert entry["bytes"] == (out / name).stat().st_size
    printed = capsys.readouterr().out
    assert "30 samples" in printed and "2 empty_caption" not in printed


def test_what_is_left_out_is_listed_with_its_reason(table, tmp_path, capsys):
    out = pack(table, tmp_path / "out", "--verify")
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {line["shard"] for line in lines} == {str(table)}
    found = [(line["key"], line["reason"]) for line in lines]
    source, _ = open_sources(str(table), None, None)
    expected = list(source.skipped) + [("1.png", "truncated"), ("0.JPG#0", "empty_caption")]
    for split in ("val", "test"):
        expected += open_evaluation(str(table), split, None).skipped
    assert sorted(found) == sorted(set(expected))
    assert ("captions.jsonl:64", "malformed_row") in found and ("gone.jpg", "missing") in found
    reasons = [reason for _, reason in found]
    printed = capsys.readouterr().out
    for reason in set(reasons):
        assert f"{reasons.count(reason)} {reason}" in printed
    assert "1.png" not in evaluated(out, "train")


def test_class_folders_are_the_same_data_after_packing(folders, tmp_path):
    out = pack(folders, tmp_path / "out")
    assert training_pairs(out, "all") == training_pairs(folders, "all")
    for split in ("train", "test"):
        assert evaluated(out, split) == evaluated(folders, split)
    packed, source = open_sources(str(out), None, None), open_sources(str(folders), None, None)
    assert packed[0].classes == source[0].classes == ("10", "2", "big bee")
    assert set(packed[0].sample_texts()) == set(source[0].sample_texts())
    record = records(out)[0]
    assert set(record) == {"key", "group", "split", "class"}
    again = pack(out, tmp_path / "again", "--shard-size", "5")
    assert evaluated(again, "train") == evaluated(folders, "train")
    assert training_pairs(again, "all") == training_pairs(folders, "all")
    assert [each["key"] for each in records(again, "train")] == [each["key"] for each in records(out, "train")]


def test_shards_without_keys_and_what_is_only_in_memory_are_packed_too(tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for shard in range(2):
        with tarfile.open(tars / f"{shard}.tar", "w") as tar:
            for number in range(4):
                file = io.BytesIO()
                Image.new("RGB", (5, 4), (shard, number, 9)).save(file, "WEBP" if number else "PNG", lossless=True)
                for name, content in (
                    (f"{number}.{'webp' if number else 'png'}", file.getvalue()),
                    (f"{number}.txt", b"" if number == 2 else f"text {number}".encode()),
                ):
                    if name != "3.txt":
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    source = f"{tars}/*.tar"
    out = pack(source, tmp_path / "out")
    assert evaluated(out, "train") == evaluated(source, "train") and len(records(out, "all-000000")) == 4
    skips = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(skip["key"], skip["reason"]) for skip in skips] == [
        (key, reason)
        for shard in range(2)
        for key, reason in ((f"{shard}.tar/2#0", "empty_caption"), (f"{shard}.tar/3", "no_text"))
    ]
    digits = pack("digits", tmp_path / "digits")
    assert evaluated(digits, "test") == evaluated("digits", "test")
    assert training_pairs(digits, "all", "digits") == training_pairs("digits", "all")


def test_the_same_input_gives_the_same_bytes_in_an_order_of_the_seed(table, tmp_path):
    first = pack(table, tmp_path / "a", "--shard-size", "7")
    second = pack(table, tmp_path / "b", "--shard-size", "7")
    assert contents(first) == contents(second)
    with tarfile.open(first / "train-000000.tar") as tar:
        assert {(each.mtime, each.uid, each.gid, each.uname, each.mode) for each in tar} == {(0, 0, 0, "", 0o644)}
    orders = {
        flags: [record["key"] for record in records(pack(table, tmp_path / f"out{''.join(flags)}", *flags), "train")]
        for flags in ((), ("--shuffle", "0"), ("--shuffle", "1"), ("--no-shuffle",))
    }
    assert orders[()] == orders[("--shuffle", "0")] != orders[("--shuffle", "1")]
    named = [json.loads(line)["image"] for line in table.read_text().splitlines()[:-2]]
    kept = [key for key in dict.fromkeys(named) if key in orders[()]]
    assert orders[("--no-shuffle",)] == kept != orders[()]
    assert sorted(orders[("--shuffle", "1")]) == sorted(kept)


def kill_at(call: int, owner: type, method: str, when: str) -> None:
    """End this process as SIGKILL does, before or after the given call of a method."""
    original, calls = getattr(owner, method), []

    def killing(*arguments):
        calls.append(None)
        if when == "before" and len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments)
        if when == "after" and len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, method, killing)


def test_killed_anywhere_and_gone_on_with_the_result_is_the_same(table, tmp_path, capfd):
    flags = ("--shard-size", "4", "--verify")
    unbroken = contents(pack(table, tmp_path / "unbroken", *flags))
    places = [
        (1, ShardWriter, "add", "before"),
        (10, ShardWriter, "add", "after"),
        (1, ShardWriter, "finish", "after"),  # named, not yet recorded
        (3, Record, "add", "after"),
        (2, ShardWriter, "finish", "before"),
        (1, Path, "replace", "before"),  # the skipped samples are written under another name
        (2, Path, "replace", "before"),  # so is the index
        (1, Record, "finish", "before"),  # all shards there, the index too
    ]
    out = tmp_path / "broken"

    def killed(*place) -> None:
        kill_at(*place)
        pack(table, out, *flags)

    for place in places:  # one after another in the same folder: it is interrupted again and again
        process = multiprocessing.get_context("fork").Process(target=killed, args=place)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not any(name.endswith(".tar") and content != unbroken[name] for name, content in contents(out).items())
    capfd.readouterr()
    with open(out / "packing.jsonl", "ab") as record:
        record.write(b'{"split": "te')  # killed in the middle of a line
    assert contents(pack(table, out, *flags)) == unbroken
    assert "resuming after" in capfd.readouterr().out
    assert contents(pack(table, out, *flags)) == unbroken
    assert "is done already: 29 samples" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("good", "broken", "limit", "left", "named"),
    [
        (2, 0, 100, {"packing.jsonl"}, ""),
        (2, 0, 9_000, {"packing.jsonl"}, ""),  # of a shard nothing is left
        (2, 60, 11_000, {"packing.jsonl", "all-000000.tar"}, ""),  # the record's line on a shard that has its name
        (2, 30, 11_000, {"packing.jsonl", "all-000000.tar", "all-000001.tar"}, "skipped.jsonl"),
        (40, 1, 11_000, {"packing.jsonl", "skipped.jsonl", *(f"all-{n:06d}.tar" for n in range(40))}, "index.json"),
    ],
    ids=["record", "shard", "line", "skipped", "index"],
)
def test_a_full_disk_leaves_no_half_file_and_the_same_command_goes_on(
    good, broken, limit, left, named, tmp_path, full_beyond, capsys
):
    source, out = tmp_path / ("s" * 200) / ("s" * 200), tmp_path / "out"
    for number in range(good + broken):
        image = source / f"{number:02d}{'c' * 198}" / "1.png"
        make_image(image, number)
        if number < broken:
            image.write_bytes(b"no image")
    flags = ("--shard-size", "1", "--verify", "--no-shuffle")
    file = f": '{out / named}'" if named else ""
    told = f"^--out {out}: .*File too large{file}; finished shards are safe, the same command resumes$"
    with full_beyond(limit), pytest.raises(RunError, match=told):
        pack(source, out, *flags)
    assert contents(out).keys() == left
    assert contents(pack(source, out, *flags)) == contents(pack(source, tmp_path / "unbroken", *flags))
    assert f"{good} samples, {good} pairs in {good} shards" in capsys.readouterr().out


def test_a_folder_that_holds_something_else_is_refused(table, folders, tmp_path):
    out = pack(table, tmp_path / "out")
    before = contents(out)
    for source, flags, message in (
        (folders, (), "--out .* was packed with source .*captions.jsonl and not .*folders"),
        (table, ("--shard-size", "3"), "--out .* was packed with shard-size 1000 and not 3; name another folder"),
        (table, ("--verify",), "verify False and not True"),
    ):
        with pytest.raises(InputError, match=message):
            pack(source, out, *flags)
    with open(table, "a") as file:
        file.write(json.dumps({"image": "5.png", "caption": "new", "split": "train"}) + "\n")
    with pytest.raises(InputError, match="--out .* the data has changed since"):
        pack(table, out)
    with pytest.raises(InputError, match="--out .* holds captions.jsonl and no packed shards"):
        pack(table, table.parent)
    with pytest.raises(InputError, match="--out .* cannot be written"):
        pack(table, table / "out")
    assert contents(out) == before
    settings = json.loads(before["packing.jsonl"].splitlines()[0])
    running = Record(tmp_path / "running", settings)
    with pytest.raises(InputError, match="another process is packing"):
        Record(tmp_path / "running", settings)
    running.close()


def test_a_finished_shard_that_is_gone_is_not_passed_over(table, tmp_path):
    out = pack(table, tmp_path / "out", "--shard-size", "4")
    (out / "train-000001.tar").unlink()
    with pytest.raises(InputError, match="train-000001.tar is gone or changed"):
        pack(table, out, "--shard-size", "4")


def test_shards_stay_below_their_size(table, tmp_path):
    out = pack(table, tmp_path / "out", "--shard-bytes", "20K")
    sizes = [shard.stat().st_size for shard in sorted(out.glob("train-*.tar"))]
    assert len(sizes) > 2 and set(sizes[:-1]) == {20 * 1024}
    assert training_pairs(out, "all") == training_pairs(table, "all")
    tiny = pack(table, tmp_path / "tiny", "--shard-bytes", "1K")  # never less than a sample
    assert {len(records(tiny, shard.stem)) for shard in tiny.glob("*.tar")} == {1}
    both = pack(table, tmp_path / "both", "--shard-bytes", "1G", "--shard-size", "7")
    assert len(records(both, "train-000000")) == 7
    assert len(list(pack(table, tmp_path / "one", "--shard-bytes", "0.5GiB").glob("train*.tar"))) == 1


def test_larger_images_are_made_smaller_and_others_left_alone(tmp_path):
    folder = tmp_path / "in"
    make_image(folder / "a" / "wide.png", 0, (200, 50))
    make_image(folder / "a" / "small.png", 1, (64, 30))
    turned = Image.Exif()
    turned[0x0112] = 6
    make_image(folder / "b" / "turned.jpg", 2, (300, 150), exif=turned)
    make_image(folder / "b" / "small.jpg", 3, (20, 64), exif=turned)
    (folder / "b" / "broken.jpg").write_bytes((folder / "b" / "turned.jpg").read_bytes()[:3000])
    out = pack(folder, tmp_path / "out", "--max-side", "64", "--quality", "90")
    bytes_of = images_by_key(out / "all-000000.tar")
    sizes = {key: Image.open(io.BytesIO(content)).size for key, content in bytes_of.items()}
    assert sizes == {"a/wide.png": (64, 16), "a/small.png": (64, 30), "b/turned.jpg": (32, 64), "b/small.jpg": (20, 64)}
    for key in ("a/small.png", "b/small.jpg"):
        assert bytes_of[key] == (folder / key).read_bytes()
    assert Image.open(io.BytesIO(bytes_of["a/wide.png"])).format == "JPEG"
    assert json.loads((out / "skipped.jsonl").read_text())["reason"] == "truncated"
    fine = pack(folder, tmp_path / "fine", "--max-side", "64", "--quality", "100")
    assert len(images_by_key(fine / "all-000000.tar")["a/wide.png"]) > len(bytes_of["a/wide.png"])


def test_verify_lists_exactly_what_cannot_be_decoded(shared, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(shared / "data" / "broken", source / "class")
    names = {path.name for path in (source / "class").iterdir()}
    bad = {
        "bomb_196_megapixels.png": "oversized",
        "header_only.jpg": "truncated",
        "text_renamed.jpg": "not_an_image",
        "truncated.jpg": "truncated",
        "zero_bytes.jpg": "empty",
    }
    out = pack(source, tmp_path / "out", "--verify")
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"].rpartition("/")[2]: line["reason"] for line in lines} == bad and len(lines) == len(bad)
    assert {record["key"].rpartition("/")[2] for record in records(out)} == names - set(bad)
    assert all(not isinstance(pixels, str) for pixels, _, _ in evaluated(out, "train").values())
    unverified = pack(source, tmp_path / "all")
    assert {record["key"].rpartition("/")[2] for record in records(unverified)} == names - {"zero_bytes.jpg"}


def test_bad_flags_are_refused_before_any_work(table, tmp_path):
    out = tmp_path / "out"
    for flags, message in (
        (("--shard-size", "0"), "--shard-size 0 must be at least 1"),
        (("--max-side", "0"), "--max-side 0"),
        (("--shard-bytes", "many"), "--shard-bytes many is no size; write it as 500M"),
        (("--quality", "101"), "--quality 101"),
        (("--shuffle", "1", "--no-shuffle"), "exclude each other"),
    ):
        with pytest.raises(InputError, match=message):
            pack(table, out, *flags)
    with pytest.raises(InputError, match="SOURCE .*nowhere is not there"):
        pack(tmp_path / "nowhere", out)
    for name in ("x/1.jpg", "y/2.jpg"):
        (tmp_path / "bad" / name).parent.mkdir(parents=True)
        (tmp_path / "bad" / name).write_bytes(b"")
    assert not out.exists()
    with pytest.raises(InputError, match=r"SOURCE .*nothing can be packed \(2 empty\)"):
        pack(tmp_path / "bad", out)
    assert not list(out.iterdir())


@pytest.mark.slow
def test_packing_as_a_user_runs_it(folders, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lib.data.pack", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    out = tmp_path / "out"
    done = run(str(folders), "--out", str(out))
    assert done.returncode == 0 and "24 samples, 24 pairs in 2 shards (1 train, 1 test)" in done.stdout
    assert "packing: 100%" in done.stderr
    assert evaluated(out, "test") == evaluated(folders, "test")
    failed = run(str(tmp_path / "nowhere"), "--out", str(out))
    assert failed.returncode == 2 and failed.stderr.startswith("error: SOURCE") and failed.stderr.count("\n") == 1
