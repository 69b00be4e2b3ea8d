"""torchvision's data sets are read from its own files, and the message explains how to get them."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from made_data import make_images
from torchvision import datasets

from lib.data import open_evaluation, open_sources
from lib.data.fetcher import Fetcher
from lib.errors import InputError


def no_network(*_, **__):
    raise OSError("no network in this test")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", no_network)


def make_cifar(folder: Path, monkeypatch, kind, label_key: str, classes: list[str]) -> None:
    """Four images a file in torchvision's layout, and their checksums put in place of the official ones."""

    def write(name: str, content: dict) -> str:
        path = folder / kind.base_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    for which in ("train_list", "test_list"):
        entries = []
        for number, (name, _) in enumerate(getattr(kind, which)):
            pixels = np.full((4, 3072), 10 * number, dtype=np.uint8)
            pixels[:, :1024] = 200  # the red plane comes first
            entries.append([name, write(name, {"data": pixels, label_key: [0, 1, 1, 2]})])
        monkeypatch.setattr(kind, which, entries)
    meta = write(kind.meta["filename"], {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta})


def test_cifar_is_read_from_torchvisions_files(tmp_path, monkeypatch):
    fetcher = Fetcher(tmp_path, 0)
    make_cifar(tmp_path / "torchvision", monkeypatch, datasets.CIFAR10, "labels", ["cat", "dog", "ship"])
    source, validation = open_sources("torchvision:cifar10", None, None, fetcher=fetcher)
    assert (source.size, len(validation), source.classes) == (20, 4, ("cat", "dog", "ship"))
    assert source.images.open(4).getpixel((0, 0)) == (200, 10, 10) and source.images.open(0).size == (32, 32)
    assert len(source.templates) > 1 and source.group[0] != source.group[1] == source.group[2]
    assert validation.labels.tolist() == [0, 1, 1, 2] and validation.image_keys[3] == "cifar10/test/00003"
    assert len(set(source.image_id.tolist())) == 20
    assert source.images.identity(np.arange(4)) != source.images.identity(np.arange(4, 8))


def test_cifar100_has_its_names_with_spaces_and_a_folder_of_the_users(tmp_path, monkeypatch):
    names = ["aquarium_fish", "cat", "maple_tree"]
    make_cifar(tmp_path, monkeypatch, datasets.CIFAR100, "fine_labels", names)
    monkeypatch.chdir(tmp_path)
    test = open_evaluation("cifar100", "auto", "simple", image_root=str(tmp_path))
    assert test.classes == ("aquarium fish", "cat", "maple tree") and len(test) == 4
    with pytest.raises(InputError, match="--split val: cifar100 has only train, test"):
        open_evaluation("cifar100", "val", None, image_root=str(tmp_path))


def test_a_changed_cifar_file_is_not_unpickled(tmp_path, monkeypatch):
    make_cifar(tmp_path, monkeypatch, datasets.CIFAR10, "labels", ["cat", "dog", "ship"])
    bad = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    bad.write_bytes(bad.read_bytes() + b"x")
    loaded = []
    monkeypatch.setattr("torchvision.datasets.cifar.pickle.load", lambda *_, **__: loaded.append(1))
    with pytest.raises(InputError, match="put cifar-10-python.tar.gz"):
        open_sources("torchvision:cifar10", None, None, image_root=str(tmp_path))
    assert not loaded


def test_imagenette_is_read_from_its_folder(tmp_path, monkeypatch):
    root = tmp_path / "imagenette2-320"
    make_images(root, "train/n01440764/a.JPEG", "train/n01440764/b.JPEG", "train/n02979186/c.JPEG")
    make_images(root, "val/n01440764/d.JPEG", "val/n02979186/e.JPEG")
    with pytest.raises(InputError, match="incomplete in .*3 of 9,469 images: remove imagenette2-320"):
        open_sources("imagenette", None, None, image_root=str(tmp_path))
    monkeypatch.setattr("lib.data.named_sets.IMAGENETTE", {"train": 3, "val": 2})
    source, validation = open_sources("imagenette", None, None, image_root=str(tmp_path))
    assert source.size == 3 and source.classes == validation.classes == ("tench", "cassette player")
    assert validation.labels.tolist() == [0, 1] and validation.open_image(1).size == (8, 8)
    assert validation.image_keys[0] == "imagenette/val/n01440764/d.JPEG"


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("imagenette", "imagenette2-320.tgz"),
    ],
)
def test_without_a_network_the_file_and_the_folder_are_named(tmp_path, name, archive):
    fetcher = Fetcher(tmp_path / "cache", 0)
    where = f"--data {name} is incomplete in {tmp_path}/cache/torchvision"
    expected = f"{where} .*no network in this test.*put {archive} from https://"
    with pytest.raises(InputError, match=expected):
        open_sources(f"torchvision:{name}", None, None, fetcher=fetcher)


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    make_images(tmp_path, "cifar10/train/cat/1.jpg", "cifar10/train/dog/2.jpg")
    monkeypatch.chdir(tmp_path)
    assert open_sources("cifar10", None, None)[0].classes == ("cat", "dog")
