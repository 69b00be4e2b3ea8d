"""Run the scripts in forked children, with a fault at a given write: `python fault_server.py ROOT`.

A line of JSON on stdin is a command: {"script", "arguments", "fault": [kind, name] or null, "out"}; its answer is a
line of JSON on stdout: {"code", "writes"}. kind: "full" lets the first write of that name and all later ones fail as
on a full disk; a signal, as "SIGKILL", comes just before it. Names are relative to ROOT, without process numbers.
"""

import errno
import json
import os
import re
import signal
import sys
from pathlib import Path

import torch

import evaluate
import lib.data.pack.__main__ as pack
import lib.evaluation.measure
import lib.evaluation.retrieval
import lib.evaluation.zeroshot
import lib.export.__main__ as export
import lib.train  # noqa: F401 - imported once, for all children
import train_clip
from lib.errors import one_line_errors

SCRIPTS = {
    "train": train_clip.main,
    "evaluate": lambda arguments: sys.exit(evaluate.main(arguments)),
    "export": export.main,
    "pack": pack.main,
}
WRITING = os.O_WRONLY | os.O_RDWR


class Writes:
    """An audit hook that records every write under the root and causes the fault."""

    def __init__(self, root: Path, fault: list[str] | None, list_to: Path):
        self.root, self.fault, self.list_to = f"{root}/", fault, os.open(list_to, os.O_WRONLY | os.O_CREAT)
        self.full = False

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & WRITING:
            self.write(os.fsdecode(arguments[0]))
        elif event in ("os.rename", "os.symlink"):
            self.write(os.fsdecode(arguments[1]))

    def write(self, path: str) -> None:
        if not path.startswith(self.root):
            return
        name = re.sub(r"\.\d+\.", ".N.", path.removeprefix(self.root))
        os.write(self.list_to, f"{name}\n".encode())
        if self.fault and name == self.fault[1]:
            kind, self.fault = self.fault[0], None
            self.full = kind == "full"
            if not self.full:
                os.kill(os.getpid(), signal.Signals[kind])
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def serve(root: Path) -> None:
    for line in sys.stdin:
        command = json.loads(line)
        listed = Path(command["out"]).with_suffix(".writes")
        listed.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            run(command, root, listed)
        _, status = os.waitpid(child, 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "writes": listed.read_text().splitlines()}
        print(json.dumps(answer), flush=True)


def run(command: dict, root: Path, listed: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    output = os.open(command["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    writes, save = Writes(root, command["fault"], listed), torch.save

    def named_save(values: object, file: Path) -> None:  # torch opens its files in C++, which no hook sees
        writes.write(str(file))
        save(values, file)

    torch.save = named_save
    sys.addaudithook(writes)
    code = 0
    try:
        with one_line_errors():
            SCRIPTS[command["script"]](command["arguments"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
