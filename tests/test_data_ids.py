"""Groups and sample ids are hashed from the names in the data: a resumed run and the memory bank rely on them for ever.

The numbers were printed by the code of commit fe0d5c1; a reader that gives others breaks every checkpoint made before.
"""

import json

import pytest
from made_data import make_images, make_table

from lib.data import open_evaluation, open_sources

A, B = "a/1.png", "b/2.png"


def make(kind: str, folder) -> str:
    make_images(folder, *([f"train/{A}", f"train/{B}", f"test/{A}"] if kind == "folders" else [A, B, "metadata/x.png"]))
    if kind == "folders":
        return str(folder)
    if kind in ("captions", "classes", "imagefolder"):
        columns = ["file_name", "label" if kind == "classes" else "text", "split"]
        name = "metadata.csv" if kind == "imagefolder" else "table.csv"
        make_table(folder / name, [columns, [A, "cat", "train"], [B, "dog", "train"], [A, "cat", "test"]])
        return str(folder if kind == "imagefolder" else folder / name)
    if kind == "groups":
        rows = [["image", "caption", "group", "split"], [A, "", "g", "train"], [A, "x", "g", "train"]]
        return make_table(folder / "table.csv", [*rows, [B, "y", "g", "train"], [B, "y", "", "test"]])
    if kind == "flickr":
        (folder / "x.token.txt").write_text(f"{A}#0\tone\n{A}#1\ttwo\n{B}#0\tthree\n")
        return f"flickr:{folder / 'x.token.txt'}"
    images = [{"id": 1, "file_name": A}, {"id": 2, "file_name": B}]
    content = {"images": images, "annotations": [{"image_id": n, "caption": t} for n, t in ((1, "one"), (2, "two"))]}
    if kind == "karpathy":
        splits = [(A, "restval"), (B, "train"), (A, "test")]
        content = {
            "images": [{"filename": n, "split": s, "sentences": [{"raw": "x"}, {"raw": "y"}]} for n, s in splits]
        }
    (folder / "file.json").write_text(json.dumps(content))
    return str(folder / "file.json")


OF_A, OF_B = 3950894433183139200, -6336789830057931095
CAT, DOG = 3429664268601861939, -6945572266024926151
CAPTIONS = [("a/1.png#0", OF_A, OF_A), ("b/2.png#0", OF_B, OF_B)]
FOLDER_A, FOLDER_B = 3405396810240292928, 8453121595177857668
GROUP = -4886164051694160276

KNOWN = {  # [(key, group, sample id) of each training pair], [group of each image to evaluate on]
    "folders": (
        [("train/a/1.png", FOLDER_A, -7971804274634496211), ("train/b/2.png", FOLDER_B, 4276990943162104056)],
        [FOLDER_A],
    ),
    "captions": (CAPTIONS, [OF_A]),
    "classes": ([("a/1.png", CAT, OF_A), ("b/2.png", DOG, OF_B)], [CAT]),
    "imagefolder": (CAPTIONS, [OF_A]),
    "groups": ([("a/1.png#1", GROUP, OF_A + 1), ("b/2.png#0", GROUP, OF_B)], [OF_B]),
    "flickr": ([CAPTIONS[0], ("a/1.png#1", OF_A, OF_A + 1), CAPTIONS[1]], [OF_A, OF_B]),
    "coco": (CAPTIONS, [OF_A, OF_B]),
    "karpathy": (
        [CAPTIONS[0], ("a/1.png#1", OF_A, OF_A + 1), CAPTIONS[1], ("b/2.png#1", OF_B, OF_B + 1)],
        [OF_A],
    ),
}


@pytest.mark.parametrize("kind", list(KNOWN))
def test_ids_and_groups_stay_as_they_are(tmp_path, kind):
    data = make(kind, tmp_path / "data")
    source, _ = open_sources(data, None, None)
    ids = [source.sample_id(pair, int(source.first_text[pair])) for pair in range(source.size)]
    pairs = [(source.key(pair), source.group_id(pair), ids[pair]) for pair in range(source.size)]
    assert (pairs, open_evaluation(data, "auto", None).group.tolist()) == KNOWN[kind]
