"""Tables of other programs: rows are read strictly, and a bad line loses only itself."""

import json
import os
from pathlib import Path

import pytest
from made_data import make_images, make_table, texts_by_image

from lib.data import open_evaluation, open_sources
from lib.data.fields import Columns
from lib.data.order import stable_hash
from lib.data.records import Delimited
from lib.errors import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    make_images(tmp_path, *(f"{number}.jpg" for number in range(8)))
    return tmp_path


def read(path: Path, content: str | bytes, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_sources(str(path), None, None, **options)[0]


def skips(source) -> dict[str, str]:
    return dict(source.skipped)


def test_a_mark_that_is_never_closed_costs_its_own_line(folder):
    rows = [f"{n}.jpg,thing {n}" for n in range(8)]
    rows[2] = '2.jpg,"thing 2'
    source = read(folder / "t.csv", "\n".join(["filename,caption", *rows]))
    assert source.texts == [f"thing {n}" for n in range(8) if n != 2] and skips(source) == {"t.csv:4": "unclosed_quote"}
    rows[5] = '5.jpg,thing 5" tall'  # another stray mark, which would close the first
    rows[7] = '7.jpg,"thing 7'
    source = read(folder / "t.csv", "\n".join(["filename,caption", *rows]))
    assert source.texts == ["thing 0", "thing 1", "thing 3", "thing 4", 'thing 5" tall', "thing 6"]
    assert skips(source) == {"t.csv:4": "unclosed_quote", "t.csv:9": "unclosed_quote"}
    read(folder / "t.tsv", "\n".join(["filename\tcaption", *(row.replace(",", "\t") for row in rows)]))
    source = open_sources(str(folder / "t.tsv"), None, None)[0]
    assert source.skipped == () and source.texts[2] == '"thing 2' and source.texts[5] == 'thing 5" tall'


def test_captions_over_several_lines_are_read_in_every_order_of_columns(folder):
    poem = 'Roses are red,\n\nviolets are "blue",\nsee 1.jpg'
    for name in ("t.csv", "t.tsv"):
        rows = [["0.jpg", poem], ["1.jpg", "one"], ["2.jpg", poem]]
        make_table(folder / name, [["filename", "caption"], *rows])
        source, _ = open_sources(str(folder / name), None, None)
        assert source.texts == [poem, "one", poem] and source.skipped == ()
        make_table(folder / name, [["caption", "filename"], *(row[::-1] for row in rows)])
        source, _ = open_sources(str(folder / name), None, None)
        assert source.texts == [poem, "one", poem] and source.skipped == ()


def test_a_lost_mark_before_the_image_and_one_before_a_quoted_row(folder):
    rows = ["caption,filename", '"zero,0.jpg', "one,1.jpg", '"two, or 2",2.jpg', '"thr""ee",3.jpg']
    source = read(folder / "t.csv", "\n".join(rows))
    assert source.texts == ["one", "two, or 2", 'thr"ee'] and skips(source) == {"t.csv:2": "unclosed_quote"}
    rows = ["filename,caption", '0.jpg,"zero', '1.jpg,"one\nmore"', "2.jpg,two"]
    source = read(folder / "t.csv", "\n".join(rows))
    assert source.texts == ["one\nmore", "two"] and skips(source) == {"t.csv:2": "unclosed_quote"}


def test_the_work_that_lost_marks_make_is_bounded(tmp_path):
    looked = 0

    def is_row(cells: list[str]) -> bool:
        nonlocal looked
        looked += 1
        return False

    lines = 5_000
    file = tmp_path / "t.csv"
    file.write_text("a,b\n" + 'x,"y\n' * lines)
    with open(file, newline="\n") as opened:
        found = list(Delimited(opened, ".csv").rows(is_row))
    assert len(found) == lines and looked <= 2 * lines
    file.write_text("a,b\n" + 'x,"y\n' + "no mark\n" * lines)
    looked = 0
    with open(file, newline="\n") as opened:
        found = list(Delimited(opened, ".csv").rows(is_row))
    assert found[0] == (2, "unclosed_quote") and len(found) == lines + 1 and looked == 200


def test_rows_of_another_width_are_counted_and_not_cut(folder):
    rows = [
        "0.jpg,a dog, a cat",
        "1.jpg",
        '2.jpg,"a dog, a cat"',
        "3.jpg,good,,",
        ",,",
        "",
        '4.jpg,"a" dog',
        "5.jpg,a\rb",
    ]
    source = read(folder / "t.csv", "\r\n".join(["filename,caption", *rows]))
    assert texts_by_image(source) == {"2.jpg": ["a dog, a cat"], "3.jpg": ["good"], "5.jpg": ["a\rb"]}
    assert skips(source) == dict.fromkeys(("t.csv:2", "t.csv:3", "t.csv:6", "t.csv:8"), "malformed_row")


def test_the_separator_is_that_of_the_header(folder):
    for name, mark in (("t.csv", "\t"), ("t.csv", ";"), ("t.tsv", ","), ("t.tsv", ";")):
        source = read(folder / name, f"filename{mark}caption\n0.jpg{mark}zero\n")
        assert source.texts == ["zero"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_encodings_and_ends_of_lines(folder, encoding, ends):
    lines = ["filename,caption", "0.jpg,café", '1.jpg,"one, two"', "2.jpg,two", ""]
    source = read(folder / "t.csv", ends.join(lines).encode(encoding))
    assert source.texts == ["café", "one, two", "two"] and source.skipped == ()
    objects = [json.dumps({"image": f"{n}.jpg", "caption": "café"}, ensure_ascii=False) for n in range(2)]
    assert read(folder / "t.jsonl", ends.join(objects).encode(encoding)).texts == ["café"] * 2


def test_two_columns_of_one_meaning(folder):
    with pytest.raises(InputError, match="t.csv has 2 columns called caption; rename or remove all but one"):
        read(folder / "t.csv", "filename,caption,Caption\n0.jpg,a,b\n")
    source = read(folder / "t.csv", "filename,text,caption,notes,notes\n0.jpg,a,b,c,d\n")
    assert source.texts == ["b"] and source.description.startswith("captions (of column caption, not of text) ")
    source = read(folder / "t.csv", "filename,text,caption\n0.jpg,a,b\n", columns=Columns(caption="text"))
    assert source.texts == ["a"] and source.description.startswith("captions /")


def test_fields_of_json_lines_mean_what_they_mean_in_shards(folder):
    lines = [
        {"image": "0.jpg", "caption": 7, "group": 7},
        {"image": "1.jpg", "caption": ["a", None, 3.0], "group": 7.0},
        {"image": "2.jpg", "caption": "x", "group": None, "split": None},
        {"image": "3.jpg", "caption": "x", "group": float("nan"), "split": float("nan")},
        {"image": "4.jpg", "caption": {"a": 1}},
        {"image": "5.jpg", "caption": [["a"]]},
        {"image": 6, "caption": "x"},
        {"image": "a\0b/7.jpg", "caption": "x"},
        {"image": "7.jpg", "caption": True},
        {"image": "7.jpg", "caption": "x", "group": ["a"]},
        {"image": "7.jpg", "caption": None},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    text += (
        "\n"
        + "[" * 100_000
        + '\n{"image": "7.jpg", "caption": '
        + "1" * 5000
        + '}\n\ufeff{"image": "7.jpg", "caption": "y"}'
    )
    source = read(folder / "t.jsonl", text)
    assert texts_by_image(source) == {
        "0.jpg": ["7"],
        "1.jpg": ["a", "3"],
        "2.jpg": ["x"],
        "3.jpg": ["x"],
        "7.jpg": ["y"],
    }
    assert skips(source) == dict.fromkeys([f"t.jsonl:{n}" for n in (5, 6, 7, 8, 9, 10, 12, 13)], "malformed_row") | {
        "1.jpg#1": "empty_caption",
        "7.jpg#0": "empty_caption",
    }
    assert source.group.tolist()[:5] == [stable_hash(name) for name in ("7", "7", "7", "2.jpg", "3.jpg")]


def test_a_split_that_is_unknown_is_counted_unless_all_are(folder):
    rows = [["image", "caption", "split"], ["0.jpg", "a", "train"], ["1.jpg", "b", "trian"], ["2.jpg", "c", ""]]
    source, _ = open_sources(make_table(folder / "t.csv", rows), None, None)
    assert source.texts == ["a", "c"] and skips(source) == {"t.csv:3": "unknown_split"}
    with pytest.raises(InputError, match="t.csv, line 2: split 'trian' is none of train"):
        open_sources(make_table(folder / "t.csv", [rows[0], rows[2]]), None, None)


def test_bad_rows_are_counted_in_evaluation_too(folder):
    rows = ["image,caption,split", "0.jpg,a,test", "1.jpg,b,test,more", "9.jpg,c,test"]
    (folder / "t.csv").write_text("\n".join(rows))
    evaluation = open_evaluation(str(folder / "t.csv"), "auto", None)
    assert evaluation.captions == ["a"] and skips(evaluation) == {"t.csv:3": "malformed_row", "9.jpg": "missing"}
    (folder / "t.csv").write_text("\n".join([*rows, "2.jpg,d,train"]))
    assert skips(open_sources(str(folder / "t.csv"), None, None)[0]) == {"t.csv:3": "malformed_row"}, "of no split"
    assert skips(open_evaluation(str(folder / "t.csv"), "auto", None)) == {"9.jpg": "missing"}


@pytest.mark.parametrize("data", ["{}", "table:{}", "flickr:{}", "coco:{}", "karpathy:{}"])
def test_a_fifo_is_no_file_of_captions(folder, data):
    os.mkfifo(folder / "captions.csv")
    with pytest.raises(InputError, match="captions.csv"):
        open_sources(data.format(folder / "captions.csv"), None, None)
