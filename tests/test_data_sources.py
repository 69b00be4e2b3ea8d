"""Every format of --data opens as the user means it; unusable data gives an error of one line."""

import json
import pickle

import numpy as np
import pytest
from made_data import make_images, make_table, texts_by_image

from lib.data import BadImage, open_evaluation, open_sources
from lib.data.pairs import fill
from lib.errors import InputError


def test_class_folders_with_splits(tmp_path):
    make_images(tmp_path, "train/big_dog/1.jpg", "train/big_dog/2.PNG", "train/ant/1.jpg", "train/.git/1.jpg")
    make_images(tmp_path, "valid/big_dog/3.jpg", "test/cow/4.jpg", "train/notes.jpg")
    (tmp_path / "train" / "ant" / "list.txt").write_text("no image")
    source, validation = open_sources(str(tmp_path), None, None)
    assert source.size == 3 and source.classes == validation.classes == ("ant", "big dog", "cow")
    assert texts_by_image(source)["train/big_dog/2.PNG"] == ["a photo of big dog"]
    assert source.group[0] != source.group[1] == source.group[2] and source.distinct_texts == 3
    assert validation.image_keys == ["valid/big_dog/3.jpg"] and validation.labels.tolist() == [1]
    assert open_evaluation(str(tmp_path), "auto", None).image_keys == ["test/cow/4.jpg"]
    assert len(open_evaluation(str(tmp_path), "train", None)) == 3


@pytest.mark.parametrize("captions", ["one", "all"])
def test_captions_that_another_group_has_too_are_counted(tmp_path, captions):
    make_images(tmp_path, *(f"{number}.jpg" for number in range(5)))
    rows = [["filename", "caption", "group"]]
    rows += [
        ["0.jpg", "a dog", "one"],
        ["0.jpg", "a dog", "one"],
        ["1.jpg", "a dog", "two"],
        ["2.jpg", "a cat", "three"],
    ]
    rows += [["3.jpg", "a cat", "three"], ["4.jpg", "a bird", "four"], ["4.jpg", "a Dog", "four"]]
    source, _ = open_sources(make_table(tmp_path / "table.csv", rows), None, None, captions=captions)
    assert (source.distinct_texts, source.shared_text_pairs) == (4, 3), "the two cats are of one group"


def test_class_folders_without_splits_and_other_validation_data(tmp_path):
    make_images(tmp_path / "a", "cat/1.jpg", "dog/1.jpg")
    make_images(tmp_path / "b", "cat/9.jpg")
    source, validation = open_sources(str(tmp_path / "a"), str(tmp_path / "b"), "objects")
    assert source.size == 2 and len(source.templates) > 1 and validation.image_keys == ["cat/9.jpg"]
    assert source.text_count.tolist() == [len(source.templates)] * 2
    assert open_sources(str(tmp_path / "a"), None, None)[1] is None
    with pytest.raises(InputError, match="--split val.*has only all"):
        open_evaluation(str(tmp_path / "a"), "val", None)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_with_several_captions_and_splits(tmp_path, suffix):
    make_images(tmp_path, "images/1.jpg", "images/2.jpg", "3.jpg", "images/deep/4.jpg")
    rows = [
        ["Image", "Caption", "split"],
        ["1.jpg", 'two\nlines, a comma and "quotes"', "train"],
        ["2.jpg", "second", "restval"],
        ["1.jpg", "first again", "train"],
        ["3.jpg", "third", "dev"],
        ["deep/4.jpg", "fourth", "test"],
    ]
    path = tmp_path / f"table{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:]))
    else:
        make_table(path, rows)
    source, validation = open_sources(str(path), None, None)
    assert texts_by_image(source) == {"1.jpg": [rows[1][1], "first again"], "2.jpg": ["second"]}
    assert source.group[0] == source.group[1] != source.group[2]
    assert source.distinct_texts == 3 and source.shared_text_pairs == 0
    assert len({source.sample_id(pair, pair) for pair in range(3)}) == 3
    assert validation.image_keys == ["3.jpg"] and validation.captions == ["third"]
    assert open_evaluation(str(path), "auto", None).captions == ["fourth"]
    with pytest.raises(InputError, match="--split all"):
        open_evaluation(str(path), "all", None)


def test_a_pair_per_image_draws_among_its_captions(tmp_path):
    make_images(tmp_path, "1.jpg", "2.jpg")
    rows = [["path", "text"], ["1.jpg", "a"], ["2.jpg", "b"], ["1.jpg", ""], ["1.jpg", "c"]]
    source, validation = open_sources(make_table(tmp_path / "t.csv", rows), None, None, captions="one")
    assert source.size == 2 and validation is None and source.skipped == ()
    assert texts_by_image(source) == {"1.jpg": ["a", "c"], "2.jpg": ["b"]}
    every, _ = open_sources(str(tmp_path / "t.csv"), None, None, captions="all")
    # The same pair has the same id in both: the number of "c" counts the empty caption before it.
    ids_of_one = {source.sample_id(0, text) for text in (0, 1)} | {source.sample_id(1, 2)}
    assert ids_of_one == {every.sample_id(pair, pair) for pair in range(3)}
    assert every.skipped == (("1.jpg#1", "empty_caption"),)


def test_what_a_table_names_in_vain_is_listed(tmp_path):
    make_images(tmp_path, "1.jpg")
    rows = [["image", "caption"], ["1.jpg", "here"], ["2.jpg", "gone"], ["", "no name"], ["1.jpg", "  "]]
    source, _ = open_sources(make_table(tmp_path / "t.csv", rows), None, None)
    expected = {("2.jpg", "missing"), ("1.jpg#1", "empty_caption"), ("t.csv:4", "malformed_row")}
    assert source.size == 1 and set(source.skipped) == expected


def test_json_lines_of_many_shapes(tmp_path):
    make_images(tmp_path, "1.jpg", "2.jpg")
    lines = [
        '{"image": "1.jpg", "captions": ["a", "b"], "group": 7}',
        "not json",
        '["a list"]',
        "",
        '{"caption": "no image"}',
        '{"image": "2.jpg", "caption": "c", "split": "val"}',
        '{"image": "1.jpg"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source, validation = open_sources(str(tmp_path / "t.jsonl"), None, None)
    assert texts_by_image(source) == {"1.jpg": ["a", "b"]} and validation.captions == ["c"]
    assert [reason for _, reason in source.skipped] == ["malformed_row"] * 3 + ["empty_caption"]


def test_a_group_column_joins_images(tmp_path):
    make_images(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    rows = [["image", "caption", "group"], ["1.jpg", "a", "x"], ["2.jpg", "b", "x"], ["3.jpg", "c", "y"]]
    source, _ = open_sources(make_table(tmp_path / "t.csv", rows), None, None)
    assert source.group[0] == source.group[1] != source.group[2]


def test_absolute_paths_and_a_byte_order_mark(tmp_path):
    make_images(tmp_path / "elsewhere", "1.jpg")
    text = f"\ufefffilename,caption\n{tmp_path / 'elsewhere' / '1.jpg'},a\n"
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    source, _ = open_sources(str(tmp_path / "t.csv"), None, None)
    assert source.images.open(0).size == (8, 8)


def test_errors_name_the_flag_the_value_and_the_remedy(tmp_path):
    make_images(tmp_path, "pictures/1.jpg")
    columns = make_table(tmp_path / "columns.csv", [["url", "caption"], ["1.jpg", "a"]])
    gone = make_table(tmp_path / "gone.csv", [["image", "caption"], ["1.jpg", "a"]])
    split = make_table(tmp_path / "split.csv", [["image", "caption", "split"], ["pictures/1.jpg", "a", "x"]])
    only_test = make_table(tmp_path / "t.csv", [["image", "caption", "split"], ["pictures/1.jpg", "a", "test"]])
    empty = make_table(tmp_path / "empty.csv", [["image", "caption"]])
    bank = tmp_path / "bank.yaml"
    bank.write_text("- no place for a name\n")
    (tmp_path / "notes.md").write_text("a note")
    cases = [
        ((str(tmp_path / "none"), None, None), "--data .*none is not there; give digits, a folder"),
        ((columns, None, None), "no column for the image: it has url, caption; name one of them filename"),
        ((gone, None, None), "of the 1 images it names not one is there"),
        ((split, None, None), "line 2: split 'x' is none of train"),
        ((only_test, None, None), "no rows whose split is train"),
        ((empty, None, None), "empty.csv names no image"),
        ((str(tmp_path / "pictures"), None, None), "has no class folders: it must hold train/<class>/"),
        (("digits", str(tmp_path / "none"), None), "--val-data .*none is not there"),
        (("digits", None, "nothing"), "--prompts nothing .* activities, digits, objects, simple"),
        (("digits", None, str(bank)), "'no place for a name' has no {} for the class name"),
        (("pipe:cat a.tar", None, None), "--allow-pipe"),
        ((str(tmp_path / "notes.md"), None, None), "notes.md is of no kind that is read here; give digits, a folder"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            open_sources(*arguments)
    table = make_table(tmp_path / "good.csv", [["image", "caption"], ["pictures/1.jpg", "a"]])
    with pytest.raises(InputError, match="--prompts objects goes with class names"):
        open_sources(table, None, "objects")
    with pytest.raises(InputError, match=r"give .*columns\.csv"):
        (tmp_path / "pictures").rename(tmp_path / ".pictures")
        open_sources(str(tmp_path), None, None)


def test_a_folder_of_images_beside_a_table_is_no_class(tmp_path):
    make_images(tmp_path, "images/1.jpg", "images/2.jpg")
    table = make_table(tmp_path / "captions.csv", [["image", "caption"], ["1.jpg", "a"]])
    with pytest.raises(InputError, match=f"holds images and a table of their captions; give {table}, or folders:"):
        open_sources(str(tmp_path), None, None)
    with pytest.raises(InputError, match=f"one folder of images and no classes; .* give {table}"):
        open_sources(f"folders:{tmp_path}", None, None)
    make_images(tmp_path, "more/3.jpg")
    with pytest.raises(InputError, match="holds images and a table of their captions"):
        open_sources(str(tmp_path), None, None)
    assert open_sources(f"folders:{tmp_path}", None, None)[0].classes == ("images", "more")


def test_a_prefix_says_what_is_meant(tmp_path):
    make_images(tmp_path, "cat/1.jpg", "dog/2.jpg")
    table = make_table(tmp_path / "t.csv", [["image", "caption"], ["cat/1.jpg", "a"]])
    (tmp_path / "captions.txt").write_text("image,caption\ncat/1.jpg,b\ndog/2.jpg,c\n")
    # The captions are found first in a folder that could be either.
    assert open_sources(str(tmp_path), None, None)[0].texts == ["b", "c"]
    assert open_sources(f"flickr:{tmp_path}", None, None)[0].texts == ["b", "c"]
    assert open_sources(f"folders:{tmp_path}", None, None)[0].classes == ("cat", "dog")
    assert open_sources(f"table:{table}", None, None)[0].texts == ["a"]
    assert open_sources(f"flickr:{table}", None, None)[0].texts == ["a"]
    assert len(open_evaluation(f"folders:{tmp_path}", "auto", None)) == 2


def test_a_prefix_that_does_not_fit_says_what_was_found(tmp_path):
    make_images(tmp_path, "cat/1.jpg", "dog/2.jpg")
    table = make_table(tmp_path / "t.csv", [["image", "caption"], ["cat/1.jpg", "a"]])
    (tmp_path / "notes.txt").write_text("nothing of the kind\n")
    cases = {
        f"coco:{tmp_path}": "coco: stands for COCO's captions file .* is a folder of another kind; leave coco: out",
        f"folders:{table}": "t.csv looks like a table of captions .* leave folders: out",
        f"karpathy:{table}": "looks like a table",
        f"table:{tmp_path / 'none.csv'}": "none.csv is not there",
        f"flickr:{tmp_path / 'notes.txt'}": "none of Flickr's captions files",
        f"coco:{tmp_path / 'notes.txt'}": "is not JSON",
        "torchvision:mnist": "one of cifar10, cifar100, imagenette, but mnist is none of them",
        f"shards:{tmp_path}": "for its tar shards give",
    }
    for data, message in cases.items():
        with pytest.raises(InputError, match=message):
            open_sources(data, None, None)


def test_several_sources_are_mixed_by_weight_or_size(tmp_path):
    make_images(
        tmp_path, "a/cat/1.jpg", "b/train/cat/2.jpg", "b/train/dog/3.jpg", "b/train/dog/4.jpg", "b/val/cat/5.jpg"
    )
    table = make_table(tmp_path / "t.csv", [["image", "caption"], *([f"a/cat/{n}.jpg", "x"] for n in (1, 1, 1, 1))])
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    source, validation = open_sources([a, b, table], None, None)
    assert source.weights == (1 / 8, 3 / 8, 4 / 8) and source.size == 8
    assert [part.size for part in source.parts] == [1, 3, 4] and validation.image_keys == ["val/cat/5.jpg"]
    weighted, _ = open_sources((f"{a}::1", f"{b}::3e0"), b, "objects")
    assert weighted.weights == (0.25, 0.75) and weighted.size == 4
    assert weighted.description.startswith("0.25 of class folders")
    assert open_sources([f"{b}::0.5"], None, None)[0].size == 3
    cases = {
        (f"{a}::1", b): "b has no weight and others have; write .*b::0.5",
        (f"{a}::0", f"{b}::1"): "a::0: a weight must be a number above 0",
        (f"{a}::nan", f"{b}::1"): "a weight must be",
        (f"{a}::one", b): "a::one is not there",
    }
    for data, message in cases.items():
        with pytest.raises(InputError, match=message):
            open_sources(data, None, None)


def test_a_bank_of_the_users_own(tmp_path):
    (tmp_path / "mine.yaml").write_text('- "my {}"\n- "your {} and {}"\n')
    source, _ = open_sources("digits", None, str(tmp_path / "mine.yaml"))
    assert source.sample_texts(2) == ["my zero", "your zero and zero"]
    assert fill("{a} {}", "x") == "{a} x"


def test_evaluation_sets_travel_to_workers(tmp_path):
    make_images(tmp_path, "1.jpg")
    table = make_table(tmp_path / "t.csv", [["image", "caption"], ["1.jpg", "a"], ["1.jpg", "b"]])
    for data in ("digits", table):
        evaluation_set = pickle.loads(pickle.dumps(open_evaluation(data, "auto", None)))
        assert evaluation_set.open_image(0).mode == "RGB"
    assert evaluation_set.caption_image.tolist() == [0, 0] and len(evaluation_set) == 1
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(BadImage, match="missing"):
        evaluation_set.open_image(0)


def test_digits_are_split_alike_every_time():
    train, test = open_sources("digits", None, None)
    labels = open_evaluation("digits", "train", None).labels
    shares = np.bincount(test.labels) / np.bincount(np.concatenate([test.labels, labels]))
    assert np.abs(shares - 0.2).max() < 0.01
    assert len(np.unique(train.group)) == 10 and set(train.group) == set(test.group)
    assert test.image_keys == open_evaluation("digits", "test", None).image_keys
    assert len(labels) == train.size == 1442


def test_the_real_sets_are_read_whole(shared):
    captions, validation = open_sources(str(shared / "data" / "flickr8k" / "captions.csv"), None, None)
    assert (captions.size, len(captions.images), len(validation)) == (11_000, 2_200, 300)
    test = open_evaluation(str(shared / "data" / "flickr8k" / "captions.csv"), "auto", None)
    assert (len(test), len(test.captions)) == (1_000, 5_000)
    assert np.bincount(test.caption_image).tolist() == [5] * 1_000
    classes, validation = open_sources(str(shared / "data" / "har"), None, "activities")
    assert (classes.size, len(validation), len(classes.classes)) == (2_250, 750, 15)
    assert "listening to music" in classes.classes
