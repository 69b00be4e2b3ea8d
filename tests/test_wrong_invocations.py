"""Wrong commands give one message with the flag or file, the value and the remedy, before the first batch."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TASKS
from wrong_inputs import make_wrong_inputs

import evaluate
import lib.train
import train_clip
import train_siglip
from lib.config import parse_config
from lib.config.arguments import parse
from lib.data.pack.__main__ import main as pack
from lib.errors import one_line_errors
from lib.evaluation.tasks import Task
from lib.export.__main__ import main as export

SCRIPTS = {
    "train_clip": train_clip.main,
    "train_siglip": train_siglip.main,
    "evaluate": evaluate.main,
    "pack": pack,
    "export": export,
}
QUICK = {  # what a command has before its own flags
    "train": "--effective-batch 8 --chunk-size 8 --xbm-size 0 --workers 0 --eval-every 0 --steps 1 --output-dir out",
    "evaluate": "--model model --output-dir out --cache-dir cache --workers 0",
    "pack": "--out packed",
    "export": "",
}

# The command, what its message holds, the exit code.
WRONG = [
    # Data
    ("train_clip --data nowhere", "--data nowhere|is not there|give digits", 2),
    ("train_clip --data ''", "--data '' is empty|not set|leave it out", 2),
    ("train_clip --data", "--data is given without a source|name one", 2),
    ("train_clip --data tabel:captions.csv", "--data tabel:captions.csv is not there|table of captions", 2),
    ("train_clip --data captions.csv::-1", "--data captions.csv::-1|a weight must be a number above 0", 2),
    ("train_clip --data captions.csv::0.5 squares", "--data squares has no weight|squares::0.5", 2),
    ("train_clip --data squares --val-data nowhere", "--val-data nowhere|is not there", 2),
    ("train_clip --data file", "--data file|of no kind that is read here|give digits", 2),
    ("train_clip --data empty", "--data empty|no class folders|must hold train/<class>/", 2),
    ("train_clip --data one_class", "--data one_class|has one class, 'red'|give two classes", 2),
    ("train_clip --data loose", "--data loose|a table of their captions|give loose/captions.csv", 2),
    ("train_clip --data with_texts", "--data with_texts|red/a.txt|in a .csv|folders:with_texts", 2),
    ("train_clip --data broken", "--data broken/train|cannot be read|not_an_image|check that they are images", 1),
    ("train_clip --data no_caption.csv", "--data no_caption.csv|no column for the caption|image, weight", 2),
    ("train_clip --data empty.csv", "--data empty.csv|names no image|needs a line for each image", 2),
    ("train_clip --data header.csv", "--data header.csv|names no image|needs a line for each image", 2),
    ("train_clip --data binary.csv", "--data binary.csv|no table|the right file?", 2),
    ("train_clip --data missing.csv", "--data missing.csv|'x.png'|--image-root says where", 2),
    ("train_clip --data captions.csv --image-root nowhere", "--image-root nowhere|not a folder|give the one", 2),
    ("train_clip --data blank.csv", "--data blank.csv|empty_caption 2|nothing is left", 2),
    ("train_clip --data split.csv", "--data split.csv, line 2|'trian'|none of train", 2),
    ("train_clip --data only_test.csv", "--data only_test.csv|split is train, only test", 2),
    ("train_clip --data cut.json", "--data cut.json|not JSON, or was cut short", 2),
    ("train_clip --data shards", "--data shards|give 'shards/*.tar'", 2),
    ("train_clip --data 'shards/*.tgz'", "--data shards/*.tgz|there is no file|check the folder and the pattern", 2),
    ("train_clip --data 'shards/{0..3}.tar'", "--data shards/{0..3}.tar|no file shards/1.tar", 2),
    ("train_clip --data no_tar.tar", "--data no_tar.tar|no tar that can be read (unreadable_tar)|check the file", 2),
    ("train_clip --data no_text.tar", "--data no_text.tar|no sample with an image|of the same name", 2),
    ("train_clip --data 'pipe:cat x.tar'", "--data pipe:cat x.tar|--allow-pipe", 2),
    ("train_clip --prompts digit", "--prompts digit|cannot be read|activities, digits, objects, simple", 2),
    ("train_clip --prompts list.yaml", '--prompts list.yaml|must hold a list of texts|- "a photo of {}"', 2),
    ("train_clip --prompts no_braces.yaml", "--prompts no_braces.yaml|'a photo of a thing' has no {}", 2),
    ("train_clip --negative-prompts nowhere.yaml", "--negative-prompts nowhere.yaml|name a YAML file", 2),
    ("train_clip --workers 10000", "--workers 10000|at most 256|auto suits", 2),
    ("train_clip --shard-cache-gib nan", "--shard-cache-gib nan|a finite number", 2),
    # Numbers
    ("train_clip --lr 0", "--lr 0.0|greater than 0", 2),
    ("train_clip --lr nan", "--lr nan|a finite number", 2),
    ("train_clip --lr inf", "--lr inf|a finite number", 2),
    ("train_clip --lr fast", "--lr|fast|FLOAT", 2),
    ("train_clip --weight-decay nan", "--weight-decay nan|a finite number", 2),
    ("train_clip --grad-clip nan", "--grad-clip nan|a finite number", 2),
    ("train_clip --scale-schedule nan 10", "--scale-schedule nan 10.0|finite numbers", 2),
    ("train_clip --epochs inf", "--epochs inf|a finite number", 2),
    ("train_clip --beta2 1", "--beta2 1.0|below 1", 2),
    ("train_clip --label-smoothing 1", "--label-smoothing 1.0|below 1", 2),
    ("train_siglip --pos-weight inf", "--pos-weight inf|a finite number", 2),
    ("train_siglip --label-smoothing 0.1", "--label-smoothing 0.1|belongs to train_clip.py", 2),
    ("train_clip --head-epochs -1", "--head-epochs -1|negative", 2),
    ("train_clip --data pictures --freeze none text", "--freeze none text|stands alone", 2),
    ("train_clip --steps 2.5", "--steps|2.5|INT", 2),
    ("train_clip --warmup-steps 100", "--warmup-steps 100|the run's 1 steps|lower them", 2),
    ("train_clip --seed 5000000000", "--seed 5000000000|from 0 to 4294967295", 2),
    ("train_clip --steps 100000000000000000000", "--steps 100000000000000000000|1000000000000|lower it", 2),
    ("train_clip --xbm-start -99999999999999999999", "--xbm-start -99999999999999999999|1000000000000", 2),
    ("train_clip --steps None --epochs 1e20", "--epochs 1e+20|steps, more than are counted|lower it", 2),
    ("train_clip --dropout 1", "--dropout 1.0|below 1", 2),
    ("train_clip --dropout 1", "--dropout 1.0|below 1", 2),
    ("train_clip --scale-max -1", "--scale-max -1.0|must not be negative|0 switches it off", 2),
    ("train_clip --image-size 100000", "--image-size 100000|at most 4096 pixels", 2),
    # Batches
    ("train_clip --effective-batch 0", "--effective-batch 0|at least 1", 2),
    ("train_clip --effective-batch 1", "--effective-batch 1|no negatives|at least 2", 2),
    ("train_clip --chunk-size 0", "--chunk-size 0|at least 1", 2),
    ("train_clip --effective-batch 10000000000", "--effective-batch 10000000000|GiB|lower them", 2),
    ("train_clip --xbm-size 1000000000000", "--xbm-size 1000000000000|GiB|lower them", 2),
    # Flags and choices
    ("train_clip --effective-bach 8", "--effective-bach|--effective-batch", 2),
    ("train_clip --batch-size 8", "--batch-size is called --effective-batch here|--help", 2),
    ("train_siglip --batch_size=8", "--batch_size is called --effective-batch here|--help", 2),
    ("train_clip --grad-accum 8", "--grad-accum is called --chunk-size here|--help", 2),
    ("train_clip --learning-rate 1", "--learning-rate is called --lr here", 2),
    ("train_clip --num-workers 1", "--num-workers is called --workers here", 2),
    ("train_clip --bf16", "--bf16 is called --precision bf16 here", 2),
    ("evaluate zeroshot --num-workers 1", "--num-workers is called --workers here", 2),
    ("train_clip --schedule cosin", "--schedule|cosin|'cosine', 'constant', 'linear'", 2),
    ("train_clip --tracker mlflow", "--tracker|mlflow|tensorboard", 2),
    ("train_clip --freeze imgae", "--freeze imgae|no such part|nearest is image", 2),
    ("train_clip --freeze image text scale bias", "--freeze image text scale bias|leaves nothing to train", 2),
    ("train_clip --freeze image.last:99", "--freeze image.last:99|has 2 blocks|from 1 to 2", 2),
    ("train_clip --best-metric acuracy --eval-every 1", "--best-metric acuracy|choose from loss, accuracy", 2),
    # Models
    ("train_clip --model openai/clip-vit-base-patch32", "--model openai/clip-vit-base-patch32|HF_HOME", 2),
    ("train_clip --model ''", "--model '' is empty|leave it out", 2),
    ("train_clip --model runs/none", "--model runs/none: there is no such folder|runs/ is a folder here", 2),
    ("train_clip --model ./none", "--model ./none: there is no such folder", 2),
    (
        "train_clip --image-tower torchvision:resnet18:random --text-tower runs/none#text",
        "--text-tower runs/none: there is no such folder",
        2,
    ),
    ("train_clip --image-tower a/b/c --text-tower x", "--image-tower a/b/c: there is no such folder", 2),
    ("train_clip --model no_weights", "--model no_weights|no file named model.safetensors", 2),
    ("train_clip --model cut_model", "--model cut_model|cannot be loaded|Give a local folder", 2),
    ("train_clip --model bad_config", "--model bad_config|not a valid JSON file", 2),
    ("train_clip --model run", "--model run|no config.json|export and checkpoints", 2),
    ("train_clip --image-tower nowhere --text-tower x", "--image-tower nowhere|cannot be loaded|HF_HOME", 2),
    ("train_clip --image-tower torchvision:resnet51 --text-tower x", "resnet51|nearest is torchvision:resnet50", 2),
    ("train_clip --image-tower torchvision:resnet50:V7 --text-tower x", "resnet50:V7|IMAGENET1K_V2", 2),
    ("train_clip --text-tower x", "--image-tower and --text-tower go together|--model", 2),
    ("train_clip --lora 100000", "--lora 100000|above 64|4 to 64 is usual", 2),
    ("train_clip --projection-dim 0", "--projection-dim 0|at least 1", 2),
    # Runs and settings files
    ("train_clip --resume nowhere", "--resume nowhere|use auto, none, or RUN/checkpoints", 2),
    ("train_clip --resume run --dropout 0.1", "--dropout 0.1|that of the checkpoint (0.0)|--model", 2),
    ("train_siglip --resume run", "--resume run|train_clip.py|--model", 2),
    ("train_clip --resume cut_run", "--resume cut_run|not a whole checkpoint|RUN/checkpoints", 2),
    ("train_clip --output-dir run", "--output-dir run|already holds a run|--resume auto", 2),
    ("train_clip --output-dir file", "--output-dir file|cannot be written|another folder", 2),
    ("train_clip --output-dir file/below", "--output-dir file/below|cannot be written|another folder", 2),
    ("train_clip --config", "--config needs a YAML file|name one", 2),
    ("train_clip --config nowhere.yaml", "--config nowhere.yaml|cannot be read|name a YAML file", 2),
    ("train_clip --config cut.yaml", "--config cut.yaml|not YAML|line 1", 2),
    ("train_clip --config binary.csv", "--config binary.csv|not YAML", 2),
    ("train_clip --config list.yaml", "--config list.yaml|must hold `name: value` lines", 2),
    ("train_clip --config key.yaml", "--config key.yaml|'efective-batch'|did you mean effective_batch", 2),
    ("train_clip --config type.yaml", "--config type.yaml|effective_batch: many|int", 2),
    ("train_clip --config choice.yaml", "--config choice.yaml|augment: hard|'light'", 2),
    ("train_clip --config nested.yaml", "--config nested.yaml|data: value", 2),
    ("train_clip --config twice.yaml", "--config twice.yaml|lr is there twice|line 3", 2),
    ("train_clip --config spellings.yaml", "--config spellings.yaml: cache_dir is there twice, as cache-dir too", 2),
    ("train_clip --config empty.yaml", "--config empty.yaml: --output-dir '' is empty|leave it out", 2),
    ("train_clip --config yes.yaml", "--config yes.yaml|compile: 'yes' must be bool", 2),
    ("train_clip --config time.yaml", "--config time.yaml|effective_batch: '1:30' must be int or auto", 2),
    # Evaluation
    ("evaluate", "retrieval, zeroshot, probe", 2),
    ("evaluate retreival", "retreival|retrieval, zeroshot", 2),
    ("evaluate zeroshot --model empty", "--model empty|holds no model|name a run", 2),
    ("evaluate zeroshot --model no_weights", "--model no_weights|no file named model.safetensors", 2),
    ("evaluate zeroshot --model ''", "--model '' is empty|leave it out", 2),
    ("evaluate zeroshot --model runs/none", "--model runs/none: there is no such folder|runs/ is a folder here", 2),
    ("evaluate zeroshot --limit 99999999999999999999", "--limit 99999999999999999999|1000000000000", 2),
    ("evaluate probe --shots 99999999999999999999", "--shots 99999999999999999999|1000000000000", 2),
    ("evaluate zeroshot --data squares --split val", "--split val|only train, test|--split auto", 2),
    ("evaluate zeroshot --data squares --split dev", "--split|dev|'val', 'test'", 2),
    ("evaluate zeroshot --data captions.csv", "captions.csv|no classes|evaluate.py retrieval", 2),
    ("evaluate zeroshot --data broken", "of broken|not_an_image 4|--data", 2),
    ("evaluate zeroshot --seed 5000000000", "--seed 5000000000|at most 4294967295", 2),
    ("evaluate retrieval --data captions.csv --query ' '", "--query ' ' is empty|write a value", 2),
    ("evaluate probe --data squares --shots 1000", "--shots 1000|more than 2 training images|fewer", 2),
    ("evaluate agnostic --data squares --temperatures 0", "--temperatures 0|above 0", 2),
    ("evaluate agnostic --data squares --prompts one_text.yaml", "--prompts one_text.yaml|at least 2", 2),
    ("evaluate compare --models model", "--models model|two or more|--models A B", 2),
    ("evaluate compare --models model ./model", "--models model ./model|different", 2),
    ("evaluate zeroshot --model ./runs/nowhere", "--model ./runs/nowhere|there is no such folder", 2),
    ("evaluate compare --data squares --models model nowhere", "--models nowhere|cannot be loaded", 2),
    ("evaluate table empty", "empty|holds no results|name a folder", 2),
    # Packing
    ("pack nowhere", "SOURCE nowhere|is not there", 2),
    ("pack ''", "an argument '' is empty|not set", 2),
    ("pack captions.csv --shard-size 99999999999999999999", "--shard-size 99999999999999999999|1000000000000", 2),
    ("export nowhere", "RUN nowhere is no folder|--output-dir", 2),
    ("export run --checkpoint ''", "--checkpoint '' is empty", 2),
    ("export run --checkpoint runs/none", "--checkpoint runs/none: no such model", 2),
    ("pack captions.csv --out squares", "--out squares|name an empty or new folder", 2),
    ("pack captions.csv --out file/below", "--out file/below|cannot be written|another folder", 2),
    ("pack broken --verify", "SOURCE broken|nothing can be packed (4 not_an_image)", 2),
    ("pack captions.csv --shard-bytes big", "--shard-bytes big|500M or 2G", 2),
    ("pack captions.csv --shard-sise 3", "--shard-sise|--shard-size", 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_wrong_inputs(tmp_path_factory.mktemp("wrong"))


@pytest.fixture
def here(folder, monkeypatch) -> Path:
    """The folder of wrong inputs as working folder, without network, and without reaching the training loop."""

    def began(*_: object, **__: object) -> None:
        raise AssertionError("the first batch was asked for")

    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(lib.train, "cached_step", began)
    return folder


@pytest.mark.parametrize(("command", "words", "code"), WRONG, ids=[command for command, _, _ in WRONG])
def test_a_wrong_invocation_is_told_once_and_before_the_first_batch(command, words, code, here, capsys):
    script, *flags = shlex.split(command)
    assert _exit_code(script, flags) == code
    told = capsys.readouterr().err
    _check_message(told, words)


PATHS = {  # every flag that takes a text or a path, by script
    "train_clip": "--config --data --val-data --prompts --class-names --image-root --image-column --caption-column "
    "--cache-dir --model --image-tower --text-tower --freeze --unfreeze --negative-prompts --best-metric --output-dir "
    "--resume",
    "evaluate zeroshot": "--data --image-root --image-column --caption-column --output-dir --cache-dir --model "
    "--prompts --class-names",
    "evaluate retrieval": "--query --image",
    "evaluate agnostic": "--prompts",
    "evaluate compare": "--models --names",
    "evaluate table": "--output-dir",
    "pack": "--out --shard-bytes --image-root --image-column --caption-column --cache-dir",
    "export": "--checkpoint --output --push-to-hub",
}


@pytest.mark.parametrize("command", PATHS)
def test_an_empty_text_is_told_by_its_flag_before_anything_is_done(command, here, capsys):
    """`--output-dir "$UNSET"` and `--output-dir=$UNSET` would be the working folder."""
    script, *task = command.split()
    before = sorted(here.iterdir())
    for flag in PATHS[command].split():
        for words in ([flag, ""], [f"{flag}="], [flag, " "]):
            assert _exit_code(script, [*task, *words]) == 2
            _check_message(capsys.readouterr().err, flag if flag == "--config" else f"{flag} '|' is empty|not set")
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("command", ["train_clip --data", "evaluate zeroshot --model", "pack --out", "export --output"])
def test_names_that_no_file_can_have_are_told_at_once(command, here, capsys):
    script, *words = command.split()
    bad = {
        "x" * 300: "a name of 300 bytes|take 255",
        "a/" * 3000 + "a": "6001 bytes|4096 in all",
        os.fsdecode(b"caf\xe9"): "'caf\\udce9' is not UTF-8|rename",
        "a\0b": "'a\\x00b' has a zero byte",
    }
    for name, message in bad.items():
        more = {"export": ["run"], "pack": ["captions.csv"]}.get(script, [])
        assert _exit_code(script, [*words, name, *more]) == 2
        _check_message(capsys.readouterr().err, f"{words[-1]}|{message}")


def test_long_texts_that_are_no_names_of_files_are_taken():
    """A query, a pattern and an address may have more letters than a name of a file."""
    long = "x" * 300
    flags = ["--freeze", f"re:{long}", "--data", f"https://h/{long}.tar", f"{{{long},b}}.tar", f"pipe:cat {long}.tar"]
    config = parse_config(train_clip.DEFAULTS, "", flags)
    assert config.freeze == (flags[1],) and config.data == tuple(flags[3:])
    flags = ["retrieval", "--model", "m", "--output-dir", "o", "--query", long]
    assert parse(Task, flags, config=evaluate.FLAT).query == (long,)


def _exit_code(script: str, flags: list[str]) -> int:
    quick = shlex.split(QUICK[script.split("_")[0]])
    task = []
    if script == "evaluate":
        task, flags = flags[:1], flags[1:]
        quick = quick if task and task[0] in TASKS else []
    try:
        with one_line_errors():
            return SCRIPTS[script]([*task, *quick, *flags])  # what comes last wins
    except SystemExit as ended:
        return ended.code


def _check_message(told: str, words: str) -> None:
    """One message: a line that begins with error, or one box of tyro's; no traceback; the words in it."""
    assert "Traceback" not in told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    boxes = told.count("For full helptext")
    assert len(errors) + boxes == 1, told
    message = errors[0] if errors else told
    missing = [word for word in words.split("|") if word not in message]
    assert not missing, (missing, message)


@pytest.mark.parametrize(
    "command", ["train_clip --lr fast", "train_clip --lr -1", "evaluate zeroshot --batch-size many"]
)
def test_another_rank_than_the_first_says_nothing(command, here, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    script, *flags = shlex.split(command)
    assert _exit_code(script, flags) == 2
    assert capfd.readouterr().err == ""


def test_a_port_in_use_is_told_with_the_flags_that_name_another(here):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        finished = _run(["train_clip.py"], rank | {"ACCELERATE_USE_CPU": "true"})
    assert finished.returncode == 2
    _check_message(finished.stderr, f"MASTER_PORT {port}|127.0.0.1 is in use|--main_process_port|--master-port")


def test_the_packer_as_a_program_ends_with_the_same_line_and_code(here):
    finished = _run(["-m", "lib.data.pack", "nowhere", "--out", "packed"])
    assert finished.returncode == 2
    _check_message(finished.stderr, "SOURCE nowhere|is not there|give digits")
    assert len(finished.stderr.splitlines()) == 1


def _run(command: list[str], more: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    scripts = [str(ROOT / word) if word.endswith(".py") else word for word in command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (more or {})
    return subprocess.run([sys.executable, *scripts], capture_output=True, text=True, env=environment, timeout=120)
