"""One loader reads all YAML files of the user: aliases, endless files and odd values give errors of one line."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import train_clip
from lib.config import parse_config, safe_yaml, save_config
from lib.data.prompt_banks import load_negative_prompts, load_templates, renamed
from lib.errors import InputError
from lib.evaluation.agnostic import generic_prompts

READERS = {
    "--config": lambda file: parse_config(train_clip.DEFAULTS, "", ["--config", str(file)]),
    "--prompts": lambda file: load_templates(str(file)),
    "--negative-prompts": lambda file: load_negative_prompts(file, ("ant", "bee")),
    "--class-names": lambda file: renamed(("ant", "bee"), file),
    "generic --prompts": lambda file: generic_prompts(file),
}
# Ten lines of ten aliases each: ten thousand million texts.
LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11)
)  # fmt: skip
BAD = {
    "laughs": (LAUGHS, "is not YAML: anchors and aliases .* are not read here; put texts .* in quotes"),
    "alias": ("- *ant\n", "anchors and aliases"),
    "merge": ("<<: &x {a: 1}\n", "anchors and aliases"),
    "deep": ("- " * 50_000, "is not YAML: maximum recursion depth"),
    "date": ("- !!timestamp 2024-13-45\n", "is not YAML: month"),
    "twice": ("{a: b, c: d, a: e}", "is not YAML: a is there twice; leave one out, line 1, column 14"),
    "tag": ("- !!bool x\n", "is not YAML"),
    "object": ("- !!python/object/apply:os.system [ls]\n", "is not YAML: could not determine a constructor"),
    "digits": ("- " + "1" * 5000, "is not YAML: Exceeds the limit"),
    "latin": (b"- caf\xe9 {}\n", "is not YAML: .utf-8. codec"),
    "large": ("# " + "x" * 2**20, "has more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("flag", READERS)
@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_is_no_plain_yaml_is_one_line(tmp_path, flag, fault):
    content, message = BAD[fault]
    file = tmp_path / "file.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        READERS[flag](file)
    told = str(error.value)
    assert told.startswith(f"{flag.split()[-1]} {file} ") and "\n" not in told and len(told) < 600


@pytest.mark.parametrize("flag", READERS)
def test_what_is_no_file_is_not_waited_for(tmp_path, flag):
    fifo, device = tmp_path / "fifo.yaml", Path("/dev/zero")
    os.mkfifo(fifo)
    for file in (fifo, device, tmp_path, tmp_path / "gone.yaml"):
        with pytest.raises(InputError, match=f"^{flag.split()[-1]} {file} cannot be read"):
            READERS[flag](file)


def test_values_are_those_of_yaml_and_a_byte_order_mark_is_none_of_them(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_bytes(b'\xef\xbb\xbf- "a & b * c {}"\r\n- caf\xc3\xa9 {}\n')
    assert load_templates(str(file)) == ("a & b * c {}", "café {}")
    file.write_text("{a: [1, null, 2.5, .nan], b: true}")
    found = safe_yaml.read_yaml(file, "--config")
    assert found["a"][:3] == [1, None, 2.5] and found["a"][3] != found["a"][3] and found["b"] is True
    for name, flag in (("--prompts", "--prompts"), ("generic --prompts", "--prompts"), ("--negative-prompts",) * 2):
        for value in ("null", ".nan", "7", "{a: 1}", "[]"):
            file.write_text(f"- a {{}}\n- {value}\n")
            with pytest.raises(InputError, match=f"^{flag} .* must hold a list of texts"):
                READERS[name](file)


OF_YAML_1_2 = {
    "010": 10, "-010": -10, "0o10": 8, "0x1F": 31, "+5": 5, "1e-3": 0.001, "1E5": 1e5, "-.5": -0.5, "12.": 12.0,
    "-.inf": -math.inf, "True": True, "FALSE": False, "~": None, "null": None, "1:30": "1:30", "1:30:00": "1:30:00",
    "yes": "yes", "No": "No", "on": "on", "OFF": "OFF", "y": "y", "1_000": "1_000", "0b11": "0b11", "2024-01-01":
    "2024-01-01", "=": "=", "'010'": "010", "1.2.3": "1.2.3", "0o8": "0o8", "e5": "e5", ".": ".",
}  # fmt: skip


def test_plain_values_are_those_of_yaml_1_2(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("".join(f"- {text}\n" for text in OF_YAML_1_2))
    found = safe_yaml.read_yaml(file, "--config")
    assert found == list(OF_YAML_1_2.values())
    assert [type(value) for value in found] == [type(value) for value in OF_YAML_1_2.values()]
    file.write_text("{1: a, '1': b}")
    assert safe_yaml.read_yaml(file, "--config") == {1: "a", "1": "b"}


def test_texts_that_look_like_something_else_are_written_so_that_every_reader_takes_them_for_texts(tmp_path):
    texts = [text.strip("'") for text in OF_YAML_1_2] + ["", " a", "x: y", "a # b", "x" * 200 + " y", "<<", "caf\u00e9"]
    values = {"texts": texts, "numbers": [1e-5, 1e22, 10, -0.5], "others": [None, True, math.inf]}
    file = tmp_path / "file.yaml"
    file.write_text(safe_yaml.yaml_text(values))
    assert safe_yaml.read_yaml(file, "--config") == values == yaml.safe_load(file.read_text())


@pytest.mark.parametrize("folder", ["configs", "accelerate_configs", "lib/data/prompts"])
def test_shipped_files_mean_by_yaml_1_2_what_they_mean_by_1_1(folder):
    files = sorted((ROOT / folder).glob("*.yaml"))
    assert files
    for file in files:
        ours, theirs = safe_yaml.read_yaml(file, "--config"), yaml.safe_load(file.read_text())
        if isinstance(ours, dict):  # 1e-3 is a number in 1.2 alone, and the same word on a command line
            theirs = {name: float(value) if isinstance(ours[name], float) else value for name, value in theirs.items()}
        assert ours == theirs


def test_a_config_with_a_secret_says_so_and_is_its_owners(tmp_path):
    file = tmp_path / "config.yaml"
    before = os.umask(0o022)
    try:
        save_config(replace(train_clip.DEFAULTS, data=("https://u:p@h/a.tar?t=k",)), file)
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.read_text().startswith("# Holds passwords or tokens of addresses")
        assert parse_config(train_clip.DEFAULTS, "", ["--config", str(file), "--steps=1"]).data == (
            "https://u:p@h/a.tar?t=k",
        )
        save_config(train_clip.DEFAULTS, file)
        assert file.stat().st_mode & 0o777 == 0o644 and file.read_text().startswith("data:")
    finally:
        os.umask(before)


def test_the_settings_that_a_run_writes_can_be_read_again(tmp_path):
    """Equal lists in two settings are written out, not as an alias of each other."""
    config = replace(train_clip.DEFAULTS, freeze=("text",), unfreeze=("text",), steps=3)
    save_config(config, tmp_path / "config.yaml")
    assert "&" not in (tmp_path / "config.yaml").read_text()
    assert parse_config(train_clip.DEFAULTS, "", ["--config", str(tmp_path / "config.yaml")]) == config
