"""Every YAML file of the user's goes through one loader: aliases, endless files and odd values are one line each."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

import train_clip
from lib import safe_yaml
from lib.config import parse_config, save_config
from lib.data.classes.class_names import renamed
from lib.data.classes.prompt_banks import load_negative_prompts, load_templates
from lib.errors import InputError
from lib.evaluation.agnostic.prompts import generic_prompts

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
    "date": ("- 2024-13-45\n", "is not YAML: month"),
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
    file.write_text("{a: [1, null, 2.5, .nan], b: yes}")
    found = safe_yaml.read_yaml(file, "--config")
    assert found["a"][:3] == [1, None, 2.5] and found["a"][3] != found["a"][3] and found["b"] is True
    for name, flag in (("--prompts", "--prompts"), ("generic --prompts", "--prompts"), ("--negative-prompts",) * 2):
        for value in ("null", ".nan", "7", "{a: 1}", "[]"):
            file.write_text(f"- a {{}}\n- {value}\n")
            with pytest.raises(InputError, match=f"^{flag} .* must hold a list of texts"):
                READERS[name](file)


def test_the_settings_that_a_run_writes_can_be_read_again(tmp_path):
    """Equal lists in two settings are written out, not as an alias of each other."""
    config = replace(train_clip.DEFAULTS, freeze=("text",), unfreeze=("text",), steps=3)
    save_config(config, tmp_path / "config.yaml")
    assert "&" not in (tmp_path / "config.yaml").read_text()
    assert parse_config(train_clip.DEFAULTS, "", ["--config", str(tmp_path / "config.yaml")]) == config
