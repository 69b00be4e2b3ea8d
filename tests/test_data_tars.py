"""Tars of every kind: each name in them is a sample that is used or counted, and no field is misread silently."""

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from made_shards import all_ranks, png, totals
from small_runs import train

from lib.data import open_evaluation, open_sources
from lib.data.order import stable_hash
from lib.data.pack.__main__ import main as pack
from lib.data.pairs import parts_of
from lib.errors import InputError


def write_tar(path: Path, members: list[tuple[str, bytes]], end: bool = True) -> str:
    """A tar whose names may come twice; without its end where it was cut between two members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        length = tar.offset
    path.write_bytes(file.getvalue() if end else file.getvalue()[:length])
    return str(path)


def items(data, **options) -> list:
    source, _ = open_sources(data, None, None, **options)
    return [
        item
        for part in parts_of(source)
        for shard in range(len(part.shards))
        for _, found in part.read(shard)
        for item in found
    ]


def texts(data, **options) -> dict[str, tuple[str, ...] | str]:
    """By the sample's name: its texts, or the reason why it is skipped."""
    return {item.key.partition(".tar/")[2] or item.key: item.reason or item.texts for item in items(data, **options)}


def with_json(records: list) -> list[tuple[str, bytes]]:
    contents = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    return [m for n, text in enumerate(contents) for m in ((f"{n}.png", png(n)), (f"{n}.json", text))]


def test_names_with_dots_are_names(tmp_path):
    members = []
    for number in range(8):
        name = f"{number:04d}" if number % 2 else f"photo.v{number}"
        members += [(f"{name}.PNG", png(number)), (f"{name}.txt", f"caption {number}".encode())]
    # webdataset's convention: 0009.seg.png is a further member of 0009, not a sample without a text
    members += [("0009.png", png(9)), ("0009.seg.png", png(10)), ("0009.txt", b"nine"), ("0009.flow.npy", b"x")]
    path = write_tar(tmp_path / "a.tar", members)
    found = texts(path)
    assert len(found) == 9 and found["photo.v2"] == ("caption 2",) and found["0009"] == ("nine",)
    (data,) = all_ranks(open_sources(path, None, None)[0], 1)
    list(data.steps(0, 1))
    assert totals([data]) == (9, 9, {})
    assert len(open_evaluation(path, "auto", None)) == 9


def test_a_name_that_comes_twice_is_one_sample_and_a_counted_one(tmp_path):
    twice = [("a.png", png(0)), ("a.txt", b"first"), ("a.png", png(1)), ("a.txt", b"second"), ("b.png", png(2))]
    later = [("b.txt", b"b"), ("a.png", png(3)), ("a.txt", b"third"), ("c.png", png(4)), ("c.png", png(5))]
    path = write_tar(tmp_path / "a.tar", [*twice, *later, ("c.txt", b"c")])
    found = [(item.key.rpartition("/")[2], item.reason or item.texts[0]) for item in items(path)]
    assert found == [
        ("a", "first"),
        ("a", "repeated_name"),
        ("b", "b"),
        ("a", "repeated_name"),
        ("c", "c"),
        ("c", "apart"),
    ]
    assert Counter(reason for _, reason in open_sources(path, None, None)[0].unusable) == {
        "repeated_name": 2,
        "apart": 1,
    }


def test_members_that_are_not_read_are_counted_and_hidden_ones_are_no_part_of_the_data(tmp_path):
    members = [("1.png", png(1)), ("1.txt", b"one"), ("2.npy", b"x"), ("3.mp4", b"x"), ("README", b"x")]
    members += [("4.heic", b"\0\0\0\x18ftypheic"), ("4.txt", b"four"), ("._1.png", b"\0\5\x16\7"), (".DS_Store", b"x")]
    members += [("5.jfif", png(5)), ("5.txt", b"five"), ("d.x/6.avif", png(6)), ("d.x/6.txt", b"six")]
    path = tmp_path / "a.tar"
    write_tar(path, members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("7.png")
        link.type, link.linkname = tarfile.LNKTYPE, "1.png"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    (data,) = all_ranks(open_sources(str(path), None, None)[0], 1)
    list(data.steps(0, 1))
    assert totals([data]) == (8, 3, {"no_image": 4, "unknown_format": 1})
    assert {skip.key.partition("/")[2] for skip in data.new_skips()} == {"2", "3", "README", "4", "7"}


@pytest.mark.parametrize("missing", [None, float("nan"), "", float("inf")])
def test_a_missing_group_and_key_are_missing(tmp_path, missing):
    records = [{"caption": f"text {n}", "group": missing, "key": missing} for n in range(4)]
    found = items(write_tar(tmp_path / "a.tar", with_json(records)))
    assert [item.key for item in found] == [f"a.tar/{n}" for n in range(4)]
    assert [item.group for item in found] == [stable_hash(f"a.tar/{n}") for n in range(4)]


def test_fields_of_every_type_have_a_meaning(tmp_path):
    records = [
        {"caption": 7, "group": 7},
        {"caption": 7.5, "group": 7.0},
        {"caption": ["a", None, 3]},
        {"caption": [["a"]]},
        {"caption": {"a": 1}},
        {"caption": "x", "group": ["a"]},
        {"caption": "x", "key": {"a": 1}},
        {"caption": True},
        [1],
        b"{",
        b"[" * 100_000,
        b'{"caption": "\\ud800"}',
        b"\xef\xbb\xbf" + json.dumps({"caption": "\ufeffmarked "}).encode(),
        b'{"caption": "x", "number": ' + b"1" * 5000 + b"}",
        b"",
    ]
    found = items(write_tar(tmp_path / "a.tar", with_json(records)))
    by_name = {}
    for item in found:
        by_name.setdefault(item.key.rpartition("/")[2], []).append(item.reason or item.texts[0])
    malformed = {str(n): ["malformed_json"] for n in (3, 4, 5, 6, 7, 8, 9, 10, 13)}
    assert by_name == malformed | {
        "0": ["7"],
        "1": ["7.5"],
        "2": ["a", "empty_caption", "3"],
        "11'": ["not_utf8"],  # the key is written as ascii() does
        "12": ["marked"],
        "14": ["no_text"],
    }
    assert found[0].group == found[1].group == stable_hash("7")


def test_a_missing_caption_in_json_leaves_the_word_to_txt(tmp_path):
    members = [("a.png", png(0)), ("a.json", b'{"caption": NaN}'), ("a.txt", b"\xef\xbb\xbf of the txt\r\n")]
    members += [("b.png", png(1)), ("b.json", b'{"captions": [null, ""]}'), ("b.txt", b"too")]
    members += [("c.png", png(2)), ("c.json", b'{"captions": ["in json"]}'), ("c.txt", b"not this")]
    found = texts(write_tar(tmp_path / "a.tar", members))
    assert found == {"a": ("of the txt",), "b": ("too",), "c": ("in json",)}


def test_two_downloads_with_the_same_keys_are_different_samples(tmp_path):
    for place, name in enumerate(("first", "second")):
        members = []
        for n in range(4):
            record = {"caption": f"text {place} {n}", "key": f"{n:09d}", "status": "success"}
            members += [(f"{n:09d}.png", png(4 * place + n)), (f"{n:09d}.json", json.dumps(record).encode())]
        write_tar(tmp_path / name / "00000.tar", members)
    for data in (
        str(tmp_path / "{first,second}/00000.tar"),
        [str(tmp_path / n / "00000.tar") for n in ("first", "second")],
    ):
        found = items(data)
        assert len({item.group for item in found}) == len({item.image_id for item in found}) == 8


def test_two_packed_folders_with_the_same_file_names_are_different_samples(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        for n in range(3):
            (tmp_path / place / f"{n}.png").write_bytes(png(n + 10 * (place == "b")))
        rows = "".join(f"{n}.png,text {place} {n}\n{n}.png,again {place} {n}\n" for n in range(3))
        (tmp_path / place / "captions.csv").write_text("filename,caption\n" + rows)
        pack([str(tmp_path / place / "captions.csv"), "--out", str(tmp_path / f"packed_{place}")])
    alone = items(str(tmp_path / "packed_a"))
    assert len({item.group for item in alone}) == 3 and len(alone) == 6  # captions of one image are positives
    together = items(str(tmp_path / "packed_{a,b}" / "*.tar"))
    assert len({item.group for item in together}) == 6 and len(together) == 12


def test_images_and_texts_apart_are_refused_with_the_remedy(tmp_path):
    images, captions = [(f"{n}.png", png(n)) for n in range(4)], [(f"{n}.txt", b"text") for n in range(4)]
    for members in (images + captions, captions + images):
        with pytest.raises(InputError, match="not next to each other in the tar; sort its members by name"):
            open_sources(write_tar(tmp_path / "a.tar", members), None, None)


def test_class_numbers_beyond_the_list_are_counted(tmp_path):
    labels = [b"0", b"1", b"2", b"1" * 5000, "٣".encode(), b"\xef\xbb\xbf1\n", b"ant"]
    members = [m for n, label in enumerate(labels) for m in ((f"{n}.png", png(n)), (f"{n}.cls", label))]
    (tmp_path / "classes.txt").write_text("red_one\ngreen\n")
    path = write_tar(tmp_path / "a.tar", [*members, ("7.png", png(7)), ("7.json", b'{"class": 1.0}')])
    found = texts(path)
    assert [found[str(n)] for n in range(8)] == [
        ("a photo of red one",),
        ("a photo of green",),
        "unknown_class",
        "unknown_class",
        "unknown_class",
        ("a photo of green",),
        ("a photo of ant",),
        ("a photo of green",),
    ]
    evaluation = open_evaluation(path, "auto", None)
    assert len(evaluation) == 5 and Counter(reason for _, reason in evaluation.skipped) == {"unknown_class": 3}


def test_lines_of_txt_as_captions(tmp_path):
    members = [
        ("0.png", png(0)),
        ("0.txt", b"one line\n\n  two lines \r\nthree"),
        ("1.png", png(1)),
        ("1.txt", b"\n \n"),
    ]
    members += [("2.png", png(2)), ("2.txt", b"alone")]
    path = write_tar(tmp_path / "a.tar", members)
    found = items(path, captions="lines")
    assert [item.reason or item.texts for item in found] == [
        ("one line",), ("two lines",), ("three",), "no_text", ("alone",)
    ]  # fmt: skip
    assert open_sources(path, None, None, captions="lines")[0].size == 4
    assert texts(path)["0"] == ("one line\n\n  two lines \r\nthree",)
    assert open_evaluation(path, "auto", None, captions="lines").captions == ["one line", "two lines", "three", "alone"]
    pack([path, "--out", str(tmp_path / "packed"), "--captions", "lines"])
    assert [item.texts for item in items(str(tmp_path / "packed"))] == [item.texts for item in found if item.texts]
    with pytest.raises(InputError, match="--captions lines splits the .txt members of tar shards, and digits has none"):
        open_sources("digits", None, None, captions="lines")


def test_shards_cut_between_two_members_lose_one_sample_each_and_say_so(tmp_path):
    whole = [m for n in range(3) for m in ((f"{n}.png", png(n)), (f"{n}.txt", b"text"))]
    write_tar(tmp_path / "0.tar", whole[:5])  # the text of sample 2 stands in the next shard
    write_tar(tmp_path / "1.tar", whole[5:] + [("3.png", png(3)), ("3.txt", b"text")])
    write_tar(tmp_path / "2.tar", whole[:3], end=False)
    parts = all_ranks(open_sources(str(tmp_path / "*.tar"), None, None)[0], 1)
    list(parts[0].steps(0, 1))
    assert totals(parts) == (7, 4, {"no_text": 1, "no_image": 1, "truncated_tar": 1})


def random_tar(draw: random.Random, path: Path) -> tuple[Counter, int]:
    """A tar of odd samples: the reasons expected of its skipped ones, and how many are used."""
    kinds = {
        "good": lambda name: [(f"{name}.png", png(1)), (f"{name}.txt", b"text")],
        "no_text": lambda name: [(f"{name}.png", png(2))],
        "no_image": lambda name: [(f"{name}.txt", b"text")],
        "empty_caption": lambda name: [(f"{name}.jpe", png(3)), (f"{name}.txt", b" \n")],
        "not_utf8": lambda name: [(f"{name}.png", png(4)), (f"{name}.txt", b"caf\xe9")],
        "malformed_json": lambda name: [(f"{name}.json", b"{"), (f"{name}.png", png(4))],
        "not_an_image": lambda name: [(f"{name}.jpg", b"text"), (f"{name}.txt", b"text")],
        "unknown_format": lambda name: [(f"{name}.heic", b"\0\0\0\x18ftypheic"), (f"{name}.txt", b"text")],
        "empty": lambda name: [(f"{name}.png", b""), (f"{name}.txt", b"text")],
        "truncated": lambda name: [(f"{name}.png", png(5)[:60]), (f"{name}.txt", b"text")],
    }
    wanted = draw.choices([*kinds], k=draw.randint(1, 12))
    members, expected = [("first.png", png(0)), ("first.txt", b"text")], Counter(wanted)
    for number, kind in enumerate(wanted):
        name = draw.choice([f"{number:04d}", f"photo.v{number}", f"dir.d/{number}", f"ä {number}", f"{number}.a.b"])
        of_sample = kinds[kind](name)
        members += of_sample
        if kind == "good" and draw.random() < 0.3:
            members += of_sample
            expected["repeated_name"] += 1
        if draw.random() < 0.2:
            members.append((f"{name}.npy", b"x"))
        if draw.random() < 0.2:
            members.append((f"._{name.rpartition('/')[2]}.png", b"x"))
        if draw.random() < 0.1:
            members.append((f"other{number}.mp4", b"x"))
            expected["no_image"] += 1
    end = draw.random() < 0.8
    if not end:  # the last sample is whole, but who knows what followed
        members += [("last.png", png(6)), ("last.txt", b"text")]
        expected += Counter(good=1, truncated_tar=1)
    write_tar(path, members, end)
    return expected, expected.pop("good", 0) + 1


def test_every_sample_of_random_tars_is_used_or_counted(tmp_path):
    """80 tars, each alone and the counts over ranks and workers."""
    for seed in range(80):
        draw = random.Random(seed)
        path = tmp_path / f"{seed}.tar"
        expected, used = random_tar(draw, path)
        source, _ = open_sources(str(path), None, None, captions=draw.choice(["all", "one"]))
        parts = all_ranks(source, draw.choice([1, 2]), augment="none")
        for part in parts:
            list(part.steps(0, 4))
        assert totals(parts) == (used + sum(expected.values()), used, dict(expected)), seed
        decoded = {"not_an_image", "unknown_format", "empty", "truncated"}
        known = {reason: count for reason, count in expected.items() if reason not in decoded}
        assert Counter(reason for _, reason in source.unusable) == known, seed
        evaluation = open_evaluation(str(path), "auto", None)
        assert Counter(reason for _, reason in evaluation.skipped) == known, seed
        assert len(evaluation) + sum(known.values()) == used + sum(expected.values()), seed


def test_a_run_counts_what_it_read_and_did_not_reach(tmp_path):
    """The summary of a run that ends within its first pass accounts for every sample of a small shard."""
    members = [m for n in range(8) for m in ((f"x.{n}.png", png(n)), (f"x.{n}.txt", f"text {n}".encode()))]
    path = write_tar(tmp_path / "a.tar", members)
    run = train(tmp_path / "run", "--data", path, "--effective-batch", "4", "--chunk-size", "4", "--steps", "1")
    counts = json.loads((run / "summary.json").read_text())["data"]
    assert (counts["read"], counts["used"], counts["skipped"]) == (8, 4, {"not_reached": 4})


def test_a_list_of_classes_names_every_class_once(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"0"), ("1.png", png(1)), ("1.cls", b"2")])
    for listing, fault in (("red\n\nblue\n", "line 2 is empty"), ("red\nblue\nred", "line 3 is 'red' again")):
        (tmp_path / "classes.txt").write_text(listing)
        with pytest.raises(InputError, match=f"classes.txt: {fault}"):
            open_sources(path, None, None)
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfred\r\ngreen\r\nblue\r\n\r\n")
    assert [texts(path)[name] for name in "01"] == [("a photo of red",), ("a photo of blue",)]
