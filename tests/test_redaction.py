"""Passwords and tokens in addresses: not on the terminal, and in no file except config.yaml, which is private."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from made_classes import save_model
from made_shards import png, tar_bytes

import evaluate
import train_clip
import train_siglip
from lib.data.pack.__main__ import main as pack
from lib.errors import one_line_errors
from lib.export.__main__ import main as export
from lib.files import append_text, json_without_secrets, without_secrets, write_text

PASSWORD, TOKEN = "p4ss:w0rd", "t0k3n/of+access"
QUICK = [
    "--effective-batch=8", "--chunk-size=4", "--xbm-size=0", "--warmup-steps=0", "--eval-every=2", "--save-every=1",
    "--steps=2", "--max-bad=0.9",
]  # fmt: skip

HIDDEN = {
    "https://user:pw@host/a.tar": "https://***@host/a.tar",
    "https://user:p@w@host:80/a.tar": "https://***@host:80/a.tar",
    "https://user:p/w?x@host/a.tar": "https://***@host/a.tar",
    "https://token@host/a.tar": "https://***@host/a.tar",
    "s3://key:it's@bucket/{0..9}.tar": "s3://***@bucket/{0..9}.tar",
    "proxy http://u:12345@proxy:3128": "proxy http://***@proxy:3128",
    "https:/user:pw@host/names.yaml": "https:/***@host/names.yaml",  # a pathlib.Path of it
    "--data https://h/a.tar?token=abc: not there": "--data https://h/a.tar?***: not there",
    "(https://h/a.tar?X-Amz-Credential=a/b,c;d&sig=e%20f) and": "(https://h/a.tar?***) and",
    "URL('https://h/a?key=b') 'https://h/a?key=b'": "URL('https://h/a?***') 'https://h/a?***'",
    "pipe:curl https://u:p@h/x?y=1 | cat": "pipe:curl https://***@h/x?*** | cat",
    "0.tar?token=x/000": "0.tar?***",
    "https://a/x https://u:p@b/y?c=d e@f?": "https://a/x https://***@b/y?*** e@f?",
}
KEPT = [
    "a: b@c", "what? me@x.y, is it?", "x?y=z", "is it https://h/x?", "(https://h/x?)", "/data/a@b:c/d?e=f",
    "hf://datasets/owner/name@main/a.tar", "https://host:8080/a@2x/b.tar", "table:/data@home/x.csv",
    '["https://host","a@b"]', "<td>https://host:80</td><td>me@x</td>", "file:///a/b@c",
]  # fmt: skip


def test_what_is_before_the_at_sign_and_behind_the_question_mark_of_an_address_is_hidden():
    for text, hidden in HIDDEN.items():
        assert without_secrets(text) == hidden and without_secrets(hidden) == hidden
        assert json_without_secrets([{"a": text}, 1, None]) == [{"a": hidden}, 1, None]
    assert [without_secrets(text) for text in KEPT] == KEPT
    odd = [
        'https://u:p"w@h/x?a="b',
        "https://h/x?a\\",
        "https://h\\",
        "https://u:p\\nw@h/?é=é",
        "https://h/x?a=\nb@c ?",
    ]
    assert json_without_secrets(odd) == [
        "https://***@h/x?***", "https://h/x?***", "https://h\\", "https://***@h/?***", "https://h/x?***\nb@c ?",
    ]  # fmt: skip


def test_a_text_is_written_whole_or_not_at_all_with_the_mode_that_the_umask_leaves(tmp_path, monkeypatch):
    file, before = tmp_path / "a.json", os.umask(0o027)
    try:
        write_text(file, "caf\u00e9 https://u:p@h\r\n")
        assert file.read_bytes() == "caf\u00e9 https://***@h\r\n".encode() and file.stat().st_mode & 0o777 == 0o640
        write_text(file, "https://u:p@h", private=True)
        assert file.read_text() == "https://u:p@h" and file.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    append_text(file, "\nhttps://u:p@h")
    assert file.read_text().endswith("\nhttps://***@h")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(file, "other")
    assert "other" not in file.read_text() and os.listdir(tmp_path) == ["a.json"]


def test_every_text_file_of_lib_is_written_in_one_place():
    """A Path.write_text or an open for text elsewhere could write a secret."""
    elsewhere = re.compile(r"""\.write_text\(|\.dump\(|\bopen\([^)\n]*, ["'][wax]["']""")
    found = {
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in (ROOT / "lib").rglob("*.py")
        for line in file.read_text().splitlines()
        if elsewhere.search(line) and "os.devnull" not in line
    }
    assert found == {
        'lib/files.py: with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:',
        'lib/files.py: with _named(path), open(path, "a", encoding="utf-8") as file:',
        "lib/config/safe_yaml.py: return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=10_000, **style)",
    }


def test_a_traceback_a_warning_and_a_log_hide_what_an_error_holds(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, sys, threading, warnings\n"
        "early = logging.StreamHandler()\n"
        "from lib.errors import one_line_errors\n"
        "with one_line_errors():\n"
        "    address = 'https://u:p4ss@h/a?key=t0k3n'\n"
        "    print(address); sys.stdout.writelines([address])\n"
        "    early.emit(logging.makeLogRecord({'msg': address})); warnings.warn(address)\n"
        "    thread = threading.Thread(target=lambda: {}[address]); thread.start(); thread.join()\n"
        "    raise RuntimeError(address) from KeyError(address)\n"
    )
    ended = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    shown = ended.stdout + ended.stderr
    assert ended.returncode == 1 and "Traceback" in shown and shown.count("https://***@h/a?***") == 7
    assert "p4ss" not in shown and "t0k3n" not in shown


@pytest.fixture
def address(server, no_pauses) -> str:
    """Two shards, of which each lacks a caption, has a broken image, and fails once."""
    for shard in range(2):
        members = {}
        for number in range(6):
            members[f"{number:04d}.png"] = png(number)[:40] if number == 1 else png(6 * shard + number)
            members[f"{number:04d}.txt"] = b"" if number == 2 else f"{shard} {number}".encode()
        server.files[f"/d/{shard}.tar"] = tar_bytes(members)
        server.failures[f"/d/{shard}.tar?token={TOKEN}"] = 1
    return f"http://user:{PASSWORD}@{server.url.removeprefix('http://')}/d/{{0..1}}.tar?token={TOKEN}"


def run(main, *arguments: str) -> int:
    """A script to its end; returns its exit code."""
    try:
        with one_line_errors():
            return main(list(map(str, arguments))) or 0
    except SystemExit as ended:
        return ended.code


def without_secrets_in(folder: Path, capfd) -> str:
    """The output; neither it nor a file of the folder except config.yaml has a secret."""
    shown = "".join(capfd.readouterr())
    for secret in (PASSWORD, TOKEN, "w0rd", "t0k3n"):
        assert secret not in shown
        held = [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
        assert [file.name for file in held if file.name != "config.yaml"] == []
    return shown


@pytest.mark.parametrize("script", [train_clip, train_siglip])
def test_a_run_prints_and_writes_no_secret_but_in_its_config_yaml(script, address, tmp_path, capfd):
    folder = tmp_path / "run"
    flags = ["--data", address, "--val-data", address, "--output-dir", folder, "--cache-dir", tmp_path / "cache"]
    assert run(script.main, *QUICK, *flags, "--tracker=tensorboard", "--workers=1") == 0
    shown = without_secrets_in(tmp_path, capfd)
    assert "0.tar?*** failed" in shown and "http://***@127.0.0.1" in shown
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert {(each["key"], each["reason"]) for each in skipped} >= {("0.tar/0001", "truncated")}
    assert all(each["shard"].startswith("http://***@127.0.0.1") for each in skipped)
    config = folder / "config.yaml"
    assert config.stat().st_mode & 0o777 == 0o600 and config.read_text().startswith("# Holds passwords or tokens")
    assert PASSWORD in config.read_text() and TOKEN in config.read_text()

    assert run(script.main, "--config", config, "--resume=auto", "--steps=3") == 0  # the settings are the same ones
    assert "(from 2)" in without_secrets_in(tmp_path, capfd)
    assert run(export, folder, "--checkpoint", "last", "--output", tmp_path / "export") == 0
    assert (tmp_path / "export" / "README.md").is_file()
    without_secrets_in(tmp_path, capfd)


def test_the_report_on_data_hides_secrets(address, tmp_path, capfd):
    folder = tmp_path / "info"
    flags = ["--data", address, "--data-info", f"--cache-dir={tmp_path}", "--output-dir", folder]
    assert run(train_clip.main, *flags) == 0
    assert "0.tar?***" in without_secrets_in(tmp_path, capfd) and (folder / "data_info.json").is_file()


def test_an_evaluation_prints_and_writes_no_secret(address, tmp_path, capfd):
    save_model(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--data", address, "--workers=0", "--cache-dir", tmp_path / "cache"]
    assert run(evaluate.main, "retrieval", *flags, "--output-dir", tmp_path / "out") == 0
    assert "http://***@127.0.0.1" in without_secrets_in(tmp_path, capfd)
    assert "truncated" in (tmp_path / "out" / "report.html").read_text()


def test_packing_prints_and_writes_no_secret_and_goes_on_with_another_token(address, tmp_path, capfd):
    for token in (TOKEN, "a newer one".replace(" ", "")):
        flags = [address.replace(TOKEN, token), "--out", tmp_path / "packed", f"--cache-dir={tmp_path}", "--verify"]
        assert run(pack, *flags) == 0
        shown = without_secrets_in(tmp_path, capfd)
    assert "is done already: 8 samples" in shown
    lines = [json.loads(line) for line in (tmp_path / "packed" / "skipped.jsonl").read_text().splitlines()]
    assert sorted((each["key"], each["reason"]) for each in lines) == [
        (f"{shard}.tar/{key}", reason)
        for shard in (0, 1)
        for key, reason in (("0001", "truncated"), ("0002#0", "empty_caption"))
    ]


def test_shards_that_differ_in_their_secrets_alone_stay_apart_when_packed(address, server, tmp_path, capfd):
    one, other = (address.replace("{0..1}", "0").replace(TOKEN, token) for token in (TOKEN, "0th3r"))
    server.files["/d/0.tar"] = server.files["/d/1.tar"]
    both = f"{{{one},{other}}}"
    assert run(pack, both, "--out", tmp_path / "packed", f"--cache-dir={tmp_path}") == 0
    without_secrets_in(tmp_path, capfd)
    tar = (tmp_path / "packed" / "all-000000.tar").read_bytes()
    assert b"0th3r" not in tar and len({part.split(b'"')[0] for part in tar.split(b'"key": "')[1:]}) == 10


def test_a_fault_is_told_without_the_secret_in_it(address, tmp_path, capfd):
    gone = address.replace("/d/", "/nowhere/")
    assert run(train_clip.main, *QUICK, "--data", gone, f"--output-dir={tmp_path / 'run'}", f"--cache-dir={tmp_path}")
    assert "/nowhere/" in without_secrets_in(tmp_path, capfd)
    for flags in (["--dta", gone], ["--lr", gone], ["--class-names", gone], ["--image-root", gone], ["--model", gone]):
        assert run(train_clip.main, *QUICK, *flags, f"--output-dir={tmp_path / 'run2'}") == 2
        assert "/nowhere/" in without_secrets_in(tmp_path, capfd).replace("\n", "")
    config = tmp_path / "settings.yaml"
    config.write_text(f"lr: 1\ndata: [{gone}\nlr: x: y\n")
    assert run(train_clip.main, "--config", config) == 2
    assert "not YAML" in "".join(shown := capfd.readouterr()) and TOKEN not in shown.err
