"""COCO's, Flickr's and Karpathy's files are read in their published forms; faults are counted and reported."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_data import make_images, make_table, texts_by_image

from lib.data import open_evaluation, open_sources
from lib.errors import InputError


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco(*names: str, captions: int = 2) -> dict:
    """COCO's layout: image number i has the id 10 + i, its captions come in rounds."""
    images = [{"id": 10 + number, "file_name": name, "height": 8, "width": 8} for number, name in enumerate(names)]
    annotations = [
        {"id": 100 * turn + image["id"], "image_id": image["id"], "caption": f"{image['file_name']} said {turn}\n"}
        for turn in range(captions)
        for image in images
    ]
    return {"info": {"year": 2017}, "images": images, "licenses": [], "annotations": annotations}


def karpathy(*rows: tuple[str, str, str | None, list[str]]) -> dict:
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": text, "tokens": text.split()} for text in texts]}
        | ({"filepath": folder} if folder else {})
        for name, split, folder, texts in rows
    ]
    return {"images": images, "dataset": "coco"}


def reasons(source) -> dict[str, str]:
    return dict(source.skipped)


# COCO


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations.json", "."),
        ("annotations.json", "images"),
        ("captions_val2017.json", "val2017"),
        ("annotations/captions_val2017.json", "val2017"),
        ("annotations/captions_train2014.json", "images/train2014"),
        ("anything.json", "train2014"),
    ],
)
def test_a_coco_file_finds_its_images_where_they_usually_are(tmp_path, file, images):
    make_images(tmp_path / images, "1.jpg", "2.jpg")
    path = write_json(tmp_path / file, coco("1.jpg", "2.jpg", "3.jpg"))
    source, validation = open_sources(str(path), None, None)
    assert texts_by_image(source) == {name: [f"{name} said 0", f"{name} said 1"] for name in ("1.jpg", "2.jpg")}
    assert reasons(source) == {"3.jpg": "missing"} and validation is None
    assert source.images.open(1).size == (8, 8)
    assert len(open_evaluation(str(path), "auto", None)) == 2


def test_a_coco_folder_has_its_files_as_splits(tmp_path):
    make_images(tmp_path, "train2017/1.jpg", "train2017/2.jpg", "val2017/3.jpg")
    write_json(tmp_path / "annotations" / "captions_train2017.json", coco("1.jpg", "2.jpg"))
    alone, validation = open_sources(str(tmp_path), None, None)
    assert alone.size == 4 and validation is None
    write_json(tmp_path / "annotations" / "captions_val2017.json", coco("3.jpg", "4.jpg"))
    source, validation = open_sources(str(tmp_path), None, None)
    assert source.size == 4 and source.skipped == ()
    assert validation.image_keys == ["3.jpg"] and validation.skipped == (("4.jpg", "missing"),)
    assert [open_evaluation(str(tmp_path), split, None).image_keys for split in ("train", "auto")] == [
        ["1.jpg", "2.jpg"],
        ["3.jpg"],
    ]
    write_json(tmp_path / "annotations" / "captions_val2014.json", coco("5.jpg"))
    with pytest.raises(InputError, match="captions of several years .*captions_val2014.json.*give one"):
        open_sources(str(tmp_path), None, None)


def test_a_missing_image_counts_once_and_a_bad_caption_by_itself(tmp_path):
    make_images(tmp_path, "1.jpg", "2.jpg")
    content = coco("1.jpg", "gone.jpg", "2.jpg", captions=5)
    content["annotations"][0]["caption"] = "  "
    content["annotations"][3]["caption"] = "half \ud800 a letter"
    content["annotations"] += [{"image_id": 99, "caption": "of nothing"}, {"image_id": 10}, "no object"]
    content["images"] += [{"id": 13}, {"id": 14, "file_name": "gone as well.jpg"}]
    source, _ = open_sources(str(write_json(tmp_path / "a.json", content)), None, None)
    assert source.size == 3 + 5
    assert reasons(source) == {
        "1.jpg#0": "empty_caption",
        "1.jpg#1": "not_utf8",
        "gone.jpg": "missing",
        "gone as well.jpg": "missing",
        "a.json: annotation 16": "malformed_row",
        "a.json: annotation 17": "malformed_row",
        "a.json: image 3": "malformed_row",
        "a.json: image_id 99": "unknown_image",
    }


def test_odd_fields_of_coco_cost_their_entry_alone(tmp_path):
    make_images(tmp_path, "1.jpg", "2.jpg")
    content = coco("1.jpg", "2.jpg", captions=1)
    odd_ids = [[1], {"a": 1}, True, None, float("nan")]
    content["annotations"] += [{"image_id": each, "caption": "x"} for each in odd_ids]
    content["annotations"] += [{"image_id": 10, "caption": each} for each in (None, float("nan"), ["a"], {"a": 1}, 7)]
    content["images"] += [{"id": each, "file_name": "1.jpg"} for each in ([1], True, 10)]
    content["images"] += [{"id": 20, "file_name": each} for each in (17, "a\0b", "", ["1.jpg"])] + [None]
    source, _ = open_sources(str(write_json(tmp_path / "a.json", content)), None, None)
    assert texts_by_image(source) == {"1.jpg": ["1.jpg said 0", "7"], "2.jpg": ["2.jpg said 0"]}
    annotations = {f"a.json: annotation {number}" for number in range(2, 11)}
    images = {f"a.json: image {number}" for number in range(2, 10)}
    assert reasons(source) == dict.fromkeys(annotations | images, "malformed_row")


def test_other_json_is_told_apart_by_what_it_holds(tmp_path):
    make_images(tmp_path, "1.jpg")
    boxes = coco("1.jpg")
    for annotation in boxes["annotations"]:
        del annotation["caption"]
        annotation["bbox"] = [0, 0, 1, 1]
    cases = {
        "boxes": (boxes, "COCO annotations without captions .*bbox.* give the captions file"),
        "neither": ({"a": 1, "b": 2}, "no captions file: .*this one has keys a, b"),
        "a list": ([1], "no captions file: .*this one has a list"),
        "no annotations": ({"images": [{"id": 1, "file_name": "1.jpg"}]}, "no captions file"),
        "of no image": (coco("2.jpg", "3.jpg"), "of the 2 images .*'2.jpg'.*looked for in .*--image-root"),
    }
    for name, (content, message) in cases.items():
        path = write_json(tmp_path / f"{name}.json", content)
        with pytest.raises(InputError, match=message):
            open_sources(str(path), None, None)
    (tmp_path / "cut.json").write_text(json.dumps(coco("1.jpg"))[:-20])
    with pytest.raises(InputError, match="is not JSON, or was cut short"):
        open_sources(str(tmp_path / "cut.json"), None, None)
    # A folder with boxes alone is not taken for one of the classes "train2017" and "val2017".
    make_images(tmp_path / "coco", "train2017/1.jpg", "val2017/2.jpg")
    write_json(tmp_path / "coco" / "annotations" / "instances_val2017.json", boxes)
    with pytest.raises(InputError, match="annotations without captions"):
        open_sources(str(tmp_path / "coco"), None, None)


def test_the_real_coco_file_uses_its_128_images_and_reports_4872(shared):
    for data in (shared / "data" / "coco", shared / "data" / "coco" / "captions_val2017.json"):
        for captions, size in (("all", 641), ("one", 128)):
            source, _ = open_sources(str(data), None, None, captions)
            assert (len(source.images), source.size) == (128, size)
            assert [reason for _, reason in source.skipped] == ["missing"] * 4_872
    assert len(np.unique(source.group)) == 128
    assert source.images.open(0).mode == "RGB"


# Karpathy


def test_karpathys_splits_are_those_of_the_file(tmp_path):
    make_images(tmp_path, "train2014/a.jpg", "val2014/b.jpg", "val2014/c.jpg", "images/d.jpg")
    rows = [
        ("a.jpg", "train", "train2014", ["one", "two"]),
        ("b.jpg", "restval", "val2014", ["three", ""]),
        ("c.jpg", "val", "val2014", ["four"]),
        ("d.jpg", "test", None, ["five"]),
        ("e.jpg", "train", "train2014", ["gone"]),
        ("f.jpg", "test", None, []),
    ]
    path = write_json(tmp_path / "dataset_coco.json", karpathy(*rows))
    for data in (path, tmp_path, f"karpathy:{path}"):
        source, validation = open_sources(str(data), None, None)
        assert texts_by_image(source) == {"a.jpg": ["one", "two"], "b.jpg": ["three"]}
        assert reasons(source) == {"b.jpg#1": "empty_caption", "e.jpg": "missing"}
        assert validation.captions == ["four"]
    test = open_evaluation(str(path), "auto", None)
    assert test.captions == ["five"] and test.skipped == (("f.jpg", "missing"),)


def test_odd_fields_of_karpathys_file_cost_their_entry_alone(tmp_path):
    make_images(tmp_path, "a.jpg", "b.jpg")
    content = karpathy(("a.jpg", "train", None, ["one"]), ("b.jpg", "train", None, ["two"]))
    content["images"][1]["sentences"] += [{"raw": 7}, {"raw": None}, {"raw": ["x"]}, "x", {}]
    good = content["images"][0]
    content["images"] += [good | {"split": ["train"]}, good | {"split": "extra"}, good | {"split": None}]
    content["images"] += [
        good | {"sentences": {"raw": "x"}},
        good | {"filename": ["a.jpg"]},
        good | {"filename": "a\0"},
    ]
    content["images"] += [None, 7, good | {"filename": "c.jpg", "filepath": "a\0b"}]
    source, _ = open_sources(f"karpathy:{write_json(tmp_path / 'k.json', content)}", None, None)
    assert texts_by_image(source) == {"a.jpg": ["one"], "b.jpg": ["two", "7"]}
    found = Counter(reason for _, reason in source.skipped)
    assert found == {"malformed_row": 6, "unknown_split": 2, "empty_caption": 4, "missing": 1}


def test_a_karpathy_file_that_is_not_one_is_said(tmp_path):
    make_images(tmp_path, "a.jpg")
    bad_split = write_json(tmp_path / "split.json", karpathy(("a.jpg", "extra", None, ["x"])))
    with pytest.raises(InputError, match="image a.jpg: split 'extra' is none of train, restval"):
        open_sources(str(bad_split), None, None)
    with pytest.raises(InputError, match="no Karpathy split file.* this one has keys info, images"):
        open_sources(f"karpathy:{write_json(tmp_path / 'coco.json', coco('a.jpg'))}", None, None)
    for name in ("dataset_a.json", "dataset_b.json"):
        write_json(tmp_path / "two" / name, karpathy(("a.jpg", "train", None, ["x"])))
    with pytest.raises(InputError, match="several captions files .dataset_a.json, dataset_b.json.; give one"):
        open_sources(str(tmp_path / "two"), None, None)


# Flickr

_PLAIN = 'Image,caption\n1.jpg,A dog , a cat , and a man\n1.jpg,"He said ""hi"", and left"\n2.jpg,A "big" dog\n'
_BARS = "image_name| comment_number| comment\n1.jpg| 0| A dog , a cat\n1.jpg| 1| a | b\n2.jpg| 4   A dog runs\n"
_NUMBERED = 'image_name,comment_number,comment\n1.jpg,0,"one, two"\n1.jpg,1,three, four\n2.jpg,0,five\n'
_TOKEN = "1.jpg#0\tA dog , a cat\n1.jpg#1\tsees #1\t!\n2.jpg#0\tB\n"


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("captions.txt", _PLAIN, [["A dog , a cat , and a man", 'He said "hi", and left'], ['A "big" dog']]),
        ("results.csv", _BARS, [["A dog , a cat", "a | b"], ["A dog runs"]]),
        ("captions.txt", _NUMBERED, [["one, two", "three, four"], ["five"]]),
        ("Flickr8k.token.txt", _TOKEN, [["A dog , a cat", "sees #1\t!"], ["B"]]),
        ("results_20130124.token", _TOKEN, [["A dog , a cat", "sees #1\t!"], ["B"]]),
    ],
)
def test_flickr_files_of_every_form(tmp_path, file, text, expected):
    make_images(tmp_path / "Images", "1.jpg", "2.jpg")
    path = tmp_path / file
    path.write_text(text)
    (tmp_path / "Flickr8k.lemma.token.txt").write_text("1.jpg#0\tlemma\n")
    for data in (path, tmp_path, f"flickr:{path}"):
        source, validation = open_sources(str(data), None, None)
        assert texts_by_image(source) == dict(zip(("1.jpg", "2.jpg"), expected, strict=True))
        assert source.skipped == () and validation is None


def test_flickr_lines_that_are_bad_are_counted(tmp_path):
    make_images(tmp_path / "flickr30k_images", "1.jpg", "2.jpg")
    lines = [b"image,caption", b"1.jpg,good", b"", b"1.jpg,caf\xe9", b"no comma", b",no name", b"1.jpg,", b"3.jpg,gone"]
    (tmp_path / "captions.txt").write_bytes(b"\r\n".join([*lines, b"2.jpg,good too", b"caf\xe9.jpg,bad name"]))
    source, _ = open_sources(str(tmp_path), None, None)
    assert texts_by_image(source) == {"1.jpg": ["good"], "2.jpg": ["good too"]}
    assert reasons(source) == {
        "captions.txt:5": "malformed_row",
        "captions.txt:6": "malformed_row",
        "'caf\\udce9.jpg'": "not_utf8",
        "1.jpg#1": "not_utf8",
        "1.jpg#2": "empty_caption",
        "3.jpg": "missing",
    }


def test_flickr_split_lists_divide_the_images(tmp_path):
    text = tmp_path / "Flickr8k_text"
    make_images(tmp_path / "Flicker8k_Dataset", *(f"{number}.jpg" for number in range(5)))
    text.mkdir()
    (text / "Flickr8k.token.txt").write_text("".join(f"{number}.jpg#0\ttext {number}\n" for number in range(6)))
    names = {"trainImages": "0.jpg\n1.jpg\n5.jpg\n", "devImages": "2.jpg\n", "testImages": "3.jpg\n"}
    for name, listed in names.items():
        (text / f"Flickr_8k.{name}.txt").write_text(listed)
    source, validation = open_sources(str(tmp_path), None, None)
    assert texts_by_image(source) == {"0.jpg": ["text 0"], "1.jpg": ["text 1"]}
    assert reasons(source) == {"4.jpg": "no_split", "5.jpg": "missing"}
    assert validation.captions == ["text 2"]
    assert open_evaluation(str(tmp_path), "test", None).captions == ["text 3"]


def test_lists_without_extensions_and_files_that_are_no_lists(tmp_path):
    make_images(tmp_path / "images", "1.jpg", "2.jpg")
    (tmp_path / "results_20130124.token").write_text("1.jpg#0\tone\n2.jpg#0\ttwo\n")
    (tmp_path / "train.txt").write_text("some prose about training, no list\n")
    assert open_sources(str(tmp_path), None, None)[0].size == 2
    (tmp_path / "train.txt").write_text("1\n")
    (tmp_path / "val.txt").write_text("2\n")
    source, validation = open_sources(str(tmp_path), None, None)
    assert texts_by_image(source) == {"1.jpg": ["one"]} and validation.captions == ["two"]
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text("other\n")
    with pytest.raises(InputError, match="lists of splits next to it .train.txt, val.txt. name none of its images"):
        open_sources(str(tmp_path), None, None)


def test_the_images_may_lie_elsewhere(tmp_path):
    make_images(tmp_path / "pictures", "train2014/1.jpg", "2.jpg")
    texts = tmp_path / "texts"
    table = make_table(texts / "t.csv", [["image", "caption"], ["2.jpg", "a"]])
    (texts / "captions.txt").write_text("image,caption\n2.jpg,a\n")
    files = [
        table,
        str(texts / "captions.txt"),
        str(write_json(texts / "coco.json", coco("2.jpg", captions=1))),
        str(write_json(texts / "dataset_coco.json", karpathy(("1.jpg", "train", "train2014", ["a"])))),
    ]
    for data in files:
        with pytest.raises(InputError, match="not one is there .*; --image-root says where"):
            open_sources(data, None, None)
        source, _ = open_sources(data, None, None, image_root=str(tmp_path / "pictures"))
        assert source.size == 1 and source.images.open(0).size == (8, 8)
        assert len(open_evaluation(data, "auto", None, image_root=str(tmp_path / "pictures"))) == 1
        with pytest.raises(InputError, match="--image-root .*nowhere is not a folder"):
            open_sources(data, None, None, image_root=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="--image-root .* leave it out"):
        open_sources("digits", None, None, image_root=str(tmp_path))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_captions_of_a_table_that_are_not_utf8_are_left_out(tmp_path, suffix):
    make_images(tmp_path, "1.jpg", "2.jpg")
    rows = [(b"1.jpg", b"caf\xc3\xa9"), (b"1.jpg", b"caf\xe9"), (b"2.jpg", b"\xff\xfe"), (b"2.jpg", b"tea")]
    if suffix == ".csv":
        lines = [b"image,caption", *(b",".join(row) for row in rows)]
    else:
        lines = [b'{"image": "%s", "caption": "%s"}' % row for row in rows]
    (tmp_path / f"t{suffix}").write_bytes(b"\n".join(lines))
    source, _ = open_sources(str(tmp_path / f"t{suffix}"), None, None)
    assert texts_by_image(source) == {"1.jpg": ["café"], "2.jpg": ["tea"]}
    assert reasons(source) == {"1.jpg#1": "not_utf8", "2.jpg#0": "not_utf8"}
    assert source.text_number.tolist() == [0, 1]
    assert open_evaluation(str(tmp_path / f"t{suffix}"), "auto", None).captions == ["café", "tea"]
