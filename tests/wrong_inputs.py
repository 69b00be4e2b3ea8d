"""A folder of faulty files: data, models, runs and settings that no command can use."""

import shutil
from pathlib import Path

from made_classes import make_squares, save_model
from made_data import make_images, make_table
from made_shards import captioned, make_tar

import train_clip

TABLES = {
    "captions.csv": [["image", "caption"], ["a.png", "red"], ["b.png", "blue"]],
    "no_caption.csv": [["image", "weight"], ["a.png", "1"]],
    "header.csv": [["image", "caption"]],
    "missing.csv": [["image", "caption"], ["x.png", "red"], ["y.png", "blue"]],
    "blank.csv": [["image", "caption"], ["a.png", ""], ["b.png", " "]],
    "split.csv": [["image", "caption", "split"], ["a.png", "red", "trian"]],
    "only_test.csv": [["image", "caption", "split"], ["a.png", "red", "test"]],
}
TEXTS = {
    "empty.csv": "",
    "cut.json": '{"images": [',
    "file": "neither data nor a folder",
    "list.yaml": "- 1\n",
    "no_braces.yaml": "- a photo of a thing\n",
    "one_text.yaml": "- a photo\n",
    "cut.yaml": "lr: [1",
    "key.yaml": "efective-batch: 8\n",
    "type.yaml": "effective_batch: many\n",
    "choice.yaml": "augment: hard\n",
    "nested.yaml": "data: {folder: squares}\n",
    "twice.yaml": "lr: 1\nsteps: 2\nlr: 3\n",
    "spellings.yaml": "cache_dir: a\ncache-dir: b\n",
    "empty.yaml": "output_dir: ''\n",
    "yes.yaml": "compile: yes\n",
    "time.yaml": "effective_batch: 1:30\n",
}


def make_wrong_inputs(folder: Path) -> Path:
    """Everything that tests/test_wrong_invocations.py names, by relative paths."""
    _make_data(folder)
    _make_models(folder)
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def _make_data(folder: Path) -> None:
    make_squares(folder / "squares", {"train": {"red": 3, "blue": 3}, "test": {"red": 2, "blue": 2}})
    make_squares(folder / "one_class", {"train": {"red": 2}, "test": {"red": 2}})
    make_squares(folder / "broken", {"train": {"red": 2, "blue": 2}})
    for image in (folder / "broken").rglob("*.png"):
        image.write_bytes(b"no image")
    make_images(folder, "a.png", "b.png")
    make_images(folder / "with_texts" / "red", "a.png", "b.png")
    for name in ("a.txt", "b.txt"):
        (folder / "with_texts" / "red" / name).write_text("a caption")
    make_images(folder / "loose", "a.png")
    for name, rows in TABLES.items():
        make_table(folder / name, rows)
    make_table(folder / "loose" / "captions.csv", TABLES["captions.csv"])
    (folder / "binary.csv").write_bytes(bytes(range(256)))
    (folder / "empty").mkdir()
    (folder / "runs").mkdir()
    (folder / "shards").mkdir()
    make_tar(folder / "shards" / "0.tar", captioned(range(2)))
    (folder / "no_tar.tar").write_bytes(b"no tar at all")
    images = {name: content for name, content in captioned(range(2)).items() if name.endswith("png")}
    make_tar(folder / "no_text.tar", images)


def _make_models(folder: Path) -> None:
    """A model, what is left where files are lost or cut, and a run of one step with its checkpoint."""
    save_model(folder / "model")
    for name in ("no_weights", "cut_model", "bad_config"):
        shutil.copytree(folder / "model" / "export", folder / name)
    (folder / "no_weights" / "model.safetensors").unlink()
    (folder / "bad_config" / "config.json").write_text("{")
    _cut(folder / "cut_model" / "model.safetensors")
    quick = ["--effective-batch=8", "--chunk-size=8", "--xbm-size=0", "--workers=0", "--eval-every=0", "--steps=1"]
    train_clip.main([*quick, f"--output-dir={folder / 'run'}"])
    shutil.copytree(folder / "run", folder / "cut_run", symlinks=True)
    _cut(folder / "cut_run" / "checkpoints" / "step_000001" / "model.safetensors")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])
