"""Data of the `datasets` library in training: parquet files, folders of save_to_disk, and the hub."""

import io
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from made_data import make_images, make_table, texts_by_image
from made_hub_data import IMAGE, NUMBER, TEXT, TEXTS, captioned, classes, datasets, labelled, rows, stored, write
from made_shards import characters, png
from made_shards import rows as rows_of
from PIL import Image

from lib.data import BadImage, ImagePipeline, Prepare, TrainingData, open_evaluation, open_sources
from lib.data.fields import Columns
from lib.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache folder, where copies of parquet files go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "contrastive-training" / "datasets"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def drawn(number: int) -> np.ndarray:
    return pixels(Image.open(io.BytesIO(png(number))))


def test_captions_of_a_parquet_folder_with_all_that_may_be_wrong(tmp_path, cache):
    data = rows(
        image=(IMAGE, stored(0, 1, 2, None, 4, 5)),
        captions=(TEXTS, [[" zero ", None, "nought"], None, [], ["three"], ["", None], ["five"]]),
        group=(TEXT, [None, None, None, None, None, "pair"]),
    )
    write(data, tmp_path / "set" / "data" / "train-00000-of-00002.parquet")
    write(
        rows(**{name: (data.features[name], data[name][5:]) for name in data.features}),
        tmp_path / "set/data/val.parquet",
    )
    source, validation = open_sources(str(tmp_path / "set"), None, None)
    assert texts_by_image(source) == {"train/0": ["zero", "nought"], "train/5": ["five"]}
    assert [source.key(pair) for pair in range(3)] == ["train/0#0", "train/0#2", "train/5#0"]
    assert source.skipped == (
        ("train/0#1", "empty_caption"), ("train/1", "no_text"), ("train/2", "no_text"), ("train/3", "missing"),
        ("train/4#0", "empty_caption"), ("train/4#1", "empty_caption"),
    )  # fmt: skip
    assert np.array_equal(pixels(source.images.open(1)), drawn(5))
    assert validation.image_keys == ["val/0"] and validation.captions == ["five"]
    assert validation.group[0] == source.group[2] != source.group[0]
    one, _ = open_sources(str(tmp_path / "set"), None, None, captions="one")
    assert one.size == 2 and ("train/4", "empty_caption") in one.skipped
    assert list(cache.iterdir()), "the copy goes into the given cache"


def test_classes_of_rows_and_the_rows_without_one(tmp_path):
    kind = classes("sea_gull", "cat", "dog")
    train = rows(image=(IMAGE, stored(0, 1, None, 3)), label=(kind, [0, 2, 1, -1]))
    write(train, tmp_path / "train.parquet")
    write(rows(image=(IMAGE, stored(7, 8)), label=(kind, [1, None])), tmp_path / "validation.parquet")
    write(rows(image=(IMAGE, stored(9)), label=(kind, [-1])), tmp_path / "test.parquet")  # unlabelled, as on the hub
    source, validation = open_sources(str(tmp_path), None, "simple")
    assert source.classes == ("sea gull", "cat", "dog")
    assert [source.images.keys[image] for image in source.image] == ["train/0", "train/1"]
    assert source.texts[source.first_text[1]] == "a photo of dog"
    assert set(source.skipped) == {("train/2", "missing"), ("train/3", "no_text"), ("test/0", "no_text")}
    assert (validation.image_keys, validation.labels.tolist()) == (["validation/0"], [1])
    assert validation.skipped == (("validation/1", "no_text"),)
    assert open_evaluation(str(tmp_path), "auto", None).image_keys == ["validation/0"], "test has no labels"
    with pytest.raises(InputError, match="--split test: .* has only train, val"):
        open_evaluation(str(tmp_path), "test", None)


def test_class_names_as_text(tmp_path):
    data = rows(image=(IMAGE, stored(0, 1, 2, 3, 4)), category=(TEXT, ["sea_gull", None, "cat", " ", "sea gull"]))
    source, _ = open_sources(str(write(data, tmp_path / "a.parquet")), None, None)
    assert source.classes == ("cat", "sea gull")
    assert source.first_text.tolist() == [1, 0, 1] and source.where == str(tmp_path / "a.parquet")
    assert source.skipped == (("rows/1", "no_text"), ("rows/3", "no_text"))
    data = rows(image=(IMAGE, stored(0)), label=(NUMBER, [1]))
    with pytest.raises(InputError, match="column label holds numbers without class names; store it as a ClassLabel"):
        open_sources(str(write(data, tmp_path / "b.parquet")), None, None)


def test_bad_images_are_named_by_reason(tmp_path):
    contents = [png(0)[:40], b"no image", b"", png(3)]
    data = rows(image=(IMAGE, [{"bytes": each, "path": None} for each in contents]), text=(TEXT, list("abcd")))
    source, _ = open_sources(str(write(data, tmp_path / "a.parquet")), None, None)
    reasons = []
    for index in range(3):
        with pytest.raises(BadImage) as bad:
            source.images.open(index)
        reasons.append(bad.value.reason)
    assert reasons == ["truncated", "not_an_image", "empty"]
    assert np.array_equal(pixels(source.images.open(3)), drawn(3))


@pytest.mark.parametrize("make", ["file", "glob", "saved", "prefixed"])
def test_data_without_splits_is_one_split_in_its_order(tmp_path, make):
    if make == "saved":
        captioned(6).save_to_disk(tmp_path / "set")
        data = str(tmp_path / "set")
    else:
        for number in (0, 1):
            write(captioned(3, 3 * number), tmp_path / "set" / f"train-[{number}].parquet")
        write(captioned(6), tmp_path / "one[1].parquet")
        write(captioned(1), tmp_path / "one1.parquet")  # which one[1] as a glob would match
        names = {"file": "one[1].parquet", "glob": "set/train-*.parquet", "prefixed": "set/*.parquet"}
        data = "parquet:" * (make == "prefixed") + str(tmp_path / names[make])
    source, validation = open_sources(data, None, None)
    assert validation is None and source.images.keys == [f"rows/{number}" for number in range(6)]
    assert source.texts == [f"{letter} {number}" for number in range(6) for letter in "ab"]
    assert all(np.array_equal(pixels(source.images.open(number)), drawn(number)) for number in range(6))
    assert len(open_evaluation(data, "auto", None)) == 6


def test_splits_of_a_saved_dictionary_and_those_that_are_left_alone(tmp_path):
    splits = {"train": captioned(2), "dev": captioned(1, 5), "extra": captioned(4), "restval": captioned(1, 3)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    for data in (str(tmp_path / "set"), f"arrow:{tmp_path / 'set'}"):
        source, validation = open_sources(data, None, None)
        assert source.images.keys == ["train/0", "train/1", "restval/0"] and validation.image_keys == ["dev/0"]
        assert np.array_equal(pixels(source.images.open(2)), drawn(3))
        assert "without the split extra" in source.description
    assert open_sources(str(tmp_path / "set" / "extra"), None, None)[0].size == 8
    datasets.DatasetDict({"en": captioned(1), "fr": captioned(1)}).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match=r"two has the splits en, fr, and none of them is called train; give one, as"):
        open_sources(str(tmp_path / "two"), None, None)
    different = {"train": captioned(1), "test": rows(image=(TEXT, ["a"]), captions=(NUMBER, [1]))}
    datasets.DatasetDict(different).save_to_disk(tmp_path / "different")
    with pytest.raises(InputError, match="its splits have different columns"):
        open_sources(str(tmp_path / "different"), None, None)


def test_a_column_says_the_split(tmp_path):
    columns = {"image": (IMAGE, stored(0, 1, 2)), "sentence": (TEXT, list("abc"))}
    data = rows(**columns, split=(TEXT, ["train", "val", "restval"]))
    source, validation = open_sources(str(write(data, tmp_path / "test.parquet")), None, None)
    assert source.texts == ["a", "c"] and validation.captions == ["b"]
    data = rows(**columns, split=(TEXT, ["train", "trian", None]))
    with pytest.raises(InputError, match="column split holds 'trian', none of train, "):
        open_sources(str(write(data, tmp_path / "b.parquet")), None, None)


def test_a_download_of_the_hub_is_read_as_its_card_says(tmp_path):
    write(rows(image=(IMAGE, stored(0, 1)), label=(NUMBER, [1, 0])), tmp_path / "set" / "default" / "first.parquet")
    write(rows(image=(IMAGE, stored(2)), label=(NUMBER, [1])), tmp_path / "set" / "default" / "second.parquet")
    (tmp_path / "set" / "dataset_infos.json").write_text("{}")
    files = [("train", "first"), ("validation", "second")]
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    card += [line for split, name in files for line in (f"  - split: {split}", f"    path: default/{name}.parquet")]
    card += ["dataset_info:", "  features:", "  - name: image", "    dtype: image", "  - name: label", "    dtype:"]
    card += ["      class_label:", "        names:", "          '0': cat", "          '1': dog", "---"]
    (tmp_path / "set" / "README.md").write_text("\n".join(card) + "\n")
    source, validation = open_sources(str(tmp_path / "set"), None, None)
    assert source.classes == ("cat", "dog") and source.first_text.tolist() == [1, 0]
    assert validation.image_keys == ["validation/0"]


def test_images_that_are_files_beside_the_table(tmp_path):
    make_images(tmp_path / "set" / "images", "a.png", "b.png")
    data = rows(file_name=(TEXT, ["a.png", "gone.png", "b.png", None]), caption=(TEXT, list("wxyz")))
    file = str(write(data, tmp_path / "set" / "table.parquet"))
    source, _ = open_sources(file, None, None)
    assert texts_by_image(source) == {"rows/0": ["w"], "rows/2": ["y"]}
    assert source.skipped == (("rows/1", "missing"), ("rows/3", "missing"))
    assert source.images.open(1).getpixel((0, 0)) == (1, 0, 0)
    before = source.images.identity(np.array([0]))
    make_images(tmp_path / "set" / "images", "c.png", "a.png")
    assert source.images.identity(np.array([0])) != before
    (tmp_path / "set" / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"of the images that its column file_name names not one .*--image-root says"):
        open_sources(file, None, None)
    assert open_sources(file, None, None, image_root=str(tmp_path / "elsewhere"))[0].size == 2
    held = str(write(captioned(1), tmp_path / "held.parquet"))
    with pytest.raises(InputError, match="holds its own images; leave it out"):
        open_sources(held, None, None, image_root=str(tmp_path / "elsewhere"))


PICTURE = (IMAGE, stored(0))
BINARY = (datasets.Value("binary"), [png(0)])


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        (
            {"image": PICTURE, "caption_10": (TEXT, ["k"]), "caption_0": (TEXT, ["a"]), "caption_2": (TEXT, [None])},
            "ak",
        ),
        ({"depth": PICTURE, "img": PICTURE, "label": (classes("x"), [0]), "text": (TEXT, ["t"])}, "t"),
        ({"jpg": BINARY, "mask": BINARY, "txt": (TEXT, ["t"]), "__key__": (TEXT, ["k"])}, "t"),
        ({"photo": PICTURE, "coarse_label": (classes("c"), [0]), "fine_label": (classes("f"), [0])}, "f"),
        ({"scan": PICTURE, "kind": (classes("only"), [0])}, ["only"]),
    ],
    ids=["numbered", "captions first", "binary", "fine label", "one of a type"],
)
def test_columns_are_found_by_type_and_name(tmp_path, columns, texts):
    (tmp_path / "own.yaml").write_text('- "{}"')
    file = str(write(rows(**columns), tmp_path / "a.parquet"))
    of_classes = not any(name.startswith(("caption", "text", "txt")) for name in columns)
    source, _ = open_sources(file, None, str(tmp_path / "own.yaml") if of_classes else None)
    assert source.texts == list(texts)
    assert np.array_equal(pixels(source.images.open(0)), drawn(0))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"left": PICTURE, "right": PICTURE, "text": (TEXT, ["t"])},
            "several columns of images: .*left .Image., right",
        ),
        ({"url": (TEXT, ["t"]), "text": (TEXT, ["t"])}, "no column of images: it has url .string., .*--image-column"),
        (
            {"image": PICTURE, "width": (NUMBER, [1])},
            "no column of captions or of classes: .*width .int64.*--caption-col",
        ),
        (
            {"image": PICTURE, "a": (classes("x"), [0]), "b": (classes("y"), [0])},
            "several columns of classes: .*ClassL",
        ),
    ],
)
def test_columns_that_cannot_be_told_apart_are_named(tmp_path, columns, message):
    with pytest.raises(InputError, match=message) as error:
        open_sources(str(write(rows(**columns), tmp_path / "a.parquet")), None, None)
    assert "\n" not in str(error.value)


def test_columns_are_chosen_by_flags(tmp_path):
    data = rows(left=PICTURE, right=(IMAGE, stored(7)), text=(TEXT, ["t"]), kind=(classes("cat"), [0]), n=(NUMBER, [1]))
    file = str(write(data, tmp_path / "a.parquet"))
    source, _ = open_sources(file, None, None, columns=Columns("right", "kind"))
    assert source.classes == ("cat",) and np.array_equal(pixels(source.images.open(0)), drawn(7))
    assert open_sources(file, None, None, columns=Columns("left", "text"))[0].texts == ["t"]
    assert open_evaluation(file, "auto", None, columns=Columns("left", "kind")).classes == ("cat",)
    for columns, message in (
        (Columns("middle"), "--image-column middle is no column of images or paths; it has left"),
        (Columns("n"), "--image-column n is no column of images"),
        (Columns("left", "n"), "--caption-column n holds neither text nor named classes"),
    ):
        with pytest.raises(InputError, match=message):
            open_sources(file, None, None, columns=columns)


def test_columns_of_tables_are_chosen_too_and_data_without_columns_refuses(tmp_path):
    make_images(tmp_path, "a.png", "cat/b.png", "dog/c.png")
    table = make_table(tmp_path / "t.csv", [["image", "caption", "Alt"], ["a.png", "one", "two"]])
    assert open_sources(table, None, None, columns=Columns(caption="Alt"))[0].texts == ["two"]
    with pytest.raises(InputError, match="t.csv has no column for the caption: it has image, caption, Alt; .*none"):
        open_sources(table, None, None, columns=Columns(caption="none"))
    with pytest.raises(
        InputError, match="--caption-column x is for tables and data sets of the hub, not digits; leave"
    ):
        open_sources("digits", None, None, columns=Columns(caption="x"))
    with pytest.raises(InputError, match="--image-column x is for tables"):
        open_evaluation(f"folders:{tmp_path}", "auto", None, columns=Columns("x"))


def test_texts_that_are_not_utf8_are_counted(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"good", b"\xff\xfe", b"also"], pyarrow.binary()).view(pyarrow.string())
    images = pyarrow.array([png(number) for number in range(3)], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": texts}), tmp_path / "a.parquet")
    source, _ = open_sources(str(tmp_path / "a.parquet"), None, None)
    assert source.texts == ["good", "also"] and source.skipped == (("rows/1#0", "not_utf8"),)


def training(source, rank: int = 0, ranks: int = 1, workers: int = 0) -> TrainingData:
    prepare = Prepare(ImagePipeline(8, augment="light"), characters)
    sizes = {"effective_batch": 4, "chunk_size": 2}
    return TrainingData(source, prepare, rank=rank, world_size=ranks, workers=workers, seed=0, **sizes)


def test_a_step_is_the_same_on_any_ranks_and_workers_and_after_a_resume(tmp_path):
    contents = [png(number) if number != 2 else b"broken" for number in range(11)]
    data = rows(image=(IMAGE, [{"bytes": each, "path": None} for each in contents]), text=(TEXT, list("abcdefghijk")))
    file = str(write(data, tmp_path / "a.parquet"))
    source, _ = open_sources(file, None, None)
    plain = training(source)
    whole = [rows_of(step) for step in plain.steps(0, 6)]
    assert (plain.counts.read, plain.counts.used, plain.counts.skipped) == (11, 10, {"not_an_image": 1})
    begun = training(source)
    assert [rows_of(step) for step in begun.steps(0, 3)] == whole[:3]
    again = training(pickle.loads(pickle.dumps(open_sources(file, None, None)[0])), workers=2)
    again.load_state_dict(begun.state_dict())
    assert [rows_of(step) for step in again.steps(3, 6)] == whole[3:] != whole[:3]
    assert again.counts == plain.counts
    halves = [[rows_of(step) for step in training(source, rank, 2).steps(0, 6)] for rank in (0, 1)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_identity_is_that_of_the_rows_in_every_process(tmp_path):
    file = write(captioned(4), tmp_path / "a.parquet")
    images = open_sources(str(file), None, None)[0].images
    assert pickle.loads(pickle.dumps(images)).identity(np.arange(4)) == images.identity(np.arange(4))
    assert images.identity(np.array([1])) != images.identity(np.array([2]))
    assert open_sources(str(file), None, None)[0].images.identity(np.arange(4)) == images.identity(np.arange(4))
    write(captioned(4, 9), file)
    os.utime(file, (0, 0))
    assert open_sources(str(file), None, None)[0].images.identity(np.arange(4)) != images.identity(np.arange(4))


@pytest.mark.parametrize("make", [labelled, captioned])
def test_a_part_of_data_without_splits_is_held_out(tmp_path, make):
    file = str(write(make(12), tmp_path / "a.parquet"))
    source, validation = open_sources(file, None, None, held_out_fraction=0.25)
    test = open_evaluation(file, "auto", None, held_out_fraction=0.25)
    sizes = (3, 3, 6) if make is labelled else (1, 2, 9)
    assert (len(validation), len(test), len(source.images)) == sizes
    assert len({*validation.image_keys, *test.image_keys, *source.images.keys}) == 12
    if make is labelled:
        assert sorted(validation.labels.tolist()) == [0, 1, 2]


def test_what_cannot_be_read_is_an_error_of_one_line(tmp_path, monkeypatch):
    write(captioned(2), tmp_path / "set" / "good.parquet")
    (tmp_path / "set" / "broken.parquet").write_bytes(b"PAR1 and no more")
    write(captioned(2), tmp_path / "two" / "train.parquet")
    write(labelled(2), tmp_path / "two" / "test.parquet")
    captioned(2).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    for data, message in (
        (tmp_path / "set", "set/broken.parquet is no complete .parquet file"),
        (tmp_path / "two", "its files have different columns: Couldn't cast"),
        (tmp_path / "gone.parquet", "there is no such .parquet file"),
        (tmp_path / "saved", "cannot be read as a folder of save_to_disk"),
        (f"parquet:{tmp_path / 'saved'}", "looks like a folder of save_to_disk; leave parquet: out"),
    ):
        with pytest.raises(InputError, match=message) as error:
            open_sources(str(data), None, None)
        assert str(data) in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs a package that is not installed .*: pip install datasets"):
        open_sources(str(tmp_path / "set" / "good.parquet"), None, None)


def test_loading_says_nothing_and_leaves_the_library_as_it_was(tmp_path, capfd):
    bars, level = datasets.is_progress_bar_enabled(), datasets.utils.logging.get_verbosity()
    write(captioned(2), tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    capfd.readouterr()
    open_sources(str(tmp_path / "good.parquet"), None, None)
    with pytest.raises(InputError):
        open_sources(str(tmp_path / "bad.parquet"), None, None)
    assert capfd.readouterr() == ("", "")
    assert (datasets.is_progress_bar_enabled(), datasets.utils.logging.get_verbosity()) == (bars, level)


def test_a_name_of_the_hub_says_what_is_asked_of_it(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, *options))
        return datasets.DatasetDict({"train": captioned(2), "validation": captioned(1, 8), "extra": captioned(3)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source, validation = open_sources("hub:owner/a.name-1", None, None)
    assert source.images.keys == ["train/0", "train/1"] and validation.image_keys == ["validation/0"]
    assert source.where == "hub:owner/a.name-1" and "hub:owner/a.name-1" in source.description
    source, validation = open_sources("hub:owner/name/plain:extra::0.5", None, None)
    assert source.images.keys == ["extra/0", "extra/1", "extra/2"] and validation is None
    mixed, _ = open_sources(["hub:owner/name:train::1", "hub:owner/name:extra::3"], None, None)
    assert mixed.weights == (0.25, 0.75) and [part.size for part in mixed.parts] == [4, 6]
    assert asked[:2] == [("owner/a.name-1", None), ("owner/name", "plain")]
    with pytest.raises(InputError, match="--data hub:owner/name:tset has no split tset, only train, validation, extra"):
        open_sources("hub:owner/name:tset", None, None)
    for name in ("name", "owner/name/config/more", "owner/name:", "owner/name:train[:10]"):
        with pytest.raises(InputError, match=f"hub:{name[:4]}.*write hub:OWNER/NAME"):
            open_sources(f"hub:{name}", None, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(InputError, match="owner/name is a folder here as well; leave hub: out"):
        open_sources("hub:owner/name", None, None)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, "has no rows"),
        (
            ValueError("Config name is missing.\nPlease pick one: ['en', 'fr']\nusage"),
            r"configurations \('en', 'fr'\); ",
        ),
        (ValueError("BuilderConfig 'x' not found. Available: ['en']"), r"several .* \('en'\); name .*: hub:a/b/CONFIG"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"),
            "is not on the hub, or not for every",
        ),
        (ValueError("Couldn't infer the same format"), "cannot be read .Couldn't infer .*; look for a copy in parquet"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "needs code of its own .*never run"),
        (
            ConnectionError("Couldn't reach\nit"),
            "cannot be fetched .Couldn't reach it.: download it .* `hf download a/b ",
        ),
    ],
)
def test_faults_of_the_hub_name_the_remedy(monkeypatch, fault, message):
    def load_dataset(*_, **__):
        if fault is None:
            return captioned(1).select([])
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=message) as error:
        open_sources("hub:a/b", None, None)
    assert str(error.value).startswith("--data hub:a/b ") and "\n" not in str(error.value)


def test_without_a_network_the_hub_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"hub:a/b cannot be fetched \(.*Offline.*`hf download a/b --repo-type dataset"
    ):
        open_sources("hub:a/b", None, None)
