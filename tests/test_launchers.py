"""The launchers of launch/: valid shell, the right commands, signals and exit codes, and important fields."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

from lib.config import parse_config
from train_siglip import DEFAULTS

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])


@pytest.fixture
def stands(tmp_path) -> Path:
    """A folder like .venv whose bin/ has stand-ins for torchrun (one rank), srun and scontrol; they log arguments."""
    tools = {
        # Like torchrun, it waits for its rank and exits with 1 for any failure. The rank exits with 75 on USR1.
        "torchrun": f"""#!/usr/bin/env bash
echo "torchrun $*" >>"{tmp_path}/told"
env | grep -E '^(MASTER|NODE)' | sort >>"{tmp_path}/told"
"{sys.executable}" -c '
import pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
pathlib.Path("{tmp_path}/up").touch()
for _ in range(100 * int(pathlib.Path("{tmp_path}/seconds").read_text())):
    time.sleep(0.01)
' || exit 1
""",
        "accelerate": f'#!/usr/bin/env bash\necho "accelerate $*" >>"{tmp_path}/told"\nexit 3\n',
        "srun": '#!/usr/bin/env bash\nshift\nSLURM_NODEID=1 exec "$@"\n',
        "scontrol": f"""#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'host0\\nhost1\\n'; else echo "scontrol $*" >>"{tmp_path}/told"; fi
""",
    }
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "seconds").write_text("0")
    return tmp_path


def start(stands: Path, *command: str, **environment: str) -> subprocess.Popen:
    path = f"{stands / 'bin'}:{os.environ['PATH']}"
    everything = os.environ | {"VENV": str(stands), "RANKS": "2", "PATH": path} | environment
    return subprocess.Popen(["bash", *command], cwd=ROOT, env=everything, stdout=subprocess.DEVNULL)


def told(stands: Path) -> list[str]:
    return (stands / "told").read_text().splitlines()


def wait_until_up(stands: Path) -> None:
    deadline = time.monotonic() + 60
    while not (stands / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_every_script_is_sound(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_a_machine_among_several_is_given_its_place(stands):
    command = ("launch/node.sh", "train_clip.py", "--steps", "5")
    assert start(stands, *command, NODES="3", NODE_RANK="2", MASTER_ADDR="host0", MASTER_PORT="123").wait() == 0
    assert told(stands)[0] == (
        "torchrun --nnodes 3 --node-rank 2 --nproc-per-node 2 --master-addr host0 --master-port 123 "
        "train_clip.py --steps 5"
    )


def test_a_file_of_accelerate_takes_the_place_of_torchrun_and_its_exit_code_is_kept(stands):
    config = "accelerate_configs/ddp.yaml"
    code = start(stands, "launch/node.sh", "train_clip.py", NODES="2", NODE_RANK="1", ACCELERATE_CONFIG=config).wait()
    assert code == 3
    assert told(stands) == [
        f"accelerate launch --config_file {config} --num_machines 2 --machine_rank 1 --num_processes 4 "
        "--main_process_ip 127.0.0.1 --main_process_port 29500 train_clip.py"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_the_exit_code_says_start_again(stands, number):
    (stands / "seconds").write_text("60")
    node = start(stands, "launch/node.sh", "train_clip.py")
    wait_until_up(stands)
    node.send_signal(number)
    assert node.wait(timeout=30) == 75


def test_a_script_that_is_not_there_is_refused(stands):
    assert start(stands, "launch/node.sh", "train.py").wait() == 2


SLURM = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_JOB_ID": "70001"}


def test_slurm_gives_every_machine_its_place_and_resumes(stands):
    job = start(stands, "launch/slurm.sbatch", "train_clip.py", "--seed", "3", SLURM_GPUS_ON_NODE="4", **SLURM)
    assert job.wait() == 0
    assert told(stands)[0] == (
        "torchrun --nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr host0 --master-port 30001 "
        "train_clip.py --seed 3 --resume auto"
    )


def test_slurm_queues_a_stopped_job_again(stands):
    (stands / "seconds").write_text("60")
    job = start(stands, "launch/slurm.sbatch", "train_clip.py", SLURM_GPUS_ON_NODE="2", **SLURM)
    wait_until_up(stands)
    (node,) = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    os.kill(node, signal.SIGUSR1)  # to the step, as --signal=USR1@120 says
    assert job.wait(timeout=30) == 75
    assert told(stands)[-1] == "scontrol requeue 70001"


def test_slurm_seeds_have_folders_of_their_own(stands):
    command = ("launch/slurm_seeds.sbatch", "runs/x", "train_clip.py", "--lr", "1e-3")
    assert start(stands, *command, SLURM_ARRAY_TASK_ID="4", SLURM_GPUS_ON_NODE="1", **SLURM).wait() == 0
    assert told(stands)[0].endswith("train_clip.py --lr 1e-3 --seed 4 --output-dir runs/x/seed_4 --resume auto")


@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm_seeds.sbatch"])
def test_slurm_is_told_to_warn_the_steps_and_to_queue_again(name):
    lines = (ROOT / "launch" / name).read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append", "--ntasks-per-node=1"} <= options


def flags_of(command: str) -> list[str]:
    """The flags of train_siglip.py in a shell command."""
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {command.split("train_siglip.py", 1)[1].strip()}'],
        capture_output=True,
        text=True,
        check=True,
    )
    return words.stdout.splitlines()


def test_kubernetes_starts_again_what_was_told_to_stop():
    runtime, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    jobs = runtime["spec"]["template"]["spec"]
    (node,) = jobs["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    spec = node["template"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    assert jobs["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} == names
    config = parse_config(DEFAULTS, "", flags_of(job["spec"]["trainer"]["args"][0]))
    assert config.resume == "auto" and config.data == ("s3://bucket/shards/{0000..0099}.tar",)


def test_skypilot_recovers_what_was_told_to_stop():
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    config = parse_config(DEFAULTS, "", flags_of(task["run"]))
    assert config.resume == "auto" and str(config.output_dir).startswith(next(iter(task["volumes"])))
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_every_requirement_excludes_versions_that_were_not_tried_and_admits_the_installed_one():
    tried = 0
    for name in ("requirements.txt", "requirements-extra.txt", "tests/requirements.txt", "benchmarks/requirements.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line[0] not in "#-"]
        assert lines
        for line in lines:
            wanted = Requirement(line)
            assert {each.operator for each in wanted.specifier} in ({">=", "<"}, {"~="}), f"{name}: {line}"
            with suppress(PackageNotFoundError):
                assert wanted.specifier.contains(version(wanted.name)), f"{name}: {line}"
                tried += 1
    assert tried > 20
